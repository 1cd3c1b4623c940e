"""A conversation, a raw text or token ids, made into prompt token ids with every picture's placeholder expanded.

The chat template is rendered and tokenized with ONE placeholder per picture; expansion happens on ids. What a user typed is
text and nothing else: a special token's spelling in it becomes ordinary tokens, never the special id. For all other input the
ids equal those of transformers' `processor.apply_chat_template(..., tokenize=True)`.
"""

from __future__ import annotations

import datetime
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from tokenizers import Tokenizer, decoders

from mmv1.config import read_json
from mmv1.errors import ConfigError, ContextLengthError, RequestError
from mmv1.preprocess.image_settings import NOTHING_SAID, ImageSettings
from mmv1.preprocess.media import ImageSource

_NFC_JOINS = 3  # at most so many bytes become one when a tokenizer brings text into normal form C

_ROLE = re.compile(r"[a-z_]{1,32}")
_OURS = {"messages", "tools", "documents", "add_generation_prompt"}  # variables of templates
_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    source: ImageSource
    settings: ImageSettings = NOTHING_SAID


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` as the chat template knows it: system, user, assistant, tool. `tool_calls` are the assistant's, each
    {"id": ..., "type": "function", "function": {"name": ..., "arguments": {...}}}; `tool_call_id` names the one answered."""

    role: str
    content: str | Sequence[TextPart | ImagePart]
    tool_calls: Sequence[dict[str, Any]] = ()
    tool_call_id: str | None = None


def image_parts(messages: Sequence[Message]) -> list[ImagePart]:
    """The pictures of a conversation, in the order of their placeholders."""
    parts = (part for message in messages if not isinstance(message.content, str) for part in message.content)
    return [part for part in parts if isinstance(part, ImagePart)]


class PromptRenderer:
    """Everything that turns prompts into token ids, read once from the model directory.

    `tokenizer` is shared with whoever turns ids back into text; encoding with it never yields a special id, special tokens
    being split off before. Raises ConfigError where the directory lacks what is needed.

    Text that cannot possibly fit `max_model_len` tokens is refused before the work of tokenizing it. A model without a
    placeholder for pictures (None) has a template that knows content as text alone.
    """

    def __init__(
        self, model_dir: Path, *, image_token_id: int | None, video_token_id: int | None, max_model_len: int
    ) -> None:
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        except Exception:  # the library raises a bare Exception
            raise ConfigError("the model directory has no readable tokenizer.json") from None
        self.tokenizer.encode_special_tokens = True
        added = self.tokenizer.get_added_tokens_decoder()
        specials = {token.content: (token_id, token) for token_id, token in added.items() if token.special}
        self._special_ids = {text: token_id for text, (token_id, _) in specials.items()}
        self._specials = _any_of([_with_spaces(text, token) for text, (_, token) in _longest_first(specials)])
        self._shield = _Shield(list(specials))
        self._image_token_id = image_token_id
        self._video_token_id = video_token_id
        self._prefix = _prefix_of(self.tokenizer)
        self._max_text_bytes = _max_text_bytes(self.tokenizer, max_model_len)
        self._max_model_len = max_model_len
        self._vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        config = read_json(model_dir / "tokenizer_config.json")
        self._template_variables = {name: _token_text(config[name]) for name in _SPECIAL_TOKEN_NAMES if config.get(name)}
        source = _find_template(model_dir, config)
        self._template = None if source is None else _compile(source)
        known = set() if self._template is None else _variables_of(self._template, source)
        self._takes_tools = "tools" in known
        self._settings = known - _OURS - set(_SPECIAL_TOKEN_NAMES)  # what is left is the request's to set

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        settings: Mapping[str, Any] = MappingProxyType({}),
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation, one placeholder per picture. `tools`: what the template shows of functions to call, each
        {"type": "function", "function": {...}}. `settings`: values of the template's own variables, such as Qwen3's
        enable_thinking. Raises RequestError."""
        if self._template is None:
            raise RequestError("this model has no chat template: send a plain prompt", param="messages")
        self._check_settings(settings)
        if not self._takes_tools and (tools or any(message.role == "tool" or message.tool_calls for message in messages)):
            message, param = "this model's chat template takes no tools", "tools" if tools else "messages"
            raise RequestError(message, code="unsupported_parameter", param=param)
        try:
            turns = [self._turn(message) for message in messages]
            own = {name: self._cover_all(value) for name, value in settings.items()}
            variables = {**own, **self._template_variables, "add_generation_prompt": add_generation_prompt}
            shown = [self._cover_all(tool) for tool in tools] or None
            text = self._template.render(messages=turns, tools=shown, documents=None, **variables)
        except jinja2.TemplateError as error:
            raise RequestError(f"the model's chat template refuses these messages: {error.message}", param="messages") from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError):
            raise RequestError("the model's chat template cannot render these messages", param="messages") from None
        return self._encode(text)

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raises RequestError for one that the template does not know, or that is ours to set."""
        unknown = next((name for name in settings if name not in self._settings), None)
        if unknown is not None:
            known = f"it has {', '.join(sorted(self._settings))}" if self._settings else "it has none"
            message = f"the model's chat template has no setting '{unknown[:64]}'; {known}"
            raise RequestError(message, code="unsupported_parameter", param="chat_template_kwargs")

    def render_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a raw prompt, in which special tokens mean themselves; one placeholder per picture. Unless told otherwise,
        first comes what the tokenizer puts before every text (some families' beginning-of-sequence token), which a chat template
        writes itself."""
        ids = self._encode(text)
        return self._prefix + ids if add_special_tokens else ids

    def check_ids(self, token_ids: Sequence[int]) -> list[int]:
        """A raw prompt given as ids, one placeholder per picture. Raises RequestError."""
        ids = list(token_ids)
        if not all(isinstance(token, int) and 0 <= token < self._vocab_size for token in ids):
            raise RequestError(f"prompt token ids must be integers from 0 to {self._vocab_size - 1}", param="prompt")
        return ids

    def expand(self, token_ids: list[int], num_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """Repeat the i-th placeholder num_tokens[i] times: the new ids, and each picture's offset in them.

        Raises RequestError when placeholders and pictures do not correspond.
        """
        places = [index for index, token in enumerate(token_ids) if token == self._image_token_id]
        if len(places) != len(num_tokens):
            message = f"the prompt has {len(places)} placeholders for {len(num_tokens)} images"
            raise RequestError(message, code="image_placeholder_mismatch", param="messages")
        if self._video_token_id is not None and self._video_token_id in token_ids:
            raise RequestError("the prompt has a placeholder for a video, which is not supported", param="messages")
        expanded: list[int] = []
        offsets: list[int] = []
        done = 0
        for place, count in zip(places, num_tokens, strict=True):
            expanded += token_ids[done:place]
            offsets.append(len(expanded))
            expanded += [token_ids[place]] * count
            done = place + 1
        return expanded + token_ids[done:], offsets

    def _turn(self, message: Message) -> dict[str, Any]:
        if not _ROLE.fullmatch(message.role):
            raise RequestError("a message's role must be a short lower-case word", param="messages")
        turn: dict[str, Any] = {"role": message.role}
        if isinstance(message.content, str):
            turn["content"] = self._shield.cover(message.content)
        elif self._image_token_id is None:
            turn["content"] = "\n".join(self._shield.cover(part.text) for part in message.content if isinstance(part, TextPart))
        else:
            turn["content"] = [
                {"type": "text", "text": self._shield.cover(part.text)} if isinstance(part, TextPart) else {"type": "image"}
                for part in message.content
            ]
        if message.tool_calls:
            turn["tool_calls"] = [self._cover_all(call) for call in message.tool_calls]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = self._shield.cover(message.tool_call_id)
        return turn

    def _cover_all(self, value: Any) -> Any:
        """JSON with every text in it covered."""
        if isinstance(value, str):
            return self._shield.cover(value)
        if isinstance(value, dict):
            return {self._shield.cover(name): self._cover_all(each) for name, each in value.items()}
        return [self._cover_all(each) for each in value] if isinstance(value, list) else value

    def _encode(self, text: str) -> list[int]:
        """Split at special tokens, encode what lies between as plain text. Raises ContextLengthError."""
        plain: list[str] = []
        special_ids: list[int] = []  # each between two of `plain`
        position = 0
        for match in self._specials.finditer(text):
            plain.append(self._shield.uncover(text[position : match.start()]))
            special = match.group()
            special_ids.append(self._special_ids[special if special in self._special_ids else special.strip()])
            position = match.end()
        plain.append(self._shield.uncover(text[position:]))
        try:
            num_bytes = sum(len(piece.encode()) for piece in plain)
        except UnicodeEncodeError:
            raise RequestError("the prompt's text has half a surrogate pair, which is no character") from None
        if self._max_text_bytes is not None and num_bytes > self._max_text_bytes:
            limit = f"with at least one token of answer this model takes {self._max_model_len} tokens"
            raise ContextLengthError(f"the prompt has {num_bytes} bytes of text, which cannot fit: {limit}")
        ids = self._encode_plain(plain[0])
        for special_id, piece in zip(special_ids, plain[1:], strict=True):
            ids.append(special_id)
            ids += self._encode_plain(piece)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """In a batch of one: unlike `encode` it lets other threads run meanwhile, and unlike a larger batch it wakes no threads
        of the library's own, which takes as much of the processor as an ordinary prompt itself."""
        return list(self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids) if text else []


def _prefix_of(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer's own rules put before a text."""
    text = "a"
    with_special, plain = (tokenizer.encode(text, add_special_tokens=special).ids for special in (True, False))
    place = next((i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain), 0)
    return list(with_special[:place])


def _max_text_bytes(tokenizer: Tokenizer, max_model_len: int) -> int | None:
    """No text with more bytes of UTF-8 can have `max_model_len` tokens or fewer. None where nothing is known: only a byte-level
    vocabulary promises that every byte of the text is in a token."""
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)  # a character for every byte
    added = (len(token.content.encode()) for token in tokenizer.get_added_tokens_decoder().values())
    return max_model_len * max(max(map(len, vocabulary), default=1), *added, 1) * _NFC_JOINS


class _Shield:
    """Covers special tokens' spellings in user text while it passes through the template, so that only the template's own
    are seen as special afterwards.

    A cover is a private-use character, a random word of this process, the spelling's number, and the character again: it has
    no spaces for a template to strip and cannot be guessed. The beginning of a spelling at the end of a text is covered too,
    or two neighbouring texts could spell a special token together.
    """

    def __init__(self, specials: list[str]) -> None:
        beginnings = {special[:length] for special in specials for length in range(1, len(special))}
        self._spellings = sorted(beginnings | set(specials))
        self._number = {spelling: number for number, spelling in enumerate(self._spellings)}
        self._exposed = re.compile(
            f"{_any_of([re.escape(s) for s in sorted(specials, key=len, reverse=True)]).pattern}"
            rf"|{_any_of([re.escape(s) for s in sorted(beginnings, key=len, reverse=True)]).pattern}(?=\s*\Z)"
        )
        self._mark = f"\ue0f1{secrets.token_hex(8)}."
        self._covered = re.compile(re.escape(self._mark) + "([0-9]+)\ue0f1")

    def cover(self, text: str) -> str:
        return self._exposed.sub(lambda match: f"{self._mark}{self._number[match.group()]}\ue0f1", text)

    def uncover(self, text: str) -> str:
        return self._covered.sub(lambda match: self._spellings[int(match.group(1))], text)


def _longest_first(specials: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(specials.items(), key=lambda item: len(item[0]), reverse=True)


def _with_spaces(text: str, token: Any) -> str:
    """The pattern of one special token, with the spaces it takes to itself."""
    return (r"\s*" if token.lstrip else "") + re.escape(text) + (r"\s*" if token.rstrip else "")


def _any_of(patterns: list[str]) -> re.Pattern[str]:
    return re.compile(f"(?:{'|'.join(patterns)})" if patterns else r"(?!)")


def _token_text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _find_template(model_dir: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template.json, else tokenizer_config.json; transformers' order. None: the model has none."""
    try:
        return (model_dir / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    template = read_json(model_dir / "chat_template.json").get("chat_template") or tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((named["template"] for named in template if named.get("name") == "default"), None)
    return template


def _compile(source: str) -> jinja2.Template:
    """The template in a sandbox, with what transformers offers to templates. Raises ConfigError."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the model's chat template has an error in line {error.lineno}: {error.message}") from None


def _variables_of(template: jinja2.Template, source: str | None) -> set[str]:
    """What it expects to be given: neither set in it nor offered to every template."""
    environment = template.environment
    return jinja2.meta.find_undeclared_variables(environment.parse(source or "")) - set(environment.globals)


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks assistant text for training; here it renders what it encloses."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)
