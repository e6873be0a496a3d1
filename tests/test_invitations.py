"""Invitations, joining, sessions and names: from the store to the whole process."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
import trio
from msgspec.structs import replace
from trio.testing import wait_all_tasks_blocked

import chatd
from chatd import Claims, NewChat, Rate, Refusal
from tests.client import (
    HttpAnswer,
    ProxyProcess,
    ServerProcess,
    request_bytes,
    run_chatd,
)
from tests.harness import (
    OFF,
    Memory,
    MemoryWork,
    VirtualServer,
    memory_is_sound,
    refusal_of,
    with_server,
)

FIRST, LAST = 2**40, 2**41 - 1  # the ids of users who join
SESSION = 30 * 86_400


# --- the store: who is let in, and what ends an invitation ---------------------------


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path, invites="on")


def invitation(memory: Memory, chat: int, maker: int) -> Claims:
    """What an invitation says, when its signature was found to be right."""
    invite = memory.do(memory.chats.invitation, chat, maker, False)
    return Claims(user_id=maker, exp=9e9, use="invite", invite=invite)


def join(memory: Memory, invite: Claims, who: int | str) -> int:
    """Join, as the events of it say; return the user's id."""
    before = memory.hub.head
    added, answer = memory.do(memory.chats.join, invite, who)
    assert added is (memory.hub.head == before + 2)
    return int(answer["user_id"])


def members(memory: Memory, chat: int) -> list[int]:
    rows = memory.store._writer.execute(
        "SELECT user_id FROM member WHERE chat_id = ? ORDER BY 1", (chat,)
    )
    return [user for (user,) in rows]


def test_a_join_is_told_to_the_members_and_then_to_the_new_one(memory: Memory) -> None:
    chat = memory.chat(1, 2, title="Tea")
    old, head = memory.sit(1), memory.hub.head
    user = join(memory, invitation(memory, chat, 2), "Cem")
    assert FIRST <= user <= LAST
    added, greeted = (
        memory.page(user).events[0].event,
        memory.sit(user, head).received(),
    )
    assert isinstance(added, chatd.ChatAdded)
    assert [frame["type"] for frame in greeted] == ["chat_added"]
    assert greeted[0]["chat"]["members"][-1] == {
        "user_id": user, "name": "Cem", "read_n": 0,
    }  # fmt: skip
    assert old.received() == [
        {"type": "member_added", "seq": head + 1, "chat_id": chat, "user_id": user,
         "name": "Cem"},
    ]  # fmt: skip
    memory_is_sound(memory)


def test_a_user_who_joins_keeps_its_id_and_joins_once(memory: Memory) -> None:
    chat = memory.chat(1)
    invite = invitation(memory, chat, 1)
    assert [join(memory, invite, 5) for _ in range(3)] == [5, 5, 5]
    assert members(memory, chat) == [1, 5]
    assert memory.do(memory.chats.join, invite, 1) == (
        False, {"user_id": 1, "chat_id": chat},
    )  # fmt: skip


def test_without_anybody_to_join_the_chat_is_shown(memory: Memory) -> None:
    for title in ("Tea", None, 'A "B" \\ \u2028 ☃ \U0001f600'):
        chat = memory.chat(1, 2, title=title)
        added, shown = memory.do(memory.chats.join, invitation(memory, chat, 1), None)
        assert not added
        assert json.loads(bytes(shown)) == {"title": title, "member_count": 2}


def test_names_need_not_be_unique_and_each_name_is_another_user(memory: Memory) -> None:
    invite = invitation(memory, memory.chat(1), 1)
    users = [join(memory, invite, "Cem") for _ in range(50)]
    assert len({*users}) == 50
    assert all(FIRST <= user <= LAST for user in users)


@pytest.mark.parametrize("taken", [1, 2, 99])
def test_a_new_user_never_gets_an_id_that_has_a_row(memory: Memory, taken: int) -> None:
    chat, draws = memory.chat(1), itertools.count()
    for number in range(taken):
        memory.do(memory.chats.rename, FIRST + number, f"N{number}")
    # SQLite's random numbers have 64 bits; 40 of them count.
    memory.store._writer.create_function(
        "random",
        0,
        lambda: next(draws) - 2**62,  # the lower bits are 0, 1, 2, ...
    )
    user = join(memory, invitation(memory, chat, 1), "Cem")
    assert user == FIRST + taken


def test_an_id_is_never_drawn_for_ever(memory: Memory) -> None:
    chat = memory.chat(1)
    memory.do(memory.chats.rename, LAST, "Zoe")
    memory.store._writer.create_function("random", 0, lambda: -1)
    batch = memory.commit((memory.chats.join, invitation(memory, chat, 1), "Cem"))
    memory.hub.publish(batch)
    assert members(memory, chat)[0] == 1
    assert ("Zoe",) in memory.store._writer.execute("SELECT name FROM user_name")


ENDS: dict[str, Callable[[Memory, int], MemoryWork]] = {
    "the maker has left": lambda m, chat: (m.chats.remove_member, chat, 2, 2),
    "the maker was removed": lambda m, chat: (m.chats.remove_member, chat, 2, None),
    "somebody was removed": lambda m, chat: (m.chats.remove_member, chat, 3, None),
    "all were revoked": lambda m, chat: (m.chats.invitation, chat, 1, True),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_ends_an_invitation_ends_it_within_the_same_batch(
    memory: Memory, end: str
) -> None:
    chat = memory.chat(1, 2, 3)
    other = memory.chat(1, 2, 3)
    invite, elsewhere = (invitation(memory, c, 2) for c in (chat, other))
    before = (memory.chats.join, invite, "Early")
    after = (memory.chats.join, invite, "Late")
    batch = memory.commit(before, ENDS[end](memory, chat), after)
    memory.hub.publish(batch)
    early, _, late = (outcome for _, outcome in batch.outcomes)
    assert early[0] is True
    assert isinstance(late, Refusal)
    assert (late.status, late.code) == (401, "token_invalid")
    assert memory.count("user_name WHERE name = 'Late'") == 0
    for who in (None, "Later", 5):
        assert refusal_of(memory.do, memory.chats.join, invite, who).status == 401
    join(memory, elsewhere, "Elsewhere")  # invitations to other chats still count
    memory_is_sound(memory)


def test_a_revocation_of_the_maker_ends_its_invitations_within_the_same_batch(
    memory: Memory,
) -> None:
    chat = memory.chat(1, 2)
    old = invitation(memory, chat, 2)
    others, new = invitation(memory, chat, 1), replace(old, iat=1001)
    works = [(memory.chats.join, invite, "Cem") for invite in (old, others, new)]
    before, after = works[:1], works
    batch = memory.commit(*before, (memory.chats.revoke, 2, 1000), *after)
    memory.hub.publish(batch)
    joined = [not isinstance(outcome, Refusal) for _, outcome in batch.outcomes]
    assert joined == [True, True, False, True, True]
    refusal = batch.outcomes[2][1]
    assert (refusal.status, refusal.code) == (401, "token_invalid")
    memory_is_sound(memory)


def test_another_members_leaving_ends_no_invitation(memory: Memory) -> None:
    chat = memory.chat(1, 2, 3)
    invite = invitation(memory, chat, 2)
    memory.do(memory.chats.remove_member, chat, 3, 3)
    join(memory, invite, "Cem")
    assert memory.do(memory.chats.invitation, chat, 1, False) == invite.invite


def test_a_maker_who_comes_back_finds_the_invitations_as_they_were(
    memory: Memory,
) -> None:
    chat = memory.chat(1, 2)
    invite = invitation(memory, chat, 2)
    memory.do(memory.chats.remove_member, chat, 2, 2)
    refusal_of(memory.do, memory.chats.join, invite, "Cem")
    memory.do(memory.chats.add_member, chat, 2, None)
    join(memory, invite, "Cem")
    memory.do(memory.chats.remove_member, chat, 2, None)  # by a service: a new key
    memory.do(memory.chats.add_member, chat, 2, None)
    refusal_of(memory.do, memory.chats.join, invite, "Dora")


def test_each_key_is_random_and_of_one_chat(memory: Memory) -> None:
    chats = [memory.chat(1) for _ in range(5)]
    found = [
        memory.do(memory.chats.invitation, chat, 1, new)
        for chat in chats for new in (True, True)
    ]  # fmt: skip
    assert [invite.partition(":")[0] for invite in found[::2]] == [
        str(chat) for chat in chats
    ]
    assert len({invite.partition(":")[2] for invite in found}) == 10
    assert all(re.fullmatch(r"[0-9]+:[0-9a-f]{18}", invite) for invite in found)
    key = found[-1].partition(":")[2]
    for invite in (
        "", ":", f"{chats[0]}:{key}", f"{chats[-1]}:", f"{chats[-1]}", f"x:{key}",
        f"{chats[-1]}:{key} ", f"0{chats[-1]}:{key}", f"{chats[-1]}:{key.upper()}0",
        f"99:{key}", f"{2**70}:{key}", f"{chats[-1]}:None", f"{chats[-1]}:%",
    ):  # fmt: skip
        claims = Claims(user_id=1, exp=9e9, use="invite", invite=invite)
        assert refusal_of(memory.do, memory.chats.join, claims, "Eve").status == 401


def test_an_invitation_needs_a_member_of_a_group(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    for new in (False, True):
        for where, who in ((chat, 3), (99, 1)):
            refusal = refusal_of(memory.do, memory.chats.invitation, where, who, new)
            assert (refusal.status, refusal.code) == (404, "not_found")
    memory.store._writer.execute("UPDATE chat SET direct_key = '1:2'")
    for new in (False, True):
        refusal = refusal_of(memory.do, memory.chats.invitation, chat, 1, new)
        assert (refusal.status, refusal.code) == (409, "direct")


def test_of_two_joins_to_the_last_place_one_is_refused_and_leaves_no_user(
    tmp_path: Path,
) -> None:
    memory = Memory(tmp_path, members=3, invites="on")
    chat = memory.chat(1, 2)
    invite = invitation(memory, chat, 1)
    works = [(memory.chats.join, invite, name) for name in ("Cem", "Dora")]
    batch = memory.commit(*works, (memory.chats.join, invite, 2))
    memory.hub.publish(batch)
    first, second, known = (outcome for _, outcome in batch.outcomes)
    assert first[0] is True
    assert isinstance(second, Refusal)
    assert (second.status, second.code) == (400, "bad_field")
    assert known == (False, {"user_id": 2, "chat_id": chat})  # a member already
    assert memory.count("user_name") == 1
    memory_is_sound(memory)


def test_with_invitations_a_user_adds_and_sees_only_those_in_a_chat_with_it(
    memory: Memory,
) -> None:
    tea, club = memory.chat(1, 2), memory.chat(2, 3, 4)
    memory.do(memory.chats.rename, 4, "Dora")
    add, create = memory.chats.add_member, memory.chats.create_chat
    for stranger in (3, 4, 5, FIRST):
        for work in (
            (add, tea, stranger, 1), (create, NewChat([1, stranger]), 1),
            (create, NewChat([1, 2, stranger]), 1),
        ):  # fmt: skip
            before = memory.count("user"), memory.count("chat")
            refusal = refusal_of(memory.do, *work)
            assert (refusal.status, refusal.code) == (403, "forbidden")
            assert str(stranger) in refusal.message
            assert (memory.count("user"), memory.count("chat")) == before
    assert memory.do(add, tea, 3, 2)  # 2 is in the club with 3
    assert not memory.do(add, tea, 3, 1)  # now 3 is a member
    _, is_new = memory.do(create, NewChat([1, 2, 3]), 1)
    assert is_new
    assert memory.do(create, NewChat([7]), 7)[1]  # oneself
    memory.do(add, club, 9, None)  # a service adds anybody
    memory.do(memory.chats.remove_member, club, 4, 4)
    for user, seen in ((1, [1, 2, 3]), (2, [1, 2, 3, 9]), (4, []), (7, [7]), (8, [])):
        assert [row["user_id"] for row in memory.users(user)] == seen
    everybody = memory.users()
    assert everybody[0] == {"user_id": 4, "name": "Dora"}
    assert [row["user_id"] for row in everybody[1:]] == [1, 2, 3, 7, 9]
    memory_is_sound(memory)


def test_without_invitations_a_user_adds_and_sees_everybody(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    chat = memory.chat(1)
    assert memory.do(memory.chats.add_member, chat, 5, 1)
    assert memory.do(memory.chats.create_chat, NewChat([1, 6]), 1)[1]
    assert [row["user_id"] for row in memory.users(1)] == [1, 5, 6]


# --- a server in virtual time --------------------------------------------------------


async def invite(server: VirtualServer, chat: int, maker: int = 6, **body: int) -> str:
    answer = await server.ask("POST", f"/api/v1/chats/{chat}/invites", body, user=maker)
    assert answer.status == 201, answer
    assert answer.json["expires_in"] == body.get("ttl_seconds", 7 * 86_400)
    return str(answer.json["token"])


async def joins(server: VirtualServer, token: object, **more: Any) -> HttpAnswer:
    """Join with a body of these fields; `bearer` is the token of a user."""
    bearer, headers = more.pop("bearer", ""), more.pop("headers", {})
    body = {"token": token, **more}
    return await server.ask("POST", "/api/v1/join", body, token=bearer, **headers)


def code(answer: HttpAnswer) -> tuple[int, str]:
    return answer.status, answer.code


@with_server(invites="on")
async def test_a_stranger_sees_the_chat_and_joins_with_a_name_and_gets_a_session(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer = await server.join(6)
    token = await invite(server, chat)
    shown = await joins(server, token)
    assert (shown.status, shown.json) == (200, {"title": "Tea", "member_count": 2})
    await peer.receives_nothing()
    joined = await joins(server, token, name="Cem")
    assert joined.status == 201
    session, user = joined.json["token"], joined.json["user_id"]
    assert joined.json == {
        "token": session, "expires_in": SESSION, "user_id": user, "name": "Cem",
        "chat_id": chat,
    }  # fmt: skip
    assert FIRST <= user <= LAST
    assert (await peer.receive("member_added"))["name"] == "Cem"
    theirs = await server.join(user, token=session)
    assert [*theirs.hello["chats"]] == [str(chat)]
    ack = await theirs.ask("send_message", chat_id=chat, content="hello")
    assert (await peer.receive("new_message"))["message"]["id"] == ack["message_id"]
    again = await server.ask("POST", "/api/v1/session", token=session)
    assert (again.status, again.json["name"]) == (200, "Cem")
    # A repeat, because the answer was lost, is another user.
    repeated = await joins(server, token, name="Cem")
    assert (repeated.status, repeated.json["user_id"] != user) == (201, True)
    assert (await server.stats())["store"]["joins"] == 2


@with_server(invites="on")
async def test_a_user_joins_with_its_own_token_and_again_it_is_200(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6)
    token = await invite(server, chat)
    for status in (201, 200, 200):
        # The token's name is stored before the others are told.
        own = server.token(7, name="Bob")
        answer = await joins(server, token, bearer=own, name="Eve")
        assert answer.status == status
        assert answer.json == {"user_id": 7, "chat_id": chat}
    poll = (await server.ask("GET", "/api/v1/chats", user=7)).json["chats"][0]
    assert [m["name"] for m in poll["members"]] == [None, "Bob"]
    assert (await server.stats())["store"]["joins"] == 1


@with_server(invites="on")
async def test_a_wrong_token_of_a_user_is_401_and_never_a_new_user(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6)
    token = await invite(server, chat)
    ring = server.app.keyring
    ticket = ring.ticket(ring.verify(server.token(6)))["token"]
    for auth in (
        "", "Bearer", "Bearer x", "Basic eDp5", f"Bearer {token}", f"Bearer {ticket}",
        f"Bearer {server.token(7, -60)}", f"Bearer {server.token(7, use='signin')}",
        f"Bearer {server.token(7)}x",
    ):  # fmt: skip
        for name in ({}, {"name": "Eve"}):
            headers = {"Authorization": auth}
            answer = await joins(server, token, headers=headers, **name)
            assert answer.status == 401, auth
    revoked = server.token(7)
    ring.revoked[7] = chatd.now_seconds()
    answer = await joins(server, token, bearer=revoked, name="Eve")
    assert answer.status == 401
    listed = (await server.command("GET", "/api/v1/users"))["users"]
    assert [user["user_id"] for user in listed] == [6]


@with_server(invites="on")
async def test_an_invitation_is_good_for_nothing_but_joining(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6)
    token = await invite(server, chat)
    peer = await server.join(6)
    for path, methods in chatd.ROUTES.items():
        for method, route in methods.items():
            if route.who == "anyone":
                continue
            target = path.replace("*", str(chat))
            answer = await server.ask(method, target, {"token": token}, token=token)
            assert answer.status == 401, (method, path)
    assert (await peer.refused("auth", token=token))["code"] == "token_invalid"
    raw = server.dial()
    await raw.send(request_bytes("GET", f"/ws/chat?token={token}"))
    assert (await raw.answer()).status in {401, 426}
    raw.stream.socket.close()


GUESSES = ["", "x", "a.b.c", "x" * 5000, "eyJhbGciOiJub25lIn0.e30.", "\u2603", "\x00"]


@with_server(handshakes=OFF, sends=OFF, invites="on")
async def test_a_guess_an_expired_and_another_token_join_nothing(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6)
    good, ring = await invite(server, chat), server.app.keyring
    claims = jwt.decode(good, options={"verify_signature": False})
    forged = [
        jwt.encode(claims | changes, key or server.app.keyring.secret, "HS256")
        for changes, key in (
            ({}, "k" * 32), ({"exp": 1}, None), ({"exp": None}, None),
            ({"use": None}, None), ({"use": "session"}, None),
            ({"use": "signin"}, None), ({"invite": None}, None),
            ({"invite": chat}, None), ({"invite": "1:x"}, None),
            ({"user_id": 7}, None), ({"iat": time.time() + 99}, None),
        )
    ]  # fmt: skip
    assert (await joins(server, good)).status == 200
    for token in [*GUESSES, *forged, server.token(6), good[:-1], good + "x"]:
        for more in ({}, {"name": "Eve"}, {"bearer": server.token(7)}):
            answer = await joins(server, token, **more)
            assert answer.status == 401, (token, answer)
            assert token == "" or token not in answer.body.decode()
    bodies: list[object] = [
        {"token": 5}, {"token": None}, [], "x", {"token": good, "name": 5},
    ]  # fmt: skip
    for body in bodies:
        answer = await server.ask("POST", "/api/v1/join", body)
        assert answer.status == 400, body
    assert (await server.ask("POST", "/api/v1/join", {})).status == 401
    ring.revoked[6] = chatd.now_seconds()  # the maker
    assert (await joins(server, good, name="Eve")).status == 401
    del ring.revoked[6]
    listed = (await server.command("GET", "/api/v1/users"))["users"]
    assert [user["user_id"] for user in listed] == [6]


@with_server(handshakes=OFF, invites="on")
async def test_revoking_the_maker_ends_its_invitations_but_not_later_ones(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    old, others = await invite(server, chat, 6), await invite(server, chat, 7)
    await server.command("POST", "/api/v1/internal/chat/revoke", {"user_id": 6})
    assert code(await joins(server, old, name="Eve")) == (401, "token_invalid")
    new = server.app.keyring.sign(6, 60)  # signed in again
    answer = await server.ask("POST", f"/api/v1/chats/{chat}/invites", {}, token=new)
    for token in (others, answer.json["token"]):
        assert (await joins(server, token, name="Cem")).status == 201


@with_server(invites="on")
async def test_a_user_that_is_revoked_while_it_invites_gets_no_invitation(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6)
    server.disk.hold()
    raw, target = server.dial(), f"/api/v1/chats/{chat}/invites"
    auth = f"Bearer {server.token(6)}"
    await raw.send(request_bytes("POST", target, b"{}", Authorization=auth))
    await wait_all_tasks_blocked()
    server.app.keyring.revoked[6] = chatd.now_seconds()
    server.disk.go()
    assert (await raw.answer()).status == 401
    raw.stream.socket.close()


@pytest.mark.parametrize(
    ("ttl", "status"),
    [
        (1, 201), (2_592_000, 201), (0, 400), (-1, 400), (2_592_001, 400), (1.5, 400),
        ("7", 400), (True, 400), (None, 400), (10**30, 400),
    ],
)  # fmt: skip
@with_server(invites="on")
async def test_an_invitation_counts_for_1_second_to_30_days(
    server: VirtualServer, ttl: object, status: int
) -> None:
    chat = await server.chat(6)
    target = f"/api/v1/chats/{chat}/invites"
    answer = await server.ask("POST", target, {"ttl_seconds": ttl}, user=6)
    assert answer.status == status
    if status == 400:
        assert answer.code == "bad_field"
        assert "ttl_seconds" in answer.json["error"]["message"]
    else:
        claims = jwt.decode(answer.json["token"], options={"verify_signature": False})
        assert claims["exp"] - claims["iat"] == answer.json["expires_in"] == ttl


@with_server(invites="on")
async def test_without_a_body_an_invitation_counts_for_a_week(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6)
    answer = await server.ask("POST", f"/api/v1/chats/{chat}/invites", user=6)
    assert (answer.status, answer.json["expires_in"]) == (201, 604_800)


@with_server(handshakes=OFF, invites="on")
async def test_delete_revokes_all_invitations_so_far_whoever_made_them(
    server: VirtualServer,
) -> None:
    chat, other = await server.chat(6, 7), await server.chat(6)
    old = [await invite(server, chat, maker) for maker in (6, 7, 7)]
    kept, target = await invite(server, other), f"/api/v1/chats/{chat}/invites"
    assert (await server.ask("DELETE", target, user=8)).status == 404
    assert (await server.ask("DELETE", target)).status == 401
    for body in (None, {"ttl_seconds": 0}):  # it is not read; also if there is none
        assert (await server.ask("DELETE", target, body, user=7)).status == 204
    for token in old:
        assert code(await joins(server, token, name="Eve")) == (401, "token_invalid")
    for token in (kept, await invite(server, chat)):
        assert (await joins(server, token, name="Cem")).status == 201


NAMES = {
    "Cem": "Cem", "  C \t em ": "C em", "x" * 64: "x" * 64, "x" * 65: "x" * 64,
    "x" * 5000: "x" * 64, "A\x00\n\u202eB": "A B", "\u200b\u2066Zo\u00eb\ufeff": "Zoë",
    "<b>&amp;": "<b>&amp;", "'; DROP TABLE user; --": "'; DROP TABLE user; --",
    "\U0001f98a": "\U0001f98a", "Anna": "Anna", "User 6": "User 6",
    "\u0627\u0644": "\u0627\u0644", "null": "null", "0": "0",
}  # fmt: skip
NO_NAMES = ["", " ", "\t\n", "\x00", "\u200b\u200d\u202e", "\u2028", "\ue000", "\xad"]


@pytest.mark.parametrize("name", [*NAMES, *NO_NAMES])
@with_server(invites="on")
async def test_a_chosen_name_is_one_line_of_64_characters_and_never_empty(
    server: VirtualServer, name: str
) -> None:
    chat = await server.chat(6)
    await server.ask("GET", "/api/v1/me", token=server.token(6, name="Anna"))
    joined = await joins(server, await invite(server, chat), name=name)
    changed = await server.ask("PATCH", "/api/v1/me", {"name": name}, user=6)
    if name in NO_NAMES:
        for answer in (joined, changed):
            assert code(answer) == (400, "bad_field")
            assert answer.json["error"]["message"] == "name: it is empty"
        assert (await server.ask("GET", "/api/v1/me", user=6)).json["name"] == "Anna"
        return
    assert (joined.status, changed.status) == (201, 200)
    assert joined.json["name"] == changed.json["name"] == NAMES[name]
    listed = (await server.ask("GET", "/api/v1/users", user=6)).json["users"]
    assert [user["name"] for user in listed] == [NAMES[name]] * 2


@with_server(members=3, invites="on")
async def test_a_full_chat_refuses_a_join_and_makes_no_user(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7, 8)
    token = await invite(server, chat)
    for more in ({"name": "Eve"}, {"bearer": server.token(9)}):
        assert code(await joins(server, token, **more)) == (400, "bad_field")
    answer = await joins(server, token, bearer=server.token(7))
    assert answer.status == 200  # a member already
    listed = (await server.command("GET", "/api/v1/users"))["users"]
    assert [user["user_id"] for user in listed] == [6, 7, 8]


@with_server(handshakes=Rate(10, 50), invites="on")
async def test_a_join_and_a_guess_cost_ten_handshakes_of_the_address(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6)
    token = await invite(server, chat)
    for address in ("203.0.113.1", "2001:db8::1"):
        from_there = {"X_Forwarded_For": address}
        # A wrong token of a user costs as much, and one handshake as each 401 does.
        answer = await joins(server, token, headers=from_there, bearer="x")
        assert code(answer) == (401, "token_invalid")
        for given, name in ((token, None), ("x", None), (token, "Cem")):
            answer = await joins(server, given, name=name, headers=from_there)
            assert answer.status != 429
        for given, bearer in ((token, ""), ("x", ""), (token, "x")):
            answer = await joins(
                server, given, name="Eve", headers=from_there, bearer=bearer
            )
            assert code(answer) == (429, "rate_limited")
            assert 0 < answer.json["error"]["retry_after"] <= 1
        # Elsewhere, and a second later, it works.
        there = {"X_Forwarded_For": "203.0.113.2"}
        assert (await joins(server, token, headers=there)).status == 200
        await trio.sleep(1)
        assert (await joins(server, token, headers=from_there)).status == 200
        await trio.sleep(10)


@with_server(handshakes=Rate(10, 50), requests=OFF, invites="on")
async def test_a_flood_of_joins_from_many_addresses_makes_50_users_and_one_a_second(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6)
    token, statuses = await invite(server, chat), list[int]()
    for number in range(200):
        there = {"X_Forwarded_For": f"2001:db8:0:{number:x}::1"}
        guess = await joins(server, f"{token}x", name="Eve", headers=there)
        assert guess.status == 401  # without the signature it costs the others nothing
        answer = await joins(server, token, name=f"N{number}", headers=there)
        statuses.append(answer.status)
    assert statuses == [201] * 50 + [429] * 150
    assert 0 < answer.json["error"]["retry_after"] <= 1
    shown = await joins(server, token, headers=there)
    assert shown.json["member_count"] == 51  # who only looks is not limited by others
    await trio.sleep(3)
    statuses = []
    for number in range(10):
        there = {"X_Forwarded_For": f"2001:db8:1:{number:x}::1"}
        answer = await joins(server, token, name=f"M{number}", headers=there)
        statuses.append(answer.status)
    assert statuses == [201] * 3 + [429] * 7
    stats = await server.stats()
    assert stats["store"]["joins"] == 53
    assert stats["rate_limited"] == {"joins": 157}
    assert len(server.app.names) == 0


@with_server(sends=Rate(1, 2), invites="on")
async def test_a_user_pays_for_joining_and_renaming_with_its_tokens_of_sends(
    server: VirtualServer,
) -> None:
    chats = [await server.chat(6) for _ in range(3)]
    tokens = [await invite(server, chat) for chat in chats]

    async def renamed(name: str) -> int:
        body = {"name": name}
        return (await server.ask("PATCH", "/api/v1/me", body, user=7)).status

    assert (await joins(server, tokens[0], bearer=server.token(7))).status == 201
    assert await renamed("Bob") == 200
    assert (await joins(server, tokens[1], bearer=server.token(7))).status == 429
    assert await renamed("Ben") == 429
    await trio.sleep(1)
    assert (await joins(server, tokens[1], bearer=server.token(7))).status == 201


@with_server()
async def test_with_invites_off_all_of_it_is_403_with_a_sentence(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6)
    made = server.app.keyring.sign(6, 60, use="invite", invite=f"{chat}:x")
    target = f"/api/v1/chats/{chat}/invites"
    for answer in (
        await server.ask("POST", target, {}, user=6),
        await server.ask("DELETE", target, user=6),
        await joins(server, made),
        await joins(server, made, name="Eve"),
        await joins(server, "x", bearer=server.token(7)),
    ):
        assert code(answer) == (403, "forbidden")
        assert "--invites off" in answer.json["error"]["message"]


@with_server(origin=("https://shop.example",), invites="on")
async def test_the_origin_is_checked_at_a_join_too(server: VirtualServer) -> None:
    chat = await server.chat(6)
    token = await invite(server, chat)
    for origin, status in (
        ("https://evil.example", 403), ("https://shop.example", 200), ("null", 403),
    ):  # fmt: skip
        answer = await joins(server, token, headers={"Origin": origin})
        assert answer.status == status
    for target, methods in (
        ("/api/v1/join", "POST, OPTIONS"), ("/api/v1/me/link", "POST, OPTIONS"),
        ("/api/v1/me", "GET, PATCH, HEAD, OPTIONS"),
        ("/api/v1/chats/5/invites", "POST, DELETE, OPTIONS"),
    ):  # fmt: skip
        answer = await server.ask("OPTIONS", target, Origin="https://shop.example")
        assert answer.headers["access-control-allow-methods"] == methods


# --- sessions, second devices, names -------------------------------------------------


@with_server()
async def test_a_session_is_renewed_until_its_user_is_revoked(
    server: VirtualServer,
) -> None:
    link = server.token(6, use="signin", name="Anna")
    session = (await server.ask("POST", "/api/v1/session", token=link)).json
    old = server.app.keyring.sign(6, 5, use="session")
    for token in (session["token"], old):
        answer = await server.ask("POST", "/api/v1/session", token=token)
        assert (answer.status, answer.json["expires_in"]) == (200, SESSION)
        claims = jwt.decode(answer.json["token"], options={"verify_signature": False})
        assert claims.keys() == {"user_id", "iat", "exp", "use"}  # no name, no scope
        assert claims["exp"] - claims["iat"] == SESSION
    ring = server.app.keyring
    ticket = ring.ticket(ring.verify(server.token(6)))["token"]
    for token in (
        server.token(6), server.token(6, scope="service"), "x", "",
        ring.sign(6, -60, use="session"), ticket,
    ):  # fmt: skip
        answer = await server.ask("POST", "/api/v1/session", token=token)
        assert answer.status == 401
    await server.command("POST", "/api/v1/internal/chat/revoke", {"user_id": 6})
    for token in (session["token"], link):
        answer = await server.ask("POST", "/api/v1/session", token=token)
        assert code(answer) == (401, "token_invalid")


@with_server()
async def test_a_session_yields_a_link_for_a_second_device(
    server: VirtualServer,
) -> None:
    link = server.token(6, use="signin", name="Anna")
    session = (await server.ask("POST", "/api/v1/session", token=link)).json["token"]
    answer = await server.ask("POST", "/api/v1/me/link", token=session)
    second = answer.json["token"]
    assert answer.json == {"token": second, "expires_in": 600}
    claims = jwt.decode(second, options={"verify_signature": False})
    assert claims["exp"] - claims["iat"] == 600
    device = await server.ask("POST", "/api/v1/session", token=second)
    assert (device.json["user_id"], device.json["name"]) == (6, "Anna")
    for wrong in (link, second, server.token(6), server.token(6, scope="service"), ""):
        answer = await server.ask("POST", "/api/v1/me/link", token=wrong)
        assert answer.status == 401
    await server.command("POST", "/api/v1/internal/chat/revoke", {"user_id": 6})
    assert (await server.ask("POST", "/api/v1/session", token=second)).status == 401


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({}, {"create_chats": True, "invites": False, "rename": True}),
        ({"invites": "on"}, {"create_chats": True, "invites": True, "rename": True}),
        (
            {"chats_by": "service", "max_content_chars": 7},
            {"create_chats": False, "invites": False, "max_content_chars": 7},
        ),
    ],
)
def test_me_says_what_the_server_allows(
    tmp_path: Path, settings: dict[str, Any], allowed: dict[str, object]
) -> None:
    @with_server(**settings)
    async def check(server: VirtualServer) -> None:
        me = (await server.ask("GET", "/api/v1/me", user=6)).json
        assert me.keys() == {"user_id", "name", "server"}
        assert me["server"] == {
            "max_content_chars": 4000, "edit_seconds": 86_400, "create_chats": True,
            "invites": False, "rename": True,
        } | allowed  # fmt: skip

    check(tmp_path=tmp_path)


@with_server(chats_by="service")
async def test_me_says_that_a_service_may_create_chats(server: VirtualServer) -> None:
    token = server.token(6, scope="service")
    me = (await server.ask("GET", "/api/v1/me", token=token)).json
    assert me["server"]["create_chats"] is True
    answer = await server.ask("POST", "/api/v1/chats", {"title": "Tea"}, token=token)
    assert answer.status == 201


@with_server()
async def test_a_chosen_name_is_newer_than_that_of_a_token_of_its_second(
    server: VirtualServer,
) -> None:
    token = server.token(6, iat=int(time.time()), name="Ann")

    async def name(method: str, body: object) -> str:
        answer = await server.ask(method, "/api/v1/me", body, token=token)
        return str(answer.json["name"])

    assert await name("GET", None) == "Ann"
    for chosen in ("Anna", "Annie"):  # twice in a second: the last one counts
        assert await name("PATCH", {"name": chosen}) == chosen
        for restarted in (False, True):
            if restarted:
                server.app.names.clear()
            assert await name("GET", None) == chosen


@with_server()
async def test_after_several_revocations_in_a_second_a_user_may_choose_a_name(
    server: VirtualServer,
) -> None:
    for revocations in range(5):
        for _ in range(revocations):
            await server.command("POST", "/api/v1/internal/chat/revoke", {"user_id": 6})
        token, name = server.app.keyring.sign(6, 60), f"Anna {revocations}"
        answer = await server.ask("PATCH", "/api/v1/me", {"name": name}, token=token)
        assert (answer.status, answer.json["name"]) == (200, name)


@with_server()
async def test_the_newest_name_wins_whether_a_token_or_the_user_said_it(
    server: VirtualServer,
) -> None:
    async def ask(name: str, age: int | None, method: str = "GET") -> str | None:
        """Ask with a token that says a name, or change the name."""
        body = {"name": name} if method == "PATCH" else None
        iat = None if age is None else int(time.time()) - age
        said = None if method == "PATCH" else name
        token = server.token(6, iat=iat, name=said)
        answer = await server.ask(method, "/api/v1/me", body, token=token)
        assert answer.status == 200
        found: str | None = answer.json["name"]
        return found

    assert await ask("Ann", 100) == "Ann"
    for restarted in (False, True):
        assert await ask("Anna", 0, "PATCH") == "Anna"
        if restarted:
            server.app.names.clear()
        for age in (100, 50, 1, None):  # older tokens, also such as were not seen yet
            assert await ask("Ann", age) == "Anna"
        assert await ask("Annie", 0, "PATCH") == "Annie"
        assert await ask("Annette", -3) == "Annette"  # newer: its clock is ahead
        assert await ask("Ann", 1) == "Annette"


@with_server()
async def test_a_name_that_is_not_stored_is_an_error_of_the_change_only(
    server: VirtualServer,
) -> None:
    server.store.failure = "SQLITE_FULL"
    real = server.store._transact

    def full(jobs: list[chatd.Job]) -> chatd.Batch:
        return server.store._storage_failed(jobs)

    server.store._transact = full  # type: ignore[method-assign]
    named = server.token(6, name="Anna")
    answer = await server.ask("PATCH", "/api/v1/me", {"name": "Ann"}, user=6)
    assert code(answer) == (503, "storage_failed")
    assert (await server.ask("GET", "/api/v1/me", token=named)).json["name"] is None
    await server.join(6, token=named)
    server.store._transact = real  # type: ignore[method-assign]


# --- whole process -------------------------------------------------------------------


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ServerProcess]:
    async with ServerProcess(tmp_path / "server").serving("--invites=on") as server:
        yield server


async def made(server: ServerProcess, chat: int, maker: int) -> str:
    target = f"POST /api/v1/chats/{chat}/invites"
    answer = await server.want(201, target, server.token(maker), {})
    return str(answer["token"])


async def test_a_user_whom_a_restore_has_forgotten_keeps_its_id_and_may_join_again(
    server: ServerProcess, tmp_path: Path
) -> None:
    chat, copy = await server.chat(1, title="Tea"), tmp_path / "copy.db"
    token = await made(server, chat, 1)
    early = await server.want(
        201, "POST /api/v1/join", "", {"token": token, "name": "E"}
    )
    assert (await run_chatd("backup", copy, "--db", server.db)).status == 0
    late = await server.want(
        201, "POST /api/v1/join", "", {"token": token, "name": "L"}
    )
    cursor = await server.cursor(late["user_id"])
    young = await server.chat(1, title="After the copy")
    gone = await made(server, young, 1)
    await server.stop()
    assert (await run_chatd("restore", copy, "--db", server.db)).status == 0
    await server.begin()

    # The session still signs the user in; it is in no chat, and has no name.
    me = await server.want(200, "GET /api/v1/me", late["token"])
    assert (me["user_id"], me["name"]) == (late["user_id"], None)
    chats = await server.want(200, "GET /api/v1/chats", late["token"])
    assert chats["chats"] == []
    peer = await server.peer(late["token"], cursor)
    assert peer.hello["resume"] == "resync"
    await server.want(404, f"GET /api/v1/chats/{chat}/messages", late["token"])
    # A chat that is new now has the id of the lost one, but not its invitations.
    assert await server.chat(1, title="Another") == young
    await server.want(401, "POST /api/v1/join", "", {"token": gone, "name": "Eve"})
    # Strangers get other ids; the user joins again as itself, and chooses its name.
    body: dict[str, object] = {"token": token}
    new = [
        (await server.want(201, "POST /api/v1/join", "", body | {"name": "N"}))[
            "user_id"
        ]
        for _ in range(3)
    ]
    assert len({*new, early["user_id"], late["user_id"]}) == 5
    again = await server.want(201, "POST /api/v1/join", late["token"], body)
    assert again == {"user_id": late["user_id"], "chat_id": chat}
    await server.want(200, "PATCH /api/v1/me", late["token"], {"name": "L"})
    assert (await peer.receive("chat_added"))["chat_id"] == chat
    assert (await run_chatd("check", "--db", server.db)).status == 0


async def test_what_was_revoked_after_a_backup_has_to_be_revoked_again(
    server: ServerProcess, tmp_path: Path
) -> None:
    chat, copy = await server.chat(1), tmp_path / "copy.db"
    token, target = await made(server, chat, 1), f"DELETE /api/v1/chats/{chat}/invites"
    assert (await run_chatd("backup", copy, "--db", server.db)).status == 0
    await server.want(204, target, server.token(1))
    await server.want(401, "POST /api/v1/join", "", {"token": token})
    await server.stop()
    assert (await run_chatd("restore", copy, "--db", server.db)).status == 0
    await server.begin()
    await server.want(200, "POST /api/v1/join", "", {"token": token})
    await server.want(204, target, server.token(1))
    await server.want(401, "POST /api/v1/join", "", {"token": token})


async def test_no_token_of_a_join_is_in_the_log_also_through_the_proxy(
    server: ServerProcess, tmp_path: Path
) -> None:
    await server.stop()
    await server.begin(*server.flags, "--log-level=debug")
    chat = await server.chat(1)
    proxy = ProxyProcess(tmp_path / "proxy", server.port, server.db)
    async with proxy.serving("--log-level=debug"):
        target = f"/api/v1/chats/{chat}/invites"
        answer = await proxy.want(201, f"POST {target}", server.token(1), {})
        for name in ({}, {"name": "Cem"}, {"name": ""}):
            body = {"token": answer["token"], **name}
            assert (await proxy.ask("POST", "/api/v1/join", "", body)).status < 401
        await proxy.want(401, "POST /api/v1/join", "", {"token": answer["token"] + "x"})
        await proxy.want(204, f"DELETE {target}", server.token(1))
        for path in (target, "/api/v1/join"):
            assert f"path='{path}'" in proxy.output
        for output in (proxy.output, server.output):
            assert "eyJ" not in output
            assert "Cem" not in output


async def test_invitations_exclude_other_ways_to_say_who_may_chat(
    tmp_path: Path,
) -> None:
    key = tmp_path / "backend.key"
    key.write_text("k" * 32)
    db = ("--db", tmp_path / "chatd.db", "--listen=127.0.0.1:0")
    for words in (("--jwt-key", key), ("--chats-by", "service")):
        done = await run_chatd("serve", *db, "--invites=on", *words)
        assert (done.status, done.out) == (2, ""), done
        assert "--invites on: not with --jwt-key or --chats-by service" in done.err
    for value in ("yes", "1", "ON", "user"):
        done = await run_chatd("serve", *db, f"--invites={value}")
        assert done.status == 2
        assert "is not one of on, off" in done.err
    with contextlib.suppress(sqlite3.Error):
        assert not (tmp_path / "chatd.db").exists()
