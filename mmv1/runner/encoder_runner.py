"""The runner's picture side: this step's pictures through the vision tower in one call, and embeddings for chunks."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
import torch

from mmv1.encoder_cache.tensors import EncoderCacheTensors
from mmv1.errors import EngineError
from mmv1.models.interface import Model
from mmv1.runner.attention.backend import AttentionBackend
from mmv1.runner.input_batch import InputBatch, StepInputs
from mmv1.runner.platform import Platform
from mmv1.step import EncoderInput


def map_pixel_slab(fd: int) -> np.ndarray:
    """The slab behind a file descriptor as uint8, mapped read-only: bytes written by others appear in it."""
    return np.frombuffer(mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ), dtype=np.uint8)


class EncoderRunner:
    """`pixel_slab` uint8, flat; None when the engine was started without one (text only)."""

    def __init__(
        self,
        model: Model,
        platform: Platform,
        backend: AttentionBackend,
        cache: EncoderCacheTensors,
        pixel_slab: np.ndarray | None,
    ) -> None:
        self._model = model
        self._platform = platform
        self._backend = backend
        self._cache = cache
        self._slab = pixel_slab

    def encode(self, inputs: Sequence[EncoderInput]) -> None:
        """Embed the pictures and keep the embeddings. A picture's pixels may be released once the step has been executed."""
        if not inputs:
            return
        patches = self._read_patches(inputs)
        embeddings = self._model.encode_images(
            patches.to(self._platform.device, non_blocking=True), [x.grid_thw for x in inputs], self._backend
        )
        rows = np.concatenate([self._cache.allocate(x.mm_hash, x.num_tokens) for x in inputs])
        self._cache.write(self._platform.upload(rows), embeddings)

    def _read_patches(self, inputs: Sequence[EncoderInput]) -> torch.Tensor:
        patch_bytes = self._model.patch_bytes
        slab_size = 0 if self._slab is None else self._slab.size
        for x in inputs:
            frames, height, width = x.grid_thw
            if frames != 1 or x.nbytes != height * width * patch_bytes or x.offset + x.nbytes > slab_size:
                raise EngineError(f"picture {x.mm_hash.hex()} with grid {x.grid_thw} does not lie at its place in the pixel slab")
        staging = self._platform.staging(sum(x.nbytes for x in inputs), dtype=torch.uint8)
        host, start = staging.numpy(), 0
        for x in inputs:
            host[start : start + x.nbytes] = self._slab[x.offset : x.offset + x.nbytes]  # type: ignore[index]
            start += x.nbytes
        return staging.view(-1, patch_bytes)

    def gather(self, inputs: StepInputs, batch: InputBatch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """For the tokens of the step that lie in pictures: their places in the step, int64 [M], and their embeddings
        [M, width]. A chunk may begin and end anywhere in a picture."""
        places, rows = [], []
        for i, request_id in enumerate(inputs.request_ids):
            state, first = batch.state(request_id), int(inputs.computed[i])
            if first >= state.features_end:
                continue
            last = first + int(inputs.query_lens[i])
            for feature in state.features:
                start, stop = max(first, feature.offset), min(last, feature.offset + feature.num_tokens)
                if start < stop:
                    begin = int(inputs.starts[i]) - first
                    places.append(np.arange(begin + start, begin + stop))
                    rows.append(self._cache.rows(feature.mm_hash, start - feature.offset, stop - feature.offset))
        if not places:
            return None, None
        place_index, row_index = self._platform.upload_together(np.concatenate(places), np.concatenate(rows))
        return place_index, self._cache.gather(row_index)
