"""The one place that knows which accelerator there is: its device, its memory, and how bytes travel to it and back.

Transfers never block the host: uploads leave from pinned memory, downloads land in it and are waited for by an event. On a CPU
all of that is nothing, and the same calls cost nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class HostCopy:
    """Tensors on their way to the host. `wait` may be called on another thread than the one that launched the step."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        if not any(tensor.is_cuda for tensor in tensors):
            self._host = list(tensors)
            return
        self._host = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for host, tensor in zip(self._host, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event(blocking=True)
        self._event.record()

    def wait(self) -> list[np.ndarray]:
        """The tensors' values, once the device has got there."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._host]


class DeviceClock:
    """How long the device works at what is launched between two `lap`s. On CUDA by events, which are read once they have
    happened: nobody waits for them. Laps on one thread, `take` on one, perhaps another."""

    def __init__(self, is_cuda: bool) -> None:
        self._is_cuda = is_cuda
        self._last = self._now()
        self._laps: deque[tuple[Any, Any, dict[str, float]]] = deque()

    def restart(self) -> None:
        """What has been launched since the last lap is not counted."""
        self._last = self._now()

    def lap(self, shares: dict[str, float]) -> None:
        """What has been launched since the last lap, or restart, is so much of each: {"prefill": 0.9, "decode": 0.1}."""
        start, self._last = self._last, self._now()
        self._laps.append((start, self._last, shares))

    def take(self) -> dict[str, float]:
        """Seconds of each in the laps that have ended since the last time."""
        seconds: dict[str, float] = {}
        while self._laps and (not self._is_cuda or self._laps[0][1].query()):
            start, end, shares = self._laps.popleft()
            elapsed_s = start.elapsed_time(end) / 1000 if self._is_cuda else end - start
            for name, share in shares.items():
                seconds[name] = seconds.get(name, 0.0) + share * elapsed_s
        return seconds

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Platform:
    """The device this process runs on: the first CUDA device it can see, else the CPU."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.is_cuda = self.device.type == "cuda"
        self.default_attention_backend = "sdpa"
        if self.is_cuda:
            torch.cuda.set_device(self.device)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.is_cuda else "cpu"

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """`array` on the device. On a CPU the tensor shares the array's memory: do not write to it afterwards."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.is_cuda else tensor

    def upload_together(self, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Flat arrays of one dtype in one transfer; views of one tensor."""
        if not self.is_cuda:
            return tuple(torch.from_numpy(array) for array in arrays)
        return self.upload(np.concatenate(arrays)).split([array.size for array in arrays])

    def staging(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Host memory to fill and then send with `.to(device, non_blocking=True)`."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.is_cuda)

    def clock(self) -> DeviceClock:
        return DeviceClock(self.is_cuda)

    def start_measuring(self) -> None:
        """Forget earlier peaks of the device's memory."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def measured_free_bytes(self, utilization: float) -> int:
        """What `utilization` of the device leaves beside the peak since `start_measuring` and what others hold on it."""
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_reserved(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        beside_torch = total - free - torch.cuda.memory_reserved(self.device)
        torch.cuda.empty_cache()
        return int(total * utilization) - peak - beside_torch
