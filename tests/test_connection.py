"""A connection: the WebSocket reader and the session behind it."""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import logging
import random
import re
import select
import sqlite3
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing
import trio_websocket
from trio.testing import MockClock, wait_all_tasks_blocked

import chatd
from tests.client import (
    CLOSE,
    PING,
    PONG,
    TEXT,
    WAIT_SECONDS,
    Disconnected,
    Frame,
    Progress,
    RawClient,
    Sender,
    ServerProcess,
    close_bytes,
    command_bytes,
    frame_bytes,
    get_bytes,
    new_users,
    others_are_served,
    request_bytes,
    reset,
    send_bulk,
    split_answer,
    take_frames,
    upgrade_bytes,
    wait_until,
)
from tests.harness import BIG, OFF, VirtualServer, taking, virtual_server, with_server

# --- connections that begin or end in an odd way -------------------------------------


@with_server()
async def test_commands_sent_right_after_the_handshake_are_handled(
    server: VirtualServer,
) -> None:
    command = command_bytes("ping", ref="first")
    raw = await server.join_raw(6, behind=command + command[:7])
    await raw.send(command[7:])
    assert (await raw.receive("pong"))["ref"] == "first"
    assert (await raw.receive("pong"))["ref"] == "first"


@with_server()
async def test_a_ping_in_the_segment_of_the_handshake_is_answered_after_the_101(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    request = upgrade_bytes(server.target(6))
    await raw.send(request, frame_bytes(PING, b"early"))
    assert (await raw.answer()).status == 101
    received = [await raw.frame(), await raw.frame()]
    assert (PONG, b"early") in received
    assert any(b'"connected"' in payload for _, payload in received)


@with_server()
async def test_clients_that_disconnect_at_once_leave_nothing_behind(
    server: VirtualServer,
) -> None:
    request = upgrade_bytes(server.target(6))
    for sent in (b"", b"G", request[:-2], request, request + close_bytes(1000)):
        raw = server.dial()
        if sent:
            await raw.send(sent)
        raw.stream.socket.close()
    for sent in (request, request + command_bytes("ping") * 50):
        raw = server.dial()
        await raw.send(sent)
        await raw.stream.send_eof()
        await raw.ends(2)
    await trio.sleep(2)
    server.check_left()


@with_server()
async def test_a_client_that_vanishes_ends_only_its_own_connection(
    server: VirtualServer,
) -> None:
    chat = await server.chat(1, 2)
    gone = await server.join(1)
    stays = await server.join(2)
    gone.stream.socket.close()
    await server.post(chat, "hi")
    assert (await stays.receive("new_message"))["message"]["content"] == "hi"
    assert [s.claims.user_id for s in server.app.sessions] == [2]
    await stays.receives_nothing()


# --- WebSocketReader: limits and protocol errors -------------------------------------


def test_trio_websocket_has_the_private_methods_that_the_reader_overrides() -> None:
    library = trio_websocket.WebSocketConnection
    assert trio_websocket.__version__ == "0.12.2"
    replaced = {
        name for name in vars(chatd.WebSocketReader) if name.startswith("_handle_")
    }
    assert replaced >= {"_handle_ping_event", "_handle_pong_event",
                        "_handle_message_event"}  # fmt: skip
    reader = inspect.getsource(library._reader_task)
    for name in replaced:
        assert f"self.{name}," in reader, name
        theirs, ours = getattr(library, name), getattr(chatd.WebSocketReader, name)
        assert inspect.iscoroutinefunction(theirs), name
        assert [*inspect.signature(ours).parameters] == ["self", "event"], name


@with_server()
async def test_the_reader_has_every_attribute_that_the_library_uses_of_it(
    server: VirtualServer,
) -> None:
    await server.join(6)

    async def receive(message: str | bytes) -> None:
        pass

    reader = chatd.WebSocketReader(server.session(6).outbox, b"", receive)
    library = trio_websocket.WebSocketConnection
    methods = (library._reader_task, library._abort_web_socket,
               library._close_web_socket, library.__str__)  # fmt: skip
    source = "".join(inspect.getsource(method) for method in methods)
    used = set(re.findall(r"\bself\.(\w+)", source))
    assert {"_wsproto", "_initial_request", "_close_reason", "_id"} <= used
    assert not [name for name in used if not hasattr(reader, name)]
    # `_send` and `_close_stream` follow errors of a handshake, which is over here.
    called = set(re.findall(r"\bself\.(_\w+)\(", source))
    assert called == {"_abort_web_socket", "_close_web_socket", "_send",
                      "_close_stream"}  # fmt: skip


@with_server(max_message_bytes=1000)
async def test_the_message_limit_counts_bytes_and_not_characters(
    server: VirtualServer,
) -> None:
    peer = await server.join(6)
    fits = json.dumps({"type": "ping", "x": "й" * 480}, ensure_ascii=False)
    await peer.ws.send_message(fits)
    await peer.receive("pong")
    too_big = fits.replace("й" * 480, "й" * 490)
    assert len(too_big) < 1000 < len(too_big.encode())
    await peer.ws.send_message(too_big)
    assert await peer.end() == ([], 1009)


@with_server(max_message_bytes=1000)
async def test_a_message_at_the_limit_is_accepted_and_one_byte_more_is_not(
    server: VirtualServer,
) -> None:
    peer = await server.join(6)
    command = json.dumps({"type": "ping", "x": ""})
    await peer.ws.send_message(command[:-2] + "x" * (1000 - len(command)) + '"}')
    await peer.receive("pong")
    await peer.ws.send_message(command[:-2] + "x" * (1001 - len(command)) + '"}')
    assert await peer.end() == ([], 1009)


@with_server(max_message_bytes=1000)
async def test_the_fragments_of_a_message_count_together(server: VirtualServer) -> None:
    raw = await server.join_raw(6)
    piece = frame_bytes(0, b"x" * 400, fin=False)
    await raw.send(frame_bytes(TEXT, b"x" * 400, fin=False), piece)
    await raw.send(piece)
    assert await raw.close_code() == 1009


@with_server()
async def test_the_count_of_fragments_starts_again_with_each_message(
    server: VirtualServer,
) -> None:
    raw = await server.join_raw(6)
    half, rest = b'{"type":"pi', b'ng"}'
    for _ in range(3):
        await raw.send(frame_bytes(TEXT, half, fin=False))
        await raw.send(*[frame_bytes(0, b"", fin=False)] * 62)
        await raw.send(frame_bytes(0, rest))
        await raw.receive("pong")


@with_server()
async def test_a_message_in_65_fragments_is_too_big(server: VirtualServer) -> None:
    raw = await server.join_raw(6)
    await raw.send(frame_bytes(TEXT, b"", fin=False))
    await raw.send(*[frame_bytes(0, b"", fin=False)] * 64)
    assert await raw.close_code() == 1009


@with_server(receive_bytes=OFF)
async def test_a_frame_that_announces_2_to_the_62_bytes_is_refused_at_the_limit(
    server: VirtualServer,
) -> None:
    raw = await server.join_raw(6)
    await raw.send(b"\x81\xff" + struct.pack("!Q", 2**62) + bytes(4) + b"x" * 65_536)
    await trio.sleep(5)
    assert len(server.app.sessions) == 1
    await raw.send(b"x")
    assert await raw.close_code() == 1009


@with_server()
async def test_a_flood_of_empty_continuations_gets_1009_and_delays_nobody(
    server: VirtualServer,
) -> None:
    raw = await server.join_raw(6)
    innocent = await server.join(7)
    flood = frame_bytes(0, b"", fin=False) * 10_000
    await raw.send(frame_bytes(TEXT, b"", fin=False))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raw.send, flood)
        assert (await innocent.ask("ping"))["type"] == "pong"
        assert await raw.close_code() == 1009


@with_server()
async def test_a_flood_of_pings_is_slowed_by_tcp_and_delays_nobody(
    server: VirtualServer,
) -> None:
    raw = await server.join_raw(6)
    innocent = await server.join(7)
    pings = 20_000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raw.send, frame_bytes(PING) * pings)
        for _ in range(5):
            assert (await innocent.ask("ping"))["type"] == "pong"
        started, pongs = trio.current_time(), 0
        while pongs < pings:
            assert await raw.frame(60) == (PONG, b"")
            pongs += 1
    # A ping costs 134 bytes. The rate is 64 KiB a second after a burst of 512 KiB.
    seconds = (pings * 134 - 524_288) / 65_536
    assert trio.current_time() - started == pytest.approx(seconds, abs=2)


@with_server(max_message_bytes=1000)
async def test_oversized_messages_and_pings_in_one_segment_get_a_single_1009(
    server: VirtualServer,
) -> None:
    raw = await server.join_raw(6)
    big = frame_bytes(TEXT, b"x" * 1001)
    await raw.send(big, frame_bytes(PING), big, frame_bytes(PING))
    assert await raw.close_code() == 1009


@with_server(max_message_bytes=1000)
async def test_commands_read_before_an_oversized_message_are_still_handled(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    raw = await server.join_raw(6)
    sends = [
        command_bytes("send_message", chat_id=chat, content=str(n)) for n in range(9)
    ]
    await raw.send(*sends, frame_bytes(TEXT, b"x" * 1001))
    while (frame := await raw.frame())[0] != CLOSE:
        assert json.loads(frame[1])["type"] in {"new_message", "ack"}
    assert frame[1][:2] == (1009).to_bytes(2, "big")
    await wait_all_tasks_blocked()  # the last commands may not be on disk yet
    history = await server.ask("GET", f"/api/v1/chats/{chat}/messages", user=7)
    contents = [message["content"] for message in history.json["messages"]]
    assert contents == [str(number) for number in range(9)]


PROTOCOL_ERRORS = {
    "reserved bits": (b"\xf1\x80\0\0\0\0", 1002),
    "an unknown opcode": (b"\x83\x80\0\0\0\0", 1002),
    "no mask": (frame_bytes(TEXT, b"{}", masked=False), 1002),
    "a continuation of nothing": (frame_bytes(0, b"x"), 1002),
    "a text within a text": (
        frame_bytes(TEXT, b"x", fin=False) + frame_bytes(TEXT, b"x"),
        1002,
    ),
    "a fragmented ping": (frame_bytes(PING, fin=False), 1002),
    "a long ping": (frame_bytes(PING, bytes(126)), 1002),
    "a length in too many bytes": (b"\x81\xfe\0\x05\0\0\0\0hello", 1002),
    "a length with its top bit set": (b"\x81\xff" + b"\xff" * 8 + bytes(4), 1002),
    "a close of one byte": (frame_bytes(CLOSE, b"\x03"), 1002),
    "a close code that may not be sent": (close_bytes(1005), 1002),
    "a reason that is not UTF-8": (frame_bytes(CLOSE, b"\x03\xe8\xff"), 1007),
    "text that is not UTF-8": (frame_bytes(TEXT, b'{"a":"\xc3\x28"}'), 1007),
    "text that ends in half a character": (frame_bytes(TEXT, b"\xd0"), 1007),
}


@pytest.mark.parametrize("fault", PROTOCOL_ERRORS)
@pytest.mark.parametrize("cut", [False, True], ids=["at once", "byte by byte"])
@with_server()
async def test_a_protocol_error_gets_its_close_code(
    server: VirtualServer, fault: str, cut: bool
) -> None:
    sent, code = PROTOCOL_ERRORS[fault]
    raw = await server.join_raw(6)
    if cut:
        for number in range(len(sent)):
            with contextlib.suppress(trio.BrokenResourceError):
                await raw.send(sent[number : number + 1])
            await wait_all_tasks_blocked()
    else:
        await raw.send(sent)
    assert await raw.close_code() == code
    stats = await server.stats()
    assert stats["connections"]["closed"] == {str(code): 1}


@with_server()
async def test_a_close_code_from_the_client_is_echoed_and_counted(
    server: VirtualServer,
) -> None:
    for code in (1000, 1001, 3000, 4999):
        raw = await server.join_raw(6)
        await raw.send(close_bytes(code), frame_bytes(PING), command_bytes("ping"))
        assert await raw.close_code() == code  # and nothing follows it
    raw = await server.join_raw(6)
    await raw.send(frame_bytes(CLOSE))
    assert await raw.close_code() == 1005  # no code was sent, and none is echoed
    closed = (await server.stats())["connections"]["closed"]
    assert closed == {"1000": 1, "1001": 1, "3000": 1, "4999": 1, "1005": 1}


@with_server()
async def test_a_client_that_pings_during_the_close_still_gets_the_code(
    server: VirtualServer,
) -> None:
    raws = [await server.join_raw(6) for _ in range(20)]
    for raw in raws:
        await raw.send(frame_bytes(PING) * 5)
    await server.command("POST", "/api/v1/internal/chat/revoke", {"user_id": 6})
    for raw in raws:
        with contextlib.suppress(trio.BrokenResourceError):
            await raw.send(frame_bytes(PING) * 5)
        while (frame := await raw.frame())[0] == PONG:
            pass
        assert frame == (CLOSE, b"\x11\x97revoked: sign in again")
        assert await raw.ends(1.5) == b""


# --- Session: connecting -------------------------------------------------------------


@with_server()
async def test_connected_is_the_first_frame_and_has_the_state_of_the_user(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    await server.post(chat, "one", "two", sender=7)
    peer = await server.join(6, token=server.token(6, 1000))
    hello = peer.hello
    assert 990 <= hello.pop("expires_in") < 1000
    assert hello.pop("timestamp").endswith("Z")
    assert hello == {
        "type": "connected",
        "user_id": 6,
        "cursor": f"{server.store.epoch}.{server.app.hub.head}",
        "resume": "fresh",
        "chats": {str(chat): {"last_n": 2, "read_n": 0}},
    }
    await peer.receives_nothing()


@pytest.mark.parametrize("count", [500, 501, 2000])
@with_server()
async def test_connected_has_the_500_newest_chats_and_events_come_from_all(
    server: VirtualServer, count: int
) -> None:
    create = server.app.chats.create_chat
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(server.store.commit, create, chatd.NewChat([6, 7]))
    await server.post(1, "hi", sender=7)
    raw = server.dial()
    await raw.send(upgrade_bytes(server.target(6)))
    assert (await raw.answer()).status == 101
    hello = await raw.receive("connected")
    newest = [1, *range(count, 1, -1)][:500]
    assert hello["chats"] == {
        str(chat): {"last_n": int(chat == 1), "read_n": 0} for chat in newest
    }
    assert hello.get("more_chats") == (True if count > 500 else None)
    assert len(json.dumps(hello)) < 32 * 1024
    for chat in (1, 2, count):
        await server.post(chat, "hi", sender=7)
        assert (await raw.receive("new_message"))["chat_id"] == chat


@pytest.mark.parametrize("tail_events", [16_384, 2], ids=["the tail", "the event log"])
async def test_a_replay_tells_each_new_title_of_a_chat(
    tmp_path: Path, tail_events: int, autojump_clock: MockClock
) -> None:
    settings = {"tail_events": tail_events}
    async with virtual_server(tmp_path, chatd.Store, settings) as server:
        cursor = f"{server.store.epoch}.{server.app.hub.head}"
        chat = await server.chat(6, 7)
        for title in ("a", None, "b"):
            await server.command("PATCH", f"/api/v1/chats/{chat}", {"title": title})
        peer = await server.join(6, cursor=cursor)
        added = await peer.receive("chat_added")
        # An old title is in the tail only: the event log reads the chat as it is now.
        assert added["chat"]["title"] == ("Tea" if tail_events > 2 else "b")
        for title in ("a", None, "b"):
            renamed = await peer.receive("chat_renamed")
            assert (renamed["title"], renamed["user_id"]) == (title, None)
        await peer.receives_nothing()


@with_server(resync_events=5)
async def test_the_cursor_decides_how_a_connection_resumes(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    other = await server.chat(7, 8)
    epoch, head = server.store.epoch, server.app.hub.head
    ids = await server.post(chat, *"abcde", sender=7)
    await server.post(other, *"xyz", sender=7)  # another chat: does not count
    now = server.app.hub.head

    async def resumes(cursor: str) -> tuple[str, str, list[int]]:
        peer = await server.join(6, cursor=cursor)
        with trio.move_on_after(0.1):
            received = []
            while True:
                received.append((await peer.receive("new_message"))["seq"])
        assert peer.hello["chats"] == {str(chat): {"last_n": 5, "read_n": 0}}
        await peer.leave()
        return peer.hello["resume"], peer.hello["cursor"], received

    fresh = f"{epoch}.{now}"
    assert await resumes(f"{epoch}.{now}") == ("live", fresh, [])
    # The event log has grown, but without an event for this user.
    assert await resumes(f"{epoch}.{ids[-1]}") == ("live", f"{epoch}.{ids[-1]}", [])
    assert await resumes(f"{epoch}.{head}") == ("replay", f"{epoch}.{head}", ids)
    assert await resumes(f"{epoch}.{ids[2]}") == (
        "replay", f"{epoch}.{ids[2]}", ids[3:],
    )  # fmt: skip
    await server.post(chat, "f", sender=7)
    now += 1
    fresh = f"{epoch}.{now}"

    async def resyncs(cursor: str) -> None:
        peer = await server.join(6, cursor=cursor)
        assert (peer.hello["resume"], peer.hello["cursor"]) == ("resync", fresh)
        await peer.receives_nothing()
        await peer.leave()

    await resyncs(f"{epoch}.{head}")  # six missed events; the limit is five
    await resyncs(f"{epoch}.{now + 1}")  # in the future
    await resyncs(f"{'0' * len(epoch)}.{now}")  # from another epoch
    for garbage in ("", ".", epoch, f"{epoch}.", f"{epoch}.-1", f"{epoch}.1e1", "\0",
                    f"{epoch}.{'9' * 30}", f"{epoch}.٣", f" {epoch}.1"):  # fmt: skip
        await resyncs(garbage)
    resumed = (await server.stats())["resumes"]
    assert resumed == {"fresh": 0, "live": 2, "replay": 2, "resync": 13}


@with_server()
async def test_after_a_resync_events_follow_from_the_new_cursor(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer = await server.join(6, cursor="nonsense")
    (seq,) = await server.post(chat, "hi", sender=7)
    assert (await peer.receive("new_message"))["seq"] == seq
    assert peer.hello["cursor"] == f"{server.store.epoch}.{seq - 1}"


@with_server()
async def test_only_events_have_a_seq_and_only_connected_and_the_poll_have_a_cursor(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer, friend = await server.join(6), await server.join(7)
    await peer.send_command("send_message", chat_id=chat, content="hi")
    event = await peer.receive("new_message")
    assert event["seq"] == event["message"]["id"]
    ack = await peer.receive("ack")
    await friend.send_command("typing", chat_id=chat, is_typing=True)
    for frame in (ack, await peer.receive("typing"), await peer.ask("ping")):
        assert "seq" not in frame
        assert "cursor" not in frame
    assert "cursor" not in event


@pytest.mark.parametrize("tail_events", [16_384, 3], ids=["the tail", "the event log"])
@pytest.mark.parametrize("page_events", [500, 2])
async def test_a_replay_delivers_every_event_once_and_in_order(
    tmp_path: Path, tail_events: int, page_events: int, autojump_clock: MockClock
) -> None:
    settings = {"tail_events": tail_events, "page_events": page_events}
    async with virtual_server(tmp_path, chatd.Store, settings) as server:
        chat = await server.chat(6, 7)
        cursor = f"{server.store.epoch}.{server.app.hub.head}"
        ids = await server.post(chat, *map(str, range(20)), sender=7)
        peer = await server.join(6, cursor=cursor)
        assert peer.hello["resume"] == "replay"
        for seq in ids:
            assert (await peer.receive("new_message"))["seq"] == seq
        (seq,) = await server.post(chat, "live", sender=7)
        assert (await peer.receive("new_message"))["seq"] == seq
        await peer.receives_nothing()


@with_server(connections_per_user=2)
async def test_one_connection_too_many_gets_4504_and_takes_no_place(
    server: VirtualServer,
) -> None:
    first, second = await server.join(6), await server.join(6)
    third = await server.join(6, hello=False)
    assert await third.end() == ([], 4504)
    assert (await server.join(7)).hello["resume"] == "fresh"
    await first.leave()
    assert (await server.join(6)).hello["resume"] == "fresh"
    assert (await second.ask("ping"))["type"] == "pong"


PING_OUT = frame_bytes(PING, masked=False)


@with_server(connections_per_user=20, handshakes=OFF)
async def test_twenty_dead_connections_do_not_lock_out_the_21st(
    server: VirtualServer,
) -> None:
    dead = [await server.join_raw(6) for _ in range(20)]
    await trio.sleep(10)  # no ping is due yet
    first = await server.join(6, hello=False)
    with taking(3, 3.3):
        first.hello = await first.receive("connected", within=4)
    with taking(0, 19 * 0.2):
        others = [await server.join(6) for _ in range(19)]
    for raw in dead:
        assert await raw.ends() == PING_OUT  # and no close frame
    for peer in (first, *others):
        assert (await peer.ask("ping"))["type"] == "pong"
    assert await (await server.join(6, hello=False)).end() == ([], 4504)
    closed = (await server.stats())["connections"]["closed"]
    assert closed == {"1006": 20, "4504": 1}


@with_server(connections_per_user=3)
async def test_the_connection_that_has_not_answered_for_longest_makes_room(
    server: VirtualServer,
) -> None:
    alive = await server.join(6)
    late = await server.join_raw(6)
    await trio.sleep(3)
    await late.send(command_bytes("ping"))
    early = await server.join_raw(6)
    for raw, seconds in ((late, 27.5), (early, 22.5)):
        server.session_of(raw).seat.ping_after = seconds
    await trio.sleep(32)  # both have been pinged: `early` first
    with taking(0, 0.2):
        newcomer = await server.join(6)
    assert await early.ends() == PING_OUT
    assert len(server.app.sessions) == 3
    for peer in (alive, newcomer):
        assert (await peer.ask("ping"))["type"] == "pong"
    assert late.data == b"" or late.data.endswith(PING_OUT)


@with_server(connections_per_user=2)
async def test_connections_that_answer_are_not_cut_for_another(
    server: VirtualServer,
) -> None:
    peers = [await server.join(6) for _ in range(2)]
    await trio.sleep(3600)
    assert await (await server.join(6, hello=False)).end() == ([], 4504)
    for peer in peers:
        assert (await peer.ask("ping"))["type"] == "pong"


@with_server(connections_per_user=2)
async def test_connections_that_were_just_heard_of_are_alive(
    server: VirtualServer,
) -> None:
    raws = [await server.join_raw(6) for _ in range(2)]
    await trio.sleep(2.5)
    with taking(0):
        assert await (await server.join(6, hello=False)).end() == ([], 4504)
    await wait_all_tasks_blocked()
    assert len(server.app.sessions) == len(raws)


@with_server(connections_per_user=2, commands=OFF)
async def test_a_connection_that_chatd_keeps_waiting_is_alive(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    (message,) = await server.post(chat, "one", sender=7)
    raws = [await server.join_raw(6) for _ in range(2)]
    server.disk.hold()
    for raw in raws:  # 65: chatd reads no more until it has answered
        await raw.send(command_bytes("mark_read", message_id=message) * 65)
    await trio.sleep(60)
    assert await (await server.join(6, hello=False)).end() == ([], 4504)
    server.disk.go()
    await trio.sleep(1)
    assert len(server.app.sessions) == 2


@with_server(connections_per_user=1, outbox_bytes=8192)
async def test_a_connection_that_reads_nothing_makes_room_too(
    server: VirtualServer,
) -> None:
    raw, _ = await stall(server)  # its output waits, so it is never pinged
    await trio.sleep(2)
    assert await (await server.join(6, hello=False)).end() == ([], 4504)
    await trio.sleep(2)
    with taking(0, 0.2):
        await server.join(6)
    assert PING_OUT not in await raw.ends()
    assert (await server.stats())["broadcast"]["stalls"] == 0


@with_server(connections_per_user=1)
async def test_a_connection_that_was_cut_for_another_comes_back_with_its_cursor(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    raw = await server.join_raw(6)  # a computer that sleeps
    cursor = f"{server.store.epoch}.{server.app.hub.head}"
    await trio.sleep(10)
    phone = await server.join(6, hello=False)
    await phone.receive("connected", within=4)
    ids = await server.post(chat, "a", "b", sender=7)
    assert await raw.ends() == PING_OUT
    await phone.leave()
    awake = await server.join(6, cursor=cursor)
    assert awake.hello["resume"] == "replay"
    for seq in ids:
        assert (await awake.receive("new_message"))["seq"] == seq


@with_server(connections_per_user=2)
async def test_one_dead_connection_makes_room_for_one(server: VirtualServer) -> None:
    alive, dead = await server.join(6), await server.join_raw(6)
    await trio.sleep(10)
    peers = [await server.join(6, hello=False) for _ in range(3)]
    codes = []
    for peer in peers:
        with trio.move_on_after(5):
            codes.append((await peer.end(within=10))[1])
    assert codes == [4504, 4504]
    assert await dead.ends() == PING_OUT
    assert (await alive.ask("ping"))["type"] == "pong"
    assert len(server.app.sessions) == 2


@pytest.mark.parametrize(("how", "code"), [("stopped", 1012), ("revoked", 4503)])
@with_server(connections_per_user=1)
async def test_a_connection_that_waits_for_room_can_be_ended(
    server: VirtualServer, how: str, code: int
) -> None:
    await server.join_raw(6)
    await trio.sleep(10)
    peer = await server.join(6, hello=False)
    await trio.sleep(1)
    if how == "stopped":
        server.app.listener.stopping.set()
    else:
        await server.command("POST", "/api/v1/internal/chat/revoke", {"user_id": 6})
    with taking(0, 0.1):
        _, closed = await peer.end()
    assert closed == code


@with_server()
async def test_a_close_frame_has_a_code_and_a_reason(server: VirtualServer) -> None:
    raw = await server.join_raw(6)
    server.session(6).end(4503, "revoked: sign in again")
    assert await raw.frame(1) == (CLOSE, b"\x11\x97revoked: sign in again")


class UnreadableStore(chatd.Store):
    """A store that cannot read greetings or events: SQLite raises a real error."""

    broken = "greeting"

    def greeting(self, db: sqlite3.Connection, *args: Any) -> Any:
        if self.broken == "greeting":
            db.execute("SELECT * FROM nothing")
        return super().greeting(db, *args)

    def events_after(self, db: sqlite3.Connection, *args: Any) -> chatd.Page:
        if self.broken == "events_after":
            db.execute("SELECT * FROM nothing")
        return super().events_after(db, *args)


@with_server(store=UnreadableStore)
async def test_a_connection_whose_first_read_fails_gets_the_error_and_1013(
    server: VirtualServer,
) -> None:
    server.errors = {"OperationalError": 1}
    peer = await server.join(6, hello=False)
    ((error,), code) = await peer.end()
    assert (error["type"], error["code"], code) == ("error", "storage_failed", 1013)


@with_server(store=UnreadableStore, tail_events=2)
async def test_a_replay_that_cannot_be_read_gets_1013(server: VirtualServer) -> None:
    server.errors = {"OperationalError": 1}
    cast("UnreadableStore", server.store).broken = "events_after"
    chat = await server.chat(6, 7)
    cursor = f"{server.store.epoch}.{server.app.hub.head}"
    await server.post(chat, *"abcde", sender=7)
    peer = await server.join(6, cursor=cursor)
    assert await peer.end() == ([], 1013)


# --- Session: commands ---------------------------------------------------------------


@with_server()
async def test_the_ping_command_is_answered_by_pong(server: VirtualServer) -> None:
    peer = await server.join(6)
    await peer.send_command("ping")
    pong = await peer.receive("pong")
    assert set(pong) == {"type", "timestamp"}
    await peer.send_command("ping", ref="r" * 64)
    assert (await peer.receive("pong"))["ref"] == "r" * 64


@with_server()
async def test_a_message_reaches_its_sender_before_the_ack_and_every_other_connection(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer, tab, friend = [await server.join(user) for user in (6, 6, 7)]
    await peer.send_command(
        "send_message", chat_id=chat, content="Привет!", client_id="k1", ref="a"
    )
    event = await peer.receive("new_message")
    message = event["message"]
    assert event == {
        "type": "new_message",
        "seq": message["id"],
        "chat_id": chat,
        "message": message,
    }
    created = message["created_at"]
    assert message == {
        "id": message["id"], "chat_id": chat, "sender_id": 6, "content": "Привет!",
        "created_at": created, "n": 1, "client_id": "k1",
    }  # fmt: skip
    assert await peer.receive("ack") == {
        "type": "ack", "ref": "a", "client_id": "k1", "message_id": message["id"],
        "chat_id": chat, "n": 1, "created_at": created, "duplicate": False,
    }  # fmt: skip
    assert await tab.receive("new_message") == event
    assert await friend.receive("new_message") == event
    for other in (peer, tab, friend):
        await other.receives_nothing()


@with_server(sends=OFF)
async def test_commands_are_handled_and_answered_in_order(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer = await server.join(6)
    for number in range(40):
        await peer.send_command(
            "send_message", chat_id=chat, content=str(number), ref="r"
        )
    acks: list[Frame] = []
    events: list[Frame] = []
    for _ in range(80):
        with trio.fail_after(1):
            received = json.loads(await peer.ws.get_message())
        (events if received["type"] == "new_message" else acks).append(received)
        assert len(acks) <= len(events)
    assert [event["message"]["content"] for event in events] == [
        str(number) for number in range(40)
    ]
    assert [event["message"]["n"] for event in events] == list(range(1, 41))
    assert [ack["n"] for ack in acks] == list(range(1, 41))


@with_server()
async def test_a_message_is_edited_and_deleted_over_the_socket(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    one, two = await server.join(6), await server.join(7)
    sent = await one.ask("send_message", chat_id=chat, content="old", client_id="k")
    message = sent["message_id"]
    first = (await two.receive("new_message"))["message"]
    await one.send_command(
        "edit_message", message_id=message, content="new", if_rev=message, ref="r"
    )
    event = await one.receive("message_edited")  # before its ack
    ack = {"type": "ack", "ref": "r", "message_id": message, "chat_id": chat}
    assert await one.receive("ack") == ack | {"rev": event["seq"]}
    assert event["message"]["content"] == "new"
    assert await two.receive("message_edited") == event
    # A repeat gets the same ack, and makes no event.
    again = await one.ask("edit_message", message_id=message, content="new")
    assert again == ack | {"ref": "ask", "rev": event["seq"]}
    await one.send_command("delete_message", message_id=message, ref="r")
    gone = await one.receive("message_deleted")
    assert await one.receive("ack") == ack | {"rev": gone["seq"]}
    assert await two.receive("message_deleted") == gone
    assert gone["message"] == event["message"] | {
        "content": "", "deleted": True, "rev": gone["seq"],
    }  # fmt: skip
    assert first["content"] == "old"
    again = await one.ask("delete_message", message_id=message)
    assert again == ack | {"ref": "ask", "rev": gone["seq"]}
    refused = await one.refused("edit_message", message_id=message, content="x")
    assert (refused["code"], refused["message_id"]) == ("deleted", message)
    again = await one.ask("send_message", chat_id=chat, content="old", client_id="k")
    assert (again["message_id"], again["duplicate"]) == (message, True)
    await two.receives_nothing()
    back = await server.join(7, cursor=f"{server.store.epoch}.{message - 1}")
    for kind in ("new_message", "message_edited", "message_deleted"):
        assert (await back.receive(kind))["message"] == gone["message"]


@with_server(edit_seconds=0)
async def test_with_edit_seconds_0_only_a_service_changes_messages(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer = await server.join(6)
    service = await server.join(999, token=server.token(999, scope="service"))
    message = (await peer.ask("send_message", chat_id=chat, content="x"))["message_id"]
    for kind, rest in (("edit_message", {"content": "y"}), ("delete_message", {})):
        refused = await peer.refused(kind, message_id=message, **rest)
        assert refused["code"] == "too_late"
        assert (await service.ask(kind, message_id=message, **rest))["rev"]


@with_server()
async def test_a_removed_member_changes_nothing_and_sees_no_change(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer, other = await server.join(6), await server.join(7)
    message = (await peer.ask("send_message", chat_id=chat, content="x"))["message_id"]
    await server.command("DELETE", f"/api/v1/chats/{chat}/members/6")
    await peer.receive("member_removed")
    hidden = await peer.refused("delete_message", message_id=message)
    unknown = await peer.refused("delete_message", message_id=12_345)
    assert hidden.pop("message_id") != unknown.pop("message_id")
    assert hidden == unknown
    assert hidden["code"] == "not_found"
    await server.command("DELETE", f"/api/v1/messages/{message}")
    for kind in ("new_message", "member_removed", "message_deleted"):
        await other.receive(kind)
    await peer.receives_nothing()


@with_server()
async def test_mark_read_only_moves_up_and_is_always_acked(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    first, second = await server.post(chat, "one", "two", sender=7)
    peer, friend = await server.join(6), await server.join(7)
    await peer.send_command("mark_read", message_id=second, ref="a")
    event = await peer.receive("message_read")
    assert event == {
        "type": "message_read", "seq": event["seq"], "message_id": second,
        "chat_id": chat, "read_by": 6, "n": 2,
    }  # fmt: skip
    assert await peer.receive("ack") == {"type": "ack", "ref": "a"}
    assert await friend.receive("message_read") == event
    for message_id in (first, second):
        await peer.send_command("mark_read", message_id=message_id)
        assert await peer.receive("ack") == {"type": "ack"}
    await friend.receives_nothing()


@with_server()
async def test_typing_goes_to_the_other_members_and_gets_no_answer(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer, tab, friend, stranger = [await server.join(u) for u in (6, 6, 7, 8)]
    await peer.send_command("typing", chat_id=chat, is_typing=True, ref="a")
    assert await friend.receive("typing") == {
        "type": "typing", "chat_id": chat, "user_id": 6, "is_typing": True,
    }  # fmt: skip
    await peer.send_command("typing", chat_id=chat, is_typing=False)
    assert (await friend.receive("typing"))["is_typing"] is False
    for other in (peer, tab, stranger):
        await other.receives_nothing()


@with_server()
async def test_commands_on_a_hidden_chat_and_on_an_unknown_one_are_refused_alike(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    (message,) = await server.post(chat, "secret", sender=6)
    stranger, member = await server.join(8), await server.join(7)
    for hidden, unknown in ((chat, 12_345), (message, 54_321)):
        if hidden == chat:
            commands: list[tuple[str, str, dict[str, Any]]] = [
                ("typing", "chat_id", {"is_typing": True}),
                ("send_message", "chat_id", {"content": "hi"}),
            ]
        else:
            commands = [
                ("mark_read", "message_id", {}),
                ("edit_message", "message_id", {"content": "x"}),
                ("delete_message", "message_id", {}),
            ]
        for kind, field, rest in commands:
            mine = await stranger.refused(kind, **{field: hidden}, **rest)
            none = await stranger.refused(kind, **{field: unknown}, **rest)
            assert (mine.pop(field), none.pop(field)) == (hidden, unknown)
            assert mine == none
            assert mine["code"] == "not_found"
            assert field in mine["message"]
    await member.receives_nothing()


BAD_COMMANDS: dict[str, tuple[str | bytes, str, str]] = {
    "binary": (b'{"type":"ping"}', "bad_json", ""),
    "no JSON": ("hello", "bad_json", ""),
    "nothing": ("", "bad_json", ""),
    "half of JSON": ('{"type":"ping"', "bad_json", ""),
    "two in one": ('{"type":"ping"}{"type":"ping"}', "bad_json", ""),
    "a list": ('[{"type":"ping"}]', "bad_json", ""),
    "a number": ("1", "bad_json", ""),
    "null": ("null", "bad_json", ""),
    "deep": ("[" * 30_000, "bad_json", ""),
    "deep in an unknown field": (
        '{"type":"ping","x":' + "[" * 30_000 + "]" * 30_000 + "}",
        "bad_json",
        "",
    ),
    "half of a surrogate pair": (
        '{"type":"send_message","chat_id":1,"content":"\\ud800"}',
        "bad_json",
        "",
    ),
    "no type": ("{}", "bad_field", "type"),
    "an unknown type": ('{"type":"fly"}', "unknown_type", "type"),
    "a type that is no text": ('{"type":7}', "bad_field", "type"),
    "no chat_id": ('{"type":"typing","is_typing":true}', "bad_field", "chat_id"),
    "a chat_id in quotes": (
        '{"type":"typing","chat_id":"1","is_typing":true}', "bad_field", "chat_id",
    ),
    "a chat_id of 0": (
        '{"type":"typing","chat_id":0,"is_typing":true}', "bad_field", "chat_id",
    ),
    "a chat_id of 1.5": (
        '{"type":"typing","chat_id":1.5,"is_typing":true}', "bad_field", "chat_id",
    ),
    "is_typing of 1": (
        '{"type":"typing","chat_id":1,"is_typing":1}', "bad_field", "is_typing",
    ),
    "a message_id past 2^53": (
        '{"type":"mark_read","message_id":9007199254740992}', "bad_field", "message_id",
    ),
    "a message_id past 2^64": (
        '{"type":"mark_read","message_id":18446744073709551617}',
        "bad_field",
        "message_id",
    ),
    "content that is null": (
        '{"type":"send_message","chat_id":1,"content":null}', "bad_field", "content",
    ),
    "content of spaces": (
        '{"type":"send_message","chat_id":1,"content":" \\n"}', "bad_field", "content",
    ),
    "content with a NUL": (
        '{"type":"send_message","chat_id":1,"content":"a\\u0000"}',
        "bad_field",
        "content",
    ),
    "content of 4001": (
        '{"type":"send_message","chat_id":1,"content":"' + "x" * 4001 + '"}',
        "bad_field",
        "content",
    ),
    "a client_id of nothing": (
        '{"type":"send_message","chat_id":1,"content":"x","client_id":""}',
        "bad_field",
        "client_id",
    ),
    "a client_id of 65": (
        '{"type":"send_message","chat_id":1,"content":"x","client_id":"'
        + "x" * 65 + '"}',
        "bad_field",
        "client_id",
    ),
    "a client_id that is not ASCII": (
        '{"type":"send_message","chat_id":1,"content":"x","client_id":"й"}',
        "bad_field",
        "client_id",
    ),
    "no token": ('{"type":"auth"}', "bad_field", "token"),
    "a ref of 65": ('{"type":"ping","ref":"' + "x" * 65 + '"}', "bad_field", "ref"),
    "a ref that is a number": ('{"type":"ping","ref":1}', "bad_field", "ref"),
}  # fmt: skip


@with_server(commands=OFF, receive_bytes=OFF)
async def test_a_bad_command_gets_an_error_and_the_connection_stays_open(
    server: VirtualServer,
) -> None:
    await server.chat(6, 7)
    peer = await server.join(6)
    for name, (text, code, field) in BAD_COMMANDS.items():
        await peer.ws.send_message(text)
        error = await peer.receive("error")
        assert (error["code"], name) == (code, name)
        assert field in error["message"], name
        assert error["message"], name
        assert "ref" not in error, name
    assert (await peer.ask("ping"))["type"] == "pong"


SEND = {"type": "send_message", "client_id": "k", "ref": "r"}
# Refused commands of a user who is in chat 1: the code, and what names each of them.
REFUSED: list[tuple[str, str, Frame]] = [
    # Chats and messages of others.
    (json.dumps({**SEND, "client_id": "new", "chat_id": 9, "content": "x"}),
     "not_found", {"ref": "r", "client_id": "new", "chat_id": 9}),
    ('{"type":"typing","chat_id":9,"is_typing":true,"ref":"r"}', "not_found",
     {"ref": "r", "chat_id": 9}),
    ('{"type":"mark_read","message_id":9,"ref":"r"}', "not_found",
     {"ref": "r", "message_id": 9}),
    # A used client_id.
    (json.dumps({**SEND, "chat_id": 1, "content": "changed"}), "idempotency_mismatch",
     {"ref": "r", "client_id": "k", "chat_id": 1}),
    # Another field is wrong, or is missing.
    (json.dumps({**SEND, "chat_id": 1, "content": " "}), "bad_field",
     {"ref": "r", "client_id": "k", "chat_id": 1}),
    (json.dumps({**SEND, "chat_id": 1, "content": 7}), "bad_field",
     {"ref": "r", "client_id": "k", "chat_id": 1}),
    (json.dumps({**SEND, "chat_id": "1", "content": "x"}), "bad_field",
     {"ref": "r", "client_id": "k"}),
    (json.dumps({**SEND, "ref": 7, "chat_id": 1, "content": "x"}), "bad_field",
     {"client_id": "k", "chat_id": 1}),
    (json.dumps(SEND), "bad_field", {"ref": "r", "client_id": "k"}),
    ('{"type":"typing","chat_id":1,"is_typing":1}', "bad_field", {"chat_id": 1}),
    ('{"type":"mark_read","message_id":0,"chat_id":1,"ref":"r"}', "bad_field",
     {"ref": "r", "chat_id": 1}),
    ('{"type":"auth","token":7,"ref":"r"}', "bad_field", {"ref": "r"}),
    ('{"type":"auth","token":"t","ref":"r"}', "token_invalid", {"ref": "r"}),
    ('{"type":"ping","ref":"й","client_id":3}', "", {"ref": "й"}),
    # Names that are too long or of another type are not repeated.
    (json.dumps({**SEND, "client_id": "k" * 65, "chat_id": 1, "content": "x"}),
     "bad_field", {"ref": "r", "chat_id": 1}),
    (json.dumps({**SEND, "client_id": "й", "chat_id": 1, "content": "x"}),
     "bad_field", {"ref": "r", "chat_id": 1}),
    (json.dumps({**SEND, "ref": "r" * 65, "chat_id": True, "message_id": 2**53}),
     "bad_field", {"client_id": "k"}),
    ('{"type":"fly","ref":null,"client_id":[],"chat_id":{},"message_id":1e0}',
     "unknown_type", {}),
    ('{"type":"send_message","chat_id":' + "9" * 400 + ',"client_id":"k"}',
     "bad_field", {"client_id": "k"}),
    # No command at all.
    ('{"type":"edit","message_id":5,"ref":"r"}', "unknown_type",
     {"ref": "r", "message_id": 5}),
    ('{"type":[],"client_id":"k"}', "bad_field", {"client_id": "k"}),
    ('{"client_id":"k"}', "bad_field", {"client_id": "k"}),
    # Only msgspec cannot read the first two; nobody can read the next two.
    (json.dumps({**SEND, "chat_id": 1, "content": "\ud83d"}), "bad_json",
     {"ref": "r", "client_id": "k", "chat_id": 1}),
    (json.dumps({**SEND, "ref": "\ud83d", "chat_id": 1, "content": "x"}), "bad_json",
     {"client_id": "k", "chat_id": 1}),
    ('{"client_id":"k","ref":"r"', "bad_json", {}),
    ('{"client_id":"k","x":' + "[" * 30_000 + "]" * 30_000 + "}", "bad_json", {}),
    ('["ref","client_id"]', "bad_json", {}),
    ('"ref"', "bad_json", {}),
    ("null", "bad_json", {}),
    ("7", "bad_json", {}),
]  # fmt: skip


def names_in(error: Frame) -> Frame:
    """Return what an error, or another answer, says about its command."""
    known = {"type", "code", "message", "retry_after", "timestamp"}
    return {name: value for name, value in error.items() if name not in known}


@with_server(commands=OFF, receive_bytes=OFF)
async def test_an_error_repeats_all_that_names_its_command(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    assert chat == 1
    peer = await server.join(6)
    await peer.ask("send_message", chat_id=chat, content="x", client_id="k")
    for text, code, names in REFUSED:
        await peer.ws.send_message(text)
        answer = await peer.receive("error" if code else "pong")
        assert answer.get("code", "") == code, text[:200]
        assert names_in(answer) == names, text[:200]
    await peer.ws.send_message(b'{"type":"ping","ref":"in binary"}')
    assert (await peer.receive("error"))["code"] == "bad_json"


COMMANDS_WITH_NAMES: list[Frame] = [
    {"type": "ping", "ref": "r"},
    {"type": "typing", "chat_id": 1, "is_typing": True, "ref": "r"},
    {"type": "mark_read", "message_id": 3, "ref": "r"},
    {**SEND, "chat_id": 1, "content": "x"},
    {"type": "auth", "token": "t", "ref": "r"},
]


@with_server(commands=chatd.Rate(0.001, 2))
async def test_an_error_over_the_rate_of_commands_names_its_command(
    server: VirtualServer,
) -> None:
    await server.chat(6, 7)
    peer = await server.join(6)
    for _ in range(2):
        await peer.ask("ping")
    for command in COMMANDS_WITH_NAMES:
        await peer.ws.send_message(json.dumps(command))
        error = await peer.receive("error")
        assert error["code"] == "rate_limited"
        names = command.keys() & chatd.NAMES.keys()
        assert names_in(error) == {name: command[name] for name in names}


@with_server(sends=chatd.Rate(0.001, 1))
async def test_an_error_over_the_rate_of_messages_names_its_message(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer = await server.join(6)
    send = {"chat_id": chat, "content": "x"}
    await peer.ask("send_message", **send, client_id="k1")
    error = await peer.refused("send_message", **send, client_id="k2")
    assert (error["code"], names_in(error)) == (
        "rate_limited", {"ref": "ask", "client_id": "k2", "chat_id": chat},
    )  # fmt: skip


@with_server()
async def test_an_error_of_a_failed_disk_names_its_command(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    (message,) = await server.post(chat, "one", sender=7)
    peer = await server.join(6)
    server.store._writer.execute("PRAGMA query_only = 1")
    for command, names in (
        ({**SEND, "chat_id": chat, "content": "x"}, ("ref", "client_id", "chat_id")),
        ({"type": "mark_read", "message_id": message}, ("message_id",)),
    ):
        await peer.ws.send_message(json.dumps(command))
        error = await peer.receive("error")
        assert (error["code"], error["retry_after"]) == ("storage_failed", 2.0)
        assert names_in(error) == {name: command[name] for name in names}


@with_server()
async def test_unknown_fields_are_ignored(server: VirtualServer) -> None:
    peer = await server.join(6)
    await peer.send_command("ping", colour="green", ref="a")
    assert (await peer.receive("pong"))["ref"] == "a"


@with_server()
async def test_a_repeated_send_gets_the_same_ack_and_makes_no_event(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    other = await server.chat(6, 8)
    peer, friend = await server.join(6), await server.join(7)
    command: dict[str, Any] = {"chat_id": chat, "content": "hi", "client_id": "k"}
    ack = await peer.ask("send_message", **command)
    await friend.receive("new_message")
    again = await peer.ask("send_message", **command)
    assert again == ack | {"duplicate": True}
    await friend.receives_nothing()
    for change in ({"content": "ho"}, {"chat_id": other}):
        error = await peer.refused("send_message", **command | change)
        assert error["code"] == "idempotency_mismatch"
    # A client_id belongs to its sender: another user may use the same.
    theirs = await friend.ask("send_message", **command)
    assert theirs["duplicate"] is False


@with_server()
async def test_reading_pauses_at_64_unanswered_commands(server: VirtualServer) -> None:
    chat = await server.chat(6, 7)
    (message,) = await server.post(chat, "one", sender=7)
    peer, innocent = await server.join(6), await server.join(7)
    server.disk.hold()
    for _ in range(58):  # the command bucket holds 60
        await peer.send_command("mark_read", message_id=message)
    assert (await peer.ask("ping"))["type"] == "pong"  # reading goes on
    await peer.receives_nothing(1)
    for _ in range(6):
        await peer.send_command("mark_read", message_id=message)
    assert (await peer.ask("ping"))["type"] == "pong"
    await peer.send_command("mark_read", message_id=message)  # the 65th
    await peer.send_command("ping")
    await peer.receives_nothing(5)
    assert (await innocent.ask("ping"))["type"] == "pong"
    server.disk.go()
    received = [json.loads(await peer.ws.get_message())["type"] for _ in range(67)]
    assert sorted(received) == ["ack"] * 65 + ["message_read", "pong"]
    assert received[0] == "message_read"


@with_server(connections_per_user=100, handshakes=OFF, commands=OFF)
async def test_a_full_channel_to_the_store_delays_only_the_clients_that_write(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    (message,) = await server.post(chat, "one", sender=6)  # its sender has read it
    innocent = await server.join(7)
    raws = [await server.join_raw(6) for _ in range(80)]
    server.disk.hold()
    for raw in raws:  # 5,120 commands; the channel holds 4,096, a batch 512
        await raw.send(command_bytes("mark_read", message_id=message) * 64)
    await wait_all_tasks_blocked()
    assert (await innocent.ask("ping"))["type"] == "pong"
    ended = server.session_of(raws[-1])  # while its command waits
    ended.end(4503, "revoked")
    assert await raws[-1].close_code() == 4503
    server.disk.go()
    for raw in raws[:-1]:
        for _ in range(64):
            assert await raw.receive("ack") == {"type": "ack"}


@with_server(commands=OFF)
async def test_a_repeat_over_the_rate_waits_too_at_64_unanswered_commands(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer = await server.join(6)
    for number in range(20):
        ack = await peer.ask(
            "send_message", chat_id=chat, content=str(number), client_id=str(number)
        )
    server.disk.hold()
    for _ in range(64):
        await peer.send_command("mark_read", message_id=ack["message_id"])
    await peer.send_command("send_message", chat_id=chat, content="0", client_id="0")
    await peer.receives_nothing(0.1)
    server.disk.go()
    received = [json.loads(await peer.ws.get_message()) for _ in range(65)]
    (repeat,) = [frame for frame in received if frame.get("duplicate")]
    assert (repeat["client_id"], repeat["n"]) == ("0", 1)


# --- Session: deadlines, slow readers, half closes -----------------------------------


@with_server()
async def test_a_silent_client_is_pinged_after_25_s_and_dropped_10_s_later(
    server: VirtualServer,
) -> None:
    raw = await server.join_raw(6)
    with taking(22.5, 28.6):
        assert await raw.frame(within=30) == (PING, b"")
    with taking(10, 11.1):
        assert await raw.ends(within=20) == b""
    closed = (await server.stats())["connections"]["closed"]
    assert closed == {"1006": 1}


@with_server()
async def test_pings_of_different_connections_are_spread(server: VirtualServer) -> None:
    for _ in range(10):
        await server.join(6)
    spread = {round(s.seat.ping_after, 6) for s in server.app.sessions}
    assert len(spread) > 5
    assert all(22.5 <= seconds <= 27.5 for seconds in spread)


@pytest.mark.parametrize("sign", ["pong", "ping", "command", "half a frame"])
@with_server()
async def test_any_received_byte_shows_that_the_client_is_alive(
    server: VirtualServer, sign: str
) -> None:
    raw = await server.join_raw(6)
    signs = {
        "pong": frame_bytes(PONG),
        "ping": frame_bytes(PING),
        "command": command_bytes("ping"),
        "half a frame": b"\x81",
    }
    for _ in range(3 if sign != "half a frame" else 1):
        while (await raw.frame(within=30))[0] != PING:
            pass
        await trio.sleep(9)
        await raw.send(signs[sign])
    with taking(20, 30):
        while (await raw.frame(within=30))[0] != PING:
            pass


@with_server()
async def test_an_active_client_is_not_pinged(server: VirtualServer) -> None:
    raw = await server.join_raw(6)
    for _ in range(10):
        await trio.sleep(20)
        await raw.send(command_bytes("ping"))
        await raw.receive("pong")  # and no ping came


@with_server(commands=OFF)
async def test_a_client_whose_commands_wait_for_the_disk_is_not_dropped_as_silent(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    (message,) = await server.post(chat, "one", sender=6)
    peer = await server.join(6)  # its library answers pings by itself
    server.disk.hold()
    for _ in range(70):
        await peer.send_command("mark_read", message_id=message)
    await peer.receives_nothing(50)
    server.disk.go()
    for _ in range(70):
        await peer.receive("ack")


@with_server()
async def test_a_client_that_only_receives_stays_connected_for_hours(
    server: VirtualServer,
) -> None:
    peer = await server.join(6, token=server.token(6, 100_000))
    await peer.receives_nothing(3 * 3600)
    assert (await peer.ask("ping"))["type"] == "pong"


@with_server()
async def test_a_stalled_reader_is_dropped_after_40_s_and_delays_nobody(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    stalled = await server.join_raw(6, small=True)
    innocent = await server.join(7)
    with taking(0):
        await server.post(chat, *[BIG] * 20)
        for _ in range(20):
            await innocent.receive("new_message")
    with taking(40, 41.1):
        while len(server.app.sessions) == 2:
            await innocent.receives_nothing(0.1)
    assert (await innocent.ask("ping"))["type"] == "pong"
    stats = await server.stats()
    assert stats["connections"]["closed"] == {"1006": 1}
    assert stats["broadcast"]["stalls"] == 1
    # The client receives whole frames, in order. Only the last may be cut.
    await stalled.ends()
    frames = list(take_frames(stalled.data))
    assert {opcode for opcode, _ in frames} == {TEXT}  # and no ping was sent
    numbers = [json.loads(data)["message"]["n"] for _, data in frames]
    assert numbers == list(range(1, len(numbers) + 1))


async def stall(server: VirtualServer, count: int = 20) -> tuple[RawClient, int]:
    """Connect a client that does not read, and post big messages to its chat."""
    chat = await server.chat(6, 7)
    raw = await server.join_raw(6, small=True)
    await server.post(chat, *[BIG] * count)
    return raw, chat


@with_server(outbox_bytes=4096)
async def test_a_stalled_reader_is_dropped_while_its_command_waits_for_the_outbox(
    server: VirtualServer,
) -> None:
    stalled, chat = await stall(server)
    await stalled.send(command_bytes("send_message", chat_id=chat, content="hi"))
    await trio.sleep(39)
    assert len(server.app.sessions) == 1
    await trio.sleep(2.5)
    assert not server.app.sessions
    assert (await server.stats())["broadcast"]["stalls"] == 1


@with_server()
async def test_a_stalled_reader_that_pings_is_dropped_too(
    server: VirtualServer,
) -> None:
    raw, _ = await stall(server)
    with taking(40, 41.1):
        while server.app.sessions:
            await raw.send(frame_bytes(PING), command_bytes("ping"))
            await trio.sleep(0.1)
    assert (await server.stats())["broadcast"]["stalls"] == 1


@with_server()
async def test_a_client_that_reads_too_little_for_the_kernel_to_accept_more_is_dropped(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    raw = await server.join_raw(6, receive_buffer=65_536)
    await server.post(chat, *[BIG] * 80)
    with taking(40, 41.1):
        while server.app.sessions:
            await raw.read(100)
            await trio.sleep(0.1)
    assert (await server.stats())["broadcast"]["stalls"] == 1


@with_server()
async def test_a_client_that_reads_a_little_within_40_s_is_not_dropped(
    server: VirtualServer,
) -> None:
    raw, _ = await stall(server)
    for _ in range(20):  # the kernel accepts more only when it is nearly empty
        await trio.sleep(19)
        await raw.read(5000)
    assert len(server.app.sessions) == 1
    await raw.listen()
    assert len(list(take_frames(raw.data))) == 20


async def read_over_tcp(raw: RawClient, most: int) -> bytes:
    """Read from TCP: the timers of the kernel run in real time, so wait for data."""
    await wait_all_tasks_blocked()
    select.select([raw.stream.socket.fileno()], [], [], WAIT_SECONDS)
    return await raw.read(most)


@pytest.mark.parametrize("sip", [500, 5000])
@pytest.mark.parametrize("receive_buffer", [4096, 16_384, 32_768, 65_536])
@with_server()
async def test_a_steady_reader_of_5_kb_a_second_is_never_dropped(
    server: VirtualServer, receive_buffer: int, sip: int
) -> None:
    """With a window of 128 KiB the kernel accepts more data only every 26 s."""
    chat = await server.chat(6, 7)
    raw = await server.join_raw(6, receive_buffer=receive_buffer)
    await server.post(chat, *[BIG] * 200)  # 800 KB: more than two minutes of reading
    for _ in range(120 * 5000 // sip):
        await read_over_tcp(raw, sip)
        await trio.sleep(sip / 5000)
    assert len(server.app.sessions) == 1
    numbers: list[int] = []
    while len(numbers) < 200:
        assert await read_over_tcp(raw, 65_536)
        texts = [data for opcode, data in take_frames(raw.data) if opcode == TEXT]
        numbers += [json.loads(text)["message"]["n"] for text in texts]
    assert numbers == list(range(1, 201))


@pytest.mark.parametrize("tail_events", [16_384, 4], ids=["the tail", "the event log"])
async def test_a_slow_reader_gets_every_event_once_in_order_and_becomes_live_again(
    tmp_path: Path, tail_events: int, autojump_clock: MockClock
) -> None:
    settings = {
        "tail_events": tail_events, "outbox_bytes": 16_384, "page_bytes": 10_000,
    }  # fmt: skip
    async with virtual_server(tmp_path, chatd.Store, settings) as server:
        chat = await server.chat(6, 7)
        slow = await server.join_raw(6, small=True)
        fast = await server.join(7)
        await server.post(chat, *[BIG] * 40)
        assert (await server.stats())["connections"]["catching_up"] == 1
        seat = server.session(6).seat
        assert len(seat.outbox.buffer) < 16_384 + 5_000  # the limit and one batch
        received: list[int] = []
        while len(received) < 41:
            if len(received) == 20:
                await server.post(chat, BIG)  # also during the catch-up
            await trio.sleep(0.1)
            await slow.read(3000)
            received += [
                json.loads(d)["message"]["n"] for _, d in take_frames(slow.data)
            ]
            assert len(seat.outbox.buffer) < 16_384 + 10_000 + 5_000
        assert received == list(range(1, 42))
        stats = await server.stats()
        assert stats["connections"]["catching_up"] == 0
        assert stats["broadcast"]["catch_ups"] >= 1
        await server.post(chat, "live")
        assert (await slow.receive("new_message"))["message"]["n"] == 42
        for n in range(1, 43):
            assert (await fast.receive("new_message"))["message"]["n"] == n
        assert stats["broadcast"]["stalls"] == 0


@with_server(outbox_bytes=8192)
async def test_an_ack_waits_for_its_event_when_the_sender_is_behind(
    server: VirtualServer,
) -> None:
    slow, chat = await stall(server)
    await slow.send(command_bytes("send_message", chat_id=chat, content="mine"))
    await slow.listen()
    frames = [json.loads(data) for _, data in take_frames(slow.data)]
    kinds = [frame["type"] for frame in frames]
    assert kinds == [*["new_message"] * 21, "message_read", "ack"]
    assert frames[-3]["message"]["content"] == "mine"
    assert frames[-1]["message_id"] == frames[-3]["seq"]


@with_server()
async def test_a_user_revoked_during_catch_up_gets_whole_frames_and_the_code(
    server: VirtualServer,
) -> None:
    slow, _ = await stall(server, 100)
    await server.command("POST", "/api/v1/internal/chat/revoke", {"user_id": 6})
    await slow.listen()
    *messages, (opcode, payload) = take_frames(slow.data)
    assert (opcode, payload[:2]) == (CLOSE, (4503).to_bytes(2, "big"))
    numbers = [json.loads(message)["message"]["n"] for _, message in messages]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) < 100


@pytest.mark.parametrize("code", [4503, 1012])
@with_server()
async def test_a_connection_that_is_ended_before_connected_gets_the_code(
    server: VirtualServer, code: int
) -> None:
    server.disk.hold(reads=True)
    raw = server.dial()
    await raw.send(upgrade_bytes(server.target(6)))
    assert (await raw.answer()).status == 101
    if code == 4503:
        await server.command("POST", "/api/v1/internal/chat/revoke", {"user_id": 6})
    else:
        server.app.listener.stopping.set()
    server.disk.go()
    await raw.ends()
    *_, (opcode, payload) = take_frames(raw.data)
    assert (opcode, payload[:2]) == (CLOSE, code.to_bytes(2, "big"))


@with_server()
async def test_typing_is_dropped_for_a_client_with_queued_output(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    busy, friend = await server.join_raw(6, small=True), await server.join(7)
    await server.post(chat, *[BIG] * 20)
    await friend.send_command("typing", chat_id=chat, is_typing=True)
    await trio.sleep(0.1)
    await busy.listen()
    kinds = {json.loads(data)["type"] for _, data in take_frames(busy.data)}
    assert kinds == {"new_message"}
    await friend.send_command("typing", chat_id=chat, is_typing=False)
    await busy.receive("typing")


@with_server(outbox_bytes=4096)
async def test_commands_are_not_read_while_the_outbox_is_over_its_limit(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    raw = await server.join_raw(6, small=True)
    friend = await server.join(7)
    await server.post(chat, *[BIG] * 20)
    for _ in range(20):
        await friend.receive("new_message")
    # The first may have been read already; the second is not.
    for n in range(2):
        await raw.send(command_bytes("send_message", chat_id=chat, content=f"{n}"))
    early = []
    with trio.move_on_after(5):
        while True:
            early.append(json.loads(await friend.ws.get_message())["type"])
    assert early in ([], ["new_message", "message_read"])
    await raw.listen()
    if not early:
        await friend.receive("new_message")
        await friend.receive("message_read")
    assert (await friend.receive("new_message"))["message"]["content"] == "1"


# The last bytes of a client before it shuts down its sending side, without a close
# frame.
BEFORE_HALF_CLOSE: dict[str, bytes] = {
    "nothing": b"",
    "a frame's first byte": b"\x81",
    "a frame without its last byte": command_bytes("ping")[:-1],
    "a message without its last frame": frame_bytes(TEXT, b"{", fin=False),
}


@pytest.mark.parametrize("last", BEFORE_HALF_CLOSE)
@with_server()
async def test_a_half_close_without_a_close_frame_gets_1012(
    server: VirtualServer, caplog: pytest.LogCaptureFixture, last: str
) -> None:
    caplog.set_level(logging.DEBUG, "chatd")
    raw = await server.join_raw(6)
    await raw.send(command_bytes("ping"), BEFORE_HALF_CLOSE[last])
    await raw.stream.send_eof()
    await raw.receive("pong")
    with taking(0):
        assert await raw.close_code() == 1012  # and no `bye` comes first
    assert (await server.stats())["connections"]["closed"] == {"1006": 1}
    assert "left user=6 code=1006" in caplog.messages


@with_server()
async def test_after_a_half_close_queued_output_comes_before_the_close_frame(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    raw = await server.join_raw(6, small=True)
    numbers = await server.post(chat, *[BIG] * 10)
    await raw.stream.send_eof()
    for number in numbers:
        assert (await raw.receive("new_message"))["message"]["id"] == number
    assert await raw.close_code() == 1012
    assert (await server.stats())["connections"]["closed"] == {"1006": 1}


@with_server()
async def test_after_a_half_close_the_acks_come_before_1012(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    raw = await server.join_raw(6)
    server.disk.hold()
    for number in range(3):
        await raw.send(command_bytes("send_message", chat_id=chat, content=str(number)))
    await raw.stream.send_eof()
    await wait_all_tasks_blocked()
    server.disk.go()
    received = [json.loads((await raw.frame())[1]) for _ in range(6)]
    by_type = {
        kind: [frame for frame in received if frame["type"] == kind]
        for kind in ("new_message", "ack")
    }
    assert [ack["message_id"] for ack in by_type["ack"]] == [
        event["message"]["id"] for event in by_type["new_message"]
    ]
    assert len(by_type["ack"]) == 3
    assert await raw.close_code() == 1012


@with_server()
async def test_after_a_half_close_the_acks_have_half_a_drain_at_most(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    raw = await server.join_raw(6)
    server.disk.hold()
    await raw.send(command_bytes("send_message", chat_id=chat, content="a"))
    await raw.stream.send_eof()
    with taking(2.5):
        assert await raw.close_code(within=5) == 1012
    server.disk.go()


@with_server()
async def test_a_reset_connection_is_counted_as_1006(server: VirtualServer) -> None:
    raw = server.dial(tcp=True)
    await raw.send(upgrade_bytes(server.target(6)))
    assert (await raw.answer()).status == 101
    await raw.receive("connected")
    reset(raw.stream)
    await wait_all_tasks_blocked()
    assert not server.app.sessions
    assert (await server.stats())["connections"]["closed"] == {"1006": 1}


# --- Session: membership -------------------------------------------------------------


@with_server()
async def test_a_removal_is_the_last_event_of_the_chat_that_the_removed_user_gets(
    server: VirtualServer,
) -> None:
    chat, other = await server.chat(6, 7), await server.chat(6, 7)
    removed, tab, stays = [await server.join(user) for user in (6, 6, 7)]
    await server.command("DELETE", f"/api/v1/chats/{chat}/members/6")
    for peer in (removed, tab, stays):
        event = await peer.receive("member_removed")
        assert (event["chat_id"], event["user_id"]) == (chat, 6)
    await server.post(chat, "after the removal", sender=7)
    assert (await stays.receive("new_message"))["message"]["n"] == 1
    await stays.send_command("typing", chat_id=chat, is_typing=True)
    for peer in (removed, tab):
        await peer.receives_nothing()
    sent = await removed.refused("send_message", chat_id=chat, content="hi")
    typed = await removed.refused("typing", chat_id=chat, is_typing=True)
    assert (sent["code"], typed["code"]) == ("not_found", "not_found")
    await server.post(other, "elsewhere", sender=7)
    assert (await removed.receive("new_message"))["chat_id"] == other


@with_server()
async def test_an_addition_reaches_the_members_and_starts_events_for_the_new_one(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6)
    await server.post(chat, "before", sender=6)
    await server.join(7, token=server.token(7, name="Bob"))
    member, new = await server.join(6), await server.join(7)
    await server.command("POST", f"/api/v1/chats/{chat}/members", {"user_id": 7})
    event = await member.receive("member_added")
    assert event == {
        "type": "member_added", "seq": event["seq"], "chat_id": chat, "user_id": 7,
        "name": "Bob",
    }  # fmt: skip
    added = await new.receive("chat_added")
    assert (added["seq"], added["chat_id"]) == (event["seq"] + 1, chat)
    assert added["chat"]["last_n"] == 1
    assert added["chat"]["last_message"]["content"] == "before"
    members = added["chat"]["members"]
    assert {member["user_id"]: member["read_n"] for member in members} == {6: 1, 7: 1}
    await server.post(chat, "after", sender=6)
    for peer in (member, new):
        assert (await peer.receive("new_message"))["message"]["content"] == "after"
        await peer.receives_nothing()


@with_server(outbox_bytes=8192, page_events=2)
async def test_a_reader_that_is_behind_gets_its_removal_and_nothing_later(
    server: VirtualServer,
) -> None:
    slow, chat = await stall(server)
    await server.command("DELETE", f"/api/v1/chats/{chat}/members/6")
    await server.post(chat, "after the removal", sender=7)
    await slow.listen()
    frames = [json.loads(data) for _, data in take_frames(slow.data)]
    *messages, last = frames
    assert last["type"] == "member_removed"
    numbers = [message["message"]["n"] for message in messages]
    assert numbers == list(range(1, len(numbers) + 1))  # no gap before the removal
    assert len(numbers) < 20


@with_server()
async def test_a_user_removed_while_away_is_shown_nothing_of_the_chat(
    server: VirtualServer,
) -> None:
    away = await server.join(6)
    await away.leave()
    chat = await server.chat(7, 8)
    (message,) = await server.post(chat, "from before", sender=7)
    await server.command("POST", f"/api/v1/chats/{chat}/members", {"user_id": 6})
    await server.command("DELETE", f"/api/v1/chats/{chat}/members/6")
    path, changed = f"/api/v1/messages/{message}", {"content": "from after it"}
    await server.command("PATCH", path, changed)
    peer = await server.join(6, cursor=away.hello["cursor"])
    added = await peer.receive("chat_added")
    await peer.receive("member_removed")
    assert (added["chat_id"], added["chat"]["members"]) == (chat, [])
    assert added["chat"]["last_message"] is None


@with_server()
async def test_membership_changes_before_connected_are_not_missed(
    server: VirtualServer,
) -> None:
    chat, other = await server.chat(6, 7), await server.chat(7)
    server.disk.hold()
    changes = [server.dial() for _ in range(3)]
    service = f"Bearer {server.token(999, scope='service')}"
    for raw, method, path, body in (
        (changes[0], "DELETE", f"/api/v1/chats/{chat}/members/6", None),
        (changes[1], "POST", f"/api/v1/chats/{other}/members", b'{"user_id":6}'),
        (changes[2], "POST", f"/api/v1/chats/{other}/messages",
         b'{"content":"hi","sender_id":7}'),
    ):  # fmt: skip
        await raw.send(request_bytes(method, path, body, Authorization=service))
    await wait_all_tasks_blocked()
    raw = server.dial()
    await raw.send(upgrade_bytes(server.target(6)))
    server.disk.go()
    assert (await raw.answer()).status == 101
    hello = await raw.receive("connected")
    await raw.listen()
    events = [json.loads(data) for _, data in take_frames(raw.data)]
    start = int(hello["cursor"].rpartition(".")[2])
    # `connected` and the events that follow it are complete together.
    hub = server.app.hub
    (unseen,) = [e.seq for e in hub.tail if e.kind == "member_added" and e.seq > 3]
    assert [event["seq"] for event in events] == [
        seq for seq in range(start + 1, hub.head + 1) if seq != unseen
    ]


# --- errors stay within their connection ---------------------------------------------


@with_server(handshakes=OFF)
async def test_random_bytes_end_only_their_own_connection(
    server: VirtualServer,
) -> None:
    innocent = await server.join(7)
    dice = random.Random(7)  # the same bytes in each run
    for _ in range(150):
        upgraded = dice.random() < 0.7
        raw = await server.join_raw(6) if upgraded else server.dial()
        noise = dice.randbytes(dice.randrange(1, 300))
        with contextlib.suppress(trio.BrokenResourceError):
            await raw.send(noise)
            if dice.random() < 0.5:
                await raw.stream.send_eof()
        await wait_all_tasks_blocked()
        raw.stream.socket.close()
    await trio.sleep(2)
    assert (await innocent.ask("ping"))["type"] == "pong"
    assert len(server.app.sessions) == 1
    gc.collect()


# --- whole process: replay -----------------------------------------------------------


async def test_5000_missed_events_are_replayed_and_5001_are_not(
    server: ServerProcess,
) -> None:
    async with server.serving():
        ann, bob, cy = (next(new_users) for _ in range(3))
        chat = await server.chat(ann, bob)
        await server.chat(cy)
        start = await server.cursor(ann)
        sender = Sender(server, bob, [(chat, "x")] * 5000)
        await sender.send_over(await server.peer(bob), Progress(), 64)
        peer = await server.peer(ann, start)
        assert peer.hello["resume"] == "replay"
        received = [
            (await peer.receive("new_message"))["message"]["n"] for _ in range(5000)
        ]
        assert received == list(range(1, 5001))
        await peer.receives_nothing()
        await server.post(chat, bob, "one more")
        far = await server.peer(ann, start)
        assert far.hello["resume"] == "resync"
        other = await server.peer(cy, start)  # the events were in another chat
        assert other.hello["resume"] in {"live", "replay"}
        await other.receives_nothing()


# --- whole process: deadlines and half closes ----------------------------------------


async def test_long_deadlines_hold_in_real_time(server: ServerProcess) -> None:
    """The long waits in parallel: a stall of 40 s, a head in 10 s, a grace of 25 s."""
    async with server.serving():
        with trio.fail_after(75):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stalled_reader_is_dropped, server)
                nursery.start_soon(slow_reader_stays, server)
                nursery.start_soon(slow_head_gets_408, server)
                nursery.start_soon(missing_head_gets_408, server)
                nursery.start_soon(slow_body_gets_408, server)
                nursery.start_soon(expired_token_is_closed, server)


async def stalled_reader_is_dropped(server: ServerProcess) -> None:
    """After 40 s without progress a client is dropped; its cursor recovers the rest."""
    ann, bob, count = next(new_users), next(new_users), 450
    chat = await server.chat(ann, bob)
    peer = await server.peer(ann, receive_buffer=16384)
    epoch = peer.hello["cursor"].partition(".")[0]
    began = trio.current_time()  # not later: chatd's 40 s begin while it sends
    texts = await send_bulk(server, chat, bob, count)

    async def dropped() -> bool:
        return bool((await server.stats())["broadcast"]["stalls"] > 0)

    await wait_until(dropped, 50)
    assert trio.current_time() - began > 40, "too soon"
    received: list[Frame] = []
    with suppress(Disconnected):
        while len(received) < count:  # the frames that were in flight
            received.append(await peer.receive("new_message"))
    assert len(received) < count
    cursor = f"{epoch}.{received[-1]['seq']}" if received else peer.hello["cursor"]
    peer = await server.peer(ann, cursor)
    assert peer.hello["resume"] == "replay"
    while len(received) < count:
        received.append(await peer.receive("new_message"))
    assert [event["message"]["content"] for event in received] == texts
    await peer.receives_nothing()


async def slow_reader_stays(server: ServerProcess) -> None:
    """A client that reads 5 KB a second and pings stays connected in a catch-up."""
    ann, bob, count = next(new_users), next(new_users), 350
    chat = await server.chat(ann, bob)
    start = await server.cursor(ann)
    texts = await send_bulk(server, chat, bob, count)
    peer = await server.peer(ann, start, receive_buffer=16384)
    assert peer.hello["resume"] == "replay"
    pings = 0
    for second in range(15):
        await peer.sip(5000)
        if second % 2:
            await peer.send_command("ping")
            pings += 1
        await trio.sleep(1)
    peer.read_faster()
    received: list[str] = []
    while len(received) < count or pings:
        frame = await peer.receive()
        if frame["type"] == "pong":
            pings -= 1
        else:
            received.append(frame["message"]["content"])
    assert received == texts
    await peer.receives_nothing()


async def slow_head_gets_408(server: ServerProcess) -> None:
    line = await server.dial()
    began = trio.current_time()
    answer = b""
    async with trio.open_nursery() as nursery:

        async def drip() -> None:
            with suppress(trio.BrokenResourceError):
                for byte in get_bytes("/healthz", "Host: x", "X-Slow: " + "y" * 99):
                    await line.send(bytes([byte]))
                    await trio.sleep(0.5)

        nursery.start_soon(drip)
        answer = await line.ends(14)
        nursery.cancel_scope.cancel()
    assert 8 < trio.current_time() - began < 13
    assert not answer or split_answer(answer)[0].status == 408, answer


async def missing_head_gets_408(server: ServerProcess) -> None:
    line = await server.dial()
    began = trio.current_time()
    answer = await line.ends(14)
    assert 8 < trio.current_time() - began < 13
    assert not answer or split_answer(answer)[0].status == 408, answer


async def slow_body_gets_408(server: ServerProcess) -> None:
    line = await server.dial()
    began = trio.current_time()
    lines = ["POST /api/v1/chats HTTP/1.1", "Host: x", "Content-Length: 1000"]
    lines += [f"Authorization: Bearer {server.token(1)}", "", "{"]
    await line.send("\r\n".join(lines).encode())
    answer = await line.ends(20)
    assert 8 < trio.current_time() - began < 19
    assert split_answer(answer)[0].status == 408, answer
    assert split_answer(answer)[0].code == "timeout"


async def expired_token_is_closed(server: ServerProcess) -> None:
    """Unless renewed, a token is announced 60 s early and closes 25 s after its end."""
    user = next(new_users)
    ends = int(time.time()) - 3  # expired, but within the leeway of 5 s
    renewed, ticketed, left = [
        await server.peer(server.token(user, exp=ends)) for _ in range(3)
    ]
    for peer in (renewed, ticketed, left):
        expiring = await peer.receive("token_expiring")
        assert expiring["expires_in"] <= 60
    ack = await renewed.ask("auth", token=server.token(user))
    assert ack["type"] == "ack"
    assert 3500 < ack["expires_in"] <= 3600
    got = await server.want(200, "GET /api/v2/ws-token", server.token(user))
    ack = await ticketed.ask("auth", token=got["token"])
    assert ack["type"] == "ack"
    assert 3500 < ack["expires_in"] <= 3600
    with trio.fail_after(30):
        assert await left.ended(30) == 4401
    assert 24 <= time.time() - ends < 29
    await trio.sleep(1.5)  # one more sweep has run
    await renewed.receives_nothing()
    await ticketed.receives_nothing()


async def test_a_half_close_gets_1012_from_a_real_process(
    either_server: ServerProcess,
) -> None:
    peer = await either_server.peer(next(new_users))
    await peer.send_command("ping")
    await peer.stream.send_eof()
    await peer.receive("pong")
    with pytest.raises(Disconnected) as gone:
        await peer.receive()
    assert gone.value.code == 1012


# --- whole process: hostile input affects only its own connection --------------------


def hostile_frames() -> dict[str, tuple[bytes, set[int]]]:
    """Frames that end a connection, each with the close codes that are allowed."""
    text, more = 1, 0
    ping = frame_bytes(9, b"p")
    part = frame_bytes(text, b"{", fin=False)
    return {
        "an unmasked frame": (frame_bytes(text, b"{}", masked=False), {1002}),
        "reserved opcode 3": (frame_bytes(3), {1002}),
        "reserved opcode 11": (frame_bytes(11), {1002}),
        "a reserved bit": (frame_bytes(text | 0x40, b"{}"), {1002}),
        "a ping in two": (frame_bytes(9, b"", fin=False), {1002}),
        "a ping of 126 bytes": (frame_bytes(9, b"x" * 126), {1002}),
        "a continuation of nothing": (frame_bytes(more, b"x"), {1002}),
        "a message inside a message": (part + frame_bytes(text, b"{}"), {1002}),
        "a close of one byte": (frame_bytes(8, b"\x03"), {1002}),
        "a close with code 1005": (frame_bytes(8, b"\x03\xed"), {1002}),
        "a close with code 999": (frame_bytes(8, b"\x03\xe7"), {1002}),
        "a close with bad UTF-8": (frame_bytes(8, b"\x03\xe8\xff"), {1007}),
        "bad UTF-8": (frame_bytes(text, b'{"type":"\xff"}'), {1007}),
        "a surrogate in UTF-8": (frame_bytes(text, b"\xed\xa0\x80"), {1007}),
        "UTF-8 cut short": (frame_bytes(text, b'"\xf0\x9f\x98'), {1007}),
        "bad UTF-8 in a part": (part + frame_bytes(more, b"\xff", fin=False), {1007}),
        "one byte too many": (frame_bytes(text, b"x" * 65537), {1009}),
        "too many bytes in parts": (
            part + frame_bytes(more, b"x" * 40000, fin=False) * 2,
            {1009},
        ),
        "too many bytes, then a ping": (frame_bytes(text, b"x" * 65537) + ping, {1009}),
        "too many bytes, twice": (frame_bytes(text, b"x" * 65537) * 2, {1009}),
        "a length of 2**40": (
            b"\x81\xff" + (2**40).to_bytes(8, "big") + bytes(70_000),
            {1009},
        ),
        "a length of 2**63": (b"\x81\xff" + (2**63).to_bytes(8, "big"), {1002, 1009}),
        "a length longer than it need be": (b"\x81\xfe\x00\x01\0\0\0\0x", {1002}),
        "65 parts": (part + frame_bytes(more, b"", fin=False) * 64, {1002, 1008, 1009}),
        "many empty parts": (
            part + frame_bytes(more, b"", fin=False) * 100_000,
            {1002, 1008, 1009},
        ),
        "two closes and a ping": (frame_bytes(8, b"\x03\xe8") * 2 + ping, {1000}),
        "a close without a code": (frame_bytes(8), {1000, 1005}),
    }


@pytest.mark.parametrize("case", list(hostile_frames()))
async def test_a_hostile_frame_gets_its_close_code_and_affects_nobody_else(
    either_server: ServerProcess, case: str
) -> None:
    async with others_are_served(either_server):
        data, codes = hostile_frames()[case]
        peer = await either_server.peer(next(new_users))
        with suppress(trio.BrokenResourceError), trio.fail_after(WAIT_SECONDS):
            await peer.stream.send_all(data)
        assert await peer.ended(5) in codes
        await RawClient(peer.stream).ends(3)  # TCP ends too


async def test_a_message_in_64_fragments_is_accepted(
    either_server: ServerProcess,
) -> None:
    peer = await either_server.peer(next(new_users))
    parts = [frame_bytes(0, b" ", fin=False)] * 62
    message = frame_bytes(1, b'{"type":', fin=False), *parts, frame_bytes(0, b'"ping"}')
    await peer.stream.send_all(b"".join(message))
    await peer.receive("pong")
    await peer.stream.send_all(frame_bytes(9, b"between"))
    await peer.receives_nothing()
    assert peer.pongs == [b"between"]


async def test_clients_that_hang_up_abruptly_affect_nobody_else(
    either_server: ServerProcess,
) -> None:
    server = either_server
    user = next(new_users)
    whole = upgrade_bytes(server.socket_path(user))
    ping = frame_bytes(1, b'{"type":"ping"}')
    abrupt = [b"", b"\x00\xff\r\n\r\n", b"GET", whole[:40], whole[:-2], whole]
    abrupt += [
        whole + ping,
        whole + ping[:5],
        whole + frame_bytes(8),
        whole + b"\xff" * 99,
    ]
    abrupt += [get_bytes("/healthz", "Host: x"), get_bytes("/x") + b"y" * 1000]
    async with others_are_served(server):
        for data in abrupt * 3:
            for with_reset in (True, False):
                raw = await server.dial()
                if data:
                    await raw.send(data)
                if with_reset:
                    reset(raw.stream)
                else:
                    await raw.stream.aclose()
        raw = await server.dial()
        await raw.send(whole + ping)  # this client does not wait for the 101
        with trio.fail_after(WAIT_SECONDS):
            while b'"pong"' not in raw.data:
                assert await raw.read()


async def test_noise_after_the_handshake_affects_nobody_else(
    either_server: ServerProcess,
) -> None:
    server, dice = either_server, random.Random(11)
    async with others_are_served(server), trio.open_nursery() as nursery:

        async def noisy(seed: int) -> None:
            peer = await server.peer(next(new_users))
            noise = random.Random(seed)
            with suppress(trio.BrokenResourceError):
                for _ in range(20):
                    first = noise.choice([0, 0x80, 0x80, 0x80, noise.randrange(256)])
                    data = noise.randbytes(noise.choice([0, 5, 125, 126, 3000]))
                    opcode = noise.randrange(16) | first & 0x70
                    frame = frame_bytes(opcode, data, fin=bool(first & 0x80))
                    await peer.stream.send_all(frame[: noise.choice([3, 9999])])
            peer.drop()

        for _ in range(40):
            nursery.start_soon(noisy, dice.randrange(2**32))


# --- whole process: limits -----------------------------------------------------------


async def test_reading_pauses_for_a_client_that_sends_too_fast(
    server: ServerProcess,
) -> None:
    async with server.serving("--receive-bytes", "20000/20000"):
        fast, calm = [await server.peer(next(new_users)) for _ in range(2)]
        began = trio.current_time()
        for _ in range(5):
            await fast.send_command("ping", padding="x" * 10000)
        await calm.receives_nothing()
        assert trio.current_time() - began < 1
        for _ in range(5):
            await fast.receive("pong")
        assert 1 < trio.current_time() - began < 5


@with_server()
async def test_a_name_that_the_disk_does_not_take_delays_a_handshake_but_refuses_none(
    server: VirtualServer,
) -> None:
    server.disk.hold()
    raw = server.dial()
    with taking(chatd.REQUEST_SECONDS / 2):
        await raw.send(upgrade_bytes(server.target(token=server.token(6, name="Ann"))))
        assert (await raw.answer(within=20)).status == 101
    server.disk.go()
    await raw.receive("connected")


@with_server(tail_events=5)
async def test_what_is_missed_while_the_tail_moves_on_is_a_replay(
    server: VirtualServer,
) -> None:
    chat, other = await server.chat(6, 7), await server.chat(8, 9)
    first = await server.join(6)
    await first.leave()
    await server.post(chat, "missed", sender=7)
    raw = server.dial()
    server.disk.hold(reads=True)
    target = server.target(6, cursor=first.hello["cursor"])
    await raw.send(upgrade_bytes(target))
    await wait_all_tasks_blocked()
    await server.post(other, *"abcde", sender=8)  # the tail forgets the one before
    server.disk.go()
    assert (await raw.answer()).status == 101
    assert (await raw.receive("connected"))["resume"] == "replay"
    assert (await raw.receive("new_message"))["message"]["content"] == "missed"
