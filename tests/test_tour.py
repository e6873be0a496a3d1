"""The tour: smallchatd keeps chatd's contract, and the chapters say what is there.

The tests of the contract run against both programs, each in a process of its own. The
messages of smallchatd have exactly the fields of the contract; those of chatd may have
more. The experiments are not run here: `python tour/experiments.py` does that.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import json
import keyword
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jwt
import pytest
import trio

from tests.browser import FIXTURES, Chromium, Page, expect
from tests.client import (
    CHECKOUT,
    CLOSE,
    PING,
    PONG,
    TEXT,
    WAIT_SECONDS,
    Frame,
    HttpAnswer,
    RawClient,
    SocketClient,
    clean_environment,
    frame_bytes,
    take_frames,
    upgrade_bytes,
)

_, _, _, browser, chromium, _ = FIXTURES

TOUR = CHECKOUT / "tour"
SMALLCHATD = TOUR / "smallchatd.py"
ANNA, BEN, CLARA = 1, 2, 3


def import_from_tour(name: str) -> Any:
    """Import a program of the tour, which is not a package."""
    sys.path.insert(0, str(TOUR))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TOUR))


experiments = import_from_tour("experiments")


# --- the contract: what both programs send and receive -------------------------------

TIME = "2025-11-21T13:00:00Z"  # in an expected message: any time of this form
ANY_TIME = re.compile(r'"\d{4}-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-6]\dZ"')


@contextmanager
def running(name: str, folder: Path, *patch: tuple[str, str]) -> Iterator[Any]:
    """Run one of the two programs, with an empty database, in a process of its own.

    patch changes smallchatd, as an experiment does.
    """
    source = experiments.patched(patch) if name == "smallchatd" else ""
    server = experiments.Server(name, folder, source)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(params=["smallchatd", "chatd"])
def server(
    request: pytest.FixtureRequest, tmp_path: Path, bare_environment: None
) -> Iterator[Any]:
    with running(request.param, tmp_path) as server:
        yield server


def only(value: Any, expected: Any) -> Any:
    """Return the part of a value that is expected: the fields, in the same order."""
    if isinstance(value, dict) and isinstance(expected, dict):
        fields = expected.items()
        return {name: only(value[name], of) for name, of in fields if name in value}
    return value


class Client(SocketClient):
    """An open WebSocket of a user. Only `ask` returns acks: the contract has none."""

    def __init__(self, stream: trio.SocketStream, data: bytes, *, exact: bool) -> None:
        super().__init__(stream, data)
        self.exact = exact  # the server may not add fields to the contract's
        self.unread: deque[Frame] = deque()  # came before the answer of `ask`

    async def event(self) -> Frame:
        """Return the next message that is not an ack."""
        while True:
            message = self.unread.popleft() if self.unread else await self.receive()
            if message["type"] != "ack":
                return message

    async def receives(self, expected: Frame) -> None:
        """Claim that the next message is this one: its names, values and types."""
        message = await self.event()
        if not self.exact:
            message = only(message, expected)
        # As text, because in Python 1 == 1.0 == True.
        received = ANY_TIME.sub(f'"{TIME}"', json.dumps(message))
        assert received == json.dumps(expected)

    async def receives_nothing(self) -> None:
        """Claim that nothing was on its way: the next message answers a ping."""
        await self.send_command("ping")
        await self.receives({"type": "pong", "timestamp": TIME})

    async def ask(self, kind: str, /, **fields: object) -> Frame:
        """Send a command, and return its answer. Keep the messages before it."""
        await self.send_command(kind, ref="asked", **fields)
        while (message := await self.receive()).get("ref") != "asked":
            self.unread.append(message)
        return message


@asynccontextmanager
async def connected(server: Any, user: int) -> AsyncIterator[Client]:
    """Open a WebSocket. The first message is `connected`."""
    async with await dial(server) as line:
        answer = await handshake(line, experiments.token(user))
        assert answer.status == 101
        exact = server.name == "smallchatd"
        client = Client(line.stream, bytes(line.data), exact=exact)
        hello = {"type": "connected", "user_id": user, "timestamp": TIME}
        await client.receives(hello)
        yield client


async def dial(server: Any) -> RawClient:
    """Open a TCP connection."""
    with trio.fail_after(WAIT_SECONDS):
        return RawClient(await trio.open_tcp_stream("127.0.0.1", server.port))


async def handshake(line: RawClient, token: str) -> HttpAnswer:
    """Ask for a WebSocket."""
    await line.send(upgrade_bytes(f"/ws/chat?token={token}"))
    return await line.answer()


async def post(server: Any, chat: int, content: str, token: str) -> HttpAnswer:
    """POST a message."""
    target = f"/api/v1/chats/{chat}/messages"
    async with await dial(server) as line:
        return await line.ask("POST", target, {"content": content}, token=token)


def new_message(chat: int, message_id: int, sender: int, content: str) -> Frame:
    message = {
        "id": message_id,
        "chat_id": chat,
        "sender_id": sender,
        "content": content,
        "created_at": TIME,
    }
    return {"type": "new_message", "chat_id": chat, "message": message}


async def send_message(
    server: Any, chat: int, user: int, content: str, client_id: str
) -> Frame:
    """Send a message over a new socket, and return its ack."""
    async with connected(server, user) as client:
        ack = await client.ask(
            "send_message", chat_id=chat, content=content, client_id=client_id
        )
    assert (ack["type"], ack["client_id"]) == ("ack", client_id), ack
    return ack


async def test_a_ping_is_answered_with_a_pong(server: Any) -> None:
    async with connected(server, ANNA) as anna:
        await anna.send_command("ping")
        await anna.receives({"type": "pong", "timestamp": TIME})


async def test_typing_is_shown_to_the_others_only(server: Any) -> None:
    chat = server.chat(ANNA, BEN)
    async with (
        connected(server, ANNA) as anna,
        connected(server, ANNA) as annas_phone,
        connected(server, BEN) as ben,
        connected(server, CLARA) as clara,
    ):
        for is_typing in (True, False):
            await anna.send_command("typing", chat_id=chat, is_typing=is_typing)
            typing = {"type": "typing", "chat_id": chat, "user_id": ANNA}
            await ben.receives({**typing, "is_typing": is_typing})
        for client in (anna, annas_phone, ben, clara):
            await client.receives_nothing()


async def test_a_message_reaches_every_session_of_all_members(server: Any) -> None:
    chat = server.chat(ANNA, BEN)
    async with (
        connected(server, ANNA) as anna,
        connected(server, ANNA) as annas_phone,
        connected(server, BEN) as ben,
        connected(server, BEN) as bens_phone,
        connected(server, CLARA) as clara,
    ):
        ack = await anna.ask(
            "send_message", chat_id=chat, content="Привет!", client_id="first"
        )
        assert (ack["type"], ack["client_id"]) == ("ack", "first"), ack
        expected = new_message(chat, ack["message_id"], ANNA, "Привет!")
        for client in (anna, annas_phone, ben, bens_phone):
            await client.receives(expected)
            await client.receives_nothing()
        await clara.receives_nothing()


async def test_messages_arrive_in_the_order_in_which_they_were_sent(
    server: Any,
) -> None:
    chat, texts = server.chat(ANNA, BEN), [str(number) for number in range(10)]
    async with connected(server, ANNA) as anna, connected(server, BEN) as ben:
        for text in texts:
            await anna.send_command("send_message", chat_id=chat, content=text)
        for client in (anna, ben):
            received = [await client.event() for _ in texts]
            assert [event["message"]["content"] for event in received] == texts
            ids = [event["message"]["id"] for event in received]
            assert ids == sorted(set(ids))


async def test_a_repeat_gets_the_same_ack_and_is_not_published_again(
    server: Any,
) -> None:
    chat = server.chat(ANNA, BEN)
    same = {"chat_id": chat, "content": "Hello", "client_id": "of one message"}
    async with connected(server, ANNA) as anna, connected(server, BEN) as ben:
        first = await anna.ask("send_message", **same)
        again = await anna.ask("send_message", **same)
        for field in ("type", "message_id", "created_at", "client_id"):
            assert again[field] == first[field], field
        assert first["type"] == "ack"
        assert ANY_TIME.fullmatch(f'"{first["created_at"]}"')
        other = await anna.ask("send_message", **{**same, "client_id": "of another"})
        assert other["message_id"] > first["message_id"]
        for client in (anna, ben):
            for ack in (first, other):
                message_id = ack["message_id"]
                await client.receives(new_message(chat, message_id, ANNA, "Hello"))
            await client.receives_nothing()


async def test_a_posted_message_is_created_and_appears_in_the_sockets(
    server: Any,
) -> None:
    chat = server.chat(ANNA, BEN)
    async with connected(server, ANNA) as anna, connected(server, BEN) as ben:
        answer = await post(server, chat, "Привет!", experiments.token(ANNA))
        assert answer.status == 201
        message = answer.json["message"]
        expected = new_message(chat, message["id"], ANNA, "Привет!")
        assert ANY_TIME.fullmatch(f'"{message["created_at"]}"')
        fields = {**expected["message"], "created_at": message["created_at"]}
        assert only(message, fields) == fields
        for client in (anna, ben):
            await client.receives(expected)


async def test_a_read_mark_reaches_the_members_and_never_moves_down(
    server: Any,
) -> None:
    chat = server.chat(ANNA, BEN)
    first, second = [
        (await send_message(server, chat, ANNA, text, text))["message_id"]
        for text in ("one", "two")
    ]
    async with (
        connected(server, ANNA) as anna,
        connected(server, BEN) as ben,
        connected(server, BEN) as bens_phone,
        connected(server, CLARA) as clara,
    ):
        for message_id in (first, second):
            await ben.send_command("mark_read", message_id=message_id)
            read = {"type": "message_read", "message_id": message_id, "chat_id": chat}
            for client in (anna, ben, bens_phone):
                await client.receives({**read, "read_by": BEN})
        for message_id in (first, second):
            answer = await ben.ask("mark_read", message_id=message_id)
            assert answer["type"] == "ack", answer
        for client in (anna, ben, bens_phone, clara):
            await client.receives_nothing()


async def test_a_user_who_is_not_a_member_gets_an_error_and_nobody_an_event(
    server: Any,
) -> None:
    chat = server.chat(ANNA, BEN)
    ack = await send_message(server, chat, ANNA, "Hello", "first")
    async with (
        connected(server, ANNA) as anna,
        connected(server, BEN) as ben,
        connected(server, CLARA) as clara,
    ):
        for kind, fields in {
            "typing": {"chat_id": chat, "is_typing": True},
            "send_message": {"chat_id": chat, "content": "I am Clara"},
            "mark_read": {"message_id": ack["message_id"]},
        }.items():
            answer = await clara.ask(kind, **fields)
            assert answer["type"] == "error", (kind, answer)
        posted = await post(server, chat, "I am Clara", experiments.token(CLARA))
        assert posted.status in {403, 404}
        for client in (anna, ben, clara):
            await client.receives_nothing()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        '{"type": "no such type"}',
        '{"type": "typing", "chat_id": 0}',
    ],
)
async def test_a_command_that_is_not_understood_gets_an_error_and_ends_nothing(
    server: Any, text: str
) -> None:
    async with connected(server, ANNA) as anna:
        await anna.send_frame(text)
        answer = await anna.receive("error")
        assert answer["code"]
        assert answer["message"]
        await anna.receives_nothing()


async def test_a_bad_token_is_refused_with_401(server: Any) -> None:
    chat = server.chat(ANNA, BEN)
    bad_tokens = {
        "none": "",
        "not a token": "x",
        "expired": experiments.token(ANNA, exp=1),
        "of nobody": experiments.token(0),
        "signed with another secret": jwt.encode({"user_id": ANNA}, "x" * 32, "HS256"),
        "not signed": jwt.encode({"user_id": ANNA}, "", "none"),
    }
    for name, token in bad_tokens.items():
        async with await dial(server) as line:
            assert (await handshake(line, token)).status == 401, name
        assert (await post(server, chat, "Hello", token)).status == 401, name
    async with connected(server, ANNA) as anna:
        await anna.receives_nothing()


async def test_sigterm_closes_every_socket_with_1012_and_the_status_is_0(
    server: Any,
) -> None:
    async with connected(server, ANNA) as anna, connected(server, BEN) as ben:
        server.process.send_signal(signal.SIGTERM)
        assert [await client.ended() for client in (anna, ben)] == [1012, 1012]
    assert await trio.to_thread.run_sync(server.process.wait, WAIT_SECONDS) == 0


async def test_an_acked_message_is_on_disk_after_kill_9(server: Any) -> None:
    chat = server.chat(ANNA, BEN)
    ack = await send_message(server, chat, ANNA, "Hello", "first")
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    with closing(sqlite3.connect(server.db)) as db:
        stored = db.execute("SELECT id, content FROM message").fetchall()
    assert stored == [(ack["message_id"], "Hello")]
    server.start()
    again = await send_message(server, chat, ANNA, "Hello", "first")
    assert again["message_id"] == ack["message_id"]
    assert again["created_at"] == ack["created_at"]
    async with connected(server, BEN) as ben:
        await ben.receives_nothing()


async def test_a_client_is_pinged_and_is_cut_when_it_does_not_answer(
    tmp_path: Path,
) -> None:
    soon = (
        ("PING_SECONDS = 30", "PING_SECONDS = 0.2"),
        ("PONG_SECONDS = 20", "PONG_SECONDS = 2"),
    )
    with running("smallchatd", tmp_path, *soon) as server:
        async with await dial(server) as line:
            assert (await handshake(line, experiments.token(ANNA))).status == 101
            data = bytearray(line.data)

            async def frame(opcode: int) -> bytes:
                """Return the payload of the next frame with this opcode."""
                while True:
                    for received, payload in take_frames(data):
                        if received == opcode:
                            return bytes(payload)
                    more = await line.stream.receive_some()
                    if not more:
                        raise trio.EndOfChannel
                    data.extend(more)

            with trio.fail_after(WAIT_SECONDS):
                await frame(TEXT)  # connected
                payload = await frame(PING)
                # The pong stands behind commands. They are answered, and it is found.
                commands = [frame_bytes(TEXT, b'{"type":"ping"}')] * 3
                pong = frame_bytes(PONG, payload)
                await line.stream.send_all(b"".join([*commands, pong]))
                for _ in commands:
                    assert json.loads(await frame(TEXT))["type"] == "pong"
                await frame(PING)  # the next one, which is not answered
                with pytest.raises((trio.EndOfChannel, trio.BrokenResourceError)):
                    await frame(CLOSE)
        assert server.stop(signal.SIGTERM) == 0


async def test_a_ping_that_is_due_does_not_cut_the_goodbye_short(
    tmp_path: Path,
) -> None:
    soon = ("PING_SECONDS = 30", "PING_SECONDS = 0.1")
    with running("smallchatd", tmp_path, soon) as server:
        async with await dial(server) as line:
            assert (await handshake(line, experiments.token(ANNA))).status == 101
            server.process.send_signal(signal.SIGTERM)
            with trio.fail_after(WAIT_SECONDS):
                data = bytearray(line.data)
                while CLOSE not in [opcode for opcode, _ in take_frames(data)]:
                    more = await line.stream.receive_some()
                    assert more, "the connection has ended without a close frame"
                    data.extend(more)
            with trio.move_on_after(1) as still_open:  # the client does not answer yet
                assert await line.stream.receive_some()
            assert still_open.cancelled_caught
            await line.stream.send_all(frame_bytes(CLOSE, b"\x03\xf4"))
        assert await trio.to_thread.run_sync(server.process.wait, WAIT_SECONDS) == 0


# --- README.md: the chapters ----------------------------------------------------------

README = (TOUR / "README.md").read_text("utf-8")
LAST_CHAPTER = "\n## Now read chatd.py\n"


class Chapter(NamedTuple):
    """A numbered chapter of README.md."""

    number: int
    question: str
    text: str

    @property
    def in_chatd(self) -> str:
        """The paragraph that says where the idea is in chatd.py."""
        found = re.search(r"(?ms)^\*\*In chatd\.py\.\*\*.*?(?=\n\n)", self.text)
        assert found, "there is no paragraph **In chatd.py.**"
        return found[0]


CHAPTERS = [
    Chapter(int(number), question, re.split(r"(?m)^## ", text)[0])
    for number, question, text in re.findall(
        r"(?ms)^## (\d+)\. ([^\n]+)\n(.*?)(?=^## \d|\Z)", README
    )
]
EACH_CHAPTER = pytest.mark.parametrize(
    "chapter", CHAPTERS, ids=[f"chapter {chapter.number}" for chapter in CHAPTERS]
)


def defined_names(program: Path) -> set[str]:
    """Return what a program defines: `name`, `Class`, `Class.name`, and message types.

    `Class.name` is a method, a field, or what the class assigns to `self.name`.
    """
    names = set()
    for node in ast.parse(program.read_text("utf-8")).body:
        names |= names_bound_by(node)
        if not isinstance(node, ast.ClassDef):
            continue
        names |= {
            str(ast.literal_eval(word.value))
            for word in node.keywords
            if word.arg == "tag"
        }
        for member in node.body:
            names |= {f"{node.name}.{name}" for name in names_bound_by(member)}
        for part in ast.walk(node):
            if (
                isinstance(part, ast.Attribute)
                and isinstance(part.ctx, ast.Store)
                and isinstance(part.value, ast.Name)
                and part.value.id == "self"
            ):
                names.add(f"{node.name}.{part.attr}")
    return names


def names_bound_by(node: ast.stmt) -> set[str]:
    """Return the names that a definition or an assignment binds."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}


IN_CHATD = defined_names(CHECKOUT / "chatd.py")
IN_SMALLCHATD = defined_names(SMALLCHATD)


def code_names(text: str) -> list[str]:
    """Return the names in backticks: `name`, `name()` and `Class.name`."""
    return re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?)(?:\(\))?`", text)


def class_members(text: str) -> list[str]:
    """Return what looks like `Class.name`, in backticks or as code."""
    return re.findall(r"\b[A-Z]\w*[a-z]\w*\.[a-z_]\w*", text)


def unknown(names: list[str], known: set[str]) -> list[str]:
    """Return the names that are not known. `push` is known if `Outbox.push` is."""
    last = {name.rpartition(".")[2] for name in known}
    return [
        name
        for name in names
        if name not in known | last and not keyword.iskeyword(name)
    ]


def test_the_chapters_are_those_of_the_experiments() -> None:
    numbers = [chapter.number for chapter in CHAPTERS]
    assert numbers == list(range(1, 12))
    assert numbers == [each.chapter for each in experiments.EXPERIMENTS]


@EACH_CHAPTER
def test_an_experiment_asks_the_question_of_its_chapter(chapter: Chapter) -> None:
    questions = {each.chapter: each.question for each in experiments.EXPERIMENTS}
    assert questions[chapter.number] == chapter.question


@EACH_CHAPTER
def test_a_chapter_has_its_parts_in_order(chapter: Chapter) -> None:
    parts = (
        f"```console\n$ python tour/experiments.py {chapter.number}\n",
        "\n**In chatd.py.** ",
        "\n**Exercise.** ",
        "*Touches:*",
    )
    assert [chapter.text.count(part) for part in parts] == [1, 1, 1, 1]
    places = [chapter.text.index(part) for part in parts]
    assert places == sorted(places)
    assert chapter.text.count("tour/experiments.py") == 1
    _, _, explanation = chapter.text[places[0] : places[1]].partition("\n```\n")
    assert len(explanation.split()) >= 40, "it does not say why"


@EACH_CHAPTER
def test_the_names_of_chatd_in_a_chapter_are_in_chatd(chapter: Chapter) -> None:
    names = code_names(chapter.in_chatd)
    assert names
    assert unknown(names, IN_CHATD) == []


def test_the_names_in_the_last_chapter_are_in_chatd() -> None:
    names = code_names(README.partition(LAST_CHAPTER)[2])
    assert "Server.run" in names
    assert unknown(names, IN_CHATD) == []


def test_the_names_before_the_first_chapter_are_in_smallchatd() -> None:
    names = class_members(README.partition("\n## 1. ")[0])
    assert "Session.read" in names
    assert [name for name in names if name not in IN_SMALLCHATD] == []


@EACH_CHAPTER
def test_the_other_names_in_a_chapter_are_in_the_program_that_it_tries(
    chapter: Chapter,
) -> None:
    """The later chapters try chatd, too, so they may name what is in it."""
    (each,) = [e for e in experiments.EXPERIMENTS if e.chapter == chapter.number]
    known = IN_SMALLCHATD if each.patch else IN_SMALLCHATD | IN_CHATD
    text = chapter.text.replace(chapter.in_chatd, "")
    names = [name for name in code_names(text) if class_members(name)]
    assert [name for name in names if name not in known] == []
    touched = code_names(text.partition("*Touches:*")[2])
    own = [name for name in touched if not name.startswith("trio.")]
    assert own or "*Touches:* nothing" in text
    assert unknown(own, known) == []


def test_the_readme_says_how_long_smallchatd_is() -> None:
    count = len(SMALLCHATD.read_text("utf-8").splitlines())
    said = re.findall(r"\b(\d[\d,]*) lines\b", README)
    assert re.search(r"\d lines", README.splitlines()[0])
    for number in said:
        assert int(number.replace(",", "")) == pytest.approx(count, rel=0.05)


def test_the_readme_can_be_read_in_one_sitting() -> None:
    prose = re.sub(r"(?ms)^```.*?^```$|^\|.*?$", "", README)  # without code and tables
    assert 2_500 <= len(prose.split()) <= 3_500


# --- the experiments, and the pictures ------------------------------------------------

PATCHES = [each for each in experiments.EXPERIMENTS if each.patch]
EACH_PATCH = pytest.mark.parametrize(
    "each", PATCHES, ids=[f"chapter {each.chapter}" for each in PATCHES]
)


def test_the_first_seven_experiments_change_smallchatd() -> None:
    assert [each.chapter for each in PATCHES] == list(range(1, 8))


@EACH_PATCH
def test_a_patch_applies_and_the_changed_program_compiles(each: Any) -> None:
    changed = experiments.patched(each.both + each.patch)
    assert changed != SMALLCHATD.read_text("utf-8")
    compile(changed, str(SMALLCHATD), "exec", dont_inherit=True)


def changed_lines(each: Any) -> list[str]:
    """Return the lines that a patch removes and adds, with - and + before them."""
    whole = experiments.patched(each.both).splitlines()
    changed = experiments.patched(each.both + each.patch).splitlines()
    return [line for line in difflib.ndiff(whole, changed) if line[0] in "-+"]


@EACH_PATCH
def test_a_patch_changes_ten_lines_at_most(each: Any) -> None:
    signs = [line[0] for line in changed_lines(each)]
    assert 1 <= max(signs.count("-"), signs.count("+")) <= 10


def test_a_patch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(AssertionError, match="no such line"):
        experiments.patched((("no such line", ""),))


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the experiments' main, as the command line does."""
    monkeypatch.setattr(sys, "argv", ["experiments.py", *words])
    return int(experiments.main())


def test_experiments_that_show_what_they_should_end_with_status_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []

    def show(each: Any) -> bool:
        shown.append(each.chapter)
        return True

    monkeypatch.setattr(experiments, "show", show)
    assert run_main(monkeypatch, "3", "5") == 0
    assert shown == [3, 5]
    assert run_main(monkeypatch) == 0
    assert shown[2:] == [chapter.number for chapter in CHAPTERS]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("chapter", [3, 8])
def test_an_experiment_that_shows_no_difference_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chapter: int
) -> None:
    tried = []

    def try_on(name: str, *_: object) -> tuple[int, str]:
        tried.append(name)
        return 1, "the same as before"

    monkeypatch.setattr(experiments, "try_on", try_on)
    assert run_main(monkeypatch, str(chapter)) == 1
    second = "smallchatd" if chapter == 3 else "chatd"
    assert tried == ["smallchatd", second]
    printed = capsys.readouterr()
    assert "the same as before" in printed.out
    assert f"chapter {chapter}:" in printed.err


@pytest.mark.parametrize("word", ["99", "0", "two"])
def test_an_unknown_chapter_is_refused_with_the_chapters_there_are(word: str) -> None:
    done = subprocess.run(
        [sys.executable, str(TOUR / "experiments.py"), "1", word],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS,
        env=clean_environment(),
    )
    assert (done.returncode, done.stdout) == (2, "")  # not even chapter 1 was tried
    assert len(done.stderr.splitlines()) == 1
    assert {word, "1", "11"} <= set(re.findall(r"\w+", done.stderr))


PICTURES = ["message.svg", "task-tree.svg"]


def test_the_pictures_are_what_pictures_py_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = import_from_tour("pictures")
    monkeypatch.setattr(pictures, "HERE", tmp_path)
    pictures.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == PICTURES
    assert sorted(path.name for path in TOUR.glob("*.svg")) == PICTURES
    for name in PICTURES:
        drawn = (tmp_path / name).read_text("utf-8")
        assert drawn == (TOUR / name).read_text("utf-8"), name


@pytest.mark.parametrize("picture", PICTURES)
def test_the_names_in_a_picture_are_in_smallchatd(picture: str) -> None:
    names = class_members((TOUR / picture).read_text("utf-8"))
    assert {"Session.read", "Store.run", "Hub.run", "Session.write"} <= set(names)
    assert [name for name in names if name not in IN_SMALLCHATD] == []


# --- smallchatd.py, as a program to read ----------------------------------------------


def test_the_names_in_the_docstring_are_in_smallchatd() -> None:
    docstring = ast.get_docstring(ast.parse(SMALLCHATD.read_text("utf-8"))) or ""
    names = class_members(docstring)
    assert {"Server.connection", "Server.serve_socket"} <= set(names)
    assert [name for name in names if name not in IN_SMALLCHATD] == []


def test_the_steps_of_a_message_are_the_same_in_the_docstring_and_the_picture() -> None:
    docstring = ast.get_docstring(ast.parse(SMALLCHATD.read_text("utf-8"))) or ""
    _, _, steps = docstring.partition("ONE MESSAGE, STEP BY STEP\n")
    listed = re.findall(r"(?m)^ {4}([A-Z]\w+\.\w+) ", steps.partition("\nTHE TASK")[0])
    picture = (TOUR / "message.svg").read_text("utf-8")
    queues = {"Store.jobs", "Session.outbox"}
    drawn = re.findall(r">([A-Z]\w+\.\w+)</text>", picture)
    assert listed == [name for name in drawn if name not in queues]
    assert listed[0] == "Session.read"
    assert listed[-1] == "Session.write"


def imported(path: Path) -> set[str]:
    """Return the top-level modules that a program imports."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(str(node.module).partition(".")[0])
    return modules


@pytest.mark.parametrize("name", ["smallchatd.py", "experiments.py", "pictures.py"])
def test_the_tour_needs_nothing_that_chatd_does_not_need(name: str) -> None:
    modules = imported(TOUR / name)
    assert modules
    own = {path.stem for path in TOUR.glob("*.py")} | sys.stdlib_module_names
    assert modules - own <= imported(CHECKOUT / "chatd.py")


# --- the acceptance story, in a browser -----------------------------------------------


@contextmanager
def smallchatd_links(folder: Path) -> Iterator[list[str]]:
    """Start smallchatd as a reader of the tour does, and read its two links."""
    process = subprocess.Popen(
        [sys.executable, str(SMALLCHATD), "0", str(folder / "smallchatd.db")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=clean_environment(),
    )
    too_late = threading.Timer(WAIT_SECONDS, process.kill)
    too_late.start()
    assert process.stdout
    with process.stdout:
        try:
            lines = [process.stdout.readline() for _ in range(2)]
            too_late.cancel()
            yield [
                line.removeprefix(f"user {user}: ").strip()
                for user, line in zip((ANNA, BEN), lines, strict=True)
            ]
        finally:
            too_late.cancel()
            process.terminate()
            status = process.wait(WAIT_SECONDS)
    assert status == 0


@contextmanager
def chatd_links(folder: Path) -> Iterator[list[str]]:
    """Start chatd with one chat. The fixture `tabs` serves the page of smallchatd."""
    with running("chatd", folder) as server:
        assert server.chat(ANNA, BEN) == 1, "the page writes into chat 1"
        url = f"http://127.0.0.1:{server.port}/try.html"
        yield [f"{url}#{experiments.token(user)}" for user in (ANNA, BEN)]


@pytest.fixture(params=[smallchatd_links, chatd_links], ids=["smallchatd", "chatd"])
def links(
    request: pytest.FixtureRequest, tmp_path: Path, bare_environment: None
) -> Iterator[list[str]]:
    """The links of two users, Anna and Ben."""
    with request.param(tmp_path) as links:
        yield links


@pytest.fixture
def tabs(chromium: Chromium, links: list[str]) -> list[Page]:
    """The tabs of two users, connected."""
    context = chromium.context()
    # Chromium does not know from which network a page comes that a route answers.
    context.grant_permissions(["local-network-access"])
    context.route(
        "**/try.html",
        lambda route: route.fulfill(
            path=TOUR / "try.html", content_type="text/html; charset=utf-8"
        ),
    )
    tabs = []
    for user, link in zip((ANNA, BEN), links, strict=True):
        page = context.new_page()
        page.goto(link)
        expect(page.get_by_role("heading")).to_have_text(f"User {user}: connected")
        tabs.append(page)
    return tabs


def lines_that_begin(chromium: Chromium, text: str) -> list[str]:
    """Return the lines of all consoles that begin with this text."""
    return [line for line in chromium.console if line.startswith(text)]


@pytest.mark.browser
def test_the_console_says_that_a_tab_is_connected(
    chromium: Chromium, tabs: list[Page]
) -> None:
    message = "WebSocket message: {type: connected, user_id: "
    assert len(tabs) == 2
    assert chromium.console.count("[WebSocket] Connected") == 2
    for user in (ANNA, BEN):
        assert len(lines_that_begin(chromium, f"{message}{user}, ")) == 1


@pytest.mark.browser
def test_what_one_tab_writes_appears_in_the_other(tabs: list[Page]) -> None:
    annas, bens = tabs
    field = annas.get_by_role("textbox", name="Message")
    field.fill("Привет!")
    field.press("Enter")
    expect(field).to_have_value("")
    for tab in tabs:
        expect(tab.get_by_role("listitem")).to_have_text(["1: Привет!"])
    field = bens.get_by_role("textbox", name="Message")
    field.fill("Привет, Анна")
    field.press("Enter")
    both = ["1: Привет!", "2: Привет, Анна"]
    for tab in tabs:
        expect(tab.get_by_role("listitem")).to_have_text(both)


@pytest.mark.browser
def test_a_tab_shows_that_the_other_user_types(tabs: list[Page]) -> None:
    annas, bens = tabs
    field = annas.get_by_role("textbox", name="Message")
    field.press_sequentially("Hel")
    expect(bens.get_by_text("User 1 is typing …")).to_be_visible()
    expect(annas.get_by_text("is typing")).to_have_count(0)
    field.press("Enter")
    expect(bens.get_by_text("is typing")).to_have_count(0)
    expect(bens.get_by_role("listitem")).to_have_text(["1: Hel"])


@pytest.mark.browser
def test_a_tab_marks_the_messages_that_it_shows_as_read(
    chromium: Chromium, tabs: list[Page]
) -> None:
    annas, _ = tabs
    read = "WebSocket message: {type: message_read"
    field = annas.get_by_role("textbox", name="Message")
    with annas.expect_console_message(lambda line: line.text.startswith(read)) as seen:
        field.fill("Hello")
        field.press("Enter")
    assert seen.value.args[1].json_value()["read_by"] == BEN
    assert lines_that_begin(chromium, "WebSocket message: {type: error") == []
