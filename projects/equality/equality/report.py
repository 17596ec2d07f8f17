"""The report: loss curves, AP by seed, and the largest differences of detections."""

from pathlib import Path
from typing import Any

import matplotlib
from tabulate import tabulate

from equality.compare import SIDES

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def report(results: dict[str, Any], output: Path) -> str:
    """Write `report.md` and `losses.png`; return the former."""
    _draw(results, output / "losses.png")
    seeds = sorted({run["seed"] for run in results["runs"]})
    rows = []
    for side in SIDES:
        runs = {run["seed"]: run for run in results["runs"] if run["side"] == side}
        last = [list(runs[seed]["losses"].values())[-1] for seed in seeds]
        rows.append([side, *(f"{runs[seed]['AP50']:.2f}" for seed in seeds), *(f"{loss:.3f}" for loss in last)])
    headers = ["", *(f"AP50, seed {seed}" for seed in seeds), *(f"last loss, seed {seed}" for seed in seeds)]
    found = results["detections"]
    parts = [
        "# The same training, with Detectron2's modules and accelerated",
        f"{results['iterations']} iterations from the same weights, with the same images in the same order. Which RoIs "
        "are sampled depends on the last bit of scores, so two runs of one seed drift apart, too.",
        tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True),
        "![loss curves](losses.png)",
        f"One trained detector on {found['images']} test images, as it is and accelerated, in float32: "
        f"{found['detections']:,} detections; boxes differ by at most {found['box']:.1e} pixels, scores by "
        f"{found['score']:.1e}; {found['classes']} have another class, {found['unmatched']} are on one side alone.",
        f"{results['versions']}; threads: {results['threads']}.",
    ]
    text = "\n\n".join(parts) + "\n"
    (output / "report.md").write_text(text)
    return text


def _draw(results: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for number, side in enumerate(SIDES):
        for run in results["runs"]:
            if run["side"] == side:
                losses = {int(iteration): loss for iteration, loss in run["losses"].items()}
                label = side if run["seed"] == results["runs"][0]["seed"] else None
                axes.plot(
                    losses.keys(), losses.values(), "-" if number else "--", color=f"C{number}", label=label, lw=1.2
                )
    axes.set(xlabel="iteration", ylabel="training loss (all four terms)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
