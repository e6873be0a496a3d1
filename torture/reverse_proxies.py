#!/usr/bin/env python3
"""chatd behind nginx, Caddy and `chatd proxy`, as in docs/operating.md.

    .venv/bin/python torture/reverse_proxies.py           # a minute
    .venv/bin/python torture/reverse_proxies.py --full    # and the real 60 seconds

The exit status is 1 if a check fails. The script needs Debian's nginx-light, caddy,
chromium and libatomic1, and the packages of `pip install -e '.[test]'`. It takes the
configurations from that page, for `/`, under a path, over a Unix socket and for two
communities, and changes only ports, addresses and folders. The two communities have
what systemd would give them: the command, the socket and the folder of chatd@.service.
Everything runs in a temporary folder, on free ports of 127.0.0.1, with certificates of
its own, and ends with the script.

nginx cuts a connection that is silent for 60 s. Without --full that limit and chatd's
ping interval are a twelfth of their values.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import grp
import gzip
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jwt
from playwright.sync_api import expect, sync_playwright
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

CHECKOUT = Path(__file__).resolve().parent.parent
PAGE = (CHECKOUT / "docs/operating.md").read_text("utf-8")
NAME = "chat.example.org"
TIMEOUT_SECONDS = 20.0  # the longest wait for an answer that should come at once
ADDRESSES = itertools.cycle(range(1, 255))

# Runs chatd with another ping_seconds, which has no flag.
LAUNCH = """
import sys, chatd
chatd.PING_SECONDS = float(sys.argv.pop(1))
sys.exit(chatd.main())
"""


class Failed(Exception):
    """A check failed: a sentence about it."""


def check(condition: object, failure: str) -> None:
    """Raise Failed with this sentence unless the condition holds."""
    if not condition:
        raise Failed(failure)


# The part of the page about a second community has configurations of its own.
ONE, _, MORE = PAGE.partition("\n## A second community\n")


def page_blocks(language: str, text: str = ONE) -> tuple[str, str]:
    """The blocks of this language in docs/operating.md: for `/`, and for a path.

    For a second community: the lines of all sites, and the sites.
    """
    whole, change = re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)
    return whole, change


def page_lines(word: str, text: str = ONE) -> list[str]:
    """The lines for a Unix socket in the text of the page, by their first word."""
    return re.findall(rf"`({word} \S*unix\S+)`", text)


def free_port() -> int:
    """A port on which no program listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def replace(text: str, *changes: tuple[str, str]) -> str:
    """Replace texts, each of which must be there."""
    for old, new in changes:
        check(old in text, f"docs/operating.md has no {old!r} any more")
        text = text.replace(old, new)
    return text


@contextlib.contextmanager
def running(command: list[str], log: Path, **options: Any) -> Iterator[None]:
    """Run a program during the block; it must not end before."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, **options)
    try:
        yield
        check(process.poll() is None, f"{command[0]} ended: {log.read_text()}")
    finally:
        process.terminate()
        try:
            process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(port: int, log: Path) -> None:
    """Wait until a program listens on the port."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            check(
                time.monotonic() < end, f"nothing listens on {port}: {log.read_text()}"
            )
            time.sleep(0.05)
        else:
            return


def sign(secret: Path, user_id: int, **claims: object) -> str:
    """Sign a token with the secret in this file."""
    now = int(time.time())
    claims = {"user_id": user_id, "iat": now, "exp": now + 3600} | claims
    return jwt.encode(claims, secret.read_text("ascii").strip(), "HS256")


@dataclasses.dataclass(frozen=True)
class Way:
    """How a proxy leads to chatd: under which path, and over a Unix socket or not."""

    path: str = ""  # or /chat
    unix: bool = False

    def __str__(self) -> str:
        return (self.path and f" at {self.path}/") + " over unix" * self.unix


WAYS = (Way(), Way("/chat"), Way(unix=True), Way("/chat", unix=True))


class Chatd:
    """A server with a database; it can be restarted on its port and its Unix socket."""

    def __init__(self, folder: Path, ping_seconds: float) -> None:
        self.folder = folder
        self.db = folder / "chatd.db"
        self.port = free_port()
        self.ping_seconds = ping_seconds
        # nginx reaches it by its group: its workers do not run as root.
        self.socket = folder / "run/chatd.sock"
        folder.chmod(0o711)
        if not self.socket.parent.exists():
            self.socket.parent.mkdir(0o750)
            if os.geteuid() == 0:
                group = grp.getgrnam("www-data").gr_gid
                os.chown(self.socket.parent, -1, group)
        self.command = [
            *(sys.executable, "-c", LAUNCH, str(ping_seconds), "serve"),
            *("--db", str(self.db), "--listen", f"127.0.0.1:{self.port}"),
            *("--listen", f"unix:{self.socket}"),
            *("--trusted-proxy", "127.0.0.1", "--handshakes", "0.001/3"),
            *("--commands", "0"),
        ]

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Run the server during the block."""
        log = self.folder / "logs" / "serve"
        with running(self.command, log, cwd=CHECKOUT):
            wait_for(self.port, log)
            yield

    def token(self, user_id: int, **claims: object) -> str:
        """Sign a token, as `chatd token` does."""
        return sign(self.db.with_name("chatd.secret"), user_id, **claims)


@dataclasses.dataclass
class Endpoint:
    """A port that leads to chatd: a reverse proxy's, or chatd's own."""

    name: str
    port: int
    root: Path | None = None  # with TLS: the root of the certificate
    path: str = ""  # before chatd's own
    domain: str = NAME

    @property
    def host(self) -> str:
        return f"{self.domain}:{self.port}"

    @property
    def origin(self) -> str:
        return f"http{'s' if self.root else ''}://{self.host}"

    def connect(self, address: str) -> socket.socket:
        """Connect from one of this machine's addresses; verify the certificate."""
        where = ("127.0.0.1", self.port)
        sock = socket.create_connection(
            where, TIMEOUT_SECONDS, source_address=(address, 0)
        )
        if self.root is None:
            return sock
        context = ssl.create_default_context(cafile=str(self.root))
        # In 1.3 a ticket follows the handshake, and a thread of websockets may read it
        # while another writes the request: the ssl of Python 3.11 does not lock them.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        return context.wrap_socket(sock, server_hostname=self.domain)

    def request(
        self,
        target: str,
        token: str = "",
        body: object = None,
        address: str = "127.0.0.9",
        **headers: str,
    ) -> tuple[int, bytes]:
        """Send one request; return the status and body of the answer."""
        line = http.client.HTTPConnection(
            self.domain, self.port, timeout=TIMEOUT_SECONDS
        )
        line.sock = self.connect(address)
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            fields["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body)
        with contextlib.closing(line):
            method = "GET" if body is None else "POST"
            line.request(method, self.path + target, data, fields)
            answer = line.getresponse()
            return answer.status, answer.read()

    def socket(self, token: str, cursor: str = "") -> ClientConnection:
        """Open a WebSocket with the page's Origin, from another address each time."""
        query = f"token={token}" + (f"&cursor={cursor}" if cursor else "")
        return connect(
            f"ws://{self.host}{self.path}/ws/chat?{query}",
            sock=self.connect(f"127.0.1.{next(ADDRESSES)}"),
            origin=Origin(self.origin),
            proxy=None,
            open_timeout=TIMEOUT_SECONDS,
            ping_interval=None,  # only chatd sends pings
        )


def receive(peer: ClientConnection, kind: str) -> dict[str, Any]:
    """Receive the next message of a type; skip others."""
    while True:
        message: dict[str, Any] = json.loads(peer.recv(TIMEOUT_SECONDS))
        if message["type"] == kind:
            return message


# --- the three proxies ---------------------------------------------------------------


def new_certificate(folder: Path, name: str) -> Path:
    """Make a certificate and its key in the folder; return the certificate."""
    key, root = folder / "privkey.pem", folder / "fullchain.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
         "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj", f"/CN={name}",
         "-addext", f"subjectAltName=DNS:{name}", "-keyout", key, "-out", root],
        check=True, capture_output=True,
    )  # fmt: skip
    return root


@contextlib.contextmanager
def nginx(folder: Path, site: str, port: int) -> Iterator[None]:
    """Run nginx with these servers, one of which listens on the port."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    check(program, "there is no nginx: apt-get install nginx-light")
    scratch = "".join(
        f"{what}_temp_path {folder}/{what};\n"
        for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    logs = folder / "logs"
    config.write_text(
        "user www-data;\n"  # as in Debian's nginx.conf
        f"daemon off; pid {folder}/nginx.pid; error_log {logs}/nginx crit;\n"
        f"events {{}}\nhttp {{\n{scratch}{site}}}\n"
    )
    command = [
        str(program),
        "-p",
        str(folder),
        "-c",
        str(config),
        "-e",
        f"{logs}/nginx",
    ]
    with running(command, logs / "nginx.out"):
        wait_for(port, logs / "nginx.out")
        yield


@contextlib.contextmanager
def behind_nginx(
    folder: Path, chatd: Chatd, limit: int, way: Way
) -> Iterator[Endpoint]:
    """Run nginx in front of chatd. limit: its proxy_read_timeout, in seconds."""
    port, logs, root = free_port(), folder / "logs", new_certificate(folder, NAME)
    site, change = page_blocks("nginx")
    first, passed = "    location / {\n", "proxy_pass http://127.0.0.1:8086"
    if way.path:
        site = replace(site, (f"{first}        {passed};\n", change))
    if way.unix:
        plain, under = page_lines("proxy_pass")
        passed = f"{passed}/;" if way.path else f"{passed};"
        site = replace(site, (passed, under if way.path else plain))
        to_chatd = ("/run/chatd.sock", str(chatd.socket))
    else:
        to_chatd = ("127.0.0.1:8086", f"127.0.0.1:{chatd.port}")
    site = replace(
        site,
        ("listen 443", f"listen 127.0.0.1:{port}"),
        to_chatd,
        (f"/etc/letsencrypt/live/{NAME}", str(folder)),
        ("/var/log/nginx", str(logs)),
        ("proxy_read_timeout 60s", f"proxy_read_timeout {limit}s"),
    )
    with nginx(folder, site, port):
        yield Endpoint("nginx", port, root, way.path)


@contextlib.contextmanager
def behind_caddy(
    folder: Path, chatd: Chatd, _limit: int, way: Way
) -> Iterator[Endpoint]:
    """Run Caddy in front of chatd."""
    program = shutil.which("caddy")
    check(program, "there is no Caddy: apt-get install caddy")
    port, logs = free_port(), folder / "logs"
    own = (
        "admin off\n\tlocal_certs\n\tskip_install_trust\n\tdefault_bind 127.0.0.1\n\t"
        f"auto_https disable_redirects\n\tstorage file_system {folder}/caddy\n"
    )
    config = folder / "Caddyfile"
    text, change = page_blocks("caddy")
    passed, to_chatd = "reverse_proxy 127.0.0.1:8086", f"127.0.0.1:{chatd.port}"
    if way.path:
        text = replace(text, (f"\t{passed}\n", change))
    if way.unix:
        (line,) = page_lines("reverse_proxy")
        text = replace(text, (passed, line))
    text = replace(
        text,
        (f"\n{NAME} {{", f"\nhttps://{NAME}:{port} {{"),
        ("/run/chatd.sock", str(chatd.socket))
        if way.unix
        else ("127.0.0.1:8086", to_chatd),
        ("/var/log/caddy", str(logs)),
    )
    config.write_text(text.replace("{\n", "{\n\t" + own, 1))
    home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    command = [str(program), "run", "--adapter", "caddyfile", "--config", str(config)]
    log = logs / "caddy.out"
    with running(command, log, env={**os.environ, **home}):
        wait_for(port, log)
        root = folder / "caddy/pki/authorities/local/root.crt"
        caddy = Endpoint("Caddy", port, root, way.path)
        end = time.monotonic() + TIMEOUT_SECONDS
        while True:  # it listens before it has a certificate
            try:
                caddy.connect("127.0.0.1").close()
                break
            except (FileNotFoundError, ssl.SSLError):
                said = log.read_text()
                check(time.monotonic() < end, f"Caddy has no certificate: {said}")
                time.sleep(0.05)
        yield caddy


@contextlib.contextmanager
def behind_proxy(
    folder: Path, chatd: Chatd, _limit: int, way: Way
) -> Iterator[Endpoint]:
    """Run `chatd proxy` in front of chatd."""
    port, log = free_port(), folder / "logs/proxy"
    upstream = f"unix:{chatd.socket}" if way.unix else f"127.0.0.1:{chatd.port}"
    command = [
        *(sys.executable, "-m", "chatd", "proxy", "--listen", f"127.0.0.1:{port}"),
        *("--upstream", upstream, "--db", str(chatd.db)),
        *("--log-level", "debug", "--handshakes", "0"),
    ]
    with running(command, log, cwd=CHECKOUT):
        wait_for(port, log)
        yield Endpoint("chatd proxy", port)


# --- two communities -----------------------------------------------------------------

# Runs chatd with a socket that systemd would have passed.
PASSED = """
import os, sys, chatd
os.dup2(int(sys.argv.pop(1)), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
sys.exit(chatd.main())
"""


def unit_value(name: str, key: str) -> str:
    """The only value of a setting in a unit of this repository."""
    text = (CHECKOUT / name).read_text("utf-8")
    (value,) = re.findall(rf"(?m)^{key}=(.*)$", text)
    return str(value)


class Instance:
    """An instance of chatd@.service, with the options and the socket of its units.

    systemd's place is taken by this script: it holds the socket, as systemd does, so
    the socket outlives the process. The folders of systemd (%t, %S) are in `folder`.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.log = folder / "logs" / f"serve-{name}"
        state = unit_value("chatd@.service", "StateDirectory").replace("%i", name)
        self.state = folder / "lib" / state
        self.state.mkdir(0o700, parents=True)
        program, *words = unit_value("chatd@.service", "ExecStart").split()
        check(program == "/opt/chatd/bin/chatd", f"ExecStart={program}")
        self.command = [sys.executable, "-c", PASSED, "", *words]
        path = unit_value("chatd@.socket", "ListenStream").replace("%i", name)
        self.at = path  # as in the configuration of the page
        self.path = folder / path.lstrip("/")
        self.path.parent.mkdir(exist_ok=True)
        self.path.parent.chmod(0o755)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.path.chmod(int(unit_value("chatd@.socket", "SocketMode"), 8))
        if os.geteuid() == 0:
            group = grp.getgrnam(unit_value("chatd@.socket", "SocketGroup")).gr_gid
            os.chown(self.path, -1, group)
        self.listener.listen(int(unit_value("chatd@.socket", "Backlog")))

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Run the instance during the block. Clients that come before it wait."""
        fd = self.listener.fileno()
        command = [word or str(fd) for word in self.command]
        # --handshakes is 0: all clients of this script come from a few addresses.
        with running(
            command, self.log, cwd=CHECKOUT, pass_fds=[fd],
            env={**os.environ, "STATE_DIRECTORY": str(self.state),
                 "CHATD_HANDSHAKES": "0"},
        ):  # fmt: skip
            end = time.monotonic() + TIMEOUT_SECONDS
            while not (self.state / "chatd.secret").exists():
                check(time.monotonic() < end, f"no secret: {self.log.read_text()}")
                time.sleep(0.05)
            yield

    def token(self, user_id: int, **claims: object) -> str:
        """Sign a token, as `chatd token` does."""
        return sign(self.state / "chatd.secret", user_id, **claims)


@contextlib.contextmanager
def both_behind_nginx(
    folder: Path, instances: list[Instance]
) -> Iterator[list[Endpoint]]:
    """Run the page's nginx in front of two instances; yield an endpoint for each."""
    port, logs = free_port(), folder / "logs"
    lines, sites = page_blocks("nginx", MORE)
    domains = [f"{instance.name}.example.org" for instance in instances]
    roots = []
    for instance, domain in zip(instances, domains, strict=True):
        certificate = folder / domain
        certificate.mkdir()
        roots.append(new_certificate(certificate, domain))
        sites = replace(
            sites,
            (f"/etc/letsencrypt/live/{domain}", str(certificate)),
            (f"unix:{instance.at};", f"unix:{instance.path};"),
        )
    included = "snippets/chatd.conf"
    check(f"`/etc/nginx/{included}`" in MORE, f"the page has no {included}")
    snippet = folder / included
    snippet.parent.mkdir()
    snippet.write_text(replace(lines, ("/var/log/nginx", str(logs))))
    sites = replace(
        sites,
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("/var/log/nginx", str(logs)),
    )
    with nginx(folder, sites, port):
        yield [
            Endpoint("nginx", port, root, domain=domain)
            for root, domain in zip(roots, domains, strict=True)
        ]


def chat_of(site: Endpoint, instance: Instance) -> int:
    """Make a chat of the users 6 and 7; return its id."""
    body = {"title": instance.name, "member_ids": [6, 7]}
    service = instance.token(1, scope="service")
    status, made = site.request("/api/v1/chats", service, body)
    check(status == 201, f"POST /api/v1/chats of {site.domain}: {status} {made!r}")
    number: int = json.loads(made)["chat"]["id"]
    return number


def separate(sites: list[Endpoint], instances: list[Instance]) -> str:
    """Each host name has messages, tokens and a page of its own."""
    chats = [chat_of(*pair) for pair in zip(sites, instances, strict=True)]
    check(chats == [1, 1], f"both begin with chat 1: {chats}")
    with contextlib.ExitStack() as stack:
        readers, senders = (
            [
                stack.enter_context(site.socket(instance.token(user)))
                for site, instance in zip(sites, instances, strict=True)
            ]
            for user in (7, 6)
        )
        for peer in (*readers, *senders):
            receive(peer, "connected")
        for number in range(10):
            for sender, instance in zip(senders, instances, strict=True):
                text = f"{instance.name} {number}"
                command = {"type": "send_message", "chat_id": 1, "content": text}
                sender.send(json.dumps(command))
        for peer, instance in zip(readers, instances, strict=True):
            got = [
                receive(peer, "new_message")["message"]["content"] for _ in range(10)
            ]
            check(got == [f"{instance.name} {n}" for n in range(10)], f"received {got}")
        for peer in readers:  # nothing more, before the answer to a ping
            peer.send('{"type": "ping"}')
            message = json.loads(peer.recv(TIMEOUT_SECONDS))
            check(message["type"] == "pong", f"received {message}")
    path = "/api/v1/chats/1/messages"
    for site, own, other in zip(sites, instances, instances[::-1], strict=True):
        status, body = site.request(path, own.token(7))
        contents = {m["content"].split()[0] for m in json.loads(body)["messages"]}
        check(contents == {own.name}, f"{site.domain} has {contents}")
        status, _ = site.request("/", Origin=site.origin)
        check(status == 200, f"the page of {site.domain}: {status}")
        status, _ = site.request(path, other.token(7))
        check(status == 401, f"{site.domain}, a token of {other.name}: {status}")
        try:
            with site.socket(other.token(7)):
                raise Failed(
                    f"a token of {other.name} opened a socket of {site.domain}"
                )
        except InvalidStatus as refusal:
            status = refusal.response.status_code
            check(status == 401, f"a socket with a token of {other.name}: {refusal}")
        # A page of the other community is a page of another site.
        (origin,) = (there.origin for there in sites if there != site)
        status, _ = site.request("/api/v1/me", own.token(7), Origin=origin)
        check(status == 403, f"{site.domain}, from {origin}: {status}")
    return "each has its own messages; 401 for the other's tokens, 403 for its pages"


def restart_each(
    sites: list[Endpoint],
    instances: list[Instance],
    serving: list[contextlib.ExitStack],
) -> str:
    """While one instance restarts, the chats of the other go on."""
    waits = []
    for number in (0, 1):
        other = 1 - number
        token = instances[other].token(6)
        with sites[other].socket(token) as peer, ThreadPoolExecutor(1) as thread:
            receive(peer, "connected")
            with sites[number].socket(instances[number].token(6)) as ended:
                cursor = receive(ended, "connected")["cursor"]
                serving[number].close()
                with contextlib.suppress(ConnectionClosed):
                    receive(ended, "the end")
                check(ended.close_code == 1012, f"a restart: {ended.close_code}")
            began = time.monotonic()
            early = thread.submit(sites[number].request, "/healthz")
            command = {"type": "send_message", "chat_id": 1, "content": "still here"}
            peer.send(json.dumps(command))
            receive(peer, "ack")
            check(not early.done(), "a client had an answer without a process")
            serving[number].enter_context(instances[number].serving())
            status, _ = early.result()
            check(status == 200, f"a client that came during the restart: {status}")
            waits.append(time.monotonic() - began)
            token = instances[number].token(6)
            with sites[number].socket(token, cursor) as again:
                resume = receive(again, "connected")["resume"]
                check(resume == "live", f"resume after a restart: {resume}")
            peer.send('{"type": "ping"}')
            receive(peer, "pong")
    return (
        "a restart of either leaves the other's socket open; a client that comes "
        f"meanwhile waits, here {max(waits):.1f} s"
    )


def unknown_names(sites: list[Endpoint], instances: list[Instance]) -> str:
    """A host name that no server has reaches neither community."""
    for domain in ("example.org", "other.example.org", "127.0.0.1"):
        stranger = dataclasses.replace(sites[0], domain=domain)
        try:
            status, _ = stranger.request("/healthz")
            raise Failed(f"{domain} was answered: {status}")
        except ssl.SSLError as error:
            check("UNRECOGNIZED_NAME" in str(error), f"{domain}: {error}")
    # The name in the request decides, not the one in the handshake.
    club, shop = sites
    status, _ = club.request("/api/v1/me", instances[1].token(6), Host=shop.host)
    check(status == 200, f"the club's handshake, the shop's Host: {status}")
    try:
        status, _ = club.request("/healthz", Host="other.example.org")
        raise Failed(f"the club's handshake, an unknown Host: {status}")
    except http.client.RemoteDisconnected:
        pass
    return "other names are refused in the handshake, and in a request"


def two_communities(folder: Path) -> Iterator[str]:
    """Run the checks of two instances behind one nginx; yield what each found."""
    folder.chmod(0o711)
    instances = [Instance(folder, name) for name in ("club", "shop")]
    serving = [contextlib.ExitStack() for _ in instances]
    with contextlib.ExitStack() as stack:
        for instance, ending in zip(instances, serving, strict=True):
            stack.enter_context(contextlib.closing(instance.listener))
            stack.enter_context(ending).enter_context(instance.serving())
        sites = stack.enter_context(both_behind_nginx(folder, instances))
        yield separate(sites, instances)
        yield restart_each(sites, instances, serving)
        yield unknown_names(sites, instances)


# --- the checks ----------------------------------------------------------------------
# Each returns a sentence about what it found.


def page(proxy: Endpoint, chatd: Chatd) -> str:
    """The page loads, compressed too. Only its own Origin is accepted."""
    size = 0
    for target in ("/", "/web/app.js", "/web/chat-websocket.js", "/web/style.css"):
        status, body = proxy.request(target, Origin=proxy.origin)
        check(status == 200, f"GET {target}: {status}")
        _, packed = proxy.request(target, Accept_Encoding="gzip")
        check(gzip.decompress(packed) == body, f"GET {target}: not as gzip")
        size += len(packed)
    status, _ = proxy.request("/api/v1/me", chatd.token(6), Origin=proxy.origin)
    check(status == 200, f"the page's own Origin: {status}")
    forged = {"Origin": "https://evil.example", "X_Forwarded_Host": "evil.example"}
    status, _ = proxy.request("/api/v1/me", chatd.token(6), **forged)
    check(status == 403, f"another Origin: {status}")
    return f"the page, {size} bytes as gzip; only its own Origin is accepted"


def browser(proxy: Endpoint, chatd: Chatd) -> str:
    """In a real browser a sign-in link opens the page, and the page opens a socket."""
    base = f"{proxy.origin}{proxy.path}/"
    command = [sys.executable, "-m", "chatd", "token", "8", "--name", "Ada", "--link"]
    link = subprocess.run(
        [*command, base, "--db", str(chatd.db)],
        cwd=CHECKOUT, check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    check(link.startswith(f"{base}#token="), f"a link to {base}: {link}")
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser")
    path = next(filter(None, (shutil.which(name or "") for name in names)), None)
    check(path, "there is no Chromium: apt-get install chromium")
    where = [f"--host-resolver-rules=MAP {NAME} 127.0.0.1"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=where)
        context = chromium.new_context(ignore_https_errors=True)
        tab, said = context.new_page(), list[str]()
        tab.on("console", lambda message: said.append(message.text))
        tab.goto(link.replace(f"{proxy.path}/#", f"{proxy.path}#"))  # it is redirected
        expect(tab.locator("#me-name")).to_have_text("Ada")
        end = time.monotonic() + TIMEOUT_SECONDS
        while "[WebSocket] Connected" not in said:
            check(time.monotonic() < end, f"the page opened no socket: {said}")
            tab.wait_for_timeout(50)
        address = tab.url.partition("#")[0]
        chromium.close()
    check(address == base, f"the page is at {address}, not at {base}")
    return "in Chromium a sign-in link opens the page, and the page a socket"


def conversation(proxy: Endpoint, chatd: Chatd) -> str:
    """Get a ticket, open sockets, send a message; measure a round trip."""
    body = {"title": "T", "member_ids": [6, 7]}
    service = chatd.token(1, scope="service")
    status, made = proxy.request("/api/v1/chats", service, body)
    check(status == 201, f"POST /api/v1/chats: {status} {made!r}")
    chat = json.loads(made)["chat"]["id"]
    _, ticket = proxy.request("/api/v2/ws-token", chatd.token(6))
    direct = Endpoint("direct", chatd.port)
    trips = {}
    with proxy.socket(chatd.token(7)) as other:
        receive(other, "connected")
        with proxy.socket(json.loads(ticket)["token"]) as peer:
            receive(peer, "connected")
            command = {"type": "send_message", "chat_id": chat, "content": "Привет!"}
            peer.send(json.dumps(command))
            receive(peer, "ack")
            content = receive(other, "new_message")["message"]["content"]
            check(content == "Привет!", f"received {content!r}")
    for endpoint in (direct, proxy):
        with endpoint.socket(chatd.token(6)) as peer:
            receive(peer, "connected")
            taken = []
            for _ in range(300):
                began = time.perf_counter()
                peer.send('{"type": "ping"}')
                receive(peer, "pong")
                taken.append(time.perf_counter() - began)
            trips[endpoint.name] = statistics.median(taken) * 1e6
    trip, shortest = trips[proxy.name], trips[direct.name]
    return (
        f"a ticket, two sockets, a message; a round trip of {trip:.0f} us, "
        f"{shortest:.0f} without it"
    )


def addresses(proxy: Endpoint, _chatd: Chatd) -> str:
    """Each client has a rate limit of its own, whatever headers it forges."""
    got: dict[str, list[int]] = {"127.0.0.2": [], "127.0.0.3": []}
    for number in range(5):
        for address, statuses in got.items():
            forged = {"X_Forwarded_For": f"6.6.6.{number}", "Forwarded": "for=6.6.6.6"}
            statuses.append(proxy.request("/api/v1/me", address=address, **forged)[0])
    check(
        all(found == [401, 401, 401, 429, 429] for found in got.values()),
        f"the statuses of two clients: {got}",
    )
    return "two clients have a rate limit each, and forged headers change nothing"


def restart(proxy: Endpoint, chatd: Chatd, serving: contextlib.ExitStack) -> str:
    """Restart chatd: 1012, 502 meanwhile, and then the cursor still counts."""
    with proxy.socket(chatd.token(6)) as peer:
        cursor = receive(peer, "connected")["cursor"]
        serving.close()
        with contextlib.suppress(ConnectionClosed):
            receive(peer, "the end")
        check(peer.close_code == 1012, f"a restart closed a socket: {peer.close_code}")
    status, _ = proxy.request("/healthz")
    check(status == 502, f"while chatd is stopped: {status}")
    try:  # the proxy's log line about this must not have the token
        with proxy.socket(chatd.token(6)):
            raise Failed("a socket opened while chatd was stopped")
    except InvalidStatus as refusal:
        status = refusal.response.status_code
        check(status == 502, f"a socket while chatd is stopped: {refusal}")
    began = time.monotonic()
    serving.enter_context(chatd.serving())
    with proxy.socket(chatd.token(6), cursor) as again:
        resume = receive(again, "connected")["resume"]
        check(resume == "live", f"resume after a restart: {resume}")
    took = time.monotonic() - began
    return f"a restart: 1012, then 502, then live {took:.1f} s after the start"


def silence(proxy: Endpoint, chatd: Chatd, began: float, limit: int) -> str:
    """Nothing cuts a client that sends nothing."""
    with proxy.socket(chatd.token(6)) as peer:
        receive(peer, "connected")
        time.sleep(max(0.0, 2.2 * limit - (time.monotonic() - began)))
        peer.send('{"type": "ping"}')
        receive(peer, "pong")
    return f"chatd's pings keep a silent socket open beyond the limit of {limit} s"


def cut(proxy: Endpoint, chatd: Chatd, limit: int) -> str:
    """Without chatd's pings nginx cuts the connection at its limit."""
    with proxy.socket(chatd.token(6)) as peer:
        receive(peer, "connected")
        began = time.monotonic()
        with contextlib.suppress(ConnectionClosed):
            peer.recv(3 * limit)
        took = time.monotonic() - began
    check(limit - 1 < took < 2 * limit, f"without a ping nginx cut after {took:.1f} s")
    return f"without pings nginx cuts the socket after {took:.1f} s"


def logs(folder: Path) -> str:
    """The logs have the path of the socket, and no token."""
    lines = 0
    for path in sorted(folder.iterdir()):
        text = path.read_text("utf-8", "replace")
        found = re.search(r".*(eyJ\S{0,9}).*", text)
        check(not found, f"a token in {path.name}: {found and found[0][:300]}")
        lines += text.count("/ws/chat")
    check(lines > 3, "no log has /ws/chat")
    return f"{lines} log lines about sockets, none with a token"


def checks(
    proxy: Endpoint, chatd: Chatd, limit: int, way: Way, serving: contextlib.ExitStack
) -> Iterator[str]:
    """Run the checks of one way; yield what each found."""
    yield page(proxy, chatd)
    yield conversation(proxy, chatd)
    if proxy.root:
        yield browser(proxy, chatd)
    yield addresses(proxy, chatd)
    if way == Way():  # this one waits
        yield silence(proxy, chatd, time.monotonic(), limit)
    yield restart(proxy, chatd, serving)


def main() -> int:
    """Run all checks behind each proxy; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--full", action="store_true", help="60 s and 25 s as they are")
    full = parser.parse_args().full
    limit, ping = (60, 25.0) if full else (5, 25 / 12)
    trials = [
        *((behind, way) for behind in (behind_nginx, behind_caddy) for way in WAYS),
        *((behind_proxy, way) for way in WAYS if not way.path),
    ]
    for behind, way in trials:
        name = f"{behind.__name__.removeprefix('behind_')}{way}"
        with tempfile.TemporaryDirectory(prefix="chatd-") as text:
            folder = Path(text)
            (folder / "logs").mkdir()
            chatd = Chatd(folder, ping)
            try:
                with contextlib.ExitStack() as serving:
                    serving.enter_context(chatd.serving())
                    with behind(folder, chatd, limit, way) as proxy:
                        for found in checks(proxy, chatd, limit, way, serving):
                            print(f"{name}: {found}", flush=True)
                    if behind is behind_nginx and way == Way():
                        serving.close()
                        no_pings = Chatd(folder, 3600.0)
                        serving.enter_context(no_pings.serving())
                        with behind(folder, no_pings, limit, way) as proxy:
                            print(f"{name}: {cut(proxy, no_pings, limit)}")
                print(f"{name}: {logs(folder / 'logs')}", flush=True)
            except Failed as error:
                print(f"{name}: FAILED: {error}", flush=True)
                return 1
    with tempfile.TemporaryDirectory(prefix="chatd-") as text:
        folder, name = Path(text), "nginx for two communities"
        (folder / "logs").mkdir()
        try:
            for found in two_communities(folder):
                print(f"{name}: {found}", flush=True)
            print(f"{name}: {logs(folder / 'logs')}", flush=True)
        except Failed as error:
            print(f"{name}: FAILED: {error}", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
