"""Make the database of chatd 1.0.0 that tests/test_upgrade.py upgrades.

Run it once, with a checkout of 1.0.0 and the Python of this one:

    git worktree add ../chatd-1.0.0 fa57db8
    .venv/bin/python tests/data/make_1_0.py ../chatd-1.0.0

It lets 1.0.0 itself write a small database with every kind of event, answers a fixed
list of questions, and kills it before its WAL is folded in. It leaves three files here:

    v1.sqlite, v1.sqlite-wal    the database, as the killed process left it
    v1.json                     what 1.0.0 answered, after it was started again

The test asks a newer chatd the same questions, by the same function `answers`.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jwt
from websockets.sync.client import ClientConnection, connect

HERE = Path(__file__).resolve().parent
SECRET = b"only for tests: 0123456789abcdef"
FLAGS = ("--sends=0", "--commands=0", "--handshakes=0", "--requests=0")

ANN, BOB, CEM, DAN, EVE, FAY = range(1, 7)
CROWD = range(101, 158)  # with the first three they are more than a large chat has
USERS = (ANN, BOB, CEM, DAN, EVE, FAY, CROWD[0])
ALL, TEAM, PAIR = 1, 2, 3  # the chats, in the order in which they are made
SENT = {  # under a client_id: who, where, what
    "folded-1": (ANN, TEAM, "Привет!"),
    "wal-1": (ANN, TEAM, "in the WAL"),
    "wal-2": (ANN, PAIR, "nobody else is here"),
}
CHANGING = {"timestamp", "expires_in", "message"}  # by the clock; an error's sentence


class Server(NamedTuple):
    """A chatd that runs, and how to ask it."""

    port: int

    def token(self, user: int, **claims: object) -> str:
        """Sign a token for an hour."""
        now = int(time.time())
        plain = {"sub": str(user), "iat": now, "exp": now + 3600}
        return jwt.encode({**plain, **claims}, SECRET, algorithm="HS256")

    @property
    def service(self) -> str:
        """A token of the site's backend."""
        return self.token(99, scope="service")

    def ask(self, request: str, token: str, body: object = None) -> Any:
        """Send a request; return the status and the JSON of its answer."""
        method, path = request.split(" ")
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token}"},
        )
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                text = answer.read()
                return [answer.status, json.loads(text) if text else None]
        except urllib.error.HTTPError as error:
            with error:
                return [error.code, json.loads(error.read())["error"]["code"]]

    def socket(self, user: int, cursor: str | None = None) -> ClientConnection:
        """Open a user's socket."""
        query = f"token={self.token(user)}" + (f"&cursor={cursor}" if cursor else "")
        return connect(f"ws://127.0.0.1:{self.port}/ws/chat?{query}", proxy=None)


def receive(socket: ClientConnection) -> Any:
    """Read the next message of a socket."""
    return json.loads(socket.recv(timeout=30))


# --- the questions -------------------------------------------------------------------


def answers(server: Server) -> dict[str, Any]:
    """Ask everything that an upgrade must not change. Nothing is written by it."""
    found: dict[str, Any] = {}
    with server.socket(ANN) as socket:
        epoch, _, head = receive(socket)["cursor"].partition(".")
    for user in USERS:
        token = server.token(user)
        told = replayed(server, user, f"{epoch}.0")
        found[f"user {user}: socket from 0"] = told
        events = {event["seq"]: event for event in told[1:]}
        for seq in (*range(1, int(head), 6), int(head)):
            connected, *later = replayed(server, user, f"{epoch}.{seq}")
            # An event is the same, from whatever cursor it is told.
            assert later == [events[at] for at in events if at > seq]
            seqs = [event["seq"] for event in later]
            found[f"user {user}: socket from {seq}"] = [connected, seqs]
        for cursor in ("", f"{epoch}.999999", "other.1"):
            found[f"user {user}: socket, cursor {cursor!r}"] = replayed(
                server, user, cursor
            )
        for limit in (500, 3):
            polled, cursor, more = [], f"{epoch}.0", True
            while more:
                path = f"/api/v1/events?limit={limit}&cursor={cursor}"
                status, page = server.ask(f"GET {path}", token)
                assert (status, page["resync"]) == (200, False)
                polled += page["events"]
                cursor, more = page["cursor"], page["more"]
            assert polled == list(events.values())
            found[f"user {user}: poll by {limit}"] = [cursor, [*events]]
        for path in ("/api/v1/me", "/api/v1/chats", "/api/v1/users"):
            found[f"user {user}: {path}"] = server.ask(f"GET {path}", token)
        for chat in (ALL, TEAM, PAIR):
            path = f"/api/v1/chats/{chat}/messages?limit=3"
            while path:
                page = server.ask(f"GET {path}", token)
                found[f"user {user}: {path}"] = page
                older = page[0] == 200 and page[1]["more"]
                before = page[1]["messages"][0]["id"] if older else 0
                path = f"{path.partition('&')[0]}&before={before}" if older else ""
        issued = server.token(user, iat=1)  # before every revocation
        found[f"user {user}: an old token"] = server.ask("GET /api/v1/chats", issued)[0]
    for key, (user, chat, content) in SENT.items():
        path, token = f"POST /api/v1/chats/{chat}/messages", server.token(user)
        again = {"content": content, "client_id": key}
        found[f"repeat {key}"] = server.ask(path, token, again)
        other = {"content": "another text", "client_id": key}
        found[f"reuse {key}"] = server.ask(path, token, other)
        with server.socket(user) as socket:
            receive(socket)
            command = {"type": "send_message", "chat_id": chat, **again}
            socket.send(json.dumps(command))
            found[f"repeat {key} on a socket"] = receive(socket)
    return {question: lasting(answer) for question, answer in found.items()}


def replayed(server: Server, user: int, cursor: str) -> list[Any]:
    """Read `connected`, and the events that a socket gets from there to the head."""
    polled, more, at = 0, bool(cursor), cursor
    while more:
        path = f"/api/v1/events?limit=500&cursor={at}"
        page = server.ask(f"GET {path}", server.token(user))[1]
        polled += len(page["events"])
        at, more = page["cursor"], page["more"]
    with server.socket(user, cursor) as socket:
        told = [receive(socket) for _ in range(1 + polled)]
        socket.send('{"type":"ping"}')
        assert receive(socket)["type"] == "pong"  # and there is nothing more
    return told


def lasting(answer: Any) -> Any:
    """Leave out what changes with the clock."""
    if isinstance(answer, list):
        return [lasting(part) for part in answer]
    if isinstance(answer, dict):
        return {
            name: lasting(part)
            for name, part in answer.items()
            if not (name in CHANGING and isinstance(part, str | int))
        }
    return answer


# --- the database --------------------------------------------------------------------


@contextlib.contextmanager
def running(chatd: Path, db: Path, end: signal.Signals) -> Iterator[Server]:
    """Run a chatd on this database, and end it with this signal."""
    secret = db.with_name("chatd.secret")
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    command = [sys.executable, str(chatd), "serve", "--listen=127.0.0.1:0", *FLAGS]
    with subprocess.Popen(
        [*command, f"--db={db}", f"--secret-file={secret}"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
            assert found, "it did not start"
            yield Server(int(found[1]))
        finally:
            process.send_signal(end)


def write_folded(server: Server) -> None:
    """Write what a stop will fold into the database file."""

    def done(request: str, body: object = None, token: str = server.service) -> Any:
        status, answer = server.ask(request, token, body)
        assert status < 300, (request, answer)
        return answer

    for user, name in ((ANN, "Ann"), (BOB, "Bob"), (CEM, "Cem Ünal ☃")):
        done("GET /api/v1/me", token=server.token(user, name=name))
    for title, members in (
        ("Everybody", [ANN, BOB, CEM, *CROWD]),
        ("Команда", [ANN, BOB, CEM, FAY]),
        (None, [ANN, DAN]),
    ):
        done("POST /api/v1/chats", {"title": title, "member_ids": members})
    ids = []
    for user, chat, content in (
        (BOB, ALL, "hello, everybody"), (CROWD[0], ALL, "two\nlines\tand a tab"),
        (BOB, TEAM, "first"), (CEM, TEAM, "🎉" * 40), (DAN, PAIR, "just you and me"),
    ):  # fmt: skip
        path = f"POST /api/v1/chats/{chat}/messages"
        sent = done(path, {"content": content, "sender_id": user})
        ids.append(sent["message"]["id"])
    user, chat, content = SENT["folded-1"]
    body = {"content": content, "client_id": "folded-1"}
    done(f"POST /api/v1/chats/{chat}/messages", body, server.token(user))
    for user, message in ((CEM, ids[0]), (BOB, ids[3]), (FAY, ids[2])):
        done(f"POST /api/v1/messages/{message}/read", token=server.token(user))
    # A member that leaves, one that is removed, and one that comes back.
    done(f"DELETE /api/v1/chats/{PAIR}/members/{DAN}", token=server.token(DAN))
    done(f"DELETE /api/v1/chats/{TEAM}/members/{FAY}")
    done(f"POST /api/v1/chats/{TEAM}/messages", {"content": "gone?", "sender_id": BOB})
    done(f"POST /api/v1/chats/{TEAM}/members", {"user_id": FAY})
    # A sender that is no member.
    done(f"POST /api/v1/chats/{TEAM}/messages", {"content": "news", "sender_id": EVE})


def write_wal(server: Server) -> None:
    """Write what is in the WAL only when the process is killed: in few commits."""
    with server.socket(ANN) as socket:
        receive(socket)
        for key in ("wal-1", "wal-2"):
            _, chat, content = SENT[key]
            command = {"chat_id": chat, "content": content, "client_id": key}
            socket.send(json.dumps({"type": "send_message", **command}))
        acks: list[Any] = []
        while len(acks) < 2:
            acks += [m for m in [receive(socket)] if m["type"] == "ack"]
    for request, body in (
        (f"DELETE /api/v1/chats/{TEAM}/members/{CEM}", None),
        ("POST /api/v1/internal/chat/revoke", {"user_id": EVE}),
    ):
        assert server.ask(request, server.service, body)[0] < 300
    path = f"POST /api/v1/messages/{acks[0]['message_id']}/read"
    assert server.ask(path, server.token(FAY, name="Fay"))[0] == 200


def main(checkout: Path) -> None:
    """Write the three files."""
    chatd = checkout / "chatd.py"
    assert '\n__version__ = "1.0.0"\n' in chatd.read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        db, copy = Path(folder) / "chatd.db", Path(folder) / "copy.db"
        with running(chatd, db, signal.SIGTERM) as server:
            write_folded(server)
        with running(chatd, db, signal.SIGKILL) as server:
            write_wal(server)
        for suffix in ("", "-wal"):
            shutil.copy(f"{db}{suffix}", HERE / f"v1.sqlite{suffix}")
            shutil.copy(f"{db}{suffix}", f"{copy}{suffix}")
        time.sleep(7)  # a token that is as old as the revocation of EVE is refused
        with running(chatd, copy, signal.SIGTERM) as server:
            found = answers(server)
    lines = [f"{json.dumps(q)}: {json.dumps(found[q])}" for q in found]
    (HERE / "v1.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
