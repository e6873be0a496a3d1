"""The outbox: every byte to a client goes through it, and no push waits."""

from __future__ import annotations

import os
import socket

import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

import chatd
from chatd import Rate
from tests.client import (
    CLOSE,
    PING,
    PONG,
    TEXT,
    RawClient,
    close_bytes,
    command_bytes,
    frame_bytes,
    take_frames,
)
from tests.harness import OFF, VirtualServer, taking, with_server

# --- writing -------------------------------------------------------------------------


def numbered_frame(number: int, size: int = 1000) -> bytes:
    """A frame of the server that holds its number."""
    return bytes(chatd._frames.send_data(f"{number}:".ljust(size, "x")))


def numbers_in(data: bytearray) -> list[int]:
    frames = [payload for opcode, payload in take_frames(data) if opcode == TEXT]
    return [int(payload.split(b":")[0]) for payload in frames]


async def connect(
    server: VirtualServer, *, small: bool = False
) -> tuple[RawClient, chatd.Outbox]:
    """Connect a client that reads only when told. Return it and its outbox."""
    raw = await server.join_raw(6, small=small)
    return raw, server.session(6).outbox


def fill(box: chatd.Outbox) -> None:
    """Push frames until the outbox accepts no more."""
    while box.push(numbered_frame(1)):
        pass


@with_server()
async def test_a_push_reaches_the_kernel_before_it_returns(
    server: VirtualServer,
) -> None:
    raw = await server.join_raw(6)
    box, tasks = server.session(6).outbox, server.session(6).outbox.nursery.child_tasks
    before = len(tasks)
    assert box.push(b"hello")
    # No await since the push: the bytes are in the kernel now.
    assert os.read(raw.stream.socket.fileno(), 100) == b"hello"
    assert not box.buffer
    assert len(tasks) == before


@with_server(outbox_bytes=1_000_000)
async def test_unsent_bytes_are_kept_and_flushed_by_a_task_that_then_ends(
    server: VirtualServer,
) -> None:
    raw = await server.join_raw(6, small=True)
    session = server.session(6)
    tasks = len(session.outbox.nursery.child_tasks)
    for number in range(100):
        assert session.outbox.push(numbered_frame(number))
    assert session.outbox.buffer
    assert len(session.outbox.nursery.child_tasks) == tasks + 1
    await raw.listen()
    assert numbers_in(raw.data) == list(range(100))
    assert not session.outbox.buffer
    assert len(session.outbox.nursery.child_tasks) == tasks


@with_server(outbox_bytes=20_000)
async def test_a_frame_is_accepted_whole_or_not_at_all(server: VirtualServer) -> None:
    raw, box = await connect(server, small=True)
    taken = [n for n in range(60) if box.push(numbered_frame(n))]
    assert 20 <= len(taken) < 60
    assert box.full
    assert taken == list(range(len(taken)))  # after the first refusal none is accepted
    assert not box.push(b"x")
    assert box.push(numbered_frame(1000), always=True)
    await raw.listen()
    assert numbers_in(raw.data) == [*taken, 1000]
    assert raw.data == b""


def closing(code: int) -> bytes:
    return bytes(chatd._frames.close(code, ""))


@with_server(outbox_bytes=1_000_000)
async def test_a_cancelled_flush_cuts_no_frame_but_the_last(
    server: VirtualServer,
) -> None:
    raw = await server.join_raw(6, small=True)
    session = server.session(6)
    for number in range(60):
        session.outbox.push(numbered_frame(number, 3333))
    await raw.read(5000)
    await wait_all_tasks_blocked()
    session.outbox.nursery.cancel_scope.cancel()
    session.outbox.push(numbered_frame(1000))
    session.outbox.seal(closing(1000))
    await raw.ends()
    arrived = numbers_in(raw.data)
    assert arrived == list(range(len(arrived)))  # in order, without a gap
    assert len(raw.data) < len(numbered_frame(0, 3333))


@with_server()
async def test_the_first_close_frame_is_the_last_frame(server: VirtualServer) -> None:
    raw, box = await connect(server)
    box.push(numbered_frame(1))
    box.seal(closing(4503))
    assert box.push(numbered_frame(2))
    assert box.push(numbered_frame(3), always=True)
    box.seal(closing(1000))
    await raw.send(frame_bytes(PING), command_bytes("ping"), close_bytes(1000))
    await raw.ends()
    assert [opcode for opcode, _ in take_frames(raw.data)] == [TEXT, CLOSE]


@with_server()
async def test_a_push_to_a_client_that_has_gone_does_not_raise(
    server: VirtualServer,
) -> None:
    raw, box = await connect(server)
    raw.stream.socket.close()
    for number in range(3):
        assert box.push(numbered_frame(number), always=number == 2)
    assert box.sealed
    await wait_all_tasks_blocked()
    assert not server.app.sessions


@with_server()
async def test_a_push_after_the_end_writes_to_no_other_descriptor(
    server: VirtualServer,
) -> None:
    raw, box = await connect(server)
    number = box.stream.socket.fileno()
    raw.stream.socket.close()
    await wait_all_tasks_blocked()
    assert not server.app.listener.open
    strangers = [socket.socketpair() for _ in range(3)]
    ends = [end for pair in strangers for end in pair]
    assert number in {end.fileno() for end in ends}  # the kernel reused the number
    box.push(b"a secret", always=True)
    box.seal(b"a close")
    for end in ends:
        end.setblocking(False)
        with pytest.raises(BlockingIOError):
            end.recv(100)
    for end in ends:
        end.close()


@with_server(outbox_bytes=1_000_000)
async def test_a_client_that_goes_during_a_flush_ends_its_connection(
    server: VirtualServer,
) -> None:
    raw, box = await connect(server, small=True)
    for number in range(50):
        box.push(numbered_frame(number))
    woken = trio.Event()

    async def wait() -> None:
        await box.wait_empty()
        woken.set()

    server.nursery.start_soon(wait)
    await wait_all_tasks_blocked()
    raw.stream.socket.close()
    with trio.fail_after(1):
        await woken.wait()
    await wait_all_tasks_blocked()
    assert not server.app.sessions


@with_server(outbox_bytes=10_000)
async def test_a_full_outbox_can_be_waited_for(server: VirtualServer) -> None:
    raw, box = await connect(server, small=True)
    fill(box)
    woken = trio.Event()

    async def wait() -> None:
        await box.wait_not_full()
        woken.set()

    server.nursery.start_soon(wait)
    with trio.move_on_after(9):
        await woken.wait()
    assert not woken.is_set()
    while not woken.is_set():
        await raw.read(1000)
    assert not box.full


@with_server(outbox_bytes=10_000)
async def test_a_close_frame_is_answered_behind_the_output_of_a_full_outbox(
    server: VirtualServer,
) -> None:
    raw, box = await connect(server, small=True)
    fill(box)
    await raw.send(close_bytes(1000))
    await raw.listen()
    *frames, (opcode, _) = take_frames(raw.data)
    assert opcode == CLOSE
    assert len(frames) >= 10
    assert raw.data == b""


@with_server(outbox_bytes=10_000)
async def test_a_full_outbox_answers_only_the_newest_ping(
    server: VirtualServer,
) -> None:
    raw, box = await connect(server, small=True)
    await raw.send(frame_bytes(PING, b"before"))
    await wait_all_tasks_blocked()
    fill(box)
    await raw.send(*[frame_bytes(PING, payload) for payload in (b"a", b"b", b"c")])
    await wait_all_tasks_blocked()
    await raw.listen()
    await raw.send(frame_bytes(PING, b"after"))
    await raw.listen()
    pongs = [payload for opcode, payload in take_frames(raw.data) if opcode == PONG]
    assert pongs == [b"before", b"c", b"after"]


# --- reading: the rate of received bytes ---------------------------------------------


@with_server(receive_bytes=Rate(1000, 5000))
async def test_received_bytes_are_paced(server: VirtualServer) -> None:
    raw = await server.join_raw(6)
    with taking(15, 15.6):
        await raw.send(frame_bytes(TEXT, b"x" * 19_992))  # and 8 bytes of its header
        await raw.receive("error", within=20)


@with_server(receive_bytes=Rate(1340, 1340))
async def test_a_tiny_frame_counts_128_bytes_extra(server: VirtualServer) -> None:
    raw = await server.join_raw(6)
    with taking(9, 9.2):
        await raw.send(frame_bytes(PING) * 100)
        for _ in range(100):
            assert await raw.frame() == (PONG, b"")
        await raw.send(command_bytes("ping"))
        await raw.receive("pong", within=10)


@with_server()
async def test_a_flood_is_not_read_to_its_end_after_the_client_hangs_up(
    server: VirtualServer,
) -> None:
    raw = await server.join_raw(6)
    await raw.send(frame_bytes(PONG) * 20_000)  # half a minute of reading
    raw.stream.socket.close()
    with taking(0, 6):
        while server.app.sessions:  # noqa: ASYNC110 (no event marks its end)
            await trio.sleep(0.1)


@with_server(receive_bytes=OFF, commands=OFF)
async def test_a_rate_of_0_paces_nothing(server: VirtualServer) -> None:
    raw = await server.join_raw(6)
    with taking(0):
        for _ in range(100):
            await raw.send(frame_bytes(TEXT, b"x" * 30_000))
            await raw.receive("error")


@with_server()
async def test_a_client_that_closes_is_not_waited_for(server: VirtualServer) -> None:
    raw = await server.join_raw(6)
    listener = server.session(6).server.listener
    await raw.send(close_bytes(1000))
    with taking(0):
        await raw.finishes()  # and the client's own side is open
        assert [opcode for opcode, _ in take_frames(raw.data)] == [CLOSE]
        assert not listener.open
