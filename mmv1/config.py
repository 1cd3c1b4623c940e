"""Settings: what the user's words (`EngineArgs`) resolve to, once.

Everything has a default that works. Torch-free. Classes further down the house are handed the numbers they need, never these
objects whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mmv1.engine_args import EngineArgs, HashAlgorithm, check_ranges, with_processor_kwargs
from mmv1.errors import ConfigError

DEMO_MODEL = "qwen2.5-vl-demo"

@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is known of the model without torch: its directory and its config.json, read once."""

    path: str
    served_model_name: str
    architecture: str
    hf_config: dict[str, Any]
    dtype: Literal["bfloat16", "float16", "float32"]
    load_format: Literal["auto", "dummy"]
    max_model_len: int
    max_model_len_is_given: bool  # by the user: it is then not lowered to what memory holds
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    max_num_seqs: int
    max_num_batched_tokens: int
    policy: Literal["fcfs", "priority"]
    max_num_encoder_tokens: int  # resolved to at least one largest picture
    enable_chunked_prefill: bool = True  # without it no prompt is cut: max_num_batched_tokens is at least max_model_len
    async_scheduling: bool = True


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    block_size: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    num_gpu_blocks_override: int | None
    enable_prefix_caching: bool
    encoder_cache_bytes: int | None
    hash_algorithm: HashAlgorithm
    encoder_cache: bool = True  # False: an embedding is dropped as soon as no request needs it


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """How steps are run; nothing here changes what they compute."""

    attention_backend: str | None = None  # None: chosen by device and by what is installed
    enforce_eager: bool = False
    encoder_stream: bool = True
    fused_kernels: bool = True
    torch_profiler_dir: str | None = None  # absolute; None: no profiling


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    num_workers: int
    slab_bytes: int | None  # None: sized from the largest and the ordinary picture
    min_pixels: int | None
    max_pixels: int | None
    max_images_per_prompt: int
    hash_algorithm: HashAlgorithm
    allowed_media_domains: tuple[str, ...]
    allowed_local_media_path: str | None  # resolved
    fetch_timeout_s: float
    extra_image_formats: tuple[str, ...] = ()  # as Pillow names them
    redis_url: str | None = field(default=None, repr=False)  # it may hold a password
    redis_ttl_s: int = 86_400
    redis_min_bytes: int = 65_536
    cache_secret: bytes | None = field(default=None, repr=False)
    max_encoded_bytes: int = 20 << 20  # of one picture, as sent or fetched
    max_image_pixels: int = 36_000_000  # of one picture as it comes, refused from its header
    max_image_side: int = 16_384


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything resolved. Sent to the engine process as msgpack."""

    model: ModelConfig
    scheduler: SchedulerConfig
    cache: CacheConfig
    preprocess: PreprocessConfig
    device: DeviceConfig = DeviceConfig()


def demo_model_dir() -> Path:
    """The small model that mmv1 brings along: in an installed package, or in the repository beside it. Raises ConfigError."""
    package = Path(__file__).parent
    for path in (package / "demo_model", package.parent / "demo_model" / DEMO_MODEL):
        if (path / "config.json").is_file():
            return path
    raise ConfigError("no model is named, and the demo model is not installed: give a model directory or a hub id")


def find_model_dir(model: str) -> Path:
    """A local directory as it is; without a name the demo model; else a hub id, downloaded without anything that could be
    code. Raises ConfigError."""
    if not model:
        return demo_model_dir()
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ConfigError(f"no model directory at '{model}', and it is no hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = f"could not be fetched from the hub ({type(error).__name__})"
        if isinstance(error, LocalEntryNotFoundError):
            reason = "is not in the cache of the hub's models, and the hub cannot be reached"
        raise ConfigError(f"'{model}' is not a local directory and {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the model directory; {} when there is no such file. Raises ConfigError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path.name} in the model directory cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name} in the model directory is not a JSON object")
    return value


def text_config(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of config.json: nested under text_config (v5) or flat (v4), one dict either way."""
    nested = hf_config.get("text_config")
    return {**hf_config, **nested} if isinstance(nested, dict) else hf_config


_ABSURD = 1 << 40  # no number of a model's configuration is as large


def whole_number(settings: Mapping[str, Any], name: str, default: int | None = None, *, least: int = 1) -> int:
    """`settings[name]` of a file of the model directory; `default` when absent or null. Raises ConfigError."""
    value = default if settings.get(name) is None else settings[name]
    if value is None:
        raise ConfigError(f"config.json does not say {name}")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _ABSURD:
        raise ConfigError(f"the model directory says {name} = {value!r}, which must be a whole number of at least {least}")
    return value


def positive_number(settings: Mapping[str, Any], name: str, default: float) -> float:
    """The same for a number above 0 that need not be whole."""
    value = default if settings.get(name) is None else settings[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _ABSURD:
        raise ConfigError(f"the model directory says {name} = {value!r}, which must be a number above 0")
    return float(value)


def whole_numbers(settings: Mapping[str, Any], name: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The same for a list of whole numbers of at least 0."""
    value = default if settings.get(name) is None else settings[name]
    if value is None:
        raise ConfigError(f"config.json does not say {name}")
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"the model directory says {name} = {value!r}, which must be a list")
    return tuple(whole_number({name: item}, name, least=0) for item in value)


def section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The object at `settings[name]`; {} when absent or null. Raises ConfigError when it is something else."""
    value = settings.get(name)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"the model directory says {name} = {value!r}, which must be an object")
    return value or {}


class Normalization(NamedTuple):
    """What the image processor does to a pixel: (x * rescale_factor - mean) / std, by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float


def read_image_processor_config(model_dir: Path) -> dict[str, Any]:
    """The image processor's settings: nested in processor_config.json where newer files put them, else their own file; the
    order in which transformers looks. Raises ConfigError."""
    nested = section(read_json(model_dir / "processor_config.json"), "image_processor")
    return nested or read_json(model_dir / "preprocessor_config.json")


def image_normalization(processor: Mapping[str, Any]) -> Normalization:
    """By default the numbers of CLIP (Radford et al., 2021). Raises ConfigError."""
    channels = []
    for name, default in (
        ("image_mean", (0.48145466, 0.4578275, 0.40821073)),
        ("image_std", (0.26862954, 0.26130258, 0.27577711)),
    ):
        values = processor.get(name) or default
        if not isinstance(values, (list, tuple)) or len(values) != len(default):
            raise ConfigError(f"the model directory says {name} = {values!r}, which must be a list of {len(default)} numbers")
        channels.append(tuple(_channel_number(name, value) for value in values))
    return Normalization(channels[0], channels[1], positive_number(processor, "rescale_factor", 1 / 255))


def _channel_number(name: str, value: Any) -> float:
    if name == "image_mean" and value == 0 and not isinstance(value, bool):
        return 0.0
    return positive_number({name: value}, name, math.nan)


def _eos_token_ids(model_dir: Path, hf_config: dict[str, Any]) -> tuple[int, ...]:
    """The union of generation_config's and config's end-of-sequence ids, in that order."""
    ids: list[int] = []
    for source in (read_json(model_dir / "generation_config.json"), text_config(hf_config), hf_config):
        eos = source.get("eos_token_id")
        listed = source if isinstance(eos, list) else {"eos_token_id": [] if eos is None else [eos]}
        ids += [token for token in whole_numbers(listed, "eos_token_id") if token not in ids]
    return tuple(ids)


def _resolve_model(args: EngineArgs, *, on_cpu: bool) -> ModelConfig:
    model_dir = find_model_dir(args.model)
    hf_config = read_json(model_dir / "config.json")
    if not hf_config:
        raise ConfigError(f"'{args.model}' has no config.json")
    architectures = hf_config.get("architectures") or [hf_config.get("model_type", "")]
    if not isinstance(architectures, list):
        raise ConfigError(f"config.json says architectures = {architectures!r}, which must be a list")
    text = text_config(hf_config)
    derived_len = whole_number(text, "max_position_embeddings", 0, least=0)
    if not derived_len and args.max_model_len is None:
        raise ConfigError("config.json does not say max_position_embeddings: give --max-model-len")
    max_model_len = derived_len if args.max_model_len is None else args.max_model_len
    if derived_len and max_model_len > derived_len:
        raise ConfigError(f"--max-model-len {max_model_len} is more than the model's {derived_len}")
    stored = text.get("dtype") or text.get("torch_dtype") or hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    dtype: Any = args.dtype if args.dtype != "auto" else ("float32" if on_cpu else stored)
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"dtype '{dtype}' is not supported: give --dtype bfloat16, float16 or float32")
    return ModelConfig(
        path=str(model_dir),
        served_model_name=args.served_model_name or args.model or DEMO_MODEL,
        architecture=str(architectures[0]),
        hf_config=hf_config,
        dtype=dtype,
        load_format=args.load_format,
        max_model_len=max_model_len,
        max_model_len_is_given=args.max_model_len is not None,
        eos_token_ids=_eos_token_ids(model_dir, hf_config),
        vocab_size=whole_number(text, "vocab_size", 0, least=0),
        seed=args.seed,
    )


def has_cuda_device(devices: Path = Path("/dev")) -> bool:
    """Whether there is an NVIDIA device this process may use, found out without importing torch. A container that was given none
    still sees its host's driver under /proc, so the device itself is looked for."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1") and any(devices.glob("nvidia[0-9]*"))


def _given(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def _extra_image_formats(given: Sequence[str]) -> tuple[str, ...]:
    formats = tuple(dict.fromkeys(name.upper() for name in given))
    if set(formats) - {"BMP", "TIFF"}:
        raise ConfigError(f"--extra-image-formats knows bmp and tiff; the others are accepted anyway, or never: not {given!r}")
    return formats


def _local_media_path(given: str | None) -> str | None:
    if not given:  # empty: vLLM's word for none
        return None
    path = Path(given).expanduser()
    if not path.is_dir():
        raise ConfigError(f"--allowed-local-media-path {given} is not a directory")
    return str(path.resolve())


def _redis_url(given: str | None) -> str | None:
    """The user's word, else the environment's; empty: none. Raises ConfigError, without the URL: it may hold a password."""
    url = os.environ.get("REDIS_URL", "") if given is None else given
    if url and not url.startswith(("redis://", "rediss://", "unix://")):
        raise ConfigError("the Redis URL must begin with redis://, rediss:// or unix://")
    return url or None


def _cache_secret(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"--cache-secret-file {path} cannot be read ({error.strerror})") from error
    if len(secret) < 16:
        raise ConfigError(f"--cache-secret-file {path} must hold at least 16 bytes, such as `head -c 32 /dev/urandom` gives")
    return secret


def _max_num_batched_tokens(args: EngineArgs, max_model_len: int, *, on_cpu: bool) -> int:
    """Raises ConfigError for a budget that the longest prompt does not fit in although it may not be cut."""
    budget = args.max_num_batched_tokens
    longest = 0 if args.enable_chunked_prefill else max_model_len
    if budget is None:
        return max(2048 if on_cpu else 8192, args.max_num_seqs, longest)
    if budget < longest:
        message = f"without chunked prefill --max-num-batched-tokens ({budget}) must be at least --max-model-len ({longest})"
        raise ConfigError(message)
    return budget


def resolve(args: EngineArgs) -> EngineConfig:
    """Check the user's words and fill in what they left open. Raises ConfigError with what to change."""
    args = with_processor_kwargs(args)
    check_ranges(args)
    on_cpu = not has_cuda_device()
    model = _resolve_model(args, on_cpu=on_cpu)
    max_num_batched_tokens = _max_num_batched_tokens(args, model.max_model_len, on_cpu=on_cpu)
    return EngineConfig(
        model=model,
        scheduler=SchedulerConfig(
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            policy=args.scheduling_policy,
            max_num_encoder_tokens=_given(args.max_num_encoder_tokens, max_num_batched_tokens),
            enable_chunked_prefill=args.enable_chunked_prefill,
            async_scheduling=args.async_scheduling,
        ),
        cache=CacheConfig(
            block_size=args.block_size,
            gpu_memory_utilization=args.gpu_memory_utilization,
            kv_cache_memory_bytes=args.kv_cache_memory_bytes,
            num_gpu_blocks_override=args.num_gpu_blocks_override,
            enable_prefix_caching=args.enable_prefix_caching,
            encoder_cache_bytes=args.encoder_cache_bytes,
            hash_algorithm=args.hash_algorithm,
            encoder_cache=args.encoder_cache,
        ),
        device=DeviceConfig(
            attention_backend=args.attention_backend,
            enforce_eager=args.enforce_eager,
            encoder_stream=args.encoder_stream,
            fused_kernels=args.fused_kernels,
            torch_profiler_dir=args.torch_profiler_dir and str(Path(args.torch_profiler_dir).expanduser().resolve()),
        ),
        preprocess=resolve_preprocess(args),
    )


def resolve_preprocess(args: EngineArgs) -> PreprocessConfig:
    """What the words say of pictures, whatever model they are for. Raises ConfigError."""
    args = with_processor_kwargs(args)
    check_ranges(args)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return PreprocessConfig(
        num_workers=_given(args.preprocess_workers, max(1, min(8, cores // 2))),
        slab_bytes=None if args.preprocess_slab_gb is None else int(args.preprocess_slab_gb * (1 << 30)),
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        max_images_per_prompt=args.limit_mm_per_prompt.get("image", 16),
        hash_algorithm=args.hash_algorithm,
        allowed_media_domains=tuple(args.allowed_media_domains),
        allowed_local_media_path=_local_media_path(args.allowed_local_media_path),
        fetch_timeout_s=args.media_fetch_timeout_s,
        extra_image_formats=_extra_image_formats(args.extra_image_formats),
        redis_url=_redis_url(args.redis_url),
        redis_ttl_s=args.redis_ttl_s,
        redis_min_bytes=args.redis_min_bytes,
        cache_secret=_cache_secret(args.cache_secret_file),
    )
