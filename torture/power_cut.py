"""A power cut loses nothing that was acked, and leaves a sound database.

A shim between chatd and the kernel keeps each file as of its last fsync, and each name
as of the folder's. At moments of chance the server is killed, and the next one serves
what the cut left: only what was synced, or, harder for a log of changes, each sector
that was written since or its predecessor. The same crowd as for kill -9 goes on.

The model has to bite: with a shim that does not sync the -wal, acked messages are lost.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections import Counter
from pathlib import Path
from typing import Self

import trio
from crowd import Crowd, look_into
from faults import Shim
from harness import Chatd, Figures, chance, run_trio

MODELS = ("strict", "torn", "eager")
SYNC_US = 1000  # as long as a good disk takes


class Plug:
    """A server on a disk of which the power can be cut."""

    def __init__(self, lie: str = "") -> None:
        self.chatd = Chatd()
        self.dice = chance("power_cut moments")
        self.lie = lie
        self._plug_in()

    def _plug_in(self) -> None:
        chatd = self.chatd
        self.shim = Shim(chatd.folder, shadow=True, lie=self.lie, sync_us=SYNC_US)
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
                both.start_soon(chatd.start_soon)
        await trio.sleep(0.5)
        crowd.talking = False
    await crowd.hush()


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
    cuts = 150 if full else 25
    found = Counter[str]()
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
        "a power cut loses no acked message and leaves a sound database that serves on",
        f"{cuts} cuts under load ({', '.join(f'{n} {m}' for m, n in found.items())}), "
        f"{numbers['acked']:,} acked messages: 0 lost, 0 corrupt; with a -wal that is "
        f"not synced the same model loses {bitten} of {promised}",
        {"cuts": cuts, "bitten": bitten, **found, **numbers},
    )
