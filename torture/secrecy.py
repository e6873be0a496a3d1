"""No token, secret or message text is in any log, error, metric or stats document.

All tokens and texts of all proofs carry a mark. This proof sends marks to a server with
the log level debug, and to a proxy in front of it, in every place where they do not
belong: in methods, paths, headers, frames, close reasons and bodies, and also while the
disk fails. Then it searches the logs, metrics, stats documents and error answers of all
servers of the run for the mark, in clear and in base64, and for anything that looks
like a token.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import trio
from faults import File, Op, Shim
from harness import (
    BINARY,
    CLOSE,
    DISCONNECTED,
    MARK,
    PING,
    TEXT,
    Chatd,
    Client,
    Figures,
    Http,
    Proxy,
    client_frame,
    evidence_folder,
    http,
    revoke,
    run_trio,
    save_evidence,
    text,
)

NAMES = re.compile(rb'"(?:ref|client_id)": ?"(?:[^"\\\\]|\\\\.)*"')
KINDS = ("log", "error", "stats", "metrics")


def patterns() -> list[re.Pattern[bytes]]:
    """The patterns that no evidence may contain."""
    marks = [MARK.encode()]
    for shift in range(3):  # the mark in base64, at each place that it can have
        encoded = base64.urlsafe_b64encode(b"x" * shift + MARK.encode())
        marks.append(encoded[4 if shift else 0 : -4])
    words = [re.compile(re.escape(mark)) for mark in marks]
    # Every JSON object in base64 begins with eyJ. A JWT has three parts with dots.
    return [*words, re.compile(rb"eyJ[\w-]{8}"), re.compile(rb"([\w-]{16,}\.){2}[\w-]")]


def search(files: list[Path]) -> Iterator[str]:
    """Find the patterns: a sentence for each place, without the secret."""
    for file in files:
        data = file.read_bytes()
        if file.suffix == ".error":  # an error repeats what names the command
            data = NAMES.sub(b"", data)
        for pattern in patterns():
            for match in pattern.finditer(data):
                line = data[: match.start()].count(b"\n") + 1
                before, what = data[: match.start()][-60:], pattern.pattern
                yield f"{file.name}, line {line}, behind {before!r}: {what!r}"


async def send_raw(chatd: Chatd, data: bytes) -> None:
    """Send bytes, read the answer, and save it as evidence if it is an error."""
    with contextlib.suppress(*DISCONNECTED), trio.move_on_after(10):
        stream = await trio.open_tcp_stream("127.0.0.1", chatd.port)
        async with stream:
            await stream.send_all(data)
            await stream.send_eof()
            answer = b""
            while more := await stream.receive_some(65536):
                answer += more
            # A good answer may have messages that were asked for, or a ticket.
            if not answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 101")):
                save_evidence("error", answer)


def bad_requests(token: str, host: str) -> Iterator[bytes]:
    """Requests with a token or a mark where none belongs."""

    def request(line: str, *headers: str, body: str = "") -> bytes:
        length = [f"Content-Length: {len(body)}"] if body else []
        lines = [line, f"Host: {host}", *headers, *length, "", body]
        return "\r\n".join(lines).encode("utf-8", "surrogateescape")

    bearer = f"Authorization: Bearer {token}"
    upgrade = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
    key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
    post = "POST /api/v1/chats/1/messages HTTP/1.1"
    make = "POST /api/v1/chats HTTP/1.1"
    edit, join = "PATCH /api/v1/messages/1 HTTP/1.1", "POST /api/v1/join HTTP/1.1"
    socket = f"GET /ws/chat?token={token}"
    yield from (
        request(f"{token} / HTTP/1.1"),
        request(f"GET /{token} HTTP/1.1"),
        request(f"GET //{token} HTTP/1.1"),
        request(f"GET http://{token}/ HTTP/1.1"),
        request(f"GET /api/v1/me?{token} HTTP/1.1"),
        request(f"GET / HTTP/{token}"),
        request(f"GET /a b{token} HTTP/1.1"),
        request(f"GET /\x00{token} HTTP/1.1"),
        request("GET / HTTP/1.1", f"Bad Header {token}: x"),
        request("GET / HTTP/1.1", f"{token}"),
        request("GET / HTTP/1.1", f"X: \x00{token}"),
        request("GET / HTTP/1.1", f"Content-Length: {token}"),
        request("GET / HTTP/1.1", f"Transfer-Encoding: {token}"),
        request("GET / HTTP/1.1", f"Host: {token}"),
        request("GET /ws/chat HTTP/1.1", *upgrade, key, f"Origin: http://{token}"),
        request(f"{socket} HTTP/1.1", *upgrade, f"Sec-WebSocket-Key: {token}"),
        request(f"{socket}x HTTP/1.1", *upgrade, key),
        request(f"{socket}&token={token} HTTP/1.1", *upgrade, key),
        request(f"{socket}&cursor={MARK}&cursor={MARK} HTTP/1.1", *upgrade, key),
        request(f"{socket} HTTP/1.1", *upgrade, key, f"Connection: {token}\udcff"),
        request(f"{socket} HTTP/1.1"),
        request(f"{socket} HTTP/1.0", *upgrade, key),
        request("GET /api/v1/me HTTP/1.1", f"Authorization: {token}"),
        request("GET /api/v1/me HTTP/1.1", f"Authorization: Bearer x{token}"),
        request("GET /api/v1/me HTTP/1.1", f"Authorization: Bearer {token}x"),
        request("GET /api/v1/me HTTP/1.1", f"Authorization: Bearer {token * 20}"),
        request("GET /metrics HTTP/1.1", bearer),
        request(f"GET /api/v1/events?cursor={MARK}&limit={MARK} HTTP/1.1", bearer),
        request(f"GET /api/v1/chats/1/messages?before={MARK} HTTP/1.1", bearer),
        request(f"GET /api/v1/chats/{MARK}/messages HTTP/1.1", bearer),
        request(f"{MARK} /api/v1/me HTTP/1.1", bearer),
        request(post, bearer, body=f'{{"content": "{MARK}'),
        request(post, bearer, body=f'{{"content": 5, "{MARK}": 1}}'),
        request(post, bearer, body=f'{{"content": "\\u0000{MARK}"}}'),
        request(post, bearer, body=f'{{"content": "{MARK * 500}"}}'),
        request(post, bearer, body=f'{{"content": "x", "client_id": "\u20ac{MARK}"}}'),
        request(post, bearer, f"Idempotency-Key: {MARK}\t", body='{"content": "x"}'),
        request(post, bearer, body=f'{{"content": "{MARK}", "sender_id": 77}}'),
        request(post, bearer, body=f"{MARK}" * 20000),
        request(make, bearer, body=f'{{"title": "\\n{MARK}"}}'),
        request(make, bearer, body=f'{{"member_ids": "{MARK}"}}'),
        request("POST /api/v1/session HTTP/1.1", bearer, body=token),
        request(edit, bearer, body=f'{{"content": "{MARK}'),
        request(edit, bearer, body=f'{{"content": "\\u0000{MARK}"}}'),
        request(edit, bearer, body=f'{{"content": "{MARK}", "if_rev": 1}}'),
        request(edit, bearer, body=f'{{"content": "{MARK}", "if_rev": "{MARK}"}}'),
        request(f"PATCH /api/v1/messages/{MARK} HTTP/1.1", bearer, body="{}"),
        request(f"DELETE /api/v1/messages/{MARK} HTTP/1.1", bearer),
        request(f"GET /api/v1/search?q={MARK}%00 HTTP/1.1", bearer),
        request(f"GET /api/v1/search?q={MARK}&chat_id={MARK} HTTP/1.1", bearer),
        request(f"GET /api/v1/search?q={MARK * 30} HTTP/1.1", bearer),
        request(f"GET /api/v1/search?{MARK} HTTP/1.1", bearer),
        request(f"GET /api/v1/chats?limit=1&before={MARK} HTTP/1.1", bearer),
        request(f"GET /api/v1/chats/1/members?ids={MARK} HTTP/1.1", bearer),
        request(
            "PATCH /api/v1/chats/1 HTTP/1.1", bearer, body=f'{{"title": "\n{MARK}"}}'
        ),
        request("PATCH /api/v1/me HTTP/1.1", bearer, body=f'{{"name": ["{MARK}"]}}'),
        request(join, body=f'{{"token": "{token}", "name": "{MARK}"}}'),
        request(join, body=f'{{"token": "{MARK}", "name": "{MARK}"}}'),
        request(join, f"Authorization: Bearer {token}x", body=f'{{"token": "{MARK}"}}'),
        request(f"GET /api/v1/internal/chat/events?cursor={MARK} HTTP/1.1", bearer),
        request("POST /api/v1/internal/chat/forget HTTP/1.1", bearer, body=token),
        request("POST /api/v1/internal/chat/revoke HTTP/1.1", bearer, body=token),
        f"{token}\r\n\r\n".encode(),
        token.encode() * 100,
        b"\x16\x03\x01" + token.encode(),
    )


def bad_frames(token: str, other: str) -> Iterator[bytes]:
    """Invalid frames of every kind, each with a mark."""
    send = {"type": "send_message", "chat_id": 1, "content": MARK}
    commands = (
        {"type": MARK},
        {"type": "typing", "chat_id": MARK, "is_typing": True},
        {"type": "typing", "chat_id": 1, "is_typing": MARK},
        {"type": "mark_read", "message_id": MARK},
        send | {"content": [MARK]},
        send | {"content": "\0" + MARK},
        send | {"content": MARK * 500},
        send | {"chat_id": 999},
        send | {"client_id": "€"},
        send | {"client_id": "same"},
        send | {"client_id": "same", "content": f"{MARK}2"},
        {"type": "edit_message", "message_id": 1, "content": f"{MARK}\0"},
        {"type": "edit_message", "message_id": MARK, "content": MARK},
        {"type": "edit_message", "message_id": 3, "content": MARK, "if_rev": MARK},
        {"type": "edit_message", "message_id": 999, "content": MARK},
        {"type": "edit_message", "message_id": 3, "content": f"{MARK} edited"},
        {"type": "delete_message", "message_id": MARK},
        {"type": "delete_message", "message_id": 999, MARK: MARK},
        {"type": "auth", "token": f"{token}x"},
        {"type": "auth", "token": f"x{token}"},
        {"type": "auth", "token": MARK},
        {"type": "auth", "token": 5, MARK: 5},
        {"type": "auth", "token": token},
        {"type": "ping", "ref": MARK * 20},
    )
    for command in commands:
        yield client_frame(TEXT, json.dumps(command).encode())
    yield client_frame(TEXT, f'{{"type": "{MARK}'.encode())
    yield client_frame(TEXT, f'"{MARK}"'.encode())
    yield client_frame(BINARY, MARK.encode())
    yield client_frame(PING, MARK.encode())
    # Each of these ends the socket.
    yield client_frame(TEXT, json.dumps({"type": "auth", "token": other}).encode())
    yield client_frame(TEXT, MARK.encode() + b"\xff")
    yield client_frame(TEXT, MARK.encode() * 20000)
    yield client_frame(PING, MARK.encode() * 20)
    yield client_frame(0x43, MARK.encode())
    yield client_frame(TEXT | 0x40, MARK.encode())
    yield client_frame(CLOSE, (4999).to_bytes(2, "big") + MARK.encode())
    yield client_frame(CLOSE, (1000).to_bytes(2, "big") + MARK.encode() + b"\xff")
    yield client_frame(CLOSE, (999).to_bytes(2, "big") + MARK.encode())


async def make_noise(chatd: Chatd) -> int:
    """Send all invalid requests, frames and tokens; return how many."""
    body = {"title": f"chat {MARK}", "member_ids": [1, 2]}
    await http(chatd, "POST", "/api/v1/chats", chatd.service_token(), body)
    token, other = chatd.token(1, name=f"Anna {MARK}"), chatd.token(2)
    count = 0
    for data in bad_requests(token, f"127.0.0.1:{chatd.port}"):
        await send_raw(chatd, data)
        count += 1
    for data in bad_frames(token, other):
        with contextlib.suppress(*DISCONNECTED):
            async with Client(chatd, 1, token=token) as client:
                assert client.websocket is not None
                await client.websocket.send(data)
                await client.ask("ping", 10)
        count += 1
    bad_tokens = (f"{token}x", token[:-4], chatd.token(1, -60), chatd.token(0), MARK)
    for bad in bad_tokens:
        with contextlib.suppress(*DISCONNECTED):
            await Client(chatd, 1, token=bad).connect()
        await http(chatd, "GET", "/api/v1/me", bad)
        count += 1
    return count


async def use_failing_disk(chatd: Chatd, shim: Shim) -> None:
    """Send over a socket and HTTP while the disk fails; then revoke a user."""
    async with Client(chatd, 1, token=chatd.token(1)) as client:
        for op, error in ((Op.WRITE, errno.ENOSPC), (Op.SYNC, errno.EIO)):
            shim.arm(op, File.ALL, error, times=1)
            await client.send(1, text("on a failing disk"))
            for _ in range(100):
                frame = await client.receive()
                if frame["type"] == "ack":
                    break
                if frame["type"] == "error":
                    await trio.sleep(0.3)
                    await client.repeat()
            connection = Http(chatd)
            await connection.request(
                "POST", "/api/v1/chats/1/messages", chatd.token(2), {"content": text()}
            )
            await connection.aclose()
            shim.disarm()
    await revoke(chatd, 2)


def run_failing_commands(chatd: Chatd) -> int:
    """Run commands that fail on files with secrets; save their output as evidence."""
    short, pem = chatd.folder / "short", chatd.folder / "pem"
    short.write_text(MARK)
    short.chmod(0o600)
    pem.write_text(
        f"-----BEGIN PUBLIC KEY-----\n{MARK * 9}\n-----END PUBLIC KEY-----\n"
    )
    db = f"--db={chatd.db}"
    commands = (
        ("serve", f"--secret-file={short}"),
        ("serve", f"--db={short}"),
        ("serve", db),  # the running server has locked it
        ("token", "1", f"--secret-file={short}"),
        ("serve", f"--jwt-key={pem}", f"--db={chatd.folder / 'other.db'}"),
        ("serve", f"--jwt-key={short}", f"--db={chatd.folder / 'other.db'}"),
        ("check", f"--db={short}"),
        ("restore", str(short), db),
        ("check", db),
        ("export", f"--db={short}"),
        ("export", db, "--user=999"),
        ("export", db, "--chat=999"),
    )
    for command in commands:
        done = subprocess.run(
            chatd.command(*command), capture_output=True, timeout=60, check=False
        )
        save_evidence("error", done.stdout + done.stderr)
    return len(commands)


def prove(full: bool) -> Figures:
    """Send marks to servers; then search all evidence of this run."""
    count = 0
    for level in ("debug", "info") if full else ("debug",):
        chatd = Chatd("--invites=on", log_level=level)
        shim = Shim(chatd.folder)
        chatd.env = shim.env
        with chatd:
            count += run_trio(make_noise, chatd)
            with Proxy(chatd, level) as proxy:
                count += run_trio(make_noise, proxy)
                chatd.kill()
                count += run_trio(make_noise, proxy)  # without its upstream
                chatd.start()
            run_trio(use_failing_disk, chatd, shim)
            count += run_failing_commands(chatd)
        shim.remove()
    planted = evidence_folder() / f"{os.getpid()}.planted"
    with Chatd() as chatd:
        planted.write_text(f"joined {chatd.token(1)}\nsaid {text()}\n")
    finds = {find.rpartition(":")[2] for find in search([planted])}
    planted.unlink()
    assert len(finds) >= 3, f"the search missed planted secrets: {finds}"
    files = [f for f in evidence_folder().iterdir() if f.suffix[1:] in KINDS]
    for kind in KINDS:
        assert any(file.suffix == f".{kind}" for file in files), f"no {kind} was saved"
    found = list(search(files))
    assert not found, f"{len(found)} secrets were found, the first: {found[0]}"
    size = sum(file.stat().st_size for file in files)
    return Figures(
        "no token, secret or message text is in any log (level debug), error, metric "
        "or stats document",
        f"0 in {size / 2**20:.1f} MiB of logs, metrics and error answers of all "
        f"servers of this run, with {count} attempts to place one there",
        {"attempts": count, "files": len(files), "bytes": size},
    )
