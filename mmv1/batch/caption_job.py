"""One run of `mmv1 caption`, put together: sources -> selection -> captioner -> recorder (log, then sink).

The runner pulls samples as there is room for them, so that pictures are read, decoded, encoded, generated for and written at
the same time, each stage working for other pictures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from itertools import chain
from typing import Any

from mmv1.batch.backend import Backend, open_backend
from mmv1.batch.captioner import Captioner, Failure, PictureReader, Question
from mmv1.batch.clip import ClipScorer
from mmv1.batch.output import Output, OutputArgs, Selection, Shard
from mmv1.batch.progress import Progress
from mmv1.batch.runner import Summary, in_daemon_thread, on_signals
from mmv1.batch.runner import run as run_jobs
from mmv1.batch.sinks import Recorder, SidecarSink
from mmv1.batch.sources import Columns, Sample, count, samples
from mmv1.config import EngineArgs, PreprocessConfig, resolve
from mmv1.embedding.settings import DEFAULT_CLIP_MODEL
from mmv1.errors import ConfigError
from mmv1.preprocess.media import ImageLimits

_SOME_FAILED = 3  # exit statuses
_INTERRUPTED = 130
_LOAD_INTERVAL_S = 1.0
_BESIDE_THE_ENGINE = 64  # pictures being read, scored and written, on top of those that the backend has
# Engine flags that mean something without an engine here: how pictures are read and asked about.
_NOT_ONLY_THE_ENGINES = ("max_pixels", "seed", "allowed_media_domains", "media_fetch_timeout_s")


class CaptionJob:
    """`await CaptionJob(namespace, question).run()`, once."""

    def __init__(self, namespace: argparse.Namespace, question: Question) -> None:
        self._namespace = namespace
        self._question = question
        self._args: EngineArgs = namespace.engine_args
        self._columns = Columns(namespace.image_column, namespace.key_column)
        self._shard = Shard(*(namespace.shard or (0, 1)))
        # What the engine accepts by default; a server that accepts less says so.
        self._limits = ImageLimits(
            max_encoded_bytes=PreprocessConfig.max_encoded_bytes,
            max_pixels=PreprocessConfig.max_image_pixels,
            max_side=PreprocessConfig.max_image_side,
        )

    async def run(self) -> int:
        """The exit status. Looks whether there is work before it starts an engine for it. Raises ConfigError, EngineDeadError."""
        this_task = asyncio.current_task()
        if this_task is not None:
            on_signals(this_task.cancel)
        namespace = self._namespace
        async with AsyncExitStack() as stack:
            backend: Backend | None = None
            started: tuple[Backend, ClipScorer | None] | None = None
            if namespace.url is not None:
                backend = await stack.enter_async_context(open_backend(namespace.url, self._args_for_server()))
            model = resolve(self._args).model.served_model_name if backend is None else backend.model_name
            output = stack.enter_context(contextlib.closing(Output(self._output_args(), self._work(model))))
            if output.sets_aside:  # what is there is not touched by a run that cannot caption
                started = await self._start(stack, backend)
            output.begin()
            found = samples(namespace.source, self._columns, self._limits)
            selection = Selection(found, output.sink, self._shard, namespace.limit)
            todo = iter(selection)
            first = await in_daemon_thread(lambda: next(todo, None))
            if first is not None:
                backend, scorer = started or await self._start(stack, backend)
                captioner = self._captioner(stack, backend, scorer, output)
                summary = await self._caption(chain([first], todo), backend, captioner, output, selection)
                if summary.was_interrupted:
                    return _INTERRUPTED
            elif not selection.num_found:
                raise ConfigError(f"there are no pictures in {' '.join(namespace.source)}")
            else:
                _say(f"Nothing to do: all {selection.num_done} pictures have their captions" if selection.num_done else
                     "Nothing to do: no picture is in this share")  # fmt: skip
                _say_left_alone(output)
            if namespace.limit is None:
                output.end_overwriting()
            return _SOME_FAILED if output.errors.count else 0

    async def _start(self, stack: AsyncExitStack, backend: Backend | None) -> tuple[Backend, ClipScorer | None]:
        """The engine, unless a server is there already, and the process that scores, at the same time."""
        namespace, args = self._namespace, self._args
        scorer = None
        if namespace.rank is not None or namespace.min_clip_score is not None:
            scorer = ClipScorer(namespace.clip_model or DEFAULT_CLIP_MODEL)
            await scorer.start()
            stack.push_async_callback(scorer.close)
        if backend is None:
            backend = await stack.enter_async_context(open_backend(None, args))
        if scorer is not None:
            await scorer.wait_ready()
        return backend, scorer

    def _captioner(self, stack: AsyncExitStack, backend: Backend, scorer: ClipScorer | None, output: Output) -> Captioner:
        args = self._args
        reader = PictureReader(
            self._limits, allowed_domains=args.allowed_media_domains, timeout_s=args.media_fetch_timeout_s
        )
        stack.push_async_callback(reader.close)
        recorder = Recorder(output.log, output.sink)
        stack.push_async_callback(recorder.finish)  # before the output is closed
        return Captioner(
            backend, self._question, reader, output.log, recorder, seed=args.seed,
            scorer=scorer, min_clip_score=self._namespace.min_clip_score,
        )  # fmt: skip

    async def _caption(
        self, todo: Iterator[Sample], backend: Backend, captioner: Captioner, output: Output, selection: Selection
    ) -> Summary:
        num_captioned = 0
        progress = Progress()

        def note(sample: Sample, failure: Failure | None) -> None:
            nonlocal num_captioned
            num_captioned += failure is None
            if failure is not None:
                output.errors.write(sample.key, failure.code, failure.message)
            progress.finish(failed=failure is not None)

        showing = asyncio.create_task(self._show(progress, backend, selection))
        start = time.monotonic()
        was_finished = False
        try:
            max_inflight = self._namespace.max_inflight or backend.max_open + _BESIDE_THE_ENGINE
            summary = await run_jobs(todo, captioner, done=(), max_inflight=max_inflight, on_result=note)
            was_finished = not summary.was_interrupted
        finally:  # also when the engine dies
            showing.cancel()
            progress.set_skipped(selection.num_done)
            progress.close(was_finished=was_finished)
            self._report(num_captioned, time.monotonic() - start, captioner, output, selection)
            if not was_finished:
                _say(f"The rest, with the same command{' less --overwrite' * self._namespace.overwrite}: "
                     f"{shlex.join(['mmv1', *(word for word in sys.argv[1:] if word != '--overwrite')])}")  # fmt: skip
        return summary

    async def _show(self, progress: Progress, backend: Backend, selection: Selection) -> None:
        counting = asyncio.create_task(in_daemon_thread(lambda: count(self._namespace.source, self._columns)))
        while True:
            progress.set_skipped(selection.num_done)
            if counting.done() and (total := counting.result()) is not None:
                share = math.ceil(total / self._shard.count)
                progress.set_total(min(share, self._namespace.limit or share))
            progress.show_load(await backend.load())
            await asyncio.sleep(_LOAD_INTERVAL_S)

    def _report(
        self, num_captioned: int, seconds: float, captioner: Captioner, output: Output, selection: Selection
    ) -> None:
        num_repeated, errors = captioner.num_repeated, output.errors
        parts = [f"{num_captioned} pictures captioned in {seconds:.1f} s, {num_captioned / max(seconds, 1e-9):.1f} pictures/s"]
        parts += [f"{num_repeated} of them known by their bytes"] * (num_repeated > 0)
        parts += [f"{selection.num_done} were done before"] * (selection.num_done > 0)
        parts += [f"{errors.count} failed: {errors.path} says why"] * (errors.count > 0)
        _say("; ".join(parts))
        if captioner.num_cut:
            _say(f"{captioner.num_cut} captions were cut at --max-tokens {self._question.max_tokens}")
        _say_left_alone(output)

    def _args_for_server(self) -> EngineArgs:
        """Less the flags that mean something without an engine here; any other is for `open_backend` to refuse."""
        return dataclasses.replace(self._args, **{name: getattr(EngineArgs(), name) for name in _NOT_ONLY_THE_ENGINES})

    def _output_args(self) -> OutputArgs:
        namespace = self._namespace
        return OutputArgs(
            place=namespace.output,
            sources=namespace.source,
            shard=self._shard,
            extension=namespace.caption_extension or (".json" if namespace.schema else ".txt"),
            samples_a_shard=namespace.samples_per_shard,
            overwrite=namespace.overwrite,
        )

    def _work(self, model: str) -> dict[str, Any]:
        """All that captions depend on. Another seed, or more tries, are no reason to ask again about what has been answered."""
        namespace = self._namespace
        question = dataclasses.asdict(self._question)
        del question["num_tries"]
        is_scored = namespace.rank is not None or namespace.min_clip_score is not None
        return {
            "model": model,
            **question,
            "clip_model": (namespace.clip_model or DEFAULT_CLIP_MODEL) if is_scored else None,
            "min_clip_score": namespace.min_clip_score,
        }


def _say_left_alone(output: Output) -> None:
    if isinstance(output.sink, SidecarSink) and output.sink.num_left_alone:
        _say(f"{output.sink.num_left_alone} pictures have a text file that this command did not write, which was left alone; "
             "--overwrite replaces them")  # fmt: skip


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
