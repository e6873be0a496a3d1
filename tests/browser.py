"""What the tests of the page share: a server, Chromium, and what users do there.

A test file of the page names the fixtures that it uses, and is marked:

    pytestmark = pytest.mark.browser
    site, server, make_server, browser, chromium, example_chats = FIXTURES

Each test has its own users, so most tests of a file share one server. Every wait has a
deadline (WAIT_SECONDS), and no test sleeps: the waits of 5 s and 30 s run on the
browser's fake clock. An error on a page fails the test, above all a violation of the
content security policy. Only errors of the network are ignored, because tests cut it.

    apt-get install chromium libatomic1     # or CHROMIUM=/path/to/it
    .venv/bin/python -m pytest -m browser
    SHOTS=folder .venv/bin/python -m pytest -k fits_each_screen     # keeps screenshots
"""

from __future__ import annotations

import http.server
import itertools
import json
import os
import re
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

import pytest

from tests.client import CHECKOUT, CHROMIUM, WAIT_SECONDS, Frame, Process, find_program

if os.environ.get("CI"):
    from playwright import sync_api
else:
    sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

Context = sync_api.BrowserContext
Locator = sync_api.Locator
Page = sync_api.Page
Request = sync_api.Request
Response = sync_api.Response
Route = sync_api.Route
WebSocketRoute = sync_api.WebSocketRoute
users = itertools.count(1)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what no page reports. Routes run only while a test calls Playwright."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- chatd, and a page of another site -----------------------------------------------


class Server(Process):
    """A `chatd serve` on a free port. It has the same port when it starts again."""

    def __init__(self, folder: Path, *flags: str) -> None:
        super().__init__(folder)
        # All tests share one address, and they send more requests than people do.
        self.flags = ("--requests", "0", "--handshakes", "0", *flags)
        self.start()

    def run(self, name: str, file: Path) -> None:
        """Run `chatd backup` or `chatd restore` on the database."""
        command = [sys.executable, "-m", "chatd", name, str(file), "--db", str(self.db)]
        subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True)

    def link(self, user: int) -> str:
        return f"{self.url}/#token={self.token(user, use='signin')}"

    def request(
        self, method: str, path: str, body: Frame | None = None, **claims: Any
    ) -> Any:
        """Send a request over HTTP, as a service unless `claims` name a user."""
        claims = claims or {"user_id": 2**40, "scope": "service"}
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.token(0, **claims)}"},
        )
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def add_user(self, name: str) -> int:
        """Make a user. The server learns the name from the user's token."""
        user = next(users)
        self.request("GET", "/api/v1/me", user_id=user, name=name)
        return user

    def create_chat(self, *members: int, title: str | None = None) -> int:
        body = {"title": title, "member_ids": members}
        chat_id: int = self.request("POST", "/api/v1/chats", body)["chat"]["id"]
        return chat_id

    def post(self, chat: int, sender: int, content: str) -> Frame:
        body = {"content": content, "sender_id": sender}
        path = f"/api/v1/chats/{chat}/messages"
        message: Frame = self.request("POST", path, body)["message"]
        return message

    def mark_read(self, message_id: int, reader: int) -> None:
        path = f"/api/v1/messages/{message_id}/read"
        self.request("POST", path, user_id=reader)

    def stats(self) -> Frame:
        path = "/api/v1/internal/chat/ws/stats"
        document: Frame = self.request("GET", path, user_id=1, scope="stats")
        return document

    def texts(self, chat: int, reader: int) -> list[str]:
        """Return the texts of the stored messages, oldest first."""
        path = f"/api/v1/chats/{chat}/messages?limit=100"
        messages = self.request("GET", path, user_id=reader)["messages"]
        return [message["content"] for message in messages]


class Site(http.server.ThreadingHTTPServer):
    """The web server of another site, whose pages use ChatWebSocket."""

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
                """Print nothing."""

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.pages["/"] = ("text/html", "<!doctype html><title>Shop</title>")
        self.pages["/favicon.ico"] = ("image/svg+xml", "<svg/>")

    def answer_with_token(self, token: str) -> None:
        """Answer /chat-token, as the documents' examples expect it of a backend."""
        answer = json.dumps({"token": token})
        self.pages["/chat-token"] = ("application/json", answer)


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
def server(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that most tests share. It accepts the origin of the other site."""
    server = Server(tmp_path_factory.mktemp("chatd"), "--origin", site.url)
    yield server
    server.end(signal.SIGTERM)


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start a server that the test may kill, or that needs its own flags."""
    made: list[Server] = []

    def make(*flags: str) -> Server:
        made.append(Server(tmp_path / str(len(made)), *flags))
        return made[-1]

    yield make
    for server in made:
        if server.process is not None:
            server.end(signal.SIGTERM)


# --- Chromium ------------------------------------------------------------------------

# What a browser prints when a test cuts the network.
NETWORK = re.compile(r"net::ERR_|WebSocket connection to|Failed to load resource")


class Chromium:
    """The browser, with the contexts of one test and the errors of its pages."""

    def __init__(self, browser: sync_api.Browser) -> None:
        self.browser = browser
        self.contexts: list[Context] = []
        self.errors: list[str] = []
        self.console: list[str] = []

    def context(self, **options: Any) -> Context:
        """Make a browser profile. Its tabs share storage; other profiles do not."""
        options.setdefault("viewport", {"width": 1100, "height": 700})
        context = self.browser.new_context(**options)
        context.set_default_timeout(WAIT_SECONDS * 1000)
        context.on("console", self._record)
        context.on("weberror", lambda e: self.errors.append(str(e.error)))
        self.contexts.append(context)
        return context

    def page(self, *, clock: bool = False) -> Page:
        """Open an empty page in a profile of its own, with a fake clock if asked."""
        page = self.context().new_page()
        if clock:
            page.clock.install()
        return page

    def hurry(self, page: Page) -> None:
        """Let the page's CSS animations take a fiftieth of their time."""
        cdp = page.context.new_cdp_session(page)
        cdp.send("Animation.enable")
        cdp.send("Animation.setPlaybackRate", {"playbackRate": 50})

    def _record(self, message: sync_api.ConsoleMessage) -> None:
        self.console.append(message.text)
        if message.type in ("error", "warning") and not NETWORK.search(message.text):
            self.errors.append(message.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    path = find_program(CHROMIUM, "no Chromium: apt install chromium libatomic1")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def chromium(browser: sync_api.Browser) -> Iterator[Chromium]:
    expect.set_options(timeout=WAIT_SECONDS * 1000)
    chromium = Chromium(browser)
    yield chromium
    for context in chromium.contexts:
        context.close()
    assert chromium.errors == []


# --- what users do on the page -------------------------------------------------------


# A single chat opens by itself, unless the address says that the list is open.
STAY_AT_THE_LIST = """addEventListener("DOMContentLoaded", () => {
  if (!location.hash) history.replaceState(null, "", "#chats");
});"""


# Gives a test on a slow machine an hour to undo a deletion, instead of five seconds.
UNHURRIED = """(() => {
  const wait = setTimeout;
  window.setTimeout = (task, ms) => wait(task, ms === 5_000 ? 3_600_000 : ms);
})()"""


def sign_in(context: Context, link: str, chat: int | None = None) -> Page:
    """Open a sign-in link in a new tab, and then a chat, or else the list."""
    page = context.new_page()
    page.add_init_script(STAY_AT_THE_LIST)
    page.goto(link)
    expect(page.locator("#me-name")).not_to_be_empty()
    if chat is not None:
        open_chat(page, chat)
    return page


def open_chat(page: Page, chat: int) -> None:
    row = page.locator(f"#chat-list a[href='#chat/{chat}']")
    expect(row).to_be_attached()
    if row.get_attribute("aria-current") is None:  # a single chat opens by itself
        row.click()
    expect(row).to_have_attribute("aria-current", "page")
    expect(page.locator("#composer")).to_be_visible()


def field(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Your message")


def write(page: Page, text: str) -> None:
    field(page).fill(text)
    field(page).press("Enter")


def bubbles(page: Page) -> Locator:
    return page.locator("#messages .message .content")


def ticks(page: Page) -> Locator:
    """The states of the user's own messages, without the times of edits."""
    return page.locator("#messages .own .stamp > .sr-only")


def expect_state(page: Page, state: str) -> None:
    expect(page.locator("#connection")).to_have_attribute("data-state", state)


def wait_until_connected(page: Page) -> None:
    """Advance the page's clock by one second at a time until it is connected."""

    def connected() -> bool:
        page.clock.run_for(1_000)
        return page.locator("#connection").get_attribute("data-state") == "connected"

    until(connected)


class Relay:
    """Stands between a page and the server: keeps server messages, and cuts sockets."""

    def __init__(self, page: Page) -> None:
        self.refusal_code: int | None = None
        self.sockets: list[WebSocketRoute] = []
        self.received: list[Frame] = []
        page.route_web_socket(re.compile("/ws/chat"), self._open)

    @classmethod
    def connected(cls, page: Page, link: str, chat: int | None = None) -> Relay:
        """Open a sign-in link through a relay, wait for the socket, open a chat."""
        relay = cls(page)
        page.add_init_script(STAY_AT_THE_LIST)
        page.goto(link)
        expect_state(page, "connected")
        if chat is not None:
            open_chat(page, chat)
        return relay

    def _open(self, socket: WebSocketRoute) -> None:
        if self.refusal_code is not None:
            socket.close(code=self.refusal_code)
            return
        upstream = socket.connect_to_server()
        self.sockets.append(socket)

        def receive(text: str | bytes) -> None:
            self.received.append(json.loads(text))
            socket.send(text)

        socket.on_message(upstream.send)
        upstream.on_message(receive)

    def cut(self, code: int, *, block: bool = False) -> None:
        """Close the open sockets with this code; block: and all later ones, too."""
        self.refusal_code = code if block else None
        for socket in self.sockets:
            socket.close(code=code)
        self.sockets.clear()

    def unblock(self) -> None:
        self.refusal_code = None


def go_offline(page: Page, relay: Relay) -> None:
    """Cut the socket and all requests, until the page says so."""
    page.route(re.compile("/api/"), lambda route: route.abort())
    relay.cut(1011, block=True)
    page.clock.run_for(5_100)
    expect_state(page, "offline")


def come_back(page: Page, relay: Relay) -> None:
    """Let all requests through again, and a socket, and wait for it."""
    page.unroute_all()
    relay.unblock()
    wait_until_connected(page)


def pair(server: Server, *, title: str | None = None) -> tuple[int, int, int]:
    """Make Anna, Ben and a chat of the two."""
    anna, ben = server.add_user("Anna"), server.add_user("Ben")
    return anna, ben, server.create_chat(anna, ben, title=title)


def unread(server: Server, user: int, chat: int) -> int:
    """Return what the server counts as unread in this chat."""
    chats = server.request("GET", "/api/v1/chats", user_id=user)["chats"]
    (count,) = [one["unread"] for one in chats if one["id"] == chat]
    return int(count)


def long_chat(server: Server) -> tuple[int, int, int]:
    """Make a chat of Anna and Ben that is longer than any screen. Anna has read it."""
    anna, ben, chat = pair(server)
    for i in range(30):
        text = f"Message {i} " + "words " * 12
        last = server.post(chat, anna if i % 3 else ben, text)
    server.mark_read(last["id"], anna)
    return anna, ben, chat


def refuse(route: Route, status: int, body: Frame) -> None:
    route.fulfill(status=status, json=body)


# Hides a page until it calls show(), and prints its notifications.
HIDE = """
    window.isHidden = true;
    Object.defineProperty(document, "visibilityState",
        { get: () => window.isHidden ? "hidden" : "visible" });
    window.show = () => {
        window.isHidden = false;
        document.dispatchEvent(new Event("visibilitychange"));
    };
    window.Notification = class extends EventTarget {
        static permission = "granted";
        constructor(title, { body }) { super(); console.log(`${title} says: ${body}`); }
    };
"""

# --- what the page looks like -------------------------------------------------------

AXE = files("axe_playwright_python").joinpath("axe.min.js")
PHONE: Any = {"width": 390, "height": 844}
SIZES = {"phone": (320, 640), "tablet": (768, 1024), "wide": (1440, 900)}


def axe(page: Page) -> None:
    """Check the page with axe (https://github.com/dequelabs/axe-core)."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    faults = [
        (fault["id"], node["html"]) for fault in found["violations"]
        for node in fault["nodes"]
    ]  # fmt: skip
    assert faults == []


@pytest.fixture(scope="module")
def example_chats(server: Server) -> tuple[int, int]:
    """Make Anna and her chats of a day. Return Anna's id and the id of one chat."""
    names = (
        "Anna Petrova",
        "Ben Okafor",
        "Chiara Rossi",
        "Dmitri Волков",
        "Elif Yılmaz",
    )
    anna, ben, chiara, dmitri, elif_ = (server.add_user(name) for name in names)
    bicycle = server.create_chat(anna, ben, title="Bicycle, 54 cm, steel frame")
    with_chiara, with_elif = (
        server.create_chat(anna, chiara),
        server.create_chat(anna, elif_),
    )
    moving = server.create_chat(anna, ben, chiara, dmitri, title="Flat 12 — moving day")
    server.post(with_elif, elif_, "Thanks for the lamp, it looks lovely in the hall")
    server.post(with_chiara, chiara, "Ciao Anna! Are you coming on Saturday?")
    server.post(with_chiara, anna, "Yes, with the cake 🍰")
    server.post(moving, dmitri, "I can bring the van at nine.")
    server.post(moving, chiara, "Books are packed, 14 boxes.")
    for sender, text in (
        (ben, "Hi! Is the bicycle still for sale?"),
        (anna, "Yes, it is. I changed the chain and the brake pads in spring."),
        (ben, "Great. Could you send me the address?"),
        (ben, "I could come by on Thursday after six."),
        (anna, "Thursday is fine. Gartenstraße 12, ring at “Petrova”. It is here: "
         "https://www.openstreetmap.org/node/240109189"),
        (anna, "One more thing: the rear light is missing, so it is 10 € less."),
        (ben, "Perfect 👍"),
    ):  # fmt: skip
        server.post(bicycle, sender, text)
    return anna, bicycle


def screenshot(page: Page, name: str) -> None:
    """Check that the page fits its screen, and keep a screenshot if SHOTS is set."""
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        f"{name} is wider than its screen"
    )
    if folder := os.environ.get("SHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


# The names under which a test file takes the fixtures.
FIXTURES = (site, server, make_server, browser, chromium, example_chats)
