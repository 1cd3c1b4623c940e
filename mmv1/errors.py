"""The exception tree. Every failure has an owner: the client's request, a picture in it, the start-up, or the engine.

    MMV1Error
    ├── ConfigError            the operator's settings or model directory cannot work; raised before anything serves
    ├── RequestError           this request is at fault (HTTP 4xx); nothing else is affected
    │   ├── ContextLengthError     more tokens than the model's context
    │   └── ImageError             a picture cannot be fetched, decoded or accepted
    └── EngineError            our side failed (HTTP 5xx)
        ├── EngineDeadError        the engine process is gone or unusable
        │   └── EmbedderDeadError      the same of the embedding model's
        └── ShuttingDownError      the server was told to end before the answer was complete

Messages are written for the person who sent the request: they name no address in memory, no path and no host of the server.
"""

from __future__ import annotations


class MMV1Error(Exception):
    """Base of everything mmv1 raises on purpose."""


class ConfigError(MMV1Error):
    """The operator's settings, or the model directory, cannot work. One sentence that says what to change."""


class RequestError(MMV1Error):
    """The request is at fault. `status`, `code` and `param` follow OpenAI's error object."""

    def __init__(self, message: str, *, code: str = "invalid_value", param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.status = status


class ContextLengthError(RequestError):
    def __init__(self, message: str, *, param: str | None = "messages") -> None:
        super().__init__(message, code="context_length_exceeded", param=param)


class ImageError(RequestError):
    """A picture of the request cannot be used. Codes: invalid_image, image_too_large, unsupported_image_format,
    image_url_forbidden, image_fetch_failed, image_fetch_timeout, image_not_supported, too_many_images."""

    def __init__(self, message: str, *, code: str = "invalid_image", param: str | None = "messages") -> None:
        super().__init__(message, code=code, param=param)


class EngineError(MMV1Error):
    """Our side failed; the request may be sent again."""


class EngineDeadError(EngineError):
    """The engine process ended or stopped answering; this server cannot generate any more."""


class EmbedderDeadError(EngineDeadError):
    """The embedding model's process is gone; where a server needs one, another is being started."""


class ShuttingDownError(EngineError):
    """The server was told to end, and this answer took longer than it had; another server, or this one later, may give it."""
