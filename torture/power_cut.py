"""A power cut loses nothing that was acked, and leaves a sound database.

A shim between chatd and the kernel keeps each file as of its last fsync, and each name
as of the folder's. At moments of chance the server is killed, and the next one serves
what the cut left: only what was synced, or, harder for a log of changes, each sector
that was written since or its predecessor. The same crowd as for kill -9 goes on.

Two ways to an early ack are tried by themselves. A process that is killed between write
and sync leaves a message that the next one can read, and that is on no disk yet. And a
sync that fails is, on Linux, forgotten: what it was to write looks clean, and a hole in
the -wal on the disk would take all that comes behind it.

The model has to bite: with a shim that does not sync the -wal, acked messages are lost.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import trio
from crowd import Crowd, look_into
from faults import File, Op, Shim
from harness import Chatd, Client, Figures, make_chat, run_trio, seeded_rng, text

MODELS = ("strict", "torn", "eager")
SYNC_US = 1000  # as long as a good disk takes


class Plug:
    """A server on a disk of which the power can be cut."""

    def __init__(self, lie: str = "", sync_us: int = SYNC_US) -> None:
        self.chatd = Chatd()
        self.dice = seeded_rng("power_cut moments")
        self.lie = lie
        self.sync_us = sync_us
        self._plug_in()

    def _plug_in(self) -> None:
        chatd = self.chatd
        self.shim = Shim(chatd.folder, shadow=True, lie=self.lie, sync_us=self.sync_us)
        chatd.env = self.shim.env

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shim.remove()

    def cut(self, model: str) -> None:
        """End it; what the cut left is the server's new folder."""
        old, new = self.chatd.folder, Path(tempfile.mkdtemp(prefix="torture-"))
        self.chatd.kill()
        self.shim.cut(new, model, self.dice)
        self.shim.remove()
        shutil.rmtree(old)
        self.chatd.move(new)
        self._plug_in()


def is_sound(path: Path) -> None:
    """Let SQLite itself look. Raises AssertionError."""
    with contextlib.closing(look_into(path)) as db:
        found = db.execute("PRAGMA integrity_check").fetchall()
    assert found == [("ok",)], f"integrity_check: {found}"


async def act(plug: Plug, crowd: Crowd, cuts: int, found: Counter[str]) -> None:
    """Cut and go on with what was left."""
    chatd = plug.chatd
    await crowd.settle()
    async with trio.open_nursery() as nursery:
        crowd.start(nursery)
        for number in range(cuts):
            await trio.sleep(plug.dice.uniform(0.1, 0.9))
            model = MODELS[number % len(MODELS)]
            await trio.to_thread.run_sync(plug.cut, model)
            found[model] += 1
            await trio.to_thread.run_sync(is_sound, chatd.db)
            lost = crowd.lost(chatd.db)
            assert not lost, f"{lost} acked messages are lost in a {model} cut"
            async with trio.open_nursery() as both:
                both.start_soon(trio.to_thread.run_sync, chatd.check)
                both.start_soon(chatd.start_in_thread)
        await trio.sleep(0.5)
        crowd.talking = False
    await crowd.hush()


# --- two ways to an early ack --------------------------------------------------------


class Teller:
    """One who writes, message by message, and knows what was acked."""

    def __init__(self, plug: Plug) -> None:
        self.plug = plug
        self.client = Client(plug.chatd, 1)
        self.chat_id = 0

    async def begin(self) -> None:
        """Make the chat."""
        self.chat_id = await make_chat(self.plug.chatd, [1, 2])
        await self.client.connect()

    async def until_acked(self) -> None:
        """Repeat what has no ack, until it has."""
        if self.client.websocket is None:
            await self.client.connect()
        await self.client.repeat()
        while self.client.unacked:
            frame = await self.client.receive()
            if frame["type"] == "error":
                await trio.sleep(0.3)
                await self.client.repeat()

    async def tell(self, number: int) -> None:
        """Write messages, one after the other, until each is acked."""
        for _ in range(number):
            await self.client.send(self.chat_id, text())
            await self.until_acked()

    def lost(self) -> int:
        """Count the acked messages that are not in the file."""
        is_sound(self.plug.chatd.db)
        with contextlib.closing(look_into(self.plug.chatd.db)) as db:
            stored = dict(db.execute("SELECT content, id FROM message"))
        return sum(
            stored.get(self.client.sent[client_id]["content"]) != ack["message_id"]
            for client_id, ack in self.client.acked.items()
        )


async def kill_in_a_sync(plug: Plug, seconds: float) -> None:
    """Kill between write and sync; start, repeat, and cut when it is acked."""
    teller = Teller(plug)
    await teller.begin()
    await teller.tell(2)
    await teller.client.send(teller.chat_id, text("in a sync"))
    await trio.sleep(seconds)
    assert teller.client.unacked, "it was acked before the kill: the sync is too short"
    plug.chatd.kill()
    plug.shim.killed()
    teller.client.cut()
    await plug.chatd.start_in_thread()
    await teller.until_acked()
    plug.cut("strict")
    lost = teller.lost()
    assert not lost, f"{lost} messages, repeated and acked after a kill, are lost"


async def fail_a_sync(plug: Plug, times: int) -> None:
    """Let syncs fail, once, or until it ends; write on, and cut."""
    chatd, teller = plug.chatd, Teller(plug)
    await teller.begin()
    await teller.tell(3)
    plug.shim.arm(Op.SYNC, File.WAL, errno.EIO, times=times)
    await teller.client.send(teller.chat_id, text("not synced"))
    if times == 1:
        await teller.until_acked()
    else:
        assert await chatd.ended(30) == 1, "it did not end with status 1"
        plug.shim.disarm()
        plug.shim.killed()
        teller.client.cut()
        await chatd.start_in_thread()
        await teller.until_acked()
    await teller.tell(10)
    plug.cut("strict")
    lost = teller.lost()
    assert not lost, f"{lost} messages, acked after a failed sync, are lost"


async def early_acks(found: Counter[str], full: bool) -> None:
    """Try both, side by side: they mostly wait."""

    async def one(sync_us: int, way: Callable[..., Awaitable[None]], what: Any) -> None:
        with Plug(sync_us=sync_us) as plug:
            try:
                await plug.chatd.start_in_thread()
                await way(plug, what)
                found[way.__name__] += 1
            finally:
                plug.chatd.kill()
                shutil.rmtree(plug.chatd.folder)

    async with trio.open_nursery() as nursery:
        for _ in range(10 if full else 2):
            nursery.start_soon(one, 400_000, kill_in_a_sync, 0.1)
            nursery.start_soon(one, SYNC_US, fail_a_sync, 1)
            nursery.start_soon(one, SYNC_US, fail_a_sync, -1)


async def bite(plug: Plug, crowd: Crowd) -> int:
    """Cut a server of which the -wal is never synced; how many acked are lost."""
    await crowd.settle()
    async with trio.open_nursery() as nursery:
        crowd.start(nursery)
        await trio.sleep(1.5)
        plug.cut("strict")
        nursery.cancel_scope.cancel()
    try:
        return crowd.lost(plug.chatd.db)
    except sqlite3.DatabaseError:
        return len(crowd.acked())  # not even the tables are left


def prove(full: bool) -> Figures:
    """Cut many times; then show that the model would have noticed."""
    cuts = 100 if full else 25
    found = Counter[str]()
    run_trio(early_acks, found, full)
    with Plug() as plug, plug.chatd as chatd:
        crowd = Crowd(chatd, "power_cut", users=12)
        run_trio(act, plug, crowd, cuts, found, seconds=60 + 6 * cuts)
        numbers = crowd.judge()
    with Plug(lie="-wal") as plug, plug.chatd as chatd:
        crowd = Crowd(chatd, "bite", users=12)
        bitten = run_trio(bite, plug, crowd)
        assert bitten, "the model does not bite: without syncs nothing was lost"
        promised = len(crowd.acked())
    return Figures(
        "a power cut loses no acked message; the database is sound and can be served "
        "again",
        f"{cuts} cuts under load ({', '.join(f'{found[m]} {m}' for m in MODELS)}), "
        f"{numbers['acked']:,} acked messages: 0 lost, 0 corrupt; if the WAL is not "
        f"synced, the same model loses {bitten} of {promised}",
        {"cuts": cuts, "bitten": bitten, **found, **numbers},
    )
