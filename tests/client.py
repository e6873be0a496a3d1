"""A chatd process and a client, both from outside, for test_chatd.py."""

from __future__ import annotations

import collections
import contextlib
import functools
import http.client
import itertools
import json
import os
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import jwt
import trio
import websockets
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.uri import parse_uri

ANNA, BEN, CLARA, DORA, EVE = 5, 6, 7, 8, 9

HERE = Path(__file__).resolve().parents[1]  # of the checkout
WAIT_SECONDS = 30.0  # the longest wait for anything that should come at once
NO_RATES = [f"--{of}=0" for of in ("sends", "commands", "typing", "requests")]
NO_RATES += ["--receive-bytes=0", "--handshakes=0", "--drain-seconds=2"]
MISTAKE = re.compile(r"Traceback|\b(failed|crashed) error=")  # in the log

Json = dict[str, Any]


# --- a client ------------------------------------------------------------------------


class Closed(Exception):
    """The server closed the connection; the code is 1006 without a close frame."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Client:
    """A WebSocket client. It reads only in the methods that receive.

    It uses the `websockets` package, which chatd does not use.
    """

    def __init__(self, stream: trio.SocketStream, url: str) -> None:
        self.stream = stream
        self.protocol = ClientProtocol(parse_uri(url))
        self.received: collections.deque[Json] = collections.deque()
        self.connected: Json = {}  # the first frame

    async def open(self) -> None:
        """Shake hands. Raises websockets.InvalidStatus if the server refuses."""
        self.protocol.send_request(self.protocol.connect())
        with trio.fail_after(WAIT_SECONDS):
            await self._write()
            while self.protocol.state is websockets.State.CONNECTING:
                if self.protocol.handshake_exc:
                    raise self.protocol.handshake_exc
                await self._read()
        self.connected = await self.receive("connected")

    async def send(self, kind: str, /, **fields: object) -> None:
        await self.send_text(json.dumps({"type": kind, **fields}))

    async def send_text(self, text: str) -> None:
        if not self.protocol.close_rcvd:  # else it is lost, and `receive` says so
            self.protocol.send_text(text.encode())
        with trio.fail_after(WAIT_SECONDS):
            await self._write()

    async def receive(self, kind: str = "") -> Json:
        """Return the next frame, which must be of that type. Raises Closed."""
        with trio.fail_after(WAIT_SECONDS):
            while not self.received:
                if close := self.protocol.close_rcvd:
                    raise Closed(close.code)
                await self._read()
        frame = self.received.popleft()
        assert kind in {"", frame["type"]}, frame
        return frame

    async def receives_nothing(self) -> None:
        """Claim that nothing was on its way: the next frame answers a ping."""
        await self.send("ping")
        await self.receive("pong")

    async def skip_to(self, kind: str) -> Json:
        """Return the next frame of that type; the frames before it do not matter."""
        while (frame := await self.receive())["type"] != kind:
            pass
        return frame

    async def ask(self, kind: str, /, **fields: object) -> Json:
        """Send a command and return its answer; other frames do not matter."""
        ref = secrets.token_hex(8)
        await self.send(kind, ref=ref, **fields)
        while (frame := await self.receive()).get("ref") != ref:
            pass
        return frame

    async def code(self) -> int:
        """Return the code with which the server closes the connection."""
        while True:
            try:
                await self.receive()
            except Closed as closed:
                return closed.code

    async def close(self) -> None:
        self.protocol.send_close(1000)
        await self._write()
        assert await self.code() in {1000, 1006}
        await self.stream.aclose()

    def reset(self) -> None:
        """Disconnect with RST, without a close frame."""
        linger = struct.pack("ii", 1, 0)
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.stream.socket.close()

    def read_faster(self) -> None:
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)

    async def _write(self) -> None:
        """Write what waits: a handshake, a frame, a pong, the answer to a close."""
        with suppress(trio.BrokenResourceError):  # then `_read` has the reason
            for data in self.protocol.data_to_send():
                if data:
                    await self.stream.send_all(data)

    async def _read(self) -> None:
        try:
            data = await self.stream.receive_some(65536)
        except trio.BrokenResourceError:
            data = b""
        if not data:
            raise Closed(1006)
        self.protocol.receive_data(data)
        await self._write()
        for event in self.protocol.events_received():
            if isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                self.received.append(json.loads(bytes(event.data)))


# --- a server ------------------------------------------------------------------------


class HttpAnswer(NamedTuple):
    """An answer to an HTTP request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Return the error's code. The error must have a sentence, too."""
        error = self.json["error"]
        assert isinstance(error["message"], str), error
        assert error["message"], error
        return str(error["code"])


def environment() -> dict[str, str]:
    """Return our environment without the variables that chatd reads."""
    systemd = ("CREDENTIALS_", "JOURNAL_", "LISTEN_", "NOTIFY_", "STATE_", "WATCHDOG_")
    names = [name for name in os.environ if not name.startswith(("CHATD_", *systemd))]
    return {name: os.environ[name] for name in names}


async def chatd(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command of chatd to its end."""
    command = [sys.executable, "-m", "chatd", *map(str, words)]
    run = functools.partial(
        subprocess.run, cwd=HERE, env=environment(), capture_output=True, text=True
    )
    done: subprocess.CompletedProcess[str] = await trio.to_thread.run_sync(run, command)
    assert not MISTAKE.search(done.stderr), done
    return done


class Server:
    """A database and its server process, or a proxy in front of another server."""

    def __init__(self, home: Path, *command: str, db: Path | None = None) -> None:
        home.mkdir(exist_ok=True)
        self.home, self.db = home, db or home / "chatd.db"
        self.command = command or ("serve", "--db", str(self.db), *NO_RATES)
        self.port = 0
        self.printed = ""
        self.running = trio.Event()
        self.sockets: list[trio.socket.SocketType] = []
        self.process: subprocess.Popen[str] | None = None

    # The process

    async def start(self) -> None:
        """Start the process, again on the same port, and wait until it listens."""
        process = self._start()
        while not (found := re.match(r"listening on \S+:(\d+)$", await self.line())):
            assert process.poll() is None, self.log
        self.port = int(found[1])
        self.running.set()

    def _start(self) -> subprocess.Popen[str]:
        words = [*self.command, "--listen", f"127.0.0.1:{self.port}"]
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "chatd", *words],
                cwd=HERE,
                env={**environment(), "TMPDIR": str(self.home)},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        return self.process

    async def line(self) -> str:
        """Return the next line that the process prints."""
        assert self.process is not None
        assert self.process.stdout is not None
        line = await trio.to_thread.run_sync(self.process.stdout.readline)
        self.printed += line
        return line

    async def end(self, signal_: int) -> int:
        """Send a signal and return the exit status of the process."""
        assert self.process is not None
        self.running = trio.Event()
        self.process.send_signal(signal_)
        status = await trio.to_thread.run_sync(self.process.wait, WAIT_SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None
        return status

    async def kill(self) -> None:
        await self.end(signal.SIGKILL)

    async def stop(self) -> None:
        """Stop the process with SIGTERM. Its status must be 0 and its log clean."""
        self.hang_up()
        assert await self.end(signal.SIGTERM) == 0, self.log
        assert not MISTAKE.search(self.log), self.log

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Server]:
        await self.start()
        try:
            yield self
            if self.process:
                await self.stop()
        finally:
            self.hang_up()
            if self.process:
                self.process.kill()
                self.process.communicate()

    def hang_up(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.sockets.clear()

    @property
    def log(self) -> str:
        return (self.home / "log").read_text("utf-8", "replace")

    @property
    def memory(self) -> int:
        """The resident memory of the process in bytes."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    # Tokens

    @property
    def secret(self) -> bytes:
        return self.db.with_name("chatd.secret").read_bytes().strip()

    def token(self, user: int, /, **claims: object) -> str:
        """Sign a token for an hour. A claim that is None is left out."""
        now = int(time.time())
        claims = {"sub": str(user), "iat": now, "exp": now + 3600, **claims}
        kept = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(kept, self.secret, algorithm="HS256")

    @property
    def service(self) -> str:
        return self.token(1, scope="service")

    # HTTP

    async def ask(
        self, request: str, token: str = "", body: object = None, **headers: str
    ) -> HttpAnswer:
        """Send a request such as "GET /healthz"; Some_Name is the header Some-Name."""
        send = functools.partial(self._ask, request, token, body, headers)
        return await trio.to_thread.run_sync(send)

    def _ask(
        self, request: str, token: str, body: object, headers: dict[str, str]
    ) -> HttpAnswer:
        method, target = request.split(" ", 1)
        lines = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            lines["Authorization"] = f"Bearer {token}"
        text = None if body is None else json.dumps(body)
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=WAIT_SECONDS
        )
        with contextlib.closing(connection):
            try:
                connection.request(method, target, text, lines)
                got = connection.getresponse()
                names = {name.lower(): value for name, value in got.getheaders()}
                return HttpAnswer(got.status, names, got.read())
            except http.client.HTTPException as error:
                raise ConnectionResetError(*error.args) from error

    async def want(
        self, status: int, request: str, token: str = "", body: object = None, /,
        **headers: str,
    ) -> Any:  # fmt: skip
        """Return the JSON of an answer, which must have that status."""
        answer = await self.ask(request, token, body, **headers)
        assert answer.status == status, (request, body, answer)
        return answer.json if answer.body else None

    # The socket

    async def connect(
        self, who: int | str, cursor: str = "", *, receive_buffer: int = 0
    ) -> Client:
        """Open the socket of a user, or of this token."""
        sock = trio.socket.socket()
        self.sockets.append(sock)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await sock.connect(("127.0.0.1", self.port))
        url = f"ws://127.0.0.1:{self.port}{self.socket_path(who, cursor)}"
        client = Client(trio.SocketStream(sock), url)
        await client.open()
        return client

    def socket_path(self, who: int | str, cursor: str = "") -> str:
        query = {"token": self.token(who) if isinstance(who, int) else who}
        return f"/ws/chat?{urlencode(query | ({'cursor': cursor} if cursor else {}))}"

    async def refuses(self, token: str, **headers: str) -> tuple[int, str]:
        """Open a socket that must be refused; return the status and the code."""
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade"}
        upgrade |= {"Sec_WebSocket_Version": "13"}
        upgrade |= {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ=="}
        target = f"GET {self.socket_path(token)}"
        answer = await self.ask(target, **{**upgrade, **headers})
        return answer.status, answer.code

    # Chats, messages, events

    async def create_chat(self, *members: int) -> int:
        body = {"member_ids": members}
        got = await self.want(201, "POST /api/v1/chats", self.service, body)
        return int(got["chat"]["id"])

    async def post(self, chat: int, sender: int, content: str) -> Json:
        """Send a message by HTTP; return it as it is stored."""
        body = {"content": content, "sender_id": sender}
        target = f"POST /api/v1/chats/{chat}/messages"
        return dict((await self.want(201, target, self.service, body))["message"])

    async def poll(self, user: int, cursor: str = "", limit: int = 500) -> Any:
        query = f"limit={limit}" + (f"&cursor={quote(cursor)}" if cursor else "")
        return await self.want(200, f"GET /api/v1/events?{query}", self.token(user))

    async def cursor(self, user: int) -> str:
        """Return a cursor after everything that has happened."""
        return str((await self.poll(user))["cursor"])

    async def events(self, user: int, cursor: str) -> list[Json]:
        """Return all events of a user after the cursor."""
        events: list[Json] = []
        more = True
        while more:
            got = await self.poll(user, cursor)
            cursor, more = got["cursor"], got["more"]
            assert not got["resync"], got
            events += got["events"]
        return events

    async def history(self, chat: int, user: int) -> list[Json]:
        """Return all messages of a chat, oldest first."""
        messages: list[Json] = []
        before, more = "", True
        while more:
            target = f"GET /api/v1/chats/{chat}/messages?limit=100{before}"
            got = await self.want(200, target, self.token(user))
            messages[:0], more = got["messages"], got["more"]
            before = f"&before={messages[0]['id']}" if messages else ""
        assert [m["n"] for m in messages] == list(range(1, len(messages) + 1))
        return messages

    async def stats(self) -> Any:
        target = "GET /api/v1/internal/chat/ws/stats"
        return await self.want(200, target, self.token(1, scope="stats"))


async def wait_until(
    true: Callable[[], Awaitable[bool] | bool], seconds: float = WAIT_SECONDS
) -> None:
    """Poll until the condition is true: the server does not announce it."""
    with trio.fail_after(seconds):
        while True:
            answer = true()
            if answer if isinstance(answer, bool) else await answer:
                return
            await trio.sleep(0.02)


class Sender:
    """Sends messages in order. Sends again, after a lost connection, until acked."""

    def __init__(self, server: Server, user: int, texts: list[tuple[int, str]]) -> None:
        self.server, self.user, name = server, user, secrets.token_hex(4)
        self.left = collections.deque(
            {"chat_id": chat, "content": text, "client_id": f"{name}-{number}"}
            for number, (chat, text) in enumerate(texts)
        )
        self.acks: dict[str, Json] = {}  # by client_id

    async def send(self, acked: Progress, in_flight: int = 16) -> None:
        """Send every message, over as many connections as it takes."""
        while self.left:
            with suppress(OSError, Closed):
                client = await self.server.connect(self.user)
                await self.send_over(client, acked, in_flight)
                await client.close()
            await self.server.running.wait()

    async def send_over(
        self, client: Client, acked: Progress, in_flight: int = 16
    ) -> None:
        """Send over one connection. If it ends, `left` has what was not acked."""
        sent = 0
        while self.left:
            for message in itertools.islice(self.left, sent, in_flight):
                await client.send("send_message", **message)
                sent += 1
            ack = await client.skip_to("ack")
            assert ack["client_id"] == self.left.popleft()["client_id"]
            self.acks[ack["client_id"]] = ack
            sent -= 1
            acked.add()


class Progress:
    """A number that tasks wait for."""

    def __init__(self) -> None:
        self.value = 0
        self.waiting = trio.lowlevel.ParkingLot()

    def add(self) -> None:
        self.value += 1
        self.waiting.unpark_all()

    async def reaches(self, value: int) -> None:
        while self.value < value:
            await self.waiting.park()
