"""The blocks themselves: who is free, who holds which hash. Every operation on one block is O(1).

Freed blocks keep their content and hash until they are handed out again, so a prefix survives its request. The free queue is
a doubly linked list through the blocks (no allocation, removal from the middle in O(1)), least recently used first; blocks
without a hash are worth nothing to anyone and go to its front.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

NULL_BLOCK_ID = 0  # never handed out: padding may point at it


class KVBlock:
    __slots__ = ("block_hash", "block_id", "next_free", "prev_free", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.block_hash: bytes | None = None  # set while the block is full and findable in the prefix cache
        self.prev_free: KVBlock | None = None  # both set exactly while the block is in the free queue
        self.next_free: KVBlock | None = None


class FreeQueue:
    """An intrusive doubly linked list of free blocks between two sentinels."""

    def __init__(self, blocks: Iterable[KVBlock]) -> None:
        self._head, self._tail = KVBlock(-1), KVBlock(-1)
        self._head.next_free, self._tail.prev_free = self._tail, self._head
        self.size = 0
        for block in blocks:
            self.append(block)

    def _insert(self, block: KVBlock, before: KVBlock) -> None:
        previous = before.prev_free
        assert previous is not None
        block.prev_free, block.next_free = previous, before
        previous.next_free = before.prev_free = block
        self.size += 1

    def append(self, block: KVBlock) -> None:
        self._insert(block, self._tail)

    def append_left(self, block: KVBlock) -> None:
        first = self._head.next_free
        assert first is not None
        self._insert(block, first)

    def remove(self, block: KVBlock) -> None:
        previous, following = block.prev_free, block.next_free
        assert previous is not None and following is not None
        previous.next_free, following.prev_free = following, previous
        block.prev_free = block.next_free = None
        self.size -= 1

    def pop_left(self) -> KVBlock:
        block = self._head.next_free
        if block is None or block is self._tail:
            raise IndexError("the free queue is empty")
        self.remove(block)
        return block

    def __iter__(self) -> Iterator[KVBlock]:
        block = self._head.next_free
        while block is not None and block is not self._tail:
            yield block
            block = block.next_free


class BlockPool:
    """`num_blocks` blocks, of which id 0 is the null block. A block is either referenced or in the free queue."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError("a block pool needs the null block and at least one more")
        self.blocks = [KVBlock(block_id) for block_id in range(num_blocks)]
        self._free = FreeQueue(self.blocks[NULL_BLOCK_ID + 1 :])
        self._cached: dict[bytes, KVBlock] = {}
        self.num_evictions = 0  # of cached content, since start

    @property
    def num_usable(self) -> int:
        return len(self.blocks) - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, cached content or not."""
        return self._free.size

    def find(self, block_hash: bytes) -> KVBlock | None:
        return self._cached.get(block_hash)

    def take(self, count: int) -> list[KVBlock]:
        """`count` blocks with one reference each and undefined content. The caller has checked num_free."""
        taken = []
        for _ in range(count):
            block = self._free.pop_left()
            if block.block_hash is not None:
                self._evict(block)
            block.ref_count = 1
            taken.append(block)
        return taken

    def _evict(self, block: KVBlock) -> None:
        assert block.block_hash is not None
        del self._cached[block.block_hash]
        block.block_hash = None
        self.num_evictions += 1

    def touch(self, blocks: Iterable[KVBlock]) -> None:
        """Add a reference to each: they leave the free queue if they were in it."""
        for block in blocks:
            if block.ref_count == 0:
                self._free.remove(block)
            block.ref_count += 1

    def release(self, blocks: list[KVBlock]) -> None:
        """Drop a reference to each of one request's blocks. Later blocks become evictable before earlier ones, since a
        prefix is useless without its beginning."""
        for block in reversed(blocks):
            block.ref_count -= 1
            if block.ref_count == 0:
                if block.block_hash is None:
                    self._free.append_left(block)
                else:
                    self._free.append(block)

    def publish(self, block: KVBlock, block_hash: bytes) -> None:
        """Make a full block findable. If an equal block is already known, that one stays the findable one."""
        if block.block_hash is None and block_hash not in self._cached:
            block.block_hash = block_hash
            self._cached[block_hash] = block

    def forget_unreferenced(self) -> None:
        """Empty the prefix cache of everything no live request holds."""
        for block in self._free:
            if block.block_hash is not None:
                self._evict(block)

    def check_integrity(self) -> None:
        """Raise if the ledger contradicts itself (tests)."""
        free = list(self._free)
        referenced = [block for block in self.blocks if block.ref_count > 0]
        if len(free) != self._free.size or len({block.block_id for block in free}) != len(free):
            raise RuntimeError("the free queue's links and size disagree")
        if any(block.ref_count for block in free) or len(free) + len(referenced) != self.num_usable:
            raise RuntimeError(f"{len(free)} free and {len(referenced)} referenced blocks are not {self.num_usable}")
        if any(block.block_hash != block_hash for block_hash, block in self._cached.items()):
            raise RuntimeError("a cached hash points at a block that does not carry it")
        if sum(block.block_hash is not None for block in self.blocks) != len(self._cached):
            raise RuntimeError("a block carries a hash that is not findable")
