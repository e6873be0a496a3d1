"""bench/: what it publishes, and what it compares."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.test_capacity import CROWD, RESULTS  # skips where bench/ is not here

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
capacity, peer, quiet, ratios, report, run, workload = map(
    importlib.import_module,
    ("capacity", "peer", "quiet", "ratios", "report", "run", "workload"),
)
sys.path.remove(str(ROOT / "bench"))

TICKS = os.sysconf("SC_CLK_TCK")


def stat(work: float, *, rest: float = 0) -> str:
    """Write /proc/stat after so many seconds of work, and of idle time and iowait."""
    part = int(work * TICKS / 4)
    user, nice, system, irq, softirq, steal = part, 0, part, part, 0, part
    idle = iowait = int(rest * TICKS)
    guest = user  # all user time is that of virtual machines: user time includes it
    fields = (user, nice, system, idle, iowait, irq, softirq, steal, guest, 0)
    return f"cpu  {' '.join(map(str, fields))}\ncpu0 1 2 3 4 5 6 7 8 9 10\n"


class Machine:
    """A machine: how many cores work in each period that the benchmark looks at."""

    def __init__(self, *busy: float) -> None:
        self.busy = iter(busy)
        self.worked = 1000.0
        self.slept: list[float] = []

    def read(self) -> str:
        return stat(self.worked, rest=10 * sum(self.slept))

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.worked += seconds * next(self.busy)


# --- a quiet machine ------------------------------------------------------------------


def test_work_is_what_is_neither_idle_nor_iowait_and_guest_time_counts_once() -> None:
    assert quiet.worked(stat(40, rest=700)) == 40
    machine = Machine(1.2)
    assert quiet.busy_cores(machine.read, machine.sleep) == pytest.approx(1.2)


def test_this_machine_has_a_stat_that_can_be_read() -> None:
    assert quiet.worked(quiet.read_stat()) >= 0


def test_a_quiet_machine_is_measured_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine = Machine(0.2)
    assert quiet.wait(machine.read, machine.sleep) == pytest.approx(0.2)
    assert machine.slept == [quiet.LOOK_SECONDS]
    assert not capsys.readouterr().out


def test_a_round_waits_until_the_machine_is_quiet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine = Machine(1.6, 0.8, 0.4, 1.6)
    assert quiet.wait(machine.read, machine.sleep) == pytest.approx(0.4)
    assert len(machine.slept) == 3
    first, second = capsys.readouterr().out.splitlines()
    assert first == "1.6 cores are busy; waiting for less than 0.5"
    assert second.startswith("0.8 cores")


def test_the_wait_has_an_end_and_returns_the_load(
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine = Machine(*[2.0] * 1000)
    assert quiet.wait(machine.read, machine.sleep) == pytest.approx(2)
    assert sum(machine.slept) == quiet.PATIENCE_SECONDS + quiet.LOOK_SECONDS
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "2.0 cores are still busy; measuring all the same"


def results(*runs: dict[str, Any], rounds: int = 1) -> dict[str, Any]:
    """Make the results of a comparison."""
    plan = workload.dataclasses.asdict(workload.BESIDE)
    return {"plan": {**plan, "rounds": rounds}, "runs": list(runs)}


@pytest.mark.parametrize(
    ("loads", "said"),
    [
        ([0.1, 0.49], ""),
        ([0.1, 0.5], "0.5 cores were busy with something else when round 2 began"),
        ([1.24, 0.1], "1.2 cores were busy with something else when round 1 began"),
        ([0.1], "not every round has a record"),
        (None, "not every round has a record"),
    ],
)
def test_what_cannot_be_published_and_why(loads: list[float] | None, said: str) -> None:
    measured = results(rounds=2)
    if loads is not None:
        measured["loads"] = loads
    why = quiet.refusal(measured)
    assert why.startswith(said)
    assert bool(why) == bool(said)
    if why:
        assert why.endswith("measure again: python bench/run.py --full")


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let the benchmark publish into a folder of the test."""
    for module, name in ((report, "speed.md"), (capacity, "capacity.md")):
        page = tmp_path / name
        page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
        monkeypatch.setattr(module, "PAGE", page)
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(run, "HERE", tmp_path)
    return tmp_path


def publish(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    loads: list[float] | None,
    *,
    interrupted: bool = False,
    more: Sequence[dict[str, Any]] = (*RESULTS["runs"], CROWD),
) -> None:
    """Run `--report` with the figures of three rounds; the last may be incomplete."""
    crowd = {"workload": "flight", "peer": "chatd", "count": 1000, "seconds": 1.0}
    measured = {
        "plan": workload.dataclasses.asdict(workload.FULL),
        "machine": {"cpu": "Z80", "cores": 1, "system": "CP/M"},
        **{"date": "today", "command": "run.py", "versions": {"chatd": "2"}},
        **({} if interrupted else {"took_seconds": 9}),
        "runs": [
            *more,
            *(
                {**crowd, "round": turn, "case": case, "cpu": 0.1 + turn / 100}
                for turn in range(3)
                for case in ("1", "32")
            ),
        ],
    }
    if loads is not None:
        measured["loads"] = loads
    file = folder / "figures.json"
    file.write_text(json.dumps(measured))
    monkeypatch.setattr(sys, "argv", ["run.py", "--report", str(file)])
    run.main()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ('{"a": 1}', "not the results"),
    ],
)
def test_another_file_than_that_of_a_run_is_named(
    tmp_path: Path, text: str | None, why: str
) -> None:
    file = tmp_path / "figures.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit, match=f"figures.json.* {why}"):
        report.read(file)


@pytest.mark.parametrize("loads", [None, [], [0.1, 0.1, 0.7]])
def test_report_refuses_the_figures_of_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch, published: Path, loads: list[float] | None
) -> None:
    pages = published / "speed.md", published / "capacity.md"
    before = [page.read_text() for page in pages]
    with pytest.raises(SystemExit, match=r"^run.py: .* is not published: ") as ended:
        publish(monkeypatch, published, loads)
    assert isinstance(ended.value.code, str)  # Python prints it, and exits with 1
    assert "measure again" in ended.value.code
    assert [page.read_text() for page in pages] == before
    assert not (published / "chart.svg").exists()


def test_report_writes_the_figures_of_a_quiet_machine_and_says_how_quiet(
    monkeypatch: pytest.MonkeyPatch, published: Path
) -> None:
    publish(monkeypatch, published, [0.02, 0.31, 0.04])
    page = (published / "speed.md").read_text()
    assert "medians of 3 rounds, typically ±9 %" in page
    assert "at most 0.31 cores busy with anything else before a round" in page
    assert page.startswith(f"before\n{report.BEGIN}\n\nOn ")
    assert page.endswith(f"\n\n{report.END}\nafter\n")
    assert (published / "chart.svg").read_text().startswith("<svg")
    page = (published / "capacity.md").read_text()
    assert "by `run.py`; at most 0.31 cores busy with anything else before" in page
    assert page.startswith(f"before\n{report.BEGIN}\n\nOn ")
    assert page.endswith(f"\n\n{report.END}\nafter\n")


def test_without_the_costs_report_writes_speed_md_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, published: Path
) -> None:
    with pytest.raises(SystemExit, match=r"capacity\.md stays as it was: no case"):
        publish(monkeypatch, published, [0.1, 0.1, 0.1], more=())
    assert "\nold\n" not in (published / "speed.md").read_text()
    assert "\nold\n" in (published / "capacity.md").read_text()


def test_columns_of_words_are_left_and_columns_of_numbers_right() -> None:
    table = [["", "CPU", "why"], ["a", "9.1", "so"], ["b", "none", "so"]]
    assert report.markdown(table)[1] == "|---|--:|---|"


def test_a_round_that_was_interrupted_does_not_count_nor_does_its_load(
    monkeypatch: pytest.MonkeyPatch, published: Path
) -> None:
    publish(monkeypatch, published, [0.02, 0.31, 1.7], interrupted=True)
    page = (published / "speed.md").read_text()
    assert "medians of 2 rounds" in page
    assert "at most 0.31 cores busy" in page


def test_a_full_run_on_a_busy_machine_leaves_results_json_as_it_was(
    published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = published / "results.json"
    file.write_text("old")
    assert not run.release({**results(), "loads": [0.9]})
    assert file.read_text() == "old"
    assert "results.json stays as it was: 0.9 cores" in capsys.readouterr().out
    assert run.release({**results(), "loads": [0.1]})
    assert json.loads(file.read_text())["loads"] == [0.1]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the workloads, and the look at the machine, by ones that are recorded."""
    events: list[str] = []

    def work(*_: object) -> Iterator[tuple[str, dict[str, Any]]]:
        events.append("work")
        yield "case", {"count": 1}

    def wait() -> float:
        events.append("wait")
        return len(events) / 100

    monkeypatch.setattr(workload, "build_load", lambda: None)
    monkeypatch.setitem(workload.WORKLOADS, "work", work)
    monkeypatch.setattr(quiet, "wait", wait)
    return events


@pytest.mark.parametrize("wait", [True, False])
def test_each_round_looks_at_the_machine_first_and_a_quick_run_never(
    events: list[str], tmp_path: Path, wait: bool
) -> None:
    side = peer.Peer("chatd", "chatd", "", lambda: ([], "1"))
    plan = workload.dataclasses.replace(workload.QUICK, rounds=2)
    path = tmp_path / "results.json"
    run.measure(plan, [side], ["work"], path, wait=wait)
    assert events == (["wait", "work"] * 2 if wait else ["work"] * 2)
    loads = [0.01, 0.03] if wait else []
    assert json.loads(path.read_text())["loads"] == loads


# --- what is compared -----------------------------------------------------------------


def pair(workload: str, case: str, this: dict[str, Any], **before: float) -> Any:
    """Make the runs of both versions, which differ in the fields of `before`."""
    where = {"round": 0, "workload": workload, "case": case}
    yield {**where, "peer": "chatd", **this}
    yield {**where, "peer": "before", **this, **before}


def judged(*runs: dict[str, Any]) -> dict[str, Any]:
    """Return each figure that was found: before, this."""
    kinds = {run["workload"] for run in runs}
    found = ratios.measures(results(*runs), kinds)
    return {name: (each.before, each.this) for name, each in found.items() if each}


def test_a_lone_message_is_two_deliveries() -> None:
    run = {"count": 2000, "cpu": 0.5, "seconds": 4.0}
    found = judged(*pair("lone", "lone", run, cpu=0.8))
    assert found == {"us a lone message, a chat of 2": pytest.approx((800, 500))}


def test_a_rate_is_compared_as_the_time_for_each_so_that_less_is_better() -> None:
    chats = {"count": 40_000, "cpu": 3.9, "seconds": 4.0}  # 5,000 messages a second
    posted = {"count": 8000, "cpu": 3.0, "seconds": 4.0}
    found = judged(
        *pair("pairs", "flat out", chats, count=20_000),
        *pair("posts", "posts", posted, count=4000),
    )
    each = "us of time a message, 200 chats of 2"
    assert found[each] == pytest.approx((400, 200))
    assert found["us of time a post"] == pytest.approx((1000, 500))


def test_a_returning_crowd_is_compared_by_its_time_and_by_the_cpu_of_a_client() -> None:
    crowd = {"count": 1000, "cpu": 1.2, "seconds": 1.3}
    runs = [*pair("storm", "storm", crowd, cpu=1.5, seconds=2.0)]
    assert judged(*runs) == {
        "us of CPU a returning client": pytest.approx((1500, 1200)),
        "s until 1,000 are back": (2.0, 1.3),
    }
    assert not judged({**runs[0], "repeated": 3}, runs[1])


# --- instructions ---------------------------------------------------------------------

SHAKE = {"count": 100, "cpu": 0.2, "seconds": 1.0, "instructions": None}
LONE = {"count": 2000, "cpu": 0.5, "seconds": 4.0, "instructions": None}


def test_instructions_are_compared_and_listed_where_they_are_counted() -> None:
    run = {**LONE, "instructions": 6_000_000_000, "p50_ms": 1}
    runs = [*pair("lone", "lone", run, instructions=8_000_000_000)]
    name = "thousand instructions a lone message, a chat of 2"
    assert judged(*runs)[name] == (8000, 6000)
    text = report.text(results(*runs))
    _, _, table = text.partition("thousand instructions of the server\n")
    head, row, *_ = table.splitlines()
    assert head.split()[:3] == ["a", "lone", "message"]
    assert row.split()[:2] == ["chatd", "6,000"]
    assert "not counted" not in text


def test_where_instructions_are_not_counted_one_line_says_why() -> None:
    runs = [*pair("handshakes", "shake", SHAKE)]
    assert not any("instructions" in name for name in judged(*runs))
    lines = report.text(results(*runs)).splitlines()
    told = [line for line in lines if "instructions" in line]
    assert len(told) == 1
    assert told[0].startswith("instructions: not counted: ")


def test_a_run_without_counts_is_none_beside_runs_that_have_them() -> None:
    assert report.shown(report.thousands(SHAKE)) == "none"
    assert report.thousands({"count": 2000, "instructions": 5_000_000}) == 2.5
