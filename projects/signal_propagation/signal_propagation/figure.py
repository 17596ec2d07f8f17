"""The figure: gradient and signal over depth, plain vs. residual, at initialization and after training."""

from pathlib import Path

import matplotlib

from resnet_backbone.weights import atomic_write
from signal_propagation.measure import Experiment

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

AXES = {
    "gradient": ("blocks between here and the last one", "gradient norm (last block: 1)"),
    "signal": ("block", "signal: RMS of the output"),
}


def draw(results: dict[str, dict], experiment: Experiment, path: Path) -> None:
    """Draw two rows per family (gradient, signal) and two columns (initialization, trained); plain networks dashed."""
    figure = plt.figure(figsize=(10, 6 * len(experiment.families)), constrained_layout=True)
    times = {"initial": "at initialization", "trained": f"after {experiment.iterations} iterations"}
    parts = figure.subfigures(len(experiment.families), 1, squeeze=False)[:, 0]
    for part, family in zip(parts, experiment.families, strict=True):
        grid = part.subplots(2, 2, sharey="row")
        for row, (key, (xlabel, ylabel)) in zip(grid, AXES.items(), strict=True):
            for axes, time in zip(row, times, strict=True):
                for pair in zip(family.residual, family.plain, strict=True):
                    for name, style in zip(pair, ("-", "--"), strict=True):
                        color = f"C{family.residual.index(pair[0])}"
                        _curve(axes, results[name], key, time, label=name, color=color, linestyle=style)
                axes.set(xlabel=xlabel, yscale="log")
                axes.grid(alpha=0.3)
                if key == "gradient":
                    axes.set_title(times[time])
                    axes.invert_xaxis()
                else:
                    # The values stay within two decades, where powers of ten alone would give a single tick.
                    axes.set_ylim(bottom=0.3)
                    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                    axes.yaxis.set_minor_formatter(NullFormatter())
            row[0].set_ylabel(ylabel)
        part.suptitle(family.title, fontweight="bold")
        entries = grid[0, 0].get_legend_handles_labels()
        part.legend(*entries, loc="outside lower center", ncols=len(family.residual), frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)


def _curve(axes: plt.Axes, result: dict, key: str, time: str, **style: str) -> None:
    """Draw a network's line; at initialization, the median over seeds within a min-max band."""
    values = result[time][key] if time == "trained" else result[time][key]["median"]
    places = range(len(values) - 1, -1, -1) if key == "gradient" else range(1, len(values) + 1)
    if time == "initial":
        spread = result[time][key]
        axes.fill_between(places, spread["min"], spread["max"], color=style["color"], alpha=0.15, linewidth=0)
    axes.plot(places, values, linewidth=1.6, **style)
