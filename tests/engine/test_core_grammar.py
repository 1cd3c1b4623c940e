"""A request with a grammar enters the schedule when that is compiled; meanwhile it can be aborted, and others run."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import msgspec

from mmv1.engine.core import EngineCore
from mmv1.engine.executor import UniProcExecutor
from mmv1.errors import RequestError
from mmv1.types import Abort, EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason, StructuredOutputs
from tests.engine.test_core import make_scheduler
from tests.scheduler.test_scheduler_grammar import Matcher, mask_after
from tests.simulation import SimulatedWorker, expected_output, make_request


class Compiler:
    """Compiles when it is told to."""

    def __init__(self) -> None:
        self.compiling: list[Future[Any]] = []

    def compile(self, asked: StructuredOutputs) -> Future[Any]:
        self.compiling.append(Future())
        return self.compiling[-1]


def with_grammar(request: EngineCoreRequest) -> EngineCoreRequest:
    params = msgspec.structs.replace(request.sampling_params, structured_outputs=StructuredOutputs(regex="x"))
    return msgspec.structs.replace(request, sampling_params=params)


class Run:
    def __init__(self) -> None:
        self.outputs: list[EngineCoreOutput] = []
        self.grammars = Compiler()
        executor = UniProcExecutor(SimulatedWorker(256, 4, 64))
        self.core = EngineCore(make_scheduler(), executor, self._take, grammars=self.grammars)  # type: ignore[arg-type]

    def _take(self, news: EngineCoreOutputs) -> None:
        self.outputs += news.outputs

    def until_finished(self, request_id: str) -> list[int]:
        while not any(each.request_id == request_id and each.finish_reason is not None for each in self.outputs):
            self.core.run_once()
        return [token for each in self.outputs if each.request_id == request_id for token in each.new_token_ids]


def test_others_run_while_a_grammar_is_compiled() -> None:
    run = Run()
    request, other = with_grammar(make_request("g", [1, 2], max_tokens=6)), make_request("f", [3, 4], max_tokens=6)
    run.core.post(request)
    run.core.post(other)
    assert run.until_finished("f") == expected_output(other)
    assert not any(each.request_id == "g" for each in run.outputs)
    run.grammars.compiling[0].set_result(Matcher())
    assert run.until_finished("g") == expected_output(request, mask_after)
    run.core.stop()
    run.core.run()


def test_a_request_aborted_while_its_grammar_is_compiled_never_runs() -> None:
    run = Run()
    run.core.post(with_grammar(make_request("g", [1, 2])))
    run.core.post(Abort(["g"]))
    other = make_request("f", [3, 4])
    run.core.post(other)
    run.until_finished("f")
    run.grammars.compiling[0].set_result(Matcher())
    run.core.run_once()
    assert not run.core.scheduler.has_requests
    run.core.stop()
    run.core.run()
    assert not any(each.request_id == "g" for each in run.outputs)


def test_what_cannot_be_compiled_ends_its_request_alone() -> None:
    run = Run()
    run.core.post(with_grammar(make_request("g", [1, 2])))
    other = make_request("f", [3, 4])
    run.core.post(other)
    run.until_finished("f")
    run.grammars.compiling[0].set_exception(RequestError("no", code="invalid_grammar"))
    assert run.until_finished("g") == []
    (last,) = [each for each in run.outputs if each.request_id == "g"]
    assert (last.finish_reason, last.error, last.error_code) == (FinishReason.ERROR, "no", "invalid_grammar")
    run.core.stop()
    run.core.run()
