"""The outbox: every byte to a client goes through it, and none waits for another."""

from __future__ import annotations

import os
import socket

import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

import chatd
from chatd import Rate
from tests.harness import (
    CLOSE,
    OFF,
    PING,
    PONG,
    TEXT,
    WiresHouse,
    taking,
    wires,
    wires_close,
    wires_command,
    wires_frame,
    wires_frames,
)

# --- Outbox --------------------------------------------------------------------------


def text_of(number: int, size: int = 1000) -> bytes:
    """A server's frame that says which it is."""
    return bytes(chatd._frames.send_data(f"{number}:".ljust(size, "x")))


def numbers_in(data: bytearray) -> list[int]:
    frames = [payload for opcode, payload in wires_frames(data) if opcode == TEXT]
    return [int(payload.split(b":")[0]) for payload in frames]


@wires()
async def test_a_push_is_the_kernels_before_it_returns(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    box, tasks = house.session(6).outbox, house.session(6).nursery.child_tasks
    before = len(tasks)
    assert box.push(b"hello")
    # No await in between: who reads now has it.
    assert os.read(raw.stream.socket.fileno(), 100) == b"hello"
    assert not box.waiting
    assert len(tasks) == before


@wires(outbox_bytes=1_000_000)
async def test_what_the_kernel_does_not_take_is_kept_and_a_task_exists_only_then(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6, small=True)
    session = house.session(6)
    tasks = len(session.nursery.child_tasks)
    for number in range(100):
        assert session.outbox.push(text_of(number))
    assert session.outbox.waiting
    assert len(session.nursery.child_tasks) == tasks + 1
    await raw.listen()
    assert numbers_in(raw.data) == list(range(100))
    assert not session.outbox.waiting
    assert len(session.nursery.child_tasks) == tasks


@wires(outbox_bytes=20_000)
async def test_a_frame_is_taken_whole_or_not_at_all(house: WiresHouse) -> None:
    raw = await house.join_raw(6, small=True)
    box = house.session(6).outbox
    taken = [n for n in range(60) if box.push(text_of(n))]
    assert 20 <= len(taken) < 60
    assert box.full
    assert taken == list(range(len(taken)))  # after the first no there is no yes
    assert not box.push(b"x")
    assert box.push(text_of(1000), always=True)
    await raw.listen()
    assert numbers_in(raw.data) == [*taken, 1000]
    assert raw.data == b""


@wires(outbox_bytes=1_000_000)
async def test_a_flush_that_is_cancelled_tears_no_frame_but_the_last(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6, small=True)
    session = house.session(6)
    for number in range(60):
        session.outbox.push(text_of(number, 3333))
    await raw.read(5000)
    await wait_all_tasks_blocked()
    session.nursery.cancel_scope.cancel()
    session.outbox.push(text_of(1000))
    session.outbox.seal(chatd.close_frame(1000, ""))
    await raw.ends()
    arrived = numbers_in(raw.data)
    assert arrived == list(range(len(arrived)))  # nothing came out of its place
    assert len(raw.data) < len(text_of(0, 3333))


@wires()
async def test_the_first_close_frame_is_the_last_frame(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    box = house.session(6).outbox
    box.push(text_of(1))
    box.seal(chatd.close_frame(4503, "revoked"))
    assert box.push(text_of(2))
    assert box.push(text_of(3), always=True)
    box.seal(chatd.close_frame(1000, ""))
    await raw.send(wires_frame(PING), wires_command("ping"), wires_close(1000))
    await raw.ends()
    assert [opcode for opcode, _ in wires_frames(raw.data)] == [TEXT, CLOSE]


@wires()
async def test_a_push_to_a_peer_that_has_gone_does_not_raise(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    box = house.session(6).outbox
    raw.stream.socket.close()
    for number in range(3):
        assert box.push(text_of(number), always=number == 2)
    assert box.sealed
    await wait_all_tasks_blocked()
    assert not house.server.sessions


@wires()
async def test_a_push_behind_the_end_hits_nobody_elses_descriptor(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6)
    box = house.session(6).outbox
    number = box.stream.socket.fileno()
    raw.stream.socket.close()
    await wait_all_tasks_blocked()
    assert not house.server.open
    strangers = [socket.socketpair() for _ in range(3)]
    ends = [end for pair in strangers for end in pair]
    assert number in {end.fileno() for end in ends}  # it was given out again
    box.push(b"a secret", always=True)
    box.seal(b"a close")
    for end in ends:
        end.setblocking(False)
        with pytest.raises(BlockingIOError):
            end.recv(100)
    for end in ends:
        end.close()


@wires(outbox_bytes=1_000_000)
async def test_a_peer_that_goes_in_mid_flush_ends_its_connection(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6, small=True)
    box = house.session(6).outbox
    for number in range(50):
        box.push(text_of(number))
    woken = trio.Event()

    async def wait() -> None:
        await box.empty()
        woken.set()

    house.nursery.start_soon(wait)
    await wait_all_tasks_blocked()
    raw.stream.socket.close()
    with trio.fail_after(1):
        await woken.wait()
    await wait_all_tasks_blocked()
    assert not house.server.sessions


@wires(outbox_bytes=10_000)
async def test_the_library_waits_while_the_outbox_is_over_its_bound(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6, small=True)
    box = house.session(6).outbox
    while box.push(text_of(1)):
        pass
    sent = trio.Event()

    async def send() -> None:
        await box.wait_send_all_might_not_block()
        await box.send_all(text_of(2))
        sent.set()

    house.nursery.start_soon(send)
    with trio.move_on_after(9):
        await sent.wait()
    assert not sent.is_set()
    while not sent.is_set():
        await raw.read(1000)
    assert not box.full
    await raw.listen()
    assert numbers_in(raw.data)[-1] == 2


@wires(outbox_bytes=10_000)
async def test_while_it_is_full_only_the_newest_ping_is_owed_a_pong(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6, small=True)
    box = house.session(6).outbox
    await raw.send(wires_frame(PING, b"before"))
    await wait_all_tasks_blocked()
    while box.push(text_of(1)):
        pass
    await raw.send(*[wires_frame(PING, payload) for payload in (b"a", b"b", b"c")])
    await wait_all_tasks_blocked()
    await raw.listen()
    await raw.send(wires_frame(PING, b"after"))
    await raw.listen()
    pongs = [payload for opcode, payload in wires_frames(raw.data) if opcode == PONG]
    assert pongs == [b"before", b"c", b"after"]


@wires(receive_bytes=Rate(1000, 5000))
async def test_received_bytes_are_paced(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    with taking(15, 15.6):
        await raw.send(wires_frame(TEXT, b"x" * 19_992))  # and 8 of its head
        await raw.hear("error", within=20)


@wires(receive_bytes=Rate(1340, 1340))
async def test_a_tiny_frame_is_paced_like_128_bytes_more(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    with taking(9, 9.2):
        await raw.send(wires_frame(PING) * 100)
        for _ in range(100):
            assert await raw.frame() == (PONG, b"")
        await raw.send(wires_command("ping"))
        await raw.hear("pong", within=10)


@wires()
async def test_who_hangs_up_behind_a_flood_is_not_read_to_its_end(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6)
    await raw.send(wires_frame(PONG) * 20_000)  # half a minute's reading
    raw.stream.socket.close()
    with taking(0, 6):
        while house.server.sessions:  # noqa: ASYNC110 (nothing tells when it ends)
            await trio.sleep(0.1)


@wires(receive_bytes=OFF, commands=OFF)
async def test_a_rate_of_0_paces_nothing(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    with taking(0):
        for _ in range(100):
            await raw.send(wires_frame(TEXT, b"x" * 30_000))
            await raw.hear("error")


# --- the promise ---------------------------------------------------------------------
