"""What was deleted is gone: at once from every answer, soon from every byte.

Users send, edit and delete all the time. Readers get what the server has in every way
there is: history, the chat list, searches, polls, sockets that come back with an old
cursor, the feed, the unread list, the export, stats and metrics. A text whose edit or
deletion was acked before a request began must not be in its answer. On an open socket
it must not come after the event that changed it. A watcher reads the bytes of the
database and of its WAL. Another process holds a snapshot for a while, too. At the end a
user is forgotten, through a kill -9, and the server is killed once more.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from urllib.parse import quote

import trio
from crowd import labels_in_files, open_read_only, verify_gone
from harness import (
    DISCONNECTED,
    MARK,
    STATS_PATH,
    Chatd,
    Client,
    Figures,
    Frame,
    Http,
    http,
    labels,
    make_chat,
    run_trio,
    seeded_rng,
    text,
    until,
)

READER, FORGOTTEN = 1, 7  # both are in all chats
WRITERS, POSTERS = (2, 3, FORGOTTEN), (4, 5)
SECONDS = 60.0  # the documented limit
SLACK_SECONDS = 5.0  # between two looks of the watcher, on a busy machine
FEED, INTERNAL = "/api/v1/internal/chat/events", "/api/v1/internal/chat"


class Trial:
    """A server, and the texts that must be gone from it."""

    def __init__(self, chatd: Chatd, seconds: float) -> None:
        self.chatd = chatd
        self.seconds = seconds
        self.rng = seeded_rng("erasure")
        self.chats: list[int] = []
        self.ids: list[tuple[int, int]] = []  # chat id, message id
        self.shown: dict[int, str] = {}  # message id: its text
        self.gone: dict[bytes, float] = {}  # label: when the change was acked
        self.newest_gone: list[str] = []
        self.cursors: list[str] = []
        self.running = True
        self.snapshot_ended = 0.0  # of another process; math.inf: it is held
        self.oldest = 0.0  # seconds that a text was in the files after its change
        self.counts: Counter[str] = Counter()

    def sent(self, chat_id: int, message_id: int, content: str) -> None:
        """Note a message."""
        self.ids.append((chat_id, message_id))
        self.shown[message_id] = content

    def changed(self, message_id: int, content: str | None) -> None:
        """Note that a change was acked: the text before it is gone from now on."""
        old = self.shown.pop(message_id)
        for label in labels(old):
            self.gone[label] = trio.current_time()
        self.newest_gone.append(old)
        self.counts["edits" if content is not None else "deletions"] += 1
        if content is not None:
            self.shown[message_id] = content

    def check(self, where: str, body: str | bytes, before: set[bytes]) -> None:
        """Verify that an answer has none of the texts that were gone before it."""
        self.counts["answers"] += 1
        found = labels(body)
        self.counts["texts"] += len(found)
        late = found & before
        assert not late, f"{where} shows {late}, {len(late)} of {len(found)} texts"

    # --- those who write ---

    def next_change(self, own: list[int], rng: random.Random) -> tuple[int, str | None]:
        """Choose a message and its new text; None: it is to be deleted."""
        message_id = own[rng.randrange(len(own))]
        if rng.random() < 0.4:
            own.remove(message_id)
            return message_id, None
        return message_id, write(rng)

    async def write(self, user_id: int, rng: random.Random) -> None:
        """Send, edit and delete over a socket, several at a time."""
        token = self.chatd.token(user_id, name=text("name"))
        own: list[int] = []
        async with Client(self.chatd, user_id, token=token) as client:
            while self.running:
                client.events.clear()
                await client.send(rng.choice(self.chats), write(rng))
                changes = {}
                if own and rng.random() < 0.8:
                    message_id, content = self.next_change(own, rng)
                    changes[message_id] = await client.change(message_id, content)
                while not client.all_acked:
                    frame = await client.receive()
                    assert frame["type"] != "error", f"a command was answered {frame}"
                    if frame["type"] != "ack":
                        continue
                    if "rev" in frame and frame["message_id"] in changes:
                        change = changes.pop(frame["message_id"])
                        self.changed(frame["message_id"], change.content)
                    else:
                        content = client.sent[frame["client_id"]]["content"]
                        self.sent(frame["chat_id"], frame["message_id"], content)
                        own.append(frame["message_id"])
                await trio.sleep(rng.expovariate(1 / 0.02))

    async def post(self, user_id: int, rng: random.Random) -> None:
        """Send, edit and delete over HTTP."""
        connection, token = Http(self.chatd), self.chatd.token(user_id)
        own: list[int] = []
        while self.running:
            chat_id, content = rng.choice(self.chats), write(rng)
            path = f"/api/v1/chats/{chat_id}/messages"
            reply = await connection.request("POST", path, token, {"content": content})
            assert reply.status == 201, f"a post was answered {reply.status}"
            self.sent(chat_id, reply.json["message"]["id"], content)
            own.append(reply.json["message"]["id"])
            message_id, changed = self.next_change(own, rng)
            path = f"/api/v1/messages/{message_id}"
            if changed is None:
                reply = await connection.request("DELETE", path, token)
            else:
                body = {"content": changed}
                reply = await connection.request("PATCH", path, token, body)
            assert reply.status in (200, 204), f"a change was answered {reply.status}"
            self.changed(message_id, changed)
            await trio.sleep(rng.expovariate(1 / 0.02))
        await connection.aclose()

    # --- those who read ---

    def requests(self, rng: random.Random) -> Iterator[tuple[str, str]]:
        """Every path that shows messages or names, and the token for it."""
        user, service = self.chatd.token(READER), self.chatd.service_token()
        chat_id, message_id = rng.choice(self.ids)
        at = f"/api/v1/chats/{chat_id}"
        words = [MARK]
        if self.newest_gone:
            some = (self.newest_gone[-1], rng.choice(self.newest_gone))
            words += [" ".join(old.split()[:8]) for old in some]  # a search takes 8
        yield f"{at}/messages?limit=100", user
        for way in ("before", "after", "around"):
            yield f"{at}/messages?limit=50&{way}={message_id}", user
        for path in ("/api/v1/chats", at, f"{at}/members", "/api/v1/users"):
            yield path, user
        for q in map(quote, words):
            yield f"/api/v1/search?q={q}", user
            yield f"/api/v1/search?q={q}&chat_id={chat_id}", user
        if self.cursors:
            yield f"/api/v1/events?limit=500&cursor={rng.choice(self.cursors)}", user
            yield f"{FEED}?limit=500&cursor={rng.choice(self.cursors)}", service
        yield f"{FEED}?limit=500&cursor=first", service
        yield f"{INTERNAL}/unread?older_than=1&limit=500", service
        yield STATS_PATH, service
        yield "/metrics", service

    async def read(self, rng: random.Random) -> None:
        """Send all requests, each with what was gone before it."""
        for path, token in self.requests(rng):
            before = set(self.gone)
            reply = await http(self.chatd, "GET", path, token)
            assert reply.status == 200, f"{path} was answered {reply.status}"
            self.check(path, reply.body, before)

    async def come_back(self, rng: random.Random) -> None:
        """Open a socket with an old cursor, or with none, and receive for a moment."""
        client = Client(self.chatd, READER, remember=False)
        if self.cursors and rng.random() < 0.8:
            client.cursor = rng.choice(self.cursors)
        before = set(self.gone)
        async with client:
            self.check("`connected`", json.dumps(client.connected), before)
            with trio.move_on_after(0.5):
                while True:
                    frame = await client.receive()
                    shown = json.dumps(frame, ensure_ascii=False)
                    self.check(f"a socket, in {frame['type']}", shown, before)

    async def walk(self, path: str, token: str) -> None:
        """Go through all pages of events, from the first."""
        cursor, more = "first" if path == FEED else self.cursors[0], True
        while more:
            before = set(self.gone)
            reply = await http(
                self.chatd, "GET", f"{path}?limit=500&cursor={cursor}", token
            )
            self.check(path, reply.body, before)
            cursor, more = reply.json["cursor"], reply.json["more"]

    async def listen(self, listening: trio.CancelScope) -> None:
        """Receive on one socket until cancelled; no text comes after its change."""
        shown: dict[int, set[bytes]] = {}
        gone: set[bytes] = set()
        reader = Client(self.chatd, READER, remember=False)
        with listening:
            await reader.connect()
            while True:
                frame = await reader.receive(seconds=SECONDS)
                found = labels(json.dumps(frame, ensure_ascii=False))
                if "message" in frame and "seq" in frame:
                    message_id = frame["message"]["id"]
                    gone |= shown.get(message_id, set()) - found
                    shown[message_id] = found
                    self.cursors.append(str(reader.cursor))
                late = found & gone
                assert not late, f"an open socket got {late} again, in {frame['type']}"
        reader.cut()

    async def export(self) -> None:
        """Run `chatd export`."""
        before = set(self.gone)
        command = self.chatd.command("export", f"--db={self.chatd.db}")
        done = await trio.run_process(
            command, capture_stdout=True, capture_stderr=True, check=False
        )
        assert done.returncode == 0, f"chatd export: {done.stderr!r}"
        assert labels(done.stdout), "chatd export shows no text"
        self.check("chatd export", done.stdout, before)

    async def everything(self, rng: random.Random) -> None:
        """Read in all ways once."""
        await self.read(rng)
        await self.come_back(rng)
        await self.walk(FEED, self.chatd.service_token())
        await self.walk("/api/v1/events", self.chatd.token(READER))
        await self.export()

    async def again(self, function: str, rng: random.Random) -> None:
        """Read in one way, again and again."""
        while self.running:
            await getattr(self, function)(rng)
            await trio.sleep(0.02)

    # --- the files ---

    async def watch(self) -> None:
        """Look at the bytes of the files, once a second, until cancelled."""
        while True:
            await trio.sleep(1)
            self.look(trio.current_time())

    def look(self, now: float) -> int:
        """Verify the age of all gone texts in the files; return how many there are."""
        found = labels_in_files(self.chatd.db) & self.gone.keys()
        for label in found:
            age = now - max(self.gone[label], self.snapshot_ended)
            self.oldest = max(self.oldest, age)
            assert age < SECONDS + SLACK_SECONDS, (
                f"{label!r} is in the files {age:.0f} s after its change was acked; "
                f"{len(found)} of {len(self.gone)} such texts are"
            )
        return len(found)

    async def hold_snapshot(self, seconds: float) -> None:
        """Read the database as another process does, in one long transaction."""
        await trio.sleep(self.seconds / 4)
        with contextlib.closing(open_read_only(self.chatd.db)) as db:
            db.execute("BEGIN")
            db.execute("SELECT count(*) FROM message").fetchone()
            await trio.sleep(seconds)
        self.snapshot_ended = trio.current_time()


def write(rng: random.Random) -> str:
    """Make a text; some are long enough for pages of their own."""
    return text("größer " * rng.choice((0, 0, 1, 8, 60, 500)))


async def forget(trial: Trial) -> None:
    """Forget a user; kill the server meanwhile, and go on until it is done."""
    chatd = trial.chatd
    with contextlib.closing(open_read_only(chatd.db)) as db:
        sql = (
            "SELECT name FROM user JOIN user_name n ON n.id = name_id WHERE user.id = ?"
        )
        user = db.execute(sql, (FORGOTTEN,)).fetchone()
        sql = """SELECT coalesce(c.content, m.content) FROM message m LEFT JOIN change c
                     ON c.rev = (SELECT max(rev) FROM change WHERE message_id = m.id)
                 WHERE m.sender_id = ?"""
        contents = db.execute(sql, (FORGOTTEN,)).fetchall()
    path, token = f"{INTERNAL}/forget", chatd.service_token()
    body: Frame = {"user_id": FORGOTTEN}

    async def ask() -> bool:
        try:
            reply = await http(chatd, "POST", path, token, body)
        except DISCONNECTED:
            return True
        assert reply.status == 200, f"forget was answered {reply.status}"
        return bool(reply.json["more"])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(0.02)
        chatd.kill()
    await chatd.start_in_thread()
    while await ask():
        pass
    for (content,) in (user, *contents):
        for label in labels(content):
            trial.gone[label] = trio.current_time()
    trial.counts["forgotten"] += sum(bool(content) for (content,) in contents)


async def act(trial: Trial) -> None:
    """Write and read for some seconds; forget a user; kill; look until all is gone."""
    chatd, rng = trial.chatd, trial.rng
    users = [READER, *WRITERS, *POSTERS, 8]
    trial.chats = [await make_chat(chatd, users) for _ in range(3)]
    async with Client(chatd, READER) as first:
        trial.cursors.append(str(first.cursor))
    async with trio.open_nursery() as watching:
        watching.start_soon(trial.watch)
        async with trio.open_nursery() as nursery:
            for user_id in WRITERS:
                nursery.start_soon(trial.write, user_id, random.Random(rng.random()))
            for user_id in POSTERS:
                nursery.start_soon(trial.post, user_id, random.Random(rng.random()))
            listening = trio.CancelScope()
            nursery.start_soon(trial.listen, listening)
            nursery.start_soon(trial.hold_snapshot, 5)
            await trio.sleep(1)
            for way in ("read", "read", "come_back", "come_back", "everything"):
                nursery.start_soon(trial.again, way, random.Random(rng.random()))
            await trio.sleep(trial.seconds)
            trial.running = False
            listening.cancel()
        await forget(trial)
        await trial.everything(rng)
        gone = await until(lambda: not trial.look(trio.current_time()), 2 * SECONDS)
        assert gone, "deleted texts stay in the files"
        watching.cancel_scope.cancel()
    chatd.kill()
    verify_gone(set(trial.gone), chatd.db)
    await chatd.start_in_thread()
    await trial.everything(rng)
    left = trial.look(trio.current_time())
    assert not left, f"after a kill {left} texts are in the files again"


def prove(full: bool) -> Figures:
    """Change messages for 15 s, in the full form for three minutes."""
    with Chatd() as chatd:
        trial = Trial(chatd, 180 if full else 15)
        run_trio(act, trial, seconds=900)
        chatd.log_without_traceback()
        chatd.stop()
        chatd.check()
    counts = trial.counts
    return Figures(
        "what was deleted or edited away is at once in no answer, replay, search, feed "
        "or export, and within 60 s in no byte of the database and its WAL; the same "
        "holds for a user who was forgotten",
        f"{counts['edits']:,} edits and {counts['deletions']:,} deletions, "
        f"{counts['forgotten']:,} messages of a forgotten user: 0 of them in "
        f"{counts['answers']:,} later answers with {counts['texts']:,} texts; after "
        f"{trial.oldest:.0f} s none was in the files",
        {"oldest_seconds": round(trial.oldest, 1), **counts},
    )
