"""The paper's Figure 6: error over iterations, plain and residual networks side by side, one color per depth."""

from pathlib import Path
from typing import Any

import matplotlib

from cifar10.plan import PLAIN, RESIDUAL, by_family
from cifar10.results import mean_curve
from resnet_backbone.weights import atomic_write

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLORS = {20: "#c9a800", 32: "#17a2b8", 44: "#2e9e3f", 56: "#d62728", 110: "#222222", 1202: "#8e44ad"}
STYLES = {name: (f"{depth} layers", COLORS[depth]) for names in (PLAIN, RESIDUAL) for depth, name in names.items()}
PAPER_LIMIT = 20  # percent: the end of the paper's axis


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw each network's mean over its seeds: training error dashed, test error solid.

    Args:
        runs: records by network. Networks not in the paper's figure get their own panel.
    """
    families = by_family(runs)
    figure, panels = plt.subplots(
        1, len(families), figsize=(5 * len(families), 4.2), sharey=True, squeeze=False, constrained_layout=True
    )
    panels = panels[0]
    full = next(iter(runs.values()))[0]["scale"] == "paper"
    for axes, (family, networks) in zip(panels, families.items(), strict=True):
        for number, name in enumerate(networks):
            label, color = STYLES.get(name, (name, f"C{number}"))
            _network(axes, runs[name], unit=1e4 if full else 1, color=color, label=label)
        axes.set(title=family, xlabel="iteration (1e4)" if full else "iteration")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="upper right")
    panels[0].set(ylabel="error (%); dashed: training, solid: test")
    if full:
        panels[0].set(ylim=(0, PAPER_LIMIT), yticks=range(0, PAPER_LIMIT + 1, 5))
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)


def _network(axes: plt.Axes, runs: list[dict[str, Any]], *, unit: float, color: str, label: str) -> None:
    for key, style, named in (("training_curve", "--", None), ("test_curve", "-", label)):
        curves = [run[key] for run in runs]
        iterations, errors = zip(*mean_curve(curves), strict=True)
        width = 1.8 if named else 1.0
        axes.plot([i / unit for i in iterations], errors, style, color=color, linewidth=width, label=named)
        if named and len(runs) > 1:
            values = [[error for i, error in curve if i in set(iterations)] for curve in curves]
            spread = [min(each) for each in zip(*values)], [max(each) for each in zip(*values)]
            axes.fill_between([i / unit for i in iterations], *spread, color=color, alpha=0.15, linewidth=0)
