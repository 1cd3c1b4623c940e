"""From a picture's size to its place in the prompt: resized size, grid, tokens and bytes, without decoding and without torch.

One class per image processor, found by the model's architecture; families that share a processor share its class. The rules are
those of transformers (5.17), and are checked against it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from mmv1.config import (
    ModelConfig,
    image_normalization,
    read_image_processor_config,
    section,
    text_config,
    whole_number,
)
from mmv1.errors import ConfigError, EngineError, ImageError, RequestError
from mmv1.preprocess.image_settings import ImageSettings
from mmv1.preprocess.media import MAX_ASPECT_RATIO

Resample = Literal["bilinear", "bicubic"]

_RESAMPLE: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_NUM_CHANNELS = 3
_ORDINARY_PIXELS = 1_000_000  # a picture of about 1 megapixel
_LOW_DETAIL_PIXELS = 512 * 512


class PixelLimits(NamedTuple):
    """Fewest and most pixels a picture is resized to."""

    min_pixels: int
    max_pixels: int


class ImagePlace(NamedTuple):
    """What one picture becomes. Sizes in pixels, `grid_thw` in patches, `num_tokens` in prompt tokens, `nbytes` in the slab."""

    resized_height: int
    resized_width: int
    grid_thw: tuple[int, int, int]
    num_tokens: int
    nbytes: int


class ImageLayout(Protocol):
    """What the rest of the house asks of a layout. `image_token_id`: the placeholder of a picture's token; None, as of
    `video_token_id`: the model has none. Each method is described where pictures are taken."""

    takes_images: bool
    image_token_id: int | None
    video_token_id: int | None
    row_bytes: int
    patch_size: int
    merge_size: int
    resample: Resample

    def limits_in_force(self, request: ImageSettings, pictures: Sequence[ImageSettings]) -> list[PixelLimits]: ...

    def place(self, width: int, height: int, limits: PixelLimits | None = None) -> ImagePlace: ...

    def image_bytes(self, num_tokens: int) -> int: ...

    def max_image_tokens(self, max_model_len: int) -> int: ...

    def ordinary_image_bytes(self) -> int: ...

    def fingerprint(self, limits: PixelLimits) -> str: ...


class Qwen2VLLayout:
    """Qwen2-VL and the vision-language families after it: square patches, 2 x 2 of them to a token, any size within the pixel
    limits. Sides, limits and scales are in the model's directory.

    In the slab a picture is uint8 [num_patches, 3 * patch_size**2], one temporal frame (the second is a copy), rows in
    windows of merge_size x merge_size patches, channel first inside a row.
    """

    architectures: ClassVar = (
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    )
    takes_images: bool = True

    def __init__(
        self,
        processor_config: dict[str, Any],
        hf_config: dict[str, Any],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        """`processor_config`: preprocessor_config.json; `min_pixels` and `max_pixels` override it. Raises ConfigError."""
        size = section(processor_config, "size")
        limits = {  # the user's word before the file's, and the file's newer names before its older ones
            "min_pixels": (min_pixels, processor_config.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels")),
            "max_pixels": (max_pixels, processor_config.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels")),
        }
        said = {name: next((value for value in values if value is not None), None) for name, values in limits.items()}
        self.limits = PixelLimits(whole_number(said, "min_pixels", 56 * 56), whole_number(said, "max_pixels", 28 * 28 * 1280))
        self.patch_size = whole_number(processor_config, "patch_size", 14)
        self.merge_size = whole_number(processor_config, "merge_size", 2)
        self.temporal_patch_size = whole_number(processor_config, "temporal_patch_size", 2)
        self.image_mean, self.image_std, self.rescale_factor = image_normalization(processor_config)
        self.resample = _resample(processor_config.get("resample", 3))
        if not all(processor_config.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")):
            raise ConfigError("preprocessor_config.json leaves out a step (do_resize, do_rescale, ...): not supported")
        if self.limits.min_pixels > self.limits.max_pixels:
            raise ConfigError("min_pixels ({}) must be at most max_pixels ({})".format(*self.limits))
        self.factor = self.patch_size * self.merge_size
        self.row_bytes = _NUM_CHANNELS * self.patch_size**2
        self._check_tower(section(hf_config, "vision_config"))
        ids = text_config(hf_config)
        self.image_token_id: int | None = whole_number(ids, "image_token_id", least=0)
        self.video_token_id: int | None = whole_number(ids, "video_token_id", least=0)

    def _check_tower(self, vision: dict[str, Any]) -> None:
        """Raises ConfigError where pictures would be cut up otherwise than the vision tower takes them."""
        for own, theirs in (("patch_size", "patch_size"), ("merge_size", "spatial_merge_size")):
            expected = whole_number(vision, theirs, getattr(self, own))
            if expected != getattr(self, own):
                message = f"preprocessor_config.json says {own} {getattr(self, own)} where config.json has {theirs} {expected}"
                raise ConfigError(message)

    def limits_in_force(self, request: ImageSettings, pictures: Sequence[ImageSettings]) -> list[PixelLimits]:
        """For each picture the limits it is resized within. Each of the two numbers is the picture's own, else what its
        `detail` makes of the request's (low: at most 512 x 512 pixels; else nothing), else the request's, else the server's.
        Raises RequestError for a max_pixels above the server's, which everything that holds a picture is sized for, and for a
        min_pixels asked for that is above the max_pixels in force. The server's min_pixels gives way to a lower max_pixels, and
        the request's to a low detail."""
        for asked in (request, *pictures):
            most = self.limits.max_pixels if asked.max_pixels is None else asked.max_pixels
            if most > self.limits.max_pixels:
                message = f"max_pixels is {most}; this server resizes pictures to {self.limits.max_pixels} pixels at most"
                raise RequestError(message, param=asked.max_param)
            if asked.min_pixels is not None and asked.min_pixels > most:
                raise _min_above_max(asked, most)
        return [self._limits_of(picture, request) for picture in pictures]

    def _limits_of(self, picture: ImageSettings, request: ImageSettings) -> PixelLimits:
        least = _first(picture.min_pixels, request.min_pixels, self.limits.min_pixels)
        most = _first(picture.max_pixels, request.max_pixels, self.limits.max_pixels)
        is_low = picture.detail == "low" and picture.max_pixels is None
        if is_low:
            most = min(most, _LOW_DETAIL_PIXELS)
        gives_way = picture.min_pixels is None and (request.min_pixels is None or is_low)
        if least > most and not gives_way:
            raise _min_above_max(request if picture.min_pixels is None else picture, most)
        return PixelLimits(min(least, most), most)

    def resized_size(self, height: int, width: int, limits: PixelLimits | None = None) -> tuple[int, int]:
        """The size a picture of height x width is resized to: multiples of `factor` within the pixel limits (the server's if
        none are given), nearly in proportion. transformers' smart_resize, with Python's rounding of halves to even. Raises
        ImageError."""
        min_pixels, max_pixels = limits or self.limits
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ImageError(f"the image's sides may differ by a factor of {MAX_ASPECT_RATIO} at most")
        factor = self.factor
        new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
        if new_height * new_width > max_pixels:
            shrink = math.sqrt((height * width) / max_pixels)
            new_height = max(factor, math.floor(height / shrink / factor) * factor)
            new_width = max(factor, math.floor(width / shrink / factor) * factor)
        elif new_height * new_width < min_pixels:
            grow = math.sqrt(min_pixels / (height * width))
            new_height = math.ceil(height * grow / factor) * factor
            new_width = math.ceil(width * grow / factor) * factor
        return new_height, new_width

    def place(self, width: int, height: int, limits: PixelLimits | None = None) -> ImagePlace:
        """Where a picture of width x height pixels (upright) ends up, within the server's limits if none are given. Raises
        ImageError."""
        new_height, new_width = self.resized_size(height, width, limits)
        rows, columns = new_height // self.patch_size, new_width // self.patch_size
        num_patches = rows * columns
        num_tokens = num_patches // self.merge_size**2
        return ImagePlace(new_height, new_width, (1, rows, columns), num_tokens, num_patches * self.row_bytes)

    def image_bytes(self, num_tokens: int) -> int:
        """Bytes in the slab of a picture of `num_tokens` tokens."""
        return num_tokens * self.merge_size**2 * self.row_bytes

    def max_image_tokens(self, max_model_len: int) -> int:
        """What everything that holds a picture is sized for: no picture within the server's limits has more tokens, and one
        that a request's own min_pixels makes larger is refused. One token of the context is left for the answer."""
        return min(self.most_tokens(self.limits), max_model_len - 1)

    def most_tokens(self, limits: PixelLimits) -> int:
        """An upper bound over all sizes and aspect ratios.

        Three cases of `resized_size`: shrunk in proportion; shrunk to a strip one token high, which may pass max_pixels;
        and grown, where both sides are rounded up, which passes max_pixels too if min_pixels is close to it."""
        unit = self.factor
        in_proportion = limits.max_pixels // unit**2
        stretch = math.sqrt(MAX_ASPECT_RATIO)
        has_strips = limits.max_pixels < MAX_ASPECT_RATIO * unit**2
        strip = math.floor(math.sqrt(limits.max_pixels) * stretch / unit) if has_strips else 0
        side = math.sqrt(limits.min_pixels) / unit
        grown = math.floor((side * stretch + 1) * (side / stretch + 1))
        return max(1, in_proportion, strip, grown)

    def ordinary_image_bytes(self) -> int:
        """Bytes in the slab of a picture of about one megapixel."""
        return self.image_bytes(max(1, min(_ORDINARY_PIXELS, self.limits.max_pixels) // self.factor**2))

    def fingerprint(self, limits: PixelLimits) -> str:
        """Everything here that decides a picture's bytes in the slab or its place in the prompt; enters mm_hash. However
        `limits` were asked for, equal ones give equal fingerprints."""
        names = ("patch_size", "merge_size", "temporal_patch_size", "resample", "rescale_factor", "image_mean", "image_std")
        return json.dumps({"family": "qwen2_vl/1", **limits._asdict(), **{name: getattr(self, name) for name in names}})


class TextLayout:
    """A model of text alone: no prompt has a picture, and there is nothing to hold one."""

    architectures: ClassVar = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
    takes_images: bool = False
    image_token_id: int | None = None
    video_token_id: int | None = None
    row_bytes: int = 1
    patch_size: int = 1
    merge_size: int = 1
    resample: Resample = "bicubic"

    def limits_in_force(self, request: ImageSettings, pictures: Sequence[ImageSettings]) -> list[PixelLimits]:
        return []

    def place(self, width: int, height: int, limits: PixelLimits | None = None) -> ImagePlace:
        raise EngineError("a picture came past the check of their number, which is 0 for this model")

    def image_bytes(self, num_tokens: int) -> int:
        return 0

    def max_image_tokens(self, max_model_len: int) -> int:
        return 0

    def ordinary_image_bytes(self) -> int:
        return 0

    def fingerprint(self, limits: PixelLimits) -> str:
        return json.dumps({"family": "text"})


def load_layout(model: ModelConfig, *, min_pixels: int | None = None, max_pixels: int | None = None) -> ImageLayout:
    """The layout of a model's family, from its directory. Raises ConfigError, also for an architecture that is not supported."""
    if model.architecture in TextLayout.architectures:
        return TextLayout()
    if model.architecture in Qwen2VLLayout.architectures:
        processor = read_image_processor_config(Path(model.path))
        return Qwen2VLLayout(processor, model.hf_config, min_pixels=min_pixels, max_pixels=max_pixels)
    known = ", ".join(sorted(TextLayout.architectures + Qwen2VLLayout.architectures))
    raise ConfigError(f"architecture '{model.architecture}' is not supported; supported: {known}")


def _first(*numbers: int | None) -> int:
    """The first that is said."""
    return next(number for number in numbers if number is not None)


def _min_above_max(asked: ImageSettings, max_pixels: int) -> RequestError:
    message = f"min_pixels is {asked.min_pixels}, more than the {max_pixels} pixels that the picture may have at most"
    return RequestError(message, param=asked.min_param)


def _resample(number: Any) -> Resample:
    try:
        return _RESAMPLE[int(number)]
    except (KeyError, TypeError, ValueError):
        message = f"resample {number!r} in preprocessor_config.json is not supported: 2 (bilinear) or 3 (bicubic)"
        raise ConfigError(message) from None
