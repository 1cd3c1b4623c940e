"""Scenes and their pictures: what is shown is drawn at random but never ambiguous, and the picture follows from the scene.

What a scene promises, so that every question has one answer: centres of things differ by MIN_DX of the width (their order from
left to right can be seen), large things are about twice as wide as small ones, what overlaps differs in colour and stays
mostly visible, and nothing is smaller than 18 pixels. All of it follows from one seed.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo_model.words import draw_number, draw_word

ASSETS = Path(__file__).parent / "assets"

COLOURS = {
    "red": (214, 36, 40), "green": (30, 150, 54), "blue": (36, 70, 214), "yellow": (244, 222, 40),
    "orange": (246, 132, 14), "purple": (140, 44, 178), "black": (20, 20, 22), "white": (252, 252, 252),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES = ("large", "small")
# Never together in training, neither shown nor asked for; each colour and each shape is seen with others.
HELD_OUT_PAIRS = frozenset({
    ("red", "star"), ("blue", "triangle"), ("green", "cross"), ("yellow", "circle"), ("purple", "square"), ("black", "diamond"),
})
FACES = ("sans-bold", "serif", "mono-bold", "sans-oblique")
MIN_SIDE, MAX_SIDE = 56, 448  # pixels
# In training, this part of the pictures of shapes is in colours without a name: shapes are to be learnt apart from colours.
UNNAMED = 0.15
MAX_ASPECT = 5.0
MIN_DX, MIN_DY = 0.09, 0.12  # of the width and height: the least distance of centres that is asked about
_SIZE_RANGE = {"large": (0.36, 0.46), "small": (0.17, 0.22)}  # diameter, as a part of the shorter side
_SMALL_FROM = 104  # shorter side, in pixels, from which there are small shapes: 18 pixels and more


@dataclass(frozen=True)
class Item:
    """One thing in a picture. `x`, `y`: its centre; `width`, `height`: its box, all in pixels."""

    kind: str  # "shape", "word", "number" or "digit" (handwritten)
    colour: str
    x: float
    y: float
    width: float
    height: float
    shape: str = ""
    size: str = ""
    text: str = ""
    style: int = 0  # rotation in degrees of a shape, face of a print, which scan of a digit
    order: float = 0.0  # who lies on top
    ink: tuple[int, int, int] | None = None  # a colour that has no name here; `colour` is then empty

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    width: int
    height: int
    items: tuple[Item, ...]  # from left to right
    ground: tuple[int, int, int]
    texture: str
    seed: int  # of the texture and the small changes of colour
    quality: int  # of the JPEG; 0 is a PNG

    @property
    def colours_have_names(self) -> bool:
        return all(item.colour for item in self.items)

    @property
    def shapes(self) -> list[Item]:
        return [item for item in self.items if item.kind == "shape"]

    def encoded(self) -> bytes:
        """The picture, as a JPEG or PNG file."""
        buffer = io.BytesIO()
        if self.quality:
            render(self).save(buffer, "JPEG", quality=self.quality)
        else:
            render(self).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


# --- drawing lots


def draw_scene(rng: random.Random, held_out: bool, *, kind: str = "", max_side: int = MAX_SIDE) -> Scene:
    """A scene of `kind`: "shapes", "print", "digit" or "mixed", or drawn. Held out: pairs, words, numbers and scans that
    training never sees are among those shown."""
    kind = kind or rng.choices(("shapes", "print", "digit", "mixed"), (50, 28, 11, 11))[0]
    base = rng.randint(112, 196)
    while True:
        width, height = _draw_size(rng, kind, max_side)
        items = _draw_items(rng, kind, width, height, held_out, base)
        if items:
            break
    ground = tuple(base + rng.randint(-16, 16) for _ in range(3))
    texture = rng.choice(("plain", "gradient", "noise", "stripes", "checks", "blobs"))
    quality = rng.randint(60, 95) if rng.random() < 0.6 else 0
    ordered = tuple(sorted(items, key=lambda item: item.x))
    return Scene(width, height, ordered, ground, texture, rng.randrange(2**32), quality)


def _draw_size(rng: random.Random, kind: str, max_side: int) -> tuple[int, int]:
    least = {"shapes": MIN_SIDE, "print": 64, "digit": MIN_SIDE, "mixed": 112}[kind]
    low, high = math.log(least), math.log(max(max_side, least))
    while True:
        width, height = round(math.exp(rng.uniform(low, high))), round(math.exp(rng.uniform(low, high)))
        if kind == "print" and width < height:
            width, height = height, width
        if max(width, height) <= MAX_ASPECT * min(width, height):
            return width, height


def _draw_items(rng: random.Random, kind: str, width: int, height: int, held_out: bool, base: int) -> list[Item]:
    """As many things as were drawn and found room. Print goes first, it needs the most room."""
    items: list[Any] = []
    if kind in ("print", "mixed") and (kind == "print" or rng.random() < 0.7):
        items.append(_draw_print(rng, width, height, held_out, base))
    elif kind in ("digit", "mixed"):
        items.append(_draw_digit(rng, width, height, held_out, base, items))
        if kind == "digit" and rng.random() < 0.3 and width >= 84:
            items.append(_draw_digit(rng, width, height, held_out, base, items))
    if None in items:
        return []
    if kind in ("shapes", "mixed"):
        unnamed = not held_out and kind == "shapes" and rng.random() < UNNAMED
        wanted = rng.choices((1, 2, 3, 4), (22, 30, 28, 20))[0] if kind == "shapes" else rng.randint(1, 2)
        overlap = rng.random() < 0.3
        shown = [_draw_shape(rng, width, height, held_out, items, overlap, unnamed) for _ in range(wanted)]
        return items if any(shown) else []
    return items


def _draw_shape(
    rng: random.Random, width: int, height: int, held_out: bool, items: list[Item], overlap: bool, unnamed: bool
) -> bool:
    """Adds one shape where there is room; False if none was found."""
    short = min(width, height)
    for _ in range(24):
        (colour, shape), ink = draw_pair(rng, held_out), None
        if unnamed:
            colour, shape, ink = "", *_draw_unnamed(rng)
        size = rng.choice(SIZES) if short >= _SMALL_FROM else "large"
        side = rng.uniform(*_SIZE_RANGE[size]) * short
        place = _draw_place(rng, width, height, side, side)
        item = Item("shape", colour, *place, side, side, shape, size, style=rng.randint(-8, 8),
                    order=(size == "small") + rng.random() / 2, ink=ink)
        if all(_has_room(item, other, width, overlap) for other in items):
            items.append(item)
            return True
    return False


def draw_pair(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """A colour and a shape that may be shown; held out, about one in four is a pair that training never sees."""
    if held_out and rng.random() < 0.15:
        return rng.choice(sorted(HELD_OUT_PAIRS))
    while True:
        pair = rng.choice(tuple(COLOURS)), rng.choice(SHAPES)
        if held_out or pair not in HELD_OUT_PAIRS:
            return pair


def _draw_unnamed(rng: random.Random) -> tuple[str, tuple[int, int, int]]:
    """A shape and a strong colour far from every one that has a name, farthest from the one held out for that shape."""
    shape = rng.choice(SHAPES)
    least = {colour: 110 if (colour, shape) in HELD_OUT_PAIRS else 60 for colour in COLOURS}
    while True:
        ink = rng.randrange(256), rng.randrange(256), rng.randrange(256)
        if max(ink) - min(ink) > 100 and all(math.dist(ink, COLOURS[name]) > least[name] for name in COLOURS):
            return shape, ink


def _draw_place(rng: random.Random, width: int, height: int, item_width: float, item_height: float) -> tuple[float, float]:
    return (rng.uniform(item_width / 2 + 2, width - item_width / 2 - 2),
            rng.uniform(item_height / 2 + 2, height - item_height / 2 - 2))


def _has_room(item: Item, other: Item, width: int, overlap: bool) -> bool:
    dx, dy = abs(item.x - other.x), abs(item.y - other.y)
    if dx < max(14.0, MIN_DX * width):
        return False
    if item.kind == other.kind == "shape":
        gap = math.hypot(dx, dy) / ((item.width + other.width) / 2)
        return gap > 1.12 or (overlap and item.colour != other.colour and gap > 0.8)
    return dx > (item.width + other.width) / 2 + 4 or dy > (item.height + other.height) / 2 + 4


def _draw_print(rng: random.Random, width: int, height: int, held_out: bool, base: int) -> Item | None:
    """A word or a number, with capitals at least 20 pixels high; None if it does not fit."""
    kind = "word" if rng.random() < 0.6 else "number"
    text = (draw_word if kind == "word" else draw_number)(rng, held_out)
    face = rng.randrange(len(FACES))
    largest = min(0.8 * height, 72.0)
    unit = _font(face, 100).getlength(text) / 100  # the text's width over the font's size
    largest = min(largest, (width - 10) / unit)
    if largest < 28:
        return None
    points = int(rng.uniform(max(28.0, 0.45 * largest), largest))
    left, top, right, bottom = _font(face, points).getbbox(text, anchor="ls")
    box = right - left + 2, bottom - top + 2
    if box[0] > width - 6 or box[1] > height - 6:
        return None
    x, y = _draw_place(rng, width, height, *box)
    return Item(kind, rng.choice(_inks(base)), x, y, *box, text=text, style=face * 1000 + points, order=2)


def _draw_digit(
    rng: random.Random, width: int, height: int, held_out: bool, base: int, items: list[Item | None]
) -> Item | None:
    """One scanned digit, at least 32 pixels high; None if it does not fit."""
    _, labels = scans()
    while True:
        scan = rng.randrange(len(labels))
        if (scan % 6 == 0) == held_out:
            break
    for _ in range(8):
        side = min(rng.uniform(0.5, 0.92) * min(width, height), 180.0)
        if side < 32:
            return None
        x, y = _draw_place(rng, width, height, side, side)
        item = Item("digit", rng.choice(_inks(base)), x, y, side, side, text=str(labels[scan]), style=scan, order=2)
        if all(other is not None and _has_room(item, other, width, False) for other in items):
            return item
    return None


def _inks(base: int) -> list[str]:
    """The colours that are clearly lighter or darker than a background of brightness `base`."""
    return [name for name, (red, green, blue) in COLOURS.items() if abs(0.3 * red + 0.59 * green + 0.11 * blue - base) > 45]


# --- drawing pictures


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture."""
    noise = np.random.Generator(np.random.PCG64(scene.seed))
    picture = Image.fromarray(_ground(scene, noise))
    for item in sorted(scene.items, key=lambda item: item.order):
        left, top = round(item.x - item.width / 2), round(item.y - item.height / 2)
        ink = np.clip(np.array(item.ink or COLOURS[item.colour]) + noise.integers(-12, 13, 3), 0, 255).tolist()
        if item.kind == "shape":
            mask = _shape_mask(item.shape, round(item.width), item.style)
        elif item.kind == "digit":
            mask = _digit_mask(item.style, round(item.width), noise)
        else:
            mask = _print_mask(item)
        picture.paste(tuple(ink), (left, top), mask)
    return picture


def _ground(scene: Scene, noise: np.random.Generator) -> np.ndarray:
    """uint8 [height, width, 3]: the background."""
    height, width = scene.height, scene.width
    depth = float(noise.uniform(6, 18))
    cell = int(noise.integers(5, 24))
    rows, columns = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]
    match scene.texture:
        case "gradient":
            change = depth * 2 * ((rows / height - 0.5) * noise.uniform(-1, 1) + (columns / width - 0.5) * noise.uniform(-1, 1))
        case "noise":
            change = noise.integers(-int(depth), int(depth) + 1, (height, width)).astype(np.float32)
        case "stripes":
            change = np.where((rows * noise.uniform(-1, 1) + columns) % (2 * cell) < cell, depth / 2, -depth / 2)
        case "checks":
            change = np.where((rows // cell + columns // cell) % 2 == 0, depth / 2, -depth / 2)
        case "blobs":
            coarse = noise.uniform(-depth, depth, (height // 28 + 2, width // 28 + 2)).astype(np.float32)
            change = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))
        case _:
            change = np.zeros((height, width), np.float32)
    change = np.broadcast_to(change, (height, width))
    return np.clip(np.array(scene.ground, np.float32) + change[..., None], 0, 255).astype(np.uint8)


@lru_cache(maxsize=4096)
def _shape_mask(shape: str, side: int, angle: int) -> Image.Image:
    """L picture of side x side, drawn four times as large."""
    fine = 4 * side
    mask = Image.new("L", (fine, fine))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, fine - 1, fine - 1), fill=255)
    else:
        turn = math.radians(angle)
        cos, sin, half = math.cos(turn), math.sin(turn), fine / 2
        turned = [(x * cos - y * sin, x * sin + y * cos) for x, y in _OUTLINES[shape]]
        draw.polygon([(half + half * x, half + half * y) for x, y in turned], fill=255)
    return mask.reduce(4)


def _star() -> list[tuple[float, float]]:
    return [(radius * math.sin(math.pi * point / 5), -radius * math.cos(math.pi * point / 5) + 0.05)
            for point in range(10) for radius in ((0.99, 0.42)[point % 2],)]


# Corners inside the circle of radius 1, y downwards.
_OUTLINES = {
    "square": [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)],
    "triangle": [(0, -0.95), (0.92, 0.75), (-0.92, 0.75)],
    "diamond": [(0, -0.99), (0.68, 0), (0, 0.99), (-0.68, 0)],
    "cross": [(-0.3, -0.92), (0.3, -0.92), (0.3, -0.3), (0.92, -0.3), (0.92, 0.3), (0.3, 0.3),
              (0.3, 0.92), (-0.3, 0.92), (-0.3, 0.3), (-0.92, 0.3), (-0.92, -0.3), (-0.3, -0.3)],
    "star": _star(),
}


@lru_cache(maxsize=512)
def _font(face: int, points: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(ASSETS / "fonts" / f"{FACES[face]}.ttf"), points, layout_engine=ImageFont.Layout.BASIC)


def _print_mask(item: Item) -> Image.Image:
    font = _font(*divmod(item.style, 1000))
    left, top, _, _ = font.getbbox(item.text, anchor="ls")
    mask = Image.new("L", (round(item.width), round(item.height)))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), item.text, fill=255, font=font, anchor="ls")
    return mask


@lru_cache(maxsize=1)
def scans() -> tuple[np.ndarray, np.ndarray]:
    """The handwritten digits: uint8 [1797, 8, 8] of 0 to 16, and what they are."""
    with np.load(ASSETS / "digits.npz", allow_pickle=False) as file:
        return file["pictures"], file["labels"]


def _digit_mask(scan: int, side: int, noise: np.random.Generator) -> Image.Image:
    """The scan enlarged, slightly turned, slanted and stretched."""
    small = Image.fromarray(np.minimum(scans()[0][scan].astype(np.uint16) * 16, 255).astype(np.uint8))
    framed = Image.new("L", (10, 10))
    framed.paste(small, (1, 1))
    turn, slant = math.radians(noise.uniform(-10, 10)), noise.uniform(-0.12, 0.12)
    across, down = noise.uniform(0.92, 1.12), noise.uniform(0.92, 1.08)
    fine = framed.resize((side, side), Image.Resampling.BICUBIC)
    cos, sin, half = math.cos(turn), math.sin(turn), side / 2
    a, b, d, e = cos * across, (sin + slant) * across, -sin * down, cos * down
    steps = (a, b, half - a * half - b * half, d, e, half - d * half - e * half)
    mask = fine.transform((side, side), Image.Transform.AFFINE, steps, Image.Resampling.BILINEAR)
    return mask.point(lambda value: min(255, max(0, int((value - 55) * 1.5))))

