"""Fixtures that the tests of more than one file use."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.client import CHROMIUM, MISTAKE, ProxyProcess, ServerProcess
from tests.harness import STORES, Memory


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say once why the page cannot be tested, instead of failing with each test.

    Playwright brings a Node that needs a library which a small Debian does not have.
    """
    wanted = any(item.get_closest_marker("browser") for item in items)
    package = importlib.util.find_spec("playwright")
    if not wanted or not package or not any(shutil.which(n or "") for n in CHROMIUM):
        return  # the tests of the page are skipped
    bundled = Path(str(package.origin)).with_name("driver") / "node"
    node = os.environ.get("PLAYWRIGHT_NODEJS_PATH") or str(bundled)
    done = subprocess.run([node, "-v"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise pytest.UsageError(
            "the tests of the page need Playwright, whose Node does not start:\n"
            f"{done.stderr.strip()}\n"
            "On Debian: apt install libatomic1. To leave these tests out: "
            "-m 'not browser'"
        )


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset the variables that chatd reads; keep lines of `--help` unbroken."""
    for name in [*os.environ]:
        if name.startswith(("CHATD_", "STATE_DIR", "CREDENTIALS_DIR", "JOURNAL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture(autouse=True)
def stores_end() -> Iterator[None]:
    """Close the stores that a test left open: Python 3.13 and later warn of them."""
    yield
    while STORES:
        STORES.pop().close()


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    made = Memory(tmp_path)
    yield made
    made.store.close()


@pytest.fixture
def server(tmp_path: Path) -> ServerProcess:
    """A server of the test's own. Start it: `async with server.serving(...)`."""
    return ServerProcess(tmp_path)


@pytest.fixture(scope="module")
def shared_server_process(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    """One server process, without rates, for the tests of a file."""
    server = ServerProcess(tmp_path_factory.mktemp("door"))
    server.flags = server.open
    server.start()
    yield server
    assert server.end(signal.SIGTERM) == 0, server.output
    assert not MISTAKE.search(server.output), server.output


@pytest.fixture
async def shared_server(
    shared_server_process: ServerProcess,
) -> AsyncIterator[ServerProcess]:
    """The shared server, for a test that leaves it as it was."""
    server = shared_server_process
    yield server
    server.hang_up()


@pytest.fixture(scope="module")
def shared_proxy_process(
    shared_server_process: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """One proxy process in front of the shared server."""
    server = shared_server_process
    proxy = ProxyProcess(tmp_path_factory.mktemp("proxy"), server.port, server.db)
    proxy.flags = (*proxy.open, "--log-level=debug")
    proxy.start()
    yield proxy
    assert proxy.end(signal.SIGTERM) == 0, proxy.output
    assert not MISTAKE.search(proxy.output), proxy.output
    assert "eyJ" not in proxy.output, "a token in the log"


@pytest.fixture(params=["straight", "by proxy"])
async def either_server(
    request: pytest.FixtureRequest, shared_server_process: ServerProcess
) -> AsyncIterator[ServerProcess]:
    """The shared server, reached directly and through the proxy."""
    server = shared_server_process
    if request.param == "by proxy":
        server = request.getfixturevalue("shared_proxy_process")
    yield server
    server.hang_up()
