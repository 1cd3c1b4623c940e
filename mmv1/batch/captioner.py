"""From a sample to its caption: read the picture, ask about it, check and rank the answers, keep the result.

What is asked is a Question, the same for all pictures. Pictures with the same bytes are asked about once: what is known of one,
from this run or an earlier one, is known of all. Knows nothing of where samples come from or captions go.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

from blake3 import blake3

from mmv1.batch.backend import Answer, Backend, Picture
from mmv1.batch.caption_log import CaptionLog, Row
from mmv1.batch.sinks import Recorder
from mmv1.batch.sources import Sample
from mmv1.errors import ConfigError, ImageError, RequestError
from mmv1.log import logger
from mmv1.preprocess.fetch import ImageFetcher, parse_data_url
from mmv1.preprocess.image_loader import off_loop
from mmv1.preprocess.local_file import read_file
from mmv1.preprocess.media import ImageLimits
from mmv1.preprocess.timings import StageTimings

_RETRY_TEMPERATURE = 0.7  # at least: greedily the same answer would come again
_NOT_THE_PICTURE = (401, 403, 404, 405, 422)
_MAX_SEED = 1 << 63
_SEEDS_A_TRY = 1 << 20
_FENCED = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?```\s*\Z", re.DOTALL)


class Failure(NamedTuple):
    """Why a picture has no caption."""

    code: str
    message: str


class Scorer(Protocol):
    async def scores(self, picture: bytes, captions: Sequence[str]) -> list[float]: ...


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked about every picture. `sampling`: fields of the request, as OpenAI and vLLM spell them."""

    prompt: str
    system: str | None = None
    max_tokens: int = 256
    sampling: dict[str, Any] = field(default_factory=dict)
    num_captions: int = 1
    max_pixels: int | None = None
    schema: dict[str, Any] | None = None
    num_tries: int = 1  # for an answer that fits the schema

    def body(self, model: str, picture: bytes, seed: int, *, is_retry: bool, use_response_format: bool) -> dict[str, Any]:
        """OpenAI's request, but that the picture is bytes."""
        prompt, sampling = self.prompt, dict(self.sampling)
        body: dict[str, Any] = {"model": model, "max_tokens": self.max_tokens}
        if self.schema is not None and use_response_format:
            body["response_format"] = {
                "type": "json_schema", "json_schema": {"name": "caption", "schema": self.schema, "strict": True}
            }  # fmt: skip
        elif self.schema is not None:
            prompt += f"\nAnswer with JSON that follows this schema, and nothing else:\n{json.dumps(self.schema)}"
        if is_retry:
            sampling["temperature"] = max(sampling["temperature"], _RETRY_TEMPERATURE)
        if sampling["temperature"] > 0:
            body["seed"] = seed
        if self.num_captions > 1:
            body["n"] = self.num_captions
        if self.max_pixels is not None:
            body["mm_processor_kwargs"] = {"max_pixels": self.max_pixels}
        content = [{"type": "image_url", "image_url": {"url": Picture(picture)}}, {"type": "text", "text": prompt}]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return body | sampling | {"messages": [*system, {"role": "user", "content": content}]}


class PictureReader:
    """Encoded bytes of samples, from wherever they are. URLs are fetched under the policy of preprocess/fetch.py."""

    def __init__(self, limits: ImageLimits, *, allowed_domains: Sequence[str], timeout_s: float) -> None:
        self._limits = limits
        self._allowed_domains = allowed_domains
        self._timeout_s = timeout_s
        self._fetcher: ImageFetcher | None = None

    async def read(self, sample: Sample) -> bytes:
        """Raises ImageError."""
        picture = sample.picture
        if isinstance(picture, ImageError):
            raise picture
        if isinstance(picture, Path):
            return await asyncio.to_thread(read_file, picture, self._limits)
        if isinstance(picture, bytes):
            self._limits.check_encoded(len(picture))
            return picture
        if picture.startswith("data:"):
            return await off_loop(len(picture), parse_data_url, picture, self._limits)
        if self._fetcher is None:
            self._fetcher = ImageFetcher(
                limits=self._limits, timings=StageTimings(), allowed_domains=self._allowed_domains, timeout_s=self._timeout_s
            )
        return await self._fetcher.fetch(await self._fetcher.look_up(picture))

    async def close(self) -> None:
        if self._fetcher is not None:
            await self._fetcher.close()


class Captioner:
    """`await captioner(sample)` returns when the sample's caption is on disk, or says why it has none.

    `seed`: answers that are sampled follow from it and the picture's bytes, whatever else runs. `min_clip_score`: captions below
    it are failures. Counters: `num_asked` pictures were answered by the model, `num_repeated` had been known by their bytes,
    `num_cut` captions ended at max_tokens.
    """

    def __init__(
        self,
        backend: Backend,
        question: Question,
        reader: PictureReader,
        log: CaptionLog,
        recorder: Recorder,
        *,
        seed: int,
        scorer: Scorer | None = None,
        min_clip_score: float | None = None,
    ) -> None:
        self._backend = backend
        self._question = question
        self._reader = reader
        self._log = log
        self._recorder = recorder
        self._seed = seed
        self._use_response_format = True  # until it is refused
        self._scorer = scorer
        self._min_clip_score = min_clip_score
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by blake3 of the picture
        self._validator = None if question.schema is None else schema_validator(question.schema)
        self.num_asked = self.num_repeated = self.num_cut = 0

    async def __call__(self, sample: Sample) -> Failure | None:
        """Raises ConfigError when no picture can be asked about or nothing can be written, EngineDeadError."""
        try:
            picture = await self._reader.read(sample)
            digest = await off_loop(len(picture), _digest, picture)
            turn = self._turns.setdefault(digest, asyncio.Lock())
            async with turn:  # who has the same bytes waits, and finds the row in the log
                if (row := self._log.of_picture(digest)) is not None:
                    self.num_repeated += 1
                else:
                    row = await self._ask(picture, digest)
                    self.num_asked += 1
                await self._recorder.record(sample, {**row, "key": sample.key}, picture)
        except RequestError as error:
            return Failure(error.code, error.message)
        return None

    async def _ask(self, picture: bytes, digest: str) -> Row:
        """A new row, with an empty key. Raises RequestError."""
        choices = await self._answers(picture, digest)
        captions = [caption for caption, _ in choices]
        row: Row = {"key": "", "caption": captions[0], "blake3": digest}
        best = 0
        if self._scorer is not None:
            scores = [round(score, 4) for score in await self._scorer.scores(picture, captions)]
            best = max(range(len(scores)), key=scores.__getitem__)
            if self._min_clip_score is not None and scores[best] < self._min_clip_score:
                message = f"the best caption scores {scores[best]}, less than {self._min_clip_score}: {captions[best]}"
                raise RequestError(message, code="low_clip_score")
            row |= {"caption": captions[best], "clip_score": scores[best]}
            if len(captions) > 1:
                row["clip_scores"] = scores
        if len(captions) > 1:
            row["captions"] = captions
        if choices[best][1]:
            self.num_cut += 1
            row["is_cut"] = True
        return row

    async def _answers(self, picture: bytes, digest: str) -> list[tuple[Any, bool]]:
        """Captions, and whether each was cut at max_tokens. Raises RequestError."""
        fault = ""
        for number in range(self._question.num_tries):
            seed = (self._seed + int(digest[:15], 16) + number * _SEEDS_A_TRY) % _MAX_SEED
            choices = await self._chat(picture, seed, is_retry=number > 0)
            if self._validator is None:
                return list(choices)
            value, fault = read_json(choices[0][0], self._validator)
            if not fault:
                return [(value, False)]
        raise RequestError(f"no answer follows the schema, in {self._question.num_tries} tries: {fault}", code="schema_mismatch")

    async def _chat(self, picture: bytes, seed: int, *, is_retry: bool) -> list[tuple[str, bool]]:
        """The choices' texts, and whether each was cut at max_tokens. Raises RequestError."""
        while True:
            uses = self._use_response_format
            answer = await self._backend.ask(
                self._question.body(self._backend.model_name, picture, seed, is_retry=is_retry, use_response_format=uses)
            )
            if answer.status_code == 200:
                return _choices_in(answer)
            if not (uses and _error_in(answer).get("param") == "response_format"):
                raise _refusal(answer)
            if self._use_response_format:
                reason = _error_in(answer).get("message")
                logger.warning("The schema goes into the prompt, since generation cannot be made to follow it: %s", reason)
            self._use_response_format = False


def _digest(picture: bytes) -> str:
    return blake3(picture).hexdigest(16)


def _choices_in(answer: Answer) -> list[tuple[str, bool]]:
    """At least one. Raises RequestError where a server gave something else."""
    try:
        choices = [(each["message"]["content"].strip(), each.get("finish_reason") == "length") for each in answer.body["choices"]]
    except (LookupError, TypeError, AttributeError):
        choices = []
    if not choices:
        raise RequestError("the answer has no text", code="no_caption")
    return choices


def _error_in(answer: Answer) -> dict[str, Any]:
    """OpenAI's error object; older servers of vLLM, and others, have its fields without it, or a text only."""
    error = answer.body.get("error") or answer.body
    return error if isinstance(error, dict) else {"message": error}


def _refusal(answer: Answer) -> RequestError | ConfigError:
    """Whether it is this picture that is at fault, or any picture would be."""
    error = _error_in(answer)
    message = str(error.get("message") or error.get("detail") or f"status {answer.status_code}")
    param = str(error.get("param") or "")
    about_request = answer.status_code == 400 and param and not param.startswith("messages")
    if about_request or answer.status_code in _NOT_THE_PICTURE:
        return ConfigError(f"no picture can be asked about like this: {message}")
    return RequestError(message, code=str(error.get("code") or f"status_{answer.status_code}"))


def schema_validator(schema: dict[str, Any]) -> Any:
    """Raises ConfigError for what is no JSON schema."""
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ConfigError(f"the schema is no JSON schema: {error.message}") from error
    return kind(schema)


def read_json(text: str, validator: Any) -> tuple[Any, str]:
    """The JSON in an answer, also inside a Markdown fence; and what is wrong with it, or "". Raises ConfigError for a schema that
    cannot be followed to its end."""
    from referencing.exceptions import Unresolvable

    if fenced := _FENCED.match(text):
        text = fenced[1]
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # NaN and halves of characters are read, but are no JSON
    except (ValueError, RecursionError):
        return None, f"no JSON: {text[:100]}"
    try:
        error = next(validator.iter_errors(value), None)
    except (Unresolvable, RecursionError) as fault:
        raise ConfigError(f"--schema refers to what is not there: {fault}") from fault
    return value, "" if error is None else f"{error.json_path}: {error.message[:200]}"
