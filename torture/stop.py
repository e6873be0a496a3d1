"""SIGTERM ends chatd in time, with an answer for all; a second one ends it at once.

Half of the clients read nothing while they are sent more than chatd buffers, and some
of the others write as fast as they can. A client that reads gets every answer, then
`bye` and close code 1012. A client that does not read is cut, and delays no other.
Every acked message is in the database.
"""

from __future__ import annotations

import contextlib
import signal
from collections import Counter

import trio
from crowd import acked_messages, count_lost
from harness import (
    Chatd,
    Client,
    Closed,
    Figures,
    Http,
    connect_all,
    make_chat,
    post_message,
    raise_file_limit,
    run_trio,
    stats,
    text,
    until,
)

FLOOD_BYTES = 800_000  # more than the kernel and an outbox hold for one peer
DRAIN_SECONDS = 5  # the default of --drain-seconds


class LoadedServer:
    """A server with stalled clients, clients that read, and clients that also write."""

    def __init__(self, chatd: Chatd, size: int) -> None:
        self.chatd = chatd
        self.stalled = [
            Client(chatd, user_id, receive_buffer=4096)
            for user_id in range(1, size // 2 + 1)
        ]
        self.readers = [Client(chatd, u) for u in range(size // 2 + 1, size + 1)]
        self.writers = self.readers[:20]
        self.clients = [*self.stalled, *self.readers]
        self.ends: Counter[str] = Counter()
        self.writing = True
        self.acked = 0
        self.large_chat = self.writers_chat = 0

    async def connect(self) -> None:
        """Create the chats, and connect all clients."""
        users = [client.user_id for client in self.clients]
        self.large_chat = await make_chat(self.chatd, users)
        users = [client.user_id for client in self.writers]
        self.writers_chat = await make_chat(self.chatd, users)
        await connect_all(self.clients)

    async def flood(self) -> None:
        """Send each client more than is held for a peer that does not read."""
        number = FLOOD_BYTES // 3900 // 16

        async def post() -> None:
            connection = Http(self.chatd)
            for _ in range(number):
                await post_message(connection, self.large_chat, text("x" * 3800))
            await connection.aclose()

        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(post)

    async def is_stalled(self) -> bool:
        """Whether all clients are connected, and output waits for the stalled ones."""
        found = (await stats(self.chatd))["connections"]
        all_connected = found["active"] == len(self.clients)
        return all_connected and int(found["catching_up"]) >= len(self.stalled)

    async def receive(self, client: Client) -> None:
        """Receive until the socket ends; count how it ended."""
        last = None
        while True:
            try:
                last = await client.receive(seconds=120)
            except Closed as end:
                bye = "bye" if last and last["type"] == "bye" else "no bye"
                self.ends[f"{bye}, {end.code}"] += 1
                if last and last["type"] == "bye":
                    assert "retry_after" in last, f"{last}"
                return

    async def write(self, client: Client) -> None:
        """Send messages without a pause, with up to 16 unacked."""
        with contextlib.suppress(OSError, trio.BrokenResourceError, AttributeError):
            while self.writing:
                if len(client.unacked) < 16:
                    await client.send(self.writers_chat, text())
                else:
                    await trio.sleep(0.001)

    def verify(self) -> None:
        """Compare the acks with the database."""
        wal = self.chatd.db.with_name(f"{self.chatd.db.name}-wal")
        assert not wal.exists(), "the WAL was not checkpointed into the database"
        acked = acked_messages(self.writers)
        lost = count_lost(acked, self.chatd.db)
        assert not lost, f"{lost} of {len(acked)} acked messages are lost"
        self.chatd.check()
        self.acked = len(acked)


async def act(server: LoadedServer, twice: bool, seconds: list[float]) -> bool:
    """Load the server, and stop it with one signal or two.

    Append how long the stop took to seconds. False: this machine is so slow that the
    stalled clients were cut before the stop.
    """
    chatd = server.chatd
    await server.connect()
    async with trio.open_nursery() as nursery:
        for client in server.readers:
            nursery.start_soon(server.receive, client)
        for client in server.writers:
            nursery.start_soon(server.write, client)
        assert await until(lambda: all(c.acked for c in server.writers), 60), "no acks"
        await server.flood()
        stalled = await server.is_stalled()
        began = trio.current_time()
        chatd.signal(signal.SIGTERM)
        if twice:
            stopping = await until(lambda: "stopping" in chatd.log_tail(), 30)
            assert stopping, "the log does not say that it stops"
            began = trio.current_time()
            chatd.signal(signal.SIGTERM)
        status = await chatd.ended(120)
        if stalled:
            seconds.append(trio.current_time() - began)
        server.writing = False
        assert status == 0, f"it ended with status {status}"
    for client in server.clients:
        client.cut()
    return stalled


def load_and_stop(
    size: int, drain: int, twice: bool, seconds: list[float]
) -> LoadedServer:
    """Load a server, stop it, and verify what it left."""
    for _ in range(5):
        with Chatd(f"--drain-seconds={drain}") as chatd:
            server = LoadedServer(chatd, size)
            if run_trio(act, server, twice, seconds):
                server.verify()
                return server
    raise AssertionError("this machine is too slow to stall so many clients at once")


def prove(full: bool) -> Figures:
    """Stop a server with 500 clients, once, or five times in the full form."""
    size, rounds = 500, 5 if full else 1
    raise_file_limit()
    took: list[float] = []
    at_once: list[float] = []
    acked = 0
    for _ in range(rounds):
        server = load_and_stop(size, DRAIN_SECONDS, False, took)
        assert server.ends == {"bye, 1012": len(server.readers)}, (
            f"the ends of {len(server.readers)} readers were {dict(server.ends)}"
        )
        assert took[-1] < DRAIN_SECONDS + 3, f"it ended after {took[-1]:.1f} s"
        acked += server.acked
        acked += load_and_stop(100, 60, True, at_once).acked
        assert at_once[-1] < 5, f"after the second it took {at_once[-1]:.1f} s"
    return Figures(
        "SIGTERM with 500 clients, half of them stalled: after --drain-seconds chatd "
        "cuts the rest, closes the database and ends; every client that reads gets "
        "`bye` and 1012, no acked message is lost; a second SIGTERM ends chatd at once",
        f"ended after {max(took):.1f} s, --drain-seconds being {DRAIN_SECONDS}; "
        f"{size // 2} of {size // 2} got `bye` and 1012, 0 of {acked:,} acked lost; "
        f"ended {max(at_once):.2f} s after a second SIGTERM",
        {
            "clients": size,
            "seconds": round(max(took), 2),
            "at_once_seconds": round(max(at_once), 2),
            "acked": acked,
        },
    )
