#!/usr/bin/env python3
"""smallchatd: the whole idea of chatd in one short program.

    python tour/smallchatd.py [PORT [DB]]       prints two links: open both

An ack, the answer to a command, means that the message is on disk. Every connected
member of its chat gets the message, in the order of the commits. A client that does not
read delays nobody. No error that a client causes ends another connection.

ONE MESSAGE, STEP BY STEP

    Session.read      has received a command: JSON, then a Job for the store
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
       |  `- trio.serve_listeners starts a task for each TCP connection:
       `- Server.connection       the bulkhead: an error below it ends only this one.
          |                       For a WebSocket, Session.write runs in this task; and
          |                       beside it, in the nursery of Server.serve_socket:
          |- Session.read
          |- Session.ping         ends the session if the client does not answer
          `- trio-websocket's own task, which takes frames from the network

If the store or the hub fails (the disk is full, or somebody locks the database for a
minute), the server ends: without them nothing can be acked.

WHAT IT LEAVES OUT, AND chatd HAS

A cursor: a client that was away does not get what it missed. Catching up: a client that
is too slow is cut. Group commit, one frame for all, and an index from a chat to its
sessions. History, unread counts, search, editing; chats and their members are rows that
you insert. A limit on connections, on posts, on the control frames and the fragments of
a WebSocket; the end of a session when its token ends; a ticket, so that no lasting
token stands in a URL, where proxies log it.
"""

from __future__ import annotations

import os
import re
import secrets
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from signal import SIGINT, SIGTERM
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import parse_qs, urlsplit

import h11
import jwt
import msgspec
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream
from wsproto.utilities import LocalProtocolError

JOBS = 100  # may wait for the store; then sessions wait, and read nothing more
OUTBOX_FRAMES = 100  # may wait for a client; then it is cut
MAX_BYTES = 65_536  # of a request; of a command, as many characters
MAX_CHARACTERS = 4000  # of a message
COMMANDS_PER_SECOND = 20  # of a session: it waits after each one
REQUEST_SECONDS = 10  # for a client to send a request, or to take an answer
PING_SECONDS = 30  # between two pings, which every browser answers by itself
PONG_SECONDS = 20  # for the answer, which may stand behind 20 s of commands
WRITE_SECONDS = 10  # for a client to take a frame
DRAIN_SECONDS = 5  # at a stop, for the clients to take what is left, and to go

# Without the variable, the links are new at each start.
SECRET = os.environ.get("SMALLCHATD_SECRET") or secrets.token_hex(32)
ROOT = trio.Path(__file__).parent.parent
PAGES = {
    "/": (ROOT / "tour/try.html", "text/html"),
    "/web/chat-websocket.js": (ROOT / "web/chat-websocket.js", "text/javascript"),
}
SCHEMA = """
CREATE TABLE IF NOT EXISTS member (
    chat_id INTEGER CHECK (chat_id > 0), user_id INTEGER,
    read_id INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (chat_id, user_id));
CREATE TABLE IF NOT EXISTS message (
    id INTEGER PRIMARY KEY, chat_id INTEGER, sender_id INTEGER, content TEXT,
    created_at TEXT, client_id TEXT, UNIQUE (sender_id, client_id));
INSERT OR IGNORE INTO member (chat_id, user_id) VALUES (1, 1), (1, 2);
"""
JsonObject = dict[str, Any]

# --- server: the task tree, from the root down ----------------------------------------


async def main(port: str = "8087", db: str = "smallchatd.db") -> None:
    """Serve on this machine, and print a link for each of two users."""
    server = Server(Store(db))
    listeners = await trio.open_tcp_listeners(int(port), host="127.0.0.1")
    host, bound_port = listeners[0].socket.getsockname()
    links = ""
    for user_id in 1, 2:
        token = jwt.encode({"user_id": user_id}, SECRET, "HS256")
        links += f"user {user_id}: http://{host}:{bound_port}/#{token}\n"
    await server.run(listeners, links)


class Server:
    """What all connections share, and the tasks that outlive them."""

    def __init__(self, store: Store) -> None:
        self.store, self.hub = store, Hub()

    async def run(self, listeners: list[trio.SocketListener], links: str) -> None:
        """Print the links, and serve until a signal comes."""
        to_hub, from_store = trio.open_memory_channel[Batch](1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.store.run, to_hub)
            nursery.start_soon(self.hub.run, from_store)
            async with trio.open_nursery() as connections:
                # The handlers outlive `accepting`.
                accept = partial(trio.serve_listeners, handler_nursery=connections)
                async with trio.open_nursery() as accepting:
                    accepting.start_soon(accept, self.connection, listeners)
                    with trio.open_signal_receiver(SIGINT, SIGTERM) as signals:
                        print(links, end="", flush=True)
                        await anext(signals)
                    # The usual handlers are back: a second SIGTERM ends the process.
                    accepting.cancel_scope.cancel()
                self.hub.close()
                connections.cancel_scope.deadline = trio.current_time() + DRAIN_SECONDS
            self.store.jobs.close()  # ends the store, which ends the hub

    async def connection(self, stream: trio.SocketStream) -> None:
        """Serve a connection, which trio.serve_listeners then closes. The bulkhead."""
        try:
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
        except* (trio.BrokenResourceError, ConnectionClosed, LocalProtocolError):
            pass  # the client is gone; trio-websocket may send it a pong all the same
        except* trio.TooSlowError:
            pass
        except* Exception:
            traceback.print_exc()

    async def serve_socket(self, stream: trio.SocketStream, request: Request) -> None:
        """Serve a WebSocket from its handshake to its end. Raises Refusal."""
        user_id = authenticate(request)  # in a nursery, its Refusal would be in a group
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
                nursery.start_soon(session.read)
                nursery.start_soon(session.ping)
                await session.write()
            finally:
                self.hub.leave(session)
                nursery.cancel_scope.cancel()

    async def answer(self, request: Request) -> bytes:
        """Answer a request over HTTP. Raises Refusal."""
        if request.method == "GET" and request.path in PAGES:
            path, kind = PAGES[request.path]
            return http_answer(200, await path.read_bytes(), kind)
        chat = re.fullmatch(r"/api/v1/chats/(\d{1,15})/messages", request.path)
        if not chat or request.method != "POST":
            raise Refusal("not_found", "there is nothing here", 404)
        user_id, command = authenticate(request), parse(request.body)
        command.type, command.chat_id = "send_message", int(chat[1])
        done, outcomes = trio.open_memory_channel[Outcome](1)
        await self.store.jobs.send(Job(user_id, command, done.send_nowait))
        outcome = await outcomes.receive()
        if isinstance(outcome.answer, Refusal):
            raise outcome.answer
        return http_answer(201, {"message": outcome.event["message"]})


# --- connection: a session reads commands, and writes what is in its outbox -----------


@dataclass(eq=False)
class Session:
    """One WebSocket: a task that reads from it, one that writes, and one that pings."""

    user_id: int
    socket: WebSocketConnection
    jobs: trio.MemorySendChannel[Job]
    nursery: trio.Nursery

    def __post_init__(self) -> None:
        """Make the outbox, with the first frame in it."""
        self.outbox, self.to_write = trio.open_memory_channel[str](OUTBOX_FRAMES)
        now = timestamp()
        self.push({"type": "connected", "user_id": self.user_id, "timestamp": now})

    async def read(self) -> None:
        """Handle commands until the client closes."""
        with self.outbox, suppress(ConnectionClosed):  # closes it, which ends write()
            while True:
                text = await self.socket.get_message()  # ping() is its deadline
                try:
                    command = parse(text)
                    if command.type == "ping":
                        self.push({"type": "pong", "timestamp": timestamp()})
                    else:
                        done = partial(self.reply, command)
                        await self.jobs.send(Job(self.user_id, command, done))
                except Refusal as refusal:
                    self.push({"type": "error", **refusal.error})
                await trio.sleep(1 / COMMANDS_PER_SECOND)

    async def ping(self) -> None:
        """Ping the client for ever. Raises TooSlowError if it does not answer."""
        with suppress(ConnectionClosed, LocalProtocolError):  # it is closing
            while True:
                await trio.sleep(PING_SECONDS)
                with trio.fail_after(PONG_SECONDS):
                    await self.socket.ping()

    def reply(self, command: Command, outcome: Outcome) -> None:
        """Answer a command. The answer repeats the command's ref and client_id."""
        answer = outcome.answer
        if isinstance(answer, Refusal):
            answer = {"type": "error", **answer.error}
        if answer:
            names = {"ref": command.ref, "client_id": command.client_id}
            self.push(answer | {name: text for name, text in names.items() if text})

    def push(self, message: JsonObject) -> None:
        """Put a message into the outbox, as a frame. If it is full, cut the client."""
        try:
            self.outbox.send_nowait(encode(message).decode())
        except trio.WouldBlock:
            self.nursery.cancel_scope.cancel()
        except trio.ClosedResourceError:
            pass  # the connection is closing

    async def write(self) -> None:
        """Write the outbox, each frame within WRITE_SECONDS. When it ends, close."""
        async for frame in self.to_write:
            with trio.fail_after(WRITE_SECONDS):
                await self.socket.send_message(frame)
        await self.socket.aclose(1012, "the server restarts")


# --- store: one task writes, in a worker thread ---------------------------------------


class Job(NamedTuple):
    """A user's command for the store. The hub calls done(outcome): it must not fail."""

    user_id: int
    command: Command
    done: Callable[[Outcome], None]


class Outcome(NamedTuple):
    """What a Job has done: the answer to its user, and an event for some users."""

    answer: JsonObject | Refusal | None
    event: JsonObject
    to: Collection[int] = ()


Batch = tuple[Job, Outcome]  # one transaction; chatd's Batch has many Jobs


class Store:
    """The database. A message is durable when its COMMIT has returned."""

    def __init__(self, path: str) -> None:
        # timeout: if you insert rows by hand, the store waits for your COMMIT.
        self.db = sqlite3.connect(
            path, timeout=60, isolation_level=None, check_same_thread=False
        )
        self.db.row_factory = sqlite3.Row
        self.db.execute("PRAGMA journal_mode = WAL")  # COMMIT appends to a log, DB-wal
        self.db.execute("PRAGMA synchronous = FULL")  # COMMIT waits for fsync
        self.db.executescript(SCHEMA)
        self.jobs, self.inbox = trio.open_memory_channel[Job](JOBS)

    async def run(self, to_hub: trio.MemorySendChannel[Batch]) -> None:
        """Run Jobs, one after another, until their channel is closed."""
        async with to_hub:
            async for job in self.inbox:
                outcome = await trio.to_thread.run_sync(self.transact, job)
                await to_hub.send((job, outcome))

    def transact(self, job: Job) -> Outcome:
        """Run one Job in a transaction of its own."""
        write = WRITES[job.command.type]
        try:
            with self.db:  # ends with COMMIT, or with ROLLBACK
                self.db.execute("BEGIN IMMEDIATE")
                return write(self.db, job.user_id, job.command)
        except Refusal as refusal:
            return Outcome(refusal, {})


def members_of(db: sqlite3.Connection, chat_id: int, user_id: int) -> set[int]:
    """Return the members of a chat. Raises Refusal if the user is not one of them."""
    rows = db.execute("SELECT user_id FROM member WHERE chat_id = ?", (chat_id,))
    members = {member for (member,) in rows}
    if user_id not in members:
        raise Refusal("not_found", "there is no such chat or message for you", 404)
    return members


def send_message(db: sqlite3.Connection, user_id: int, command: Command) -> Outcome:
    """Store a message. A repeat, by its client_id, is only acked."""
    chat_id, content, client_id = command.chat_id, command.content, command.client_id
    if not content.strip() or len(content) > MAX_CHARACTERS:
        raise Refusal("bad_field", f"content: 1 to {MAX_CHARACTERS} characters, please")
    members = members_of(db, chat_id, user_id)
    find = "SELECT * FROM message WHERE sender_id = ? AND client_id = ?"
    insert = """INSERT INTO message (chat_id, sender_id, content, created_at, client_id)
                VALUES (?, ?, ?, ?, ?) RETURNING *"""
    old = db.execute(find, (user_id, client_id)).fetchone()
    if old and (old["chat_id"], old["content"]) != (chat_id, content):
        raise Refusal("idempotency_mismatch", "client_id: it has another message", 409)
    values = (chat_id, user_id, content, timestamp(), client_id)
    message = dict(old or db.execute(insert, values).fetchone())
    del message["client_id"]  # the other members need not know it
    created_at = message["created_at"]
    ack = {"type": "ack", "message_id": message["id"], "created_at": created_at}
    event = {"type": "new_message", "chat_id": chat_id, "message": message}
    return Outcome(ack, event, () if old else members)


def mark_read(db: sqlite3.Connection, user_id: int, command: Command) -> Outcome:
    """Move the user's read mark up to a message, never down."""
    find = "SELECT id AS message_id, chat_id FROM message WHERE id = ?"
    row = db.execute(find, (command.message_id,)).fetchone()
    members = members_of(db, row["chat_id"] if row else 0, user_id)  # 0: nobody
    event = {"type": "message_read", **dict(row), "read_by": user_id}
    move = """UPDATE member SET read_id = :message_id WHERE chat_id = :chat_id
              AND user_id = :read_by AND read_id < :message_id"""
    moved = db.execute(move, event).rowcount
    return Outcome({"type": "ack"}, event, members if moved else ())


def show_typing(db: sqlite3.Connection, user_id: int, command: Command) -> Outcome:
    """Show the other members that a user types. It is not stored, and has no ack."""
    others = members_of(db, command.chat_id, user_id) - {user_id}
    event = {"type": "typing", "chat_id": command.chat_id, "user_id": user_id}
    return Outcome(None, {**event, "is_typing": command.is_typing}, others)


WRITES = {"send_message": send_message, "mark_read": mark_read, "typing": show_typing}


# --- hub: the open sessions -----------------------------------------------------------


class Hub:
    """The open sessions. Only plain functions read and change them."""

    def __init__(self) -> None:
        self.sessions: set[Session] = set()
        self.closed = False

    def enter(self, session: Session) -> None:
        """Publish to a session from now on."""
        self.sessions.add(session)
        if self.closed:  # the signal came during its handshake
            session.outbox.close()

    def leave(self, session: Session) -> None:
        self.sessions.remove(session)

    def close(self) -> None:
        """Close every outbox. What is in it is still written."""
        self.closed = True
        for session in self.sessions:
            session.outbox.close()

    async def run(self, from_store: trio.MemoryReceiveChannel[Batch]) -> None:
        """Publish in the order of the commits, until the store ends."""
        async for job, outcome in from_store:
            self.publish(outcome)
            job.done(outcome)

    def publish(self, outcome: Outcome) -> None:
        """Queue an event for each session of the users whom it is for."""
        for session in self.sessions:
            if session.user_id in outcome.to:
                session.push(outcome.event)


# --- protocol, HTTP and tokens --------------------------------------------------------

Id = Annotated[int, msgspec.Meta(ge=1, le=2**53 - 1)]
Ref = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
encode = msgspec.json.encode


class Command(msgspec.Struct):
    """What a client sends. Each type needs some of these fields; 0 is no id."""

    type: Literal["ping", "typing", "mark_read", "send_message"] = "send_message"
    chat_id: Id = 0
    message_id: Id = 0
    is_typing: bool = False
    content: str = ""
    client_id: Ref | None = None  # tells a repeat from a second message
    ref: Ref | None = None  # its ack repeats it


class Refusal(Exception):
    """A refused command or request: the answer to whoever sent it."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        self.status, self.error = status, {"code": code, "message": message}


def parse(text: str | bytes) -> Command:
    """Decode a command. Raises Refusal."""
    try:
        return msgspec.json.decode(text, type=Command)
    except msgspec.ValidationError as error:
        raise Refusal("bad_field", str(error)) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:  # [[[[[[...
        raise Refusal("bad_json", str(error)) from None


def timestamp() -> str:
    """The time in UTC (RFC 3339)."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Request(NamedTuple):
    """An HTTP request. received is all that was read of it."""

    method: str
    path: str
    token: str
    body: bytes
    received: bytes


async def read_request(stream: trio.SocketStream) -> Request:
    """Read a whole request. Raises Refusal; BrokenResourceError if the client goes."""
    parser, received, body = h11.Connection(h11.SERVER), b"", b""
    try:
        while not isinstance(event := parser.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                data = await stream.receive_some(4096)
                parser.receive_data(data)
                received += data
                if len(received) > MAX_BYTES:
                    raise Refusal("too_large", f"more than {MAX_BYTES} bytes", 413)
            elif isinstance(event, h11.Request):
                head, url = event, urlsplit(event.target.decode())
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                raise trio.BrokenResourceError  # the client has closed the connection
    except (h11.RemoteProtocolError, ValueError) as error:
        raise Refusal("bad_field", f"not HTTP: {error}") from None
    bearer = dict(head.headers).get(b"authorization", b"").decode("latin-1")
    token = parse_qs(url.query).get("token", [bearer.removeprefix("Bearer ")])
    return Request(head.method.decode(), url.path, token[0], body, received)


class Replay(trio.abc.ReceiveStream):
    """A stream from its first byte again: trio-websocket reads the request itself."""

    def __init__(self, received: bytes, stream: trio.SocketStream) -> None:
        self.received, self.stream = received, stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what had come before, then what comes."""
        if not self.received:
            return await self.stream.receive_some(max_bytes)
        end = max_bytes or len(self.received)
        part, self.received = self.received[:end], self.received[end:]
        return part

    async def aclose(self) -> None:
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
        raise Refusal("token_invalid", "this token is not valid", 401) from None


if __name__ == "__main__":
    trio.run(partial(main, *sys.argv[1:]))
