"""Attention backends behind one contract (backend.py)."""

from __future__ import annotations

from mmv1.errors import ConfigError
from mmv1.runner.attention.backend import AttentionBackend
from mmv1.runner.attention.sdpa import SDPABackend

_BACKENDS: dict[str, type[AttentionBackend]] = {SDPABackend.name: SDPABackend}


def make_backend(name: str) -> AttentionBackend:
    """Raises ConfigError for a name no backend has."""
    if name not in _BACKENDS:
        raise ConfigError(f"there is no attention backend '{name}'; there are: {', '.join(sorted(_BACKENDS))}")
    return _BACKENDS[name]()
