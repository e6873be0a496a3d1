"""The hub: seats, users, the tail, deadlines, and any interleaving of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from msgspec.structs import replace

import chatd
from chatd import Job, Refusal
from tests.harness import (
    Greeting,
    Memory,
    MemorySeat,
    MemoryWork,
    memory_frames,
    memory_is_sound,
    memory_job,
    memory_with,
    refusal_of,
)

# --- seats ---------------------------------------------------------------------------


def test_a_message_reaches_the_live_seats_of_all_members_at_once(
    memory: Memory,
) -> None:
    chat = memory.chat(1, 2)
    seats = [memory.sit(user) for user in (1, 1, 2, 3)]
    memory.send(chat, 1)
    assert [made.seqs() for made in seats] == [[3], [3], [3], []]
    assert memory.stats.deliveries == 3
    assert seats[0].outbox.taken[0] is seats[2].outbox.taken[0]  # built once


def test_a_batch_is_one_write_per_seat_with_its_events_in_order(memory: Memory) -> None:
    chats = [memory.chat(1, 2), memory.chat(1, 3)]
    seats = {user: memory.sit(user) for user in (1, 2, 3)}
    works = [memory.sends(chats[i % 2], 1) for i in range(4)]
    memory.hub.publish(memory.commit(*works))
    assert [made.seqs() for made in seats.values()] == [[5, 6, 7, 8], [5, 7], [6, 8]]
    assert [len(made.outbox.taken) for made in seats.values()] == [1, 1, 1]


def test_a_membership_change_takes_effect_at_its_place_in_the_batch(
    memory: Memory,
) -> None:
    chat = memory.chat(1, 2)
    seats = {user: memory.sit(user) for user in (1, 2, 3)}
    send = memory.sends(chat, 1)
    batch = memory.commit(
        send,  # 3
        (memory.chats.add_member, chat, 3, 1),  # 4, 5
        send,  # 6
        (memory.chats.remove_member, chat, 2, 2),  # 7
        send,  # 8
        (memory.chats.remove_member, chat, 3, 3),  # 9
        (memory.chats.add_member, chat, 2, 1),  # 10, 11
        send,  # 12
    )
    memory.hub.publish(batch)
    assert seats[1].seqs() == [3, 4, 6, 7, 8, 9, 10, 12]
    assert seats[2].seqs() == [3, 4, 6, 7, 11, 12]
    assert seats[3].seqs() == [5, 6, 7, 8, 9]
    assert memory.hub.live_seats[chat] == {seats[1].seat, seats[2].seat}


def job_with_ack(made: MemorySeat, work: MemoryWork) -> Job:
    """A job of this seat. Its answer is an ack with the seq of its event."""

    def done(outcome: Any) -> chatd.Reply:
        seq = outcome.message.id if isinstance(outcome, chatd.Sent) else outcome.seq
        return chatd.Reply(chatd.text_frame(chatd.Ack(message_id=seq)), seq)

    made.seat.slots.acquire_nowait()
    return memory_job(*work, done=done, seat=made.seat)


def seqs_and_acks(made: MemorySeat) -> list[str]:
    """What a seat received, in short: the seq of an event, and "a" + seq for an ack."""
    return [
        str(message["seq"]) if "seq" in message else f"a{message['message_id']}"
        for message in made.received()
    ]


def test_a_live_seat_gets_its_events_before_their_acks_in_one_write(
    memory: Memory,
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    made, other = memory.sit(1), memory.sit(1)
    jobs = [job_with_ack(made, memory.sends(chat, 1, "x")) for _ in range(2)]
    assert made.seat.slots.value == chatd.UNANSWERED - 2
    memory.hub.publish(store._transact(jobs))
    assert seqs_and_acks(made) == ["3", "4", "a3", "a4"]
    assert (seqs_and_acks(other), len(made.outbox.taken)) == (["3", "4"], 1)
    assert made.seat.slots.value == chatd.UNANSWERED


def test_an_ack_without_an_event_is_sent_at_once(memory: Memory) -> None:
    chat, store = memory.chat(1, 2), memory.store
    memory.send(chat, 2)
    made = memory.sit(2)
    job = job_with_ack(made, (store.mark_read, 2, 3))
    memory.hub.publish(store._transact([job]))
    assert seqs_and_acks(made) == ["a0"]


def test_an_ack_waits_for_its_event_on_a_seat_that_is_catching_up(
    memory: Memory,
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    made = memory.enter(1)
    memory.hub.set_chats(made.seat.person, memory.greeting(1).joined)
    jobs = [
        job_with_ack(made, memory.sends(chat, 1, "x")),
        job_with_ack(made, (store.mark_read, 1, 3)),  # the mark does not move: no event
    ]
    memory.hub.publish(store._transact(jobs))
    assert seqs_and_acks(made) == ["a0"]
    memory.catch_up(made)
    assert seqs_and_acks(made) == ["a0", "3", "a3"]
    assert made.seat.slots.value == chatd.UNANSWERED
    assert made.seat.held == []


def test_an_ack_waits_for_its_event_on_a_seat_that_reads_pages() -> None:
    with memory_with(page_events=2, tail_events=1) as memory:
        chat, store = memory.chat(1, 2), memory.store
        made = memory.enter(2)
        memory.hub.set_chats(made.seat.person, memory.greeting(2).joined)
        jobs = [job_with_ack(made, memory.sends(chat, 2, str(i))) for i in range(4)]
        memory.hub.publish(store._transact(jobs))
        memory.catch_up(made)
        assert seqs_and_acks(made) == ["3", "4", "a3", "a4", "5", "6", "a5", "a6"]


def test_a_seat_with_a_full_outbox_gets_the_whole_batch_later(memory: Memory) -> None:
    chat, store = memory.chat(1, 2), memory.store
    slow, fast = memory.sit(2), memory.sit(2)
    slow.outbox.bound, slow.outbox.stuck = 1, True
    memory.send(chat, 1)
    assert (slow.seqs(), slow.seat.live, slow.fell) == ([3], True, 0)
    job = job_with_ack(slow, memory.sends(chat, 2))  # a message_read follows it
    memory.hub.publish(store._transact([job]))
    assert (seqs_and_acks(slow), slow.seat.live, slow.fell) == (["3"], False, 1)
    assert slow.seat.cursor == 3
    memory.send(chat, 2)
    slow.outbox.drain()
    memory.catch_up(slow)
    assert seqs_and_acks(slow) == ["3", "4", "5", "6", "a4"]
    assert (fast.seqs(), slow.fell) == ([3, 4, 5, 6], 1)
    memory.send(chat, 2)
    assert slow.seqs() == fast.seqs() == [3, 4, 5, 6, 7]


def test_a_seat_behind_the_tail_reads_pages_and_then_the_tail() -> None:
    with memory_with(tail_events=4, page_events=3) as memory:
        chat = memory.chat(1, 2)
        for _ in range(20):
            memory.send(chat, 1)
        made = memory.enter(2)
        made.seat.cursor = 0
        memory.hub.set_chats(made.seat.person, memory.greeting(2).joined)
        assert not memory.hub.in_tail(0)
        memory.catch_up(made)
        assert made.seqs() == [2, *range(3, 23)]
        assert len(made.outbox.taken) > 5
        memory.send(chat, 1)
        assert made.seqs()[-1] == 23


def test_one_push_from_the_tail_is_bounded_in_bytes() -> None:
    with memory_with(page_bytes=5000) as memory:
        chat = memory.chat(1, 2)
        for _ in range(10):
            memory.send(chat, 1, "x" * 2000)
        made = memory.enter(2)
        made.seat.cursor = 2
        memory.hub.set_chats(made.seat.person, memory.greeting(2).joined)
        memory.hub.push_tail(made.seat)
        assert (made.seqs(), made.seat.live) == ([3, 4, 5], False)  # 2,000 bytes each
        memory.catch_up(made)
        assert made.seqs() == [*range(3, 13)]


def test_the_tail_is_bounded_in_events_and_keeps_the_newest() -> None:
    with memory_with(tail_events=16) as memory:
        chat, hub = memory.chat(1, 2), memory.hub
        for _ in range(60):
            memory.send(chat, 1)
            assert [event.seq for event in hub.tail] == [
                *range(hub.head - len(hub.tail) + 1, hub.head + 1)
            ]
            assert len(hub.tail) <= 16
            assert hub.tail_size == sum(event.size for event in hub.tail)
        assert len(hub.tail) >= 14
        assert hub.in_tail(hub.head - len(hub.tail))
        assert not hub.in_tail(hub.head - len(hub.tail) - 1)


def test_the_tail_is_bounded_in_bytes_too() -> None:
    with memory_with(tail_bytes=100_000) as memory:
        chat = memory.chat(1, 2)
        for _ in range(60):
            memory.send(chat, 1, "x" * 4000)
        assert memory.hub.tail_size <= 100_000
        assert 6 <= len(memory.hub.tail) <= 12


def test_the_size_of_an_event_in_the_tail_covers_its_frame(memory: Memory) -> None:
    chat = memory.chat(*range(1, 500))
    memory.do(memory.chats.add_member, chat, 1000, 1)
    memory.send(chat, 1, "x" * 4000)
    for event in [*memory.hub.tail][-2:]:
        assert event.size >= len(event.frame), event.kind


def test_a_restart_restores_the_tail_from_the_event_log(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    chat = memory.chat(1, 2)
    memory.do(memory.chats.rename, 3, "Carol")
    memory.do(memory.chats.add_member, chat, 3, 1)
    sent = memory.send(chat, 1, "Привет!", "k")
    memory.do(memory.store.mark_read, 2, sent.message.id)
    memory.do(memory.chats.remove_member, chat, 3, 3)
    frames = [event.frame for event in memory.hub.tail]
    after = memory.again()
    # chat_added holds the chat as it is now, so those events come from the event log.
    assert [event.frame for event in after.hub.tail] == frames[4:]
    assert (after.hub.head, after.hub.in_tail(4), after.hub.in_tail(3)) == (
        7,
        True,
        False,
    )
    assert after.store.epoch == memory.store.epoch
    assert after.sit(2, cursor=0).seqs() == [2, 3, 5, 6, 7]
    last = after.again(tail_events=2)
    assert [event.frame for event in last.hub.tail] == frames[5:]
    last.store.close()


def test_a_new_database_has_an_empty_event_log_and_nothing_to_replay(
    memory: Memory,
) -> None:
    assert ([*memory.hub.tail], memory.hub.head) == ([], 0)
    assert memory.hub.in_tail(0)
    assert memory.sit(1, cursor=0).received() == []


def test_the_connections_of_one_user_are_bounded() -> None:
    with memory_with(connections_per_user=2) as memory:
        seats = [memory.enter(1), memory.enter(1)]
        refused = MemorySeat().seat
        assert not memory.hub.enter(refused)
        assert len(memory.hub.people[1].seats) == 2
        memory.enter(2)
        memory.hub.leave(seats[0].seat)
        assert memory.hub.enter(refused)


def test_a_seat_that_leaves_leaves_nothing_behind(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    seats = [memory.sit(1), memory.sit(1), memory.sit(2)]
    for made in seats:
        memory.hub.leave(made.seat)
    memory.send(chat, 1)
    assert (memory.hub.people, memory.hub.live_seats) == ({}, {})
    assert [made.seqs() for made in seats] == [[], [], []]


def test_a_page_that_is_read_after_the_seat_left_joins_no_room(memory: Memory) -> None:
    memory.chat(1, 2)
    made = memory.enter(2)
    memory.hub.set_chats(made.seat.person, memory.greeting(2).joined)
    page = memory.store.events_after(memory.store._writer, 2, 0, memory.hub.head, 9)
    memory.hub.leave(made.seat)
    memory.hub.push_page(made.seat, page)
    assert page.cursor == memory.hub.head
    assert (made.seat.live, memory.hub.live_seats) == (False, {})


def test_membership_changes_during_the_read_of_the_chats_are_not_missed(
    memory: Memory,
) -> None:
    chats = [memory.chat(1, 2), memory.chat(1, 2)]
    made = memory.enter(2)
    greeting = memory.greeting(2)  # read before the changes
    memory.do(memory.chats.remove_member, chats[0], 2, 2)
    third = memory.chat(1, 2)
    memory.do(memory.chats.remove_member, chats[1], 2, 2)
    memory.do(memory.chats.add_member, chats[1], 2, 1)
    memory.hub.set_chats(made.seat.person, greeting.joined)
    assert made.seat.person.chats == {third: 7, chats[1]: 10}
    memory.catch_up(made)
    assert made.seqs() == [5, 7, 8, 10]
    assert memory.hub.live_seats[third] == {made.seat}
    assert chats[0] not in memory.hub.live_seats


def test_a_removal_may_be_read_before_it_is_published(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    made = memory.enter(2)
    batch = memory.commit((memory.chats.remove_member, chat, 2, 2))
    memory.hub.set_chats(made.seat.person, memory.greeting(2).joined)
    memory.catch_up(made)
    memory.hub.publish(batch)
    assert (made.seqs(), made.seat.person.chats) == ([3], {})


def test_only_the_first_read_of_the_chats_of_a_user_counts(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    seats = [memory.enter(2), memory.enter(2)]
    person = seats[0].seat.person
    memory.hub.set_chats(person, {chat: 2})
    memory.do(memory.chats.remove_member, chat, 2, 2)
    memory.hub.set_chats(person, {chat: 2})  # read before the removal, applied after it
    assert (person.chats, memory.hub.live_seats) == ({}, {})


def test_a_seat_that_leaves_before_its_chats_are_read_joins_no_room(
    memory: Memory,
) -> None:
    made = memory.enter(2)
    memory.hub.leave(made.seat)
    memory.hub.set_chats(made.seat.person, {memory.chat(1, 2): 2})
    assert (memory.hub.live_seats, memory.hub.people) == ({}, {})


def test_a_page_is_filtered_again_when_it_is_pushed(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    memory.send(chat, 1)
    made = memory.enter(2)
    made.seat.cursor = 0
    memory.hub.set_chats(made.seat.person, memory.greeting(2).joined)
    page = memory.page(2)  # read before the removal
    memory.do(memory.chats.remove_member, chat, 2, None)
    memory.hub.push_page(made.seat, page)
    assert (made.seqs(), made.seat.cursor, made.seat.live) == ([2], 3, False)
    memory.catch_up(made)
    assert made.seqs() == [2, 4]
    assert made.received()[0]["chat"]["members"] == []


def test_typing_goes_to_other_members_that_are_live_with_an_empty_outbox(
    memory: Memory,
) -> None:
    chat = memory.chat(1, 2, 3)
    own, live, busy = memory.sit(1), memory.sit(2), memory.sit(3)
    behind, stranger = memory.enter(3), memory.sit(4)
    busy.outbox.stuck = True
    busy.outbox.push(b"")
    busy.outbox.unsent = 1
    memory.hub.show_typing(1, chat, is_typing=True)
    memory.hub.show_typing(1, 99, is_typing=True)
    assert live.received() == [
        {"type": "typing", "chat_id": chat, "user_id": 1, "is_typing": True}
    ]
    assert not any(made.received() for made in (own, busy, behind, stranger))
    assert memory.count("event") == 3


# --- deadlines of a seat -------------------------------------------------------------


@pytest.fixture
def swept() -> MemorySeat:
    """A seat that is pinged after exactly 25 s of silence."""
    made = MemorySeat()
    made.seat.ping_after = 25.0
    return made


def test_a_silent_seat_with_an_empty_outbox_is_pinged_once(swept: MemorySeat) -> None:
    assert swept.seat.sweep(25.0) is None
    assert swept.outbox.taken == []
    assert swept.seat.sweep(25.1) is None
    assert swept.seat.sweep(30.0) is None
    assert swept.outbox.taken == [chatd.PING_FRAME]


def test_a_seat_that_does_not_answer_a_ping_is_silent(swept: MemorySeat) -> None:
    swept.seat.sweep(26.0)
    assert swept.seat.sweep(36.0) is None
    assert swept.seat.sweep(36.1) == "silent"


def test_any_received_byte_answers_a_ping(swept: MemorySeat) -> None:
    swept.seat.sweep(26.0)
    swept.outbox.received_at = 30.0
    assert [swept.seat.sweep(now) for now in (37.0, 55.0, 55.1)] == [None] * 3
    assert len(swept.outbox.taken) == 2


def test_while_output_is_queued_only_the_stall_limit_applies(swept: MemorySeat) -> None:
    swept.seat.sweep(26.0)
    swept.outbox.unsent = 1
    swept.outbox.moved_at = 30.0
    assert [swept.seat.sweep(now) for now in (38.0, 70.0)] == [None, None]
    assert swept.seat.sweep(70.1) == "stalled"
    swept.outbox.received_at = 70.0  # it sends, but does not read
    assert swept.seat.sweep(70.1) == "stalled"
    swept.outbox.moved_at = 60.0
    assert [swept.seat.sweep(now) for now in (70.1, 100.0)] == [None, None]
    swept.outbox.drain()
    assert swept.seat.sweep(95.0) is None
    assert len(swept.outbox.taken) == 1  # no ping while output was queued


def test_an_unanswered_ping_is_forgotten_while_output_is_queued(
    swept: MemorySeat,
) -> None:
    swept.seat.sweep(26.0)
    swept.outbox.unsent, swept.outbox.moved_at = 1, 35.0
    swept.seat.sweep(35.0)
    swept.outbox.drain()
    assert swept.seat.sweep(37.0) is None  # pinged again
    assert len(swept.outbox.taken) == 2


def test_a_seat_is_not_pinged_while_the_server_does_not_read_from_it(
    swept: MemorySeat,
) -> None:
    swept.seat.sweep(26.0)
    swept.outbox.listening = False  # a command of this client is not finished yet
    assert [swept.seat.sweep(now) for now in (37.0, 90.0)] == [None, None]
    swept.outbox.listening = True
    assert swept.seat.sweep(91.0) is None
    assert len(swept.outbox.taken) == 2


def test_pings_are_spread_by_ten_percent() -> None:
    after = {MemorySeat().seat.ping_after for _ in range(50)}
    assert len(after) > 10
    assert all(22.5 <= seconds <= 27.5 for seconds in after)


def test_the_end_of_a_token_is_announced_once_and_closes_after_the_grace(
    swept: MemorySeat,
) -> None:
    swept.seat.warned = False  # as of `connected`
    for left in (60.1, 60.0, 50.0, 0.0, -24.9):
        swept.seat.sweep_token(left)
    assert swept.received() == [{"type": "token_expiring", "expires_in": 60}]
    assert swept.ended == []
    swept.seat.sweep_token(-25.0)
    assert [code for code, _ in swept.ended] == [4401]


# --- any interleaving, against a model -----------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelEvent:
    """An event of the model, with the users that may see it."""

    kind: str
    chat: int
    to_chat: bool
    to_user: int | None = None


class Model:
    """A naive chat server: lists, and the rule of visibility.

    It shares no code with the store, so a mistake in either one shows as a difference.
    """

    def __init__(self, large_chat: int = 50) -> None:
        self.large_chat = large_chat
        self.log: list[ModelEvent] = []
        self.members: dict[int, dict[int, int]] = {}  # chat: user: joined_seq
        self.read: dict[tuple[int, int], int] = {}  # chat, user: read_n
        self.messages: dict[int, list[int]] = {}  # chat: seqs
        self.senders: dict[int, int] = {}  # seq of a message: its sender
        # at[n] is self.members as of the first n events.
        self.at: list[dict[int, dict[int, int]]] = [{}]

    def _log(self, event: ModelEvent) -> int:
        self.log.append(event)
        self.at.append({chat: dict(users) for chat, users in self.members.items()})
        return len(self.log)

    def sees(self, user: int, seq: int, as_of: int) -> bool:
        """Whether a user may see the event, when the event log had as_of events."""
        event = self.log[seq - 1]
        joined = self.at[as_of].get(event.chat, {}).get(user)
        in_chat = event.to_chat and joined is not None and seq > joined
        return event.to_user == user or in_chat

    def visible(self, user: int, after: int, upto: int) -> list[int]:
        seqs = range(after + 1, upto + 1)
        return [seq for seq in seqs if self.sees(user, seq, upto)]

    # Each of these methods returns whether the work is allowed.

    def create(self, *users: int) -> bool:
        chat = len(self.members) + 1
        self.members[chat], self.messages[chat] = {}, []
        for user in sorted({*users}):
            self.members[chat][user] = len(self.log) + 1
            self.read[chat, user] = 0
            self._log(ModelEvent("chat_added", chat, to_chat=False, to_user=user))
        return True

    def send(self, chat: int, user: int, *, service: bool = False) -> bool:
        is_member = user in self.members.get(chat, {})
        if not is_member and not (service and chat in self.members):
            return False
        unread = is_member and self.read[chat, user] < len(self.messages[chat])
        seq = self._log(ModelEvent("new_message", chat, to_chat=True))
        self.messages[chat].append(seq)
        self.senders[seq] = user
        if unread and not service:
            self.mark(user, seq)
        elif is_member and not unread:
            self.read[chat, user] += 1
        return True

    def mark(self, user: int, seq: int) -> bool:
        event = self.log[seq - 1] if 1 <= seq <= len(self.log) else None
        if event is None or event.kind != "new_message":
            return False
        if user not in self.members[event.chat]:
            return False
        later = self.messages[event.chat]
        n = later.index(seq) + 1
        if n > self.read[event.chat, user]:
            while n < len(later) and self.senders[later[n]] == user:
                n += 1
            self.read[event.chat, user] = n
            large = len(self.members[event.chat]) > self.large_chat
            to_user = user if large else None
            self._log(ModelEvent("message_read", event.chat, not large, to_user))
        return True

    def add(self, chat: int, user: int) -> bool:
        if chat not in self.members:
            return False
        if user not in self.members[chat]:
            self._log(ModelEvent("member_added", chat, to_chat=True))
            self.members[chat][user] = len(self.log) + 1
            self.read[chat, user] = len(self.messages[chat])
            self._log(ModelEvent("chat_added", chat, to_chat=False, to_user=user))
        return True

    def remove(self, chat: int, user: int) -> bool:
        if user not in self.members.get(chat, {}):
            return False
        del self.members[chat][user]
        self._log(ModelEvent("member_removed", chat, to_chat=True, to_user=user))
        return True


USERS = (1, 2, 3)

# A work is its name and two small numbers: a chat and a user.
random_works = st.tuples(
    st.sampled_from(
        [*["send"] * 5, *["post"] * 2, *["mark"] * 3, *["add", "remove"] * 2]
    ),
    st.integers(1, 3),
    st.integers(1, 3),
)


def work_of(
    memory: Memory, model: Model, word: tuple[str, int, int]
) -> tuple[MemoryWork, bool]:
    """Do a work in the model; return it for the store, and whether it is allowed."""
    name, chat, user = word
    store = memory.store
    match name:
        case "send":
            return memory.sends(chat, user), model.send(chat, user)
        case "post":  # of a service, in the user's name
            post = memory.sends(chat, user, service=True)
            return post, model.send(chat, user, service=True)
        case "mark":  # the last message of the chat or the one before it
            seq = [0, *model.messages.get(chat, [])][-1 - len(model.log) % 2 :][0]
            return (store.mark_read, user, seq), model.mark(user, seq)
        case "add":
            return (memory.chats.add_member, chat, user, None), model.add(chat, user)
        case _:
            return (memory.chats.remove_member, chat, user, None), model.remove(
                chat, user
            )


def commit_both(
    memory: Memory, model: Model, words: list[tuple[str, int, int]]
) -> chatd.Batch:
    """Do works in one transaction and in the model; the events must be the same."""
    before = len(model.log)
    todo = [work_of(memory, model, word) for word in words]
    batch = memory.commit(*[work for work, _ in todo])
    refused = [isinstance(outcome, Refusal) for _, outcome in batch.outcomes]
    assert refused == [not allowed for _, allowed in todo]
    assert [
        ModelEvent(event.kind, event.chat_id, event.to_chat, event.to_user)
        for event in batch.events
    ] == model.log[before:]
    return batch


property_settings = hypothesis.settings(
    deadline=None,
    max_examples=int(os.environ.get("CHATD_TEST_EXAMPLES", "60")),
    suppress_health_check=[HealthCheck.too_slow],
)


@property_settings
@given(st.lists(st.lists(random_works, max_size=4), max_size=12))
def test_unread_is_last_n_minus_read_n_in_any_interleaving(
    batches: list[list[tuple[str, int, int]]],
) -> None:
    with memory_with() as memory:
        model = Model()
        for users in ((1, 2), (2, 3)):
            model.create(*users)
            memory.chat(*users)
        for words in batches:
            batch = commit_both(memory, model, words)
            stale = {user: memory.my_chats(user) for user in USERS}
            for chats in stale.values():  # from before the batch, still consistent
                assert all(0 <= c.unread == c.last_n - c.read_n for c in chats)
            memory.hub.publish(batch)
            for user in USERS:
                marks = {
                    chat: (len(model.messages[chat]), model.read[chat, user])
                    for chat, users in model.members.items()
                    if user in users
                }
                greeting = memory.greeting(user).marks
                assert marks == {
                    int(chat): (mark.last_n, mark.read_n)
                    for chat, mark in greeting.items()
                }
                assert {chat: last - read for chat, (last, read) in marks.items()} == {
                    chat.id: chat.unread for chat in memory.my_chats(user)
                }


class PlayClient:
    """A client that keeps a cursor and switches between a connection and the poll."""

    def __init__(self, user: int) -> None:
        self.user = user
        self.upto = 0  # the head when it connected
        self.first: int | None = None  # its first cursor
        self.cursor: int | None = None
        self.seqs: list[int] = []
        self.connection: MemorySeat | None = None
        self.greeting: Greeting | None = None  # read, not delivered yet
        self.page: chatd.Page | None = None  # the same
        # The lengths that the event log may have had at the read.
        self.moments = range(0)
        self.known = False  # `connected` was sent
        self.received = 0  # how much of its outbox


class Play:
    """A store, a hub and clients. Each public method is one step of a schedule.

    After each step, each event that a client has just received is visible to it as of
    the hub's head and comes after all earlier ones, and no cursor is ahead of the hub.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.hub = memory.hub
        self.model = Model(memory.settings.large_chat)
        self.waiting: list[chatd.Batch] = []
        self.clients = [PlayClient(user) for user in (*USERS, 2)]
        self.before = 0  # the hub's head before this step
        for users in ((1, 2), (1, 2, 3)):
            self.model.create(*users)
            memory.chat(*users)

    def commit(self, words: list[tuple[str, int, int]]) -> None:
        self.waiting.append(commit_both(self.memory, self.model, words))

    def ask(self, number: int) -> None:
        """A connected client sends a message; its ack must come after its event."""
        client = self.clients[number]
        if client.connection is None or not client.known:
            return
        if not self.model.send(1, client.user):
            return
        job = job_with_ack(client.connection, self.memory.sends(1, client.user))
        self.waiting.append(self.memory.store._transact([job]))

    def publish(self) -> None:
        if self.waiting:
            self.hub.publish(self.waiting.pop(0))

    def sit(self, number: int) -> None:
        client = self.clients[number]
        if client.connection is None and client.page is None:
            client.connection = self.memory.enter(client.user)
            client.received, client.known = 0, False
            client.upto = self.hub.head

    def read(self, number: int) -> None:
        """Begin the next read of this client: its chats, or a page."""
        client = self.clients[number]
        memory, head = self.memory, self.hub.head
        if client.page is not None or client.greeting is not None:
            return
        if client.connection is None:  # a poll
            if client.cursor is None:
                client.first = client.cursor = head
            client.page = memory.page(client.user, client.cursor, 2)
            client.moments = range(head, len(self.model.log) + 1)
        elif not client.known:
            start = client.upto if client.cursor is None else client.cursor
            client.greeting = Greeting(
                *memory.read(memory.store.greeting, client.user, client.upto, start)
            )
        elif self._is_behind(client, in_tail=False):
            client.page = memory.page(client.user, client.connection.seat.cursor, 2)

    def deliver(self, number: int) -> None:
        """Deliver the result of the read, or push a part of the tail."""
        client = self.clients[number]
        connection = client.connection
        if client.page is not None:
            page, client.page = client.page, None
            assert page.cursor <= self.hub.head
            if connection is not None:
                self.hub.push_page(connection.seat, page)
            else:
                self._take(client, [event.seq for event in page.events], client.moments)
                client.cursor = page.cursor
        elif client.greeting is not None and connection is not None:
            greeting, client.greeting = client.greeting, None
            self.hub.set_chats(connection.seat.person, greeting.joined)
            if client.cursor is None:
                client.first = client.cursor = client.upto
            assert client.cursor <= self.hub.head
            connection.seat.cursor, client.known = client.cursor, True
            if self.hub.in_tail(connection.seat.cursor):
                self.hub.push_tail(connection.seat)
        elif connection is not None and self._is_behind(client, in_tail=True):
            self.hub.push_tail(connection.seat)

    def _is_behind(self, client: PlayClient, *, in_tail: bool) -> bool:
        """Whether its outbox is empty, it is behind, and the tail has what it lacks."""
        connection = client.connection
        if connection is None or not client.known or connection.outbox.buffer:
            return False
        seat = connection.seat
        return not seat.live and self.hub.in_tail(seat.cursor) is in_tail

    def stall(self, number: int) -> None:
        """The client stops reading; the next call lets it read everything."""
        connection = self.clients[number].connection
        if connection is not None and connection.outbox.stuck:
            connection.outbox.drain()
        elif connection is not None:
            connection.outbox.stuck, connection.outbox.bound = True, 1

    def leave(self, number: int) -> None:
        client = self.clients[number]
        if client.connection is not None:
            self.hub.leave(client.connection.seat)
            client.connection = client.greeting = client.page = None

    def switch(self, number: int) -> None:
        """Switch from the connection to the poll, or back."""
        (self.sit if self.clients[number].connection is None else self.leave)(number)

    def next(self, number: int) -> None:
        """Finish the read of this client, or begin the next one."""
        client = self.clients[number]
        begun = client.page is not None or client.greeting is not None
        fed = self._is_behind(client, in_tail=True)
        (self.deliver if begun or fed else self.read)(number)

    def step(self, name: str, argument: Any) -> None:
        self.before = self.hub.head
        getattr(self, name)(argument) if name != "publish" else self.publish()
        for client in self.clients:
            self._receive(client)
        rooms: dict[int, set[chatd.Seat]] = {}
        for person in self.hub.people.values():
            for seat in person.seats:
                for chat in person.chats if seat.live else ():
                    rooms.setdefault(chat, set()).add(seat)
        assert self.hub.live_seats == rooms

    def _receive(self, client: PlayClient) -> None:
        """Read the frames of this step, and keep the cursor as a client does."""
        if client.connection is None:
            return
        news = client.connection.outbox.taken[client.received :]
        client.received += len(news)
        for message in (m for data in news for m in memory_frames(data)):
            if "seq" in message:
                self._take(client, [message["seq"]])
                client.cursor = message["seq"]
            else:  # an ack: its event came first, if it is visible at all
                seq = message["message_id"]
                assert seq in client.seqs or not self.model.sees(
                    client.user, seq, self.hub.head
                )

    def _take(
        self, client: PlayClient, seqs: list[int], polled: range = range(0)
    ) -> None:
        for seq in seqs:
            assert seq > max([client.first or 0, *client.seqs[-1:]])
            assert seq <= self.hub.head
            # Visible as of now, a live event as of itself, a poll as of its read.
            live = [seq] if seq > self.before else []
            moments = polled or [self.hub.head, *live]
            assert any(self.model.sees(client.user, seq, at) for at in moments)
            client.seqs.append(seq)

    def finish(self) -> None:
        """Publish the rest, let all clients read to the end; nothing may be missing."""
        while self.waiting:
            self.step("publish", None)
        for number, client in enumerate(self.clients):
            if client.connection is not None and client.connection.outbox.stuck:
                self.step("stall", number)
            for name in ("next", "sit") * 100:
                if client.connection is not None and client.connection.seat.live:
                    break
                self.step(name, number)
            assert client.connection is not None
            assert client.connection.seat.live
            assert client.connection.seat.held == []
            assert client.connection.seat.slots.value == chatd.UNANSWERED
            assert client.first is not None
            missing = {*self.model.visible(client.user, client.first, self.hub.head)}
            assert missing <= {*client.seqs}


client_numbers = st.integers(0, 3)
random_plays = st.lists(
    st.one_of(
        *[st.tuples(st.just("commit"), st.lists(random_works, min_size=1, max_size=4))]
        * 4,
        *[st.tuples(st.just("publish"), st.none())] * 3,
        *[
            st.tuples(st.just(name), client_numbers)
            for name in (*["next"] * 4, "switch", "ask", "ask", "stall")
        ],
    ),
    min_size=40,
    max_size=60,
)


@pytest.mark.parametrize("tail_events", [2, 1000])
@property_settings
@given(play=random_plays)
def test_a_client_gets_every_visible_event_once_and_in_order_in_any_interleaving(
    tail_events: int, play: list[tuple[str, Any]]
) -> None:
    changes = {"tail_events": tail_events, "large_chat": 2, "page_events": 2}
    with memory_with(**changes, page_bytes=700) as memory:
        stage = Play(memory)
        for number in (0, 1, 1, 1, 2, 2):  # one entered, one live, one in between
            stage.step("next" if stage.clients[number].connection else "sit", number)
        for name, argument in play:
            stage.step(name, argument)
        stage.finish()
        memory_is_sound(memory)


# --- what each device counts as unread -----------------------------------------------


class Device:
    """A device that counts by the rules of docs/protocol.md, and knows nothing else."""

    def __init__(self, user: int) -> None:
        self.user = user
        self.cursor: int | None = None
        self.marks: dict[int, tuple[int, int]] = {}  # chat: last_n, read_n
        self.connection: MemorySeat | None = None
        self.greeting: Greeting | None = None  # read, and not sent yet
        self.upto = 0  # the head when it was read
        self.page: chatd.Page | None = None  # the same
        self.frames: list[dict[str, Any]] = []  # sent, and not received yet
        self.taken = 0  # how much of its outbox is in `frames`

    def move(self, chat: int, last_n: int, read_n: int) -> None:
        last, read = self.marks.get(chat, (0, 0))
        self.marks[chat] = max(last, last_n), max(read, read_n)

    def receive(self, frame: dict[str, Any]) -> None:
        """Handle `connected`, the answer of /api/v1/chats, or an event."""
        match frame:
            case {"type": "connected", "chats": chats, "cursor": cursor}:
                self.cursor = cursor
                for chat, mark in chats.items():
                    self.move(int(chat), mark["last_n"], mark["read_n"])
                return
            case {"chats": chats, "cursor": cursor}:
                self.cursor, self.marks = cursor, {}
                for chat in chats:
                    self.move(chat["id"], chat["last_n"], chat["read_n"])
                return
            case {"type": "chat_added", "chat_id": chat_id, "chat": chat}:
                read = {m["user_id"]: m["read_n"] for m in chat["members"]}
                self.move(chat_id, chat["last_n"], read.get(self.user, 0))
            case {"type": "member_removed", "chat_id": chat_id, "user_id": user}:
                if user == self.user:
                    self.marks.pop(chat_id, None)
            case {"type": "new_message", "chat_id": chat_id, "message": message}:
                own = message["sender_id"] == self.user and frame.get("read", True)
                self.move(chat_id, message["n"], message["n"] if own else 0)
            case {"type": "message_read", "read_by": self.user}:
                self.move(frame["chat_id"], 0, frame["n"])
        assert self.cursor is not None
        assert frame["seq"] > self.cursor
        self.cursor = frame["seq"]


class Desk:
    """A store, a hub and devices, two of them of one user. Each method is a step."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.hub = memory, memory.hub
        self.model = Model(memory.settings.large_chat)
        self.waiting: list[chatd.Batch] = []
        self.devices: Sequence[Device] = [Device(user) for user in (1, 1, 2)]
        self.resyncs = 0
        for users in ((1, 2), (1, 2, 3)):
            self.model.create(*users)
            memory.chat(*users)

    def stored(self, user: int) -> dict[int, tuple[int, int]]:
        """Read last_n and read_n of a user's chats from the tables."""
        rows = self.memory.store._writer.execute(
            """SELECT chat_id, read_n, (SELECT count(*) FROM message m
                                        WHERE m.chat_id = b.chat_id)
               FROM member b WHERE user_id = ?""",
            (user,),
        )
        return {chat: (last_n, read_n) for chat, read_n, last_n in rows}

    def commit(self, words: list[tuple[str, int, int]]) -> None:
        """Do works. A message is read only because its reader did something."""
        for word in words:
            name, _, user = word
            before = {one: self.stored(one) for one in USERS}
            self.waiting.append(commit_both(self.memory, self.model, [word]))
            for one in USERS:
                for where, (_, read_n) in self.stored(one).items():
                    senders = [
                        self.model.senders[seq] for seq in self.model.messages[where]
                    ]
                    _, was = before[one].get(where, (0, read_n))
                    newly = senders[was:read_n]
                    acted = (name in ("send", "mark"), user) == (True, one)
                    assert acted or {*newly} <= {one}, word
                    # The message after the mark is never the user's own.
                    assert senders[read_n : read_n + 1] != [one], word

    def publish(self) -> None:
        if self.waiting:
            self.hub.publish(self.waiting.pop(0))

    def switch(self, number: int) -> None:
        """Open a socket, or lose it and all that is on its way."""
        device = self.devices[number]
        if device.connection is not None:
            self.hub.leave(device.connection.seat)
            device.connection = device.greeting = device.page = None
            device.frames.clear()
        else:
            device.connection, device.taken = self.memory.enter(device.user), 0
            device.upto = self.hub.head
            device.greeting = self.memory.greeting(device.user, device.cursor)

    def send(self, number: int) -> None:
        """Send a device what comes next: `connected`, a page, or part of the tail."""
        device = self.devices[number]
        if device.connection is None:
            return
        seat = device.connection.seat
        if device.greeting is not None:
            greeting, device.greeting = device.greeting, None
            start = device.cursor
            if start is None or greeting.missed is None:
                self.resyncs += start is not None
                start = device.upto
            self.hub.set_chats(seat.person, greeting.joined)
            seat.cursor = start
            hello = {"type": "connected", "cursor": start, "chats": greeting.marks}
            device.frames.append(json.loads(chatd.encode(hello)))
            if self.hub.in_tail(start):
                self.hub.push_tail(seat)
        elif device.page is not None:
            page, device.page = device.page, None
            self.hub.push_page(seat, page)
        elif not seat.live and self.hub.in_tail(seat.cursor):
            self.hub.push_tail(seat)
        elif not seat.live:
            device.page = self.memory.page(device.user, seat.cursor, 2)

    def receive(self, number: int, most: int = 2) -> None:
        """A device receives some of the frames that were sent to it."""
        device = self.devices[number]
        for frame in device.frames[:most]:
            device.receive(frame)
        del device.frames[:most]

    def poll(self, number: int) -> None:
        """A device without a socket polls; first, or after a resync, its chats."""
        device, user = self.devices[number], self.devices[number].user
        if device.connection is not None:
            return
        head, missed = self.hub.head, None
        if device.cursor is not None:
            missed = self.memory.greeting(user, device.cursor).missed
        if missed is None:
            self.resyncs += device.cursor is not None
            answer = {"chats": self.memory.my_chats(user), "cursor": head}
            device.receive(json.loads(chatd.encode(answer)))
        elif device.cursor is not None:
            page = self.memory.page(user, device.cursor, 2)
            for entry in page.events:
                device.receive(json.loads(chatd.encode(entry.event)))
            device.cursor = page.cursor

    def step(self, name: str, argument: Any = None) -> None:
        getattr(self, name)(*(() if argument is None else (argument,)))
        for device in self.devices:
            connection, stored = device.connection, self.stored(device.user)
            if connection is not None:
                news = connection.outbox.taken[device.taken :]
                device.taken += len(news)
                device.frames += [m for data in news for m in memory_frames(data)]
            for chat in device.marks.keys() & stored.keys():
                pairs = zip(device.marks[chat], stored[chat], strict=True)
                assert all(mine <= theirs for mine, theirs in pairs)  # never ahead
            up_to_date = connection is not None and connection.seat.live
            if up_to_date and not device.frames and not self.waiting:
                assert device.marks == stored

    def finish(self) -> None:
        """Let each device catch up, by socket or poll: it counts as the tables say."""
        while self.waiting:
            self.step("publish")
        for number, device in enumerate(self.devices):
            for _ in range(200):
                self.step("send", number)
                self.step("receive", number)
                self.step("poll", number)
            stored = self.stored(device.user)
            assert device.marks == stored
            unread = {chat: last - read for chat, (last, read) in stored.items()}
            chats = self.memory.my_chats(device.user)
            assert unread == {chat.id: chat.unread for chat in chats}


device_numbers = st.integers(0, 2)
random_days = st.lists(
    st.one_of(
        *[st.tuples(st.just("commit"), st.lists(random_works, min_size=1, max_size=3))]
        * 3,
        *[st.tuples(st.just("publish"), st.none())] * 3,
        *[
            st.tuples(st.just(name), device_numbers)
            for name in ("switch", *["send"] * 3, *["receive"] * 3, "poll")
        ],
    ),
    min_size=30,
    max_size=60,
)


@pytest.mark.parametrize(("tail_events", "resync_events"), [(2, 6), (1000, 5000)])
@property_settings
@given(day=random_days)
def test_all_devices_of_a_user_count_the_same_unread_messages_as_the_database(
    tail_events: int, resync_events: int, day: list[tuple[str, Any]]
) -> None:
    changes = {"tail_events": tail_events, "resync_events": resync_events}
    with memory_with(**changes, large_chat=2, page_events=2) as memory:
        desk = Desk(memory)
        for number in (0, 1, 1, 2):
            desk.step("switch", number)
        for name, argument in day:
            desk.step(name, argument)
        desk.finish()
        memory_is_sound(memory)


# --- changes of messages -------------------------------------------------------------


def quoting(memory: Memory) -> tuple[int, int]:
    """Make a chat with a message that is quoted three times; return both ids."""
    chat = memory.chat(1, 2)
    message = memory.send(chat, 1, "old text").message.id
    memory.edit(1, message, "middle text")
    memory.do(memory.chats.add_member, chat, 3, 1)
    return chat, message


def texts(memory: Memory) -> set[str]:
    """The texts that the frames of the tail show."""
    (shown,) = [[m for e in memory.hub.tail for m in memory_frames(e.frame)]]
    messages = [m.get("message") or m["chat"]["last_message"] for m in shown
                if "message" in m or m["type"] == "chat_added"]  # fmt: skip
    return {message["content"] for message in messages if message}


def test_a_change_renews_every_entry_of_the_tail_that_shows_the_message(
    memory: Memory,
) -> None:
    chat, message = quoting(memory)
    memory.send(chat, 2, "another")
    frames = {entry.seq: entry.frame for entry in memory.hub.tail}
    sizes = {entry.seq: entry.size for entry in memory.hub.tail}
    assert texts(memory) == {"middle text", "another"}
    memory.edit(1, message, "й" * 1000)
    assert texts(memory) == {"й" * 1000, "another"}
    assert memory.hub.tail_size == sum(entry.size for entry in memory.hub.tail)
    memory.delete(1, message)
    assert texts(memory) == {"", "another"}
    assert memory.hub.tail_size == sum(entry.size for entry in memory.hub.tail)
    renewed = [e.seq for e in memory.hub.tail if frames.get(e.seq, e.frame) != e.frame]
    assert renewed == [3, 4, 6]
    for entry in memory.hub.tail:
        whole = chatd.Entry(entry.event)
        assert (entry.size, entry.quotes) == (whole.size, whole.quotes)
        if entry.seq in sizes and entry.seq not in renewed:
            assert entry.frame is frames[entry.seq] or not entry.to_chat


def test_a_change_of_a_message_that_is_older_than_the_tail_renews_its_edits() -> None:
    with memory_with(tail_events=4) as memory:
        chat, message = quoting(memory)
        memory.send(chat, 2, "another")
        assert message < memory.hub.tail[0].seq
        memory.delete(1, message)
        assert not texts(memory) & {"old text", "middle text"}


def test_a_replay_from_the_tail_shows_messages_as_they_are(memory: Memory) -> None:
    _, message = quoting(memory)
    seen = memory.sit(3, cursor=2)
    memory.delete(1, message)
    for user, seqs in ((2, [3, 4, 5, 7]), (3, [6, 7])):
        made = memory.sit(user, cursor=2)
        assert made.seqs() == seqs
        assert not [d for d in made.outbox.taken if b"text" in d]
    (added, deleted) = seen.received()
    assert added["chat"]["last_message"]["content"] == "middle text"
    assert deleted["message"]["content"] == ""


@pytest.mark.parametrize("tail_events", [100, 0])
def test_a_removed_member_is_told_nothing_that_was_written_later(
    tail_events: int,
) -> None:
    with memory_with(tail_events=tail_events) as memory:
        chat, message = quoting(memory)
        added = memory.hub.head
        memory.do(memory.chats.remove_member, chat, 3, None)
        memory.edit(1, message, "written later")
        memory.do(memory.chats.set_title, chat, "later", 1)
        # From the tail, in pages and in a poll: the removal, and nothing of the chat.
        made = memory.sit(3, cursor=0)
        memory.catch_up(made)
        assert made.seqs() == [added, added + 1]
        polled = memory.page(3).events
        assert made.received() == [f for e in polled for f in memory_frames(e.frame)]
        assert made.received()[0] == {
            "type": "chat_added", "seq": added, "chat_id": chat, "chat": {
                "id": chat, "title": None, "members": [], "member_count": 0,
                "last_n": 0, "last_message": None, "direct": False, "created_by": None,
            },
        }  # fmt: skip
        # Back in the chat the user sees it as it is.
        memory.do(memory.chats.add_member, chat, 3, 1)
        again = memory.sit(3, cursor=0)
        memory.catch_up(again)
        assert b"written later" in b"".join(again.outbox.taken)


@pytest.mark.parametrize(("user", "seqs"), [(2, [2, 3, 4, 5]), (3, [6])])
def test_a_page_that_was_read_before_a_change_shows_the_message_as_it_is(
    memory: Memory, user: int, seqs: list[int]
) -> None:
    _, message = quoting(memory)
    made = memory.enter(user)
    made.seat.cursor = 0
    memory.hub.set_chats(made.seat.person, memory.greeting(user).joined)
    page = memory.page(user)
    memory.edit(1, message, "published")
    batch = memory.commit((memory.chats.change_message, 1, message, "not yet"))
    memory.hub.push_page(made.seat, page)
    assert made.seqs() == seqs
    (data,) = made.outbox.taken
    assert (b"published" in data, b"text" in data) == (True, False)
    memory.hub.publish(batch)
    memory.catch_up(made)
    assert made.seqs() == [*seqs, 7, 8]


def test_a_page_whose_changes_a_burst_hides_is_not_pushed_but_read_again() -> None:
    with memory_with(tail_events=3) as memory:
        chat, message = quoting(memory)
        made = memory.enter(2)
        made.seat.cursor = 0
        memory.hub.set_chats(made.seat.person, memory.greeting(2).joined)
        page = memory.page(2)
        memory.delete(1, message)
        for _ in range(3):
            memory.send(chat, 1)
        assert not memory.hub.in_tail(page.upto)
        memory.hub.push_page(made.seat, page)
        assert (made.received(), made.seat.cursor, made.seat.live) == ([], 0, False)
        memory.catch_up(made)
        assert made.seqs() == [2, 3, 4, 5, *range(7, 11)]
        assert not [data for data in made.outbox.taken if b"text" in data]


def test_an_answer_whose_changes_a_burst_hides_is_refused(memory: Memory) -> None:
    with memory_with(tail_events=3) as memory:
        chat, message = quoting(memory)
        upto = memory.hub.head
        history = (memory.chats.history, 2, chat, None, 9, upto)
        messages, *_ = memory.read(*history)
        memory.delete(1, message)
        (now,) = memory.hub.correct(messages, upto)
        assert (now.content, now.rev) == ("", memory.hub.head)
        for _ in range(3):
            memory.send(chat, 1)
        refusal = refusal_of(memory.hub.correct, messages, upto)
        assert (refusal.code, refusal.status) == ("overloaded", 503)
        assert refusal.retry_after
        assert memory.hub.correct(memory.read(*history)[0], memory.hub.head) == [now]


def test_chats_and_events_are_corrected_as_messages_are(memory: Memory) -> None:
    chat, message = quoting(memory)
    upto = memory.hub.head
    chats, events = memory.my_chats(2), [e.event for e in memory.page(3).events]
    removed = chatd.MemberRemoved(1, chat, 5)
    assert memory.hub.correct(chats, upto) == chats
    deleted = memory.delete(1, message)
    (mine,) = memory.hub.correct(chats, upto)
    assert mine == replace(chats[0], last_message=deleted)
    added, other = memory.hub.correct([*events, removed], upto)
    assert isinstance(added, chatd.ChatAdded)
    assert added.chat.last_message == deleted
    assert other is removed


def test_the_tail_is_walked_from_the_end(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    ids = [memory.send(chat, 1).message.id for _ in range(20)]
    for seq in (0, 1, 2, 10, 21, 22):
        seqs = [entry.seq for entry in memory.hub.since(seq)]
        assert seqs == [*range(seq + 1, ids[-1] + 1)]
    with memory_with(tail_events=4) as small:
        chat = small.chat(1, 2)
        for _ in range(9):
            small.send(chat, 1)
        assert [entry.seq for entry in small.hub.since(0)] == [8, 9, 10, 11]


class Mirror(Device):
    """A device that also keeps messages, by the rule of `rev` in docs/protocol.md."""

    def __init__(self, user: int) -> None:
        super().__init__(user)
        self.messages: dict[int, dict[str, Any]] = {}
        self.asked: tuple[int, int, list[chatd.Message]] | None = None  # chat, upto
        self.answer: dict[str, Any] | None = None  # encoded, and not received yet
        self.kept: dict[int, dict[str, Any]] = {}  # changes while a request waits

    def keep(
        self, messages: dict[int, dict[str, Any]], message: dict[str, Any]
    ) -> None:
        """Keep the larger rev; without one, it is the id."""
        had = messages.get(message["id"], message)
        newer = had.get("rev", had["id"]) > message.get("rev", message["id"])
        messages[message["id"]] = had if newer else message

    def forget(self, chat: int | None = None) -> None:
        """Forget a chat, or all; and what was asked before."""
        for place in (self.messages, self.kept):
            for number in [n for n, m in place.items() if chat in (None, m["chat_id"])]:
                del place[number]
        if self.asked and chat in (None, self.asked[0]):
            self.asked = self.answer = None
            self.kept.clear()

    def receive(self, frame: dict[str, Any]) -> None:
        super().receive(frame)
        match frame:
            case {"type": "connected"}:
                if frame.get("resync"):
                    self.forget()
            case {"chats": _, "cursor": _}:
                self.forget()
            case {"type": "member_removed", "chat_id": chat, "user_id": self.user}:
                self.forget(chat)
            case {"type": "chat_added", "chat_id": chat}:
                self.forget(chat)
            case {"type": "new_message", "message": message}:
                self.keep(self.messages, message)
            case {"type": "message_edited" | "message_deleted", "message": message}:
                if message["id"] in self.messages:
                    self.keep(self.messages, message)
                elif self.asked:
                    self.keep(self.kept, message)

    def receive_answer(self) -> None:
        if self.answer is not None:
            for message in self.answer["messages"]:
                self.keep(self.messages, message)
                if message["id"] in self.kept:
                    self.keep(self.messages, self.kept[message["id"]])
            self.asked = self.answer = None
            self.kept.clear()


class Album(Desk):
    """A desk whose devices keep messages, while these are edited and deleted."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self.devices = self.mirrors = [Mirror(user) for user in (1, 1, 2, 3)]
        self.states: dict[int, list[tuple[int, str]]] = {}  # id: rev and text
        self.number = 0

    def change_one(
        self, db: Any, events: Any, back: int, text: str | None
    ) -> chatd.Message:
        """Change one of the latest messages, perhaps of this very transaction."""
        sql = "SELECT id FROM message ORDER BY id DESC LIMIT 1 OFFSET ?"
        message = chatd.query_value(db, sql, back) or 999
        return self.memory.chats.change_message(db, events, None, message, text)

    def commit(self, words: list[tuple[str, int, int]]) -> None:
        memory, works = self.memory, list[MemoryWork]()
        for name, chat, user in words:
            self.number += 1
            text = f"<{self.number}>"
            works.append({
                "send": memory.sends(chat, user, text),
                "edit": (self.change_one, user - 1, text),
                "delete": (self.change_one, user - 1, None),
                "add": (memory.chats.add_member, chat, user, None),
                "remove": (memory.chats.remove_member, chat, user, None),
            }[name])  # fmt: skip
        batch = memory.commit(*works)
        for _, outcome in batch.outcomes:
            message = outcome.message if isinstance(outcome, chatd.Sent) else outcome
            if isinstance(message, chatd.Message):
                state = (message.rev or message.id, message.content)
                self.states.setdefault(message.id, []).append(state)
        self.waiting.append(batch)

    def gone(self) -> set[str]:
        """The texts that were replaced by a change that is published."""
        return {
            text
            for states in self.states.values()
            for (_, text), (rev, _) in itertools.pairwise(states)
            if text and rev <= self.hub.head
        }

    def claim_gone(self, *pieces: bytes) -> None:
        """Claim that no such text is in any of these bytes."""
        shown = re.findall("<[0-9]+>", b"".join(pieces).decode("latin-1"))
        assert not {*shown} & self.gone()

    def ask(self, number: int) -> None:
        """Read a page of history for a device, which gets its answer later."""
        device, chat = self.mirrors[number], 1 + number % 2
        if device.asked is None and chat in device.marks:
            where = (device.user, chat, None, 4, self.hub.head)
            try:
                messages, *_ = self.memory.read(self.memory.chats.history, *where)
            except Refusal:
                return  # it has left, and does not know yet
            device.asked = chat, self.hub.head, messages

    def answer(self, number: int) -> None:
        """Encode the answer. A refusal ends the request; the device may ask again."""
        device = self.mirrors[number]
        if device.asked is not None and device.answer is None:
            _, upto, messages = device.asked
            try:
                now = self.hub.correct(messages, upto)
            except Refusal:
                device.asked = None
                device.kept.clear()
                return
            data = chatd.encode({"messages": now})
            self.claim_gone(data)
            device.answer = json.loads(data)

    def take(self, number: int) -> None:
        self.mirrors[number].receive_answer()

    def poll(self, number: int) -> None:
        """Poll as get_events does, in one step."""
        device = self.mirrors[number]
        if device.connection is not None:
            return
        user, head = device.user, self.hub.head
        missed = None
        if device.cursor is not None:
            missed = self.memory.greeting(user, device.cursor).missed
        if missed is None or device.cursor is None:
            chats = self.hub.correct(self.memory.my_chats(user), head)
            data = chatd.encode({"chats": chats, "cursor": head})
            device.receive(json.loads(data))
        else:
            page = self.memory.page(user, device.cursor, 2)
            events = self.hub.correct([e.event for e in page.events], page.upto)
            data = chatd.encode(events)
            for event in json.loads(data):
                device.receive(event)
            device.cursor = page.cursor
        self.claim_gone(data)

    def stall(self, number: int) -> None:
        """The device's socket is full; the next call empties it."""
        connection = self.devices[number].connection
        if connection is not None and connection.outbox.stuck:
            connection.outbox.drain()
        elif connection is not None:
            connection.outbox.stuck, connection.outbox.bound = True, 1

    def send(self, number: int) -> None:
        device = self.devices[number]
        connection, greeting = device.connection, device.greeting
        if connection is not None and connection.outbox.buffer:
            return  # a page is pushed when the outbox is empty
        cursor = device.cursor
        super().send(number)
        if greeting is not None and (cursor is None or greeting.missed is None):
            # `fresh` or `resync`: nothing of before can be kept.
            hello = next(f for f in device.frames if f["type"] == "connected")
            hello["resync"] = True

    def step(self, name: str, argument: Any = None) -> None:
        before = [len(d.connection.outbox.taken) if d.connection else 0
                  for d in self.devices]  # fmt: skip
        super().step(name, argument)
        news = [
            data
            for device, count in zip(self.devices, before, strict=True)
            for data in (device.connection.outbox.taken[count:]
                         if device.connection else ())
        ]  # fmt: skip
        kept = [entry.built or b"" for entry in self.hub.tail]
        self.claim_gone(*news, *kept, *[chatd.encode(e.event) for e in self.hub.tail])
        assert self.hub.tail_size == sum(entry.size for entry in self.hub.tail)

    def finish(self) -> None:
        """Let all devices get everything; their messages are those of the database."""
        while self.waiting:
            self.step("publish")
        rows = self.memory.store._writer.execute(chatd.MESSAGES).fetchall()
        stored = {row[0]: chatd.message_of(row) for row in rows}
        for number, device in enumerate(self.mirrors):
            if device.connection is not None and device.connection.outbox.stuck:
                self.step("stall", number)
            for _ in range(100):
                for name in ("send", "receive", "poll"):
                    self.step(name, number)
                seat = device.connection.seat if device.connection else None
                done = seat.live if seat else device.cursor == self.hub.head
                if done and not device.frames:
                    break
            self.step("answer", number)
            self.step("take", number)
            assert device.marks == self.stored(device.user)
            assert {m["chat_id"] for m in device.messages.values()} <= {*device.marks}
            for message in device.messages.values():
                assert message == json.loads(chatd.encode(stored[message["id"]]))


album_works = st.tuples(
    st.sampled_from([*["send"] * 4, *["edit"] * 4, *["delete"] * 2, "add", "remove"]),
    st.integers(1, 2),
    st.integers(1, 3),
)
mirror_numbers = st.integers(0, 3)
random_albums = st.lists(
    st.one_of(
        *[st.tuples(st.just("commit"), st.lists(album_works, min_size=1, max_size=4))]
        * 4,
        *[st.tuples(st.just("publish"), st.none())] * 4,
        *[
            st.tuples(st.just(name), mirror_numbers)
            for name in ("switch", *["send"] * 3, *["receive"] * 3, "poll", "stall",
                         "ask", "ask", "answer", "answer", "take", "take")
        ],
    ),
    min_size=40,
    max_size=70,
)  # fmt: skip


@pytest.mark.parametrize(("tail_events", "resync_events"), [(2, 6), (5, 50), (99, 999)])
@property_settings
@given(day=random_albums)
def test_who_keeps_the_larger_rev_has_the_messages_of_the_database_in_any_interleaving(
    tail_events: int, resync_events: int, day: list[tuple[str, Any]]
) -> None:
    changes = {"tail_events": tail_events, "resync_events": resync_events}
    with memory_with(**changes, page_events=2) as memory:
        album = Album(memory)
        for number in (0, 1, 2):
            album.step("switch", number)
        for name, argument in day:
            album.step(name, argument)
        album.finish()
        memory_is_sound(memory)
