"""Monitoring: log lines, the stats document, metrics."""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import wait_all_tasks_blocked

import chatd
from chatd import Stats
from tests.harness import (
    DOOR_CHECKOUT,
    DOOR_UPGRADE,
    DoorServer,
    FaultyStore,
    WiresHouse,
    door_environment,
    door_get,
    door_users,
    wires,
    wires_request,
    wires_upgrade,
)

# --- log lines -----------------------------------------------------------------------


FORGED = "Bob\n<0>left user=1\r\x1b[2J\u202e\u2028\x00\x85 why=fine"


def test_a_log_line_cannot_be_forged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "chatd")
    chatd.log(logging.INFO, "joined", user=6, name=FORGED, live=True, size=1.5)
    chatd.log(logging.DEBUG, "unheard", name=FORGED)
    (line,) = caplog.messages
    assert line == f"joined user=6 name={FORGED!a} live=True size='1.5'"
    assert line.isascii()
    assert line.isprintable()


@pytest.mark.usefixtures("bare_environment")
def test_a_bug_that_ends_the_process_is_one_log_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Path) -> None:
        raise ValueError("s3cret\n<0>forged")

    monkeypatch.setattr(chatd, "print_check", broken)
    assert chatd.main(["check"]) == 1
    err = capsys.readouterr().err
    where = r"test_monitoring\.py:\d+ broken < chatd\.py:\d+ main"
    assert re.fullmatch(rf"ERROR crashed error='ValueError' at='{where}'\n", err), err


@pytest.mark.parametrize(
    ("level", "prefix"), [("DEBUG", 7), ("INFO", 6), ("WARNING", 4), ("ERROR", 3)]
)
def test_a_log_level_is_a_priority_in_the_journal_and_a_word_elsewhere(
    level: str, prefix: int
) -> None:
    number = logging.getLevelNamesMapping()[level]
    record = logging.LogRecord("chatd", number, "", 0, "left user=6", None, None)
    assert chatd.Formatter(journal=True).format(record) == f"<{prefix}>left user=6"
    assert chatd.Formatter(journal=False).format(record) == f"{level} left user=6"


def test_commit_times_are_of_the_last_1024_and_the_maximum_of_all() -> None:
    stats = Stats()
    assert stats.commit_seconds() == {"p50": 0.0, "p99": 0.0, "max": 0.0}
    for i in range(2000):
        stats.committed(9.0 if i == 0 else i / 1000, jobs=i % 7 + 1)
    assert (stats.commits, stats.batch_max, len(stats.commit_times)) == (2000, 7, 1024)
    assert stats.commit_seconds() == {"p50": 1.488, "p99": 1.989, "max": 9.0}


# --- the stats document, metrics -----------------------------------------------------


def shape(part: Any) -> Any:
    """Replace every value of a JSON document by None; the names stay."""
    return {k: shape(v) for k, v in part.items()} if isinstance(part, dict) else None


@wires()
async def test_the_stats_count_connections_events_messages_and_refusals(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    peer, friend, tab = [await house.join(u) for u in (6, 7, 7)]
    command = {"chat_id": chat, "content": "hi", "client_id": "k"}
    for _ in range(2):
        await peer.ask("send_message", **command)
    await peer.leave()
    await tab.leave(1001)
    await wait_all_tasks_blocked()
    refused = house.dial()
    await refused.send(wires_upgrade("/ws/chat"))
    assert (await refused.answer()).status == 401
    stats = await house.stats()
    assert shape(stats) == {
        "version": None, "uptime_seconds": None,
        "connections": {
            "active": None, "users": None, "total": None, "catching_up": None,
            "closed": {"1000": None, "1001": None}, "refused": {"token_invalid": None},
        },
        "broadcast": {
            "events": {"chat_added": None, "new_message": None}, "deliveries": None,
            "writes": None, "catch_ups": None, "stalls": None,
        },
        "store": {
            "commits": None, "messages": None, "batch_max": None,
            "commit_seconds": {"p50": None, "p99": None, "max": None},
            "duplicates": None, "failed": None, "degraded": None, "wal_bytes": None,
            "sqlite": None,
        },
        "resumes": {"fresh": None, "live": None, "replay": None, "resync": None},
        "rate_limited": {}, "errors": {},
    }  # fmt: skip
    connections = stats["connections"]
    assert connections == {
        "active": 1, "users": 1, "total": 3, "catching_up": 0,
        "closed": {"1000": 1, "1001": 1}, "refused": {"token_invalid": 1},
    }  # fmt: skip
    assert stats["broadcast"]["events"] == {"chat_added": 2, "new_message": 1}
    assert stats["broadcast"]["deliveries"] == 3
    assert (stats["store"]["messages"], stats["store"]["duplicates"]) == (1, 1)
    assert (stats["store"]["failed"], stats["store"]["degraded"]) == (0, False)
    assert stats["store"]["commits"] == 3
    assert stats["resumes"]["fresh"] == 3
    assert (await friend.hear("new_message"))["message"]["n"] == 1


@wires()
async def test_the_metrics_have_the_numbers_of_the_stats(house: WiresHouse) -> None:
    chat = await house.chat(6, 7)
    peer = await house.join(6)
    await peer.ask("send_message", chat_id=chat, content="hi")
    answer = await house.ask(
        "GET", "/metrics", token=house.token(999, scope="stats service")
    )
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, *sample.labels.values()): (family.type, sample.value)
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }
    for name, kind, value in (
        (("chatd_connections_active",), "gauge", 1),
        (("chatd_connections_total",), "counter", 1),
        (("chatd_broadcast_events_total", "new_message"), "counter", 1),
        (("chatd_store_messages_total",), "counter", 1),
        (("chatd_store_degraded",), "gauge", 0),
        (("chatd_resumes_total", "fresh"), "counter", 1),
        (("chatd_version_info", chatd.__version__), "gauge", 1),
    ):
        assert samples[name] == (kind, value), name
    assert ("chatd_store_commit_seconds", "p99") in samples


# --- bugs and secrets in the log -----------------------------------------------------


@wires(store=FaultyStore)
async def test_the_same_bug_50_times_writes_10_log_lines(
    house: WiresHouse, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "chatd")
    chat = await house.chat(6, 7)
    house.errors = {"ValueError": 50}
    for _ in range(50):
        raw = house.dial()
        auth = f"Bearer {house.token(6)}"
        path = f"/api/v1/chats/{chat}/messages"
        await raw.send(wires_request("GET", path, None, Authorization=auth))
        await raw.ends()
    assert len(caplog.records) == 10


@wires(store=FaultyStore)
async def test_no_token_and_no_message_text_is_logged_at_any_level_even_by_a_bug(
    house: WiresHouse, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "chatd")
    house.errors = {"ValueError": 1}
    chat = await house.chat(6, 7)
    secrets = [house.token(6), house.token(6) + "x", "n0nsense", house.token(7)]
    peer = await house.join(6, token=secrets[0])
    await peer.ask("send_message", chat_id=chat, content="s3cret text")
    await peer.ask("send_message", chat_id=0, content="s3cret text")
    for token in secrets[1:]:
        raw = house.dial()
        await raw.send(wires_upgrade(f"/ws/chat?token={token}&cursor=s3cret%ff"))
        await raw.answer()
        await peer.say("auth", token=token)
    assert (await peer.end())[1] == 4503
    for path in (f"/api/v1/chats/{chat}/messages", f"//{secrets[0]}", "/s3cret"):
        auth = f"Bearer {secrets[0]}"
        await house.dial().ask("GET", path, None, Authorization=auth)
    assert "joined" in caplog.text
    for secret in (*secrets, "s3cret"):
        assert secret not in caplog.text


# --- a process: what it logs ---------------------------------------------------------


async def test_tokens_and_texts_are_in_no_log_line_no_error_and_no_metric(
    house: DoorServer,
) -> None:
    async with house.serving("--log-level", "debug"):
        mark = "Zx9marker"
        user = next(door_users)
        forged = f"Eve {mark}\nlistening on http://forged:1\x1b[2J\u202e"
        token = house.token(user, name=forged)
        ticket = (await house.want(200, "GET /api/v2/ws-token", token))["token"]
        chat = await house.chat(user)
        peer = await house.peer(token)
        for _ in range(2):
            await peer.ask("send_message", chat_id=chat, content=mark, client_id="m")
        await peer.ask("send_message", chat_id=2, content=mark)
        errors = [await peer.ask("auth", token=f"{mark}.{mark}.{mark}")]
        for text in (f'{{"type":"{mark}"', f'{{"type":"{mark}"}}', f"[{mark}]"):
            await peer.utter(text)
            errors.append(await peer.hear("error"))
        long = {"chat_id": chat, "content": [mark]}
        errors.append(await peer.ask("send_message", **long))
        assert mark not in json.dumps(errors[1:3] + errors[4:])
        (await house.peer(ticket)).drop()
        refused = await house.refusal(ticket)
        assert refused.code == "token_used"
        bad = await house.refusal(f"{mark}.{mark}.{mark}")
        assert mark.encode() not in bad.body
        for data in (
            door_get(f"/{mark}?token={token}", "Host: x", "Connection: close"),
            door_get(f"/ws/chat?token={token}&token={mark}", "Host: x", *DOOR_UPGRADE),
            door_get(f"/ws/chat?token={token}", f"Host: \xff{mark}", *DOOR_UPGRADE),
            f"{mark} {token}\r\n\r\n".encode(),
        ):
            answer = await house.raw(data)
            assert mark.encode() not in answer
            assert token.encode() not in answer
        target = f"POST /api/v1/chats/{chat}/messages"
        await house.want(400, target, token, f'{{"content": {mark}'.encode())
        await house.want(409, target, token, {"content": mark * 2, "client_id": "m"})
        seen = json.dumps(await house.stats())
        seen += (await house.ask("GET", "/metrics", house.stats_token)).body.decode()
        peer.drop()
        await house.stop()
        seen += house.output
        parts = (mark, *token.split(".")[1:], *ticket.split(".")[1:])
        assert not [part for part in parts if part in seen.replace(forged[:13], "")]
        assert "\nlistening on http://forged" not in seen
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", house.output)
        assert house.secret.decode() not in seen


@pytest.mark.parametrize("journal", [True, False])
async def test_log_lines_have_a_priority_only_if_stderr_is_the_journal(
    house: DoorServer, journal: bool
) -> None:
    log = house.home / "stderr"
    log.touch()
    there = log.stat()
    # A process inherits JOURNAL_STREAM even if its stderr is another file, so chatd
    # compares the two.
    stream = f"{there.st_dev}:{there.st_ino + (not journal)}"
    house.environment = {"JOURNAL_STREAM": stream}
    async with house.serving("--log-level=debug"):
        await (await house.peer(next(door_users))).leave()
        await house.want(200, "GET /healthz")
        house.signal(signal.SIGTERM)
        assert await house.ended() == 0
    lines = log.read_text("ascii").splitlines()
    words = [line.split(" ")[0 if journal else 1] for line in lines]
    prefix = ["<6>", "<6>", "<7>", "<7>", "<6>"] if journal else [""] * 5
    verbs = ["made_secret", "ready", "joined", "left", "stopping"]
    assert words == [start + verb for start, verb in zip(prefix, verbs, strict=True)]
    with log.open("ab") as stderr:
        done = await trio.run_process(
            [sys.executable, "-m", "chatd", "check", "--db", str(log)],
            stderr=stderr,
            check=False,
            cwd=DOOR_CHECKOUT,
            env=door_environment(**house.environment),
        )
    assert done.returncode == 1
    last = log.read_text("ascii").splitlines()[-1]
    assert last.startswith("<3>chatd: database " if journal else "chatd: database ")


async def test_a_higher_log_level_logs_less(house: DoorServer) -> None:
    async with house.serving("--log-level=warning"):
        await (await house.peer(next(door_users))).leave()
    assert (house.home / "stderr").read_text() == ""
