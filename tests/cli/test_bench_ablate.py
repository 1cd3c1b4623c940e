"""`mmv1 bench ablate`: ratios that are right, every mechanism a flag that servers take, and a run with real servers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from mmv1.cli.bench import MECHANISMS
from mmv1.cli.bench_ablate import compared, lines_of
from mmv1.cli.bench_server import running_server
from mmv1.cli.main import make_parser
from mmv1.cli.options import engine_args
from mmv1.config import EngineArgs
from mmv1.errors import EngineError
from tests.cli.command import mmv1


def rounds(*rates: float, tpot_ms: float = 5.0) -> list[dict[str, float]]:
    times = {"median_ttft_ms": 100.0, "median_tpot_ms": tpot_ms}
    return [{"request_throughput": rate, "output_throughput": 10 * rate, **times} for rate in rates]


def test_figures_are_medians_and_ratios_to_the_neighbours() -> None:
    row = compared(rounds(1.0, 9.0, 2.0, tpot_ms=10.0), rounds(4.0, 3.0, 5.0, 4.0))
    assert (row["request_throughput"], row["request_throughput_ratio"], row["output_throughput_ratio"]) == (2.0, 0.5, 0.5)
    assert (row["median_ttft_ms_ratio"], row["median_tpot_ms_ratio"]) == (1.0, 2.0)
    assert compared(rounds(1.0), rounds(1.0, tpot_ms=0.0))["median_tpot_ms_ratio"] == 0.0
    baseline = {key: value for key, value in row.items() if not key.endswith("_ratio")}
    failed = {"without": "graphs", "error": "no"}
    head, everything, one, other = lines_of(
        {"workload": "text", "baseline": baseline, "ablations": [{"without": "prefix-cache", **row}, failed]}
    )
    assert "req/s" in head and "2.00" in everything
    assert "- prefix-cache" in one and "2.00 (0.50)" in one and "10.00 (2.00)" in one
    assert other == "- graphs            failed"


def test_every_mechanism_has_a_flag_that_switches_something_off() -> None:
    for flag in MECHANISMS.values():
        argv = ["serve", flag]
        assert engine_args(make_parser(argv)[0].parse_args(argv)) != EngineArgs(), flag


def test_flags_of_the_servers() -> None:
    flags = ["--serve-flags", "--dtype float32 --max-model-len 512", "--without", "graphs"]
    argv = ["bench", "ablate", "there", "--workload", "text", *flags]
    namespace = make_parser(argv)[0].parse_args(argv)
    assert (namespace.model, namespace.serve_flags) == ("there", ["--dtype", "float32", "--max-model-len", "512"])
    assert list(namespace.without) == ["graphs"]


def test_a_server_that_does_not_start_says_why() -> None:
    async def main() -> None:
        async with running_server(["--max-num-seqs", "0"]):
            raise AssertionError("it started")

    with pytest.raises(EngineError, match=r"did not start: .*--max-num-seqs must be at least 1"):
        asyncio.run(main())


@pytest.mark.slow
def test_with_real_servers(tmp_path: Path, tiny_model_dir: Path) -> None:
    result = mmv1(
        "bench", "ablate", tiny_model_dir, "--workload", "caption", "--num-prompts", "2", "--rounds", "1", "--without",
        "encoder-cache", "--serve-flags", "--preprocess-workers 1", "--save-result", "--result-dir", tmp_path,
        "--result-filename", "r.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "- encoder-cache" in result.stdout
    saved = json.loads((tmp_path / "r.json").read_text())
    (row,) = saved["ablations"]
    assert row["flag"] == "--no-encoder-cache" and row["request_throughput_ratio"] > 0
    assert [one["completed"] for one in row["rounds"]] == [2]
    assert len(saved["baseline"]["rounds"]) == 2  # before and behind it
