"""The one door: prompts in, references out, pixels on demand, with a real pool; and everything given back at the end."""

import asyncio
import contextlib
import dataclasses
import io
import os
import signal
import subprocess
import sys
import threading
import zlib

import pytest
from PIL import Image

from mmv1.config import EngineArgs, resolve
from mmv1.errors import ConfigError, ContextLengthError, EngineError, ImageError, RequestError
from mmv1.preprocess.layout import load_layout
from mmv1.preprocess.pool_messages import JobTimes
from mmv1.preprocess.preprocessor import Preprocessor
from mmv1.preprocess.prompt import ImagePart, Message, TextPart
from mmv1.preprocess.slab import aligned, map_slab
from mmv1.types import FeatureFailed, FeatureReady, PixelRequest, SlabShort
from tests.pictures import data_url, make_image, make_pil
from tests.preprocess.processes import children, file_descriptors, wait_until
from tests.preprocess.test_decode import png

TIMEOUT_S = 60


def user(*parts):
    def is_text(part):
        return isinstance(part, str) and not part.startswith("data:")

    return [Message("user", [TextPart(part) if is_text(part) else ImagePart(part) for part in parts])]


class Harness:
    """A preprocessor, what it sent to the core, and a loop to run it in."""

    def __init__(self, model_dir, slab_bytes=None, **changes):
        config = resolve(EngineArgs(model=str(model_dir)))
        self.model = config.model
        changes = {"num_workers": 2, "slab_bytes": slab_bytes, **changes}
        self.runner = asyncio.Runner()
        self.sent, self.failures, self.num_presses = [], [], 0
        self.pre = Preprocessor(
            config.model, dataclasses.replace(config.preprocess, **changes), self.send, on_failure=self.failures.append
        )
        self.runner.run(self.pre.start())
        self.requests = 0
        self.ticket = 0

    def send(self, message):
        if isinstance(message, SlabShort):
            self.num_presses += 1
        else:
            self.sent.append(message)

    def run(self, awaitable):
        async def bounded():
            async with asyncio.timeout(TIMEOUT_S):
                return await awaitable

        return self.runner.run(bounded())

    def prepare(self, *parts, request_id=None, **options):
        self.requests += 1
        return self.run(self.pre.prepare_chat(request_id or f"r{self.requests}", user(*parts), **options))

    def request(self, mm_hash, ticket=None):
        self.ticket += 1
        ticket = ticket or self.ticket

        async def request():
            self.pre.request_pixels(PixelRequest(mm_hash, ticket))

        self.run(request())
        return ticket

    def release(self, mm_hash):
        async def release():
            self.pre.release_pixels(mm_hash)

        self.run(release())

    def answers(self, count=1):
        """The next `count` answers."""

        async def wait():
            while len(self.sent) < count:
                await asyncio.sleep(0.002)

        self.run(wait())
        taken, self.sent[:] = list(self.sent), []
        assert len(taken) == count, taken
        return taken

    def settle(self):
        """Until no job is under way."""

        async def wait():
            while self.pre.pictures.pixels.num_jobs:
                await asyncio.sleep(0.002)

        self.run(wait())

    def bytes_at(self, ready):
        with map_slab(self.pre.slab.fd, self.pre.slab.nbytes) as slab:
            return slab[ready.offset : ready.offset + ready.nbytes]

    def workers(self):
        return children(self.pre.pictures._pool.pid)

    def close(self):
        self.run(self.pre.close())
        self.runner.close()


@pytest.fixture(scope="module")
def shared(tiny_model_dir):
    harness = Harness(tiny_model_dir, max_images_per_prompt=4)
    harness.run(harness.pre.wait_ready())
    yield harness
    harness.close()


@pytest.fixture
def harness(shared):
    """The shared one; afterwards every test must have left nothing behind."""
    shared.sent.clear()
    yield shared
    for request_id in list(shared.pre._requests):
        shared.pre.release_request(request_id)
    for mm_hash in [*shared.pre.pictures.pixels._held, *shared.pre.pictures.pixels._awaited]:
        shared.release(mm_hash)
    shared.settle()
    stats = shared.pre.stats()
    assert (stats.encoded_bytes, stats.slab_pinned_bytes, stats.num_waiting_for_slab) == (0, 0, 0)
    shared.pre.pictures._ledger.check_integrity()


def test_a_prompt_is_ready_before_anything_is_decoded(harness):
    before = harness.pre.stats()
    prepared = harness.prepare("Look: ", make_image(300, 200), " and ", make_image(90, 400), "?")
    pad = harness.pre.layout.image_token_id
    start, end = (harness.pre.tokenizer.token_to_id(f"<|vision_{name}|>") for name in ("start", "end"))
    for feature, size in zip(prepared.mm_features, ((300, 200), (90, 400)), strict=True):
        assert len(feature.mm_hash) == 32
        assert feature.num_tokens == harness.pre.layout.place(*size).num_tokens
        ids = prepared.prompt_token_ids
        assert ids[feature.offset : feature.offset + feature.num_tokens] == [pad] * feature.num_tokens
        assert ids[feature.offset - 1] == start
        assert ids[feature.offset + feature.num_tokens] == end
    assert prepared.prompt_token_ids.count(pad) == sum(f.num_tokens for f in prepared.mm_features)
    after = harness.pre.stats()
    assert after.num_images_probed - before.num_images_probed == 2 and after.num_decodes == before.num_decodes


def test_pixels_on_demand_then_from_the_slab(harness):
    before = harness.pre.stats()
    feature = harness.prepare(make_image(301, 200)).mm_features[0]
    ticket = harness.request(feature.mm_hash)
    [ready] = harness.answers()
    assert isinstance(ready, FeatureReady) and (ready.mm_hash, ready.ticket) == (feature.mm_hash, ticket)
    assert ready.nbytes == feature.grid_thw[1] * feature.grid_thw[2] * 588
    first = harness.bytes_at(ready)
    harness.release(feature.mm_hash)
    harness.pre.release_request("r1")
    ticket = harness.request(feature.mm_hash)
    assert harness.answers() == [FeatureReady(feature.mm_hash, ticket, ready.offset, ready.nbytes)]
    assert harness.bytes_at(ready) == first
    after = harness.pre.stats()
    assert after.num_decodes - before.num_decodes == 1 and after.num_slab_hits - before.num_slab_hits == 1
    assert after.decode_seconds > before.decode_seconds


@pytest.mark.parametrize("kind", ["bytes", "data url", "pil", "path"])
def test_every_source(harness, kind, tmp_path):
    encoded = make_image(123, 77, format="PNG")
    source = encoded
    if kind == "data url":
        source = data_url(encoded, "PNG")
    elif kind == "pil":
        source = Image.open(io.BytesIO(encoded))
    elif kind == "path":
        source = tmp_path / "picture.png"
        source.write_bytes(encoded)
    feature = harness.prepare(source).mm_features[0]
    harness.request(feature.mm_hash)
    [ready] = harness.answers()
    reference = harness.prepare(encoded).mm_features[0]
    assert (reference.mm_hash == feature.mm_hash) == (kind != "pil")  # a PIL image has other bytes than its file
    harness.request(reference.mm_hash)
    [expected] = harness.answers()
    assert harness.bytes_at(ready) == harness.bytes_at(expected)


def test_a_path_never_comes_from_text(harness):
    for text in ("/etc/passwd", "file:///etc/passwd", "README.md"):
        with pytest.raises(ImageError) as refusal:
            harness.run(harness.pre.prepare_chat("x", [Message("user", [ImagePart(text)])]))
        assert refusal.value.code == "image_url_forbidden"


def test_one_decode_for_many_requests(harness):
    """64 concurrent requests with one new picture; and the core's repeated questions are all one job."""
    before = harness.pre.stats()
    encoded = make_image(640, 480, seed=64)

    async def prepare_all():
        return await asyncio.gather(*(harness.pre.prepare_chat(f"many{n}", user(encoded, f"question {n}")) for n in range(64)))

    hashes = {prepared.mm_features[0].mm_hash for prepared in harness.run(prepare_all())}
    assert len(hashes) == 1
    [mm_hash] = hashes
    assert harness.pre.stats().encoded_bytes == len(encoded)

    async def request_all():
        for ticket in range(1, 65):
            harness.pre.request_pixels(PixelRequest(mm_hash, ticket))

    harness.run(request_all())
    [ready] = harness.answers()
    assert ready.ticket == 64
    assert harness.pre.stats().num_decodes - before.num_decodes == 1
    for n in range(64):
        assert harness.pre.stats().encoded_bytes == len(encoded)
        harness.pre.release_request(f"many{n}")
    assert harness.pre.stats().encoded_bytes == 0


def test_scopes_share_no_picture(harness):
    """One file in a conversation and in a raw prompt, of two tenants and of none: one name for each scope."""
    before = harness.pre.stats()
    encoded, scopes = make_image(64, 64, seed=65), (b"", b"one", b"two")
    names = [harness.prepare(encoded, tenant_scope=scope).mm_features[0].mm_hash for scope in scopes]
    raw = "<|vision_start|><|image_pad|><|vision_end|>"
    for number, scope in enumerate(scopes):
        prepared = harness.run(harness.pre.prepare_prompt(f"raw{number}", raw, [encoded], tenant_scope=scope))
        assert prepared.mm_features[0].mm_hash == names[number]
    assert len(set(names)) == 3
    for name in names:
        harness.request(name)
    harness.answers(3)
    assert harness.pre.stats().num_decodes - before.num_decodes == 3
    assert harness.pre.stats().num_slab_hits == before.num_slab_hits


def test_a_new_ticket_for_pixels_held_is_answered_and_pins_once(harness):
    feature = harness.prepare(make_image(302, 200)).mm_features[0]
    harness.request(feature.mm_hash, ticket=5)
    harness.answers()
    harness.request(feature.mm_hash, ticket=9)
    [ready] = harness.answers()
    assert ready.ticket == 9
    harness.release(feature.mm_hash)
    assert harness.pre.stats().slab_pinned_bytes == 0
    harness.release(feature.mm_hash)
    harness.release(b"unknown")


def stopped(harness):
    """Every worker is stopped until `resume`."""
    workers = harness.workers()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)

    def resume():
        for pid in workers:
            os.kill(pid, signal.SIGCONT)

    return resume


def test_released_before_the_answer_no_answer(harness):
    """A job that a worker has goes on and leaves its picture in the slab; a job not yet dispatched is withdrawn."""
    before = harness.pre.stats()
    features = [harness.prepare(make_image(204, 100, seed)).mm_features[0] for seed in range(70, 76)]
    resume = stopped(harness)
    for feature in features:
        harness.request(feature.mm_hash)
    harness.run(asyncio.sleep(0))  # the jobs' tasks reach the pool: four are dispatched, two wait
    for feature in features:
        harness.release(feature.mm_hash)
    resume()
    harness.settle()
    assert harness.sent == []
    assert harness.pre.stats().num_decodes - before.num_decodes == 4
    assert [feature.mm_hash in harness.pre.pictures._ledger for feature in features] == [True] * 4 + [False] * 2
    ticket = harness.request(features[5].mm_hash)
    [ready] = harness.answers()
    assert ready.ticket == ticket


def test_released_and_asked_again_while_the_job_runs(harness):
    feature = harness.prepare(make_image(200, 100, 75)).mm_features[0]
    resume = stopped(harness)
    harness.request(feature.mm_hash, ticket=1)
    harness.run(asyncio.sleep(0))
    harness.release(feature.mm_hash)
    harness.request(feature.mm_hash, ticket=2)
    resume()
    [ready] = harness.answers()
    assert ready.ticket == 2


def test_a_worker_killed_in_the_middle_costs_time_only(harness):
    before = harness.pre.stats()
    feature = harness.prepare(make_image(200, 100, 76)).mm_features[0]
    stopped(harness)
    harness.request(feature.mm_hash)
    harness.run(asyncio.sleep(0))
    for pid in harness.workers():
        os.kill(pid, signal.SIGKILL)
    [ready] = harness.answers()
    assert isinstance(ready, FeatureReady)
    wait_until(lambda: len(harness.workers()) == 2)
    harness.run(_until(lambda: harness.pre.stats().num_worker_deaths == before.num_worker_deaths + 2))


async def _until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def test_the_image_is_gone(harness):
    feature = harness.prepare(make_image(200, 100, 77), request_id="gone").mm_features[0]
    harness.pre.release_request("gone")
    ticket = harness.request(feature.mm_hash)
    [failed] = harness.answers()
    assert isinstance(failed, FeatureFailed) and failed.ticket == ticket


def test_damaged_pictures_fail_when_asked_for_and_the_next_is_fine(harness):
    good = make_image(200, 150)
    for bad in (good[: len(good) // 2], png(4000, 4000, b"")):
        feature = harness.prepare(bad).mm_features[0]
        ticket = harness.request(feature.mm_hash)
        [failed] = harness.answers()
        assert isinstance(failed, FeatureFailed)
        assert (failed.mm_hash, failed.ticket, failed.code) == (feature.mm_hash, ticket, "invalid_image")
        assert "0x" not in failed.message and "/" not in failed.message
        assert feature.mm_hash not in harness.pre.pictures._ledger
    feature = harness.prepare(good).mm_features[0]
    harness.request(feature.mm_hash)
    assert isinstance(harness.answers()[0], FeatureReady)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "invalid_image"),
        (b"this is no image", "unsupported_image_format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_image_format"),
        (make_image(1, 5000, format="PNG"), "invalid_image"),
        (png(13000, 13000, zlib.compress(b"")), "image_too_large"),
        (b"\xff\xd8\xff" + bytes(21 << 20), "image_too_large"),
    ],
    ids=["empty", "text", "svg", "1x5000", "bomb", "21 MiB"],
)
def test_what_a_header_shows_is_refused_at_once(harness, data, code):
    with pytest.raises(ImageError) as refusal:
        harness.prepare(data)
    assert refusal.value.code == code and refusal.value.status == 400
    assert "0x" not in refusal.value.message
    assert harness.pre.stats().encoded_bytes == 0


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 150), (3, 500), (4000, 30)])
def test_odd_sizes_are_answered(harness, size):
    feature = harness.prepare(make_image(*size, format="PNG")).mm_features[0]
    harness.request(feature.mm_hash)
    [ready] = harness.answers()
    assert ready.nbytes == feature.num_tokens * 4 * 588


@pytest.mark.parametrize("mode", ["I;16", "CMYK", "P", "RGBA", "LA", "L", "1"])
def test_odd_modes_are_answered(harness, mode):
    image = Image.new("I;16", (70, 50), 999) if mode == "I;16" else make_pil(70, 50).convert(mode)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG" if mode == "CMYK" else "PNG")
    feature = harness.prepare(encoded.getvalue()).mm_features[0]
    harness.request(feature.mm_hash)
    assert isinstance(harness.answers()[0], FeatureReady)


def test_requests_that_cannot_be(harness):
    image = make_image(50, 50)
    with pytest.raises(ImageError) as refusal:
        harness.prepare(*[image] * 5)
    assert refusal.value.code == "too_many_images"
    with pytest.raises(RequestError):
        harness.run(harness.pre.prepare_chat("none", []))
    with pytest.raises(ContextLengthError):
        harness.prepare("word " * harness.model.max_model_len)
    with pytest.raises(RequestError, match="placeholders"):
        harness.run(harness.pre.prepare_prompt("raw", "no placeholder", [image]))
    with pytest.raises(RequestError, match="empty"):
        harness.run(harness.pre.prepare_prompt("raw", ""))
    with pytest.raises(ImageError, match=r"^image 2:"):
        harness.prepare(image, b"bad")
    assert not harness.pre._requests


def test_nothing_is_fetched_for_a_prompt_that_is_refused(harness):
    """T-S6: neither for its structure, nor for the room that its text and the pictures at hand leave."""
    url, picture = ImagePart("http://pictures.example/a.png"), ImagePart(make_image(300, 300))
    num_image_tokens = harness.pre.layout.place(300, 300).num_tokens
    before = harness.pre.stats().num_fetches
    for parts, expanded in (([url], 0), ([picture, url], num_image_tokens - 1), ([url, picture], num_image_tokens - 1)):
        prompt = [Message("user", [TextPart("Hello"), *parts])]
        least = len(harness.pre._prompts.render_chat(prompt)) + expanded
        with pytest.raises(ContextLengthError, match=f"has {least} tokens or more"):
            harness.run(harness.pre.prepare_chat("short", prompt, max_prompt_tokens=least - 1))
    with pytest.raises(RequestError):
        harness.run(harness.pre.prepare_prompt("raw", "no placeholder", ["http://pictures.example/a.png"]))
    with pytest.raises(RequestError):
        harness.run(harness.pre.prepare_chat("bad", [Message("USER", [ImagePart("http://pictures.example/a.png")])]))
    assert harness.pre.stats().num_fetches == before


def test_raw_prompts(harness):
    image = make_image(150, 80)
    text = "<|vision_start|><|image_pad|><|vision_end|>What is it?"
    by_text = harness.run(harness.pre.prepare_prompt("raw1", text, [image]))
    ids = harness.pre._prompts.render_text(text)
    by_ids = harness.run(harness.pre.prepare_prompt("raw2", ids, [image]))
    assert by_text == by_ids and len(by_text.mm_features) == 1
    with pytest.raises(EngineError):
        harness.run(harness.pre.prepare_prompt("raw1", "again"))


def test_large_payloads_leave_the_event_loop(harness, monkeypatch):
    """Parsing a large data: URL and hashing what is in it happen in a thread; a small picture's do not."""
    import mmv1.preprocess.image_loader as module

    loop_thread, threads = threading.get_ident(), {}

    def recorded(name, function):
        def call(*args, **kwargs):
            threads[name] = threading.get_ident() == loop_thread
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(module, "parse_data_url", recorded("parse", module.parse_data_url))
    monkeypatch.setattr(harness.pre.pictures._hasher, "mm_hash", recorded("hash", harness.pre.pictures._hasher.mm_hash))
    small = make_image(100, 100)
    harness.prepare(data_url(small))
    assert threads == {"parse": True, "hash": True}
    harness.prepare(data_url(small + bytes(1 << 20)))
    assert threads == {"parse": False, "hash": False}


@pytest.mark.parametrize("way", ["prepare_chat", "prepare_prompt"])
def test_long_texts_leave_the_event_loop(harness, monkeypatch, way):
    """Tokenizing 20,000 characters takes milliseconds, in which the answers of others would stand still."""
    name = {"prepare_chat": "render_chat", "prepare_prompt": "render_text"}[way]
    loop_thread, threads = threading.get_ident(), []
    render = getattr(harness.pre._prompts, name)

    def recorded(*prompt, **options):
        threads.append(threading.get_ident() == loop_thread)
        return render(*prompt, **options)

    monkeypatch.setattr(harness.pre._prompts, name, recorded)
    for number, text in enumerate(("Hello", "hello " * 2_000, "hello " * 3_500)):
        prompt = [Message("user", text)] if way == "prepare_chat" else text
        with contextlib.suppress(ContextLengthError):
            harness.run(getattr(harness.pre, way)(f"{way}{number}", prompt))
    assert threads == [True, True, False]


@pytest.mark.parametrize("where", ["tools", "template_settings", "tool_calls"])
def test_what_else_a_template_is_given_leaves_the_event_loop_too(harness, monkeypatch, where):
    loop_thread, threads = threading.get_ident(), []

    def render(*_):
        threads.append(threading.get_ident() == loop_thread)
        return [5]

    monkeypatch.setattr(harness.pre._prompts, "render_chat", render)
    for number, text in enumerate(("short", "long " * 5_000)):
        value = {"a": [{text: None}, text]}
        calls = [value] if where == "tool_calls" else ()
        given = {"tools": {"tools": [value]}, "template_settings": {"template_settings": value}}.get(where, {})
        messages = [Message("user", "hi"), Message("assistant", "", tool_calls=calls)]
        harness.run(harness.pre.prepare_chat(f"{where}{number}", messages, **given))
    assert threads == [True, False]


def test_a_full_slab_makes_pictures_wait_their_turn(tiny_model_dir):
    harness = Harness(tiny_model_dir, slab_bytes=1 << 20)
    try:
        features = [harness.prepare(make_image(196, 196, seed)).mm_features[0] for seed in range(16)]
        slots = harness.pre.slab.nbytes // aligned(features[0].grid_thw[1] * features[0].grid_thw[2] * 588)
        assert 2 < slots < 16
        for feature in features:
            harness.request(feature.mm_hash)
        order = [answer.mm_hash for answer in harness.answers(slots)]
        assert sorted(order) == sorted(feature.mm_hash for feature in features[:slots])
        assert harness.pre.stats().num_waiting_for_slab == 16 - slots

        async def pressed():
            while not harness.num_presses:
                await asyncio.sleep(0.002)

        harness.run(pressed())  # the core is told that the slab is short
        harness.release(features[-1].mm_hash)  # withdrawn while it waits
        for feature in features[slots:-1]:
            harness.release(order.pop(0))
            [ready] = harness.answers()
            assert ready.mm_hash == feature.mm_hash
            order.append(ready.mm_hash)
        for mm_hash in order:
            harness.release(mm_hash)
        assert harness.pre.stats().slab_pinned_bytes == 0
        harness.pre.pictures._ledger.check_integrity()
    finally:
        harness.close()


def test_a_slab_too_small_for_two_largest_pictures_is_refused_at_start(tiny_model_dir):
    config = resolve(EngineArgs(model=str(tiny_model_dir)))
    layout = load_layout(config.model)
    least = 2 * aligned(layout.image_bytes(layout.max_image_tokens(config.model.max_model_len)))
    for slab_bytes in (0, 64 << 10, least - 1):
        with pytest.raises(ConfigError, match="--preprocess-slab-gb"):
            Preprocessor(config.model, dataclasses.replace(config.preprocess, slab_bytes=slab_bytes), lambda answer: None)
    pre = Preprocessor(config.model, dataclasses.replace(config.preprocess, slab_bytes=least), lambda answer: None)
    asyncio.run(pre.close())


def test_an_unexpected_failure_is_answered(harness, monkeypatch, caplog):
    """Else the core would wait for the picture for ever."""

    def broken(job, payload):
        raise RuntimeError("broken")

    feature = harness.prepare(make_image(303, 200)).mm_features[0]
    with monkeypatch.context() as patched:
        patched.setattr(harness.pre.pictures._pool, "submit", broken)
        ticket = harness.request(feature.mm_hash)
        assert [(a.ticket, a.code) for a in harness.answers()] == [(ticket, "internal_error")]
    assert "Having a picture processed failed" in caplog.text
    harness.request(feature.mm_hash)
    assert isinstance(harness.answers()[0], FeatureReady)


def test_the_time_of_concurrent_jobs_adds_up(harness, monkeypatch):
    jobs = []

    def submit(job, payload):
        jobs.append(asyncio.get_running_loop().create_future())
        return jobs[-1]

    features = [harness.prepare(make_image(100, 100, seed)).mm_features[0] for seed in range(80, 85)]
    before = harness.pre.stats().decode_seconds
    with monkeypatch.context() as patched:
        patched.setattr(harness.pre.pictures._pool, "submit", submit)
        for feature in features:
            harness.request(feature.mm_hash)
        harness.run(_until(lambda: len(jobs) == 5))
        for job in jobs:
            job.set_result(JobTimes(0.5, 0.75, 0.25))
        harness.answers(5)
    assert harness.pre.stats().decode_seconds - before == pytest.approx(5.0)


def test_a_request_fetches_few_pictures_at_once(harness, monkeypatch):
    now, most = [0], [0]

    async def look_up(url):
        return url

    async def fetch(url):
        now[0] += 1
        most[0] = max(most[0], now[0])
        await asyncio.sleep(0.01)
        now[0] -= 1
        return make_image(60, 60)

    monkeypatch.setattr(harness.pre.pictures._fetcher, "look_up", look_up)
    monkeypatch.setattr(harness.pre.pictures._fetcher, "fetch", fetch)
    monkeypatch.setattr(harness.pre, "_max_images", 20)
    parts = [ImagePart("http://a.example/x")] * 20
    prepared = harness.run(harness.pre.prepare_chat("many", [Message("user", parts)]))
    assert len(prepared.mm_features) == 20
    assert most[0] == 8


def test_the_end_of_the_pool_is_told_and_pixels_fail(tiny_model_dir):
    descriptors = file_descriptors()
    harness = Harness(tiny_model_dir)
    feature = harness.prepare(make_image(100, 100)).mm_features[0]
    harness.run(harness.pre.wait_ready())
    os.kill(harness.pre.pictures._pool.pid, signal.SIGKILL)
    harness.run(_until(lambda: harness.failures))
    assert len(harness.failures) == 1
    ticket = harness.request(feature.mm_hash)
    assert [(a.ticket, a.code) for a in harness.answers()] == [(ticket, "internal_error")]
    harness.close()
    wait_until(lambda: file_descriptors() <= descriptors + 2)  # the zmq context's own


def test_pixel_limits_of_the_operator(tiny_model_dir):
    with pytest.raises(ConfigError):
        Harness(tiny_model_dir, min_pixels=784 * 100, max_pixels=784)


_MEMORY = """
import asyncio, dataclasses, sys
from mmv1.config import EngineArgs, resolve
from mmv1.preprocess.pool_messages import JobTimes
from mmv1.preprocess.preprocessor import Preprocessor
from mmv1.preprocess.prompt import ImagePart, Message
from mmv1.types import PixelRequest

async def main(model_dir, picture):
    config = resolve(EngineArgs(model=model_dir))
    sent = []
    pre = Preprocessor(config.model, dataclasses.replace(config.preprocess, num_workers=1), sent.append)
    await pre.start()
    for n in range(200):
        data = picture + n.to_bytes(2, "big")
        prepared = await pre.prepare_chat(str(n), [Message("user", [ImagePart(data)])])
        pre.request_pixels(PixelRequest(prepared.mm_features[0].mm_hash, 1))
        while len(sent) <= n:
            await asyncio.sleep(0.001)
        pre.release_pixels(prepared.mm_features[0].mm_hash)
        pre.release_request(str(n))
    assert pre.stats().num_decodes == 200, pre.stats()
    await pre.close()
    resident = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    print(int(resident.split()[1]) // 1024, *(name for name in ("torch", "torchvision", "transformers") if name in sys.modules))

asyncio.run(main(sys.argv[1], open(sys.argv[2], "rb").read()))
"""


def test_the_server_process_stays_small(tiny_model_dir, tmp_path):
    """After 200 pictures of 2 megapixels: below 250 MB resident, no torch, no transformers."""
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(make_image(1600, 1200))
    command = [sys.executable, "-c", _MEMORY, str(tiny_model_dir), str(picture)]
    output = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert output.returncode == 0, output.stderr
    megabytes, *imported = output.stdout.split()
    assert not imported and int(megabytes) < 250
