"""`EngineArgs`: the user's words. Its fields make the command line; what is wrong with them by themselves is found here.

Names and meanings are vLLM's where it has the same setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mmv1.errors import ConfigError

DTypeName = Literal["auto", "bfloat16", "float16", "float32"]
HashAlgorithm = Literal["blake3", "sha256", "xxh3"]


def _arg(default: Any, help: str, group: str = "Engine", **extra: Any) -> Any:
    """A field of EngineArgs: its default, its help line, its heading on the command line."""
    metadata = {"help": help, "group": group, **extra}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """The user's words. `None` means: choose for me."""

    model: str = _arg(
        "", "model directory, or an id on the Hugging Face hub; default: the small demo model", "Model", positional=True
    )
    served_model_name: str | None = _arg(None, "name in the API; default: the model's", "Model")
    dtype: DTypeName = _arg("auto", "type of weights and activations; auto: the checkpoint's, float32 on a CPU", "Model")
    load_format: Literal["auto", "dummy"] = _arg("auto", "dummy: random weights, for benchmarks", "Model")
    max_model_len: int | None = _arg(None, "longest prompt plus output, in tokens; default: the model's", "Model")
    seed: int = _arg(0, "seed of dummy weights and of requests without a seed of their own", "Model")

    attention_backend: str | None = _arg(None, "kernels of attention; default: the best that are installed", "Device")
    enforce_eager: bool = _arg(False, "no CUDA graphs", "Device")
    encoder_stream: bool = _arg(True, "encode pictures while other requests' steps run", "Device")
    fused_kernels: bool = _arg(True, "the Triton kernels, on a GPU; off: plain torch", "Device")
    torch_profiler_dir: str | None = _arg(None, "allow POST /start_profile and /stop_profile; traces go there", "Device")

    max_num_seqs: int = _arg(256, "most requests in one step", "Scheduler")
    max_num_batched_tokens: int | None = _arg(None, "most tokens in one step", "Scheduler")
    scheduling_policy: Literal["fcfs", "priority"] = _arg("fcfs", "who goes first", "Scheduler")
    max_num_encoder_tokens: int | None = _arg(None, "most picture tokens encoded together", "Scheduler")
    enable_chunked_prefill: bool = _arg(True, "a prompt may be computed in several steps; off: in one, whole", "Scheduler")
    async_scheduling: bool = _arg(True, "prepare the next step while one runs", "Scheduler")

    block_size: int = _arg(16, "tokens in a KV block", "Memory")
    gpu_memory_utilization: float = _arg(0.9, "share of the device's memory this server may use", "Memory")
    kv_cache_memory_bytes: int | None = _arg(None, "size of the KV cache; default: what is left of the share", "Memory")
    num_gpu_blocks_override: int | None = _arg(None, "number of KV blocks, whatever the memory", "Memory")
    enable_prefix_caching: bool = _arg(True, "reuse the KV of equal prefixes, pictures included", "Memory")
    encoder_cache: bool = _arg(True, "keep the embeddings of pictures for other requests", "Memory")
    encoder_cache_bytes: int | None = _arg(None, "size of the cache of picture embeddings on the device", "Memory")

    limit_mm_per_prompt: dict[str, int] = _arg({}, "most pictures a prompt may have, as JSON: '{\"image\": 4}'", "Pictures")
    max_pixels: int | None = _arg(None, "most pixels a picture is resized to; default: the model's", "Pictures")
    min_pixels: int | None = _arg(None, "fewest pixels a picture is resized to; default: the model's", "Pictures")
    mm_processor_kwargs: dict[str, Any] = _arg(
        {}, "max_pixels and min_pixels in vLLM's words, as JSON: '{\"max_pixels\": 1003520}'; their flags go first", "Pictures"
    )
    preprocess_workers: int | None = _arg(None, "processes that decode and resize pictures", "Pictures")
    preprocess_slab_gb: float | None = _arg(None, "shared memory for processed pictures, in GiB", "Pictures")
    hash_algorithm: HashAlgorithm = _arg("blake3", "of cache keys; xxh3 only for one trusted tenant", "Pictures")
    allowed_media_domains: list[str] = _arg([], "fetch pictures only from these hosts; default: any public one", "Pictures")
    extra_image_formats: list[str] = _arg([], "accept bmp or tiff (or both) besides JPEG, PNG, WebP and GIF", "Pictures")
    allowed_local_media_path: str | None = _arg(
        None, "directory below which file: URLs may name pictures; default: they are refused", "Pictures"
    )
    media_fetch_timeout_s: float = _arg(10.0, "longest download of one picture, in seconds", "Pictures")

    redis_url: str | None = _arg(
        None, "Redis that keeps processed pictures, for restarts and other servers; default: the environment's REDIS_URL", "Redis"
    )
    redis_ttl_s: int = _arg(86_400, "how long a picture is kept, in seconds", "Redis")
    redis_min_bytes: int = _arg(65_536, "pictures with fewer bytes of pixels are not worth a look-up", "Redis")
    cache_secret_file: str | None = _arg(
        None, "16 secret bytes or more, shared by the servers of one Redis: without them no key or value can be forged", "Redis"
    )


# What a number on the command line may be: (at least, at most) where it is whole, (above, at most) where it need not be.
_WHOLE_RANGES = {
    "max_model_len": (2, 1 << 30),
    "seed": (0, (1 << 63) - 1),
    "max_num_seqs": (1, 1 << 16),
    "max_num_batched_tokens": (1, 1 << 30),
    "max_num_encoder_tokens": (1, 1 << 30),
    "block_size": (1, 1 << 16),
    "kv_cache_memory_bytes": (1, 1 << 50),
    "num_gpu_blocks_override": (2, 1 << 40),  # one is the null block, which no request may have
    "encoder_cache_bytes": (1, 1 << 50),
    "max_pixels": (1, 1 << 40),
    "min_pixels": (1, 1 << 40),
    "preprocess_workers": (1, 1024),
    "redis_ttl_s": (1, 10 * 365 * 86_400),
    "redis_min_bytes": (0, 1 << 40),
}
_NUMBER_RANGES = {
    "gpu_memory_utilization": (0.0, 1.0),
    "preprocess_slab_gb": (0.0, float(1 << 20)),
    "media_fetch_timeout_s": (0.0, 86_400.0),
}


def check_ranges(args: EngineArgs) -> None:
    """Raises ConfigError for the first number out of its range."""
    for name, (least, most) in _WHOLE_RANGES.items():
        value = getattr(args, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
            raise ConfigError(f"{_flag(name)} must be at least {least} and at most {most}, a whole number; not {value!r}")
    for name, (above, at_most) in _NUMBER_RANGES.items():
        value = getattr(args, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value <= at_most):
            raise ConfigError(f"{_flag(name)} must be above {above:g} and at most {at_most:g}, not {value!r}")
    if set(args.limit_mm_per_prompt) - {"image"}:
        unknown = sorted(set(args.limit_mm_per_prompt) - {"image"})
        raise ConfigError(f"--limit-mm-per-prompt knows only 'image', not {unknown}")
    most_images = args.limit_mm_per_prompt.get("image", 0)
    if isinstance(most_images, bool) or not isinstance(most_images, int) or most_images < 0:
        raise ConfigError(f"--limit-mm-per-prompt must say a whole number of images, at least 0; not {most_images!r}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def with_processor_kwargs(args: EngineArgs) -> EngineArgs:
    """What `mm_processor_kwargs` says of pixels, in either of transformers' spellings, as min_pixels and max_pixels; the flags of
    those names go first. Raises ConfigError for anything else it says."""
    said = dict(args.mm_processor_kwargs)
    size = said.pop("size", None)
    if not isinstance(size, dict | None) or set(size or {}) - {"shortest_edge", "longest_edge"}:
        raise ConfigError(f"--mm-processor-kwargs: size may say shortest_edge and longest_edge, numbers of pixels; not {size!r}")
    if unknown := sorted(set(said) - {"min_pixels", "max_pixels"}):
        raise ConfigError(f"--mm-processor-kwargs knows min_pixels, max_pixels and size, not {', '.join(unknown)}")
    edges = size or {}

    def first(*values: int | None) -> int | None:
        return next((value for value in values if value is not None), None)

    return replace(
        args,
        min_pixels=first(args.min_pixels, said.get("min_pixels"), edges.get("shortest_edge")),
        max_pixels=first(args.max_pixels, said.get("max_pixels"), edges.get("longest_edge")),
    )
