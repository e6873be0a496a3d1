"""A message's text as nodes, its readers, and the lines about the people of a chat."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import pytest

from tests.browser import (
    FIXTURES,
    Chromium,
    Page,
    Relay,
    Server,
    bubbles,
    expect,
    expect_state,
    open_chat,
    pair,
    screenshot,
    sign_in,
    ticks,
    unread,
    until,
    write,
)

pytestmark = pytest.mark.browser
site, server, make_server, browser, chromium, example_chats = FIXTURES

# What a text becomes: name(content) is an element, and hidden signs are left out.
DESCRIBE = """
const describe = (node) => [...node.childNodes].map((one) =>
    one.nodeType === Node.TEXT_NODE ? one.data
    : one.className === "sign" ? "" : `${one.localName}(${describe(one)})`).join("");
"""

TEXTS = {
    "A plain text\n  with an indent\n\n": "A plain text\n  with an indent\n\n",
    # Code in a line.
    "Call `f(x)` or ``g``, not ```h``` .": "Call code(f(x)) or code(g), not code(h) .",
    "`a``b` ``a`b`` `` ` a ``": "`a``b` ``a`b`` `` ` a ``",
    "`a` `b": "code(a) `b",
    "it`s over\ntwo` lines": "it`s over\ntwo` lines",
    "`<b>` `&amp;` `> a`": "code(<b>) code(&amp;) code(> a)",
    "`https://example.com` https://example.com/a`b`": (
        "code(https://example.com) a(https://example.com/a)code(b)"),
    # Code between fences.
    "```\ncode\n```": "pre(code(code\n))",
    "```c++ \n  if (x) {\n\n\ty();\n  }\n```\t\nafter": (
        "pre(code(  if (x) {\n\n\ty();\n  }\n))after"),
    "before\n\n```\n`a` https://example.com\n> b\n```": (
        "before\n\npre(code(`a` https://example.com\n> b\n))"),
    "```\n```\n```\n\n```": "pre(code())pre(code(\n))",
    "```\na\n```\n```\nb\n```": "pre(code(a\n))pre(code(b\n))",
    "```\r\na\r\n```\r\nb": "pre(code(a\r\n))b",
    "```\nno end": "```\nno end",
    "```two words\na\n```": "```two words\na\n```",
    "a ```\nb\n```": "a ```\nb\n```",
    "```\na\n ```\n```b": "```\na\n ```\n```b",
    "```a\n```b\n> q": "```a\n```b\nblockquote(q)",
    # Quotes.
    "> a\n> `b` www.example.com\nc": (
        "blockquote(a\ncode(b) a(www.example.com)\n)c"),
    "a\n> b": "a\nblockquote(b)",
    "> a\n\n> b\n> \n> c": "blockquote(a\n)\nblockquote(b\n\nc)",
    "> > a\n> ```\n> b\n> ```": "blockquote(> a\n```\nb\n```)",
    "> a\n```\nb\n```\n> c": "blockquote(a\n)pre(code(b\n))blockquote(c)",
    ">a\n > b\n>\na > b -> c": ">a\n > b\n>\na > b -> c",
    # Everything else is plain.
    "**a** _b_ ~~c~~ # d\n* e\n1. f\n---\n| g | h |": (
        "**a** _b_ ~~c~~ # d\n* e\n1. f\n---\n| g | h |"),
    "<script>alert(1)</script><img src=x onerror=alert(1)>&lt;": (
        "<script>alert(1)</script><img src=x onerror=alert(1)>&lt;"),
    "```\n<img src=x onerror=alert(1)>\n```\n> <b>x": (
        "pre(code(<img src=x onerror=alert(1)>\n))blockquote(<b>x)"),
}  # fmt: skip

LARGE = [
    "😀", "😀👍", "😀 🎉\n❤️ ", "👨‍👩‍👧‍👦👍🏽👩🏿‍🚒", "🇩🇪🇫🇷", "🏴󠁧󠁢󠁷󠁬󠁳󠁿", "1️⃣#️⃣", "🏳️‍🌈",
]  # fmt: skip
NOT_LARGE = ["😀😀😀😀", "1", "123", "#", "*", "a😀", "😀.", "©", "`😀`", "> 😀", " "]

# (text, query): the text with its marks.
MARKED = {
    ("Ask Zoltán about it", "zoltan"): "Ask mark(Zoltán) about it",
    ("Ask Zoltan about it", "  ZOLTÁN it "): "Ask mark(Zoltan) about mark(it)",
    ("motorbikes, bikes", "bike"): "motormark(bike)s, mark(bike)s",
    ("Die Straße", "strasse"): "Die mark(Straße)",
    ("Die Straße", "S"): "Die mark(S)tramark(ß)e",
    ("ılık İLİK", "ilik"): "mark(ılık) mark(İLİK)",
    ("Σίσυφος", "σισυφοσ"): "mark(Σίσυφος)",
    ("مَرْحَبًا بك", "مرحبا"): "mark(مَرْحَبًا) بك",
    ("か が か\u3099 ｶﾞ", "か"): "mark(か) が か\u3099 ｶﾞ",
    ("か が か\u3099", "が"): "か mark(が) mark(か\u3099)",
    ("ＡＢＣ ﬁne", "abc f"): "mark(ＡＢＣ) mark(ﬁ)ne",
    (unicodedata.normalize("NFD", "한국어"), "국"): unicodedata.normalize(
        "NFD", "한mark(국)어"),
    ("100% of c++ [a-z]", "% c++ [a-z]"): "100mark(%) of mark(c++) mark([a-z])",
    ("one\ntwo `three`", "two"): "one\nmark(two) `three`",
    ("👍🏽 👍", "👍"): "mark(👍🏽) mark(👍)",
    ("<b>x</b>", "<b>"): "mark(<b>)x</b>",
    ("nothing of it", "else"): "nothing of it",
    ("a" * 100 + "needle" + "b" * 400, "NEEDLE"): (
        "…" + "a" * 30 + "mark(needle)" + "b" * 164),
}  # fmt: skip

# Repeated to 2 MB: each is made for a search that would go back.
HOSTILE = [
    "`", "`a", "`a`", "``a`", "`\n", ">", "> ", "> a\n", "```\n", "```a\n", "```\r",
    "```\na\n```\n", "a ", "😀", "https://a)", "https://a!", "_https://a__b ", "a@",
    "www.", "あ@", "https://a" + "!" * 5_000 + "x", "> `a`\n", "\u0301",
]  # fmt: skip


def group(server: Server, *names: str) -> tuple[int, ...]:
    """Make users of these names, and a chat of all of them: its id comes last."""
    members = [server.add_user(name) for name in names]
    return *members, server.create_chat(*members, title="Bicycle")


def test_a_text_becomes_nodes_that_have_all_of_it(
    server: Server, chromium: Chromium
) -> None:
    page = chromium.page()
    page.goto(server.url)
    made = page.evaluate(
        f"""async ([texts, queries, emoji]) => {{
            {DESCRIBE}
            const {{ contentNode, markedNode }} = await import("/web/text.js");
            return [
                texts.map((text) => {{
                    const node = contentNode(text);
                    return [describe(node), node.textContent];
                }}),
                queries.map(([text, query]) => describe(markedNode(text, query))),
                emoji.map((text) => contentNode(text).classList.contains("emoji")),
            ];
        }}""",
        [list(TEXTS), list(MARKED), LARGE + NOT_LARGE],
    )
    nodes, marked, emoji = made
    assert [text for _, text in nodes] == list(TEXTS)
    assert dict(zip(TEXTS, [node for node, _ in nodes], strict=True)) == TEXTS
    assert dict(zip(MARKED, marked, strict=True)) == MARKED
    assert [
        text for text, large in zip(LARGE + NOT_LARGE, emoji, strict=True) if large
    ] == LARGE


def test_a_hostile_text_costs_no_time_and_few_elements(
    server: Server, chromium: Chromium
) -> None:
    page = chromium.page()
    page.goto(server.url)
    # If the work grew with the square of the text, this would take hours.
    made = page.evaluate(
        """async (parts) => {
            const { contentNode, markedNode } = await import("/web/text.js");
            return parts.map((part) => {
                const text = part.repeat(2_000_000 / part.length) + "x";
                const node = contentNode(text);
                const found = markedNode(text.slice(0, 50_000), "a ` x");
                const count = (node) => node.querySelectorAll("*").length;
                return [node.textContent === text, count(node), count(found)];
            });
        }""",
        HOSTILE,
    )
    for part, (whole, elements, marks) in zip(HOSTILE, made, strict=True):
        assert whole, part[:20]
        assert elements <= 1_500, part[:20]
        assert marks <= 200, part[:20]


def copied(page: Page) -> Any:
    """Copy the selection with the keyboard: what is on the clipboard then, by type."""
    page.keyboard.press("Control+c")
    return page.evaluate(
        """async () => {
            const found = {};
            for (const item of await navigator.clipboard.read())
                for (const type of item.types)
                    found[type] = await (await item.getType(type)).text();
            return found;
        }"""
    )


def select(page: Page, first: int, last: int) -> None:
    page.evaluate(
        """([first, last]) => {
            const all = document.querySelectorAll("#messages .content");
            getSelection().setBaseAndExtent(
                all[first], 0, all[last], all[last].childNodes.length);
        }""",
        [first, last],
    )


RICH = [
    "Try `chatd serve --demo`, or see www.example.com:",
    "```python\nfor part in parts:\n    print(part)\n\n" + "#" * 400 + "\n```\nThen?",
    "> What is <b>this</b>?\n> Who wrote `it`?\n\nI did.",
    "🎉👍🏽",
    "```\n" + "\n".join(f"line {i}" for i in range(60)) + "\n```",
]


def test_rich_text_is_shown_in_its_bubble_and_copied_as_it_was_written(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    context = chromium.context(reduced_motion="reduce")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = sign_in(context, server.link(anna), chat)
    for text in RICH:
        server.post(chat, ben, text)
        server.post(chat, anna, text)
    expect(bubbles(page)).to_have_count(2 * len(RICH))
    for i, text in enumerate(RICH):
        select(page, 2 * i, 2 * i)
        assert copied(page) == {"text/plain": text}
    select(page, 0, 5)
    both = copied(page)
    assert list(both) == ["text/plain"]
    for text in (RICH[0], "    print(part)\n\n#", "I did.", "> Who wrote `it`?"):
        assert both["text/plain"].count(text) == 2
    for sign in page.locator(".sign").all():
        size = sign.bounding_box()
        assert size is None or size["width"] * size["height"] == 0
    # Long lines of code are scrolled inside the bubble, with the keyboard too.
    code = page.locator("pre code").first
    assert code.evaluate("(node) => node.scrollWidth > node.clientWidth")
    assert code.evaluate("(node) => node.scrollHeight === node.clientHeight")
    code.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('pre code').scrollLeft > 0")
    # More than 40 lines are folded.
    fold = page.locator(".fold:visible")
    expect(fold).to_have_count(2)
    fold.first.click()
    expect(fold.first).to_have_attribute("aria-expanded", "true")
    for width, height in ((1280, 800), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        page.locator("[data-n='5']").evaluate("(row) => row.scrollIntoView()")
        assert page.evaluate(
            "() => document.documentElement.scrollWidth <= innerWidth &&"
            "[...document.querySelectorAll('.bubble')].every("
            "  (node) => node.scrollWidth <= node.clientWidth)"
        )
        screenshot(page, f"text-{width}")


def test_the_tick_of_a_message_shows_who_has_read_it(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, _, chat = group(server, "Anna", "Ben", "Cora")
    direct = server.create_chat(anna, ben)
    page = sign_in(chromium.context(), server.link(anna), chat)
    write(page, "Who comes?")
    bens = sign_in(chromium.context(), server.link(ben), chat)
    write(bens, "I do.")
    expect(ticks(page)).to_have_text(["Read by 1 of 2"])
    page.locator(".own .stamp").click()
    readers = page.get_by_role("dialog", name="Who has read it")
    expect(readers.get_by_role("listitem")).to_contain_text(["Ben", "Cora"])
    expect(readers.locator(".quiet")).to_have_text(["Read", "Not yet"])
    screenshot(page, "readers")
    readers.get_by_role("button", name="Close").click()
    expect(readers).to_be_hidden()
    page.locator(".message:not(.own) .stamp").click()  # another's message
    expect(readers).to_be_hidden()
    # The page does not know the members of a large chat.
    page.route(
        re.compile(r"/api/v1/chats($|\?)"),
        lambda route: route.fulfill(json=large(route.fetch())),
    )
    page.reload()
    expect(ticks(page)).to_have_text(["Sent"])
    page.locator(".own .stamp").click()
    open_chat(page, direct)
    expect(readers).to_be_hidden()


def large(response: Any) -> Any:
    """Make the chats of a list as the server shows those of many members."""
    answer = response.json()
    for chat in answer["chats"]:
        chat.update(members=[], member_count=60)
    return answer


def lines(page: Page) -> list[str]:
    """The rows of the open chat: a message's text, or the text of another row."""
    return [
        text
        for text in page.evaluate(
            """() => [...document.querySelectorAll("#messages > :not(.day)")].map(
                (row) => (row.querySelector(".content") ?? row).textContent)"""
        )
        if text
    ]


def test_who_joins_leaves_and_renames_is_said_where_it_happened(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = group(server, "Anna", "Ben")
    cora = server.add_user("Cora")
    page = chromium.page()
    relay = Relay.connected(page, server.link(anna), chat)
    url = f"/api/v1/chats/{chat}"
    server.request("POST", f"{url}/members", {"user_id": cora})
    rows = page.locator("#messages > *")
    expect(rows.last).to_have_text("Cora joined")
    expect(rows).to_have_count(2)  # it is in a chat without messages, too
    server.post(chat, ben, "One")
    server.request("PATCH", url, {"title": "Bicycles"}, user_id=ben, name="Ben")
    server.request("PATCH", url, {"title": "Bike"})
    server.post(chat, ben, "Two")
    expect(bubbles(page)).to_have_text(["One", "Two"])
    history = [
        "The beginning of this chat",
        "Cora joined",
        "One",
        "Ben renamed the chat to “Bicycles”",
        "The chat is now called “Bike”",
        "Two",
    ]
    assert lines(page) == history
    # A line ends a group: its next message shows its sender again.
    expect(page.locator("#messages .sender")).to_have_text(["Ben", "Ben"])
    # What happened meanwhile is in its place, and what was shown is shown once.
    relay.cut(1012, block=True)
    expect_state(page, "connecting")
    server.request("DELETE", f"{url}/members/{cora}")
    server.post(chat, ben, "Three")
    relay.unblock()
    page.evaluate("dispatchEvent(new Event('online'))")
    expect(bubbles(page)).to_have_text(["One", "Two", "Three"])
    history += ["Cora left", "Three"]
    assert lines(page) == history
    spoken = page.locator("#announcer p").all_text_contents()
    assert [text for text in spoken if "Cora" in text] == ["Cora joined", "Cora left"]
    # They are no messages: nothing is unread, and no bubble, badge or tick counts them.
    until(lambda: page.title() == "Bike · chatd" and unread(server, anna, chat) == 0)
    expect(page.locator("#chat-list .badge")).to_have_count(0)
    # They stay while other chats are open and other messages come; a reload ends them.
    other = server.create_chat(anna, ben, title="Other")
    open_chat(page, other)
    server.request("POST", f"{url}/members", {"user_id": cora})
    open_chat(page, chat)
    expect(rows.last).to_have_text("Cora joined")
    assert lines(page) == [*history, "Cora joined"]
    page.reload()
    expect(bubbles(page)).to_have_text(["One", "Two", "Three"])
    assert lines(page) == ["The beginning of this chat", "One", "Two", "Three"]


def test_a_line_about_people_moves_nobody_who_reads(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = group(server, "Anna", "Ben")
    for i in range(40):
        server.post(chat, anna, f"Message {i} " + "words " * 20)
    page = sign_in(chromium.context(), server.link(anna), chat)
    expect(bubbles(page).last).to_be_in_viewport()
    url = f"/api/v1/chats/{chat}"
    server.request("PATCH", url, {"title": "At the end"})
    line = page.locator("#messages .line")
    expect(line).to_have_text("The chat is now called “At the end”")
    expect(line).to_be_in_viewport(ratio=1)  # the end was visible, and it is
    page.locator("[data-n='30']").evaluate("(row) => row.scrollIntoView()")
    expect(page.locator("#jump")).to_be_visible()
    place = (
        "() => document.querySelector(\"[data-n='30']\").getBoundingClientRect().top"
    )
    before = page.evaluate(place)
    for i in range(55):
        server.request("PATCH", url, {"title": f"Title {i}"})
    server.request("DELETE", f"{url}/members/{ben}")
    expect(line.last).to_have_text("Ben left")
    expect(line).to_have_count(50)  # the newest ones
    assert page.evaluate(place) == before
