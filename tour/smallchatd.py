#!/usr/bin/env python3
"""smallchatd: the whole idea of chatd in one short program.

    python tour/smallchatd.py [PORT [DB]]       prints two links: open both

An ack means that the message is on disk. Every connected member of its chat then gets
the message, in the order of the commits. No client delays another one, and nothing that
a client sends ends anything but its own connection.

ONE MESSAGE, STEP BY STEP

    Session.read      has read a frame: rate, JSON, then a Job for the store
    Store.run         takes one Job, and waits for a worker thread
    Store.transact    in that thread: INSERT, COMMIT. Now the message is DURABLE.
    Hub.run           puts the event into the outbox of each member's session, then the
                      ack into the sender's. It never waits for a client.
    Session.write     takes frames from its own outbox, and waits for its own client

THE TASK TREE

A task never outlives the nursery above it. The nurseries end from the inside out.

    main, Server.run              (a nursery: ends with the hub)
    |- Store.run                  commits, one Job after another
    |- Hub.run                    publishes
    `- connections                (a nursery: ends with its last connection)
       |- accepting               (a nursery: ends at the signal to stop)
       `- Server.connection       one for each TCP connection: the bulkhead
          `- Server.serve_socket  (a nursery: ends with its WebSocket)
             |- Session.read
             `- Session.write

WHAT IT LEAVES OUT, AND chatd HAS

A cursor: a client that was away does not get what it missed. Catching up: a client that
is too slow is cut. Group commit, and one frame for all. History, unread counts, search,
editing; chats and their members are rows that you insert. A limit on connections and on
posts; tokens that end while a socket is open. If the disk fails, the server ends.
"""

from __future__ import annotations

import os
import re
import secrets
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import parse_qs, urlsplit

import h11
import jwt
import msgspec
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream

JOBS = 100  # may wait for the store; then sessions wait, and read nothing
OUTBOX_FRAMES = 100  # may wait for a client; then it is cut
MAX_BYTES = 65_536  # of a request or a message
COMMANDS_PER_SECOND, BURST = 10, 20  # of a session
REQUEST_SECONDS = 10  # for a client to send a request, or to take an answer
IDLE_SECONDS = 60  # between two messages of a client; ChatWebSocket pings after 25 s
WRITE_SECONDS = 10  # for a client to take a frame
DRAIN_SECONDS = 5  # for the clients to go, at a stop

SECRET = os.environ.get("SMALLCHATD_SECRET") or secrets.token_hex(32)
ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "/": (ROOT / "tour/try.html", "text/html"),
    "/web/chat-websocket.js": (ROOT / "web/chat-websocket.js", "text/javascript"),
}
SCHEMA = """
CREATE TABLE IF NOT EXISTS member (
    chat_id INTEGER, user_id INTEGER, read_id INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (chat_id, user_id));
CREATE TABLE IF NOT EXISTS message (
    id INTEGER PRIMARY KEY, chat_id INTEGER, sender_id INTEGER, content TEXT,
    created_at TEXT, client_id TEXT, UNIQUE (sender_id, client_id));
INSERT OR IGNORE INTO member (chat_id, user_id) VALUES (1, 1), (1, 2);
"""
Json = dict[str, Any]

# --- server: the task tree, from the root down ----------------------------------------


async def main(port: str = "8087", db: str = "smallchatd.db") -> None:
    """Serve on this machine, and print a link for each of two users."""
    server = Server(Store(db))
    listeners = await trio.open_tcp_listeners(int(port), host="127.0.0.1")
    host, bound_port = listeners[0].socket.getsockname()
    for user_id in 1, 2:
        token = jwt.encode({"user_id": user_id}, SECRET, "HS256")
        print(f"user {user_id}: http://{host}:{bound_port}/#{token}", flush=True)
    await server.run(listeners)


class Server:
    """What all connections share, and the tasks that outlive them."""

    def __init__(self, store: Store) -> None:
        self.store, self.hub = store, Hub()

    async def run(self, listeners: list[trio.SocketListener]) -> None:
        """Serve until a signal comes. A second one ends the process at once."""
        to_hub, from_store = trio.open_memory_channel[Done](1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.store.run, to_hub)
            nursery.start_soon(self.hub.run, from_store)
            async with trio.open_nursery() as connections:
                accept = partial(trio.serve_listeners, handler_nursery=connections)
                async with trio.open_nursery() as accepting:
                    accepting.start_soon(accept, self.connection, listeners)
                    with trio.open_signal_receiver(SIGINT, SIGTERM) as signals:
                        await anext(signals)
                    accepting.cancel_scope.cancel()
                self.hub.close()
                connections.cancel_scope.deadline = trio.current_time() + DRAIN_SECONDS
            self.store.jobs.close()  # ends the store, which ends the hub

    async def connection(self, stream: trio.SocketStream) -> None:
        """Serve one connection. The bulkhead: what fails in it ends only this one."""
        try:
            async with stream:
                try:
                    with trio.fail_after(REQUEST_SECONDS):
                        request = await read_request(stream)
                    if request.path == "/ws/chat":
                        await self.serve_socket(stream, request)
                        return
                    answer = await self.answer(request)
                except Refusal as refusal:
                    answer = http_answer(refusal.status, {"error": refusal.error})
                with trio.fail_after(REQUEST_SECONDS):
                    await stream.send_all(answer)
        except* (trio.BrokenResourceError, trio.TooSlowError, ConnectionClosed):
            pass  # the client is gone, or too slow
        except* Exception:
            traceback.print_exc()

    async def serve_socket(self, stream: trio.SocketStream, request: Request) -> None:
        """Serve a WebSocket from its handshake to its end. Raises Refusal."""
        user_id = authenticate(request)
        whole = trio.StapledStream(stream, Replay(request.received, stream))
        async with trio.open_nursery() as nursery:
            with trio.fail_after(REQUEST_SECONDS):
                handshake = await wrap_server_stream(
                    nursery, whole, message_queue_size=1, max_message_size=MAX_BYTES
                )
                socket = await handshake.accept()
            session = Session(user_id, socket, self.store.jobs, nursery)
            self.hub.enter(session)
            try:
                nursery.start_soon(session.write)
                await session.read()
            finally:
                self.hub.leave(session)
                nursery.cancel_scope.cancel()

    async def answer(self, request: Request) -> bytes:
        """Answer a request over HTTP. Raises Refusal."""
        if request.path in PAGES:
            path, kind = PAGES[request.path]
            return http_answer(200, path.read_bytes(), kind)
        chat = re.fullmatch(r"/api/v1/chats/(\d{1,15})/messages", request.path)
        if not chat or request.method != "POST":
            raise Refusal(404, "not_found", "there is nothing here")
        user_id, command = authenticate(request), parse(request.body)
        command.type, command.chat_id = "send_message", int(chat[1])
        done, answered = trio.open_memory_channel[Outcome](1)
        await self.store.jobs.send(Job(user_id, command, done.send_nowait))
        outcome = await answered.receive()
        if isinstance(outcome.answer, Refusal):
            raise outcome.answer
        return http_answer(201, {"message": outcome.event["message"]})


# --- connection: a session reads commands, and writes what is in its outbox -----------


class Session:
    """One WebSocket: a task that reads from it, and a task that writes to it."""

    def __init__(
        self,
        user_id: int,
        socket: WebSocketConnection,
        jobs: Jobs,
        nursery: trio.Nursery,
    ) -> None:
        self.user_id, self.socket = user_id, socket
        self.jobs, self.nursery = jobs, nursery
        self.tokens, self.refilled_at = float(BURST), trio.current_time()
        self.outbox, self.to_write = trio.open_memory_channel[str](OUTBOX_FRAMES)
        self.push({"type": "connected", "user_id": user_id, "timestamp": timestamp()})

    def push(self, message: Json) -> None:
        """Queue a message. If the outbox is full, the client is cut."""
        try:
            self.outbox.send_nowait(encode(message).decode())
        except trio.WouldBlock:
            self.nursery.cancel_scope.cancel()
        except trio.ClosedResourceError:
            pass  # the connection is closing

    def reply(self, command: Command, outcome: Outcome) -> None:
        """Answer a command, with the names that it has."""
        answer = outcome.answer
        if isinstance(answer, Refusal):
            answer = {"type": "error", **answer.error}
        if answer:
            names = {"ref": command.ref, "client_id": command.client_id}
            self.push(answer | {name: text for name, text in names.items() if text})

    async def write(self) -> None:
        """Write each frame within WRITE_SECONDS, until the outbox is closed."""
        async for frame in self.to_write:
            with trio.fail_after(WRITE_SECONDS):
                await self.socket.send_message(frame)
        await self.socket.aclose(1012, "the server restarts")

    async def read(self) -> None:
        """Handle commands until the client closes, or is silent for IDLE_SECONDS."""
        while True:
            with trio.fail_after(IDLE_SECONDS):
                text = await self.socket.get_message()
            command = Command()
            try:
                self.check_rate()
                command = parse(text)
                if command.type == "ping":
                    self.push({"type": "pong", "timestamp": timestamp()})
                else:
                    done = partial(self.reply, command)
                    await self.jobs.send(Job(self.user_id, command, done))
            except Refusal as refusal:
                self.reply(command, Outcome(refusal))

    def check_rate(self) -> None:
        """Take a token from this session's bucket. Raises Refusal if it is empty."""
        now = trio.current_time()
        more = (now - self.refilled_at) * COMMANDS_PER_SECOND
        self.tokens, self.refilled_at = min(BURST, self.tokens + more), now
        if self.tokens < 1:
            raise Refusal(429, "rate_limited", "too many at once: slow down")
        self.tokens -= 1


# --- store: one task writes, in one worker thread -------------------------------------


class Job(NamedTuple):
    """A user's command for the store. At last the hub calls done(outcome)."""

    user_id: int
    command: Command
    done: Callable[[Outcome], None]


class Outcome(NamedTuple):
    """What a Job has done: the answer to its user, and an event for some users."""

    answer: Json | Refusal | None
    event: Json = {}  # noqa: RUF012
    to: Sequence[int] = ()


Jobs = trio.MemorySendChannel[Job]
Done = tuple[Job, Outcome]


class Store:
    """The database. A message is durable when its COMMIT has returned."""

    def __init__(self, path: str) -> None:
        self.db = sqlite3.connect(path, check_same_thread=False)
        self.db.row_factory = sqlite3.Row
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = FULL")  # COMMIT waits for fsync
        self.db.executescript(SCHEMA)
        self.jobs, self.inbox = trio.open_memory_channel[Job](JOBS)

    async def run(self, to_hub: trio.MemorySendChannel[Done]) -> None:
        """Run Jobs, one after another, until their channel is closed."""
        async with to_hub:
            async for job in self.inbox:
                outcome = await trio.to_thread.run_sync(self.transact, job)
                await to_hub.send((job, outcome))

    def transact(self, job: Job) -> Outcome:
        """Run one Job in a transaction of its own."""
        writes = {"typing": show_typing, "mark_read": mark_read}
        write = writes.get(job.command.type, send_message)
        try:
            with self.db:  # ends with COMMIT, or with ROLLBACK
                return write(self.db, job.user_id, job.command)
        except Refusal as refusal:
            return Outcome(refusal)


def members_of(db: sqlite3.Connection, chat_id: int, user_id: int) -> list[int]:
    """Return the members of a chat. Raises Refusal if the user is not one of them."""
    rows = db.execute("SELECT user_id FROM member WHERE chat_id = ?", (chat_id,))
    members = [member for (member,) in rows]
    if user_id not in members:
        raise Refusal(404, "not_found", "chat_id: there is no such chat for you")
    return members


def send_message(db: sqlite3.Connection, user_id: int, command: Command) -> Outcome:
    """Store a message. A repeat, by its client_id, is only acked."""
    if not command.content:
        raise Refusal(400, "bad_field", "content: it is empty")
    members = members_of(db, command.chat_id, user_id)
    find = "SELECT * FROM message WHERE sender_id = ? AND client_id = ?"
    insert = """INSERT INTO message (chat_id, sender_id, content, created_at, client_id)
                VALUES (?, ?, ?, ?, ?) RETURNING *"""
    values = (command.chat_id, user_id, command.content, timestamp(), command.client_id)
    old = db.execute(find, (user_id, command.client_id)).fetchone()
    message = dict(old or db.execute(insert, values).fetchone())
    del message["client_id"]  # the other members need not know it
    created_at = message["created_at"]
    ack = {"type": "ack", "message_id": message["id"], "created_at": created_at}
    event = {"type": "new_message", "chat_id": command.chat_id, "message": message}
    return Outcome(ack, event, () if old else members)


def mark_read(db: sqlite3.Connection, user_id: int, command: Command) -> Outcome:
    """Move the user's read mark up to a message, never down."""
    row = db.execute(
        "UPDATE member SET read_id = message.id FROM message WHERE message.id = ?"
        " AND member.chat_id = message.chat_id AND user_id = ? AND read_id < message.id"
        " RETURNING read_id AS message_id, member.chat_id, user_id AS read_by",
        (command.message_id, user_id),
    ).fetchone()
    if not row:
        return Outcome({"type": "ack"})
    members = members_of(db, row["chat_id"], user_id)
    return Outcome({"type": "ack"}, {"type": "message_read", **dict(row)}, members)


def show_typing(db: sqlite3.Connection, user_id: int, command: Command) -> Outcome:
    """Show the other members that a user types. It is not stored, and has no ack."""
    chat_id, is_typing = command.chat_id, command.is_typing
    others = [user for user in members_of(db, chat_id, user_id) if user != user_id]
    event = {"type": "typing", "chat_id": chat_id, "user_id": user_id}
    return Outcome(None, {**event, "is_typing": is_typing}, others)


# --- hub: the open sessions -----------------------------------------------------------


class Hub:
    """The open sessions of each user. Only plain functions read and change them."""

    def __init__(self) -> None:
        self.sessions: dict[int, set[Session]] = {}

    def enter(self, session: Session) -> None:
        """Publish to a session from now on."""
        self.sessions.setdefault(session.user_id, set()).add(session)

    def leave(self, session: Session) -> None:
        """Forget a session."""
        self.sessions[session.user_id].remove(session)

    def close(self) -> None:
        """Close every outbox. What is in it is still written."""
        for sessions in self.sessions.values():
            for session in sessions:
                session.outbox.close()

    async def run(self, from_store: trio.MemoryReceiveChannel[Done]) -> None:
        """Publish in the order of the commits, until the store ends."""
        async for job, outcome in from_store:
            self.publish(outcome)
            job.done(outcome)

    def publish(self, outcome: Outcome) -> None:
        """Queue an event for each session of the users whom it is for."""
        for user_id in outcome.to:
            for session in self.sessions.get(user_id, ()):
                session.push(outcome.event)


# --- protocol, HTTP and tokens --------------------------------------------------------

Id = Annotated[int, msgspec.Meta(ge=1, le=2**53 - 1)]
Name = Annotated[str, msgspec.Meta(max_length=64)]
encode = msgspec.json.encode


class Command(msgspec.Struct):
    """What a client sends. Each type has some of these fields."""

    type: Literal["ping", "typing", "mark_read", "send_message"] = "send_message"
    chat_id: Id = 0
    message_id: Id = 0
    is_typing: bool = False
    content: Annotated[str, msgspec.Meta(max_length=4000)] = ""
    client_id: Name | None = None  # tells a repeat from a second message
    ref: Name | None = None  # its answer repeats it


class Refusal(Exception):
    """A refused command or request: the answer to whoever sent it."""

    def __init__(self, status: int, code: str, sentence: str) -> None:
        self.status, self.error = status, {"code": code, "message": sentence}


def parse(text: str | bytes) -> Command:
    """Decode a command. Raises a Refusal that names the field that is wrong."""
    try:
        return msgspec.json.decode(text, type=Command)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Refusal(400, "bad_field", str(error)) from None


def timestamp() -> str:
    """The time in UTC, as SPEC.md writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Request(NamedTuple):
    """An HTTP request. received is all that the client has sent so far."""

    method: str
    path: str
    token: str
    body: bytes
    received: bytes


async def read_request(stream: trio.SocketStream) -> Request:
    """Read a whole request. Raises Refusal, or BrokenResourceError at the end."""
    parser, received, body = h11.Connection(h11.SERVER), b"", b""
    try:
        while not isinstance(event := parser.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                data = await stream.receive_some(4096)
                parser.receive_data(data)
                received += data
                if len(received) > MAX_BYTES:
                    raise Refusal(413, "too_large", f"more than {MAX_BYTES} bytes")
            elif isinstance(event, h11.Request):
                head, url = event, urlsplit(event.target.decode())
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                raise trio.BrokenResourceError  # the client has closed the connection
    except (h11.RemoteProtocolError, ValueError) as error:
        raise Refusal(400, "bad_field", f"not HTTP: {error}") from None
    bearer = dict(head.headers).get(b"authorization", b"").decode("latin-1")
    token = parse_qs(url.query).get("token", [bearer.removeprefix("Bearer ")])
    return Request(head.method.decode(), url.path, token[0], body, received)


class Replay(trio.abc.ReceiveStream):
    """A stream from its beginning: trio-websocket reads the handshake itself."""

    def __init__(self, received: bytes, stream: trio.SocketStream) -> None:
        self.received, self.stream = received, stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what had come before, then what comes."""
        received, self.received = self.received, b""
        return received or await self.stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """Close the stream."""
        await self.stream.aclose()


def http_answer(status: int, body: Any, kind: str = "application/json") -> bytes:
    """Write an HTTP answer that ends its connection."""
    content = body if isinstance(body, bytes) else encode(body)
    head = f"HTTP/1.1 {status} \r\nConnection: close\r\n"
    head += f"Content-Type: {kind}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def authenticate(request: Request) -> int:
    """Return the user of a request's token. Raises Refusal."""
    try:
        claims = jwt.decode(request.token, SECRET, ["HS256"])
        return msgspec.convert(claims.get("user_id"), Id)
    except (jwt.PyJWTError, msgspec.ValidationError):
        raise Refusal(401, "token_invalid", "this token is not valid") from None


if __name__ == "__main__":
    trio.run(partial(main, *sys.argv[1:]))
