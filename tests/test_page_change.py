"""The page: the menu of a message, editing, deleting and undoing."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.browser import (
    FIXTURES,
    UNHURRIED,
    Chromium,
    Locator,
    Page,
    Relay,
    Server,
    WebSocketRoute,
    bubbles,
    come_back,
    expect,
    expect_state,
    field,
    open_chat,
    pair,
    screenshot,
    sign_in,
    ticks,
    until,
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
    context.add_init_script(UNHURRIED)
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


def test_all_of_it_works_with_the_keyboard_alone(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    for sender, text in ((ben, "From Ben"), (anna, "One"), (anna, "Two")):
        server.post(chat, sender, text)
    context = chromium.context()
    context.add_init_script(UNHURRIED)
    annas = sign_in(context, server.link(anna), chat)
    expect(bubbles(annas)).to_have_count(3)
    press = annas.keyboard.press
    focused = annas.locator(":focus")
    press("Shift+Tab")
    expect(annas.get_by_role("log", name="Ben")).to_be_focused()
    press("ArrowUp")
    expect(row(annas, "Two").get_by_role("button", name="Actions")).to_be_focused()
    expect(focused).to_have_css("opacity", "1")
    assert focused.evaluate("(e) => getComputedStyle(e).outlineWidth") != "0px"
    expect(focused).to_have_accessible_description(re.compile("You: Two"))
    press("ArrowUp")
    press("ArrowUp")
    expect(row(annas, "From Ben").get_by_role("button")).to_be_focused()
    press("ArrowDown")
    press("Enter")
    expect(annas.get_by_role("menuitem", name="Copy")).to_be_focused()
    for key, name in (
        ("ArrowDown", "Edit"), ("ArrowUp", "Copy"),
        ("ArrowUp", "Delete"), ("ArrowDown", "Copy"),
    ):  # fmt: skip
        press(key)
        expect(annas.get_by_role("menuitem", name=name)).to_be_focused()
    # The row is drawn anew when Ben has read it. The menu stays.
    bens = sign_in(chromium.context(), server.link(ben), chat)
    expect(ticks(annas)).to_have_text(["Read"] * 2)
    expect(annas.get_by_role("menuitem", name="Copy")).to_be_focused()
    press("Escape")
    expect(annas.get_by_role("menu")).to_be_hidden()
    expect(row(annas, "One").get_by_role("button", name="Actions")).to_be_focused()
    press("Enter")
    press("ArrowUp")
    press("Enter")
    expect(annas.get_by_role("button", name="Undo")).to_be_focused()
    press("Enter")
    expect(bubbles(annas).nth(1)).to_have_text("One")
    expect(row(annas, "One").get_by_role("button", name="Actions")).to_be_focused()
    press("Tab")
    expect(field(annas)).to_be_focused()
    press("ArrowUp")
    expect(field(annas)).to_have_value("Two")
    annas.keyboard.type("!")
    press("Escape")
    assert annas.evaluate("location.hash") == f"#chat/{chat}"  # it stays open
    expect(field(annas)).to_have_value("")
    press("ArrowUp")
    expect(field(annas)).to_have_value("Two")
    press("Enter")  # nothing has changed
    expect(annas.locator("#edit-bar")).to_be_hidden()
    press("ArrowUp")
    annas.keyboard.type(" or three")
    press("Enter")
    expect(bubbles(bens).last).to_have_text("Two or three")
    press("ArrowUp")
    press("Control+A")
    press("Delete")
    press("Enter")
    question = annas.get_by_role("dialog", name="Delete this message?")
    expect(question).to_be_visible()
    press("Escape")
    expect(question).to_be_hidden()
    expect(annas.locator("#edit-bar")).to_be_visible()
    press("Enter")
    annas.get_by_role("button", name="Delete").press("Enter")
    expect(bubbles(annas).last).to_have_text("Message deleted")
    expect(field(annas)).to_be_focused()
    press("Shift+Tab")
    expect(annas.get_by_role("button", name="Undo")).to_be_focused()
    # Ben deletes a message while Anna has its menu open.
    press("Shift+Tab")
    expect(annas.locator("#scroller")).to_be_focused()
    press("ArrowUp")
    press("ArrowUp")
    press("Enter")
    expect(annas.get_by_role("menu")).to_be_visible()
    act(bens, "From Ben", "Delete")
    bens.reload()  # the deletion does not wait longer than the page
    expect(bubbles(annas).first).to_have_text("Message deleted")
    expect(annas.get_by_role("menu")).to_be_hidden()
    expect(annas.locator("#scroller")).to_be_focused()


def test_a_long_touch_opens_the_menu(server: Server, chromium: Chromium) -> None:
    anna, _, chat = pair(server)
    for i in range(20):
        server.post(chat, anna, f"Message {i} of 20.")
    server.post(chat, anna, "Mine, with so much to say. " * 9)
    phone = {"viewport": {"width": 390, "height": 700}, "has_touch": True}
    context = chromium.context(**phone, is_mobile=True)
    context.add_init_script(UNHURRIED)
    page = sign_in(context, server.link(anna), chat)
    expect(bubbles(page)).to_have_count(21)
    menu = page.get_by_role("menu")
    session = page.context.new_cdp_session(page)

    def touch(kind: str, x: float = 0, y: float = 0) -> None:
        points = [] if kind == "touchEnd" else [{"x": x, "y": y}]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def middle(text: str) -> tuple[float, float]:
        bubble = row(page, text).locator(".bubble")
        expect(bubble).to_be_in_viewport()  # the page has scrolled to its end
        place = bubble.bounding_box()
        assert place is not None
        return place["x"] + 30, place["y"] + place["height"] - 12

    x, y = middle("Mine")
    touch("touchStart", x, y)
    expect(menu).to_be_visible()
    touch("touchEnd")
    items = ["Copy", "Edit", "Who has read it", "Delete"]
    expect(menu.get_by_role("menuitem")).to_have_text(items)
    place = menu.bounding_box()
    assert place is not None
    assert 8 <= place["x"] <= 382 - place["width"]
    assert 8 <= place["y"] <= 692 - place["height"]
    # The finger was over an item, and that did not choose it.
    assert place["x"] < x < place["x"] + place["width"]
    assert place["y"] < y < place["y"] + place["height"]
    screenshot(page, "phone-menu")
    page.get_by_role("menuitem", name="Delete").tap()
    page.get_by_role("button", name="Undo").tap()
    expect(row(page, "Mine")).to_be_visible()
    x, y = middle("Mine")
    touch("touchStart", x + 270, y)  # beside the menu
    page.get_by_role("menuitem", name="Edit").wait_for()
    touch("touchEnd")
    page.get_by_role("menuitem", name="Edit").tap()
    expect(field(page)).to_be_focused()
    screenshot(page, "phone-edit")
    page.get_by_role("button", name="Cancel").tap()
    expect(field(page)).to_have_value("")
    # A finger that scrolls opens no menu.
    page.clock.install()
    page.reload()
    x, y = middle("Message 17 of")
    touch("touchStart", x, y)
    touch("touchMove", x, y + 100)  # a busy browser may drop the second move
    touch("touchMove", x, y + 200)
    end = "scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop"
    until(lambda: bool(page.evaluate(end) > 50))
    page.clock.run_for(2_000)
    expect(menu).to_be_hidden()
    touch("touchEnd")


def test_changes_made_offline_wait_across_a_reload(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    for text in ("Old text", "Remove me", "Keep me"):
        server.post(chat, anna, text)
    bens = sign_in(chromium.context(), server.link(ben), chat)
    page = chromium.page(clock=True)
    relay = Relay.connected(page, server.link(anna), chat)
    expect(ticks(page)).to_have_text(["Read"] * 3)
    page.route(re.compile("/api/v1/messages/"), lambda route: route.abort())
    relay.cut(1011, block=True)
    last = page.locator("#chat-list .row-last")
    act(page, "Old text", "Edit")
    write(page, "New text")
    expect(bubbles(page).first).to_have_text("New text")
    expect(ticks(page)).to_have_text(["Sending", "Read", "Read"])
    expect(last).to_have_text("SendingYou: New text")
    act(page, "Remove me", "Delete")
    expect(page.get_by_role("button", name="Undo")).to_be_visible()
    page.clock.run_for(5_000)
    expect(page.get_by_role("button", name="Undo")).to_be_hidden()
    expect(ticks(page)).to_have_text(["Sending", "Sending", "Read"])
    act(page, "Keep me", "Delete")
    page.get_by_role("button", name="Undo").click()
    page.clock.run_for(6_000)
    page.reload()
    expect(ticks(page)).to_have_text(["Sending", "Sending", "Read"])
    expect(bubbles(page)).to_have_text(["New text", "Message deleted", "Keep me"])
    expect(bubbles(bens)).to_have_text(["Old text", "Remove me", "Keep me"])
    come_back(page, relay)
    expect(bubbles(bens)).to_have_text(["New text", "Message deleted", "Keep me"])
    expect(ticks(page)).to_have_text(["Read"] * 3)
    expect(last).to_have_text("You: Keep me")


def test_a_stored_change_is_shown_before_its_event_comes(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    for text in ("Old text", "Remove me"):
        server.post(chat, anna, text)
    page = chromium.page(clock=True)
    events: list[str] = []
    sockets: list[WebSocketRoute] = []

    def hold_events(socket: WebSocketRoute) -> None:
        sockets.append(socket)
        upstream = socket.connect_to_server()
        socket.on_message(upstream.send)

        def receive(text: str | bytes) -> None:
            if json.loads(text)["type"] in ("message_edited", "message_deleted"):
                events.append(str(text))
            else:
                socket.send(text)

        upstream.on_message(receive)

    page.route_web_socket(re.compile("/ws/chat"), hold_events)
    page.goto(server.link(anna))
    expect(ticks(page)).to_have_text(["Sent"] * 2)
    act(page, "Old text", "Edit")
    write(page, "New text")
    until(lambda: bool(page.title()) and len(events) == 1)
    expect(ticks(page)).to_have_text(["Sent"] * 2)
    expect(bubbles(page)).to_have_text(["New text", "Remove me"])
    act(page, "New text", "Edit")
    expect(field(page)).to_have_value("New text")
    field(page).press("Escape")
    act(page, "Remove me", "Delete")
    page.clock.run_for(5_000)
    until(lambda: bool(page.title()) and len(events) == 2)
    expect(ticks(page)).to_have_text(["Sent"] * 2)
    expect(bubbles(page)).to_have_text(["New text", "Message deleted"])
    assert server.texts(chat, ben) == ["New text", ""]
    edited = page.locator("#messages .stamp").first
    expect(edited).not_to_contain_text("edited")
    sockets[0].send(events[0])
    expect(edited).to_contain_text("edited")


def test_a_deletion_over_http_is_shown_before_the_next_poll(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    server.post(chat, anna, "Remove me")
    page = chromium.page(clock=True)
    relay = Relay.connected(page, server.link(anna), chat)
    relay.cut(1011, block=True)
    page.clock.run_for(5_100)
    expect_state(page, "polling")
    act(page, "Remove me", "Delete")
    page.clock.run_for(5_000)
    until(lambda: bool(page.title()) and server.texts(chat, ben) == [""])
    page.route(re.compile("/api/v1/events"), lambda route: route.abort())

    def is_stored() -> bool:
        page.clock.run_for(20)
        return page.locator("#chat-list .is-sending").count() == 0

    until(is_stored)
    expect(bubbles(page)).to_have_text(["Message deleted"])


def test_an_unfinished_edit_is_kept(server: Server, chromium: Chromium) -> None:
    anna, ben, chat = pair(server)
    other = server.create_chat(anna, ben, title="Other")
    server.post(chat, anna, "Hello")
    page = sign_in(chromium.context(), server.link(anna), chat)
    expect(bubbles(page)).to_have_text(["Hello"])
    field(page).fill("A draft")
    act(page, "Hello", "Edit")
    field(page).fill("Hello, Be")
    open_chat(page, other)
    expect(page.locator("#edit-bar")).to_be_hidden()
    expect(field(page)).to_have_value("")
    open_chat(page, chat)
    expect(page.locator("#edit-bar")).to_be_visible()
    expect(field(page)).to_have_value("Hello, Be")
    page.reload()
    expect(field(page)).to_have_value("A draft")
    act(page, "Hello", "Edit")
    expect(field(page)).to_have_value("Hello, Be")
    write(page, "Hello, Ben")
    expect(bubbles(page)).to_have_text(["Hello, Ben"])
    expect(field(page)).to_have_value("A draft")
    act(page, "Hello, Ben", "Edit")
    expect(field(page)).to_have_value("Hello, Ben")


def test_a_refused_change_says_why_and_loses_no_text(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server("--edit-seconds", "0", "--max-content-chars", "20")
    anna, ben, chat = pair(server, title="Ours")
    group = server.request(
        "POST", "/api/v1/chats", {"title": "Anna's", "member_ids": [ben]}, user_id=anna
    )["chat"]["id"]
    ids = [server.post(chat, anna, text)["id"] for text in ("One", "Two", "Three")]
    server.post(group, ben, "A word")
    page = sign_in(chromium.context(), server.link(anna), group)
    # Its creator may delete in a group. What is too late is not offered.
    assert offered(page, "A word") == ["Copy", "Delete"]
    open_chat(page, chat)
    assert offered(page, "One") == ["Copy", "Who has read it"]
    field(page).press("ArrowUp")
    expect(field(page)).to_have_value("")
    # In the next part the time is over only when the change arrives.
    rules = {"edit_seconds": 86_400, "max_content_chars": 4_000}
    page.route(
        re.compile("/v1/me$"), lambda route: route.fulfill(json={"server": rules})
    )
    page.reload()
    expect_state(page, "connected")
    expect(bubbles(page)).to_have_count(3)
    failure = page.locator(".failure")
    act(page, "One", "Edit")
    write(page, "This is longer than twenty")
    expect(failure).to_contain_text("Not saved: Too long by 6:")
    page.reload()
    expect(failure).to_contain_text("Not saved: Too long by 6:")
    expect(bubbles(page).first).to_have_text("This is longer than twenty")
    last = page.locator(f"#chat-list [href='#chat/{chat}'] .row-last")
    expect(last).to_have_text("Not saved: This is longer than twenty")
    open_chat(page, group)
    page.reload()  # the message is not loaded
    expect(last).to_have_text("Not saved: This is longer than twenty")
    open_chat(page, chat)
    failure.get_by_role("button", name="Edit").click()
    expect(field(page)).to_have_value("This is longer than twenty")
    write(page, "One or two")
    expect(failure).to_have_text("Not saved: It is too old to be changed. CopyCancel")
    expect(bubbles(page).first).to_have_text("One or two")
    failure.get_by_role("button", name="Cancel").click()
    expect(bubbles(page)).to_have_text(["One", "Two", "Three"])
    act(page, "Two", "Delete")
    open_chat(page, group)
    expect(last).to_have_text("Not deleted: It is too old to be changed.")
    expect(page.locator(".toast")).to_contain_text("Not deleted: It is too old")
    open_chat(page, chat)
    expect(bubbles(page)).to_have_text(["One", "Two", "Three"])
    failure.get_by_role("button", name="Cancel").click()
    # It is changed or deleted by someone else during an edit.
    bar = page.locator("#edit-bar")
    act(page, "Three", "Edit")
    field(page).fill("Three or four")
    change = {"content": "Drei"}
    server.request("PATCH", f"/api/v1/messages/{ids[2]}", change)
    expect(bar).to_contain_text("It was changed meanwhile.")
    field(page).press("Enter")
    expect(failure).to_contain_text("Not saved: It was changed meanwhile.")
    failure.get_by_role("button", name="Edit").click()
    expect(bubbles(page).last).to_have_text("Drei")
    expect(field(page)).to_have_value("Three or four")
    server.request("DELETE", f"/api/v1/messages/{ids[2]}")
    expect(bar).to_contain_text("It was deleted meanwhile.")
    field(page).press("Enter")
    expect(failure).to_contain_text("Not saved: It was deleted meanwhile.")
    expect(bubbles(page).last).to_have_text("Three or four")
    assert offered(page, "Three or four") == ["Copy", "Who has read it"]
    failure.get_by_role("button", name="Cancel").click()
    expect(bubbles(page).last).to_have_text("Message deleted")
    open_chat(page, group)
    act(page, "A word", "Delete")
    open_chat(page, chat)
    until(lambda: server.texts(group, ben) == [""])


def test_an_old_draft_of_an_edit_replaces_no_newer_text(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    meeting = server.post(chat, anna, "Meet at 5")["id"]
    context = chromium.context()
    page = sign_in(context, server.link(anna), chat)
    act(page, "Meet at 5", "Edit")
    field(page).fill("Meet at 6")
    page.reload()
    expect(bubbles(page)).to_have_text("Meet at 5")
    other = sign_in(context, server.link(anna), chat)
    change = {"content": "Meet at 7"}
    server.request("PATCH", f"/api/v1/messages/{meeting}", change, user_id=anna)
    expect(bubbles(page)).to_have_text("Meet at 7")
    act(page, "Meet at 7", "Edit")
    expect(field(page)).to_have_value("Meet at 6")
    expect(page.locator("#edit-bar")).to_contain_text("It was changed meanwhile.")
    field(page).press("Enter")
    failure = page.locator(".failure")
    expect(failure).to_contain_text("Not saved: It was changed meanwhile.")
    assert server.texts(chat, ben) == ["Meet at 7"]
    failure.get_by_role("button", name="Cancel").click()
    # Two tabs edit a message: one saves, and the other keeps what it shows.
    for tab in (other, page):
        act(tab, "Meet at 7", "Edit")
    field(page).fill("Meet at 8")
    expect(field(other)).to_have_value("Meet at 8")
    field(page).press("Enter")
    expect(bubbles(other)).to_have_text("Meet at 8")
    expect(page.locator("#edit-bar")).to_be_hidden()
    expect(field(other)).to_have_value("Meet at 8")
    field(other).press("Enter")
    expect(other.locator("#edit-bar")).to_be_hidden()
    expect(other.locator(".failure")).to_have_count(0)


def test_a_refused_edit_comes_back_above_the_next_one(
    server: Server, chromium: Chromium
) -> None:
    anna, _, chat = pair(server)
    message = server.post(chat, anna, "Hello")
    page = chromium.page(clock=True)
    relay = Relay.connected(page, server.link(anna), chat)
    relay.cut(1011, block=True)
    path = f"/api/v1/messages/{message['id']}"
    page.route(re.compile("/api/v1/"), lambda route: route.abort())
    act(page, "Hello", "Edit")
    write(page, "First edit")
    server.request("PATCH", path, {"content": "From my phone"}, user_id=anna)
    act(page, "First edit", "Edit")
    field(page).fill("Second edit")
    come_back(page, relay)
    failure = page.locator(".failure")
    expect(failure).to_contain_text("It was changed meanwhile.")
    expect(field(page)).to_have_value("Second edit")
    failure.get_by_role("button", name="Edit").click()
    expect(field(page)).to_have_value("First edit\nSecond edit")


def test_what_is_undone_or_outdated_deletes_nothing(
    make_server: Callable[..., Server], chromium: Chromium, tmp_path: Path
) -> None:
    server = make_server()
    anna, ben, chat = pair(server)
    context = chromium.context()
    context.add_init_script(UNHURRIED)
    page = sign_in(context, server.link(anna), chat)
    write(page, "Kept")
    expect(ticks(page)).to_have_text(["Sent"])
    server.run("backup", tmp_path / "backup.db")
    write(page, "Lost")
    expect(ticks(page)).to_have_text(["Sent", "Sent"])
    act(page, "Lost", "Edit")
    field(page).fill("Lost or")
    act(page, "Lost", "Delete")
    expect(page.locator("#edit-bar")).to_be_hidden()
    page.get_by_role("button", name="Undo").click()
    act(page, "Lost", "Edit")
    expect(field(page)).to_have_value("Lost or")
    field(page).press("Escape")
    act(page, "Lost", "Delete")
    expect(page.get_by_role("button", name="Undo")).to_be_visible()
    server.end(signal.SIGKILL)
    server.run("restore", tmp_path / "backup.db")
    server.start()
    server.post(chat, ben, "While you were away")  # with the id of what is lost
    expect(bubbles(page)).to_have_text(["Kept", "While you were away"])
    page.evaluate("location.hash = '#chats'")
    expect(page.locator("#composer")).to_be_hidden()
    open_chat(page, chat)
    write(page, "After")  # it is sent after a deletion
    expect(ticks(page)).to_have_text(["Sent", "Sent"])
    assert server.texts(chat, ben) == ["Kept", "While you were away", "After"]


def test_a_text_whose_chat_is_gone_is_given_back(
    server: Server, chromium: Chromium
) -> None:
    anna, _, chat = pair(server, title="Ours")
    server.post(chat, anna, "Hello")
    context = chromium.context(permissions=["clipboard-read"])
    page = context.new_page()
    page.clock.install()
    relay = Relay.connected(page, server.link(anna), chat)
    page.route(re.compile("/api/"), lambda route: route.abort())
    relay.cut(1011, block=True)
    act(page, "Hello", "Edit")
    write(page, "Hello again")
    write(page, "A long letter")
    server.request("DELETE", f"/api/v1/chats/{chat}/members/{anna}")
    come_back(page, relay)
    question = page.get_by_role("dialog", name="Not saved: It no longer exists")
    expect(question).to_contain_text("Hello again")
    question.get_by_role("button", name="Cancel").click()
    question = page.get_by_role("dialog", name="Not sent: You are not allowed")
    expect(question).to_contain_text("A long letter")
    question.get_by_role("button", name="Copy").click()
    expect(page.get_by_text("Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "A long letter"
    expect(question).to_be_hidden()
    assert unsent_items(page) == []


def unsent_items(page: Page) -> list[str]:
    """The keys of what waits in storage."""
    keys: list[str] = page.evaluate(
        "Object.keys(localStorage).filter((key) => key.includes('unsent'))"
    )
    return keys


def test_a_text_is_given_back_also_if_its_chat_was_open(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server, title="Ours")
    server.create_chat(anna, ben, title="Other")
    page = sign_in(chromium.context(), server.link(anna), chat)
    text = "Too long. " * 500
    write(page, text)
    expect(page.locator(".failure")).to_be_visible()
    server.request("DELETE", f"/api/v1/chats/{chat}/members/{anna}")
    # The page closes the dialogs of the chat, and then asks once more.
    expect(page.locator("#composer")).to_be_hidden()
    question = page.get_by_role("dialog", name="Not sent")
    expect(question).to_contain_text(text.strip())
    # It may come up while the user is typing: a space does no harm.
    expect(question.get_by_role("button", name="Copy")).to_be_focused()
    # Another question takes its place for a while, and is no answer to it.
    page.goto(server.link(ben))
    other = page.get_by_role("dialog", name="Continue as Ben")
    other.get_by_role("button", name="Cancel").click()
    expect(other).to_be_hidden()
    expect(question).to_contain_text(text.strip())
    page.evaluate("location.hash = document.querySelector('#chat-list a').hash")
    expect(page.locator("#composer")).to_be_visible()
    page.go_back()  # which closes the dialogs of the chat
    expect(page.locator("#composer")).to_be_hidden()
    expect(question).to_contain_text(text.strip())
    question.get_by_role("button", name="Cancel").click()
    expect(question).to_be_hidden()
    page.reload()
    expect(page.locator("#chat-list .row")).to_have_count(1)
    expect(question).to_be_hidden()


def test_signing_out_asks_about_what_cannot_be_sent(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    server.post(chat, anna, "One")
    server.post(chat, anna, "Two")
    context = chromium.context()
    context.add_init_script(UNHURRIED)

    def sign_out(page: Page) -> None:
        page.locator("#me").click()
        page.locator("#sign-out").click()

    # What was just deleted is sent.
    page = sign_in(context, server.link(anna), chat)
    act(page, "One", "Delete")
    sign_out(page)
    expect(page.get_by_text("You are signed out.")).to_be_visible()
    assert server.texts(chat, ben) == ["", "Two"]
    # What another tab has written, too, also before the list of chats is there.
    tabs = [context.new_page(), context.new_page()]
    relays = [Relay.connected(tab, server.link(anna), chat) for tab in tabs]
    for tab, relay in zip(tabs, relays, strict=True):
        expect(bubbles(tab)).to_have_count(2)
        tab.route(re.compile("/api/"), lambda route: route.abort())
        relay.cut(1011, block=True)
    first, second = tabs
    write(second, "Precious")
    act(second, "Two", "Delete")
    question = first.get_by_role("dialog", name="Sign out")
    for _ in range(2):
        sign_out(first)
        expect(question).to_contain_text("Unsent messages will be lost: 1.")
        first.reload()
    sign_out(first)
    question.get_by_role("button", name="Sign out").click()
    expect(first.get_by_text("You are signed out.")).to_be_visible()
    expect(second.get_by_text("You signed out in another tab.")).to_be_visible()
    assert unsent_items(first) == []
