"""What the HTTP server is told, beside what the engine is: who may ask, how much, from where, and how long it takes to end."""

from __future__ import annotations

from dataclasses import dataclass

from mmv1.errors import ConfigError

DEFAULT_MAX_REQUEST_BYTES = 32 << 20
DEFAULT_SHUTDOWN_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The flags of `mmv1 serve` by their names. Raises ConfigError for what cannot work.

    `api_keys`: none, and everybody may ask. `root_path`: what a proxy has put before all paths. No `allowed_origins`: no page
    of another origin may read an answer. `max_queued_requests` is for all, the other for each API key; None: no limit.
    """

    api_keys: tuple[str, ...] = ()
    root_path: str = ""
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES
    max_queued_requests: int | None = None
    max_queued_requests_per_key: int | None = None
    shutdown_timeout_s: float = DEFAULT_SHUTDOWN_TIMEOUT_S
    uvicorn_log_level: str = "warning"
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None

    def __post_init__(self) -> None:
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("an API key must be one or more printable ASCII characters without spaces")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"--root-path {self.root_path} must start with a / and not end with one")
        if self.max_request_bytes < 1:
            raise ConfigError(f"--max-request-bytes {self.max_request_bytes} must be at least 1")
        for flag in ("max_queued_requests", "max_queued_requests_per_key"):
            limit = getattr(self, flag)
            if limit is not None and limit < 1:
                raise ConfigError(f"--{flag.replace('_', '-')} {limit} must be at least 1")
        if self.max_queued_requests_per_key is not None and not self.api_keys:
            raise ConfigError("--max-queued-requests-per-key needs API keys: give --api-key, or MMV1_API_KEY in the environment")
        if not 0 <= self.shutdown_timeout_s < float("inf"):
            raise ConfigError(f"--shutdown-timeout {self.shutdown_timeout_s} must be seconds, 0 or more")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("--ssl-keyfile and --ssl-certfile go together")
