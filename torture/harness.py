"""The base of all proofs: a real `chatd serve`, clients, measurements, figures.

Everything here works from outside of chatd: with a subprocess on a port that the kernel
picks, a temporary folder, and bytes on sockets. Only proof `conformance` imports chatd.

    with Chatd() as chatd:                     # start; stop at the end
        trio.run(act, chatd)

    async def act(chatd):
        async with Client(chatd, user_id=6) as anna:    # past its `connected` frame
            await anna.send(chat_id, text("hello"))
            ack = await anna.receive("ack")

Every token carries MARK in its jti, and every text of `text()` begins with MARK. The
folder `evidence_folder()` collects the logs, metrics, stats documents and error answers
of all servers. When the other proofs are done, proof `secrecy` searches it for marks
and tokens.
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
import re
import resource
import secrets
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import h11
import jwt
import trio

ROOT = Path(__file__).resolve().parent.parent
Frame = dict[str, Any]

# Flags of a server whose rate limits are not part of the claim.
NO_RATES = (
    "--sends=0",
    "--commands=0",
    "--typing=0",
    "--handshakes=0",
    "--requests=0",
    "--receive-bytes=0",
)
MARK = "Xq7Marker"  # in every token and in every text; no log may contain it
LABEL = re.compile(MARK.encode() + rb" \d+-\d+")  # what tells a text from all others


@dataclasses.dataclass
class Figures:
    """The result of a proof: its claim, which held, a sentence of figures, numbers."""

    claim: str
    figure: str
    numbers: dict[str, float | str] = dataclasses.field(default_factory=dict)


def evidence_folder() -> Path:
    """The folder that collects the logs and documents of all servers of this run."""
    name = os.environ.get("CHATD_TORTURE_EVIDENCE")
    if name is None:
        name = tempfile.mkdtemp(prefix="torture-evidence-")
        os.environ["CHATD_TORTURE_EVIDENCE"] = name
    return Path(name)


def save_evidence(kind: str, output: str | bytes) -> None:
    """Save what a server wrote as evidence: kind is log, error, stats or metrics."""
    data = output.encode() if isinstance(output, str) else output
    with (evidence_folder() / f"{os.getpid()}.{kind}").open("ab") as file:
        file.write(data + b"\n")


def seeded_rng(name: str) -> random.Random:
    """Make a random number generator whose numbers --seed repeats."""
    return random.Random(f"{os.environ.get('CHATD_TORTURE_SEED', '1')} {name}")


_numbers = itertools.count(1)


def text(words: str = "") -> str:
    """Make the text of a message: it has the mark, and a process makes it only once."""
    return f"{MARK} {os.getpid()}-{next(_numbers)} {words}".strip()


def labels(data: str | bytes) -> set[bytes]:
    """Find the texts of `text()`, whatever is around them: what tells them apart."""
    return set(LABEL.findall(data.encode() if isinstance(data, str) else data))


def quantile(share: float, values: Sequence[float]) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, math.ceil(share * len(ranked)) - 1)]


def raise_file_limit() -> None:
    """Let this process open as many files as it may, up to 65,536."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, 65536), limit))


# --- the server ----------------------------------------------------------------------


class Chatd:
    """A `chatd serve` in a folder of its own, which can be started again and again.

    The end of the `with` block removes the folder, with the database and the secret.
    env is added to the environment. before is put in front of the command
    (`ip netns exec x`). rates: keep chatd's default rate limits.
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
        self.log = evidence_folder() / f"{self.folder.name}-{secrets.token_hex(3)}.log"
        self.flags = [*(() if rates else NO_RATES), f"--log-level={log_level}", *flags]
        self.env = dict(env or {})
        self.before = list(before)
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.ready = False  # it was started, and this process has not killed it
        secret_file = self.folder / "chatd.secret"
        if not secret_file.exists():
            secret_file.touch(0o600)
            secret_file.write_text(f"{MARK}{secrets.token_hex(24)}\n")
        self.secret = secret_file.read_text().strip()

    # --- starting and stopping ---

    def command(self, *arguments: str) -> list[str]:
        """Make a command line that runs this chatd."""
        program = os.environ.get("CHATD_TORTURE_PROGRAM", str(ROOT / "chatd.py"))
        return [sys.executable, program, *arguments]

    def arguments(self) -> list[str]:
        """The subcommand, and the flags that it cannot do without."""
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
            raise AssertionError(f"chatd did not start: {line!r} {self.log_tail()}")
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

    async def start_in_thread(self) -> None:
        """Start, and wait until it listens, without blocking other tasks."""
        await trio.to_thread.run_sync(self.start)

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self.process is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """End the process with SIGKILL, if it was started."""
        self.ready = False
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()

    def wait(self, seconds: float = 30) -> int:
        """Wait until the process ends; return the exit status."""
        assert self.process is not None
        return self.process.wait(seconds)

    async def ended(self, seconds: float = 30) -> int:
        """Like `wait`, without blocking other tasks."""
        return await trio.to_thread.run_sync(self.wait, seconds)

    def stop(self, seconds: float = 30) -> int:
        """Stop it with SIGTERM, as systemd does; return the exit status."""
        self.signal(signal.SIGTERM)
        status = self.wait(seconds)
        assert self.process is not None
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status

    def log_tail(self) -> str:
        """The last 1,000 characters of the log."""
        return self.log.read_text(errors="replace")[-1000:]

    def log_without_traceback(self) -> str:
        """The whole log. Raises AssertionError if it has a traceback."""
        log = self.log.read_text(errors="replace")
        assert "Traceback" not in log, f"the log: {log[-2000:]}"
        return log

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
                run_trio(save_documents, self)
        finally:
            try:
                if self.alive:
                    self.stop()
            finally:
                self.kill()
                if self.own_folder:
                    shutil.rmtree(self.folder, ignore_errors=True)

    def move(self, folder: Path) -> None:
        """Use another folder from the next start on."""
        self.folder = folder
        self.db = folder / "chatd.db"

    # --- tokens ---

    def token(self, user_id: int, ttl: float = 3600, **claims: Any) -> str:
        """Sign a token, as `chatd token` does."""
        now = time.time()
        body = {
            "user_id": user_id,
            "iat": int(now),
            "exp": now + ttl,
            "jti": f"{MARK}-{secrets.token_hex(6)}",
        }
        return jwt.encode(body | claims, self.secret, "HS256")

    def service_token(self) -> str:
        """Sign a token with the scopes `service` and `stats`."""
        return self.token(1_000_000, scope="service stats")

    # --- resources, from /proc ---

    def rss_bytes(self) -> int:
        """The resident memory of the process now."""
        return self._status("VmRSS") * 1024

    def peak_rss_bytes(self) -> int:
        """The largest resident memory that the process has had."""
        return self._status("VmHWM") * 1024

    def _status(self, name: str) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
        raise AssertionError(f"/proc/{self.pid}/status has no {name}")

    def descriptors(self) -> int:
        """How many files and sockets the process has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def open_sockets(self) -> int:
        """How many of the descriptors are sockets; the others are the database's."""
        count = 0
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since the listing
                count += str(fd.readlink()).startswith("socket:")
        return count

    def cpu_seconds(self) -> float:
        """The processor time that all threads of the process have used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    # --- `chatd check` ---

    def check(self) -> str:
        """Run `chatd check`; return its output. Raises AssertionError on a fault."""
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
    """A `chatd proxy` in front of a server, with the server's secret."""

    def __init__(self, upstream: Chatd, log_level: str = "debug") -> None:
        super().__init__(folder=upstream.folder)
        self.flags = ["--handshakes=0", f"--log-level={log_level}"]
        self.upstream = upstream

    def arguments(self) -> list[str]:
        """The subcommand, and the flags that it cannot do without."""
        upstream = f"--upstream=127.0.0.1:{self.upstream.port}"
        return ["proxy", "--listen=127.0.0.1:0", upstream, f"--db={self.db}"]


async def save_documents(chatd: Chatd) -> None:
    """Save a server's stats document and metrics as evidence."""
    token = chatd.service_token()
    with trio.move_on_after(10), contextlib.suppress(OSError, trio.BrokenResourceError):
        save_evidence("stats", (await http(chatd, "GET", STATS_PATH, token)).body)
        save_evidence("metrics", (await http(chatd, "GET", "/metrics", token)).body)


# --- HTTP ----------------------------------------------------------------------------

STATS_PATH = "/api/v1/internal/chat/ws/stats"


class Reply(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, decoded from JSON."""
        return json.loads(self.body)


class Http:
    """One kept-alive HTTP connection.

    A request raises OSError or BrokenResourceError if the connection ends before the
    answer does.
    """

    def __init__(self, chatd: Chatd) -> None:
        self.chatd = chatd
        self.stream: trio.SocketStream | None = None
        self.h11 = h11.Connection(h11.CLIENT)

    async def request(
        self,
        method: str,
        path: str,
        token: str | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send one request and wait for its answer. body is encoded as JSON."""
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
            reply = await self._read_answer()
        except BaseException:
            await self.aclose()
            raise
        if reply.status >= 400:
            save_evidence("error", reply.body)
        if self.h11.our_state is h11.DONE and self.h11.their_state is h11.DONE:
            self.h11.start_next_cycle()
        else:
            await self.aclose()
        return reply

    async def _read_answer(self) -> Reply:
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
        """Close the connection; the next request opens another."""
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
        return await connection.request(method, path, token, body, headers)
    finally:
        await connection.aclose()


async def make_chat(chatd: Chatd, members: Sequence[int], title: str = "chat") -> int:
    """Create a chat with these members; return its id."""
    body = {"title": title, "member_ids": list(members)}
    reply = await http(chatd, "POST", "/api/v1/chats", chatd.service_token(), body)
    assert reply.status == 201, f"creating a chat: {reply.status} {reply.body!r}"
    chat_id: int = reply.json["chat"]["id"]
    return chat_id


async def post_message(
    connection: Http, chat_id: int, content: str, sender_id: int = 1
) -> int:
    """Send a message in a user's name, as the service does; return its id."""
    path = f"/api/v1/chats/{chat_id}/messages"
    body = {"content": content, "sender_id": sender_id}
    token = connection.chatd.service_token()
    reply = await connection.request("POST", path, token, body)
    assert reply.status == 201, f"a post was answered {reply.status}"
    return int(reply.json["message"]["id"])


async def ticket(chatd: Chatd, token: str) -> str:
    """Get a ticket for one socket."""
    reply = await http(chatd, "GET", "/api/v2/ws-token", token)
    return str(reply.json["token"])


async def revoke(chatd: Chatd, user_id: int) -> Reply:
    """Revoke the tokens of a user, as the service does."""
    path, body = "/api/v1/internal/chat/revoke", {"user_id": user_id}
    return await http(chatd, "POST", path, chatd.service_token(), body)


async def stats(chatd: Chatd) -> Frame:
    """Get the stats document."""
    reply = await http(chatd, "GET", STATS_PATH, chatd.service_token())
    document: Frame = reply.json
    return document


# --- a WebSocket client --------------------------------------------------------------


class Closed(Exception):
    """The socket has ended: the close code, 1006 without a close frame, the reason."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class Refused(Exception):
    """The handshake was answered with a status other than 101."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body


# The server is away, or has ended the connection. A client that sees one of these
# connects again.
DISCONNECTED = (OSError, trio.BrokenResourceError, Closed, Refused)


def upgrade_request(
    target: str, host: str = "x", key: str = "dGhlIHNhbXBsZSBub25jZQ=="
) -> bytes:
    """The bytes of a handshake request (RFC 6455 4.1)."""
    return (
        f"GET {target} HTTP/1.1\r\nHost: {host}\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: {key}\r\n\r\n"
    ).encode()


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


def close_code(payload: bytes) -> int:
    """The code in a close frame's payload; 1005 if it has none (RFC 6455 7.1.5)."""
    return int.from_bytes(payload[:2], "big") if payload else 1005


def reset(stream: trio.SocketStream) -> None:
    """End a connection with RST, and drop what the kernel has not sent yet."""
    no_linger = struct.pack("ii", 1, 0)
    stream.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, no_linger)
    stream.socket.close()


TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


@dataclasses.dataclass
class Change:
    """An edit, or a deletion (content is None), that was asked for.

    rev is that of the ack, 0 before it. refused is the code of the error: whether the
    change was made is unknown then, since an earlier try may have been.
    """

    content: str | None
    rev: int = 0
    refused: str = ""


class WebSocket:
    """A client's WebSocket connection, frame by frame. It shares no code with chatd.

    It reads only when a method asks for a frame, so a client that does not receive is a
    stalled client.
    """

    def __init__(self, stream: trio.SocketStream, buffer: bytes = b"") -> None:
        self.stream = stream
        self.buffer = bytearray(buffer)
        self._sending = trio.Lock()

    @classmethod
    async def open(
        cls, port: int, target: str, *, receive_buffer: int | None = None
    ) -> Self:
        """Connect and upgrade. Raises Refused, OSError, BrokenResourceError."""
        if receive_buffer is None:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
        else:  # the window is small only if the option is set before the connect
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
            await stream.send_all(upgrade_request(target, f"127.0.0.1:{port}", key))
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
                save_evidence("error", head + b"\r\n\r\n" + rest)
                raise Refused(int(head.split()[1]), rest)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return cls(stream, rest)

    async def send(self, data: bytes) -> None:
        """Send these bytes unchanged."""
        async with self._sending:
            await self.stream.send_all(data)

    def parse_frame(self) -> tuple[int, bytes] | None:
        """Take a frame from the buffer: its opcode and payload. None: not whole yet."""
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

    async def receive_frame(self) -> tuple[int, bytes]:
        """Read the next frame. Raises Closed(1006) when the connection ends."""
        while (frame := self.parse_frame()) is None:
            try:
                data = await self.stream.receive_some(65536)
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                raise Closed(1006) from None
            if not data:
                raise Closed(1006)
            self.buffer += data
        return frame

    async def receive_message(self) -> bytes:
        """Read the next message; answer pings. Raises Closed with the peer's code."""
        while True:
            opcode, payload = await self.receive_frame()
            if opcode in (TEXT, BINARY):
                return payload
            if opcode == PING:
                with contextlib.suppress(trio.BrokenResourceError):
                    await self.send(client_frame(PONG, payload))
            elif opcode == CLOSE:
                with contextlib.suppress(trio.BrokenResourceError):
                    await self.send(client_frame(CLOSE, payload[:2]))
                raise Closed(close_code(payload), payload[2:].decode())

    def cut(self) -> None:
        """Close the TCP connection at once, without a close frame."""
        self.stream.socket.close()


class Client:
    """One device of a user: a socket, a cursor, and a record of what it received.

    events has every event that it received, over sockets and polls, in the order of
    arrival. sent has all its messages by client_id, in the order of their first send. A
    message moves from unacked to acked, or to refused if a repetition would change
    nothing; `repeat` sends the unacked ones again. changes has the edits and deletions
    of each message, in their order; a message has at most one that is unacked, and
    `repeat` sends it again, too. start_seq is the seq of the first cursor: every later
    event of the user must arrive.
    """

    # Error codes after which a message or a change is not repeated.
    FINAL = frozenset(("bad_field", "not_found", "forbidden", "idempotency_mismatch",
                       "deleted", "changed", "too_late"))  # fmt: skip

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
        self.websocket: WebSocket | None = None
        self.connected: Frame = {}
        self.events: list[Frame] = []
        self.resyncs = 0
        self.sent: dict[str, Frame] = {}
        self.unacked: OrderedDict[str, Frame] = OrderedDict()
        self.acked: dict[str, Frame] = {}
        self.refused: dict[str, Frame] = {}
        self.changes: dict[
            int, list[Change]
        ] = {}  # message id: all that were asked for
        self.unacked_changes: dict[int, Change] = {}
        self.start_seq: int | None = None
        self.name = f"{user_id}-{secrets.token_hex(4)}"
        self._refs = itertools.count(1)
        self._client_ids: dict[str, str] = {}  # the ref of a send_message: client_id
        self._change_ids: dict[str, int] = {}  # the ref of a change: message id

    async def connect(self, seconds: float = 30) -> Frame:
        """Open a socket, with the cursor if there is one; return `connected`.

        Raises Refused, OSError, BrokenResourceError, Closed, TooSlowError.
        """
        self.cut()
        target = f"/ws/chat?token={self.token}"
        if self.cursor is not None:
            target += f"&cursor={self.cursor}"
        with trio.fail_after(seconds):
            self.websocket = await WebSocket.open(
                self.chatd.port, target, receive_buffer=self.receive_buffer
            )
            frame = await self._next()
            while frame["type"] == "error":  # a close frame follows
                frame = await self._next()
        assert frame["type"] == "connected", f"the first frame: {frame}"
        self.connected = frame
        if frame["resume"] == "resync":
            self.resyncs += 1
        self._set_cursor(frame["cursor"])
        return frame

    def _set_cursor(self, cursor: str) -> None:
        self.cursor = cursor
        if self.start_seq is None:
            self.start_seq = int(cursor.rpartition(".")[2])

    async def _next(self) -> Frame:
        assert self.websocket is not None, "not connected"
        frame: Frame = json.loads(await self.websocket.receive_message())
        self.handle(frame)
        return frame

    def handle(self, frame: Frame) -> None:
        """Record a frame: an event moves the cursor, an ack ends the repetitions."""
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
        elif frame["type"] == "ack" and frame.get("ref") in self._change_ids:
            message_id = self._change_ids[frame["ref"]]
            assert frame["message_id"] == message_id, f"an ack of {frame}"
            if change := self.unacked_changes.pop(message_id, None):
                change.rev = frame["rev"]
        elif frame["type"] == "error":
            save_evidence("error", json.dumps(frame, ensure_ascii=False))
            client_id = self._client_ids.get(frame.get("ref", ""), "")
            if client_id in self.unacked and frame["code"] in self.FINAL:
                del self.unacked[client_id]
                self.refused[client_id] = frame
            message_id = self._change_ids.get(frame.get("ref", ""), 0)
            if message_id in self.unacked_changes and frame["code"] in self.FINAL:
                self.unacked_changes.pop(message_id).refused = frame["code"]

    async def receive(self, kind: str | None = None, seconds: float = 30) -> Frame:
        """Wait for the next frame, or for the next of this type. Raises Closed."""
        with trio.fail_after(seconds):
            while True:
                frame = await self._next()
                if kind is None or frame["type"] == kind:
                    return frame

    async def receive_until_closed(self) -> Closed:
        """Receive until the socket ends; return how it ended."""
        try:
            while True:
                await self._next()
        except Closed as end:
            return end

    async def send_command(self, kind: str, **fields: Any) -> str:
        """Send one command; return its ref."""
        assert self.websocket is not None, "not connected"
        ref = f"{self.name}-{next(self._refs)}"
        if "client_id" in fields:
            self._client_ids[ref] = fields["client_id"]
        if kind in ("edit_message", "delete_message"):
            self._change_ids[ref] = fields["message_id"]
        frame = json.dumps({"type": kind, "ref": ref} | fields).encode()
        await self.websocket.send(client_frame(TEXT, frame))
        return ref

    async def send(self, chat_id: int, content: str) -> str:
        """Send a message; return the client_id that its repetitions carry, too."""
        client_id = f"{self.name}-{next(self._refs)}"
        fields = {"chat_id": chat_id, "content": content}
        self.sent[client_id] = self.unacked[client_id] = fields
        await self.send_command("send_message", client_id=client_id, **fields)
        return client_id

    async def change(self, message_id: int, content: str | None) -> Change:
        """Edit a message, or delete it (None)."""
        change = self.unacked_changes[message_id] = Change(content)
        self.changes.setdefault(message_id, []).append(change)
        await self._send_change(message_id, change)
        return change

    async def _send_change(self, message_id: int, change: Change) -> None:
        if change.content is None:
            await self.send_command("delete_message", message_id=message_id)
        else:
            await self.send_command(
                "edit_message", message_id=message_id, content=change.content
            )

    async def repeat(self) -> None:
        """Send the unacked messages and changes again, in their order."""
        for client_id, fields in list(self.unacked.items()):
            await self.send_command("send_message", client_id=client_id, **fields)
        for message_id, change in list(self.unacked_changes.items()):
            await self._send_change(message_id, change)

    @property
    def all_acked(self) -> bool:
        """Whether every message and every change has its answer."""
        return not self.unacked and not self.unacked_changes

    async def ask(self, kind: str, seconds: float = 30, **fields: Any) -> Frame:
        """Send a command and wait for its answer; record the frames before it."""
        ref = await self.send_command(kind, **fields)
        with trio.fail_after(seconds):
            while True:
                frame = await self._next()
                if frame.get("ref") == ref:
                    return frame

    async def poll(self, limit: int = 500) -> bool:
        """Poll for the events after the cursor; return whether there are more."""
        query = f"?limit={limit}" + (f"&cursor={self.cursor}" if self.cursor else "")
        reply = await http(self.chatd, "GET", f"/api/v1/events{query}", self.token)
        if reply.status != 200:
            raise Refused(reply.status, reply.body)
        page = reply.json
        self.resyncs += page["resync"]
        for event in page["events"]:
            self.handle(event)
        self._set_cursor(page["cursor"])
        return bool(page["more"])

    def cut(self) -> None:
        """Close the TCP connection at once, without a close frame."""
        if self.websocket is not None:
            self.websocket.cut()
            self.websocket = None

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *args: object) -> None:
        self.cut()


async def connect_all(clients: Iterable[Client]) -> None:
    """Connect all these clients, 50 at a time."""
    limiter = trio.CapacityLimiter(50)

    async def connect(client: Client) -> None:
        async with limiter:
            await client.connect(120)

    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(connect, client)


async def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until the condition is true, at most so long; return whether it is."""
    deadline = trio.current_time() + seconds
    while trio.current_time() < deadline:
        if condition():
            return True
        await trio.sleep(0.005)
    return condition()


# --- running a proof -----------------------------------------------------------------


def run_trio(
    function: Callable[..., Any], *args: Any, seconds: float = 600, **named: Any
) -> Any:
    """Run an async function with a deadline.

    An AssertionError inside exception groups is raised by itself.
    """

    async def bounded() -> Any:
        with trio.fail_after(seconds):
            return await function(*args, **named)

    try:
        return trio.run(bounded)
    except* AssertionError as group:
        false = next(leaves(group))
    raise false


def leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    """Iterate over the exceptions of a group and of the groups in it."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error
