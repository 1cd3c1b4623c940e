"""The KV ledger: which blocks each request holds, and what of a prompt is already there.

Unit: blocks of `block_size` tokens. It knows ids and hashes, never tensors. Blocks are published for reuse when they are
*scheduled* to be filled, not when they are: workers run steps in order, and within a step write all KV of a layer before they
read any, so whoever finds a published block reads it after it was written.
"""

from __future__ import annotations

from mmv1.kv.block_hash import BlockHasher
from mmv1.kv.block_pool import BlockPool, KVBlock
from mmv1.request import Request


class KVCacheManager:
    def __init__(self, num_blocks: int, block_size: int, hasher: BlockHasher | None) -> None:
        """`hasher` None switches prefix caching off."""
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self._hasher = hasher
        self._held: dict[str, list[KVBlock]] = {}
        self._num_published: dict[str, int] = {}  # of a request's blocks, how many were offered to the prefix cache

    @property
    def num_used_blocks(self) -> int:
        return self.pool.num_usable - self.pool.num_free

    def find_prefix(self, request: Request) -> list[KVBlock]:
        """The longest run of cached blocks that begins the request. At least one token is left to compute, since sampling
        needs the last token's output. Nothing is referenced yet: `allocate` does that."""
        if self._hasher is None:
            return []
        num_blocks = (request.num_tokens - 1) // self.block_size
        self._hasher.extend(request, num_blocks)
        found = []
        find = self.pool.find
        for block_hash in request.block_hashes[:num_blocks]:
            block = find(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def finds_more(self, request: Request) -> bool:
        """Whether somebody else has filled the block that a running request's next token goes to. Costs one look-up; how far
        the prefix goes by now is `find_prefix`'s to say. False near the request's end, as `find_prefix` leaves a token."""
        index = request.num_computed_tokens // self.block_size
        if self._hasher is None or (index + 1) * self.block_size >= request.num_tokens:
            return False
        self._hasher.extend(request, index + 1)
        return self.pool.find(request.block_hashes[index]) is not None

    def adopt(self, request: Request, prefix: list[KVBlock]) -> None:
        """Exchange all that the request holds for a longer prefix that others have computed. It cannot lack room: nothing is
        taken but what is found."""
        held = self._held[request.request_id]
        self.pool.touch(prefix)
        self.pool.release(held)
        self._held[request.request_id] = list(prefix)
        self._num_published[request.request_id] = len(prefix)
        request.kv_capacity = len(prefix) * self.block_size

    def block_ids(self, request: Request) -> list[int]:
        """Of all the blocks the request holds, in order."""
        return [block.block_id for block in self._held[request.request_id]]

    def allocate(self, request: Request, num_tokens: int, prefix: list[KVBlock] | None = None) -> list[int] | None:
        """Give the request room for its first `num_tokens` tokens and publish the blocks that its confirmed tokens fill.

        `prefix`: for a request that holds nothing yet, the cached blocks it begins with. Returns the ids of its new blocks
        (the prefix's included), or None, with nothing changed, when there are not enough free blocks.
        """
        held = self._held.get(request.request_id)
        prefix = prefix or []
        num_new = -(-num_tokens // self.block_size) - len(held or ()) - len(prefix)
        num_prefix_free = sum(block.ref_count == 0 for block in prefix)  # these leave the free queue by being touched
        if num_new > self.pool.num_free - num_prefix_free:
            return None
        if held is None:
            held = self._held[request.request_id] = []
            self._num_published[request.request_id] = len(prefix)
        self.pool.touch(prefix)
        fresh = self.pool.take(num_new) if num_new > 0 else []
        held += prefix
        held += fresh
        request.kv_capacity = len(held) * self.block_size
        self._publish(request, held, num_tokens)
        return [block.block_id for block in prefix] + [block.block_id for block in fresh]

    def _publish(self, request: Request, held: list[KVBlock], num_tokens: int) -> None:
        """Offer the blocks that are full within the first `num_tokens` tokens and whose tokens are all confirmed."""
        if self._hasher is None:
            return
        num_full = min(num_tokens, request.num_tokens) // self.block_size
        published = self._num_published[request.request_id]
        if num_full <= published:
            return
        self._hasher.extend(request, num_full)
        for index in range(published, num_full):
            self.pool.publish(held[index], request.block_hashes[index])
        self._num_published[request.request_id] = num_full

    def publish(self, request: Request, num_tokens: int) -> None:
        """Offer the blocks that the first `num_tokens` tokens, all scheduled, fill."""
        held = self._held.get(request.request_id)
        if held is not None:
            self._publish(request, held, num_tokens)

    def free(self, request: Request) -> None:
        """Drop all the request holds. What it published stays findable until the room is needed."""
        held = self._held.pop(request.request_id, None)
        if held is None:
            return
        del self._num_published[request.request_id]
        request.kv_capacity = 0
        self.pool.release(held)

    def check_integrity(self) -> None:
        """Raise if references and holdings disagree."""
        self.pool.check_integrity()
        references: dict[int, int] = {}
        for held in self._held.values():
            for block in held:
                references[block.block_id] = references.get(block.block_id, 0) + 1
        for block in self.pool.blocks[1:]:
            held_times = references.get(block.block_id, 0)
            if block.ref_count != held_times:
                raise RuntimeError(f"block {block.block_id} has {block.ref_count} references, not {held_times}")
