"""Finding messages and chats on the page, and a chat that is opened at a message."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest

from tests.browser import (
    FIXTURES,
    Chromium,
    Locator,
    Page,
    Relay,
    Route,
    Server,
    bubbles,
    come_back,
    expect,
    expect_state,
    field,
    go_offline,
    pair,
    screenshot,
    sign_in,
    until,
    write,
)

pytestmark = pytest.mark.browser
site, server, make_server, browser, chromium, example_chats = FIXTURES

LENGTH = 300


@pytest.fixture(scope="module")
def garden(server: Server) -> tuple[int, int, int, list[int]]:
    """Make a long chat that Anna has read. Return Anna, Ben, the chat and the ids."""
    anna, ben, chat = pair(server, title="Garden")
    ids = [
        server.post(chat, anna if n % 3 else ben, f"Plant number {n}")["id"]
        for n in range(1, LENGTH + 1)
    ]
    server.mark_read(ids[-1], anna)
    return anna, ben, chat, ids


def search(page: Page, text: str) -> None:
    page.keyboard.press("Control+k")
    page.get_by_role("textbox", name="Search").fill(text)


def results(page: Page) -> Locator:
    return page.locator("#search-list a")


def shown(page: Page) -> list[str]:
    """Return the texts on the screen, from top to bottom."""
    texts: list[str] = page.evaluate(
        """() => {
            const { top, bottom } = scroller.getBoundingClientRect();
            const rows = [...document.querySelectorAll("#messages .message")];
            return rows.filter((row) => {
                const box = row.getBoundingClientRect();
                return box.bottom > top && box.top < bottom;
            }).map((row) => row.querySelector(".content").textContent);
        }"""
    )
    return texts


def top_of(row: Locator) -> float:
    place = row.bounding_box()
    assert place
    return place["y"]


def test_a_search_finds_chats_and_messages_in_all_chats_or_in_one(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, tea = pair(server, title="Tea & Чай")
    zoltan = server.add_user("Zoltán Kiss")
    direct = server.create_chat(anna, zoltan)
    hidden = server.create_chat(ben, zoltan)
    server.post(tea, ben, "Крепкий ЧАЙ и <b>café</b>")
    long = "word " * 700 + "the café at the end"
    server.post(direct, zoltan, long)
    server.post(direct, anna, "No coffee")
    server.post(hidden, ben, "café that Anna may not see")
    page = sign_in(chromium.context(), server.link(anna))
    page.get_by_role("button", name="Search").click()
    expect(results(page)).to_have_count(2)  # the chats, to jump to one
    text = page.get_by_role("textbox", name="Search")
    text.fill("zoltan")
    expect(results(page)).to_have_count(1)
    expect(results(page)).to_have_attribute("href", f"#chat/{direct}")
    expect(page.locator("#search-status")).to_have_text("No messages found.")
    text.press("Enter")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.locator("#pane-title")).to_have_text("Zoltán Kiss")
    search(page, "CAFE")
    expect(results(page)).to_have_count(2)
    status = page.get_by_role("status").and_(page.locator("#search-status"))
    expect(status).to_have_text("Messages found: 2.")
    expect(results(page).locator(".row-title")).to_have_text(
        ["Zoltán Kiss", "Ben · Tea & Чай"]
    )
    expect(results(page).locator("mark")).to_have_text(["café", "café"])
    expect(results(page).locator(".row-time")).to_have_text(
        [re.compile(r"\d:\d\d")] * 2
    )
    expect(results(page).first.locator("mark")).to_be_in_viewport()
    expect(results(page).last.locator(".row-last")).to_have_text(
        "Крепкий ЧАЙ и <b>café</b>"
    )
    text.fill("чай")
    expect(results(page)).to_have_count(2)  # the chat, and the message
    expect(results(page).locator("mark")).to_have_text(["ЧАЙ"])
    page.get_by_role("checkbox", name="Search in this chat").check()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("textbox", name="Search")).to_be_focused()
    expect(results(page)).to_have_count(0)
    expect(page.locator("#search-status")).to_have_text("No messages found.")
    text.fill("coffee no")
    expect(page.locator("#search-status")).to_have_text("Messages found: 1.")
    expect(results(page).locator("mark")).to_have_text(["No", "coffee"])
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Search in this chat").click()
    expect(page.get_by_role("checkbox")).to_be_checked()
    expect(results(page)).to_have_count(1)
    page.set_viewport_size({"width": 390, "height": 800})
    expect(page.get_by_role("dialog")).to_have_css("width", "390px")
    screenshot(page, "search-390")


def test_a_search_goes_on_to_its_end_and_can_be_used_with_the_keyboard(
    server: Server, chromium: Chromium, garden: tuple[int, int, int, list[int]]
) -> None:
    anna, _, chat, ids = garden
    page = sign_in(chromium.context(), server.link(anna), chat)
    expect(field(page)).to_be_focused()
    page.keyboard.press("Control+k")
    page.keyboard.type("plant number")
    status = page.locator("#search-status")
    # A page has 50 messages, or less if the server is busy.
    expect(status).to_contain_text(re.compile(r"Messages found: \d+\+\."))
    expect(results(page).nth(2)).to_be_attached()
    links = [f"#chat/{chat}/{one}" for one in reversed(ids)]
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    expect(results(page).nth(2)).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(results(page).nth(1)).to_be_focused()

    def go_to_the_end(count: int) -> None:
        def is_complete() -> bool:
            page.locator("#search-list").evaluate("(list) => list.scrollTo(0, 1e6)")
            return status.inner_text() == f"Messages found: {count}."

        until(is_complete)

    go_to_the_end(LENGTH)
    hrefs = results(page).evaluate_all("all => all.map((a) => a.getAttribute('href'))")
    assert hrefs == links  # each once, the newest first
    page.keyboard.press("Escape")
    expect(field(page)).to_be_focused()
    search(page, "number 17")
    go_to_the_end(13)  # also 117, 217, 170 to 179
    for _ in range(13):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{server.url}/#chat/{chat}/{ids[16]}")
    expect(page.locator(":focus")).to_contain_text("Plant number 17")


def test_a_chat_opens_at_a_message_and_leads_back_to_the_latest(
    server: Server, chromium: Chromium, garden: tuple[int, int, int, list[int]]
) -> None:
    anna, ben, chat, ids = garden
    page = sign_in(chromium.context(reduced_motion="reduce"), server.link(anna), chat)
    expect(bubbles(page).last).to_be_in_viewport()
    search(page, "number 120")
    results(page).click()
    target = page.locator(f"[data-id='{ids[119]}']")
    expect(target).to_be_focused()  # and so it is highlighted
    expect(target.locator(".bubble")).to_have_css("outline-style", "solid")
    expect(page.get_by_role("dialog")).to_have_count(0)
    texts = shown(page)
    middle = texts.index("Plant number 120")
    assert 0 < middle < len(texts) - 1
    first = 120 - middle
    assert texts == [f"Plant number {first + i}" for i in range(len(texts))]
    expect(page.get_by_role("button", name="Latest messages")).to_be_visible()
    page.keyboard.press("ArrowDown")
    expect(page.locator(f"[data-id='{ids[120]}'] .more")).to_be_focused()
    # The last own message is not there, so it cannot be edited.
    field(page).press("ArrowUp")
    expect(field(page)).to_have_value("")
    expect(page.locator("#edit-bar")).to_be_hidden()
    # What arrives meanwhile is new, and not shown after a hole.
    place = top_of(target)
    server.post(chat, ben, "A new message")
    expect(page.get_by_role("button", name="1 new message").last).to_be_visible()
    expect(page.locator("#bell-count")).to_have_text("1")
    expect(page.get_by_text("A new message").and_(bubbles(page))).to_have_count(0)
    assert top_of(target) == place
    # It opens there again after a reload, and the browser's buttons know the place.
    page.reload()
    expect(target).to_be_in_viewport()
    page.get_by_role("button", name="1 new message").last.click()
    expect(page).to_have_url(f"{server.url}/#chat/{chat}")
    expect(page.get_by_text("A new message").and_(bubbles(page))).to_be_in_viewport()
    expect(page.locator("#jump")).to_be_hidden()
    expect(page.locator("#bell-count")).to_be_hidden()
    page.go_back()
    expect(target).to_be_in_viewport()
    expect(bubbles(page).get_by_text("A new message")).to_have_count(0)
    page.go_forward()
    expect(bubbles(page).last).to_have_text("A new message")
    expect(bubbles(page).last).to_be_in_viewport()
    # One's own message leads to the end, too.
    page.go_back()
    expect(target).to_be_in_viewport()
    write(page, "My answer")
    expect(bubbles(page).last).to_have_text("My answer")
    expect(bubbles(page).last).to_be_in_viewport()
    # Within the loaded messages, nothing is requested. The own message alone is shown
    # before the latest page has come.
    expect(page.locator("#messages > *").nth(40)).to_be_attached()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.evaluate("location.hash += '/' + messages.children[40].dataset.id")
    expect(page.locator("#messages :focus, #messages > :focus")).to_be_in_viewport()
    assert not [url for url in asked if "around" in url]


def test_latest_and_sending_lead_to_the_end_from_each_place(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    ids = [server.post(chat, ben, f"Seed {n}")["id"] for n in range(120)]
    server.mark_read(ids[89], anna)
    page = chromium.page()
    relay = Relay.connected(page, server.link(anna), chat)
    page.evaluate("(id) => { location.hash += `/${id}`; }", ids[9])
    expect(page.locator(f"[data-id='{ids[9]}']")).to_be_focused()

    def has_read_all() -> bool:
        page.evaluate("scroller.scrollTo(0, 1e6)")
        return page.locator("#jump").is_hidden()

    until(has_read_all)
    expect(page.locator("#bell-count")).to_be_hidden()
    page.evaluate("scroller.scrollBy(0, -1500)")
    latest = page.get_by_role("button", name="Latest messages")
    latest.click()  # which is not the line "New messages", far above
    expect(latest).to_be_hidden()
    expect(bubbles(page).last).to_be_in_viewport()

    def come_back_after_a_resync() -> None:
        """Load the messages around the place again, but not the latest."""
        # The place is where the page has seen the scroll: an event of the next frame.
        page.evaluate(
            """() => new Promise((seen) => {
              scroller.addEventListener("scroll", seen, { once: true });
              scroller.scrollTo(0, scroller.scrollHeight / 3);
            })"""
        )
        expect(latest).to_be_visible()
        connected = relay.received[0]
        with page.expect_response(re.compile("around=")):
            relay.sockets[-1].send(json.dumps({**connected, "resume": "resync"}))
        expect(bubbles(page).get_by_text("Seed 119")).to_have_count(0)

    come_back_after_a_resync()
    latest.click()
    expect(bubbles(page).last).to_have_text("Seed 119")
    expect(bubbles(page).last).to_be_in_viewport()
    expect(latest).to_be_hidden()
    page.evaluate("scroller.scrollTo(0, 0)")
    expect(bubbles(page).nth(90)).to_be_attached()
    come_back_after_a_resync()
    write(page, "Sprout")
    expect(bubbles(page).last).to_have_text("Sprout")
    expect(bubbles(page).last).to_be_in_viewport()


def test_messages_after_a_place_are_loaded_on_the_way_down_and_move_nothing(
    server: Server, chromium: Chromium, garden: tuple[int, int, int, list[int]]
) -> None:
    anna, _, chat, ids = garden
    page = chromium.page()
    relay = Relay(page)
    page.goto(server.link(anna))
    expect_state(page, "connected")
    page.goto(f"{server.url}/#chat/{chat}/{ids[99]}")
    expect(page.locator(f"[data-id='{ids[99]}']")).to_be_in_viewport()
    # After a resync the place is the same.
    texts = shown(page)
    connected = relay.received[0]
    with page.expect_response(re.compile("around=")):
        relay.sockets[-1].send(json.dumps({**connected, "resume": "resync"}))
    expect(page.locator(f"[data-id='{ids[99]}']")).to_be_in_viewport()
    assert shown(page) == texts
    seen = [int(texts[0].split()[-1])]

    def at_end() -> bool:
        page.evaluate("scroller.scrollBy(0, 400)")
        page.evaluate("() => new Promise((done) => requestAnimationFrame(done))")
        words = shown(page)[0].split()
        if words[0] == "Plant":
            seen.append(int(words[-1]))
        return page.locator("#jump").is_hidden()

    until(at_end)
    assert seen == sorted(seen)
    assert max(b - a for a, b in pairwise(seen)) < 25  # no hole
    numbers = [
        int(text.split()[-1])
        for text in bubbles(page).all_inner_texts()
        if text.startswith("Plant number")
    ]
    assert numbers == list(range(numbers[0], LENGTH + 1))
    write(page, "At the end")
    expect(bubbles(page).last).to_have_text("At the end")


def test_an_address_of_a_message_that_is_not_there_is_explained(
    server: Server, chromium: Chromium, garden: tuple[int, int, int, list[int]]
) -> None:
    anna, ben, chat, _ = garden
    other = server.post(server.create_chat(ben, server.add_user("Cleo")), ben, "No")
    page = sign_in(chromium.context(), server.link(anna))
    toast = page.locator(".toast", has_text="no longer exists")
    address = f"#chat/{chat}/{other['id']}"
    page.evaluate("(hash) => { location.hash = hash; }", address)
    expect(toast).to_be_visible()
    expect(page).to_have_url(f"{server.url}/#chat/{chat}")
    expect(bubbles(page).last).to_be_in_viewport()
    page.goto(f"{server.url}/?lang=en#chat/{other['chat_id']}/1")  # a new visit
    expect(toast).to_be_visible()
    expect(page.locator("#pane-empty")).to_be_visible()


def test_results_follow_what_happens_and_a_search_survives_the_network(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server, title="Shed")
    other = server.create_chat(anna, ben, title="Attic")
    ids = [server.post(chat, ben, f"Spade {n}")["id"] for n in (1, 2, 3)]
    server.post(other, ben, "Spade 4")
    page = chromium.page()
    refusals = [
        lambda route: route.fulfill(
            status=429,
            json={"error": {"code": "rate_limited", "message": "", "retry_after": 0.1}},
        ),
        lambda route: route.abort(),
    ]

    def hinder(route: Route) -> None:
        (refusals.pop(0) if refusals else Route.continue_)(route)

    page.route(re.compile("/api/v1/search"), hinder)
    page.goto(server.link(anna))
    expect_state(page, "connected")
    search(page, "spade")
    expect(page.locator("#search-status")).to_contain_text("does not answer")
    assert not refusals  # it has waited, and come back
    page.get_by_role("button", name="Try again").click()
    texts = results(page).locator("mark").locator("..")
    expect(texts).to_have_text(["Spade 4", "Spade 3", "Spade 2", "Spade 1"])
    server.request("DELETE", f"/api/v1/messages/{ids[1]}")
    expect(texts).to_have_text(["Spade 4", "Spade 3", "Spade 1"])
    expect(page.locator("#search-status")).to_have_text("Messages found: 3.")
    edit = {"content": "Spade three"}
    server.request("PATCH", f"/api/v1/messages/{ids[2]}", edit)
    expect(texts).to_have_text(["Spade 4", "Spade three", "Spade 1"])
    server.request("DELETE", f"/api/v1/chats/{other}/members/{anna}")
    expect(texts).to_have_text(["Spade three", "Spade 1"])
    # A page of results may be empty, and the answer to an old text comes too late.
    held: list[Route] = []
    page.unroute(re.compile("/api/v1/search"))

    def hold(route: Route) -> None:
        held.append(route)

    page.route(re.compile("/api/v1/search"), hold)
    page.get_by_role("textbox", name="Search").fill("spade 1")
    until(lambda: bool(page.title()) and len(held) == 1)
    expect(page.locator("#search-status")).to_have_text("Searching…")
    held[0].fulfill(json={"messages": [], "before": ids[1]})
    until(lambda: bool(page.title()) and len(held) == 2)
    assert f"before={ids[1]}" in held[1].request.url
    expect(page.locator("#search-status")).to_have_text("Searching…")
    expect(page.locator("#search-status")).to_have_attribute("aria-busy", "true")
    with page.expect_event("requestfailed"):
        page.get_by_role("textbox", name="Search").fill("spade three")
    until(lambda: bool(page.title()) and len(held) == 3)
    held[2].continue_()
    expect(texts).to_have_text("Spade three")
    expect(page.locator("#search-status")).to_have_attribute("aria-busy", "false")


def test_without_a_connection_the_place_stays_or_says_why_it_is_not_there(
    server: Server, chromium: Chromium, garden: tuple[int, int, int, list[int]]
) -> None:
    anna, _, chat, ids = garden
    page = chromium.page(clock=True)
    relay = Relay.connected(page, server.link(anna), chat)
    expect(bubbles(page).last).to_be_in_viewport()
    go_offline(page, relay)
    texts = shown(page)
    page.evaluate("(hash) => { location.hash = hash; }", f"#chat/{chat}/{ids[9]}")
    toast = page.locator(".toast", has_text="does not answer")
    expect(toast).to_be_visible()
    assert shown(page) == texts
    search(page, "plant")
    page.clock.run_for(1_000)
    expect(page.locator("#search-status")).to_contain_text("does not answer")
    come_back(page, relay)
    expect(results(page).first).to_be_visible()  # it has gone on by itself
    page.clock.run_for(1_000)
    page.keyboard.press("Escape")
    page.evaluate("(hash) => { location.hash = hash; }", f"#chat/{chat}/{ids[19]}")
    page.clock.run_for(1_000)
    expect(page.locator(f"[data-id='{ids[19]}']")).to_be_in_viewport()
    # A message that is written there waits at the end, which is loaded later.
    go_offline(page, relay)
    write(page, "From the tunnel")
    page.clock.run_for(1_000)
    expect(bubbles(page)).to_have_text(["From the tunnel"])
    expect(page.locator("#messages")).to_contain_text("could not be loaded")
    come_back(page, relay)
    page.clock.run_for(1_000)
    expect(bubbles(page).nth(40)).to_be_attached()
    expect(bubbles(page).last).to_have_text("From the tunnel")
    expect(bubbles(page).last).to_be_in_viewport()
    # Older messages that could not be loaded come with the connection, too.
    go_offline(page, relay)
    page.evaluate("scroller.scrollTo(0, 0)")
    page.clock.run_for(1_000)
    expect(page.locator("#messages")).to_contain_text("could not be loaded")
    come_back(page, relay)
    page.clock.run_for(1_000)
    expect(bubbles(page).nth(90)).to_be_attached()
    expect(page.locator("#messages")).not_to_contain_text("could not be loaded")
