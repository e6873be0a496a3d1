#!/usr/bin/env python3
"""chatd as a service under a real systemd, which this script boots in a container.

    sudo torture/systemd.py                     # about a minute
    sudo torture/systemd.py --root TREE         # on another system than this machine's

The exit status is 1 if a step fails. The container (systemd-nspawn) uses this machine's
own root, or a TREE. An overlay in memory keeps all writes, so neither changes, and only
`pip install .` downloads anything. The commands and units come from docs/operating.md:
this script runs the text of that page. Each step prints what it found. These commands
make a TREE of Debian 13 (or 12: bookworm):

    packages=systemd,systemd-sysv,dbus,iproute2,python3-venv,ca-certificates,curl
    sudo debootstrap --variant=minbase --include=$packages trixie TREE

The script needs root, the right to mount, and Debian's packages systemd-container,
iproute2 and python3-venv. Without one of them it prints "cannot run here" and the
reason; the exit status is 0, or 1 if a TREE was named. It installs nothing on the
machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
PAGE = (CHECKOUT / "docs/operating.md").read_text("utf-8")
DB = "/var/lib/chatd/chatd.db"
BIN = "/opt/chatd/bin/chatd"
UNITS = "/etc/systemd/system"
DROP_INS = f"{UNITS}/chatd.service.d"
PORT = 8086
# Where a client connects: a TCP address, or a path in the container.
Place = tuple[str, int] | str
TIMEOUT = 60.0  # seconds
# The variables with which pip finds its index inside the container, too.
PIP_VARIABLES = re.compile(r"PIP_|SSL_CERT|REQUESTS_CA|(?i:https?_proxy|no_proxy)")
CLONE_NEWNET = 0x40000000


class CannotRun(Exception):
    """This machine cannot boot a systemd: the reason."""


# --- docs/operating.md ---------------------------------------------------------------


def commands(needle: str) -> str:
    """The only block of shell on the page that contains this."""
    (block,) = (
        text for text in re.findall(r"(?s)```sh\n(.*?)```", PAGE) if needle in text
    )
    return str(block)


def unit_files() -> dict[str, str]:
    """The files that the page says to write, by path."""
    blocks = re.findall(r"(?s)```ini\n# (/\S+)\n(.*?)```", PAGE)
    assert len(dict(blocks)) == len(blocks), "two blocks for one file"
    return dict(blocks)


def printed_status() -> list[str]:
    """The lines of `systemctl status` on the page, without times and numbers."""
    (block,) = re.findall(r"(?s)```\n(● chatd\.service.*?)```", PAGE)
    return [
        re.sub(r" since .*| \d+ .*", "", line).strip() for line in block.split("\n")
    ]


# --- the machine ---------------------------------------------------------------------


class Machine:
    """A booted systemd. The end of the `with` block stops it and removes everything.

    tree is the system to boot, "/" or a folder. It is only read.
    """

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.leader = 0
        self.folder = Path(tempfile.mkdtemp(prefix="chatd-systemd-"))
        self.root = self.folder / "root"
        self.cleanup = contextlib.ExitStack()
        self.cleanup.callback(shutil.rmtree, self.folder)

    def __enter__(self) -> Machine:
        try:
            self._mount()
            self._boot()
        except BaseException:
            self.cleanup.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.cleanup.close()

    def _mount(self) -> None:
        if os.geteuid() != 0:
            raise CannotRun("it mounts and boots: run it as root")
        for tool, package in (
            ("systemd-nspawn", "systemd-container"), ("nsenter", "util-linux"),
        ):  # fmt: skip
            if shutil.which(tool) is None:
                raise CannotRun(f"no {tool}: apt-get install {package}")
        for tool, package in (
            ("ip", "iproute2"), ("python3", "python3-venv"), ("systemctl", "systemd"),
            ("curl", "curl"),
        ):  # fmt: skip
            if not (self.tree / "usr/bin" / tool).exists():
                raise CannotRun(f"{self.tree} has no {tool}: it needs {package}")
        self._mounted("-t", "tmpfs", "tmpfs", self.folder)
        for name in ("upper", "work", "root"):
            (self.folder / name).mkdir()
        upper, work = self.folder / "upper", self.folder / "work"
        layers = f"lowerdir={self.tree},upperdir={upper},workdir={work}"
        self._mounted("-t", "overlay", "overlay", "-o", layers, self.root)
        # The page begins on a machine without chatd.
        for name in (
            "opt/chatd", "etc/chatd", "var/lib/chatd*", "var/lib/private/chatd*",
            "etc/systemd/system/chatd*", "etc/systemd/system/*.wants/chatd*",
        ):  # fmt: skip
            for path in self.root.glob(name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        # The files that a clone would have.
        clone = self.root / "root" / "chatd"
        shutil.rmtree(clone, ignore_errors=True)
        skip = shutil.ignore_patterns(".*", "__pycache__", "*.db*")
        shutil.copytree(CHECKOUT, clone, ignore=skip)
        # `pip install` needs these files to find its index as on this machine.
        for name in ("resolv.conf", "pip.conf", "ssl/certs/ca-certificates.crt"):
            source, target = Path("/etc", name), self.root / "etc" / name
            if self.tree != Path("/") and source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                shutil.copy(source, target)
        (self.root / "etc" / "machine-id").write_text(f"{secrets.token_hex(16)}\n")
        (self.root / "etc" / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
        tools = self.root / "usr" / "local" / "sbin"
        self._tool(tools / "sudo", 'exec "$@"')
        new_version = 's/^__version__ = "/&999./'
        self._tool(tools / "git", f"[ $1 = pull ] && sed -i '{new_version}' chatd.py")

    def _tool(self, path: Path, script: str) -> None:
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n", "ascii")
        path.chmod(0o755)

    def _mounted(self, *words: object) -> None:
        command = ["mount", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotRun(done.stderr.strip())
        command = ["umount", "--lazy", str(words[-1])]
        self.cleanup.callback(subprocess.check_call, command)

    def _boot(self) -> None:
        # IPAddressDeny= needs these: it is a BPF program of a control group.
        bpf = (
            "--capability=CAP_BPF,CAP_NET_ADMIN,CAP_PERFMON",
            "--system-call-filter=bpf",
        )
        self.cleanup.callback(remove_cgroups)
        with (self.folder / "console").open("wb") as console:
            nspawn = subprocess.Popen(
                [
                    "systemd-nspawn", "--quiet", "--directory", str(self.root),
                    "--register=no", "--keep-unit", "--private-network",
                    "--console=read-only", "--kill-signal=SIGRTMIN+3",
                    "--resolv-conf=off", "--timezone=off", *bpf,
                    "--boot", "systemd.unit=basic.target",
                ],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )  # fmt: skip
        self.cleanup.callback(self._halt, nspawn)
        children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children")
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and nspawn.poll() is None:
            with contextlib.suppress(OSError, IndexError):
                self.leader = int(children.read_text("ascii").split()[0])
            if self.leader and self.run("systemctl is-system-running", check=False) in (
                "running", "degraded",
            ):  # fmt: skip
                return
            time.sleep(0.05)
        text = (self.folder / "console").read_text("utf-8", "replace")
        raise CannotRun(f"systemd did not boot: {text[-2000:].strip() or 'no output'}")

    def _halt(self, nspawn: subprocess.Popen[bytes]) -> None:
        nspawn.terminate()
        try:
            nspawn.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            nspawn.kill()
            nspawn.wait()

    def run(self, script: str, *, check: bool = True, online: bool = False) -> str:
        """Run a script in the container; return its output.

        online: use this machine's network. check=False: the status may be other than 0,
        and the output includes stderr.
        """
        spaces = ["-m", "-p", "-u", "-i", "-C"] + ([] if online else ["-n"])
        environment = {
            "PATH": "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
            "LANG": "C.UTF-8", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0",
            **{k: v for k, v in os.environ.items() if PIP_VARIABLES.match(k)},
        }  # fmt: skip
        done = subprocess.run(
            [
                *("nsenter", "-t", str(self.leader), *spaces, "--"),
                *("/bin/bash", "-euo", "pipefail", "-c", f"cd /root/chatd\n{script}"),
            ],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=5 * TIMEOUT, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{script}\n{done.stdout}{done.stderr}")
        return (done.stdout + ("" if check else done.stderr)).strip()

    def write(self, path: str, text: str) -> None:
        """Write a file as an administrator does, and let systemd load it."""
        target = self.root / path.lstrip("/")
        self.run(f"mkdir -p {Path(path).parent}")
        target.write_text(text, "utf-8")
        self.run("systemctl daemon-reload")

    def drop_in(self, *lines: str) -> contextlib.AbstractContextManager[None]:
        """Add these lines to [Service] during the block; the caller restarts chatd."""
        path = f"{DROP_INS}/torture.conf"

        @contextlib.contextmanager
        def written() -> Iterator[None]:
            self.write(path, "\n".join(["[Service]", *lines, ""]))
            yield
            self.run(f"rm {path}; systemctl daemon-reload")

        return written()

    def show(self, name: str, unit: str = "chatd") -> str:
        """Read a property of a unit."""
        return self.run(f"systemctl show {unit} -p {name} --value")

    def becomes(self, name: str, *values: str, unit: str = "chatd") -> float:
        """Wait until a property has one of these values; return the seconds it took."""
        began = time.monotonic()
        while (now := self.show(name, unit)) not in values:
            waited = time.monotonic() - began
            assert waited < TIMEOUT, f"{name} is {now}, not {values}"
            time.sleep(0.05)
        return time.monotonic() - began

    def journal(self, needle: str) -> str:
        """Wait until the unit's journal has this text; return the journal."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            text = self.run("journalctl -u chatd --no-pager -o cat")
            if needle in text:
                return text
            time.sleep(0.1)
        raise AssertionError(f"the journal has no {needle!r}")

    def enter_network(self) -> None:
        """Move the calling thread to the container's network."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/proc/{self.leader}/ns/net", "rb") as network:
            if libc.setns(network.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")


def remove_cgroups() -> None:
    """Remove the control groups that systemd-nspawn leaves, the innermost first."""
    found = [folder for folder, _, _ in os.walk("/sys/fs/cgroup")]
    for folder in sorted(found, reverse=True):
        if re.search(r"/(payload|supervisor)(/|$)", folder):
            with contextlib.suppress(OSError):  # another container uses it
                os.rmdir(folder)


# --- clients -------------------------------------------------------------------------


class Clients:
    """Clients of the server, in the container's network.

    Each request has a connection of its own.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.threads = ThreadPoolExecutor(8, initializer=machine.enter_network)

    def request(
        self,
        method: str,
        path: str,
        token: str = "",
        body: object = None,
        *,
        at: Place = ("127.0.0.1", PORT),
        timeout: float = TIMEOUT,
    ) -> tuple[int, Any]:
        """Send one request; return the status and the JSON of the answer."""
        arguments = method, path, token, body, self.place(at), timeout
        return self.threads.submit(request, *arguments).result()

    def place(self, at: Place) -> Place:
        """Return what a thread of this machine connects to."""
        inside = f"/proc/{self.machine.leader}/root"
        return f"{inside}{at}" if isinstance(at, str) else at

    def upgrade(self, token: str, at: tuple[str, int]) -> int:
        """Ask for a WebSocket; return the status of the answer."""

        def ask() -> int:
            line = http.client.HTTPConnection(*at, timeout=TIMEOUT)
            with contextlib.closing(line):
                line.request("GET", f"/ws/chat?token={token}", headers={
                    "Connection": "Upgrade", "Upgrade": "websocket",
                    "Sec-WebSocket-Version": "13",
                    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
                })  # fmt: skip
                return line.getresponse().status

        return self.threads.submit(ask).result()

    def refused(self, at: Place = ("127.0.0.1", PORT)) -> bool:
        """Whether a connection to this address is refused."""
        try:
            self.request("GET", "/healthz", at=at)
        except ConnectionRefusedError:
            return True
        return False

    def token(self, arguments: str) -> str:
        """Run `chatd token` as root."""
        return self.machine.run(f"{BIN} token {arguments}")

    @contextlib.contextmanager
    def load(
        self, at: Place = ("127.0.0.1", PORT), *, sends: bool = True, db: str = DB
    ) -> Iterator[Load]:
        """During the block, clients connect in a loop, and one sends messages."""
        load = Load(at, self, sends, db)
        tasks = [self.threads.submit(load.connect) for _ in range(2)]
        if load.sends:
            tasks.append(self.threads.submit(load.send))
        try:
            yield load
        finally:
            load.over.set()
            for task in tasks:
                task.result()


def request(
    method: str, path: str, token: str, body: object, at: Place, timeout: float
) -> tuple[int, Any]:
    """Send one request on a new connection, in the calling thread's network."""
    host, port = ("localhost", 80) if isinstance(at, str) else at
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    with contextlib.closing(connection):
        if isinstance(at, str):
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(timeout)
            connection.sock.connect(at)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        sent = None if body is None else json.dumps(body)
        connection.request(method, path, sent, headers)
        answer = connection.getresponse()
        text = answer.read()
    return answer.status, json.loads(text) if text else None


class Load:
    """Counts the results of connections, and records the acks of one sender."""

    def __init__(self, at: Place, clients: Clients, sends: bool, db: str) -> None:
        self.at = clients.place(at)
        self.over = threading.Event()
        self.results: Counter[str] = Counter()
        self.longest = 0.0  # seconds that a client waited for its result
        self.acked: dict[str, int] = {}
        self.sends = sends
        if self.sends:
            self.service = clients.token(f"1 --scope service --db {db}")
            chat = {"member_ids": [6], "title": "load"}
            made = clients.request("POST", "/api/v1/chats", self.service, chat, at=at)[
                1
            ]
            self.chat: int = made["chat"]["id"]

    def connect(self) -> None:
        """Connect, send a request, and disconnect, again and again."""
        while not self.over.is_set():
            began = time.monotonic()
            try:
                request("GET", "/healthz", "", None, self.at, TIMEOUT)
                self.results["answered"] += 1
            except (ConnectionRefusedError, FileNotFoundError):
                self.results["refused"] += 1
            except (OSError, http.client.HTTPException):
                self.results["dropped"] += 1
            self.longest = max(self.longest, time.monotonic() - began)

    def send(self) -> None:
        """Send messages; repeat each with its client_id until it is acked."""
        path = f"/api/v1/chats/{self.chat}/messages"
        while not self.over.is_set():
            key = f"{self.chat}-{len(self.acked)}"
            body = {"content": key, "client_id": key, "sender_id": 6}
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, answer = request(
                    "POST", path, self.service, body, self.at, TIMEOUT
                )
                # http.client takes a head that was cut off, by a kill, for an answer.
                if status in (200, 201) and answer:
                    self.acked[key] = answer["message"]["id"]

    def __str__(self) -> str:
        counts = [f"{self.results[k]} {k}" for k in ("refused", "answered", "dropped")]
        counts.append(f"{len(self.acked)} messages acked" if self.sends else "")
        return ", ".join([*filter(None, counts), f"longest wait {self.longest:.2f} s"])

    def verify_none_refused(self, *, may_drop: bool = False) -> str:
        """Verify the results; return a sentence about them.

        may_drop: connections may have ended together with their process.
        """
        assert self.results["refused"] == 0, self
        assert self.results["answered"] > 0, self
        assert may_drop or self.results["dropped"] == 0, self
        return str(self)


def stored(machine: Machine, db: str = DB) -> dict[str, int]:
    """Read the client_ids and ids of the messages in a database."""
    script = (
        "import sqlite3, json, sys; "
        "db = sqlite3.connect(f'file:{sys.argv[1]}?mode=ro', uri=True); "
        "print(json.dumps(db.execute('SELECT client_id, id FROM message "
        "WHERE client_id IS NOT NULL').fetchall()))"
    )
    rows = json.loads(machine.run(f'/usr/bin/python3 -c "{script}" {db}'))
    assert len(rows) == len(dict(rows)), "a message is stored twice"
    return dict(rows)


def verify_acks(machine: Machine, load: Load, db: str = DB) -> None:
    """Verify that every acked message is stored with the id of its ack."""
    rows = stored(machine, db)
    lost = {key: at for key, at in load.acked.items() if rows.get(key) != at}
    assert load.acked, "no message was acked"
    assert not lost, f"lost: {lost}"


def exposure(machine: Machine, unit: str = "chatd") -> str:
    """The last line of `systemd-analyze security` for a unit."""
    return machine.run(f"systemd-analyze security --no-pager {unit} | tail -n 1")


def verify_units(machine: Machine, *paths: str) -> None:
    """Verify that `systemd-analyze verify` has no warning about these units."""
    command = f"systemd-analyze verify {' '.join(paths)} 2>&1"
    warnings = machine.run(command, check=False)
    assert warnings == "", warnings


# --- the steps -----------------------------------------------------------------------
# main() calls each with the machine and its clients, in the order of STEPS. A step
# returns one line about what it found.


def install(machine: Machine, _clients: Clients) -> str:
    """Install as on the page; `systemctl status` prints what the page shows."""
    block = commands("python3 -m venv /opt/chatd &&").split("\n")
    machine.run(block[0], online=True)
    machine.run(block[1])
    status = machine.run(block[2])
    for line in printed_status():
        assert line in status, (line, status)
    verify_units(machine, f"{UNITS}/chatd.service")
    seconds = int(machine.show("ActiveEnterTimestampMonotonic")) - int(
        machine.show("InactiveExitTimestampMonotonic")
    )
    return f"ready {seconds / 1e6:.2f} s after the start"


def sandbox(machine: Machine, clients: Clients) -> str:
    """Look at the process, its rights and its files; use the page's sign-in link."""
    score = exposure(machine)
    assert float(re.findall(r"[\d.]+", score)[-1]) <= 1.0, score
    pid = machine.show("MainPID")
    status = machine.run(f"cat /proc/{pid}/status")
    for line in ("NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000"):
        assert line in status, line
    shell = machine.run(f"nsenter -t {pid} -m /bin/sh -c id 2>&1", check=False)
    assert "Permission denied" in shell, shell
    user = re.findall(r"Uid:\t(\d+)", status)[0]
    assert int(user) > 60000, user
    modes = machine.run("stat -L -c '%a %u' /var/lib/chatd /var/lib/chatd/chatd.*")
    assert set(modes.split("\n")) == {f"700 {user}", f"600 {user}"}, modes
    assert machine.show("NFileDescriptorStore") == "1"
    link = machine.run(
        commands("/opt/chatd/bin/chatd token 1 --name Anna --link https://chat.")
    )
    status_code, session = clients.request(
        "POST", "/api/v1/session", link.partition("#token=")[2]
    )
    assert (status_code, session["name"]) == (200, "Anna"), session
    number = re.findall("[0-9.]+", score)[-1]
    return f"exposure {number}, user {user}, no capability, no shell"


def restarts(machine: Machine, clients: Clients) -> str:
    """Restart ten times while clients connect."""
    with clients.load() as load:
        for _ in range(10):
            machine.run("systemctl restart chatd")
    verify_acks(machine, load)
    return load.verify_none_refused()


def killed(machine: Machine, clients: Clients) -> str:
    """kill -9: connections in the listen backlog survive the process."""
    with clients.load() as load:
        before = machine.show("MainPID")
        machine.run("systemctl kill -s KILL chatd")
        machine.becomes("NRestarts", "1")
        seconds = machine.becomes("ActiveState", "active")
        assert machine.show("MainPID") != before
        clients.request("GET", "/healthz")
    verify_acks(machine, load)
    assert seconds < TIMEOUT
    return load.verify_none_refused(may_drop=True)


def hung(machine: Machine, clients: Clients) -> str:
    """The process hangs: the watchdog ends it, and the journal has a stack trace."""
    with machine.drop_in("WatchdogSec=3"):
        machine.run("systemctl restart chatd")
        with clients.load() as load:
            machine.run("systemctl kill -s STOP chatd")
            began = time.monotonic()
            machine.becomes("NRestarts", "1")
            machine.becomes("ActiveState", "active")
            seconds = time.monotonic() - began
        text = machine.journal("Watchdog timeout")
        assert "Fatal Python error: Aborted" in text
        assert "most recent call first" in text
        verify_acks(machine, load)
    machine.run("systemctl restart chatd")
    return f"back after {seconds:.1f} s; {load.verify_none_refused(may_drop=True)}"


def crash_loop(machine: Machine, clients: Clients) -> str:
    """chatd cannot start: systemd tries until it can, and clients wait meanwhile."""
    secret = "/var/lib/chatd/chatd.secret"
    with machine.drop_in("RestartSec=100ms"):
        with clients.load() as load:
            machine.run(f"chmod 0644 {secret}")
            machine.run("systemctl restart chatd", check=False)
            deadline = time.monotonic() + TIMEOUT
            while (crashes := int(machine.show("NRestarts"))) < 8:
                assert time.monotonic() < deadline, crashes
                time.sleep(0.1)
            machine.run(f"chmod 0600 {secret}")
            machine.becomes("SubState", "running")
        machine.journal(f"secret {secret}")
        verify_acks(machine, load)
    machine.run("systemctl restart chatd")
    return f"{crashes} crashes, then started; {load.verify_none_refused()}"


def restart_delay(machine: Machine, _clients: Clients) -> str:
    """With the page's drop-in the wait between failures grows, where systemd can."""
    (path,) = (p for p in unit_files() if p.endswith("restart.conf"))
    machine.write(path, unit_files()[path])
    version = machine.run("systemctl --version | head -n 1")
    if int(version.split()[1]) < 254:
        unit = f"{UNITS}/chatd.service"
        warning = machine.run(f"systemd-analyze verify {unit} 2>&1", check=False)
        assert "Unknown key 'RestartSteps'" in warning, warning
        machine.run(f"rm {path}; systemctl daemon-reload")
        return "this systemd is too old for it, and warns, as the page says"
    verify_units(machine, f"{UNITS}/chatd.service")
    secret, next_wait = "/var/lib/chatd/chatd.secret", "RestartUSecNext"
    assert machine.show(next_wait) == "2s", machine.show(next_wait)
    with machine.drop_in("RestartSec=100ms", "RestartMaxDelaySec=2s"):
        machine.run(f"chmod 0644 {secret}")
        machine.run("systemctl restart chatd", check=False)
        waits, deadline = [machine.show(next_wait)], time.monotonic() + TIMEOUT
        while waits[-1] != "2s":
            assert time.monotonic() < deadline, waits
            now = machine.show(next_wait)
            waits += [now] if now != waits[-1] else []
        machine.run(f"chmod 0600 {secret}")
        machine.becomes("SubState", "running")
        machine.run("systemctl restart chatd")
        assert machine.show(next_wait) == "100ms", "a start does not begin anew"
    machine.run(f"rm {path}; systemctl daemon-reload; systemctl restart chatd")
    return f"waits of {', '.join(waits)}; a start begins anew"


def wrong_use(machine: Machine, _clients: Clients) -> str:
    """A wrong setting is reported once, and systemd does not try again."""
    with machine.drop_in("Environment=CHATD_SENDS=many"):
        machine.run("systemctl restart chatd", check=False)
        machine.becomes("ActiveState", "failed")
        assert machine.show("ExecMainStatus") == "2"
        machine.journal("CHATD_SENDS: 'many' is not RATE/BURST")
    machine.run("systemctl start chatd")
    return "failed at once, with an error that names the setting"


def settings(machine: Machine, _clients: Clients) -> str:
    """The page's drop-in takes effect; the log reports too few descriptors."""
    (path,) = (p for p in unit_files() if p == f"{DROP_INS}/settings.conf")
    machine.write(path, unit_files()[path])
    machine.run("systemctl restart chatd")
    limits = machine.run(f"cat /proc/{machine.show('MainPID')}/limits")
    assert re.search(r"Max open files +15256 +15256", limits), limits
    machine.write(path, unit_files()[path].replace("LimitNOFILE=", "#"))
    machine.run("systemctl restart chatd")
    text = machine.journal("fewer_connections max_connections=10000")
    machine.run(f"rm {path}; systemctl daemon-reload; systemctl restart chatd")
    assert text.count("fewer_connections") == 1, text
    warned = machine.run("journalctl -u chatd -p warning --no-pager -o cat")
    # The journal removes the prefix with the priority.
    assert re.search("(?m)^fewer_connections ", warned), warned
    assert "ready url=" not in warned, warned
    return "15,000 connections; with too few descriptors 10,000, which the log reports"


def addresses(machine: Machine, clients: Clients) -> str:
    """A restart applies another --listen; a name with two addresses keeps both."""
    found = []
    for listen, at, count in (
        ("127.0.0.1:8087", ("127.0.0.1", 8087), "1"),
        ("localhost:8087", ("::1", 8087), "2"),
        ("0.0.0.0:8087", ("10.9.9.2", 8087), "1"),
        ("[::]:8087", ("10.9.9.2", 8087), "1"),
        ("127.0.0.1:8088 [::]:8087", ("::1", 8087), "2"),
    ):
        machine.run("ip address replace 10.9.9.2/32 dev lo")
        rules = ("IPAddressAllow=10.9.9.2", f'Environment="CHATD_LISTEN={listen}"')
        with machine.drop_in(*rules):
            machine.run("systemctl restart chatd")
            assert machine.show("NFileDescriptorStore") == count, listen
            assert clients.refused(), "the old socket still listens"
            with clients.load(at, sends=False) as load:
                for _ in range(2):
                    machine.run("systemctl restart chatd")
            found.append(f"{listen} {load.results['answered']} answered")
            load.verify_none_refused()
    machine.run("systemctl restart chatd")
    assert not clients.refused()
    return f"0 refused, {', '.join(found)}"


def firewall(machine: Machine, clients: Clients) -> str:
    """IPAddressAllow=localhost accepts only localhost."""
    with machine.drop_in("Environment=CHATD_LISTEN=0.0.0.0:8086"):
        machine.run("systemctl stop chatd && systemctl start chatd")
        assert clients.request("GET", "/healthz")[0] == 200
        try:
            clients.request("GET", "/healthz", at=("10.9.9.2", PORT), timeout=1.0)
            found = "not enforced here: this kernel or container has no BPF for it"
        except TimeoutError:
            found = "127.0.0.1 is answered, another address gets no answer"
    machine.run("systemctl restart chatd")
    return found


def credential(machine: Machine, clients: Clients) -> str:
    """chatd does not start without the file of the secret, and by itself with it.

    The page has the lines for a key of the backend as comments; here they take effect.
    """
    (path,) = (p for p in unit_files() if p == f"{DROP_INS}/secret.conf")
    machine.write(path, re.sub(r"(?m)^#(?=\w+=)", "", unit_files()[path]))
    assert machine.run("systemctl restart chatd; true", check=False)
    machine.journal("Failed at step CREDENTIALS")
    machine.run(commands("/etc/chatd/chatd.secret\n"))
    machine.run("cp /etc/chatd/chatd.secret /etc/chatd/backend.key")
    seconds = machine.becomes("SubState", "running")
    token = clients.token("1 --secret-file /etc/chatd/chatd.secret")
    assert clients.request("GET", "/api/v1/me", token)[0] == 200
    provided = "/run/credentials/chatd.service"
    machine.journal(f"jwt_keys='{provided}/backend.key (HS256, shared secret)'")
    mode = machine.run(f"stat -c %a {provided}/chatd.secret")
    machine.run("systemctl restart chatd")
    assert clients.request("GET", "/api/v1/me", token)[0] == 200
    machine.run(f"rm -r {path} /etc/chatd; systemctl daemon-reload")
    machine.run("systemctl restart chatd")
    return f"mode {mode}; started {seconds:.1f} s after the file was there"


def administration(machine: Machine, clients: Clients) -> str:
    """Root checks, backs up and restores; then the unit starts, and clients resync."""
    token = clients.token(f"6 --db {DB}")
    machine.run(f"rm -f /root/copy.db; {BIN} backup /root/copy.db --db {DB}")
    _, after = clients.request("GET", "/api/v1/events", token)
    for command in (f"restore /root/copy.db --db {DB}", f"serve --db {DB}"):
        error = machine.run(f"{BIN} {command}", check=False)
        assert machine.show("MainPID") in error, error
        assert "systemctl stop chatd" in error, error
    machine.run("systemctl stop chatd")
    # Also with the files that root's reader creates when no other process has it open.
    for path in (DB, "/root/copy.db"):
        assert ": ok: " in machine.run(f"{BIN} check --db {path}")
    machine.run(f"{BIN} restore /root/copy.db --db {DB}")
    machine.run("systemctl start chatd")
    owners = machine.run("stat -L -c '%u' /var/lib/chatd /var/lib/chatd/*").split("\n")
    assert len(set(owners)) == 1, owners
    assert owners[0] != "0", owners
    _, poll = clients.request("GET", f"/api/v1/events?cursor={after['cursor']}", token)
    assert poll["resync"] is True, poll
    with clients.load() as load:
        while len(load.acked) < 5:
            time.sleep(0.05)
    verify_acks(machine, load)
    return f"check, backup and restore as root; then {len(load.acked)} messages stored"


def backups(machine: Machine, clients: Clients) -> str:
    """Run the page's timer: it keeps the newest backups, and leaves other files."""
    written = {p: t for p, t in unit_files().items() if "chatd-backup" in p}
    for path, text in written.items():
        machine.write(path, text.replace("--keep 48", "--keep 2"))
    service, timer = sorted(written)
    verify_units(machine, service, timer)
    machine.run("mkdir -p /var/lib/private/chatd-backup; touch "
                "/var/lib/private/chatd-backup/{mine.db,chatd-20200101T000000Z.db,"
                "chatd-20200101T000001Z.db.0123abcd.partial}")  # fmt: skip
    with clients.load() as load:
        machine.run(commands("enable --now chatd-backup.timer"))
        before = dict(load.acked)
        machine.run("sleep 1; systemctl start chatd-backup")
    names = machine.run("ls /var/lib/chatd-backup").split("\n")
    assert len(names) == 3, names
    assert "mine.db" in names
    newest = f"/var/lib/chatd-backup/{sorted(names)[-2]}"
    assert ": ok: " in machine.run(f"{BIN} check --db {newest}")
    rows = stored(machine, newest)
    assert before, "no message was acked"
    assert all(rows.get(key) == at for key, at in before.items())
    verify_acks(machine, load)
    assert machine.show("ActiveState", "chatd-backup.timer") == "active"
    score = exposure(machine, "chatd-backup")
    # Back up while chatd is stopped, too; then restore the newest, as on the page.
    machine.run("systemctl stop chatd; systemctl start chatd-backup; sleep 1")
    machine.run("systemctl start chatd")
    machine.run(commands("copy=$(sudo find"))
    assert clients.request("GET", "/healthz")[0] == 200
    owners = machine.run("stat -L -c '%u' /var/lib/chatd/chatd.*").split("\n")
    assert len(set(owners)) == 1, owners
    return (
        f"{len(before)} messages acked before, all in the backup; {score.strip('→ ')}"
    )


def socket_unit(machine: Machine, clients: Clients) -> str:
    """Use the page's socket unit: chatd has no network, and no client is refused."""
    files = socket_files()
    for path, text in files.items():
        machine.write(path, text)
    machine.run(commands("enable --now chatd.socket"))
    verify_units(machine, f"{UNITS}/chatd.service", f"{UNITS}/chatd.socket")
    score = exposure(machine)
    assert float(re.findall(r"[\d.]+", score)[-1]) <= 0.2, score
    network = machine.run(f"nsenter -t {machine.show('MainPID')} -n ip -brief address")
    assert len(network.split("\n")) == 1, network
    assert network.startswith("lo "), network
    with clients.load() as load:
        for _ in range(3):
            machine.run("systemctl restart chatd")
        machine.run("systemctl kill -s KILL chatd")
        machine.becomes("SubState", "running")
    verify_acks(machine, load)
    assert machine.show("NFileDescriptorStore") == "0"
    machine.run(f"systemctl disable --now chatd.socket chatd; rm {' '.join(files)}")
    machine.run("systemctl daemon-reload; systemctl enable --now chatd")
    found = load.verify_none_refused(may_drop=True)
    return f"exposure {re.findall('[0-9.]+', score)[-1]}; {found}"


def socket_files(*changes: tuple[str, str]) -> dict[str, str]:
    """The page's socket unit and its drop-in for chatd, by path."""
    files = {
        path: text
        for path, text in unit_files().items()
        if path in (f"{UNITS}/chatd.socket", f"{DROP_INS}/socket.conf")
    }
    assert len(files) == 2
    for old, new in changes:
        assert any(old in text for text in files.values()), old
        files = {path: text.replace(old, new) for path, text in files.items()}
    return files


def on_a_unix_socket() -> dict[str, str]:
    """The same with the lines that the page has for a Unix socket."""
    (lines,) = re.findall(r"(?s)```ini\n(ListenStream=/.*?)```", PAGE)
    return socket_files(("ListenStream=127.0.0.1:8086\n", lines))


def unix_socket(machine: Machine, clients: Clients) -> str:
    """Use the page's Unix socket: its group gets in, and no client is refused."""
    files, file = on_a_unix_socket(), "/run/chatd.sock"
    for path, text in files.items():
        machine.write(path, text)
    machine.run(commands("enable --now chatd.socket"))
    verify_units(machine, f"{UNITS}/chatd.service", f"{UNITS}/chatd.socket")

    def reach(path: str, user: str, group: str) -> str:
        probe = f"import socket; socket.socket(socket.AF_UNIX).connect('{path}')"
        ids = f"--reuid={user} --regid={group} --clear-groups"
        return machine.run(f'setpriv {ids} python3 -c "{probe}"', check=False)

    assert reach(file, "www-data", "www-data") == ""
    assert "PermissionError" in reach(file, "nobody", "nogroup")
    assert clients.refused(), "chatd still listens on its port"
    with clients.load(file) as load:
        for _ in range(3):
            machine.run("systemctl restart chatd")
        machine.run("systemctl kill -s KILL chatd")
        machine.becomes("SubState", "running")
    verify_acks(machine, load)
    assert clients.request("GET", "/api/v1/me", "x", at=file)[0] == 401
    machine.journal("no_client_address")
    machine.run(f"systemctl disable --now chatd.socket chatd; rm {' '.join(files)}")
    machine.run("systemctl daemon-reload; systemctl enable --now chatd")
    # With --listen chatd itself makes the file, anew after each start of the unit.
    own = "/run/chatd/chatd.sock"
    with machine.drop_in(
        f"Environment=CHATD_LISTEN=unix:{own}", "Group=www-data",
        "RuntimeDirectory=chatd", "RuntimeDirectoryMode=0750",
    ):  # fmt: skip
        for command in ("restart chatd", "restart chatd", "start chatd-backup"):
            machine.run(f"systemctl {command}")
            assert machine.run(f"stat -c '%a %G' {own}") == "660 www-data"
            assert reach(own, "www-data", "www-data") == ""
            assert "PermissionError" in reach(own, "nobody", "nogroup")
            assert clients.request("GET", "/healthz", at=own)[0] == 200
    machine.run("systemctl restart chatd")
    return (
        f"www-data gets in, nobody does not; {load.verify_none_refused(may_drop=True)}"
    )


def proxy_unit(machine: Machine, clients: Clients) -> str:
    """Install the proxy as on the page: it checks tokens, and none is refused."""
    at, unit = ("127.0.0.1", 3000), "chatd-proxy"
    status = machine.run(commands("cp chatd-proxy.service"))
    assert "Active: active (running)" in status, status
    assert 'Status: "listening on http://127.0.0.1:3000"' in status, status
    verify_units(machine, f"{UNITS}/chatd-proxy.service")
    score = float(re.findall(r"[\d.]+", exposure(machine, unit))[-1])
    assert score <= 1.0, score
    # A container may have a lower limit of its own; the log would say so.
    assert machine.show("LimitNOFILE", unit) == "20512"
    token = clients.token(f"6 --db {DB}")
    assert clients.request("GET", "/api/v1/me", token, at=at)[0] == 200
    for presented, code in ((token, 101), (f"{token}x", 401), ("", 401)):
        assert clients.upgrade(presented, at) == code, code
    with clients.load(at) as load:
        for _ in range(3):
            machine.run("systemctl restart chatd-proxy")
        machine.run("systemctl restart chatd")
        machine.run("systemctl kill -s KILL chatd-proxy")
        machine.becomes("SubState", "running", unit=unit)
    verify_acks(machine, load)
    found = load.verify_none_refused(may_drop=True)
    # The page's settings, with chatd on a Unix socket.
    (path,) = (p for p in unit_files() if "chatd-proxy.service.d" in p)
    files = on_a_unix_socket()
    for name, text in files.items():
        machine.write(name, text)
    machine.run(commands("enable --now chatd.socket"))
    upstream = r"(?m)^#(?=Environment=CHATD_UPSTREAM|SupplementaryGroups=)"
    machine.write(path, re.sub(upstream, "", unit_files()[path]))
    machine.run("systemctl restart chatd-proxy", check=False)
    assert machine.show("ActiveState", unit) != "active", "it has no secret"
    machine.run(
        "install -D -m 0600 /var/lib/chatd/chatd.secret /etc/chatd/chatd.secret"
    )
    machine.becomes("SubState", "running", unit=unit)
    assert clients.refused(at)
    assert clients.request("GET", "/api/v1/me", token, at=("127.0.0.1", 3001))[0] == 200
    assert clients.upgrade(token, ("127.0.0.1", 3001)) == 101
    machine.run(f"systemctl disable --now {unit}; rm -r {UNITS}/{unit}* /etc/chatd")
    machine.run(f"systemctl disable --now chatd.socket chatd; rm {' '.join(files)}")
    machine.run("systemctl daemon-reload; systemctl enable --now chatd")
    return f"exposure {score}; {found}; then at another port, to a Unix socket"


def instances(machine: Machine, clients: Clients) -> str:
    """Two instances of the template, as on the page: each is a community of its own."""
    # systemctl has 0 as its status only if both run.
    *install, status = (
        commands("enable --now chatd@club chatd@shop").strip().split("\n")
    )
    machine.run("\n".join(install))
    shown = machine.run(status)
    names = ("club", "shop")
    for name in names:
        assert f'Status: "listening on unix:/run/chatd@{name}.sock"' in shown, shown
    copies = [f"{UNITS}/chatd@{kind}" for kind in ("club.service", "club.socket")]
    verify_units(machine, *copies)
    score = float(re.findall(r"[\d.]+", exposure(machine, "chatd@club"))[-1])
    assert score <= 0.2, score
    assert clients.request("GET", "/healthz")[0] == 200, "chatd.service is disturbed"
    dbs = {name: f"/var/lib/chatd@{name}/chatd.db" for name in names}
    sockets = {name: f"/run/chatd@{name}.sock" for name in names}
    pids = {name: machine.show("MainPID", f"chatd@{name}") for name in names}
    users = {name: machine.run(f"stat -c %u /proc/{pids[name]}") for name in names}
    server = machine.run(f"stat -c %u /proc/{machine.show('MainPID')}")
    assert len({*users.values(), server, "0"}) == 4, (users, server)
    separate(machine, dbs, sockets, pids, users)

    # A message and a token of the club are of no use in the shop.
    sent = clients.token(f"6 --db {dbs['club']}")
    _, made = clients.request("POST", "/api/v1/chats", sent, {
        "title": "only the club"}, at=sockets["club"])  # fmt: skip
    assert made["chat"]["title"] == "only the club", made
    assert clients.request("GET", "/api/v1/chats", sent, at=sockets["shop"])[0] == 401
    other = clients.token(f"6 --db {dbs['shop']}")
    assert clients.request("GET", "/api/v1/chats", other, at=sockets["club"])[0] == 401
    _, listed = clients.request("GET", "/api/v1/chats", other, at=sockets["shop"])
    assert listed["chats"] == [], listed

    # A restart, a crash and a setting of one: no client is refused, the other goes on.
    (path,) = (p for p in unit_files() if "chatd@club.service.d" in p)
    machine.write(path, unit_files()[path])
    with clients.load(sockets["club"], db=dbs["club"]) as load:
        for _ in range(3):
            machine.run("systemctl restart chatd@club")
        machine.run("systemctl kill -s KILL chatd@club")
        machine.becomes("NRestarts", "1", unit="chatd@club")
        machine.becomes("SubState", "running", unit="chatd@club")
    verify_acks(machine, load, dbs["club"])
    assert machine.show("MainPID", "chatd@shop") == pids["shop"]
    _, me = clients.request("GET", "/api/v1/me", sent, at=sockets["club"])
    assert me["server"]["invites"] is True, me
    _, me = clients.request("GET", "/api/v1/me", other, at=sockets["shop"])
    assert me["server"]["invites"] is False, me
    administer_instance(machine, clients, dbs, sockets)
    # The page's drop-in for another reverse proxy; this system has no group caddy.
    (path,) = (p for p in unit_files() if "chatd@.socket.d" in p)
    machine.write(path, unit_files()[path].replace("=caddy", "=games"))
    machine.run("systemctl stop chatd@club.socket; systemctl start chatd@club")
    mode = machine.run(f"stat -c '%a %U %G' {sockets['club']}")
    assert mode == "660 root games", mode
    machine.run(f"rm -r {Path(path).parent}; systemctl daemon-reload")
    remove_instances(machine, clients, dbs)
    found = load.verify_none_refused(may_drop=True)
    return f"exposure {score}, users {', '.join(users.values())}; {found}"


def separate(
    machine: Machine,
    dbs: dict[str, str],
    sockets: dict[str, str],
    pids: dict[str, str],
    users: dict[str, str],
) -> None:
    """Verify that one instance can read no file of the other, and not reach it."""

    for name, other in (("club", "shop"), ("shop", "club")):
        # In the view of the service only Python is executable, so setpriv is not.
        become = f"import os; os.setgroups([]); os.setgid({users[name]}); "
        become += f"os.setuid({users[name]}); "
        run = f"nsenter -t {pids[name]} -m /opt/chatd/bin/python -c"
        for path in (dbs, {k: v[:-2] + "secret" for k, v in dbs.items()}):
            code = f"{become}print(len(open('{path[name]}', 'rb').read(16)))"
            assert machine.run(f'{run} "{code}"') == "16", path[name]
            code = f"{become}open('{path[other]}', 'rb')"
            refused = machine.run(f'{run} "{code}"', check=False)
            assert re.search("PermissionError|FileNotFoundError", refused), refused
        # Its user cannot without the sandbox either.
        folder = str(Path(dbs[name]).parent)
        modes = machine.run(f"stat -L -c '%a %u' {folder} {folder}/chatd.*")
        assert set(modes.split("\n")) == {f"700 {users[name]}", f"600 {users[name]}"}
        ids = f"--reuid={users[name]} --regid={users[name]} --clear-groups"
        refused = machine.run(f"setpriv {ids} cat {dbs[other]}", check=False)
        assert "Permission denied" in refused, refused
        # Nor can it reach the socket of the other.
        connect = "import socket; socket.socket(socket.AF_UNIX).connect"
        code = f"{become}{connect}('{sockets[other]}')"
        refused = machine.run(f'{run} "{code}"', check=False)
        assert "PermissionError" in refused, refused
        mode = machine.run(f"stat -c '%a %U %G' {sockets[name]}")
        assert mode == "660 root www-data", mode
        code = f"{connect}('{sockets[name]}')"
        ids = "--reuid=www-data --regid=www-data --clear-groups"
        assert machine.run(f'setpriv {ids} python3 -c "{code}"') == ""


def administer_instance(
    machine: Machine, clients: Clients, dbs: dict[str, str], sockets: dict[str, str]
) -> None:
    """Run the page's commands for an instance, its backups and the upgrade."""
    shop = machine.show("MainPID", "chatd@shop")
    link, checked, *_ = machine.run(commands("chatd@club/chatd.db > club")).split("\n")
    status, session = clients.request(
        "POST", "/api/v1/session", link.partition("#token=")[2], at=sockets["club"]
    )
    assert (status, session["name"]) == (200, "Anna"), session
    assert ": ok: " in checked, checked
    assert "only the club" in machine.run("cat club.jsonl")
    assert "# TYPE" in machine.run(commands("curl --unix-socket"))
    machine.run(commands("chatd restore club.db"))
    assert clients.request("GET", "/healthz", at=sockets["club"])[0] == 200
    assert "only the club" in stored_titles(machine, dbs["club"])
    owners = machine.run("stat -L -c %u /var/lib/chatd@club/chatd.*").split("\n")
    assert len({*owners} | {"0"}) == 2, owners

    # While the socket is stopped, nobody can start the instance.
    machine.run("systemctl stop chatd@club.socket")
    assert machine.show("ActiveState", "chatd@club") == "inactive"
    assert machine.run("ls /run/chatd@*") == sockets["shop"]
    assert machine.show("MainPID", "chatd@shop") == shop
    machine.run("systemctl start chatd@club")

    # The page's three lines, in the two files of the timer.
    (lines,) = re.findall(r"(?s)```ini\n(ExecStart=\S+ backup.*?)```", PAGE)
    written = {p: t for p, t in unit_files().items() if "/chatd-backup." in p}
    made = {}
    for path, text in written.items():
        new = text
        for line in lines.splitlines() if path.endswith("service") else ():
            key = line.partition("=")[0]
            new, count = re.subn(rf"(?m)^{key}=.*$", line, new)
            assert count == 1, line
        made[path.replace("chatd-backup.", "chatd-backup@.")] = new
    for path, text in made.items():
        machine.write(path, text)
    verify_units(machine, *(p.replace("@.", "@club.") for p in sorted(made)))
    machine.run("systemctl enable --now chatd-backup@club.timer")
    machine.run("systemctl start chatd-backup@club chatd-backup@shop")
    for name in dbs:
        (copy,) = machine.run(
            f"find /var/lib/chatd-backup@{name}/ -name '*.db'"
        ).split()
        assert (name == "club") == ("only the club" in stored_titles(machine, copy))
    machine.run("systemctl disable --now chatd-backup@club.timer")
    machine.run(f"rm -r /var/lib/private/chatd-backup@* /var/lib/chatd-backup@* "
                f"{' '.join(made)}; systemctl daemon-reload")  # fmt: skip

    machine.run(commands("restart 'chatd@*.service'"), online=True)
    for name in dbs:
        (copy,) = machine.run(f"ls chatd@{name}-*.db").split()
        assert ": ok: " in machine.run(f"{BIN} check --db {copy}")
        assert clients.request("GET", "/healthz", at=sockets[name])[0] == 200
    assert machine.show("MainPID", "chatd@shop") != shop, "it was not restarted"


def stored_titles(machine: Machine, db: str) -> str:
    """The export of a database, which has the titles of all chats."""
    return machine.run(f"{BIN} export --db {db}")


def remove_instances(machine: Machine, clients: Clients, dbs: dict[str, str]) -> None:
    """Remove them as on the page; the other goes on until it is removed, too."""
    block = commands("clean --what=state chatd@club")
    for name in dbs:
        machine.run(block.replace("club", name))
        left = machine.run(f"find /etc/systemd /var/lib /run -name 'chatd@{name}*'")
        assert left == "", left
        if name == "club":
            assert machine.show("SubState", "chatd@shop") == "running"
    machine.run(f"rm {UNITS}/chatd@.*; systemctl daemon-reload")
    assert clients.request("GET", "/healthz")[0] == 200


def upgrade(machine: Machine, clients: Clients) -> str:
    """Upgrade as on the page, twice on one day, while clients connect."""
    with clients.load() as load:
        *steps, restart, _ = commands("git pull\nsudo").split("\n")
        for _ in range(2):
            machine.run("\n".join(steps), online=True)
            machine.run(restart)
    verify_acks(machine, load)
    version = machine.run(f"{BIN} --version")
    assert version.startswith("chatd 999."), version
    stats = clients.token(f"1 --scope stats --db {DB}")
    _, document = clients.request("GET", "/api/v1/internal/chat/ws/stats", stats)
    assert f"chatd {document['version']}" == version
    copies = machine.run("ls chatd-20*.db").split()
    assert len(copies) == 2, copies
    for copy in copies:
        assert ": ok: " in machine.run(f"{BIN} check --db {copy}")
    return load.verify_none_refused()


def stop(machine: Machine, clients: Clients) -> str:
    """Stop: exit status 0, no listening socket and no WAL are left."""
    began = time.monotonic()
    machine.run("systemctl stop chatd")
    seconds = time.monotonic() - began
    assert machine.show("Result") == "success"
    assert machine.show("ExecMainStatus") == "0"
    assert machine.show("NFileDescriptorStore") == "0"
    assert clients.refused()
    assert not Path(machine.root / f"{DB.lstrip('/')}-wal").exists()
    machine.run("systemctl start chatd")
    return f"status 0 after {seconds:.2f} s"


def removal(machine: Machine, clients: Clients) -> str:
    """Remove as on the page: nothing is left."""
    machine.run(commands("clean --what=state chatd\n"))
    machine.run(
        f"systemctl disable --now chatd-backup.timer; rm {UNITS}/chatd-backup.*"
    )
    left = machine.run(
        "find /opt /etc/systemd /var/lib -name 'chatd*' -not -path '*/chatd-backup*'"
    )
    assert left == "", left
    assert clients.refused()
    return "nothing left"


STEPS: list[Callable[[Machine, Clients], str]] = [
    install, sandbox, restarts, killed, hung, crash_loop, restart_delay, wrong_use,
    settings, addresses, firewall, credential, administration, backups, socket_unit,
    unix_socket, proxy_unit, instances, upgrade, stop, removal,
]  # fmt: skip


def main() -> int:
    """Boot, run the steps, and clean up; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", metavar="TREE", type=Path, default=Path("/"))
    tree = parser.parse_args().root.resolve()
    began = time.monotonic()
    # A signal must not leave mounts behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        with Machine(tree) as machine:
            system = machine.run(". /etc/os-release; echo $PRETTY_NAME")
            version = machine.run("systemctl --version | head -n 1")
            seconds = time.monotonic() - began
            print(f"booted in {seconds:.1f} s: {system}, {version}", flush=True)
            clients = Clients(machine)
            for step in STEPS:
                started = time.monotonic()
                try:
                    found = step(machine, clients)
                except BaseException:
                    print(f"FAILED  {step.__name__}: {step.__doc__}", flush=True)
                    print(machine.run("journalctl -u 'chatd*' --no-pager | tail -n 60"))
                    raise
                seconds = time.monotonic() - started
                name = step.__name__.replace("_", " ")
                print(f"ok {seconds:5.1f} s  {name}: {found}", flush=True)
    except CannotRun as why:
        print(f"cannot run here: {why}")
        return 0 if tree == Path("/") else 1
    print(f"{len(STEPS)} steps passed, in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
