"""For the site's backend: the feed, the unread list, and forgetting a user."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chatd
from tests.client import Frame, ServerProcess, run_chatd
from tests.harness import BIG, Memory, VirtualServer, memory_with, taking, with_server

FEED = "/api/v1/internal/chat/events"
UNREAD = "/api/v1/internal/chat/unread"
FORGET = "/api/v1/internal/chat/forget"
OLD = 1_000  # seconds; made_older() makes a message so old

# --- helpers -------------------------------------------------------------------------


async def feed(server: VirtualServer, cursor: str | None = None, **query: Any) -> Any:
    if cursor is not None:
        query["cursor"] = cursor
    return await server.command("GET", f"{FEED}?{urlencode(query)}")


async def whole_feed(server: VirtualServer, limit: int = 500) -> list[Frame]:
    """Read the feed from the oldest event to its end."""
    events: list[Frame] = []
    cursor, more = "first", True
    while more:
        page = await feed(server, cursor, limit=limit)
        assert not page["resync"]
        assert 0 <= len(page["events"]) <= limit
        events += page["events"]
        cursor, more = page["cursor"], page["more"]
    return events


def in_log(server: VirtualServer) -> list[tuple[Any, ...]]:
    """The event log, as it is on disk."""
    return server.store._writer.execute(
        "SELECT seq, kind, chat_id, to_chat, to_user FROM event ORDER BY seq"
    ).fetchall()


def outline(events: Iterable[Frame]) -> list[tuple[Any, ...]]:
    fields = ("seq", "type", "chat_id", "to_chat", "to_user")
    return [tuple(event[field] for field in fields) for event in events]


def made_older(server: VirtualServer | Memory, *ids: int, by: int = OLD) -> None:
    db = server.store._writer
    for message_id in ids:
        db.execute(
            "UPDATE message SET created_at = created_at - ? WHERE id = ?",
            (by, message_id),
        )


async def unread(server: VirtualServer, **query: Any) -> Any:
    return await server.command("GET", f"{UNREAD}?{urlencode(query)}")


async def who_is_unread(
    server: VirtualServer, **query: Any
) -> list[tuple[int, int, int]]:
    got = await unread(server, **query)
    assert not got["more"]
    return [(row["chat_id"], row["user_id"], row["unread"]) for row in got["unread"]]


async def forget(server: VirtualServer, user: int) -> None:
    assert await server.command("POST", FORGET, {"user_id": user}) == {"more": False}


# --- who may -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"), [("GET", FEED), ("GET", UNREAD), ("POST", FORGET)]
)
@with_server()
async def test_only_a_service_may(
    server: VirtualServer, method: str, path: str
) -> None:
    body = {"user_id": 6} if method == "POST" else None
    for token, status, code in (
        ("", 401, "token_invalid"),
        (server.token(6), 403, "forbidden"),
        (server.token(6, scope="stats"), 403, "forbidden"),
        (server.token(6, use="signin"), 401, "token_invalid"),
    ):
        answer = await server.ask(method, path, body, token=token)
        assert (answer.status, answer.code) == (status, code)
    wrong = "POST" if method == "GET" else "GET"
    token = server.token(6, scope="service")
    assert (await server.ask(wrong, path, token=token)).status == 405


# --- the feed ------------------------------------------------------------------------


@with_server()
async def test_the_feed_starts_at_the_head_without_a_cursor(
    server: VirtualServer,
) -> None:
    chat = await server.chat(1, 2)
    head = server.app.hub.head
    start = await feed(server)
    assert start == {
        "events": [],
        "cursor": f"{server.store.epoch}.{head}",
        "more": False,
        "resync": False,
    }
    (message_id,) = await server.post(chat, "hi")
    page = await feed(server, start["cursor"])
    (event,) = page["events"]
    assert event["type"] == "new_message"
    assert event["message"]["content"] == "hi"
    assert event["seq"] == message_id == head + 1
    assert (page["more"], page["resync"]) == (False, False)
    again = await feed(server, page["cursor"])
    assert (again["events"], again["cursor"]) == ([], page["cursor"])


@pytest.mark.parametrize("tail_events", [16_384, 3, 0])
@with_server(large_chat=2)
async def test_the_feed_has_every_event_once_with_its_audience(
    server: VirtualServer, tail_events: int
) -> None:
    object.__setattr__(server.app.settings, "tail_events", tail_events)
    small, large = await server.chat(1, 2), await server.chat(1, 2, 3)
    for chat in (small, large):
        (message_id,) = await server.post(chat, "hi")
        target = f"/api/v1/messages/{message_id}/read"
        assert (await server.ask("POST", target, user=2)).status == 200
    await server.command("POST", f"/api/v1/chats/{large}/members", {"user_id": 4})
    await server.command("DELETE", f"/api/v1/chats/{small}/members/2")
    expected = [
        (seq, kind, chat, bool(to_chat), to_user)
        for seq, kind, chat, to_chat, to_user in in_log(server)
    ]
    for limit in (1, 2, 500):
        assert outline(await whole_feed(server, limit)) == expected
    # A mark in a large chat is for its reader only; a removal also for the removed one.
    audience = {
        (kind, chat): (to_chat, to_user) for _, kind, chat, to_chat, to_user in expected
    }
    assert audience["message_read", small] == (True, None)
    assert audience["message_read", large] == (False, 2)
    assert audience["member_removed", small] == (True, 2)
    assert audience["member_added", large] == (True, None)
    assert [e[4] for e in expected if e[1] == "chat_added"] == [1, 2, 1, 2, 3, 4]


@with_server(tail_events=0)
async def test_an_event_of_the_feed_is_the_event_of_the_poll_with_an_audience(
    server: VirtualServer,
) -> None:
    await server.post(await server.chat(1, 2), "hi", "ho")
    cursor = f"{server.store.epoch}.0"
    polled = (await server.ask("GET", f"/api/v1/events?cursor={cursor}", user=1)).json
    assert all("to_chat" not in event for event in polled["events"])
    seqs = [event["seq"] for event in polled["events"]]
    fed = [e for e in await whole_feed(server) if e["seq"] in seqs]
    for event in fed:
        del event["to_chat"], event["to_user"]
    assert fed == polled["events"]


@pytest.mark.parametrize(
    "cursor",
    ["", "x", "0", ".", "{epoch}", "{epoch}.", "{epoch}.-1", "{epoch}.x", "{epoch}.1 ",
     "{epoch}.99999", "{epoch}.99999999999999999", "00000000.1", "First", "first.0"],
)  # fmt: skip
@with_server()
async def test_a_cursor_that_is_of_no_use_means_resync_from_the_oldest_event(
    server: VirtualServer, cursor: str
) -> None:
    await server.chat(1, 2)
    page = await feed(server, cursor.format(epoch=server.store.epoch), limit=1)
    assert page["resync"]
    assert [event["seq"] for event in page["events"]] == [1]
    assert page["more"]
    rest = await feed(server, page["cursor"])
    assert [event["seq"] for event in rest["events"]] == [2]
    assert not rest["resync"]


@with_server()
async def test_the_feed_of_an_empty_database_is_empty(server: VirtualServer) -> None:
    for cursor in (None, "first", f"{server.store.epoch}.0"):
        page = await feed(server, cursor)
        assert (page["events"], page["more"], page["resync"]) == ([], False, False)
    assert (await feed(server, "nonsense"))["resync"]


@pytest.mark.parametrize("path", [FEED, UNREAD])
@pytest.mark.parametrize("limit", ["0", "501", "-1", "x", "", "1.5", "9" * 30])
@with_server()
async def test_a_limit_is_from_1_to_500(
    server: VirtualServer, path: str, limit: str
) -> None:
    token = server.token(9, scope="service")
    answer = await server.ask("GET", f"{path}?limit={limit}", token=token)
    assert (answer.status, answer.code) == (400, "bad_field")
    assert answer.json["error"]["message"].startswith("limit: ")
    for good in (1, 500):
        assert (
            await server.ask("GET", f"{path}?limit={good}", token=token)
        ).status == 200


@pytest.mark.parametrize("tail_events", [16_384, 2])
@with_server(page_bytes=30_000)
async def test_a_page_of_the_feed_is_bounded_in_bytes(
    server: VirtualServer, tail_events: int
) -> None:
    object.__setattr__(server.app.settings, "tail_events", tail_events)
    await server.post(await server.chat(1, 2), *[BIG] * 12)
    page = await feed(server, "first", limit=500)
    assert page["more"]
    taken = sum(len(chatd.encode(event)) for event in page["events"])
    assert 30_000 - 5_000 < taken < 30_000 + 5_000
    assert [event["seq"] for event in await whole_feed(server)] == [*range(1, 15)]


@with_server(tail_events=0)
async def test_the_feed_never_passes_what_is_published(server: VirtualServer) -> None:
    chat = await server.chat(1, 2)
    start = (await feed(server))["cursor"]
    # Committed, and not yet published.
    send = chatd.Job(
        server.store.send_message, (chatd.Send(chat, 1, "early"),), lambda _: None
    )
    batch = server.store._transact([send])
    page = await feed(server, start)
    assert (page["events"], page["cursor"], page["more"]) == ([], start, False)
    server.app.hub.publish(batch)
    page = await feed(server, start)
    assert [event["message"]["content"] for event in page["events"]] == ["early"]


@with_server()
async def test_a_poll_of_the_feed_at_the_head_reads_no_disk(
    server: VirtualServer,
) -> None:
    chat = await server.chat(1, 2)
    start = (await feed(server))["cursor"]
    await server.post(chat, "hi")
    server.disk.hold(reads=True)  # a read would never end
    page = await feed(server, start)
    assert len(page["events"]) == 1
    assert (await feed(server, page["cursor"]))["events"] == []
    server.disk.go()


@with_server(resync_events=5, tail_events=0)
async def test_however_much_a_backend_missed_it_gets_all_of_it(
    server: VirtualServer,
) -> None:
    chat = await server.chat(1, 2)
    start = (await feed(server))["cursor"]
    await server.post(chat, *map(str, range(20)))
    polled = await server.ask("GET", f"/api/v1/events?cursor={start}", user=1)
    assert polled.json["resync"]
    page = await feed(server, start)
    assert not page["resync"]
    assert [e["message"]["content"] for e in page["events"]] == [*map(str, range(20))]


# --- the unread list -----------------------------------------------------------------


@with_server()
async def test_the_unread_list_has_members_with_old_unread_messages(
    server: VirtualServer,
) -> None:
    chat, other = await server.chat(1, 2, 3), await server.chat(1, 2)
    old, new = await server.post(chat, "old", "new")
    await server.post(other, "young")
    made_older(server, old)
    await server.ask("GET", "/api/v1/me", token=server.token(2, name="Bob"))
    await server.join(3)
    got = await unread(server)
    since = got["unread"][0]["since"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", since)
    message = server.store._writer.execute(
        "SELECT created_at FROM message WHERE id = ?", (old,)
    ).fetchone()
    assert since == chatd.timestamp(message[0])
    assert got == {
        "more": False,
        "unread": [
            {"user_id": 2, "name": "Bob", "chat_id": chat, "unread": 2, "since": since,
             "online": False, "position": f"{chat}-2"},
            {"user_id": 3, "name": None, "chat_id": chat, "unread": 2, "since": since,
             "online": True, "position": f"{chat}-3"},
        ],
    }  # fmt: skip
    # The oldest one that is unread counts.
    target = f"/api/v1/messages/{old}/read"
    assert (await server.ask("POST", target, user=2)).status == 200
    assert await who_is_unread(server) == [(chat, 3, 2)]
    made_older(server, new)
    assert await who_is_unread(server) == [(chat, 2, 1), (chat, 3, 2)]


@with_server()
async def test_older_than_is_in_seconds(server: VirtualServer) -> None:
    chat = await server.chat(1, 2)
    made_older(server, *await server.post(chat, "hi"), by=OLD)
    assert await who_is_unread(server) == [(chat, 2, 1)]
    assert await who_is_unread(server, older_than=OLD - 1) == [(chat, 2, 1)]
    assert await who_is_unread(server, older_than=OLD + 5) == []
    for wrong in ("0", "-1", "x", "", "1e3"):
        token = server.token(9, scope="service")
        answer = await server.ask("GET", f"{UNREAD}?older_than={wrong}", token=token)
        assert (answer.status, answer.code) == (400, "bad_field")


@with_server()
async def test_own_messages_and_those_before_joining_are_not_unread(
    server: VirtualServer,
) -> None:
    chat = await server.chat(1, 2)
    made_older(server, *await server.post(chat, "hi", "there"))
    await server.command("POST", f"/api/v1/chats/{chat}/members", {"user_id": 3})
    assert await who_is_unread(server) == [(chat, 2, 2)]
    # A message of a service in the user's name reads nothing.
    made_older(server, *await server.post(chat, "automatic", sender=2))
    assert await who_is_unread(server) == [(chat, 1, 1), (chat, 2, 3), (chat, 3, 1)]
    # A message of the user does.
    path = f"/api/v1/chats/{chat}/messages"
    answer = await server.ask("POST", path, {"content": "here I am"}, user=2)
    made_older(server, answer.json["message"]["id"])
    assert await who_is_unread(server) == [(chat, 1, 2), (chat, 3, 2)]


@with_server()
async def test_a_member_who_left_is_not_in_the_unread_list(
    server: VirtualServer,
) -> None:
    chat = await server.chat(1, 2, 3)
    made_older(server, *await server.post(chat, "hi"))
    await server.command("DELETE", f"/api/v1/chats/{chat}/members/2")
    await server.command("POST", "/api/v1/internal/chat/revoke", {"user_id": 3})
    assert await who_is_unread(server) == [(chat, 3, 1)]  # still a member
    await forget(server, 3)
    assert await who_is_unread(server) == []


@with_server()
async def test_the_pages_of_the_unread_list_have_each_member_once(
    server: VirtualServer,
) -> None:
    chats = [await server.chat(*range(10, 10 + count)) for count in (2, 12, 3)]
    for chat in chats:
        made_older(server, *await server.post(chat, "hi", sender=10))
    expected = await who_is_unread(server, limit=500)
    assert len(expected) == 1 + 11 + 2
    for limit in (1, 3, 13, 14):
        rows: list[Any] = []
        after: dict[str, str] = {}
        more = True
        while more:
            got = await unread(server, limit=limit, **after)
            rows += got["unread"]
            more, after = got["more"], {"after": got["unread"][-1]["position"]}
            assert len(got["unread"]) == limit or not more
        assert [(r["chat_id"], r["user_id"], r["unread"]) for r in rows] == expected
    assert await unread(server, after="9007199254740991-1") == {
        "unread": [],
        "more": False,
    }


@pytest.mark.parametrize(
    "after",
    ["1", "-", "1-", "-1", "1-2-3", "a-b", "1-2 ", "9" * 17 + "-1", "1-0x2", "٣-٤"],
)
@with_server()
async def test_a_wrong_position_is_a_bad_field(
    server: VirtualServer, after: str
) -> None:
    token = server.token(9, scope="service")
    answer = await server.ask("GET", f"{UNREAD}?after={quote(after)}", token=token)
    assert (answer.status, answer.code) == (400, "bad_field")
    assert answer.json["error"]["message"].startswith("after: ")


@with_server()
async def test_a_message_counts_as_unread_when_it_is_published(
    server: VirtualServer,
) -> None:
    chat = await server.chat(1, 2)
    send = chatd.Job(
        server.store.send_message, (chatd.Send(chat, 1, "early"),), lambda _: None
    )
    batch = server.store._transact([send])
    made_older(server, batch.events[0].seq)
    assert await who_is_unread(server) == []
    server.app.hub.publish(batch)
    assert await who_is_unread(server) == [(chat, 2, 1)]


def test_the_unread_list_walks_along_a_key_and_sorts_nothing(memory: Memory) -> None:
    plan = memory.store._writer.execute(
        f"EXPLAIN QUERY PLAN {chatd.UNREAD}", (0, "0-0", 500, 0, b"[]")
    ).fetchall()
    steps = " ".join(row[3] for row in plan)
    assert "SEARCH b USING PRIMARY KEY (chat_id>?)" in steps
    assert "TEMP B-TREE" not in steps
    assert not re.search(r"SCAN [bcmu]\b", steps)


# --- forgetting a user ---------------------------------------------------------------


async def answers_about(server: VirtualServer, chat: int, user: int) -> str:
    """All that the member of a chat, and the backend, can read now."""
    asked = [
        "/api/v1/users", "/api/v1/chats", f"/api/v1/chats/{chat}/messages?limit=100",
        f"/api/v1/events?cursor={server.store.epoch}.0&limit=500",
    ]  # fmt: skip
    texts = [(await server.ask("GET", path, user=user)).body.decode() for path in asked]
    texts.append(json.dumps(await whole_feed(server)))
    texts.append(json.dumps(await unread(server, older_than=1)))
    peer = await server.join(user, cursor=f"{server.store.epoch}.0")
    while True:
        with trio.move_on_after(1) as scope:
            texts.append(str(await peer.ws.get_message()))
        if scope.cancelled_caught:
            break
    await peer.leave()
    return "\n".join(texts)


@with_server()
async def test_a_forgotten_user_is_in_no_answer_but_as_a_number(
    server: VirtualServer,
) -> None:
    await server.ask("GET", "/api/v1/me", token=server.token(2, name="Quentin"))
    chat = await server.chat(1, 2, 3)
    for number in range(15):
        body = {"content": f"secret {number}", "client_id": f"private-{number}"}
        path = f"/api/v1/chats/{chat}/messages"
        assert (await server.ask("POST", path, body, user=2)).status == 201
    await server.post(chat, "hello Q.", sender=1)
    await server.command("POST", f"/api/v1/chats/{chat}/members", {"user_id": 4})
    before = await answers_about(server, chat, 1)
    assert all(word in before for word in ("Quentin", "secret", "private"))
    await forget(server, 2)
    after = await answers_about(server, chat, 1)
    assert not re.search("Quentin|secret|private", after)
    assert "hello Q." in after
    db = server.store._writer
    assert chatd.query_value(db, chatd.NAME, 2) is None
    assert chatd.faults(db) == []


@with_server()
async def test_forgetting_revokes_removes_deletes_in_this_order(
    server: VirtualServer,
) -> None:
    chats = [await server.chat(1, 2) for _ in range(45)]  # several steps
    ids = [(await server.post(chat, "hi", sender=2))[0] for chat in chats]
    two, one = await server.join(2), await server.join(1)
    start = (await feed(server))["cursor"]
    await forget(server, 2)
    received, code = await two.end()
    assert code == 4503
    assert received == []
    events = (await feed(server, start, limit=500))["events"]
    kinds = [event["type"] for event in events]
    assert kinds == ["member_removed"] * 45 + ["message_deleted"] * 45
    assert [event["chat_id"] for event in events[:45]] == chats
    for event, message_id in zip(events[45:], ids, strict=True):
        message = event["message"]
        assert (message["id"], message["content"]) == (message_id, "")
        assert message["deleted"]
        assert message["rev"] == event["seq"]
        assert "client_id" not in message
        assert (event["to_chat"], event["to_user"]) == (True, None)
    for event in events:
        del event["to_chat"], event["to_user"]
        assert await one.receive(event["type"]) == event
    old = server.token(2, iat=chatd.now_seconds() - 10)
    assert (await server.ask("GET", "/api/v1/me", token=old)).code == "token_invalid"


@with_server()
async def test_the_messages_of_an_emptied_chat_are_deleted_too(
    server: VirtualServer,
) -> None:
    alone, both = await server.chat(7), await server.chat(7, 8)
    for chat in (alone, both):
        await server.post(chat, "private", sender=7)
    await server.post(both, "private, too", sender=8)
    await forget(server, 7)
    await forget(server, 8)  # the chat of the two has no member any more
    rows = server.store._writer.execute("SELECT deleted FROM change").fetchall()
    assert rows == [(1,)] * 3
    assert chatd.faults(server.store._writer) == []


@with_server()
async def test_forgetting_again_changes_nothing_more(server: VirtualServer) -> None:
    chat = await server.chat(1, 2)
    await server.post(chat, "hi", sender=2)
    await forget(server, 2)
    head = server.app.hub.head
    await forget(server, 2)
    await forget(server, 77)  # unknown
    assert server.app.hub.head == head
    # What a service sends in the user's name later is deleted by the next time.
    await server.post(chat, "ghost", sender=2)
    await forget(server, 2)
    texts = server.store._writer.execute("SELECT content, deleted FROM change")
    assert texts.fetchall() == [("", 1), ("", 1)]


@pytest.mark.parametrize("user_id", [0, -1, "6", None, 2**53, 1.5])
@with_server()
async def test_forgetting_a_bad_user_id_is_a_bad_field(
    server: VirtualServer, user_id: Any
) -> None:
    token = server.token(9, scope="service")
    answer = await server.ask("POST", FORGET, {"user_id": user_id}, token=token)
    assert (answer.status, answer.code) == (400, "bad_field")
    answer = await server.ask("POST", FORGET, {}, token=token)
    assert (answer.status, answer.code) == (400, "bad_field")


class SlowStore(chatd.Store):
    """A store of which each write takes 3 s, while others make 200 events."""

    grow: Callable[[], None]

    async def commit(self, *args: Any, **more: Any) -> Any:
        await trio.sleep(3)
        self.grow()
        return await super().commit(*args, **more)


@with_server(store=SlowStore)
async def test_a_request_to_forget_works_for_10_s_and_the_next_one_goes_on(
    server: VirtualServer,
) -> None:
    db, walks = server.store._writer, list[int]()
    db.executescript(
        """INSERT INTO user (id) VALUES (1), (2);
        INSERT INTO user_name (user_id, name) VALUES (2, 'Q');
        INSERT INTO chat (id, created_at) VALUES (1, 1), (2, 1);
        INSERT INTO member VALUES (1, 2, 1, 0), (1, 1, 2, 0)"""
    )
    event = "INSERT INTO event VALUES (?, 'chat_renamed', 1, 1, NULL, NULL, NULL, ?)"
    body = '{"title":null,"user_id":null}'

    def grow(count: int = 200) -> None:
        first = server.store.seq + 1
        rows = ((seq, body) for seq in range(first, first + count))
        db.executemany(event, rows)
        server.store.seq = server.app.hub.head = first + count - 1

    grow(2_500)
    assert isinstance(server.store, SlowStore)
    server.store.grow = grow
    raw = server.dial()
    raw.soon, token = 20, server.token(9, scope="service")
    more = True
    while more:
        with taking(6, 16.1):
            answer = await raw.ask("POST", FORGET, {"user_id": 2}, token=token)
        assert answer.status == 200
        more = answer.json["more"]
        walks.append(server.app.walked[2])
    # 3 s to revoke, then 10 s: three steps. The first one ended the membership. Each
    # request ends where the event log ended at its start.
    assert walks[0] == 2_000
    assert len(walks) <= 5
    assert walks[-1] < server.store.seq
    assert chatd.query_value(db, chatd.NAME, 2) is None
    assert db.execute("SELECT user_id FROM member").fetchall() == [(1,)]


@with_server()
async def test_forgetting_cuts_the_tail_only_behind_the_last_event_with_a_name(
    server: VirtualServer,
) -> None:
    hub = server.app.hub
    named = await server.chat(1, 2)
    await server.ask("GET", "/api/v1/me", token=server.token(2, name="Quentin"))
    await server.command("POST", f"/api/v1/chats/{named}/members", {"user_id": 3})
    last, kept = hub.head, await server.post(named, *"abc", sender=1)
    await forget(server, 2)
    assert [entry.seq for entry in hub.tail] == [*range(last + 1, hub.head + 1)]
    assert hub.tail[0].seq == kept[0]
    assert hub.tail_size == sum(entry.size for entry in hub.tail)
    events = (await feed(server, "first", limit=500))["events"]
    assert "Quentin" not in json.dumps(events)


@with_server()
async def test_a_name_chosen_in_the_second_of_being_forgotten_is_gone_too(
    server: VirtualServer,
) -> None:
    answer = await server.ask("PATCH", "/api/v1/me", {"name": "Quentin"}, user=2)
    assert (answer.status, answer.json["name"]) == (200, "Quentin")
    await forget(server, 2)
    assert await server.store.read(chatd.query_value, chatd.NAME, 2) is None


@with_server()
async def test_a_user_who_comes_back_after_being_forgotten_has_a_name_again(
    server: VirtualServer,
) -> None:
    now = chatd.now_seconds()
    old = server.token(2, name="Quentin", iat=now - 60)
    assert (await server.ask("GET", "/api/v1/me", token=old)).json["name"] == "Quentin"
    await forget(server, 2)
    rename, name = server.app.chats.rename, (chatd.query_value, chatd.NAME)
    # A request that was on its way with an old token is too late.
    await server.store.commit(rename, 2, "Quentin", now - 60)
    assert await server.store.read(*name, 2) is None
    new = server.app.keyring.sign(2, 60, name="Quentin")
    assert (await server.ask("GET", "/api/v1/me", token=new)).json["name"] == "Quentin"


@with_server()
async def test_a_direct_chat_of_a_forgotten_user_stays_direct_and_may_be_left(
    server: VirtualServer,
) -> None:
    chat, group = await server.chat(1, 2), await server.chat(1, 2)
    db = server.store._writer
    db.execute("UPDATE chat SET direct_key = '1:2', title = NULL WHERE id = ?", (chat,))
    await forget(server, 2)
    sql = "SELECT direct_key FROM chat ORDER BY id"
    assert db.execute(sql).fetchall() == [(str(chat),), (None,)]
    chats = (await server.ask("GET", "/api/v1/chats", user=1)).json["chats"]
    (shown,) = [shown for shown in chats if shown["id"] == chat]
    assert shown["direct"]
    for left in (chat, group):
        target = f"/api/v1/chats/{left}/members/1"
        assert (await server.ask("DELETE", target, user=1)).status == 204
    await forget(server, 1)
    assert chatd.faults(db) == []


def test_a_forgotten_creators_keys_are_gone(memory: Memory) -> None:
    db = memory.store._writer
    chat, other = memory.chat(1, 2), memory.chat(1, 2)
    db.execute("UPDATE chat SET created_by = id, client_id = 'key ' || id")
    memory.do(memory.chats.forget, 1, 0)
    rows = db.execute(
        "SELECT id, created_by, client_id FROM chat ORDER BY id"
    ).fetchall()
    assert rows == [(chat, 1, None), (other, 2, f"key {other}")]


def test_what_is_sent_between_two_requests_to_forget_is_gone_after_the_second(
    memory: Memory,
) -> None:
    def walk(after: int) -> int:
        upto = memory.store.seq
        while after < upto:
            after = memory.do(memory.chats.forget, 1, after)
        return after

    chat, others = memory.chat(1, 2), memory.chat(2, 3)
    for number in range(40):
        memory.send(chat, 1, f"early {number}")
    kept = memory.send(chat, 2, "kept").message.id
    after = walk(0)
    memory.do(memory.chats.add_member, others, 1, 2)
    memory.send(others, 1, "as a member again")
    memory.do(memory.store.send_message, chatd.Send(chat, 1, "by a service"), True)
    walk(after)
    for where, users in ((chat, 41), (others, 0)):
        history = (memory.chats.history, 2, where, None, 100, memory.hub.head)
        messages, *_ = memory.read(*history)
        left = [one.id for one in messages if not one.deleted]
        assert left == [kept][: bool(users)]
        assert len(messages) == (users + 1 if users else 1)


def test_messages_that_were_deleted_before_lose_their_client_id(memory: Memory) -> None:
    db = memory.store._writer
    chat = memory.chat(1, 2)
    gone = memory.send(chat, 1, "gone", "key-1").message.id
    kept = memory.send(chat, 2, "kept", "key-2").message.id
    memory.delete(1, gone)
    assert memory.do(memory.chats.forget, 1, 0) == 0  # first it leaves its chats
    memory.do(memory.chats.forget, 1, 0)
    rows = db.execute("SELECT content, client_id FROM message").fetchall()
    assert rows == [("\0" * 4, "\0" * 5), ("kept", "key-2")]
    messages, *_ = memory.read(memory.chats.history, 2, chat, None, 9, memory.hub.head)
    assert [(m.id, m.client_id) for m in messages] == [(gone, None), (kept, "key-2")]


NEEDLES = (b"Quentin", b"utter-secret", b"private-key")


def in_files(db: Path) -> list[bytes]:
    """The needles that are in some byte of the database or its WAL."""
    data = b"".join(
        Path(f"{db}{suffix}").read_bytes()
        for suffix in ("", "-wal")
        if Path(f"{db}{suffix}").exists()
    )
    return [needle for needle in NEEDLES if needle in data]


async def test_after_kills_in_the_middle_a_user_is_forgotten_whole(
    server: ServerProcess,
) -> None:
    async with server.serving():
        me = server.token(2, name="Quentin")
        await server.want(200, "GET /api/v1/me", me)
        chats = [await server.chat(1, 2) for _ in range(60)]
        peer = await server.peer(2)
        for first in range(0, 1500, 50):
            for number in range(first, first + 50):
                await peer.send_command(
                    "send_message",
                    chat_id=chats[number % len(chats)],
                    content=f"utter-secret {number} " * 20,
                    client_id=f"private-key-{number}",
                )
            for _ in range(50):
                await peer.find("ack")
        for chat in chats:
            await server.post(chat, 1, "hello")
        assert in_files(server.db) == [*NEEDLES]
        kills, more = 0, True
        while more:
            try:
                async with trio.open_nursery() as nursery:
                    if kills < 6:
                        nursery.start_soon(killed_soon, server, 0.004 * (kills + 1))
                    body = {"user_id": 2}
                    got = await server.want(200, f"POST {FORGET}", server.service, body)
                    more = got["more"]
                    nursery.cancel_scope.cancel()
            except* (OSError, trio.BrokenResourceError):
                pass
            if server.process is None:
                kills += 1
                await server.begin()
        assert kills > 0
        events: list[Frame] = []
        cursor, more = "first", True
        while more:
            page = await server.want(
                200, f"GET {FEED}?limit=500&cursor={quote(cursor)}", server.service
            )
            events += page["events"]
            cursor, more = page["cursor"], page["more"]
        deleted = [e["message"]["id"] for e in events if e["type"] == "message_deleted"]
        assert len(deleted) == len(set(deleted)) == 1500
        removed = [e["chat_id"] for e in events if e["type"] == "member_removed"]
        assert sorted(removed) == chats
        text = json.dumps(events) + json.dumps(await server.history(chats[0], 1))
        assert not re.search("Quentin|secret|private", text)
    # The stop has folded the WAL into the file.
    assert in_files(server.db) == []
    checked = await run_chatd("check", "--db", server.db)
    assert checked.status == 0, checked


async def killed_soon(server: ServerProcess, seconds: float) -> None:
    await trio.sleep(seconds)
    await server.kill()


# --- a site of fifty lines -----------------------------------------------------------


class Site:
    """A site that knows of the chat only what the feed and the unread list say.

    Its "database" is a JSON text: what it commits is there after a crash, and its
    cursor with it, so each event counts exactly once.
    """

    def __init__(self) -> None:
        self.saved = json.dumps({"cursor": "first", "chats": {}, "seen": []})
        self.resyncs = 0

    def take(self, page: Any) -> None:
        """Apply a page and save it with its cursor: one transaction."""
        state = json.loads(self.saved)
        if page["resync"]:
            self.resyncs += 1
            state |= {"chats": {}, "seen": []}
        for event in page["events"]:
            state["seen"].append(event["seq"])
            chat = state["chats"].setdefault(
                str(event["chat_id"]), {"n": 0, "read": {}}
            )
            read = chat["read"]
            match event["type"]:
                case "chat_added":
                    read.setdefault(str(event["to_user"]), chat["n"])
                case "member_removed":
                    read.pop(str(event["user_id"]), None)
                case "message_read":
                    reader = str(event["read_by"])
                    read[reader] = max(read.get(reader, 0), event["n"])
                case "new_message":
                    message = event["message"]
                    chat["n"], sender = message["n"], str(message["sender_id"])
                    chat["last"] = message["content"]
                    if sender in read and event.get("read", True):
                        read[sender] = message["n"]
        state["cursor"] = page["cursor"]
        self.saved = json.dumps(state)

    async def poll(self, server: ServerProcess, *, crash: bool = False) -> None:
        """Read the feed to its end; or crash before a page is saved."""
        more = True
        while more:
            cursor = quote(json.loads(self.saved)["cursor"])
            target = f"GET {FEED}?limit=7&cursor={cursor}"
            page = await server.want(200, target, server.service)
            if crash:
                return
            self.take(page)
            more = page["more"]

    def table(self, user: int) -> dict[int, tuple[int, str | None]]:
        """The user's chats: how many are unread, and the last message."""
        return {
            int(chat_id): (chat["n"] - chat["read"][str(user)], chat.get("last"))
            for chat_id, chat in json.loads(self.saved)["chats"].items()
            if str(user) in chat["read"]
        }


async def truth(server: ServerProcess, user: int) -> dict[int, tuple[int, str | None]]:
    got = await server.want(200, "GET /api/v1/chats", server.token(user))
    return {
        chat["id"]: (
            chat["unread"],
            chat["last_message"] and chat["last_message"]["content"],
        )
        for chat in got["chats"]
    }


async def test_a_site_of_fifty_lines_keeps_a_true_table_across_crashes_and_a_restore(
    server: ServerProcess, tmp_path: Path
) -> None:
    site, users = Site(), (1, 2, 3)

    async def agrees() -> None:
        await site.poll(server)
        for user in users:
            assert site.table(user) == await truth(server, user)
        seen = json.loads(site.saved)["seen"]
        assert seen == [*range(1, len(seen) + 1)]  # every event once, in order

    async def something_happens(round_: int) -> None:
        chat = await server.chat(1, 2)
        ids = [(await server.post(chat, 1, f"{round_} {n}"))["id"] for n in range(5)]
        await server.want(200, f"POST /api/v1/messages/{ids[2]}/read", server.token(2))
        path = f"/api/v1/chats/{chat}/members"
        await server.want(201, f"POST {path}", server.service, {"user_id": 3})
        await server.post(chat, 2, "automatic")
        path = f"/api/v1/chats/{chat}/messages"
        await server.want(201, f"POST {path}", server.token(3), {"content": "mine"})
        if round_ % 2:
            await server.want(
                204, f"DELETE /api/v1/chats/{chat}/members/1", server.service
            )

    async with server.serving():
        await something_happens(0)
        await agrees()
        await server.want(200, f"GET {UNREAD}?older_than=1", server.service)
        backup = await run_chatd("backup", "--db", server.db, tmp_path / "copy.db")
        assert backup.status == 0, backup
        for round_ in range(1, 4):
            await something_happens(round_)
            await site.poll(server, crash=True)  # the site's process
            await server.kill()
            await server.begin()
            await agrees()
        assert site.resyncs == 0
        await server.stop()
        restored = await run_chatd("restore", "--db", server.db, tmp_path / "copy.db")
        assert restored.status == 0, restored
        await server.begin()
        await agrees()
        assert site.resyncs == 1
        await something_happens(4)
        await agrees()
        assert site.resyncs == 1


# --- property: whatever happens, whatever is read when -------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_feed_is_the_event_log_whatever_happens_between_its_pages(
    data: st.DataObject,
) -> None:
    tail = data.draw(st.integers(0, 6))
    with memory_with(tail_events=tail, page_bytes=3000) as memory:
        hub, store = memory.hub, memory.store
        chats = [memory.chat(1, 2, 3), memory.chat(1, 2)]
        cursor, seen = 0, list[int]()
        for _ in range(data.draw(st.integers(1, 12))):
            match data.draw(st.sampled_from(["send", "leave", "forget", "read"])):
                case "send":
                    memory.send(chats[0], 1, "x" * data.draw(st.integers(1, 900)))
                case "leave" if memory.read(
                    chatd.query_value, chatd.IS_MEMBER, chats[0], 3
                ):
                    memory.do(memory.chats.remove_member, chats[0], 3, None)
                case "forget":
                    memory.do(memory.chats.forget, 2, 0)
                    hub.set_tail(reversed(hub.tail))
                case _:
                    limit, upto = data.draw(st.integers(1, 5)), hub.head
                    if hub.in_tail(cursor):
                        page = chatd.page_of(
                            hub.since(cursor), memory.settings, upto, limit
                        )
                    else:
                        query = store.events_after
                        page = memory.read(query, None, cursor, upto, limit)
                    assert page.cursor > cursor or cursor == upto
                    seen += [entry.seq for entry in page.events]
                    cursor = page.cursor
        rest = memory.read(store.events_after, None, cursor, hub.head, 10_000)
        assert seen == [*range(1, len(seen) + 1)]
        assert cursor == len(seen)
        assert [entry.seq for entry in rest.events][:1] in ([], [cursor + 1])
