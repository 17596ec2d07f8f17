"""The paper's Table 6 next to the numbers measured here, and what they say about depth, as Markdown."""

from itertools import chain
from pathlib import Path
from typing import Any

from tabulate import tabulate

from cifar10.figure import draw
from cifar10.plan import PLAIN, RESIDUAL, by_family, parameters
from cifar10.results import Summary, read_records, summarize
from resnet_backbone.weights import atomic_write

# He et al. 2015, Table 6: test error in percent; ResNet-110 is the mean of five runs, the best being 6.43.
PAPER = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.61, 1202: 7.93}
PAPER_110 = "6.43 (6.61 ± 0.16)"
PAPER_PLAIN_110 = "above 60 (Figure 6)"

WHAT_IT_IS = {
    "paper": "The paper's schedule (section 4.2), but for the differences below.",
    "cpu": "A part of the images and few iterations, for two CPU cores. What is compared is the training error, which "
    "is where the paper sees degradation; the absolute numbers are not the paper's.",
    "smoke": "Three iterations: it shows that everything works, and nothing else.",
}


def write_report(output: Path) -> str:
    """Write `report.md` and `figure6.png` from an output folder's finished runs; return the report."""
    runs = read_records(output)
    any_run = next(iter(runs.values()))[0]
    draw(runs, output / "figure6.png")
    parts = [
        f"# Plain and residual networks by depth: {any_run['title']}",
        WHAT_IT_IS[any_run["scale"]],
        _table(runs),
        "Errors in percent. Training error: of augmented images while training, mean of the last epoch, as Figure 6 "
        "plots it; final weights: of the training images as they are, after training. Test error: after the last "
        "iteration, of the single image. Over several seeds: mean ± standard deviation, and for the test error the "
        "best before it, as the paper gives it for 110 layers. Seconds: of a run, evaluation included"
        + (" (since its last start, where it was stopped)" if _any(runs, "resumed") else "")
        + ".",
        "\n".join(depth_sentences(runs)),
        "![training and test error by depth](figure6.png)",
        "As the paper's Figure 6: dashed is training error, solid is test error"
        + (", the band from the least to the greatest of the seeds." if max(map(len, runs.values())) > 1 else "."),
        "## Differences from the paper",
        "\n".join(f"- {line}" for line in differences(runs)),
        "## How it was run",
        "\n".join(f"- {line}" for line in _setup(runs)),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    with atomic_write(output / "report.md") as file:
        file.write(text.encode())
    return text


def depth_sentences(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Say how depth affects each family's training error, and whether this matches the paper's claim."""
    lines, changes = [], {}
    for family, names in (("Plain", PLAIN), ("Residual", RESIDUAL)):
        errors = {depth: _error(runs, name, "training_error") for depth, name in names.items()}
        errors = {depth: error for depth, error in errors.items() if error is not None}
        if len(errors) < 2:
            continue
        shallow, deep = min(errors), max(errors)
        changes[family] = errors[deep].mean - errors[shallow].mean
        lines.append(
            f"- {family}: training error {_plus_minus(errors[shallow])}% with {shallow} layers, "
            f"{_plus_minus(errors[deep])}% with {deep}: {changes[family]:+.2f} points."
        )
    if len(changes) == 2:
        plain, residual = changes["Plain"], changes["Residual"]
        if plain > 0 >= residual:
            verdict = (
                "As in the paper: depth raises the training error of the plain networks, not of the residual ones."
            )
        elif plain > max(residual, 0):
            verdict = (
                f"In part as in the paper: depth costs the plain networks {plain - residual:.1f} points more than the "
                "residual ones, but in the paper the latter gain by it."
            )
        else:
            verdict = "Not as in the paper, where depth harms the plain networks and helps the residual ones."
        lines.append(f"- {verdict}")
    return lines


def differences(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """List deviations from section 4.2 of the paper."""
    first = next(iter(runs.values()))[0]
    lines = [
        "The mean is one number a channel, not one a pixel, and images are divided by a deviation for each channel. "
        "Batch norm behind the first convolution takes a common factor out again.",
        "The four pixels around an image are black; of what the paper pads with it says nothing.",
        "Test error is that of the final weights; the paper does not say which it gives.",
    ]
    if "JPEG" in first["title"]:
        lines.insert(
            0,
            "The images are JPEG copies (quality 75, halved color resolution) of CIFAR-10, which cost points of test "
            "error; the paper's are the original pixels.",
        )
    elif not first["title"].startswith("CIFAR-10"):
        lines.insert(0, f"The images are not CIFAR-10 but {first['title']}.")
    theirs = {
        "training_images": 50_000,
        "test_images": 10_000,
        "width": 1.0,
        "batch": 128,
        "learning_rate": 0.1,
        "steps": [32_000, 48_000],
        "iterations": 64_000,
        "weight_decay": 1e-4,
    }
    for key, value in theirs.items():
        ours = {_text(run["settings"][key]): None for network in runs for run in runs[network]}
        if list(ours) != [_text(value)]:
            lines.append(f"{key.replace('_', ' ').capitalize()}: {' or '.join(ours)}; in the paper {_text(value)}.")
    if precisions := {run["settings"]["precision"] for each in runs.values() for run in each} - {"fp32"}:
        lines.append(f"Mixed precision ({', '.join(sorted(precisions))}); the paper's was single precision.")
    return lines


def _table(runs: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    full = next(iter(runs.values()))[0]["scale"] == "paper"
    for network in chain.from_iterable(by_family(runs).values()):
        test = _error(runs, network, "test_error")
        paper = next((PAPER[depth] for depth, name in RESIDUAL.items() if name == network), None)
        printed = {PLAIN[110]: PAPER_PLAIN_110, RESIDUAL[110]: PAPER_110}
        rows.append(
            [
                network,
                f"{parameters(network, runs[network][0]['settings']['width']) / 1e6:.2f}M",
                " ".join(str(run["seed"]) for run in runs[network]),
                _plus_minus(_error(runs, network, "training_error")),
                _plus_minus(_error(runs, network, "training_error_of_final_weights")),
                f"{test.least:.2f} ({_plus_minus(test)})" if test.count > 1 else _plus_minus(test),
                printed.get(network, f"{paper:.2f}" if paper else "–"),
                *([f"{test.mean - paper:+.2f}" if paper else "–"] if full else []),
                f"{sum(run['seconds'] for run in runs[network]) / len(runs[network]):,.0f}",
            ]
        )
    headers = ["network", "weights", "seeds", "training error", "of final weights", "test error", "paper, Table 6"]
    headers += [*(["difference"] if full else []), "seconds"]
    aligned = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=aligned)


def _setup(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = []
    for key in ("versions", "machine"):
        lines += dict.fromkeys(run[key] for each in runs.values() for run in each)
    for network, each in runs.items():
        for settings, seeds in _by_settings(each):
            warm_up, steps = settings["warm_up_until_error"], _text(settings["steps"])
            lines.append(
                f"{network}, seed {', '.join(map(str, seeds))}, width {settings['width']:g}: "
                f"{settings['iterations']:,} iterations of {settings['batch']} of {settings['training_images']:,} "
                f"images, learning rate {settings['learning_rate']:g}"
                + (f" divided by 10 at {steps}" if steps else "")
                + (f", a tenth until the training error is below {warm_up:g}%" if warm_up else "")
                + f", {settings['precision']}; tested on {settings['test_images']:,} images."
            )
    if (together := max(run["parallel"] for each in runs.values() for run in each)) > 1:
        lines.append(f"Up to {together} runs side by side, which the seconds include.")
    if keys := dict.fromkeys(" ".join(run["keys"]) for each in runs.values() for run in each if run["keys"]):
        lines.append(f"Set over the scale's own configuration: `{'`; `'.join(keys)}`.")
    return lines


def _by_settings(each: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[int]]]:
    """Group a network's runs by settings; return each group's settings and seeds."""
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for run in each:
        for settings, seeds in groups:
            if settings == run["settings"]:
                seeds.append(run["seed"])
                break
        else:
            groups.append((run["settings"], [run["seed"]]))
    return groups


def _error(runs: dict[str, list[dict[str, Any]]], network: str, key: str) -> Summary | None:
    return summarize([run[key] for run in runs.get(network, ())])


def _plus_minus(summary: Summary | None) -> str:
    if summary is None:
        return "–"
    return f"{summary.mean:.2f}" + (f" ± {summary.deviation:.2f}" if summary.deviation is not None else "")


def _any(runs: dict[str, list[dict[str, Any]]], key: str) -> bool:
    return any(run[key] for each in runs.values() for run in each)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(f"{item:,}" for item in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
