"""How a request is answered: by an engine in this process, or by a server. Either takes OpenAI's JSON body, and gives the status
and the body that `mmv1 serve` gives.

What is a request's own fault is an answer with its 4xx. When nothing can be answered any more EngineDeadError is raised: the
engine died, or the server has for minutes been unreachable or taken nothing (status 429, 502, 503).
"""

from __future__ import annotations

import asyncio
import os
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import httpx
import msgspec
import pybase64
from prometheus_client.parser import text_string_to_metric_families

from mmv1.api.chat import ChatAnswer, SamplingDefaults
from mmv1.api.completions import CompletionAnswer, decode_completion_request
from mmv1.api.metrics import Metrics
from mmv1.api.protocol import check_body_size, check_model, decode_chat_request, error_of
from mmv1.config import EngineArgs, resolve
from mmv1.errors import ConfigError, EngineDeadError, ImageError, RequestError
from mmv1.log import logger
from mmv1.preprocess.header import probe_header

if TYPE_CHECKING:
    from mmv1.engine.async_llm import AsyncLLM

CHAT = "/v1/chat/completions"
_COMPLETIONS = "/v1/completions"

_MAX_OPEN_AT_SERVER = 256  # what `mmv1 serve` has in one step unless it is told otherwise
_TIMEOUT = httpx.Timeout(600.0, connect=10.0, pool=None)  # a request may wait in the server's queue for long
_KEEP_ALIVE_S = 60.0  # less than what servers keep idle connections for
_PATIENCE_S = 300.0  # with a server that is starting, restarting or full
_LONGEST_PAUSE_S = 15.0
_LONGEST_RETRY_AFTER_S = 60.0
_MAX_FAILURES = 4  # of one request, while the server answers others
_UNAVAILABLE = (429, 502, 503)


class Picture:
    """An encoded picture (a JPEG file's bytes, say) in the place of its "url". JSON has nothing that becomes one: only the
    program itself can make it."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data


class Answer(NamedTuple):
    """`body`: OpenAI's chat completion, say, or its error object. `request_id`: the server's x-request-id."""

    status_code: int
    body: dict[str, Any]
    request_id: str


class Load(NamedTuple):
    """What the engine is doing. Counts since its start, but for the first two; `stage_seconds`: what pictures have spent in each
    stage of preprocessing (preprocess/timings.py); `engine_seconds`: the device at "encode", "prefill" and "decode"."""

    num_running: int
    num_waiting: int
    num_images_encoded: int
    num_prompt_tokens: int
    num_generation_tokens: int
    stage_seconds: Mapping[str, float]
    engine_seconds: Mapping[str, float]


class Backend(Protocol):
    """`model_name`: for the field "model" of requests. `max_open`: so many requests at once keep the engine busy; more wait."""

    model_name: str
    max_open: int

    async def ask(self, body: Mapping[str, Any], path: str = CHAT) -> Answer:
        """The answer to one request to the API's `path`, whole: `stream` is refused. In a chat a picture's "url" may be a
        Picture, which is the cheapest way for either. Raises EngineDeadError."""

    async def load(self) -> Load | None:
        """None: the server does not say."""

    async def close(self) -> None: ...


@asynccontextmanager
async def open_backend(url: str | None, args: EngineArgs) -> AsyncIterator[Backend]:
    """A server's, or without `url` an engine started here. Raises ConfigError, EngineDeadError."""
    backend: Backend
    if url is None:
        backend = await LocalBackend.start(args)
    else:
        others = [name for name in args.__dataclass_fields__ if getattr(args, name) != getattr(EngineArgs(), name)]
        if flags := [f"--{name.replace('_', '-')}" for name in others if name != "model"]:
            raise ConfigError(f"{', '.join(flags)} cannot be given with --url: it is for an engine that is started here")
        backend = await ServerBackend.connect(url, args.model)
    try:
        yield backend
    finally:
        await backend.close()


class LocalBackend:
    """An engine of its own, over a started AsyncLLM."""

    def __init__(self, llm: AsyncLLM) -> None:
        """Raises ConfigError when generation_config.json cannot be used."""
        self.model_name = llm.config.model.served_model_name
        self.max_open = 2 * llm.config.scheduler.max_num_seqs
        self._llm = llm
        self._defaults = SamplingDefaults.of_model(llm.config.model.path)
        self._metrics = Metrics(self.model_name, llm.stats, llm.preprocessor.stats, llm.preprocessor.timings)
        self._room = asyncio.Semaphore(self.max_open)

    @classmethod
    async def start(cls, args: EngineArgs) -> LocalBackend:
        """Raises ConfigError, EngineDeadError."""
        from mmv1.engine.async_llm import AsyncLLM

        llm = AsyncLLM(resolve(args))
        await llm.start()
        try:
            return cls(llm)
        except BaseException:
            await llm.close()
            raise

    async def ask(self, body: Mapping[str, Any], path: str = CHAT) -> Answer:
        request_id = uuid.uuid4().hex
        async with self._room:
            try:
                return Answer(200, await self._complete(body, path), request_id)
            except EngineDeadError:
                raise
            except Exception as error:
                if not isinstance(error, RequestError):
                    logger.exception("Request %s failed", request_id)
                return _refusal(error, request_id)

    async def _complete(self, body: Mapping[str, Any], path: str) -> dict[str, Any]:
        """Raises what the server makes error answers of."""
        pictures: dict[str, bytes] = {}

        def set_aside(picture: Picture) -> str:
            url = f"picture:{len(pictures)}"
            pictures[url] = picture.data
            return url

        answer: ChatAnswer | CompletionAnswer
        content = _encode(body, set_aside)
        if path == CHAT:
            request = decode_chat_request(content)
            check_model(request.model, self.model_name)
            answer = ChatAnswer(self._llm, request, self._defaults, self._metrics, pictures)
        elif path == _COMPLETIONS:
            completion_request = decode_completion_request(content)
            check_model(completion_request.model, self.model_name)
            answer = CompletionAnswer(self._llm, completion_request, self._defaults, self._metrics)
        else:
            message = f"{path} is not answered by an engine that is started here: name a server that answers it with --url"
            raise RequestError(message, code="no_such_model", status=404)
        async with aclosing(answer.full()) as chunks:
            completion: dict[str, Any] = msgspec.json.decode(await anext(chunks))
        return completion

    async def load(self) -> Load | None:
        stats, timings = self._llm.stats(), self._llm.preprocessor.timings
        return Load(
            stats.num_running,
            stats.num_waiting,
            stats.num_images_encoded,
            stats.num_prompt_tokens_computed,
            stats.num_generation_tokens,
            {stage: histogram.sum_s for stage, histogram in timings.histograms.items()},
            {"encode": stats.encode_seconds, "prefill": stats.prefill_seconds, "decode": stats.decode_seconds},
        )

    async def close(self) -> None:
        await self._llm.close()


class ServerBackend:
    """A server with OpenAI's API. What passes by itself (no connection, 429, 502, 503) is tried again for as long as others are
    answered or five minutes have not gone by; other 5xx and time-outs, three times."""

    max_open = _MAX_OPEN_AT_SERVER

    def __init__(self, client: httpx.AsyncClient, model_name: str, patience_s: float = _PATIENCE_S) -> None:
        self.model_name = model_name
        self._client = client
        self._patience_s = patience_s
        self._last_answer = time.monotonic()

    @classmethod
    async def connect(cls, url: str, model: str = "", patience_s: float = _PATIENCE_S) -> ServerBackend:
        """A server at `url`, with or without /v1 at its end, once it answers. The environment's OPENAI_API_KEY is sent, if there
        is one. `model`: which of its models; "": its first. Raises ConfigError, also when nothing answers for `patience_s`."""
        key = os.environ.get("OPENAI_API_KEY")
        client = httpx.AsyncClient(
            base_url=_checked_url(url.rstrip("/").removesuffix("/v1")),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=_TIMEOUT,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP_ALIVE_S),
        )
        try:
            names = await _model_names(client, url, patience_s)
            if model and model not in names:
                raise ConfigError(f"the server at {url} has no model '{model}', but {', '.join(names)}")
        except BaseException:
            await client.aclose()
            raise
        return cls(client, model or names[0], patience_s)

    async def ask(self, body: Mapping[str, Any], path: str = CHAT) -> Answer:
        try:
            content = _encode(body, _data_url)
        except RequestError as error:
            return _refusal(error, "")
        first_try = time.monotonic()
        num_failures = num_tries = 0
        while True:
            reply = await self._post(path, content)
            if reply.answer is not None and not reply.may_pass:
                self._last_answer = time.monotonic()
                return reply.answer
            if reply.answer is None or reply.answer.status_code in _UNAVAILABLE:
                if time.monotonic() - max(first_try, self._last_answer) > self._patience_s:
                    raise EngineDeadError(f"{self._client.base_url} has not answered for {self._patience_s:.0f} s: {reply.fault}")
            else:
                num_failures += 1
                if num_failures == _MAX_FAILURES:
                    return reply.answer
            await asyncio.sleep(reply.retry_after_s or _pause(num_tries))
            num_tries += 1

    async def _post(self, path: str, content: bytes) -> _Reply:
        try:
            headers = {"Content-Type": "application/json"}
            response = await self._client.post(path, content=content, headers=headers)
        except httpx.ReadTimeout:
            message = f"no answer within {_TIMEOUT.read:.0f} s"
            return _Reply(Answer(504, _error_body(message, "timeout"), ""), message, may_pass=True)
        except httpx.RequestError as error:  # also a body that cannot be decoded
            return _Reply(None, _words_of(error), may_pass=True)
        answer = _answer_in(response)
        may_pass = answer.status_code == 429 or answer.status_code >= 500
        if response.headers.get("x-should-retry") == "false":
            may_pass = False
        return _Reply(answer, f"status {answer.status_code}", may_pass, _retry_after_s(response))

    async def load(self) -> Load | None:
        try:
            response = await self._client.get("/metrics", timeout=5.0)
            return _read_load(response.text) if response.status_code == 200 else None
        except (httpx.RequestError, ValueError):
            return None

    async def close(self) -> None:
        await self._client.aclose()


class _Reply(NamedTuple):
    """`answer` None: there was none. `may_pass`: the same request may succeed later, `retry_after_s` from now at the soonest."""

    answer: Answer | None
    fault: str
    may_pass: bool
    retry_after_s: float = 0.0


def _checked_url(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > 65535:
        raise ConfigError(f"--url {url} must have the form http://host:port")
    return parsed


async def _model_names(client: httpx.AsyncClient, url: str, patience_s: float) -> list[str]:
    """The server's models, once it is there. Raises ConfigError."""
    deadline = time.monotonic() + patience_s
    num_tries = 0
    while True:
        try:
            response = await client.get("/v1/models", timeout=10.0)
            status, fault = response.status_code, f"status {response.status_code}"
        except httpx.RequestError as error:
            status, fault = 503, _words_of(error)
        if status in (401, 403):
            raise ConfigError(f"the server at {url} refuses us (status {status}): set OPENAI_API_KEY to a key that it knows")
        if status < 500 and status != 429:
            names = _names_in(_json_object(response.content) or {})
            if status != 200 or not names:
                raise ConfigError(f"what answers at {url} is no server with OpenAI's API: GET /v1/models gave status {status}")
            return names
        if time.monotonic() > deadline:
            raise ConfigError(f"the server at {url} does not answer ({fault}); start it, or give another --url")
        if num_tries == 0:
            logger.info("Waiting for the server at %s, at most %.0f s (%s)", url, patience_s, fault)
        await asyncio.sleep(_pause(num_tries))
        num_tries += 1


def _names_in(models: Mapping[str, Any]) -> list[str]:
    listed = models.get("data")
    return [str(card["id"]) for card in listed if isinstance(card, dict) and "id" in card] if isinstance(listed, list) else []


def _pause(num_tries: int) -> float:
    """Twice as long each time, and at random, so that many requests do not come back together."""
    return min(0.5 * 2 ** min(num_tries, 10), _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)


def _read_load(metrics: str) -> Load:
    """From the text of /metrics. Raises ValueError."""
    totals: dict[str, float] = {}
    stages: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            name = sample.name.rpartition(":")[2]
            totals[name] = totals.get(name, 0.0) + sample.value
            if name == "preprocess_seconds_sum":
                stages[sample.labels["stage"]] = sample.value

    def count(name: str) -> int:
        return int(totals.get(name, 0.0))

    return Load(
        count("num_requests_running"),
        count("num_requests_waiting"),
        count("images_encoded_total"),
        count("prompt_tokens_computed_total"),
        count("generation_tokens_total"),
        stages,
        {stage: totals.get(f"{stage}_seconds_total", 0.0) for stage in ("encode", "prefill", "decode")},
    )


def _retry_after_s(response: httpx.Response) -> float:
    """What the server asks for, within bounds; 0 when it does not say, or says it as a date."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return 0.0
    return min(seconds, _LONGEST_RETRY_AFTER_S) if seconds > 0 else 0.0


def _words_of(error: httpx.RequestError) -> str:
    return str(error) or type(error).__name__


def _json_object(content: bytes) -> dict[str, Any] | None:
    try:
        value = msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _answer_in(response: httpx.Response) -> Answer:
    """What was sent; where it is no JSON object (a proxy's page), an error object with its beginning."""
    request_id = response.headers.get("x-request-id", "")
    body = _json_object(response.content)
    if body is None:
        status_code = response.status_code if response.status_code >= 400 else 502
        return Answer(status_code, _error_body(response.text[:200], "not_json"), request_id)
    return Answer(response.status_code, body, request_id)


def _refusal(error: Exception, request_id: str) -> Answer:
    status_code, body = error_of(error)
    return Answer(status_code, msgspec.to_builtins(body), request_id)


def _error_body(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


def _encode(body: Mapping[str, Any], url_of: Callable[[Any], str]) -> bytes:
    """The body as JSON, with a URL for every Picture. Raises RequestError."""
    if body.get("stream"):
        raise RequestError("stream is not possible here: the answer comes whole", code="unsupported_parameter", param="stream")
    try:
        encoded = msgspec.json.encode(body, enc_hook=url_of)
    except RecursionError:
        raise RequestError("The body is nested too deeply", code="invalid_json") from None
    check_body_size(len(encoded))
    return encoded


def _data_url(picture: Picture) -> str:
    try:
        media_type = probe_header(picture.data, ("BMP", "TIFF")).format.lower()
    except ImageError:  # the server will say so
        media_type = "unknown"
    return f"data:image/{media_type};base64,{pybase64.b64encode_as_string(picture.data)}"
