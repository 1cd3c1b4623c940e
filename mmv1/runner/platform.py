"""The one place that knows which accelerator there is: its device, its memory, and how bytes travel to it and back.

Transfers never block the host: uploads leave from pinned memory, downloads land in it and are waited for by an event. On a CPU
all of that is nothing, and the same calls cost nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from mmv1.log import logger

Marker = Any  # a place in a stream's work: an event of CUDA; None where work is done when it has been launched


class HostCopy:
    """Tensors, perhaps none, on their way to the host. `wait` may be called on another thread than the one that launched the
    step."""

    def __init__(self, tensors: Sequence[torch.Tensor], is_cuda: bool) -> None:
        self._event: torch.cuda.Event | None = None
        if not is_cuda:
            self._host = list(tensors)
            return
        self._host = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for host, tensor in zip(self._host, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event(blocking=True)
        self._event.record()

    def wait(self) -> list[np.ndarray]:
        """The tensors' values, once the device has done all that was launched before the copy."""
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


class DeviceTimer:
    """Seconds from its making to `stop`, as the current stream gets there. `wait`, on any thread, is when that has happened."""

    def __init__(self, is_cuda: bool) -> None:
        self._is_cuda = is_cuda
        self._start = self._event()
        self._end = self._start

    def stop(self) -> None:
        self._end = self._event()

    def wait(self) -> float:
        if not self._is_cuda:
            return self._end - self._start
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1000

    def _event(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return event


class Recorder:
    """Records work to be launched again as one: a CUDA graph; elsewhere the function itself. All that one recorder has recorded
    shares the memory of its intermediate results, and must therefore be replayed on one stream."""

    def __init__(self, is_cuda: bool) -> None:
        self._is_cuda = is_cuda
        self._pool: Any = None

    def record(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        """(replay, output): a replay runs again what `function` launched, on the same memory, and what it returned is then in
        `output` until anything of this recorder is replayed.

        Call on the stream of the replays, when the function has run before: kernels cannot be loaded while recording.
        """
        if not self._is_cuda:
            output = function().clone()
            return lambda: output.copy_(function()), output
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            output = function()
        self._pool = graph.pool()
        return graph.replay, output


class Platform:
    """The device this process runs on: the first CUDA device it can see, else the CPU.

    On CUDA steps and the encoding of pictures run on streams of their own, and a step's kernels go first wherever both could.
    `encoder_stream`: False puts pictures on the steps' stream, in line with them.
    """

    def __init__(self, *, encoder_stream: bool = True) -> None:
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.is_cuda = self.device.type == "cuda"
        self._step_stream = self._encoder_stream = None
        if self.is_cuda:
            torch.cuda.set_device(self.device)
            self._step_stream = torch.cuda.Stream(self.device, priority=-1)
            self._encoder_stream = torch.cuda.Stream(self.device) if encoder_stream else self._step_stream

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.is_cuda else "cpu"

    def on_step_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._step_stream) if self.is_cuda else nullcontext()

    def on_encoder_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._encoder_stream) if self.is_cuda else nullcontext()

    def mark(self) -> Marker:
        """What has been launched on the current stream."""
        if not self.is_cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def wait_for(self, marker: Marker) -> None:
        """Let what is launched next on the current stream begin behind what was marked. The host does not wait."""
        if self.is_cuda:
            torch.cuda.current_stream().wait_event(marker)

    @property
    def launches_ahead(self) -> bool:
        """Whether work runs after it has been launched, not while it is."""
        return self.is_cuda

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def copy_to_host(self, tensors: Sequence[torch.Tensor]) -> HostCopy:
        return HostCopy(tensors, self.is_cuda)

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """`array` on the device. On a CPU the tensor shares the array's memory: do not write to it afterwards."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.is_cuda else tensor

    def upload_together(self, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Flat arrays in one transfer, those of wider numbers first; views of one tensor. A transfer costs the host as much as
        a launch or two, however little it carries."""
        tensors = tuple(torch.from_numpy(array) for array in arrays)
        if not self.is_cuda:
            return tensors
        sizes = [array.nbytes for array in arrays]
        staging = self.staging(sum(sizes), dtype=torch.uint8)
        np.concatenate([array.view(np.uint8) for array in arrays], out=staging.numpy())
        parts = staging.to(self.device, non_blocking=True).split(sizes)
        return tuple(part.view(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True))

    def staging(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Host memory to fill and then send with `copy_(..., non_blocking=True)`. It is not used again before that is done."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.is_cuda)

    def register(self, host: np.ndarray) -> None:
        """Let the device read this memory by itself, so that transfers from it are asynchronous. The memory must live as long as
        the process. Where that is not allowed (a limit on locked memory), transfers wait and nothing else changes."""
        if not self.is_cuda:
            return
        result = torch.cuda.cudart().cudaHostRegister(host.ctypes.data, host.nbytes, 0)
        if int(result) != 0:
            logger.warning("The pixel slab cannot be registered with the device (error %d): transfers are slower", int(result))

    def recorder(self) -> Recorder:
        return Recorder(self.is_cuda)

    def clock(self) -> DeviceClock:
        return DeviceClock(self.is_cuda)

    def timer(self) -> DeviceTimer:
        return DeviceTimer(self.is_cuda)

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
        return int(total * utilization) - peak - beside_torch

    def release_unused(self) -> None:
        """Give memory that torch keeps for later back to the device."""
        if self.is_cuda:
            torch.cuda.empty_cache()
