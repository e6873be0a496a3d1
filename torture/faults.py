"""Power cuts and disk faults: this module compiles shim.c and controls it."""

from __future__ import annotations

import atexit
import contextlib
import enum
import functools
import mmap
import os
import random
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SECTOR, PAGE = 512, 4096


class Op(enum.IntFlag):
    """Operations that can be made to fail."""

    WRITE = 1
    SYNC = 2
    TRUNCATE = 4
    OPEN = 8
    READ = 16


class File(enum.IntFlag):
    """The files on which operations fail."""

    DB = 1
    WAL = 2
    SHM = 4
    OTHER = 8
    FOLDER = 16
    ALL = 31


class Shim:
    """The disk below one folder, which can lose its power and can fail.

    Pass `env` to the process that is to use it. shadow: record what was synced, for
    `cut`; the record begins with the files that are in the folder now. lie: files with
    this in their names are never synced. sync_us: how long one sync takes.
    """

    CONTROL = struct.Struct("=7i")

    def __init__(
        self, folder: Path, *, shadow: bool = False, lie: str = "", sync_us: int = 0
    ) -> None:
        self.folder = folder
        self.temporary = Path(tempfile.mkdtemp(prefix="torture-shim-"))
        self.shadow = self.temporary / "shadow"
        control = self.temporary / "control"
        control.write_bytes(bytes(self.CONTROL.size))
        self.env = {
            "LD_PRELOAD": str(library()),
            "SHIM_FOLDER": str(folder),
            "SHIM_CONTROL": str(control),
            "SHIM_SYNC_US": str(sync_us),
        }
        if lie:
            self.env["SHIM_LIE"] = lie
        with control.open("r+b") as file:
            self._control = mmap.mmap(file.fileno(), self.CONTROL.size)
        if shadow:
            self.env["SHIM_SHADOW"] = str(self.shadow)
            self.shadow.mkdir()
            entries = []
            for path in folder.iterdir():
                inode = path.stat().st_ino
                shutil.copyfile(path, self.shadow / str(inode))
                entries.append(f"{inode} {path.name}\n")
            (self.shadow / "entries").write_text("".join(entries))

    def remove(self) -> None:
        """Remove the shim's own files."""
        self._control.close()
        shutil.rmtree(self.temporary)

    # --- faults ---

    def arm(
        self,
        op: Op,
        files: File,
        error: int,
        *,
        after: int = 0,
        times: int = -1,
        partly: bool = False,
    ) -> None:
        """Let the next operations fail, after `after` good ones.

        times: how many fail, -1 for all. partly: a failing write writes half its bytes.
        """
        self._control[:] = self.CONTROL.pack(0, files, error, after, times, 0, partly)
        self._control[:4] = struct.pack("=i", op)

    def disarm(self) -> None:
        """Let all operations work again."""
        self._control[:4] = bytes(4)

    @property
    def fired(self) -> int:
        """How many operations have failed since `arm`."""
        return int(self.CONTROL.unpack(self._control[:])[5])

    # --- cuts ---

    def killed(self) -> None:
        """Tell the next process what this one, which was killed, left unsynced.

        The kernel still has those pages, and writes them with the next sync of that
        file. It never writes the pages that a failed sync marked clean.
        """
        forgotten: set[tuple[str, int]] = set()
        with contextlib.suppress(FileNotFoundError):
            for line in (self.shadow / "forgotten").read_text().splitlines():
                inode, start, end = line.split()
                pages = range(int(start), int(end), PAGE)
                forgotten.update((inode, at) for at in pages)
        lines = []
        for path in self.folder.iterdir():
            inode, live = str(path.stat().st_ino), path.read_bytes()
            synced = self.shadow / inode
            old = synced.read_bytes() if synced.exists() else b""
            lines += [
                f"{inode} {at} {at + PAGE}\n"
                for at in range(0, len(live), PAGE)
                if live[at : at + PAGE] != old[at : at + PAGE]
                and (inode, at) not in forgotten
            ]
        (self.shadow / "dirty").write_text("".join(lines))

    def cut(self, into: Path, model: str, rng: random.Random) -> None:
        """Copy to `into` what a power cut leaves of the folder. The process is dead.

        strict: each file as of its last sync, the names as of the folder's last sync.
        eager: each file as of its last sync, the names as they are.
        torn: like eager, and of each later sector chance decides whether it is kept.
        """
        shutil.copy2(self.folder / "chatd.secret", into)  # it is older than all syncs
        if model == "strict":
            lines = (self.shadow / "entries").read_text().splitlines()
            names = [line.partition(" ")[::2] for line in lines]
        else:
            paths = self.folder.iterdir()
            names = [(str(path.stat().st_ino), path.name) for path in paths]
        for inode, name in names:
            if name.endswith((".secret", ".lock")):
                continue
            synced = self.shadow / inode
            data = synced.read_bytes() if synced.exists() else b""
            if model == "torn":
                data = torn(data, (self.folder / name).read_bytes(), rng)
            (into / name).write_bytes(data)
            (into / name).chmod(0o600)


def torn(old: bytes, new: bytes, rng: random.Random) -> bytes:
    """Mix two states of a file sector by sector; the length is that of one of them."""
    length = rng.choice((len(old), len(new)))
    sectors = []
    for at in range(0, length, SECTOR):
        first, second = old[at : at + SECTOR], new[at : at + SECTOR]
        sector = first if first == second else rng.choice((first, second))
        sectors.append(sector.ljust(SECTOR, b"\0"))
    return b"".join(sectors)[:length]


@functools.cache
def library() -> Path:
    """Compile the shim, once in each process."""
    folder = Path(tempfile.mkdtemp(prefix="torture-shim-"))
    atexit.register(shutil.rmtree, folder)
    target, compiler = folder / "shim.so", os.environ.get("CC", "gcc")
    source = str(HERE / "shim.c")
    command = [compiler, "-O2", "-shared", "-fPIC", f"-o{target}", source, "-ldl"]
    subprocess.run(command, check=True, timeout=120)
    return target
