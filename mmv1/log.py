"""One logger for the whole product. No prompt, picture, URL query or key is ever logged."""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("mmv1")


def configure_logging(process_name: str) -> None:
    """Log to stderr, one line per record, with the process's name. Called once at the start of every mmv1 process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(levelname)s %(asctime)s [{process_name}] %(message)s", "%m-%d %H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(os.environ.get("MMV1_LOG_LEVEL", "INFO").upper())
    logger.propagate = False
