"""From a picture's size to its place in the prompt: resized size, grid, tokens and bytes, without decoding and without torch.

One class per model family, found by the model's architecture. The rules are those of the family's image processor in
transformers (5.17), and are checked against it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from mmv1.config import (
    ModelConfig,
    image_normalization,
    read_image_processor_config,
    section,
    text_config,
    whole_number,
)
from mmv1.errors import ConfigError, ImageError
from mmv1.preprocess.media import MAX_ASPECT_RATIO

Resample = Literal["bilinear", "bicubic"]

_RESAMPLE: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_NUM_CHANNELS = 3
_ORDINARY_PIXELS = 1_000_000  # a picture of about 1 megapixel


class ImagePlace(NamedTuple):
    """What one picture becomes. Sizes in pixels, `grid_thw` in patches, `num_tokens` in prompt tokens, `nbytes` in the slab."""

    resized_height: int
    resized_width: int
    grid_thw: tuple[int, int, int]
    num_tokens: int
    nbytes: int


class Qwen2VLLayout:
    """Qwen2.5-VL: patches of 14 x 14 pixels, 2 x 2 of them to a token, any size within the pixel limits.

    In the slab a picture is uint8 [num_patches, 3 * patch_size**2], one temporal frame (the second is a copy), rows in
    windows of merge_size x merge_size patches, channel first inside a row.
    """

    architectures: ClassVar = ("Qwen2_5_VLForConditionalGeneration",)
    model_types: ClassVar = ("qwen2_5_vl",)

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
        self.min_pixels = whole_number(said, "min_pixels", 56 * 56)
        self.max_pixels = whole_number(said, "max_pixels", 28 * 28 * 1280)
        self.patch_size = whole_number(processor_config, "patch_size", 14)
        self.merge_size = whole_number(processor_config, "merge_size", 2)
        self.temporal_patch_size = whole_number(processor_config, "temporal_patch_size", 2)
        self.image_mean, self.image_std, self.rescale_factor = image_normalization(processor_config)
        self.resample = _resample(processor_config.get("resample", 3))
        if not all(processor_config.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")):
            raise ConfigError("preprocessor_config.json leaves out a step (do_resize, do_rescale, ...): not supported")
        if self.min_pixels > self.max_pixels:
            raise ConfigError(f"min_pixels ({self.min_pixels}) must be at most max_pixels ({self.max_pixels})")
        self.factor = self.patch_size * self.merge_size
        self.row_bytes = _NUM_CHANNELS * self.patch_size**2
        ids = text_config(hf_config)
        self.image_token_id = whole_number(ids, "image_token_id", least=0)
        self.video_token_id = whole_number(ids, "video_token_id", least=0)

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """The size a picture of height x width is resized to: multiples of `factor` within the pixel limits, nearly in
        proportion. transformers' smart_resize, with Python's rounding of halves to even. Raises ImageError."""
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ImageError(f"the image's sides may differ by a factor of {MAX_ASPECT_RATIO} at most")
        factor = self.factor
        new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
        if new_height * new_width > self.max_pixels:
            shrink = math.sqrt((height * width) / self.max_pixels)
            new_height = max(factor, math.floor(height / shrink / factor) * factor)
            new_width = max(factor, math.floor(width / shrink / factor) * factor)
        elif new_height * new_width < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            new_height = math.ceil(height * grow / factor) * factor
            new_width = math.ceil(width * grow / factor) * factor
        return new_height, new_width

    def place(self, width: int, height: int) -> ImagePlace:
        """Where a picture of width x height pixels (upright) ends up. Raises ImageError."""
        new_height, new_width = self.resized_size(height, width)
        rows, columns = new_height // self.patch_size, new_width // self.patch_size
        num_patches = rows * columns
        num_tokens = num_patches // self.merge_size**2
        return ImagePlace(new_height, new_width, (1, rows, columns), num_tokens, num_patches * self.row_bytes)

    def image_bytes(self, num_tokens: int) -> int:
        """Bytes in the slab of a picture of `num_tokens` tokens."""
        return num_tokens * self.merge_size**2 * self.row_bytes

    def max_image_tokens(self, max_model_len: int) -> int:
        """No admissible picture has more tokens. An upper bound over all sizes and aspect ratios, and one token of the
        context is left for the answer.

        Three cases of `resized_size`: shrunk in proportion; shrunk to a strip one token high, which may pass max_pixels;
        and grown, where both sides are rounded up."""
        unit = self.factor
        in_proportion = self.max_pixels // unit**2
        stretch = math.sqrt(MAX_ASPECT_RATIO)
        has_strips = self.max_pixels < MAX_ASPECT_RATIO * unit**2
        strip = math.floor(math.sqrt(self.max_pixels) * stretch / unit) if has_strips else 0
        side = math.sqrt(self.min_pixels) / unit
        grown = math.floor((side * stretch + 1) * (side / stretch + 1))
        return min(max(1, in_proportion, strip, grown), max_model_len - 1)

    def ordinary_image_bytes(self) -> int:
        """Bytes in the slab of a picture of about one megapixel."""
        return self.image_bytes(max(1, min(_ORDINARY_PIXELS, self.max_pixels) // self.factor**2))

    @property
    def fingerprint(self) -> str:
        """Everything here that decides a picture's bytes in the slab or its place in the prompt; enters mm_hash."""
        names = ("min_pixels", "max_pixels", "patch_size", "merge_size", "temporal_patch_size", "resample")
        normalisation = {name: getattr(self, name) for name in ("rescale_factor", "image_mean", "image_std")}
        return json.dumps({"family": "qwen2_vl/1", **{name: getattr(self, name) for name in names}, **normalisation})


LAYOUTS = (Qwen2VLLayout,)


def load_layout(model: ModelConfig, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Qwen2VLLayout:
    """The layout of a model's family, from its directory. Raises ConfigError."""
    model_type = model.hf_config.get("model_type")
    for layout in LAYOUTS:
        if model.architecture in layout.architectures or model_type in layout.model_types:
            processor = read_image_processor_config(Path(model.path))
            return layout(processor, model.hf_config, min_pixels=min_pixels, max_pixels=max_pixels)
    known = ", ".join(name for layout in LAYOUTS for name in layout.architectures)
    raise ConfigError(f"pictures for the architecture '{model.architecture}' are not supported; supported: {known}")


def _resample(number: Any) -> Resample:
    try:
        return _RESAMPLE[int(number)]
    except (KeyError, TypeError, ValueError):
        message = f"resample {number!r} in preprocessor_config.json is not supported: 2 (bilinear) or 3 (bicubic)"
        raise ConfigError(message) from None
