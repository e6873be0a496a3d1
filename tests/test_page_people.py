"""The first minutes, invitations, new chats and members, in a real Chromium."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.browser import (
    FIXTURES,
    PHONE,
    Chromium,
    Locator,
    Page,
    Relay,
    Route,
    Server,
    bubbles,
    expect,
    expect_state,
    field,
    open_chat,
    pair,
    refuse,
    screenshot,
    sign_in,
    until,
    write,
)
from tests.client import Frame

pytestmark = pytest.mark.browser
site, server, make_server, browser, chromium, example_chats = FIXTURES

ON_A_PHONE = {"viewport": PHONE, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def inviting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server where members invite others with a link."""
    server = Server(tmp_path_factory.mktemp("inviting"), "--invites", "on")
    yield server
    server.end(signal.SIGTERM)


def press(page: Page | Locator, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def people(page: Page) -> Locator:
    """Open the dialog of the chat's members."""
    press(page, "People in this chat")
    return page.locator("#info")


def member(dialog: Locator, name: str) -> Locator:
    return dialog.get_by_role("listitem").filter(has_text=name)


def new_group(server: Server, title: str | None, *members: int) -> int:
    """Make a group as its first member."""
    creator, *others = members
    body = {"title": title, "member_ids": others}
    path = "/api/v1/chats"
    chat: int = server.request("POST", path, body, user_id=creator)["chat"]["id"]
    return chat


# --- the first minutes ---------------------------------------------------------------


def test_the_first_user_makes_a_group_and_a_stranger_joins_it_on_a_phone(
    inviting: Server, chromium: Chromium
) -> None:
    annas = sign_in(chromium.context(), inviting.link(inviting.add_user("Anna")))
    expect(annas.locator("#pane-empty")).to_contain_text("No chats yet. Start a group")
    screenshot(annas, "people-first-visit")
    press(annas, "Invite people")
    dialog = annas.get_by_role("dialog", name="New chat")
    expect(dialog.get_by_label("Find people")).to_be_focused()
    expect(dialog).to_contain_text("There is no one to add.")
    press(dialog, "Create")
    expect(dialog.get_by_role("alert")).to_contain_text("give the group a title")
    dialog.get_by_label("Title").fill("Chess <i>club</i>")
    dialog.get_by_label("Title").press("Enter")
    expect(annas.locator("#pane-title")).to_have_text("Chess <i>club</i>")
    dialog = annas.get_by_role("dialog", name="Invite people")
    link = dialog.get_by_role("textbox")
    expect(link).to_have_value(re.compile(re.escape(f"{inviting.url}/#invite=") + "."))
    expect(dialog).to_contain_text("Anyone who has this link can join until ")
    screenshot(annas, "people-invite")
    press(dialog, "Copy")
    expect(dialog.locator(".toast")).to_have_text("Copied")
    expect(dialog.get_by_role("button", name="Copy")).to_be_focused()
    url = link.input_value()
    annas.keyboard.press("Escape")
    expect(dialog).to_be_hidden()

    phone = chromium.context(**ON_A_PHONE).new_page()
    phone.goto(url)
    heading = phone.get_by_role("heading", name="Join “Chess <i>club</i>”")
    expect(heading).to_be_visible()
    expect(phone.get_by_text("1 person")).to_be_visible()
    phone.reload()  # the address keeps the invitation
    expect(heading).to_be_visible()
    name = phone.get_by_label("Your name")
    expect(name).to_be_focused()
    screenshot(phone, "people-join")
    press(phone, "Join the chat")
    expect(phone.get_by_role("alert")).to_contain_text("Choose a name")
    name.fill("Zora")
    name.press("Enter")
    expect(phone.locator("#pane-title")).to_have_text("Chess <i>club</i>")
    write(phone, "Here I am")
    press(phone, "Send")
    expect(bubbles(annas)).to_have_text(["Here I am"])
    write(annas, "Welcome")
    expect(bubbles(phone)).to_have_text(["Here I am", "Welcome"])
    phone.reload()
    expect(bubbles(phone)).to_have_text(["Here I am", "Welcome"])
    phone.go_back()
    expect(phone.locator("#chat-list .row")).to_be_visible()
    expect(phone.locator("#pane")).to_be_hidden()

    bens = sign_in(chromium.context(), inviting.link(inviting.add_user("Ben")))
    for answer in (
        "Cancel",
        "Join the chat",
        "Join the chat",
    ):  # at last it is a member already
        bens.goto(url)
        dialog = bens.get_by_role("dialog", name="Join “Chess")
        expect(dialog).to_contain_text("people · Signed in as Ben")
        press(dialog, answer)
    expect(bubbles(bens)).to_have_text(["Here I am", "Welcome"])


def test_a_single_chat_opens_by_itself_and_back_leads_to_the_list(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    server.post(chat, ben, "Hello")
    page = chromium.context(**ON_A_PHONE).new_page()
    page.goto(server.link(anna))
    expect(bubbles(page)).to_have_text(["Hello"])
    page.go_back()
    row = page.locator("#chat-list .row")
    expect(row).to_be_visible()
    expect(page.locator("#pane")).to_be_hidden()
    page.reload()
    expect_state(page, "connected")
    expect(row).to_be_visible()
    server.create_chat(anna, ben, title="A second chat")
    page.goto("about:blank")
    page.goto(server.url)
    expect(row).to_have_count(2)
    expect(page.locator("#pane")).to_be_hidden()


def test_a_server_that_allows_nothing_offers_nothing(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server("--chats-by", "service")
    anna, ben = server.add_user("Anna"), server.add_user("Ben")
    page = sign_in(chromium.context(**ON_A_PHONE), server.link(anna))
    expect(page.locator("#pane-empty")).to_contain_text(
        "No chats yet. Someone has to add you to one. Your name here is Anna."
    )
    screenshot(page, "people-nothing")
    names = re.compile("New chat|Invite|Add people|Rename|Remove|Leave")
    offers = page.get_by_role("button", name=names)
    expect(offers).to_have_count(0)
    group = server.create_chat(anna, ben, title="Shop")
    body = {"direct": True, "member_ids": [anna, ben]}
    direct = server.request("POST", "/api/v1/chats", body)["chat"]["id"]
    for chat, left in ((group, ["Leave chat"]), (direct, [])):
        page.locator(f"#chat-list a[href='#chat/{chat}']").click()
        expect(member(people(page), "Ben")).to_be_visible()
        expect(offers).to_have_text(left)
        page.keyboard.press("Escape")
        page.go_back()


# --- invitations ---------------------------------------------------------------------


def test_revoking_ends_the_earlier_links_and_makes_a_new_one(
    inviting: Server, chromium: Chromium
) -> None:
    chat = new_group(inviting, "Chess", inviting.add_user("Anna"))
    anna = inviting.request("GET", f"/api/v1/chats/{chat}")["chat"]["created_by"]
    page = sign_in(chromium.context(), inviting.link(anna), chat)
    press(people(page), "Invite people")
    dialog = page.get_by_role("dialog", name="Invite people")
    link = dialog.get_by_role("textbox")
    old = link.input_value()
    press(dialog, "Revoke earlier links")
    expect(dialog.get_by_role("status")).to_contain_text(
        "Earlier invitation links no longer work. Anyone who has"
    )
    expect(link).not_to_have_value(old)
    new = link.input_value()

    def answer(route: Route) -> None:
        if route.request.method == "DELETE":
            return route.continue_()
        body = {"error": {"code": "overloaded", "message": "full"}}
        return refuse(route, 503, body)

    strangers = chromium.page()
    strangers.goto(old)
    expect(strangers.get_by_role("alert")).to_contain_text("no longer valid")
    strangers.goto(new)
    expect(strangers.get_by_role("heading", name="Join “Chess”")).to_be_visible()
    page.route(re.compile("/invites"), answer)
    press(dialog, "Revoke earlier links")
    expect(dialog.get_by_role("alert")).to_contain_text("cannot take this now")
    expect(link).to_have_value("")  # the one that was shown does not count any more
    expect(dialog.get_by_role("status")).to_have_text(
        re.compile("^Earlier invitation links no longer work. $")
    )
    expect(dialog.get_by_role("button", name="Copy")).to_be_hidden()


def test_an_invitation_outlives_a_lost_answer_and_can_be_pasted(
    inviting: Server, chromium: Chromium
) -> None:
    anna = inviting.add_user("Anna")
    chat = new_group(inviting, "Chess", anna)
    path = f"/api/v1/chats/{chat}/invites"
    token = inviting.request("POST", path, {}, user_id=anna)["token"]
    page = chromium.page()
    page.route(re.compile("/join$"), lambda route: route.abort(), times=1)
    page.goto(f"{inviting.url}/#invite={token}")
    expect(page.get_by_role("alert")).to_contain_text("does not answer")
    link = page.get_by_label("Sign-in link")
    expect(link).to_have_value(f"{inviting.url}/#invite={token}")
    press(page, "Sign in")
    expect(page.get_by_role("heading", name="Join “Chess”")).to_be_visible()
    page.get_by_label("Your name").fill("Zora")
    press(page, "Join the chat")
    expect(page.locator("#pane-title")).to_have_text("Chess")
    page.go_back()
    expect(page).to_have_url(re.compile("#chats$"))


# --- new chats -----------------------------------------------------------------------


def test_one_person_makes_the_direct_chat_and_more_make_a_group(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server()  # the dialog lists at most 200 users
    anna, _, _ = (server.add_user(name) for name in ("Anna", "Ben", "Cora"))
    page = sign_in(chromium.context(), server.link(anna))
    rows, title = page.locator("#chat-list .row"), page.locator("#pane-title")
    dialog = page.locator("#people")
    expect(page.locator("#pane-empty")).to_contain_text("find you as Anna.")
    page.locator("#empty-start").click()
    press(dialog, "Create")
    expect(dialog.get_by_role("alert")).to_have_text("Choose whom to add.")
    dialog.get_by_label("Ben").check()
    expect(dialog.get_by_label("Title")).to_be_hidden()
    press(dialog, "Create")
    expect(title).to_have_text("Ben")
    expect(page.locator("#pane-members")).to_have_text("Direct chat")
    expect(field(page)).to_be_focused()
    write(page, "Hello Ben")
    page.goto(f"{server.url}/#chats")
    press(page, "New chat")
    dialog.get_by_label("Ben").check()
    press(dialog, "Create")
    expect(bubbles(page)).to_have_text(["Hello Ben"])
    expect(rows).to_have_count(1)

    info = people(page)
    for name in ("Leave chat", "Rename", "Invite people"):
        expect(info.get_by_role("button", name=name)).to_be_hidden()
    press(info, "Add people")
    dialog = page.get_by_role("dialog", name="New group")
    expect(dialog).to_contain_text("The direct chat stays as it is.")
    expect(dialog.get_by_label("Ben")).to_be_checked()
    press(dialog, "Create")
    expect(dialog.get_by_role("alert")).to_have_text("Choose whom to add.")
    dialog.get_by_label("Cora").check()
    field_of_title = dialog.get_by_label("Title")
    expect(field_of_title).to_have_attribute("placeholder", "Ben, Cora")
    expect(field_of_title).to_have_attribute("maxlength", "200")
    screenshot(page, "people-new-group")
    field_of_title.fill("Tea <i>club</i>")

    def lose_the_answer(route: Route) -> None:
        route.fetch()
        route.abort()

    page.route(re.compile("/chats$"), lose_the_answer, times=1)
    press(dialog, "Create")
    expect(dialog.get_by_role("alert")).to_contain_text("does not answer")
    press(dialog, "Create")
    expect(title).to_have_text("Tea <i>club</i>")
    expect(page.locator("#pane-members")).to_have_text("Ben, Cora, you")
    expect(rows).to_have_count(2)


def test_a_chat_that_is_made_while_the_list_is_fetched_stays_open(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server()
    anna, ben, chat = pair(server)
    server.add_user("Cora")
    page = chromium.page()
    relay = Relay.connected(page, server.link(anna))
    held: list[tuple[Route, Frame]] = []

    def hold(route: Route) -> None:
        held.append((route, route.fetch().json()))

    page.route(re.compile(r"/chats\?"), hold)
    relay.sockets[-1].send(json.dumps({**relay.received[0], "resume": "resync"}))
    until(lambda: bool(page.title()) and len(held) == 1)
    press(page, "New chat")
    dialog = page.locator("#people")
    dialog.get_by_label("Cora").check()
    press(dialog, "Create")
    expect(page.locator("#pane-title")).to_have_text("Cora")
    field(page).press_sequentially("Hello")
    server.post(chat, ben, "After the list")
    route, old_list = held[0]
    route.fulfill(json=old_list)
    expect(page.locator("#chat-list")).to_contain_text("After the list")
    expect(page.locator("#chat-list .row")).to_have_count(2)
    expect(page.locator("#pane-title")).to_have_text("Cora")
    expect(field(page)).to_be_focused()
    expect(field(page)).to_have_value("Hello")


# --- members -------------------------------------------------------------------------


def test_changes_of_a_group_are_seen_by_all_at_once_also_in_the_open_dialog(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, cora = (server.add_user(name) for name in ("Anna", "Ben", "Cora"))
    chat = new_group(server, "Tea", anna, ben, cora)
    bens = sign_in(chromium.context(), server.link(ben), chat)
    annas = sign_in(chromium.context(), server.link(anna), chat)
    for page in (annas, bens):
        expect_state(page, "connected")
    info, shown = people(annas), people(bens)
    expect(member(info, "Ben")).to_have_text(re.compile("online"))
    expect(member(info, "Cora")).to_be_visible()
    expect(member(info, "Cora")).not_to_have_text(re.compile("online"))
    expect(member(shown, "Anna")).to_contain_text("creator")
    expect(shown.get_by_role("button", name="Remove")).to_have_count(0)
    screenshot(annas, "people-info")

    press(info, "Rename")
    rename = annas.get_by_role("dialog", name="Rename")
    rename.get_by_role("textbox").fill("Coffee <b>")
    annas.keyboard.press("Enter")
    for dialog in (info, shown):
        expect(dialog.get_by_role("heading")).to_have_text("Coffee <b>")
    # Without a title, the chat is called by its people.
    press(info, "Rename")
    rename.get_by_role("textbox").fill("")
    annas.keyboard.press("Enter")
    expect(info.get_by_role("heading")).to_have_text("Ben, Cora")
    expect(annas.locator("#messages .line")).to_have_count(1)
    server.request("PATCH", f"/api/v1/chats/{chat}", {"title": "Coffee <b>"})
    expect(annas.locator("#messages .line")).to_have_count(2)
    press(info, "Rename")
    rename.get_by_role("textbox").fill("Tea\x07")
    annas.keyboard.press("Enter")
    expect(rename).to_contain_text("Choose a name")
    press(rename, "Cancel")

    press(info, "Remove Cora")
    ask = annas.get_by_role("dialog", name="Remove Cora?")
    press(ask, "Cancel")
    press(info, "Remove Cora")
    press(ask, "Remove")
    for dialog in (info, shown):
        expect(member(dialog, "Cora")).to_have_count(0)
        expect(member(dialog, "Anna")).to_be_visible()
    expect(info.locator(":focus")).to_have_count(1)
    press(info, "Add people")
    dialog = annas.get_by_role("dialog", name="Add people")
    dialog.get_by_label("Find people").fill("Cora")
    dialog.get_by_label("Cora").first.check()
    dialog.get_by_role("checkbox", checked=True).evaluate(f"e => e.value = '{cora}'")
    press(dialog, "Add")
    expect(member(shown, "Cora")).to_be_visible()

    press(people(annas), "Remove Ben")
    press(annas.get_by_role("dialog", name="Remove Ben?"), "Remove")
    expect(shown).to_be_hidden()
    expect(bens.get_by_text("You are no longer in “Coffee <b>”.")).to_be_visible()
    expect(bens.locator("#pane-empty")).to_be_visible()
    press(info, "Leave chat")
    press(annas.get_by_role("dialog", name="Leave"), "Leave chat")
    expect(info).to_be_hidden()
    expect(annas.locator("#pane-empty")).to_contain_text("No chats yet.")


def test_each_dialog_changes_the_chat_that_it_shows(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server()  # on the shared one, others are called Ben, too
    anna, ben = server.add_user("Anna"), server.add_user("Ben")
    one, two = (new_group(server, title, anna, ben) for title in ("One", "Two"))
    page = sign_in(chromium.context(), server.link(anna), one)
    expect_state(page, "connected")
    expect(member(people(page), "Ben")).to_be_visible()
    page.keyboard.press("Escape")
    open_chat(page, two)
    press(people(page), "Remove Ben")
    ask = page.locator("#ask")
    expect(ask).to_contain_text("no longer read and write in “Two”.")
    press(ask, "Remove")
    expect(member(page.locator("#info"), "Ben")).to_have_count(0)
    members = {
        chat: server.request("GET", f"/api/v1/chats/{chat}", user_id=anna)["chat"]
        for chat in (one, two)
    }
    assert [chat["member_count"] for chat in members.values()] == [2, 1]

    # Requests that hang: a dialog that was closed does not come back.
    hanging: list[Route] = []
    page.route(
        re.compile(r"/chats(/\d+)?$"),
        lambda route: (
            hanging.append(route)
            if route.request.method in ("PATCH", "POST")
            else route.continue_()
        ),
    )
    press(page.locator("#info"), "Rename")
    ask.get_by_role("textbox").fill("Three")
    page.keyboard.press("Enter")
    until(lambda: page.evaluate("1") == len(hanging))
    expect(ask).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    press(page, "New chat")
    dialog = page.locator("#people")
    dialog.get_by_label("Find people").fill("Ben")
    expect(dialog.get_by_role("checkbox", name="Ben")).to_be_visible()
    page.keyboard.press("Enter")
    press(dialog, "Create")
    until(lambda: page.evaluate("2") == len(hanging))
    press(dialog, "Cancel")
    press(page, "New chat")
    hanging.pop(0).abort()
    late = page.locator(".toast")
    expect(late).to_have_text(["Rename: Two: The chat server does not answer."])
    expect(ask).to_be_hidden()
    hanging.pop().continue_()
    expect(page.locator("#chat-list .row")).to_have_count(3)
    expect(dialog).to_be_visible()
    press(dialog, "Cancel")
    expect(page.locator("#pane-title")).to_have_text("Two")

    # One is told of a removal by others only.
    press(people(page), "Leave chat")
    press(ask, "Leave chat")
    expect(page.locator("#chat-list .row")).to_have_count(2)
    server.post(one, ben, "Later news")  # comes after the removal
    expect(page.locator("#chat-list")).to_contain_text("Later news")
    expect(page.locator(".toast", has_text="no longer in")).to_have_count(0)


def test_a_dialog_forgets_its_last_visit(server: Server, chromium: Chromium) -> None:
    anna, ben, chat = pair(server, title="Ours")
    server.create_chat(anna, ben, title="Other")
    page = sign_in(chromium.context(), server.link(anna), chat)
    info = page.get_by_role("dialog", name="Ours", exact=True)
    page.route(re.compile("/members"), lambda route: route.abort())
    page.get_by_role("button", name="People in this chat").click()
    expect(info.get_by_role("alert")).to_have_text("The chat server does not answer.")
    page.keyboard.press("Escape")
    page.unroute_all()
    page.get_by_role("button", name="People in this chat").click()
    expect(info.get_by_role("listitem").filter(has_text="online")).to_have_count(1)
    expect(page.locator("#info-error")).to_be_empty()
    # The news is in the dialog in front: what is behind it is inert.
    info.get_by_role("button", name="Rename").click()
    server.post(chat, ben, "Hello Anna")
    news = page.get_by_role("dialog", name="Rename: Ours").locator("#announcer")
    expect(news).to_contain_text("Ben: Hello Anna")
    page.keyboard.press("Escape")
    # The user has not left after all, so the removal is news.
    info.get_by_role("button", name="Leave chat").click()
    question = page.get_by_role("dialog", name="Leave “Ours”?")
    question.get_by_role("button", name="Cancel").click()
    server.request("DELETE", f"/api/v1/chats/{chat}/members/{anna}")
    expect(page.locator(".toast")).to_have_text("You are no longer in “Ours”.")


def test_the_members_of_a_large_chat_come_page_by_page(
    server: Server, chromium: Chromium
) -> None:
    users = [server.add_user(f"Person {i}") for i in range(120)]
    chat = new_group(server, None, *users)
    page = chromium.page()
    relay = Relay.connected(page, server.link(users[0]), chat)
    expect(page.locator("#pane-title")).to_have_text("120 people")
    seq = max(frame.get("seq", 0) for frame in relay.received) + 1_000
    event = {"type": "member_added", "chat_id": chat, "user_id": users[1], "seq": seq}
    # The list of chats may have counted this member already.
    relay.sockets[-1].send(json.dumps(event))
    expect(page.locator("#pane-title")).to_have_text("121 people")
    info = people(page)
    rows = info.get_by_role("listitem")
    expect(rows).to_have_count(101)
    press(info, "and 21 more")
    expect(rows).to_have_count(120)
    expect(member(info, "Person 119")).to_be_visible()
    expect(member(info, "Person 0").first).to_contain_text("creator")
    expect(page.locator("#pane-title")).to_have_text("120 people")
