"""What happens around the embedding model, with a real pool and a process that is none: done once, kept, shared, given up."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import ClassVar, TypeVar

import msgspec
import pytest

from mmv1.config import EngineArgs, resolve_preprocess
from mmv1.embedding import embedder as embedder_module
from mmv1.embedding.embedder import Embedder, Embedding, PictureInput, TextInput
from mmv1.embedding.messages import ClipReady, Embedded
from mmv1.embedding.settings import EmbeddingSettings
from mmv1.errors import ConfigError, ContextLengthError, EmbedderDeadError, RequestError, ShuttingDownError
from mmv1.preprocess.crop import CropRules
from mmv1.preprocess.slab import SlabStore, map_slab
from tests.pictures import data_url, make_image

T = TypeVar("T")
RULES = CropRules(height=8, width=8)


class FakeProcess:
    """Embeds a picture as the sum of its pixels and a text as its length. Pictures wait for `open`."""

    started: ClassVar[list[FakeProcess]] = []
    error: str | None = None
    rules = RULES

    def __init__(self, model: str, *, flag: str, slab: SlabStore) -> None:
        self.slab = slab
        self.open = asyncio.Event()
        self.open.set()
        self.ended = asyncio.Event()
        self.num_pictures = self.num_texts = self.num_waiting = 0
        self.is_closed = False

    async def start(self) -> None:
        self.started.append(self)

    async def wait_ready(self) -> ClipReady:
        if self.error is not None:
            raise ConfigError(self.error)
        return ClipReady(rules=self.rules, dimensions=1, context_length=7, device="cpu")

    async def wait_ended(self) -> int:
        await self.ended.wait()
        return -9

    async def embed_pixels(self, offset: int) -> Embedded:
        self.num_waiting += 1
        ended, opened = asyncio.ensure_future(self.ended.wait()), asyncio.ensure_future(self.open.wait())
        await asyncio.wait((ended, opened), return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not opened.done():
            opened.cancel()
            raise EmbedderDeadError("gone")
        self.num_pictures += 1
        with map_slab(self.slab.fd, self.slab.nbytes) as slab:
            return Embedded(0, struct.pack("<f", sum(slab[offset : offset + RULES.place().nbytes])))

    async def embed_text(self, text: str, *, truncate: bool) -> Embedded:
        if len(text) > 7 and not truncate:
            raise ContextLengthError("too long")
        self.num_texts += 1
        return Embedded(0, struct.pack("<f", min(len(text), 7)), min(len(text), 7))

    async def close(self) -> None:
        self.is_closed = True
        self.ended.set()


class Harness:
    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        config = resolve_preprocess(EngineArgs(preprocess_workers=1))
        self.embedder = Embedder(EmbeddingSettings(model="fake:weights"), config)

    def beside(self, **settings: int) -> Embedder:
        """Another one, with the same pictures: as beside a language model."""
        settings_of = EmbeddingSettings(model="fake:weights", **settings)
        return Embedder(settings_of, self.embedder.config, self.embedder.pictures)

    @property
    def process(self) -> FakeProcess:
        assert isinstance(self.embedder._process, FakeProcess)
        return self.embedder._process

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(20):
                return await work()

        return self.runner.run(bounded())

    def embed(self, *inputs: TextInput | PictureInput, scope: bytes = b"", truncate: bool = False) -> list[Embedding]:
        return self.run(lambda: self.embedder.embed(inputs, tenant_scope=scope, truncate=truncate))

    def counts(self) -> tuple[int, int, int]:
        """Pictures decoded, encoded, and found in the cache or under way."""
        stats = self.embedder.stats()
        return self.embedder.pictures.stats().num_decodes, stats.num_images, stats.cache_hits

    def assert_all_is_given_back(self) -> None:
        stats = self.embedder.pictures.stats()
        assert (stats.slab_pinned_bytes, stats.encoded_bytes, self.embedder._flights) == (0, 0, {})


@pytest.fixture(scope="module", autouse=True)
def fake_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedder_module, "ClipProcess", FakeProcess)
        patch.setattr(embedder_module, "_FIRST_RESTART_S", 0.01)
        yield


@pytest.fixture(scope="module")
def shared() -> Iterator[Harness]:
    harness = Harness()
    harness.run(harness.embedder.start)
    harness.run(harness.embedder.wait_ready)
    yield harness
    harness.run(harness.embedder.close)


@pytest.fixture
def harness(shared: Harness) -> Iterator[Harness]:
    """With empty caches; nothing may be held afterwards."""
    shared.embedder._cache.clear()
    yield shared
    shared.assert_all_is_given_back()


def picture(seed: int, place: str = "input") -> PictureInput:
    return PictureInput(make_image(20, 30, seed, "PNG"), place)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_a_picture_is_decoded_and_encoded_once_for_all_and_for_each_tenant(harness: Harness) -> None:
    start = harness.counts()

    def done() -> list[int]:
        return [now - before for now, before in zip(harness.counts(), start, strict=True)]

    async def together() -> list[list[Embedding]]:
        return await asyncio.gather(*(harness.embedder.embed([picture(1), picture(2), picture(1)]) for _ in range(3)))

    (first, second, again), *others = harness.run(together)
    assert first == again != second and others == [[first, second, first]] * 2
    assert done() == [2, 2, 7]
    assert harness.embed(picture(2)) == [second] and done() == [2, 2, 8]
    assert harness.embed(PictureInput(data_url(make_image(20, 30, 1, "PNG"), "PNG"))) == [first] and done() == [2, 2, 9]
    assert harness.embed(picture(1), scope=b"ann") == [first] and done() == [3, 3, 9]
    assert harness.embed(picture(1), scope=b"ann") == [first] and done() == [3, 3, 10]
    assert harness.embed(picture(1), scope=b"bob") == [first] and done() == [4, 4, 10]


def test_texts_and_pictures_keep_their_order(harness: Harness) -> None:
    found = harness.embed(TextInput("ab"), picture(1), TextInput(""), picture(2), TextInput("abc"))
    assert [each.num_tokens for each in found] == [2, 0, 0, 0, 3]
    assert [found[i].values for i in (0, 2, 4)] == [struct.pack("<f", n) for n in (2, 0, 3)]
    assert [found[1]] == harness.embed(picture(1)) and [found[3]] == harness.embed(picture(2))


def test_a_bad_input_fails_its_own_request_and_says_where(harness: Harness) -> None:
    bad = {
        "invalid_image": PictureInput(make_image(20, 30, 3, "PNG")[:-30], "input[1]"),
        "unsupported_image_format": PictureInput(b"no picture", "input[1]"),
        "image_url_forbidden": PictureInput("http://127.0.0.1:1/x.png", "input[1]"),
        "context_length_exceeded": TextInput("abcdefgh", "input[1]"),
    }

    async def together() -> list[object]:
        good = harness.embedder.embed([picture(4), TextInput("a")])
        works = (harness.embedder.embed([picture(5, "input[0]"), one]) for one in bad.values())
        return await asyncio.gather(good, *works, return_exceptions=True)

    good, *errors = harness.run(together)
    assert isinstance(good, list) and len(good) == 2
    for code, error in zip(bad, errors, strict=True):
        assert isinstance(error, RequestError), error
        assert (error.code, error.param, error.status) == (code, "input[1]", 400)
        assert str(error).startswith("input[1]: ")
    assert harness.embed(TextInput("abcdefgh"), truncate=True)[0].num_tokens == 7


def test_nothing_is_downloaded_for_a_request_that_is_refused_anyway(harness: Harness) -> None:
    before = harness.embedder.pictures.stats().num_fetches
    remote = PictureInput("https://pictures.invalid/x.png")
    for refused in (TextInput("abcdefgh"), PictureInput(b"no picture")):
        with pytest.raises(RequestError) as caught:
            harness.embed(remote, refused)
        assert caught.value.code in ("context_length_exceeded", "unsupported_image_format")
    assert harness.embedder.pictures.stats().num_fetches == before


def test_a_picture_that_nobody_waits_for_any_more_is_given_up_or_kept(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given up before its pixels are there; once the model reads them it is seen through, for the next one."""
    pixels = harness.embedder.pictures.pixels
    hold = pixels.hold

    async def run() -> None:
        embedder, process = harness.embedder, harness.process
        pool = asyncio.Event()

        async def hold_later(mm_hash: bytes) -> tuple[int, int]:
            await pool.wait()
            return await hold(mm_hash)

        monkeypatch.setattr(pixels, "hold", hold_later)
        process.open.clear()
        early = asyncio.ensure_future(embedder.embed([picture(10)]))
        await until(lambda: embedder._flights)
        (given_up,) = (flight.task for flight in embedder._flights.values())
        early.cancel()
        await until(given_up.cancelling)
        joined = asyncio.ensure_future(embedder.embed([picture(10)]))  # finds one that is being given up
        late, other = (asyncio.ensure_future(embedder.embed([picture(11)])) for _ in range(2))
        before = process.num_waiting
        pool.set()
        await until(lambda: process.num_waiting == before + 2)
        assert given_up.cancelled()
        late.cancel()
        other.cancel()
        await asyncio.gather(early, late, other, return_exceptions=True)
        assert all(task.cancelled() for task in (early, late, other))
        process.open.set()
        assert len(await joined) == 1
        await until(lambda: not embedder._flights)
        before = process.num_pictures
        await embedder.embed([picture(10), picture(11)])
        assert process.num_pictures == before

    harness.run(run)


def test_a_process_that_ends_fails_who_waits_and_is_replaced(harness: Harness) -> None:
    async def run() -> None:
        embedder, process = harness.embedder, harness.process
        await embedder.embed([picture(21)])
        process.open.clear()
        waiting = asyncio.ensure_future(embedder.embed([picture(20)]))
        await until(lambda: process.num_waiting > process.num_pictures)
        deaths = embedder.stats().num_process_deaths
        process.ended.set()
        with pytest.raises(EmbedderDeadError):
            await waiting
        await until(lambda: embedder._process is None)
        with pytest.raises(EmbedderDeadError):
            embedder.check_health()
        with pytest.raises(EmbedderDeadError):
            await embedder.embed([picture(21)])
        await until(lambda: embedder._process is not None)
        embedder.check_health()
        assert process.is_closed and harness.process is not process
        assert embedder.stats().num_process_deaths == deaths + 1
        await embedder.embed([picture(21)])
        assert harness.process.num_pictures == 1  # what another process made of it is forgotten

    harness.run(run)


def test_another_model_does_not_read_the_pixels_that_were_made_for_this_one(harness: Harness) -> None:
    async def run() -> None:
        embedder = harness.embedder
        ready, hold = embedder.ready, embedder.pictures.pixels.hold
        assert ready is not None

        async def hold_meanwhile(mm_hash: bytes) -> tuple[int, int]:
            place = await hold(mm_hash)
            embedder.ready = msgspec.structs.replace(ready, rules=CropRules(height=64, width=64))
            return place

        embedder.pictures.pixels.hold = hold_meanwhile  # type: ignore[method-assign]
        try:
            with pytest.raises(EmbedderDeadError, match="has changed"):
                await embedder.embed([picture(40)])
        finally:
            embedder.ready, embedder.pictures.pixels.hold = ready, hold  # type: ignore[method-assign]
        await embedder.embed([picture(40)])

    harness.run(run)


def test_whatever_keeps_a_process_from_starting_is_said_or_tried_again(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = harness.beside()

    async def fail(self: FakeProcess) -> None:
        raise RuntimeError("no more sockets")

    async def run() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(FakeProcess, "start", fail)
            await embedder.start()
            with pytest.raises(RuntimeError, match="no more sockets"):
                await embedder.wait_ready()
        await embedder.close()
        other = harness.beside()
        await other.start()
        await other.wait_ready()
        with monkeypatch.context() as patch:
            patch.setattr(FakeProcess, "start", fail)
            FakeProcess.started[-1].ended.set()
            await until(lambda: other.stats().num_process_deaths >= 2)
        await until(lambda: other._process is not None)
        await other.close()

    harness.run(run)


def test_the_cache_has_a_size(harness: Harness) -> None:
    embedder = harness.beside(cache_bytes=0)
    before = harness.embedder.pictures.stats()

    async def run() -> None:
        try:
            await embedder.start()
            await embedder.wait_ready()
            for _ in range(2):
                await embedder.embed([picture(30)])
        finally:
            await embedder.close()

    harness.run(run)
    stats, after = embedder.stats(), harness.embedder.pictures.stats()
    assert (stats.cache_hits, stats.num_images, stats.cache_capacity_bytes) == (0, 2, 0)
    assert (after.num_decodes - before.num_decodes, after.num_slab_hits - before.num_slab_hits) == (1, 1)


def test_requests_that_run_end_with_the_server(harness: Harness) -> None:
    embedder = harness.beside()

    async def run() -> None:
        await embedder.start()
        await embedder.wait_ready()
        process = FakeProcess.started[-1]
        process.open.clear()
        waiting = asyncio.ensure_future(embedder.embed([picture(31)]))
        await until(lambda: process.num_waiting)
        embedder.end_requests()
        with pytest.raises(ShuttingDownError):
            await waiting
        embedder.is_alive = False  # as when the pool has ended
        with pytest.raises(EmbedderDeadError):
            embedder.check_health()
        await embedder.close()
        assert process.is_closed and not embedder._flights

    harness.run(run)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"error": "--embedding-model a:b cannot be loaded: why"}, "cannot be loaded: why"),
     ({"rules": CropRules(height=5000, width=5000)}, "slab .* cannot hold two pictures")],
)  # fmt: skip
def test_a_model_that_cannot_be_served_is_said_at_the_start(
    harness: Harness, change: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in change.items():
        monkeypatch.setattr(FakeProcess, name, value)
    embedder = harness.beside()

    async def run() -> None:
        await embedder.start()
        try:
            with pytest.raises(ConfigError, match=words):
                await embedder.wait_ready()
        finally:
            await embedder.close()

    started = len(FakeProcess.started)
    harness.run(run)
    assert len(FakeProcess.started) == started + 1 and FakeProcess.started.pop().is_closed


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EmbeddingSettings(model="ViT-B-32:openai").name == "ViT-B-32"
    assert EmbeddingSettings(model=f"{Path('a') / 'tiny.json'}:w.pt").name == "tiny"
    assert EmbeddingSettings(model="ViT-B-32:openai", served_name="clip").name == "clip"
    for model in ("ViT-B-32", "ViT-B-32:", ":openai"):
        with pytest.raises(ConfigError, match="NAME:WEIGHTS"):
            EmbeddingSettings(model=model)
    with pytest.raises(ConfigError, match="at least 0"):
        EmbeddingSettings(model="a:b", cache_bytes=-1)
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"^--embedding-model needs open_clip: .*pip install 'mmv1\[clip\]'"):
        EmbeddingSettings(model="a:b")
