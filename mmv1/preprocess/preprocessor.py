"""The one door of this room, in the API server's process: prompts in, token ids and picture references out; pixels on demand.

Pictures are known from their headers alone, so a request is ready for the scheduler as soon as its bytes are here. Nothing is
decoded until the core asks for it. Knows nothing of HTTP servers, schedulers or devices.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

from PIL import Image
from tokenizers import Tokenizer

from mmv1.config import ModelConfig, PreprocessConfig
from mmv1.errors import ConfigError, ContextLengthError, EngineError, ImageError, RequestError
from mmv1.preprocess.fetch import ImageFetcher, parse_data_url
from mmv1.preprocess.hashing import ImageHasher, KeyedHasher
from mmv1.preprocess.layout import ImagePlace, load_layout
from mmv1.preprocess.media import DECODE_POLICY, EncodedImage, ImageLimits, ImageSource, accept_bytes, encode_pil, read_file
from mmv1.preprocess.pixels import PatchRules, PixelService, SendFeature
from mmv1.preprocess.pool import PreprocessPool
from mmv1.preprocess.prompt import Message, PromptRenderer, image_sources
from mmv1.preprocess.slab import SlabLedger, SlabStore, aligned, default_slab_bytes
from mmv1.types import MMFeature, PixelRequest

P = ParamSpec("P")
R = TypeVar("R")

_THREAD_BYTES = 256 << 10  # from here on, work over a picture's or a text's bytes leaves the event loop
_MAX_FETCHES_OF_A_REQUEST = 8  # at once: one request must not take every turn there is


class PreparedPrompt(NamedTuple):
    """A prompt as EngineCoreRequest wants it."""

    prompt_token_ids: list[int]
    mm_features: list[MMFeature]


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


class _Loaded(NamedTuple):
    """One picture, ready to be placed in a prompt."""

    mm_hash: bytes
    image: EncodedImage
    place: ImagePlace


class Preprocessor:
    """Prepares prompts and answers for pixels. One event loop; `start` before, `close` after.

    `send` carries FeatureReady and FeatureFailed to the core. `on_failure` is called, once and with a sentence, when pixels
    can no longer be made at all (it may come from another thread). `secret` keys mm_hash; None: a random one.
    Raises ConfigError where the model directory cannot work.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: PreprocessConfig,
        send: SendFeature,
        *,
        on_failure: Callable[[str], None] = lambda reason: None,
        secret: bytes | None = None,
    ) -> None:
        self.layout = load_layout(model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
        self._max_model_len = model.max_model_len
        self._max_images = config.max_images_per_prompt
        self._on_failure = on_failure
        self._limits = ImageLimits(
            max_encoded_bytes=config.max_encoded_bytes, max_pixels=config.max_image_pixels, max_side=config.max_image_side
        )
        self._prompts = PromptRenderer(
            Path(model.path),
            image_token_id=self.layout.image_token_id,
            video_token_id=self.layout.video_token_id,
            max_model_len=model.max_model_len,
        )
        hasher = KeyedHasher(config.hash_algorithm, secret)
        self._hasher = ImageHasher(hasher, decode_policy=DECODE_POLICY, fingerprint=self.layout.fingerprint)
        self._fetcher = ImageFetcher(
            limits=self._limits, allowed_domains=config.allowed_media_domains, timeout_s=config.fetch_timeout_s
        )
        largest = self.layout.image_bytes(self.layout.max_image_tokens(model.max_model_len))
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
            slab_fd=self.slab.fd, slab_bytes=self.slab.nbytes, num_workers=config.num_workers, on_failure=on_failure
        )
        rules = PatchRules(self.layout.patch_size, self.layout.merge_size, self.layout.resample)
        self._pixels = PixelService(rules=rules, ledger=self._ledger, pool=self._pool, send=send)
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

    async def wait_ready(self) -> None:
        """Wait until every pool process has come up. Raises EngineError if the pool ends before."""
        await self._pool.wait_ready()

    async def close(self) -> None:
        await self._pixels.close()
        await self._pool.close()
        await self._fetcher.close()
        self.slab.close()

    async def prepare_chat(self, request_id: str, messages: Sequence[Message]) -> PreparedPrompt:
        """Fetch, probe and hash the pictures, render and tokenize the conversation. From here on the pictures' bytes are kept
        for `request_id`, until `release_request`. Raises RequestError (ImageError, ContextLengthError)."""
        if not messages:
            raise RequestError("messages must not be empty", param="messages")
        sources = image_sources(messages)
        self._check_number(len(sources))
        size = sum(_text_size(message) for message in messages)
        token_ids = await _off_loop(size, self._prompts.render_chat, messages)
        return await self._prepare(request_id, token_ids, sources)

    async def prepare_prompt(
        self, request_id: str, prompt: str | Sequence[int], images: Sequence[ImageSource] = ()
    ) -> PreparedPrompt:
        """The same for a raw prompt, as text in which special tokens mean themselves or as ids, with one placeholder per
        picture."""
        self._check_number(len(images))
        if isinstance(prompt, str):
            token_ids = await _off_loop(len(prompt), self._prompts.render_text, prompt)
        else:
            token_ids = self._prompts.check_ids(prompt)
        return await self._prepare(request_id, token_ids, images)

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
        return PreprocessStats(
            num_images_probed=self._num_probed,
            num_decodes=self._pixels.num_decodes,
            num_decode_failures=self._pixels.num_failures,
            decode_seconds=self._pixels.decode_seconds,
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
        )

    def _check_number(self, num_images: int) -> None:
        if num_images > self._max_images:
            message = f"the prompt has {num_images} images; at most {self._max_images} are allowed"
            raise ImageError(message, code="too_many_images")

    async def _prepare(self, request_id: str, token_ids: list[int], sources: Sequence[ImageSource]) -> PreparedPrompt:
        if request_id in self._requests:
            raise EngineError(f"request id {request_id} is in use")
        if not token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        self._prompts.expand(token_ids, [1] * len(sources))  # the structure is checked before anything is fetched
        pictures = await self._load_all(sources)
        total = len(token_ids) - len(pictures) + sum(picture.place.num_tokens for picture in pictures)
        if total >= self._max_model_len:
            message = f"the prompt has {total} tokens; with at least one token of answer this model takes {self._max_model_len}"
            raise ContextLengthError(message)
        for picture in pictures:
            self._ledger.check_admissible(picture.place.nbytes)
        expanded, offsets = self._prompts.expand(token_ids, [picture.place.num_tokens for picture in pictures])
        features = [
            MMFeature(picture.mm_hash, offset, picture.place.num_tokens, picture.place.grid_thw)
            for picture, offset in zip(pictures, offsets, strict=True)
        ]
        self._requests[request_id] = [picture.mm_hash for picture in pictures]
        for picture in pictures:
            self._pixels.add_reference(*picture)
        return PreparedPrompt(expanded, features)

    async def _load_all(self, sources: Sequence[ImageSource]) -> list[_Loaded]:
        """All pictures at once; the first that fails ends the others. With several, the message says which one it was."""
        turns = asyncio.Semaphore(_MAX_FETCHES_OF_A_REQUEST)

        async def load(number: int, source: ImageSource) -> _Loaded:
            try:
                return await self._load(source, turns)
            except ImageError as error:
                if len(sources) == 1:
                    raise
                raise ImageError(f"image {number}: {error.message}", code=error.code, param=error.param) from None

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(load(number, source)) for number, source in enumerate(sources, 1)]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _load(self, source: ImageSource, turns: asyncio.Semaphore) -> _Loaded:
        image = await self._encoded(source, turns)
        self._num_probed += 1
        place = self.layout.place(image.header.width, image.header.height)
        container = "ppm" if image.header.format == "PPM" else "encoded"
        mm_hash = await _off_loop(len(image.data), lambda: self._hasher.mm_hash(image.data, container=container))
        return _Loaded(mm_hash, image, place)

    async def _encoded(self, source: ImageSource, turns: asyncio.Semaphore) -> EncodedImage:
        """The picture's bytes, wherever they are; a download waits for one of its request's `turns`. Raises ImageError."""
        if isinstance(source, Image.Image):
            return await _off_loop(3 * source.width * source.height, encode_pil, source, self._limits)
        if isinstance(source, Path):
            return await asyncio.to_thread(read_file, source, self._limits)
        if isinstance(source, bytes):
            return accept_bytes(source, self._limits)
        if source[:5].lower() == "data:":
            data = await _off_loop(len(source), parse_data_url, source, self._limits)
        else:
            async with turns:
                data = await self._fetcher.fetch(source)
        return accept_bytes(data, self._limits)


def _text_size(message: Message) -> int:
    if isinstance(message.content, str):
        return len(message.content)
    return sum(len(getattr(part, "text", "")) for part in message.content)


async def _off_loop(size: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call here when the work is small, in a thread when it would hold up the event loop."""
    if size < _THREAD_BYTES:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)
