"""The page of 1.0, which may be open in a tab while the server is upgraded."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import client
from tests.browser import (
    FIXTURES,
    Chromium,
    Page,
    Relay,
    Server,
    bubbles,
    expect,
    field,
    open_chat,
    pair,
    sign_in,
    ticks,
    write,
)
from tests.client import CHECKOUT

pytestmark = pytest.mark.browser
site, server, make_server, browser, chromium, example_chats = FIXTURES


WEB_1_0 = CHECKOUT / "tests/data/web-1.0"


@pytest.fixture
def server_1_0(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Server:
    """Today's server with the page of 1.0."""
    copy = tmp_path / "copy"
    shutil.copytree(CHECKOUT / "web", copy / "web")
    for file in WEB_1_0.iterdir():
        shutil.copy(file, copy / "web")
    for name in ("chatd.py", "schema.sql"):
        shutil.copy(CHECKOUT / name, copy)
    monkeypatch.setattr(client, "CHECKOUT", copy)
    return make_server()


def expect_state_1_0(page: Page, state: str) -> None:
    expect(page.locator("#link")).to_have_attribute("data-state", state)


def test_people_chat_with_the_page_of_1_0(
    server_1_0: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server_1_0)
    annas, bens = (
        sign_in(chromium.context(), server_1_0.link(user), chat) for user in (anna, ben)
    )
    assert annas.locator("#link").count() == 1  # it is the page of 1.0
    field(bens).press_sequentially("Hel")
    expect(annas.locator("#typing")).to_have_text("Ben is typing…")
    write(bens, "Hello")
    expect(bubbles(annas)).to_have_text(["Hello"])
    expect(ticks(bens)).to_have_text("Read")
    expect(annas.locator("#bell-count")).to_be_hidden()
    write(annas, "Hello, Ben")
    expect(bubbles(bens)).to_have_text(["Hello", "Hello, Ben"])
    assert server_1_0.texts(chat, anna) == ["Hello", "Hello, Ben"]
    zora = server_1_0.add_user("Zora")
    zoras = sign_in(chromium.context(), server_1_0.link(zora))
    annas.get_by_role("button", name="New chat").click()
    dialog = annas.get_by_role("dialog", name="New chat")
    dialog.get_by_label("Zora").check()
    dialog.get_by_label("Title").fill("Chess")
    dialog.get_by_role("button", name="Create").click()
    expect(annas.locator("#pane-title")).to_have_text("Chess")
    write(annas, "Welcome")
    expect(zoras.locator("#chat-list .row")).to_contain_text("Welcome")


def test_the_page_of_1_0_survives_a_restart(
    server_1_0: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server_1_0)
    page = sign_in(chromium.context(), server_1_0.link(anna), chat)
    write(page, "Before")
    expect(ticks(page)).to_have_text("Sent")
    server_1_0.end(signal.SIGTERM)
    write(page, "Meanwhile")
    expect(ticks(page)).to_have_text(["Sent", "Sending"])
    server_1_0.start()
    expect(ticks(page)).to_have_text(["Sent", "Sent"])
    server_1_0.post(chat, ben, "After")
    expect(bubbles(page)).to_have_text(["Before", "Meanwhile", "After"])


def test_the_page_of_1_0_polls_without_a_socket(
    server_1_0: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server_1_0)
    page = chromium.page(clock=True)
    relay = Relay(page)
    page.goto(server_1_0.link(anna))
    expect_state_1_0(page, "connected")
    open_chat(page, chat)
    relay.cut(1011, block=True)
    page.clock.run_for(5_100)
    expect_state_1_0(page, "polling")
    server_1_0.post(chat, ben, "By poll")
    page.clock.run_for(5_100)
    expect(bubbles(page)).to_have_text(["By poll"])
    write(page, "By HTTP")
    page.clock.run_for(5_100)
    expect(ticks(page)).to_have_text("Sent")
    assert server_1_0.texts(chat, anna) == ["By poll", "By HTTP"]


def test_the_page_of_1_0_ignores_new_events(
    server_1_0: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server_1_0)
    page = chromium.page()
    relay = Relay(page)
    page.goto(server_1_0.link(anna))
    expect_state_1_0(page, "connected")
    open_chat(page, chat)
    message = server_1_0.post(chat, ben, "Hello")
    expect(bubbles(page)).to_have_text(["Hello"])
    seq = max(frame.get("seq", 0) for frame in relay.received)
    edited = {**message, "content": "New", "edited_at": message["created_at"]}
    for event in (
        {"type": "message_edited", "message": edited},
        {"type": "message_deleted", "message": {**edited, "deleted": True}},
        {"type": "chat_renamed", "title": "Bicycle", "user_id": ben},
        {"type": "new_message", "message": {**message, "id": 9**9, "n": 2}},
    ):
        seq += 1
        relay.sockets[-1].send(json.dumps({**event, "seq": seq, "chat_id": chat}))
    expect(bubbles(page)).to_have_text(["Hello", "Hello"])  # the last one counts


def test_the_page_of_1_0_works_while_others_edit_and_delete(
    server_1_0: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server_1_0)
    page = sign_in(chromium.context(), server_1_0.link(anna), chat)
    edited, deleted = (server_1_0.post(chat, ben, text) for text in ("One", "Two"))
    expect(bubbles(page)).to_have_text(["One", "Two"])
    body = {"content": "New"}
    server_1_0.request(
        "PATCH", f"/api/v1/messages/{edited['id']}", body, user_id=ben, name="Ben"
    )
    server_1_0.request("DELETE", f"/api/v1/messages/{deleted['id']}", user_id=ben)
    write(page, "Three")
    expect(ticks(page)).to_have_text("Sent")
    page.reload()  # what it fetches now is new
    open_chat(page, chat)
    expect(bubbles(page).first).to_have_text("New")
    expect(bubbles(page).last).to_have_text("Three")
    expect(page.get_by_text("Two", exact=True)).to_have_count(0)
