"""The proxy, between socket pairs under virtual time, and as a process.

The test plays the client on one side and the upstream on the other, both in bytes. It
asserts what reaches the other end, and what does not.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import h11
import hypothesis
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

import chatd
from chatd import Keyring, Rate, Refusal, Settings
from tests.client import (
    ACCEPT_KEY,
    TEXT,
    Disconnected,
    ProxyProcess,
    RawClient,
    ServerProcess,
    close_bytes,
    command_bytes,
    frame_bytes,
    get_bytes,
    new_users,
    node_path,
    refuses_connections,
    request_bytes,
    reset,
    upgrade_bytes,
)
from tests.harness import (
    BAD_HEADS,
    PROXY_101,
    PROXY_OK,
    TEST_SECRET,
    VirtualProxy,
    proxied,
    proxy_run,
    taking,
)

# --- requests go up ------------------------------------------------------------------


async def pass_up(
    proxy: VirtualProxy, request: bytes = request_bytes("GET", "/"), behind: bytes = b""
) -> tuple[RawClient, RawClient]:
    """Send a request, and bytes behind it; wait until the upstream has read it whole.

    Return the client's connection and the upstream's.
    """
    raw = proxy.dial()
    await raw.send(request, behind)
    up = await proxy.upstream()
    await proxy.request(up)
    return raw, up


async def refused(
    proxy: VirtualProxy, sent: bytes, status: int, code: str = ""
) -> RawClient:
    """Send a request; claim that the proxy answers with this status and closes."""
    raw = proxy.dial()
    await raw.send(sent)
    answer = await raw.answer()
    assert answer.status == status
    assert answer.headers["connection"] == "close"
    assert code in {"", answer.code}
    assert await raw.ends() == b""
    return raw


@proxied()
async def test_a_request_is_passed_up_and_its_answer_comes_down_unchanged(
    proxy: VirtualProxy,
) -> None:
    sent = request_bytes(
        "POST", "/api/v1/chats?a=%20b", b'{"title":"T"}', Authorization="Bearer x.y",
        Idempotency_Key="k", Origin="http://chat.example",
    )  # fmt: skip
    answer = b"HTTP/1.1 201 Created\r\nETag: x\r\nContent-Length: 4\r\n\r\nmade"
    got, received = await proxy.exchange(sent, answer)
    assert (got.method, got.target) == ("POST", "/api/v1/chats?a=%20b")
    assert got.body == b'{"title":"T"}'
    assert got.header("authorization") == "Bearer x.y"
    assert got.header("idempotency-key") == "k"
    assert got.header("origin") == "http://chat.example"
    assert got.header("host") == "chat.example"
    assert got.header("connection") == "close"
    assert (received.status, received.body, received.headers["etag"]) == (
        201,
        b"made",
        "x",
    )


@proxied()
@pytest.mark.parametrize(
    ("target", "host", "path"),
    [
        ("http://chat.example.org/api/v1/me?a=1", "chat.example.org", "/api/v1/me?a=1"),
        ("HTTPS://[::1]:8086", "[::1]:8086", "/"),
        ("http://chat.example.org?a", "chat.example.org", "/?a"),
    ],
)
async def test_a_whole_url_goes_up_as_its_path_and_its_host(
    proxy: VirtualProxy, target: str, host: str, path: str
) -> None:
    got, _ = await proxy.exchange(request_bytes("GET", target))
    assert (got.target, got.header("host")) == (path, host)
    assert got.header("x-forwarded-host") == host


@proxied(trusted_proxy=("127.0.0.0/8",))
@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("203.0.113.3:1000", "203.0.113.3"),
        ('6.6.6.6, "[2001:db8::1]:443"', "2001:db8::1"),
        ("203.0.113.3, unknown", "127.0.0.1"),
    ],
)
async def test_an_address_with_a_port_goes_up_without_it(
    proxy: VirtualProxy, forwarded: str, client: str
) -> None:
    request = request_bytes("GET", "/", X_Forwarded_For=forwarded)
    got, _ = await proxy.exchange(request)
    assert got.header("x-forwarded-for") == client
    assert proxy.log
    messages = proxy.log.messages
    logged = [line for line in messages if line.startswith("unread_address")]
    assert len(logged) == forwarded.endswith("unknown")


@proxied()
async def test_a_token_sent_as_the_method_is_passed_up_and_not_logged(
    proxy: VirtualProxy,
) -> None:
    token = proxy.app.keyring.sign(6, 600)
    got, _ = await proxy.exchange(request_bytes(token, "/api/v1/me"), method=token)
    assert got.method == token


FORGED = {
    "X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "evil.example", "X-Forwarded-Port": "1",
    "Forwarded": "for=6.6.6.6", "X-Real-IP": "6.6.6.6", "x-FORWARDED-for": "6.6.6.7",
}  # fmt: skip


@proxied()
async def test_a_client_cannot_set_its_own_address(proxy: VirtualProxy) -> None:
    got, _ = await proxy.exchange(request_bytes("GET", "/", **FORGED))
    assert got.header("x-forwarded-for") == "127.0.0.1"
    assert got.header("x-forwarded-proto") == "http"
    assert got.header("x-forwarded-host") == "chat.example"
    assert not got.names & {"forwarded", "x-real-ip", "x-forwarded-port"}
    assert not any("6.6.6" in value for _, value in got.headers)


@proxied(trusted_proxy=("127.0.0.0/8",))
async def test_a_trusted_proxy_in_front_sets_the_clients_address(
    proxy: VirtualProxy,
) -> None:
    forged = FORGED | {
        "X-Forwarded-For": "6.6.6.6, 9.9.9.9, 127.0.0.5",
        "X-Forwarded-Host": "chat.example.org",
    }
    del forged["x-FORWARDED-for"]
    got, _ = await proxy.exchange(request_bytes("GET", "/", **forged))
    assert got.header("x-forwarded-for") == "9.9.9.9"
    assert got.header("x-forwarded-proto") == "https"
    assert got.header("x-forwarded-host") == "chat.example.org"
    assert not got.names & {"forwarded", "x-real-ip", "x-forwarded-port"}


@proxied()
async def test_hop_by_hop_headers_are_not_passed_up(proxy: VirtualProxy) -> None:
    hop = {
        "Connection": "keep-alive, X-Mine, Host, Content-Length, X-Forwarded-For",
        "Keep-Alive": "5", "TE": "trailers", "Trailer": "x", "Upgrade": "h2c",
        "Proxy-Connection": "x", "Proxy-Authorization": "x", "X-Mine": "1",
        "X-Your": "2",
    }  # fmt: skip
    got, _ = await proxy.exchange(request_bytes("POST", "/", b"body", **hop))
    assert got.names == {
        "host", "x-your", "content-length", "connection", "via", "x-forwarded-for",
        "x-forwarded-host", "x-forwarded-proto",
    }  # fmt: skip
    assert (got.body, got.header("via")) == (b"body", "1.1 chatd")
    assert got.header("x-forwarded-for") == "127.0.0.1"
    assert got.header("connection") == "close"


@proxied()
async def test_a_body_goes_up_with_a_content_length_even_if_it_came_in_chunks(
    proxy: VirtualProxy,
) -> None:
    chunks = b"3;x=y\r\nabc\r\n5\r\ndefgh\r\n0\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n"
    sent = request_bytes("POST", "/", Transfer_Encoding="chunked") + chunks
    got, _ = await proxy.exchange(sent)
    assert got.body == b"abcdefgh"
    assert got.header("content-length") == "8"
    assert "transfer-encoding" not in got.names
    assert got.header("x-forwarded-for") == "127.0.0.1"
    got, _ = await proxy.exchange(request_bytes("POST", "/", b""))
    assert (got.body, got.header("content-length")) == (b"", "0")
    got, _ = await proxy.exchange(request_bytes("GET", "/"))
    assert "content-length" not in got.names
    got, _ = await proxy.exchange(request_bytes("POST", "/", b"x" * 65_536))
    assert got.body == b"x" * 65_536


@proxied()
async def test_the_request_goes_up_in_the_clients_version_of_http(
    proxy: VirtualProxy,
) -> None:
    old = b"POST / HTTP/1.0\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nok"
    got, _ = await proxy.exchange(old)  # HTTP/1.0 has no 100
    assert (got.version, got.body) == ("1.0", b"ok")
    assert got.header("host") == "chat.example:8086"
    assert got.header("via") == "1.0 chatd"
    got, _ = await proxy.exchange(request_bytes("GET", "/"))
    assert (got.version, got.header("via")) == ("1.1", "1.1 chatd")


TOO_LARGE: dict[str, bytes] = {
    "by its length": request_bytes("POST", "/", Content_Length="65537"),
    "by its length, expecting 100": request_bytes(
        "POST", "/", Content_Length="65537", Expect="100-continue"
    ),
    "in chunks": (
        request_bytes("POST", "/", Transfer_Encoding="chunked")
        + b"8000\r\n" + b"x" * 0x8000 + b"\r\n8001\r\n" + b"x" * 0x8001
    ),
    "by the number of its chunks": (
        request_bytes("POST", "/", Transfer_Encoding="chunked") + b"1\r\nx\r\n" * 1025
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TOO_LARGE)
@proxied()
async def test_a_body_that_is_too_large_is_413_and_reaches_no_upstream(
    proxy: VirtualProxy, what: str
) -> None:
    raw = await refused(proxy, TOO_LARGE[what], 413, "too_large")
    assert raw.informed == []
    assert proxy.dials == 0


@proxied()
async def test_a_request_in_single_bytes_goes_up_like_a_whole_one(
    proxy: VirtualProxy,
) -> None:
    raw = proxy.dial()
    sent = request_bytes("POST", "/", b"body")
    for number in range(len(sent)):
        await raw.send(sent[number : number + 1])
        await wait_all_tasks_blocked()
    up = await proxy.upstream()
    assert (await proxy.request(up)).body == b"body"
    await up.send(PROXY_OK)
    assert (await raw.answer()).body == b"ok"


@pytest.mark.parametrize("body", [None, b"body"])
@proxied()
async def test_a_second_request_on_a_connection_is_never_passed_up(
    proxy: VirtualProxy, body: bytes | None
) -> None:
    raw = proxy.dial()
    second = request_bytes("GET", "/api/v1/me", X_Forwarded_For="6.6.6.6")
    await raw.send(request_bytes("POST", "/", body), second)
    up = await proxy.upstream()
    got = await proxy.request(up)
    assert got.body == (body or b"")
    assert up.data == b""
    answer = b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n"
    await up.send(answer)
    assert await raw.receives(len(answer)) == answer
    await raw.send(second)  # nor is it passed up after the answer
    await up.listen(1)
    await up.stream.send_eof()
    assert await raw.finishes() == answer
    assert await up.ends() == b""
    assert proxy.dials == 1


@proxied()
async def test_an_answer_of_the_proxys_own_ends_the_connection_too(
    proxy: VirtualProxy,
) -> None:
    proxy.fault = ConnectionRefusedError(111, "Connection refused")
    await refused(proxy, request_bytes("GET", "/") * 2, 502, "upstream")
    assert proxy.dials == 1


@pytest.mark.parametrize("fault", [*BAD_HEADS])
@proxied()
async def test_a_bad_head_reaches_no_upstream(proxy: VirtualProxy, fault: str) -> None:
    sent, status = BAD_HEADS[fault]
    await refused(proxy, sent, status)
    assert proxy.dials == 0


# Requests that have fooled proxies. Each is refused.
SMUGGLED: dict[str, bytes] = {
    "chunks in HTTP/1.0": (
        b"POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "chunks by another name": request_bytes("POST", "/", Transfer_Encoding="xchunked"),
    "chunks twice": request_bytes("POST", "/", Transfer_Encoding="chunked, chunked"),
    "chunks of a chunk": request_bytes("POST", "/", Transfer_Encoding="gzip, chunked"),
    "a space before the colon": (
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length : 5\r\n\r\nhello"
    ),
    "a NUL": b"GET / HTTP/1.1\r\nHost: x\r\nA: b\0c\r\n\r\n",
    "a bare CR": b"GET / HTTP/1.1\r\nHost: x\r\nA: b\rX-Forwarded-For: 6.6.6.6\r\n\r\n",
    "a length with a plus": request_bytes("POST", "/", Content_Length="+5") + b"hello",
    "a length in hex": request_bytes("POST", "/", Content_Length="0x5") + b"hello",
    "lengths that differ": (
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 6\r\n\r\nhello"
    ),
    "a tunnel": b"CONNECT /x HTTP/1.1\r\nHost: x\r\n\r\n",
    "a line that is none": b"GET / HTTP/1.1\r\nHost: x\r\nnonsense\r\n\r\n",
    "two versions": b"GET / HTTP/1.1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a header before the line": b" GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("what", SMUGGLED)
@proxied()
async def test_a_request_that_two_servers_may_read_differently_is_refused(
    proxy: VirtualProxy, what: str
) -> None:
    await refused(proxy, SMUGGLED[what], 400, "bad_field")
    assert proxy.dials == 0


@proxied()
async def test_an_untidy_but_clear_request_is_written_anew(proxy: VirtualProxy) -> None:
    untidy = (
        b"GET / HTTP/1.1\nHost: x\nA: b\r\n c\nContent-Length: 2, 2\r\n"
        b"content-length: 2\r\n\r\nok"
    )
    raw = proxy.dial()
    await raw.send(untidy)
    up = await proxy.upstream()
    await up.listen(1)
    head, _, body = bytes(up.data).partition(b"\r\n\r\n")
    assert head.replace(b"\r\n", b"").count(b"\n") == 0
    assert b"\r\na: b c\r\n" in head
    assert [line.lower() for line in head.split(b"\r\n")].count(
        b"content-length: 2"
    ) == 1
    assert body == b"ok"


PIECES = (
    b"GET / HTTP/1.1\r\n", b"POST /api/v1/chats HTTP/1.1\r\n", b"POST / HTTP/1.0\r\n",
    b"Host: x\r\n", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n",
    b"Connection: keep-alive, Content-Length\r\n", b"Upgrade: websocket\r\n",
    b"X-Forwarded-For: 6.6.6.6\r\n", b" folded\r\n", b"\r\n", b"\n", b"\r", b"\0",
    b"5\r\nhello\r\n", b"0\r\n\r\n", b"hello", b": ", b"\xff",
    request_bytes("GET", "/", X_Forwarded_For="6.6.6.6"),
    request_bytes("POST", "/", b"hello"),
    request_bytes("POST", "/", Transfer_Encoding="chunked"),
)  # fmt: skip


@hypothesis.settings(deadline=None)
@given(
    st.sampled_from((b"", *PIECES[-3:])), st.lists(st.sampled_from(PIECES), max_size=9)
)
def test_whatever_a_client_sends_at_most_one_request_goes_up(
    first: bytes, pieces: list[bytes]
) -> None:
    async def main(proxy: VirtualProxy) -> None:
        raw = proxy.dial()
        await raw.send(first, *pieces)
        await raw.stream.send_eof()
        await wait_all_tasks_blocked()
        if proxy.dials:
            up = await proxy.upstream()
            await up.listen(1)
            with suppress(trio.BrokenResourceError):
                await up.send(PROXY_OK)
            side, sent = h11.Connection(h11.SERVER), [bytes(up.data)]
            side.receive_data(sent[0])
            head = side.next_event()
            assert isinstance(head, h11.Request)
            names = [name for name, _ in head.headers]
            assert names.count(b"x-forwarded-for") == names.count(b"host") == 1
            assert (b"x-forwarded-for", b"127.0.0.1") in head.headers
            assert (b"connection", b"close") in head.headers
            while side.their_state is h11.SEND_BODY:
                assert side.next_event() is not h11.NEED_DATA  # the body is whole
            assert side.trailing_data[0] == b""
            up.stream.socket.close()
        await raw.ends()
        assert proxy.dials <= 1

    proxy_run(main)


@pytest.mark.parametrize(
    "body", [b"3\r\nabcX", b"-1\r\n", b"3\r\nabc\r\nzz\r\n", b"3\nabc\r\n0\r\n\r\n"]
)
@proxied()
async def test_a_malformed_body_is_400_and_reaches_no_upstream(
    proxy: VirtualProxy, body: bytes
) -> None:
    sent = request_bytes("POST", "/", Transfer_Encoding="chunked")
    await refused(proxy, sent + body, 400)
    assert proxy.dials == 0


@pytest.mark.parametrize("end", [trio.SocketStream.send_eof, trio.SocketStream.aclose])
@pytest.mark.parametrize(
    "frame", [{"Content_Length": "10"}, {"Expect": "100-continue"}]
)
@proxied()
async def test_a_client_that_disconnects_in_mid_body_reaches_no_upstream(
    proxy: VirtualProxy,
    end: Callable[[trio.SocketStream], Awaitable[None]],
    frame: dict[str, str],
) -> None:
    raw = proxy.dial()
    await raw.send(request_bytes("POST", "/", **{"Content_Length": "10"} | frame))
    await raw.send(b"hello")
    await wait_all_tasks_blocked()
    await end(raw.stream)
    await wait_all_tasks_blocked()
    assert proxy.dials == 0
    assert not proxy.app.listener.open


@proxied()
async def test_a_client_that_shuts_down_its_side_still_gets_its_answer(
    proxy: VirtualProxy,
) -> None:
    raw = proxy.dial()
    await raw.send(request_bytes("GET", "/"))
    await raw.stream.send_eof()
    up = await proxy.upstream()
    await proxy.request(up)
    await up.send(PROXY_OK)
    assert (await raw.answer()).body == b"ok"


@proxied()
async def test_a_client_that_waits_for_100_gets_it_from_the_proxy(
    proxy: VirtualProxy,
) -> None:
    raw = proxy.dial()
    await raw.send(
        request_bytes("POST", "/", Content_Length="4", Expect="100-continue")
    )
    await raw.receives(1)
    assert raw.data.startswith(b"HTTP/1.1 100 ")
    assert proxy.dials == 0  # the body is read first
    await raw.send(b"body")
    up = await proxy.upstream()
    got = await proxy.request(up)
    assert got.body == b"body"
    assert "expect" not in got.names
    await up.send(PROXY_OK)
    assert (await raw.answer()).body == b"ok"
    assert raw.informed == [100]


@pytest.mark.parametrize("drips", [False, True])
@proxied()
async def test_a_body_that_takes_more_than_15_s_is_408_and_reaches_no_upstream(
    proxy: VirtualProxy, drips: bool
) -> None:
    raw = proxy.dial()
    await raw.send(request_bytes("POST", "/", Content_Length="100"), b"hello")

    async def drip() -> None:
        while drips:
            await trio.sleep(1)
            await raw.send(b"x")

    with taking(15):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            answer = await raw.answer(within=30)
            nursery.cancel_scope.cancel()
    assert (answer.status, answer.code) == (408, "timeout")
    assert await raw.ends(within=2) == b""
    assert proxy.dials == 0


# --- answers come down ---------------------------------------------------------------


# Each comes down byte for byte, so the client gets the upstream's own framing.
ANSWERS: dict[str, tuple[str, bytes, int, bytes]] = {
    "a length": ("GET", PROXY_OK, 200, b"ok"),
    "chunks": (
        "GET",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        200,
        b"ok",
    ),
    "up to the end": ("GET", b"HTTP/1.1 200 OK\r\n\r\nok", 200, b"ok"),
    "HTTP/1.0": ("GET", b"HTTP/1.0 200 OK\r\n\r\nok", 200, b"ok"),
    "HEAD": ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", 200, b""),
    "HEAD of chunks": (
        "HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 200, b"",
    ),
    "204": ("DELETE", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    "304": ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", 304, b""),
    "an idle 100": ("GET", b"HTTP/1.1 100 C\r\n\r\n" + PROXY_OK, 200, b"ok"),
    "503": (
        "GET", b"HTTP/1.1 503 Full\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n", 503,
        b"",
    ),
    "300 KB": (
        "GET",
        b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000,
        200,
        b"x" * 300_000,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ANSWERS)
@proxied()
async def test_an_answer_of_any_framing_comes_down_unchanged(
    proxy: VirtualProxy, what: str
) -> None:
    method, answer, status, body = ANSWERS[what]
    got, received = await proxy.exchange(request_bytes(method, "/"), answer, method)
    assert got.method == method
    assert (received.status, received.body) == (status, body)


@proxied()
async def test_an_answer_in_single_bytes_comes_down_like_a_whole_one(
    proxy: VirtualProxy,
) -> None:
    raw, up = await pass_up(proxy)
    for number in range(len(PROXY_OK)):
        await up.send(PROXY_OK[number : number + 1])
        await wait_all_tasks_blocked()
    assert (await raw.answer()).body == b"ok"
    up.stream.socket.close()
    assert await raw.finishes() == b""


NOT_HTTP: dict[str, bytes] = {
    "nothing": b"",
    "half a status line": b"HTTP/1.1 20",
    "no HTTP": b"220 smtp.example ESMTP\r\n" * 10,
    "HTTP/2": b"HTTP/2.0 200 OK\r\n\r\n",
    "a status of 099": b"HTTP/1.1 099 OK\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "no status": b"HTTP/1.1 OK, here it is\r\n\r\n",
    "something before it": b"\r\nHTTP/1.1 200 OK\r\n\r\n",
}


@pytest.mark.parametrize("asked", ["a request", "an upgrade"])
@pytest.mark.parametrize("what", NOT_HTTP)
@proxied()
async def test_an_answer_that_does_not_begin_like_http_is_502(
    proxy: VirtualProxy, what: str, asked: str
) -> None:
    upgrade = upgrade_bytes(proxy.target())
    raw, up = await pass_up(
        proxy, upgrade if asked == "an upgrade" else request_bytes("GET", "/")
    )
    await up.send(NOT_HTTP[what])
    up.stream.socket.close()
    answer = await raw.answer()
    assert (answer.status, answer.code) == (502, "upstream")
    assert await raw.ends() == b""
    assert proxy.dials == 1  # the request is never sent twice


HALVES: dict[str, bytes] = {
    "a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "a status line": b"HTTP/1.1 200",
    "a length": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"),
}


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("end", ["closes", "resets", "breaks its frame", "hangs"])
@pytest.mark.parametrize("what", HALVES)
@proxied()
async def test_an_answer_that_breaks_off_never_looks_whole(
    proxy: VirtualProxy, what: str, end: str, version: str
) -> None:
    if end == "breaks its frame" and what == "a length":
        return  # no byte can break it
    half = HALVES[what]
    raw, up = await pass_up(proxy, f"GET / HTTP/{version}\r\nHost: x\r\n\r\n".encode())
    await up.send(half)
    assert await raw.receives(len(half)) == half
    if end == "breaks its frame":
        half += b"\0\r\n\r\n"
        await up.send(b"\0\r\n\r\n")
    if end == "resets":
        reset(up.stream)
    elif end != "hangs":
        up.stream.socket.close()
    if end in ("resets", "hangs"):
        with (
            taking(20 if end == "hangs" else 0),
            pytest.raises(trio.BrokenResourceError),
        ):
            await raw.finishes(within=30)
    else:
        assert await raw.finishes() == half
    with pytest.raises((h11.RemoteProtocolError, trio.BrokenResourceError)):
        await raw.answer()


@proxied(max_message_bytes=1_000_000)
async def test_an_answer_that_comes_in_mid_request_reaches_the_client(
    proxy: VirtualProxy,
) -> None:
    proxy.small = True
    raw = proxy.dial()
    answer = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raw.send, request_bytes("POST", "/", b"x" * 1_000_000))
        up = await proxy.upstream()
        await up.receives(1)
        await up.send(answer)
        up.stream.socket.shutdown(socket.SHUT_RDWR)  # most of the request is unread
    assert await raw.finishes() == answer


@proxied()
async def test_an_unreachable_upstream_is_502_with_a_sentence_and_one_log_line(
    proxy: VirtualProxy,
) -> None:
    proxy.fault = ConnectionRefusedError(111, "Connection refused")
    for _ in range(20):
        raw = proxy.dial()
        await raw.send(request_bytes("GET", "/api/v1/me"))
        answer = await raw.answer()
        assert (answer.status, answer.code) == (502, "upstream")
        assert answer.json["error"]["message"] == chatd.REFUSALS["upstream"][1]
        await raw.ends()
    assert proxy.log is not None
    lines = [m for m in proxy.log.messages if m.startswith("upstream_failed ")]
    assert lines == ["upstream_failed why='[Errno 111] Connection refused' open=1"]


@pytest.mark.parametrize("where", ["dialling", "answering", "reading"])
@proxied(max_message_bytes=2_000_000)
async def test_an_upstream_that_hangs_is_504_after_20_s(
    proxy: VirtualProxy, where: str
) -> None:
    proxy.hanging = where == "dialling"
    proxy.small = True
    raw = proxy.dial()
    body = b"x" * 1_000_000 if where == "reading" else None
    with taking(20, 20.5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raw.send, request_bytes("POST", "/", body))
            answer = await raw.answer(within=30)
            nursery.cancel_scope.cancel()
    assert (answer.status, answer.code) == (504, "upstream")
    if where != "dialling":
        up = await proxy.upstream()
        assert await up.ends()


@proxied()
async def test_an_upstream_that_resets_before_its_answer_is_502(
    proxy: VirtualProxy,
) -> None:
    raw, up = await pass_up(proxy)
    reset(up.stream)
    answer = await raw.answer()
    assert (answer.status, answer.code) == (502, "upstream")
    assert await raw.ends() == b""
    assert proxy.dials == 1


@proxied()
async def test_a_slow_answer_is_not_cut_while_it_moves(proxy: VirtualProxy) -> None:
    raw, up = await pass_up(proxy)
    await trio.sleep(19)
    await up.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
    for _ in range(5):
        await trio.sleep(19)
        await up.send(b"y")
    assert (await raw.answer()).body == b"yyyyy"


@proxied()
async def test_an_upstream_that_does_not_close_after_its_answer_is_cut_after_20_s(
    proxy: VirtualProxy,
) -> None:
    raw, up = await pass_up(proxy)
    await up.send(PROXY_OK)
    with taking(20):
        assert await up.ends(within=30) == b""
    assert (await raw.answer()).body == b"ok"


@proxied()
async def test_a_client_that_does_not_read_its_answer_is_cut_after_20_s(
    proxy: VirtualProxy,
) -> None:
    proxy.small = True
    raw = proxy.dial(small=True)
    await raw.send(request_bytes("GET", "/"))
    up = await proxy.upstream()
    await proxy.request(up)
    await up.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n")
    with taking(20, 21), contextlib.suppress(trio.BrokenResourceError):
        while len(up.data) < 10_000_000:
            await up.send(b"x" * 1000)
            up.data += b"x" * 1000
    assert len(up.data) < 200_000  # bytes in all buffers together


@proxied()
async def test_a_client_that_resets_in_mid_answer_ends_the_upstreams_connection(
    proxy: VirtualProxy,
) -> None:
    raw, up = await pass_up(proxy)
    await up.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n")
    await raw.receives(1)
    reset(raw.stream)
    with taking(0), pytest.raises(trio.BrokenResourceError):
        await up.send(b"x" * 10_000_000)
    assert not proxy.app.listener.open


@proxied()
async def test_the_log_has_a_line_for_each_request_that_is_passed_up(
    proxy: VirtualProxy,
) -> None:
    no = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
    await proxy.exchange(request_bytes("GET", "/api/v1/chats/7/messages?limit=1"))
    await proxy.exchange(request_bytes("PATCH", "/some/token"), no)
    proxy.fault = ConnectionRefusedError(111, "Connection refused")
    refused = (
        request_bytes("GET", "/api/v1/me"),
        request_bytes("POST", "/api/v1/chats", Content_Length="65537"),
        upgrade_bytes("/ws/chat?token=x"),
    )
    for sent in refused:
        raw = proxy.dial()
        await raw.send(sent)
        await raw.answer()
        await raw.ends()
    assert proxy.log is not None
    lines = [m for m in proxy.log.messages if m.startswith("passed ")]
    assert lines == [
        "passed method='GET' path='/api/v1/chats/7/messages' client='127.0.0.1' "
        "status=200",
        "passed method='PATCH' path='?' client='127.0.0.1' status=404",
        "passed method='GET' path='/api/v1/me' client='127.0.0.1' status=0",
    ]


# --- tokens and upgrades -------------------------------------------------------------


@proxied()
async def test_a_socket_without_a_valid_token_is_refused_without_asking_the_upstream(
    proxy: VirtualProxy,
) -> None:
    good = proxy.target()
    expired = proxy.app.keyring.sign(6, -60)
    link = proxy.app.keyring.sign(6, 60, use="signin")
    for target, code in (
        ("/ws/chat", "token_invalid"),
        ("/ws/chat?token=", "token_invalid"),
        (good[:-3], "token_invalid"),
        (f"/ws/chat?token={expired}", "token_expired"),
        (f"/ws/chat?token={link}", "token_invalid"),
    ):
        raw = proxy.dial()
        await raw.send(upgrade_bytes(target))
        answer = await raw.answer()
        assert (answer.status, answer.code) == (401, code), target
        assert await raw.ends() == b""
    raw = proxy.dial()
    await raw.send(upgrade_bytes(f"{good}&token=x"))
    assert (await raw.answer()).status == 400
    raw = proxy.dial()
    await raw.send(request_bytes("GET", good))
    assert (await raw.answer()).status == 426
    assert proxy.dials == 0


@proxied()
async def test_a_socket_may_bring_its_token_in_authorization(
    proxy: VirtualProxy,
) -> None:
    token = proxy.app.keyring.sign(6, 600)
    for sent, status in {f"Bearer {token}": 101, f"Basic {token}": 401}.items():
        raw = proxy.dial()
        await raw.send(upgrade_bytes("/ws/chat", Authorization=sent))
        if status == 101:
            got = await proxy.request(await proxy.upstream())
            assert got.header("authorization") == sent
        else:
            assert (await raw.answer()).status == status
    assert proxy.dials == 1


@proxied()
async def test_the_proxy_passes_the_upstreams_ticket_and_does_not_spend_it(
    proxy: VirtualProxy,
) -> None:
    above = Keyring(Settings(), TEST_SECRET)
    ticket = above.ticket(above.verify(above.sign(6, 600)))["token"]
    for _ in range(2):
        raw = proxy.dial()
        await raw.send(upgrade_bytes(f"/ws/chat?token={ticket}"))
        got = await proxy.request(await proxy.upstream())
        assert got.target == f"/ws/chat?token={ticket}"
        claims = above.verify(ticket, "socket")
        above.spend(claims)
        with pytest.raises(Refusal, match="token_used"):
            above.spend(claims)
        above = Keyring(Settings(), TEST_SECRET)
        above.boot = "another"
        ticket = above.ticket(above.verify(above.sign(6, 600)))["token"]


@proxied(handshakes=Rate(1, 3))
async def test_handshakes_are_counted_at_the_proxy(proxy: VirtualProxy) -> None:
    statuses = []
    for _ in range(5):
        raw = proxy.dial()
        await raw.send(upgrade_bytes("/ws/chat?token=x"))
        statuses.append((await raw.answer()).status)
    assert statuses == [401, 401, 401, 429, 429]


@proxied()
async def test_an_upgrade_goes_up_with_the_headers_of_the_handshake(
    proxy: VirtualProxy,
) -> None:
    raw = proxy.dial()
    extension = {"Sec_WebSocket_Extensions": "permessage-deflate"}
    await raw.send(upgrade_bytes(proxy.target(), **extension))
    got = await proxy.request(await proxy.upstream())
    assert got.header("connection").lower() == "upgrade"
    assert got.header("upgrade") == "websocket"
    assert got.header("sec-websocket-key") == "dGhlIHNhbXBsZSBub25jZQ=="
    assert got.header("sec-websocket-extensions") == "permessage-deflate"
    assert got.header("x-forwarded-for") == "127.0.0.1"


# Answers of an upstream to an upgrade that are not HTTP/1.1 101.
NO_SOCKET: dict[str, bytes] = {
    "503": b"HTTP/1.1 503 Full\r\nContent-Length: 2\r\n\r\nno",
    "401, a used ticket": b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno",
    "200": PROXY_OK,
    "100, then 101": b"HTTP/1.1 100 Continue\r\n\r\n" + PROXY_101,
    "101 in HTTP/1.0": PROXY_101.replace(b"HTTP/1.1", b"HTTP/1.0"),
}


@pytest.mark.parametrize(
    "behind", [request_bytes("GET", "/api/v1/me"), b"\x81\x80abcd"]
)
@pytest.mark.parametrize("what", NO_SOCKET)
@proxied()
async def test_nothing_goes_up_behind_an_upgrade_without_101(
    proxy: VirtualProxy, what: str, behind: bytes
) -> None:
    answer = NO_SOCKET[what]
    raw, up = await pass_up(proxy, upgrade_bytes(proxy.target()), behind)
    assert up.data == b""
    await up.send(answer)
    assert await raw.receives(len(answer)) == answer
    await raw.send(behind)
    await up.listen(1)
    await up.stream.send_eof()
    assert await raw.finishes() == answer  # the connection ends after the answer
    assert await up.ends() == b""
    assert proxy.dials == 1


@proxied()
async def test_nothing_goes_up_behind_a_101_that_answers_no_upgrade(
    proxy: VirtualProxy,
) -> None:
    raw = proxy.dial()
    await raw.send(request_bytes("GET", "/", Upgrade="websocket", Connection="Upgrade"))
    up = await proxy.upstream()
    assert (await proxy.request(up)).header("connection") == "close"
    await up.send(PROXY_101)
    assert await raw.receives(len(PROXY_101)) == PROXY_101
    await raw.send(request_bytes("GET", "/api/v1/me"))
    await up.listen(1)
    await up.stream.send_eof()
    assert await raw.finishes() == PROXY_101
    assert await up.ends() == b""


# --- the tunnel ----------------------------------------------------------------------


@proxied()
async def test_bytes_pass_only_after_the_101_and_then_unchanged(
    proxy: VirtualProxy,
) -> None:
    raw, up = await pass_up(proxy, upgrade_bytes(proxy.target()), b"be")
    await raw.send(b"hind")
    await up.listen(1)
    assert up.data == b""
    await up.send(PROXY_101, b"greet")
    answer = await raw.answer()
    assert answer.status == 101
    assert answer.headers["sec-websocket-accept"] == ACCEPT_KEY
    await up.listen(1)
    await raw.listen(1)
    assert up.data == b"behind"
    assert raw.data == b"greet"
    noise = os.urandom(300_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raw.send, noise)
        nursery.start_soon(up.send, noise[::-1])
        nursery.start_soon(raw.listen)
        await up.listen()
    assert up.data == b"behind" + noise
    assert raw.data == b"greet" + noise[::-1]


@pytest.mark.parametrize("side", ["client", "upstream"])
@proxied()
async def test_eof_from_one_side_is_passed_on_and_the_other_side_may_finish(
    proxy: VirtualProxy, side: str
) -> None:
    raw, up = await proxy.socket()
    one, other = (raw, up) if side == "client" else (up, raw)
    await one.send(b"last words")
    await one.stream.send_eof()
    assert await other.ends() == b"last words"
    await other.send(b"an answer")
    await other.stream.send_eof()
    assert await one.ends() == b"an answer"
    await wait_all_tasks_blocked()
    assert not proxy.app.listener.open


@pytest.mark.parametrize("side", ["client", "upstream"])
@proxied()
async def test_a_reset_by_one_side_resets_the_other(
    proxy: VirtualProxy, side: str
) -> None:
    raw, up = await proxy.socket()
    one, other = (raw, up) if side == "client" else (up, raw)
    reset(one.stream)
    with pytest.raises(trio.BrokenResourceError), trio.fail_after(1):
        await other.read()
    await wait_all_tasks_blocked()
    assert not proxy.app.listener.open


@pytest.mark.parametrize("slow", [False, True])
@proxied()
async def test_the_upstreams_last_bytes_reach_a_client_that_goes_on_sending(
    proxy: VirtualProxy, slow: bool
) -> None:
    proxy.small = slow
    raw, up = await proxy.socket(small=slow)
    last = frame_bytes(TEXT, b"x" * 30_000, masked=False) + close_bytes(1012)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(up.send, last)
        await raw.receives(10_000)
    up.stream.socket.close()
    with trio.move_on_after(1):
        for _ in range(20):
            await raw.send(b"x" * 1000)
            await wait_all_tasks_blocked()
    assert await raw.finishes() == last


@proxied()
async def test_a_silent_socket_is_cut_after_75_s(proxy: VirtualProxy) -> None:
    raw, up = await proxy.socket()
    await trio.sleep(70)
    await up.send(b"ping")
    await raw.read()
    await trio.sleep(70)
    await raw.send(b"pong")
    await up.read()
    with taking(75), pytest.raises(trio.BrokenResourceError):
        await raw.read()
    with pytest.raises(trio.BrokenResourceError):
        await up.read()


@proxied()
async def test_a_side_that_stays_open_after_the_other_has_ended_is_cut_after_40_s(
    proxy: VirtualProxy,
) -> None:
    raw, up = await proxy.socket()
    await up.stream.send_eof()
    assert await raw.read() == b""
    with taking(40), pytest.raises(trio.BrokenResourceError):
        await up.read()


@pytest.mark.parametrize("way", ["up", "down"])
@proxied()
async def test_the_proxy_stops_reading_from_one_side_while_the_other_reads_nothing(
    proxy: VirtualProxy, way: str
) -> None:
    proxy.small = True
    raw, up = await proxy.socket(small=True)
    one, other = (raw, up) if way == "up" else (up, raw)
    sent = 0
    with trio.move_on_after(5):
        while True:
            await one.send(bytes(1000))
            sent += 1000
    assert sent < 200_000  # bytes in all buffers together, the kernel's included
    await one.stream.send_eof()
    assert sent <= len(await other.ends()) < sent + 1000


# --- stopping, a full proxy, bugs ----------------------------------------------------


@proxied()
async def test_a_stop_sends_eof_upstream_and_passes_down_the_answer(
    proxy: VirtualProxy,
) -> None:
    idle, idle_up = await proxy.socket()
    busy, busy_up = await proxy.socket()
    frame = command_bytes("ping")
    await busy.send(frame[:5])
    await busy_up.receives(5)
    proxy.app.listener.stopping.set()
    assert await idle_up.finishes() == b""
    assert await busy_up.finishes() == frame[:5]  # the upstream knows where frames end
    await busy.send(frame[5:])  # the proxy does not read it; sending it is harmless
    for raw, up in ((idle, idle_up), (busy, busy_up)):
        await up.send(b"pong", close_bytes(1012))
        await up.stream.send_eof()
        assert await raw.finishes() == b"pong" + close_bytes(1012)
        raw.stream.socket.close()
    with trio.fail_after(1.1):
        await proxy.finished.wait()


@proxied()
async def test_a_stop_sends_eof_to_an_upstream_that_reads_nothing(
    proxy: VirtualProxy,
) -> None:
    proxy.small = True
    raw, up = await proxy.socket(small=True)
    sent = 0
    with trio.move_on_after(1):
        while True:
            await raw.send(bytes(1000))
            sent += 1000
    proxy.app.listener.stopping.set()
    await wait_all_tasks_blocked()
    assert len(await up.finishes()) < sent
    await up.send(close_bytes(1012))
    await up.stream.send_eof()
    assert await raw.finishes() == close_bytes(1012)


@proxied()
async def test_a_socket_that_opens_during_a_stop_is_ended_too(
    proxy: VirtualProxy,
) -> None:
    raw, up = await pass_up(proxy, upgrade_bytes(proxy.target()), b"behind")
    proxy.app.listener.stopping.set()
    await wait_all_tasks_blocked()
    await up.send(PROXY_101)
    assert (await raw.answer()).status == 101
    assert await up.finishes() == b""
    await up.send(close_bytes(1012))
    await up.stream.send_eof()
    assert await raw.finishes() == close_bytes(1012)


@proxied()
async def test_a_stop_lets_a_request_finish_and_closes_a_connection_without_one(
    proxy: VirtualProxy,
) -> None:
    silent, raw = proxy.dial(), proxy.dial()
    await raw.send(request_bytes("GET", "/"))
    up = await proxy.upstream()
    await proxy.request(up)
    proxy.app.listener.stopping.set()
    with taking(0, 1):  # a client that has connected gets a second to send a request
        assert await silent.ends(within=2) == b""
    await up.send(PROXY_OK)
    up.stream.socket.close()
    assert await raw.finishes() == PROXY_OK
    raw.stream.socket.close()
    with trio.fail_after(1):
        await proxy.finished.wait()


@proxied(drain_seconds=3.0)
async def test_a_connection_that_does_not_end_is_cut_when_the_drain_is_over(
    proxy: VirtualProxy,
) -> None:
    raw, _ = await proxy.socket()
    waiting = proxy.dial()
    await waiting.send(request_bytes("GET", "/"))
    await proxy.request(await proxy.upstream())
    with taking(3, 3.1):
        proxy.app.listener.stopping.set()
        await proxy.finished.wait()
    with pytest.raises(trio.BrokenResourceError):
        await raw.finishes()
    assert await waiting.finishes() == b""


@proxied(max_connections=1)
async def test_a_full_proxy_refuses_at_once(proxy: VirtualProxy) -> None:
    for _ in range(129):
        raw = proxy.dial(tcp=False)
        await raw.send(request_bytes("GET", "/"))
        await proxy.upstream()
    raw = proxy.dial(tcp=False)
    answer = await raw.answer()
    assert (answer.status, answer.code) == (503, "overloaded")
    assert proxy.dials == 129


@proxied()
async def test_a_bug_ends_one_connection_and_is_counted(
    proxy: VirtualProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy.app.listener, "check_handshakes", lambda _: 1 / 0)
    raw = proxy.dial()
    await raw.send(upgrade_bytes(proxy.target()))
    assert (await raw.answer()).code == "internal"
    proxy.errors = {"ZeroDivisionError": 1}
    _, received = await proxy.exchange(request_bytes("GET", "/"))
    assert received.body == b"ok"


@proxied()
async def test_a_bug_writes_no_second_answer_into_an_open_tunnel(
    proxy: VirtualProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, up = await proxy.socket()
    with monkeypatch.context() as patch:
        patch.setattr(chatd.Tunnel, "_moved", lambda _: 1 / 0)
        await up.send(b"greet")
        with pytest.raises(trio.BrokenResourceError):
            await raw.finishes()
        with pytest.raises(trio.BrokenResourceError):
            await up.finishes()
    assert b"HTTP" not in raw.data
    proxy.errors = {"ZeroDivisionError": 1}
    _, received = await proxy.exchange(request_bytes("GET", "/"))
    assert received.body == b"ok"


@pytest.fixture
async def proxy(server: ServerProcess, tmp_path: Path) -> AsyncIterator[ProxyProcess]:
    """A proxy of the test's own in front of `server`. Start `server` first."""
    home = tmp_path / "proxy"
    home.mkdir()
    made = ProxyProcess(home, 0, server.db)
    yield made
    made.tidy()


# --- the proxy as a process ----------------------------------------------------------


NODE_CLIENT = """
const socket = new WebSocket(process.argv[1]);
const end = setTimeout(() => { console.log("too slow"); process.exit(1); }, 15000);
socket.onopen = () => console.log("open");
socket.onmessage = ({ data }) => {
  const message = JSON.parse(data);
  console.log(message.type);
  if (message.type === "connected") {
    const chat_id = Number(process.argv[2]), content = "ж".repeat(3000);
    socket.send(JSON.stringify({ type: "send_message", chat_id, content }));
  }
  if (message.type === "ack") socket.close(1000);
};
socket.onclose = ({ code }) => { clearTimeout(end); console.log(code); };
"""


async def test_nodes_own_websocket_client_works_through_the_proxy(
    shared_proxy_process: ServerProcess,
) -> None:
    flag = "--experimental-websocket"  # Node 22 and later need no flag
    server, node = shared_proxy_process, node_path(flag)
    ann = next(new_users)
    chat = await server.chat(ann)
    url = f"ws://127.0.0.1:{server.port}{server.socket_path(ann)}"
    done = await trio.run_process(
        [node, flag, "--no-warnings", "-e", NODE_CLIENT, url, str(chat)],
        capture_stdout=True,
    )
    printed = done.stdout.decode().split()
    assert printed == ["open", "connected", "new_message", "ack", "1000"]


async def test_the_server_sees_the_clients_address_and_no_client_can_forge_it(
    server: ServerProcess, proxy: ProxyProcess
) -> None:
    async with server.serving("--handshakes=0.001/2"):
        proxy.command = ProxyProcess(proxy.home, server.port, server.db).command
        async with proxy.serving():
            statuses = []
            for number in range(4):
                forged = f"X-Forwarded-For: 6.6.6.{number}"
                bad = get_bytes("/api/v1/me", "Host: x", forged)
                statuses.append((await proxy.raw(bad)).split()[1])
            # All requests share the bucket of 127.0.0.1, whatever their headers say.
            assert statuses == [b"401", b"401", b"429", b"429"]
            origin = f"Origin: http://127.0.0.1:{proxy.port}"
            page = (origin, f"Host: 127.0.0.1:{proxy.port}")
            assert b" 200 " in (await proxy.raw(get_bytes("/healthz", *page)))[:15]
            evil = ("Origin: http://evil.example", *page[1:])
            forged = "X-Forwarded-Host: evil.example"
            got = await proxy.raw(get_bytes("/healthz", *evil, forged))
            assert b" 403 " in got[:15]


async def test_the_proxy_listens_on_a_unix_socket_and_dials_one(
    server: ServerProcess, proxy: ProxyProcess, tmp_path: Path
) -> None:
    """Each believes the X-Forwarded-For of the one in front of it."""
    paths = [f"{tmp_path}/{name}.sock" for name in ("server", "proxy")]
    handshakes, user = "--handshakes=0.001/2", next(new_users)
    async with server.serving(handshakes, "--listen", f"unix:{paths[0]}"):
        proxy.command = ("proxy", f"--db={server.db}", f"--upstream=unix:{paths[0]}")
        async with proxy.serving("--listen", f"unix:{paths[1]}"):

            async def statuses(*headers: str) -> list[int]:
                found = []
                for _ in range(3):
                    async with RawClient(await trio.open_unix_socket(paths[1])) as raw:
                        await raw.send(get_bytes("/api/v1/me", "Host: x", *headers))
                        found.append((await raw.answer()).status)
                return found

            for number in range(2):  # the buckets are the server's
                named = f"X-Forwarded-For: 192.0.2.{number}"
                assert await statuses(named) == [401, 401, 429]
            assert await statuses() == [401, 401, 401]
            await server.stop()
            (answer,) = {*await statuses()}
            assert answer == 502
            await server.begin()
            async with RawClient(await trio.open_unix_socket(paths[1])) as raw:
                target = server.socket_path(user)
                await raw.send(upgrade_bytes(target, X_Forwarded_For="192.0.2.9"))
                assert (await raw.answer()).status == 101
                await raw.receive("connected")
    assert server.output.count("no_client_address") == 1
    assert f"ready url='http://127.0.0.1:{proxy.port} unix:{paths[1]}'" in proxy.output


async def test_a_stop_of_the_proxy_closes_its_sockets_with_1012_and_no_others(
    server: ServerProcess, proxy: ProxyProcess
) -> None:
    async with server.serving():
        proxy.command = ProxyProcess(proxy.home, server.port, server.db).command
        ann = next(new_users)
        straight = await server.peer(ann)
        async with proxy.serving("--drain-seconds=10"):
            peers = [await proxy.peer(ann) for _ in range(5)]
            await peers[0].stream.send_all(b"\x81")  # these three are in mid-frame
            await peers[1].stream.send_all(frame_bytes(TEXT, b"x" * 60_000)[:-1])
            await peers[2].stream.send_all(frame_bytes(TEXT, b"{", fin=False))
            began = trio.current_time()
            proxy.signal(signal.SIGTERM)
            for peer in peers:
                with pytest.raises(Disconnected) as gone:
                    await peer.receive()  # the close frame is the first frame
                assert gone.value.code == 1012
                assert not peer.data
            for stream in proxy.streams:
                stream.socket.close()
            assert await proxy.ended() == 0
            assert trio.current_time() - began < 8
            await refuses_connections(proxy)
        await straight.receives_nothing()
        closed = (await server.stats())["connections"]["closed"]
        assert closed == {"1006": 5}  # chatd received no close frame


class SlowPeers:
    """An upstream and a client that read slowly and write as fast as they can."""

    SIZE = 10_000_000

    def __init__(self, proxy: ProxyProcess) -> None:
        self.proxy = proxy
        self.most = 0  # the proxy's largest resident size, in bytes
        self.done = trio.Event()  # the upstream has written and read everything

    def look(self) -> None:
        self.most = max(self.most, self.proxy.rss)

    async def read(self, stream: trio.SocketStream, size: int) -> None:
        """Read `size` bytes, a little at a time."""
        while size:
            data = await stream.receive_some(min(size, 32_768))
            assert data, "it ended too soon"
            size -= len(data)
            self.look()
            await trio.sleep(0.002)

    async def write(self, stream: trio.SocketStream, frame: bytes) -> None:
        for _ in range(0, self.SIZE, len(frame)):
            await stream.send_all(frame)

    async def head(self, stream: trio.SocketStream) -> bytes:
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            data += await stream.receive_some(1)
        return data

    async def serve(self, stream: trio.SocketStream) -> None:
        """Act as the upstream of one connection."""
        async with stream:
            upgrades = b"Upgrade: websocket" in await self.head(stream)
            length = f"HTTP/1.1 200 OK\r\nContent-Length: {self.SIZE}\r\n\r\n"
            await stream.send_all(PROXY_101 if upgrades else length.encode())
            await self.both(stream, reads=upgrades, writes=True)
            self.done.set()

    async def both(
        self, stream: trio.SocketStream, *, reads: bool, writes: bool
    ) -> None:
        """Write `SIZE` bytes and read as many at the same time, if asked to."""
        frame = frame_bytes(2, bytes(self.SIZE // 100 - 14))
        assert self.SIZE % len(frame) == 0
        async with trio.open_nursery() as nursery:
            if writes:
                nursery.start_soon(self.write, stream, frame)
            if reads:
                await self.read(stream, self.SIZE)


@pytest.mark.parametrize("what", ["a socket", "a request"])
async def test_10_mb_between_slow_peers_use_no_memory(
    server: ServerProcess, proxy: ProxyProcess, what: str
) -> None:
    async with server.serving():  # it makes the secret
        pass
    slow = SlowPeers(proxy)
    async with trio.open_nursery() as nursery:
        serve = functools.partial(trio.serve_tcp, slow.serve, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        port = listener.socket.getsockname()[1]
        proxy.command = ProxyProcess(proxy.home, port, server.db).command
        async with proxy.serving():
            head = request_bytes("GET", "/")
            if what == "a socket":
                head = upgrade_bytes(proxy.socket_path(6))
            stream = (await proxy.dial()).stream
            with trio.fail_after(60):
                await stream.send_all(head)
                if what == "a socket":
                    await slow.head(stream)
                base = proxy.rss
                if what == "a request":
                    await slow.head(stream)
                await slow.both(stream, reads=True, writes=what == "a socket")
                await slow.done.wait()
            assert slow.most - base < 4_000_000, (base, slow.most)
        nursery.cancel_scope.cancel()
