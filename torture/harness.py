"""What the proofs stand on: a real `chatd serve`, clients, measurements, figures.

Everything here is outside of chatd: a subprocess on a port that the kernel picks, a
temporary folder, bytes on sockets. No proof imports chatd.

    with Chatd() as chatd:                     # start; stop at the end
        trio.run(act, chatd)

    async def act(chatd):
        async with Client(chatd, user_id=6) as anna:    # connected, greeted
            await anna.send(chat_id, text("hello"))
            ack = await anna.hear("ack")

Every token carries MARK in its jti, every text of `text()` begins with MARK, and what
the servers log, measure and answer as errors is kept in the folder `evidence()`: proof
`secrecy` looks there for marks and tokens when all the others are done.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import h11
import jwt
import trio

ROOT = Path(__file__).resolve().parent.parent
Frame = dict[str, Any]

# Flags of a server whose limits are no part of the claim.
NO_RATES = (
    "--sends=0",
    "--commands=0",
    "--typing=0",
    "--handshakes=0",
    "--requests=0",
    "--receive-bytes=0",
)
MARK = "Xq7Marker"  # in every token and in every text; no log may have it


@dataclasses.dataclass
class Figures:
    """What a proof found: the claim that held, a sentence of figures, the numbers."""

    claim: str
    figure: str
    numbers: dict[str, float | str] = dataclasses.field(default_factory=dict)


def evidence() -> Path:
    """The folder where all servers' logs and documents of this run are kept."""
    name = os.environ.get("CHATD_TORTURE_EVIDENCE")
    if name is None:
        name = tempfile.mkdtemp(prefix="torture-evidence-")
        os.environ["CHATD_TORTURE_EVIDENCE"] = name
    return Path(name)


def keep(kind: str, what: str | bytes) -> None:
    """Keep a server's words as evidence: kind is log, error, stats or metrics."""
    data = what.encode() if isinstance(what, str) else what
    with (evidence() / f"{os.getpid()}.{kind}").open("ab") as file:
        file.write(data + b"\n")


def chance(name: str) -> random.Random:
    """Make a source of chance that --seed repeats."""
    return random.Random(f"{os.environ.get('CHATD_TORTURE_SEED', '1')} {name}")


_numbers = itertools.count(1)


def text(words: str = "") -> str:
    """Make a message's text, with the mark, never the same twice in a process."""
    return f"{MARK} {os.getpid()}-{next(_numbers)} {words}".strip()


def at(quantile: float, values: Sequence[float]) -> float:
    """The value that this part of all values does not exceed."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, math.ceil(quantile * len(ranked)) - 1)]


# --- the server ----------------------------------------------------------------------


class Chatd:
    """A `chatd serve` in a folder of its own, that can be started again and again.

    The folder, with database, secret and log, is removed at the end. env is added to
    the environment; before is put in front of the command (`ip netns exec x`).
    """

    def __init__(
        self,
        *flags: str,
        env: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
        folder: Path | None = None,
        rates: bool = False,
        log_level: str = "debug",
    ) -> None:
        self.own_folder = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="torture-"))
        self.db = self.folder / "chatd.db"
        self.log = evidence() / f"{self.folder.name}-{secrets.token_hex(3)}.log"
        self.flags = [*(() if rates else NO_RATES), f"--log-level={log_level}", *flags]
        self.env = dict(env or {})
        self.before = list(before)
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.ready = False  # does it listen, as far as this process knows?
        secret_file = self.folder / "chatd.secret"
        if not secret_file.exists():
            secret_file.touch(0o600)
            secret_file.write_text(f"{MARK}{secrets.token_hex(24)}\n")
        self.secret = secret_file.read_text().strip()

    # --- life ---

    def command(self, *arguments: str) -> list[str]:
        """Make a command line of this chatd."""
        program = os.environ.get("CHATD_TORTURE_PROGRAM", str(ROOT / "chatd.py"))
        return [sys.executable, program, *arguments]

    def arguments(self) -> list[str]:
        """Say what it is to do."""
        return ["serve", "--listen=127.0.0.1:0", f"--db={self.db}"]

    def start(self, seconds: float = 30) -> Self:
        """Start, and wait until it listens."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.before, *self.command(*self.arguments()), *self.flags],
                env=os.environ | self.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.folder,
            )
        line = self._first_line(time.monotonic() + seconds)
        if not line.startswith("listening on http://"):
            self.kill()
            raise AssertionError(f"chatd did not start: {line!r} {self.last_words()}")
        self.port = int(line.rpartition(":")[2])
        self.ready = True
        return self

    def _first_line(self, deadline: float) -> str:
        assert self.process is not None
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    break
                byte = os.read(fd, 1)
                if not byte:
                    break
                line += byte
        return line.decode().strip()

    async def start_soon(self) -> None:
        """Start without standing in the way of other tasks."""
        await trio.to_thread.run_sync(self.start)

    @property
    def pid(self) -> int:
        """The server's process."""
        assert self.process is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Is it running?"""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it as a power cut would: SIGKILL."""
        self.ready = False
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()

    def wait(self, seconds: float = 30) -> int:
        """Wait for its end; the exit status."""
        assert self.process is not None
        return self.process.wait(seconds)

    async def ended(self, seconds: float = 30) -> int:
        """Wait for its end without standing in the way; the exit status."""
        return await trio.to_thread.run_sync(self.wait, seconds)

    def stop(self, seconds: float = 30) -> int:
        """Stop it as systemd would; the exit status."""
        self.signal(signal.SIGTERM)
        status = self.wait(seconds)
        assert self.process is not None
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status

    def last_words(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-1000:]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self.alive and kind is None:
                run_trio(keep_documents, self)
        finally:
            try:
                if self.alive:
                    self.stop()
            finally:
                self.kill()
                if self.own_folder:
                    shutil.rmtree(self.folder, ignore_errors=True)

    def move(self, folder: Path) -> None:
        """Serve from another folder from the next start on."""
        self.folder = folder
        self.db = folder / "chatd.db"

    # --- who may ask it ---

    def token(self, user_id: int, ttl: float = 3600, **claims: Any) -> str:
        """Sign a token, as `chatd token` would."""
        now = time.time()
        body = {
            "user_id": user_id,
            "iat": int(now),
            "exp": now + ttl,
            "jti": f"{MARK}-{secrets.token_hex(6)}",
        }
        return jwt.encode(body | claims, self.secret, "HS256")

    def service_token(self) -> str:
        """Sign a token that may do all."""
        return self.token(1_000_000, scope="service stats")

    # --- what it costs, from /proc ---

    def rss_bytes(self) -> int:
        """Its resident memory now."""
        return self._status("VmRSS") * 1024

    def peak_rss_bytes(self) -> int:
        """The most resident memory it ever had."""
        return self._status("VmHWM") * 1024

    def _status(self, name: str) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
        raise AssertionError(f"/proc/{self.pid}/status has no {name}")

    def descriptors(self) -> int:
        """How many files and sockets it holds open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def cpu_seconds(self) -> float:
        """How long it has computed, in all its threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    # --- its own judgement ---

    def check(self) -> str:
        """Run `chatd check`; its output. Raises AssertionError if it finds faults."""
        done = subprocess.run(
            self.command("check", f"--db={self.db}"),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"chatd check: {done.stdout}{done.stderr}"
        return done.stdout


class Proxy(Chatd):
    """A `chatd proxy` before a server, with the server's secret."""

    def __init__(self, upstream: Chatd, log_level: str = "debug") -> None:
        super().__init__(folder=upstream.folder)
        self.flags = ["--handshakes=0", f"--log-level={log_level}"]
        self.upstream = upstream

    def arguments(self) -> list[str]:
        """Say what it is to do."""
        upstream = f"--upstream=127.0.0.1:{self.upstream.port}"
        return ["proxy", "--listen=127.0.0.1:0", upstream, f"--db={self.db}"]


async def keep_documents(chatd: Chatd) -> None:
    """Keep a server's stats document and metrics as evidence."""
    token = chatd.service_token()
    stats = "/api/v1/internal/chat/ws/stats"
    with trio.move_on_after(10), contextlib.suppress(OSError, trio.BrokenResourceError):
        keep("stats", (await http(chatd, "GET", stats, token)).body)
        keep("metrics", (await http(chatd, "GET", "/metrics", token)).body)


# --- HTTP ----------------------------------------------------------------------------


class Reply(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Its body, decoded."""
        return json.loads(self.body)


class Http:
    """One kept-alive HTTP connection. Raises OSError or BrokenResourceError if cut."""

    def __init__(self, chatd: Chatd) -> None:
        self.chatd = chatd
        self.stream: trio.SocketStream | None = None
        self.h11 = h11.Connection(h11.CLIENT)

    async def ask(
        self,
        method: str,
        path: str,
        token: str | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send one request, wait for its answer. body is encoded as JSON."""
        if self.stream is None:
            self.stream = await trio.open_tcp_stream("127.0.0.1", self.chatd.port)
            self.h11 = h11.Connection(h11.CLIENT)
        content = b"" if body is None else json.dumps(body).encode()
        lines = [("Host", f"127.0.0.1:{self.chatd.port}"), *(headers or {}).items()]
        if token is not None:
            lines.append(("Authorization", f"Bearer {token}"))
        if body is not None:
            lines.append(("Content-Length", str(len(content))))
        request = h11.Request(method=method, target=path, headers=lines)
        parts = [request, h11.Data(data=content), h11.EndOfMessage()]
        try:
            data = b"".join(self.h11.send(part) or b"" for part in parts)
            await self.stream.send_all(data)
            reply = await self._answer()
        except BaseException:
            await self.aclose()
            raise
        if reply.status >= 400:
            keep("error", reply.body)
        if self.h11.our_state is h11.DONE and self.h11.their_state is h11.DONE:
            self.h11.start_next_cycle()
        else:
            await self.aclose()
        return reply

    async def _answer(self) -> Reply:
        assert self.stream is not None
        status, headers, body = 0, {}, b""
        while True:
            event = self.h11.next_event()
            if event is h11.NEED_DATA:
                data = await self.stream.receive_some(65536)
                if not data:
                    raise trio.BrokenResourceError("the answer was cut")
                self.h11.receive_data(data)
            elif isinstance(event, h11.Response):
                status = event.status_code
                headers = {n.decode(): v.decode() for n, v in event.headers}
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return Reply(status, headers, body)
            else:
                raise trio.BrokenResourceError("the connection ended")

    async def aclose(self) -> None:
        """Close it; the next request opens another."""
        if self.stream is not None:
            stream, self.stream = self.stream, None
            await trio.aclose_forcefully(stream)


async def http(
    chatd: Chatd,
    method: str,
    path: str,
    token: str | None = None,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Send one request on a connection of its own."""
    connection = Http(chatd)
    try:
        return await connection.ask(method, path, token, body, headers)
    finally:
        await connection.aclose()


async def make_chat(chatd: Chatd, members: Sequence[int], title: str = "chat") -> int:
    """Make a chat of these users; its id."""
    body = {"title": title, "member_ids": list(members)}
    reply = await http(chatd, "POST", "/api/v1/chats", chatd.service_token(), body)
    assert reply.status == 201, f"making a chat: {reply.status} {reply.body!r}"
    chat_id: int = reply.json["chat"]["id"]
    return chat_id


# --- a client on the socket ----------------------------------------------------------


class Closed(Exception):
    """The socket has ended: the close code, 1006 if there was none, and the reason."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class Refused(Exception):
    """The handshake was answered with another status than 101."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body


def client_frame(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    """Encode a masked frame (RFC 6455 5.2)."""
    first = opcode | (0x80 if fin else 0)
    length = len(payload)
    if length < 126:
        head = bytes((first, 0x80 | length))
    elif length < 65536:
        head = bytes((first, 0xFE)) + length.to_bytes(2, "big")
    else:
        head = bytes((first, 0xFF)) + length.to_bytes(8, "big")
    mask = secrets.token_bytes(4)
    if not payload:
        return head + mask
    key = (mask * (length // 4 + 1))[:length]
    both = int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")
    return head + mask + both.to_bytes(length, "big")


TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class Wire:
    """A WebSocket connection of a client, frame by frame. Not the library's: ours.

    It reads only when it is asked to: a client that does not hear is a stalled one.
    """

    def __init__(self, stream: trio.SocketStream, buffer: bytes = b"") -> None:
        self.stream = stream
        self.buffer = bytearray(buffer)
        self._sending = trio.Lock()

    @classmethod
    async def open(
        cls, port: int, target: str, *, receive_buffer: int | None = None
    ) -> Self:
        """Connect and shake hands. Raises Refused, OSError, BrokenResourceError."""
        if receive_buffer is None:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
        else:  # must be set before the connect, for the window to be small
            sock = trio.socket.socket()
            try:
                sock.setsockopt(
                    trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, receive_buffer
                )
                await sock.connect(("127.0.0.1", port))
                stream = trio.SocketStream(sock)
            except BaseException:
                sock.close()
                raise
        try:
            key = base64.b64encode(secrets.token_bytes(16)).decode()
            await stream.send_all(
                f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
                "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13"
                f"\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
            )
            data = bytearray()
            while b"\r\n\r\n" not in data:
                more = await stream.receive_some(65536)
                if not more:
                    raise trio.BrokenResourceError("cut in the handshake")
                data += more
            head, _, rest = bytes(data).partition(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 101 "):
                with trio.move_on_after(2):
                    while more := await stream.receive_some(65536):
                        rest += more
                keep("error", head + b"\r\n\r\n" + rest)
                raise Refused(int(head.split()[1]), rest)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return cls(stream, rest)

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        async with self._sending:
            await self.stream.send_all(data)

    def _take(self) -> tuple[int, bytes] | None:
        buffer = self.buffer
        if len(buffer) < 2:
            return None
        length, start = buffer[1], 2
        if length == 126:
            length, start = int.from_bytes(buffer[2:4], "big"), 4
        elif length == 127:
            length, start = int.from_bytes(buffer[2:10], "big"), 10
        if len(buffer) < start or len(buffer) < start + length:
            return None
        opcode = buffer[0] & 0x0F
        assert buffer[0] & 0xF0 == 0x80, f"a fragment or reserved bits: {buffer[:2]!r}"
        payload = bytes(buffer[start : start + length])
        del buffer[: start + length]
        return opcode, payload

    async def frame(self) -> tuple[int, bytes]:
        """Read the next frame. Raises Closed(1006) when the connection ends."""
        while (frame := self._take()) is None:
            try:
                data = await self.stream.receive_some(65536)
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                raise Closed(1006) from None
            if not data:
                raise Closed(1006)
            self.buffer += data
        return frame

    async def message(self) -> bytes:
        """Read the next text, answering pings. Raises Closed with the peer's code."""
        while True:
            opcode, payload = await self.frame()
            if opcode in (TEXT, BINARY):
                return payload
            if opcode == PING:
                with contextlib.suppress(trio.BrokenResourceError):
                    await self.send(client_frame(PONG, payload))
            elif opcode == CLOSE:
                with contextlib.suppress(trio.BrokenResourceError):
                    await self.send(client_frame(CLOSE, payload[:2]))
                code = int.from_bytes(payload[:2], "big") if payload else 1005
                raise Closed(code, payload[2:].decode())

    def cut(self) -> None:
        """End the connection, without a word and without waiting."""
        self.stream.socket.close()


class Client:
    """One device of a user: a socket that keeps its cursor, and what it was told.

    events are all events that it ever heard, over sockets and polls, in the order in
    which it heard them. sent are all its messages by client_id, in the order of their
    first sending: some acked, some refused for good; unacked are the others, which it
    has to `repeat`. began_at is the seq from which on it listens.
    """

    # The answers after which a message need not be repeated.
    FINAL = frozenset(("bad_field", "not_found", "forbidden", "idempotency_mismatch"))

    def __init__(
        self,
        chatd: Chatd,
        user_id: int,
        *,
        token: str | None = None,
        cursor: str | None = None,
        receive_buffer: int | None = None,
        remember: bool = True,
    ) -> None:
        self.chatd = chatd
        self.user_id = user_id
        self.token = token or chatd.token(user_id)
        self.cursor = cursor
        self.receive_buffer = receive_buffer
        self.remember = remember
        self.wire: Wire | None = None
        self.connected: Frame = {}
        self.events: list[Frame] = []
        self.resyncs = 0
        self.sent: dict[str, Frame] = {}
        self.unacked: OrderedDict[str, Frame] = OrderedDict()
        self.acked: dict[str, Frame] = {}
        self.refused: dict[str, Frame] = {}
        self.began_at: int | None = None
        self.name = f"{user_id}-{secrets.token_hex(4)}"
        self._refs = itertools.count(1)
        self._client_ids: dict[str, str] = {}  # ref of a send: its client_id

    async def connect(self, seconds: float = 30) -> Frame:
        """Open a socket, with the cursor if there is one; its `connected` frame.

        Raises Refused, OSError, BrokenResourceError, Closed, TooSlowError.
        """
        self.cut()
        target = f"/ws/chat?token={self.token}"
        if self.cursor is not None:
            target += f"&cursor={self.cursor}"
        with trio.fail_after(seconds):
            self.wire = await Wire.open(
                self.chatd.port, target, receive_buffer=self.receive_buffer
            )
            frame = await self._next()
            while frame["type"] == "error":  # a close follows
                frame = await self._next()
        assert frame["type"] == "connected", f"the first frame: {frame}"
        self.connected = frame
        if frame["resume"] == "resync":
            self.resyncs += 1
        self._set_cursor(frame["cursor"])
        return frame

    def _set_cursor(self, cursor: str) -> None:
        self.cursor = cursor
        if self.began_at is None:
            self.began_at = int(cursor.rpartition(".")[2])

    async def _next(self) -> Frame:
        assert self.wire is not None, "not connected"
        frame: Frame = json.loads(await self.wire.message())
        self.take(frame)
        return frame

    def take(self, frame: Frame) -> None:
        """Note what a frame means: events move the cursor, acks end a repetition."""
        if "seq" in frame:
            if self.cursor is not None:
                self.cursor = f"{self.cursor.rpartition('.')[0]}.{frame['seq']}"
            if self.remember:
                self.events.append(frame)
        elif frame["type"] == "ack" and frame.get("client_id"):
            client_id = frame["client_id"]
            self.unacked.pop(client_id, None)
            first = self.acked.setdefault(client_id, frame)
            for field in ("message_id", "chat_id", "n", "created_at"):
                assert first[field] == frame[field], f"acked as {first} and as {frame}"
        elif frame["type"] == "error":
            keep("error", json.dumps(frame, ensure_ascii=False))
            client_id = self._client_ids.get(frame.get("ref", ""), "")
            if client_id in self.unacked and frame["code"] in self.FINAL:
                del self.unacked[client_id]
                self.refused[client_id] = frame

    async def hear(self, kind: str | None = None, seconds: float = 30) -> Frame:
        """Wait for the next frame, or for the next of this type. Raises Closed."""
        with trio.fail_after(seconds):
            while True:
                frame = await self._next()
                if kind is None or frame["type"] == kind:
                    return frame

    async def hear_all(self) -> Closed:
        """Hear until the socket ends; how it ended."""
        try:
            while True:
                await self._next()
        except Closed as end:
            return end

    async def say(self, kind: str, **fields: Any) -> str:
        """Say one command; its ref."""
        assert self.wire is not None, "not connected"
        ref = f"{self.name}-{next(self._refs)}"
        if "client_id" in fields:
            self._client_ids[ref] = fields["client_id"]
        frame = json.dumps({"type": kind, "ref": ref} | fields).encode()
        await self.wire.send(client_frame(TEXT, frame))
        return ref

    async def send(self, chat_id: int, content: str) -> str:
        """Send a message with a client_id, to be repeated until its ack."""
        client_id = f"{self.name}-{next(self._refs)}"
        fields = {"chat_id": chat_id, "content": content}
        self.sent[client_id] = self.unacked[client_id] = fields
        await self.say("send_message", client_id=client_id, **fields)
        return client_id

    async def repeat(self) -> None:
        """Send again, in their order, the messages that were not acked."""
        for client_id, fields in list(self.unacked.items()):
            await self.say("send_message", client_id=client_id, **fields)

    async def ask(self, kind: str, seconds: float = 30, **fields: Any) -> Frame:
        """Say a command and wait for its answer (and hear all that comes between)."""
        ref = await self.say(kind, **fields)
        with trio.fail_after(seconds):
            while True:
                frame = await self._next()
                if frame.get("ref") == ref:
                    return frame

    async def poll(self, limit: int = 500) -> bool:
        """Hear over the poll instead, from the cursor on; is there more at once?"""
        query = f"?limit={limit}" + (f"&cursor={self.cursor}" if self.cursor else "")
        reply = await http(self.chatd, "GET", f"/api/v1/events{query}", self.token)
        if reply.status != 200:
            raise Refused(reply.status, reply.body)
        page = reply.json
        self.resyncs += page["resync"]
        for event in page["events"]:
            self.take(event)
        self._set_cursor(page["cursor"])
        return bool(page["more"])

    def cut(self) -> None:
        """End the connection, without a word and without waiting."""
        if self.wire is not None:
            self.wire.cut()
            self.wire = None

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *args: object) -> None:
        self.cut()


async def until(happens: Callable[[], bool], seconds: float) -> bool:
    """Wait until something of another task or process is so; False: it never was."""
    deadline = trio.current_time() + seconds
    while trio.current_time() < deadline:
        if happens():
            return True
        await trio.sleep(0.005)
    return happens()


# --- running -------------------------------------------------------------------------


def run_trio(
    function: Callable[..., Any], *args: Any, seconds: float = 600, **named: Any
) -> Any:
    """Run an async function under a deadline. One AssertionError comes out as one."""

    async def bounded() -> Any:
        with trio.fail_after(seconds):
            return await function(*args, **named)

    try:
        return trio.run(bounded)
    except* AssertionError as group:
        false = next(leaves(group))
    raise false


def leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    """Walk the exceptions of a group, however deep."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error
