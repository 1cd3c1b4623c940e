"""The pictures of a request, from wherever they are to encoded bytes within the limits: in two steps, of which only the second
goes out over the network, so that nothing is fetched for a request that is refused anyway.

Knows nothing of models and prompts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from PIL import Image

from mmv1.errors import ImageError
from mmv1.preprocess.fetch import ImageFetcher, Target, parse_data_url
from mmv1.preprocess.local_file import read_file, read_file_url
from mmv1.preprocess.media import EncodedImage, ImageLimits, ImageSource, accept_bytes, encode_pil

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

_THREAD_BYTES = 1 << 20  # from here on (0.3 ms), work over a picture's bytes leaves the event loop: a thread's turn costs 0.1
_MAX_FETCHES_OF_A_REQUEST = 8  # at once: one request must not take every turn there is


class ImageLoader:
    """`local_root`: the directory that file: URLs may name files of, resolved; None: they are refused."""

    def __init__(self, *, limits: ImageLimits, fetcher: ImageFetcher, local_root: Path | None) -> None:
        self._limits = limits
        self._fetcher = fetcher
        self._local_root = local_root

    async def read_local(self, sources: Sequence[ImageSource]) -> dict[int, EncodedImage]:
        """Those that are on this machine, by their place in `sources`. Raises ImageError."""
        local = {number: source for number, source in enumerate(sources) if not is_remote(source)}
        return await all_at_once(self._read, local, of=len(sources))

    async def download(self, sources: Sequence[ImageSource]) -> dict[int, EncodedImage]:
        """The others. Every URL is checked before the first one is dialled. Raises ImageError."""
        turns = asyncio.Semaphore(_MAX_FETCHES_OF_A_REQUEST)

        async def look_up(url: str) -> Target:
            async with turns:
                return await self._fetcher.look_up(url)

        async def fetch(target: Target) -> EncodedImage:
            async with turns:
                return accept_bytes(await self._fetcher.fetch(target), self._limits)

        remote = {number: str(source) for number, source in enumerate(sources) if is_remote(source)}
        targets = await all_at_once(look_up, remote, of=len(sources))
        return await all_at_once(fetch, targets, of=len(sources))

    async def _read(self, source: ImageSource) -> EncodedImage:
        if isinstance(source, Image.Image):
            return await off_loop(3 * source.width * source.height, encode_pil, source, self._limits)
        if isinstance(source, bytes):
            data = source
        elif isinstance(source, Path):
            data = await asyncio.to_thread(read_file, source, self._limits)
        elif source[:5].lower() == "data:":
            data = await off_loop(len(source), parse_data_url, source, self._limits)
        else:
            data = await asyncio.to_thread(read_file_url, source, self._local_root, self._limits)
        return accept_bytes(data, self._limits)


def is_remote(source: ImageSource) -> bool:
    """Whether it is a URL that must be downloaded, or refused: neither data: nor file:."""
    return isinstance(source, str) and source[:5].lower() not in ("data:", "file:")


@contextlib.contextmanager
def naming_the_image(number: int, *, of: int) -> Iterator[None]:
    """An ImageError about one of several pictures says which one: `number` counts from 0."""
    try:
        yield
    except ImageError as error:
        if of == 1:
            raise
        raise ImageError(f"image {number + 1}: {error.message}", code=error.code, param=error.param) from None


async def off_loop(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call here when the work is small, in a thread when it would hold up the event loop. `size`: a picture's bytes to be worked
    over, or what costs as much."""
    if size < _THREAD_BYTES:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


async def all_at_once(work: Callable[[S], Coroutine[Any, Any, T]], items: Mapping[int, S], *, of: int) -> dict[int, T]:
    """What `work` makes of each item, by its number; the first that fails ends the others."""

    async def one(number: int, item: S) -> T:
        with naming_the_image(number, of=of):
            return await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = {number: group.create_task(one(number, item)) for number, item in items.items()}
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return {number: task.result() for number, task in tasks.items()}
