"""The report's section on factors: what batch norm, shortcuts and depth are worth, and what may be concluded."""

from typing import Any

from tabulate import tabulate

from coco_transfer.factors import ALL_AT_ONCE
from coco_transfer.plan import STAGES
from coco_transfer.results import seeds_of, signed

FIGURE, FIGURE_FROM = "factors.png", 3  # and the number of networks from which on it is drawn


def factor_section(results: dict[str, Any]) -> list[str]:
    """Return the section's paragraphs; none for two networks that differ in more than one factor."""
    comparisons = results["comparisons"]
    has_figure = len(results["networks"]) >= FIGURE_FROM
    if not has_figure and all(one["factor"] == ALL_AT_ONCE for one in comparisons):
        return []
    shown = (_table(comparisons), _what_the_table_shows(results), _verdict(comparisons)) if comparisons else ()
    return ["## Factor by factor", *shown, f"![AP over depth]({FIGURE})" if has_figure else "", _limits(results)]


def _table(comparisons: list[dict[str, Any]]) -> str:
    rows = [
        [
            one["factor"],
            f"{one['first']} → {one['second']}",
            *(signed(one[key]) for key in ("top1", "AP50")),
            *([_range(one["intervals"]["AP50"])] if "intervals" in one else []),
            signed(one["AP"]),
            *([_range(one["intervals"]["AP"])] if "intervals" in one else []),
            _settings(one["settings"]),
        ]
        for one in comparisons
    ]
    interval = ["95% interval"] if "intervals" in comparisons[0] else []
    headers = ["what changes", "networks", "top-1", "AP50", *interval, "AP", *interval, "settings that change too"]
    align = ["left", "left", *["right"] * (len(headers) - 3), "left"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=align)


def _range(interval: list[float]) -> str:
    return f"{signed(interval[0])} to {signed(interval[1])}"


def _settings(settings: dict[str, dict[str, list[Any]]]) -> str:
    """Name the settings that differ, without the node that is clear: `pretraining BASE_LR 0.02 → 0.05`."""
    parts = []
    for stage, keys in settings.items():
        changes = [f"{key.partition('.')[2]} {before} → {after}" for key, (before, after) in keys.items()]
        if changes:
            parts.append(f"{STAGES[stage]}: {', '.join(changes)}")
    return "; ".join(parts) or "none"


def _what_the_table_shows(results: dict[str, Any]) -> str:
    text = "Differences in points, the second network less the first"
    if any("repeats" in row for row in results["networks"].values()):
        text += ", of means over seeds"
    if "test_images" not in results:
        return f"{text}. There are no intervals, because the evaluator wrote no detections in COCO's form."
    return (
        f"{text}. The interval holds the middle 95% of the differences over {results['resamples']:,} resamples of the "
        f"{results['test_images']:,} test images, drawn with replacement and the same for both networks (Efron, "
        "Tibshirani 1993)."
    )


def _verdict(comparisons: list[dict[str, Any]]) -> str:
    """Say which differences in AP50 the test images can tell from 0."""
    if "intervals" not in comparisons[0]:
        return ""
    words = {
        False: "The interval of AP50 excludes 0",
        True: "The interval of AP50 holds 0, so these test images cannot tell the difference from 0",
    }
    found = {holds_zero: [] for holds_zero in words}
    for one in comparisons:
        low, high = (round(end, 1) for end in one["intervals"]["AP50"])  # as the table shows them
        found[low <= 0 <= high].append(f"{one['first']} → {one['second']} ({signed(one['AP50'])})")
    return "\n".join(f"- {words[key]}: {', '.join(pairs)}." for key, pairs in found.items() if pairs)


def _limits(results: dict[str, Any]) -> str:
    """Say what may and may not be concluded, whatever the numbers are."""
    networks, traits = results["networks"], results["traits"]
    sentences = [
        "**What may be concluded.** An interval that excludes 0 says that these trained detectors differ on images "
        "like those of the test set; if they did not, one interval in twenty would still exclude 0. It does not "
        "contain the spread over training seeds:",
        "the ± in the first table shows that for the networks with several."
        if any(len(seeds_of(row)) > 1 for row in networks.values())
        else "every network was trained once, so that spread is unknown here.",
        "Where settings change too, a row is about networks and recipes together.",
    ]
    sizes = {traits[net]["family"]: row["roi_size"] for net, row in networks.items()}
    if {"VGG", "ResNet"} <= set(sizes):
        sentences.append(
            f"From VGG to a ResNet, the head changes as well, from fc6 and fc7 on {sizes['VGG']}×{sizes['VGG']} to "
            f"conv5_x on {sizes['ResNet']}×{sizes['ResNet']} RoI features, and so do the stem and the stages: that "
            "difference need not be the sum of the others."
        )
    widths = " and ".join(sorted({f"{row['width']:g}" for row in networks.values()}))
    sentences.append(
        "A short schedule favors networks that learn fast, so a longer one may change the order. All of this is about "
        f"one detector, one data set, and a width of {widths}."
    )
    return " ".join(sentences)
