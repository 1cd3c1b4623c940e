"""Choosing the next token of every request in a batch, each by its own parameters, without reading the device back.

Order and meanings are vLLM's: biases, bans and masks (token_rules.py), penalties, temperature, min_p, top_k, top_p, then a draw.
The draw is Gumbel-max (argmax of the logits plus Gumbel noise is a sample of their softmax), and the noise is a function of (the
request's seed, the number of tokens generated so far, the token id): no generator state, the same draw whatever else is in the
batch.

Where fused kernels run, requests that ask for a temperature at most are served by one, in a pass over the logits as they are; the
others of the batch go through torch, as all do elsewhere.
"""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

import numpy as np
import torch

from mmv1.kernels import uses_fused
from mmv1.runner.platform import Platform
from mmv1.runner.sampling_columns import SamplingBatch
from mmv1.runner.token_rules import apply_masks, apply_token_rules

_GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's increment and multipliers (Steele, Lea and Flood, 2014)
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MAX_NOISE_NUMBERS = 1 << 24  # of noise made at a time: bounds the memory of a large batch over a large vocabulary


class LogprobTensors(NamedTuple):
    """Of the L requests that asked, in the batch's order."""

    requests: np.ndarray  # int64 [L], host: their places in the batch
    top_ids: torch.Tensor  # int64 [L, most asked for], most likely first
    top_logprobs: torch.Tensor  # float32, likewise
    sampled_logprob: torch.Tensor  # float32 [L]
    sampled_rank: torch.Tensor  # int64 [L]; 1 is the most likely

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What has to travel to the host."""
        return self.top_ids, self.top_logprobs, self.sampled_logprob, self.sampled_rank


class SamplerOutput(NamedTuple):
    token_ids: torch.Tensor  # int64 [S]
    logprobs: LogprobTensors | None


class Sampler:
    def __init__(self, platform: Platform, vocab_size: int) -> None:
        self._platform = platform
        self._vocab_size = vocab_size
        self._fused = uses_fused(platform.device)
        counters = np.arange(1, vocab_size + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        self._token_counters = platform.upload(counters.view(np.int64))  # [V]: a SplitMix64 stream's places

    def __call__(self, logits: torch.Tensor, batch: SamplingBatch, token_ids: torch.Tensor) -> SamplerOutput:
        """`logits` [S, V] as the model gives them; `token_ids` int32 [rows, width]: every known token, on the device."""
        simple = batch.is_simple
        if not self._fused or not simple.any():
            return self._choose(logits, batch, token_ids)
        if simple.all():
            return SamplerOutput(self._choose_fused(logits, batch), None)
        which, others = np.flatnonzero(simple), np.flatnonzero(~simple)
        places, other_places = self._platform.upload_together(which, others)
        chosen = self._choose(logits.index_select(0, other_places), _select(batch, others), token_ids)
        sampled = torch.empty(len(simple), dtype=torch.int64, device=logits.device)
        sampled.index_copy_(0, places, self._choose_fused(logits.index_select(0, places), _select(batch, which)))
        sampled.index_copy_(0, other_places, chosen.token_ids)
        logprobs = chosen.logprobs
        if logprobs is not None:
            logprobs = logprobs._replace(requests=others[logprobs.requests])
        return SamplerOutput(sampled, logprobs)

    def _choose_fused(self, logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        from mmv1.kernels.sampling import gumbel_argmax

        keys = _stream_keys(batch.seed, batch.num_tokens - batch.num_prompt_tokens)
        keys_on_device, temperature = self._platform.upload_together(keys, batch.temperature)
        return gumbel_argmax(logits, temperature, keys_on_device)

    def _choose(self, logits: torch.Tensor, batch: SamplingBatch, token_ids: torch.Tensor) -> SamplerOutput:
        raw = logits.float()
        scores = apply_token_rules(raw, batch, token_ids, self._platform)
        scores = apply_masks(scores, batch, self._platform)
        scores = self._penalize(scores, batch, token_ids)
        random = np.flatnonzero(batch.temperature > 0)
        if len(random) == len(batch.rows):
            sampled = self._draw(scores, batch, random)
        else:
            sampled = scores.argmax(dim=-1)
            if len(random):
                places = self._platform.upload(random)
                sampled.index_copy_(0, places, self._draw(scores.index_select(0, places), batch, random))
        return SamplerOutput(sampled, self._logprobs(raw, sampled, batch))

    def _penalize(self, raw: torch.Tensor, batch: SamplingBatch, token_ids: torch.Tensor) -> torch.Tensor:
        """`raw` itself, or a copy in which the requests that ask have their penalties: repetition for tokens of the prompt or
        the output (divides positive logits, multiplies negative ones; Keskar et al., 2019), presence and frequency for
        tokens of the output."""
        which = np.flatnonzero(_asks_for_penalties(batch))
        if not len(which):
            return raw
        width = int(batch.num_tokens[which].max())
        places, rows, num_tokens, num_prompt, *penalties = self._platform.upload_together(
            which, batch.rows[which], batch.num_tokens[which], batch.num_prompt_tokens[which],
            batch.repetition_penalty[which], batch.presence_penalty[which], batch.frequency_penalty[which],
        )  # fmt: skip
        repetition, presence, frequency = (column.unsqueeze(1) for column in penalties)
        tokens = token_ids[:, :width].index_select(0, rows).long()  # [P, width]
        index = torch.arange(width, device=tokens.device)
        known = index < num_tokens.unsqueeze(1)
        generated = known & (index >= num_prompt.unsqueeze(1))
        counts = raw.new_zeros(2, len(which), self._vocab_size)
        seen, produced = counts.scatter_add_(2, tokens.expand(2, -1, -1), torch.stack((known, generated)).to(raw.dtype))
        scores = raw.index_select(0, places)
        repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
        scores = torch.where(seen > 0, repeated, scores)
        scores -= frequency * produced + presence * (produced > 0)
        return raw.index_copy(0, places, scores)

    def _draw(self, scores: torch.Tensor, batch: SamplingBatch, which: np.ndarray) -> torch.Tensor:
        """int64 [len(which)]: a token for each of the requests at `which`, whose rows `scores` are."""
        temperature, min_p, top_p = self._platform.upload_together(
            batch.temperature[which], batch.min_p[which], batch.top_p[which]
        )
        scores = scores / temperature.unsqueeze(1)
        if (batch.min_p[which] > 0).any():
            least = scores.amax(dim=-1, keepdim=True) + min_p.log().unsqueeze(1)
            scores.masked_fill_(scores < least, -torch.inf)
        limited = np.flatnonzero((batch.top_k[which] > 0) | (batch.top_p[which] < 1))
        if len(limited):
            places = self._platform.upload(limited)
            chosen = self._keep_top(scores.index_select(0, places), batch.top_k[which[limited]], top_p.index_select(0, places))
            scores.index_copy_(0, places, chosen)
        num_generated = batch.num_tokens[which] - batch.num_prompt_tokens[which]
        keys = self._platform.upload(_stream_keys(batch.seed[which], num_generated))
        at_once = max(1, _MAX_NOISE_NUMBERS // self._vocab_size)
        chunks = zip(scores.split(at_once), keys.split(at_once), strict=True)
        return torch.cat([(part - self._log_exponential(part_keys)).argmax(dim=-1) for part, part_keys in chunks])

    def _keep_top(self, scores: torch.Tensor, top_k: np.ndarray, top_p: torch.Tensor) -> torch.Tensor:
        """`scores` [P, V] with -inf for what is neither among the row's `top_k` (0: all) largest, nor, of these, in the smallest
        set of most likely tokens whose probability reaches `top_p`. The most likely one always stays."""
        limits = np.where(top_k > 0, np.minimum(top_k, self._vocab_size), self._vocab_size)
        values, ids = scores.topk(int(limits.max()), dim=-1)
        rank = torch.arange(values.shape[1], device=values.device)
        values.masked_fill_(rank >= self._platform.upload(limits).unsqueeze(1), -torch.inf)
        probabilities = values.softmax(dim=-1)
        likelier = probabilities.cumsum(dim=-1) - probabilities  # of all before it
        outside = (likelier >= top_p.unsqueeze(1)) & (rank > 0) & (top_p < 1).unsqueeze(1)
        values.masked_fill_(outside, -torch.inf)
        return torch.full_like(scores, -torch.inf).scatter_(1, ids, values)

    def _log_exponential(self, keys: torch.Tensor) -> torch.Tensor:
        """float32 [P, V]: logarithms of exponential variates, which are negated Gumbel noise, for stream keys int64 [P].

        SplitMix64's finalizer on int64, whose products wrap as unsigned ones do. 40 bits make a uniform number that is as fine
        near 0, where the winners are, as a float32 can be."""
        z = self._token_counters + keys.unsqueeze(1)
        z = (z ^ _logical_shift(z, 30)).mul_(_as_int64(_MIX[0]))
        z = (z ^ _logical_shift(z, 27)).mul_(_as_int64(_MIX[1]))
        z ^= _logical_shift(z, 31)
        uniform = _logical_shift(z, 24).float().add_(0.5).mul_(2.0**-40).clamp_(max=1 - 2.0**-24)
        return uniform.neg_().log1p_().neg_().log_()

    def _logprobs(self, raw: torch.Tensor, sampled: torch.Tensor, batch: SamplingBatch) -> LogprobTensors | None:
        """Log-probabilities of the model's own logits, before any parameter touched them."""
        which = np.flatnonzero(batch.logprobs >= 0)
        if not len(which):
            return None
        places = self._platform.upload(which)
        logprobs = raw.index_select(0, places).log_softmax(dim=-1)
        chosen = logprobs.gather(1, sampled.index_select(0, places).unsqueeze(1))
        rank = (logprobs > chosen).sum(dim=-1) + 1
        most = min(int(batch.logprobs[which].max()), self._vocab_size)
        top = logprobs.topk(most, dim=-1)
        return LogprobTensors(which, top.indices, top.values, chosen.squeeze(1), rank)


def _asks_for_penalties(batch: SamplingBatch) -> np.ndarray:
    return (batch.repetition_penalty != 1) | (batch.presence_penalty != 0) | (batch.frequency_penalty != 0)


def _select(batch: SamplingBatch, which: np.ndarray) -> SamplingBatch:
    """The requests at `which`."""
    return SamplingBatch(**{field.name: getattr(batch, field.name)[which] for field in fields(batch)})


def _logical_shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """`z` >> bits as if unsigned, which torch's shift of an int64 is not."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _as_int64(value: int) -> int:
    """The signed number of the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX[0])
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX[1])
    return z ^ (z >> np.uint64(31))


def _stream_keys(seed: np.ndarray, num_generated: np.ndarray) -> np.ndarray:
    """int64: where the noise of this token begins in the space of all streams."""
    return _mix(_mix(seed + np.uint64(_GOLDEN)) + num_generated.astype(np.uint64) * np.uint64(_GOLDEN)).view(np.int64)
