"""The vision tower over a batch of pictures.

A batch of common size is launched as one recorded graph, its layout in device memory, padded to the next recorded number of
patches: a tower has hundreds of short kernels, and launching them one by one takes the host longer than a small picture takes the
device, while the steps need the host too. A larger batch runs kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from mmv1.models.interface import GridTHW, Model
from mmv1.runner.attention.backend import AttentionBackend
from mmv1.runner.platform import Platform

# Numbers of patches that are recorded, at most a quarter apart; 5504, 11008, 16512 and 22016 are one to four pictures of
# 1024 x 1024 pixels.
GRAPH_SIZES = (
    256, 384, 512, 640, 768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 4608, 5120, 5504, 6144, 7168, 8192, 9216,
    11_008, 12_288, 14_336, 16_512, 20_480, 22_016,
)  # fmt: skip


class _Recorded(NamedTuple):
    patches: torch.Tensor  # uint8 [size, patch_bytes]
    layout: tuple[Any, ...]
    replay: Callable[[], object]
    embeddings: torch.Tensor  # [size / patches per token, width]


class TowerForward:
    def __init__(self, model: Model, platform: Platform, backend: AttentionBackend) -> None:
        self._model = model
        self._platform = platform
        self._backend = backend
        self._recorded: dict[int, _Recorded] = {}
        self._unit = model.spatial_merge_size**2

    def __call__(self, grids: Sequence[GridTHW], send: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Embeddings [tokens, width] of pictures with these grids, valid until the next call. `send` is called once, to fill the
        pictures' patches, uint8 [sum of patches, patch_bytes], on the device."""
        num_patches = sum(frames * height * width for frames, height, width in grids)
        for size, recorded in self._recorded.items():
            if size >= num_patches:
                layout = self._model.lay_out_images(grids, self._backend, size)
                if layout is None:
                    break
                send(recorded.patches[:num_patches])
                _copy_tensors(recorded.layout, layout)
                recorded.replay()
                return recorded.embeddings[: num_patches // self._unit]
        patches = torch.empty(num_patches, self._model.patch_bytes, dtype=torch.uint8, device=self._platform.device)
        send(patches)
        return self._model.encode_images(patches, self._model.lay_out_images(grids, self._backend), self._backend)

    def record(self, sizes: Sequence[int]) -> None:
        """Record batches of these numbers of patches. The largest first: the others then find room in its memory."""
        recorder, recorded = self._platform.recorder(), {}
        merge = self._model.spatial_merge_size
        for size in sorted(sizes, reverse=True):
            patches = torch.zeros(size, self._model.patch_bytes, dtype=torch.uint8, device=self._platform.device)
            layout = self._model.lay_out_images([(1, merge, merge)], self._backend, size)
            if layout is None:
                raise ValueError(f"{size} patches leave no room for a picture")

            def run(patches: torch.Tensor = patches, layout: tuple[Any, ...] = layout) -> torch.Tensor:
                return self._model.encode_images(patches, layout, self._backend)

            run()  # loads the kernels, which a recording cannot
            recorded[size] = _Recorded(patches, layout, *recorder.record(run))
        self._recorded = dict(sorted(recorded.items()))


def _copy_tensors(target: Any, source: Any) -> None:
    """Every tensor of a tuple, or of a tuple in it, over the one in the same place."""
    if isinstance(target, torch.Tensor):
        target.copy_(source)
    elif isinstance(target, tuple):
        for one, other in zip(target, source, strict=True):
            _copy_tensors(one, other)
