"""README, pyproject.toml, the unit file and chatd.py say the same."""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import chatd
from chatd import Settings
from tests.harness import (
    DOOR_SECONDS,
    KEY_PARTS,
    door_node,
    rules_certificate,
    rules_jwk,
    rules_private,
)

# --- refusals, log, stats ------------------------------------------------------------


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


PAPERS = Path(__file__).resolve().parents[1]
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
