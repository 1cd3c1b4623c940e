"""Encoded pictures under their names, and their pixels on demand: what prompts and embeddings share of this room.

One slab, one pool, one shared store and one set of limits, whatever the pictures become: who knows what that is (preprocessor.py
for a language model, `crop` for a CLIP model) names a picture with its fingerprint and says by which rules it is processed. One
event loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mmv1.config import PreprocessConfig
from mmv1.errors import ConfigError
from mmv1.preprocess.fetch import ImageFetcher
from mmv1.preprocess.hashing import ImageHasher, KeyedHasher
from mmv1.preprocess.image_loader import ImageLoader, off_loop
from mmv1.preprocess.media import DECODE_POLICY, EncodedImage, ImageLimits
from mmv1.preprocess.pixels import PixelService, SendFeature
from mmv1.preprocess.pool import PreprocessPool
from mmv1.preprocess.slab import ALIGNMENT, SlabLedger, SlabStore, aligned, default_slab_bytes
from mmv1.preprocess.store import SharedStore
from mmv1.preprocess.timings import StageTimings

_NO_SECRET = b"mmv1: a shared store without a secret"  # servers that share no secret still agree on their keys


@dataclass(slots=True)
class PreprocessStats:
    """Counters since start, and gauges."""

    num_images_probed: int = 0
    num_decodes: int = 0
    num_decode_failures: int = 0
    decode_seconds: float = 0.0
    num_slab_hits: int = 0
    num_slab_evictions: int = 0
    num_fetches: int = 0
    fetched_bytes: int = 0
    num_workers: int = 0
    num_worker_deaths: int = 0
    slab_bytes: int = 0
    slab_pinned_bytes: int = 0
    slab_free_bytes: int = 0
    num_waiting_for_slab: int = 0
    encoded_bytes: int = 0  # kept for live requests
    num_store_hits: int = 0
    num_store_misses: int = 0
    num_store_failures: int = 0
    num_store_saves: int = 0
    num_store_saves_skipped: int = 0
    num_lease_waits: int = 0
    store_is_up: bool = False  # there is a shared store, and it is not being left alone after failures


class Pictures:
    """`start` before anything else, `close` at the end. `loader` has them from wherever they are, `pixels` processes them.

    `largest_bytes`, `ordinary_bytes`: of processed pictures, to size the slab by; 0 where there will never be one, and then there
    is no slab to speak of, and no process is started. `send` carries FeatureReady, FeatureFailed and SlabShort to the core, if
    there is one. `on_failure` is called, once and with a sentence, when pixels can no longer be made at all (it may come from
    another thread). mm_hash is keyed with the cache secret; without one, servers of a shared store share a known key, and any
    other server draws a random one. Raises ConfigError for a slab that cannot hold two pictures.
    """

    def __init__(
        self,
        config: PreprocessConfig,
        send: SendFeature,
        *,
        largest_bytes: int,
        ordinary_bytes: int,
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.timings = StageTimings()
        self._on_failure = on_failure
        limits = ImageLimits(
            max_encoded_bytes=config.max_encoded_bytes,
            max_pixels=config.max_image_pixels,
            max_side=config.max_image_side,
            extra_formats=config.extra_image_formats,
        )
        secret = config.cache_secret or (_NO_SECRET if config.redis_url is not None else None)
        hasher = KeyedHasher(config.hash_algorithm, secret)
        self._hasher = ImageHasher(hasher, decode_policy=f"{DECODE_POLICY} {_decoder_versions()}")
        self._fetcher = ImageFetcher(
            limits=limits,
            timings=self.timings,
            allowed_domains=config.allowed_media_domains,
            timeout_s=config.fetch_timeout_s,
        )
        local_root = None if config.allowed_local_media_path is None else Path(config.allowed_local_media_path)
        self.loader = ImageLoader(limits=limits, fetcher=self._fetcher, local_root=local_root)
        slab_bytes = config.slab_bytes if largest_bytes else ALIGNMENT
        if slab_bytes is None:
            slab_bytes = default_slab_bytes(largest_bytes, ordinary_bytes)
        check_slab(slab_bytes, largest_bytes)
        self.slab = SlabStore(slab_bytes)
        self._ledger = SlabLedger(self.slab.nbytes)
        self._num_workers = config.num_workers if largest_bytes else 0
        self._pool = PreprocessPool(
            slab_fd=self.slab.fd, slab_bytes=self.slab.nbytes, num_workers=self._num_workers, on_failure=on_failure
        )
        self._store = None
        if config.redis_url is not None and largest_bytes:
            self._store = SharedStore(
                url=config.redis_url,
                ttl_s=config.redis_ttl_s,
                min_bytes=config.redis_min_bytes,
                secret=config.cache_secret,
                slab_fd=self.slab.fd,
                slab_bytes=self.slab.nbytes,
            )
        self.pixels = PixelService(
            ledger=self._ledger, pool=self._pool, store=self._store, timings=self.timings, send=send
        )
        self._num_probed = 0

    async def start(self) -> None:
        """Start the pool and lay out the slab, both in the background."""
        self.slab.prefault(self._on_failure)
        await self._pool.start()
        if self._store is not None:
            await self._store.start()

    async def wait_ready(self) -> None:
        """Wait until every pool process has come up, and the shared store has been tried. Raises EngineError if the pool ends
        before, ConfigError for a Redis URL that is none."""
        if self._store is not None:
            await self._store.wait_ready()
        await self._pool.wait_ready()

    async def close(self) -> None:
        await self.pixels.close()
        await self._pool.close()
        if self._store is not None:
            await self._store.close()
        await self._fetcher.close()
        self.slab.close()

    async def mm_hash(self, image: EncodedImage, fingerprint: str, tenant_scope: bytes) -> bytes:
        """The picture's name, once processed as `fingerprint` says. It enters that pictures of different scopes share nothing."""
        self._num_probed += 1
        container = "ppm" if image.header.format == "PPM" else "encoded"
        return await off_loop(
            len(image.data), self._hasher.mm_hash, image.data,
            fingerprint=fingerprint, container=container, tenant_scope=tenant_scope,
        )  # fmt: skip

    def check_admissible(self, nbytes: int) -> None:
        """Raises ImageError for a processed picture that the slab can never hold."""
        self._ledger.check_admissible(nbytes)

    def stats(self) -> PreprocessStats:
        store = self._store
        return PreprocessStats(
            num_images_probed=self._num_probed,
            num_decodes=self.pixels.num_decodes,
            num_decode_failures=self.pixels.num_failures,
            decode_seconds=self.timings.seconds("decode") + self.timings.seconds("resize"),
            num_slab_hits=self.pixels.num_slab_hits,
            num_slab_evictions=self._ledger.num_evictions,
            num_fetches=self._fetcher.num_fetches,
            fetched_bytes=self._fetcher.fetched_bytes,
            num_workers=self._num_workers,
            num_worker_deaths=self._pool.num_deaths,
            slab_bytes=self._ledger.capacity,
            slab_pinned_bytes=self._ledger.pinned_bytes,
            slab_free_bytes=self._ledger.free_bytes,
            num_waiting_for_slab=self._ledger.num_waiting,
            encoded_bytes=self.pixels.encoded_bytes,
            num_store_hits=self.pixels.num_store_hits,
            num_store_misses=store.num_misses if store else 0,
            num_store_failures=store.num_failures if store else 0,
            num_store_saves=store.num_saves if store else 0,
            num_store_saves_skipped=store.num_saves_skipped if store else 0,
            num_lease_waits=store.num_lease_waits if store else 0,
            store_is_up=store.is_up if store else False,
        )


def check_slab(slab_bytes: int, largest_bytes: int) -> None:
    """Raises ConfigError for one that cannot hold two processed pictures of `largest_bytes`."""
    if slab_bytes < 2 * aligned(largest_bytes):
        raise ConfigError(
            f"the picture slab ({slab_bytes} bytes) cannot hold two pictures of the largest size ({2 * aligned(largest_bytes)} "
            "bytes): raise --preprocess-slab-gb or lower --max-pixels"
        )


def _decoder_versions() -> str:
    """Another version of these may give other pixels; servers that share a store need not have the same ones."""
    return " ".join(f"{name}={version(name)}" for name in ("pillow", "simplejpeg", "torch"))
