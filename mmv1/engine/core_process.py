"""The engine's process: an input thread, the step loop, an output thread. Started by launch.py with

    python -m mmv1.engine.core_process SOCKET_DIR SLAB_FD

and an EngineConfig as msgpack on standard input, whose end says that the parent wants this process to end, or is gone.
"""

from __future__ import annotations

import gc
import os
import queue
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from mmv1.config import EngineConfig
from mmv1.encoder_cache.manager import EncoderCacheManager
from mmv1.engine.core import EngineCore
from mmv1.engine.executor import UniProcExecutor
from mmv1.engine.launch import INPUT_SOCKET, OUTPUT_SOCKET
from mmv1.errors import ConfigError
from mmv1.kv.block_hash import BlockHasher
from mmv1.kv.manager import KVCacheManager
from mmv1.log import configure_logging, logger
from mmv1.preprocess.layout import load_layout
from mmv1.scheduler.grammar import Grammars
from mmv1.scheduler.pixels import PixelLedger
from mmv1.scheduler.scheduler import Scheduler
from mmv1.step import ENCODER_CACHE_PAGE_ROWS
from mmv1.types import EngineCoreInput, EngineCoreMessage, EngineDead, EngineReady
from mmv1.wire import Receiver, Sender, ipc_address

if TYPE_CHECKING:
    from mmv1.runner.worker import Worker

_ENCODER_CACHE_SHARE = 8  # the encoder cache gets this part of the KV cache's memory unless its size is given,
_MAX_ENCODER_CACHE_BYTES = 4 << 30  # and at most this
_STOP_TIMEOUT_S = 3.0

# A step may be launched behind pictures that are still being encoded, if they have so few tokens together: about 25 ms on an
# H100, which whatever comes meanwhile waits at most.
_MAX_FOLLOWED_TOKENS = 2048

# A thread that wants to run asks the one that does to stop after as long. Launching a step takes about a millisecond: with
# Python's own 5 ms, a message being decoded or a picture's launch in another thread would hold it up for several steps' time.
_SWITCH_INTERVAL_S = 0.0005


def lay_out_memory(config: EngineConfig, worker: Worker, max_image_tokens: int) -> tuple[int, int, int]:
    """(number of KV blocks, bytes of the encoder cache, longest context), from what the device has left for caches.
    Raises ConfigError when the model cannot work in it."""
    cache, model = config.cache, config.model
    (spec,) = worker.get_kv_cache_specs()  # one group of layers today: every layer is paged full attention
    block_bytes = spec.bytes_per_token() * cache.block_size
    bytes_per_token = worker.get_embedding_bytes_per_token()
    largest_image_bytes = (max_image_tokens + ENCODER_CACHE_PAGE_ROWS) * bytes_per_token if max_image_tokens else 0
    encoder_bytes = cache.encoder_cache_bytes if max_image_tokens else 0  # a model of text alone has no embeddings to keep
    available = worker.determine_memory(2 * largest_image_bytes if encoder_bytes is None else encoder_bytes)
    if encoder_bytes is None:
        encoder_bytes = max(2 * largest_image_bytes, min(_MAX_ENCODER_CACHE_BYTES, available // _ENCODER_CACHE_SHARE))
    elif encoder_bytes >= max(available, 1):
        raise ConfigError(
            f"the encoder cache ({encoder_bytes} bytes) leaves nothing of the {max(0, available)} bytes there are for caches: "
            "lower --encoder-cache-bytes"
        )
    if encoder_bytes < largest_image_bytes:
        raise ConfigError(
            f"the encoder cache ({encoder_bytes} bytes) cannot hold one picture of the largest size ({max_image_tokens} tokens, "
            f"{largest_image_bytes} bytes): raise --encoder-cache-bytes or lower --max-pixels"
        )
    kv_bytes = available - encoder_bytes if cache.kv_cache_memory_bytes is None else cache.kv_cache_memory_bytes
    num_blocks = kv_bytes // block_bytes if cache.num_gpu_blocks_override is None else cache.num_gpu_blocks_override
    capacity = (num_blocks - 1) * cache.block_size
    max_model_len = model.max_model_len
    if capacity < max_model_len:
        if model.max_model_len_is_given or capacity < 2:
            raise ConfigError(
                f"the KV cache holds {max(0, capacity)} tokens, less than --max-model-len {max_model_len}: "
                "give it more memory or lower --max-model-len"
            )
        max_model_len = capacity
        logger.warning("The KV cache holds %d tokens: the longest context is lowered to that", capacity)
    return num_blocks, encoder_bytes, max_model_len


def build_core(
    config: EngineConfig, slab_fd: int, output: queue.SimpleQueue[EngineCoreMessage | None]
) -> tuple[EngineCore, EngineReady]:
    """Load the model, lay out memory, and put the core together. Everything it has to say goes to `output`."""
    from mmv1.runner.worker import Worker

    layout = load_layout(config.model, min_pixels=config.preprocess.min_pixels, max_pixels=config.preprocess.max_pixels)
    max_image_tokens = layout.max_image_tokens(config.model.max_model_len)
    # A picture is encoded whole: a smaller budget than the largest one would never let it through.
    limits = replace(config.scheduler, max_num_encoder_tokens=max(config.scheduler.max_num_encoder_tokens, max_image_tokens))
    config = replace(config, scheduler=limits)
    worker = Worker(config, slab_fd)
    worker.init_device()
    worker.load_model()
    num_blocks, encoder_bytes, max_model_len = lay_out_memory(config, worker, max_image_tokens)
    worker.initialize_caches(num_blocks, encoder_bytes)

    cache = config.cache
    hasher = BlockHasher(cache.block_size, cache.hash_algorithm) if cache.enable_prefix_caching else None
    scheduler = Scheduler(
        KVCacheManager(num_blocks, cache.block_size, hasher),
        EncoderCacheManager(encoder_bytes, worker.get_embedding_bytes_per_token()),
        PixelLedger(max_ahead_patches=os.fstat(slab_fd).st_size // 2 // layout.row_bytes),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_encoder_tokens=limits.max_num_encoder_tokens,
        policy=limits.policy,
        chunked_prefill=limits.enable_chunked_prefill,
        keeps_embeddings=cache.encoder_cache,
        max_followed_tokens=_MAX_FOLLOWED_TOKENS if worker.platform.launches_ahead else 0,
    )
    core = EngineCore(
        scheduler, UniProcExecutor(worker), output.put, grammars=Grammars.of_model(config.model),
        max_steps_in_flight=2 if limits.async_scheduling else 1,
    )  # fmt: skip
    ready = EngineReady(
        max_model_len=max_model_len,
        num_kv_blocks=num_blocks - 1,
        block_size=cache.block_size,
        encoder_cache_bytes=encoder_bytes,
        attention_backend=worker.attention_backend_name,
        device=worker.device_name,
        dtype=config.model.dtype,
    )
    return core, ready


def _read_config() -> EngineConfig:
    size = int.from_bytes(sys.stdin.buffer.read(8), "little")
    return msgspec.msgpack.decode(sys.stdin.buffer.read(size), type=EngineConfig)


def _end_with_parent(cores: list[EngineCore], socket_dir: str) -> None:
    """End the process when standard input does: the steps in flight may finish, unless they take too long."""
    while sys.stdin.buffer.read(1):
        pass
    shutil.rmtree(socket_dir, ignore_errors=True)  # a parent that was killed cannot
    for core in cores:
        core.stop()
        time.sleep(_STOP_TIMEOUT_S)
    os._exit(0)


def _receive(address: str, core: EngineCore) -> None:
    try:
        receiver: Receiver[EngineCoreInput] = Receiver(address, EngineCoreInput)
        while (message := receiver.recv()) is not None:
            core.post(message)
    except Exception as error:  # a core that hears nothing must not live on
        core.fail(error)


def _send(address: str, output: queue.SimpleQueue[EngineCoreMessage | None]) -> None:
    try:
        sender = Sender(address)
        while (message := output.get()) is not None:
            sender.send(message)
        sender.close(linger_s=2.0)
    except Exception:  # nor one that cannot speak: its end says what it cannot
        logger.exception("The engine's output thread failed")
        os._exit(1)


def main() -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all of a service's processes at once: the parent decides
    configure_logging("engine")
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    socket_dir, slab_fd = sys.argv[1], int(sys.argv[2])
    config = _read_config()
    cores: list[EngineCore] = []  # one, as soon as it is built
    threading.Thread(target=_end_with_parent, args=(cores, socket_dir), name="parent", daemon=True).start()
    output: queue.SimpleQueue[EngineCoreMessage | None] = queue.SimpleQueue()
    sending = threading.Thread(target=_send, args=(ipc_address(socket_dir, OUTPUT_SOCKET), output), name="output")
    sending.start()
    status = 1
    try:
        core, ready = build_core(config, slab_fd, output)
        cores.append(core)
        threading.Thread(target=_receive, args=(ipc_address(socket_dir, INPUT_SOCKET), core), name="input", daemon=True).start()
        # What exists now lives as long as the process: the collector need not look at it again, in the middle of a step.
        gc.collect()
        gc.freeze()
        output.put(ready)
        core.run()
        status = 0
    except ConfigError as error:
        output.put(EngineReady(error=str(error)))
    except Exception as error:
        logger.exception("The engine cannot go on")
        output.put(EngineDead(f"the engine stopped: {type(error).__name__}"))
    output.put(None)
    sending.join()
    return status


if __name__ == "__main__":
    # Not sys.exit: threads of the device's libraries must not keep a dead engine alive.
    os._exit(main())
