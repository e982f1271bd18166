"""Draws what each kind of view gains over plain pairs, or the curves of runs (needs matplotlib).

    python -m studies.plot                               # docs/gain.png, of docs/results.jsonl
    python -m studies.plot --runs runs/a runs/b          # runs/curves.png, of their log.jsonl
"""
import itertools
import math
import statistics
import sys
from pathlib import Path

if not __package__:
    sys.stderr.write("error: call it from the root of the repository: python -m studies.plot\n")
    sys.exit(2)

from studies.ablation import ROWS, by_setting, gains, half_interval, read_results
from support.command_line import Parser, UserError, script
from support.files import log_lines, read_settings, write_whole

GAINING = ("copies", "smooth", "noise0", "noise200", "noise400", "adaptive")
# The curves over the length of the training: kept transformations, row, colour.
LENGTHS = [("flips+crops", "adaptive", "C5"), ("flips+crops", "smooth", "C1"),
           ("all", "adaptive", "C6")]
# A panel each: name in log.jsonl, title.
QUANTITIES = {"loss": "loss (dashed: chance level)", "knn": "kNN top-1, %",
              "pos": "pos: cosine of positives", "neg": "neg: mean cosine of negatives",
              "std": "std: spread of the embeddings", "lr": "learning rate"}


# ----------------------------------------------------------------------------------- of an ablation
def gains_of(lines):
    """{(transformations, epochs, row): gains in kNN over plain pairs, a seed each}, of MoCo v2 with
    the bundled generator. Pairs are of one machine: the first with the most of them counts."""
    found = {}
    for setting, group in by_setting(lines).items():
        if (setting.dataset, setting.method, setting.model) != ("cifar10", "mocov2", "mini"):
            continue
        for row in ROWS:
            values = gains(group, row, "knn")
            key = setting.transformations, setting.epochs, row
            if row != "plain" and len(values) > len(found.get(key, [])):
                found[key] = values
    return found


def draw_gains(found):
    """The figure: left the gains by the kept transformations, right by the length of the training.
    found: see gains_of."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    draw_transformations(left, found)
    draw_lengths(right, found)
    for panel in (left, right):
        panel.axhline(0, color="black", linewidth=0.8)
        panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.15))
    left.set_ylabel("gain in kNN top-1 over plain pairs")
    return figure


def draw_mean(panel, x, values, **style):
    """The mean with its 95% interval, and a black dot a seed."""
    panel.plot([x] * len(values), values, ".", color="black", markersize=3, zorder=3)
    half = half_interval(values) if len(values) > 1 else 0
    panel.errorbar(x, statistics.mean(values), half, fmt="o", capsize=4, **style)


def draw_transformations(panel, found):
    """The rows with their controls, at the length that most of them were trained for."""
    epochs = statistics.mode(epochs for _, epochs, _ in found)
    names = dict.fromkeys(name for name, length, _ in found if length == epochs)
    for shift, row in enumerate(GAINING):
        panel.plot([], [], "o", color=f"C{shift}", label=ROWS[row].name)   # for the legend alone
        for column, name in enumerate(names):
            if (name, epochs, row) in found:
                draw_mean(panel, column + 0.13 * shift - 0.33, found[name, epochs, row],
                          color=f"C{shift}")
    panel.set_xticks(range(len(names)), names)
    panel.set_title(f"kept transformations, {epochs} epochs", fontsize=10)


def draw_lengths(panel, found):
    """The gain against the epochs, a curve each of LENGTHS."""
    for shift, (name, row, colour) in enumerate(LENGTHS):
        lengths = sorted(epochs for kept, epochs, of in found if (kept, of) == (name, row))
        x = [epochs + 2 * (shift - 1) for epochs in lengths]       # bars beside each other
        means = [statistics.mean(found[name, epochs, row]) for epochs in lengths]
        panel.plot(x, means, "--", color=colour, label=f"{name}: {ROWS[row].name}")
        for place, epochs in zip(x, lengths, strict=True):
            draw_mean(panel, place, found[name, epochs, row], color=colour)
    panel.set_xticks(sorted({epochs for _, epochs, _ in found}))
    panel.set_xlabel("epochs", fontsize=9)
    panel.set_title("length of the training", fontsize=10)


# ------------------------------------------------------------------------------------------ of runs
def read_log(folder):
    """The lines of log.jsonl, as dicts."""
    path = folder / "log.jsonl"
    if not path.exists():
        raise UserError(f"{folder} holds no log.jsonl: --runs takes the folders of runs")
    lines = [line for _, line in log_lines(path) if is_number(line.get("epoch"))]
    if not lines:
        raise UserError(f"{path} holds no epochs yet: a training writes a line every --log-every "
                        f"steps")
    return lines


def is_number(x):
    return isinstance(x, int | float)


def curve(log, name):
    """Epochs and values of a quantity; the last value of each epoch counts: a run that went on from
    a checkpoint may hold a step twice."""
    values = {line["epoch"]: line[name] for line in log if is_number(line.get(name))}
    epochs = sorted(values)
    return epochs, [values[epoch] for epoch in epochs]


def name_of(folder):
    """The folder's name, and what the run says that it is."""
    name = folder.resolve().name
    path = folder / "args.json"
    label = read_settings(path).get("label") if path.exists() else None
    return f"{name}: {label}" if label else name


def draw_runs(logs):
    """logs: [(name of a run, lines of its log)]. A panel a quantity, a line a run. Returns the
    figure."""
    from matplotlib.figure import Figure
    lines = list(itertools.chain(*[log for _, log in logs]))
    last = max(line["epoch"] for line in lines)
    names = [name for name in QUANTITIES if any(name in line for line in lines)]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4 * columns, 3 * rows + 0.25 * len(logs)), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for name, panel in zip(names, panels, strict=False):
        draw_panel(panel, name, logs)
        panel.set_xlim(0, 1.02 * last)
    for panel in panels[len(names):]:              # the rest of the last row
        panel.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", fontsize=8)
    return figure


def draw_panel(panel, name, logs):
    """One quantity of all runs."""
    panel.set_title(QUANTITIES[name], fontsize=10)
    panel.set_xlabel("epoch", fontsize=8)
    marker = "." if name == "knn" else None        # it may have one value alone
    for number, (run, log) in enumerate(logs):
        colour = f"C{number}"
        panel.plot(*curve(log, name), label=run, color=colour, marker=marker)
        if name == "loss":
            panel.plot(*curve(log, "chance"), "--", color=colour, linewidth=0.8)


# -------------------------------------------------------------------------------------------- main
def parse_args():
    parser = Parser("Draws the gains of an ablation, or the curves of runs.")
    add = parser.add_argument
    add("--results", type=Path, default=Path("docs/results.jsonl"), help="of studies/ablation.py")
    add("--runs", type=Path, nargs="+", metavar="DIR", help="draw these runs instead, by epoch")
    add("--output", type=Path,
        help="the picture, a .png; default: docs/gain.png, of runs runs/curves.png")
    args = parser.parse_args()
    args.output = args.output or Path("runs/curves.png" if args.runs else "docs/gain.png")
    if args.output.suffix != ".png":
        raise UserError(f"--output {args.output}: the picture is a PNG, its name must end so: .png")
    return args


def draw(args):
    """The figure that the flags ask for."""
    if args.runs:
        return draw_runs([(name_of(folder), read_log(folder)) for folder in args.runs])
    found = gains_of(read_results(args.results))
    if not found:
        raise UserError(f"{args.results} holds no trials to compare: python -m studies.ablation "
                        f"--preset gain makes them")
    return draw_gains(found)


def main():
    args = parse_args()
    try:
        figure = draw(args)
    except ImportError:
        raise UserError("this picture needs matplotlib: pip install matplotlib") from None
    write_whole(args.output, lambda path: figure.savefig(
        path, format="png", dpi=130, metadata={"Software": None}))


if __name__ == "__main__":
    script(main)
