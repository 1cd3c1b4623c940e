"""The store against a real redis-server: what is kept, who holds a lease, and everything that can go wrong with Redis."""

import asyncio
import hashlib
import inspect
import random
import statistics
import time

import pytest

from mmv1.preprocess.redis_store import InvalidURLError, RedisStore
from mmv1.preprocess.store_format import CHUNK_BYTES, PictureShape, Seal, chunk_keys, lease_key, meta_key, split
from tests.redis_server import RedisServer, running_redis

SHAPE = PictureShape((1, 40, 40), 400, 1600 * 588)
LARGE = PictureShape((1, 120, 140), 4200, 16800 * 588)  # 9.4 MiB: three chunks
MAX_ADDED_S = 0.15  # what a failing Redis may cost a request, once
NOTHING_S = 0.03  # about nothing on a busy machine: and while the breaker is open


def name(word):
    return hashlib.sha256(str(word).encode()).digest()


def patches(word, shape=SHAPE):
    return hashlib.shake_128(str(word).encode()).digest(shape.nbytes)


class Redis:
    """Stores over one server, in one loop."""

    def __init__(self, server: RedisServer):
        self.server = server
        self.changes = []
        self.stores = []

    def store(self, *, url=None, ttl_s=100, secret=None):
        store = RedisStore(url or self.server.url, ttl_s=ttl_s, seal=Seal(secret), on_change=self.changes.append)
        self.stores.append(store)
        return store


@pytest.fixture
def server(tmp_path):
    with running_redis(tmp_path) as running:
        yield running


@pytest.fixture
def patient(monkeypatch):
    """For tests that are not about time, on a machine that may be busy."""
    monkeypatch.setattr("mmv1.preprocess.redis_store._LOAD_DEADLINE_S", 10.0)
    monkeypatch.setattr("mmv1.preprocess.redis_store._SAVE_DEADLINE_S", 10.0)


def on_loop(test):
    """Run an async test with stores over the server, all closed at the end."""

    def run(server, **kwargs):
        async def bounded():
            redis = Redis(server)
            try:
                async with asyncio.timeout(60):
                    await test(redis, **kwargs)
            finally:
                for store in redis.stores:
                    await store.close()

        asyncio.run(bounded())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    _, *others = inspect.signature(test).parameters.values()
    run.__signature__ = inspect.Signature([inspect.Parameter("server", inspect.Parameter.POSITIONAL_OR_KEYWORD), *others])
    return run


async def put(store, word, shape=SHAPE):
    return await store.save(name(word), shape, split(memoryview(patches(word, shape))))


async def get(store, word, shape=SHAPE):
    outcome, chunks = await store.load(name(word), shape)
    if outcome == "found":
        assert b"".join(chunks) == patches(word, shape)
    else:
        assert chunks == []
    return outcome


async def timed(operation):
    started = time.perf_counter()
    result = await operation
    return result, time.perf_counter() - started


async def lateness():
    """By how much a busy machine is late with everything at this moment."""
    return (await timed(asyncio.sleep(0.1)))[1] - 0.1


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


@pytest.mark.usefixtures("patient")
@on_loop
async def test_a_saved_picture_is_found_by_every_server(redis):
    first, second = redis.store(), redis.store()
    for word, shape in (("a", SHAPE), ("large", LARGE)):
        assert await get(first, word, shape) == "absent"
        assert await put(first, word, shape)
        assert await get(first, word, shape) == await get(second, word, shape) == "found"


@pytest.mark.usefixtures("patient")
@on_loop
async def test_every_key_has_a_lifetime_and_no_value_is_large(redis):
    store = redis.store(ttl_s=100)
    await get(store, "a", LARGE)
    client = redis.server.client()
    assert client.keys() == [lease_key(name("a"))] and 0 < client.pttl(lease_key(name("a"))) <= 2000
    await put(store, "a", LARGE)
    keys = set(client.keys())
    assert keys == {meta_key(name("a")), *chunk_keys(name("a"), LARGE.nbytes)}  # and the lease is given back
    assert all(99_000 < client.pttl(key) <= 100_000 for key in keys)
    assert max(client.strlen(key) for key in keys) <= CHUNK_BYTES and client.strlen(meta_key(name("a"))) < 128


@pytest.mark.usefixtures("patient")
@on_loop
async def test_one_server_at_a_time_holds_the_lease(redis):
    first, second = redis.store(), redis.store()
    assert await get(first, "a") == "absent"
    assert await get(second, "a") == "leased"
    assert await get(second, "b") == "absent"
    await first.drop_lease(name("a"))
    assert await get(second, "a") == "absent"
    assert await get(first, "a") == "leased"
    await first.drop_lease(name("a"))  # not its own
    assert await get(first, "a") == "leased"
    assert await put(second, "a")
    assert await get(first, "a") == "found"


@pytest.mark.usefixtures("patient")
@on_loop
async def test_a_lease_ends_by_itself(redis):
    first, second = redis.store(), redis.store()
    assert await get(first, "a") == "absent"
    started = time.monotonic()
    while await get(second, "a") == "leased":
        await asyncio.sleep(0.02)
    assert 1.0 < time.monotonic() - started < 4.0
    await first.drop_lease(name("a"))  # it ended; the key is the second's now
    assert await get(first, "a") == "leased"


@pytest.mark.usefixtures("patient")
@on_loop
async def test_of_many_servers_at_once_one_holds_the_lease(redis):
    stores = [redis.store() for _ in range(8)]
    for word in range(20):
        outcomes = await asyncio.gather(*(get(store, word) for store in stores))
        assert sorted(outcomes) == ["absent"] + ["leased"] * 7


@pytest.mark.usefixtures("patient")
@on_loop
async def test_a_picture_saved_between_look_up_and_lease_is_found(redis):
    """Its lease is given back with the save, so the look-up that came just before would get it, and process the picture again."""
    first, second = redis.store(), redis.store()
    for word in range(100):
        assert await get(first, word) == "absent"
        saving = asyncio.create_task(put(first, word))
        outcomes = []
        while not outcomes or outcomes[-1] == "leased":
            outcomes.append(await get(second, word))
        assert outcomes[-1] == "found"
        await saving


@on_loop
async def test_many_look_ups_at_once_are_no_outage(redis):
    """Far more than Redis can answer within the deadline of one. Some are given up, none for long; Redis is not."""
    store = redis.store()
    await put(store, "a")
    looked_up = await asyncio.gather(*(timed(get(store, "a")) for _ in range(300)))
    assert {outcome for outcome, _ in looked_up} == {"found", "down"} and redis.changes == []
    assert await get(store, "a") == "found"


DAMAGE = {
    "truncated chunk": lambda client, meta, chunks: client.set(chunks[0], client.get(chunks[0])[:-1]),
    "empty chunk": lambda client, meta, chunks: client.set(chunks[0], b""),
    "flipped bit": lambda client, meta, chunks: client.setbit(chunks[-1], 8003, 1 - client.getbit(chunks[-1], 8003)),
    "truncated meta": lambda client, meta, chunks: client.set(meta, client.get(meta)[:-1]),
    "another schema": lambda client, meta, chunks: client.setrange(meta, 4, b"\x63"),
    "swapped chunks": lambda client, meta, chunks: client.mset(
        dict(zip(chunks[:2], client.mget(chunks[1::-1]), strict=True))
    ),
    "another picture's": lambda client, meta, chunks: client.mset(
        dict(zip([meta, *chunks], client.mget([meta_key(name("other")), *chunk_keys(name("other"), LARGE.nbytes)]), strict=True))
    ),
    "another picture's meta": lambda client, meta, chunks: client.set(meta, client.get(meta_key(name("other")))),
    "chunk evicted": lambda client, meta, chunks: client.delete(chunks[1]),
    "meta evicted": lambda client, meta, chunks: client.delete(meta),
    "another type": lambda client, meta, chunks: client.delete(chunks[0]) and client.lpush(chunks[0], b"x"),
    "meta of another type": lambda client, meta, chunks: client.delete(meta) and client.lpush(meta, b"x"),
    "huge value": lambda client, meta, chunks: client.set(meta, b"x" * (6 << 20)),
}  # fmt: skip


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("damage", DAMAGE)
@on_loop
async def test_damage_is_a_miss_and_is_mended_by_the_next_save(redis, damage):
    store = redis.store()
    for word in ("a", "other"):
        await put(store, word, LARGE)
    DAMAGE[damage](redis.server.client(), meta_key(name("a")), chunk_keys(name("a"), LARGE.nbytes))
    assert await get(store, "a", LARGE) == "absent"
    assert await put(store, "a", LARGE)
    assert await get(store, "a", LARGE) == await get(store, "other", LARGE) == "found"


@pytest.mark.usefixtures("patient")
@on_loop
async def test_values_of_a_server_with_another_secret_are_not_believed(redis):
    theirs, ours = redis.store(secret=b"t" * 16), redis.store(secret=b"o" * 16)
    await put(theirs, "a")
    assert await get(theirs, "a") == "found" and await get(ours, "a") == "absent"
    assert ours.num_rejected == 1


async def assert_costs_little(store, word="b"):
    """The first requests, all at once, wait a moment; the others do not wait at all."""
    late, *first = await asyncio.gather(lateness(), *(timed(get(store, f"{word}{i}")) for i in range(32)))
    assert {outcome for outcome, _ in first} == {"down"} and max(took for _, took in first) < MAX_ADDED_S + late
    later = [await timed(get(store, word)) for _ in range(50)]
    assert {outcome for outcome, _ in later} == {"down"} and statistics.median(took for _, took in later) < NOTHING_S
    saved, took = await timed(put(store, word))
    assert not saved and took < NOTHING_S
    assert not store.is_up and not store._leases


@on_loop
async def test_killed_and_restarted(redis):
    store = redis.store()
    await put(store, "a")
    redis.server.kill()
    await assert_costs_little(store)
    redis.server.start()
    await until(lambda: store.is_up)
    assert redis.changes == [False, True]
    assert await get(store, "a") == "absent" and await put(store, "a") and await get(store, "a") == "found"


@on_loop
async def test_restarted_between_two_requests(redis):
    """The connection it had is dead; that is noticed without an error."""
    store = redis.store()
    await put(store, "a")
    await asyncio.to_thread(redis.server.kill)
    await asyncio.to_thread(redis.server.start)
    assert await get(store, "a") == "absent" and redis.changes == []


@on_loop
async def test_hung_and_resumed(redis):
    store = redis.store()
    await put(store, "a")
    assert await get(store, "b") == "absent"
    redis.server.suspend()
    await assert_costs_little(store, "b")
    redis.server.resume()
    await until(lambda: store.is_up)
    assert await get(store, "a") == "found"


@on_loop
async def test_hung_before_the_first_connection(redis):
    redis.server.suspend()
    store = redis.store()
    await assert_costs_little(store)
    redis.server.resume()
    await until(lambda: store.is_up)
    assert await get(store, "a") == "absent"


@on_loop
async def test_pauses_grow_while_redis_stays_away(redis):
    store = redis.store()
    redis.server.kill()
    assert await get(store, "a") == "down"
    await asyncio.sleep(0)
    assert store._cooldown_s == 0.5
    await until(lambda: store._cooldown_s == 2.0)  # two pings failed
    redis.server.start()
    await until(lambda: store.is_up)
    assert await get(store, "a") == "absent" and store._cooldown_s == 0.5


@pytest.mark.usefixtures("patient")
def test_full_and_refusing(tmp_path):
    with running_redis(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "noeviction") as full:
        _full_and_refusing(full)


@on_loop
async def _full_and_refusing(redis):
    store, other = redis.store(), redis.store()
    assert await get(store, "a", LARGE) == "absent"
    assert not await put(store, "a", LARGE)
    assert redis.server.client().exists(lease_key(name("a"))) == 0
    for word in range(5):  # everything still works, without the store
        outcome, took = await timed(get(store, word))
        assert outcome == "absent" and took < MAX_ADDED_S
        saved, took = await timed(put(store, word))
        assert not saved and took < NOTHING_S  # not even tried for a while
    assert await get(other, "a", LARGE) == "absent"  # no lease can be had there: whoever asks processes the picture
    assert store.is_up and redis.changes == []


@pytest.mark.usefixtures("patient")
def test_full_and_evicting(tmp_path):
    with running_redis(tmp_path, "--maxmemory", "16mb", "--maxmemory-policy", "allkeys-lru") as full:
        _full_and_evicting(full)


@on_loop
async def _full_and_evicting(redis):
    """Whatever is evicted, meta or some of the chunks: a picture is found whole or is absent."""
    store = redis.store()
    found = 0
    for word in range(40):
        assert await put(store, word, LARGE if word % 8 == 0 else SHAPE)
        for earlier in range(max(0, word - 12), word + 1):
            outcome = await get(store, earlier, LARGE if earlier % 8 == 0 else SHAPE)
            assert outcome in ("found", "absent")
            await store.drop_lease(name(earlier))
            found += outcome == "found"
    assert 40 < found < 40 * 12 and store.is_up


class Proxy:
    """Between a store and Redis: everything comes late, or a little at a time, or as something else."""

    def __init__(self, server, *, delay_s=0.0, bytes_per_s=None, garbage=b""):
        self._server, self._delay_s, self._bytes_per_s, self._garbage = server, delay_s, bytes_per_s, garbage

    async def __aenter__(self):
        self._listener = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self._tasks = set()
        self.url = f"redis://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(self, *_):
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader, writer):
        if self._garbage:
            await reader.read(1)
            writer.write(self._garbage)
            return
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        for source, target, slow in ((reader, up_writer, False), (up_reader, writer, True)):
            task = asyncio.create_task(self._pump(source, target, slow))
            self._tasks.add(task)

    async def _pump(self, source, target, slow):
        while data := await source.read(1 << 16):
            if slow:
                await asyncio.sleep(self._delay_s + (len(data) / self._bytes_per_s if self._bytes_per_s else 0))
            target.write(data)
        target.close()


HTTP = {"garbage": b"HTTP/1.1 400 Bad Request\r\n\r\n"}


@pytest.mark.parametrize("trouble", [{"delay_s": 0.5}, HTTP, {"garbage": b"\0" * 100}], ids=["slow", "http", "zeros"])
@on_loop
async def test_slow_or_no_redis(redis, trouble):
    async with Proxy(redis.server, **trouble) as proxy:
        await assert_costs_little(redis.store(url=proxy.url))


@on_loop
async def test_a_narrow_line_is_given_up_in_time(redis):
    """Answers begin at once, but the patches come at 1 MB a second."""
    await put(redis.store(), "a", LARGE)
    async with Proxy(redis.server, bytes_per_s=1_000_000) as proxy:
        store = redis.store(url=proxy.url)
        late, (outcome, took) = await asyncio.gather(lateness(), timed(get(store, "a", LARGE)))
        assert outcome == "down" and took < MAX_ADDED_S + late
        assert (await timed(get(store, "a", LARGE)))[1] < NOTHING_S


@pytest.mark.usefixtures("patient")
@on_loop
async def test_cancelled_at_any_moment_no_reply_reaches_another(redis):
    """T-R1: a connection left with an unread reply must not be used again."""
    store = redis.store()
    for word in range(4):
        await put(store, word)
    rng = random.Random(0)
    cancelled = 0
    for _ in range(2000):
        loading = asyncio.create_task(get(store, rng.randrange(4)))
        await asyncio.sleep(rng.choice((0, 0, 0.0002, 0.0005, 0.001, 0.003)))
        cancelled += loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        if not loading.cancelled():
            assert loading.result() == "found"
    assert cancelled > 200
    assert [await get(store, word) for word in range(4)] == ["found"] * 4 and store.is_up


def test_wrong_password_and_an_access_list_of_what_is_needed(tmp_path):
    """T-R2: an account without EVAL, CONFIG, KEYS, RESTORE, and only for our keys, is enough."""
    rules = "user mmv1 on >secret ~mmv1:* resetchannels -@all +get +mget +set +del +ping"
    acl = tmp_path / "users.acl"
    acl.write_text(f"user default off\n{rules}\n")
    with running_redis(tmp_path, "--aclfile", str(acl)) as guarded:
        _guarded(guarded)


@on_loop
async def _guarded(redis):
    port = redis.server.port
    store = redis.store(url=f"redis://mmv1:secret@127.0.0.1:{port}/0")
    assert await get(store, "a") == "absent" and await put(store, "a") and await get(store, "a") == "found"
    await assert_costs_little(redis.store(url=f"redis://mmv1:wrong@127.0.0.1:{port}/0"))
    await assert_costs_little(redis.store())


@pytest.mark.parametrize("url", ["redis://host:notaport/0", "redis://host:1/0?socket_timeout=soon", "http://host/", "redis://h/?nonsense=1"])
def test_a_url_that_is_none(url):
    async def make():
        RedisStore(url, ttl_s=1, seal=Seal(None))

    with pytest.raises(InvalidURLError):
        asyncio.run(make())


def test_the_url_is_never_logged(tmp_path, caplog):
    server = RedisServer(tmp_path)

    async def fail():
        store = RedisStore(f"redis://someone:hunter2@127.0.0.1:{server.port}/0", ttl_s=1, seal=Seal(None))
        await store.connect()
        assert not store.is_up
        await store.close()

    asyncio.run(fail())
    assert "Redis does not answer" in caplog.text and "hunter2" not in caplog.text and "127.0.0.1" not in caplog.text
