"""Faults of `python -m deploy.faults` that need no clone, a few times each, and the table that it writes."""

import random
import re
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from deploy.faults import __main__, damage, disks, training
from deploy.faults.case import Case, Seen, Unavailable
from deploy.faults.clone import Clone, refused, same
from deploy.team.stack import Failed
from tests.faults.here import Here

pytestmark = pytest.mark.slow


def test_a_training_killed_at_any_moment_ends_with_the_same_bytes(whole_tree: Path) -> None:
    seen = training.killed(Here(whole_tree), count=3, at_once=1)
    assert seen.times == 3
    assert re.search(r"from the last checkpoint \([0-3] of 3;", seen.text)
    assert "1 during start-up, 1 during training, 1 during writing" in seen.text


def test_moments_are_of_each_phase_and_the_same_for_a_seed() -> None:
    found = training.moments(20, 0)
    assert [[moment.phase for moment in found].count(phase) for phase in training.PHASES] == [4, 8, 6, 2]
    assert found == training.moments(20, 0) != training.moments(20, 1)


@pytest.mark.parametrize("stage", ["shard", "train"])
def test_a_full_file_system_gives_one_line_and_costs_nothing(whole_tree: Path, stage: str) -> None:
    try:
        seen = disks.stage(stage, Here(whole_tree))
    except Unavailable as error:
        pytest.skip(str(error))
    assert seen.times >= 2


@pytest.mark.parametrize("name", damage.FILES)
def test_a_damaged_file_is_named(whole_tree: Path, tmp_path: Path, name: str) -> None:
    _, path, command = damage.FILES[name]
    assert damage.read(path, command, Here(whole_tree).copy(tmp_path / "tree")) == 2


def test_the_kinds_of_damage_change_a_file() -> None:
    content = bytes(range(100))
    for damaged in damage.DAMAGES:
        chance = random.Random(3)
        assert len({damaged(content, chance) for _ in range(20)} - {content}) > 10


def test_lost_bytes_are_an_error() -> None:
    same("files", {"a": "1"}, {"a": "1"})
    with pytest.raises(Failed, match=r"these do not: a, b;"):
        same("files", {"a": "1", "c": "3"}, {"a": "2", "b": "1", "c": "3"})


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("print('error: x', file=sys.stderr)", "status that is not 0"),
        ("sys.exit('error: y')", "matches 'error: x'"),
        ("print('Traceback'); sys.exit('error: x')", "no traceback"),
    ],
)
def test_a_command_that_does_not_refuse_is_an_error(tmp_path: Path, script: str, why: str) -> None:
    done = Clone(tmp_path).call(sys.executable, "-S", "-c", f"import sys; {script}")
    with pytest.raises(Failed, match=why):
        refused(done, "error: x")


class TestTable:
    local, servers = __main__.GROUPS["local"], __main__.GROUPS["servers"]

    def test_a_group_replaces_its_part_alone(self) -> None:
        row = "| a | 2 | b | nothing |\n"
        text = __main__.with_part("", self.local, [row])
        assert text.startswith(__main__.HEAD)
        both = __main__.with_part(text, self.servers, ["| s | 1 | t | nothing |\n"])
        assert both.index("## Servers and workers") < both.index("| s |") < both.index("## One machine")
        assert row in both
        again = __main__.with_part(both, self.local, ["| c | 2 | d | nothing |\n"])
        assert row not in again
        assert "| s | 1 | t | nothing |" in again
        assert again.count("| c | 2 | d | nothing |") == 1

    def test_what_cannot_be_injected_is_said(self, capsys: pytest.CaptureFixture[str]) -> None:
        def unavailable(_: object) -> Seen:
            raise Unavailable("no root")

        cases = {"a": Case("A", unavailable), "b": Case("B", lambda number: Seen(number, "c"))}
        prepared = partial(nullcontext, lambda number: number)
        group = self.local._replace(cases=cases, prepared=prepared)
        assert __main__.inject(group, ["a", "b"]) == [
            "| A | 0 | not injected: no root | not known |\n",
            "| B | 1 | c | nothing |\n",
        ]
        assert "not injected" in capsys.readouterr().out

    def test_the_file_has_every_fault(self) -> None:
        text = __main__.FILE.read_text()
        for group in __main__.GROUPS.values():
            assert f"## {group.title}\n\n{group.text}\n" in text
            for case in group.cases.values():
                assert f"\n| {case.fault} | " in text
        assert "not injected" not in text
