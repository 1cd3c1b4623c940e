"""What waits for a request's reader, without an engine."""

from __future__ import annotations

import asyncio

import pytest

from mmv1.engine.async_llm import _Stream
from mmv1.engine.output_processor import CompletionDelta, CompletionOutput
from mmv1.errors import EngineDeadError, RequestError


def delta(text: str, index: int = 0, reason: str | None = None, cached: int = 0) -> CompletionDelta:
    return CompletionDelta("r", CompletionOutput(index, text, [ord(text[0])], finish_reason=reason), 7, cached)


def test_a_reader_that_is_behind_gets_all_there_is_at_once() -> None:
    async def main() -> None:
        stream = _Stream("r", 2)
        waiting = asyncio.ensure_future(stream.next())
        await asyncio.sleep(0)
        assert not waiting.done()
        stream.emit(delta("a", cached=3))
        output = await waiting
        assert ([part.text for part in output.outputs], output.num_cached_tokens, output.num_prompt_tokens) == (["a"], 3, 7)
        for piece in (delta("b"), delta("x", 1, cached=5), delta("c"), delta("d", reason="stop")):
            stream.emit(piece)
        output = await stream.next()
        read = [(part.index, part.text, part.token_ids) for part in output.outputs]
        assert read == [(0, "bcd", [98, 99, 100]), (1, "x", [120])]
        assert (output.outputs[0].finish_reason, output.num_cached_tokens, stream.finished) == ("stop", 0, False)
        stream.emit(delta("y", 1, reason="length"))
        assert (await stream.next()).finished

    asyncio.run(main())


def test_an_error_comes_behind_the_text_before_it_and_stays_the_first() -> None:
    async def main() -> None:
        stream = _Stream("r", 1)
        stream.emit(delta("a"))
        stream.fail(EngineDeadError("first"))
        stream.fail(RequestError("second"))
        assert (await stream.next()).outputs[0].text == "a"
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="first"):
                await stream.next()

    asyncio.run(main())


def test_a_reader_that_gave_up_is_not_woken() -> None:
    async def main() -> None:
        stream = _Stream("r", 1)
        waiting = asyncio.ensure_future(stream.next())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        stream.emit(delta("a"))
        assert (await stream.next()).outputs[0].text == "a"

    asyncio.run(main())
