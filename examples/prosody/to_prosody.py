#!/usr/bin/env python3
"""Move a chat from chatd to Prosody while both run.

    chatd export > everything.jsonl
    to_prosody.py --import everything.jsonl    # what there is
    to_prosody.py                              # and what happens from then on

It needs Python 3.11 and nothing else; docs/moving.md is the whole way, with the
configuration of Prosody. mod_chatd_import.lua in Prosody takes lines of JSON as
`chatd export` prints them: a user, a chat or a message, as it is now. So the import
only passes lines on, and an event of the feed becomes the line of what it is about: a
message comes with its event, and a chat is asked for.

NOTHING IS LOST, AND NOTHING COMES TWICE

The ids of messages are positions in chatd's event log, and an export shows one moment.
So the largest id in it is a cursor: what is not in the export has happened after that.
The cursor is in to_prosody.cursor, and moves when Prosody has answered that all before
it is on disk. If this program is killed, or one of the servers, it sends some lines
again. Prosody finds that it has them already, and changes nothing.
"""

from __future__ import annotations

import argparse
import fcntl
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

# In the current folder.
TOKEN = Path("service.token")  # of chatd, with scope service
SECRET = Path("import.secret")  # of mod_chatd_import
CURSOR = Path("to_prosody.cursor")  # how far this program is

NET_SECONDS = 300  # for the next bytes: Prosody may have a chat of 5,000 to enter
RETRY_SECONDS = 60  # the longest wait after a failure
BATCH_BYTES = 65536  # sent to Prosody at once, which does nothing else meanwhile


class Problem(Exception):
    """Something that may be better the next time: a sentence."""


class Fatal(Exception):
    """Something that only the operator can put right: a sentence."""


def say(sentence: object) -> None:
    print("to_prosody:", *str(sentence).split(), file=sys.stderr, flush=True)


def ask(url: str, token_file: Path, data: bytes | None = None) -> bytes:
    """Send a request, and return the body of its answer. Raises Problem."""
    try:
        # Read each time, so that a new token needs no restart.
        headers = {"Authorization": f"Bearer {token_file.read_text().strip()}"}
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=NET_SECONDS) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            why = error.read(500).decode(errors="replace")
        raise Problem(f"{url} answers {error.code}: {why}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Problem(f"{url}: {error}") from None


def ask_chatd(options: argparse.Namespace, path: str, **query: object) -> Any:
    url = f"{options.chatd}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    return json.loads(ask(url, TOKEN))


def deliver(options: argparse.Namespace, lines: Iterable[str]) -> None:
    """Send lines to Prosody. Return when all of them are on its disk."""
    batch: list[bytes] = []
    size = 0
    for line in lines:
        batch.append(line.encode())
        size += len(batch[-1])
        if size >= BATCH_BYTES:
            ask(options.prosody, SECRET, b"\n".join(batch))
            batch, size = [], 0
    if batch:
        ask(options.prosody, SECRET, b"\n".join(batch))


def save_cursor(cursor: str) -> None:
    """Replace the file: after a crash it is the old one or the new one, whole."""
    partial = CURSOR.with_suffix(".partial")
    with partial.open("w") as file:
        file.write(cursor)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(CURSOR)


def import_export(options: argparse.Namespace) -> None:
    """Pass an export on, and save the cursor that it stands for."""
    seq = 0

    def lines(file: TextIO) -> Iterable[str]:
        nonlocal seq
        for line in file:
            message = json.loads(line).get("message", {})
            seq = max(seq, message.get("id", 0), message.get("rev", 0))
            if seq > int(newest):
                raise Fatal(f"{options.export} is not of the chatd at {options.chatd}")
            yield line.rstrip("\n")

    now = ask_chatd(options, "internal/chat/events")["cursor"]
    epoch, _, newest = now.partition(".")
    # Only \n ends a line: a text may have U+2028.
    with options.export.open(encoding="utf-8", newline="\n") as file:
        deliver(options, lines(file))
    save_cursor(f"{epoch}.{seq}")


def lines_of(options: argparse.Namespace, events: list[Any]) -> Iterable[str]:
    """Return what the events are about, as it is now: chats, then messages."""
    chats = {
        event["chat_id"]
        for event in events
        if event["type"].startswith(("chat_", "member_"))
    }
    for chat in sorted(chats):
        yield json.dumps({"chat": ask_chatd(options, f"chats/{chat}")["chat"]})
    messages = {
        event["message"]["id"]: event["message"]
        for event in events
        if event["type"] in {"new_message", "message_edited", "message_deleted"}
    }
    for message in messages.values():
        yield json.dumps({"message": message})


def follow(options: argparse.Namespace) -> bool:
    """Carry one page of the feed over. Return False if there is no more now."""
    try:
        cursor = CURSOR.read_text()
    except OSError as error:
        raise Fatal(f"{error}: begin with --import") from None
    page = ask_chatd(options, "internal/chat/events", cursor=cursor, limit=500)
    if page["resync"]:
        raise Fatal(
            "chatd was restored from a backup: empty Prosody's database, and begin "
            "again with --import"
        )
    deliver(options, lines_of(options, page["events"]))
    if page["cursor"] != cursor:
        save_cursor(page["cursor"])
    return bool(page["more"])


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Move a chat from chatd to Prosody while both run.",
        epilog="docs/moving.md is the whole way.",
    )
    add = parser.add_argument
    add(
        "--import",
        dest="export",
        type=Path,
        metavar="FILE",
        help="pass on what `chatd export` printed, and exit",
    )
    add(
        "--once",
        action="store_true",
        help="exit when everything that has happened so far is in Prosody",
    )
    add(
        "--chatd",
        default="http://127.0.0.1:8086",
        metavar="URL",
        help="default %(default)s",
    )
    add(
        "--prosody",
        default="http://127.0.0.1:5280/chatd_import",
        metavar="URL",
        help="default %(default)s",
    )
    add(
        "--every",
        type=float,
        default=1,
        metavar="SECONDS",
        help="how often to look at the feed (default %(default)s)",
    )
    return parser.parse_args()


def main() -> int:
    """Return the exit status: 0, or 1 after a sentence."""
    options = read_options()
    wait = options.every
    try:
        with CURSOR.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if options.export:
                import_export(options)
                return 0
            while True:
                try:
                    if follow(options):
                        continue
                    wait = options.every
                except Problem as problem:
                    say(problem)
                    wait = min(2 * max(wait, 1), RETRY_SECONDS)
                else:
                    if options.once:
                        return 0
                time.sleep(wait)
    except BlockingIOError:
        say(f"{CURSOR}: another to_prosody.py uses it")
    except (Fatal, Problem, OSError) as problem:
        say(problem)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
