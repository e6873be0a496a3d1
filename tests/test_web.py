"""The page and ChatWebSocket in a real Chromium, against a real `chatd serve`.

Each test has users of its own, so that most can share one server. What a test waits
for has a deadline (PATIENCE), and no test sleeps; the rules of 5 s and 30 s
run on the browser's fake clock. Whatever a page reports as an error, a violated policy
above all, fails the test, unless it is the network that the test has cut.

    apt-get install chromium        # or CHROMIUM=/path/to/it
    .venv/bin/python -m pytest -m browser
    SHOTS=folder .venv/bin/python -m pytest -k screenshots      # to look at
"""

from __future__ import annotations

import functools
import http.server
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jwt
import pytest

HERE = Path(__file__).resolve().parents[1]
CI = bool(os.environ.get("CI"))
pytestmark = pytest.mark.browser

if CI:
    from playwright import sync_api
else:
    sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

Page = sync_api.Page
Context = sync_api.BrowserContext
Json = dict[str, Any]

users = itertools.count(1)

# Seconds. No test takes them: they are for a machine that does other things as well.
PATIENCE = 30


def find_program(names: tuple[str | None, ...], remedy: str) -> str:
    """Find a program. CI never goes without; elsewhere the reason is shown."""
    for name in names:
        if name and (path := shutil.which(name)):
            return path
    if CI:
        pytest.fail(remedy)
    pytest.skip(remedy)


def until(happens: Callable[[], bool]) -> None:
    """Ask again and again, with a deadline: for what only the server can tell."""
    deadline = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- chatd, and a page of somebody else ----------------------------------------------


class Program:
    """One of chatd's servers, as a process of its own."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: subprocess.Popen[str] | None = None

    def run(self, *command: str) -> str:
        """Start it, and read its address."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "chatd", *command],
                cwd=HERE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on "), self.log.read_text()
        return line.split()[-1]

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.communicate(timeout=30)
            self.process = None


class House(Program):
    """A `chatd serve` on a free port, which it keeps when it is started again."""

    def __init__(self, folder: Path, *flags: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder / "log")
        self.db = folder / "chatd.db"
        self.secret_file = folder / "chatd.secret"
        # Tests come from one address, and more often than people do.
        self.flags = ("--requests", "0", "--handshakes", "0", *flags)
        self.url = ""
        self.start()
        self.secret = self.secret_file.read_text().strip()

    def start(self) -> None:
        listen = self.url.removeprefix("http://") or "127.0.0.1:0"
        where = ("--listen", listen, "--db", str(self.db))
        self.url = self.run("serve", *where, *self.flags)

    def command(self, name: str, file: Path) -> None:
        """Run one of chatd's other commands on the database."""
        command = [sys.executable, "-m", "chatd", name, str(file), "--db", str(self.db)]
        subprocess.run(command, cwd=HERE, check=True, capture_output=True)

    def token(self, user: int, **claims: Any) -> str:
        now = int(time.time())
        body = {"user_id": user, "iat": now, "exp": now + 3600, **claims}
        return jwt.encode(body, self.secret, "HS256")

    def link(self, user: int, name: str = "") -> str:
        named = {"name": name} if name else {}
        return f"{self.url}/#token={self.token(user, use='signin', **named)}"

    def ask(
        self, method: str, path: str, body: Json | None = None, **claims: Any
    ) -> Any:
        """Ask over HTTP, as a service unless `claims` say who."""
        claims = claims or {"user_id": 2**40, "scope": "service"}
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.token(0, **claims)}"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def person(self, name: str) -> int:
        """Make a user who is known by this name."""
        user = next(users)
        self.ask("GET", "/api/v1/me", user_id=user, name=name)
        return user

    def chat(self, *members: int, title: str | None = None) -> int:
        body = {"title": title, "member_ids": members}
        chat_id: int = self.ask("POST", "/api/v1/chats", body)["chat"]["id"]
        return chat_id

    def say(self, chat: int, sender: int, content: str) -> Json:
        body = {"content": content, "sender_id": sender}
        path = f"/api/v1/chats/{chat}/messages"
        message: Json = self.ask("POST", path, body)["message"]
        return message

    def stats(self) -> Json:
        path = "/api/v1/internal/chat/ws/stats"
        document: Json = self.ask("GET", path, user_id=1, scope="stats")
        return document

    def contents(self, chat: int, reader: int) -> list[str]:
        """What is stored, oldest first."""
        path = f"/api/v1/chats/{chat}/messages?limit=100"
        messages = self.ask("GET", path, user_id=reader)["messages"]
        return [message["content"] for message in messages]


class Site(http.server.ThreadingHTTPServer):
    """Somebody else's web server: another origin, whose pages embed ChatWebSocket."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[str, str]] = {}
        pages = self.pages

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kind, body = pages.get(self.path, ("text/html", ""))
                self.send_response(200 if body else 404)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.pages["/"] = ("text/html", "<!doctype html><title>Shop</title>")
        self.pages["/favicon.ico"] = ("image/svg+xml", "<svg/>")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site()
    thread = threading.Thread(target=site.serve_forever, daemon=True)
    thread.start()
    yield site
    site.shutdown()
    thread.join()
    site.server_close()


@pytest.fixture(scope="module")
def house(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The server that tests share who need nothing special of it."""
    house = House(tmp_path_factory.mktemp("chatd"), "--origin", site.url)
    yield house
    house.end()


@pytest.fixture
def own_house(tmp_path: Path) -> Iterator[Callable[..., House]]:
    """Make a server that the test may kill, or set up in its own way."""
    made: list[House] = []

    def make(*flags: str) -> House:
        made.append(House(tmp_path / str(len(made)), *flags))
        return made[-1]

    yield make
    for house in made:
        house.end()


# --- Chromium ------------------------------------------------------------------------

# The network's own complaints, in tests that cut it.
NETWORK = re.compile(r"net::ERR_|WebSocket connection to|Failed to load resource")


class Chromium:
    """One browser for all tests; what its pages complain about is collected."""

    def __init__(self, browser: sync_api.Browser) -> None:
        self.browser = browser
        self.contexts: list[Context] = []
        self.complaints: list[str] = []
        self.console: list[str] = []

    def context(self, **options: Any) -> Context:
        """A browser profile: its tabs share storage, and nothing with others."""
        options.setdefault("viewport", {"width": 1100, "height": 700})
        context = self.browser.new_context(**options)
        context.set_default_timeout(PATIENCE * 1000)
        context.on("console", self._hear)
        context.on("weberror", lambda e: self.complaints.append(str(e.error)))
        self.contexts.append(context)
        return context

    def _hear(self, message: sync_api.ConsoleMessage) -> None:
        self.console.append(message.text)
        if message.type in ("error", "warning") and not NETWORK.search(message.text):
            self.complaints.append(message.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser")
    path = find_program((*names, "google-chrome"), "no Chromium: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def chromium(browser: sync_api.Browser) -> Iterator[Chromium]:
    expect.set_options(timeout=PATIENCE * 1000)
    chromium = Chromium(browser)
    yield chromium
    for context in chromium.contexts:
        context.close()
    assert chromium.complaints == []


# --- what people do on the page ------------------------------------------------------


def sign_in(context: Context, link: str) -> Page:
    page = context.new_page()
    page.goto(link)
    expect(page.locator("#me-name")).not_to_be_empty()
    return page


def open_chat(page: Page, chat: int) -> None:
    page.locator(f"#chat-list a[href='#chat/{chat}']").click()
    expect(page.locator("#composer")).to_be_visible()


def field(page: Page) -> sync_api.Locator:
    return page.get_by_role("textbox", name="Your message")


def write(page: Page, text: str) -> None:
    field(page).fill(text)
    field(page).press("Enter")


def bubbles(page: Page) -> sync_api.Locator:
    return page.locator("#messages .message .content")


def ticks(page: Page) -> sync_api.Locator:
    return page.locator("#messages .own .stamp .sr-only")


def state_is(page: Page, state: str) -> None:
    expect(page.locator("#connection")).to_have_attribute("data-state", state)


def comes_back(page: Page) -> None:
    """Let the page's clock run, a second at a time, until it is connected."""

    def connected() -> bool:
        page.clock.run_for(1_000)
        return page.locator("#connection").get_attribute("data-state") == "connected"

    until(connected)


class Wire:
    """The socket between page and server, to cut and to look at."""

    def __init__(self, page: Page) -> None:
        self.cut_code: int | None = None
        self.sockets: list[sync_api.WebSocketRoute] = []
        self.said: list[Json] = []
        self.heard: list[Json] = []
        page.route_web_socket(re.compile("/ws/chat"), self._open)

    def _open(self, socket: sync_api.WebSocketRoute) -> None:
        if self.cut_code is not None:
            socket.close(code=self.cut_code)
            return
        server = socket.connect_to_server()
        self.sockets.append(socket)

        def up(text: str | bytes) -> None:
            self.said.append(json.loads(text))
            server.send(text)

        def down(text: str | bytes) -> None:
            self.heard.append(json.loads(text))
            socket.send(text)

        socket.on_message(up)
        server.on_message(down)

    def cut(self, code: int, *, block: bool = False) -> None:
        """Close the socket at this code; block: and each that comes after it."""
        self.cut_code = code if block else None
        for socket in self.sockets:
            socket.close(code=code)
        self.sockets.clear()


def pair(house: House, *, title: str | None = None) -> tuple[int, int, int]:
    """Anna, Ben and their chat."""
    anna, ben = house.person("Anna"), house.person("Ben")
    return anna, ben, house.chat(anna, ben, title=title)


# --- signing in ----------------------------------------------------------------------


def test_a_link_signs_in_and_leaves_the_address_bar(
    house: House, chromium: Chromium
) -> None:
    anna, _, _ = pair(house)
    context = chromium.context()
    page = sign_in(context, house.link(anna))
    assert page.url == f"{house.url}/"
    expect(page.locator("#me-name")).to_have_text("Anna")
    state_is(page, "connected")
    page.reload()
    expect(page.locator("#me-name")).to_have_text("Anna")
    page.close()
    later = sign_in(context, house.url)  # the next visit
    expect(later.locator("#me-name")).to_have_text("Anna")
    assert not [line for line in chromium.console if "eyJ" in line]


def test_a_link_that_is_no_longer_good_says_so(
    house: House, chromium: Chromium
) -> None:
    page = chromium.context().new_page()
    page.goto(f"{house.url}/#token={house.token(next(users), use='signin', exp=1)}")
    expect(page.get_by_role("alert")).to_contain_text("no longer valid")
    page.get_by_label("Sign-in link").fill("https://example.org")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("not a sign-in link")
    page.get_by_label("Sign-in link").fill(house.link(house.person("Cora")))
    page.get_by_label("Sign-in link").press("Enter")
    expect(page.locator("#me-name")).to_have_text("Cora")


def test_a_second_link_in_an_open_tab_asks_before_it_is_somebody_else(
    house: House, chromium: Chromium
) -> None:
    anna, ben, chat = pair(house)
    page = sign_in(chromium.context(), house.link(anna))
    open_chat(page, chat)
    page.goto(house.link(anna))  # herself: nothing to ask
    expect(page).to_have_url(f"{house.url}/#chat/{chat}")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.goto(house.link(ben))
    asked = page.get_by_role("dialog", name="Continue as Ben?")
    asked.get_by_role("button", name="Stay as Anna").click()
    expect(page.locator("#me-name")).to_have_text("Anna")
    expect(field(page)).to_be_visible()
    page.goto(house.link(ben))
    asked.get_by_role("button", name="Continue as Ben").click()
    expect(page.locator("#me-name")).to_have_text("Ben")
    write(page, "It is me now")
    expect(ticks(page)).to_have_text("Sent")
    expect(bubbles(page)).to_have_text(["It is me now"])
    assert house.ask("GET", "/api/v1/chats", user_id=ben)["chats"][0]["last_message"][
        "sender_id"
    ] == ben  # fmt: skip


def test_signing_out_is_for_all_tabs_of_that_user(
    house: House, chromium: Chromium
) -> None:
    anna, ben, _ = pair(house)
    context = chromium.context()
    bens = sign_in(context, house.link(ben))
    first = sign_in(context, house.link(anna))
    second = sign_in(context, house.link(anna))
    expect(second.locator("#me-name")).to_have_text("Anna")
    first.locator("#me").click()
    first.get_by_role("button", name="Sign out").click()
    expect(first.get_by_text("You are signed out.")).to_be_visible()
    expect(second.get_by_text("You signed out in another tab.")).to_be_visible()
    expect(bens.locator("#me-name")).to_have_text("Ben")
    state_is(bens, "connected")
    first.reload()
    expect(first.get_by_role("heading", name="Sign in to chatd")).to_be_visible()


# --- two people ----------------------------------------------------------------------


@pytest.fixture(params=["direct", "proxy"])
def door(request: pytest.FixtureRequest, house: House) -> Iterator[str]:
    """Where the pages connect: the service itself, or `chatd proxy` before it."""
    if request.param == "direct":
        yield house.url
        return
    proxy = Program(house.log)
    upstream = house.url.removeprefix("http://")
    keys = ("--secret-file", str(house.secret_file))
    where = ("--listen", "127.0.0.1:0", "--upstream", upstream)
    yield proxy.run("proxy", *where, *keys, "--handshakes", "0")
    proxy.end()


def test_two_tabs_of_one_browser_are_two_users(
    house: House, chromium: Chromium, door: str
) -> None:
    anna, ben, chat = pair(house)
    context = chromium.context()
    tabs = []
    for user in (anna, ben):
        tab = context.new_page()
        with tab.expect_console_message(
            lambda line: line.text.startswith("WebSocket message:")
        ) as first:
            tab.goto(house.link(user).replace(house.url, door))
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
    house: House, chromium: Chromium
) -> None:
    anna, ben, chat = pair(house, title="Bicycle")
    annas = sign_in(chromium.context(), house.link(anna))
    bens = sign_in(chromium.context(), house.link(ben))
    open_chat(annas, chat)
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


def test_typing_appears_and_disappears(house: House, chromium: Chromium) -> None:
    anna, ben, chat = pair(house)
    annas = chromium.context().new_page()
    annas.clock.install()
    annas.goto(house.link(anna))
    bens = sign_in(chromium.context(), house.link(ben))
    for page in (annas, bens):
        open_chat(page, chat)
    says = annas.locator("#typing")
    field(bens).press_sequentially("Hel")
    expect(says).to_have_text("Ben is typing…")
    expect(annas.locator("#chat-list .row-last")).to_have_text("Ben is typing…")
    field(bens).fill("")  # thought better of it
    expect(says).to_be_empty()
    field(bens).press_sequentially("Hello")
    expect(says).to_have_text("Ben is typing…")
    field(bens).press("Enter")  # said it
    expect(says).to_be_empty()
    expect(bubbles(annas)).to_have_text(["Hello"])
    field(bens).press_sequentially("And")
    expect(says).to_have_text("Ben is typing…")
    bens.close()  # gone without a word
    annas.clock.run_for(8_000)
    expect(says).to_be_empty()


def test_the_tick_says_sent_and_then_read(house: House, chromium: Chromium) -> None:
    anna, ben, chat = pair(house)
    annas = sign_in(chromium.context(), house.link(anna))
    bens = sign_in(chromium.context(), house.link(ben))
    open_chat(annas, chat)
    write(annas, "Hello")
    expect(ticks(annas)).to_have_text("Sent")
    expect(bens.locator("#bell-count")).to_have_text("1")
    expect(ticks(annas)).to_have_text("Sent")  # he has it, and has not seen it
    open_chat(bens, chat)
    expect(ticks(annas)).to_have_text("Read")


HIDE = """
    window.isHidden = true;
    Object.defineProperty(document, "visibilityState",
        { get: () => window.isHidden ? "hidden" : "visible" });
    window.look = () => {
        window.isHidden = false;
        document.dispatchEvent(new Event("visibilitychange"));
    };
    window.Notification = class extends EventTarget {
        static permission = "granted";
        constructor(title, { body }) { super(); console.log(`${title} says: ${body}`); }
    };
"""


def test_a_hidden_tab_notifies_and_reads_nothing_until_it_is_looked_at(
    house: House, chromium: Chromium
) -> None:
    anna, ben, chat = pair(house)
    annas = sign_in(chromium.context(), house.link(anna))
    open_chat(annas, chat)
    bens = chromium.context().new_page()
    bens.add_init_script(HIDE)
    bens.goto(f"{house.link(ben)}")
    open_chat(bens, chat)
    with bens.expect_console_message(lambda line: line.text.startswith("Anna says:")):
        write(annas, "Are you there?")
    assert chromium.console.count("Anna says: Are you there?") == 1
    expect(bubbles(bens)).to_have_text(["Are you there?"])
    expect(bens).to_have_title("(1) Anna · chatd")
    expect(ticks(annas)).to_have_text("Sent")
    bens.evaluate("window.look()")
    expect(ticks(annas)).to_have_text("Read")
    expect(bens).to_have_title("Anna · chatd")


def test_a_badge_falls_in_all_tabs_when_one_reads(
    house: House, chromium: Chromium
) -> None:
    anna, ben, chat = pair(house)
    context = chromium.context()
    first = sign_in(context, house.link(anna))
    second = sign_in(context, house.url)
    for i in range(3):
        house.say(chat, ben, f"Message {i}")
    for tab in (first, second):
        expect(tab.locator("#bell-count")).to_have_text("3")
    open_chat(first, chat)
    for tab in (first, second):
        expect(tab.locator("#bell-count")).to_be_hidden()
        expect(tab.locator("#chat-list .badge")).to_have_count(0)
    open_chat(second, chat)
    write(first, "From the first tab")
    expect(bubbles(second)).to_have_count(4)


def test_only_what_was_on_the_screen_is_read(house: House, chromium: Chromium) -> None:
    anna, ben, chat = pair(house)
    for i in range(60):
        house.say(chat, anna if i < 20 else ben, f"Message {i}\n\nwith three lines")
    page = sign_in(chromium.context(), house.link(anna))
    open_chat(page, chat)
    expect(page.locator(".divider")).to_be_in_viewport()
    expect(page.locator("#jump-text")).to_have_text(re.compile("new messages"))
    count = int(page.locator("#jump-text").inner_text().split()[0])
    assert 20 < count < 40
    expect(page.locator("#bell-count")).to_have_text(str(count))
    page.locator("#jump").click()
    expect(page.locator("#bell-count")).to_be_hidden()
    expect(page.locator("#jump")).to_be_hidden()


def test_history_loads_as_one_scrolls_up_and_stays_in_place(
    house: House, chromium: Chromium
) -> None:
    anna, ben, chat = pair(house)
    for i in range(170):
        house.say(chat, anna if i % 3 else ben, f"Message {i}")
    page = sign_in(chromium.context(), house.link(anna))
    open_chat(page, chat)
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
    assert seen == sorted(seen, reverse=True)  # never thrown about
    expect(bubbles(page)).to_have_text([f"Message {i}" for i in range(170)])
    house.say(chat, ben, "New below")
    jump = page.get_by_role("button", name="1 new message").last
    jump.click()
    expect(page.get_by_text("New below", exact=True).last).to_be_in_viewport()


def test_a_new_chat_and_a_new_member(house: House, chromium: Chromium) -> None:
    people = [house.person(name) for name in ("Anna", "Zoltán Kis", "Zora Kis")]
    anna, zoltan, zora = people
    annas = sign_in(chromium.context(), house.link(anna))
    zoltans = sign_in(chromium.context(), house.link(zoltan))
    annas.get_by_role("button", name="New chat").click()
    dialog = annas.get_by_role("dialog", name="New chat")
    dialog.get_by_role("button", name="Create").click()
    expect(dialog.get_by_role("alert")).to_have_text("Choose at least one person.")
    dialog.get_by_label("Find people").fill("zolt")
    expect(dialog.get_by_role("checkbox")).to_have_count(1)
    dialog.get_by_label("Zoltán Kis").check()
    expect(dialog.get_by_label("Title")).to_have_attribute("maxlength", "200")
    dialog.get_by_label("Title").fill("Chess <i>club</i>")
    dialog.get_by_role("button", name="Create").click()
    expect(annas.locator("#pane-title")).to_have_text("Chess <i>club</i>")
    write(annas, "Welcome")
    row = zoltans.locator("#chat-list .row")
    expect(row).to_contain_text("Welcome")
    row.click()
    annas.get_by_role("button", name="People in this chat").click()
    annas.get_by_role("button", name="Add people").click()
    dialog = annas.get_by_role("dialog", name="Add people")
    dialog.get_by_label("Zora Kis").check()
    dialog.get_by_role("button", name="Add", exact=True).click()
    expect(zoltans.locator("#pane-members")).to_contain_text("Zora Kis")
    zoras = sign_in(chromium.context(), house.link(zora))
    open_chat(zoras, int(annas.url.rpartition("/")[2]))
    expect(bubbles(zoras)).to_have_text(["Welcome"])
    zoras.get_by_role("button", name="People in this chat").click()
    zoras.get_by_role("button", name="Leave chat").click()
    zoras.get_by_role("dialog", name="Leave").get_by_role(
        "button", name="Leave"
    ).click()
    expect(zoras.get_by_text("No chats yet.")).to_be_visible()
    expect(annas.locator("#pane-members")).not_to_contain_text("Zora Kis")


# --- the network goes away -----------------------------------------------------------


def test_a_killed_server_is_missed_and_nothing_is_lost_or_doubled(
    own_house: Callable[..., House], chromium: Chromium
) -> None:
    house = own_house()
    anna, ben, chat = pair(house)
    page = chromium.context().new_page()
    page.clock.install()
    page.goto(house.link(anna))
    open_chat(page, chat)
    write(page, "One")
    expect(ticks(page)).to_have_text("Sent")
    banner = page.locator("#banner")
    house.end(signal.SIGKILL)
    state_is(page, "connecting")
    expect(banner).to_be_hidden()
    write(page, "Two")
    page.clock.run_for(5_100)
    expect(banner).to_be_visible()
    state_is(page, "offline")
    expect(banner).to_contain_text("Your messages are kept")
    expect(banner).to_contain_text(
        re.compile(r"Trying again in \d+ s|Trying again now")
    )
    write(page, "Three")
    expect(ticks(page)).to_have_text(["Sent", "Sending", "Sending"])
    house.start()
    house.say(chat, ben, "From Ben")
    comes_back(page)
    expect(banner).to_be_hidden()
    expect(bubbles(page)).to_have_text(["One", "From Ben", "Two", "Three"])
    expect(ticks(page)).to_have_text(["Read", "Sent", "Sent"])  # Ben wrote after One
    assert house.contents(chat, anna) == ["One", "From Ben", "Two", "Three"]


def test_who_never_had_a_socket_can_start_a_chat(
    house: House, chromium: Chromium
) -> None:
    page = chromium.context().new_page()
    page.route_web_socket("**/*", lambda socket: socket.close())
    page.goto(house.link(house.person("Anna")))
    expect(page.get_by_role("button", name="New chat")).to_be_visible()


def test_with_the_socket_alone_blocked_messages_come_by_polling(
    house: House, chromium: Chromium
) -> None:
    anna, ben, chat = pair(house)
    page = chromium.context().new_page()
    page.clock.install()
    wire = Wire(page)
    page.goto(house.link(anna))
    open_chat(page, chat)
    state_is(page, "connected")
    polls: list[str] = []

    def note(request: sync_api.Request) -> None:
        if "/api/v1/events" in request.url:
            polls.append(request.url)

    page.on("request", note)
    wire.cut(1011, block=True)
    page.clock.run_for(4_500)
    assert polls == []
    expect(page.locator("#banner")).to_be_hidden()
    page.clock.run_for(600)
    state_is(page, "polling")
    expect(page.locator("#banner")).to_contain_text("Live updates are interrupted.")
    house.say(chat, ben, "By poll")
    page.clock.run_for(5_100)
    expect(bubbles(page)).to_have_text(["By poll"])
    write(page, "By HTTP")
    page.clock.run_for(5_100)
    expect(ticks(page)).to_have_text("Sent")
    assert house.contents(chat, anna) == ["By poll", "By HTTP"]
    marks = house.ask("GET", "/api/v1/chats", user_id=anna)["chats"][0]
    assert marks["unread"] == 0  # read marks go by HTTP too
    wire.cut_code = None
    comes_back(page)  # the socket is tried every 30 s
    expect(page.locator("#banner")).to_be_hidden()
    count = len(polls)
    page.clock.run_for(20_000)
    assert len(polls) == count
    house.say(chat, ben, "Live again")
    expect(bubbles(page)).to_have_text(["By poll", "By HTTP", "Live again"])


def test_the_socket_is_tried_again_at_a_click_and_when_the_network_is_back(
    house: House, chromium: Chromium
) -> None:
    anna, _, _ = pair(house)
    page = chromium.context().new_page()
    page.clock.install()
    wire = Wire(page)
    page.goto(house.link(anna))
    for hint in (
        lambda: page.get_by_role("button", name="Try now").click(),
        lambda: page.evaluate("dispatchEvent(new Event('online'))"),
        lambda: page.evaluate("document.dispatchEvent(new Event('visibilitychange'))"),
    ):
        state_is(page, "connected")
        wire.cut(1011, block=True)
        page.clock.run_for(5_100)
        state_is(page, "polling")
        expect(page.locator("#banner")).to_contain_text("Trying again in")
        wire.cut_code = None
        page.clock.run_for(1_000)
        hint()
    state_is(page, "connected")


def test_a_message_typed_offline_is_delivered_once(
    house: House, chromium: Chromium
) -> None:
    anna, ben, chat = pair(house)
    context = chromium.context()
    annas = sign_in(context, house.link(anna))
    bens = sign_in(chromium.context(), house.link(ben))
    for page in (annas, bens):
        open_chat(page, chat)
    context.set_offline(True)
    write(annas, "Typed offline")
    expect(ticks(annas)).to_have_text("Sending")
    context.set_offline(False)
    expect(bubbles(bens)).to_have_text(["Typed offline"])
    expect(ticks(annas)).to_have_text("Read")
    write(bens, "Got it")
    expect(bubbles(annas)).to_have_text(["Typed offline", "Got it"])
    assert house.contents(chat, anna) == ["Typed offline", "Got it"]


def test_a_silent_network_is_noticed(house: House, chromium: Chromium) -> None:
    anna, _, chat = pair(house)
    page = chromium.context().new_page()
    page.clock.install()
    silent = threading.Event()

    def open_wire(socket: sync_api.WebSocketRoute) -> None:
        server = socket.connect_to_server()
        first = not silent.is_set()

        def passes(send: Callable[[str | bytes], None], text: str | bytes) -> None:
            if not (first and silent.is_set()):
                send(text)

        socket.on_message(functools.partial(passes, server.send))
        server.on_message(functools.partial(passes, socket.send))

    page.route_web_socket(re.compile("/ws/chat"), open_wire)
    page.goto(house.link(anna))
    state_is(page, "connected")
    open_chat(page, chat)
    silent.set()
    write(page, "Hello?")
    page.clock.run_for(24_500)  # no answer for 20 s
    comes_back(page)
    expect(ticks(page)).to_have_text("Sent")
    assert house.contents(chat, anna) == ["Hello?"]


# --- the outbox ----------------------------------------------------------------------


def test_unsent_messages_outlive_a_reload(house: House, chromium: Chromium) -> None:
    anna, _, chat = pair(house)
    context = chromium.context()
    page = context.new_page()
    wire = Wire(page)
    page.goto(house.link(anna))
    open_chat(page, chat)
    wire.cut(1011, block=True)
    for text in ("One", "Two", "Three"):
        write(page, text)
    expect(ticks(page)).to_have_text(["Sending"] * 3)
    page.reload()
    expect(ticks(page)).to_have_text(["Sending"] * 3)
    wire.cut_code = None
    expect(ticks(page)).to_have_text(["Sent"] * 3)
    assert house.contents(chat, anna) == ["One", "Two", "Three"]
    page.reload()
    expect(bubbles(page)).to_have_text(["One", "Two", "Three"])


def test_a_message_whose_answer_was_lost_is_shown_once(
    house: House, chromium: Chromium
) -> None:
    anna, _, chat = pair(house)
    page = chromium.context().new_page()
    page.clock.install()
    wire = Wire(page)
    page.goto(house.link(anna))
    open_chat(page, chat)

    def lose_answer(route: sync_api.Route) -> None:
        if route.request.method == "POST":
            route.fetch()
            route.abort()
        else:
            route.continue_()

    page.route(re.compile("/messages"), lose_answer)
    wire.cut(1011, block=True)
    page.clock.run_for(5_100)
    state_is(page, "polling")
    with page.expect_event("requestfailed", lambda request: request.method == "POST"):
        write(page, "Once")
    assert house.contents(chat, anna) == ["Once"]
    page.reload()  # it is in the history, and in the outbox too
    expect(bubbles(page)).to_have_text(["Once"])
    wire.cut_code = None
    comes_back(page)
    until(lambda: page.evaluate("Object.keys(localStorage)") == ["chatd.session"])
    expect(ticks(page)).to_have_text(["Sent"])
    assert house.contents(chat, anna) == ["Once"]


def test_what_a_closed_tab_left_is_sent_by_another(
    house: House, chromium: Chromium
) -> None:
    anna, _, chat = pair(house)
    context = chromium.context()
    second = context.new_page()
    second.clock.install()
    second.goto(house.link(anna))
    open_chat(second, chat)
    first = context.new_page()
    wire = Wire(first)
    first.goto(f"{house.url}/#chat/{chat}")
    expect(field(first)).to_be_visible()
    state_is(first, "connected")
    wire.cut(1011, block=True)
    write(first, "One")
    write(first, "Two")
    first.close()
    second.clock.run_for(31_000)
    expect(bubbles(second)).to_have_text(["One", "Two"])
    expect(ticks(second)).to_have_text(["Sent", "Sent"])
    assert house.contents(chat, anna) == ["One", "Two"]
    assert second.evaluate("Object.keys(localStorage)") == ["chatd.session"]


def test_refused_messages_go_one_at_a_time_and_in_order(
    own_house: Callable[..., House], chromium: Chromium
) -> None:
    house = own_house("--sends", "2/3")
    anna, _, chat = pair(house)
    page = chromium.context().new_page()
    page.clock.install()
    wire = Wire(page)
    page.goto(house.link(anna))
    open_chat(page, chat)
    state_is(page, "connected")
    texts = [f"Message {i}" for i in range(8)]
    # All wait, and then go as fast as they can.
    page.route(re.compile("/api/"), lambda route: route.abort())
    wire.cut(1011, block=True)
    for text in texts:
        write(page, text)
    wire.cut_code = None
    page.unroute_all()
    comes_back(page)
    expect(ticks(page)).to_have_text(["Sent"] * 8)
    expect(bubbles(page)).to_have_text(texts)
    assert house.contents(chat, anna) == texts
    refusals = [f for f in wire.heard if f["type"] == "error"]
    assert {f["code"] for f in refusals} == {"rate_limited"}


def test_a_message_that_cannot_be_stored_fails_alone(
    own_house: Callable[..., House], chromium: Chromium
) -> None:
    house = own_house("--max-content-chars", "100", "--max-message-bytes", "4096")
    anna, _, chat = pair(house)
    page = sign_in(chromium.context(), house.link(anna))
    open_chat(page, chat)
    write(page, "x" * 101)
    write(page, "y" * 9000)  # too large even to be read
    write(page, "Short")
    expect(ticks(page)).to_have_text(["Sent", "Not sent", "Not sent"])
    failed = page.locator(".failed")
    expect(failed.first).to_contain_text("Not sent: content: 101 characters; at most")
    expect(failed.last).to_contain_text("too long")
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
def test_without_storage_all_works_but_the_next_visit(
    house: House, chromium: Chromium, storage: str
) -> None:
    anna, _, chat = pair(house)
    page = chromium.context().new_page()
    page.add_init_script(
        "Storage.prototype.setItem = () => { throw new Error('full'); };"
        if storage == "full"
        else "for (const name of ['localStorage', 'sessionStorage'])"
        "Object.defineProperty(window, name, { get() { throw new Error('no'); } });"
    )
    wire = Wire(page)
    page.goto(house.link(anna))
    open_chat(page, chat)
    wire.cut(1011)
    write(page, "Kept in memory")
    expect(ticks(page)).to_have_text("Sent")
    assert house.contents(chat, anna) == ["Kept in memory"]


# --- what the server can say ---------------------------------------------------------


def test_revoked_and_expired_users_sign_in_again(
    house: House, chromium: Chromium
) -> None:
    anna, ben, _ = pair(house)
    annas = sign_in(chromium.context(), house.link(anna))
    state_is(annas, "connected")
    house.ask("POST", "/api/v1/internal/chat/revoke", {"user_id": anna})  # 4503
    expect(annas.get_by_text("Your session has ended.")).to_be_visible()
    annas.reload()
    expect(annas.get_by_role("heading", name="Sign in to chatd")).to_be_visible()

    old = json.dumps({"token": house.token(ben, exp=1), "user_id": ben, "name": "Ben"})
    page = chromium.context().new_page()
    page.add_init_script(f"localStorage.setItem('chatd.session', {json.dumps(old)})")
    page.goto(house.url)  # 401
    expect(page.get_by_text("Your session has ended.")).to_be_visible()


def test_too_many_places_waits_until_it_is_looked_at(
    own_house: Callable[..., House], chromium: Chromium
) -> None:
    house = own_house("--connections-per-user", "1")
    anna, _, _ = pair(house)
    context = chromium.context()
    first = sign_in(context, house.link(anna))
    state_is(first, "connected")
    second = context.new_page()
    second.clock.install()
    second.goto(house.url)
    state_is(second, "too_many")
    expect(second.locator("#banner")).to_contain_text("open in too many places")
    tries = chromium.console.count("[WebSocket] Connected")
    second.clock.run_for(120_000)
    state_is(second, "too_many")
    assert chromium.console.count("[WebSocket] Connected") == tries
    first.close()
    until(lambda: house.stats()["connections"]["active"] == 0)
    second.evaluate("dispatchEvent(new Event('focus'))")
    state_is(second, "connected")
    expect(second.locator("#banner")).to_be_hidden()


def test_a_restart_is_waited_for_as_long_as_it_says(
    own_house: Callable[..., House], chromium: Chromium
) -> None:
    house = own_house()
    anna, _, chat = pair(house)
    page = chromium.context().new_page()
    wire = Wire(page)
    page.goto(house.link(anna))
    open_chat(page, chat)
    state_is(page, "connected")
    house.end()  # bye, then 1012
    write(page, "During the restart")
    house.start()
    expect(ticks(page)).to_have_text("Sent")
    assert [frame["type"] for frame in wire.heard].count("bye") == 1
    assert house.contents(chat, anna) == ["During the restart"]


def test_bye_says_when_to_come_back(house: House, chromium: Chromium) -> None:
    anna, _, _ = pair(house)
    page = chromium.context().new_page()
    page.clock.install()
    wire = Wire(page)
    page.goto(house.link(anna))
    state_is(page, "connected")
    wire.sockets[0].send(json.dumps({"type": "bye", "retry_after": 20}))
    wire.cut(1012)
    page.clock.run_for(5_100)
    state_is(page, "polling")
    expect(page.locator("#banner")).to_contain_text(
        re.compile("Trying again in 1[45] s")
    )
    page.clock.run_for(13_000)
    state_is(page, "polling")
    page.clock.run_for(3_000)
    state_is(page, "connected")


def test_the_end_of_a_token_is_not_noticed(
    house: House, site: Site, chromium: Chromium
) -> None:
    anna, ben, chat = pair(house)
    # A page with a session: the socket's ticket ends (4401), a new one is fetched.
    page = chromium.context().new_page()
    wire = Wire(page)
    page.goto(house.link(anna))
    open_chat(page, chat)
    state_is(page, "connected")
    wire.cut(4401)
    write(page, "Did anything happen?")
    expect(ticks(page)).to_have_text("Sent")
    expect(page.locator("#banner")).to_be_hidden()

    # A page of somebody else, whose tokens last a minute: each is renewed in time.
    page = chromium.context().new_page()
    embed(page, site, house)
    tokens = iter([house.token(ben, exp=int(time.time()) + 61), house.token(ben)])
    page.expose_function("newToken", lambda: next(tokens))
    wire = Wire(page)
    page.evaluate("chat.connect(() => newToken())")
    expect(page.locator("#types")).to_contain_text("token_expiring ack")
    assert len(wire.sockets) == 1
    ack = wire.heard[-1]
    assert (ack["ref"], ack["expires_in"] > 3000) == ("auth", True)


def test_after_a_restore_the_page_shows_what_is_there(
    own_house: Callable[..., House], chromium: Chromium, tmp_path: Path
) -> None:
    house = own_house()
    anna, ben, chat = pair(house)
    page = sign_in(chromium.context(), house.link(anna))
    open_chat(page, chat)
    write(page, "Before")
    expect(ticks(page)).to_have_text("Sent")
    house.command("backup", tmp_path / "backup.db")
    write(page, "Lost")
    expect(ticks(page)).to_have_text(["Sent", "Sent"])
    house.end(signal.SIGKILL)
    house.command("restore", tmp_path / "backup.db")  # a new epoch: a resync
    house.start()
    house.say(chat, ben, "While you were away")
    expect(bubbles(page)).to_have_text(["Before", "While you were away"])
    write(page, "After")
    expect(bubbles(page)).to_have_text(["Before", "While you were away", "After"])


# --- in a page of somebody else ------------------------------------------------------

EMBED = """<!doctype html><meta charset="utf-8"><title>Shop</title>
<p id="types"></p><p id="last"></p>
<script type="module">
  import { ChatWebSocket } from "%s/web/chat-websocket.js";
  window.chat = new ChatWebSocket();
  window.heard = [];
  const types = ["connected", "new_message", "message_read", "chat_added",
    "member_added", "member_removed", "typing", "ack", "error", "token_expiring",
    "resync", "delivery", "chats", "state", "bye"];
  for (const type of types) chat.on(type, (event) => {
    heard.push({ type, ...event });
    if (event.state === "sent") last.textContent = event.content;
    document.querySelector("#types").textContent += type + " ";
  });
</script>"""


def embed(page: Page, site: Site, house: House) -> None:
    """Open somebody else's page, which imports ChatWebSocket."""
    site.pages["/embed"] = ("text/html", EMBED % house.url)
    page.goto(f"{site.url}/embed")
    page.wait_for_load_state("networkidle")


def test_an_allowed_origin_may_embed_it(
    house: House, site: Site, chromium: Chromium
) -> None:
    anna, ben, chat = pair(house)
    page = chromium.context().new_page()
    embed(page, site, house)
    page.evaluate("(token) => chat.connect(token)", house.token(anna))
    types = page.locator("#types")
    expect(types).to_contain_text("connected")
    page.evaluate("(id) => chat.send(id, 'From the shop')", chat)
    expect(types).to_contain_text("new_message")
    house.say(chat, ben, "From the page")
    expect(types).to_contain_text(re.compile("new_message.*new_message"))
    heard = page.evaluate("heard")
    texts = [e["message"]["content"] for e in heard if e["type"] == "new_message"]
    assert texts == ["From the shop", "From the page"]
    assert [e["state"] for e in heard if e["type"] == "delivery"] == ["sending", "sent"]
    snapshot = page.evaluate("chat.fetchChats()")
    assert [c["id"] for c in snapshot["chats"]] == [chat]
    page.evaluate("chat.disconnect()")
    assert page.evaluate("chat.state") == "closed"
    house.say(chat, ben, "To nobody")
    # With a token that does not count it asks why, once, and stays away.
    with page.expect_response(re.compile("/api/v1/me")) as answer:
        page.evaluate("(token) => chat.connect(token)", house.token(anna, exp=1))
    assert answer.value.status == 401
    expect(types).to_contain_text(re.compile("state ?$"))
    assert page.evaluate("chat.state") == "signed_out"


def test_an_origin_that_was_not_allowed_may_not(
    own_house: Callable[..., House], site: Site, chromium: Chromium
) -> None:
    house = own_house()
    page = chromium.context().new_page()
    embed(page, site, house)
    assert "CORS" in chromium.complaints[0]
    chromium.complaints.clear()
    outcome = page.evaluate(
        """(url) => new Promise((done) => {
            const socket = new WebSocket(url);
            socket.onopen = () => done("open");
            socket.onclose = () => done("closed");
        })""",
        f"{house.url}/ws/chat?token={house.token(1)}".replace("http", "ws"),
    )
    assert outcome == "closed"


def example(document: str, language: str) -> str:
    """The last block of a language in a document."""
    blocks = re.findall(rf"(?s)```{language}\n(.*?)```", (HERE / document).read_text())
    return str(blocks[-1])


def test_the_page_that_the_documents_show_works(
    house: House, site: Site, chromium: Chromium
) -> None:
    shown = example("docs/embedding.md", "html")
    assert len(shown.splitlines()) <= 16
    anna, ben, chat = pair(house)
    tokens = {"token": house.token(anna)}
    site.pages["/chat-token"] = ("application/json", json.dumps(tokens))
    page_text = shown.replace("https://chat.example.org", house.url)
    site.pages["/shown"] = ("text/html", page_text.replace("CHAT_ID", str(chat)))
    page = chromium.context().new_page()
    page.goto(f"{site.url}/shown")
    page.get_by_role("textbox").fill("Hello from the shop")
    page.get_by_role("textbox").press("Enter")
    expect(page.get_by_text("Hello from the shop")).to_be_visible()
    house.say(chat, ben, "<b>Hello</b> from Ben")
    expect(page.get_by_text("<b>Hello</b> from Ben")).to_be_visible()
    assert house.contents(chat, anna) == [
        "Hello from the shop",
        "<b>Hello</b> from Ben",
    ]


def test_the_lines_of_the_readme_follow_a_chat(
    house: House, site: Site, chromium: Chromium
) -> None:
    anna, ben, chat = pair(house)
    tokens = {"token": house.token(anna)}
    site.pages["/chat-token"] = ("application/json", json.dumps(tokens))
    lines = example("README.md", "js").replace("https://chat.example.org", house.url)
    site.pages["/lines"] = ("text/html", f"<script type=module>{lines}</script>")
    page = chromium.context().new_page()
    with page.expect_console_message(lambda it: "type: connected" in it.text):
        page.goto(f"{site.url}/lines")
    expected = f"{ben} Hello from Ben"
    with page.expect_console_message(lambda it: it.text == expected):
        house.say(chat, ben, "Hello from Ben")


def test_events_come_once_and_in_order_whatever_happens_to_the_network(
    house: House, site: Site, chromium: Chromium
) -> None:
    anna, ben, chat = pair(house)
    page = chromium.context().new_page()
    page.clock.install()
    chance = random.Random(os.environ.get("SEED", "chatd"))
    wire = Wire(page)
    embed(page, site, house)
    fate = {"lost": 0.0}

    def request(route: sync_api.Route) -> None:
        if chance.random() > fate["lost"]:
            route.continue_()
        elif chance.random() < 0.5:
            route.abort()
        else:  # it arrived; its answer is lost
            route.fetch()
            route.abort()

    page.route(re.compile("/api/"), request)
    page.evaluate("(token) => chat.connect(token)", house.token(anna))
    said: list[str] = []
    for step in range(80):
        match chance.randrange(6):
            case 0:
                wire.cut(chance.choice((1006 - 6, 1012, 1013, 4008)))
            case 1:
                wire.cut(1011, block=True)
                fate["lost"] = chance.choice((0.0, 0.5, 1.0))
            case 2:
                wire.cut_code = None
                fate["lost"] = 0.0
            case 3:
                house.say(chat, ben, f"Ben {step}")
            case _:
                said.append(f"Anna {step}")
                page.evaluate("([id, text]) => chat.send(id, text)", [chat, said[-1]])
        page.clock.run_for(chance.choice((10, 300, 2_000, 6_000)))
    wire.cut_code = None
    fate["lost"] = 0.0
    said.append("The end")
    page.evaluate("([id, text]) => chat.send(id, text)", [chat, said[-1]])

    def ends() -> bool:
        page.clock.run_for(1_000)
        return page.locator("#last").inner_text() == "The end"

    until(ends)
    heard = page.evaluate("heard")
    stored = house.contents(chat, anna)
    messages = [e["message"] for e in heard if e["type"] == "new_message"]
    assert [m["n"] for m in messages] == list(range(1, len(stored) + 1))
    assert [m["content"] for m in messages] == stored
    assert [text for text in stored if not text.startswith("Ben")] == said
    deliveries = [(e["content"], e["state"]) for e in heard if e["type"] == "delivery"]
    for text in said:
        assert deliveries.count((text, "sending")) == 1
        assert deliveries.count((text, "sent")) == 1


EXAMPLE = """
interface Message {
  id: number; chat_id: number; sender_id: number; content: string; created_at: string;
}
type ServerMessage =
  | { type: "connected"; user_id: number; timestamp: string }
  | { type: "pong"; timestamp: string }
  | { type: "new_message"; chat_id: number; message: Message }
  | { type: "message_read"; message_id: number; chat_id: number; read_by: number }
  | { type: "typing"; chat_id: number; user_id: number; is_typing: boolean };

class ChatWebSocket {
  private ws: WebSocket | null = null;

  connect(token: string): void {
    this.ws = new WebSocket(`HOST/ws/chat?token=${token}`);
    this.ws.onopen = () => console.log("[WebSocket] Connected");
    this.ws.onmessage = (event: MessageEvent<string>) => {
      const data = JSON.parse(event.data) as ServerMessage;
      console.log("WebSocket message:", data);
      switch (data.type) {
        case "connected":
          this.ws?.send(JSON.stringify({ type: "ping" }));
          break;
        case "pong":
          show(`pong ${data.timestamp}`);
          break;
        case "new_message":
          show(`${data.message.sender_id}: ${data.message.content}`);
          this.markRead(data.message.id);
          break;
        case "message_read":
          show(`${data.read_by} read ${data.message_id} of ${data.chat_id}`);
          break;
        case "typing":
          show(`${data.user_id} ${data.is_typing ? "types" : "stops"}`);
          break;
      }
    };
    this.ws.onclose = () => show("closed");
  }

  sendTyping(chatId: number, isTyping: boolean): void {
    const typing = { type: "typing", chat_id: chatId, is_typing: isTyping };
    this.ws?.send(JSON.stringify(typing));
  }

  markRead(messageId: number): void {
    this.ws?.send(JSON.stringify({ type: "mark_read", message_id: messageId }));
  }

  disconnect(): void {
    this.ws?.close();
    this.ws = null;
  }
}

function show(text: string): void {
  document.body.appendChild(document.createElement("p")).textContent = text;
}

(window as unknown as { chat: ChatWebSocket }).chat = new ChatWebSocket();
"""


def test_a_bare_websocket_in_typescript_works_as_the_specification_has_it(
    house: House, site: Site, chromium: Chromium, tmp_path: Path
) -> None:
    tsc = find_program(
        (str(HERE / ".venv/node_modules/.bin/tsc"), "tsc"),
        "no tsc: npm install --prefix .venv typescript",
    )
    source = tmp_path / "example.ts"
    source.write_text(EXAMPLE.replace("HOST", house.url.replace("http", "ws")))
    options = ("--strict", "--target", "es2022", "--lib", "es2022,dom")
    subprocess.run([tsc, *options, "--outDir", tmp_path, source], check=True)
    script = tmp_path.joinpath("example.js").read_text()
    site.pages["/ts"] = ("text/html", f"<body><script>{script}</script>")
    anna, ben, chat = pair(house)
    tabs = []
    for user in (anna, ben):
        tab = chromium.context().new_page()
        tab.goto(f"{site.url}/ts")
        tab.evaluate("(token) => chat.connect(token)", house.token(user))
        expect(tab.get_by_text(re.compile(r"^pong 20\d\d-"))).to_be_visible()
        tabs.append(tab)
    annas, bens = tabs
    annas.evaluate("(id) => chat.sendTyping(id, true)", chat)
    expect(bens.get_by_text(f"{anna} types")).to_be_visible()
    message = house.say(chat, anna, "Привет!")
    expect(bens.get_by_text(f"{anna}: Привет!")).to_be_visible()
    read = f"{ben} read {message['id']} of {chat}"
    expect(annas.get_by_text(read)).to_be_visible()
    annas.evaluate("chat.disconnect()")
    expect(annas.get_by_text("closed")).to_be_visible()


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


def test_what_people_write_is_text(house: House, chromium: Chromium) -> None:
    evil = "<b>Ben</b>"
    anna, ben = house.person("Anna"), house.person(evil)
    chat = house.chat(anna, ben, title="<script>alert(1)</script>")
    page = sign_in(chromium.context(), house.link(anna))
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    open_chat(page, chat)
    for text in ATTACKS:
        house.say(chat, ben, text)
    expect(bubbles(page)).to_have_text(ATTACKS)
    expect(page.locator("#pane-title")).to_have_text("<script>alert(1)</script>")
    expect(page.locator(".sender").first).to_have_text(evil)
    made = page.locator("#chat :is(script, iframe, img, b)")
    expect(made).to_have_count(0)


def test_only_web_addresses_become_links(house: House, chromium: Chromium) -> None:
    anna, ben, chat = pair(house)
    page = sign_in(chromium.context(), house.link(anna))
    open_chat(page, chat)
    house.say(
        chat, ben,
        "See https://example.org/a_(b)?c=1&d=2#e, (http://example.net/x) or "
        "HTTPS://EXAMPLE.COM/ü! Not javascript:alert(1), ftp://example.org, "
        "xhttps://example.org/no or https://[broken",
    )  # fmt: skip
    links = bubbles(page).locator("a")
    expect(links).to_have_text(
        ["https://example.org/a_(b)?c=1&d=2#e", "http://example.net/x",
         "HTTPS://EXAMPLE.COM/ü"]
    )  # fmt: skip
    for link in links.all():
        expect(link).to_have_attribute("rel", re.compile("noopener"))
        expect(link).to_have_attribute("target", "_blank")


def test_the_policy_stops_what_the_page_would_not_do(
    house: House, chromium: Chromium
) -> None:
    anna, _, _ = pair(house)
    page = chromium.context().new_page()
    answer = page.goto(house.link(anna))
    assert answer is not None
    policy = answer.headers["content-security-policy"]
    for part in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"):
        assert part in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    state_is(page, "connected")
    assert chromium.complaints == []
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
    assert len(chromium.complaints) >= 3
    chromium.complaints.clear()


# --- for everybody's eyes, hands and ears --------------------------------------------

AXE = files("axe_playwright_python").joinpath("axe.min.js")
SIZES = {"phone": (320, 640), "tablet": (768, 1024), "wide": (1440, 900)}


def axe(page: Page) -> None:
    """Look for what keeps people out (https://github.com/dequelabs/axe-core)."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    faults = [
        (fault["id"], node["html"]) for fault in found["violations"]
        for node in fault["nodes"]
    ]  # fmt: skip
    assert faults == []


@pytest.fixture(scope="module")
def street(house: House) -> tuple[int, int]:
    """Anna and her chats, as they might look after a day. Returns her and one chat."""
    names = (
        "Anna Petrova",
        "Ben Okafor",
        "Chiara Rossi",
        "Dmitri Волков",
        "Elif Yılmaz",
    )
    anna, ben, chiara, dmitri, elif_ = (house.person(name) for name in names)
    bicycle = house.chat(anna, ben, title="Bicycle, 54 cm, steel frame")
    with_chiara, with_elif = house.chat(anna, chiara), house.chat(anna, elif_)
    moving = house.chat(anna, ben, chiara, dmitri, title="Flat 12 — moving day")
    house.say(with_elif, elif_, "Thanks for the lamp, it looks lovely in the hall")
    house.say(with_chiara, chiara, "Ciao Anna! Are you coming on Saturday?")
    house.say(with_chiara, anna, "Yes, with the cake 🍰")
    house.say(moving, dmitri, "I can bring the van at nine.")
    house.say(moving, chiara, "Books are packed, 14 boxes.")
    for who, text in (
        (ben, "Hi! Is the bicycle still for sale?"),
        (anna, "Yes, it is. I changed the chain and the brake pads in spring."),
        (ben, "Great. Could you send me the address?"),
        (ben, "I could come by on Thursday after six."),
        (anna, "Thursday is fine. Gartenstraße 12, ring at “Petrova”. It is here: "
         "https://www.openstreetmap.org/node/240109189"),
        (anna, "One more thing: the rear light is missing, so it is 10 € less."),
        (ben, "Perfect 👍"),
    ):  # fmt: skip
        house.say(bicycle, who, text)
    return anna, bicycle


def picture(page: Page, name: str) -> None:
    """Keep a screenshot to look at, where SHOTS names a folder."""
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        f"{name} is wider than its screen"
    )
    if folder := os.environ.get("SHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_screenshots_fit_and_axe_finds_nothing(
    house: House, chromium: Chromium, street: tuple[int, int], size: str, scheme: Any
) -> None:
    width, height = SIZES[size]
    context = chromium.context(
        color_scheme=scheme, viewport={"width": width, "height": height},
        reduced_motion="reduce",
    )  # fmt: skip
    anna, chat = street
    page = context.new_page()
    page.clock.install()
    wire = Wire(page)

    def look(what: str) -> None:
        picture(page, f"{size}-{scheme}-{what}")
        if size != "tablet":  # it shows nothing that the others do not
            axe(page)

    page.goto(house.url)
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    look("sign-in")
    page.goto(house.link(anna))
    state_is(page, "connected")
    expect(page.locator("#chat-list .row")).to_have_count(4)
    look("list")
    page.get_by_role("button", name=re.compile("new message")).click()
    expect(page.locator("#bell-panel")).to_be_visible()
    look("bell")
    page.keyboard.press("Escape")
    open_chat(page, chat)
    expect(bubbles(page)).to_have_count(7)
    look("chat")
    page.get_by_role("button", name="People in this chat").click()
    look("people")
    page.keyboard.press("Escape")
    page.route(re.compile("/api/"), lambda route: route.abort())
    wire.cut(1011, block=True)
    write(page, "Typed while the train was in the tunnel: " + "ß" * 60)
    page.clock.run_for(5_100)
    state_is(page, "offline")
    look("offline")


def test_it_can_be_used_with_the_keyboard_alone(
    house: House, chromium: Chromium
) -> None:
    anna, ben, chat = pair(house)
    house.person("Cora")
    house.say(chat, ben, "Hello Anna")
    page = sign_in(chromium.context(), house.link(anna))
    state_is(page, "connected")
    focused = page.locator(":focus")

    def tab_to(name: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            label = focused.evaluate(
                "(e) => e.getAttribute('aria-label') || e.innerText"
            )
            if name in label:
                # and one can see where one is
                width = focused.evaluate("(e) => getComputedStyle(e).outlineWidth")
                assert width != "0px"
                return
        pytest.fail(f"no Tab leads to {name}")

    tab_to("Ben")
    page.keyboard.press("Enter")
    expect(field(page)).to_be_focused()
    page.keyboard.type("Hello Ben")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("How are you?")
    page.keyboard.press("Enter")
    expect(bubbles(page)).to_have_text(["Hello Anna", "Hello Ben\nHow are you?"])
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("log", name="Messages in Ben")).to_be_focused()
    page.go_back()
    expect(page.locator("#chat-list .row")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name="New chat")).to_be_focused()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="New chat")
    expect(dialog).to_be_visible()
    page.keyboard.type("Tea")
    page.keyboard.press("Tab")
    page.keyboard.type("Cora")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    expect(page.locator("#pane-title")).to_have_text("Tea")
    expect(field(page)).to_be_focused()


def test_motion_is_left_out_where_it_was_not_wanted(
    house: House, chromium: Chromium
) -> None:
    anna, ben, chat = pair(house)
    page = sign_in(chromium.context(reduced_motion="reduce"), house.link(anna))
    open_chat(page, chat)
    house.say(chat, ben, "Not a wink")
    expect(bubbles(page)).to_have_text(["Not a wink"])
    moving = "document.getAnimations().filter((a) => a.playState === 'running').length"
    assert page.evaluate(moving) == 0
