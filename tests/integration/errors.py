"""What an error may tell its reader, and what it must not."""

from __future__ import annotations

import re
from typing import Any

import httpx

# An address in memory, a stack's trace, a module or an object of ours, a path of the machine.
LEAK = re.compile(r"0x[0-9a-fA-F]{5,}|Traceback|\.py\b|site-packages|<_?io\.|object at|(?<![\w:<])/(?!v1\b)\w+/\w+")


def assert_is_clear_error(answer: httpx.Response, status: int = 400, code: str | None = None) -> dict[str, Any]:
    """OpenAI's shape, a sentence for the client, and nothing of the server's insides."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert code is None or error["code"] == code, error
    assert len(error["message"]) > 10
    assert not LEAK.search(answer.text), answer.text
    return error
