"""What a request may say of how large its pictures become: of one picture, or of all with vLLM's `mm_processor_kwargs`.

Only what is said is kept here; what follows from it, with the server's own limits, is `layout`'s to decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from mmv1.errors import RequestError

T = TypeVar("T")

Detail = Literal["low", "high", "auto"]
Pixels = Annotated[int, Meta(ge=1, le=2**63 - 1)]


class ImageSettings(msgspec.Struct, frozen=True, kw_only=True):
    """None: nothing is said. Pixels are of the picture once resized. The params name the places in the request, for errors."""

    detail: Detail | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    min_param: str = "messages"
    max_param: str = "messages"


NOTHING_SAID = ImageSettings()


class PictureSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may stand beside a picture."""

    detail: Detail | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None

    def settings(self, place: str) -> ImageSettings:
        """`place`: where the picture stands in the request."""
        return ImageSettings(
            detail=self.detail,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            min_param=f"{place}.min_pixels",
            max_param=f"{place}.max_pixels",
        )


class ProcessorSize(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """transformers 5's names for the two: numbers of pixels in all, whatever "edge" may say."""

    shortest_edge: Pixels | None = None
    longest_edge: Pixels | None = None


class ProcessorKwargs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`mm_processor_kwargs`. Of two spellings of one number the older goes first, as in transformers."""

    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    size: ProcessorSize | None = None

    def settings(self) -> ImageSettings:
        size = self.size or ProcessorSize()
        by_size = "mm_processor_kwargs.size"
        return ImageSettings(
            min_pixels=size.shortest_edge if self.min_pixels is None else self.min_pixels,
            max_pixels=size.longest_edge if self.max_pixels is None else self.max_pixels,
            min_param=f"{by_size}.shortest_edge" if self.min_pixels is None else "mm_processor_kwargs.min_pixels",
            max_param=f"{by_size}.longest_edge" if self.max_pixels is None else "mm_processor_kwargs.max_pixels",
        )


def picture_settings(said: Mapping[str, Any], place: str) -> ImageSettings:
    """Of what a script writes beside a picture. Raises RequestError that names a key that is not known, or wrong."""
    return _converted(said, PictureSettings, place).settings(place)


def processor_settings(kwargs: Mapping[str, Any] | None) -> ImageSettings:
    """Of a script's `mm_processor_kwargs`. Raises RequestError likewise."""
    return NOTHING_SAID if kwargs is None else _converted(kwargs, ProcessorKwargs, "mm_processor_kwargs").settings()


def _converted(said: Any, kind: type[T], place: str) -> T:
    try:
        return msgspec.convert(said, kind)
    except msgspec.ValidationError as error:
        raise RequestError(f"{place}: {error}", param=place) from None
