"""A chatd process and its clients, all from outside.

Nothing here imports chatd or looks inside a process: a server is a command, a port, a
database and what it prints. Every wait has a deadline.

- RawClient is a connection in bytes, with requests and frames. It does nothing alone.
- SocketClient is an open socket that sends commands and receives messages. It answers
  pings and closes. It reads only in `receive` and the methods that call it.
- ServerProcess is a database and the process that serves it, which can be killed and
  started again. ProxyProcess stands in front of one. Process is what a test without
  Trio needs of them.
- Sender keeps sending its messages over such sockets until all are acked.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Self
from urllib.parse import quote, urlencode

import h11
import jwt
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

CHECKOUT = Path(__file__).resolve().parents[1]
WAIT_SECONDS = 30.0  # the longest wait for anything that should come at once
NO_RATES = (
    *(f"--{of}=0" for of in ("sends", "commands", "typing", "requests")),
    *("--receive-bytes=0", "--handshakes=0", "--drain-seconds=2"),
)
MISTAKE = re.compile(r"Traceback|\b(failed|crashed) error=")  # in the log

Frame = dict[str, Any]
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec_WebSocket_Version": "13",
    "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
UPGRADE_LINES = [f"{name.replace('_', '-')}: {is_}" for name, is_ in UPGRADE.items()]
ACCEPT_KEY = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 1.3, for the key above
new_users = itertools.count(1000)  # every test gets users of its own


# --- bytes ---------------------------------------------------------------------------


def request_bytes(
    method: str, target: str, body: bytes | None = None, /, **headers: str
) -> bytes:
    """Return the bytes of a request. `Some_Name` is the header Some-Name."""
    lines = [f"{method} {target} HTTP/1.1"]
    headers = {"Host": "chat.example"} | headers
    if body is not None:
        headers["Content-Length"] = str(len(body))
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join((*lines, "", "")).encode("latin-1") + (body or b"")


def get_bytes(target: str, *lines: str, version: str = "1.1") -> bytes:
    """Return the bytes of a GET with exactly these header lines."""
    text = "\r\n".join((f"GET {target} HTTP/{version}", *lines, "", ""))
    return text.encode("latin-1")


def upgrade_bytes(target: str, **changed: str) -> bytes:
    """Return the bytes of a handshake. A header changed to "" is left out."""
    given = {name: value for name, value in (UPGRADE | changed).items() if value}
    return request_bytes("GET", target, None, **given)


def frame_bytes(
    opcode: int, payload: bytes = b"", *, fin: bool = True, masked: bool = True
) -> bytes:
    """Return the bytes of a client's frame. Its mask is zeros.

    The opcode may have reserved bits, such as 0x40.
    """
    first, mask = opcode | (0x80 if fin else 0), 0x80 if masked else 0
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", first, mask | size)
    elif size < 65536:
        head = struct.pack("!BBH", first, mask | 126, size)
    else:
        head = struct.pack("!BBQ", first, mask | 127, size)
    return head + (bytes(4) if masked else b"") + payload


def close_bytes(code: int) -> bytes:
    return frame_bytes(CLOSE, struct.pack("!H", code))


def command_bytes(kind: str, /, **fields: object) -> bytes:
    return frame_bytes(TEXT, json.dumps({"type": kind, **fields}).encode())


def take_frames(data: bytearray) -> Iterator[tuple[int, bytes]]:
    """Remove whole frames of a server from the front of `data`, one by one."""
    while len(data) >= 2:
        assert data[0] & 0x70 == 0, "reserved bits"
        assert data[0] & 0x80, "a fragment"
        assert data[1] < 128, "a server's frame is not masked"
        start = 2 + {126: 2, 127: 8}.get(data[1], 0)
        size = int.from_bytes(data[2:start], "big") if start > 2 else data[1]
        if len(data) < start + size:
            return
        opcode, payload = data[0] & 15, bytes(data[start : start + size])
        del data[: start + size]
        yield opcode, payload


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


def split_answer(
    data: bytes, method: str = "GET", *, ended: bool = False
) -> tuple[HttpAnswer, bytes]:
    """Split `data` into the first answer and the rest. EOFError if it is not whole."""
    client = h11.Connection(h11.CLIENT)
    upgrade = [("Host", "x"), ("Upgrade", "x"), ("Connection", "upgrade")]
    client.send(h11.Request(method=method, target="/", headers=upgrade))
    client.send(h11.EndOfMessage())
    if data:
        client.receive_data(data)
    if ended:
        client.receive_data(b"")
    status, headers, body = 0, dict[str, str](), b""
    while True:
        try:
            event = client.next_event()
        except h11.RemoteProtocolError:
            if not ended:
                raise
            event = h11.NEED_DATA
        if event is h11.NEED_DATA:
            raise EOFError(data)
        if isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.Response | h11.InformationalResponse):
            status = event.status_code
            for name, value in event.headers:  # RFC 9110 5.3
                had, line = headers.get(name.decode()), value.decode()
                headers[name.decode()] = f"{had}, {line}" if had else line
        if isinstance(event, h11.EndOfMessage | h11.InformationalResponse):
            return HttpAnswer(status, headers, body), client.trailing_data[0]


# --- clients -------------------------------------------------------------------------


class Disconnected(Exception):
    """The server ended the connection; `code` is 1006 without a close frame."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


LOST = (OSError, Disconnected, trio.BrokenResourceError)  # with a killed server


def reset(stream: trio.SocketStream) -> None:
    """Disconnect with RST instead of FIN."""
    linger = struct.pack("ii", 1, 0)
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    stream.socket.close()


class RawClient:
    """A client's connection in bytes. It reads only in the methods that read.

    They wait for `soon` seconds: so soon must come what they read.
    """

    def __init__(self, stream: trio.SocketStream, soon: float = WAIT_SECONDS) -> None:
        self.stream = stream
        self.soon = soon
        self.data = bytearray()
        self.informed: list[int] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stream.aclose()

    async def send(self, *parts: bytes) -> None:
        await self.stream.send_all(b"".join(parts))

    async def read(self, most: int = 65536) -> bytes:
        data = bytes(await self.stream.receive_some(most))
        self.data += data
        return data

    async def listen(self, seconds: float = 1.0) -> None:
        """Read everything that comes within `seconds`."""
        with trio.move_on_after(seconds):
            while await self.read():
                pass

    async def finishes(self, within: float = 0) -> bytes:
        """Read until EOF; return the data. A reset raises."""
        with trio.fail_after(within or self.soon):
            while await self.read():
                pass
        return bytes(self.data)

    async def ends(self, within: float = 0) -> bytes:
        """Read until EOF or a reset; return the data."""
        with suppress(trio.BrokenResourceError):
            await self.finishes(within)
        return bytes(self.data)

    async def receives(self, size: int, within: float = 0) -> bytes:
        """Read at least `size` bytes; return everything read so far."""
        with trio.fail_after(within or self.soon):
            while len(self.data) < size:
                assert await self.read(), bytes(self.data)
        return bytes(self.data)

    # HTTP

    async def answer(self, method: str = "GET", within: float = 0) -> HttpAnswer:
        """Read one whole answer to a request of this method."""
        ended = False
        with trio.fail_after(within or self.soon):
            while True:
                try:
                    got, rest = split_answer(bytes(self.data), method, ended=ended)
                except EOFError:
                    if ended:
                        raise trio.BrokenResourceError(bytes(self.data)) from None
                    ended = not await self.read()
                    continue
                self.data = bytearray(rest)
                if got.status != 100:
                    return got
                self.informed.append(got.status)

    async def ask(
        self,
        method: str,
        target: str,
        body: object = None,
        /,
        *,
        token: str = "",
        **headers: str,
    ) -> HttpAnswer:
        """Send a request, with its body as it is or as JSON, and read its answer."""
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if not isinstance(body, bytes | None):
            body = json.dumps(body).encode()
        with trio.fail_after(self.soon), suppress(trio.BrokenResourceError):
            await self.send(request_bytes(method, target, body, **headers))
        return await self.answer(method)  # it may come before the request is sent

    # The socket

    async def frame(self, within: float = 0) -> tuple[int, bytes]:
        with trio.fail_after(within or self.soon):
            while True:
                for frame in take_frames(self.data):
                    return frame
                assert await self.read(), "the connection has ended"

    async def receive(self, kind: str, within: float = 0) -> Frame:
        opcode, payload = await self.frame(within)
        received: Frame = json.loads(payload)
        assert (opcode, received["type"]) == (TEXT, kind), received
        return received

    async def close_code(self, within: float = 0) -> int:
        """Read the close frame; return its code. Nothing may follow it. Disconnect."""
        opcode, payload = await self.frame(within)
        assert opcode == CLOSE, payload
        assert await self.ends() == b""
        self.stream.socket.close()
        await wait_all_tasks_blocked()
        return int.from_bytes(payload[:2], "big") if payload else 1005


class SocketClient:
    """A WebSocket client. It reads only in `receive` and the methods that call it."""

    def __init__(
        self, stream: trio.SocketStream, data: bytes | bytearray = b""
    ) -> None:
        self.stream = stream
        self.data = bytearray(data)
        self.hello: Frame = {}  # the first message
        self.pongs: list[bytes] = []
        self.owed = bytearray()  # pongs and a close frame, sent before the next read

    async def send_command(self, kind: str, /, **fields: object) -> None:
        await self.send_frame(json.dumps({"type": kind, **fields}))

    async def send_frame(self, text: str | bytes, opcode: int = TEXT) -> None:
        payload = text.encode() if isinstance(text, str) else text
        with trio.fail_after(WAIT_SECONDS):
            await self.stream.send_all(frame_bytes(opcode, payload))

    async def receive(self, kind: str = "", within: float = WAIT_SECONDS) -> Frame:
        """Return the next message, which must be of that type. Raises Disconnected."""
        with trio.fail_after(within):
            while (message := self.received()) is None:
                await self.sip(65536)
        assert kind in {"", message["type"]}, message
        return message

    async def find(self, kind: str, within: float = WAIT_SECONDS) -> Frame:
        """Return the next message of that type; messages before it do not matter."""
        with trio.fail_after(within):
            while (message := await self.receive(within=within))["type"] != kind:
                pass
        return message

    async def receives_nothing(self) -> None:
        """Claim that nothing was on its way: the next message answers a ping."""
        await self.send_command("ping")
        await self.receive("pong")

    async def ask(self, kind: str, /, **fields: object) -> Frame:
        """Send a command and return its answer; other messages do not matter."""
        ref = os.urandom(8).hex()
        await self.send_command(kind, ref=ref, **fields)
        while (message := await self.receive()).get("ref") != ref:
            pass
        return message

    async def ended(self, within: float = WAIT_SECONDS) -> int:
        """Receive to the end; return the server's close code."""
        with trio.fail_after(within):
            while True:
                try:
                    await self.receive(within=within)
                except Disconnected as gone:
                    return gone.code

    async def leave(self) -> None:
        """Close with 1000, and receive the answer (RFC 6455 7.1)."""
        with suppress(trio.BrokenResourceError):
            await self.stream.send_all(close_bytes(1000))
            assert await self.ended() in {1000, 1006}
        await self.stream.aclose()

    def drop(self) -> None:
        reset(self.stream)

    def read_faster(self) -> None:
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)

    async def sip(self, size: int) -> None:
        """Read at most `size` bytes."""
        try:
            if self.owed:
                await self.stream.send_all(bytes(self.owed))
                self.owed.clear()
            data = await self.stream.receive_some(size)
        except trio.BrokenResourceError:
            raise Disconnected(1006) from None
        if not data:
            raise Disconnected(1006)
        self.data += data

    def received(self) -> Frame | None:
        """Return the next message of the bytes read, or None if it is not whole."""
        for opcode, payload in take_frames(self.data):
            if opcode == TEXT:
                message = json.loads(payload)
                assert isinstance(message, dict)
                return message
            if opcode == CLOSE:
                payload[2:].decode()  # a reason is UTF-8
                self.owed += frame_bytes(CLOSE, payload[:2])
                code = int.from_bytes(payload[:2], "big") if payload else 1005
                raise Disconnected(code)
            if opcode == PING:
                self.owed += frame_bytes(PONG, payload)
            else:
                assert opcode == PONG, (opcode, payload)
                self.pongs.append(payload)
        return None


# --- processes -----------------------------------------------------------------------


def find_program(names: tuple[str | None, ...], remedy: str, *trial: str) -> str:
    """Find a program that can run `trial`. Without it: fail in CI, skip elsewhere."""
    for name in names:
        path = shutil.which(name or "")
        if path and not (
            trial and subprocess.run([path, *trial], check=False).returncode
        ):
            return path
    if os.environ.get("CI"):
        pytest.fail(remedy)
    pytest.skip(remedy)


def free_port() -> int:
    """Find a port that is free now, for a program that cannot choose one itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# The names of Chromium; its path may be in the environment.
CHROMIUM = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")


def node_path(*flags: str) -> str:
    """Find a Node that knows these flags."""
    why = f"no Node on PATH that knows {flags or 'anything'}: install Node 20 or newer"
    return find_program(("node",), why, *flags, "-e", "")


@dataclass(frozen=True)
class CommandResult:
    """The exit status of a command and what it wrote."""

    status: int
    out: str
    err: str


def clean_environment(**more: str) -> dict[str, str]:
    """Return our environment without the variables that chatd reads.

    The rest must stay: coverage measures child processes by it.
    """
    systemd = ("CREDENTIALS_", "JOURNAL_", "LISTEN_", "NOTIFY_", "STATE_", "WATCHDOG_")
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("CHATD_", *systemd))
    }
    return {**kept, **more}


async def run_chatd(
    *words: object, prefix: Iterable[object] = (), **environment: str
) -> CommandResult:
    """Run a chatd command to its end. prefix is a command that runs others."""
    done = await trio.run_process(
        [*map(str, prefix), sys.executable, "-m", "chatd", *map(str, words)],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        cwd=CHECKOUT,
        env=clean_environment(**environment),
    )
    run = CommandResult(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert not MISTAKE.search(run.err), run
    return run


# chatd with a clock whose readings are 10 s apart.
HASTY = """
import itertools, sys, types, chatd, time
clock = itertools.count(0, 10)
chatd.time = types.SimpleNamespace(**{**vars(time), "monotonic": lambda: next(clock)})
sys.exit(chatd.main(sys.argv[1:]))
"""


def run_on_a_terminal(program: str, *words: object) -> tuple[int, str, str]:
    """Run chatd with a terminal as stderr; return status, stdout and what that got."""
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)],
        cwd=CHECKOUT, env=clean_environment(), stdout=subprocess.PIPE, stderr=theirs,
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        # EIO: the process has ended.
        with open(ours, "rb", buffering=0) as terminal, suppress(OSError):
            while part := terminal.read(65536):
                shown += part
        assert process.stdout is not None
        out = process.stdout.read()
        return process.wait(WAIT_SECONDS), out.decode(), shown.decode()


class Process:
    """A database and, between `start` and `end`, the process that serves it."""

    def __init__(self, home: Path, *command: str) -> None:
        home.mkdir(exist_ok=True)
        self.home = home
        self.db = home / "chatd.db"
        self.port = 0
        self.command = command or ("serve", "--db", str(self.db))
        self.flags: tuple[str, ...] = ()
        self.environment: dict[str, str] = {}
        self.said = ""  # stdout of all processes so far
        self.process: subprocess.Popen[str] | None = None
        self.listener: threading.Thread | None = None

    def start(self) -> None:
        """Start the process and block until it prints that it listens."""
        command = [sys.executable, "-m", "chatd", *self.command]
        command += ["--listen", f"127.0.0.1:{self.port}", *self.flags]
        ready = threading.Event()
        with (self.home / "stderr").open("ab") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=CHECKOUT,
                env=clean_environment(TMPDIR=str(self.home), **self.environment),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.listener = threading.Thread(
            target=self._listen, args=(self.process.stdout, ready)
        )
        self.listener.start()
        ready.wait(WAIT_SECONDS)
        found = re.findall(r"(?m)^listening on http://127\.0\.0\.1:(\d+)\b", self.said)
        if not found or self.process.poll() is not None:
            self.end(signal.SIGKILL)
            pytest.fail(f"it did not start: {self.output}")
        self.port = int(found[-1])

    def _listen(self, stdout: IO[str], ready: threading.Event) -> None:
        with stdout:
            for line in stdout:
                self.said += line
                if line.startswith("listening on "):
                    ready.set()
        ready.set()

    def end(self, signum: int = 0, seconds: float = WAIT_SECONDS) -> int:
        """Send a signal, if one is given, and block until the process has ended."""
        assert self.process is not None
        assert self.listener is not None
        if signum:
            self.process.send_signal(signum)
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.listener.join()
            pytest.fail(f"it did not end: {self.output}")
        self.listener.join()
        self.process = None
        return status

    def signal(self, signum: int) -> None:
        assert self.process is not None
        self.process.send_signal(signum)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        return self.said + (self.home / "stderr").read_text("utf-8", "replace")

    @property
    def rss(self) -> int:
        """The resident memory of the process in bytes."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    @property
    def descriptors(self) -> int:
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    # Tokens

    @property
    def secret(self) -> bytes:
        return self.db.with_name("chatd.secret").read_bytes().strip()

    def token(self, user: int = 0, /, *, key: Any = None, **claims: object) -> str:
        """Sign a token for an hour, with `key` or the secret. None omits a claim."""
        now = int(time.time())
        plain: dict[str, object] = {"iat": now, "exp": now + 3600}
        if user:
            plain["sub"] = str(user)
        plain = {k: v for k, v in {**plain, **claims}.items() if v is not None}
        return jwt.encode(plain, key or self.secret, algorithm="HS256")

    @property
    def service(self) -> str:
        return self.token(1, scope="service")

    @property
    def stats_token(self) -> str:
        return self.token(1, scope="stats")


class ServerProcess(Process):
    """A database, its server process, and clients that use it.

    It serves between `begin` and `stop` or `kill`.
    """

    def __init__(self, home: Path, *command: str) -> None:
        super().__init__(home, *command)
        self.open = () if command else NO_RATES  # flags that `serving` adds
        self.up = trio.Event()  # set while the server can be reached
        self.streams: list[trio.SocketStream] = []

    async def begin(self, *flags: str) -> None:
        """Start the process, again on the same port, with these or the same flags."""
        self.flags = flags or self.flags
        await trio.to_thread.run_sync(self.start)
        self.up.set()

    async def ended(self, signum: int = 0, seconds: float = WAIT_SECONDS) -> int:
        self.up = trio.Event()
        return await trio.to_thread.run_sync(self.end, signum, seconds)

    async def kill(self) -> None:
        await self.ended(signal.SIGKILL)

    async def stop(self) -> None:
        """Stop the process with SIGTERM. Its status must be 0 and its log clean."""
        self.hang_up()
        assert await self.ended(signal.SIGTERM) == 0, self.output
        assert not MISTAKE.search(self.output), self.output

    @asynccontextmanager
    async def serving(self, *flags: str) -> AsyncIterator[ServerProcess]:
        """Serve during the block, without rates but with `flags`, then stop."""
        try:
            await self.begin(*self.open, *flags)
            yield self
            if self.process is not None:
                await self.stop()
        finally:
            self.tidy()

    def tidy(self) -> None:
        """Close the clients' connections and kill the process if it still runs."""
        self.hang_up()
        if self.process is not None:
            self.end(signal.SIGKILL)

    def hang_up(self) -> None:
        """Close the clients' connections."""
        for stream in self.streams:
            stream.socket.close()
        self.streams.clear()

    # HTTP

    async def dial(self, receive_buffer: int = 0) -> RawClient:
        sock = trio.socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            with trio.fail_after(WAIT_SECONDS):
                await sock.connect(("127.0.0.1", self.port))
            stream = trio.SocketStream(sock)
        except BaseException:
            sock.close()
            raise
        self.streams.append(stream)
        return RawClient(stream)

    async def ask(
        self,
        method: str,
        target: str,
        token: str = "",
        body: object = None,
        /,
        **headers: str,
    ) -> HttpAnswer:
        """Send a request on a new connection; return the answer."""
        async with await self.dial() as line:
            answer = await line.ask(method, target, body, token=token, **headers)
        assert answer.status in {204, 304} or "content-length" in answer.headers
        return answer

    async def want(
        self,
        status: int,
        request: str,
        token: str = "",
        body: object = None,
        /,
        **headers: str,
    ) -> Any:
        """Send a request ("GET /healthz"); return its JSON. Claim its status."""
        method, target = request.split(" ", 1)
        answer = await self.ask(method, target, token, body, **headers)
        assert answer.status == status, (request, body, answer)
        return answer.json if answer.body else None

    async def raw(self, data: bytes, seconds: float = WAIT_SECONDS) -> bytes:
        """Send bytes and read until the server disconnects, as it must."""
        async with await self.dial() as line:
            with suppress(trio.BrokenResourceError):
                await line.send(data)
            return await line.ends(seconds)

    # WebSocket

    async def knock(
        self, data: bytes, *, receive_buffer: int = 0
    ) -> SocketClient | HttpAnswer:
        """Send a handshake in bytes. Return a client, or the refusal.

        After a refusal the server must disconnect.
        """
        line = await self.dial(receive_buffer)
        await line.send(data)
        answer = await line.answer()
        if answer.status == 101:
            assert answer.headers["sec-websocket-accept"] == ACCEPT_KEY
            assert "sec-websocket-extensions" not in answer.headers
            return SocketClient(line.stream, line.data)
        assert answer.headers["connection"].lower() == "close", answer
        assert not await line.ends(3)
        await line.stream.aclose()
        return answer

    async def peer(
        self,
        who: int | str,
        cursor: str = "",
        /,
        *,
        receive_buffer: int = 0,
        **headers: str,
    ) -> SocketClient:
        """Open the socket of a user, or of this token."""
        handshake = upgrade_bytes(self.socket_path(who, cursor), **headers)
        peer = await self.knock(handshake, receive_buffer=receive_buffer)
        assert isinstance(peer, SocketClient), peer
        peer.hello = await peer.receive("connected")
        return peer

    async def refusal(self, who: int | str, /, **headers: str) -> HttpAnswer:
        """Return the answer to an upgrade that must be refused."""
        answer = await self.knock(upgrade_bytes(self.socket_path(who), **headers))
        assert isinstance(answer, HttpAnswer)
        return answer

    def socket_path(self, who: int | str, cursor: str = "") -> str:
        token = self.token(who) if isinstance(who, int) else who
        query = {"token": token, "cursor": cursor} if cursor else {"token": token}
        return f"/ws/chat?{urlencode(query)}"

    # What most tests begin with

    async def chat(self, *members: int, title: str | None = None) -> int:
        body = {"title": title, "member_ids": members}
        got = await self.want(201, "POST /api/v1/chats", self.service, body)
        return int(got["chat"]["id"])

    async def post(self, chat: int, sender: int, content: str) -> Frame:
        """Send a message as the service; return it as it is stored."""
        body = {"content": content, "sender_id": sender}
        target = f"POST /api/v1/chats/{chat}/messages"
        return dict((await self.want(201, target, self.service, body))["message"])

    async def poll(self, user: int, cursor: str = "", limit: int = 500) -> Any:
        query = f"limit={limit}" + (f"&cursor={quote(cursor)}" if cursor else "")
        return await self.want(200, f"GET /api/v1/events?{query}", self.token(user))

    async def cursor(self, user: int) -> str:
        """Return a cursor after everything that has happened."""
        got = await self.poll(user)
        assert got["events"] == []
        return str(got["cursor"])

    async def events(self, user: int, cursor: str) -> list[Frame]:
        """Return every event of this user after the cursor."""
        events: list[Frame] = []
        more = True
        while more:
            got = await self.poll(user, cursor)
            assert not got["resync"], got
            events += got["events"]
            cursor, more = got["cursor"], got["more"]
        return events

    async def history(self, chat: int, user: int) -> list[Frame]:
        """Return every message of a chat, oldest first. Claim that `n` has no holes."""
        messages: list[Frame] = []
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
        return await self.want(200, target, self.stats_token)


class ProxyProcess(ServerProcess):
    """A proxy process in front of a server. Its clients reach that server."""

    def __init__(self, home: Path, port: int, db: Path) -> None:
        upstream = f"127.0.0.1:{port}"
        super().__init__(home, "proxy", "--db", str(db), "--upstream", upstream)
        self.db = db
        self.open = ("--handshakes=0", "--drain-seconds=2")


async def refuses_connections(server: ServerProcess) -> None:
    """Claim that the server accepts no connection any more."""
    with pytest.raises(ConnectionRefusedError):
        await server.dial()


@asynccontextmanager
async def others_are_served(server: ServerProcess) -> AsyncIterator[None]:
    """Claim that other clients are served before, during and after the block."""
    ann, bob = next(new_users), next(new_users)
    chat = await server.chat(ann, bob)
    before = await server.peer(ann)
    yield
    await before.receives_nothing()
    after = await server.peer(bob)
    await after.send_command("send_message", chat_id=chat, content="still here")
    assert (await before.receive("new_message"))["message"]["content"] == "still here"
    await after.find("ack")
    before.drop()
    after.drop()


# --- much is sent --------------------------------------------------------------------


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

    def __init__(self, server: ServerProcess, user: int, texts: list[tuple[int, str]]):
        self.server, self.user = server, user
        name = f"{user}-{next(new_users)}"
        self.left = deque(
            {"chat_id": chat, "content": text, "client_id": f"{name}-{number}"}
            for number, (chat, text) in enumerate(texts)
        )
        self.acks: dict[str, Frame] = {}  # by client_id

    async def send(self, acked: Progress, in_flight: int = 16) -> None:
        """Send every message, over as many connections as it takes."""
        while self.left:
            with suppress(*LOST):
                peer = await self.server.peer(self.user)
                await self.send_over(peer, acked, in_flight)
                await peer.leave()
            await self.server.up.wait()

    async def send_over(
        self, peer: SocketClient, acked: Progress, in_flight: int = 16
    ) -> None:
        """Send over one connection. If it ends, `left` has what was not acked."""
        waiting = 0
        while self.left:
            for message in itertools.islice(self.left, waiting, in_flight):
                await peer.send_command("send_message", **message)
                waiting += 1
            ack = await peer.find("ack")
            assert ack["client_id"] == self.left.popleft()["client_id"]
            self.acks[ack["client_id"]] = ack
            waiting -= 1
            acked.add()


BULK = "\U0001f600" * 3990  # about 16 KB in UTF-8, within --max-content-chars


async def send_bulk(
    server: ServerProcess, chat: int, user: int, count: int
) -> list[str]:
    """Send `count` large messages, eight in flight; return their texts in order."""
    texts = [f"{i} {BULK}" for i in range(count)]
    peer = await server.peer(user)
    sender = Sender(server, user, [(chat, text) for text in texts])
    await sender.send_over(peer, Progress(), 8)
    await peer.leave()
    return texts
