"""What `mmv1 bench` asks: random prompts, the same again for the same seed, and the named workloads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from mmv1.cli.bench_pictures import Pictures

_COMMON_WORDS = """
    a about after again all also an and any are as at back because been before but by can come could day do down each even
    find first for from get give go good great had hand has have he her here him his home how I if in into is it its just
    know large last left life like line little long look made make man many may me more most must my name new no not now of
    off old on one only or other our out over own part people place right said same see she show side small so some such
    take tell than that the their them then there these they thing think this time to two up us use very want was water way
    we well were what when where which white who will with word work world would write year you your
"""
_WORDS = _COMMON_WORDS.split()
_QUESTIONS = (
    "What is shown?", "Which colours dominate?", "Is there a person?", "Describe the light.", "What is on the left?",
    "What is on the right?", "Is it indoors?", "Give it a short title.",
)  # fmt: skip


class PictureSize(NamedTuple):
    """Pixels."""

    width: int
    height: int


class Prompt(NamedTuple):
    """`pictures`: data: URLs; `sizes`: theirs."""

    text: str
    pictures: Sequence[str]
    max_tokens: int
    sizes: Sequence[PictureSize] = ()

    def messages(self) -> list[dict[str, object]]:
        """OpenAI's, the pictures before the text."""
        images = [{"type": "image_url", "image_url": {"url": url}} for url in self.pictures]
        return [{"role": "user", "content": [*images, {"type": "text", "text": self.text}]}]


def random_words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(_WORDS, count))


@dataclass(frozen=True, kw_only=True)
class RandomLoad:
    """Prompts of random words, of one shape. Lengths are uniform within 1 - `range_ratio` to 1 + `range_ratio` times what is
    said, as vLLM's; `num_prefix_words` are the same in all prompts. `sizes`: of pictures, each with its probability."""

    num_words: int
    num_prefix_words: int = 0
    output_len: int
    range_ratio: float = 0.0
    num_images: int = 0
    sizes: Sequence[tuple[PictureSize, float]] = ()

    def prompts(self, rng: np.random.Generator, pictures: Pictures) -> Iterator[Prompt]:
        """Without end."""
        prefix = random_words(rng, self.num_prefix_words)
        total = sum(share for _, share in self.sizes)
        shares = [share / total for _, share in self.sizes]
        while True:
            words = random_words(rng, self._length(rng, self.num_words))
            output_len = self._length(rng, self.output_len)
            sizes = []
            if self.num_images:
                sizes = [self.sizes[index][0] for index in rng.choice(len(shares), self.num_images, p=shares)]
            urls = [pictures.next(rng, size) for size in sizes]
            yield Prompt(f"{prefix} {words}" if prefix else words, urls, output_len, sizes)

    def _length(self, rng: np.random.Generator, mean: int) -> int:
        if not self.range_ratio:
            return mean
        least, most = int(mean * (1 - self.range_ratio)), int(mean * (1 + self.range_ratio))
        return max(1, int(rng.integers(least, most + 1)))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A load with a name. Each group of `num_images` new pictures of `size` is asked about once with each of `texts`, in an order
    shuffled over all; without texts, with `num_words` random words. Every answer has `output_len` tokens."""

    num_prompts: int
    max_concurrency: int
    output_len: int
    texts: tuple[str, ...] = ()
    num_words: int = 0
    num_images: int = 1
    size: PictureSize = PictureSize(1024, 1024)

    def prompts(self, rng: np.random.Generator, pictures: Pictures, num_prompts: int) -> list[Prompt]:
        """The first `num_prompts`, made whole."""
        made: list[Prompt] = []
        sizes = [self.size] * self.num_images
        while len(made) < num_prompts:
            urls = [pictures.next(rng, size) for size in sizes]
            texts = self.texts or (random_words(rng, self.num_words),)
            made += [Prompt(text, urls, self.output_len, sizes) for text in texts[: num_prompts - len(made)]]
        return [made[index] for index in rng.permutation(num_prompts)] if len(self.texts) > 1 else made


WORKLOADS = {
    "caption": Workload(num_prompts=192, max_concurrency=64, output_len=128, texts=("Describe this image in detail.",)),
    "sameimage": Workload(num_prompts=256, max_concurrency=64, output_len=64, texts=_QUESTIONS),
    "multi": Workload(
        num_prompts=64, max_concurrency=32, output_len=64, texts=("Compare these images.",), num_images=8,
        size=PictureSize(448, 448),
    ),
    "text": Workload(num_prompts=256, max_concurrency=128, output_len=128, num_words=512, num_images=0),
    "decode": Workload(
        num_prompts=128, max_concurrency=128, output_len=512, texts=("Tell a long story about it.",), size=PictureSize(448, 448)
    ),
    "single": Workload(num_prompts=8, max_concurrency=1, output_len=64, texts=("Describe this image in detail.",)),
}  # fmt: skip
# Before each of them, and not counted.
WARMUP = Workload(num_prompts=16, max_concurrency=8, output_len=8, texts=("Hi",), size=PictureSize(640, 480))
