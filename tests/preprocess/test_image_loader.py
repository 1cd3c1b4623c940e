"""In what order pictures are looked at: what is here first, then every URL's host, and downloads last."""

import asyncio

import pytest

from mmv1.errors import ImageError
from mmv1.preprocess.image_loader import ImageLoader
from mmv1.preprocess.media import ImageLimits
from tests.pictures import data_url, make_image, make_pil

LIMITS = ImageLimits(max_encoded_bytes=100_000, max_pixels=100_000, max_side=5000)
PICTURE = make_image(64, 48)
BOMB = make_image(400, 300)  # more pixels than the limit


class Fetcher:
    """Knows hosts `good`, which it looks up late, and `large`; counts what it is asked."""

    def __init__(self):
        self.looked_up, self.fetched, self.num_at_once, self.most_at_once = [], [], 0, 0

    async def look_up(self, url):
        await asyncio.sleep(0.01 if "good" in url else 0)
        self.looked_up.append(url)
        if "bad" in url:
            raise ImageError("not this one", code="image_url_forbidden")
        return url

    async def fetch(self, target):
        self.fetched.append(target)
        self.num_at_once += 1
        self.most_at_once = max(self.most_at_once, self.num_at_once)
        await asyncio.sleep(0.005)
        self.num_at_once -= 1
        return BOMB if "large" in target else PICTURE


def load(sources, fetcher=None, root=None):
    """Both steps; what was read, in order, and the fetcher."""
    fetcher = fetcher or Fetcher()
    loader = ImageLoader(limits=LIMITS, fetcher=fetcher, local_root=root)

    async def both():
        return await loader.read_local(sources) | await loader.download(sources)

    try:
        found = asyncio.run(both())
    except ImageError as error:
        return error, fetcher
    return [found[number] for number in range(len(sources))], fetcher


def test_every_source_in_its_place(tmp_path):
    path = tmp_path.resolve() / "picture.jpg"
    path.write_bytes(PICTURE)
    remote = ["http://good.example/1", "HTTPS://good.example/2"]
    sources = [remote[0], PICTURE, make_pil(64, 48), remote[1], path, data_url(PICTURE), path.as_uri()]
    images, fetcher = load(sources, root=path.parent)
    assert [image.header.format for image in images] == ["JPEG", "JPEG", "PPM", "JPEG", "JPEG", "JPEG", "JPEG"]
    assert {(image.header.width, image.header.height) for image in images} == {(64, 48)}
    assert sorted(fetcher.fetched) == ["HTTPS://good.example/2", "http://good.example/1"]


@pytest.mark.parametrize(
    "bad",
    [
        b"", b"no picture", BOMB, make_pil(400, 300), "data:image/png;base64,%%%", data_url(BOMB), data_url(b"no picture"),
        "data:video/jpeg;base64," + "A,A," * 10, "DATA:", "file:///etc/passwd", "FILE:///etc/passwd", "http://bad.example/x",
        "gopher://bad.example/x", "/etc/passwd bad",
    ],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
@pytest.mark.parametrize("place", [0, 2, 4])
def test_nothing_is_fetched_beside_a_bad_picture(bad, place):
    """T-S6: wherever it stands, and although the others' hosts are slow to look up."""
    sources = [f"http://good.example/{number}" for number in range(4)]
    sources.insert(place, bad)
    error, fetcher = load(sources)
    assert isinstance(error, ImageError) and error.message.startswith(f"image {place + 1}: ")
    assert fetcher.fetched == []


def test_limits_are_the_same_on_every_path(tmp_path):
    """T-M1, T-M2: too many pixels are too many, wherever the picture comes from; and nothing is decoded to know it."""
    path = tmp_path.resolve() / "bomb.jpg"
    path.write_bytes(BOMB)
    for source in (BOMB, make_pil(400, 300), data_url(BOMB), path, path.as_uri(), "http://large.example/x"):
        error, _ = load([source], root=path.parent)
        assert (error.code, error.message.startswith("the image has 400 x 300 pixels")) == ("image_too_large", True)


def test_few_downloads_of_one_request_at_once():
    images, fetcher = load(["http://good.example/x"] * 20)
    assert len(images) == len(fetcher.fetched) == 20
    assert fetcher.most_at_once == 8
