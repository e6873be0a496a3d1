"""The store: what a transaction writes, what readers see, how it fails and opens."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import math
import os
import random
import re
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing
from msgspec.structs import replace
from trio.testing import wait_all_tasks_blocked

import chatd
from chatd import NewChat, Refusal, Send, Settings, Store, UsageError
from tests.client import ServerProcess, wait_until
from tests.harness import (
    Memory,
    MemoryWork,
    VirtualServer,
    memory_frames,
    memory_is_sound,
    memory_job,
    memory_store,
    memory_with,
    refusal_of,
    taking,
    usage_error_of,
    with_server,
    words_hear,
)

# --- writing: the works --------------------------------------------------------------


def test_the_id_of_a_message_is_the_seq_of_its_event(memory: Memory) -> None:
    chat = memory.chat(5, 6)
    sent = memory.send(chat, 5, "Привет!", "k1")
    assert not sent.duplicate
    (event,) = memory.page(6, 2).events
    assert memory_frames(event.frame) == [
        {
            "type": "new_message", "seq": 3, "chat_id": chat,
            "message": {
                "id": 3, "chat_id": chat, "sender_id": 5, "content": "Привет!",
                "created_at": sent.message.created_at, "n": 1, "client_id": "k1",
            },
        }
    ]  # fmt: skip


def test_message_numbers_and_seqs_have_no_gaps(memory: Memory) -> None:
    chats = [memory.chat(1, 2), memory.chat(2, 3)]
    ordinals = [memory.send(chats[i % 2], 2).message.n for i in range(6)]
    refusal_of(memory.send, chats[0], 3)
    assert ordinals == [1, 1, 2, 2, 3, 3]
    assert memory.send(chats[0], 1).message.n == 4  # 11; user 1 has read it: 12
    assert memory.seqs(2) == [2, 3, *range(5, 13)]


@pytest.mark.parametrize("key", ["", "k"])
def test_a_chat_of_others_and_an_unknown_chat_are_refused_alike(
    memory: Memory, key: str
) -> None:
    chat = memory.chat(1, 2)
    refusals = [str(refusal_of(memory.send, to, 3, "hi", key)) for to in (chat, 99)]
    assert refusals == ["not_found: chat_id: there is no such chat for you"] * 2


def test_a_service_may_send_for_a_user_outside_the_chat(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    sent = memory.do(*memory.sends(chat, 9, "from the shop", service=True))
    assert sent.message.sender_id == 9
    refusal = refusal_of(memory.do, *memory.sends(99, 9, service=True))
    assert refusal.code == "not_found"
    assert memory.seqs(9) == []
    assert [user["user_id"] for user in memory.users()] == [1, 2, 9]


def test_a_repeated_send_gets_the_same_message_and_makes_no_event(
    memory: Memory,
) -> None:
    chat = memory.chat(1, 2)
    first, second = (memory.send(chat, 1, "hi", "k") for _ in range(2))
    assert (first.duplicate, second.duplicate) == (False, True)
    assert first.message == second.message
    assert (memory.hub.head, memory.count("message")) == (3, 1)


def test_repeats_in_one_batch_are_one_message(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    batch = memory.commit(*[memory.sends(chat, 1, "hi", "k")] * 3)
    assert [outcome.duplicate for _, outcome in batch.outcomes] == [False, True, True]
    assert [event.seq for event in batch.events] == [3]


def test_a_repeat_with_another_text_or_chat_is_refused(memory: Memory) -> None:
    chats = [memory.chat(1, 2), memory.chat(1, 2)]
    memory.send(chats[0], 1, "hi", "k")
    for chat, text in ((chats[0], "ho"), (chats[1], "hi"), (99, "hi")):
        refusal = refusal_of(memory.send, chat, 1, text, "k")
        assert (refusal.code, refusal.status) == ("idempotency_mismatch", 409)
        assert "client_id" in refusal.message
    # Another sender may use the same client_id.
    assert not memory.send(chats[0], 2, "ho", "k").duplicate


def test_without_a_client_id_the_same_text_twice_is_two_messages(
    memory: Memory,
) -> None:
    chat = memory.chat(1, 2)
    assert [memory.send(chat, 1).message.n for _ in range(2)] == [1, 2]


def test_a_repeat_is_recognised_before_membership_is_checked(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    memory.send(chat, 1, "hi", "k")
    memory.do(memory.chats.remove_member, chat, 1, 1)
    assert memory.send(chat, 1, "hi", "k").duplicate
    assert refusal_of(memory.send, chat, 1, "hi", "k2").code == "not_found"


def test_a_reader_finds_a_repeat_too(memory: Memory) -> None:
    chat, find = memory.chat(1, 2), memory.store.find_sent
    sent = memory.send(chat, 1, "hi", "k").message
    again = Send(chat, 1, "hi", "k")
    assert memory.read(find, again) == chatd.Sent(sent, duplicate=True)
    for other in (
        Send(chat, 1, "hi", "l"),
        Send(chat, 2, "hi", "k"),
        Send(chat, 1, "hi"),
    ):
        assert memory.read(find, other) is None
    refusal = refusal_of(memory.read, find, again._replace(content="ho"))
    assert refusal.code == "idempotency_mismatch"


def test_a_read_mark_moves_up_and_never_down(memory: Memory) -> None:
    chat, mark = memory.chat(1, 2), memory.store.mark_read
    ids = [memory.send(chat, 1).message.id for _ in range(3)]
    assert memory.do(mark, 2, ids[1]) == (ids[1], chat, 2, 6)
    assert memory.do(mark, 2, ids[0]) == (ids[0], chat, 1, 0)
    assert memory.do(mark, 2, ids[1]) == (ids[1], chat, 2, 0)
    assert memory.do(mark, 2, ids[2]) == (ids[2], chat, 3, 7)
    assert memory_frames(memory.page(1, 5).events[0].frame) == [
        {"type": "message_read", "seq": 6, "message_id": ids[1], "chat_id": chat,
         "read_by": 2, "n": 2}
    ]  # fmt: skip


# Each step of a chat of users 1 and 2: what happens, then the read_n of user 1, and the
# event about user 1: "" for none, "unread" for a message with "read": false, or the n
# of a message_read. Messages have n = 1, 2, 3 in the order of the steps.
MARKS: dict[str, list[tuple[str, int, str]]] = {
    "the first message of a chat": [("1 sends", 1, "")],
    "one's own messages in a row": [("1 sends", 1, ""), ("1 sends", 2, "")],
    "a message over unread ones": [
        ("2 sends", 0, ""), ("2 sends", 0, ""), ("1 sends", 3, "3"), ("1 sends", 4, ""),
    ],
    "a message after a mark": [
        ("2 sends", 0, ""), ("1 marks 1", 1, "1"), ("1 sends", 2, ""),
    ],
    "a service in one's name, with nothing unread": [
        ("service sends", 1, ""), ("service sends", 2, ""), ("1 sends", 3, ""),
    ],
    "a service in one's name, over unread messages": [
        ("2 sends", 0, ""), ("service sends", 0, "unread"),
        ("service sends", 0, "unread"), ("2 sends", 0, ""),
    ],
    "a mark before what a service has sent": [
        ("2 sends", 0, ""), ("2 sends", 0, ""), ("service sends", 0, "unread"),
        ("service sends", 0, "unread"), ("2 sends", 0, ""),
        ("1 marks 1", 1, "1"), ("1 marks 2", 4, "4"), ("service sends", 4, "unread"),
        ("1 marks 5", 6, "6"), ("service sends", 7, ""),
    ],
    "a mark on what a service has sent": [
        ("2 sends", 0, ""), ("service sends", 0, "unread"),
        ("service sends", 0, "unread"), ("1 marks 2", 3, "3"),
    ],
    "a mark of an older message": [
        ("2 sends", 0, ""), ("2 sends", 0, ""), ("1 marks 2", 2, "2"),
        ("1 marks 1", 2, ""), ("1 marks 2", 2, ""),
    ],
    "a message over unread ones of a service": [
        ("2 sends", 0, ""), ("service sends", 0, "unread"), ("1 sends", 3, "3"),
    ],
    "a repeat moves nothing": [
        ("1 sends k", 1, ""), ("2 sends", 1, ""), ("1 sends k", 1, ""),
        ("service sends k", 1, ""),
    ],
    "a repeat of what a service has sent moves nothing": [
        ("2 sends", 0, ""), ("service sends k", 0, "unread"), ("1 sends k", 0, ""),
    ],
    "a message after leaving and coming back": [
        ("2 sends", 0, ""), ("service sends", 0, "unread"), ("1 comes back", 2, ""),
        ("1 sends", 3, ""),
    ],
}  # fmt: skip


@pytest.mark.parametrize("large_chat", [50, 1])
@pytest.mark.parametrize("story", MARKS)
def test_only_its_user_makes_messages_read_and_every_event_says_so(
    story: str, large_chat: int
) -> None:
    with memory_with(large_chat=large_chat) as memory:
        chat, store, ids = memory.chat(1, 2), memory.store, list[int]()
        for step, read_n, news in MARKS[story]:
            who, what, *more = step.split()
            sender = 2 if who == "2" else 1
            before = memory.hub.head
            match what:
                case "sends":
                    key, service = "".join(more), who == "service"
                    work = memory.sends(chat, sender, "hi", key, service=service)
                    sent = memory.do(*work)
                    ids += [] if sent.duplicate else [sent.message.id]
                case "marks":
                    memory.do(store.mark_read, 1, ids[int(more[0]) - 1])
                case _:
                    memory.do(memory.chats.remove_member, chat, 1, 1)
                    memory.do(memory.chats.add_member, chat, 1, None)
            (mine,) = memory.my_chats(1)
            assert (mine.read_n, mine.unread) == (read_n, mine.last_n - read_n), step
            told = []
            for entry in memory.page(1, before).events:
                (event,) = memory_frames(entry.frame)
                if event["type"] == "message_read":
                    # In a large chat only the reader is told. id and n agree.
                    to_user = event["read_by"] if large_chat == 1 else None
                    assert entry.to_user == to_user
                    assert event["message_id"] == ids[event["n"] - 1]
                    told += [str(event["n"])] if event["read_by"] == 1 else []
                elif not event.get("read", True):
                    assert event["message"]["sender_id"] == 1
                    told.append("unread")
                assert "read" not in event.get("message", {})
            assert told == ([news] if news else []), step
        memory_is_sound(memory)


def test_a_service_that_sends_for_a_user_outside_the_chat_moves_no_mark(
    memory: Memory,
) -> None:
    chat = memory.chat(1, 2)
    memory.send(chat, 1)
    memory.do(*memory.sends(chat, 9, service=True))
    assert memory_frames(memory.page(1, 3).events[0].frame)[0].keys() == {
        "type", "seq", "chat_id", "message",
    }  # fmt: skip
    assert memory.count("member") == 2


def test_the_event_log_keeps_whether_the_sender_has_read(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    chat, sql = memory.chat(1, 2), "SELECT body FROM event WHERE seq = ?"
    memory.send(chat, 2)
    memory.do(*memory.sends(chat, 1, service=True))
    bodies = [chatd.query_value(memory.store._writer, sql, seq) for seq in (3, 4)]
    assert bodies == [None, '{"read":false}']
    frames = [entry.frame for entry in memory.hub.tail]
    assert memory_frames(frames[-1])[0]["read"] is False
    assert [entry.frame for entry in memory.page(2, 2).events] == frames[-2:]
    again = memory.again()
    assert [entry.frame for entry in again.hub.tail] == frames[-2:]
    again.store.close()


def test_a_mark_that_does_not_move_costs_the_same_however_much_follows(
    memory: Memory,
) -> None:
    chat, store, steps = memory.chat(1, 2), memory.store, list[int]()
    first = memory.send(chat, 2).message.id
    for _ in range(2):
        for _ in range(100):
            memory.send(chat, 1)
        steps.append(0)

        def step() -> None:
            steps[-1] += 1

        store._writer.set_progress_handler(step, 1)
        assert memory.do(store.mark_read, 1, first).seq == 0
        store._writer.set_progress_handler(None, 1)
    assert steps[0] == steps[1] > 0


def test_a_message_of_another_chat_cannot_be_marked_as_read(memory: Memory) -> None:
    other = memory.send(memory.chat(1, 2), 1).message.id
    refusals = {
        str(refusal_of(memory.do, memory.store.mark_read, 3, message))
        for message in (other, 99, 2**53 - 1)
    }
    assert refusals == {"not_found: message_id: there is no such message for you"}


def test_in_a_large_chat_a_read_mark_goes_only_to_the_reader() -> None:
    with memory_with(large_chat=2) as memory:
        small, large = memory.chat(1, 2), memory.chat(1, 2, 3)
        seats = [memory.sit(user) for user in (1, 2, 2)]
        for chat in (small, large):
            sent = memory.send(chat, 1)
            memory.do(memory.store.mark_read, 2, sent.message.id)
        assert [made.seqs() for made in seats] == [[6, 7, 8], *[[6, 7, 8, 9]] * 2]
        assert [memory.seqs(user, 5) for user in (1, 2, 3)] == [
            [6, 7, 8],
            [6, 7, 8, 9],
            [8],
        ]
        assert [chat.unread for chat in memory.my_chats(2)] == [0, 0]


def test_a_new_chat_is_one_event_per_member_with_the_whole_chat(memory: Memory) -> None:
    memory.do(memory.chats.rename, 2, "Bob")
    chat, is_new = memory.do(memory.chats.create_chat, NewChat([2, 1, 2], "Sofa"))
    assert is_new
    (event,) = memory.page(2).events
    assert memory.seqs(1) == [1]
    assert memory_frames(event.frame) == [
        {
            "type": "chat_added", "seq": 2, "chat_id": chat,
            "chat": {
                "id": chat, "title": "Sofa", "last_n": 0, "last_message": None,
                "direct": False, "created_by": None, "member_count": 2,
                "members": [
                    {"user_id": 1, "name": None, "read_n": 0},
                    {"user_id": 2, "name": "Bob", "read_n": 0},
                ],
            },
        }
    ]  # fmt: skip


def test_an_addition_is_an_event_for_the_members_and_one_for_the_new_member(
    memory: Memory,
) -> None:
    chat, add = memory.chat(1, 2), memory.chats.add_member
    memory.do(memory.chats.rename, 3, "Carol")
    memory.send(chat, 1)
    seats = [memory.sit(user) for user in (1, 3)]
    assert memory.do(add, chat, 3, 1) is True
    assert seats[0].received() == [
        {
            "type": "member_added",
            "seq": 4,
            "chat_id": chat,
            "user_id": 3,
            "name": "Carol",
        }
    ]
    (added,) = seats[1].received()
    assert (added["type"], added["seq"], added["chat"]["last_n"]) == (
        "chat_added",
        5,
        1,
    )
    assert [(m["user_id"], m["read_n"]) for m in added["chat"]["members"]] == [
        (1, 1), (2, 0), (3, 1),
    ]  # fmt: skip


def test_adding_a_member_again_changes_nothing(memory: Memory) -> None:
    chat, add = memory.chat(1, 2), memory.chats.add_member
    assert memory.do(add, chat, 2, 1) is False
    assert memory.do(add, chat, 1, None) is False
    assert memory.hub.head == 2


def test_only_a_member_or_a_service_may_add_and_remove(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    for work in (memory.chats.add_member, memory.chats.remove_member):
        refusals = {str(refusal_of(memory.do, work, *args)) for args in (
            (chat, 9, 3), (99, 9, 1), (99, 9, None))}  # fmt: skip
        assert refusals == {"not_found: chat_id: there is no such chat for you"}
    refusal = refusal_of(memory.do, memory.chats.remove_member, chat, 9, None)
    assert str(refusal) == "not_found: user_id: not a member of this chat"


def test_a_removal_is_the_last_event_that_the_removed_user_gets(memory: Memory) -> None:
    chat = memory.chat(1, 2, 3)
    seats = {user: memory.sit(user) for user in (1, 2, 3)}
    memory.do(memory.chats.remove_member, chat, 3, 3)
    memory.send(chat, 1)
    assert seats[3].received() == [
        {"type": "member_removed", "seq": 4, "chat_id": chat, "user_id": 3}
    ]
    assert seats[1].seqs() == seats[2].seqs() == [4, 5]
    assert refusal_of(memory.send, chat, 3).code == "not_found"


def test_the_number_of_members_of_a_chat_is_limited() -> None:
    with memory_with(members=3) as memory:
        refusal = refusal_of(memory.chat, 1, 2, 3, 4)
        assert str(refusal) == "bad_field: members: 4 of them; at most 3"
        chat = memory.chat(1, 2, 3)
        refusal = refusal_of(memory.do, memory.chats.add_member, chat, 4, 1)
        assert refusal.code == "bad_field"
        assert memory.do(memory.chats.add_member, chat, 3, 1) is False


def create(memory: Memory, *users: int, **how: Any) -> tuple[int, bool]:
    """Create a chat, without a title unless `title` is given."""
    return cast("tuple[int, bool]", memory.do(*creation(memory, *users, **how)))


def creation(
    memory: Memory,
    *users: int,
    title: str | None = None,
    by: int | None = None,
    key: str | None = None,
    direct: bool = False,
) -> MemoryWork:
    """Return the job that creates a chat, for `do` or `commit`."""
    new = NewChat([*users], title, direct, key)
    return (memory.chats.create_chat, new, by)


def test_a_pair_has_one_direct_chat_whoever_creates_it(memory: Memory) -> None:
    group = memory.chat(3, 7)
    chat, is_new = create(memory, 7, 3, by=7, direct=True)
    assert (is_new, chat != group, memory.hub.head) == (True, True, 4)
    for users, by in (((3, 7), 3), ((7, 3), 7), ((3, 7), None)):
        assert create(memory, *users, by=by, direct=True) == (chat, False)
    assert memory.hub.head == 4
    other, is_new = create(memory, 3, 8, by=3, direct=True)
    assert (is_new, other != chat) == (True, True)
    assert [(c.id, c.direct) for c in memory.my_chats(3)] == [
        (other, True), (chat, True), (group, False),
    ]  # fmt: skip
    assert chatd.faults(memory.store._writer) == []


def test_a_creator_s_key_names_one_chat_and_nothing_else_is_compared(
    memory: Memory,
) -> None:
    chat, _ = create(memory, 1, 2, by=1, key="k", title="Sofa")
    assert create(memory, 1, 2, by=1, key="k", title="Sofa") == (chat, False)
    assert create(memory, 1, *range(9, 30), by=1, key="k") == (chat, False)
    assert memory.hub.head == 2
    others = [
        create(memory, 1, 2, by=2, key="k"),  # another user's key
        create(memory, 1, 2, by=None, key="k"),  # the services'
        create(memory, 1, 2, by=1, key="K"),
        create(memory, 1, 2, by=1),
        create(memory, 1, 2, by=1),
    ]
    assert len({made for made, _ in others} | {chat}) == 6
    assert all(is_new for _, is_new in others)
    assert create(memory, 5, by=None, key="k") == (others[1][0], False)
    assert [c.created_by for c in memory.my_chats(1)] == [1, 1, 1, None, 2, 1]
    assert chatd.faults(memory.store._writer) == []


def test_a_pair_is_looked_up_before_the_key(memory: Memory) -> None:
    group, _ = create(memory, 1, 3, by=1, key="g")
    assert create(memory, 1, 2, by=1, key="g", direct=True) == (group, False)
    direct, _ = create(memory, 1, 2, by=1, key="d", direct=True)
    assert create(memory, 1, 2, by=1, key="other", direct=True) == (direct, False)
    assert create(memory, 1, 2, by=1, key="g", direct=True) == (direct, False)
    assert create(memory, 1, 3, by=1, key="d") == (direct, False)
    again, is_new = create(memory, 1, 3, by=1, key="other")
    assert (again != direct, is_new) == (True, True)


def test_equal_creations_of_one_batch_make_one_chat(memory: Memory) -> None:
    for how in ({"by": 1, "direct": True}, {"by": 1, "key": "k"}, {"key": "k"}):
        before = memory.hub.head
        works = [creation(memory, 1, 2, **how) for _ in range(3)]
        batch = memory.commit(*works)
        memory.hub.publish(batch)
        first, *others = [outcome for _, outcome in batch.outcomes]
        assert others == [(first[0], False)] * 2
        assert (first[1], memory.hub.head) == (True, before + 2)


def test_a_refused_creation_leaves_its_key_and_its_pair_unused() -> None:
    with memory_with(members=1) as memory:
        for how in ({"by": 1, "direct": True}, {"by": 1, "key": "k"}):
            refusal = refusal_of(memory.do, *creation(memory, 1, 2, **how))
            assert refusal.code == "bad_field"
        assert create(memory, 1, by=1, key="k")[1]


def test_the_two_of_a_direct_chat_stay_and_it_has_no_title(memory: Memory) -> None:
    chat, _ = create(memory, 1, 2, by=1, direct=True)
    chats = memory.chats
    before = memory.hub.head
    for by in (1, 2, None):
        for work, *what in (
            (chats.add_member, chat, 3),
            (chats.add_member, chat, 2),
            (chats.remove_member, chat, 1),
            (chats.remove_member, chat, 2),
            (chats.remove_member, chat, 3),
            (chats.set_title, chat, "Sofa"),
            (chats.set_title, chat, None),
        ):
            assert refusal_of(memory.do, work, *what, by).code == "direct"
    for work, *what in ((chats.add_member, chat, 3), (chats.set_title, chat, "x")):
        assert refusal_of(memory.do, work, *what, 3).code == "not_found"
    assert memory.hub.head == before


def test_in_a_direct_chat_with_a_forgotten_user_the_other_may_leave(
    memory: Memory,
) -> None:
    chat, _ = create(memory, 1, 2, by=1, direct=True)
    db = memory.store._writer
    db.execute("UPDATE chat SET direct_key = id")  # as forgetting user 1 does
    db.execute("DELETE FROM member WHERE user_id = 1")
    assert chatd.faults(db) == []
    for work, what in ((memory.chats.add_member, 3), (memory.chats.set_title, "x")):
        assert refusal_of(memory.do, work, chat, what, 2).code == "direct"
    assert memory.my_chats(2)[0].direct
    again, is_new = create(memory, 1, 2, by=2, direct=True)
    assert (again != chat, is_new) == (True, True)
    memory.do(memory.chats.remove_member, chat, 2, 2)
    assert [c.id for c in memory.my_chats(2)] == [again]


def test_a_creator_removes_members_while_it_is_one_itself(memory: Memory) -> None:
    chat, _ = create(memory, 1, 2, 3, 4, by=1)
    remove = memory.chats.remove_member
    for user in (1, 3):
        assert refusal_of(memory.do, remove, chat, user, 2).code == "forbidden"
    assert refusal_of(memory.do, remove, chat, 9, 1).code == "not_found"
    memory.do(remove, chat, 3, 1)
    memory.do(remove, chat, 1, 1)
    assert refusal_of(memory.do, remove, chat, 2, 1).code == "not_found"
    memory.do(memory.chats.add_member, chat, 1, 2)  # the creator is back
    memory.do(remove, chat, 2, 1)
    of_service = memory.chat(1, 2)
    assert refusal_of(memory.do, remove, of_service, 2, 1).code == "forbidden"


def test_a_new_title_is_one_event_and_the_same_title_none(memory: Memory) -> None:
    chat, rename = memory.chat(1, 2), memory.chats.set_title
    seats = [memory.sit(user) for user in (1, 2, 3)]
    titles: tuple[tuple[str | None, int | None, bool], ...] = (
        (None, 1, False), ("Sofa", 1, True), ("Sofa", 2, False), ("sofa", 2, True),
        ("Диван", None, True), (None, 2, True), (None, None, False),
    )  # fmt: skip
    told = []
    for title, by, changes in titles:
        before = memory.hub.head
        memory.do(rename, chat, title, by)
        assert memory.hub.head == before + changes
        assert memory.my_chats(1)[0].title == title
        if changes:
            told.append({
                "type": "chat_renamed", "seq": before + 1, "chat_id": chat,
                "title": title, "user_id": by,
            })  # fmt: skip
    assert [seat.received() for seat in seats] == [told, told, []]
    # The event log has each title that there was; the chat has the last one.
    first, *later = memory.again().page(2).events
    assert [frame for entry in later for frame in memory_frames(entry.frame)] == told
    assert memory_frames(first.frame)[0]["chat"]["title"] is None


def test_only_a_member_or_a_service_renames(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    for chat_id, by in ((chat, 3), (99, 1), (99, None)):
        refusal = refusal_of(memory.do, memory.chats.set_title, chat_id, "x", by)
        assert refusal.code == "not_found"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("INSERT INTO member VALUES (2, 3, 4, 0)", "user 3 is a member"),
        ("UPDATE chat SET direct_key = '1:3' WHERE id = 2", "user 2 is a member"),
        ("UPDATE chat SET direct_key = '1' WHERE id = 2", "its key is 1"),
        ("UPDATE chat SET direct_key = '' WHERE id = 2", "its key is "),
        ("UPDATE chat SET direct_key = ':' WHERE id = 2", "its key is :"),
        ("UPDATE chat SET title = 'Sofa' WHERE id = 2", "it has a title"),
    ],
)
def test_a_direct_chat_of_others_than_its_two_or_with_a_title_is_a_fault(
    change: str, fault: str, memory: Memory
) -> None:
    memory.chat(1, 2, 3)
    create(memory, 1, 2, by=1, direct=True)
    db = memory.store._writer
    assert chatd.faults(db) == []
    db.execute(change)
    found = chatd.faults(db)
    assert f"chat 2: it is direct, but {fault}".strip() in found


def test_the_schema_allows_one_direct_chat_of_a_pair_and_one_chat_of_a_key(
    memory: Memory,
) -> None:
    create(memory, 1, 2, by=1, direct=True)
    create(memory, 1, 2, key="k")
    for sql in (
        "INSERT INTO chat (created_at, direct_key) VALUES (0, '1:2')",
        "INSERT INTO chat (created_at, client_id) VALUES (0, 'k')",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            memory.store._writer.execute(sql)
    memory.store._writer.execute("INSERT INTO chat (created_at) VALUES (0)")


def test_names_and_revocations_are_kept_and_make_no_events(memory: Memory) -> None:
    for user, name in ((1, "Ann"), (2, "Bob"), (1, "Anna"), (1, "Anna")):
        memory.do(memory.chats.rename, user, name)
    memory.do(memory.chats.revoke, 2, 1_700_000_000)
    memory.do(memory.chats.revoke, 3, 1_700_000_001)
    memory.do(memory.chats.revoke, 3, 1_600_000_000)  # anew, also back
    assert memory.again().store.revoked() == {2: 1_700_000_000, 3: 1_600_000_000}
    names = [memory.read(chatd.query_value, chatd.NAME, user) for user in (1, 9)]
    assert names == ["Anna", None]
    assert memory.hub.head == 0


def test_users_are_listed_by_name_up_to_200(memory: Memory) -> None:
    memory.chat(*range(1, 300))
    memory.do(memory.chats.rename, 250, "Zoe")
    memory.do(memory.chats.rename, 251, "Ann")
    users = memory.users()
    assert (len(users), users[2]) == (200, {"user_id": 1, "name": None})
    assert [user["name"] for user in users[:2]] == ["Ann", "Zoe"]
    assert [user["user_id"] for user in users[:2]] == [251, 250]


# --- editing and deleting ------------------------------------------------------------


def test_an_edit_and_a_deletion_are_events_and_change_the_message(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chatd, "now_seconds", lambda: 1_000_000_000)
    chat = memory.chat(1, 2)
    sent = memory.send(chat, 1, "helo", "k").message
    edited = memory.edit(1, sent.id, "hello")
    assert edited == replace(
        sent, content="hello", rev=4, edited_at="2001-09-09T01:46:40Z"
    )
    deleted = memory.delete(1, sent.id)
    assert deleted == replace(edited, content="", rev=5, deleted=True)
    for events in (memory.page(2, 2).events, [*memory.hub.tail][-3:]):
        assert [(e.seq, e.kind, e.to_chat, e.to_user) for e in events] == [
            (3, "new_message", True, None),
            (4, "message_edited", True, None),
            (5, "message_deleted", True, None),
        ]
        assert [e.event for e in events] == [
            chatd.NewMessage(3, chat, deleted),  # each shows the message as it is now
            chatd.MessageEdited(4, chat, deleted),
            chatd.MessageDeleted(5, chat, deleted),
        ]
    history = memory.read(memory.chats.history, 2, chat, None, 9, memory.hub.head)
    assert history == ([deleted], False, False)
    (mine,) = memory.my_chats(2)
    assert (mine.last_message, mine.last_n, mine.unread) == (deleted, 1, 1)
    rows = memory.store._writer.execute(
        """SELECT content, folded FROM message UNION ALL
        SELECT content, folded FROM change"""
    ).fetchall()
    assert rows == [("\0" * 4, None), ("\0" * 5, None), ("", None)]
    memory_is_sound(memory)


def tokens(data: bytes) -> set[int]:
    """Find the numbers that are written as <123>."""
    return {int(number) for number in re.findall(rb"<(\d+)>", data)}


@pytest.mark.parametrize("seed", range(3))
def test_nothing_that_was_deleted_is_in_any_byte_of_the_files(
    memory: Memory, seed: int
) -> None:
    """SQLite moves rows to make room, and copies of them stay in unused parts."""
    draw, chats, count = random.Random(seed), memory.chats, itertools.count()
    users = draw.sample(range(1, 1 << 41), 400)
    chat, known, forgotten = memory.chat(*users[:5]), users[:5], set[int]()
    names: dict[int, set[int]] = {}
    texts: dict[int, tuple[int, set[int]]] = {}  # by message: the sender, what is in it

    def text(most: int) -> tuple[str, set[int]]:
        length = min(most, int(draw.lognormvariate(3.5, 1.2)))
        token = f"<{next(count)}>"
        # In capitals it is stored twice.
        return (token * (length // len(token) + 1) + draw.choice("aA")), tokens(
            token.encode()
        )

    def work() -> tuple[MemoryWork, Callable[[Any], object]]:
        kind, by = draw.random(), draw.choice([*{*known} - forgotten])
        recent = [*texts][-1 - int(draw.expovariate(1 / 60)) :][:1]
        if kind < 0.65 or not recent:
            content, inside = text(20_000 if kind < 0.01 else 2000)
            sender = by if by in users[:5] else next(iter({*users[:5]} - forgotten))
            return memory.sends(chat, sender, content), lambda sent: texts.update(
                {sent.message.id: (sender, inside)}
            )
        if kind < 0.8:
            content, inside = text(2000)
            (message,) = recent
            sender, _ = texts[message]
            return (
                (chats.change_message, None, message, content),
                lambda _: (
                    texts.update({message: (sender, inside)})
                    if message in texts
                    else None
                ),
            )
        if kind < 0.9:
            (message,) = recent
            return (chats.change_message, None, message), lambda _: texts.pop(
                message, None
            )
        if kind < 0.96 and len(known) < len(users):
            known.append(by := users[len(known)])
        name, inside = text(100)
        return (chats.rename, by, name), lambda _: names.update({by: inside})

    def forget(user: int) -> None:
        forgotten.add(user)
        memory.do(chats.revoke, user, 1)
        after, upto = 0, memory.store.seq
        while after < upto:
            after = memory.do(chats.forget, user, after)
        memory.do(chats.rename, user, "", 1)
        names.pop(user, None)
        for message in [id_ for id_, (sender, _) in texts.items() if sender == user]:
            texts.pop(message)

    for turn in range(100):
        works = [work() for _ in range(40)]
        batch = memory.commit(*(job for job, _ in works))
        memory.hub.publish(batch)
        for (_, then), (_, outcome) in zip(works, batch.outcomes, strict=True):
            if not isinstance(outcome, Refusal):
                then(outcome)
        if turn % 5 == 4:
            forget(draw.choice(known[5:]) if turn % 25 else known[turn // 25])
    assert memory.store._truncate()
    kept = set[int]().union(*names.values(), *(inside for _, inside in texts.values()))
    assert len(kept) > 500
    assert next(count) - len(kept) > 500
    assert tokens(memory.files()) == kept
    memory_is_sound(memory)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("UPDATE change SET rev = 9", "change 9 of message 3: it has no event"),
        (
            "UPDATE message SET content = 'old'",
            "message 3: it was changed and still has its old text",
        ),
    ],
)
def test_a_change_without_event_and_a_text_that_is_not_overwritten_are_faults(
    change: str, fault: str, memory: Memory
) -> None:
    chat = memory.chat(1, 2)
    memory.edit(1, memory.send(chat, 1, "old").message.id, "new")
    assert chatd.faults(memory.store._writer) == []
    memory.store._writer.execute(change)
    assert chatd.faults(memory.store._writer) == [fault]


# Who wants to change a message of user 1 in a chat that user 2 has created: the user
# (None: a service), and the codes for an edit and for a deletion.
CHANGERS = {
    "the sender": (1, "", ""),
    "the creator": (2, "forbidden", ""),
    "another member": (3, "forbidden", "forbidden"),
    "a stranger": (4, "not_found", "not_found"),
    "a service": (None, "", ""),
    "a sender who has left": (5, "not_found", "not_found"),
}


@pytest.mark.parametrize("who", CHANGERS)
@pytest.mark.parametrize("deletes", [False, True])
def test_who_may_change_a_message(memory: Memory, who: str, deletes: bool) -> None:
    by, *codes = CHANGERS[who]
    chat = memory.chat(1, 2, 3, 5)
    memory.store._writer.execute("UPDATE chat SET created_by = 2")
    sent = memory.send(chat, 5 if by == 5 else 1, "old")
    memory.do(memory.chats.remove_member, chat, 5, 5)
    head = memory.hub.head
    change = functools.partial(memory.delete, by, sent.message.id)
    if not deletes:
        change = functools.partial(memory.edit, by, sent.message.id, "new")
    if code := codes[deletes]:
        assert refusal_of(change).code == code
        assert memory.hub.head == head
    else:
        assert change().content == ("" if deletes else "new")
        assert memory.hub.head == head + 1


def test_a_creator_deletes_in_its_group_only_and_only_while_it_is_a_member(
    memory: Memory,
) -> None:
    chat, direct = memory.chat(1, 2), memory.chat(1, 2)
    db = memory.store._writer
    db.execute("UPDATE chat SET created_by = 2")
    db.execute("UPDATE chat SET direct_key = '1:2' WHERE id = ?", (direct,))
    ids = [memory.send(where, 1).message.id for where in (chat, direct)]
    assert refusal_of(memory.delete, 2, ids[1]).code == "forbidden"
    memory.do(memory.chats.remove_member, chat, 2, 2)
    assert refusal_of(memory.delete, 2, ids[0]).code == "not_found"
    assert memory.delete(1, ids[1]).deleted


def test_an_unknown_message_and_one_of_others_are_refused_alike(memory: Memory) -> None:
    sent = memory.send(memory.chat(1, 2), 1)
    for change in (memory.delete, functools.partial(memory.edit, text="x")):
        alike = {str(refusal_of(change, 3, n)) for n in (sent.message.id, 1, 99, 2**53)}
        assert alike == {"not_found: message_id: there is no such message for you"}
    assert refusal_of(memory.delete, None, 99).code == "not_found"


# Seconds since it was sent, --edit-seconds, and whether its sender may still change it.
WINDOWS = [
    (0, 100, True), (99, 100, True), (100, 100, False), (10**9, 100, False),
    (-50, 100, True),  # the clock was set back
    (0, 0, False), (-50, 0, False), (10**9, 0, False),
    (0, math.inf, True), (10**9, math.inf, True),
]  # fmt: skip


@pytest.mark.parametrize(("age", "window", "in_time"), WINDOWS)
def test_a_sender_has_edit_seconds_and_nobody_else_has_a_limit(
    age: int, window: float, in_time: bool
) -> None:
    with memory_with(edit_seconds=window) as memory:
        chat = memory.chat(1, 2)
        db = memory.store._writer
        ids = [memory.send(chat, 1).message.id for _ in range(4)]
        ids.append(memory.send(chat, 2).message.id)
        db.execute("UPDATE message SET created_at = created_at - ?", (age,))
        if in_time:
            assert memory.edit(1, ids[0], "new").content == "new"
            assert memory.delete(1, ids[1]).deleted
        else:
            assert refusal_of(memory.edit, 1, ids[0], "new").code == "too_late"
            assert refusal_of(memory.delete, 1, ids[1]).code == "too_late"
        assert memory.edit(None, ids[2], "by the service").rev
        db.execute("UPDATE chat SET created_by = 2")
        assert memory.delete(2, ids[3]).deleted
        assert memory.delete(2, ids[4]).deleted  # its own, as the creator


# The checks in their order: a message of user 1 with the text "now", edited twice, so
# that its rev is 5, and three hours old with --edit-seconds 3600. What is tried: the
# user, the new text (None: a deletion), if_rev; whether it was deleted before; the
# code, or "" for an ack without an event.
CHECKS: list[tuple[int | None, str | None, int | None, bool, str]] = [
    (4, "now", 5, True, "not_found"),
    (3, "now", 5, True, "forbidden"),
    (3, None, None, True, "forbidden"),
    (1, "now", 5, True, "deleted"),
    (1, "new", 4, True, "deleted"),
    (None, "new", None, True, "deleted"),
    (1, None, None, True, ""),
    (None, None, None, True, ""),
    (1, "now", 4, False, ""),
    (1, "now", None, False, ""),
    (None, "now", 3, False, ""),
    (1, "new", 4, False, "changed"),
    (1, "new", 3, False, "changed"),
    (1, "new", 2**53 - 1, False, "changed"),
    (None, "new", 4, False, "changed"),
    (1, "new", 5, False, "too_late"),
    (1, "new", None, False, "too_late"),
    (1, None, None, False, "too_late"),
]


@pytest.mark.parametrize(("by", "text", "if_rev", "deleted", "code"), CHECKS)
def test_the_checks_of_a_change_come_in_their_order(
    by: int | None, text: str | None, if_rev: int | None, deleted: bool, code: str
) -> None:
    with memory_with(edit_seconds=3600) as memory:
        chat = memory.chat(1, 3)
        sent = memory.send(chat, 1, "once").message
        for words in ("then", "now"):
            memory.edit(1, sent.id, words)
        if deleted:
            memory.delete(1, sent.id)
        db, head = memory.store._writer, memory.hub.head
        db.execute("UPDATE message SET created_at = created_at - 10800")
        change = (memory.chats.change_message, by, sent.id, text, if_rev)
        if code:
            assert refusal_of(memory.do, *change).code == code
        else:
            assert memory.do(*change).rev == head
        assert memory.hub.head == head


def test_the_rev_of_a_message_that_was_never_changed_is_its_id(memory: Memory) -> None:
    sent = memory.send(memory.chat(1, 2), 1, "old").message
    assert refusal_of(memory.edit, 1, sent.id, "new", sent.id + 1).code == "changed"
    assert memory.edit(1, sent.id, "old").rev is None
    assert memory.edit(1, sent.id, "new", sent.id).rev == 4
    assert refusal_of(memory.edit, 1, sent.id, "newer", sent.id).code == "changed"
    assert memory.edit(1, sent.id, "newer", 4).rev == 5


def test_an_edit_has_the_rules_of_sending(memory: Memory) -> None:
    sent = memory.send(memory.chat(1, 2), 1).message
    for text in ("", " \n", "a\0b", "\x1b", "x" * 4001):
        assert refusal_of(memory.edit, 1, sent.id, text).code == "bad_field"
        assert refusal_of(memory.edit, None, 99, text).code == "bad_field"
    assert memory.edit(1, sent.id, "x" * 4000).content == "x" * 4000
    assert memory.hub.head == 4


def test_a_repeat_of_a_send_is_not_compared_once_the_message_was_changed(
    memory: Memory,
) -> None:
    chat, other = memory.chat(1, 2), memory.chat(1, 2)
    sent = memory.send(chat, 1, "old", "k").message
    edited = memory.edit(None, sent.id, "new")
    for text, where in (("old", chat), ("new", chat), ("else", other)):
        again = memory.send(where, 1, text, "k")
        assert again == chatd.Sent(edited, duplicate=True)
        assert memory.read(memory.store.find_sent, Send(where, 1, text, "k")) == again
    deleted = memory.delete(1, sent.id)
    assert memory.send(chat, 1, "old", "k") == chatd.Sent(deleted, duplicate=True)
    assert memory.count("message") == 1


def test_changes_in_one_batch_show_its_end_everywhere(memory: Memory) -> None:
    chat, change = memory.chat(1, 2), memory.chats.change_message
    batch = memory.commit(
        memory.sends(chat, 1, "old text"),  # 3
        (change, 1, 3, "middle"),
        (change, 2, 3, "of another"),  # refused
        (change, 1, 3, "middle"),  # no event
        (memory.chats.add_member, chat, 3, 1),  # 5, 6
        (change, 1, 3),
        (change, 1, 3, "late"),  # refused
    )
    outcomes = [getattr(outcome, "code", "") for _, outcome in batch.outcomes]
    assert outcomes == ["", "", "forbidden", "", "", "", "deleted"]
    seats = [memory.sit(1), memory.sit(3)]
    memory.hub.publish(batch)
    assert [made.seqs() for made in seats] == [[3, 4, 5, 7], [6, 7]]
    frames = [data for made in seats for data in made.outbox.taken]
    frames += [entry.frame for entry in memory.hub.tail]
    assert not any(b"old text" in data or b"middle" in data for data in frames)
    shown = [m["message"] for m in seats[0].received() if "message" in m]
    assert all(m["rev"] == 7 and m["deleted"] and m["content"] == "" for m in shown)
    (added,) = [m for m in seats[1].received() if m["type"] == "chat_added"]
    assert added["chat"]["last_message"] == shown[0]
    memory_is_sound(memory)


def test_changes_are_recovered_after_a_failed_commit(memory: Memory) -> None:
    chat, store, hub = memory.chat(1, 2), memory.store, memory.hub
    sent = memory.send(chat, 1, "old text").message
    seat = memory.sit(2)
    for text in ("middle", None):  # committed, but chatd was told that it failed
        store._transact([memory_job(memory.chats.change_message, 1, sent.id, text)])
    store.seq, store.failure = 3, "SQLITE_IOERR"
    hub.publish(store._probe())
    assert [message["type"] for message in seat.received()] == [
        "message_edited", "message_deleted",
    ]  # fmt: skip
    frames = [*seat.outbox.taken, *[entry.frame for entry in hub.tail]]
    assert not any(b"old text" in data or b"middle" in data for data in frames)
    assert hub.tail_size == sum(entry.size for entry in hub.tail)


def test_after_a_restart_the_tail_shows_messages_as_they_are(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    chat = memory.chat(1, 2)
    sent = memory.send(chat, 1, "old text").message
    memory.edit(1, sent.id, "middle")
    memory.delete(1, sent.id)
    frames = [entry.frame for entry in memory.hub.tail][-3:]
    after = memory.again()
    assert [entry.frame for entry in after.hub.tail] == frames
    assert not any(b"old text" in frame or b"middle" in frame for frame in frames)
    assert after.page(2, 2).events[0].frame == frames[0]
    after.store.close()


# --- writing: the transaction --------------------------------------------------------


def refused_after_writes(memory: Memory, chat: int) -> MemoryWork:
    """A work that writes two changes and is then refused."""

    def work(db: sqlite3.Connection, events: list[chatd.Entry]) -> None:
        memory.store.send_message(db, events, Send(chat, 1, "spoiled"))
        memory.chats.create_chat(db, events, NewChat([1, 77]))
        raise Refusal("forbidden")

    return (work,)


def test_a_refused_job_does_not_affect_the_other_jobs_of_its_batch(
    memory: Memory,
) -> None:
    chat = memory.chat(1, 2)
    batch = memory.commit(
        memory.sends(chat, 1),
        refused_after_writes(memory, chat),
        memory.sends(chat, 3),
        memory.sends(chat, 2),
    )
    codes = [getattr(outcome, "code", "") for _, outcome in batch.outcomes]
    assert codes == ["", "forbidden", "not_found", ""]
    seqs = [(entry.seq, entry.event.seq) for entry in batch.events]
    assert seqs == [(3, 3), (4, 4), (5, 5)]
    assert (memory.count("message"), memory.count("chat"), memory.count("event")) == (
        2, 1, 5,
    )  # fmt: skip
    assert (memory.stats.commits, memory.stats.batch_max) == (2, 4)


def test_only_a_job_that_is_refused_after_it_wrote_makes_its_batch_run_again(
    memory: Memory,
) -> None:
    chat, ran = memory.chat(1, 2), list[int]()

    def send(db: sqlite3.Connection, events: list[chatd.Entry]) -> chatd.Sent:
        ran.append(1)
        return memory.store.send_message(db, events, Send(chat, 1, "x"))

    memory.commit((send,), memory.sends(chat, 3))  # refused before it writes
    assert len(ran) == 1
    batch = memory.commit((send,), refused_after_writes(memory, chat), (send,))
    assert len(ran) == 1 + 2 + 1  # the third job ran only in the second attempt
    first, refused, last = (outcome for _, outcome in batch.outcomes)
    assert (first.message.n, refused.code, last.message.n) == (2, "forbidden", 3)
    assert memory.count("message") == 3


@pytest.mark.parametrize("user_id", [0, 2**63])
def test_a_violated_constraint_is_an_internal_error_of_its_job_alone(
    memory: Memory, user_id: int
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    batch = memory.commit(
        (memory.chats.create_chat, NewChat([1, user_id])), memory.sends(chat, 1)
    )
    assert batch.outcomes[0][1].code == "internal"
    assert batch.outcomes[1][1].message.n == 1
    assert [event.seq for event in batch.events] == [3]
    assert sum(memory.stats.errors.values()) == 1
    assert not bool(store.failure)


def test_before_the_start_a_work_is_committed_at_once(tmp_path: Path) -> None:
    store = Store(Settings(db=tmp_path / "a.db"))
    assert store.commit_now(chatd.Chats(store).create_chat, NewChat([1])) == (1, True)
    refusal = refusal_of(store.commit_now, store.mark_read, 1, 9)
    assert (refusal.code, store.seq) == ("not_found", 1)
    store.close()


def test_only_the_writer_can_write_and_its_commits_are_durable(memory: Memory) -> None:
    memory.chat(1, 2)
    for pragma, writer, reader in (
        ("journal_mode", "wal", "wal"), ("synchronous", 2, 2), ("foreign_keys", 1, 0),
        ("query_only", 0, 1), ("trusted_schema", 0, 0), ("secure_delete", 1, 1),
        ("wal_autocheckpoint", 1000, 0), ("cell_size_check", 1, 0),
        ("application_id", 0x63686174, 0x63686174), ("user_version", 2, 2),
    ):  # fmt: skip

        def ask(db: sqlite3.Connection, pragma: str = pragma) -> object:
            return db.execute(f"PRAGMA {pragma}").fetchone()[0]

        assert (pragma, ask(memory.store._writer)) == (pragma, writer)
        if pragma != "secure_delete":
            assert (pragma, memory.read(ask)) == (pragma, reader)
    refusal = refusal_of(memory.read, lambda db: db.execute("DELETE FROM event"))
    assert (refusal.code, memory.count("event")) == ("storage_failed", 2)


def test_only_the_owner_can_read_the_database_files(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        memory = Memory(tmp_path)
        memory.chat(1, 2)
    finally:
        os.umask(old)
    files = [path for path in tmp_path.iterdir() if path.name.startswith("chatd.db")]
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert chatd.file_bytes(memory.store.wal) > 0
    memory.store.close()
    assert (chatd.file_bytes(memory.store.wal), len([*tmp_path.iterdir()])) == (0, 1)


# --- reading -------------------------------------------------------------------------


def test_a_user_sees_no_event_from_the_time_outside_the_chat(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    memory.send(chat, 1, "seen")  # 3
    memory.do(memory.chats.remove_member, chat, 2, 2)  # 4
    memory.send(chat, 1, "unseen")  # 5
    assert memory.seqs(2) == [2, 4]
    memory.do(memory.chats.add_member, chat, 2, 1)  # 6 for the others, 7 for user 2
    memory.send(chat, 1, "seen again")  # 8
    assert memory.seqs(2) == [2, 4, 7, 8]
    assert memory.seqs(1) == [1, 3, 4, 5, 6, 8]
    messages, *more = memory.read(
        memory.chats.history, 2, chat, None, 50, memory.hub.head
    )
    assert ([message.n for message in messages], more) == ([1, 2, 3], [False, False])


def test_a_chat_that_the_reader_has_left_is_read_as_an_empty_chat(
    memory: Memory,
) -> None:
    chat = memory.chat(1, 2, title="Sofa")
    memory.send(chat, 1, "between us")
    memory.do(memory.chats.remove_member, chat, 2, 2)
    (message,) = memory_frames(memory.page(2).events[0].frame)
    assert message["chat"] == {
        "id": chat, "title": None, "members": [], "last_n": 0, "last_message": None,
        "direct": False, "created_by": None, "member_count": 0,
    }  # fmt: skip
    (message,) = memory_frames(memory.page(1).events[0].frame)
    assert (message["chat"]["title"], message["chat"]["last_n"]) == ("Sofa", 1)


@pytest.mark.parametrize("limit", [1, 2, 3, 10, 11, 100])
def test_pages_of_any_length_add_up_to_the_whole_event_log(
    memory: Memory, limit: int
) -> None:
    chats = [memory.chat(1, 2), memory.chat(2, 3)]
    for i in range(6):
        memory.send(chats[i % 2], 2)
    found, cursor = list[int](), 0
    while cursor < memory.hub.head:
        page = memory.page(1, cursor, limit)
        found += [event.seq for event in page.events]
        assert len(page.events) <= limit
        cursor = page.cursor
    assert found == [1, 5, 7, 9]
    assert cursor == memory.hub.head == 10
    assert memory.page(1, cursor, limit) == ([], 10, 10)


def test_a_page_is_limited_in_bytes_and_its_cursor_is_its_last_event() -> None:
    with memory_with(page_bytes=5000) as memory:
        chat = memory.chat(1, 2)
        for _ in range(8):
            memory.send(chat, 1, "x" * 1000)
        seqs, page = list[int](), memory.page(2, 2)
        while page.cursor < memory.hub.head:
            assert page.cursor == page.events[-1].seq
            assert 1 <= len(page.events) <= 5
            seqs += [event.seq for event in page.events]
            page = memory.page(2, page.cursor)
        assert [*seqs, *[event.seq for event in page.events]] == [*range(3, 11)]


def test_a_complete_page_moves_the_cursor_to_its_upper_bound(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    memory.chat(3, 4)
    memory.send(chat, 1)
    assert memory.page(1, 1).cursor == 5
    assert memory.page(9, 0) == ([], 5, 5)
    full = memory.page(1, 0, limit=2)
    assert ([event.seq for event in full.events], full.cursor) == ([1, 5], 5)


def test_an_unpublished_removal_hides_no_earlier_event(memory: Memory) -> None:
    chat, other = memory.chat(1, 2), memory.chat(2, 3)
    for _ in range(3):
        memory.send(chat, 1)
    memory.do(memory.chats.remove_member, other, 2, 2)
    memory.send(other, 3)
    upto, store = memory.hub.head, memory.store
    before = [event.seq for event in memory.page(2, 4).events]
    assert before == [5, 6, 7, 8]

    def seen(user: int, cursor: int = 4) -> list[int]:
        page = memory.read(store.events_after, user, cursor, upto, 100)
        assert page.cursor == upto
        assert memory.read(store.missed, user, cursor, upto) == len(page.events)
        return [event.seq for event in page.events]

    # On disk but not published: as of the head, user 2 is in the chat.
    for work, *words in (
        (memory.chats.remove_member, chat, 2, None),
        (memory.chats.add_member, chat, 2, None),
        (memory.chats.remove_member, chat, 2, None),
        (
            memory.chats.add_member,
            other,
            2,
            None,
        ),  # user 2 was not a member at the head
        (memory.chats.remove_member, other, 2, None),
        (memory.chats.add_member, chat, 9, None),  # nor was user 9
        (memory.chats.remove_member, chat, 9, None),
    ):
        store.commit_now(work, *words)
        assert seen(2) == before
        assert seen(9) == []
    assert seen(2, 6) == [7, 8]
    assert seen(1) == [5, 6, 7]


def test_missed_events_are_counted_up_to_the_limit_of_a_replay() -> None:
    with memory_with(resync_events=5) as memory:
        chat = memory.chat(1, 2)
        other = memory.chat(3, 4)
        for _ in range(6):
            memory.send(chat, 1)
            memory.send(other, 3)
        missed = functools.partial(memory.read, memory.store.missed, 1)
        assert [missed(cursor, 16) for cursor in (16, 15, 14, 6, 5, 4, 0)] == [
            0, 0, 1, 5, 5, None, None,
        ]  # fmt: skip
        assert missed(20, 16) == 0
        assert memory.greeting(1, 0).missed is None
        assert memory.greeting(1, 6).missed == 5


def test_a_greeting_holds_the_state_as_of_the_head(memory: Memory) -> None:
    chats = [memory.chat(1, 2), memory.chat(2, 3)]
    memory.send(chats[0], 1)
    memory.send(chats[0], 2)
    assert memory.greeting(1) == (
        {chats[0]: 1}, {str(chats[0]): chatd.Marks(last_n=2, read_n=1)}, 0,
    )  # fmt: skip
    assert memory.greeting(2).joined == {chats[0]: 2, chats[1]: 3}
    assert memory.greeting(9) == ({}, {}, 0)


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 7, 100])
def test_pages_of_chats_add_up_to_the_whole_list(memory: Memory, limit: int) -> None:
    chats = [memory.chat(1, 2) for _ in range(7)]
    for chat in (chats[3], chats[0], chats[3], chats[5]):
        memory.send(chat, 2)
    newest = [chats[place] for place in (5, 3, 0, 6, 4, 2, 1)]
    assert [chat.id for chat in memory.my_chats(1)] == newest
    listed: list[chatd.MyChat] = []
    before, more = None, True
    while more:
        page = memory.read(memory.chats.my_chats, 1, memory.hub.head, before, limit)
        more, page = len(page) > limit, page[:limit]
        assert len(page) == limit or not more
        listed += page
        before = page[-1].position
    assert listed == memory.my_chats(1)
    assert memory.read(memory.chats.my_chats, 1, memory.hub.head, before, 9) == []


def test_a_page_of_chats_reads_no_more_chats_than_it_has(memory: Memory) -> None:
    def cost() -> int:
        (reader,) = memory.store._idle_readers
        query, where = memory.chats.my_chats, (1, memory.hub.head, None, 5)
        return steps_of(reader, lambda: memory.read(query, *where))

    for _ in range(6):
        memory.chat(1, 2)
    memory.my_chats(1)
    few = cost()
    for _ in range(200):
        memory.chat(1, 2)
    assert (cost() - few) * 10 < 200 * 80  # only the time of each chat's last message


def test_a_greeting_has_the_marks_of_the_500_newest_chats(memory: Memory) -> None:
    memory.commit(*[(memory.chats.create_chat, NewChat([1]))] * 1200)
    memory = memory.again()
    memory.send(1, 1)
    greeting = memory.greeting(1)
    assert len(greeting.joined) == 1200
    assert [*greeting.marks] == [str(chat) for chat in (1, *range(1200, 701, -1))]
    assert greeting.marks["1"] == chatd.Marks(1, 1)


def test_the_marks_of_a_greeting_are_at_most_24_kib(memory: Memory) -> None:
    memory.chat(1)
    db, most = memory.store._writer, chatd.MAX_ID
    db.executescript(
        f"""WITH RECURSIVE c (n) AS (
            SELECT 0 UNION ALL SELECT n + 1 FROM c WHERE n < 600)
        INSERT INTO chat (id, created_at, last_n) SELECT {most} - n, 0, {most} FROM c;
        INSERT INTO member SELECT id, 1, 1, {most} FROM chat WHERE id > 1;
        INSERT INTO message (id, chat_id, n, sender_id, content, created_at)
        SELECT 2 + row_number() OVER (ORDER BY id), id, {most}, 1, '', 0 FROM chat
        WHERE id > 1"""
    )
    joined, marks, _ = memory.read(memory.store.greeting, 1, most, most)
    assert 24_000 < len(chatd.encode(marks)) <= 24 * 1024
    assert len(joined) == 602
    newest = str(most)  # the one whose message has the largest id
    assert next(iter(marks)) == newest


def test_no_frame_is_larger_than_32_kib_but_for_the_text_of_a_message() -> None:
    name, title = "\U0001f600" * 64, "\U0001f600" * 200
    with memory_with() as memory:
        seats = {user: memory.sit(user) for user in (1, 50, 51, 5000)}
        rename = memory.chats.rename
        memory.commit(*[(rename, user, name) for user in range(1, 5001)])
        chats = [
            create(memory, *range(1, most), title=title)[0]
            for most in (39, 50, 51, 5000)
        ]
        for chat in chats:
            memory.send(chat, 1, "\U0001f600" * 4000)
            memory.do(memory.chats.add_member, chat, 5000, None)
            memory.do(memory.chats.set_title, chat, title[1:], None)
            memory.do(memory.chats.remove_member, chat, 2, None)
        largest = 0
        for seat in seats.values():
            for data in seat.outbox.taken:
                for _, text in words_hear(data):
                    largest = max(largest, len(text.encode()))
        assert 28_000 < largest <= 32 * 1024
        added = [f for f in seats[5000].received() if f["type"] == "chat_added"]
        assert [f["chat"]["member_count"] for f in added] == [39, 50, 51, 5000]
        assert [len(f["chat"]["members"]) for f in added] == [39, 0, 0, 0]


@pytest.mark.parametrize(
    ("count", "name", "shown"),
    [(1, "", 1), (50, "", 50), (51, "", 0), (50, "x" * 64, 50), (50, "é" * 64, 50),
     (39, "\U0001f600" * 64, 39), (45, "\U0001f600" * 64, 0)],
)  # fmt: skip
def test_the_members_of_a_chat_are_left_out_as_a_whole(
    count: int, name: str, shown: int, memory: Memory
) -> None:
    for user in range(1, count + 1):
        memory.do(memory.chats.rename, user, name)
    chat = memory.chat(*range(1, count + 1))
    (mine,) = memory.my_chats(1)
    assert (mine.id, len(mine.members), mine.member_count) == (chat, shown, count)


def test_members_are_listed_by_id_page_by_page(memory: Memory) -> None:
    chat, other = memory.chat(*range(2, 200, 2)), memory.chat(1, 3)
    memory.do(memory.chats.rename, 4, "Dan")
    memory.send(chat, 4)
    head = memory.hub.head
    memory.commit(memory.sends(chat, 4, "not published"))

    def members(*page: Any, by: int | None = 2) -> list[chatd.Member]:
        return memory.read(chatd.read_members, chat, head, by, *page)

    listed, after = [], None
    while page := members(None, after, 10)[:10]:
        listed += page
        after = page[-1].user_id
    assert [member.user_id for member in listed] == [*range(2, 200, 2)]
    assert listed[:2] == [chatd.Member(2, None, 0), chatd.Member(4, "Dan", 1)]
    assert len(members(None, None, 10)) == 11  # one more, for there are more
    assert members("4,1,2,9007199254740991", None, 100) == listed[:2]
    assert members("4,1,2", 2, 100) == [listed[1]]
    assert [m.user_id for m in members("4,2,6", None, 1)] == [2, 4]
    assert members("4", None, 5, by=None) == [listed[1]]
    for chat_id, by in ((other, 2), (99, 2), (99, None)):
        refusal = refusal_of(
            memory.read, chatd.read_members, chat_id, head, by, None, None, 9
        )
        assert refusal.code == "not_found"


def test_chats_are_listed_by_their_last_event_with_unread_counts(
    memory: Memory,
) -> None:
    chats = [memory.chat(1, 2, title=title) for title in ("a", "b", "c")]
    memory.send(chats[0], 2, "x")
    memory.send(chats[0], 2, "y")
    memory.do(memory.store.mark_read, 1, 7)
    first, second, third = memory.my_chats(1)
    assert [chat.title for chat in (first, second, third)] == ["a", "c", "b"]
    assert (first.last_n, first.read_n, first.unread) == (2, 1, 1)
    assert first.last_message is not None
    assert first.last_message.content == "y"
    assert (third.last_message, third.unread) == (None, 0)


# Of the messages 0 to 4: the place of a page, its message, the limit; the page, whether
# there are older and newer ones.
HISTORY = (
    ("before", None, 2, "34", True, False),
    ("before", 3, 2, "12", True, True),
    ("before", 1, 2, "0", False, True),
    ("before", 0, 2, "", False, True),
    ("before", None, 5, "01234", False, False),
    ("before", None, 100, "01234", False, False),
    ("after", 0, 2, "12", True, True),
    ("after", 2, 2, "34", True, False),
    ("after", 2, 1, "3", True, True),
    ("after", 4, 2, "", True, False),
    ("after", 0, 100, "1234", True, False),
    ("around", 2, 1, "2", True, True),
    ("around", 2, 2, "12", True, True),
    ("around", 2, 3, "123", True, True),
    ("around", 2, 5, "01234", False, False),
    ("around", 0, 4, "01", False, True),
    ("around", 4, 4, "234", True, False),
    ("around", 4, 1, "4", True, False),
    ("around", 1, 100, "01234", False, False),
)


@pytest.mark.parametrize(("place", "at", "limit", "page", "older", "newer"), HISTORY)
def test_a_page_of_history_is_before_after_or_around_a_message(
    place: str, at: int | None, limit: int, page: str, older: bool, newer: bool,
    memory: Memory,
) -> None:  # fmt: skip
    chat = memory.chat(1, 2)
    ids = [memory.send(chat, 1, str(i)).message.id for i in range(5)]
    head = memory.hub.head
    memory.commit(memory.sends(chat, 1, "not published"))
    message_id = None if at is None else ids[at]
    messages, *more = memory.read(
        memory.chats.history, 2, chat, message_id, limit, head, place
    )
    assert "".join(message.content for message in messages) == page
    assert more == [older, newer]


def test_an_empty_chat_has_no_history(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    assert memory.read(memory.chats.history, 2, chat, None, 9, memory.hub.head) == (
        [], False, False,
    )  # fmt: skip


def test_history_is_for_members_and_before_names_a_message_of_the_chat(
    memory: Memory,
) -> None:
    chat, other = memory.chat(1, 2), memory.chat(3, 4)
    foreign, history = memory.send(other, 3).message.id, memory.chats.history
    for chat_id in (other, 99):
        assert (
            refusal_of(memory.read, history, 1, chat_id, None, 5, 9).code == "not_found"
        )
    for place in ("before", "after", "around"):
        for at in (foreign, 99, 1):
            refusal = refusal_of(memory.read, history, 1, chat, at, 5, 9, place)
            assert str(refusal) == f"bad_field: {place}: not a message of this chat"


def test_readers_do_not_see_commits_that_are_not_published(memory: Memory) -> None:
    chat, store = memory.chat(1, 2), memory.store
    memory.send(chat, 1, "old")
    batch = memory.commit(
        memory.sends(chat, 1, "new", "k"),
        (memory.chats.create_chat, NewChat([1, 2])),
        (store.mark_read, 2, 4),
    )
    assert (store.seq, memory.hub.head) == (7, 3)
    assert memory.seqs(2) == [2, 3]
    assert memory.page(2).cursor == 3
    assert memory.greeting(2).marks == {str(chat): chatd.Marks(1, 1)}
    ((mine,),) = [memory.my_chats(2)]
    assert (mine.id, mine.last_n, mine.read_n, mine.unread) == (chat, 1, 1, 0)
    messages, *_ = memory.read(memory.chats.history, 2, chat, None, 9, memory.hub.head)
    assert [message.content for message in messages] == ["old"]
    memory.hub.publish(batch)
    assert memory.seqs(2) == [2, 3, 4, 6, 7]


def test_a_chat_is_read_without_unpublished_messages(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    memory.commit(memory.sends(chat, 1, "new"))
    (event,) = memory_frames(memory.page(2).events[0].frame)
    assert event["chat"]["last_message"] is None
    ((mine,),) = [memory.my_chats(2)]
    assert all(member.read_n <= mine.last_n for member in mine.members)


def test_a_repeat_is_not_found_before_its_event_is_published(memory: Memory) -> None:
    chat, find = memory.chat(1, 2), memory.store.find_sent
    batch = memory.commit(memory.sends(chat, 1, "hi", "k"))
    again = Send(chat, 1, "hi", "k")
    assert memory.read(find, again, memory.hub.head) is None
    memory.hub.publish(batch)
    assert memory.read(find, again, memory.hub.head) is not None


def test_a_failed_query_leaves_no_transaction_open(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    for _ in range(6):
        refusal_of(memory.read, memory.chats.history, 9, chat, None, 5, 9)
        refusal = refusal_of(memory.read, lambda db: db.execute("SELECT nothing"))
        assert refusal.code == "storage_failed"
    assert memory.seqs(1) == [1]
    assert len(memory.store._idle_readers) == 1


def run_every_query(memory: Memory, key: str) -> None:
    """Run every query of the store."""
    store, chat = memory.store, memory.chat(1, 2)
    sent = memory.send(chat, 1, "hi", key)
    memory.send(chat, 1, "hi", key)
    memory.do(store.mark_read, 2, sent.message.id)
    memory.do(memory.chats.add_member, chat, 3, 1)
    memory.do(memory.chats.remove_member, chat, 3, 3)
    memory.do(memory.chats.rename, 1, "Ann")
    memory.do(memory.chats.revoke, 2, 1_700_000_000)
    head = memory.hub.head
    memory.page(1)
    memory.greeting(1, 0)
    memory.my_chats(1)
    memory.read(memory.chats.history, 1, chat, sent.message.id, 5, head)
    memory.read(store.find_sent, Send(chat, 1, "hi", key))
    memory.read(chatd.query_value, chatd.NAME, 1)
    store.tail()
    store.revoked()
    store._probe()


def test_no_query_scans_a_table_that_grows(memory: Memory) -> None:
    statements: set[str] = set()
    run_every_query(memory, "k1")
    for db in (memory.store._writer, *memory.store._idle_readers):
        db.set_trace_callback(statements.add)
    run_every_query(memory, "k2")
    # No INSERT: its plan lists the tables that a deferred foreign key would check.
    queries = {sql for sql in statements if re.match(r"\s*(SELECT|UPDATE|DELETE)", sql)}
    assert len(queries) > 25
    for sql in queries:
        plan = memory.store._writer.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall()
        scans = [row[3] for row in plan if row[3].startswith("SCAN")]
        # Allowed: rows that were just selected, and the users with revoked tokens.
        lists = r"\(?subquery|mine|CONSTANT|json_each"
        right = rf"SCAN ({lists}|user USING (COVERING )?INDEX user_revoked)"
        assert [scan for scan in scans if not re.match(right, scan)] == [], sql


def steps_of(db: sqlite3.Connection, function: Callable[[], object]) -> int:
    """Count the steps that SQLite takes for the queries of a function, in tens."""
    steps: list[int] = []
    db.set_progress_handler(lambda: steps.append(1), 10)
    function()
    db.set_progress_handler(None, 10)
    return len(steps)


def test_no_cost_grows_with_the_length_of_the_event_log(memory: Memory) -> None:
    chat, store = memory.chat(1, 2), memory.store
    queries: list[Callable[[], object]] = [
        lambda: memory.page(1, 2, limit=5),
        lambda: memory.page(1, memory.hub.head - 5),
        lambda: memory.greeting(2, memory.hub.head - 5),
        lambda: memory.my_chats(2),
        lambda: memory.read(memory.chats.history, 2, chat, None, 5, memory.hub.head),
    ]
    works: list[Callable[[], object]] = [
        lambda: memory.send(chat, 1, "x", f"k{memory.hub.head}"),
        lambda: memory.do(store.mark_read, 2, memory.hub.head - 3),
        lambda: memory.chat(1, 3),  # not of user 2, whose chats are read above
        lambda: memory.do(memory.chats.add_member, chat, 3, 1),
        lambda: memory.do(memory.chats.remove_member, chat, 3, 3),
    ]

    def costs() -> list[int]:
        for _ in range(10):
            memory.send(chat, 1)
        (reader,) = store._idle_readers
        return [steps_of(reader, query) for query in queries] + [
            steps_of(store._writer, work) for work in works
        ]

    memory.page(1)
    short = costs()
    memory.hub.publish(memory.commit(*[memory.sends(chat, 1)] * 3000))
    for cost, before in zip(costs(), short, strict=True):
        assert cost <= before + 20


# --- the tasks: batches, publication, stopping ---------------------------------------


@contextlib.asynccontextmanager
async def running(memory: Memory) -> AsyncIterator[None]:
    """Run the tasks of the store and the hub, and stop them, as Server does."""
    batches, published = trio.open_memory_channel[chatd.Batch](8)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(memory.store.run, batches)
        nursery.start_soon(memory.hub.run, published)
        yield
        memory.store.finish()


async def refusal_code(memory: Memory, work: MemoryWork) -> str:
    """Commit a work that is refused. Return the code of its Refusal."""
    with pytest.raises(Refusal) as caught:
        await memory.store.commit(*work)
    return caught.value.code


async def test_waiting_jobs_become_one_transaction(memory: Memory) -> None:
    chat, outcomes = memory.chat(1, 2), list[Any]()
    before = memory.stats.commits
    for _ in range(100):
        await memory.store.submit(
            memory_job(*memory.sends(chat, 1), done=outcomes.append)
        )
    async with running(memory):
        await trio.testing.wait_all_tasks_blocked()
    assert (memory.stats.commits, memory.stats.batch_max) == (before + 1, 100)
    assert [outcome.message.n for outcome in outcomes] == [*range(1, 101)]


async def test_the_number_of_jobs_in_a_transaction_is_limited() -> None:
    with memory_with(batch_jobs=10) as memory:
        chat = memory.chat(1, 2)
        for _ in range(25):
            await memory.store.submit(memory_job(*memory.sends(chat, 1)))
        async with running(memory):
            await trio.testing.wait_all_tasks_blocked()
        assert (memory.stats.commits, memory.stats.batch_max) == (4, 10)


async def test_the_outcome_of_a_work_arrives_once_it_is_published(
    memory: Memory,
) -> None:
    chat = memory.chat(1, 2)
    async with running(memory):
        sent = await memory.store.commit(*memory.sends(chat, 1))
        assert memory.hub.head == sent.message.id
        assert await refusal_code(memory, memory.sends(99, 1)) == "not_found"
        assert memory.store.writing_since is None


async def test_a_work_is_done_even_if_its_caller_is_cancelled(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    with trio.CancelScope() as gone:
        async with trio.open_nursery() as nursery:
            sending = functools.partial(memory.store.commit, *memory.sends(chat, 1))
            nursery.start_soon(sending)
            await trio.testing.wait_all_tasks_blocked()
            gone.cancel()
    async with running(memory):
        pass
    assert memory.seqs(2) == [2, 3]


async def test_a_stop_finishes_all_submitted_jobs(memory: Memory) -> None:
    chat, outcomes = memory.chat(1, 2), list[Any]()
    for _ in range(3):
        await memory.store.submit(
            memory_job(*memory.sends(chat, 1), done=outcomes.append)
        )
    memory.store.finish()
    async with running(memory):
        pass
    assert len(outcomes) == 3
    with pytest.raises(trio.ClosedResourceError):
        await memory.store.commit(*memory.sends(chat, 1))


async def test_reads_and_writes_work_in_threads(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.store._run_sync = trio.to_thread.run_sync
    chat = memory.chat(1, 2)
    async with running(memory), trio.open_nursery() as nursery:
        for _ in range(50):
            sending = functools.partial(memory.store.commit, *memory.sends(chat, 1))
            nursery.start_soon(sending)
        for _ in range(50):
            query = memory.chats.my_chats
            where = (1, memory.hub.head, None, None)
            nursery.start_soon(memory.store.read, query, *where)
    assert memory.send(chat, 1).message.n == 51
    assert 1 <= len(memory.store._idle_readers) <= chatd.READERS
    memory.store.close()


async def test_a_cancelled_caller_waits_for_its_thread() -> None:
    done, limiter = threading.Event(), trio.CapacityLimiter(1)
    ended = list[object]()

    async def call() -> None:
        ended.append(await chatd.in_thread(done.wait, 60, limiter=limiter))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        assert limiter.borrowed_tokens == 1
        done.set()
    assert (ended, limiter.borrowed_tokens) == ([True], 0)


async def test_what_is_raised_in_a_thread_is_raised_to_its_caller() -> None:
    limiter = trio.CapacityLimiter(1)
    with pytest.raises(ValueError, match="invalid literal"):
        await chatd.in_thread(int, "x", limiter=limiter)
    assert limiter.borrowed_tokens == 0


# --- failures ------------------------------------------------------------------------


def all_failed(batch: chatd.Batch) -> bool:
    outcomes = [outcome for _, outcome in batch.outcomes]
    codes = {getattr(outcome, "code", "done") for outcome in outcomes}
    return batch.events == [] and codes == {"storage_failed"}


@pytest.mark.parametrize("position", range(6))
def test_a_disk_that_fills_up_at_any_job_fails_the_whole_batch(
    memory: Memory, position: int
) -> None:
    chat, store, ran = memory.chat(1, 2), memory.store, list[int]()
    made = memory.sit(2)

    def work(db: sqlite3.Connection, events: list[chatd.Entry], i: int) -> chatd.Sent:
        ran.append(i)
        text = "x" * (50_000 if i == position else 3)
        return store.send_message(db, events, Send(chat, 1, text, f"k{i}"))

    works = [(work, i) for i in range(6)]
    (pages,) = store._writer.execute("PRAGMA page_count").fetchone()
    store._writer.execute(f"PRAGMA max_page_count = {pages + 2}")
    batch = memory.commit(*works)
    assert all_failed(batch)
    assert {outcome.retry_after for _, outcome in batch.outcomes} == {2.0}
    assert ran == [*range(position + 1)]  # the jobs after it did not run
    memory.hub.publish(batch)
    assert (bool(store.failure), store._writer.in_transaction) == (True, False)
    assert (made.seqs(), memory.count("message"), memory.stats.failed) == ([], 0, 6)
    store._writer.execute("PRAGMA max_page_count = 100000")
    assert store._probe() == ([], [])
    assert not bool(store.failure)
    memory.hub.publish(memory.commit(*works))
    assert made.seqs() == [*range(3, 9)]
    memory_is_sound(memory)


def test_an_error_at_any_step_of_a_batch_rolls_all_of_it_back(memory: Memory) -> None:
    chat, store = memory.chat(1, 2), memory.store
    works: list[MemoryWork] = [
        memory.sends(chat, 1, "hi", "k"),
        (store.mark_read, 2, 3),
        refused_after_writes(memory, chat),
        (memory.chats.create_chat, NewChat([1, 3])),
        (memory.chats.add_member, chat, 3, 1),
        (memory.chats.remove_member, chat, 2, None),
        memory.sends(chat, 9, service=True),
    ]
    steps, denied = itertools.count(1), 0

    def authorizer(*_: object) -> int:
        """SQLite calls this at each step of each statement; one step is denied."""
        return sqlite3.SQLITE_DENY if next(steps) == denied else sqlite3.SQLITE_OK

    batch = chatd.Batch([], [])
    while not batch.events:
        steps, denied = itertools.count(1), denied + 1
        store._writer.set_authorizer(authorizer)
        batch = memory.commit(*works)
        store._writer.set_authorizer(None)
        if not batch.events:
            assert all_failed(batch)
            assert (bool(store.failure), store._writer.in_transaction) == (True, False)
            assert store._probe() == ([], [])
            assert (store.seq, bool(store.failure)) == (2, False)
            assert memory.count("event") == memory.count("member") == 2
    assert denied > 100
    memory.hub.publish(batch)
    assert [event.seq for event in batch.events] == [*range(3, 11)]
    memory_is_sound(memory)


class FailingCommit(sqlite3.Connection):
    """A connection whose COMMIT succeeds and then reports an error.

    A failed fsync has this effect. It is the only part of SQLite that a test cannot
    provoke without a failing disk, so the error is raised here, after a real COMMIT.
    """

    error = ""

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        cursor = super().execute(sql, parameters)
        if sql == "COMMIT" and self.error:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorname, self.error = self.error, ""
            raise error
        return cursor


def fail_next_commit(memory: Memory | VirtualServer, error: str) -> None:
    """Let the next commit report an error although its rows are written."""
    made = sqlite3.connect(
        memory.store.path,
        isolation_level=None,
        check_same_thread=False,
        factory=FailingCommit,
    )
    made.create_function("fold", 1, chatd.fold)
    made.execute("SELECT count(*) FROM meta")  # an open reader keeps the WAL
    made.error = error
    memory.store._writer.close()
    made.create_function("fold", 1, chatd.fold)
    memory.store._writer = made


@pytest.mark.parametrize("error", ["SQLITE_FULL", "SQLITE_IOERR_FSYNC"])
async def test_a_failed_commit_that_is_on_disk_is_published_before_anything_else(
    memory: Memory, error: str, autojump_clock: trio.testing.MockClock
) -> None:
    chat = memory.chat(1, 2)
    made = memory.sit(2)
    fail_next_commit(memory, error)
    async with running(memory):
        work = memory.sends(chat, 1, "once", "k")
        assert await refusal_code(memory, work) == "storage_failed"
        assert (bool(memory.store.failure), memory.hub.head, made.seqs()) == (
            True,
            2,
            [],
        )
        assert await refusal_code(memory, work) == "storage_failed"
        await trio.sleep(chatd.PROBE_SECONDS + 0.1)
        assert (bool(memory.store.failure), memory.hub.head, made.seqs()) == (
            False,
            3,
            [3],
        )
        again = await memory.store.commit(*work)
        assert (again.duplicate, again.message.id) == (True, 3)
        assert (await memory.store.commit(*memory.sends(chat, 1))).message.n == 2
    assert [message["message"]["content"] for message in made.received()] == [
        "once",
        "hi",
    ]
    memory_is_sound(memory)


@with_server()
async def test_the_stats_count_a_message_that_a_failed_commit_has_stored(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer = await server.join(6)
    fail_next_commit(server, "SQLITE_FULL")
    send = {"chat_id": chat, "content": "hi", "client_id": "k"}
    assert (await peer.refused("send_message", **send))["code"] == "storage_failed"
    assert (await server.stats())["store"]["messages"] == 0
    assert (await peer.receive("new_message", within=3))["message"]["client_id"] == "k"
    assert (await peer.ask("send_message", **send))["duplicate"] is True
    store = (await server.stats())["store"]
    counted = {name: store[name] for name in ("messages", "duplicates", "failed")}
    assert counted == {"messages": 1, "duplicates": 1, "failed": 1}


async def test_all_kinds_of_events_are_recovered_after_a_failed_commit(
    memory: Memory,
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    made = memory.sit(2)
    fail_next_commit(memory, "SQLITE_FULL")
    batch = memory.commit(
        memory.sends(chat, 1, "hi", "k"),
        (store.mark_read, 2, 3),
        (memory.chats.create_chat, NewChat([1, 2], "new")),
        (memory.chats.add_member, chat, 3, 1),
        (memory.chats.remove_member, chat, 1, 1),
    )
    assert all_failed(batch)
    await trio.lowlevel.checkpoint()
    memory.hub.publish(store._probe())
    assert made.seqs() == [3, 4, 6, 7, 9]
    assert {*memory.hub.live_seats} == {chat, 2}
    memory_is_sound(memory)


async def test_while_storage_fails_writes_are_refused_at_once_and_reads_go_on(
    memory: Memory, autojump_clock: trio.testing.MockClock
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    work = memory.sends(chat, 1)
    async with running(memory):
        with no_file_grows(store.wal):
            assert await refusal_code(memory, work) == "storage_failed"
            started = trio.current_time()
            for _ in range(20):
                assert await refusal_code(memory, work) == "storage_failed"
            assert trio.current_time() == started
            assert await store.read(memory.chats.my_chats, 1, memory.hub.head, None, 9)
            await trio.sleep(60)
            assert bool(store.failure)
        await trio.sleep(chatd.PROBE_SECONDS + 0.1)
        assert not bool(store.failure)
        assert (await store.commit(*work)).message.n == 1
    assert memory.stats.failed == 21
    memory_is_sound(memory)


async def test_a_stop_while_storage_fails_does_not_wait(
    memory: Memory, autojump_clock: trio.testing.MockClock
) -> None:
    work = memory.sends(memory.chat(1, 2), 1)
    with no_file_grows(memory.store.wal):
        async with running(memory):
            assert await refusal_code(memory, work) == "storage_failed"
    assert trio.current_time() < 5


@contextlib.contextmanager
def lowered(limit: int, value: int) -> Iterator[None]:
    """Lower a resource limit of this process for the length of a block."""
    soft, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(limit, (soft, hard))


def no_file_grows(path: Path) -> contextlib.AbstractContextManager[None]:
    """No file may grow past the size of this one: a real I/O error, for root too."""
    return lowered(resource.RLIMIT_FSIZE, path.stat().st_size)


def test_after_each_io_error_the_database_is_reopened(memory: Memory) -> None:
    chat, store = memory.chat(1, 2), memory.store
    for n in (1, 2):
        store._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        fail_next_commit(memory, "SQLITE_IOERR_WRITE")
        assert all_failed(memory.commit(memory.sends(chat, 1)))
        for _ in range(5):  # the WAL is shorter than the write of a probe
            before = store._writer
            with no_file_grows(store.wal):
                assert store._probe() == ([], [])
            assert bool(store.failure)
            assert store._writer is not before
        found = store._probe()
        assert [event.kind for event in found.events] == ["new_message"]
        memory.hub.publish(found)
        assert (bool(store.failure), store.seq) == (False, 2 + n)
    memory_is_sound(memory)


async def test_a_long_storage_failure_logs_one_line_and_leaks_no_descriptor(
    memory: Memory,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    work, opened = memory.sends(chat, 1), list[int]()
    async with running(memory):
        with no_file_grows(store.wal):
            assert await refusal_code(memory, work) == "storage_failed"
            for _ in range(10):
                await trio.sleep(30)
                assert await refusal_code(memory, work) == "storage_failed"
                assert await store.read(
                    memory.chats.my_chats, 1, memory.hub.head, None, 9
                )
                opened.append(len(os.listdir("/proc/self/fd")))
        await trio.sleep(chatd.PROBE_SECONDS + 0.1)
        assert (await store.commit(*work)).message.n == 1
    assert opened == opened[:1] * 10
    lines = [line.split(" ", 1)[0] for line in caplog.messages]
    assert lines == ["storage_failed", "storage_recovered"]
    memory_is_sound(memory)


def no_free_descriptor() -> contextlib.AbstractContextManager[None]:
    """No file can be opened: the process has as many as its limit allows."""
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    return lowered(resource.RLIMIT_NOFILE, lowest)


def test_a_database_that_cannot_be_reopened_is_reopened_later(memory: Memory) -> None:
    chat, store = memory.chat(1, 2), memory.store
    fail_next_commit(memory, "SQLITE_IOERR_WRITE")
    assert all_failed(memory.commit(memory.sends(chat, 1)))
    memory.my_chats(1)  # a reader is open
    with no_free_descriptor():
        for _ in range(3):
            assert store._probe() == ([], [])
            assert store.failure == "SQLITE_CANTOPEN"
            store.check_file()
            assert memory.my_chats(1)
    assert len(store._probe().events) == 1
    assert not bool(store.failure)


def test_writes_resume_when_a_read_only_file_is_writable_again() -> None:
    """SQLite opens such a file read-only, and the connection stays read-only."""
    with tempfile.TemporaryDirectory() as folder, as_unprivileged_user(Path(folder)):
        memory = Memory(Path(folder))
        chat, store = memory.chat(1, 2), memory.store
        with no_file_grows(store.wal):
            assert all_failed(memory.commit(memory.sends(chat, 1)))
        assert store.failure == "SQLITE_IOERR_WRITE"
        memory.settings.db.chmod(0o400)
        assert store._probe() == ([], [])
        assert store.failure == "SQLITE_READONLY"
        memory.settings.db.chmod(0o600)
        assert store._probe() == ([], [])
        assert not bool(store.failure)
        assert memory.send(chat, 1).message.n == 1
        memory_is_sound(memory)
        store.close()


def test_a_transaction_that_cannot_be_rolled_back_ends_with_its_connection(
    memory: Memory,
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    denied = {(sqlite3.SQLITE_TRANSACTION, end) for end in ("COMMIT", "ROLLBACK")}

    def authorizer(action: int, what: str | None, *_: object) -> int:
        denies = (action, what) in denied
        return sqlite3.SQLITE_DENY if denies else sqlite3.SQLITE_OK

    store._writer.set_authorizer(authorizer)
    assert all_failed(memory.commit(memory.sends(chat, 1)))
    assert store._writer.in_transaction
    assert store._probe() == ([], [])
    assert (bool(store.failure), store._writer.in_transaction) == (False, False)
    assert memory.send(chat, 1).message.n == 1
    memory_is_sound(memory)


def take_away(path: Path, *, replaced: bool) -> None:
    """Remove a file, or replace it by a copy of itself."""
    if replaced:
        copy = path.with_name("copy")
        copy.write_bytes(path.read_bytes())
        copy.replace(path)
    else:
        path.unlink()


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("error", ["SQLITE_FULL", "SQLITE_IOERR_WRITE"])
def test_a_file_removed_or_replaced_while_storage_fails_ends_the_server(
    memory: Memory, error: str, replaced: bool, suffix: str
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    fail_next_commit(memory, error)
    assert all_failed(memory.commit(memory.sends(chat, 1)))
    take_away(Path(f"{memory.settings.db}{suffix}"), replaced=replaced)
    assert "removed or replaced" in usage_error_of(store._probe)
    assert bool(store.failure)


@pytest.fixture
def linked(tmp_path: Path) -> Iterator[Memory]:
    """A store and a hub whose folder is a symbolic link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    memory = Memory(tmp_path / "link")
    yield memory
    memory.store.close()


def test_a_path_that_cannot_be_resolved_is_a_storage_failure_and_not_a_removed_file(
    linked: Memory, tmp_path: Path
) -> None:
    chat, store, link = linked.chat(1, 2), linked.store, tmp_path / "link"
    link.unlink()
    link.symlink_to("link")  # a loop: to resolve it is an OSError
    assert all_failed(linked.commit(linked.sends(chat, 1)))
    assert store._probe() == ([], [])
    assert store.failure == "OSError"
    link.unlink()
    link.symlink_to("real")
    assert len(store._probe().events) == 1
    assert not bool(store.failure)


def test_the_wal_of_a_database_behind_a_link_is_watched_and_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "chatd.db").symlink_to("real/chatd.db")
    memory = Memory(tmp_path)
    chat, store = memory.chat(1, 2), memory.store
    fail_next_commit(memory, "SQLITE_IOERR_FSYNC")
    assert all_failed(memory.commit(memory.sends(chat, 1)))
    wal = (tmp_path / "real" / "chatd.db-wal").stat()
    resynced = record_resyncs(monkeypatch)
    memory.hub.publish(store._probe())
    assert resynced == [(wal.st_ino, wal.st_size)]
    assert memory.send(chat, 1).message.n == 2
    assert chatd.file_bytes(store.wal) > 0
    (tmp_path / "real" / "chatd.db-wal").unlink()
    message = usage_error_of(memory.commit, memory.sends(chat, 1))
    assert "removed or replaced" in message
    store.close()


def test_a_file_size_limit_is_handled_like_a_full_disk(memory: Memory) -> None:
    chat, store = memory.chat(1, 2), memory.store
    work = memory.sends(chat, 1, "x" * 100_000)
    with no_file_grows(memory.settings.db.with_name("chatd.db-wal")):
        assert all_failed(memory.commit(work))
        for _ in range(4):  # the store neither ends nor reports a recovery
            assert store._probe() == ([], [])
            assert bool(store.failure)
    assert store._probe() == ([], [])
    assert not bool(store.failure)
    assert memory.do(*work).message.content == "x" * 100_000
    memory_is_sound(memory)


def test_a_large_new_chat_ends_its_transaction_and_the_other_jobs_come_next(
    tmp_path: Path,
) -> None:
    memory = Memory(tmp_path, batch_events=3)
    create = memory.chats.create_chat
    works = [(create, NewChat(users)) for users in ([1, 2, 3], [1], [2])]
    batch = memory.commit(*works)
    assert (len(batch.outcomes), len(batch.events)) == (1, 3)
    assert (memory.stats.commits, memory.stats.batch_max) == (1, 1)  # only what ran
    memory.hub.publish(batch)
    assert len(memory.commit(*works[1:]).outcomes) == 2
    memory.store.close()


async def test_jobs_after_a_large_new_chat_are_all_answered(tmp_path: Path) -> None:
    memory = Memory(tmp_path, batch_events=3)
    async with running(memory), trio.open_nursery() as nursery:
        for users in ([1, 2, 3], [1], [2], [4, 5, 6], [7]):
            nursery.start_soon(
                memory.store.commit, memory.chats.create_chat, NewChat(users)
            )
    assert (memory.count("chat"), memory.hub.head) == (5, 9)
    memory.store.close()


def test_a_link_to_a_database_shares_its_lock(tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(tmp_path / "chatd.db")
    with chatd.locked(tmp_path / "chatd.db"):
        again = contextlib.ExitStack()
        assert "in use by process" in usage_error_of(
            again.enter_context, chatd.locked(link)
        )


def test_a_missing_folder_is_reported_before_the_lock(tmp_path: Path) -> None:
    context = contextlib.ExitStack()
    missing = chatd.locked(tmp_path / "none" / "chatd.db")
    message = usage_error_of(context.enter_context, missing)
    assert f"finds no folder {tmp_path / 'none'}" in message


def test_another_writer_is_a_failure_that_passes(memory: Memory) -> None:
    chat, store = memory.chat(1, 2), memory.store
    store._writer.execute("PRAGMA busy_timeout = 0")
    other = sqlite3.connect(memory.settings.db, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert all_failed(memory.commit(memory.sends(chat, 1)))
    assert store._probe() == ([], [])
    assert bool(store.failure)
    other.close()
    assert store._probe() == ([], [])
    assert memory.send(chat, 1).message.n == 1
    memory_is_sound(memory)


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_removed_or_replaced_file_ends_the_server_before_an_ack(
    memory: Memory, replaced: bool, suffix: str
) -> None:
    chat, db = memory.chat(1, 2), memory.settings.db
    take_away(Path(f"{db}{suffix}"), replaced=replaced)
    message = usage_error_of(memory.commit, memory.sends(chat, 1))
    assert message == f"database {db}: removed or replaced while it is served"
    message = usage_error_of(memory.store._probe)
    assert "removed or replaced" in message


async def test_a_removed_file_ends_the_task_of_the_store(memory: Memory) -> None:
    work = memory.sends(memory.chat(1, 2), 1)
    memory.settings.db.unlink()
    with pytest.RaisesGroup(UsageError, flatten_subgroups=True):
        async with running(memory):
            await memory.store.commit(*work)


def overwrite_root_page(path: Path, table: str) -> None:
    """Overwrite the root page of a table or index with garbage."""
    db = sqlite3.connect(path)
    (page,) = db.execute(
        "SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)
    ).fetchone()
    (size,) = db.execute("PRAGMA page_size").fetchone()
    db.close()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)


def test_a_corrupt_table_fails_its_readers_and_its_writers(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    memory.store.close()
    overwrite_root_page(memory.settings.db, "member")
    after = Memory(memory.settings.db.parent, check_bytes=1)
    assert refusal_of(after.my_chats, 1).code == "storage_failed"
    assert all_failed(after.commit(after.sends(chat, 1)))
    assert bool(after.store.failure)
    assert after.users() == [
        {"user_id": 1, "name": None}, {"user_id": 2, "name": None},
    ]  # fmt: skip
    assert after.stats.errors["DatabaseError"] == 1
    after.store.close()


@pytest.mark.parametrize(
    "change",
    [
        "kind = 'strange'", "kind = 'member_added, chat_added'", "kind = ''",
        "body = NULL", "body = ''", "body = '{}'", "body = '[3, 2, 1]'", "body = '7'",
        """body = '{"message_id":3,"read_by":2}'""",
    ],
)  # fmt: skip
def test_an_unreadable_event_fails_its_readers_and_the_next_start(
    memory: Memory, change: str
) -> None:
    chat = memory.chat(1, 2)
    memory.send(chat, 1)
    memory.do(memory.store.mark_read, 2, 3)
    assert memory.seqs(2) == [2, 3, 4]
    memory.store._writer.execute(f"UPDATE event SET {change} WHERE seq = 4")
    assert refusal_of(memory.page, 2).code == "storage_failed"
    assert memory.seqs(2, 4) == []
    assert memory.stats.errors["DatabaseError"] == 1
    assert "event 4, a " in usage_error_of(memory.again)


def test_reads_fail_after_the_file_was_removed(memory: Memory) -> None:
    memory.settings.db.unlink()
    assert refusal_of(memory.my_chats, 1).code == "storage_failed"


# --- what was deleted is gone --------------------------------------------------------


LONG = {
    "short": "Geheimnis!",
    "in one page": "Geheimnis " * 300,
    "4000 letters of 4 bytes": "\U0001f600\U0001f601" * 2000,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
@pytest.mark.parametrize("deletes", [True, False])
def test_a_deleted_text_is_in_no_byte_of_the_files_after_an_erasure(
    memory: Memory, text: str, deletes: bool
) -> None:
    chat, part = memory.chat(1, 2), text[:10].encode()
    sent = memory.send(chat, 1, text).message
    assert memory.store._truncate()
    assert part in memory.store.path.read_bytes()
    if deletes:
        memory.delete(1, sent.id)
    else:
        memory.edit(1, sent.id, "x")
    assert part in memory.files()  # until the WAL is truncated
    assert memory.store._truncate()
    assert part not in memory.files()
    assert not chatd.file_bytes(memory.store.wal)
    memory_is_sound(memory)


READER = """
import sqlite3, sys
db = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True, isolation_level=None)
db.execute("BEGIN")
print(db.execute("SELECT count(*) FROM message").fetchone(), flush=True)
sys.stdin.readline()
"""


def test_another_process_that_reads_delays_an_erasure_and_nothing_else(
    memory: Memory,
) -> None:
    chat = memory.chat(1, 2)
    sent = memory.send(chat, 1, "Geheimnis").message
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(memory.store.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"(1,)\n"
        memory.delete(1, sent.id)
        began = time.monotonic()
        assert not memory.store._truncate()
        assert time.monotonic() - began < 2  # it does not wait the usual 5 s
        assert b"Geheimnis" in memory.files()
        memory.send(chat, 1, "meanwhile")
        reader.communicate(b"\n")
    assert memory.store._truncate()
    assert b"Geheimnis" not in memory.files()
    assert memory.store._writer.execute("PRAGMA busy_timeout").fetchone() == (5000,)


@with_server()
async def test_an_idle_server_erases_what_was_deleted_and_writes_no_more(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    await trio.sleep(2)
    (message,) = await server.post(chat, "Geheimnis", sender=6)
    await server.command("DELETE", f"/api/v1/messages/{message}")
    files = (server.store.path, server.store.wal)
    assert b"Geheimnis" in b"".join(path.read_bytes() for path in files)
    await trio.sleep(32)
    assert b"Geheimnis" not in b"".join(path.read_bytes() for path in files)
    assert not chatd.file_bytes(server.store.wal)
    times = [path.stat().st_mtime_ns for path in files]
    await trio.sleep(100)
    assert [path.stat().st_mtime_ns for path in files] == times


@with_server()
async def test_an_erasure_is_tried_each_second_while_another_process_reads(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer = await server.join(6)
    sent = await peer.ask("send_message", chat_id=chat, content="Geheimnis")
    files = (server.store.path, server.store.wal)
    uri = f"file:{server.store.path}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as reader:
        reader.executescript("BEGIN; SELECT * FROM message")
        assert (await peer.ask("delete_message", message_id=sent["message_id"]))["rev"]
        await trio.sleep(50)
        with taking(0):
            assert (await peer.ask("send_message", chat_id=chat, content="x"))["n"] == 2
        assert b"Geheimnis" in b"".join(path.read_bytes() for path in files)
    await trio.sleep(2)
    assert b"Geheimnis" not in b"".join(path.read_bytes() for path in files)


async def test_what_was_deleted_just_before_a_kill_is_gone_soon_after_the_next_start(
    server: ServerProcess,
) -> None:
    def files() -> bytes:
        paths = (server.db, chatd.wal_of(server.db))
        return b"".join(path.read_bytes() for path in paths if path.exists())

    async with server.serving():
        chat = await server.chat(1, 2)
        message = (await server.post(chat, 1, "Geheimnis"))["id"]
        await server.want(204, f"DELETE /api/v1/messages/{message}", server.token(1))
        await server.kill()
        assert b"Geheimnis" in files()
        await server.begin()
        await wait_until(lambda: b"Geheimnis" not in files())
        (left,) = await server.history(chat, 2)
        assert (left["content"], left["deleted"]) == ("", True)
        await server.stop()


async def test_readers_of_chatd_itself_delay_no_erasure(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.store._run_sync = trio.to_thread.run_sync
    chat = memory.chat(1, 2)
    for _ in range(300):
        memory.send(chat, 1, "Geheimnis")

    async def search() -> None:
        while True:
            await memory.store.read(
                lambda db: db.execute("SELECT count(*) FROM message a, message b")
                .fetchall()
            )  # fmt: skip

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(search)
        await trio.testing.wait_all_tasks_blocked()
        for message in range(3, 303):
            memory.delete(None, message)
        nursery.start_soon(memory.store.erase)
        await trio.sleep(2)
        assert b"Geheimnis" not in memory.files()
        nursery.cancel_scope.cancel()
    assert memory.store._read_limiter.total_tokens == chatd.READERS
    memory.store.close()


async def test_a_long_queue_of_readers_delays_no_erasure(
    memory: Memory, autojump_clock: trio.testing.MockClock
) -> None:
    async def run_slowly(
        function: Callable[..., Any], *args: Any, limiter: trio.CapacityLimiter
    ) -> Any:
        async with limiter:
            await trio.sleep(0.13)  # a list of 2,000 chats takes so long
            return function(*args)

    async def read() -> None:
        while True:
            await memory.store.read(lambda db: db.execute("SELECT 1").fetchone())

    memory.store._run_sync = run_slowly
    sent = memory.send(memory.chat(1, 2), 1, "Geheimnis").message
    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(read)
        await trio.sleep(1)
        memory.delete(1, sent.id)
        nursery.start_soon(memory.store.erase)
        await trio.sleep(60)
        assert b"Geheimnis" not in memory.files()
        nursery.cancel_scope.cancel()
    memory_is_sound(memory)


async def test_an_erasure_that_the_disk_refuses_is_tried_again(
    memory: Memory, autojump_clock: trio.testing.MockClock
) -> None:
    sent = memory.send(memory.chat(1, 2), 1, "Geheimnis" * 1000).message
    memory.delete(1, sent.id)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(memory.store.erase)
        with no_file_grows(memory.store.path):
            await trio.sleep(5)
            assert b"Geheimnis" in memory.files()
        await trio.sleep(2)
        assert b"Geheimnis" not in memory.files()
        nursery.cancel_scope.cancel()
    memory_is_sound(memory)


# --- opening -------------------------------------------------------------------------


def open_store(path: Path, steps: list[str] | None = None) -> Store:
    with pytest.MonkeyPatch.context() as patch:
        if steps:
            patch.setattr(chatd, "schema_steps", lambda: steps)
        return memory_store(Settings(db=path))


def steps_with(*more: str) -> list[str]:
    """The steps of schema.sql, and more steps."""
    return [*chatd.schema_steps(), *more]


def version_and_names(path: Path) -> tuple[int, set[str]]:
    db = sqlite3.connect(path)
    (version,) = db.execute("PRAGMA user_version").fetchone()
    names = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
    db.close()
    return version, names


def test_an_older_schema_is_migrated_and_loses_nothing(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    chat = memory.chat(1, 2)
    memory.send(chat, 1)
    memory.store.close()
    steps = steps_with("CREATE TABLE more (x) STRICT;".replace("x", "x INTEGER"))
    store = open_store(memory.settings.db, steps)
    assert (store.seq, store.epoch) == (3, memory.store.epoch)
    store.close()
    version, names = version_and_names(memory.settings.db)
    assert (version, "more" in names) == (3, True)
    message = usage_error_of(open_store, memory.settings.db)  # a downgrade is refused
    assert "newer chatd (schema 3, this one knows 2)" in message
    assert "install" in message


@pytest.mark.parametrize(
    "step",
    [
        "CREATE TABLE more (x INTEGER); CREATE TABLE more (x INTEGER);",
        "CREATE TABLE more (x INTEGER); not SQL;",
        "CREATE TABLE more (x INTEGER); INSERT INTO meta VALUES ('epoch', 'x');",
    ],
)
def test_a_failed_migration_changes_nothing(tmp_path: Path, step: str) -> None:
    memory = Memory(tmp_path)
    memory.chat(1, 2)
    memory.store.close()
    before = version_and_names(memory.settings.db)
    message = usage_error_of(open_store, memory.settings.db, steps_with(step))
    assert str(memory.settings.db) in message
    assert version_and_names(memory.settings.db) == before
    assert before[0] == 2
    assert open_store(memory.settings.db).seq == 2


def test_a_migration_runs_only_the_missing_steps(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    one, two, three = (f"CREATE TABLE t{i} (x INTEGER);" for i in (1, 2, 3))
    open_store(path, steps_with(one)).close()
    open_store(path, steps_with(one, two, three)).close()
    assert version_and_names(path)[0] == 5
    assert {"t1", "t2", "t3"} < version_and_names(path)[1]


def test_the_schema_has_one_step_per_version() -> None:
    text = Path(chatd.__file__).with_name("schema.sql").read_text("utf-8")
    versions = re.findall(r"(?m)^-- version (\d+)$", text)
    assert versions == [str(n) for n in range(1, len(chatd.schema_steps()) + 1)]


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_file_of_another_program_is_refused_and_left_unchanged(
    tmp_path: Path, mode: str
) -> None:
    path = tmp_path / "other.db"
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA journal_mode = {mode}")
    db.execute("CREATE TABLE notes (x)")
    db.close()
    before = path.read_bytes()
    assert "belongs to another program" in usage_error_of(open_store, path)
    assert path.read_bytes() == before
    assert mode == "wal" or [*tmp_path.iterdir()] == [path]
    assert version_and_names(path) == (0, {"notes"})


def test_a_file_that_is_not_a_database_is_refused_and_left_unchanged(
    tmp_path: Path,
) -> None:
    path = tmp_path / "notes.txt"
    for text in (b"Buy milk.\n" * 500, b"SQLite format 3\0" + b"\xff" * 5000):
        path.write_bytes(text)
        assert str(path) in usage_error_of(open_store, path)
        assert path.read_bytes() == text


def test_a_connection_to_an_unusable_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"Buy milk.\n" * 500)
    with pytest.raises(sqlite3.DatabaseError):
        chatd.open_database(path, readonly=False)
    with pytest.raises(sqlite3.OperationalError):
        chatd.open_database(tmp_path / "none", readonly=True)


def copy_as_killed(folder: Path) -> Path:
    """Copy the database and its WAL as a killed process leaves them."""
    copy = folder / "copy"
    copy.mkdir()
    for name in ("chatd.db", "chatd.db-wal"):
        (copy / name).write_bytes((folder / name).read_bytes())
    return copy


def test_a_start_reads_the_wal_that_a_killed_process_left(
    memory: Memory, tmp_path: Path
) -> None:
    chat = memory.chat(1, 2)
    memory.send(chat, 1, "once", "k")
    after = Memory(copy_as_killed(tmp_path))
    assert (after.hub.head, after.seqs(2)) == (3, [2, 3])
    assert after.send(chat, 1, "once", "k").duplicate
    memory_is_sound(after)
    after.store.close()


def record_resyncs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Record each fsync: the inode, and how many bytes were rewritten before it."""
    written: dict[int, int] = {}
    resynced: list[tuple[int, int]] = []
    pwrite, fsync = os.pwrite, os.fsync

    def noted_pwrite(fd: int, data: bytes, at: int) -> int:
        assert os.pread(fd, len(data), at) == data  # the same bytes as before
        count = pwrite(fd, data, at)
        written[fd] = at + count
        return count

    def noted_fsync(fd: int) -> None:
        fsync(fd)
        resynced.append((os.fstat(fd).st_ino, written.pop(fd, 0)))

    monkeypatch.setattr(os, "pwrite", noted_pwrite)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    return resynced


def test_a_start_syncs_the_wal_that_a_killed_process_left(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.send(memory.chat(1, 2), 1)
    copy = copy_as_killed(tmp_path)
    wal = (copy / "chatd.db-wal").stat()
    resynced = record_resyncs(monkeypatch)
    after = Memory(copy)
    assert resynced == [(wal.st_ino, wal.st_size)]
    assert after.hub.head == 3
    after.store.close()


def test_after_a_failed_fsync_the_whole_wal_is_rewritten(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    fail_next_commit(memory, "SQLITE_IOERR_FSYNC")
    assert all_failed(memory.commit(memory.sends(chat, 1)))
    wal = store.wal.stat()
    resynced = record_resyncs(monkeypatch)
    assert len(store._probe().events) == 1
    assert resynced == [(wal.st_ino, wal.st_size)]


def test_a_probe_frees_space_with_a_checkpoint_of_the_wal(memory: Memory) -> None:
    chat, store = memory.chat(1, 2), memory.store
    for _ in range(100):
        memory.send(chat, 1, "x" * 4000)
    with no_file_grows(memory.settings.db.with_name("chatd.db-wal")):
        work = memory.sends(chat, 1, "x" * 4000)
        assert all_failed(memory.commit(work))
        assert bool(store.failure)
        assert store._probe() == ([], [])
        assert not bool(store.failure)
        assert memory.do(*work).message.n == 101
    memory_is_sound(memory)


def test_storage_still_fails_if_the_wal_cannot_be_rewritten(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    chat, store = memory.chat(1, 2), memory.store
    fail_next_commit(memory, "SQLITE_IOERR_FSYNC")
    assert all_failed(memory.commit(memory.sends(chat, 1)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        assert store._probe() == ([], [])
        assert bool(store.failure)
    assert len(store._probe().events) == 1
    assert not bool(store.failure)


def test_an_error_names_a_path_that_cannot_be_a_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "a.db"):
        assert f"database {path}: " in usage_error_of(open_store, path)


def test_a_start_with_a_corrupt_event_log_fails_and_names_the_file(
    tmp_path: Path,
) -> None:
    memory = Memory(tmp_path)
    memory.chat(1, 2)
    memory.store.close()
    overwrite_root_page(memory.settings.db, "event")
    assert str(memory.settings.db) in usage_error_of(open_store, memory.settings.db)


@contextlib.contextmanager
def as_unprivileged_user(folder: Path) -> Iterator[None]:
    """Run as a user that file modes apply to; they do not apply to root."""
    if os.geteuid() != 0:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        # That user may not enter the checkout, which may be in /root.
        shutil.copy(chatd.ASSETS / "schema.sql", folder)
        patch.setattr(chatd, "ASSETS", folder)
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)


def test_a_file_without_write_permission_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.db"
        open_store(path).close()
        path.chmod(0o400)
        with as_unprivileged_user(path.parent):
            assert "ermission denied" in usage_error_of(open_store, path)


def test_each_new_file_has_an_epoch_of_its_own_and_keeps_it(tmp_path: Path) -> None:
    one, two = (open_store(tmp_path / name) for name in ("a.db", "b.db"))
    assert one.epoch != two.epoch
    assert re.fullmatch(r"[0-9a-z]{4,16}", one.epoch)
    for store in (one, two):
        store.close()
    again = open_store(tmp_path / "a.db")
    assert (again.epoch, again.seq) == (one.epoch, 0)
    again.close()


# --- storage that fails, as a client sees it -----------------------------------------


@with_server()
async def test_a_full_disk_is_reported_acks_nothing_and_recovers_without_a_restart(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer, friend = await server.join(6), await server.join(7)
    db = server.store._writer
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")
    command = {"chat_id": chat, "content": "й" * 4000, "client_id": "k"}
    error = await peer.refused("send_message", **command)
    assert (error["code"], error["retry_after"]) == ("storage_failed", 2)
    over_http = await server.ask(
        "POST", f"/api/v1/chats/{chat}/messages", {"content": "й" * 4000}, user=7
    )
    assert (over_http.status, over_http.code) == (503, "storage_failed")
    assert over_http.headers["retry-after"] == "2"
    health = await server.ask("GET", "/healthz")
    assert (health.status, health.json) == (503, {"status": "degraded"})
    reading = await server.ask("GET", "/api/v1/chats", user=7)
    assert reading.status == 200
    assert (await server.stats())["store"]["degraded"] is True
    await friend.receives_nothing()
    db.execute("PRAGMA max_page_count = 1000000")
    await trio.sleep(2)
    assert (await server.ask("GET", "/healthz")).status == 200
    ack = await peer.ask("send_message", **command)
    assert (ack["n"], ack["duplicate"]) == (1, False)
    assert (await friend.receive("new_message"))["message"]["n"] == 1


@with_server()
async def test_the_server_survives_a_database_path_that_fails_for_a_while(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer = await server.join(6)
    folder = server.store.path.parent
    aside = folder.with_name(f"{folder.name}-aside")
    folder.rename(aside)
    folder.symlink_to(folder)  # a loop: to resolve it is an OSError
    await trio.sleep(10)
    command = {"chat_id": chat, "content": "hi", "client_id": "k"}
    assert (await peer.refused("send_message", **command))["code"] == "storage_failed"
    assert (await server.ask("GET", "/api/v1/chats", user=7)).status == 200
    await trio.sleep(10)
    assert (await server.ask("GET", "/healthz")).status == 503
    folder.unlink()
    aside.rename(folder)
    await trio.sleep(2)
    assert (await server.ask("GET", "/healthz")).status == 200
    assert (await peer.ask("send_message", **command))["duplicate"]
