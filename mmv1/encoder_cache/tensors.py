"""The encoder cache's memory: picture embeddings on the device, in one slab cut into pages.

What may stay and what must go is the ledger's decision (manager.py), which counts in the same pages; so room is never missing
here, and if it is, that is a broken invariant and said so.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from mmv1.errors import EngineError
from mmv1.step import ENCODER_CACHE_PAGE_ROWS


class EncoderCacheTensors:
    """`width`: numbers in a row, which is one picture token's embedding. `capacity_bytes` is rounded down to whole pages.

    `slab` [rows, width] holds the embeddings. Pages are freed and allocated on one thread; `rows` of an embedding that nobody
    frees meanwhile may be asked on another."""

    def __init__(self, capacity_bytes: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        num_pages = capacity_bytes // (ENCODER_CACHE_PAGE_ROWS * width * dtype.itemsize)
        self.slab = torch.empty(num_pages * ENCODER_CACHE_PAGE_ROWS, width, dtype=dtype, device=device)
        self._free_pages = list(range(num_pages - 1, -1, -1))
        self._pages: dict[bytes, np.ndarray] = {}  # mm_hash -> its pages, int64, in the order of its rows

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def num_free_pages(self) -> int:
        return len(self._free_pages)

    def free(self, mm_hashes: Iterable[bytes]) -> None:
        for mm_hash in mm_hashes:
            pages = self._pages.pop(mm_hash, None)
            if pages is None:
                raise EngineError(f"the encoder cache was told to free {mm_hash.hex()}, which it does not hold")
            self._free_pages.extend(pages.tolist())

    def allocate(self, mm_hash: bytes, num_tokens: int) -> np.ndarray:
        """Take pages for an embedding and return its rows, int64 [num_tokens], on the host."""
        num_pages = -(-num_tokens // ENCODER_CACHE_PAGE_ROWS)
        if mm_hash in self._pages or num_pages > len(self._free_pages):
            raise EngineError(
                f"the encoder cache cannot take {num_pages} pages for {mm_hash.hex()}: "
                f"{len(self._free_pages)} are free, it holds {'it' if mm_hash in self._pages else 'others'} already"
            )
        self._pages[mm_hash] = np.array([self._free_pages.pop() for _ in range(num_pages)], dtype=np.int64)
        return self.rows(mm_hash, 0, num_tokens)

    def rows(self, mm_hash: bytes, start: int, stop: int) -> np.ndarray:
        """Rows of the embedding's tokens [start, stop), int64, on the host."""
        pages = self._pages.get(mm_hash)
        if pages is None:
            raise EngineError(f"the encoder cache does not hold {mm_hash.hex()}, which a scheduled chunk needs")
        token = np.arange(start, stop)
        return pages[token // ENCODER_CACHE_PAGE_ROWS] * ENCODER_CACHE_PAGE_ROWS + token % ENCODER_CACHE_PAGE_ROWS

    def write(self, rows: torch.Tensor, embeddings: torch.Tensor) -> None:
        """`rows` int64 [n] and `embeddings` [n, width], on the device."""
        self.slab.index_copy_(0, rows, embeddings)
