"""The page in a real Chromium, against a real `chatd serve`."""

from __future__ import annotations

import functools
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import (
    FIXTURES,
    HIDE,
    SIZES,
    Chromium,
    Page,
    Relay,
    Request,
    Route,
    Server,
    WebSocketRoute,
    axe,
    bubbles,
    come_back,
    expect,
    expect_state,
    field,
    go_offline,
    long_chat,
    open_chat,
    pair,
    refuse,
    screenshot,
    sign_in,
    ticks,
    unread,
    until,
    users,
    wait_until_connected,
    write,
)
from tests.client import ProxyProcess

pytestmark = pytest.mark.browser
site, server, make_server, browser, chromium, example_chats = FIXTURES


# --- signing in ----------------------------------------------------------------------


def test_a_link_signs_in_and_its_token_leaves_the_address_bar(
    server: Server, chromium: Chromium
) -> None:
    anna, _, _ = pair(server)
    context = chromium.context()
    page = sign_in(context, server.link(anna))
    assert page.url == f"{server.url}/#chats"
    expect(page.locator("#me-name")).to_have_text("Anna")
    expect_state(page, "connected")
    page.reload()
    expect(page.locator("#me-name")).to_have_text("Anna")
    page.close()
    later = sign_in(context, server.url)  # the next visit
    expect(later.locator("#me-name")).to_have_text("Anna")
    assert not [line for line in chromium.console if "eyJ" in line]  # no token


def test_an_expired_link_is_explained_and_another_link_works(
    server: Server, chromium: Chromium
) -> None:
    page = chromium.page()
    page.goto(f"{server.url}/#token={server.token(next(users), use='signin', exp=1)}")
    expect(page.get_by_role("alert")).to_contain_text("no longer valid")
    page.get_by_label("Sign-in link").fill("https://example.org")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("not a sign-in link")
    page.get_by_label("Sign-in link").fill(server.link(server.add_user("Cora")))
    page.get_by_label("Sign-in link").press("Enter")
    expect(page.locator("#me-name")).to_have_text("Cora")


def test_signing_out_reaches_a_tab_that_asks_about_a_link(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    context = chromium.context()
    page = sign_in(context, server.link(anna), chat)
    asking = sign_in(context, server.url, chat)
    asking.goto(server.link(ben))
    expect(asking.get_by_role("dialog", name="Continue as Ben")).to_be_visible()
    page.locator("#me").click()
    page.get_by_role("button", name="Sign out").click()
    for tab in (page, asking):
        expect(tab.locator("#sign-in")).to_be_visible()
    asking.reload()
    expect(asking.locator("#sign-in")).to_be_visible()


def test_a_link_for_another_user_asks_before_the_tab_changes_its_user(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    page = sign_in(chromium.context(), server.link(anna), chat)
    page.goto(server.link(anna))  # the same user: no question
    expect(page).to_have_url(f"{server.url}/#chat/{chat}")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.goto(server.link(ben))
    question = page.get_by_role("dialog", name="Continue as Ben")
    question.get_by_role("button", name="Cancel").click()
    expect(page.locator("#me-name")).to_have_text("Anna")
    expect(field(page)).to_be_visible()
    page.goto(server.link(ben))
    question.get_by_role("button", name="Continue as Ben").click()
    expect(page.locator("#me-name")).to_have_text("Ben")
    write(page, "It is me now")
    expect(ticks(page)).to_have_text("Sent")
    expect(bubbles(page)).to_have_text(["It is me now"])
    (shown,) = server.request("GET", "/api/v1/chats", user_id=ben)["chats"]
    assert shown["last_message"]["sender_id"] == ben


def test_signing_out_ends_the_session_in_all_tabs_of_that_user(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, _ = pair(server)
    context = chromium.context()
    bens = sign_in(context, server.link(ben))
    first = sign_in(context, server.link(anna))
    second = sign_in(context, server.link(anna))
    expect(second.locator("#me-name")).to_have_text("Anna")
    first.locator("#me").click()
    first.get_by_role("button", name="Sign out").click()
    expect(first.get_by_text("You are signed out.")).to_be_visible()
    expect(second.get_by_text("You signed out in another tab.")).to_be_visible()
    expect(bens.locator("#me-name")).to_have_text("Ben")
    expect_state(bens, "connected")
    first.reload()
    expect(first.get_by_role("heading", name="Sign in to chatd")).to_be_visible()


# --- two users -----------------------------------------------------------------------


@pytest.fixture(params=["direct", "proxy"])
def entry_url(
    request: pytest.FixtureRequest, server: Server, tmp_path: Path
) -> Iterator[str]:
    """The address that pages connect to: of the server, or of a proxy before it."""
    if request.param == "direct":
        yield server.url
        return
    proxy = ProxyProcess(tmp_path, server.port, server.db)
    proxy.flags = proxy.open
    proxy.start()
    yield proxy.url
    proxy.end(signal.SIGTERM)


def test_two_tabs_of_one_browser_can_be_two_users(
    server: Server, chromium: Chromium, entry_url: str
) -> None:
    anna, ben, chat = pair(server)
    context = chromium.context()
    tabs = []
    for user in (anna, ben):
        tab = context.new_page()
        with tab.expect_console_message(
            lambda line: line.text.startswith("WebSocket message:")
        ) as first:
            tab.goto(server.link(user).replace(server.url, entry_url))
        connected = first.value.args[1].json_value()
        assert (connected["type"], connected["user_id"]) == ("connected", user)
        tabs.append(tab)
    assert chromium.console.count("[WebSocket] Connected") == 2
    assert not [line for line in chromium.console if "token" in line or "eyJ" in line]
    annas, bens = tabs
    open_chat(annas, chat)
    open_chat(bens, chat)
    write(annas, "Привет!")
    expect(bubbles(bens)).to_have_text(["Привет!"])
    write(bens, "Привет, Анна")
    expect(bubbles(annas)).to_have_text(["Привет!", "Привет, Анна"])
    for tab, name in ((annas, "Anna"), (bens, "Ben")):
        tab.reload()
        expect(tab.locator("#me-name")).to_have_text(name)


def test_a_message_in_one_browser_appears_in_the_other(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server, title="Bicycle")
    annas = sign_in(chromium.context(), server.link(anna), chat)
    bens = sign_in(chromium.context(), server.link(ben))
    write(annas, "Is it\n  still for sale?")
    row = bens.locator("#chat-list .row")
    expect(row.locator(".badge")).to_contain_text("1")
    expect(bens).to_have_title("(1) chatd")
    expect(bens.locator("#announcer")).to_contain_text("Anna in Bicycle: Is it")
    bens.get_by_role("button", name="1 new message").click()
    bens.locator("#bell-list .row").click()
    expect(bubbles(bens)).to_have_text(["Is it\n  still for sale?"])
    expect(bens.locator(".sender")).to_have_text("Anna")
    expect(bens.locator(".divider")).to_have_text("New messages")
    expect(bens).to_have_title("Bicycle · chatd")
    expect(bens.get_by_role("button", name="No new messages")).to_be_visible()


def test_the_typing_sign_appears_and_disappears(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    annas = chromium.page(clock=True)
    annas.goto(server.link(anna))
    bens = sign_in(chromium.context(), server.link(ben))
    for page in (annas, bens):
        open_chat(page, chat)
    sign = annas.locator("#typing")
    field(bens).press_sequentially("Hel")
    expect(sign).to_have_text("Ben is typing…")
    expect(annas.locator("#chat-list .row-last")).to_have_text("Ben is typing…")
    field(bens).fill("")  # Ben has changed his mind
    expect(sign).to_be_empty()
    field(bens).press_sequentially("Hello")
    expect(sign).to_have_text("Ben is typing…")
    field(bens).press("Enter")  # Ben has sent it
    expect(sign).to_be_empty()
    expect(bubbles(annas)).to_have_text(["Hello"])
    field(bens).press_sequentially("And")
    expect(sign).to_have_text("Ben is typing…")
    bens.close()  # without a last `typing` command
    annas.clock.run_for(8_000)
    expect(sign).to_be_empty()


def test_the_tick_shows_sent_and_then_read(server: Server, chromium: Chromium) -> None:
    anna, ben, chat = pair(server)
    annas = sign_in(chromium.context(), server.link(anna), chat)
    bens = sign_in(chromium.context(), server.link(ben))
    write(annas, "Hello")
    expect(ticks(annas)).to_have_text("Sent")
    expect(bens.locator("#bell-count")).to_have_text("1")
    expect(ticks(annas)).to_have_text("Sent")  # Ben has it, but has not seen it
    open_chat(bens, chat)
    expect(ticks(annas)).to_have_text("Read")


def test_a_hidden_tab_notifies_and_marks_nothing_as_read(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    annas = sign_in(chromium.context(), server.link(anna), chat)
    bens = chromium.page()
    bens.add_init_script(HIDE)
    bens.goto(server.link(ben))
    open_chat(bens, chat)
    with bens.expect_console_message(lambda line: line.text.startswith("Anna says:")):
        write(annas, "Are you there?")
    assert chromium.console.count("Anna says: Are you there?") == 1
    expect(bubbles(bens)).to_have_text(["Are you there?"])
    expect(bens).to_have_title("(1) Anna · chatd")
    expect(ticks(annas)).to_have_text("Sent")
    bens.evaluate("window.show()")
    expect(ticks(annas)).to_have_text("Read")
    expect(bens).to_have_title("Anna · chatd")


def test_reading_in_one_tab_clears_the_badges_of_all_tabs(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    context = chromium.context()
    first = sign_in(context, server.link(anna))
    second = sign_in(context, server.url)
    for i in range(3):
        server.post(chat, ben, f"Message {i}")
    for tab in (first, second):
        expect(tab.locator("#bell-count")).to_have_text("3")
    open_chat(first, chat)
    for tab in (first, second):
        expect(tab.locator("#bell-count")).to_be_hidden()
        expect(tab.locator("#chat-list .badge")).to_have_count(0)
    open_chat(second, chat)
    write(first, "From the first tab")
    expect(bubbles(second)).to_have_count(4)


def test_a_service_that_sends_in_ones_name_makes_nothing_read(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    annas = sign_in(chromium.context(), server.link(anna))
    bens = sign_in(chromium.context(), server.link(ben), chat)
    badge = annas.locator("#bell-count")
    write(bens, "Still for sale?")
    expect(badge).to_have_text("1")
    server.post(chat, anna, "I am away until Monday.")  # an automatic answer
    expect(badge).to_have_text("2")
    expect(bubbles(bens)).to_have_count(2)
    expect(ticks(bens)).to_have_text("Sent")
    path = f"/api/v1/chats/{chat}/messages"  # from another device of Anna
    server.request("POST", path, {"content": "Yes!"}, user_id=anna)
    expect(ticks(bens)).to_have_text("Read")
    expect(badge).to_be_hidden()


def test_many_new_messages_are_read_from_the_first_one(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    ids = [server.post(chat, ben, f"Message {i} of many.")["id"] for i in range(130)]
    server.mark_read(ids[9], anna)
    page = sign_in(chromium.context(), server.link(anna), chat)
    expect(page.locator(".divider")).to_be_in_viewport()
    expect(bubbles(page).get_by_text("Message 10 of")).to_be_in_viewport()
    until(lambda: bool(page.title()) and unread(server, anna, chat) < 120)
    assert unread(server, anna, chat) > 100
    page.locator("#jump").click()
    expect(bubbles(page).get_by_text("Message 129 of")).to_be_in_viewport()
    until(lambda: bool(page.title()) and unread(server, anna, chat) == 0)
    # A tab may be open for days: only a reader of older messages keeps them all.
    for i in range(130, 520):
        server.post(chat, ben, f"Message {i} of many.")
    expect(bubbles(page).get_by_text("Message 519 of")).to_be_in_viewport()
    expect(bubbles(page)).to_have_count(500)
    page.locator("#scroller").evaluate("(node) => node.scrollTo(0, 0)")
    expect(bubbles(page)).to_have_count(520)


def test_only_messages_that_were_on_the_screen_are_read(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    for i in range(60):
        server.post(chat, anna if i < 20 else ben, f"Message {i}\n\nwith three lines")
    page = sign_in(chromium.context(), server.link(anna), chat)
    expect(page.locator(".divider")).to_be_in_viewport()
    expect(page.locator("#jump-text")).to_have_text(re.compile("new messages"))
    count = int(page.locator("#jump-text").inner_text().split()[0])
    assert 20 < count < 40
    expect(page.locator("#bell-count")).to_have_text(str(count))
    page.locator("#jump").click()
    expect(page.locator("#bell-count")).to_be_hidden()
    expect(page.locator("#jump")).to_be_hidden()


def test_history_loads_on_scrolling_up_and_does_not_jump(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    for i in range(170):
        last = server.post(chat, anna if i % 3 else ben, f"Message {i}")
    server.mark_read(last["id"], anna)
    page = sign_in(chromium.context(), server.link(anna), chat)
    expect(bubbles(page).last).to_be_in_viewport()
    seen = []
    for _ in range(60):
        page.locator("#scroller").hover()
        page.mouse.wheel(0, -400)
        page.evaluate("() => new Promise((done) => requestAnimationFrame(done))")
        top = page.evaluate(
            """() => {
                const view = scroller.getBoundingClientRect();
                return [...document.querySelectorAll("#messages .message")]
                    .find((row) => row.getBoundingClientRect().bottom > view.top)
                    .dataset.n;
            }"""
        )
        seen.append(int(top))
        if page.get_by_text("The beginning of this chat").count():
            break
    expect(page.get_by_text("The beginning of this chat")).to_be_attached()
    assert seen == sorted(seen, reverse=True)  # the view never jumps
    expect(bubbles(page)).to_have_text([f"Message {i}" for i in range(170)])
    server.post(chat, ben, "New below")
    jump = page.get_by_role("button", name="1 new message").last
    jump.click()
    expect(page.get_by_text("New below", exact=True).last).to_be_in_viewport()


def test_an_invitation_that_does_not_count_is_explained(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server("--invites", "on")
    anna, ben, chat = pair(server)
    page = chromium.page()
    old = {"use": "invite", "invite": f"{chat}:1"}
    for token, words in (
        ("nonsense", "no longer valid"),
        (server.token(anna, exp=1, **old), "no longer valid"),
        (server.token(anna, **old), "no longer valid"),
    ):
        page.goto(f"{server.url}/#invite={token}")
        expect(page.get_by_role("alert")).to_contain_text(words)
        expect(page).to_have_url(f"{server.url}/")
    path = f"/api/v1/chats/{chat}/invites"
    token = server.request("POST", path, {}, user_id=anna)["token"]
    page.goto(f"{server.url}/#invite={token}")
    page.get_by_label("Your name").fill("Zora")
    for status, code, sentence, words in (
        (400, "bad_field", "member_ids: 9 members; at most 8", "at most 8 people"),
        (403, "forbidden", "there are none here", "not allowed"),
        (429, "rate_limited", "too many at once: slow down", "cannot take this now"),
    ):
        body = {"error": {"code": code, "message": sentence}}
        answer = functools.partial(refuse, status=status, body=body)
        page.route(re.compile("/join"), answer)
        page.get_by_role("button", name="Join").click()
        expect(page.get_by_role("alert")).to_contain_text(words)
        page.unroute_all()
    bens = sign_in(chromium.context(), server.link(ben), chat)
    toast = bens.locator(".toast", has_text="no longer valid")
    bens.goto(f"{server.url}/#invite=nonsense")
    expect(toast).to_be_visible()
    write(bens, "Still signed in")
    expect(ticks(bens)).to_have_text("Sent")
    token = server.request("POST", path, {}, user_id=anna)["token"]
    bens.reload()  # without the toast
    bens.goto(f"{server.url}/#invite={token}")
    dialog = bens.get_by_role("dialog", name="Join")
    expect(dialog).to_be_visible()
    server.request("DELETE", path, user_id=anna)  # while Ben decides
    dialog.get_by_role("button", name="Join").click()
    expect(toast).to_be_visible()
    expect(bens.locator("#me-name")).to_have_text("Ben")


# --- without a network ---------------------------------------------------------------


def test_a_killed_server_loses_and_doubles_no_message(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server()
    anna, ben, chat = pair(server)
    page = chromium.page(clock=True)
    page.goto(server.link(anna))
    open_chat(page, chat)
    write(page, "One")
    expect(ticks(page)).to_have_text("Sent")
    banner = page.locator("#banner")
    server.end(signal.SIGKILL)
    expect_state(page, "connecting")
    expect(banner).to_be_hidden()
    write(page, "Two")
    page.clock.run_for(5_100)
    expect(banner).to_be_visible()
    expect_state(page, "offline")
    expect(banner).to_contain_text("Your messages are kept")
    expect(banner).to_contain_text(re.compile(r"Trying again in \d+ s|Connecting…"))
    write(page, "Three")
    expect(ticks(page)).to_have_text(["Sent", "Sending", "Sending"])
    server.start()
    path = f"/api/v1/chats/{chat}/messages"
    server.request("POST", path, {"content": "From Ben"}, user_id=ben)
    wait_until_connected(page)
    expect(banner).to_be_hidden()
    expect(bubbles(page)).to_have_text(["One", "From Ben", "Two", "Three"])
    expect(ticks(page)).to_have_text(["Read", "Sent", "Sent"])  # Ben wrote after One
    assert server.texts(chat, anna) == ["One", "From Ben", "Two", "Three"]


def test_a_page_that_never_had_a_socket_can_create_a_chat(
    server: Server, chromium: Chromium
) -> None:
    page = chromium.page()
    page.route_web_socket("**/*", lambda socket: socket.close())
    page.goto(server.link(server.add_user("Anna")))
    expect(page.get_by_role("button", name="New chat")).to_be_visible()


def test_without_a_socket_the_page_polls_and_sends_over_http(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    page = chromium.page(clock=True)
    relay = Relay.connected(page, server.link(anna), chat)
    polls: list[str] = []

    def note(request: Request) -> None:
        if "/api/v1/events" in request.url:
            polls.append(request.url)

    page.on("request", note)
    relay.cut(1011, block=True)
    page.clock.run_for(4_500)
    assert polls == []
    expect(page.locator("#banner")).to_be_hidden()
    page.clock.run_for(600)
    expect_state(page, "polling")
    expect(page.locator("#banner")).to_contain_text("Live updates are interrupted.")
    server.post(chat, ben, "By poll")
    page.clock.run_for(5_100)
    expect(bubbles(page)).to_have_text(["By poll"])
    write(page, "By HTTP")
    page.clock.run_for(5_100)
    expect(ticks(page)).to_have_text("Sent")
    assert server.texts(chat, anna) == ["By poll", "By HTTP"]
    (shown,) = server.request("GET", "/api/v1/chats", user_id=anna)["chats"]
    assert shown["unread"] == 0  # read marks are sent over HTTP, too
    relay.unblock()
    wait_until_connected(page)  # the socket is tried every 30 s
    expect(page.locator("#banner")).to_be_hidden()
    count = len(polls)
    page.clock.run_for(20_000)
    assert len(polls) == count
    server.post(chat, ben, "Live again")
    expect(bubbles(page)).to_have_text(["By poll", "By HTTP", "Live again"])


def test_a_click_or_a_browser_event_opens_the_socket_at_once(
    server: Server, chromium: Chromium
) -> None:
    anna, _, _ = pair(server)
    page = chromium.page(clock=True)
    relay = Relay(page)
    page.goto(server.link(anna))
    for reconnect in (
        lambda: page.get_by_role("button", name="Try again").click(),
        lambda: page.evaluate("dispatchEvent(new Event('online'))"),
        lambda: page.evaluate("document.dispatchEvent(new Event('visibilitychange'))"),
    ):
        expect_state(page, "connected")
        relay.cut(1011, block=True)
        page.clock.run_for(5_100)
        expect_state(page, "polling")
        expect(page.locator("#banner")).to_contain_text("Trying again in")
        relay.unblock()
        page.clock.run_for(1_000)
        reconnect()
    expect_state(page, "connected")


def test_a_message_written_offline_is_delivered_once(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    context = chromium.context()
    annas = sign_in(context, server.link(anna))
    bens = sign_in(chromium.context(), server.link(ben), chat)
    open_chat(annas, chat)
    expect(annas.locator("#icon-sending")).to_be_attached()
    context.set_offline(True)
    write(annas, "Typed offline")
    expect(ticks(annas)).to_have_text("Sending")
    drawn = "() => document.querySelector('.own .stamp use').getBBox().width > 0"
    annas.wait_for_function(drawn)
    context.set_offline(False)
    expect(bubbles(bens)).to_have_text(["Typed offline"])
    expect(ticks(annas)).to_have_text("Read")
    write(bens, "Got it")
    expect(bubbles(annas)).to_have_text(["Typed offline", "Got it"])
    assert server.texts(chat, anna) == ["Typed offline", "Got it"]


def test_a_silent_connection_is_replaced(server: Server, chromium: Chromium) -> None:
    anna, _, chat = pair(server)
    page = chromium.page(clock=True)
    silent = threading.Event()

    def relay(socket: WebSocketRoute) -> None:
        upstream = socket.connect_to_server()
        first = not silent.is_set()

        def passes(send: Callable[[str | bytes], None], text: str | bytes) -> None:
            if not (first and silent.is_set()):
                send(text)

        socket.on_message(functools.partial(passes, upstream.send))
        upstream.on_message(functools.partial(passes, socket.send))

    page.route_web_socket(re.compile("/ws/chat"), relay)
    page.goto(server.link(anna))
    expect_state(page, "connected")
    open_chat(page, chat)
    silent.set()
    write(page, "Hello?")
    page.clock.run_for(24_500)  # no answer for 20 s
    wait_until_connected(page)
    expect(ticks(page)).to_have_text("Sent")
    assert server.texts(chat, anna) == ["Hello?"]


# --- unsent messages -----------------------------------------------------------------


def test_unsent_messages_survive_a_reload(server: Server, chromium: Chromium) -> None:
    anna, _, chat = pair(server)
    context = chromium.context()
    page = context.new_page()
    relay = Relay.connected(page, server.link(anna), chat)
    relay.cut(1011, block=True)
    for text in ("One", "Two", "Three"):
        write(page, text)
    expect(ticks(page)).to_have_text(["Sending"] * 3)
    page.reload()
    expect(ticks(page)).to_have_text(["Sending"] * 3)
    relay.unblock()
    expect(ticks(page)).to_have_text(["Sent"] * 3)
    assert server.texts(chat, anna) == ["One", "Two", "Three"]
    page.reload()
    expect(bubbles(page)).to_have_text(["One", "Two", "Three"])


def test_a_message_whose_answer_is_lost_is_stored_and_shown_once(
    server: Server, chromium: Chromium
) -> None:
    anna, _, chat = pair(server)
    page = chromium.page(clock=True)
    relay = Relay.connected(page, server.link(anna), chat)

    def lose_answer(route: Route) -> None:
        if route.request.method == "POST":
            route.fetch()
            route.abort()
        else:
            route.continue_()

    page.route(re.compile("/messages"), lose_answer)
    relay.cut(1011, block=True)
    page.clock.run_for(5_100)
    expect_state(page, "polling")
    with page.expect_event("requestfailed", lambda request: request.method == "POST"):
        write(page, "Once")
    assert server.texts(chat, anna) == ["Once"]
    page.reload()  # the message is in the history, and also among the unsent ones
    expect(bubbles(page)).to_have_text(["Once"])
    relay.unblock()
    wait_until_connected(page)
    until(lambda: page.evaluate("Object.keys(localStorage)") == ["chatd.session"])
    expect(ticks(page)).to_have_text(["Sent"])
    assert server.texts(chat, anna) == ["Once"]


def test_another_tab_sends_the_unsent_messages_of_a_closed_tab(
    server: Server, chromium: Chromium
) -> None:
    anna, _, chat = pair(server)
    context = chromium.context()
    second = context.new_page()
    second.clock.install()
    second.goto(server.link(anna))
    open_chat(second, chat)
    first = context.new_page()
    relay = Relay(first)
    first.goto(f"{server.url}/#chat/{chat}")
    expect(field(first)).to_be_visible()
    expect_state(first, "connected")
    relay.cut(1011, block=True)
    write(first, "One")
    write(first, "Two")
    first.close()
    second.clock.run_for(31_000)
    expect(bubbles(second)).to_have_text(["One", "Two"])
    expect(ticks(second)).to_have_text(["Sent", "Sent"])
    assert server.texts(chat, anna) == ["One", "Two"]
    assert second.evaluate("Object.keys(localStorage)") == ["chatd.session"]


def test_messages_over_the_rate_are_stored_in_order(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server("--sends", "2/3")
    anna, _, chat = pair(server)
    page = chromium.page(clock=True)
    relay = Relay.connected(page, server.link(anna), chat)
    texts = [f"Message {i}" for i in range(8)]
    # All messages wait for a socket, and are then sent as fast as possible.
    page.route(re.compile("/messages$"), lambda route: route.abort())
    relay.cut(1011, block=True)
    for text in texts:
        write(page, text)
    relay.unblock()
    wait_until_connected(page)
    expect(ticks(page)).to_have_text(["Sent"] * 8)
    expect(bubbles(page)).to_have_text(texts)
    assert server.texts(chat, anna) == texts
    refusals = [f for f in relay.received if f["type"] == "error"]
    assert {f["code"] for f in refusals} == {"rate_limited"}


def test_a_refused_message_does_not_block_the_next_one(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server("--max-content-chars", "100", "--max-message-bytes", "4096")
    anna, _, chat = pair(server)
    page = sign_in(chromium.context(), server.link(anna), chat)
    write(page, "x" * 101)
    write(page, "y" * 9000)  # the server does not even read it: 1009
    write(page, "Short")
    expect(ticks(page)).to_have_text(["Sent", "Not sent", "Not sent"])
    failed = page.locator(".failed")
    expect(failed.first).to_contain_text("Not sent: Too long by 1: at most 100 ")
    expect(failed.last).to_contain_text("Not sent: Too long by 8,900: at most 100 ")
    page.reload()
    expect(failed).to_have_count(2)
    failed.last.get_by_role("button", name="Delete").click()
    expect(failed).to_have_count(1)
    failed.get_by_role("button", name="Edit").click()
    expect(field(page)).to_have_value("x" * 101)
    write(page, "Shorter")
    expect(ticks(page)).to_have_text(["Sent", "Sent"])
    page.reload()
    expect(bubbles(page)).to_have_text(["Short", "Shorter"])


@pytest.mark.parametrize("storage", ["full", "forbidden"])
def test_without_storage_a_message_is_kept_in_memory(
    server: Server, chromium: Chromium, storage: str
) -> None:
    anna, _, chat = pair(server)
    page = chromium.page()
    page.add_init_script(
        "Storage.prototype.setItem = () => { throw new Error('full'); };"
        if storage == "full"
        else "for (const name of ['localStorage', 'sessionStorage'])"
        "Object.defineProperty(window, name, { get() { throw new Error('no'); } });"
    )
    relay = Relay.connected(page, server.link(anna), chat)
    relay.cut(1011)
    write(page, "Kept in memory")
    expect(ticks(page)).to_have_text("Sent")
    assert server.texts(chat, anna) == ["Kept in memory"]
    page.locator("#chat-info").click()
    mute = page.get_by_role("checkbox", name="Mute")
    mute.click()
    expect(page.get_by_text("lets chatd store nothing").last).to_be_visible()
    expect(mute).not_to_be_checked()
    page.keyboard.press("Escape")
    field(page).fill("A draft in memory")
    with page.expect_event("dialog") as question:
        page.close(run_before_unload=True)
    assert question.value.type == "beforeunload"
    question.value.accept()


# --- reading and writing -------------------------------------------------------------


def resize(width: int, height: int) -> Callable[[Page], None]:
    return lambda page: page.set_viewport_size({"width": width, "height": height})


def write_five_lines(page: Page) -> None:
    for line in range(5):
        field(page).press_sequentially(f"Line {line}")
        field(page).press("Shift+Enter")


def leave_and_come_back(page: Page) -> None:
    page.go_back()
    page.go_forward()


def open_keyboard_over_the_page(page: Page) -> None:
    """Open it as iOS does: the page keeps its size, and less of it is visible."""
    page.evaluate(
        """() => {
            Object.defineProperties(visualViewport, {
                height: { value: 300 }, scale: { value: 1 } });
            visualViewport.dispatchEvent(new Event("resize"));
        }"""
    )
    box = page.locator("#composer").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= 300


CHANGES_OF_SIZE: dict[str, tuple[Callable[[Page], None], ...]] = {
    "the field grows": (write_five_lines,),
    "the field grows and shrinks": (
        write_five_lines,
        lambda page: field(page).fill("One"),
        lambda page: field(page).press("End"),
        lambda page: field(page).press("Backspace"),
    ),
    "a message of six lines is sent": (
        write_five_lines,
        lambda page: field(page).press_sequentially("End"),
        lambda page: field(page).press("Enter"),
    ),
    "a long text is pasted and deleted": (
        lambda page: field(page).fill("line\n" * 200),
        lambda page: field(page).fill(""),
    ),
    "the window becomes narrow": (resize(400, 700),),
    "the window becomes low and high again": (resize(1100, 300), resize(1100, 900)),
    "the window becomes wide": (resize(500, 500), resize(1400, 500)),
    "the screen is turned": (resize(360, 740), resize(740, 360), resize(360, 740)),
    "a keyboard opens": (resize(360, 740), resize(360, 400)),
    "a keyboard opens over the page": (open_keyboard_over_the_page,),
    "the chat is left and opened again": (write_five_lines, leave_and_come_back),
    "the letters become larger": (
        lambda page: page.evaluate("document.documentElement.style.fontSize = '150%'"),
    ),
}


@pytest.mark.parametrize("change", CHANGES_OF_SIZE)
def test_a_reader_at_the_end_stays_there_whatever_changes_its_size(
    server: Server, chromium: Chromium, change: str
) -> None:
    anna, ben, chat = long_chat(server)
    page = sign_in(chromium.context(), server.link(anna), chat)
    expect(bubbles(page).last).to_be_in_viewport()
    for step in CHANGES_OF_SIZE[change]:
        step(page)
        expect(bubbles(page).last).to_be_in_viewport()
        expect(page.locator("#jump")).to_be_hidden()
    server.post(chat, ben, "The answer")
    expect(page.get_by_text("The answer", exact=True).last).to_be_in_viewport()
    until(lambda: unread(server, anna, chat) == 0)


@pytest.mark.parametrize(
    "change",
    ["the field grows", "the window becomes narrow", "the screen is turned",
     "the letters become larger", "a keyboard opens over the page"],
)  # fmt: skip
def test_a_reader_of_older_messages_keeps_the_place(
    server: Server, chromium: Chromium, change: str
) -> None:
    anna, ben, chat = long_chat(server)
    page = sign_in(chromium.context(), server.link(anna), chat)
    expect(bubbles(page).last).to_be_in_viewport()
    page.evaluate("scroller.scrollTop -= 600")
    expect(page.locator("#jump")).to_be_visible()
    top = """() => [...document.querySelectorAll("#messages .message")].find(
        (row) => row.getBoundingClientRect().bottom
               > scroller.getBoundingClientRect().top).dataset.n"""
    before = page.evaluate(top)
    for step in CHANGES_OF_SIZE[change]:
        step(page)
    server.post(chat, ben, "The answer")
    expect(page.locator("#jump-text")).to_have_text("1 new message")
    assert page.evaluate(top) == before


def test_each_chat_has_its_draft_and_the_field_its_height(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, first = pair(server)
    second = server.create_chat(anna, ben, title="Second")
    server.post(first, ben, "Hello")
    page = sign_in(chromium.context(), server.link(anna), first)
    until(lambda: unread(server, anna, first) == 0)  # or else no draft is shown

    def height() -> float:
        box = field(page).bounding_box()
        assert box is not None
        return box["height"]

    low = height()
    field(page).fill("One\nTwo\nThree\nFour")
    high = height()
    assert high > low + 40
    open_chat(page, second)
    expect(field(page)).to_have_value("")
    assert height() == low
    expect(page.locator(f"[href='#chat/{first}'] .row-last")).to_have_text(
        "Draft: One Two Three Four"
    )
    field(page).fill("Short")
    open_chat(page, first)
    expect(field(page)).to_have_value("One\nTwo\nThree\nFour")
    assert height() == high
    field(page).fill("word " * 2_000)
    assert height() < 250  # and the rest scrolls
    write(page, "Sent")
    assert height() == low
    open_chat(page, second)
    expect(field(page)).to_have_value("Short")
    last = page.locator(f"#chat-list [href='#chat/{first}'] .row-last")
    expect(last).to_have_text("You: Sent")


def reload(page: Page, server: Server, user: int) -> Page:
    page.reload()
    return page


def open_a_new_tab(page: Page, server: Server, user: int) -> Page:
    page.close()
    return sign_in(page.context, server.url)


def end_the_session(page: Page, server: Server, user: int) -> Page:
    old = {"token": server.token(user, exp=1), "user_id": user, "name": "Anna"}
    page.evaluate(
        """(old) => { for (const storage of [sessionStorage, localStorage])
            storage["chatd.session"] = JSON.stringify(old); }""",
        old,
    )
    page.reload()
    expect(page.get_by_text("Your session has ended.")).to_be_visible()
    page.goto(server.link(user))
    return page


def sign_out_in_another_tab(page: Page, server: Server, user: int) -> Page:
    other = sign_in(page.context, server.url)
    other.locator("#me").click()
    expect(other.locator("#drafts-text")).to_have_text(
        "Drafts kept in this browser: 1."
    )
    other.get_by_role("button", name="Sign out").click()
    expect(
        other.get_by_text("You are signed out. Drafts kept in this browser: 1.")
    ).to_be_visible()
    expect(page.get_by_text("You signed out in another tab.")).to_be_visible()
    page.goto(server.link(user))
    return page


@pytest.mark.parametrize(
    "end", [reload, open_a_new_tab, end_the_session, sign_out_in_another_tab]
)
def test_a_draft_survives(
    server: Server, chromium: Chromium, end: Callable[[Page, Server, int], Page]
) -> None:
    anna, ben, chat = pair(server)
    context = chromium.context()
    page = sign_in(context, server.link(anna), chat)
    expect_state(page, "connected")
    field(page).fill("Half a sente")
    page = end(page, server, anna)
    expect(page.locator("#chat-list .row")).to_be_visible()
    page.goto(f"{server.url}/#chat/{chat}")
    expect(field(page)).to_have_value("Half a sente")
    bens = sign_in(context, server.link(ben), chat)  # in the same browser
    expect(field(bens)).to_have_value("")
    write(page, "A whole sentence")
    page.reload()
    expect(bubbles(page)).to_have_text(["A whole sentence"])
    expect(field(page)).to_have_value("")


def test_a_draft_is_written_and_sent_in_any_tab_and_can_be_deleted(
    server: Server, chromium: Chromium
) -> None:
    anna, _, chat = pair(server)
    context = chromium.context()
    first = sign_in(context, server.link(anna), chat)
    second = sign_in(context, server.url, chat)
    field(first).fill("To be sent")
    expect(field(second)).to_have_value("To be sent")
    field(second).press("Enter")
    expect(bubbles(first)).to_have_text(["To be sent"])
    expect(field(first)).to_have_value("")  # or it would be sent twice
    field(first).fill("Never to be sent")
    first.locator("#me").click()
    first.get_by_role("button", name="Delete drafts").click()
    question = first.get_by_role("dialog", name="Delete drafts")
    question.get_by_role("button", name="Delete").click()
    for tab in (first, second):
        expect(field(tab)).to_have_value("")
    assert first.evaluate("Object.keys(localStorage)") == ["chatd.session"]
    first.locator("#me").click()
    expect(first.locator("#drafts")).to_be_hidden()


def test_drafts_take_a_bounded_part_of_the_storage(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, first = pair(server)
    second = server.create_chat(anna, ben, title="Second")
    page = sign_in(chromium.context(), server.link(anna), first)
    page.evaluate(
        """() => { for (let i = 1; i <= 20; i++) localStorage[`chatd.draft.9.${i}`] =
            JSON.stringify({ text: "x".repeat(50_000), at: i }); }"""
    )
    newest = "The newest " * 50_000  # it is longer than all others may be together
    field(page).fill(newest)
    open_chat(page, second)
    kept = page.evaluate("Object.keys(localStorage)")
    assert {f"chatd.draft.9.{i}" for i in range(12, 21)} < set(kept)
    assert f"chatd.draft.{anna}.{first}" in kept
    assert "chatd.draft.9.11" not in kept
    page.evaluate("() => { Storage.prototype.setItem = () => { throw Error('full') } }")
    field(page).fill("Not stored")
    open_chat(page, first)
    expect(field(page)).to_have_value(newest)
    open_chat(page, second)
    expect(field(page)).to_have_value("Not stored")


def test_a_touch_on_send_leaves_the_keyboard_open(
    server: Server, chromium: Chromium
) -> None:
    anna, _, chat = pair(server)
    page = sign_in(chromium.context(has_touch=True), server.link(anna), chat)
    send = page.get_by_role("button", name="Send")
    for text in ("One", "Two"):
        field(page).tap()
        field(page).fill(text)
        send.tap()
        expect(field(page)).to_be_focused()
        expect(field(page)).to_have_value("")
    field(page).fill("Three")
    send.click()
    expect(field(page)).to_be_focused()
    field(page).fill("Four")
    field(page).press("Tab")
    expect(send).to_be_focused()
    page.keyboard.press("Space")
    expect(bubbles(page)).to_have_text(["One", "Two", "Three", "Four"])


def test_editing_a_failed_message_keeps_what_is_being_written(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server("--max-content-chars", "20")
    anna, _, chat = pair(server)
    page = sign_in(chromium.context(), server.link(anna), chat)
    write(page, "This is longer than twenty characters")
    edit = page.get_by_role("button", name="Edit")
    expect(edit).to_be_visible()
    field(page).fill("Half a sente")
    edit.click()
    both = "This is longer than twenty characters\nHalf a sente"
    expect(field(page)).to_have_value(both)
    expect(field(page)).to_be_focused()
    expect(page.locator(".failed")).to_have_count(0)
    page.reload()
    expect(field(page)).to_have_value(both)
    write(page, "Half a sentence")
    expect(bubbles(page)).to_have_text("Half a sentence")


@pytest.mark.parametrize(
    "enter",
    ["{ isComposing: true, keyCode: 229 }",  # Chromium, Firefox
     "{ isComposing: false, keyCode: 229 }",  # Safari: after compositionend
     "{ isComposing: true, keyCode: 13 }"],
)  # fmt: skip
def test_the_enter_of_an_input_method_sends_and_chooses_nothing(
    make_server: Callable[..., Server], chromium: Chromium, enter: str
) -> None:
    server = make_server()
    anna, _, chat = pair(server)
    server.add_user("にほん")
    page = sign_in(chromium.context(), server.link(anna), chat)
    press = f"""(node) => node.dispatchEvent(new KeyboardEvent("keydown",
        {{ key: "Enter", bubbles: true, cancelable: true, ...{enter} }}))"""
    field(page).fill("にほん")
    field(page).evaluate(press)
    expect(field(page)).to_have_value("にほん")
    field(page).press("Enter")
    expect(bubbles(page)).to_have_text(["にほん"])
    page.get_by_role("button", name="New chat").click()
    page.get_by_label("Find people").fill("にほ")
    page.get_by_label("Find people").evaluate(press)
    expect(page.locator("#people-list :checked")).to_have_count(0)
    expect(page.locator("#people-error")).to_be_empty()


def test_enter_chooses_the_first_person_that_was_found(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server()
    names = ("Anna", "Ben", "Zoltán Kis", "Zora Kis")
    anna, *_ = [server.add_user(name) for name in names]
    page = sign_in(chromium.context(), server.link(anna))
    page.get_by_role("button", name="New chat").click()
    dialog = page.get_by_role("dialog", name="New chat")
    find = dialog.get_by_label("Find people")
    found, chosen = dialog.locator(".next"), dialog.locator("li:has(:checked)")
    for text, name in (("zoltan", "Zoltán Kis"), ("\uff2bIS", "Zora Kis")):
        find.fill(text)
        expect(found).to_contain_text(name)
        find.press("Enter")
        expect(chosen.filter(has_text=name)).to_be_visible()
        expect(find).to_have_value("")
        expect(find).to_be_focused()
    find.fill("nobody")
    expect(dialog.get_by_text("No one here is called “nobody”.")).to_be_visible()
    find.press("Enter")
    find.fill("zora")  # chosen already
    find.press("Enter")
    expect(find).to_have_value("")
    expect(chosen).to_have_count(2)
    expect(page.locator("#people-error")).to_be_empty()
    find.press("Enter")
    expect(page.locator("#pane-members")).to_have_text("Zoltán Kis, Zora Kis, you")


def test_the_list_marks_messages_that_wait_and_that_failed(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server("--max-content-chars", "20")
    anna, ben, first = pair(server)
    second = server.create_chat(anna, ben, title="Second")
    server.post(first, ben, "Stored")
    page = chromium.page(clock=True)
    relay = Relay.connected(page, server.link(anna), first)
    page.route(re.compile("/api/"), lambda route: route.abort())
    relay.cut(1011, block=True)
    row = page.locator(f"#chat-list [href='#chat/{first}'] .row-last")
    write(page, "Written offline")
    expect(row).to_have_text("SendingYou: Written offline")
    open_chat(page, second)
    expect(row).to_have_text("SendingYou: Written offline")
    expect(page.locator("#chat-list .row").first).to_contain_text("Written offline")
    open_chat(page, first)
    write(page, "Longer than twenty characters")
    open_chat(page, second)
    come_back(page, relay)
    expect(row).to_have_text("Not sent: Longer than twenty characters")
    toast = page.locator(".toast")
    expect(toast).to_contain_text("Ben: Not sent: Too long by 9")
    open_chat(page, first)
    page.get_by_role("button", name="Delete").click()
    expect(row).to_have_text("You: Written offline")


def test_a_window_without_the_focus_reads_nothing(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    page = sign_in(chromium.context(), server.link(anna), chat)
    # Playwright says of every page that it has the focus.
    page.evaluate(
        """() => { window.focused = false; document.hasFocus = () => window.focused;
                   dispatchEvent(new Event("blur")); }"""
    )
    message = server.post(chat, ben, "Are you there?")
    expect(bubbles(page).last).to_be_in_viewport()
    expect(page).to_have_title("(1) Ben · chatd")
    expect(page.locator(".divider")).to_have_text("New messages")
    field(page).focus()
    assert unread(server, anna, chat) == 1
    page.evaluate("() => { window.focused = true; dispatchEvent(new Event('focus')); }")
    expect(page).to_have_title("Ben · chatd")
    until(lambda: unread(server, anna, chat) == 0)
    assert message["n"] == 1


def test_a_message_under_a_dialog_is_not_read_before_the_dialog_closes(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    page = sign_in(chromium.context(), server.link(anna), chat)
    page.get_by_role("button", name="People in this chat").click()
    server.post(chat, ben, "Are you there?")
    expect(page.locator(".divider")).to_have_text("New messages")
    expect(page).to_have_title("(1) Ben · chatd")
    assert unread(server, anna, chat) == 1
    page.keyboard.press("Escape")
    expect(page).to_have_title("Ben · chatd")
    until(lambda: unread(server, anna, chat) == 0)


def test_errors_are_in_the_pages_own_words(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server("--max-content-chars", "100")
    anna, _, chat = pair(server)
    server.add_user("Cora")
    page = sign_in(chromium.context(), server.link(anna), chat)
    count = page.locator("#composer-count")
    write(page, "x" * 1_101)
    failure = page.locator(".failed .failure")
    expect(failure).to_contain_text("Too long by 1,001: at most 100 characters fit.")
    field(page).fill("x" * 89)  # the server has said what it allows
    expect(count).to_be_empty()
    field(page).fill("x" * 90)
    expect(count).to_have_text("90 of 100 characters")
    field(page).fill("𝒳" * 100)
    expect(count).to_have_text("100 of 100 characters")
    field(page).fill("𝒳" * 101)
    expect(count).to_have_text("Too long by 1: at most 100 characters fit.")
    field(page).fill("𝒳" * 100 + "  \n")
    field(page).press("Enter")
    expect(ticks(page)).to_have_text(["Sent", "Not sent"])
    expect(count).to_be_empty()
    for status, code, sentence, words in (
        (400, "bad_field", "member_ids: 9 members; at most 8", "at most 8 people"),
        (404, "not_found", "user_id: there is no such user", "no longer exists"),
        (429, "rate_limited", "too many at once: slow down", "cannot take this now"),
        (503, "overloaded", "the server is full", "cannot take this now"),
        (
            418,
            "teapot",
            "short and stout",
            "Something went wrong on the server. Try again later.",
        ),
    ):
        body = {"error": {"code": code, "message": sentence}}
        answer = functools.partial(refuse, status=status, body=body)
        page.route(re.compile("/members"), answer)
        page.get_by_role("button", name="People in this chat").click()
        page.get_by_role("button", name="Add people").click()
        page.get_by_label("Cora").check()
        page.get_by_role("button", name="Add", exact=True).click()
        expect(page.locator("#people-error")).to_contain_text(words)
        page.get_by_role("button", name="Cancel").click()
        page.unroute_all()


def test_the_page_learns_the_longest_message_from_the_server(
    server: Server, chromium: Chromium
) -> None:
    anna, _, chat = pair(server)
    page = chromium.page()
    me = {"user_id": anna, "name": "Anna", "server": {"max_content_chars": 10_000}}
    page.route(re.compile("/v1/me$"), lambda route: route.fulfill(json=me))
    page.goto(server.link(anna))
    open_chat(page, chat)
    field(page).fill("x" * 9_000)
    expect(page.locator("#composer-count")).to_have_text("9,000 of 10,000 characters")


# --- content of every kind -----------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["\u3164", "\u200b", "\u2800\u2800", "\u115f\u1160", "\ufeff\u200b", "\u00ad\u034f",
     "\u202e\u2066", "\u2063", "\ufe0f", "\U000e0020", "\u180e", "\uffa0"],
    ids=ascii,
)  # fmt: skip
def test_a_message_of_which_nothing_can_be_seen_is_shown_as_blank(
    server: Server, chromium: Chromium, content: str
) -> None:
    anna, ben, chat = pair(server)
    page = sign_in(chromium.context(), server.link(anna), chat)
    write(page, f"{content}  {content}")
    expect(page.locator(".toast")).to_have_text("Not sent: (blank message)")
    page.request.post(
        f"{server.url}/api/v1/chats/{chat}/messages",
        data={"content": content},
        headers={"Authorization": f"Bearer {server.token(ben)}"},
    )
    expect(bubbles(page)).to_have_text(["(blank message)"])
    expect(page.locator("#chat-list .row-last")).to_have_text("(blank message)")
    expect(page.locator("#announcer")).to_contain_text("Ben: (blank message)")


def test_marks_above_and_below_letters_stay_in_their_bubble(
    server: Server, chromium: Chromium
) -> None:
    anna, ben = server.add_user("Anna"), server.add_user("Ben")
    page = sign_in(chromium.context(reduced_motion="reduce"), server.link(anna))
    pictures = []
    for marks in ("", "\u0301\u0316" * 60):
        chat = server.create_chat(anna, ben)
        open_chat(page, chat)
        for text in ("above", f"Z{marks} and\nZ{marks}", "below"):
            server.post(chat, ben, text)
        expect(bubbles(page)).to_have_count(3)
        pictures.append([bubbles(page).nth(i).screenshot() for i in (0, 2)])
    assert pictures[0] == pictures[1]


def test_a_long_name_is_never_cut_off(server: Server, chromium: Chromium) -> None:
    me, other = server.add_user("x" * 64), server.add_user("y" * 64)
    chat = server.create_chat(me, other)
    server.post(chat, other, "Hello")
    context = chromium.context(viewport={"width": 320, "height": 640})
    page = sign_in(context, server.link(me), chat)
    for part in (".sender", "#me-panel-name"):
        if part != ".sender":
            page.locator(".back").click()  # the top is there without an open chat
            page.locator("#me").click()
        name = page.locator(part).first
        expect(name).to_be_visible()
        assert name.evaluate("(node) => node.scrollWidth <= node.clientWidth")


def test_a_very_long_message_is_folded(server: Server, chromium: Chromium) -> None:
    anna, ben, chat = pair(server)
    page = sign_in(chromium.context(), server.link(anna), chat)
    server.post(chat, ben, "\n".join(f"{i}" for i in range(30)))
    server.post(chat, ben, "\n".join(f"{i}" for i in range(1_000)))
    server.post(chat, anna, "word " * 300)
    fold = page.locator(".fold:visible")
    expect(fold).to_have_count(1)  # the other ones have less than 40 lines
    folded = page.locator("[data-n='2'] .bubble")

    def height() -> float:
        box = folded.bounding_box()
        return box["height"] if box else 0

    assert height() < 1_100
    fold.click()
    until(lambda: height() > 20_000)
    expect(page.locator("#messages").get_by_text("999")).to_be_attached()
    server.post(chat, ben, "Meanwhile")  # renders anew, and moves nothing
    expect(page.locator("#jump-text")).to_have_text(re.compile("new message"))
    assert height() > 20_000
    fold.click()
    until(lambda: height() < 1_100)
    page.set_viewport_size({"width": 320, "height": 700})
    expect(fold).to_have_count(2)  # now the words of the third have more lines


def test_the_first_line_of_a_pasted_block_keeps_its_indent(
    server: Server, chromium: Chromium
) -> None:
    anna, _, chat = pair(server)
    page = sign_in(chromium.context(), server.link(anna), chat)
    for text in (
        "    if x:\n        y()\n",
        "\n \n\tone\n\n\ttwo  \n",
        "　全角",
        " \n ",
    ):
        write(page, text)
    expect(ticks(page)).to_have_text(["Sent"] * 3)
    texts = ["    if x:\n        y()", "\tone\n\n\ttwo", "　全角"]
    assert server.texts(chat, anna) == texts
    assert bubbles(page).all_inner_texts() == texts
    expect(field(page)).to_have_value(" \n ")  # nothing to send


LOW_SCREENS = [(320, 256), (667, 320), (568, 250), (844, 200), (1280, 250)]


@pytest.mark.parametrize(("width", "height"), LOW_SCREENS)
@pytest.mark.parametrize("state", ["connected", "offline"])
def test_on_a_low_screen_a_message_is_visible_while_one_writes(
    server: Server, chromium: Chromium, width: int, height: int, state: str
) -> None:
    anna, ben, chat = pair(server)
    server.post(chat, ben, "One")
    server.post(chat, ben, "Two")
    context = chromium.context(viewport={"width": width, "height": height})
    page = context.new_page()
    page.clock.install()
    page.goto(server.url)
    page.get_by_label("Sign-in link").scroll_into_view_if_needed()
    page.mouse.wheel(0, 400)
    expect(page.get_by_role("button", name="Sign in")).to_be_in_viewport(ratio=1)
    page.goto("about:blank")
    relay = Relay.connected(page, server.link(anna), chat)
    expect(bubbles(page).first).to_be_in_viewport()  # the first new message
    if state == "offline":
        go_offline(page, relay)
    write(page, "Three")
    field(page).fill("Line\n" * 8)
    expect(bubbles(page).last).to_be_in_viewport(ratio=1)
    expect(page.get_by_role("button", name="Send")).to_be_in_viewport(ratio=1)
    screenshot(page, f"low-{width}x{height}-{state}")
    axe(page)


LINKS: dict[str, list[str]] = {
    # text: the links in it; for an address that the page completes: text -> address
    "https://example.com/foo。次の文": ["https://example.com/foo"],
    "見て：https://example.com/foo、それと": ["https://example.com/foo"],
    "（https://example.com/foo）「https://example.com/b」": [
        "https://example.com/foo", "https://example.com/b"],
    "【https://example.com】！ https://example.com？": [
        "https://example.com", "https://example.com"],
    "https://example.comを見て": ["https://example.com"],
    "https://example.com:8080を見て": ["https://example.com:8080"],
    "https://example.com's https://example.com,thanks www.example.com!So": [
        "https://example.com", "https://example.com",
        "www.example.com -> https://www.example.com"],
    "https://user:p,a'ss@example.com/x http://localhost:8086|x": [
        "https://user:p,a'ss@example.com/x", "http://localhost:8086"],
    "https://example.com👍 https://example.com/a👍🏽 https://example.com/❤️ "
    "https://example.com/b👨‍👩‍👧🇩🇪! https://example.com.🎉 https://i❤.ws/☎️/x": [
        "https://example.com", "https://example.com/a", "https://example.com/",
        "https://example.com/b", "https://example.com", "https://i❤.ws/☎️/x"],
    "https://ja.wikipedia.org/wiki/日本・東京。": ["https://ja.wikipedia.org/wiki/日本・東京"],
    "https://例え.jp/パス": ["https://例え.jp/パス"],
    "https://example.com/a؟ https://example.com/b، c।": [
        "https://example.com/a", "https://example.com/b"],
    "«https://example.com/» „https://example.org/“": [
        "https://example.com/", "https://example.org/"],
    "https://example.com—yes https://example.com/…": [
        "https://example.com", "https://example.com/"],
    "[text](https://example.com/a).": ["https://example.com/a"],
    "[https://example.com/a] {https://example.com/b} <https://example.com/c>": [
        "https://example.com/a", "https://example.com/b", "https://example.com/c"],
    "(see https://en.wikipedia.org/wiki/Foo_(bar))": [
        "https://en.wikipedia.org/wiki/Foo_(bar)"],
    "https://example.com/a_(b)?c=1&d=2#e, (http://example.net/x)": [
        "https://example.com/a_(b)?c=1&d=2#e", "http://example.net/x"],
    "https://example.com/a[1]{2}": ["https://example.com/a[1]{2}"],
    "https://example.com/a` **https://example.com/b** ~~https://example.com/c~~": [
        "https://example.com/a", "https://example.com/b", "https://example.com/c"],
    "_https://example.com/a_b_ https://example.com/__init__": [
        "https://example.com/a_b", "https://example.com/__init__"],
    "**https://example.com/a**b": ["https://example.com/a"],
    "'https://example.com/a','https://example.com/it's'": [
        "https://example.com/a", "https://example.com/it"],
    "https://example.com/it's ‘https://example.com/b’": [
        "https://example.com/it's", "https://example.com/b"],
    "https://fr.wikipedia.org/wiki/L’Été": ["https://fr.wikipedia.org/wiki/L’Été"],
    '"https://example.com/a" “https://example.com/b”': [
        "https://example.com/a", "https://example.com/b"],
    "https://example.com/a,https://example.com/b;http://example.com/c": [
        "https://example.com/a", "https://example.com/b", "http://example.com/c"],
    "https://web.archive.org/web/2020/https://example.com/": [
        "https://web.archive.org/web/2020/https://example.com/"],
    "https://example.com/a?!... https://example.com/b:": [
        "https://example.com/a", "https://example.com/b"],
    "https://example.com/a\u200bhttps://example.com/b\u202e": [
        "https://example.com/a", "https://example.com/b"],
    "HTTPS://EXAMPLE.COM/ü!": ["HTTPS://EXAMPLE.COM/ü"],
    "http://localhost:8086/#x http://127.0.0.1:80/ http://[::1]:8086/a": [
        "http://localhost:8086/#x", "http://127.0.0.1:80/", "http://[::1]:8086/a"],
    "www.example.com, (WWW.example.org/a_(b)). www.example.com。": [
        "www.example.com -> https://www.example.com",
        "WWW.example.org/a_(b) -> https://WWW.example.org/a_(b)",
        "www.example.com -> https://www.example.com"],
    "www. www.example xwww.example.com //www.example.com @www.example.com": [],
    "Mail anna.b+c@example.co.uk. メールはa@example.comへ <b@example.org>": [
        "anna.b+c@example.co.uk -> mailto:anna.b+c@example.co.uk",
        "a@example.com -> mailto:a@example.com",
        "b@example.org -> mailto:b@example.org"],
    "mailto:o'neil@example.com, 'x@bücher.example' почта@пример.рф a@пример.рф!": [
        "o'neil@example.com -> mailto:o'neil@example.com",
        "x@bücher.example -> mailto:x@bücher.example",
        "a@пример.рф -> mailto:a@пример.рф"],
    "git@github.com:org/repo ssh://git@example.com/x @a@example.social a@b é@a.de": [],
    "javascript:alert(1) data:text/html,x ftp://a.example xhttps://a.example": [],
    "https://[broken https:// http://. https://??? https://example.com:99999": [],
    "javascript:alert('https://example.com/a')": ["https://example.com/a"],
    "https://a.example\\@b.example": ["https://a.example"],
    "<a href=https://example.com/>": ["https://example.com/"],
}  # fmt: skip


def test_addresses_in_a_text_become_links(server: Server, chromium: Chromium) -> None:
    anna, ben, chat = pair(server)
    page = sign_in(chromium.context(), server.link(anna), chat)
    for text in LINKS:
        server.post(chat, ben, text)
    expect(bubbles(page)).to_have_text(list(LINKS))  # nothing is lost
    found = page.evaluate(
        """() => [...document.querySelectorAll("#messages .content")].map((content) =>
            [...content.querySelectorAll("a")].map((link) => {
                const [text, address] = [link.textContent, link.getAttribute("href")];
                return text === address ? text : `${text} -> ${address}`;
            }))"""
    )
    wrong = {
        text: links for (text, right), links in zip(LINKS.items(), found, strict=True)
        if links != right
    }  # fmt: skip
    assert wrong == {}
    for link in bubbles(page).locator("a[href^=http]").all()[:3]:
        expect(link).to_have_attribute("rel", re.compile("noopener"))
        expect(link).to_have_attribute("target", "_blank")


def test_hostile_text_for_the_links_costs_no_time(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    page = sign_in(chromium.context(), server.link(anna), chat)
    # Each is as long as a message may be, and made for a search that goes back.
    parts = (
        "https://)",
        "a@",
        "a.",
        "www.",
        "a'",
        "-@a.",
        "https://a,",
        "(",
        "a-",
        "あ@",
    )
    texts = [(part * 4_000)[:3_990] + " https://example.com" for part in parts]
    for text in texts:
        server.post(chat, ben, text[:4_000])
    expect(bubbles(page)).to_have_count(len(texts))
    page.evaluate("performance.mark('before')")
    page.reload()
    expect(bubbles(page)).to_have_count(len(texts))


# --- times ---------------------------------------------------------------------------


def test_days_and_times_follow_the_clock_and_the_time_zone(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    server.post(chat, ben, "Hello")
    page = chromium.page(clock=True)
    page.goto(server.link(anna))
    open_chat(page, chat)
    day, row = page.locator("#messages .day"), page.locator("#chat-list .row-time")
    expect(day).to_have_text("Today")
    expect(row).to_have_text(re.compile(r"^\d+:\d\d"))
    stamp = page.locator("#messages time")
    before = stamp.inner_text()
    zone = "Asia/Kolkata"  # half an hour beside most others
    cdp = page.context.new_cdp_session(page)
    cdp.send("Emulation.setTimezoneOverride", {"timezoneId": zone})
    page.clock.run_for(1_100)
    expect(stamp).not_to_have_text(before)
    expect(stamp).to_have_attribute("title", re.compile(re.escape(stamp.inner_text())))
    cdp.send("Emulation.setTimezoneOverride", {"timezoneId": ""})
    page.clock.run_for(1_100)
    expect(stamp).to_have_text(before)
    page.clock.fast_forward("26:00:00")  # the computer has slept
    expect(day).not_to_have_text("Today")
    expect(row).to_have_text(re.compile(r"^[A-Z][a-z]{2} \d+$"))
    page.clock.fast_forward(24 * 3_600_000)
    expect(day).to_have_text(re.compile("day, "))
    page.clock.fast_forward(400 * 24 * 3_600_000)
    expect(row).to_have_text(re.compile(r"^[A-Z][a-z]{2} \d+, 20\d\d$"))


def test_a_day_that_a_clock_repeats_has_one_row_each_time(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    for day in ("2024-11-20", "2130-11-21", "2024-11-20"):
        server.post(chat, ben, f"{day}T12:00:00Z")
    page = chromium.page()

    def set_times(route: Route) -> None:
        answer = route.fetch().json()
        for message in answer["messages"]:
            message["created_at"] = message["content"]
        route.fulfill(json=answer)

    page.route(re.compile("/messages"), set_times)
    page.goto(server.link(anna))
    open_chat(page, chat)
    days = page.locator("#messages .day")
    before = ["November 20, 2024", "November 21, 2130", "November 20, 2024"]
    expect(days).to_have_text(before)
    server.post(chat, ben, "Now")
    expect(bubbles(page)).to_have_count(4)
    expect(days).to_have_text([*before, "Today"])


@pytest.mark.parametrize("locale", ["en-US", "en-GB", "de-DE", "ar-EG", "ja-JP"])
def test_the_clock_and_its_tooltip_are_of_one_locale(
    server: Server, chromium: Chromium, locale: str
) -> None:
    anna, ben, chat = pair(server)
    server.post(chat, ben, "Hello")
    page = sign_in(chromium.context(locale=locale), server.link(anna), chat)
    stamp = page.locator("#messages time")
    text = stamp.inner_text()
    pattern = r"\d\d?:\d\d\s[AP]M" if locale in ("en-US", "ar-EG") else r"\d\d:\d\d"
    assert re.fullmatch(pattern, text, re.IGNORECASE)
    assert text in str(stamp.get_attribute("title"))


# --- a page that cannot start --------------------------------------------------------


@pytest.mark.parametrize("file", ["app.js", "chat-websocket.js"])
@pytest.mark.parametrize(
    "answer",
    [{"status": 404}, {"content_type": "text/javascript", "body": "let x = ?;"}, None],
    ids=["missing", "not understood", "blocked"],
)
def test_a_script_that_does_not_load_ends_in_words(
    server: Server, chromium: Chromium, file: str, answer: dict[str, Any] | None
) -> None:
    page = chromium.context(reduced_motion="reduce").new_page()
    chromium.hurry(page)  # the words come after 4 s
    page.route(f"**/web/{file}", lambda r: r.fulfill(**answer) if answer else r.abort())
    page.goto(server.url)
    expect(page.get_by_text("Reload the page.")).to_be_visible()
    chromium.errors.clear()


def test_without_scripts_the_page_says_what_it_needs(
    server: Server, chromium: Chromium
) -> None:
    page = chromium.context(java_script_enabled=False).new_page()
    page.goto(server.url)
    words = page.get_by_text("needs JavaScript and a recent browser.")
    expect(words).to_be_in_viewport(ratio=1)
    expect(words).to_be_visible()


THROW = (
    "() => { throw new DOMException('The operation is insecure.', 'SecurityError') }"
)
FORBIDDEN = {
    "storage": "for (const name of ['localStorage', 'sessionStorage', 'indexedDB'])"
    f" Object.defineProperty(window, name, {{ get: {THROW} }});",
    "channels": f"window.BroadcastChannel = function () {{ ({THROW})() }}",
    "no channels": "delete window.BroadcastChannel",
    "locks": f"Object.defineProperty(navigator, 'locks', {{ get: {THROW} }})",
    "workers": f"Object.defineProperty(navigator, 'serviceWorker', {{ get: {THROW} }})",
    "no viewport": "Object.defineProperty(window, 'visualViewport', { value: null })",
    "no notifications": "delete window.Notification",
    "undefined notifications": "window.Notification = undefined",
    "strange languages": "Object.defineProperty(navigator, 'languages',"
    " { value: ['en-US@posix', 'C'] })",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_a_browser_that_forbids_much_can_chat(
    server: Server, chromium: Chromium, what: str
) -> None:
    anna, ben, chat = pair(server)
    page = chromium.page()
    page.add_init_script(FORBIDDEN[what])
    page.goto(server.link(anna))
    open_chat(page, chat)
    write(page, "Hello")
    expect(ticks(page)).to_have_text("Sent")
    server.post(chat, ben, "Hello Anna")
    expect(bubbles(page)).to_have_text(["Hello", "Hello Anna"])
    page.locator("#me").click()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_text("You are signed out.")).to_be_visible()


BROKEN = {
    "observers": "delete window.ResizeObserver",
    "times": f"Intl.DateTimeFormat = {THROW}",
    "popovers": "for (const name of ['showPopover', 'hidePopover', 'popover'])"
    " delete HTMLElement.prototype[name];",
    "rows": f"Element.prototype.append = {THROW}",
    "addresses": f"window.URL = {THROW}",
    "answers": "Response.prototype.json = async () => ({ chats: 5 })",
    "titles": f"Object.defineProperty(document, 'title', {{ set: {THROW} }})",
    "elements": "document.getElementById = () => null",
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("visit", ["first", "next"])
def test_an_exception_while_loading_ends_in_words(
    server: Server, chromium: Chromium, what: str, visit: str
) -> None:
    anna, ben, chat = pair(server)
    server.post(chat, ben, "Hello")
    context = chromium.context()
    if visit == "next":
        sign_in(context, server.link(anna)).close()
    page = context.new_page()
    chromium.hurry(page)  # the words of some come after 4 s
    page.add_init_script(BROKEN[what])
    page.goto(server.link(anna) if visit == "first" else server.url)
    words = re.compile("recent browser|Sign in|No connection|went wrong")
    expect(page.locator("body")).to_contain_text(words, use_inner_text=True)
    page.close()
    chromium.errors.clear()


# --- what the server can do to a connection ------------------------------------------


def test_a_revoked_or_expired_session_leads_to_the_sign_in_page(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, _ = pair(server)
    annas = sign_in(chromium.context(), server.link(anna))
    expect_state(annas, "connected")
    server.request("POST", "/api/v1/internal/chat/revoke", {"user_id": anna})  # 4503
    expect(annas.get_by_text("Your session has ended.")).to_be_visible()
    annas.reload()
    expect(annas.get_by_role("heading", name="Sign in to chatd")).to_be_visible()

    old = json.dumps({"token": server.token(ben, exp=1), "user_id": ben, "name": "Ben"})
    page = chromium.page()
    page.add_init_script(f"localStorage.setItem('chatd.session', {json.dumps(old)})")
    page.goto(server.url)  # 401
    expect(page.get_by_text("Your session has ended.")).to_be_visible()


def test_a_connection_too_many_waits_until_the_user_comes_back(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server("--connections-per-user", "1")
    anna, _, _ = pair(server)
    context = chromium.context()
    first = sign_in(context, server.link(anna))
    expect_state(first, "connected")
    second = context.new_page()
    second.clock.install()
    second.goto(server.url)
    expect_state(second, "too_many")
    expect(second.locator("#banner")).to_contain_text("open in too many places")
    attempts = chromium.console.count("[WebSocket] Connected")
    second.clock.run_for(120_000)
    expect_state(second, "too_many")
    assert chromium.console.count("[WebSocket] Connected") == attempts
    first.close()
    until(lambda: server.stats()["connections"]["active"] == 0)
    second.evaluate("dispatchEvent(new Event('focus'))")
    expect_state(second, "connected")
    expect(second.locator("#banner")).to_be_hidden()


def test_a_message_written_during_a_restart_is_sent_after_it(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server()
    anna, _, chat = pair(server)
    page = chromium.page()
    relay = Relay.connected(page, server.link(anna), chat)
    server.end(signal.SIGTERM)  # bye, then 1012
    write(page, "During the restart")
    server.start()
    expect(ticks(page)).to_have_text("Sent")
    assert [frame["type"] for frame in relay.received].count("bye") == 1
    assert server.texts(chat, anna) == ["During the restart"]


def test_after_bye_the_client_waits_for_retry_after(
    server: Server, chromium: Chromium
) -> None:
    anna, _, _ = pair(server)
    page = chromium.page(clock=True)
    relay = Relay.connected(page, server.link(anna))
    relay.sockets[0].send(json.dumps({"type": "bye", "retry_after": 20}))
    relay.cut(1012)
    page.clock.run_for(5_100)
    expect_state(page, "polling")
    expect(page.locator("#banner")).to_contain_text(
        re.compile("Trying again in 1[45] s")
    )
    page.clock.run_for(13_000)
    expect_state(page, "polling")
    page.clock.run_for(3_000)
    expect_state(page, "connected")


def test_after_a_restore_the_page_shows_the_restored_messages(
    make_server: Callable[..., Server], chromium: Chromium, tmp_path: Path
) -> None:
    server = make_server()
    anna, ben, chat = pair(server)
    page = sign_in(chromium.context(), server.link(anna), chat)
    write(page, "Before")
    expect(ticks(page)).to_have_text("Sent")
    server.run("backup", tmp_path / "backup.db")
    write(page, "Lost")
    expect(ticks(page)).to_have_text(["Sent", "Sent"])
    server.end(signal.SIGKILL)
    server.run("restore", tmp_path / "backup.db")  # a new epoch: a resync
    server.start()
    server.post(chat, ben, "While you were away")
    expect(bubbles(page)).to_have_text(["Before", "While you were away"])
    write(page, "After")
    expect(bubbles(page)).to_have_text(["Before", "While you were away", "After"])


# --- content is text -----------------------------------------------------------------

ATTACKS = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "</li></ol><iframe src=javascript:alert(1)>",
    '"><svg onload=alert(1)>',
    "javascript:alert(1) data:text/html,<script>alert(1)</script>",
    "{{7*7}} ${7*7} &lt;b&gt; &amp;",
    "\u202egnp.exe \u0301\u0301\u0301 🏳️‍🌈 العربية",
]


def test_text_that_users_write_is_never_markup(
    server: Server, chromium: Chromium
) -> None:
    name = "<b>Ben</b>"
    anna, ben = server.add_user("Anna"), server.add_user(name)
    chat = server.create_chat(anna, ben, title="<script>alert(1)</script>")
    page = sign_in(chromium.context(), server.link(anna))
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    open_chat(page, chat)
    for text in ATTACKS:
        server.post(chat, ben, text)
    expect(bubbles(page)).to_have_text(ATTACKS)
    expect(page.locator("#pane-title")).to_have_text("<script>alert(1)</script>")
    expect(page.locator(".sender").first).to_have_text(name)
    markup = page.locator("#chat :is(script, iframe, img, b)")
    expect(markup).to_have_count(0)


def test_the_content_security_policy_blocks_injected_code(
    server: Server, chromium: Chromium
) -> None:
    anna, _, _ = pair(server)
    page = chromium.page()
    answer = page.goto(server.link(anna))
    assert answer is not None
    policy = answer.headers["content-security-policy"]
    for part in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"):
        assert part in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    expect_state(page, "connected")
    assert chromium.errors == []
    page.evaluate(
        """() => {
            window.ran = [];
            const script = document.createElement("script");
            script.textContent = "window.ran.push('inline')";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend",
                "<img src=x onerror='window.ran.push(1)'><p style='color: red'>");
            return fetch("https://example.org/").catch(() => {});
        }"""
    )
    assert page.evaluate("window.ran") == []
    assert len(chromium.errors) >= 3
    chromium.errors.clear()


# --- accessible to everyone ----------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_the_page_fits_each_screen(
    server: Server, chromium: Chromium, example_chats: tuple[int, int], size: str
) -> None:
    width, height = SIZES[size]
    context = chromium.context(
        viewport={"width": width, "height": height}, reduced_motion="reduce"
    )
    anna, chat = example_chats
    page = context.new_page()
    page.clock.install()
    relay = Relay(page)

    def check(view: str) -> None:
        screenshot(page, f"{size}-{view}")

    page.goto(server.url)
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    check("sign-in")
    page.goto(server.link(anna))
    expect_state(page, "connected")
    expect(page.locator("#chat-list .row")).to_have_count(4)
    check("list")
    page.get_by_role("button", name=re.compile("new message")).click()
    expect(page.locator("#bell-panel")).to_be_visible()
    check("bell")
    page.keyboard.press("Escape")
    open_chat(page, chat)
    expect(bubbles(page)).to_have_count(7)
    check("chat")
    page.get_by_role("button", name="People in this chat").click()
    check("people")
    page.keyboard.press("Escape")
    page.route(re.compile("/api/"), lambda route: route.abort())
    relay.cut(1011, block=True)
    write(page, "Typed while the train was in the tunnel: " + "ß" * 60)
    page.clock.run_for(5_100)
    expect_state(page, "offline")
    check("offline")


def test_the_page_can_be_used_with_the_keyboard_alone(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server()  # the dialog lists at most 200 users
    anna, ben, chat = pair(server)
    server.add_user("Cora")
    server.post(chat, ben, "Hello Anna")
    page = sign_in(chromium.context(), server.link(anna))
    expect_state(page, "connected")
    focused = page.locator(":focus")

    def tab_to(name: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            label = focused.evaluate(
                "(e) => e.getAttribute('aria-label') || e.innerText"
            )
            if name in label:
                # the focus must be visible
                width = focused.evaluate("(e) => getComputedStyle(e).outlineWidth")
                assert width != "0px"
                return
        pytest.fail(f"the Tab key does not reach {name}")

    tab_to("Ben")
    page.keyboard.press("Enter")
    expect(field(page)).to_be_focused()
    page.keyboard.type("Hello Ben")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("How are you?")
    page.keyboard.press("Enter")
    expect(bubbles(page)).to_have_text(["Hello Anna", "Hello Ben\nHow are you?"])
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("log", name="Ben")).to_be_focused()
    page.go_back()
    expect(page.locator("#chat-list .row")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name="New chat")).to_be_focused()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="New chat")
    expect(dialog).to_be_visible()
    page.keyboard.type("Cora")
    expect(dialog.get_by_role("checkbox", name="Cora")).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    expect(page.locator("#pane-title")).to_have_text("Cora")
    expect(field(page)).to_be_focused()


def test_nothing_moves_if_the_user_prefers_reduced_motion(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    page = sign_in(chromium.context(reduced_motion="reduce"), server.link(anna))
    open_chat(page, chat)
    server.post(chat, ben, "Hello")
    expect(bubbles(page)).to_have_text(["Hello"])
    moving = "document.getAnimations().filter((a) => a.playState === 'running').length"
    assert page.evaluate(moving) == 0


# --- what the page shows of changes ---------------------------------------------------


def test_the_page_shows_an_edit_a_deletion_and_a_new_title(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server, title="Bike")
    page = chromium.page()
    relay = Relay.connected(page, server.link(anna), chat)
    first, second = (server.post(chat, ben, text) for text in ("One", "Two"))
    expect(bubbles(page)).to_have_text(["One", "Two"])
    last = page.locator("#chat-list .row-last")
    seq = max(frame.get("seq", 0) for frame in relay.received)

    def tell(kind: str, **event: Any) -> None:
        nonlocal seq
        seq += 1
        frame = {"type": kind, "seq": seq, "chat_id": chat, **event}
        relay.sockets[-1].send(json.dumps(frame))

    tell("message_edited", message={**first, "content": "1 <b>", "rev": seq + 1})
    expect(bubbles(page)).to_have_text(["1 <b>", "Two"])
    expect(last).to_have_text("Two")
    tell("message_edited", message={**second, "content": "2", "rev": seq + 1})
    expect(last).to_have_text("2")
    gone = {**second, "content": "", "deleted": True, "rev": seq + 1}
    tell("message_deleted", message=gone)
    expect(bubbles(page)).to_have_text(["1 <b>", "Message deleted"])
    expect(last).to_have_text("Message deleted")
    tell("message_edited", message={**second, "content": "2", "rev": seq})  # an old one
    tell("chat_renamed", title="Car", user_id=ben)
    expect(page.locator("#pane-title")).to_have_text("Car")
    expect(page.locator("#chat-list .row-title")).to_have_text("Car")
    expect(bubbles(page)).to_have_text(["1 <b>", "Message deleted"])


def test_a_member_that_the_page_does_not_know_is_not_counted_off(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, _ = pair(server)
    chat = server.create_chat(anna, ben, server.add_user("Cleo"))
    server.post(chat, ben, "Hello")
    page = chromium.page()
    relay = Relay.connected(page, server.link(anna), chat)
    last = page.locator("#chat-list .row-last").first
    expect(last).to_have_text("Ben: Hello")  # with the name, in a chat of three
    page.wait_for_load_state("networkidle")  # no list of chats is on its way
    seq = max(frame.get("seq", 0) for frame in relay.received) + 1_000
    # The list of chats may be newer than this event.
    removed = {"type": "member_removed", "chat_id": chat, "user_id": 999, "seq": seq}
    relay.sockets[-1].send(json.dumps(removed))
    renamed = {"type": "chat_renamed", "chat_id": chat, "seq": seq + 1, "user_id": ben}
    relay.sockets[-1].send(json.dumps({**renamed, "title": "Bike"}))
    expect(page.locator("#pane-title")).to_have_text("Bike")
    expect(last).to_have_text("Ben: Hello")


def test_names_of_a_large_chat_are_fetched_when_they_are_shown(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    server.post(chat, ben, "Hello")
    page = chromium.page()
    asked: list[str] = []

    def leave_out_members(route: Route) -> None:
        answer = route.fetch()
        body = answer.json()
        for one in body["chats"]:
            one.update(members=[], member_count=1_200)
        route.fulfill(response=answer, json=body)

    def members(route: Route) -> None:
        asked.append(route.request.url.partition("members?")[2])
        members = [{"user_id": ben, "name": "Ben Large", "read_n": 0}]
        route.fulfill(json={"members": members, "more": True})

    page.route(re.compile(r"/api/v1/chats\?"), leave_out_members)
    page.route(re.compile(r"/members\?"), members)
    page.route(re.compile(r"/api/v1/users"), lambda route: route.fulfill(status=403))
    page.goto(server.link(anna))
    expect(page.locator("#chat-list .row-last")).to_have_text("Ben: Hello")
    expect(page.locator("#chat-list .row-title")).to_have_text("1,200 people")
    open_chat(page, chat)
    expect(page.locator("#messages .sender")).to_have_text("Ben Large")
    assert asked == [f"ids={ben}"]
    page.get_by_role("button", name="People in this chat").click()
    expect(page.locator("#info-members")).to_contain_text("Ben Large")
    expect(page.locator("#info-members")).to_contain_text("and 1,198 more")


def test_after_a_resync_the_page_shows_no_message_from_before(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    for i in range(60):
        last = server.post(chat, ben, f"Message {i}")
    server.mark_read(last["id"], anna)
    page = chromium.page()
    relay = Relay.connected(page, server.link(anna), chat)
    expect(bubbles(page)).to_have_count(50)
    page.evaluate("scroller.scrollTop = 0")
    expect(bubbles(page)).to_have_count(60)
    page.evaluate("scroller.scrollTop = scroller.scrollHeight")
    connected = relay.received[0]
    relay.sockets[-1].send(json.dumps({**connected, "resume": "resync"}))
    # The oldest ones may have changed meanwhile: they are loaded when they are near.
    expect(bubbles(page)).to_have_count(50)
    page.evaluate("scroller.scrollTop = 0")
    expect(bubbles(page)).to_have_count(60)
