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
from support.command_line import Parser, UserError, script


def draw(columns, path):
    """columns: {title: lines of one setting}. A point a seed; the mean and its 95% interval."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    for shift, row in enumerate(CONTROLLED[1:]):
        for column, lines in enumerate(columns.values()):
            values, x = gains(lines, row, "knn"), column + 0.2 * shift - 0.3
            axis.plot([x + 0.06] * len(values), values, ".", color="grey", markersize=4)
            if len(values) > 1:
                axis.errorbar(x, statistics.mean(values), interval(values), fmt="o", capsize=4,
                              color=f"C{shift}")
        axis.plot([], [], "o", color=f"C{shift}", label=ROWS[row][0])              # the legend's
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_ylabel("gain in kNN top-1 over plain pairs")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def main():
    add = (parser := Parser("Draws the gains of an ablation.")).add_argument
    add("--results", type=Path, default=Path("docs/results.jsonl"), help="of studies/ablation.py")
    add("--output", type=Path, default=Path("docs/gain.png"), help="the picture")
    args = parser.parse_args()
    columns = {}
    for (_, _, transformations, epochs, *_), lines in groups(read_results(args.results)).items():
        if any(gains(lines, row, "knn") for row in CONTROLLED[1:]):    # the first machine counts
            columns.setdefault(f"{transformations},\n{epochs} epochs", lines)
    if not columns:
        raise UserError(f"{args.results} holds no runs to compare: python -m studies.ablation "
                        f"--preset gain makes them")
    try:
        draw(columns, args.output)
    except ImportError:
        raise UserError("this picture needs matplotlib: pip install matplotlib") from None


if __name__ == "__main__":
    script(main)
