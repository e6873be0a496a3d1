"""The page on a phone, from the keyboard, and what it shows outside of itself."""

from __future__ import annotations

import itertools
import json
import re
import struct
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin

import pytest

from tests.browser import (
    FIXTURES,
    PHONE,
    Chromium,
    Page,
    Relay,
    Route,
    Server,
    bubbles,
    expect,
    expect_state,
    field,
    go_offline,
    long_chat,
    open_chat,
    pair,
    screenshot,
    sign_in,
    unread,
    until,
    wait_until_connected,
    write,
)

pytestmark = pytest.mark.browser
site, server, make_server, browser, chromium, example_chats = FIXTURES
SCHEMES: list[Any] = ["light", "dark"]

# A browser that prints whether it was asked to allow notifications, what they say, and
# the badge of the installed app.
NOTIFICATIONS = """
    window.Notification = class extends EventTarget {
        static permission = "default";
        static async requestPermission() {
            console.log("asked");
            this.permission = "granted";
        }
        constructor(title) {
            super();
            console.log(`${this.constructor.permission}: ${title}`);
        }
    };
    navigator.setAppBadge = async (count) => console.log(`badge: ${count}`);
"""


def row(page: Page, chat: int) -> Any:
    return page.locator(f"#chat-list a[href='#chat/{chat}']")


# --- a phone -------------------------------------------------------------------------


def test_an_open_chat_has_one_bar_and_says_what_is_new_elsewhere(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = long_chat(server)
    other = server.create_chat(anna, ben, title="Other")
    context = chromium.context(viewport=PHONE, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.clock.install()
    relay = Relay.connected(page, server.link(anna))
    expect(page.locator(".top")).to_be_visible()
    open_chat_on_phone(page, chat)
    expect(page.locator(".top")).to_be_hidden()
    expect(page.get_by_role("heading", level=1)).to_have_text("Ben")
    back = page.locator(".back")
    expect(back).to_have_accessible_name("Back to all chats")
    server.post(other, ben, "Elsewhere")
    expect(back).to_have_accessible_name("Back to all chats, 1 new message")
    expect(page.locator("#back-count")).to_have_text("1")
    server.post(chat, ben, "Here")  # does not count: it is on the screen
    expect(bubbles(page).last).to_have_text("Here")
    expect(bubbles(page).last).to_be_in_viewport()
    expect(page.locator("#back-count")).to_have_text("1")
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        screenshot(page, f"one-bar-{scheme}")

    go_offline(page, relay)
    expect(page.locator("#banner")).to_be_in_viewport()
    expect(page.locator("#banner")).to_contain_text("No connection.")
    field(page).tap()
    for height in (450, 300):  # a keyboard that the page gives room to
        page.set_viewport_size({"width": 390, "height": height})
        expect(page.get_by_role("button", name="Send")).to_be_in_viewport(ratio=1)
        expect(bubbles(page).last).to_be_in_viewport()
    page.set_viewport_size(PHONE)
    page.evaluate(  # and one that covers the page, as on iOS
        """() => {
            Object.defineProperty(visualViewport, "height", { value: 420 });
            visualViewport.dispatchEvent(new Event("resize"));
        }"""
    )
    send = page.get_by_role("button", name="Send").bounding_box()
    assert send is not None
    assert send["y"] + send["height"] <= 420
    back.tap()
    expect(page.locator(".top")).to_be_visible()
    expect(page.locator("#bell-count")).to_have_text("1")
    page.clock.run_for(100)
    expect(row(page, chat)).to_be_focused()


def open_chat_on_phone(page: Page, chat: int) -> None:
    row(page, chat).tap()
    expect(page.locator("#composer")).to_be_visible()


def test_the_label_of_the_day_stays_while_its_messages_are_read(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = long_chat(server)
    page = chromium.context(viewport=PHONE).new_page()

    def spread(route: Route) -> None:
        """Answer as if ten messages had been sent on each of three days."""
        answer = route.fetch()
        body = answer.json()
        for message in body["messages"]:
            message["created_at"] = f"2024-02-{1 + message['n'] // 10:02}T12:00:00Z"
        route.fulfill(response=answer, json=body)

    page.route(re.compile("/messages"), spread)
    page.goto(server.link(anna))
    open_chat(page, chat)
    expect(bubbles(page)).to_have_count(30)
    label = """() => {
        const { top } = scroller.getBoundingClientRect();
        const labels = [...document.querySelectorAll(".day")].filter((day) => {
            const y = day.getBoundingClientRect().top - top;
            return y > -30 && y < 30 && getComputedStyle(day).visibility === "visible";
        });
        const row = [...document.querySelectorAll(".message")].find((row) =>
            row.getBoundingClientRect().bottom > top);
        return [labels.map((day) => day.textContent), Number(row.dataset.n)]; }"""
    seen = set()
    for _ in range(40):
        labels, n = page.evaluate(label)
        if labels:
            assert labels == [f"February {1 + n // 10}, 2024"]
            seen.add(n // 10)
        page.evaluate("scroller.scrollTop -= 80")
        page.evaluate("new Promise(requestAnimationFrame)")
    assert seen == {0, 1, 2, 3} or seen == {0, 1, 2}
    bens = sign_in(chromium.context(viewport=PHONE), server.link(ben), chat)
    expect(bens.locator(".divider")).to_be_in_viewport()
    bens.locator("#jump").click()
    expect(bens.locator(".divider")).not_to_be_in_viewport()
    expect(bens.locator(".day")).to_be_visible()
    bens.close()
    width = page.locator(".day").last.evaluate("(day) => day.offsetWidth")
    assert width < 200  # not as wide as the messages
    page.set_viewport_size({"width": 667, "height": 320})
    expect(page.locator(".day").first).to_have_css("position", "static")
    page.set_viewport_size(PHONE)
    page.get_by_role("button", name="Latest messages").click()
    before = page.evaluate("scroller.scrollTop")
    server.post(chat, ben, "The answer")
    expect(bubbles(page).last).to_have_text("The answer")
    expect(bubbles(page).last).to_be_in_viewport()
    assert page.evaluate("scroller.scrollTop") > before


def test_the_page_can_be_installed(server: Server, chromium: Chromium) -> None:
    page = sign_in(chromium.context(), server.link(server.add_user("Anna")))
    cdp = page.context.new_cdp_session(page)
    found = cdp.send("Page.getAppManifest")
    assert found["errors"] == []
    faults = cdp.send("Page.getInstallabilityErrors")["installabilityErrors"]
    # Each profile of a test is an incognito window.
    assert [fault["errorId"] for fault in faults] in ([], ["in-incognito"])
    manifest = json.loads(found["data"])
    assert found["url"] == f"{server.url}/web/manifest.webmanifest"
    start = urljoin(found["url"], manifest["start_url"])
    assert start == f"{server.url}/"
    icons = {(icon["sizes"], icon.get("purpose", "any")) for icon in manifest["icons"]}
    assert icons >= {("192x192", "any"), ("512x512", "any"), ("512x512", "maskable")}
    for icon in manifest["icons"]:
        answer = page.request.get(f"{server.url}/web/{icon['src']}")
        assert answer.headers["content-type"] == icon["type"] == "image/png"
        width, height = struct.unpack(">II", answer.body()[16:24])
        assert f"{width}x{height}" == icon["sizes"]
    apple = page.locator("link[rel=apple-touch-icon]").evaluate("(link) => link.href")
    assert page.request.get(apple).ok


# --- muting, counting, notifying -----------------------------------------------------


def test_a_muted_chat_is_quiet(server: Server, chromium: Chromium) -> None:
    anna, ben, loud = pair(server)
    quiet = server.create_chat(anna, ben, title="Quiet")
    context = chromium.context()
    context.add_init_script(NOTIFICATIONS)
    context.add_init_script(
        """Notification.permission = "granted"; document.hasFocus = () => false"""
    )
    page = sign_in(context, server.link(anna), quiet)
    second = sign_in(context, server.url)
    page.get_by_role("button", name="People in this chat").click()
    page.get_by_role("checkbox", name="Mute").check()
    page.keyboard.press("Escape")
    for tab in (page, second):
        expect(row(tab, quiet)).to_contain_text("Muted")
        expect(row(tab, loud)).not_to_contain_text("Muted")
    open_chat(page, loud)
    server.post(quiet, ben, "Psst")
    for tab in (page, second):
        expect(row(tab, quiet).locator(".badge")).to_have_text("1 unread")
    server.post(loud, ben, "Hello")
    expect(page).to_have_title("(1) Ben · chatd")
    expect(page.locator("#bell-count")).to_have_text("1")
    expect(page.locator("#announcer")).to_contain_text("Hello")
    expect(page.locator("#announcer")).not_to_contain_text("Psst")
    page.locator("#bell").click()
    expect(page.locator("#bell-list .row")).to_have_count(1)
    noted = "granted: Ben"  # once in each tab
    until(lambda: bool(page.title()) and chromium.console.count(noted) == 2)
    assert not [line for line in chromium.console if "Quiet" in line]

    page.reload()
    expect(row(page, quiet)).to_contain_text("Muted")
    bens = sign_in(context, server.link(ben))  # another user of this browser
    expect(row(bens, quiet)).not_to_contain_text("Muted")
    open_chat(second, quiet)
    second.get_by_role("button", name="People in this chat").click()
    second.get_by_role("checkbox", name="Mute").uncheck()
    expect(second).to_have_title("(2) Quiet · chatd")
    expect(page.locator("#bell-count")).to_have_text("2")


def test_the_icons_say_that_messages_are_new(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    context = chromium.context()
    context.add_init_script(NOTIFICATIONS)
    page = sign_in(context, server.link(anna))
    icon = page.locator("link[rel=icon]")
    plain = icon.get_attribute("href")
    server.post(chat, ben, "Hello")
    expect(page).to_have_title("(1) chatd")
    server.post(chat, ben, "Hello?")
    expect(page).to_have_title("(2) chatd")
    expect(icon).not_to_have_attribute("href", plain or "")
    drawn = """async (icon) => { const image = new Image();
        image.src = icon.href; await image.decode(); return image.naturalWidth > 0; }"""
    assert icon.evaluate(drawn)
    open_chat(page, chat)
    expect(page).to_have_title("Ben · chatd")
    expect(icon).to_have_attribute("href", plain or "")
    server.post(server.create_chat(anna, ben, title="Other"), ben, "Once more")
    expect(page).to_have_title("(1) Ben · chatd")
    page.locator("#me").click()
    page.get_by_role("button", name="Sign out").click()
    expect(page).to_have_title("Sign in · chatd")
    expect(icon).to_have_attribute("href", plain or "")
    badges = [line for line in chromium.console if line.startswith("badge")]
    counts = [line for line, _ in itertools.groupby(badges)]
    assert counts == [f"badge: {count}" for count in (0, 1, 2, 0, 1, 0)]


def test_notifications_are_offered_once_to_a_user_who_comes_back(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    context = chromium.context()
    context.add_init_script(NOTIFICATIONS)
    page = sign_in(context, server.link(anna), chat)
    offer = page.locator(".toast", has_text="Get notified")

    def miss(page: Page, text: str) -> None:
        """Hide the page, let a message arrive, and come back."""
        look = """(state) => {
            Object.defineProperty(document, "visibilityState",
                { value: state, configurable: true });
            document.dispatchEvent(new Event("visibilitychange")); }"""
        page.evaluate(look, "hidden")
        server.post(chat, ben, text)
        expect(page).to_have_title("(1) Ben · chatd")
        page.evaluate(look, "visible")
        expect(page).to_have_title("Ben · chatd")

    write(page, "Hello")
    expect(bubbles(page)).to_have_text(["Hello"])
    expect(page.locator(".toast")).to_have_count(0)
    miss(page, "Hello Anna")
    place, newest = offer.bounding_box(), bubbles(page).last.bounding_box()
    assert place
    assert newest
    assert place["y"] + place["height"] < newest["y"], "it covers no new message"
    offer.get_by_role("button", name="Turn on").click()
    expect(offer).to_have_count(0)
    expect(field(page)).to_be_focused()
    until(lambda: bool(page.title()) and "asked" in chromium.console)
    page.reload()
    miss(page, "Are you there?")
    expect(page.locator(".toast")).to_have_count(0)
    page.locator("#bell").click()  # it is still possible there
    page.get_by_role("button", name="Turn on").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Turn on")).to_be_hidden()
    expect(page.locator("#bell")).to_be_focused()
    assert chromium.console.count("asked") == 2
    page.close()  # it would read what the phone misses

    phones = chromium.context(viewport=PHONE, is_mobile=True, has_touch=True)
    phones.add_init_script(NOTIFICATIONS)
    phone = sign_in(phones, server.link(anna), chat=None)
    phone.locator("#bell").click()
    expect(phone.locator("#bell-panel")).to_be_visible()
    expect(phone.get_by_role("button", name="Turn on")).to_be_hidden()
    phone.keyboard.press("Escape")
    row(phone, chat).click()
    miss(phone, "Now on your phone?")
    expect(phone.locator(".toast")).to_have_count(0)


# --- colours -------------------------------------------------------------------------

# The red, green and blue of a property of some elements, as they are drawn.
COLOURS = """([selector, property]) => {
    const canvas = document.createElement("canvas");
    const context = canvas.getContext("2d", { willReadFrequently: true });
    return [...document.querySelectorAll(selector)].map((node) => {
        context.fillStyle = getComputedStyle(node)[property];
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    }); }"""


def contrast(one: list[int], other: list[int]) -> float:
    """Compute the ratio as WCAG 2 defines it."""

    def luminance(colour: list[int]) -> float:
        parts = [part / 255 for part in colour]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
            for part in parts
        ]
        return sum(a * b for a, b in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def test_each_member_of_a_group_has_a_readable_colour_that_stays(
    server: Server, chromium: Chromium
) -> None:
    # All these ids would have the same colour.
    ids = [1_000_000 + 12 * i for i in range(12)]
    late, *first = ids
    for i, user in enumerate(ids):
        server.request("GET", "/api/v1/me", user_id=user, name=f"Person {i}")
    chat = server.create_chat(*first, title="All")
    for user in first:
        server.post(chat, user, f"I am {user}")
    page = sign_in(chromium.context(), server.link(first[0]), chat)
    senders = page.locator("#messages .sender")
    expect(senders).to_have_count(len(first) - 1)

    def colours(selector: str, name: str) -> list[list[int]]:
        found: list[list[int]] = page.evaluate(COLOURS, [selector, name])
        return found

    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        names = colours("#messages .sender", "color")
        for one, other in itertools.combinations(names, 2):
            assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 25
        (bubble, *_) = colours(
            "#messages .message:not(.own) .bubble", "backgroundColor"
        )
        assert all(contrast(colour, bubble) >= 4.5 for colour in names)
        discs = colours("#messages .first > .avatar", "backgroundColor")
        assert discs == names
        letters = colours("#messages .first > .avatar", "color")
        for disc, letter in zip(discs, letters, strict=True):
            assert contrast(disc, letter) >= 4.5
    path = f"/api/v1/chats/{chat}/members"
    server.request("POST", path, {"user_id": late})  # an id before all others
    server.post(chat, late, "I am new")
    expect(senders).to_have_count(len(first))
    *same, new = colours("#messages .sender", "color")
    assert same == names
    assert new not in names


# --- the keyboard --------------------------------------------------------------------


def test_the_keyboard_leads_everywhere_and_the_focus_is_never_lost(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, first = pair(server)
    second = server.create_chat(anna, ben, title="Second")
    server.post(first, ben, "One")
    server.post(second, ben, "Two")
    page = chromium.page(clock=True)
    page.goto(server.url)
    page.get_by_label("Sign-in link").fill(server.link(anna))
    page.keyboard.press("Enter")
    expect_state(page, "connected")
    expect(page.locator("#chats")).to_be_focused()  # the form is gone

    page.keyboard.press("?")
    sheet = page.get_by_role("dialog", name="Keyboard shortcuts")
    expect(sheet).to_contain_text("Ctrl K")
    page.keyboard.press("Escape")
    expect(sheet).to_be_hidden()
    expect(page.locator("#chats")).to_be_focused()
    row(page, second).focus()
    page.keyboard.press("ArrowDown")
    expect(row(page, first)).to_be_focused()
    page.keyboard.press("ArrowDown")  # there is no other
    expect(row(page, first)).to_be_focused()
    server.post(first, ben, "Its row moves up")
    expect(page.locator("#chat-list a").first).to_be_focused()
    page.keyboard.press("Enter")
    expect(field(page)).to_be_focused()
    until(lambda: unread(server, anna, first) == 0)  # or else no draft is shown
    page.keyboard.type("Really?")
    expect(field(page)).to_have_value("Really?")
    page.keyboard.press("Escape")
    expect(field(page)).to_be_hidden()
    expect(row(page, first)).to_be_focused()
    expect(row(page, first)).to_contain_text("Draft: Really?")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#pane-title")).to_have_text("Second")

    # The chat ends while its dialog is open.
    page.get_by_role("button", name="People in this chat").focus()
    server.request("DELETE", f"/api/v1/chats/{second}/members/{anna}")
    expect(row(page, second)).to_have_count(0)
    expect(page.locator("#chats")).to_be_focused()

    # A message fails, is sent again, and its button is gone.
    open_chat(page, first)
    lost = page.locator("#messages")
    field(page).fill("x" * 4_001)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Delete", exact=True).focus()
    page.keyboard.press("Enter")
    expect(lost.get_by_text("Not sent")).to_have_count(0)
    assert page.evaluate("scroller.contains(document.activeElement)")

    page.locator("#me").focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Keyboard shortcuts").focus()
    page.keyboard.press("Enter")
    expect(sheet.get_by_role("button", name="Close")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#me")).to_be_focused()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Sign out").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Sign-in link")).to_be_focused()


def test_the_button_of_the_banner_takes_no_focus_with_it(
    server: Server, chromium: Chromium
) -> None:
    anna, _, chat = pair(server)
    page = chromium.page(clock=True)
    relay = Relay.connected(page, server.link(anna), chat)
    go_offline(page, relay)
    retry = page.get_by_role("button", name="Try again")
    retry.focus()
    page.keyboard.press("Enter")
    expect(retry).to_be_focused()
    page.unroute_all()
    relay.unblock()
    wait_until_connected(page)
    expect(field(page)).to_be_focused()


# --- the account ---------------------------------------------------------------------


def test_a_user_changes_the_name_and_signs_in_on_a_second_device(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server()
    anna, ben, chat = pair(server, title="Two")
    context = chromium.context()
    context.add_init_script(
        "navigator.share = async ({ url }) => console.log(`shared ${url}`);"
    )
    page = sign_in(context, server.link(anna), chat)
    bens = sign_in(chromium.context(), server.link(ben), chat)

    page.locator("#me").click()
    page.get_by_role("button", name="Change your name").click()
    dialog = page.get_by_role("dialog", name="Change your name")
    name = dialog.get_by_role("textbox")
    expect(name).to_be_focused()
    expect(name).to_have_value("Anna")
    name.fill(" \u200b ")
    name.press("Enter")
    expect(dialog).to_contain_text("Choose a name that others can read.")
    expect(name).to_be_focused()
    page.route(re.compile("/api/v1/me$"), lambda route: route.abort())
    name.fill("Anna Maria")
    name.press("Enter")
    expect(dialog).to_contain_text("The chat server does not answer.")
    expect(name).to_have_value("Anna Maria")
    page.unroute_all()
    dialog.get_by_role("button", name="Save").click()
    expect(dialog).to_be_hidden()
    expect(page.locator("#me-name")).to_have_text("Anna Maria")
    expect(page.locator("#me-avatar")).to_have_text("AM")
    expect(page.locator("#me")).to_be_focused()
    page.reload()
    expect(page.locator("#me-name")).to_have_text("Anna Maria")
    bens.reload()
    expect(bens.locator("#pane-members")).to_have_text("Anna Maria, you")

    page.locator("#me").click()
    page.get_by_role("button", name="Sign in on another device").click()
    dialog = page.get_by_role("dialog", name="Sign in on another device")
    expect(dialog).to_contain_text("within 10 minutes")
    expect(dialog).to_contain_text("signs in as you")
    copy = dialog.get_by_role("button", name="Copy")
    expect(copy).to_be_focused()
    copy.click()
    expect(dialog.locator(".toast")).to_have_text("Copied")
    expect(copy).to_be_focused()
    url = dialog.get_by_role("textbox").input_value()
    dialog.get_by_role("button", name="Share").click()
    until(lambda: bool(page.title()) and f"shared {url}" in chromium.console)
    dialog.get_by_role("button", name="Close").click()
    expect(page.locator("#me")).to_be_focused()

    second = sign_in(chromium.context(viewport=PHONE), url)
    expect(second.locator("#me-avatar")).to_have_text("AM")
    assert second.url.split("#")[0] == f"{server.url}/"
    assert "token" not in second.url
    page.route(re.compile("/me/link"), lambda route: route.abort())
    page.locator("#me").click()
    page.get_by_role("button", name="Sign in on another device").click()
    expect(page.locator(".toast").last).to_contain_text("does not answer")
