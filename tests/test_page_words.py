"""The page's words: one table per language, complete, used, and laid out rightly."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from tests.browser import (
    FIXTURES,
    Chromium,
    Page,
    Route,
    Server,
    axe,
    bubbles,
    expect,
    field,
    open_chat,
    pair,
    screenshot,
    sign_in,
    ticks,
    write,
)
from tests.client import CHECKOUT

pytestmark = pytest.mark.browser
site, server, make_server, browser, chromium, example_chats = FIXTURES

WEB = CHECKOUT / "web"
HTML = (WEB / "index.html").read_text(encoding="utf-8")
SCRIPTS = {
    path.name: path.read_text(encoding="utf-8")
    for path in WEB.glob("*.js")
    if path.name not in ("words.js", "chat-websocket.js")  # that one is for programmers
}
FORMS = {"en": {"one", "other"}, "ru": {"one", "few", "many", "other"}}

Words = dict[str, Any]


# --- the tables ----------------------------------------------------------------------


@pytest.fixture
def tables(server: Server, chromium: Chromium) -> dict[str, Words]:
    """Let the browser read the tables, and say which plural forms it knows."""
    page = chromium.page()
    page.goto(server.url)
    for language, forms in FORMS.items():
        rules = f"new Intl.PluralRules('{language}').resolvedOptions().pluralCategories"
        assert set(page.evaluate(rules)) == forms
    found: dict[str, Words] = page.evaluate(
        "() => import('./web/words.js').then(({ TABLES }) => TABLES)"
    )
    return found


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


def test_each_language_says_everything_with_the_same_values(
    tables: dict[str, Words],
) -> None:
    assert tables.keys() == FORMS.keys()
    english = tables["en"]
    for language, table in tables.items():
        assert table.keys() == english.keys(), language
        for key, words in table.items():
            plural = isinstance(words, dict)
            assert not plural or words.keys() == FORMS[language], key
            for text in words.values() if plural else [words]:
                first = english[key]
                wanted = names_in(first["other"] if isinstance(first, dict) else first)
                assert names_in(text) == wanted, (language, key)
                assert text == text.strip() != "", (language, key)
                assert not re.search(r'\.\.\.|"', text), (language, key)
                assert not plural or "count" in wanted, (language, key)


def test_every_word_is_used_and_every_word_that_is_used_exists(
    tables: dict[str, Words],
) -> None:
    in_html = set(re.findall(r'data-say(?:-label)?="(\w+)"', HTML))
    in_html -= {"key"}  # of the comment
    in_scripts = set(re.findall(r'"(\w+)"', "".join(SCRIPTS.values())))
    said = re.findall(r'\bsay\(\s*"(\w+)"', "".join(SCRIPTS.values()))
    assert len(said) > 50
    assert {*said, *in_html} <= tables["en"].keys()
    states = {"connected", "too_many"}  # say(state)
    assert tables["en"].keys() <= in_scripts | in_html | states


class Skeleton(HTMLParser):
    """Collects the texts of index.html that no table replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.replaced = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        # The names of keys are the same in all languages.
        self.replaced = "data-say" in given or tag == "kbd"
        names = ("aria-label", "placeholder", "title", "alt")
        self.texts += [given[name] or "" for name in names if name in given]

    def handle_data(self, data: str) -> None:
        if not self.replaced and data.strip():
            self.texts.append(data.strip())


def test_no_words_stand_outside_of_the_tables() -> None:
    skeleton = Skeleton()
    skeleton.feed(HTML)
    assert sorted(set(skeleton.texts)) == ["chatd", "https://…/#token=…"]
    for name, source in SCRIPTS.items():
        for _, *quoted in TOKEN.findall(source):
            literal = re.sub(r"\$\{.*?\}", "", "".join(quoted))
            capital = re.match(r"[A-Z][a-z]+(?: |[.,:;…?!]|$)", literal)
            sentence = re.search(r"[a-z]{2,} [a-z]+(?: [a-z]+|[.:…?!])", literal)
            assert not capital or literal in KEYBOARD, (name, literal)
            assert not sentence or literal in TECHNICAL, (name, literal)


TOKEN = re.compile(
    r"""(/\*.*?\*/|(?<![:\\])//[^\n]*"""  # a comment, or a regular expression
    r"""|(?<=[(=,\s])/(?![/*\s])(?:[^/\\\n\[]|\\.|\[(?:[^]\\\n]|\\.)*\])+/)"""
    r"""|"((?:[^"\\\n]|\\.)*)"|'((?:[^'\\\n]|\\.)*)'|`((?:[^`\\]|\\.)*)`""",
    re.DOTALL,
)
KEYBOARD = {"Enter", "Escape", "Tab", "Home", "End"}  # of KeyboardEvent.key
TECHNICAL = {
    "noopener noreferrer nofollow",
    "index.html has no #",  # a mistake in the page itself
}

# --- languages -----------------------------------------------------------------------

# Everything that is said, also by what is hidden, apart from the page's own name.
LATIN = r"""() => {
  const texts = [document.title];
  for (const node of document.querySelectorAll("body *:not(kbd)")) {
    for (const name of ["aria-label", "placeholder", "title"])
      texts.push(node.getAttribute(name));
    for (const child of node.childNodes)
      if (child.nodeType === Node.TEXT_NODE) texts.push(child.data);
  }
  const own = /chatd|#token=|https:\/\/…\//g;
  return texts.filter((text) => /[a-z]/i.test((text ?? "").replace(own, "")));
}"""


def is_russian(page: Page) -> None:
    assert page.evaluate("document.documentElement.lang") == "ru"
    assert page.evaluate(LATIN) == []


def test_a_russian_browser_shows_a_russian_page(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, boris = (server.add_user(name) for name in ("Анна", "Бен", "Борис"))
    chat = server.create_chat(anna, ben, boris, title="Переезд")
    body = {"direct": True, "member_ids": [anna, ben]}
    direct = server.request("POST", "/api/v1/chats", body)["chat"]["id"]
    context = chromium.context(locale="ru-RU", viewport={"width": 390, "height": 780})
    page = context.new_page()
    page.goto(server.url)
    expect(page.get_by_role("heading", name="Вход в chatd")).to_be_visible()
    page.get_by_label("Ссылка для входа").fill("123")
    page.get_by_role("button", name="Войти").click()
    expect(page.get_by_role("alert")).to_contain_text("Это не ссылка для входа")
    is_russian(page)
    screenshot(page, "russian-sign-in")
    page.goto(server.link(anna))
    expect(page.get_by_role("heading", name="Чаты", exact=True)).to_be_visible()
    number = 0
    for count, words in (
        (1, "1 новое сообщение"),
        (2, "2 новых сообщения"),
        (5, "5 новых сообщений"),
        (21, "21 новое сообщение"),
    ):
        while number < count:
            number += 1
            server.post(chat, ben, str(number))
        expect(page.get_by_role("button", name=words)).to_be_visible()
    is_russian(page)
    screenshot(page, "russian-list")
    open_chat(page, chat)
    expect(bubbles(page)).to_have_count(21)
    expect(page.locator("#messages .day")).to_have_text("Сегодня")
    expect(page.locator("#messages .divider")).to_have_text("Новые сообщения")
    stamp = page.locator("#messages time").last
    expect(stamp).to_have_text(re.compile(r"^\d\d:\d\d$"))
    expect(stamp).to_have_attribute("title", re.compile(r"20\d\d г\."))
    composer = page.locator("#composer-text")
    composer.fill("Привет")
    composer.press("Enter")
    expect(ticks(page)).to_have_text("Отправлено")
    bens = sign_in(chromium.context(locale="ru"), server.link(ben), chat)
    expect(ticks(page)).to_have_text("Прочитали: 1 из 2")
    bens.locator("#composer-text").press_sequentially("Да")
    expect(page.locator("#typing")).to_have_text("Бен печатает…")
    is_russian(page)
    screenshot(page, "russian-chat")
    composer.fill("я" * 4100)
    composer.press("Enter")
    expect(page.locator(".failure")).to_contain_text(
        "Не отправлено: Лишних символов: 100. Помещается не больше 4\u00a0000."
    )
    is_russian(page)
    page.locator("#chat-info").click()
    is_russian(page)
    page.keyboard.press("Escape")
    back = page.get_by_role("link", name="Назад ко всем чатам")
    back.click()
    open_chat(page, direct)
    expect(page.locator("#pane-members")).to_have_text("Личный чат")
    back.click()
    page.locator("#me").click()
    page.get_by_role("button", name="Выйти").click()
    dialog = page.get_by_role("dialog", name="Выйти")
    expect(dialog).to_contain_text("Неотправленные сообщения будут потеряны: 1.")
    is_russian(page)
    dialog.get_by_role("button", name="Выйти").click()
    expect(page.locator("#sign-in-text")).to_contain_text("Вы вышли.")
    is_russian(page)


def test_the_address_chooses_the_language_and_keeps_it(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    server.post(chat, ben, "Hello")
    page = chromium.context(locale="ru-RU").new_page()
    for search, words in (
        ("?lang=xx", "Вход в chatd"),
        ("?lang=%", "Вход в chatd"),
        ("?lang=", "Вход в chatd"),
        ("?lang=EN-gb", "Sign in to chatd"),
        ("?lang=en", "Sign in to chatd"),
    ):
        page.goto(f"{server.url}/{search}")
        expect(page.get_by_role("heading", level=1)).to_have_text(words)
    link = server.link(anna)
    page.get_by_label("Sign-in link").fill(link)
    page.get_by_role("button", name="Sign in").click()
    open_chat(page, chat)
    stamp = page.locator("#messages time")
    # The browser knows no region of this language.
    expect(stamp).to_have_attribute("title", re.compile(r"day, [A-Z]\w+ \d+, \d{4}"))
    page.reload()
    expect(page.locator("#messages .day")).to_have_text("Today")
    assert "/?lang=en#chat/" in page.url
    page.goto(link.replace("/#", "/?lang=ru#"))
    expect(page.get_by_role("heading", name="Чаты", exact=True)).to_be_visible()
    page.reload()
    expect(page.get_by_role("heading", name="Чаты", exact=True)).to_be_visible()


def test_times_and_numbers_have_the_users_region_of_the_pages_language(
    server: Server, chromium: Chromium
) -> None:
    anna, ben, chat = pair(server)
    server.post(chat, ben, "Hello")
    languages = "['de-CH', 'en-IN', 'ru-RU']"
    context = chromium.context(locale="de-DE")
    context.add_init_script(
        f"Object.defineProperty(navigator, 'languages', {{ value: {languages} }})"
    )
    page = sign_in(context, server.link(anna), chat)
    expect(page.locator("#messages .day")).to_have_text("Today")
    stamp = page.locator("#messages time")
    moment = re.compile(r"^\w+day,? \d+ \w+,? \d{4}")  # day before month, as in India
    expect(stamp).to_have_attribute("title", moment)
    field(page).fill("x" * 123_456)
    expect(page.locator("#composer-count")).to_have_text(
        re.compile("^Too long by 1,19,456:")
    )


# --- right to left -------------------------------------------------------------------

# Where the characters at these places of a text are, from left to right.
PLACES = r"""(node, places) => {
  const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
  const all = [];
  while (walker.nextNode()) {
    const text = walker.currentNode;
    for (let i = 0; i < text.length; i++) all.push([text, i]);
  }
  return places.map((place) => {
    const [text, i] = all.at(place);
    const range = document.createRange();
    range.setStart(text, i);
    range.setEnd(text, i + 1);
    const { left, right } = range.getBoundingClientRect();
    return (left + right) / 2;
  });
}"""


def test_right_to_left_text_is_laid_out_rightly(
    server: Server, chromium: Chromium
) -> None:
    anna, nir = server.add_user("Anna"), server.add_user("ניר!")
    chat = server.create_chat(anna, nir, title="משפחה (2)")
    other = server.create_chat(anna, nir, title="Family")
    server.post(other, nir, "Hello, how are you?")
    server.post(
        chat, nir, "שלום!\nThis line is English, and longer.\nראה https://a.example/"
    )
    page = sign_in(chromium.context(), server.link(anna), chat)
    nirs = sign_in(chromium.context(), server.link(nir), chat)

    def places(selector: str, *of: int) -> list[float]:
        found: list[float] = page.locator(selector).evaluate(PLACES, [*of])
        return found

    # Each paragraph has its own direction, and begins on its own side.
    content = page.locator("#messages .content")
    box = content.bounding_box()
    assert box
    first, mark = places("#messages .content", 0, 4)
    assert mark < first
    assert first > box["x"] + box["width"] - 20
    this, dot = places("#messages .content", 6, 38)
    assert this < dot
    assert this < box["x"] + 20
    slash, colon = places("#messages .content a", -1, 5)
    assert colon < slash, "an address is written from left to right"
    # A name keeps its marks on its own side of the sentence.
    field(nirs).press_sequentially("ש")
    expect(page.locator("#typing")).to_have_text("\u2068ניר!\u2069 is typing…")
    name, mark, verb = places("#typing", 1, 4, 7)
    assert mark < name < verb
    field(nirs).fill("")
    expect(page.locator("#typing")).to_be_empty()
    # The titles of all chats begin in one line.
    row, other_row = (
        f"#chat-list [href='#chat/{one}'] .row-title" for one in (chat, other)
    )
    starts = [page.locator(one).bounding_box() for one in (row, other_row)]
    assert starts[0]
    assert starts[1]
    assert starts[0]["x"] == starts[1]["x"]
    number, letter = places(row, -2, 0)
    assert number < letter
    # The composer follows what is written in it, and the list shows it as a draft.
    field(page).fill("שלום")
    assert field(page).evaluate("(node) => node.matches(':dir(rtl)')")
    field(page).fill("Hello")
    assert field(page).evaluate("(node) => node.matches(':dir(ltr)')")
    field(page).fill("שלום (1)")
    screenshot(page, "right-to-left-text")
    open_chat(page, other)
    write(page, "Yes")
    draft = f"#chat-list [href='#chat/{chat}'] .row-last"
    expect(page.locator(draft)).to_have_text("Draft: \u2068שלום (1)\u2069")
    start, letter, number = places(draft, 0, 8, -3)
    assert start < number < letter


def test_a_page_in_a_right_to_left_language_is_mirrored(
    server: Server, chromium: Chromium, example_chats: tuple[int, int]
) -> None:
    def with_hebrew(route: Route) -> None:
        source = route.fetch().text()
        assert source.count("TABLES = { en, ru }") == 1
        route.fulfill(
            body=source.replace("TABLES = { en, ru }", "TABLES = { en, ru, he: en }"),
            content_type="text/javascript",
        )

    anna, chat = example_chats
    context = chromium.context(locale="he-IL", viewport={"width": 1280, "height": 720})
    context.route("**/web/words.js", with_hebrew)
    page = sign_in(context, server.link(anna), chat)

    def left(selector: str) -> float:
        box = page.locator(selector).first.bounding_box()
        assert box
        return float(box["x"])

    assert page.evaluate("document.documentElement.dir") == "rtl"
    assert left("#chats") > left("#pane")
    assert left(".brand") > left("#me")
    assert left("#send") < left("#composer-text")
    assert left(".message.own .bubble") < left(".message:not(.own) .bubble")
    assert left("#pane-avatar") > left("#pane-title") > left("#chat-info")
    assert left("#chat-list .avatar") > left("#chat-list .row-title")
    page.locator("#me").click()
    assert left("#me-panel") < 40
    page.keyboard.press("Escape")
    screenshot(page, "right-to-left-wide")
    axe(page)
    page.set_viewport_size({"width": 390, "height": 780})
    screenshot(page, "right-to-left-chat")
    page.get_by_role("link", name="Back to all chats").click()
    screenshot(page, "right-to-left-list")
