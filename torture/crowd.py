"""A crowd of clients that write, read, connect and leave during a proof's faults.

Some users send over sockets, with several messages in flight, and some post over HTTP.
They edit and delete what they have sent. Chats are created and renamed, members are
added and removed, and messages are marked as read. A request without an answer is
repeated, with the same client_id if it creates. Every device keeps its cursor and
follows the event log over a random mix of sockets and polls, through every fault.
Readers also load history and search meanwhile, and go by the rule of `rev`.

At the end `Crowd.verify` compares what the clients received with the database file,
which it reads with SQLite and not with chatd.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import trio
from harness import (
    DISCONNECTED,
    MARK,
    Change,
    Chatd,
    Client,
    Frame,
    Http,
    http,
    labels,
    seeded_rng,
    text,
    until,
)

# These exceptions end one attempt, and the client tries again.
RETRIED = (*DISCONNECTED, trio.ClosedResourceError, trio.TooSlowError)

WAYS = ("before", "after", "around")  # to ask for a page of history


class Composed(NamedTuple):
    """A message that a sender was about to send, and its place among all messages."""

    sender: str
    order: int


class StoredEvent(NamedTuple):
    """A row of the event log in the database."""

    seq: int
    kind: str
    chat_id: int
    to_chat: int
    to_user: int | None
    user_id: int | None
    message_id: int | None


class State(NamedTuple):
    """The state of a message after the event with the seq rev."""

    rev: int
    deleted: bool
    content: str


class StoredMessage(NamedTuple):
    """A row of a message in the database."""

    id: int
    chat_id: int
    n: int
    sender_id: int
    content: str
    client_id: str | None
    rev: int | None
    deleted: int

    @property
    def state(self) -> State:
        """What edits and deletions change."""
        return State(self.rev or self.id, bool(self.deleted), self.content)


def state_of(message: Frame) -> State:
    """The state of a message that a client received."""
    rev = message.get("rev") or message["id"]
    return State(rev, message.get("deleted", False), message["content"])


class Reader(Client):
    """A device that holds messages, from pages and from events, by the rule of `rev`.

    Of two states of a message it keeps the one with the larger rev. While a request is
    unanswered it also keeps changes of messages that it does not have yet.
    """

    def __init__(self, chatd: Chatd, user_id: int) -> None:
        super().__init__(chatd, user_id)
        self.held: dict[int, Frame] = {}
        self.early: dict[int, Frame] = {}  # changes of messages that it does not have
        self.loading = 0  # unanswered requests

    def start_anew(self) -> None:
        """Forget everything, as a page does that is loaded again."""
        self.held.clear()
        self.events.clear()
        self.cursor = self.start_seq = None

    def handle(self, frame: Frame) -> None:
        """Keep the message of an event."""
        super().handle(frame)
        if frame["type"] in ("new_message", "message_edited", "message_deleted"):
            message = frame["message"]
            if frame["type"] == "new_message" or message["id"] in self.held:
                keep(self.held, message)
            elif self.loading:
                keep(self.early, message)

    async def load(self, path: str) -> None:
        """Ask for a page of messages, and keep them. Raises as `http` does."""
        self.loading += 1
        try:
            reply = await http(self.chatd, "GET", path, self.token)
            if reply.status < 500:
                assert reply.status == 200, f"{path} was answered {reply.status}"
                for message in reply.json["messages"]:
                    keep(self.held, message)
                    if message["id"] in self.early:
                        keep(self.held, self.early[message["id"]])
        finally:
            self.loading -= 1
            if not self.loading:
                self.early.clear()


def keep(held: dict[int, Frame], message: Frame) -> None:
    """Keep a message unless a newer state of it is held."""
    old = held.get(message["id"])
    if old is None or state_of(old).rev <= state_of(message).rev:
        held[message["id"]] = message


class Crowd:
    """Users, their devices, and what the server promised them.

    The members of the fixed chats and of the large chat stay the same; most members of
    the large chat never connect (`offline`). Visitors are added to and removed from the
    changing chats all the time.
    """

    def __init__(self, chatd: Chatd, name: str, *, users: int = 16) -> None:
        self.chatd = chatd
        self.rng = seeded_rng(name)
        self.users = list(range(1, users + 1))
        self.visitors = list(range(101, 107))
        self.offline = list(range(201, 260))
        self.fixed_chats: list[int] = []
        self.changing_chats: list[int] = []
        self.large_chat = 0
        self.devices: list[Client] = []
        self.running = True
        self.window = 8  # unacked messages of one device
        self.pause = 0.03  # seconds between two messages of a sender, on average
        self.counts: Counter[str] = Counter()
        # Messages are told apart by their first contents: no two are the same.
        self.composed: dict[str, Composed] = {}
        self.posted: dict[str, Frame] = {}  # over HTTP, with the answer
        self.posted_keys: dict[str, str] = {}  # client_id: first content
        self.posted_changes: dict[int, list[Change]] = {}  # as Client.changes
        self.pending_marks: dict[str, tuple[int, int, int]] = {}  # ref: user, chat, n
        self.acked_marks: dict[tuple[int, int], int] = {}  # user, chat: n
        # For a changing chat and a visitor, each answered change: added or removed.
        self.changes: dict[tuple[int, int], list[bool]] = defaultdict(list)
        self.created: dict[str, int] = {}  # title: chat id
        self.titles: dict[int, list[str]] = {}  # chat id: all new titles, in order
        self._order = itertools.count(1)

    def actor_rng(self) -> random.Random:
        """Make a random number generator for one actor."""
        return random.Random(self.rng.random())

    async def make_chats(self) -> None:
        """Create the chats, before any fault."""
        users = self.users
        self.large_chat = await self._create("large", [*users, *self.offline])
        for half in (0, 1):
            for part in range(max(1, len(users) // 8)):
                members = [user for user in users if user % 2 == half]
                chat_id = await self._create(f"fixed {half} {part}", members)
                self.fixed_chats.append(chat_id)
        for number in range(2):
            chat_id = await self._create(f"changing {number}", users[:4])
            self.changing_chats.append(chat_id)

    async def _create(self, title: str, members: Iterable[int]) -> int:
        http, token = Http(self.chatd), self.chatd.service_token()
        body = {"title": title, "member_ids": list(members), "client_id": title}
        status, answer = await self._answer(http, "POST", "/api/v1/chats", token, body)
        await http.aclose()
        assert status in (201, 200), f"creating a chat was answered {status} {answer}"
        self.created[title] = chat_id = answer["chat"]["id"]
        return int(chat_id)

    def compose(self, user_id: int, sender: str, rng: random.Random) -> tuple[int, str]:
        """Choose a chat, and make a message for it."""
        if user_id in self.visitors:
            chat_id = rng.choice(self.changing_chats)  # perhaps not a member
        elif user_id in self.users[:4] and rng.random() < 0.3:
            chat_id = rng.choice(self.changing_chats)
        elif rng.random() < 0.2:
            chat_id = self.large_chat
        else:
            half = len(self.fixed_chats) // 2
            chat_id = rng.choice(
                self.fixed_chats[half:] if user_id % 2 else self.fixed_chats[:half]
            )
        content = write(rng)
        self.composed[content] = Composed(sender, next(self._order))
        return chat_id, content

    # --- the actors ------------------------------------------------------------------

    def start(self, nursery: trio.Nursery) -> None:
        """Start all actors."""
        for user_id in [*self.users, *self.users, *self.visitors]:
            device = Client(self.chatd, user_id)
            writes = len(self.devices) < len(self.users) or user_id in self.visitors
            self.devices.append(device)
            nursery.start_soon(self._follow, device, writes, self.actor_rng())
        for user_id in self.users[1::4]:
            reader = Reader(self.chatd, user_id)
            self.devices.append(reader)
            nursery.start_soon(self._follow, reader, False, self.actor_rng())
        for user_id in self.users[::2]:
            nursery.start_soon(self._post, user_id, self.actor_rng())
        for chat_id in self.changing_chats:
            nursery.start_soon(self._change_members, chat_id, self.actor_rng())
            nursery.start_soon(self._rename, chat_id, self.actor_rng())
        nursery.start_soon(self._create_chats, self.actor_rng())

    async def _follow(self, device: Client, writes: bool, rng: random.Random) -> None:
        """Follow the event log with one device, over sockets and polls; maybe write."""
        while self.running or not device.all_acked:
            if not self.chatd.ready:  # a refused connection would test nothing
                await trio.sleep(0.02)
                continue
            try:
                if isinstance(device, Reader) and rng.random() < 0.1:
                    device.start_anew()
                if device.cursor is not None and rng.random() < 0.3:
                    for _ in range(rng.randrange(1, 4)):
                        while await device.poll(rng.choice((1, 7, 100, 500))):
                            pass
                        self.counts["polls"] += 1
                await device.connect()
                self.counts["sockets"] += 1
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._receive, device, nursery.cancel_scope)
                    if writes:
                        nursery.start_soon(self._write, device, rng)
                    if isinstance(device, Reader):
                        nursery.start_soon(self._load, device, rng)
                    await self._read(device, rng)
                    nursery.cancel_scope.cancel()
            except* RETRIED:
                self.counts["cut"] += 1
            device.cut()
            await trio.sleep(0.02)

    async def _read(self, device: Client, rng: random.Random) -> None:
        """Mark messages as read for a while; at the end wait for the last acks."""
        with trio.move_on_after(rng.expovariate(1 / 1.5)):
            while self.running:
                await trio.sleep(rng.expovariate(1 / 0.3))
                for event in reversed(device.events[-5:]):
                    if event["type"] == "new_message":
                        message = event["message"]
                        ref = await device.send_command(
                            "mark_read", message_id=message["id"]
                        )
                        position = device.user_id, event["chat_id"], message["n"]
                        self.pending_marks[ref] = position
                        break
        if not self.running:
            await until(lambda: device.all_acked, 5)

    async def _receive(self, device: Client, cut: trio.CancelScope) -> None:
        """Receive all frames; end the connection when a message is to be repeated."""
        while True:
            frame = await device.receive(seconds=60)
            match frame:
                case {"type": "ack", "ref": ref} if ref in self.pending_marks:
                    user_id, chat_id, n = self.pending_marks.pop(ref)
                    before = self.acked_marks.get((user_id, chat_id), 0)
                    self.acked_marks[user_id, chat_id] = max(n, before)
                case {"type": "error", "code": code}:
                    self.counts[code] += 1
                    if code not in Client.FINAL:
                        cut.cancel()  # the device connects again, and repeats

    async def _write(self, device: Client, rng: random.Random) -> None:
        """Repeat the unacked messages; then send new ones, several in flight."""
        await device.repeat()
        while self.running:
            # A visitor's message may be refused now and accepted later. With two in
            # flight a repeated one could be stored behind the next.
            window = 1 if device.user_id in self.visitors else self.window
            if len(device.unacked) < window:
                await device.send(*self.compose(device.user_id, device.name, rng))
            if device.acked and rng.random() < 0.3:
                client_id, ack = rng.choice(list(device.acked.items()))
                message_id = ack["message_id"]
                if rng.random() < 0.1:  # a repeat, perhaps of what was changed since
                    fields = device.sent[client_id]
                    await device.send_command(
                        "send_message", client_id=client_id, **fields
                    )
                elif may_change(device.changes.get(message_id, ())):
                    await device.change(message_id, compose_change(rng))
            await trio.sleep(rng.expovariate(1 / self.pause))

    async def _post(self, user_id: int, rng: random.Random) -> None:
        """Post messages over HTTP; repeat each until it is answered."""
        http, token = Http(self.chatd), self.chatd.token(user_id)
        sender, own = f"p{user_id}", list[int]()
        while self.running:
            chat_id, content = self.compose(user_id, sender, rng)
            path = f"/api/v1/chats/{chat_id}/messages"
            body = {"content": content, "client_id": f"{sender}-{next(self._order)}"}
            self.posted_keys[body["client_id"]] = content
            status, answer = await self._answer(http, "POST", path, token, body)
            assert status in (200, 201), f"a post was answered {status} {answer}"
            message = answer["message"]
            self.posted[content] = message | {"message_id": message["id"]}
            own.append(message["id"])
            if rng.random() < 0.3:
                await self._change_posted(http, token, rng.choice(own), rng)
            await trio.sleep(rng.expovariate(1 / self.pause))
        await http.aclose()

    async def _change_posted(
        self, http: Http, token: str, message_id: int, rng: random.Random
    ) -> None:
        """Edit or delete a message over HTTP; repeat it until it is answered."""
        changes = self.posted_changes.setdefault(message_id, [])
        if not may_change(changes):
            return
        change = Change(compose_change(rng))
        changes.append(change)
        path = f"/api/v1/messages/{message_id}"
        if change.content is None:
            status, answer = await self._answer(http, "DELETE", path, token)
            assert status == 204, f"a deletion was answered {status} {answer}"
            change.rev = message_id + 1  # at least: the answer does not say it
        else:
            body = {"content": change.content}
            status, answer = await self._answer(http, "PATCH", path, token, body)
            assert status == 200, f"an edit was answered {status} {answer}"
            state = state_of(answer["message"])
            assert state == (state.rev, False, change.content), f"an edit gave {state}"
            change.rev = state.rev

    async def _load(self, reader: Reader, rng: random.Random) -> None:
        """Load pages of history, and of searches."""
        half = len(self.fixed_chats) // 2
        own = self.fixed_chats[half:] if reader.user_id % 2 else self.fixed_chats[:half]
        while self.running:
            chat_id = rng.choice([*own, self.large_chat])
            path = f"/api/v1/chats/{chat_id}/messages?limit={rng.choice((1, 20, 100))}"
            held = [m["id"] for m in reader.held.values() if m["chat_id"] == chat_id]
            with contextlib.suppress(*RETRIED), trio.fail_after(30):
                match rng.randrange(5):
                    case 0 if held:
                        way, at = rng.choice(WAYS), rng.choice(held)
                        await reader.load(f"{path}&{way}={at}")
                    case 1:
                        await reader.load(f"/api/v1/search?q={MARK}")
                    case 2:
                        words = rng.choice((MARK.lower(), f"{rng.randrange(99)}"))
                        at = rng.randint(1, max(reader.held, default=1))
                        await reader.load(f"/api/v1/search?q={words}&before={at}")
                    case _:
                        await reader.load(path)
                self.counts["pages"] += 1
            await trio.sleep(rng.expovariate(1 / 0.2))

    async def _rename(self, chat_id: int, rng: random.Random) -> None:
        """Give a chat one title after the other."""
        http, token = Http(self.chatd), self.chatd.service_token()
        titles = self.titles[chat_id] = []
        while self.running:
            await trio.sleep(rng.expovariate(1 / 0.3))
            titles.append(f"title {next(self._order)}")
            path, body = f"/api/v1/chats/{chat_id}", {"title": titles[-1]}
            status, answer = await self._answer(http, "PATCH", path, token, body)
            assert status == 200, f"a new title was answered {status} {answer}"
            assert answer["chat"]["title"] == titles[-1], f"a new title gave {answer}"
        await http.aclose()

    async def _answer(
        self, http: Http, method: str, path: str, token: str, body: Any = None
    ) -> tuple[int, Any]:
        """Repeat a request until its answer is below 500; return status and body."""
        while True:
            await until(lambda: self.chatd.ready, 30)
            with contextlib.suppress(*RETRIED), trio.fail_after(30):
                reply = await http.request(method, path, token, body)
                if reply.status < 500:
                    return reply.status, reply.json if reply.body else None
                self.counts[reply.json["error"]["code"]] += 1
            await trio.sleep(0.05)

    async def _change_members(self, chat_id: int, rng: random.Random) -> None:
        """Add and remove visitors of one chat; repeat each change until its answer."""
        http, token = Http(self.chatd), self.chatd.service_token()
        path = f"/api/v1/chats/{chat_id}/members"
        while self.running:
            user_id = rng.choice(self.visitors)
            changes = self.changes[chat_id, user_id]
            if changes and changes[-1]:
                member = f"{path}/{user_id}"
                status, _ = await self._answer(http, "DELETE", member, token)
                assert status in (204, 404), f"a removal was answered {status}"
            else:
                body = {"user_id": user_id}
                status, _ = await self._answer(http, "POST", path, token, body)
                assert status in (201, 200), f"an addition was answered {status}"
            changes.append(status in (201, 200))
            await trio.sleep(rng.expovariate(1 / 0.05))
        await http.aclose()

    async def _create_chats(self, rng: random.Random) -> None:
        """Create chats."""
        while self.running:
            members = rng.sample(self.users, 3)
            await self._create(f"new {next(self._order)}", members)
            await trio.sleep(rng.expovariate(1 / 0.2))

    # --- the end ---------------------------------------------------------------------

    async def catch_up(self, seconds: float = 60) -> None:
        """Let every device receive a last message: half over sockets, half by polls."""
        for device in self.devices:
            if device.cursor is None:  # a reader that was about to start anew
                await device.poll()
        last = text("the last message")
        chat_id = await self._create("last", [*self.users, *self.visitors])
        self.composed[last] = Composed("last", next(self._order))
        path, token = f"/api/v1/chats/{chat_id}/messages", self.chatd.service_token()
        http, body = Http(self.chatd), {"content": last, "sender_id": self.users[0]}
        status, _ = await self._answer(http, "POST", path, token, body)
        await http.aclose()
        assert status == 201, f"the last message was answered {status}"

        def has_last(device: Client) -> bool:
            newest = device.events[-1] if device.events else {}
            return bool(newest.get("message", {}).get("content") == last)

        async def receive_last(device: Client, over_socket: bool) -> None:
            with trio.move_on_after(seconds):
                if over_socket:
                    await device.connect()
                while not has_last(device):
                    await (device.receive() if over_socket else device.poll())
            device.cut()
            assert has_last(device), (
                f"a device of user {device.user_id} did not catch up over "
                f"{'the socket' if over_socket else 'polls'}: cursor {device.cursor}"
            )

        async with trio.open_nursery() as nursery:
            for number, device in enumerate(self.devices):
                nursery.start_soon(receive_last, device, number % 2 == 0)

    def acked(self) -> dict[str, Frame]:
        """All acked messages, over sockets and HTTP, by first content."""
        return self.posted | acked_messages(self.devices)

    def message_changes(self) -> dict[int, list[Change]]:
        """All edits and deletions that were asked for, by message."""
        changes = dict(self.posted_changes)
        for device in self.devices:
            changes |= device.changes
        return changes

    def count_lost(self) -> int:
        """Count the acked messages that the database lacks, or has in an old state."""
        return count_lost(self.acked(), self.chatd.db, self.message_changes())

    def gone(self) -> set[bytes]:
        """The labels of all texts that an acked edit or deletion has replaced."""
        gone: set[bytes] = set()
        firsts = {ack["message_id"]: content for content, ack in self.acked().items()}
        for message_id, changes in self.message_changes().items():
            asked = [firsts[message_id], *(change.content for change in changes)]
            for content in asked[: last_acked(changes)]:
                gone |= labels(content or "")
        return gone

    def verify(self) -> dict[str, float | str]:
        """Compare what all clients received with the database file; return figures.

        Raises AssertionError with a sentence for the first broken promise.
        """
        acked = self.acked()
        lost = self.count_lost()
        assert not lost, f"{lost} of {len(acked)} acked messages are lost"
        verify_gone(self.gone(), self.chatd.db)
        with contextlib.closing(open_read_only(self.chatd.db)) as db:
            self._verify_members(db)
        event_log, messages = read_database(self.chatd.db)
        for place, event in enumerate(event_log, 1):
            assert event.seq == place, (
                f"seq {event.seq} is at place {place} of the event log"
            )
        self._verify_messages(messages)
        received = held = 0
        for device in self.devices:
            received += verify_events(device, event_log, messages)
            if isinstance(device, Reader):
                held += verify_held(device, messages)
        self._verify_states()
        changes = [
            change for each in self.message_changes().values() for change in each
        ]
        for change in changes:
            known = change.refused in ("", "not_found")  # a visitor who was removed
            assert known, f"a change was refused: {change.refused}"
        acked_changes = [change for change in changes if change.rev]
        return {
            "acked": len(acked),
            "edited": sum(change.content is not None for change in acked_changes),
            "deleted": sum(change.content is None for change in acked_changes),
            "held": held,
            "events": len(event_log),
            "received": received,
            "devices": len(self.devices),
            **self.counts,
        }

    def _verify_messages(self, messages: Messages) -> None:
        """Each message is stored once and has a sender; senders and chats in order."""
        firsts = dict(self.posted_keys)  # client_id: first content
        for device in self.devices:
            firsts |= {key: fields["content"] for key, fields in device.sent.items()}
        refused = {key for device in self.devices for key in device.refused}
        seen: set[str] = set()
        orders: dict[str, int] = {}
        ns: Counter[int] = Counter()
        for message in messages.values():
            key, which = message.client_id or "", f"message {message.id}"
            content = firsts.get(key, message.content)
            assert content not in seen, f"{which} is stored twice"
            seen.add(content)
            assert content in self.composed, f"{which} has no sender"
            assert key not in refused, f"{which} was refused"
            unchanged = message.rev is None
            assert not unchanged or content == message.content, f"{which} has changed"
            sender, order = self.composed[content]
            assert order > orders.get(sender, 0), f"{which} overtook another"
            orders[sender] = order
            ns[message.chat_id] += 1
            n = ns[message.chat_id]
            assert message.n == n, f"{which} has n {message.n}, not {n}"

    def _verify_states(self) -> None:
        """At one rev a message has one state, in all events and acks."""
        states: dict[tuple[int, int], State] = {}

        def verify_same(message_id: int, state: State) -> None:
            first = states.setdefault((message_id, state.rev), state)
            assert first == state, f"message {message_id}: {first} and {state}"

        for device in self.devices:
            for event in device.events:
                if message := event.get("message"):
                    verify_same(message["id"], state_of(message))
            for message_id, changes in device.changes.items():
                for rev, content in ((c.rev, c.content) for c in changes if c.rev):
                    state = State(rev, content is None, content or "")
                    verify_same(message_id, state)

    def _verify_members(self, db: sqlite3.Connection) -> None:
        """Every answered change of chats, members and read marks is in the file."""
        titles = db.execute("SELECT title, id FROM chat").fetchall()
        assert len({title for title, _ in titles}) == len(titles), (
            "a chat is stored twice"
        )
        for title, chat_id in self.created.items():
            last = self.titles.get(chat_id, [title])[-1:] or [title]
            assert (last[0], chat_id) in titles, f"the chat {last[0]!r} is lost"
        for (chat_id, user_id), changes in self.changes.items():
            rows = db.execute(
                """SELECT kind = 'chat_added' FROM event
                   WHERE chat_id = ? AND to_user = ?
                     AND kind IN ('chat_added', 'member_removed') ORDER BY seq""",
                (chat_id, user_id),
            ).fetchall()
            logged = [bool(row[0]) for row in rows]
            assert logged == changes, (
                f"user {user_id}, chat {chat_id}: answered {changes}, logged {logged}"
            )
            sql = "SELECT count(*) FROM member WHERE chat_id = ? AND user_id = ?"
            is_member = bool(db.execute(sql, (chat_id, user_id)).fetchone()[0])
            assert is_member == changes[-1], (
                f"user {user_id}, chat {chat_id}: stored as a member: {is_member}"
            )
        positions = {
            (user_id, chat_id): read_n
            for user_id, chat_id, read_n in db.execute(
                "SELECT user_id, chat_id, read_n FROM member"
            )
        }
        for key, n in self.acked_marks.items():
            if key[0] in self.users:
                assert positions[key] >= n, f"a mark of {key} at {n} is lost"


# --- the database file ---------------------------------------------------------------

EVENTS_SQL = """SELECT seq, kind, chat_id, to_chat, to_user, user_id, message_id
                FROM event ORDER BY seq"""
# A message that was changed is as its newest change says.
MESSAGES_SQL = """
    SELECT m.id, m.chat_id, m.n, m.sender_id, coalesce(c.content, m.content),
           iif(m.client_id >= ' ', m.client_id, NULL), c.rev, coalesce(c.deleted, 0)
    FROM message m LEFT JOIN change c
        ON c.rev = (SELECT max(rev) FROM change WHERE message_id = m.id)
    ORDER BY m.id
"""
Messages = dict[int, StoredMessage]


def open_read_only(path: Path) -> sqlite3.Connection:
    """Open a database that this process must not change."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)


def read_messages(db: sqlite3.Connection) -> Messages:
    """Read all messages."""
    rows = map(StoredMessage._make, db.execute(MESSAGES_SQL))
    return {row.id: row for row in rows}


def read_database(path: Path) -> tuple[list[StoredEvent], Messages]:
    """Read the event log and the messages."""
    with contextlib.closing(open_read_only(path)) as db:
        event_log = [StoredEvent(*row) for row in db.execute(EVENTS_SQL)]
        return event_log, read_messages(db)


def acked_messages(clients: Iterable[Client]) -> dict[str, Frame]:
    """The acks of all these clients, by the first contents of the messages."""
    return {
        client.sent[client_id]["content"]: ack
        for client in clients
        for client_id, ack in client.acked.items()
    }


def count_lost(
    acked: Mapping[str, Frame],
    path: Path,
    changes: Mapping[int, Sequence[Change]] | None = None,
) -> int:
    """Count the acked messages that a database lacks, or has in an older state.

    acked: by first content. changes: as Client.changes.
    """
    with contextlib.closing(open_read_only(path)) as db:
        stored = read_messages(db)
    lost = 0
    for content, ack in acked.items():
        row = stored.get(ack["message_id"])
        if row is None or (row.chat_id, row.n) != (ack["chat_id"], ack["n"]):
            lost += 1
        else:
            lost += not is_kept(row, content, (changes or {}).get(row.id, ()))
    return lost


def is_kept(row: StoredMessage, first: str, changes: Sequence[Change]) -> bool:
    """Whether a row has the last acked change of a message, or one asked for later.

    first: the content before all changes.
    """
    place = last_acked(changes)
    rev = changes[place - 1].rev if place else row.id
    asked = [first, *(change.content for change in changes)][place:]
    content = None if row.deleted and not row.content else row.content
    return row.state.rev >= rev and content in asked


def last_acked(changes: Sequence[Change]) -> int:
    """The place of the last acked change, counted from 1; 0: there is none."""
    return max((place for place, c in enumerate(changes, 1) if c.rev), default=0)


def may_change(changes: Sequence[Change]) -> bool:
    """Whether a message is not deleted, and its last change was acked."""
    return not changes or (changes[-1].rev > 0 and changes[-1].content is not None)


def compose_change(rng: random.Random) -> str | None:
    """Make the new text of a message; None: it is to be deleted."""
    return None if rng.random() < 0.3 else write(rng)


def write(rng: random.Random) -> str:
    """Make a text, most of them short."""
    return text("длинно " * rng.randrange(1, 300) if rng.random() < 0.1 else "")


def verify_gone(gone: set[bytes], path: Path) -> None:
    """Verify that none of these texts is in any row of the database."""
    with contextlib.closing(open_read_only(path)) as db:
        tables = db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
        for (table,) in tables.fetchall():
            for row in db.execute(f'SELECT * FROM "{table}"'):
                left = labels(str(row)) & gone
                assert not left, f"{left}, which was changed, is in {table}: {row}"


def labels_in_files(path: Path) -> set[bytes]:
    """Find all texts in the bytes of a database and of its WAL."""
    found: set[bytes] = set()
    for file in (path, path.with_name(f"{path.name}-wal")):
        with contextlib.suppress(FileNotFoundError):
            found |= labels(file.read_bytes())
    return found


async def wait_until_erased(gone: set[bytes], path: Path, seconds: float = 60) -> float:
    """Wait until none of these texts is in the bytes of the files; return how long."""
    began = trio.current_time()
    while left := labels_in_files(path) & gone:
        passed = trio.current_time() - began
        assert passed < seconds, f"{len(left)} texts are in the files after {passed} s"
        await trio.sleep(0.2)
    return trio.current_time() - began


def verify_held(reader: Reader, messages: Messages) -> int:
    """Verify that the database has all that a reader holds; count the messages."""
    for message in reader.held.values():
        stored = messages[message["id"]]
        same = state_of(message) == stored.state
        assert same, f"a reader holds {message}, the database has {stored}"
    return len(reader.held)


def verify_events(
    device: Client, event_log: list[StoredEvent], messages: Messages
) -> int:
    """Compare the events that a device received with the event log; count them.

    The device received events in order, each once, and as the log has them. It has all
    events that are addressed to its user, and all of the chats of which the user is a
    member. Of a membership that has ended it may lack the latest events. An event shows
    its message as of this event, or of a later one.
    """
    user_id, start_seq = device.user_id, device.start_seq
    assert start_seq is not None, f"a device of user {user_id} never connected"
    assert not device.resyncs, f"a device of user {user_id} was told to resync"
    received = [event["seq"] for event in device.events]
    for before, after in itertools.pairwise(received):
        assert before < after, f"user {user_id} received seq {after} after {before}"
    received_seqs = set(received)
    for event in device.events:
        row = event_log[event["seq"] - 1]
        same = row.kind == event["type"] and row.chat_id == event["chat_id"]
        if row.message_id is not None:
            message, stored = event["message"], messages[row.message_id]
            fields = ("id", "chat_id", "n", "sender_id")
            columns = (*(message[field] for field in fields), message.get("client_id"))
            same = same and columns == (*stored[:4], stored.client_id)
            state = state_of(message)
            same = same and row.seq <= state.rev <= stored.state.rev
            same = same and (state.rev < stored.state.rev or state == stored.state)
        assert same, f"user {user_id} received {event}, the event log has {row}"
    memberships: dict[int, list[int]] = {}  # at this row: chat id, seqs since joining
    visible = 0
    for row in event_log:
        to_user = row.to_user == user_id
        if row.to_chat and row.chat_id in memberships and not to_user:
            if row.seq > start_seq:
                memberships[row.chat_id].append(row.seq)
            continue
        if not to_user:
            private = row.seq not in received_seqs
            assert private, f"seq {row.seq} is not for user {user_id}"
            continue
        if row.seq > start_seq:
            arrived = row.seq in received_seqs
            assert arrived, f"user {user_id} never received seq {row.seq}"
            visible += 1
        if row.kind == "chat_added":
            memberships[row.chat_id] = []
        elif row.kind == "member_removed":
            seqs = memberships.pop(row.chat_id)
            got = [seq for seq in seqs if seq in received_seqs]
            assert got == seqs[: len(got)], (
                f"user {user_id} received {got} of {seqs} in chat {row.chat_id}"
            )
            visible += len(got)
    for chat_id, seqs in memberships.items():
        missed = [seq for seq in seqs if seq not in received_seqs]
        assert not missed, f"user {user_id} never received {missed} of chat {chat_id}"
        visible += len(seqs)
    assert visible == len(received), (
        f"user {user_id} received {len(received)}, not {visible}"
    )
    return visible
