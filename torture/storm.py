"""After a restart everybody comes back at once, and everybody catches up.

Each client has a socket and a cursor. The server is killed; what was still to be said
is said first thing after its start; then all clients come back in the same moment,
while others go on writing. Nobody may miss an event, or hear one twice.
"""

from __future__ import annotations

import resource

import trio
from crowd import LOG, MESSAGES, Row, judge_history, look_into
from harness import (
    Chatd,
    Client,
    Closed,
    Figures,
    Http,
    Refused,
    make_chat,
    quantile,
    run_trio,
    text,
)

AWAY = (OSError, trio.BrokenResourceError, Closed, Refused)
ROOM = 10  # members of a small chat; one more has everybody


class Storm:
    """Many clients of one server, and a service that writes to their chats."""

    def __init__(self, chatd: Chatd, size: int) -> None:
        self.chatd = chatd
        self.clients = [Client(chatd, user_id) for user_id in range(1, size + 1)]
        self.chats: list[int] = []
        self.last = 0  # the seq of the last message
        self.last_word = text("the last word")
        self.again: list[float] = []  # when each was back, and when it was up to date
        self.up_to_date: list[float] = []
        self.refused = 0

    async def settle(self) -> None:
        """Make the chats, and connect everybody."""
        users = [client.user_id for client in self.clients]
        self.chats = [await make_chat(self.chatd, users)]
        for start in range(0, len(users), ROOM):
            self.chats.append(await make_chat(self.chatd, users[start : start + ROOM]))
        limiter = trio.CapacityLimiter(50)

        async def connect(client: Client) -> None:
            async with limiter:
                await client.connect(120)

        async with trio.open_nursery() as nursery:
            for client in self.clients:
                nursery.start_soon(connect, client)

    async def write(self, chats: list[int], content: str = "") -> None:
        """Write a message into each of the chats."""
        http, token = Http(self.chatd), self.chatd.service_token()
        for chat_id in chats:
            body = {"content": content or text(), "sender_id": 1}
            path = f"/api/v1/chats/{chat_id}/messages"
            reply = await http.request("POST", path, token, body)
            assert reply.status == 201, f"a post was answered {reply.status}"
            self.last = reply.json["message"]["id"]
        await http.aclose()

    async def follow(self, client: Client) -> None:
        """Hear, on one socket, until it ends."""
        end = await client.receive_until_closed()
        assert end.code in (1006, 1012), f"a socket ended with {end.code}"

    async def come_back(self, client: Client, began: float, missed: int) -> None:
        """Connect until it works; hear all that was missed, and then the last word."""
        while True:
            try:
                await client.connect(120)
                break
            except AWAY:
                self.refused += 1
                await trio.sleep(0.1)
        self.again.append(trio.current_time() - began)
        caught_up = False
        while True:
            event = await client.receive("new_message", 120)
            if event["seq"] >= missed and not caught_up:
                caught_up = True
                self.up_to_date.append(trio.current_time() - began)
            if event["message"]["content"] == self.last_word:
                return


async def act(storm: Storm, missed: int) -> None:
    """Kill, start, say what is missed, let all come back."""
    chatd = storm.chatd
    await storm.settle()
    async with trio.open_nursery() as nursery:
        for client in storm.clients:
            nursery.start_soon(storm.follow, client)
        await storm.write([storm.chats[0], *storm.chats])
        await trio.sleep(0.2)
        chatd.kill()
    await chatd.start_in_thread()
    await storm.write(storm.chats + storm.chats[:1] * missed)
    began, newest = trio.current_time(), storm.last
    async with trio.open_nursery() as nursery:
        for client in storm.clients:
            nursery.start_soon(storm.come_back, client, began, newest)
        for _ in range(5):
            await storm.write(storm.chats[:1])
            await trio.sleep(0.2)
        await storm.write(storm.chats)
        await storm.write(storm.chats[:1], storm.last_word)
    for client in storm.clients:
        client.cut()


def prove(full: bool) -> Figures:
    """Let 2,000 come back at once; 500 in the quick form."""
    size, missed = (2000, 50) if full else (500, 20)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, 65536), limit))
    with Chatd() as chatd:
        storm = Storm(chatd, size)
        run_trio(act, storm, missed, seconds=600)
        db = look_into(chatd.db)
        log = [Row(*row) for row in db.execute(LOG)]
        messages = {row[0]: row[1:] for row in db.execute(MESSAGES)}
        db.close()
        heard = sum(judge_history(client, log, messages) for client in storm.clients)
    half, back = quantile(0.5, storm.again), max(storm.again)
    caught_up = max(storm.up_to_date)
    return Figures(
        "after a restart all clients come back at once: each catches up with its "
        "cursor, and none misses an event or gets one twice",
        f"{size:,} clients, half of them back after {half:.1f} s, all "
        f"after {back:.1f} s; the last had caught up after {caught_up:.1f} s while "
        f"messages went on; {heard:,} events, each received once",
        {
            "clients": size,
            "back_seconds": round(back, 2),
            "caught_up_seconds": round(caught_up, 2),
            "refused": storm.refused,
            "heard": heard,
        },
    )
