"""The runner's picture side: pictures through the vision tower, several in one call, beside the steps.

Encoding has a thread and a stream of its own. A step reads an embedding only when the scheduler has been told that it is
complete, or behind its batch (`follow`); and room is taken only from embeddings that no step in flight reads. So encoding never
waits for a step here.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from mmv1.encoder_cache.tensors import EncoderCacheTensors
from mmv1.errors import EngineError
from mmv1.models.interface import Model
from mmv1.runner.input_batch import InputBatch, StepInputs
from mmv1.runner.platform import DeviceTimer, Marker, Platform
from mmv1.runner.tower_forward import TowerForward
from mmv1.step import EncodeBatch, EncodeOutput, EncoderInput

_BATCHES_KNOWN = 8  # more than are ever in flight


def map_pixel_slab(fd: int) -> np.ndarray:
    """The slab behind a file descriptor as uint8: bytes written by others appear in it. Writable, since a device's driver asks
    for that, though nothing here writes."""
    return np.frombuffer(mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE), dtype=np.uint8)


class PendingEncode:
    """A batch that has been launched. `wait` may be called on another thread."""

    def __init__(self, batch_id: int, timer: DeviceTimer) -> None:
        self._batch_id = batch_id
        self._timer = timer

    def wait(self) -> EncodeOutput:
        """When this returns, the embeddings are complete and the pixels have been read."""
        return EncodeOutput(self._batch_id, self._timer.wait())


class EncoderRunner:
    """`pixel_slab` uint8, flat; None when the engine was started without one (text only)."""

    def __init__(
        self,
        model: Model,
        platform: Platform,
        tower: TowerForward,
        cache: EncoderCacheTensors,
        pixel_slab: np.ndarray | None,
    ) -> None:
        self._model = model
        self._platform = platform
        self._tower = tower
        self._cache = cache
        self._slab = torch.from_numpy(np.empty(0, np.uint8) if pixel_slab is None else pixel_slab)
        self._launching = threading.Condition()
        self._launched: deque[tuple[int, Marker]] = deque(maxlen=_BATCHES_KNOWN)  # batch_id, and its end on the device

    @torch.inference_mode()
    def encode(self, batch: EncodeBatch) -> PendingEncode:
        """Launch: forget what was evicted, embed the pictures and keep the embeddings."""
        with self._platform.on_encoder_stream():
            timer = self._platform.timer()
            self._cache.free(batch.free_mm_hashes)
            if batch.inputs:
                self._check(batch.inputs)
                embeddings = self._tower([x.grid_thw for x in batch.inputs], partial(self._send_patches, batch.inputs))
                rows = np.concatenate([self._cache.allocate(x.mm_hash, x.num_tokens) for x in batch.inputs])
                self._cache.write(self._platform.upload(rows), embeddings)
            timer.stop()
            with self._launching:
                self._launched.append((batch.batch_id, self._platform.mark()))
                self._launching.notify_all()
            return PendingEncode(batch.batch_id, timer)

    def follow(self, batch_id: int) -> None:
        """What is launched next on the current stream begins when this batch, and those before it, have ended. Waits until it has
        been launched, on its own thread. 0: nothing to follow."""
        if not batch_id:
            return
        with self._launching:
            self._launching.wait_for(lambda: self._launched and self._launched[-1][0] >= batch_id)
            end = next(marker for launched, marker in self._launched if launched >= batch_id)
        self._platform.wait_for(end)

    def _check(self, inputs: Sequence[EncoderInput]) -> None:
        for x in inputs:
            frames, height, width = x.grid_thw
            is_whole = x.nbytes == height * width * self._model.patch_bytes
            if frames != 1 or not is_whole or x.offset + x.nbytes > self._slab.numel():
                raise EngineError(f"picture {x.mm_hash.hex()} with grid {x.grid_thw} does not lie at its place in the pixel slab")

    def _send_patches(self, inputs: Sequence[EncoderInput], patches: torch.Tensor) -> None:
        """Fill `patches` uint8 [sum of patches, patch_bytes] on the device, straight from the slab."""
        for x, place in zip(inputs, patches.view(-1).split([x.nbytes for x in inputs]), strict=True):
            place.copy_(self._slab[x.offset : x.offset + x.nbytes], non_blocking=True)

    def place_images(self, inputs: StepInputs, batch: InputBatch) -> None:
        """Write into the step's `image_rows` which row of the encoder cache each token of a picture takes. A chunk may begin and
        end anywhere in a picture."""
        for i in inputs.in_pictures:
            first = int(inputs.computed[i])
            last, begin = first + int(inputs.query_lens[i]), int(inputs.starts[i]) - first
            for feature in batch.state(inputs.request_ids[i]).features:
                start, stop = max(first, feature.offset), min(last, feature.offset + feature.num_tokens)
                if start < stop:
                    rows = self._cache.rows(feature.mm_hash, start - feature.offset, stop - feature.offset)
                    inputs.image_rows[begin + start : begin + stop] = rows
