"""Search: what a text is folded to, the walk back over ids, and the route."""

from __future__ import annotations

import json
import shutil
import unicodedata
import urllib.parse
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

import chatd
from chatd import Message, Rate
from tests.client import HttpAnswer
from tests.harness import Memory, VirtualServer, memory_with, refusal_of, with_server

DATA = Path(__file__).parent / "data"


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path, search_seconds=60.0)


def step(
    memory: Memory, user: int, query: str, chat: int | None = None, before: Any = None
) -> tuple[list[Message], int | None]:
    """Take one step of a search."""
    words = json.dumps([chatd.fold(word) for word in query.split()])
    texts: list[Message] = []
    where = (texts, user, chat, words, before, memory.hub.head)
    stopped = memory.read(memory.chats.search, *where)
    return texts, stopped


def found(memory: Memory, user: int, query: str, chat: int | None = None) -> list[str]:
    """Search to the beginning, and return the texts."""
    texts: list[str] = []
    before: int | None = None
    while True:
        messages, stopped = step(memory, user, query, chat, before)
        texts += [message.content for message in messages]
        if stopped is None:
            return texts
        assert before is None or stopped < before
        before = stopped


# --- folding -------------------------------------------------------------------------

# text, and queries that find it
FINDS = {
    "English": ("The quick Brown fox", ["QUICK", "brown fox", "ick", "fox the"]),
    "Russian": (
        "Привет, Ёжик и Йод", ["привет", "ПРИВЕТ", "ёжик", "ежик", "йод", "иод"],
    ),
    "German": (
        "Größe der Straße: ÄÖÜ äöü",
        ["grösse", "größe", "GRÖSSE", "groß", "strasse", "STRASSE", "aou", "äöü", "ẞ"],
    ),
    "Turkish": (
        "İstanbul'da Ilık ışık, Diyarbakır",
        ["istanbul", "ISTANBUL", "İSTANBUL", "ilik", "ılık", "ışık", "isik",
         "diyarbakir"],
    ),
    "Turkish in plain letters": ("Istanbul isik", ["İstanbul", "ışık", "ıstanbul"]),
    "Japanese": (
        "今日はガギを食べました", ["今日", "ガギ", "ｶﾞｷﾞ", "食べ", "カ\u3099", "ました"],
    ),
    "Japanese with spaces": ("東京　と 大阪", ["東京", "大阪　東京", "東京　と"]),
    "Arabic without harakat": ("مرحبا كتاب", ["مَرْحَبًا", "كِتَاب", "مرحبا"]),
    "Arabic with harakat": ("مَرْحَبًا بِالعَالَم", ["مرحبا", "بالعالم"]),
    "Hebrew with niqqud": ("שָׁלוֹם עוֹלָם", ["שלום", "עולם", "שָׁלוֹם"]),
    "Greek": ("Ὀδυσσεύς", ["οδυσσευς", "ΟΔΥΣΣΕΥΣ", "οδυσσευσ"]),
    "Korean": ("한국어", ["한국", "한국", "국어"]),
    "emoji": ("ok 👍🏽 ❤️ 👨‍👩‍👧", ["👍", "👍🏽", "❤", "❤️", "👩", "👨‍👩‍👧"]),
    "ligatures and width": ("ﬁnally Ｈｅｌｌｏ Ⅳ ½", ["finally", "hello", "iv", "ﬁ"]),
    "combining marks": (
        "Cafe\u0301 na\u00efve z\u0351\u0343algo", ["café", "naive", "zalgo"],
    ),
    "SQL": ("100%_ok 'a\" -- \\", ["%", "_", "'a\"", "--", "\\", "100%_ok"]),
}  # fmt: skip
# text, and a query that does not find it
MISSES = {
    "another letter": ("が", "か"),
    "another letter of half width": ("ﾊﾟ", "は"),
    "the plain letter, asked with its mark": ("かき", "が"),
    "a part of a syllable": ("한국어", "하"),
    "a wildcard": ("hundred", "h%d"),
    "one character for another": ("cat", "c_t"),
    "one word of two": ("red bicycle", "red car"),
    "a word over two words": ("red bicycle", "redb"),
    "an emoji of another sex": ("👩", "👨"),
}


@pytest.mark.parametrize("case", FINDS)
def test_a_word_is_found_whatever_its_case_accents_and_width(
    case: str, memory: Memory
) -> None:
    text, queries = FINDS[case]
    chat = memory.chat(1, 2)
    for content in ("before", text, "after"):
        memory.send(chat, 1, content)
    for query in queries:
        assert found(memory, 2, query) == [text], query
        assert found(memory, 2, query, chat) == [text], query


@pytest.mark.parametrize("case", MISSES)
def test_another_word_is_not_found(case: str, memory: Memory) -> None:
    text, query = MISSES[case]
    chat = memory.chat(1, 2)
    memory.send(chat, 1, text)
    assert found(memory, 1, query) == found(memory, 1, query, chat) == []
    assert found(memory, 1, text.split()[0]) == [text]


def test_folding_twice_is_folding_once() -> None:
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            folded = chatd.fold(chr(code))
            assert chatd.fold(folded) == folded, hex(code)
            left = {c for c in folded if unicodedata.category(c) == "Mn"}
            assert len(folded) == 1 or left <= {"\u3099", "\u309a"}, hex(code)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30))
@settings(max_examples=300, deadline=None)
def test_a_text_has_each_of_its_words(text: str) -> None:
    for word in text.split():
        assert chatd.fold(word).strip() in chatd.fold(text)


def test_only_a_text_that_folds_to_another_one_is_stored_twice(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    for text in ("plain text", "Größe", "日本", "ALL CAPS"):
        memory.send(chat, 1, text)
    rows = memory.store._writer.execute("SELECT folded FROM message ORDER BY id")
    assert [folded for (folded,) in rows] == [None, "grosse", None, "all caps"]


def test_the_upgrade_folds_the_messages_of_1_0(tmp_path: Path) -> None:
    for suffix in ("", "-wal"):
        shutil.copy(DATA / f"v1.sqlite{suffix}", tmp_path / f"chatd.db{suffix}")
    memory = Memory(tmp_path)
    rows = memory.store._writer.execute("SELECT content, folded FROM message")
    stored = dict(rows.fetchall())
    assert len(stored) > 1
    for content, folded in stored.items():
        expected = chatd.fold(content)
        assert folded == (None if expected == content else expected)
    assert any(stored.values())


# --- the walk ------------------------------------------------------------------------


def test_every_word_must_occur_in_any_order(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    memory.send(chat, 1, " ".join(words))
    memory.send(chat, 1, " ".join(words[:7]))
    assert found(memory, 1, " ".join(reversed(words))) == [" ".join(words)]


def test_only_the_chats_that_one_is_in_are_searched(memory: Memory) -> None:
    mine, theirs = memory.chat(1, 2), memory.chat(2, 3)
    memory.send(mine, 2, "apple mine")
    memory.send(theirs, 3, "apple theirs")
    assert found(memory, 1, "apple") == ["apple mine"]
    assert found(memory, 2, "apple") == ["apple theirs", "apple mine"]
    assert found(memory, 2, "apple", theirs) == ["apple theirs"]
    assert found(memory, 9, "apple") == []
    for user, chat in ((1, theirs), (9, mine), (1, 99)):
        refusal = refusal_of(
            memory.read, memory.chats.search, [], user, chat, "[]", 1, 9
        )
        assert (refusal.code, refusal.status) == ("not_found", 404)
    memory.do(memory.chats.remove_member, mine, 1, 1)
    assert found(memory, 1, "apple") == []
    memory.do(memory.chats.add_member, mine, 1, 2)
    assert found(memory, 1, "apple") == ["apple mine"]


def test_a_search_shows_nothing_above_the_head(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    memory.send(chat, 1, "apple 1")
    batch = memory.commit(memory.sends(chat, 1, "apple 2"))
    assert found(memory, 2, "apple") == found(memory, 2, "apple", chat) == ["apple 1"]
    memory.hub.publish(batch)
    assert found(memory, 2, "apple", chat) == ["apple 2", "apple 1"]


def test_before_is_any_id(memory: Memory) -> None:
    chat, other = memory.chat(1, 2), memory.chat(1, 3)
    ids = [memory.send(c, 1, "apple").message.id for c in (chat, other, chat, other)]
    for before in (1, *ids, memory.hub.head + 1, chatd.MAX_ID, None):
        most = before or chatd.MAX_ID
        messages, _ = step(memory, 1, "apple", None, before)
        assert [m.id for m in messages] == [i for i in ids[::-1] if i < most]
        messages, _ = step(memory, 1, "apple", chat, before)
        assert [m.id for m in messages] == [i for i in ids[2::-2] if i < most]


def test_a_page_has_at_most_50_messages(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    ids = [memory.send(chat, 1, "apple").message.id for _ in range(120)]
    for where in (None, chat):
        first, stopped = step(memory, 1, "apple", where)
        assert [m.id for m in first] == ids[:69:-1]
        assert stopped == ids[70]
        second, stopped = step(memory, 1, "apple", where, stopped)
        third, end = step(memory, 1, "apple", where, stopped)
        assert [m.id for m in second + third] == ids[69::-1]
        assert end is None


@pytest.mark.parametrize("in_chat", [False, True])
def test_a_search_stops_when_its_time_is_up_and_goes_on_where_it_stopped(
    tmp_path: Path, *, in_chat: bool
) -> None:
    memory = Memory(tmp_path, search_seconds=-1.0)
    chat = memory.chat(1, 2)
    memory.send(chat, 1, "apple first")
    works = [memory.sends(chat, 1, f"pear {number}") for number in range(9_000)]
    for start in range(0, len(works), 1000):
        memory.hub.publish(memory.commit(*works[start : start + 1000]))
    where = chat if in_chat else None
    # One row in 512 comes out: that none of 9,000 does has a chance of 1 in 10^7.
    messages, stopped = step(memory, 1, "apple", where)
    assert messages == []
    assert stopped is not None
    assert stopped > 1
    assert found(memory, 1, "apple", where) == ["apple first"]


SENDS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2)), max_size=30)


@given(SENDS, SENDS, st.sampled_from([-1.0, 60.0]), st.sampled_from([None, 1]))
@settings(max_examples=60, deadline=None)
def test_pages_give_each_message_once_whatever_is_sent_meanwhile(
    old: list[tuple[str, int]],
    new: list[tuple[str, int]],
    seconds: float,
    where: int | None,
) -> None:
    with memory_with(search_seconds=seconds) as memory:
        chats = [memory.chat(1, 2), memory.chat(1, 3), memory.chat(2, 3)]
        senders = [1, 3, 2]
        expected: list[int] = []
        for text, chat in old:
            sent = memory.send(chats[chat], senders[chat], text.upper()).message
            if text == "a" and chat < 2 and where in (None, sent.chat_id):
                expected.insert(0, sent.id)
        messages, before = step(memory, 1, "a", where)
        ids = [message.id for message in messages]
        while before is not None:
            if new:
                text, chat = new.pop()
                memory.send(chats[chat], senders[chat], text)
            messages, stopped = step(memory, 1, "a", where, before)
            assert stopped is None or stopped < before
            ids += [message.id for message in messages]
            before = stopped
        assert ids == expected


def test_a_search_looks_at_the_clock_more_often_in_long_texts(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    for _ in range(400):
        memory.send(chat, 1, "a" * 4000)
    for which in (None, chat):
        bounds = 1, which, json.dumps(["a" * 199 + "b"]), None, memory.hub.head
        rows = memory.read(lambda db, *to: db.execute(chatd.SEARCH, to).fetchall(),
                           *bounds)  # fmt: skip
        assert len(rows) > 10  # one in 512 is 50 ms apart


def test_a_search_looks_at_the_clock_among_events_that_are_no_messages(
    memory: Memory,
) -> None:
    chat, first = memory.chat(1, 2), memory.store.seq + 1
    event = "INSERT INTO event VALUES (?, 'chat_renamed', ?, 1, NULL, NULL, NULL, NULL)"
    rows = [(seq, chat) for seq in range(first, first + 20_000)]
    memory.store._writer.executemany(event, rows)
    bounds = 1, chat, json.dumps(["page"]), None, rows[-1][0]
    found = memory.read(lambda db, *to: db.execute(chatd.SEARCH, to).fetchall(),
                        *bounds)  # fmt: skip
    assert 5 < len(found) < 200  # about one in 512
    assert not any(row[-1] for row in found)


def test_long_texts_are_searched_to_their_end(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    text = "Ж" * 3000 + "page" + "ж" * 990 + "end"
    memory.send(chat, 1, text)
    for query in ("page", "end", "ж" * 200, "жpageж"):
        assert found(memory, 1, query, chat) == [text]


# --- the route -----------------------------------------------------------------------


def target(query: str | None = "apple", **more: object) -> str:
    fields = {**({} if query is None else {"q": query}), **more}
    return f"/api/v1/search?{urllib.parse.urlencode(fields)}"


@with_server()
async def test_a_search_answers_messages_and_where_it_stopped(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    ids = await server.post(chat, "Apple", "pear", "apples", sender=6)
    answer = await server.ask("GET", target(), user=7)
    assert answer.status == 200
    assert [m["id"] for m in answer.json["messages"]] == [ids[2], ids[0]]
    assert answer.json["messages"][1]["content"] == "Apple"
    assert answer.json["before"] is None
    older = await server.ask("GET", target(chat_id=chat, before=ids[2]), user=7)
    assert [m["id"] for m in older.json["messages"]] == [ids[0]]
    assert (await server.ask("GET", target(chat_id=chat), user=9)).status == 404
    assert (await server.ask("GET", target(chat_id=chat + 1), user=7)).status == 404
    assert (await server.ask("GET", target(), user=9)).json == {
        "messages": [], "before": None,
    }  # fmt: skip
    assert (await server.ask("GET", target())).status == 401
    assert (await server.stats())["searches"] == 3


BAD_QUERIES = {
    "none": None, "empty": "", "spaces": " \u3000 ", "a mark": "a \u0301",
    "an accent": "´",
    "harakat": "\u064e\u0652", "a variation selector": "\ufe0f", "NUL": "a\0b",
    "a control character": "a\x1bb", "nine words": "a b c d e f g h i",
    "201 characters": "x" * 201,
}  # fmt: skip
GOOD_QUERIES = {
    "eight words": "a b c d e f g h", "200 characters": "x" * 200, "one": "x",
    "200 characters of words": ("ab " * 7 + "x" * 200)[:200], "a line end": "a\nb",
    "spaces around": "  a  ", "a dakuten": "\u3099", "an emoji": "❤️",
    "spaces of many kinds": " a\u2003b\u3000c ",
}  # fmt: skip


@with_server(requests=Rate(0, 0))
async def test_a_query_has_1_to_8_words_in_1_to_200_characters(
    server: VirtualServer,
) -> None:
    for case, query in BAD_QUERIES.items():
        answer = await server.ask("GET", target(query), user=7)
        assert (answer.status, answer.code) == (400, "bad_field"), case
        assert answer.json["error"]["message"].startswith("q: "), case
    for case, query in GOOD_QUERIES.items():
        assert (await server.ask("GET", target(query), user=7)).status == 200, case
    for more in ({"chat_id": 0}, {"before": "x"}, {"before": 2**53}, {"chat_id": ""}):
        answer = await server.ask("GET", target(**more), user=7)
        assert answer.code == "bad_field", more
    two = await server.ask("GET", "/api/v1/search?q=a&q=b", user=7)
    assert two.code == "bad_field"
    assert (await server.ask("POST", target(), {}, user=7)).status == 405


@with_server(requests=Rate(1, 6))
async def test_a_search_costs_five_requests(server: VirtualServer) -> None:
    assert (await server.ask("GET", target(), user=7)).status == 200
    assert (await server.ask("GET", "/api/v1/me", user=7)).status == 200
    refused = await server.ask("GET", "/api/v1/me", user=7)
    assert (refused.status, refused.code) == (429, "rate_limited")
    # A service with the number of a user costs that user nothing.
    service = server.token(8, scope="service")
    for _ in range(3):
        assert (await server.ask("GET", target(), token=service)).status == 200
    assert (await server.ask("GET", "/api/v1/me", user=8)).status == 200


@with_server(requests=Rate(0, 0))
async def test_one_search_runs_at_a_time_and_64_wait(server: VirtualServer) -> None:
    chat = await server.chat(6, 7)
    await server.post(chat, "apple", sender=6)
    statuses: list[int] = []

    async def search() -> None:
        statuses.append((await server.ask("GET", target(), user=7)).status)

    async with trio.open_nursery() as nursery:
        server.disk.hold(reads=True)
        for _ in range(65):
            nursery.start_soon(search)
        await wait_all_tasks_blocked()
        assert server.app.searching.statistics().tasks_waiting == 64
        full = await server.ask("GET", target(), user=7)
        assert (full.status, full.code) == (503, "overloaded")
        assert full.json["error"]["retry_after"] > 0
        server.disk.go()
    assert statuses == [200] * 65
    assert (await server.ask("GET", target(), user=7)).status == 200


@with_server(requests=Rate(0, 0))
async def test_a_search_that_waits_while_its_user_is_revoked_shows_nothing(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)

    async def search() -> None:
        answer = await server.ask("GET", target(), user=7)
        assert (answer.status, answer.code) == (401, "token_invalid")

    async with trio.open_nursery() as nursery, server.app.searching:
        nursery.start_soon(search)
        await wait_all_tasks_blocked()
        revoke = "/api/v1/internal/chat/revoke"
        await server.command("POST", revoke, {"user_id": 7})
        await server.post(chat, "apple from after it", sender=6)


def change(kind: type[chatd.MessageChange], message: Message, **fields: Any) -> Any:
    """Return a write that records a change of a message."""

    def write(db: chatd.Db, events: chatd.Entries, store: chatd.Store) -> None:
        seq = store.next_seq(events)
        new = msgspec.structs.replace(message, rev=seq, **fields)
        event = kind(seq, message.chat_id, new)
        store.record(db, events, chatd.Entry(event, to_chat=True))

    return write


@with_server()
async def test_a_search_that_waits_for_the_disk_still_looks_through_something(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    (message,) = await server.post(chat, "apple", sender=6)
    server.disk.hold(reads=True)
    answers: list[HttpAnswer] = []

    async def ask() -> None:
        answers.append(await server.ask("GET", target(), user=7))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(0.5)  # ten times as long as a search may take
        assert not answers
        server.disk.go()
    (answer,) = answers
    assert [found["id"] for found in answer.json["messages"]] == [message]
    # On a busy machine the time may end behind that message: then the search goes on.
    if answer.json["before"] is not None:
        assert answer.json["before"] == message
        answer = await server.ask("GET", target(before=message), user=7)
        assert answer.json["messages"] == []
    assert answer.json["before"] is None


@with_server()
async def test_a_change_while_a_search_runs_is_shown(server: VirtualServer) -> None:
    chat = await server.chat(6, 7)
    await server.post(chat, "apple one", "apple two", "apple three", sender=6)
    before = (await server.ask("GET", target(), user=7)).json["messages"]
    three, two, one = (msgspec.convert(m, Message) for m in before)
    store, app = server.app.store, server.app
    read, late = app.read, []

    async def slow_read(query: Any, *args: Any) -> Any:
        result = await read(query, *args)
        edit = change(chatd.MessageEdited, two, content="a pear")
        deletion = change(chatd.MessageDeleted, three, content="", deleted=True)
        await store.commit(edit, store)
        await store.commit(deletion, store)
        late.append(app.hub.head)
        return result

    app.read = slow_read
    answer = await server.ask("GET", target(), user=7)
    assert late
    shown = [(m["content"], m.get("deleted")) for m in answer.json["messages"]]
    assert shown == [("", True), ("a pear", None), ("apple one", None)]
    assert answer.json["messages"][2] == before[2]
    assert one.content == "apple one"
