"""Which pictures' pixels the core has asked for, and where they lie. Pixels are asked for when they turn out to be needed.

A picture is here from the moment it is asked for until the batch that encodes it is done, or until no live request wants it.
The answer to an older ticket is recognised and dropped. Sizes are in patches, the unit both sides know.
"""

from __future__ import annotations

from collections.abc import Callable

from mmv1.types import FeatureFailed, FeatureReady, MMFeature, PixelRequest


class PixelState:
    __slots__ = ("is_encoding", "nbytes", "num_patches", "offset", "ticket", "wanted_by")

    def __init__(self, ticket: int, num_patches: int) -> None:
        self.ticket = ticket
        self.num_patches = num_patches
        self.wanted_by: set[str] = set()  # request ids
        self.offset = self.nbytes = -1  # in the slab, once ready
        self.is_encoding = False  # a batch in flight reads the slot: it cannot be given up

    @property
    def is_ready(self) -> bool:
        return self.offset >= 0


class PixelLedger:
    """`max_ahead_patches` bounds what is asked for ahead of need: the rest of the slab serves what is needed now."""

    def __init__(self, max_ahead_patches: int) -> None:
        self._max_ahead_patches = max_ahead_patches
        self._states: dict[bytes, PixelState] = {}
        self._wanted: dict[str, set[bytes]] = {}  # request_id -> hashes it is listed at
        self._num_patches = 0
        self._ticket = 0
        self._requests: list[PixelRequest] = []
        self._releases: list[bytes] = []
        self.num_requests = 0

    def get(self, mm_hash: bytes) -> PixelState | None:
        return self._states.get(mm_hash)

    def want(self, feature: MMFeature, request_id: str, *, ahead: bool) -> PixelState | None:
        """The picture's state, asking for its pixels if nobody has. None: not now, too much is asked for ahead already."""
        state = self._states.get(feature.mm_hash)
        if state is None:
            frames, height, width = feature.grid_thw
            num_patches = frames * height * width
            if ahead and self._num_patches + num_patches > self._max_ahead_patches:
                return None
            self._ticket += 1
            state = self._states[feature.mm_hash] = PixelState(self._ticket, num_patches)
            self._num_patches += num_patches
            self._requests.append(PixelRequest(feature.mm_hash, self._ticket))
            self.num_requests += 1
        if request_id not in state.wanted_by:
            state.wanted_by.add(request_id)
            self._wanted.setdefault(request_id, set()).add(feature.mm_hash)
        return state

    def ready(self, message: FeatureReady) -> bool:
        """Pixels arrived. False if they are no longer awaited under that ticket."""
        state = self._states.get(message.mm_hash)
        if state is None or state.ticket != message.ticket or state.is_ready:
            return False
        state.offset, state.nbytes = message.offset, message.nbytes
        return True

    def failed(self, message: FeatureFailed) -> list[str]:
        """Pixels cannot be had: the ids of the requests that wanted them."""
        state = self._states.get(message.mm_hash)
        if state is None or state.ticket != message.ticket or state.is_ready:
            return []
        self._remove(message.mm_hash, state)
        return list(state.wanted_by)

    def encoded(self, mm_hash: bytes) -> None:
        """The batch that read the slot is done: it is released."""
        self._remove(mm_hash, self._states[mm_hash])
        self._releases.append(mm_hash)

    def make_room(self, urgency: Callable[[str, bytes], tuple[object, ...]]) -> None:
        """The slab is short: give up every slot, held or awaited, for the sake of the most urgent picture still awaited.

        `urgency(request_id, mm_hash)` orders all wants, the smallest first. What is given up will be asked for again, and
        then waits behind what was kept. Slots that a batch in flight reads are not touched.
        """
        ranks = {
            mm_hash: min(urgency(request_id, mm_hash) for request_id in state.wanted_by)
            for mm_hash, state in self._states.items()
            if not state.is_encoding
        }
        awaited = [rank for mm_hash, rank in ranks.items() if not self._states[mm_hash].is_ready]
        if not awaited:
            return
        first = min(awaited)
        for mm_hash, rank in ranks.items():
            if rank > first:
                self._remove(mm_hash, self._states[mm_hash])
                self._releases.append(mm_hash)

    def forget_request(self, request_id: str) -> None:
        """The request wants no more pixels: what only it wanted is released, or withdrawn."""
        for mm_hash in self._wanted.pop(request_id, ()):
            state = self._states[mm_hash]
            state.wanted_by.discard(request_id)
            if not state.wanted_by and not state.is_encoding:
                self._remove(mm_hash, state)
                self._releases.append(mm_hash)

    def _remove(self, mm_hash: bytes, state: PixelState) -> None:
        del self._states[mm_hash]
        self._num_patches -= state.num_patches
        for request_id in state.wanted_by:
            wanted = self._wanted[request_id]
            wanted.discard(mm_hash)
            if not wanted:
                del self._wanted[request_id]

    def take_messages(self) -> tuple[list[PixelRequest], list[bytes]]:
        """What to tell the API server since the last call. The receiver applies the releases first, so a picture released and
        asked for again in between stays wanted; what was asked for and given up again is not sent at all."""
        requests, self._requests = self._requests, []
        releases, self._releases = self._releases, []
        states = self._states
        current = [r for r in requests if (state := states.get(r.mm_hash)) is not None and state.ticket == r.ticket]
        return current, releases

    @property
    def num_pending(self) -> int:
        return len(self._states)

    def check_integrity(self) -> None:
        if self._num_patches != sum(state.num_patches for state in self._states.values()):
            raise RuntimeError("outstanding patches are not the sum of the states")
        pairs = {(request_id, mm_hash) for request_id, hashes in self._wanted.items() for mm_hash in hashes}
        if pairs != {(request_id, mm_hash) for mm_hash, state in self._states.items() for request_id in state.wanted_by}:
            raise RuntimeError("requests and pictures disagree on who wants what")
