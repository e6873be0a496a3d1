"""The protocol: commands, bodies, frames, messages and refusals.

Where chatd.py has a table, the test has a copy of it, written by hand, and compares
the two.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from wsproto.frame_protocol import FrameProtocol, Opcode

import chatd
from chatd import Refusal, Settings
from tests.client import ServerProcess, new_users
from tests.harness import refusal_of, words_hear

# --- commands and bodies -------------------------------------------------------------


IDS: list[Any] = [None, "3", 3.5, 1e300, True, 0, -1, 2**53, 10**30, [], {}, [3]]
TEXTS: list[Any] = [None, 5, True, [], {}, ["x"]]
REFS = [5, True, "x" * 65, [], {}]
CLIENT_IDS: list[Any] = [5, True, "", "x" * 65, "é", "a\nb", "\x7f", "a\n", [], {}]
TITLES = [5, True, "", " ", "\u2028", "a\nb", "\0", "\x7f", "x" * 201, [], {}]
NAMES_OF_COMMANDS = (
    "ping", "typing", "mark_read", "send_message", "edit_message", "delete_message",
    "auth",
)  # fmt: skip

# For each field a valid value, and invalid ones.
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
    chatd.EditMessage: {
        "ref": ("r", REFS),
        "message_id": (2**53 - 1, IDS),
        "content": ("Привет!", TEXTS),
        "if_rev": (7, IDS[1:]),
    },
    chatd.DeleteMessage: {"ref": ("r", REFS), "message_id": (1, IDS)},
    chatd.Auth: {"ref": ("r", REFS), "token": ("t", TEXTS)},
    chatd.NewChat: {
        "member_ids": ([1, 2], [None, 5, "12", {}, *[[wrong] for wrong in IDS]]),
        "title": ("A chat", TITLES),
        "direct": (True, [None, 0, 1, "true", [], {}]),
        "client_id": ("x" * 64, CLIENT_IDS),
    },
    chatd.NewTitle: {"title": ("\U0001f600" * 200, TITLES)},
    chatd.UserBody: {"user_id": (6, IDS)},
    chatd.PostMessage: {
        "content": ("hi", TEXTS),
        "client_id": (" ~", CLIENT_IDS),
        "sender_id": (5, IDS[1:]),
    },
    chatd.PatchMessage: {"content": ("hi", TEXTS), "if_rev": (7, IDS[1:])},
}
DECODERS: dict[type, msgspec.json.Decoder[Any]] = {
    body: msgspec.json.Decoder(body)
    for body in (
        chatd.NewChat,
        chatd.NewTitle,
        chatd.UserBody,
        chatd.PostMessage,
        chatd.PatchMessage,
    )
}


def parse_as(struct: type, fields: dict[str, object]) -> Any:
    """Parse an object as this Struct; a command gets its `type`."""
    tag = struct.__struct_config__.tag  # type: ignore[attr-defined]
    body = {"type": tag, **fields} if tag else fields
    return chatd.parse(json.dumps(body).encode(), DECODERS.get(struct, chatd.COMMANDS))


def test_the_table_of_bodies_has_every_command_and_every_field() -> None:
    tags = [struct.__struct_config__.tag for struct in get_args(chatd.COMMANDS.type)]
    assert tuple(tags) == NAMES_OF_COMMANDS
    assert {*BODIES} == {*get_args(chatd.COMMANDS.type), *DECODERS}
    for body, fields in BODIES.items():
        assert {*fields} == {field.name for field in msgspec.structs.fields(body)}


@pytest.mark.parametrize("struct", BODIES)
def test_valid_fields_are_accepted_and_unknown_fields_ignored(struct: type) -> None:
    right = {name: value for name, (value, _) in BODIES[struct].items()}
    parsed = parse_as(struct, {**right, "colour": {"deep": [1]}})
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
def test_the_refusal_of_a_wrong_field_names_it(
    struct: type, field: str, wrong: object
) -> None:
    right = {name: value for name, (value, _) in BODIES[struct].items()}
    refusal = refusal_of(parse_as, struct, {**right, field: wrong})
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
def test_the_refusal_of_a_missing_field_names_it(struct: type, field: str) -> None:
    right = {name: value for name, (value, _) in BODIES[struct].items()}
    del right[field]
    refusal = refusal_of(parse_as, struct, right)
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
def test_text_that_is_no_command_is_refused_with_the_right_code(
    text: str | bytes, code: str
) -> None:
    raw = text.encode() if isinstance(text, str) else text
    refusal = refusal_of(chatd.parse, raw, chatd.COMMANDS)
    assert refusal.code == code
    assert code == "bad_json" or "type" in refusal.message


@pytest.mark.parametrize(
    "escaped",
    [
        r"cut \ud83d", r"\ud83d", r"\uD83D", r"mid \ud83d dle", r"\ud83d\n", r"\udbff",
        r"\ud83d\u0041", r"low \ude00", r"\uDE00 first", r"\ude00\ud83d", r"\udfff",
        r"\ud83d\ud83d\ude00", r"\ud83d\ude00\ude00", r"\\\ud83d", r"\ud83d\\ude00",
    ],
)  # fmt: skip
@pytest.mark.parametrize("field", ["content", "client_id", "ref", "unknown"])
def test_half_a_surrogate_pair_is_refused_and_called_so(
    escaped: str, field: str
) -> None:
    text = send_with(field, escaped)
    refusal = refusal_of(chatd.parse, text.encode(), chatd.COMMANDS)
    assert refusal.code == "bad_json"
    assert "lone surrogate" in refusal.message


@pytest.mark.parametrize(
    "escaped",
    # Pairs and escaped backslashes; faults of another kind.
    [
        *[r"\ud83d\ude00", r"\\ud83d", r"\\\\ude00", "\U0001f600"],
        *[r"\ud83", r"\ux", r"\ud83d\ude00\x", r"\\ud83d\x"],
    ],
)
def test_nothing_else_is_called_half_a_surrogate_pair(escaped: str) -> None:
    text = send_with("content", escaped)
    if escaped.endswith(("83", "x")):
        refusal = refusal_of(chatd.parse, text.encode(), chatd.COMMANDS)
        assert "surrogate" not in refusal.message
    else:
        command = chatd.parse(text.encode(), chatd.COMMANDS)
        assert command == msgspec.convert(json.loads(text), chatd.SendMessage)


def send_with(field: str, escaped: str) -> str:
    """The JSON of a message with a field that holds this, as it is."""
    fields = {"type": "send_message", "chat_id": 1, "content": "a", field: "HERE"}
    return json.dumps(fields).replace("HERE", escaped)


def test_a_text_that_is_cut_short_is_called_truncated() -> None:
    refusal = refusal_of(chatd.parse, b'{"type":"ping","ref":"a', chatd.COMMANDS)
    assert "truncated" in refusal.message


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_arbitrary_bytes_are_refused(text: bytes) -> None:
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
def test_an_arbitrary_object_is_a_command_or_its_refusal_names_a_field(
    body: dict[str, object],
) -> None:
    refused = ""
    try:
        command = chatd.parse(json.dumps(body).encode(), chatd.COMMANDS)
    except Refusal as refusal:
        refused = str(refusal)
    else:
        assert isinstance(command, chatd.Command)
    assert re.match(r"(bad_json|bad_field|unknown_type): .*[:`]|$", refused)


@pytest.mark.parametrize(
    "content", ["x", "Привет!", "a\tb\nc\r\n", "x" * 10, "🎉" * 10, "\u202eabc", " x "]
)
def test_a_message_may_contain_any_printable_text(content: str) -> None:
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
def test_an_empty_too_long_or_unprintable_message_is_refused(
    content: str, why: str
) -> None:
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


# --- frames and server messages ------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 100_000])
def test_a_frame_is_the_one_that_wsproto_writes_and_reads(size: int) -> None:
    message = chatd.Pong(timestamp="x" * size)
    frame = chatd.text_frame(message)
    text = msgspec.json.encode(message).decode()
    assert frame == FrameProtocol(client=False, extensions=[]).send_data(text)
    assert words_hear(frame + frame)[1] == (Opcode.TEXT, text)


def test_a_ping_has_no_payload() -> None:
    assert words_hear(chatd.PING_FRAME) == [(Opcode.PING, b"")]


def test_an_error_frame_omits_fields_that_are_not_set() -> None:
    refusal = Refusal("rate_limited", retry_after=1.23456)
    command = '{"ref":"r1","chat_id":"1"}'
    ((_, text),) = words_hear(chatd.text_frame(chatd.error_of(refusal, command)))
    assert json.loads(text) == {
        "type": "error", "code": "rate_limited", "ref": "r1", "retry_after": 1.235,
        "message": "too many at once: slow down",
    }  # fmt: skip
    ((_, text),) = words_hear(
        chatd.text_frame(chatd.error_of(Refusal("not_found", "chat_id: none")))
    )
    assert json.loads(text) == {
        "type": "error", "code": "not_found", "message": "chat_id: none",
    }  # fmt: skip


VALUES = st.sampled_from([1, 2**53 - 1, "k", "x" * 64, "", "\ud800", "é"]) | st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.none())
)


@given(st.dictionaries(st.sampled_from([*chatd.NAMES, "type", "content"]), VALUES))
def test_an_error_frame_names_a_command_by_exactly_its_valid_fields(
    command: dict[str, Any],
) -> None:
    def is_valid(name: str, value: Any) -> bool:
        match name:
            case "chat_id" | "message_id":
                return type(value) is int and 1 <= value < 2**53
            case "client_id":
                found = type(value) is str and re.fullmatch("[ -~]{1,64}", value)
                return bool(found)
            case "ref":  # half of a surrogate pair is no text
                found = type(value) is str and re.search("[\ud800-\udfff]", value)
                return type(value) is str and len(value) <= 64 and not found
        return False

    valid = {name: value for name, value in command.items() if is_valid(name, value)}
    frame = chatd.text_frame(chatd.error_of(Refusal("bad_json"), json.dumps(command)))
    ((_, text),) = words_hear(frame)
    error = json.loads(text)
    assert {name: error[name] for name in error.keys() & chatd.NAMES.keys()} == valid


CHAT = chatd.Chat(9, "Sofa", [], 0, None, False, 6, 51)
MESSAGE = chatd.Message(789, 3, 5, "Привет!", "2025-11-21T13:00:00Z", 13)


# Server messages and events, byte for byte.
@pytest.mark.parametrize(
    ("message", "text"),
    [
        (
            chatd.NewMessage(5120, 3, MESSAGE),
            '{"type":"new_message","seq":5120,"chat_id":3,"message":{"id":789,"chat_id":3,'
            '"sender_id":5,"content":"Привет!","created_at":"2025-11-21T13:00:00Z","n":13}}',
        ),
        (
            chatd.NewMessage(5120, 3, MESSAGE, read=False),
            '{"type":"new_message","seq":5120,"chat_id":3,"message":{"id":789,"chat_id":3,'
            '"sender_id":5,"content":"Привет!","created_at":"2025-11-21T13:00:00Z","n":13},'
            '"read":false}',
        ),
        (
            chatd.MessageEdited(7, 3, replace(MESSAGE, rev=7, edited_at="T")),
            '{"type":"message_edited","seq":7,"chat_id":3,"message":{"id":789,"chat_id":3,'
            '"sender_id":5,"content":"Привет!","created_at":"2025-11-21T13:00:00Z","n":13,'
            '"rev":7,"edited_at":"T"}}',
        ),
        (
            chatd.MessageDeleted(
                8, 3, replace(MESSAGE, content="", rev=8, deleted=True)
            ),
            '{"type":"message_deleted","seq":8,"chat_id":3,"message":{"id":789,"chat_id":3,'
            '"sender_id":5,"content":"","created_at":"2025-11-21T13:00:00Z","n":13,'
            '"rev":8,"deleted":true}}',
        ),
        (
            chatd.MessageRead(7, 3, 456, 6, 12),
            '{"type":"message_read","seq":7,"chat_id":3,"message_id":456,"read_by":6,"n":12}',
        ),
        (
            chatd.TypingSign(3, 5, is_typing=True),
            '{"type":"typing","chat_id":3,"user_id":5,"is_typing":true}',
        ),
        (
            chatd.ChatAdded(5122, 9, CHAT),
            '{"type":"chat_added","seq":5122,"chat_id":9,"chat":{"id":9,"title":"Sofa",'
            '"members":[],"last_n":0,"last_message":null,"direct":false,'
            '"created_by":6,"member_count":51}}',
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
def test_a_server_message_is_encoded_as_specified(
    message: chatd.ServerMessage | chatd.Event, text: str
) -> None:
    assert words_hear(chatd.text_frame(message)) == [(Opcode.TEXT, text)]


def test_an_event_keeps_its_frame_unless_it_is_a_chat_added() -> None:
    message = chatd.Entry(chatd.NewMessage(1, 3, MESSAGE), to_chat=True)
    added = chatd.Entry(chatd.ChatAdded(2, 3, CHAT), to_user=5)
    assert message.frame is message.frame
    assert added.frame == added.frame
    assert added.frame is not added.frame
    assert (message.kind, added.kind) == ("new_message", "chat_added")


# --- refusals ------------------------------------------------------------------------


# Every code and its status. `upstream`, of the proxy, may also be 504.
STATUSES = {
    "bad_json": 400, "bad_field": 400, "unknown_type": 400, "token_invalid": 401,
    "token_expired": 401, "token_used": 401, "forbidden": 403, "not_found": 404,
    "method_not_allowed": 405, "timeout": 408, "idempotency_mismatch": 409,
    "too_late": 403, "deleted": 409, "changed": 409,
    "too_large": 413, "upgrade_required": 426, "rate_limited": 429, "overloaded": 503,
    "storage_failed": 503, "internal": 500, "upstream": 502,
}  # fmt: skip


def codes_raised() -> set[str]:
    """Every code that chatd.py passes to Refusal, also from SQL."""
    source = Path(chatd.__file__).read_text("utf-8")
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    made = [call for call in calls if ast.unparse(call.func) == "Refusal"]
    codes = {code.value for call in made for code in call.args[:1]
             if isinstance(code, ast.Constant)}  # fmt: skip
    others = [ast.unparse(call) for call in made
              if not isinstance(call.args[0], ast.Constant)]  # fmt: skip
    assert {*others} == {"Refusal(*refusal.split('|'))"}  # those from SQL
    from_sql = re.findall(r"THEN '([a-z_]+)['|]", source)
    assert {"too_late", "idempotency_mismatch"} <= {*from_sql}
    return {str(code) for code in codes} | {*from_sql}


def test_the_table_of_refusals_is_as_specified_and_every_code_is_in_use() -> None:
    table = {code: status for code, (status, _) in chatd.REFUSALS.items()}
    assert {code: table.get(code) for code in STATUSES} == STATUSES
    assert codes_raised() <= {*table}
    assert {*STATUSES} <= codes_raised()


def test_a_refusal_has_the_sentence_of_its_table_unless_given_another() -> None:
    usual, better = Refusal("too_large"), Refusal("too_large", "too long", status=431)
    assert (usual.status, usual.message) == (413, "the request is too large")
    assert (better.status, better.message, better.headers) == (431, "too long", {})
    assert str(better) == "too_large: too long"


# --- whole process: wrong commands ---------------------------------------------------


async def test_a_wrong_command_gets_an_error_and_the_connection_stays_open(
    either_server: ServerProcess,
) -> None:
    server = either_server
    user = next(new_users)
    chat = await server.chat(user)
    peer = await server.peer(user)
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
            await peer.send_command(kind, **wrong)
            error = await peer.receive("error")
            seen = (kind, str(wrong)[:200], error)
            assert error["code"] == "bad_field", seen
            assert name in error["message"], seen
            assert error["ref"] == "r1", seen
    refs: list[object] = [3, True, [], {}]
    for ref in (*refs, "x" * 65):
        await peer.send_command("ping", ref=ref)
        error = await peer.receive("error")
        assert error["code"] == "bad_field", (ref, error)
        assert "ref" in error["message"], (ref, error)
    await peer.send_command(
        "ping", ref="x" * 64, unknown={"fields": ["are", "ignored"]}
    )
    assert (await peer.receive("pong"))["ref"] == "x" * 64
    for kind in ("nothing", "", "PING", "connected", "new_message"):
        await peer.send_command(kind, ref="r2")
        error = await peer.receive("error")
        assert error["code"] == "unknown_type", (kind, error)
        assert error["ref"] == "r2"
    for kind in ("{}", '{"type": 3}', '{"type": null}', '{"chat_id": 3}'):
        await peer.send_frame(kind)
        assert (await peer.receive("error"))["code"] in {"unknown_type", "bad_field"}, (
            kind
        )
    say = '{"type":"send_message","chat_id":%s,"content":%s}'
    bad = ["", " ", "{", "}", "[]", "3", '"ping"', "null", "true", '{"type":"ping"}}']
    bad += ["[" * 30000, '{"type":"ping","x":' + "[" * 30000, "NaN", '{"type":"ping"']
    bad += [say % ("NaN", '"c"'), say % ("-Infinity", '"c"'), "{'type':'ping'}"]
    bad += [say % (chat, '"' + "a\nb" + '"')]
    for text in bad:
        await peer.send_frame(text)
        error = await peer.receive("error")
        assert error["code"] == "bad_json", (text[:60], error)
    for text in (say % ("1e999", '"c"'), say % (chat, r'"\ud800"')):
        await peer.send_frame(text)
        error = await peer.receive("error")
        assert error["code"] in {"bad_json", "bad_field"}, (text, error)
    await peer.send_frame(b'{"type":"ping"}', opcode=2)
    assert (await peer.receive("error"))["code"] == "bad_json"
    await peer.receives_nothing()
    assert await server.history(chat, user) == []
    await peer.ask("send_message", chat_id=chat, content="x" * 4000)


@pytest.mark.parametrize("size", [125, 126, 65_535, 65_536])
def test_a_frame_is_the_one_that_wsproto_makes(size: int) -> None:
    empty = len(chatd.encode(chatd.Ack("")))
    message = chatd.Ack("x" * (size - empty))
    assert len(chatd.encode(message)) == size
    by_wsproto = FrameProtocol(client=False, extensions=[]).send_data(
        chatd.encode(message).decode()
    )
    assert chatd.text_frame(message) == bytes(by_wsproto)
