"""Take the pictures of the page: a real server, messages of its API, and Chromium.

    .venv/bin/python -m docs.screenshots [FOLDER]     # without one: into docs/

The server runs twice. In between the messages get the times of three days in May, which
the browser's clock takes for now: so the pictures do not depend on when they are taken.
"""

from __future__ import annotations

import sqlite3
import sys
import tempfile
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Literal

from playwright.sync_api import Page, ViewportSize, expect, sync_playwright

from tests.browser import Server, bubbles, field, sign_in, ticks
from tests.client import CHROMIUM, WAIT_SECONDS, find_program

ZONE = "Europe/Berlin"
NOW = datetime(2026, 5, 21, 18, 24, tzinfo=timezone(timedelta(hours=2)))
SIZES: dict[str, ViewportSize] = {
    "page": {"width": 1120, "height": 660},
    "phone": {"width": 390, "height": 760},
}

NAMES = ("Anna Petrova", "Ben Okafor", "Chiara Rossi", "Dmitri Волков", "Elif Yılmaz")
ANNA, BEN, CHIARA, DMITRI, ELIF = range(5)
BICYCLE, FLAT, WITH_CHIARA, WITH_ELIF = range(4)
CHATS = (
    ("Bicycle, 54 cm, steel frame", (ANNA, BEN)),
    ("Flat 12 — moving day", (ANNA, BEN, CHIARA, DMITRI)),
    (None, (ANNA, CHIARA)),
    (None, (ANNA, ELIF)),
)
# How long ago, in which chat, by whom: and the text.
MESSAGES = (
    ("2d 5:10", WITH_ELIF, ANNA, "Here it is, take it with you."),
    ("2d 4:02", WITH_ELIF, ELIF, "Thanks for the lamp, it looks lovely in the hall"),
    ("1d 7:31", WITH_CHIARA, CHIARA, "Ciao Anna! Are you coming on Saturday?"),
    ("1d 7:24", WITH_CHIARA, ANNA, "Yes, with the cake 🍰"),
    ("1d 6:40", FLAT, DMITRI, "I can bring the van at nine."),
    ("1d 6:33", FLAT, ANNA, "> I can bring the van at nine.\nPerfect, we start then."),
    ("1d 6:29", FLAT, BEN, "The door code is `4711#`, second floor."),
    ("5:12", FLAT, CHIARA, "Books are packed, 14 boxes. Who has more of these?"),
    ("5:08", FLAT, DMITRI, "Me, a dozen. Привезу завтра."),
    ("1:40", BICYCLE, BEN, "Hi! Is the bicycle still for sale?"),
    ("1:22", BICYCLE, ANNA, "Yes, it is. I changed the chain in spring."),
    ("1:19", BICYCLE, BEN, "Great. Could you send me the address?"),
    ("1:18", BICYCLE, BEN, "I could come by on Thursday after six."),
    ("0:55", BICYCLE, ANNA, "Thursday is fine. Gartenstraße 12, ring at “Petrova”: "
     "https://www.openstreetmap.org/node/240109189"),
    ("0:54", BICYCLE, ANNA, "The rear light is missing, so it is 10 € less."),
    ("0:20", BICYCLE, BEN, "Perfect 👍"),
    ("0:12", FLAT, CHIARA, "I have the key. See you at nine!"),
    ("0:11", WITH_ELIF, ELIF, "Do you still need the boxes?"),
    ("0:02", BICYCLE, ANNA, "Then see you on Thursday!"),
)  # fmt: skip
READ = "0:15"  # What is older has been read.
EDITED = 14  # a message, by its place, that is sent with other words first


def unix_seconds(ago: str) -> int:
    """Return the time that was so long before NOW: "1d 2:30", or "2:30"."""
    days, _, clock = ago.rpartition("d ")
    hours, minutes = map(int, clock.split(":"))
    before = timedelta(days=int(days or 0), hours=hours, minutes=minutes)
    return int((NOW - before).timestamp())


def fill(server: Server) -> tuple[list[int], list[int]]:
    """Let the users talk. Returns their ids, and those of the chats."""
    users = [server.add_user(name) for name in NAMES]
    chats = [
        server.create_chat(*(users[one] for one in members), title=title)
        for title, members in CHATS
    ]
    times = []
    for place, (ago, chat, sender, text) in enumerate(MESSAGES):
        path = f"/api/v1/chats/{chats[chat]}/messages"
        body = {"content": "The rear light is gone." if place == EDITED else text}
        sent = server.request("POST", path, body, user_id=users[sender])["message"]
        times.append((unix_seconds(ago), sent["id"]))
        if place == EDITED:
            path = f"/api/v1/messages/{sent['id']}"
            server.request("PATCH", path, {"content": text}, user_id=users[sender])
        if times[-1][0] < unix_seconds(READ):
            for reader in CHATS[chat][1]:
                server.mark_read(sent["id"], users[reader])
    server.end(15)
    with sqlite3.connect(server.db) as db:
        db.executemany("UPDATE message SET created_at = ? WHERE id = ?", times)
        db.execute(
            """UPDATE change SET edited_at = 60 +
                   (SELECT created_at FROM message WHERE id = message_id)"""
        )
    db.close()
    server.start()
    return users, chats


def take(page: Page, file: Path) -> None:
    """Write the page's picture in light, and the one in dark beside it."""
    for path in (file, file.with_stem(f"{file.stem}-dark")):
        scheme: Literal["light", "dark"] = "light" if path == file else "dark"
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        page.screenshot(path=path)
        print(path)


def main(folder: Path) -> None:
    """Take all pictures."""
    expect.set_options(timeout=WAIT_SECONDS * 1000)
    path = find_program(CHROMIUM, "no Chromium: apt install chromium libatomic1")
    with (
        tempfile.TemporaryDirectory(prefix="chatd-pictures-") as home,
        sync_playwright() as playwright,
    ):
        server = Server(Path(home))
        users, chats = fill(server)
        browser = playwright.chromium.launch(executable_path=path)

        def visit(user: int, chat: int, size: str) -> Page:
            context = browser.new_context(
                viewport=SIZES[size], timezone_id=ZONE, locale="en-GB"
            )
            context.clock.set_fixed_time(NOW)
            return sign_in(context, server.link(users[user]), chats[chat])

        bens = visit(BEN, BICYCLE, "page")
        annas = visit(ANNA, BICYCLE, "page")
        expect(bubbles(annas)).to_have_count(8)
        expect(ticks(annas)).to_have_text(["Read"] * 4)
        field(bens).press_sequentially("Y")
        expect(annas.locator("#typing")).to_have_text("Ben Okafor is typing…")
        take(annas, folder / "page.png")
        phone = visit(ANNA, FLAT, "phone")
        expect(bubbles(phone)).to_have_count(6)
        take(phone, folder / "phone.png")
        browser.close()
        server.end(15)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
