"""A disk that fails or is full loses no acked message, and disturbs no reader.

Faults are put under chatd by a shim, at the 1st, 2nd, 3rd ... write and sync of the
database and of its -wal: full, broken, read-only; once, or until it is mended, at last
with reads and opens that fail, too; and a file system of a few MiB is really filled.
Meanwhile some write, each message repeated until its ack, and others listen. No message
is acked that is lost, and no row is stored that is never told; those that listen stay
connected. The database file is also removed, or replaced, while it is served.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import trio
from crowd import is_kept, read_database, verify_events
from faults import File, Op, Shim
from harness import (
    Change,
    Chatd,
    Client,
    Closed,
    Figures,
    Frame,
    Http,
    http,
    make_chat,
    run_trio,
    text,
    until,
)

WRITERS, LISTENERS, POSTER = (1, 2), (3, 4), 5
FAILED = "storage_failed"


class Table:
    """A server on a sick disk, some who write to one chat, and some who listen.

    Everybody stays on one connection: that it ends is a fault, unless `may_end`.
    """

    def __init__(self, folder: Path | None = None, length: int = 100) -> None:
        self.chatd = Chatd(folder=folder)
        self.shim = Shim(self.chatd.folder)
        self.chatd.env = self.shim.env
        self.length = length
        self.writers = [Client(self.chatd, user_id) for user_id in WRITERS]
        self.listeners = [Client(self.chatd, user_id) for user_id in LISTENERS]
        self.acks: dict[str, Frame] = {}  # by content
        self.sent_at: dict[str, float] = {}
        self.changes: dict[int, list[Change]] = {}  # of all writers
        self.count: Counter[int] = Counter()  # acks of each writer
        self.refused = 0
        self.writing = True
        self.finished = 0  # of those who write: their last change has its ack, too
        self.may_end = False
        self.chat_id = 0

    @contextlib.asynccontextmanager
    async def seated(self) -> AsyncIterator[None]:
        """Serve, and let everybody write and listen, until the block ends."""
        try:
            await self.chatd.start_in_thread()
            users = [*WRITERS, *LISTENERS, POSTER]
            self.chat_id = await make_chat(self.chatd, users)
            async with trio.open_nursery() as nursery:
                for client in (*self.writers, *self.listeners):
                    await client.connect()
                for client in self.writers:
                    nursery.start_soon(self._write, client)
                for client in self.listeners:
                    nursery.start_soon(self._listen, client)
                nursery.start_soon(self._post)
                yield
                nursery.cancel_scope.cancel()
        finally:
            for client in (*self.writers, *self.listeners):
                client.cut()
            self.chatd.kill()

    def remove(self) -> None:
        """Remove its files."""
        self.shim.remove()
        if self.chatd.own_folder:
            shutil.rmtree(self.chatd.folder, ignore_errors=True)

    async def _listen(self, client: Client) -> None:
        self._ended(await client.receive_until_closed())

    def _ended(self, why: Exception) -> None:
        if not self.may_end:
            raise AssertionError(f"a connection ended: {why!r}") from why

    async def _write(self, client: Client) -> None:
        """Write, one message after the other, each until its ack."""
        try:
            while self.writing:
                content = text("x" * self.length)
                self.sent_at[content] = trio.current_time()
                client_id = await client.send(self.chat_id, content)
                while client_id in client.unacked:
                    frame = await client.receive()
                    if frame["type"] == "error":
                        assert frame["code"] == FAILED, f"a send was answered {frame}"
                        self.refused += 1
                        await trio.sleep(0.2)
                        await client.repeat()
                self.acks[content] = ack = client.acked[client_id]
                self.count[client.user_id] += 1
                if self.count[client.user_id] % 4 == 0:
                    await self._change(client, ack["message_id"])
            self.finished += 1
            await client.receive_until_closed()
        except (Closed, OSError, trio.BrokenResourceError) as end:
            self._ended(end)

    async def _change(self, client: Client, message_id: int) -> None:
        """Edit a message; repeat that until its ack. Delete each second one so."""
        for content in [text("z" * self.length), None][: 1 + message_id % 2]:
            change = await client.change(message_id, content)
            self.changes[message_id] = client.changes[message_id]
            while not change.rev:
                frame = await client.receive()
                if frame["type"] == "error":
                    assert frame["code"] == FAILED, f"a change was answered {frame}"
                    self.refused += 1
                    await trio.sleep(0.2)
                    await client.repeat()

    async def _post(self) -> None:
        """Write over HTTP, one message after the other, each until its answer."""
        connection, token = Http(self.chatd), self.chatd.token(POSTER)
        path = f"/api/v1/chats/{self.chat_id}/messages"
        try:
            while self.writing:
                content = text("y" * self.length)
                self.sent_at[content] = trio.current_time()
                body = {"content": content, "client_id": content[:64]}
                reply = await connection.request("POST", path, token, body)
                while reply.status not in (200, 201):
                    error = reply.json["error"]
                    assert error["code"] == FAILED, f"a post was answered {error}"
                    assert reply.headers["retry-after"], "no Retry-After"
                    self.refused += 1
                    await trio.sleep(0.2)
                    reply = await connection.request("POST", path, token, body)
                message = reply.json["message"]
                self.acks[content] = message | {"message_id": message["id"]}
                self.count[POSTER] += 1
            self.finished += 1
        except (OSError, trio.BrokenResourceError) as end:
            self._ended(end)

    # --- looking ---

    def descriptors(self) -> int:
        """How many the server has open."""
        return len(os.listdir(f"/proc/{self.chatd.pid}/fd"))

    async def all_ack(self, seconds: float, times: int = 2) -> None:
        """Wait until every writer has got acks again."""
        least = {user: self.count[user] + times for user in (*WRITERS, POSTER)}
        again = await until(
            lambda: all(self.count[user] >= most for user, most in least.items()),
            seconds,
        )
        assert again, f"no acks within {seconds} s: {self.chatd.log_tail()}"

    async def refuses(self, before: int, seconds: float) -> bool:
        """Wait until somebody is refused; False: nobody was."""
        return await until(lambda: self.refused > before, seconds)

    def recoveries(self) -> int:
        """Count how often chatd has logged that it writes again."""
        log = self.chatd.log.read_text(errors="replace")
        return log.count("storage_recovered db=")

    async def has_recovered(self, before: int) -> bool:
        """Wait until it has logged one recovery more; False: it has not."""
        return await until(lambda: self.recoveries() > before, 1)

    async def health(self) -> int:
        """Ask how it is; the status."""
        reply = await http(self.chatd, "GET", "/healthz")
        if reply.status == 503:
            assert reply.json == {"status": "degraded"}, f"healthz: {reply.body!r}"
        return reply.status

    async def reads_live_on(self) -> None:
        """Read in every way, with what was acked before in it."""
        token, acked = self.chatd.token(LISTENERS[0]), len(self.acks)
        newest = max(ack["n"] for ack in self.acks.values())
        path = f"/api/v1/chats/{self.chat_id}/messages?limit=1"
        for where in ("/api/v1/chats", path, "/api/v1/events"):
            reply = await http(self.chatd, "GET", where, token)
            assert reply.status == 200, f"{where} was answered {reply.status}"
            if where == path:
                n = reply.json["messages"][-1]["n"]
                assert n >= newest, f"history ends at {n}, {newest} was acked ({acked})"
        async with Client(self.chatd, LISTENERS[1]) as newcomer:
            pong = await newcomer.ask("ping")
            assert pong["type"] == "pong", f"ping was answered {pong}"

    async def hear_out(self) -> None:
        """Stop writing; let the listeners hear all, on the sockets that they have."""
        self.writing = False
        everybody = len(self.writers) + 1
        finished = await until(lambda: self.finished == everybody, 20)
        assert finished, f"{self.finished} of {everybody} who write have finished"
        async with Client(self.chatd, LISTENERS[1]) as newcomer:
            last = newcomer.start_seq

        def all_heard() -> bool:
            return all(client.events[-1]["seq"] == last for client in self.listeners)

        assert await until(all_heard, 20), "a listener did not hear all"

    def judge(self) -> int:
        """Hold everybody against the file; how many messages were acked."""
        log, messages = read_database(self.chatd.db)
        contents = {row.content or row.id for row in messages.values()}
        assert len(contents) == len(messages), "a message is stored twice"
        for content, ack in self.acks.items():
            row = messages.get(ack["message_id"])
            assert row is not None, f"{ack} is lost"
            assert row.n == ack["n"], f"{ack} is lost: {row}"
            changes = self.changes.get(row.id, ())
            assert is_kept(row, content, changes), f"{changes} are lost: {row}"
        for place, event in enumerate(log, 1):
            assert event.seq == place, f"seq {event.seq} stands at place {place}"
        for client in self.listeners:
            verify_events(client, log, messages)
        self.chatd.check()
        return len(self.acks)


class Case(NamedTuple):
    """Operations that fail in one way, and at which of them to let it happen."""

    op: Op
    files: File
    error: int
    afters: tuple[int, ...]
    length: int = 100
    partly: bool = False


def cases(full: bool) -> list[Case]:
    """Every kind of operation and fault; in the quick form at fewer places."""
    some = tuple(range(40)) if full else (0, 1, 2, 3, 5, 8, 13)
    few = tuple(range(12)) if full else (0, 1, 2, 4)
    checkpoint = tuple(range(0, 60, 3)) if full else (0, 7)
    large = 3900  # so that a checkpoint is not far
    write, sync = Op.WRITE, Op.SYNC
    return [
        Case(write, File.WAL, errno.ENOSPC, some),
        Case(write, File.WAL, errno.EIO, some),
        Case(write, File.WAL, errno.EIO, few, partly=True),
        Case(write, File.WAL, errno.EROFS, few),
        Case(sync, File.WAL, errno.EIO, few),
        Case(sync, File.WAL, errno.ENOSPC, few),
        Case(write, File.DB, errno.ENOSPC, checkpoint, large),
        Case(write, File.DB, errno.EIO, checkpoint, large),
        Case(sync, File.DB, errno.EIO, few[:2], large),
        Case(write | sync, File.WAL | File.DB | File.SHM, errno.EIO, few, large),
    ]


async def one_by_one(case: Case, found: Counter[str]) -> None:
    """Let one operation fail, at each of the places, and go on."""
    table = Table(length=case.length)
    async with table.seated():
        for after in case.afters:
            await table.all_ack(30)
            refused, recoveries = table.refused, table.recoveries()
            table.shim.arm(
                case.op,
                case.files,
                case.error,
                after=after,
                times=1,
                partly=case.partly,
            )
            fired = await until(lambda: table.shim.fired > 0, 60)
            assert fired, f"{case}: nothing failed at {after}"
            found["faults"] += 1
            if await table.refuses(refused, 1):
                found["refusing"] += 1
                await table.reads_live_on()
                # On a slow machine it may be well again.
                if await table.health() != 503:
                    well = await table.has_recovered(recoveries)
                    assert well, f"{case} at {after}: healthy without a recovery"
            await table.all_ack(30)
            assert await table.health() == 200, "health is not well again"
        await table.hear_out()
        table.chatd.kill()
        table.may_end = True
    found["acked"] += table.judge()
    found["refused"] += table.refused
    table.remove()


async def until_mended(error: int, found: Counter[str]) -> None:
    """Sick for some seconds, again and again; it recovers by itself."""
    table = Table()
    async with table.seated():
        for seconds in (1, 5):
            await table.all_ack(30)
            table.shim.arm(Op.WRITE | Op.TRUNCATE | Op.SYNC, File.ALL, error)
            refused = table.refused
            await trio.sleep(seconds)
            assert table.refused > refused, "nobody was refused on a sick disk"
            assert await table.health() == 503, "health is well on a sick disk"
            await table.reads_live_on()
            count = table.count.total()
            await trio.sleep(0.5)
            assert count == table.count.total(), "an ack on a sick disk"
            table.shim.disarm()
            began = trio.current_time()
            await table.all_ack(30, 1)
            took = trio.current_time() - began
            found["recovery_ms"] = max(found["recovery_ms"], round(took * 1000))
            found["faults"] += 1
        await table.hear_out()
        table.may_end = True
        table.chatd.kill()
    found["acked"] += table.judge()
    found["refused"] += table.refused
    table.remove()


async def broken_for_long(error: int, found: Counter[str]) -> None:
    """A disk that stays broken ends nothing, and costs no descriptor and few lines.

    Then it breaks again, and the process is killed: the next one has all acks.
    """
    table = Table()
    writes = Op.WRITE | Op.SYNC
    async with table.seated():
        for op in (writes, writes | Op.TRUNCATE | Op.OPEN | Op.READ):
            await table.all_ack(30)
            opened, refused = table.descriptors(), table.refused
            table.shim.arm(op, File.ALL, error)
            assert await table.refuses(refused, 30), "nobody was refused"
            for _ in range(5):
                await trio.sleep(2.1)  # more than the time between two probes
                assert await table.health() == 503, "health is well on a sick disk"
                if op == writes:
                    await table.reads_live_on()
            more = table.descriptors() - opened
            assert more < 16, f"{more} descriptors more than before"
            table.shim.disarm()
            await table.all_ack(30)
            found["faults"] += 1
        lines = table.chatd.log.read_text(errors="replace").count("storage_failed db=")
        assert lines <= 8, f"{lines} lines about two failures"
        table.may_end = True
        refused = table.refused
        table.shim.arm(writes, File.ALL, error)
        assert await table.refuses(refused, 30), "nobody was refused"
        table.chatd.kill()
    table.shim.disarm()
    await table.chatd.start_in_thread()
    for client in table.listeners:
        await client.connect()
        while await client.poll():
            pass
    found["acked"] += table.judge()
    found["refused"] += table.refused
    table.chatd.kill()
    table.remove()


# --- a file system that is really full -----------------------------------------------


def mount_small(where: Path, size: str) -> bool:
    """Mount a small file system for this process alone. False: not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, new_user = 0x00020000, 0x10000000
    flags = new_namespace if os.geteuid() == 0 else new_namespace | new_user
    if libc.unshare(flags):
        return False
    commands = (
        ["mount", "--make-rprivate", "/"],
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(where)],
    )
    return all(
        subprocess.run(command, check=False, capture_output=True).returncode == 0
        for command in commands
    )


async def really_full(folder: Path, times: int, found: Counter[str]) -> None:
    """Fill a file system to the last byte under load, and make room, several times."""
    ballast = folder / "ballast"
    table = Table(folder, length=500)
    async with table.seated():
        for _ in range(times):
            await table.all_ack(30)
            with ballast.open("wb", buffering=0) as file:
                for size in (65536, 4096):
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(bytes(size))
            refused = table.refused
            full = await table.refuses(refused, 30)
            assert full, "nobody was refused on a full disk"
            await table.reads_live_on()
            assert await table.health() == 503, "health is well on a full disk"
            ballast.unlink()
            await table.all_ack(30, 1)
            assert await table.health() == 200, "health is not well again"
            found["full"] += 1
        await table.hear_out()
        table.may_end = True
        table.chatd.kill()
    found["acked"] += table.judge()
    found["refused"] += table.refused
    table.shim.remove()


# --- a file that is taken away -------------------------------------------------------


def unlink(db: Path) -> None:
    """Remove the database."""
    db.unlink()


def unlink_wal(db: Path) -> None:
    """Remove the log of changes."""
    db.with_name(f"{db.name}-wal").unlink()


def replace(db: Path) -> None:
    """Put another file in its place."""
    copy = db.with_name("copy")
    shutil.copy2(db, copy)
    copy.replace(db)


def move_folder(db: Path) -> None:
    """Take the whole folder away."""
    db.parent.rename(db.parent.with_name(f"{db.parent.name}-moved"))


def move_back(db: Path) -> None:
    """Remove what is left of it."""
    shutil.rmtree(db.parent.with_name(f"{db.parent.name}-moved"), ignore_errors=True)


async def taken_away(
    act: Callable[[Path], None], quiet: bool, found: Counter[str]
) -> None:
    """Take the file away, under load or in silence: it ends, and acks nothing more."""
    table = Table()
    async with table.seated():
        await table.all_ack(30)
        table.may_end = True
        if quiet:
            table.writing = False
            await trio.sleep(0.5)
        act(table.chatd.db)
        taken_at = trio.current_time()
        status = await table.chatd.ended(30)
        assert status == 1, f"{act.__doc__} It ended with {status}"
        last = table.chatd.log_tail()
        assert "removed or replaced" in last, f"{act.__doc__} Its last words: {last}"
        await trio.sleep(0.2)  # the last frames are heard
    late = [c for c in table.acks if table.sent_at[c] > taken_at]
    assert not late, f"{act.__doc__} {len(late)} messages were acked after that"
    found["taken_away"] += 1
    table.remove()
    move_back(table.chatd.db)


async def act(full: bool, small: Path | None, found: Counter[str]) -> None:
    """Let all happen at once: most of it is waiting for a disk to be well again."""
    busy = trio.Semaphore(16 if full else 12)

    async def one(function: Callable[..., Any], *arguments: Any) -> None:
        async with busy:
            await function(*arguments, found)

    async with trio.open_nursery() as nursery:
        for case in cases(full):
            nursery.start_soon(one, one_by_one, case)
        for error in (errno.ENOSPC, errno.EIO, errno.EROFS):
            nursery.start_soon(one, until_mended, error)
        for error in (errno.EIO, errno.EROFS):
            nursery.start_soon(one, broken_for_long, error)
        for how in (unlink, unlink_wal, replace, move_folder):
            nursery.start_soon(one, taken_away, how, False)
        nursery.start_soon(one, taken_away, unlink, True)
        if small is not None:
            nursery.start_soon(one, really_full, small, 10 if full else 3)


def prove(full: bool) -> Figures:
    """Let a disk fail in every way."""
    small: Path | None = Path(tempfile.mkdtemp(prefix="torture-"))
    assert small is not None
    found = Counter[str]()
    if not mount_small(small, "3m"):
        small.rmdir()
        small = None
    run_trio(act, full, small, found, seconds=900)
    really = (
        f"a tmpfs really filled {found['full']} times"
        if small
        else "(no right to mount a small file system here: a full disk by shim only)"
    )
    return Figures(
        "a disk is full, broken or read-only, at the 1st, 2nd, 3rd ... write or sync: "
        "no ack for a lost row, no stored row without its event, reads and sockets go "
        "on, /healthz answers 503, and chatd recovers by itself, however long it "
        "takes; if the database file is removed or replaced, chatd ends before it "
        "sends a false ack",
        f"{found['faults']} faults, {really}, {found['acked']:,} acked, "
        f"{found['refused']:,} refused: 0 lost, 0 without an event, no socket cut; "
        f"recovered {found['recovery_ms'] / 1000:.1f} s after the disk; ended with "
        f"status 1 when the file was taken away ({found['taken_away']})",
        dict(found),
    )
