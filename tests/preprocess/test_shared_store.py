"""Pictures that come from Redis instead of being processed: whole preprocessors, with their pools and their store processes."""

import asyncio
import itertools
import os
import signal
import statistics
import threading
import time

import pytest

from mmv1 import child
from mmv1.errors import ConfigError
from mmv1.preprocess.store_format import lease_key
from mmv1.preprocess.store_messages import StoreState
from mmv1.types import FeatureReady
from tests.pictures import data_url, make_image
from tests.preprocess.processes import children, file_descriptors, is_alive, wait_until
from tests.preprocess.test_preprocessor import Harness
from tests.redis_server import running_redis


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def make(tiny_model_dir, redis):
    """Starts servers' preprocessors over one Redis; all are closed at the end."""
    made = []

    def start(**changes):
        harness = Harness(tiny_model_dir, **{"num_workers": 1, "redis_url": redis.url, "redis_min_bytes": 0, **changes})
        made.append(harness)
        harness.run(harness.pre.wait_ready())
        return harness

    yield start
    for harness in made:
        harness.close()


@pytest.fixture(scope="module")
def shared_pair(make):
    return make(max_pixels=3_000_000), make(max_pixels=3_000_000)


@pytest.fixture
def pair(shared_pair, redis):
    """Two servers that run already, and an empty Redis; afterwards nothing may be left behind."""
    redis.client().flushall()
    for server in shared_pair:
        server.sent.clear()
        server.before = server.pre.stats()
    yield shared_pair
    for server in shared_pair:
        for mm_hash in [*server.pre.pictures.pixels._held, *server.pre.pictures.pixels._awaited]:
            server.release(mm_hash)
        server.settle()
        server.run(until(lambda server=server: not server.pre.pictures.pixels._saves))
        assert server.pre.stats().slab_pinned_bytes == 0
        server.pre.pictures._ledger.check_integrity()


def since(server, *names):
    """What has been counted in this test."""
    now = server.pre.stats()
    return tuple(getattr(now, f"num_{name}") - getattr(server.before, f"num_{name}", 0) for name in names)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.002)


SEEDS = itertools.count(1000)


def picture(width=300, height=200):
    """One that no other test has used."""
    return data_url(make_image(width, height, next(SEEDS)))


def ask(harness, url):
    """A request for one picture, and its pixels: (mm_hash, bytes)."""
    (feature,) = harness.prepare(url).mm_features
    harness.request(feature.mm_hash)
    (answer,) = harness.answers()
    assert isinstance(answer, FeatureReady), answer
    return feature.mm_hash, harness.bytes_at(answer)


def wait_for_saves(server, count=1):
    server.run(until(lambda: sum(since(server, "store_saves", "store_failures", "store_saves_skipped")) >= count))


def store_pid(server):
    (pid,) = [pid for pid in children(os.getpid()) if pid == server.pre.pictures._store._process.pid]
    return pid


def test_another_server_decodes_nothing(pair):
    first, second = pair
    pictures = [picture() for _ in range(3)]
    wanted = [ask(first, each) for each in pictures]
    wait_for_saves(first, 3)
    assert since(first, "decodes", "store_misses", "store_saves") == (3, 3, 3)
    assert [ask(second, each) for each in pictures] == wanted
    assert since(second, "decodes", "store_hits", "store_misses") == (0, 3, 0)
    assert ask(second, pictures[0]) == wanted[0]
    assert since(second, "slab_hits", "store_hits") == (0, 3)  # the core holds it already


def test_the_slab_comes_before_the_store(pair, redis):
    server, _ = pair
    url = picture()
    mm_hash, wanted = ask(server, url)
    wait_for_saves(server)
    server.release(mm_hash)
    redis.client().flushall()
    assert ask(server, url) == (mm_hash, wanted)
    assert since(server, "slab_hits", "store_hits", "decodes") == (1, 0, 1)


def test_a_picture_in_several_chunks(pair):
    first, second = pair
    large = picture(2000, 1490)
    wanted = ask(first, large)
    assert len(wanted[1]) > 2 * (4 << 20)
    wait_for_saves(first)
    found = ask(second, large) == wanted
    assert found and since(second, "store_hits", "store_failures") in ((1, 0), (0, 1))  # 1: a busy machine's Redis was slow


def test_two_servers_want_a_new_picture_at_once(pair):
    """One decodes; the other waits for it. They are driven by threads: each has a loop of its own."""
    for _ in range(8):
        url, results = picture(900, 700), [None, None]

        def run(index, url=url, results=results):
            results[index] = ask(pair[index], url)
            pixels = pair[index].pre.pictures.pixels
            pair[index].run(until(lambda: not pixels._saves))  # its loop runs no longer than it is told to

        threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results[0] == results[1] is not None
    counts = [since(server, "decodes", "store_hits", "store_failures") for server in pair]
    decodes, hits, failures = map(sum, zip(*counts, strict=True))
    assert decodes + hits == 16 and decodes - failures <= 8 <= decodes and failures <= 2, counts


def test_a_server_that_dies_with_a_lease_holds_others_up_for_the_lease_only(pair):
    first, second = pair
    url = picture()
    (worker,) = first.workers()
    os.kill(worker, signal.SIGSTOP)
    (feature,) = first.prepare(url).mm_features
    first.request(feature.mm_hash)
    first.run(until(lambda: since(first, "store_misses") == (1,)))
    started = time.monotonic()
    ask(second, url)
    assert 1.0 < time.monotonic() - started < 8.0
    assert since(second, "decodes", "lease_waits") == (1, 1)
    os.kill(worker, signal.SIGCONT)
    assert isinstance(first.answers()[0], FeatureReady)


def test_a_damaged_picture_gives_its_lease_back(pair):
    broken = data_url(make_image(300, 200, next(SEEDS))[:3000])
    for server in pair:
        (feature,) = server.prepare(broken).mm_features
        server.request(feature.mm_hash)
        (answer,) = server.answers()
        assert answer.code == "invalid_image"
    assert since(pair[1], "lease_waits", "store_misses") == (0, 1)


def test_released_while_looked_up(pair, redis):
    """Nobody wants it any more when the store says it has none: nothing is decoded, the slot is free."""
    server, _ = pair
    url = picture()
    redis.suspend()
    (feature,) = server.prepare(url).mm_features
    server.request(feature.mm_hash)
    server.run(until(lambda: server.pre.pictures.pixels.num_jobs == 1))
    server.release(feature.mm_hash)
    server.settle()
    redis.resume()
    assert since(server, "decodes") == (0,) and server.sent == [] and server.pre.stats().slab_pinned_bytes == 0
    server.run(until(lambda: server.pre.stats().store_is_up))
    ask(server, url)
    assert since(server, "decodes") == (1,)


def test_released_while_another_server_has_the_lease(pair, redis):
    """The slot is free before the lease is: there may be little room in the slab."""
    first, second = pair
    url = picture()
    (worker,) = first.workers()
    os.kill(worker, signal.SIGSTOP)
    try:
        (feature,) = first.prepare(url).mm_features
        first.request(feature.mm_hash)
        first.run(until(lambda: since(first, "store_misses") == (1,)))
        second.prepare(url)
        second.request(feature.mm_hash)
        second.run(until(lambda: since(second, "lease_waits") == (1,)))
        second.release(feature.mm_hash)
        second.settle()
        assert redis.client().exists(lease_key(feature.mm_hash)) and second.pre.stats().slab_pinned_bytes == 0
    finally:
        os.kill(worker, signal.SIGCONT)
    assert isinstance(first.answers()[0], FeatureReady)


def test_a_store_process_that_cannot_be_started_is_tried_again(pair, monkeypatch):
    server, _ = pair
    start, refusals = child.start, [OSError(24, "Too many open files")] * 2

    async def reluctant(*args, **options):
        if refusals:
            raise refusals.pop()
        return await start(*args, **options)

    monkeypatch.setattr(child, "start", reluctant)
    monkeypatch.setattr("mmv1.preprocess.store._FIRST_RESTART_S", 0.05)
    pid, descriptors = store_pid(server), file_descriptors()
    os.kill(pid, signal.SIGKILL)
    server.run(until(lambda: not refusals and server.pre.stats().store_is_up))
    server.run(until(lambda: file_descriptors() <= descriptors))
    ask(server, picture())
    wait_for_saves(server)
    assert since(server, "store_misses", "store_saves") == (1, 1)


def test_the_last_words_of_a_dead_store_process_are_not_believed(pair):
    """They may be read after its end has been noticed: nobody may be sent to it then."""
    server, _ = pair
    store, url = server.pre.pictures._store, picture()
    last_words = StoreState(store._settings.generation, True)
    os.kill(store_pid(server), signal.SIGKILL)
    server.run(until(lambda: not store.is_up))

    async def hear():
        store._on_state(last_words)

    server.run(hear())
    assert not store.is_up
    server.run(until(lambda: store.is_up))
    ask(server, url)
    assert since(server, "store_misses", "store_failures") == (1, 0)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_the_store_process_dies_or_hangs(pair, blow):
    server, other = pair
    before, during, after = (picture() for _ in range(3))
    wanted = ask(server, before)
    wait_for_saves(server)
    pid = store_pid(server)
    os.kill(pid, blow)
    ask(server, during)
    assert since(server, "decodes") == (2,)
    server.run(until(lambda: not is_alive(pid) and server.pre.stats().store_is_up))
    assert ask(other, before) == wanted
    ask(server, after)
    wait_for_saves(server, 3)
    assert ask(other, after) and since(other, "decodes", "store_hits") == (0, 2)


def test_redis_killed_and_restarted(pair, redis):
    """No picture fails, none waits for long, and afterwards everything is shared again."""
    server, other = pair
    redis.kill()
    try:
        for _ in range(3):
            ask(server, picture())
        assert since(server, "decodes") == (3,) and not server.pre.stats().store_is_up
    finally:
        redis.start()
    for each in pair:
        each.run(until(lambda each=each: each.pre.stats().store_is_up))
    url = picture()
    wanted = ask(server, url)
    wait_for_saves(server, 4)
    assert ask(other, url) == wanted and since(other, "decodes") == (0,)


def test_away_from_the_start_small_pictures_and_the_process_ends(make, redis):
    redis.kill()
    try:
        server = make(redis_min_bytes=65_536)
        server.before = server.pre.stats()
        ask(server, picture())
        assert since(server, "decodes") == (1,) and not server.pre.stats().store_is_up
    finally:
        redis.start()
    server.run(until(lambda: server.pre.stats().store_is_up))
    server.before = server.pre.stats()
    ask(server, picture(60, 60))
    assert since(server, "decodes", "store_misses", "store_failures") == (1, 0, 0)  # not worth a look-up
    ask(server, picture(400, 300))
    wait_for_saves(server)
    assert since(server, "store_misses", "store_saves") == (1, 1) and len(redis.client().keys()) == 2
    pid = store_pid(server)
    server.run(server.pre.pictures._store.close())
    wait_until(lambda: not is_alive(pid))


def test_secrets(make, redis):
    """On no command line; and servers share only with the same one."""
    with_password = redis.url.replace("redis://", "redis://default:hunter2@")
    redis.client().config_set("requirepass", "hunter2")
    try:
        servers = [make(redis_url=with_password, cache_secret=secret) for secret in (b"s" * 16, b"s" * 16, b"t" * 16)]
    finally:
        import redis as client

        client.Redis(port=redis.port, password="hunter2").config_set("requirepass", "")
    for server in servers:
        server.before = server.pre.stats()
    url = picture()
    wanted = ask(servers[0], url)
    wait_for_saves(servers[0])
    assert ask(servers[1], url) == wanted and since(servers[1], "decodes") == (0,)
    mm_hash, pixels = ask(servers[2], url)
    assert pixels == wanted[1] and mm_hash != wanted[0] and since(servers[2], "decodes") == (1,)
    for pid in (store_pid(servers[0]), servers[0].pre.pictures._pool.pid, *servers[0].workers()):
        with open(f"/proc/{pid}/cmdline", "rb") as command:
            line = command.read()
        assert b"mmv1.preprocess" in line and b"hunter2" not in line and b"ssss" not in line


def test_a_url_that_cannot_be_understood(make):
    with pytest.raises(ConfigError, match="Redis URL"):
        make(redis_url="redis://host:1/0?socket_timeout=soon")


def test_a_hung_redis_costs_a_picture_a_moment_once(pair, redis):
    """From the core's request to the answer, against the same with Redis well."""
    server, _ = pair

    def seconds():
        (feature,) = server.prepare(picture(200, 150)).mm_features
        started = time.perf_counter()
        server.request(feature.mm_hash)
        server.answers()
        return time.perf_counter() - started

    for _ in range(5):  # whatever else this machine does may get into a measurement, not into all of them
        normal = statistics.median(seconds() for _ in range(9))
        redis.suspend()
        try:
            first = seconds()
            later = statistics.median(seconds() for _ in range(9))
        finally:
            redis.resume()
        server.run(until(lambda: server.pre.stats().store_is_up))
        assert first > 0.09  # it was asked
        if first - normal < 0.15 and later - normal < 0.01:
            return
    raise AssertionError((normal, first, later))
