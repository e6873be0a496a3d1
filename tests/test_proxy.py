"""The proxy, between socket pairs under virtual time, and as a process.

The test is the client on one side and the upstream on the other, both in bytes: what
the proxy passes is looked at as the other end gets it, and what never reaches the
other end is asserted too.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
from collections.abc import AsyncIterator
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
from wsproto.frame_protocol import FrameProtocol, Opcode

import chatd
from chatd import Keyring, Rate, Refusal, Settings
from tests.harness import (
    DOOR_ACCEPT,
    PROXY_101,
    PROXY_OK,
    TEXT,
    WIRES_BAD_HEADS,
    WIRES_SECRET,
    DoorProxy,
    DoorServer,
    ProxyHouse,
    WiresRaw,
    door_frame,
    door_get,
    door_node,
    door_shut,
    door_users,
    proxied,
    proxy_run,
    taking,
    wires_close,
    wires_command,
    wires_request,
    wires_upgrade,
)

# --- Passage: what goes up -----------------------------------------------------------


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
    assert got.one("authorization") == "Bearer x.y"
    assert got.one("idempotency-key") == "k"
    assert got.one("origin") == "http://chat.example"
    assert got.one("host") == "chat.example"
    assert got.one("connection") == "close"
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
async def test_nobody_says_himself_who_he_is(house: ProxyHouse) -> None:
    got, _ = await house.exchange(wires_request("GET", "/", **PROXY_FORGED))
    assert got.one("x-forwarded-for") == "127.0.0.1"
    assert got.one("x-forwarded-proto") == "http"
    assert got.one("x-forwarded-host") == "chat.example"
    assert not got.names & {"forwarded", "x-real-ip", "x-forwarded-port"}
    assert not any("6.6.6" in value for _, value in got.headers)


@proxied(trusted_proxy=("127.0.0.0/8",))
async def test_a_trusted_proxy_before_us_says_who_asks(house: ProxyHouse) -> None:
    forged = PROXY_FORGED | {
        "X-Forwarded-For": "6.6.6.6, 9.9.9.9, 127.0.0.5",
        "X-Forwarded-Host": "chat.example.org",
    }
    del forged["x-FORWARDED-for"]
    got, _ = await house.exchange(wires_request("GET", "/", **forged))
    assert got.one("x-forwarded-for") == "9.9.9.9"
    assert got.one("x-forwarded-proto") == "https"
    assert got.one("x-forwarded-host") == "chat.example.org"
    assert not got.names & {"forwarded", "x-real-ip", "x-forwarded-port"}


@proxied()
async def test_what_concerns_one_connection_goes_no_further(house: ProxyHouse) -> None:
    hop = {
        "Connection": "keep-alive, X-Mine, Host, Content-Length, X-Forwarded-For",
        "Keep-Alive": "5", "TE": "trailers", "Trailer": "x", "Upgrade": "h2c",
        "Proxy-Connection": "x", "Proxy-Authorization": "x", "X-Mine": "1",
        "X-Your": "2",
    }  # fmt: skip
    answer = (
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Theirs\r\nKeep-Alive: 5\r\n"
        b"X-Theirs: 1\r\nX-Ours: 2\r\nContent-Length: 2\r\n\r\nok"
    )
    got, heard = await house.exchange(
        wires_request("POST", "/", b"body", **hop), answer
    )
    assert got.names == {
        "host", "x-your", "content-length", "connection", "via", "x-forwarded-for",
        "x-forwarded-host", "x-forwarded-proto",
    }  # fmt: skip
    assert (got.body, got.one("via")) == (b"body", "1.1 chatd")
    assert got.one("x-forwarded-for") == "127.0.0.1"
    assert "x-ours" in heard.headers
    assert not {*heard.headers} & {"x-theirs", "keep-alive"}


@proxied()
async def test_the_body_is_passed_up_exactly_whatever_its_frame(
    house: ProxyHouse,
) -> None:
    chunks = b"3;x=y\r\nabc\r\n5\r\ndefgh\r\n0\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n"
    sent = wires_request("POST", "/", Transfer_Encoding="chunked") + chunks
    got, _ = await house.exchange(sent)
    assert got.body == b"abcdefgh"
    assert got.one("transfer-encoding") == "chunked"
    assert "content-length" not in got.names
    got, _ = await house.exchange(wires_request("POST", "/", b""))
    assert (got.body, got.one("content-length")) == (b"", "0")
    got, _ = await house.exchange(wires_request("POST", "/", b"x" * 300_000))
    assert got.body == b"x" * 300_000


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
    await up.send(
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n"
    )
    assert (await raw.answer()).headers["connection"] == "close"
    await raw.send(second)  # now, too, it is nobody's
    assert await up.ends() == b""
    assert await raw.ends() == b""
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
    assert head.lower().count(b"content-length: 2\r\n") == 1
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
                if side.next_event() is h11.NEED_DATA:
                    break  # the client left in the middle of it
            assert side.trailing_data[0] == b""
        await raw.ends()
        assert house.dials <= 1

    proxy_run(main)


@pytest.mark.parametrize(
    "body", [b"3\r\nabcX", b"-1\r\n", b"3\r\nabc\r\nzz\r\n", b"3\nabc\r\n0\r\n\r\n"]
)
@proxied()
async def test_a_body_that_breaks_off_its_frame_has_no_end_above(
    house: ProxyHouse, body: bytes
) -> None:
    raw = house.dial()
    await raw.send(wires_request("POST", "/", Transfer_Encoding="chunked"), body)
    assert (await raw.answer()).status == 400
    up = await house.upstream()
    assert not (await up.ends()).endswith(b"0\r\n\r\n")
    assert await raw.ends() == b""


@proxied()
async def test_a_client_that_leaves_in_mid_body_leaves_a_request_without_an_end(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    await raw.send(wires_request("POST", "/", Content_Length="10"), b"hello")
    up = await house.upstream()
    await up.listen(0.5)
    raw.stream.socket.close()
    assert (await up.ends()).endswith(b"\r\n\r\nhello")


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
async def test_an_old_client_gets_no_chunks_and_no_100(house: ProxyHouse) -> None:
    raw = house.dial()
    await raw.send(b"GET / HTTP/1.0\r\n\r\n")
    up = await house.upstream()
    assert (await house.request(up)).one("host") == "chat.example:8086"
    chunks = b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    await up.send(b"HTTP/1.1 103 Early Hints\r\n\r\n", b"HTTP/1.1 200 OK\r\n", chunks)
    head, _, body = (await raw.ends()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert b"chunked" not in head
    assert body == b"ok"


@proxied()
async def test_who_waits_for_100_gets_the_upstreams(house: ProxyHouse) -> None:
    raw = house.dial()
    await raw.send(
        wires_request("POST", "/", Content_Length="4", Expect="100-continue")
    )
    up = await house.upstream()
    await up.listen(1)
    assert b"expect: 100-continue" in up.data.lower()
    assert raw.data == b""
    await up.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    await raw.read()
    assert raw.data.startswith(b"HTTP/1.1 100 ")
    await raw.send(b"body")
    await up.listen(1)
    assert up.data.endswith(b"\r\n\r\nbody")
    await up.send(PROXY_OK)
    assert (await raw.answer()).body == b"ok"
    assert raw.informed == [100]


@proxied()
async def test_an_answer_before_the_body_is_there_ends_it(house: ProxyHouse) -> None:
    raw = house.dial()
    await raw.send(wires_request("POST", "/", Content_Length="1000000"), b"x" * 5000)
    up = await house.upstream()
    await up.listen(0.1)
    await up.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
    assert (await raw.answer()).status == 413
    assert await up.ends()
    await raw.ends()


# --- Passage: what comes down --------------------------------------------------------


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
}  # fmt: skip


@pytest.mark.parametrize("what", PROXY_ANSWERS)
@proxied()
async def test_an_answer_of_any_frame_comes_down_whole(
    house: ProxyHouse, what: str
) -> None:
    method, answer, status, body = PROXY_ANSWERS[what]
    _, heard = await house.exchange(wires_request(method, "/"), answer, method)
    assert (heard.status, heard.body) == (status, body)


PROXY_NONSENSE: dict[str, bytes] = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "no HTTP": b"220 smtp.example ESMTP\r\n" * 10,
    "a head without end": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 10_000,
    "a status of 999999": b"HTTP/1.1 999999 OK\r\n\r\n",
    "a status of 099": b"HTTP/1.1 099 OK\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2, 3\r\n\r\nok",
    "a length and chunks": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"2\r\nok\r\n0\r\n\r\n"
    ),
    "a 101 that nobody asked for": PROXY_101,
}


@pytest.mark.parametrize("what", PROXY_NONSENSE)
@proxied()
async def test_an_answer_that_is_none_is_502(house: ProxyHouse, what: str) -> None:
    raw = house.dial()
    await raw.send(wires_request("GET", "/"))
    up = await house.upstream()
    await house.request(up)
    with contextlib.suppress(trio.BrokenResourceError):
        await up.send(PROXY_NONSENSE[what])
    up.stream.socket.close()
    answer = await raw.answer()
    assert (answer.status, answer.code) == (502, "upstream")
    assert await raw.ends() == b""
    assert house.dials == 1  # it is never asked twice


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("end", ["closes", "resets", "breaks its frame"])
@pytest.mark.parametrize("frame", ["Content-Length: 10", "Transfer-Encoding: chunked"])
@proxied()
async def test_an_answer_that_breaks_off_never_looks_whole(
    house: ProxyHouse, frame: str, end: str, version: str
) -> None:
    if end == "breaks its frame" and frame.startswith("Content"):
        return
    raw = house.dial()
    await raw.send(f"GET / HTTP/{version}\r\nHost: x\r\n\r\n".encode())
    up = await house.upstream()
    await house.request(up)
    body = b"5\r\nhello\r\n" if "chunked" in frame else b"hello"
    await up.send(f"HTTP/1.1 200 OK\r\n{frame}\r\n\r\n".encode(), body)
    while not raw.data.rstrip().endswith(b"hello"):
        await raw.read()
    if end == "breaks its frame":
        await up.send(b"nonsense\r\n")
    if end == "resets":
        chatd.reset(up.stream)
    up.stream.socket.close()
    with pytest.raises(trio.BrokenResourceError):
        await raw.listen()


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
@proxied()
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
    if where == "answering":
        up = await house.upstream()
        assert await up.ends()


@proxied()
async def test_a_body_that_does_not_come_is_408_after_20_s(house: ProxyHouse) -> None:
    raw = house.dial()
    await raw.send(wires_request("POST", "/", Content_Length="10"), b"hello")
    with taking(20):
        assert (await raw.answer(within=30)).status == 408
    up = await house.upstream()
    assert (await up.ends()).endswith(b"hello")


@proxied()
async def test_what_still_moves_is_not_cut(house: ProxyHouse) -> None:
    raw = house.dial()
    await raw.send(wires_request("POST", "/", Content_Length="10"))
    up = await house.upstream()
    for _ in range(10):
        await trio.sleep(19)
        await raw.send(b"x")
    await house.request(up)
    await trio.sleep(19)
    await up.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
    for _ in range(5):
        await trio.sleep(19)
        await up.send(b"y")
    assert (await raw.answer()).body == b"yyyyy"


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


# --- Passage: the token at the door --------------------------------------------------


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
async def test_handshakes_are_counted_at_the_door(house: ProxyHouse) -> None:
    statuses = []
    for _ in range(5):
        raw = house.dial()
        await raw.send(wires_upgrade("/ws/chat?token=x"))
        statuses.append((await raw.answer()).status)
    assert statuses == [401, 401, 401, 429, 429]


@proxied()
async def test_an_upgrade_is_passed_up_and_a_refusal_of_it_down(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    extension = {"Sec_WebSocket_Extensions": "permessage-deflate"}
    await raw.send(wires_upgrade(house.target(), **extension), b"behind")
    up = await house.upstream()
    got = await house.request(up)
    assert got.one("connection").lower() == "upgrade"
    assert got.one("upgrade") == "websocket"
    assert got.one("sec-websocket-key") == "dGhlIHNhbXBsZSBub25jZQ=="
    assert got.one("sec-websocket-extensions") == "permessage-deflate"
    assert up.data == b""  # what came behind waits for the 101
    await up.send(b"HTTP/1.1 503 Full\r\nContent-Length: 2\r\n\r\nno")
    assert (await raw.answer()).status == 503
    assert await up.ends() == b""
    assert await raw.ends() == b""


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
    assert not house.proxy.open


@pytest.mark.parametrize("who", ["client", "upstream"])
@proxied()
async def test_a_reset_of_one_side_is_one_for_the_other(
    house: ProxyHouse, who: str
) -> None:
    raw, up = await house.socket()
    one, other = (raw, up) if who == "client" else (up, raw)
    chatd.reset(one.stream)
    with pytest.raises(trio.BrokenResourceError), trio.fail_after(1):
        await other.read()
    await wait_all_tasks_blocked()
    assert not house.proxy.open


@proxied()
async def test_the_upstreams_last_words_reach_a_client_that_talks_on(
    house: ProxyHouse,
) -> None:
    raw, up = await house.socket()
    await up.send(wires_close(1012))
    up.stream.socket.close()
    for _ in range(5):
        await raw.send(b"x" * 1000)
        await wait_all_tasks_blocked()
    assert await raw.ends() == wires_close(1012)


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
async def test_who_does_not_end_behind_an_end_is_cut_after_10_s(
    house: ProxyHouse,
) -> None:
    raw, up = await house.socket()
    await up.stream.send_eof()
    assert await raw.read() == b""
    with taking(10), pytest.raises(trio.BrokenResourceError):
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


@hypothesis.settings(deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 125, 126, 300, 65_535, 65_536]), max_size=5),
    st.lists(st.integers(1, 20) | st.integers(1000, 70_000), min_size=1, max_size=5),
    st.booleans(),
)
def test_the_end_of_a_frame_is_found_however_the_bytes_are_cut(
    sizes: list[int], cuts: list[int], masked: bool
) -> None:
    frames = [door_frame(TEXT, bytes(size), masked=masked) for size in sizes]
    ends = {0, *itertools.accumulate(map(len, frames))}
    data, at, cut = b"".join(frames), 0, itertools.cycle(cuts)
    found = chatd.FrameEnds()
    assert found.whole
    while at < len(data):
        piece = data[at : at + next(cut)]
        found.count(piece)
        at += len(piece)
        assert found.whole == (at in ends)


# --- Proxy: its end ------------------------------------------------------------------


async def proxy_close(up: WiresRaw, within: float = 1.0) -> int:
    """The code of the close frame that the upstream gets, which must be masked."""
    side = FrameProtocol(client=False, extensions=[])
    side.receive_bytes(bytes(up.data))
    with trio.fail_after(within):
        while True:
            side.receive_bytes(await up.read())
            for frame in side.received_frames():
                if frame.opcode is Opcode.CLOSE:
                    return int(frame.payload[0])


@proxied()
async def test_a_stop_closes_sockets_behind_the_clients_last_whole_frame(
    house: ProxyHouse,
) -> None:
    idle, idle_up = await house.socket()
    busy, busy_up = await house.socket()
    frame = wires_command("ping")
    await busy.send(frame[:5])
    await busy_up.listen(0.1)
    house.proxy.stopping.set()
    assert await proxy_close(idle_up) == 1012
    await busy_up.listen(0.5)
    assert busy_up.data == frame[:5]  # nothing in the middle of a frame
    await busy.send(frame[5:])
    assert await proxy_close(busy_up) == 1012
    for raw, up in ((idle, idle_up), (busy, busy_up)):
        await up.send(wires_close(1012))
        await up.stream.send_eof()
        assert await raw.ends() == wires_close(1012)
        raw.stream.socket.close()
    with trio.fail_after(1.1):
        await house.proxy.finished.wait()


@proxied()
async def test_a_socket_that_opens_while_it_stops_is_closed_too(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    await raw.send(wires_upgrade(house.target()))
    up = await house.upstream()
    await house.request(up)
    house.proxy.stopping.set()
    await wait_all_tasks_blocked()
    await up.send(PROXY_101)
    assert (await raw.answer()).status == 101
    assert await proxy_close(up) == 1012


@proxied()
async def test_a_stop_lets_a_request_finish_and_ends_who_waits_to_ask(
    house: ProxyHouse,
) -> None:
    silent, raw = house.dial(), house.dial()
    await raw.send(wires_request("GET", "/"))
    up = await house.upstream()
    await house.request(up)
    house.proxy.stopping.set()
    with taking(0, 1):  # it had a second to ask, so as not to be refused
        assert await silent.ends(within=2) == b""
    await up.send(PROXY_OK)
    assert (await raw.answer()).body == b"ok"
    await raw.ends()
    raw.stream.socket.close()
    with trio.fail_after(1):
        await house.proxy.finished.wait()


@proxied(drain_seconds=3.0)
async def test_what_does_not_end_is_cut_when_the_drain_is_over(
    house: ProxyHouse,
) -> None:
    raw, _ = await house.socket()
    waiting = house.dial()
    await waiting.send(wires_request("GET", "/"))
    await house.request(await house.upstream())
    with taking(3, 3.1):
        house.proxy.stopping.set()
        await house.proxy.finished.wait()
    assert await raw.ends() == b""


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
async def test_a_mistake_of_ours_ends_one_connection_and_is_told(
    house: ProxyHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house.proxy, "check_handshakes", lambda _: 1 / 0)
    raw = house.dial()
    await raw.send(wires_upgrade(house.target()))
    assert (await raw.answer()).code == "internal"
    house.errors = {"ZeroDivisionError": 1}
    _, heard = await house.exchange(wires_request("GET", "/"))
    assert heard.body == b"ok"


@pytest.fixture
async def proxy_house(house: DoorServer, tmp_path: Path) -> AsyncIterator[DoorProxy]:
    """A proxy of the test's own, before `house`, which must serve first."""
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


async def test_the_proxy_tells_who_asks_and_nobody_can_say_so_himself(
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
            # One bucket, that of 127.0.0.1, whatever they said.
            assert statuses == [b"401", b"401", b"429", b"429"]
            origin = f"Origin: http://127.0.0.1:{proxy.port}"
            page = (origin, f"Host: 127.0.0.1:{proxy.port}")
            assert b" 200 " in (await proxy.raw(door_get("/healthz", *page)))[:15]
            evil = ("Origin: http://evil.example", *page[1:])
            forged = "X-Forwarded-Host: evil.example"
            got = await proxy.raw(door_get("/healthz", *evil, forged))
            assert b" 403 " in got[:15]


async def test_a_stop_of_the_proxy_closes_its_sockets_properly_and_no_others(
    house: DoorServer, proxy_house: DoorProxy
) -> None:
    proxy = proxy_house
    async with house.serving():
        proxy.serve = DoorProxy(proxy.home, house.port, house.db).serve
        ann = next(door_users)
        straight = await house.peer(ann)
        async with proxy.serving("--drain-seconds=10"):
            peers = [await proxy.peer(ann) for _ in range(5)]
            began = trio.current_time()
            proxy.signal(signal.SIGTERM)
            assert [await peer.ended() for peer in peers] == [1012] * 5
            for stream in proxy.streams:
                stream.socket.close()
            assert await proxy.ended() == 0
            assert trio.current_time() - began < 8
            await door_shut(proxy)
        await straight.hears_nothing()
        closed = (await house.stats())["connections"]["closed"]
        assert closed == {"1012": 5}


class ProxySlow:
    """An upstream that answers and reads slowly, and a client that does too."""

    SIZE = 10_000_000

    def __init__(self, proxy: DoorProxy) -> None:
        self.proxy = proxy
        self.most = 0  # resident bytes, the most that was seen
        self.base = 0

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
            if not upgrades:
                await self.read(stream, self.SIZE)
            await stream.send_all(PROXY_101 if upgrades else length.encode())
            await self.both(stream, reads=upgrades)

    async def both(self, stream: trio.SocketStream, *, reads: bool) -> None:
        """Write all, and read as much at the same time."""
        frame = door_frame(2, bytes(self.SIZE // 100 - 14))
        assert self.SIZE % len(frame) == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.write, stream, frame)
            if reads:
                await self.read(stream, self.SIZE)


@pytest.mark.parametrize("what", ["a socket", "a request"])
async def test_10_mb_each_way_between_slow_peers_take_no_memory(
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
            head = wires_request("POST", "/", Content_Length=str(slow.SIZE))
            if what == "a socket":
                head = wires_upgrade(proxy.socket_path(6))
            stream = await proxy.dial()
            with trio.fail_after(60):
                await stream.send_all(head)
                if what == "a socket":
                    await slow.head(stream)
                base = proxy.rss
                async with trio.open_nursery() as both:
                    frame = door_frame(2, bytes(slow.SIZE // 100 - 14))
                    both.start_soon(slow.write, stream, frame)
                    if what == "a request":
                        await slow.head(stream)
                    await slow.read(stream, slow.SIZE)
            assert slow.most - base < 4_000_000, (base, slow.most)
        nursery.cancel_scope.cancel()
