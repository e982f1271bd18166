"""Draws docs/gain.png: what each kind of view gains over plain pairs (needs matplotlib).

    python -m studies.plot                    # from docs/results.jsonl, of studies/ablation.py
"""
import statistics
import sys
from pathlib import Path

if not __package__:
    sys.stderr.write("error: call it from the root of the repository: python -m studies.plot\n")
    sys.exit(2)

from studies.ablation import CONTROLLED, ROWS, gains, groups, interval, read_results
from support.world import Parser, UserError, script


def draw(columns, path):
    """columns: {title: lines of one setting}. A point a seed; the mean and its 95% interval."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(columns), sharey=True, squeeze=False,
                                   figsize=(3.2 * len(columns), 3.6), layout="constrained")
    for axis, (title, lines) in zip(axes[0], columns.items(), strict=True):
        for place, row in enumerate(CONTROLLED[1:]):
            values = gains(lines, row, "knn")
            axis.plot([place + 0.18] * len(values), values, ".", color="grey")
            if len(values) > 1:
                axis.errorbar(place, statistics.mean(values), interval(values), fmt="o", capsize=4)
        axis.axhline(0, color="black", linewidth=0.8)
        names = [ROWS[row][0].replace(", ", ",\n").replace("with ", "with\n")
                 for row in CONTROLLED[1:]]
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axis.set_title(title, fontsize=9)
    axes[0, 0].set_ylabel("gain in kNN top-1 over plain pairs")
    figure.savefig(path, dpi=130, metadata={"Software": None})


def main():
    add = (parser := Parser("Draws the gains of an ablation.")).add_argument
    add("--results", type=Path, default=Path("docs/results.jsonl"), help="of studies/ablation.py")
    add("--output", type=Path, default=Path("docs/gain.png"), help="the picture")
    args = parser.parse_args()
    columns = {f"{transformations}, {epochs} epochs": lines
               for (_, _, transformations, epochs, *_), lines
               in groups(read_results(args.results)).items()
               if any(gains(lines, row, "knn") for row in CONTROLLED[1:])}
    if not columns:
        raise UserError(f"{args.results} holds no runs to compare: python -m studies.ablation "
                        f"--preset gain makes them")
    try:
        draw(columns, args.output)
    except ImportError:
        raise UserError("this picture needs matplotlib: pip install matplotlib") from None


if __name__ == "__main__":
    script(main)
