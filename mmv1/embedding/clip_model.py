"""A CLIP model of open_clip: its weights, its tokenizer, and what it wants pictures to be. The only file that imports open_clip.

Pictures come as the pixels that `preprocess.crop` makes; from there on it is open_clip's own pipeline in float32: normalise,
encode, divide by the Euclidean norm.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import open_clip
import torch

from mmv1.errors import ContextLengthError
from mmv1.preprocess.crop import CropRules, ResizeMode
from mmv1.preprocess.decode import crop, decode_rgb
from mmv1.preprocess.header import probe_header

# Of a text, and of one word of it: open_clip's tokenizer takes 10 ms for a word of 512 random letters, four times that for twice.
_MAX_CHARACTERS, _MAX_LETTERS = 4096, 512
_LONG_WORD = re.compile(rf"[^\W\d_]{{{_MAX_LETTERS + 1}}}")
_MAX_WORDS = 100_000  # it keeps every word that it has seen
_EXTRA_FORMATS = ("BMP", "TIFF")  # which pictures are let in is decided before


class ClipModel:
    """`model`: NAME:TAG, as open_clip lists them, or NAME:PATH of weights; NAME may be the path of a JSON file with an
    architecture. Raises ValueError and whatever open_clip raises."""

    def __init__(self, model: str) -> None:
        name, _, pretrained = model.partition(":")
        if name.endswith(".json"):
            open_clip.add_model_config(name)
            name = Path(name).stem
        if name not in open_clip.list_models():
            raise ValueError(f"open_clip knows no architecture '{name}'")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = open_clip.create_model(name, pretrained, device=self.device)
        self._model.eval()
        self._tokenizer = open_clip.get_tokenizer(name)
        self._words = dict(getattr(self._tokenizer, "cache", {}))
        settings = open_clip.get_model_preprocess_cfg(self._model)
        self.rules = rules_of(settings)
        # [1, 3, 1, 1]
        self._mean, self._std = (torch.tensor(settings[key], device=self.device).view(1, -1, 1, 1) for key in ("mean", "std"))
        self.context_length: int = self._tokenizer.context_length
        self._padding = int(self._tokenizer([""])[0, -1])
        blank = torch.zeros(self.rules.height, self.rules.width, 3, dtype=torch.uint8)
        (picture,) = self.encode_pictures([blank])
        (text,) = self.encode_texts([self.tokens("", truncate=True)[0]])
        if len(picture) != len(text):
            raise ValueError("the model's pictures and texts have embeddings of different lengths")
        self.dimensions = len(text) // 4

    def pixels(self, encoded: bytes) -> torch.Tensor:
        """A picture as the model wants it, uint8 [height, width, 3]. Raises ImageError."""
        return torch.from_numpy(crop(decode_rgb(encoded, probe_header(encoded, _EXTRA_FORMATS)), self.rules))

    def pixels_at(self, slab: memoryview, offset: int) -> torch.Tensor:
        """The same, where a pool process has put it."""
        place = self.rules.place()
        flat = torch.frombuffer(slab[offset : offset + place.nbytes], dtype=torch.uint8)
        return flat.view(place.resized_height, place.resized_width, 3)

    def tokens(self, text: str, *, truncate: bool) -> tuple[torch.Tensor, int]:
        """Token ids, int64 [context_length], and how many of them are no padding. Raises ContextLengthError."""
        if truncate:
            text = text[:_MAX_CHARACTERS]
        if len(text) > _MAX_CHARACTERS:
            raise ContextLengthError(f"the text has {len(text)} characters; at most {_MAX_CHARACTERS} are read", param=None)
        if _LONG_WORD.search(text):
            raise ContextLengthError(f"a word of the text has more than {_MAX_LETTERS} letters", param=None)
        ids = self._tokenizer([text])[0]
        if not truncate and not torch.equal(ids, self._tokenizer([text], context_length=self.context_length + 1)[0, :-1]):
            raise ContextLengthError(
                f"the text has more than the {self.context_length} tokens that the model reads; with truncate_prompt_tokens -1 "
                "the rest is left out", param=None,
            )  # fmt: skip
        if len(self._words) and len(self._tokenizer.cache) > _MAX_WORDS:
            self._tokenizer.cache = dict(self._words)
        used = (ids != self._padding).nonzero()
        return ids, int(used[-1]) + 1 if len(used) else 0

    @torch.inference_mode()
    def encode_pictures(self, pictures: Sequence[torch.Tensor]) -> list[bytes]:
        """Embeddings, float32, of uint8 [height, width, 3] each."""
        pixels = torch.stack(list(pictures)).to(self.device)  # [num_pictures, height, width, 3]
        planes = pixels.permute(0, 3, 1, 2).contiguous().float().div_(255)
        return _to_bytes(self._model.encode_image(planes.sub_(self._mean).div_(self._std), normalize=True))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[torch.Tensor]) -> list[bytes]:
        """Embeddings, float32, of token ids, int64 [context_length] each."""
        return _to_bytes(self._model.encode_text(torch.stack(list(texts)).to(self.device), normalize=True))


def _to_bytes(embeddings: torch.Tensor) -> list[bytes]:
    """[n, dimensions], row by row."""
    return [row.tobytes() for row in embeddings.float().cpu().numpy().astype("<f4")]


def rules_of(settings: dict[str, Any]) -> CropRules:
    """Of open_clip's `preprocess_cfg`, by what its transform makes of that. Raises ValueError for what it could not."""
    size = settings["size"]
    height, width = (size, size) if isinstance(size, int) else (*size, *size)[:2]
    mode, filters = settings["resize_mode"], settings["interpolation"]
    if mode not in get_args(ResizeMode) or filters not in ("bicubic", "bilinear", "random") or settings["mode"] != "RGB":
        raise ValueError(f"its pictures are prepared in a way that is not supported: {settings}")
    # Where the target is no square, the transform that covers it is always bicubic; so is one that is random in training.
    is_bilinear = filters == "bilinear" and (mode != "shortest" or height == width)
    return CropRules(
        height=height,
        width=width,
        resize_mode=mode,
        resample="bilinear" if is_bilinear else "bicubic",
        fill_color=settings["fill_color"] if mode == "longest" else 0,
    )
