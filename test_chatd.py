"""The promises of README.md, in its order, kept by a real `chatd serve`.

Nothing here looks inside. Each test starts the program as an operator does, on a free
port and with an empty database, and talks to it as a client does: a `ServerProcess` of
tests/client.py is the process, and its `peer` is one open socket, which can
`send_command`, `receive`, `receives_nothing` and `leave`. `tests/` has the exhaustive
tests, section by section.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import random
import re
import resource
import signal
import sqlite3
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import jwt
import pytest
import trio
import trio_websocket
from prometheus_client.parser import text_string_to_metric_families
from websockets.sync.client import connect as websockets_connect

from tests.client import (
    BULK,
    CHECKOUT,
    LOST,
    MISTAKE,
    WAIT_SECONDS,
    Disconnected,
    Frame,
    Progress,
    ProxyProcess,
    Sender,
    ServerProcess,
    SocketClient,
    run_chatd,
    send_bulk,
    wait_until,
)

ANNA, BEN, CLARA, DORA, EVE = 5, 6, 7, 8, 9
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ServerProcess]:
    async with ServerProcess(tmp_path / "server").serving() as server:
        yield server


def proxy_of(server: ServerProcess) -> ProxyProcess:
    """A `chatd proxy` before a server."""
    return ProxyProcess(server.home.with_name("proxy"), server.port, server.db)


@pytest.fixture(params=["directly", "through chatd proxy"])
async def host(
    request: pytest.FixtureRequest, server: ServerProcess
) -> AsyncIterator[ServerProcess]:
    """The server, or the proxy before it: a client cannot tell which."""
    if request.param == "directly":
        yield server
    else:
        async with proxy_of(server).serving() as proxy:
            yield proxy


async def refuses(server: ServerProcess, token: str, **headers: str) -> tuple[int, str]:
    """Open a socket that must be refused; return the status and the code."""
    answer = await server.refusal(token, **headers)
    return answer.status, answer.code


def without_chats(events: list[Frame]) -> list[Frame]:
    """Events as they were. (`chat` of chat_added shows a chat as it is now.)"""
    return [{k: v for k, v in event.items() if k != "chat"} for event in events]


# --- the promise: an ack means the message is on disk --------------------------------


async def test_a_message_with_an_ack_survives_kill_9_and_none_is_stored_twice(
    server: ServerProcess,
) -> None:
    users, kills, each, acked = [ANNA, BEN, CLARA, DORA], 5, 200, Progress()
    chats = [await server.chat(*users) for _ in range(2)]
    texts = [(chats[number % 2], str(number)) for number in range(each)]
    senders = [Sender(server, user, texts) for user in users]
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for sender in senders:
                nursery.start_soon(sender.send, acked)
            for number in range(1, kills + 1):
                await acked.reaches(number * each * len(users) // (kills + 1))
                await server.kill()
                await server.begin()

    stored = [m for chat in chats for m in await server.history(chat, ANNA)]
    by_client_id = {message["client_id"]: message for message in stored}
    assert len(by_client_id) == len(stored) == each * len(users)
    for sender in senders:
        assert len(sender.acks) == each
        for client_id, ack in sender.acks.items():
            message = by_client_id[client_id]
            assert ack["message_id"] == message["id"], (ack, message)
            assert ack["n"] == message["n"], (ack, message)
            assert ack["created_at"] == message["created_at"], (ack, message)
        of = [m for m in stored if m["sender_id"] == sender.user]
        for chat in chats:  # in the order sent
            sent = [int(m["content"]) for m in of if m["chat_id"] == chat]
            assert sent == sorted(sent)

    last = {key: stored[-1][key] for key in ("chat_id", "content", "client_id")}
    client = await server.peer(stored[-1]["sender_id"])
    assert (await client.ask("send_message", **last))["duplicate"] is True
    await client.receives_nothing()
    await server.stop()
    assert (await run_chatd("check", "--db", server.db)).status == 0


# --- the promise: every event exactly once and in order, or `resync` -----------------


class Reader:
    """A client that keeps its cursor and mixes socket and poll at random."""

    def __init__(
        self, server: ServerProcess, user: int, cursor: str, seed: int
    ) -> None:
        self.server, self.user, self.cursor = server, user, cursor
        self.epoch = cursor.partition(".")[0]
        self.dice = random.Random(seed)
        self.events: list[Frame] = []
        self.ways = collections.Counter[str]()

    async def read(self, finished: trio.Event) -> None:
        """Read until a poll after the finish finds nothing more."""
        while True:
            last, before = finished.is_set(), len(self.events)
            try:
                if last or self.dice.random() < 0.4:
                    await self.poll()
                else:
                    await self.listen()
            except LOST:
                await self.server.up.wait()
                continue
            if last and len(self.events) == before:
                return

    async def poll(self) -> None:
        got = await self.server.poll(self.user, self.cursor, self.dice.randint(1, 80))
        assert got["resync"] is False, got
        self.events += got["events"]
        self.cursor = got["cursor"]
        self.ways["poll"] += 1

    async def listen(self) -> None:
        client = await self.server.peer(self.user, self.cursor)
        assert client.hello["cursor"] == self.cursor
        assert client.hello["resume"] in {"live", "replay"}
        self.ways[client.hello["resume"]] += 1
        with trio.move_on_after(self.dice.random() / 2):
            for _ in range(self.dice.randint(1, 60)):
                frame = await client.receive()
                if "seq" in frame:  # only events move a cursor
                    self.events.append(frame)
                    self.cursor = f"{self.epoch}.{frame['seq']}"
        client.drop()


@pytest.mark.parametrize("seed", [20251121, 6])
async def test_a_client_that_mixes_socket_and_poll_gets_every_event_once_and_in_order(
    server: ServerProcess, seed: int
) -> None:
    users, writers, kills, each = [ANNA, BEN, CLARA, DORA], [BEN, CLARA, DORA], 5, 150
    acked, finished = Progress(), trio.Event()
    chats = [await server.chat(*users), await server.chat(ANNA, BEN)]
    start = await server.cursor(ANNA)
    readers = [Reader(server, ANNA, start, seed + number) for number in range(2)]
    texts = [(chats[0], f"{number} é\n\t😀 \u2028") for number in range(each)]
    senders = [Sender(server, user, texts) for user in writers]

    async def write() -> None:
        async with trio.open_nursery() as writing:
            for sender in senders:
                writing.start_soon(sender.send, acked, 3)
            for number in range(1, kills + 1):
                await acked.reaches(number * each * len(writers) // (kills + 1))
                await server.kill()
                await server.begin()
                read = (await server.post(chats[1], BEN, "Read this."))["id"]
                target = f"POST /api/v1/messages/{read}/read"
                await server.want(200, target, server.token(ANNA))
                chats.append(await server.chat(*users))
                await server.post(chats[-1], CLARA, "in a new chat")
        finished.set()

    with trio.fail_after(75):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            for reader in readers:
                nursery.start_soon(reader.read, finished)

    events = await server.events(ANNA, start)
    seqs = [event["seq"] for event in events]
    assert all(a < b for a, b in itertools.pairwise(seqs))
    kinds = collections.Counter(event["type"] for event in events)
    assert kinds.pop("message_read") >= kills  # also of writers that had not read
    assert kinds == {
        "new_message": each * len(writers) + kills * 2,
        "chat_added": kills,
    }
    for reader in readers:
        assert [event["seq"] for event in reader.events] == seqs, reader.ways
        assert without_chats(reader.events) == without_chats(events)
        assert min(reader.ways["poll"], reader.ways["replay"]) > 0, reader.ways
    for chat in chats:
        received = [
            event["message"]
            for event in events
            if event["type"] == "new_message" and event["chat_id"] == chat
        ]
        assert received == await server.history(chat, ANNA)


async def test_a_socket_resumes_behind_its_cursor(host: ServerProcess) -> None:
    chat = await host.chat(ANNA, BEN)
    start = await host.cursor(ANNA)
    anna = await host.peer(ANNA, start)
    assert (anna.hello["resume"], anna.hello["cursor"]) == ("live", start)
    await anna.leave()

    sent = [await host.post(chat, BEN, text) for text in ("one", "two", "three")]
    anna = await host.peer(ANNA, start)
    assert (anna.hello["resume"], anna.hello["cursor"]) == ("replay", start)
    assert anna.hello["chats"] == {str(chat): {"last_n": 3, "read_n": 0}}
    events = [await anna.receive("new_message") for _ in sent]
    assert [event["message"] for event in events] == sent
    await anna.receives_nothing()

    epoch = start.partition(".")[0]
    anna = await host.peer(ANNA, f"{epoch}.{events[1]['seq']}")
    assert anna.hello["resume"] == "replay"
    assert await anna.receive() == events[2]
    await anna.receives_nothing()


async def test_a_cursor_that_chatd_cannot_honour_is_told_to_resync(
    host: ServerProcess,
) -> None:
    await host.chat(ANNA, BEN)
    epoch = (await host.cursor(ANNA)).partition(".")[0]
    other = "other" if epoch != "other" else "another"
    bad = [f"{other}.1", f"{epoch}.{10**12}", "x", f"{epoch}.", f"{epoch}.-1", "é.1"]
    bad += [f"{epoch}.{10**30}", f"{epoch}.1.1", "." * 300]
    for cursor in bad:
        anna = await host.peer(ANNA, cursor)
        assert anna.hello["resume"] == "resync", cursor
        assert anna.hello["cursor"].startswith(f"{epoch}."), cursor
        await anna.receives_nothing()
        got = await host.poll(ANNA, cursor)
        assert (got["resync"], got["events"]) == (True, []), cursor


async def test_typing_is_shown_at_once_and_never_replayed(host: ServerProcess) -> None:
    chat = await host.chat(ANNA, BEN)
    start = await host.cursor(BEN)
    anna, ben = await host.peer(ANNA), await host.peer(BEN)
    await anna.send_command("typing", chat_id=chat, is_typing=True)
    typing = {"type": "typing", "chat_id": chat, "user_id": ANNA, "is_typing": True}
    assert await ben.receive() == typing
    await anna.receives_nothing()  # neither an answer nor an echo
    ben = await host.peer(BEN, start)
    await ben.receives_nothing()


# --- try it --------------------------------------------------------------------------


async def test_the_demo_prints_two_links_that_talk_and_leaves_no_files(
    tmp_path: Path,
) -> None:
    demo = ServerProcess(tmp_path / "demo", "serve", "--demo")
    async with demo.serving():
        await wait_until(lambda: "chatd proxy" in demo.said)
        base = re.escape(f"http://127.0.0.1:{demo.port}")
        links = re.findall(base + r"/#token=(\S+)", demo.said)
        assert len(links) == 2, demo.said
        sessions = [
            await demo.want(200, "POST /api/v1/session", link) for link in links
        ]
        assert sessions[0]["user_id"] != sessions[1]["user_id"]
        assert all(session["name"] for session in sessions)
        anna, ben = [await demo.peer(session["token"]) for session in sessions]
        chats = await demo.want(200, "GET /api/v1/chats", sessions[0]["token"])
        (chat,) = chats["chats"]
        ack = await anna.ask("send_message", chat_id=chat["id"], content="hello")
        event = await ben.find("new_message")
        assert event["message"]["id"] == ack["message_id"]

        line = re.search(
            r"(?m)^chatd (proxy --upstream \S+ --secret-file \S+)$", demo.said
        )
        assert line, demo.said
        async with ServerProcess(
            tmp_path / "proxy", *line[1].split()
        ).serving() as proxy:
            session = await proxy.want(200, "POST /api/v1/session", links[0])
            assert session["name"]
            anna = await proxy.peer(sessions[0]["token"])
            assert anna.hello["resume"] == "fresh"
    assert os.listdir(demo.home) == ["stderr"]


# --- run it --------------------------------------------------------------------------


async def test_a_sign_in_link_is_good_for_a_session_and_for_nothing_else(
    host: ServerProcess,
) -> None:
    base = f"http://127.0.0.1:{host.port}"
    run = await run_chatd(
        "token", ANNA, "--db", host.db, "--name", "Zoë", "--link", base
    )
    assert run.status == 0, run
    match = re.fullmatch(re.escape(base) + r"/#token=(\S+)\n", run.out)
    assert match, run
    link = match[1]
    claims = jwt.decode(link, options={"verify_signature": False})
    assert claims["use"] == "signin"
    assert 86000 < claims["exp"] - time.time() < 87000  # a day

    for target in ("/api/v1/me", "/api/v2/ws-token", "/api/v1/chats"):
        await host.want(401, f"GET {target}", link)
    assert await refuses(host, link) == (401, "token_invalid")
    session = await host.want(200, "POST /api/v1/session", link)
    assert (session["user_id"], session["name"]) == (ANNA, "Zoë")
    assert session["expires_in"] > 0
    me = await host.want(200, "GET /api/v1/me", session["token"])
    assert (me["user_id"], me["name"]) == (ANNA, "Zoë")
    assert (await host.peer(session["token"])).hello["user_id"] == ANNA
    again = await host.want(200, "POST /api/v1/session", session["token"])
    assert again["user_id"] == ANNA
    await host.want(401, "POST /api/v1/session", host.token(ANNA))


async def test_one_sign_in_link_is_enough_to_get_a_group_of_friends_in(
    tmp_path: Path,
) -> None:
    async with ServerProcess(tmp_path / "server").serving("--invites=on") as server:
        words = ("token", 1, "--name", "Anna", "--link", "--db", server.db)
        signin = (await run_chatd(*words)).out.strip().partition("#token=")[2]
        anna = await server.want(200, "POST /api/v1/session", signin)
        me = await server.want(200, "GET /api/v1/me", anna["token"])
        assert me["name"] == "Anna"
        assert me["server"]["invites"] is True
        new = {"title": "Friends"}
        made = await server.want(201, "POST /api/v1/chats", anna["token"], new)
        chat = made["chat"]["id"]
        home = await server.peer(anna["token"])

        # Two strangers open the same link, see what it is for, and choose a name.
        path = f"/api/v1/chats/{chat}/invites"
        invite = await server.want(201, f"POST {path}", anna["token"], {})
        link = {"token": invite["token"]}
        shown = await server.want(200, "POST /api/v1/join", "", link)
        assert shown == {"title": "Friends", "member_count": 1}
        friends = []
        for name in ("Ben", "Clara"):
            body = link | {"name": name}
            friend = await server.want(201, "POST /api/v1/join", "", body)
            assert (friend["name"], friend["chat_id"]) == (name, chat)
            assert (await home.receive("member_added"))["name"] == name
            friends.append(friend)
        ben, clara = [await server.peer(friend["token"]) for friend in friends]
        ack = await ben.ask("send_message", chat_id=chat, content="Who is here?")
        for peer in (home, clara):
            event = await peer.find("new_message")
            assert event["message"]["id"] == ack["message_id"]
            assert event["message"]["sender_id"] == friends[0]["user_id"]

        # Ben invites too, changes his name, and signs in on a second device.
        token = friends[0]["token"]
        await server.want(201, f"POST {path}", token, {"ttl_seconds": 60})
        me = await server.want(200, "PATCH /api/v1/me", token, {"name": "Benno"})
        assert me["name"] == "Benno"
        device = await server.want(200, "POST /api/v1/me/link", token)
        phone = await server.want(200, "POST /api/v1/session", device["token"])
        assert (phone["user_id"], phone["name"]) == (me["user_id"], "Benno")
        assert (await server.peer(phone["token"])).hello["chats"].keys() == {str(chat)}

        # A revoked invitation lets nobody in; the members stay, across a restart.
        await server.want(204, f"DELETE {path}", anna["token"])
        await server.want(401, "POST /api/v1/join", "", link | {"name": "Eve"})
        await server.stop()
        await server.begin()
        users = await server.want(200, "GET /api/v1/users", friends[1]["token"])
        assert [user["name"] for user in users["users"]] == ["Anna", "Benno", "Clara"]


async def test_a_backup_is_made_while_it_serves_and_after_a_restore_clients_resync(
    server: ServerProcess, tmp_path: Path
) -> None:
    chat, copy = await server.chat(ANNA, BEN), tmp_path / "copy.db"
    anna = await server.peer(ANNA)
    kept = [
        await anna.ask("send_message", chat_id=chat, content=text) for text in "012"
    ]
    seen = await server.cursor(BEN)
    assert (await run_chatd("backup", copy, "--db", server.db)).status == 0
    for db in (copy, server.db):
        assert (await run_chatd("check", "--db", db)).status == 0
    await server.post(chat, ANNA, "after the backup")
    later = await server.cursor(BEN)

    await server.stop()
    assert (await run_chatd("restore", copy, "--db", server.db)).status == 0
    assert (await run_chatd("check", "--db", server.db)).status == 0
    await server.begin()
    messages = await server.history(chat, BEN)
    assert [m["id"] for m in messages] == [ack["message_id"] for ack in kept]
    for cursor in (seen, later):
        ben = await server.peer(BEN, cursor)
        assert ben.hello["resume"] == "resync"
        now = ben.hello["cursor"]
        assert now.partition(".")[0] != cursor.partition(".")[0]
        assert (await server.poll(BEN, cursor))["resync"] is True
    ben = await server.peer(BEN, (await server.poll(BEN, seen))["cursor"])
    assert ben.hello["resume"] == "live"
    sent = await server.post(chat, ANNA, "after the restore")
    assert sent["n"] == 4
    assert (await ben.receive("new_message"))["message"] == sent


async def test_a_backup_under_load_has_every_message_that_was_acked_before(
    server: ServerProcess, tmp_path: Path
) -> None:
    users, acked = [ANNA, BEN, CLARA], Progress()
    chat = await server.chat(*users)
    senders = [Sender(server, user, [(chat, "hello")] * 100_000) for user in users]

    def acks() -> dict[str, int]:
        return {k: a["message_id"] for s in senders for k, a in s.acks.items()}

    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            for sender in senders:
                nursery.start_soon(sender.send, acked)
            for number in range(2):
                await acked.reaches(acked.value + 300)
                before, copy = acks(), tmp_path / f"copy-{number}.db"
                done = await run_chatd("backup", copy, "--db", server.db)
                assert (done.status, done.out) == (0, f"{copy}\n"), done
                assert len(acks()) > len(before)  # meanwhile it served on
                assert stat.S_IMODE(copy.stat().st_mode) == 0o600
                assert (await run_chatd("check", "--db", copy)).status == 0
                with contextlib.closing(sqlite3.connect(copy)) as db:
                    rows = dict(db.execute("SELECT client_id, id FROM message"))
                assert before.items() <= rows.items()
            nursery.cancel_scope.cancel()


async def test_after_a_restore_no_client_keeps_what_was_lost(
    server: ServerProcess, tmp_path: Path
) -> None:
    chat, copy = await server.chat(ANNA, BEN), tmp_path / "copy.db"
    cursors = [await server.cursor(BEN)]
    await server.post(chat, ANNA, "kept")
    assert (await run_chatd("backup", copy, "--db", server.db)).status == 0
    cursors.append(await server.cursor(BEN))
    for number in range(3):
        await server.post(chat, ANNA, f"lost {number}")
        cursors.append(await server.cursor(BEN))
    for _ in range(2):  # the same copy a second time, too
        await server.stop()
        assert (await run_chatd("restore", copy, "--db", server.db)).status == 0
        await server.begin()
        for number in range(3):  # the seqs of what was lost are used again
            await server.post(chat, ANNA, f"new {number}")
        for cursor in cursors:
            ben = await server.peer(BEN, cursor)
            assert ben.hello["resume"] == "resync", cursor
            got = await server.poll(BEN, cursor)
            assert (got["resync"], got["events"]) == (True, []), cursor
        cursors.append(await server.cursor(BEN))
    messages = [message["content"] for message in await server.history(chat, BEN)]
    assert messages == ["kept", "new 0", "new 1", "new 2"]


# --- behind `chatd proxy` ------------------------------------------------------------


async def test_the_proxy_outlives_the_server_and_finds_it_again(
    server: ServerProcess,
) -> None:
    async with proxy_of(server).serving() as proxy:
        chat = await proxy.chat(ANNA)
        anna = await proxy.peer(ANNA)
        sent = await proxy.post(chat, ANNA, "before")
        cursor = f"{anna.hello['cursor'].partition('.')[0]}.{sent['id']}"
        await anna.receive("new_message")
        await server.kill()
        assert await anna.ended() == 1006
        answer = await proxy.ask("GET", "/healthz")
        assert (answer.status, answer.code) == (502, "upstream")
        assert await refuses(proxy, proxy.token(ANNA)) == (502, "upstream")
        await server.begin()
        anna = await proxy.peer(ANNA, cursor)
        assert anna.hello["resume"] == "live"
        await proxy.post(chat, ANNA, "after")
        assert (await anna.receive("new_message"))["message"]["n"] == 2


# --- for your backend ----------------------------------------------------------------


async def test_a_user_is_who_the_token_says_and_a_wrong_token_opens_nothing(
    host: ServerProcess,
) -> None:
    for claims in ({"user_id": ANNA}, {"user_id": ANNA, "sub": "somebody"}):
        me = await host.want(200, "GET /api/v1/me", host.token(ANNA, **claims))
        assert me["user_id"] == ANNA
    head, body, signature = host.token(ANNA).split(".")
    _, service, _ = host.service.split(".")
    wrong = {
        "no token": "abc",
        "no signature": f"{head}.{body}.",
        "claims that were not signed": f"{head}.{service}.{signature}",
        "another key": jwt.encode({"sub": "5", "exp": time.time() + 60}, "k" * 32),
        "no exp": host.token(ANNA, exp=None),
        "a user that is no number": host.token(ANNA, sub="anna"),
    }
    expired = host.token(ANNA, exp=int(time.time()) - 8)
    refused = [(token, "token_invalid") for token in wrong.values()]
    for token, code in [*refused, (expired, "token_expired")]:
        answer = await host.ask("GET", "/api/v1/me", token)
        assert (answer.status, answer.code) == (401, code)
        assert await refuses(host, token) == (401, code)
    await host.want(403, "GET /metrics", host.token(ANNA))  # a token without the scope


async def test_a_ticket_works_once_in_one_process_and_for_the_socket_only(
    server: ServerProcess,
) -> None:
    short = server.token(ANNA, exp=int(time.time()) + 300)

    async def ticket() -> str:
        got = await server.want(200, "GET /api/v2/ws-token", short)
        return str(got["token"])

    one = await ticket()
    assert (await refuses(server, one, Sec_WebSocket_Key="short"))[0] == 400
    assert (await refuses(server, one, Origin="http://elsewhere"))[0] == 403
    anna = await server.peer(one)  # those two have not used it
    assert 290 < anna.hello["expires_in"] <= 300  # as long as the asking token
    assert await refuses(server, one) == (401, "token_used")
    assert (await anna.ask("auth", token=one))["code"] == "token_used"

    two = await ticket()
    for target in ("/api/v1/me", "/api/v2/ws-token", "/api/v1/session"):
        method = "POST" if target == "/api/v1/session" else "GET"
        answer = await server.ask(method, target, two)
        assert (answer.status, answer.code) == (401, "token_invalid"), target
    assert (await anna.ask("auth", token=two))["type"] == "ack"
    assert await refuses(server, two) == (401, "token_used")

    three = await ticket()
    await server.stop()
    await server.begin()
    assert await refuses(server, three) == (401, "token_used")
    for _ in range(2):  # any other token works again and again
        await server.peer(short)


async def test_a_revoked_user_is_out_at_once_and_stays_out_after_kill_9(
    server: ServerProcess,
) -> None:
    token, revoke = server.token(ANNA), "POST /api/v1/internal/chat/revoke"
    got = await server.want(200, "GET /api/v2/ws-token", token)
    ticket, no_iat = str(got["token"]), server.token(ANNA, iat=None)
    tabs, ben = ([await server.peer(token) for _ in range(3)], await server.peer(BEN))
    await server.want(403, revoke, server.token(BEN), {"user_id": ANNA})
    got = await server.want(200, revoke, server.service, {"user_id": ANNA})
    assert got == {"user_id": ANNA, "closed": 3}
    revoked_at = int(time.time())
    assert [await tab.ended() for tab in tabs] == [4503] * 3
    await ben.receives_nothing()

    async def all_are_refused() -> None:
        for old in (token, no_iat, ticket):
            status, code = await refuses(server, old)
            assert (status, code[:6]) == (401, "token_"), code
        for old in (token, no_iat):
            await server.want(401, "GET /api/v1/me", old)

    await all_are_refused()
    await server.kill()
    await server.begin()
    await all_are_refused()

    async def a_new_token_works() -> bool:
        new = server.token(ANNA, iat=revoked_at + 7)  # clocks may differ by 5 s
        return (await server.ask("GET", "/api/v1/me", new)).status == 200

    await wait_until(a_new_token_works)
    await server.peer(server.token(ANNA, iat=revoked_at + 7))
    await all_are_refused()


# --- in your own page ----------------------------------------------------------------


async def test_the_page_is_served_and_no_other_file(host: ServerProcess) -> None:
    page = await host.ask("GET", "/")
    assert page.status == 200
    assert page.headers["content-type"].startswith("text/html")
    for target in ("/web/../chatd.py", "/web/..%2fchatd.py", "/web//etc/passwd", "/x"):
        assert (await host.ask("GET", target)).status in {400, 404}, target
    assert (await host.ask("GET", "/web/nothing.js")).code == "not_found"


# --- the protocol --------------------------------------------------------------------


def documented() -> dict[str, Frame]:
    """The frames of the documentation, by their type: what chatd sends."""
    frames: dict[str, Frame] = {}
    for page in [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]:
        blocks = re.findall(r"(?s)```json\n(.*?)```", page.read_text("utf-8"))
        for text in blocks:
            start = 0
            while (start := text.find("{", start)) >= 0:
                frame, start = json.JSONDecoder().raw_decode(text, start)
                frames[frame.get("type", "")] = frame  # commands come before answers
    return frames


def shape(frame: Frame) -> dict[str, type]:
    return {name: type(value) for name, value in frame.items()}


async def test_the_frames_are_those_of_the_documentation(host: ServerProcess) -> None:
    chat = await host.chat(ANNA, BEN)
    anna, ben = await host.peer(ANNA), await host.peer(BEN)
    frames = [anna.hello]
    send = {"chat_id": chat, "content": "hi", "client_id": "01J8", "ref": "r1"}
    await anna.send_command("send_message", **send)
    frames += [await anna.receive("new_message"), await anna.receive("ack")]
    await ben.send_command("mark_read", message_id=frames[-1]["message_id"])
    frames.append(await anna.receive("message_read"))
    await ben.send_command("typing", chat_id=chat, is_typing=True)
    frames.append(await anna.receive("typing"))
    await anna.send_command("ping")
    frames.append(await anna.receive("pong"))
    await host.chat(ANNA)
    frames.append(await anna.receive("chat_added"))
    members = f"/api/v1/chats/{chat}/members"
    eve = host.token(EVE, name="Eve")
    await host.want(200, "GET /api/v1/me", eve)
    await host.want(201, f"POST {members}", host.service, {"user_id": EVE})
    frames.append(await anna.receive("member_added"))
    await host.want(204, f"DELETE {members}/{EVE}", host.service)
    frames.append(await anna.receive("member_removed"))
    for frame in frames:
        example = documented()[frame["type"]]
        assert shape(frame) == shape(example), frame
        if "message" in frame:
            assert shape(frame["message"]) == shape(example["message"]), frame
    await anna.send_command("ping", ref=5)
    error = await anna.receive("error")
    assert shape(error).items() <= shape(documented()["error"]).items(), error


async def test_a_conversation_reads_word_for_word_like_this(
    host: ServerProcess,
) -> None:
    chat = await host.chat(ANNA, BEN)
    anna, ben = await host.peer(ANNA), await host.peer(BEN)
    connected = anna.hello
    assert (connected["user_id"], connected["resume"]) == (ANNA, "fresh")
    assert TIMESTAMP.fullmatch(connected["timestamp"])
    assert 3500 < connected["expires_in"] <= 3600
    assert connected["chats"] == {str(chat): {"last_n": 0, "read_n": 0}}

    await anna.send_command("ping")
    assert TIMESTAMP.fullmatch((await anna.receive("pong"))["timestamp"])

    await anna.send_command(
        "send_message", chat_id=chat, content="Привет!", client_id="1"
    )
    event, ack = await anna.receive("new_message"), await anna.receive("ack")
    assert await ben.receive() == event
    message, seq = event["message"], event["seq"]
    assert event == {
        "type": "new_message", "seq": seq, "chat_id": chat, "message": message,
    }  # fmt: skip
    number, created_at = message["id"], message["created_at"]
    assert TIMESTAMP.fullmatch(created_at)
    assert message == {
        "id": number, "chat_id": chat, "sender_id": ANNA, "content": "Привет!",
        "created_at": created_at, "n": 1, "client_id": "1",
    }  # fmt: skip
    assert ack.pop("ref", None) is None
    assert ack == {
        "type": "ack", "client_id": "1", "message_id": number, "chat_id": chat,
        "n": 1, "created_at": created_at, "duplicate": False,
    }  # fmt: skip

    await ben.send_command("mark_read", message_id=number, ref="r")
    read = await ben.receive("message_read")
    assert (await ben.receive("ack"))["ref"] == "r"
    assert await anna.receive() == read
    assert read["seq"] > seq
    assert read == {
        "type": "message_read", "seq": read["seq"], "message_id": number,
        "chat_id": chat, "read_by": BEN, "n": 1,
    }  # fmt: skip
    await ben.send_command("mark_read", message_id=number, ref="again")
    assert (await ben.receive("ack"))["ref"] == "again"  # nothing moved: no event
    await anna.receives_nothing()
    await anna.leave()
    await ben.leave()


async def test_every_tab_of_a_member_gets_the_chat_and_a_stranger_learns_nothing(
    host: ServerProcess,
) -> None:
    chat = await host.chat(ANNA, BEN)
    tabs = [await host.peer(ANNA) for _ in range(3)]
    ben, eve = await host.peer(BEN), await host.peer(EVE)
    await ben.send_command("send_message", chat_id=chat, content="for all of you")
    events = [await tab.receive("new_message") for tab in tabs]
    assert events[0] == events[1] == events[2]
    await ben.find("ack")

    send = {"content": "for me too?"}
    forbidden = await eve.ask("send_message", chat_id=chat, **send)
    unknown = await eve.ask("send_message", chat_id=2**53 - 1, **send)
    assert forbidden["code"] == unknown["code"] == "not_found"
    same = [re.sub(r"\d+", "N", error["message"]) for error in (forbidden, unknown)]
    assert same[0] == same[1]  # not even which chats there are
    typing = await eve.ask("typing", chat_id=chat, is_typing=True)
    assert typing["code"] == "not_found"
    mark = await eve.ask("mark_read", message_id=events[0]["message"]["id"])
    assert mark["code"] == "not_found"
    for tab in tabs:
        await tab.receives_nothing()
    await eve.receives_nothing()


async def test_membership_takes_effect_at_once_on_open_sockets(
    host: ServerProcess,
) -> None:
    anna, ben = await host.peer(ANNA), await host.peer(BEN)
    chat = await host.chat(ANNA)
    added = await anna.receive("chat_added")
    assert added["chat_id"] == added["chat"]["id"] == chat
    first = await host.post(chat, ANNA, "before Ben came")
    await anna.receive("new_message")
    await ben.receives_nothing()

    members, body = f"/api/v1/chats/{chat}/members", {"user_id": BEN}
    both = {"chat_id": chat, "user_id": BEN}
    for status in (201, 200):  # 200: is there already
        got = await host.want(status, f"POST {members}", host.token(ANNA), body)
        assert got == both
    joined, welcome = (
        await anna.receive("member_added"),
        await ben.receive("chat_added"),
    )
    assert (joined["chat_id"], joined["user_id"]) == (chat, BEN)
    assert welcome["seq"] > joined["seq"]
    history = await host.history(chat, BEN)
    assert [message["id"] for message in history] == [first["id"]]
    chats = (await host.want(200, "GET /api/v1/chats", host.token(BEN)))["chats"]
    assert [(chat["read_n"], chat["unread"]) for chat in chats] == [(1, 0)]
    await ben.send_command("send_message", chat_id=chat, content="hello")
    assert (await anna.receive("new_message"))["message"]["n"] == 2
    await ben.find("ack")

    await host.want(204, f"DELETE {members}/{BEN}", host.token(BEN))
    removed = await ben.receive("member_removed")
    assert await anna.receive("member_removed") == removed
    await host.post(chat, ANNA, "without Ben")
    await anna.receive("new_message")
    await ben.receives_nothing()
    refused = await ben.ask("send_message", chat_id=chat, content="still here?")
    assert refused["code"] == "not_found"
    await host.want(404, f"GET /api/v1/chats/{chat}/messages", host.token(BEN))
    events = await host.events(BEN, ben.hello["cursor"])
    assert without_chats(events) == without_chats([welcome, removed])


async def test_a_message_that_is_sent_again_is_stored_once(host: ServerProcess) -> None:
    chat, other = await host.chat(ANNA, BEN), await host.chat(ANNA)
    anna, token, key = await host.peer(ANNA), host.token(ANNA), "k" * 64
    send = {"chat_id": chat, "content": "once", "client_id": key}
    first = await anna.ask("send_message", **send)
    again = await anna.ask("send_message", **send)
    assert (first["duplicate"], again["duplicate"]) == (False, True)
    for name in ("message_id", "n", "created_at", "chat_id", "client_id"):
        assert first[name] == again[name]
    await anna.receives_nothing()  # no second event

    path, body = f"/api/v1/chats/{chat}/messages", {"content": "once"}
    by_field = await host.want(200, f"POST {path}", token, {**body, "client_id": key})
    assert by_field["duplicate"] is True
    assert by_field["message"]["id"] == first["message_id"]
    by_header = await host.want(200, f"POST {path}", token, body, Idempotency_Key=key)
    assert by_header == by_field
    both = await host.ask(
        "POST", path, token, {**body, "client_id": "another"}, Idempotency_Key=key
    )
    assert (both.status, both.code) == (400, "bad_field")

    for change in ({"content": "twice"}, {"chat_id": other}):
        error = await anna.ask("send_message", **{**send, **change})
        assert error["code"] == "idempotency_mismatch"
    answer = await host.ask("POST", path, token, {"content": "twice", "client_id": key})
    assert (answer.status, answer.code) == (409, "idempotency_mismatch")
    ben = await host.peer(BEN)
    ack = await ben.ask("send_message", **send)  # another sender's key is another key
    assert ack["duplicate"] is False
    texts = [message["content"] for message in await host.history(chat, ANNA)]
    assert texts == ["once", "once"]


async def test_clients_that_the_project_did_not_write_talk_to_it(
    host: ServerProcess,
) -> None:
    chat = await host.chat(ANNA, BEN)
    url = f"ws://127.0.0.1:{host.port}{host.socket_path(ANNA)}"

    def by_websockets() -> list[Frame]:
        with websockets_connect(url, proxy=None) as socket_:
            assert socket_.ping().wait(WAIT_SECONDS)
            connected = json.loads(socket_.recv(WAIT_SECONDS))
            send = {"type": "send_message", "chat_id": chat, "content": "🙂" * 3000}
            text = json.dumps(send, ensure_ascii=False)
            socket_.send([text[:50], text[50:]])  # in two fragments
            rest = [json.loads(socket_.recv(WAIT_SECONDS)) for _ in range(2)]
        assert socket_.close_code == 1000
        return [connected, *rest]

    frames = await trio.to_thread.run_sync(by_websockets)
    assert [frame["type"] for frame in frames] == ["connected", "new_message", "ack"]
    assert frames[1]["message"]["content"] == "🙂" * 3000
    with trio.fail_after(WAIT_SECONDS):
        async with trio_websocket.open_websocket_url(url) as ws:
            connected = json.loads(await ws.get_message())
            assert connected["chats"] == {str(chat): {"last_n": 1, "read_n": 1}}
            await ws.ping()
            await ws.send_message('{"type": "ping"}')
            assert json.loads(await ws.get_message())["type"] == "pong"


async def test_the_stats_and_metrics_count_and_need_a_token_of_their_own(
    server: ServerProcess,
) -> None:
    for target in ("/api/v1/internal/chat/ws/stats", "/metrics"):
        await server.want(401, f"GET {target}")
        answer = await server.ask("GET", target, server.token(ANNA))
        assert (answer.status, answer.code) == (403, "forbidden")
    chat = await server.chat(ANNA, BEN)
    anna, ben, tab = [await server.peer(user) for user in (ANNA, BEN, BEN)]
    for _ in range(2):
        await anna.ask("send_message", chat_id=chat, content="x", client_id="1")
    await ben.receive("new_message")
    await tab.leave()
    assert (await refuses(server, "no.such.token"))[0] == 401
    await anna.send_frame("{")
    await anna.receive("error")

    async def two_are_open() -> bool:
        return bool((await server.stats())["connections"]["active"] == 2)

    await wait_until(two_are_open)
    _, version = (await run_chatd("--version")).out.split()
    got = await server.stats()
    assert got["uptime_seconds"] >= 0
    assert got["version"] == version
    connections, broadcast, store = got["connections"], got["broadcast"], got["store"]
    assert (connections["users"], connections["total"]) == (2, 3)
    assert connections["closed"] == {"1000": 1}
    assert connections["catching_up"] == 0
    assert sum(connections["refused"].values()) == 1
    assert broadcast["events"]["new_message"] == 1
    assert broadcast["deliveries"] >= 3
    assert {"writes", "catch_ups", "stalls"} <= set(broadcast)
    assert (store["messages"], store["duplicates"], store["failed"]) == (1, 1, 0)
    assert store["degraded"] is False
    assert store["sqlite"] == sqlite3.sqlite_version
    assert set(store["commit_seconds"]) == {"p50", "p99", "max"}
    assert {"commits", "batch_max", "wal_bytes"} <= set(store)
    resumes = {"fresh": 3, "live": 0, "replay": 0, "resync": 0}
    assert {**resumes, **got["resumes"]} == resumes
    assert isinstance(got["errors"], dict)

    answer = await server.ask("GET", "/metrics", server.stats_token)
    assert answer.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(answer.body.decode()))
    for family in families:
        assert family.name.startswith(("chatd_", "process_"))
    values = {s.name: s.value for family in families for s in family.samples}
    assert any("connections" in name and values[name] == 2 for name in values)


# --- how it fails --------------------------------------------------------------------


async def test_a_full_disk_refuses_messages_and_chatd_goes_on_when_there_is_space(
    server: ServerProcess,
) -> None:
    """A limit on the size of its files stands for the full disk."""
    assert server.process is not None
    pid, (soft, hard) = server.process.pid, resource.getrlimit(resource.RLIMIT_FSIZE)
    chat = await server.chat(ANNA, BEN)
    before = [await server.post(chat, BEN, BULK) for _ in range(8)]
    anna, ben = await server.peer(ANNA), await server.peer(BEN)
    size = server.db.with_name("chatd.db-wal").stat().st_size
    assert size > 100_000
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))

    send = {"chat_id": chat, "content": BULK, "client_id": "1"}
    for _ in range(2):
        assert (await anna.ask("send_message", **send))["code"] == "storage_failed"
    path, body = f"/api/v1/chats/{chat}/messages", {"content": BULK}
    answer = await server.ask("POST", path, server.token(ANNA), body)
    assert (answer.status, answer.code) == (503, "storage_failed")
    assert int(answer.headers["retry-after"]) >= 1
    await server.want(503, "GET /healthz")
    assert (await server.stats())["store"]["degraded"] is True
    assert await server.history(chat, BEN) == before  # it reads on
    await ben.receives_nothing()  # and sockets stay

    resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))

    async def is_well() -> bool:
        return (await server.ask("GET", "/healthz")).status == 200

    await wait_until(is_well)
    assert (await anna.ask("send_message", **send))["type"] == "ack"
    last = (await ben.receive("new_message"))["message"]
    assert (await ben.receive("message_read"))["read_by"] == ANNA
    assert await server.history(chat, BEN) == [*before, last]
    assert (await server.stats())["store"]["degraded"] is False
    await ben.receives_nothing()


async def test_a_slow_reader_delays_nobody_costs_no_memory_and_misses_nothing(
    server: ServerProcess,
) -> None:
    slow, count = range(10, 20), 400
    chat = await server.chat(ANNA, BEN, *slow)
    texts = [f"{number} {BULK}" for number in range(count)]

    async def read(client: SocketClient) -> float:
        """Receive all of it; return the longest wait for a message."""
        waits = []
        for text in texts:
            began = trio.current_time()
            event = await client.receive("new_message")
            assert event["message"]["content"] == text
            waits.append(trio.current_time() - began)
        return max(waits)

    ben = await server.peer(BEN)
    memory = server.rss
    async with trio.open_nursery() as nursery:  # what it costs when all read
        nursery.start_soon(send_bulk, server, chat, ANNA, count)
        await read(ben)
    usual, memory = server.rss - memory, server.rss

    clients = [await server.peer(user, receive_buffer=16384) for user in slow]
    began = trio.current_time()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_bulk, server, chat, ANNA, count)
            assert await read(ben) < 1.5
        load = sum(len(text.encode()) for text in texts)
        assert server.rss - memory < usual + load  # not once for each of ten
        stats = await server.stats()
        assert stats["connections"]["catching_up"] > 0, stats
        await trio.sleep_until(began + 3)  # less than the limit, which is 10 s
        for client in clients:
            client.read_faster()
            await read(client)
            await client.receives_nothing()
    stats = await server.stats()
    assert stats["connections"]["catching_up"] == 0, stats
    assert stats["broadcast"]["stalls"] == 0, stats


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_says_bye_and_1012_loses_no_ack_and_ends_with_status_0(
    server: ServerProcess, signal_: int
) -> None:
    writers, acked = [ANNA, BEN, CLARA], Progress()
    chat = await server.chat(*writers, DORA)
    texts = [(chat, str(number)) for number in range(100_000)]
    senders = [Sender(server, user, texts) for user in writers]
    tabs = [await server.peer(DORA) for _ in range(3)]

    async def write(sender: Sender, client: SocketClient) -> None:
        with pytest.raises(Disconnected) as closed:
            await sender.send_over(client, acked)
        assert closed.value.code == 1012

    async def say_goodbye(tab: SocketClient) -> None:
        bye = await tab.find("bye")
        assert set(bye) == {"type", "retry_after"}
        assert 0 <= bye["retry_after"] < 60
        assert await tab.ended() == 1012

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for sender in senders:
                nursery.start_soon(write, sender, await server.peer(sender.user))
            await acked.reaches(300)
            began = trio.current_time()
            for tab in tabs:
                nursery.start_soon(say_goodbye, tab)
            assert await server.ended(signal_) == 0
    assert trio.current_time() - began < 5
    assert not MISTAKE.search(server.output)
    with pytest.raises(ConnectionRefusedError):
        await server.peer(ANNA)

    await server.begin()
    stored = await server.history(chat, ANNA)
    ids = {message["client_id"]: message["id"] for message in stored}
    for sender in senders:
        for client_id, ack in sender.acks.items():
            assert ids[client_id] == ack["message_id"]
        of = [m["content"] for m in stored if m["sender_id"] == sender.user]
        assert of == [text for _, text in texts[: len(of)]]
