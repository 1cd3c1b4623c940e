"""The one door of this room, in the API server's process: prompts in, token ids and picture references out; pixels on demand.

Pictures are known from their headers alone, so a request is ready for the scheduler as soon as its bytes are here. Nothing is
decoded until the core asks for it. Knows nothing of HTTP servers, schedulers or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from mmv1.config import ModelConfig, PreprocessConfig
from mmv1.errors import ConfigError, ContextLengthError, EngineError, ImageError, RequestError
from mmv1.preprocess.fetch import ImageFetcher
from mmv1.preprocess.hashing import ImageHasher, KeyedHasher
from mmv1.preprocess.image_loader import ImageLoader, naming_the_image, off_loop
from mmv1.preprocess.image_settings import NOTHING_SAID, ImageSettings
from mmv1.preprocess.layout import ImagePlace, PixelLimits, load_layout
from mmv1.preprocess.media import DECODE_POLICY, EncodedImage, ImageLimits, ImageSource
from mmv1.preprocess.pixels import PatchRules, PixelService, SendFeature
from mmv1.preprocess.pool import PreprocessPool
from mmv1.preprocess.prompt import ImagePart, Message, PromptRenderer, image_parts
from mmv1.preprocess.slab import SlabLedger, SlabStore, aligned, default_slab_bytes
from mmv1.preprocess.store import SharedStore
from mmv1.preprocess.timings import StageTimings
from mmv1.types import MMFeature, PixelRequest

_TEXT_COST = 64  # a character is worth at least so many bytes of a picture: tokenizing is that much slower than hashing
_TOOL_CHARACTERS = 1024  # of what a template shows of one tool, about
_NO_SECRET = b"mmv1: a shared store without a secret"  # servers that share no secret still agree on their keys


class PreparedPrompt(NamedTuple):
    """A prompt as EngineCoreRequest wants it."""

    prompt_token_ids: list[int]
    mm_features: list[MMFeature]

    @property
    def num_image_tokens(self) -> int:
        return sum(feature.num_tokens for feature in self.mm_features)


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


class _Loaded(NamedTuple):
    """One picture, ready to be placed in a prompt."""

    mm_hash: bytes
    image: EncodedImage
    place: ImagePlace


class Preprocessor:
    """Prepares prompts and answers for pixels. One event loop; `start` before, `close` after.

    `send` carries FeatureReady and FeatureFailed to the core. `on_failure` is called, once and with a sentence, when pixels
    can no longer be made at all (it may come from another thread). mm_hash is keyed with the cache secret; without one, servers
    of a shared store share a known key, and any other server draws a random one. Raises ConfigError where the model directory
    cannot work.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: PreprocessConfig,
        send: SendFeature,
        *,
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.timings = StageTimings()
        self.layout = load_layout(model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
        self._max_model_len = model.max_model_len
        self._max_images = config.max_images_per_prompt
        num_workers = config.num_workers if self.layout.takes_images else 0
        self._on_failure = on_failure
        limits = ImageLimits(
            max_encoded_bytes=config.max_encoded_bytes,
            max_pixels=config.max_image_pixels,
            max_side=config.max_image_side,
            extra_formats=config.extra_image_formats,
        )
        self._prompts = PromptRenderer(
            Path(model.path),
            image_token_id=self.layout.image_token_id,
            video_token_id=self.layout.video_token_id,
            max_model_len=model.max_model_len,
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
        self._images = ImageLoader(limits=limits, fetcher=self._fetcher, local_root=local_root)
        self._max_image_tokens = self.layout.max_image_tokens(model.max_model_len)
        largest = self.layout.image_bytes(self._max_image_tokens)
        slab_bytes = config.slab_bytes
        if slab_bytes is None:
            slab_bytes = default_slab_bytes(largest, self.layout.ordinary_image_bytes())
        if slab_bytes < 2 * aligned(largest):
            raise ConfigError(
                f"the picture slab ({slab_bytes} bytes) cannot hold two pictures of the largest size ({2 * aligned(largest)} "
                "bytes): raise --preprocess-slab-gb or lower --max-pixels"
            )
        self.slab = SlabStore(slab_bytes)
        self._ledger = SlabLedger(self.slab.nbytes)
        self._pool = PreprocessPool(
            slab_fd=self.slab.fd, slab_bytes=self.slab.nbytes, num_workers=num_workers, on_failure=on_failure
        )
        rules = PatchRules(self.layout.patch_size, self.layout.merge_size, self.layout.resample)
        self._store = None
        if config.redis_url is not None and self.layout.takes_images:
            self._store = SharedStore(
                url=config.redis_url,
                ttl_s=config.redis_ttl_s,
                min_bytes=config.redis_min_bytes,
                secret=config.cache_secret,
                slab_fd=self.slab.fd,
                slab_bytes=self.slab.nbytes,
            )
        self._pixels = PixelService(
            rules=rules, ledger=self._ledger, pool=self._pool, store=self._store, timings=self.timings, send=send
        )
        self._requests: dict[str, list[bytes]] = {}  # request_id -> hashes it refers to, one per picture
        self._num_probed = 0

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, to be shared: a second copy costs as much memory again."""
        return self._prompts.tokenizer

    async def start(self) -> None:
        """Start the pool and lay out the slab, both in the background; prompts can be prepared at once."""
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
        await self._pixels.close()
        await self._pool.close()
        if self._store is not None:
            await self._store.close()
        await self._fetcher.close()
        self.slab.close()

    async def prepare_chat(
        self,
        request_id: str,
        messages: Sequence[Message],
        image_settings: ImageSettings = NOTHING_SAID,
        *,
        tools: Sequence[dict[str, Any]] = (),
        max_prompt_tokens: int | None = None,
        tenant_scope: bytes = b"",
    ) -> PreparedPrompt:
        """Fetch, probe and hash the pictures, render and tokenize the conversation. From here on the pictures' bytes are kept
        for `request_id`, until `release_request`. `image_settings` are the request's, for all pictures that do not say
        otherwise. `tools`: see `PromptRenderer.render_chat`. `max_prompt_tokens`: None leaves room for one token of answer.
        `tenant_scope` enters mm_hash: pictures of different scopes share nothing. Nothing is downloaded for a prompt that is
        refused anyway. Raises RequestError (ImageError, ContextLengthError)."""
        if not messages:
            raise RequestError("messages must not be empty", param="messages")
        pictures = image_parts(messages)
        self._check_number(len(pictures))
        size = sum(_text_size(message) for message in messages) + _TOOL_CHARACTERS * len(tools)
        token_ids = await off_loop(_TEXT_COST * size, self._prompts.render_chat, messages, tools)
        return await self._prepare(request_id, token_ids, pictures, image_settings, max_prompt_tokens, tenant_scope)

    async def prepare_prompt(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        images: Sequence[ImageSource] = (),
        image_settings: ImageSettings = NOTHING_SAID,
        *,
        max_prompt_tokens: int | None = None,
        tenant_scope: bytes = b"",
    ) -> PreparedPrompt:
        """The same for a raw prompt, as text in which special tokens mean themselves or as ids, with one placeholder per
        picture."""
        self._check_number(len(images))
        if isinstance(prompt, str):
            token_ids = await off_loop(_TEXT_COST * len(prompt), self._prompts.render_text, prompt)
        else:
            token_ids = self._prompts.check_ids(prompt)
        parts = [ImagePart(image) for image in images]
        return await self._prepare(request_id, token_ids, parts, image_settings, max_prompt_tokens, tenant_scope)

    def release_request(self, request_id: str) -> None:
        """The request has ended: its pictures' bytes are dropped, unless another request refers to them. Unknown ids are
        ignored. The core's own holds on pixels are not touched."""
        for mm_hash in self._requests.pop(request_id, ()):
            self._pixels.drop_reference(mm_hash)

    def request_pixels(self, request: PixelRequest) -> None:
        """The core asks for a picture's pixels. The answer goes through `send`, carrying the newest ticket of its hash."""
        self._pixels.request(request)

    def release_pixels(self, mm_hash: bytes) -> None:
        """The core no longer holds or awaits these pixels; no answer to an earlier request is sent any more."""
        self._pixels.release(mm_hash)

    def stats(self) -> PreprocessStats:
        store = self._store
        return PreprocessStats(
            num_images_probed=self._num_probed,
            num_decodes=self._pixels.num_decodes,
            num_decode_failures=self._pixels.num_failures,
            decode_seconds=self.timings.seconds("decode") + self.timings.seconds("resize"),
            num_slab_hits=self._pixels.num_slab_hits,
            num_slab_evictions=self._ledger.num_evictions,
            num_fetches=self._fetcher.num_fetches,
            fetched_bytes=self._fetcher.fetched_bytes,
            num_worker_deaths=self._pool.num_deaths,
            slab_bytes=self._ledger.capacity,
            slab_pinned_bytes=self._ledger.pinned_bytes,
            slab_free_bytes=self._ledger.free_bytes,
            num_waiting_for_slab=self._ledger.num_waiting,
            encoded_bytes=self._pixels.encoded_bytes,
            num_store_hits=self._pixels.num_store_hits,
            num_store_misses=store.num_misses if store else 0,
            num_store_failures=store.num_failures if store else 0,
            num_store_saves=store.num_saves if store else 0,
            num_store_saves_skipped=store.num_saves_skipped if store else 0,
            num_lease_waits=store.num_lease_waits if store else 0,
            store_is_up=store.is_up if store else False,
        )

    def _check_number(self, num_images: int) -> None:
        if num_images and not self.layout.takes_images:
            raise ImageError("this model takes text only, no images", code="image_not_supported")
        if num_images > self._max_images:
            message = f"the prompt has {num_images} images; at most {self._max_images} are allowed"
            raise ImageError(message, code="too_many_images")

    async def _prepare(
        self,
        request_id: str,
        token_ids: list[int],
        parts: Sequence[ImagePart],
        image_settings: ImageSettings,
        max_prompt_tokens: int | None,
        tenant_scope: bytes,
    ) -> PreparedPrompt:
        if request_id in self._requests:
            raise EngineError(f"request id {request_id} is in use")
        if not token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        self._prompts.expand(token_ids, [1] * len(parts))  # the structure is checked before anything is read
        limits = self.layout.limits_in_force(image_settings, [part.settings for part in parts])
        sources = [part.source for part in parts]
        loaded: dict[int, _Loaded] = {}
        for read in (self._images.read_local, self._images.download):
            for number, image in (await read(sources)).items():
                with naming_the_image(number, of=len(sources)):
                    loaded[number] = await self._load(image, limits[number], tenant_scope)
            self._check_room(len(token_ids), loaded.values(), max_prompt_tokens)
        pictures = [loaded[number] for number in range(len(sources))]
        expanded, offsets = self._prompts.expand(token_ids, [picture.place.num_tokens for picture in pictures])
        features = [
            MMFeature(picture.mm_hash, offset, picture.place.num_tokens, picture.place.grid_thw)
            for picture, offset in zip(pictures, offsets, strict=True)
        ]
        self._requests[request_id] = [picture.mm_hash for picture in pictures]
        for picture in pictures:
            self._pixels.add_reference(*picture)
        return PreparedPrompt(expanded, features)

    def _check_room(self, num_unexpanded: int, pictures: Collection[_Loaded], max_prompt_tokens: int | None) -> None:
        """Raises ContextLengthError for a prompt too long with these of its pictures expanded, ImageError for one of them too
        large for the slab."""
        total = num_unexpanded - len(pictures) + sum(picture.place.num_tokens for picture in pictures)
        if max_prompt_tokens is None:
            max_prompt_tokens = self._max_model_len - 1
        if total > max_prompt_tokens:
            room = f"at most {max_prompt_tokens} leave room for the answer"
            raise ContextLengthError(f"the prompt, pictures included, has {total} tokens or more; {room}")
        for picture in pictures:
            self._ledger.check_admissible(picture.place.nbytes)

    async def _load(self, image: EncodedImage, limits: PixelLimits, tenant_scope: bytes) -> _Loaded:
        self._num_probed += 1
        place = self.layout.place(image.header.width, image.header.height, limits)
        if self._max_image_tokens < place.num_tokens < self._max_model_len:  # longer ones are the whole prompt's matter
            message = f"with min_pixels {limits.min_pixels} the image has {place.num_tokens} tokens; this server takes "
            raise ImageError(f"{message}{self._max_image_tokens} at most", code="image_too_large")
        fingerprint = self.layout.fingerprint(limits)
        container = "ppm" if image.header.format == "PPM" else "encoded"
        mm_hash = await off_loop(
            len(image.data), self._hasher.mm_hash, image.data,
            fingerprint=fingerprint, container=container, tenant_scope=tenant_scope,
        )  # fmt: skip
        return _Loaded(mm_hash, image, place)


def _text_size(message: Message) -> int:
    if isinstance(message.content, str):
        return len(message.content)
    return sum(len(getattr(part, "text", "")) for part in message.content)


def _decoder_versions() -> str:
    """Another version of these may give other pixels; servers that share a store need not have the same ones."""
    return " ".join(f"{name}={version(name)}" for name in ("pillow", "simplejpeg", "torch"))
