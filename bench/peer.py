"""The peers: how each is built, how it is started, and what else it does.

Each is set up as its documentation advises for speed. The builder of a peer whose
toolchain or package is missing raises Missing, with the command that installs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jwt

HERE = Path(__file__).resolve().parent
BUILD = HERE / ".build"
SECRET = "the secret of this benchmark, known to all peers"
SERVER_CORE, LOAD_CORE = 0, 1
CFLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra")
# Debian installs the sources of its Go packages there.
GO_ENVIRONMENT = {"GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOFLAGS": ""}
UNLIMITED = (
    *("--sends", "0", "--commands", "0", "--typing", "0", "--requests", "0"),
    *("--handshakes", "0", "--receive-bytes", "0", "--max-connections", "15000"),
)


class Missing(Exception):
    """This peer cannot be run here; the text says what is missing."""


@functools.cache
def token(user_id: int, scope: str = "") -> str:
    """Make a token that is valid for every peer that checks tokens."""
    claims = {"user_id": user_id, "scope": scope, "exp": int(time.time()) + 86_400}
    return jwt.encode(claims, SECRET, "HS256")


def output(*command: str, **environment: str) -> str:
    """Run a short command; return what it printed. Raises Missing if it fails."""
    done = subprocess.run(
        command,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise Missing(f"{command[0]}: {done.stdout.strip() or done.returncode}")
    return done.stdout


def need(program: str, package: str) -> str:
    """Find a program. Raises Missing, with the Debian package that has it."""
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        raise Missing(f"no {program}: apt install {package}")
    return path


# --- building -------------------------------------------------------------------------

Built = tuple[list[str], str]  # the command, and the version


def build_c(source: Path) -> str:
    """Compile a C program; return its path."""
    BUILD.mkdir(exist_ok=True)
    program = BUILD / source.stem
    output(need("gcc", "gcc libc6-dev"), *CFLAGS, "-o", str(program), str(source))
    return str(program)


def build_chatd(checkout: Path = HERE.parent) -> Built:
    """Use the chatd.py of a checkout, with the Python that runs this program."""
    command = [sys.executable, str(checkout / "chatd.py")]
    version = output(*command, "--version").split()[-1]
    libraries = python_versions("trio", "trio-websocket", "msgspec")
    return command, f"{version}, {libraries}"


def build_floor() -> Built:
    """Compile the C floor."""
    version = output("gcc", "--version") if shutil.which("gcc") else ""
    return [build_c(HERE / "peers/floor.c")], version.partition("\n")[0]


def build_go() -> Built:
    """Compile the Go hub with Debian's gorilla/websocket."""
    go = need("go", "golang-go golang-github-gorilla-websocket-dev")
    library = GO_ENVIRONMENT["GOPATH"] + "/src/github.com/gorilla/websocket"
    if not Path(library).is_dir():
        raise Missing("no gorilla: apt install golang-github-gorilla-websocket-dev")
    BUILD.mkdir(exist_ok=True)
    program = str(BUILD / "hub")
    cache = str(BUILD / "gocache")
    source = str(HERE / "peers/hub.go")
    output(go, "build", "-o", program, source, GOCACHE=cache, **GO_ENVIRONMENT)
    package = "golang-github-gorilla-websocket-dev"
    gorilla = output("dpkg-query", "-W", "-f", "${Version}", package)
    version = output(go, "env", "GOVERSION", GOCACHE=cache).strip()
    return [program], f"{version}, gorilla/websocket {gorilla}"


def build_node() -> Built:
    """Install ws and bufferutil from npm."""
    node, npm = need("node", "nodejs"), need("npm", "npm")
    folder = BUILD / "node"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "node_modules/ws").is_dir():
        output(npm, "install", "--silent", "--prefix", str(folder), "ws", "bufferutil")
    shutil.copy(HERE / "peers/node_ws.js", folder)
    listed = (folder / "node_modules/ws/package.json").read_text()
    version = f"{output(node, '--version').strip()}, ws {json.loads(listed)['version']}"
    return [node, str(folder / "node_ws.js")], version


def python_versions(*packages: str) -> str:
    """Return the versions of Python and of these packages. Raises Missing."""
    try:
        found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    except importlib.metadata.PackageNotFoundError as error:
        raise Missing(f"no {error.name}: pip install -e '.[bench]'") from None
    python = ".".join(map(str, sys.version_info[:3]))
    return f"Python {python}, {', '.join(found)}"


def python_peer(name: str, *packages: str) -> Callable[[], Built]:
    """Make the builder of a peer in peers/ that is a Python program."""

    def build() -> Built:
        command = [sys.executable, str(HERE / "peers" / f"py_{name}.py")]
        return command, python_versions(*packages)

    return build


def build_prosody() -> Built:
    """Use Debian's Prosody."""
    program = need("prosody", "prosody lua-dbi-sqlite3")
    need_package("lua-dbi-sqlite3")
    return [program], f"Prosody {need_package('prosody')}"


def build_mosquitto() -> Built:
    """Use Debian's Mosquitto."""
    program = need("mosquitto", "mosquitto")
    return [program], f"Mosquitto {need_package('mosquitto')}"


def need_package(package: str) -> str:
    """Return the version of a Debian package. Raises Missing."""
    try:
        return output("dpkg-query", "-W", "-f", "${Version}", package)
    except Missing:
        raise Missing(f"apt install {package}") from None


# --- the table of peers ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Peer:
    """A server to measure. `does` tells what it does beside passing messages on."""

    name: str
    label: str
    does: str
    build: Callable[[], Built]
    protocol: str = "ws"
    # Bytes of text in a message. With them a delivery is about as long in every
    # protocol: a peer that passes on what it receives gets 200.
    content: int = 200
    stores: bool = False  # a message is on disk before anybody receives it
    config: str = ""  # a template in peers/
    config_flag: str = ""  # the option that names the file made from it
    keeps_alive: bool = False  # pings idle connections within half a minute


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "chatd",
            "chatd",
            "token, membership, order, replay; on disk before the ack",
            build_chatd,
            protocol="chatd",
            content=64,
            stores=True,
            keeps_alive=True,
        ),
        Peer("floor", "C, epoll", "nothing else: the floor", build_floor),
        Peer("go", "Go, gorilla's hub", "token; stores nothing", build_go),
        Peer("node", "Node, ws", "token; stores nothing", build_node),
        Peer(
            "websockets",
            "Python, websockets",
            "token; stores nothing",
            python_peer("websockets", "websockets", "uvloop"),
            keeps_alive=True,
        ),
        Peer(
            "picows",
            "Python, picows",
            "no token; stores nothing",
            python_peer("picows", "picows", "uvloop"),
        ),
        Peer(
            "trio",
            "Python, trio-websocket, naive",
            "no token; stores nothing",
            python_peer("trio", "trio", "trio-websocket"),
        ),
        Peer(
            "starlette",
            "Python, Starlette + SQLite",
            "token; a commit for each message; no replay",
            python_peer("starlette", "starlette", "uvicorn", "uvloop", "httptools"),
            content=64,
            stores=True,
            keeps_alive=True,
        ),
        Peer(
            "prosody",
            "Prosody, a room's archive",
            "XMPP; archive in SQLite",
            build_prosody,
            protocol="xmpp",
            content=64,
            config="prosody.cfg.lua",
            config_flag="--config",
        ),
        Peer(
            "mosquitto",
            "Mosquitto, QoS 0",
            "MQTT; stores nothing",
            build_mosquitto,
            protocol="mqtt",
            config="mosquitto.conf",
            config_flag="-c",
        ),
    )
}


def earlier_chatd(checkout: Path) -> Peer:
    """Make a peer of the chatd.py in another checkout."""
    # A server runs in the folder of its data, so the path must be absolute.
    build = functools.partial(build_chatd, checkout.resolve())
    return dataclasses.replace(
        PEERS["chatd"], name="before", label="before", build=build
    )


# --- a running server -----------------------------------------------------------------


def free_port() -> int:
    """Find a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A running peer, pinned to its core. Its data are in `folder`."""

    def __init__(self, peer: Peer, command: list[str], folder: Path) -> None:
        self.peer = peer
        self.command = command
        self.folder = folder
        self.port = free_port()
        self.start_seconds = 0.0
        self.start_cpu_seconds = 0.0

    def start(self, *more: str) -> None:
        """Start it, and wait until it accepts connections. Raises Missing."""
        begin = time.perf_counter()
        self.process = subprocess.Popen(
            ["taskset", "-c", str(SERVER_CORE), *self._arguments(), *more],
            cwd=self.folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / "errors").open("ab"),
        )
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
                break
            if self.process.poll() is not None or time.perf_counter() - begin > 30:
                errors = (self.folder / "errors").read_text()
                raise Missing(f"it does not start: {errors[-300:]}")
            time.sleep(0.001)
        self.start_seconds = time.perf_counter() - begin
        self.start_cpu_seconds = self.cpu_seconds()

    def _arguments(self) -> list[str]:
        port = str(self.port)
        if self.peer.protocol == "chatd":
            (self.folder / "secret").write_text(SECRET)
            (self.folder / "secret").chmod(0o600)
            where = ("--listen", f"127.0.0.1:{port}", "--db", "chatd.db")
            own = ("--secret-file", "secret", "--log-level", "warning")
            return [*self.command, "serve", *where, *own, *UNLIMITED]
        if not self.peer.config:
            return [*self.command, port]
        text = (HERE / "peers" / self.peer.config).read_text()
        config = self.folder / self.peer.config
        values = {"PORT": port, "DATA": str(self.folder)}
        config.write_text(string.Template(text).safe_substitute(values))
        return [*self.command, self.peer.config_flag, str(config)]

    def _environment(self) -> dict[str, str]:
        own = {
            "BENCH_SECRET": SECRET,
            "BENCH_DB": str(self.folder / "starlette.db"),
            "NODE_ENV": "production",
        }
        return {**os.environ, **own}

    def stop(self) -> float:
        """Stop it as an operator would; return the seconds that it took."""
        begin = time.perf_counter()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return time.perf_counter() - begin

    @property
    def pids(self) -> list[int]:
        """The process and its descendants: their CPU and memory are measured."""
        found = [self.process.pid]
        for pid in found:
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        return found

    def cpu_seconds(self) -> float:
        """Return the CPU time so far, by the kernel's clock of each process."""
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self.pids)

    def settle(self) -> None:
        """Wait until it is idle: until it uses at most 5 ms of CPU in 0.2 s."""
        deadline = time.monotonic() + 60
        before = -math.inf
        while (now := self.cpu_seconds()) - before > 0.005:
            if time.monotonic() > deadline:
                raise Missing("it does not become idle")
            before = now
            time.sleep(0.2)

    def memory_bytes(self) -> int:
        """Return the proportional set size, which counts no shared page twice."""
        total = 0
        for pid in self.pids:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        return total

    def call(self, method: str, path: str, body: object, bearer: str) -> Any:
        """Send a request to chatd's HTTP API; return the JSON of its answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Bearer {bearer}", "Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def seat(self, sizes: Sequence[int]) -> Path:
        """Put users 1, 2, 3, ... into rooms of these sizes, one after another.

        Returns a file for the load: each user's line has its target and its room.
        """
        file = self.folder / f"seats-{len(sizes)}"
        last = 0
        with file.open("w") as out:
            for place, size in enumerate(sizes):
                members = list(range(last + 1, last + size + 1))
                last += size
                room = str(place + 1)
                path = f"/{room}"
                if self.peer.protocol == "chatd":
                    path = "/ws/chat"
                    room = str(self._make_chat(members))
                for user in members:
                    out.write(f"{path}?token={token(user)} {room}\n")
        return file

    def _make_chat(self, members: list[int]) -> int:
        body = {"member_ids": members}
        answer = self.call("POST", "/api/v1/chats", body, token(1, "service"))
        return int(answer["chat"]["id"])


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Make a folder for a server's data, on the disk of this checkout."""
    BUILD.mkdir(exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="data-", dir=BUILD))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextlib.contextmanager
def running(peer: Peer, command: list[str]) -> Iterator[Server]:
    """Run a peer on fresh data."""
    with folder() as path:
        server = Server(peer, command, path)
        server.start()
        try:
            yield server
        finally:
            if server.process.poll() is None:
                server.stop()


def raise_file_limit() -> None:
    """Let the servers and the load open as many files as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
