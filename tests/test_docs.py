"""README, docs/, pyproject.toml and the unit file agree with chatd.py."""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import chatd
from chatd import Settings
from tests.client import WAIT_SECONDS, node_path
from tests.harness import KEY_PARTS, certificate_of, jwk_of, new_private_key

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "tour/README.md",
    )
}
README = DOCUMENTS["README.md"]
EMBEDDING = DOCUMENTS["docs/embedding.md"]
OPERATING = DOCUMENTS["docs/operating.md"]
PROTOCOL = DOCUMENTS["docs/protocol.md"]


def blocks(document: str, language: str) -> list[str]:
    """All code blocks of a language, in order."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", document)


def section(document: str, heading: str) -> str:
    """The text under a heading, with its subsections."""
    level = len(heading.partition(" ")[0])
    _, _, rest = f"\n{document}".partition(f"\n{heading}\n")
    assert rest, f"there is no {heading}"
    return re.split(rf"(?m)^#{{1,{level}}} ", rest)[0]


# --- README and docs/ as documents ---------------------------------------------------


def test_the_readme_is_short_and_links_to_every_document() -> None:
    assert len(README.splitlines()) <= 250
    for name in DOCUMENTS.keys() - {"README.md"}:
        assert f"]({name}" in README, name


def anchors(document: str) -> set[str]:
    """The anchors that GitHub makes from the headings of a document."""
    prose = re.sub(r"(?ms)^```.*?^```$", "", document)
    titles = re.findall(r"(?m)^#+ (.+)$", prose)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_has_a_target(name: str) -> None:
    prose = re.sub(r"(?ms)^```.*?^```$", "", DOCUMENTS[name])
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), link


def test_the_readme_installs_the_service_as_operating_md_does() -> None:
    (block,) = (text for text in blocks(README, "sh") if "/opt/chatd" in text)
    assert block in blocks(OPERATING, "sh")


def shown_commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of chatd in a code block: its document and arguments."""
    for name, document in DOCUMENTS.items():
        for block in (*blocks(document, "sh"), *blocks(document, "ini")):
            lines = re.sub(r"\$\([^)]*\)", "X", block.replace("\\\n", " "))
            for part in re.split(r"&&|\|\||[\n|;>]", lines):
                call = re.match(
                    r"\s*(?:sudo |ExecStart=)?(?:\S+/bin/)?chatd (.*)", part
                )
                if call:
                    yield name, shlex.split(call[1], comments=True)


def test_every_command_line_in_the_documents_is_valid() -> None:
    shown, seen = list(shown_commands()), set()
    for _, words in shown:
        seen.add(chatd.make_parser().parse_args(words).command)
    commands = {"serve", "proxy", "token", "backup", "restore", "check", "export"}
    assert seen == commands
    assert {name for name, _ in shown} >= {"README.md", "docs/operating.md"}
    assert len(shown) >= 15


# --- docs/protocol.md ----------------------------------------------------------------


def json_values(block: str) -> list[Any]:
    """The JSON values of a block, in order; each may span lines."""
    decoder, values, rest = json.JSONDecoder(), [], block.strip()
    while rest:
        value, end = decoder.raw_decode(rest)
        values.append(value)
        rest = rest[end:].lstrip()
    return values


def tag_of(kind: type[msgspec.Struct]) -> str:
    return str(kind.__struct_config__.tag)


def server_messages() -> dict[str, type[msgspec.Struct]]:
    events = {tag: kind for tag, (kind, _) in chatd.KINDS.items()}
    return events | {
        tag_of(kind): kind
        for kind in chatd.ServerMessage.__subclasses__()
        if kind is not chatd.Event
    }


def test_every_command_is_documented_and_its_example_is_valid() -> None:
    (block,) = blocks(section(PROTOCOL, "### Commands"), "json")
    shown = json_values(block)
    for value in shown:
        command = chatd.COMMANDS.decode(json.dumps(value))
        fields = {f.encode_name for f in msgspec.structs.fields(command)}
        assert value.keys() <= fields | {"type"}, value
    tags = [tag_of(kind) for kind in chatd.Command.__subclasses__()]
    assert sorted(value["type"] for value in shown) == sorted(tags)
    rows = re.findall(r"(?m)^\| `(\w+)` \|", section(PROTOCOL, "### Commands"))
    assert sorted(rows) == sorted(tags)


def test_every_server_message_is_documented_and_its_example_is_valid() -> None:
    (block,) = blocks(section(PROTOCOL, "### Server messages"), "json")
    shown, kinds = json_values(block), server_messages()
    for value in shown:
        message = msgspec.json.decode(json.dumps(value), type=kinds[value["type"]])
        # It encodes to the example again: no field is unknown, and none is missing.
        assert json.loads(chatd.encode(message)) == value
    assert sorted(value["type"] for value in shown) == sorted(kinds)


def test_the_example_of_an_error_is_valid() -> None:
    (block,) = blocks(section(PROTOCOL, "## Errors"), "json")
    (value,) = json_values(block)
    error = value["error"]
    refusal = chatd.Refusal(error["code"], retry_after=error["retry_after"])
    assert json.loads(chatd.refusal_answer(refusal).body) == value


def test_the_table_of_errors_has_every_refusal_with_its_status() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)` \| (\d+)", section(PROTOCOL, "## Errors"))
    table = {code: int(status) for code, status in rows}
    assert len(rows) == len(table)
    assert table == {code: status for code, (status, _) in chatd.REFUSALS.items()}


def test_the_table_of_requests_has_every_route_with_its_token() -> None:
    tokens = {
        "in the query": "anyone", "none": "anyone", "user": "user",
        "sign-in link or session": "signin", "session": "session",
        "none, or user": "guest", "scope `service`": "service",
        "scope `stats`": "stats",
    }  # fmt: skip
    rows = re.findall(
        r"(?m)^\| `([A-Z]+) (/\S*?)(?:\?\S*)?`.*? \| (.*?) \| .+ \|$",
        section(PROTOCOL, "## HTTP requests"),
    )
    table = {
        (method, re.sub(r"\b(ID|USER)\b", "*", path)): tokens[token]
        for method, path, token in rows
    }
    assert len(rows) == len(table)
    assert table == {
        (method, path): route.who
        for path, methods in chatd.ROUTES.items()
        for method, route in methods.items()
        if path not in chatd.PAGE_FILES and method not in ("HEAD", "OPTIONS")
    }


def test_the_table_of_close_codes_has_every_code_that_chatd_sends() -> None:
    rows = re.findall(r"(?m)^\| ([\d, ]+) \|", section(PROTOCOL, "### Close codes"))
    table = {int(code) for row in rows for code in row.split(",")}
    ours = {
        code for name, code in vars(chatd).items()
        if name.startswith("CLOSE_") and isinstance(code, int)
    }  # fmt: skip
    assert table == ours | {1002, 1007}  # the WebSocket library sends those two


# --- docs/operating.md ---------------------------------------------------------------


def log_lines() -> set[tuple[str, str, tuple[str, ...]]]:
    """Every log line that chatd.py can write: its level, verb and fields."""
    tree = ast.parse(Path(chatd.__file__).read_text("utf-8"))
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        match ast.unparse(node.func), node.args:
            case "log", [level, ast.Constant(value=verb), *_]:
                fields = tuple(word.arg or "..." for word in node.keywords)
                name = ast.unparse(level).removeprefix("logging.").lower()
                found.add((name, str(verb), fields))
            case "log_bug", [ast.Constant(value=verb), *_]:
                found.add(("error", str(verb), ("error", "at")))
            case name, [ast.Constant(value=verb), *_] if name.endswith(".warn"):
                found.add(("warning", str(verb), ("why", "open")))
    return found


def test_the_table_of_log_lines_has_every_line_that_chatd_can_write() -> None:
    lines = section(OPERATING, "### Log lines")
    rows = re.findall(r"(?m)^\| `(\w+)` \| (\w+) \| (.*?) \| .+ \|$", lines)
    table = {
        (level, verb, tuple(re.findall(r"`(.*?)`", fields)))
        for verb, level, fields in rows
    }
    assert table == log_lines()
    assert [row[0] for row in rows] == sorted({row[0] for row in rows})


def settings_table() -> str:
    """Make the table of settings from Settings."""
    rows = ["| flag | default | what it is for | consequence |", "|---|---|---|---|"]
    for field in chatd.FLAGS:
        unit, why, over = field.metadata.values()
        flag = f"--{field.name.replace('_', '-')} {unit}"
        default = chatd.shown(field.default)
        rows.append(f"| `{flag}` | {default and f'`{default}`'} | {why} | {over} |")
    return "\n".join(rows)


def test_the_table_of_settings_has_a_row_for_every_flag() -> None:
    assert (
        "\n| `--sends RATE/BURST` | `5/20` | messages and changes" in settings_table()
    )
    assert settings_table() in section(OPERATING, "## Settings")


def unit_of(name: str) -> list[tuple[str, str]]:
    """The settings of a unit file, in order."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return [
        (key, value)
        for key, equals, value in (line.partition("=") for line in lines)
        if equals and not key.startswith("#")
    ]


def test_the_proxy_has_the_sandbox_of_the_server() -> None:
    units = [unit_of(name) for name in ("chatd.service", "chatd-proxy.service")]
    server, proxy = (unit[unit.index(("NoNewPrivileges", "yes")) :] for unit in units)
    assert server == proxy
    assert len(server) > 30
    proxy_unit = dict(units[1])
    limit = 2 * (Settings().max_connections + 256)
    assert int(proxy_unit["LimitNOFILE"]) == limit
    assert proxy_unit["ExecStart"] == "/opt/chatd/bin/chatd proxy"


def test_an_instance_differs_from_the_server_only_where_it_must() -> None:
    server, instance = map(unit_of, ("chatd.service", "chatd@.service"))
    for setting in (
        ("Description", "chatd, a real-time chat server"),
        ("After", "network.target"),
        # A socket unit keeps the socket.
        ("FileDescriptorStoreMax", "8"),
        ("StateDirectory", "chatd"),
        # An instance has no network.
        ("RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX"),
        ("IPAddressAllow", "localhost"),
    ):
        server.remove(setting)
    for setting in (
        ("Description", "chatd, a real-time chat server, for %i"),
        ("Requires", "chatd@%i.socket"),
        ("After", "chatd@%i.socket"),
        # Without it, all instances would be the same user, and that of chatd.service.
        ("User", "chatd_%i"),
        ("StateDirectory", "chatd@%i"),
        ("PrivateNetwork", "yes"),
        ("RestrictAddressFamilies", "AF_UNIX"),
    ):
        instance.remove(setting)
    assert server == instance


def test_the_socket_of_an_instance_is_that_of_the_documents() -> None:
    shown = [text for text in blocks(OPERATING, "ini") if "ListenStream=" in text]
    lines = "".join(shown).splitlines()
    for key, value in unit_of("chatd@.socket"):
        if key in ("SocketMode", "SocketGroup", "Backlog"):
            assert f"{key}={value}" in lines
    assert ("ListenStream", "/run/chatd@%i.sock") in unit_of("chatd@.socket")
    for name in ("club", "shop"):
        assert f"http://unix:/run/chatd@{name}.sock;" in OPERATING


def test_the_numbers_in_the_unit_file_fit_the_settings() -> None:
    unit = dict(unit_of("chatd.service"))
    settings = Settings()
    assert int(unit["LimitNOFILE"]) == settings.max_connections + 256
    assert float(unit["TimeoutStopSec"]) >= 2 * settings.drain_seconds
    assert float(unit["WatchdogSec"]) > chatd.COMMIT_SECONDS + 10
    assert int(unit["FileDescriptorStoreMax"]) >= 2
    assert unit["ExecStart"] == "/opt/chatd/bin/chatd serve"


def test_the_inline_metadata_matches_pyproject_toml() -> None:
    source = (ROOT / "chatd.py").read_text("utf-8")
    block = re.search(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", source)
    assert block, "chatd.py has lost its PEP 723 block"
    inline = tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert inline == {key: project[key] for key in ("requires-python", "dependencies")}


@pytest.mark.parametrize("code", sorted(chatd.REFUSALS))
def test_every_refusal_has_a_status_and_a_sentence(code: str) -> None:
    status, sentence = chatd.REFUSALS[code]
    assert 400 <= status < 600
    assert len(sentence) > 10


# --- docs/embedding.md ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RS256", "ES256", "EdDSA"])
def test_the_documented_commands_that_convert_a_key_to_pem_work(
    kind: str, tmp_path: Path
) -> None:
    private, path = new_private_key(kind), tmp_path / "key.pem"
    public = private.public_key()
    der, line = (public.public_bytes(*KEY_PARTS[part]) for part in (
        "SubjectPublicKeyInfo", "OpenSSH"
    ))  # fmt: skip
    (block,) = re.findall(r"(?s)```sh\n([^`]*load_ssh_public_key.*?)```", EMBEDDING)
    block = block.replace(".venv/bin/python", sys.executable)
    commands = re.findall(r"`(openssl .*?)`", EMBEDDING)
    assert len(commands) == 2
    first, last = b"-----BEGIN PUBLIC KEY-----\n", b"\n-----END PUBLIC KEY-----"
    ways: list[tuple[str, bytes]] = [
        (block, json.dumps(jwk_of(private)).encode()), (block, line),
        ("cat key.txt > key.pem", first + base64.b64encode(der) + last),
    ]  # fmt: skip
    for command in (command.replace("FILE", "key.txt") for command in commands):
        if "x509" in command:
            ways.append((f"{command} -inform DER", certificate_of(private)))
        else:
            ways.append((command, der))
    for command, text in ways:
        path.unlink(missing_ok=True)
        (tmp_path / "key.txt").write_bytes(text)
        subprocess.run(
            ["bash", "-euc", command], cwd=tmp_path, check=True, timeout=WAIT_SECONDS
        )
        assert chatd.read_jwt_key(path).algorithm == kind, command


@pytest.fixture
def example_server(tmp_path: Path) -> Iterator[str]:
    """The address of a server with the key of the examples, in tmp_path."""
    (tmp_path / "backend.key").write_text("0123456789abcdef" * 4 + "\n")
    command = [sys.executable, "-m", "chatd", "serve", "--jwt-key=backend.key"]
    with subprocess.Popen(
        [*command, "--listen=127.0.0.1:0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.terminate()
        assert process.wait(20) == 0


def run_example(command: list[str], server: str, folder: Path) -> str:
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


def test_the_python_example_works_unchanged(
    example_server: str, tmp_path: Path
) -> None:
    block, _ = blocks(EMBEDDING, "python")
    (tmp_path / "backend.py").write_text(block, "utf-8")
    out = run_example([sys.executable, "backend.py"], example_server, tmp_path)
    assert "'content': 'Still for sale?'" in out
    assert "'duplicate': False" in out


def test_the_example_that_reads_the_feed_works_unchanged(
    example_server: str, tmp_path: Path
) -> None:
    first, block = blocks(EMBEDDING, "python")
    (tmp_path / "backend.py").write_text(first, "utf-8")
    (tmp_path / "feed.py").write_text(block, "utf-8")
    words = ["-m", "chatd", "token", "7", "--scope", "service"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CHATD": example_server}
    token = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True,
        check=True,
    ).stdout.strip()  # fmt: skip
    env["CHATD_TOKEN"], saved = token, tmp_path / "cursor.txt"

    def wait_for_a_cursor(after: str = "") -> None:
        while not saved.exists() or saved.read_text() in ("", after):
            assert process.poll() is None
            time.sleep(0.01)

    for _ in range(2):  # the second one goes on after the first one's last message
        with subprocess.Popen(
            [sys.executable, "feed.py"],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            wait_for_a_cursor()
            before = saved.read_text()
            run_example([sys.executable, "backend.py"], example_server, tmp_path)
            assert process.stdout is not None
            assert re.fullmatch(r"\d+ Still for sale\?\n", process.stdout.readline())
            wait_for_a_cursor(before)
            process.kill()
            assert process.stdout.read() == ""


def test_the_node_example_works_unchanged(example_server: str, tmp_path: Path) -> None:
    node = node_path()
    (block,) = blocks(EMBEDDING, "js")
    (tmp_path / "backend.mjs").write_text(block, "utf-8")
    out = run_example([node, "backend.mjs"], example_server, tmp_path)
    assert "content: 'Still for sale?'" in out
    assert "duplicate: false" in out


def test_chatd_accepts_the_token_of_the_example_in_the_readme(
    example_server: str, tmp_path: Path
) -> None:
    (block,) = blocks(README, "python")
    line = '\nprint(chat_token(6, "Anna"))\n'
    (tmp_path / "signing.py").write_text(block + line, "utf-8")
    token = run_example(
        [sys.executable, "signing.py"], example_server, tmp_path
    ).strip()
    request = urllib.request.Request(
        f"{example_server}/api/v1/me", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as answer:
        me = json.load(answer)
    assert (me["user_id"], me["name"]) == (6, "Anna")
    assert me["server"]["rename"] is False


# --- the test command ----------------------------------------------------------------


@pytest.mark.parametrize("selected", ["browser", "not browser"])
def test_a_library_that_playwright_lacks_is_named_once_before_any_test(
    selected: str, tmp_path: Path
) -> None:
    missing = "error while loading shared libraries: libatomic.so.1: cannot open"
    node, chromium = tmp_path / "node", tmp_path / "chromium"
    for path, script in (
        (node, f"echo 'node: {missing}' >&2; exit 127"),
        (chromium, ""),
    ):
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    more = {"CHROMIUM": str(chromium), "PLAYWRIGHT_NODEJS_PATH": str(node)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", selected,
         "tests/test_page.py", "tests/test_docs.py"],
        cwd=ROOT, env={**os.environ, **more}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if selected == "browser":
        assert done.returncode == pytest.ExitCode.USAGE_ERROR, done
        assert done.stderr.count(missing) == 1, done
        assert "apt install libatomic1" in done.stderr
    else:
        assert done.returncode == 0, done


# --- docs/proofs.md ------------------------------------------------------------------


@pytest.mark.skipif(not (ROOT / "torture").is_dir(), reason="torture/ is not here")
def test_the_table_of_proofs_has_the_claim_of_every_proof() -> None:
    _, _, rest = DOCUMENTS["docs/proofs.md"].partition("<!-- torture: begin -->\n")
    rows = re.findall(
        r"(?m)^\| (.+?) \| .+ \|$", rest.partition("<!-- torture: end")[0]
    )
    claims = set()
    for path in (ROOT / "torture").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Assign([ast.Name("CLAIM")], ast.Constant(str(claim))):
                    claims.add(claim)
                case ast.Call(ast.Name("Figures"), [ast.Constant(str(claim)), *_]):
                    claims.add(claim)
    assert set(rows[1:]) == claims
    assert len(rows) == len(claims) + 1
