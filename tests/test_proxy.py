"""The proxy, between socket pairs under virtual time, and as a process.

The test is the client on one side and the upstream on the other, both in bytes: what
the proxy passes is looked at as the other end gets it, and what never reaches the
other end is asserted too.
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
from tests.harness import (
    DOOR_ACCEPT,
    PROXY_101,
    PROXY_OK,
    TEXT,
    WIRES_BAD_HEADS,
    WIRES_SECRET,
    DoorGone,
    DoorProxy,
    DoorServer,
    ProxyHouse,
    door_frame,
    door_get,
    door_node,
    door_reset,
    door_shut,
    door_users,
    proxied,
    proxy_run,
    taking,
    wires_close,
    wires_command,
    wires_frame,
    wires_request,
    wires_upgrade,
)

# --- Proxy: what goes up -------------------------------------------------------------


@proxied()
async def test_a_request_is_passed_up_as_it_is_and_its_answer_down(
    house: ProxyHouse,
) -> None:
    sent = wires_request(
        "POST", "/api/v1/chats?a=%20b", b'{"title":"T"}', Authorization="Bearer x.y",
        Idempotency_Key="k", Origin="http://chat.example",
    )  # fmt: skip
    answer = b"HTTP/1.1 201 Created\r\nETag: x\r\nContent-Length: 4\r\n\r\nmade"
    got, heard = await house.exchange(sent, answer)
    assert (got.method, got.target) == ("POST", "/api/v1/chats?a=%20b")
    assert got.body == b'{"title":"T"}'
    assert got.header("authorization") == "Bearer x.y"
    assert got.header("idempotency-key") == "k"
    assert got.header("origin") == "http://chat.example"
    assert got.header("host") == "chat.example"
    assert got.header("connection") == "close"
    assert (heard.status, heard.body, heard.headers["etag"]) == (201, b"made", "x")


@proxied()
async def test_a_token_in_the_place_of_a_method_is_passed_and_not_logged(
    house: ProxyHouse,
) -> None:
    token = house.proxy.keyring.sign(6, 600)
    got, _ = await house.exchange(wires_request(token, "/api/v1/me"), method=token)
    assert got.method == token


PROXY_FORGED = {
    "X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "evil.example", "X-Forwarded-Port": "1",
    "Forwarded": "for=6.6.6.6", "X-Real-IP": "6.6.6.6", "x-FORWARDED-for": "6.6.6.7",
}  # fmt: skip


@proxied()
async def test_no_client_names_its_own_address(house: ProxyHouse) -> None:
    got, _ = await house.exchange(wires_request("GET", "/", **PROXY_FORGED))
    assert got.header("x-forwarded-for") == "127.0.0.1"
    assert got.header("x-forwarded-proto") == "http"
    assert got.header("x-forwarded-host") == "chat.example"
    assert not got.names & {"forwarded", "x-real-ip", "x-forwarded-port"}
    assert not any("6.6.6" in value for _, value in got.headers)


@proxied(trusted_proxy=("127.0.0.0/8",))
async def test_a_trusted_proxy_in_front_names_the_client(house: ProxyHouse) -> None:
    forged = PROXY_FORGED | {
        "X-Forwarded-For": "6.6.6.6, 9.9.9.9, 127.0.0.5",
        "X-Forwarded-Host": "chat.example.org",
    }
    del forged["x-FORWARDED-for"]
    got, _ = await house.exchange(wires_request("GET", "/", **forged))
    assert got.header("x-forwarded-for") == "9.9.9.9"
    assert got.header("x-forwarded-proto") == "https"
    assert got.header("x-forwarded-host") == "chat.example.org"
    assert not got.names & {"forwarded", "x-real-ip", "x-forwarded-port"}


@proxied()
async def test_what_concerns_one_connection_goes_no_further(house: ProxyHouse) -> None:
    hop = {
        "Connection": "keep-alive, X-Mine, Host, Content-Length, X-Forwarded-For",
        "Keep-Alive": "5", "TE": "trailers", "Trailer": "x", "Upgrade": "h2c",
        "Proxy-Connection": "x", "Proxy-Authorization": "x", "X-Mine": "1",
        "X-Your": "2",
    }  # fmt: skip
    got, _ = await house.exchange(wires_request("POST", "/", b"body", **hop))
    assert got.names == {
        "host", "x-your", "content-length", "connection", "via", "x-forwarded-for",
        "x-forwarded-host", "x-forwarded-proto",
    }  # fmt: skip
    assert (got.body, got.header("via")) == (b"body", "1.1 chatd")
    assert got.header("x-forwarded-for") == "127.0.0.1"
    assert got.header("connection") == "close"


@proxied()
async def test_the_body_is_passed_up_with_its_length_however_it_came(
    house: ProxyHouse,
) -> None:
    chunks = b"3;x=y\r\nabc\r\n5\r\ndefgh\r\n0\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n"
    sent = wires_request("POST", "/", Transfer_Encoding="chunked") + chunks
    got, _ = await house.exchange(sent)
    assert got.body == b"abcdefgh"
    assert got.header("content-length") == "8"
    assert "transfer-encoding" not in got.names
    assert got.header("x-forwarded-for") == "127.0.0.1"
    got, _ = await house.exchange(wires_request("POST", "/", b""))
    assert (got.body, got.header("content-length")) == (b"", "0")
    got, _ = await house.exchange(wires_request("GET", "/"))
    assert "content-length" not in got.names
    got, _ = await house.exchange(wires_request("POST", "/", b"x" * 65_536))
    assert got.body == b"x" * 65_536


@proxied()
async def test_the_request_goes_up_in_the_clients_version_of_http(
    house: ProxyHouse,
) -> None:
    old = b"POST / HTTP/1.0\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nok"
    got, _ = await house.exchange(old)  # and gets no 100
    assert (got.version, got.body) == ("1.0", b"ok")
    assert got.header("host") == "chat.example:8086"
    assert got.header("via") == "1.0 chatd"
    got, _ = await house.exchange(wires_request("GET", "/"))
    assert (got.version, got.header("via")) == ("1.1", "1.1 chatd")


PROXY_TOO_LARGE: dict[str, bytes] = {
    "by its length": wires_request("POST", "/", Content_Length="65537"),
    "by its length, expecting 100": wires_request(
        "POST", "/", Content_Length="65537", Expect="100-continue"
    ),
    "in chunks": (
        wires_request("POST", "/", Transfer_Encoding="chunked")
        + b"8000\r\n" + b"x" * 0x8000 + b"\r\n8001\r\n" + b"x" * 0x8001
    ),
    "by the number of its chunks": (
        wires_request("POST", "/", Transfer_Encoding="chunked") + b"1\r\nx\r\n" * 1025
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", PROXY_TOO_LARGE)
@proxied()
async def test_a_body_that_is_too_large_is_413_and_reaches_no_upstream(
    house: ProxyHouse, what: str
) -> None:
    raw = house.dial()
    await raw.send(PROXY_TOO_LARGE[what])
    answer = await raw.answer()
    assert (answer.status, answer.code) == (413, "too_large")
    assert answer.headers["connection"] == "close"
    assert raw.informed == []
    assert await raw.ends() == b""
    assert house.dials == 0


@proxied()
async def test_a_request_in_single_bytes_is_passed_up_like_a_whole_one(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    sent = wires_request("POST", "/", b"body")
    for number in range(len(sent)):
        await raw.send(sent[number : number + 1])
        await wait_all_tasks_blocked()
    up = await house.upstream()
    assert (await house.request(up)).body == b"body"
    await up.send(PROXY_OK)
    assert (await raw.answer()).body == b"ok"


@pytest.mark.parametrize("body", [None, b"body"])
@proxied()
async def test_a_second_request_behind_the_first_is_never_passed_on(
    house: ProxyHouse, body: bytes | None
) -> None:
    raw = house.dial()
    second = wires_request("GET", "/api/v1/me", X_Forwarded_For="6.6.6.6")
    await raw.send(wires_request("POST", "/", body), second)
    up = await house.upstream()
    got = await house.request(up)
    assert got.body == (body or b"")
    assert up.data == b""
    answer = b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n"
    await up.send(answer)
    assert await raw.hears(len(answer)) == answer
    await raw.send(second)  # not after the answer either
    await up.listen(1)
    await up.stream.send_eof()
    assert await raw.finishes() == answer
    assert await up.ends() == b""
    assert house.dials == 1


@proxied()
async def test_an_answer_of_our_own_ends_the_connection_too(house: ProxyHouse) -> None:
    house.fault = ConnectionRefusedError(111, "Connection refused")
    raw = house.dial()
    await raw.send(wires_request("GET", "/"), wires_request("GET", "/"))
    answer = await raw.answer()
    assert (answer.status, answer.code) == (502, "upstream")
    assert answer.headers["connection"] == "close"
    assert await raw.ends() == b""
    assert house.dials == 1


@pytest.mark.parametrize("fault", [*WIRES_BAD_HEADS])
@proxied()
async def test_a_bad_head_reaches_no_upstream(house: ProxyHouse, fault: str) -> None:
    sent, status = WIRES_BAD_HEADS[fault]
    raw = house.dial()
    await raw.send(sent)
    answer = await raw.answer()
    assert answer.status == status
    assert answer.headers["connection"] == "close"
    assert await raw.ends() == b""
    assert house.dials == 0


# What has fooled proxies, and what must become of it: refused here, or normal above.
PROXY_SMUGGLED: dict[str, bytes] = {
    "chunks in HTTP/1.0": (
        b"POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "chunks by another name": wires_request("POST", "/", Transfer_Encoding="xchunked"),
    "chunks twice": wires_request("POST", "/", Transfer_Encoding="chunked, chunked"),
    "chunks of a chunk": wires_request("POST", "/", Transfer_Encoding="gzip, chunked"),
    "a space before the colon": (
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length : 5\r\n\r\nhello"
    ),
    "a NUL": b"GET / HTTP/1.1\r\nHost: x\r\nA: b\0c\r\n\r\n",
    "a bare CR": b"GET / HTTP/1.1\r\nHost: x\r\nA: b\rX-Forwarded-For: 6.6.6.6\r\n\r\n",
    "a length with a plus": wires_request("POST", "/", Content_Length="+5") + b"hello",
    "a length in hex": wires_request("POST", "/", Content_Length="0x5") + b"hello",
    "lengths that differ": (
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 6\r\n\r\nhello"
    ),
    "a tunnel": b"CONNECT /x HTTP/1.1\r\nHost: x\r\n\r\n",
    "a line that is none": b"GET / HTTP/1.1\r\nHost: x\r\nnonsense\r\n\r\n",
    "two versions": b"GET / HTTP/1.1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a header before the line": b" GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("what", PROXY_SMUGGLED)
@proxied()
async def test_what_two_servers_may_read_in_two_ways_is_refused(
    house: ProxyHouse, what: str
) -> None:
    raw = house.dial()
    await raw.send(PROXY_SMUGGLED[what])
    answer = await raw.answer()
    assert (answer.status, answer.code) == (400, "bad_field")
    assert await raw.ends() == b""
    assert house.dials == 0


@proxied()
async def test_what_is_only_untidy_is_written_anew(house: ProxyHouse) -> None:
    untidy = (
        b"GET / HTTP/1.1\nHost: x\nA: b\r\n c\nContent-Length: 2, 2\r\n"
        b"content-length: 2\r\n\r\nok"
    )
    raw = house.dial()
    await raw.send(untidy)
    up = await house.upstream()
    await up.listen(1)
    head, _, body = bytes(up.data).partition(b"\r\n\r\n")
    assert head.replace(b"\r\n", b"").count(b"\n") == 0
    assert b"\r\na: b c\r\n" in head
    assert [line.lower() for line in head.split(b"\r\n")].count(
        b"content-length: 2"
    ) == 1
    assert body == b"ok"


PROXY_PIECES = (
    b"GET / HTTP/1.1\r\n", b"POST /api/v1/chats HTTP/1.1\r\n", b"POST / HTTP/1.0\r\n",
    b"Host: x\r\n", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n",
    b"Connection: keep-alive, Content-Length\r\n", b"Upgrade: websocket\r\n",
    b"X-Forwarded-For: 6.6.6.6\r\n", b" folded\r\n", b"\r\n", b"\n", b"\r", b"\0",
    b"5\r\nhello\r\n", b"0\r\n\r\n", b"hello", b": ", b"\xff",
    wires_request("GET", "/", X_Forwarded_For="6.6.6.6"),
    wires_request("POST", "/", b"hello"),
    wires_request("POST", "/", Transfer_Encoding="chunked"),
)  # fmt: skip


@hypothesis.settings(deadline=None)
@given(
    st.sampled_from((b"", *PROXY_PIECES[-3:])),
    st.lists(st.sampled_from(PROXY_PIECES), max_size=9),
)
def test_whatever_a_client_sends_at_most_one_request_goes_up(
    first: bytes, pieces: list[bytes]
) -> None:
    async def main(house: ProxyHouse) -> None:
        raw = house.dial()
        await raw.send(first, *pieces)
        await raw.stream.send_eof()
        await wait_all_tasks_blocked()
        if house.dials:
            up = await house.upstream()
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
                assert side.next_event() is not h11.NEED_DATA  # it is whole
            assert side.trailing_data[0] == b""
            up.stream.socket.close()
        await raw.ends()
        assert house.dials <= 1

    proxy_run(main)


@pytest.mark.parametrize(
    "body", [b"3\r\nabcX", b"-1\r\n", b"3\r\nabc\r\nzz\r\n", b"3\nabc\r\n0\r\n\r\n"]
)
@proxied()
async def test_a_malformed_body_is_400_and_reaches_no_upstream(
    house: ProxyHouse, body: bytes
) -> None:
    raw = house.dial()
    await raw.send(wires_request("POST", "/", Transfer_Encoding="chunked"), body)
    assert (await raw.answer()).status == 400
    assert await raw.ends() == b""
    assert house.dials == 0


@pytest.mark.parametrize("end", [trio.SocketStream.send_eof, trio.SocketStream.aclose])
@pytest.mark.parametrize(
    "frame", [{"Content_Length": "10"}, {"Expect": "100-continue"}]
)
@proxied()
async def test_a_client_that_leaves_in_mid_body_reaches_no_upstream(
    house: ProxyHouse,
    end: Callable[[trio.SocketStream], Awaitable[None]],
    frame: dict[str, str],
) -> None:
    raw = house.dial()
    await raw.send(wires_request("POST", "/", **{"Content_Length": "10"} | frame))
    await raw.send(b"hello")
    await wait_all_tasks_blocked()
    await end(raw.stream)
    await wait_all_tasks_blocked()
    assert house.dials == 0
    assert not house.proxy.listener.open


@proxied()
async def test_a_client_that_ends_its_side_still_gets_its_answer(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    await raw.send(wires_request("GET", "/"))
    await raw.stream.send_eof()
    up = await house.upstream()
    await house.request(up)
    await up.send(PROXY_OK)
    assert (await raw.answer()).body == b"ok"


@proxied()
async def test_a_client_that_waits_for_100_gets_the_proxys_own(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    await raw.send(
        wires_request("POST", "/", Content_Length="4", Expect="100-continue")
    )
    await raw.hears(1)
    assert raw.data.startswith(b"HTTP/1.1 100 ")
    assert house.dials == 0  # the body is read first
    await raw.send(b"body")
    up = await house.upstream()
    got = await house.request(up)
    assert got.body == b"body"
    assert "expect" not in got.names
    await up.send(PROXY_OK)
    assert (await raw.answer()).body == b"ok"
    assert raw.informed == [100]


@pytest.mark.parametrize("drips", [False, True])
@proxied()
async def test_a_body_that_takes_more_than_15_s_is_408_and_reaches_no_upstream(
    house: ProxyHouse, drips: bool
) -> None:
    raw = house.dial()
    await raw.send(wires_request("POST", "/", Content_Length="100"), b"hello")

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
    assert house.dials == 0


# --- Proxy: what comes down ----------------------------------------------------------


# Each comes down byte for byte: the frame that a client gets is the upstream's.
PROXY_ANSWERS: dict[str, tuple[str, bytes, int, bytes]] = {
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


@pytest.mark.parametrize("what", PROXY_ANSWERS)
@proxied()
async def test_an_answer_of_any_frame_comes_down_as_it_is(
    house: ProxyHouse, what: str
) -> None:
    method, answer, status, body = PROXY_ANSWERS[what]
    got, heard = await house.exchange(wires_request(method, "/"), answer, method)
    assert got.method == method
    assert (heard.status, heard.body) == (status, body)


@proxied()
async def test_an_answer_in_single_bytes_comes_down_like_a_whole_one(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    await raw.send(wires_request("GET", "/"))
    up = await house.upstream()
    await house.request(up)
    for number in range(len(PROXY_OK)):
        await up.send(PROXY_OK[number : number + 1])
        await wait_all_tasks_blocked()
    assert (await raw.answer()).body == b"ok"
    up.stream.socket.close()
    assert await raw.finishes() == b""


PROXY_NONSENSE: dict[str, bytes] = {
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
@pytest.mark.parametrize("what", PROXY_NONSENSE)
@proxied()
async def test_an_answer_that_does_not_begin_like_http_is_502(
    house: ProxyHouse, what: str, asked: str
) -> None:
    upgrade = wires_upgrade(house.target())
    raw = house.dial()
    await raw.send(upgrade if asked == "an upgrade" else wires_request("GET", "/"))
    up = await house.upstream()
    await house.request(up)
    await up.send(PROXY_NONSENSE[what])
    up.stream.socket.close()
    answer = await raw.answer()
    assert (answer.status, answer.code) == (502, "upstream")
    assert await raw.ends() == b""
    assert house.dials == 1  # it is never asked twice


PROXY_HALVES: dict[str, bytes] = {
    "a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "a status line": b"HTTP/1.1 200",
    "a length": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"),
}


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("end", ["closes", "resets", "breaks its frame", "hangs"])
@pytest.mark.parametrize("what", PROXY_HALVES)
@proxied()
async def test_an_answer_that_breaks_off_never_looks_whole(
    house: ProxyHouse, what: str, end: str, version: str
) -> None:
    if end == "breaks its frame" and what == "a length":
        return  # no byte could
    half = PROXY_HALVES[what]
    raw = house.dial()
    await raw.send(f"GET / HTTP/{version}\r\nHost: x\r\n\r\n".encode())
    up = await house.upstream()
    await house.request(up)
    await up.send(half)
    assert await raw.hears(len(half)) == half
    if end == "breaks its frame":
        half += b"\0\r\n\r\n"
        await up.send(b"\0\r\n\r\n")
    if end == "resets":
        door_reset(up.stream)
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
async def test_an_upstream_that_answers_before_it_has_read_all_is_heard(
    house: ProxyHouse,
) -> None:
    house.small = True
    raw = house.dial()
    answer = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raw.send, wires_request("POST", "/", b"x" * 1_000_000))
        up = await house.upstream()
        await up.hears(1)
        await up.send(answer)
        up.stream.socket.shutdown(socket.SHUT_RDWR)  # most of the request is unread
    assert await raw.finishes() == answer


@proxied()
async def test_a_service_that_is_away_is_502_with_a_sentence_and_one_line_of_log(
    house: ProxyHouse,
) -> None:
    house.fault = ConnectionRefusedError(111, "Connection refused")
    for _ in range(20):
        raw = house.dial()
        await raw.send(wires_request("GET", "/api/v1/me"))
        answer = await raw.answer()
        assert (answer.status, answer.code) == (502, "upstream")
        assert answer.json["error"]["message"] == chatd.REFUSALS["upstream"][1]
        await raw.ends()
    assert house.log is not None
    lines = [m for m in house.log.messages if m.startswith("upstream_failed ")]
    assert lines == ["upstream_failed why='[Errno 111] Connection refused' open=1"]


@pytest.mark.parametrize("where", ["dialling", "answering", "reading"])
@proxied(max_message_bytes=2_000_000)
async def test_a_service_that_hangs_is_504_after_20_s(
    house: ProxyHouse, where: str
) -> None:
    house.hanging = where == "dialling"
    house.small = True
    raw = house.dial()
    body = b"x" * 1_000_000 if where == "reading" else None
    with taking(20, 20.5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raw.send, wires_request("POST", "/", body))
            answer = await raw.answer(within=30)
            nursery.cancel_scope.cancel()
    assert (answer.status, answer.code) == (504, "upstream")
    if where != "dialling":
        up = await house.upstream()
        assert await up.ends()


@proxied()
async def test_a_service_that_resets_before_its_answer_is_502(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    await raw.send(wires_request("GET", "/"))
    up = await house.upstream()
    await house.request(up)
    door_reset(up.stream)
    answer = await raw.answer()
    assert (answer.status, answer.code) == (502, "upstream")
    assert await raw.ends() == b""
    assert house.dials == 1


@proxied()
async def test_an_answer_that_still_moves_is_not_cut(house: ProxyHouse) -> None:
    raw = house.dial()
    await raw.send(wires_request("GET", "/"))
    up = await house.upstream()
    await house.request(up)
    await trio.sleep(19)
    await up.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
    for _ in range(5):
        await trio.sleep(19)
        await up.send(b"y")
    assert (await raw.answer()).body == b"yyyyy"


@proxied()
async def test_an_upstream_that_does_not_end_its_answer_is_cut_after_20_s(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    await raw.send(wires_request("GET", "/"))
    up = await house.upstream()
    await house.request(up)
    await up.send(PROXY_OK)
    with taking(20):
        assert await up.ends(within=30) == b""
    assert (await raw.answer()).body == b"ok"


@proxied()
async def test_a_client_that_does_not_take_its_answer_is_cut_after_20_s(
    house: ProxyHouse,
) -> None:
    house.small = True
    raw = house.dial(small=True)
    await raw.send(wires_request("GET", "/"))
    up = await house.upstream()
    await house.request(up)
    await up.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n")
    with taking(20, 21), contextlib.suppress(trio.BrokenResourceError):
        while len(up.data) < 10_000_000:
            await up.send(b"x" * 1000)
            up.data += b"x" * 1000
    assert len(up.data) < 200_000  # in all buffers together


@proxied()
async def test_a_client_that_resets_in_mid_answer_ends_the_upstreams_work(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    await raw.send(wires_request("GET", "/"))
    up = await house.upstream()
    await house.request(up)
    await up.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n")
    await raw.hears(1)
    door_reset(raw.stream)
    with taking(0), pytest.raises(trio.BrokenResourceError):
        await up.send(b"x" * 10_000_000)
    assert not house.proxy.listener.open


@proxied()
async def test_the_log_has_a_line_for_each_request_that_is_passed_on(
    house: ProxyHouse,
) -> None:
    no = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
    await house.exchange(wires_request("GET", "/api/v1/chats/7/messages?limit=1"))
    await house.exchange(wires_request("PATCH", "/some/token"), no)
    house.fault = ConnectionRefusedError(111, "Connection refused")
    refused = (
        wires_request("GET", "/api/v1/me"),
        wires_request("POST", "/api/v1/chats", Content_Length="65537"),
        wires_upgrade("/ws/chat?token=x"),
    )
    for sent in refused:
        raw = house.dial()
        await raw.send(sent)
        await raw.answer()
        await raw.ends()
    assert house.log is not None
    lines = [m for m in house.log.messages if m.startswith("passed ")]
    assert lines == [
        "passed method='GET' path='/api/v1/chats/7/messages' client='127.0.0.1' "
        "status=200 failed='None'",
        "passed method='PATCH' path='?' client='127.0.0.1' status=404 failed='None'",
        "passed method='GET' path='/api/v1/me' client='127.0.0.1' status=0 "
        "failed='upstream'",
    ]


# --- Proxy: the token of a socket ----------------------------------------------------


@proxied()
async def test_a_socket_needs_a_good_token_before_anybody_is_asked(
    house: ProxyHouse,
) -> None:
    good = house.target()
    expired = house.proxy.keyring.sign(6, -60)
    link = house.proxy.keyring.sign(6, 60, use="signin")
    for target, code in (
        ("/ws/chat", "token_invalid"),
        ("/ws/chat?token=", "token_invalid"),
        (good[:-3], "token_invalid"),
        (f"/ws/chat?token={expired}", "token_expired"),
        (f"/ws/chat?token={link}", "token_invalid"),
    ):
        raw = house.dial()
        await raw.send(wires_upgrade(target))
        answer = await raw.answer()
        assert (answer.status, answer.code) == (401, code), target
        assert await raw.ends() == b""
    raw = house.dial()
    await raw.send(wires_upgrade(f"{good}&token=x"))
    assert (await raw.answer()).status == 400
    raw = house.dial()
    await raw.send(wires_request("GET", good))
    assert (await raw.answer()).status == 426
    assert house.dials == 0


@proxied()
async def test_a_ticket_of_the_upstream_passes_and_is_not_spent(
    house: ProxyHouse,
) -> None:
    above = Keyring(Settings(), WIRES_SECRET)
    ticket = above.ticket(above.verify(above.sign(6, 600)))
    for _ in range(2):
        raw = house.dial()
        await raw.send(wires_upgrade(f"/ws/chat?token={ticket}"))
        got = await house.request(await house.upstream())
        assert got.target == f"/ws/chat?token={ticket}"
        above.spend(above.verify(ticket, "socket"))
        with pytest.raises(Refusal, match="token_used"):
            above.verify(ticket, "socket")
        above = Keyring(Settings(), WIRES_SECRET)
        above.boot = "another"
        ticket = above.ticket(above.verify(above.sign(6, 600)))


@proxied(handshakes=Rate(1, 3))
async def test_handshakes_are_counted_at_the_proxy(house: ProxyHouse) -> None:
    statuses = []
    for _ in range(5):
        raw = house.dial()
        await raw.send(wires_upgrade("/ws/chat?token=x"))
        statuses.append((await raw.answer()).status)
    assert statuses == [401, 401, 401, 429, 429]


@proxied()
async def test_an_upgrade_is_passed_up_with_what_a_handshake_needs(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    extension = {"Sec_WebSocket_Extensions": "permessage-deflate"}
    await raw.send(wires_upgrade(house.target(), **extension))
    got = await house.request(await house.upstream())
    assert got.header("connection").lower() == "upgrade"
    assert got.header("upgrade") == "websocket"
    assert got.header("sec-websocket-key") == "dGhlIHNhbXBsZSBub25jZQ=="
    assert got.header("sec-websocket-extensions") == "permessage-deflate"
    assert got.header("x-forwarded-for") == "127.0.0.1"


# What an upstream may answer to an upgrade that is no 101 in HTTP/1.1.
PROXY_NO_SOCKET: dict[str, bytes] = {
    "503": b"HTTP/1.1 503 Full\r\nContent-Length: 2\r\n\r\nno",
    "401, a used ticket": b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno",
    "200": PROXY_OK,
    "100, then 101": b"HTTP/1.1 100 Continue\r\n\r\n" + PROXY_101,
    "101 in HTTP/1.0": PROXY_101.replace(b"HTTP/1.1", b"HTTP/1.0"),
}


@pytest.mark.parametrize(
    "behind", [wires_request("GET", "/api/v1/me"), b"\x81\x80abcd"]
)
@pytest.mark.parametrize("what", PROXY_NO_SOCKET)
@proxied()
async def test_nothing_goes_up_behind_an_upgrade_without_101(
    house: ProxyHouse, what: str, behind: bytes
) -> None:
    answer = PROXY_NO_SOCKET[what]
    raw = house.dial()
    await raw.send(wires_upgrade(house.target()), behind)
    up = await house.upstream()
    await house.request(up)
    assert up.data == b""
    await up.send(answer)
    assert await raw.hears(len(answer)) == answer
    await raw.send(behind)
    await up.listen(1)
    await up.stream.send_eof()
    assert await raw.finishes() == answer  # and the connection ends with it
    assert await up.ends() == b""
    assert house.dials == 1


@proxied()
async def test_nothing_goes_up_behind_a_101_that_no_upgrade_asked_for(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    await raw.send(wires_request("GET", "/", Upgrade="websocket", Connection="Upgrade"))
    up = await house.upstream()
    assert (await house.request(up)).header("connection") == "close"
    await up.send(PROXY_101)
    assert await raw.hears(len(PROXY_101)) == PROXY_101
    await raw.send(wires_request("GET", "/api/v1/me"))
    await up.listen(1)
    await up.stream.send_eof()
    assert await raw.finishes() == PROXY_101
    assert await up.ends() == b""


# --- Tunnel --------------------------------------------------------------------------


@proxied()
async def test_bytes_pass_only_behind_the_101_and_then_as_they_are(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    await raw.send(wires_upgrade(house.target()), b"be")
    up = await house.upstream()
    await house.request(up)
    await raw.send(b"hind")
    await up.listen(1)
    assert up.data == b""
    await up.send(PROXY_101, b"greet")
    answer = await raw.answer()
    assert answer.status == 101
    assert answer.headers["sec-websocket-accept"] == DOOR_ACCEPT
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


@pytest.mark.parametrize("who", ["client", "upstream"])
@proxied()
async def test_an_end_of_one_side_is_passed_on_and_the_other_may_finish(
    house: ProxyHouse, who: str
) -> None:
    raw, up = await house.socket()
    one, other = (raw, up) if who == "client" else (up, raw)
    await one.send(b"last words")
    await one.stream.send_eof()
    assert await other.ends() == b"last words"
    await other.send(b"an answer")
    await other.stream.send_eof()
    assert await one.ends() == b"an answer"
    await wait_all_tasks_blocked()
    assert not house.proxy.listener.open


@pytest.mark.parametrize("who", ["client", "upstream"])
@proxied()
async def test_a_reset_of_one_side_is_one_for_the_other(
    house: ProxyHouse, who: str
) -> None:
    raw, up = await house.socket()
    one, other = (raw, up) if who == "client" else (up, raw)
    door_reset(one.stream)
    with pytest.raises(trio.BrokenResourceError), trio.fail_after(1):
        await other.read()
    await wait_all_tasks_blocked()
    assert not house.proxy.listener.open


@pytest.mark.parametrize("slow", [False, True])
@proxied()
async def test_what_the_upstream_sent_last_reaches_a_client_that_goes_on_sending(
    house: ProxyHouse, slow: bool
) -> None:
    house.small = slow
    raw, up = await house.socket(small=slow)
    last = wires_frame(TEXT, b"x" * 30_000, masked=False) + wires_close(1012)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(up.send, last)
        await raw.hears(10_000)
    up.stream.socket.close()
    with trio.move_on_after(1):
        for _ in range(20):
            await raw.send(b"x" * 1000)
            await wait_all_tasks_blocked()
    assert await raw.finishes() == last


@proxied()
async def test_a_socket_in_which_nothing_moves_is_cut_after_75_s(
    house: ProxyHouse,
) -> None:
    raw, up = await house.socket()
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
async def test_a_side_that_does_not_end_when_the_other_has_is_cut_after_40_s(
    house: ProxyHouse,
) -> None:
    raw, up = await house.socket()
    await up.stream.send_eof()
    assert await raw.read() == b""
    with taking(40), pytest.raises(trio.BrokenResourceError):
        await up.read()


@pytest.mark.parametrize("way", ["up", "down"])
@proxied()
async def test_what_one_end_does_not_take_is_not_read_from_the_other(
    house: ProxyHouse, way: str
) -> None:
    house.small = True
    raw, up = await house.socket(small=True)
    one, other = (raw, up) if way == "up" else (up, raw)
    sent = 0
    with trio.move_on_after(5):
        while True:
            await one.send(bytes(1000))
            sent += 1000
    assert sent < 200_000  # in all buffers together, the kernel's too
    await one.stream.send_eof()
    assert sent <= len(await other.ends()) < sent + 1000


# --- Proxy: its end ------------------------------------------------------------------


@proxied()
async def test_a_stop_ends_the_upstreams_side_and_passes_down_what_it_answers(
    house: ProxyHouse,
) -> None:
    idle, idle_up = await house.socket()
    busy, busy_up = await house.socket()
    frame = wires_command("ping")
    await busy.send(frame[:5])
    await busy_up.hears(5)
    house.proxy.listener.stopping.set()
    assert await idle_up.finishes() == b""
    assert await busy_up.finishes() == frame[:5]  # the upstream knows where frames end
    await busy.send(frame[5:])  # nobody reads it any more, and it hurts nobody
    for raw, up in ((idle, idle_up), (busy, busy_up)):
        await up.send(b"pong", wires_close(1012))
        await up.stream.send_eof()
        assert await raw.finishes() == b"pong" + wires_close(1012)
        raw.stream.socket.close()
    with trio.fail_after(1.1):
        await house.finished.wait()


@proxied()
async def test_a_stop_ends_the_upstreams_side_even_if_it_takes_nothing(
    house: ProxyHouse,
) -> None:
    house.small = True
    raw, up = await house.socket(small=True)
    sent = 0
    with trio.move_on_after(1):
        while True:
            await raw.send(bytes(1000))
            sent += 1000
    house.proxy.listener.stopping.set()
    await wait_all_tasks_blocked()
    assert len(await up.finishes()) < sent
    await up.send(wires_close(1012))
    await up.stream.send_eof()
    assert await raw.finishes() == wires_close(1012)


@proxied()
async def test_a_socket_that_opens_during_a_stop_is_ended_too(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    await raw.send(wires_upgrade(house.target()), b"behind")
    up = await house.upstream()
    await house.request(up)
    house.proxy.listener.stopping.set()
    await wait_all_tasks_blocked()
    await up.send(PROXY_101)
    assert (await raw.answer()).status == 101
    assert await up.finishes() == b""
    await up.send(wires_close(1012))
    await up.stream.send_eof()
    assert await raw.finishes() == wires_close(1012)


@proxied()
async def test_a_stop_lets_a_request_finish_and_ends_a_connection_without_one(
    house: ProxyHouse,
) -> None:
    silent, raw = house.dial(), house.dial()
    await raw.send(wires_request("GET", "/"))
    up = await house.upstream()
    await house.request(up)
    house.proxy.listener.stopping.set()
    with taking(0, 1):  # it had a second to ask, so as not to be refused
        assert await silent.ends(within=2) == b""
    await up.send(PROXY_OK)
    up.stream.socket.close()
    assert await raw.finishes() == PROXY_OK
    raw.stream.socket.close()
    with trio.fail_after(1):
        await house.finished.wait()


@proxied(drain_seconds=3.0)
async def test_what_does_not_end_is_cut_when_the_drain_is_over(
    house: ProxyHouse,
) -> None:
    raw, _ = await house.socket()
    waiting = house.dial()
    await waiting.send(wires_request("GET", "/"))
    await house.request(await house.upstream())
    with taking(3, 3.1):
        house.proxy.listener.stopping.set()
        await house.finished.wait()
    with pytest.raises(trio.BrokenResourceError):
        await raw.finishes()
    assert await waiting.finishes() == b""


@proxied(max_connections=1)
async def test_a_full_proxy_turns_away_at_once(house: ProxyHouse) -> None:
    for _ in range(129):
        raw = house.dial(tcp=False)
        await raw.send(wires_request("GET", "/"))
        await house.upstream()
    raw = house.dial(tcp=False)
    answer = await raw.answer()
    assert (answer.status, answer.code) == (503, "overloaded")
    assert house.dials == 129


@proxied()
async def test_a_mistake_of_ours_ends_one_connection_and_is_counted(
    house: ProxyHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house.proxy.listener, "check_handshakes", lambda _: 1 / 0)
    raw = house.dial()
    await raw.send(wires_upgrade(house.target()))
    assert (await raw.answer()).code == "internal"
    house.errors = {"ZeroDivisionError": 1}
    _, heard = await house.exchange(wires_request("GET", "/"))
    assert heard.body == b"ok"


@proxied()
async def test_a_mistake_of_ours_writes_no_answer_into_another(
    house: ProxyHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, up = await house.socket()
    with monkeypatch.context() as patch:
        patch.setattr(chatd.Tunnel, "_moved", lambda _: 1 / 0)
        await up.send(b"greet")
        with pytest.raises(trio.BrokenResourceError):
            await raw.finishes()
        with pytest.raises(trio.BrokenResourceError):
            await up.finishes()
    assert b"HTTP" not in raw.data
    house.errors = {"ZeroDivisionError": 1}
    _, heard = await house.exchange(wires_request("GET", "/"))
    assert heard.body == b"ok"


@pytest.fixture
async def proxy_house(house: DoorServer, tmp_path: Path) -> AsyncIterator[DoorProxy]:
    """A proxy of the test's own, in front of `house`, which must serve first."""
    home = tmp_path / "proxy"
    home.mkdir()
    proxy = DoorProxy(home, 0, house.db)
    yield proxy
    proxy.tidy()


# --- the proxy as a process ----------------------------------------------------------


PROXY_NODE = """
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


async def test_nodes_own_client_talks_through_the_proxy(
    door_shared_proxy: DoorServer,
) -> None:
    flag = "--experimental-websocket"  # it needs none since Node 22
    house, node = door_shared_proxy, door_node(flag)
    ann = next(door_users)
    chat = await house.chat(ann)
    url = f"ws://127.0.0.1:{house.port}{house.socket_path(ann)}"
    done = await trio.run_process(
        [node, flag, "--no-warnings", "-e", PROXY_NODE, url, str(chat)],
        capture_stdout=True,
    )
    said = done.stdout.decode().split()
    assert said == ["open", "connected", "new_message", "ack", "1000"]


async def test_the_proxy_names_the_client_and_no_client_can_forge_that(
    house: DoorServer, proxy_house: DoorProxy
) -> None:
    proxy = proxy_house
    async with house.serving("--handshakes=0.001/2"):
        proxy.serve = DoorProxy(proxy.home, house.port, house.db).serve
        async with proxy.serving():
            statuses = []
            for number in range(4):
                forged = f"X-Forwarded-For: 6.6.6.{number}"
                bad = door_get("/api/v1/me", "Host: x", forged)
                statuses.append((await proxy.raw(bad)).split()[1])
            # One bucket, that of 127.0.0.1, whatever their headers said.
            assert statuses == [b"401", b"401", b"429", b"429"]
            origin = f"Origin: http://127.0.0.1:{proxy.port}"
            page = (origin, f"Host: 127.0.0.1:{proxy.port}")
            assert b" 200 " in (await proxy.raw(door_get("/healthz", *page)))[:15]
            evil = ("Origin: http://evil.example", *page[1:])
            forged = "X-Forwarded-Host: evil.example"
            got = await proxy.raw(door_get("/healthz", *evil, forged))
            assert b" 403 " in got[:15]


async def test_a_stop_of_the_proxy_closes_its_sockets_with_1012_and_no_others(
    house: DoorServer, proxy_house: DoorProxy
) -> None:
    proxy = proxy_house
    async with house.serving():
        proxy.serve = DoorProxy(proxy.home, house.port, house.db).serve
        ann = next(door_users)
        straight = await house.peer(ann)
        async with proxy.serving("--drain-seconds=10"):
            peers = [await proxy.peer(ann) for _ in range(5)]
            await peers[0].stream.send_all(b"\x81")  # in the middle of frames
            await peers[1].stream.send_all(door_frame(TEXT, b"x" * 60_000)[:-1])
            await peers[2].stream.send_all(door_frame(TEXT, b"{", first=0))
            began = trio.current_time()
            proxy.signal(signal.SIGTERM)
            for peer in peers:
                with pytest.raises(DoorGone) as gone:
                    await peer.hear()  # its close frame is the first that it gets
                assert gone.value.code == 1012
                assert not peer.data
            for stream in proxy.streams:
                stream.socket.close()
            assert await proxy.ended() == 0
            assert trio.current_time() - began < 8
            await door_shut(proxy)
        await straight.hears_nothing()
        closed = (await house.stats())["connections"]["closed"]
        assert closed == {"1006": 5}  # chatd has had no close frame


class ProxySlow:
    """An upstream and a client that read slowly and write all that they can."""

    SIZE = 10_000_000

    def __init__(self, proxy: DoorProxy) -> None:
        self.proxy = proxy
        self.most = 0  # resident bytes, the most that was seen
        self.done = trio.Event()  # the upstream has written and read all

    def look(self) -> None:
        self.most = max(self.most, self.proxy.rss)

    async def read(self, stream: trio.SocketStream, size: int) -> None:
        """Read so many bytes, a little at a time."""
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
        """Be the upstream of one connection."""
        async with stream:
            upgrades = b"Upgrade: websocket" in await self.head(stream)
            length = f"HTTP/1.1 200 OK\r\nContent-Length: {self.SIZE}\r\n\r\n"
            await stream.send_all(PROXY_101 if upgrades else length.encode())
            await self.both(stream, reads=upgrades, writes=True)
            self.done.set()

    async def both(
        self, stream: trio.SocketStream, *, reads: bool, writes: bool
    ) -> None:
        """Write all, and read as much at the same time."""
        frame = door_frame(2, bytes(self.SIZE // 100 - 14))
        assert self.SIZE % len(frame) == 0
        async with trio.open_nursery() as nursery:
            if writes:
                nursery.start_soon(self.write, stream, frame)
            if reads:
                await self.read(stream, self.SIZE)


@pytest.mark.parametrize("what", ["a socket", "a request"])
async def test_10_mb_between_slow_peers_take_no_memory(
    house: DoorServer, proxy_house: DoorProxy, what: str
) -> None:
    async with house.serving():  # for its secret
        pass
    proxy, slow = proxy_house, ProxySlow(proxy_house)
    async with trio.open_nursery() as nursery:
        serve = functools.partial(trio.serve_tcp, slow.serve, 0, host="127.0.0.1")
        (door,) = await nursery.start(serve)
        port = door.socket.getsockname()[1]
        proxy.serve = DoorProxy(proxy.home, port, house.db).serve
        async with proxy.serving():
            head = wires_request("GET", "/")
            if what == "a socket":
                head = wires_upgrade(proxy.socket_path(6))
            stream = await proxy.dial()
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
