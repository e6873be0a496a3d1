"""A crowd that writes, reads, comes and goes, while a proof does things to the server.

Some send over sockets, several messages in flight, some post over HTTP; chats are made,
members are added and removed, messages are marked as read. Whoever has no answer asks
again, with the same client_id. Every device keeps its cursor and follows the log over
sockets and polls, mixed by seeded_rng, through whatever happens.

At the end `Crowd.judge` holds what the clients were told against the database file,
read here with SQLite, not with chatd.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import trio
from harness import Chatd, Client, Closed, Frame, Http, Refused, seeded_rng, text, until

# The server is away, or cut us: come again.
GONE = (
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    Closed,
    Refused,
)


class Meant(NamedTuple):
    """A message that somebody began to send: who, and in which order."""

    who: str
    order: int


class Row(NamedTuple):
    """An event of the log, as the database has it."""

    seq: int
    kind: str
    chat_id: int
    to_chat: int
    to_user: int | None
    user_id: int | None
    message_id: int | None


class Crowd:
    """Users, their devices, and what they were promised.

    Users are in the rooms, which do not change, and with many ghosts in a large chat;
    guests are added to and removed from the changing chats all the time.
    """

    def __init__(self, chatd: Chatd, name: str, *, users: int = 16) -> None:
        self.chatd = chatd
        self.chance = seeded_rng(name)
        self.users = list(range(1, users + 1))
        self.guests = list(range(101, 107))
        self.ghosts = list(range(201, 260))
        self.rooms: list[int] = []
        self.changing: list[int] = []
        self.everybody = 0
        self.devices: list[Client] = []
        self.talking = True
        self.window = 8  # messages of a device without an ack
        self.pause = 0.03  # seconds between two of them, on average
        self.counts: Counter[str] = Counter()
        # What was promised. A message is known by its content: no two are alike.
        self.meant: dict[str, Meant] = {}
        self.posted: dict[str, Frame] = {}  # by HTTP, with the answer
        self.refused: set[str] = set()
        self.marks: dict[str, tuple[int, int, int]] = {}  # ref: user, chat, n
        self.marked: dict[tuple[int, int], int] = {}  # user, chat: acked position
        self.changes: dict[tuple[int, int], list[bool]] = defaultdict(list)
        self.made: dict[str, int] = {}  # title: id
        self._order = itertools.count(1)

    def dice(self) -> random.Random:
        """Make a source of chance for one actor."""
        return random.Random(self.chance.random())

    async def settle(self) -> None:
        """Make the chats, before anything happens."""
        users = self.users
        self.everybody = await self._make("everybody", [*users, *self.ghosts])
        for half in (0, 1):
            for part in range(max(1, len(users) // 8)):
                members = [user for user in users if user % 2 == half]
                self.rooms.append(await self._make(f"room {half} {part}", members))
        for number in range(2):
            self.changing.append(await self._make(f"changing {number}", users[:4]))

    async def _make(self, title: str, members: Iterable[int]) -> int:
        http, token = Http(self.chatd), self.chatd.service_token()
        body = {"title": title, "member_ids": list(members)}
        reply = await http.request("POST", "/api/v1/chats", token, body)
        await http.aclose()
        assert reply.status == 201, f"making a chat was answered {reply.status}"
        self.made[title] = chat_id = reply.json["chat"]["id"]
        return int(chat_id)

    def mean(self, user_id: int, who: str, dice: random.Random) -> tuple[int, str]:
        """Think of a message, and where to say it."""
        if user_id in self.guests:
            chat_id = dice.choice(self.changing)  # is he in it? Not always
        elif user_id in self.users[:4] and dice.random() < 0.3:
            chat_id = dice.choice(self.changing)
        elif dice.random() < 0.2:
            chat_id = self.everybody
        else:
            half = len(self.rooms) // 2
            chat_id = dice.choice(
                self.rooms[half:] if user_id % 2 else self.rooms[:half]
            )
        content = text()
        if dice.random() < 0.1:
            content += " " + "длинно " * dice.randrange(1, 300)
        self.meant[content] = Meant(who, next(self._order))
        return chat_id, content

    # --- the actors ------------------------------------------------------------------

    def start(self, nursery: trio.Nursery) -> None:
        """Let everybody begin."""
        for user_id in [*self.users, *self.users, *self.guests]:
            device = Client(self.chatd, user_id)
            writes = len(self.devices) < len(self.users) or user_id in self.guests
            self.devices.append(device)
            nursery.start_soon(self._follow, device, writes, self.dice())
        for user_id in self.users[::2]:
            nursery.start_soon(self._post, user_id, self.dice())
        for chat_id in self.changing:
            nursery.start_soon(self._change, chat_id, self.dice())
        nursery.start_soon(self._make_chats, self.dice())

    async def _follow(self, device: Client, writes: bool, dice: random.Random) -> None:
        """Follow the log with one device, over sockets and polls; perhaps write."""
        while self.talking or device.unacked:
            if not self.chatd.ready:  # knocking at a closed door proves nothing
                await trio.sleep(0.02)
                continue
            try:
                if device.cursor is not None and dice.random() < 0.3:
                    for _ in range(dice.randrange(1, 4)):
                        while await device.poll(dice.choice((1, 7, 100, 500))):
                            pass
                        self.counts["polls"] += 1
                await device.connect()
                self.counts["sockets"] += 1
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._hear, device, nursery.cancel_scope)
                    if writes:
                        nursery.start_soon(self._write, device, dice)
                    await self._stay(device, dice)
                    nursery.cancel_scope.cancel()
            except* GONE:
                self.counts["cut"] += 1
            device.cut()
            await trio.sleep(0.02)

    async def _stay(self, device: Client, dice: random.Random) -> None:
        """Stay for a while, and read; at the end until all is acked."""
        with trio.move_on_after(dice.expovariate(1 / 1.5)):
            while self.talking:
                await trio.sleep(dice.expovariate(1 / 0.3))
                for event in reversed(device.events[-5:]):
                    if event["type"] == "new_message":
                        message = event["message"]
                        ref = await device.send_command(
                            "mark_read", message_id=message["id"]
                        )
                        where = device.user_id, event["chat_id"], message["n"]
                        self.marks[ref] = where
                        break
        if not self.talking:
            await until(lambda: not device.unacked, 5)

    async def _hear(self, device: Client, cut: trio.CancelScope) -> None:
        while True:
            frame = await device.receive(seconds=60)
            match frame:
                case {"type": "ack", "ref": ref} if ref in self.marks:
                    user_id, chat_id, n = self.marks.pop(ref)
                    before = self.marked.get((user_id, chat_id), 0)
                    self.marked[user_id, chat_id] = max(n, before)
                case {"type": "error", "code": code}:
                    self.counts[code] += 1
                    if code not in Client.FINAL:
                        cut.cancel()  # it comes back, and repeats

    async def _write(self, device: Client, dice: random.Random) -> None:
        """Send what has no ack again, then new messages, several in flight."""
        await device.repeat()
        while self.talking:
            # What a guest says may be refused now and taken later: one at a time.
            window = 1 if device.user_id in self.guests else self.window
            if len(device.unacked) < window:
                await device.send(*self.mean(device.user_id, device.name, dice))
            await trio.sleep(dice.expovariate(1 / self.pause))

    async def _post(self, user_id: int, dice: random.Random) -> None:
        """Post over HTTP, one message after the other, each until it is answered."""
        http, token, who = Http(self.chatd), self.chatd.token(user_id), f"p{user_id}"
        while self.talking:
            chat_id, content = self.mean(user_id, who, dice)
            path = f"/api/v1/chats/{chat_id}/messages"
            body = {"content": content, "client_id": f"{who}-{next(self._order)}"}
            status, answer = await self._insist(http, "POST", path, token, body)
            assert status in (200, 201), f"a post was answered {status} {answer}"
            message = answer["message"]
            self.posted[content] = message | {"message_id": message["id"]}
            await trio.sleep(dice.expovariate(1 / self.pause))
        await http.aclose()

    async def _insist(
        self, http: Http, method: str, path: str, token: str, body: Any = None
    ) -> tuple[int, Any]:
        """Ask until there is an answer that is one; its status and body."""
        while True:
            await until(lambda: self.chatd.ready, 30)
            with contextlib.suppress(*GONE), trio.fail_after(30):
                reply = await http.request(method, path, token, body)
                if reply.status < 500:
                    return reply.status, reply.json if reply.body else None
                self.counts[reply.json["error"]["code"]] += 1
            await trio.sleep(0.05)

    async def _change(self, chat_id: int, dice: random.Random) -> None:
        """Add and remove the guests of one chat, each change until it is answered."""
        http, token = Http(self.chatd), self.chatd.service_token()
        path = f"/api/v1/chats/{chat_id}/members"
        while self.talking:
            user_id = dice.choice(self.guests)
            changes = self.changes[chat_id, user_id]
            if changes and changes[-1]:
                where = f"{path}/{user_id}"
                status, _ = await self._insist(http, "DELETE", where, token)
                assert status in (204, 404), f"a removal was answered {status}"
            else:
                body = {"user_id": user_id}
                status, _ = await self._insist(http, "POST", path, token, body)
                assert status in (201, 200), f"an addition was answered {status}"
            changes.append(status in (201, 200))
            await trio.sleep(dice.expovariate(1 / 0.05))
        await http.aclose()

    async def _make_chats(self, dice: random.Random) -> None:
        """Make chats. That has no key: what got no answer is left alone."""
        while self.talking:
            members = dice.sample(self.users, 3)
            with contextlib.suppress(*GONE, AssertionError), trio.fail_after(30):
                await self._make(f"new {next(self._order)}", members)
            await trio.sleep(dice.expovariate(1 / 0.2))

    # --- the end ---------------------------------------------------------------------

    async def hush(self, seconds: float = 60) -> None:
        """Let every device hear a last message: half over sockets, half over polls."""
        last = text("the last word")
        chat_id = await self._make("last", [*self.users, *self.guests])
        self.meant[last] = Meant("last", next(self._order))
        path, token = f"/api/v1/chats/{chat_id}/messages", self.chatd.service_token()
        http, body = Http(self.chatd), {"content": last, "sender_id": self.users[0]}
        status, _ = await self._insist(http, "POST", path, token, body)
        await http.aclose()
        assert status == 201, f"the last word was answered {status}"

        def heard(device: Client) -> bool:
            newest = device.events[-1] if device.events else {}
            return bool(newest.get("message", {}).get("content") == last)

        async def hear_out(device: Client, over_socket: bool) -> None:
            with trio.move_on_after(seconds):
                if over_socket:
                    await device.connect()
                while not heard(device):
                    await (device.receive() if over_socket else device.poll())
            device.cut()
            assert heard(device), (
                f"a device of user {device.user_id} did not catch up over "
                f"{'the socket' if over_socket else 'polls'}: cursor {device.cursor}"
            )

        async with trio.open_nursery() as nursery:
            for number, device in enumerate(self.devices):
                nursery.start_soon(hear_out, device, number % 2 == 0)

    def acked(self) -> dict[str, Frame]:
        """All messages that were acked, over sockets and HTTP, by content."""
        found = dict(self.posted)
        for device in self.devices:
            for client_id, ack in device.acked.items():
                found[device.sent[client_id]["content"]] = ack
        return found

    def lost(self, path: Path) -> int:
        """Count the acked messages that a file has not, or not as they were acked."""
        with contextlib.closing(look_into(path)) as db:
            stored = {row[4]: row[:3] for row in db.execute(MESSAGES)}
        return sum(
            stored.get(content) != (ack["message_id"], ack["chat_id"], ack["n"])
            for content, ack in self.acked().items()
        )

    def judge(self) -> dict[str, float | str]:
        """Hold what everybody was told against the file; figures about it all.

        Raises AssertionError with a sentence for the first promise that is broken.
        """
        lost = self.lost(self.chatd.db)
        assert not lost, f"{lost} of {len(self.acked())} acked messages are lost"
        with contextlib.closing(look_into(self.chatd.db)) as db:
            self._judge_messages(db)
            self._judge_members(db)
            log = [Row(*row) for row in db.execute(LOG)]
            messages = {row[0]: row[1:] for row in db.execute(MESSAGES)}
        for place, row in enumerate(log, 1):
            assert row.seq == place, f"seq {row.seq} stands at place {place} of the log"
        heard = 0
        for device in self.devices:
            heard += judge_history(device, log, messages)
        return {
            "acked": len(self.acked()),
            "events": len(log),
            "heard": heard,
            "devices": len(self.devices),
            **self.counts,
        }

    def _judge_messages(self, db: sqlite3.Connection) -> None:
        """No message twice, none from nowhere; senders and chats in order."""
        refused = {
            device.sent[client_id]["content"]
            for device in self.devices
            for client_id in device.refused
        }
        seen: set[str] = set()
        orders: dict[str, int] = {}
        ns: Counter[int] = Counter()
        sql = "SELECT id, chat_id, n, content FROM message ORDER BY id"
        for message_id, chat_id, n, content in db.execute(sql):
            assert content not in seen, f"message {message_id} is stored twice"
            seen.add(content)
            assert content in self.meant, f"message {message_id} is nobody's"
            assert content not in refused, f"message {message_id} was refused"
            who, order = self.meant[content]
            assert order > orders.get(who, 0), f"message {message_id} overtook another"
            orders[who] = order
            ns[chat_id] += 1
            assert n == ns[chat_id], (
                f"message {message_id} has n {n}, not {ns[chat_id]}"
            )

    def _judge_members(self, db: sqlite3.Connection) -> None:
        """What was answered about chats, members and read marks is in the file."""
        titles = db.execute("SELECT title, id FROM chat").fetchall()
        assert len({title for title, _ in titles}) == len(titles), (
            "a chat is there twice"
        )
        for title, chat_id in self.made.items():
            assert (title, chat_id) in titles, f"the chat {title!r} is lost"
        for (chat_id, user_id), changes in self.changes.items():
            told = db.execute(
                """SELECT kind = 'chat_added' FROM event
                   WHERE chat_id = ? AND to_user = ?
                     AND kind IN ('chat_added', 'member_removed') ORDER BY seq""",
                (chat_id, user_id),
            ).fetchall()
            log = [bool(row[0]) for row in told]
            assert log == changes, (
                f"user {user_id}, chat {chat_id}: answered {changes}, logged {log}"
            )
            sql = "SELECT count(*) FROM member WHERE chat_id = ? AND user_id = ?"
            there = bool(db.execute(sql, (chat_id, user_id)).fetchone()[0])
            assert there == changes[-1], f"user {user_id}, chat {chat_id}: wrong member"
        positions = {
            (user_id, chat_id): read_n
            for user_id, chat_id, read_n in db.execute(
                "SELECT user_id, chat_id, read_n FROM member"
            )
        }
        for key, n in self.marked.items():
            if key[0] in self.users:
                assert positions[key] >= n, f"a mark of {key} at {n} is lost"


LOG = """SELECT seq, kind, chat_id, to_chat, to_user, user_id, message_id
         FROM event ORDER BY seq"""
MESSAGES = "SELECT id, chat_id, n, sender_id, content, client_id FROM message"


def look_into(path: Path) -> sqlite3.Connection:
    """Open a database to look only."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)


def judge_history(
    device: Client, log: list[Row], messages: dict[int, tuple[Any, ...]]
) -> int:
    """Hold what a device heard against the log; how many events it heard.

    In order, each once, as the log has it. All that was told to him alone, and all of
    the chats that he is in; of a stretch of membership that has ended, a beginning.
    """
    user_id, began = device.user_id, device.start_seq
    assert began is not None, f"a device of user {user_id} never connected"
    assert not device.resyncs, f"a device of user {user_id} was told to resync"
    heard = [event["seq"] for event in device.events]
    for before, after in itertools.pairwise(heard):
        assert before < after, f"user {user_id} heard seq {after} after {before}"
    told = set(heard)
    for event in device.events:
        row = log[event["seq"] - 1]
        is_it = row.kind == event["type"] and row.chat_id == event["chat_id"]
        if row.kind == "new_message":
            message = event["message"]
            fields = ("chat_id", "n", "sender_id", "content")
            said = (*(message[field] for field in fields), message.get("client_id"))
            is_it = is_it and said == messages[message["id"]]
        assert is_it, f"user {user_id} heard {event}, the log has {row}"
    stretches: dict[int, list[int]] = {}  # of chats that he is in at this point
    visible = 0
    for row in log:
        mine = row.to_user == user_id
        if row.to_chat and row.chat_id in stretches and not mine:
            if row.seq > began:
                stretches[row.chat_id].append(row.seq)
            continue
        if not mine:
            assert row.seq not in told, f"seq {row.seq} is not for user {user_id}"
            continue
        if row.seq > began:
            assert row.seq in told, f"user {user_id} never heard seq {row.seq}"
            visible += 1
        if row.kind == "chat_added":
            stretches[row.chat_id] = []
        elif row.kind == "member_removed":
            seqs = stretches.pop(row.chat_id)
            got = [seq for seq in seqs if seq in told]
            assert got == seqs[: len(got)], (
                f"user {user_id} heard {got} of {seqs} in chat {row.chat_id}"
            )
            visible += len(got)
    for chat_id, seqs in stretches.items():
        missed = [seq for seq in seqs if seq not in told]
        assert not missed, f"user {user_id} never heard {missed} of chat {chat_id}"
        visible += len(seqs)
    assert visible == len(heard), f"user {user_id} heard {len(heard)}, not {visible}"
    return visible
