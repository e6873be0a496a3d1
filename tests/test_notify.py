"""examples/notify.py: beside a real chatd, a real SMTP server and an HTTP listener."""

from __future__ import annotations

import email
import email.message
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trio
from aiosmtpd.controller import Controller

from tests.client import (
    CHECKOUT,
    CommandResult,
    ServerProcess,
    clean_environment,
    free_port,
    wait_until,
)

NOTIFY = CHECKOUT / "examples" / "notify.py"
UNREAD = "/api/v1/internal/chat/unread"

# --- what people are told by ---------------------------------------------------------


class Inbox:
    """A mail server. It refuses the addresses in `refuses`, for good; at those in
    `hangs_up` it ends the connection."""

    def __init__(self) -> None:
        self.mails: list[email.message.Message] = []
        self.refuses: set[str] = set()
        self.hangs_up: set[str] = set()
        self.arrived = threading.Event()  # a mail has come, and is not accepted yet
        self.accepts = threading.Event()
        self.accepts.set()
        self.controller = Controller(self, hostname="127.0.0.1", port=free_port())

    async def handle_RCPT(
        self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any
    ) -> str:
        if address in self.refuses:
            return "550 no such mailbox"
        if address in self.hangs_up:
            return "421 try later"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:
        self.mails.append(email.message_from_bytes(envelope.content))
        self.arrived.set()
        return "250 accepted"

    @property
    def smtp(self) -> str:
        return f"127.0.0.1:{self.controller.port}"

    @property
    def told(self) -> Counter[str]:
        return Counter(str(mail["To"]) for mail in self.mails)

    @property
    def message_ids(self) -> list[str]:
        return [str(mail["Message-ID"]) for mail in self.mails]


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    made = Inbox()
    made.controller.start()
    yield made
    made.controller.stop()


class Topics(ThreadingHTTPServer):
    """An ntfy server: it keeps what is posted. `status` is its answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), TopicsHandler)
        self.pushes: list[tuple[str, dict[str, str], str]] = []
        self.status = 200
        self.url = f"http://127.0.0.1:{self.server_port}"


class TopicsHandler(BaseHTTPRequestHandler):
    server: Topics

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        headers = {name.lower(): text for name, text in self.headers.items()}
        self.server.pushes.append((self.path, headers, body))
        self.answer(self.server.status)

    def do_GET(self) -> None:  # the page of a topic
        self.answer(200)

    def answer(self, status: int) -> None:
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"{self.server.url}/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def topics() -> Iterator[Topics]:
    with Topics() as made, serving(made):
        yield made


@contextmanager
def serving(http: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        http.shutdown()
        thread.join()


@contextmanager
def dawdling(first: bytes, then: bytes) -> Iterator[int]:
    """Listen at a port: each client gets `first`, and then `then`, again and again."""

    def serve(stream: socket.socket) -> None:
        with stream, suppress(OSError):
            stream.sendall(first)
            while not over.wait(0.02):
                stream.sendall(then)

    def accept() -> None:
        while not over.is_set():
            with suppress(TimeoutError):
                threads.append(
                    threading.Thread(target=serve, args=listener.accept()[:1])
                )
                threads[-1].start()

    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        threads = [threading.Thread(target=accept)]
        threads[0].start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            over.set()
            for thread in threads:
                thread.join()


class Relay(ThreadingHTTPServer):
    """Passes requests on to chatd. It lets so many pages of the feed through."""

    daemon_threads = True

    def __init__(self, server: ServerProcess) -> None:
        super().__init__(("127.0.0.1", 0), RelayHandler)
        self.upstream = server.url
        self.pages: float = math.inf
        self.refused = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class RelayHandler(BaseHTTPRequestHandler):
    server: Relay

    def do_GET(self) -> None:
        if "/events?" in self.path:
            self.server.pages -= 1
        status, body = 503, b"later"
        if self.server.pages >= 0:
            headers = {"Authorization": self.headers["Authorization"]}
            url = self.server.upstream + self.path
            request = urllib.request.Request(url, headers=headers)
            with urllib.request.urlopen(request) as answer:
                status, body = answer.status, answer.read()
        else:
            self.server.refused += 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


# --- the program ---------------------------------------------------------------------


class Notifier:
    """notify.py with its files in a folder, for a server."""

    def __init__(self, server: ServerProcess, inbox: Inbox, topics: Topics) -> None:
        self.server = server
        self.home = server.home
        self.state = self.home / "told.json"
        self.recipients = self.home / "people.txt"
        (self.home / "token").write_text(server.service + "\n")
        self.flags = {
            "--recipients": str(self.recipients),
            "--token-file": str(self.home / "token"),
            "--state": str(self.state),
            "--url": server.url,
            "--smtp": inbox.smtp,
            "--ntfy": topics.url,
            "--from": "chat@shop.example",
            "--older-than": "1",
            "--every": "0.05",
        }
        self.constants: dict[str, object] = {}  # those of the program that differ

    def command(self, *more: str) -> list[str]:
        words = [f"{flag}={value}" for flag, value in self.flags.items()]
        if not self.constants:
            return [sys.executable, str(NOTIFY), *words, *more]
        program = f"""
import sys
sys.path.insert(0, {str(NOTIFY.parent)!r})
import notify
vars(notify).update({self.constants!r})
sys.exit(notify.main())
"""
        return [sys.executable, "-c", program, *words, *more]

    async def once(self) -> CommandResult:
        """Ask once and tell. No failure may be a traceback."""
        done = await trio.run_process(
            self.command("--once"),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        result = CommandResult(
            done.returncode, done.stdout.decode(), done.stderr.decode()
        )
        assert "Traceback" not in result.err, result.err
        return result

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command(), stderr=subprocess.PIPE)

    async def unread(self, *users: int) -> int:
        """Write to these users in a chat of theirs; wait until they are listed."""
        chat = await self.server.chat(1, *users)
        await self.server.post(chat, 1, "hi")
        await self.listed(*(f"{chat}-{user}" for user in users))
        return chat

    async def listed(self, *keys: str) -> None:
        """Wait until the unread list has exactly these members."""

        async def are_listed() -> bool:
            target = f"GET {UNREAD}?older_than=1&limit=500"
            got = await self.server.want(200, target, self.server.service)
            return sorted(row["position"] for row in got["unread"]) == sorted(keys)

        await wait_until(are_listed)


@pytest.fixture
async def notifier(
    server: ServerProcess, inbox: Inbox, topics: Topics
) -> AsyncIterator[Notifier]:
    async with server.serving():
        yield Notifier(server, inbox, topics)


async def until_it_waits_for_messages(process: subprocess.Popen[bytes]) -> None:
    """Line 1 of its recipients is wrong: it says so at its start and in each round. The
    first two rounds need no message: one at once, and one --older-than later."""
    assert process.stderr
    for _ in range(3):
        line = await trio.to_thread.run_sync(process.stderr.readline)
        assert b"line 1: not a user id" in line


def end(process: subprocess.Popen[bytes], signum: int = signal.SIGTERM) -> str:
    process.send_signal(signum)
    _, err = process.communicate(timeout=30)
    assert b"Traceback" not in err, err
    return err.decode()


# --- telling -------------------------------------------------------------------------


async def test_what_stays_unread_is_told_once_until_it_was_read(
    notifier: Notifier, inbox: Inbox, topics: Topics
) -> None:
    server = notifier.server
    notifier.recipients.write_text(
        # As some editors write it.
        "\ufeff2 two@shop.example\r\n\r\n# people\r\n3 secret-topic  # a push\r\n"
    )
    notifier.flags["--from"] = "The shop <chat@shop.example>"
    chat = await server.chat(1, 2, 3, 4)
    await server.want(200, "GET /api/v1/me", server.token(2, name="Zoë"))
    first = await server.post(chat, 1, "secret words")
    await notifier.listed(*(f"{chat}-{user}" for user in (2, 3, 4)))
    for _ in range(3):
        assert await notifier.once() == CommandResult(0, "", "")
    (mail,) = inbox.mails
    assert mail["To"] == "two@shop.example"
    assert mail["From"] == "The shop <chat@shop.example>"
    assert str(mail["Message-ID"]).endswith("@shop.example>")
    assert mail["Subject"] == "You have 1 unread message"
    assert mail["Auto-Submitted"] == "auto-generated"
    assert mail["Date"]
    text = mail.get_payload(decode=True)
    assert isinstance(text, bytes)
    assert text.decode().startswith("Hello Zoë,")
    ((path, headers, body),) = topics.pushes
    assert path == "/secret-topic"
    assert headers["title"] == "You have 1 unread message"
    assert "1 unread message" in body
    assert "secret words" not in f"{mail}{headers}{body}"
    # More messages in what was told and not read are nothing new.
    second = await server.post(chat, 1, "more")
    await notifier.once()
    # Two has read a part, and three has read all.
    await server.want(200, f"POST /api/v1/messages/{first['id']}/read", server.token(2))
    await server.want(
        200, f"POST /api/v1/messages/{second['id']}/read", server.token(3)
    )
    third = await server.post(chat, 1, "later")
    await notifier.listed(*(f"{chat}-{user}" for user in (2, 3, 4)))
    await notifier.once()
    assert len(topics.pushes) == 2
    assert len({headers["message-id"] for _, headers, _ in topics.pushes}) == 2
    await server.want(200, f"POST /api/v1/messages/{third['id']}/read", server.token(2))
    before = len(inbox.mails)
    await server.post(chat, 1, "after all was read")
    await notifier.listed(*(f"{chat}-{user}" for user in (2, 3, 4)))
    await notifier.once()
    assert len(inbox.mails) == before + 1
    assert len(set(inbox.message_ids)) == len(inbox.mails)


async def test_it_waits_for_messages_and_tells_of_them_by_itself(
    notifier: Notifier, inbox: Inbox
) -> None:
    server = notifier.server
    notifier.recipients.write_text("2 two@shop.example\n3 three@shop.example\n")
    chat, other = await server.chat(1, 2), await server.chat(1, 3)
    with notifier.start() as process:
        await wait_until(notifier.state.exists)
        await server.post(chat, 1, "hi")
        await wait_until(lambda: inbox.told["two@shop.example"] == 1)
        # A restart of chatd makes no difference.
        await server.kill()
        await server.begin()
        await server.post(other, 1, "hi")
        await wait_until(lambda: inbox.told["three@shop.example"] == 1)
        end(process)
    assert inbox.told == {"two@shop.example": 1, "three@shop.example": 1}


async def test_it_tells_of_what_came_while_it_did_not_run(
    notifier: Notifier, inbox: Inbox
) -> None:
    server = notifier.server
    notifier.recipients.write_text("2 two@shop.example\n")
    chat = await server.chat(1, 2)
    await server.post(chat, 1, "hi")
    with notifier.start() as process:
        await wait_until(lambda: inbox.told["two@shop.example"] == 1)
        end(process)
    with notifier.start() as process:
        await wait_until(notifier.state.exists)
        end(process)
    assert len(inbox.mails) == 1


async def test_a_message_counts_even_if_the_next_page_of_the_feed_fails(
    notifier: Notifier, inbox: Inbox
) -> None:
    server = notifier.server
    notifier.recipients.write_text("2\n2 two@shop.example\n")
    chat = await server.chat(1, 2)
    with Relay(server) as relay, serving(relay):
        notifier.flags["--url"] = relay.url
        with notifier.start() as process:
            await until_it_waits_for_messages(process)
            relay.pages = 0
            await server.post(chat, 1, "hi")
            await server.chat(*range(1000, 1600))  # more events than one page has
            await notifier.listed(f"{chat}-2")
            relay.pages = 1
            refused = relay.refused
            await wait_until(lambda: relay.refused > refused)
            relay.pages = math.inf
            await wait_until(lambda: inbox.told["two@shop.example"] == 1)
            end(process)


async def test_an_address_that_was_corrected_is_told_without_a_new_message(
    notifier: Notifier, inbox: Inbox
) -> None:
    notifier.recipients.write_text("2 no address\n")
    await notifier.unread(2)
    notifier.constants["LOOK_SECONDS"] = 0.1
    with notifier.start() as process:
        await until_it_waits_for_messages(process)
        notifier.recipients.write_text("2 two@shop.example\n")
        await wait_until(lambda: inbox.told["two@shop.example"] == 1)
        end(process)


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_killed_at_any_moment_it_forgets_nobody(
    notifier: Notifier, inbox: Inbox, topics: Topics, seed: int
) -> None:
    people, rng = [*range(2, 42)], random.Random(seed)
    notifier.recipients.write_text("".join(
        f"{user} {user}@shop.example\n" if user % 2 else f"{user} topic{user}\n"
        for user in people
    ))  # fmt: skip
    await notifier.unread(*people)
    kills = 0

    def told() -> int:
        return len(inbox.mails) + len(topics.pushes)

    while kills < 12:
        before = told()
        with notifier.start() as process:
            # From now on, or from the first message on: at any moment.
            if rng.random() < 0.8 and before < len(people):
                await wait_until(lambda before=before: told() > before)  # type: ignore[misc]
            await trio.sleep(rng.random() * 0.02)
            end(process, signal.SIGKILL)
        kills += 1
    assert await notifier.once() == CommandResult(0, "", "")
    ids = inbox.message_ids + [headers["message-id"] for _, headers, _ in topics.pushes]
    by_person = Counter(id_.split(".")[1] for id_ in ids)
    assert set(by_person) == {str(user) for user in people}
    # Each kill repeats at most one, with the same Message-ID.
    assert len(set(ids)) == len(people)
    assert len(ids) <= len(people) + kills
    before = told()
    await notifier.once()
    assert told() == before


# --- what fails ----------------------------------------------------------------------


async def test_an_address_that_fails_does_not_stop_the_others(
    notifier: Notifier, inbox: Inbox, topics: Topics
) -> None:
    notifier.recipients.write_text(
        "2 bad@shop.example\n3 three@shop.example\nnonsense\n4 http://127.0.0.1:1/x\n"
        "5 five@shop.example\n6 a@b@c\n7 topic\n8 \N{SNOWMAN}@shop.example\n9 no url://\n"
        "10 ten@shop.example\n11 ftp://x/y\n"
    )
    inbox.refuses.add("bad@shop.example")
    await notifier.unread(*range(2, 12))
    got = await notifier.once()
    assert got.status == 1
    assert {"three@shop.example", "five@shop.example", "ten@shop.example"} <= set(
        inbox.told
    )
    assert len(topics.pushes) == 1
    lines = got.err.splitlines()
    assert all(line.startswith("notify: ") for line in lines)
    assert "line 3: not a user id and an address" in lines[0]
    assert "user 2: refused: " in got.err
    assert "no such mailbox" in got.err
    assert "user 4: http://127.0.0.1:1/x: " in got.err
    # When the address is right, it is told; the others not again.
    before = inbox.told
    inbox.refuses.clear()
    await notifier.once()
    assert inbox.told - before == {"bad@shop.example": 1}


async def test_a_mail_server_that_is_down_is_tried_again(
    notifier: Notifier, inbox: Inbox, topics: Topics
) -> None:
    notifier.recipients.write_text("2 two@x.example\n3 three@x.example\n4 topic\n")
    await notifier.unread(2, 3, 4)
    notifier.flags["--smtp"] = f"127.0.0.1:{free_port()}"
    got = await notifier.once()
    assert got.status == 1
    assert got.err.count("mail server") == 1  # it is said once, not for each person
    assert len(topics.pushes) == 1
    notifier.flags["--smtp"] = inbox.smtp
    assert await notifier.once() == CommandResult(0, "", "")
    assert inbox.told == {"two@x.example": 1, "three@x.example": 1}
    assert len(topics.pushes) == 1


async def test_an_address_that_ends_the_connection_does_not_stop_the_next(
    notifier: Notifier, inbox: Inbox
) -> None:
    notifier.recipients.write_text("2 two@x.example\n3 three@x.example\n")
    inbox.hangs_up.add("two@x.example")
    await notifier.unread(2, 3)
    got = await notifier.once()
    assert got.status == 1
    assert "user 2: refused: " in got.err
    assert inbox.told == {"three@x.example": 1}


async def test_a_server_that_dawdles_stops_nobody_else(
    notifier: Notifier, topics: Topics
) -> None:
    await notifier.unread(2, 3, 4, 5)
    notifier.constants["WHOLE_SECONDS"] = 2  # chatd's own answers come sooner
    with (
        dawdling(b"HTTP/1.1 200 OK\r\nX-Never-Ends: ", b"x") as topic,
        dawdling(b"220-", b"x") as mail,
    ):
        notifier.recipients.write_text(
            f"2 http://127.0.0.1:{topic}/x\n3 a@x.example\n4 b@x.example\n5 topic\n"
        )
        notifier.flags["--smtp"] = f"127.0.0.1:{mail}"
        got = await notifier.once()
    assert got.status == 1
    assert len(topics.pushes) == 1
    assert got.err.count("not done after 2 s") == 2  # the mail server: only once


async def test_a_mail_server_that_hangs_is_waited_for_once(
    notifier: Notifier, topics: Topics
) -> None:
    notifier.recipients.write_text("2 two@x.example\n3 three@x.example\n4 topic\n")
    await notifier.unread(2, 3, 4)
    notifier.constants["NET_SECONDS"] = 2  # chatd's own answers come sooner
    with dawdling(b"220 hi\r\n", b"") as mail:  # and then not a byte
        notifier.flags["--smtp"] = f"127.0.0.1:{mail}"
        got = await notifier.once()
    assert got.status == 1
    assert got.err.count("mail server") == 1
    assert len(topics.pushes) == 1


async def test_a_servers_words_are_one_line_of_the_log(notifier: Notifier) -> None:
    await notifier.unread(2)
    with dawdling(b"nonsense\r\nnotify: all is well\r\n\r\n", b"") as topic:
        notifier.recipients.write_text(f"2 http://127.0.0.1:{topic}/x\n")
        got = await notifier.once()
    assert got.status == 1
    (line,) = got.err.splitlines()
    assert line.startswith("notify: user 2: ")
    assert "nonsense" in line


@pytest.mark.parametrize("status", [302, 403, 429, 500])
async def test_a_push_counts_only_when_it_is_accepted(
    notifier: Notifier, topics: Topics, status: int
) -> None:
    notifier.recipients.write_text(f"2 {topics.url}/a\n")
    await notifier.unread(2)
    topics.status = status
    got = await notifier.once()
    assert got.status == 1
    assert f"{topics.url}/a answers {status}" in got.err
    topics.status = 200
    assert (await notifier.once()).status == 0
    first, second = topics.pushes
    assert first[1]["message-id"] == second[1]["message-id"]


async def test_nobody_is_told_while_the_notes_cannot_be_written(
    notifier: Notifier, inbox: Inbox
) -> None:
    notifier.recipients.write_text("2 two@shop.example\n")
    await notifier.unread(2)
    partial = notifier.state.with_name("told.json.partial")
    partial.mkdir()  # so that it cannot be written, by root either
    got = await notifier.once()
    assert got.status == 1
    assert "nobody is told" in got.err
    assert inbox.mails == []
    partial.rmdir()
    assert (await notifier.once()).status == 0
    assert len(inbox.mails) == 1


async def test_what_is_wrong_is_said_in_a_sentence(
    notifier: Notifier, inbox: Inbox
) -> None:
    notifier.recipients.write_text("2 two@shop.example\n")
    flags = dict(notifier.flags)
    bad = notifier.home / "bad"
    bad.write_bytes(b"\xff{")
    wrong_token = notifier.home / "user.token"
    wrong_token.write_text(notifier.server.token(5))
    for change, status, said in (
        ({"--recipients": str(notifier.home / "none")}, 1, "No such file"),
        ({"--recipients": str(bad)}, 1, "--recipients"),
        ({"--token-file": str(bad)}, 1, "--token-file"),
        ({"--token-file": str(wrong_token)}, 1, "the token must have scope service"),
        ({"--token-file": str(notifier.recipients)}, 1, "chatd answers 401"),
        ({"--url": "http://127.0.0.1:1"}, 1, "does not answer"),
        ({"--url": "nonsense"}, 1, "does not answer"),
        ({"--smtp": "localhost"}, 2, "not HOST:PORT"),
        ({"--smtp": ":25"}, 2, "not HOST:PORT"),
        ({"--smtp": "localhost:99999"}, 2, "not HOST:PORT"),
        ({"--older-than": "0"}, 2, "more than 0"),
        ({"--every": "0"}, 2, "more than 0"),
        ({"--state": str(wrong_token)}, 1, "not written by this program"),
        ({"--state": "/nonexistent/told.json"}, 1, "No such file"),
    ):
        notifier.flags = {**flags, **change}
        got = await notifier.once()
        assert (got.status, said in got.err) == (status, True), (change, got)
        assert "eyJ" not in got.err, "a token in a message"
    assert inbox.mails == []


async def test_only_one_may_use_the_notes(notifier: Notifier) -> None:
    notifier.recipients.write_text("")
    with notifier.start() as process:
        await wait_until(notifier.state.exists)
        got = await notifier.once()
        assert (got.status, "another notify.py uses it" in got.err) == (1, True)
        end(process)
    assert (await notifier.once()).status == 0


async def test_notes_are_dropped_when_all_is_read(
    notifier: Notifier, inbox: Inbox
) -> None:
    server = notifier.server
    notifier.recipients.write_text("2 two@shop.example\n3 three@shop.example\n")
    chat = await server.chat(1, 2, 3)
    message = await server.post(chat, 1, "hi")
    await notifier.listed(f"{chat}-2", f"{chat}-3")
    await notifier.once()
    assert set(json.loads(notifier.state.read_text())) == {f"{chat}-2", f"{chat}-3"}
    await server.want(
        200, f"POST /api/v1/messages/{message['id']}/read", server.token(2)
    )
    await notifier.listed(f"{chat}-3")

    async def dropped() -> bool:
        await notifier.once()
        return set(json.loads(notifier.state.read_text())) == {f"{chat}-3"}

    await wait_until(dropped)
    assert len(inbox.mails) == 2


async def test_the_commands_of_the_documentation_work(
    notifier: Notifier, inbox: Inbox
) -> None:
    server, home = notifier.server, notifier.home
    text = (CHECKOUT / "docs" / "operating.md").read_text("utf-8")
    (block,) = re.findall(r"(?ms)^```sh\n(printf .*?)^```$", text)
    block = block.replace("https://ntfy.sh", "http://127.0.0.1:1")
    block = block.replace(".venv/bin/chatd token", f"{sys.executable} -m chatd token")
    block = block.replace("python3 examples/notify.py", f"{sys.executable} {NOTIFY}")
    block = block.replace("localhost:25", inbox.smtp)
    await notifier.unread(6)
    done = await trio.run_process(
        ["bash", "-euc", f"{block.rstrip()} --older-than=1 --url={server.url} --once"],
        cwd=home, capture_stderr=True,
        env=clean_environment(PYTHONPATH=str(CHECKOUT), CHATD_DB=str(server.db)),
    )  # fmt: skip
    assert done.stderr == b""
    assert inbox.told == {"anna@example.org": 1}
    assert (home / "notify.token").stat().st_mode & 0o077 == 0


def test_it_needs_nothing_but_the_standard_library() -> None:
    # -I -S: without site-packages.
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(NOTIFY), "--help"],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    assert "Tell people about chat messages that stay unread" in done.stdout


def test_the_unit_starts_it_with_flags_that_it_has(tmp_path: Path) -> None:
    text = (CHECKOUT / "examples" / "chatd-notify.service").read_text("utf-8")
    text = text.replace("\\\n", " ")
    (line,) = (x for x in text.splitlines() if x.startswith("ExecStart="))
    (flags,) = (
        x.removeprefix("Environment=NOTIFY_FLAGS=")
        for x in text.splitlines()
        if x.startswith("Environment=NOTIFY_FLAGS=")
    )
    words = line.replace("$NOTIFY_FLAGS", flags).replace("%d", str(tmp_path)).split()
    words = [word.replace("%S/chatd-notify", str(tmp_path)) for word in words]
    (tmp_path / "token").write_text("x")
    (tmp_path / "recipients").write_text("")
    done = subprocess.run(
        [sys.executable, str(NOTIFY), *words[2:], "--once", "--url=http://127.0.0.1:1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, "does not answer" in done.stderr) == (1, True), done
    assert (tmp_path / "told.json").exists()
