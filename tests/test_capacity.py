"""bench/capacity.py: the arithmetic of its model, and the page made from it."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
PAGE = ROOT / "docs/capacity.md"

if not (BENCH / "capacity.py").is_file():
    pytest.skip("bench/ is not here", allow_module_level=True)


@pytest.fixture(scope="module")
def capacity() -> Any:
    """The module, which finds its neighbours in bench/."""
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module("capacity")
    finally:
        sys.path.remove(str(BENCH))


def run(workload: str, case: str, **fields: float) -> dict[str, Any]:
    place = {"round": 0, "workload": workload, "peer": "chatd", "case": case}
    return {**place, **fields}


def talk(case: str, messages: int, us: float, **fields: float) -> dict[str, Any]:
    """A case of `costs` that lasts a second; a message costs so much."""
    size = int(case.split()[1])
    counts = {"marks": 0, "reads": 0, "typed": 0, "signs": 0, "all_marks": 0}
    known = {"messages": messages, "sent": messages, "count": messages * size}
    cost = {"cpu": messages * us / 1e6, "commits": messages, "grown": 300 * messages}
    bytes_in = {"bytes": 200 * messages * size}
    return run("costs", case, seconds=1, **counts | known | cost | bytes_in | fields)


# A message costs 500 us alone and 100 us among many, a delivery 10 us, a sign 20 us,
# and each delivery of a sign 2 us. A mark costs 400 us and 60 us. On disk a message has
# 300 bytes with its own mark, and a mark 100; on the socket they have 200, 80 and 60.
RESULTS: dict[str, Any] = {
    "date": "2026-01-20 13:00 UTC",
    "command": "python bench/run.py --full",
    "machine": {"cpu": "A CPU", "cores": 2, "system": "Linux"},
    "runs": [
        run("idle", "1000", bytes=20_000, empty=50e6),
        run("idle", "10000", bytes=10_000, empty=50e6),
        run("idle", "quiet", cpu=0.3, seconds=30, count=10_000),
        run("idle", "stop 5000", seconds=1),
        run("handshakes", "shake", cpu=1, count=500, seconds=1),
        run("growth", "page 10000", cpu=1, count=2_000),
        run("growth", "page 1000000", cpu=1, count=1_000),
        run("costs", "fsync", seconds=0.001),
        talk("message 2 50", 50, 500 + 2 * 10),
        talk("message 50 50", 50, 500 + 50 * 10),
        talk("message 2 1000", 1000, 100 + 2 * 10, commits=250),
        talk("typing 2 50", 50, 520 + 4 * (20 + 2), typed=200, signs=200),
        talk("typing 50 50", 50, 1_000 + 4 * (20 + 49 * 2), typed=200)
        | {"signs": 200 * 49, "bytes": 200 * 50 * 50 + 60 * 200 * 49},
        talk("mark 2 50", 25, 520 + 420, marks=25, all_marks=25),
        talk("mark 2 1000", 500, 120 + 80, marks=500, all_marks=500),
        talk("mark 50 1000", 20, 1, all_marks=980, reads=49_000)
        # 20 messages of 200 bytes on disk and 120 on a socket, and the marks.
        | {"grown": 20 * 200 + 980 * 100, "bytes": 1_000 * 120 + 49_000 * 80},
    ],
}


# A run of the workload `community`.
CROWD = run(
    "community",
    "300",
    **{"seconds": 10, "cpu": 2, "memory": 60e6, "open_seconds": 1, "commits": 90},
    **{"messages": 17, "sent": 18, "count": 300, "p50_ms": 3, "p99_ms": 9},
    **{"marks": 40, "all_marks": 44, "reads": 800, "typed": 34, "signs": 600},
    **{"bytes": 200_000, "grown": 20_000, "lost": 0, "late": 2},
) | {
    "habits": {
        **{"name": "a club", "online": 1, "messages": 20, "largest_chat": 30},
        **{"watching": 0.2, "visits": 0, "typing": 2, "reconnects": 0, "daily": 1},
    }
}


@pytest.fixture(scope="module")
def costs(capacity: Any) -> Any:
    return capacity.measured(RESULTS)


def test_the_costs_come_out_of_the_results(capacity: Any, costs: Any) -> None:
    about = pytest.approx
    assert (costs.message.some, costs.message.many) == about((500, 100))
    assert (costs.mark.some, costs.mark.many) == about((400, 60))
    assert costs.delivery == about(10)
    assert (costs.typing, costs.sign) == about((20, 2))
    assert (costs.handshake, costs.visit, costs.idle) == about((2_000, 1_000, 1))
    assert (costs.commits.some, costs.commits.many) == (1, 0.25)
    assert (costs.connection_bytes, costs.empty_bytes) == (10_000, 50e6)
    assert (costs.message_bytes, costs.mark_bytes) == about((300, 100))
    on_socket = (costs.delivery_bytes, costs.mark_delivery_bytes, costs.sign_bytes)
    assert on_socket == about((200, 80, 60))


def test_a_cost_lies_on_the_line_between_its_two_rates(capacity: Any) -> None:
    cost = capacity.Cost(some=500, many=100)
    rates = (0, 50, 525, 9_000)
    assert [cost.at(rate) for rate in rates] == [500, 500, 300, 100]


def test_a_higher_rate_never_costs_less_a_second(capacity: Any) -> None:
    cost = capacity.Cost(some=500, many=100)
    spent = [rate * cost.at(rate) for rate in range(10, 5_000, 10)]
    assert spent == pytest.approx(sorted(spent))
    assert cost.at(1_000) > 100
    dearer = capacity.Cost(some=100, many=500)
    assert [dearer.at(rate) for rate in (50, 525, 1_000)] == [100, 300, 500]


def test_users_are_divided_into_chats_of_all_sizes(capacity: Any) -> None:
    assert capacity.chat_sizes(9, 4) == [2, 3, 4]
    assert capacity.chat_sizes(12, 4) == [2, 3, 4, 3]
    assert capacity.chat_sizes(10, 4) == [2, 3, 5]  # nobody is alone
    for users in range(2, 400):
        sizes = capacity.chat_sizes(users, 50)
        assert sum(sizes) == users
        assert min(sizes) >= 2


def habits(capacity: Any, **changes: float) -> Any:
    """Habits of people who do nothing, but for the changes."""
    nothing = {"online": 1, "messages": 3.6, "largest_chat": 2, "watching": 0}
    others = {"visits": 0, "typing": 0, "reconnects": 0, "daily": 0}
    return capacity.Habits("a club", **nothing | others | changes)


def test_a_message_is_delivered_and_marked_by_its_chat(capacity: Any) -> None:
    doing = capacity.activity(
        9, habits(capacity, largest_chat=4, watching=0.5, typing=2, visits=400)
    )
    # Of 9 messages, 2 go to a chat of 2, 3 to one of 3, 4 to one of 4.
    assert doing.messages == pytest.approx(0.009)
    assert doing.deliveries == pytest.approx(0.001 * (4 + 9 + 16))
    marks = 0.001 * 0.5 * (2 * 1 + 3 * 2 + 4 * 3)
    mark_deliveries = 0.001 * 0.5 * (2 * 1 * 2 + 3 * 2 * 3 + 4 * 3 * 4)
    assert doing.marks == pytest.approx(marks + 1)
    assert doing.mark_deliveries == pytest.approx(mark_deliveries + (4 + 9 + 16) / 9)
    assert doing.typing == pytest.approx(0.018)
    assert doing.signs == pytest.approx(0.002 * (2 * 1 + 3 * 2 + 4 * 3))


def test_what_is_used_is_the_sum_of_what_is_done(capacity: Any, costs: Any) -> None:
    rate = {"messages": 500, "marks": 500, "typing": 100}
    reach = {"deliveries": 5_000, "mark_deliveries": 7_000, "signs": 900}
    doing = capacity.Activity(online=1_000, visits=10, reconnects=20, **rate, **reach)
    use = capacity.used(doing, costs, stored_a_day=10)
    us = 500 * costs.message.at(1_000) + 500 * costs.mark.at(1_000)
    us += 12_000 * 10 + 100 * 20 + 900 * 2
    assert use.cpu == pytest.approx((us + 10 * 1_000 + 20 * 2_000 + 1_000 * 1) / 1e6)
    assert use.memory_bytes == pytest.approx(50e6 + 1_000 * 10_000)
    assert use.fsyncs == pytest.approx(1_000 * costs.commits.at(1_000))
    around = capacity.AROUND_FRAME
    sent = 5_000 * (200 + around) + 7_000 * (80 + around) + 900 * (60 + around)
    assert use.network_bits == pytest.approx(8 * sent)
    assert use.return_seconds == pytest.approx(2)
    assert use.disk_bytes == pytest.approx(365 * 10 * (300 + 100))


FIRST: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "CPU": ({"messages": 100, "largest_chat": 50, "watching": 0.5}, {}),
    "memory": ({}, {"memory_gb": 0.05}),
    "connections": ({}, {"connections": 100}),
    "fsyncs": ({"messages": 700}, {"cpu": 10}),
    "network": ({"largest_chat": 50}, {"network_mbit": 0.1}),
    "return": ({}, {"return_seconds": 1}),
    "disk": ({"daily": 100}, {"disk_gb": 1}),
}


@pytest.mark.parametrize("resource", FIRST)
def test_each_resource_can_be_the_first_to_end(
    capacity: Any, costs: Any, resource: str
) -> None:
    changes, less = FIRST[resource]
    plenty = {"memory_gb": 100, "connections": 10**6, "network_mbit": 10**4}
    machine = capacity.Machine(**plenty | {"return_seconds": 100} | less)
    found = capacity.community(3_000, habits(capacity, **changes), costs, machine)
    assert found.first == resource
    table = capacity.sizes_table([found])
    assert list(capacity.ENDS) == list(found.shares)
    assert (table[1][0], table[1][-1]) == ("3,000", resource)


def test_the_largest_community_is_the_last_that_fits(capacity: Any, costs: Any) -> None:
    machine = capacity.Machine(connections=470)
    found = capacity.largest(habits(capacity), costs, machine)
    assert (found.members, found.fits) == (470, True)
    assert found.first == "connections"
    more = capacity.community(480, habits(capacity), costs, machine)
    assert not more.fits
    assert "**102 %**" in capacity.sizes_table([more])[1]


@pytest.mark.parametrize("workload", ["costs", "idle", "handshakes", "growth"])
def test_a_missing_figure_names_its_workload(capacity: Any, workload: str) -> None:
    less = copy.deepcopy(RESULTS)
    less["runs"] = [each for each in less["runs"] if each["workload"] != workload]
    with pytest.raises(capacity.Missing, match=f"of the workload {workload}"):
        capacity.measured(less)


def test_the_command_says_what_is_missing(
    capacity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(RESULTS))
    monkeypatch.setattr(sys, "argv", ["capacity.py", str(file)])
    with pytest.raises(SystemExit, match=r"capacity\.py: .* workload community"):
        capacity.main()


def test_a_run_as_predicted_has_the_ratio_one(capacity: Any, costs: Any) -> None:
    people = habits(capacity, largest_chat=4, watching=0.5, typing=2)
    doing = capacity.activity(900, people)
    use = capacity.used(doing, costs)
    per_second = {
        "messages": doing.messages,
        "marks": doing.marks,
        "count": doing.deliveries,
        "reads": doing.mark_deliveries,
        "signs": doing.signs,
        "cpu": use.cpu,
        "bytes": 200 * doing.deliveries + 80 * doing.mark_deliveries + 60 * doing.signs,
        "commits": use.fsyncs,
        "sent": doing.messages,
        "grown": 300 * doing.messages + 100 * doing.marks,
    }
    was = run(
        "community",
        "900",
        seconds=10,
        memory=use.memory_bytes,
        open_seconds=use.return_seconds,
        **{name: 10 * value for name, value in per_second.items()},
    )
    was["habits"] = vars(people)
    table = capacity.checked(was, costs)
    assert {row[-1] for row in table[1:]} == {"1.00"}


def test_the_section_of_the_page_has_all_tables_and_what_went_wrong(
    capacity: Any,
) -> None:
    section = capacity.section({**RESULTS, "runs": [*RESULTS["runs"], CROWD]})
    first, *_ = section.splitlines()
    assert first == (
        "On A CPU, 2 cores, Linux, 2026-01-20 13:00 UTC, by "
        "`python bench/run.py --full`; without a record of how busy the machine was."
    )
    assert [line for line in section.splitlines() if line.startswith("#")] == [
        "### What each thing costs",
        "### What there is",
        "### Habits",
        "### A quiet club",
        "### A busy game or marketplace",
        "### The run beside the model",
    ]
    assert "\n| seconds to connect all | 0.600 | 1.00 | 1.67 |\n" in section
    assert section.endswith(
        "18 messages and 44 read marks, 20.0 % of a core; from send to "
        "receipt p50 3.00 ms, p99 9.00 ms; 2 late."
    )


def test_a_terminal_gets_the_tables_without_the_reasons(capacity: Any) -> None:
    text = capacity.text({**RESULTS, "runs": [*RESULTS["runs"], CROWD]})
    lines = text.splitlines()
    assert ["disk", "40", "GB"] in [line.split() for line in lines]
    assert max(map(len, lines)) < 150


def test_every_habit_has_a_reason(capacity: Any) -> None:
    fields = [name for name in capacity.Habits.__dataclass_fields__ if name != "name"]
    assert list(capacity.WHY) == fields
    assert len(capacity.HABITS) >= 2


def test_the_page_has_the_figures_of_the_results(capacity: Any) -> None:
    results = json.loads((BENCH / "results.json").read_text())
    assert f"\n\n{capacity.section(results)}\n\n" in PAGE.read_text()
