"""Pictures per second from encoded bytes to patches in the slab, by number of pool processes, beside transformers' processors.

    python benchmarks/preprocess.py [--workers 1 2 4] [--rounds N] [--out [FILE]]

Ours: the real pool and slab ledger, every pool process held to one core. Theirs: Pillow's decoding and Qwen2VLImageProcessor, in
its two backends, in this process with one thread. All take turns in every round; the figures are medians over the rounds.
Processor time is that of the pool processes, and of this process where transformers work in it.
Both kinds of picture are JPEGs of noise with a photograph's spectrum (1/f), quality 90, 4:2:0, about 3.4 bits a pixel.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from environment import describe
from PIL import Image
from transformers import Qwen2VLImageProcessor, Qwen2VLImageProcessorPil

from mmv1.preprocess.header import probe_header
from mmv1.preprocess.layout import Qwen2VLLayout
from mmv1.preprocess.pool import PreprocessPool
from mmv1.preprocess.pool_messages import PatchJob
from mmv1.preprocess.slab import SlabLedger, SlabStore

SLAB_BYTES = 256 << 20
MIN_PIXELS = 3136
RESULTS = Path(__file__).parent / "results" / "preprocess.json"


class Kind(NamedTuple):
    name: str
    size: tuple[int, int]
    max_pixels: int
    num_different: int
    num_a_worker: int  # pictures in one round


KINDS = (
    Kind("1024x1024", (1024, 1024), 12_845_056, 8, 100),  # the limits the model is published with: resized to 1036x1036
    Kind("4000x3000 to 1 MP", (4000, 3000), 1_003_520, 3, 15),
)


class Rate(NamedTuple):
    pictures_per_s: float
    cpu_ms: float  # a picture


Measure = Callable[[Kind, list[bytes]], Awaitable[Rate]]


def make_photo(width: int, height: int, seed: int) -> bytes:
    """Noise of a photograph's spectrum: amplitude falls with frequency, colours differ less than brightness."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1.0

    def plane() -> Any:
        spectrum = (rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)) / frequency
        values = np.fft.irfft2(spectrum, s=(height, width))
        return values / values.std()

    brightness = plane()
    pixels = np.stack([128 + 25 * (brightness + 0.2 * plane()) for _ in range(3)], axis=-1)
    encoded = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=90, subsampling="4:2:0")
    return encoded.getvalue()


class Pool:
    """The pool as the server uses it, with a ledger and a slab, and two pictures on their way for each of its processes."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._slab = SlabStore(SLAB_BYTES)
        self._ledger = SlabLedger(SLAB_BYTES)
        self._ids = itertools.count()
        self._pool = PreprocessPool(slab_fd=self._slab.fd, slab_bytes=SLAB_BYTES, num_workers=num_workers, on_failure=print)

    async def start(self) -> None:
        await self._pool.start()
        await self._pool.wait_ready()
        cores = sorted(os.sched_getaffinity(0))
        for index, pid in enumerate(self._pids()):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {cores[index % len(cores)]})

    async def close(self) -> None:
        await self._pool.close()
        self._slab.close()

    def _pids(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self._pool.pid}/task/{self._pool.pid}/children").read_text().split()]

    def private_mib(self) -> float:
        """Of the largest pool process: memory it shares with no other, and that is not the slab."""
        return max(map(_private_bytes, self._pids())) / (1 << 20)

    async def measure(self, kind: Kind, pictures: list[bytes]) -> Rate:
        total = kind.num_a_worker * self.num_workers
        queue = itertools.islice(itertools.cycle(pictures), total)
        cpu_s, started = sum(map(_cpu_seconds, self._pids())), time.perf_counter()
        await asyncio.gather(*(self._drain(kind, queue) for _ in range(2 * self.num_workers)))
        elapsed = time.perf_counter() - started
        return Rate(total / elapsed, 1e3 * (sum(map(_cpu_seconds, self._pids())) - cpu_s) / total)

    async def _drain(self, kind: Kind, queue: Iterator[bytes]) -> None:
        layout = Qwen2VLLayout({}, {"image_token_id": 0, "video_token_id": 1}, min_pixels=MIN_PIXELS, max_pixels=kind.max_pixels)
        for encoded in queue:
            header = probe_header(encoded)
            place = layout.place(header.width, header.height)
            job_id = next(self._ids)
            mm_hash = job_id.to_bytes(16)
            offset = self._ledger.allocate(mm_hash, place.nbytes)
            if offset is None:
                raise RuntimeError("the slab is too small for the pictures on their way")
            job = PatchJob(
                job_id=job_id,
                header=header,
                resized_height=place.resized_height,
                resized_width=place.resized_width,
                patch_size=layout.patch_size,
                merge_size=layout.merge_size,
                resample=layout.resample,
                offset=offset,
                nbytes=place.nbytes,
            )
            await self._pool.submit(job, encoded)
            self._ledger.unpin(mm_hash)


def _cpu_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _private_bytes(pid: int) -> int:
    total, is_shared_mapping = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            is_shared_mapping = values[0].endswith("s")
        elif key in ("Private_Clean:", "Private_Dirty:") and not is_shared_mapping:
            total += int(values[0]) << 10
    return total


def processor(backend: Any) -> Measure:
    """transformers' own, decoding included."""

    async def measure(kind: Kind, pictures: list[bytes]) -> Rate:
        process = backend(size={"shortest_edge": MIN_PIXELS, "longest_edge": kind.max_pixels})
        total = kind.num_a_worker // 5
        cpu_s, started = time.process_time(), time.perf_counter()
        for encoded in itertools.islice(itertools.cycle(pictures), total):
            process(images=[Image.open(io.BytesIO(encoded))], return_tensors="pt")
        elapsed = time.perf_counter() - started
        return Rate(total / elapsed, 1e3 * (time.process_time() - cpu_s) / total)

    return measure


async def compare(worker_counts: list[int], num_rounds: int) -> dict[str, Any]:
    pictures = {kind: [make_photo(*kind.size, seed) for seed in range(kind.num_different)] for kind in KINDS}
    pools = [Pool(count) for count in worker_counts]
    for pool in pools:
        await pool.start()
    subjects: dict[str, Measure] = {
        **{f"mmv1, {pool.num_workers} pool process{'es' * (pool.num_workers > 1)}": pool.measure for pool in pools},
        "transformers, torchvision": processor(Qwen2VLImageProcessor),
        "transformers, PIL": processor(Qwen2VLImageProcessorPil),
    }
    rates: dict[str, dict[str, list[Rate]]] = {name: {kind.name: [] for kind in KINDS} for name in subjects}
    for number in range(num_rounds + 1):
        for kind in KINDS:
            for name, measure in subjects.items():
                rate = await measure(kind, pictures[kind])
                if number:  # the first round warms up
                    rates[name][kind.name].append(rate)
        print(f"round {number} of {num_rounds} done", flush=True)
    private_mib = {str(pool.num_workers): round(pool.private_mib(), 1) for pool in pools}
    for pool in pools:
        await pool.close()
    bits = {kind.name: 8 * len(pictures[kind][0]) / (kind.size[0] * kind.size[1]) for kind in KINDS}
    return {
        "num_rounds": num_rounds,
        "bits_per_pixel": {name: round(value, 2) for name, value in bits.items()},
        "rates": {name: {k: _summary(v) for k, v in by_kind.items()} for name, by_kind in rates.items()},
        "private_mib_of_the_largest_pool_process": private_mib,
    }


def _summary(rates: list[Rate]) -> dict[str, float]:
    per_s, cpu_ms = [rate.pictures_per_s for rate in rates], [rate.cpu_ms for rate in rates]
    summary = {"pictures_per_s": statistics.median(per_s), "lowest": min(per_s), "highest": max(per_s)}
    return {name: round(value, 1) for name, value in (*summary.items(), ("cpu_ms", statistics.median(cpu_ms)))}


def print_table(result: dict[str, Any]) -> None:
    print("\nPictures per second: median (lowest to highest round), processor time of one picture")
    print(f"{'':28}" + "".join(f"{kind.name:>34}" for kind in KINDS))
    for name, by_kind in result["rates"].items():
        cells = []
        for kind in KINDS:
            rate = by_kind[kind.name]
            cells.append(f"{rate['pictures_per_s']:.1f} ({rate['lowest']:.1f} to {rate['highest']:.1f}), {rate['cpu_ms']:.1f} ms")
        print(f"{name:28}" + "".join(f"{cell:>34}" for cell in cells))
    largest = max(result["private_mib_of_the_largest_pool_process"].values())
    print(f"private memory of a pool process, after both kinds: at most {largest:.0f} MiB")


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [count for count in (1, 2, 4, 8, 16, 32) if count <= cores]
    parser.add_argument("--workers", type=int, nargs="+", default=default, metavar="N", help=f"default: {default}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, metavar="FILE", help="write JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {**describe(), **asyncio.run(compare(args.workers, args.rounds))}
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result)


if __name__ == "__main__":
    main()
