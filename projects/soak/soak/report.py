"""The report of a soak."""

from typing import Any

from tabulate import tabulate

from resnet_backbone.engine.output import versions
from soak.carry_out import Plan


def report(plan: Plan, results: dict[str, Any]) -> str:
    """Return Markdown: what happened, and what came of it."""
    rows = [
        (number, row["accident"], row["after"] if row["accident"] != "none" else "", row["exit"], row["last line"])
        for number, row in enumerate(results["rows"])
    ]
    headers = ("start", "accident", "after s", "exit code", "last line")
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    different = results["different"]
    verdict = (
        "all equal to the last bit" if not different else f"{len(different)} differ ({', '.join(different[:3])} …)"
    )
    files = [
        (name, f"{results['reported'][name]:.2f}", f"{results['evaluated'][name]:.2f}") for name in results["reported"]
    ]
    return "\n".join(
        (
            "# A run that was killed, starved and resumed",
            "",
            f"Faster R-CNN with ResNet-18 at a quarter of its width, {plan.iterations} iterations in two processes, "
            f"trained on {results['data'][0]}, seed {plan.seed}. {versions()}. "
            f"Undisturbed {results['seconds']['undisturbed']} s; all together {results['seconds']['all']} s.",
            "",
            table,
            "",
            f"Final weights beside those of the undisturbed run, {results['tensors']} tensors: {verdict}.",
            "",
            f"The {results['detections']} detections of model_final.pth in the run's last evaluation and in one of its "
            f"own: {'the same' if results['same_detections'] else 'NOT the same'}.",
            "",
            tabulate(files, ("file", "AP it reports", "AP when evaluated"), tablefmt="github", disable_numparse=True),
            "",
        )
    )
