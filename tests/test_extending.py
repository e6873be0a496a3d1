"""Adding an event takes two places in chatd.py, a command three, a route three.

The tests insert code into a copy of chatd.py, in these places and no others, and run
the copy. The rest follows from it: the database, the hub, catching up, the poll, the
membership queries, the stats. A forgotten place is a mypy error or an exception.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import chatd
from tests import client
from tests.client import CHECKOUT, ServerProcess, SocketClient, run_chatd
from tests.harness import run_inline

# Three events: one with fields of its own, and two that change membership. Each has a
# class and the Store method that records it.
EVENT_CLASSES = '''
class Waved(Event, tag="waved"):
    """To all members."""

    user_id: int
    moods: list[str]


class Invited(UserEvent, tag="invited"):
    """To all members and to the user that becomes one."""

    why: str
    membership = "joins"


class Expelled(Event, tag="expelled"):
    """To the remaining members and to the user that was removed."""

    user_id: int
    membership = "leaves"
'''
STORE_METHODS = '''
    def wave(
        self, db: Db, events: list[Entry], chat_id: int, user_id: int, mood: str
    ) -> int:
        """Wave to a chat."""
        find_chat(db, chat_id, user_id)
        event = Waved(self.store.next_seq(events), chat_id, user_id, [mood, "é"])
        self.store.record(db, events, Entry(event, to_chat=True))
        return event.seq

    def invite(self, db: Db, events: list[Entry], chat_id: int, user_id: int) -> None:
        """Make a user a member."""
        seq = self.store.next_seq(events)
        know_user(db, user_id)
        sql = "INSERT INTO member SELECT id, ?, ?, last_n FROM chat WHERE id = ?"
        db.execute(sql, (user_id, seq, chat_id))
        name = query_value(db, NAME, user_id)
        event = Invited(seq, chat_id, user_id, name, "a friend")
        self.store.record(db, events, Entry(event, user_id, to_chat=True))

    def expel(self, db: Db, events: list[Entry], chat_id: int, user_id: int) -> None:
        """Remove a member."""
        sql = "DELETE FROM member WHERE chat_id = ? AND user_id = ?"
        db.execute(sql, (chat_id, user_id))
        event = Expelled(self.store.next_seq(events), chat_id, user_id)
        self.store.record(db, events, Entry(event, user_id, to_chat=True))
'''
# A command: its struct and its name in the union; its arm in `match`; its method.
COMMAND_STRUCT = '''
class Wave(Command, tag="wave"):
    """Waves to a chat."""

    chat_id: Id
    mood: str

'''
COMMAND_NAME = " | Wave"
COMMAND_ARM = """
            case Wave():
                await self._wave(command)"""
COMMAND_METHOD = """
    async def _wave(self, command: Wave) -> None:
        chat_id, user_id = command.chat_id, self.claims.user_id
        ack = text_frame(Ack(ref=command.ref, chat_id=chat_id))
        await self._submit(
            command,
            lambda seq: Reply(ack, seq),
            self.server.chats.wave,
            chat_id,
            user_id,
            command.mood,
        )
"""
# A route: its row; its handler; the struct of its body, or a Store method (above).
ROUTE_ROWS = """
    "POST   /api/v1/chats/*/waves            user": post_wave,
    "POST   /api/v1/chats/*/guests           service": post_guest,
    "DELETE /api/v1/chats/*/guests/*         service": delete_guest,"""
ROUTE_BODY = '''
class WaveBody(Record):
    """Body of waving."""

    mood: Title

'''
ROUTE_HANDLERS = '''
async def post_wave(server: Server, request: Request) -> Answer:
    """Wave to a chat."""
    mood = request.parse(WaveBody).mood
    wave = server.chats.wave
    seq = await server.commit(wave, *request.ids, request.user_id, mood)
    return json_answer({"seq": seq}, 201)


async def post_guest(server: Server, request: Request) -> Answer:
    """Make a user a member of a chat."""
    user_id = request.parse(UserBody).user_id
    await server.commit(server.chats.invite, *request.ids, user_id)
    return Answer(204)


async def delete_guest(server: Server, request: Request) -> Answer:
    """Remove a member of a chat."""
    await server.commit(server.chats.expel, *request.ids)
    return Answer(204)

'''
# The places in chatd.py. Each piece goes before the text given here.
PLACES = {
    EVENT_CLASSES: "\n\nBASES = (Event,",
    STORE_METHODS: "\n    def rename(",
    COMMAND_STRUCT: "\n# To add a command,",
    COMMAND_NAME: "\nif forgotten := ",
    COMMAND_ARM: "\n            case _:\n                assert_never(command)",
    COMMAND_METHOD: "\n    def _set_token(self,",
    ROUTE_ROWS: '\n    "GET    /healthz                         anyone"',
    ROUTE_BODY: "\nclass PostMessage(",
    ROUTE_HANDLERS: "\ndef get_health(",
}


def extended(folder: Path, *forgotten: str) -> Path:
    """Copy chatd.py with every piece above inserted, except the forgotten ones."""
    folder.mkdir()
    text = (CHECKOUT / "chatd.py").read_text("utf-8")
    for part, before in PLACES.items():
        assert text.count(before) == 1, before
        if part not in forgotten:
            text = text.replace(before, part + before)
    (folder / "chatd.py").write_text(text, "utf-8")
    for name in ("schema.sql", "web"):
        (folder / name).symlink_to(CHECKOUT / name)
    return folder / "chatd.py"


@contextlib.contextmanager
def imported(path: Path) -> Iterator[ModuleType]:
    """Import such a copy beside the chatd that all other tests use."""
    spec = importlib.util.spec_from_file_location("extended_chatd", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["extended_chatd"] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["extended_chatd"]


@pytest.fixture
def extended_chatd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the harness start a copy with every piece instead of chatd.py itself."""
    monkeypatch.setattr(client, "CHECKOUT", extended(tmp_path / "copy").parent)


async def events_of(peer: SocketClient, kind: str, count: int) -> list[dict[str, Any]]:
    return [await peer.receive(kind) for _ in range(count)]


def in_chat(chat: int, **fields: object) -> dict[str, object]:
    return {"chat_id": chat, **fields}


@pytest.mark.usefixtures("extended_chatd")
async def test_an_event_a_command_and_a_route_need_no_other_place_than_theirs(
    server: ServerProcess,
) -> None:
    async with server.serving():
        chat = await server.chat(1, 2)
        start = await server.cursor(2)
        one, two = await server.peer(1), await server.peer(2)
        # The command is acked and stored; every live member receives the event.
        await one.send_command("wave", chat_id=chat, mood="glad", ref="r")
        waved = {"type": "waved", "seq": 3, "user_id": 1, "moods": ["glad", "é"]}
        assert await one.receive("waved") == in_chat(chat, **waved)
        assert await one.receive("ack") == in_chat(chat, type="ack", ref="r")
        assert await two.receive("waved") == in_chat(chat, **waved)
        refused = await two.ask("wave", chat_id=chat + 1, mood="lost")
        assert (refused["type"], refused["code"]) == ("error", "not_found")
        refused = await two.ask("wave", chat_id=chat, mood=7)
        assert refused["code"] == "bad_field"
        # The route.
        target, token = f"POST /api/v1/chats/{chat}/waves", server.token(2)
        assert await server.want(201, target, token, {"mood": "sad"}) == {"seq": 4}
        await server.want(400, target, token, {"mood": ""})
        await server.want(401, target, "", {"mood": "sad"})
        await server.want(405, f"GET /api/v1/chats/{chat}/waves", token)
        again = in_chat(chat, **waved | {"seq": 4, "user_id": 2, "moods": ["sad", "é"]})
        assert [await peer.receive("waved") for peer in (one, two)] == [again] * 2
        both = [in_chat(chat, **waved), again]
        # The event is replayed from the tail, and polled.
        replaying = await server.peer(2, start)
        assert await events_of(replaying, "waved", 2) == both
        assert await server.events(2, start) == both
        # It is counted.
        counted = (await server.stats())["broadcast"]["events"]
        assert counted == {"chat_added": 2, "waved": 2}
        metrics = await server.ask("GET", "/metrics", server.stats_token)
        assert 'chatd_broadcast_events_total{type="waved"} 2.0' in metrics.body.decode()
        # After a restart it is read from the tail; after the next, from the database.
        for _ in range(2):
            await server.stop()
            await server.begin()
            replaying = await server.peer(2, start)
            assert await events_of(replaying, "waved", 2) == both
            assert await server.events(2, start) == both
            await server.chat(1)
        await server.stop()
    assert (await run_chatd("check", "--db", server.db)).status == 0
    # A chatd that does not know the event reports it as unknown.
    with chatd.reading("database", server.db) as db:
        assert "event 3: of the unknown kind waved" in chatd.faults(db)


@pytest.mark.usefixtures("extended_chatd")
async def test_an_event_that_declares_a_membership_change_makes_it(
    server: ServerProcess,
) -> None:
    async with server.serving():
        chat = await server.chat(1, 2)
        three = await server.peer(3)
        start = await server.cursor(3)
        guests = f"/api/v1/chats/{chat}/guests"
        await server.post(chat, 1, "before")
        await server.want(204, f"POST {guests}", server.service, {"user_id": 3})
        await server.post(chat, 1, "meanwhile")
        await three.send_command("typing", chat_id=chat, is_typing=True)
        await server.want(204, f"DELETE {guests}/3", server.service)
        await server.post(chat, 1, "after")
        invited, message, expelled = [await three.receive() for _ in range(3)]
        assert invited == {
            "type": "invited", "seq": 4, "chat_id": chat, "user_id": 3, "name": None,
            "why": "a friend",
        }  # fmt: skip
        assert message["message"]["content"] == "meanwhile"
        assert expelled == in_chat(chat, type="expelled", seq=6, user_id=3)
        await three.receives_nothing()
        # The same from the tail and, after a restart, from the database.
        for _ in range(2):
            assert await server.events(3, start) == [invited, expelled]
            replaying = await server.peer(3, start)
            assert [await replaying.receive() for _ in range(2)] == [invited, expelled]
            await replaying.receives_nothing()
            assert replaying.hello["chats"] == {}
            await server.chat(1)
            await server.stop()
            await server.begin()


def test_a_reader_is_a_member_until_its_removal_is_published(tmp_path: Path) -> None:
    with imported(extended(tmp_path / "copy")) as more:
        settings = more.Settings(db=tmp_path / "chatd.db")
        store = more.Store(settings, run_sync=run_inline)
        chats = more.Chats(store)
        with contextlib.closing(store):
            chat, _ = store.commit_now(chats.create_chat, more.NewChat([1]))
            store.commit_now(chats.invite, chat, 2)
            store.commit_now(chats.wave, chat, 1, "glad")
            store.commit_now(chats.expel, chat, 2)  # seq 4 is not published yet
            page = store._query(store.events_after, 2, 0, 3, 100)
            assert [entry.kind for entry in page.events] == ["invited", "waved"]
            page = store._query(store.events_after, 2, 0, 4, 100)
            assert [entry.kind for entry in page.events] == ["invited", "expelled"]


def test_a_command_missing_from_the_union_stops_the_import(tmp_path: Path) -> None:
    copy = extended(tmp_path / "copy", COMMAND_NAME)
    with pytest.raises(TypeError, match=r"AnyCommand .*\.Wave"), imported(copy):
        pass


def test_mypy_reports_a_forgotten_place(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    cache = tmp_path / "cache"
    for name, forgotten, report in (
        ("all", "", ""),
        (
            "arm",
            COMMAND_ARM,
            'Argument 1 to "assert_never" has incompatible type "Wave"',
        ),
        ("method", COMMAND_METHOD, '"Session" has no attribute "_wave"'),
        ("store", STORE_METHODS, '"Chats" has no attribute "wave"'),
        ("class", EVENT_CLASSES, 'Name "Waved" is not defined'),
        ("handler", ROUTE_HANDLERS, 'Name "post_wave" is not defined'),
    ):
        copy = extended(tmp_path / name, forgotten)
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={cache}", copy],
            cwd=tmp_path,
            env={**os.environ, "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert report in done.stdout, done
        assert (done.returncode == 0) is (not forgotten), done
