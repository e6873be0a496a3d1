"""Operations: systemd, its sockets, backup, restore, check, damaged databases."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

import chatd
from chatd import Settings, UsageError
from tests.client import (
    CHECKOUT,
    HASTY,
    MISTAKE,
    WAIT_SECONDS,
    Progress,
    RawClient,
    ServerProcess,
    clean_environment,
    new_users,
    request_bytes,
    run_chatd,
    run_on_a_terminal,
    wait_until,
)
from tests.harness import Memory, VirtualServer, with_server

# --- notifications to systemd --------------------------------------------------------


@with_server()
async def test_a_commit_that_hangs_for_60_s_ends_the_watchdog_messages(
    server: VirtualServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.setblocking(False)
        address = f"\0chatd-with_server-{os.getpid()}"
        systemd.bind(address)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        systemd.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)

        async def notifications(seconds: float) -> list[bytes]:
            received = []
            for _ in range(round(seconds)):
                await trio.sleep(1)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        received.append(systemd.recv(100))
            return received

        alive = b"WATCHDOG=1\nSTATUS=sockets: 0"
        assert set(await notifications(10)) == {alive}
        server.disk.hold()
        raw = server.dial()
        auth = f"Bearer {server.token(6)}"
        await raw.send(
            request_bytes("POST", "/api/v1/chats", b"{}", Authorization=auth)
        )
        assert 58 <= len(await notifications(70)) <= 61
        assert await notifications(60) == []
        server.disk.go()
        assert set(await notifications(3)) == {alive}
        monkeypatch.delenv("NOTIFY_SOCKET")


@with_server()
async def test_a_systemd_that_reads_nothing_delays_nothing(
    server: VirtualServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "chatd")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other,
    ):
        address = f"\0chatd-deaf-{os.getpid()}"
        systemd.bind(address)
        other.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                other.sendto(b"WATCHDOG=1", address)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        began = time.monotonic()
        await trio.sleep(3)
        assert time.monotonic() - began < 30
        assert "notify_failed" in caplog.text
        monkeypatch.delenv("NOTIFY_SOCKET")


# --- under a service manager ---------------------------------------------------------


# Run a program as systemd does, with the sockets as descriptors 3, 4, ...
# (sd_listen_fds).
EXEC_WITH_SOCKETS = """
import fcntl, os, sys
fds = [int(word) for word in sys.argv[1].split(",") if word]
for n, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]):
    os.dup2(fd, 3 + n)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class ServiceManager:
    """Stands in for systemd: reads sd_notify(3), keeps sockets, and passes them on."""

    def __init__(self, home: Path, *, store_max: int = 8) -> None:
        self.home, self.store_max = home, store_max
        self.address = str(home / "notify")
        self.inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.inbox.setblocking(False)
        self.inbox.bind(self.address)
        self.store: list[tuple[str, socket.socket]] = []
        self.given: list[tuple[str, socket.socket]] = []  # from a socket unit
        self.received: list[str] = []  # from the process that runs now
        self.news = Progress()
        self.process: trio.Process | None = None

    async def receive(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.inbox)
            text, fds, _, _ = socket.recv_fds(self.inbox, 4096, 64)
            lines = text.decode().split("\n")
            words = dict(line.split("=", 1) for line in lines)
            self.received += lines
            name = words.get("FDNAME", "stored")
            if words.get("FDSTOREREMOVE") == "1":
                self.drop(name)
            for sock in (socket.socket(fileno=fd) for fd in fds):
                known = [os.fstat(kept.fileno()) for _, kept in self.store]
                full = len(self.store) >= self.store_max
                if full or os.fstat(sock.fileno()) in known or "FDSTORE" not in words:
                    sock.close()
                else:
                    self.store.append((name, sock))
            self.news.add()

    def drop(self, *names: str) -> None:
        for name, sock in self.store:
            if not names or name in names:
                sock.close()
        self.store = [(name, sock) for name, sock in self.store if sock.fileno() >= 0]

    async def start(self, *flags: object, pid: str = "") -> None:
        """Start chatd, and wait for READY=1."""
        passed = [*self.given, *self.store]
        self.received.clear()
        fds = [sock.fileno() for _, sock in passed]
        with (self.home / "out").open("ab") as out:
            self.process = await trio.lowlevel.open_process(
                [
                    *(sys.executable, "-c", EXEC_WITH_SOCKETS, ",".join(map(str, fds))),
                    *("-m", "chatd", "serve", "--db", str(self.home / "chatd.db")),
                    *map(str, flags),
                ],
                cwd=CHECKOUT,
                env=clean_environment(
                    NOTIFY_SOCKET=self.address,
                    LISTEN_FDS=str(len(fds)),
                    LISTEN_FDNAMES=":".join(name for name, _ in passed),
                ),
                stdout=out,
                stderr=out,
                pass_fds=fds,
            )
        await self.wait_for("READY=1")

    async def wait_for(self, line: str) -> None:
        with trio.fail_after(WAIT_SECONDS):
            while line not in self.received:
                await self.news.reaches(self.news.value + 1)

    async def stop(self, signum: int = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(signum)
        with trio.fail_after(WAIT_SECONDS):
            status = await self.process.wait()
        assert status == (0 if signum == signal.SIGTERM else -signum), self.output

    @property
    def output(self) -> str:
        return (self.home / "out").read_text("utf-8")

    @property
    def kept(self) -> list[tuple[str, int]]:
        """The addresses at which the sockets in the store listen: of TCP, and paths."""
        names = [sock.getsockname() for _, sock in self.store]
        return [(name, 0) if isinstance(name, str) else name[:2] for name in names]

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    def tidy(self) -> None:
        self.drop()
        for sock in (self.inbox, *(sock for _, sock in self.given)):
            sock.close()


@asynccontextmanager
async def service_manager(
    home: Path, *, store_max: int = 8
) -> AsyncIterator[ServiceManager]:
    manager = ServiceManager(home, store_max=store_max)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(manager.receive)
            yield manager
            nursery.cancel_scope.cancel()
    finally:
        with trio.move_on_after(WAIT_SECONDS, shield=True):
            await manager.kill()
        manager.tidy()


async def health_status(host: str, port: int = 0) -> int:
    """Ask for /healthz on a new connection; return the status of the answer.

    host may be the path of a Unix socket.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if host.startswith("/"):
        family = socket.AF_UNIX
    with trio.socket.socket(family) as sock, trio.fail_after(WAIT_SECONDS):
        await sock.connect((host, port) if port else host)
        return (await RawClient(trio.SocketStream(sock)).ask("GET", "/healthz")).status


async def test_ten_restarts_refuse_no_connection_and_answer_every_one(
    tmp_path: Path,
) -> None:
    async with service_manager(tmp_path) as manager, trio.open_nursery() as nursery:
        await manager.start("--listen", "127.0.0.1:0")
        ((host, port),) = manager.kept
        answered = Progress()

        async def connect() -> None:
            while True:  # a refused connection, or one without an answer, raises
                assert await health_status(host, port) in (200, 503)
                answered.add()

        for _ in range(3):
            nursery.start_soon(connect)
        for _ in range(10):
            with trio.fail_after(WAIT_SECONDS):
                await answered.reaches(answered.value + 10)
            await manager.stop()
            await manager.wait_for("STOPPING=1")
            await manager.start("--listen", "127.0.0.1:0")
            assert manager.kept == [(host, port)]
        await answered.reaches(answered.value + 10)
        nursery.cancel_scope.cancel()
    assert manager.output.count(f"listening on http://{host}:{port}\n") == 11
    assert not MISTAKE.search(manager.output)


async def test_clients_that_connect_between_two_processes_are_answered_by_the_next(
    tmp_path: Path,
) -> None:
    async with service_manager(tmp_path) as manager:
        await manager.start("--listen", "127.0.0.1:0")
        ((host, port),) = manager.kept
        for signum in (signal.SIGTERM, signal.SIGKILL):
            await manager.stop(signum)
            statuses: list[int] = []

            async def connect(found: list[int] = statuses) -> None:
                found.append(await health_status(host, port))

            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(connect)
                await wait_all_tasks_blocked()
                assert statuses == []
                await manager.start("--listen", f"{host}:{port}")
            assert statuses == [200] * 50


@pytest.mark.parametrize("store_max", [8, 1])
async def test_a_name_with_two_addresses_listens_at_both_after_a_restart(
    tmp_path: Path, store_max: int
) -> None:
    found = socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)
    hosts = list(dict.fromkeys(str(address[0]) for *_, address in found))
    async with service_manager(tmp_path, store_max=store_max) as manager:
        # Both addresses need the same port, so port 0 does not do.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for _ in range(3):
            await manager.start("--listen", f"localhost:{port}")
            for host in hosts:
                assert await health_status(host, port) == 200
            assert len(manager.kept) == min(store_max, len(hosts))
            await manager.stop()


class Resolver(trio.abc.HostnameResolver):
    """Resolves every name to the given addresses."""

    def __init__(self, *hosts: str) -> None:
        self.hosts = hosts

    async def getaddrinfo(self, _host: Any, port: Any, *_: Any) -> Any:
        found = [(host, ":" in host) for host in self.hosts]
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (host, int(port), 0, 0))
            if v6
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, int(port)))
            for host, v6 in found
        ]

    async def getnameinfo(self, *_: Any) -> Any:
        raise NotImplementedError


async def test_each_address_gets_the_socket_that_systemd_kept_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosts = ["127.0.0.5", "127.0.0.4", "127.0.0.3"]
    trio.socket.set_custom_hostname_resolver(Resolver(*hosts, hosts[0]))
    with contextlib.ExitStack() as stack:
        first = await chatd._listen_at(["name.test:0"], [])
        for sock in first:
            stack.callback(sock.close)
        assert [sock.getsockname()[0] for sock in first] == hosts
        stale = stack.enter_context(socket.create_server(("127.0.0.6", 0)))
        kept = [first[2], stale, first[0]]
        second = await chatd._listen_at(["name.test:0"], kept)
        stack.callback(second[1].close)
        assert second[0] is first[0]
        assert second[2] is first[2]
        assert second[1].getsockname()[0] == hosts[1]
        assert stale.fileno() == -1
        # Another port is another address.
        port = first[0].getsockname()[1] % 65535 + 1
        assert not chatd._is_at(first[0], socket.AF_INET, (hosts[0], port))


@pytest.mark.parametrize(
    "lacking", [("198.51.100.7",), ("2001:db8::7",), ("198.51.100.7", "2001:db8::7")]
)
async def test_addresses_that_this_machine_lacks_are_skipped_unless_no_other_is_left(
    lacking: tuple[str, ...],
) -> None:
    for hosts in ((*lacking, "127.0.0.3"), ("127.0.0.3", *lacking)):
        trio.socket.set_custom_hostname_resolver(Resolver(*hosts))
        (only,) = await chatd._listen_at(["name.test:0"], [])
        with only:
            assert only.getsockname()[0] == "127.0.0.3"
    trio.socket.set_custom_hostname_resolver(Resolver(*lacking))
    with pytest.raises(UsageError, match=r"--listen name\.test:1: Cannot assign"):
        await chatd.open_listeners(["name.test:1"])


async def test_a_name_is_served_on_a_machine_without_ipv6(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class WithoutIpv6(socket.socket):
        def __init__(self, family: int = -1, *more: Any, **named: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "no IPv6")
            super().__init__(family, *more, **named)

    monkeypatch.setattr(socket, "socket", WithoutIpv6)
    trio.socket.set_custom_hostname_resolver(Resolver("::1", "127.0.0.1"))
    (only,) = await chatd._listen_at(["localhost:0"], [])
    with only:
        assert only.getsockname()[0] == "127.0.0.1"
    for listen in ("[::1]:0", "[::]:0"):
        trio.socket.set_custom_hostname_resolver(Resolver(listen[1:-3]))
        with pytest.raises(UsageError, match=r"--listen \[::1?\]:0: no IPv6; choose"):
            await chatd.open_listeners([listen])


async def test_a_unix_socket_keeps_its_clients_over_a_restart(tmp_path: Path) -> None:
    path = str(tmp_path / "chatd.sock")
    listen = ("--listen", f"unix:{path}", "--listen", "127.0.0.1:0")
    async with service_manager(tmp_path) as manager:
        await manager.start(*listen)
        for signum in (signal.SIGTERM, signal.SIGKILL):
            inode = os.stat(path).st_ino
            await manager.stop(signum)
            statuses: list[int] = []

            async def connect(found: list[int] = statuses) -> None:
                found.append(await health_status(path))

            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(connect)
                await wait_all_tasks_blocked()
                assert statuses == []
                await manager.start(*listen)
            assert statuses == [200] * 20
            assert os.stat(path).st_ino == inode
            assert (path, 0) in manager.kept
            assert len(manager.kept) == 2
        # A kept socket that no client can reach any more is of no use.
        await manager.stop()
        os.unlink(path)
        await manager.start(*listen)
        assert await health_status(path) == 200
        await manager.stop()
        await manager.start(*listen[2:])
        assert [port > 0 for _, port in manager.kept] == [True]
        with pytest.raises(ConnectionRefusedError):
            await health_status(path)
        await manager.stop()


async def test_a_kept_socket_at_another_address_is_closed(tmp_path: Path) -> None:
    async with service_manager(tmp_path) as manager:
        await manager.start("--listen", "127.0.0.1:0")
        ((_, port),) = manager.kept
        await manager.stop()
        # The new address includes the old one, so the old socket must be closed first.
        await manager.start("--listen", f"0.0.0.0:{port}")
        assert manager.kept == [("0.0.0.0", port)]
        assert await health_status("127.0.0.2", port) == 200
        await manager.stop()
        await manager.start("--listen", f"127.0.0.2:{port}")
        assert manager.kept == [("127.0.0.2", port)]
        assert await health_status("127.0.0.2", port) == 200
        with pytest.raises(ConnectionRefusedError):
            await health_status("127.0.0.1", port)
        await manager.stop()


async def test_a_kept_socket_that_no_longer_listens_is_replaced(tmp_path: Path) -> None:
    async with service_manager(tmp_path) as manager:
        await manager.start("--listen", "127.0.0.1:0")
        ((_, sock),) = manager.store
        address = sock.getsockname()
        await manager.stop()
        sock.shutdown(socket.SHUT_RDWR)
        await manager.start("--listen", "{}:{}".format(*address))
        assert await health_status(*address) == 200
        await manager.stop()


async def test_the_sockets_of_a_socket_unit_are_served_and_not_kept(
    tmp_path: Path,
) -> None:
    async with service_manager(tmp_path) as manager:
        await manager.start("--listen", "127.0.0.1:0")
        ((_, old),) = manager.kept
        await manager.stop()
        for host in ("127.0.0.1", "127.0.0.2"):
            sock = socket.create_server((host, 0))
            manager.given.append(("chatd.socket", sock))
        addresses = [sock.getsockname()[:2] for _, sock in manager.given]
        for path in (str(tmp_path / "chatd.sock"), f"\0chatd-unit-{os.getpid()}"):
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(path)
            sock.listen()
            manager.given.append(("chatd.socket", sock))
        addresses.append((str(tmp_path / "chatd.sock"),))
        for _ in range(2):
            await manager.start("--listen", f"127.0.0.1:{old}")
            for address in addresses:
                assert await health_status(*address) == 200
            assert manager.kept == []
            with pytest.raises(ConnectionRefusedError):
                await health_status("127.0.0.1", old)
            await manager.stop()


async def test_a_descriptor_that_is_no_listening_stream_is_refused_at_start(
    tmp_path: Path,
) -> None:
    local = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    silent = socket.socket()
    local.bind(str(tmp_path / "local"))
    local.listen()
    silent.bind(("127.0.0.1", 0))
    with (tmp_path / "file").open("w") as file, local, silent:
        for fd in (local.fileno(), silent.fileno(), file.fileno()):
            done = await trio.run_process(
                [
                    *(sys.executable, "-c", EXEC_WITH_SOCKETS, str(fd)),
                    *("-m", "chatd", "serve", "--db", str(tmp_path / "chatd.db")),
                    *("--listen", "127.0.0.1:0"),
                ],
                cwd=CHECKOUT,
                env=clean_environment(LISTEN_FDS="1", LISTEN_FDNAMES="x.socket"),
                pass_fds=[fd],
                capture_stderr=True,
                check=False,
            )
            assert done.returncode == 1, done
            assert b"chatd: LISTEN_FDS: descriptor 3" in done.stderr, done
            assert not MISTAKE.search(done.stderr.decode()), done


async def test_passed_sockets_are_taken_once_and_not_inherited(tmp_path: Path) -> None:
    program = """
import chatd, os
given, _ = chatd.passed_sockets()
print(len(given), len(chatd.passed_sockets()[0]))
print(os.get_inheritable(3), [n for n in os.environ if n.startswith("LISTEN_")])
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for before, count in {
            "": "1",
            "os.environ['LISTEN_PID'] = '1'": "0",
            "del os.environ['LISTEN_FDS']": "0",
            "os.environ['LISTEN_FDS'] = 'x'": "0",
        }.items():
            done = await trio.run_process(
                [
                    *(sys.executable, "-c", EXEC_WITH_SOCKETS, str(server.fileno())),
                    *("-c", f"import os\n{before}\n{program}"),
                ],
                cwd=CHECKOUT,
                env=clean_environment(LISTEN_FDS="1"),
                pass_fds=[server.fileno()],
                capture_stdout=True,
            )
            first, second = done.stdout.decode().splitlines()
            assert first == f"{count} 0"
            assert second.endswith("[]")
            assert count == "0" or second.startswith("False")


# --- backup, restore, check ----------------------------------------------------------


async def test_a_backup_keeps_the_newest_copies_and_touches_no_other_file(
    server: ServerProcess, tmp_path: Path
) -> None:
    folder = tmp_path / "copies"
    async with server.serving():
        words = ("backup", "--db", server.db, "--keep", "2", folder)
        missing = await run_chatd(*words)
        assert (missing.status, str(folder) in missing.err) == (1, True)
        folder.mkdir()
        others = {"chatd.db", "chatd-20200101T000000Z.db.bak", "notes-2020.db"}
        old = [f"chatd-2020010{n}T000000Z.db" for n in range(1, 4)]
        left = "chatd-20200101T000000Z.db.0123abcd.partial"
        for name in (*others, *old, left):
            (folder / name).write_text(name)
        others |= {"chatd-20200104T000000Z.db", "chatd-20200105T000000Z.db"}
        (folder / "chatd-20200104T000000Z.db").mkdir()
        (folder / "chatd-20200105T000000Z.db").symlink_to("nothing")
        done = await run_chatd(*words)
        assert done.status == 0, done
        copy = Path(done.out.strip())
        assert re.fullmatch(r"chatd-\d{8}T\d{6}Z\.db", copy.name)
        assert {p.name for p in folder.iterdir()} == {*others, old[-1], copy.name}
        assert (await run_chatd("check", "--db", copy)).status == 0
        # A backup that fails removes nothing, and --keep 5 keeps all three.
        failed = await run_chatd(*words[:1], "--keep", "1", folder, "--db", folder)
        assert failed.status == 1
        more = await run_chatd("backup", "--db", server.db, "--keep", "5", folder)
        copies = {old[-1], copy.name, Path(more.out.strip()).name}
        assert len(copies) == 3
        assert {p.name for p in folder.iterdir()} == {*others, *copies}
        # A name has whole seconds: a second backup takes the next one.
        for _ in range(2):
            await trio.to_thread.run_sync(chatd.backup, server.db, folder, 9)
        made = [p for p in folder.glob("chatd-2*Z.db") if p.is_file()]
        assert len(made) == 5


# --- damaged databases ---------------------------------------------------------------

# Each function damages a database file in a way that `chatd check` finds.


def execute(db: Path, sql: str) -> None:
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        connection.execute(sql)


def drop_last_page(db: Path) -> None:
    os.truncate(db, db.stat().st_size // 4096 * 4096 - 4096)


def cut_within_a_page(db: Path) -> None:
    os.truncate(db, db.stat().st_size - 1000)


def empty(db: Path) -> None:
    os.truncate(db, 0)


def zero_a_page(db: Path) -> None:
    with db.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(bytes(4096))


def overwrite_the_header(db: Path) -> None:
    with db.open("r+b") as file:
        file.write(b"garbage")


def overwrite_all_but_the_first_page(db: Path) -> None:
    with db.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (db.stat().st_size - 4096))


def delete_an_event(db: Path) -> None:
    execute(db, "DELETE FROM event WHERE seq = 2")


def rename_an_event_kind(db: Path) -> None:
    execute(db, "UPDATE event SET kind = 'strange' WHERE seq = 100")


def make_an_index_disagree(db: Path) -> None:
    """Make an index disagree with its table, as a lost write does."""
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.executescript(
            """PRAGMA writable_schema = ON;
            UPDATE sqlite_schema SET sql = replace(sql, '(user_id)', '(chat_id)')
            WHERE name = 'member_user'"""
        )


def cut_one_byte(db: Path) -> None:
    os.truncate(db, db.stat().st_size - 1)


def leave_one_byte(db: Path) -> None:
    db.write_bytes(b"x")


def set_a_negative_version(db: Path) -> None:
    execute(db, "PRAGMA user_version = -1")


def drop_an_index(db: Path) -> None:
    execute(db, "DROP INDEX event_chat")


def drop_a_table(db: Path) -> None:
    execute(db, "DROP TABLE meta")


def delete_the_epoch(db: Path) -> None:
    execute(db, "DELETE FROM meta")


def set_version_zero(db: Path) -> None:
    execute(db, "PRAGMA user_version = 0")


DAMAGE = [
    drop_last_page, cut_within_a_page, empty, zero_a_page, overwrite_the_header,
    overwrite_all_but_the_first_page, delete_an_event, make_an_index_disagree,
    set_version_zero, cut_one_byte, leave_one_byte, set_a_negative_version,
    drop_an_index, drop_a_table, delete_the_epoch, rename_an_event_kind,
]  # fmt: skip
# Damage that does not stop `chatd serve`: only `chatd check` finds it.
STARTS_ANYWAY = [
    empty, delete_an_event, make_an_index_disagree, delete_the_epoch,
]  # fmt: skip


@pytest.fixture(scope="module")
def sound_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with several pages in its tables."""
    memory = Memory(tmp_path_factory.mktemp("sound"))
    chat = memory.chat(1, 2)
    for _ in range(20):
        memory.commit(*[memory.sends(chat, 1)] * 10)
    memory.store.close()
    return memory.settings.db


def files_in(folder: Path) -> dict[str, bytes]:
    """Read the files of a folder; of what is no file, give the name."""
    return {p.name: p.read_bytes() if p.is_file() else b"" for p in folder.iterdir()}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_database_is_not_copied_and_no_backup_is_lost(
    damage: Callable[[Path], None], sound_db: Path, tmp_path: Path
) -> None:
    db, folder = tmp_path / "chatd.db", tmp_path / "copies"
    shutil.copy(sound_db, db)
    folder.mkdir()
    first = await run_chatd("backup", "--db", db, "--keep", "1", folder)
    assert first.status == 0, first
    damage(db)
    copies, files = files_in(folder), files_in(tmp_path)
    assert len(copies) == 1
    for words in (("--keep", "1", folder), (tmp_path / "copy.db",)):
        done = await run_chatd("backup", "--db", db, *words)
        assert (done.status, done.out) == (1, ""), done
        assert f"database {db}: " in done.err, done
        assert "copy" not in done.err.replace(str(folder), ""), done
    assert files_in(folder) == copies
    assert files_in(tmp_path) == files
    checked = await run_chatd("check", "--db", db)
    assert checked.status == 1
    # A restore does not put it in place of another database.
    shutil.copy(sound_db, folder / "other.db")
    before = files_in(folder)
    restored = await run_chatd("restore", db, "--db", folder / "other.db")
    assert restored.status == 1
    assert f"restore {db}: " in restored.err
    assert files_in(folder) == before


@pytest.mark.parametrize("damage", [d for d in DAMAGE if d not in STARTS_ANYWAY])
async def test_a_damaged_database_is_not_served_and_the_error_says_what_to_do(
    damage: Callable[[Path], None],
    sound_db: Path,
    server: ServerProcess,
    tmp_path: Path,
) -> None:
    copy = tmp_path / "copy.db"
    shutil.copy(sound_db, server.db)
    assert (await run_chatd("backup", "--db", server.db, copy)).status == 0
    damage(server.db)
    before = server.db.read_bytes()
    done = await run_chatd("serve", "--listen=127.0.0.1:0", "--db", server.db)
    assert (done.status, done.out) == (1, ""), done
    assert f"database {server.db}: damaged: " in done.err
    for command in ("check", "restore BACKUP"):
        assert f"`chatd {command} --db {server.db}`" in done.err
    assert server.db.read_bytes() == before
    assert (await run_chatd("restore", copy, "--db", server.db)).status == 0
    async with server.serving():
        await server.want(200, "GET /healthz")


async def test_an_event_of_an_unknown_kind_is_never_sent_as_another(
    server: ServerProcess, tmp_path: Path
) -> None:
    memory = Memory(tmp_path)
    chat = memory.chat(1, 2)
    for _ in range(3):
        memory.send(chat, 1)
    memory.chat(1, 3)  # a start reads no event before this one
    memory.store.close()
    with contextlib.closing(sqlite3.connect(server.db)) as db, db:
        db.execute("UPDATE event SET kind = 'strange' WHERE seq = 4")
    async with server.serving():
        head = await server.cursor(2)
        epoch = head.partition(".")[0]
        for cursor, events in ((f"{epoch}.4", [5]), (f"{epoch}.3", None)):
            poll = await server.ask(
                "GET", f"/api/v1/events?cursor={cursor}", server.token(2)
            )
            peer = await server.peer(2, cursor)
            if events is None:
                assert (poll.status, poll.code) == (503, "storage_failed")
                assert await peer.ended() == chatd.CLOSE_LATER
                continue
            assert [event["seq"] for event in poll.json["events"]] == events
            assert (await peer.receive("new_message"))["seq"] == 5
            await peer.leave()
    done = await run_chatd("check", "--db", server.db)
    assert done.status == 1
    assert "event 4: of the unknown kind strange" in done.out + done.err


async def test_an_empty_file_beside_a_wal_is_not_a_new_database(
    server: ServerProcess,
) -> None:
    async with server.serving():
        await server.chat(next(new_users))
        await server.kill()
    wal = server.db.with_name("chatd.db-wal")
    kept = wal.read_bytes()
    assert kept
    # The same through a link, and for every command.
    link = server.home / "link.db"
    link.symlink_to(server.db)
    shutil.copy(server.db.with_name("chatd.secret"), server.home / "link.secret")
    other = server.home / "other.db"
    for db in (server.db, link):
        for words in (
            ("serve", "--listen=127.0.0.1:0", "--db", db), ("check", "--db", db),
            ("backup", other, "--db", db), ("restore", db, "--db", other),
        ):  # fmt: skip
            empty(server.db)
            done = await run_chatd(*words)
            assert done.status == 1, done
            assert "damaged: it is empty, and its -wal is not" in done.err, done
            assert wal.read_bytes() == kept
            assert not other.exists()
    server.db.unlink()
    done = await run_chatd("serve", "--listen=127.0.0.1:0", "--db", server.db)
    assert "damaged: it is empty, and its -wal is not" in done.err
    assert wal.read_bytes() == kept


async def test_a_new_database_has_chatds_application_id_even_without_its_wal(
    server: ServerProcess,
) -> None:
    """Without the id, a damaged -wal would make the database look like a new file."""
    async with server.serving():
        await server.kill()
        with contextlib.suppress(FileNotFoundError):
            server.db.with_name("chatd.db-wal").unlink()
        with contextlib.closing(sqlite3.connect(server.db)) as db:
            (found,) = db.execute("PRAGMA application_id").fetchone()
        assert found == chatd.APPLICATION_ID


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("verb", ["backup", "restore"])
def test_a_signal_during_a_copy_prints_a_sentence_and_leaves_no_file(
    verb: str, number: int, sound_db: Path, tmp_path: Path
) -> None:
    db, path = tmp_path / "chatd.db", tmp_path / "copy.db"
    shutil.copy(sound_db, db)
    if verb == "restore":
        shutil.copy(sound_db, path)
    before = files_in(tmp_path)
    # The process signals itself in the middle of the copy: the partial file exists.
    program = (
        "import os, signal, sys, chatd; copy = chatd.faults\n"
        # A shell may start what runs in the background with these ignored.
        f"signal.signal({int(number)}, signal.SIG_DFL)\n"
        f"end = lambda: os.kill(os.getpid(), {int(number)})\n"
        "chatd.faults = lambda path: (end(), copy(path))[1]\n"
        "sys.exit(chatd.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, verb, path, "--db", db],
        capture_output=True, text=True, check=False, cwd=CHECKOUT,
        env=clean_environment(), timeout=WAIT_SECONDS,
    )  # fmt: skip
    name = signal.Signals(number).name
    assert done.returncode == 1, done
    assert done.stderr.endswith(f"chatd: ended by {name}, before it was done\n"), done
    assert files_in(tmp_path) == before


async def test_the_start_logs_whether_it_checked_the_database(
    server: ServerProcess, sound_db: Path
) -> None:
    shutil.copy(sound_db, server.db)
    size = len(files_in(server.home)["chatd.db"])
    for limit, verb in ((size, "checked"), (size - 1, "unchecked")):
        async with server.serving(f"--check-bytes={limit}"):
            pass
        (line,) = re.findall(
            rf"(?m)^\S+ (INFO (?:un)?checked .* bytes={size} .*)", server.output
        )
        (server.home / "stderr").unlink()
        assert line.startswith(f"INFO {verb} db="), line
    assert Settings().check_bytes == 32 * 2**20


# The largest file, in KiB. To read a database, SQLite needs a -shm of 32.
@pytest.mark.parametrize("blocks", [32, 40])
async def test_a_copy_that_runs_out_of_space_leaves_nothing_behind(
    blocks: int, sound_db: Path, tmp_path: Path
) -> None:
    db, folder = tmp_path / "chatd.db", tmp_path / "copies"
    shutil.copy(sound_db, db)
    folder.mkdir()
    (folder / "chatd-20260101T000000Z.db").write_bytes(b"old")
    before = files_in(folder), files_in(tmp_path)
    for words in (("backup", "--keep", "1", folder), ("restore", sound_db)):
        chatd_at = [sys.executable, "-m", "chatd", *map(str, words), "--db", str(db)]
        done = await trio.run_process(
            ["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "-", *chatd_at],
            capture_stderr=True, check=False, cwd=CHECKOUT,
            env={
                k: v for k, v in clean_environment().items() if "COVERAGE" not in k
            },
        )  # fmt: skip
        assert done.returncode == 1, done
        assert re.search(rb"chatd: \w+ .*(copying failed|disk I/O)", done.stderr), done
        assert (files_in(folder), files_in(tmp_path)) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
async def test_root_follows_no_link_in_a_folder_of_the_units_user(
    server: ServerProcess, tmp_path: Path
) -> None:
    """An attacker with the unit's rights must not become root through a link."""
    async with server.serving():
        await server.chat(next(new_users))
    copy, prey = tmp_path / "copy.db", tmp_path / "prey"
    assert (await run_chatd("backup", copy, "--db", server.db)).status == 0
    unit = tmp_path / "unit"
    unit.mkdir()
    db = unit / "chatd.db"
    shutil.copy(copy, db)
    prey.write_text("root's")
    for path in (unit, db):
        os.chown(path, 65534, 65534)
    for suffix in ("-wal", "-shm", ""):
        link = db.with_name(db.name + suffix)
        link.unlink(missing_ok=True)
        link.symlink_to(prey)
        os.chown(link, 65534, 65534, follow_symlinks=False)
        await run_chatd("check", "--db", db)
        await run_chatd("backup", tmp_path / f"copy{suffix}", "--db", db)
        await run_chatd("restore", copy, "--db", db)
        assert (prey.read_text(), prey.stat().st_uid) == ("root's", 0), suffix


# --- commands that fail --------------------------------------------------------------


async def test_a_command_that_fails_leaves_no_file_and_changes_none(
    sound_db: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("chatd.db", "copy.db"):
        shutil.copy(sound_db, home / name)
    (home / "short").write_text("short")
    (home / "text").write_text("This is no database, and long enough to be one. " * 9)
    (home / "loop").symlink_to("loop")
    (home / "link").symlink_to("nothing")
    (home / "folder").mkdir()
    os.mkfifo(home / "pipe")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        free = ("--listen", "127.0.0.1:0", "--db")
        fresh, lacking = (*free, home / "new.db"), ("--listen", "192.0.2.1:0")
        failures: list[tuple[tuple[object, ...], str]] = [
            (("serve", "--listen", f"127.0.0.1:{port}", *fresh[2:]), "already in use"),
            (("serve", *lacking, *fresh[2:]), "192.0.2.1:0: "),
            (("serve", "--listen", f"unix:{home}/s", *lacking, *fresh[2:]), "192.0."),
            (("serve", *fresh, "--jwt-key", home / "none"), "No such file"),
            (("serve", *fresh, "--jwt-key", home / "short"), "5 bytes; "),
            (("serve", *fresh, "--secret-file", home / "short"), "others can read it"),
            (("serve", *fresh, "--secret-file", home / "no" / "s"), "finds no folder"),
            (("serve", *fresh, "--secret-file", home / "folder"), "Is a directory"),
            (("serve", *fresh, "--secret-file", home / "text" / "s"), "Not a direc"),
            (("serve", *fresh, "--secret-file", home / ("s" * 300)), "too long"),
            (("serve", *fresh, "--secret-file", home / "link"), "finds none"),
            (("serve", *free, home / "text"), "not a database"),
            (("serve", *free, home / "folder"), "Is a directory"),
            (("serve", *free, home / "typo" / "chatd.db"), f"folder {home / 'typo'}:"),
            (("serve", *free, home / "loop"), "symbolic links"),
            (("serve", *free, "."), "Is a directory"),
            (("serve", *free, home / "pipe"), "a pipe"),
            (("proxy", *fresh), "finds none"),
            (("token", "1", "--db", home / "chatd.db"), "finds none"),
            (("token", "1", "--db", "/"), "finds none"),
            (("check", "--db", home / "new.db"), "No such file"),
            (("check", "--db", home / "folder"), "Is a directory"),
            (("check", "--db", home / "loop"), "symbolic links"),
            (("check", "--db", home / "pipe"), "a pipe"),
            (("check", "--db", "/dev/null"), "a device"),
            (("backup", home / "new.db", "--db", home / "none.db"), "No such file"),
            (("backup", home / "new.db", "--db", home / "text"), "not a database"),
            (("backup", home / "copy.db", "--db", home / "chatd.db"), "it exists"),
            (("backup", home / "link", "--db", home / "chatd.db"), "it exists"),
            (("backup", home / ("x" * 300), "--db", home / "chatd.db"), "too long"),
            (("backup", home / "no" / "x", "--db", home / "chatd.db"), "no folder"),
            (("backup", home / "no", "--keep=1", "--db", home / "chatd.db"), "folder"),
            (("backup", home / "text", "--keep=1", "--db", home / "chatd.db"), "text"),
            (("restore", home / "none.db", "--db", home / "new.db"), "No such file"),
            (("restore", home / "text", "--db", home / "new.db"), "not a database"),
            (("restore", home / "folder", "--db", home / "new.db"), "Is a directory"),
            (("restore", home / "none.db", "--db", home / "chatd.db"), "No such file"),
            (("restore", home / "copy.db", "--db", home / "folder"), "Is a directory"),
            (("restore", home / "copy.db", "--db", home / "no" / "x"), "no folder"),
            (("restore", home / "copy.db", "--db", home / "pipe"), "a pipe"),
            (("restore", home / "pipe", "--db", home / "chatd.db"), "a pipe"),
        ]
        before = files_in(home)
        # One after another: they use the same database and secret.
        for words, sentence in failures:
            done = await run_chatd(*words)
            assert (done.status, done.out) == (1, ""), (words, done)
            last = done.err.splitlines()[-1]
            assert last.startswith("chatd: "), (words, done)
            assert sentence in last, (words, done)
            assert files_in(home) == before, words
    assert [*(home / "folder").iterdir()] == []


AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
# Coverage would write into the checkout, which that user may not.
UNMEASURED = {"COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_a_file_or_folder_of_another_user_is_an_error_that_says_what_to_do(
    sound_db: Path, tmp_path: Path
) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o001 == 0:
            folder.chmod(folder.stat().st_mode | 0o011)  # pytest's are for root alone
    closed, mine, ours = (tmp_path / name for name in ("closed", "mine", "ours"))
    for folder, owner, mode in (
        (closed, 0, 0o700), (mine, 0, 0o755), (ours, 65534, 0o755)
    ):  # fmt: skip
        folder.mkdir()
        for name, text_mode in (("chatd.db", 0o600), ("open.db", 0o644)):
            shutil.copy(sound_db, folder / name)
            (folder / name).chmod(text_mode)
        os.chown(folder, owner, owner)
        folder.chmod(mode)
    os.chown(mine / "chatd.db", 65534, 65534)
    free = ("serve", "--listen=127.0.0.1:0", "--db")
    copy = ours / "open.db"
    writes = f"user 65534 cannot write {mine}: run chatd as its owner, user 0"
    sees = f"user 65534 finds no folder {closed / 'sub'}"
    for words, sentence in (
        ((*free, mine / "new.db"), writes),
        ((*free, mine / "chatd.db"), writes),
        ((*free, ours / "chatd.db"), f"cannot write {ours / 'chatd.db'}: run chatd as"),
        ((*free, closed / "sub" / "chatd.db"), sees),
        (("check", "--db", closed / "sub" / "chatd.db"), sees),
        (("check", "--db", ours / "chatd.db"), "Permission denied; user 65534 cannot"),
        (("backup", mine / "x", "--db", copy), writes),
        (("backup", "--keep=2", mine, "--db", copy), writes),
        (("restore", copy, "--db", mine / "chatd.db"), writes),
        (("restore", copy, "--db", mine / "new.db"), writes),
        (("token", "1", "--db", closed / "chatd.db"), "user 65534 finds none; "),
        (("check", "--db", mine / "open.db"), ""),
        (("backup", ours / "copied.db", "--db", mine / "open.db"), ""),
    ):
        before = files_in(mine), files_in(closed)
        done = await run_chatd(*words, prefix=AS_NOBODY, **UNMEASURED)
        assert done.status == bool(sentence), (words, done)
        assert sentence in done.err, (words, done)
        assert (files_in(mine), files_in(closed)) == before, words


# --- one database with many names ----------------------------------------------------


async def test_a_served_database_is_in_use_under_all_its_names(
    server: ServerProcess, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    async with server.serving():
        assert server.process is not None
        copy, pid = tmp_path / "copy.db", server.process.pid
        assert (await run_chatd("backup", copy, "--db", server.db)).status == 0
        names = [tmp_path / name for name in ("link.db", "hard.db")]
        up = "/".join([".."] * len(CHECKOUT.parts))
        names += [Path(f"{up}{server.db}"), other / "mounted.db"]
        names[0].symlink_to(server.db)
        names[1].hardlink_to(server.db)
        names[3].touch()
        binding = 'mount --bind $0 $1; shift; exec "$@"'
        mount = ("unshare", "--mount", "sh", "-c", binding)
        before = sorted(os.listdir(tmp_path)), os.listdir(other)
        for db in (server.db, *names):
            prefix = (*mount, server.db, db) if db is names[3] else ()
            if prefix:
                tried = await trio.run_process([*prefix, "true"], check=False)
                if tried.returncode:
                    continue  # without the right to mount
            for words in (("restore", copy), ("serve", "--listen", "127.0.0.1:0")):
                done = await run_chatd(*words, "--db", db, prefix=prefix)
                assert done.status == 1, done
                assert f"in use by process {pid}; stop" in done.err
                assert "systemctl stop chatd" in done.err
            # SQLite keeps the WAL beside the file that a path leads to.
            done = await run_chatd("check", "--db", db, prefix=prefix)
            if db.is_symlink() or (
                db.samefile(server.db) and db.name == server.db.name
            ):
                assert done.status == 0, done
            else:
                assert done.status == 1, done
                assert f"process {pid} uses it by another name" in done.err
        assert (sorted(os.listdir(tmp_path)), os.listdir(other)) == before
        await server.want(200, "GET /healthz")
    async with server.serving():  # a stop gives the lock back
        pass


async def test_restore_follows_a_link_keeps_the_mode_and_says_what_it_did(
    server: ServerProcess, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    link, copy, real = tmp_path / "link.db", tmp_path / "copy.db", disk / "real.db"
    link.symlink_to("disk/real.db")
    async with server.serving():
        chat = await server.chat(1, 2)
        await server.post(chat, 1, "a")
        said = (await server.post(chat, 2, "b"))["created_at"]
        assert (await run_chatd("backup", copy, "--db", server.db)).status == 0
    for mode in (0o600, 0o640):  # first there is nothing at the link
        done = await run_chatd("restore", copy, "--db", link)
        assert done.status == 0, done
        assert done.out == (
            f"{real}: restored from {copy}: 2 users, 1 chats, 2 messages, "
            f"the newest of {said}. Every client will resync.\n"
        )
        assert os.readlink(link) == "disk/real.db"
        assert os.listdir(disk) == ["real.db"]
        assert real.stat().st_mode & 0o777 == mode
        real.chmod(0o640)
    checked = await run_chatd("check", "--db", link)
    contents = f"2 users, 1 chats, 2 messages, the newest of {said}"
    assert (checked.status, checked.out) == (0, f"{link}: ok: {contents}\n")


async def test_check_and_backup_read_beside_serve_and_leave_no_file(
    server: ServerProcess, tmp_path: Path
) -> None:
    async with server.serving():
        chat = await server.chat(1, 2)
        before = sorted(os.listdir(server.home))
        wal = server.db.with_name("chatd.db-wal")
        # The next time that chatd empties it is in 30 s.
        await wait_until(lambda: not wal.stat().st_size)
        for number in range(3):
            await server.post(chat, 1, "more")
            size = wal.stat().st_size
            done = await run_chatd("check", "--db", server.db)
            assert f" {number + 1} messages" in done.out, done
            assert wal.stat().st_size == size > 0  # no checkpoint
        copy = tmp_path / "copies" / "copy.db"
        copy.parent.mkdir()
        assert (await run_chatd("backup", copy, "--db", server.db)).status == 0
        assert sorted([*os.listdir(server.home)]) == sorted([*before, "copies"])
        await server.want(200, "GET /healthz")
        await server.kill()
    crashed = files_in(server.home)
    for _ in range(2):  # nobody folds the WAL of a killed server in but the next one
        assert (await run_chatd("check", "--db", server.db)).status == 0
        now = files_in(server.home)
        assert now.keys() == crashed.keys()
        assert now["chatd.db"] == crashed["chatd.db"]
        assert now["chatd.db-wal"] == crashed["chatd.db-wal"]
    async with server.serving():
        pass
    stopped = files_in(server.home)
    for words in (("check",), ("backup", tmp_path / "copies" / "second.db")):
        assert (await run_chatd(*words, "--db", server.db)).status == 0
        assert files_in(server.home) == stopped


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("check",), 0),
        (("backup", "../copy.db"), 0),
        (("backup", "copy.db"), 1),
        (("restore", "../sound.db"), 1),
        (("serve", "--listen", "127.0.0.1:0"), 1),
    ],
)
async def test_a_command_on_a_full_disk_leaves_no_file_there(
    words: tuple[str, ...], status: int, sound_db: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    shutil.copy(sound_db, tmp_path / "sound.db")
    script = """mount -t tmpfs -o size=1m none full && cd full || exit 77
        cp ../sound.db chatd.db; head -c 2m /dev/zero > zeros 2> ../why; ls
        "$@"; status=$?; ls >&2; exit $status"""
    program = [sys.executable, str(CHECKOUT / "chatd.py"), *words, "--db=chatd.db"]
    done = await trio.run_process(
        ["unshare", "--mount", "sh", "-c", script, "-", *program],
        capture_stdout=True, capture_stderr=True, check=False, cwd=tmp_path,
        env=clean_environment(),
    )  # fmt: skip
    if b"mount" in done.stderr:
        pytest.skip("without the right to mount")
    assert done.returncode == status, done
    left = done.stderr.decode().splitlines()
    assert left[-2:] == ["chatd.db", "zeros"], done
    # serve makes a secret beside the database, and removes it again.
    assert done.stdout.startswith(b"chatd.db\nzeros\n"), done


# --- copies in a folder --------------------------------------------------------------


@pytest.mark.parametrize(
    "clock", ["20990101T000000Z", "20200101T000000Z", "20991231T235959Z"]
)
def test_copies_are_named_in_the_order_of_making_whatever_the_clock_was(
    clock: str, sound_db: Path, tmp_path: Path
) -> None:
    odd = tmp_path / f"chatd-{clock}.db"
    odd.write_bytes(b"from when the clock was wrong")
    made: list[str] = []
    for _ in range(4):
        chatd.backup(sound_db, tmp_path, 3)
        (new,) = {p.name for p in tmp_path.iterdir()} - {odd.name, *made}
        made.append(new)
        # The documented restore takes the last name.
        assert max(p.name for p in tmp_path.glob("chatd-*Z.db")) == new
        assert sorted(made) == made
    assert sorted(p.name for p in tmp_path.iterdir()) == made[1:]


def test_copies_that_are_made_while_the_clock_is_behind_replace_older_ones(
    sound_db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_790_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    made: list[str] = []
    for step in (0, 3600, -50_000_000, 3600, 3600, 60_000_000):
        now += step
        before = {p.name for p in tmp_path.iterdir()}
        chatd.backup(sound_db, tmp_path, 3)
        (new,) = {p.name for p in tmp_path.iterdir()} - before
        made.append(new)
        assert sorted(p.name for p in tmp_path.iterdir()) == made[-3:]
    assert made[-1] == time.strftime("chatd-%Y%m%dT%H%M%SZ.db", time.gmtime(now))


# --- standard streams ----------------------------------------------------------------

STREAMS = {
    "": "", "closed stdin": "<&-", "closed stdout": ">&-", "closed stderr": "2>&-",
    "all closed": "<&- >&- 2>&-", "full stdout": ">/dev/full",
    "full stderr": "2>/dev/full", "all full": ">/dev/full 2>/dev/full",
    "no reader": "| true", "no reader of both": "2>&1 | true",
}  # fmt: skip


@pytest.mark.parametrize("case", STREAMS)
async def test_a_standard_stream_that_is_closed_full_or_gone_ends_no_command(
    case: str, server: ServerProcess, tmp_path: Path
) -> None:
    async with server.serving():
        await server.chat(1, 2)
    copy = tmp_path / "copy.db"
    stdout = "stdout" not in case and "all" not in case and "no reader" not in case
    stderr = "stderr" not in case and "all" not in case and "both" not in case
    for words in (
        ("token", "1"), ("check",), ("export",), ("backup", copy), ("restore", copy)
    ):  # fmt: skip
        shell = ("bash", "-c", f'set -o pipefail; "$@" {STREAMS[case]}', "-")
        done = await run_chatd(*words, "--db", server.db, prefix=shell)
        # These exist only for what they print.
        needed = words[0] in ("token", "check", "export")
        assert done.status == (needed and not stdout), (words, done)
        assert bool(done.out) == stdout, (words, done)
        failed = needed and not stdout and stderr
        assert done.err.startswith("chatd: stdout: ") == failed, (words, done)
        assert len(done.err.splitlines()) == failed, (words, done)
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["chatd.db", "chatd.secret", "copy.db", "stderr"]
    )


@pytest.mark.parametrize("case", STREAMS)
@pytest.mark.parametrize("demo", [False, True])
async def test_a_standard_stream_that_is_closed_full_or_gone_ends_no_server(
    case: str, demo: bool, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = ["--demo"] if demo else ["--db", str(tmp_path / "chatd.db")]
    command = [sys.executable, "-m", "chatd", "serve", f"--listen=127.0.0.1:{port}"]
    # The server tells its number, since there is a shell around it.
    tell = f"echo $BASHPID >{tmp_path}/pid; exec"
    shell = f'set -o pipefail; ({tell} "$@") {STREAMS[case]}'
    process = await trio.lowlevel.open_process(
        ["bash", "-c", shell, "-", *command, *words],
        cwd=CHECKOUT,
        env=clean_environment(TMPDIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:

        async def healthy() -> bool:
            with contextlib.suppress(OSError):
                return await health_status("127.0.0.1", port) == 200
            return False

        await wait_until(healthy)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
        with trio.fail_after(WAIT_SECONDS):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        assert process.stdout is not None
        assert process.stderr is not None
        out = b"".join([part async for part in process.stdout])
        err = b"".join([part async for part in process.stderr])
    assert not MISTAKE.search(err.decode()), err
    assert b"chatd: " not in err
    if not case:
        assert out.startswith(f"listening on http://127.0.0.1:{port}\n".encode())
        assert len(out.splitlines()) == (6 if demo else 1)
    assert not [name for name in os.listdir(tmp_path) if "demo" in name]


# --- signals -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_the_demo_leaves_no_folder_when_a_signal_ends_it(
    number: signal.Signals, tmp_path: Path
) -> None:
    demo = ServerProcess(tmp_path, "serve", "--demo")
    await demo.begin()
    folder, _ = sorted(os.listdir(tmp_path))
    assert folder.startswith("chatd-demo-")
    assert await demo.ended(number) == 0
    assert os.listdir(tmp_path) == ["stderr"]
    assert f" INFO stopping signal='{number.name}' sockets=0\n" in demo.output


async def test_sighup_stops_the_server_unless_it_was_ignored_at_the_start(
    server: ServerProcess,
) -> None:
    for ignored in (True, False):
        before = signal.signal(
            signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL
        )
        await server.begin()  # which inherits it, as from nohup
        signal.signal(signal.SIGHUP, before)
        peer = await server.peer(6)
        server.signal(signal.SIGHUP)
        if ignored:
            await server.want(200, "GET /healthz")
            await peer.receives_nothing()
            await server.stop()
        else:
            assert (await peer.find("bye"))["retry_after"] > 0
            assert await peer.ended() == 1012
            assert await server.ended() == 0
            assert " stopping signal='SIGHUP' sockets=1\n" in server.output
            server.hang_up()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("step", ["make_secret", "prepare_database", "open_listeners"])
def test_a_signal_during_the_first_start_is_an_orderly_end(
    step: str, number: signal.Signals, tmp_path: Path
) -> None:
    program = (
        f"import os, signal, sys, chatd; step = chatd.{step}\n"
        f"signal.signal({int(number)}, signal.SIG_DFL)\n"
        f"end = lambda: os.kill(os.getpid(), {int(number)})\n"
        f"chatd.{step} = lambda *args: (step(*args), end())[0]\n"
        "sys.exit(chatd.main(sys.argv[1:]))"
    )
    db = tmp_path / "chatd.db"
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", "--listen=127.0.0.1:0", "--db", db],
        capture_output=True, text=True, check=False, cwd=CHECKOUT,
        env=clean_environment(), timeout=WAIT_SECONDS,
    )  # fmt: skip
    assert not MISTAKE.search(done.stderr), done
    if step == "open_listeners":  # the task that waits for signals is there already
        assert done.returncode == 0, done
        assert f" stopping signal='{number.name}'" in done.stderr
    else:
        assert done.returncode == 1, done
        sentence = f"chatd: ended by {number.name}, before it was done\n"
        assert done.stderr.endswith(sentence)
        assert os.listdir(tmp_path) == []


# --- progress ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database so large that SQLite takes some million steps to check it."""
    memory = Memory(tmp_path_factory.mktemp("large"))
    chat = memory.chat(1, 2)
    memory.store.close()
    with contextlib.closing(sqlite3.connect(memory.settings.db)) as db, db:
        db.execute(
            """WITH RECURSIVE c (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n
            < 60000)
            INSERT INTO message (id, chat_id, sender_id, content, created_at, n)
            SELECT (SELECT max(seq) FROM event) + n, ?, 1, 'x', 0, n FROM c""",
            (chat,),
        )
    return memory.settings.db


@pytest.mark.parametrize("verb", ["check", "backup", "restore"])
def test_a_command_that_takes_over_a_second_shows_its_progress_on_a_terminal(
    verb: str, large_db: Path, tmp_path: Path
) -> None:
    db, copy = tmp_path / "chatd.db", tmp_path / "copy.db"
    shutil.copy(large_db, db if verb != "restore" else copy)
    words = {"check": (), "backup": (copy,), "restore": (copy,)}[verb]
    plain = "import sys, chatd; sys.exit(chatd.main(sys.argv[1:]))"
    status, out, shown = run_on_a_terminal(HASTY, verb, *words, "--db", db)
    assert status == 0, shown
    *lines, last = shown.split("\x1b[K\r")
    assert len(lines) > 2
    assert (lines[-1], last) == ("", "")  # the line is cleared
    for line in lines[:-1]:
        assert re.fullmatch(r"\S+: \d+ s(, \d+% to copy)?", line), line
    assert any("to copy" in line for line in lines) == (verb != "check")
    assert "\x1b" not in out
    # A command that is done in a second shows nothing.
    copy.unlink(missing_ok=verb == "check")
    if verb == "restore":
        shutil.copy(large_db, copy)
    status, _, shown = run_on_a_terminal(plain, verb, *words, "--db", db)
    assert (status, re.sub(r"\S+: [1-9]\d* s.*?\x1b\[K\r", "", shown)) == (
        0,
        "\x1b[K\r",
    )


def test_the_check_at_the_start_shows_its_progress_on_a_terminal(
    large_db: Path, tmp_path: Path
) -> None:
    shutil.copy(large_db, tmp_path / "chatd.db")
    status, _, shown = run_on_a_terminal(
        HASTY, "serve", "--listen=192.0.2.1:0", "--db", tmp_path / "chatd.db"
    )
    assert status == 1
    # The next log line overwrites it.
    assert re.search(r"\n(chatd\.db: \d+ s\x1b\[K\r)+\S+ INFO checked ", shown), shown
