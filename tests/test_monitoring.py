"""Monitoring: log lines, the stats document, metrics."""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import wait_all_tasks_blocked

import chatd
from chatd import Stats
from tests.client import (
    CHECKOUT,
    ServerProcess,
    clean_environment,
    get_bytes,
    new_users,
    request_bytes,
    upgrade_bytes,
)
from tests.harness import FaultyStore, VirtualServer, with_server

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
    monkeypatch.setattr(chatd, "end_with_a_sentence", lambda: None)
    assert chatd.main(["check"]) == 1
    err = capsys.readouterr().err
    where = r"test_monitoring\.py:\d+ broken < chatd\.py:\d+ main"
    line = rf"\S+ ERROR crashed error='ValueError' at='{where}'\n"
    assert re.fullmatch(line, err), err


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize(
    ("level", "prefix"), [("DEBUG", 7), ("INFO", 6), ("WARNING", 4), ("ERROR", 3)]
)
def test_a_log_line_has_its_priority_in_the_journal_and_time_and_level_elsewhere(
    level: str, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    number = logging.getLevelNamesMapping()[level]
    record = logging.LogRecord("chatd", number, "", 0, "left user=6", None, None)
    record.created = 1_790_000_000.9
    assert chatd.JournalFormatter().format(record) == f"<{prefix}>left user=6"
    chatd.set_up_log("info")
    (handler,) = chatd.logger.handlers
    line = handler.format(record)
    monkeypatch.undo()
    time.tzset()
    assert line == f"2026-09-21T16:13:20+0200 {level} left user=6"


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


@with_server()
async def test_the_stats_count_connections_events_messages_and_refusals(
    server: VirtualServer,
) -> None:
    chat = await server.chat(6, 7)
    peer, friend, tab = [await server.join(u) for u in (6, 7, 7)]
    command = {"chat_id": chat, "content": "hi", "client_id": "k"}
    for _ in range(2):
        await peer.ask("send_message", **command)
    await peer.leave()
    await tab.leave(1001)
    await wait_all_tasks_blocked()
    refused = server.dial()
    await refused.send(upgrade_bytes("/ws/chat"))
    assert (await refused.answer()).status == 401
    stats = await server.stats()
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
            "duplicates": None, "failed": None, "joins": None, "degraded": None,
            "wal_bytes": None, "sqlite": None,
        },
        "searches": None,
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
    assert (await friend.receive("new_message"))["message"]["n"] == 1


@with_server()
async def test_the_metrics_have_the_numbers_of_the_stats(server: VirtualServer) -> None:
    chat = await server.chat(6, 7)
    peer = await server.join(6)
    await peer.ask("send_message", chat_id=chat, content="hi")
    answer = await server.ask(
        "GET", "/metrics", token=server.token(999, scope="stats service")
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


@with_server(store=FaultyStore)
async def test_the_same_bug_50_times_writes_10_log_lines(
    server: VirtualServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "chatd")
    chat = await server.chat(6, 7)
    server.errors = {"ValueError": 50}
    for _ in range(50):
        raw = server.dial()
        auth = f"Bearer {server.token(6)}"
        path = f"/api/v1/chats/{chat}/messages"
        await raw.send(request_bytes("GET", path, None, Authorization=auth))
        await raw.ends()
    assert len(caplog.records) == 10


@with_server(store=FaultyStore)
async def test_no_token_and_no_message_text_is_logged_at_any_level_even_by_a_bug(
    server: VirtualServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "chatd")
    server.errors = {"ValueError": 1}
    chat = await server.chat(6, 7)
    secrets = [server.token(6), server.token(6) + "x", "n0nsense", server.token(7)]
    peer = await server.join(6, token=secrets[0])
    await peer.ask("send_message", chat_id=chat, content="s3cret text")
    await peer.ask("send_message", chat_id=0, content="s3cret text")
    for token in secrets[1:]:
        raw = server.dial()
        await raw.send(upgrade_bytes(f"/ws/chat?token={token}&cursor=s3cret%ff"))
        await raw.answer()
        await peer.send_command("auth", token=token)
    assert (await peer.end())[1] == 4503
    for path in (f"/api/v1/chats/{chat}/messages", f"//{secrets[0]}", "/s3cret"):
        auth = f"Bearer {secrets[0]}"
        await server.dial().ask("GET", path, None, Authorization=auth)
    assert "joined" in caplog.text
    for secret in (*secrets, "s3cret"):
        assert secret not in caplog.text


# --- a process: what it logs ---------------------------------------------------------


async def test_tokens_and_texts_are_in_no_log_line_no_error_and_no_metric(
    server: ServerProcess,
) -> None:
    async with server.serving("--log-level", "debug"):
        mark = "Zx9marker"
        user = next(new_users)
        forged = f"Eve {mark}\nlistening on http://forged:1\x1b[2J\u202e"
        token = server.token(user, name=forged)
        ticket = (await server.want(200, "GET /api/v2/ws-token", token))["token"]
        chat = await server.chat(user)
        peer = await server.peer(token)
        for _ in range(2):
            await peer.ask("send_message", chat_id=chat, content=mark, client_id="m")
        await peer.ask("send_message", chat_id=2, content=mark)
        errors = [await peer.ask("auth", token=f"{mark}.{mark}.{mark}")]
        for text in (f'{{"type":"{mark}"', f'{{"type":"{mark}"}}', f"[{mark}]"):
            await peer.send_frame(text)
            errors.append(await peer.receive("error"))
        long = {"chat_id": chat, "content": [mark]}
        errors.append(await peer.ask("send_message", **long))
        assert mark not in json.dumps(errors[1:3] + errors[4:])
        (await server.peer(ticket)).drop()
        refused = await server.refusal(ticket)
        assert refused.code == "token_used"
        bad = await server.refusal(f"{mark}.{mark}.{mark}")
        assert mark.encode() not in bad.body
        for data in (
            get_bytes(f"/{mark}?token={token}", "Host: x", "Connection: close"),
            upgrade_bytes(f"/ws/chat?token={token}&token={mark}"),
            upgrade_bytes(f"/ws/chat?token={token}", Host=f"\xff{mark}"),
            f"{mark} {token}\r\n\r\n".encode(),
        ):
            answer = await server.raw(data)
            assert mark.encode() not in answer
            assert token.encode() not in answer
        target = f"POST /api/v1/chats/{chat}/messages"
        await server.want(400, target, token, f'{{"content": {mark}'.encode())
        await server.want(409, target, token, {"content": mark * 2, "client_id": "m"})
        seen = json.dumps(await server.stats())
        seen += (await server.ask("GET", "/metrics", server.stats_token)).body.decode()
        peer.drop()
        await server.stop()
        seen += server.output
        parts = (mark, *token.split(".")[1:], *ticket.split(".")[1:])
        assert not [part for part in parts if part in seen.replace(forged[:13], "")]
        assert "\nlistening on http://forged" not in seen
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", server.output)
        assert server.secret.decode() not in seen


@pytest.mark.parametrize("journal", [True, False])
async def test_log_lines_have_a_priority_only_if_stderr_is_the_journal(
    server: ServerProcess, journal: bool
) -> None:
    log = server.home / "stderr"
    log.touch()
    there = log.stat()
    # A process inherits JOURNAL_STREAM even if its stderr is another file, so chatd
    # compares the two.
    stream = f"{there.st_dev}:{there.st_ino + (not journal)}"
    server.environment = {"JOURNAL_STREAM": stream}
    async with server.serving("--log-level=debug"):
        await (await server.peer(next(new_users))).leave()
        await server.want(200, "GET /healthz")
        server.signal(signal.SIGTERM)
        assert await server.ended() == 0
    lines = log.read_text("ascii").splitlines()
    words = [line.split(" ")[0 if journal else 2] for line in lines]
    prefix = ["<6>", "<6>", "<7>", "<7>", "<6>"] if journal else [""] * 5
    verbs = ["made_secret", "ready", "joined", "left", "stopping"]
    assert words == [start + verb for start, verb in zip(prefix, verbs, strict=True)]
    with log.open("ab") as stderr:
        done = await trio.run_process(
            [sys.executable, "-m", "chatd", "check", "--db", str(log)],
            stderr=stderr,
            check=False,
            cwd=CHECKOUT,
            env=clean_environment(**server.environment),
        )
    assert done.returncode == 1
    last = log.read_text("ascii").splitlines()[-1]
    assert last.startswith("<3>chatd: database " if journal else "chatd: database ")


async def test_a_higher_log_level_logs_less(server: ServerProcess) -> None:
    async with server.serving("--log-level=warning"):
        await (await server.peer(next(new_users))).leave()
    assert (server.home / "stderr").read_text() == ""
