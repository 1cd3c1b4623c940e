"""Encode batches: which pictures' pixels to ask for, and which pictures to encode now, beside the steps.

Both follow one order, the order of need: running requests before waiting ones, each in their order, and each request's
pictures as its prompt comes to them. Room in the encoder cache is given in that order too. A picture may take what nobody asks
for; the most urgent one, before which everything needed is in the cache, may also take what only comes after it in the order,
the last needed first. If even that is not enough it waits, for steps and batches in flight alone, and nobody overtakes it.

That is why it never stands still: all that the most urgent picture cannot have is held by steps and batches in flight, which
end, or needed before it, by requests (its own included) that have all they need to go on and to be done with it. And since the
order is total and nobody takes from those before them, no two requests take from each other in turn.
"""

from __future__ import annotations

from collections.abc import Iterable

from mmv1.encoder_cache.manager import EncoderCacheManager
from mmv1.kv.manager import KVCacheManager
from mmv1.request import Request, RequestStatus
from mmv1.scheduler.pixels import PixelLedger
from mmv1.step import EncodeBatch, EncoderInput
from mmv1.types import MMFeature

MAX_PICTURES_AHEAD = 64  # needs looked at: bounds the host cost of a long waiting queue

# A batch is closed when it has this many picture tokens. The vision tower's matrix products are as fast as they get at that
# size (measured on an H100: four pictures of 1369 tokens take 15 ms each, one alone 18), and a larger batch would only end
# later: until it does, none of its requests can go on.
_BATCH_TOKENS = 5120


class EncodeScheduler:
    """`max_num_tokens`: of a batch; a picture alone may have more. Without `keeps_embeddings` an embedding is dropped as soon as
    nobody here needs it. `max_followed_tokens`: of all batches in flight together, where a step may follow them (see
    Scheduler.schedule)."""

    def __init__(
        self,
        kv: KVCacheManager,
        encoder_cache: EncoderCacheManager,
        pixels: PixelLedger,
        max_num_tokens: int,
        *,
        keeps_embeddings: bool = True,
        max_followed_tokens: int = 0,
    ) -> None:
        self._kv = kv
        self._cache = encoder_cache
        self._pixels = pixels
        self.max_num_tokens = max_num_tokens
        self._keeps_embeddings = keeps_embeddings
        self._max_followed_tokens = max_followed_tokens
        self.batch_of: dict[bytes, int] = {}  # pictures of batches in flight -> batch_id
        self._num_tokens_in_flight = 0
        self._num_batches = 0
        self.num_in_flight = 0
        # Whether anything happened since `schedule` last had nothing to do that may give it something to do. Whoever changes
        # what requests need, what of it is here, or what may be evicted, sets it. Only that a cached prefix is lost which
        # seemed to cover a picture, nobody would notice: it is looked at again when KV was evicted.
        self.changed = False
        self._relies_on_prefix = False
        self._num_evictions_seen = 0

    def schedule(self, requests: Iterable[Request]) -> EncodeBatch | None:
        """The next batch, or None when there is none to run now. `requests`: running, then waiting, in order."""
        num_evictions = self._kv.pool.num_evictions
        if not self.changed and not (self._relies_on_prefix and num_evictions != self._num_evictions_seen):
            return None
        self._relies_on_prefix = False
        self._num_evictions_seen = num_evictions
        needs = self._look_ahead(requests)
        if not self._keeps_embeddings:
            self._cache.forget_unreferenced(but=needs.keys())
        inputs = self._take_in_order_of_need(needs)
        self.changed = bool(inputs)  # then there may be more for the next batch
        if not inputs:
            return None
        self._num_batches += 1
        self.num_in_flight += 1
        self.batch_of |= {item.mm_hash: self._num_batches for item in inputs}
        self._num_tokens_in_flight += sum(item.num_tokens for item in inputs)
        return EncodeBatch(batch_id=self._num_batches, inputs=inputs, free_mm_hashes=self._cache.take_freed())

    @property
    def may_be_followed(self) -> bool:
        """Batches run in order, so whoever follows one waits for those before it too."""
        return 0 < self._num_tokens_in_flight <= self._max_followed_tokens

    def _look_ahead(self, requests: Iterable[Request]) -> dict[bytes, tuple[MMFeature, str]]:
        """The pictures that requests will come to, in the order of need, with the first request that does. Asks for the pixels
        of those that are not in the cache: now for what running requests, and the first of all, stand before; ahead for others.

        What a cached prefix covers is not needed. It is looked up only for who lacks a picture: who has them all can go on, so
        it does no harm to keep too many for it; whereas of who cannot, a picture that it is not going to use would be in the
        way of the one that it waits for."""
        cache, pixels = self._cache, self._pixels
        needs: dict[bytes, tuple[MMFeature, str]] = {}
        examined = 0
        is_ahead = False
        for request in requests:
            computed = covered = request.num_computed_tokens
            if computed >= request.mm_end:
                continue
            if any(f.mm_hash not in cache for f in request.mm_features if f.offset + f.num_tokens > computed):
                covered = self.num_covered_tokens(request)
            is_ahead = is_ahead and request.status is RequestStatus.WAITING
            for feature in request.mm_features:
                end = feature.offset + feature.num_tokens
                if end <= covered:
                    self._relies_on_prefix |= end > computed
                    continue
                is_missing = feature.mm_hash not in cache
                examined += 1
                if examined > MAX_PICTURES_AHEAD:
                    return needs
                needs.setdefault(feature.mm_hash, (feature, request.request_id))
                if is_missing:
                    pixels.want(feature, request.request_id, ahead=is_ahead)
                    is_ahead = True
        return needs

    def num_covered_tokens(self, request: Request) -> int:
        """Tokens of the request that it need not compute: because it has, or because the prefix cache has them."""
        computed = request.num_computed_tokens
        if request.status is RequestStatus.RUNNING and not self._kv.finds_more(request):
            return computed
        return max(computed, len(self._kv.find_prefix(request)) * self._kv.block_size)

    def _take_in_order_of_need(self, needs: dict[bytes, tuple[MMFeature, str]]) -> list[EncoderInput]:
        cache = self._cache
        for mm_hash in reversed(needs):
            cache.touch(mm_hash)  # so the last needed goes first
        inputs: list[EncoderInput] = []
        num_tokens = 0
        before: set[bytes] = set()
        is_most_urgent = True
        for mm_hash, (feature, request_id) in needs.items():
            if mm_hash not in cache:
                state = self._pixels.get(mm_hash)
                if state is None or not state.is_ready:
                    is_most_urgent = False
                    continue
                keep = before if is_most_urgent else needs.keys()
                is_too_much = num_tokens >= _BATCH_TOKENS or num_tokens + feature.num_tokens > self.max_num_tokens
                if (inputs and is_too_much) or not cache.fits(feature.num_tokens, keep):
                    break
                cache.allocate(mm_hash, feature.num_tokens, request_id, keep)
                state.is_encoding = True
                inputs.append(EncoderInput(mm_hash, state.offset, state.nbytes, feature.grid_thw, feature.num_tokens))
                num_tokens += feature.num_tokens
            before.add(mm_hash)
        return inputs

    def check_integrity(self) -> None:
        """Raise if the cache's ledger contradicts itself or the batches in flight."""
        self._cache.check_integrity(self.batch_of.keys(), may_be_read=self._max_followed_tokens > 0)

    def update(self, batch: EncodeBatch) -> None:
        """The batch is done: its pictures can be used, their slots in the slab are released."""
        self.num_in_flight -= 1
        self.changed = True
        for item in batch.inputs:
            del self.batch_of[item.mm_hash]
            self._num_tokens_in_flight -= item.num_tokens
            self._cache.complete(item.mm_hash)
            self._pixels.encoded(item.mm_hash)
