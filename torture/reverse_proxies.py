#!/usr/bin/env python3
"""chatd behind nginx, Caddy and `chatd proxy`, as docs/operating.md has them.

    .venv/bin/python torture/reverse_proxies.py           # half a minute
    .venv/bin/python torture/reverse_proxies.py --full    # and the real 60 seconds

Status 0: all held, 1: not. It wants Debian's nginx-light and caddy, and the packages
of `pip install -e '.[test]'`. The configurations are cut out of that page; what is
changed in them are ports, addresses of this machine, and folders: all runs in a
temporary one, on free ports of 127.0.0.1, with its own TLS, and ends with the script.

nginx cuts what is silent for 60 s. Without --full both that limit and chatd's ping are
a twelfth of what they are.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

CHECKOUT = Path(__file__).resolve().parent.parent
PAGE = (CHECKOUT / "docs/operating.md").read_text("utf-8")
NAME = "chat.example.org"
PATIENCE = 20.0  # seconds, for what should come at once
ADDRESSES = itertools.cycle(range(1, 255))

# chatd with another ping_seconds, which is no flag.
LAUNCH = """
import dataclasses, sys, chatd
old = chatd.Settings.__dataclass_fields__["ping_seconds"]
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(chatd.Settings):
    ping_seconds: float = dataclasses.field(
        default=float(sys.argv.pop(1)), metadata=old.metadata)
chatd.Settings = Settings
sys.exit(chatd.main())
"""


class Failed(Exception):
    """Something does not hold: what."""


def claim(true: object, sentence: str) -> None:
    """Go on if it holds."""
    if not true:
        raise Failed(sentence)


def page_block(language: str) -> str:
    """Cut the only block of a language out of docs/operating.md."""
    (block,) = re.findall(rf"(?ms)^```{language}\n(.*?)^```$", PAGE)
    return str(block)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def swap(text: str, *changes: tuple[str, str]) -> str:
    """Change what must be there."""
    for old, new in changes:
        claim(old in text, f"docs/operating.md has no {old!r} any more")
        text = text.replace(old, new)
    return text


@contextlib.contextmanager
def running(command: list[str], log: Path, **options: Any) -> Iterator[None]:
    """Run a program inside the block."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, **options)
    try:
        yield
        claim(process.poll() is None, f"{command[0]} ended: {log.read_text()}")
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(port: int, log: Path) -> None:
    """Wait until somebody listens."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            claim(time.monotonic() < end, f"nobody listens: {log.read_text()}")
            time.sleep(0.05)
        else:
            return


class Chatd:
    """A server with a database; it can be restarted on its port."""

    def __init__(self, folder: Path, ping_seconds: float) -> None:
        self.folder = folder
        self.db = folder / "chatd.db"
        self.port = free_port()
        self.ping_seconds = ping_seconds
        self.command = [
            *(sys.executable, "-c", LAUNCH, str(ping_seconds), "serve"),
            *("--db", str(self.db), "--listen", f"127.0.0.1:{self.port}"),
            *("--trusted-proxy", "127.0.0.1", "--handshakes", "0.001/3"),
            *("--commands", "0"),
        ]

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        log = self.folder / "logs" / "serve"
        with running(self.command, log, cwd=CHECKOUT):
            wait_for(self.port, log)
            yield

    def token(self, user_id: int, **claims: object) -> str:
        secret = self.db.with_name("chatd.secret").read_text("ascii").strip()
        now = int(time.time())
        return jwt.encode(
            {"user_id": user_id, "iat": now, "exp": now + 3600} | claims,
            secret,
            "HS256",
        )


@dataclasses.dataclass
class Front:
    """What stands before chatd: where, and how to speak TLS to it."""

    name: str
    port: int
    root: Path | None = None  # the certificate that signed its own

    @property
    def host(self) -> str:
        return f"{NAME}:{self.port}"

    @property
    def origin(self) -> str:
        return f"http{'s' if self.root else ''}://{self.host}"

    def dial(self, address: str) -> socket.socket:
        """Connect from one of this machine's addresses; verify who answers."""
        where = ("127.0.0.1", self.port)
        sock = socket.create_connection(where, PATIENCE, source_address=(address, 0))
        if self.root is None:
            return sock
        context = ssl.create_default_context(cafile=str(self.root))
        return context.wrap_socket(sock, server_hostname=NAME)

    def ask(
        self,
        target: str,
        token: str = "",
        body: object = None,
        address: str = "127.0.0.9",
        **headers: str,
    ) -> tuple[int, bytes]:
        """Send one request; its status and body."""
        line = http.client.HTTPConnection(NAME, self.port, timeout=PATIENCE)
        line.sock = self.dial(address)
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            fields["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body)
        with contextlib.closing(line):
            line.request("GET" if body is None else "POST", target, data, fields)
            answer = line.getresponse()
            return answer.status, answer.read()

    def socket(self, token: str, cursor: str = "") -> ClientConnection:
        """Open a socket with a page's Origin, from an address of its own."""
        query = f"token={token}" + (f"&cursor={cursor}" if cursor else "")
        return connect(
            f"ws://{self.host}/ws/chat?{query}",
            sock=self.dial(f"127.0.1.{next(ADDRESSES)}"),
            origin=Origin(self.origin),
            proxy=None,
            open_timeout=PATIENCE,
            ping_interval=None,  # only chatd pings
        )


def hear(peer: ClientConnection, kind: str) -> dict[str, Any]:
    """Get the next message of a type, past any others."""
    while True:
        message: dict[str, Any] = json.loads(peer.recv(PATIENCE))
        if message["type"] == kind:
            return message


# --- the three of them ---------------------------------------------------------------


@contextlib.contextmanager
def behind_nginx(folder: Path, chatd: Chatd, limit: int) -> Iterator[Front]:
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    claim(nginx, "there is no nginx: apt-get install nginx-light")
    port, logs = free_port(), folder / "logs"
    key, root = folder / "privkey.pem", folder / "fullchain.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
         "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj", f"/CN={NAME}",
         "-addext", f"subjectAltName=DNS:{NAME}", "-keyout", key, "-out", root],
        check=True, capture_output=True,
    )  # fmt: skip
    site = swap(
        page_block("nginx"),
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("127.0.0.1:8086", f"127.0.0.1:{chatd.port}"),
        (f"/etc/letsencrypt/live/{NAME}", str(folder)),
        ("/var/log/nginx", str(logs)),
        ("proxy_read_timeout 60s", f"proxy_read_timeout {limit}s"),
    )
    scratch = "".join(
        f"{what}_temp_path {folder}/{what};\n"
        for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log {logs}/nginx crit;\n"
        f"events {{}}\nhttp {{\n{scratch}{site}}}\n"
    )
    command = [str(nginx), "-p", str(folder), "-c", str(config), "-e", f"{logs}/nginx"]
    with running(command, logs / "nginx.out"):
        wait_for(port, logs / "nginx.out")
        yield Front("nginx", port, root)


@contextlib.contextmanager
def behind_caddy(folder: Path, chatd: Chatd, _limit: int) -> Iterator[Front]:
    caddy = shutil.which("caddy")
    claim(caddy, "there is no Caddy: apt-get install caddy")
    port, logs = free_port(), folder / "logs"
    own = (
        "admin off\n\tlocal_certs\n\tskip_install_trust\n\tdefault_bind 127.0.0.1\n\t"
        f"auto_https disable_redirects\n\tstorage file_system {folder}/caddy\n"
    )
    config = folder / "Caddyfile"
    text = swap(
        page_block("caddy"),
        (f"\n{NAME} {{", f"\nhttps://{NAME}:{port} {{"),
        ("127.0.0.1:8086", f"127.0.0.1:{chatd.port}"),
        ("/var/log/caddy", str(logs)),
    )
    config.write_text(text.replace("{\n", "{\n\t" + own, 1))
    home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    command = [str(caddy), "run", "--adapter", "caddyfile", "--config", str(config)]
    log = logs / "caddy.out"
    with running(command, log, env={**os.environ, **home}):
        wait_for(port, log)
        root = folder / "caddy/pki/authorities/local/root.crt"
        end = time.monotonic() + PATIENCE
        while not (root.exists() and "certificate obtained" in log.read_text()):
            claim(
                time.monotonic() < end, f"Caddy has no certificate: {log.read_text()}"
            )
            time.sleep(0.05)
        yield Front("Caddy", port, root)


@contextlib.contextmanager
def behind_proxy(folder: Path, chatd: Chatd, _limit: int) -> Iterator[Front]:
    port, log = free_port(), folder / "logs/proxy"
    command = [
        *(sys.executable, "-m", "chatd", "proxy", "--listen", f"127.0.0.1:{port}"),
        *("--upstream", f"127.0.0.1:{chatd.port}", "--db", str(chatd.db)),
        *("--log-level", "debug", "--handshakes", "0"),
    ]
    with running(command, log, cwd=CHECKOUT):
        wait_for(port, log)
        yield Front("chatd proxy", port)


# --- what must hold ------------------------------------------------------------------


def page(front: Front, chatd: Chatd) -> str:
    """The page loads, and its own Origin passes; another does not."""
    size = 0
    for target in ("/", "/web/app.js", "/web/chat-websocket.js", "/web/style.css"):
        status, body = front.ask(target, Origin=front.origin)
        claim(status == 200, f"GET {target}: {status}")
        size += len(body)
    status, _ = front.ask("/api/v1/me", chatd.token(6), Origin=front.origin)
    claim(status == 200, f"the page's own Origin: {status}")
    forged = {"Origin": "https://evil.example", "X_Forwarded_Host": "evil.example"}
    status, _ = front.ask("/api/v1/me", chatd.token(6), **forged)
    claim(status == 403, f"another Origin: {status}")
    return f"the page, {size} bytes, with its own Origin only"


def conversation(front: Front, chatd: Chatd) -> str:
    """A ticket, a socket, a message; and how long a round trip takes."""
    body = {"title": "T", "member_ids": [6, 7]}
    service = chatd.token(1, scope="service")
    status, made = front.ask("/api/v1/chats", service, body)
    claim(status == 201, f"POST /api/v1/chats: {status} {made!r}")
    chat = json.loads(made)["chat"]["id"]
    _, ticket = front.ask("/api/v2/ws-token", chatd.token(6))
    straight = Front("straight", chatd.port)
    trips = {}
    with front.socket(chatd.token(7)) as other:
        hear(other, "connected")
        with front.socket(json.loads(ticket)["token"]) as peer:
            hear(peer, "connected")
            say = {"type": "send_message", "chat_id": chat, "content": "Привет!"}
            peer.send(json.dumps(say))
            hear(peer, "ack")
            heard = hear(other, "new_message")["message"]["content"]
            claim(heard == "Привет!", f"heard {heard!r}")
    for where in (straight, front):
        with where.socket(chatd.token(6)) as peer:
            hear(peer, "connected")
            taken = []
            for _ in range(300):
                began = time.perf_counter()
                peer.send('{"type": "ping"}')
                hear(peer, "pong")
                taken.append(time.perf_counter() - began)
            trips[where.name] = statistics.median(taken) * 1e6
    trip, shortest = trips[front.name], trips[straight.name]
    return (
        f"a ticket, two sockets, a message; a round trip of {trip:.0f} us, "
        f"{shortest:.0f} without it"
    )


def addresses(front: Front, _chatd: Chatd) -> str:
    """Each client has a bucket of its own, whatever he says he is."""
    got: dict[str, list[int]] = {"127.0.0.2": [], "127.0.0.3": []}
    for number in range(5):
        for address, statuses in got.items():
            forged = {"X_Forwarded_For": f"6.6.6.{number}", "Forwarded": "for=6.6.6.6"}
            statuses.append(front.ask("/api/v1/me", address=address, **forged)[0])
    claim(
        all(found == [401, 401, 401, 429, 429] for found in got.values()),
        f"two clients and their 401s: {got}",
    )
    return "two clients have a bucket each, and forging no more"


def restart(front: Front, chatd: Chatd, serving: contextlib.ExitStack) -> str:
    """chatd restarts behind it: 1012, 502 meanwhile, and the cursor goes on."""
    with front.socket(chatd.token(6)) as peer:
        cursor = hear(peer, "connected")["cursor"]
        serving.close()
        with contextlib.suppress(ConnectionClosed):
            hear(peer, "the end")
        claim(peer.close_code == 1012, f"a restart closed a socket: {peer.close_code}")
    status, _ = front.ask("/healthz")
    claim(status == 502, f"chatd is away: {status}")
    try:  # what is said of this in the log must not have the token
        with front.socket(chatd.token(6)):
            raise Failed("a socket opened, and chatd is away")
    except InvalidStatus as no:
        claim(no.response.status_code == 502, f"a socket meanwhile: {no}")
    began = time.monotonic()
    serving.enter_context(chatd.serving())
    with front.socket(chatd.token(6), cursor) as again:
        resume = hear(again, "connected")["resume"]
        claim(resume == "live", f"resume after a restart: {resume}")
    took = time.monotonic() - began
    return f"a restart: 1012, then 502, then live again {took:.1f} s after its start"


def silence(front: Front, chatd: Chatd, began: float, limit: int) -> str:
    """Nothing is cut that only listens."""
    with front.socket(chatd.token(6)) as peer:
        hear(peer, "connected")
        time.sleep(max(0.0, 2.2 * limit - (time.monotonic() - began)))
        peer.send('{"type": "ping"}')
        hear(peer, "pong")
    return f"a silent socket outlived the limit of {limit} s by chatd's ping"


def cut(front: Front, chatd: Chatd, limit: int) -> str:
    """The limit is real: without a ping nginx cuts."""
    with front.socket(chatd.token(6)) as peer:
        hear(peer, "connected")
        began = time.monotonic()
        with contextlib.suppress(ConnectionClosed):
            peer.recv(3 * limit)
        took = time.monotonic() - began
    claim(limit - 1 < took < 2 * limit, f"without a ping nginx cut after {took:.1f} s")
    return f"and without a ping it is cut after {took:.1f} s"


def logs(folder: Path) -> str:
    """No token in any log, and the path in one."""
    lines = 0
    for path in sorted(folder.iterdir()):
        text = path.read_text("utf-8", "replace")
        found = re.search(r".*(eyJ\S{0,9}).*", text)
        claim(not found, f"a token in {path.name}: {found and found[0][:300]}")
        lines += text.count("/ws/chat")
    claim(lines > 3, "no log tells of /ws/chat")
    return f"{lines} log lines about sockets, none with a token"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--full", action="store_true", help="60 s and 25 s as they are")
    full = parser.parse_args().full
    limit, ping = (60, 25.0) if full else (5, 25 / 12)
    for behind in (behind_nginx, behind_caddy, behind_proxy):
        name = behind.__name__.removeprefix("behind_")
        with tempfile.TemporaryDirectory(prefix="chatd-") as text:
            folder = Path(text)
            (folder / "logs").mkdir()
            chatd = Chatd(folder, ping)
            try:
                with contextlib.ExitStack() as serving:
                    serving.enter_context(chatd.serving())
                    with behind(folder, chatd, limit) as front:
                        for found in (
                            page(front, chatd),
                            conversation(front, chatd),
                            addresses(front, chatd),
                            silence(front, chatd, time.monotonic(), limit),
                            restart(front, chatd, serving),
                        ):
                            print(f"{name}: {found}", flush=True)
                    if behind is behind_nginx:
                        serving.close()
                        mute = Chatd(folder, 3600.0)
                        serving.enter_context(mute.serving())
                        with behind(folder, mute, limit) as front:
                            print(f"{name}: {cut(front, mute, limit)}")
                print(f"{name}: {logs(folder / 'logs')}", flush=True)
            except Failed as error:
                print(f"{name}: FAILED: {error}", flush=True)
                return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
