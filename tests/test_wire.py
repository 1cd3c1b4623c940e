"""Typed streams between processes."""

from __future__ import annotations

import asyncio
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mmv1.types import Abort, EngineCoreInput, EngineCoreRequest, FeatureReady, MMFeature, Ping, SamplingParams
from mmv1.wire import AsyncReceiver, AsyncSender, Receiver, Sender, ipc_address, new_runtime_dir

REQUEST = EngineCoreRequest(
    request_id="r",
    prompt_token_ids=[1, 2, 3],
    mm_features=[MMFeature(b"h" * 32, 1, 1, (1, 2, 2))],
    sampling_params=SamplingParams(stop=("a",), seed=-5),
    max_tokens=4,
    eos_token_ids=(7,),
    cache_salt=b"salt",
)


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    directory = new_runtime_dir()
    yield directory
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()


def test_the_directory_is_for_this_user_only(runtime_dir: Path) -> None:
    assert stat.S_IMODE(runtime_dir.stat().st_mode) == 0o700


def test_every_kind_of_message_arrives_as_it_was_sent_in_order(runtime_dir: Path) -> None:
    address = ipc_address(runtime_dir, "x")
    receiver: Receiver[EngineCoreInput] = Receiver(address, EngineCoreInput, bind=True)
    sender = Sender(address)
    messages = [REQUEST, Abort(["r"]), FeatureReady(b"h" * 32, 1, 4096, 588), Ping(3)]
    for message in messages:
        sender.send(message)
    assert [receiver.recv(timeout_s=10) for _ in messages] == messages
    assert receiver.recv(timeout_s=0.01) is None
    sender.close()
    receiver.close()


def test_a_payload_travels_beside_its_message(runtime_dir: Path) -> None:
    address = ipc_address(runtime_dir, "x")
    receiver: Receiver[Ping] = Receiver(address, Ping, bind=True)
    sender = Sender(address)
    data = bytes(range(256)) * 4096
    sender.send(Ping(1), data)
    sender.send(Ping(2))
    first, second = receiver.recv_with_payload(10), receiver.recv_with_payload(10)
    assert first is not None and second is not None
    assert first[0] == Ping(1) and bytes(first[1] or b"") == data
    assert second == (Ping(2), None)
    sender.close()
    receiver.close()


def test_what_is_not_the_agreed_message_is_refused(runtime_dir: Path) -> None:
    address = ipc_address(runtime_dir, "x")
    receiver: Receiver[EngineCoreInput] = Receiver(address, EngineCoreInput, bind=True)
    sender = Sender(address)
    for wrong in ({"type": "exec", "code": "1"}, [1, 2], {"type": "ping", "ping_id": "one"}, {"type": "abort"}):
        sender.send(wrong)
        with pytest.raises(msgspec.ValidationError):
            receiver.recv(timeout_s=10)
    sender.close()
    receiver.close()


def test_a_reader_that_stops_makes_the_writer_wait_instead_of_growing(runtime_dir: Path) -> None:
    address = ipc_address(runtime_dir, "x")
    receiver: Receiver[Ping] = Receiver(address, Ping, bind=True, high_water_mark=2)
    sender = Sender(address, high_water_mark=2)
    sent: list[int] = []
    total = 40  # of 256 kB each: more than sockets buffer on the way

    def write() -> None:
        for i in range(total):
            sender.send(Ping(i), bytes(1 << 18))
            sent.append(i)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(timeout=0.5)
    assert writer.is_alive() and len(sent) < total
    for i in range(total):
        received = receiver.recv_with_payload(10)
        assert received is not None and received[0] == Ping(i)
    writer.join(timeout=10)
    assert len(sent) == total
    sender.close()
    receiver.close()


def test_an_event_loop_and_a_thread_understand_each_other(runtime_dir: Path) -> None:
    address, back = ipc_address(runtime_dir, "there"), ipc_address(runtime_dir, "back")

    def echo() -> None:
        receiver: Receiver[EngineCoreInput] = Receiver(address, EngineCoreInput)
        sender = Sender(back)
        for _ in range(2):
            sender.send(receiver.recv(timeout_s=10))
        sender.close(linger_s=5)
        receiver.close()

    async def talk() -> list[EngineCoreInput]:
        sender = AsyncSender(address, bind=True)
        receiver: AsyncReceiver[EngineCoreInput] = AsyncReceiver(back, EngineCoreInput, bind=True)
        thread = threading.Thread(target=echo)
        thread.start()
        await sender.send(REQUEST)
        await sender.send(Ping(9))
        answers = [await asyncio.wait_for(receiver.recv(), 10) for _ in range(2)]
        thread.join()
        sender.close()
        receiver.close()
        return answers

    assert asyncio.run(talk()) == [REQUEST, Ping(9)]
