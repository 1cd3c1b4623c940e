"""The one door of this room, in the API server's process: prompts in, token ids and picture references out; pixels on demand.

Pictures are known from their headers alone, so a request is ready for the scheduler as soon as its bytes are here. Nothing is
decoded until the core asks for it. Knows nothing of HTTP servers, schedulers or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from mmv1.config import ModelConfig, PreprocessConfig
from mmv1.errors import ContextLengthError, EngineError, ImageError, RequestError
from mmv1.preprocess.image_loader import naming_the_image, off_loop
from mmv1.preprocess.image_settings import NOTHING_SAID, ImageSettings
from mmv1.preprocess.layout import ImagePlace, PixelLimits, load_layout
from mmv1.preprocess.media import EncodedImage, ImageSource
from mmv1.preprocess.pictures import Pictures, PreprocessStats
from mmv1.preprocess.pixels import PatchRules, SendFeature
from mmv1.preprocess.prompt import ImagePart, Message, PromptRenderer, image_parts
from mmv1.preprocess.slab import SlabStore
from mmv1.preprocess.timings import StageTimings
from mmv1.types import MMFeature, PixelRequest

_TEXT_COST = 64  # a character is worth at least so many bytes of a picture: tokenizing is that much slower than hashing


class PreparedPrompt(NamedTuple):
    """A prompt as EngineCoreRequest wants it."""

    prompt_token_ids: list[int]
    mm_features: list[MMFeature]

    @property
    def num_image_tokens(self) -> int:
        return sum(feature.num_tokens for feature in self.mm_features)


class _Loaded(NamedTuple):
    """One picture, ready to be placed in a prompt."""

    mm_hash: bytes
    image: EncodedImage
    place: ImagePlace


class Preprocessor:
    """Prepares prompts and answers for pixels. One event loop; `start` before, `close` after.

    `send`, `on_failure`: see Pictures. Raises ConfigError where the model directory cannot work.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: PreprocessConfig,
        send: SendFeature,
        *,
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.layout = load_layout(model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
        self._rules = PatchRules(self.layout.patch_size, self.layout.merge_size, self.layout.resample)
        self._max_model_len = model.max_model_len
        self._max_images = config.max_images_per_prompt
        self._prompts = PromptRenderer(
            Path(model.path),
            image_token_id=self.layout.image_token_id,
            video_token_id=self.layout.video_token_id,
            max_model_len=model.max_model_len,
        )
        self._max_image_tokens = self.layout.max_image_tokens(model.max_model_len)
        self.pictures = Pictures(
            config,
            send,
            largest_bytes=self.layout.image_bytes(self._max_image_tokens),
            ordinary_bytes=self.layout.ordinary_image_bytes(),
            on_failure=on_failure,
        )
        self._requests: dict[str, list[bytes]] = {}  # request_id -> hashes it refers to, one per picture

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, to be shared: a second copy costs as much memory again."""
        return self._prompts.tokenizer

    @property
    def slab(self) -> SlabStore:
        return self.pictures.slab

    @property
    def timings(self) -> StageTimings:
        return self.pictures.timings

    async def start(self) -> None:
        """Start what processes pictures, in the background; prompts can be prepared at once."""
        await self.pictures.start()

    async def wait_ready(self) -> None:
        """Raises EngineError, ConfigError: see Pictures."""
        await self.pictures.wait_ready()

    async def close(self) -> None:
        await self.pictures.close()

    async def prepare_chat(
        self,
        request_id: str,
        messages: Sequence[Message],
        image_settings: ImageSettings = NOTHING_SAID,
        *,
        tools: Sequence[dict[str, Any]] = (),
        template_settings: Mapping[str, Any] = MappingProxyType({}),
        max_prompt_tokens: int | None = None,
        tenant_scope: bytes = b"",
    ) -> PreparedPrompt:
        """Fetch, probe and hash the pictures, render and tokenize the conversation. From here on the pictures' bytes are kept
        for `request_id`, until `release_request`. `image_settings` are the request's, for all pictures that do not say
        otherwise. `tools`, `template_settings`: see `PromptRenderer.render_chat`. `max_prompt_tokens`: None leaves room for one
        token of answer.
        `tenant_scope` enters mm_hash: pictures of different scopes share nothing. Nothing is downloaded for a prompt that is
        refused anyway. Raises RequestError (ImageError, ContextLengthError)."""
        if not messages:
            raise RequestError("messages must not be empty", param="messages")
        pictures = image_parts(messages)
        self._check_number(len(pictures))
        size = sum(_text_size(message) for message in messages) + _json_size([*tools, template_settings])
        token_ids = await off_loop(_TEXT_COST * size, self._prompts.render_chat, messages, tools, template_settings)
        return await self._prepare(request_id, token_ids, pictures, image_settings, max_prompt_tokens, tenant_scope)

    async def prepare_prompt(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        images: Sequence[ImageSource] = (),
        image_settings: ImageSettings = NOTHING_SAID,
        *,
        add_special_tokens: bool = True,
        max_prompt_tokens: int | None = None,
        tenant_scope: bytes = b"",
    ) -> PreparedPrompt:
        """The same for a raw prompt, as text (see `PromptRenderer.render_text`) or as ids, with one placeholder per picture."""
        self._check_number(len(images))
        if isinstance(prompt, str):
            token_ids = await off_loop(
                _TEXT_COST * len(prompt), self._prompts.render_text, prompt, add_special_tokens=add_special_tokens
            )
        else:
            token_ids = self._prompts.check_ids(prompt)
        parts = [ImagePart(image) for image in images]
        return await self._prepare(request_id, token_ids, parts, image_settings, max_prompt_tokens, tenant_scope)

    def text_token_ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Of a text without pictures, which may be empty."""
        return self._prompts.render_text(text, add_special_tokens=add_special_tokens)

    def release_request(self, request_id: str) -> None:
        """The request has ended: its pictures' bytes are dropped, unless another request refers to them. Unknown ids are
        ignored. The core's own holds on pixels are not touched."""
        for mm_hash in self._requests.pop(request_id, ()):
            self.pictures.pixels.drop_reference(mm_hash)

    def request_pixels(self, request: PixelRequest) -> None:
        """The core asks for a picture's pixels. The answer goes through `send`, carrying the newest ticket of its hash."""
        self.pictures.pixels.request(request)

    def release_pixels(self, mm_hash: bytes) -> None:
        """The core no longer holds or awaits these pixels; no answer to an earlier request is sent any more."""
        self.pictures.pixels.release(mm_hash)

    def stats(self) -> PreprocessStats:
        return self.pictures.stats()

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
        for read in (self.pictures.loader.read_local, self.pictures.loader.download):
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
            self.pictures.pixels.add_reference(*picture, self._rules)
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
            self.pictures.check_admissible(picture.place.nbytes)

    async def _load(self, image: EncodedImage, limits: PixelLimits, tenant_scope: bytes) -> _Loaded:
        place = self.layout.place(image.header.width, image.header.height, limits)
        if self._max_image_tokens < place.num_tokens < self._max_model_len:  # longer ones are the whole prompt's matter
            message = f"with min_pixels {limits.min_pixels} the image has {place.num_tokens} tokens; this server takes "
            raise ImageError(f"{message}{self._max_image_tokens} at most", code="image_too_large")
        mm_hash = await self.pictures.mm_hash(image, self.layout.fingerprint(limits), tenant_scope)
        return _Loaded(mm_hash, image, place)


def _text_size(message: Message) -> int:
    """Characters that the template is given of a message."""
    size = _json_size(message.tool_calls)
    if isinstance(message.content, str):
        return size + len(message.content)
    return size + sum(len(getattr(part, "text", "")) for part in message.content)


def _json_size(value: Any) -> int:
    """Characters of JSON's texts and names; anything else counts as a few. Without recursion: its depth is the client's."""
    size, unseen = 0, [value]
    while unseen:
        one = unseen.pop()
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, Mapping):
            unseen += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple)):
            unseen += one
        size += 4
    return size
