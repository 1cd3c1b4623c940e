"""Pictures made to be confused with others, to cost more than they weigh, or to break what reads them: over HTTP."""

from __future__ import annotations

import io
import json
import math
import struct
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from tests.integration.errors import assert_is_clear_error
from tests.integration.server import Server, ask, body, image, private_mib, text
from tests.integration.test_server_errors import png_of_zeros
from tests.integration.web import Web
from tests.oracle import HFOracle
from tests.pictures import data_url, make_image, make_pil

pytestmark = pytest.mark.slow

MAX_BODY_MIB = 32


def saved(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def probabilities(server: Server, request: dict[str, Any]) -> dict[str, float]:
    """Of the likeliest first tokens of the answer: enough to tell any two pictures apart."""
    answer = server.post(request | {"logprobs": True, "top_logprobs": 20, "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    (first,) = answer.json()["choices"][0]["logprobs"]["content"]
    return {bytes(top["bytes"]).hex(): top["logprob"] for top in first["top_logprobs"]}


def distance(a: dict[str, float], b: dict[str, float]) -> float:
    """The largest difference of what both name; infinite where they have little in common."""
    shared = a.keys() & b.keys()
    return max(abs(a[token] - b[token]) for token in shared) if len(shared) > 10 else math.inf


SAME = 2e-4  # two computations of one thing, in other batches
DIFFERENT = 1e-3


# ---- pictures that look alike to a careless key -------------------------------------------------------------------------


def confusable() -> dict[str, tuple[bytes, bytes]]:
    """By what alone tells them apart: pairs of files. All but two of the pairs have the same raw pixel bytes."""
    raw = np.random.default_rng(3).integers(0, 256, 120 * 90 * 3, dtype=np.uint8)
    wide = Image.frombytes("RGB", (120, 90), raw.tobytes())
    grey = Image.frombytes("L", (120, 90), raw.tobytes())
    palette, other_palette = grey.copy(), grey.copy()
    palette.putpalette(bytes(range(256)) * 3)
    other_palette.putpalette(bytes(range(255, -1, -1)) * 3)
    bits = raw[: 128 * 64 // 8].tobytes()
    pixels4 = Image.frombytes("RGBA", (100, 80), raw[:32_000].tobytes())
    return {
        "size": (saved(wide), saved(Image.frombytes("RGB", (90, 120), raw.tobytes()))),
        "size, less": (
            saved(Image.frombytes("RGB", (30, 100), raw[:9000].tobytes())),
            saved(Image.frombytes("RGB", (100, 30), raw[:9000].tobytes())),
        ),
        "mode, 1 and L": (saved(Image.frombytes("1", (128, 64), bits)), saved(Image.frombytes("L", (32, 32), bits))),
        "mode, RGBA and CMYK": (
            saved(pixels4), saved(Image.frombytes("CMYK", (100, 80), raw[:32_000].tobytes()), "JPEG", quality=95)
        ),
        "palette": (saved(palette), saved(other_palette)),
        "palette or none": (saved(palette), saved(grey)),
        "transparent colour": (saved(grey), saved(grey, transparency=int(raw[0]))),
        "transparent entry": (saved(palette), saved(palette, transparency=bytes(range(256)))),
        "orientation": (saved(wide, exif=orientation(1)), saved(wide, exif=orientation(3))),
        "orientation, turned": (saved(wide), saved(wide, exif=orientation(6))),
        "depth": (
            saved(Image.frombytes("I;16", (60, 90), raw[:10_800].tobytes())),
            saved(Image.frombytes("L", (120, 90), raw[:10_800].tobytes())),
        ),
        "rows and columns": (saved(wide), saved(wide.transpose(Image.Transpose.TRANSPOSE))),
        "a frame": (saved(grey, "GIF"), saved(grey.rotate(180), "GIF", save_all=True, append_images=[grey])),
        "one pixel": (saved(wide), saved(Image.frombytes("RGB", (120, 90), bytes([raw[0] ^ 255]) + raw[1:].tobytes()))),
    }  # fmt: skip


@pytest.mark.parametrize("name", confusable())
def test_pictures_that_differ_in_one_thing_are_two_pictures(server: Server, name: str) -> None:
    """T-H1: cold and from every cache, each has its own answer: the encoder's cache and the prefix cache included."""
    first, second = confusable()[name]
    before = decodes(server)
    answers = [probabilities(server, ask(picture)) for picture in (first, second, first, second)]
    repeated = [probabilities(server, ask(picture, "And now?")) for picture in (first, second)]
    assert answers[0] == pytest.approx(answers[2], abs=SAME) and answers[1] == pytest.approx(answers[3], abs=SAME)
    least = 0.0 if name == "one pixel" else DIFFERENT
    assert distance(answers[0], answers[1]) > least
    assert distance(repeated[0], repeated[1]) > least
    assert decodes(server) - before in (1, 2)  # at least one of them was new


NUM_PICTURES = 200


def test_every_answer_is_of_its_own_picture(server: Server, hf_oracle: HFOracle) -> None:
    """T-H7: 200 pictures of one size under one text, so that all prompts have the same token ids; one after the other from cold
    caches, then all at once, mostly from warm ones. The reference says what each picture's answer is, and no two are alike."""
    pictures = [make_pil(56, 56, seed=10_000 + number) for number in range(NUM_PICTURES)]
    requests = [ask(saved(picture), "?") for picture in pictures]
    conversations = [[{"role": "user", "content": [{"type": "image", "image": picture}, text("?")]}] for picture in pictures]
    first_logits = np.stack([hf_oracle(conversation, 1).first_logits.log_softmax(-1).numpy() for conversation in conversations])
    token_ids = ids_by_text(server.model_dir)
    in_order = [probabilities(server, request) for request in requests]
    with ThreadPoolExecutor(16) as threads:
        at_once = list(threads.map(lambda request: probabilities(server, request), requests[::-1]))[::-1]
    nearest_other = []
    for number, got in [*enumerate(in_order), *enumerate(at_once)]:
        known = [(token_ids[token], logprob) for token, logprob in got.items() if token in token_ids]
        assert len(known) >= 5
        ids, logprobs = zip(*known, strict=True)
        distances = np.abs(first_logits[:, list(ids)] - np.array(logprobs)).max(axis=1)  # to each picture's answer
        assert distances[number] < SAME, number
        nearest_other.append(np.delete(distances, number).min())
    assert min(nearest_other) > 10 * SAME


def ids_by_text(model_dir: Path) -> dict[str, int]:
    """Token ids by the hexadecimal bytes of their text, where it is only one token's."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    texts = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in range(tokenizer.get_vocab_size())]
    number = Counter(texts)
    return {one.encode().hex(): index for index, one in enumerate(texts) if number[one] == 1 and "\ufffd" not in one}


@pytest.mark.parametrize("place", ["request", "message", "part", "image_url"])
def test_nobody_names_a_cache_entry(server: Server, place: str) -> None:
    """T-H8: neither by vLLM's `uuid` nor by any other name of it."""
    for name in ("uuid", "multi_modal_uuids", "mm_hash", "cache_key", "hash"):
        request = ask(make_image(50, 50, seed=92))
        message = request["messages"][0]
        at: dict[str, Any] = {
            "request": request, "message": message, "part": message["content"][0], "image_url": message["content"][0]["image_url"]
        }[place]  # fmt: skip
        at[name] = "0" * 64
        error = assert_is_clear_error(server.post(request), code="unknown_parameter")
        assert error["param"].endswith(name)


# ---- pictures that cost more than they weigh ----------------------------------------------------------------------------


def decodes(server: Server) -> float:
    """Those that failed included."""
    metrics = server.metrics()
    return metrics["preprocess_decodes_total"] + metrics["preprocess_decode_failures_total"]


@pytest.mark.parametrize("way", ["data url", "http url", "second of two", "sixteen of them"])
def test_a_bomb_costs_no_decode_and_no_memory(server: Server, web: Web, still_good: None, way: str) -> None:
    """T-M2, T-M1: 169 million pixels in 92 KB are known by their header, on every way in."""
    bomb = web.files["/bomb.png"] = png_of_zeros(13_000, 13_000)
    assert len(bomb) < 100_000
    request = {
        "data url": ask(bomb),
        "http url": ask(f"{web.url}/bomb.png"),
        "second of two": body([image(make_image(50, 50)), image(bomb)]),
        "sixteen of them": body([image(bomb)] * 16),
    }[way]
    before, memory = decodes(server), server.memory_mib()
    with ThreadPoolExecutor(8) as threads:
        for answer in threads.map(server.post, [request] * 8):
            assert_is_clear_error(answer, code="image_too_large")
    assert decodes(server) == before
    assert server.memory_mib() - memory < 50  # one of them, decoded, takes 500


def test_the_pixel_limit_is_36_million(server: Server, still_good: None) -> None:
    """T-M2: one row more is too many; the headers alone are true."""
    before = decodes(server)
    for size in ((6001, 6000), (16_385, 100), (0x7FFFFFFF, 0x7FFFFFFF), (0x7FFFFFFF, 1)):
        data = bytearray(make_image(10, 10, format="PNG"))
        struct.pack_into(">II", data, 16, *size)
        assert_is_clear_error(server.post(ask(bytes(data))), code="image_too_large")
    assert decodes(server) == before


@pytest.mark.parametrize(
    "url",
    [
        "data:video/jpeg;base64,{0},{0},{0}", "data:video/mp4;base64,{0}", "data:image/jpeg;base64,{0},{0}",
        "data:image/jpeg;base64,,{0}", "data:image/jpeg;base64,{0},", "data:image/jpeg,base64,{0}",
        "data:image/jpeg;base64;base64", "data:application/pdf;base64,{0}", "data:image/jpeg;charset=utf-8,{0}",
        "data:;base64,{0}", "data:image/jpeg;base64,{0}\n", "data:image/jpeg;base64, {0}",
    ],
)  # fmt: skip
def test_a_data_url_has_one_picture(server: Server, url: str) -> None:
    """T-M1: commas make no list of frames, and no other media type gets past the limits."""
    encoded = data_url(make_image(50, 50)).rpartition(",")[2]
    before = decodes(server)
    assert_is_clear_error(server.post(ask(url.format(encoded))), code="invalid_image")
    assert decodes(server) == before


def test_a_picture_of_too_many_bytes(server: Server, web: Web, still_good: None) -> None:
    """T-M1: 20 MiB is the limit of one picture on each way in."""
    large = make_image(50, 50) + bytes(20 << 20)
    web.files["/large.jpg"] = large
    assert_is_clear_error(server.post(ask(large)), code="image_too_large")
    assert_is_clear_error(server.post(ask(f"{web.url}/large.jpg")), code="image_too_large")


@pytest.mark.parametrize("framing", ["chunked", "declared"])
def test_a_body_is_limited_while_it_is_read(server: Server, still_good: None, framing: str) -> None:
    """T-M3: of 120 MiB no more than the limit is kept. (Twice that is allowed for.)"""
    pid = server.process.pid
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is from here on
    before = private_mib(pid)
    piece = b'{"model": "' + b"x" * (1 << 20)

    def pieces() -> Iterator[bytes]:
        for _ in range(120):
            yield piece

    headers = {"Content-Type": "application/json"}
    if framing == "declared":
        headers["Content-Length"] = str(120 * len(piece))
    answer = server.http.post(f"{server.url}/v1/chat/completions", content=pieces(), headers=headers)
    assert_is_clear_error(answer, 413, "request_too_large")
    assert peak_mib(pid) - before < 2 * MAX_BODY_MIB + 30  # and what is shared, which the peak has and `before` has not


def peak_mib(pid: int) -> float:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


# ---- pictures that break what reads them --------------------------------------------------------------------------------


def other_formats() -> dict[str, bytes]:
    """T-M5: what a decoder library would gladly open, and what only looks like it."""
    pil = make_pil(40, 30, seed=93)
    written = {name: saved(pil, name) for name in ("BMP", "TIFF", "EPS", "ICO", "PPM", "PDF", "TGA", "PCX", "SGI", "DDS", "ICNS")}
    for name in ("JPEG2000", "AVIF"):
        try:
            written[name] = saved(pil, name)
        except (KeyError, OSError):  # a Pillow that was built without it
            pass
    return written | {
        "PSD": b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 30, 40, 8, 3) + bytes(4000),
        "FITS": b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80) + b"END".ljust(2720),
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "HTML": b"<!doctype html><img src='http://127.0.0.1/'>",
        "JPEG 2000 by magic": b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(200),
        "JPEG XL": b"\xff\x0a" + bytes(200),
        "HEIC": b"\x00\x00\x00\x18ftypheic" + bytes(200),
        "MP4": b"\x00\x00\x00\x18ftypmp42" + bytes(200),
        "WAV": b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(100),
        "zip": b"PK\x03\x04" + bytes(100),
        "gzip": b"\x1f\x8b\x08" + bytes(100),
        "MNG": b"\x8aMNG\r\n\x1a\n" + bytes(100),
        "almost PNG": b"\x89PNG\n\x1a\n\n" + bytes(100),
        "almost GIF": b"GIF88a" + bytes(100),
        "JPEG behind a byte": b"\n" + make_image(40, 30),
    }  # fmt: skip


def test_only_four_formats_are_opened(server: Server, web: Web, still_good: None) -> None:
    """T-M5, T-E1: whatever they call themselves, and by whichever way they come; no decoder ever sees them."""
    before = decodes(server)
    for name, data in other_formats().items():
        web.files[f"/{name.replace(' ', '-')}"] = data
        for url in (data_url(data, "png"), data_url(data, "svg+xml"), f"{web.url}/{name.replace(' ', '-')}"):
            answer = server.post(ask(url))
            assert_is_clear_error(answer, code="unsupported_image_format")
    assert decodes(server) == before


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_tiny_pictures_are_answered_or_refused(server: Server, engine_pid: int, still_good: None, format: str) -> None:
    """T-C6: none of them is taken for something else, and none ends the engine."""
    sizes = [(width, height) for width in (1, 2, 3, 4) for height in (1, 2, 3, 4)]
    sizes += [(3, 100), (100, 3), (3, 500), (500, 3), (1, 200), (200, 1), (3, 601), (601, 3), (1, 201), (201, 1)]
    requests = [ask(make_image(*size, format=format), max_tokens=1) for size in sizes]
    with ThreadPoolExecutor(4) as threads:
        for (width, height), answer in zip(sizes, threads.map(server.post, requests), strict=True):
            if max(width, height) > 200 * min(width, height):
                assert_is_clear_error(answer, code="invalid_image")
            else:
                assert answer.status_code == 200, (width, height, answer.text)
    wide = ask(saved(make_pil(3, 3).convert("L")), max_tokens=1)
    assert server.post(wide).status_code == 200


def image_tokens(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["image_tokens"])


def test_special_tokens_are_text_in_every_field(server: Server, still_good: None) -> None:
    """T-C7: each of the tokenizer's, alone and with pictures; the prompt has the pictures' placeholders and no others."""
    tokenizer = json.loads((server.model_dir / "tokenizer.json").read_text())
    specials = [token["content"] for token in tokenizer["added_tokens"] if token["special"]]
    assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_end|>"} <= set(specials)
    picture = image(make_image(60, 60, seed=94))
    num_image_tokens = image_tokens(server.post(body([picture, text("?")], max_tokens=1)))
    assert num_image_tokens > 0

    def requests_with(typed: str) -> Iterator[tuple[dict[str, Any], int]]:
        """Each with the number of its pictures."""
        yield body(typed, max_tokens=1), 0
        yield body([text(typed), picture, text(typed), picture, text(typed)], max_tokens=1), 2
        turns = [{"role": role, "content": typed} for role in ("system", "developer", "user", "assistant")]
        yield {"model": "tiny", "messages": [*turns, {"role": "user", "content": [picture, text(typed)]}], "max_tokens": 1}, 1
        yield body([picture, text("?")], max_tokens=1, stop=[typed], user=typed, cache_salt=typed), 1

    for typed in [*specials, "".join(specials), "<|image_pad|>" * 50, "<|vision_start|><|image_pad|><|vision_end|>"]:
        for request, num_pictures in requests_with(typed[:200]):
            request["messages"][0].setdefault("name", typed[:50])
            assert image_tokens(server.post(request)) == num_pictures * num_image_tokens


def pictures_and_what_they_show() -> dict[str, tuple[bytes, Image.Image]]:
    """Files, and the RGB picture that a person would see: upright, on white, the first frame."""
    pil = make_pil(120, 80, seed=95)
    grey, palette = pil.convert("L"), pil.quantize(32)
    alpha = pil.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(pil.size))
    grey_alpha = grey.copy()
    grey_alpha.putalpha(Image.linear_gradient("L").resize(pil.size))
    colour = pil.getpixel((5, 5))

    def on_white(picture: Image.Image) -> Image.Image:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")

    def reread(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data))

    cases: dict[str, bytes] = {
        "L": saved(grey), "P": saved(palette), "1": saved(pil.convert("1")), "RGBA": saved(alpha), "LA": saved(grey_alpha),
        "P, transparent": saved(palette, transparency=3),
        "P, half transparent": saved(palette, transparency=bytes(range(0, 256, 8))),
        "L, transparent": saved(grey, transparency=grey.getpixel((5, 5))), "RGB, transparent": saved(pil, transparency=colour),
        "CMYK": saved(pil.convert("CMYK"), "JPEG"), "WebP, alpha": saved(alpha, "WEBP", lossless=True),
        "APNG": saved(pil, save_all=True, append_images=[make_pil(120, 80, seed=96)]),
        "GIF": saved(palette, "GIF", save_all=True, append_images=[make_pil(120, 80, seed=96).quantize(32)]),
        "WebP, animated": saved(pil, "WEBP", lossless=True, save_all=True, append_images=[make_pil(120, 80, seed=96)]),
        **{f"EXIF {value}": saved(pil, exif=orientation(value)) for value in range(1, 9)},
    }  # fmt: skip
    shown = {name: on_white(ImageOps.exif_transpose(reread(data))) for name, data in cases.items()}
    grey16 = Image.fromarray((np.arange(120 * 80).reshape(80, 120) * 6).astype(np.uint16))
    cases["16 bit"], shown["16 bit"] = saved(grey16), Image.fromarray((np.asarray(grey16) >> 8).astype(np.uint8)).convert("RGB")
    return {name: (cases[name], shown[name]) for name in cases}


def test_a_picture_is_what_a_person_sees(server: Server) -> None:
    """T-M4: the same answer as to the plain RGB file of what it shows; and not the one to what is under the transparency."""
    cases = pictures_and_what_they_show()
    with ThreadPoolExecutor(4) as threads:
        sent = threads.map(lambda case: probabilities(server, ask(case[0])), cases.values())
        answers = dict(zip(cases, sent, strict=True))
        shown = threads.map(lambda case: probabilities(server, ask(saved(case[1]))), cases.values())
        plain = dict(zip(cases, shown, strict=True))
    for name, answer in answers.items():
        assert distance(answer, plain[name]) < SAME, name
    assert distance(answers["RGBA"], probabilities(server, ask(saved(make_pil(120, 80, seed=95))))) > DIFFERENT
    assert len({json.dumps(answer) for answer in answers.values()}) >= 15


def test_what_is_refused_says_nothing_of_the_server(server: Server, web: Web, still_good: None) -> None:
    """T-E1: damaged at every tenth of their length, by both ways in. A decoder's own words name addresses in memory."""
    for format in ("JPEG", "PNG", "WEBP", "GIF"):
        whole = make_image(80, 60, seed=97, format=format)
        for tenth in range(10):
            cut = whole[: len(whole) * tenth // 10]
            web.files["/cut"] = cut
            for url in (data_url(cut), f"{web.url}/cut"):
                answer = server.post(ask(url, max_tokens=1))
                if answer.status_code != 200:
                    assert_is_clear_error(answer)
