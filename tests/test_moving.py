"""docs/moving.md: a chat moves from a real chatd to a real Prosody while both run.

The configuration of Prosody and the commands are those of the document.
"""

from __future__ import annotations

import base64
import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

import pytest
import trio

from tests.client import (
    CHECKOUT,
    PING,
    PONG,
    TEXT,
    WAIT_SECONDS,
    Frame,
    RawClient,
    ServerProcess,
    clean_environment,
    find_program,
    frame_bytes,
    free_port,
    run_chatd,
    upgrade_bytes,
    wait_until,
)

EXAMPLE = CHECKOUT / "examples" / "prosody"
DOCUMENT = (CHECKOUT / "docs" / "moving.md").read_text("utf-8")
DOMAIN = "chat.example.org"
KEY = b"0123456789abcdef" * 4  # of the site's backend
BODY = "{jabber:client}body"
DELAY = "{urn:xmpp:delay}delay"


def room(chat: int) -> str:
    return f"c{chat}@conference.{DOMAIN}"


# --- the programs --------------------------------------------------------------------


class Prosody:
    """Prosody with the configuration of the example, but for ports and folders."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, free_port()
        path = find_program(
            ("prosody",), "no Prosody: apt install prosody lua-dbi-sqlite3"
        )
        config = (EXAMPLE / "prosody.cfg.lua").read_text()
        for documented, tried in {
            "/usr/local/lib/prosody/modules": str(EXAMPLE),
            "/var/lib/prosody": str(home),
            "/run/prosody": str(home),
            "/etc/prosody": str(home),
            "{ 5280 }": f"{{ {self.port} }}",
        }.items():
            assert documented in config
            config = config.replace(documented, tried)
        # A machine that runs tests may have no other user.
        (home / "prosody.cfg.lua").write_text("run_as_root = true\n" + config)
        (home / "certs").mkdir()
        self.command = [path, "-F", "--config", str(home / "prosody.cfg.lua")]
        self.process: subprocess.Popen[bytes] | None = None
        self.streams: list[trio.SocketStream] = []

    async def start(self) -> None:
        with (self.home / "prosody.log").open("ab") as log:
            # Its times must be UTC also where local time is not.
            env = clean_environment(TZ="EST5EDT,M3.2.0,M11.1.0")
            self.process = await trio.to_thread.run_sync(
                lambda: subprocess.Popen(self.command, stdout=log, stderr=log, env=env)
            )

        async def listens() -> bool:
            assert self.process
            assert self.process.poll() is None, self.log
            with suppress(OSError):
                await self.dial()
                return True
            return False

        await wait_until(listens)

    async def dial(self) -> RawClient:
        self.streams.append(await trio.open_tcp_stream("127.0.0.1", self.port))
        return RawClient(self.streams[-1])

    def end(self, signum: int) -> None:
        assert self.process
        self.process.send_signal(signum)
        self.process.wait(WAIT_SECONDS)

    @property
    def log(self) -> str:
        return (self.home / "prosody.log").read_text()

    def rows(self) -> list[tuple[Any, ...]]:
        """Return the archive as it is on disk."""
        sql = (
            "SELECT user, key, [when], value FROM prosodyarchive WHERE store='muc_log'"
        )
        db = sqlite3.connect(self.home / "prosody.sqlite")
        try:
            return db.execute(sql + " ORDER BY sort_id").fetchall()
        finally:
            db.close()


class Mover:
    """to_prosody.py with its files in a folder, as the document calls it."""

    def __init__(self, server: ServerProcess, prosody: Prosody) -> None:
        self.home = server.home
        self.db = server.db
        calls = re.findall(
            r"(?m)^python3 examples/prosody/(to_prosody.py.*)$", DOCUMENT
        )
        self.calls = [call.split()[1:] for call in calls]
        assert self.calls == [["--import", "everything.jsonl"], [], ["--once"]]
        (self.home / "service.token").write_text(server.service + "\n")
        (self.home / "import.secret").write_bytes(KEY + b"\n")
        self.more = [
            *("--chatd", server.url, "--every", "0.05"),
            *("--prosody", f"http://127.0.0.1:{prosody.port}/chatd_import"),
        ]

    def command(self, call: int) -> list[str]:
        program = str(EXAMPLE / "to_prosody.py")
        return [sys.executable, program, *self.calls[call], *self.more]

    async def runs(self, call: int) -> None:
        """Run it to its end, which must be good."""
        done = await trio.run_process(
            self.command(call), cwd=self.home, capture_stderr=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")

    async def imports(self) -> None:
        """Export everything, and import it."""
        done = await run_chatd("export", "--db", self.db)
        assert done.status == 0, done
        (self.home / "everything.jsonl").write_text(done.out, "utf-8")
        await self.runs(0)

    async def catches_up(self) -> None:
        await self.runs(2)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Let it follow the feed during the block, and kill it then."""
        process = subprocess.Popen(
            self.command(1), cwd=self.home, stderr=subprocess.DEVNULL
        )
        try:
            yield
            assert process.poll() is None, "it has ended by itself"
        finally:
            process.kill()
            process.wait()


def post(prosody: Prosody, line: str) -> bytes:
    """Send a line to mod_chatd_import as a backend does."""
    url = f"http://127.0.0.1:{prosody.port}/chatd_import"
    headers = {"Authorization": f"Bearer {KEY.decode()}"}
    request = urllib.request.Request(url, line.encode(), headers)
    with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as answer:
        return bytes(answer.read())


# --- an XMPP client ------------------------------------------------------------------


class Entry(NamedTuple):
    """A message, as an XMPP client and as chatd show it."""

    id: str
    author: str
    at: str
    text: str | None  # None: it was deleted


class Refused(Exception):
    """Prosody answered with an error."""


class XmppClient:
    """A client over mod_websocket (RFC 7395): a stanza is a text message."""

    def __init__(self, line: RawClient, user: int) -> None:
        self.line, self.user = line, user
        self.live: list[ET.Element] = []  # messages that came so far
        self.asked = 0

    @classmethod
    async def sign_in(cls, prosody: Prosody, user: int, token: str) -> XmppClient:
        """Sign in as `user` with a token of the site's backend. Raises Refused."""
        self = cls(await prosody.dial(), user)
        await self.line.send(
            upgrade_bytes("/xmpp-websocket", Host=DOMAIN, Sec_WebSocket_Protocol="xmpp")
        )
        assert (await self.line.answer()).status == 101
        await self.open_stream()
        plain = base64.b64encode(f"\0u{user}\0{token}".encode()).decode()
        sasl = "urn:ietf:params:xml:ns:xmpp-sasl"
        await self.send(f'<auth xmlns="{sasl}" mechanism="PLAIN">{plain}</auth>')
        answer = await self.receive()
        if answer.tag != f"{{{sasl}}}success":
            raise Refused(ET.tostring(answer, "unicode"))
        await self.open_stream()
        await self.ask("set", "", '<bind xmlns="urn:ietf:params:xml:ns:xmpp-bind"/>')
        await self.send('<presence xmlns="jabber:client"/>')
        return self

    async def open_stream(self) -> None:
        framing = "urn:ietf:params:xml:ns:xmpp-framing"
        await self.send(f'<open xmlns="{framing}" to="{DOMAIN}" version="1.0"/>')
        assert (await self.receive()).tag == f"{{{framing}}}open"
        assert (await self.receive()).tag.endswith("}features")

    async def send(self, stanza: str) -> None:
        await self.line.send(frame_bytes(TEXT, stanza.encode()))

    async def receive(self) -> ET.Element:
        """Return the next stanza. Keep it in `live` if it is a message."""
        opcode, payload = await self.line.frame()
        while opcode == PING:
            await self.line.send(frame_bytes(PONG, payload))
            opcode, payload = await self.line.frame()
        assert opcode == TEXT, payload
        stanza = ET.fromstring(payload)
        if stanza.tag == "{jabber:client}message":
            self.live.append(stanza)
        return stanza

    async def ask(self, kind: str, to: str, query: str) -> ET.Element:
        """Send a query and return its answer. Raises Refused."""
        self.asked += 1
        name = f"q{self.asked}"
        head = f'<iq xmlns="jabber:client" type="{kind}" id="{name}"'
        address = f" to={quoteattr(to)}" if to else ""
        await self.send(f"{head}{address}>{query}</iq>")
        while (answer := await self.receive()).get("id") != name:
            pass
        if answer.get("type") == "error":
            raise Refused(ET.tostring(answer, "unicode"))
        return answer

    async def join(self, chat: int, nick: str) -> ET.Element:
        """Enter a room without its history; return the own presence, or an error."""
        me = f"{room(chat)}/{nick}"
        muc = "http://jabber.org/protocol/muc"
        await self.send(
            f'<presence xmlns="jabber:client" to={quoteattr(me)}>'
            f'<x xmlns="{muc}"><history maxstanzas="0"/></x></presence>'
        )
        while True:
            stanza = await self.receive()
            if stanza.tag == "{jabber:client}presence" and stanza.get("from") == me:
                return stanza

    async def archive(self, chat: int) -> list[Entry]:
        """Return all that the archive of a room has, page by page (XEP-0313)."""
        entries, after = list[Entry](), ""
        while True:
            before = len(self.live)
            answer = await self.ask(
                "set",
                room(chat),
                '<query xmlns="urn:xmpp:mam:2"><set xmlns="http://jabber.org/protocol/rsm">'
                f"<max>7</max>{after}</set></query>",
            )
            for message in self.live[before:]:
                if (result := message.find("{urn:xmpp:mam:2}result")) is not None:
                    entries.append(entry(result))
                    self.live.remove(message)
            (fin,) = answer.findall("{urn:xmpp:mam:2}fin")
            if fin.get("complete") == "true":
                return entries
            after = f"<after>{entries[-1].id}</after>"

    async def bookmarks(self) -> dict[str, str | None]:
        """Return the rooms that this user is a member of, with their names."""
        answer = await self.ask(
            "get",
            "",
            '<pubsub xmlns="http://jabber.org/protocol/pubsub">'
            '<items node="urn:xmpp:bookmarks:1"/></pubsub>',
        )
        return {
            str(item.get("id")): item[0].get("name")
            for item in answer.iter("{http://jabber.org/protocol/pubsub}item")
        }

    async def until(self, true: Callable[[ET.Element], bool]) -> ET.Element:
        """Receive until there is such a message."""
        seen = 0
        while True:
            for message in self.live[seen:]:
                if true(message):
                    return message
            seen = len(self.live)
            await self.receive()

    async def sees(self, text: str) -> ET.Element:
        return await self.until(lambda message: message.findtext(BODY) == text)


def entry(result: ET.Element) -> Entry:
    """Read a result of a query."""
    (message,) = result.iter("{jabber:client}message")
    (item,) = message.iter("{http://jabber.org/protocol/muc#user}item")
    (delay,) = result.iter(DELAY)
    gone = message.find("{urn:xmpp:message-retract:1}retracted") is not None
    text = message.findtext(BODY)
    assert gone == (text is None)
    return Entry(
        str(result.get("id")), str(item.get("jid")), str(delay.get("stamp")), text
    )


def xml_text(text: str) -> str:
    """Return a text as XML can have it."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub("[\ufffe\uffff]", "\ufffd", text)


def entries_of(history: list[Frame]) -> list[Entry]:
    """Return what the archive of a room must have."""
    return [
        Entry(
            f"chatd-{message['id']}",
            f"u{message['sender_id']}@{DOMAIN}",
            message["created_at"],
            None if message.get("deleted") else xml_text(message["content"]),
        )
        for message in history
    ]


# --- the move ------------------------------------------------------------------------


@pytest.fixture
async def prosody(tmp_path: Path) -> AsyncIterator[Prosody]:
    home = tmp_path / "prosody"
    home.mkdir()
    for name in ("backend.key", "import.secret"):
        (home / name).write_bytes(KEY + b"\n")
    made = Prosody(home)
    try:
        await made.start()
        yield made
    finally:
        for stream in made.streams:
            stream.socket.close()
        made.end(signal.SIGTERM)
    log = PROSODYS_OWN.sub("", made.log)
    assert "error" not in log, log
    assert "traceback" not in log, log


# Prosody 0.12 stumbles over a connection that closed before its turn, and goes on.
PROSODYS_OWN = re.compile(
    r"[^\n]*Top-level error, please report:\s+"
    r"[^\n]*server_epoll\.lua:\d+: attempt to index a nil value \(field 'conn'\)\n"
    r"(?:[^\n]*general\s+error\s*)?(?:stack traceback:[^\n]*\n(?:\t[^\n]*\n)*)?"
)

ANN, BOB, CAT, DAN = 1, 2, 3, 4
TEXTS = (
    "hi", 'two\nlines,\ta tab, <b>&amp;</b> & "quotes" \'too\' ]]>',
    "Größe 😀 مرحبا \u2028 \u0301", "x" * 4000, "😀" * 4000, " spaces  kept ",
    "ends\r\nof\rlines \ufffe\uffff",
)  # fmt: skip


async def test_a_chat_moves_while_both_servers_run(
    server: ServerProcess, prosody: Prosody
) -> None:
    (server.home / "backend.key").write_bytes(KEY + b"\n")
    async with server.serving(f"--jwt-key={server.home / 'backend.key'}"):
        # Two people have one name.
        for user, name in {ANN: "Ann & <Co>", BOB: "Bob", CAT: "Bob"}.items():
            token = server.token(user, key=KEY, name=name)
            await server.want(200, "GET /api/v1/me", token)

        async def sign_in(user: int) -> XmppClient:
            return await XmppClient.sign_in(prosody, user, server.token(user, key=KEY))

        async def same_archives(client: XmppClient, *chats: int) -> None:
            for chat in chats:
                expected = entries_of(await server.history(chat, client.user))
                assert await client.archive(chat) == expected

        async def change(method: str, message: Frame, body: object = None) -> None:
            target = f"/api/v1/messages/{message['id']}"
            status = 204 if method == "DELETE" else 200
            await server.want(status, f"{method} {target}", server.service, body)

        group = await server.chat(ANN, BOB, CAT, title='Tea & <"cake">')
        body = {"direct": True, "member_ids": [ANN, BOB]}
        got = await server.want(201, "POST /api/v1/chats", server.service, body)
        direct = int(got["chat"]["id"])
        sent = [
            await server.post(chat, sender, text)
            for text in TEXTS
            for chat, sender in ((group, ANN), (direct, BOB), (group, CAT))
        ]
        await change("PATCH", sent[0], {"content": "edited"})
        await change("DELETE", sent[2])

        # The import
        mover = Mover(server, prosody)
        await mover.imports()
        ann = await sign_in(ANN)
        await same_archives(ann, group, direct)
        assert await ann.bookmarks() == {
            room(group): 'Tea & <"cake">',
            room(direct): None,
        }
        cat = await sign_in(CAT)
        assert (await cat.bookmarks()).keys() == {room(group)}
        with pytest.raises(Refused, match="forbidden"):
            await cat.archive(direct)
        rows = prosody.rows()
        await mover.imports()
        assert prosody.rows() == rows, "an import that is repeated changed something"
        assert "hi" not in {
            text for entry in await ann.archive(group) for text in entry
        }

        # Each member has a name of its own, and nobody else's.
        assert (await ann.join(group, "Bob")).get("type") == "error"
        assert (await ann.join(group, "Ann & <Co>")).get("type") is None
        assert (await cat.join(group, "Bob (u3)")).get("type") is None
        vcard = await cat.ask("get", f"u{ANN}@{DOMAIN}", '<vCard xmlns="vcard-temp"/>')
        assert vcard.findtext("*/{vcard-temp}FN") == "Ann & <Co>"

        # What happens next arrives live, once, however often the program is killed.
        for turn in range(3):
            with mover.following():
                first = await server.post(group, BOB, f"{turn} <first>")
                seen = await ann.sees(first["content"])
                assert seen.get("from") == f"{room(group)}/Bob"
                (stanza_id,) = seen.findall("{urn:xmpp:sid:0}stanza-id")
                assert stanza_id.get("id") == f"chatd-{first['id']}"
                for number in range(12):
                    await server.post(group, CAT, f"{turn} {number}")
                await ann.sees(f"{turn} {5 * turn}")
        await mover.catches_up()
        await ann.sees("2 11")
        await same_archives(ann, group, direct)
        texts = [m.findtext(BODY) for m in ann.live if m.find(BODY) is not None]
        assert texts == [
            text
            for turn in range(3)
            for text in (f"{turn} <first>", *(f"{turn} {n}" for n in range(12)))
        ]

        # Edits and deletions
        with mover.following():
            edited, deleted = await server.post(group, BOB, "a"), sent[3]
            await ann.sees("a")
            await change("PATCH", edited, {"content": "b"})
            corrected = await ann.sees("b")
            replace = corrected.find("{urn:xmpp:message-correct:0}replace")
            assert replace is not None
            assert replace.get("id") == f"chatd-{edited['id']}"
            await change("DELETE", deleted)
            retract = "{urn:xmpp:message-retract:1}retract"
            retracted = await ann.until(
                lambda message: message.find(retract) is not None
            )
            assert retracted.findtext(BODY) is None
            assert retracted.find(retract).get("id") == f"chatd-{deleted['id']}"  # type: ignore[union-attr]

            # Chats and members
            added = await server.chat(ANN, DAN)
            await server.post(added, DAN, "new chat")
            await server.want(
                200, f"PATCH /api/v1/chats/{group}", server.service, {"title": "Milk"}
            )
            target = f"DELETE /api/v1/chats/{group}/members/{CAT}"
            await server.want(204, target, server.service)
            await server.post(group, BOB, "without Cat")
            await ann.sees("without Cat")
        await mover.catches_up()
        names = {room(group): "Milk", room(direct): None, room(added): None}
        assert await ann.bookmarks() == names
        assert await cat.bookmarks() == {}
        with pytest.raises(Refused, match="forbidden"):
            await cat.archive(group)
        assert "without Cat" not in {m.findtext(BODY) for m in cat.live}
        await same_archives(ann, group, direct, added)

        await server.want(
            200, f"PATCH /api/v1/chats/{group}", server.service, {"title": "Coffee"}
        )
        await mover.catches_up()
        assert (await ann.bookmarks())[room(group)] == "Coffee"

        for user in (ANN, DAN):  # nobody is left
            target = f"DELETE /api/v1/chats/{added}/members/{user}"
            await server.want(204, target, server.service)
        await mover.catches_up()
        assert (await ann.bookmarks()).keys() == {room(group), room(direct)}

        # Prosody is killed, too.
        with mover.following():
            for number in range(20):
                await server.post(direct, BOB, f"{number}")
                if number == 10:
                    await trio.to_thread.run_sync(prosody.end, signal.SIGKILL)
                    await prosody.start()
        await mover.catches_up()
        rows = prosody.rows()
        assert len(rows) == len({row[:2] for row in rows})
        ann = await sign_in(ANN)
        await same_archives(ann, group, direct)

        # A last import finds that nothing is missing.
        await mover.imports()
        assert prosody.rows() == rows
        before = await server.history(group, ANN)

    # After the switch Prosody is on its own, and the backend makes chats there.
    (line,) = re.findall(r"(?s)-d '(\{.*?\})'", DOCUMENT)
    done = await trio.to_thread.run_sync(post, prosody, line)
    assert done == b"0 messages are new or changed\n"
    assert "c9001@" in str((await (await sign_in(6)).bookmarks()).keys())
    await ann.join(group, "Ann & <Co>")
    await ann.send(
        f'<message xmlns="jabber:client" type="groupchat" to="{room(group)}">'
        "<body>from a client</body></message>"
    )
    await ann.sees("from a client")
    archive = await ann.archive(group)
    assert archive[:-1] == entries_of(before)
    assert archive[-1][1::2] == (f"u{ANN}@{DOMAIN}", "from a client")


async def test_only_a_good_token_of_the_user_signs_in(
    server: ServerProcess, prosody: Prosody
) -> None:
    now = int(time.time())
    bad: list[dict[str, Any]] = [
        {"key": b"another key" * 4}, {"exp": now - 60}, {"exp": None},
        {"nbf": now + 60}, {"iat": now + 60}, {"sub": str(BOB)}, {"user_id": BOB},
    ]  # fmt: skip
    for claims in bad:
        token = server.token(ANN, **{"key": KEY, **claims})
        with pytest.raises(Refused, match="not-authorized"):
            await XmppClient.sign_in(prosody, ANN, token)
    for claims in ({}, {"sub": None, "user_id": ANN}):
        token = server.token(ANN, **{"key": KEY, **claims})
        await XmppClient.sign_in(prosody, ANN, token)


async def test_what_cannot_be_moved_is_said(
    server: ServerProcess, prosody: Prosody
) -> None:
    async with server.serving():
        mover = Mover(server, prosody)

        async def fails(call: int) -> str:
            done = await trio.run_process(
                mover.command(call), cwd=mover.home, capture_stderr=True, check=False
            )
            assert done.returncode == 1
            return done.stderr.decode()

        (mover.home / "everything.jsonl").write_text("")
        assert "begin with --import" in await fails(1)
        message = {"id": 9, "chat_id": 9, "sender_id": 9, "content": "hi"}
        line = json.dumps({"message": message})
        (mover.home / "everything.jsonl").write_text(line)
        assert "is not of the chatd at" in await fails(0)
        line = json.dumps({"message": {**message, "id": 0}})
        (mover.home / "everything.jsonl").write_text(line)
        assert "422: " in (said := await fails(0)), said
        assert "no room c9" in said
        (mover.home / "import.secret").write_bytes(b"wrong")
        assert "401" in await fails(0)
        assert not (mover.home / "to_prosody.cursor").exists()
        (mover.home / "to_prosody.cursor").write_text("another.5")
        assert "restored from a backup" in await fails(1)
    assert prosody.log.count("a request failed: ") == 1
    (prosody.home / "prosody.log").write_text("")
