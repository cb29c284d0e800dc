"""The command: what it refuses, and that a part measured anew leaves the others."""

import json
from pathlib import Path
from types import MethodType

import pytest

from benchmarks import __main__ as command
from benchmarks import micro
from benchmarks.figures import Group, Series, as_json, from_json
from benchmarks.ground import Progress, Wish


@pytest.mark.parametrize(
    "arguments",
    [["--only", "tcp"], ["--rounds", "0"], ["--rounds", "x"], ["--seconds", "0.01"], ["more"]],
)
def test_wrong_usage_is_refused_in_words(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m benchmarks" in capsys.readouterr().err


def test_without_root_it_says_what_would_be_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert command.main(["--only", "udp", "--output", str(tmp_path)]) == 1
    assert "sudo make bench" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_part_measured_anew_leaves_the_others_as_they_were(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    earlier = Group("udp", "UDP", (), (Series("a", "b", (1.0,)),), (), (), {})
    (tmp_path / "results.json").write_text(json.dumps([as_json(earlier)]))
    monkeypatch.setattr(micro, "_LEAST_SECONDS", 0.001)
    monkeypatch.setattr(micro, "SIZES", (10,))
    assert command.main(["--micro", "--rounds", "1", "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert [group["key"] for group in written] == ["udp", "micro"]
    assert from_json(written[0]) == earlier
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.json", "results.md", "micro.svg"}


@pytest.mark.parametrize("text", ["", "nonsense", "[1]", "{}", '[{"key": "udp"}]'])
def test_results_that_arent_ours_are_replaced(text: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(text)
    assert command._earlier(file) == {}


def test_the_micro_benchmark_reads_each_kind_at_each_size_each_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(micro, "_LEAST_SECONDS", 0.001)
    monkeypatch.setattr(micro, "SIZES", (1, 10))
    progress = Progress("micro")
    micro.measure(Wish(rounds=2, seconds=1), progress)
    kinds = len(micro.KINDS)
    rows = 6
    assert len(progress.readings) == kinds * 2 + kinds * 2 + 4 + rows
    named = {goal.above for goal in micro.GOALS[kinds:]} | {
        str(goal.below) for goal in micro.GOALS[kinds:]
    }
    assert named <= {name for name, _ in progress.readings}
    assert all(len(values) == 2 and min(values) > 0 for values in progress.readings.values())


def test_the_twin_without_tracing_does_the_same_but_tells_nobody() -> None:
    worker, packets = micro._prepared("TCP", 5)
    twin = MethodType(micro._without_tracing(), worker)
    told: list[object] = []
    worker.on_rewrite = lambda *what: told.append(what)
    became = [twin(packet, 0, 1.0) for packet in packets[:50]]
    assert not told
    assert became == [worker.handle(packet, 0, 1.0) for packet in packets[:50]]
    assert len(told) == 50
