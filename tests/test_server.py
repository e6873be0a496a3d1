"""The server: stopping, accepting, the connection limit, the bulkhead.

Most tests run a Server under virtual time (`@wires`). The last ones start a process.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import re
import signal
import socket
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

from chatd import Rate, watch_signals
from tests.harness import (
    BIG,
    CLOSE,
    DOOR_MISTAKE,
    DOOR_UPGRADE,
    OFF,
    TEXT,
    DoorFrame,
    DoorLine,
    DoorPeer,
    DoorServer,
    FaultyStore,
    WiresHouse,
    door_get,
    door_load,
    door_shut,
    door_until,
    door_users,
    taking,
    wires,
    wires_close,
    wires_frames,
    wires_request,
    wires_upgrade,
)

# --- stopping ------------------------------------------------------------------------


@wires()
async def test_a_stop_sends_bye_and_1012_to_every_socket_at_once(
    house: WiresHouse,
) -> None:
    peers = [await house.join(user) for user in (6, 6, 7, 8)]
    house.server.listener.stopping.set()
    with taking(0):
        for peer in peers:
            ((bye,), code) = await peer.end()
            assert (bye["type"], code) == ("bye", 1012)
            assert 0.5 <= bye["retry_after"] <= 1.1
        await house.finished.wait()
    house.dial(accepted=False)


@wires()
async def test_a_stop_without_connections_ends_at_once(house: WiresHouse) -> None:
    with taking(0):
        await house.stop()


@wires()
async def test_answers_to_commands_in_flight_come_before_bye(house: WiresHouse) -> None:
    chat = await house.chat(6, 7)
    peer, friend = await house.join(6), await house.join(7)
    house.disk.hold()
    for content in "abc":
        await peer.say("send_message", chat_id=chat, content=content)
    posted = house.dial()
    await posted.send(
        wires_request(
            "POST",
            f"/api/v1/chats/{chat}/messages",
            b'{"content":"d"}',
            Authorization=f"Bearer {house.token(7)}",
        )
    )
    await wait_all_tasks_blocked()
    house.server.listener.stopping.set()
    await trio.sleep(2)
    house.disk.go()
    heard, code = await peer.end()
    kinds = [frame["type"] for frame in heard]
    assert sorted(kinds[:-1]) == ["ack"] * 3 + ["new_message"] * 4
    assert (kinds[-1], code) == ("bye", 1012)
    answer = await posted.answer()
    assert (answer.status, answer.headers["connection"]) == (201, "close")
    # A client with nothing in flight does not wait for the others.
    assert [frame["type"] for frame in (await friend.end())[0]] == ["bye"]


@wires()
async def test_a_stalled_socket_is_closed_at_the_drain_deadline_and_delays_no_other(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    stalled, peer = await house.join_raw(6, small=True), await house.join(7)
    await house.post(chat, *[BIG] * 20)
    house.server.listener.stopping.set()
    with taking(0):
        heard, code = await peer.end()
        assert (heard[-1]["type"], code) == ("bye", 1012)
    with taking(4.9, 5):
        await house.finished.wait()
    house.check_left()
    await stalled.ends()


@wires()
async def test_a_slow_reader_gets_everything_and_bye_if_the_drain_is_long_enough(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    slow = await house.join_raw(6, small=True)
    await house.post(chat, *[BIG] * 20)
    house.server.listener.stopping.set()
    frames: list[tuple[int, bytes]] = []
    while not frames or frames[-1][0] != CLOSE:
        await trio.sleep(0.1)
        await slow.read(5000)
        frames += wires_frames(slow.data)
    kinds = [json.loads(data)["type"] for opcode, data in frames if opcode == TEXT]
    assert kinds == ["new_message"] * 20 + ["bye"]


@wires()
async def test_healthz_reports_stopping_on_a_connection_that_is_still_open(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    kept, parked = house.dial(), house.dial()
    assert (await kept.ask("GET", "/healthz")).json == {"status": "ok"}
    await house.join_raw(6, small=True)  # this client keeps the server draining
    await house.post(chat, *[BIG] * 20)
    house.server.listener.stopping.set()
    await trio.sleep(1)
    health = await kept.ask("GET", "/healthz")
    assert (health.status, health.json) == (503, {"status": "stopping"})
    assert health.headers["connection"] == "close"
    assert await kept.ends() == b""
    upgrade = house.target(7)
    await parked.send(wires_upgrade(upgrade))
    refused = await parked.answer()
    assert (refused.status, refused.code) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    kept.stream.socket.close()
    parked.stream.socket.close()
    with taking(3.9, 4):
        await house.finished.wait()


@wires()
async def test_a_stop_closes_parked_connections_within_a_second_of_the_last_socket(
    house: WiresHouse,
) -> None:
    answered, silent, half, late, behind = (house.dial() for _ in range(5))
    assert (await answered.ask("GET", "/healthz")).status == 200
    assert (await behind.ask("GET", "/healthz")).status == 200
    await half.send(b"GET /healthz HT")
    await behind.send(b"GET /healthz HT")
    peer = await house.join(6)
    house.server.listener.stopping.set()
    with taking(0):
        await peer.end()
        assert await answered.ends() == b""
    # Clients that have connected, or begun a request, still get an answer: no other
    # process will give them one.
    with taking(0.9):
        await trio.sleep(0.9)
    await behind.send(b"TP/1.1\r\nHost: x\r\n\r\n")
    assert (await behind.answer()).json == {"status": "stopping"}
    assert (await late.ask("GET", "/healthz")).json == {"status": "stopping"}
    with taking(0.1):
        assert b"408" in await half.ends()
        assert await silent.ends() == b""


@wires(drain_seconds=1.0)
async def test_a_stop_does_not_hang_at_any_stage_of_a_connection(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    request = wires_request(
        "POST", f"/api/v1/chats/{chat}/messages", b'{"content":"x"}',
        Authorization=f"Bearer {house.token(6)}",
    )  # fmt: skip
    upgrade = wires_upgrade(house.target(6))
    half, whole = request[:-5], upgrade + wires_close(1000)
    for sent in (b"", b"\0" * 50, request[:30], half, upgrade[:50], upgrade, whole):
        await house.dial().send(sent)
    house.server.listener.stopping.set()
    with taking(0, 1):
        await house.finished.wait()


@wires()
async def test_the_first_signal_stops_the_server_and_the_second_cancels_it(
    house: WiresHouse,
) -> None:
    root = trio.CancelScope()
    await house.nursery.start(watch_signals, house.server.listener, root)
    peer = await house.join(6)
    signal.raise_signal(signal.SIGTERM)
    ((bye,), code) = await peer.end()
    assert (bye["type"], code) == ("bye", 1012)
    assert not root.cancel_called
    signal.raise_signal(signal.SIGINT)
    await wait_all_tasks_blocked()
    assert root.cancel_called


@wires()
async def test_a_wal_that_the_writer_is_reopening_is_not_reported_missing(
    house: WiresHouse,
) -> None:
    db = house.server.settings.db
    wal, aside = db.with_name(f"{db.name}-wal"), db.with_name("aside")
    raw = house.dial()
    house.disk.hold()
    auth = f"Bearer {house.token(6)}"
    await raw.send(wires_request("POST", "/api/v1/chats", b"{}", Authorization=auth))
    wal.rename(aside)  # as while the writer reopens the database after an I/O error
    await trio.sleep(3)
    aside.rename(wal)
    house.disk.go()
    assert (await raw.answer()).status == 201


@wires()
async def test_accepting_waits_and_goes_on_when_descriptors_run_out(
    house: WiresHouse, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "chatd")
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
        house.listener.offer.send_nowait(OSError(number, "none left"))
    raw = house.dial()
    with taking(0.4, 0.5):
        assert (await raw.ask("GET", "/healthz")).status == 200
    assert len(caplog.records) == 1  # one line, not one for each error


def test_any_other_error_in_accept_ends_the_server(tmp_path: Path) -> None:
    @wires()
    async def serve(house: WiresHouse) -> None:
        house.listener.offer.send_nowait(OSError(errno.EBADF, "Bad file descriptor"))
        await trio.sleep_forever()

    with pytest.raises(OSError, match="Bad file descriptor"):
        serve(tmp_path)


# --- the connection limit ------------------------------------------------------------


@wires(max_connections=1)
async def test_at_the_connection_limit_the_longest_parked_connection_is_closed(
    house: WiresHouse,
) -> None:
    parked = [house.dial() for _ in range(129)]
    await wait_all_tasks_blocked()
    first, second = parked[:2]
    await first.ask("GET", "/healthz")  # now the second one has been parked longest
    newest = house.dial()
    assert (await newest.ask("GET", "/healthz")).status == 200
    assert await second.ends() == b""
    assert (await first.ask("GET", "/healthz")).status == 200
    assert house.server.listener.open == 129


@wires(max_connections=1)
async def test_a_connection_closed_for_a_newer_one_in_mid_head_ends_at_once(
    house: WiresHouse,
) -> None:
    raws = [house.dial() for _ in range(200)]
    for raw in raws:
        await raw.send(b"GET /healthz HT")
    await wait_all_tasks_blocked()
    assert house.server.listener.open == 129
    for raw in raws[:71]:
        assert await raw.ends() == b""


@wires()
async def test_a_client_that_resets_before_it_is_accepted_causes_no_error(
    house: WiresHouse,
) -> None:
    for sent in (b"", wires_request("GET", "/healthz"), wires_upgrade(house.target(6))):
        raw = house.dial(tcp=True)
        await raw.send(sent)
        raw.stream.socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        raw.stream.socket.close()
    await trio.sleep(2)
    assert house.server.listener.open == 0


@wires(max_connections=1, requests=OFF)
async def test_without_a_parked_connection_a_new_one_gets_503_at_once_and_one_log_line(
    house: WiresHouse, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "chatd")
    auth = {"Authorization": f"Bearer {house.token(6)}", "Content_Length": "2"}
    busy = [house.dial() for _ in range(129)]
    house.disk.hold()  # the requests are whole and wait for the server
    for raw in busy:
        await raw.send(wires_request("POST", "/api/v1/chats", None, **auth) + b"{}")
    await wait_all_tasks_blocked()
    for _ in range(20):
        for tcp in (False, True):
            raw = house.dial(tcp=tcp, accepted=True)
            await raw.send(wires_request("GET", "/healthz"))
            with taking(0):
                answer = await raw.answer()
                assert (answer.status, answer.code) == (503, "overloaded")
                assert answer.headers["retry-after"] == "5"
                assert answer.headers["connection"] == "close"
                assert await raw.ends() == b""
    house.dial().stream.socket.close()  # a client that does not wait causes no error
    assert len(caplog.records) == 1
    house.disk.go()
    for raw in busy:
        assert (await raw.answer()).status == 201


@wires(max_connections=1, requests=OFF)
async def test_a_connection_with_a_slow_body_is_closed_for_a_new_one(
    house: WiresHouse,
) -> None:
    auth = {"Authorization": f"Bearer {house.token(6)}", "Content_Length": "2"}
    slow = [house.dial() for _ in range(129)]
    for raw in slow:
        await raw.send(wires_request("POST", "/api/v1/chats", None, **auth))
    await wait_all_tasks_blocked()
    newest = house.dial()
    await newest.send(wires_request("GET", "/healthz"))
    assert (await newest.answer()).status == 200
    assert await slow[0].ends() == b""
    await slow[1].send(b"{}")
    assert (await slow[1].answer()).status == 201


@wires(max_connections=1, requests=OFF)
async def test_refused_connections_never_use_the_descriptors_kept_for_the_database(
    house: WiresHouse,
) -> None:
    auth = {"Authorization": f"Bearer {house.token(6)}", "Content_Length": "2"}
    house.disk.hold()
    for _ in range(129):
        request = wires_request("POST", "/api/v1/chats", None, **auth) + b"{}"
        await house.dial().send(request)
    await wait_all_tasks_blocked()
    for _ in range(300):  # these clients neither read nor disconnect
        house.dial()
    await wait_all_tasks_blocked()
    # LimitNOFILE is --max-connections + 256. The last 32 are for the database.
    assert house.server.listener.open <= 1 + 256 - 32
    await trio.sleep(3)
    assert house.server.listener.open == 129
    house.disk.go()


@wires()
async def test_retry_after_is_in_whole_seconds_and_not_too_early(
    house: WiresHouse,
) -> None:
    raw = house.dial()
    auth = {"Authorization": f"Bearer {house.token(6)}"}
    for _ in range(100):
        assert (await raw.ask("GET", "/api/v1/me", **auth)).status == 200
    answer = await raw.ask("GET", "/api/v1/me", **auth)
    assert (answer.status, answer.code) == (429, "rate_limited")
    assert answer.json["error"]["retry_after"] == 0.05
    assert answer.headers["retry-after"] == "1"
    assert (await house.ask("GET", "/api/v1/me", user=7)).status == 200
    service = house.token(6, scope="service")
    assert (await house.ask("GET", "/api/v1/me", token=service)).status == 200
    await trio.sleep(0.05)
    assert (await raw.ask("GET", "/api/v1/me", **auth)).status == 200


# --- the bulkhead --------------------------------------------------------------------


@wires(store=FaultyStore)
async def test_a_bug_ends_its_own_connection_only_and_is_counted_and_logged(
    house: WiresHouse, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "chatd")
    house.errors = {"ValueError": 2}
    chat = await house.chat(6, 7)
    other = await house.join(7)
    kept = house.dial()
    await kept.ask("GET", "/healthz")
    raw = house.dial()
    auth = f"Bearer {house.token(6, marker='s3cret')}"
    path = f"/api/v1/chats/{chat}/messages"
    await raw.send(wires_request("GET", path, None, Authorization=auth))
    answer = await raw.answer()
    assert (answer.status, answer.code) == (500, "internal")
    assert "ours" not in answer.body.decode()
    assert await raw.ends() == b""
    # A bug in a session's task ends the whole session.
    peer = await house.join(6, cursor=f"{house.store.epoch}.0", hello=False)
    assert await peer.end() == ([], 1006)
    assert (await other.ask("ping"))["type"] == "pong"
    assert (await kept.ask("GET", "/healthz")).status == 200
    assert [s.claims.user_id for s in house.server.sessions] == [7]
    assert (await house.stats())["errors"] == {"ValueError": 2}
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    for line, where in zip(caplog.messages, ("history", "missed"), strict=True):
        # One line with the error's type and place, without its text, which may be
        # a client's.
        assert re.fullmatch(
            rf"failed error='ValueError' at='\S+:\d+ {where} < .*'", line
        )
        assert line.isprintable()
        assert "ours" not in line


@wires(store=FaultyStore, sends=Rate(1, 1))
async def test_a_key_error_in_a_query_is_not_mistaken_for_an_unknown_event(
    house: WiresHouse, caplog: pytest.LogCaptureFixture
) -> None:
    house.errors = {"RuntimeError": 1}
    chat = await house.chat(6, 7)
    peer = await house.join(6)
    await peer.ask("send_message", chat_id=chat, content="a")
    await peer.say("send_message", chat_id=chat, content="b", client_id="k")
    assert await peer.end() == ([], 1006)
    (line,) = caplog.messages
    assert line.startswith("failed error='RuntimeError from KeyError' at='")
    assert " find_sent < " in line


@wires()
async def test_two_hundred_connections_parked_in_every_state_all_time_out(
    house: WiresHouse,
) -> None:
    request = wires_request(
        "POST", "/api/v1/chats", b"{}", Authorization=f"Bearer {house.token(6)}"
    )
    for sent in (b"", b"GET", request[:-1], wires_upgrade(house.target(6))):
        for _ in range(20 if sent.startswith(b"GET /ws") else 60):
            await house.dial().send(sent)
    await wait_all_tasks_blocked()
    assert house.server.listener.open == 200
    await trio.sleep(16.1)
    assert house.server.listener.open == 20
    await trio.sleep(24)  # the server sends a ping, and no client answers
    assert house.server.listener.open == 0
    house.check_left()


# --- a process: refused clients and the connection limit -----------------------------


async def test_refused_clients_leave_no_descriptor_open(house: DoorServer) -> None:
    async with house.serving():
        await house.want(200, "GET /api/v1/me", house.token(1))
        before = house.descriptors
        for user in itertools.islice(door_users, 30):
            await house.refusal("bad")  # the client keeps its end open
            assert await house.raw(b"\xff\r\n\r\n")
            peer = await house.peer(user)
            await peer.utter(b"\xff")
            await peer.ended()

        def gone() -> bool:
            return house.descriptors <= before + 1

        await door_until(gone, 5)


async def test_a_full_server_refuses_at_once_and_serves_again_when_a_place_is_free(
    house: DoorServer,
) -> None:
    async with house.serving("--max-connections", "1"):
        user = next(door_users)
        peer = await house.peer(user)
        began = trio.current_time()
        full = await house.refusal(next(door_users))
        assert (full.status, full.code) == (503, "overloaded")
        assert int(full.headers["retry-after"]) >= 1
        assert trio.current_time() - began < 2
        await peer.hears_nothing()
        await peer.leave()

        async def admitted() -> bool:
            got = await house.knock(
                door_get(house.socket_path(user), "Host: x", *DOOR_UPGRADE)
            )
            return isinstance(got, DoorPeer)

        await door_until(admitted)


async def test_silent_connections_do_not_fill_the_server(house: DoorServer) -> None:
    async with house.serving("--max-connections", "2"):
        user = next(door_users)
        half = door_get("/healthz", "Host: x")[:-2]
        for number in range(300):
            stream = await house.dial()
            if number % 2:
                await stream.send_all(half)
        peer = await house.peer(user)
        await peer.hears_nothing()
        await house.want(200, "GET /healthz")
        await peer.leave()


# --- a process: stopping -------------------------------------------------------------


async def receive_bye(peer: DoorPeer) -> DoorFrame:
    """Receive the end of a stopped server: return its bye. Then it closes with 1012."""
    bye = await peer.find("bye")
    assert set(bye) == {"type", "retry_after"}
    assert 0 <= bye["retry_after"] < 60
    assert await peer.ended() == 1012
    return bye


async def stalled_client(house: DoorServer, user: int, chat: int) -> DoorPeer:
    """Connect a client that does not read, and send it more than all buffers hold."""
    peer = await house.peer(user, receive_buffer=16384)
    writer = next(door_users)
    body = {"user_id": writer}
    target = f"POST /api/v1/chats/{chat}/members"
    await house.want(201, target, house.service, body)
    await door_load(house, chat, writer, 450)
    return peer


async def test_a_second_signal_ends_the_process_at_once(house: DoorServer) -> None:
    async with house.serving("--drain-seconds", "60"):
        ann, bob = next(door_users), next(door_users)
        await stalled_client(house, ann, await house.chat(ann))
        witness = await house.peer(bob)
        house.signal(signal.SIGTERM)
        await receive_bye(witness)
        began = trio.current_time()
        await house.ended(signal.SIGTERM)
        assert trio.current_time() - began < 3


async def test_connections_left_after_the_drain_are_closed(house: DoorServer) -> None:
    async with house.serving("--drain-seconds", "1"):
        ann, bob = next(door_users), next(door_users)
        await stalled_client(house, ann, await house.chat(ann))
        witness = await house.peer(bob)
        async with await house.dial() as stream:
            line = DoorLine(stream)
            assert (await line.ask("GET", "/healthz")).status == 200
            began = trio.current_time()
            house.signal(signal.SIGTERM)
            await receive_bye(witness)
            with suppress(trio.BrokenResourceError):  # it may be closed already
                assert (await line.ask("GET", "/healthz")).status == 503
            await door_shut(house)
            assert await house.ended() == 0
        assert trio.current_time() - began < 6
        assert not DOOR_MISTAKE.search(house.output)
