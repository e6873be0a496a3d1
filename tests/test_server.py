"""The server: stopping, accepting, the connection limit, the bulkhead.

Most tests run a Server under virtual time (`@with_server`). The last start a process.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
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
from tests.client import (
    CLOSE,
    MISTAKE,
    TEXT,
    Frame,
    RawClient,
    ServerProcess,
    SocketClient,
    close_bytes,
    get_bytes,
    new_users,
    refuses_connections,
    request_bytes,
    run_chatd,
    send_bulk,
    take_frames,
    upgrade_bytes,
    wait_until,
)
from tests.harness import BIG, OFF, FaultyStore, VirtualServer, taking, with_server

# --- stopping ------------------------------------------------------------------------


@with_server()
async def test_a_stop_sends_bye_and_1012_to_every_socket_at_once(
    server: VirtualServer,
) -> None:
    peers = [await server.join(user) for user in (6, 6, 7, 8)]
    server.app.listener.stopping.set()
    with taking(0):
        for peer in peers:
            ((bye,), code) = await peer.end()
            assert (bye["type"], code) == ("bye", 1012)
            assert 0.5 <= bye["retry_after"] <= 1.1
        await server.finished.wait()
    server.dial(accepted=False)


@with_server()
async def test_a_stop_without_connections_ends_at_once(server: VirtualServer) -> None:
    with taking(0):
        await server.stop()


@with_server()
async def test_answers_to_commands_in_flight_come_before_bye(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer, friend = await server.join(6), await server.join(7)
    server.disk.hold()
    for content in "abc":
        await peer.send_command("send_message", chat_id=chat, content=content)
    posted = server.dial()
    await posted.send(
        request_bytes(
            "POST",
            f"/api/v1/chats/{chat}/messages",
            b'{"content":"d"}',
            Authorization=f"Bearer {server.token(7)}",
        )
    )
    await wait_all_tasks_blocked()
    server.app.listener.stopping.set()
    await trio.sleep(2)
    server.disk.go()
    received, code = await peer.end()
    kinds = [frame["type"] for frame in received]
    assert sorted(kinds[:-1]) == ["ack"] * 3 + ["message_read"] + ["new_message"] * 4
    assert (kinds[-1], code) == ("bye", 1012)
    answer = await posted.answer()
    assert (answer.status, answer.headers["connection"]) == (201, "close")
    # A client with nothing in flight does not wait for the others.
    assert [frame["type"] for frame in (await friend.end())[0]] == ["bye"]


@with_server()
async def test_a_stalled_socket_is_closed_at_the_drain_deadline_and_delays_no_other(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    stalled, peer = await server.join_raw(6, small=True), await server.join(7)
    await server.post(chat, *[BIG] * 20)
    server.app.listener.stopping.set()
    with taking(0):
        received, code = await peer.end()
        assert (received[-1]["type"], code) == ("bye", 1012)
    with taking(4.9, 5):
        await server.finished.wait()
    server.check_left()
    await stalled.ends()


@with_server()
async def test_a_slow_reader_gets_everything_and_bye_if_the_drain_is_long_enough(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    slow = await server.join_raw(6, small=True)
    await server.post(chat, *[BIG] * 20)
    server.app.listener.stopping.set()
    frames: list[tuple[int, bytes]] = []
    while not frames or frames[-1][0] != CLOSE:
        await trio.sleep(0.1)
        await slow.read(5000)
        frames += take_frames(slow.data)
    kinds = [json.loads(data)["type"] for opcode, data in frames if opcode == TEXT]
    assert kinds == ["new_message"] * 20 + ["bye"]


@with_server()
async def test_healthz_reports_stopping_on_a_connection_that_is_still_open(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    kept, parked = server.dial(), server.dial()
    assert (await kept.ask("GET", "/healthz")).json == {"status": "ok"}
    await server.join_raw(6, small=True)  # this client keeps the server draining
    await server.post(chat, *[BIG] * 20)
    server.app.listener.stopping.set()
    await trio.sleep(1)
    health = await kept.ask("GET", "/healthz")
    assert (health.status, health.json) == (503, {"status": "stopping"})
    assert health.headers["connection"] == "close"
    assert await kept.ends() == b""
    upgrade = server.target(7)
    await parked.send(upgrade_bytes(upgrade))
    refused = await parked.answer()
    assert (refused.status, refused.code) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    kept.stream.socket.close()
    parked.stream.socket.close()
    with taking(3.9, 4):
        await server.finished.wait()


@with_server()
async def test_a_stop_closes_parked_connections_within_a_second_of_the_last_socket(
    server: VirtualServer,
) -> None:
    answered, silent, half, late, behind = (server.dial() for _ in range(5))
    assert (await answered.ask("GET", "/healthz")).status == 200
    assert (await behind.ask("GET", "/healthz")).status == 200
    await half.send(b"GET /healthz HT")
    await behind.send(b"GET /healthz HT")
    peer = await server.join(6)
    server.app.listener.stopping.set()
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


@with_server(drain_seconds=1.0)
async def test_a_stop_does_not_hang_at_any_stage_of_a_connection(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    request = request_bytes(
        "POST", f"/api/v1/chats/{chat}/messages", b'{"content":"x"}',
        Authorization=f"Bearer {server.token(6)}",
    )  # fmt: skip
    upgrade = upgrade_bytes(server.target(6))
    half, whole = request[:-5], upgrade + close_bytes(1000)
    for sent in (b"", b"\0" * 50, request[:30], half, upgrade[:50], upgrade, whole):
        await server.dial().send(sent)
    server.app.listener.stopping.set()
    with taking(0, 1):
        await server.finished.wait()


@with_server()
async def test_the_first_signal_stops_the_server_and_the_second_cancels_it(
    server: VirtualServer,
) -> None:
    root = trio.CancelScope()
    await server.nursery.start(watch_signals, server.app.listener, root)
    peer = await server.join(6)
    signal.raise_signal(signal.SIGTERM)
    ((bye,), code) = await peer.end()
    assert (bye["type"], code) == ("bye", 1012)
    assert not root.cancel_called
    signal.raise_signal(signal.SIGINT)
    await wait_all_tasks_blocked()
    assert root.cancel_called


@with_server()
async def test_a_wal_that_the_writer_is_reopening_is_not_reported_missing(
    server: VirtualServer,
) -> None:
    db = server.app.settings.db
    wal, aside = db.with_name(f"{db.name}-wal"), db.with_name("aside")
    raw = server.dial()
    server.disk.hold()
    auth = f"Bearer {server.token(6)}"
    await raw.send(request_bytes("POST", "/api/v1/chats", b"{}", Authorization=auth))
    wal.rename(aside)  # as while the writer reopens the database after an I/O error
    await trio.sleep(3)
    aside.rename(wal)
    server.disk.go()
    assert (await raw.answer()).status == 201


@with_server()
async def test_accepting_waits_and_goes_on_when_descriptors_run_out(
    server: VirtualServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "chatd")
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
        server.listener.offer.send_nowait(OSError(number, "none left"))
    raw = server.dial()
    with taking(0.4, 0.5):
        assert (await raw.ask("GET", "/healthz")).status == 200
    assert len(caplog.records) == 1  # one line, not one for each error


def test_any_other_error_in_accept_ends_the_server(tmp_path: Path) -> None:
    @with_server()
    async def serve(server: VirtualServer) -> None:
        server.listener.offer.send_nowait(OSError(errno.EBADF, "Bad file descriptor"))
        await trio.sleep_forever()

    with pytest.raises(OSError, match="Bad file descriptor"):
        serve(tmp_path=tmp_path)


# --- the connection limit ------------------------------------------------------------


@with_server(max_connections=1)
async def test_at_the_connection_limit_the_longest_parked_connection_is_closed(
    server: VirtualServer,
) -> None:
    parked = [server.dial() for _ in range(129)]
    await wait_all_tasks_blocked()
    first, second = parked[:2]
    await first.ask("GET", "/healthz")  # now the second one has been parked longest
    newest = server.dial()
    assert (await newest.ask("GET", "/healthz")).status == 200
    assert await second.ends() == b""
    assert (await first.ask("GET", "/healthz")).status == 200
    assert server.app.listener.open == 129


@with_server(max_connections=1)
async def test_a_connection_closed_for_a_newer_one_in_mid_head_ends_at_once(
    server: VirtualServer,
) -> None:
    raws = [server.dial() for _ in range(200)]
    for raw in raws:
        await raw.send(b"GET /healthz HT")
    await wait_all_tasks_blocked()
    assert server.app.listener.open == 129
    for raw in raws[:71]:
        assert await raw.ends() == b""


@with_server(max_connections=1)
async def test_a_client_that_drips_its_head_keeps_its_place_in_the_line(
    server: VirtualServer,
) -> None:
    raws = [server.dial() for _ in range(129)]
    for raw in raws:
        await raw.send(b"GET /healthz HT")
    await wait_all_tasks_blocked()
    for byte in (b"T", b"P"):
        await raws[0].send(byte)
        await wait_all_tasks_blocked()
    assert (await server.dial().ask("GET", "/healthz")).status == 200
    assert await raws[0].ends() == b""


@with_server()
async def test_a_client_that_drips_its_head_gets_one_second_at_a_stop(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    await wait_all_tasks_blocked()
    server.app.listener.stopping.set()
    server.app.listener.end_parked()
    await raw.send(b"G")
    for byte in b"ET / H":
        await trio.sleep(0.3)
        await raw.send(bytes([byte]))
    assert (await raw.answer()).status == 408
    await trio.sleep(1)
    assert server.finished.is_set()


@with_server()
async def test_a_client_that_resets_before_it_is_accepted_causes_no_error(
    server: VirtualServer,
) -> None:
    for sent in (
        b"",
        request_bytes("GET", "/healthz"),
        upgrade_bytes(server.target(6)),
    ):
        raw = server.dial(tcp=True)
        await raw.send(sent)
        raw.stream.socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        raw.stream.socket.close()
    await trio.sleep(2)
    assert server.app.listener.open == 0


@with_server(max_connections=1, requests=OFF, sends=OFF)
async def test_without_a_parked_connection_a_new_one_gets_503_at_once_and_one_log_line(
    server: VirtualServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "chatd")
    auth = {"Authorization": f"Bearer {server.token(6)}", "Content_Length": "2"}
    busy = [server.dial() for _ in range(129)]
    server.disk.hold()  # the requests are whole and wait for the server
    for raw in busy:
        await raw.send(request_bytes("POST", "/api/v1/chats", None, **auth) + b"{}")
    await wait_all_tasks_blocked()
    for _ in range(20):
        for tcp in (False, True):
            raw = server.dial(tcp=tcp, accepted=True)
            await raw.send(request_bytes("GET", "/healthz"))
            with taking(0):
                answer = await raw.answer()
                assert (answer.status, answer.code) == (503, "overloaded")
                assert answer.headers["retry-after"] == "5"
                assert answer.headers["connection"] == "close"
                assert await raw.ends() == b""
    server.dial().stream.socket.close()  # a client that does not wait causes no error
    assert len(caplog.records) == 1
    server.disk.go()
    for raw in busy:
        assert (await raw.answer()).status == 201


@with_server(max_connections=1, requests=OFF)
async def test_a_connection_with_a_slow_body_is_closed_for_a_new_one(
    server: VirtualServer,
) -> None:
    auth = {"Authorization": f"Bearer {server.token(6)}", "Content_Length": "2"}
    slow = [server.dial() for _ in range(129)]
    for raw in slow:
        await raw.send(request_bytes("POST", "/api/v1/chats", None, **auth))
    await wait_all_tasks_blocked()
    newest = server.dial()
    await newest.send(request_bytes("GET", "/healthz"))
    assert (await newest.answer()).status == 200
    assert await slow[0].ends() == b""
    await slow[1].send(b"{}")
    assert (await slow[1].answer()).status == 201


@with_server(max_connections=1, requests=OFF)
async def test_refused_connections_never_use_the_descriptors_kept_for_the_database(
    server: VirtualServer,
) -> None:
    auth = {"Authorization": f"Bearer {server.token(6)}", "Content_Length": "2"}
    server.disk.hold()
    for _ in range(129):
        request = request_bytes("POST", "/api/v1/chats", None, **auth) + b"{}"
        await server.dial().send(request)
    await wait_all_tasks_blocked()
    for _ in range(300):  # these clients neither read nor disconnect
        server.dial()
    await wait_all_tasks_blocked()
    # LimitNOFILE is --max-connections + 256. The last 32 are for the database.
    assert server.app.listener.open <= 1 + 256 - 32
    await trio.sleep(3)
    assert server.app.listener.open == 129
    server.disk.go()


@with_server()
async def test_retry_after_is_in_whole_seconds_and_not_too_early(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    auth = {"Authorization": f"Bearer {server.token(6)}"}
    for _ in range(100):
        assert (await raw.ask("GET", "/api/v1/me", **auth)).status == 200
    answer = await raw.ask("GET", "/api/v1/me", **auth)
    assert (answer.status, answer.code) == (429, "rate_limited")
    assert answer.json["error"]["retry_after"] == 0.05
    assert answer.headers["retry-after"] == "1"
    assert (await server.ask("GET", "/api/v1/me", user=7)).status == 200
    service = server.token(6, scope="service")
    assert (await server.ask("GET", "/api/v1/me", token=service)).status == 200
    await trio.sleep(0.05)
    assert (await raw.ask("GET", "/api/v1/me", **auth)).status == 200


# --- the bulkhead --------------------------------------------------------------------


@with_server(store=FaultyStore, tail_events=0)
async def test_a_bug_ends_its_own_connection_only_and_is_counted_and_logged(
    server: VirtualServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "chatd")
    server.errors = {"ValueError": 2}
    chat = await server.chat(6, 7)
    other = await server.join(7)
    kept = server.dial()
    await kept.ask("GET", "/healthz")
    raw = server.dial()
    auth = f"Bearer {server.token(6, marker='s3cret')}"
    path = f"/api/v1/chats/{chat}/messages"
    await raw.send(request_bytes("GET", path, None, Authorization=auth))
    answer = await raw.answer()
    assert (answer.status, answer.code) == (500, "internal")
    assert "ours" not in answer.body.decode()
    assert await raw.ends() == b""
    # A bug in a session's task ends the whole session.
    peer = await server.join(6, cursor=f"{server.store.epoch}.0", hello=False)
    assert await peer.end() == ([], 1006)
    assert (await other.ask("ping"))["type"] == "pong"
    assert (await kept.ask("GET", "/healthz")).status == 200
    assert [s.claims.user_id for s in server.app.sessions] == [7]
    assert (await server.stats())["errors"] == {"ValueError": 2}
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    for line, where in zip(caplog.messages, ("history", "missed"), strict=True):
        # One line with the error's type and place, without its text, which may be
        # a client's.
        assert re.fullmatch(
            rf"failed error='ValueError' at='\S+:\d+ {where} < .*'", line
        )
        assert line.isprintable()
        assert "ours" not in line


@with_server(store=FaultyStore, sends=Rate(1, 1))
async def test_a_key_error_in_a_query_is_not_mistaken_for_an_unknown_event(
    server: VirtualServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "chatd")
    server.errors = {"RuntimeError": 1}
    chat = await server.chat(6, 7)
    peer = await server.join(6)
    await peer.ask("send_message", chat_id=chat, content="a")
    await peer.send_command("send_message", chat_id=chat, content="b", client_id="k")
    assert await peer.end() == ([], 1006)
    (line,) = caplog.messages
    assert line.startswith("failed error='RuntimeError from KeyError' at='")
    assert " find_sent < " in line


@with_server()
async def test_two_hundred_connections_parked_in_every_state_all_time_out(
    server: VirtualServer,
) -> None:
    request = request_bytes(
        "POST", "/api/v1/chats", b"{}", Authorization=f"Bearer {server.token(6)}"
    )
    for sent in (b"", b"GET", request[:-1], upgrade_bytes(server.target(6))):
        for _ in range(20 if sent.startswith(b"GET /ws") else 60):
            await server.dial().send(sent)
    await wait_all_tasks_blocked()
    assert server.app.listener.open == 200
    await trio.sleep(16.1)
    assert server.app.listener.open == 20
    await trio.sleep(24)  # the server sends a ping, and no client answers
    assert server.app.listener.open == 0
    server.check_left()


# --- a process: refused clients and the connection limit -----------------------------


async def test_refused_clients_leave_no_descriptor_open(server: ServerProcess) -> None:
    async with server.serving():
        await server.want(200, "GET /api/v1/me", server.token(1))
        before = server.descriptors
        for user in itertools.islice(new_users, 30):
            await server.refusal("bad")  # the client keeps its end open
            assert await server.raw(b"\xff\r\n\r\n")
            peer = await server.peer(user)
            await peer.send_frame(b"\xff")
            await peer.ended()

        def gone() -> bool:
            return server.descriptors <= before + 1

        await wait_until(gone, 5)


async def test_a_full_server_refuses_at_once_and_serves_again_when_a_place_is_free(
    server: ServerProcess,
) -> None:
    async with server.serving("--max-connections", "1"):
        user = next(new_users)
        peer = await server.peer(user)
        began = trio.current_time()
        full = await server.refusal(next(new_users))
        assert (full.status, full.code) == (503, "overloaded")
        assert int(full.headers["retry-after"]) >= 1
        assert trio.current_time() - began < 2
        await peer.receives_nothing()
        await peer.leave()

        async def admitted() -> bool:
            got = await server.knock(upgrade_bytes(server.socket_path(user)))
            return isinstance(got, SocketClient)

        await wait_until(admitted)


async def test_silent_connections_do_not_fill_the_server(server: ServerProcess) -> None:
    async with server.serving("--max-connections", "2"):
        user = next(new_users)
        half = get_bytes("/healthz", "Host: x")[:-2]
        for number in range(300):
            raw = await server.dial()
            if number % 2:
                await raw.send(half)
        peer = await server.peer(user)
        await peer.receives_nothing()
        await server.want(200, "GET /healthz")
        await peer.leave()


# --- a process: listening ------------------------------------------------------------


async def status_at(at: str | tuple[str, int]) -> int:
    """Ask for /healthz at a TCP address or a path; return the status of the answer."""
    open_stream = trio.open_unix_socket if isinstance(at, str) else trio.open_tcp_stream
    stream = await open_stream(*([at] if isinstance(at, str) else at))
    async with RawClient(stream) as raw:
        return (await raw.ask("GET", "/healthz")).status


async def test_every_listen_is_served_and_one_line_names_them_all(
    server: ServerProcess, tmp_path: Path
) -> None:
    path = tmp_path / "chatd.sock"
    more = ("--listen", "[::]:0", "--listen", f"unix:{path}")
    async with server.serving(*more):
        found = re.findall(r"(?m)^listening on (.*)$", server.output)
        (words,) = (line.split() for line in found)
        assert words[0] == server.url
        assert words[2:] == [f"unix:{path}"]
        assert f"INFO ready url='{found[0]}' " in server.output
        port = int(words[1].removeprefix("http://[::]:"))
        # [::] is for IPv4 too.
        for at in (("::1", port), ("127.0.0.1", port), ("127.0.0.1", server.port)):
            assert await status_at(at) == 200
        assert await status_at(str(path)) == 200


async def test_the_links_of_the_demo_have_an_address_that_a_browser_can_open(
    tmp_path: Path,
) -> None:
    listen = ("--listen", f"unix:{tmp_path}/chatd.sock")
    demo = ServerProcess(tmp_path / "demo", "serve", "--demo", *listen)
    async with demo.serving():
        await wait_until(lambda: "chatd proxy" in demo.said)
        assert demo.said.count(f"{demo.url}/#token=") == 2
        assert f"chatd proxy --upstream 127.0.0.1:{demo.port} " in demo.said


async def test_a_unix_socket_has_the_mode_0660_and_the_group_of_its_folder(
    server: ServerProcess, tmp_path: Path
) -> None:
    folder, umask = tmp_path / "folder", os.umask(0)
    folder.mkdir()
    group = 12345 if os.geteuid() == 0 else os.getgroups()[-1]
    os.chown(folder, -1, group)
    try:
        async with server.serving("--listen", f"unix:{folder}/chatd.sock"):
            found = (folder / "chatd.sock").stat()
            assert (oct(found.st_mode & 0o777), found.st_gid) == ("0o660", group)
    finally:
        os.umask(umask)


async def test_a_stale_unix_socket_is_replaced_and_a_live_one_is_not(
    server: ServerProcess, tmp_path: Path
) -> None:
    path, link = tmp_path / "chatd.sock", tmp_path / "link"
    link.symlink_to(path)
    for listen in (path, link):
        for signum in (signal.SIGKILL, signal.SIGTERM):
            async with server.serving("--listen", f"unix:{listen}"):
                assert await status_at(str(path)) == 200
                other = ("serve", "--db", tmp_path / "other.db")
                done = await run_chatd(*other, "--listen", f"unix:{path}")
                assert done.status == 1
                assert f"--listen unix:{path}: Address already in use" in done.err
                assert await status_at(str(path)) == 200
                await server.ended(signum)
    assert link.is_symlink()


async def test_an_address_that_cannot_be_bound_is_named_with_a_reason_and_a_remedy(
    server: ServerProcess, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    deep.mkdir(parents=True)
    (tmp_path / "short").symlink_to(deep)
    taken = "Address already in use"
    async with server.serving():
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
            datagram.bind(str(tmp_path / "datagram"))
            for listen, reason in {
                f"127.0.0.1:{server.port}": taken,
                f"localhost:{server.port}": taken,
                f"[::]:{server.port}": taken,
                "198.51.100.7:0": "Cannot assign requested address",
                "[fe80::1]:0": "Invalid argument",
                "no-such-name.invalid:0": "",  # in the resolver's words
                "[zz]:0": "",
                "a..b:0": "",  # and in those of Python
                f"unix:{tmp_path}/file": taken,
                f"unix:{tmp_path}/link": taken,
                f"unix:{tmp_path}/datagram": taken,
                f"unix:{tmp_path}": taken,
                "unix:/": taken,
                f"unix:{tmp_path}/none/chatd.sock": "No such file or directory",
                f"unix:{tmp_path}/file/chatd.sock": "Not a directory",
                f"unix:{tmp_path}/short/a": "AF_UNIX path too long",
            }.items():
                words = ("--db", tmp_path / "other.db", "--listen", listen)
                done = await run_chatd("serve", *words)
                assert done.status == 1, (listen, done)
                error = done.err.splitlines()[-1]
                assert error.startswith(f"chatd: --listen {listen}: {reason}"), error
                assert error.endswith(
                    "or a free name in a folder that chatd may write to"
                )
    assert (tmp_path / "file").read_text() == "mine"


# --- a process: stopping -------------------------------------------------------------


async def receive_bye(peer: SocketClient) -> Frame:
    """Receive the end of a stopped server: return its bye. Then it closes with 1012."""
    bye = await peer.find("bye")
    assert set(bye) == {"type", "retry_after"}
    assert 0 <= bye["retry_after"] < 60
    assert await peer.ended() == 1012
    return bye


async def stalled_client(server: ServerProcess, user: int, chat: int) -> SocketClient:
    """Connect a client that does not read, and send it more than all buffers hold."""
    peer = await server.peer(user, receive_buffer=16384)
    writer = next(new_users)
    body = {"user_id": writer}
    target = f"POST /api/v1/chats/{chat}/members"
    await server.want(201, target, server.service, body)
    await send_bulk(server, chat, writer, 450)
    return peer


async def test_a_second_signal_ends_the_process_at_once(server: ServerProcess) -> None:
    async with server.serving("--drain-seconds", "60"):
        ann, bob = next(new_users), next(new_users)
        await stalled_client(server, ann, await server.chat(ann))
        witness = await server.peer(bob)
        server.signal(signal.SIGTERM)
        await receive_bye(witness)
        began = trio.current_time()
        await server.ended(signal.SIGTERM)
        assert trio.current_time() - began < 3


async def test_connections_left_after_the_drain_are_closed(
    server: ServerProcess,
) -> None:
    async with server.serving("--drain-seconds", "1"):
        ann, bob = next(new_users), next(new_users)
        await stalled_client(server, ann, await server.chat(ann))
        witness = await server.peer(bob)
        async with await server.dial() as line:
            assert (await line.ask("GET", "/healthz")).status == 200
            began = trio.current_time()
            server.signal(signal.SIGTERM)
            await receive_bye(witness)
            with suppress(trio.BrokenResourceError):  # it may be closed already
                assert (await line.ask("GET", "/healthz")).status == 503
            await refuses_connections(server)
            assert await server.ended() == 0
        assert trio.current_time() - began < 6
        assert not MISTAKE.search(server.output)
