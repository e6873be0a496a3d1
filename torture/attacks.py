"""Each named attack gets the right answer, and harms no other client.

The tables list invalid and unusual requests, frames, commands, bodies and tokens, each
with the answer that the protocol promises. Attacks that are more than bytes are
functions: races for a ticket, revocations amid pings, crowds of refused clients that
stay connected. After each attack two honest clients send a message, and after each
table the numbers of descriptors and sockets are what they were before.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import math
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jwt
import trio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from harness import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    Chatd,
    Client,
    Closed,
    Figures,
    Http,
    Refused,
    Reply,
    WebSocket,
    client_frame,
    close_code,
    http,
    make_chat,
    post_message,
    reset,
    revoke,
    run_trio,
    save_evidence,
    stats,
    text,
    ticket,
)

CLAIM = (
    "each of the named attacks gets the right answer; other clients go on talking, and "
    "nothing stays behind"
)
SECONDS = 5.0  # the longest wait for an answer that should come at once
# In a row: a pause in the sending, and the end of the client's side.
CUT, END = b"<cut>", b"<end>"
CONTINUATION = 0


# --- raw connections -----------------------------------------------------------------


class RawConnection:
    """One TCP connection, on which bytes are sent and read as they are."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.data = b""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, port: int) -> AsyncIterator[RawConnection]:
        """Connect; the end of the block closes the connection."""
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        try:
            yield cls(stream)
        finally:
            stream.socket.close()

    async def send(self, data: bytes) -> None:
        """Send; chatd may end the connection meanwhile."""
        with contextlib.suppress(trio.BrokenResourceError):
            await self.stream.send_all(data)

    async def read(self) -> bool:
        """Read once. False: chatd has ended the connection."""
        try:
            more = await self.stream.receive_some(65536)
        except trio.BrokenResourceError:
            return False
        self.data += more
        return bool(more)

    async def read_until(self, end: bytes, failure: str) -> None:
        """Read until this has arrived. failure: the sentence if it does not."""
        with trio.fail_after(SECONDS):
            while end not in self.data:
                assert await self.read(), failure

    async def replies(self) -> list[Reply]:
        """Read at least one answer; return those that have arrived."""
        replies: list[Reply] = []
        with trio.fail_after(SECONDS):
            while not replies and await self.read():
                self.data = parse_answers(self.data, replies)
        return replies


def request(method: str, target: str, *lines: str, body: bytes = b"") -> bytes:
    """The bytes of a request, with these header lines and this body, unchanged."""
    head = "\r\n".join((f"{method} {target} HTTP/1.1", *lines, "", ""))
    return head.encode("latin-1") + body


def parse_answers(data: bytes, replies: list[Reply]) -> bytes:
    """Append the whole answers at the front of data to replies; return the rest."""
    while b"\r\n\r\n" in data:
        head, _, rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1", f"not an answer: {first!r}"
        pairs = [line.lower().split(": ", 1) for line in lines]
        pairs.sort(key=lambda pair: pair[1] == "close")
        headers = dict(pairs)  # Connection may stand twice, once as close
        twice = len(pairs) - len(headers) - headers.get("connection", "").count("close")
        assert twice <= 0, f"a header twice: {lines}"
        bodiless = status in ("100", "101", "204", "304")
        size = 0 if bodiless else int(headers["content-length"])
        if len(rest) < size:
            break
        reply, data = Reply(int(status), headers, rest[:size]), rest[size:]
        replies.append(reply)
        if reply.status >= 400:
            save_evidence("error", reply.body)
            assert code_of(reply), f"an error without a code: {reply}"
            assert reply.json["error"]["message"], f"without a sentence: {reply}"
    return data


def code_of(reply: Reply) -> str:
    """The code of an error."""
    return str(reply.json["error"]["code"])


# --- the target ----------------------------------------------------------------------


class Target:
    """A server under attack, two honest clients, and the server's state before."""

    def __init__(self, chatd: Chatd) -> None:
        self.chatd = chatd
        self.anna, self.ben = Client(chatd, 1), Client(chatd, 2)
        self.users = 10
        self.chat = self.descriptors = self.sockets = self.rss = 0
        self.rows = self.newest = 0
        self.slowest = 0.0  # seconds until a message arrived and was acked

    async def prepare(self) -> None:
        """Connect the honest clients, and let the server open its database readers."""
        self.chat = await make_chat(self.chatd, [1, 2])
        await self.anna.connect()
        await self.ben.connect()
        async with trio.open_nursery() as nursery:
            for _ in range(40):  # enough to use all readers at once
                nursery.start_soon(self.get, "/api/v1/chats")
        await self.send_message()
        self.sockets = await self.active()
        counted = []
        for _ in range(20):  # the connections of those requests are closing
            await trio.sleep(0.05)
            counted.append(self.chatd.open_sockets())
        self.descriptors = min(counted)
        self.rss = self.chatd.rss_bytes()

    async def get(self, path: str) -> Reply:
        """Send a GET request as the service."""
        return await http(self.chatd, "GET", path, self.chatd.service_token())

    async def active(self) -> int:
        """How many sockets the stats document counts; it must count no exception."""
        document = await stats(self.chatd)
        errors = document["errors"]
        assert not errors, f"exceptions in the server: {errors}"
        return int(document["connections"]["active"])

    def new_user(self) -> int:
        """The id of a user that no other row uses."""
        self.users += 1
        return self.users

    async def send_message(self) -> None:
        """Send a message from Anna to Ben; both must get it, and nothing else."""
        began = time.monotonic()
        content = text()
        await self.anna.send(self.chat, content)
        frame = await self.anna.receive(seconds=SECONDS)
        assert frame["type"] == "new_message", f"the sender received {frame}"
        assert (await self.anna.receive(seconds=SECONDS))["type"] == "ack"
        event = await self.ben.receive(seconds=SECONDS)
        self.newest = int(event["seq"])
        assert event["type"] == "new_message", f"the other client received {event}"
        assert event["message"]["content"] == content, "another message arrived"
        self.slowest = max(self.slowest, time.monotonic() - began)

    @contextlib.asynccontextmanager
    async def attacked(self, name: str) -> AsyncIterator[None]:
        """Run one attack, then send a message. A failure names the attack."""
        try:
            with trio.fail_after(60):
                yield
                await self.send_message()
        except (AssertionError, Closed, Refused, trio.TooSlowError, KeyError) as error:
            kind = type(error).__name__
            raise AssertionError(f"attack {name!r}: {kind}: {error}") from error
        self.rows += 1

    async def cleaned_up(self, attack: str, seconds: float = SECONDS) -> None:
        """Verify that the server soon has as few descriptors and sockets as before."""
        deadline = trio.current_time() + seconds
        while left := max(0, self.chatd.open_sockets() - self.descriptors):
            if trio.current_time() > deadline:
                break
            await trio.sleep(0.05)
        assert not left, f"after {attack} {left} sockets stayed open {seconds:.0f} s"
        files = self.chatd.descriptors() - self.descriptors
        assert files < 32, f"after {attack} {files} other descriptors are open"
        sockets = await self.active() - self.sockets
        assert sockets == 0, f"after {attack} {sockets} sockets are still counted"


# --- requests ------------------------------------------------------------------------

HOST = "Host: chat.example"
KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
UPGRADE = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
CHUNKED = "Transfer-Encoding: chunked"
HEALTH = request("GET", "/healthz", HOST)

# By name: the expected statuses of all answers, in order, and the bytes to send.
Rows = dict[str, tuple[int | tuple[int, ...], bytes]]


async def try_request(
    port: int, expected: int | tuple[int, ...], data: bytes, *, ends: bool
) -> Reply:
    """Send bytes; verify that exactly these answers come; return the last.

    ends: chatd must end the connection after them, although the client does not.
    """
    statuses = expected if isinstance(expected, tuple) else (expected,)
    replies: list[Reply] = []
    async with RawConnection.open(port) as raw:
        for piece in data.split(CUT):
            if piece == END:
                with contextlib.suppress(trio.BrokenResourceError):
                    await raw.stream.send_eof()
            else:
                await raw.send(piece)
                await trio.lowlevel.checkpoint()
        with trio.fail_after(SECONDS):
            while (ends or len(replies) < len(statuses)) and await raw.read():
                raw.data = parse_answers(raw.data, replies)
    got = tuple(reply.status for reply in replies)
    assert got == statuses, f"answered {got}, not {statuses}: {replies[-1:]}"
    assert not raw.data, f"bytes behind the last answer: {raw.data[:80]!r}"
    if not replies:
        return Reply(0, {}, b"")
    header = replies[-1].headers.get("connection")
    assert not ends or header == "close", f"the last answer has Connection: {header}"
    return replies[-1]


def in_bytes(data: bytes) -> bytes:
    """Make data that is sent byte by byte."""
    return CUT.join(bytes([byte]) for byte in data)


def get(target: str, *lines: str) -> bytes:
    """The bytes of a GET request with a Host."""
    return request("GET", target, HOST, *lines)


def broken_heads() -> Rows:
    """Invalid heads: each is answered once, and the connection ends."""
    many = ["X: y"] * 700
    return {
        "random bytes": (400, bytes(range(256)) * 8 + b"\r\n\r\n"),
        "a TLS hello": (400, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n"),
        "an SSH hello": (400, b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
        "an SMTP hello": (400, b"EHLO example\r\n\r\n"),
        "a PROXY header": (400, b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n\r\n"),
        "HTTP/2's preface": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        "HTTP/0.9": (400, b"GET /healthz\r\n\r\n"),
        "HTTP/1.2": (400, b"GET /healthz HTTP/1.2\r\nHost: x\r\n\r\n"),
        "HTTP/1.10": (400, b"GET /healthz HTTP/1.10\r\nHost: x\r\n\r\n"),
        "HTTP/3.0": (400, b"GET /healthz HTTP/3.0\r\nHost: x\r\n\r\n"),
        "http/1.1": (400, b"GET /healthz http/1.1\r\nHost: x\r\n\r\n"),
        "two spaces": (400, b"GET  /healthz HTTP/1.1\r\nHost: x\r\n\r\n"),
        "a tab": (400, b"GET\t/healthz HTTP/1.1\r\nHost: x\r\n\r\n"),
        "a fold before any header": (400, b"GET / HTTP/1.1\r\n X: y\r\n\r\n"),
        "no Host": (400, request("GET", "/healthz")),
        "two Host headers": (400, get("/healthz", HOST)),
        "a space before the colon": (400, get("/healthz", "X : y")),
        "a line without a colon": (400, get("/healthz", "nonsense")),
        "a header without a name": (400, get("/healthz", ": y")),
        "a NUL in a value": (400, get("/healthz", "X: y\0z")),
        "a bare CR": (400, get("/healthz", "X: y\rz")),
        "a space in the target": (400, get("/a b")),
        "byte 255 in the target": (400, get("/\xff")),
        "a method with a slash": (400, request("G/T", "/healthz", HOST)),
        "an error in single bytes": (400, in_bytes(get("/healthz", "X : y"))),
        "65 header lines": (431, get("/healthz", *many[:64])),
        "700 header lines": (431, get("/healthz", *many)),
        "a header of 100 KB": (431, get("/healthz", "X: " + "y" * 100_000)),
        "a target of 100 KB": (431, get("/" + "y" * 100_000)),
        "a method of 100 KB": (431, b"Y" * 100_000),
        "a header without end": (
            431,
            CUT.join([b"GET / HTTP/1.1\r\nX", b"y" * 40_000]),
        ),
        "a whole URL with a user": (400, get("http://chat.example@x/healthz")),
        "a whole URL without a host": (400, get("http:///healthz")),
        "a whole URL with two slashes": (400, get("http://chat.example//healthz")),
        "two slashes": (400, get("//healthz")),
        "two slashes and a bracket": (400, get("//[::1/healthz")),
        "an asterisk": (400, request("OPTIONS", "*", HOST)),
        "CONNECT": (400, request("CONNECT", "chat.example:443", HOST)),
        "nonsense after a request": ((200, 400), HEALTH + b"\xff\r\n\r\n"),
        "after Connection: close": (200, get("/healthz", "Connection: close") + HEALTH),
        "after HTTP/1.0": (200, b"GET /healthz HTTP/1.0\r\n\r\n" + HEALTH),
        "after a refused upgrade": (401, get("/ws/chat", *UPGRADE, KEY) + HEALTH),
        "only line ends": (400, b"\r\n" * 3),
        "a head cut short": ((), CUT.join([HEALTH[:-2], END])),
    }


def odd_requests(token: str, post: str) -> Rows:
    """Unusual requests that do no harm: chatd answers, and the connection stays."""
    bearer = f"Authorization: Bearer {token}"
    events = "/api/v1/events"
    hello = json.dumps({"content": text()}).encode()
    length = f"Content-Length: {len(hello)}"
    high = "".join(map(chr, range(128, 256)))
    forged = "X-Forwarded-For: " + "1.2.3.4, " * 500 + "::1, [::1], fe80::1%eth0, , x"
    chunk = b"%x\r\n%s\r\n0\r\n" % (len(hello), hello)

    def send(*lines: str, body: bytes = hello) -> bytes:
        return request("POST", post, HOST, bearer, *lines, body=body)

    def chats(chat: object) -> bytes:
        return get(f"/api/v1/chats/{chat}/messages", bearer)

    return {
        "a folded header": (200, get("/healthz", "X: y\r\n z")),
        "bare line feeds": (200, b"GET /healthz HTTP/1.1\nHost: x\n\n"),
        "ESC in a value": (200, get("/healthz", "X: \x1b[2J\x07")),
        "bytes above 127 in a value": (200, get("/healthz", "X: " + high)),
        "64 header lines": (200, get("/healthz", *["X: y"] * 63)),
        "a request in single bytes": (200, in_bytes(HEALTH)),
        "three requests at once": ((200, 200, 200), HEALTH * 3),
        "a whole URL": (200, get("HTTP://chat.example?a=b")),
        "a whole URL of another site": (
            403,
            get("http://evil.example/healthz", "Origin: http://chat.example"),
        ),
        "TRACE": (405, request("TRACE", "/healthz", HOST)),
        "a method in lower case": (405, request("get", "/healthz", HOST)),
        "an unknown method": (405, request("HACK", "/healthz", HOST)),
        "dots": (404, get("/web/../chatd.py")),
        "encoded dots": (404, get("/web/%2e%2e/chatd.py")),
        "an encoded slash": (404, get("/web%2findex.html")),
        "an encoded NUL": (404, get("/web/index.html%00")),
        "the secret": (404, get("/chatd.secret")),
        "the database": (404, get("/chatd.db")),
        "a semicolon": (404, get("/healthz;a=b")),
        "a fragment": (404, get("/healthz#a")),
        "a chat 0": (404, chats(0)),
        "a chat -1": (404, chats(-1)),
        "a chat 1.0": (404, chats("1.0")),
        "a chat *": (404, chats("*")),
        "a chat 2**53": (404, chats(2**53)),
        "a chat of 30 digits": (404, chats("9" * 30)),
        "a chat of other users": (404, chats(1)),
        "17 fields in the query": (400, get(events + "?" + "a=b&" * 17, bearer)),
        "bad UTF-8 in the query": (400, get(events + "?cursor=%ff", bearer)),
        "a limit of 0": (400, get(events + "?limit=0", bearer)),
        "a limit of -1": (400, get(events + "?limit=-1", bearer)),
        "a limit of 501": (400, get(events + "?limit=501", bearer)),
        "a limit of 1e2": (400, get(events + "?limit=1e2", bearer)),
        "a limit of 5,000 digits": (400, get(f"{events}?limit={'9' * 5000}", bearer)),
        "a limit in Arabic digits": (400, get(events + "?limit=%D9%A3", bearer)),
        "two limits": (400, get(events + "?limit=1&limit=2", bearer)),
        "two cursors": (400, get(events + "?cursor=a&cursor=b", bearer)),
        "SQL as a cursor": (200, get(events + "?cursor=x.1%20OR%201=1", bearer)),
        "a cursor of the future": (200, get(f"{events}?cursor=x.{10**15}", bearer)),
        "a before of another chat": (400, get(f"{post}?before=1", bearer)),
        "the same length twice": (201, send(length, length)),
        "chunks": (201, send(CHUNKED, body=chunk + b"\r\n")),
        "chunks in single bytes": (
            200, in_bytes(get("/healthz", CHUNKED) + b"1\r\nx\r\n0\r\n\r\n")
        ),
        "CHUNKED": (201, send(CHUNKED.upper(), body=chunk + b"\r\n")),
        "a trailer": (201, send(CHUNKED, body=chunk + b"Host: y\r\n\r\n")),
        "65,536 bytes": (201, send("Content-Length: 65536", body=hello.rjust(65_536))),
        "100-continue": (
            (100, 201),
            CUT.join([send(length, "Expect: 100-continue", body=b""), hello]),
        ),
        "an unknown Expect": (201, send(length, "Expect: 200-ok")),
        "another content type": (201, send(length, "Content-Type: text/xml")),
        "a body of a GET": (
            (200, 200), get("/healthz", "Content-Length: 9") + b"GET / HTT" + HEALTH
        ),
        "no Upgrade": (426, get("/ws/chat", *UPGRADE[1:], KEY)),
        "an Upgrade to h2c": (426, get("/ws/chat", "Upgrade: h2c", *UPGRADE[1:], KEY)),
        "Basic": (401, get("/api/v1/me", "Authorization: Basic eDp5")),
        "Bearer without a token": (401, get("/api/v1/me", "Authorization: Bearer ")),
        "Bearer twice": (401, get("/api/v1/me", bearer, bearer)),
        "byte 255 as a token": (401, get("/api/v1/me", "Authorization: Bearer \xff")),
        "a token in the query": (401, get(f"/api/v1/me?token={token}")),
        "a token in a cookie": (401, get("/api/v1/me", f"Cookie: {bearer}")),
        "forged addresses": (200, get("/api/v1/me", bearer, forged)),
        "stats without the scope": (
            403, get("/api/v1/internal/chat/ws/stats", bearer)
        ),
        "metrics without the scope": (403, get("/metrics", bearer)),
        "revoking without the scope": (
            403, request("POST", "/api/v1/internal/chat/revoke", HOST, bearer,
                         "Content-Length: 13", body=b'{"user_id":1}')
        ),
        "an empty key": (400, send(length, "Idempotency-Key:")),
        "a key of 65": (400, send(length, "Idempotency-Key: " + "x" * 65)),
        "a key with an accent": (400, send(length, "Idempotency-Key: \xe9")),
    }  # fmt: skip


def bodies_at_odds(bearer: str, post: str) -> Rows:
    """Bodies that two parsers could read differently, and bodies that are too large.

    A request follows most of them. It must not be answered.
    """
    hello = json.dumps({"content": text()}).encode()
    length = f"Content-Length: {len(hello)}"
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(hello), hello)

    def send(*lines: str, body: bytes = hello + HEALTH) -> bytes:
        return request("POST", post, HOST, bearer, *lines, body=body)

    def chunks(data: bytes) -> bytes:
        return send(CHUNKED, body=data)

    return {
        "length beside chunks": (400, send(length, CHUNKED, body=chunk + HEALTH)),
        "chunks beside length": (400, send(CHUNKED, length, body=chunk + HEALTH)),
        "two lengths": (400, send(length, "Content-Length: 0")),
        "two lengths in a line": (400, send(f"{length}, 0")),
        "a length of -1": (400, send("Content-Length: -1")),
        "a length of +5": (400, send("Content-Length: +5")),
        "a length of 0x5": (400, send("Content-Length: 0x5")),
        "a length of 1_0": (400, send("Content-Length: 1_0")),
        "a length of 5.0": (400, send("Content-Length: 5.0")),
        "a length in Arabic digits": (400, send("Content-Length: \xb2")),
        "a length of 30 digits": (400, send("Content-Length: " + "9" * 30)),
        "a length of nothing": (400, send("Content-Length:")),
        "a length of 2**63": (413, send(f"Content-Length: {2**63}")),
        "100 MB with 100-continue": (
            413, send("Content-Length: 100000000", "Expect: 100-continue", body=b"")
        ),
        "65,537 bytes": (413, send("Content-Length: 65537", body=b" " * 65_537)),
        "chunks twice": (400, send(CHUNKED, CHUNKED, body=chunk)),
        "gzip, then chunks": (400, send("Transfer-Encoding: gzip, chunked")),
        "gzip": (400, send("Transfer-Encoding: gzip")),
        "identity": (400, send("Transfer-Encoding: identity")),
        "xchunked": (400, send("Transfer-Encoding: xchunked", body=chunk)),
        "chunks behind a tab": (400, send("Transfer-Encoding:\x0bchunked", body=chunk)),
        "a chunk of zz": (400, chunks(b"zz\r\n")),
        "a chunk of -1": (400, chunks(b"-1\r\nx\r\n0\r\n\r\n")),
        "a chunk of 0x5": (400, chunks(b"0x5\r\nhello\r\n0\r\n\r\n")),
        "a chunk of 1_0": (400, chunks(b"1_0\r\nhello\r\n0\r\n\r\n")),
        "a chunk of 2**84": (400, chunks(b"1" + b"0" * 21 + b"\r\nx")),
        "a chunk of 2**60": (413, chunks(b"1" + b"0" * 15 + b"\r\n" + b"x" * 70_000)),
        "a chunk with a wrong end": (400, chunks(b"1\r\nxYY0\r\n\r\n" + HEALTH)),
        "a chunk that ends with LF": (400, chunks(b"1\r\nx\n0\r\n\r\n" + HEALTH)),
        "an extension of 100 KB": (431, chunks(b"1;" + b"x" * 100_000)),
        "a trailer of 100 KB": (431, chunks(chunk[:-2] + b"X: " + b"y" * 100_000)),
        "a bad trailer": (400, chunks(chunk[:-2] + b"X : y\r\n\r\n")),
        "70,000 chunks of a byte": (413, chunks(b"1\r\nx\r\n" * 70_000)),
        "a body cut short": ((), CUT.join([send(length, body=hello[:-3]), END])),
        "chunks cut short": ((), CUT.join([chunks(chunk[:9]), END])),
        "no token for a body": (401, request("POST", post, HOST, length, body=hello)),
    }  # fmt: skip


def broken_handshakes(token: str) -> Rows:
    """Upgrades that are refused before 101. A frame follows each, without effect."""
    target = f"/ws/chat?token={token}"
    ping = client_frame(TEXT, b'{"type":"ping"}')
    keys, whole = "Sec-WebSocket-Key: ", (*UPGRADE, KEY)

    def ask(*lines: str, to: str = target, host: str = HOST) -> bytes:
        return request("GET", to, host, *(lines or whole), body=ping)

    def more(*lines: str) -> bytes:
        return ask(*whole, *lines)

    return {
        "byte 255 in Host": (400, ask(host="Host: \xff")),
        "byte 255 in Connection": (400, more("Connection: \xff")),
        "byte 255 in Upgrade": (400, more("Upgrade: \xff")),
        "byte 255 in the key": (400, ask(*UPGRADE, keys + "\xff")),
        "byte 255 in the version": (400, more("Sec-WebSocket-Version: \xff")),
        "byte 255 in the protocol": (400, more("Sec-WebSocket-Protocol: \xff")),
        "byte 255 in the extensions": (400, more("Sec-WebSocket-Extensions: \xff")),
        "byte 255 in Origin": (400, more("Origin: \xff")),
        "a key of zz": (400, ask(*UPGRADE, keys + "zz")),
        "a key of 15 bytes": (400, ask(*UPGRADE, keys + "MTIzNDU2Nzg5MDEyMzQ1")),
        "a key of 17 bytes": (400, ask(*UPGRADE, keys + "MTIzNDU2Nzg5MDEyMzQ1Njc=")),
        "a key, spare bits": (400, ask(*UPGRADE, keys + "dGhlIHNhbXBsZSBub25jZR==")),
        "two keys": (400, more(KEY)),
        "no key": (400, ask(*UPGRADE)),
        "no Host": (400, request("GET", target, *whole)),
        "version 8": (426, ask(*UPGRADE[:2], KEY, "Sec-WebSocket-Version: 8")),
        "versions 13 and 8": (
            426, ask(*UPGRADE[:2], KEY, "Sec-WebSocket-Version: 13, 8")
        ),
        "version 13 twice": (426, more(UPGRADE[2])),
        "no version": (426, ask(*UPGRADE[:2], KEY)),
        "no Connection": (426, ask(UPGRADE[0], UPGRADE[2], KEY)),
        "HTTP/1.0": (426, ask().replace(b"HTTP/1.1", b"HTTP/1.0")),
        "POST": (405, ask().replace(b"GET", b"POST", 1)),
        "another path": (404, ask(to="/ws")),
        "a whole URL of ws": (400, ask(to="ws://chat.example" + target)),
        "a whole URL and its origin, which the Host is not": (
            403, ask(*whole, "Origin: http://chat.example", to="http://x" + target)
        ),
        "two slashes": (400, ask(to="//evil.example" + target)),
        "a length": (400, more("Content-Length: 5")),
        "a length of 00": (400, more("Content-Length: 00")),
        "chunks": (400, more(CHUNKED)),
        "two tokens": (400, ask(to=f"{target}&token={token}")),
        "no token": (401, ask(to="/ws/chat")),
        "an empty token": (401, ask(to="/ws/chat?token=")),
        "a wrong token in Authorization": (
            401, ask(*whole, f"Authorization: Bearer {token}x", to="/ws/chat")
        ),
        "a token in Basic": (
            401, ask(*whole, f"Authorization: Basic {token}", to="/ws/chat")
        ),
        "a wrong token in the query, a right one in Authorization": (
            401, ask(*whole, f"Authorization: Bearer {token}", to="/ws/chat?token=x")
        ),
        "two cursors": (400, ask(to=f"{target}&cursor=a&cursor=b")),
        "Origin: null": (403, more("Origin: null")),
        "another site": (403, more("Origin: https://evil.example")),
        "the host at the start": (403, more("Origin: http://chat.example.evil.example")),
        "the host at the end": (403, more("Origin: http://evilchat.example")),
        "the host as a user": (403, more("Origin: http://chat.example@evil.example")),
        "the host and a path": (403, more("Origin: http://chat.example/x")),
        "another port": (403, more("Origin: http://chat.example:81")),
        "another scheme": (403, more("Origin: ws://chat.example")),
        "two origins": (
            403, more("Origin: http://chat.example", "Origin: http://evil.example")
        ),
    }  # fmt: skip


async def try_requests(target: Target) -> None:
    """Send all rows of the tables above."""
    user = target.new_user()
    token = target.chatd.token(user)
    chat = await make_chat(target.chatd, [user])
    bearer, post = f"Authorization: Bearer {token}", f"/api/v1/chats/{chat}/messages"
    tables = [
        ("a head", broken_heads(), True),
        ("a request", odd_requests(token, post), False),
        ("a body", bodies_at_odds(bearer, post), True),
        ("a handshake", broken_handshakes(token), True),
    ]
    for kind, rows, ends in tables:
        for name, (expected, data) in rows.items():
            async with target.attacked(f"{kind}: {name}"):
                await try_request(target.chatd.port, expected, data, ends=ends)
        await target.cleaned_up(f"the attacks with {kind}")


# --- frames --------------------------------------------------------------------------


def raw_frame(first: int, payload: bytes = b"", *, masked: bool = True) -> bytes:
    """A short frame with this first byte."""
    if masked:
        return bytes((first, 0x80 | len(payload))) + bytes(4) + payload
    return bytes((first, len(payload))) + payload


def close(code: int, reason: bytes = b"") -> bytes:
    """A close frame with any code."""
    return client_frame(CLOSE, code.to_bytes(2, "big") + reason)


def part(opcode: int, payload: bytes) -> bytes:
    """A fragment of a message, not the last."""
    return client_frame(opcode, payload, fin=False)


def broken_frames() -> dict[str, tuple[int, bytes]]:
    """Bytes that end a connection, and the close code that chatd sends for them."""
    ping = client_frame(PING, b"p")
    big = client_frame(TEXT, b"x" * 65_537)
    command = client_frame(TEXT, b'{"type":"ping"}')
    begun, empty = part(TEXT, b"{"), part(CONTINUATION, b"")
    rows = {
        "unmasked": (1002, raw_frame(0x81, b"{}", masked=False)),
        "an unmasked ping": (1002, raw_frame(0x89, masked=False)),
        "an unmasked close": (1002, raw_frame(0x88, masked=False)),
        "a ping in two": (1002, part(PING, b"p") + client_frame(CONTINUATION, b"p")),
        "a fragmented close": (1002, part(CLOSE, b"\x03\xe8")),
        "a ping of 126": (1002, client_frame(PING, b"x" * 126)),
        "a pong of 126": (1002, client_frame(PONG, b"x" * 126)),
        "a close of 126": (1002, close(1000, b"x" * 124)),
        "a ping of 2**63": (1002, b"\x89\xff\x80" + bytes(7)),
        "a continuation of nothing": (1002, client_frame(CONTINUATION, b"x")),
        "a continuation after a message": (
            1002, command + client_frame(CONTINUATION, b"")
        ),
        "a message in a message": (1002, begun + command),
        "a binary message in a text": (1002, begun + client_frame(BINARY, b"x")),
        "a binary part in a text": (1002, begun + part(BINARY, b"x")),
        "a length of 2**63": (1002, b"\x81\xff\x80" + bytes(7)),
        "a length of 2**64 - 1": (1002, b"\x81\xff" + b"\xff" * 8),
        "5 in 2 bytes": (1002, b"\x81\xfe\0\x05\0\0\0\0hello"),
        "125 in 2 bytes": (1002, b"\x81\xfe\0\x7d\0\0\0\0"),
        "5 in 8 bytes": (1002, b"\x81\xff\0\0\0\0\0\0\0\x05\0\0\0\0hello"),
        "65,535 in 8 bytes": (1002, b"\x81\xff\0\0\0\0\0\0\xff\xff\0\0\0\0"),
        "a close of one byte": (1002, client_frame(CLOSE, b"\x03")),
        "a close with bad UTF-8": (1007, close(1000, b"\xff")),
        "a close with half a character": (1007, close(1000, b"\xf0\x9f")),
        "bad UTF-8": (1007, client_frame(TEXT, b'{"type":"\xff"}')),
        "overlong UTF-8": (1007, client_frame(TEXT, b"\xc0\x80")),
        "a surrogate": (1007, client_frame(TEXT, b"\xed\xa0\x80")),
        "past Unicode": (1007, client_frame(TEXT, b"\xf4\x90\x80\x80")),
        "half a character": (1007, client_frame(TEXT, b'"\xf0\x9f\x98')),
        "half a character in two": (
            1007, part(TEXT, b'"\xf0\x9f') + client_frame(CONTINUATION, b"\x98")
        ),
        "bad UTF-8 between parts": (
            1007, part(TEXT, b'"\xf0\x9f') + part(CONTINUATION, b'"')
        ),
        "bad UTF-8 before the last part": (1007, begun + part(CONTINUATION, b"\xff")),
        "65,537 bytes": (1009, big),
        "65,537 bytes and a ping": (1009, big + ping),
        "65,537 bytes and a close": (1009, big + close(1000)),
        "65,537 bytes twice": (1009, big * 2),
        "65,537 bytes in parts": (
            1009, begun + part(CONTINUATION, b"x" * 32_768) * 2
        ),
        "65,537 bytes, 16,385 characters": (
            1009, client_frame(TEXT, "\U0001f600".encode() * 16_384 + b"x")
        ),
        "65,537 binary bytes": (1009, client_frame(BINARY, bytes(65_537))),
        "a length of 2**40": (1009, b"\x81\xff\0\0\1" + bytes(70_000)),
        "a length of 2**63 - 1": (1009, b"\x81\xff\x7f" + b"\xff" * 7 + bytes(70_000)),
        "65 parts": (1009, begun + empty * 64),
        "100,000 empty parts": (1009, begun + empty * 100_000),
        "a close and other frames": (
            1000, close(1000) + command + big + ping + close(1001)
        ),
        "a close in a message": (1000, begun + close(1000)),
        "a close without a code": (1005, client_frame(CLOSE, b"")),
        "a close and unmasked bytes": (1000, close(1000) + bytes(999)),
        "an HTTP request": (1002, HEALTH),
        "a TLS hello": (1002, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03"),
        "line ends": (1002, b"\r\n\r\n\r\n"),
    }  # fmt: skip
    for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
        rows[f"opcode {opcode}"] = (1002, raw_frame(0x80 | opcode))
        rows[f"a part of opcode {opcode}"] = (1002, raw_frame(opcode))
    for bits in (0x10, 0x20, 0x40, 0x70):
        for opcode in (TEXT, BINARY, CLOSE, PING, PONG):
            name = f"reserved bits {bits:02x} with opcode {opcode}"
            rows[name] = (1002, raw_frame(0x80 | bits | opcode))
        name = f"reserved bits {bits:02x} in a continuation"
        rows[name] = (1002, begun + raw_frame(0x80 | bits, b"}"))
    for code in (
        0,
        1,
        999,
        1004,
        1005,
        1006,
        1015,
        1016,
        1999,
        2000,
        2999,
        5000,
        65535,
    ):
        rows[f"a close with code {code}"] = (1002, close(code))
    for code in (1001, 1003, 1007, 1012, 1013, 3000, 3999, 4000, 4401, 4999):
        rows[f"a valid close with code {code}"] = (code, close(code, b"x" * 123))
    return rows


def odd_frames() -> dict[str, tuple[str, bytes]]:
    """Unusual but valid frames, and the type of the answer; the connection stays."""
    whole = b'{"type":"ping","ref":"\xf0\x9f\x98\x80"}'
    head, tail = part(TEXT, whole[:24]), client_frame(CONTINUATION, whole[24:])
    parts = [part(TEXT, b"")] + [part(CONTINUATION, b" ")] * 62
    return {
        "a character in two parts": ("pong", head + tail),
        "pings in a message": (
            "pong",
            head + client_frame(PING, b"x" * 125) * 3 + tail,
        ),
        "a pong in a message": ("pong", head + client_frame(PONG, b"") + tail),
        "a pong without a ping": ("pong", client_frame(PONG, b"p") + head + tail),
        "64 parts": ("pong", b"".join(parts) + client_frame(CONTINUATION, whole)),
        "an empty text": ("error", client_frame(TEXT, b"")),
        "an empty binary": ("error", client_frame(BINARY, b"")),
        "a binary ping": ("error", client_frame(BINARY, whole)),
        "65,536 bytes": ("pong", client_frame(TEXT, whole.ljust(65_536))),
        "65,536 binary bytes": ("error", client_frame(BINARY, bytes(65_536))),
    }


async def open_websocket(target: Target) -> WebSocket:
    """Open a socket of a new user, past its `connected` frame."""
    token = target.chatd.token(target.new_user())
    websocket = await WebSocket.open(target.chatd.port, f"/ws/chat?token={token}")
    assert json.loads(await websocket.receive_message())["type"] == "connected"
    return websocket


async def send_frames(websocket: WebSocket, data: bytes) -> None:
    """Send; chatd may end the connection meanwhile."""
    with contextlib.suppress(trio.BrokenResourceError):
        await websocket.send(data)


async def receive_close(websocket: WebSocket) -> int:
    """Wait for the close frame, which must be the last; return its code."""
    try:
        while True:
            opcode, payload = await websocket.receive_frame()
            if opcode == CLOSE:
                code = close_code(payload)
                break
    except Closed:
        return 1006
    with contextlib.suppress(Closed):
        frame = await websocket.receive_frame()
        raise AssertionError(f"after the close frame came {frame}")
    assert not websocket.buffer, f"after the close frame came {websocket.buffer[:80]!r}"
    return code


async def try_frames(target: Target) -> None:
    """Send all rows of the tables of frames; short ones also byte by byte."""
    for name, (code, data) in broken_frames().items():
        slowly = [in_bytes(data)] if len(data) < 300 else []
        for form in (data, *slowly):
            async with target.attacked(f"frames: {name}"):
                websocket = await open_websocket(target)
                for piece in form.split(CUT):
                    await send_frames(websocket, piece)
                with trio.fail_after(SECONDS):
                    got = await receive_close(websocket)
                websocket.cut()
                assert got == code, f"closed with {got}, not {code}"
    await target.cleaned_up("the attacks with frames")
    for name, (kind, data) in odd_frames().items():
        async with target.attacked(f"frames: {name}"):
            websocket = await open_websocket(target)
            for piece in (in_bytes(data) if len(data) < 300 else data).split(CUT):
                await websocket.send(piece)
            with trio.fail_after(SECONDS):
                answer = json.loads(await websocket.receive_message())
                assert answer["type"] == kind, f"answered {answer}, not {kind}"
                await websocket.send(client_frame(TEXT, b'{"type":"ping"}'))
                assert json.loads(await websocket.receive_message())["type"] == "pong"
            websocket.cut()
    await target.cleaned_up("odd frames")


# --- commands and bodies -------------------------------------------------------------

BIG, MAX_ID = "9" * 5000, 2**53 - 1
DEEP = "[" * 30_000
# Not JSON, not an object, or more than one value.
NOT_JSON: dict[str, bytes] = {
    "nothing": b"",
    "a space": b" ",
    "a word": b"hello",
    "null": b"null",
    "a number": b"1",
    "a text": b'"ping"',
    "a list": b'[{"type":"ping"}]',
    "half an object": b'{"type":"ping"',
    "an object and more": b'{"type":"ping"}{"type":"ping"}',
    "one comma too many": b'{"type":"ping",}',
    "a comment": b'{"type":"ping"/**/}',
    "single quotes": b"{'type':'ping'}",
    "a byte order mark": b'\xef\xbb\xbf{"type":"ping"}',
    "30,000 brackets": DEEP.encode(),
    "30,000 objects": b'{"a":' * 12_000,
    "depth in an unknown field": b'{"type":"ping","x":' + DEEP.encode() + b"}",
    "closed depth": b'{"type":"ping","x":%s%s}' % (b"[" * 30_000, b"]" * 30_000),
    "NaN": b'{"type":"ping","x":NaN}',
    "Infinity": b'{"type":"ping","x":Infinity}',
    "-Infinity": b'{"type":"ping","x":-Infinity}',
    "a leading zero": b'{"type":"ping","x":01}',
    "a plus": b'{"type":"ping","x":+1}',
    "a hexadecimal": b'{"type":"ping","x":0x1}',
    "a lone surrogate": b'{"type":"ping","ref":"\\ud800"}',
    "surrogates in the wrong order": b'{"type":"ping","ref":"\\ude00\\ud83d"}',
    "a bad escape": b'{"type":"ping","ref":"\\x41"}',
    "a raw line end in a text": b'{"type":"ping","ref":"a\nb"}',
    "a raw NUL in a text": b'{"type":"ping","ref":"a\0b"}',
    "an object in UTF-16": '{"type":"ping"}'.encode("utf-16-le"),
}
# JSON values that are not an id, a content, a client_id.
BAD_IDS = {
    **{name: name for name in ("0", "-1", "-0", "1.5", "1e400", "true", "null", "[]")},
    "a text": '"1"',
    "2**53": str(2**53),
    "2**63": str(2**63),
    "2**64": str(2**64),
    "5,000 digits": BIG,
    "an object": "{}",
}
BAD_CONTENTS = {
    "a number": "1",
    "null": "null",
    "a list": '["a"]',
    "nothing": '""',
    "spaces": '" \\t\\n\\u00a0\\u3000"',
    "4,001 characters": json.dumps("x" * 4001),
    "NUL": '"a\\u0000b"',
    "ESC": '"a\\u001b[2J"',
    "DEL": '"a\\u007f"',
    "a backspace": '"a\\b"',
}
BAD_CLIENT_IDS = {
    "a number": "1",
    "nothing": '""',
    "65 characters": json.dumps("k" * 65),
    "an accent": '"\\u00e9"',
    "a line end": '"a\\nb"',
    "a trailing line end": '"a\\n"',
}


def broken_commands(chat: int, foreign: int) -> Iterator[tuple[str, bytes, str]]:
    """Invalid commands: a name, the bytes, and the error's code.

    foreign: a message of a chat of other users.
    """

    def row(name: str, command: str, code: str) -> tuple[str, bytes, str]:
        return name, command.encode(), code

    for name, data in NOT_JSON.items():
        yield name, data, "bad_json"
    yield row("no type", "{}", "bad_field")
    yield row("an unknown type", '{"type":"hack"}', "unknown_type")
    yield row("PING", '{"type":"PING"}', "unknown_type")
    yield row("an event as a command", '{"type":"new_message"}', "unknown_type")
    yield row("a type of 1", '{"type":1}', "bad_field")
    yield row("a type of null", '{"type":null}', "bad_field")
    yield row("a type of 60 KB", '{"type":"%s"}' % ("x" * 60_000), "unknown_type")
    yield row("a ref of 1", '{"type":"ping","ref":1}', "bad_field")
    yield row("a ref of 65", '{"type":"ping","ref":"%s"}' % ("r" * 65), "bad_field")
    edit = '{"type":"edit_message","message_id":1'
    for name, value in BAD_IDS.items():
        for kind, field, rest in (
            ("mark_read", "message_id", ""),
            ("typing", "chat_id", ',"is_typing":true'),
            ("send_message", "chat_id", ',"content":"x"'),
        ):
            command = f'{{"type":"{kind}","{field}":{value}{rest}}}'
            yield row(f"{kind} with {field} {name}", command, "bad_field")
        for kind, rest in (("edit_message", ',"content":"x"'), ("delete_message", "")):
            command = f'{{"type":"{kind}","message_id":{value}{rest}}}'
            yield row(f"{kind} with message_id {name}", command, "bad_field")
        if name != "null":  # it is as good as none
            command = f'{edit},"content":"x","if_rev":{value}}}'
            yield row(f"if_rev {name}", command, "bad_field")
    yield row("an edit without content", f"{edit}}}", "bad_field")
    yield row("a deletion of nothing", '{"type":"delete_message"}', "bad_field")
    for value in ("1", "0", '"true"', "null"):
        command = f'{{"type":"typing","chat_id":{chat},"is_typing":{value}}}'
        yield row(f"is_typing {value}", command, "bad_field")
    send = f'{{"type":"send_message","chat_id":{chat}'
    for name, value in BAD_CONTENTS.items():
        yield row(f"a content of {name}", f'{send},"content":{value}}}', "bad_field")
        yield row(f"an edit to {name}", f'{edit},"content":{value}}}', "bad_field")
    for name, value in BAD_CLIENT_IDS.items():
        command = f'{send},"content":"x","client_id":{value}}}'
        yield row(f"a client_id of {name}", command, "bad_field")
    # Of a name that stands twice the last value counts, and is checked.
    command = f'{{"type":"send_message","chat_id":1,"chat_id":{2**50},"content":"x"}}'
    yield row("two chats", command, "not_found")
    yield row("two types", '{"type":"ping","type":"hack"}', "unknown_type")
    command = '{"type":"send_message","chat_id":1,"content":"x"}'
    yield row("a chat of other users", command, "not_found")
    command = '{"type":"typing","chat_id":1,"is_typing":true}'
    yield row("typing in that chat", command, "not_found")
    for kind in ("mark_read", "delete_message", "edit_message"):
        for message_id in (1, foreign, MAX_ID):
            command = f'{{"type":"{kind}","message_id":{message_id},"content":"x"}}'
            yield row(f"{kind} of {message_id}, elsewhere", command, "not_found")


async def try_commands(target: Target) -> None:
    """Send all rows on one connection, which stays; the answer has the code."""
    user = target.new_user()
    chat = await make_chat(target.chatd, [user])
    async with Client(target.chatd, user) as peer:
        assert peer.websocket is not None
        for name, data, code in broken_commands(chat, target.newest):
            async with target.attacked(f"a command: {name}"):
                await peer.websocket.send(client_frame(TEXT, data))
                answer = await peer.receive(seconds=SECONDS)
                assert answer["type"] == "error", f"answered {answer}"
                assert answer["code"] == code, f"answered {answer}, not {code}"
                assert answer["message"], "an error without a sentence"
                assert (await peer.ask("ping", SECONDS))["type"] == "pong"
        for command in (
            '{"type":"ping","x":1e308,"y":{"type":"hack"},"z":"\\u0000"}',
            '{"ref":"a","type":"ping","ref":"b"}',
            ' \n\t{"type":"ping"}\r\n',
        ):
            async with target.attacked(f"a command: {command}"):
                await peer.websocket.send(client_frame(TEXT, command.encode()))
                assert (await peer.receive(seconds=SECONDS))["type"] == "pong"
    await target.cleaned_up("broken commands")


def broken_bodies(
    chat: int, own: int, foreign: int
) -> Iterator[tuple[str, str, bytes, int]]:
    """Invalid bodies: a name, the path, the body, and the status.

    A path that does not begin with a slash has its method before it; POST otherwise.
    own: a message of the user, foreign: one of a chat of other users.
    """
    chats, post = "/api/v1/chats", f"/api/v1/chats/{chat}/messages"
    add = f"/api/v1/chats/{chat}/members"
    for name, data in NOT_JSON.items():
        for path in (chats, post, add):
            yield f"{path} with {name}", path, data, 400
    for name, value in BAD_IDS.items():
        yield f"member {name}", chats, b'{"member_ids":[%s]}' % value.encode(), 400
        yield f"user_id {name}", add, b'{"user_id":%s}' % value.encode(), 400
    for name, value in BAD_CONTENTS.items():
        yield f"content {name}", post, b'{"content":%s}' % value.encode(), 400
    for name, value in BAD_CLIENT_IDS.items():
        body = b'{"content":"x","client_id":%s}' % value.encode()
        yield f"client_id {name}", post, body, 400
    many = json.dumps({"member_ids": list(range(1, 5003))}).encode()
    yield "5,002 members", chats, many, 400
    for title in ('""', '" "', '"a\\nb"', '"\\u0000"', "1", json.dumps("t" * 201)):
        yield f"title {title[:9]}", chats, b'{"title":%s}' % title.encode(), 400
    yield "members as a text", chats, b'{"member_ids":"12"}', 400
    yield "members as a number", chats, b'{"member_ids":12}', 400
    one, title = f"PATCH /api/v1/messages/{own}", f"PATCH /api/v1/chats/{chat}"
    for name, data in NOT_JSON.items():
        for path in (one, title, "PATCH /api/v1/me"):
            yield f"{path} with {name}", path, data, 403 if path[-2:] == "me" else 400
    for name, value in BAD_CONTENTS.items():
        yield f"an edit to {name}", one, b'{"content":%s}' % value.encode(), 400
    for name, value in BAD_IDS.items():
        if name != "null":
            body = b'{"content":"x","if_rev":%s}' % value.encode()
            yield f"if_rev {name}", one, body, 400
        for method in ("PATCH", "DELETE"):
            path = f"{method} /api/v1/messages/{quote(value, safe='')}"
            yield path[:60], path, b'{"content":"x"}', 404
        for kind in ("revoke", "forget"):
            path = f"/api/v1/internal/chat/{kind}"
            yield f"{kind} {name}", path, b'{"user_id":%s}' % value.encode(), 403
    yield "an edit without content", one, b"{}", 400
    yield "an edit of another rev", one, b'{"content":"x","if_rev":1}', 409
    for method in ("PATCH", "DELETE"):
        for message_id in (1, foreign, MAX_ID):
            path = f"{method} /api/v1/messages/{message_id}"
            yield f"{path}, elsewhere", path, b'{"content":"x"}', 404
    for value in ('""', '" "', '"a\\nb"', "1", "[]", json.dumps("t" * 201)):
        yield f"a new title {value[:9]}", title, b'{"title":%s}' % value.encode(), 400
    yield "the title of that chat", "PATCH /api/v1/chats/1", b'{"title":"x"}', 404
    for name, value in BAD_CLIENT_IDS.items():
        yield (
            f"a chat of client_id {name}",
            chats,
            b'{"client_id":%s}' % value.encode(),
            400,
        )
    for value in ("1", '"true"', "null", "[]"):
        body = b'{"member_ids":[5],"direct":%s}' % value.encode()
        yield f"direct {value}", chats, body, 400
    for value in ("[]", "[5,6]", '[5],"title":"x"'):
        body = b'{"direct":true,"member_ids":%s}' % value.encode()
        yield f"a direct chat with {value}", chats, body, 400
    for path in (f"/api/v1/chats/{chat}/invites", "/api/v1/join"):
        yield f"{path} without --invites", path, b"{}", 403
    search = "GET /api/v1/search"
    for q in (
        "",
        "?q=",
        "?q=%20",
        "?q=" + "x" * 201,
        "?q=" + "+".join("abcdefghi"),
        "?q=%00",
        "?q=%CC%81",
        "?q=x&q=y",
        "?q=x&chat_id=0",
        "?q=x&chat_id=x",
        "?q=x&before=0",
        f"?q=x&before={BIG[:40]}",
        "?q=%FF",
        "?q=x&before=-1",
    ):
        yield f"search {q[:20]}", f"{search}{q}", b"", 400
    for chat_id in (1, MAX_ID):
        yield f"search in {chat_id}", f"{search}?q=x&chat_id={chat_id}", b"", 404
    for path in ("events?cursor=first", "unread", "ws/stats"):
        yield path, f"GET /api/v1/internal/chat/{path}", b"", 403
    yield "another sender", post, b'{"content":"x","sender_id":1}', 403
    yield "a chat of other users", "/api/v1/chats/1/messages", b'{"content":"x"}', 404
    yield "joining that chat", "/api/v1/chats/1/members", b'{"user_id":99}', 404


async def try_bodies(target: Target) -> None:
    """Send all rows; each gets its status, and the user's chats do not change."""
    user = target.new_user()
    token, chat = target.chatd.token(user), await make_chat(target.chatd, [user])
    own = await post_message(Http(target.chatd), chat, text(), user)
    before = (await http(target.chatd, "GET", "/api/v1/chats", token)).json["chats"]
    for name, path, body, status in broken_bodies(chat, own, target.newest):
        method, _, where = path.rpartition(" ")
        length = f"Content-Length: {len(body)}"
        lines = (HOST, f"Authorization: Bearer {token}", length)
        async with (
            target.attacked(f"a body: {name}"),
            RawConnection.open(target.chatd.port) as raw,
        ):
            await raw.send(request(method or "POST", where, *lines, body=body))
            replies = await raw.replies()
            got = [reply.status for reply in replies]
            assert got == [status], f"answered {replies}, not {status}"
    after = (await http(target.chatd, "GET", "/api/v1/chats", token)).json["chats"]
    assert after == before, f"a refused request has changed the chats: {after}"
    await target.cleaned_up("broken bodies")


# --- tokens --------------------------------------------------------------------------


class Keys:
    """The keys of a site's backend. files: the public ones and the shared secret."""

    def __init__(self, folder: Path) -> None:
        self.rsa = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.ec = ec.generate_private_key(ec.SECP256R1())
        self.ed = ed25519.Ed25519PrivateKey.generate()
        self.shared = b"a secret that chatd shares with the shop's backend"
        self.files = []
        for name, key in (("rsa", self.rsa), ("ec", self.ec), ("ed", self.ed)):
            path = folder / f"{name}.pem"
            path.write_bytes(pem(key.public_key()))
            self.files.append(path)
        (folder / "shared").write_bytes(self.shared)
        self.files.append(folder / "shared")


PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


def pem(key: PublicKey) -> bytes:
    """A public key in PEM."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def base64url(data: bytes) -> str:
    """Base64 for URLs without padding, as in tokens."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sign_anything(
    header: Any, body: Any, secret: str | bytes, digest: Any = hashlib.sha256
) -> str:
    """Sign any header and body, also those that a library refuses."""
    halves = [
        base64url(half if isinstance(half, bytes) else json.dumps(half).encode())
        for half in (header, body)
    ]
    signed = ".".join(halves)
    key = secret.encode() if isinstance(secret, str) else secret
    return f"{signed}.{base64url(hmac.new(key, signed.encode(), digest).digest())}"


BAD_EXPS: list[Any] = [None, True, "x", "", [], {}, math.nan, math.inf, -math.inf]
BAD_IATS: list[Any] = [None, "x", True, [], {}, math.nan, -math.inf]
BAD_USER_IDS: list[Any] = [
    None, True, 0, -1, 1.0, "+7", "7 ", "7.0", "", [1], ["7"], {}, 2**53, 2**64,
    str(2**53), -(2**63), math.nan,
]  # fmt: skip
BAD_SUBS: list[Any] = [
    None, True, 0, "0", "-1", " 7", "7 ", "७", "1e3", "9" * 21, "7\n", "x", [7], 1.5
]  # fmt: skip


def bad_tokens(target: Target, keys: Keys) -> dict[str, tuple[str, str]]:
    """Invalid tokens, and the error's code."""
    secret, user, now = target.chatd.secret, target.new_user(), int(time.time())
    hs256 = {"alg": "HS256", "typ": "JWT"}
    claims = {"user_id": user, "iat": now, "exp": now + 600}
    good = sign_anything(hs256, claims, secret)
    head, middle, signature = good.split(".")

    def alg(name: Any, key: str | bytes = secret, **header: Any) -> str:
        return sign_anything({"alg": name, "typ": "JWT"} | header, claims, key)

    def changed(**changes: Any) -> str:
        body = {n: v for n, v in (claims | changes).items() if v != "absent"}
        return sign_anything(hs256, body, secret)

    rows = {
        "only dots": "..",
        "one part": head,
        "two parts": f"{head}.{middle}",
        "four parts": f"{good}.x",
        "five parts, as JWE": f"{head}.x.y.z.w",
        "4,097 bytes": "x" * 4097,
        "4 KB of dots": "." * 4000,
        "a space in it": f"{head}. {middle}.{signature}",
        "an accent": f"{head}.{middle}.é",
        "no signature": f"{head}.{middle}.",
        "a signature of one byte": f"{head}.{middle}.AA",
        "half a signature": good[:-20],
        "another body under the signature": (
            f"{head}.{base64url(json.dumps(claims | {'user_id': 1}).encode())}"
            f".{signature}"
        ),
        "another secret": sign_anything(hs256, claims, "x" * 48),
        "an empty secret": sign_anything(hs256, claims, ""),
        "a secret of NULs": sign_anything(hs256, claims, bytes(48)),
        "a secret with its line end": sign_anything(hs256, claims, secret + "\n"),
        **{
            f"alg {name}": f"{base64url(json.dumps({'alg': name}).encode())}.{middle}."
            for name in ("none", "None", "NONE", "nOnE", "", None, 1, ["HS256"])
        },
        "alg none, signed": alg("none"),
        "no alg": sign_anything({"typ": "JWT"}, claims, secret),
        "HS384": sign_anything({"alg": "HS384"}, claims, secret, hashlib.sha384),
        "HS512": sign_anything({"alg": "HS512"}, claims, secret, hashlib.sha512),
        "hs256": alg("hs256"),
        "RS256 with chatd's secret": alg("RS256"),
        "EdDSA with chatd's secret": alg("EdDSA"),
        "the RSA key as a secret": alg("HS256", pem(keys.rsa.public_key())),
        "the RSA key, stripped": alg("HS256", pem(keys.rsa.public_key()).strip()),
        "the EC key as a secret": alg("HS256", pem(keys.ec.public_key())),
        "the Ed25519 key as a secret": alg("HS256", pem(keys.ed.public_key())),
        "PS256 with the RSA key": jwt.encode(claims, keys.rsa, "PS256"),
        "RS512 with the RSA key": jwt.encode(claims, keys.rsa, "RS512"),
        "another RSA key": jwt.encode(
            claims, rsa.generate_private_key(public_exponent=65537, key_size=2048),
            "RS256", headers={"jwk": {"kty": "RSA"}, "jku": "http://127.0.0.1:1/"},
        ),
        "another EC key": jwt.encode(
            claims, ec.generate_private_key(ec.SECP256R1()), "ES256"
        ),
        "ES256 of zeros": (
            base64url(b'{"alg":"ES256"}') + f".{middle}.{base64url(bytes(64))}"
        ),
        "crit": alg("HS256", crit=["exp"], exp=1),
        "crit of b64": alg("HS256", crit=["b64"], b64=False),
        "crit that is empty": alg("HS256", crit=[]),
        "crit as a text": alg("HS256", crit="exp"),
        "a kid that is a number": alg("HS256", kid=7),
        "a header that is a list": sign_anything([], claims, secret),
        "a header that is not JSON": sign_anything(b"{", claims, secret),
        "a header that is deep": sign_anything(b"[" * 2000, claims, secret),
        "a body that is a list": sign_anything(hs256, [claims], secret),
        "a body that is null": sign_anything(hs256, None, secret),
        "a body that is not JSON": sign_anything(hs256, b"{", secret),
        "a body that is deep": sign_anything(hs256, b'{"a":' * 400, secret),
        "no exp": changed(exp="absent"),
        **{
            f"exp {value!r}": changed(exp=value)
            for value in BAD_EXPS
        },
        "exp as a text": changed(exp=str(now + 600)),
        "exp 1e300": changed(exp=1e300),
        "exp 10**400": sign_anything(
            hs256, b'{"user_id":%d,"exp":1%s}' % (user, b"0" * 400), secret
        ),
        "exp 5,000 digits": sign_anything(
            hs256, b'{"user_id":%d,"exp":%s}' % (user, b"9" * 2900), secret
        ),
        "iat in an hour": changed(iat=now + 3600),
        **{f"iat {value!r}": changed(iat=value) for value in BAD_IATS},
        "nbf in an hour": changed(nbf=now + 3600),
        **{f"nbf {value!r}": changed(nbf=value) for value in BAD_IATS},
        **{
            f"user_id {value!r}": changed(user_id=value)
            for value in BAD_USER_IDS
        },
        "no user": changed(user_id="absent"),
        **{
            f"sub {value!r}": changed(user_id="absent", sub=value)
            for value in BAD_SUBS
        },
        "an unknown use": changed(use="hack"),
        "a use of 1": changed(use=1),
    }  # fmt: skip
    table = {name: (token, "token_invalid") for name, token in rows.items()}
    for name, exp in {"6 s ago": now - 6, "0": 0, "1.5": 1.5}.items():
        table[f"exp {name}"] = (changed(exp=exp), "token_expired")
    return table


def good_tokens(target: Target, keys: Keys) -> dict[str, str]:
    """Tokens that look like an attack and are valid."""
    now, user = int(time.time()), target.new_user()
    claims = {"user_id": user, "exp": now + 600}
    sub = {"sub": str(user), "exp": now + 600}
    odd = {"kid": "../../etc/passwd", "jku": "http://127.0.0.1:1/", "x5u": "x"}
    return {
        "RS256": jwt.encode(claims, keys.rsa, "RS256"),
        "ES256": jwt.encode(claims, keys.ec, "ES256"),
        "EdDSA": jwt.encode(claims, keys.ed, "EdDSA"),
        "the shared secret": jwt.encode(claims, keys.shared, "HS256"),
        "sub as a text": jwt.encode(sub, keys.shared, "HS256"),
        "user_id as a text": jwt.encode(
            claims | {"user_id": str(user)}, keys.shared, "HS256"
        ),
        "a jti that is a number": jwt.encode(claims | {"jti": 7}, keys.shared, "HS256"),
        "an aud": jwt.encode(claims | {"aud": "other"}, keys.shared, "HS256"),
        "odd headers": jwt.encode(claims, keys.shared, "HS256", headers=odd),
        "exp 3 s ago": jwt.encode(claims | {"exp": now - 3}, keys.shared, "HS256"),
    }


async def socket_code(chatd: Chatd, token: str) -> str:
    """Open a socket with a token; return the code of the refusal, "" if it opens."""
    try:
        websocket = await WebSocket.open(chatd.port, f"/ws/chat?token={quote(token)}")
    except Refused as refusal:
        return str(json.loads(refusal.body)["error"]["code"])
    websocket.cut()
    return ""


async def bearer_code(
    chatd: Chatd, token: str, method: str = "GET", path: str = "/api/v1/me"
) -> str:
    """Send a request with a token; return the code of the error, "" without one."""
    data = request(method, path, HOST, f"Authorization: Bearer {token}")
    async with RawConnection.open(chatd.port) as raw:
        await raw.send(data)
        replies = await raw.replies()
    return code_of(replies[0]) if replies[0].status >= 400 else ""


async def try_tokens(target: Target, keys: Keys) -> None:
    """Use each token in a request, for a socket, and in an `auth` command."""
    chatd = target.chatd
    async with Client(chatd, target.new_user()) as peer:
        for name, (token, code) in bad_tokens(target, keys).items():
            async with target.attacked(f"a token: {name}"):
                ascii_only = token if token.isascii() else "x"
                got = await bearer_code(chatd, ascii_only)
                assert got in (code, "token_invalid"), f"a request: {got!r}"
                got = await socket_code(chatd, token)
                assert got == code, f"a socket: {got!r}, not {code}"
                answer = await peer.ask("auth", SECONDS, token=token)
                assert answer.get("code") == code, f"auth: {answer}"
                assert (await peer.ask("ping", SECONDS))["type"] == "pong"
    for name, token in good_tokens(target, keys).items():
        async with target.attacked(f"a good token: {name}"):
            assert not await bearer_code(chatd, token), "a request"
            assert not await socket_code(chatd, token), "a socket"
    await target.cleaned_up("bad tokens")


async def try_tickets(target: Target) -> None:
    """Use tickets, sign-in tokens and scopes where they do not belong."""
    chatd, user, now = target.chatd, target.new_user(), int(time.time())
    token = chatd.token(user)

    async with target.attacked("a ticket in Authorization"):
        assert await bearer_code(chatd, await ticket(chatd, token)) == "token_invalid"
    async with target.attacked("a ticket for a ticket"):
        one, path = await ticket(chatd, token), "/api/v2/ws-token"
        assert await bearer_code(chatd, one, path=path) == "token_invalid"
    async with target.attacked("a ticket twice"):
        one = await ticket(chatd, token)
        assert not await socket_code(chatd, one)
        assert await socket_code(chatd, one) == "token_used"
        # The same signature with padding is the same ticket.
        assert await socket_code(chatd, f"{one}=") in ("token_used", "token_invalid")
    async with target.attacked("ten clients that race for a ticket"):
        one, codes = await ticket(chatd, token), list[str]()

        async def race() -> None:
            codes.append(await socket_code(chatd, one))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(race)
        assert sorted(codes) == ["", *["token_used"] * 9], f"{codes}"
    async with target.attacked("a ticket as auth"), Client(chatd, user) as peer:
        one = await ticket(chatd, token)
        assert (await peer.ask("auth", token=one))["type"] == "ack"
        again = await peer.ask("auth", token=one)
        assert again["code"] == "token_used", f"{again}"
    async with target.attacked("a refused handshake spends no ticket"):
        one = await ticket(chatd, token)
        handshake = get(f"/ws/chat?token={one}", *UPGRADE)  # without a key
        await try_request(chatd.port, 400, handshake, ends=True)
        assert not await socket_code(chatd, one)
    foreign: dict[str, Any] = {"use": "ticket", "jti": "x", "until": now + 60}
    for boot in ("x", "", None, 7, ["x"]):
        async with target.attacked(f"a ticket of boot {boot!r}"):
            other = chatd.token(user, **foreign, boot=boot)
            got = await socket_code(chatd, other)
            assert got in ("token_used", "token_invalid"), got
            assert await bearer_code(chatd, other) == "token_invalid"
    signin = chatd.token(user, use="signin")
    async with target.attacked("a sign-in token elsewhere"):
        assert await bearer_code(chatd, signin) == "token_invalid"
        assert await socket_code(chatd, signin) == "token_invalid"
        path = "/api/v1/session"
        assert not await bearer_code(chatd, signin, "POST", path)
    for name, other in (
        ("a ticket", await ticket(chatd, token)),
        ("a plain token", token),
    ):
        async with target.attacked(f"a session for {name}"):
            got = await bearer_code(chatd, other, "POST", "/api/v1/session")
            assert got == "token_invalid", got
    for scope in ("", "Service Stats", "service,stats", "xservice", ["service"], 1):
        async with target.attacked(f"a scope of {scope!r}"):
            odd = chatd.token(user, scope=scope)
            assert await bearer_code(chatd, odd, path="/metrics") == "forbidden"
    await target.cleaned_up("tickets")


async def try_foreign(target: Target, keys: Keys) -> None:
    """Scopes and chatd's own uses do not count in tokens of a backend's key."""
    user, now = target.new_user(), int(time.time())
    claims = {"user_id": user, "exp": now + 600, "scope": "service stats"}
    for name, key, algorithm in (
        ("RSA", keys.rsa, "RS256"),
        ("shared", keys.shared, "HS256"),
    ):
        async with target.attacked(f"scopes of the {name} key"):
            token = jwt.encode(claims, key, algorithm)
            assert (
                await bearer_code(target.chatd, token, path="/metrics") == "forbidden"
            )
        async with target.attacked(f"a sign-in token of the {name} key"):
            token = jwt.encode(claims | {"use": "signin"}, key, algorithm)
            got = await bearer_code(target.chatd, token, "POST", "/api/v1/session")
            assert got == "token_invalid", got


STRICT = ("--issuer=shop", "--audience=chat")


async def try_strict(chatd: Chatd, keys: Keys) -> None:
    """With --issuer and --audience, a backend's token must name them."""
    claims = {"user_id": 7, "exp": int(time.time()) + 600}
    right = {"iss": "shop", "aud": "chat"}
    wrong: list[dict[str, Any]] = [
        {}, {"iss": "shop"}, {"aud": "chat"}, right | {"iss": "sho"},
        right | {"iss": "shopx"}, right | {"iss": ["shop"]}, right | {"aud": "cha"},
        right | {"aud": ["x"]}, right | {"aud": []}, right | {"aud": {"chat": 1}},
        right | {"iss": None}, right | {"aud": None}, right | {"iss": 7},
    ]  # fmt: skip
    for change in wrong:
        token = sign_anything({"alg": "HS256"}, claims | change, keys.shared)
        got = await bearer_code(chatd, token)
        assert got == "token_invalid", f"{change} was answered {got!r}"
    for change in (right, right | {"aud": ["x", "chat"]}):
        token = sign_anything({"alg": "HS256"}, claims | change, keys.shared)
        assert not await bearer_code(chatd, token), f"{change} was refused"


async def try_invitations(chatd: Chatd) -> int:
    """Send invalid bodies and tokens to the routes of invitations; count them."""
    now, chat = int(time.time()), await make_chat(chatd, [7, 8])
    other, user = await make_chat(chatd, [8]), chatd.token(7)
    invites = f"/api/v1/chats/{chat}/invites"
    reply = await http(chatd, "POST", invites, user, {})
    assert reply.status == 201, f"an invitation was answered {reply.status}"
    good = reply.json["token"]
    claims = jwt.decode(good, options={"verify_signature": False})
    wrong: list[Any] = [None, 0, -1, "x", [], {}, 2**64, other]
    changed: list[dict[str, Any]] = [
        {"user_id": 9}, {"user_id": None}, {"exp": now - 60}, {"exp": None},
        {"use": "session"}, {"use": None}, {"use": ["invite"]},
    ]  # fmt: skip
    for name in claims.keys() - {"user_id", "exp", "iat", "use"}:
        changed += [{name: value} for value in wrong]
    forged = [
        chatd.token(7), chatd.token(7, use="invite"), f"{good}x", good[:-4], "",
        sign_anything({"alg": "none"}, claims, ""),
        sign_anything({"alg": "HS256"}, claims, "another secret"),
        *(sign_anything({"alg": "HS256"}, claims | c, chatd.secret) for c in changed),
    ]  # fmt: skip
    join, eve = "/api/v1/join", chatd.token(9)
    rows: list[tuple[str, str, str | None, Any, tuple[int, ...]]] = [
        ("POST", f"/api/v1/chats/{other}/invites", user, {}, (404,)),
        ("DELETE", f"/api/v1/chats/{other}/invites", user, None, (404,)),
        ("POST", "/api/v1/me/link", user, None, (401, 403)),
        ("POST", join, f"{eve}x", {"token": good, "name": "Eve"}, (401,)),
        ("POST", join, good, {"token": good}, (401,)),
        ("GET", "/api/v1/me", good, None, (401,)),
        ("POST", "/api/v1/session", good, None, (401,)),
        ("POST", "/api/v1/chats", user, {"member_ids": [99]}, (403,)),
        ("POST", f"/api/v1/chats/{chat}/members", user, {"user_id": 99}, (403,)),
    ]
    ttls: list[Any] = [0, -1, 1.5, "1", True, [], 2_592_001, 2**64]
    tokens: list[Any] = [1, None, [], {}]
    names: list[Any] = ["", " ", "\n", "\x00", 1, []]
    rows += [("POST", invites, user, {"ttl_seconds": ttl}, (400,)) for ttl in ttls]
    rows += [("POST", join, None, {"token": token}, (400,)) for token in tokens]
    for name in names:
        rows += [
            ("POST", join, None, {"token": good, "name": name}, (400,)),
            ("PATCH", "/api/v1/me", user, {"name": name}, (400,)),
        ]
    for token in forged:
        for body, bearer in (({}, None), ({"name": "Eve"}, None), ({}, eve)):
            rows.append(("POST", join, bearer, {"token": token} | body, (401,)))
    for method, path, bearer, body, statuses in rows:
        reply = await http(chatd, method, path, bearer, body)
        got = f"{method} {path} {body} was answered {reply.status} {reply.body!r}"
        assert reply.status in statuses, f"{got}, not {statuses}"
    reply = await http(chatd, "POST", join, eve, {"token": good})
    assert reply.status == 201, f"the good invitation was answered {reply.status}"
    document = await stats(chatd)
    assert not document["errors"], f"exceptions in the server: {document['errors']}"
    return len(rows)


# --- attacks that are more than bytes ------------------------------------------------


async def disconnect_everywhere(target: Target) -> None:
    """End a handshake and frames after every seventh byte, with FIN and with RST."""
    token = target.chatd.token(target.new_user())
    whole = get(f"/ws/chat?token={token}", *UPGRADE, KEY)
    whole += client_frame(TEXT, b'{"type":"ping"}') + client_frame(CLOSE, b"")
    places = range(0, len(whole) + 1, 7)
    for place in (*places, len(whole)):
        for end in (reset, lambda stream: stream.socket.close()):
            async with RawConnection.open(target.chatd.port) as raw:
                await raw.send(whole[:place])
                end(raw.stream)


async def leave_at_once(target: Target) -> None:
    """Connect and close 200 times; open a socket and reset it 200 times."""
    for _ in range(200):
        async with RawConnection.open(target.chatd.port):
            pass
    for _ in range(200):
        websocket = await open_websocket(target)
        reset(websocket.stream)


async def be_refused_and_stay(target: Target) -> None:
    """A refused or closed client that keeps its end open does not keep the server's."""
    chatd = target.chatd
    refused = get("/ws/chat?token=x", *UPGRADE, KEY)
    big = client_frame(TEXT, b"x" * 65_537)
    async with contextlib.AsyncExitStack() as stay:
        for _ in range(100):
            for data in (refused, b"\xff\r\n\r\n"):
                raw = await stay.enter_async_context(RawConnection.open(chatd.port))
                await raw.send(data)
            websocket = await open_websocket(target)
            stay.callback(websocket.cut)
            await send_frames(websocket, big)
        await target.cleaned_up("300 refused clients that stay")


async def revoke_amid_pings(target: Target) -> None:
    """Revoke 60 sockets that send 40 pings a second each: all 60 get 4503."""
    users = [target.new_user() for _ in range(60)]
    codes: list[int] = []
    ready = trio.Event()
    waiting, pings = len(users), client_frame(PING, b"p") * 4

    async def pinger(user: int) -> None:
        nonlocal waiting
        async with Client(target.chatd, user) as peer:
            websocket = peer.websocket
            assert websocket is not None
            waiting -= 1
            if not waiting:
                ready.set()

            async def ping() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    while True:
                        await websocket.send(pings)
                        await trio.sleep(0.1)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ping)
                codes.append(await receive_close(websocket))
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for user in users:
            nursery.start_soon(pinger, user)
        await ready.wait()
        for user in users:
            reply = await revoke(target.chatd, user)
            assert reply.json == {"user_id": user, "closed": 1}, f"{reply}"
    assert codes == [4503] * 60, f"{codes.count(4503)} of 60 got 4503: {set(codes)}"


async def come_back_revoked(target: Target) -> None:
    """Use tokens from before a revocation in every way: all are refused."""
    chatd, user = target.chatd, target.new_user()
    token, other = chatd.token(user), target.new_user()
    no_iat = chatd.token(user, iat=None)
    unused_ticket = await ticket(chatd, token)
    signin = chatd.token(user, use="signin")
    reply = await revoke(chatd, user)
    assert reply.status == 200, f"{reply}"
    for name, old in (("token", token), ("a token without iat", no_iat)):
        assert await bearer_code(chatd, old) == "token_invalid", name
        assert await socket_code(chatd, old) == "token_invalid", name
    assert await socket_code(chatd, unused_ticket) == "token_invalid", "a ticket"
    got = await bearer_code(chatd, signin, "POST", "/api/v1/session")
    assert got == "token_invalid", "a sign-in token"
    async with Client(chatd, other) as peer:
        assert (await peer.ask("auth", token=token))["code"] == "token_invalid"
    # The times of tokens are whole seconds: the next one is after the revocation.
    iat = int(time.time()) + 1
    new = chatd.token(user, iat=iat)
    assert not await bearer_code(chatd, new), "a new token"
    assert not await socket_code(chatd, await ticket(chatd, new)), "a new ticket"
    signin = chatd.token(user, iat=iat, use="signin")
    got = await bearer_code(chatd, signin, "POST", "/api/v1/session")
    assert not got, "a new sign-in token"
    # A revocation refuses tokens of its own second and before, so that one must come.
    await trio.sleep(max(0.0, iat - time.time()))
    await revoke(chatd, user)
    assert await bearer_code(chatd, new) == "token_invalid", "revoked once more"


async def send_after_close(target: Target) -> None:
    """Send a command after a close frame or a protocol error: it is not executed."""
    chatd, user = target.chatd, target.new_user()
    chat = await make_chat(chatd, [user])
    command = json.dumps({"type": "send_message", "chat_id": chat, "content": text()})
    for before in (close(1000), raw_frame(0x83), client_frame(TEXT, b"x" * 65_537)):
        path = f"/ws/chat?token={chatd.token(user)}"
        websocket = await WebSocket.open(chatd.port, path)
        await websocket.receive_message()
        await send_frames(websocket, before + client_frame(TEXT, command.encode()))
        await receive_close(websocket)
        websocket.cut()
    reply = await http(
        chatd, "GET", f"/api/v1/chats/{chat}/messages", chatd.token(user)
    )
    assert reply.json["messages"] == [], "a command after a close was executed"


async def send_before_answer(target: Target) -> None:
    """Send a frame right after the handshake, cut anywhere: it is answered."""
    token = target.chatd.token(target.new_user())
    whole = get(f"/ws/chat?token={token}", *UPGRADE, KEY)
    command = client_frame(TEXT, b'{"type":"ping"}')
    for cut in range(len(command) + 1):
        async with RawConnection.open(target.chatd.port) as raw:
            await raw.send(whole + command[:cut])
            await trio.lowlevel.checkpoint()
            await raw.send(command[cut:])
            await raw.read_until(b'"pong"', f"cut at {cut} the frame was lost")


async def send_odd_handshakes(target: Target) -> None:
    """Send unusual but valid handshakes: each opens a socket that works."""
    token = target.chatd.token(target.new_user())
    odd = (
        ("Upgrade: WebSocket", "Connection: keep-alive, UPGRADE", UPGRADE[2], KEY),
        ("Upgrade: h2c, websocket", *UPGRADE[1:], KEY),
        (*UPGRADE, KEY, "Content-Length: 0"),
        (*UPGRADE, KEY, "Connection: close"),
        (*UPGRADE, KEY, "Expect: 100-continue"),
        (*UPGRADE, KEY, "Origin: HTTP://CHAT.EXAMPLE:80"),
    )
    for lines in odd:
        async with RawConnection.open(target.chatd.port) as raw:
            command = client_frame(TEXT, b'{"type":"ping"}')
            await raw.send(get(f"/ws/chat?token={token}", *lines) + command)
            await raw.read_until(b'"pong"', f"{lines} opened no socket")


async def offer_extensions(target: Target) -> None:
    """Offer compression and subprotocols: the 101 accepts neither."""
    token = target.chatd.token(target.new_user())
    offers = (
        "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
        "Sec-WebSocket-Extensions: x-webkit-deflate-frame, " + "a;b=c, " * 200,
        "Sec-WebSocket-Protocol: chat, superchat",
    )
    for offer in offers:
        async with RawConnection.open(target.chatd.port) as raw:
            await raw.send(get(f"/ws/chat?token={token}", *UPGRADE, KEY, offer))
            await raw.read_until(b"\r\n\r\n", "the handshake was refused")
            head = raw.data.partition(b"\r\n\r\n")[0].lower()
            assert b" 101 " in head, f"{head!r}"
            assert b"extensions" not in head, f"{head!r}"
            assert b"protocol:" not in head, f"{head!r}"


FEW_DESCRIPTORS = ("sh", "-c", 'ulimit -n 330; exec "$@"', "sh")


async def run_out_of_descriptors(chatd: Chatd) -> None:
    """Open more connections than descriptors: connected clients are still served."""
    target = Target(chatd)
    await target.prepare()
    async with contextlib.AsyncExitStack() as stay:
        for _ in range(500):
            await stay.enter_async_context(RawConnection.open(chatd.port))
        for _ in range(20):
            await target.anna.ask("ping", SECONDS)
            await target.send_message()
        most = chatd.descriptors()
    assert most <= 330, f"{most} descriptors"
    await target.cleaned_up("500 connections with 330 descriptors", 15)
    lines = chatd.log.read_text(errors="replace").count("full ")
    assert lines <= 20, f"{lines} lines in the log about a full server"


ACTIONS: Sequence[Callable[[Target], Awaitable[None]]] = (
    disconnect_everywhere,
    leave_at_once,
    be_refused_and_stay,
    revoke_amid_pings,
    come_back_revoked,
    send_after_close,
    send_before_answer,
    send_odd_handshakes,
    offer_extensions,
)


async def attack(chatd: Chatd, keys: Keys) -> Target:
    """Run all attacks above against one server."""
    target = Target(chatd)
    await target.prepare()
    await try_requests(target)
    await try_frames(target)
    await try_commands(target)
    await try_bodies(target)
    await try_tokens(target, keys)
    await try_tickets(target)
    await try_foreign(target, keys)
    for action in ACTIONS:
        async with target.attacked(action.__name__):
            await action(target)
        await target.cleaned_up(action.__name__)
    return target


def prove(full: bool) -> Figures:
    """Run all attacks; in the full form three times, on one server."""
    rounds = 3 if full else 1
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        keys = Keys(Path(folder))
        flags = [f"--jwt-key={path}" for path in keys.files]
        with Chatd(*flags, log_level="info") as chatd:
            targets = [run_trio(attack, chatd, keys) for _ in range(rounds)]
            grown = chatd.rss_bytes() - targets[0].rss
            peak = chatd.peak_rss_bytes()
            failed = [
                line
                for line in chatd.log.read_text().splitlines()
                if line.startswith(("ERROR", "Traceback"))
            ]
        assert not failed, f"the log has {len(failed)} errors: {failed[0]}"
        with Chatd(f"--jwt-key={keys.files[-1]}", *STRICT) as chatd:
            run_trio(try_strict, chatd, keys)
    with Chatd("--invites=on") as chatd:
        invitations = run_trio(try_invitations, chatd)
        chatd.log_without_traceback()
    with Chatd(before=FEW_DESCRIPTORS) as chatd:
        run_trio(run_out_of_descriptors, chatd)
    rows = sum(target.rows for target in targets) + invitations
    slowest = max(target.slowest for target in targets)
    assert grown < 64 * 2**20, f"memory grew by {grown / 2**20:.0f} MiB"
    return Figures(
        CLAIM,
        f"{rows} attacks answered as promised; other clients waited "
        f"{slowest * 1000:.0f} ms at most; all descriptors came back; memory "
        f"+{grown / 2**20:.0f} MiB",
        {
            "attacks": rows,
            "slowest_ms": round(slowest * 1000, 1),
            "rss_growth_mib": round(grown / 2**20, 1),
            "peak_rss_mib": round(peak / 2**20, 1),
        },
    )
