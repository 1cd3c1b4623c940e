"""Conversations as tensors of fixed sizes: many are laid end to end, and lists of boundaries keep them apart.

Done by worker processes ahead of the GPU. Pictures go through their JPEG or PNG file and the resizing rule of the family's
processor; patches are put in the order of attention windows here, so that the tower need not sort them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from demo_model.data import SYSTEM, Example
from demo_model.model import MAX_PIXELS, MIN_PIXELS

PATCH, MERGE, WINDOW = 14, 2, 112  # pixels, patches, pixels
MAX_WINDOW = (WINDOW // PATCH) ** 2  # patches
MAX_PICTURE = MAX_PIXELS // PATCH**2  # patches
MAX_TEXT = 1024  # tokens of one conversation, pictures included


class Pack(NamedTuple):
    """Conversations end to end. Boundaries (cu_*) begin with 0, end with the capacity, and repeat the end where there are
    fewer parts; the filling behind the last conversation is cut into parts of its own."""

    patches: Tensor  # uint8 [PATCHES, 588], in window order
    patch_positions: Tensor  # int16 [2, PATCHES]: row, column
    cu_windows: Tensor  # int32
    cu_pictures: Tensor  # int32
    destinations: Tensor  # int32 [PATCHES / 4]: which token a merged patch becomes
    tokens: Tensor  # int16 [TOKENS]
    positions: Tensor  # int16 [3, TOKENS]: time, row, column
    cu_texts: Tensor  # int32
    answer_places: Tensor  # int64 [ANSWERS]: tokens whose next is part of an answer
    answer_tokens: Tensor  # int64 [ANSWERS]: that next token; -100 is filling
    answer_turns: Tensor  # int64 [ANSWERS]: the number, inside the pack, of the turn it belongs to


class Sizes(NamedTuple):
    """Capacities of a pack."""

    patches: int = 28672
    tokens: int = 28672
    windows: int = 2048
    pictures: int = 512
    texts: int = 512
    answers: int = 6144


class Encoded(NamedTuple):
    """One conversation; the fields are Pack's, counted from its own beginning."""

    patches: list[np.ndarray]
    patch_positions: list[np.ndarray]
    windows: list[np.ndarray]  # lengths
    tokens: np.ndarray
    positions: np.ndarray
    destinations: list[np.ndarray]
    answers: list[tuple[int, int, int]]  # place, token, turn


@lru_cache(maxsize=1024)
def _grid(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For a picture of rows x columns patches: the window order of its merged patches, the window lengths in patches, and the
    row and column of each patch in that order."""
    grid = torch.tensor([[1, rows, columns]])
    order, boundaries = get_vision_window_index(grid, MERGE, WINDOW, PATCH)
    places = get_vision_position_ids(grid, MERGE).reshape(-1, MERGE**2, 2)[order].reshape(-1, 2)
    lengths = torch.unique_consecutive(boundaries).diff()
    return order.numpy(), lengths.numpy(), places.T.numpy().astype(np.int16)


def picture_patches(data: bytes) -> tuple[np.ndarray, int, int]:
    """uint8 [rows * columns / 4, 4, 588] of an encoded picture, merged patches in reading order, and its grid."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    height, width = smart_resize(picture.height, picture.width, PATCH * MERGE, MIN_PIXELS, MAX_PIXELS)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    rows, columns = height // PATCH, width // PATCH
    pixels = np.asarray(picture).reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(-1, MERGE**2, 3 * PATCH**2), rows, columns


class Encoder:
    """Turns examples into tokens and patches, as the processor and the chat template of `model_dir` would."""

    def __init__(self, model_dir: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self.image, self.end = (self.tokenizer.token_to_id(token) for token in ("<|image_pad|>", "<|im_end|>"))
        self.start = self.tokenizer.token_to_id("<|im_start|>")
        self.assistant = self.tokenizer.encode("assistant\n").ids

    def encode(self, example: Example, *, last_turn_only: bool = False) -> Encoded:
        """All answers are to be learnt, or only the last."""
        encoded = Encoded([], [], [], np.empty(0), np.empty(0), [], [])
        grids = [self._show(scene.encoded(), encoded) for scene in example.scenes]
        text = self.tokenizer.encode(conversation_text(example)).ids
        tokens: list[int] = []
        positions: list[np.ndarray] = []
        begin = position = 0
        for grid in grids:
            place = text.index(self.image, begin)
            tokens += text[begin:place]
            positions.append(np.tile(np.arange(position, position + place - begin), (3, 1)))
            position += place - begin
            height, width = grid[0] // MERGE, grid[1] // MERGE
            encoded.destinations.append(len(tokens) + _grid(*grid)[0])
            tokens += [self.image] * (height * width)
            positions.append(np.indices((1, height, width)).reshape(3, -1) + position)
            position += max(height, width)
            begin = place + 1
        tokens += text[begin:]
        positions.append(np.tile(np.arange(position, position + len(text) - begin), (3, 1)))
        self._mark_answers(tokens, encoded.answers, last_turn_only)
        return encoded._replace(tokens=np.array(tokens, np.int16), positions=np.concatenate(positions, axis=1).astype(np.int16))

    def _show(self, data: bytes, encoded: Encoded) -> tuple[int, int]:
        merged, rows, columns = picture_patches(data)
        order, lengths, places = _grid(rows, columns)
        encoded.patches.append(merged[order].reshape(rows * columns, -1))
        encoded.patch_positions.append(places)
        encoded.windows.append(lengths)
        return rows, columns

    def _mark_answers(self, tokens: Sequence[int], answers: list[tuple[int, int, int]], last_turn_only: bool) -> None:
        """Everything between "assistant\\n" and the end of its turn, that end included."""
        header = len(self.assistant) + 1
        begins = [at for at, token in enumerate(tokens) if token == self.start]
        starts = [at for at in begins if list(tokens[at + 1:at + header]) == self.assistant]
        for turn, start in enumerate(starts[-1:] if last_turn_only else starts):
            place = start + header - 1
            while tokens[place] != self.end:
                answers.append((place, tokens[place + 1], turn))
                place += 1


def conversation_text(example: Example) -> str:
    """What the chat template makes of it, the last answer included."""
    pictures = "<|vision_start|><|image_pad|><|vision_end|>" * len(example.scenes)
    parts = [f"<|im_start|>system\n{example.system or SYSTEM}<|im_end|>\n"]
    for number, turn in enumerate(example.turns):
        question = turn.question
        if number == 0:
            question = question + pictures if example.text_first else pictures + question
        parts.append(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{turn.answer}<|im_end|>\n")
    return "".join(parts)


def packs(conversations: Iterable[Encoded], sizes: Sizes) -> Iterator[Pack]:
    """Packs as full as they get in order."""
    waiting: list[Encoded] = []
    used = np.zeros(6, np.int64)
    filling = [0, 1, sizes.patches // MAX_WINDOW + 1, sizes.patches // MAX_PICTURE + 1, sizes.tokens // MAX_TEXT + 1, 0]
    limits = np.array(sizes) - np.array(filling)  # the filling has parts too
    for one in conversations:
        needs = np.array([
            sum(map(len, one.patches)), len(one.tokens), sum(map(len, one.windows)), len(one.patches), 1, len(one.answers)
        ])
        if needs[1] > MAX_TEXT:
            continue
        if np.any(used + needs > limits):
            yield _pack(waiting, sizes)
            waiting, used = [], np.zeros(6, np.int64)
        waiting.append(one)
        used += needs
    if waiting:
        yield _pack(waiting, sizes)


def _pack(waiting: Sequence[Encoded], sizes: Sizes) -> Pack:
    patches = np.zeros((sizes.patches, 3 * PATCH**2), np.uint8)
    patch_positions = np.zeros((2, sizes.patches), np.int16)
    destinations = np.full(sizes.patches // MERGE**2, sizes.tokens - 1, np.int32)  # filling goes to the last token, a filling
    tokens, positions = np.zeros(sizes.tokens, np.int16), np.zeros((3, sizes.tokens), np.int16)
    answers = np.zeros((3, sizes.answers), np.int64)
    answers[1] = -100
    windows: list[int] = []
    pictures: list[int] = []
    texts: list[int] = []
    patch = token = answer = turn = 0
    for one in waiting:
        for some, places, lengths, where in zip(one.patches, one.patch_positions, one.windows, one.destinations, strict=True):
            patches[patch:patch + len(some)] = some
            patch_positions[:, patch:patch + len(some)] = places
            destinations[patch // 4:(patch + len(some)) // 4] = where + token
            windows.extend(lengths)
            pictures.append(len(some))
            patch += len(some)
        marked = np.array(one.answers, np.int64).T
        answers[:, answer:answer + marked.shape[1]] = marked + np.array([[token], [0], [turn - marked[2, 0]]])
        answer += marked.shape[1]
        turn += marked[2, -1] - marked[2, 0] + 1
        tokens[token:token + len(one.tokens)] = one.tokens
        positions[:, token:token + len(one.tokens)] = one.positions
        texts.append(len(one.tokens))
        token += len(one.tokens)
    return Pack(
        torch.from_numpy(patches), torch.from_numpy(patch_positions),
        _boundaries(windows, sizes.patches, MAX_WINDOW, sizes.windows),
        _boundaries(pictures, sizes.patches, MAX_PICTURE, sizes.pictures),
        torch.from_numpy(destinations), torch.from_numpy(tokens), torch.from_numpy(positions),
        _boundaries(texts, sizes.tokens, MAX_TEXT, sizes.texts),
        torch.from_numpy(answers[0]), torch.from_numpy(answers[1]), torch.from_numpy(answers[2]),
    )


def _boundaries(lengths: Sequence[int], end: int, longest: int, capacity: int) -> Tensor:
    ends = np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))])
    filling = np.append(np.arange(ends[-1] + longest, end, longest), end) if ends[-1] < end else np.empty(0, np.int64)
    boundaries = np.concatenate([ends, filling])
    if len(boundaries) > capacity + 1:
        raise ValueError(f"{len(boundaries) - 1} parts in a pack made for {capacity}")
    return torch.from_numpy(np.pad(boundaries, (0, capacity + 1 - len(boundaries)), constant_values=end).astype(np.int32))
