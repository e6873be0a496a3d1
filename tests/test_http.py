"""HTTP: requests, the WebSocket handshake, the routes, and hostile bytes."""

from __future__ import annotations

import functools
import gzip
import json
import random
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

import chatd
from chatd import Rate
from tests.client import (
    CHECKOUT,
    NO_RATES,
    PING,
    UPGRADE_LINES,
    HttpAnswer,
    RawClient,
    ServerProcess,
    SocketClient,
    close_bytes,
    frame_bytes,
    get_bytes,
    new_users,
    others_are_served,
    request_bytes,
    split_answer,
    upgrade_bytes,
)
from tests.harness import BAD_HEADS, BIG, VirtualServer, taking, with_server

# --- helpers -------------------------------------------------------------------------


async def last_answer(raw: RawClient, within: float = 1.0) -> HttpAnswer:
    """Read an answer with `Connection: close`, and the end of the connection."""
    answer = await raw.answer(within=within)
    assert answer.headers["connection"] == "close"
    assert await raw.ends() == b""
    return answer


async def handshake(
    server: VirtualServer, target: str, **changed: str
) -> tuple[RawClient, HttpAnswer]:
    """Ask for an upgrade on a new connection; return it with the answer."""
    raw = server.dial()
    await raw.send(upgrade_bytes(target, **changed))
    return raw, await raw.answer()


# --- requests and their connections --------------------------------------------------


@with_server()
async def test_a_connection_stays_open_for_the_next_request(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    for _ in range(3):
        answer = await raw.ask("GET", "/healthz")
        assert (answer.status, answer.json) == (200, {"status": "ok"})
        assert "connection" not in answer.headers
        await trio.sleep(70)


@with_server()
async def test_pipelined_requests_are_answered_in_order(server: VirtualServer) -> None:
    raw = server.dial()
    chat = await server.chat(6, 7)
    auth = {"Authorization": f"Bearer {server.token(6)}"}
    path = f"/api/v1/chats/{chat}/messages"
    await raw.send(
        request_bytes("POST", path, b'{"content":"a"}', **auth),
        request_bytes("POST", path, b'{"content":"b"}', **auth),
        request_bytes("HEAD", "/healthz"),
        request_bytes("GET", path, None, **auth),
        upgrade_bytes(server.target(6)),
    )
    for n in (1, 2):
        answer = await raw.answer()
        assert (answer.status, answer.json["message"]["n"]) == (201, n)
    assert (await raw.answer("HEAD")).status == 200
    assert len((await raw.answer()).json["messages"]) == 2
    assert (await raw.answer()).status == 101
    assert (await raw.receive("connected"))["user_id"] == 6


@with_server()
async def test_a_request_that_arrives_byte_by_byte_is_served(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    raw = server.dial()
    request = request_bytes(
        "POST", f"/api/v1/chats/{chat}/messages", b'{"content":"a"}',
        Authorization=f"Bearer {server.token(6)}",
    )  # fmt: skip
    for number in range(len(request)):
        await raw.send(request[number : number + 1])
        await wait_all_tasks_blocked()
    assert (await raw.answer()).status == 201


@with_server()
async def test_head_returns_the_headers_of_get_without_the_body(
    server: VirtualServer,
) -> None:
    for path, headers in {
        "/": {},
        "/api/v1/me": {"Authorization": f"Bearer {server.token(6)}"},
        "/api/v1/nothing": {},
    }.items():
        raw = server.dial()
        got = await raw.ask("GET", path, **headers)
        head = await raw.ask("HEAD", path, **headers)
        assert (head.status, head.body) == (got.status, b"")
        assert head.headers["content-length"] == str(len(got.body))
        assert head.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize("fault", ["65 header lines", "a target without a path"])
@with_server()
async def test_a_head_request_that_is_malformed_gets_no_body_either(
    server: VirtualServer, fault: str
) -> None:
    target, more = (b"/", 64) if fault == "65 header lines" else (b"//x", 0)
    raw = server.dial()
    lines = b"Host: x\r\n" + b"A: b\r\n" * more
    await raw.send(b"HEAD " + target + b" HTTP/1.1\r\n" + lines + b"\r\n")
    answer = await raw.answer("HEAD")
    assert answer.status == (431 if more else 400)
    assert int(answer.headers["content-length"]) > 0
    assert await raw.ends() == b""


@with_server()
async def test_options_lists_the_methods_of_a_path(server: VirtualServer) -> None:
    for path, allow in {
        "/healthz": "GET, HEAD, OPTIONS",
        "/api/v1/chats": "GET, POST, HEAD, OPTIONS",
        "/api/v1/chats/5": "GET, PATCH, HEAD, OPTIONS",
        "/api/v1/chats/5/members": "GET, POST, HEAD, OPTIONS",
        "/api/v1/chats/5/members/6": "DELETE, OPTIONS",
    }.items():
        answer = await server.ask("OPTIONS", path)
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["allow"] == allow
        assert "content-length" not in answer.headers
    assert (await server.ask("OPTIONS", "/nothing")).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "BREW"])
@with_server()
async def test_an_unsupported_method_gets_405_with_allow(
    server: VirtualServer, method: str
) -> None:
    for path in ("/healthz", "/", "/api/v1/users", "/ws/chat"):
        answer = await server.ask(method, path, user=6)
        assert (answer.status, answer.code) == (405, "method_not_allowed")
        assert answer.headers["allow"] == "GET, HEAD, OPTIONS"


@with_server()
async def test_an_unknown_path_gets_404(server: VirtualServer) -> None:
    for path in (
        "/nothing", "/web/", "/web/../chatd.py", "/web/%2e%2e/chatd.py", "/web/app.js/",
        "/healthz/", "/HEALTHZ", "/api/v1/chats/0/messages", "/api/v1/chats/x/messages",
        "/api/v1/chats/-1/messages", "/api/v1/chats/9007199254740992/messages",
        "/api/v1/chats/99999999999999999999/messages", "/api/v1/chats//messages",
        "/api/v1/chats/*/messages", "/api/v1/messages/1/edit", "/*",
    ):  # fmt: skip
        answer = await server.ask("GET", path, user=6)
        assert (answer.status, answer.code) == (404, "not_found"), path


@pytest.mark.parametrize("fault", BAD_HEADS)
@with_server()
async def test_a_bad_head_gets_one_complete_answer_and_a_close(
    server: VirtualServer, fault: str
) -> None:
    sent, status = BAD_HEADS[fault]
    raw = server.dial()
    await raw.send(sent)
    answer = await last_answer(raw)
    assert answer.status == status
    assert answer.code == ("too_large" if status == 431 else "bad_field")
    await trio.sleep(1.01)  # closed by now, even if the client keeps its end open
    assert server.app.listener.open == 0


@with_server()
async def test_a_request_with_64_header_lines_is_accepted(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    await raw.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 63 + b"\r\n")
    assert (await raw.answer()).status == 200


def post_bytes(server: VirtualServer, chat: int) -> bytes:
    """A message of user 6, as a request."""
    path, bearer = f"/api/v1/chats/{chat}/messages", f"Bearer {server.token(6)}"
    return request_bytes("POST", path, b'{"content":"hi"}', Authorization=bearer)


@pytest.mark.parametrize("end", ["idle", "evicted", "stop"])
@with_server()
async def test_a_request_that_comes_with_the_end_of_its_wait_is_not_begun(
    server: VirtualServer, end: str
) -> None:
    chat, listener = await server.chat(6, 7), server.app.listener
    raw = server.dial()
    assert (await raw.ask("GET", "/healthz")).status == 200
    await wait_all_tasks_blocked()
    # Both are there when the scheduler looks next.
    raw.stream.socket._sock.send(post_bytes(server, chat))  # type: ignore[attr-defined]
    if end == "idle":
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        clock.jump(76)
    elif end == "evicted":
        (scope,) = listener.parked
        scope.cancel()
        listener.parked.clear()
    else:
        listener.stopping.set()
        listener.end_parked()
    before = server.store.seq
    assert await raw.ends() == b""
    assert server.store.seq == before


@with_server()
async def test_a_stop_shortens_the_wait_for_a_body_but_not_the_work(
    server: VirtualServer,
) -> None:
    chat, raw = await server.chat(6, 7), server.dial()
    request = post_bytes(server, chat)
    await raw.send(request[:-5])
    await wait_all_tasks_blocked()
    server.app.listener.stopping.set()
    await trio.sleep(0.5)
    server.disk.hold()
    await raw.send(request[-5:])
    await trio.sleep(0.8)
    server.disk.go()
    assert (await raw.answer()).status == 201


@with_server()
async def test_between_requests_that_came_together_other_tasks_get_their_turn(
    server: VirtualServer,
) -> None:
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    raw = server.dial()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        await raw.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
        for _ in range(200):
            assert (await raw.answer()).status == 200
        nursery.cancel_scope.cancel()
    assert turns > 200


@with_server()
async def test_a_head_that_is_incomplete_after_10_s_gets_408(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    with taking(10):
        for byte in b"GET / HTTP":
            await raw.send(bytes((byte,)))
            await trio.sleep(0.9)
        answer = await last_answer(raw, within=2)
    assert (answer.status, answer.code) == (408, "timeout")


@with_server()
async def test_a_client_that_sends_nothing_is_closed_after_10_s_without_an_answer(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    with taking(10):
        assert await raw.ends(within=11) == b""


@with_server()
async def test_an_idle_connection_is_closed_75_s_after_its_last_request(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    await raw.ask("GET", "/healthz")
    with taking(75):
        assert await raw.ends(within=80) == b""


@with_server()
async def test_the_head_of_a_later_request_may_take_10_s_too(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    await raw.ask("GET", "/healthz")
    await trio.sleep(60)
    await raw.send(b"GET")
    with taking(10):
        assert (await raw.answer(within=11)).status == 408


@with_server()
async def test_a_whole_request_is_never_told_that_nothing_was_done(
    server: VirtualServer,
) -> None:
    """After a 408 a browser may repeat a POST by itself (RFC 9110 15.5.9)."""
    chat, auth = await server.chat(5, 6), f"Bearer {server.token(5)}"
    path, body = f"/api/v1/chats/{chat}/messages", b'{"content":"x","client_id":"a"}'
    server.disk.hold()
    raw = server.dial()
    await raw.send(request_bytes("POST", path, body, Authorization=auth))
    answer = await raw.answer(within=16)
    assert (answer.status, answer.code) == (503, "storage_failed")
    server.disk.go()
    await raw.send(request_bytes("POST", path, body, Authorization=auth))
    again = await raw.answer()
    assert (again.status, again.json["duplicate"]) == (200, True)


@with_server()
async def test_a_body_that_is_incomplete_after_15_s_gets_408(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    request = request_bytes(
        "POST", "/api/v1/chats", b"{}", Authorization=f"Bearer {server.token(6)}"
    )
    await raw.send(request[:-1])
    with taking(15):
        answer = await last_answer(raw, within=16)
    assert (answer.status, answer.code) == (408, "timeout")


@with_server()
async def test_a_client_that_disconnects_in_mid_body_causes_no_error(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    request = request_bytes(
        "POST", "/api/v1/chats", b'{"title":"x"}', Authorization="Bearer x"
    ).replace(b"Bearer x", f"Bearer {server.token(6)}".encode())
    await raw.send(request[:-5])
    await raw.stream.send_eof()
    assert await raw.ends() == b""


@with_server()
async def test_a_client_that_does_not_read_its_answer_is_disconnected_after_15_s(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    await server.post(chat, *[BIG] * 50)
    raw = server.dial(small=True)
    path = f"/api/v1/chats/{chat}/messages?limit=50"
    auth = f"Bearer {server.token(6)}"
    await raw.send(request_bytes("GET", path, None, Authorization=auth))
    await trio.sleep(14.9)
    assert server.app.listener.open == 1
    await trio.sleep(0.2)
    assert server.app.listener.open == 0


@with_server()
async def test_100_continue_is_sent_to_a_client_that_expects_it(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    raw = server.dial()
    request = request_bytes(
        "POST", f"/api/v1/chats/{chat}/messages", b'{"content":"a"}',
        Authorization=f"Bearer {server.token(6)}", Expect="100-continue",
    )  # fmt: skip
    head, _, body = request.partition(b"\r\n\r\n")
    await raw.send(head, b"\r\n\r\n")
    await raw.listen(0.1)
    assert raw.data.startswith(b"HTTP/1.1 100 ")
    await raw.send(body)
    assert (await raw.answer()).status == 201
    assert raw.informed == [100]
    assert (await raw.ask("GET", "/healthz")).status == 200  # the connection stays open


@with_server()
async def test_a_refused_request_gets_no_100_continue(server: VirtualServer) -> None:
    raw = server.dial()
    request = request_bytes("POST", "/api/v1/chats", b"{}", Expect="100-continue")
    await raw.send(request[:-2])
    answer = await raw.answer()
    assert (answer.status, raw.informed) == (401, [])
    assert answer.headers["connection"] == "close"


@with_server(max_message_bytes=1000)
async def test_a_body_over_the_limit_gets_413_with_a_length_and_in_chunks(
    server: VirtualServer,
) -> None:
    auth = {"Authorization": f"Bearer {server.token(6)}"}
    body = json.dumps({"title": "x", "pad": "x" * 2000}).encode()
    chunk = b"%x\r\n%b\r\n" % (len(body), body)
    by_length = request_bytes("POST", "/api/v1/chats", body, **auth)
    by_chunks = request_bytes(
        "POST", "/api/v1/chats", None, Transfer_Encoding="chunked", **auth
    )
    for request in (by_length, by_chunks + chunk, by_chunks + chunk[:1500]):
        raw = server.dial()
        await raw.send(request)
        answer = await last_answer(raw)
        assert (answer.status, answer.code) == (413, "too_large")


@with_server(max_message_bytes=1000)
async def test_a_content_length_over_the_limit_gets_413_before_the_body(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    auth = {"Authorization": f"Bearer {server.token(6)}", "Expect": "100-continue"}
    await raw.send(
        request_bytes("POST", "/api/v1/chats", None, Content_Length="1001", **auth)
    )
    answer = await raw.answer()
    assert (answer.status, raw.informed) == (413, [])


@with_server(max_message_bytes=1000)
async def test_a_body_of_exactly_the_limit_is_accepted_with_a_length_and_in_chunks(
    server: VirtualServer,
) -> None:
    auth = {"Authorization": f"Bearer {server.token(6)}"}
    body = b'{"title":"x"}'.ljust(1000)
    raw = server.dial()
    await raw.send(request_bytes("POST", "/api/v1/chats", body, **auth))
    assert (await raw.answer()).status == 201
    pieces = b"".join(b"64\r\n%b\r\n" % body[n : n + 100] for n in range(0, 1000, 100))
    await raw.send(
        request_bytes(
            "POST", "/api/v1/chats", None, Transfer_Encoding="chunked", **auth
        ),
        pieces + b"0\r\n\r\n",
    )
    assert (await raw.answer()).status == 201
    assert (await raw.ask("GET", "/healthz")).status == 200


@with_server()
async def test_a_body_in_1024_chunks_is_accepted_and_in_1025_gets_413(
    server: VirtualServer,
) -> None:
    body = b'{"title":"x"}'.ljust(1025)
    auth = {"Authorization": f"Bearer {server.token(6)}"}
    for size, status in ((1024, 201), (1025, 413)):
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body[:size])
        raw = server.dial()
        await raw.send(
            request_bytes(
                "POST", "/api/v1/chats", None, Transfer_Encoding="chunked", **auth
            ),
            chunks + b"0\r\n\r\n",
        )
        assert (await raw.answer()).status == status


@with_server()
async def test_a_bad_chunk_gets_400_and_a_close(server: VirtualServer) -> None:
    raw = server.dial()
    auth = f"Bearer {server.token(6)}"
    await raw.send(
        request_bytes(
            "POST", "/api/v1/chats", None, Transfer_Encoding="chunked",
            Authorization=auth,
        ),
        b"zz\r\n",
    )  # fmt: skip
    assert (await last_answer(raw)).status == 400


@with_server()
async def test_a_body_where_none_is_expected_is_read_or_the_connection_closes(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    await raw.send(request_bytes("GET", "/healthz", b"x" * 1000))
    answer = await raw.answer()
    assert answer.status == 200
    # The body was read and the connection stays open, or the connection closes.
    if answer.headers.get("connection") == "close":
        assert await raw.ends() == b""
    else:
        assert (await raw.ask("GET", "/healthz")).status == 200


@with_server()
async def test_connection_close_and_http_1_0_close_after_one_answer(
    server: VirtualServer,
) -> None:
    for request in (
        request_bytes("GET", "/healthz", None, Connection="close"),
        b"GET /healthz HTTP/1.0\r\n\r\n",
    ):
        raw = server.dial()
        await raw.send(request)
        assert (await raw.answer()).status == 200
        assert await raw.ends() == b""


@with_server()
async def test_every_answer_has_the_security_headers(server: VirtualServer) -> None:
    for method, path in (
        ("GET", "/"), ("GET", "/healthz"), ("GET", "/nothing"), ("GET", "/api/v1/me"),
        ("OPTIONS", "/healthz"), ("GET", "/ws/chat"), ("POST", "/healthz"),
    ):  # fmt: skip
        headers = (await server.ask(method, path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["date"].endswith("GMT")
        assert headers["cache-control"] in {"no-store", "no-cache"}
        assert "server" not in headers
        assert "set-cookie" not in headers


PAGE_TYPES = {
    ".css": "text/css; charset=utf-8", ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8", ".png": "image/png",
    ".svg": "image/svg+xml", ".webmanifest": "application/manifest+json",
}  # fmt: skip
PAGE_FILES = {f"/web/{file.name}": file for file in (CHECKOUT / "web").iterdir()}


@with_server()
async def test_the_files_of_the_page_are_all_served_with_their_types(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    for path, file in {"/": CHECKOUT / "web/index.html", **PAGE_FILES}.items():
        answer = await raw.ask("GET", path)
        if file.name.endswith(".d.ts"):  # for those who write programs
            assert answer.status == 404
            continue
        assert (answer.status, answer.body) == (200, file.read_bytes()), path
        assert answer.headers["content-type"] == PAGE_TYPES[file.suffix]


@with_server()
async def test_the_page_files_have_a_content_security_policy_and_an_etag(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    for path in ("/", "/web/index.html", "/web/style.css", "/web/app.js"):
        answer = await raw.ask("GET", path)
        assert answer.headers["cache-control"] == "no-cache"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        etag = answer.headers["etag"]
        for known in (etag, f'"older", {etag}'):
            again = await raw.ask("GET", path, If_None_Match=known)
            assert (again.status, again.body) == (304, b"")
            for name in ("etag", "vary", "cache-control"):  # RFC 9110 15.4.5
                assert again.headers[name] == answer.headers[name]
            assert "content-encoding" not in again.headers
        other = await raw.ask("GET", path, If_None_Match='W/"older"')
        assert other.body == answer.body


@pytest.mark.parametrize(
    ("accepted", "packed"),
    [
        ("gzip, deflate, br, zstd", True),  # what browsers send
        ("deflate,GZIP", True),
        ("gzip;q=0", False),
        ("br, gzip; q=0, *", False),
        ("*;q=0, identity;q=0, gzip", True),
        ("identity", False),
        ("*", False),
        ("x-gzipped, br", False),
        ("", False),
    ],
)
@with_server(origin=("https://shop.example",))
async def test_the_page_is_compressed_for_a_client_that_accepts_gzip(
    server: VirtualServer, accepted: str, packed: bool
) -> None:
    raw = server.dial()
    for path in ("/", "/web/app.js", "/web/style.css"):
        plain = await raw.ask("GET", path)
        answer = await raw.ask("GET", path, Accept_Encoding=accepted)
        head = await raw.ask("HEAD", path, Accept_Encoding=accepted)
        assert head.headers | {"date": ""} == answer.headers | {"date": ""}
        assert answer.headers["vary"] == plain.headers["vary"]
        assert answer.headers["vary"] == "Accept-Encoding, Origin"
        if packed:
            assert answer.headers["content-encoding"] == "gzip"
            assert gzip.decompress(answer.body) == plain.body
            assert len(answer.body) < len(plain.body) / 2
        else:
            assert "content-encoding" not in answer.headers
            assert answer.body == plain.body
        # Both are the same file: a weak ETag says so (RFC 9110 8.8.1).
        etag = answer.headers["etag"]
        assert etag.startswith('W/"')
        for encoding in ("gzip", "identity"):
            headers = {"Accept_Encoding": encoding, "If_None_Match": etag}
            assert (await raw.ask("GET", path, **headers)).status == 304


@with_server()
async def test_what_is_compressed_already_is_sent_as_it_is(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    api = await raw.ask("GET", "/healthz", Accept_Encoding="gzip")
    assert api.json == {"status": "ok"}
    for path, file in PAGE_FILES.items():
        if file.suffix == ".png":
            answer = await raw.ask("GET", path, Accept_Encoding="gzip")
            assert "content-encoding" not in answer.headers
            assert answer.body == file.read_bytes()


async def test_the_compressed_page_passes_a_proxy(either_server: ServerProcess) -> None:
    plain = await either_server.ask("GET", "/web/app.js")
    answer = await either_server.ask("GET", "/web/app.js", Accept_Encoding="gzip")
    assert answer.headers["content-encoding"] == "gzip"
    assert gzip.decompress(answer.body) == plain.body
    known = {"If_None_Match": answer.headers["etag"], "Accept_Encoding": "gzip"}
    assert (await either_server.ask("GET", "/web/app.js", **known)).status == 304


# --- the WebSocket handshake ---------------------------------------------------------


@with_server()
async def test_a_get_of_the_socket_path_without_upgrade_gets_426(
    server: VirtualServer,
) -> None:
    for changed in (
        {"Upgrade": ""}, {"Connection": ""}, {"Upgrade": "h2c"},
        {"Connection": "keep-alive"},
    ):  # fmt: skip
        _, answer = await handshake(server, server.target(6), **changed)
        assert (answer.status, answer.code) == (426, "upgrade_required")
        assert answer.headers["upgrade"] == "websocket"
        assert "upgrade" in answer.headers["connection"].lower()


@with_server()
async def test_head_of_the_socket_path_gets_426_too(server: VirtualServer) -> None:
    answer = await server.ask("HEAD", "/ws/chat", user=6)
    assert (answer.status, answer.body) == (426, b"")


@with_server()
async def test_an_upgrade_with_a_body_is_refused(server: VirtualServer) -> None:
    for headers in ({"Content_Length": "5"}, {"Transfer_Encoding": "chunked"}):
        raw = server.dial()
        await raw.send(upgrade_bytes(server.target(6), **headers), b"5\r\nhello")
        answer = await raw.answer()
        assert (answer.status, answer.headers["connection"]) == (400, "close")


@with_server()
async def test_a_websocket_version_other_than_13_gets_426_with_the_right_one(
    server: VirtualServer,
) -> None:
    for version in ("8", "14", "13, 8", ""):
        _, answer = await handshake(
            server, server.target(6), Sec_WebSocket_Version=version
        )
        assert (answer.status, answer.code) == (426, "upgrade_required")
        assert answer.headers["sec-websocket-version"] == "13"


@with_server()
async def test_a_websocket_key_that_is_not_16_bytes_gets_400(
    server: VirtualServer,
) -> None:
    for key in ("", "x", "dGhlIHNhbXBsZSBub25j", "dGhlIHNhbXBsZSBub25jZR==",
                "dGhlIHNhbXBsZSBub25jZQ==" * 2, "!" * 24):  # fmt: skip
        _, answer = await handshake(server, server.target(6), Sec_WebSocket_Key=key)
        assert (answer.status, answer.code) == (400, "bad_field")
        assert "Sec-WebSocket-Key" in answer.json["error"]["message"]


@with_server()
async def test_an_upgrade_over_http_1_0_is_refused(server: VirtualServer) -> None:
    raw = server.dial()
    await raw.send(upgrade_bytes(server.target(6)).replace(b"HTTP/1.1", b"HTTP/1.0"))
    answer = await raw.answer()
    assert answer.status in {400, 426}
    assert await raw.ends() == b""


@with_server()
async def test_the_handshake_is_answered_as_in_rfc_6455_section_1_3(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    await raw.send(
        upgrade_bytes(
            server.target(6), Connection="keep-alive, Upgrade", Upgrade="WebSocket",
            Sec_WebSocket_Protocol="chat",
            Sec_WebSocket_Extensions="permessage-deflate",
        )
    )  # fmt: skip
    answer = await raw.answer()
    assert answer.status == 101
    assert answer.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert "sec-websocket-extensions" not in answer.headers  # no zip bombs
    assert "sec-websocket-protocol" not in answer.headers
    await raw.receive("connected")


@with_server()
async def test_an_upgrade_may_follow_other_requests_on_a_connection(
    server: VirtualServer,
) -> None:
    raw = server.dial()
    assert (await raw.ask("GET", "/healthz")).status == 200
    await raw.send(upgrade_bytes(server.target(6)))
    assert (await raw.answer()).status == 101
    await raw.receive("connected")


@with_server(max_connections=1, handshakes=Rate(1, 4))
async def test_an_upgrade_is_checked_for_rate_then_origin_then_token_then_capacity(
    server: VirtualServer,
) -> None:
    async def refused(target: str, **changed: str) -> HttpAnswer:
        raw = server.dial()
        await raw.send(upgrade_bytes(target, **changed, **client), frame_bytes(PING))
        answer = await raw.answer()
        assert answer.headers["connection"] == "close"
        await trio.sleep(1.01)  # closed, although the client keeps its end open
        assert server.app.listener.open == before
        return answer

    client = {"X_Forwarded_For": "192.0.2.1"}
    first = await server.join_raw(1)
    await trio.sleep(5)
    good, foreign = server.target(6), {"Origin": "https://evil.example"}
    before = server.app.listener.open

    answers = [
        await refused("/ws/chat?token=bad", **foreign),
        await refused("/ws/chat?token=bad"),
        await refused(good),
    ]
    assert [(a.status, a.code) for a in answers] == [
        (403, "forbidden"), (401, "token_invalid"), (503, "overloaded"),
    ]  # fmt: skip
    assert int(answers[2].headers["retry-after"]) >= 1
    for _ in range(4):  # once the bucket is empty, the rate comes first
        await handshake(server, "/ws/chat?token=bad", **foreign, **client)
    last = await refused("/ws/chat?token=bad", **foreign)
    assert (last.status, last.code) == (429, "rate_limited")
    assert last.headers["retry-after"] == "1"
    refusals = (await server.stats())["connections"]["refused"]
    assert refusals["overloaded"] == 1
    assert (await first.frame(30)) == (PING, b"")


@with_server(max_connections=2)
async def test_max_connections_holds_however_many_clients_connect_at_once(
    server: VirtualServer,
) -> None:
    raws = [server.dial() for _ in range(6)]
    for user, raw in enumerate(raws, 1):
        await raw.send(upgrade_bytes(server.target(user)))
    answers = sorted([(await raw.answer()).status for raw in raws])
    assert answers == [101, 101, 503, 503, 503, 503]


@with_server(max_connections=1)
async def test_a_ticket_is_not_spent_on_a_full_server(server: VirtualServer) -> None:
    ticket = (await server.ask("GET", "/api/v2/ws-token", user=6)).json["token"]
    full = await server.join(7)
    target = server.target(token=ticket)
    _, answer = await handshake(server, target)
    assert answer.status == 503
    await full.leave()
    await wait_all_tasks_blocked()
    raw, answer = await handshake(server, target)
    assert answer.status == 101
    await raw.receive("connected")
    await raw.send(close_bytes(1000))
    await raw.close_code()
    _, answer = await handshake(server, target)
    assert (answer.status, answer.code) == (401, "token_used")
    await server.join(7)  # full again: the token comes first
    _, answer = await handshake(server, target)
    assert (answer.status, answer.code) == (401, "token_used")


@with_server()
async def test_one_ticket_opens_one_socket_however_many_clients_race(
    server: VirtualServer,
) -> None:
    ticket = (await server.ask("GET", "/api/v2/ws-token", user=6)).json["token"]
    raws = [server.dial() for _ in range(5)]
    for raw in raws:
        await raw.send(upgrade_bytes(server.target(token=ticket)))
    answers = sorted([(await raw.answer()).status for raw in raws])
    assert answers == [101, 401, 401, 401, 401]


@with_server()
async def test_an_upgrade_takes_the_token_of_the_query_or_else_of_authorization(
    server: VirtualServer,
) -> None:
    token, other = server.token(6), server.token(7)
    for target, authorization, user in (
        ("/ws/chat", f"Bearer {token}", 6),
        ("/ws/chat?token=", f"bearer  {token}", 6),
        ("/ws/chat?cursor=x", f"Bearer {token}", 6),
        # The query counts: a reverse proxy may have an Authorization of its own.
        (f"/ws/chat?token={token}", f"Bearer {other}", 6),
        (f"/ws/chat?token={token}", "Basic dXNlcjpwYXNz", 6),
        ("/ws/chat", "Basic dXNlcjpwYXNz", 0),
        ("/ws/chat", "Bearer nonsense", 0),
        ("/ws/chat?token=nonsense", f"Bearer {token}", 0),
    ):
        raw, answer = await handshake(server, target, Authorization=authorization)
        assert answer.status == (101 if user else 401)
        if user:
            assert json.loads((await raw.frame())[1])["user_id"] == user
    ticket = (await server.ask("GET", "/api/v2/ws-token", token=token)).json["token"]
    for status in (101, 401):  # a ticket opens one socket, however it is sent
        bearer = f"Bearer {ticket}"
        _, answer = await handshake(server, "/ws/chat", Authorization=bearer)
        assert answer.status == status


@with_server()
async def test_an_upgrade_needs_exactly_one_token_in_the_query(
    server: VirtualServer,
) -> None:
    token = server.token(6)
    for target, status, code in (
        ("/ws/chat", 401, "token_invalid"),
        ("/ws/chat?token=", 401, "token_invalid"),
        (f"/ws/chat?token={token}&token={token}", 400, "bad_field"),
        (f"/ws/chat?token={token}&cursor=a&cursor=b", 400, "bad_field"),
        (server.target(token=server.token(6, -60)), 401, "token_expired"),
        (server.target(token=server.token(6, use="signin")), 401, "token_invalid"),
    ):
        _, answer = await handshake(server, target)
        assert (answer.status, answer.code) == (status, code)
        assert token not in answer.body.decode()


@with_server(handshakes=Rate(1, 3))
async def test_handshakes_and_401s_count_for_the_address_that_a_trusted_proxy_names(
    server: VirtualServer,
) -> None:
    async def status(address: str, upgrade: bool) -> int:
        raw = server.dial(tcp=True)
        if upgrade:
            await raw.send(upgrade_bytes("/ws/chat", X_Forwarded_For=address))
        else:
            await raw.send(
                request_bytes("GET", "/api/v1/me", None, X_Forwarded_For=address)
            )
        answer = await raw.answer()
        raw.stream.socket.close()
        return answer.status

    for upgrade in (True, False, True):
        assert await status("203.0.113.1", upgrade) == 401
    for upgrade in (True, False):
        assert await status("203.0.113.1", upgrade) == 429
        # An entry further left was written by the client and is not believed.
        assert await status("198.51.100.7, 203.0.113.1", upgrade) == 429
    assert await status("203.0.113.2", True) == 401
    for host in ("1", "2", "3"):
        assert await status(f"2001:db8::{host}", True) == 401
    assert await status("2001:db8::4", True) == 429  # the same /64
    assert await status("2001:db8:0:1::4", True) == 401
    await trio.sleep(1)
    assert await status("203.0.113.1", False) == 401


@with_server(handshakes=Rate(1, 3))
async def test_on_a_unix_socket_the_address_in_x_forwarded_for_counts_or_none_at_all(
    server: VirtualServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def statuses(**named: str) -> list[int]:
        raws = [server.dial() for _ in range(5)]  # socket pairs are Unix sockets
        for number, raw in enumerate(raws):
            if number % 2:
                await raw.send(upgrade_bytes("/ws/chat", **named))
            else:
                await raw.send(request_bytes("GET", "/api/v1/me", None, **named))
        return [(await raw.answer()).status for raw in raws]

    assert await statuses(X_Forwarded_For="1.2.3.4") == [401, 401, 401, 429, 429]
    assert caplog.messages == []
    for forwarded in ("", "unix:", "unknown", "::"):
        assert await statuses(X_Forwarded_For=forwarded) == [401] * 5
    assert await statuses() == [401] * 5
    lines = [line for line in caplog.messages if not line.startswith("unread_")]
    (line,) = lines  # once, and not for each client
    assert line.startswith("no_client_address hint='")


@with_server(handshakes=Rate(1, 3))
async def test_a_request_with_a_valid_token_does_not_count_for_its_address(
    server: VirtualServer,
) -> None:
    for _ in range(10):
        assert (await server.ask("GET", "/api/v1/me", user=6)).status == 200
    await server.join(6)


@with_server(origin=("https://shop.example",))
async def test_origin_is_checked_on_every_request(server: VirtualServer) -> None:
    for origin, status in {
        "": 200,
        "http://chat.example": 200,
        "https://chat.example:443": 200,
        "https://shop.example": 200,
        "HTTPS://SHOP.EXAMPLE": 200,
        "https://shop.example:443": 200,
        "https://shop.example:80": 403,
        "http://shop.example": 403,
        "https://shop.example.evil.example": 403,
        "https://evil.example": 403,
        "http://chat.example:8080": 403,
        "null": 403,
        "chat.example": 403,
        "http://": 403,
        "https://:443": 403,
    }.items():
        headers = {"Origin": origin} if origin else {}
        for method in ("GET", "OPTIONS"):
            answer = await server.dial().ask(method, "/healthz", **headers)
            assert answer.status == (204 if (method, status) == ("OPTIONS", 200)
                                     else status), origin  # fmt: skip
        raw, answer = await handshake(server, server.target(6), **headers)
        assert answer.status == (101 if status == 200 else 403)
        raw.stream.socket.close()


@with_server(origin=("null", "capacitor://localhost"))
async def test_the_origin_of_an_app_may_be_allowed(server: VirtualServer) -> None:
    for origin, status in {
        "null": 200,
        "capacitor://localhost": 200,
        "tauri://localhost": 403,
        "http://localhost": 403,
    }.items():
        answer = await server.ask("GET", "/healthz", Origin=origin)
        allowed = answer.headers.get("access-control-allow-origin")
        assert answer.status == status
        assert allowed == (origin if status == 200 else None)


@with_server()
async def test_refused_origins_are_logged_once_in_10_s(
    server: VirtualServer, caplog: pytest.LogCaptureFixture
) -> None:
    for second in range(21):
        await server.ask("GET", "/healthz", Origin=f"https://{second}.example")
        await server.ask("GET", "/healthz", Origin="http://chat.example")
        server.app.listener.warn("full", "test")  # these do not hide the others
        await trio.sleep(1)
    lines = [line for line in caplog.messages if line.startswith("refused_origin")]
    assert lines == [
        f"refused_origin why='https://{second}.example' open=1"
        for second in (0, 10, 20)
    ]
    await trio.sleep(10)
    await server.ask("GET", "/healthz", Origin=f"http://{server.token(6)}")
    assert caplog.messages[-1] == "refused_origin why='?' open=1"


@with_server()
async def test_a_forwarded_address_that_cannot_be_read_is_logged_once_in_10_s(
    server: VirtualServer, caplog: pytest.LogCaptureFixture
) -> None:
    for forwarded in ("203.0.113.1:80", "unknown", "6.6.6.6, _x", "127.0.0.1", "-"):
        trusted = server.dial(tcp=True)
        await trusted.ask("GET", "/healthz", X_Forwarded_For=forwarded)
    await server.ask("GET", "/healthz", X_Forwarded_For="_from_a_client")
    lines = [line for line in caplog.messages if line.startswith("unread_address")]
    assert [line.split(" open")[0] for line in lines] == [
        "unread_address why='unknown'"
    ]


@with_server()
@pytest.mark.parametrize(
    ("target", "host", "origin", "status"),
    [
        ("http://chat.example/healthz", "chat.example", "http://chat.example", 200),
        ("HTTP://chat.example:80/healthz?x", "x", "http://chat.example", 200),
        ("https://chat.example:8443/healthz", "x", "https://chat.example:8443", 200),
        # The host of the target replaces that of the header (RFC 9112 3.2.2).
        ("http://chat.example/healthz", "evil.example", "http://evil.example", 403),
        ("http://evil.example/healthz", "chat.example", "http://chat.example", 403),
        ("http://[::1]:8086/healthz", "x", "http://[::1]:8086", 200),
        ("http://chat.example", "x", "http://chat.example", 200),  # the page
        ("http://chat.example?x=1", "x", "http://chat.example", 200),
        ("http://chat.example/nothing", "x", "", 404),
        ("http://chat.example//healthz", "x", "", 400),
        ("http://me@chat.example/healthz", "x", "", 400),
        ("http://chat.example#/healthz", "x", "", 400),
        ("http:///healthz", "x", "", 400),
        ("http:/healthz", "x", "", 400),
        ("ftp://chat.example/healthz", "x", "", 400),
        ("ws://chat.example/healthz", "x", "", 400),
        ("chat.example:80", "x", "", 400),
        ("*", "x", "", 400),
    ],
)
async def test_a_target_may_be_a_whole_url(
    server: VirtualServer, target: str, host: str, origin: str, status: int
) -> None:
    headers = {"Host": host} | ({"Origin": origin} if origin else {})
    answer = await server.dial().ask("GET", target, **headers)
    assert answer.status == status


@with_server()
async def test_a_socket_may_be_asked_for_by_a_whole_url(server: VirtualServer) -> None:
    target = f"http://chat.example{server.target(6)}"
    for origin, status in {"http://chat.example": 101, "http://x.example": 403}.items():
        _, answer = await handshake(server, target, Origin=origin)
        assert answer.status == status


@pytest.mark.parametrize(
    ("trusted", "status"), [("127.0.0.0/8", 200), ("10.0.0.0/8", 403), ("none", 403)]
)
def test_the_forwarded_host_is_believed_only_from_a_trusted_proxy(
    trusted: str, status: int, tmp_path: Path
) -> None:
    @with_server(trusted_proxy=(trusted,))
    async def claim(server: VirtualServer) -> None:
        headers = {"Origin": "https://site.example", "X_Forwarded_Host": "site.example"}
        raw = server.dial(tcp=True)  # from loopback
        assert (await raw.ask("GET", "/healthz", **headers)).status == status
        # The mode of a Unix socket says who is trusted, not --trusted-proxy.
        assert (await server.dial().ask("GET", "/healthz", **headers)).status == 200

    claim(tmp_path=tmp_path)


@with_server()
@pytest.mark.parametrize("between", [", ", "\r\nX-Forwarded-Host: "])
async def test_a_forwarded_host_may_have_several_values_in_one_or_several_lines(
    server: VirtualServer, between: str
) -> None:
    hosts = between.join(("site.example", "inner.lan"))
    for origin, status in {"site.example": 200, "evil.example": 403}.items():
        trusted = server.dial(tcp=True)
        headers = {"Origin": f"https://{origin}", "X_Forwarded_Host": hosts}
        assert (await trusted.ask("GET", "/healthz", **headers)).status == status


@with_server(origin=("https://shop.example",))
async def test_a_listed_origin_gets_cors_headers_but_never_credentials(
    server: VirtualServer,
) -> None:
    preflight = await server.ask(
        "OPTIONS", "/api/v1/chats", Origin="https://shop.example",
        Access_Control_Request_Method="POST",
    )  # fmt: skip
    assert preflight.status == 204
    allow = preflight.headers
    assert "POST" in allow["access-control-allow-methods"]
    assert set(allow["access-control-allow-headers"].split(", ")) == {
        "authorization", "content-type", "idempotency-key",
    }  # fmt: skip
    for path in ("/api/v1/me", "/nothing"):  # errors too: the page must read them
        answer = await server.ask("GET", path, Origin="https://shop.example")
        for headers in (answer.headers, preflight.headers):
            assert headers["access-control-allow-origin"] == "https://shop.example"
            assert headers["vary"] == "Origin"
            assert "access-control-allow-credentials" not in headers
    own = await server.ask("GET", "/healthz", Origin="http://chat.example")
    assert "access-control-allow-origin" not in own.headers
    assert own.headers["vary"] == "Origin"


# --- the routes ----------------------------------------------------------------------


@with_server()
async def test_a_request_without_a_valid_token_gets_401_and_www_authenticate(
    server: VirtualServer,
) -> None:
    ticket = (await server.ask("GET", "/api/v2/ws-token", user=6)).json["token"]
    for authorization, code in {
        "": "token_invalid",
        "Basic dXNlcjpwYXNz": "token_invalid",
        "Bearer": "token_invalid",
        "Bearer ": "token_invalid",
        "Bearer nonsense": "token_invalid",
        f"Bearer {ticket}": "token_invalid",
        f"Bearer {server.token(6, use='signin')}": "token_invalid",
        f"Bearer {server.token(6, -60)}": "token_expired",
        f"Bearer {server.token(6)} x": "token_invalid",
    }.items():
        headers = {"Authorization": authorization} if authorization else {}
        answer = await server.dial().ask("GET", "/api/v1/me", None, **headers)
        assert (answer.status, answer.code) == (401, code), authorization
        assert answer.headers["www-authenticate"] == "Bearer"
    good = f"bearer  {server.token(6)}"
    assert (await server.ask("GET", "/api/v1/me", Authorization=good)).status == 200


@with_server()
async def test_a_token_in_the_query_is_accepted_only_by_the_socket_path(
    server: VirtualServer,
) -> None:
    answer = await server.ask("GET", f"/api/v1/me?token={server.token(6)}")
    assert answer.status == 401


@with_server()
async def test_me_has_the_name_from_the_last_token_with_a_name(
    server: VirtualServer,
) -> None:
    me = (await server.ask("GET", "/api/v1/me", user=6)).json
    assert (me["user_id"], me["name"]) == (6, None)
    for name in ("Ann", "Anna"):
        named = server.token(6, name=name)
        expected = me | {"name": name}
        assert (await server.ask("GET", "/api/v1/me", token=named)).json == expected
        # The name was stored, so the next token may leave it out.
        assert (await server.ask("GET", "/api/v1/me", user=6)).json == expected


@with_server()
async def test_the_name_of_the_newest_token_wins_whatever_the_order(
    server: VirtualServer,
) -> None:
    now = int(time.time())
    for age, name, shown in (
        (500, "Ann", "Ann"),
        (100, "Anna", "Anna"),
        (500, "Ann", "Anna"),  # the old token once more
        (None, "No iat", "Anna"),
        (50, "Anna", "Anna"),
        (80, "Annie", "Anna"),  # newer than the first Anna, older than the second
        (40, " \x00", None),  # blank: it clears the name
        (45, "Anna", None),
        (39, None, None),  # says nothing
        (38, 5, None),
        (30, "x" * 99, "x" * 64),
        (-4, "Soon", "Soon"),  # the clock of its signer is ahead
        (0, "Late", "Soon"),
    ):
        iat = None if age is None else now - age
        token = server.token(6, iat=iat, name=name)
        for _ in range(2):
            answer = await server.ask("GET", "/api/v1/me", token=token)
            assert answer.json["name"] == shown, (age, name)
        if age == 500:
            server.app.names.clear()  # as after a restart: the database knows, too
    users = (await server.ask("GET", "/api/v1/users", user=6)).json["users"]
    assert users == [{"user_id": 6, "name": "Soon"}]


@pytest.mark.parametrize("restarted", [False, True])
@with_server()
async def test_a_name_that_was_set_while_the_clock_was_ahead_does_not_stay_for_ever(
    server: VirtualServer, restarted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    for days, name in ((400, "Ann"), (0, "Anna"), (0, "Annie")):
        monkeypatch.setattr(time, "time", lambda: real() + days * 86_400)  # noqa: B023
        token = server.token(6, iat=time.time(), exp=time.time() + 60, name=name)
        answer = await server.ask("GET", "/api/v1/me", token=token)
        assert answer.json["name"] == name
        if restarted:
            server.app.names.clear()


@with_server()
async def test_without_iat_the_name_of_the_last_request_wins(
    server: VirtualServer,
) -> None:
    for name in ("Ann", "Anna", "Ann"):
        token = server.token(6, iat=None, name=name)
        answer = await server.ask("GET", "/api/v1/me", token=token)
        assert answer.json["name"] == name


@with_server()
async def test_a_token_without_a_name_writes_nothing_and_a_known_name_only_once(
    server: VirtualServer,
) -> None:
    commits = 0
    for age, name, written in (
        (None, None, 0), (9, None, 0), (9, "Ann", 1), (8, "Ann", 0), (9, "Bob", 0),
        (7, "", 1), (6, "", 0),
    ):  # fmt: skip
        iat = None if age is None else time.time() - age
        await server.ask("GET", "/api/v1/me", token=server.token(6, iat=iat, name=name))
        commits += written
        assert (await server.stats())["store"]["commits"] == commits


@with_server()
async def test_a_session_token_has_no_name_so_it_never_sets_an_old_one(
    server: VirtualServer,
) -> None:
    old = server.token(6, use="signin", name="Ann", iat=time.time() - 60)
    new = server.token(6, use="signin", name="Anna")
    for link, name in ((old, "Ann"), (new, "Anna"), (old, "Anna")):
        session = (await server.ask("POST", "/api/v1/session", {}, token=link)).json
        assert session["name"] == name
        me = await server.ask("GET", "/api/v1/me", token=session["token"])
        assert (me.json["user_id"], me.json["name"]) == (6, name)


@with_server()
async def test_a_name_is_stored_although_the_table_of_names_is_bounded(
    server: VirtualServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chatd, "TABLE_KEYS", 2)
    for _ in range(2):
        for user in (6, 7, 8):
            token = server.token(user, name=f"N{user}")
            await server.ask("GET", "/api/v1/me", token=token)
            assert len(server.app.names) <= 2
    users = (await server.ask("GET", "/api/v1/users", user=6)).json["users"]
    assert users == [{"user_id": u, "name": f"N{u}"} for u in (6, 7, 8)]


@with_server()
async def test_the_list_of_users_has_all_known_users_and_those_with_names_first(
    server: VirtualServer,
) -> None:
    await server.chat(9, 8)
    await server.ask("GET", "/api/v1/me", token=server.token(8, name="Zoe"))
    answer = await server.ask("GET", "/api/v1/users", user=6)
    assert answer.json == {
        "users": [{"user_id": 8, "name": "Zoe"}, {"user_id": 9, "name": None}]
    }


@with_server(chats_by="service")
async def test_with_chats_by_service_a_user_may_not_create_chats_or_list_users(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6)
    for method, path, body in (
        ("GET", "/api/v1/users", None),
        ("POST", "/api/v1/chats", {"member_ids": [7]}),
        ("POST", f"/api/v1/chats/{chat}/members", {"user_id": 7}),
    ):
        answer = await server.ask(method, path, body, user=6)
        assert (answer.status, answer.code) == (403, "forbidden")
        await server.command(method, path, body)
    left = await server.ask("DELETE", f"/api/v1/chats/{chat}/members/6", user=6)
    assert left.status == 204


@with_server()
async def test_a_user_is_a_member_of_the_chat_it_creates_and_a_service_is_not(
    server: VirtualServer,
) -> None:
    made = await server.ask(
        "POST", "/api/v1/chats", {"title": "Tea", "member_ids": [7, 7, 6]}, user=6
    )
    assert made.status == 201
    chat = made.json["chat"]
    assert chat == {
        "id": chat["id"], "title": "Tea", "last_n": 0, "last_message": None,
        "direct": False, "created_by": 6, "member_count": 2,
        "members": [
            {"user_id": 6, "name": None, "read_n": 0, "online": False},
            {"user_id": 7, "name": None, "read_n": 0, "online": False},
        ],
    }  # fmt: skip
    alone = await server.ask("POST", "/api/v1/chats", {}, user=6)
    assert [m["user_id"] for m in alone.json["chat"]["members"]] == [6]
    assert alone.json["chat"]["title"] is None
    service = await server.command("POST", "/api/v1/chats", {"member_ids": [7]})
    assert [m["user_id"] for m in service["chat"]["members"]] == [7]


# A body of a new direct chat; who: a user (6) or a service; the status of the answer.
DIRECT: tuple[tuple[dict[str, Any], str, int], ...] = (
    ({"member_ids": [7]}, "user", 201),
    ({"member_ids": [7], "title": None}, "user", 201),
    ({"member_ids": [7], "title": "Sofa"}, "user", 400),
    ({"member_ids": [6]}, "user", 400),
    ({"member_ids": []}, "user", 400),
    ({}, "user", 400),
    ({"member_ids": [6, 7]}, "user", 400),
    ({"member_ids": [7, 7]}, "user", 400),
    ({"member_ids": [7, 8]}, "user", 400),
    ({"member_ids": [7, 8]}, "service", 201),
    ({"member_ids": [7, 8], "title": "Sofa"}, "service", 400),
    ({"member_ids": [7]}, "service", 400),
    ({"member_ids": [7, 7]}, "service", 400),
    ({"member_ids": [7, 8, 9]}, "service", 400),
    ({"member_ids": [7, 8, 8]}, "service", 400),
    ({"member_ids": []}, "service", 400),
)


@pytest.mark.parametrize(("body", "who", "status"), DIRECT)
@with_server()
async def test_a_direct_chat_is_of_two_users_and_has_no_title(
    server: VirtualServer, body: dict[str, Any], who: str, status: int
) -> None:
    token = server.token(6, scope="service" if who == "service" else "")
    ask = functools.partial(server.ask, "POST", "/api/v1/chats", token=token)
    made = await ask({"direct": True, **body})
    assert made.status == status
    if status == 400:
        assert made.code == "bad_field"
        assert made.json["error"]["message"].startswith("direct: ")
        assert server.app.hub.head == 0
        return
    chat = made.json["chat"]
    assert (chat["direct"], chat["title"], chat["member_count"]) == (True, None, 2)
    assert chat["created_by"] == (6 if who == "user" else None)
    again = await ask({"direct": True, **body})
    assert (again.status, again.json) == (200, made.json)
    assert server.app.hub.head == 2
    for wrong in (1, "yes", None):
        refused = await ask({**body, "direct": wrong})
        assert (refused.status, refused.code) == (400, "bad_field")
        assert "direct" in refused.json["error"]["message"]


@with_server()
async def test_both_users_get_the_one_direct_chat_also_at_the_same_time(
    server: VirtualServer,
) -> None:
    answers: list[HttpAnswer] = []

    async def create(user: int, other: int) -> None:
        body = {"direct": True, "member_ids": [other]}
        answers.append(await server.ask("POST", "/api/v1/chats", body, user=user))

    server.disk.hold()
    async with trio.open_nursery() as nursery:
        for pair in ((6, 7), (7, 6), (6, 7)):
            nursery.start_soon(create, *pair)
        await wait_all_tasks_blocked()
        server.disk.go()
    assert sorted(answer.status for answer in answers) == [200, 200, 201]
    assert len({answer.json["chat"]["id"] for answer in answers}) == 1
    chat = answers[0].json["chat"]["id"]
    for method, path, body in (
        ("POST", "members", {"user_id": 8}),
        ("POST", "members", {"user_id": 7}),
        ("DELETE", "members/7", None),
        ("DELETE", "members/6", None),
        ("PATCH", "", {"title": "Sofa"}),
    ):
        target = f"/api/v1/chats/{chat}/{path}".rstrip("/")
        for token in (server.token(6), server.token(9, scope="service")):
            refused = await server.ask(method, target, body, token=token)
            assert (refused.status, refused.code) == (409, "direct"), (target, token)


@with_server()
async def test_a_key_makes_a_creation_idempotent(server: VirtualServer) -> None:
    async def create(
        key: str | None, header: str | None, *, user: int = 6, **body: Any
    ) -> HttpAnswer:
        headers = {} if header is None else {"Idempotency-Key": header}
        body |= {} if key is None else {"client_id": key}
        return await server.ask("POST", "/api/v1/chats", body, user=user, **headers)

    first = await create("k", None, title="Bicycle", member_ids=[7])
    assert first.status == 201
    for again in (
        await create("k", None, title="Bicycle", member_ids=[7]),
        await create("k", None, title="another"),
        await create(None, "k", member_ids=[8, 9]),
        await create("k", "k"),
    ):
        assert (again.status, again.json) == (200, first.json)
    assert (await create("k", None, user=7)).status == 201
    assert (await create(None, "K")).status == 201
    assert (await create(None, None)).status == 201
    assert (await create(None, None)).status == 201
    for key, header, field in (
        ("k", "other", "client_id"), ("", None, "client_id"),
        ("x" * 65, None, "client_id"), (None, "", "Idempotency-Key"),
        (None, "x" * 65, "Idempotency-Key"), (None, "caf\xe9", "Idempotency-Key"),
    ):  # fmt: skip
        refused = await create(key, header)
        assert (refused.status, refused.code) == (400, "bad_field")
        assert field in refused.json["error"]["message"]


@with_server()
async def test_all_services_share_their_keys(server: VirtualServer) -> None:
    body = {"client_id": "listing 17, buyer 6", "member_ids": [6, 7]}
    made = await server.command("POST", "/api/v1/chats", body)
    for user, status in ((1, 200), (2, 200)):
        token = server.token(user, scope="service")
        again = await server.ask("POST", "/api/v1/chats", body, token=token)
        assert (again.status, again.json) == (status, made)
    assert (await server.ask("POST", "/api/v1/chats", body, user=6)).status == 201
    for user in (6, 7):  # the service gets it also when nobody is left in it
        await server.command(
            "DELETE", f"/api/v1/chats/{made['chat']['id']}/members/{user}"
        )
    left = await server.command("POST", "/api/v1/chats", body)
    assert left["chat"] == made["chat"] | {"members": [], "member_count": 0}


@with_server()
async def test_a_creator_who_is_no_longer_a_member_gets_404_for_its_key(
    server: VirtualServer,
) -> None:
    body = {"client_id": "k", "member_ids": [7]}
    made = await server.ask("POST", "/api/v1/chats", body, user=6)
    chat = made.json["chat"]["id"]
    await server.ask("DELETE", f"/api/v1/chats/{chat}/members/6", user=6)
    again = await server.ask("POST", "/api/v1/chats", body, user=6)
    assert (again.status, again.code) == (404, "not_found")
    await server.command("POST", f"/api/v1/chats/{chat}/members", {"user_id": 6})
    again = await server.ask("POST", "/api/v1/chats", body, user=6)
    assert (again.status, again.json["chat"]["id"]) == (200, chat)


@with_server()
async def test_one_chat_is_shown_with_who_is_online(server: VirtualServer) -> None:
    body = {"title": "Tea", "member_ids": [7, 8]}
    chat = (await server.ask("POST", "/api/v1/chats", body, user=6)).json["chat"]
    assert [member["online"] for member in chat["members"]] == [False] * 3
    peer = await server.join(7)
    path = f"/api/v1/chats/{chat['id']}"
    for token in (server.token(6), server.token(99, scope="service")):
        shown = (await server.ask("GET", path, token=token)).json["chat"]
        assert [member["online"] for member in shown["members"]] == [False, True, False]
        for member in (*shown["members"], *chat["members"]):
            member["online"] = False
        assert shown == chat
    await peer.leave()
    await wait_all_tasks_blocked()
    members = (await server.ask("GET", f"{path}/members", user=6)).json["members"]
    assert [member["online"] for member in members] == [False] * 3
    listed = (await server.ask("GET", "/api/v1/chats", user=6)).json["chats"][0]
    assert all("online" not in member for member in listed["members"])
    for target in ("", "/members"):
        hidden = await server.ask("GET", path + target, user=9)
        unknown = await server.ask("GET", f"/api/v1/chats/999{target}", user=9)
        service = await server.ask(
            "GET", f"/api/v1/chats/999{target}", token=server.token(9, scope="service")
        )
        assert hidden.status == unknown.status == service.status == 404
        assert hidden.body == unknown.body == service.body


@with_server()
async def test_the_members_of_a_large_chat_come_page_by_page(
    server: VirtualServer,
) -> None:
    body = {"member_ids": [*range(10, 260)]}
    chat = (await server.command("POST", "/api/v1/chats", body))["chat"]
    everybody = [
        {"user_id": user, "name": None, "read_n": 0, "online": user == 20}
        for user in range(10, 260)
    ]
    peer = await server.join(20)
    path = f"/api/v1/chats/{chat['id']}"
    for user in (10, 20):
        shown = (await server.ask("GET", path, user=user)).json["chat"]
        assert (shown["members"], shown["member_count"]) == (everybody, 250)
        # In a list there is no room for them.
        (in_list,) = (await server.ask("GET", "/api/v1/chats", user=user)).json["chats"]
        assert (in_list["members"], in_list["member_count"]) == ([], 250)
    await peer.leave()
    path += "/members"
    listed: list[int] = []
    more, query = True, ""
    while more:
        page = await server.command("GET", path + query)
        assert len(page["members"]) <= 100
        listed += [member["user_id"] for member in page["members"]]
        more, query = page["more"], f"?after={listed[-1]}"
    assert listed == [*range(10, 260)]
    assert len((await server.command("GET", f"{path}?limit=500"))["members"]) == 250
    wanted = ",".join(map(str, range(1, 101)))
    page = await server.command("GET", f"{path}?ids={wanted}")
    assert [member["user_id"] for member in page["members"]] == [*range(10, 101)]
    assert page["more"] is False
    token = server.token(9, scope="service")
    for query, field in (
        ("ids=1,", "ids"), ("ids=,1", "ids"), ("ids=x", "ids"), ("ids=1 ", "ids"),
        ("ids=0", "ids"), ("ids=01", "ids"), ("ids=1&ids=2", "ids"), ("ids=-1", "ids"),
        ("ids=1.5", "ids"), ("ids=%D9%A3", "ids"), ("ids=1%0a", "ids"),
        (f"ids={wanted},101", "ids"), ("ids=1],[2", "ids"), (f"ids={10**16}", "ids"),
        ("after=0", "after"), ("after=x", "after"), ("limit=0", "limit"),
        ("limit=501", "limit"),
    ):  # fmt: skip
        target = f"{path}?{query}".replace(" ", "%20")
        refused = await server.ask("GET", target, token=token)
        assert (refused.status, refused.code, query) == (400, "bad_field", query)
        assert refused.json["error"]["message"].startswith(field)


@with_server()
async def test_a_chat_is_renamed_by_its_members(server: VirtualServer) -> None:
    chat = await server.chat(6, 7)
    path = f"/api/v1/chats/{chat}"
    peer = await server.join(7)
    cursor = peer.hello["cursor"]
    renamed = await server.ask("PATCH", path, {"title": "Bicycle"}, user=6)
    assert (renamed.status, renamed.json["chat"]["title"]) == (200, "Bicycle")
    assert renamed.json["chat"]["members"][1]["online"] is True
    event = await peer.receive("chat_renamed")
    assert event == {
        "type": "chat_renamed", "seq": 3, "chat_id": chat, "title": "Bicycle",
        "user_id": 6,
    }  # fmt: skip
    same = await server.ask("PATCH", path, {"title": "Bicycle"}, user=7)
    assert (same.status, same.json) == (200, renamed.json)
    cleared = await server.command("PATCH", path, {"title": None})
    assert cleared["chat"]["title"] is None
    last = await peer.receive("chat_renamed")
    assert (last["seq"], last["title"], last["user_id"]) == (4, None, None)
    poll = await server.ask("GET", f"/api/v1/events?cursor={cursor}", user=7)
    assert poll.json["events"] == [event, last]
    for body, code in (
        ({}, "bad_field"), ({"title": ""}, "bad_field"), ({"title": " "}, "bad_field"),
        ({"title": "\u3000"}, "bad_field"), ({"title": "x" * 201}, "bad_field"),
        ({"title": "a\nb"}, "bad_field"), ({"title": 7}, "bad_field"),
        ({"title": "a\x7f"}, "bad_field"), ([], "bad_json"), (None, "bad_json"),
    ):  # fmt: skip
        refused = await server.ask("PATCH", path, body, user=6)
        assert (refused.status, refused.code) == (400, code)
        assert code == "bad_json" or "title" in refused.json["error"]["message"]
    for title in ("x", "\U0001f600" * 200, " a ", "<b>", '"', "\u2028"):
        named = await server.ask("PATCH", path, {"title": title}, user=6)
        status = 400 if title == "\u2028" else 200
        assert named.status == status
    hidden = await server.ask("PATCH", path, {"title": "x"}, user=8)
    unknown = await server.ask("PATCH", "/api/v1/chats/999", {"title": "x"}, user=8)
    assert (hidden.status, hidden.body) == (404, unknown.body)


@with_server(chats_by="service")
async def test_with_chats_by_service_a_creator_has_no_rights_but_to_leave(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    await server.store.commit(
        lambda db, _: db.execute("UPDATE chat SET created_by = 6"), then=lambda _: None
    )
    path = f"/api/v1/chats/{chat}"
    for method, target, body in (
        ("PATCH", path, {"title": "x"}),
        ("DELETE", f"{path}/members/7", None),
        ("POST", "/api/v1/chats", {"direct": True, "member_ids": [7]}),
    ):
        refused = await server.ask(method, target, body, user=6)
        assert (refused.status, refused.code) == (403, "forbidden")
    assert (await server.ask("DELETE", f"{path}/members/6", user=6)).status == 204
    assert (await server.command("PATCH", path, {"title": "x"}))["chat"]["title"] == "x"


@with_server(sends=Rate(0.1, 1))
async def test_each_change_of_a_chat_costs_a_token_of_sends(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7, 8)
    path = f"/api/v1/chats/{chat}"
    await server.store.commit(
        lambda db, _: db.execute("UPDATE chat SET created_by = 6")
    )
    for method, target, body in (
        ("PATCH", path, {"title": "x"}),
        ("POST", "/api/v1/chats", {"direct": True, "member_ids": [7]}),
        ("POST", f"{path}/members", {"user_id": 9}),
        ("DELETE", f"{path}/members/7", None),
    ):
        taken = await server.ask(method, target, body, user=6)
        assert taken.status in (200, 201, 204), (method, target)
        refused = await server.ask(method, target, body, user=6)
        assert (refused.status, refused.code) == (429, "rate_limited")
        assert refused.json["error"]["retry_after"] > 9
        for read in (path, f"{path}/members", f"{path}/messages"):
            assert (await server.ask("GET", read, user=6)).status == 200
        await trio.sleep(10)
    for title in "abc":  # a service has no such limit
        await server.command("PATCH", path, {"title": title})


@with_server()
async def test_a_removal_by_the_creator_counts_at_once(server: VirtualServer) -> None:
    made = await server.ask("POST", "/api/v1/chats", {"member_ids": [7, 8]}, user=6)
    path = f"/api/v1/chats/{made.json['chat']['id']}"
    peer = await server.join(7)
    refused = await server.ask("DELETE", f"{path}/members/8", user=7)
    assert (refused.status, refused.code) == (403, "forbidden")
    assert (await server.ask("DELETE", f"{path}/members/7", user=6)).status == 204
    assert (await peer.receive("member_removed"))["user_id"] == 7
    refused = await server.ask("GET", path, user=7)
    assert refused.status == 404


@with_server()
async def test_pages_of_chats_are_followed_by_the_events_after_the_first_cursor(
    server: VirtualServer,
) -> None:
    chats = [await server.chat(6, 7) for _ in range(5)]
    first = (await server.ask("GET", "/api/v1/chats?limit=2", user=6)).json
    assert [chat["id"] for chat in first["chats"]] == [chats[4], chats[3]]
    assert (first["more"], first["position"]) == (True, first["chats"][1]["position"])
    await server.post(chats[0], "it becomes the newest", sender=7)
    listed, page = [*first["chats"]], first
    while page["more"]:
        target = f"/api/v1/chats?limit=2&before={page['position']}"
        page = (await server.ask("GET", target, user=6)).json
        listed += page["chats"]
    assert [chat["id"] for chat in listed] == [chats[place] for place in (4, 3, 2, 1)]
    poll = await server.ask("GET", f"/api/v1/events?cursor={first['cursor']}", user=6)
    assert [event["chat_id"] for event in poll.json["events"]] == [chats[0]]
    whole = (await server.ask("GET", "/api/v1/chats", user=6)).json
    assert [chat["id"] for chat in whole["chats"]] == [
        chats[place] for place in (0, 4, 3, 2, 1)
    ]
    assert whole["more"] is False
    nobody = (await server.ask("GET", "/api/v1/chats?limit=9", user=9)).json
    assert (nobody["chats"], nobody["more"], nobody["position"]) == ([], False, None)
    for query in ("limit=0", "limit=101", "limit=x", "before=0", "before=x", "before="):
        refused = await server.ask("GET", f"/api/v1/chats?{query}", user=6)
        assert (refused.status, refused.code) == (400, "bad_field")


@with_server()
async def test_only_one_place_of_a_page_of_history_is_given(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    ids = await server.post(chat, *"abc")
    path = f"/api/v1/chats/{chat}/messages"
    for query in (
        f"before={ids[2]}&after={ids[0]}", f"after={ids[0]}&around={ids[0]}",
        f"before={ids[0]}&around={ids[0]}", f"before={ids[2]}&after=",
        "after=0", "around=x", "around=", f"after={ids[0]}&after={ids[1]}",
        f"after={2**53}", "around=999",
    ):  # fmt: skip
        refused = await server.ask("GET", f"{path}?{query}", user=6)
        assert (refused.status, refused.code, query) == (400, "bad_field", query)
        assert refused.json["error"]["message"].startswith(
            ("before", "after", "around")
        )
    refused = await server.ask("GET", f"{path}?after={ids[0]}", user=8)
    assert refused.status == 404


@with_server()
async def test_an_answer_with_a_chat_has_its_last_message_as_it_is_now(
    server: VirtualServer,
) -> None:
    chats = [await server.chat(6, 7) for _ in range(3)]
    for chat in chats[:2]:
        await server.post(chat, "before", sender=7)
    app = server.app
    upto = app.hub.head
    read = await server.store.read(app.chats.my_chats, 6, upto, None, None)

    def edit(db: sqlite3.Connection, events: list[chatd.Entry]) -> None:
        message = chatd.Message(upto, chats[1], 7, "after", "", 1, rev=upto + 1)
        event = chatd.MessageEdited(server.store.next_seq(events), chats[1], message)
        server.store.record(db, events, chatd.Entry(event, to_chat=True))

    await server.store.commit(edit)
    read = app.hub.correct(read, upto)
    texts = [chat.last_message and chat.last_message.content for chat in read]
    assert texts == ["after", "before", None]


@with_server(members=3)
async def test_the_refusal_of_a_new_chat_names_the_wrong_field(
    server: VirtualServer,
) -> None:
    for body, code, field in (
        ([], "bad_json", ""),
        (None, "bad_json", ""),
        ({"title": ""}, "bad_field", "title"),
        ({"title": "   "}, "bad_field", "title"),
        ({"title": "x" * 201}, "bad_field", "title"),
        ({"title": "a\x1bb"}, "bad_field", "title"),
        ({"title": "a\x00b"}, "bad_field", "title"),
        ({"title": 7}, "bad_field", "title"),
        ({"member_ids": 7}, "bad_field", "member_ids"),
        ({"member_ids": ["7"]}, "bad_field", "member_ids"),
        ({"member_ids": [0]}, "bad_field", "member_ids"),
        ({"member_ids": [7, 8, 9]}, "bad_field", "members: 4 of them; at most 3"),
        ({"client_id": "é"}, "bad_field", "client_id"),
        ({"client_id": ""}, "bad_field", "client_id"),
    ):
        answer = await server.ask("POST", "/api/v1/chats", body, user=6)
        assert (answer.status, answer.code, body) == (400, code, body)
        sentence = answer.json["error"]["message"]
        assert sentence.startswith(field) or not field
        # In words, not as a pattern.
        assert "regex" not in sentence


@with_server()
async def test_the_list_of_chats_counts_unread_and_has_the_latest_message_first(
    server: VirtualServer,
) -> None:
    old, new = await server.chat(6, 7), await server.chat(6, 8)
    await server.chat(7, 8)  # user 6 is not a member
    ids = await server.post(old, "a", "b", "c", sender=7)
    await server.ask("POST", f"/api/v1/messages/{ids[0]}/read", user=6)
    answer = (await server.ask("GET", "/api/v1/chats", user=6)).json
    assert answer["cursor"] == f"{server.store.epoch}.{server.app.hub.head}"
    first, second = answer["chats"]
    assert (first["id"], first["last_n"], first["read_n"], first["unread"]) == (
        old, 3, 1, 2,
    )  # fmt: skip
    assert first["last_message"]["content"] == "c"
    assert (second["id"], second["unread"], second["last_message"]) == (new, 0, None)


@with_server()
async def test_adding_a_member_returns_201_and_again_200(server: VirtualServer) -> None:
    chat = await server.chat(6)
    path = f"/api/v1/chats/{chat}/members"
    for status in (201, 200):
        answer = await server.ask("POST", path, {"user_id": 7}, user=6)
        assert answer.status == status
        assert answer.json == {"chat_id": chat, "user_id": 7}
    for user in (8, 9):  # user 8 is not a member and may add nobody
        hidden = await server.ask("POST", path, {"user_id": user}, user=8)
        unknown = await server.ask(
            "POST", "/api/v1/chats/999/members", {"user_id": user}, user=8
        )
        assert (hidden.status, hidden.body) == (404, unknown.body)
    bad = await server.ask("POST", path, {"user_id": "8"}, user=6)
    assert (bad.status, bad.code) == (400, "bad_field")
    assert "user_id" in bad.json["error"]["message"]


@with_server()
async def test_a_user_may_leave_and_a_service_may_remove_others(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7, 8)
    path = f"/api/v1/chats/{chat}/members"
    other = await server.ask("DELETE", f"{path}/7", user=6)
    assert (other.status, other.code) == (403, "forbidden")
    left = await server.ask("DELETE", f"{path}/6", user=6)
    assert (left.status, left.body) == (204, b"")
    again = await server.ask("DELETE", f"{path}/6", user=6)
    assert (again.status, again.code) == (404, "not_found")
    await server.command("DELETE", f"{path}/7")
    token = server.token(999, scope="service")
    for missing in (f"{path}/7", "/api/v1/chats/999/members/7"):
        answer = await server.ask("DELETE", missing, token=token)
        assert (answer.status, answer.code) == (404, "not_found")
    (mine,) = (await server.ask("GET", "/api/v1/chats", user=8)).json["chats"]
    assert [member["user_id"] for member in mine["members"]] == [8]


@with_server()
async def test_each_page_of_history_has_its_oldest_message_first(
    server: VirtualServer,
) -> None:
    chat, other = await server.chat(6, 7), await server.chat(6, 7)
    ids = await server.post(chat, *map(str, range(7)))
    (foreign,) = await server.post(other, "x")
    path = f"/api/v1/chats/{chat}/messages"

    async def page(query: str) -> tuple[list[int], bool]:
        answer = (await server.ask("GET", path + query, user=6)).json
        return [message["id"] for message in answer["messages"]], answer["more"]

    assert await page("") == (ids, False)
    assert await page("?limit=3") == (ids[4:], True)
    assert await page(f"?limit=3&before={ids[4]}") == (ids[1:4], True)
    assert await page(f"?limit=3&before={ids[1]}") == (ids[:1], False)
    assert await page(f"?before={ids[0]}") == ([], False)
    for query, field in {
        "limit=0": "limit", "limit=101": "limit", "limit=-1": "limit",
        "limit=": "limit", "limit=1.0": "limit", "limit=1&limit=2": "limit",
        "limit=٣": "limit",
        f"limit={'9' * 30}": "limit", "before=0": "before", "before=x": "before",
        f"before={2**53}": "before", f"before={foreign}": "before",
        "before=999": "before",
    }.items():  # fmt: skip
        target = f"{path}?{query}".replace("٣", "%D9%A3")
        answer = await server.ask("GET", target, user=6)
        assert (answer.status, answer.code, query) == (400, "bad_field", query)
        assert field in answer.json["error"]["message"]
    stranger = await server.ask("GET", path, user=8)
    unknown = await server.ask("GET", "/api/v1/chats/999/messages", user=8)
    assert (stranger.status, stranger.body) == (404, unknown.body)


@with_server()
async def test_a_message_returns_201_and_a_repeat_200_and_other_content_409(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    listener = await server.join(7)
    path = f"/api/v1/chats/{chat}/messages"
    body = {"content": "hi", "client_id": "k"}
    first = await server.ask("POST", path, body, user=6)
    assert (first.status, first.json["duplicate"]) == (201, False)
    assert (await listener.receive("new_message"))["message"] == first.json["message"]
    for again in (
        await server.ask("POST", path, body, user=6),
        await server.ask("POST", path, {"content": "hi"}, user=6, Idempotency_Key="k"),
        await server.ask("POST", path, body, user=6, Idempotency_Key="k"),
    ):
        assert (again.status, again.json["duplicate"]) == (200, True)
        assert again.json["message"] == first.json["message"]
    other = await server.ask("POST", path, body | {"content": "ho"}, user=6)
    assert (other.status, other.code) == (409, "idempotency_mismatch")
    await listener.receives_nothing()


@with_server()
async def test_a_message_is_edited_and_deleted_over_http(server: VirtualServer) -> None:
    chat = await server.chat(6, 7)
    listener = await server.join(7)
    (message,) = await server.post(chat, "old", sender=6)
    sent = (await listener.receive("new_message"))["message"]
    path = f"/api/v1/messages/{message}"
    body = {"content": "new", "if_rev": message}
    edited = await server.ask("PATCH", path, body, user=6)
    assert edited.status == 200
    event = await listener.receive("message_edited")
    assert edited.json == {"message": event["message"]}
    assert event["message"] == sent | {
        "content": "new", "rev": event["seq"],
        "edited_at": event["message"]["edited_at"],
    }  # fmt: skip
    again = await server.ask("PATCH", path, body, user=6)  # a repeat, whatever if_rev
    assert (again.status, again.json) == (200, edited.json)
    changed = await server.ask("PATCH", path, body | {"content": "newer"}, user=6)
    assert (changed.status, changed.code) == (409, "changed")
    for _ in range(2):
        deleted = await server.ask("DELETE", path, user=6)
        assert (deleted.status, deleted.body) == (204, b"")
    event = await listener.receive("message_deleted")
    assert event["message"] == edited.json["message"] | {
        "content": "", "deleted": True, "rev": event["seq"],
    }  # fmt: skip
    late = await server.ask("PATCH", path, {"content": "x"}, user=6)
    assert (late.status, late.code) == (409, "deleted")
    await listener.receives_nothing()
    history = await server.ask("GET", f"/api/v1/chats/{chat}/messages", user=7)
    assert history.json["messages"] == [event["message"]]


# What is tried with message ID of user 6: the user (999: a service), the method, the
# body, the path, and the answer.
CHANGES: list[tuple[int, str, Any, str, int, str]] = [
    (7, "PATCH", {"content": "x"}, "ID", 403, "forbidden"),
    (7, "DELETE", None, "ID", 403, "forbidden"),
    (8, "PATCH", {"content": "x"}, "ID", 404, "not_found"),
    (8, "DELETE", None, "ID", 404, "not_found"),
    (6, "DELETE", None, "12345", 404, "not_found"),
    (6, "DELETE", None, "0", 404, "not_found"),
    (6, "DELETE", None, "x", 404, "not_found"),
    (6, "PATCH", {"content": ""}, "ID", 400, "bad_field"),
    (6, "PATCH", {"content": "a\0"}, "ID", 400, "bad_field"),
    (6, "PATCH", {"content": "x" * 4001}, "ID", 400, "bad_field"),
    (6, "PATCH", {"content": None}, "ID", 400, "bad_field"),
    (6, "PATCH", {}, "ID", 400, "bad_field"),
    (6, "PATCH", {"content": "x", "if_rev": "3"}, "ID", 400, "bad_field"),
    (6, "PATCH", {"content": "x", "if_rev": 0}, "ID", 400, "bad_field"),
    (6, "PATCH", [], "ID", 400, "bad_json"),
    (6, "PUT", {"content": "x"}, "ID", 405, "method_not_allowed"),
    (6, "PATCH", {"content": "x"}, "ID", 200, ""),
    (999, "PATCH", {"content": "x"}, "ID", 200, ""),
    (999, "DELETE", None, "ID", 204, ""),
]


@pytest.mark.parametrize(("user", "method", "body", "path", "status", "code"), CHANGES)
@with_server()
async def test_a_change_over_http_gets_its_answer(
    server: VirtualServer,
    user: int,
    method: str,
    body: Any,
    path: str,
    status: int,
    code: str,
) -> None:
    chat = await server.chat(6, 7)
    (message,) = await server.post(chat, "old", sender=6)
    target = f"/api/v1/messages/{path.replace('ID', str(message))}"
    token = server.token(user, scope="service" if user == 999 else None)
    answer = await server.ask(method, target, body, token=token)
    assert answer.status == status
    if code:
        assert answer.code == code
        assert server.app.hub.head == message
    stranger = await server.ask(method, target, body, token="")
    assert stranger.status in (401, 404, 405)


@with_server(sends=Rate(1, 3))
async def test_a_change_costs_as_much_as_a_message_over_either_way(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer = await server.join(6)
    message = (await peer.ask("send_message", chat_id=chat, content="a"))["message_id"]
    path = f"/api/v1/messages/{message}"
    assert (await server.ask("PATCH", path, {"content": "b"}, user=6)).status == 200
    assert (await peer.ask("edit_message", message_id=message, content="c"))["rev"]
    over = await server.ask("DELETE", path, user=6)
    assert (over.status, over.code) == (429, "rate_limited")
    for kind, rest in (("edit_message", {"content": "d"}), ("delete_message", {})):
        refused = await peer.refused(kind, message_id=message, **rest)
        assert (refused["code"], refused["message_id"]) == ("rate_limited", message)
        assert refused["retry_after"] > 0
    await server.command("DELETE", path)  # a service pays nothing


@with_server()
async def test_answers_that_were_read_before_a_change_show_the_message_as_it_is(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    (message,) = await server.post(chat, "old text", sender=6)
    cursor = f"{server.store.epoch}.{message - 1}"
    found: dict[str, HttpAnswer] = {}

    async def ask(target: str) -> None:
        found[target] = await server.ask("GET", target, user=7)

    async with trio.open_nursery() as nursery:
        server.disk.hold(reads=True, done=True)
        for target in (
            f"/api/v1/chats/{chat}/messages",
            "/api/v1/chats",
            f"/api/v1/events?cursor={cursor}",
        ):
            nursery.start_soon(ask, target)
        await wait_all_tasks_blocked()
        await server.command("DELETE", f"/api/v1/messages/{message}")
        server.disk.go()
    for answer in found.values():
        assert answer.status == 200
        assert b"old text" not in answer.body
        assert b'"deleted":true' in answer.body


@with_server()
async def test_a_message_that_is_deleted_in_the_batch_of_its_post_is_answered_so(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer = await server.join(6)
    path = f"/api/v1/chats/{chat}/messages"
    found: list[HttpAnswer] = []

    async def post(**body: str) -> None:
        found.append(await server.ask("POST", path, body, user=6))

    message = server.app.hub.head + 2  # after a batch that only holds the disk
    server.disk.hold()
    async with trio.open_nursery() as nursery:
        await peer.send_command("send_message", chat_id=chat, content="first")
        await wait_all_tasks_blocked()
        nursery.start_soon(functools.partial(post, content="old text", client_id="k"))
        await wait_all_tasks_blocked()
        await peer.send_command("edit_message", message_id=message, content="middle")
        await peer.send_command("delete_message", message_id=message)
        await wait_all_tasks_blocked()
        server.disk.go()
    await post(content="old text", client_id="k")  # the repeat
    (posted, repeated) = found
    assert (posted.status, repeated.status) == (201, 200)
    assert posted.json["message"] == repeated.json["message"]
    assert (posted.json["message"]["content"], posted.json["message"]["deleted"]) == (
        "", True,
    )  # fmt: skip


@with_server()
async def test_the_refusal_of_a_message_names_the_wrong_field(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    path = f"/api/v1/chats/{chat}/messages"
    for body, key, status, code, field in (
        ({}, "", 400, "bad_field", "content"),
        ({"content": ""}, "", 400, "bad_field", "content"),
        ({"content": 1}, "", 400, "bad_field", "content"),
        ({"content": "x" * 4001}, "", 400, "bad_field", "content"),
        ({"content": "x", "client_id": "a" * 65}, "", 400, "bad_field", "client_id"),
        ({"content": "x"}, "a" * 65, 400, "bad_field", "Idempotency-Key"),
        ({"content": "x"}, "\xe9", 400, "bad_field", "Idempotency-Key"),
        ({"content": "x", "client_id": "a"}, "b", 400, "bad_field", "client_id"),
        ({"content": "x", "sender_id": "7"}, "", 400, "bad_field", "sender_id"),
        ({"content": "x", "sender_id": 7}, "", 403, "forbidden", "sender_id"),
        ([], "", 400, "bad_json", ""),
    ):
        headers = {"Authorization": f"Bearer {server.token(6)}"}
        if key:
            headers["Idempotency_Key"] = key
        answer = await server.dial().ask("POST", path, body, **headers)
        assert (answer.status, answer.code, body) == (status, code, body)
        assert field in answer.json["error"]["message"]
    raw = server.dial()
    auth = f"Bearer {server.token(6)}"
    for text in (
        b"",
        b"{",
        b'{"content":"\xff"}',
        b'{"content":"\\ud800"}',
        b"[" * 60_000,
    ):
        await raw.send(request_bytes("POST", path, text, Authorization=auth))
        assert (await raw.answer()).code == "bad_json"
    own = await server.ask("POST", path, {"content": "x", "sender_id": 6}, user=6)
    assert own.status == 201
    stranger = await server.ask("POST", path, {"content": "x"}, user=8)
    assert (stranger.status, stranger.code) == (404, "not_found")


@with_server()
async def test_a_service_may_send_as_any_user_to_any_chat(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6)
    body = {"content": "Your order", "sender_id": 50}
    path = f"/api/v1/chats/{chat}/messages"
    sent = await server.command("POST", path, body)
    assert sent["message"]["sender_id"] == 50
    token = server.token(999, scope="service")
    unknown = await server.ask("POST", "/api/v1/chats/77/messages", body, token=token)
    assert (unknown.status, unknown.code) == (404, "not_found")


@with_server(sends=Rate(1, 2))
async def test_messages_over_http_and_over_the_socket_share_one_rate(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer = await server.join(6)
    path = f"/api/v1/chats/{chat}/messages"
    assert (await peer.ask("send_message", chat_id=chat, content="a"))["n"] == 1
    sent = await server.ask("POST", path, {"content": "b"}, user=6)
    assert sent.status == 201
    over = await server.ask("POST", path, {"content": "c"}, user=6)
    assert (over.status, over.code) == (429, "rate_limited")
    assert over.headers["retry-after"] == "1"
    assert (await peer.refused("send_message", chat_id=chat, content="c"))["code"] == (
        "rate_limited"
    )


@with_server()
async def test_marking_read_over_http_is_sent_to_open_sockets(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    first, second = await server.post(chat, "a", "b", sender=7)
    friend = await server.join(7)
    marked = await server.ask("POST", f"/api/v1/messages/{second}/read", user=6)
    assert marked.json == {"message_id": second, "chat_id": chat, "n": 2}
    assert (await friend.receive("message_read"))["read_by"] == 6
    back = await server.ask("POST", f"/api/v1/messages/{first}/read", user=6)
    assert (back.status, back.json["n"]) == (200, 1)
    await friend.receives_nothing()
    for user, message in ((8, first), (6, 999)):
        answer = await server.ask("POST", f"/api/v1/messages/{message}/read", user=user)
        assert (answer.status, answer.code) == (404, "not_found")


@with_server(resync_events=5, tail_events=2)
async def test_the_poll_returns_the_events_that_a_socket_receives(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer = await server.join(6)
    epoch = server.store.epoch

    async def poll(query: str = "") -> Any:
        return (await server.ask("GET", f"/api/v1/events{query}", user=6)).json

    start = await poll()
    cursor = peer.hello["cursor"]
    assert start == {"events": [], "cursor": cursor, "more": False, "resync": False}
    ids = await server.post(chat, *"abcd", sender=7)
    sent = [await peer.receive("new_message") for _ in ids]
    got = await poll(f"?cursor={cursor}&limit=3")
    assert got == {
        "events": sent[:3], "cursor": f"{epoch}.{ids[2]}", "more": True,
        "resync": False,
    }  # fmt: skip
    got = await poll(f"?cursor={got['cursor']}&limit=3")
    end = f"{epoch}.{ids[3]}"
    assert got == {"events": sent[3:], "cursor": end, "more": False, "resync": False}
    # A cursor moves to the head, past events that are not for this user.
    await server.chat(7, 8)
    head = f"{epoch}.{server.app.hub.head}"
    empty = {"events": [], "cursor": head, "more": False}
    assert await poll(f"?cursor={end}") == empty | {"resync": False}
    for bad in (f"?cursor={epoch}.9999", "?cursor=", "?cursor=x", f"?cursor=f{end}"):
        assert await poll(bad) == empty | {"resync": True}
    await server.post(chat, *"ef", sender=7)
    head = f"{epoch}.{server.app.hub.head}"
    got = await poll(f"?cursor={cursor}")  # six events behind
    assert got == empty | {"resync": True, "cursor": head}
    for query in ("limit=0", "limit=501", "limit=x"):
        answer = await server.ask("GET", f"/api/v1/events?{query}", user=6)
        assert (answer.status, answer.code) == (400, "bad_field")


# --- whole process: every request of docs/protocol.md, and more ----------------------


async def test_every_request_of_the_documented_table_is_answered(
    either_server: ServerProcess,
) -> None:
    server = either_server
    ann, bob, cy = (next(new_users) for _ in range(3))
    token = server.token(ann, name="Ann")
    start = await server.cursor(ann)
    assert (await server.ask("GET", "/healthz")).status == 200
    me = await server.want(200, "GET /api/v1/me", token)
    assert (me["user_id"], me["name"]) == (ann, "Ann")
    nameless = await server.want(200, "GET /api/v1/me", server.token(cy))
    assert nameless == me | {"user_id": cy, "name": None}
    users = await server.want(200, "GET /api/v1/users", token)
    assert {"user_id": ann, "name": "Ann"} in users["users"]

    body: dict[str, object] = {"title": "t", "member_ids": [bob]}
    chat = (await server.want(201, "POST /api/v1/chats", token, body))["chat"]
    members = [(m["user_id"], m["name"], m["read_n"]) for m in chat.pop("members")]
    assert sorted(members) == [(ann, "Ann", 0), (bob, None, 0)]
    number = chat.pop("id")
    assert chat == {
        "title": "t", "last_n": 0, "last_message": None,
        "direct": False, "created_by": ann, "member_count": 2,
    }  # fmt: skip
    member: dict[str, object]
    more, member = f"/api/v1/chats/{number}/members", {"user_id": cy}
    assert await server.want(201, f"POST {more}", token, member) == {
        "chat_id": number,
        "user_id": cy,
    }
    await server.want(200, f"POST {more}", server.service, member)
    stranger = server.token(next(new_users))
    for n in (number, 2**53 - 1):  # the same, whether the chat exists or not
        await server.want(404, f"DELETE /api/v1/chats/{n}/members/{cy}", stranger)
    await server.want(403, f"DELETE {more}/{cy}", server.token(bob))
    await server.want(404, f"DELETE /api/v1/chats/{2**53 - 1}/members/{ann}", token)
    gone = await server.ask("DELETE", f"{more}/{cy}", server.service)
    assert (gone.status, gone.body) == (204, b"")
    await server.want(201, f"POST {more}", token, member)
    gone = await server.ask("DELETE", f"{more}/{cy}", token)  # by the chat's creator
    assert (gone.status, gone.body) == (204, b"")
    listed = await server.want(200, f"GET {more}?limit=1", token)
    first = {"user_id": ann, "name": "Ann", "read_n": 0, "online": False}
    assert listed == {"members": [first], "more": True}
    one_chat = f"/api/v1/chats/{number}"
    named = await server.want(200, f"PATCH {one_chat}", token, {"title": "u"})
    assert await server.want(200, f"GET {one_chat}", server.service) == named
    assert (named["chat"]["title"], named["chat"]["members"][0]) == ("u", first)

    messages, say = f"/api/v1/chats/{number}/messages", {"content": "one"}
    sent = await server.want(201, f"POST {messages}", token, say)
    assert sent["duplicate"] is False
    one = sent["message"]
    assert one["sender_id"] == ann
    say = {"content": "two", "client_id": "two"}
    two = (await server.want(201, f"POST {messages}", server.token(bob), say))[
        "message"
    ]
    three = await server.post(number, bob, "three")
    assert three["sender_id"] == bob
    for query, page, older, newer in (
        ("", [one, two, three], False, False),
        ("limit=2", [two, three], True, False),
        (f"limit=2&before={two['id']}", [one], False, True),
        (f"limit=1&after={one['id']}", [two], True, True),
        (f"limit=2&around={three['id']}", [two, three], True, False),
    ):
        answer = await server.want(200, f"GET {messages}?{query}", token)
        assert answer == {"messages": page, "more": older, "more_after": newer}
    read = await server.want(200, f"POST /api/v1/messages/{two['id']}/read", token)
    assert read == {"message_id": two["id"], "chat_id": number, "n": 2}

    chats = await server.want(200, "GET /api/v1/chats", token)
    (mine,) = chats["chats"]
    assert (chats["more"], chats["position"]) == (False, mine["position"])
    assert (mine["last_n"], mine["read_n"], mine["unread"]) == (3, 2, 1)
    assert mine["last_message"] == three
    poll = await server.want(200, f"GET /api/v1/events?cursor={start}&limit=500", token)
    kinds = [event["type"] for event in poll["events"]]
    expected = ["chat_added", *["member_added", "member_removed"] * 2, "chat_renamed"]
    expected += ["new_message", "new_message", "message_read", "new_message"]
    assert kinds == [*expected, "message_read"]
    assert (poll["more"], poll["resync"]) == (False, False)
    assert poll["cursor"].partition(".")[0] == start.partition(".")[0]
    seq = poll["events"][2]["seq"]
    epoch = start.partition(".")[0]
    page = await server.want(200, f"GET /api/v1/events?cursor={start}&limit=3", token)
    assert (page["more"], page["cursor"]) == (True, f"{epoch}.{seq}")

    ticket = await server.want(200, "GET /api/v2/ws-token", token)
    assert ticket["expires_in"] == 60
    assert (await server.ask("GET", "/ws/chat")).code == "upgrade_required"
    assert (await server.ask("GET", "/ws/chat")).status == 426
    revoked = {"user_id": cy}
    answer = await server.want(
        200, "POST /api/v1/internal/chat/revoke", server.service, revoked
    )
    assert answer == {"user_id": cy, "closed": 0}


async def test_the_error_of_a_bad_request_names_the_wrong_field(
    shared_server: ServerProcess,
) -> None:
    server = shared_server
    ann = next(new_users)
    chat, token = await server.chat(ann), server.token(ann)
    messages = f"/api/v1/chats/{chat}/messages"
    ids: list[object] = ["3", 1.5, True, None, [], {}, 0, -1, 2**53]
    wrong: list[tuple[str, str, list[object]]] = [
        ("/api/v1/chats", "title", [3, True, [], {}]),
        ("/api/v1/chats", "member_ids", ["3", 3, {}, *([i] for i in ids)]),
        (f"/api/v1/chats/{chat}/members", "user_id", ids),
        (messages, "content", [3, None, True, [], {}, "x" * 4001, "a\0b"]),
        (messages, "client_id", [3, True, [], "", "x" * 65, "é", "a\nb", "\x7f"]),
        ("/api/v1/internal/chat/revoke", "user_id", ids),
    ]
    whole = {"title": "t", "member_ids": [], "user_id": ann, "content": "c"}
    async with await server.dial() as line:  # a refused body must not close it
        for target, name, values in wrong:
            for value in values:
                body = {**whole, name: value}
                right = server.service if "internal" in target else token
                answer = await line.ask("POST", target, body, token=right)
                seen = (target, body, answer)
                assert (answer.status, answer.code) == (400, "bad_field"), seen
                assert name in answer.json["error"]["message"], seen
        for value in (value for value in ids if value is not None):
            body = {"content": "c", "sender_id": value}
            answer = await line.ask("POST", messages, body, token=server.service)
            assert (answer.status, answer.code) == (400, "bad_field"), (body, answer)
            assert "sender_id" in answer.json["error"]["message"], answer
        queries = [f"{messages}?limit={v}" for v in ("0", "101", "x", "-1", "1.5")]
        queries += [f"{messages}?before={v}" for v in ("x", "-1", str(2**63))]
        queries += [f"/api/v1/events?limit={v}" for v in ("0", "501", "x", "")]
        for target in queries:
            answer = await line.ask("GET", target, token=token)
            assert (answer.status, answer.code) == (400, "bad_field"), (target, answer)
            name = target.partition("?")[2].partition("=")[0]
            assert name in answer.json["error"]["message"], (target, answer)
        bodies = [
            b"",
            b"{",
            b"[]",
            b"3",
            b'"x"',
            b"null",
            b"\xff",
            b'{"content":"\xff"}',
        ]
        bodies += [
            b"[" * 30000,
            b'{"a":' * 5000,
            b'{"content":NaN}',
            b'{"content":1e999}',
        ]
        for text in bodies:
            answer = await line.ask("POST", messages, text, token=token)
            code = "bad_field" if text == b'{"content":1e999}' else "bad_json"
            assert answer.status == 400, (text[:40], answer)
            assert answer.code in {"bad_json", code}, (text[:40], answer)
        for part in ("0", "x", str(2**53), str(10**30), "-1", "%31", ""):
            answer = await line.ask(
                "GET", f"/api/v1/chats/{part}/messages", token=token
            )
            assert answer.status in {400, 404}, (part, answer)
    assert await server.history(chat, ann) == []


async def test_head_and_unknown_methods_are_answered_correctly(
    shared_server: ServerProcess,
) -> None:
    server = shared_server
    user = next(new_users)
    targets = ["/healthz", "/api/v1/me", "/api/v1/chats", "/", "/nothing", "/ws/chat"]
    async with await server.dial() as line:  # a body after HEAD would be an answer
        for target in targets:
            get = await line.ask("GET", target, token=server.token(user))
            head = await line.ask("HEAD", target, token=server.token(user))
            assert head.status == get.status, target
            same = ("content-length", "content-type")
            assert [head.headers[k] for k in same] == [get.headers[k] for k in same]
        allowed = {
            "/healthz": {"GET", "HEAD"},
            "/api/v1/chats": {"GET", "HEAD", "POST"},
            "/api/v1/session": {"POST"},
            "/api/v1/chats/1/members/1": {"DELETE"},
        }
        for target, methods in allowed.items():
            for method in ("BREW", "PATCH"):
                answer = await line.ask(method, target, token=server.token(user))
                assert (answer.status, answer.code) == (405, "method_not_allowed")
                allow = {word.strip() for word in answer.headers["allow"].split(",")}
                assert methods <= allow <= methods | {"OPTIONS"}, (target, answer)
        answer = await line.ask("BREW", "/nothing", token=server.token(user))
        assert (answer.status, answer.code) == (404, "not_found")
    answer = await server.ask("POST", "/ws/chat", server.token(user), {})
    assert answer.status == 405


async def test_one_connection_serves_many_requests(
    shared_server: ServerProcess,
) -> None:
    server = shared_server
    user = next(new_users)
    async with await server.dial() as line:
        for _ in range(20):
            answer = await line.ask("GET", "/api/v1/me", token=server.token(user))
            assert answer.json["user_id"] == user
            assert (await line.ask("GET", "/nothing")).status == 404
            assert (await line.ask("GET", "/api/v1/me")).status == 401
        ask = get_bytes("/healthz", "Host: x")
        await line.send(ask * 10)  # ten at once, answered in order
        for _ in range(10):
            assert (await line.answer()).status == 200
        chunked = "POST /api/v1/chats HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked"
        chunked += f"\r\nAuthorization: Bearer {server.token(user)}\r\n\r\n"
        body = '9\r\n{"title":\r\n17\r\n"é", "member_ids": []}\r\n0\r\n\r\n'
        await line.send((chunked + body).encode())
        answer = await line.answer()
        assert (answer.status, answer.json["chat"]["title"]) == (201, "é")
        upgrade = upgrade_bytes(server.socket_path(user))
        await line.send(upgrade)  # as reverse proxies do
        assert (await line.answer()).status == 101
        peer = SocketClient(line.stream, line.data)
        await peer.receive("connected")
        await peer.leave()
    close = await server.raw(get_bytes("/healthz", "Host: x", "Connection: close"))
    assert split_answer(close)[0].status == 200
    old = await server.raw(get_bytes("/healthz", version="1.0"))
    assert old.startswith(b"HTTP/1.1 ")


async def test_a_body_over_the_limit_is_refused_before_it_is_read(
    either_server: ServerProcess,
) -> None:
    server = either_server
    token = server.token(next(new_users))
    answer = await server.ask("POST", "/api/v1/chats", token, b"x" * 65537)
    assert (answer.status, answer.code) == (413, "too_large")
    lines = ["POST /api/v1/chats HTTP/1.1", "Host: x", f"Authorization: Bearer {token}"]
    declared = [*lines, "Content-Length: 999999999", "", ""]
    got = await server.raw("\r\n".join(declared).encode(), 5)
    assert split_answer(got)[0].code == "too_large"
    chunks = "10000\r\n" + "x" * 65536 + "\r\n1\r\nx\r\n0\r\n\r\n"
    chunked = [*lines, "Transfer-Encoding: chunked", "", chunks]
    got = await server.raw("\r\n".join(chunked).encode(), 5)
    assert split_answer(got)[0].code == "too_large"


async def test_only_a_listed_origin_may_send_cross_origin_requests(
    server: ServerProcess,
) -> None:
    ours, theirs = "https://app.example", "https://evil.example"
    async with server.serving("--origin", ours):
        user = next(new_users)
        token = server.token(user)
        answer = await server.ask("GET", "/api/v1/me", token, Origin=ours)
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == ours
        assert "access-control-allow-credentials" not in answer.headers
        assert "origin" in answer.headers["vary"].lower()
        unauthorised = await server.ask("GET", "/api/v1/me", Origin=ours)
        assert unauthorised.status == 401
        assert unauthorised.headers["access-control-allow-origin"] == ours
        asks = {"Access_Control_Request_Method": "POST", "Origin": ours}
        answer = await server.ask("OPTIONS", "/api/v1/chats", **asks)
        assert answer.status == 204
        allowed = answer.headers["access-control-allow-headers"].lower()
        assert {word.strip() for word in allowed.split(",")} == {
            "authorization",
            "content-type",
            "idempotency-key",
        }
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-origin"] == ours
        same = await server.ask(
            "GET", "/api/v1/me", token, Origin="http://chat.example"
        )
        assert same.status == 200
        proxied = {"Origin": "https://chatd.test", "X_Forwarded_Host": "chatd.test"}
        assert (await server.ask("GET", "/api/v1/me", token, **proxied)).status == 200
        for origin in (theirs, "null", "http://chat.example.evil.example", f"{ours}."):
            for target in ("/api/v1/me", "/", "/healthz"):
                answer = await server.ask("GET", target, token, Origin=origin)
                assert (answer.status, answer.code) == (403, "forbidden"), origin
                assert "access-control-allow-origin" not in answer.headers
            refused = await server.refusal(user, Origin=origin)
            assert (refused.status, refused.code) == (403, "forbidden"), origin
        peer = await server.peer(user, Origin=ours)
        await peer.receives_nothing()
        await server.stop()
        await server.begin(*NO_RATES, "--trusted-proxy", "none")
        token = server.token(user)
        assert (await server.ask("GET", "/api/v1/me", token, **proxied)).status == 403


# --- whole process: hostile requests -------------------------------------------------


def hostile_requests(ws: str) -> dict[str, tuple[bytes, set[int]]]:
    """Requests that must be refused, with the statuses allowed.

    ws: a target that would open a socket.
    """
    up = list(UPGRADE_LINES)
    host, key = "Host: chatd.test", up.pop()
    good = [host, *up, key]
    token = ws.partition("=")[2]
    post = f"Authorization: Bearer {token}"
    noise = random.Random(7).randbytes(5000)
    smuggle = "POST /api/v1/chats HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"
    smuggle += f"{post}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    plain = "POST /api/v1/chats HTTP/1.1\r\nHost: x\r\n"
    xs = [f"X-{i}: y" for i in range(65)]
    return {
        "random bytes": (noise + b"\r\n\r\n", {400, 431}),
        "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", {400}),
        "another protocol": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", {400}),
        "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\n", {400, 505}),
        "no Host": (get_bytes(ws, *up, key), {400}),
        "two Hosts": (get_bytes(ws, host, host, *up, key), {400}),
        "byte 255 in Host": (get_bytes(ws, "Host: \xff", *up, key), {400}),
        "byte 255 in Connection": (get_bytes(ws, *good, "Connection: \xff"), {400}),
        "byte 255 in Upgrade": (get_bytes(ws, *good, "Upgrade: \xff"), {400}),
        "byte 255 in the key": (
            get_bytes(ws, host, *up, "Sec-WebSocket-Key: \xff"),
            {400},
        ),
        "byte 255 in the protocol": (
            get_bytes(ws, *good, "Sec-WebSocket-Protocol: \xff"),
            {400},
        ),
        "byte 255 in the extensions": (
            get_bytes(ws, *good, "Sec-WebSocket-Extensions: \xff"),
            {400},
        ),
        "byte 255 in the version": (
            get_bytes(ws, *good, "Sec-WebSocket-Version: \xff"),
            {400, 426},
        ),
        "byte 255 in the target": (get_bytes(ws + "\xff", *good), {400}),
        "a bad key": (get_bytes(ws, host, *up, "Sec-WebSocket-Key: zz"), {400}),
        "a key of 15 bytes": (
            get_bytes(ws, host, *up, "Sec-WebSocket-Key: MTIzNDU2Nzg5MDEyMzQ1"),
            {400},
        ),
        "two keys": (get_bytes(ws, *good, key), {400}),
        "no key": (get_bytes(ws, host, *up), {400}),
        "version 12": (
            get_bytes(ws, host, *up[:2], "Sec-WebSocket-Version: 12", key),
            {400, 426},
        ),
        "HTTP/1.0": (get_bytes(ws, *good, version="1.0"), {400, 426, 505}),
        "two tokens": (get_bytes(f"{ws}&token={token}", *good), {400, 401}),
        "no token": (get_bytes("/ws/chat", *good), {401}),
        "an empty token": (get_bytes("/ws/chat?token=", *good), {401}),
        "two slashes": (get_bytes("/" + ws, *good), {400, 404}),
        "two slashes and a bracket": (get_bytes("//[::1" + ws, *good), {400, 404}),
        "a whole URL of another scheme": (
            get_bytes("gopher://chatd.test" + ws, *good),
            {400, 404},
        ),
        "no slash": (get_bytes("*", *good), {400, 404}),
        "an upgrade with a body": (
            get_bytes(ws, *good, "Content-Length: 5") + b"hello",
            {400},
        ),
        "an upgrade with a length beside chunks": (
            get_bytes(ws, *good, "Content-Length: 4", "Transfer-Encoding: chunked"),
            {400},
        ),
        "length beside chunks": (smuggle.encode(), {400}),
        "two lengths": (
            f"{plain}Content-Length: 1\r\nContent-Length: 2\r\n\r\n".encode(),
            {400},
        ),
        "a negative length": (f"{plain}Content-Length: -1\r\n\r\n".encode(), {400}),
        "a bad chunk": (
            f"{plain}{post}\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
            {400},
        ),
        "another coding": (
            f"{plain}{post}\r\nTransfer-Encoding: gzip\r\n\r\n".encode(),
            {400, 501},
        ),
        "a huge header": (get_bytes(ws, *good, "X: " + "y" * 100_000), {431}),
        "a huge target": (get_bytes(ws + "&x=" + "y" * 100_000, *good), {414, 431}),
        "65 header lines": (get_bytes(ws, *good, *xs[: 65 - len(good)]), {431}),
        "a space before the colon": (get_bytes(ws, *good, "X : y"), {400}),
        "a bare CR": (get_bytes(ws, *good, "X: y\rz"), {400}),
        "a NUL": (get_bytes(ws, *good, "X: y\0z"), {400}),
    }


@pytest.mark.parametrize("case", list(hostile_requests("")))
async def test_a_hostile_request_is_refused_and_harms_no_other_client(
    either_server: ServerProcess, case: str
) -> None:
    async with others_are_served(either_server):
        ws = either_server.socket_path(next(new_users))
        data, statuses = hostile_requests(ws)[case]
        got = await either_server.raw(data, 4)
        answer, rest = split_answer(got)
        assert answer.status in statuses, answer
        # A 426 says Upgrade there, too.
        assert "close" in answer.headers["connection"].lower().split(", ")
        assert answer.code
        assert not rest


async def test_a_handshake_with_64_header_lines_is_accepted(
    shared_server: ServerProcess,
) -> None:
    more: dict[str, Any] = {f"X-{i}": "y" for i in range(63 - len(UPGRADE_LINES))}
    peer = await shared_server.peer(next(new_users), **more)
    await peer.receives_nothing()


@with_server()
async def test_a_removed_member_gets_no_later_text_by_repeating_a_send(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    path, body = f"/api/v1/chats/{chat}/messages", {"content": "hi", "client_id": "k"}
    message = (await server.ask("POST", path, body, user=6)).json["message"]["id"]
    await server.command("DELETE", f"/api/v1/chats/{chat}/members/6")
    assert (await server.ask("POST", path, body, user=6)).status == 200  # its own text
    edit = {"content": "by a service"}
    where = f"/api/v1/messages/{message}"
    await server.command("PATCH", where, edit)
    assert (await server.ask("POST", path, body, user=6)).status == 404
