"""Embeddings, and the pixels on the way to them, against open_clip's own pipeline, through the real processes."""

from __future__ import annotations

import asyncio
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmv1.config import EngineArgs, resolve_preprocess
from mmv1.embedding.embedder import Embedder, Embedding, PictureInput, TextInput
from mmv1.embedding.settings import EmbeddingSettings
from mmv1.errors import RequestError
from mmv1.preprocess.crop import cropped
from mmv1.preprocess.media import to_rgb
from tests.pictures import encode, make_image, make_pil
from tests.tiny_clip import make_clip

pytestmark = pytest.mark.slow  # open_clip is imported, here and in the process

SIZES = [
    (32, 32), (224, 224), (33, 32), (32, 47), (31, 17), (9, 70), (1, 1), (3, 150), (640, 427), (427, 640), (1000, 333), (65, 64),
]  # fmt: skip
TEXTS = [
    "a red square", "", "étoile bleue 🙂", "A   Photograph\n of &amp; a train!", "the cat " * 36, "!!! 12345", "ＦＵＬＬ width",
]  # fmt: skip


def pictures() -> list[bytes]:
    """RGB and grey, upright, of four formats: what open_clip's transform gets as it is."""
    made = [make_image(*size, seed, ("JPEG", "PNG", "WEBP")[seed % 3]) for seed, size in enumerate(SIZES)]
    made += [make_image(*size, seed + 100, ("PNG", "JPEG", "WEBP")[seed % 3]) for seed, size in enumerate(SIZES)]
    return [*made, encode(make_pil(70, 50, 1).convert("L"), "JPEG"), encode(make_pil(50, 70, 2).convert("L"), "PNG")]


def converted_pictures() -> list[bytes]:
    """Of other modes, or to be turned: made RGB and upright first, by the engine's rules."""
    transparent = make_pil(60, 40, 3).convert("RGBA")
    transparent.putalpha(make_pil(60, 40, 4).convert("L"))
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    make_pil(90, 40, 5).save(turned, "JPEG", exif=exif)
    return [
        encode(transparent, "PNG"), encode(make_pil(61, 41, 6).convert("P"), "GIF"), turned.getvalue(),
        encode(make_pil(62, 42, 7).convert("CMYK"), "JPEG"), encode(make_pil(63, 43, 8).convert("1"), "PNG"),
    ]  # fmt: skip


def reference(model: str, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
    """As open_clip's README shows it, one by one."""
    import open_clip
    import torch

    architecture, _, weights = model.partition(":")
    open_clip.add_model_config(architecture)
    name = Path(architecture).stem
    net, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    net.eval()
    tokenizer = open_clip.get_tokenizer(name)
    with torch.no_grad():
        rows = [net.encode_image(preprocess(image).unsqueeze(0)) for image in images]
        rows += [net.encode_text(tokenizer([text])) for text in texts]
        return torch.cat([row / row.norm(dim=-1, keepdim=True) for row in rows]).numpy()


def numbers(embeddings: Sequence[Embedding]) -> np.ndarray:
    return np.stack([np.frombuffer(each.values, "<f4") for each in embeddings])


class Running:
    """An embedder with a pool, a slab and a process of its own, and a loop to run it in."""

    def __init__(self, model: str) -> None:
        self.runner = asyncio.Runner()
        self.embedder = Embedder(EmbeddingSettings(model=model), resolve_preprocess(EngineArgs(preprocess_workers=1)))

    def start(self) -> None:
        self.runner.run(self.embedder.start())
        self.runner.run(self.embedder.wait_ready())

    def embed(self, *inputs: TextInput | PictureInput, truncate: bool = False) -> list[Embedding]:
        return self.runner.run(self.embedder.embed(inputs, truncate=truncate))

    def close(self) -> None:
        self.runner.run(self.embedder.close())
        self.runner.close()


@pytest.fixture(scope="module")
def running(tiny_clip: str) -> Iterator[Running]:
    started = Running(tiny_clip)
    started.start()
    try:
        yield started
    finally:
        started.close()


def test_embeddings_are_those_of_open_clip(tiny_clip: str, running: Running) -> None:
    as_they_are, others = pictures(), converted_pictures()
    inputs = [PictureInput(picture) for picture in (*as_they_are, *others)]
    found = running.embed(*inputs, *map(TextInput, TEXTS))
    images = [Image.open(io.BytesIO(picture)) for picture in as_they_are]
    images += [to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(picture)))) for picture in others]
    expected = reference(tiny_clip, images, TEXTS)
    difference = np.abs(numbers(found) - expected).max()
    assert difference < 1e-5, difference
    assert np.abs(np.linalg.norm(numbers(found), axis=1) - 1).max() < 1e-6
    assert np.linalg.matrix_rank(expected) > 10 and len({each.values for each in found}) == len(found)
    assert [each.num_tokens for each in found[: len(inputs)]] == [0] * len(inputs)
    assert [each.num_tokens for each in found[len(inputs) :]][:2] == [5, 2]  # with the tokens that begin and end a text
    stats, pictures_stats = running.embedder.stats(), running.embedder.pictures.stats()
    assert (stats.num_images, stats.num_texts, stats.cache_hits) == (len(inputs), len(TEXTS), 0)
    assert pictures_stats.num_decodes == len(inputs) and pictures_stats.slab_pinned_bytes == pictures_stats.encoded_bytes == 0


def test_a_text_that_is_too_long_is_refused_or_cut(running: Running) -> None:
    fits, too_long = "cat " * 75, "cat " * 76
    (full,) = running.embed(TextInput(fits))
    assert full.num_tokens == 77
    refused = {too_long: "more than the 77 tokens", "x " * 2500: "5000 characters", "\u00e9" * 513: "more than 512 letters"}
    for text, words in refused.items():
        with pytest.raises(RequestError, match=rf"input\[1\]: .*{words}") as caught:
            running.embed(TextInput("a"), TextInput(text, "input[1]"))
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input[1]")
    assert running.embed(TextInput(too_long + "dog " * 2000), truncate=True) == [full]


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_pixels_are_those_of_open_clips_transform(mode: str) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from mmv1.embedding.clip_model import rules_of

    for target, interpolation in itertools.product((32, (32, 32), (24, 40), (50, 33)), ("bicubic", "bilinear", "random")):
        settings = PreprocessCfg(size=target, interpolation=interpolation, resize_mode=mode, fill_color=9)
        to_pixels = image_transform_v2(settings, is_train=False)
        to_pixels.transforms = to_pixels.transforms[:-2]  # less the tensor and the normalisation
        rules = rules_of(asdict(settings))
        for size in SIZES:
            picture = make_pil(*size, seed=1).convert("RGB")
            if mode == "longest" and 0 in (round(side * 24 / max(size)) for side in size):
                continue  # open_clip cannot; here a line of pixels is left
            assert cropped(picture, rules).tobytes() == to_pixels(picture).tobytes(), (rules, size)


def test_a_transform_that_is_none_of_these_is_refused() -> None:
    from mmv1.embedding.clip_model import rules_of

    settings = {"size": 32, "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
    assert rules_of(settings).place().nbytes == 3 * 32 * 32
    for change in ({"resize_mode": "smallest"}, {"interpolation": "nearest"}, {"mode": "L"}):
        with pytest.raises(ValueError, match="not supported"):
            rules_of(settings | change)


def test_a_model_whose_pictures_are_no_squares(tmp_path: Path) -> None:
    from mmv1.embedding.clip_model import ClipModel

    name = make_clip(tmp_path, "tall-clip", image_size=[40, 24])
    model = ClipModel(name)
    assert (model.rules.height, model.rules.width, model.dimensions, model.context_length) == (40, 24, 32, 77)
    made = pictures()[:6]
    found = model.encode_pictures([model.pixels(picture) for picture in made])
    expected = reference(name, [Image.open(io.BytesIO(picture)) for picture in made], [])
    assert np.abs(np.stack([np.frombuffer(values, "<f4") for values in found]) - expected).max() < 1e-5


def test_the_tokenizer_keeps_no_more_words_than_it_may(tiny_clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmv1.embedding import clip_model

    model = clip_model.ClipModel(tiny_clip)
    monkeypatch.setattr(clip_model, "_MAX_WORDS", len(model._words) + 3)
    before = model.tokens("five words are too many", truncate=False)
    assert len(model._tokenizer.cache) == len(model._words)
    after = model.tokens("five words are too many", truncate=False)
    assert before[1] == after[1] == 7 and before[0].tolist() == after[0].tolist()
