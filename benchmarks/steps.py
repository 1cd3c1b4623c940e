"""What a step costs on this device: the worker alone, without scheduler, server or clients.

    python -m benchmarks.steps MODEL_DIR [--json OUT] [--trace DIR] [flags of the engine...]

Random weights. Decode steps by batch size (period with the next step launched ahead, as the engine does; the host's share of it),
prefill steps, mixed ones, and the encoding of pictures, each beside the floor that its floating-point operations or bytes set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmv1.cli.options import add_engine_args, engine_args
from mmv1.config import resolve
from mmv1.runner.worker import Worker
from mmv1.step import CachedRequestData, EncodeBatch, EncoderInput, NewRequestData, SchedulerOutput
from mmv1.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


class Bench:
    """Requests made by hand: each has its blocks from the start, so that a step is only a number of tokens for each."""

    def __init__(self, worker: Worker, slab_fd: int, *, block_size: int, num_blocks: int) -> None:
        self.worker, self._slab_fd, self._block_size, self._num_blocks = worker, slab_fd, block_size, num_blocks
        self._ids: list[str] = []
        self._count = self._steps = 0

    def start(self, contexts: list[int], *, room: int, computed: bool) -> list[NewRequestData]:
        """New requests with `contexts` tokens known; `computed`: all but the last are taken as computed."""
        next_block, news = 1, []
        for length in contexts:
            wanted = -(-(length + room) // self._block_size)
            if next_block + wanted > self._num_blocks:
                raise SystemExit(f"{len(contexts)} x {contexts[0]} tokens do not fit {self._num_blocks} blocks")
            blocks = list(range(next_block, next_block + wanted))
            next_block += wanted
            self._count += 1
            ids = [(self._count * 7919 + i * 31) % 50_000 for i in range(length)]
            news.append(NewRequestData(f"r{self._count}", ids, length, [], GREEDY, blocks, length - 1 if computed else 0))
        return news

    def step(self, tokens: dict[str, int], new: list[NewRequestData], finished: list[str] = []) -> SchedulerOutput:  # noqa: B006
        self._steps += 1
        return SchedulerOutput(
            step_id=self._steps, num_scheduled_tokens=tokens, total_num_scheduled_tokens=sum(tokens.values()),
            new_requests=new, cached_requests=CachedRequestData([], []), finished_request_ids=finished,
        )

    def decode(self, batch: int, context: int, steps: int) -> dict[str, float]:
        news = self.start([context] * batch, room=steps + 8, computed=True)
        tokens = {new.request_id: 1 for new in news}
        pending, done, host = deque([self.worker.execute(self.step(tokens, news))]), [], []
        for _ in range(steps):
            start = time.perf_counter()
            pending.append(self.worker.execute(self.step(tokens, [])))
            host.append(time.perf_counter() - start)
            pending.popleft().wait()
            done.append(time.perf_counter())
        pending.popleft().wait()
        self.worker.execute(self.step({}, [], list(tokens))).wait()
        periods = np.diff(done[5:])
        return {"period_ms": 1e3 * float(np.median(periods)), "mean_ms": 1e3 * float(periods.mean()),
                "host_ms": 1e3 * statistics.median(host)}

    def prefill(self, lengths: list[int], num_decodes: int = 0, context: int = 1400, repeats: int = 5) -> dict[str, float]:
        times = []
        for _ in range(repeats + 1):
            news = self.start([context] * num_decodes + lengths, room=4, computed=True)
            for new in news[num_decodes:]:
                new.num_computed_tokens = 0
            tokens = {new.request_id: 1 for new in news[:num_decodes]} | {
                new.request_id: len(new.token_ids) for new in news[num_decodes:]
            }
            self.worker.execute(self.step({}, [])).wait()
            self.worker.platform.synchronize()
            start = time.perf_counter()
            self.worker.execute(self.step(tokens, news)).wait()
            times.append(time.perf_counter() - start)
            self.worker.execute(self.step({}, [], list(tokens))).wait()
        return {"ms": 1e3 * statistics.median(times[1:])}

    def encode(self, grids: list[tuple[int, int]], repeats: int = 6) -> dict[str, float]:
        """Pictures of these heights and widths in patches, in one batch."""
        patch_bytes = self.worker.model.patch_bytes
        seconds, walls, known = [], [], []
        for repeat in range(repeats + 1):
            inputs, offset = [], 0
            for i, (height, width) in enumerate(grids):
                nbytes = height * width * patch_bytes
                mm_hash = b"%032d" % (self._count * 10_000 + repeat * 100 + i)
                inputs.append(EncoderInput(mm_hash, offset, nbytes, (1, height, width), height * width // 4))
                offset += nbytes
            start = time.perf_counter()
            seconds.append(self.worker.encode(EncodeBatch(repeat, inputs, known)).wait().seconds)
            walls.append(time.perf_counter() - start)
            known = [x.mm_hash for x in inputs]
        self.worker.encode(EncodeBatch(0, [], known)).wait()
        self._count += 1
        return {"device_ms": 1e3 * statistics.median(seconds[1:]), "wall_ms": 1e3 * statistics.median(walls[1:])}

    def decode_beside_encode(self, batch: int, context: int, grid: tuple[int, int], pictures: int) -> dict[str, float]:
        """Decode steps while `pictures` are encoded one after another on a thread of their own."""
        patch_bytes = self.worker.model.patch_bytes
        nbytes = grid[0] * grid[1] * patch_bytes
        news = self.start([context] * batch, room=400, computed=True)
        tokens = {new.request_id: 1 for new in news}
        encoded: list[float] = []

        def encode_all() -> None:
            for i in range(pictures):
                x = EncoderInput(b"%032d" % (5_000_000 + i), 0, nbytes, (1, *grid), grid[0] * grid[1] // 4)
                pending = self.worker.encode(EncodeBatch(i, [x], [b"%032d" % (5_000_000 + i - 1)] if i else []))
                pending.wait()
                encoded.append(time.perf_counter())

        self.worker.execute(self.step(tokens, news)).wait()
        thread = threading.Thread(target=encode_all)
        start = time.perf_counter()
        thread.start()
        pending, count = deque([self.worker.execute(self.step(tokens, []))]), 0
        while thread.is_alive() and count < 380:
            pending.append(self.worker.execute(self.step(tokens, [])))
            pending.popleft().wait()
            count += 1
        wall = time.perf_counter() - start
        thread.join()
        pending.popleft().wait()
        self.worker.execute(self.step({}, [], list(tokens))).wait()
        self.worker.encode(EncodeBatch(0, [], [b"%032d" % (5_000_000 + pictures - 1)])).wait()
        return {"step_ms": 1e3 * wall / max(1, count), "picture_ms": 1e3 * (encoded[-1] - start) / pictures}


def main() -> None:
    parser = argparse.ArgumentParser()
    add_engine_args(parser, model_flag="model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", help="directory for traces of decode steps at batch 64, of encoding and of prefill")
    namespace = parser.parse_args()
    config = resolve(replace(engine_args(namespace), load_format="dummy"))
    slab_fd = os.memfd_create("slab")
    os.ftruncate(slab_fd, 64 << 20)
    began = time.perf_counter()
    rows: dict[str, dict[str, float]] = {}

    def lap(name: str) -> None:
        nonlocal began
        rows[f"start: {name}"] = {"s": time.perf_counter() - began}
        print(f"start: {name:34s} {time.perf_counter() - began:6.2f} s", flush=True)
        began = time.perf_counter()

    worker = Worker(config, slab_fd)
    worker.init_device()
    lap("device")
    worker.load_model()
    worker.platform.synchronize()
    lap("model")
    available = worker.determine_memory(1 << 30)
    lap("measuring memory")
    block_bytes = worker.get_kv_cache_specs()[0].bytes_per_token() * config.cache.block_size
    num_blocks = min((available - (2 << 30)) // block_bytes, 20_000)
    worker.initialize_caches(num_blocks, 2 << 30)
    lap("caches and graphs")
    print(f"free for caches: {available / 2**30:.1f} GiB", flush=True)
    bench = Bench(worker, slab_fd, block_size=config.cache.block_size, num_blocks=num_blocks)

    def row(name: str, figures: dict[str, float]) -> None:
        rows[name] = figures
        print(f"{name:41s}", *(f"{key} {value:8.3f}" for key, value in figures.items()), flush=True)

    for batch, context in ((1, 1400), (8, 1400), (16, 1400), (32, 1400), (64, 500), (64, 1400), (128, 500), (128, 1400)):
        row(f"decode {batch} x {context}", bench.decode(batch, context, 60))
    row("decode 1 x 20000", bench.decode(1, 20_000, 30))
    prefills = [([1400], 0), ([1400] * 2, 0), ([1400] * 5, 0), ([512], 0), ([512] * 15, 0), ([24], 0), ([200], 0)]
    for lengths, decodes in [*prefills, ([1400] * 5, 60), ([24] * 4, 60)]:
        row(f"step {len(lengths)} x {lengths[0]} + {decodes} decodes", bench.prefill(lengths, decodes))
    for grids in ([(74, 74)], [(74, 74)] * 2, [(74, 74)] * 3, [(74, 74)] * 4, [(32, 32)], [(32, 32)] * 16, [(214, 286)]):
        row(f"encode {len(grids)} x {grids[0][0]}x{grids[0][1]} patches", bench.encode(grids))
    for batch in (64, 16):
        row(f"decode {batch} x 1400 beside 74x74", bench.decode_beside_encode(batch, 1400, (74, 74), 12))
    if namespace.trace:
        traced: dict[str, Callable[[], object]] = {
            "decode": lambda: bench.decode(64, 1400, 40),
            "encode": lambda: bench.encode([(74, 74)] * 3, 3),
            "prefill": lambda: bench.prefill([1400] * 5, 60, repeats=2),
        }
        for name, run in traced.items():
            worker.profile(f"{namespace.trace}/{name}")
            run()
            worker.profile(None)
    if namespace.json:
        namespace.json.write_text(json.dumps({"device": worker.device_name, "model": config.model.path, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
