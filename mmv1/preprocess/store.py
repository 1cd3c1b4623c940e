"""The shared store, seen from the API server: what may be looked up and kept there, and who processes a picture meanwhile.

The store process (store_process.py) does the work, and may fail, hang or die: then the store has nothing, keeps nothing, and
is started anew. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mmv1 import child
from mmv1.errors import ConfigError
from mmv1.log import logger
from mmv1.preprocess.layout import ImagePlace
from mmv1.preprocess.store_format import PictureShape
from mmv1.preprocess.store_messages import (
    STORE_ANSWERS_SOCKET,
    URL_REFUSED,
    DropLease,
    Load,
    LoadDone,
    Save,
    SaveDone,
    StoreAnswer,
    StoreCommand,
    StoreSettings,
    StoreState,
    store_socket,
)
from mmv1.wire import AsyncReceiver, AsyncSender, ipc_address, new_runtime_dir

_START_PATIENCE_S = 10.0
# The process has deadlines of its own, far shorter; these are for a process that hangs. A save waits for those before it.
_LOAD_DEADLINE_S, _SAVE_DEADLINE_S = 2.0, 20.0
_MAX_LEASE_WAIT_S = 2.5  # a lease is shorter
_FIRST_POLL_S, _MAX_POLL_S = 0.005, 0.05
_FIRST_RESTART_S, _MAX_RESTART_S = 0.5, 30.0
_MAX_PENDING_SAVES = 16


class SharedStore:
    """Loads and saves processed pictures by hash. One event loop; `start` before, `close` after.

    A slot given to `load` or `save` is the store's until the call returns: the store process may write to it, or read it.
    `min_bytes`: smaller pictures are quicker to process than to look up.
    """

    def __init__(self, *, url: str, ttl_s: int, min_bytes: int, secret: bytes | None, slab_fd: int, slab_bytes: int) -> None:
        self._min_bytes = min_bytes
        self._runtime_dir: Path | None = None
        self._settings = StoreSettings(
            runtime_dir="", generation=0, slab_fd=slab_fd, slab_bytes=slab_bytes, url=url, ttl_s=ttl_s, secret=secret
        )
        self._process: asyncio.subprocess.Process | None = None
        self._sender: AsyncSender | None = None  # None while there is no process that could answer
        self._tasks: list[asyncio.Task[None]] = []
        self._answers: dict[int, asyncio.Future[LoadDone | SaveDone | None]] = {}  # None: the process has ended
        self._job_ids = itertools.count()
        self._num_pending_saves = 0
        self._first_news = asyncio.Event()
        self._url_was_refused = False
        self.is_up = False
        self.num_misses = 0
        self.num_failures = 0  # look-ups that were not answered, while Redis is away included, and pictures it did not take
        self.num_saves = 0
        self.num_saves_skipped = 0
        self.num_lease_waits = 0

    async def start(self) -> None:
        """Start the process; it comes up in the background."""
        self._runtime_dir = new_runtime_dir()
        self._settings = msgspec.structs.replace(self._settings, runtime_dir=str(self._runtime_dir))
        answers: AsyncReceiver[StoreAnswer] = AsyncReceiver(
            ipc_address(self._runtime_dir, STORE_ANSWERS_SOCKET), StoreAnswer, bind=True
        )
        self._tasks = [asyncio.create_task(self._receive(answers)), asyncio.create_task(self._keep_running())]

    async def wait_ready(self) -> None:
        """Wait until the process has come up and Redis has answered it, or has not; not for ever, the store is not needed.
        Raises ConfigError for a URL that is none."""
        try:
            await asyncio.wait_for(self._first_news.wait(), _START_PATIENCE_S)
        except TimeoutError:
            logger.warning("The store process has not come up yet; pictures are processed without Redis until it has")
        if self._url_was_refused:
            raise ConfigError("the Redis URL cannot be understood: it has the form redis://[user:password@]host[:port][/database]")

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._process is not None:
            await child.stop(self._process)
        self._process_ended()
        if self._runtime_dir is not None:
            shutil.rmtree(self._runtime_dir, ignore_errors=True)

    def takes(self, num_pixels: int, place: ImagePlace) -> bool:
        """Whether a picture that came with `num_pixels` is worth a look-up."""
        return max(3 * num_pixels, place.nbytes) >= self._min_bytes

    async def load(self, mm_hash: bytes, place: ImagePlace, offset: int, is_wanted: Callable[[], bool]) -> bool:
        """Whether the picture's patches lie at `offset` of the slab now. If not, whoever asked is to process it, and to call
        `save` or `drop_lease` then. Waits for another server that is processing it already, but not for long, and only while
        `is_wanted`."""
        loop = asyncio.get_running_loop()
        give_up, pause = loop.time() + _MAX_LEASE_WAIT_S, _FIRST_POLL_S
        while True:
            answer = await self._ask(Load(next(self._job_ids), mm_hash, _shape(place), offset), _LOAD_DEADLINE_S)
            outcome = answer.outcome if isinstance(answer, LoadDone) else "down"
            if outcome == "found":
                return True
            if outcome == "down":
                self.num_failures += 1
                return False
            if outcome == "absent" or loop.time() >= give_up or not is_wanted():
                self.num_misses += 1
                return False
            self.num_lease_waits += pause == _FIRST_POLL_S
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_POLL_S)

    def may_save(self) -> bool:
        """False while too many pictures wait to be kept: each holds a slot."""
        if self.is_up and self._num_pending_saves < _MAX_PENDING_SAVES:
            return True
        self.num_saves_skipped += 1
        return False

    async def save(self, mm_hash: bytes, place: ImagePlace, offset: int) -> None:
        """Keep the patches that lie at `offset` of the slab. Returns when the slot is no longer needed."""
        self._num_pending_saves += 1
        try:
            answer = await self._ask(Save(next(self._job_ids), mm_hash, _shape(place), offset), _SAVE_DEADLINE_S)
        finally:
            self._num_pending_saves -= 1
        if isinstance(answer, SaveDone) and answer.was_saved:
            self.num_saves += 1
        else:
            self.num_failures += 1

    def drop_lease(self, mm_hash: bytes) -> None:
        """The picture will not be saved."""
        if self._sender is not None:
            self._send(self._sender, DropLease(mm_hash))

    async def _ask(self, command: Load | Save, deadline_s: float) -> LoadDone | SaveDone | None:
        """None: no answer will come, and the process that had the command does nothing any more."""
        if self._sender is None:
            return None
        answer = self._answers[command.job_id] = asyncio.get_running_loop().create_future()
        self._send(self._sender, command)
        try:
            done, _ = await asyncio.wait((answer,), timeout=deadline_s)
            if not done:
                logger.error("The store process hangs; starting another")
                self._kill()
            return await answer
        finally:
            del self._answers[command.job_id]

    def _send(self, sender: AsyncSender, command: StoreCommand) -> None:
        task = asyncio.ensure_future(sender.send(command))
        task.add_done_callback(_retrieve)

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def _receive(self, answers: AsyncReceiver[StoreAnswer]) -> None:
        try:
            while True:
                answer = await answers.recv()
                if isinstance(answer, StoreState):
                    self._on_state(answer)
                elif (waiting := self._answers.get(answer.job_id)) is not None and not waiting.done():
                    waiting.set_result(answer)
        finally:
            answers.close()

    def _on_state(self, state: StoreState) -> None:
        """The last words of a process may come after the news that it has ended."""
        if state.generation != self._settings.generation or self._runtime_dir is None:
            return
        if self._sender is None:
            self._sender = AsyncSender(ipc_address(self._runtime_dir, store_socket(state.generation)))
        self.is_up = state.is_up
        self._first_news.set()

    async def _keep_running(self) -> None:
        """Start the process, and another whenever it ends."""
        pause = _FIRST_RESTART_S
        while True:
            try:
                status: int | str = await self._run()
            except OSError as error:  # no memory or no descriptor for it, at the moment
                status = type(error).__name__
            was_up = self._sender is not None
            self._process_ended()
            self._settings = msgspec.structs.replace(self._settings, generation=self._settings.generation + 1)
            if status == URL_REFUSED:
                self._url_was_refused = True
                self._first_news.set()
                return
            pause = _FIRST_RESTART_S if was_up else min(2 * pause, _MAX_RESTART_S)
            logger.error("The store process ended, or did not start (%s); another starts in %.1f s", status, pause)
            await asyncio.sleep(pause)

    async def _run(self) -> int:
        """One process, from its start to its end: its exit status. Raises OSError."""
        self._process = await child.start(
            "mmv1.preprocess.store_process", pass_fds=(self._settings.slab_fd,), env={"MALLOC_ARENA_MAX": "1"}
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self._settings) + b"\n")
        return await self._process.wait()

    def _process_ended(self) -> None:
        """Whoever waits for it hears so. Slots are safe: a dead process writes nothing."""
        self.is_up = False
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(None)


def _retrieve(sending: asyncio.Future[Any]) -> None:
    """A command that cannot be sent is one that is not answered, which is seen to where the answer is awaited."""
    if not sending.cancelled():
        sending.exception()


def _shape(place: ImagePlace) -> PictureShape:
    return PictureShape(place.grid_thw, place.num_tokens, place.nbytes)
