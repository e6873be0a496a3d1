"""A user who is removed or revoked, or whose token ends, gets no more of a busy chat.

Other users write all the time. The victim reads in every way there is: on a socket, on
a socket that it reads slowly, on sockets that catch up from an old cursor again and
again, over polls, over pages of history, searches, and over the list of chats. It also
sends, edits and deletes, over a socket and HTTP. The moment that counts is the answer
to the removal or revocation. A later request is refused, or its answer lacks the chat:
an old `chat_added` then shows only the chat's number. No event with a `seq` after the
removal, or sent after the answer to the revocation, reaches the victim, and none comes
from it. Invitations that a revoked user has made let nobody in.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import trio
from crowd import read_database
from harness import (
    DISCONNECTED,
    Chatd,
    Client,
    Closed,
    Figures,
    Frame,
    Http,
    Refused,
    Reply,
    http,
    make_chat,
    post_message,
    revoke,
    run_trio,
    text,
    ticket,
    until,
)

WRITERS, WITNESS = (1, 2, 3), 4
JOIN = "/api/v1/join"
# How long a token counts after its end: on an open socket (Settings), in a request.
GRACE_SECONDS, LEEWAY_SECONDS = 25.0, 5.0
LATE_SECONDS = 5.0  # the sweeper looks once a second, and the machine is busy


class Received(NamedTuple):
    """An item of the chat that reached the victim."""

    way: str  # how the victim got it
    asked_at: float  # when the request or the connection began
    kind: str
    seq: int
    shows: bool = True  # False: nothing of the chat but its number


class Answered(NamedTuple):
    """The status of an answer to the victim."""

    way: str
    asked_at: float
    status: int


class Victim:
    """A user who reads one chat in every way there is, until it is shut out."""

    def __init__(self, chatd: Chatd, user_id: int, chat_id: int, token: str) -> None:
        self.chatd = chatd
        self.user_id = user_id
        self.chat_id = chat_id
        self.token = token
        self.received: list[Received] = []
        self.answered: list[Answered] = []
        self.ends: dict[str, Closed] = {}
        self.fast = Client(chatd, user_id, token=token)
        self.slow = Client(chatd, user_id, token=token, receive_buffer=4096)
        self.old_cursor = ""  # from before the first message
        self.asked_at = 0.0  # when the newest socket was asked for
        self.invitation = ""
        self.own_id = 0  # the newest message that it posted

    def start(self, nursery: trio.Nursery) -> None:
        """Read in all ways, each again and again."""
        for socket in (self._socket, self._slow_socket):
            nursery.start_soon(socket)
        for act in (self._catch_up, self._poll, self._history, self._search,
                    self._chats, self._change, self._command):  # fmt: skip
            nursery.start_soon(self._forever, act)

    async def connect(self) -> None:
        """Open the two sockets that stay."""
        self.old_cursor = (await self.fast.connect())["cursor"]
        await self.slow.connect()

    async def _forever(self, read: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await read()
            except Refused as refusal:
                answered = Answered("socket", self.asked_at, refusal.status)
                self.answered.append(answered)
            except (*DISCONNECTED, trio.ClosedResourceError):
                pass  # the socket was closed; the next attempt will be refused
            await trio.sleep(0.01)

    def _record(self, way: str, asked_at: float, frame: Frame) -> None:
        if frame.get("chat_id") == self.chat_id and frame["type"] != "ack":
            chat = frame.get("chat")
            shows = chat is None or bool(
                chat["title"] or chat["members"] or chat["last_message"]
                or chat["last_n"] or chat["member_count"] or chat["created_by"]
            )  # fmt: skip
            item = Received(way, asked_at, frame["type"], frame.get("seq", 0), shows)
            self.received.append(item)

    async def _socket(self) -> None:
        await self._receive("socket", self.fast, 0)

    async def _slow_socket(self) -> None:
        await self._receive("slow socket", self.slow, 0.01)

    async def _receive(self, way: str, client: Client, pause: float) -> None:
        began = trio.current_time()
        try:
            while True:
                self._record(way, began, await client.receive(seconds=3600))
                await trio.sleep(pause)
        except Closed as end:
            self.ends[way] = end

    async def _catch_up(self) -> None:
        """Connect with the old cursor, receive for a moment, and disconnect."""
        client = Client(self.chatd, self.user_id, token=self.token)
        client.cursor, self.asked_at = self.old_cursor, trio.current_time()
        began = self.asked_at
        try:
            await client.connect()
            self.answered.append(Answered("socket", began, 101))
            with trio.move_on_after(0.1):
                while True:
                    self._record("catching up", began, await client.receive())
        finally:
            client.cut()

    async def _get(self, way: str, path: str) -> Frame:
        """Send one request; record the answer and all of the chat that is in it."""
        began = trio.current_time()
        reply = await http(self.chatd, "GET", path, self.token)
        self.answered.append(Answered(way, began, reply.status))
        if reply.status != 200:
            return {}
        body: Frame = reply.json
        for event in body.get("events", ()):
            self._record("poll", began, event)
        for message in body.get("messages", ()):
            self.received.append(Received("history", began, "message", message["id"]))
        for chat in body.get("chats", ()):
            if chat["id"] == self.chat_id:
                seq = (chat["last_message"] or {"id": 0})["id"]
                self.received.append(Received("chats", began, "chat", seq))
        return body

    async def _poll(self) -> None:
        path = f"/api/v1/events?limit=500&cursor={self.old_cursor}"
        while True:
            page = await self._get("poll", path)
            if not page.get("more"):
                return
            path = f"/api/v1/events?limit=500&cursor={page['cursor']}"

    async def _history(self) -> None:
        await self._get("history", f"/api/v1/chats/{self.chat_id}/messages?limit=20")

    async def _search(self) -> None:
        await self._get("history", f"/api/v1/search?q=y&chat_id={self.chat_id}")

    async def _change(self) -> None:
        """Post a message, edit it, and delete it, each whatever was answered before."""
        connection = Http(self.chatd)
        messages = f"/api/v1/chats/{self.chat_id}/messages"
        body = {"content": text("of the victim")}
        try:
            while True:
                reply = await self._ask(connection, "POST", messages, body)
                if reply.status == 201:
                    self.own_id = reply.json["message"]["id"]
                if not self.own_id:
                    return
                path = f"/api/v1/messages/{self.own_id}"
                body = {"content": text("of the victim, edited")}
                await self._ask(connection, "PATCH", path, body)
                if reply.status == 201:
                    await self._ask(connection, "DELETE", path)
                await trio.sleep(0.005)
        finally:
            await connection.aclose()

    async def _ask(
        self, connection: Http, method: str, path: str, body: Frame | None = None
    ) -> Reply:
        began = trio.current_time()
        reply = await connection.request(method, path, self.token, body)
        # An edit after the deletion is refused while the victim is a member, too.
        self.answered.append(Answered("change", began, reply.status))
        return reply

    async def _command(self) -> None:
        """Send, edit and delete on a socket, several commands in flight."""
        client = Client(self.chatd, self.user_id, token=self.token, remember=False)
        self.asked_at = trio.current_time()
        try:
            await client.connect()
            while True:
                began = trio.current_time()
                await client.send(self.chat_id, text("of the victim"))
                for ack in list(client.acked.values())[-2:]:
                    message_id = ack["message_id"]
                    if message_id not in client.unacked_changes:
                        content = None if message_id in client.changes else text("z")
                        await client.change(message_id, content)
                while not client.all_acked:
                    frame = await client.receive()
                    if frame["type"] in ("ack", "error"):
                        status = 200 if frame["type"] == "ack" else 404
                        self.answered.append(Answered("command", began, status))
                await trio.sleep(0.005)
        finally:
            client.cut()

    async def _chats(self) -> None:
        await self._get("chats", "/api/v1/chats")

    def cut(self) -> None:
        """Close the two sockets."""
        self.fast.cut()
        self.slow.cut()


class BusyChat:
    """A server, a chat with many messages, and a witness that receives all of them."""

    def __init__(self, chatd: Chatd) -> None:
        self.chatd = chatd
        self.witness = Client(chatd, WITNESS)
        self.chat_id = 0
        self.sent_at: dict[int, float] = {}  # message id: when its sending began
        # A user, and the seqs between which no event may be of its messages.
        self.silences: list[tuple[int, int, int]] = []
        self.rounds = 0
        self.checked = 0  # items and answers that were compared with the moment

    async def write(self, user_id: int) -> None:
        """Send messages, 4 at a time, and typing, until cancelled."""
        client = Client(self.chatd, user_id)
        await client.connect()
        began_at: dict[str, float] = {}  # client_id: when its sending began
        while True:
            await client.send_command("typing", chat_id=self.chat_id, is_typing=True)
            for _ in range(4):
                now = trio.current_time()
                began_at[await client.send(self.chat_id, text("y" * 200))] = now
            while client.unacked:
                await client.receive()
            for client_id, now in began_at.items():
                self.sent_at[client.acked[client_id]["message_id"]] = now
            began_at.clear()
            client.events.clear()
            await trio.sleep(0.02)

    async def post(self) -> int:
        """Send a message as the service; return its id."""
        connection = Http(self.chatd)
        message_id = await post_message(
            connection, self.chat_id, text("after"), WRITERS[0]
        )
        await connection.aclose()
        return message_id

    async def change_member(self, user_id: int, method: str) -> None:
        """Add (POST) or remove (DELETE) a member, as the service."""
        path, token = (
            f"/api/v1/chats/{self.chat_id}/members",
            self.chatd.service_token(),
        )
        body: Frame | None = {"user_id": user_id}
        if method == "DELETE":
            path, body = f"{path}/{user_id}", None
        status = (await http(self.chatd, method, path, token, body)).status
        assert status in (201, 204), f"{method} of a member was answered {status}"


# --- removed -------------------------------------------------------------------------


async def removed(busy: BusyChat, rounds: int) -> None:
    """Remove a member and add it again, many times; verify each removal."""
    chatd, user_id = busy.chatd, 9
    await busy.change_member(user_id, "POST")
    joined_seq = await witnessed(busy, "member_added", user_id) + 1
    victim = Victim(chatd, user_id, busy.chat_id, chatd.token(user_id))
    await victim.connect()
    async with trio.open_nursery() as nursery:
        victim.start(nursery)
        for _ in range(rounds):
            await trio.sleep(0.3)
            victim.received.clear()
            victim.answered.clear()
            await trio.sleep(0.2)
            await busy.change_member(user_id, "DELETE")
            moment = trio.current_time()
            left_seq = await witnessed(busy, "member_removed", user_id)
            assert not victim.ends, f"a socket ended: {victim.ends}"
            # The slow socket receives it later.
            arrived = await until(
                lambda: (
                    {"socket", "slow socket"}
                    <= {r.way for r in victim.received if r.kind == "member_removed"}
                ),
                60,
            )
            assert arrived, "the removed user got no member_removed"
            await trio.sleep(0.2)
            busy.checked += len(victim.received) + len(victim.answered)
            verify_removed(victim, joined_seq, left_seq, moment)
            newest = await busy.post()
            busy.silences.append((user_id, left_seq, newest))
            busy.rounds += 1
            await busy.change_member(user_id, "POST")
            joined_seq = await witnessed(busy, "member_added", user_id) + 1
        nursery.cancel_scope.cancel()
    victim.cut()


async def witnessed(busy: BusyChat, kind: str, user_id: int) -> int:
    """Wait until the witness receives the next event of this kind; return its seq."""
    events = busy.witness.events

    def found() -> list[int]:
        return [
            event["seq"]
            for event in events
            if event["type"] == kind and event.get("user_id") == user_id
        ]

    assert await until(lambda: bool(found()), 30), f"no {kind} arrived"
    seq = found()[0]
    events[:] = [event for event in events if event["seq"] > seq]
    return seq


def verify_removed(
    victim: Victim, joined_seq: int, left_seq: int, moment: float
) -> None:
    """Nothing is from outside of the membership, and no later answer has anything."""
    ended: set[str] = set()
    for item in victim.received:
        if item.way in ("socket", "slow socket"):
            assert item.way not in ended, f"after member_removed: {item}"
            if item.kind == "member_removed":
                ended.add(item.way)
        assert item.seq <= left_seq, f"removed at seq {left_seq}, but: {item}"
        own = item.kind in ("chat_added", "member_removed")
        is_event = item.way not in ("history", "chats") and item.kind != "typing"
        assert own or not is_event or item.seq > joined_seq, (
            f"a member since seq {joined_seq}, but: {item}"
        )
        late = item.asked_at >= moment
        own = item.kind == "member_removed" or not item.shows
        assert own or not late, f"asked for after the removal was answered: {item}"
    for way, asked_at, status in victim.answered:
        if asked_at >= moment and way in ("history", "change", "command"):
            assert status == 404, f"{way} was answered {status} after the removal"


# --- revoked -------------------------------------------------------------------------


async def revoked(busy: BusyChat, user_id: int) -> Victim:
    """Revoke the tokens of a user who is reading, and verify what it received."""
    chatd = busy.chatd
    await busy.change_member(user_id, "POST")
    victim = Victim(chatd, user_id, busy.chat_id, chatd.token(user_id))
    await victim.connect()
    unused_ticket = await ticket(chatd, victim.token)
    invitation = await invite(chatd, victim)
    async with trio.open_nursery() as nursery:
        victim.start(nursery)
        await trio.sleep(0.6)
        status = (await revoke(chatd, user_id)).status
        moment = trio.current_time()
        assert status == 200, f"revoking was answered {status}"
        first_after = await busy.post()
        ended = await until(lambda: len(victim.ends) == 2, 60)
        assert ended, f"a revoked socket stays open: only {victim.ends} ended"
        await trio.sleep(0.3)
        nursery.cancel_scope.cancel()
    verify_ends(victim, 4503)
    busy.silences.append((user_id, first_after, sys.maxsize))
    for item in victim.received:
        assert item.seq < first_after, f"sent after the revocation: {item}"
    for answer in victim.answered:
        assert answer.asked_at < moment or answer.status == 401, (
            f"asked after the revocation was answered: {answer}"
        )
    await verify_refused(chatd, victim.token, unused_ticket)
    victim.invitation = invitation
    await verify_nobody_joins(chatd, invitation)
    await verify_signs_in(chatd, user_id)
    busy.rounds += 1
    busy.checked += len(victim.received) + len(victim.answered)
    victim.cut()
    return victim


def verify_ends(victim: Victim, code: int) -> None:
    """A socket gets the close code; one that reads too slowly for that is cut."""
    for way, end in victim.ends.items():
        codes = (code, 1006) if way == "slow socket" else (code,)
        assert end.code in codes, f"the {way} ended with {end.code}, not {code}"


async def verify_refused(chatd: Chatd, token: str, unused_ticket: str) -> None:
    """Every use of a revoked token, and of its unused ticket, is answered 401."""
    for path in ("/api/v1/me", "/api/v1/events", "/api/v2/ws-token", "/api/v1/chats"):
        reply = await http(chatd, "GET", path, token)
        assert reply.status == 401, f"{path} was answered {reply.status}"
    for which, secret in (("token", token), ("ticket", unused_ticket)):
        status = 101
        try:
            await Client(chatd, 0, token=secret).connect()
        except Refused as refusal:
            status = refusal.status
        assert status == 401, f"a revoked {which} was answered {status}"


async def invite(chatd: Chatd, victim: Victim) -> str:
    """Make an invitation of the victim's to a chat of its own; it lets somebody in."""
    chat_id = await make_chat(chatd, [victim.user_id, WITNESS])
    path = f"/api/v1/chats/{chat_id}/invites"
    reply = await http(chatd, "POST", path, victim.token, {})
    assert reply.status == 201, f"an invitation was answered {reply.status}"
    invitation = str(reply.json["token"])
    guest = chatd.token(victim.user_id + 1_000)
    reply = await http(chatd, "POST", JOIN, guest, {"token": invitation})
    assert reply.status == 201, f"joining was answered {reply.status}"
    return invitation


async def verify_nobody_joins(chatd: Chatd, invitation: str) -> None:
    """The invitation of a revoked maker shows nothing, and lets nobody in."""
    body = {"token": invitation}
    for more, token in (({}, None), ({"name": "Eve"}, None), ({}, chatd.token(5_000))):
        reply = await http(chatd, "POST", JOIN, token, body | more)
        assert reply.status == 401, f"a revoked invitation was answered {reply.status}"


async def verify_signs_in(chatd: Chatd, user_id: int) -> None:
    """A sign-in link made after the revocation works at once, and what it yields."""
    link = chatd.token(user_id, use="signin", iat=int(time.time()) + 1)
    reply = await http(chatd, "POST", "/api/v1/session", link)
    assert reply.status == 200, f"a new sign-in was answered {reply.status}"
    session = reply.json["token"]
    reply = await http(chatd, "GET", "/api/v1/me", session)
    assert reply.status == 200, f"a new session was answered {reply.status}"
    client = Client(chatd, user_id, token=await ticket(chatd, session))
    await client.connect()
    client.cut()


# --- expired -------------------------------------------------------------------------


async def expired(busy: BusyChat, user_id: int) -> None:
    """Let a token end while its user reads; another socket of the user renews it."""
    chatd = busy.chatd
    await busy.change_member(user_id, "POST")
    ttl = 4.0
    ends_at, now = trio.current_time() + ttl, time.time()
    token = chatd.token(user_id, ttl)
    victim = Victim(chatd, user_id, busy.chat_id, token)
    victim.slow.token = await ticket(chatd, token)
    renewing = Client(chatd, user_id, token=token, remember=False)
    await victim.connect()
    await renewing.connect()
    answer = await renewing.ask("auth", token=chatd.token(user_id))
    assert answer["type"] == "ack", f"auth was answered {answer}"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(renewing.receive_until_closed)
        victim.start(nursery)
        longest = ttl + GRACE_SECONDS + LATE_SECONDS + 60
        ended = await until(lambda: len(victim.ends) == 2, longest)
        assert ended, f"a socket outlives its token: only {victim.ends} ended"
        ended_at = trio.current_time()
        await trio.sleep(0.5)
        pong = await renewing.send_command("ping")
        assert pong, "the renewed socket ended"
        nursery.cancel_scope.cancel()
    late = ended_at - ends_at - GRACE_SECONDS
    assert late > -1.5, f"the sockets ended {-late:.1f} s too early"
    assert late < LATE_SECONDS + 10, f"the sockets ended {late:.1f} s late"
    verify_ends(victim, 4401)
    for answered in victim.answered:
        # The sweeper, which ends an open socket, looks once a second.
        limit = GRACE_SECONDS + 1 if answered.way == "command" else LEEWAY_SECONDS
        if answered.asked_at > ends_at + limit + 0.5:
            assert answered.status == 401, f"after the token's end: {answered}"
    for item in victim.received:
        socket = item.way in ("socket", "slow socket", "catching up")
        limit = ends_at + (GRACE_SECONDS if socket else LEEWAY_SECONDS) + LATE_SECONDS
        sent_at = busy.sent_at.get(item.seq, 0.0)
        assert sent_at <= limit, f"sent after the token's end: {item}"
    assert time.time() > now
    busy.rounds += 1
    busy.checked += len(victim.received) + len(victim.answered)
    victim.cut()
    renewing.cut()


def verify_silences(busy: BusyChat) -> int:
    """No message was sent or changed by a user who was shut out; count the others."""
    event_log, messages = read_database(busy.chatd.db)
    authors = Counter[int]()
    victims = {user_id for user_id, _, _ in busy.silences}
    for event in event_log:
        if event.message_id is not None:
            author = messages[event.message_id].sender_id
            authors[author] += 1
            for user_id, after, before in busy.silences if author in victims else ():
                late = author == user_id and after < event.seq < before
                assert not late, f"shut out after seq {after}, user {user_id}: {event}"
    for user_id in victims:
        assert authors[user_id], f"user {user_id} never wrote"
    return sum(authors[user_id] for user_id in victims)


async def act(busy: BusyChat, full: bool) -> None:
    """Remove, revoke and let expire at the same time, in one busy chat."""
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
        await verify_refused(chatd, victim.token, victim.token)
    # All joins together are limited to 50, and one a second.
    for victim in victims[:10]:
        await verify_nobody_joins(chatd, victim.invitation)


def prove(full: bool) -> Figures:
    """Run all three parts in one busy chat."""
    with Chatd("--invites=on") as chatd:
        busy = BusyChat(chatd)
        run_trio(act, busy, full)
        sent, written = len(busy.sent_at), verify_silences(busy)
    return Figures(
        "a member is removed, or a token is revoked or expires, in a busy chat: no "
        "event from after that moment reaches the user, over sockets, polls, history, "
        "search, the chat list or while catching up; no send, edit, deletion or "
        "invitation of the user counts; and a restart changes nothing about it",
        f"{busy.rounds} times while {sent:,} messages were sent; of {busy.checked:,} "
        f"events and answers, and of {written:,} sends, edits and deletions of those "
        "users, 0 came too late",
        {
            "rounds": busy.rounds,
            "messages": sent,
            "checked": busy.checked,
            "written": written,
        },
    )
