"""ChatWebSocket in a real Chromium, as the page uses it and as other sites embed it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser import (
    FIXTURES,
    Chromium,
    Page,
    Relay,
    Route,
    Server,
    Site,
    WebSocketRoute,
    bubbles,
    expect,
    pair,
    sign_in,
    ticks,
    until,
    write,
)
from tests.client import CHECKOUT, Frame, find_program

pytestmark = pytest.mark.browser
site, server, make_server, browser, chromium, example_chats = FIXTURES


# --- in a page of another site -------------------------------------------------------

# A page that uses ChatWebSocket, and keeps the events that it receives.
EMBED = """<!doctype html><meta charset="utf-8"><title>Shop</title>
<p id="types"></p><p id="last"></p>
<script type="module">
  import { ChatWebSocket } from "%s/web/chat-websocket.js";
  window.chat = new ChatWebSocket();
  window.received = [];
  const types = ["connected", "new_message", "message_read", "chat_added",
    "member_added", "member_removed", "typing", "ack", "error", "token_expiring",
    "resync", "delivery", "chats", "state", "bye"];
  for (const type of types) chat.on(type, (event) => {
    received.push({ type, ...event });
    if (event.state === "sent") last.textContent = event.content;
    document.querySelector("#types").textContent += type + " ";
  });
</script>"""


def embed(page: Page, site: Site, server: Server) -> None:
    """Open a page of the other site, which imports ChatWebSocket from the server."""
    site.pages["/embed"] = ("text/html", EMBED % server.url)
    page.goto(f"{site.url}/embed")
    page.wait_for_load_state("networkidle")


def test_a_page_of_an_allowed_origin_can_use_the_client(
    server: Server, site: Site, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    page = chromium.page()
    embed(page, site, server)
    page.evaluate("(token) => chat.connect(token)", server.token(anna))
    types = page.locator("#types")
    expect(types).to_contain_text("connected")
    page.evaluate("(id) => chat.send(id, 'From the shop')", chat)
    expect(types).to_contain_text("new_message")
    server.post(chat, ben, "From the page")
    expect(types).to_contain_text(re.compile("new_message.*new_message"))
    received = page.evaluate("received")
    texts = [e["message"]["content"] for e in received if e["type"] == "new_message"]
    assert texts == ["From the shop", "From the page"]
    states = [e["state"] for e in received if e["type"] == "delivery"]
    assert states == ["sending", "sent"]
    snapshot = page.evaluate("chat.fetchChats()")
    assert [c["id"] for c in snapshot["chats"]] == [chat]
    page.evaluate("chat.disconnect()")
    assert page.evaluate("chat.state") == "closed"
    server.post(chat, ben, "To nobody")
    # With an expired token, the client asks once over HTTP and then stops.
    with page.expect_response(re.compile("/api/v1/me")) as answer:
        page.evaluate("(token) => chat.connect(token)", server.token(anna, exp=1))
    assert answer.value.status == 401
    expect(types).to_contain_text(re.compile("state ?$"))
    assert page.evaluate("chat.state") == "signed_out"


def test_a_page_of_another_origin_cannot_use_the_client(
    make_server: Callable[..., Server], site: Site, chromium: Chromium
) -> None:
    server = make_server()
    page = chromium.page()
    embed(page, site, server)
    assert "CORS" in chromium.errors[0]
    chromium.errors.clear()
    outcome = page.evaluate(
        """(url) => new Promise((done) => {
            const socket = new WebSocket(url);
            socket.onopen = () => done("open");
            socket.onclose = () => done("closed");
        })""",
        f"{server.url}/ws/chat?token={server.token(1)}".replace("http", "ws"),
    )
    assert outcome == "closed"


def example(document: str, language: str, server: Server) -> str:
    """Return a document's last block of a language, with the address of the server."""
    text = (CHECKOUT / document).read_text()
    blocks = re.findall(rf"(?s)```{language}\n(.*?)```", text)
    return str(blocks[-1]).replace("https://chat.example.org", server.url)


def test_the_page_in_docs_embedding_works(
    server: Server, site: Site, chromium: Chromium
) -> None:
    html = example("docs/embedding.md", "html", server)
    assert len(html.splitlines()) <= 16
    anna, ben, chat = pair(server)
    site.answer_with_token(server.token(anna))
    site.pages["/example"] = ("text/html", html.replace("CHAT_ID", str(chat)))
    page = chromium.page()
    page.goto(f"{site.url}/example")
    page.get_by_role("textbox").fill("Hello from the shop")
    page.get_by_role("textbox").press("Enter")
    expect(page.get_by_text("Hello from the shop")).to_be_visible()
    server.post(chat, ben, "<b>Hello</b> from Ben")
    expect(page.get_by_text("<b>Hello</b> from Ben")).to_be_visible()
    assert server.texts(chat, anna) == ["Hello from the shop", "<b>Hello</b> from Ben"]


def test_a_page_learns_why_its_socket_does_not_open_as_the_documentation_says(
    make_server: Callable[..., Server], site: Site, chromium: Chromium
) -> None:
    server = make_server("--origin", site.url, "--requests", "0.1/2")
    script = example("docs/protocol.md", "js", server)
    site.pages["/waits"] = ("text/html", f"<script>{script}</script>")
    page = chromium.page()
    page.goto(f"{site.url}/waits")

    code = page.evaluate(
        """(url) => new Promise((done) => {
            new WebSocket(url).onclose = ({ code }) => done(code);
        })""",
        f"{server.url}/ws/chat?token=x".replace("http", "ws"),
    )
    assert code == 1006  # and no word of the 401

    def wait(token: str, failures: int = 0) -> Any:
        ask = "([...given]) => waitAfterRefusal(...given)"
        return page.evaluate(ask, [server.url, token, failures])

    for wrong in ("x", server.token(1, exp=1), server.token(1, use="signin")):
        assert wait(wrong) is None
    assert all(0 <= wait(server.token(1)) <= 1 for _ in range(2))
    assert wait(server.token(1)) >= 1  # 429
    server.request("POST", "/api/v1/internal/chat/revoke", {"user_id": 1})
    assert wait(server.token(1, iat=1)) is None

    def answered(status: int, **headers: str) -> Any:
        headers["Access-Control-Allow-Origin"] = "*"
        headers["Access-Control-Expose-Headers"] = "Retry-After"
        page.route("**/me", lambda route: route.fulfill(status=status, headers=headers))
        found = wait(server.token(2))
        page.unroute("**/me")
        return found

    assert answered(403) is None
    assert answered(503, **{"Retry-After": "9"}) == 9
    server.end(signal.SIGTERM)
    assert 0 <= wait(server.token(2), 2) <= 4
    assert 0 <= wait(server.token(2), 50) <= 30


def test_the_lines_in_the_readme_follow_a_chat(
    server: Server, site: Site, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    site.answer_with_token(server.token(anna))
    lines = example("README.md", "js", server)
    site.pages["/example"] = ("text/html", f"<script type=module>{lines}</script>")
    page = chromium.page()
    with page.expect_console_message(lambda line: "type: connected" in line.text):
        page.goto(f"{site.url}/example")
    expected = f"{ben} Hello from Ben"
    with page.expect_console_message(lambda line: line.text == expected):
        server.post(chat, ben, "Hello from Ben")


def test_events_arrive_once_and_in_order_whatever_the_network_does(
    server: Server, site: Site, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    page = chromium.page(clock=True)
    chance = random.Random(os.environ.get("SEED", "chatd"))
    relay = Relay(page)
    embed(page, site, server)
    loss = 0.0  # the share of requests that are lost, or whose answers are
    sent: list[str] = []

    def request(route: Route) -> None:
        if chance.random() > loss:
            route.continue_()
        elif chance.random() < 0.5:
            route.abort()
        else:  # the request arrives, but its answer is lost
            route.fetch()
            route.abort()

    def send(text: str) -> None:
        sent.append(text)
        page.evaluate("([id, text]) => chat.send(id, text)", [chat, text])

    page.route(re.compile("/api/"), request)
    page.evaluate("(token) => chat.connect(token)", server.token(anna))
    for step in range(80):
        match chance.randrange(6):
            case 0:
                relay.cut(chance.choice((1000, 1012, 1013, 4008)))
            case 1:
                relay.cut(1011, block=True)
                loss = chance.choice((0.0, 0.5, 1.0))
            case 2:
                relay.unblock()
                loss = 0.0
            case 3:
                server.post(chat, ben, f"Ben {step}")
            case _:
                send(f"Anna {step}")
        page.clock.run_for(chance.choice((10, 300, 2_000, 6_000)))
    relay.unblock()
    loss = 0.0
    send("The end")

    received: list[Any] = []

    def end_has_come() -> bool:
        """Whether it is sent, and the event has come: an answer over HTTP is faster."""
        page.clock.run_for(1_000)
        received[:] = page.evaluate("received")
        events = [e["message"] for e in received if e["type"] == "new_message"]
        last = page.locator("#last").inner_text()
        arrived = any(message["content"] == "The end" for message in events)
        return arrived and last == "The end"

    until(end_has_come)
    stored = server.texts(chat, anna)
    messages = [e["message"] for e in received if e["type"] == "new_message"]
    assert [m["n"] for m in messages] == list(range(1, len(stored) + 1))
    assert [m["content"] for m in messages] == stored
    assert [text for text in stored if not text.startswith("Ben")] == sent
    deliveries = [e for e in received if e["type"] == "delivery"]
    states = [(e["content"], e["state"]) for e in deliveries]
    for text in sent:
        assert states.count((text, "sending")) == 1
        assert states.count((text, "sent")) == 1


# The client of the specification, completed to a program.
TYPESCRIPT = """
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


def test_the_typescript_client_of_the_specification_works(
    server: Server, site: Site, chromium: Chromium, tmp_path: Path
) -> None:
    tsc = find_program(
        (str(CHECKOUT / ".venv/node_modules/.bin/tsc"), "tsc"),
        "no tsc: npm install --prefix .venv typescript",
    )
    source = tmp_path / "example.ts"
    source.write_text(TYPESCRIPT.replace("HOST", server.url.replace("http", "ws")))
    options = ("--strict", "--target", "es2022", "--lib", "es2022,dom")
    subprocess.run([tsc, *options, "--outDir", tmp_path, source], check=True)
    script = tmp_path.joinpath("example.js").read_text()
    site.pages["/ts"] = ("text/html", f"<body><script>{script}</script>")
    anna, ben, chat = pair(server)
    tabs = []
    for user in (anna, ben):
        tab = chromium.page()
        tab.goto(f"{site.url}/ts")
        tab.evaluate("(token) => chat.connect(token)", server.token(user))
        expect(tab.get_by_text(re.compile(r"^pong 20\d\d-"))).to_be_visible()
        tabs.append(tab)
    annas, bens = tabs
    annas.evaluate("(id) => chat.sendTyping(id, true)", chat)
    expect(bens.get_by_text(f"{anna} types")).to_be_visible()
    message = server.post(chat, anna, "Привет!")
    expect(bens.get_by_text(f"{anna}: Привет!")).to_be_visible()
    read = f"{ben} read {message['id']} of {chat}"
    expect(annas.get_by_text(read)).to_be_visible()
    annas.evaluate("chat.disconnect()")
    expect(annas.get_by_text("closed")).to_be_visible()


def test_the_user_does_not_notice_the_end_of_a_token(
    server: Server, site: Site, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    # chatd's page: when the ticket of the socket ends (4401), it fetches a new one.
    page = chromium.page()
    relay = Relay.connected(page, server.link(anna), chat)
    relay.cut(4401)
    write(page, "Did anything happen?")
    expect(ticks(page)).to_have_text("Sent")
    expect(page.locator("#banner")).to_be_hidden()

    # A page of another site, whose tokens last a minute: each is renewed in time.
    page = chromium.page()
    embed(page, site, server)
    tokens = iter([server.token(ben, exp=int(time.time()) + 61), server.token(ben)])
    page.expose_function("newToken", lambda: next(tokens))
    relay = Relay(page)
    page.evaluate("chat.connect(() => newToken())")
    expect(page.locator("#types")).to_contain_text("token_expiring ack")
    assert len(relay.sockets) == 1
    ack = relay.received[-1]
    assert (ack["ref"], ack["expires_in"] > 3000) == ("auth", True)


def test_an_edit_and_a_deletion_reach_each_page(
    server: Server, site: Site, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    bens = sign_in(chromium.context(), server.link(ben), chat)
    page = chromium.page()
    embed(page, site, server)
    page.evaluate("(token) => chat.connect(token)", server.token(anna))
    first, second = (server.post(chat, anna, text) for text in ("One", "Two"))
    expect(bubbles(bens)).to_have_text(["One", "Two"])
    last = page.locator("#last")
    change = "([id, ifRev]) => chat.editMessage(id, 'New', { ifRev })"
    page.evaluate(change, [first["id"], first["id"]])
    expect(bubbles(bens)).to_have_text(["New", "Two"])
    expect(last).to_have_text("New")
    page.evaluate("(id) => chat.deleteMessage(id)", second["id"])
    expect(bubbles(bens)).to_have_text(["New", "Message deleted"])
    history = page.evaluate("(id) => chat.history(id)", chat)["messages"]
    assert [one["content"] for one in history] == ["New", ""]
    page.evaluate(change, [first["id"], first["id"]])  # the same again: an ack
    # An edit that follows an unanswered one would be based on its answer.
    sent = "received.filter(({ state }) => state === 'sent').length"
    until(lambda: bool(page.evaluate(sent) == 3))
    page.evaluate("(id) => chat.editMessage(id, 'Other', { ifRev: id })", first["id"])
    page.evaluate("(id) => chat.editMessage(id, 'Other')", second["id"])
    codes = "received.flatMap(({ type, code }) => (type === 'delivery' && code) || [])"
    until(lambda: bool(page.evaluate(codes) == ["changed", "deleted"]))


# --- edits, deletions and the rule of rev, against a scripted server ------------------


class Script:
    """Stands in for the server: the test answers the commands and the requests."""

    def __init__(self, page: Page, server: Server) -> None:
        self.page = page
        self.sockets: list[WebSocketRoute] = []
        self.commands: list[Frame] = []
        self.requests: list[tuple[str, str, Frame | None, str | None]] = []
        self.answers: dict[str, Any] = {}  # a part of "METHOD path" -> a body or a list
        self.held: dict[str, Route] = {}
        self.cursor = "e1.100"
        self.resume = "live"
        self.blocked = False
        page.route(re.compile("/api/"), self._answer)
        page.route_web_socket(re.compile("/ws/chat"), self._open)
        self.load(server)

    def load(self, server: Server) -> None:
        self.page.goto(server.url)
        self.page.evaluate(
            """async () => {
                const { ChatWebSocket } = await import("/web/chat-websocket.js");
                Object.assign(window, { chat: new ChatWebSocket(), got: [] });
                for (const type of ["state", "delivery", "chats", "new_message",
                  "message_edited", "message_deleted", "chat_renamed", "resync"])
                  chat.on(type, (event) => got.push({ type, ...event }));
            }"""
        )
        self.page.evaluate("(token) => chat.connect(token)", server.token(1))

    def reload(self, server: Server) -> None:
        """End the blocked page, so that only the next one reaches the server."""
        self.page.goto("about:blank")
        self.blocked = False
        self.load(server)

    def _answer(self, route: Route) -> None:
        request = route.request
        path = request.url.partition("/api/v1/")[2]
        name = f"{request.method} {path}"
        token = request.headers.get("authorization")
        self.requests.append((request.method, path, request.post_data_json, token))
        for part, answer in self.answers.items():
            if not name.startswith(part):
                continue
            if answer == "hold":
                self.held[name] = route
            elif isinstance(answer, int):
                route.fulfill(status=answer)
            elif isinstance(answer, tuple):
                route.fulfill(status=answer[0], json=answer[1])
            elif "error" in answer:
                route.fulfill(status=409, json=answer)
            else:
                route.fulfill(json=answer)
            return
        route.abort()

    def _open(self, socket: WebSocketRoute) -> None:
        if self.blocked:
            socket.close(code=1011)
            return
        self.sockets.append(socket)
        socket.on_message(lambda text: self.commands.append(json.loads(text)))
        self.tell(
            type="connected",
            user_id=1,
            cursor=self.cursor,
            resume=self.resume,
            chats={},
        )

    def tell(self, **frame: Any) -> None:
        self.sockets[-1].send(json.dumps(frame))

    def do(self, call: str) -> Any:
        return self.page.evaluate(f"chat.{call}")

    def wait_for(self, condition: str) -> None:
        def holds() -> bool:
            return bool(self.page.evaluate(condition))

        until(holds)

    def next_command(self) -> Frame:
        def arrived() -> bool:
            self.page.evaluate("0")  # lets Playwright call the routes
            return bool(self.commands)

        until(arrived)
        return self.commands.pop(0)

    def hold(self, part: str, call: str) -> None:
        """Hold the answer to the request of a method."""
        self.answers[part] = "hold"
        self.page.evaluate(
            f"void chat.{call}.then((answer) => (window.answer = answer))"
        )
        until(lambda: bool(self.page.evaluate("1") and self.held))

    def release(self, body: Any, status: int = 200) -> None:
        (name,) = self.held
        self.held.pop(name).fulfill(json=body, status=status)

    def restore(self) -> None:
        """Come back as a server does after a restore: in another epoch."""
        self.cursor, self.resume = "e2.50", "resync"
        self.sockets[-1].close(code=1012)
        self.wait_for("got.some(({ type }) => type === 'resync')")

    def deliveries(self) -> list[tuple[str, str, str | None]]:
        got = self.page.evaluate("got.filter(({ type }) => type === 'delivery')")
        return [(one["kind"], one["state"], one.get("code")) for one in got]


@pytest.fixture
def script(server: Server, chromium: Chromium) -> Script:
    script = Script(chromium.page(), server)
    script.wait_for("chat.state === 'connected'")
    return script


def old_and_new(number: int, rev: int, **state: Any) -> tuple[Frame, Frame]:
    """Return message `number` as it was sent, and as it is after a change."""
    at = "2030-01-01T00:00:00Z"
    old = {"id": number, "chat_id": 3, "sender_id": 2, "n": number, "created_at": at}
    return {**old, "content": "Old"}, {**old, "content": "New", "rev": rev, **state}


def test_an_edit_and_a_deletion_are_sent_one_after_the_other(script: Script) -> None:
    ref = script.do("editMessage(7, 'Hi \\ud800', { ifRev: 7 })")
    script.do("deleteMessage(8)")
    edit = {
        "type": "edit_message",
        "message_id": 7,
        "content": "Hi \ufffd",
        "if_rev": 7,
    }
    assert script.next_command() == {**edit, "ref": ref}
    assert script.commands == []  # the deletion waits for the answer
    script.tell(type="ack", ref=ref, message_id=7, chat_id=3, rev=101)
    deletion = script.next_command()
    assert deletion["type"] == "delete_message"
    assert deletion["message_id"] == 8
    script.tell(type="ack", ref=deletion["ref"], message_id=8, chat_id=3, rev=102)
    script.wait_for("chat.unsentChanges().length === 0")
    assert script.deliveries() == [
        ("edit", "sending", None),
        ("delete", "sending", None),
        ("edit", "sent", None),
        ("delete", "sent", None),
    ]


@pytest.mark.parametrize(
    "code", ["too_late", "deleted", "changed", "forbidden", "not_found", "unknown_type"]
)
def test_a_refused_change_is_reported_and_blocks_nothing(
    script: Script, code: str
) -> None:
    script.do("editMessage(7, 'New')")
    script.do("send(3, 'Hello')")
    ref = script.next_command()["ref"]
    script.tell(type="error", ref=ref, message_id=7, code=code, message="Why")
    assert script.next_command()["type"] == "send_message"
    assert script.deliveries()[-1] == ("edit", "failed", code)
    (failed,) = script.do("unsentChanges()")
    assert failed["reason"] == "Why"
    assert failed["message_id"] == 7
    script.page.evaluate("(ref) => chat.discard(ref)", ref)
    assert script.do("unsentChanges()") == []


def test_a_change_is_sent_again_until_it_is_acknowledged(script: Script) -> None:
    script.do("deleteMessage(7)")
    first = script.next_command()
    script.tell(type="error", ref=first["ref"], code="rate_limited", retry_after=0)
    assert script.next_command() == first
    script.sockets[-1].close(code=1012)
    assert script.next_command() == first


def test_a_message_that_was_stored_before_is_not_shown_as_it_was(
    script: Script,
) -> None:
    """After a lost ack it may have been edited or deleted since."""
    for duplicate, shown in ((False, "Hello"), (True, None)):
        script.do("send(3, 'Hello')")
        sent = script.next_command()
        names = {"ref": sent["ref"], "client_id": sent["client_id"]}
        ids = {"message_id": 9, "chat_id": 3, "n": 9}
        script.tell(type="ack", **names, **ids, duplicate=duplicate)
        script.wait_for("chat.unsent(3).length === 0")
        assert script.page.evaluate("got.at(-1).message?.content ?? null") == shown


def test_a_deletion_replaces_one_that_has_failed(script: Script) -> None:
    script.do("deleteMessage(7)")
    ref = script.next_command()["ref"]
    script.tell(type="error", ref=ref, code="too_late", message="Why")
    script.wait_for("chat.unsentChanges()[0].state === 'failed'")
    again = script.do("deleteMessage(7)")
    assert script.next_command()["ref"] == again
    (waiting,) = script.do("unsentChanges()")
    assert waiting["client_id"] == again


def test_changes_made_offline_wait_in_line_across_a_reload(
    script: Script, server: Server
) -> None:
    script.blocked = True
    script.sockets[-1].close(code=1012)
    for call in (
        "editMessage(7, 'One')",
        "send(3, 'Hello')",
        "editMessage(7, 'Two')",  # replaces One
        "editMessage(8, 'Three')",
        "deleteMessage(8)",  # drops Three
        "deleteMessage(8)",  # is there already
    ):
        script.do(call)
    items = script.page.evaluate("Object.values(localStorage).map(JSON.parse)")
    # A page of 1.0 in another tab would send what has a chat_id as a message.
    assert [one.get("chat_id") for one in items if "kind" in one] == [None, None]
    script.reload(server)
    script.wait_for("chat.state === 'connected'")
    hello = script.next_command()
    assert hello["content"] == "Hello"
    ids = {"message_id": 9, "chat_id": 3, "n": 9}
    script.tell(type="ack", ref=hello["ref"], client_id=hello["client_id"], **ids)
    edit = script.next_command()
    assert (edit["type"], edit["content"]) == ("edit_message", "Two")
    script.tell(type="ack", ref=edit["ref"], message_id=7, chat_id=3, rev=101)
    assert script.next_command()["type"] == "delete_message"


def test_an_edit_of_ones_own_unanswered_edit_is_not_refused_as_changed(
    script: Script,
) -> None:
    script.do("editMessage(7, 'One', { ifRev: 7 })")
    first = script.next_command()
    script.do("editMessage(7, 'Two', { ifRev: 7 })")  # the page knows no newer rev
    script.tell(type="ack", ref=first["ref"], message_id=7, chat_id=3, rev=101)
    second = script.next_command()
    assert (second["content"], second["if_rev"]) == ("Two", 101)


def test_without_a_socket_changes_go_over_http(
    server: Server, chromium: Chromium
) -> None:
    script = Script(chromium.page(clock=True), server)
    script.wait_for("chat.state === 'connected'")
    script.blocked = True
    script.sockets[-1].close(code=1012)
    poll = {"events": [], "cursor": "e1.100", "more": False, "resync": False}
    _, new = old_and_new(7, 101)
    script.answers = {
        "GET events": poll,
        "PATCH messages/7": {"message": new},
        "DELETE messages/7": 204,
        "PATCH messages/8": {"error": {"code": "deleted", "message": "Gone"}},
    }
    script.do("editMessage(7, 'New', { ifRev: 7 })")
    script.do("editMessage(8, 'New')")

    def settled() -> bool:
        script.page.clock.run_for(1_000)
        return ("edit", "failed", "deleted") in script.deliveries()

    until(settled)
    script.do("deleteMessage(7)")
    script.wait_for("chat.unsentChanges().length === 1")
    sent = [(method, path, body) for method, path, body, _ in script.requests]
    assert [one for one in sent if one[0] != "GET"] == [
        ("PATCH", "messages/7", {"content": "New", "if_rev": 7}),
        ("PATCH", "messages/8", {"content": "New"}),
        ("DELETE", "messages/7", None),
    ]
    edited = (
        "got.find(({ kind, state }) => kind === 'edit' && state === 'sent').message"
    )
    assert script.page.evaluate(edited) == new


def poll_only(server: Server, chromium: Chromium) -> Script:
    """Return a script whose client polls."""
    script = Script(chromium.page(clock=True), server)
    script.wait_for("chat.state === 'connected'")
    script.blocked = True
    poll = {"events": [], "cursor": "e1.100", "more": False, "resync": False}
    script.answers = {"GET events": poll}
    script.sockets[-1].close(code=1012)

    def polls() -> bool:
        script.page.clock.run_for(1_000)
        return bool(script.page.evaluate("chat.state === 'polling'"))

    until(polls)
    return script


def test_a_change_that_another_tab_has_dropped_stays_dropped(
    server: Server, chromium: Chromium
) -> None:
    script = poll_only(server, chromium)
    script.answers["PATCH messages/7"] = "hold"
    script.do("editMessage(7, 'New')")
    until(lambda: bool(script.page.evaluate("1") and script.held))
    other = script.page.context.new_page()
    other.goto(server.url)
    other.evaluate(
        """for (const key of Object.keys(localStorage)) {
            if (!key.startsWith("chatd.unsent.")) continue;
            localStorage.setItem(key, "discarded");
            localStorage.removeItem(key);
        }"""
    )
    script.wait_for("got.some(({ state }) => state === 'discarded')")
    script.release({"error": {"code": "deleted", "message": "Gone"}}, 409)
    script.do("send(3, 'Hello')")
    until(lambda: script.requests[-1][0] == "POST" or script.page.evaluate("0"))
    assert script.page.evaluate("Object.values(localStorage).join()").count("New") == 0
    edits = [state for kind, state, _ in script.deliveries() if kind == "edit"]
    assert edits == ["sending", "discarded"]


@pytest.mark.parametrize(
    ("status", "fails"),
    [
        (502, False),
        (503, False),
        (504, False),
        (500, False),
        (429, False),
        (408, False),
        (200, False),  # the sign-in page of a hotel
        (413, True),
        (405, True),
        (403, True),
    ],
)
def test_only_a_refusal_that_would_come_again_fails_a_message(
    server: Server, chromium: Chromium, status: int, fails: bool
) -> None:
    """A proxy answers, without chatd's JSON."""
    script = poll_only(server, chromium)
    script.answers["POST chats/3/messages"] = status
    script.answers["PATCH messages/7"] = status
    script.do("editMessage(7, 'New')")
    script.do("send(3, 'Hello')")
    until(lambda: script.requests[-1][0] != "GET" or script.page.evaluate("0"))
    if fails:
        script.wait_for("chat.unsent(3)[0].state === 'failed'")
        assert script.do("unsentChanges()")[0]["state"] == "failed"
        return
    _, new = old_and_new(7, 101)
    script.answers["PATCH messages/7"] = {"message": new}
    sent = {**old_and_new(9, 102)[0], "sender_id": 1}
    script.answers["POST chats/3/messages"] = {"message": sent}

    def stored() -> bool:
        script.page.clock.run_for(1_000)
        return script.deliveries()[-1] == ("message", "sent", None)

    until(stored)
    assert [state for _, state, _ in script.deliveries()] == ["sending"] * 2 + [
        "sent"
    ] * 2


LATE_ANSWERS = {
    "history": ("history(3)", "GET chats/3/messages", "messages"),
    "search": ("search({ q: 'new' })", "GET search", "messages"),
    "list": ("chats({ limit: 2 })", "GET chats?limit=2", "chats"),
    "request": (
        "request('GET', '/api/v1/chats/3/messages')",
        "GET chats/3",
        "messages",
    ),
}


@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize("kind", LATE_ANSWERS)
def test_an_answer_is_never_older_than_an_event(
    script: Script, kind: str, deleted: bool
) -> None:
    call, name, key = LATE_ANSWERS[kind]
    state: Frame = {"content": "", "deleted": True} if deleted else {}
    old, new = old_and_new(7, 101, **state)
    script.hold(name, call)
    event = "message_deleted" if deleted else "message_edited"
    script.tell(type=event, seq=101, chat_id=3, message=new)
    script.wait_for(f"got.some(({{ type }}) => type === '{event}')")
    chat = {"id": 3, "last_message": old}
    body = {"messages": [old], "chats": [chat], "more": False, "before": None}
    script.release({**body, "cursor": "e1.101"})
    script.wait_for("window.answer")
    (one,) = script.page.evaluate("answer")[key]
    assert (one["last_message"] if kind == "list" else one) == new


def test_an_event_is_never_older_than_an_answer(script: Script) -> None:
    _, first = old_and_new(7, 101)
    _, second = old_and_new(7, 105, content="Newer")
    script.answers = {"GET chats/3/messages": {"messages": [second], "more": False}}
    assert script.do("history(3, { around: 7 })")["messages"] == [second]
    script.tell(type="message_edited", seq=101, chat_id=3, message=first)
    script.tell(type="message_edited", seq=105, chat_id=3, message=second)
    script.wait_for("got.filter(({ type }) => type === 'message_edited').length === 2")
    told = script.page.evaluate("got.flatMap(({ message }) => message ?? [])")
    assert told == [second, second]


def test_a_new_epoch_forgets_each_rev(script: Script) -> None:
    old, new = old_and_new(7, 900)
    script.answers = {"GET chats/3/messages": {"messages": [new], "more": False}}
    assert script.do("history(3)")["messages"] == [new]
    script.answers = {"GET chats/3/messages": {"messages": [old], "more": False}}
    assert script.do("history(3)")["messages"] == [new]  # its event is still to come
    script.restore()
    assert script.do("history(3)")["messages"] == [old]


def test_a_mark_from_before_a_restore_holds_back_no_later_one(script: Script) -> None:
    script.do("markRead(3, 900)")
    ref = script.next_command()["ref"]
    script.tell(type="ack", ref=ref, chat_id=3, message_id=900, n=900)
    script.restore()
    script.do("markRead(3, 40)")  # the newest message there is now
    assert script.next_command()["message_id"] == 40


@pytest.mark.parametrize("reload", [False, True])
def test_a_change_from_before_a_restore_reaches_no_other_message(
    script: Script, server: Server, reload: bool
) -> None:
    script.blocked = True
    script.sockets[-1].close(code=1012)
    for call in ("deleteMessage(70)", "editMessage(71, 'New', { ifRev: 71 })"):
        script.do(call)  # in the other epoch, 70 and 71 may be other messages
    script.do("send(3, 'Hello')")
    script.cursor, script.resume = "e2.50", "resync"
    if reload:
        script.reload(server)
    script.blocked = False
    assert script.next_command()["content"] == "Hello"
    assert script.deliveries()[-2:] == [
        ("delete", "failed", "not_found"),
        ("edit", "failed", "not_found"),
    ]


def test_a_list_of_another_epoch_is_a_resync(script: Script) -> None:
    script.answers = {"GET chats?": {"chats": [], "cursor": "e2.50"}}
    script.do("fetchChats()")
    told = script.page.evaluate("got.map(({ type }) => type)")
    assert told[-2:] == ["resync", "chats"]


def test_an_answer_from_before_a_gap_is_not_older_than_what_was_loaded(
    script: Script,
) -> None:
    _, edited = old_and_new(7, 150)
    _, new = old_and_new(7, 5_900, content="Newer")
    script.hold("PATCH messages/7", "request('PATCH', '/api/v1/messages/7', {})")
    script.cursor, script.resume = "e1.6000", "resync"
    script.sockets[-1].close(code=1012)
    script.wait_for("got.some(({ type }) => type === 'resync')")
    script.answers["GET chats/3/messages"] = {"messages": [new], "more": False}
    assert script.do("history(3)")["messages"] == [new]
    script.release({"message": edited})
    script.wait_for("window.answer")
    assert script.page.evaluate("answer.message") == new


def test_a_listener_may_fetch_the_chats_again(script: Script) -> None:
    script.page.evaluate("void chat.on('chat_renamed', () => void chat.fetchChats())")
    script.hold("GET chats?", "fetchChats()")
    script.tell(type="chat_renamed", seq=101, chat_id=3, title="One", user_id=2)
    script.answers["GET chats?"] = {"chats": [], "cursor": "e1.101"}
    script.release({"chats": [], "cursor": "e1.100"})
    script.wait_for("got.filter(({ type }) => type === 'chats').length === 2")
    script.tell(type="chat_renamed", seq=102, chat_id=3, title="Two", user_id=2)
    script.wait_for("got.some(({ title }) => title === 'Two')")


def test_the_list_of_chats_comes_by_pages_and_misses_none(script: Script) -> None:
    def page(*ids: int, cursor: int, **more: Any) -> Frame:
        chats = [{"id": number, "last_message": None} for number in ids]
        return {"chats": chats, "cursor": f"e1.{cursor}", **more}

    first = "GET chats?limit=100"
    script.answers = {
        f"{first}&before=p2": page(1, cursor=120, more=False),
        f"{first}&before=p1": page(3, cursor=110, more=True, position="p2"),
        first: "hold",
    }
    script.page.evaluate("void chat.fetchChats()")
    until(lambda: bool(script.page.evaluate("1") and script.held))
    # Chat 2 is active meanwhile, and so it is on the first page when its own one comes.
    again = page(2, 4, cursor=130, more=True, position="p1")
    route = script.held.pop(first)
    script.answers[first] = again
    route.fulfill(json=page(4, cursor=100, more=True, position="p1"))
    script.wait_for("got.some(({ type }) => type === 'chats')")
    snapshot = script.page.evaluate("got.find(({ type }) => type === 'chats')")
    assert sorted(chat["id"] for chat in snapshot["chats"]) == [1, 2, 3, 4]
    assert snapshot["cursor"] == "e1.100"


def test_events_up_to_the_list_are_in_it_but_changes_are_told(script: Script) -> None:
    _, new = old_and_new(7, 102)
    listed = {"chats": [], "cursor": "e1.103"}
    script.answers = {"GET chats?limit=100": listed}
    script.do("fetchChats()")
    script.tell(type="chat_renamed", seq=101, chat_id=3, title="Old", user_id=2)
    script.tell(type="message_edited", seq=102, chat_id=3, message=new)
    script.tell(type="chat_renamed", seq=104, chat_id=3, title="New", user_id=2)
    script.wait_for("got.some(({ title }) => title === 'New')")
    told = script.page.evaluate("got.map(({ type, title }) => title ?? type)")
    assert told[-3:] == ["chats", "message_edited", "New"]


CALLS: dict[str, tuple[str, str, Frame | None]] = {
    "history(3, { before: 9, limit: 5 })": (
        "GET",
        "chats/3/messages?before=9&limit=5",
        None,
    ),
    "history(3, { after: 9 })": ("GET", "chats/3/messages?after=9", None),
    "search({ q: 'a b', chatId: 3, before: 9 })": (
        "GET",
        "search?q=a+b&chat_id=3&before=9",
        None,
    ),
    "search({ q: 'a', before: null })": ("GET", "search?q=a", None),
    "chat(3)": ("GET", "chats/3", None),
    "members(3, { ids: [5, 6] })": ("GET", "chats/3/members?ids=5%2C6", None),
    "members(3, { after: 5, limit: 9 })": (
        "GET",
        "chats/3/members?after=5&limit=9",
        None,
    ),
    "createChat({ memberIds: [5], direct: true })": (
        "POST",
        "chats",
        {"member_ids": [5], "direct": True},
    ),
    "createChat({ title: 'A', memberIds: [5], clientId: 'k' })": (
        "POST",
        "chats",
        {"title": "A", "member_ids": [5], "client_id": "k"},
    ),
    "renameChat(3, 'B')": ("PATCH", "chats/3", {"title": "B"}),
    "createInvite(3, { ttlSeconds: 60 })": (
        "POST",
        "chats/3/invites",
        {"ttl_seconds": 60},
    ),
    "createInvite(3)": ("POST", "chats/3/invites", {}),
    "revokeInvites(3)": ("DELETE", "chats/3/invites", None),
    "previewInvite('t')": ("POST", "join", {"token": "t"}),
    "joinAsNewUser('t', 'Zora')": ("POST", "join", {"token": "t", "name": "Zora"}),
    "join('t')": ("POST", "join", {"token": "t"}),
    "renameMe('Zora')": ("PATCH", "me", {"name": "Zora"}),
    "linkDevice()": ("POST", "me/link", None),
}


def test_each_method_sends_its_request(script: Script) -> None:
    script.answers = {method: {"chat": {}} for method in ("GET", "POST", "PATCH")}
    script.answers["DELETE"] = 204
    for call, request in CALLS.items():
        script.do(call)
        *sent, token = script.requests[-1]
        assert tuple(sent) == request
        signed_in = not call.startswith(("previewInvite", "joinAsNewUser"))
        assert (token is not None) == signed_in


def test_a_search_that_nobody_waits_for_can_be_ended(script: Script) -> None:
    end = "(part) => { window.end = new AbortController(); if (part) end.abort(); }"
    search = "search({ q: 'a' }, end.signal).catch(({ code }) => code)"
    script.page.evaluate(end, 0)
    script.hold("GET search", search)
    script.page.evaluate("end.abort()")
    script.wait_for("window.answer === 'unreachable'")
    asked = len(script.requests)
    script.page.evaluate(end, 1)
    assert script.do(search) == "unreachable"
    assert len(script.requests) == asked  # it did not begin


JOINS = ("join('t')", "request('POST', '/api/v1/join', { token: 't' })")


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("signed_in", [True, False])
def test_only_the_end_of_the_session_ends_it_and_no_invitation(
    script: Script, join: str, signed_in: bool
) -> None:
    refusal = {"error": {"code": "token_invalid", "message": "Not this one"}}
    script.answers = {"POST join": (401, refusal), "GET me": {"user_id": 1}}
    if not signed_in:
        script.answers["GET me"] = (401, refusal)
    error = script.do(f"{join}.catch(({{ status, code }}) => [status, code])")
    assert error == [401, "token_invalid"]
    assert script.do("state") == ("connected" if signed_in else "signed_out")


def test_the_refusal_of_an_old_token_does_not_end_a_new_session(
    script: Script, server: Server
) -> None:
    script.hold("GET me", "request('GET', '/api/v1/me')")
    new = server.token(1, jti="new")
    script.page.evaluate("(token) => chat.connect(token)", new)
    script.answers["GET me"] = {"user_id": 1}
    script.release({"error": {"code": "token_expired", "message": "Old"}}, 401)
    script.wait_for("window.answer")
    assert script.requests[-1][3] == f"Bearer {new}"
    script.wait_for("chat.state === 'connected'")


# --- against the server -------------------------------------------------------------


IMPORT = """async (token) => {
    const { ChatWebSocket } = await import("/web/chat-websocket.js");
    window.chat = new ChatWebSocket({ bearer: token, storage: null });
    window.got = [];
    for (const type of ["chat_renamed", "chat_added"])
      chat.on(type, (event) => got.push(event));
    await chat.fetchChats();
    chat.connect();
}"""


def test_each_method_works_against_the_server(
    make_server: Callable[..., Server], chromium: Chromium
) -> None:
    server = make_server("--invites", "on")
    anna, ben, chat = pair(server, title="Bike")
    texts = ("One", "Two fish", "Three", "Four fish")
    ids = [server.post(chat, ben, text)["id"] for text in texts]
    page = chromium.page()
    page.goto(server.url)
    page.evaluate(IMPORT, server.token(anna))

    def do(call: str) -> Any:
        return page.evaluate(f"chat.{call}")

    def contents(call: str) -> list[str]:
        return [message["content"] for message in do(call)["messages"]]

    assert contents(f"history({chat}, {{ limit: 2 }})") == ["Three", "Four fish"]
    assert contents(f"history({chat}, {{ before: {ids[1]} }})") == ["One"]
    assert contents(f"history({chat}, {{ after: {ids[2]} }})") == ["Four fish"]
    around = do(f"history({chat}, {{ around: {ids[1]}, limit: 2 }})")
    assert ids[1] in [message["id"] for message in around["messages"]]
    assert around["more_after"]

    def search(query: str, before: int | None = None) -> list[str]:
        """Search to the beginning: a busy machine may need more than one request."""
        found: list[str] = []
        while True:
            page = do(f"search({{ {query}, before: {json.dumps(before)} }})")
            found += [message["content"] for message in page["messages"]]
            if (before := page["before"]) is None:
                return found

    assert search("q: 'FISH'") == ["Four fish", "Two fish"]
    assert search(f"q: 'fish', chatId: {chat}", ids[3]) == ["Two fish"]
    (member,) = do(f"members({chat}, {{ ids: [{ben}] }})")["members"]
    assert (member["user_id"], member["name"]) == (ben, "Ben")
    assert len(do(f"members({chat}, {{ limit: 1 }})")["members"]) == 1
    do(f"renameChat({chat}, 'Car')")
    until(lambda: page.evaluate("got.some(({ title }) => title === 'Car')"))
    assert do(f"chat({chat})")["title"] == "Car"
    direct = f"createChat({{ memberIds: [{ben}], direct: true }})"
    assert do(direct)["id"] == do(direct)["id"]
    keyed = f"createChat({{ title: 'A', memberIds: [{ben}], clientId: 'k' }})"
    assert do(keyed)["id"] == do(keyed)["id"]
    first = do("chats({ limit: 1 })")
    position = json.dumps(first.get("position", first["chats"][-1].get("position")))
    second = do(f"chats({{ limit: 1, before: {position} }})")
    assert first["more"]
    assert first["chats"][0]["id"] != second["chats"][0]["id"]
    assert len(do("fetchChats()")["chats"]) == 3
    invite = do(f"createInvite({chat})")["token"]
    assert do(f"previewInvite('{invite}')") == {"title": "Car", "member_count": 2}
    joined = do(f"joinAsNewUser('{invite}', 'Zora')")
    assert joined["chat_id"] == chat
    assert do(f"join('{invite}')")["chat_id"] == chat  # Anna is there already
    do(f"revokeInvites({chat})")
    code = f"join('{invite}').catch(({{ code }}) => code)"
    assert do(code) == "token_invalid"
    assert do("state") == "connected"
    status = f"chat.previewInvite('{invite}').catch(({{ status }}) => status)"
    assert page.evaluate(status) == 401
    do("renameMe('Anna B.')")
    assert do("request('GET', '/api/v1/me')")["name"] == "Anna B."
    do("disconnect()")
    page.evaluate(IMPORT, joined["token"])  # a session token
    assert do("linkDevice()")["expires_in"] == 600
