"""axe finds no fault in any state of the page, light or dark."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser import (
    FIXTURES,
    PHONE,
    STAY_AT_THE_LIST,
    UNHURRIED,
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
    screenshot,
    write,
)

pytestmark = pytest.mark.browser
site, server, make_server, browser, chromium, example_chats = FIXTURES

WIDE: Any = {"width": 1280, "height": 800}
LOOKS: dict[Any, Any] = {"dark": PHONE, "light": WIDE}
PEOPLE = ("Anna Petrova", "Ben Okafor", "Chiara Rossi", "Дмитрий", "Elif Yılmaz")
TEXTS = (
    "Who can bring the van? See www.example.com or write to van@example.com",
    "> Who can bring the van?\nI can: `van --at 9`, and **Ben** helps 🎉",
    "```python\nfor box in boxes:\n    carry(box)\n```",
    "👍🏽",
    "\n".join(f"{i}. box" for i in range(60)),
    "Nine is fine.",
)


@pytest.fixture(scope="module")
def inviting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that allows everything that the page can offer."""
    server = Server(tmp_path_factory.mktemp("inviting"), "--invites", "on")
    yield server
    server.end(signal.SIGTERM)


class Walk:
    """Leads a page from state to state, and lets axe look at each."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.count = 0

    def look(self, state: str, shown: Locator) -> None:
        """Wait for an element, and check the page: narrow and dark, wide and light."""
        expect(shown).to_be_visible()
        self.count += 1
        name = f"axe-{self.count:02}-{state.replace(' ', '-')}"
        for scheme, size in LOOKS.items():
            self.page.emulate_media(color_scheme=scheme)
            self.page.set_viewport_size(size)
            if state == "menu":  # a new size closes it
                self.act(shown)
            axe(self.page)
            screenshot(self.page, f"{name}-{scheme}")

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def escape(self) -> None:
        self.page.keyboard.press("Escape")
        expect(self.page.locator("dialog[open], :popover-open")).to_have_count(0)

    def act(self, row: Locator, action: str | None = None) -> None:
        """Open the menu of a message, and choose from it."""
        row.hover()
        row.get_by_role("button", name="Actions").click()
        if action:
            self.page.get_by_role("menuitem", name=action).click()


def open_page(chromium: Chromium) -> tuple[Page, Relay]:
    page = chromium.context(viewport=WIDE, reduced_motion="reduce").new_page()
    page.clock.install()
    return page, Relay(page)


def test_axe_finds_no_fault_in_what_a_newcomer_sees(
    inviting: Server, chromium: Chromium
) -> None:
    anna = inviting.add_user("Anna")
    body = {"title": "Chess club"}
    made = inviting.request("POST", "/api/v1/chats", body, user_id=anna)
    path = f"/api/v1/chats/{made['chat']['id']}/invites"
    invite = inviting.request("POST", path, {}, user_id=anna)["token"]
    page, _ = open_page(chromium)
    walk = Walk(page)
    page.goto(inviting.url)
    walk.press("Sign in")
    walk.look("sign-in", page.get_by_text("This is not a sign-in link"))
    page.goto(f"{inviting.url}/#invite={invite}")
    walk.press("Join the chat")
    walk.look("join", page.get_by_text("Choose a name"))
    page.get_by_label("Your name").fill("Zora")
    walk.press("Join the chat")
    walk.look("no messages", page.locator(".history"))
    page.get_by_role("button", name="People in this chat").click()
    walk.press("Leave chat")
    question = page.get_by_role("dialog", name="Leave")
    walk.look("leave", question)
    question.get_by_role("button", name="Leave chat").click()
    walk.look("no chats", page.get_by_text("No chats yet"))
    walk.press("Invite people")
    walk.press("Create")
    walk.look("nobody to add", page.get_by_text("Choose whom to add"))
    page.get_by_label("Title").fill("Draughts")
    walk.press("Create")
    walk.look("invitation", page.get_by_text("Anyone who has this link"))
    page.goto(inviting.link(anna))
    walk.look("another user", page.get_by_role("dialog", name="Continue as Anna"))


@pytest.fixture
def flat(inviting: Server) -> tuple[int, int, int, int]:
    """Make Anna and her chats. Return Anna, Ben, Anna's group and its own message."""
    anna, ben, chiara, *others = (inviting.add_user(name) for name in PEOPLE)
    other = inviting.create_chat(anna, ben, chiara, *others)  # now they may be added
    body = {"title": "Flat 12", "member_ids": [ben, chiara, *others]}
    made = inviting.request("POST", "/api/v1/chats", body, user_id=anna)
    chat: int = made["chat"]["id"]
    for i, text in enumerate(TEXTS):
        inviting.post(chat, (chiara, anna, ben)[i % 3], text)
    own: int = inviting.post(chat, anna, "Ring at “Petrova”")["id"]
    inviting.mark_read(own, chiara)
    gone = inviting.post(chat, ben, "I could come at eight")["id"]
    inviting.request("DELETE", f"/api/v1/messages/{gone}")
    inviting.post(chat, ben, "I could come at nine")
    inviting.post(other, chiara, "Ciao Anna!")
    return anna, ben, chat, own


def test_axe_finds_no_fault_in_any_state_of_a_chat(
    inviting: Server, chromium: Chromium, flat: tuple[int, int, int, int]
) -> None:
    anna, ben, chat, own = flat
    page, relay = open_page(chromium)
    page.add_init_script(STAY_AT_THE_LIST)
    page.goto(inviting.link(anna))
    expect_state(page, "connected")
    walk = Walk(page)
    dialog = page.locator("dialog[open]")
    walk.look("list", page.locator("#chat-list .badge").first)
    page.locator("#bell").click()
    walk.look("bell", page.locator("#bell-panel"))
    walk.escape()

    # Reading.
    open_chat(page, chat)
    expect(page.locator("#messages .divider")).to_be_visible()
    typing = {"type": "typing", "chat_id": chat, "user_id": ben, "is_typing": True}
    relay.sockets[0].send(json.dumps(typing))
    walk.look("chat", page.locator("#typing", has_text="is typing"))
    page.locator("#scroller").evaluate("(node) => { node.scrollTop = 0; }")
    walk.look("history", page.locator("#jump"))
    message = page.locator(f"#message-{own}")
    message.locator(".stamp").click()
    walk.look("readers", page.get_by_role("dialog", name="Who has read it"))
    walk.escape()
    page.keyboard.press("Control+k")
    page.keyboard.type("van")
    walk.look("search", page.locator("#search-list mark").first)
    page.keyboard.type("zzz")
    walk.look("nothing found", page.get_by_text("No messages found"))
    walk.escape()

    # Writing and changing.
    walk.look("menu", message)
    page.get_by_role("menuitem", name="Edit").click()
    change = {"content": "Ring twice"}
    inviting.request("PATCH", f"/api/v1/messages/{own}", change)
    walk.look("editing", page.get_by_text("It was changed meanwhile"))
    write(page, "Ring three times")
    walk.look("failed edit", page.locator(".failure"))
    walk.press("Cancel")
    field(page).fill("x" * 4_100)
    walk.look("counter", page.locator("#composer-count.over"))
    field(page).press("Enter")
    walk.look("failed message", page.locator(".failure"))

    # People and dialogs.
    page.get_by_role("button", name="People in this chat").click()
    expect(dialog.locator(".online").first).to_be_visible()
    dialog.get_by_label("Mute").check()
    walk.look("people", dialog)
    dialog.get_by_role("button", name="Remove Ben").click()
    walk.look("remove", page.get_by_role("dialog", name="Remove Ben"))
    walk.press("Cancel")
    walk.press("Rename")
    walk.look("rename", page.locator("#ask-input"))
    walk.press("Cancel")
    walk.press("Add people")
    walk.look("nobody is left", dialog)
    walk.escape()
    walk.press("New chat")
    dialog.get_by_role("checkbox", name="Ben").check()
    walk.look("new chat", dialog)
    walk.escape()
    page.locator("#me").click()
    walk.look("account", page.locator("#me-panel"))
    walk.press("Sign in on another device")
    walk.look("sign-in link", page.locator("#link"))
    walk.escape()
    page.keyboard.press("Control+k")
    walk.escape()
    page.locator("#scroller").focus()
    page.keyboard.press("?")
    walk.look("shortcuts", page.locator("#keys"))
    walk.escape()

    # No connection.
    page.route(re.compile("/api/"), lambda route: route.abort())
    relay.cut(1011, block=True)
    write(page, "From the tunnel")
    page.clock.run_for(5_100)
    expect_state(page, "offline")
    page.locator("#me").click()
    walk.press("Sign in on another device")
    expect(bubbles(page).last).to_have_text("From the tunnel")
    walk.look("offline", page.locator(".toast"))
    page.evaluate(UNHURRIED)
    walk.act(message, "Delete")
    walk.look("undo", page.get_by_role("button", name="Undo"))
