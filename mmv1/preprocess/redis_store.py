"""The shared store of processed pictures, in Redis. The only file that imports redis.

Every operation has a deadline, is tried once, and may fail without harm: the first that fails to be answered in time opens a
circuit breaker, and from then on nothing waits for Redis until a ping in the background is answered again. Runs in the store
process; knows nothing of slabs or requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, NamedTuple, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from mmv1.log import logger
from mmv1.preprocess.store_format import PictureShape, Seal, chunk_keys, lease_key, meta_key

T = TypeVar("T")

LEASE_S = 2.0  # then whoever else needs the picture processes it: its first server is slow or dead
_LEASE_MARGIN_S = 0.1  # nearer its end a lease is left to end
_LOAD_DEADLINE_S = 0.1
_MAX_LOADS = 4  # at once: more would share the line and all be late, as if Redis did not answer
_TURN_S = 0.15  # a look-up waits so long for its turn: pictures that are more than Redis can carry are processed
_SAVE_DEADLINE_S = 1.0
_FIRST_COOLDOWN_S, _MAX_COOLDOWN_S = 0.5, 30.0
_SAVES_PAUSE_S = 5.0  # after Redis refused a value: it is full, or a replica
_MAX_CONNECTIONS = 16

# found: here. absent: not there, and this server may process the picture: nobody else does. leased: not there, another server
# is processing it. down: no answer to be had, or not soon.
Outcome = Literal["found", "absent", "leased", "down"]


class Loaded(NamedTuple):
    outcome: Outcome
    chunks: list[bytes]  # of a picture that was found: its patches, checked


class StoreDownError(Exception):
    """Redis does not answer; nobody waits for it for the time being."""


class InvalidURLError(Exception):
    """The Redis URL is none."""


class RedisStore:
    """One Redis and its breaker, for one event loop. `on_change` hears whether it is up, when that changes."""

    def __init__(self, url: str, *, ttl_s: int, seal: Seal, on_change: Callable[[bool], None] = lambda is_up: None) -> None:
        """Raises InvalidURLError."""
        # Its own timeouts and retries are off: the deadline of an operation covers all that happens in it. RESP2 and no driver
        # information: a connection sends nothing but AUTH, SELECT and our commands, all that an access list must allow.
        options = {"max_connections": _MAX_CONNECTIONS, "protocol": 2, "driver_info": None, "retry": Retry(NoBackoff(), 0)}
        timeouts = dict.fromkeys(("timeout", "socket_timeout", "socket_connect_timeout"))
        try:
            pool = BlockingConnectionPool.from_url(url, **options, **timeouts)
            pool.make_connection()  # sees to the URL's options
        except (ValueError, TypeError):
            raise InvalidURLError("the Redis URL cannot be understood") from None
        self._redis = Redis.from_pool(pool)
        self._ttl_ms = ttl_s * 1000
        self._seal = seal
        self._on_change = on_change
        self._turns = asyncio.Semaphore(_MAX_LOADS)
        self._leases: dict[bytes, float] = {}  # held by this server -> when they end
        self._saves_paused_until = 0.0
        self._cooldown_s = _FIRST_COOLDOWN_S
        self._recovery: asyncio.Task[None] | None = None
        self.num_rejected = 0  # values that were not what they should be

    @property
    def is_up(self) -> bool:
        return self._recovery is None

    async def connect(self) -> None:
        """Find out whether Redis answers. Without an answer the store starts as down, and recovers by itself."""
        try:
            await self._answered(_SAVE_DEADLINE_S, self._redis.ping)
        except StoreDownError:
            return
        self._on_change(True)

    async def close(self) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.gather(self._recovery, return_exceptions=True)
        await self._redis.aclose(close_connection_pool=True)

    async def load(self, mm_hash: bytes, shape: PictureShape) -> Loaded:
        """The picture's patches; or, where they are not there, whether this server is the one to process it: it then holds a
        lease, which `save` or `drop_lease` gives back. Never raises, and never takes longer than its turn and its deadline."""
        try:
            async with asyncio.timeout(_TURN_S):
                await self._turns.acquire()
        except TimeoutError:
            return Loaded("down", [])
        try:
            return await self._answered(_LOAD_DEADLINE_S, lambda: self._load(mm_hash, shape))
        except StoreDownError:
            return Loaded("down", [])
        finally:
            self._turns.release()

    async def save(self, mm_hash: bytes, shape: PictureShape, chunks: list[bytes]) -> bool:
        """Keep a picture for `ttl_s`, and give back its lease: whether that was done. Never raises."""
        if time.monotonic() < self._saves_paused_until:
            await self.drop_lease(mm_hash)
            return False
        is_leased = self._still_leased(mm_hash)
        try:
            return await self._answered(_SAVE_DEADLINE_S, lambda: self._save(mm_hash, shape, chunks, is_leased))
        except StoreDownError:
            return False

    async def drop_lease(self, mm_hash: bytes) -> None:
        """This server will not process the picture after all. Never raises."""
        if self._still_leased(mm_hash):
            try:
                await self._answered(_LOAD_DEADLINE_S, lambda: self._redis.delete(lease_key(mm_hash)))
            except StoreDownError:
                pass

    async def _load(self, mm_hash: bytes, shape: PictureShape) -> Loaded:
        values: list[Any] = await self._redis.mget([meta_key(mm_hash), *chunk_keys(mm_hash, shape.nbytes)])
        meta, chunks = values[0], values[1:]
        if meta is not None:
            if self._seal.holds(mm_hash, shape, meta, chunks):
                return Loaded("found", chunks)
            if None not in chunks:  # a missing chunk has been evicted or has expired
                self.num_rejected += 1
                logger.warning("Redis gave a damaged or foreign value for a picture; the picture is processed anew")
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.set(lease_key(mm_hash), b"", nx=True, px=int(LEASE_S * 1000))
        pipeline.get(meta_key(mm_hash))
        is_ours, meta_now = await pipeline.execute(raise_on_error=False)
        if is_ours is True:
            self._leases[mm_hash] = time.monotonic() + LEASE_S
        if isinstance(meta_now, bytes) and meta_now != meta:  # saved between the two: its lease had just been given back
            await self.drop_lease(mm_hash)
            return await self._load(mm_hash, shape)
        return Loaded("leased" if is_ours is None else "absent", [])

    async def _save(self, mm_hash: bytes, shape: PictureShape, chunks: list[bytes], is_leased: bool) -> bool:
        """`meta` last: who sees it can see the chunks. A full Redis refuses the values but still takes the deletion."""
        pipeline = self._redis.pipeline(transaction=False)
        for key, chunk in zip(chunk_keys(mm_hash, shape.nbytes), chunks, strict=True):
            pipeline.set(key, chunk, px=self._ttl_ms)
        pipeline.set(meta_key(mm_hash), self._seal.meta(mm_hash, shape, chunks), px=self._ttl_ms)
        if is_leased:
            pipeline.delete(lease_key(mm_hash))
        refusals = [answer for answer in await pipeline.execute(raise_on_error=False) if isinstance(answer, Exception)]
        if refusals:
            if self._saves_paused_until == 0.0:
                logger.warning("Redis takes no pictures for the time being (%s); those it has are used", refusals[0])
            self._saves_paused_until = time.monotonic() + _SAVES_PAUSE_S
            return False
        self._saves_paused_until = 0.0
        return True

    def _still_leased(self, mm_hash: bytes) -> bool:
        """Whether a lease is this server's to give back. One that may have ended is left alone: it may be another's by now."""
        return self._leases.pop(mm_hash, 0.0) > time.monotonic() + _LEASE_MARGIN_S

    async def _answered(self, deadline_s: float, operation: Callable[[], Awaitable[T]]) -> T:
        """The operation's result within its deadline; any failure opens the breaker. Raises StoreDownError."""
        if not self.is_up:
            raise StoreDownError
        try:
            async with asyncio.timeout(deadline_s):
                result = await operation()
        except Exception as error:  # a server that is no Redis may answer anything
            self._open(error)
            raise StoreDownError from None
        self._cooldown_s = _FIRST_COOLDOWN_S
        return result

    def _open(self, error: Exception) -> None:
        if self._recovery is None:
            logger.warning("Redis does not answer (%s); pictures are processed without it until it does", _words(error))
            self._recovery = asyncio.create_task(self._recover())
            self._on_change(False)

    async def _recover(self) -> None:
        """Ping until it is answered as quickly as a load must be. The pauses grow, also from one outage to the next, until an
        operation has succeeded."""
        while True:
            await asyncio.sleep(self._cooldown_s)
            self._cooldown_s = min(2 * self._cooldown_s, _MAX_COOLDOWN_S)
            try:
                async with asyncio.timeout(_LOAD_DEADLINE_S):
                    await self._redis.ping()
            except Exception:
                continue
            break
        self._recovery = None
        logger.info("Redis answers again")
        self._on_change(True)


def _words(error: Exception) -> str:
    """Without the address, which may hold a password."""
    return type(error).__name__ if not isinstance(error, ResponseError) else str(error)
