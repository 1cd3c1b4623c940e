"""`mmv1 bench ablate`: what each mechanism of the engine is worth for one workload.

For every mechanism a server is started that has it switched off, between two that have everything: A B A C A. Each answers the
same loads, a few rounds of them; every figure is the median of its rounds, and the ratio is to those of the neighbours with
everything, so that a machine that grows slower or faster meanwhile favours nobody.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from mmv1.cli.bench import MECHANISMS
from mmv1.cli.bench_serve import measure, named_load, save, warm_up
from mmv1.cli.bench_server import running_server
from mmv1.cli.figures import details_of, figures_of
from mmv1.cli.load import LoadClient
from mmv1.errors import EngineError

_FIGURES = ("request_throughput", "output_throughput", "median_ttft_ms", "median_tpot_ms")

Round = dict[str, Any]


async def ablate(namespace: argparse.Namespace) -> int:
    """Raises EngineError when the server with everything cannot be measured; one without a mechanism is reported as failed."""
    command = [*([namespace.model] if namespace.model else []), *namespace.serve_flags]
    baselines = [await _measure_server(namespace, command, "with everything")]
    rows: list[dict[str, Any]] = []
    for mechanism in dict.fromkeys(namespace.without):
        row: dict[str, Any] = {"without": mechanism, "flag": MECHANISMS[mechanism]}
        try:
            rounds = await _measure_server(namespace, [*command, MECHANISMS[mechanism]], f"without {mechanism}")
        except EngineError as error:
            print(f"mmv1: without {mechanism}: {error}", file=sys.stderr)
            rows.append(row | {"error": str(error)})
            continue
        baselines.append(await _measure_server(namespace, command, "with everything"))
        rows.append(row | compared(rounds, baselines[-2] + baselines[-1]) | {"rounds": rounds})
    everything = [one for rounds in baselines for one in rounds]
    result = {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "workload": namespace.workload,
        "model": namespace.model,
        "serve_flags": namespace.serve_flags,
        "seed": namespace.seed,
        "baseline": medians_of(everything) | {"rounds": everything},
        "ablations": rows,
    }
    print("\n".join(lines_of(result)))
    if namespace.save_result or namespace.save_detailed:
        save(namespace, result, f"ablate-{namespace.workload}-{result['date']}.json")
    return 1 if any("error" in row for row in rows) else 0


async def _measure_server(namespace: argparse.Namespace, command: Sequence[str], name: str) -> list[Round]:
    """The figures of every round on one server. Raises EngineError when it does not start, or answers nothing."""
    rounds = []
    async with running_server(command) as server:
        print(f"mmv1: {name}: ready after {server.ready_s:.1f} s", file=sys.stderr)
        async with LoadClient(server.url, ignore_eos=True) as client:
            model = (await client.first_model()).id
            for index in range(namespace.rounds):
                load = named_load(
                    namespace.workload,
                    namespace.seed + index,
                    num_prompts=namespace.num_prompts,
                    max_concurrency=namespace.max_concurrency,
                    num_warmups=None if index == 0 else 0,
                )
                await warm_up(client, model, load)
                samples, duration_s = await measure(client, model, load)
                figures = figures_of(samples, duration_s)
                if figures["failed"]:
                    raise EngineError(f"{figures['failed']} requests failed; one of the errors: {figures['errors'][0]}")
                details = details_of(samples) if namespace.save_detailed else {}
                rounds.append({"ready_s": server.ready_s, **figures, **details})
    return rounds


def medians_of(rounds: Sequence[Round]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in _FIGURES}


def compared(rounds: Sequence[Round], baseline: Sequence[Round]) -> dict[str, Any]:
    """The medians, and each of them divided by the baseline's; 0 where that is 0, as of times that nobody had."""
    own, others = medians_of(rounds), medians_of(baseline)
    return own | {f"{name}_ratio": own[name] / others[name] if others[name] else 0.0 for name in _FIGURES}


def lines_of(result: dict[str, Any]) -> list[str]:
    """The ratio in brackets: to all mechanisms together."""
    head = f"{result['workload']:<18}{'req/s':>18}{'tok/s':>18}{'TTFT ms':>18}{'TPOT ms':>18}"
    lines = [head, f"{'everything':<18}" + "".join(f"{result['baseline'][name]:>18.2f}" for name in _FIGURES)]
    for row in result["ablations"]:
        figures = "  failed" if "error" in row else "".join(_cell(row[name], row[f"{name}_ratio"]) for name in _FIGURES)
        lines.append(f"- {row['without']:<16}{figures}")
    return lines


def _cell(value: float, ratio: float) -> str:
    spelled = f"{value:.2f} ({ratio:.2f})"
    return f"{spelled:>18}"
