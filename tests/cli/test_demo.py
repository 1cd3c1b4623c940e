"""`mmv1 demo` runs anywhere, tells the truth, and finds its pictures in an installed package too."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmv1.cli import demo
from mmv1.config import EngineArgs
from mmv1.errors import ConfigError, EngineError
from mmv1.preprocess.pictures import PreprocessStats
from mmv1.types import SchedulerStats
from tests.cli.command import ROOT, mmv1


@pytest.mark.slow
def test_the_demo_answers_and_does_nothing_twice(tmp_path: Path) -> None:
    result = mmv1("demo", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    for answer in ("> yellow\n", "> HORSE\n", "2 pictures decoded and preprocessed, 2 encoded", "nothing of them was decoded"):
        assert answer in result.stdout


@pytest.mark.parametrize(
    ("decodes", "store_hits", "encoded", "prefix_hits", "good"),
    [(2, 0, 2, 300, True), (0, 2, 2, 300, True), (3, 0, 2, 300, False), (2, 0, 3, 300, False), (2, 0, 2, 0, False)],
)
def test_work_done_twice_is_an_error(decodes: int, store_hits: int, encoded: int, prefix_hits: int, good: bool) -> None:
    pictures = PreprocessStats(num_decodes=decodes, num_store_hits=store_hits)
    stats = SchedulerStats(num_images_encoded=encoded, prefix_cache_hits=prefix_hits)
    engine = SimpleNamespace(stats=lambda: stats, preprocessor=SimpleNamespace(stats=lambda: pictures))
    if good:
        demo._sum_up(engine)  # type: ignore[arg-type]
    else:
        with pytest.raises(EngineError, match="worked on twice"):
            demo._sum_up(engine)  # type: ignore[arg-type]


def test_pictures_are_found_in_the_package_and_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.pictures_dir() == ROOT / "examples" / "pictures"
    module = tmp_path / "mmv1" / "cli" / "demo.py"
    monkeypatch.setattr(demo, "__file__", str(module))
    with pytest.raises(ConfigError, match="not installed"):
        demo.pictures_dir()
    installed = tmp_path / "mmv1" / "demo_pictures"
    installed.mkdir(parents=True)
    assert demo.pictures_dir() == installed


@pytest.mark.slow
def test_the_wheel_has_what_the_demo_needs(tmp_path: Path) -> None:
    """Built as it is published; the demo's own search then finds model and pictures in it, without the repository."""
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    package = tmp_path / "site" / "mmv1"
    assert {name for name, _ in demo.QUESTIONS} <= {path.name for path in (package / "demo_pictures").iterdir()}
    assert (package / "demo_model" / "model.safetensors").is_file()
    (entry_points,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    assert "mmv1 = mmv1.cli.main:main" in entry_points.read_text()


def test_a_model_and_a_shorter_context_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setenv("MMV1_LOG_LEVEL", "WARNING")  # as the command would set it, for this test only
    monkeypatch.setattr(demo, "run_until_signal", lambda work: work.close() or 0)
    monkeypatch.setattr(demo, "resolve", seen.append)
    for max_model_len in (None, 512):
        args = EngineArgs(model="m", max_model_len=max_model_len)
        assert demo.run(argparse.Namespace(engine_args=args)) == 0
    assert [(args.model, args.max_model_len) for args in seen] == [("m", 2048), ("m", 512)]
