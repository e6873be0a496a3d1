"""No Autobahn case fails on chatd's own code, and errors get the right close code.

`kosoku` runs the Autobahn cases against an echo server that is chatd but for the last
step. It uses chatd's accept loop, request head, handshake, tokens, Outbox,
WebSocketReader and way to close. Only its Session differs: it sends each message back.
The limits are raised above the largest cases (16 MiB messages, 65,536 fragments); proof
`attacks` tests the limits. Groups 12 and 13 are left out: they are about compression,
which chatd never negotiates.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import trio
from harness import Figures, run_trio

import chatd

CLAIM = "no Autobahn case fails; a protocol error is answered with 1002 or 1007"
CASES = 301  # groups 1 to 7, 9 and 10
OFF = chatd.Rate(0, 0)


class Echo(chatd.Session):
    """A session that sends each message back, and does nothing else."""

    async def _greet(self) -> bool:
        return True

    async def _receive(self, text: str | bytes) -> None:
        await self.outbox.wait_not_full()
        self.outbox.push(bytes(chatd._frames.send_data(text)), always=True)


async def run_cases(folder: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Run all cases; return their reports and the exceptions in the echo server."""
    settings = chatd.Settings(
        listen=("127.0.0.1:0",),
        db=folder / "chatd.db",
        handshakes=OFF,
        receive_bytes=OFF,
        max_message_bytes=2**25,
        outbox_bytes=2**25,
        fragments=2**20,
    )
    store = chatd.Store(settings)
    keyring = chatd.Keyring(settings, b"a secret of at least 32 bytes, for this run")
    server = chatd.Server(store, keyring)
    listeners = await chatd.open_listeners(settings.listen)
    where = chatd.url_of(listeners[0]).replace("http:", "ws:")
    command = [str(Path(sys.executable).with_name("kosoku")), "-m", "fuzzingclient"]
    command += ["-x", "12.*", "-x", "13.*", "-p", "2", "-o", str(folder / "reports")]
    command += [f"{where}/ws/chat?token={keyring.sign(1, 3600)}"]
    try:
        with mock.patch.object(chatd, "Session", Echo):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.run, listeners)
                await trio.run_process(
                    command, check=False, capture_stdout=True, capture_stderr=True
                )
                server.listener.stopping.set()
    finally:
        store.close()
    (index,) = json.loads((folder / "reports/index.json").read_text()).values()
    names = [row["reportfile"] for row in index.values()]
    reports = [json.loads((folder / "reports" / name).read_text()) for name in names]
    return reports, dict(store.stats.errors)


def prove(full: bool) -> Figures:
    """Run the cases once, in both forms."""
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        reports, errors = run_trio(run_cases, Path(folder), seconds=300)
    assert len(reports) == CASES, f"{len(reports)} cases ran, not {CASES}"
    bad = [
        f"{r['id']} {r['behavior']}/{r['behaviorClose']}: {r['result']}"
        for r in reports
        if r["behavior"] not in ("OK", "NON-STRICT", "INFORMATIONAL")
        or r["behaviorClose"] not in ("OK", "INFORMATIONAL")
    ]
    assert not bad, f"{len(bad)} cases failed: {bad[:5]}"
    assert not errors, f"exceptions in the echo server: {errors}"
    # The case does not close these connections: the server must.
    broken = [r for r in reports if not r["expectedClose"]["closedByMe"]]
    silent = [r["id"] for r in broken if r["remoteCloseCode"] not in (1002, 1007)]
    assert broken, "no case broke the protocol"
    assert not silent, f"errors that were not answered with 1002 or 1007: {silent}"
    found = Counter(r["behavior"] for r in reports)
    kinds = ", ".join(f"{number} {kind}" for kind, number in found.most_common())
    return Figures(
        CLAIM,
        f"{CASES} cases: 0 failed ({kinds}); {len(broken)} of {len(broken)} protocol "
        "errors were answered with 1002 or 1007",
        {"cases": CASES, "protocol_errors": len(broken), **found},
    )
