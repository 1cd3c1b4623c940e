"""What the API server and the store process say to one another."""

from __future__ import annotations

import msgspec

from mmv1.preprocess.store_format import PictureShape


class StoreSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The store process's first line of standard input: it names secrets, which a command line would show to everybody."""

    runtime_dir: str
    generation: int
    slab_fd: int
    slab_bytes: int
    url: str
    ttl_s: int
    secret: bytes | None


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Write the picture's patches at `offset` of the slab, if the store has them."""

    job_id: int
    mm_hash: bytes
    shape: PictureShape
    offset: int


class Save(msgspec.Struct, frozen=True, tag="save"):
    """Keep the patches at `offset` of the slab. The slot may change as soon as the answer is there."""

    job_id: int
    mm_hash: bytes
    shape: PictureShape
    offset: int


class DropLease(msgspec.Struct, frozen=True, tag="drop"):
    """The picture will not be saved: another server may process it. Without an answer."""

    mm_hash: bytes


StoreCommand = Load | Save | DropLease


class StoreState(msgspec.Struct, frozen=True, tag="state"):
    """The first message of a generation, and whenever Redis comes or goes."""

    generation: int
    is_up: bool


class LoadDone(msgspec.Struct, frozen=True, tag="loaded"):
    """`outcome`: see redis_store.Outcome."""

    job_id: int
    outcome: str


class SaveDone(msgspec.Struct, frozen=True, tag="saved"):
    job_id: int
    was_saved: bool


StoreAnswer = StoreState | LoadDone | SaveDone

STORE_ANSWERS_SOCKET = "answers"
URL_REFUSED = 3  # exit status of a store process that cannot make sense of its URL: another would not either


def store_socket(generation: int) -> str:
    """The name of one store process's command socket: new for each, so that no command is ever sent to the dead."""
    return f"store.{generation}"
