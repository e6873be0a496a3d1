"""A database of 1.0: the answers stay the same, and a failed upgrade changes nothing.

tests/data has a database that 1.0.0 wrote, and the answers that 1.0.0 gave about it.
1.0.0 was killed before a checkpoint, so a WAL stands beside the database.
tests/data/make_1_0.py made all of it.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

import chatd
from chatd import Settings
from tests.client import (
    CHECKOUT,
    HASTY,
    ServerProcess,
    clean_environment,
    run_chatd,
    run_on_a_terminal,
)
from tests.data import make_1_0 as of_1_0
from tests.harness import Memory, memory_store, usage_error_of

DATA = Path(__file__).parent / "data"
STEPS = chatd.schema_steps()
# The step to version 2, statement by statement. Its comments have no semicolon.
STATEMENTS = re.findall(
    r"(?s)(?:--[^\n]*\n|\s)*(?:CREATE TRIGGER.+?END|.+?);\n", STEPS[1]
)


def copy_1_0(db: Path) -> Path:
    """Copy the database of 1.0.0 there, as the killed process left it."""
    for suffix in ("", "-wal"):
        shutil.copy(DATA / f"v1.sqlite{suffix}", db.with_name(db.name + suffix))
    db.chmod(0o600)
    return db


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return copy_1_0(tmp_path / "chatd.db")


def recorded_answers(epoch: str = "") -> dict[str, Any]:
    """Return the answers of 1.0.0, with another epoch if one is given."""
    text = (DATA / "v1.json").read_text("utf-8")
    found = re.search(r'"cursor": "(\w+)\.\d+"', text)
    assert found
    answers = json.loads(text.replace(found[1], epoch or found[1]))
    assert isinstance(answers, dict)
    return answers


def assert_extends(now: Any, before: Any, at: str) -> None:
    """Claim that an answer has every field of the one before, unchanged.

    Only the list of the members of a large chat is empty now.
    """
    if isinstance(before, dict):
        assert isinstance(now, dict), at
        if len(before.get("members", ())) > chatd.CHAT_MEMBERS:
            assert now["member_count"] == len(before["members"]), at
            before = before | {"members": []}
        for name, part in before.items():
            assert_extends(now.get(name, "(no such field)"), part, f"{at}: {name}")
    elif isinstance(before, list):
        assert (type(now), len(now)) == (list, len(before)), at
        for part, was in zip(now, before, strict=True):
            assert_extends(part, was, at)
    else:
        assert now == before, at


async def assert_answers_like_1_0(
    server: ServerProcess, before: dict[str, Any]
) -> None:
    now = await trio.to_thread.run_sync(of_1_0.answers, of_1_0.Server(server.port))
    assert now.keys() == before.keys()
    for question, answer in before.items():
        assert_extends(now[question], answer, question)


def contents(db: Path) -> tuple[int, list[str]]:
    """Return a database's version, and everything in it as SQL."""
    with contextlib.closing(chatd.open_database(db, readonly=True)) as reader:
        version = chatd.query_value(reader, "PRAGMA user_version")
        return version, [*reader.iterdump()]


def test_the_database_of_1_0_has_everything_that_an_upgrade_must_keep(
    old: Path,
) -> None:
    with contextlib.closing(chatd.open_database(old, readonly=True)) as db:

        def number(sql: str) -> int:
            return int(chatd.query_value(db, f"SELECT count(*) FROM {sql}"))

        assert chatd.query_value(db, "PRAGMA application_id") == chatd.APPLICATION_ID
        assert chatd.query_value(db, "PRAGMA user_version") == 1
        assert number("(SELECT DISTINCT kind FROM event)") == 5
        assert number("event WHERE kind = 'message_read' AND to_chat = 0") == 1
        assert number("message WHERE client_id IS NOT NULL") == len(of_1_0.SENT)
        assert number("user WHERE revoked_at IS NOT NULL") == 1
        assert number("user WHERE name IS NOT NULL") == 4
        with_wal = number("event")
        unread = "SELECT max(n) FROM message m WHERE m.chat_id = b.chat_id"
        assert number(f"member b WHERE read_n < ({unread})") > 3
    old.with_name("chatd.db-wal").unlink()
    with contextlib.closing(chatd.open_database(old, readonly=True)) as db:
        assert 0 < chatd.query_value(db, "SELECT count(*) FROM event") < with_wal


async def test_an_upgraded_server_answers_as_1_0_did(server: ServerProcess) -> None:
    copy_1_0(server.db)
    server.db.with_name("chatd.secret").write_bytes(of_1_0.SECRET)
    server.db.with_name("chatd.secret").chmod(0o600)
    async with server.serving():
        await assert_answers_like_1_0(server, recorded_answers())
    done = await run_chatd("check", "--db", server.db)
    assert done.status == 0, done
    assert contents(server.db)[0] == len(STEPS)


async def test_a_database_of_1_0_can_be_checked_and_copied_before_the_upgrade(
    old: Path, tmp_path: Path
) -> None:
    before, copy = contents(old), tmp_path / "copy.db"
    for words in (("check",), ("backup", copy)):
        done = await run_chatd(*words, "--db", old)
        assert done.status == 0, done
    assert contents(old) == contents(copy) == before
    assert before[0] == 1
    with contextlib.closing(sqlite3.connect(copy)) as db, db:
        db.execute("DELETE FROM event WHERE seq = 2")
    done = await run_chatd("check", "--db", copy)
    assert (done.status, "seq: 84 events" in done.out + done.err) == (1, True), done


async def test_a_backup_of_1_0_is_restored_and_then_upgraded(
    server: ServerProcess, old: Path, tmp_path: Path
) -> None:
    copy, other = tmp_path / "copy.db", ServerProcess(tmp_path / "other")
    for words in (("backup", copy, "--db", old), ("restore", copy, "--db", other.db)):
        done = await run_chatd(*words)
        assert done.status == 0, done
    assert contents(other.db)[0] == 1
    other.db.with_name("chatd.secret").write_bytes(of_1_0.SECRET)
    other.db.with_name("chatd.secret").chmod(0o600)
    async with other.serving():
        cursor = await other.cursor(of_1_0.ANN)
        await assert_answers_like_1_0(other, recorded_answers(cursor.partition(".")[0]))
        old_cursor = recorded_answers()["user 1: poll by 500"][0]
        hello = (await other.peer(of_1_0.ANN, old_cursor)).hello
        assert hello["resume"] == "resync"
    assert contents(copy)[0] == 1


def upgrade(db: Path, *steps: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if steps:
            patch.setattr(chatd, "schema_steps", lambda: [*steps])
        memory_store(Settings(db=db)).close()


def test_an_upgrade_writes_an_events_own_fields_into_its_row(old: Path) -> None:
    with contextlib.closing(chatd.open_database(old, readonly=True)) as db:
        n = dict(db.execute("SELECT id, n FROM message"))
        before = db.execute(
            """SELECT seq, kind, chat_id, to_chat, to_user, user_id, message_id
               FROM event ORDER BY seq"""
        ).fetchall()
    upgrade(old)
    with contextlib.closing(chatd.open_database(old, readonly=True)) as db:
        rows = db.execute("SELECT * FROM event ORDER BY seq").fetchall()
    assert len(rows) == len(before)
    for row, was in zip(rows, before, strict=True):
        *whose, user_id, message_id = was
        assert [*row[:5]] == whose
        assert (row[5], row[6], json.loads(row[7] or "null")) == {
            "new_message": (None, message_id, None),
            "chat_added": (None, None, None),
            "member_added": (user_id, None, None),
            "member_removed": (None, None, {"user_id": user_id}),
            "message_read": (
                None, None,
                {"message_id": message_id, "read_by": user_id, "n": n.get(message_id)},
            ),
        }[was[1]]  # fmt: skip


def make_chats_of_1_0(db: sqlite3.Connection, *chats: tuple[str | None, str]) -> None:
    """Write chats into a database of 1.0: each has a title, and members and messages.

    "1 2 x y" is of the users 1 and 2, with two messages. The ids begin with 101.
    Messages are written in the order of their letters, whatever chat they are in.
    """
    said = []
    for chat, (title, words) in enumerate(chats, 101):
        users = [word for word in words.split() if word.isdigit()]
        said += [(word, chat, users) for word in words.split() if word.isalpha()]
        db.execute("INSERT INTO chat VALUES (?, ?, 0)", (chat, title))
        for user in users:
            db.execute("INSERT OR IGNORE INTO user (id) VALUES (?)", (user,))
            db.execute("INSERT INTO member VALUES (?, ?, 1, 0)", (chat, user))
    for letter, chat, users in sorted(said):
        db.execute(
            """INSERT INTO event
               SELECT max(seq) + 1, 'new_message', ?, 1, NULL, NULL, NULL
               FROM event""",
            (chat,),
        )
        db.execute(
            """INSERT INTO message SELECT max(seq), ?1, coalesce((
                   SELECT max(n) FROM message WHERE chat_id = ?1), 0) + 1, ?2, ?3, 0,
               NULL FROM event""",
            (chat, users[0], letter),
        )
        db.execute("UPDATE event SET message_id = seq WHERE seq = last_insert_rowid()")


DIRECT: dict[str, tuple[list[tuple[str | None, str]], dict[int, str]]] = {
    "the one with the newest message": (
        [(None, "901 902 a d"), (None, "902 901 e"), (None, "901 902 b c")],
        {102: "901:902"},
    ),
    "one with a message, however old": (
        [(None, "901 902"), (None, "901 902 a"), (None, "901 902")],
        {102: "901:902"},
    ),
    "the newest chat, if none has a message": (
        [(None, "901 902"), (None, "901 902"), ("x", "901 902")],
        {102: "901:902"},
    ),
    "none with a title, even with newer messages": (
        [("x", "901 902 z"), (None, "901 902 a"), ("", "901 902 y")],
        {102: "901:902"},
    ),
    "none of three members, of one, or of nobody": (
        [(None, "901 902 903 a"), (None, "901 b"), (None, "")],
        {},
    ),
    "one for each pair": (
        [(None, "901 902 a"), (None, "902 903 b"), (None, "901 903"),
         (None, "902 903 c"), (None, "9010 902 d")],
        {101: "901:902", 103: "901:903", 104: "902:903", 105: "902:9010"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", DIRECT)
def test_an_upgrade_makes_one_chat_of_each_pair_direct(rule: str, old: Path) -> None:
    chats, expected = DIRECT[rule]
    with contextlib.closing(chatd.open_database(old, readonly=False)) as db:
        make_chats_of_1_0(db, *chats)
        assert chatd.faults(db) == []
    upgrade(old)
    with contextlib.closing(chatd.open_database(old, readonly=True)) as db:
        assert chatd.faults(db) == []
        sql = "SELECT id, direct_key FROM chat WHERE id > 100 AND direct_key NOTNULL"
        assert dict(db.execute(sql)) == expected
        sql = "SELECT count(*) FROM chat WHERE created_by NOTNULL OR client_id NOTNULL"
        assert chatd.query_value(db, sql) == 0


def test_what_1_0_has_left_in_unused_parts_of_the_file_is_gone_after_an_upgrade(
    old: Path,
) -> None:
    draw = random.Random(1)
    users = draw.sample(range(1000, 1 << 41), 300)
    said = [f"Said{'x' * int(draw.lognormvariate(3, 1.5))}{n:05}" for n in range(400)]
    words = [text.translate(str.maketrans("0123456789", "abcdefghij")) for text in said]
    with contextlib.closing(chatd.open_database(old, readonly=False)) as db:
        db.execute("BEGIN")
        for user in users:
            name = f"<{user}>" * draw.randint(1, 5)
            db.execute("INSERT INTO user VALUES (?, ?, NULL)", (user, name))
            # A longer name makes SQLite move the rows beside it.
            db.execute(
                "UPDATE user SET name = name || name WHERE id = ?",
                (draw.choice(users),),
            )
        make_chats_of_1_0(db, (None, f"901 {' '.join(words)}"))
        db.execute("COMMIT")
    upgrade(old)
    memory = Memory(old.parent)
    gone = draw.sample(users, 150)
    for user in gone:
        memory.do(memory.chats.rename, user, "", 1)
    rows = memory.store._writer.execute("SELECT id, content FROM message").fetchall()
    texts = {text: id_ for id_, text in rows}
    for text in words[::2]:
        memory.delete(None, texts[text])
    assert memory.store._truncate()
    data = memory.files()
    assert [u for u in users if f"<{u}>".encode() in data] == [
        u for u in users if u not in gone
    ]
    for number, text in enumerate(words):
        for form in (text, chatd.fold(text)):
            assert (form[-12:].encode() in data) == (number % 2 == 1)
    assert chatd.faults(memory.store._writer) == []
    memory.store.close()


def test_an_upgraded_database_has_the_schema_of_a_new_one(
    old: Path, tmp_path: Path
) -> None:
    upgrade(old)
    upgrade(tmp_path / "new.db")
    schemas = []
    for path in (old, tmp_path / "new.db"):
        with contextlib.closing(chatd.open_database(path, readonly=True)) as db:
            sql = "SELECT sql FROM sqlite_schema WHERE name != 'sqlite_stat1'"
            schemas.append({*db.execute(sql)})
    assert schemas[0] == schemas[1]


@pytest.mark.parametrize("done", range(len(STATEMENTS) + 1))
def test_an_upgrade_that_fails_anywhere_changes_nothing(old: Path, done: int) -> None:
    before = contents(old)
    half = "".join(STATEMENTS[:done])
    error = usage_error_of(upgrade, old, STEPS[0], f"{half} SELECT * FROM what;")
    assert f"database {old}: no such table: what" in error
    assert contents(old) == before
    upgrade(old)
    assert contents(old)[0] == len(STEPS)


@pytest.mark.parametrize("done", range(len(STATEMENTS) + 1))
def test_an_upgrade_that_is_killed_anywhere_changes_nothing(
    old: Path, done: int
) -> None:
    before = contents(old)
    # With a cache of one page SQLite writes to the WAL before the COMMIT.
    program = """if True:
        import os, signal, sys, chatd
        from pathlib import Path
        path, done = Path(sys.argv[1]), int(sys.argv[2])
        opened = chatd.open_database
        def open_database(path, **named):
            db = opened(path, **named)
            db.execute("PRAGMA cache_size = 1")
            db.create_function("die", 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
            return db
        chatd.open_database = open_database
        from tests.test_upgrade import STATEMENTS, STEPS
        half = "".join(STATEMENTS[:done])
        chatd.schema_steps = lambda: [STEPS[0], half + "SELECT die();"]
        chatd.Store(chatd.Settings(db=path))
    """
    ended = subprocess.run(
        [sys.executable, "-c", program, old, str(done)],
        cwd=CHECKOUT,
        env=clean_environment(),
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    assert contents(old) == before
    upgrade(old)
    assert contents(old)[0] == len(STEPS)


def test_an_upgrade_that_takes_over_a_second_shows_its_progress_on_a_terminal(
    old: Path,
) -> None:
    with contextlib.closing(chatd.open_database(old, readonly=False)) as db:
        db.execute(
            """WITH RECURSIVE c (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c
            WHERE n < 60000) INSERT INTO event (seq, kind, chat_id, to_chat, user_id)
            SELECT (SELECT max(seq) FROM event) + n, 'member_removed', 1, 1, 1 FROM c"""
        )
    words = ("serve", "--listen=192.0.2.1:0", "--check-bytes=1", "--db", old)
    status, _, shown = run_on_a_terminal(HASTY, *words)
    assert status == 1
    assert re.search(r"chatd\.db: \d+ s\x1b\[K\r", shown), shown
    assert contents(old)[0] == len(STEPS)
