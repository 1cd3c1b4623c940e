"""Both backends: the same answers and errors; what a server is asked again, for how long; what pictures become on the way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from mmv1.api.protocol import MAX_BODY_BYTES
from mmv1.batch import backend as backend_module
from mmv1.batch.backend import Answer, Backend, LocalBackend, Picture, ServerBackend, open_backend
from mmv1.config import EngineArgs
from mmv1.errors import ConfigError, EngineDeadError, ImageError
from mmv1.preprocess.prompt import ImagePart
from tests.api.fake_llm import MODEL, PIECES, FakeLLM, body, client_of, make_model_dir
from tests.batch.stub_server import StubServer, stub_server
from tests.pictures import make_image


@pytest.fixture
def llm(tmp_path: Path) -> FakeLLM:
    return FakeLLM(make_model_dir(tmp_path))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "_pause", lambda num_tries: 0.001)


def server_of(llm: FakeLLM, patience_s: float = 5.0) -> ServerBackend:
    return ServerBackend(client_of(llm), MODEL, patience_s)


def answering(handler: Callable[[httpx.Request], httpx.Response], patience_s: float = 5.0) -> ServerBackend:
    client = httpx.AsyncClient(transport=httpx.MockTransport(handler), base_url="http://test")
    return ServerBackend(client, MODEL, patience_s)


def ask(backend: Backend, *bodies: dict[str, Any]) -> list[Answer]:
    async def ask_all() -> list[Answer]:
        return await asyncio.gather(*(backend.ask(each) for each in bodies))

    return asyncio.run(ask_all())


def without_ids(answer: Answer) -> tuple[int, dict[str, Any]]:
    return answer.status_code, {name: value for name, value in answer.body.items() if name not in ("id", "created")}


def about(url: Any, **image_url: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url, **image_url}}
    return body(messages=[{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}])


# ---- the same either way ----

NESTED: Any = []
for _ in range(5000):
    NESTED = [NESTED]
BODIES = {
    "text": (200, body()),
    "several answers": (200, body(n=3, logprobs=True, top_logprobs=2, max_tokens=4)),
    "picture": (200, about(Picture(make_image(40, 30)))),
    "other model": (404, body(model="other")),
    "no model": (400, {"messages": [{"role": "user", "content": "hi"}]}),
    "no messages": (400, {"model": MODEL}),
    "wrong type": (400, body(temperature="hot")),
    "out of range": (400, body(n=99)),
    "unknown": (400, body(temprature=1)),
    "not built": (400, body(tools=[{"type": "function"}])),
    "stream": (400, body(stream=True)),
    "deep": (400, body(metadata=NESTED)),
    "large": (413, body(user="x" * MAX_BODY_BYTES)),
    "stop token": (400, body(stop_token_ids=[100])),
}


@pytest.mark.parametrize("name", BODIES)
def test_both_backends_give_the_same(name: str, llm: FakeLLM) -> None:
    status, request = BODIES[name]
    (local,), (remote,) = ask(LocalBackend(llm), request), ask(server_of(llm), request)  # type: ignore[arg-type]
    assert local.status_code == status
    assert without_ids(local) == without_ids(remote)
    assert ("error" in local.body) == (status != 200)
    if status == 200:
        assert local.body["choices"][0]["message"]["content"] == "".join(PIECES)


COMPLETION = {"model": MODEL, "prompt": "hi"}


@pytest.mark.parametrize(
    ("status", "request_"),
    [(200, COMPLETION), (200, COMPLETION | {"prompt": ["a", "b"], "n": 2}), (404, COMPLETION | {"model": "x"}),
     (400, {"model": MODEL}), (400, COMPLETION | {"stream": True})],
)  # fmt: skip
def test_completions_too(status: int, request_: dict[str, Any], llm: FakeLLM) -> None:
    backends = LocalBackend(llm), server_of(llm)  # type: ignore[arg-type]
    local, remote = (asyncio.run(backend.ask(request_, "/v1/completions")) for backend in backends)
    assert local.status_code == status and without_ids(local) == without_ids(remote)
    if status == 200:
        assert {choice["text"] for choice in local.body["choices"]} == {"".join(PIECES)}


def test_an_engine_makes_no_embeddings_and_says_who_may(llm: FakeLLM) -> None:
    answer = asyncio.run(LocalBackend(llm).ask({"model": MODEL, "input": "hi"}, "/v1/embeddings"))  # type: ignore[arg-type]
    assert answer.status_code == 404 and "name a server that answers it with --url" in answer.body["error"]["message"]


@pytest.mark.parametrize("error", [ImageError("the image is damaged"), RuntimeError("a bug of ours")], ids=["fault", "bug"])
def test_what_fails_on_the_way_is_the_same_answer(error: Exception, llm: FakeLLM) -> None:
    llm.fail_before, llm.error = 2, error
    (local,), (remote,) = ask(LocalBackend(llm), body()), ask(server_of(llm), body())  # type: ignore[arg-type]
    assert local.status_code == (400 if isinstance(error, ImageError) else 500)
    assert without_ids(local) == without_ids(remote) and "bug" not in str(local.body)


def test_an_engines_death_is_no_answer(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "_LONGEST_RETRY_AFTER_S", 0.01)
    llm.fail_before = 0
    for backend in (LocalBackend(llm), server_of(llm, patience_s=0.05)):  # type: ignore[arg-type]
        with pytest.raises(EngineDeadError):
            ask(backend, body())


def test_both_say_what_the_engine_does(llm: FakeLLM) -> None:
    llm.scheduler_stats = msgspec.structs.replace(llm.scheduler_stats, num_running=3, num_waiting=2, num_images_encoded=4)
    llm.preprocessor.timings.observe("decode", 1.5)
    local, remote = LocalBackend(llm), server_of(llm)  # type: ignore[arg-type]
    load = asyncio.run(local.load())
    assert load is not None and load == asyncio.run(remote.load())
    assert (load.num_running, load.num_waiting, load.num_images_encoded, load.num_generation_tokens) == (3, 2, 4, 7)
    assert load.stage_seconds["decode"] == 1.5 and load.stage_seconds["fetch"] == 0.0


def test_a_server_that_does_not_say_has_no_load() -> None:
    assert asyncio.run(answering(lambda _: httpx.Response(404)).load()) is None
    assert asyncio.run(answering(lambda _: httpx.Response(200, text="<html>")).load()) is None


# ---- in this process ----


def test_pictures_stay_bytes_in_this_process_and_are_urls_for_a_server(llm: FakeLLM) -> None:
    for file_format, media_type in (("JPEG", "image/jpeg"), ("PNG", "image/png"), ("WEBP", "image/webp")):
        data = make_image(40, 30, format=file_format)
        ask(LocalBackend(llm), about(Picture(data), detail="low"))  # type: ignore[arg-type]
        ask(server_of(llm), about(Picture(data), detail="low"))
        (local, *_), (remote, *_) = (prompt.messages[0].content for prompt, _, _ in llm.asked[-2:])
        assert isinstance(local, ImagePart) and isinstance(remote, ImagePart)
        assert local.source == data and local.settings == remote.settings
        assert str(remote.source).startswith(f"data:{media_type};base64,")


@pytest.mark.parametrize("url", ["picture:0", "/etc/hostname", "file:///etc/hostname", "bytes"])
def test_no_word_of_a_request_becomes_bytes_or_a_path(url: str, llm: FakeLLM) -> None:
    ask(LocalBackend(llm), about(url))  # type: ignore[arg-type]
    part = llm.asked[-1][0].messages[0].content[0]
    assert isinstance(part, ImagePart) and part.source == url and type(part.source) is str


def test_the_engine_has_no_more_open_than_two_steps_full(llm: FakeLLM) -> None:
    scheduler = llm.config.scheduler
    object.__setattr__(scheduler, "max_num_seqs", 2)
    llm.pause_before = 1

    async def test() -> None:
        local = LocalBackend(llm)  # type: ignore[arg-type]
        assert local.max_open == 4
        answers = asyncio.gather(*(local.ask(body()) for _ in range(10)))
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(llm.running) == 4
        llm.resume.set()
        assert [answer.status_code for answer in await answers] == [200] * 10

    asyncio.run(test())


# ---- with a server ----


class Script:
    """A server that gives these answers one after the other, the last of them for ever."""

    def __init__(self, *replies: httpx.Response | Exception) -> None:
        self._replies = replies
        self.num_asked = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        reply = self._replies[min(self.num_asked, len(self._replies) - 1)]
        self.num_asked += 1
        if isinstance(reply, Exception):
            raise reply
        return reply


GOOD = httpx.Response(200, json={"id": "1"}, headers={"x-request-id": "abc"})


@pytest.mark.parametrize(
    "fault",
    [
        httpx.ConnectError("refused"), httpx.ReadError("reset"), httpx.RemoteProtocolError("closed"), httpx.ReadTimeout("late"),
        httpx.DecodingError("no gzip"),
        httpx.Response(429), httpx.Response(500), httpx.Response(502, text="<html>"), httpx.Response(503), httpx.Response(504),
    ],
    ids=lambda fault: type(fault).__name__ if isinstance(fault, Exception) else str(fault.status_code),
)  # fmt: skip
def test_what_passes_is_tried_again(fault: httpx.Response | Exception) -> None:
    script = Script(fault, fault, GOOD)
    assert ask(answering(script), body()) == [Answer(200, {"id": "1"}, "abc")]
    assert script.num_asked == 3


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (httpx.Response(400, json={"error": {"code": "bad"}}), 400),
        (httpx.Response(404, text="<html>"), 404),
        (httpx.Response(500, json={"error": {"code": "bug"}}, headers={"x-should-retry": "false"}), 500),
    ],
)
def test_what_does_not_pass_is_an_answer_at_once(reply: httpx.Response, status: int) -> None:
    script = Script(reply)
    (answer,) = ask(answering(script), body())
    assert (answer.status_code, script.num_asked) == (status, 1) and "error" in answer.body


@pytest.mark.parametrize(("reply", "status"), [(httpx.Response(500), 500), (httpx.ReadTimeout("late"), 504)])
def test_a_request_that_always_fails_is_given_up(reply: httpx.Response | Exception, status: int) -> None:
    script = Script(reply)
    (answer,) = ask(answering(script), body())
    assert (answer.status_code, script.num_asked) == (status, 4) and "error" in answer.body


def test_a_page_that_says_200_is_no_answer() -> None:
    with pytest.raises(EngineDeadError, match="status 502"):
        ask(answering(Script(httpx.Response(200, text="<html>log in")), 0.05), body())


@pytest.mark.parametrize("reply", [httpx.ConnectError("refused"), httpx.Response(429), httpx.Response(503)])
def test_a_server_that_is_gone_ends_the_run_after_its_time(reply: httpx.Response | Exception) -> None:
    script = Script(reply)
    with pytest.raises(EngineDeadError, match=r"has not answered for 0 s: (refused|status)"):
        ask(answering(script, patience_s=0.1), body())
    assert script.num_asked > 5


def test_while_others_are_answered_nobody_is_given_up() -> None:
    """A server that takes one of many has not gone, however long the others wait."""
    turns = iter(range(10**9))

    def sometimes(request: httpx.Request) -> httpx.Response:
        return GOOD if next(turns) % 40 == 39 else httpx.Response(429)

    answers = ask(answering(sometimes, patience_s=0.4), *[body()] * 60)
    assert [answer.status_code for answer in answers] == [200] * 60


def test_retry_after_is_obeyed_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(backend_module.asyncio, "sleep", sleep)
    said = ["7", "0.5", "1e9", "nan", "-3", "Wed, 21 Oct 2026 07:28:00 GMT"]
    script = Script(*(httpx.Response(429, headers={"retry-after": words}) for words in said), GOOD)
    assert ask(answering(script), body())[0].status_code == 200
    assert slept == [7.0, 0.5, 60.0, 0.001, 0.001, 0.001]


def test_pauses_grow_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pauses = [backend_module._pause(num_tries) for num_tries in (0, 1, 2, 3, 4, 5, 50, 5000)]
    assert all(0.5 * most <= pause <= most for pause, most in zip(pauses, (0.5, 1, 2, 4, 8, 15, 15, 15), strict=True))


# ---- the way to a server ----


def connect(url: str, model: str = "", patience_s: float = 5.0) -> ServerBackend:
    async def connect_and_close() -> ServerBackend:
        backend = await ServerBackend.connect(url, model, patience_s)
        await backend.close()
        return backend

    return asyncio.run(connect_and_close())


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_a_url_may_end_as_people_write_it(ending: str) -> None:
    with stub_server() as stub:
        assert connect(stub.url + ending).model_name == "stub"


def test_connections_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key-1")

    async def ask_in_turns(url: str) -> None:
        async with open_backend(url, EngineArgs()) as backend:
            for _ in range(20):
                answers = await asyncio.gather(*(backend.ask(body(model="stub")) for _ in range(4)))
                assert {answer.status_code for answer in answers} == {200}

    with stub_server() as stub:
        asyncio.run(ask_in_turns(stub.url))
        assert stub.asked.total() == 80 and stub.num_connections <= 5
        assert {headers["Authorization"] for headers in stub.headers} == {"Bearer key-1"}


def test_a_server_that_is_starting_is_waited_for() -> None:
    stub = StubServer()  # bound, not listening: refused
    connected = threading.Event()
    waiting = threading.Thread(target=lambda: (connect(stub.url, patience_s=20), connected.set()))
    waiting.start()
    assert not connected.wait(0.3)
    stub.listen()
    assert connected.wait(10)
    stub.close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("127.0.0.1:8000", "must have the form http://host:port"),
        ("ftp://127.0.0.1", "must have the form http://host:port"),
        ("http://:80", "must have the form http://host:port"),
        ("http://127.0.0.1:99999", "must have the form http://host:port"),
        ("http://127.0.0.1:1", "does not answer"),
    ],
)
def test_a_url_that_cannot_be_used_is_said(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        connect(url, patience_s=0.05)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (httpx.Response(401), "OPENAI_API_KEY"),
        (httpx.Response(404), "no server with OpenAI's API"),
        (httpx.Response(200, text="<html>"), "no server with OpenAI's API"),
        (httpx.Response(200, json={"data": []}), "no server with OpenAI's API"),
        (httpx.Response(503), "does not answer"),
    ],
)
def test_what_is_no_such_server_is_said(reply: httpx.Response, words: str) -> None:
    client = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: reply), base_url="http://test")
    with pytest.raises(ConfigError, match=words):
        asyncio.run(backend_module._model_names(client, "http://test", 0.05))


def test_settings_that_a_server_would_not_hear_of_are_refused() -> None:
    async def opened(**args: Any) -> None:
        async with open_backend(stub.url, EngineArgs(**args)) as backend:
            assert backend.model_name == "stub"

    with stub_server() as stub:
        asyncio.run(opened())
        asyncio.run(opened(model="stub"))
        with pytest.raises(ConfigError, match="no model 'other', but stub"):
            asyncio.run(opened(model="other"))
        with pytest.raises(ConfigError, match="--max-num-seqs, --max-pixels cannot be given with --url"):
            asyncio.run(opened(max_pixels=1000, max_num_seqs=3))
