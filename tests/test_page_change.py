"""The page: the menu of a message, editing, deleting and undoing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.browser import (
    FIXTURES,
    Chromium,
    Locator,
    Page,
    Relay,
    Server,
    axe,
    bubbles,
    expect,
    expect_state,
    field,
    open_chat,
    pair,
    screenshot,
    sign_in,
    ticks,
    until,
    wait_until_connected,
    write,
)

pytestmark = pytest.mark.browser
site, server, make_server, browser, chromium, example_chats = FIXTURES


def row(page: Page, text: str) -> Locator:
    return page.locator("#messages .message").filter(has_text=text)


def act(page: Page, text: str, action: str) -> None:
    """Choose an item of a message's menu with the mouse."""
    row(page, text).hover()
    row(page, text).get_by_role("button", name="Actions").click()
    page.get_by_role("menuitem", name=action).click()


def offered(page: Page, text: str) -> list[str]:
    row(page, text).hover()
    row(page, text).get_by_role("button", name="Actions").click()
    items = page.get_by_role("menuitem").all_inner_texts()
    page.keyboard.press("Escape")
    expect(page.get_by_role("menu")).to_be_hidden()
    return items


def test_two_people_see_what_is_edited_and_deleted(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    context = chromium.context(permissions=["clipboard-read"])
    annas = sign_in(context, server.link(anna), chat)
    bens = sign_in(chromium.context(), server.link(ben), chat)
    for text in ("See you at six", "Bring the key", "Forget this"):
        write(annas, text)
    expect(ticks(annas)).to_have_text(["Read"] * 3)
    field(annas).fill("A draft")
    act(annas, "See you at six", "Edit")
    bar = annas.locator("#edit-bar")
    expect(bar).to_contain_text("Editing a message")
    expect(field(annas)).to_have_value("See you at six")
    expect(field(annas)).to_be_focused()
    write(annas, "See you at seven")
    for page in (annas, bens):
        expect(bubbles(page).first).to_have_text("See you at seven")
        edited = page.locator(".stamp").first.get_by_text("edited")
        expect(edited).to_have_attribute("title", re.compile(r"20\d\d.*:\d\d"))
    expect(bar).to_be_hidden()
    expect(field(annas)).to_have_value("A draft")
    act(annas, "Forget this", "Delete")
    expect(bubbles(annas).last).to_have_text("Message deleted")
    expect(bubbles(bens).last).to_have_text("Forget this")
    annas.get_by_role("button", name="Undo").click()
    expect(bubbles(annas).last).to_have_text("Forget this")
    act(annas, "Forget this", "Delete")
    open_chat(annas, server.create_chat(anna, ben, title="Elsewhere"))
    expect(bubbles(bens).last).to_have_text("Message deleted")
    last = annas.locator(f"#chat-list [href='#chat/{chat}'] .row-last")
    expect(last).to_have_text("Draft: A draft")
    open_chat(annas, chat)
    expect(bubbles(annas).last).to_have_text("Message deleted")
    expect(row(annas, "Message deleted").get_by_role("button")).to_have_count(0)
    act(annas, "Bring the key", "Copy")
    expect(annas.locator(".toast")).to_have_text("Copied")
    assert annas.evaluate("navigator.clipboard.readText()") == "Bring the key"
    assert offered(bens, "Bring the key") == ["Copy"]  # it is not Ben's
