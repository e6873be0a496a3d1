"""SIGTERM: out in time, everybody told, every answer given; a second one: at once.

Half of the clients do not read a byte while much is said to them; of the others some
write as fast as they can. Who reads sees `bye` and close 1012 after all that he was
promised; who does not is cut, and holds nobody up. What was acked is in the file.
"""

from __future__ import annotations

import contextlib
import resource
import signal
from collections import Counter

import trio
from crowd import look_into
from harness import (
    Chatd,
    Client,
    Closed,
    Figures,
    Http,
    http,
    make_chat,
    run_trio,
    text,
    until,
)

ENOUGH = 800_000  # bytes: more than the kernel and an outbox hold for one peer
DRAIN = 5  # --drain-seconds, its default


class House:
    """A server with readers, writers and those who are stalled."""

    def __init__(self, chatd: Chatd, size: int) -> None:
        self.chatd = chatd
        self.stalled = [
            Client(chatd, user_id, receive_buffer=4096)
            for user_id in range(1, size // 2 + 1)
        ]
        self.live = [Client(chatd, u) for u in range(size // 2 + 1, size + 1)]
        self.writers = self.live[:20]
        self.ends: Counter[str] = Counter()
        self.byes: dict[str, float] = {}
        self.writing = True
        self.acked = 0
        self.hall = self.table = 0  # chats: of all, and of the writers

    async def settle(self) -> None:
        """Connect everybody."""
        everybody = [*self.stalled, *self.live]
        users = [client.user_id for client in everybody]
        self.hall = await make_chat(self.chatd, users)
        self.table = await make_chat(self.chatd, [c.user_id for c in self.writers])
        limiter = trio.CapacityLimiter(50)

        async def connect(client: Client) -> None:
            async with limiter:
                await client.connect(120)

        async with trio.open_nursery() as nursery:
            for client in everybody:
                nursery.start_soon(connect, client)

    async def flood(self) -> None:
        """Say more than is held for a peer that does not read."""
        token, number = self.chatd.service_token(), ENOUGH // 3900 // 16

        async def post() -> None:
            http, path = Http(self.chatd), f"/api/v1/chats/{self.hall}/messages"
            for _ in range(number):
                body = {"content": text("x" * 3800), "sender_id": 1}
                reply = await http.request("POST", path, token, body)
                assert reply.status == 201, f"a post was answered {reply.status}"
            await http.aclose()

        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(post)

    async def is_full(self) -> bool:
        """Are all here still, and do the stalled not take what they are sent?"""
        path = "/api/v1/internal/chat/ws/stats"
        reply = await http(self.chatd, "GET", path, self.chatd.service_token())
        found = reply.json["connections"]
        everybody = len(self.stalled) + len(self.live)
        everybody_is_here = found["active"] == everybody
        return everybody_is_here and int(found["catching_up"]) >= len(self.stalled)

    async def hear(self, client: Client) -> None:
        """Hear until the end; note how it was told."""
        last = None
        while True:
            try:
                last = await client.receive(seconds=120)
            except Closed as end:
                said = "bye" if last and last["type"] == "bye" else "no bye"
                self.ends[f"{said}, {end.code}"] += 1
                if last and last["type"] == "bye":
                    self.byes[client.name] = last["retry_after"]
                return

    async def write(self, client: Client) -> None:
        """Write without a pause, up to 16 without an answer."""
        with contextlib.suppress(OSError, trio.BrokenResourceError, AttributeError):
            while self.writing:
                if len(client.unacked) < 16:
                    await client.send(self.table, text())
                else:
                    await trio.sleep(0.001)

    def judge(self) -> None:
        """Hold the acks against the file."""
        wal = self.chatd.db.with_name(f"{self.chatd.db.name}-wal")
        assert not wal.exists(), "the -wal was not folded into the database"
        with contextlib.closing(look_into(self.chatd.db)) as db:
            stored = dict(db.execute("SELECT content, id FROM message"))
        acked = [
            (client.sent[client_id]["content"], ack["message_id"])
            for client in self.writers
            for client_id, ack in client.acked.items()
        ]
        lost = sum(stored.get(content) != message_id for content, message_id in acked)
        assert not lost, f"{lost} of {len(acked)} acked messages are lost"
        self.chatd.check()
        self.acked = len(acked)


async def act(house: House, twice: bool, seconds: list[float]) -> bool:
    """Fill the house, and stop it with one signal or two.

    False: this machine was so slow that those who stall were cut before.
    """
    chatd = house.chatd
    await house.settle()
    async with trio.open_nursery() as nursery:
        for client in house.live:
            nursery.start_soon(house.hear, client)
        for client in house.writers:
            nursery.start_soon(house.write, client)
        assert await until(lambda: all(c.acked for c in house.writers), 60), "no acks"
        await house.flood()
        full = await house.is_full()
        began = trio.current_time()
        chatd.signal(signal.SIGTERM)
        if twice:
            heard = await until(lambda: "stopping" in chatd.log_tail(), 30)
            assert heard, "it did not say that it stops"
            began = trio.current_time()
            chatd.signal(signal.SIGTERM)
        status = await chatd.ended(120)
        if full:
            seconds.append(trio.current_time() - began)
        house.writing = False
        assert status == 0, f"it ended with status {status}"
    for client in (*house.stalled, *house.live):
        client.cut()
    return full


def filled(size: int, drain: int, twice: bool, seconds: list[float]) -> House:
    """Fill and stop a house, judge what it left."""
    for _ in range(5):
        with Chatd(f"--drain-seconds={drain}") as chatd:
            house = House(chatd, size)
            if run_trio(act, house, twice, seconds):
                house.judge()
                return house
    raise AssertionError("this machine is too slow to stall so many at once")


def prove(full: bool) -> Figures:
    """Stop a full house; in the quick form one of 500 as well."""
    size, rounds = 500, 5 if full else 1
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, 65536), limit))
    took: list[float] = []
    at_once: list[float] = []
    acked = 0
    for _ in range(rounds):
        house = filled(size, DRAIN, False, took)
        assert house.ends == {"bye, 1012": len(house.live)}, (
            f"of {len(house.live)} who read, the ends were {dict(house.ends)}"
        )
        assert took[-1] < DRAIN + 3, f"it was out after {took[-1]:.1f} s"
        acked += house.acked
        acked += filled(100, 60, True, at_once).acked
        assert at_once[-1] < 5, f"after the second it took {at_once[-1]:.1f} s"
    return Figures(
        "SIGTERM with 500 clients, half of them stalled: after --drain-seconds chatd "
        "cuts the rest, closes the database and ends; every client that reads gets "
        "`bye` and 1012, no acked message is lost; a second SIGTERM ends chatd at once",
        f"ended after {max(took):.1f} s, --drain-seconds being {DRAIN}; {size // 2} of "
        f"{size // 2} got `bye` and 1012, 0 of {acked:,} acked lost; ended "
        f"{max(at_once):.2f} s after a second SIGTERM",
        {
            "clients": size,
            "seconds": round(max(took), 2),
            "at_once_seconds": round(max(at_once), 2),
            "acked": acked,
        },
    )
