"""LLM: the engine for scripts. `chat` and `generate` take everything at once and return when all of it is answered.

    from mmv1 import LLM, SamplingParams

    if __name__ == "__main__":
        with LLM("path/to/model") as llm:
            content = [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is this?"}]
            (answer,) = llm.chat([{"role": "user", "content": content}])
            print(answer.outputs[0].text)

It is the server's AsyncLLM with its event loop on a thread of its own, so pictures are prepared while others are generated
for, and only as many requests are open at a time as keep the engine busy.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import threading
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from PIL import Image

from mmv1.config import EngineArgs, resolve
from mmv1.engine.async_llm import AsyncLLM, ChatPrompt, Prompt, RawPrompt, merge_outputs
from mmv1.engine.output_processor import CompletionOutput, RequestOutput
from mmv1.errors import MMV1Error, RequestError
from mmv1.preprocess.image_settings import NOTHING_SAID, ImageSettings, picture_settings, processor_settings
from mmv1.preprocess.media import ImageSource
from mmv1.preprocess.prompt import ImagePart, Message, TextPart
from mmv1.types import SamplingParams, SchedulerStats

T = TypeVar("T")
ChatMessage = Mapping[str, Any]

_URL_SCHEMES = ("http://", "https://", "data:")


class LLM:
    """Settings are EngineArgs' fields. A context manager; `close` (or the end of the script) ends its processes."""

    def __init__(self, model: str | Path = "", **engine_args: Any) -> None:
        """Starts the engine, on the demo model if none is named. Raises ConfigError, EngineDeadError."""
        config = resolve(EngineArgs(model=str(model), **engine_args))
        self._max_open = 2 * config.scheduler.max_num_seqs
        self._seed = config.model.seed
        self._num_prompts = 0
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="mmv1-llm", daemon=True)
        thread.start()
        try:
            self._engine: AsyncLLM = self._run(_start(config))
        except BaseException:
            _stop_loop(self._loop, thread)
            raise
        self._finalizer = weakref.finalize(self, _close, self._engine, self._loop, thread)

    def chat(
        self,
        messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, in order. `messages` are OpenAI's, and content parts may also be
        {"type": "image", "image": PIL image, path, bytes or URL}. A picture's size is set with "detail", "min_pixels" and
        "max_pixels" beside it, and with `mm_processor_kwargs` (min_pixels, max_pixels, or transformers' size) for all that do
        not say otherwise. `chat_template_kwargs`: values of the chat template's own variables. Raises RequestError for the first
        one at fault."""
        if messages and isinstance(messages[0], Mapping):
            conversations: Sequence[Any] = [messages]
        else:
            conversations = messages
        settings = processor_settings(mm_processor_kwargs)
        prompts = [ChatPrompt(_conversation(each), template_settings=chat_template_kwargs or {}) for each in conversations]
        return self._answer([(prompt, settings) for prompt in prompts], sampling_params)

    def generate(
        self,
        prompts: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue raw prompts: text, or {"prompt": text} or {"prompt_token_ids": ids}, with {"multi_modal_data": {"image": one
        or a list}} for the pictures that its placeholders stand for, and {"mm_processor_kwargs": {...}} as in `chat`."""
        listed = [prompts] if isinstance(prompts, (str, Mapping)) else prompts
        return self._answer([_raw_prompt(prompt) for prompt in listed], sampling_params)

    def _answer(
        self,
        prompts: Sequence[tuple[Prompt, ImageSettings]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[RequestOutput]:
        if isinstance(sampling_params, SamplingParams) or sampling_params is None:
            params = [sampling_params or SamplingParams()] * len(prompts)
        else:
            params = list(sampling_params)
        if len(params) != len(prompts):
            raise ValueError(f"{len(params)} sampling params for {len(prompts)} prompts")
        seeded = [self._with_seed(each) for each in params]
        return self._run(_answer_all(self._engine, prompts, seeded, self._max_open))

    def _with_seed(self, params: SamplingParams) -> SamplingParams:
        """The same script gives the same answers: a request without a seed gets one from the engine's and its own number."""
        self._num_prompts += 1
        if params.seed is not None:
            return params
        digest = hashlib.blake2b(f"{self._seed}/{self._num_prompts}".encode(), digest_size=8).digest()
        return msgspec.structs.replace(params, seed=int.from_bytes(digest, "little") >> 1)

    def stats(self) -> SchedulerStats:
        """The engine's counters as of now."""
        return self._run(self._engine.refresh_stats())

    @property
    def engine(self) -> AsyncLLM:
        """The AsyncLLM underneath; its methods belong to its own event loop."""
        return self._engine

    def close(self) -> None:
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except (KeyboardInterrupt, SystemExit):
            future.cancel()
            raise


async def _start(config: Any) -> AsyncLLM:
    engine = AsyncLLM(config)
    await engine.start()
    return engine


def _stop_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=10)
    if not thread.is_alive():
        loop.close()


def _close(engine: AsyncLLM, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    closing = asyncio.run_coroutine_threadsafe(engine.close(), loop)
    try:
        closing.result(timeout=20)
    except (concurrent.futures.TimeoutError, MMV1Error):
        pass
    _stop_loop(loop, thread)


async def _answer_all(
    engine: AsyncLLM, prompts: Sequence[tuple[Prompt, ImageSettings]], params: Sequence[SamplingParams], max_open: int
) -> list[RequestOutput]:
    """All answers, in the order of the prompts; the first failure ends the others."""
    room = asyncio.Semaphore(max_open)

    async def answer(prompt: tuple[Prompt, ImageSettings], sampling_params: SamplingParams) -> RequestOutput:
        async with room:
            return await _complete(engine, *prompt, sampling_params)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer(*each)) for each in zip(prompts, params, strict=True)]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def _complete(
    engine: AsyncLLM, prompt: Prompt, image_settings: ImageSettings, sampling_params: SamplingParams
) -> RequestOutput:
    parts: dict[int, list[CompletionOutput]] = {}
    last: RequestOutput | None = None
    num_cached_tokens = 0
    async for last in engine.generate(prompt, sampling_params, image_settings=image_settings):
        num_cached_tokens = max(num_cached_tokens, last.num_cached_tokens)
        for output in last.outputs:
            parts.setdefault(output.index, []).append(output)
    assert last is not None
    return RequestOutput(
        last.request_id,
        [merge_outputs(parts[index]) for index in sorted(parts)],
        last.num_prompt_tokens,
        num_cached_tokens,
        finished=True,
        prompt_token_ids=last.prompt_token_ids,
        num_image_tokens=last.num_image_tokens,
    )


def _conversation(messages: Sequence[ChatMessage]) -> list[Message]:
    return [
        Message(_field(message, "role", str), _content(_field(message, "content", (str, list, tuple)), f"messages[{i}].content"))
        for i, message in enumerate(messages)
    ]


def _content(content: str | Sequence[Mapping[str, Any]], place: str) -> str | list[TextPart | ImagePart]:
    return content if isinstance(content, str) else [_part(part, f"{place}[{j}]") for j, part in enumerate(content)]


def _part(part: Mapping[str, Any], place: str) -> TextPart | ImagePart:
    kind = _field(part, "type", str)
    if kind == "text":
        return TextPart(_field(part, "text", str))
    if kind == "image_url":
        value = part.get("image_url")
        return _picture(value, "url", f"{place}.image_url") if isinstance(value, Mapping) else ImagePart(_source(value))
    if kind == "image":
        return _picture(part, "image", place)
    raise RequestError(f"a content part has the unknown type '{kind}'", param="messages")


def _picture(part: Mapping[str, Any], source: str, place: str) -> ImagePart:
    """The picture under the key `source`, and what else is said there of it."""
    said = {name: value for name, value in part.items() if name not in ("type", source) and value is not None}
    return ImagePart(_source(part.get(source)), picture_settings(said, place))


def _source(value: Any) -> ImageSource:
    """A str is a URL if it begins like one, else a path."""
    if isinstance(value, str):
        return value if value.lower().startswith(_URL_SCHEMES) else Path(value)
    if isinstance(value, (bytes, Path, Image.Image)):
        return value
    raise RequestError(f"an image is given as {type(value).__name__}: give a PIL image, a path, bytes or a URL", param="messages")


def _field(mapping: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    value = mapping.get(name)
    if not isinstance(value, kind):
        raise RequestError(f"'{name}' is missing or of the wrong type", param=name)
    return value


def _raw_prompt(prompt: str | Mapping[str, Any]) -> tuple[RawPrompt, ImageSettings]:
    if isinstance(prompt, str):
        return RawPrompt(prompt), NOTHING_SAID
    images = (prompt.get("multi_modal_data") or {}).get("image", [])
    listed = images if isinstance(images, (list, tuple)) else [images]
    ids = prompt.get("prompt_token_ids")
    text: str | Sequence[int] = list(ids) if ids is not None else _field(prompt, "prompt", str)
    return RawPrompt(text, [_source(image) for image in listed]), processor_settings(prompt.get("mm_processor_kwargs"))

