"""In Firefox one writes, reads, edits, deletes, searches, and outlives the server.

A Firefox without a window is driven over WebDriver BiDi, its own protocol on a
WebSocket (https://w3c.github.io/webdriver-bidi). Keys and clicks are those of a user.
The second Firefox forbids cookies, and with them all storage. An error on the page
makes the claim false, unless a cut network is the reason.

    apt-get install firefox-esr     # or FIREFOX=/path/to/it
    SHOTS=folder .venv/bin/python torture/run.py --only firefox     # keeps screenshots
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio
from harness import Chatd, Figures, http, make_chat, run_trio, text
from trio_websocket import ConnectionClosed, WebSocketConnection, open_websocket_url

WAIT_SECONDS = 30
ENTER, SHIFT = "\ue007", "\ue008"
CONTROL, ARROW_UP = "\ue009", "\ue013"
ANNA, BEN = 1, 2
NETWORK = re.compile(r"can.t establish a connection|connection .*was interrupted|CORS")
# A fresh profile that asks nothing, and fetches nothing from elsewhere.
PREFERENCES = {
    "app.normandy.enabled": False,
    "browser.aboutwelcome.enabled": False,
    "browser.safebrowsing.update.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.page": 0,
    "datareporting.policy.dataSubmissionEnabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "toolkit.telemetry.enabled": False,
}
COOKIES_BLOCKED = {"network.cookie.cookieBehavior": 2}


class SamePort(Chatd):
    """A chatd that has the same port when it starts again, as a page expects it."""

    def arguments(self) -> list[str]:
        return ["serve", f"--listen=127.0.0.1:{self.port}", f"--db={self.db}"]

    def link(self, user_id: int, name: str) -> str:
        token = self.token(user_id, use="signin", name=name)
        return f"http://127.0.0.1:{self.port}/#token={token}"

    async def texts(self, chat_id: int) -> list[str]:
        """The texts of the stored messages, oldest first."""
        path = f"/api/v1/chats/{chat_id}/messages?limit=100"
        reply = await http(self, "GET", path, self.token(ANNA))
        return [message["content"] for message in reply.json["messages"]]


class Firefox:
    """A running Firefox and the connection to it. Answers come in any order."""

    def __init__(self, connection: WebSocketConnection) -> None:
        self.connection = connection
        self.answers: dict[int, trio.MemorySendChannel[dict[str, Any]]] = {}
        self.errors: list[str] = []
        self.count = 0

    async def read(self) -> None:
        """Hand out the answers, and note the errors of all pages, until the end."""
        while True:
            try:
                frame = json.loads(await self.connection.get_message())
            except ConnectionClosed:
                return
            if frame.get("method") == "log.entryAdded":
                entry = frame["params"]
                if entry["level"] == "error" and not NETWORK.search(entry["text"]):
                    self.errors.append(entry["text"])
            elif frame.get("id") in self.answers:
                self.answers.pop(frame["id"]).send_nowait(frame)

    async def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command, and wait for its result."""
        self.count += 1
        send, receive = trio.open_memory_channel[dict[str, Any]](1)
        self.answers[self.count] = send
        frame = {"id": self.count, "method": method, "params": params}
        await self.connection.send_message(json.dumps(frame))
        with trio.fail_after(WAIT_SECONDS):
            answer = await receive.receive()
        assert answer["type"] == "success", f"{method}: {answer.get('message')}"
        return dict(answer["result"])

    async def tab(self, url: str = "about:blank") -> Tab:
        """Open a tab in a container of its own, which shares no storage."""
        container = await self.command("browser.createUserContext")
        created = await self.command(
            "browsingContext.create", type="tab", userContext=container["userContext"]
        )
        tab = Tab(self, created["context"])
        await tab.open(url)
        return tab


class Tab:
    """A tab, and what a user does in it."""

    def __init__(self, firefox: Firefox, context: str) -> None:
        self.firefox = firefox
        self.context = context

    async def command(self, method: str, **params: Any) -> dict[str, Any]:
        return await self.firefox.command(method, context=self.context, **params)

    async def open(self, url: str) -> None:
        await self.command("browsingContext.navigate", url=url, wait="complete")

    async def reload(self) -> None:
        await self.command("browsingContext.reload", wait="complete")

    async def run(self, expression: str) -> Any:
        """Evaluate an expression. Its value must be JSON."""
        answer = await self.firefox.command(
            "script.evaluate",
            expression=f"JSON.stringify({expression})",
            target={"context": self.context},
            awaitPromise=True,
        )
        assert answer["type"] == "success", answer
        return json.loads(answer["result"].get("value", "null"))

    async def until(self, expression: str) -> None:
        """Wait until the expression is true."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not await self.run(f"Boolean({expression})"):
            body = "document.body.innerText"
            assert time.monotonic() < deadline, f"{expression}: {await self.run(body)}"
            await trio.sleep(0.05)

    async def shows(self, words: str) -> None:
        await self.until(f"document.body.innerText.includes({json.dumps(words)})")

    async def texts(self, *expected: str) -> None:
        """Wait until the open chat shows exactly these messages."""
        shown = "[...document.querySelectorAll('#messages .content')]"
        given = json.dumps(expected, ensure_ascii=False)
        await self.until(
            f"JSON.stringify({shown}.map((node) => node.innerText)) === "
            f"JSON.stringify({given})"
        )

    async def keys(self, *keys: str) -> None:
        """Press keys one after the other. A key after SHIFT or CONTROL is with it."""
        actions = []
        for key in keys:
            held = [key[0]] if key[0] in (SHIFT, CONTROL) else []
            for sign in key[len(held) :]:
                down = [{"type": "keyDown", "value": value} for value in (*held, sign)]
                up = [{"type": "keyUp", "value": value} for value in (sign, *held)]
                actions += [*down, *up]
        source = {"type": "key", "id": "keyboard", "actions": actions}
        await self.command("input.performActions", actions=[source])

    async def click(self, selector: str) -> None:
        """Click on the middle of an element."""
        await self.until(f"document.querySelector({json.dumps(selector)})")
        found = await self.command(
            "browsingContext.locateNodes",
            locator={"type": "css", "value": selector},
            maxNodeCount=1,
        )
        node = {
            "type": "element",
            "element": {"sharedId": found["nodes"][0]["sharedId"]},
        }
        actions = [
            {"type": "pointerMove", "x": 0, "y": 0, "origin": node},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerUp", "button": 0},
        ]
        source = {"type": "pointer", "id": "mouse", "actions": actions}
        await self.command("input.performActions", actions=[source])

    async def front(self) -> None:
        """Come to the front, as a tab that the user clicks on."""
        await self.command("browsingContext.activate")

    async def enter_chat(self, chat_id: int) -> None:
        """Open a chat, if it has not opened by itself, and begin to write."""
        await self.until(f"document.querySelector('[href=\"#chat/{chat_id}\"]')")
        await self.run(f"location.hash = '#chat/{chat_id}'")
        await self.until("document.querySelector('#composer').offsetHeight")
        await self.click("#composer-text")

    async def connected(self) -> None:
        await self.until(
            "document.querySelector('#connection').dataset.state === 'connected'"
        )

    async def shot(self, name: str, width: int, height: int) -> None:
        """Keep a screenshot of this size, if SHOTS is set."""
        if not (folder := os.environ.get("SHOTS")):
            return
        size = {"width": width, "height": height}
        await self.command("browsingContext.setViewport", viewport=size)
        await trio.sleep(0.3)
        picture = await self.command("browsingContext.captureScreenshot")
        file = Path(folder) / f"firefox-{name}-{width}.png"
        file.write_bytes(base64.b64decode(picture["data"]))


def find_firefox() -> str:
    """Find a Firefox. Raises AssertionError without one: this proof is not skipped."""
    for name in (os.environ.get("FIREFOX"), "firefox-esr", "firefox"):
        if path := shutil.which(name or ""):
            return path
    raise AssertionError("no Firefox: apt-get install firefox-esr, or set FIREFOX=path")


@contextlib.asynccontextmanager
async def running_firefox(preferences: dict[str, Any]) -> AsyncIterator[Firefox]:
    """Start a Firefox with a fresh profile; end it and remove the profile."""
    program, profile = find_firefox(), Path(tempfile.mkdtemp(prefix="firefox-"))
    lines = [
        f"user_pref({json.dumps(name)}, {json.dumps(value)});\n"
        for name, value in (PREFERENCES | preferences).items()
    ]
    (profile / "user.js").write_text("".join(lines))
    command = [program, "--headless", "--no-remote", "--profile", str(profile)]
    process = await trio.lowlevel.open_process(
        [*command, "--remote-debugging-port", "0", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"HOME": str(profile)},
    )
    try:
        async with trio.open_nursery() as nursery:
            address = await nursery.start(follow_output, process)
            async with open_websocket_url(
                f"{address}/session", max_message_size=2**26
            ) as connection:
                firefox = Firefox(connection)
                nursery.start_soon(firefox.read)
                await firefox.command("session.new", capabilities={})
                await firefox.command("session.subscribe", events=["log.entryAdded"])
                yield firefox
                nursery.cancel_scope.cancel()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        shutil.rmtree(profile, ignore_errors=True)


async def follow_output(  # noqa: ASYNC114 (only ever given to nursery.start)
    process: trio.Process, task_status: trio.TaskStatus[str]
) -> None:
    """Report the address of the protocol, and read on so that the pipe never fills."""
    assert process.stderr is not None
    output, known = b"", False
    with trio.move_on_after(WAIT_SECONDS) as limit:
        async for data in process.stderr:
            output = (output + data)[-10_000:]
            found = re.search(rb"BiDi listening on (ws://\S+)\s", output)
            if found and not known:
                known, limit.deadline = True, float("inf")
                task_status.started(found[1].decode())
    assert known, f"Firefox has not started: {output.decode(errors='replace')}"


async def write(tab: Tab, words: str) -> None:
    await tab.keys(words, ENTER)


async def talk(chatd: SamePort, firefox: Firefox, chat_id: int) -> list[str]:
    """Two users write and read. Return what they wrote."""
    anna = await firefox.tab(chatd.link(ANNA, "Anna"))
    ben = await firefox.tab(chatd.link(BEN, "Ben"))
    hello, answer, offline, later, last = (text(f"number {i}") for i in range(5))
    await anna.front()
    await anna.connected()
    await anna.enter_chat(chat_id)
    await write(anna, hello)
    await anna.texts(hello)
    await ben.front()
    await ben.enter_chat(chat_id)
    await ben.texts(hello)
    await write(ben, answer)
    # Anna's tab is behind Ben's, so she has not read the answer yet.
    await anna.until("document.title.startsWith('(1) ')")
    await anna.front()
    await anna.until("!document.title.startsWith('(')")
    await anna.until("document.querySelector('.stamp[title=Read]')")

    # Five lines keep the end in view, and stay a draft across a reload.
    for line in "12345":
        await anna.keys(line, SHIFT + ENTER)
    assert await anna.run(
        "scroller.scrollHeight - scroller.scrollTop"
    ) == await anna.run("scroller.clientHeight")
    await anna.reload()
    await anna.until(
        "document.querySelector('#composer-text').value.startsWith('1\\n2')"
    )
    await anna.texts(hello, answer)
    await anna.run("document.querySelector('#composer-text').select() ?? null")

    # The server goes away, and comes back.
    await anna.connected()
    chatd.kill()
    await anna.click("#composer-text")
    await anna.run("document.querySelector('#composer-text').select() ?? null")
    await write(anna, offline)
    await anna.shows("No connection.")
    await anna.until("document.querySelector('.row-last.is-sending')")
    await anna.shot("offline", 1280, 720)
    await anna.shot("offline", 390, 844)
    await anna.shot("offline", 1280, 720)
    await chatd.start_in_thread()
    await anna.click("#banner-retry")
    await anna.until("!document.querySelector('.row-last.is-sending')")
    await anna.connected()
    await anna.click("#composer-text")
    await write(anna, later)
    texts = [hello, answer, offline, later]
    await anna.texts(*texts)
    await ben.front()
    await ben.texts(*texts)
    await write(ben, last)
    await anna.front()
    await anna.texts(*texts, last)

    # She changes her last message, deletes the one before, and finds the first.
    await anna.click("#composer-text")
    await anna.keys(ARROW_UP, "!", ENTER)
    await anna.until("document.querySelector('.own time[title]').offsetHeight")
    texts[3] += "!"
    await anna.texts(*texts, last)
    await anna.click(f"[data-n='{texts.index(offline) + 1}'] .more")
    await anna.keys(ARROW_UP, ENTER)  # the last item of the menu
    await anna.shows("Undo")
    texts[2] = "Message deleted"
    await anna.texts(*texts, last)
    await ben.front()
    await ben.texts(*texts, last)
    texts[2] = ""
    await anna.front()
    await anna.keys(CONTROL + "k", hello)
    await anna.shows("Messages found: 1.")
    await anna.keys(ENTER)
    await anna.until("location.hash.split('/').length === 3")
    await anna.until("document.activeElement.matches('.message')")
    await anna.shot("chat", 1280, 720)
    await anna.shot("chat", 390, 844)
    return [*texts, last]


async def talk_without_cookies(
    chatd: SamePort, firefox: Firefox, chat_id: int
) -> list[str]:
    """One user writes and reads in a browser that stores nothing."""
    anna = await firefox.tab(chatd.link(ANNA, "Anna"))
    await anna.connected()
    blocked = "(() => { try { return !localStorage } catch { return true } })()"
    assert await anna.run(blocked), "cookies are not blocked"
    await anna.shows("a reload will sign you out")
    await anna.enter_chat(chat_id)
    words = text("without cookies")
    await write(anna, words)
    await anna.until(
        f"[...document.querySelectorAll('.own .content')].at(-1).innerText === "
        f"{json.dumps(words)}"
    )
    await anna.until("document.querySelectorAll('.own .stamp[title]').length > 0")
    await anna.click("#me")
    await anna.click("#sign-out")
    await anna.shows("You are signed out.")
    await anna.reload()
    await anna.shows("Sign in to chatd")
    return [words]


async def act(chatd: SamePort) -> dict[str, float | str]:
    """Drive both browsers; compare what was written with what is stored."""
    chat_id = await make_chat(chatd, (ANNA, BEN), "Bicycle")
    async with running_firefox({}) as firefox:
        written = await talk(chatd, firefox, chat_id)
        version = await firefox.command("session.status")
        errors = firefox.errors
    async with running_firefox(COOKIES_BLOCKED) as firefox:
        written += await talk_without_cookies(chatd, firefox, chat_id)
        errors += firefox.errors
    assert errors == [], f"errors on the page: {errors}"
    stored = await chatd.texts(chat_id)
    assert stored == written, f"stored: {stored}, written: {written}"
    return {"messages": len(written), "status": str(version.get("message", ""))}


def prove(full: bool) -> Figures:
    """Talk in Firefox, with cookies and without."""
    version = subprocess.run(
        [find_firefox(), "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    with SamePort() as chatd:
        numbers = run_trio(act, chatd, seconds=300)
    return Figures(
        "in Firefox, too, one signs in, writes, reads, edits, deletes, searches, loses "
        "the server and comes back; also with cookies blocked",
        f"{version}: {numbers['messages']} messages, each stored once and in order; no "
        "error on the page",
        numbers | {"version": version},
    )
