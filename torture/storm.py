"""After a restart all clients come back at once, and all of them catch up.

Each client has a socket and a cursor. The server is killed and started again. While no
client is connected, messages are sent, and some that the clients have are edited and
deleted. Then all clients come back in the same
moment, while more messages are sent. None may miss an event or receive one twice.
"""

from __future__ import annotations

import trio
from crowd import read_database, verify_events
from harness import (
    DISCONNECTED,
    Chatd,
    Client,
    Figures,
    Http,
    connect_all,
    http,
    make_chat,
    post_message,
    quantile,
    raise_file_limit,
    run_trio,
    text,
)

SMALL_CHAT = 10  # members; every user is in one of these, and in the large chat


class Storm:
    """Many clients of one server, and a service that writes to their chats."""

    def __init__(self, chatd: Chatd, size: int) -> None:
        self.chatd = chatd
        self.clients = [Client(chatd, user_id) for user_id in range(1, size + 1)]
        self.chats: list[int] = []  # the large chat, then the small ones
        self.newest = 0  # the seq of the newest message
        self.last_content = text("the last message")
        # Seconds after the storm began, for each client.
        self.connected: list[float] = []
        self.caught_up: list[float] = []
        self.refused = 0

    async def connect(self) -> None:
        """Create the chats, and connect all clients."""
        users = [client.user_id for client in self.clients]
        self.chats = [await make_chat(self.chatd, users)]
        for start in range(0, len(users), SMALL_CHAT):
            members = users[start : start + SMALL_CHAT]
            self.chats.append(await make_chat(self.chatd, members))
        await connect_all(self.clients)

    async def write(self, chats: list[int], content: str = "") -> None:
        """Send a message to each of the chats."""
        connection = Http(self.chatd)
        for chat_id in chats:
            self.newest = await post_message(connection, chat_id, content or text())
        await connection.aclose()

    async def change(self, messages: list[int]) -> None:
        """Edit these messages, and delete the first, as the service does."""
        token = self.chatd.service_token()
        for message_id in messages:
            path, body = f"/api/v1/messages/{message_id}", {"content": text("edited")}
            reply = await http(self.chatd, "PATCH", path, token, body)
            assert reply.status == 200, f"an edit was answered {reply.status}"
            self.newest = int(reply.json["message"]["rev"])
        path = f"/api/v1/messages/{messages[0]}"
        reply = await http(self.chatd, "DELETE", path, token)
        assert reply.status == 204, f"a deletion was answered {reply.status}"

    async def follow(self, client: Client) -> None:
        """Receive on one socket until it ends."""
        end = await client.receive_until_closed()
        assert end.code in (1006, 1012), f"a socket ended with {end.code}"

    async def come_back(self, client: Client, began: float, newest: int) -> None:
        """Connect until it works; receive what was missed, up to the last message.

        newest is the seq of the last message that it missed.
        """
        while True:
            try:
                await client.connect(120)
                break
            except DISCONNECTED:
                self.refused += 1
                await trio.sleep(0.1)
        self.connected.append(trio.current_time() - began)
        caught_up = False
        while True:
            event = await client.receive(seconds=120)
            if "message" not in event:
                continue
            if event["seq"] >= newest and not caught_up:
                caught_up = True
                self.caught_up.append(trio.current_time() - began)
            if event["message"]["content"] == self.last_content:
                return


async def act(storm: Storm, missed: int) -> None:
    """Kill, start, send what the clients miss, and let all come back."""
    chatd = storm.chatd
    await storm.connect()
    async with trio.open_nursery() as nursery:
        for client in storm.clients:
            nursery.start_soon(storm.follow, client)
        await storm.write([storm.chats[0], *storm.chats])
        await trio.sleep(0.2)
        seen = [event["message"]["id"] for event in storm.clients[0].events
                if event["type"] == "new_message"]  # fmt: skip
        chatd.kill()
    await chatd.start_in_thread()
    await storm.write(storm.chats + storm.chats[:1] * missed)
    await storm.change(seen)
    began, newest = trio.current_time(), storm.newest
    async with trio.open_nursery() as nursery:
        for client in storm.clients:
            nursery.start_soon(storm.come_back, client, began, newest)
        for _ in range(5):
            await storm.write(storm.chats[:1])
            await trio.sleep(0.2)
        await storm.write(storm.chats)
        await storm.write(storm.chats[:1], storm.last_content)
    for client in storm.clients:
        client.cut()


def prove(full: bool) -> Figures:
    """Let 2,000 clients come back at once; 500 in the quick form."""
    size, missed = (2000, 50) if full else (500, 20)
    raise_file_limit()
    with Chatd() as chatd:
        storm = Storm(chatd, size)
        run_trio(act, storm, missed, seconds=600)
        event_log, messages = read_database(chatd.db)
        received = sum(
            verify_events(client, event_log, messages) for client in storm.clients
        )
    half, back = quantile(0.5, storm.connected), max(storm.connected)
    caught_up = max(storm.caught_up)
    return Figures(
        "after a restart all clients come back at once: each catches up with its "
        "cursor, and none misses an event or gets one twice",
        f"{size:,} clients, half of them back after {half:.1f} s, all "
        f"after {back:.1f} s; the last had caught up after {caught_up:.1f} s while "
        f"messages went on; {received:,} events, each received once",
        {
            "clients": size,
            "back_seconds": round(back, 2),
            "caught_up_seconds": round(caught_up, 2),
            "refused": storm.refused,
            "received": received,
        },
    )
