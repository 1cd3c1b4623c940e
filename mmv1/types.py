"""Request-side messages: what travels between the API server and the EngineCore. Torch-free; msgspec structs only.

A request never carries pixels: it carries `MMFeature`s, about 100 bytes each, and the pixels are found by hash (idea 1 of
docs/architecture.md). Every edge is a one-way stream of a tagged union: `EngineCoreInput` towards the core,
`EngineCoreMessage` back.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec


class FinishReason(enum.IntEnum):
    """Why a request ended. The OpenAI spelling is `.name.lower()`, where abort and error never reach a finished choice."""

    STOP = 0
    LENGTH = 1
    ABORT = 2
    ERROR = 3


class StructuredOutputs(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """What the text of an answer must be; one of the first five is given. Names and meanings are vLLM's."""

    json: str | dict[str, Any] | bool | None = None  # a JSON schema, also as its text
    regex: str | None = None  # of all the text
    choice: tuple[str, ...] | None = None
    grammar: str | None = None  # Lark, or GBNF
    json_object: bool = False  # any JSON object
    param: str = "structured_outputs"  # the field of the client's request, named in errors


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """How to choose the next token. Names and meanings are vLLM's; values are checked by `engine.sampling`.

    `temperature` 0 is greedy. `top_k` 0 or -1 keeps the whole vocabulary. `logprobs` None: none; k: the sampled token's and
    the k most likely ones' log-probabilities (of the raw logits). `stop` strings are matched by the output processor, on
    text; everything else is the engine's.

    `logit_bias` is added to the logits. Before `min_tokens` tokens nothing stops the answer. `bad_words` are never completed;
    `bad_words_token_ids`, their spellings as tokens, the engine finds itself. Where `structured_outputs` leaves nothing
    else, it goes before the last three. `allowed_token_ids` do not go with it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    structured_outputs: StructuredOutputs | None = None


class MMFeature(msgspec.Struct, frozen=True, array_like=True):
    """One picture's place in one prompt. `offset` and `num_tokens` are in prompt tokens; `grid_thw` in patches."""

    mm_hash: bytes  # 32 bytes, never truncated
    offset: int
    num_tokens: int
    grid_thw: tuple[int, int, int]


class EngineCoreRequest(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True, tag="add"):
    """A validated request: token ids with every picture's placeholder already expanded, in the order of offsets."""

    request_id: str
    prompt_token_ids: list[int]
    mm_features: list[MMFeature] = []
    sampling_params: SamplingParams
    max_tokens: int  # resolved against the context length, at least 1
    eos_token_ids: tuple[int, ...] = ()  # empty when ignore_eos
    cache_salt: bytes = b""  # enters the root of the block hashes: different salts never share KV
    priority: int = 0  # lower runs first, under the priority policy


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """The listed requests are no longer wanted. Unknown ids are ignored: they may have just finished."""

    request_ids: list[str]


class FeatureReady(msgspec.Struct, frozen=True, tag="ready"):
    """The picture's patches lie in the slab at [offset, offset + nbytes), pinned until the core releases them.

    `ticket` echoes the PixelRequest answered: an answer to a request that was meanwhile withdrawn is recognised and dropped.
    """

    mm_hash: bytes
    ticket: int
    offset: int
    nbytes: int


class FeatureFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The picture cannot be had (damaged, refused by the decoder): every request that still needs it ends with this error."""

    mm_hash: bytes
    ticket: int
    message: str
    code: str


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Answered by the step loop itself (`EngineCoreOutputs.pong`), so that an answer proves that it turns."""

    ping_id: int


class ResetCaches(msgspec.Struct, frozen=True, tag="reset"):
    """Forget every unreferenced KV block and embedding (benchmarks and tests)."""


class SlabShort(msgspec.Struct, frozen=True, tag="slab_short"):
    """A picture the core asked for has been waiting for room in the slab: what is less urgent is to be given up."""


class StartProfile(msgspec.Struct, frozen=True, tag="start_profile"):
    """Record what the device and the host do from the next step on. Answered by a ProfileAnswer, as StopProfile is."""

    call_id: int
    trace_dir: str


class StopProfile(msgspec.Struct, frozen=True, tag="stop_profile"):
    """Record no longer, and write the trace."""

    call_id: int


EngineCoreInput = (
    EngineCoreRequest | Abort | FeatureReady | FeatureFailed | SlabShort | Ping | ResetCaches | StartProfile | StopProfile
)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: the sampled token first, then the k most likely, most likely first."""

    token_ids: list[int]
    logprobs: list[float]
    sampled_rank: int  # 1 is the most likely


class EngineCoreOutput(msgspec.Struct, array_like=True, omit_defaults=True):
    """News of one request. `new_token_ids` never contains a token past the stop."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop_token_id that ended it, if one did; None for end-of-sequence
    new_logprobs: list[TokenLogprobs] | None = None  # one per new token
    num_cached_tokens: int = 0  # prompt tokens served from the prefix cache; set with a request's first output
    error: str | None = None  # with FinishReason.ERROR: a message for the client,
    error_code: str | None = None  # and its OpenAI code


class PixelRequest(msgspec.Struct, frozen=True, array_like=True):
    """The core needs this picture's patches. Repeating a hash with a new ticket is allowed; only the last ticket counts."""

    mm_hash: bytes
    ticket: int


class SchedulerStats(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Counters since start, and gauges, read by /metrics, the statistics line and the tests. Bytes and tokens as named."""

    num_running: int = 0
    num_waiting: int = 0
    num_steps: int = 0  # steps whose results have been applied
    num_preemptions: int = 0
    num_kv_blocks: int = 0
    num_kv_blocks_used: int = 0  # referenced by a live request
    prefix_cache_queries: int = 0  # prompt tokens looked up
    prefix_cache_hits: int = 0  # prompt tokens found
    encoder_cache_queries: int = 0  # pictures a request needed embedded
    encoder_cache_hits: int = 0  # of these, found in the encoder cache
    encoder_cache_bytes: int = 0  # in use, referenced or not
    encoder_cache_capacity_bytes: int = 0
    num_images_encoded: int = 0
    num_pixel_requests: int = 0
    num_prompt_tokens_computed: int = 0
    num_generation_tokens: int = 0
    encode_seconds: float = 0.0  # of the device's time (see step.EncodeOutput and step.StageSeconds)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class Pong(msgspec.Struct, frozen=True, array_like=True):
    """`stalled_s`: how long there have been requests without a step or an encoding being finished; 0 when there are none."""

    ping_id: int
    stalled_s: float


class ProfileAnswer(msgspec.Struct, frozen=True, array_like=True):
    """It is being recorded, or the trace is on disk; or why not."""

    call_id: int
    error: str | None = None


class EngineCoreOutputs(msgspec.Struct, kw_only=True, omit_defaults=True, tag="news"):
    """All the core has to say after one step (or one message), in one frame."""

    outputs: list[EngineCoreOutput] = []
    pixel_requests: list[PixelRequest] = []
    pixel_releases: list[bytes] = []  # hashes whose pixels the core no longer holds or awaits
    stats: SchedulerStats | None = None
    pong: Pong | None = None
    profile_answers: list[ProfileAnswer] = []


class EngineReady(msgspec.Struct, kw_only=True, tag="engine_ready"):
    """The core's first message: the model is loaded and memory is laid out. `error` set: the settings or the model directory
    cannot work, in one sentence."""

    max_model_len: int = 0
    num_kv_blocks: int = 0
    block_size: int = 0
    encoder_cache_bytes: int = 0
    attention_backend: str = ""
    device: str = ""
    dtype: str = ""
    error: str | None = None


class EngineDead(msgspec.Struct, tag="engine_dead"):
    """The core's last message: it cannot go on, for this reason."""

    reason: str


EngineCoreMessage = EngineReady | EngineCoreOutputs | EngineDead
