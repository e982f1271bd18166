"""Who may import whom: studies -> scripts -> genview -> shapes, quality_loss, support."""
import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for pattern in ("*.py", "support/*.py", "studies/*.py") for path in ROOT.glob(pattern)}
BELOW = {"genview", "shapes", "quality_loss", "recipes", "support"}      # what every script may use
ALLOWED = {
    "support": {"support"}, "quality_loss": set(), "recipes": {"support"}, "shapes": {"support"},
    "genview": {"shapes", "quality_loss", "support"},
    "train_moco": BELOW | {"eval_linear", "generate_views"},
    "train_byol": BELOW | {"train_moco"}, "train_swav": BELOW | {"train_moco"},
    "studies": {name.partition(".")[0] for name in FILES}}               # the others: BELOW


def imported(path):
    """The modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: relative imports do not work for scripts"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inside if name in FILES]
            yield from modules or [node.module]


def test_imports_are_found():
    found = set(imported(FILES["train_moco"]))
    assert {"genview", "support.runs", "support.processes", "torch"} <= found
    assert len([name for name in FILES if name.startswith("support.")]) >= 7


@pytest.mark.parametrize("name", FILES)
def test_arrows_point_down(name):
    ours = {module.partition(".")[0] for module in imported(FILES[name])}
    ours &= ALLOWED["studies"] | {"tests"}
    assert ours <= ALLOWED.get(name.partition(".")[0], BELOW)


def test_no_circles():
    """CycleError names the circle."""
    graph = {name: set(imported(path)) & FILES.keys() for name, path in FILES.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert len(order) == len(FILES)
    assert order.index("support.command_line") < order.index("train_moco")


def test_the_loss_imports_torch_alone():
    names = {module.partition(".")[0] for module in imported(FILES["quality_loss"])}
    assert names - sys.stdlib_module_names == {"torch"}
