"""What one prompt and its answers come to: tokens for the client's usage, times and counts for the metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mmv1.api.metrics import Metrics
from mmv1.api.protocol import PromptTokensDetails, Usage
from mmv1.engine.output_processor import RequestOutput


class Tally:
    """Of one prompt, from now on."""

    def __init__(self, metrics: Metrics) -> None:
        self._timer = metrics.start_request()
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_image_tokens = 0
        self.num_completion_tokens = 0

    def count(self, output: RequestOutput) -> None:
        num_new_tokens = 0
        for news in output.outputs:
            num_new_tokens += len(news.token_ids)
        self.num_prompt_tokens = output.num_prompt_tokens
        if output.num_cached_tokens > self.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens
        self.num_image_tokens = output.num_image_tokens
        self.num_completion_tokens += num_new_tokens
        self._timer.output(output.num_prompt_tokens, num_new_tokens)
        for news in output.outputs:
            if news.finish_reason is not None:
                self._timer.finish(news.finish_reason)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Says how the request ended, if no answer of it did."""
        try:
            yield
        except Exception:
            self._timer.finish("error")
            raise
        finally:
            self._timer.finish_unless_finished("abort")


def usage_of(tallies: Sequence[Tally]) -> Usage:
    """Of all together."""
    prompt_tokens = sum(tally.num_prompt_tokens for tally in tallies)
    completion_tokens = sum(tally.num_completion_tokens for tally in tallies)
    cached_tokens = sum(tally.num_cached_tokens for tally in tallies)
    details = PromptTokensDetails(cached_tokens, sum(tally.num_image_tokens for tally in tallies))
    return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, details)
