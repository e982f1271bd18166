"""The README's map of the paper: every name in it exists; every script it calls takes the flags it
gives; its figures are those of the runs."""
import importlib
import re
from pathlib import Path

import pytest

from studies.ablation import read_results, results_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = ("quality_loss generate_views train_moco eval_linear genview shapes train_byol "
           "train_swav eval_detection recipes").split()


def test_every_name_exists():
    names = set(re.findall(rf"`((?:{'|'.join(SCRIPTS)})\.[A-Za-z_0-9]+)`", README))
    assert len(names) >= 18
    for name in names:
        module, attribute = name.split(".")
        if attribute != "py":
            assert hasattr(importlib.import_module(module), attribute), name


def test_every_file_exists():
    files = {*re.findall(r"`([a-z_]+\.py)`", README), *re.findall(r"\]\((docs/[^)]+)\)", README)}
    assert {f"{name}.py" for name in SCRIPTS} <= files
    assert not [file for file in files if not (ROOT / file).exists()]


def commands():
    """README's commands as (module, the text of its flags); continued lines are one command."""
    text = re.sub(r"\\\n\s*", " ", README)
    scripts = re.findall(r"(?:python|nproc_per_node=8) (\w+)\.py([^\n`#]*)", text)
    studies = re.findall(r"python -m (studies\.\w+)([^\n`#]*)", text)
    return [(name, flags) for name, flags in scripts + studies if "--" in flags]


def test_every_flag_exists(capsys):
    """The flags of each command in the README are flags of its script."""
    names = {name for name, _ in commands()}
    assert len(commands()) >= 15 and len({name for name in names if "studies." in name}) >= 3
    for name in names:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr("sys.argv", [name, "--help"])
            importlib.import_module(name).main()
        known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        used = re.findall(r"--[a-z-]+", " ".join(flags for script, flags in commands()
                                                 if script == name))
        assert set(used) <= known, (name, set(used) - known)


def test_a_continued_command_is_read_whole():
    flags = " ".join(flags for name, flags in commands() if name == "train_moco")
    assert "--views-dir /data/train_variations --encoder release" in flags


def test_the_code_for_copying_the_loss_runs():
    code, = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(code, names)
    assert names["loss"].isfinite() and names["weights"].mean().item() == pytest.approx(1)


def test_the_gains_are_those_of_the_runs():
    """docs/RESULTS.md holds the whole table of docs/results.jsonl, README some of its rows."""
    measured = results_table(read_results(ROOT / "docs/results.jsonl")).strip()
    assert measured in (ROOT / "docs/RESULTS.md").read_text()
    rows = re.findall(r"^\| (?:plain|the auto|copies|generated).*", README, re.M)
    assert len(rows) == 5 and set(rows) <= set(measured.splitlines())
