"""What the page consists of: its weight, what it requests, and its pictures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.browser import (
    FIXTURES,
    Chromium,
    Response,
    Server,
    bubbles,
    expect,
    expect_state,
    open_chat,
    pair,
    ticks,
    write,
)
from tests.client import CHECKOUT

pytestmark = pytest.mark.browser
site, server, make_server, browser, chromium, example_chats = FIXTURES

WEB = CHECKOUT / "web"
MOST_BYTES = 60_000  # of all files but icons, each compressed


def test_the_page_weighs_at_most_60_kb_without_its_icons() -> None:
    sizes = {
        file.name: len(
            subprocess.run(
                ["gzip", "-9", "-c", file], check=True, capture_output=True
            ).stdout
        )
        for file in sorted(WEB.iterdir())
        if file.suffix in (".html", ".css", ".js", ".webmanifest")
    }
    assert sum(sizes.values()) <= MOST_BYTES, sizes


def test_a_visit_requests_nothing_but_the_pages_own_files_and_the_api(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    server.post(chat, ben, "See https://example.org/ and www.example.com")
    context = chromium.context()
    asked: set[str] = set()
    failed: list[str] = []

    def look(response: Response) -> None:
        if response.status >= 400:
            failed.append(f"{response.status} {response.url}")

    context.on("request", lambda request: asked.add(request.url))
    context.on("response", look)
    page = context.new_page()
    page.on("websocket", lambda socket: asked.add(socket.url))
    page.goto(server.url)
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    page.goto(server.link(anna))
    expect_state(page, "connected")
    open_chat(page, chat)
    write(page, "Hello 👍 `code`")
    expect(ticks(page)).to_have_text("Sent")
    server.post(chat, ben, "Hello Anna")
    expect(bubbles(page)).to_have_count(3)
    for button in ("People in this chat", "Add people", "New chat"):
        page.get_by_role("button", name=button).first.click()
        if button != "People in this chat":
            expect(page.locator("dialog[open]")).to_be_visible()
            page.keyboard.press("Escape")
            expect(page.locator("dialog[open]")).to_have_count(0)
    page.locator("#me").click()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+k")  # search
    page.keyboard.type("anna")
    page.keyboard.press("Escape")
    page.wait_for_load_state("networkidle")
    assert failed == []
    host = urlsplit(server.url).netloc
    parts = [urlsplit(url) for url in asked]
    others = [part for part in parts if part.netloc != host and part.scheme != "data"]
    assert others == []
    paths = {part.path for part in parts if part.netloc == host}
    files = {f"/web/{file.name}" for file in WEB.iterdir()}
    rest = {path for path in paths - files if not path.startswith("/api/")}
    assert rest == {"/", "/ws/chat"}
    assert {"/web/app.js", "/web/style.css"} < paths


def test_the_pictures_of_the_page_can_be_taken_again(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "docs.screenshots", tmp_path], cwd=CHECKOUT, check=True
    )
    pictures = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert max(pictures.values()) <= 150_000, pictures
    texts = [CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md")]
    names = r"(?<=[/(\"])(?:page|phone)[a-z-]*\.png"
    shown = {
        name for file in texts for name in re.findall(names, file.read_text("utf-8"))
    }
    assert shown == pictures.keys()
    assert shown == {file.name for file in (CHECKOUT / "docs").glob("*.png")}
