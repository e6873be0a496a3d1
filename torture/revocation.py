"""Who is removed, revoked or out of time hears nothing more of a busy chat.

Some write all the time. The victim listens in every way there is: on a socket, on one
that reads slowly, on sockets that begin with an old cursor again and again, over polls,
over pages of history, over the list of chats. The moment is that of the answer: what is
asked later is refused or without that chat; and, by `seq`, nothing that came after the
removal, or that was sent after the revocation was answered, reaches the victim.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import trio
from harness import (
    Chatd,
    Client,
    Closed,
    Figures,
    Frame,
    Refused,
    http,
    make_chat,
    run_trio,
    text,
    until,
)

WRITERS, WITNESS = (1, 2, 3), 4
GONE = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, Closed, Refused)
GRACE, LEEWAY = 25.0, 5.0  # token_grace_seconds of a socket; of a request
LATE = 5.0  # that the sweeper, once a second on a busy machine, may be late


class Heard(NamedTuple):
    """Something of the chat that reached the victim."""

    way: str  # how it listened
    asked_at: float  # when the request, or the connection, began
    kind: str
    seq: int


class Answered(NamedTuple):
    """An answer to the victim."""

    way: str
    asked_at: float
    status: int


class Victim:
    """A user who listens to one chat in every way there is."""

    def __init__(self, chatd: Chatd, user_id: int, chat_id: int, token: str) -> None:
        self.chatd = chatd
        self.user_id = user_id
        self.chat_id = chat_id
        self.token = token
        self.heard: list[Heard] = []
        self.answered: list[Answered] = []
        self.ends: dict[str, Closed] = {}
        self.first = Client(chatd, user_id, token=token)
        self.slow = Client(chatd, user_id, token=token, receive_buffer=4096)
        self.begun_at = ""  # a cursor from before all

    def start(self, nursery: trio.Nursery) -> None:
        """Listen in all ways, each again and again."""
        for way in (self._socket, self._slow_socket):
            nursery.start_soon(way)
        for again in (self._catch_up, self._poll, self._history, self._chats):
            nursery.start_soon(self._forever, again)

    async def connect(self) -> None:
        """Open the two sockets that stay."""
        self.begun_at = (await self.first.connect())["cursor"]
        await self.slow.connect()

    async def _forever(self, listen: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await listen()
            except Refused as no:
                self.answered.append(Answered("socket", self.asked_at, no.status))
            except GONE:
                pass  # the socket was closed; the next attempt will be refused
            await trio.sleep(0.01)

    asked_at = 0.0  # by the way that can be refused a socket: there is one

    def _note(self, way: str, asked_at: float, frame: Frame) -> None:
        if frame.get("chat_id") == self.chat_id and frame["type"] != "ack":
            seq = frame.get("seq", 0)
            self.heard.append(Heard(way, asked_at, frame["type"], seq))

    async def _socket(self) -> None:
        await self._hear("socket", self.first, 0)

    async def _slow_socket(self) -> None:
        await self._hear("slow socket", self.slow, 0.01)

    async def _hear(self, way: str, client: Client, pause: float) -> None:
        began = trio.current_time()
        try:
            while True:
                self._note(way, began, await client.receive(seconds=3600))
                await trio.sleep(pause)
        except Closed as end:
            self.ends[way] = end

    async def _catch_up(self) -> None:
        """Come with an old cursor, hear for a moment, go."""
        client = Client(self.chatd, self.user_id, token=self.token)
        client.cursor, self.asked_at = self.begun_at, trio.current_time()
        began = self.asked_at
        try:
            await client.connect()
            self.answered.append(Answered("socket", began, 101))
            with trio.move_on_after(0.1):
                while True:
                    self._note("catching up", began, await client.receive())
        finally:
            client.cut()

    async def _get(self, way: str, path: str) -> Frame:
        began = trio.current_time()
        reply = await http(self.chatd, "GET", path, self.token)
        self.answered.append(Answered(way, began, reply.status))
        if reply.status != 200:
            return {}
        body: Frame = reply.json
        for event in body.get("events", ()):
            self._note("poll", began, event)
        for message in body.get("messages", ()):
            self.heard.append(Heard("history", began, "message", message["id"]))
        for chat in body.get("chats", ()):
            if chat["id"] == self.chat_id:
                seq = (chat["last_message"] or {"id": 0})["id"]
                self.heard.append(Heard("chats", began, "chat", seq))
        return body

    async def _poll(self) -> None:
        path = f"/api/v1/events?limit=500&cursor={self.begun_at}"
        while True:
            page = await self._get("poll", path)
            if not page.get("more"):
                return
            path = f"/api/v1/events?limit=500&cursor={page['cursor']}"

    async def _history(self) -> None:
        await self._get("history", f"/api/v1/chats/{self.chat_id}/messages?limit=20")

    async def _chats(self) -> None:
        await self._get("chats", "/api/v1/chats")

    def hang_up(self) -> None:
        """Leave."""
        self.first.cut()
        self.slow.cut()


class Busy:
    """A server with a chat in which much is said, and a witness who hears it all."""

    def __init__(self, chatd: Chatd) -> None:
        self.chatd = chatd
        self.witness = Client(chatd, WITNESS)
        self.chat_id = 0
        self.sent_at: dict[int, float] = {}  # message id: when it was begun
        self.rounds = 0
        self.proofs = 0  # things heard and answers, all held against the moment

    async def write(self, user_id: int) -> None:
        """Write and type without an end, with 4 without an answer."""
        client = Client(self.chatd, user_id)
        await client.connect()
        begun: dict[str, float] = {}
        while True:
            await client.send_command("typing", chat_id=self.chat_id, is_typing=True)
            for _ in range(4):
                now = trio.current_time()
                begun[await client.send(self.chat_id, text("y" * 200))] = now
            while client.unacked:
                await client.receive()
            for client_id, now in begun.items():
                self.sent_at[client.acked[client_id]["message_id"]] = now
            begun.clear()
            client.events.clear()
            await trio.sleep(0.02)

    async def call(self, method: str, path: str, body: Frame | None = None) -> int:
        """Ask as the service; the status."""
        token = self.chatd.service_token()
        return (await http(self.chatd, method, path, token, body)).status

    async def post(self) -> int:
        """Write a message as the service; its id."""
        path = f"/api/v1/chats/{self.chat_id}/messages"
        body = {"content": text("after"), "sender_id": WRITERS[0]}
        reply = await http(self.chatd, "POST", path, self.chatd.service_token(), body)
        assert reply.status == 201, f"a post was answered {reply.status}"
        return int(reply.json["message"]["id"])

    async def members(self, user_id: int, method: str) -> None:
        """Add (POST) or remove (DELETE) somebody."""
        path = f"/api/v1/chats/{self.chat_id}/members"
        if method == "DELETE":
            status = await self.call(method, f"{path}/{user_id}")
        else:
            status = await self.call(method, path, {"user_id": user_id})
        assert status in (201, 204), f"{method} of a member was answered {status}"


# --- removed -------------------------------------------------------------------------


async def removed(busy: Busy, rounds: int) -> None:
    """Remove and add a member, many times, and look each time."""
    chatd, user_id = busy.chatd, 9
    await busy.members(user_id, "POST")
    joined_seq = await told(busy, "member_added", user_id) + 1
    victim = Victim(chatd, user_id, busy.chat_id, chatd.token(user_id))
    await victim.connect()
    async with trio.open_nursery() as nursery:
        victim.start(nursery)
        for _ in range(rounds):
            await trio.sleep(0.3)
            victim.heard.clear()
            victim.answered.clear()
            await trio.sleep(0.2)
            await busy.members(user_id, "DELETE")
            moment = trio.current_time()
            left_seq = await told(busy, "member_removed", user_id)
            assert not victim.ends, f"a socket ended: {victim.ends}"
            # Until the one who reads slowly has come to it, too.
            came = await until(
                lambda: (
                    {"socket", "slow socket"}
                    <= {h.way for h in victim.heard if h.kind == "member_removed"}
                ),
                60,
            )
            assert came, "the removed one was not told"
            await trio.sleep(0.2)
            busy.proofs += len(victim.heard) + len(victim.answered)
            judge_removed(victim, joined_seq, left_seq, moment)
            busy.rounds += 1
            await busy.members(user_id, "POST")
            joined_seq = await told(busy, "member_added", user_id) + 1
        nursery.cancel_scope.cancel()
    victim.hang_up()


async def told(busy: Busy, kind: str, user_id: int) -> int:
    """Wait until the witness has heard of it, anew; its seq."""
    events = busy.witness.events

    def found() -> list[int]:
        return [
            event["seq"]
            for event in events
            if event["type"] == kind and event.get("user_id") == user_id
        ]

    assert await until(lambda: bool(found()), 30), f"nobody was told: {kind}"
    seq = found()[0]
    events[:] = [event for event in events if event["seq"] > seq]
    return seq


def judge_removed(
    victim: Victim, joined_seq: int, left_seq: int, moment: float
) -> None:
    """Nothing from outside of the membership; what was asked later has nothing."""
    ended: set[str] = set()
    for heard in victim.heard:
        if heard.way in ("socket", "slow socket"):
            assert heard.way not in ended, f"after member_removed: {heard}"
            if heard.kind == "member_removed":
                ended.add(heard.way)
        assert heard.seq <= left_seq, f"removed at seq {left_seq}, but: {heard}"
        own = heard.kind in ("chat_added", "member_removed")
        log = heard.way not in ("history", "chats") and heard.kind != "typing"
        assert own or not log or heard.seq > joined_seq, (
            f"a member since seq {joined_seq}, but: {heard}"
        )
        late = heard.asked_at >= moment
        assert own or not late, f"asked for after the removal was answered: {heard}"
    for way, asked_at, status in victim.answered:
        if asked_at >= moment and way == "history":
            assert status == 404, f"history was answered {status} after the removal"


# --- revoked -------------------------------------------------------------------------


async def revoked(busy: Busy, user_id: int) -> Victim:
    """Revoke one who listens, and look."""
    chatd = busy.chatd
    await busy.members(user_id, "POST")
    victim = Victim(chatd, user_id, busy.chat_id, chatd.token(user_id))
    await victim.connect()
    reply = await http(chatd, "GET", "/api/v2/ws-token", victim.token)
    ticket = reply.json["token"]
    async with trio.open_nursery() as nursery:
        victim.start(nursery)
        await trio.sleep(0.6)
        path = "/api/v1/internal/chat/revoke"
        status = await busy.call("POST", path, {"user_id": user_id})
        moment = trio.current_time()
        assert status == 200, f"revoking was answered {status}"
        first_after = await busy.post()
        gone = await until(lambda: len(victim.ends) == 2, 60)
        assert gone, f"a revoked socket lives on: only {victim.ends} ended"
        await trio.sleep(0.3)
        nursery.cancel_scope.cancel()
    judge_ends(victim, 4503)
    for heard in victim.heard:
        assert heard.seq < first_after, f"sent after the revocation: {heard}"
    for answer in victim.answered:
        assert answer.asked_at < moment or answer.status == 401, (
            f"asked after the revocation was answered: {answer}"
        )
    await is_refused(chatd, victim.token, ticket)
    busy.rounds += 1
    busy.proofs += len(victim.heard) + len(victim.answered)
    victim.hang_up()
    return victim


def judge_ends(victim: Victim, code: int) -> None:
    """Who reads is told why; who is too slow even for the close is cut."""
    for way, end in victim.ends.items():
        codes = (code, 1006) if way == "slow socket" else (code,)
        assert end.code in codes, f"the {way} ended with {end.code}, not {code}"


async def is_refused(chatd: Chatd, token: str, ticket: str) -> None:
    """A revoked token, and a ticket that it got, open nothing."""
    for path in ("/api/v1/me", "/api/v1/events", "/api/v2/ws-token", "/api/v1/chats"):
        reply = await http(chatd, "GET", path, token)
        assert reply.status == 401, f"{path} was answered {reply.status}"
    for which, secret in (("token", token), ("ticket", ticket)):
        status = 101
        try:
            await Client(chatd, 0, token=secret).connect()
        except Refused as no:
            status = no.status
        assert status == 401, f"a revoked {which} was answered {status}"


# --- out of time ---------------------------------------------------------------------


async def expired(busy: Busy, user_id: int) -> None:
    """Let a token end while its user listens; another one renews it."""
    chatd = busy.chatd
    await busy.members(user_id, "POST")
    ttl = 4.0
    ends_at, now = trio.current_time() + ttl, time.time()
    token = chatd.token(user_id, ttl)
    ticket = (await http(chatd, "GET", "/api/v2/ws-token", token)).json["token"]
    victim = Victim(chatd, user_id, busy.chat_id, token)
    victim.slow.token = ticket
    renewing = Client(chatd, user_id, token=token, remember=False)
    await victim.connect()
    await renewing.connect()
    answer = await renewing.ask("auth", token=chatd.token(user_id))
    assert answer["type"] == "ack", f"auth was answered {answer}"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(renewing.receive_until_closed)
        victim.start(nursery)
        out = await until(lambda: len(victim.ends) == 2, ttl + GRACE + LATE + 60)
        assert out, f"a socket outlives its token: only {victim.ends} ended"
        sockets_until = trio.current_time()
        await trio.sleep(0.5)
        pong = await renewing.send_command("ping")
        assert pong, "the renewed socket ended"
        nursery.cancel_scope.cancel()
    late = sockets_until - ends_at - GRACE
    assert late > -1.5, f"the sockets ended {-late:.1f} s too early"
    assert late < LATE + 10, f"the sockets ended {late:.1f} s late"
    judge_ends(victim, 4401)
    for answered in victim.answered:
        if answered.asked_at > ends_at + LEEWAY + 0.5:
            assert answered.status == 401, f"after the token's end: {answered}"
    for heard in victim.heard:
        socket = heard.way in ("socket", "slow socket", "catching up")
        limit = ends_at + (GRACE if socket else LEEWAY) + LATE
        begun = busy.sent_at.get(heard.seq, 0.0)
        assert begun <= limit, f"sent after the token's end: {heard}"
    assert time.time() > now
    busy.rounds += 1
    busy.proofs += len(victim.heard) + len(victim.answered)
    victim.hang_up()
    renewing.cut()


async def act(busy: Busy, full: bool) -> None:
    """Let all happen in one busy chat at the same time."""
    chatd = busy.chatd
    busy.chat_id = await make_chat(chatd, [*WRITERS, WITNESS], "busy")
    await busy.witness.connect()
    victims: list[Victim] = []
    async with trio.open_nursery() as background:
        background.start_soon(busy.witness.receive_until_closed)
        for user_id in WRITERS:
            background.start_soon(busy.write, user_id)

        async def revoke_some() -> None:
            for user_id in range(20, 60 if full else 26):
                victim = await revoked(busy, user_id)
                victims.append(victim)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(removed, busy, 100 if full else 15)
            nursery.start_soon(revoke_some)
            nursery.start_soon(expired, busy, 8)
        background.cancel_scope.cancel()
    chatd.kill()
    await chatd.start_in_thread()
    for victim in victims:
        await is_refused(chatd, victim.token, victim.token)


def prove(full: bool) -> Figures:
    """Remove, revoke and let expire, in a chat in which much is said."""
    with Chatd() as chatd:
        busy = Busy(chatd)
        run_trio(act, busy, full)
        said = len(busy.sent_at)
    return Figures(
        "a member is removed, or a token is revoked or expires, in a busy chat: no "
        "event from after that moment reaches the user, over sockets, polls, history, "
        "the chat list or while catching up; and a restart changes nothing about it",
        f"{busy.rounds} times while {said:,} messages were sent; of {busy.proofs:,} "
        "events and answers 0 came too late",
        {"rounds": busy.rounds, "messages": said, "looked_at": busy.proofs},
    )
