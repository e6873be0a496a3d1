"""`chatd export`: what is stored, as JSON lines."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.client import CHECKOUT, ServerProcess, clean_environment, run_chatd
from tests.harness import Memory

DATA = Path(__file__).parent / "data"


async def exported(db: Path, *words: object) -> list[dict[str, Any]]:
    """Export, and return the lines as objects."""
    done = await run_chatd("export", *words, "--db", db)
    assert (done.status, done.err) == (0, ""), done
    assert done.out.endswith("\n") == bool(done.out)
    return [json.loads(line) for line in done.out.split("\n")[:-1]]


def kinds(lines: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Return what each line is about."""
    found = []
    for line in lines:
        ((kind, fields),) = line.items()
        found.append((kind, fields["user_id" if kind == "user" else "id"]))
    return found


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    """Fill a database: chats of 1 and 2, of 2 and 3; user 1 has left the second."""
    memory = Memory(tmp_path)
    first, second = memory.chat(1, 2, title="Tea"), memory.chat(1, 2, 3)
    memory.do(memory.chats.rename, 1, 'A "b"\u2028')
    memory.send(first, 1, 'hi\n\t"you" \U0001f600 \\ Größe', "k1")
    memory.send(second, 1, "from one")
    memory.send(second, 3, "from three")
    memory.do(memory.chats.remove_member, second, 1, 1)
    return memory


async def test_each_user_chat_and_message_is_a_line_with_the_fields_of_the_api(
    server: ServerProcess,
) -> None:
    async with server.serving():
        chat = await server.chat(1, 2, title="Tea")
        await server.post(chat, 1, 'hi\n"you" \U0001f600')
        lines = await exported(server.db)
        assert kinds(lines)[:3] == [("user", 1), ("user", 2), ("chat", chat)]
        listed = await server.want(200, "GET /api/v1/chats", server.token(1))
        (shown,) = listed["chats"]
        given = {**lines[2]["chat"]}
        assert given.pop("created_at").endswith("Z")
        assert given == {name: shown[name] for name in given}
        assert shown.keys() - given.keys() == {
            "last_message", "read_n", "unread", "position"
        }  # fmt: skip
        assert [line["message"] for line in lines[3:]] == await server.history(chat, 1)
        me = await server.want(200, "GET /api/v1/me", server.token(1))
        del me["server"]  # what the page may offer
        assert lines[0]["user"] == me


async def test_without_a_choice_everything_is_exported(memory: Memory) -> None:
    lines = await exported(memory.settings.db)
    ids = [row[0] for row in memory.store._writer.execute("SELECT id FROM message")]
    assert kinds(lines) == [
        *(("user", number) for number in (1, 2, 3)),
        *(("chat", number) for number in (1, 2)),
        *(("message", number) for number in ids),
    ]
    assert lines[0] == {"user": {"user_id": 1, "name": 'A "b"\u2028'}}
    message = lines[5]["message"]
    assert message["content"] == 'hi\n\t"you" \U0001f600 \\ Größe'
    assert message["client_id"] == "k1"
    assert "deleted" not in message


async def test_a_user_is_exported_with_its_chats_and_all_it_has_sent(
    memory: Memory,
) -> None:
    lines = await exported(memory.settings.db, "--user", 1)
    assert [kind for kind, _ in kinds(lines)] == ["user", "chat", "message", "message"]
    assert kinds(lines)[:2] == [("user", 1), ("chat", 1)]
    # Also what it sent where it is no member any more, and nothing of others.
    assert [line["message"]["content"][:8] for line in lines[2:]] == [
        'hi\n\t"you', "from one",
    ]  # fmt: skip


async def test_what_a_database_does_not_know_is_refused(tmp_path: Path) -> None:
    empty = Memory(tmp_path)
    empty.store.close()
    for flag, why in (("--chat", "it has no chat 5"), ("--user", "not know user 5")):
        done = await run_chatd("export", "--db", empty.settings.db, flag, 5)
        assert (done.status, done.out) == (1, ""), done
        assert why in done.err


async def test_a_chat_is_exported_with_its_members_and_messages(memory: Memory) -> None:
    lines = await exported(memory.settings.db, "--chat", 2)
    assert kinds(lines)[:3] == [("user", 2), ("user", 3), ("chat", 2)]
    assert lines[2]["chat"]["member_count"] == 2
    contents = [line["message"]["content"] for line in lines[3:]]
    assert contents == ["from one", "from three"]


async def test_a_changed_message_is_exported_as_it_is_now(memory: Memory) -> None:
    writer = memory.store._writer
    sql = "SELECT id FROM message WHERE chat_id = 2"
    (edited,), (deleted,) = writer.execute(sql)
    rev = memory.edit(None, edited, "new").rev
    memory.delete(None, deleted)
    writer.execute("UPDATE change SET edited_at = 60 WHERE rev = ?", (rev,))
    lines = await exported(memory.settings.db, "--chat", 2)
    messages = [line["message"] for line in lines if "message" in line]
    assert [m["content"] for m in messages] == ["new", ""]
    assert messages[0]["edited_at"] == "1970-01-01T00:01:00Z"
    assert messages[0]["rev"] == rev
    assert messages[1]["deleted"] is True


FAILURES = {
    "a user that is not there": (("--user", 9), 1, "it does not know user 9"),
    "a chat that is not there": (("--chat", 9), 1, "it has no chat 9"),
    "both": (("--user", 1, "--chat", 1), 2, "not allowed with"),
    "no number": (("--user", "x"), 2, "--user: 'x' is not"),
    "zero": (("--chat", 0), 2, "--chat: '0' is not"),
}


@pytest.mark.parametrize("case", FAILURES)
async def test_what_cannot_be_exported_is_said(case: str, memory: Memory) -> None:
    words, status, sentence = FAILURES[case]
    done = await run_chatd("export", *words, "--db", memory.settings.db)
    assert (done.status, done.out) == (status, ""), done
    assert sentence in done.err


async def test_a_database_of_1_0_has_to_be_upgraded_first(tmp_path: Path) -> None:
    db = tmp_path / "chatd.db"
    for suffix in ("", "-wal"):
        shutil.copy(DATA / f"v1.sqlite{suffix}", f"{db}{suffix}")
    done = await run_chatd("export", "--db", db)
    assert (done.status, done.out) == (1, "")
    assert "`chatd serve` upgrades it" in done.err


async def test_an_empty_database_has_no_lines(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    assert await exported(memory.settings.db) == []
    memory.store.close()
    missing = await run_chatd("export", "--db", tmp_path / "none.db")
    assert (missing.status, missing.out) == (1, "")


def test_an_export_shows_one_moment_however_slowly_it_is_read(memory: Memory) -> None:
    for number in range(3000):
        memory.commit(memory.sends(1, 1, f"message {number} " + "x" * 60))
    before = memory.count("message")
    words = (sys.executable, "-m", "chatd", "export", "--db", str(memory.settings.db))
    with subprocess.Popen(
        words, cwd=CHECKOUT, env=clean_environment(), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert b"user" in first
        # It waits now, because the pipe is full: this is not in the export.
        memory.commit(memory.sends(1, 1, "later"))
        rest = process.stdout.read()
    assert process.returncode == 0
    assert rest.count(b'{"message":') == before
    assert b"later" not in rest
