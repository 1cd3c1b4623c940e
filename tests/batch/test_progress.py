"""The bar: which stage it names, and that what was done before does not pass for speed."""

from __future__ import annotations

import io
import re
import time

import pytest

from mmv1.batch.backend import Load
from mmv1.batch.progress import Progress, bottleneck


def load(engine: dict[str, float] | None = None, pictures: dict[str, float] | None = None) -> Load:
    return Load(0, 0, 0, 0, 0, pictures or {}, engine or {})


@pytest.mark.parametrize(
    ("engine", "pictures", "expected"),
    [
        ({"encode": 6.0, "prefill": 2.0, "decode": 1.0}, {"queue": 900.0}, "encoding pictures"),
        ({"encode": 2.0, "prefill": 6.0, "decode": 1.0}, {}, "prefill"),
        ({"encode": 1.0, "prefill": 2.0, "decode": 6.0}, {}, "decoding text"),
        ({"encode": 1.0, "prefill": 1.0, "decode": 1.0}, {"queue": 90.0, "decode": 20.0}, "decoding pictures"),
        ({"encode": 1.0}, {"store_get": 90.0, "decode": 20.0}, "Redis"),
        ({"encode": 1.0}, {"decode": 2.0, "slab": 900.0, "store_set": 900.0}, "reading pictures"),
        ({}, {"queue": 90.0}, None),
    ],
)
def test_bottleneck_is_where_time_goes(engine: dict[str, float], pictures: dict[str, float], expected: str | None) -> None:
    before = load(dict.fromkeys(("encode", "prefill", "decode"), 100.0), dict.fromkeys(pictures, 50.0))
    after = load(
        {stage: 100.0 + engine.get(stage, 0.0) for stage in before.engine_seconds},
        {stage: 50.0 + seconds for stage, seconds in pictures.items()},
    )
    assert bottleneck(before, after, 10.0) == expected


def test_what_was_done_before_counts_as_done_but_not_as_speed() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.set_total(1000)
    progress.set_skipped(900)
    progress.finish(failed=False)
    progress.finish(failed=True)
    progress.show_load(load())
    progress.set_skipped(910)
    assert (progress._bar.n, progress._bar.initial, progress._bar.total) == (912, 910, 1000)
    progress.close(was_finished=True)
    assert "912/912" in stream.getvalue() and "1 failed" in stream.getvalue()


def test_a_run_that_goes_on_does_not_begin_with_the_speed_of_what_was_done_before() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress._bar.mininterval = 0
    progress.set_skipped(100_000)
    time.sleep(0.05)
    progress.finish(failed=False)
    shown = re.search(r"100001 pictures \[00:00, +([\d.]+) pictures/s", stream.getvalue())
    assert shown is not None and float(shown[1]) < 1000, stream.getvalue()


def test_an_interrupted_run_is_not_shown_as_a_whole_one() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.set_total(1000)
    progress.finish(failed=False)
    progress.close(was_finished=False)
    assert "1/1000" in stream.getvalue().splitlines()[-1]


def test_a_server_that_says_nothing_of_itself_has_no_bottleneck() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.show_load(None)
    progress.finish(failed=False)
    progress.close(was_finished=True)
    assert "bottleneck" not in stream.getvalue()
