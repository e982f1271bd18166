"""bench.py prints its table; how fast is not tested."""
import subprocess
import sys
from pathlib import Path

import pytest

from studies import bench
import genview


def test_take_turns_gives_medians_of_windows_in_turn(monkeypatch):
    calls, clock = [], iter([0, 1, 1, 6,  0, 3, 3, 13,  0, 2, 2, 4])               # windows 1 to 3: a 1, 3, 2; b 5, 10, 2
    monkeypatch.setattr(bench.time, "perf_counter", Clock(clock, calls).read)
    t = bench.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, lambda: None)
    assert "".join(calls) == "ab" * 4 and t == {"a": 2, "b": 5}


class Clock:
    """Reads given times, but 0 as long as the round that warms up lasts."""

    def __init__(self, times, calls):
        self.times, self.calls, self.started = times, calls, False

    def read(self):
        self.started = self.started or len(self.calls) >= 2
        return next(self.times) if self.started else 0


def test_the_loops_train_the_same_network():
    world = genview.setup("cpu")
    ours, plain = bench.Training(world, 8, n=64), bench.PlainLoop(world, 8)
    shapes = lambda method: [p.shape for p in method.parameters()]
    assert shapes(ours.method) == shapes(plain.method)
    before = [p.clone() for p in plain.method.query.parameters()]
    loss = plain.step()
    assert 0 < loss < 20
    ours.step()


def test_generation_is_timed_both_ways():
    rows = list(bench.generation(genview.setup("cpu"), lambda: None, 1, n=2))
    assert [what.split(",")[0] for what, _ in rows] == ["generation", "... over one image at a time with two encoder passes"]
    assert rows[0][1].endswith(" images/s") and float(rows[1][1]) > 0


def test_the_table(monkeypatch):
    done = subprocess.run([sys.executable, Path(bench.__file__), "augmentation"], capture_output=True, text=True)
    assert done.returncode == 0 and "| augmentation, two views of an image each | " in done.stdout
    monkeypatch.setattr(sys, "argv", ["bench.py", "speed"])
    with pytest.raises(UserError, match="speed: the parts are steps"):
        bench.main()
