"""The tests of chatd, in the order of chatd.py's sections. Names are claims."""

from __future__ import annotations

import ast
import base64
import contextlib
import dataclasses
import datetime
import errno
import functools
import gc
import hashlib
import hmac
import inspect
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast, get_args
from urllib.parse import quote, urlencode

import h11
import hypothesis
import jwt
import msgspec
import pytest
import trio
import trio.testing
import trio_websocket
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import MockClock, wait_all_tasks_blocked
from websockets.sync.client import connect as websockets_connect
from wsproto.frame_protocol import CloseReason as WsCloseReason
from wsproto.frame_protocol import FrameProtocol, Opcode

import chatd
from chatd import Job, Keyring, Rate, Refusal, Send, Settings, Stats, Store, UsageError

V = TypeVar("V")


def refusal_of(function: Callable[..., object], *args: object) -> Refusal:
    """The Refusal that a call raises; that it raises one is part of every test."""
    with pytest.raises(Refusal) as caught:
        function(*args)
    assert caught.value.message
    return caught.value


def usage_error_of(function: Callable[..., object], *args: object) -> str:
    """The sentence of the UsageError that a call raises: one line."""
    with pytest.raises(UsageError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# =====================================================================================
# WORDS
#
# What can be set, what can go wrong, what goes over the wire: tables against tables.
# Where the protocol has a table, the test has it too, copied by hand.
# =====================================================================================


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the machine reaches the settings; help lines are not broken."""
    for name in [*os.environ]:
        if name.startswith(("CHATD_", "STATE_DIR", "CREDENTIALS_DIR", "JOURNAL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "400")


def words_settings(*argv: str) -> Settings:
    """The settings of `chatd serve ARGV`."""
    parser = chatd.make_parser()
    return chatd.read_settings(parser, parser.parse_args(["serve", *argv]))


def words_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (chatd.parse_rate, "5/20", Rate(5, 20)),
        (chatd.parse_rate, "0.5/1", Rate(0.5, 1)),
        (chatd.parse_rate, "0", Rate(0, 0)),
        (chatd.parse_rate, "0/7", Rate(0, 0)),
        (chatd.parse_count, "1", 1),
        (chatd.parse_count, "10000", 10_000),
        (chatd.parse_seconds, "0", 0.0),
        (chatd.parse_seconds, "2.5", 2.5),
        (chatd.parse_listen, "127.0.0.1:0", "127.0.0.1:0"),
        (chatd.parse_listen, "[::1]:65535", "[::1]:65535"),
        (chatd.parse_network, "none", "none"),
        (chatd.parse_network, "10.0.0.0/8", "10.0.0.0/8"),
        (chatd.parse_network, "::1", "::1"),
        (chatd.parse_origin, "https://Example.org", "https://example.org"),
        (chatd.parse_origin, "http://localhost:3000", "http://localhost:3000"),
        (chatd.parse_word("a", "b"), "b", "b"),
        (chatd.parse_ttl, "90s", 90),
        (chatd.parse_ttl, "90", 90),
        (chatd.parse_ttl, "15m", 900),
        (chatd.parse_ttl, "12h", 43_200),
        (chatd.parse_ttl, "30d", 2_592_000),
        (chatd.parse_user, "1", 1),
        (chatd.parse_user, str(2**53 - 1), 2**53 - 1),
        (chatd.parse_scope, "service", "service"),
        (chatd.parse_scope, " stats  service ", "stats service"),
    ],
)
def test_a_setting_is_read_up_to_its_edge(
    parse: Callable[[str], object], text: str, value: object
) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *[
            (chatd.parse_rate, text)
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
        *[(chatd.parse_rate, text) for text in ("nan/5", "5/nan", "inf/5", "5/inf")],
        *[(chatd.parse_count, text) for text in ("", "0", "-1", "1.5", "x", "²", "٣")],
        (chatd.parse_count, "9" * 5000),
        *[(chatd.parse_seconds, text) for text in ("", "-1", "nan", "inf", "x")],
        *[
            (chatd.parse_listen, text)
            for text in ("", "host", "host:", ":80", "host:x", "host:65536", "host:-1")
        ],
        *[
            (chatd.parse_network, text)
            for text in ("", "x", "10.0.0.1/8", "10.0.0.0/33")
        ],
        *[
            (chatd.parse_origin, text)
            for text in ("", "example.org", "ftp://a", "https://", "https://a/", "*")
        ],
        *[(chatd.parse_origin, text) for text in ("null", "https://a b", "http://u@a")],
        (chatd.parse_word("a", "b"), "c"),
        *[(chatd.parse_ttl, text) for text in ("", "0", "0d", "-1", "1w", "d", "1.5h")],
        *[(chatd.parse_user, text) for text in ("", "0", "-1", "x", "٦", "6 ")],
        (chatd.parse_user, str(2**53)),
        (chatd.parse_user, "9" * 30),
        *[(chatd.parse_scope, text) for text in ("", "  ", "admin", "service,stats")],
    ],
)
def test_a_setting_past_its_edge_is_refused_with_a_sentence(
    parse: Callable[[str], object], text: str
) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(text)


# A good value as it is typed, what it becomes, and a bad one; None: every text is good.
FLAGS: dict[str, tuple[str, object, str | None]] = {
    "listen": ("[::1]:0", "[::1]:0", "8086"),
    "db": ("/srv/chat.db", Path("/srv/chat.db"), None),
    "secret_file": ("/etc/secret", Path("/etc/secret"), None),
    "jwt_key": ("/etc/key", (Path("/etc/key"),), None),
    "issuer": ("shop", "shop", None),
    "audience": ("chat", "chat", None),
    "origin": ("https://a.example", ("https://a.example",), "a.example"),
    "trusted_proxy": ("10.0.0.0/8", ("10.0.0.0/8",), "10.0.0.1/8"),
    "chats_by": ("service", "service", "admin"),
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


def test_the_table_above_has_every_flag() -> None:
    assert list(FLAGS) == [field.name for field in chatd.flags()]


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_beats_its_variable_and_a_variable_beats_the_default(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, value, _ = FLAGS[name]
    assert getattr(words_settings(), name) == getattr(Settings(), name) != value
    monkeypatch.setenv(f"CHATD_{name.upper()}", text)
    assert getattr(words_settings(), name) == value
    monkeypatch.setenv(f"CHATD_{name.upper()}", str(getattr(Settings(), name) or "/x"))
    assert getattr(words_settings(words_flag(name), text), name) == value


BLANK = pytest.mark.parametrize("blank", ["", " ", "\t \n"])


@BLANK
@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize("name", FLAGS)
def test_a_blank_variable_is_an_unset_one(
    name: str, blank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unset = words_settings()
    monkeypatch.setenv(f"CHATD_{name.upper()}", blank)
    assert words_settings() == unset
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/chatd")
    assert words_settings().db == Path("/var/lib/chatd/chatd.db")


@BLANK
@pytest.mark.usefixtures("bare_environment")
def test_blank_variables_of_systemd_and_of_the_proxy_are_unset_ones(
    blank: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("STATE_DIRECTORY", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET"):
        monkeypatch.setenv(name, blank)
    for name in ("CHATD_UPSTREAM", "CHATD_TRUSTED_PROXY", "CHATD_NOBODY_KNOWS_ME"):
        monkeypatch.setenv(name, blank)
    parser = chatd.make_parser()
    options = parser.parse_args(["proxy"])
    assert options.upstream == "127.0.0.1:8086"
    settings = chatd.read_settings(parser, options)
    assert settings.trusted_proxy == ("none",)
    assert settings.db == Path("chatd.db")
    assert chatd.secret_path(settings) == Path("chatd.secret")
    chatd.tell_unknown_variables()
    chatd.notify("READY=1")
    assert caplog.messages == []


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize(("name", "bad"), BAD_FLAGS)
def test_a_bad_flag_is_wrong_use_and_is_named(
    name: str, bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        chatd.main(["serve", f"{words_flag(name)}={bad}"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert f"argument {words_flag(name)}: " in said
    assert bad in said


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize(("name", "bad"), BAD_FLAGS)
def test_a_bad_variable_is_wrong_use_and_is_named(
    name: str,
    bad: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(f"CHATD_{name.upper()}", bad)
    with pytest.raises(SystemExit) as caught:
        chatd.main(["token", "6"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert f"CHATD_{name.upper()}: " in said
    assert bad in said


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize(
    "argv",
    [[], ["fly"], ["serve", "--fly"], ["serve", "x"], ["token"], ["token", "Bob"],
     ["token", "6", "--ttl", "x"], ["token", "6", "--scope", "x"],
     ["token", "6", "--link", "x"], ["token", "6", "--link", "ftp://x"], ["backup"],
     ["serve", "--demo", "--db", "x"]],
)  # fmt: skip
def test_wrong_use_is_exit_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        chatd.main(argv)
    assert caught.value.code == 2


@pytest.mark.usefixtures("bare_environment")
def test_a_flag_of_several_values_takes_them_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = words_settings("--jwt-key", "a", "--jwt-key", "b").jwt_key
    monkeypatch.setenv("CHATD_JWT_KEY", "a b")
    assert both == words_settings().jwt_key == (Path("a"), Path("b"))


@pytest.mark.usefixtures("bare_environment")
def test_the_database_is_in_the_state_directory_unless_somebody_says_where(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert words_settings().db == Path("chatd.db")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/chatd:/var/lib/more")
    assert words_settings().db == Path("/var/lib/chatd/chatd.db")
    monkeypatch.setenv("CHATD_DB", "/srv/a.db")
    assert words_settings().db == Path("/srv/a.db")
    assert words_settings("--db", "/srv/b.db").db == Path("/srv/b.db")


@pytest.mark.usefixtures("bare_environment")
def test_the_proxy_has_its_own_defaults_and_a_variable_beats_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chosen(*argv: str) -> tuple[Settings, str]:
        parser = chatd.make_parser()
        options = parser.parse_args(["proxy", *argv])
        return chatd.read_settings(parser, options), options.upstream

    settings, upstream = chosen()
    assert (settings.listen, upstream) == ("127.0.0.1:3000", "127.0.0.1:8086")
    assert not chatd.Proxies(settings.trusted_proxy).networks
    assert words_settings().trusted_proxy == ("127.0.0.0/8", "::1")
    monkeypatch.setenv("CHATD_LISTEN", "[::1]:1")
    monkeypatch.setenv("CHATD_TRUSTED_PROXY", "10.0.0.0/8")
    monkeypatch.setenv("CHATD_UPSTREAM", "chat.example:2")
    settings, upstream = chosen()
    assert (settings.listen, upstream) == ("[::1]:1", "chat.example:2")
    assert settings.trusted_proxy == ("10.0.0.0/8",)
    settings, upstream = chosen("--listen", "a:3", "--upstream", "b:4")
    assert (settings.listen, upstream) == ("a:3", "b:4")
    with pytest.raises(SystemExit):
        chatd.main(["proxy", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for part in ("(default 127.0.0.1:3000)", "(default none)", "--jwt-key FILE"):
        assert part in said
    assert "--sends" not in said


@pytest.mark.usefixtures("bare_environment")
def test_help_says_every_flag_its_unit_its_default_and_what_happens_over_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        chatd.main(["serve", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for field in chatd.flags():
        meta = field.metadata
        assert f"{words_flag(field.name)} {meta['unit']} {meta['why']}" in said
        assert f"over it: {meta['over']}" in said
        assert f"(default {chatd.shown(field.default)})" in said or not field.default


def test_the_table_of_settings_has_a_row_for_every_flag() -> None:
    head, line, *rows = chatd.settings_table().split("\n")
    assert (head.count("|"), line) == (5, "|---|---|---|---|")
    assert [row.split()[1].strip("`") for row in rows] == [*map(words_flag, FLAGS)]
    assert all(row.count("|") == 5 for row in rows)
    assert "| `--sends RATE/BURST` | `5/20` | messages a second" in rows[10]


# The defaults, as they are typed.
DEFAULTS = {
    "listen": "127.0.0.1:8086", "db": "chatd.db", "chats_by": "user",
    "sends": "5/20", "commands": "30/60", "typing": "1/5", "handshakes": "10/50",
    "requests": "20/100", "receive_bytes": "65536/524288", "max_connections": "10000",
    "connections_per_user": "20", "max_message_bytes": "65536",
    "max_content_chars": "4000", "drain_seconds": "5.0", "check_bytes": "33554432",
    "outbox_bytes": "262144",
    "head_seconds": "10.0", "request_seconds": "15.0", "idle_seconds": "75.0",
    "ping_seconds": "25.0", "pong_seconds": "10.0", "stall_seconds": "10.0",
    "token_warning_seconds": "60.0", "token_grace_seconds": "25.0",
    "ticket_seconds": "60", "link_seconds": "86400", "session_seconds": "2592000",
    "probe_seconds": "2.0", "unanswered": "64", "fragments": "64", "header_lines": "64",
    "refused_in_a_row": "100", "resync_events": "5000", "page_events": "500",
    "page_bytes": "131072", "tail_events": "16384", "readers": "4", "large_chat": "50",
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_is_the_one_that_the_design_names(name: str) -> None:
    assert str(getattr(Settings(), name)) == DEFAULTS[name]


def test_every_setting_has_a_unit_and_a_reason() -> None:
    for field in dataclasses.fields(Settings):
        assert field.metadata["unit"], field.name
        assert field.metadata["why"], field.name


# --- commands and bodies -------------------------------------------------------------

IDS: list[Any] = [None, "3", 3.5, 1e300, True, 0, -1, 2**53, 10**30, [], {}, [3]]
TEXTS: list[Any] = [None, 5, True, [], {}, ["x"]]
REFS = [5, True, "x" * 65, [], {}]
CLIENT_IDS: list[Any] = [5, True, "", "x" * 65, "é", "a\nb", "\x7f", "a\n", [], {}]
NAMES_OF_COMMANDS = ("ping", "typing", "mark_read", "send_message", "auth")

# What is right, whole, and for each field what is wrong.
BODIES: dict[type, dict[str, tuple[object, list[Any]]]] = {
    chatd.Ping: {"ref": ("r", REFS)},
    chatd.Typing: {
        "ref": ("r" * 64, REFS),
        "chat_id": (3, IDS),
        "is_typing": (True, [None, 0, 1, "true", [], {}]),
    },
    chatd.MarkRead: {"ref": ("", REFS), "message_id": (2**53 - 1, IDS)},
    chatd.SendMessage: {
        "ref": (None, REFS),
        "chat_id": (1, IDS),
        "content": ("Привет!", TEXTS),
        "client_id": ("x" * 64, CLIENT_IDS),
    },
    chatd.Auth: {"ref": ("r", REFS), "token": ("t", TEXTS)},
    chatd.NewChat: {
        "member_ids": ([1, 2], [None, 5, "12", {}, *[[wrong] for wrong in IDS]]),
        "title": ("A chat", [5, True, "", "x" * 201, [], {}]),
    },
    chatd.UserBody: {"user_id": (6, IDS)},
    chatd.PostMessage: {
        "content": ("hi", TEXTS),
        "client_id": (" ~", CLIENT_IDS),
        "sender_id": (5, IDS[1:]),
    },
}
DECODERS: dict[type, msgspec.json.Decoder[Any]] = {
    chatd.NewChat: chatd.NEW_CHAT,
    chatd.UserBody: chatd.USER_BODY,
    chatd.PostMessage: chatd.POST_MESSAGE,
}


def words_parse(struct: type, fields: dict[str, object]) -> Any:
    """Parse an object as this Struct; a command is told from others by its type."""
    tag = struct.__struct_config__.tag  # type: ignore[attr-defined]
    body = {"type": tag, **fields} if tag else fields
    return chatd.parse(json.dumps(body), DECODERS.get(struct, chatd.COMMANDS))


def test_the_table_above_has_every_command_and_every_field() -> None:
    tags = [struct.__struct_config__.tag for struct in get_args(chatd.COMMANDS.type)]
    assert tuple(tags) == NAMES_OF_COMMANDS
    assert {*BODIES} == {*get_args(chatd.COMMANDS.type), *DECODERS}
    for body, fields in BODIES.items():
        assert {*fields} == {field.name for field in msgspec.structs.fields(body)}


@pytest.mark.parametrize("struct", BODIES)
def test_what_is_right_is_taken_and_unknown_fields_are_ignored(struct: type) -> None:
    right = {name: value for name, (value, _) in BODIES[struct].items()}
    parsed = words_parse(struct, {**right, "colour": {"deep": [1]}})
    assert type(parsed) is struct
    assert {name: getattr(parsed, name) for name in right} == right


@pytest.mark.parametrize(
    ("struct", "field", "wrong"),
    [
        (struct, field, wrong)
        for struct, fields in BODIES.items()
        for field, (_, all_wrong) in fields.items()
        for wrong in all_wrong
    ],
)
def test_a_wrong_field_is_refused_by_its_name(
    struct: type, field: str, wrong: object
) -> None:
    right = {name: value for name, (value, _) in BODIES[struct].items()}
    refusal = refusal_of(words_parse, struct, {**right, field: wrong})
    assert (refusal.code, refusal.status) == ("bad_field", 400)
    assert re.match(rf"{field}(\[0\])?: \S", refusal.message)


@pytest.mark.parametrize(
    ("struct", "field"),
    [
        (struct, field.name)
        for struct in BODIES
        for field in msgspec.structs.fields(struct)
        if field.required
    ],
)
def test_a_missing_field_is_refused_by_its_name(struct: type, field: str) -> None:
    right = {name: value for name, (value, _) in BODIES[struct].items()}
    del right[field]
    refusal = refusal_of(words_parse, struct, right)
    assert refusal.code == "bad_field"
    assert f"`{field}`" in refusal.message


@pytest.mark.parametrize(
    ("text", "code"),
    [
        *[(text, "bad_json") for text in ("", " ", "{", "[1", "nul", "{'a':1}")],
        ('{"type":"ping"}x', "bad_json"),
        *[(text, "bad_json") for text in ("[]", "5", "null", '"ping"', "true")],
        *[(text, "bad_json") for text in ('{"a":NaN}', '"\\ud800"')],
        (b'{"type":"\xff"}', "bad_json"),
        ('{"type":"typing","chat_id":1,"is_typing":true,"x":"\\udc00"}', "bad_json"),
        ('{"type":"ping","x":' + "[" * 100_000 + "]" * 100_000, "bad_json"),
        ("[" * 100_000, "bad_json"),
        ('{"type":"fly"}', "unknown_type"),
        ('{"type":"new_message"}', "unknown_type"),
        ('{"type":""}', "unknown_type"),
        ('{"type":5}', "bad_field"),
        ('{"type":null}', "bad_field"),
        ("{}", "bad_field"),
    ],
)
def test_what_is_no_command_is_told_what_it_is(text: str | bytes, code: str) -> None:
    refusal = refusal_of(chatd.parse, text, chatd.COMMANDS)
    assert refusal.code == code
    assert code == "bad_json" or "type" in refusal.message


@given(st.binary(max_size=60) | st.text(max_size=60))
def test_any_bytes_are_a_command_or_a_refusal(text: str | bytes) -> None:
    assert refusal_of(chatd.parse, text, chatd.COMMANDS).status == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {"type": st.sampled_from(NAMES_OF_COMMANDS) | json_values},
        optional=dict.fromkeys(
            ("ref", "chat_id", "content", "client_id", "message_id", "token"),
            json_values,
        ),
    )
)
def test_any_object_is_a_command_or_a_refusal_that_names_a_field(
    body: dict[str, object],
) -> None:
    said = ""
    try:
        command = chatd.parse(json.dumps(body), chatd.COMMANDS)
    except Refusal as refusal:
        said = str(refusal)
    else:
        assert isinstance(command, chatd.Command)
    assert re.match(r"(bad_json|bad_field|unknown_type): .*[:`]|$", said)


@pytest.mark.parametrize(
    "content", ["x", "Привет!", "a\tb\nc\r\n", "x" * 10, "🎉" * 10, "\u202eabc", " x "]
)
def test_a_message_may_say_anything_printable(content: str) -> None:
    chatd.check_content(content, Settings(max_content_chars=10))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "it is empty"),
        (" \t\n\u3000", "it is empty"),
        ("x" * 11, "11 characters; at most 10"),
        ("🎉" * 11, "11 characters; at most 10"),
        *[(f"a{chr(c)}b", f"U+{c:04X}") for c in (0, 1, 8, 11, 12, 14, 27, 31, 127)],
    ],
)
def test_a_message_that_nobody_could_read_is_refused(content: str, why: str) -> None:
    refusal = refusal_of(chatd.check_content, content, Settings(max_content_chars=10))
    assert refusal.code == "bad_field"
    assert refusal.message.startswith("content: ")
    assert why in refusal.message


@pytest.mark.parametrize(
    ("unix_seconds", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1763730000, "2025-11-21T13:00:00Z"),
        (951782400, "2000-02-29T00:00:00Z"),
        (2**32, "2106-02-07T06:28:16Z"),
    ],
)
def test_a_timestamp_is_utc_in_whole_seconds(unix_seconds: int, text: str) -> None:
    assert chatd.timestamp(unix_seconds) == text
    assert type(chatd.now_seconds()) is int


# --- frames --------------------------------------------------------------------------


def words_hear(data: bytes) -> list[tuple[Opcode, Any]]:
    """What a client of wsproto hears: (opcode, payload) of each frame, all whole."""
    client = FrameProtocol(client=True, extensions=[])
    client.receive_bytes(data)
    frames = [*client.received_frames()]
    assert all(frame.frame_finished and frame.message_finished for frame in frames)
    return [(frame.opcode, frame.payload) for frame in frames]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 100_000])
def test_a_frame_is_what_wsproto_would_send_and_hear(size: int) -> None:
    message = chatd.Pong(timestamp="x" * size)
    frame = chatd.text_frame(message)
    text = msgspec.json.encode(message).decode()
    assert frame == FrameProtocol(client=False, extensions=[]).send_data(text)
    assert words_hear(frame + frame)[1] == (Opcode.TEXT, text)


def test_a_close_frame_has_its_code_and_its_reason() -> None:
    ((opcode, payload),) = words_hear(chatd.close_frame(4401, "the token has ended"))
    assert (opcode, *payload) == (Opcode.CLOSE, 4401, "the token has ended")
    assert words_hear(chatd.close_frame(1000, "")) == [
        (Opcode.CLOSE, (WsCloseReason.NORMAL_CLOSURE, ""))
    ]
    assert words_hear(chatd.PING_FRAME) == [(Opcode.PING, b"")]


def test_an_error_frame_leaves_out_what_does_not_apply() -> None:
    refusal = Refusal("rate_limited", retry_after=1.23456)
    ((_, text),) = words_hear(chatd.error_frame(refusal, "r1"))
    assert json.loads(text) == {
        "type": "error", "code": "rate_limited", "ref": "r1", "retry_after": 1.235,
        "message": "too many at once: slow down",
    }  # fmt: skip
    ((_, text),) = words_hear(chatd.error_frame(Refusal("not_found", "chat_id: none")))
    assert json.loads(text) == {
        "type": "error", "code": "not_found", "message": "chat_id: none",
    }  # fmt: skip


WORDS_MESSAGE = chatd.Message(789, 3, 5, "Привет!", "2025-11-21T13:00:00Z", 13)


# What the server says, word for word.
@pytest.mark.parametrize(
    ("message", "text"),
    [
        (
            chatd.NewMessage(5120, 3, WORDS_MESSAGE),
            '{"type":"new_message","seq":5120,"chat_id":3,"message":{"id":789,"chat_id":3,'
            '"sender_id":5,"content":"Привет!","created_at":"2025-11-21T13:00:00Z","n":13}}',
        ),
        (
            chatd.MessageRead(7, 456, 3, 6, 12),
            '{"type":"message_read","seq":7,"message_id":456,"chat_id":3,"read_by":6,"n":12}',
        ),
        (
            chatd.TypingSign(3, 5, is_typing=True),
            '{"type":"typing","chat_id":3,"user_id":5,"is_typing":true}',
        ),
        (
            chatd.ChatAdded(5122, 9, msgspec.Raw(b"{}")),
            '{"type":"chat_added","seq":5122,"chat_id":9,"chat":{}}',
        ),
        (
            chatd.MemberAdded(5121, 9, 8, "Bob"),
            '{"type":"member_added","seq":5121,"chat_id":9,"user_id":8,"name":"Bob"}',
        ),
        (
            chatd.MemberAdded(5121, 9, 8, None),
            '{"type":"member_added","seq":5121,"chat_id":9,"user_id":8,"name":null}',
        ),
        (
            chatd.MemberRemoved(5130, 9, 8),
            '{"type":"member_removed","seq":5130,"chat_id":9,"user_id":8}',
        ),
        (
            chatd.Connected(6, "T", "k.1", "fresh", 3600, {"3": chatd.Marks(12, 10)}),
            '{"type":"connected","user_id":6,"timestamp":"T","cursor":"k.1","resume":"fresh",'
            '"expires_in":3600,"chats":{"3":{"last_n":12,"read_n":10}}}',
        ),
        (chatd.Pong("T"), '{"type":"pong","timestamp":"T"}'),
        (chatd.Ack(), '{"type":"ack"}'),
        (
            chatd.Ack(ref="r", duplicate=False),
            '{"type":"ack","ref":"r","duplicate":false}',
        ),
        (chatd.TokenExpiring(60), '{"type":"token_expiring","expires_in":60}'),
        (chatd.Bye(2.7), '{"type":"bye","retry_after":2.7}'),
    ],
)
def test_a_message_reads_as_the_specification_has_it(
    message: chatd.Say, text: str
) -> None:
    assert words_hear(chatd.text_frame(message)) == [(Opcode.TEXT, text)]


def test_an_event_builds_its_frame_once_but_keeps_no_large_one() -> None:
    message = chatd.Event(chatd.NewMessage(1, 3, WORDS_MESSAGE), to_chat=True)
    added = chatd.Event(chatd.ChatAdded(2, 3, msgspec.Raw(b"{}")), to_chat=False)
    assert message.frame is message.frame
    assert added.frame == added.frame
    assert added.frame is not added.frame
    assert (message.kind, added.kind) == ("new_message", "chat_added")


# --- refusals, log, stats ------------------------------------------------------------

# The codes and their statuses. The proxy's `upstream` may be 504 too.
STATUSES = {
    "bad_json": 400, "bad_field": 400, "unknown_type": 400, "token_invalid": 401,
    "token_expired": 401, "token_used": 401, "forbidden": 403, "not_found": 404,
    "method_not_allowed": 405, "timeout": 408, "idempotency_mismatch": 409,
    "too_large": 413, "upgrade_required": 426, "rate_limited": 429, "overloaded": 503,
    "storage_failed": 503, "internal": 500, "upstream": 502,
}  # fmt: skip


def words_raised() -> set[str]:
    """Every code that chatd.py hands to Refusal."""
    tree = ast.parse(Path(chatd.__file__).read_text("utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    made = [call for call in calls if ast.unparse(call.func) == "Refusal"]
    codes = {code.value for call in made for code in call.args[:1]
             if isinstance(code, ast.Constant)}  # fmt: skip
    assert all(isinstance(call.args[0], ast.Constant) for call in made)
    return {str(code) for code in codes}


def test_the_table_of_refusals_is_the_design_s_and_every_code_is_in_use() -> None:
    table = {code: status for code, (status, _) in chatd.REFUSALS.items()}
    assert {code: table.get(code) for code in STATUSES} == STATUSES
    assert words_raised() <= {*table}
    assert {*STATUSES} <= words_raised()


def test_a_refusal_says_what_its_table_says_unless_told_better() -> None:
    usual, better = Refusal("too_large"), Refusal("too_large", "too long", status=431)
    assert (usual.status, usual.message) == (413, "the request is too large")
    assert (better.status, better.message, better.headers) == (431, "too long", [])
    assert str(better) == "too_large: too long"
    assert UsageError("x").status == 1


FORGED = "Bob\n<0>left user=1\r\x1b[2J\u202e\u2028\x00\x85 why=fine"


def test_a_log_line_cannot_be_forged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "chatd")
    chatd.say(logging.INFO, "joined", user=6, name=FORGED, live=True, size=1.5)
    chatd.say(logging.DEBUG, "unheard", name=FORGED)
    (line,) = caplog.messages
    assert line == f"joined user=6 name={FORGED!a} live=True size='1.5'"
    assert line.isascii()
    assert line.isprintable()


@pytest.mark.usefixtures("bare_environment")
def test_a_mistake_that_ends_the_process_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Path) -> None:
        raise ValueError("s3cret\n<0>forged")

    monkeypatch.setattr(chatd, "print_check", broken)
    assert chatd.main(["check"]) == 1
    said = capsys.readouterr().err
    where = r"test_chatd\.py:\d+ broken < chatd\.py:\d+ main"
    assert re.fullmatch(rf"ERROR crashed error='ValueError' at='{where}'\n", said), said


def words_said() -> set[tuple[str, str, tuple[str, ...]]]:
    """Every line of log that chatd.py can write: its level, verb and fields."""
    tree = ast.parse(Path(chatd.__file__).read_text("utf-8"))
    said = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        match ast.unparse(node.func), node.args:
            case "say", [level, ast.Constant(value=verb), *_]:
                fields = tuple(word.arg or "..." for word in node.keywords)
                name = ast.unparse(level).removeprefix("logging.").lower()
                said.add((name, str(verb), fields))
            case "say_mistake", [ast.Constant(value=verb), *_]:
                said.add(("error", str(verb), ("error", "at")))
            case (
                ("self.complain" | "self.proxy.complain"),
                [ast.Constant(value=verb), *_],
            ):
                said.add(("warning", str(verb), ("why", "open")))
    return said


def test_the_readme_has_a_row_for_every_line_of_log() -> None:
    section = README.split("\n## Logs\n")[1].split("\n## ")[0]
    rows = re.findall(r"(?m)^\| `(\w+)` \| (\w+) \| (.*?) \| .+ \|$", section)
    table = {
        (level, verb, tuple(re.findall(r"`(.*?)`", fields)))
        for verb, level, fields in rows
    }
    assert table == words_said()
    assert [row[0] for row in rows] == sorted({row[0] for row in rows})


@pytest.mark.parametrize(
    ("level", "prefix"), [("DEBUG", 7), ("INFO", 6), ("WARNING", 4), ("ERROR", 3)]
)
def test_a_level_has_its_priority_and_a_terminal_its_word(
    level: str, prefix: int
) -> None:
    number = logging.getLevelNamesMapping()[level]
    record = logging.LogRecord("chatd", number, "", 0, "left user=6", None, None)
    assert chatd.Formatter(journal=True).format(record) == f"<{prefix}>left user=6"
    assert chatd.Formatter(journal=False).format(record) == f"{level} left user=6"


def test_commits_are_ranked_over_the_last_1024_and_the_longest_is_never_forgotten() -> (
    None
):
    stats = Stats()
    assert stats.commit_seconds() == {"p50": 0.0, "p99": 0.0, "max": 0.0}
    for i in range(2000):
        stats.committed(9.0 if i == 0 else i / 1000, jobs=i % 7 + 1)
    assert (stats.commits, stats.batch_max, len(stats.commit_times)) == (2000, 7, 1024)
    assert stats.commit_seconds() == {"p50": 1.488, "p99": 1.989, "max": 9.0}


# =====================================================================================
# RULES
#
# Who may do how much, and who is who. Time is an argument of buckets; for tokens it is
# in their claims, so nothing here waits for a clock.
# =====================================================================================


def test_a_bucket_gives_its_burst_at_once_and_then_its_rate() -> None:
    bucket = chatd.Bucket(Rate(5, 20))
    assert [bucket.take(100.0) for _ in range(20)] == [0.0] * 20
    assert bucket.take(100.0) == pytest.approx(0.2)
    assert bucket.take(100.1) == pytest.approx(0.1)
    assert [bucket.take(100.2), bucket.take(100.2)] == pytest.approx([0.0, 0.2])


def test_a_bucket_that_rested_is_full_and_not_fuller() -> None:
    bucket = chatd.Bucket(Rate(1, 3))
    assert [bucket.take(0.0) for _ in range(4)] == pytest.approx([0, 0, 0, 1])
    assert [bucket.take(1e6) for _ in range(4)] == pytest.approx([0, 0, 0, 1])


def test_a_rate_of_0_is_no_limit() -> None:
    bucket, buckets = chatd.Bucket(Rate(0, 0)), chatd.Buckets(Rate(0, 0), 1)
    assert not any(bucket.take(0.0) for _ in range(1000))
    assert not any(buckets.take(key, 0.0) for key in range(1000))
    buckets.give_back(0)
    assert not buckets.full_at


@given(
    st.integers(1, 50),
    st.integers(1, 20),
    st.lists(st.floats(0, 2), min_size=1, max_size=60),
)
def test_in_any_time_a_bucket_gives_at_most_its_burst_and_its_rate(
    rate: int, burst: int, pauses: list[float]
) -> None:
    bucket, given_at = chatd.Bucket(Rate(rate, burst)), list[float]()
    for now in itertools.accumulate(pauses):
        wait = bucket.take(now)
        if not wait:
            given_at.append(now)
        else:  # and what it tells to wait is enough
            assert not rules_copy(bucket).take(now + wait + 1e-6)
    for first, last in itertools.combinations(range(len(given_at)), 2):
        seconds = given_at[last] - given_at[first]
        assert last - first + 1 <= burst + seconds * rate + 1e-6


def rules_copy(bucket: chatd.Bucket) -> chatd.Bucket:
    """A bucket in the same state."""
    copy = chatd.Bucket(bucket.rate)
    copy.full_at = bucket.full_at
    return copy


def test_each_key_has_a_bucket_of_its_own() -> None:
    buckets = chatd.Buckets(Rate(1, 1), 10)
    assert [buckets.take(key, 5.0) for key in "aab"] == pytest.approx([0, 1, 0])


def test_a_token_given_back_can_be_taken_again_and_no_second_one() -> None:
    buckets = chatd.Buckets(Rate(1, 2), 10)
    assert [buckets.take("a", 5.0) for _ in range(3)] == pytest.approx([0, 0, 1])
    buckets.give_back("a")
    buckets.give_back("unknown")
    assert [buckets.take("a", 5.0) for _ in range(2)] == pytest.approx([0, 1])
    assert [*buckets.full_at] == ["a"]


def test_a_table_of_buckets_is_bounded_and_forgets_the_oldest() -> None:
    buckets = chatd.Buckets(Rate(1, 1), 3)
    for key in ("a", "b", "c", "a", "d"):
        buckets.take(key, 0.0)
    assert [*buckets.full_at] == ["c", "a", "d"]
    assert buckets.take("a", 0.0) == pytest.approx(1)
    assert buckets.take("b", 0.0) == 0  # forgotten, so it is full


def test_a_pace_tells_how_long_to_wait_and_never_says_no() -> None:
    pace = chatd.Pace(Rate(100, 500), now=10.0)
    pace.spend(500)
    assert pace.debt_seconds(10.0) == 0
    pace.spend(250)
    assert pace.debt_seconds(10.0) == pytest.approx(2.5)
    assert pace.debt_seconds(12.0) == pytest.approx(0.5)
    assert pace.debt_seconds(1000.0) == 0
    pace.spend(501)
    assert pace.debt_seconds(1000.0) == pytest.approx(0.01)


def test_a_pace_of_0_never_waits() -> None:
    pace = chatd.Pace(Rate(0, 0), now=0.0)
    pace.spend(1e12)
    assert pace.debt_seconds(0.0) == 0


# --- addresses and origins -----------------------------------------------------------

RULES_PROXIES = ("127.0.0.0/8", "::1", "10.0.0.0/8", "2001:db8::/32")


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        # Who is no proxy is believed nothing.
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        # From the right: the first that is not ours. Further left is hearsay.
        ("127.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", ["6.6.6.6, 198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", ["6.6.6.6", "198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", ["198.51.100.1, 10.1.2.3,127.0.0.1"], "198.51.100.1"),
        ("127.0.0.1", ["10.0.0.1, 10.0.0.2"], "10.0.0.1"),
        ("10.9.9.9", ["2001:db8::1, 2600::5, 2001:db8::2"], "2600::5"),
        # An entry that is no address means the peer; left of the client it is unread.
        ("127.0.0.1", ["unknown"], "127.0.0.1"),
        ("127.0.0.1", ["198.51.100.1, x"], "127.0.0.1"),
        ("127.0.0.1", ["198.51.100.1,"], "127.0.0.1"),
        ("127.0.0.1", ["198.51.100.1:4711"], "127.0.0.1"),
        ("127.0.0.1", ["x, 198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", [""], "127.0.0.1"),
        ("127.0.0.1", [], "127.0.0.1"),
        # IPv4 in IPv6 clothes, as peer and as entry.
        ("::ffff:127.0.0.1", ["::ffff:198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", ["198.51.100.1, ::ffff:10.0.0.1"], "198.51.100.1"),
    ],
)
def test_the_client_is_the_first_from_the_right_who_is_no_proxy(
    peer: str, forwarded: list[str], client: str
) -> None:
    proxies = chatd.Proxies(RULES_PROXIES)
    found = proxies.client(chatd.parse_address(peer), forwarded)
    assert str(found) == client


def test_without_proxies_and_without_an_address_the_peer_is_the_client() -> None:
    local = chatd.parse_address("127.0.0.1")
    assert chatd.Proxies(["none"]).client(local, ["1.2.3.4"]) == local
    assert chatd.Proxies(RULES_PROXIES).client(None, ["1.2.3.4"]) is None


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("198.51.100.1", "198.51.100.1"),
        ("::ffff:198.51.100.1", "198.51.100.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("nobody", "None"),
    ],
)
def test_an_ipv6_host_has_one_bucket_for_its_whole_64(address: str, key: str) -> None:
    assert chatd.address_key(chatd.parse_address(address)) == key


@pytest.mark.parametrize(
    ("origin", "host", "same"),
    [
        ("http://chat.example", "chat.example", True),
        ("http://chat.example", "chat.example:80", True),
        ("http://chat.example:80", "chat.example", True),
        ("https://chat.example", "chat.example:443", True),
        ("https://Chat.Example", "CHAT.example", True),
        ("http://[::1]:8086", "[::1]:8086", True),
        ("http://localhost:8086", "localhost:8086", True),
        ("http://localhost:3000", "localhost:8086", False),
        ("https://chat.example", "chat.example:80", False),
        ("http://chat.example", "chat.example:443", False),
        ("http://chat.example.evil", "chat.example", False),
        ("http://evil", "chat.example", False),
        ("http://chat.example@evil", "chat.example", False),
        ("null", "null", False),
        ("", "", False),
        ("file://", "", False),
        ("ws://chat.example", "chat.example", False),
        ("chat.example", "chat.example", False),
    ],
)
def test_a_page_is_ours_if_its_origin_names_the_host_that_was_asked(
    origin: str, host: str, same: bool
) -> None:
    assert chatd.same_origin(origin, ["other.example", host]) is same
    assert chatd.same_origin(origin, []) is False


# --- tokens --------------------------------------------------------------------------

RULES_SECRET = b"s" * 32
RULES_SHARED = b"f" * 40  # the secret of a site's backend


def rules_soon(seconds: float = 600) -> float:
    return int(time.time()) + seconds


def rules_forge(header: dict[str, object], body: dict[str, object], key: bytes) -> str:
    """A token as an attacker makes it: his own header, and an HMAC with any key."""
    parts = [json.dumps(part).encode() for part in (header, body)]
    signed = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    mac = hmac.digest(key, signed, hashlib.sha256) if key else b""
    return (signed + b"." + base64.urlsafe_b64encode(mac).rstrip(b"=")).decode()


def rules_ring(*keys: Path, secret: bytes = RULES_SECRET, **more: Any) -> Keyring:
    return Keyring(Settings(jwt_key=keys, **more), secret)


def rules_token(secret: bytes = RULES_SECRET, /, **claims: object) -> str:
    """A token of user 6 for ten minutes; claims change it, ... takes one out."""
    body = {"user_id": 6, "exp": rules_soon()} | claims
    body = {name: value for name, value in body.items() if value is not ...}
    return rules_forge({"alg": "HS256", "typ": "JWT"}, body, secret)


@pytest.fixture
def shared_key(tmp_path: Path) -> Path:
    """A --jwt-key file with the shared secret of a site's backend."""
    (tmp_path / "shared").write_bytes(RULES_SHARED + b"\n")
    return tmp_path / "shared"


@functools.cache
def rules_private(kind: str) -> Any:
    """A private key of a kind; made once, for RSA takes its time."""
    match kind:
        case "RS256":
            return rsa.generate_private_key(65537, 2048)
        case "RSA 3072":
            return rsa.generate_private_key(65537, 3072)
        case "RSA 1024":
            return rsa.generate_private_key(65537, 1024)
        case "ES256":
            return ec.generate_private_key(ec.SECP256R1())
        case "P-384":
            return ec.generate_private_key(ec.SECP384R1())
        case "secp256k1":
            return ec.generate_private_key(ec.SECP256K1())
        case _:
            return ed25519.Ed25519PrivateKey.generate()


def rules_public_pem(kind: str) -> bytes:
    pem: bytes = rules_private(kind).public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )  # fmt: skip
    return pem


@pytest.mark.parametrize(
    ("claims", "user_id"),
    [
        ({"user_id": 6}, 6),
        ({"user_id": 1}, 1),
        ({"user_id": 2**53 - 1}, 2**53 - 1),
        ({"user_id": 6, "sub": "7"}, 6),
        ({"user_id": 6, "sub": ["x"]}, 6),
        ({"user_id": ..., "sub": 7}, 7),
        ({"user_id": ..., "sub": "7"}, 7),
        ({"user_id": ..., "sub": str(2**53 - 1)}, 2**53 - 1),
    ],
)
def test_the_user_is_user_id_or_else_sub(
    claims: dict[str, object], user_id: int
) -> None:
    assert rules_ring().verify(rules_token(**claims)).user_id == user_id


@pytest.mark.parametrize(
    "claims",
    [
        {"user_id": ...},
        *[{"user_id": wrong} for wrong in ("6", True, 6.0, 0, -1, 2**53, 10**30, [6])],
        *[
            {"user_id": ..., "sub": wrong}
            for wrong in (
                "",
                "x",
                "6a",
                " 6",
                "6\n",
                "-6",
                "+6",
                "6.0",
                "٦",
                "0",
                "9" * 30,
            )
        ],
        *[{"user_id": ..., "sub": wrong} for wrong in (True, 6.0, 0, 2**53, [6], None)],
        {"user_id": ..., "sub": str(2**53)},
        {"user_id": "x", "sub": "6"},
    ],
)
def test_who_is_no_number_is_nobody(claims: dict[str, object]) -> None:
    refusal = refusal_of(rules_ring().verify, rules_token(**claims))
    assert (refusal.code, refusal.status) == ("token_invalid", 401)
    assert "user_id" in refusal.message


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        ({"exp": ...}, "token_invalid"),
        ({"exp": -6}, "token_expired"),
        ({"exp": "soon"}, "token_invalid"),
        ({"exp": "9999999999"}, "token_invalid"),
        ({"exp": None}, "token_invalid"),
        ({"exp": True}, "token_expired"),
        ({"exp": [9]}, "token_invalid"),
        ({"exp": 1e12}, "token_invalid"),
        ({"exp": 10**400}, "token_invalid"),
        ({"exp": math.nan}, "token_invalid"),
        ({"exp": math.inf}, "token_invalid"),
        ({"iat": "x"}, "token_invalid"),
        ({"iat": "5"}, "token_invalid"),
        ({"iat": -1}, "token_invalid"),
        ({"iat": 4e9}, "token_invalid"),
        ({"nbf": 4e9}, "token_invalid"),
        ({"use": "fly"}, "token_invalid"),
        ({"use": 5}, "token_invalid"),
        ({"use": ["ticket"]}, "token_invalid"),
    ],
)
def test_a_time_or_a_use_that_is_none_is_refused(
    claims: dict[str, object], code: str
) -> None:
    assert refusal_of(rules_ring().verify, rules_token(**claims)).code == code


def test_the_leeway_of_5_seconds_is_for_clocks_that_differ() -> None:
    ring = rules_ring()
    assert ring.verify(rules_token(exp=rules_soon(-3))).expires_in() == 0
    assert ring.verify(rules_token(iat=rules_soon(3), nbf=rules_soon(3))).user_id == 6
    for claims in ({"exp": rules_soon(-5)}, {"exp": rules_soon(-5) + 0.0}):
        assert refusal_of(ring.verify, rules_token(**claims)).code == "token_expired"
    refusal = refusal_of(ring.verify, rules_token(iat=rules_soon(60)))
    assert (refusal.code, "clocks" in refusal.message) == ("token_invalid", True)


def test_what_a_token_says_is_read_from_it() -> None:
    exp = rules_soon()
    claims = rules_ring().verify(
        rules_token(
            exp=exp, iat=5, name=" Bob\n", scope="stats service x", use="session"
        )
    )
    assert (claims.exp, claims.iat, claims.name, claims.ends) == (exp, 5, "Bob", exp)
    assert claims.scopes == {"stats", "service", "x"}
    assert claims.service
    assert 595 <= claims.expires_in() <= 600
    assert not rules_ring().verify(rules_token(scope=["service"])).service


def test_a_token_verified_before_ends_when_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ring, token = rules_ring(), rules_token(user_id=6, exp=rules_soon())
    assert ring.verify(token) is ring.verify(token)  # its signature is looked at once
    late = rules_soon() + 60
    monkeypatch.setattr(time, "time", lambda: late)
    with pytest.raises(Refusal, match="token_expired"):
        ring.verify(token)


def test_a_token_verified_before_can_be_revoked() -> None:
    ring, token = rules_ring(), rules_token(user_id=6, iat=time.time() - 60)
    ring.verify(token)
    ring.revoked[6] = int(time.time())
    with pytest.raises(Refusal, match="revoked"):
        ring.verify(token)


def test_tokens_verified_before_are_forgotten_when_they_are_too_many() -> None:
    ring = rules_ring(known_tokens=2)
    tokens = [rules_token(user_id=user) for user in (1, 2, 3)]
    claims = [ring.verify(token) for token in tokens]
    assert ring.verify(tokens[2]) is claims[2]
    assert ring.verify(tokens[0]) is not claims[0]
    assert ring.verify(tokens[0]) == claims[0]


def rules_bad_tokens() -> dict[str, str]:
    body: dict[str, object] = {"user_id": 6, "exp": rules_soon()}
    good = rules_token()
    head, middle, mac = good.split(".")
    other = rules_token(user_id=7).split(".")[1]
    hs256: dict[str, object] = {"alg": "HS256", "typ": "JWT"}
    deep = base64.urlsafe_b64encode(b"[" * 2500).decode().rstrip("=")
    return {
        "nothing": "",
        "one word": "token",
        "three words": "a.b.c",
        "no signature": f"{head}.{middle}.",
        "another signature": f"{head}.{middle}.{mac[::-1]}",
        "other claims under a signature": f"{head}.{other}.{mac}",
        "alg none": rules_forge({"alg": "none"}, body, b""),
        "alg NONE, signed": rules_forge({"alg": "NONE"}, body, RULES_SECRET),
        "no alg": rules_forge({"typ": "JWT"}, body, RULES_SECRET),
        "alg of another family": rules_forge({"alg": "RS256"}, body, RULES_SECRET),
        "alg HS512": jwt.encode(body, RULES_SECRET * 2, "HS512"),
        "another key": rules_token(b"x" * 32),
        "an empty key": rules_forge(hs256, body, b"\0"),
        "a kid that is no text": rules_forge({**hs256, "kid": 5}, body, RULES_SECRET),
        "an unknown crit": rules_forge({**hs256, "crit": ["x"]}, body, RULES_SECRET),
        "a body apart": rules_forge(
            {**hs256, "b64": False, "crit": ["b64"]}, body, RULES_SECRET
        ),
        "a list for a body": rules_forge(hs256, cast(Any, [body]), RULES_SECRET),
        "a deep body": f"{head}.{deep}.{mac}",
        "no ASCII": "é" * 40 + ".ü.ñ",
        "a lone surrogate": "\ud800.a.b",
        "five parts": f"{good}.a.b",
        "a line end": good.replace(".", ".\n", 1),
        "too long": rules_token(name="x" * 4000),
    }


@pytest.mark.parametrize("what", rules_bad_tokens())
def test_a_bad_token_is_refused_and_nothing_of_it_is_told(what: str) -> None:
    token = rules_bad_tokens()[what]
    refusal = refusal_of(rules_ring().verify, token)
    assert (refusal.code, refusal.status) == ("token_invalid", 401)
    assert not any(
        part in refusal.message for part in token.split(".") if len(part) > 8
    )


@given(st.text(max_size=200) | st.from_regex(r"[\w-]+\.[\w-]+\.[\w-]+", fullmatch=True))
def test_any_text_is_a_token_or_a_refusal(token: str) -> None:
    assert refusal_of(rules_ring().verify, token, "socket").code == "token_invalid"


def test_a_token_of_4_kib_is_read_and_a_byte_more_is_not() -> None:
    sizes = {len(token): token for token in (
        rules_forge({"alg": "HS256", "kid": "k" * k},
                    {"user_id": 6, "exp": rules_soon(), "pad": "x" * n}, RULES_SECRET)
        for k in range(3) for n in range(2900, 3000))}  # fmt: skip
    assert rules_ring().verify(sizes[4096]).user_id == 6
    assert "4096" in refusal_of(rules_ring().verify, sizes[4097]).message


# --- keys of the site's backend ------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_public_key_serves_its_own_algorithm_and_no_other(
    algorithm: str, tmp_path: Path
) -> None:
    path = tmp_path / "public.pem"
    path.write_bytes(rules_public_pem(algorithm))
    body: dict[str, object] = {"user_id": 6, "exp": rules_soon()}
    ring = rules_ring(path)
    assert chatd.read_jwt_key(path).algorithm == algorithm
    token = jwt.encode(body, rules_private(algorithm), algorithm)
    assert ring.verify(token).user_id == 6
    # CVE-2022-29217: the public key, which everybody has, as a secret.
    for pem in (path.read_bytes(), path.read_bytes().strip()):
        for alg in ("HS256", algorithm, "none"):
            refusal_of(ring.verify, rules_forge({"alg": alg}, body, pem))
    if algorithm == "RS256":
        other = jwt.encode(body, rules_private(algorithm), "PS256")
        assert refusal_of(ring.verify, other).code == "token_invalid"


def test_several_keys_are_a_rotation_and_every_one_is_asked(
    tmp_path: Path, shared_key: Path
) -> None:
    (tmp_path / "new").write_bytes(b"n" * 32)
    (tmp_path / "pem").write_bytes(rules_public_pem("ES256"))
    ring = rules_ring(tmp_path / "pem", shared_key, tmp_path / "new")
    body = {"user_id": 6, "exp": rules_soon()}
    for secret in (RULES_SECRET, RULES_SHARED, b"n" * 32):
        assert ring.verify(rules_token(secret)).user_id == 6
    assert ring.verify(jwt.encode(body, rules_private("ES256"), "ES256")).user_id == 6
    expired = rules_token(b"n" * 32, exp=rules_soon(-60))
    assert refusal_of(ring.verify, expired).code == "token_expired"
    assert refusal_of(ring.verify, rules_token(b"x" * 32)).code == "token_invalid"


def test_scope_and_use_count_only_under_our_own_key(shared_key: Path) -> None:
    ring = rules_ring(shared_key)
    claims = ring.verify(
        rules_token(RULES_SHARED, scope="service stats", use="fly", name="Bob")
    )
    assert (claims.scopes, claims.use, claims.name) == (frozenset(), None, "Bob")
    ticket = rules_token(RULES_SHARED, use="ticket", boot=ring.boot, jti="j")
    assert ring.verify(ticket).use is None  # a plain token like any other
    signin = rules_token(RULES_SHARED, use="signin")
    assert refusal_of(ring.verify, signin, "signin").code == "token_invalid"


def test_a_foreign_token_s_own_words_are_none_of_our_business(shared_key: Path) -> None:
    token = rules_token(RULES_SHARED, until="tomorrow", boot=[], use={}, scope=1)
    assert rules_ring(shared_key).verify(token).user_id == 6


@pytest.mark.parametrize(
    ("claims", "good"),
    [
        ({}, False),
        ({"iss": "shop"}, False),
        ({"aud": "chat"}, False),
        ({"iss": "shop", "aud": "chat"}, True),
        ({"iss": "shop", "aud": ["mail", "chat"]}, True),
        ({"iss": "shop", "aud": "mail"}, False),
        ({"iss": "shop", "aud": ["mail"]}, False),
        ({"iss": "shopping", "aud": "chat"}, False),
        ({"iss": "sho", "aud": "chat"}, False),
        ({"iss": ["shop"], "aud": "chat"}, False),
    ],
)
def test_issuer_and_audience_are_asked_of_foreign_tokens(
    claims: dict[str, object], good: bool, shared_key: Path
) -> None:
    ring = rules_ring(shared_key, issuer="shop", audience="chat")
    token = rules_token(RULES_SHARED, **claims)
    if good:
        assert ring.verify(token).user_id == 6
    else:
        said = refusal_of(ring.verify, token).message
        assert re.search(r"\b(iss|aud)\b", said)
    assert ring.verify(rules_token(iss="us", aud="us")).user_id == 6  # our own


@pytest.mark.parametrize("aud", ["mail", ["mail", "news"], 5])
def test_without_an_audience_of_ours_any_is_accepted(
    aud: object, shared_key: Path
) -> None:
    token = rules_token(RULES_SHARED, aud=aud)
    assert rules_ring(shared_key).verify(token).user_id == 6


# --- tickets, sign-in links, revocation ----------------------------------------------


def test_a_ticket_opens_one_socket_that_lives_as_long_as_the_asking_token() -> None:
    ring = rules_ring()
    asking = ring.verify(rules_token(exp=rules_soon(9000), scope="service"))
    ticket = ring.verify(ring.ticket(asking), "socket")
    assert (ticket.user_id, ticket.use, ticket.ends) == (6, "ticket", asking.exp)
    assert ticket.service
    assert 55 <= ticket.exp - time.time() <= 60
    assert 8990 <= ticket.expires_in() <= 9000


def test_a_ticket_works_once() -> None:
    ring = rules_ring()
    token = ring.ticket(ring.verify(rules_token()))
    first, second = ring.verify(token, "socket"), ring.verify(token + "=", "socket")
    ring.spend(first)
    assert refusal_of(ring.spend, second).code == "token_used"
    assert refusal_of(ring.verify, token, "socket").code == "token_used"


def test_two_tickets_of_one_token_are_two() -> None:
    ring = rules_ring()
    asking = ring.verify(rules_token())
    for _ in range(2):
        ring.spend(ring.verify(ring.ticket(asking), "socket"))
    ring.spend(asking)
    ring.spend(asking)  # a plain token lasts
    assert len(ring.spent) == 2


def test_a_ticket_is_for_the_process_that_gave_it() -> None:
    ring, next_process = rules_ring(), rules_ring()
    ticket = ring.ticket(ring.verify(rules_token()))
    assert refusal_of(next_process.verify, ticket, "socket").code == "token_used"


@pytest.mark.parametrize("use", [None, "signin"])
def test_a_ticket_is_never_a_bearer(use: str | None) -> None:
    ring = rules_ring()
    refusal = refusal_of(ring.verify, ring.ticket(ring.verify(rules_token())), use)
    assert (refusal.code, "ticket" in refusal.message) == ("token_invalid", True)


@pytest.mark.parametrize(
    ("use", "purpose", "good"),
    [
        ("signin", "signin", True),
        ("signin", None, False),
        ("signin", "socket", False),
        (None, "signin", False),
        ("session", "signin", False),
        ("session", None, True),
        ("session", "socket", True),
        (None, "socket", True),
    ],
)
def test_a_sign_in_link_is_good_for_its_purpose_only(
    use: str | None, purpose: str | None, good: bool
) -> None:
    ring = rules_ring()
    token = ring.sign(6, 60, use=use)
    if good:
        assert ring.verify(token, purpose).use == use
    else:
        assert "sign-in link" in refusal_of(ring.verify, token, purpose).message


def test_used_tickets_are_remembered_only_while_they_could_be_used() -> None:
    ring = rules_ring()
    for jti in range(100):
        ring.spend(chatd.Claims(user_id=6, exp=5.0, use="ticket", jti=f"old {jti}"))
    assert len(ring.spent) <= 2
    for jti in range(100):
        ring.spend(chatd.Claims(user_id=6, exp=9e9, use="ticket", jti=f"new {jti}"))
    assert sum(jti.startswith("new") for jti in ring.spent) == 100


@pytest.mark.parametrize(
    ("iat", "good"),
    [(1006, True), (1005.5, True), (1005, False), (0, False), (..., False)],
)
def test_a_revocation_refuses_what_was_signed_up_to_5_seconds_later(
    iat: object, good: bool
) -> None:
    ring = rules_ring()
    ring.revoked[6] = 1000
    assert ring.verify(rules_token(user_id=7)).user_id == 7
    token = rules_token(iat=iat)
    if good:
        assert ring.verify(token).iat == iat
    else:
        assert "revoked" in refusal_of(ring.verify, token).message


@pytest.mark.parametrize("purpose", [None, "socket", "signin"])
def test_a_revocation_reaches_tickets_and_sign_in_links(purpose: str | None) -> None:
    ring = rules_ring()
    token = {
        None: ring.sign(6, 60),
        "socket": ring.ticket(ring.verify(ring.sign(6, 60))),
        "signin": ring.sign(6, 60, use="signin"),
    }[purpose]
    ring.revoked[6] = chatd.now_seconds()
    assert refusal_of(ring.verify, token, purpose).code == "token_invalid"


# --- secrets and key files -----------------------------------------------------------


def test_a_secret_has_32_bytes_without_the_white_space_around(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b" \n" + b"k" * 32 + b"\r\n")
    path.chmod(0o600)
    assert chatd.read_secret(path) == b"k" * 32
    path.write_bytes(b"k" * 31 + b" " * 20)
    said = usage_error_of(lambda: chatd.read_secret(path))
    assert f"secret {path}: 31 bytes; it must have at least 32" in said
    assert "openssl" in said


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610, 0o601])
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"k" * 32)
    path.chmod(mode)
    said = usage_error_of(lambda: chatd.read_secret(path))
    assert f"mode {mode:04o}" in said
    assert f"chmod 600 {path}" in said
    assert chatd.read_jwt_key(path).key == b"k" * 32


@pytest.mark.parametrize("mode", [0o400, 0o440, 0o444, 0o640])
def test_what_the_service_manager_provides_has_whatever_mode_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    provided, elsewhere = tmp_path / "credentials", tmp_path / "etc"
    for folder in (provided, elsewhere):
        folder.mkdir()
    for path in (provided / "chatd.secret", elsewhere / "chatd.secret"):
        path.write_bytes(b"k" * 32)
        path.chmod(mode)
    (elsewhere / "link").symlink_to(provided / "chatd.secret")
    (provided / "link").symlink_to(elsewhere / "chatd.secret")
    (tmp_path / "run").symlink_to(provided)
    for directory in (provided, tmp_path / "run", f"{tmp_path}/etc/../credentials/"):
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(directory))
        for path in (provided / "chatd.secret", elsewhere / "link"):
            assert chatd.read_secret(path) == b"k" * 32
            assert len(chatd.read_keyring(Settings(secret_file=path)).keys) == 1
        assert len(chatd.read_keyring(Settings()).keys) == 1
    # Only what is really in that directory is the service manager's.
    for path in (elsewhere / "chatd.secret", provided / "link"):
        if mode & 0o077:
            said = usage_error_of(chatd.read_secret, path)
            assert said.startswith(
                f"secret {path}: others can read it (mode 0{mode:o})"
            )
        else:
            assert chatd.read_secret(path) == b"k" * 32
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    if mode & 0o077:
        usage_error_of(chatd.read_secret, provided / "chatd.secret")


def test_a_secret_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        said = usage_error_of(lambda p=path: chatd.read_secret(p))
        assert str(path) in said


@pytest.mark.parametrize("kind", ["RSA 1024", "P-384", "secp256k1"])
def test_a_weak_or_strange_key_is_refused_with_what_would_be_right(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "public.pem"
    path.write_bytes(rules_public_pem(kind))
    said = usage_error_of(chatd.read_jwt_key, path)
    assert f"--jwt-key {path}: " in said
    assert "2048 bits" in said


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            b"-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----\n",
            "not a PEM public",
        ),
        (
            b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
            "openssl x509 -pubkey -noout -in ",
        ),
        (b"short", "5 bytes"),
        (b"k" * 65_537, "over 65536 bytes"),
    ],
)
def test_a_key_file_that_is_none_is_refused(
    text: bytes, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    path.write_bytes(text)
    assert why in usage_error_of(chatd.read_jwt_key, path)


# Ways to write the DER of a key into a file that is not PEM.
def base64_lines(width: int) -> Callable[[bytes], bytes]:
    """Base64 in lines of so many characters, as it stands between the lines of PEM."""

    def write(der: bytes) -> bytes:
        text = base64.b64encode(der)
        return b"\n".join(text[i : i + width] for i in range(0, len(text), width))

    return write


KEY_WRITINGS: dict[str, Callable[[bytes], bytes]] = {
    "DER": bytes,
    "base64": base64.b64encode,
    "base64 in lines of 64": base64_lines(64),
    "base64 in lines of 7": base64_lines(7),
    "base64 with CRLF": lambda der: base64_lines(76)(der).replace(b"\n", b"\r\n"),
    "base64 with backslash and n": lambda der: base64_lines(64)(der).replace(
        b"\n", b"\\n"
    ),
    "base64 without padding": lambda der: base64.b64encode(der).rstrip(b"="),
    "base64url": base64.urlsafe_b64encode,
    "base64url without padding": lambda der: base64.urlsafe_b64encode(der).rstrip(b"="),
    "base64 of base64": lambda der: base64.b64encode(base64.b64encode(der)),
    "percent signs": lambda der: quote(base64.b64encode(der), safe="").encode(),
    "hex": lambda der: der.hex().encode(),
    "hex in capitals": lambda der: der.hex().upper().encode(),
    "hex with colons": lambda der: der.hex(":").encode(),
    "hex in lines": lambda der: der.hex("\n", 16).encode(),
    "hex as C writes it": lambda der: ("{0x" + der.hex(",").replace(",", ", 0x") + "}")
    .encode(),
    "base64 of hex": lambda der: base64.b64encode(der.hex().encode()),
    "quotes": lambda der: b'"' + base64.b64encode(der) + b'"',
    "a name before it": lambda der: b"KEY=" + base64.b64encode(der),
    "a line before it": lambda der: b"the key\n" + base64_lines(64)(der),
    "a comment behind it": lambda der: base64.b64encode(der) + b" # of 2026",
    "a byte order mark": lambda der: b"\xef\xbb\xbf" + base64.b64encode(der),
}  # fmt: skip
KEY_PARTS = {
    "SubjectPublicKeyInfo": (
        serialization.Encoding.DER,
        serialization.PublicFormat.SubjectPublicKeyInfo,
    ),
    "PKCS 1": (serialization.Encoding.DER, serialization.PublicFormat.PKCS1),
    "OpenSSH": (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH),
    "a point": (
        serialization.Encoding.X962,
        serialization.PublicFormat.UncompressedPoint,
    ),
}


def rules_jwk(private: Any) -> dict[str, Any]:
    algorithms: dict[type, Any] = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    (found,) = (a for kind, a in algorithms.items() if isinstance(private, kind))
    jwk: dict[str, Any] = found.to_jwk(private.public_key(), as_dict=True)
    return jwk


def rules_public_forms(private: Any) -> dict[str, bytes]:
    """A public key in every form but PEM."""
    public, forms = private.public_key(), {}
    for part, (encoding, form) in KEY_PARTS.items():
        with suppress(ValueError, TypeError):
            forms[part] = public.public_bytes(encoding, form)
    binary = {**forms, "a certificate": rules_certificate(private)}
    forms = {}
    if line := binary.pop("OpenSSH", b""):  # which knows no secp256k1
        binary["an OpenSSH blob"] = base64.b64decode(line.split()[1])
        forms = {"OpenSSH": line, "OpenSSH, of known_hosts": b"host.example " + line}
    for part, der in binary.items():
        for name, write in KEY_WRITINGS.items():
            forms[f"{part}, {name}"] = write(der)
    jwk = json.dumps(rules_jwk(private))
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return forms | {
        "JWK": jwk.encode(),
        "JWK in base64url": base64.urlsafe_b64encode(jwk.encode()).rstrip(b"="),
        "JWK as Python prints it": repr(json.loads(jwk)).encode(),
        "JWKS": json.dumps({"keys": [json.loads(jwk)]}, indent=1).encode(),
        "PEM in JSON": json.dumps({"key": pem.decode()}).encode(),
        "PEM in base64": base64.b64encode(pem),
        "PEM in UTF-16": pem.decode().encode("utf-16"),
        "PEM with backslash and n": pem.replace(b"\n", b"\\n"),
        "PEM without its first line": pem.split(b"\n", 1)[1],
        "PEM without its last line": pem.rsplit(b"-----END", 1)[0],
    }


def rules_certificate(private: Any) -> bytes:
    """A certificate of a key, signed by nobody who matters, in DER."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "chat.example")])
    year = datetime.timedelta(days=365)
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, private.public_key(), 1, now, now + year)
        .sign(rules_private("ES256"), hashes.SHA256())
    )  # fmt: skip
    return certificate.public_bytes(serialization.Encoding.DER)


def rules_any_private(draw: Callable[[Any], Any]) -> Any:
    """A private key: RSA of a few, for it takes its time; else any."""
    curves = [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1(), ec.SECP256K1()]
    match draw(st.sampled_from(["RSA", "EC", "Ed25519"])):
        case "RSA":
            return rules_private(draw(st.sampled_from(["RS256", "RSA 3072"])))
        case "EC":
            number = draw(st.integers(1, 2**250))
            return ec.derive_private_key(number, draw(st.sampled_from(curves)))
        case _:
            seed = draw(st.binary(min_size=32, max_size=32))
            return ed25519.Ed25519PrivateKey.from_private_bytes(seed)


@hypothesis.settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_form_of_a_public_key_is_a_shared_secret(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "key"
    for form, text in rules_public_forms(rules_any_private(data.draw)).items():
        path.write_bytes(text)
        path.chmod(0o600)
        try:
            assert chatd.read_jwt_key(path).algorithm != "HS256", form
        except UsageError as error:
            said = str(error)
            assert said.startswith(f"--jwt-key {path}: "), form
            assert re.search(r"PEM|PUBLIC KEY|is not text", said), (form, said)
            if "UTF-16" not in form:  # chatd's own secret may be any bytes
                with pytest.raises(UsageError):
                    chatd.read_secret(path)


def test_a_random_secret_is_accepted_in_every_usual_form(tmp_path: Path) -> None:
    numbers, path = random.Random(1), tmp_path / "key"
    for size in [24, 32, 33, 48, 64, 65, 128] * 60:
        secret = numbers.randbytes(size)
        for text in (
            base64.b64encode(secret), base64.urlsafe_b64encode(secret).rstrip(b"="),
            base64_lines(64)(secret), secret.hex().encode(), secret.hex(":").encode(),
        ):  # fmt: skip
            path.write_bytes(b"\xef\xbb\xbf" + text + b"\n")
            assert chatd.read_jwt_key(path) == ("HS256", text, path)


@pytest.mark.parametrize(
    "text",
    ["correct horse battery staple, and some more words", "9" * 40, "ключ" * 10,
     "my-public-keyring-of-chat-example", "{b?V<4:)Wq;h&~n0#p}=zL_c8^u-R[T]", "%" * 40,
     "=" * 40, "true true true true true true true true", "two lines of words\n" * 2],
)  # fmt: skip
def test_whatever_else_somebody_thought_of_is_a_secret(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(text, "utf-8")
    assert chatd.read_jwt_key(tmp_path / "key").key == text.strip().encode()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"secret": "0123456789abcdef0123456789abcdef"}', "JSON"),
        (b'["0123456789abcdef0123456789abcdef"]', "JSON"),
        (b'"0123456789abcdef0123456789abcdef"', "JSON"),
        (b"https://id.example/.well-known/jwks.json", "a URL"),
        (b"id.example/realms/chat/.well-known/openid-configuration", "a URL"),
        (b"data:application/json;base64,e30K0123456789abcdef", "a URL"),
        (b"\x00" * 40, "not text"),
        (b"\xff" * 40, "not text"),
        (b"k" * 32 + b"\x07", "not text"),
        ("k".encode("utf-16") * 20, "not text"),
        (b"<RSAKeyValue><Modulus>0123456789abcdef</Modulus></RSAKeyValue>", "XML"),
        (b"RSA Public-Key: (2048 bit)\nModulus:\n    00:c3:1f", "description"),
        (b"Modulus=C31F0123456789ABCDEF0123456789ABCDEF", "description"),
        (b"k4.public.HrnbuRrsBqQ2rsHHxz6WvfvKHJEIXwQx1hV1l0qmYBw", "description"),
    ],
)
def test_what_can_be_no_secret_is_refused_with_what_it_is(
    text: bytes, why: str, tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(text)
    assert why in usage_error_of(chatd.read_jwt_key, tmp_path / "key")


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_pem_file_may_have_other_text_and_other_line_ends(
    algorithm: str, tmp_path: Path
) -> None:
    path, pem = tmp_path / "public.pem", rules_public_pem(algorithm)
    token = jwt.encode(
        {"user_id": 6, "exp": rules_soon()}, rules_private(algorithm), algorithm
    )
    for text in (
        pem.strip(), b"\xef\xbb\xbf" + pem, pem.replace(b"\n", b"\r\n"),
        b"Bag Attributes\n  friendlyName: chat\n" + pem, b"Schl\xfcssel\n" + pem,
        b"\xef\xbb\xbfof the chat\r\n\r\n" + pem.replace(b"\n", b"\r\n") + b"\r\nend",
        b"my PRIVATE KEY is elsewhere, and the CERTIFICATE too\n" + pem,
        b"  " + pem.replace(b"\n", b"\n  "),
    ):  # fmt: skip
        path.write_bytes(text)
        assert chatd.read_jwt_key(path).algorithm == algorithm
        assert rules_ring(path).verify(token).user_id == 6
    path.write_bytes(pem * 2)
    assert "2 keys in one file" in usage_error_of(chatd.read_jwt_key, path)


def test_a_curve_that_nobody_knows_is_refused_like_every_other_strange_key(
    tmp_path: Path,
) -> None:
    # SubjectPublicKeyInfo of a curve with the object identifier 1.2.3.4.
    der = bytes.fromhex("301c300c06072a8648ce3d0201") + bytes.fromhex("06032a0304")
    der = b"\x30\x1a" + der[2:] + bytes.fromhex("030a00") + b"\x04" + b"\x01" * 8
    lines = b"-----BEGIN PUBLIC KEY-----", b"-----END PUBLIC KEY-----"
    (tmp_path / "key").write_bytes(
        b"\n".join([lines[0], base64_lines(64)(der), lines[1]])
    )
    assert "not a PEM public key" in usage_error_of(
        chatd.read_jwt_key, tmp_path / "key"
    )


def test_a_private_key_is_refused_for_chatd_has_no_business_with_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "private.pem"
    path.write_bytes(
        rules_private("ES256").private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    assert "give chatd the public one" in usage_error_of(chatd.read_jwt_key, path)


def test_the_secret_is_the_flag_s_or_the_credential_or_beside_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Settings(db=tmp_path / "chat" / "my.db")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert chatd.secret_path(beside) == tmp_path / "chat" / "chatd.secret"
    (tmp_path / "chatd.secret").touch()
    assert chatd.secret_path(beside) == tmp_path / "chatd.secret"
    flag = dataclasses.replace(beside, secret_file=Path("/etc/s"))
    assert chatd.secret_path(flag) == Path("/etc/s")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    assert chatd.secret_path(beside) == tmp_path / "chat" / "chatd.secret"


def test_a_made_secret_is_private_long_and_never_made_twice(tmp_path: Path) -> None:
    path = tmp_path / "chatd.secret"
    old = os.umask(0)
    try:
        chatd.make_secret(path)
    finally:
        os.umask(old)
    secret = chatd.read_secret(path)
    assert (stat.S_IMODE(path.stat().st_mode), len(secret) >= 32) == (0o600, True)
    chatd.make_secret(path)
    assert chatd.read_secret(path) == secret
    assert "none/s" in usage_error_of(chatd.make_secret, tmp_path / "none" / "s")


def test_a_secret_that_could_not_be_written_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "chatd.secret"
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        said = usage_error_of(chatd.make_secret, path)
    assert said == f"secret {path}: No space left on device"
    assert list(tmp_path.iterdir()) == []
    chatd.make_secret(path)
    assert len(chatd.read_secret(path)) >= 32


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("Bob", "Bob"),
        ("  Боб  Иванов\t", "Боб Иванов"),
        ("a\nb\x1b[2J\u202ec\x00", "a b [2J c"),
        ("x" * 100, "x" * 64),
        ("\ud800Bob", "Bob"),
        ("🎉 Bob", "🎉 Bob"),
        *[(nobody, None) for nobody in ("", " \n", "\x00\x1b", None, 5, True)],
        (["Bob"], None),
        ({}, None),
    ],
)
def test_a_name_is_one_line_of_at_most_64_characters(
    name: object, clean: str | None
) -> None:
    assert chatd.clean_name(name) == clean


@given(st.text())
def test_a_clean_name_stays_as_it_is(name: str) -> None:
    clean = chatd.clean_name(name)
    assert chatd.clean_name(clean) == clean
    assert clean is None or (clean.isprintable() and 1 <= len(clean) <= 64)


# =====================================================================================
# MEMORY
#
# The real Store on a real file, the real Hub, real Seats. Where this section ends, at
# the outbox, stands MemoryOutbox: a sheet of paper that takes what is pushed and has a
# bound. That is no mock of ours: push, full and waiting are all that Hub and Seat know
# of an outbox, and what the real one does with bytes is the next section's business.
#
# Most tests need no Trio: they take the steps of a batch (transact, publish, page,
# feed) one by one, as a scheduler could, in whatever order they like.
# =====================================================================================


async def memory_inline(
    function: Callable[..., V], *args: object, limiter: trio.CapacityLimiter | None
) -> V:
    """Store's run_sync without threads: it works under virtual time."""
    await trio.lowlevel.checkpoint()
    return function(*args)


def memory_frames(data: bytes) -> list[dict[str, Any]]:
    """The messages in these bytes, read by wsproto's client."""
    return [json.loads(text) for op, text in words_hear(data) if op is Opcode.TEXT]


MemoryWork = tuple[Any, ...]  # a work of the store, and what it is to be told


def memory_job(
    work: Callable[..., V],
    *args: object,
    done: Callable[[Any], chatd.Reply | None] = lambda _: None,
    seat: chatd.Seat | None = None,
) -> Job:
    return Job(lambda db, log: work(db, log, *args), done, seat)


class MemoryOutbox:
    """Takes what is pushed. While it is stuck its peer reads nothing."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.unsent = 0
        self.bound = math.inf
        self.stuck = False
        self.sealed = False
        self.heard_at = self.moved_at = 0.0
        self.patience = 10.0
        self.listening = True

    @property
    def waiting(self) -> bool:
        return self.unsent > 0

    @property
    def full(self) -> bool:
        return self.unsent >= self.bound

    def push(self, frames: bytes, *, always: bool = False) -> bool:
        if self.full and not always:
            return False
        self.taken.append(frames)
        self.unsent += len(frames) if self.stuck else 0
        return True

    def note_progress(self, now: float) -> None:
        """Its peer has no kernel that would tell."""

    def drain(self) -> None:
        self.stuck, self.unsent = False, 0


class MemorySeat:
    """A real Seat, and what its peer has heard."""

    def __init__(self, changed: Settings) -> None:
        self.outbox = MemoryOutbox()
        self.fell = 0
        self.ended: list[tuple[int, str]] = []
        self.seat = chatd.Seat(
            cast(chatd.Outbox, self.outbox),
            settings=changed,
            behind=self._behind,
            end=lambda code, reason: self.ended.append((code, reason)),
        )

    def _behind(self) -> None:
        self.fell += 1

    def heard(self) -> list[dict[str, Any]]:
        """Everything so far."""
        return [
            message for data in self.outbox.taken for message in memory_frames(data)
        ]

    def seqs(self) -> list[int]:
        """The events among it."""
        return [message["seq"] for message in self.heard() if "seq" in message]


STORES: list[Store] = []


@pytest.fixture(autouse=True)
def stores_end() -> Iterator[None]:
    """Close what a test has opened; from Python 3.13 on it would be an error."""
    yield
    while STORES:
        STORES.pop().close()


def memory_store(*args: Any, **more: Any) -> Store:
    """A store that is closed when its test ends, if not before."""
    STORES.append(Store(*args, **more))
    return STORES[-1]


class Memory:
    """A store and a hub, driven step by step."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.settings = Settings(db=folder / "chatd.db", **changes)
        self.stats = Stats()
        self.store = memory_store(self.settings, self.stats, run_sync=memory_inline)
        self.hub = chatd.Hub(self.settings, self.stats, self.store)

    def again(self, **changes: Any) -> Memory:
        """Stop, and start anew on the same file."""
        self.store.close()
        return Memory(self.settings.db.parent, **changes)

    # --- writing

    def commit(self, *works: MemoryWork) -> chatd.Batch:
        """Run works in one transaction; nothing is published."""
        return self.store._transact([memory_job(*work) for work in works])

    def do(self, work: Callable[..., V], *args: object) -> V:
        """Run one work of the store, publish, return its outcome or raise it."""
        batch = self.commit((work, *args))
        self.hub.publish(batch)
        outcome = batch.answers[0][1]
        if isinstance(outcome, Refusal):
            raise outcome
        return cast(V, outcome)

    def chat(self, *users: int, title: str | None = None) -> int:
        return self.do(self.store.create_chat, title, users).id

    def say(self, chat: int, user: int, text: str = "hi", key: str = "") -> chatd.Sent:
        return cast(chatd.Sent, self.do(*self.sends(chat, user, text, key)))

    def sends(
        self, chat: int, user: int, text: str = "hi", key: str = "", **more: bool
    ) -> MemoryWork:
        """The work of sending, to be done or committed."""
        send = Send(chat, user, text, key or None)
        return (self.store.send_message, send, *more.values())

    # --- reading

    def read(self, query: Callable[..., V], *args: object) -> V:
        """Ask a reader, as Store.read does in its thread."""
        return self.store._query(query, *args)

    def page(self, user: int, cursor: int = 0, limit: int = 500) -> chatd.Page:
        return self.read(self.store.events_after, user, cursor, self.hub.head, limit)

    def seqs(self, user: int, cursor: int = 0) -> list[int]:
        """The seqs of all that a user can read of the log."""
        return [event.seq for event in self.page(user, cursor).events]

    def my_chats(self, user: int) -> list[chatd.MyChat]:
        return self.read(self.store.my_chats, user, self.hub.head)

    def count(self, table: str) -> int:
        (count,) = self.store._writer.execute(
            f"SELECT count(*) FROM {table}"
        ).fetchone()
        return int(count)

    # --- seats: what Session does between its awaits

    def enter(self, user: int) -> MemorySeat:
        """Register a seat; its chats are not read yet."""
        made = MemorySeat(self.settings)
        assert self.hub.enter(made.seat, user, self.hub.head)
        return made

    def greeting(self, user: int, cursor: int | None = None) -> chatd.Greeting:
        upto = self.hub.head
        start = upto if cursor is None else cursor
        return self.read(self.store.greeting, user, upto, start)

    def catch_up(self, made: MemorySeat) -> None:
        """Bring a seat what it missed, until it is live."""
        seat = made.seat
        while not seat.live:
            if self.hub.in_tail(seat.cursor):
                self.hub.feed(seat)
            else:
                limit = self.settings.page_events
                user = seat.person.user_id
                self.hub.give_page(seat, self.page(user, seat.cursor, limit))

    def sit(self, user: int, cursor: int | None = None) -> MemorySeat:
        """A seat that is live."""
        made = self.enter(user)
        greeting = self.greeting(user, cursor)
        self.hub.know(made.seat.person, greeting.joined)
        made.seat.cursor = self.hub.head if cursor is None else cursor
        self.catch_up(made)
        return made


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    made = Memory(tmp_path)
    yield made
    made.store.close()


@contextlib.contextmanager
def memory_with(**changes: Any) -> Iterator[Memory]:
    """A memory of other settings, or one for each example of a property."""
    with tempfile.TemporaryDirectory() as folder:
        made = Memory(Path(folder), **changes)
        try:
            yield made
        finally:
            made.store.close()


# --- writing: the works --------------------------------------------------------------


def test_a_message_is_the_event_that_announces_it(memory: Memory) -> None:
    chat = memory.chat(5, 6)
    sent = memory.say(chat, 5, "Привет!", "k1")
    assert not sent.duplicate
    (event,) = memory.page(6, 2).events
    assert memory_frames(event.frame) == [
        {
            "type": "new_message", "seq": 3, "chat_id": chat,
            "message": {
                "id": 3, "chat_id": chat, "sender_id": 5, "content": "Привет!",
                "created_at": sent.message.created_at, "n": 1, "client_id": "k1",
            },
        }
    ]  # fmt: skip


def test_ordinals_of_a_chat_and_seqs_have_no_holes(memory: Memory) -> None:
    chats = [memory.chat(1, 2), memory.chat(2, 3)]
    ordinals = [memory.say(chats[i % 2], 2).message.n for i in range(6)]
    refusal_of(memory.say, chats[0], 3)
    assert ordinals == [1, 1, 2, 2, 3, 3]
    assert memory.say(chats[0], 1).message.n == 4
    assert memory.seqs(2) == [2, 3, *range(5, 12)]


@pytest.mark.parametrize("key", ["", "k"])
def test_who_is_no_member_is_told_the_same_as_of_a_chat_that_is_none(
    memory: Memory, key: str
) -> None:
    chat = memory.chat(1, 2)
    told = [str(refusal_of(memory.say, to, 3, "hi", key)) for to in (chat, 99)]
    assert told[0] == told[1] == "not_found: chat_id: there is no such chat for you"


def test_a_service_sends_for_who_is_no_member_but_not_to_no_chat(
    memory: Memory,
) -> None:
    chat = memory.chat(1, 2)
    sent = memory.do(*memory.sends(chat, 9, "from the shop", service=True))
    assert sent.message.sender_id == 9
    refusal = refusal_of(memory.do, *memory.sends(99, 9, service=True))
    assert refusal.code == "not_found"
    assert memory.seqs(9) == []
    assert [user.user_id for user in memory.read(memory.store.users)] == [1, 2, 9]


def test_a_repeat_is_answered_alike_and_makes_no_event(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    first, second = (memory.say(chat, 1, "hi", "k") for _ in range(2))
    assert (first.duplicate, second.duplicate) == (False, True)
    assert first.message == second.message
    assert (memory.hub.head, memory.count("message")) == (3, 1)


def test_a_repeat_in_the_same_batch_is_one(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    batch = memory.commit(*[memory.sends(chat, 1, "hi", "k")] * 3)
    assert [outcome.duplicate for _, outcome in batch.answers] == [False, True, True]
    assert [event.seq for event in batch.events] == [3]


def test_a_repeat_with_another_text_or_chat_is_a_mismatch(memory: Memory) -> None:
    chats = [memory.chat(1, 2), memory.chat(1, 2)]
    memory.say(chats[0], 1, "hi", "k")
    for chat, text in ((chats[0], "ho"), (chats[1], "hi"), (99, "hi")):
        refusal = refusal_of(memory.say, chat, 1, text, "k")
        assert (refusal.code, refusal.status) == ("idempotency_mismatch", 409)
        assert "client_id" in refusal.message
    assert not memory.say(chats[0], 2, "ho", "k").duplicate  # another sender's key


def test_without_a_key_the_same_text_twice_is_two_messages(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    assert [memory.say(chat, 1).message.n for _ in range(2)] == [1, 2]


def test_the_key_is_asked_before_membership(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    memory.say(chat, 1, "hi", "k")
    memory.do(memory.store.remove_member, chat, 1, 1)
    assert memory.say(chat, 1, "hi", "k").duplicate
    assert refusal_of(memory.say, chat, 1, "hi", "k2").code == "not_found"


def test_a_repeat_is_found_by_a_reader_too(memory: Memory) -> None:
    chat, find = memory.chat(1, 2), memory.store.find_sent
    sent = memory.say(chat, 1, "hi", "k").message
    again = Send(chat, 1, "hi", "k")
    assert memory.read(find, again) == chatd.Sent(sent, duplicate=True)
    for other in (
        Send(chat, 1, "hi", "l"),
        Send(chat, 2, "hi", "k"),
        Send(chat, 1, "hi"),
    ):
        assert memory.read(find, other) is None
    refusal = refusal_of(memory.read, find, again._replace(content="ho"))
    assert refusal.code == "idempotency_mismatch"


def test_a_mark_moves_up_and_never_down(memory: Memory) -> None:
    chat, mark = memory.chat(1, 2), memory.store.mark_read
    ids = [memory.say(chat, 1).message.id for _ in range(3)]
    assert memory.do(mark, 2, ids[1]) == (ids[1], chat, 2, 6)
    assert memory.do(mark, 2, ids[0]) == (ids[0], chat, 1, 0)
    assert memory.do(mark, 2, ids[1]) == (ids[1], chat, 2, 0)
    assert memory.do(mark, 2, ids[2]) == (ids[2], chat, 3, 7)
    assert memory_frames(memory.page(1, 5).events[0].frame) == [
        {"type": "message_read", "seq": 6, "message_id": ids[1], "chat_id": chat,
         "read_by": 2, "n": 2}
    ]  # fmt: skip


def test_sending_moves_the_sender_and_tells_nobody(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    memory.say(chat, 2)
    memory.say(chat, 1)
    assert [mine.unread for user in (1, 2) for mine in memory.my_chats(user)] == [0, 1]
    assert memory.do(memory.store.mark_read, 1, 4).seq == 0


def test_a_message_of_another_chat_cannot_be_marked(memory: Memory) -> None:
    other = memory.say(memory.chat(1, 2), 1).message.id
    told = {
        str(refusal_of(memory.do, memory.store.mark_read, 3, message))
        for message in (other, 99, 2**53 - 1)
    }
    assert told == {"not_found: message_id: there is no such message for you"}


def test_in_a_large_chat_a_mark_is_the_reader_s_own_business() -> None:
    with memory_with(large_chat=2) as memory:
        small, large = memory.chat(1, 2), memory.chat(1, 2, 3)
        seats = [memory.sit(user) for user in (1, 2, 2)]
        for chat in (small, large):
            sent = memory.say(chat, 1)
            memory.do(memory.store.mark_read, 2, sent.message.id)
        assert [made.seqs() for made in seats] == [[6, 7, 8], *[[6, 7, 8, 9]] * 2]
        assert [memory.seqs(user, 5) for user in (1, 2, 3)] == [
            [6, 7, 8],
            [6, 7, 8, 9],
            [8],
        ]
        assert [chat.unread for chat in memory.my_chats(2)] == [0, 0]


def test_creating_tells_each_member_once_with_the_whole_chat(memory: Memory) -> None:
    memory.do(memory.store.rename, 2, "Bob")
    chat = memory.do(memory.store.create_chat, "Sofa", [2, 1, 2])
    (event,) = memory.page(2).events
    assert memory.seqs(1) == [1]
    assert memory_frames(event.frame) == [
        {
            "type": "chat_added", "seq": 2, "chat_id": chat.id,
            "chat": {
                "id": chat.id, "title": "Sofa", "last_n": 0, "last_message": None,
                "members": [
                    {"user_id": 1, "name": None, "read_n": 0},
                    {"user_id": 2, "name": "Bob", "read_n": 0},
                ],
            },
        }
    ]  # fmt: skip


def test_adding_tells_the_members_and_then_the_new_one(memory: Memory) -> None:
    chat, add = memory.chat(1, 2), memory.store.add_member
    memory.do(memory.store.rename, 3, "Carol")
    memory.say(chat, 1)
    seats = [memory.sit(user) for user in (1, 3)]
    assert memory.do(add, chat, 3, 1) is True
    assert seats[0].heard() == [
        {
            "type": "member_added",
            "seq": 4,
            "chat_id": chat,
            "user_id": 3,
            "name": "Carol",
        }
    ]
    (added,) = seats[1].heard()
    assert (added["type"], added["seq"], added["chat"]["last_n"]) == (
        "chat_added",
        5,
        1,
    )
    assert [(m["user_id"], m["read_n"]) for m in added["chat"]["members"]] == [
        (1, 1), (2, 0), (3, 1),
    ]  # fmt: skip


def test_adding_who_is_there_changes_nothing(memory: Memory) -> None:
    chat, add = memory.chat(1, 2), memory.store.add_member
    assert memory.do(add, chat, 2, 1) is False
    assert memory.do(add, chat, 1, None) is False
    assert memory.hub.head == 2


def test_only_a_member_or_a_service_may_add_and_remove(memory: Memory) -> None:
    chat, store = memory.chat(1, 2), memory.store
    for work in (store.add_member, store.remove_member):
        told = {str(refusal_of(memory.do, work, *who)) for who in (
            (chat, 9, 3), (99, 9, 1), (99, 9, None))}  # fmt: skip
        assert told == {"not_found: chat_id: there is no such chat for you"}
    refusal = refusal_of(memory.do, store.remove_member, chat, 9, None)
    assert str(refusal) == "not_found: user_id: not a member of this chat"


def test_a_removal_is_the_last_that_the_removed_gets(memory: Memory) -> None:
    chat = memory.chat(1, 2, 3)
    seats = {user: memory.sit(user) for user in (1, 2, 3)}
    memory.do(memory.store.remove_member, chat, 3, 3)
    memory.say(chat, 1)
    assert seats[3].heard() == [
        {"type": "member_removed", "seq": 4, "chat_id": chat, "user_id": 3}
    ]
    assert seats[1].seqs() == seats[2].seqs() == [4, 5]
    assert refusal_of(memory.say, chat, 3).code == "not_found"


def test_a_chat_has_a_bound_of_members() -> None:
    with memory_with(members=3) as memory:
        refusal = refusal_of(memory.chat, 1, 2, 3, 4)
        assert str(refusal) == "bad_field: member_ids: 4 members; at most 3"
        chat = memory.chat(1, 2, 3)
        refusal = refusal_of(memory.do, memory.store.add_member, chat, 4, 1)
        assert refusal.code == "bad_field"
        assert memory.do(memory.store.add_member, chat, 3, 1) is False


def test_names_and_revocations_are_kept_and_are_no_events(memory: Memory) -> None:
    store = memory.store
    for user, name in ((1, "Ann"), (2, "Bob"), (1, "Anna"), (1, "Anna")):
        memory.do(store.rename, user, name)
    at = memory.do(store.revoke, 2)
    assert memory.do(store.revoke, 3) in (at, at + 1)
    assert {*memory.again().store.revoked()} == {2, 3}
    assert (memory.read(store.name, 1), memory.read(store.name, 9)) == ("Anna", None)
    assert memory.hub.head == 0


def test_those_who_are_known_are_listed_by_name_up_to_200(memory: Memory) -> None:
    memory.chat(*range(1, 300))
    memory.do(memory.store.rename, 250, "Zoe")
    memory.do(memory.store.rename, 251, "Ann")
    users = memory.read(memory.store.users)
    assert (len(users), users[2]) == (200, chatd.User(1, None))
    assert users[:2] == [chatd.User(251, "Ann"), chatd.User(250, "Zoe")]


# --- writing: the transaction --------------------------------------------------------


def memory_spoiled(memory: Memory, chat: int) -> MemoryWork:
    """A work that writes and then thinks better of it."""

    def work(db: sqlite3.Connection, log: list[chatd.Event]) -> None:
        memory.store.send_message(db, log, Send(chat, 1, "spoiled"))
        memory.store.create_chat(db, log, None, [1, 77])
        raise Refusal("forbidden")

    return (work,)


def test_a_refused_job_does_not_sink_its_neighbours(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    batch = memory.commit(
        memory.sends(chat, 1),
        memory_spoiled(memory, chat),
        memory.sends(chat, 3),
        memory.sends(chat, 2),
    )
    codes = [getattr(outcome, "code", "") for _, outcome in batch.answers]
    assert codes == ["", "forbidden", "not_found", ""]
    assert [(event.seq, event.wire.seq) for event in batch.events] == [(3, 3), (4, 4)]
    assert (memory.count("message"), memory.count("chat"), memory.count("event")) == (
        2, 1, 4,
    )  # fmt: skip
    assert (memory.stats.commits, memory.stats.batch_max) == (2, 4)


@pytest.mark.parametrize("user_id", [0, 2**63])
def test_a_broken_rule_of_the_schema_is_our_mistake_and_sinks_nobody(
    memory: Memory, user_id: int
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    batch = memory.commit(
        (store.create_chat, None, [1, user_id]), memory.sends(chat, 1)
    )
    assert batch.answers[0][1].code == "internal"
    assert batch.answers[1][1].message.n == 1
    assert [event.seq for event in batch.events] == [3]
    assert sum(memory.stats.errors.values()) == 1
    assert not store.degraded


def test_a_work_before_the_start_is_done_here_and_now(tmp_path: Path) -> None:
    store = Store(Settings(db=tmp_path / "a.db"), Stats())
    assert store.write_now(store.create_chat, None, [1]).id == 1
    refusal = refusal_of(store.write_now, store.mark_read, 1, 9)
    assert (refusal.code, store.seq) == ("not_found", 1)
    store.close()


def test_only_the_writer_writes_and_it_writes_for_good(memory: Memory) -> None:
    memory.chat(1, 2)
    for pragma, writer, reader in (
        ("journal_mode", "wal", "wal"), ("synchronous", 2, 2), ("foreign_keys", 1, 0),
        ("query_only", 0, 1), ("trusted_schema", 0, 0), ("secure_delete", 1, 1),
        ("wal_autocheckpoint", 1000, 0), ("cell_size_check", 1, 0),
        ("application_id", 0x63686174, 0x63686174), ("user_version", 1, 1),
    ):  # fmt: skip

        def ask(db: sqlite3.Connection, pragma: str = pragma) -> object:
            return db.execute(f"PRAGMA {pragma}").fetchone()[0]

        assert (pragma, ask(memory.store._writer)) == (pragma, writer)
        if pragma != "secure_delete":
            assert (pragma, memory.read(ask)) == (pragma, reader)
    refusal = refusal_of(memory.read, lambda db: db.execute("DELETE FROM event"))
    assert (refusal.code, memory.count("event")) == ("storage_failed", 2)


def test_the_database_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        memory = Memory(tmp_path)
        memory.chat(1, 2)
    finally:
        os.umask(old)
    files = [path for path in tmp_path.iterdir() if path.name.startswith("chatd.db")]
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert memory.store.wal_bytes() > 0
    memory.store.close()
    assert (memory.store.wal_bytes(), len([*tmp_path.iterdir()])) == (0, 1)


# --- reading -------------------------------------------------------------------------


def test_who_leaves_sees_nothing_more_and_who_returns_nothing_of_between(
    memory: Memory,
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    memory.say(chat, 1, "seen")  # 3
    memory.do(store.remove_member, chat, 2, 2)  # 4
    memory.say(chat, 1, "unseen")  # 5
    assert memory.seqs(2) == [2, 4]
    memory.do(store.add_member, chat, 2, 1)  # 6 to the others, 7 to him
    memory.say(chat, 1, "seen again")  # 8
    assert memory.seqs(2) == [2, 4, 7, 8]
    assert memory.seqs(1) == [1, 3, 4, 5, 6, 8]
    messages, more = memory.read(store.history, 2, chat, None, 50, memory.hub.head)
    assert ([message.n for message in messages], more) == ([1, 2, 3], False)


def test_the_log_tells_a_chat_that_one_has_left_as_an_empty_one(memory: Memory) -> None:
    chat = memory.chat(1, 2, title="Sofa")
    memory.say(chat, 1, "between us")
    memory.do(memory.store.remove_member, chat, 2, 2)
    (message,) = memory_frames(memory.page(2).events[0].frame)
    assert message["chat"] == {
        "id": chat, "title": None, "members": [], "last_n": 0, "last_message": None,
    }  # fmt: skip
    (message,) = memory_frames(memory.page(1).events[0].frame)
    assert (message["chat"]["title"], message["chat"]["last_n"]) == ("Sofa", 1)


@pytest.mark.parametrize("limit", [1, 2, 3, 10, 11, 100])
def test_pages_of_any_length_make_the_whole_log(memory: Memory, limit: int) -> None:
    chats = [memory.chat(1, 2), memory.chat(2, 3)]
    for i in range(6):
        memory.say(chats[i % 2], 2)
    found, cursor, more = list[int](), 0, True
    while more:
        page = memory.page(1, cursor, limit)
        found += [event.seq for event in page.events]
        assert len(page.events) <= limit
        cursor, more = page.cursor, page.more
    assert found == [1, 5, 7, 9]
    assert cursor == memory.hub.head == 10
    assert memory.page(1, cursor, limit) == ([], 10, False)


def test_a_page_ends_at_its_bytes_and_its_cursor_at_its_last_event() -> None:
    with memory_with(page_bytes=5000) as memory:
        chat = memory.chat(1, 2)
        for _ in range(8):
            memory.say(chat, 1, "x" * 1000)
        seqs, page = list[int](), memory.page(2, 2)
        while page.more:
            assert page.cursor == page.events[-1].seq
            assert 1 <= len(page.events) <= 5
            seqs += [event.seq for event in page.events]
            page = memory.page(2, page.cursor)
        assert [*seqs, *[event.seq for event in page.events]] == [*range(3, 11)]


def test_a_page_that_is_not_cut_short_moves_the_cursor_to_its_bound(
    memory: Memory,
) -> None:
    chat = memory.chat(1, 2)
    memory.chat(3, 4)
    memory.say(chat, 1)
    assert memory.page(1, 1)[1:] == (5, False)
    assert memory.page(9, 0) == ([], 5, False)
    full = memory.page(1, 0, limit=2)
    assert ([event.seq for event in full.events], full.cursor) == ([1, 5], 5)
    assert not full.more


def test_a_removal_that_nobody_was_told_of_hides_nothing_that_came_before(
    memory: Memory,
) -> None:
    chat, other = memory.chat(1, 2), memory.chat(2, 3)
    for _ in range(3):
        memory.say(chat, 1)
    memory.do(memory.store.remove_member, other, 2, 2)
    memory.say(other, 3)
    upto, store = memory.hub.head, memory.store
    before = [event.seq for event in memory.page(2, 4).events]
    assert before == [5, 6, 7, 8]

    def seen(user: int, cursor: int = 4) -> list[int]:
        page = memory.read(store.events_after, user, cursor, upto, 100)
        assert page.cursor == upto
        assert memory.read(store.missed, user, cursor, upto) == len(page.events)
        return [event.seq for event in page.events]

    # On disk, and not published: as of the head he is in the chat.
    for work, *words in (
        (store.remove_member, chat, 2, None),
        (store.add_member, chat, 2, None),
        (store.remove_member, chat, 2, None),
        (store.add_member, other, 2, None),  # he was not in it at the head
        (store.remove_member, other, 2, None),
        (store.add_member, chat, 9, None),  # nor was he
        (store.remove_member, chat, 9, None),
    ):
        store.write_now(work, *words)
        assert seen(2) == before
        assert seen(9) == []
    assert seen(2, 6) == [7, 8]
    assert seen(1) == [5, 6, 7]


def test_what_was_missed_is_counted_up_to_the_bound_of_a_replay() -> None:
    with memory_with(resync_events=5) as memory:
        chat = memory.chat(1, 2)
        other = memory.chat(3, 4)
        for _ in range(6):
            memory.say(chat, 1)
            memory.say(other, 3)
        missed = functools.partial(memory.read, memory.store.missed, 1)
        assert [missed(cursor, 16) for cursor in (16, 15, 14, 6, 5, 4, 0)] == [
            0, 0, 1, 5, 5, None, None,
        ]  # fmt: skip
        assert missed(20, 16) == 0
        assert memory.greeting(1, 0).missed is None
        assert memory.greeting(1, 6).missed == 5


def test_a_greeting_is_absolute_as_of_the_head(memory: Memory) -> None:
    chats = [memory.chat(1, 2), memory.chat(2, 3)]
    memory.say(chats[0], 1)
    memory.say(chats[0], 2)
    assert memory.greeting(1) == (
        {chats[0]: 1}, {str(chats[0]): chatd.Marks(last_n=2, read_n=1)}, 0,
    )  # fmt: skip
    assert memory.greeting(2).joined == {chats[0]: 2, chats[1]: 3}
    assert memory.greeting(9) == ({}, {}, 0)


def test_chats_are_listed_by_their_news_with_what_is_unread(memory: Memory) -> None:
    chats = [memory.chat(1, 2, title=title) for title in ("a", "b", "c")]
    memory.say(chats[0], 2, "x")
    memory.say(chats[0], 2, "y")
    memory.do(memory.store.mark_read, 1, 7)
    first, second, third = memory.my_chats(1)
    assert [chat.title for chat in (first, second, third)] == ["a", "c", "b"]
    assert (first.last_n, first.read_n, first.unread) == (2, 1, 1)
    assert first.last_message is not None
    assert first.last_message.content == "y"
    assert (third.last_message, third.unread) == (None, 0)


def test_history_is_read_page_by_page_oldest_first(memory: Memory) -> None:
    chat, head = memory.chat(1, 2), 0
    ids = [memory.say(chat, 1, str(i)).message.id for i in range(5)]
    head = memory.hub.head

    def history(before: int | None, limit: int) -> tuple[list[str], bool]:
        messages, more = memory.read(
            memory.store.history, 2, chat, before, limit, head
        )  # fmt: skip
        return [message.content for message in messages], more

    assert history(None, 2) == (["3", "4"], True)
    assert history(ids[3], 2) == (["1", "2"], True)
    assert history(ids[1], 2) == (["0"], False)
    assert history(ids[0], 2) == ([], False)
    assert history(None, 5) == (["0", "1", "2", "3", "4"], False)


def test_history_is_for_members_and_before_is_a_message_of_the_chat(
    memory: Memory,
) -> None:
    chat, other = memory.chat(1, 2), memory.chat(3, 4)
    foreign, history = memory.say(other, 3).message.id, memory.store.history
    for chat_id in (other, 99):
        assert (
            refusal_of(memory.read, history, 1, chat_id, None, 5, 9).code == "not_found"
        )
    for before in (foreign, 99, 1):
        refusal = refusal_of(memory.read, history, 1, chat, before, 5, 9)
        assert str(refusal) == "bad_field: before: not a message of this chat"


def test_what_is_committed_and_not_published_does_not_exist_for_readers(
    memory: Memory,
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    memory.say(chat, 1, "old")
    batch = memory.commit(
        memory.sends(chat, 1, "new", "k"),
        (store.create_chat, None, [1, 2]),
        (store.mark_read, 2, 4),
    )
    assert (store.seq, memory.hub.head) == (7, 3)
    assert memory.seqs(2) == [2, 3]
    assert memory.page(2)[1:] == (3, False)
    assert memory.greeting(2).marks == {str(chat): chatd.Marks(1, 1)}
    ((mine,),) = [memory.my_chats(2)]
    assert (mine.id, mine.last_n, mine.read_n, mine.unread) == (chat, 1, 1, 0)
    messages, _ = memory.read(store.history, 2, chat, None, 9, memory.hub.head)
    assert [message.content for message in messages] == ["old"]
    memory.hub.publish(batch)
    assert memory.seqs(2) == [2, 3, 4, 6, 7]


def test_a_chat_is_told_without_what_is_not_published(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    memory.commit(memory.sends(chat, 1, "new"))
    (told,) = memory_frames(memory.page(2).events[0].frame)
    assert told["chat"]["last_message"] is None
    ((mine,),) = [memory.my_chats(2)]
    assert all(member.read_n <= mine.last_n for member in mine.members)


def test_a_repeat_is_not_found_before_its_event_is_published(memory: Memory) -> None:
    chat, find = memory.chat(1, 2), memory.store.find_sent
    batch = memory.commit(memory.sends(chat, 1, "hi", "k"))
    again = Send(chat, 1, "hi", "k")
    assert memory.read(find, again, memory.hub.head) is None
    memory.hub.publish(batch)
    assert memory.read(find, again, memory.hub.head) is not None


def test_a_query_that_fails_leaves_no_transaction_behind(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    for _ in range(6):
        refusal_of(memory.read, memory.store.history, 9, chat, None, 5, 9)
        refusal = refusal_of(memory.read, lambda db: db.execute("SELECT nothing"))
        assert refusal.code == "storage_failed"
    assert memory.seqs(1) == [1]
    assert len(memory.store._idle_readers) == 1


def memory_workout(memory: Memory, key: str) -> None:
    """Every query of the store, once."""
    store, chat = memory.store, memory.chat(1, 2)
    sent = memory.say(chat, 1, "hi", key)
    memory.say(chat, 1, "hi", key)
    memory.do(store.mark_read, 2, sent.message.id)
    memory.do(store.add_member, chat, 3, 1)
    memory.do(store.remove_member, chat, 3, 3)
    memory.do(store.rename, 1, "Ann")
    memory.do(store.revoke, 2)
    head = memory.hub.head
    memory.page(1)
    memory.greeting(1, 0)
    memory.my_chats(1)
    memory.read(store.history, 1, chat, sent.message.id, 5, head)
    memory.read(store.find_sent, Send(chat, 1, "hi", key))
    memory.read(store.name, 1)
    store.tail()
    store.revoked()
    store._probe()


def test_no_query_walks_through_a_table_that_grows(memory: Memory) -> None:
    said: set[str] = set()
    memory_workout(memory, "k1")
    for db in (memory.store._writer, *memory.store._idle_readers):
        db.set_trace_callback(said.add)
    memory_workout(memory, "k2")
    # The plan of an INSERT lists what a deferred foreign key would have to look at.
    queries = {sql for sql in said if re.match(r"\s*(SELECT|UPDATE|DELETE)", sql)}
    assert len(queries) > 25
    for sql in queries:
        plan = memory.store._writer.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall()
        scans = [row[3] for row in plan if row[3].startswith("SCAN")]
        # A list that was just selected, and the users whose tokens are revoked.
        lists = r"\(?subquery|mine|CONSTANT"
        right = rf"SCAN ({lists}|user USING (COVERING )?INDEX user_revoked)"
        assert [scan for scan in scans if not re.match(right, scan)] == [], sql


def memory_cost(db: sqlite3.Connection, function: Callable[[], object]) -> int:
    """How many tens of steps SQLite takes for what a function asks of it."""
    steps: list[int] = []
    db.set_progress_handler(lambda: steps.append(1), 10)
    function()
    db.set_progress_handler(None, 10)
    return len(steps)


def test_nothing_costs_more_because_the_log_is_long(memory: Memory) -> None:
    chat, store = memory.chat(1, 2), memory.store
    queries: list[Callable[[], object]] = [
        lambda: memory.page(1, 2, limit=5),
        lambda: memory.page(1, memory.hub.head - 5),
        lambda: memory.greeting(2, memory.hub.head - 5),
        lambda: memory.my_chats(2),
        lambda: memory.read(store.history, 2, chat, None, 5, memory.hub.head),
    ]
    works: list[Callable[[], object]] = [
        lambda: memory.say(chat, 1, "x", f"k{memory.hub.head}"),
        lambda: memory.do(store.mark_read, 2, memory.hub.head - 3),
        lambda: memory.chat(1, 2),
        lambda: memory.do(store.add_member, chat, 3, 1),
        lambda: memory.do(store.remove_member, chat, 3, 3),
    ]

    def costs() -> list[int]:
        for _ in range(10):
            memory.say(chat, 1)
        (reader,) = store._idle_readers
        return [memory_cost(reader, query) for query in queries] + [
            memory_cost(store._writer, work) for work in works
        ]

    memory.page(1)
    short = costs()
    memory.hub.publish(memory.commit(*[memory.sends(chat, 1)] * 3000))
    for cost, before in zip(costs(), short, strict=True):
        assert cost <= before + 20


# --- seats ---------------------------------------------------------------------------


def test_live_seats_of_all_members_hear_a_message_at_once(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    seats = [memory.sit(user) for user in (1, 1, 2, 3)]
    memory.say(chat, 1)
    assert [made.seqs() for made in seats] == [[3], [3], [3], []]
    assert memory.stats.deliveries == 3
    assert seats[0].outbox.taken[0] is seats[2].outbox.taken[0]  # built once


def test_a_batch_is_one_write_for_a_seat_and_events_come_in_order(
    memory: Memory,
) -> None:
    chats = [memory.chat(1, 2), memory.chat(1, 3)]
    seats = {user: memory.sit(user) for user in (1, 2, 3)}
    works = [memory.sends(chats[i % 2], 1) for i in range(4)]
    memory.hub.publish(memory.commit(*works))
    assert [made.seqs() for made in seats.values()] == [[5, 6, 7, 8], [5, 7], [6, 8]]
    assert [len(made.outbox.taken) for made in seats.values()] == [1, 1, 1]


def test_membership_changes_where_it_stands_in_a_batch(memory: Memory) -> None:
    chat, store = memory.chat(1, 2), memory.store
    seats = {user: memory.sit(user) for user in (1, 2, 3)}
    send = memory.sends(chat, 1)
    batch = memory.commit(
        send,  # 3
        (store.add_member, chat, 3, 1),  # 4, 5
        send,  # 6
        (store.remove_member, chat, 2, 2),  # 7
        send,  # 8
        (store.remove_member, chat, 3, 3),  # 9
        (store.add_member, chat, 2, 1),  # 10, 11
        send,  # 12
    )
    memory.hub.publish(batch)
    assert seats[1].seqs() == [3, 4, 6, 7, 8, 9, 10, 12]
    assert seats[2].seqs() == [3, 4, 6, 7, 11, 12]
    assert seats[3].seqs() == [5, 6, 7, 8, 9]
    assert memory.hub.rooms[chat] == {seats[1].seat, seats[2].seat}


def memory_asker(made: MemorySeat, work: MemoryWork) -> Job:
    """A job of this seat, whose answer is an ack with the seq of its event."""

    def done(outcome: Any) -> chatd.Reply:
        seq = outcome.message.id if isinstance(outcome, chatd.Sent) else outcome.seq
        return chatd.Reply(chatd.text_frame(chatd.Ack(message_id=seq)), seq)

    made.seat.slots.acquire_nowait()
    return memory_job(*work, done=done, seat=made.seat)


def memory_talk(made: MemorySeat) -> list[str]:
    """What a seat heard, short: an event's seq, an ack as a+seq."""
    return [
        str(message["seq"]) if "seq" in message else f"a{message['message_id']}"
        for message in made.heard()
    ]


def test_a_live_seat_hears_its_event_before_its_ack_in_one_write(
    memory: Memory,
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    made, other = memory.sit(1), memory.sit(1)
    jobs = [memory_asker(made, memory.sends(chat, 1, "x")) for _ in range(2)]
    assert made.seat.slots.value == memory.settings.unanswered - 2
    memory.hub.publish(store._transact(jobs))
    assert memory_talk(made) == ["3", "4", "a3", "a4"]
    assert (memory_talk(other), len(made.outbox.taken)) == (["3", "4"], 1)
    assert made.seat.slots.value == memory.settings.unanswered


def test_an_ack_without_an_event_comes_at_once(memory: Memory) -> None:
    chat, store = memory.chat(1, 2), memory.store
    memory.say(chat, 2)
    made = memory.sit(2)
    job = memory_asker(made, (store.mark_read, 2, 3))
    memory.hub.publish(store._transact([job]))
    assert memory_talk(made) == ["a0"]


def test_an_ack_waits_for_its_event_on_a_seat_that_is_catching_up(
    memory: Memory,
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    made = memory.enter(1)
    memory.hub.know(made.seat.person, memory.greeting(1).joined)
    jobs = [
        memory_asker(made, memory.sends(chat, 1, "x")),
        memory_asker(made, (store.mark_read, 1, 3)),  # nothing moved: no event
    ]
    memory.hub.publish(store._transact(jobs))
    assert memory_talk(made) == ["a0"]
    memory.catch_up(made)
    assert memory_talk(made) == ["a0", "3", "a3"]
    assert made.seat.slots.value == memory.settings.unanswered
    assert made.seat.held == []


def test_an_ack_waits_for_its_event_on_a_seat_that_reads_pages() -> None:
    with memory_with(page_events=2, tail_events=1) as memory:
        chat, store = memory.chat(1, 2), memory.store
        made = memory.enter(2)
        memory.hub.know(made.seat.person, memory.greeting(2).joined)
        jobs = [memory_asker(made, memory.sends(chat, 2, str(i))) for i in range(4)]
        memory.hub.publish(store._transact(jobs))
        memory.catch_up(made)
        assert memory_talk(made) == ["3", "4", "a3", "a4", "5", "6", "a5", "a6"]


def test_a_full_seat_gets_nothing_of_a_batch_and_all_of_it_later(
    memory: Memory,
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    slow, fast = memory.sit(2), memory.sit(2)
    slow.outbox.bound, slow.outbox.stuck = 1, True
    memory.say(chat, 1)
    assert (slow.seqs(), slow.seat.live, slow.fell) == ([3], True, 0)
    job = memory_asker(slow, memory.sends(chat, 2))
    memory.hub.publish(store._transact([job]))
    assert (memory_talk(slow), slow.seat.live, slow.fell) == (["3"], False, 1)
    assert slow.seat.cursor == 3
    memory.say(chat, 1)
    slow.outbox.drain()
    memory.catch_up(slow)
    assert memory_talk(slow) == ["3", "4", "5", "a4"]
    assert (fast.seqs(), slow.fell) == ([3, 4, 5], 1)
    memory.say(chat, 1)
    assert slow.seqs() == fast.seqs() == [3, 4, 5, 6]


def test_a_seat_behind_the_tail_reads_pages_and_then_the_tail() -> None:
    with memory_with(tail_events=4, page_events=3) as memory:
        chat = memory.chat(1, 2)
        for _ in range(20):
            memory.say(chat, 1)
        made = memory.enter(2)
        made.seat.cursor = 0
        memory.hub.know(made.seat.person, memory.greeting(2).joined)
        assert not memory.hub.in_tail(0)
        memory.catch_up(made)
        assert made.seqs() == [2, *range(3, 23)]
        assert len(made.outbox.taken) > 5
        memory.say(chat, 1)
        assert made.seqs()[-1] == 23


def test_a_helping_of_the_tail_is_bounded_in_bytes() -> None:
    with memory_with(page_bytes=5000) as memory:
        chat = memory.chat(1, 2)
        for _ in range(10):
            memory.say(chat, 1, "x" * 2000)
        made = memory.enter(2)
        made.seat.cursor = 2
        memory.hub.know(made.seat.person, memory.greeting(2).joined)
        memory.hub.feed(made.seat)
        assert (made.seqs(), made.seat.live) == ([3, 4, 5], False)
        memory.catch_up(made)
        assert made.seqs() == [*range(3, 13)]


def test_the_tail_is_trimmed_in_events_and_holds_the_newest() -> None:
    with memory_with(tail_events=16) as memory:
        chat, hub = memory.chat(1, 2), memory.hub
        for _ in range(60):
            memory.say(chat, 1)
            assert [event.seq for event in hub.tail] == [
                *range(hub.head - len(hub.tail) + 1, hub.head + 1)
            ]
            assert len(hub.tail) <= 18
            assert hub.tail_size == sum(event.size for event in hub.tail)
        assert len(hub.tail) >= 14
        assert hub.in_tail(hub.head - len(hub.tail))
        assert not hub.in_tail(hub.head - len(hub.tail) - 1)


def test_the_tail_is_trimmed_in_bytes_too() -> None:
    with memory_with(tail_bytes=100_000) as memory:
        chat = memory.chat(1, 2)
        for _ in range(60):
            memory.say(chat, 1, "x" * 4000)
        assert memory.hub.tail_size <= 100_000
        assert 6 <= len(memory.hub.tail) <= 12


def test_an_event_in_the_tail_knows_what_it_weighs(memory: Memory) -> None:
    chat = memory.chat(*range(1, 500))
    memory.do(memory.store.add_member, chat, 1000, 1)
    memory.say(chat, 1, "x" * 4000)
    for event in memory.hub.tail[-2:]:
        assert event.size >= len(event.frame), event.kind


def test_the_tail_at_a_start_is_the_log_s_end_as_it_was(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    chat = memory.chat(1, 2)
    memory.do(memory.store.rename, 3, "Carol")
    memory.do(memory.store.add_member, chat, 3, 1)
    sent = memory.say(chat, 1, "Привет!", "k")
    memory.do(memory.store.mark_read, 2, sent.message.id)
    memory.do(memory.store.remove_member, chat, 3, 3)
    told = [event.frame for event in memory.hub.tail]
    after = memory.again()
    # A chat_added is told as the chat is now: that one is read from the log.
    assert [event.frame for event in after.hub.tail] == told[4:]
    assert (after.hub.head, after.hub.in_tail(4), after.hub.in_tail(3)) == (
        7,
        True,
        False,
    )
    assert after.store.epoch == memory.store.epoch
    assert after.sit(2, cursor=0).seqs() == [2, 3, 5, 6, 7]
    last = after.again(tail_events=2)
    assert [event.frame for event in last.hub.tail] == told[5:]
    last.store.close()


def test_a_new_database_has_an_empty_log_and_everybody_is_up_to_date(
    memory: Memory,
) -> None:
    assert (memory.hub.tail, memory.hub.head, memory.hub.in_tail(0)) == ([], 0, True)
    assert memory.sit(1, cursor=0).heard() == []


def test_one_user_s_connections_are_bounded() -> None:
    with memory_with(connections_per_user=2) as memory:
        seats = [memory.enter(1), memory.enter(1)]
        refused = MemorySeat(memory.settings).seat
        assert not memory.hub.enter(refused, 1, 0)
        assert (memory.hub.seats, len(memory.hub.people[1].seats)) == (2, 2)
        memory.enter(2)
        memory.hub.leave(seats[0].seat)
        assert memory.hub.enter(refused, 1, 0)


def test_nothing_is_left_of_who_has_left(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    seats = [memory.sit(1), memory.sit(1), memory.sit(2)]
    for made in seats:
        memory.hub.leave(made.seat)
    memory.say(chat, 1)
    assert (memory.hub.people, memory.hub.rooms, memory.hub.seats) == ({}, {}, 0)
    assert [made.seqs() for made in seats] == [[], [], []]


def test_a_page_that_comes_for_who_has_left_puts_him_into_no_room(
    memory: Memory,
) -> None:
    memory.chat(1, 2)
    made = memory.enter(2)
    memory.hub.know(made.seat.person, memory.greeting(2).joined)
    page = memory.store.events_after(memory.store._writer, 2, 0, memory.hub.head, 9)
    memory.hub.leave(made.seat)
    memory.hub.give_page(made.seat, page)
    assert page.cursor == memory.hub.head
    assert (made.seat.live, memory.hub.rooms) == (False, {})


def test_changes_that_come_while_the_chats_are_read_are_not_missed(
    memory: Memory,
) -> None:
    chats, store = [memory.chat(1, 2), memory.chat(1, 2)], memory.store
    made = memory.enter(2)
    greeting = memory.greeting(2)  # read, and then the world moves on
    memory.do(store.remove_member, chats[0], 2, 2)
    third = memory.chat(1, 2)
    memory.do(store.remove_member, chats[1], 2, 2)
    memory.do(store.add_member, chats[1], 2, 1)
    memory.hub.know(made.seat.person, greeting.joined)
    assert made.seat.person.chats == {third: 7, chats[1]: 10}
    memory.catch_up(made)
    assert made.seqs() == [5, 7, 8, 10]
    assert memory.hub.rooms[third] == {made.seat}
    assert chats[0] not in memory.hub.rooms


def test_a_removal_that_was_read_before_it_is_published_is_no_surprise(
    memory: Memory,
) -> None:
    chat = memory.chat(1, 2)
    made = memory.enter(2)
    batch = memory.commit((memory.store.remove_member, chat, 2, 2))
    memory.hub.know(made.seat.person, memory.greeting(2).joined)
    memory.catch_up(made)
    memory.hub.publish(batch)
    assert (made.seqs(), made.seat.person.chats) == ([3], {})


def test_the_first_reading_of_a_person_s_chats_counts(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    seats = [memory.enter(2), memory.enter(2)]
    person = seats[0].seat.person
    memory.hub.know(person, {chat: 2})
    memory.do(memory.store.remove_member, chat, 2, 2)
    memory.hub.know(person, {chat: 2})  # read before, and late
    assert (person.chats, memory.hub.rooms) == ({}, {})


def test_who_has_gone_before_his_chats_were_read_is_in_no_room(memory: Memory) -> None:
    made = memory.enter(2)
    memory.hub.leave(made.seat)
    memory.hub.know(made.seat.person, {memory.chat(1, 2): 2})
    assert (memory.hub.rooms, memory.hub.people) == ({}, {})


def test_a_page_is_filtered_again_when_it_is_given(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    memory.say(chat, 1)
    made = memory.enter(2)
    made.seat.cursor = 0
    memory.hub.know(made.seat.person, memory.greeting(2).joined)
    page = memory.page(2)  # read, and then he is removed
    memory.do(memory.store.remove_member, chat, 2, None)
    memory.hub.give_page(made.seat, page)
    assert (made.seqs(), made.seat.cursor, made.seat.live) == ([2], 3, False)
    memory.catch_up(made)
    assert made.seqs() == [2, 4]


def test_typing_is_shown_to_the_other_members_who_are_live(memory: Memory) -> None:
    chat = memory.chat(1, 2, 3)
    own, live, busy = memory.sit(1), memory.sit(2), memory.sit(3)
    behind, stranger = memory.enter(3), memory.sit(4)
    busy.outbox.stuck = True
    busy.outbox.push(b"")
    busy.outbox.unsent = 1
    memory.hub.show_typing(1, chat, is_typing=True)
    memory.hub.show_typing(1, 99, is_typing=True)
    assert live.heard() == [
        {"type": "typing", "chat_id": chat, "user_id": 1, "is_typing": True}
    ]
    assert not any(made.heard() for made in (own, busy, behind, stranger))
    assert memory.count("event") == 3


# --- deadlines of a seat -------------------------------------------------------------


@pytest.fixture
def swept() -> MemorySeat:
    """A seat that is asked for a ping after 25 s of silence, to the second."""
    made = MemorySeat(Settings())
    made.seat.ping_after = 25.0
    return made


def test_a_ping_asks_who_is_silent_and_has_nothing_to_read(swept: MemorySeat) -> None:
    assert swept.seat.sweep(25.0, Settings()) is None
    assert swept.outbox.taken == []
    assert swept.seat.sweep(25.1, Settings()) is None
    assert swept.seat.sweep(30.0, Settings()) is None
    assert swept.outbox.taken == [chatd.PING_FRAME]


def test_who_does_not_answer_a_ping_is_silent(swept: MemorySeat) -> None:
    swept.seat.sweep(26.0, Settings())
    assert swept.seat.sweep(36.0, Settings()) is None
    assert swept.seat.sweep(36.1, Settings()) == "silent"


def test_any_byte_heard_answers_a_ping(swept: MemorySeat) -> None:
    swept.seat.sweep(26.0, Settings())
    swept.outbox.heard_at = 30.0
    assert [swept.seat.sweep(now, Settings()) for now in (37.0, 55.0, 55.1)] == [
        None
    ] * 3
    assert len(swept.outbox.taken) == 2


def test_while_bytes_wait_only_a_stall_judges(swept: MemorySeat) -> None:
    swept.seat.sweep(26.0, Settings())
    swept.outbox.unsent = 1
    swept.outbox.moved_at = 30.0
    assert [swept.seat.sweep(now, Settings()) for now in (38.0, 40.0)] == [None, None]
    assert swept.seat.sweep(40.1, Settings()) == "stalled"
    swept.outbox.heard_at = 35.0  # it cannot read, but it is there
    assert swept.seat.sweep(45.0, Settings()) is None
    swept.outbox.drain()
    assert swept.seat.sweep(45.0, Settings()) is None
    assert len(swept.outbox.taken) == 1


def test_a_ping_before_bytes_waited_is_forgotten(swept: MemorySeat) -> None:
    swept.seat.sweep(26.0, Settings())
    swept.outbox.unsent, swept.outbox.moved_at = 1, 35.0
    swept.seat.sweep(35.0, Settings())
    swept.outbox.drain()
    assert swept.seat.sweep(37.0, Settings()) is None  # asked anew
    assert len(swept.outbox.taken) == 2


def test_who_is_kept_waiting_by_us_is_asked_nothing(swept: MemorySeat) -> None:
    swept.seat.sweep(26.0, Settings())
    swept.outbox.listening = False  # a command of its own takes its time
    assert [swept.seat.sweep(now, Settings()) for now in (37.0, 90.0)] == [None, None]
    swept.outbox.listening = True
    assert swept.seat.sweep(91.0, Settings()) is None
    assert len(swept.outbox.taken) == 2


def test_pings_are_spread_by_a_tenth() -> None:
    after = {MemorySeat(Settings()).seat.ping_after for _ in range(50)}
    assert len(after) > 10
    assert all(22.5 <= seconds <= 27.5 for seconds in after)


def test_a_token_s_end_is_told_once_and_closes_after_its_grace(
    swept: MemorySeat,
) -> None:
    swept.seat.token_ends = 1000.0
    for now in (939.9, 940.0, 950.0, 1000.0, 1024.9):
        swept.seat.sweep_token(now, Settings())
    assert swept.heard() == [{"type": "token_expiring", "expires_in": 60}]
    assert swept.ended == []
    swept.seat.sweep_token(1025.0, Settings())
    assert [code for code, _ in swept.ended] == [4401]


# --- the tasks -----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def memory_running(memory: Memory) -> AsyncIterator[None]:
    """The store's and the hub's tasks, as Server has them; stopped as it does."""
    batches, published = trio.open_memory_channel[chatd.Batch](8)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(memory.store.run, batches)
        nursery.start_soon(memory.hub.run, published)
        yield
        memory.store.finish()


async def memory_code(memory: Memory, work: MemoryWork) -> str:
    """The code of the Refusal that a work meets, after waiting for its answer."""
    with pytest.raises(Refusal) as caught:
        await memory.store.do(*work)
    return caught.value.code


async def test_what_waits_is_one_transaction(memory: Memory) -> None:
    chat, outcomes = memory.chat(1, 2), list[Any]()
    before = memory.stats.commits
    for _ in range(100):
        await memory.store.submit(
            memory_job(*memory.sends(chat, 1), done=outcomes.append)
        )
    async with memory_running(memory):
        await trio.testing.wait_all_tasks_blocked()
    assert (memory.stats.commits, memory.stats.batch_max) == (before + 1, 100)
    assert [outcome.message.n for outcome in outcomes] == [*range(1, 101)]


async def test_a_transaction_has_a_bound_of_jobs() -> None:
    with memory_with(batch_jobs=10) as memory:
        chat = memory.chat(1, 2)
        for _ in range(25):
            await memory.store.submit(memory_job(*memory.sends(chat, 1)))
        async with memory_running(memory):
            await trio.testing.wait_all_tasks_blocked()
        assert (memory.stats.commits, memory.stats.batch_max) == (4, 10)


async def test_who_waits_for_a_work_gets_its_outcome_when_it_is_published(
    memory: Memory,
) -> None:
    chat = memory.chat(1, 2)
    async with memory_running(memory):
        sent = await memory.store.do(*memory.sends(chat, 1))
        assert memory.hub.head == sent.message.id
        assert await memory_code(memory, memory.sends(99, 1)) == "not_found"
        assert memory.store.writing_since is None


async def test_a_work_is_done_though_its_caller_has_gone(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    with trio.CancelScope() as gone:
        async with trio.open_nursery() as nursery:
            sending = functools.partial(memory.store.do, *memory.sends(chat, 1))
            nursery.start_soon(sending)
            await trio.testing.wait_all_tasks_blocked()
            gone.cancel()
    async with memory_running(memory):
        pass
    assert memory.seqs(2) == [2, 3]


async def test_a_stop_finishes_what_was_submitted(memory: Memory) -> None:
    chat, outcomes = memory.chat(1, 2), list[Any]()
    for _ in range(3):
        await memory.store.submit(
            memory_job(*memory.sends(chat, 1), done=outcomes.append)
        )
    memory.store.finish()
    async with memory_running(memory):
        pass
    assert len(outcomes) == 3
    with pytest.raises(trio.ClosedResourceError):
        await memory.store.do(*memory.sends(chat, 1))


async def test_it_works_in_threads(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.store._run_sync = trio.to_thread.run_sync
    chat = memory.chat(1, 2)
    async with memory_running(memory), trio.open_nursery() as nursery:
        for _ in range(50):
            sending = functools.partial(memory.store.do, *memory.sends(chat, 1))
            nursery.start_soon(sending)
        for _ in range(50):
            query = memory.store.my_chats
            nursery.start_soon(memory.store.read, query, 1, memory.hub.head)
    assert memory.say(chat, 1).message.n == 51
    assert 1 <= len(memory.store._idle_readers) <= 4
    memory.store.close()


# --- failures ------------------------------------------------------------------------


def memory_is_sound(memory: Memory) -> None:
    """The log and the messages have no holes, and the hub knows all of it."""
    db = memory.store._writer
    seqs = [seq for (seq,) in db.execute("SELECT seq FROM event ORDER BY seq")]
    assert seqs == [*range(1, len(seqs) + 1)]
    assert memory.hub.head == memory.store.seq == len(seqs)
    ordinals: dict[int, list[int]] = {}
    for chat, n in db.execute("SELECT chat_id, n FROM message ORDER BY n"):
        ordinals.setdefault(chat, []).append(n)
    assert all(ns == [*range(1, len(ns) + 1)] for ns in ordinals.values())
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []


def memory_all_failed(batch: chatd.Batch) -> bool:
    outcomes = [outcome for _, outcome in batch.answers]
    codes = {getattr(outcome, "code", "done") for outcome in outcomes}
    return batch.events == [] and codes == {"storage_failed"}


@pytest.mark.parametrize("position", range(6))
def test_a_disk_that_is_full_at_any_job_fails_the_whole_batch(
    memory: Memory, position: int
) -> None:
    chat, store, ran = memory.chat(1, 2), memory.store, list[int]()
    made = memory.sit(2)

    def work(db: sqlite3.Connection, log: list[chatd.Event], i: int) -> chatd.Sent:
        ran.append(i)
        text = "x" * (50_000 if i == position else 3)
        return store.send_message(db, log, Send(chat, 1, text, f"k{i}"))

    works = [(work, i) for i in range(6)]
    (pages,) = store._writer.execute("PRAGMA page_count").fetchone()
    store._writer.execute(f"PRAGMA max_page_count = {pages + 2}")
    batch = memory.commit(*works)
    assert memory_all_failed(batch)
    assert {outcome.retry_after for _, outcome in batch.answers} == {2.0}
    assert ran == [*range(position + 1)]  # nothing more of it was run
    memory.hub.publish(batch)
    assert (store.degraded, store._writer.in_transaction) == (True, False)
    assert (made.seqs(), memory.count("message"), memory.stats.failed) == ([], 0, 6)
    store._writer.execute("PRAGMA max_page_count = 100000")
    assert store._probe() == ([], [])
    assert not store.degraded
    memory.hub.publish(memory.commit(*works))
    assert made.seqs() == [*range(3, 9)]
    memory_is_sound(memory)


def test_an_error_at_any_step_of_a_batch_fails_it_whole_and_leaves_nothing(
    memory: Memory,
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    works: list[MemoryWork] = [
        memory.sends(chat, 1, "hi", "k"),
        (store.mark_read, 2, 3),
        memory_spoiled(memory, chat),
        (store.create_chat, None, [1, 3]),
        (store.add_member, chat, 3, 1),
        (store.remove_member, chat, 2, None),
        memory.sends(chat, 9, service=True),
    ]
    steps, denied = itertools.count(1), 0

    def authorizer(*_: object) -> int:
        """SQLite asks it at each step of each statement; one is denied."""
        return sqlite3.SQLITE_DENY if next(steps) == denied else sqlite3.SQLITE_OK

    batch = chatd.Batch([], [])
    while not batch.events:
        steps, denied = itertools.count(1), denied + 1
        store._writer.set_authorizer(authorizer)
        batch = memory.commit(*works)
        store._writer.set_authorizer(None)
        if not batch.events:
            assert memory_all_failed(batch)
            assert (store.degraded, store._writer.in_transaction) == (True, False)
            assert store._probe() == ([], [])
            assert (store.seq, store.degraded) == (2, False)
            assert memory.count("event") == memory.count("member") == 2
    assert denied > 100
    memory.hub.publish(batch)
    assert [event.seq for event in batch.events] == [*range(3, 11)]
    memory_is_sound(memory)


class MemoryLiar(sqlite3.Connection):
    """A connection on a disk that fails at the end of a commit that is there.

    What a failed fsync does: the only part of SQLite that a test
    cannot bring about without a sick disk, so it is said here, after a real COMMIT.
    """

    lie = ""

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        cursor = super().execute(sql, parameters)
        if sql == "COMMIT" and self.lie:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorname, self.lie = self.lie, ""
            raise error
        return cursor


def memory_liar(memory: Memory, lie: str) -> None:
    """Let the next commit be a failed one that is there all the same."""
    memory.store._writer.close()
    made = sqlite3.connect(
        memory.settings.db,
        isolation_level=None,
        check_same_thread=False,
        factory=MemoryLiar,
    )
    made.lie = lie
    memory.store._writer = made


@pytest.mark.parametrize("lie", ["SQLITE_FULL", "SQLITE_IOERR_FSYNC"])
async def test_a_failed_commit_that_is_there_is_published_before_anything_else(
    memory: Memory, lie: str, autojump_clock: trio.testing.MockClock
) -> None:
    chat = memory.chat(1, 2)
    made = memory.sit(2)
    memory_liar(memory, lie)
    async with memory_running(memory):
        work = memory.sends(chat, 1, "once", "k")
        assert await memory_code(memory, work) == "storage_failed"
        assert (memory.store.degraded, memory.hub.head, made.seqs()) == (True, 2, [])
        assert await memory_code(memory, work) == "storage_failed"
        await trio.sleep(memory.settings.probe_seconds + 0.1)
        assert (memory.store.degraded, memory.hub.head, made.seqs()) == (False, 3, [3])
        again = await memory.store.do(*work)
        assert (again.duplicate, again.message.id) == (True, 3)
        assert (await memory.store.do(*memory.sends(chat, 1))).message.n == 2
    assert [message["message"]["content"] for message in made.heard()] == ["once", "hi"]
    memory_is_sound(memory)


async def test_all_kinds_of_events_are_found_after_a_failed_commit(
    memory: Memory,
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    made = memory.sit(2)
    memory_liar(memory, "SQLITE_FULL")
    batch = memory.commit(
        memory.sends(chat, 1, "hi", "k"),
        (store.mark_read, 2, 3),
        (store.create_chat, "new", [1, 2]),
        (store.add_member, chat, 3, 1),
        (store.remove_member, chat, 1, 1),
    )
    assert memory_all_failed(batch)
    await trio.lowlevel.checkpoint()
    memory.hub.publish(store._probe())
    assert made.seqs() == [3, 4, 6, 7, 9]
    assert {*memory.hub.rooms} == {chat, 2}
    memory_is_sound(memory)


async def test_while_the_disk_is_sick_writes_are_refused_at_once_and_readers_go_on(
    memory: Memory, autojump_clock: trio.testing.MockClock
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    work = memory.sends(chat, 1)
    async with memory_running(memory):
        store._writer.execute("PRAGMA query_only = ON")  # as a disk mounted read-only
        assert await memory_code(memory, work) == "storage_failed"
        started = trio.current_time()
        for _ in range(20):
            assert await memory_code(memory, work) == "storage_failed"
        assert trio.current_time() == started
        assert await store.read(store.my_chats, 1, memory.hub.head)
        await trio.sleep(60)
        assert store.degraded
        store._writer.execute("PRAGMA query_only = OFF")
        await trio.sleep(memory.settings.probe_seconds + 0.1)
        assert not store.degraded
        assert (await store.do(*work)).message.n == 1
    assert memory.stats.failed == 21
    memory_is_sound(memory)


async def test_a_stop_while_the_disk_is_sick_is_a_stop(
    memory: Memory, autojump_clock: trio.testing.MockClock
) -> None:
    work = memory.sends(memory.chat(1, 2), 1)
    async with memory_running(memory):
        memory.store._writer.execute("PRAGMA query_only = ON")
        assert await memory_code(memory, work) == "storage_failed"
    assert trio.current_time() < 5


@contextlib.contextmanager
def memory_no_growth(path: Path) -> Iterator[None]:
    """No file may grow past the size of this one: a real I/O error, for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_after_an_io_error_the_file_is_opened_anew_and_three_in_a_row_end_it(
    memory: Memory,
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    for n in (1, 2):  # two errors, and it is well again: they are counted from 0
        memory_liar(memory, "SQLITE_IOERR_WRITE")
        sick = store._writer
        assert memory_all_failed(memory.commit(memory.sends(chat, 1)))
        assert store._writer is not sick
        memory_liar(memory, "SQLITE_IOERR_WRITE")
        assert store._probe() == ([], [])
        assert store.degraded
        found = store._probe()
        assert [event.kind for event in found.events] == ["new_message"]
        memory.hub.publish(found)
        assert (store.degraded, store.seq) == (False, 2 + n)
    for _ in range(2):
        memory_liar(memory, "SQLITE_IOERR_WRITE")
        store._probe()
    memory_liar(memory, "SQLITE_IOERR_WRITE")
    said = usage_error_of(store._probe)
    assert str(memory.settings.db) in said
    assert "3 times in a row" in said
    memory_is_sound(memory)


def test_a_limit_that_sqlite_takes_for_a_sick_disk_is_a_full_one(
    memory: Memory,
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    work = memory.sends(chat, 1, "x" * 100_000)
    with memory_no_growth(memory.settings.db.with_name("chatd.db-wal")):
        assert memory_all_failed(memory.commit(work))
        for _ in range(4):  # it does not end, and it does not say that it is well
            assert store._probe() == ([], [])
            assert store.degraded
    assert store._probe() == ([], [])
    assert not store.degraded
    assert memory.do(*work).message.content == "x" * 100_000
    memory_is_sound(memory)


@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_a_file_taken_away_is_noticed_before_the_ack(
    memory: Memory, suffix: str
) -> None:
    chat = memory.chat(1, 2)
    memory.settings.db.with_name(f"chatd.db{suffix}").unlink()
    said = usage_error_of(memory.commit, memory.sends(chat, 1))
    assert "removed or replaced" in said


def test_a_file_that_cannot_be_opened_anew_ends_it(memory: Memory) -> None:
    chat, store = memory.chat(1, 2), memory.store
    aside = memory.settings.db.with_name("aside")
    memory_liar(memory, "SQLITE_IOERR_FSYNC")
    memory.settings.db.rename(aside)
    said = usage_error_of(memory.commit, memory.sends(chat, 1))
    assert str(memory.settings.db) in said
    aside.rename(memory.settings.db)
    store._writer = chatd.open_database(memory.settings.db, readonly=False)


def test_a_large_new_chat_ends_its_transaction_and_the_others_come_next(
    tmp_path: Path,
) -> None:
    memory = Memory(tmp_path, batch_events=3)
    create = memory.store.create_chat
    works = [(create, None, [1, 2, 3]), (create, None, [1]), (create, None, [2])]
    batch = memory.commit(*works)
    assert (len(batch.answers), len(batch.events)) == (1, 3)
    memory.hub.publish(batch)
    assert len(memory.commit(*works[1:]).answers) == 2
    memory.store.close()


async def test_jobs_behind_a_large_new_chat_are_all_answered(tmp_path: Path) -> None:
    memory = Memory(tmp_path, batch_events=3)
    async with memory_running(memory), trio.open_nursery() as nursery:
        for users in ([1, 2, 3], [1], [2], [4, 5, 6], [7]):
            nursery.start_soon(memory.store.do, memory.store.create_chat, None, users)
    assert (memory.count("chat"), memory.hub.head) == (5, 9)
    memory.store.close()


def test_a_link_to_a_database_has_the_same_lock(tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(tmp_path / "chatd.db")
    with chatd.locked(tmp_path / "chatd.db"):
        again = contextlib.ExitStack()
        assert "in use by process" in usage_error_of(
            again.enter_context, chatd.locked(link)
        )


def test_a_missing_folder_is_named_before_the_lock(tmp_path: Path) -> None:
    context = contextlib.ExitStack()
    missing = chatd.locked(tmp_path / "none" / "chatd.db")
    said = usage_error_of(context.enter_context, missing)
    assert f"there is no folder {tmp_path / 'none'}" in said


def test_another_writer_is_a_failure_and_no_harm(memory: Memory) -> None:
    chat, store = memory.chat(1, 2), memory.store
    store._writer.execute("PRAGMA busy_timeout = 0")
    other = sqlite3.connect(memory.settings.db, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert memory_all_failed(memory.commit(memory.sends(chat, 1)))
    assert store._probe() == ([], [])
    assert store.degraded
    other.close()
    assert store._probe() == ([], [])
    assert memory.say(chat, 1).message.n == 1
    memory_is_sound(memory)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_removed_or_replaced_ends_it_before_a_lie(
    memory: Memory, replaced: bool
) -> None:
    chat, db = memory.chat(1, 2), memory.settings.db
    copy = db.with_name("copy")
    copy.write_bytes(db.read_bytes())
    if replaced:
        copy.replace(db)
    else:
        db.unlink()
    said = usage_error_of(memory.commit, memory.sends(chat, 1))
    assert said == f"database {db}: removed or replaced under us"
    said = usage_error_of(memory.store._probe)
    assert "removed or replaced" in said


async def test_a_removed_file_ends_the_store_s_task(memory: Memory) -> None:
    work = memory.sends(memory.chat(1, 2), 1)
    memory.settings.db.unlink()
    with pytest.RaisesGroup(UsageError, flatten_subgroups=True):
        async with memory_running(memory):
            await memory.store.do(*work)


def memory_spoil(path: Path, table: str) -> None:
    """Overwrite the root page of a table or index with garbage."""
    db = sqlite3.connect(path)
    (page,) = db.execute(
        "SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)
    ).fetchone()
    (size,) = db.execute("PRAGMA page_size").fetchone()
    db.close()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)


def test_a_corrupt_table_refuses_its_readers_and_its_writers(memory: Memory) -> None:
    chat = memory.chat(1, 2)
    memory.store.close()
    memory_spoil(memory.settings.db, "member")
    after = Memory(memory.settings.db.parent, check_bytes=1)
    assert refusal_of(after.my_chats, 1).code == "storage_failed"
    assert memory_all_failed(after.commit(after.sends(chat, 1)))
    assert after.store.degraded
    assert after.read(after.store.users) == [chatd.User(1, None), chatd.User(2, None)]
    assert after.stats.errors["DatabaseError"] == 1
    after.store.close()


def test_without_a_file_there_is_no_reading(memory: Memory) -> None:
    memory.settings.db.unlink()
    assert refusal_of(memory.my_chats, 1).code == "storage_failed"


# --- opening -------------------------------------------------------------------------


def memory_open(path: Path, steps: list[str] | None = None) -> Store:
    return memory_store(Settings(db=path), Stats(), steps=steps)


def memory_steps(*more: str) -> list[str]:
    """schema.sql's steps, and more of them."""
    return [*chatd.schema_steps(), *more]


def memory_version(path: Path) -> tuple[int, set[str]]:
    db = sqlite3.connect(path)
    (version,) = db.execute("PRAGMA user_version").fetchone()
    names = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
    db.close()
    return version, names


def test_an_older_schema_is_brought_up_and_loses_nothing(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    chat = memory.chat(1, 2)
    memory.say(chat, 1)
    memory.store.close()
    steps = memory_steps("CREATE TABLE more (x) STRICT;".replace("x", "x INTEGER"))
    store = memory_open(memory.settings.db, steps)
    assert (store.seq, store.epoch) == (3, memory.store.epoch)
    store.close()
    version, names = memory_version(memory.settings.db)
    assert (version, "more" in names) == (2, True)
    said = usage_error_of(memory_open, memory.settings.db)  # and back is refused
    assert "newer chatd (schema 2, this one knows 1)" in said
    assert "install" in said


@pytest.mark.parametrize(
    "step",
    [
        "CREATE TABLE more (x INTEGER); CREATE TABLE more (x INTEGER);",
        "CREATE TABLE more (x INTEGER); not SQL;",
        "CREATE TABLE more (x INTEGER); INSERT INTO meta VALUES ('epoch', 'x');",
    ],
)
def test_a_failing_migration_changes_nothing(tmp_path: Path, step: str) -> None:
    memory = Memory(tmp_path)
    memory.chat(1, 2)
    memory.store.close()
    before = memory_version(memory.settings.db)
    said = usage_error_of(memory_open, memory.settings.db, memory_steps(step))
    assert str(memory.settings.db) in said
    assert memory_version(memory.settings.db) == before
    assert before[0] == 1
    assert memory_open(memory.settings.db).seq == 2


def test_a_migration_runs_only_the_steps_that_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    one, two, three = (f"CREATE TABLE t{i} (x INTEGER);" for i in (1, 2, 3))
    memory_open(path, memory_steps(one)).close()
    memory_open(path, memory_steps(one, two, three)).close()
    assert memory_version(path)[0] == 4
    assert {"t1", "t2", "t3"} < memory_version(path)[1]


def test_the_schema_has_one_step_a_version() -> None:
    text = Path(chatd.__file__).with_name("schema.sql").read_text("utf-8")
    versions = re.findall(r"(?m)^-- version (\d+)$", text)
    assert versions == [str(n) for n in range(1, len(chatd.schema_steps()) + 1)]


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE notes (x)")
    db.close()
    assert "belongs to another program" in usage_error_of(memory_open, path)
    assert memory_version(path) == (0, {"notes"})


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_file_of_another_program_is_left_as_it_was(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "other.db"
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA journal_mode = {mode}")
    db.execute("CREATE TABLE notes (x)")
    db.close()
    before = path.read_bytes()
    usage_error_of(memory_open, path)
    assert path.read_bytes() == before
    assert mode == "wal" or [*tmp_path.iterdir()] == [path]


def test_a_file_that_is_no_database_is_refused_and_left_as_it_was(
    tmp_path: Path,
) -> None:
    path = tmp_path / "notes.txt"
    for text in (b"Buy milk.\n" * 500, b"SQLite format 3\0" + b"\xff" * 5000):
        path.write_bytes(text)
        assert str(path) in usage_error_of(memory_open, path)
        assert path.read_bytes() == text


def test_a_connection_that_cannot_be_used_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"Buy milk.\n" * 500)
    with pytest.raises(sqlite3.DatabaseError):
        chatd.open_database(path, readonly=False)
    with pytest.raises(sqlite3.OperationalError):
        chatd.open_database(tmp_path / "none", readonly=True)


def test_what_a_killed_process_left_in_its_wal_is_read_at_the_start(
    memory: Memory, tmp_path: Path
) -> None:
    chat = memory.chat(1, 2)
    memory.say(chat, 1, "once", "k")
    (tmp_path / "copy").mkdir()
    for name in ("chatd.db", "chatd.db-wal"):  # as they are when it is killed
        (tmp_path / "copy" / name).write_bytes((tmp_path / name).read_bytes())
    after = Memory(tmp_path / "copy")
    assert (after.hub.head, after.seqs(2)) == (3, [2, 3])
    assert after.say(chat, 1, "once", "k").duplicate
    memory_is_sound(after)
    after.store.close()


def memory_resynced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Note of each file that we sync how much of it was written before, anew."""
    written: dict[int, int] = {}
    resynced: list[tuple[int, int]] = []
    pwrite, fsync = os.pwrite, os.fsync

    def noted_pwrite(fd: int, data: bytes, at: int) -> int:
        assert os.pread(fd, len(data), at) == data  # what is there already
        count = pwrite(fd, data, at)
        written[fd] = at + count
        return count

    def noted_fsync(fd: int) -> None:
        fsync(fd)
        resynced.append((os.fstat(fd).st_ino, written.pop(fd, 0)))

    monkeypatch.setattr(os, "pwrite", noted_pwrite)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    return resynced


def test_what_a_killed_process_may_not_have_synced_is_synced_at_the_start(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.say(memory.chat(1, 2), 1)
    (tmp_path / "copy").mkdir()
    for name in ("chatd.db", "chatd.db-wal"):
        (tmp_path / "copy" / name).write_bytes((tmp_path / name).read_bytes())
    wal = (tmp_path / "copy" / "chatd.db-wal").stat()
    resynced = memory_resynced(monkeypatch)
    after = Memory(tmp_path / "copy")
    assert resynced == [(wal.st_ino, wal.st_size)]
    assert after.hub.head == 3
    after.store.close()


def test_after_a_failed_sync_the_whole_log_of_changes_is_written_anew(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    memory_liar(memory, "SQLITE_IOERR_FSYNC")
    assert memory_all_failed(memory.commit(memory.sends(chat, 1)))
    resynced = memory_resynced(monkeypatch)
    assert len(store._probe().events) == 1
    wal = chatd.beside(memory.settings.db, "-wal").stat()
    assert resynced == [(wal.st_ino, wal.st_size)]


def test_a_probe_makes_room_by_folding_the_log_of_changes_into_the_file(
    memory: Memory,
) -> None:
    chat, store = memory.chat(1, 2), memory.store
    for _ in range(100):
        memory.say(chat, 1, "x" * 4000)
    with memory_no_growth(memory.settings.db.with_name("chatd.db-wal")):
        work = memory.sends(chat, 1, "x" * 4000)
        assert memory_all_failed(memory.commit(work))
        assert store.degraded
        assert store._probe() == ([], [])
        assert not store.degraded
        assert memory.do(*work).message.n == 101
    memory_is_sound(memory)


def test_a_log_of_changes_that_cannot_be_written_anew_is_a_disk_still_sick(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sick(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    chat, store = memory.chat(1, 2), memory.store
    memory_liar(memory, "SQLITE_IOERR_FSYNC")
    assert memory_all_failed(memory.commit(memory.sends(chat, 1)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", sick)
        assert store._probe() == ([], [])
        assert store.degraded
    assert len(store._probe().events) == 1
    assert not store.degraded


def test_a_path_where_no_file_can_be_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "a.db"):
        assert f"database {path}: " in usage_error_of(memory_open, path)


def test_a_corrupt_log_is_refused_at_the_start_with_a_sentence(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.chat(1, 2)
    memory.store.close()
    memory_spoil(memory.settings.db, "event")
    assert str(memory.settings.db) in usage_error_of(memory_open, memory.settings.db)


@contextlib.contextmanager
def memory_as_nobody(folder: Path) -> Iterator[None]:
    """Be a user whom file modes bind: root is not one."""
    user = os.geteuid()
    if user == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_file_that_may_not_be_written_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.db"
        memory_open(path).close()
        path.chmod(0o400)
        with memory_as_nobody(path.parent):
            assert "ermission denied" in usage_error_of(memory_open, path)


def test_two_new_files_have_two_epochs_and_a_file_keeps_its_own(tmp_path: Path) -> None:
    one, two = (memory_open(tmp_path / name) for name in ("a.db", "b.db"))
    assert one.epoch != two.epoch
    assert re.fullmatch(r"[0-9a-z]{4,16}", one.epoch)
    for store in (one, two):
        store.close()
    again = memory_open(tmp_path / "a.db")
    assert (again.epoch, again.seq) == (one.epoch, 0)
    again.close()


# --- in any interleaving -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MemoryEvent:
    """An event as the model has it: who may see it."""

    kind: str
    chat: int
    to_chat: bool
    to_user: int | None = None


class MemoryModel:
    """The chat as one would write it naively: lists, and the rule of visibility.

    It knows nothing of the store, so the two can disagree.
    """

    def __init__(self, large_chat: int = 50) -> None:
        self.large_chat = large_chat
        self.log: list[MemoryEvent] = []
        self.members: dict[int, dict[int, int]] = {}  # chat: user: joined_seq
        self.read: dict[tuple[int, int], int] = {}  # chat, user: read_n
        self.messages: dict[int, list[int]] = {}  # chat: seqs
        # What self.members was when the log had so many events.
        self.at: list[dict[int, dict[int, int]]] = [{}]

    def _log(self, event: MemoryEvent) -> int:
        self.log.append(event)
        self.at.append({chat: dict(users) for chat, users in self.members.items()})
        return len(self.log)

    def sees(self, user: int, seq: int, as_of: int) -> bool:
        """Is the event of this seq visible to a user, when the log had as_of events?"""
        event = self.log[seq - 1]
        joined = self.at[as_of].get(event.chat, {}).get(user)
        in_chat = event.to_chat and joined is not None and seq > joined
        return event.to_user == user or in_chat

    def visible(self, user: int, after: int, upto: int) -> list[int]:
        seqs = range(after + 1, upto + 1)
        return [seq for seq in seqs if self.sees(user, seq, upto)]

    # Each returns whether it is allowed.

    def create(self, *users: int) -> bool:
        chat = len(self.members) + 1
        self.members[chat], self.messages[chat] = {}, []
        for user in sorted({*users}):
            self.members[chat][user] = len(self.log) + 1
            self.read[chat, user] = 0
            self._log(MemoryEvent("chat_added", chat, to_chat=False, to_user=user))
        return True

    def send(self, chat: int, user: int) -> bool:
        if user not in self.members.get(chat, {}):
            return False
        seq = self._log(MemoryEvent("new_message", chat, to_chat=True))
        self.messages[chat].append(seq)
        self.read[chat, user] = len(self.messages[chat])
        return True

    def mark(self, user: int, seq: int) -> bool:
        event = self.log[seq - 1] if 1 <= seq <= len(self.log) else None
        if event is None or event.kind != "new_message":
            return False
        if user not in self.members[event.chat]:
            return False
        n = self.messages[event.chat].index(seq) + 1
        if n > self.read[event.chat, user]:
            self.read[event.chat, user] = n
            large = len(self.members[event.chat]) > self.large_chat
            to_user = user if large else None
            self._log(MemoryEvent("message_read", event.chat, not large, to_user))
        return True

    def add(self, chat: int, user: int) -> bool:
        if chat not in self.members:
            return False
        if user not in self.members[chat]:
            self._log(MemoryEvent("member_added", chat, to_chat=True))
            self.members[chat][user] = len(self.log) + 1
            self.read[chat, user] = len(self.messages[chat])
            self._log(MemoryEvent("chat_added", chat, to_chat=False, to_user=user))
        return True

    def remove(self, chat: int, user: int) -> bool:
        if user not in self.members.get(chat, {}):
            return False
        del self.members[chat][user]
        self._log(MemoryEvent("member_removed", chat, to_chat=True, to_user=user))
        return True


MEMORY_USERS = (1, 2, 3)

# Words of the plays below: a work is its name and two small numbers.
memory_works = st.tuples(
    st.sampled_from(["send"] * 6 + ["mark"] * 3 + ["add", "add", "remove", "remove"]),
    st.integers(1, 3),
    st.integers(1, 3),
)


def memory_work(
    memory: Memory, model: MemoryModel, word: tuple[str, int, int]
) -> tuple[MemoryWork, bool]:
    """What the store is to do, and whether the model, which does it, allows it."""
    name, chat, user = word
    store = memory.store
    match name:
        case "send":
            return memory.sends(chat, user), model.send(chat, user)
        case "mark":  # the last message of the chat, or the one before
            seq = [0, *model.messages.get(chat, [])][-1 - len(model.log) % 2 :][0]
            return (store.mark_read, user, seq), model.mark(user, seq)
        case "add":
            return (store.add_member, chat, user, None), model.add(chat, user)
        case _:
            return (store.remove_member, chat, user, None), model.remove(chat, user)


def memory_commit(
    memory: Memory, model: MemoryModel, words: list[tuple[str, int, int]]
) -> chatd.Batch:
    """Do some works in one transaction, and hold its events against the model's."""
    before = len(model.log)
    todo = [memory_work(memory, model, word) for word in words]
    batch = memory.commit(*[work for work, _ in todo])
    refused = [isinstance(outcome, Refusal) for _, outcome in batch.answers]
    assert refused == [not allowed for _, allowed in todo]
    assert [
        MemoryEvent(event.kind, event.chat_id, event.to_chat, event.to_user)
        for event in batch.events
    ] == model.log[before:]
    return batch


memory_property = hypothesis.settings(
    deadline=None,
    max_examples=int(os.environ.get("CHATD_TEST_EXAMPLES", "60")),
    suppress_health_check=[HealthCheck.too_slow],
)


@memory_property
@given(st.lists(st.lists(memory_works, max_size=4), max_size=12))
def test_unread_is_the_last_n_minus_the_read_n_in_any_interleaving(
    batches: list[list[tuple[str, int, int]]],
) -> None:
    with memory_with() as memory:
        model = MemoryModel()
        for users in ((1, 2), (2, 3)):
            model.create(*users)
            memory.chat(*users)
        for words in batches:
            batch = memory_commit(memory, model, words)
            stale = {user: memory.my_chats(user) for user in MEMORY_USERS}
            for chats in stale.values():  # of before, and still sound
                assert all(0 <= c.unread == c.last_n - c.read_n for c in chats)
            memory.hub.publish(batch)
            for user in MEMORY_USERS:
                marks = {
                    chat: (len(model.messages[chat]), model.read[chat, user])
                    for chat, users in model.members.items()
                    if user in users
                }
                greeting = memory.greeting(user).marks
                assert marks == {
                    int(chat): (mark.last_n, mark.read_n)
                    for chat, mark in greeting.items()
                }
                assert {chat: last - read for chat, (last, read) in marks.items()} == {
                    chat.id: chat.unread for chat in memory.my_chats(user)
                }


class MemoryClient:
    """A user who keeps a cursor, and hops between sockets and the poll."""

    def __init__(self, user: int) -> None:
        self.user = user
        self.upto = 0  # the head when it took its seat
        self.first: int | None = None  # its first cursor
        self.cursor: int | None = None
        self.seqs: list[int] = []
        self.sits: MemorySeat | None = None
        self.greeting: chatd.Greeting | None = None  # read, not given yet
        self.page: chatd.Page | None = None  # the same
        self.moments = range(0)  # what the log may have been when it was read
        self.known = False  # `connected` was said
        self.heard = 0  # of its outbox


class MemoryPlay:
    """A store, a hub and clients; each method is one step that a scheduler can take.

    After each step: what a client was given just now it may see, as of the hub's head,
    it comes after all that it had, and no cursor is ahead of the hub.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.hub = memory.hub
        self.model = MemoryModel(memory.settings.large_chat)
        self.waiting: list[chatd.Batch] = []
        self.clients = [MemoryClient(user) for user in (*MEMORY_USERS, 2)]
        self.before = 0  # the hub's head before this step
        for users in ((1, 2), (1, 2, 3)):
            self.model.create(*users)
            memory.chat(*users)

    def commit(self, words: list[tuple[str, int, int]]) -> None:
        self.waiting.append(memory_commit(self.memory, self.model, words))

    def ask(self, who: int) -> None:
        """A client on a socket sends; its ack is to come after its event."""
        client = self.clients[who]
        if client.sits is None or not client.known:
            return
        if not self.model.send(1, client.user):
            return
        job = memory_asker(client.sits, self.memory.sends(1, client.user))
        self.waiting.append(self.memory.store._transact([job]))

    def publish(self) -> None:
        if self.waiting:
            self.hub.publish(self.waiting.pop(0))

    def sit(self, who: int) -> None:
        client = self.clients[who]
        if client.sits is None and client.page is None:
            client.sits = self.memory.enter(client.user)
            client.heard, client.known = 0, False
            client.upto = self.hub.head

    def read(self, who: int) -> None:
        """Begin what is next for this client: its chats, or a page."""
        client = self.clients[who]
        memory, head = self.memory, self.hub.head
        if client.page is not None or client.greeting is not None:
            return
        if client.sits is None:  # a poll
            if client.cursor is None:
                client.first = client.cursor = head
            client.page = memory.page(client.user, client.cursor, 2)
            client.moments = range(head, len(self.model.log) + 1)
        elif not client.known:
            start = client.upto if client.cursor is None else client.cursor
            client.greeting = memory.read(
                memory.store.greeting, client.user, client.upto, start
            )
        elif self._hungry(client, in_tail=False):
            client.page = memory.page(client.user, client.sits.seat.cursor, 2)

    def give(self, who: int) -> None:
        """End what was begun; or give a helping of the tail."""
        client = self.clients[who]
        sits = client.sits
        if client.page is not None:
            page, client.page = client.page, None
            assert page.cursor <= self.hub.head
            if sits is not None:
                self.hub.give_page(sits.seat, page)
            else:
                self._take(client, [event.seq for event in page.events], client.moments)
                client.cursor = page.cursor
        elif client.greeting is not None and sits is not None:
            greeting, client.greeting = client.greeting, None
            self.hub.know(sits.seat.person, greeting.joined)
            if client.cursor is None:
                client.first = client.cursor = client.upto
            assert client.cursor <= self.hub.head
            sits.seat.cursor, client.known = client.cursor, True
            if self.hub.in_tail(sits.seat.cursor):
                self.hub.feed(sits.seat)
        elif sits is not None and self._hungry(client, in_tail=True):
            self.hub.feed(sits.seat)

    def _hungry(self, client: MemoryClient, *, in_tail: bool) -> bool:
        """Is it behind, has it an empty outbox, and is what it lacks in the tail?"""
        if client.sits is None or not client.known or client.sits.outbox.waiting:
            return False
        seat = client.sits.seat
        return not seat.live and self.hub.in_tail(seat.cursor) is in_tail

    def stick(self, who: int) -> None:
        """Its peer reads nothing from here on; then it reads all of it."""
        sits = self.clients[who].sits
        if sits is not None and sits.outbox.stuck:
            sits.outbox.drain()
        elif sits is not None:
            sits.outbox.stuck, sits.outbox.bound = True, 1

    def leave(self, who: int) -> None:
        client = self.clients[who]
        if client.sits is not None:
            self.hub.leave(client.sits.seat)
            client.sits = client.greeting = client.page = None

    def hop(self, who: int) -> None:
        """From the socket to the poll, or back."""
        (self.sit if self.clients[who].sits is None else self.leave)(who)

    def next(self, who: int) -> None:
        """End what this client began, or begin what is next."""
        client = self.clients[who]
        begun = client.page is not None or client.greeting is not None
        fed = self._hungry(client, in_tail=True)
        (self.give if begun or fed else self.read)(who)

    def step(self, name: str, argument: Any) -> None:
        self.before = self.hub.head
        getattr(self, name)(argument) if name != "publish" else self.publish()
        for client in self.clients:
            self._listen(client)
        rooms: dict[int, set[chatd.Seat]] = {}
        for person in self.hub.people.values():
            for seat in person.seats:
                for chat in person.chats if seat.live else ():
                    rooms.setdefault(chat, set()).add(seat)
        assert self.hub.rooms == rooms

    def _listen(self, client: MemoryClient) -> None:
        """Read what was pushed in this step, and keep the cursor as a client does."""
        if client.sits is None:
            return
        news = client.sits.outbox.taken[client.heard :]
        client.heard += len(news)
        for message in (m for data in news for m in memory_frames(data)):
            if "seq" in message:
                self._take(client, [message["seq"]])
                client.cursor = message["seq"]
            else:  # an ack: its event was here, if it is visible at all
                seq = message["message_id"]
                assert seq in client.seqs or not self.model.sees(
                    client.user, seq, self.hub.head
                )

    def _take(
        self, client: MemoryClient, seqs: list[int], polled: range = range(0)
    ) -> None:
        for seq in seqs:
            assert seq > max([client.first or 0, *client.seqs[-1:]])
            assert seq <= self.hub.head
            # As of now; a live event as of itself; a poll as of when it was read.
            live = [seq] if seq > self.before else []
            moments = polled or [self.hub.head, *live]
            assert any(self.model.sees(client.user, seq, at) for at in moments)
            client.seqs.append(seq)

    def finish(self) -> None:
        """Publish the rest, let all read to the end, and look for what is missing."""
        while self.waiting:
            self.step("publish", None)
        for who, client in enumerate(self.clients):
            if client.sits is not None and client.sits.outbox.stuck:
                self.step("stick", who)
            for name in ("next", "sit") * 100:
                if client.sits is not None and client.sits.seat.live:
                    break
                self.step(name, who)
            assert client.sits is not None
            assert client.sits.seat.live
            assert client.sits.seat.held == []
            assert client.sits.seat.slots.value == self.memory.settings.unanswered
            assert client.first is not None
            missing = {*self.model.visible(client.user, client.first, self.hub.head)}
            assert missing <= {*client.seqs}


memory_who = st.integers(0, 3)
memory_plays = st.lists(
    st.one_of(
        *[st.tuples(st.just("commit"), st.lists(memory_works, min_size=1, max_size=4))]
        * 4,
        *[st.tuples(st.just("publish"), st.none())] * 3,
        *[
            st.tuples(st.just(name), memory_who)
            for name in (*["next"] * 4, "hop", "ask", "ask", "stick")
        ],
    ),
    min_size=40,
    max_size=60,
)


@pytest.mark.parametrize("tail_events", [2, 1000])
@memory_property
@given(play=memory_plays)
def test_a_client_gets_every_visible_event_once_and_in_order_in_any_interleaving(
    tail_events: int, play: list[tuple[str, Any]]
) -> None:
    changes = {"tail_events": tail_events, "large_chat": 2, "page_events": 2}
    with memory_with(**changes, page_bytes=700) as memory:
        stage = MemoryPlay(memory)
        for who in (0, 1, 1, 1, 2, 2):  # one has entered, one is live, one is between
            stage.step("next" if stage.clients[who].sits else "sit", who)
        for name, argument in play:
            stage.step(name, argument)
        stage.finish()
        memory_is_sound(memory)


# =====================================================================================
# WIRES: Outbox, Guard, Session, Http, Server
#
# A real Server, with a real Store that works inline, behind socket pairs, under virtual
# time: the clock jumps when everybody waits, so a stall of ten seconds takes none, and
# every deadline is asserted. @wires makes the house that a test gets, and when the test
# is over it stops it: each test thus also claims that a stop ends everything in time,
# that no seat is left behind, and that the bulkhead had nothing to catch.
#
# WiresPeer is trio-websocket's own client. WiresRaw speaks in bytes, for what a good
# client does not do, and for HTTP.
# =====================================================================================

P = ParamSpec("P")
WiresFrame = dict[str, Any]
WIRES_SECRET = b"0123456789abcdef0123456789abcdef"
OFF = Rate(0, 0)
SMALL = 4096  # bytes the kernel is asked to hold; it takes a few thousand more
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class WiresDisk:
    """The Store's run_sync: inline, and slow when told so."""

    def __init__(self) -> None:
        self.turning = trio.Event()
        self.turning.set()
        self.holds_reads = False

    def hold(self, *, reads: bool = False) -> None:
        """Let no commit, or no read, happen until `go`."""
        self.turning = trio.Event()
        self.holds_reads = reads

    def go(self) -> None:
        self.turning.set()

    async def run_sync(
        self,
        function: Callable[..., Any],
        *args: Any,
        limiter: trio.CapacityLimiter | None = None,
    ) -> Any:
        await trio.lowlevel.checkpoint()
        one_writer = limiter is not None and limiter.total_tokens == 1
        if one_writer != self.holds_reads:
            await self.turning.wait()
        return function(*args)


class WiresListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts what it is offered: one end of a pair, or the kernel's no."""

    def __init__(self) -> None:
        self.offer, self._offered = trio.open_memory_channel[
            trio.SocketStream | OSError
        ](math.inf)

    async def accept(self) -> trio.SocketStream:
        offered = await self._offered.receive()
        if isinstance(offered, OSError):
            raise offered
        return offered

    async def aclose(self) -> None:
        self._offered.close()
        await trio.lowlevel.checkpoint()


class HttpAnswer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The error's code; its shape and its sentence are checked on the way."""
        error = self.json["error"]
        assert isinstance(error["message"], str), error
        assert error["message"], error
        return str(error["code"])


def wires_request(
    method: str, target: str, body: bytes | None = None, /, **headers: str
) -> bytes:
    """One request's bytes. Header names are given with _ for -."""
    lines = [f"{method} {target} HTTP/1.1"]
    headers = {"Host": "chat.example"} | headers
    if body is not None:
        headers["Content-Length"] = str(len(body))
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join((*lines, "", "")).encode("latin-1") + (body or b"")


def wires_upgrade(target: str, **changed: str) -> bytes:
    """A handshake's bytes; a header that is changed to nothing is left out."""
    headers = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec_WebSocket_Version": "13",
        "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
    } | changed
    given = {name: value for name, value in headers.items() if value}
    return wires_request("GET", target, None, **given)


def wires_frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, masked: bool = True
) -> bytes:
    """One frame of a client, with a mask of zeros."""
    first, mask, size = opcode | (0x80 if fin else 0), 0x80 if masked else 0, b""
    length = len(payload)
    if length > 125:
        size = struct.pack("!H", length)
        length = 126
    if len(payload) > 65535:
        size = struct.pack("!Q", len(payload))
        length = 127
    mask_key = bytes(4) if masked else b""
    return bytes((first, mask | length)) + size + mask_key + payload


def wires_close(code: int) -> bytes:
    return wires_frame(CLOSE, struct.pack("!H", code))


def wires_command(kind: str, **fields: Any) -> bytes:
    return wires_frame(TEXT, json.dumps({"type": kind, **fields}).encode())


def wires_frames(data: bytearray) -> Iterator[tuple[int, bytes]]:
    """Take the whole frames of a server off the front of data."""
    while len(data) >= 2:
        assert data[0] & 0x70 == 0, "reserved bits"
        assert data[0] & 0x80, "a fragment"
        assert data[1] < 128, "a server's frame is not masked"
        size, start = data[1], 2
        if size == 126:
            (size,), start = struct.unpack_from("!H", data, 2), 4
        elif size == 127:
            (size,), start = struct.unpack_from("!Q", data, 2), 10
        if len(data) < start + size:
            return
        opcode, payload = data[0] & 15, bytes(data[start : start + size])
        del data[: start + size]
        yield opcode, payload


@contextlib.contextmanager
def taking(least: float, most: float | None = None) -> Iterator[None]:
    """Claim how many virtual seconds the block takes."""
    started = trio.current_time()
    yield
    took = trio.current_time() - started
    assert least - 1e-6 <= took <= (least if most is None else most) + 1e-6


class WiresPeer:
    """A real client. Its library reads, answers pings, and keeps what was not heard."""

    def __init__(
        self, ws: trio_websocket.WebSocketConnection, stream: trio.SocketStream
    ) -> None:
        self.ws = ws
        self.stream = stream
        self.hello: WiresFrame = {}

    async def say(self, kind: str, **fields: Any) -> None:
        await self.ws.send_message(json.dumps({"type": kind, **fields}))

    async def hear(self, kind: str, within: float = 1.0) -> WiresFrame:
        """Get the next message, which must be of this type, and soon."""
        with trio.fail_after(within):
            heard: WiresFrame = json.loads(await self.ws.get_message())
        assert heard["type"] == kind, heard
        return heard

    async def ask(self, kind: str, **fields: Any) -> WiresFrame:
        """Say a command and get its answer, past any event."""
        await self.say(kind, ref="ask", **fields)
        while True:
            with trio.fail_after(1):
                heard: WiresFrame = json.loads(await self.ws.get_message())
            if heard.get("ref") == "ask":
                return heard

    async def refused(self, kind: str, **fields: Any) -> WiresFrame:
        """Say a command and get the error that it is answered with."""
        answer = await self.ask(kind, **fields)
        assert answer["type"] == "error", answer
        assert answer["message"]
        return answer

    async def hears_nothing(self, seconds: float = 1.0) -> None:
        with trio.move_on_after(seconds):
            pytest.fail(f"heard {await self.ws.get_message()!r}")

    async def end(self, within: float = 1.0) -> tuple[list[WiresFrame], int]:
        """Hear all that is left, and the close code; then hang up."""
        heard = []
        with trio.fail_after(within):
            with contextlib.suppress(trio_websocket.ConnectionClosed):
                while True:
                    heard.append(json.loads(await self.ws.get_message()))
        assert self.ws.closed is not None
        self.stream.socket.close()
        await wait_all_tasks_blocked()
        return heard, self.ws.closed.code

    async def leave(self, code: int = 1000) -> None:
        await self.ws.aclose(code)


class WiresRaw:
    """One connection, in bytes. It reads only while something is awaited."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.data = bytearray()
        self.informed: list[int] = []

    async def send(self, *parts: bytes) -> None:
        await self.stream.send_all(b"".join(parts))

    async def read(self, most: int = 65536) -> bytes:
        data = bytes(await self.stream.receive_some(most))
        self.data += data
        return data

    async def listen(self, seconds: float = 1.0) -> None:
        """Read what comes in so many seconds."""
        with trio.move_on_after(seconds):
            while await self.read():
                pass

    # --- HTTP ------------------------------------------------------------------------

    async def answer(self, method: str = "GET", within: float = 1.0) -> HttpAnswer:
        """Read one whole answer to a request of this method."""
        client = h11.Connection(h11.CLIENT)
        client.send(
            h11.Request(
                method=method,
                target="/",
                headers=[("Host", "x"), ("Upgrade", "x"), ("Connection", "upgrade")],
            )
        )
        client.send(h11.EndOfMessage())
        if self.data:
            client.receive_data(bytes(self.data))
        status, headers, body = 0, dict[str, str](), b""
        with trio.fail_after(within):
            while True:
                event = client.next_event()
                if event is h11.NEED_DATA:
                    client.receive_data(await self.read())
                elif isinstance(event, h11.Response | h11.InformationalResponse):
                    status = event.status_code
                    headers = {}
                    for name, value in event.headers:  # RFC 9110 5.3
                        had = headers.get(name.decode())
                        line = value.decode()
                        headers[name.decode()] = f"{had}, {line}" if had else line
                    if status == 100:
                        self.informed.append(status)
                    elif status == 101:
                        break
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    assert isinstance(event, h11.EndOfMessage), event
                    break
        self.data = bytearray(client.trailing_data[0])
        return HttpAnswer(status, headers, body)

    async def ask(
        self, method: str, target: str, body: Any = None, /, **headers: str
    ) -> HttpAnswer:
        """Send a request, the body as JSON, and read its answer."""
        encoded = None if body is None else json.dumps(body).encode()
        await self.send(wires_request(method, target, encoded, **headers))
        return await self.answer(method)

    async def ends(self, within: float = 1.0) -> bytes:
        """Read until the other side is at its end; return what came."""
        with trio.fail_after(within), contextlib.suppress(trio.BrokenResourceError):
            while await self.read():
                pass
        return bytes(self.data)

    # --- the socket ------------------------------------------------------------------

    async def frame(self, within: float = 1.0) -> tuple[int, bytes]:
        with trio.fail_after(within):
            while True:
                for frame in wires_frames(self.data):
                    return frame
                assert await self.read(), "the connection has ended"

    async def hear(self, kind: str, within: float = 1.0) -> WiresFrame:
        opcode, payload = await self.frame(within)
        heard: WiresFrame = json.loads(payload)
        assert (opcode, heard["type"]) == (TEXT, kind), heard
        return heard

    async def close_code(self, within: float = 1.0) -> int:
        """Read the close frame, and that nothing at all comes behind it; hang up."""
        opcode, payload = await self.frame(within)
        assert opcode == CLOSE, payload
        assert await self.ends() == b""
        self.stream.socket.close()
        await wait_all_tasks_blocked()
        return int.from_bytes(payload[:2], "big") if payload else 1005


class WiresHouse:
    """A server that runs, and ways in."""

    def __init__(
        self,
        server: chatd.Server,
        listener: WiresListener,
        disk: WiresDisk,
        nursery: trio.Nursery,
    ) -> None:
        self.server = server
        self.store = server.store
        self.listener = listener
        self.disk = disk
        self.nursery = nursery
        self.errors: dict[str, int] = {}  # what the bulkhead is expected to catch
        self.streams: list[trio.SocketStream] = []  # the clients' ends
        self.ends: list[trio.SocketStream] = []  # the server's

    def dial(
        self, *, small: bool = False, tcp: bool = False, accepted: bool = True
    ) -> WiresRaw:
        """Connect; small: the kernel holds little of what the server writes."""
        if tcp:
            with socket.create_server(("127.0.0.1", 0)) as door:
                theirs = socket.create_connection(door.getsockname())
                ours, _ = door.accept()
        else:
            ours, theirs = socket.socketpair()
        if small:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        ours.setblocking(False)
        theirs.setblocking(False)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
        self.streams.append(stream)
        self.ends.append(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        try:
            self.listener.offer.send_nowait(self.ends[-1])
        except trio.BrokenResourceError:
            assert not accepted, "the server does not accept"
            ours.close()
        return WiresRaw(stream)

    def token(self, user_id: int, seconds: float = 3600, **claims: Any) -> str:
        """Sign a token that ends in exactly so many seconds."""
        exp = time.time() + seconds
        return self.server.keyring.sign(user_id, 0, **{"exp": exp} | claims)

    def target(
        self, user_id: int = 1, *, token: str = "", cursor: str | None = None
    ) -> str:
        """Where a socket is opened."""
        query = {"token": token or self.token(user_id)}
        return "/ws/chat?" + urlencode(
            query if cursor is None else query | {"cursor": cursor}
        )

    async def join(
        self,
        user_id: int,
        *,
        token: str = "",
        cursor: str | None = None,
        hello: bool = True,
    ) -> WiresPeer:
        """Connect a real client, and hear `connected`."""
        raw = self.dial()
        with trio.fail_after(1):
            ws = await trio_websocket.wrap_client_stream(
                self.nursery,
                raw.stream,
                "chat.example",
                self.target(user_id, token=token, cursor=cursor),
                message_queue_size=10_000,
            )
        peer = WiresPeer(ws, raw.stream)
        if hello:
            peer.hello = await peer.hear("connected")
        return peer

    async def join_raw(
        self, user_id: int, *, small: bool = False, behind: bytes = b"", **where: Any
    ) -> WiresRaw:
        """Connect and hear `connected`, in bytes. behind: sent with the handshake."""
        raw = self.dial(small=small)
        target = self.target(user_id, **where)
        await raw.send(wires_upgrade(target), behind)
        assert (await raw.answer()).status == 101
        await raw.hear("connected")
        return raw

    async def ask(
        self,
        method: str,
        target: str,
        body: Any = None,
        /,
        *,
        user: int = 0,
        token: str = "",
        **headers: str,
    ) -> HttpAnswer:
        """Ask on a connection of its own, for this user or with this token."""
        if user:
            token = self.token(user)
        if token:
            headers["Authorization"] = f"Bearer {token}"
        raw = self.dial()
        answer = await raw.ask(method, target, body, **headers)
        raw.stream.socket.close()
        return answer

    async def command(self, method: str, target: str, body: Any = None) -> Any:
        """Ask as the service, outside all rates; it must succeed."""
        token = self.token(999, scope="service stats")
        answer = await self.ask(method, target, body, token=token)
        assert answer.status < 300, answer
        return answer.json if answer.body else None

    async def chat(self, *members: int) -> int:
        made = await self.command(
            "POST", "/api/v1/chats", {"member_ids": members, "title": "Tea"}
        )
        return int(made["chat"]["id"])

    async def post(self, chat: int, *contents: str, sender: int = 1) -> list[int]:
        """Send messages over HTTP, one after another; return their ids."""
        raw = self.dial()
        ids = []
        auth = f"Bearer {self.token(999, scope='service')}"
        target = f"/api/v1/chats/{chat}/messages"
        for content in contents:
            body = {"content": content, "sender_id": sender}
            answer = await raw.ask("POST", target, body, Authorization=auth)
            assert answer.status == 201, answer
            ids.append(int(answer.json["message"]["id"]))
        raw.stream.socket.close()
        return ids

    def session(self, user_id: int) -> chatd.Session:
        """The one session of a user, to look at."""
        (found,) = [s for s in self.server.sessions if s.claims.user_id == user_id]
        return found

    def session_of(self, raw: WiresRaw) -> chatd.Session:
        """The session at the other end of a connection."""
        place = self.streams.index(raw.stream)
        (found,) = [
            s for s in self.server.sessions if s.outbox.stream is self.ends[place]
        ]
        return found

    async def stats(self) -> Any:
        return await self.command("GET", "/api/v1/internal/chat/ws/stats")

    async def stop(self) -> None:
        """Stop the server, as a signal would; it must be done within the drain."""
        self.server.stopping.set()
        with trio.fail_after(self.server.settings.drain_seconds + 0.1):
            await self.server.finished.wait()

    def check_left(self) -> None:
        """Claim that nothing is left of any connection."""
        server, hub = self.server, self.server.hub
        assert (server.open, len(server.sessions), hub.seats) == (0, 0, 0)
        assert not server.parked
        assert not hub.people
        assert not hub.rooms
        assert dict(server.stats.errors) == self.errors


@contextlib.asynccontextmanager
async def wires_house(
    path: Path, store_class: type[chatd.Store], settings: dict[str, Any]
) -> AsyncIterator[WiresHouse]:
    """Open a house for a test, and close it: everything must end by itself."""
    chosen = chatd.Settings(db=path / "chat.db", **settings)
    disk = WiresDisk()
    store = store_class(chosen, chatd.Stats(), run_sync=disk.run_sync)
    try:
        server = chatd.Server(chosen, store, chatd.Keyring(chosen, WIRES_SECRET))
        listener = WiresListener()
        async with trio.open_nursery() as nursery:
            house = WiresHouse(server, listener, disk, nursery)
            await nursery.start(server.run, [cast("trio.SocketListener", listener)])
            try:
                yield house
                if not server.finished.is_set():
                    await house.stop()
                house.check_left()
            finally:
                for stream in house.streams:
                    stream.socket.close()
                nursery.cancel_scope.cancel()
    finally:
        store.close()


def wires(
    *, store: type[chatd.Store] = chatd.Store, **settings: Any
) -> Callable[
    [Callable[Concatenate[WiresHouse, P], Awaitable[None]]], Callable[..., None]
]:
    """Give a test a house with these settings, in a run of Trio whose clock jumps."""

    def decorate(
        test: Callable[Concatenate[WiresHouse, P], Awaitable[None]],
    ) -> Callable[..., None]:
        @functools.wraps(test)
        def run(tmp_path: Path, **given: Any) -> None:
            async def main() -> None:
                async with wires_house(tmp_path, store, settings) as house:
                    await cast("Callable[..., Awaitable[None]]", test)(house, **given)

            try:
                trio.run(main, clock=MockClock(autojump_threshold=0))
            except BaseExceptionGroup as group:
                errors = list(chatd.leaves(group))
                raise errors[0] if len(errors) == 1 else group from None

        signature = inspect.signature(test)
        _, *given = signature.parameters.values()
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter("tmp_path", kind), *given]
        )
        return run

    return decorate


def of_type(kind: str, frames: list[WiresFrame]) -> list[WiresFrame]:
    return [frame for frame in frames if frame["type"] == kind]


# --- Outbox --------------------------------------------------------------------------


def text_of(number: int, size: int = 1000) -> bytes:
    """A server's frame that says which it is."""
    return bytes(chatd._frames.send_data(f"{number}:".ljust(size, "x")))


def numbers_in(data: bytearray) -> list[int]:
    frames = [payload for opcode, payload in wires_frames(data) if opcode == TEXT]
    return [int(payload.split(b":")[0]) for payload in frames]


@wires()
async def test_a_push_is_the_kernels_before_it_returns(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    box, tasks = house.session(6).outbox, house.session(6).nursery.child_tasks
    before = len(tasks)
    assert box.push(b"hello")
    # No await in between: who reads now has it.
    assert os.read(raw.stream.socket.fileno(), 100) == b"hello"
    assert not box.waiting
    assert len(tasks) == before


@wires(outbox_bytes=1_000_000)
async def test_what_the_kernel_does_not_take_is_kept_and_a_task_exists_only_then(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6, small=True)
    session = house.session(6)
    tasks = len(session.nursery.child_tasks)
    for number in range(100):
        assert session.outbox.push(text_of(number))
    assert session.outbox.waiting
    assert len(session.nursery.child_tasks) == tasks + 1
    await raw.listen()
    assert numbers_in(raw.data) == list(range(100))
    assert not session.outbox.waiting
    assert len(session.nursery.child_tasks) == tasks


@wires(outbox_bytes=20_000)
async def test_a_frame_is_taken_whole_or_not_at_all(house: WiresHouse) -> None:
    raw = await house.join_raw(6, small=True)
    box = house.session(6).outbox
    taken = [n for n in range(60) if box.push(text_of(n))]
    assert 20 <= len(taken) < 60
    assert box.full
    assert taken == list(range(len(taken)))  # after the first no there is no yes
    assert not box.push(b"x")
    assert box.push(text_of(1000), always=True)
    await raw.listen()
    assert numbers_in(raw.data) == [*taken, 1000]
    assert raw.data == b""


@wires(outbox_bytes=1_000_000)
async def test_a_flush_that_is_cancelled_tears_no_frame_but_the_last(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6, small=True)
    session = house.session(6)
    for number in range(60):
        session.outbox.push(text_of(number, 3333))
    await raw.read(5000)
    await wait_all_tasks_blocked()
    session.nursery.cancel_scope.cancel()
    session.outbox.push(text_of(1000))
    session.outbox.seal(chatd.close_frame(1000, ""))
    await raw.ends()
    arrived = numbers_in(raw.data)
    assert arrived == list(range(len(arrived)))  # nothing came out of its place
    assert len(raw.data) < len(text_of(0, 3333))


@wires()
async def test_the_first_close_frame_is_the_last_frame(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    box = house.session(6).outbox
    box.push(text_of(1))
    box.seal(chatd.close_frame(4503, "revoked"))
    assert box.push(text_of(2))
    assert box.push(text_of(3), always=True)
    box.seal(chatd.close_frame(1000, ""))
    await raw.send(wires_frame(PING), wires_command("ping"), wires_close(1000))
    await raw.ends()
    assert [opcode for opcode, _ in wires_frames(raw.data)] == [TEXT, CLOSE]


@wires()
async def test_a_push_to_a_peer_that_has_gone_does_not_raise(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    box = house.session(6).outbox
    raw.stream.socket.close()
    for number in range(3):
        assert box.push(text_of(number), always=number == 2)
    assert box.sealed
    await wait_all_tasks_blocked()
    assert not house.server.sessions


@wires()
async def test_a_push_behind_the_end_hits_nobody_elses_descriptor(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6)
    box = house.session(6).outbox
    number = box.stream.socket.fileno()
    raw.stream.socket.close()
    await wait_all_tasks_blocked()
    assert not house.server.open
    strangers = [socket.socketpair() for _ in range(3)]
    ends = [end for pair in strangers for end in pair]
    assert number in {end.fileno() for end in ends}  # it was given out again
    box.push(b"a secret", always=True)
    box.seal(b"a close")
    for end in ends:
        end.setblocking(False)
        with pytest.raises(BlockingIOError):
            end.recv(100)
    for end in ends:
        end.close()


@wires(outbox_bytes=1_000_000)
async def test_a_peer_that_goes_in_mid_flush_ends_its_connection(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6, small=True)
    box = house.session(6).outbox
    for number in range(50):
        box.push(text_of(number))
    woken = trio.Event()

    async def wait() -> None:
        await box.empty()
        woken.set()

    house.nursery.start_soon(wait)
    await wait_all_tasks_blocked()
    raw.stream.socket.close()
    with trio.fail_after(1):
        await woken.wait()
    await wait_all_tasks_blocked()
    assert not house.server.sessions


@wires(outbox_bytes=10_000)
async def test_the_library_waits_while_the_outbox_is_over_its_bound(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6, small=True)
    box = house.session(6).outbox
    while box.push(text_of(1)):
        pass
    sent = trio.Event()

    async def send() -> None:
        await box.wait_send_all_might_not_block()
        await box.send_all(text_of(2))
        sent.set()

    house.nursery.start_soon(send)
    with trio.move_on_after(9):
        await sent.wait()
    assert not sent.is_set()
    while not sent.is_set():
        await raw.read(1000)
    assert not box.full
    await raw.listen()
    assert numbers_in(raw.data)[-1] == 2


@wires(outbox_bytes=10_000)
async def test_while_it_is_full_only_the_newest_ping_is_owed_a_pong(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6, small=True)
    box = house.session(6).outbox
    await raw.send(wires_frame(PING, b"before"))
    await wait_all_tasks_blocked()
    while box.push(text_of(1)):
        pass
    await raw.send(*[wires_frame(PING, payload) for payload in (b"a", b"b", b"c")])
    await wait_all_tasks_blocked()
    await raw.listen()
    await raw.send(wires_frame(PING, b"after"))
    await raw.listen()
    pongs = [payload for opcode, payload in wires_frames(raw.data) if opcode == PONG]
    assert pongs == [b"before", b"c", b"after"]


@wires(receive_bytes=Rate(1000, 5000))
async def test_received_bytes_are_paced(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    with taking(15, 15.6):
        await raw.send(wires_frame(TEXT, b"x" * 19_992))  # and 8 of its head
        await raw.hear("error", within=20)


@wires(receive_bytes=Rate(1340, 1340))
async def test_a_tiny_frame_is_paced_like_128_bytes_more(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    with taking(9, 9.2):
        await raw.send(wires_frame(PING) * 100)
        for _ in range(100):
            assert await raw.frame() == (PONG, b"")
        await raw.send(wires_command("ping"))
        await raw.hear("pong", within=10)


@wires()
async def test_who_hangs_up_behind_a_flood_is_not_read_to_its_end(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6)
    await raw.send(wires_frame(PONG) * 20_000)  # half a minute's reading
    raw.stream.socket.close()
    with taking(0, 6):
        while house.server.sessions:  # noqa: ASYNC110 (nothing tells when it ends)
            await trio.sleep(0.1)


@wires(receive_bytes=OFF, commands=OFF)
async def test_a_rate_of_0_paces_nothing(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    with taking(0):
        for _ in range(100):
            await raw.send(wires_frame(TEXT, b"x" * 30_000))
            await raw.hear("error")


@wires()
async def test_what_is_sent_behind_the_handshake_is_served(house: WiresHouse) -> None:
    command = wires_command("ping", ref="first")
    raw = await house.join_raw(6, behind=command + command[:7])
    await raw.send(command[7:])
    assert (await raw.hear("pong"))["ref"] == "first"
    assert (await raw.hear("pong"))["ref"] == "first"


@wires()
async def test_a_ping_in_the_segment_of_the_handshake_is_answered_behind_the_101(
    house: WiresHouse,
) -> None:
    raw = house.dial()
    request = wires_upgrade(house.target(6))
    await raw.send(request, wires_frame(PING, b"early"))
    assert (await raw.answer()).status == 101
    heard = [await raw.frame(), await raw.frame()]
    assert (PONG, b"early") in heard
    assert any(b'"connected"' in payload for _, payload in heard)


@wires()
async def test_peers_that_close_at_once_leave_nothing_behind(house: WiresHouse) -> None:
    request = wires_upgrade(house.target(6))
    for sent in (b"", b"G", request[:-2], request, request + wires_close(1000)):
        raw = house.dial()
        if sent:
            await raw.send(sent)
        raw.stream.socket.close()
    for sent in (request, request + wires_command("ping") * 50):
        raw = house.dial()
        await raw.send(sent)
        await raw.stream.send_eof()
        await raw.ends(2)
    await trio.sleep(2)
    house.check_left()


@wires()
async def test_a_broken_peer_ends_only_its_own_connection(house: WiresHouse) -> None:
    chat = await house.chat(1, 2)
    gone = await house.join(1)
    stays = await house.join(2)
    gone.stream.socket.close()
    await house.post(chat, "hi")
    assert (await stays.hear("new_message"))["message"]["content"] == "hi"
    assert [s.claims.user_id for s in house.server.sessions] == [2]
    await stays.hears_nothing()


# --- Guard ---------------------------------------------------------------------------


def test_trio_websocket_still_has_the_private_parts_that_guard_replaces() -> None:
    library = trio_websocket.WebSocketConnection
    assert trio_websocket.__version__ == "0.12.2"
    replaced = {name for name in vars(chatd.Guard) if name.startswith("_handle_")}
    assert replaced >= {"_handle_ping_event", "_handle_pong_event",
                        "_handle_message_event"}  # fmt: skip
    reader = inspect.getsource(library._reader_task)
    for name in replaced:
        assert f"self.{name}," in reader, name
        theirs, ours = getattr(library, name), getattr(chatd.Guard, name)
        assert inspect.iscoroutinefunction(theirs), name
        assert [*inspect.signature(ours).parameters] == ["self", "event"], name


@wires(max_message_bytes=1000)
async def test_the_limit_counts_bytes_and_not_characters(house: WiresHouse) -> None:
    peer = await house.join(6)
    fits = json.dumps({"type": "ping", "x": "й" * 480}, ensure_ascii=False)
    await peer.ws.send_message(fits)
    await peer.hear("pong")
    too_big = fits.replace("й" * 480, "й" * 490)
    assert len(too_big) < 1000 < len(too_big.encode())
    await peer.ws.send_message(too_big)
    assert await peer.end() == ([], 1009)


@wires(max_message_bytes=1000)
async def test_a_message_of_exactly_the_limit_passes_and_one_byte_more_does_not(
    house: WiresHouse,
) -> None:
    peer = await house.join(6)
    command = json.dumps({"type": "ping", "x": ""})
    await peer.ws.send_message(command[:-2] + "x" * (1000 - len(command)) + '"}')
    await peer.hear("pong")
    await peer.ws.send_message(command[:-2] + "x" * (1001 - len(command)) + '"}')
    assert await peer.end() == ([], 1009)


@wires(max_message_bytes=1000)
async def test_a_message_in_fragments_is_counted_as_one(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    piece = wires_frame(0, b"x" * 400, fin=False)
    await raw.send(wires_frame(TEXT, b"x" * 400, fin=False), piece)
    await raw.send(piece)
    assert await raw.close_code() == 1009


@wires()
async def test_the_counts_start_anew_with_each_message(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    half, rest = b'{"type":"pi', b'ng"}'
    for _ in range(3):
        await raw.send(wires_frame(TEXT, half, fin=False))
        await raw.send(*[wires_frame(0, b"", fin=False)] * 62)
        await raw.send(wires_frame(0, rest))
        await raw.hear("pong")


@wires()
async def test_a_message_in_65_fragments_is_too_big(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    await raw.send(wires_frame(TEXT, b"", fin=False))
    await raw.send(*[wires_frame(0, b"", fin=False)] * 64)
    assert await raw.close_code() == 1009


@wires(receive_bytes=OFF)
async def test_a_frame_that_announces_2_62_bytes_is_cut_at_the_limit(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6)
    await raw.send(b"\x81\xff" + struct.pack("!Q", 2**62) + bytes(4) + b"x" * 65_536)
    await trio.sleep(5)
    assert len(house.server.sessions) == 1
    await raw.send(b"x")
    assert await raw.close_code() == 1009


@wires()
async def test_a_flood_of_empty_continuations_is_cut_short(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    innocent = await house.join(7)
    flood = wires_frame(0, b"", fin=False) * 10_000
    await raw.send(wires_frame(TEXT, b"", fin=False))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raw.send, flood)
        assert (await innocent.ask("ping"))["type"] == "pong"
        assert await raw.close_code() == 1009


@wires()
async def test_a_flood_of_pings_meets_tcp_and_disturbs_nobody(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6)
    innocent = await house.join(7)
    pings = 20_000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raw.send, wires_frame(PING) * pings)
        for _ in range(5):
            assert (await innocent.ask("ping"))["type"] == "pong"
        started, pongs = trio.current_time(), 0
        while pongs < pings:
            assert await raw.frame(60) == (PONG, b"")
            pongs += 1
    # 134 bytes each, at 64 KiB a second, and half a MiB to start with.
    seconds = (pings * 134 - 524_288) / 65_536
    assert trio.current_time() - started == pytest.approx(seconds, abs=2)


@wires(max_message_bytes=1000)
async def test_two_messages_too_big_and_a_ping_in_one_segment_get_one_1009(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6)
    big = wires_frame(TEXT, b"x" * 1001)
    await raw.send(big, wires_frame(PING), big, wires_frame(PING))
    assert await raw.close_code() == 1009


@wires(max_message_bytes=1000)
async def test_what_was_read_before_a_message_too_big_is_still_obeyed(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    raw = await house.join_raw(6)
    sends = [
        wires_command("send_message", chat_id=chat, content=str(n)) for n in range(9)
    ]
    await raw.send(*sends, wires_frame(TEXT, b"x" * 1001))
    while (frame := await raw.frame())[0] != CLOSE:
        assert json.loads(frame[1])["type"] in {"new_message", "ack"}
    assert frame[1][:2] == (1009).to_bytes(2, "big")
    await wait_all_tasks_blocked()  # the last may be on their way to the disk
    history = await house.ask("GET", f"/api/v1/chats/{chat}/messages", user=7)
    contents = [message["content"] for message in history.json["messages"]]
    assert contents == [str(number) for number in range(9)]


WIRES_FAULTS = {
    "reserved bits": (b"\xf1\x80\0\0\0\0", 1002),
    "an unknown opcode": (b"\x83\x80\0\0\0\0", 1002),
    "no mask": (wires_frame(TEXT, b"{}", masked=False), 1002),
    "a continuation of nothing": (wires_frame(0, b"x"), 1002),
    "a text within a text": (
        wires_frame(TEXT, b"x", fin=False) + wires_frame(TEXT, b"x"),
        1002,
    ),
    "a fragmented ping": (wires_frame(PING, fin=False), 1002),
    "a long ping": (wires_frame(PING, bytes(126)), 1002),
    "a length in too many bytes": (b"\x81\xfe\0\x05\0\0\0\0hello", 1002),
    "a length with its top bit set": (b"\x81\xff" + b"\xff" * 8 + bytes(4), 1002),
    "a close of one byte": (wires_frame(CLOSE, b"\x03"), 1002),
    "a close code nobody may send": (wires_close(1005), 1002),
    "a reason that is not UTF-8": (wires_frame(CLOSE, b"\x03\xe8\xff"), 1007),
    "text that is not UTF-8": (wires_frame(TEXT, b'{"a":"\xc3\x28"}'), 1007),
    "text that ends in half a character": (wires_frame(TEXT, b"\xd0"), 1007),
}


@pytest.mark.parametrize("fault", WIRES_FAULTS)
@pytest.mark.parametrize("cut", [False, True], ids=["at once", "byte by byte"])
@wires()
async def test_a_protocol_error_is_answered_with_its_code(
    house: WiresHouse, fault: str, cut: bool
) -> None:
    sent, code = WIRES_FAULTS[fault]
    raw = await house.join_raw(6)
    if cut:
        for number in range(len(sent)):
            with contextlib.suppress(trio.BrokenResourceError):
                await raw.send(sent[number : number + 1])
            await wait_all_tasks_blocked()
    else:
        await raw.send(sent)
    assert await raw.close_code() == code
    stats = await house.stats()
    assert stats["connections"]["closed"] == {str(code): 1}


@wires()
async def test_the_peers_close_code_comes_back_and_is_counted(
    house: WiresHouse,
) -> None:
    for code in (1000, 1001, 3000, 4999):
        raw = await house.join_raw(6)
        await raw.send(wires_close(code), wires_frame(PING), wires_command("ping"))
        assert await raw.close_code() == code  # and nothing behind it
    raw = await house.join_raw(6)
    await raw.send(wires_frame(CLOSE))
    assert await raw.close_code() == 1005  # none, and none comes back
    closed = (await house.stats())["connections"]["closed"]
    assert closed == {"1000": 1, "1001": 1, "3000": 1, "4999": 1, "1005": 1}


@wires()
async def test_a_peer_that_pings_while_it_is_closed_still_gets_the_code(
    house: WiresHouse,
) -> None:
    raws = [await house.join_raw(6) for _ in range(20)]
    for raw in raws:
        await raw.send(wires_frame(PING) * 5)
    await house.command("POST", "/api/v1/internal/chat/revoke", {"user_id": 6})
    for raw in raws:
        with contextlib.suppress(trio.BrokenResourceError):
            await raw.send(wires_frame(PING) * 5)
        while (frame := await raw.frame())[0] == PONG:
            pass
        assert frame == (CLOSE, b"\x11\x97revoked: sign in again")
        assert await raw.ends(1.5) == b""


# --- Session: joining ----------------------------------------------------------------


@wires()
async def test_connected_is_the_first_frame_and_says_where_the_user_stands(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    await house.post(chat, "one", "two", sender=7)
    peer = await house.join(6, token=house.token(6, 1000))
    hello = peer.hello
    assert 990 <= hello.pop("expires_in") < 1000
    assert hello.pop("timestamp").endswith("Z")
    assert hello == {
        "type": "connected",
        "user_id": 6,
        "cursor": f"{house.store.epoch}.{house.server.hub.head}",
        "resume": "fresh",
        "chats": {str(chat): {"last_n": 2, "read_n": 0}},
    }
    await peer.hears_nothing()


@wires(resync_events=5)
async def test_a_cursor_says_how_a_socket_resumes(house: WiresHouse) -> None:
    chat = await house.chat(6, 7)
    other = await house.chat(7, 8)
    epoch, head = house.store.epoch, house.server.hub.head
    ids = await house.post(chat, *"abcde", sender=7)
    await house.post(other, *"xyz", sender=7)  # not his: they count for nothing
    now = house.server.hub.head

    async def resumes(cursor: str) -> tuple[str, str, list[int]]:
        peer = await house.join(6, cursor=cursor)
        with trio.move_on_after(0.1):
            heard = []
            while True:
                heard.append((await peer.hear("new_message"))["seq"])
        assert peer.hello["chats"] == {str(chat): {"last_n": 5, "read_n": 0}}
        await peer.leave()
        return peer.hello["resume"], peer.hello["cursor"], heard

    fresh = f"{epoch}.{now}"
    assert await resumes(f"{epoch}.{now}") == ("live", fresh, [])
    # The log has gone on, but with nothing for him.
    assert await resumes(f"{epoch}.{ids[-1]}") == ("live", f"{epoch}.{ids[-1]}", [])
    assert await resumes(f"{epoch}.{head}") == ("replay", f"{epoch}.{head}", ids)
    assert await resumes(f"{epoch}.{ids[2]}") == (
        "replay", f"{epoch}.{ids[2]}", ids[3:],
    )  # fmt: skip
    await house.post(chat, "f", sender=7)
    now += 1
    fresh = f"{epoch}.{now}"

    async def resyncs(cursor: str) -> None:
        peer = await house.join(6, cursor=cursor)
        assert (peer.hello["resume"], peer.hello["cursor"]) == ("resync", fresh)
        await peer.hears_nothing()
        await peer.leave()

    await resyncs(f"{epoch}.{head}")  # six events are one more than five
    await resyncs(f"{epoch}.{now + 1}")  # of the future
    await resyncs(f"{'0' * len(epoch)}.{now}")  # of another epoch
    for garbage in ("", ".", epoch, f"{epoch}.", f"{epoch}.-1", f"{epoch}.1e1", "\0",
                    f"{epoch}.{'9' * 30}", f"{epoch}.٣", f" {epoch}.1"):  # fmt: skip
        await resyncs(garbage)
    resumed = (await house.stats())["resumes"]
    assert resumed == {"fresh": 0, "live": 2, "replay": 2, "resync": 13}


@wires()
async def test_after_a_resync_the_events_of_the_new_cursor_follow(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    peer = await house.join(6, cursor="nonsense")
    (seq,) = await house.post(chat, "hi", sender=7)
    assert (await peer.hear("new_message"))["seq"] == seq
    assert peer.hello["cursor"] == f"{house.store.epoch}.{seq - 1}"


@wires()
async def test_only_events_carry_a_seq_and_only_the_poll_and_connected_a_cursor(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    peer, friend = await house.join(6), await house.join(7)
    await peer.say("send_message", chat_id=chat, content="hi")
    event = await peer.hear("new_message")
    assert event["seq"] == event["message"]["id"]
    ack = await peer.hear("ack")
    await friend.say("typing", chat_id=chat, is_typing=True)
    for frame in (ack, await peer.hear("typing"), await peer.ask("ping")):
        assert "seq" not in frame
        assert "cursor" not in frame
    assert "cursor" not in event


@pytest.mark.parametrize("tail_events", [16_384, 3], ids=["the tail", "the log"])
@pytest.mark.parametrize("page_events", [500, 2])
async def test_a_replay_gives_every_event_once_and_in_order(
    tmp_path: Path, tail_events: int, page_events: int, autojump_clock: MockClock
) -> None:
    settings = {"tail_events": tail_events, "page_events": page_events}
    async with wires_house(tmp_path, chatd.Store, settings) as house:
        chat = await house.chat(6, 7)
        cursor = f"{house.store.epoch}.{house.server.hub.head}"
        ids = await house.post(chat, *map(str, range(20)), sender=7)
        peer = await house.join(6, cursor=cursor)
        assert peer.hello["resume"] == "replay"
        for seq in ids:
            assert (await peer.hear("new_message"))["seq"] == seq
        (seq,) = await house.post(chat, "live", sender=7)
        assert (await peer.hear("new_message"))["seq"] == seq
        await peer.hears_nothing()


@wires(connections_per_user=2)
async def test_one_connection_too_many_is_told_4504_and_frees_itself(
    house: WiresHouse,
) -> None:
    first, second = await house.join(6), await house.join(6)
    third = await house.join(6, hello=False)
    assert await third.end() == ([], 4504)
    assert (await house.join(7)).hello["resume"] == "fresh"
    await first.leave()
    assert (await house.join(6)).hello["resume"] == "fresh"
    assert (await second.ask("ping"))["type"] == "pong"


class UnreadableStore(chatd.Store):
    """Its greetings, or its log, cannot be read: with a real error of SQLite."""

    broken = "greeting"

    def greeting(self, db: sqlite3.Connection, *args: Any) -> chatd.Greeting:
        if self.broken == "greeting":
            db.execute("SELECT * FROM nothing")
        return super().greeting(db, *args)

    def events_after(self, db: sqlite3.Connection, *args: Any) -> chatd.Page:
        if self.broken == "events_after":
            db.execute("SELECT * FROM nothing")
        return super().events_after(db, *args)


@wires(store=UnreadableStore)
async def test_who_cannot_be_greeted_is_told_why_and_to_come_back_later(
    house: WiresHouse,
) -> None:
    house.errors = {"OperationalError": 1}
    peer = await house.join(6, hello=False)
    ((error,), code) = await peer.end()
    assert (error["type"], error["code"], code) == ("error", "storage_failed", 1013)


@wires(store=UnreadableStore, tail_events=2)
async def test_who_cannot_be_given_the_log_is_told_to_come_back_with_his_cursor(
    house: WiresHouse,
) -> None:
    house.errors = {"OperationalError": 1}
    cast("UnreadableStore", house.store).broken = "events_after"
    chat = await house.chat(6, 7)
    cursor = f"{house.store.epoch}.{house.server.hub.head}"
    await house.post(chat, *"abcde", sender=7)
    peer = await house.join(6, cursor=cursor)
    assert await peer.end() == ([], 1013)


# --- Session: commands ---------------------------------------------------------------


@wires()
async def test_ping_is_answered_by_pong(house: WiresHouse) -> None:
    peer = await house.join(6)
    await peer.say("ping")
    pong = await peer.hear("pong")
    assert set(pong) == {"type", "timestamp"}
    await peer.say("ping", ref="r" * 64)
    assert (await peer.hear("pong"))["ref"] == "r" * 64


@wires()
async def test_the_sender_hears_the_message_before_its_ack_and_so_do_his_tabs(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    peer, tab, friend = [await house.join(user) for user in (6, 6, 7)]
    await peer.say(
        "send_message", chat_id=chat, content="Привет!", client_id="k1", ref="a"
    )
    event = await peer.hear("new_message")
    message = event["message"]
    assert event == {
        "type": "new_message",
        "seq": message["id"],
        "chat_id": chat,
        "message": message,
    }
    created = message["created_at"]
    assert message == {
        "id": message["id"], "chat_id": chat, "sender_id": 6, "content": "Привет!",
        "created_at": created, "n": 1, "client_id": "k1",
    }  # fmt: skip
    assert await peer.hear("ack") == {
        "type": "ack", "ref": "a", "client_id": "k1", "message_id": message["id"],
        "chat_id": chat, "n": 1, "created_at": created, "duplicate": False,
    }  # fmt: skip
    assert await tab.hear("new_message") == event
    assert await friend.hear("new_message") == event
    for other in (peer, tab, friend):
        await other.hears_nothing()


@wires(sends=OFF)
async def test_commands_are_done_and_answered_in_the_order_said(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    peer = await house.join(6)
    for number in range(40):
        await peer.say("send_message", chat_id=chat, content=str(number), ref="r")
    acks: list[WiresFrame] = []
    events: list[WiresFrame] = []
    for _ in range(80):
        with trio.fail_after(1):
            heard = json.loads(await peer.ws.get_message())
        (events if heard["type"] == "new_message" else acks).append(heard)
        assert len(acks) <= len(events)
    assert [event["message"]["content"] for event in events] == [
        str(number) for number in range(40)
    ]
    assert [event["message"]["n"] for event in events] == list(range(1, 41))
    assert [ack["n"] for ack in acks] == list(range(1, 41))


@wires()
async def test_mark_read_moves_up_and_is_acked_moved_or_not(house: WiresHouse) -> None:
    chat = await house.chat(6, 7)
    first, second = await house.post(chat, "one", "two", sender=7)
    peer, friend = await house.join(6), await house.join(7)
    await peer.say("mark_read", message_id=second, ref="a")
    event = await peer.hear("message_read")
    assert event == {
        "type": "message_read", "seq": event["seq"], "message_id": second,
        "chat_id": chat, "read_by": 6, "n": 2,
    }  # fmt: skip
    assert await peer.hear("ack") == {"type": "ack", "ref": "a"}
    assert await friend.hear("message_read") == event
    for message_id in (first, second):
        await peer.say("mark_read", message_id=message_id)
        assert await peer.hear("ack") == {"type": "ack"}
    await friend.hears_nothing()


@wires()
async def test_typing_is_shown_to_the_other_members_and_answered_by_nothing(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    peer, tab, friend, stranger = [await house.join(u) for u in (6, 6, 7, 8)]
    await peer.say("typing", chat_id=chat, is_typing=True, ref="a")
    assert await friend.hear("typing") == {
        "type": "typing", "chat_id": chat, "user_id": 6, "is_typing": True,
    }  # fmt: skip
    await peer.say("typing", chat_id=chat, is_typing=False)
    assert (await friend.hear("typing"))["is_typing"] is False
    for other in (peer, tab, stranger):
        await other.hears_nothing()


@wires()
async def test_typing_and_sending_and_reading_need_membership_and_answer_alike(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    (message,) = await house.post(chat, "secret", sender=6)
    stranger, member = await house.join(8), await house.join(7)
    for hidden, unknown in ((chat, 12_345), (message, 54_321)):
        if hidden == chat:
            commands: list[tuple[str, str, dict[str, Any]]] = [
                ("typing", "chat_id", {"is_typing": True}),
                ("send_message", "chat_id", {"content": "hi"}),
            ]
        else:
            commands = [("mark_read", "message_id", {})]
        for kind, field, rest in commands:
            mine = await stranger.refused(kind, **{field: hidden}, **rest)
            none = await stranger.refused(kind, **{field: unknown}, **rest)
            assert mine == none
            assert mine["code"] == "not_found"
            assert field in mine["message"]
    await member.hears_nothing()


WIRES_BAD_COMMANDS: dict[str, tuple[str | bytes, str, str]] = {
    "binary": (b'{"type":"ping"}', "bad_json", ""),
    "no JSON": ("hello", "bad_json", ""),
    "nothing": ("", "bad_json", ""),
    "half of JSON": ('{"type":"ping"', "bad_json", ""),
    "two in one": ('{"type":"ping"}{"type":"ping"}', "bad_json", ""),
    "a list": ('[{"type":"ping"}]', "bad_json", ""),
    "a number": ("1", "bad_json", ""),
    "null": ("null", "bad_json", ""),
    "deep": ("[" * 30_000, "bad_json", ""),
    "deep in a field that nobody asked for": (
        '{"type":"ping","x":' + "[" * 30_000 + "]" * 30_000 + "}",
        "bad_json",
        "",
    ),
    "half of a surrogate pair": (
        '{"type":"send_message","chat_id":1,"content":"\\ud800"}',
        "bad_json",
        "",
    ),
    "no type": ("{}", "bad_field", "type"),
    "an unknown type": ('{"type":"fly"}', "unknown_type", "type"),
    "a type that is no text": ('{"type":7}', "bad_field", "type"),
    "no chat_id": ('{"type":"typing","is_typing":true}', "bad_field", "chat_id"),
    "a chat_id in quotes": (
        '{"type":"typing","chat_id":"1","is_typing":true}', "bad_field", "chat_id",
    ),
    "a chat_id of 0": (
        '{"type":"typing","chat_id":0,"is_typing":true}', "bad_field", "chat_id",
    ),
    "a chat_id of 1.5": (
        '{"type":"typing","chat_id":1.5,"is_typing":true}', "bad_field", "chat_id",
    ),
    "is_typing of 1": (
        '{"type":"typing","chat_id":1,"is_typing":1}', "bad_field", "is_typing",
    ),
    "a message_id past 2^53": (
        '{"type":"mark_read","message_id":9007199254740992}', "bad_field", "message_id",
    ),
    "a message_id past 2^64": (
        '{"type":"mark_read","message_id":18446744073709551617}',
        "bad_field",
        "message_id",
    ),
    "content that is null": (
        '{"type":"send_message","chat_id":1,"content":null}', "bad_field", "content",
    ),
    "content of spaces": (
        '{"type":"send_message","chat_id":1,"content":" \\n"}', "bad_field", "content",
    ),
    "content with a NUL": (
        '{"type":"send_message","chat_id":1,"content":"a\\u0000"}',
        "bad_field",
        "content",
    ),
    "content of 4001": (
        '{"type":"send_message","chat_id":1,"content":"' + "x" * 4001 + '"}',
        "bad_field",
        "content",
    ),
    "a client_id of nothing": (
        '{"type":"send_message","chat_id":1,"content":"x","client_id":""}',
        "bad_field",
        "client_id",
    ),
    "a client_id of 65": (
        '{"type":"send_message","chat_id":1,"content":"x","client_id":"'
        + "x" * 65 + '"}',
        "bad_field",
        "client_id",
    ),
    "a client_id that is not ASCII": (
        '{"type":"send_message","chat_id":1,"content":"x","client_id":"й"}',
        "bad_field",
        "client_id",
    ),
    "no token": ('{"type":"auth"}', "bad_field", "token"),
    "a ref of 65": ('{"type":"ping","ref":"' + "x" * 65 + '"}', "bad_field", "ref"),
    "a ref that is a number": ('{"type":"ping","ref":1}', "bad_field", "ref"),
}  # fmt: skip


@wires(commands=OFF, receive_bytes=OFF)
async def test_what_is_wrong_with_a_command_is_told_and_the_connection_stays(
    house: WiresHouse,
) -> None:
    await house.chat(6, 7)
    peer = await house.join(6)
    for name, (text, code, field) in WIRES_BAD_COMMANDS.items():
        await peer.ws.send_message(text)
        error = await peer.hear("error")
        assert (error["code"], name) == (code, name)
        assert field in error["message"], name
        assert error["message"], name
        assert "ref" not in error, name
    assert (await peer.ask("ping"))["type"] == "pong"


@wires()
async def test_an_error_repeats_the_ref_where_it_can_be_read(house: WiresHouse) -> None:
    peer = await house.join(6)
    for text, ref in {
        '{"ref":"r","type":"fly"}': "r",
        '{"type":"typing","ref":"й"}': "й",
        '{"type":"mark_read","message_id":1,"ref":"gone"}': "gone",
        '{"type":"fly","ref":7}': None,
        '{"type":"fly","ref":null}': None,
        '{"ref":"r"': None,
    }.items():
        await peer.ws.send_message(text)
        assert (await peer.hear("error")).get("ref") == ref
    await peer.ws.send_message(b'{"type":"ping","ref":"in binary"}')
    assert (await peer.hear("error"))["code"] == "bad_json"


@wires()
async def test_unknown_fields_are_ignored(house: WiresHouse) -> None:
    peer = await house.join(6)
    await peer.say("ping", colour="green", ref="a")
    assert (await peer.hear("pong"))["ref"] == "a"


@wires()
async def test_a_repeat_gets_the_same_ack_and_no_event(house: WiresHouse) -> None:
    chat = await house.chat(6, 7)
    other = await house.chat(6, 8)
    peer, friend = await house.join(6), await house.join(7)
    command: dict[str, Any] = {"chat_id": chat, "content": "hi", "client_id": "k"}
    ack = await peer.ask("send_message", **command)
    await friend.hear("new_message")
    again = await peer.ask("send_message", **command)
    assert again == ack | {"duplicate": True}
    await friend.hears_nothing()
    for change in ({"content": "ho"}, {"chat_id": other}):
        error = await peer.refused("send_message", **command | change)
        assert error["code"] == "idempotency_mismatch"
    # A key is its sender's own.
    theirs = await friend.ask("send_message", **command)
    assert theirs["duplicate"] is False


@wires()
async def test_64_commands_may_be_unanswered_then_reading_waits(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    (message,) = await house.post(chat, "one", sender=7)
    peer, innocent = await house.join(6), await house.join(7)
    house.disk.hold()
    for _ in range(58):  # the bucket of commands has 60
        await peer.say("mark_read", message_id=message)
    assert (await peer.ask("ping"))["type"] == "pong"  # reading goes on
    await peer.hears_nothing(1)
    for _ in range(6):
        await peer.say("mark_read", message_id=message)
    assert (await peer.ask("ping"))["type"] == "pong"
    await peer.say("mark_read", message_id=message)  # the 65th
    await peer.say("ping")
    await peer.hears_nothing(5)
    assert (await innocent.ask("ping"))["type"] == "pong"
    house.disk.go()
    heard = [json.loads(await peer.ws.get_message())["type"] for _ in range(67)]
    assert sorted(heard) == ["ack"] * 65 + ["message_read", "pong"]
    assert heard[0] == "message_read"


@wires(connections_per_user=100, handshakes=OFF, commands=OFF)
async def test_when_the_stores_channel_is_full_who_commands_waits_and_nobody_else(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    (message,) = await house.post(chat, "one", sender=6)  # his own: it is read
    innocent = await house.join(7)
    raws = [await house.join_raw(6) for _ in range(80)]
    house.disk.hold()
    for raw in raws:  # 5,120 commands; the channel has 4,096, a batch 512
        await raw.send(wires_command("mark_read", message_id=message) * 64)
    await wait_all_tasks_blocked()
    assert (await innocent.ask("ping"))["type"] == "pong"
    ended = house.session_of(raws[-1])  # while its command waits
    ended.end(4503, "revoked")
    assert await raws[-1].close_code() == 4503
    house.disk.go()
    for raw in raws[:-1]:
        for _ in range(64):
            assert await raw.hear("ack") == {"type": "ack"}


@wires(commands=OFF)
async def test_at_64_unanswered_a_repeat_over_the_rate_waits_too(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    peer = await house.join(6)
    for number in range(20):
        ack = await peer.ask(
            "send_message", chat_id=chat, content=str(number), client_id=str(number)
        )
    house.disk.hold()
    for _ in range(64):
        await peer.say("mark_read", message_id=ack["message_id"])
    await peer.say("send_message", chat_id=chat, content="0", client_id="0")
    await peer.hears_nothing(0.1)
    house.disk.go()
    heard = [json.loads(await peer.ws.get_message()) for _ in range(65)]
    (repeat,) = [frame for frame in heard if frame.get("duplicate")]
    assert (repeat["client_id"], repeat["n"]) == ("0", 1)


# --- Session: rates ------------------------------------------------------------------


@wires()
async def test_61_commands_at_once_are_one_too_many_and_30_come_back_a_second(
    house: WiresHouse,
) -> None:
    peer = await house.join(6)
    for _ in range(60):
        assert (await peer.ask("ping"))["type"] == "pong"
    error = await peer.refused("ping")
    assert (error["code"], error["retry_after"]) == ("rate_limited", 0.033)
    await trio.sleep(1)
    for _ in range(30):
        assert (await peer.ask("ping"))["type"] == "pong"
    assert (await peer.refused("ping"))["code"] == "rate_limited"
    assert (await house.stats())["rate_limited"] == {"commands": 2}


@wires()
async def test_100_commands_refused_in_a_row_end_the_connection_with_4008(
    house: WiresHouse,
) -> None:
    peer = await house.join(6)
    for _ in range(60 + 99):
        await peer.say("ping")
    for kind, number in (("pong", 60), ("error", 99)):
        for _ in range(number):
            await peer.hear(kind)
    await peer.hears_nothing(0.01)
    await peer.say("ping")
    heard, code = await peer.end()
    assert [frame["code"] for frame in heard] == ["rate_limited"]
    assert code == 4008


@wires()
async def test_behind_the_verdict_nothing_more_of_a_flood_is_obeyed(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6)
    await raw.send(wires_command("ping") * 250)  # one segment
    kinds = []
    while (frame := await raw.frame())[0] == TEXT:
        kinds.append(json.loads(frame[1])["type"])
    assert frame[1][:2] == (4008).to_bytes(2, "big")
    assert kinds == ["pong"] * 60 + ["error"] * 100


@wires()
async def test_one_command_within_the_rate_starts_the_count_of_refused_anew(
    house: WiresHouse,
) -> None:
    peer = await house.join(6)
    for _ in range(5):
        for _ in range(60 + 99):
            await peer.say("ping")
        for _ in range(60 + 99):
            await peer.ws.get_message()
        await trio.sleep(2)
    assert (await peer.ask("ping"))["type"] == "pong"


@wires()
async def test_a_bad_command_takes_a_token_too(house: WiresHouse) -> None:
    peer = await house.join(6)
    for _ in range(60):
        await peer.ws.send_message("nonsense")
        assert (await peer.hear("error"))["code"] == "bad_json"
    await peer.ws.send_message("nonsense")
    assert (await peer.hear("error"))["code"] == "rate_limited"


@wires()
async def test_the_21st_message_at_once_is_refused_with_when_to_try_again(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    peer, tab = await house.join(6), await house.join(6)
    for number in range(20):
        sender = (peer, tab)[number % 2]  # the bucket is the user's
        answer = await sender.ask("send_message", chat_id=chat, content=str(number))
        assert answer["type"] == "ack"
    error = await peer.refused("send_message", chat_id=chat, content="x")
    assert (error["code"], error["retry_after"]) == ("rate_limited", 0.2)
    await trio.sleep(0.2)
    for sender, kind in ((tab, "ack"), (peer, "error")):
        answer = await sender.ask("send_message", chat_id=chat, content="x")
        assert answer["type"] == kind
    assert (await house.stats())["rate_limited"] == {"sends": 2}


@wires()
async def test_a_repeat_gets_its_token_back(house: WiresHouse) -> None:
    chat = await house.chat(6, 7)
    peer = await house.join(6)
    for number in range(19):
        await peer.ask(
            "send_message", chat_id=chat, content=str(number), client_id=str(number)
        )
    for _ in range(25):  # one token is left, and it stays
        repeat = await peer.ask(
            "send_message", chat_id=chat, content="3", client_id="3"
        )
        assert repeat["duplicate"] is True
    answer = await peer.ask("send_message", chat_id=chat, content="new")
    assert answer["type"] == "ack"
    error = await peer.refused("send_message", chat_id=chat, content="newer")
    assert error["code"] == "rate_limited"


@wires()
async def test_an_empty_bucket_looks_the_key_up_before_it_refuses(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    peer, friend = await house.join(6), await house.join(7)
    for number in range(20):
        first = await peer.ask(
            "send_message", chat_id=chat, content=str(number), client_id=str(number)
        )
    await friend.hear("new_message")
    repeat = {"chat_id": chat, "content": "19", "client_id": "19"}
    answer = await peer.ask("send_message", **repeat)
    assert answer == first | {"duplicate": True}
    wrong = await peer.refused("send_message", **repeat | {"content": "other"})
    assert wrong["code"] == "idempotency_mismatch"
    unknown = await peer.refused("send_message", **repeat | {"client_id": "new"})
    assert unknown["code"] == "rate_limited"
    without = await peer.refused("send_message", chat_id=chat, content="19")
    assert without["code"] == "rate_limited"
    over_http = await house.ask(
        "POST", f"/api/v1/chats/{chat}/messages",
        {"content": "19", "client_id": "19"}, user=6,
    )  # fmt: skip
    assert (over_http.status, over_http.json["duplicate"]) == (200, True)


@wires()
async def test_a_service_sends_outside_the_rate_of_users(house: WiresHouse) -> None:
    chat = await house.chat(6, 7)
    peer = await house.join(6, token=house.token(6, scope="service"))
    for number in range(30):
        answer = await peer.ask("send_message", chat_id=chat, content=str(number))
        assert answer["type"] == "ack"


@wires()
async def test_typing_over_the_rate_is_dropped_without_a_word(
    house: WiresHouse,
) -> None:
    chat, other = await house.chat(6, 7), await house.chat(6, 7)
    peer, friend = await house.join(6), await house.join(7)
    for _ in range(8):
        await peer.say("typing", chat_id=chat, is_typing=True)
    for _ in range(5):
        await friend.hear("typing")
    await friend.hears_nothing(0.1)
    await peer.say("typing", chat_id=other, is_typing=True)  # another bucket
    assert (await friend.hear("typing"))["chat_id"] == other
    await trio.sleep(1)
    for _ in range(2):
        await peer.say("typing", chat_id=chat, is_typing=True)
    await friend.hear("typing")
    await friend.hears_nothing(0.1)
    await peer.hears_nothing(0.1)
    assert (await house.stats())["rate_limited"] == {"typing": 4}


# --- Session: tokens while connected -------------------------------------------------


@wires()
async def test_a_warning_60_s_before_the_tokens_end_and_4401_25_s_after_it(
    house: WiresHouse,
) -> None:
    # Real time passes, too, between signing and joining: a little is allowed.
    peer = await house.join(6, token=house.token(6, 200))
    assert 190 <= peer.hello["expires_in"] < 200
    with taking(130, 142):
        warning = await peer.hear("token_expiring", within=300)
    assert 58 <= warning["expires_in"] <= 60
    with taking(83.9, 86.1):
        assert await peer.end(within=300) == ([], 4401)
    assert (await house.stats())["connections"]["closed"] == {"4401": 1}


@wires()
async def test_a_token_that_ends_within_a_minute_is_warned_of_at_once(
    house: WiresHouse,
) -> None:
    peer = await house.join(6, token=house.token(6, 30))
    assert 20 <= (await peer.hear("token_expiring", within=1.1))["expires_in"] <= 30
    with taking(44, 56):
        assert await peer.end(within=60) == ([], 4401)


@wires()
async def test_a_token_s_end_is_told_after_connected_however_long_that_takes(
    house: WiresHouse,
) -> None:
    house.disk.hold(reads=True)
    raw = house.dial()
    await raw.send(wires_upgrade(house.target(6, token=house.token(6, 30))))
    assert (await raw.answer()).status == 101
    await trio.sleep(3)  # the sweeper has come by
    house.disk.go()
    await raw.listen(2)
    frames = [json.loads(data) for _, data in wires_frames(raw.data)]
    assert [frame["type"] for frame in frames] == ["connected", "token_expiring"]


@wires()
async def test_auth_with_a_jwt_or_a_ticket_lets_the_socket_live_on(
    house: WiresHouse,
) -> None:
    peer = await house.join(6, token=house.token(6, 100))
    await peer.hear("token_expiring", within=45)
    ack = await peer.ask("auth", token=house.token(6, 400))
    assert 390 <= ack.pop("expires_in") < 400
    assert ack == {"type": "ack", "ref": "ask"}
    await peer.hears_nothing(330)  # the old end has passed, and was not 4401
    await peer.hear("token_expiring", within=20)  # warned again, of the new end
    asked = await house.ask("GET", "/api/v2/ws-token", token=house.token(6, 900))
    assert asked.json["expires_in"] == 60
    ack = await peer.ask("auth", token=asked.json["token"])
    assert 890 <= ack["expires_in"] <= 900  # as long as the asking token
    await peer.hears_nothing(800)
    again = await peer.refused("auth", token=asked.json["token"])
    assert again["code"] == "token_used"


@wires()
async def test_an_auth_in_the_25_s_after_the_end_is_in_time(house: WiresHouse) -> None:
    peer = await house.join(6, token=house.token(6, 4))
    await peer.hear("token_expiring", within=2)
    await trio.sleep(23)
    assert (await peer.ask("auth", token=house.token(6, 500)))["type"] == "ack"
    await peer.hears_nothing(100)


@wires()
async def test_a_bad_auth_changes_nothing(house: WiresHouse) -> None:
    peer = await house.join(6, token=house.token(6, 100))
    ring = house.server.keyring
    for token, code in {
        "": "token_invalid",
        "nonsense": "token_invalid",
        "x" * 5000: "token_invalid",
        house.token(6, 900) + "x": "token_invalid",
        house.token(6, -60): "token_expired",
        house.token(6, 900, use="signin"): "token_invalid",
        ring.sign(6, 60, use="ticket", jti="j", boot="another", until=1e11): (
            "token_used"
        ),
    }.items():
        error = await peer.refused("auth", token=token)
        assert error["code"] == code
        assert token == "" or token not in error["message"]
    assert await peer.hear("token_expiring", within=45)
    with taking(84, 87):
        assert await peer.end(within=100) == ([], 4401)  # at the old token's end


@wires()
async def test_auth_of_another_user_is_forbidden_and_ends_the_socket_with_4503(
    house: WiresHouse,
) -> None:
    peer = await house.join(6)
    await peer.say("auth", token=house.token(7), ref="a")
    ((error,), code) = await peer.end()
    assert (error["type"], error["code"], error["ref"]) == ("error", "forbidden", "a")
    assert code == 4503


@wires()
async def test_revoking_closes_all_sockets_of_the_user_and_no_other(
    house: WiresHouse,
) -> None:
    theirs = [await house.join(6) for _ in range(3)]
    other = await house.join(7)
    old = house.token(6)
    revoke = await house.command("POST", "/api/v1/internal/chat/revoke", {"user_id": 6})
    assert revoke == {"user_id": 6, "closed": 3}
    for peer in theirs:
        assert await peer.end() == ([], 4503)
    assert (await other.ask("ping"))["type"] == "pong"
    # Signed before, or within the leeway after: refused at every door.
    for token in (old, house.token(6), house.token(6, iat=None)):
        answer = await house.ask("GET", "/api/v1/me", token=token)
        assert (answer.status, answer.code) == (401, "token_invalid")
    raw = house.dial()
    await raw.send(wires_upgrade(house.target(6)))
    assert (await raw.answer()).code == "token_invalid"
    later = house.token(6, iat=time.time() + 5)
    again = await house.join(6, token=later)
    assert (await again.refused("auth", token=old))["code"] == "token_invalid"


@wires()
async def test_a_revocation_that_was_not_answered_in_time_holds_all_the_same(
    house: WiresHouse,
) -> None:
    peer = await house.join(6)
    house.disk.hold()
    raw, auth = house.dial(), f"Bearer {house.token(1, scope='service')}"
    path, body = "/api/v1/internal/chat/revoke", b'{"user_id":6}'
    await raw.send(wires_request("POST", path, body, Authorization=auth))
    assert (await raw.answer(within=16)).status == 408
    house.disk.go()
    assert await peer.end() == ([], 4503)
    assert (await house.ask("GET", "/api/v1/me", user=6)).status == 401


@wires()
@pytest.mark.parametrize("path", ["/api/v1/session", "/api/v1/chats"])
async def test_who_is_revoked_while_he_sends_a_body_gets_nothing_for_it(
    house: WiresHouse, path: str
) -> None:
    use = "signin" if path.endswith("session") else None
    auth = {"Authorization": f"Bearer {house.token(6, use=use)}", "Content_Length": "2"}
    slow = house.dial()
    await slow.send(wires_request("POST", path, None, **auth))
    await wait_all_tasks_blocked()
    await house.command("POST", "/api/v1/internal/chat/revoke", {"user_id": 6})
    await slow.send(b"{}")
    assert (await slow.answer()).code == "token_invalid"


@wires(requests=Rate(1, 10))
async def test_a_large_chat_costs_its_maker_as_many_requests_as_it_has_tens(
    house: WiresHouse,
) -> None:
    ids = [*range(1, 301)]
    made = await house.ask("POST", "/api/v1/chats", {"member_ids": ids}, user=6)
    assert made.status == 201
    late = await house.ask("GET", "/api/v1/me", user=6)
    assert (late.status, late.code) == (429, "rate_limited")
    await trio.sleep(float(late.json["error"]["retry_after"]) + 0.01)
    assert (await house.ask("GET", "/api/v1/me", user=6)).status == 200


@wires()
async def test_a_token_revoked_during_its_handshake_opens_no_socket(
    house: WiresHouse,
) -> None:
    service = f"Bearer {house.token(999, scope='service')}"
    house.disk.hold()
    asked = house.dial()  # a commit to wait behind
    await asked.send(
        wires_request("POST", "/api/v1/chats", b"{}", Authorization=service)
    )
    await wait_all_tasks_blocked()
    raw, revoke = house.dial(), house.dial()
    # A name that is new is stored before the 101: the handshake waits for it.
    target = house.target(token=house.token(6, name="Ann"))
    await raw.send(wires_upgrade(target))
    await wait_all_tasks_blocked()
    body = b'{"user_id": 6}'
    path = "/api/v1/internal/chat/revoke"
    await revoke.send(wires_request("POST", path, body, Authorization=service))
    await wait_all_tasks_blocked()
    house.disk.go()
    assert (await revoke.answer()).status == 200
    answer = await raw.answer()
    if answer.status == 101:  # `connected` may come first
        await raw.listen()
        *_, (opcode, payload) = wires_frames(raw.data)
        assert (opcode, payload[:2]) == (CLOSE, (4503).to_bytes(2, "big"))
    else:
        assert (answer.status, answer.code) == (401, "token_invalid")


# --- Session: life -------------------------------------------------------------------


@wires()
async def test_a_silent_peer_is_pinged_after_25_s_and_cut_10_s_later(
    house: WiresHouse,
) -> None:
    raw = await house.join_raw(6)
    with taking(22.5, 28.6):
        assert await raw.frame(within=30) == (PING, b"")
    with taking(10, 11.1):
        assert await raw.ends(within=20) == b""
    closed = (await house.stats())["connections"]["closed"]
    assert closed == {"1006": 1}


@wires()
async def test_pings_are_spread(house: WiresHouse) -> None:
    for _ in range(10):
        await house.join(6)
    spread = {round(s.seat.ping_after, 6) for s in house.server.sessions}
    assert len(spread) > 5
    assert all(22.5 <= seconds <= 27.5 for seconds in spread)


@pytest.mark.parametrize("sign", ["pong", "ping", "command", "half a frame"])
@wires()
async def test_any_byte_heard_is_life(house: WiresHouse, sign: str) -> None:
    raw = await house.join_raw(6)
    signs = {
        "pong": wires_frame(PONG),
        "ping": wires_frame(PING),
        "command": wires_command("ping"),
        "half a frame": b"\x81",
    }
    for _ in range(3 if sign != "half a frame" else 1):
        while (await raw.frame(within=30))[0] != PING:
            pass
        await trio.sleep(9)
        await raw.send(signs[sign])
    with taking(20, 30):
        while (await raw.frame(within=30))[0] != PING:
            pass


@wires()
async def test_a_peer_that_speaks_is_not_pinged(house: WiresHouse) -> None:
    raw = await house.join_raw(6)
    for _ in range(10):
        await trio.sleep(20)
        await raw.send(wires_command("ping"))
        await raw.hear("pong")  # and no ping


@wires(commands=OFF)
async def test_a_peer_whose_commands_wait_for_a_slow_disk_is_not_cut_as_silent(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    (message,) = await house.post(chat, "one", sender=6)
    peer = await house.join(6)  # its library answers pings
    house.disk.hold()
    for _ in range(70):
        await peer.say("mark_read", message_id=message)
    await peer.hears_nothing(50)
    house.disk.go()
    for _ in range(70):
        await peer.hear("ack")


@wires()
async def test_a_real_client_that_only_listens_stays_for_hours(
    house: WiresHouse,
) -> None:
    peer = await house.join(6, token=house.token(6, 100_000))
    await peer.hears_nothing(3 * 3600)
    assert (await peer.ask("ping"))["type"] == "pong"


BIG = "x" * 4000  # some fill the kernel's share and then the outbox


@wires()
async def test_a_stalled_peer_is_cut_after_10_s_and_delays_nobody(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    stalled = await house.join_raw(6, small=True)
    innocent = await house.join(7)
    with taking(0):
        await house.post(chat, *[BIG] * 20)
        for _ in range(20):
            await innocent.hear("new_message")
    with taking(10, 11.1):
        while len(house.server.sessions) == 2:
            await innocent.hears_nothing(0.1)
    assert (await innocent.ask("ping"))["type"] == "pong"
    stats = await house.stats()
    assert stats["connections"]["closed"] == {"1006": 1}
    assert stats["broadcast"]["stalls"] == 1
    # What came is whole frames, in order, up to where the last was torn by the end.
    await stalled.ends()
    numbers = [
        json.loads(data)["message"]["n"] for _, data in wires_frames(stalled.data)
    ]
    assert numbers == list(range(1, len(numbers) + 1))


@wires(outbox_bytes=4096)
async def test_a_stalled_peer_is_cut_also_while_a_command_of_his_waits_for_room(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    stalled = await house.join_raw(6, small=True)
    await house.post(chat, *[BIG] * 20)
    await stalled.send(wires_command("send_message", chat_id=chat, content="hi"))
    await trio.sleep(9)
    assert len(house.server.sessions) == 1
    await trio.sleep(2.5)
    assert not house.server.sessions
    assert (await house.stats())["broadcast"]["stalls"] == 1


@wires()
async def test_a_stalled_peer_that_pings_is_not_cut(house: WiresHouse) -> None:
    chat = await house.chat(6, 7)
    raw = await house.join_raw(6, small=True)
    await house.post(chat, *[BIG] * 20)
    for _ in range(10):
        await trio.sleep(9)
        await raw.send(wires_frame(PING))
    for n in range(1, 21):
        frame = await raw.frame()
        while frame[0] == PONG:
            frame = await raw.frame()
        assert json.loads(frame[1])["message"]["n"] == n
    await trio.sleep(1)
    assert len(house.server.sessions) == 1


@wires()
async def test_a_peer_that_reads_a_little_within_10_s_is_not_cut(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    raw = await house.join_raw(6, small=True)
    await house.post(chat, *[BIG] * 20)
    for _ in range(20):  # the kernel takes more only when it has given nearly all
        await trio.sleep(4)
        await raw.read(5000)
    assert len(house.server.sessions) == 1
    await raw.listen()
    assert len(list(wires_frames(raw.data))) == 20


@wires()
async def test_a_peer_that_reads_too_little_for_the_kernel_to_take_more_is_not_cut(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    raw = await house.join_raw(6)
    end = house.session(6).outbox.stream.socket
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    await house.post(chat, *[BIG] * 80)
    taken = 0
    for _ in range(6):
        await trio.sleep(9)
        before = len(house.session(6).outbox.buffer)
        await raw.read(32_768)
        await wait_all_tasks_blocked()
        taken += len(house.session(6).outbox.buffer) < before
    assert taken < 6  # else this would be the test above
    await raw.listen()
    assert len(list(wires_frames(raw.data))) == 80


@pytest.mark.parametrize(
    ("buffer", "slow_bytes", "seconds"),
    [(4096, 2000, 10), (32_768, 2000, 16.4), (65_536, 2000, 32.8), (65_536, 1, 35)],
)
def test_who_has_a_large_window_is_given_the_time_to_read_it(
    buffer: int, slow_bytes: int, seconds: float
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door, socket.socket() as theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        theirs.connect(door.getsockname())
        ours, _ = door.accept()
        with ours:
            ours.setblocking(False)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            given = chatd.patience(stream, Settings(slow_bytes=slow_bytes))
    assert given == pytest.approx(seconds, abs=0.5)


@wires(stall_seconds=20.0)
async def test_that_time_is_what_a_stalled_peer_has(house: WiresHouse) -> None:
    chat = await house.chat(6, 7)
    await house.join_raw(6, small=True)
    await house.post(chat, *[BIG] * 20)
    assert house.session(6).outbox.patience == 20
    house.session(6).outbox.patience = 30
    with taking(30, 31.1):
        await trio.sleep(29)
        assert house.server.sessions
        while house.server.sessions:  # noqa: ASYNC110 (the sweeper ends it)
            await trio.sleep(0.1)


@pytest.mark.parametrize("tail_events", [16_384, 4], ids=["the tail", "the log"])
async def test_a_slow_reader_falls_behind_gets_all_once_in_order_and_is_live_again(
    tmp_path: Path, tail_events: int, autojump_clock: MockClock
) -> None:
    settings = {
        "tail_events": tail_events, "outbox_bytes": 16_384, "page_bytes": 10_000,
    }  # fmt: skip
    async with wires_house(tmp_path, chatd.Store, settings) as house:
        chat = await house.chat(6, 7)
        slow = await house.join_raw(6, small=True)
        fast = await house.join(7)
        await house.post(chat, *[BIG] * 40)
        assert (await house.stats())["connections"]["catching_up"] == 1
        seat = house.session(6).seat
        assert len(seat.outbox.buffer) < 16_384 + 5_000  # the bound, and a batch
        heard: list[int] = []
        while len(heard) < 41:
            if len(heard) == 20:
                await house.post(chat, BIG)  # also while he catches up
            await trio.sleep(0.1)
            await slow.read(3000)
            heard += [json.loads(d)["message"]["n"] for _, d in wires_frames(slow.data)]
            assert len(seat.outbox.buffer) < 16_384 + 10_000 + 5_000
        assert heard == list(range(1, 42))
        stats = await house.stats()
        assert stats["connections"]["catching_up"] == 0
        assert stats["broadcast"]["catch_ups"] >= 1
        await house.post(chat, "live")
        assert (await slow.hear("new_message"))["message"]["n"] == 42
        for n in range(1, 43):
            assert (await fast.hear("new_message"))["message"]["n"] == n
        assert stats["broadcast"]["stalls"] == 0


@wires(outbox_bytes=8192)
async def test_an_ack_waits_for_its_event_when_the_sender_is_behind(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    slow = await house.join_raw(6, small=True)
    await house.post(chat, *[BIG] * 20)
    await slow.send(wires_command("send_message", chat_id=chat, content="mine"))
    await slow.listen()
    frames = [json.loads(data) for _, data in wires_frames(slow.data)]
    assert [frame["type"] for frame in frames] == ["new_message"] * 21 + ["ack"]
    assert frames[-2]["message"]["content"] == "mine"
    assert frames[-1]["message_id"] == frames[-2]["seq"]


@wires()
async def test_who_is_revoked_while_he_catches_up_gets_whole_frames_and_the_code(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    slow = await house.join_raw(6, small=True)
    await house.post(chat, *[BIG] * 100)
    await house.command("POST", "/api/v1/internal/chat/revoke", {"user_id": 6})
    await slow.listen()
    *messages, (opcode, payload) = wires_frames(slow.data)
    assert (opcode, payload[:2]) == (CLOSE, (4503).to_bytes(2, "big"))
    numbers = [json.loads(message)["message"]["n"] for _, message in messages]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) < 100


@pytest.mark.parametrize("code", [4503, 1012])
@wires()
async def test_a_socket_that_is_ended_while_it_is_greeted_gets_the_code(
    house: WiresHouse, code: int
) -> None:
    house.disk.hold(reads=True)
    raw = house.dial()
    await raw.send(wires_upgrade(house.target(6)))
    assert (await raw.answer()).status == 101
    if code == 4503:
        await house.command("POST", "/api/v1/internal/chat/revoke", {"user_id": 6})
    else:
        house.server.stopping.set()
    house.disk.go()
    await raw.ends()
    *_, (opcode, payload) = wires_frames(raw.data)
    assert (opcode, payload[:2]) == (CLOSE, code.to_bytes(2, "big"))


@wires()
async def test_typing_is_dropped_for_who_has_bytes_waiting(house: WiresHouse) -> None:
    chat = await house.chat(6, 7)
    busy, friend = await house.join_raw(6, small=True), await house.join(7)
    await house.post(chat, *[BIG] * 20)
    await friend.say("typing", chat_id=chat, is_typing=True)
    await trio.sleep(0.1)
    await busy.listen()
    kinds = {json.loads(data)["type"] for _, data in wires_frames(busy.data)}
    assert kinds == {"new_message"}
    await friend.say("typing", chat_id=chat, is_typing=False)
    await busy.hear("typing")


@wires(outbox_bytes=4096)
async def test_commands_are_not_read_while_the_outbox_is_over_its_bound(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    raw = await house.join_raw(6, small=True)
    friend = await house.join(7)
    await house.post(chat, *[BIG] * 20)
    for _ in range(20):
        await friend.hear("new_message")
    # One may be in hand already; the second is not read.
    for n in range(2):
        await raw.send(wires_command("send_message", chat_id=chat, content=f"{n}"))
    with trio.move_on_after(1):
        await friend.hear("new_message")
    await friend.hears_nothing(5)
    await raw.listen()
    with trio.fail_after(1):
        while (await friend.hear("new_message"))["message"]["content"] != "1":
            pass


# --- Session: membership -------------------------------------------------------------


@wires()
async def test_a_removal_stops_events_at_once_and_is_the_last_that_he_gets(
    house: WiresHouse,
) -> None:
    chat, other = await house.chat(6, 7), await house.chat(6, 7)
    removed, tab, stays = [await house.join(user) for user in (6, 6, 7)]
    await house.command("DELETE", f"/api/v1/chats/{chat}/members/6")
    for peer in (removed, tab, stays):
        event = await peer.hear("member_removed")
        assert (event["chat_id"], event["user_id"]) == (chat, 6)
    await house.post(chat, "behind his back", sender=7)
    assert (await stays.hear("new_message"))["message"]["n"] == 1
    await stays.say("typing", chat_id=chat, is_typing=True)
    for peer in (removed, tab):
        await peer.hears_nothing()
    sent = await removed.refused("send_message", chat_id=chat, content="hi")
    typed = await removed.refused("typing", chat_id=chat, is_typing=True)
    assert (sent["code"], typed["code"]) == ("not_found", "not_found")
    await house.post(other, "elsewhere", sender=7)
    assert (await removed.hear("new_message"))["chat_id"] == other


@wires()
async def test_an_addition_tells_the_members_and_then_starts_events_for_the_new_one(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6)
    await house.post(chat, "before", sender=6)
    await house.join(7, token=house.token(7, name="Bob"))
    member, new = await house.join(6), await house.join(7)
    await house.command("POST", f"/api/v1/chats/{chat}/members", {"user_id": 7})
    told = await member.hear("member_added")
    assert told == {
        "type": "member_added", "seq": told["seq"], "chat_id": chat, "user_id": 7,
        "name": "Bob",
    }  # fmt: skip
    added = await new.hear("chat_added")
    assert (added["seq"], added["chat_id"]) == (told["seq"] + 1, chat)
    assert added["chat"]["last_n"] == 1
    assert added["chat"]["last_message"]["content"] == "before"
    members = added["chat"]["members"]
    assert {member["user_id"]: member["read_n"] for member in members} == {6: 1, 7: 1}
    await house.post(chat, "after", sender=6)
    for peer in (member, new):
        assert (await peer.hear("new_message"))["message"]["content"] == "after"
        await peer.hears_nothing()


@wires(outbox_bytes=8192, page_events=2)
async def test_a_removal_reaches_a_reader_who_is_behind_and_nothing_later(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    slow = await house.join_raw(6, small=True)
    await house.post(chat, *[BIG] * 20)
    await house.command("DELETE", f"/api/v1/chats/{chat}/members/6")
    await house.post(chat, "behind his back", sender=7)
    await slow.listen()
    frames = [json.loads(data) for _, data in wires_frames(slow.data)]
    *messages, last = frames
    assert last["type"] == "member_removed"
    numbers = [message["message"]["n"] for message in messages]
    assert numbers == list(range(1, len(numbers) + 1))  # a prefix: then it was over
    assert len(numbers) < 20


@wires()
async def test_a_removal_and_an_addition_during_the_greeting_are_not_missed(
    house: WiresHouse,
) -> None:
    chat, other = await house.chat(6, 7), await house.chat(7)
    house.disk.hold()
    changes = [house.dial() for _ in range(3)]
    service = f"Bearer {house.token(999, scope='service')}"
    for raw, method, path, body in (
        (changes[0], "DELETE", f"/api/v1/chats/{chat}/members/6", None),
        (changes[1], "POST", f"/api/v1/chats/{other}/members", b'{"user_id":6}'),
        (changes[2], "POST", f"/api/v1/chats/{other}/messages",
         b'{"content":"hi","sender_id":7}'),
    ):  # fmt: skip
        await raw.send(wires_request(method, path, body, Authorization=service))
    await wait_all_tasks_blocked()
    raw = house.dial()
    await raw.send(wires_upgrade(house.target(6)))
    house.disk.go()
    assert (await raw.answer()).status == 101
    hello = await raw.hear("connected")
    await raw.listen()
    events = [json.loads(data) for _, data in wires_frames(raw.data)]
    start = int(hello["cursor"].rpartition(".")[2])
    # Whatever `connected` saw, it and the events that follow make the truth.
    assert [event["seq"] for event in events] == [
        seq for seq in range(start + 1, house.server.hub.head + 1)
        if seq != start + 2 or events[0]["type"] != "member_removed"
    ]  # fmt: skip


# --- Storage that fails --------------------------------------------------------------


@wires()
async def test_a_full_disk_is_told_nothing_is_acked_and_it_recovers_by_itself(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    peer, friend = await house.join(6), await house.join(7)
    db = house.store._writer
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")
    command = {"chat_id": chat, "content": "й" * 4000, "client_id": "k"}
    error = await peer.refused("send_message", **command)
    assert (error["code"], error["retry_after"]) == ("storage_failed", 2)
    over_http = await house.ask(
        "POST", f"/api/v1/chats/{chat}/messages", {"content": "й" * 4000}, user=7
    )
    assert (over_http.status, over_http.code) == (503, "storage_failed")
    assert over_http.headers["retry-after"] == "2"
    health = await house.ask("GET", "/healthz")
    assert (health.status, health.json) == (503, {"status": "degraded"})
    reading = await house.ask("GET", "/api/v1/chats", user=7)
    assert reading.status == 200
    assert (await house.stats())["store"]["degraded"] is True
    await friend.hears_nothing()
    db.execute("PRAGMA max_page_count = 1000000")
    await trio.sleep(2)
    assert (await house.ask("GET", "/healthz")).status == 200
    ack = await peer.ask("send_message", **command)
    assert (ack["n"], ack["duplicate"]) == (1, False)
    assert (await friend.hear("new_message"))["message"]["n"] == 1


# --- Stop ----------------------------------------------------------------------------


@wires()
async def test_a_stop_says_bye_and_1012_to_every_socket_at_once(
    house: WiresHouse,
) -> None:
    peers = [await house.join(user) for user in (6, 6, 7, 8)]
    house.server.stopping.set()
    with taking(0):
        for peer in peers:
            ((bye,), code) = await peer.end()
            assert (bye["type"], code) == ("bye", 1012)
            assert 0.5 <= bye["retry_after"] <= 1.1
        await house.server.finished.wait()
    house.dial(accepted=False)


@wires()
async def test_a_stop_with_nobody_there_ends_at_once(house: WiresHouse) -> None:
    with taking(0):
        await house.stop()


@wires()
async def test_answers_to_commands_in_flight_come_before_bye(house: WiresHouse) -> None:
    chat = await house.chat(6, 7)
    peer, friend = await house.join(6), await house.join(7)
    house.disk.hold()
    for content in "abc":
        await peer.say("send_message", chat_id=chat, content=content)
    posted = house.dial()
    await posted.send(
        wires_request(
            "POST",
            f"/api/v1/chats/{chat}/messages",
            b'{"content":"d"}',
            Authorization=f"Bearer {house.token(7)}",
        )
    )
    await wait_all_tasks_blocked()
    house.server.stopping.set()
    await trio.sleep(2)
    house.disk.go()
    heard, code = await peer.end()
    kinds = [frame["type"] for frame in heard]
    assert sorted(kinds[:-1]) == ["ack"] * 3 + ["new_message"] * 4
    assert (kinds[-1], code) == ("bye", 1012)
    answer = await posted.answer()
    assert (answer.status, answer.headers["connection"]) == (201, "close")
    # Who has nothing in flight is not made to wait.
    assert [frame["type"] for frame in (await friend.end())[0]] == ["bye"]


@wires()
async def test_a_stalled_socket_is_cut_at_the_drain_deadline_and_delays_no_other(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    stalled, peer = await house.join_raw(6, small=True), await house.join(7)
    await house.post(chat, *[BIG] * 20)
    house.server.stopping.set()
    with taking(0):
        heard, code = await peer.end()
        assert (heard[-1]["type"], code) == ("bye", 1012)
    with taking(4.9, 5):
        await house.server.finished.wait()
    house.check_left()
    await stalled.ends()


@wires()
async def test_a_slow_reader_gets_all_of_it_and_bye_if_the_drain_is_long_enough(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    slow = await house.join_raw(6, small=True)
    await house.post(chat, *[BIG] * 20)
    house.server.stopping.set()
    frames: list[tuple[int, bytes]] = []
    while not frames or frames[-1][0] != CLOSE:
        await trio.sleep(0.1)
        await slow.read(5000)
        frames += wires_frames(slow.data)
    kinds = [json.loads(data)["type"] for opcode, data in frames if opcode == TEXT]
    assert kinds == ["new_message"] * 20 + ["bye"]


@wires()
async def test_while_stopping_healthz_says_so_on_a_connection_still_open(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    kept, parked = house.dial(), house.dial()
    assert (await kept.ask("GET", "/healthz")).json == {"status": "ok"}
    await house.join_raw(6, small=True)  # this one keeps the server draining
    await house.post(chat, *[BIG] * 20)
    house.server.stopping.set()
    await trio.sleep(1)
    health = await kept.ask("GET", "/healthz")
    assert (health.status, health.json) == (503, {"status": "stopping"})
    assert health.headers["connection"] == "close"
    assert await kept.ends() == b""
    upgrade = house.target(7)
    await parked.send(wires_upgrade(upgrade))
    refused = await parked.answer()
    assert (refused.status, refused.code) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    kept.stream.socket.close()
    parked.stream.socket.close()
    with taking(3.9, 4):
        await house.server.finished.wait()


@wires()
async def test_a_stop_ends_parked_connections_with_the_last_socket(
    house: WiresHouse,
) -> None:
    answered, silent, half, late, behind = (house.dial() for _ in range(5))
    assert (await answered.ask("GET", "/healthz")).status == 200
    assert (await behind.ask("GET", "/healthz")).status == 200
    await half.send(b"GET /healthz HT")
    await behind.send(b"GET /healthz HT")
    peer = await house.join(6)
    house.server.stopping.set()
    with taking(0):
        await peer.end()
        assert await answered.ends() == b""
    # Nobody else will answer those who have connected, or begun to ask.
    with taking(0.9):
        await trio.sleep(0.9)
    await behind.send(b"TP/1.1\r\nHost: x\r\n\r\n")
    assert (await behind.answer()).json == {"status": "stopping"}
    assert (await late.ask("GET", "/healthz")).json == {"status": "stopping"}
    with taking(0.1):
        assert b"408" in await half.ends()
        assert await silent.ends() == b""


@wires(drain_seconds=1.0)
async def test_a_stop_during_every_stage_of_a_connection_hangs_nowhere(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    request = wires_request(
        "POST", f"/api/v1/chats/{chat}/messages", b'{"content":"x"}',
        Authorization=f"Bearer {house.token(6)}",
    )  # fmt: skip
    upgrade = wires_upgrade(house.target(6))
    half, whole = request[:-5], upgrade + wires_close(1000)
    for sent in (b"", b"\0" * 50, request[:30], half, upgrade[:50], upgrade, whole):
        await house.dial().send(sent)
    house.server.stopping.set()
    with taking(0, 1):
        await house.server.finished.wait()


@wires()
async def test_a_signal_stops_and_a_second_ends_at_once(house: WiresHouse) -> None:
    at_once = trio.Event()
    await house.nursery.start(house.server.watch_signals, at_once.set)
    peer = await house.join(6)
    signal.raise_signal(signal.SIGTERM)
    ((bye,), code) = await peer.end()
    assert (bye["type"], code) == ("bye", 1012)
    assert not at_once.is_set()
    signal.raise_signal(signal.SIGINT)
    with trio.fail_after(1):
        await at_once.wait()


@wires()
async def test_a_commit_that_hangs_for_60_s_is_no_longer_told_to_the_watchdog(
    house: WiresHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.setblocking(False)
        address = f"\0chatd-wires-{os.getpid()}"
        systemd.bind(address)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        systemd.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)

        async def told(seconds: float) -> list[bytes]:
            heard = []
            for _ in range(round(seconds)):
                await trio.sleep(1)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        heard.append(systemd.recv(100))
            return heard

        alive = b"WATCHDOG=1\nSTATUS=sockets: 0"
        assert set(await told(10)) == {alive}
        house.disk.hold()
        raw = house.dial()
        auth = f"Bearer {house.token(6)}"
        await raw.send(
            wires_request("POST", "/api/v1/chats", b"{}", Authorization=auth)
        )
        assert 58 <= len(await told(70)) <= 61
        assert await told(60) == []
        house.disk.go()
        assert set(await told(3)) == {alive}
        monkeypatch.delenv("NOTIFY_SOCKET")


@wires()
async def test_a_systemd_that_reads_nothing_holds_nothing_up(
    house: WiresHouse, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "chatd")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other,
    ):
        address = f"\0chatd-deaf-{os.getpid()}"
        systemd.bind(address)
        other.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                other.sendto(b"WATCHDOG=1", address)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        began = time.monotonic()
        await trio.sleep(3)
        assert time.monotonic() - began < 30
        assert "notify_failed" in caplog.text
        monkeypatch.delenv("NOTIFY_SOCKET")


@wires()
async def test_a_file_that_the_writer_opens_anew_is_not_missed_meanwhile(
    house: WiresHouse,
) -> None:
    db = house.server.settings.db
    wal, aside = db.with_name(f"{db.name}-wal"), db.with_name("aside")
    raw = house.dial()
    house.disk.hold()
    auth = f"Bearer {house.token(6)}"
    await raw.send(wires_request("POST", "/api/v1/chats", b"{}", Authorization=auth))
    wal.rename(aside)  # as SQLite does after an I/O error, in the writer's thread
    await trio.sleep(3)
    aside.rename(wal)
    house.disk.go()
    assert (await raw.answer()).status == 201


@wires()
async def test_out_of_descriptors_accepting_waits_and_goes_on(
    house: WiresHouse, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "chatd")
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
        house.listener.offer.send_nowait(OSError(number, "none left"))
    raw = house.dial()
    with taking(0.4, 0.5):
        assert (await raw.ask("GET", "/healthz")).status == 200
    assert len(caplog.records) == 1  # not a flood


def test_any_other_error_of_accepting_ends_the_server(tmp_path: Path) -> None:
    @wires()
    async def serve(house: WiresHouse) -> None:
        house.listener.offer.send_nowait(OSError(errno.EBADF, "Bad file descriptor"))
        await trio.sleep_forever()

    with pytest.raises(OSError, match="Bad file descriptor"):
        serve(tmp_path)


# --- Http: the protocol --------------------------------------------------------------


@wires()
async def test_a_connection_is_kept_for_the_next_request(house: WiresHouse) -> None:
    raw = house.dial()
    for _ in range(3):
        answer = await raw.ask("GET", "/healthz")
        assert (answer.status, answer.json) == (200, {"status": "ok"})
        assert "connection" not in answer.headers
        await trio.sleep(70)


@wires()
async def test_pipelined_requests_are_answered_in_order(house: WiresHouse) -> None:
    raw = house.dial()
    chat = await house.chat(6, 7)
    auth = {"Authorization": f"Bearer {house.token(6)}"}
    path = f"/api/v1/chats/{chat}/messages"
    await raw.send(
        wires_request("POST", path, b'{"content":"a"}', **auth),
        wires_request("POST", path, b'{"content":"b"}', **auth),
        wires_request("HEAD", "/healthz"),
        wires_request("GET", path, None, **auth),
        wires_upgrade(house.target(6)),
    )
    for n in (1, 2):
        answer = await raw.answer()
        assert (answer.status, answer.json["message"]["n"]) == (201, n)
    assert (await raw.answer("HEAD")).status == 200
    assert len((await raw.answer()).json["messages"]) == 2
    assert (await raw.answer()).status == 101
    assert (await raw.hear("connected"))["user_id"] == 6


@wires()
async def test_a_request_in_single_bytes_is_served_like_a_whole_one(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    raw = house.dial()
    request = wires_request(
        "POST", f"/api/v1/chats/{chat}/messages", b'{"content":"a"}',
        Authorization=f"Bearer {house.token(6)}",
    )  # fmt: skip
    for number in range(len(request)):
        await raw.send(request[number : number + 1])
        await wait_all_tasks_blocked()
    assert (await raw.answer()).status == 201


@wires()
async def test_head_is_get_without_the_body(house: WiresHouse) -> None:
    for path, headers in {
        "/": {},
        "/api/v1/me": {"Authorization": f"Bearer {house.token(6)}"},
        "/api/v1/nothing": {},
    }.items():
        raw = house.dial()
        got = await raw.ask("GET", path, **headers)
        head = await raw.ask("HEAD", path, **headers)
        assert (head.status, head.body) == (got.status, b"")
        assert head.headers["content-length"] == str(len(got.body))
        assert head.headers["content-type"] == got.headers["content-type"]


@wires()
async def test_options_lists_what_a_path_takes(house: WiresHouse) -> None:
    for path, allow in {
        "/healthz": "GET, HEAD, OPTIONS",
        "/api/v1/chats": "GET, POST, HEAD, OPTIONS",
        "/api/v1/chats/5/members": "POST, OPTIONS",
        "/api/v1/chats/5/members/6": "DELETE, OPTIONS",
    }.items():
        answer = await house.ask("OPTIONS", path)
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["allow"] == allow
        assert "content-length" not in answer.headers
    assert (await house.ask("OPTIONS", "/nothing")).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "BREW"])
@wires()
async def test_a_method_that_a_path_does_not_take_is_405_with_allow(
    house: WiresHouse, method: str
) -> None:
    for path in ("/healthz", "/", "/api/v1/me", "/ws/chat"):
        answer = await house.ask(method, path, user=6)
        assert (answer.status, answer.code) == (405, "method_not_allowed")
        assert answer.headers["allow"] == "GET, HEAD, OPTIONS"


@wires()
async def test_what_is_not_there_is_404(house: WiresHouse) -> None:
    for path in (
        "/nothing", "/web/", "/web/../chatd.py", "/web/%2e%2e/chatd.py", "/web/app.js/",
        "/healthz/", "/HEALTHZ", "/api/v1/chats/0/messages", "/api/v1/chats/x/messages",
        "/api/v1/chats/-1/messages", "/api/v1/chats/9007199254740992/messages",
        "/api/v1/chats/99999999999999999999/messages", "/api/v1/chats//messages",
        "/api/v1/chats/*/messages", "/api/v1/messages/1", "/*",
    ):  # fmt: skip
        answer = await house.ask("GET", path, user=6)
        assert (answer.status, answer.code) == (404, "not_found"), path


WIRES_BAD_HEADS: dict[str, tuple[bytes, int]] = {
    "no HTTP": (b"hello\r\n\r\n", 400),
    "a TLS hello": (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", 400),
    "two slashes": (wires_request("GET", "//evil.example/healthz"), 400),
    "an absolute target": (wires_request("GET", "http://x.example/healthz"), 400),
    "an authority": (wires_request("CONNECT", "x.example:443"), 400),
    "an asterisk": (wires_request("OPTIONS", "*"), 400),
    "no slash": (wires_request("GET", "healthz"), 400),
    "a control character in the target": (
        b"GET /\x01 HTTP/1.1\r\nHost: x\r\n\r\n", 400,
    ),
    "a length and chunks": (
        wires_request("POST", "/healthz", b"0\r\n\r\n", Transfer_Encoding="chunked"),
        400,
    ),
    "two lengths": (
        wires_request("POST", "/api/v1/chats", b"{}", content_length="3"), 400,
    ),
    "a length of -1": (wires_request("POST", "/healthz", Content_Length="-1"), 400),
    "another HTTP": (b"GET /healthz HTTP/1.2\r\nHost: x\r\n\r\n", 400),
    "no Host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "a Host that is not ASCII": (wires_request("GET", "/healthz", Host="caf\xe9"), 400),
    "an Origin that is not ASCII": (
        wires_request("GET", "/healthz", Origin="http://caf\xe9"), 400,
    ),
    "a Connection that is not ASCII": (
        wires_request("GET", "/healthz", Connection="clos\xe9"), 400,
    ),
    "a query that is not UTF-8": (wires_request("GET", "/healthz?a=%ff"), 400),
    "a query of 17 fields": (wires_request("GET", "/?" + "a=1&" * 16 + "a=1"), 400),
    "65 header lines": (
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 64 + b"\r\n", 431,
    ),
    "a head of 40 KB": (wires_request("GET", "/healthz", X="x" * 40_000), 431),
    "a target of 40 KB": (wires_request("GET", "/" + "x" * 40_000), 431),
}  # fmt: skip


@pytest.mark.parametrize("fault", WIRES_BAD_HEADS)
@wires()
async def test_a_bad_head_gets_one_whole_answer_and_the_connection_ends(
    house: WiresHouse, fault: str
) -> None:
    sent, status = WIRES_BAD_HEADS[fault]
    raw = house.dial()
    await raw.send(sent)
    answer = await raw.answer()
    assert answer.status == status
    assert answer.code == ("too_large" if status == 431 else "bad_field")
    assert answer.headers["connection"] == "close"
    assert await raw.ends() == b""
    await trio.sleep(1.01)  # even if the peer keeps it, it has gone now
    assert house.server.open == 0


@wires()
async def test_64_header_lines_are_not_too_many(house: WiresHouse) -> None:
    raw = house.dial()
    await raw.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 63 + b"\r\n")
    assert (await raw.answer()).status == 200


@wires()
async def test_a_head_that_takes_10_s_is_answered_408(house: WiresHouse) -> None:
    raw = house.dial()
    with taking(10):
        for byte in b"GET / HTTP":
            await raw.send(bytes((byte,)))
            await trio.sleep(0.9)
        answer = await raw.answer(within=2)
    assert (answer.status, answer.code) == (408, "timeout")
    assert answer.headers["connection"] == "close"
    assert await raw.ends() == b""


@wires()
async def test_who_says_nothing_at_all_is_closed_without_a_word_after_10_s(
    house: WiresHouse,
) -> None:
    raw = house.dial()
    with taking(10):
        assert await raw.ends(within=11) == b""


@wires()
async def test_a_kept_connection_is_closed_after_75_s_of_silence(
    house: WiresHouse,
) -> None:
    raw = house.dial()
    await raw.ask("GET", "/healthz")
    with taking(75):
        assert await raw.ends(within=80) == b""


@wires()
async def test_the_head_of_a_later_request_has_10_s_too(house: WiresHouse) -> None:
    raw = house.dial()
    await raw.ask("GET", "/healthz")
    await trio.sleep(60)
    await raw.send(b"GET")
    with taking(10):
        assert (await raw.answer(within=11)).status == 408


@wires()
async def test_a_body_that_takes_15_s_is_answered_408(house: WiresHouse) -> None:
    raw = house.dial()
    request = wires_request(
        "POST", "/api/v1/chats", b"{}", Authorization=f"Bearer {house.token(6)}"
    )
    await raw.send(request[:-1])
    with taking(15):
        answer = await raw.answer(within=16)
    assert (answer.status, answer.code) == (408, "timeout")
    assert answer.headers["connection"] == "close"
    assert await raw.ends() == b""


@wires()
async def test_a_peer_that_leaves_in_mid_body_is_nobodys_error(
    house: WiresHouse,
) -> None:
    raw = house.dial()
    request = wires_request(
        "POST", "/api/v1/chats", b'{"title":"x"}', Authorization="Bearer x"
    ).replace(b"Bearer x", f"Bearer {house.token(6)}".encode())
    await raw.send(request[:-5])
    await raw.stream.send_eof()
    assert await raw.ends() == b""


@wires()
async def test_a_peer_that_does_not_read_its_answer_is_cut_after_15_s(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    await house.post(chat, *[BIG] * 50)
    raw = house.dial(small=True)
    path = f"/api/v1/chats/{chat}/messages?limit=50"
    auth = f"Bearer {house.token(6)}"
    await raw.send(wires_request("GET", path, None, Authorization=auth))
    await trio.sleep(14.9)
    assert house.server.open == 1
    await trio.sleep(0.2)
    assert house.server.open == 0


@wires()
async def test_100_continue_is_said_to_who_waits_for_it(house: WiresHouse) -> None:
    chat = await house.chat(6, 7)
    raw = house.dial()
    request = wires_request(
        "POST", f"/api/v1/chats/{chat}/messages", b'{"content":"a"}',
        Authorization=f"Bearer {house.token(6)}", Expect="100-continue",
    )  # fmt: skip
    head, _, body = request.partition(b"\r\n\r\n")
    await raw.send(head, b"\r\n\r\n")
    await raw.listen(0.1)
    assert raw.data.startswith(b"HTTP/1.1 100 ")
    await raw.send(body)
    assert (await raw.answer()).status == 201
    assert raw.informed == [100]
    assert (await raw.ask("GET", "/healthz")).status == 200  # and it is kept


@wires()
async def test_who_is_refused_is_not_asked_for_the_body(house: WiresHouse) -> None:
    raw = house.dial()
    request = wires_request("POST", "/api/v1/chats", b"{}", Expect="100-continue")
    await raw.send(request[:-2])
    answer = await raw.answer()
    assert (answer.status, raw.informed) == (401, [])
    assert answer.headers["connection"] == "close"


@wires(max_message_bytes=1000)
async def test_a_body_too_long_is_413_by_its_length_and_by_its_chunks(
    house: WiresHouse,
) -> None:
    auth = {"Authorization": f"Bearer {house.token(6)}"}
    body = json.dumps({"title": "x", "pad": "x" * 2000}).encode()
    chunk = b"%x\r\n%b\r\n" % (len(body), body)
    by_length = wires_request("POST", "/api/v1/chats", body, **auth)
    by_chunks = wires_request(
        "POST", "/api/v1/chats", None, Transfer_Encoding="chunked", **auth
    )
    for request in (by_length, by_chunks + chunk, by_chunks + chunk[:1500]):
        raw = house.dial()
        await raw.send(request)
        answer = await raw.answer()
        assert (answer.status, answer.code) == (413, "too_large")
        assert answer.headers["connection"] == "close"
        assert await raw.ends() == b""


@wires(max_message_bytes=1000)
async def test_a_body_whose_length_is_too_long_is_not_waited_for(
    house: WiresHouse,
) -> None:
    raw = house.dial()
    auth = {"Authorization": f"Bearer {house.token(6)}", "Expect": "100-continue"}
    await raw.send(
        wires_request("POST", "/api/v1/chats", None, Content_Length="1001", **auth)
    )
    answer = await raw.answer()
    assert (answer.status, raw.informed) == (413, [])


@wires(max_message_bytes=1000)
async def test_a_body_of_exactly_the_limit_passes_also_in_chunks(
    house: WiresHouse,
) -> None:
    auth = {"Authorization": f"Bearer {house.token(6)}"}
    body = b'{"title":"x"}'.ljust(1000)
    raw = house.dial()
    await raw.send(wires_request("POST", "/api/v1/chats", body, **auth))
    assert (await raw.answer()).status == 201
    pieces = b"".join(b"64\r\n%b\r\n" % body[n : n + 100] for n in range(0, 1000, 100))
    await raw.send(
        wires_request(
            "POST", "/api/v1/chats", None, Transfer_Encoding="chunked", **auth
        ),
        pieces + b"0\r\n\r\n",
    )
    assert (await raw.answer()).status == 201
    assert (await raw.ask("GET", "/healthz")).status == 200


@wires()
async def test_a_body_in_crumbs_is_too_large(house: WiresHouse) -> None:
    body = b'{"title":"x"}'.ljust(1025)
    auth = {"Authorization": f"Bearer {house.token(6)}"}
    for size, status in ((1024, 201), (1025, 413)):
        crumbs = b"".join(b"1\r\n%c\r\n" % byte for byte in body[:size])
        raw = house.dial()
        await raw.send(
            wires_request(
                "POST", "/api/v1/chats", None, Transfer_Encoding="chunked", **auth
            ),
            crumbs + b"0\r\n\r\n",
        )
        assert (await raw.answer()).status == status


@wires()
async def test_a_bad_chunk_is_400_and_the_connection_ends(house: WiresHouse) -> None:
    raw = house.dial()
    auth = f"Bearer {house.token(6)}"
    await raw.send(
        wires_request(
            "POST", "/api/v1/chats", None, Transfer_Encoding="chunked",
            Authorization=auth,
        ),
        b"zz\r\n",
    )  # fmt: skip
    answer = await raw.answer()
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert await raw.ends() == b""


@wires()
async def test_a_body_where_none_is_expected_ends_the_connection_after_the_answer(
    house: WiresHouse,
) -> None:
    raw = house.dial()
    await raw.send(wires_request("GET", "/healthz", b"x" * 1000))
    answer = await raw.answer()
    assert answer.status == 200
    # Either it was read, and the connection is kept, or the connection is at its end.
    if answer.headers.get("connection") == "close":
        assert await raw.ends() == b""
    else:
        assert (await raw.ask("GET", "/healthz")).status == 200


@wires()
async def test_connection_close_and_http_1_0_end_after_one_answer(
    house: WiresHouse,
) -> None:
    for request in (
        wires_request("GET", "/healthz", None, Connection="close"),
        b"GET /healthz HTTP/1.0\r\n\r\n",
    ):
        raw = house.dial()
        await raw.send(request)
        assert (await raw.answer()).status == 200
        assert await raw.ends() == b""


@wires()
async def test_every_answer_has_the_headers_that_protect(house: WiresHouse) -> None:
    for method, path in (
        ("GET", "/"), ("GET", "/healthz"), ("GET", "/nothing"), ("GET", "/api/v1/me"),
        ("OPTIONS", "/healthz"), ("GET", "/ws/chat"), ("POST", "/healthz"),
    ):  # fmt: skip
        headers = (await house.ask(method, path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["date"].endswith("GMT")
        assert headers["cache-control"] in {"no-store", "no-cache"}
        assert "server" not in headers
        assert "set-cookie" not in headers


@wires()
async def test_the_pages_files_have_a_policy_and_are_sent_once(
    house: WiresHouse,
) -> None:
    raw = house.dial()
    for path, kind in {
        "/": "text/html", "/web/index.html": "text/html", "/web/style.css": "text/css",
        "/web/app.js": "text/javascript", "/web/chat-websocket.js": "text/javascript",
    }.items():  # fmt: skip
        answer = await raw.ask("GET", path)
        assert answer.status == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["cache-control"] == "no-cache"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        again = await raw.ask("GET", path, If_None_Match=answer.headers["etag"])
        assert (again.status, again.body) == (304, b"")
        assert again.headers["etag"] == answer.headers["etag"]
        other = await raw.ask("GET", path, If_None_Match='"older"')
        assert other.body == answer.body


# --- Http: the handshake -------------------------------------------------------------


@wires()
async def test_a_plain_get_of_the_socket_is_426(house: WiresHouse) -> None:
    for changed in (
        {"Upgrade": ""}, {"Connection": ""}, {"Upgrade": "h2c"},
        {"Connection": "keep-alive"},
    ):  # fmt: skip
        raw = house.dial()
        await raw.send(wires_upgrade(house.target(6), **changed))
        answer = await raw.answer()
        assert (answer.status, answer.code) == (426, "upgrade_required")
        assert answer.headers["upgrade"] == "websocket"
        assert "upgrade" in answer.headers["connection"].lower()


@wires()
async def test_head_of_the_socket_is_426_too(house: WiresHouse) -> None:
    answer = await house.ask("HEAD", "/ws/chat", user=6)
    assert (answer.status, answer.body) == (426, b"")


@wires()
async def test_an_upgrade_with_a_body_is_refused(house: WiresHouse) -> None:
    for headers in ({"Content_Length": "5"}, {"Transfer_Encoding": "chunked"}):
        raw = house.dial()
        await raw.send(wires_upgrade(house.target(6), **headers), b"5\r\nhello")
        answer = await raw.answer()
        assert (answer.status, answer.headers["connection"]) == (400, "close")


@wires()
async def test_another_version_than_13_is_told_which_one(house: WiresHouse) -> None:
    for version in ("8", "14", "13, 8", ""):
        raw = house.dial()
        await raw.send(wires_upgrade(house.target(6), Sec_WebSocket_Version=version))
        answer = await raw.answer()
        assert (answer.status, answer.code) == (426, "upgrade_required")
        assert answer.headers["sec-websocket-version"] == "13"


@wires()
async def test_a_key_that_is_not_16_bytes_is_400(house: WiresHouse) -> None:
    for key in ("", "x", "dGhlIHNhbXBsZSBub25j", "dGhlIHNhbXBsZSBub25jZR==",
                "dGhlIHNhbXBsZSBub25jZQ==" * 2, "!" * 24):  # fmt: skip
        raw = house.dial()
        await raw.send(wires_upgrade(house.target(6), Sec_WebSocket_Key=key))
        answer = await raw.answer()
        assert (answer.status, answer.code) == (400, "bad_field")
        assert "Sec-WebSocket-Key" in answer.json["error"]["message"]


@wires()
async def test_an_upgrade_over_http_1_0_is_refused(house: WiresHouse) -> None:
    raw = house.dial()
    await raw.send(wires_upgrade(house.target(6)).replace(b"HTTP/1.1", b"HTTP/1.0"))
    answer = await raw.answer()
    assert answer.status in {400, 426}
    assert await raw.ends() == b""


@wires()
async def test_the_handshake_is_answered_as_rfc_6455_1_3_has_it(
    house: WiresHouse,
) -> None:
    raw = house.dial()
    await raw.send(
        wires_upgrade(
            house.target(6), Connection="keep-alive, Upgrade", Upgrade="WebSocket",
            Sec_WebSocket_Protocol="chat",
            Sec_WebSocket_Extensions="permessage-deflate",
        )
    )  # fmt: skip
    answer = await raw.answer()
    assert answer.status == 101
    assert answer.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert "sec-websocket-extensions" not in answer.headers  # no zip bombs
    assert "sec-websocket-protocol" not in answer.headers
    await raw.hear("connected")


@wires()
async def test_an_upgrade_may_come_as_a_later_request_of_a_kept_connection(
    house: WiresHouse,
) -> None:
    raw = house.dial()
    assert (await raw.ask("GET", "/healthz")).status == 200
    await raw.send(wires_upgrade(house.target(6)))
    assert (await raw.answer()).status == 101
    await raw.hear("connected")


@wires(max_connections=1, handshakes=Rate(1, 4))
async def test_an_upgrade_is_refused_for_rate_then_origin_then_token_then_house(
    house: WiresHouse,
) -> None:
    async def refused(target: str, **changed: str) -> HttpAnswer:
        raw = house.dial()
        await raw.send(wires_upgrade(target, **changed), wires_frame(PING))
        answer = await raw.answer()
        assert answer.headers["connection"] == "close"
        await trio.sleep(1.01)  # the peer keeps it, and it is gone all the same
        assert house.server.open == before
        return answer

    first = await house.join_raw(1)
    await trio.sleep(5)
    good, foreign = house.target(6), {"Origin": "https://evil.example"}
    before = house.server.open

    answers = [
        await refused("/ws/chat?token=bad", **foreign),
        await refused("/ws/chat?token=bad"),
        await refused(good),
    ]
    assert [(a.status, a.code) for a in answers] == [
        (403, "forbidden"), (401, "token_invalid"), (503, "overloaded"),
    ]  # fmt: skip
    assert int(answers[2].headers["retry-after"]) >= 1
    for _ in range(4):  # and with the bucket empty it is always the rate
        raw = house.dial()
        await raw.send(wires_upgrade("/ws/chat?token=bad", **foreign))
        last = await raw.answer()
    last = await refused("/ws/chat?token=bad", **foreign)
    assert (last.status, last.code) == (429, "rate_limited")
    assert last.headers["retry-after"] == "1"
    refusals = (await house.stats())["connections"]["refused"]
    assert refusals["overloaded"] == 1
    assert (await first.frame(30)) == (PING, b"")


@wires(max_connections=2)
async def test_a_full_house_has_no_place_more_however_many_knock_at_once(
    house: WiresHouse,
) -> None:
    raws = [house.dial() for _ in range(6)]
    for user, raw in enumerate(raws, 1):
        await raw.send(wires_upgrade(house.target(user)))
    answers = sorted([(await raw.answer()).status for raw in raws])
    assert answers == [101, 101, 503, 503, 503, 503]


@wires(max_connections=1)
async def test_a_ticket_that_met_a_full_house_is_not_spent(house: WiresHouse) -> None:
    ticket = (await house.ask("GET", "/api/v2/ws-token", user=6)).json["token"]
    full = await house.join(7)
    target = house.target(token=ticket)
    raw = house.dial()
    await raw.send(wires_upgrade(target))
    assert (await raw.answer()).status == 503
    await full.leave()
    await wait_all_tasks_blocked()
    raw = house.dial()
    await raw.send(wires_upgrade(target))
    assert (await raw.answer()).status == 101
    await raw.hear("connected")
    await raw.send(wires_close(1000))
    await raw.close_code()
    again = house.dial()
    await again.send(wires_upgrade(target))
    answer = await again.answer()
    assert (answer.status, answer.code) == (401, "token_used")


@wires()
async def test_one_ticket_opens_one_socket_however_many_race(house: WiresHouse) -> None:
    ticket = (await house.ask("GET", "/api/v2/ws-token", user=6)).json["token"]
    raws = [house.dial() for _ in range(5)]
    for raw in raws:
        await raw.send(wires_upgrade(house.target(token=ticket)))
    answers = sorted([(await raw.answer()).status for raw in raws])
    assert answers == [101, 401, 401, 401, 401]


@wires()
async def test_an_upgrade_needs_one_token_in_the_query(house: WiresHouse) -> None:
    token = house.token(6)
    for target, status, code in (
        ("/ws/chat", 401, "token_invalid"),
        ("/ws/chat?token=", 401, "token_invalid"),
        (f"/ws/chat?token={token}&token={token}", 400, "bad_field"),
        (f"/ws/chat?token={token}&cursor=a&cursor=b", 400, "bad_field"),
        (house.target(token=house.token(6, -60)), 401, "token_expired"),
        (house.target(token=house.token(6, use="signin")), 401, "token_invalid"),
    ):
        raw = house.dial()
        await raw.send(wires_upgrade(target))
        answer = await raw.answer()
        assert (answer.status, answer.code) == (status, code)
        assert token not in answer.body.decode()


@wires(handshakes=Rate(1, 3))
async def test_handshakes_and_401s_are_counted_by_address_behind_a_trusted_proxy(
    house: WiresHouse,
) -> None:
    async def status(address: str, upgrade: bool) -> int:
        raw = house.dial(tcp=True)
        if upgrade:
            await raw.send(wires_upgrade("/ws/chat", X_Forwarded_For=address))
        else:
            await raw.send(
                wires_request("GET", "/api/v1/me", None, X_Forwarded_For=address)
            )
        answer = await raw.answer()
        raw.stream.socket.close()
        return answer.status

    for upgrade in (True, False, True):
        assert await status("203.0.113.1", upgrade) == 401
    for upgrade in (True, False):
        assert await status("203.0.113.1", upgrade) == 429
        # What the client wrote itself stands further left, and is not believed.
        assert await status("198.51.100.7, 203.0.113.1", upgrade) == 429
    assert await status("203.0.113.2", True) == 401
    for host in ("1", "2", "3"):
        assert await status(f"2001:db8::{host}", True) == 401
    assert await status("2001:db8::4", True) == 429  # the same /64
    assert await status("2001:db8:0:1::4", True) == 401
    await trio.sleep(1)
    assert await status("203.0.113.1", False) == 401


@wires(handshakes=Rate(1, 3))
async def test_a_good_request_is_no_handshake_and_costs_its_address_nothing(
    house: WiresHouse,
) -> None:
    for _ in range(10):
        assert (await house.ask("GET", "/api/v1/me", user=6)).status == 200
    await house.join(6)


@wires(origin=("https://shop.example",))
async def test_origin_is_checked_on_every_request(house: WiresHouse) -> None:
    for origin, status in {
        "": 200,
        "http://chat.example": 200,
        "https://chat.example:443": 200,
        "https://shop.example": 200,
        "HTTPS://SHOP.EXAMPLE": 200,
        "http://shop.example": 403,
        "https://shop.example.evil.example": 403,
        "https://evil.example": 403,
        "http://chat.example:8080": 403,
        "null": 403,
        "chat.example": 403,
    }.items():
        headers = {"Origin": origin} if origin else {}
        for method in ("GET", "OPTIONS"):
            answer = await house.dial().ask(method, "/healthz", **headers)
            assert answer.status == (204 if (method, status) == ("OPTIONS", 200)
                                     else status), origin  # fmt: skip
        raw = house.dial()
        await raw.send(wires_upgrade(house.target(6), **headers))
        assert (await raw.answer()).status == (101 if status == 200 else 403)
        raw.stream.socket.close()


@wires()
async def test_the_forwarded_host_is_our_own_origin_only_from_a_trusted_proxy(
    house: WiresHouse,
) -> None:
    headers = {"Origin": "https://site.example", "X_Forwarded_Host": "site.example"}
    trusted = house.dial(tcp=True)  # from loopback
    assert (await trusted.ask("GET", "/healthz", **headers)).status == 200
    assert (await house.dial().ask("GET", "/healthz", **headers)).status == 403


@wires(origin=("https://shop.example",))
async def test_a_listed_origin_gets_cors_answers_and_never_credentials(
    house: WiresHouse,
) -> None:
    preflight = await house.ask(
        "OPTIONS", "/api/v1/chats", Origin="https://shop.example",
        Access_Control_Request_Method="POST",
    )  # fmt: skip
    assert preflight.status == 204
    allow = preflight.headers
    assert "POST" in allow["access-control-allow-methods"]
    assert set(allow["access-control-allow-headers"].split(", ")) == {
        "authorization", "content-type", "idempotency-key",
    }  # fmt: skip
    for path in ("/api/v1/me", "/nothing"):  # errors too: the page must read them
        answer = await house.ask("GET", path, Origin="https://shop.example")
        for headers in (answer.headers, preflight.headers):
            assert headers["access-control-allow-origin"] == "https://shop.example"
            assert headers["vary"] == "Origin"
            assert "access-control-allow-credentials" not in headers
    own = await house.ask("GET", "/healthz", Origin="http://chat.example")
    assert "access-control-allow-origin" not in own.headers
    assert own.headers["vary"] == "Origin"


# --- Http: a full house --------------------------------------------------------------


@wires(max_connections=1)
async def test_at_the_limit_of_connections_the_longest_parked_makes_room(
    house: WiresHouse,
) -> None:
    parked = [house.dial() for _ in range(129)]
    await wait_all_tasks_blocked()
    first, second = parked[:2]
    await first.ask("GET", "/healthz")  # now the second is parked for longest
    newcomer = house.dial()
    assert (await newcomer.ask("GET", "/healthz")).status == 200
    assert await second.ends() == b""
    assert (await first.ask("GET", "/healthz")).status == 200
    assert house.server.open == 129


@wires(max_connections=1)
async def test_who_makes_room_in_mid_head_goes_at_once(house: WiresHouse) -> None:
    raws = [house.dial() for _ in range(200)]
    for raw in raws:
        await raw.send(b"GET /healthz HT")
    await wait_all_tasks_blocked()
    assert house.server.open == 129
    for raw in raws[:71]:
        assert await raw.ends() == b""


@wires()
async def test_a_peer_that_resets_before_it_is_accepted_is_nobodys_error(
    house: WiresHouse,
) -> None:
    for sent in (b"", wires_request("GET", "/healthz"), wires_upgrade(house.target(6))):
        raw = house.dial(tcp=True)
        await raw.send(sent)
        raw.stream.socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        raw.stream.socket.close()
    await trio.sleep(2)
    assert house.server.open == 0


@wires(max_connections=1, requests=OFF)
async def test_if_none_is_parked_a_newcomer_gets_503_at_once_and_the_log_no_flood(
    house: WiresHouse, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "chatd")
    auth = {"Authorization": f"Bearer {house.token(6)}", "Content_Length": "2"}
    busy = [house.dial() for _ in range(129)]
    house.disk.hold()  # they have said all, and wait for us
    for raw in busy:
        await raw.send(wires_request("POST", "/api/v1/chats", None, **auth) + b"{}")
    await wait_all_tasks_blocked()
    for _ in range(20):
        for tcp in (False, True):
            raw = house.dial(tcp=tcp, accepted=True)
            await raw.send(wires_request("GET", "/healthz"))
            with taking(0):
                answer = await raw.answer()
                assert (answer.status, answer.code) == (503, "overloaded")
                assert answer.headers["retry-after"] == "5"
                assert answer.headers["connection"] == "close"
                assert await raw.ends() == b""
    house.dial().stream.socket.close()  # nor is it an error if he does not wait
    assert len(caplog.records) == 1
    house.disk.go()
    for raw in busy:
        assert (await raw.answer()).status == 201


@wires(max_connections=1, requests=OFF)
async def test_a_slow_body_makes_room_for_a_newcomer(house: WiresHouse) -> None:
    auth = {"Authorization": f"Bearer {house.token(6)}", "Content_Length": "2"}
    slow = [house.dial() for _ in range(129)]
    for raw in slow:
        await raw.send(wires_request("POST", "/api/v1/chats", None, **auth))
    await wait_all_tasks_blocked()
    newcomer = house.dial()
    await newcomer.send(wires_request("GET", "/healthz"))
    assert (await newcomer.answer()).status == 200
    assert await slow[0].ends() == b""
    await slow[1].send(b"{}")
    assert (await slow[1].answer()).status == 201


@wires(max_connections=1, requests=OFF)
async def test_those_turned_away_never_eat_the_descriptors_kept_for_the_database(
    house: WiresHouse,
) -> None:
    auth = {"Authorization": f"Bearer {house.token(6)}", "Content_Length": "2"}
    house.disk.hold()
    for _ in range(129):
        request = wires_request("POST", "/api/v1/chats", None, **auth) + b"{}"
        await house.dial().send(request)
    await wait_all_tasks_blocked()
    for _ in range(300):  # they neither read nor leave
        house.dial()
    await wait_all_tasks_blocked()
    # LimitNOFILE is --max-connections + 256, and the rest is for the database.
    assert house.server.open <= 1 + 256 - 32
    await trio.sleep(3)
    assert house.server.open == 129
    house.disk.go()


@wires()
async def test_retry_after_is_in_whole_seconds_and_not_too_early(
    house: WiresHouse,
) -> None:
    raw = house.dial()
    auth = {"Authorization": f"Bearer {house.token(6)}"}
    for _ in range(100):
        assert (await raw.ask("GET", "/api/v1/me", **auth)).status == 200
    answer = await raw.ask("GET", "/api/v1/me", **auth)
    assert (answer.status, answer.code) == (429, "rate_limited")
    assert answer.json["error"]["retry_after"] == 0.05
    assert answer.headers["retry-after"] == "1"
    assert (await house.ask("GET", "/api/v1/me", user=7)).status == 200
    service = house.token(6, scope="service")
    assert (await house.ask("GET", "/api/v1/me", token=service)).status == 200
    await trio.sleep(0.05)
    assert (await raw.ask("GET", "/api/v1/me", **auth)).status == 200


# --- Api -----------------------------------------------------------------------------


@wires()
async def test_a_request_without_a_good_token_is_401_and_says_bearer(
    house: WiresHouse,
) -> None:
    ticket = (await house.ask("GET", "/api/v2/ws-token", user=6)).json["token"]
    for authorization, code in {
        "": "token_invalid",
        "Basic dXNlcjpwYXNz": "token_invalid",
        "Bearer": "token_invalid",
        "Bearer ": "token_invalid",
        "Bearer nonsense": "token_invalid",
        f"Bearer {ticket}": "token_invalid",
        f"Bearer {house.token(6, use='signin')}": "token_invalid",
        f"Bearer {house.token(6, -60)}": "token_expired",
        f"Bearer {house.token(6)} x": "token_invalid",
    }.items():
        headers = {"Authorization": authorization} if authorization else {}
        answer = await house.dial().ask("GET", "/api/v1/me", None, **headers)
        assert (answer.status, answer.code) == (401, code), authorization
        assert answer.headers["www-authenticate"] == "Bearer"
    good = f"bearer  {house.token(6)}"
    assert (await house.ask("GET", "/api/v1/me", Authorization=good)).status == 200


@wires()
async def test_a_token_in_the_query_opens_nothing_but_the_socket(
    house: WiresHouse,
) -> None:
    answer = await house.ask("GET", f"/api/v1/me?token={house.token(6)}")
    assert answer.status == 401


@wires()
async def test_me_has_a_name_when_a_token_has_told_one(house: WiresHouse) -> None:
    assert (await house.ask("GET", "/api/v1/me", user=6)).json == {
        "user_id": 6,
        "name": None,
    }
    for name in ("Ann", "Anna"):
        named = house.token(6, name=name)
        expected = {"user_id": 6, "name": name}
        assert (await house.ask("GET", "/api/v1/me", token=named)).json == expected
        # Also without the claim: it was stored.
        assert (await house.ask("GET", "/api/v1/me", user=6)).json == expected


@wires()
async def test_a_sign_in_link_becomes_a_session_token_and_is_good_for_nothing_else(
    house: WiresHouse,
) -> None:
    link = house.token(6, use="signin", name="Ann")
    answer = await house.ask("POST", "/api/v1/session", token=link)
    assert answer.status == 200
    session = answer.json
    token = session.pop("token")
    assert session == {"user_id": 6, "name": "Ann", "expires_in": 30 * 86_400}
    assert (await house.ask("GET", "/api/v1/me", token=token)).json["name"] == "Ann"
    assert (await house.join(6, token=token)).hello["user_id"] == 6
    wrong = await house.ask("POST", "/api/v1/session", token=token)
    assert (wrong.status, wrong.code) == (401, "token_invalid")


@wires(buckets=2)
async def test_a_name_is_remembered_although_the_table_of_names_is_bounded(
    house: WiresHouse,
) -> None:
    for _ in range(2):
        for user in (6, 7, 8):
            token = house.token(user, name=f"N{user}")
            await house.ask("GET", "/api/v1/me", token=token)
            assert len(house.server.names) <= 2
    users = (await house.ask("GET", "/api/v1/users", user=6)).json["users"]
    assert users == [{"user_id": u, "name": f"N{u}"} for u in (6, 7, 8)]


@wires()
async def test_users_are_those_known_the_named_first(house: WiresHouse) -> None:
    await house.chat(9, 8)
    await house.ask("GET", "/api/v1/me", token=house.token(8, name="Zoe"))
    answer = await house.ask("GET", "/api/v1/users", user=6)
    assert answer.json == {
        "users": [{"user_id": 8, "name": "Zoe"}, {"user_id": 9, "name": None}]
    }


@wires(chats_by="service")
async def test_where_services_make_the_chats_users_may_not_nor_see_who_there_is(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6)
    for method, path, body in (
        ("GET", "/api/v1/users", None),
        ("POST", "/api/v1/chats", {"member_ids": [7]}),
        ("POST", f"/api/v1/chats/{chat}/members", {"user_id": 7}),
    ):
        answer = await house.ask(method, path, body, user=6)
        assert (answer.status, answer.code) == (403, "forbidden")
        await house.command(method, path, body)
    left = await house.ask("DELETE", f"/api/v1/chats/{chat}/members/6", user=6)
    assert left.status == 204


@wires()
async def test_a_user_is_a_member_of_the_chat_he_makes_and_a_service_is_not(
    house: WiresHouse,
) -> None:
    made = await house.ask(
        "POST", "/api/v1/chats", {"title": "Tea", "member_ids": [7, 7, 6]}, user=6
    )
    assert made.status == 201
    chat = made.json["chat"]
    assert chat == {
        "id": chat["id"], "title": "Tea", "last_n": 0, "last_message": None,
        "members": [
            {"user_id": 6, "name": None, "read_n": 0},
            {"user_id": 7, "name": None, "read_n": 0},
        ],
    }  # fmt: skip
    alone = await house.ask("POST", "/api/v1/chats", {}, user=6)
    assert [m["user_id"] for m in alone.json["chat"]["members"]] == [6]
    assert alone.json["chat"]["title"] is None
    service = await house.command("POST", "/api/v1/chats", {"member_ids": [7]})
    assert [m["user_id"] for m in service["chat"]["members"]] == [7]


@wires(members=3)
async def test_a_new_chat_is_refused_with_the_field_that_is_wrong(
    house: WiresHouse,
) -> None:
    for body, code, field in (
        ([], "bad_json", ""),
        (None, "bad_json", ""),
        ({"title": ""}, "bad_field", "title"),
        ({"title": "   "}, "bad_field", "title"),
        ({"title": "x" * 201}, "bad_field", "title"),
        ({"title": "a\x1bb"}, "bad_field", "title"),
        ({"title": "a\x00b"}, "bad_field", "title"),
        ({"title": 7}, "bad_field", "title"),
        ({"member_ids": 7}, "bad_field", "member_ids"),
        ({"member_ids": ["7"]}, "bad_field", "member_ids"),
        ({"member_ids": [0]}, "bad_field", "member_ids"),
        ({"member_ids": [7, 8, 9]}, "bad_field", "member_ids"),
    ):
        answer = await house.ask("POST", "/api/v1/chats", body, user=6)
        assert (answer.status, answer.code, body) == (400, code, body)
        assert field in answer.json["error"]["message"]


@wires()
async def test_the_list_of_chats_counts_unread_and_has_the_newest_first(
    house: WiresHouse,
) -> None:
    old, new = await house.chat(6, 7), await house.chat(6, 8)
    await house.chat(7, 8)  # not his
    ids = await house.post(old, "a", "b", "c", sender=7)
    await house.ask("POST", f"/api/v1/messages/{ids[0]}/read", user=6)
    answer = (await house.ask("GET", "/api/v1/chats", user=6)).json
    assert answer["cursor"] == f"{house.store.epoch}.{house.server.hub.head}"
    first, second = answer["chats"]
    assert (first["id"], first["last_n"], first["read_n"], first["unread"]) == (
        old, 3, 1, 2,
    )  # fmt: skip
    assert first["last_message"]["content"] == "c"
    assert (second["id"], second["unread"], second["last_message"]) == (new, 0, None)


@wires()
async def test_adding_a_member_is_201_and_again_200(house: WiresHouse) -> None:
    chat = await house.chat(6)
    path = f"/api/v1/chats/{chat}/members"
    for status in (201, 200):
        answer = await house.ask("POST", path, {"user_id": 7}, user=6)
        assert answer.status == status
        assert answer.json == {"chat_id": chat, "user_id": 7}
    for user in (8, 9):  # not a member's to add to
        hidden = await house.ask("POST", path, {"user_id": user}, user=8)
        unknown = await house.ask(
            "POST", "/api/v1/chats/999/members", {"user_id": user}, user=8
        )
        assert (hidden.status, hidden.body) == (404, unknown.body)
    bad = await house.ask("POST", path, {"user_id": "8"}, user=6)
    assert (bad.status, bad.code) == (400, "bad_field")
    assert "user_id" in bad.json["error"]["message"]


@wires()
async def test_leaving_is_for_oneself_and_removing_for_a_service(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7, 8)
    path = f"/api/v1/chats/{chat}/members"
    other = await house.ask("DELETE", f"{path}/7", user=6)
    assert (other.status, other.code) == (403, "forbidden")
    left = await house.ask("DELETE", f"{path}/6", user=6)
    assert (left.status, left.body) == (204, b"")
    again = await house.ask("DELETE", f"{path}/6", user=6)
    assert (again.status, again.code) == (404, "not_found")
    await house.command("DELETE", f"{path}/7")
    token = house.token(999, scope="service")
    for missing in (f"{path}/7", "/api/v1/chats/999/members/7"):
        answer = await house.ask("DELETE", missing, token=token)
        assert (answer.status, answer.code) == (404, "not_found")
    (mine,) = (await house.ask("GET", "/api/v1/chats", user=8)).json["chats"]
    assert [member["user_id"] for member in mine["members"]] == [8]


@wires()
async def test_history_comes_in_pages_oldest_first(house: WiresHouse) -> None:
    chat, other = await house.chat(6, 7), await house.chat(6, 7)
    ids = await house.post(chat, *map(str, range(7)))
    (foreign,) = await house.post(other, "x")
    path = f"/api/v1/chats/{chat}/messages"

    async def page(query: str) -> tuple[list[int], bool]:
        answer = (await house.ask("GET", path + query, user=6)).json
        return [message["id"] for message in answer["messages"]], answer["more"]

    assert await page("") == (ids, False)
    assert await page("?limit=3") == (ids[4:], True)
    assert await page(f"?limit=3&before={ids[4]}") == (ids[1:4], True)
    assert await page(f"?limit=3&before={ids[1]}") == (ids[:1], False)
    assert await page(f"?before={ids[0]}") == ([], False)
    for query, field in {
        "limit=0": "limit", "limit=101": "limit", "limit=-1": "limit",
        "limit=": "limit", "limit=1.0": "limit", "limit=1&limit=2": "limit",
        "limit=٣": "limit",
        f"limit={'9' * 30}": "limit", "before=0": "before", "before=x": "before",
        f"before={2**53}": "before", f"before={foreign}": "before",
        "before=999": "before",
    }.items():  # fmt: skip
        target = f"{path}?{query}".replace("٣", "%D9%A3")
        answer = await house.ask("GET", target, user=6)
        assert (answer.status, answer.code, query) == (400, "bad_field", query)
        assert field in answer.json["error"]["message"]
    stranger = await house.ask("GET", path, user=8)
    unknown = await house.ask("GET", "/api/v1/chats/999/messages", user=8)
    assert (stranger.status, stranger.body) == (404, unknown.body)


@wires()
async def test_a_message_over_http_is_201_a_repeat_200_and_another_409(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    listener = await house.join(7)
    path = f"/api/v1/chats/{chat}/messages"
    body = {"content": "hi", "client_id": "k"}
    first = await house.ask("POST", path, body, user=6)
    assert (first.status, first.json["duplicate"]) == (201, False)
    assert (await listener.hear("new_message"))["message"] == first.json["message"]
    for again in (
        await house.ask("POST", path, body, user=6),
        await house.ask("POST", path, {"content": "hi"}, user=6, Idempotency_Key="k"),
        await house.ask("POST", path, body, user=6, Idempotency_Key="k"),
    ):
        assert (again.status, again.json["duplicate"]) == (200, True)
        assert again.json["message"] == first.json["message"]
    other = await house.ask("POST", path, body | {"content": "ho"}, user=6)
    assert (other.status, other.code) == (409, "idempotency_mismatch")
    await listener.hears_nothing()


@wires()
async def test_a_message_over_http_is_refused_with_the_field_that_is_wrong(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    path = f"/api/v1/chats/{chat}/messages"
    for body, key, status, code, field in (
        ({}, "", 400, "bad_field", "content"),
        ({"content": ""}, "", 400, "bad_field", "content"),
        ({"content": 1}, "", 400, "bad_field", "content"),
        ({"content": "x" * 4001}, "", 400, "bad_field", "content"),
        ({"content": "x", "client_id": "a" * 65}, "", 400, "bad_field", "client_id"),
        ({"content": "x"}, "a" * 65, 400, "bad_field", "Idempotency-Key"),
        ({"content": "x"}, "\xe9", 400, "bad_field", "Idempotency-Key"),
        ({"content": "x", "client_id": "a"}, "b", 400, "bad_field", "client_id"),
        ({"content": "x", "sender_id": "7"}, "", 400, "bad_field", "sender_id"),
        ({"content": "x", "sender_id": 7}, "", 403, "forbidden", "sender_id"),
        ([], "", 400, "bad_json", ""),
    ):
        headers = {"Authorization": f"Bearer {house.token(6)}"}
        if key:
            headers["Idempotency_Key"] = key
        answer = await house.dial().ask("POST", path, body, **headers)
        assert (answer.status, answer.code, body) == (status, code, body)
        assert field in answer.json["error"]["message"]
    raw = house.dial()
    auth = f"Bearer {house.token(6)}"
    for text in (
        b"",
        b"{",
        b'{"content":"\xff"}',
        b'{"content":"\\ud800"}',
        b"[" * 60_000,
    ):
        await raw.send(wires_request("POST", path, text, Authorization=auth))
        assert (await raw.answer()).code == "bad_json"
    own = await house.ask("POST", path, {"content": "x", "sender_id": 6}, user=6)
    assert own.status == 201
    stranger = await house.ask("POST", path, {"content": "x"}, user=8)
    assert (stranger.status, stranger.code) == (404, "not_found")


@wires()
async def test_a_service_sends_for_anybody_to_any_chat(house: WiresHouse) -> None:
    chat = await house.chat(6)
    body = {"content": "Your order", "sender_id": 50}
    path = f"/api/v1/chats/{chat}/messages"
    sent = await house.command("POST", path, body)
    assert sent["message"]["sender_id"] == 50
    token = house.token(999, scope="service")
    unknown = await house.ask("POST", "/api/v1/chats/77/messages", body, token=token)
    assert (unknown.status, unknown.code) == (404, "not_found")


@wires(sends=Rate(1, 2))
async def test_messages_over_http_draw_on_the_same_bucket_as_the_socket(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    peer = await house.join(6)
    path = f"/api/v1/chats/{chat}/messages"
    assert (await peer.ask("send_message", chat_id=chat, content="a"))["n"] == 1
    sent = await house.ask("POST", path, {"content": "b"}, user=6)
    assert sent.status == 201
    over = await house.ask("POST", path, {"content": "c"}, user=6)
    assert (over.status, over.code) == (429, "rate_limited")
    assert over.headers["retry-after"] == "1"
    assert (await peer.refused("send_message", chat_id=chat, content="c"))["code"] == (
        "rate_limited"
    )


@wires()
async def test_marking_read_over_http_tells_the_sockets(house: WiresHouse) -> None:
    chat = await house.chat(6, 7)
    first, second = await house.post(chat, "a", "b", sender=7)
    friend = await house.join(7)
    marked = await house.ask("POST", f"/api/v1/messages/{second}/read", user=6)
    assert marked.json == {"message_id": second, "chat_id": chat, "n": 2}
    assert (await friend.hear("message_read"))["read_by"] == 6
    back = await house.ask("POST", f"/api/v1/messages/{first}/read", user=6)
    assert (back.status, back.json["n"]) == (200, 1)
    await friend.hears_nothing()
    for user, message in ((8, first), (6, 999)):
        answer = await house.ask("POST", f"/api/v1/messages/{message}/read", user=user)
        assert (answer.status, answer.code) == (404, "not_found")


@wires(resync_events=5, tail_events=2)
async def test_the_poll_gives_what_a_socket_would_have_said(house: WiresHouse) -> None:
    chat = await house.chat(6, 7)
    peer = await house.join(6)
    epoch = house.store.epoch

    async def poll(query: str = "") -> Any:
        return (await house.ask("GET", f"/api/v1/events{query}", user=6)).json

    start = await poll()
    cursor = peer.hello["cursor"]
    assert start == {"events": [], "cursor": cursor, "more": False, "resync": False}
    ids = await house.post(chat, *"abcd", sender=7)
    said = [await peer.hear("new_message") for _ in ids]
    got = await poll(f"?cursor={cursor}&limit=3")
    assert got == {
        "events": said[:3], "cursor": f"{epoch}.{ids[2]}", "more": True,
        "resync": False,
    }  # fmt: skip
    got = await poll(f"?cursor={got['cursor']}&limit=3")
    end = f"{epoch}.{ids[3]}"
    assert got == {"events": said[3:], "cursor": end, "more": False, "resync": False}
    # A cursor moves to the bound of the read, also past what is not for him.
    await house.chat(7, 8)
    head = f"{epoch}.{house.server.hub.head}"
    empty = {"events": [], "cursor": head, "more": False}
    assert await poll(f"?cursor={end}") == empty | {"resync": False}
    for bad in (f"?cursor={epoch}.9999", "?cursor=", "?cursor=x", f"?cursor=f{end}"):
        assert await poll(bad) == empty | {"resync": True}
    await house.post(chat, *"ef", sender=7)
    head = f"{epoch}.{house.server.hub.head}"
    got = await poll(f"?cursor={cursor}")  # six events behind
    assert got == empty | {"resync": True, "cursor": head}
    for query in ("limit=0", "limit=501", "limit=x"):
        answer = await house.ask("GET", f"/api/v1/events?{query}", user=6)
        assert (answer.status, answer.code) == (400, "bad_field")


@wires()
async def test_scopes_open_only_what_they_name(house: WiresHouse) -> None:
    stats, revoke = "/api/v1/internal/chat/ws/stats", "/api/v1/internal/chat/revoke"
    for scope, method, path, status in (
        (None, "GET", stats, 403),
        (None, "GET", "/metrics", 403),
        (None, "POST", revoke, 403),
        ("service", "GET", stats, 403),
        ("stats", "POST", revoke, 403),
        ("stats", "GET", stats, 200),
        ("stats", "GET", "/metrics", 200),
        ("stats service", "POST", revoke, 200),
    ):
        body = {"user_id": 50} if method == "POST" else None
        token = house.token(6, scope=scope)
        answer = await house.ask(method, path, body, token=token)
        assert answer.status == status, (scope, path)
    for path in (stats, "/metrics"):
        assert (await house.ask("GET", path)).status == 401


@wires()
async def test_a_tickets_scopes_are_those_of_the_asking_token(
    house: WiresHouse,
) -> None:
    token = house.token(6, scope="service")
    ticket = (await house.ask("GET", "/api/v2/ws-token", token=token)).json["token"]
    chat = await house.chat(7)
    peer = await house.join(6, token=ticket)
    answer = await peer.ask("send_message", chat_id=chat, content="hi")
    assert answer["type"] == "ack"


@wires()
async def test_revoking_refuses_a_wrong_user_id_and_knows_users_without_sockets(
    house: WiresHouse,
) -> None:
    token = house.token(999, scope="service")
    path = "/api/v1/internal/chat/revoke"
    for body in ({}, {"user_id": "6"}, {"user_id": 0}):
        answer = await house.ask("POST", path, body, token=token)
        assert (answer.status, answer.code) == (400, "bad_field")
    answer = await house.ask("POST", path, {"user_id": 6}, token=token)
    assert answer.json == {"user_id": 6, "closed": 0}
    assert (await house.ask("GET", "/api/v1/me", user=6)).status == 401


# --- Monitoring ----------------------------------------------------------------------


def shape(part: Any) -> Any:
    return {k: shape(v) for k, v in part.items()} if isinstance(part, dict) else None


@wires()
async def test_the_stats_answer_did_we_lose_anything_and_who_was_cut(
    house: WiresHouse,
) -> None:
    chat = await house.chat(6, 7)
    peer, friend, tab = [await house.join(u) for u in (6, 7, 7)]
    command = {"chat_id": chat, "content": "hi", "client_id": "k"}
    for _ in range(2):
        await peer.ask("send_message", **command)
    await peer.leave()
    await tab.leave(1001)
    await wait_all_tasks_blocked()
    refused = house.dial()
    await refused.send(wires_upgrade("/ws/chat"))
    assert (await refused.answer()).status == 401
    stats = await house.stats()
    assert shape(stats) == {
        "version": None, "uptime_seconds": None,
        "connections": {
            "active": None, "users": None, "total": None, "catching_up": None,
            "closed": {"1000": None, "1001": None}, "refused": {"token_invalid": None},
        },
        "broadcast": {
            "events": {"chat_added": None, "new_message": None}, "deliveries": None,
            "writes": None, "catch_ups": None, "stalls": None,
        },
        "store": {
            "commits": None, "messages": None, "batch_max": None,
            "commit_seconds": {"p50": None, "p99": None, "max": None},
            "duplicates": None, "failed": None, "degraded": None, "wal_bytes": None,
            "sqlite": None,
        },
        "resumes": {"fresh": None, "live": None, "replay": None, "resync": None},
        "rate_limited": {}, "errors": {},
    }  # fmt: skip
    connections = stats["connections"]
    assert connections == {
        "active": 1, "users": 1, "total": 3, "catching_up": 0,
        "closed": {"1000": 1, "1001": 1}, "refused": {"token_invalid": 1},
    }  # fmt: skip
    assert stats["broadcast"]["events"] == {"chat_added": 2, "new_message": 1}
    assert stats["broadcast"]["deliveries"] == 3
    assert (stats["store"]["messages"], stats["store"]["duplicates"]) == (1, 1)
    assert (stats["store"]["failed"], stats["store"]["degraded"]) == (0, False)
    assert stats["store"]["commits"] == 3
    assert stats["resumes"]["fresh"] == 3
    assert (await friend.hear("new_message"))["message"]["n"] == 1


@wires()
async def test_metrics_are_the_same_numbers_for_prometheus(house: WiresHouse) -> None:
    chat = await house.chat(6, 7)
    peer = await house.join(6)
    await peer.ask("send_message", chat_id=chat, content="hi")
    answer = await house.ask(
        "GET", "/metrics", token=house.token(999, scope="stats service")
    )
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, *sample.labels.values()): (family.type, sample.value)
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }
    for name, kind, value in (
        (("chatd_connections_active",), "gauge", 1),
        (("chatd_connections_total",), "counter", 1),
        (("chatd_broadcast_events_total", "new_message"), "counter", 1),
        (("chatd_store_messages_total",), "counter", 1),
        (("chatd_store_degraded",), "gauge", 0),
        (("chatd_resumes_total", "fresh"), "counter", 1),
        (("chatd_version_info", chatd.__version__), "gauge", 1),
    ):
        assert samples[name] == (kind, value), name
    assert ("chatd_store_commit_seconds", "p99") in samples


# --- The bulkhead --------------------------------------------------------------------


class FaultyStore(chatd.Store):
    """A store with a programmer's mistake in it."""

    def history(self, *args: Any) -> Any:
        raise ValueError(f"a mistake of ours: {len(args)}")

    def find_sent(self, db: sqlite3.Connection, *args: Any) -> Any:
        if db is not self._writer:
            raise KeyError("a mistake that the library would swallow")
        return super().find_sent(db, *args)

    def missed(self, *args: Any) -> int | None:
        if args[2] == 0:
            raise ValueError("another")
        return super().missed(*args)


@wires(store=FaultyStore)
async def test_a_mistake_ends_its_connection_is_counted_logged_and_ends_no_other(
    house: WiresHouse, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "chatd")
    house.errors = {"ValueError": 2}
    chat = await house.chat(6, 7)
    innocent = await house.join(7)
    kept = house.dial()
    await kept.ask("GET", "/healthz")
    raw = house.dial()
    auth = f"Bearer {house.token(6, marker='s3cret')}"
    path = f"/api/v1/chats/{chat}/messages"
    await raw.send(wires_request("GET", path, None, Authorization=auth))
    answer = await raw.answer()
    assert (answer.status, answer.code) == (500, "internal")
    assert "ours" not in answer.body.decode()
    assert await raw.ends() == b""
    # On a socket, too: the tasks of its nursery go with it.
    peer = await house.join(6, cursor=f"{house.store.epoch}.0", hello=False)
    assert await peer.end() == ([], 1006)
    assert (await innocent.ask("ping"))["type"] == "pong"
    assert (await kept.ask("GET", "/healthz")).status == 200
    assert [s.claims.user_id for s in house.server.sessions] == [7]
    assert (await house.stats())["errors"] == {"ValueError": 2}
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    for line, where in zip(caplog.messages, ("history", "missed"), strict=True):
        # What it was and where, in one line; not its text, which may be anybody's.
        assert re.fullmatch(
            rf"failed error='ValueError' at='\S+:\d+ {where} < .*'", line
        )
        assert line.isprintable()
        assert "ours" not in line


@wires(store=FaultyStore, sends=Rate(1, 1))
async def test_a_key_error_of_ours_is_not_taken_for_an_unknown_event(
    house: WiresHouse, caplog: pytest.LogCaptureFixture
) -> None:
    house.errors = {"RuntimeError": 1}
    chat = await house.chat(6, 7)
    peer = await house.join(6)
    await peer.ask("send_message", chat_id=chat, content="a")
    await peer.say("send_message", chat_id=chat, content="b", client_id="k")
    assert await peer.end() == ([], 1006)
    (line,) = caplog.messages
    assert line.startswith("failed error='RuntimeError from KeyError' at='")
    assert " find_sent < " in line


@wires(store=FaultyStore)
async def test_a_flood_of_mistakes_does_not_flood_the_log(
    house: WiresHouse, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "chatd")
    chat = await house.chat(6, 7)
    house.errors = {"ValueError": 50}
    for _ in range(50):
        raw = house.dial()
        auth = f"Bearer {house.token(6)}"
        path = f"/api/v1/chats/{chat}/messages"
        await raw.send(wires_request("GET", path, None, Authorization=auth))
        await raw.ends()
    assert len(caplog.records) == 10


@wires(store=FaultyStore)
async def test_no_token_and_no_text_reaches_the_log_at_any_level(
    house: WiresHouse, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "chatd")
    house.errors = {"ValueError": 1}
    chat = await house.chat(6, 7)
    secrets = [house.token(6), house.token(6) + "x", "n0nsense", house.token(7)]
    peer = await house.join(6, token=secrets[0])
    await peer.ask("send_message", chat_id=chat, content="s3cret text")
    await peer.ask("send_message", chat_id=0, content="s3cret text")
    for token in secrets[1:]:
        raw = house.dial()
        await raw.send(wires_upgrade(f"/ws/chat?token={token}&cursor=s3cret%ff"))
        await raw.answer()
        await peer.say("auth", token=token)
    assert (await peer.end())[1] == 4503
    for path in (f"/api/v1/chats/{chat}/messages", f"//{secrets[0]}", "/s3cret"):
        auth = f"Bearer {secrets[0]}"
        await house.dial().ask("GET", path, None, Authorization=auth)
    assert "joined" in caplog.text
    for secret in (*secrets, "s3cret"):
        assert secret not in caplog.text


@wires(handshakes=OFF)
async def test_random_bytes_end_no_connection_but_their_own(house: WiresHouse) -> None:
    innocent = await house.join(7)
    dice = random.Random(7)  # the same bytes in every run
    for _ in range(150):
        upgraded = dice.random() < 0.7
        raw = await house.join_raw(6) if upgraded else house.dial()
        noise = dice.randbytes(dice.randrange(1, 300))
        with contextlib.suppress(trio.BrokenResourceError):
            await raw.send(noise)
            if dice.random() < 0.5:
                await raw.stream.send_eof()
        await wait_all_tasks_blocked()
        raw.stream.socket.close()
    await trio.sleep(2)
    assert (await innocent.ask("ping"))["type"] == "pong"
    assert len(house.server.sessions) == 1
    gc.collect()


@wires()
async def test_two_hundred_connections_parked_in_every_state_all_go_by_themselves(
    house: WiresHouse,
) -> None:
    request = wires_request(
        "POST", "/api/v1/chats", b"{}", Authorization=f"Bearer {house.token(6)}"
    )
    for sent in (b"", b"GET", request[:-1], wires_upgrade(house.target(6))):
        for _ in range(20 if sent.startswith(b"GET /ws") else 60):
            await house.dial().send(sent)
    await wait_all_tasks_blocked()
    assert house.server.open == 200
    await trio.sleep(16.1)
    assert house.server.open == 20
    await trio.sleep(24)  # a ping, and nobody answers it
    assert house.server.open == 0
    house.check_left()


# =====================================================================================
# PROXY
#
# A real Proxy between socket pairs, under virtual time. The test is the client on one
# side and the upstream on the other, both in bytes: what the proxy passes is looked at
# as the other end gets it, and what never reaches the other end is asserted too.
# =====================================================================================


class ProxyUp(NamedTuple):
    """A request as the upstream got it, whole."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def one(self, name: str) -> str:
        """The header of that name, which must be there once."""
        (value,) = [value for key, value in self.headers if key == name]
        return value

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.headers}


class ProxyHouse:
    """A proxy that runs, its clients, and the upstream that it dials."""

    def __init__(
        self, settings: Settings, log: pytest.LogCaptureFixture | None
    ) -> None:
        keyring = Keyring(settings, WIRES_SECRET)
        self.log = log
        self.proxy = chatd.Proxy(settings, keyring, "chat.example:8086", self._dial)
        self.listener = WiresListener()
        self.dials = 0
        self.fault: OSError | None = None  # what dialling raises
        self.hanging = False  # dialling takes for ever
        self.small = False  # the kernel holds little between proxy and upstream
        self.errors: dict[str, int] = {}
        self.streams: list[trio.SocketStream] = []
        self._come, self._came = trio.open_memory_channel[WiresRaw](math.inf)

    def _pair(
        self, *, tcp: bool = False, small: bool = False
    ) -> tuple[trio.SocketStream, WiresRaw]:
        if tcp:
            with socket.create_server(("127.0.0.1", 0)) as door:
                theirs = socket.create_connection(door.getsockname())
                ours, _ = door.accept()
        else:
            ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            if small:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
            sock.setblocking(False)
        streams = [
            trio.SocketStream(trio.socket.from_stdlib_socket(s)) for s in (ours, theirs)
        ]
        self.streams.append(streams[1])
        return streams[0], WiresRaw(streams[1])

    async def _dial(self) -> trio.SocketStream:
        self.dials += 1
        await trio.lowlevel.checkpoint()
        if self.hanging:
            await trio.sleep_forever()
        if self.fault is not None:
            raise self.fault
        ours, theirs = self._pair(tcp=not self.small, small=self.small)
        self._come.send_nowait(theirs)
        return ours

    def dial(self, *, small: bool = False, tcp: bool = True) -> WiresRaw:
        """Connect as a client. TCP has addresses and resets, but also real time."""
        ours, raw = self._pair(tcp=tcp and not small, small=small)
        self.listener.offer.send_nowait(ours)
        return raw

    async def upstream(self) -> WiresRaw:
        """The next connection that the proxy made."""
        with trio.fail_after(1):
            return await self._came.receive()

    async def request(self, up: WiresRaw) -> ProxyUp:
        """Read one whole request as the upstream gets it, and that it is the last."""
        side, method, target = h11.Connection(h11.SERVER), "", ""
        headers: list[tuple[str, str]] = []
        body = b""
        with trio.fail_after(1):
            while True:
                event = side.next_event()
                if event is h11.NEED_DATA:
                    side.receive_data(await up.read())
                elif isinstance(event, h11.Request):
                    method, target = event.method.decode(), event.target.decode()
                    headers = [
                        (k.decode(), v.decode("latin-1")) for k, v in event.headers
                    ]
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    assert isinstance(event, h11.EndOfMessage), event
                    break
        await wait_all_tasks_blocked()
        up.data = bytearray(side.trailing_data[0])
        return ProxyUp(method, target, headers, body)

    def target(self, user_id: int = 6, **claims: Any) -> str:
        token = self.proxy.keyring.sign(user_id, 600, **claims)
        return "/ws/chat?" + urlencode({"token": token})

    async def exchange(
        self, sent: bytes, answer: bytes = b"", method: str = "GET"
    ) -> tuple[ProxyUp, HttpAnswer]:
        """A request all the way up, and its answer all the way down."""
        raw = self.dial()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raw.send, sent)
            up = await self.upstream()
            got = await self.request(up)
        await up.send(answer or PROXY_OK)
        up.stream.socket.close()
        heard = await raw.answer(method)
        assert heard.headers["connection"] == "close"
        assert await raw.ends() == b""
        return got, heard

    async def socket(
        self, *, said: bytes = b"", heard: bytes = b"", small: bool = False
    ) -> tuple[WiresRaw, WiresRaw]:
        """Open a socket through it: the client's end and the upstream's."""
        raw = self.dial(small=small)
        await raw.send(wires_upgrade(self.target()), said)
        up = await self.upstream()
        await self.request(up)
        await up.send(PROXY_101, heard)
        assert (await raw.answer()).status == 101
        return raw, up

    def check_left(self) -> None:
        """Claim that nothing is left of any connection."""
        proxy = self.proxy
        assert (proxy.open, len(proxy.sessions), len(proxy.parked)) == (0, 0, 0)
        assert dict(proxy.stats.errors) == self.errors


PROXY_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
PROXY_101 = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)


def proxy_run(
    test: Callable[[ProxyHouse], Awaitable[None]],
    log: pytest.LogCaptureFixture | None = None,
    **settings: Any,
) -> None:
    """Give a test a proxy with these settings, in a run of Trio whose clock jumps."""
    chosen = Settings(**{"trusted_proxy": ("none",)} | settings)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            house = ProxyHouse(chosen, log)
            doors = [cast("trio.SocketListener", house.listener)]
            await nursery.start(house.proxy.run, doors)
            try:
                await test(house)
                house.proxy.stopping.set()
                with trio.fail_after(chosen.drain_seconds + 0.1):
                    await house.proxy.finished.wait()
                house.check_left()
            finally:
                for stream in house.streams:
                    stream.socket.close()
                nursery.cancel_scope.cancel()

    try:
        trio.run(main, clock=MockClock(autojump_threshold=0))
    except BaseExceptionGroup as group:
        errors = list(chatd.leaves(group))
        raise errors[0] if len(errors) == 1 else group from None


def proxied(
    **settings: Any,
) -> Callable[
    [Callable[Concatenate[ProxyHouse, P], Awaitable[None]]], Callable[..., None]
]:
    """Make a test of it; whatever it does, no token may be in the log."""

    def decorate(
        test: Callable[Concatenate[ProxyHouse, P], Awaitable[None]],
    ) -> Callable[..., None]:
        @functools.wraps(test)
        def run(caplog: pytest.LogCaptureFixture, **given: Any) -> None:
            caplog.set_level(logging.DEBUG, "chatd")
            proxy_run(functools.partial(test, **given), caplog, **settings)
            assert "eyJ" not in caplog.text, "a token in the log"

        signature = inspect.signature(test)
        _, *given = signature.parameters.values()
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter("caplog", kind), *given]
        )
        return run

    return decorate


# --- Passage: what goes up -----------------------------------------------------------


@proxied()
async def test_a_request_is_passed_up_as_it_is_and_its_answer_down(
    house: ProxyHouse,
) -> None:
    sent = wires_request(
        "POST", "/api/v1/chats?a=%20b", b'{"title":"T"}', Authorization="Bearer x.y",
        Idempotency_Key="k", Origin="http://chat.example",
    )  # fmt: skip
    answer = b"HTTP/1.1 201 Created\r\nETag: x\r\nContent-Length: 4\r\n\r\nmade"
    got, heard = await house.exchange(sent, answer)
    assert (got.method, got.target) == ("POST", "/api/v1/chats?a=%20b")
    assert got.body == b'{"title":"T"}'
    assert got.one("authorization") == "Bearer x.y"
    assert got.one("idempotency-key") == "k"
    assert got.one("origin") == "http://chat.example"
    assert got.one("host") == "chat.example"
    assert got.one("connection") == "close"
    assert (heard.status, heard.body, heard.headers["etag"]) == (201, b"made", "x")


@proxied()
async def test_a_token_in_the_place_of_a_method_is_passed_and_not_logged(
    house: ProxyHouse,
) -> None:
    token = house.proxy.keyring.sign(6, 600)
    got, _ = await house.exchange(wires_request(token, "/api/v1/me"), method=token)
    assert got.method == token


PROXY_FORGED = {
    "X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "evil.example", "X-Forwarded-Port": "1",
    "Forwarded": "for=6.6.6.6", "X-Real-IP": "6.6.6.6", "x-FORWARDED-for": "6.6.6.7",
}  # fmt: skip


@proxied()
async def test_nobody_says_himself_who_he_is(house: ProxyHouse) -> None:
    got, _ = await house.exchange(wires_request("GET", "/", **PROXY_FORGED))
    assert got.one("x-forwarded-for") == "127.0.0.1"
    assert got.one("x-forwarded-proto") == "http"
    assert got.one("x-forwarded-host") == "chat.example"
    assert not got.names & {"forwarded", "x-real-ip", "x-forwarded-port"}
    assert not any("6.6.6" in value for _, value in got.headers)


@proxied(trusted_proxy=("127.0.0.0/8",))
async def test_a_trusted_proxy_before_us_says_who_asks(house: ProxyHouse) -> None:
    forged = PROXY_FORGED | {
        "X-Forwarded-For": "6.6.6.6, 9.9.9.9, 127.0.0.5",
        "X-Forwarded-Host": "chat.example.org",
    }
    del forged["x-FORWARDED-for"]
    got, _ = await house.exchange(wires_request("GET", "/", **forged))
    assert got.one("x-forwarded-for") == "9.9.9.9"
    assert got.one("x-forwarded-proto") == "https"
    assert got.one("x-forwarded-host") == "chat.example.org"
    assert not got.names & {"forwarded", "x-real-ip", "x-forwarded-port"}


@proxied()
async def test_what_concerns_one_connection_goes_no_further(house: ProxyHouse) -> None:
    hop = {
        "Connection": "keep-alive, X-Mine, Host, Content-Length, X-Forwarded-For",
        "Keep-Alive": "5", "TE": "trailers", "Trailer": "x", "Upgrade": "h2c",
        "Proxy-Connection": "x", "Proxy-Authorization": "x", "X-Mine": "1",
        "X-Your": "2",
    }  # fmt: skip
    answer = (
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Theirs\r\nKeep-Alive: 5\r\n"
        b"X-Theirs: 1\r\nX-Ours: 2\r\nContent-Length: 2\r\n\r\nok"
    )
    got, heard = await house.exchange(
        wires_request("POST", "/", b"body", **hop), answer
    )
    assert got.names == {
        "host", "x-your", "content-length", "connection", "via", "x-forwarded-for",
        "x-forwarded-host", "x-forwarded-proto",
    }  # fmt: skip
    assert (got.body, got.one("via")) == (b"body", "1.1 chatd")
    assert got.one("x-forwarded-for") == "127.0.0.1"
    assert "x-ours" in heard.headers
    assert not {*heard.headers} & {"x-theirs", "keep-alive"}


@proxied()
async def test_the_body_is_passed_up_exactly_whatever_its_frame(
    house: ProxyHouse,
) -> None:
    chunks = b"3;x=y\r\nabc\r\n5\r\ndefgh\r\n0\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n"
    sent = wires_request("POST", "/", Transfer_Encoding="chunked") + chunks
    got, _ = await house.exchange(sent)
    assert got.body == b"abcdefgh"
    assert got.one("transfer-encoding") == "chunked"
    assert "content-length" not in got.names
    got, _ = await house.exchange(wires_request("POST", "/", b""))
    assert (got.body, got.one("content-length")) == (b"", "0")
    got, _ = await house.exchange(wires_request("POST", "/", b"x" * 300_000))
    assert got.body == b"x" * 300_000


@proxied()
async def test_a_request_in_single_bytes_is_passed_up_like_a_whole_one(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    sent = wires_request("POST", "/", b"body")
    for number in range(len(sent)):
        await raw.send(sent[number : number + 1])
        await wait_all_tasks_blocked()
    up = await house.upstream()
    assert (await house.request(up)).body == b"body"
    await up.send(PROXY_OK)
    assert (await raw.answer()).body == b"ok"


@pytest.mark.parametrize("body", [None, b"body"])
@proxied()
async def test_a_second_request_behind_the_first_is_never_passed_on(
    house: ProxyHouse, body: bytes | None
) -> None:
    raw = house.dial()
    second = wires_request("GET", "/api/v1/me", X_Forwarded_For="6.6.6.6")
    await raw.send(wires_request("POST", "/", body), second)
    up = await house.upstream()
    got = await house.request(up)
    assert got.body == (body or b"")
    assert up.data == b""
    await up.send(
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n"
    )
    assert (await raw.answer()).headers["connection"] == "close"
    await raw.send(second)  # now, too, it is nobody's
    assert await up.ends() == b""
    assert await raw.ends() == b""
    assert house.dials == 1


@proxied()
async def test_an_answer_of_our_own_ends_the_connection_too(house: ProxyHouse) -> None:
    house.fault = ConnectionRefusedError(111, "Connection refused")
    raw = house.dial()
    await raw.send(wires_request("GET", "/"), wires_request("GET", "/"))
    answer = await raw.answer()
    assert (answer.status, answer.code) == (502, "upstream")
    assert answer.headers["connection"] == "close"
    assert await raw.ends() == b""
    assert house.dials == 1


@pytest.mark.parametrize("fault", [*WIRES_BAD_HEADS])
@proxied()
async def test_a_bad_head_reaches_no_upstream(house: ProxyHouse, fault: str) -> None:
    sent, status = WIRES_BAD_HEADS[fault]
    raw = house.dial()
    await raw.send(sent)
    answer = await raw.answer()
    assert answer.status == status
    assert answer.headers["connection"] == "close"
    assert await raw.ends() == b""
    assert house.dials == 0


# What has fooled proxies, and what must become of it: refused here, or normal above.
PROXY_SMUGGLED: dict[str, bytes] = {
    "chunks in HTTP/1.0": (
        b"POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "chunks by another name": wires_request("POST", "/", Transfer_Encoding="xchunked"),
    "chunks twice": wires_request("POST", "/", Transfer_Encoding="chunked, chunked"),
    "chunks of a chunk": wires_request("POST", "/", Transfer_Encoding="gzip, chunked"),
    "a space before the colon": (
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length : 5\r\n\r\nhello"
    ),
    "a NUL": b"GET / HTTP/1.1\r\nHost: x\r\nA: b\0c\r\n\r\n",
    "a bare CR": b"GET / HTTP/1.1\r\nHost: x\r\nA: b\rX-Forwarded-For: 6.6.6.6\r\n\r\n",
    "a length with a plus": wires_request("POST", "/", Content_Length="+5") + b"hello",
    "a length in hex": wires_request("POST", "/", Content_Length="0x5") + b"hello",
    "lengths that differ": (
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 6\r\n\r\nhello"
    ),
    "a tunnel": b"CONNECT /x HTTP/1.1\r\nHost: x\r\n\r\n",
    "a line that is none": b"GET / HTTP/1.1\r\nHost: x\r\nnonsense\r\n\r\n",
    "two versions": b"GET / HTTP/1.1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a header before the line": b" GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("what", PROXY_SMUGGLED)
@proxied()
async def test_what_two_servers_may_read_in_two_ways_is_refused(
    house: ProxyHouse, what: str
) -> None:
    raw = house.dial()
    await raw.send(PROXY_SMUGGLED[what])
    answer = await raw.answer()
    assert (answer.status, answer.code) == (400, "bad_field")
    assert await raw.ends() == b""
    assert house.dials == 0


@proxied()
async def test_what_is_only_untidy_is_written_anew(house: ProxyHouse) -> None:
    untidy = (
        b"GET / HTTP/1.1\nHost: x\nA: b\r\n c\nContent-Length: 2, 2\r\n"
        b"content-length: 2\r\n\r\nok"
    )
    raw = house.dial()
    await raw.send(untidy)
    up = await house.upstream()
    await up.listen(1)
    head, _, body = bytes(up.data).partition(b"\r\n\r\n")
    assert head.replace(b"\r\n", b"").count(b"\n") == 0
    assert b"\r\na: b c\r\n" in head
    assert head.lower().count(b"content-length: 2\r\n") == 1
    assert body == b"ok"


PROXY_PIECES = (
    b"GET / HTTP/1.1\r\n", b"POST /api/v1/chats HTTP/1.1\r\n", b"POST / HTTP/1.0\r\n",
    b"Host: x\r\n", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n",
    b"Connection: keep-alive, Content-Length\r\n", b"Upgrade: websocket\r\n",
    b"X-Forwarded-For: 6.6.6.6\r\n", b" folded\r\n", b"\r\n", b"\n", b"\r", b"\0",
    b"5\r\nhello\r\n", b"0\r\n\r\n", b"hello", b": ", b"\xff",
    wires_request("GET", "/", X_Forwarded_For="6.6.6.6"),
    wires_request("POST", "/", b"hello"),
    wires_request("POST", "/", Transfer_Encoding="chunked"),
)  # fmt: skip


@hypothesis.settings(deadline=None)
@given(
    st.sampled_from((b"", *PROXY_PIECES[-3:])),
    st.lists(st.sampled_from(PROXY_PIECES), max_size=9),
)
def test_whatever_a_client_sends_at_most_one_request_goes_up(
    first: bytes, pieces: list[bytes]
) -> None:
    async def main(house: ProxyHouse) -> None:
        raw = house.dial()
        await raw.send(first, *pieces)
        await raw.stream.send_eof()
        await wait_all_tasks_blocked()
        if house.dials:
            up = await house.upstream()
            await up.listen(1)
            with suppress(trio.BrokenResourceError):
                await up.send(PROXY_OK)
            side, sent = h11.Connection(h11.SERVER), [bytes(up.data)]
            side.receive_data(sent[0])
            head = side.next_event()
            assert isinstance(head, h11.Request)
            names = [name for name, _ in head.headers]
            assert names.count(b"x-forwarded-for") == names.count(b"host") == 1
            assert (b"x-forwarded-for", b"127.0.0.1") in head.headers
            assert (b"connection", b"close") in head.headers
            while side.their_state is h11.SEND_BODY:
                if side.next_event() is h11.NEED_DATA:
                    break  # the client left in the middle of it
            assert side.trailing_data[0] == b""
        await raw.ends()
        assert house.dials <= 1

    proxy_run(main)


@pytest.mark.parametrize(
    "body", [b"3\r\nabcX", b"-1\r\n", b"3\r\nabc\r\nzz\r\n", b"3\nabc\r\n0\r\n\r\n"]
)
@proxied()
async def test_a_body_that_breaks_off_its_frame_has_no_end_above(
    house: ProxyHouse, body: bytes
) -> None:
    raw = house.dial()
    await raw.send(wires_request("POST", "/", Transfer_Encoding="chunked"), body)
    assert (await raw.answer()).status == 400
    up = await house.upstream()
    assert not (await up.ends()).endswith(b"0\r\n\r\n")
    assert await raw.ends() == b""


@proxied()
async def test_a_client_that_leaves_in_mid_body_leaves_a_request_without_an_end(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    await raw.send(wires_request("POST", "/", Content_Length="10"), b"hello")
    up = await house.upstream()
    await up.listen(0.5)
    raw.stream.socket.close()
    assert (await up.ends()).endswith(b"\r\n\r\nhello")


@proxied()
async def test_a_client_that_ends_its_side_still_gets_its_answer(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    await raw.send(wires_request("GET", "/"))
    await raw.stream.send_eof()
    up = await house.upstream()
    await house.request(up)
    await up.send(PROXY_OK)
    assert (await raw.answer()).body == b"ok"


@proxied()
async def test_an_old_client_gets_no_chunks_and_no_100(house: ProxyHouse) -> None:
    raw = house.dial()
    await raw.send(b"GET / HTTP/1.0\r\n\r\n")
    up = await house.upstream()
    assert (await house.request(up)).one("host") == "chat.example:8086"
    chunks = b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    await up.send(b"HTTP/1.1 103 Early Hints\r\n\r\n", b"HTTP/1.1 200 OK\r\n", chunks)
    head, _, body = (await raw.ends()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert b"chunked" not in head
    assert body == b"ok"


@proxied()
async def test_who_waits_for_100_gets_the_upstreams(house: ProxyHouse) -> None:
    raw = house.dial()
    await raw.send(
        wires_request("POST", "/", Content_Length="4", Expect="100-continue")
    )
    up = await house.upstream()
    await up.listen(1)
    assert b"expect: 100-continue" in up.data.lower()
    assert raw.data == b""
    await up.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    await raw.read()
    assert raw.data.startswith(b"HTTP/1.1 100 ")
    await raw.send(b"body")
    await up.listen(1)
    assert up.data.endswith(b"\r\n\r\nbody")
    await up.send(PROXY_OK)
    assert (await raw.answer()).body == b"ok"
    assert raw.informed == [100]


@proxied()
async def test_an_answer_before_the_body_is_there_ends_it(house: ProxyHouse) -> None:
    raw = house.dial()
    await raw.send(wires_request("POST", "/", Content_Length="1000000"), b"x" * 5000)
    up = await house.upstream()
    await up.listen(0.1)
    await up.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
    assert (await raw.answer()).status == 413
    assert await up.ends()
    await raw.ends()


# --- Passage: what comes down --------------------------------------------------------


PROXY_ANSWERS: dict[str, tuple[str, bytes, int, bytes]] = {
    "a length": ("GET", PROXY_OK, 200, b"ok"),
    "chunks": (
        "GET",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        200,
        b"ok",
    ),
    "up to the end": ("GET", b"HTTP/1.1 200 OK\r\n\r\nok", 200, b"ok"),
    "HTTP/1.0": ("GET", b"HTTP/1.0 200 OK\r\n\r\nok", 200, b"ok"),
    "HEAD": ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", 200, b""),
    "HEAD of chunks": (
        "HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 200, b"",
    ),
    "204": ("DELETE", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    "304": ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", 304, b""),
    "an idle 100": ("GET", b"HTTP/1.1 100 C\r\n\r\n" + PROXY_OK, 200, b"ok"),
    "503": (
        "GET", b"HTTP/1.1 503 Full\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n", 503,
        b"",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", PROXY_ANSWERS)
@proxied()
async def test_an_answer_of_any_frame_comes_down_whole(
    house: ProxyHouse, what: str
) -> None:
    method, answer, status, body = PROXY_ANSWERS[what]
    _, heard = await house.exchange(wires_request(method, "/"), answer, method)
    assert (heard.status, heard.body) == (status, body)


PROXY_NONSENSE: dict[str, bytes] = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "no HTTP": b"220 smtp.example ESMTP\r\n" * 10,
    "a head without end": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 10_000,
    "a status of 999999": b"HTTP/1.1 999999 OK\r\n\r\n",
    "a status of 099": b"HTTP/1.1 099 OK\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2, 3\r\n\r\nok",
    "a length and chunks": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"2\r\nok\r\n0\r\n\r\n"
    ),
    "a 101 that nobody asked for": PROXY_101,
}


@pytest.mark.parametrize("what", PROXY_NONSENSE)
@proxied()
async def test_an_answer_that_is_none_is_502(house: ProxyHouse, what: str) -> None:
    raw = house.dial()
    await raw.send(wires_request("GET", "/"))
    up = await house.upstream()
    await house.request(up)
    with contextlib.suppress(trio.BrokenResourceError):
        await up.send(PROXY_NONSENSE[what])
    up.stream.socket.close()
    answer = await raw.answer()
    assert (answer.status, answer.code) == (502, "upstream")
    assert await raw.ends() == b""
    assert house.dials == 1  # it is never asked twice


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("end", ["closes", "resets", "breaks its frame"])
@pytest.mark.parametrize("frame", ["Content-Length: 10", "Transfer-Encoding: chunked"])
@proxied()
async def test_an_answer_that_breaks_off_never_looks_whole(
    house: ProxyHouse, frame: str, end: str, version: str
) -> None:
    if end == "breaks its frame" and frame.startswith("Content"):
        return
    raw = house.dial()
    await raw.send(f"GET / HTTP/{version}\r\nHost: x\r\n\r\n".encode())
    up = await house.upstream()
    await house.request(up)
    body = b"5\r\nhello\r\n" if "chunked" in frame else b"hello"
    await up.send(f"HTTP/1.1 200 OK\r\n{frame}\r\n\r\n".encode(), body)
    while not raw.data.rstrip().endswith(b"hello"):
        await raw.read()
    if end == "breaks its frame":
        await up.send(b"nonsense\r\n")
    if end == "resets":
        chatd.reset(up.stream)
    up.stream.socket.close()
    with pytest.raises(trio.BrokenResourceError):
        await raw.listen()


@proxied()
async def test_a_service_that_is_away_is_502_with_a_sentence_and_one_line_of_log(
    house: ProxyHouse,
) -> None:
    house.fault = ConnectionRefusedError(111, "Connection refused")
    for _ in range(20):
        raw = house.dial()
        await raw.send(wires_request("GET", "/api/v1/me"))
        answer = await raw.answer()
        assert (answer.status, answer.code) == (502, "upstream")
        assert answer.json["error"]["message"] == chatd.REFUSALS["upstream"][1]
        await raw.ends()
    assert house.log is not None
    lines = [m for m in house.log.messages if m.startswith("upstream_failed ")]
    assert lines == ["upstream_failed why='[Errno 111] Connection refused' open=1"]


@pytest.mark.parametrize("where", ["dialling", "answering", "reading"])
@proxied()
async def test_a_service_that_hangs_is_504_after_20_s(
    house: ProxyHouse, where: str
) -> None:
    house.hanging = where == "dialling"
    house.small = True
    raw = house.dial()
    body = b"x" * 1_000_000 if where == "reading" else None
    with taking(20, 20.5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raw.send, wires_request("POST", "/", body))
            answer = await raw.answer(within=30)
            nursery.cancel_scope.cancel()
    assert (answer.status, answer.code) == (504, "upstream")
    if where == "answering":
        up = await house.upstream()
        assert await up.ends()


@proxied()
async def test_a_body_that_does_not_come_is_408_after_20_s(house: ProxyHouse) -> None:
    raw = house.dial()
    await raw.send(wires_request("POST", "/", Content_Length="10"), b"hello")
    with taking(20):
        assert (await raw.answer(within=30)).status == 408
    up = await house.upstream()
    assert (await up.ends()).endswith(b"hello")


@proxied()
async def test_what_still_moves_is_not_cut(house: ProxyHouse) -> None:
    raw = house.dial()
    await raw.send(wires_request("POST", "/", Content_Length="10"))
    up = await house.upstream()
    for _ in range(10):
        await trio.sleep(19)
        await raw.send(b"x")
    await house.request(up)
    await trio.sleep(19)
    await up.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
    for _ in range(5):
        await trio.sleep(19)
        await up.send(b"y")
    assert (await raw.answer()).body == b"yyyyy"


@proxied()
async def test_a_client_that_does_not_take_its_answer_is_cut_after_20_s(
    house: ProxyHouse,
) -> None:
    house.small = True
    raw = house.dial(small=True)
    await raw.send(wires_request("GET", "/"))
    up = await house.upstream()
    await house.request(up)
    await up.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n")
    with taking(20, 21), contextlib.suppress(trio.BrokenResourceError):
        while len(up.data) < 10_000_000:
            await up.send(b"x" * 1000)
            up.data += b"x" * 1000
    assert len(up.data) < 200_000  # in all buffers together


# --- Passage: the token at the door --------------------------------------------------


@proxied()
async def test_a_socket_needs_a_good_token_before_anybody_is_asked(
    house: ProxyHouse,
) -> None:
    good = house.target()
    expired = house.proxy.keyring.sign(6, -60)
    link = house.proxy.keyring.sign(6, 60, use="signin")
    for target, code in (
        ("/ws/chat", "token_invalid"),
        ("/ws/chat?token=", "token_invalid"),
        (good[:-3], "token_invalid"),
        (f"/ws/chat?token={expired}", "token_expired"),
        (f"/ws/chat?token={link}", "token_invalid"),
    ):
        raw = house.dial()
        await raw.send(wires_upgrade(target))
        answer = await raw.answer()
        assert (answer.status, answer.code) == (401, code), target
        assert await raw.ends() == b""
    raw = house.dial()
    await raw.send(wires_upgrade(f"{good}&token=x"))
    assert (await raw.answer()).status == 400
    raw = house.dial()
    await raw.send(wires_request("GET", good))
    assert (await raw.answer()).status == 426
    assert house.dials == 0


@proxied()
async def test_a_ticket_of_the_upstream_passes_and_is_not_spent(
    house: ProxyHouse,
) -> None:
    above = Keyring(Settings(), WIRES_SECRET)
    ticket = above.ticket(above.verify(above.sign(6, 600)))
    for _ in range(2):
        raw = house.dial()
        await raw.send(wires_upgrade(f"/ws/chat?token={ticket}"))
        got = await house.request(await house.upstream())
        assert got.target == f"/ws/chat?token={ticket}"
        above.spend(above.verify(ticket, "socket"))
        with pytest.raises(Refusal, match="token_used"):
            above.verify(ticket, "socket")
        above = Keyring(Settings(), WIRES_SECRET)
        above.boot = "another"
        ticket = above.ticket(above.verify(above.sign(6, 600)))


@proxied(handshakes=Rate(1, 3))
async def test_handshakes_are_counted_at_the_door(house: ProxyHouse) -> None:
    statuses = []
    for _ in range(5):
        raw = house.dial()
        await raw.send(wires_upgrade("/ws/chat?token=x"))
        statuses.append((await raw.answer()).status)
    assert statuses == [401, 401, 401, 429, 429]


@proxied()
async def test_an_upgrade_is_passed_up_and_a_refusal_of_it_down(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    extension = {"Sec_WebSocket_Extensions": "permessage-deflate"}
    await raw.send(wires_upgrade(house.target(), **extension), b"behind")
    up = await house.upstream()
    got = await house.request(up)
    assert got.one("connection").lower() == "upgrade"
    assert got.one("upgrade") == "websocket"
    assert got.one("sec-websocket-key") == "dGhlIHNhbXBsZSBub25jZQ=="
    assert got.one("sec-websocket-extensions") == "permessage-deflate"
    assert up.data == b""  # what came behind waits for the 101
    await up.send(b"HTTP/1.1 503 Full\r\nContent-Length: 2\r\n\r\nno")
    assert (await raw.answer()).status == 503
    assert await up.ends() == b""
    assert await raw.ends() == b""


# --- Tunnel --------------------------------------------------------------------------


@proxied()
async def test_bytes_pass_only_behind_the_101_and_then_as_they_are(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    await raw.send(wires_upgrade(house.target()), b"be")
    up = await house.upstream()
    await house.request(up)
    await raw.send(b"hind")
    await up.listen(1)
    assert up.data == b""
    await up.send(PROXY_101, b"greet")
    answer = await raw.answer()
    assert answer.status == 101
    assert answer.headers["sec-websocket-accept"] == DOOR_ACCEPT
    await up.listen(1)
    await raw.listen(1)
    assert up.data == b"behind"
    assert raw.data == b"greet"
    noise = os.urandom(300_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raw.send, noise)
        nursery.start_soon(up.send, noise[::-1])
        nursery.start_soon(raw.listen)
        await up.listen()
    assert up.data == b"behind" + noise
    assert raw.data == b"greet" + noise[::-1]


@pytest.mark.parametrize("who", ["client", "upstream"])
@proxied()
async def test_an_end_of_one_side_is_passed_on_and_the_other_may_finish(
    house: ProxyHouse, who: str
) -> None:
    raw, up = await house.socket()
    one, other = (raw, up) if who == "client" else (up, raw)
    await one.send(b"last words")
    await one.stream.send_eof()
    assert await other.ends() == b"last words"
    await other.send(b"an answer")
    await other.stream.send_eof()
    assert await one.ends() == b"an answer"
    await wait_all_tasks_blocked()
    assert not house.proxy.open


@pytest.mark.parametrize("who", ["client", "upstream"])
@proxied()
async def test_a_reset_of_one_side_is_one_for_the_other(
    house: ProxyHouse, who: str
) -> None:
    raw, up = await house.socket()
    one, other = (raw, up) if who == "client" else (up, raw)
    chatd.reset(one.stream)
    with pytest.raises(trio.BrokenResourceError), trio.fail_after(1):
        await other.read()
    await wait_all_tasks_blocked()
    assert not house.proxy.open


@proxied()
async def test_the_upstreams_last_words_reach_a_client_that_talks_on(
    house: ProxyHouse,
) -> None:
    raw, up = await house.socket()
    await up.send(wires_close(1012))
    up.stream.socket.close()
    for _ in range(5):
        await raw.send(b"x" * 1000)
        await wait_all_tasks_blocked()
    assert await raw.ends() == wires_close(1012)


@proxied()
async def test_a_socket_in_which_nothing_moves_is_cut_after_75_s(
    house: ProxyHouse,
) -> None:
    raw, up = await house.socket()
    await trio.sleep(70)
    await up.send(b"ping")
    await raw.read()
    await trio.sleep(70)
    await raw.send(b"pong")
    await up.read()
    with taking(75), pytest.raises(trio.BrokenResourceError):
        await raw.read()
    with pytest.raises(trio.BrokenResourceError):
        await up.read()


@proxied()
async def test_who_does_not_end_behind_an_end_is_cut_after_10_s(
    house: ProxyHouse,
) -> None:
    raw, up = await house.socket()
    await up.stream.send_eof()
    assert await raw.read() == b""
    with taking(10), pytest.raises(trio.BrokenResourceError):
        await up.read()


@pytest.mark.parametrize("way", ["up", "down"])
@proxied()
async def test_what_one_end_does_not_take_is_not_read_from_the_other(
    house: ProxyHouse, way: str
) -> None:
    house.small = True
    raw, up = await house.socket(small=True)
    one, other = (raw, up) if way == "up" else (up, raw)
    sent = 0
    with trio.move_on_after(5):
        while True:
            await one.send(bytes(1000))
            sent += 1000
    assert sent < 200_000  # in all buffers together, the kernel's too
    await one.stream.send_eof()
    assert sent <= len(await other.ends()) < sent + 1000


@hypothesis.settings(deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 125, 126, 300, 65_535, 65_536]), max_size=5),
    st.lists(st.integers(1, 20) | st.integers(1000, 70_000), min_size=1, max_size=5),
    st.booleans(),
)
def test_the_end_of_a_frame_is_found_however_the_bytes_are_cut(
    sizes: list[int], cuts: list[int], masked: bool
) -> None:
    frames = [door_frame(TEXT, bytes(size), masked=masked) for size in sizes]
    ends = {0, *itertools.accumulate(map(len, frames))}
    data, at, cut = b"".join(frames), 0, itertools.cycle(cuts)
    found = chatd.FrameEnds()
    assert found.whole
    while at < len(data):
        piece = data[at : at + next(cut)]
        found.count(piece)
        at += len(piece)
        assert found.whole == (at in ends)


# --- Proxy: its end ------------------------------------------------------------------


async def proxy_close(up: WiresRaw, within: float = 1.0) -> int:
    """The code of the close frame that the upstream gets, which must be masked."""
    side = FrameProtocol(client=False, extensions=[])
    side.receive_bytes(bytes(up.data))
    with trio.fail_after(within):
        while True:
            side.receive_bytes(await up.read())
            for frame in side.received_frames():
                if frame.opcode is Opcode.CLOSE:
                    return int(frame.payload[0])


@proxied()
async def test_a_stop_closes_sockets_behind_the_clients_last_whole_frame(
    house: ProxyHouse,
) -> None:
    idle, idle_up = await house.socket()
    busy, busy_up = await house.socket()
    frame = wires_command("ping")
    await busy.send(frame[:5])
    await busy_up.listen(0.1)
    house.proxy.stopping.set()
    assert await proxy_close(idle_up) == 1012
    await busy_up.listen(0.5)
    assert busy_up.data == frame[:5]  # nothing in the middle of a frame
    await busy.send(frame[5:])
    assert await proxy_close(busy_up) == 1012
    for raw, up in ((idle, idle_up), (busy, busy_up)):
        await up.send(wires_close(1012))
        await up.stream.send_eof()
        assert await raw.ends() == wires_close(1012)
        raw.stream.socket.close()
    with trio.fail_after(1.1):
        await house.proxy.finished.wait()


@proxied()
async def test_a_socket_that_opens_while_it_stops_is_closed_too(
    house: ProxyHouse,
) -> None:
    raw = house.dial()
    await raw.send(wires_upgrade(house.target()))
    up = await house.upstream()
    await house.request(up)
    house.proxy.stopping.set()
    await wait_all_tasks_blocked()
    await up.send(PROXY_101)
    assert (await raw.answer()).status == 101
    assert await proxy_close(up) == 1012


@proxied()
async def test_a_stop_lets_a_request_finish_and_ends_who_waits_to_ask(
    house: ProxyHouse,
) -> None:
    silent, raw = house.dial(), house.dial()
    await raw.send(wires_request("GET", "/"))
    up = await house.upstream()
    await house.request(up)
    house.proxy.stopping.set()
    with taking(0, 1):  # it had a second to ask, so as not to be refused
        assert await silent.ends(within=2) == b""
    await up.send(PROXY_OK)
    assert (await raw.answer()).body == b"ok"
    await raw.ends()
    raw.stream.socket.close()
    with trio.fail_after(1):
        await house.proxy.finished.wait()


@proxied(drain_seconds=3.0)
async def test_what_does_not_end_is_cut_when_the_drain_is_over(
    house: ProxyHouse,
) -> None:
    raw, _ = await house.socket()
    waiting = house.dial()
    await waiting.send(wires_request("GET", "/"))
    await house.request(await house.upstream())
    with taking(3, 3.1):
        house.proxy.stopping.set()
        await house.proxy.finished.wait()
    assert await raw.ends() == b""


@proxied(max_connections=1)
async def test_a_full_proxy_turns_away_at_once(house: ProxyHouse) -> None:
    for _ in range(129):
        raw = house.dial(tcp=False)
        await raw.send(wires_request("GET", "/"))
        await house.upstream()
    raw = house.dial(tcp=False)
    answer = await raw.answer()
    assert (answer.status, answer.code) == (503, "overloaded")
    assert house.dials == 129


@proxied()
async def test_a_mistake_of_ours_ends_one_connection_and_is_told(
    house: ProxyHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house.proxy, "check_handshakes", lambda _: 1 / 0)
    raw = house.dial()
    await raw.send(wires_upgrade(house.target()))
    assert (await raw.answer()).code == "internal"
    house.errors = {"ZeroDivisionError": 1}
    _, heard = await house.exchange(wires_request("GET", "/"))
    assert heard.body == b"ok"


# ---------------------------------------------------------------------------- #
# The door: chatd as a stranger meets it
#
# A process, a port, signals, real time; nothing here looks inside. DoorServer is
# one database and the process that serves it, which may be killed and started
# again; DoorPeer is one WebSocket client, written without the library that the
# server uses, and it reads only while somebody listens: say, hear, hears_nothing,
# leave. What a test waits for is an event (a line, a frame, the end of a process)
# and every wait has an end.
# ---------------------------------------------------------------------------- #

DOOR_SECONDS = 30.0  # the longest wait for anything that should come at once
DOOR_MISTAKE = re.compile(r"Traceback|\b(failed|crashed) error=")
DOOR_CHECKOUT = Path(chatd.__file__).resolve().parent
DOOR_OPEN = [  # rates off: what the tests of limits are not about
    *("--sends=0", "--commands=0", "--typing=0", "--handshakes=0"),
    *("--requests=0", "--receive-bytes=0", "--drain-seconds=2"),
]
DOOR_UPGRADE = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)
DOOR_ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 1.3, for the key above
door_users = itertools.count(1000)  # a test takes users that no other test has

DoorFrame = dict[str, Any]


class DoorGone(Exception):
    """The server ended the connection: its close code, 1006 for none."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code


@dataclass(frozen=True)
class DoorRun:
    """How a command ended and what it wrote."""

    status: int
    out: str
    err: str


def door_answer(data: bytes, *, bodiless: bool = False) -> tuple[HttpAnswer, bytes]:
    """The first answer in `data` and what follows it. EOFError: not whole yet."""
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end:
        raise EOFError
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    status = int(first.split()[1])
    empty = bodiless or status in {101, 204, 304}
    size = 0 if empty else int(headers["content-length"])
    if len(rest) < size:
        raise EOFError
    return HttpAnswer(status, headers, rest[:size]), rest[size:]


def door_get(target: str, *lines: str, version: str = "1.1") -> bytes:
    """The bytes of a GET; `lines` are its headers as they stand."""
    text = "\r\n".join((f"GET {target} HTTP/{version}", *lines, "", ""))
    return text.encode("latin-1")


def door_frame(
    opcode: int, payload: bytes = b"", *, first: int = 0x80, masked: bool = True
) -> bytes:
    """One client's frame; `first` holds FIN and the reserved bits."""
    size, mask = len(payload), 0x80 if masked else 0
    if size < 126:
        head = struct.pack(">BB", first | opcode, mask | size)
    elif size < 1 << 16:
        head = struct.pack(">BBH", first | opcode, mask | 126, size)
    else:
        head = struct.pack(">BBQ", first | opcode, mask | 127, size)
    return head + (bytes(4) if masked else b"") + payload  # a mask of zeros


def door_reset(stream: trio.SocketStream) -> None:
    """Hang up with RST instead of FIN."""
    linger = struct.pack("ii", 1, 0)
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    stream.socket.close()


async def door_rest(stream: trio.SocketStream, seconds: float = DOOR_SECONDS) -> bytes:
    """Everything up to the server's end of the connection, which must come."""
    data = b""
    with trio.fail_after(seconds), suppress(trio.BrokenResourceError):
        while more := await stream.receive_some(65536):
            data += more
    return data


class DoorPeer:
    """One WebSocket client. Nothing is read but by hear and its sisters."""

    def __init__(self, stream: trio.SocketStream, data: bytes) -> None:
        self.stream = stream
        self.data = bytearray(data)
        self.hello: DoorFrame = {}
        self.pongs: list[bytes] = []
        self.owed = bytearray()  # pongs and the close, sent before the next read

    async def say(self, kind: str, /, **fields: object) -> None:
        await self.utter(json.dumps({"type": kind, **fields}))

    async def utter(self, text: str | bytes, opcode: int = 1) -> None:
        payload = text.encode() if isinstance(text, str) else text
        with trio.fail_after(DOOR_SECONDS):
            await self.stream.send_all(door_frame(opcode, payload))

    async def hear(self, kind: str = "", seconds: float = DOOR_SECONDS) -> DoorFrame:
        """The next message, which must be of that type. DoorGone: there is none."""
        with trio.fail_after(seconds):
            while (frame := self.heard()) is None:
                await self.sip(65536)
        assert kind in {"", frame["type"]}, frame
        return frame

    async def find(self, kind: str, seconds: float = DOOR_SECONDS) -> DoorFrame:
        """The next message of that type; those before it are not looked at."""
        with trio.fail_after(seconds):
            while (frame := await self.hear(seconds=seconds))["type"] != kind:
                pass
        return frame

    async def hears_nothing(self) -> None:
        """Nothing was on its way: a ping is answered before anything else comes."""
        await self.say("ping")
        await self.hear("pong")

    async def ask(self, kind: str, /, **fields: object) -> DoorFrame:
        """Say it and hear what answers it, past anything else."""
        ref = os.urandom(8).hex()
        await self.say(kind, ref=ref, **fields)
        while (frame := await self.hear()).get("ref") != ref:
            pass
        return frame

    async def ended(self, seconds: float = DOOR_SECONDS) -> int:
        """The code of the server's close, past anything else."""
        with trio.fail_after(seconds):
            while True:
                try:
                    await self.hear(seconds=seconds)
                except DoorGone as gone:
                    return gone.code

    async def leave(self) -> None:
        """Close as the RFC says, and see it answered."""
        with suppress(trio.BrokenResourceError):
            await self.stream.send_all(door_frame(8, struct.pack(">H", 1000)))
            assert await self.ended() in {1000, 1006}
        await self.stream.aclose()

    def drop(self) -> None:
        door_reset(self.stream)

    async def sip(self, size: int) -> None:
        """Read at most `size` bytes."""
        try:
            if self.owed:
                await self.stream.send_all(bytes(self.owed))
                self.owed.clear()
            data = await self.stream.receive_some(size)
        except trio.BrokenResourceError:
            raise DoorGone(1006) from None
        if not data:
            raise DoorGone(1006)
        self.data += data

    def heard(self) -> DoorFrame | None:
        """The next message of those read, None when there is no whole one."""
        while (frame := self._frame()) is not None:
            opcode, payload = frame
            if opcode == 1:
                message = json.loads(payload)
                assert isinstance(message, dict)
                return message
            if opcode == 8:
                with suppress(trio.BrokenResourceError):
                    self.owed += door_frame(8, payload[:2])
                code = struct.unpack(">H", payload[:2])[0] if payload else 1005
                raise DoorGone(code, payload[2:].decode())
            if opcode == 9:
                self.owed += door_frame(10, payload)
            else:
                assert opcode == 10, frame
                self.pongs.append(payload)
        return None

    def _frame(self) -> tuple[int, bytes] | None:
        """The next whole frame: unmasked, unfragmented, without extensions."""
        if len(self.data) < 2:
            return None
        first, size = self.data[:2]
        assert first & 0xF0 == 0x80, bytes(self.data[:64])
        assert size < 0x80, "a server masks nothing"
        start = 2 if size < 126 else 4 if size == 126 else 10
        if len(self.data) < start:
            return None
        if size >= 126:
            size = int.from_bytes(self.data[2:start], "big")
        if len(self.data) < start + size:
            return None
        payload = bytes(self.data[start : start + size])
        del self.data[: start + size]
        return first & 0x0F, payload


class DoorLine:
    """One HTTP connection, kept alive."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.data = b""

    async def ask(
        self,
        method: str,
        target: str,
        token: str = "",
        body: object = None,
        /,
        **headers: str,
    ) -> HttpAnswer:
        """`body` is bytes or will be JSON; `Some_Name` is the header Some-Name."""
        lines = {"Host": "chatd.test", **headers}
        if token:
            lines["Authorization"] = f"Bearer {token}"
        data = b""
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            lines["Content-Length"] = str(len(data))
            lines.setdefault("Content-Type", "application/json")
        head = [f"{name.replace('_', '-')}: {value}" for name, value in lines.items()]
        text = "\r\n".join((f"{method} {target} HTTP/1.1", *head, "", ""))
        with trio.fail_after(DOOR_SECONDS):
            with suppress(trio.BrokenResourceError):  # it may refuse before the end
                await self.stream.send_all(text.encode("latin-1") + data)
            return await self.answer(bodiless=method == "HEAD")

    async def answer(self, *, bodiless: bool = False) -> HttpAnswer:
        while True:
            with suppress(EOFError):
                answer, self.data = door_answer(self.data, bodiless=bodiless)
                if answer.status != 100:
                    return answer
                continue
            more = await self.stream.receive_some(65536)
            if not more:
                raise trio.BrokenResourceError(self.data)
            self.data += more


class DoorServer:
    """A database and, from begin to stop or kill, the process that serves it."""

    verb = "serve"
    open = tuple(DOOR_OPEN)

    def __init__(self, home: Path) -> None:
        self.home = home
        self.db = home / "chatd.db"
        self.port = 0
        self.serve: tuple[str, ...] = ("--db", str(self.db))
        self.flags: tuple[str, ...] = ()
        self.environment: dict[str, str] = {}
        self.said = ""  # stdout of all its processes
        self.up = trio.Event()  # set while it can be reached
        self.streams: list[trio.SocketStream] = []
        self.process: subprocess.Popen[str] | None = None
        self.listener: threading.Thread | None = None

    # ---- the process

    def start(self) -> None:
        """Start it and wait (it blocks) for the line that says it is ready."""
        command = [sys.executable, "-m", "chatd", self.verb, *self.serve]
        command += ["--listen", f"127.0.0.1:{self.port}", *self.flags]
        ready = threading.Event()
        with (self.home / "stderr").open("ab") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=DOOR_CHECKOUT,
                env=door_environment(TMPDIR=str(self.home), **self.environment),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.listener = threading.Thread(
            target=self._listen, args=(self.process.stdout, ready)
        )
        self.listener.start()
        ready.wait(DOOR_SECONDS)
        found = re.findall(r"(?m)^listening on http://127\.0\.0\.1:(\d+)$", self.said)
        if not found or self.process.poll() is not None:
            self.end(signal.SIGKILL)
            pytest.fail(f"it did not start: {self.output}")
        self.port = int(found[-1])

    def _listen(self, stdout: IO[str], ready: threading.Event) -> None:
        with stdout:
            for line in stdout:
                self.said += line
                if line.startswith("listening on "):
                    ready.set()
        ready.set()

    def end(self, signum: int = 0, seconds: float = DOOR_SECONDS) -> int:
        """Signal it, if one is given, and wait (it blocks) for its exit status."""
        assert self.process is not None
        assert self.listener is not None
        if signum:
            self.process.send_signal(signum)
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.listener.join()
            pytest.fail(f"it did not end: {self.output}")
        self.listener.join()
        self.process = None
        return status

    async def begin(self, *flags: str) -> None:
        """Start it (again, on the port it had) with these flags (or those it had)."""
        self.flags = flags or self.flags
        await trio.to_thread.run_sync(self.start)
        self.up.set()

    async def ended(self, signum: int = 0, seconds: float = DOOR_SECONDS) -> int:
        self.up = trio.Event()
        return await trio.to_thread.run_sync(self.end, signum, seconds)

    async def kill(self) -> None:
        await self.ended(signal.SIGKILL)

    async def stop(self) -> None:
        """End it as an operator does; it must say that all went well."""
        for stream in self.streams:
            stream.socket.close()
        self.streams.clear()
        assert await self.ended(signal.SIGTERM) == 0, self.output
        assert not DOOR_MISTAKE.search(self.output), self.output

    def signal(self, signum: int) -> None:
        assert self.process is not None
        self.process.send_signal(signum)

    @asynccontextmanager
    async def serving(self, *flags: str) -> AsyncIterator[DoorServer]:
        """It runs inside the block (rates off, then `flags`) and ends well."""
        await self.begin(*self.open, *flags)
        yield self
        if self.process is not None:
            await self.stop()

    def tidy(self) -> None:
        """Leave nothing behind, whatever happened."""
        for stream in self.streams:
            stream.socket.close()
        self.streams.clear()
        if self.process is not None:
            self.end(signal.SIGKILL)

    @property
    def output(self) -> str:
        return self.said + (self.home / "stderr").read_text("utf-8", "replace")

    @property
    def rss(self) -> int:
        """Its resident memory in bytes."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    @property
    def descriptors(self) -> int:
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    # ---- tokens

    @property
    def secret(self) -> bytes:
        return self.db.with_name("chatd.secret").read_bytes().strip()

    def token(self, user: int = 0, /, *, key: Any = None, **claims: object) -> str:
        """A JWT for an hour; a claim that is None is left out, `key` overrides."""
        now = int(time.time())
        plain: dict[str, object] = {"iat": now, "exp": now + 3600}
        if user:
            plain["sub"] = str(user)
        plain = {k: v for k, v in {**plain, **claims}.items() if v is not None}
        return jwt.encode(plain, key or self.secret, algorithm="HS256")

    @property
    def service(self) -> str:
        return self.token(1, scope="service")

    @property
    def stats_token(self) -> str:
        return self.token(1, scope="stats")

    # ---- HTTP

    async def dial(self, receive_buffer: int = 0) -> trio.SocketStream:
        sock = trio.socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            with trio.fail_after(DOOR_SECONDS):
                await sock.connect(("127.0.0.1", self.port))
            stream = trio.SocketStream(sock)
        except BaseException:
            sock.close()
            raise
        self.streams.append(stream)
        return stream

    async def ask(
        self,
        method: str,
        target: str,
        token: str = "",
        body: object = None,
        /,
        **headers: str,
    ) -> HttpAnswer:
        """One request on a connection of its own."""
        stream = await self.dial()
        async with stream:
            return await DoorLine(stream).ask(method, target, token, body, **headers)

    async def want(
        self,
        status: int,
        request: str,
        token: str = "",
        body: object = None,
        /,
        **headers: str,
    ) -> Any:
        """The JSON of the answer to `request` ("GET /healthz"), of that status."""
        method, target = request.split(" ", 1)
        answer = await self.ask(method, target, token, body, **headers)
        assert answer.status == status, (request, body, answer)
        return answer.json if answer.body else None

    async def raw(self, data: bytes, seconds: float = DOOR_SECONDS) -> bytes:
        """What comes back for these bytes until the server hangs up, as it must."""
        stream = await self.dial()
        async with stream:
            with suppress(trio.BrokenResourceError):
                await stream.send_all(data)
            return await door_rest(stream, seconds)

    # ---- WebSocket

    async def knock(
        self, data: bytes, *, receive_buffer: int = 0
    ) -> DoorPeer | HttpAnswer:
        """A handshake of any shape: the peer, or the refusal and its proper end."""
        stream = await self.dial(receive_buffer)
        await stream.send_all(data)
        got = b""
        with trio.fail_after(DOOR_SECONDS):
            while b"\r\n\r\n" not in got:
                more = await stream.receive_some(65536)
                if not more:
                    raise trio.BrokenResourceError(got)
                got += more
        if got.startswith(b"HTTP/1.1 101 "):
            answer, rest = door_answer(got)
            assert answer.headers["sec-websocket-accept"] == DOOR_ACCEPT
            assert "sec-websocket-extensions" not in answer.headers
            return DoorPeer(stream, rest)
        got += await door_rest(stream, 3)  # we keep our end: the server must hang up
        await stream.aclose()
        answer, rest = door_answer(got)
        assert answer.headers["connection"].lower() == "close", answer
        assert not rest
        return answer

    async def peer(
        self, who: int | str, cursor: str = "", /, *lines: str, receive_buffer: int = 0
    ) -> DoorPeer:
        """The socket of a user (a token is signed for him) or of a token."""
        peer = await self.knock(
            door_get(
                self.socket_path(who, cursor), "Host: chatd.test", *DOOR_UPGRADE, *lines
            ),
            receive_buffer=receive_buffer,
        )
        assert isinstance(peer, DoorPeer), peer
        peer.hello = await peer.hear("connected")
        return peer

    async def refusal(self, who: int | str, /, *lines: str) -> HttpAnswer:
        """The answer to an upgrade that must be refused."""
        answer = await self.knock(
            door_get(self.socket_path(who), "Host: chatd.test", *DOOR_UPGRADE, *lines)
        )
        assert isinstance(answer, HttpAnswer)
        return answer

    def socket_path(self, who: int | str, cursor: str = "") -> str:
        token = self.token(who) if isinstance(who, int) else who
        query = {"token": token, "cursor": cursor} if cursor else {"token": token}
        return f"/ws/chat?{urlencode(query)}"

    # ---- what most tests begin with

    async def chat(self, *members: int, title: str | None = None) -> int:
        body = {"title": title, "member_ids": members}
        got = await self.want(201, "POST /api/v1/chats", self.service, body)
        return int(got["chat"]["id"])

    async def post(self, chat: int, sender: int, content: str) -> DoorFrame:
        """A message by way of the service; the message as stored."""
        body = {"content": content, "sender_id": sender}
        target = f"POST /api/v1/chats/{chat}/messages"
        message = (await self.want(201, target, self.service, body))["message"]
        assert isinstance(message, dict)
        return message

    async def cursor(self, user: int) -> str:
        """Where the log stands now."""
        got = await self.want(200, "GET /api/v1/events", self.token(user))
        assert got["events"] == []
        return str(got["cursor"])

    async def log(self, user: int, cursor: str) -> list[DoorFrame]:
        """Every event of this user after the cursor, by the poll."""
        events: list[DoorFrame] = []
        more = True
        while more:
            target = f"GET /api/v1/events?limit=500&cursor={cursor}"
            got = await self.want(200, target, self.token(user))
            assert not got["resync"], got
            events += got["events"]
            cursor, more = got["cursor"], got["more"]
        return events

    async def history(self, chat: int, user: int) -> list[DoorFrame]:
        """Every message of the chat, oldest first; `n` is 1, 2, 3 without holes."""
        messages: list[DoorFrame] = []
        before, more = "", True
        while more:
            target = f"GET /api/v1/chats/{chat}/messages?limit=100{before}"
            got = await self.want(200, target, self.token(user))
            messages[:0] = got["messages"]
            before, more = (
                f"&before={messages[0]['id']}" if messages else "",
                got["more"],
            )
        assert [m["n"] for m in messages] == list(range(1, len(messages) + 1))
        return messages

    async def stats(self) -> Any:
        target = "GET /api/v1/internal/chat/ws/stats"
        return await self.want(200, target, self.stats_token)


class DoorProxy(DoorServer):
    """A proxy before a server: whoever dials it is at that server's door."""

    verb = "proxy"
    open = ("--handshakes=0", "--drain-seconds=2")

    def __init__(self, home: Path, port: int, db: Path) -> None:
        super().__init__(home)
        self.db = db
        self.serve = ("--db", str(db), "--upstream", f"127.0.0.1:{port}")


def door_lasting(events: list[DoorFrame]) -> list[DoorFrame]:
    """Events without the one thing in them that is as of now, not as of then."""
    return [{k: v for k, v in event.items() if k != "chat"} for event in events]


class DoorCount:
    """A number that tasks wait for."""

    def __init__(self) -> None:
        self.value = 0
        self.waiting = trio.lowlevel.ParkingLot()

    def add(self) -> None:
        self.value += 1
        self.waiting.unpark_all()

    async def reaches(self, value: int) -> None:
        while self.value < value:
            await self.waiting.park()


def door_environment(**more: str) -> dict[str, str]:
    """Ours (coverage counts children by it) without what chatd would read in it."""
    systemd = ("CREDENTIALS_", "JOURNAL_", "LISTEN_", "NOTIFY_", "STATE_", "WATCHDOG_")
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("CHATD_", *systemd))
    }
    return {**kept, **more}


async def door_run(*words: object, **environment: str) -> DoorRun:
    """One chatd command, run to its end."""
    done = await trio.run_process(
        [sys.executable, "-m", "chatd", *map(str, words)],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        cwd=DOOR_CHECKOUT,
        env=door_environment(**environment),
    )
    run = DoorRun(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert not DOOR_MISTAKE.search(run.err), run
    return run


async def door_until(
    true: Callable[[], Awaitable[bool] | bool], seconds: float = DOOR_SECONDS
) -> None:
    """Wait for what the server tells only when it is asked."""
    with trio.fail_after(seconds):
        while True:
            answer = true()
            if answer if isinstance(answer, bool) else await answer:
                return
            await trio.sleep(0.02)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[DoorServer]:
    """A server of the test's own: `async with house.serving(...)`."""
    server = DoorServer(tmp_path)
    yield server
    server.tidy()


@pytest.fixture(scope="module")
def door_shared_process(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[DoorServer]:
    server = DoorServer(tmp_path_factory.mktemp("door"))
    server.flags = tuple(DOOR_OPEN)
    server.start()
    yield server
    assert server.end(signal.SIGTERM) == 0, server.output
    assert not DOOR_MISTAKE.search(server.output), server.output


@pytest.fixture
async def open_house(door_shared_process: DoorServer) -> AsyncIterator[DoorServer]:
    """One server for all tests that leave it as it was; rates are off."""
    server = door_shared_process
    yield server
    for stream in server.streams:
        stream.socket.close()
    server.streams.clear()


@pytest.fixture(scope="module")
def door_shared_proxy(
    door_shared_process: DoorServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DoorServer]:
    server = door_shared_process
    proxy = DoorProxy(tmp_path_factory.mktemp("proxy"), server.port, server.db)
    proxy.flags = (*proxy.open, "--log-level=debug")
    proxy.start()
    yield proxy
    assert proxy.end(signal.SIGTERM) == 0, proxy.output
    assert not DOOR_MISTAKE.search(proxy.output), proxy.output
    assert "eyJ" not in proxy.output, "a token in the log"


@pytest.fixture(params=["straight", "by proxy"])
async def either_house(
    request: pytest.FixtureRequest, door_shared_process: DoorServer
) -> AsyncIterator[DoorServer]:
    """The same server, and the proxy before it: nobody can tell."""
    server = door_shared_process
    if request.param == "by proxy":
        server = request.getfixturevalue("door_shared_proxy")
    yield server
    for stream in server.streams:
        stream.socket.close()
    server.streams.clear()


@pytest.fixture
async def proxy_house(house: DoorServer, tmp_path: Path) -> AsyncIterator[DoorProxy]:
    """A proxy of the test's own, before `house`, which must serve first."""
    home = tmp_path / "proxy"
    home.mkdir()
    proxy = DoorProxy(home, 0, house.db)
    yield proxy
    proxy.tidy()


# ---- the conversation, word for word


DOOR_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


async def test_the_messages_of_the_specification_arrive_as_written(
    either_house: DoorServer,
) -> None:
    house = either_house
    ann, bob = next(door_users), next(door_users)
    chat = await house.chat(ann, bob)
    a, b = await house.peer(ann), await house.peer(bob)
    assert a.hello["user_id"] == ann
    assert DOOR_STAMP.fullmatch(a.hello["timestamp"])
    assert a.hello["resume"] == "fresh"
    assert 3500 < a.hello["expires_in"] <= 3600
    assert a.hello["chats"] == {str(chat): {"last_n": 0, "read_n": 0}}

    await a.say("ping")
    pong = await a.hear("pong")
    assert DOOR_STAMP.fullmatch(pong["timestamp"])

    await a.say("typing", chat_id=chat, is_typing=True)
    typing = {"type": "typing", "chat_id": chat, "user_id": ann, "is_typing": True}
    assert await b.hear() == typing
    await a.hears_nothing()  # no answer, no echo

    await a.say("send_message", chat_id=chat, content="Привет!", client_id="1")
    for_a, ack, for_b = await a.hear("new_message"), await a.hear("ack"), await b.hear()
    assert for_a == for_b
    message = for_b.pop("message")
    assert DOOR_STAMP.fullmatch(message.pop("created_at"))
    number = message.pop("id")
    assert message == {
        "chat_id": chat,
        "sender_id": ann,
        "content": "Привет!",
        "n": 1,
        "client_id": "1",
    }
    seq = for_b.pop("seq")
    assert for_b == {"type": "new_message", "chat_id": chat}
    assert DOOR_STAMP.fullmatch(ack.pop("created_at"))
    assert ack.pop("ref", None) is None
    assert ack == {
        "type": "ack",
        "client_id": "1",
        "message_id": number,
        "chat_id": chat,
        "n": 1,
        "duplicate": False,
    }

    await b.say("mark_read", message_id=number, ref="r")
    read = await b.hear("message_read")
    assert (await b.hear("ack"))["ref"] == "r"
    assert await a.hear() == read
    assert read.pop("seq") > seq
    assert read == {
        "type": "message_read",
        "message_id": number,
        "chat_id": chat,
        "read_by": bob,
        "n": 1,
    }
    await b.say("mark_read", message_id=number, ref="again")
    assert (await b.hear("ack"))["ref"] == "again"  # not moved: no event
    await a.hears_nothing()
    await a.leave()
    await b.leave()


async def test_every_connection_of_a_user_hears_his_chats_and_no_others(
    either_house: DoorServer,
) -> None:
    house = either_house
    ann, bob, eve = (next(door_users) for _ in range(3))
    chat = await house.chat(ann, bob)
    tabs = [await house.peer(ann) for _ in range(3)]
    b, e = await house.peer(bob), await house.peer(eve)
    await b.say("send_message", chat_id=chat, content="all of you")
    heard = [await tab.hear("new_message") for tab in tabs]
    assert heard[0] == heard[1] == heard[2]
    await b.find("ack")
    message = heard[0]["message"]["id"]
    forbidden = await e.ask("send_message", chat_id=chat, content="me too")
    unknown = await e.ask("send_message", chat_id=2**53 - 1, content="me too")
    assert forbidden["code"] == unknown["code"] == "not_found"
    same = [re.sub(r"\d+", "N", error["message"]) for error in (forbidden, unknown)]
    assert same[0] == same[1]  # nobody learns which chats there are
    typing = await e.ask("typing", chat_id=chat, is_typing=True)
    assert typing["code"] == "not_found"
    marked = await e.ask("mark_read", message_id=message)
    assert marked["code"] == "not_found"
    for tab in tabs:
        await tab.hears_nothing()
    await e.hears_nothing()


async def test_joining_and_leaving_act_at_once_on_open_sockets(
    either_house: DoorServer,
) -> None:
    house = either_house
    ann, bob = next(door_users), next(door_users)
    a, b = await house.peer(ann), await house.peer(bob)
    chat = await house.chat(ann, title="t")
    added = await a.hear("chat_added")
    assert added["chat_id"] == added["chat"]["id"] == chat
    first = await house.post(chat, ann, "before bob")
    await a.hear("new_message")
    await b.hears_nothing()
    members, body = f"POST /api/v1/chats/{chat}/members", {"user_id": bob}
    both = {"chat_id": chat, "user_id": bob}
    assert await house.want(201, members, house.token(ann), body) == both
    assert await house.want(200, members, house.token(ann), body) == both
    joined = await a.hear("member_added")
    assert (joined["chat_id"], joined["user_id"]) == (chat, bob)
    welcome = await b.hear("chat_added")
    assert welcome["seq"] > joined["seq"]
    history = await house.history(chat, bob)
    assert [m["id"] for m in history] == [first["id"]]  # all of it is his to read
    chats = await house.want(200, "GET /api/v1/chats", house.token(bob))
    assert [(c["read_n"], c["unread"]) for c in chats["chats"]] == [(1, 0)]
    await b.say("send_message", chat_id=chat, content="hello")
    assert (await a.hear("new_message"))["message"]["n"] == 2
    await b.find("ack")
    gone = f"DELETE /api/v1/chats/{chat}/members/{bob}"
    await house.want(204, gone, house.token(bob))
    last = await b.hear("member_removed")
    assert await a.hear("member_removed") == last
    await house.post(chat, ann, "without bob")
    await a.hear("new_message")
    await b.hears_nothing()
    refused = await b.ask("send_message", chat_id=chat, content="still here?")
    assert refused["code"] == "not_found"
    target = f"GET /api/v1/chats/{chat}/messages"
    await house.want(404, target, house.token(bob))
    log = await house.log(bob, b.hello["cursor"])
    assert door_lasting(log) == door_lasting([welcome, last])  # the rest is not his


async def test_a_socket_resumes_where_its_cursor_stands(
    either_house: DoorServer,
) -> None:
    house = either_house
    ann, bob = next(door_users), next(door_users)
    chat = await house.chat(ann, bob)
    start = await house.cursor(ann)
    a = await house.peer(ann, start)
    assert (a.hello["resume"], a.hello["cursor"]) == ("live", start)
    await a.leave()
    sent = [await house.post(chat, bob, str(i)) for i in range(3)]
    a = await house.peer(ann, start)
    assert (a.hello["resume"], a.hello["cursor"]) == ("replay", start)
    assert a.hello["chats"][str(chat)] == {"last_n": 3, "read_n": 0}
    events = [await a.hear("new_message") for _ in sent]
    assert [event["message"] for event in events] == sent
    await a.hears_nothing()
    epoch = start.partition(".")[0]
    a = await house.peer(ann, f"{epoch}.{events[1]['seq']}")
    assert a.hello["resume"] == "replay"
    assert await a.hear() == events[2]
    await a.hears_nothing()
    other = "other" if epoch != "other" else "else"
    bad = [f"{other}.1", f"{epoch}.{10**12}", "x", f"{epoch}.", f"{epoch}.-1", "é.1"]
    bad += [f"{epoch}.{10**30}", f"{epoch}.1.1", "." * 300]
    for cursor in bad:
        a = await house.peer(ann, cursor)
        assert a.hello["resume"] == "resync", cursor
        assert a.hello["cursor"].startswith(f"{epoch}."), cursor
        await a.hears_nothing()
        target = f"GET /api/v1/events?cursor={quote(cursor)}"
        poll = await house.want(200, target, house.token(ann))
        assert poll["resync"] is True, cursor
        assert poll["events"] == [], cursor


async def test_5000_events_behind_are_replayed_and_5001_are_not(
    house: DoorServer,
) -> None:
    async with house.serving():
        ann, bob, cy = (next(door_users) for _ in range(3))
        chat = await house.chat(ann, bob)
        await house.chat(cy)
        start = await house.cursor(ann)
        sender = DoorSender(house, bob, [(chat, "x")] * 5000)
        await sender.send_over(await house.peer(bob), DoorCount(), 64)
        peer = await house.peer(ann, start)
        assert peer.hello["resume"] == "replay"
        heard = [(await peer.hear("new_message"))["message"]["n"] for _ in range(5000)]
        assert heard == list(range(1, 5001))
        await peer.hears_nothing()
        await house.post(chat, bob, "one more")
        far = await house.peer(ann, start)
        assert far.hello["resume"] == "resync"
        other = await house.peer(cy, start)  # those were not his chats
        assert other.hello["resume"] in {"live", "replay"}
        await other.hears_nothing()


async def test_a_client_the_project_did_not_write_talks_to_it(
    either_house: DoorServer,
) -> None:
    house = either_house
    ann, bob = next(door_users), next(door_users)
    chat = await house.chat(ann, bob)
    path = f"127.0.0.1:{house.port}{house.socket_path(ann)}"

    def by_websockets() -> list[DoorFrame]:
        with websockets_connect(f"ws://{path}", proxy=None) as socket_:
            assert socket_.ping().wait(DOOR_SECONDS)
            hello = json.loads(socket_.recv(DOOR_SECONDS))
            say = {"type": "send_message", "chat_id": chat, "content": "🙂" * 3000}
            halves = json.dumps(say, ensure_ascii=False)
            socket_.send([halves[:50], halves[50:]])  # in two fragments
            rest = [json.loads(socket_.recv(DOOR_SECONDS)) for _ in range(2)]
        assert socket_.close_code == 1000
        return [hello, *rest]

    frames = await trio.to_thread.run_sync(by_websockets)
    assert [f["type"] for f in frames] == ["connected", "new_message", "ack"]
    assert frames[1]["message"]["content"] == "🙂" * 3000
    with trio.fail_after(DOOR_SECONDS):
        async with trio_websocket.open_websocket_url(f"ws://{path}") as ws:
            hello = json.loads(await ws.get_message())
            assert hello["chats"] == {str(chat): {"last_n": 1, "read_n": 1}}
            await ws.ping()
            await ws.send_message('{"type": "ping"}')
            assert json.loads(await ws.get_message())["type"] == "pong"


async def test_sending_is_idempotent_over_the_socket_and_over_http(
    either_house: DoorServer,
) -> None:
    house = either_house
    ann, bob = next(door_users), next(door_users)
    chat, other = await house.chat(ann, bob), await house.chat(ann)
    a, token = await house.peer(ann), house.token(ann)
    target = f"POST /api/v1/chats/{chat}/messages"
    ask = {"chat_id": chat, "content": "once", "client_id": "k" * 64}
    first = await a.ask("send_message", **ask)
    assert first["duplicate"] is False
    again = await a.ask("send_message", **ask)
    assert again["duplicate"] is True
    same = ("message_id", "n", "created_at", "chat_id", "client_id")
    assert [first[k] for k in same] == [again[k] for k in same]
    await a.hears_nothing()  # and no event
    body = {"content": "once", "client_id": "k" * 64}
    by_http = await house.want(200, target, token, body)
    assert by_http["duplicate"] is True
    assert by_http["message"]["id"] == first["message_id"]
    body.pop("client_id")
    key = {"Idempotency_Key": "k" * 64}
    assert await house.want(200, target, token, body, **key) == by_http
    body["client_id"] = "another"
    both = await house.ask("POST", target[5:], token, body, **key)
    assert (both.status, both.code) == (400, "bad_field")
    for change in ({"content": "twice"}, {"chat_id": other}):
        wrong = await a.ask("send_message", **{**ask, **change})
        assert wrong["code"] == "idempotency_mismatch"
    body = {"content": "twice", "client_id": "k" * 64}
    mismatch = await house.ask("POST", target[5:], token, body)
    assert (mismatch.status, mismatch.code) == (409, "idempotency_mismatch")
    b = await house.peer(bob)
    his = await b.ask("send_message", **ask)  # another sender's key is another key
    assert his["duplicate"] is False
    assert [m["content"] for m in await house.history(chat, ann)] == ["once", "once"]


# ---- the promise


class DoorSender:
    """Sends its messages in order, some in flight, and sends again what was cut."""

    def __init__(self, house: DoorServer, user: int, texts: list[tuple[int, str]]):
        self.house, self.user = house, user
        name = f"{user}-{next(door_users)}"
        self.left = deque(
            {"chat_id": chat, "content": text, "client_id": f"{name}-{number}"}
            for number, (chat, text) in enumerate(texts)
        )
        self.acks: dict[str, DoorFrame] = {}

    async def send(self, acked: DoorCount, in_flight: int = 16) -> None:
        while self.left:
            with suppress(OSError, DoorGone, trio.BrokenResourceError):
                peer = await self.house.peer(self.user)
                await self.send_over(peer, acked, in_flight)
                await peer.leave()
            await self.house.up.wait()

    async def send_over(
        self, peer: DoorPeer, acked: DoorCount, in_flight: int = 16
    ) -> None:
        """Until all are acked or the connection ends; then what is left is known."""
        waiting = 0
        while self.left:
            for message in list(self.left)[waiting:in_flight]:
                await peer.say("send_message", **message)
                waiting += 1
            ack = await peer.find("ack")
            assert ack["client_id"] == self.left.popleft()["client_id"]
            self.acks[ack["client_id"]] = ack
            waiting -= 1
            acked.add()


async def test_an_acked_message_survives_kill_9_and_none_is_stored_twice(
    house: DoorServer,
) -> None:
    users, rounds, each = [next(door_users) for _ in range(4)], 5, 200
    acked = DoorCount()
    async with house.serving():
        chats = [await house.chat(*users), await house.chat(*users)]
        senders = [
            DoorSender(house, user, [(chats[i % 2], f"{i}") for i in range(each)])
            for user in users
        ]
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for sender in senders:
                    nursery.start_soon(sender.send, acked)
                for round_ in range(1, rounds + 1):
                    await acked.reaches(round_ * each * len(users) // (rounds + 1))
                    await house.kill()
                    await house.begin()
        stored = [m for chat in chats for m in await house.history(chat, users[0])]
        by_key = {m["client_id"]: m for m in stored}
        assert len(by_key) == len(stored) == len(users) * each  # each once
        for sender in senders:
            assert len(sender.acks) == each
            for key, ack in sender.acks.items():
                kept = by_key[key]
                assert ack["message_id"] == kept["id"], (ack, kept)
                assert ack["n"] == kept["n"], (ack, kept)
                assert ack["created_at"] == kept["created_at"], (ack, kept)
            for chat in chats:  # stored in the order sent
                mine = (m for m in stored if m["sender_id"] == sender.user)
                sent = [int(m["content"]) for m in mine if m["chat_id"] == chat]
                assert sent == sorted(sent)
        same = ("chat_id", "content", "client_id")
        last = {k: v for k, v in stored[-1].items() if k in same}
        peer = await house.peer(stored[-1]["sender_id"])
        assert (await peer.ask("send_message", **last))["duplicate"] is True
        await peer.hears_nothing()
    assert (await door_run("check", "--db", house.db)).status == 0


class DoorHopper:
    """A reader with a cursor who takes what he can get, however he gets it."""

    def __init__(self, house: DoorServer, user: int, cursor: str, seed: int) -> None:
        self.house, self.user, self.cursor = house, user, cursor
        self.epoch = cursor.partition(".")[0]
        self.dice = random.Random(seed)
        self.heard: list[DoorFrame] = []
        self.ways = {"live": 0, "replay": 0, "poll": 0, "cut": 0}

    async def hop(self, finished: trio.Event) -> None:
        """Until a poll after the finish finds nothing more."""
        while True:
            ended = finished.is_set()
            before = len(self.heard)
            try:
                if ended or self.dice.random() < 0.4:
                    await self.poll()
                    if ended and len(self.heard) == before:
                        return
                else:
                    await self.listen()
            except (OSError, DoorGone, trio.BrokenResourceError):
                self.ways["cut"] += 1
                await self.house.up.wait()

    async def poll(self) -> None:
        query = f"limit={self.dice.randint(1, 80)}&cursor={self.cursor}"
        target = f"GET /api/v1/events?{query}"
        got = await self.house.want(200, target, self.house.token(self.user))
        assert got["resync"] is False, got
        self.heard += got["events"]
        self.cursor = got["cursor"]
        self.ways["poll"] += 1

    async def listen(self) -> None:
        peer = await self.house.peer(self.user, self.cursor)
        assert peer.hello["cursor"] == self.cursor, peer.hello
        self.ways[peer.hello["resume"]] += 1  # KeyError: a resync
        with trio.move_on_after(self.dice.random() / 2):
            for _ in range(self.dice.randint(1, 60)):
                frame = await peer.hear()
                if "seq" in frame:  # only events move a cursor
                    self.heard.append(frame)
                    self.cursor = f"{self.epoch}.{frame['seq']}"
        peer.drop()


@pytest.mark.parametrize("seed", [20251121, 6])
async def test_a_hopping_reader_hears_every_event_once_whatever_is_killed(
    house: DoorServer, seed: int
) -> None:
    """The promise itself: socket, poll and reconnects mixed, five kills."""
    reader, *writers = users = [next(door_users) for _ in range(4)]
    acked, finished, rounds, each = DoorCount(), trio.Event(), 5, 150
    async with house.serving():
        chats = [await house.chat(*users), await house.chat(reader, writers[0])]
        start = await house.cursor(reader)
        hoppers = [DoorHopper(house, reader, start, seed + i) for i in range(2)]
        texts = [(chats[0], f"{i} é\n\t\U0001f600 \u2028") for i in range(each)]
        senders = [DoorSender(house, user, texts) for user in writers]

        async def write() -> None:
            async with trio.open_nursery() as writing:
                for sender in senders:
                    writing.start_soon(sender.send, acked, 3)
                for round_ in range(1, rounds + 1):
                    await acked.reaches(round_ * each * len(writers) // (rounds + 1))
                    await house.kill()
                    await house.begin()
                    message = await house.post(chats[1], writers[0], "marked")
                    await house.want(
                        200,
                        f"POST /api/v1/messages/{message['id']}/read",
                        house.token(reader),
                    )
                    chats.append(await house.chat(*users))
                    await house.post(chats[-1], writers[1], "in a new chat")
            finished.set()

        with trio.fail_after(75):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                for hopper in hoppers:
                    nursery.start_soon(hopper.hop, finished)
        log = await house.log(reader, start)
        seqs = [event["seq"] for event in log]
        assert all(a < b for a, b in itertools.pairwise(seqs))
        kinds = [event["type"] for event in log]
        expected = {"new_message": each * 3 + rounds * 2, "message_read": rounds}
        assert {kind: kinds.count(kind) for kind in set(kinds)} == {
            **expected,
            "chat_added": rounds,
        }
        for hopper in hoppers:
            assert [e["seq"] for e in hopper.heard] == seqs, hopper.ways
            assert door_lasting(hopper.heard) == door_lasting(log)
            assert min(hopper.ways["poll"], hopper.ways["replay"]) > 0, hopper.ways
        for chat in chats:
            told = [e for e in log if e["type"] == "new_message"]
            texts_told = [e["message"] for e in told if e["chat_id"] == chat]
            assert texts_told == await house.history(chat, reader)


async def test_a_disk_that_takes_no_more_is_told_and_forgiven(
    house: DoorServer,
) -> None:
    """The limit on file sizes stands for the full disk; readers go on meanwhile."""
    async with house.serving():
        assert house.process is not None
        pid, (soft, hard) = house.process.pid, resource.getrlimit(resource.RLIMIT_FSIZE)
        ann, bob = next(door_users), next(door_users)
        chat = await house.chat(ann, bob)
        before = [await house.post(chat, bob, DOOR_BULK) for _ in range(8)]
        a, b = await house.peer(ann), await house.peer(bob)
        size = house.db.with_name("chatd.db-wal").stat().st_size
        assert size > 100_000
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
        say = {"chat_id": chat, "content": DOOR_BULK, "client_id": "1"}
        for _ in range(2):
            refused = await a.ask("send_message", **say)
            assert refused["code"] == "storage_failed"
        target, body = f"/api/v1/chats/{chat}/messages", {"content": DOOR_BULK}
        by_http = await house.ask("POST", target, house.token(ann), body)
        assert (by_http.status, by_http.code) == (503, "storage_failed")
        assert int(by_http.headers["retry-after"]) >= 1
        assert (await house.ask("GET", "/healthz")).status == 503
        assert (await house.stats())["store"]["degraded"] is True
        assert await house.history(chat, bob) == before
        await b.hears_nothing()
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))

        async def well() -> bool:
            return (await house.ask("GET", "/healthz")).status == 200

        await door_until(well)
        assert (await a.ask("send_message", **say))["type"] == "ack"
        last = (await b.hear("new_message"))["message"]
        assert await house.history(chat, bob) == [*before, last]
        assert (await house.stats())["store"]["degraded"] is False
        await b.hears_nothing()


DOOR_BULK = "\U0001f600" * 3990  # about 16 KB in UTF-8


async def door_load(house: DoorServer, chat: int, user: int, count: int) -> list[str]:
    """Send so many large messages, eight in flight; what was sent, in order."""
    texts = [f"{i} {DOOR_BULK}" for i in range(count)]
    peer = await house.peer(user)
    sender = DoorSender(house, user, [(chat, text) for text in texts])
    await sender.send_over(peer, DoorCount(), 8)
    await peer.leave()
    return texts


async def door_texts(peer: DoorPeer, count: int) -> list[str]:
    """The contents of the next so many new messages; nothing else may come."""
    heard = [await peer.hear("new_message") for _ in range(count)]
    return [frame["message"]["content"] for frame in heard]


async def test_a_stalled_reader_costs_no_memory_and_delays_nobody(
    house: DoorServer,
) -> None:
    """Silent for less than the limit, then everything, over the same socket."""
    users, count = [next(door_users) for _ in range(12)], 400
    writer, other, *stalled = users
    async with house.serving():
        chat = await house.chat(*users)
        warm, rss = await house.peer(other), house.rss
        async with trio.open_nursery() as nursery:  # what it costs when all read
            nursery.start_soon(door_load, house, chat, writer, count)
            await door_texts(warm, count)
        usual, rss = house.rss - rss, house.rss
        peers = [await house.peer(user, receive_buffer=16384) for user in stalled]
        began = trio.current_time()
        texts: list[str] = []
        longest = 0.0

        async def write() -> None:
            texts.extend(await door_load(house, chat, writer, count))

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                heard = []
                for _ in range(count):
                    since = trio.current_time()
                    heard += await door_texts(warm, 1)
                    longest = max(longest, trio.current_time() - since)
            assert heard == texts
            assert longest < 1.5, "the others waited"
            grown, load = house.rss - rss, sum(len(text.encode()) for text in texts)
            assert grown < usual + load, (grown, usual)  # not once for each of ten
            stats = await house.stats()
            assert stats["connections"]["catching_up"] > 0, stats
            await trio.sleep(max(0.0, began + 3 - trio.current_time()))
            for peer in peers:
                size = 1 << 20
                peer.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
                assert await door_texts(peer, count) == texts
                await peer.hears_nothing()
        stats = await house.stats()
        assert stats["connections"]["catching_up"] == 0, stats
        assert stats["broadcast"]["stalls"] == 0, stats


async def test_patience_ends_where_it_was_promised_to_end(house: DoorServer) -> None:
    """The long waits, side by side: 10 s of stall, 10 s for a head, 25 s of grace."""
    async with house.serving():
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(door_silent_too_long, house)
                nursery.start_soon(door_slow_but_alive, house)
                nursery.start_soon(door_slow_head, house)
                nursery.start_soon(door_silent_head, house)
                nursery.start_soon(door_slow_body, house)
                nursery.start_soon(door_token_ends, house)


async def door_silent_too_long(house: DoorServer) -> None:
    """Dropped after 10 s without progress; with its cursor it misses nothing."""
    ann, bob, count = next(door_users), next(door_users), 450
    chat = await house.chat(ann, bob)
    peer = await house.peer(ann, receive_buffer=16384)
    epoch = peer.hello["cursor"].partition(".")[0]
    texts = await door_load(house, chat, bob, count)
    began = trio.current_time()

    async def dropped() -> bool:
        return bool((await house.stats())["broadcast"]["stalls"] > 0)

    await door_until(dropped, 20)
    assert trio.current_time() - began > 5, "too soon"
    heard: list[DoorFrame] = []
    with suppress(DoorGone):
        while len(heard) < count:  # what was on its way
            heard.append(await peer.hear("new_message"))
    assert len(heard) < count
    cursor = f"{epoch}.{heard[-1]['seq']}" if heard else peer.hello["cursor"]
    peer = await house.peer(ann, cursor)
    assert peer.hello["resume"] == "replay"
    rest = await door_texts(peer, count - len(heard))
    assert [e["message"]["content"] for e in heard] + rest == texts
    await peer.hears_nothing()


async def door_slow_but_alive(house: DoorServer) -> None:
    """5 KB a second through a long catch-up, and pings: it stays."""
    ann, bob, count = next(door_users), next(door_users), 350
    chat = await house.chat(ann, bob)
    start = await house.cursor(ann)
    texts = await door_load(house, chat, bob, count)
    peer = await house.peer(ann, start, receive_buffer=16384)
    assert peer.hello["resume"] == "replay"
    pings = 0
    for second in range(15):
        await peer.sip(5000)
        if second % 2:
            await peer.say("ping")
            pings += 1
        await trio.sleep(1)
    peer.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    heard: list[str] = []
    while len(heard) < count or pings:
        frame = await peer.hear()
        if frame["type"] == "pong":
            pings -= 1
        else:
            heard.append(frame["message"]["content"])
    assert heard == texts
    await peer.hears_nothing()


async def door_slow_head(house: DoorServer) -> None:
    stream = await house.dial()
    began = trio.current_time()
    answer = b""
    async with trio.open_nursery() as nursery:

        async def drip() -> None:
            with suppress(trio.BrokenResourceError):
                for byte in door_get("/healthz", "Host: x", "X-Slow: " + "y" * 99):
                    await stream.send_all(bytes([byte]))
                    await trio.sleep(0.5)

        nursery.start_soon(drip)
        answer = await door_rest(stream, 14)
        nursery.cancel_scope.cancel()
    assert 8 < trio.current_time() - began < 13
    assert not answer or door_answer(answer)[0].status == 408, answer


async def door_silent_head(house: DoorServer) -> None:
    stream = await house.dial()
    began = trio.current_time()
    answer = await door_rest(stream, 14)
    assert 8 < trio.current_time() - began < 13
    assert not answer or door_answer(answer)[0].status == 408, answer


async def door_slow_body(house: DoorServer) -> None:
    stream = await house.dial()
    began = trio.current_time()
    lines = ["POST /api/v1/chats HTTP/1.1", "Host: x", "Content-Length: 1000"]
    lines += [f"Authorization: Bearer {house.token(1)}", "", "{"]
    await stream.send_all("\r\n".join(lines).encode())
    answer = await door_rest(stream, 20)
    assert 8 < trio.current_time() - began < 19
    assert door_answer(answer)[0].status == 408, answer
    assert door_answer(answer)[0].code == "timeout"


async def door_token_ends(house: DoorServer) -> None:
    """Told 60 s before its end, closed 25 s after it, unless it is renewed."""
    user = next(door_users)
    ends = int(time.time()) - 3  # within the leeway of 5 s
    renewed, ticketed, left = [
        await house.peer(house.token(user, exp=ends)) for _ in range(3)
    ]
    for peer in (renewed, ticketed, left):
        expiring = await peer.hear("token_expiring")
        assert expiring["expires_in"] <= 60
    ack = await renewed.ask("auth", token=house.token(user))
    assert ack["type"] == "ack"
    assert 3500 < ack["expires_in"] <= 3600
    got = await house.want(200, "GET /api/v2/ws-token", house.token(user))
    ack = await ticketed.ask("auth", token=got["token"])
    assert ack["type"] == "ack"
    assert 3500 < ack["expires_in"] <= 3600
    with trio.fail_after(30):
        assert await left.ended(30) == 4401
    assert 24 <= time.time() - ends < 29
    await trio.sleep(1.5)  # the sweeper has passed once more
    await renewed.hears_nothing()
    await ticketed.hears_nothing()


# ---- HTTP: every row of the README's table, and more


async def test_every_row_of_the_http_table_answers(either_house: DoorServer) -> None:
    house = either_house
    ann, bob, cy = (next(door_users) for _ in range(3))
    token = house.token(ann, name="Ann")
    start = await house.cursor(ann)
    assert (await house.ask("GET", "/healthz")).status == 200
    me = await house.want(200, "GET /api/v1/me", token)
    assert me == {"user_id": ann, "name": "Ann"}
    nameless = await house.want(200, "GET /api/v1/me", house.token(cy))
    assert nameless == {"user_id": cy, "name": None}
    users = await house.want(200, "GET /api/v1/users", token)
    assert {"user_id": ann, "name": "Ann"} in users["users"]

    body: dict[str, object] = {"title": "t", "member_ids": [bob]}
    chat = (await house.want(201, "POST /api/v1/chats", token, body))["chat"]
    members = [(m["user_id"], m["name"], m["read_n"]) for m in chat.pop("members")]
    assert sorted(members) == [(ann, "Ann", 0), (bob, None, 0)]
    number = chat.pop("id")
    assert chat == {"title": "t", "last_n": 0, "last_message": None}
    who: dict[str, object]
    more, who = f"/api/v1/chats/{number}/members", {"user_id": cy}
    assert await house.want(201, f"POST {more}", token, who) == {
        "chat_id": number,
        "user_id": cy,
    }
    await house.want(200, f"POST {more}", house.service, who)
    for stranger in (token, house.token(next(door_users))):
        targets = [f"/api/v1/chats/{n}/members/{cy}" for n in (number, 2**53 - 1)]
        answers = [await house.ask("DELETE", target, stranger) for target in targets]
        statuses = {answer.status for answer in answers}
        assert statuses in ({403}, {404})  # alike, whatever chats there are
    await house.want(404, f"DELETE /api/v1/chats/{2**53 - 1}/members/{ann}", token)
    gone = await house.ask("DELETE", f"{more}/{cy}", house.service)
    assert (gone.status, gone.body) == (204, b"")

    messages, say = f"/api/v1/chats/{number}/messages", {"content": "one"}
    sent = await house.want(201, f"POST {messages}", token, say)
    assert sent["duplicate"] is False
    one = sent["message"]
    assert one["sender_id"] == ann
    say = {"content": "two", "client_id": "two"}
    two = (await house.want(201, f"POST {messages}", house.token(bob), say))["message"]
    three = await house.post(number, bob, "three")
    assert three["sender_id"] == bob
    all_three = {"messages": [one, two, three], "more": False}
    assert await house.want(200, f"GET {messages}", token) == all_three
    page = await house.want(200, f"GET {messages}?limit=2", token)
    assert page == {"messages": [two, three], "more": True}
    page = await house.want(200, f"GET {messages}?limit=2&before={two['id']}", token)
    assert page == {"messages": [one], "more": False}
    read = await house.want(200, f"POST /api/v1/messages/{two['id']}/read", token)
    assert read == {"message_id": two["id"], "chat_id": number, "n": 2}

    chats = await house.want(200, "GET /api/v1/chats", token)
    (mine,) = chats["chats"]
    assert (mine["last_n"], mine["read_n"], mine["unread"]) == (3, 2, 1)
    assert mine["last_message"] == three
    poll = await house.want(200, f"GET /api/v1/events?cursor={start}&limit=500", token)
    kinds = [event["type"] for event in poll["events"]]
    expected = ["chat_added", "member_added", "member_removed"]
    expected += ["new_message"] * 3
    assert kinds == [*expected, "message_read"]
    assert (poll["more"], poll["resync"]) == (False, False)
    assert poll["cursor"].partition(".")[0] == start.partition(".")[0]
    seq = poll["events"][2]["seq"]
    epoch = start.partition(".")[0]
    page = await house.want(200, f"GET /api/v1/events?cursor={start}&limit=3", token)
    assert (page["more"], page["cursor"]) == (True, f"{epoch}.{seq}")

    ticket = await house.want(200, "GET /api/v2/ws-token", token)
    assert ticket["expires_in"] == 60
    assert (await house.ask("GET", "/ws/chat")).code == "upgrade_required"
    assert (await house.ask("GET", "/ws/chat")).status == 426
    revoked = {"user_id": cy}
    answer = await house.want(
        200, "POST /api/v1/internal/chat/revoke", house.service, revoked
    )
    assert answer == {"user_id": cy, "closed": 0}


async def test_the_page_is_served_from_a_fixed_table(either_house: DoorServer) -> None:
    page = await either_house.ask("GET", "/")
    assert page.status == 200
    assert page.headers["content-type"].startswith("text/html")
    for target in ("/web/../chatd.py", "/web/..%2fchatd.py", "/web//etc/passwd", "/x"):
        assert (await either_house.ask("GET", target)).status in {400, 404}, target
    assert (await either_house.ask("GET", "/web/nothing.js")).code == "not_found"


async def test_a_bad_request_is_told_which_field_and_what_was_wrong(
    open_house: DoorServer,
) -> None:
    house = open_house
    ann = next(door_users)
    chat, token = await house.chat(ann), house.token(ann)
    messages = f"/api/v1/chats/{chat}/messages"
    ids: list[object] = ["3", 1.5, True, None, [], {}, 0, -1, 2**53]
    wrong: list[tuple[str, str, list[object]]] = [
        ("/api/v1/chats", "title", [3, True, [], {}]),
        ("/api/v1/chats", "member_ids", ["3", 3, {}, *([i] for i in ids)]),
        (f"/api/v1/chats/{chat}/members", "user_id", ids),
        (messages, "content", [3, None, True, [], {}, "x" * 4001, "a\0b"]),
        (messages, "client_id", [3, True, [], "", "x" * 65, "é", "a\nb", "\x7f"]),
        ("/api/v1/internal/chat/revoke", "user_id", ids),
    ]
    whole = {"title": "t", "member_ids": [], "user_id": ann, "content": "c"}
    async with await house.dial() as stream:
        line = DoorLine(stream)  # a refused body costs nobody his connection
        for target, name, values in wrong:
            for value in values:
                body = {**whole, name: value}
                right = house.service if "internal" in target else token
                answer = await line.ask("POST", target, right, body)
                seen = (target, body, answer)
                assert (answer.status, answer.code) == (400, "bad_field"), seen
                assert name in answer.json["error"]["message"], seen
        for value in (value for value in ids if value is not None):
            body = {"content": "c", "sender_id": value}
            answer = await line.ask("POST", messages, house.service, body)
            assert (answer.status, answer.code) == (400, "bad_field"), (body, answer)
            assert "sender_id" in answer.json["error"]["message"], answer
        queries = [f"{messages}?limit={v}" for v in ("0", "101", "x", "-1", "1.5")]
        queries += [f"{messages}?before={v}" for v in ("x", "-1", str(2**63))]
        queries += [f"/api/v1/events?limit={v}" for v in ("0", "501", "x", "")]
        for target in queries:
            answer = await line.ask("GET", target, token)
            assert (answer.status, answer.code) == (400, "bad_field"), (target, answer)
            name = target.partition("?")[2].partition("=")[0]
            assert name in answer.json["error"]["message"], (target, answer)
        bodies = [
            b"",
            b"{",
            b"[]",
            b"3",
            b'"x"',
            b"null",
            b"\xff",
            b'{"content":"\xff"}',
        ]
        bodies += [
            b"[" * 30000,
            b'{"a":' * 5000,
            b'{"content":NaN}',
            b'{"content":1e999}',
        ]
        for text in bodies:
            answer = await line.ask("POST", messages, token, text)
            code = "bad_field" if text == b'{"content":1e999}' else "bad_json"
            assert answer.status == 400, (text[:40], answer)
            assert answer.code in {"bad_json", code}, (text[:40], answer)
        for part in ("0", "x", str(2**53), str(10**30), "-1", "%31", ""):
            answer = await line.ask("GET", f"/api/v1/chats/{part}/messages", token)
            assert answer.status in {400, 404}, (part, answer)
    assert await house.history(chat, ann) == []


async def test_head_and_unknown_methods_get_right_answers(
    open_house: DoorServer,
) -> None:
    house = open_house
    user = next(door_users)
    targets = ["/healthz", "/api/v1/me", "/api/v1/chats", "/", "/nothing", "/ws/chat"]
    async with await house.dial() as stream:
        line = DoorLine(stream)  # a HEAD with a body would spoil what follows it
        for target in targets:
            get = await line.ask("GET", target, house.token(user))
            head = await line.ask("HEAD", target, house.token(user))
            assert head.status == get.status, target
            same = ("content-length", "content-type")
            assert [head.headers[k] for k in same] == [get.headers[k] for k in same]
        allowed = {
            "/healthz": {"GET", "HEAD"},
            "/api/v1/chats": {"GET", "HEAD", "POST"},
            "/api/v1/session": {"POST"},
            "/api/v1/chats/1/members/1": {"DELETE"},
        }
        for target, methods in allowed.items():
            for method in ("BREW", "PATCH"):
                answer = await line.ask(method, target, house.token(user))
                assert (answer.status, answer.code) == (405, "method_not_allowed")
                allow = {word.strip() for word in answer.headers["allow"].split(",")}
                assert methods <= allow <= methods | {"OPTIONS"}, (target, answer)
        answer = await line.ask("BREW", "/nothing", house.token(user))
        assert (answer.status, answer.code) == (404, "not_found")
    answer = await house.ask("POST", "/ws/chat", house.token(user), {})
    assert answer.status == 405


async def test_one_connection_serves_many_requests(open_house: DoorServer) -> None:
    house = open_house
    user = next(door_users)
    async with await house.dial() as stream:
        line = DoorLine(stream)
        for _ in range(20):
            answer = await line.ask("GET", "/api/v1/me", house.token(user))
            assert answer.json["user_id"] == user
            assert (await line.ask("GET", "/nothing")).status == 404
            assert (await line.ask("GET", "/api/v1/me")).status == 401
        ask = door_get("/healthz", "Host: x")
        await stream.send_all(ask * 10)  # ten at once, answered in order
        for _ in range(10):
            assert (await line.answer()).status == 200
        chunked = "POST /api/v1/chats HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked"
        chunked += f"\r\nAuthorization: Bearer {house.token(user)}\r\n\r\n"
        body = '9\r\n{"title":\r\n17\r\n"é", "member_ids": []}\r\n0\r\n\r\n'
        await stream.send_all((chunked + body).encode())
        answer = await line.answer()
        assert (answer.status, answer.json["chat"]["title"]) == (201, "é")
        upgrade = door_get(house.socket_path(user), "Host: x", *DOOR_UPGRADE)
        await stream.send_all(upgrade)  # as reverse proxies do
        assert (await line.answer()).status == 101
        peer = DoorPeer(stream, line.data)
        await peer.hear("connected")
        await peer.leave()
    close = await house.raw(door_get("/healthz", "Host: x", "Connection: close"))
    assert door_answer(close)[0].status == 200
    old = await house.raw(door_get("/healthz", version="1.0"))
    assert old.startswith(b"HTTP/1.1 ")


async def test_a_body_over_the_limit_is_refused_before_it_is_read(
    either_house: DoorServer,
) -> None:
    house = either_house
    token = house.token(next(door_users))
    answer = await house.ask("POST", "/api/v1/chats", token, b"x" * 65537)
    assert (answer.status, answer.code) == (413, "too_large")
    lines = ["POST /api/v1/chats HTTP/1.1", "Host: x", f"Authorization: Bearer {token}"]
    declared = [*lines, "Content-Length: 999999999", "", ""]
    got = await house.raw("\r\n".join(declared).encode(), 5)
    assert door_answer(got)[0].code == "too_large"
    chunks = "10000\r\n" + "x" * 65536 + "\r\n1\r\nx\r\n0\r\n\r\n"
    chunked = [*lines, "Transfer-Encoding: chunked", "", chunks]
    got = await house.raw("\r\n".join(chunked).encode(), 5)
    assert door_answer(got)[0].code == "too_large"


async def test_only_named_origins_may_ask_from_another_page(house: DoorServer) -> None:
    ours, theirs = "https://app.example", "https://evil.example"
    async with house.serving("--origin", ours):
        user = next(door_users)
        token = house.token(user)
        answer = await house.ask("GET", "/api/v1/me", token, Origin=ours)
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == ours
        assert "access-control-allow-credentials" not in answer.headers
        assert "origin" in answer.headers["vary"].lower()
        unauthorised = await house.ask("GET", "/api/v1/me", Origin=ours)
        assert unauthorised.status == 401
        assert unauthorised.headers["access-control-allow-origin"] == ours
        asks = {"Access_Control_Request_Method": "POST", "Origin": ours}
        answer = await house.ask("OPTIONS", "/api/v1/chats", **asks)
        assert answer.status == 204
        allowed = answer.headers["access-control-allow-headers"].lower()
        assert {word.strip() for word in allowed.split(",")} == {
            "authorization",
            "content-type",
            "idempotency-key",
        }
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-origin"] == ours
        same = await house.ask("GET", "/api/v1/me", token, Origin="http://chatd.test")
        assert same.status == 200
        proxied = {"Origin": "https://chat.example", "X_Forwarded_Host": "chat.example"}
        assert (await house.ask("GET", "/api/v1/me", token, **proxied)).status == 200
        for origin in (theirs, "null", "http://chatd.test.evil.example", f"{ours}."):
            for target in ("/api/v1/me", "/", "/healthz"):
                answer = await house.ask("GET", target, token, Origin=origin)
                assert (answer.status, answer.code) == (403, "forbidden"), origin
                assert "access-control-allow-origin" not in answer.headers
            refused = await house.refusal(user, f"Origin: {origin}")
            assert (refused.status, refused.code) == (403, "forbidden"), origin
        peer = await house.peer(user, "", f"Origin: {ours}")
        await peer.hears_nothing()
        await house.stop()
        await house.begin(*DOOR_OPEN, "--trusted-proxy", "none")
        token = house.token(user)
        assert (await house.ask("GET", "/api/v1/me", token, **proxied)).status == 403


async def test_the_monitoring_counts_and_is_for_those_who_may(
    house: DoorServer,
) -> None:
    async with house.serving():
        ann, bob = next(door_users), next(door_users)
        stats, metrics = "/api/v1/internal/chat/ws/stats", "/metrics"
        for target in (stats, metrics):
            assert (await house.ask("GET", target)).status == 401
            answer = await house.ask("GET", target, house.token(ann))
            assert (answer.status, answer.code) == (403, "forbidden")
        chat = await house.chat(ann, bob)
        a, b1, b2 = [await house.peer(user) for user in (ann, bob, bob)]
        await a.ask("send_message", chat_id=chat, content="x", client_id="1")
        await a.ask("send_message", chat_id=chat, content="x", client_id="1")
        await b1.hear("new_message")
        await b2.leave()
        assert (await house.refusal("no.such.token")).status == 401
        await a.utter("{")
        await a.hear("error")

        async def counted() -> bool:
            return bool((await house.stats())["connections"]["active"] == 2)

        await door_until(counted)
        got = await house.stats()
        assert got["uptime_seconds"] >= 0
        assert got["version"] == chatd.__version__
        connections = got["connections"]
        assert (connections["users"], connections["total"]) == (2, 3)
        assert connections["closed"] == {"1000": 1}
        assert connections["catching_up"] == 0
        assert sum(connections["refused"].values()) == 1
        assert got["broadcast"]["events"]["new_message"] == 1
        assert got["broadcast"]["deliveries"] >= 3
        assert {"writes", "catch_ups", "stalls"} <= set(got["broadcast"])
        store = got["store"]
        assert (store["messages"], store["duplicates"], store["failed"]) == (1, 1, 0)
        assert store["degraded"] is False
        assert store["sqlite"] == sqlite3.sqlite_version
        assert set(store["commit_seconds"]) == {"p50", "p99", "max"}
        assert {"commits", "batch_max", "wal_bytes"} <= set(store)
        resumes = {"fresh": 3, "live": 0, "replay": 0, "resync": 0}
        assert {**resumes, **got["resumes"]} == resumes
        assert isinstance(got["errors"], dict)
        answer = await house.ask("GET", metrics, house.stats_token)
        assert answer.headers["content-type"].startswith("text/plain")
        families = list(text_string_to_metric_families(answer.body.decode()))
        assert all(
            family.name.startswith(("chatd_", "process_")) for family in families
        )
        values = {s.name: s.value for family in families for s in family.samples}
        assert any("connections" in name and values[name] == 2 for name in values)


async def test_tokens_and_texts_reach_no_log_no_error_and_no_metric(
    house: DoorServer,
) -> None:
    async with house.serving("--log-level", "debug"):
        mark = "Zx9marker"
        user = next(door_users)
        forged = f"Eve {mark}\nlistening on http://forged:1\x1b[2J\u202e"
        token = house.token(user, name=forged)
        ticket = (await house.want(200, "GET /api/v2/ws-token", token))["token"]
        chat = await house.chat(user)
        peer = await house.peer(token)
        for _ in range(2):
            await peer.ask("send_message", chat_id=chat, content=mark, client_id="m")
        await peer.ask("send_message", chat_id=2, content=mark)
        errors = [await peer.ask("auth", token=f"{mark}.{mark}.{mark}")]
        for text in (f'{{"type":"{mark}"', f'{{"type":"{mark}"}}', f"[{mark}]"):
            await peer.utter(text)
            errors.append(await peer.hear("error"))
        long = {"chat_id": chat, "content": [mark]}
        errors.append(await peer.ask("send_message", **long))
        assert mark not in json.dumps(errors[1:3] + errors[4:])
        (await house.peer(ticket)).drop()
        refused = await house.refusal(ticket)
        assert refused.code == "token_used"
        bad = await house.refusal(f"{mark}.{mark}.{mark}")
        assert mark.encode() not in bad.body
        for data in (
            door_get(f"/{mark}?token={token}", "Host: x", "Connection: close"),
            door_get(f"/ws/chat?token={token}&token={mark}", "Host: x", *DOOR_UPGRADE),
            door_get(f"/ws/chat?token={token}", f"Host: \xff{mark}", *DOOR_UPGRADE),
            f"{mark} {token}\r\n\r\n".encode(),
        ):
            answer = await house.raw(data)
            assert mark.encode() not in answer
            assert token.encode() not in answer
        target = f"POST /api/v1/chats/{chat}/messages"
        await house.want(400, target, token, f'{{"content": {mark}'.encode())
        await house.want(409, target, token, {"content": mark * 2, "client_id": "m"})
        seen = json.dumps(await house.stats())
        seen += (await house.ask("GET", "/metrics", house.stats_token)).body.decode()
        peer.drop()
        await house.stop()
        seen += house.output
        parts = (mark, *token.split(".")[1:], *ticket.split(".")[1:])
        assert not [part for part in parts if part in seen.replace(forged[:13], "")]
        assert "\nlistening on http://forged" not in seen
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", house.output)
        assert house.secret.decode() not in seen


# ---- hostile input: one connection's bytes are one connection's matter


@asynccontextmanager
async def door_innocent(house: DoorServer) -> AsyncIterator[None]:
    """Others are served before, during and after."""
    ann, bob = next(door_users), next(door_users)
    chat = await house.chat(ann, bob)
    before = await house.peer(ann)
    yield
    await before.hears_nothing()
    after = await house.peer(bob)
    await after.say("send_message", chat_id=chat, content="still here")
    assert (await before.hear("new_message"))["message"]["content"] == "still here"
    await after.find("ack")
    before.drop()
    after.drop()


def door_hostile_heads(ws: str) -> dict[str, tuple[bytes, set[int]]]:
    """Requests that must be refused, and how; `ws` is a good target for a socket."""
    up = list(DOOR_UPGRADE)
    host, key = "Host: chatd.test", up.pop()
    good = [host, *up, key]
    token = ws.partition("=")[2]
    post = f"Authorization: Bearer {token}"
    noise = random.Random(7).randbytes(5000)
    smuggle = "POST /api/v1/chats HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"
    smuggle += f"{post}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    plain = "POST /api/v1/chats HTTP/1.1\r\nHost: x\r\n"
    xs = [f"X-{i}: y" for i in range(65)]
    return {
        "random bytes": (noise + b"\r\n\r\n", {400, 431}),
        "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", {400}),
        "another protocol": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", {400}),
        "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\n", {400, 505}),
        "no Host": (door_get(ws, *up, key), {400}),
        "two Hosts": (door_get(ws, host, host, *up, key), {400}),
        "byte 255 in Host": (door_get(ws, "Host: \xff", *up, key), {400}),
        "byte 255 in Connection": (door_get(ws, *good, "Connection: \xff"), {400}),
        "byte 255 in Upgrade": (door_get(ws, *good, "Upgrade: \xff"), {400}),
        "byte 255 in the key": (
            door_get(ws, host, *up, "Sec-WebSocket-Key: \xff"),
            {400},
        ),
        "byte 255 in the protocol": (
            door_get(ws, *good, "Sec-WebSocket-Protocol: \xff"),
            {400},
        ),
        "byte 255 in the extensions": (
            door_get(ws, *good, "Sec-WebSocket-Extensions: \xff"),
            {400},
        ),
        "byte 255 in the version": (
            door_get(ws, *good, "Sec-WebSocket-Version: \xff"),
            {400, 426},
        ),
        "byte 255 in the target": (door_get(ws + "\xff", *good), {400}),
        "a bad key": (door_get(ws, host, *up, "Sec-WebSocket-Key: zz"), {400}),
        "a key of 15 bytes": (
            door_get(ws, host, *up, "Sec-WebSocket-Key: MTIzNDU2Nzg5MDEyMzQ1"),
            {400},
        ),
        "two keys": (door_get(ws, *good, key), {400}),
        "no key": (door_get(ws, host, *up), {400}),
        "version 12": (
            door_get(ws, host, *up[:2], "Sec-WebSocket-Version: 12", key),
            {400, 426},
        ),
        "HTTP/1.0": (door_get(ws, *good, version="1.0"), {400, 426, 505}),
        "two tokens": (door_get(f"{ws}&token={token}", *good), {400, 401}),
        "no token": (door_get("/ws/chat", *good), {401}),
        "an empty token": (door_get("/ws/chat?token=", *good), {401}),
        "two slashes": (door_get("/" + ws, *good), {400, 404}),
        "two slashes and a bracket": (door_get("//[::1" + ws, *good), {400, 404}),
        "a whole URL": (door_get("http://chatd.test" + ws, *good), {400, 404}),
        "no slash": (door_get("*", *good), {400, 404}),
        "an upgrade with a body": (
            door_get(ws, *good, "Content-Length: 5") + b"hello",
            {400},
        ),
        "an upgrade with a length beside chunks": (
            door_get(ws, *good, "Content-Length: 4", "Transfer-Encoding: chunked"),
            {400},
        ),
        "length beside chunks": (smuggle.encode(), {400}),
        "two lengths": (
            f"{plain}Content-Length: 1\r\nContent-Length: 2\r\n\r\n".encode(),
            {400},
        ),
        "a length below nothing": (
            f"{plain}Content-Length: -1\r\n\r\n".encode(),
            {400},
        ),
        "a bad chunk": (
            f"{plain}{post}\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
            {400},
        ),
        "another coding": (
            f"{plain}{post}\r\nTransfer-Encoding: gzip\r\n\r\n".encode(),
            {400, 501},
        ),
        "a huge header": (door_get(ws, *good, "X: " + "y" * 100_000), {431}),
        "a huge target": (door_get(ws + "&x=" + "y" * 100_000, *good), {414, 431}),
        "65 header lines": (door_get(ws, *good, *xs[: 65 - len(good)]), {431}),
        "a space before the colon": (door_get(ws, *good, "X : y"), {400}),
        "a bare CR": (door_get(ws, *good, "X: y\rz"), {400}),
        "a NUL": (door_get(ws, *good, "X: y\0z"), {400}),
    }


@pytest.mark.parametrize("case", list(door_hostile_heads("")))
async def test_a_hostile_request_is_refused_and_hurts_nobody(
    either_house: DoorServer, case: str
) -> None:
    async with door_innocent(either_house):
        ws = either_house.socket_path(next(door_users))
        data, statuses = door_hostile_heads(ws)[case]
        got = await either_house.raw(data, 4)
        answer, rest = door_answer(got)
        assert answer.status in statuses, answer
        assert answer.headers["connection"].lower() == "close"
        assert answer.code
        assert not rest


async def test_64_header_lines_are_few_enough(open_house: DoorServer) -> None:
    more = [f"X-{i}: y" for i in range(64 - 1 - len(DOOR_UPGRADE))]
    peer = await open_house.peer(next(door_users), "", *more)
    await peer.hears_nothing()


def door_hostile_frames() -> dict[str, tuple[bytes, set[int]]]:
    """What must end a connection, and with which close code."""
    text, more = 1, 0
    ping = door_frame(9, b"p")
    part = door_frame(text, b"{", first=0)
    return {
        "an unmasked frame": (door_frame(text, b"{}", masked=False), {1002}),
        "reserved opcode 3": (door_frame(3), {1002}),
        "reserved opcode 11": (door_frame(11), {1002}),
        "a reserved bit": (door_frame(text, b"{}", first=0xC0), {1002}),
        "a ping in two": (door_frame(9, b"", first=0), {1002}),
        "a ping of 126 bytes": (door_frame(9, b"x" * 126), {1002}),
        "a continuation of nothing": (door_frame(more, b"x"), {1002}),
        "a message inside a message": (part + door_frame(text, b"{}"), {1002}),
        "a close of one byte": (door_frame(8, b"\x03"), {1002}),
        "a close with code 1005": (door_frame(8, b"\x03\xed"), {1002}),
        "a close with code 999": (door_frame(8, b"\x03\xe7"), {1002}),
        "a close with bad UTF-8": (door_frame(8, b"\x03\xe8\xff"), {1007}),
        "bad UTF-8": (door_frame(text, b'{"type":"\xff"}'), {1007}),
        "a surrogate in UTF-8": (door_frame(text, b"\xed\xa0\x80"), {1007}),
        "UTF-8 cut short": (door_frame(text, b'"\xf0\x9f\x98'), {1007}),
        "bad UTF-8 in a part": (part + door_frame(more, b"\xff", first=0), {1007}),
        "one byte too many": (door_frame(text, b"x" * 65537), {1009}),
        "too many bytes in parts": (
            part + door_frame(more, b"x" * 40000, first=0) * 2,
            {1009},
        ),
        "too many bytes, then a ping": (door_frame(text, b"x" * 65537) + ping, {1009}),
        "too many bytes, twice": (door_frame(text, b"x" * 65537) * 2, {1009}),
        "a length of 2**40": (
            b"\x81\xff" + (2**40).to_bytes(8, "big") + bytes(70_000),
            {1009},
        ),
        "a length of 2**63": (b"\x81\xff" + (2**63).to_bytes(8, "big"), {1002, 1009}),
        "a length longer than it need be": (b"\x81\xfe\x00\x01\0\0\0\0x", {1002}),
        "65 parts": (part + door_frame(more, b"", first=0) * 64, {1002, 1008, 1009}),
        "many empty parts": (
            part + door_frame(more, b"", first=0) * 100_000,
            {1002, 1008, 1009},
        ),
        "two closes and a ping": (door_frame(8, b"\x03\xe8") * 2 + ping, {1000}),
        "a close without a code": (door_frame(8), {1000, 1005}),
    }


@pytest.mark.parametrize("case", list(door_hostile_frames()))
async def test_a_hostile_frame_is_answered_with_its_code_and_hurts_nobody(
    either_house: DoorServer, case: str
) -> None:
    async with door_innocent(either_house):
        data, codes = door_hostile_frames()[case]
        peer = await either_house.peer(next(door_users))
        with suppress(trio.BrokenResourceError), trio.fail_after(DOOR_SECONDS):
            await peer.stream.send_all(data)
        assert await peer.ended(5) in codes
        await door_rest(peer.stream, 3)  # and TCP goes too


async def test_64_parts_are_few_enough(either_house: DoorServer) -> None:
    peer = await either_house.peer(next(door_users))
    parts = [door_frame(0, b" ", first=0)] * 62
    message = door_frame(1, b'{"type":', first=0), *parts, door_frame(0, b'"ping"}')
    await peer.stream.send_all(b"".join(message))
    await peer.hear("pong")
    await peer.stream.send_all(door_frame(9, b"between"))
    await peer.hears_nothing()
    assert peer.pongs == [b"between"]


async def test_those_who_hang_up_rudely_hurt_nobody(either_house: DoorServer) -> None:
    house = either_house
    user = next(door_users)
    whole = door_get(house.socket_path(user), "Host: x", *DOOR_UPGRADE)
    say = door_frame(1, b'{"type":"ping"}')
    rude = [b"", b"\x00\xff\r\n\r\n", b"GET", whole[:40], whole[:-2], whole]
    rude += [whole + say, whole + say[:5], whole + door_frame(8), whole + b"\xff" * 99]
    rude += [door_get("/healthz", "Host: x"), door_get("/x") + b"y" * 1000]
    async with door_innocent(house):
        for data in rude * 3:
            for reset in (True, False):
                stream = await house.dial()
                if data:
                    await stream.send_all(data)
                if reset:
                    door_reset(stream)
                else:
                    await stream.aclose()
        stream = await house.dial()
        await stream.send_all(whole + say)  # a client that does not wait for 101
        got = b""
        with trio.fail_after(DOOR_SECONDS):
            while b'"pong"' not in got:
                got += await stream.receive_some(65536)


async def test_noise_after_the_handshake_hurts_nobody(either_house: DoorServer) -> None:
    house, dice = either_house, random.Random(11)
    async with door_innocent(house), trio.open_nursery() as nursery:

        async def noisy(seed: int) -> None:
            peer = await house.peer(next(door_users))
            noise = random.Random(seed)
            with suppress(trio.BrokenResourceError):
                for _ in range(20):
                    first = noise.choice([0, 0x80, 0x80, 0x80, noise.randrange(256)])
                    data = noise.randbytes(noise.choice([0, 5, 125, 126, 3000]))
                    frame = door_frame(noise.randrange(16), data, first=first & 0xF0)
                    await peer.stream.send_all(frame[: noise.choice([3, 9999])])
            peer.drop()

        for _ in range(40):
            nursery.start_soon(noisy, dice.randrange(2**32))


async def test_those_who_are_refused_leave_nothing_behind(house: DoorServer) -> None:
    async with house.serving():
        await house.want(200, "GET /api/v1/me", house.token(1))
        before = house.descriptors
        for user in itertools.islice(door_users, 30):
            await house.refusal("bad")  # it keeps its end open; the server does not
            assert await house.raw(b"\xff\r\n\r\n")
            peer = await house.peer(user)
            await peer.utter(b"\xff")
            await peer.ended()

        def gone() -> bool:
            return house.descriptors <= before + 1

        await door_until(gone, 5)


async def test_a_wrong_command_is_told_so_and_its_connection_stays(
    either_house: DoorServer,
) -> None:
    house = either_house
    user = next(door_users)
    chat = await house.chat(user)
    peer = await house.peer(user)
    ids: list[object] = ["3", 1.5, True, None, [], {}, 0, -1, 2**53, 2**64, 10**400]
    texts: list[object] = [3, None, True, [], {}]
    keys: list[object] = [3, True, [], {}, "", "x" * 65, "é", "a\nb", "\x7f"]
    contents = [*texts, "x" * 4001, "a\0b", "\x1b"]
    bools: list[object] = [1, 0, "true", None, [], {}]
    send = {"chat_id": chat, "content": "c", "client_id": "k"}
    missing = object()
    table: list[tuple[str, dict[str, object], str, list[object]]] = [
        ("typing", {"chat_id": chat, "is_typing": True}, "chat_id", [*ids, missing]),
        (
            "typing",
            {"chat_id": chat, "is_typing": True},
            "is_typing",
            [*bools, missing],
        ),
        ("mark_read", {"message_id": 1}, "message_id", [*ids, missing]),
        ("send_message", dict(send), "chat_id", [*ids, missing]),
        ("send_message", dict(send), "content", [*contents, missing]),
        ("send_message", dict(send), "client_id", keys),
        ("auth", {"token": "t"}, "token", [*texts, missing]),
    ]
    for kind, fields, name, values in table:
        for value in values:
            wrong = {"ref": "r1", **fields, name: value}
            if value is missing:
                del wrong[name]
            await peer.say(kind, **wrong)
            error = await peer.hear("error")
            seen = (kind, str(wrong)[:200], error)
            assert error["code"] == "bad_field", seen
            assert name in error["message"], seen
            assert error["ref"] == "r1", seen
    refs: list[object] = [3, True, [], {}]
    for ref in (*refs, "x" * 65):
        await peer.say("ping", ref=ref)
        error = await peer.hear("error")
        assert error["code"] == "bad_field", (ref, error)
        assert "ref" in error["message"], (ref, error)
    await peer.say("ping", ref="x" * 64, unknown={"fields": ["are", "ignored"]})
    assert (await peer.hear("pong"))["ref"] == "x" * 64
    for kind in ("nothing", "", "PING", "connected", "new_message"):
        await peer.say(kind, ref="r2")
        error = await peer.hear("error")
        assert error["code"] == "unknown_type", (kind, error)
        assert error["ref"] == "r2"
    for kind in ("{}", '{"type": 3}', '{"type": null}', '{"chat_id": 3}'):
        await peer.utter(kind)
        assert (await peer.hear("error"))["code"] in {"unknown_type", "bad_field"}, kind
    say = '{"type":"send_message","chat_id":%s,"content":%s}'
    bad = ["", " ", "{", "}", "[]", "3", '"ping"', "null", "true", '{"type":"ping"}}']
    bad += ["[" * 30000, '{"type":"ping","x":' + "[" * 30000, "NaN", '{"type":"ping"']
    bad += [say % ("NaN", '"c"'), say % ("-Infinity", '"c"'), "{'type':'ping'}"]
    bad += [say % (chat, '"' + "a\nb" + '"')]
    for text in bad:
        await peer.utter(text)
        error = await peer.hear("error")
        assert error["code"] == "bad_json", (text[:60], error)
    for text in (say % ("1e999", '"c"'), say % (chat, r'"\ud800"')):
        await peer.utter(text)
        error = await peer.hear("error")
        assert error["code"] in {"bad_json", "bad_field"}, (text, error)
    await peer.utter(b'{"type":"ping"}', opcode=2)
    assert (await peer.hear("error"))["code"] == "bad_json"
    await peer.hears_nothing()
    assert await house.history(chat, user) == []
    await peer.ask("send_message", chat_id=chat, content="x" * 4000)


# ---- identity


def door_forged(house: DoorServer, user: int) -> dict[str, tuple[str, str]]:
    """Tokens that must be refused, and the code."""
    now = int(time.time())
    good = house.token(user)
    head, body, mark = good.split(".")
    admin = house.token(user, scope="service").split(".")[1]
    claims = {"sub": str(user), "iat": now, "exp": now + 3600}
    unsigned = jwt.encode(claims, "", algorithm="none")
    invalid = {
        "not a token": "abc",
        "three dots": "a.b.c",
        "alg none": unsigned,
        "alg none, our mark": f"{unsigned.split('.')[0]}.{body}.{mark}",
        "another body": f"{head}.{admin}.{mark}",
        "no mark": f"{head}.{body}.",
        "another key": house.token(user, key=b"k" * 32),
        "another algorithm": jwt.encode(claims, house.secret * 2, algorithm="HS512"),
        "a critical header": jwt.encode(claims, house.secret, headers={"crit": ["x"]}),
        "no exp": house.token(user, exp=None),
        "exp is text": house.token(user, exp="soon"),
        "not yet": house.token(user, nbf=now + 60),
        "issued in the future": house.token(user, iat=now + 60),
        "nobody": house.token(),
        "sub is a name": house.token(sub="six"),
        "sub is a float": house.token(sub=6.5),
        "sub is true": house.token(sub=True),
        "user_id is true": house.token(user_id=True),
        "user_id is a float": house.token(user_id=6.5),
        "user_id is 0": house.token(user_id=0),
        "user_id is negative": house.token(user_id=-6),
        "user_id is too large": house.token(user_id=2**53),
        "sub is too large": house.token(sub=str(2**53)),
        "sub is much too large": house.token(sub="9" * 1000),
        "over 4 KiB": house.token(user, x="x" * 4096),
        "a sign-in link's": house.token(user, use="signin"),
    }
    codes = {name: (token, "token_invalid") for name, token in invalid.items()}
    codes["expired"] = (house.token(user, exp=now - 8), "token_expired")
    codes["expired long ago"] = (house.token(user, exp=1), "token_expired")
    return codes


async def test_a_forged_token_opens_nothing(open_house: DoorServer) -> None:
    house = open_house
    user = next(door_users)
    async with await house.dial() as stream:
        line = DoorLine(stream)
        for name, (token, code) in door_forged(house, user).items():
            answer = await line.ask("GET", "/api/v1/me", token)
            assert (answer.status, answer.code) == (401, code), (name, answer)
            refused = await house.refusal(token)
            assert (refused.status, refused.code) == (401, code), (name, refused)
        for lines in ({}, {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer"}):
            answer = await line.ask("GET", "/api/v1/me", **lines)
            assert (answer.status, answer.code) == (401, "token_invalid"), lines
        target = f"/api/v1/me?token={house.token(user)}"  # the query is the socket's
        assert (await line.ask("GET", target)).status == 401
        now = int(time.time())
        for claims in (
            {"sub": user},  # PyJWT itself would refuse an integer
            {"sub": str(user)},
            {"user_id": user},
            {"user_id": user, "sub": "somebody"},
            {"user_id": user, "aud": "anyone"},
            {"user_id": user, "exp": now - 2},  # within the leeway
            {"user_id": user, "iat": None},
        ):
            answer = await line.ask("GET", "/api/v1/me", house.token(**claims))
            assert answer.json["user_id"] == user, (claims, answer)


async def test_a_ticket_works_once_in_one_process_and_for_the_socket_only(
    house: DoorServer,
) -> None:
    async with house.serving():
        user = next(door_users)
        short = house.token(user, exp=int(time.time()) + 300)

        async def ticket() -> str:
            got = await house.want(200, "GET /api/v2/ws-token", short)
            return str(got["token"])

        one = await ticket()
        bad = door_get(house.socket_path(one), "Host: x", *DOOR_UPGRADE[:3])
        assert isinstance(await house.knock(bad), HttpAnswer)
        refused = await house.refusal(one, "Origin: http://elsewhere")
        assert refused.status == 403
        peer = await house.peer(one)  # those two have not spent it
        assert 290 < peer.hello["expires_in"] <= 300  # until the asking token's end
        refused = await house.refusal(one)
        assert (refused.status, refused.code) == (401, "token_used")
        spent = await peer.ask("auth", token=one)
        assert spent["code"] == "token_used"
        two = await ticket()
        for method, target in (
            ("GET", "/api/v1/me"),
            ("GET", "/api/v2/ws-token"),
            ("POST", "/api/v1/session"),
        ):
            answer = await house.ask(method, target, two)
            assert (answer.status, answer.code) == (401, "token_invalid"), target
        assert (await peer.ask("auth", token=two))["type"] == "ack"
        assert (await house.refusal(two)).code == "token_used"
        three = await ticket()
        await house.stop()
        await house.begin()
        refused = await house.refusal(three)
        assert (refused.status, refused.code) == (401, "token_used")
        plain = [await house.peer(short) for _ in range(2)]  # a JWT is no ticket
        assert len(plain) == 2


async def test_a_bad_auth_changes_nothing_and_nobody_becomes_another(
    either_house: DoorServer,
) -> None:
    house = either_house
    ann, eve = next(door_users), next(door_users)
    chat = await house.chat(ann)
    peer = await house.peer(ann)
    forged = door_forged(house, ann).values()
    for token, code in [*forged, *door_forged(house, eve).values()]:
        answer = await peer.ask("auth", token=token)
        assert (answer["type"], answer["code"]) == ("error", code), answer
    ack = await peer.ask("send_message", chat_id=chat, content="still me")
    assert ack["type"] == "ack"
    assert (await house.history(chat, ann))[0]["sender_id"] == ann
    ack = await peer.ask("auth", token=house.token(ann, exp=int(time.time()) + 100))
    assert 95 < ack["expires_in"] <= 100
    ticket = await house.want(200, "GET /api/v2/ws-token", house.token(eve))
    for token in (house.token(eve), str(ticket["token"])):
        peer = await house.peer(ann)
        await peer.say("auth", token=token)
        await peer.say("send_message", chat_id=chat, content="who am I?")
        assert await peer.ended() == 4503
    assert len(await house.history(chat, ann)) == 1


async def test_a_sign_in_link_is_good_for_a_session_and_for_nothing_else(
    either_house: DoorServer,
) -> None:
    house = either_house
    user = next(door_users)
    base = f"http://127.0.0.1:{house.port}"
    words = ("token", user, "--db", house.db, "--name", "Zoë", "--link", base)
    run = await door_run(*words)
    assert run.status == 0, run
    match = re.fullmatch(re.escape(base) + r"/#token=(\S+)\n", run.out)
    assert match, run
    link = match[1]
    claims = jwt.decode(link, options={"verify_signature": False})
    assert claims["use"] == "signin"
    assert 86000 < claims["exp"] - time.time() < 87000
    for target in ("/api/v1/me", "/api/v2/ws-token", "/api/v1/chats"):
        assert (await house.ask("GET", target, link)).status == 401, target
    assert (await house.refusal(link)).status == 401
    session = await house.want(200, "POST /api/v1/session", link)
    assert (session["user_id"], session["name"]) == (user, "Zoë")
    assert session["expires_in"] > 0
    me = await house.want(200, "GET /api/v1/me", session["token"])
    assert me == {"user_id": user, "name": "Zoë"}
    assert (await house.peer(session["token"])).hello["user_id"] == user
    await house.want(401, "POST /api/v1/session", session["token"])
    await house.want(401, "POST /api/v1/session", house.token(user))


async def test_the_applications_own_keys_are_trusted_but_not_their_scopes(
    house: DoorServer, tmp_path: Path
) -> None:
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pairs: dict[str, Any] = {
        "RS256": rsa_key,
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    }
    flags, publics = [], []
    for name, pair in pairs.items():
        pem = pair.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        path = tmp_path / f"{name}.pem"
        path.write_bytes(pem)
        publics.append(pem)
        flags += ["--jwt-key", str(path)]
    shared = tmp_path / "shared"
    shared.write_text("an application's secret of 32 bytes or more\n", "ascii")
    shared.chmod(0o600)
    async with house.serving(*flags, "--jwt-key", str(shared)):
        user, now = next(door_users), int(time.time())
        claims = {"sub": str(user), "iat": now, "exp": now + 60}
        all_scopes = {**claims, "scope": "service stats"}

        def signed(content: dict[str, object]) -> list[str]:
            tokens = [jwt.encode(content, k, algorithm=a) for a, k in pairs.items()]
            key = shared.read_bytes().strip()
            return [*tokens, jwt.encode(content, key, algorithm="HS256")]

        for token in signed(dict(claims)):
            assert (await house.ask("GET", "/api/v1/me", token)).json["user_id"] == user
            (await house.peer(token)).drop()
        for token in signed(dict(all_scopes)):
            stats = await house.ask("GET", "/api/v1/internal/chat/ws/stats", token)
            assert (stats.status, stats.code) == (403, "forbidden")
            who = {"user_id": user}
            revoke = "/api/v1/internal/chat/revoke"
            answer = await house.ask("POST", revoke, token, who)
            assert (answer.status, answer.code) == (403, "forbidden")
        for kind in ("signin", "ticket"):  # those are chatd's own to sign
            for token in signed({**claims, "use": kind, "jti": "1", "boot": "x"}):
                answer = await house.ask("POST", "/api/v1/session", token)
                assert answer.status == 401, kind
        for pem in (p for public in publics for p in (public, public.strip())):

            def b64(data: bytes) -> bytes:
                return base64.urlsafe_b64encode(data).rstrip(b"=")

            head = b64(b'{"alg":"HS256","typ":"JWT"}')  # the public key as a secret
            signing = head + b"." + b64(json.dumps(claims).encode())
            mark = b64(hmac.new(pem, signing, hashlib.sha256).digest())
            answer = await house.ask(
                "GET", "/api/v1/me", (signing + b"." + mark).decode()
            )
            assert (answer.status, answer.code) == (401, "token_invalid")
        strange = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        token = jwt.encode(claims, strange, algorithm="RS256")
        assert (await house.ask("GET", "/api/v1/me", token)).status == 401
        pss = jwt.encode(claims, rsa_key, algorithm="PS256")
        assert (await house.ask("GET", "/api/v1/me", pss)).status == 401


async def test_issuer_and_audience_are_checked_when_given(
    house: DoorServer, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.write_text("k" * 32, "ascii")
    shared.chmod(0o600)
    flags = ("--issuer", "the-app", "--audience", "chat", "--jwt-key", str(shared))
    async with house.serving(*flags):
        user = next(door_users)
        both: dict[str, object] = {"iss": "the-app", "aud": "chat"}
        changes: list[tuple[dict[str, object], int]] = [
            ({}, 200),
            ({"aud": ["x", "chat"]}, 200),
            ({"iss": "other"}, 401),
            ({"iss": None}, 401),
            ({"aud": "other"}, 401),
            ({"aud": None}, 401),
        ]
        for change, status in changes:
            token = house.token(user, key="k" * 32, **{**both, **change})
            answer = await house.ask("GET", "/api/v1/me", token)
            assert answer.status == status, change
        token = house.token(user, key="k" * 32, **both)
        ticket = await house.want(200, "GET /api/v2/ws-token", token)
        await house.peer(str(ticket["token"]))  # chatd's own need neither
        link = await door_run("token", user, "--db", house.db, "--link", "http://x")
        words = link.out.partition("token=")[2].strip()
        session = await house.want(200, "POST /api/v1/session", words)
        await house.want(200, "GET /api/v1/me", session["token"])


async def test_who_is_revoked_is_out_and_his_tokens_with_him(house: DoorServer) -> None:
    async with house.serving():
        ann, bob = next(door_users), next(door_users)
        token, revoke = house.token(ann), "POST /api/v1/internal/chat/revoke"
        got = await house.want(200, "GET /api/v2/ws-token", token)
        ticket = str(got["token"])
        tabs, other = [await house.peer(token) for _ in range(3)], await house.peer(bob)
        await house.want(403, revoke, house.token(bob), {"user_id": ann})
        assert await house.want(200, revoke, house.service, {"user_id": ann}) == {
            "user_id": ann,
            "closed": 3,
        }
        revoked_at = int(time.time())
        assert [await tab.ended() for tab in tabs] == [4503] * 3
        await other.hears_nothing()
        no_iat = house.token(ann, iat=None)

        async def all_refused() -> None:
            for old in (token, no_iat, ticket):
                refused = await house.refusal(old)
                assert (refused.status, refused.code[:6]) == (401, "token_"), refused
            for old in (token, no_iat):
                assert (await house.ask("GET", "/api/v1/me", old)).status == 401

        await all_refused()
        await house.kill()  # it is in the database, not in memory
        await house.begin()
        await all_refused()

        async def signed_in_again() -> bool:
            later = house.token(ann, iat=revoked_at + 7)  # tokens from now on, +-5 s
            return (await house.ask("GET", "/api/v1/me", later)).status == 200

        await door_until(signed_in_again)
        (await house.peer(house.token(ann, iat=revoked_at + 7))).drop()
        await all_refused()


async def test_a_close_code_reaches_those_who_keep_talking(house: DoorServer) -> None:
    """RST would overtake it: the server reads on while it says goodbye."""
    codes: list[int] = []
    talk = door_frame(10, b"p" * 125) * 50 + door_frame(9, b"p")

    async def chatter(peer: DoorPeer) -> None:
        with suppress(trio.BrokenResourceError):
            while True:
                await peer.stream.send_all(talk)

    async def listen(peer: DoorPeer) -> None:
        async with trio.open_nursery() as talking:
            talking.start_soon(chatter, peer)
            codes.append(await peer.ended())
            assert await peer.stream.receive_some(1) == b"", "RST instead of an end"
            talking.cancel_scope.cancel()

    async with house.serving("--receive-bytes", "65536/65536"):
        user = next(door_users)
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                peer = await house.peer(user)
                nursery.start_soon(listen, peer)
            target, body = "POST /api/v1/internal/chat/revoke", {"user_id": user}
            revoked = await house.want(200, target, house.service, body)
            assert revoked["closed"] == 10
        assert codes == [4503] * 10


async def test_the_operator_may_keep_chats_to_the_service(house: DoorServer) -> None:
    async with house.serving("--chats-by", "service"):
        ann, bob = next(door_users), next(door_users)
        token, body = house.token(ann), {"title": "t", "member_ids": [bob]}
        answer = await house.ask("POST", "/api/v1/chats", token, body)
        assert (answer.status, answer.code) == (403, "forbidden")
        chat = await house.chat(ann)
        target, who = f"/api/v1/chats/{chat}/members", {"user_id": bob}
        assert (await house.ask("POST", target, token, who)).status == 403
        assert (await house.ask("GET", "/api/v1/users", token)).status in {403, 404}
        await house.want(201, f"POST {target}", house.service, who)


# ---- limits, each at its edge


async def test_sends_are_limited_per_user_and_repeats_are_free(
    house: DoorServer,
) -> None:
    async with house.serving("--sends", "2/2"):
        ann, bob = next(door_users), next(door_users)
        chat = await house.chat(ann, bob)
        peers = [await house.peer(ann), await house.peer(ann)]
        say = {"chat_id": chat, "content": "x"}
        for number, peer in enumerate(peers):
            ack = await peer.ask("send_message", client_id=f"{number}", **say)
            assert ack["type"] == "ack"
        over = await peers[0].ask("send_message", client_id="2", **say)
        assert over["code"] == "rate_limited"
        assert 0 < over["retry_after"] <= 0.6
        again = await peers[1].ask("send_message", client_id="0", **say)
        assert again["duplicate"] is True  # known, so it is told, bucket or not
        body = {"content": "x", "client_id": "3"}
        target = f"/api/v1/chats/{chat}/messages"
        by_http = await house.ask("POST", target, house.token(ann), body)
        assert (by_http.status, by_http.code) == (429, "rate_limited")
        assert 0 < by_http.json["error"]["retry_after"] <= 0.6
        assert int(by_http.headers["retry-after"]) == 1
        for number in range(5):  # the service is outside of users' rates
            await house.post(chat, ann, f"{number}")
        his = await house.peer(bob)
        assert (await his.ask("send_message", **say))["type"] == "ack"
        await trio.sleep(over["retry_after"])
        ack = await peers[0].ask("send_message", client_id="2", **say)
        assert ack["duplicate"] is False


async def test_many_repeats_at_once_are_all_told_however_empty_the_bucket(
    house: DoorServer,
) -> None:
    async with house.serving("--sends", "0.01/70"):
        user = next(door_users)
        chat, peer = await house.chat(user), await house.peer(user)
        keys = [*(str(number) for number in range(70)), *["0"] * 200]
        say = {"type": "send_message", "chat_id": chat, "content": "x"}
        texts = [json.dumps({**say, "client_id": key}).encode() for key in keys]
        await peer.stream.send_all(b"".join(door_frame(1, text) for text in texts))
        acks = [await peer.find("ack") for _ in keys]
        assert sorted(ack["client_id"] for ack in acks) == sorted(keys)
        new = [ack["client_id"] for ack in acks if not ack["duplicate"]]
        assert new == keys[:70]
        assert len({ack["message_id"] for ack in acks if ack["client_id"] == "0"}) == 1
        await peer.hears_nothing()


async def test_commands_are_limited_per_connection_and_then_it_is_closed(
    house: DoorServer,
) -> None:
    async with house.serving("--commands", "0.1/5"):
        user = next(door_users)
        peer, other = await house.peer(user), await house.peer(user)
        for _ in range(5):
            await peer.hears_nothing()
        for number in range(100):
            await peer.say("ping", ref=str(number))
            error = await peer.hear("error")
            assert error["code"] == "rate_limited"
            assert error["ref"] == str(number)
            assert error["retry_after"] > 0
        await peer.say("ping")
        assert await peer.ended() == 4008
        await other.hears_nothing()


async def test_typing_over_its_rate_is_dropped(house: DoorServer) -> None:
    async with house.serving("--typing", "0.1/2"):
        ann, bob = next(door_users), next(door_users)
        chats = [await house.chat(ann, bob), await house.chat(ann, bob)]
        a, b = await house.peer(ann), await house.peer(bob)
        for _ in range(5):
            for chat in chats:
                await a.say("typing", chat_id=chat, is_typing=True)
        await a.hears_nothing()
        for chat in chats * 2:
            assert (await b.hear("typing"))["chat_id"] == chat
        await b.hears_nothing()


async def test_requests_are_limited_per_user(house: DoorServer) -> None:
    async with house.serving("--requests", "0.1/3"):
        ann, bob = next(door_users), next(door_users)
        for _ in range(3):
            await house.want(200, "GET /api/v1/me", house.token(ann))
        over = await house.ask("GET", "/api/v1/me", house.token(ann))
        assert (over.status, over.code) == (429, "rate_limited")
        assert 1 <= int(over.headers["retry-after"]) <= 11
        await house.want(200, "GET /api/v1/me", house.token(bob))
        for _ in range(5):
            await house.chat(ann)  # the service again
        await house.want(200, "GET /healthz")


async def test_handshakes_are_limited_per_address_and_so_are_guesses(
    house: DoorServer,
) -> None:
    async with house.serving("--handshakes", "0.01/3"):
        user = next(door_users)

        async def status(address: str, token: str = "") -> int:
            line = f"X-Forwarded-For: {address}"
            head = (door_get(house.socket_path(token or user), "Host: x", line))[:-2]
            upgrade = "\r\n".join((*DOOR_UPGRADE, "", "")).encode()
            got = await house.knock(head + upgrade)
            if isinstance(got, DoorPeer):
                got.drop()
                return 101
            if got.status == 429:
                assert got.code == "rate_limited"
                assert int(got.headers["retry-after"]) >= 1
            return got.status

        ok = [101, 101, 101, 429]
        assert [await status("203.0.113.1") for _ in range(4)] == ok
        assert [await status("8.8.8.8, 203.0.113.2") for _ in range(4)] == ok
        assert await status("203.0.113.1, 127.0.0.1") == 429  # a trusted hop
        assert await status("8.8.8.8") == 101  # the forged one was not counted
        guesses = [await status("203.0.113.3", "bad") for _ in range(4)]
        assert guesses == [401, 401, 401, 429]
        ipv6 = [f"2001:db8::{i}" for i in range(1, 4)]
        assert [await status(address) for address in [*ipv6, "2001:db8::9"]] == ok
        assert await status("2001:db8:0:1::1") == 101  # another /64
        wrong = [("203.0.113.4", "bad")] * 3
        for address, token in wrong:
            header = {"X_Forwarded_For": address}
            assert (await house.ask("GET", "/api/v1/me", token, **header)).status == 401
        header = {"X_Forwarded_For": "203.0.113.4"}
        over = await house.ask("GET", "/api/v1/me", "bad", **header)
        assert over.status == 429
        own = ["nonsense", "203.0.113.5, nonsense", "999.1.1.1", "also bad"]
        assert [await status(address) for address in own] == ok  # all one: the peer
        await house.stop()
        await house.begin(*house.flags, "--trusted-proxy", "none")
        believed = [await status(f"203.0.113.{i}") for i in range(4)]
        assert believed == ok


async def test_reading_waits_when_bytes_come_too_fast(house: DoorServer) -> None:
    async with house.serving("--receive-bytes", "20000/20000"):
        fast, calm = [await house.peer(next(door_users)) for _ in range(2)]
        began = trio.current_time()
        for _ in range(5):
            await fast.say("ping", padding="x" * 10000)
        await calm.hears_nothing()
        assert trio.current_time() - began < 1
        for _ in range(5):
            await fast.hear("pong")
        assert 1 < trio.current_time() - began < 5


async def test_a_full_house_says_so_at_once(house: DoorServer) -> None:
    async with house.serving("--max-connections", "1"):
        user = next(door_users)
        peer = await house.peer(user)
        began = trio.current_time()
        full = await house.refusal(next(door_users))
        assert (full.status, full.code) == (503, "overloaded")
        assert int(full.headers["retry-after"]) >= 1
        assert trio.current_time() - began < 2
        await peer.hears_nothing()
        await peer.leave()

        async def room() -> bool:
            got = await house.knock(
                door_get(house.socket_path(user), "Host: x", *DOOR_UPGRADE)
            )
            return isinstance(got, DoorPeer)

        await door_until(room)


async def test_the_first_reason_to_refuse_is_the_one_that_is_told(
    house: DoorServer,
) -> None:
    async with house.serving("--max-connections", "1", "--handshakes", "0.01/4"):
        user, evil = next(door_users), "Origin: http://evil.example"
        await house.peer(user)
        assert (await house.refusal("bad", evil)).status == 403
        assert (await house.refusal("bad")).status == 401
        assert (await house.refusal(user)).status == 503
        assert (await house.refusal("bad", evil)).status == 429


async def test_silent_connections_do_not_fill_the_house(house: DoorServer) -> None:
    async with house.serving("--max-connections", "2"):
        user = next(door_users)
        half = door_get("/healthz", "Host: x")[:-2]
        for number in range(300):
            stream = await house.dial()
            if number % 2:
                await stream.send_all(half)
        peer = await house.peer(user)
        await peer.hears_nothing()
        await house.want(200, "GET /healthz")
        await peer.leave()


async def test_a_user_has_so_many_connections_and_no_more(house: DoorServer) -> None:
    async with house.serving("--connections-per-user", "2"):
        ann, bob = next(door_users), next(door_users)
        peers = [await house.peer(ann) for _ in range(2)]
        head = door_get(house.socket_path(ann), "Host: x", *DOOR_UPGRADE)
        third = await house.knock(head)
        assert isinstance(third, DoorPeer)
        with pytest.raises(DoorGone) as gone:  # the first thing it hears
            await third.hear()
        assert gone.value.code == 4504
        for peer in peers:
            await peer.hears_nothing()
        (await house.peer(bob)).drop()
        await peers.pop().leave()

        async def room() -> bool:
            got = await house.knock(head)
            assert isinstance(got, DoorPeer)
            with suppress(DoorGone):
                return bool((await got.hear())["type"] == "connected")
            return False

        await door_until(room)


async def test_sizes_are_limited_in_bytes_and_in_characters(house: DoorServer) -> None:
    flags = ("--max-message-bytes", "1000", "--max-content-chars", "10")
    async with house.serving(*flags):
        user = next(door_users)
        chat, peer = await house.chat(user), await house.peer(user)
        edge = await peer.ask("send_message", chat_id=chat, content="🙂" * 10)
        assert edge["type"] == "ack"
        over = await peer.ask("send_message", chat_id=chat, content="🙂" * 11)
        assert over["code"] == "bad_field"
        assert "content" in over["message"]
        target = f"/api/v1/chats/{chat}/messages"
        token, body = house.token(user), b'{"content":"c"}'
        answer = await house.ask("POST", target, token, {"content": "x" * 11})
        assert (answer.status, answer.code) == (400, "bad_field")
        await house.want(201, f"POST {target}", token, body.ljust(1000))
        await peer.hear("new_message")
        answer = await house.ask("POST", target, token, body.ljust(1001))
        assert (answer.status, answer.code) == (413, "too_large")
        await peer.utter('{"type":"ping"}'.ljust(1000))
        await peer.hear("pong")
        umlauts = '{"type":"ping","x":"' + "é" * 489 + '"}'
        assert len(umlauts.encode()) == 1000
        await peer.utter(umlauts)
        await peer.hear("pong")
        await peer.utter(umlauts + " ")  # 1001 bytes, 512 characters
        assert await peer.ended() == 1009


# ---- the proxy as a process


PROXY_NODE = """
const socket = new WebSocket(process.argv[1]);
const end = setTimeout(() => { console.log("too slow"); process.exit(1); }, 15000);
socket.onopen = () => console.log("open");
socket.onmessage = ({ data }) => {
  const message = JSON.parse(data);
  console.log(message.type);
  if (message.type === "connected") {
    const chat_id = Number(process.argv[2]), content = "ж".repeat(3000);
    socket.send(JSON.stringify({ type: "send_message", chat_id, content }));
  }
  if (message.type === "ack") socket.close(1000);
};
socket.onclose = ({ code }) => { clearTimeout(end); console.log(code); };
"""


def door_node(*flags: str) -> str:
    """Find a Node that knows these flags. CI never does without it."""
    node = shutil.which("node")
    asked = [node or "", *flags, "-e", ""]
    if node and not subprocess.run(asked, capture_output=True, check=False).returncode:
        return node
    why = f"no Node on PATH that knows {flags or 'anything'}: install Node 20 or newer"
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


async def test_nodes_own_client_talks_through_the_proxy(
    door_shared_proxy: DoorServer,
) -> None:
    flag = "--experimental-websocket"  # it needs none since Node 22
    house, node = door_shared_proxy, door_node(flag)
    ann = next(door_users)
    chat = await house.chat(ann)
    url = f"ws://127.0.0.1:{house.port}{house.socket_path(ann)}"
    done = await trio.run_process(
        [node, flag, "--no-warnings", "-e", PROXY_NODE, url, str(chat)],
        capture_stdout=True,
    )
    said = done.stdout.decode().split()
    assert said == ["open", "connected", "new_message", "ack", "1000"]


async def test_the_proxy_tells_who_asks_and_nobody_can_say_so_himself(
    house: DoorServer, proxy_house: DoorProxy
) -> None:
    proxy = proxy_house
    async with house.serving("--handshakes=0.001/2"):
        proxy.serve = DoorProxy(proxy.home, house.port, house.db).serve
        async with proxy.serving():
            statuses = []
            for number in range(4):
                forged = f"X-Forwarded-For: 6.6.6.{number}"
                bad = door_get("/api/v1/me", "Host: x", forged)
                statuses.append((await proxy.raw(bad)).split()[1])
            # One bucket, that of 127.0.0.1, whatever they said.
            assert statuses == [b"401", b"401", b"429", b"429"]
            origin = f"Origin: http://127.0.0.1:{proxy.port}"
            page = (origin, f"Host: 127.0.0.1:{proxy.port}")
            assert b" 200 " in (await proxy.raw(door_get("/healthz", *page)))[:15]
            evil = ("Origin: http://evil.example", *page[1:])
            forged = "X-Forwarded-Host: evil.example"
            got = await proxy.raw(door_get("/healthz", *evil, forged))
            assert b" 403 " in got[:15]


async def test_the_proxy_outlives_the_server_and_finds_it_again(
    house: DoorServer, proxy_house: DoorProxy
) -> None:
    proxy = proxy_house
    async with house.serving():
        proxy.serve = DoorProxy(proxy.home, house.port, house.db).serve
        async with proxy.serving():
            ann = next(door_users)
            chat = await proxy.chat(ann)
            peer = await proxy.peer(ann)
            sent = await proxy.post(chat, ann, "before")
            cursor = f"{peer.hello['cursor'].partition('.')[0]}.{sent['id']}"
            await peer.hear("new_message")
            await house.kill()
            assert await peer.ended() == 1006
            answer = await proxy.ask("GET", "/healthz")
            assert (answer.status, answer.code) == (502, "upstream")
            assert (await proxy.refusal(ann)).status == 502
            await house.begin()
            again = await proxy.peer(ann, cursor)
            assert again.hello["resume"] == "live"
            await proxy.post(chat, ann, "after")
            assert (await again.hear("new_message"))["message"]["n"] == 2


async def test_a_stop_of_the_proxy_closes_its_sockets_properly_and_no_others(
    house: DoorServer, proxy_house: DoorProxy
) -> None:
    proxy = proxy_house
    async with house.serving():
        proxy.serve = DoorProxy(proxy.home, house.port, house.db).serve
        ann = next(door_users)
        straight = await house.peer(ann)
        async with proxy.serving("--drain-seconds=10"):
            peers = [await proxy.peer(ann) for _ in range(5)]
            began = trio.current_time()
            proxy.signal(signal.SIGTERM)
            assert [await peer.ended() for peer in peers] == [1012] * 5
            for stream in proxy.streams:
                stream.socket.close()
            assert await proxy.ended() == 0
            assert trio.current_time() - began < 8
            await door_shut(proxy)
        await straight.hears_nothing()
        closed = (await house.stats())["connections"]["closed"]
        assert closed == {"1012": 5}


class ProxySlow:
    """An upstream that answers and reads slowly, and a client that does too."""

    SIZE = 10_000_000

    def __init__(self, proxy: DoorProxy) -> None:
        self.proxy = proxy
        self.most = 0  # resident bytes, the most that was seen
        self.base = 0

    def look(self) -> None:
        self.most = max(self.most, self.proxy.rss)

    async def read(self, stream: trio.SocketStream, size: int) -> None:
        """Read so many bytes, a little at a time."""
        while size:
            data = await stream.receive_some(min(size, 32_768))
            assert data, "it ended too soon"
            size -= len(data)
            self.look()
            await trio.sleep(0.002)

    async def write(self, stream: trio.SocketStream, frame: bytes) -> None:
        for _ in range(0, self.SIZE, len(frame)):
            await stream.send_all(frame)

    async def head(self, stream: trio.SocketStream) -> bytes:
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            data += await stream.receive_some(1)
        return data

    async def serve(self, stream: trio.SocketStream) -> None:
        """Be the upstream of one connection."""
        async with stream:
            upgrades = b"Upgrade: websocket" in await self.head(stream)
            length = f"HTTP/1.1 200 OK\r\nContent-Length: {self.SIZE}\r\n\r\n"
            if not upgrades:
                await self.read(stream, self.SIZE)
            await stream.send_all(PROXY_101 if upgrades else length.encode())
            await self.both(stream, reads=upgrades)

    async def both(self, stream: trio.SocketStream, *, reads: bool) -> None:
        """Write all, and read as much at the same time."""
        frame = door_frame(2, bytes(self.SIZE // 100 - 14))
        assert self.SIZE % len(frame) == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.write, stream, frame)
            if reads:
                await self.read(stream, self.SIZE)


@pytest.mark.parametrize("what", ["a socket", "a request"])
async def test_10_mb_each_way_between_slow_peers_take_no_memory(
    house: DoorServer, proxy_house: DoorProxy, what: str
) -> None:
    async with house.serving():  # for its secret
        pass
    proxy, slow = proxy_house, ProxySlow(proxy_house)
    async with trio.open_nursery() as nursery:
        serve = functools.partial(trio.serve_tcp, slow.serve, 0, host="127.0.0.1")
        (door,) = await nursery.start(serve)
        port = door.socket.getsockname()[1]
        proxy.serve = DoorProxy(proxy.home, port, house.db).serve
        async with proxy.serving():
            head = wires_request("POST", "/", Content_Length=str(slow.SIZE))
            if what == "a socket":
                head = wires_upgrade(proxy.socket_path(6))
            stream = await proxy.dial()
            with trio.fail_after(60):
                await stream.send_all(head)
                if what == "a socket":
                    await slow.head(stream)
                base = proxy.rss
                async with trio.open_nursery() as both:
                    frame = door_frame(2, bytes(slow.SIZE // 100 - 14))
                    both.start_soon(slow.write, stream, frame)
                    if what == "a request":
                        await slow.head(stream)
                    await slow.read(stream, slow.SIZE)
            assert slow.most - base < 4_000_000, (base, slow.most)
        nursery.cancel_scope.cancel()


# ---- stopping


async def door_bye(peer: DoorPeer) -> DoorFrame:
    """What a socket hears at the end: bye, then 1012."""
    bye = await peer.find("bye")
    assert set(bye) == {"type", "retry_after"}
    assert 0 <= bye["retry_after"] < 60
    assert await peer.ended() == 1012
    return bye


async def door_shut(house: DoorServer) -> None:
    """Accepting has stopped."""
    with pytest.raises(ConnectionRefusedError):
        await house.dial()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_stopping_says_goodbye_loses_no_ack_and_ends_with_0(
    house: DoorServer, signum: int
) -> None:
    async with house.serving():
        users, acked = [next(door_users) for _ in range(4)], DoorCount()
        chat = await house.chat(*users)
        senders = [
            DoorSender(house, user, [(chat, f"{i}") for i in range(100_000)])
            for user in users[:3]
        ]
        idle = [await house.peer(users[3]) for _ in range(3)]

        async def send(sender: DoorSender, peer: DoorPeer) -> None:
            with pytest.raises(DoorGone) as gone:
                await sender.send_over(peer, acked)
            assert gone.value.code == 1012

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for sender in senders:
                    peer = await house.peer(sender.user)
                    nursery.start_soon(send, sender, peer)
                await acked.reaches(300)
                began = trio.current_time()
                house.signal(signum)
                for peer in idle:
                    nursery.start_soon(door_bye, peer)
                assert await house.ended() == 0
        assert trio.current_time() - began < 5
        assert not DOOR_MISTAKE.search(house.output)
        await door_shut(house)
        await house.begin()
        stored = {m["client_id"]: m for m in await house.history(chat, users[0])}
        for sender in senders:
            for key, ack in sender.acks.items():
                assert stored[key]["id"] == ack["message_id"]
            mine = [m for m in stored.values() if m["sender_id"] == sender.user]
            assert [int(m["content"]) for m in mine] == list(range(len(mine)))


async def door_stalled(house: DoorServer, user: int, chat: int) -> DoorPeer:
    """A peer that has stopped reading, with more on its way than fits."""
    peer = await house.peer(user, receive_buffer=16384)
    writer = next(door_users)
    body = {"user_id": writer}
    target = f"POST /api/v1/chats/{chat}/members"
    await house.want(201, target, house.service, body)
    await door_load(house, chat, writer, 450)
    return peer


async def test_a_second_signal_ends_it_at_once(house: DoorServer) -> None:
    async with house.serving("--drain-seconds", "60"):
        ann, bob = next(door_users), next(door_users)
        await door_stalled(house, ann, await house.chat(ann))
        witness = await house.peer(bob)
        house.signal(signal.SIGTERM)
        await door_bye(witness)
        began = trio.current_time()
        await house.ended(signal.SIGTERM)
        assert trio.current_time() - began < 3


async def test_what_is_left_after_the_drain_is_cut(house: DoorServer) -> None:
    async with house.serving("--drain-seconds", "1"):
        ann, bob = next(door_users), next(door_users)
        await door_stalled(house, ann, await house.chat(ann))
        witness = await house.peer(bob)
        async with await house.dial() as stream:
            line = DoorLine(stream)
            assert (await line.ask("GET", "/healthz")).status == 200
            began = trio.current_time()
            house.signal(signal.SIGTERM)
            await door_bye(witness)
            with suppress(trio.BrokenResourceError):  # or it is closed already
                assert (await line.ask("GET", "/healthz")).status == 503
            await door_shut(house)
            assert await house.ended() == 0
        assert trio.current_time() - began < 6
        assert not DOOR_MISTAKE.search(house.output)


# ---- under a service manager

# What systemd does before it runs a program: its sockets are 3, 4, ... (sd_listen_fds).
DOOR_EXEC = """
import fcntl, os, sys
fds = [int(word) for word in sys.argv[1].split(",") if word]
for n, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]):
    os.dup2(fd, 3 + n)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class DoorManager:
    """Stands in for systemd: hears sd_notify(3), keeps sockets, and passes them on."""

    def __init__(self, home: Path, *, store_max: int = 8) -> None:
        self.home, self.store_max = home, store_max
        self.address = str(home / "notify")
        self.inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.inbox.setblocking(False)
        self.inbox.bind(self.address)
        self.store: list[tuple[str, socket.socket]] = []
        self.given: list[tuple[str, socket.socket]] = []  # a socket unit's
        self.heard: list[str] = []  # of the process that runs now
        self.news = DoorCount()
        self.process: trio.Process | None = None

    async def hear(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.inbox)
            text, fds, _, _ = socket.recv_fds(self.inbox, 4096, 64)
            lines = text.decode().split("\n")
            words = dict(line.split("=", 1) for line in lines)
            self.heard += lines
            name = words.get("FDNAME", "stored")
            if words.get("FDSTOREREMOVE") == "1":
                self.drop(name)
            for sock in (socket.socket(fileno=fd) for fd in fds):
                known = [os.fstat(kept.fileno()) for _, kept in self.store]
                full = len(self.store) >= self.store_max
                if full or os.fstat(sock.fileno()) in known or "FDSTORE" not in words:
                    sock.close()
                else:
                    self.store.append((name, sock))
            self.news.add()

    def drop(self, *names: str) -> None:
        for name, sock in self.store:
            if not names or name in names:
                sock.close()
        self.store = [(name, sock) for name, sock in self.store if sock.fileno() >= 0]

    async def start(self, *flags: object, pid: str = "") -> None:
        """Start it, and wait until it says that it is ready."""
        passed = [*self.given, *self.store]
        self.heard.clear()
        fds = [sock.fileno() for _, sock in passed]
        with (self.home / "out").open("ab") as out:
            self.process = await trio.lowlevel.open_process(
                [
                    *(sys.executable, "-c", DOOR_EXEC, ",".join(map(str, fds))),
                    *("-m", "chatd", "serve", "--db", str(self.home / "chatd.db")),
                    *map(str, flags),
                ],
                cwd=DOOR_CHECKOUT,
                env=door_environment(
                    NOTIFY_SOCKET=self.address,
                    LISTEN_FDS=str(len(fds)),
                    LISTEN_FDNAMES=":".join(name for name, _ in passed),
                ),
                stdout=out,
                stderr=out,
                pass_fds=fds,
            )
        await self.hears("READY=1")

    async def hears(self, line: str) -> None:
        with trio.fail_after(DOOR_SECONDS):
            while line not in self.heard:
                await self.news.reaches(self.news.value + 1)

    async def stop(self, signum: int = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(signum)
        with trio.fail_after(DOOR_SECONDS):
            status = await self.process.wait()
        assert status == (0 if signum == signal.SIGTERM else -signum), self.output

    @property
    def output(self) -> str:
        return (self.home / "out").read_text("utf-8")

    @property
    def kept(self) -> list[tuple[str, int]]:
        """Where the sockets in the store listen."""
        return [sock.getsockname()[:2] for _, sock in self.store]

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    def tidy(self) -> None:
        self.drop()
        for sock in (self.inbox, *(sock for _, sock in self.given)):
            sock.close()


@asynccontextmanager
async def door_manager(home: Path, *, store_max: int = 8) -> AsyncIterator[DoorManager]:
    manager = DoorManager(home, store_max=store_max)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(manager.hear)
            yield manager
            nursery.cancel_scope.cancel()
    finally:
        with trio.move_on_after(DOOR_SECONDS, shield=True):
            await manager.kill()
        manager.tidy()


async def door_answers(host: str, port: int) -> int:
    """The status of /healthz there, on a connection of its own."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with trio.socket.socket(family) as sock, trio.fail_after(DOOR_SECONDS):
        await sock.connect((host, port))
        return (await DoorLine(trio.SocketStream(sock)).ask("GET", "/healthz")).status


async def test_ten_restarts_refuse_no_connection_and_answer_every_one(
    tmp_path: Path,
) -> None:
    async with door_manager(tmp_path) as manager, trio.open_nursery() as nursery:
        await manager.start("--listen", "127.0.0.1:0")
        ((host, port),) = manager.kept
        answered = DoorCount()

        async def come() -> None:
            while True:  # a refusal, or an end without an answer, fails the test
                assert await door_answers(host, port) in (200, 503)
                answered.add()

        for _ in range(3):
            nursery.start_soon(come)
        for _ in range(10):
            with trio.fail_after(DOOR_SECONDS):
                await answered.reaches(answered.value + 10)
            await manager.stop()
            await manager.hears("STOPPING=1")
            await manager.start("--listen", "127.0.0.1:0")
            assert manager.kept == [(host, port)]
        await answered.reaches(answered.value + 10)
        nursery.cancel_scope.cancel()
    assert manager.output.count(f"listening on http://{host}:{port}\n") == 11
    assert not DOOR_MISTAKE.search(manager.output)


async def test_who_connects_while_nobody_serves_is_answered_by_the_next(
    tmp_path: Path,
) -> None:
    async with door_manager(tmp_path) as manager:
        await manager.start("--listen", "127.0.0.1:0")
        ((host, port),) = manager.kept
        for signum in (signal.SIGTERM, signal.SIGKILL):
            await manager.stop(signum)
            statuses: list[int] = []

            async def come(told: list[int] = statuses) -> None:
                told.append(await door_answers(host, port))

            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(come)
                await wait_all_tasks_blocked()
                assert statuses == []
                await manager.start("--listen", f"{host}:{port}")
            assert statuses == [200] * 50


@pytest.mark.parametrize("store_max", [8, 1])
async def test_a_name_with_two_addresses_listens_at_both_after_a_restart(
    tmp_path: Path, store_max: int
) -> None:
    found = socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)
    hosts = list(dict.fromkeys(str(address[0]) for *_, address in found))
    async with door_manager(tmp_path, store_max=store_max) as manager:
        # Port 0 gives each its own; a port that we know is the same for both.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for _ in range(3):
            await manager.start("--listen", f"localhost:{port}")
            for host in hosts:
                assert await door_answers(host, port) == 200
            assert len(manager.kept) == min(store_max, len(hosts))
            await manager.stop()


class DoorResolver(trio.abc.HostnameResolver):
    """A name with several addresses, whatever this machine calls itself."""

    def __init__(self, *hosts: str) -> None:
        self.hosts = hosts

    async def getaddrinfo(self, _host: Any, port: Any, *_: Any) -> Any:
        found = [(host, ":" in host) for host in self.hosts]
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (host, int(port), 0, 0))
            if v6
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, int(port)))
            for host, v6 in found
        ]

    async def getnameinfo(self, *_: Any) -> Any:
        raise NotImplementedError


async def test_each_address_gets_the_socket_that_was_kept_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosts = ["127.0.0.3", "127.0.0.4", "127.0.0.5"]
    trio.socket.set_custom_hostname_resolver(DoorResolver(*hosts, hosts[0]))
    with contextlib.ExitStack() as stack:
        first = await chatd._listen_at("name.test", 0, [])
        for sock in first:
            stack.callback(sock.close)
        assert [sock.getsockname()[0] for sock in first] == hosts
        stale = stack.enter_context(socket.create_server(("127.0.0.6", 0)))
        kept = [first[2], stale, first[0]]
        second = await chatd._listen_at("name.test", 0, kept)
        stack.callback(second[1].close)
        assert second[0] is first[0]
        assert second[2] is first[2]
        assert second[1].getsockname()[0] == hosts[1]
        assert stale.fileno() == -1
        # Another port is another address.
        port = first[0].getsockname()[1] % 65535 + 1
        assert not chatd._is_at(first[0], (hosts[0], port))

        # A family that the kernel does not have is done without, but not all of them.
        real = trio.open_tcp_listeners

        async def without_ipv6(port: int, *, host: str) -> list[trio.SocketListener]:
            if ":" in host:
                raise OSError(errno.EAFNOSUPPORT, "no IPv6")
            return await real(port, host=host)

        monkeypatch.setattr(trio, "open_tcp_listeners", without_ipv6)
        trio.socket.set_custom_hostname_resolver(DoorResolver("::1", hosts[0]))
        (only,) = await chatd._listen_at("name.test", 0, [])
        stack.callback(only.close)
        assert only.getsockname()[0] == hosts[0]
        trio.socket.set_custom_hostname_resolver(DoorResolver("::1"))
        with pytest.raises(UsageError, match=r"--listen name\.test:1: no IPv6"):
            await chatd.open_listeners("name.test:1")


async def test_a_kept_socket_at_another_address_is_given_up(tmp_path: Path) -> None:
    async with door_manager(tmp_path) as manager:
        await manager.start("--listen", "127.0.0.1:0")
        ((_, port),) = manager.kept
        await manager.stop()
        # The same port, at addresses that include the old one: it must be free.
        await manager.start("--listen", f"0.0.0.0:{port}")
        assert manager.kept == [("0.0.0.0", port)]
        assert await door_answers("127.0.0.2", port) == 200
        await manager.stop()
        await manager.start("--listen", f"127.0.0.2:{port}")
        assert manager.kept == [("127.0.0.2", port)]
        assert await door_answers("127.0.0.2", port) == 200
        with pytest.raises(ConnectionRefusedError):
            await door_answers("127.0.0.1", port)
        await manager.stop()


async def test_a_kept_socket_that_no_longer_listens_is_replaced(tmp_path: Path) -> None:
    async with door_manager(tmp_path) as manager:
        await manager.start("--listen", "127.0.0.1:0")
        ((_, sock),) = manager.store
        address = sock.getsockname()
        await manager.stop()
        sock.shutdown(socket.SHUT_RDWR)
        await manager.start("--listen", "{}:{}".format(*address))
        assert await door_answers(*address) == 200
        await manager.stop()


async def test_the_sockets_of_a_socket_unit_are_served_and_not_kept(
    tmp_path: Path,
) -> None:
    async with door_manager(tmp_path) as manager:
        await manager.start("--listen", "127.0.0.1:0")
        ((_, old),) = manager.kept
        await manager.stop()
        for host in ("127.0.0.1", "127.0.0.2"):
            sock = socket.create_server((host, 0))
            manager.given.append(("chatd.socket", sock))
        addresses = [sock.getsockname()[:2] for _, sock in manager.given]
        for _ in range(2):
            await manager.start("--listen", f"127.0.0.1:{old}")
            for host, port in addresses:
                assert await door_answers(host, port) == 200
            assert manager.kept == []
            with pytest.raises(ConnectionRefusedError):
                await door_answers("127.0.0.1", old)
            await manager.stop()


async def test_what_cannot_be_served_from_a_socket_unit_is_told(tmp_path: Path) -> None:
    local, silent = socket.socket(socket.AF_UNIX), socket.socket()
    local.bind(str(tmp_path / "local"))
    local.listen()
    silent.bind(("127.0.0.1", 0))
    with (tmp_path / "file").open("w") as file, local, silent:
        for fd in (local.fileno(), silent.fileno(), file.fileno()):
            done = await trio.run_process(
                [
                    *(sys.executable, "-c", DOOR_EXEC, str(fd)),
                    *("-m", "chatd", "serve", "--db", str(tmp_path / "chatd.db")),
                    *("--listen", "127.0.0.1:0"),
                ],
                cwd=DOOR_CHECKOUT,
                env=door_environment(LISTEN_FDS="1", LISTEN_FDNAMES="x.socket"),
                pass_fds=[fd],
                capture_stderr=True,
                check=False,
            )
            assert done.returncode == 1, done
            assert b"chatd: LISTEN_FDS: descriptor 3" in done.stderr, done
            assert not DOOR_MISTAKE.search(done.stderr.decode()), done


async def test_sockets_are_passed_once_and_to_nobody_else(tmp_path: Path) -> None:
    look = """
import chatd, os
given, _ = chatd.passed_sockets()
print(len(given), len(chatd.passed_sockets()[0]))
print(os.get_inheritable(3), [n for n in os.environ if n.startswith("LISTEN_")])
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for before, count in (("", "1"), ("os.environ['LISTEN_PID'] = '1'", "0")):
            done = await trio.run_process(
                [
                    *(sys.executable, "-c", DOOR_EXEC, str(server.fileno())),
                    *("-c", f"import os\n{before}\n{look}"),
                ],
                cwd=DOOR_CHECKOUT,
                env=door_environment(LISTEN_FDS="1"),
                pass_fds=[server.fileno()],
                capture_stdout=True,
            )
            first, second = done.stdout.decode().splitlines()
            assert first == f"{count} 0"
            assert second.endswith("[]")
            assert count == "0" or second.startswith("False")


# ---- the log


@pytest.mark.parametrize("journal", [True, False])
async def test_each_line_has_its_priority_only_where_it_goes_to_the_journal(
    house: DoorServer, journal: bool
) -> None:
    log = house.home / "stderr"
    log.touch()
    there = log.stat()
    # A process that a unit started, but that writes elsewhere, inherits the variable.
    stream = f"{there.st_dev}:{there.st_ino + (not journal)}"
    house.environment = {"JOURNAL_STREAM": stream}
    async with house.serving("--log-level=debug"):
        await (await house.peer(next(door_users))).leave()
        await house.want(200, "GET /healthz")
        house.signal(signal.SIGTERM)
        assert await house.ended() == 0
    lines = log.read_text("ascii").splitlines()
    words = [line.split(" ")[0 if journal else 1] for line in lines]
    prefix = ["<6>", "<6>", "<7>", "<7>", "<6>"] if journal else [""] * 5
    verbs = ["made_secret", "ready", "joined", "left", "stopping"]
    assert words == [start + verb for start, verb in zip(prefix, verbs, strict=True)]
    with log.open("ab") as stderr:
        done = await trio.run_process(
            [sys.executable, "-m", "chatd", "check", "--db", str(log)],
            stderr=stderr,
            check=False,
            cwd=DOOR_CHECKOUT,
            env=door_environment(**house.environment),
        )
    assert done.returncode == 1
    last = log.read_text("ascii").splitlines()[-1]
    assert last.startswith("<3>chatd: database " if journal else "chatd: database ")


async def test_the_log_level_says_how_much(house: DoorServer) -> None:
    async with house.serving("--log-level=warning"):
        await (await house.peer(next(door_users))).leave()
    assert (house.home / "stderr").read_text() == ""


# ---- the command line


async def test_wrong_use_is_told_with_status_2(tmp_path: Path) -> None:
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
    runs: dict[tuple[str, ...], DoorRun] = {}

    async def run(words: tuple[str, ...]) -> None:
        end = () if words[0] == "nonsense" else ("--db", db)
        runs[words] = await door_run(*words, *end)

    async with trio.open_nursery() as nursery:
        for words in wrong:
            nursery.start_soon(run, words)
    for words, done in runs.items():
        assert done.status == 2, (words, done)
        assert done.out == "", (words, done)
        said = words[-1].partition("=")
        assert (said[2] or said[0]).lstrip("-") in done.err, (words, done)
    assert not db.exists()
    by_environment = await door_run("serve", "--db", db, CHATD_SENDS="many")
    assert by_environment.status == 2
    assert "CHATD_SENDS" in by_environment.err
    misspelt = await door_run("check", "--db", db, CHATD_SENDZ="5/20")
    assert "WARNING unknown_variable name='CHATD_SENDZ'" in misspelt.err
    helped = await door_run("--help")
    assert helped.status == 0
    for word in ("serve", "proxy", "token", "backup", "restore", "check"):
        assert word in helped.out
    version = await door_run("--version")
    assert (version.status, chatd.__version__ in version.out) == (0, True)


async def test_a_token_from_the_command_line_is_all_it_prints(
    open_house: DoorServer,
) -> None:
    house = open_house
    user = next(door_users)
    words = ("token", user, "--db", house.db)
    secret = ("--secret-file", house.db.with_name("chatd.secret"))
    plain = await door_run(*words, "--name", "Ann", "--ttl", "90s")
    claims = jwt.decode(plain.out.strip(), options={"verify_signature": False})
    assert 80 < claims["exp"] - time.time() <= 91
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", plain.out)
    me = await house.want(200, "GET /api/v1/me", plain.out.strip())
    assert me == {"user_id": user, "name": "Ann"}
    stats = await door_run("token", user, *secret, "--scope", "stats")
    target = "GET /api/v1/internal/chat/ws/stats"
    await house.want(200, target, stats.out.strip())
    link = await door_run(*words, "--link")
    assert re.fullmatch(r"http://127\.0\.0\.1:8086/#token=\S+\n", link.out), link
    credentials = {"CREDENTIALS_DIRECTORY": str(house.home)}
    systemd = await door_run("token", user, **credentials)
    await house.want(200, "GET /api/v1/me", systemd.out.strip())
    for run in (plain, stats, link, systemd):
        assert run.status == 0


async def test_what_cannot_work_is_told_with_status_1(
    house: DoorServer, tmp_path: Path
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
    async with house.serving():
        pid = str(house.process.pid) if house.process else ""
        assert (await door_run("backup", newer, "--db", house.db)).status == 0
        with sqlite3.connect(newer) as connection:
            connection.execute("PRAGMA user_version = 999")
        connection.close()
        secret = house.db.with_name("chatd.secret")
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        newer.with_name("chatd.secret").write_bytes(secret.read_bytes())
        newer.with_name("chatd.secret").chmod(0o600)
        listen = ("serve", "--listen", "127.0.0.1:0", "--db")
        taken = ("serve", "--listen", f"127.0.0.1:{house.port}", "--db")
        nowhere = tmp_path / "no" / "such" / "chatd.db"
        before = garbage.read_bytes()
        failures: list[tuple[tuple[object, ...], str]] = [
            ((*listen, house.db), pid),  # who holds it
            (("restore", newer, "--db", house.db), pid),
            ((*listen, newer), "999"),
            ((*listen, garbage), str(garbage)),
            (("check", "--db", garbage), str(garbage)),
            (("restore", garbage, "--db", tmp_path / "x.db"), str(garbage)),
            ((*listen, readable), str(readable.with_name("chatd.secret"))),
            ((*listen, short), "32"),
            ((*taken, tmp_path / "other.db"), str(house.port)),
            ((*listen, nowhere), str(nowhere.parent)),
            (("token", "6", "--db", nowhere), "secret"),
            (("proxy", *listen[1:], nowhere), "secret"),
            (("proxy", *taken[1:], house.db), str(house.port)),
            (("check", "--db", nowhere), str(nowhere)),
            (("backup", tmp_path / "copy", "--db", nowhere), str(nowhere)),
            (("restore", tmp_path / "none", "--db", tmp_path / "o.db"), "none"),
            ((*listen, tmp_path / "o.db", "--jwt-key", tmp_path / "none"), "none"),
        ]
        runs: list[tuple[tuple[object, ...], str, DoorRun]] = []

        cores = trio.CapacityLimiter(2)  # more at once only wait for each other

        async def run(words: tuple[object, ...], named: str) -> None:
            async with cores:
                with trio.fail_after(DOOR_SECONDS):
                    runs.append((words, named, await door_run(*words)))

        async with trio.open_nursery() as nursery:
            for words, named in failures:
                nursery.start_soon(run, words, named)
        for words, named, done in runs:
            assert done.status == 1, (words, done)
            assert named in done.err, (words, done)
            assert "listening" not in done.out, (words, done)
        assert garbage.read_bytes() == before
        assert not nowhere.parent.exists()
        await house.want(200, "GET /healthz")


async def test_a_backup_is_whole_and_a_restore_makes_old_cursors_resync(
    house: DoorServer, tmp_path: Path
) -> None:
    async with house.serving():
        ann, bob = next(door_users), next(door_users)
        chat, copy = await house.chat(ann, bob), tmp_path / "copy.db"
        a = await house.peer(ann)
        kept = [
            await a.ask("send_message", chat_id=chat, content=f"{i}") for i in "012"
        ]
        seen = await house.cursor(bob)
        assert (await door_run("backup", copy, "--db", house.db)).status == 0
        for db in (copy, house.db):  # online, the one it was made of
            checked = await door_run("check", "--db", db)
            assert checked.status == 0, checked
        await house.post(chat, ann, "after the backup")
        later = await house.cursor(bob)
        await house.stop()
        restored = await door_run("restore", copy, "--db", house.db)
        assert restored.status == 0, restored
        assert (await door_run("check", "--db", house.db)).status == 0
        await house.begin()
        messages = await house.history(chat, bob)
        assert [m["id"] for m in messages] == [ack["message_id"] for ack in kept]
        for cursor in (seen, later):
            b = await house.peer(bob, cursor)
            assert b.hello["resume"] == "resync"
            assert b.hello["cursor"].partition(".")[0] != cursor.partition(".")[0]
            target = f"GET /api/v1/events?cursor={cursor}"
            poll = await house.want(200, target, house.token(bob))
            assert poll["resync"] is True
            await b.leave()
        b = await house.peer(bob, poll["cursor"])
        assert b.hello["resume"] == "live"
        sent = await house.post(chat, ann, "after the restore")
        assert sent["n"] == 4
        assert (await b.hear("new_message"))["message"] == sent


async def test_a_backup_under_load_holds_every_message_acked_before_it(
    house: DoorServer, tmp_path: Path
) -> None:
    async with house.serving():
        users, acked = [next(door_users) for _ in range(3)], DoorCount()
        chat = await house.chat(*users)
        senders = [
            DoorSender(house, user, [(chat, f"{i}") for i in range(100_000)])
            for user in users
        ]
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                for sender in senders:
                    nursery.start_soon(sender.send, acked)
                for round_ in range(2):
                    await acked.reaches(acked.value + 300)
                    before = {k: a for s in senders for k, a in s.acks.items()}
                    copy = tmp_path / f"copy-{round_}.db"
                    done = await door_run("backup", copy, "--db", house.db)
                    assert (done.status, done.out) == (0, f"{copy}\n"), done
                    after = {k: a for s in senders for k, a in s.acks.items()}
                    assert len(after) > len(before)  # it stopped nobody
                    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
                    checked = await door_run("check", "--db", copy)
                    assert checked.status == 0, checked
                    with contextlib.closing(sqlite3.connect(copy)) as db:
                        rows = dict(db.execute("SELECT client_id, id FROM message"))
                    for key, ack in before.items():
                        assert rows[key] == ack["message_id"]
                nursery.cancel_scope.cancel()


async def test_after_a_restore_nobody_stays_silently_ahead(
    house: DoorServer, tmp_path: Path
) -> None:
    """Whatever a client has of the lost future, it is told to forget it."""
    async with house.serving():
        ann, bob = next(door_users), next(door_users)
        chat, copy = await house.chat(ann, bob), tmp_path / "copy.db"
        cursors = [await house.cursor(bob)]
        await house.post(chat, ann, "kept")
        assert (await door_run("backup", copy, "--db", house.db)).status == 0
        cursors.append(await house.cursor(bob))
        for number in range(3):
            await house.post(chat, ann, f"lost {number}")
            cursors.append(await house.cursor(bob))
        for _ in range(2):  # a second restore of the same copy makes it new again
            await house.stop()
            assert (await door_run("restore", copy, "--db", house.db)).status == 0
            await house.begin()
            # The seqs that were given out before are given out again.
            for number in range(3):
                await house.post(chat, ann, f"anew {number}")
            for cursor in cursors:
                b = await house.peer(bob, cursor)
                assert b.hello["resume"] == "resync", cursor
                await b.leave()
                target = f"GET /api/v1/events?cursor={cursor}"
                poll = await house.want(200, target, house.token(bob))
                assert (poll["resync"], poll["events"]) == (True, []), cursor
            cursors.append(await house.cursor(bob))
        told = [m["content"] for m in await house.history(chat, bob)]
        assert told == ["kept", "anew 0", "anew 1", "anew 2"]


async def test_a_second_serve_and_a_restore_under_one_are_told_what_to_do(
    house: DoorServer, tmp_path: Path
) -> None:
    async with house.serving():
        assert house.process is not None
        copy, pid = tmp_path / "copy.db", house.process.pid
        assert (await door_run("backup", copy, "--db", house.db)).status == 0
        link = tmp_path / "link.db"
        link.symlink_to(house.db)
        for db in (house.db, link):
            for words in (("restore", copy), ("serve", "--listen", "127.0.0.1:0")):
                done = await door_run(*words, "--db", db)
                assert done.status == 1, done
                assert f"in use by process {pid}; stop" in done.err
                assert "systemctl stop chatd" in done.err
        await house.want(200, "GET /healthz")


async def test_a_backup_keeps_the_newest_and_touches_nothing_else(
    house: DoorServer, tmp_path: Path
) -> None:
    folder = tmp_path / "copies"
    async with house.serving():
        words = ("backup", "--db", house.db, "--keep", "2", folder)
        missing = await door_run(*words)
        assert (missing.status, str(folder) in missing.err) == (1, True)
        folder.mkdir()
        others = {"chatd.db", "chatd-20200101T000000Z.db.bak", "notes-2020.db"}
        old = [f"chatd-2020010{n}T000000Z.db" for n in range(1, 4)]
        left = "chatd-20200101T000000Z.db.0123abcd.partial"
        for name in (*others, *old, left):
            (folder / name).write_text(name)
        done = await door_run(*words)
        assert done.status == 0, done
        copy = Path(done.out.strip())
        assert re.fullmatch(r"chatd-\d{8}T\d{6}Z\.db", copy.name)
        assert {p.name for p in folder.iterdir()} == {*others, old[-1], copy.name}
        assert (await door_run("check", "--db", copy)).status == 0
        # What failed removes nothing, and nor does what has room for more.
        failed = await door_run(*words[:1], "--keep", "1", folder, "--db", folder)
        assert failed.status == 1
        more = await door_run("backup", "--db", house.db, "--keep", "5", folder)
        copies = {old[-1], copy.name, Path(more.out.strip()).name}
        assert len(copies) == 3
        assert {p.name for p in folder.iterdir()} == {*others, *copies}
        # Names are by the second; who is quicker waits for the next.
        for _ in range(2):
            await trio.to_thread.run_sync(chatd.backup, house.db, folder, 9)
        assert len([*folder.glob("chatd-2*Z.db")]) == 5


# Ways in which a database file is damaged, each of which `chatd check` finds.
def door_cut(db: Path) -> None:
    os.truncate(db, db.stat().st_size // 4096 * 4096 - 4096)


def door_cut_within_a_page(db: Path) -> None:
    os.truncate(db, db.stat().st_size - 1000)


def door_empty(db: Path) -> None:
    os.truncate(db, 0)


def door_zero_page(db: Path) -> None:
    with db.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(bytes(4096))


def door_garbage_head(db: Path) -> None:
    with db.open("r+b") as file:
        file.write(b"garbage")


def door_garbage_pages(db: Path) -> None:
    with db.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (db.stat().st_size - 4096))


def door_hole_in_the_log(db: Path) -> None:
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("DELETE FROM event WHERE seq = 2")
        connection.commit()


def door_index_that_lies(db: Path) -> None:
    """Make an index disagree with its table, as a lost write does."""
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.executescript(
            """PRAGMA writable_schema = ON;
            UPDATE sqlite_schema SET sql = replace(sql, '(user_id)', '(chat_id)')
            WHERE name = 'member_user'"""
        )


def door_version_zero(db: Path) -> None:
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("PRAGMA user_version = 0")


DOOR_DAMAGE = [
    door_cut, door_cut_within_a_page, door_empty, door_zero_page, door_garbage_head,
    door_garbage_pages, door_hole_in_the_log, door_index_that_lies, door_version_zero,
]  # fmt: skip
# What the start overlooks, or takes for a new database: `chatd check` looks closer.
DOOR_SERVED = [door_empty, door_hole_in_the_log, door_index_that_lies]


@pytest.fixture(scope="module")
def sound_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with some pages in every table."""
    memory = Memory(tmp_path_factory.mktemp("sound"))
    chat = memory.chat(1, 2)
    for _ in range(20):
        memory.commit(*[memory.sends(chat, 1)] * 10)
    memory.store.close()
    return memory.settings.db


def door_files(folder: Path) -> dict[str, bytes]:
    """What is in a folder, without what SQLite makes for every reader of a database."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and not path.name.endswith((".db-shm", ".db-wal", ".lock"))
    }


@pytest.mark.parametrize("damage", DOOR_DAMAGE)
async def test_a_damaged_database_is_no_backup_and_costs_none(
    damage: Callable[[Path], None], sound_db: Path, tmp_path: Path
) -> None:
    db, folder = tmp_path / "chatd.db", tmp_path / "copies"
    shutil.copy(sound_db, db)
    folder.mkdir()
    first = await door_run("backup", "--db", db, "--keep", "1", folder)
    assert first.status == 0, first
    damage(db)
    copies, files = door_files(folder), door_files(tmp_path)
    assert len(copies) == 1
    for words in (("--keep", "1", folder), (tmp_path / "copy.db",)):
        done = await door_run("backup", "--db", db, *words)
        assert (done.status, done.out) == (1, ""), done
        assert f"database {db}: " in done.err, done
        assert "copy" not in done.err.replace(str(folder), ""), done
    assert door_files(folder) == copies
    assert door_files(tmp_path) == files
    checked = await door_run("check", "--db", db)
    assert checked.status == 1
    # Nor does it get into the place of another.
    shutil.copy(sound_db, folder / "other.db")
    before = door_files(folder)
    restored = await door_run("restore", db, "--db", folder / "other.db")
    assert restored.status == 1
    assert f"restore {db}: " in restored.err
    assert door_files(folder) == before


@pytest.mark.parametrize("damage", [d for d in DOOR_DAMAGE if d not in DOOR_SERVED])
async def test_a_damaged_database_is_not_served_and_the_way_out_is_told(
    damage: Callable[[Path], None], sound_db: Path, house: DoorServer, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.db"
    shutil.copy(sound_db, house.db)
    assert (await door_run("backup", "--db", house.db, copy)).status == 0
    damage(house.db)
    before = house.db.read_bytes()
    done = await door_run("serve", "--listen=127.0.0.1:0", "--db", house.db)
    assert (done.status, done.out) == (1, ""), done
    assert f"database {house.db}: damaged: " in done.err
    for command in ("check", "restore BACKUP"):
        assert f"`chatd {command} --db {house.db}`" in done.err
    assert house.db.read_bytes() == before
    assert (await door_run("restore", copy, "--db", house.db)).status == 0
    async with house.serving():
        await house.want(200, "GET /healthz")


async def test_an_empty_file_beside_a_wal_is_no_new_database(house: DoorServer) -> None:
    async with house.serving():
        await house.chat(next(door_users))
        await house.kill()
    wal = house.db.with_name("chatd.db-wal")
    kept = wal.read_bytes()
    assert kept
    for damage in (door_empty, Path.unlink):
        damage(house.db)
        done = await door_run("serve", "--listen=127.0.0.1:0", "--db", house.db)
        assert done.status == 1
        assert "damaged: it is empty, and its -wal is not" in done.err
        assert wal.read_bytes() == kept


async def test_the_start_says_what_it_checked_and_what_it_left_unchecked(
    house: DoorServer, sound_db: Path
) -> None:
    shutil.copy(sound_db, house.db)
    size = len(door_files(house.home)["chatd.db"])
    for limit, verb in ((size, "checked"), (size - 1, "unchecked")):
        async with house.serving(f"--check-bytes={limit}"):
            pass
        (line,) = re.findall(
            rf"(?m)^INFO (?:un)?checked .* bytes={size} .*", house.output
        )
        (house.home / "stderr").unlink()
        assert line.startswith(f"INFO {verb} db="), line
    assert Settings().check_bytes == 32 * 2**20


@pytest.mark.parametrize("blocks", [1, 40])  # of 1 KiB: no file may be larger
async def test_a_copy_that_finds_no_room_leaves_nothing_behind(
    blocks: int, sound_db: Path, tmp_path: Path
) -> None:
    db, folder = tmp_path / "chatd.db", tmp_path / "copies"
    shutil.copy(sound_db, db)
    folder.mkdir()
    (folder / "chatd-20260101T000000Z.db").write_bytes(b"old")
    before = door_files(folder), door_files(tmp_path)
    for words in (("backup", "--keep", "1", folder), ("restore", sound_db)):
        chatd_at = [sys.executable, "-m", "chatd", *map(str, words), "--db", str(db)]
        done = await trio.run_process(
            ["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "-", *chatd_at],
            capture_stderr=True, check=False, cwd=DOOR_CHECKOUT,
            env=door_environment(COVERAGE_PROCESS_START=""),
        )  # fmt: skip
        assert done.returncode == 1, done
        assert re.search(rb"chatd: \w+ .*(copying failed|disk I/O)", done.stderr), done
        assert (door_files(folder), door_files(tmp_path)) == before


async def test_ready_names_each_key_of_the_backend_and_its_kind(
    house: DoorServer,
) -> None:
    keys = {"RS256": "public key", "ES256": "public key", "EdDSA": "public key"}
    for algorithm in keys:
        (house.home / algorithm).write_bytes(rules_public_pem(algorithm))
    keys["HS256"] = "shared secret"
    (house.home / "HS256").write_bytes(RULES_SHARED)
    flags = [word for name in keys for word in ("--jwt-key", str(house.home / name))]
    async with house.serving(*flags):
        pass
    named = ", ".join(f"{house.home / n} ({n}, {kind})" for n, kind in keys.items())
    (line,) = re.findall("(?m)^INFO ready .*", house.output)
    assert line.endswith(f" jwt_keys='{named}'"), line
    async with house.serving(*DOOR_OPEN):
        pass
    assert "jwt_keys" not in re.findall("(?m)^INFO ready .*", house.output)[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
async def test_root_follows_no_link_in_a_folder_of_the_unit_s_user(
    house: DoorServer, tmp_path: Path
) -> None:
    """Who takes over the server must not get root's help to take over the machine."""
    async with house.serving():
        await house.chat(next(door_users))
    copy, prey = tmp_path / "copy.db", tmp_path / "prey"
    assert (await door_run("backup", copy, "--db", house.db)).status == 0
    unit = tmp_path / "unit"
    unit.mkdir()
    db = unit / "chatd.db"
    shutil.copy(copy, db)
    prey.write_text("root's")
    for path in (unit, db):
        os.chown(path, 65534, 65534)
    for suffix in ("-wal", "-shm", ".lock"):
        link = db.with_name(db.name + suffix)
        link.unlink(missing_ok=True)
        link.symlink_to(prey)
        await door_run("check", "--db", db)
        await door_run("backup", tmp_path / f"copy{suffix}", "--db", db)
        await door_run("restore", copy, "--db", db)
        assert (prey.read_text(), prey.stat().st_uid) == ("root's", 0), suffix


async def test_the_demo_is_two_links_that_talk(
    house: DoorServer, tmp_path: Path
) -> None:
    house.serve = ("--demo",)
    await house.begin()

    def printed() -> bool:
        return house.said.count("/#token=") >= 2

    await door_until(printed)
    base = re.escape(f"http://127.0.0.1:{house.port}")
    links = re.findall(base + r"/#token=(\S+)", house.said)
    assert len(links) == 2, house.said
    sessions = [await house.want(200, "POST /api/v1/session", link) for link in links]
    assert sessions[0]["user_id"] != sessions[1]["user_id"]
    assert all(session["name"] for session in sessions)
    a, b = [await house.peer(session["token"]) for session in sessions]
    chats = await house.want(200, "GET /api/v1/chats", sessions[0]["token"])
    (chat,) = chats["chats"]
    ack = await a.ask("send_message", chat_id=chat["id"], content="hello")
    assert (await b.find("new_message"))["message"]["id"] == ack["message_id"]
    line = re.search(
        r"(?m)^chatd proxy (--upstream \S+ --secret-file \S+)$", house.said
    )
    assert line, house.said
    folder = tmp_path / "proxy"
    folder.mkdir()
    proxy = DoorProxy(folder, house.port, house.db)
    proxy.serve = tuple(line[1].split())
    async with proxy.serving():
        assert (await proxy.want(200, "POST /api/v1/session", links[0]))["name"]
        assert (await proxy.peer(sessions[0]["token"])).hello["resume"] == "fresh"
    await house.stop()
    assert sorted(os.listdir(tmp_path)) == ["proxy", "stderr"]  # its files are gone


# ---------------------------------------------------------------------------- #
# The papers: README, pyproject.toml and chatd.py say the same
# ---------------------------------------------------------------------------- #

PAPERS = Path(__file__).resolve().parent
README = (PAPERS / "README.md").read_text("utf-8")


def paper_block(language: str) -> str:
    """The README's only block of a language."""
    (block,) = re.findall(rf"(?ms)^```{language}\n(.*?)^```$", README)
    return str(block)


def test_the_readme_has_the_table_of_settings() -> None:
    assert chatd.settings_table() in README


def test_the_numbers_of_the_unit_fit_the_settings() -> None:
    unit = dict(
        line.split("=", 1)
        for line in (PAPERS / "chatd.service").read_text("utf-8").splitlines()
        if re.match(r"[A-Z]\w+=", line)
    )
    settings = Settings()
    assert int(unit["LimitNOFILE"]) == settings.max_connections + 256
    assert float(unit["TimeoutStopSec"]) >= 2 * settings.drain_seconds
    assert float(unit["WatchdogSec"]) > settings.commit_seconds + 10
    assert int(unit["FileDescriptorStoreMax"]) >= 2
    assert unit["ExecStart"] == "/opt/chatd/bin/chatd serve"


def test_inline_metadata_is_that_of_pyproject() -> None:
    source = (PAPERS / "chatd.py").read_text("utf-8")
    block = re.search(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", source)
    assert block, "chatd.py has lost its PEP 723 block"
    inline = tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))
    project = tomllib.loads((PAPERS / "pyproject.toml").read_text("utf-8"))["project"]
    assert inline == {key: project[key] for key in ("requires-python", "dependencies")}


@pytest.mark.parametrize("code", sorted(chatd.REFUSALS))
def test_every_refusal_has_a_status_and_a_sentence(code: str) -> None:
    status, sentence = chatd.REFUSALS[code]
    assert 400 <= status < 600
    assert len(sentence) > 10


@pytest.mark.parametrize("kind", ["RS256", "ES256", "EdDSA"])
def test_the_readme_s_ways_to_make_pem_of_a_key_work(kind: str, tmp_path: Path) -> None:
    private, path = rules_private(kind), tmp_path / "key.pem"
    public = private.public_key()
    der, line = (public.public_bytes(*KEY_PARTS[part]) for part in (
        "SubjectPublicKeyInfo", "OpenSSH"
    ))  # fmt: skip
    (block,) = re.findall(r"(?s)```sh\n([^`]*load_ssh_public_key.*?)```", README)
    block = block.replace(".venv/bin/python", sys.executable)
    commands = re.findall(r"`(openssl .*?)`", README)
    assert len(commands) == 2
    first, last = b"-----BEGIN PUBLIC KEY-----\n", b"\n-----END PUBLIC KEY-----"
    ways: list[tuple[str, bytes]] = [
        (block, json.dumps(rules_jwk(private)).encode()), (block, line),
        ("cat key.txt > key.pem", first + base64.b64encode(der) + last),
    ]  # fmt: skip
    for command in (command.replace("FILE", "key.txt") for command in commands):
        if "x509" in command:
            ways.append((f"{command} -inform DER", rules_certificate(private)))
        else:
            ways.append((command, der))
    for command, text in ways:
        path.unlink(missing_ok=True)
        (tmp_path / "key.txt").write_bytes(text)
        subprocess.run(
            ["bash", "-euc", command], cwd=tmp_path, check=True, timeout=DOOR_SECONDS
        )
        assert chatd.read_jwt_key(path).algorithm == kind, command


@pytest.fixture
def paper_server(tmp_path: Path) -> Iterator[str]:
    """The server of the README's chapter on backends, and its key, in tmp_path."""
    (tmp_path / "backend.key").write_text("0123456789abcdef" * 4 + "\n")
    command = [sys.executable, "-m", "chatd", "serve", "--jwt-key=backend.key"]
    with subprocess.Popen(
        [*command, "--listen=127.0.0.1:0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PAPERS)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.terminate()
        assert process.wait(20) == 0


def paper_run(command: list[str], server: str, folder: Path) -> str:
    run = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "CHATD": server},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_python_example_works_as_it_stands(
    paper_server: str, tmp_path: Path
) -> None:
    (tmp_path / "backend.py").write_text(paper_block("python"), "utf-8")
    out = paper_run([sys.executable, "backend.py"], paper_server, tmp_path)
    assert "'content': 'Still for sale?'" in out
    assert "'duplicate': False" in out


def test_the_node_example_works_as_it_stands(paper_server: str, tmp_path: Path) -> None:
    node = door_node()
    (tmp_path / "backend.mjs").write_text(paper_block("js"), "utf-8")
    out = paper_run([node, "backend.mjs"], paper_server, tmp_path)
    assert "content: 'Still for sale?'" in out
    assert "duplicate: false" in out
