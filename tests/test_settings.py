"""Settings and the command line: flags, variables, defaults, wrong arguments."""

from __future__ import annotations

import argparse
import math
import re
import sqlite3
import stat
import time
from collections.abc import Callable
from pathlib import Path

import jwt
import pytest
import trio
import trio.testing

import chatd
from chatd import Rate, Settings
from tests.client import (
    WAIT_SECONDS,
    CommandResult,
    ServerProcess,
    new_users,
    run_chatd,
)

# --- values and flags ----------------------------------------------------------------


def serve_settings(*argv: str) -> Settings:
    """The settings of `chatd serve ARGV`."""
    parser = chatd.make_parser()
    return chatd.read_settings(parser.parse_args(["serve", *argv]))


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def parser_of(name: str) -> Callable[[str], object]:
    """The parser of that name, or for that unit."""
    parse: Callable[[str], object] = chatd.PARSERS.get(name) or getattr(chatd, name)
    return parse


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        ("RATE/BURST", "5/20", Rate(5, 20)),
        ("RATE/BURST", "0.5/1", Rate(0.5, 1)),
        ("RATE/BURST", "0", Rate(0, 0)),
        ("RATE/BURST", "0/7", Rate(0, 0)),
        ("parse_count", "1", 1),
        ("parse_count", "10000", 10_000),
        ("SECONDS/never", "0", 0),
        ("SECONDS/never", "86400", 86_400),
        ("SECONDS/never", "never", math.inf),
        ("SECONDS", "0", 0.0),
        ("SECONDS", "2.5", 2.5),
        *[
            ("parse_listen", text, text)
            for text in (
                "127.0.0.1:0",
                "localhost:8086",
                "[::]:8086",
                "[::1]:65535",
                "[fe80::1%eth0]:8086",
                "chat_1.example:8086",
                "b\xfccher.example:80",
                "unix:/run/chatd/chatd.sock",
                "unix:chatd.sock",
                "unix:/a b:1",
                "unix:///run/chatd.sock",
                f"unix:/{'x' * 106}",
            )
        ],
        ("CIDR", "none", "none"),
        ("CIDR", "10.0.0.0/8", "10.0.0.0/8"),
        ("CIDR", "::1", "::1"),
        ("ORIGIN", "https://Example.org", "https://example.org"),
        ("ORIGIN", "http://localhost:3000", "http://localhost:3000"),
        ("WHO", "service", "service"),
        ("LEVEL", "debug", "debug"),
        ("parse_ttl", "90s", 90),
        ("parse_ttl", "90", 90),
        ("parse_ttl", "15m", 900),
        ("parse_ttl", "12h", 43_200),
        ("parse_ttl", "30d", 2_592_000),
        ("parse_id", "1", 1),
        ("parse_id", str(2**53 - 1), 2**53 - 1),
        ("parse_scope", "service", "service"),
        ("parse_scope", " stats  service ", "stats service"),
    ],
)
def test_a_value_within_its_limits_is_parsed(
    parse: str, text: str, value: object
) -> None:
    assert parser_of(parse)(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *[
            ("RATE/BURST", text)
            for text in (
                "",
                "5",
                "5/",
                "/5",
                "5/0",
                "5/0.9",
                "-1/5",
                "x",
                "5/x",
                "1/2/3",
            )
        ],
        *[("RATE/BURST", text) for text in ("nan/5", "5/nan", "inf/5", "5/inf")],
        *[("parse_count", text) for text in ("", "0", "-1", "1.5", "x", "²", "٣")],
        ("parse_count", "9" * 5000),
        *[("SECONDS", text) for text in ("", "-1", "nan", "inf", "x")],
        *[("SECONDS/never", text) for text in ("", "-1", "1.5", "inf", "1d", "Never")],
        *[("SECONDS/never", text) for text in ("9" * 11, "never\n", " 1", "1_0")],
        *[
            ("parse_listen", text)
            for text in (
                "",
                "host",
                "host:",
                ":80",
                "host:x",
                "host:65536",
                "host:-1",
                "8086",
                "::1:8086",
                "::",
                "[::]",
                "[]:8086",
                "*:8086",
                "host:\u0668\u0660",
                " host:80",
                "http://host:80",
                "http://host",
                "host:80/",
                "a@host:80",
                "[::1:80",
                "::1]:80",
                "unix:",
                "unix",
                "unix:@chatd",
                "/run/chatd.sock",
                f"unix:/{'x' * 107}",
            )
        ],
        *[("CIDR", text) for text in ("", "x", "10.0.0.1/8", "10.0.0.0/33")],
        *[
            ("ORIGIN", text)
            for text in ("", "example.org", "ftp://a", "https://", "https://a/b", "*")
        ],
        *[("ORIGIN", text) for text in ("nil", "https://a b", "http://u@a")],
        *[("WHO", text) for text in ("", "c", "users", "user|service")],
        *[("LEVEL", text) for text in ("", "loud", "DEBUG", "infos")],
        *[("parse_ttl", text) for text in ("", "0", "0d", "-1", "1w", "d", "1.5h")],
        *[("parse_id", text) for text in ("", "0", "-1", "x", "٦", "6 ")],
        *[("parse_id", text) for text in ("6\n", " 6", "+6", "6_0", "0x6")],
        ("parse_id", str(2**53)),
        ("parse_id", "9" * 30),
        *[("parse_scope", text) for text in ("", "  ", "admin", "service,stats")],
    ],
)
def test_a_value_past_its_limits_is_refused_and_the_error_quotes_it(
    parse: str, text: str
) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=" is not ") as caught:
        parser_of(parse)(text)
    assert str(caught.value).startswith(repr(text))


# For each flag: a valid text, its value, and an invalid text (None: there is none).
FLAGS: dict[str, tuple[str, object, str | None]] = {
    "listen": ("[::1]:0", ("[::1]:0",), "8086"),
    "db": ("/srv/chat.db", Path("/srv/chat.db"), None),
    "secret_file": ("/etc/secret", Path("/etc/secret"), None),
    "jwt_key": ("/etc/key", (Path("/etc/key"),), None),
    "issuer": ("shop", "shop", None),
    "audience": ("chat", "chat", None),
    "origin": ("https://a.example", ("https://a.example",), "a.example"),
    "trusted_proxy": ("10.0.0.0/8", ("10.0.0.0/8",), "10.0.0.1/8"),
    "chats_by": ("service", "service", "admin"),
    "invites": ("on", "on", "yes"),
    "edit_seconds": ("never", math.inf, "1d"),
    "log_level": ("debug", "debug", "loud"),
    "sends": ("1/2", Rate(1, 2), "1"),
    "commands": ("1/2", Rate(1, 2), "1"),
    "typing": ("1/2", Rate(1, 2), "1"),
    "handshakes": ("0", Rate(0, 0), "-1/5"),
    "requests": ("1/2", Rate(1, 2), "1/0"),
    "receive_bytes": ("1/2", Rate(1, 2), "x"),
    "max_connections": ("7", 7, "0"),
    "connections_per_user": ("7", 7, "-1"),
    "max_message_bytes": ("7", 7, "64K"),
    "max_content_chars": ("7", 7, "1.5"),
    "drain_seconds": ("0.5", 0.5, "-1"),
    "check_bytes": ("7", 7, "0"),
}
BAD_FLAGS = [(name, bad) for name, (_, _, bad) in FLAGS.items() if bad is not None]


def test_the_table_of_flags_has_every_flag() -> None:
    assert list(FLAGS) == [field.name for field in chatd.FLAGS]


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_overrides_its_variable_and_a_variable_the_default(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, value, _ = FLAGS[name]
    assert getattr(serve_settings(), name) == getattr(Settings(), name) != value
    monkeypatch.setenv(f"CHATD_{name.upper()}", text)
    assert getattr(serve_settings(), name) == value
    monkeypatch.setenv(f"CHATD_{name.upper()}", str(getattr(Settings(), name) or "/x"))
    assert getattr(serve_settings(flag_of(name), text), name) == value


BLANK = pytest.mark.parametrize("blank", ["", " ", "\t \n"])


@BLANK
@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize("name", FLAGS)
def test_a_blank_variable_counts_as_unset(
    name: str, blank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unset = serve_settings()
    monkeypatch.setenv(f"CHATD_{name.upper()}", blank)
    assert serve_settings() == unset
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/chatd")
    assert serve_settings().db == Path("/var/lib/chatd/chatd.db")


@BLANK
@pytest.mark.usefixtures("bare_environment")
def test_a_blank_variable_of_systemd_or_the_proxy_counts_as_unset(
    blank: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("STATE_DIRECTORY", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET"):
        monkeypatch.setenv(name, blank)
    for name in ("CHATD_UPSTREAM", "CHATD_TRUSTED_PROXY", "CHATD_NOBODY_KNOWS_ME"):
        monkeypatch.setenv(name, blank)
    parser = chatd.make_parser()
    options = parser.parse_args(["proxy"])
    assert options.upstream == "127.0.0.1:8086"
    settings = chatd.read_settings(options)
    assert settings.trusted_proxy == ("none",)
    assert settings.db == Path("chatd.db")
    assert chatd.secret_path(settings) == Path("chatd.secret")
    chatd.tell_unknown_variables()
    chatd.notify("READY=1")
    assert caplog.messages == []


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize(("name", "bad"), BAD_FLAGS)
def test_a_bad_flag_exits_with_status_2_and_is_named(
    name: str, bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        chatd.main(["serve", f"{flag_of(name)}={bad}"])
    assert caught.value.code == 2
    output = capsys.readouterr().err
    assert f"argument {flag_of(name)}: " in output
    assert bad in output


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize(("name", "bad"), BAD_FLAGS)
def test_a_bad_variable_exits_with_status_2_and_is_named(
    name: str,
    bad: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(f"CHATD_{name.upper()}", bad)
    with pytest.raises(SystemExit) as caught:
        chatd.main(["token", "6"])
    assert caught.value.code == 2
    output = capsys.readouterr().err
    assert f"CHATD_{name.upper()}: " in output
    assert bad in output


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize(
    "argv",
    [[], ["fly"], ["serve", "--fly"], ["serve", "x"], ["token"], ["token", "Bob"],
     ["token", "6", "--ttl", "x"], ["token", "6", "--scope", "x"],
     ["token", "6", "--link", "x"], ["token", "6", "--link", "ftp://x"], ["backup"],
     ["token", "6", "--scope", "stats", "--link"],
     ["serve", "--demo", "--db", "x"]],
)  # fmt: skip
def test_wrong_arguments_exit_with_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        chatd.main(argv)
    assert caught.value.code == 2


@pytest.mark.usefixtures("bare_environment")
def test_a_flag_can_be_repeated_and_its_variable_can_hold_a_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = serve_settings("--jwt-key", "a", "--jwt-key", "b").jwt_key
    monkeypatch.setenv("CHATD_JWT_KEY", "a b")
    assert both == serve_settings().jwt_key == (Path("a"), Path("b"))


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_a_blank_flag_counts_as_not_given(
    blank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [word for name in FLAGS for word in (flag_of(name), blank)]
    assert serve_settings(*argv) == Settings()
    assert serve_settings("--jwt-key", "a", "--jwt-key", blank).jwt_key == (Path("a"),)
    assert serve_settings("--listen", "a:1", "--listen", blank).listen == ("a:1",)
    for name, (text, _, _) in FLAGS.items():
        monkeypatch.setenv(f"CHATD_{name.upper()}", text)
    assert serve_settings(*argv) == serve_settings()


@pytest.mark.usefixtures("bare_environment")
def test_the_database_is_in_the_state_directory_unless_its_path_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert serve_settings().db == Path("chatd.db")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/chatd:/var/lib/more")
    assert serve_settings().db == Path("/var/lib/chatd/chatd.db")
    monkeypatch.setenv("CHATD_DB", "/srv/a.db")
    assert serve_settings().db == Path("/srv/a.db")
    assert serve_settings("--db", "/srv/b.db").db == Path("/srv/b.db")


@pytest.mark.usefixtures("bare_environment")
def test_the_proxy_has_its_own_defaults_and_a_variable_overrides_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chosen(*argv: str) -> tuple[Settings, str]:
        parser = chatd.make_parser()
        options = parser.parse_args(["proxy", *argv])
        return chatd.read_settings(options), options.upstream

    settings, upstream = chosen()
    assert (settings.listen, upstream) == (("127.0.0.1:3000",), "127.0.0.1:8086")
    assert settings.trusted_proxy == ("none",)
    assert serve_settings().trusted_proxy == ("127.0.0.0/8", "::1")
    monkeypatch.setenv("CHATD_LISTEN", "[::1]:1 unix:/run/p.sock")
    monkeypatch.setenv("CHATD_TRUSTED_PROXY", "10.0.0.0/8")
    monkeypatch.setenv("CHATD_UPSTREAM", "chat.example:2")
    settings, upstream = chosen()
    listen = ("[::1]:1", "unix:/run/p.sock")
    assert (settings.listen, upstream) == (listen, "chat.example:2")
    assert settings.trusted_proxy == ("10.0.0.0/8",)
    words = ("--listen", "a:3", "--upstream", "unix:/run/c.sock", "--listen", "b:3")
    settings, upstream = chosen(*words)
    assert (settings.listen, upstream) == (("a:3", "b:3"), "unix:/run/c.sock")
    with pytest.raises(SystemExit):
        chatd.main(["proxy", "--help"])
    output = " ".join(capsys.readouterr().out.split())
    for part in ("(default 127.0.0.1:3000)", "(default none)", "--jwt-key FILE"):
        assert part in output
    assert "--sends" not in output


@pytest.mark.usefixtures("bare_environment")
def test_help_shows_the_unit_the_default_and_the_consequence_of_every_flag(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        chatd.main(["serve", "--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for field in chatd.FLAGS:
        meta = field.metadata
        assert f"{flag_of(field.name)} {meta['unit']} {meta['why']}" in output
        assert meta["over"] in output
        assert f"(default {chatd.shown(field.default)})" in output or not field.default


# The defaults, as text.
DEFAULTS = {
    "listen": "127.0.0.1:8086", "db": "chatd.db", "chats_by": "user",
    "edit_seconds": "86400", "erase_seconds": "30.0",
    "sends": "5/20", "commands": "30/60", "typing": "1/5", "handshakes": "10/50",
    "requests": "20/100", "receive_bytes": "65536/524288", "max_connections": "10000",
    "connections_per_user": "20", "max_message_bytes": "65536",
    "max_content_chars": "4000", "drain_seconds": "5", "check_bytes": "33554432",
    "outbox_bytes": "262144", "fragments": "64",
    "resync_events": "5000", "page_events": "500", "page_bytes": "131072",
    "tail_events": "16384", "large_chat": "50",
}  # fmt: skip
CONSTANTS = {
    "HEAD_SECONDS": 10, "REQUEST_SECONDS": 15, "IDLE_SECONDS": 75,
    "PING_SECONDS": 25, "PONG_SECONDS": 10, "STALL_SECONDS": 40,
    "TOKEN_WARNING_SECONDS": 60, "TOKEN_GRACE_SECONDS": 25,
    "TICKET_SECONDS": 60, "LINK_SECONDS": 86_400, "SESSION_SECONDS": 2_592_000,
    "PROBE_SECONDS": 2, "UNANSWERED": 64, "HEADER_LINES": 64,
    "REFUSED_IN_A_ROW": 100, "READERS": 5,
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_is_the_specified_one(name: str) -> None:
    assert chatd.shown(getattr(Settings(), name)) == DEFAULTS[name]


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_the_specified_one(name: str) -> None:
    assert getattr(chatd, name) == CONSTANTS[name]


def test_every_flag_has_a_unit_and_a_reason() -> None:
    for field in chatd.FLAGS:
        unit, over = field.metadata["unit"], field.metadata["over"]
        assert unit, field.name
        assert field.metadata["why"], field.name
        # "Over it" is said of a number, and of nothing else.
        limit = unit in ("RATE/BURST", "COUNT", "BYTES", "CHARACTERS")
        assert over.startswith("over it: ") == (limit and field.name != "check_bytes")


# --- whole process: the command line -------------------------------------------------


async def test_the_program_exits_with_status_2_and_names_the_wrong_argument(
    tmp_path: Path,
) -> None:
    db = tmp_path / "chatd.db"
    wrong: list[tuple[str, ...]] = [
        ("nonsense",),
        ("serve", "--nonsense"),
        ("serve", "--listen", "nonsense"),
        ("serve", "--listen", "127.0.0.1:99999"),
        ("serve", "--sends", "many"),
        ("serve", "--sends=-1/5"),
        ("serve", "--max-connections", "few"),
        ("serve", "--drain-seconds=-1"),
        ("serve", "--trusted-proxy", "nonsense"),
        ("serve", "--chats-by", "nobody"),
        ("proxy", "--upstream", "nonsense"),
        ("proxy", "--listen", "nonsense"),
        ("token",),
        ("token", "six"),
        ("token", "0"),
        ("token", "6", "--ttl", "nonsense"),
        ("backup",),
        ("restore",),
    ]
    runs: dict[tuple[str, ...], CommandResult] = {}

    async def run(words: tuple[str, ...]) -> None:
        end = () if words[0] == "nonsense" else ("--db", db)
        runs[words] = await run_chatd(*words, *end)

    async with trio.open_nursery() as nursery:
        for words in wrong:
            nursery.start_soon(run, words)
    for words, done in runs.items():
        assert done.status == 2, (words, done)
        assert done.out == "", (words, done)
        wrong_word = words[-1].partition("=")
        assert (wrong_word[2] or wrong_word[0]).lstrip("-") in done.err, (words, done)
    assert not db.exists()
    by_environment = await run_chatd("serve", "--db", db, CHATD_SENDS="many")
    assert by_environment.status == 2
    assert "CHATD_SENDS" in by_environment.err
    misspelt = await run_chatd("check", "--db", db, CHATD_SENDZ="5/20")
    assert "WARNING unknown_variable name='CHATD_SENDZ'" in misspelt.err
    helped = await run_chatd("--help")
    assert helped.status == 0
    for word in ("serve", "proxy", "token", "backup", "restore", "check"):
        assert word in helped.out
    version = await run_chatd("--version")
    assert (version.status, chatd.__version__ in version.out) == (0, True)


async def test_chatd_token_prints_nothing_but_a_token_that_works(
    shared_server: ServerProcess,
) -> None:
    server = shared_server
    user = next(new_users)
    words = ("token", user, "--db", server.db)
    secret = ("--secret-file", server.db.with_name("chatd.secret"))
    plain = await run_chatd(*words, "--name", "Ann", "--ttl", "90s")
    claims = jwt.decode(plain.out.strip(), options={"verify_signature": False})
    assert 80 < claims["exp"] - time.time() <= 91
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", plain.out)
    me = await server.want(200, "GET /api/v1/me", plain.out.strip())
    assert (me["user_id"], me["name"]) == (user, "Ann")
    stats = await run_chatd("token", user, *secret, "--scope", "stats")
    target = "GET /api/v1/internal/chat/ws/stats"
    await server.want(200, target, stats.out.strip())
    at = "127.0.0.1:9000"
    for more, environment, base in (
        ((), {}, "http://127.0.0.1:8086"),
        (("--listen", at), {}, f"http://{at}"),
        ((), {"CHATD_LISTEN": at}, f"http://{at}"),
        (("--listen", "[::1]:1"), {"CHATD_LISTEN": at}, "http://[::1]:1"),
        ((), {"CHATD_LISTEN": f"unix:/a/b {at} c:1"}, f"http://{at}"),
        (("--listen", "unix:b"), {}, "http://127.0.0.1:8086"),
        (("--listen", "0.0.0.0:9000"), {}, "http://localhost:9000"),
        (("--listen", "[::]:9000"), {}, "http://localhost:9000"),
    ):
        link = await run_chatd(*words, "--link", *more, **environment)
        assert re.fullmatch(rf"{re.escape(base)}/#token=\S+\n", link.out), link
    link = await run_chatd(*words, "--link", "https://a.example/b/", "--listen", at)
    assert link.out.startswith("https://a.example/b/#token="), link
    credentials = {"CREDENTIALS_DIRECTORY": str(server.home)}
    systemd = await run_chatd("token", user, **credentials)
    await server.want(200, "GET /api/v1/me", systemd.out.strip())
    for run in (plain, stats, link, systemd):
        assert run.status == 0


async def test_a_command_that_cannot_work_exits_with_status_1_and_names_the_cause(
    server: ServerProcess, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in ("newer", "garbage", "open", "short")]
    newer, garbage, readable, short = (path / "chatd.db" for path in paths)
    for path in paths:
        path.mkdir()
    garbage.write_bytes(b"not a database, but long enough to be looked at" * 100)
    for db, text, mode in ((readable, "x" * 40, 0o644), (short, "short", 0o600)):
        secret = db.with_name("chatd.secret")
        secret.write_text(text, "ascii")
        secret.chmod(mode)
    async with server.serving():
        pid = str(server.process.pid) if server.process else ""
        assert (await run_chatd("backup", newer, "--db", server.db)).status == 0
        with sqlite3.connect(newer) as connection:
            connection.execute("PRAGMA user_version = 999")
        connection.close()
        secret = server.db.with_name("chatd.secret")
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        newer.with_name("chatd.secret").write_bytes(secret.read_bytes())
        newer.with_name("chatd.secret").chmod(0o600)
        listen = ("serve", "--listen", "127.0.0.1:0", "--db")
        taken = ("serve", "--listen", f"127.0.0.1:{server.port}", "--db")
        nowhere = tmp_path / "no" / "such" / "chatd.db"
        before = garbage.read_bytes()
        failures: list[tuple[tuple[object, ...], str]] = [
            ((*listen, server.db), pid),  # the process that holds the database
            (("restore", newer, "--db", server.db), pid),
            ((*listen, newer), "999"),
            ((*listen, garbage), str(garbage)),
            (("check", "--db", garbage), str(garbage)),
            (("restore", garbage, "--db", tmp_path / "x.db"), str(garbage)),
            ((*listen, readable), str(readable.with_name("chatd.secret"))),
            ((*listen, short), "32"),
            ((*taken, tmp_path / "other.db"), str(server.port)),
            ((*listen, nowhere), str(nowhere.parent)),
            (("token", "6", "--db", nowhere), "secret"),
            (("proxy", *listen[1:], nowhere), "secret"),
            (("proxy", *taken[1:], server.db), str(server.port)),
            (("check", "--db", nowhere), str(nowhere)),
            (("backup", tmp_path / "copy", "--db", nowhere), str(nowhere)),
            (("restore", tmp_path / "none", "--db", tmp_path / "o.db"), "none"),
            ((*listen, tmp_path / "o.db", "--jwt-key", tmp_path / "none"), "none"),
        ]
        runs: list[tuple[tuple[object, ...], str, CommandResult]] = []

        cores = trio.CapacityLimiter(2)  # more at once would only wait for each other

        async def run(words: tuple[object, ...], named: str) -> None:
            async with cores:
                with trio.fail_after(WAIT_SECONDS):
                    runs.append((words, named, await run_chatd(*words)))

        async with trio.open_nursery() as nursery:
            for words, named in failures:
                nursery.start_soon(run, words, named)
        for words, named, done in runs:
            assert done.status == 1, (words, done)
            assert named in done.err, (words, done)
            assert "listening" not in done.out, (words, done)
        assert garbage.read_bytes() == before
        assert not nowhere.parent.exists()
        await server.want(200, "GET /healthz")
