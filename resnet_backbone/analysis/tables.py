"""Network analyses as text: the ResNet paper's Table 1 for the terminal and for Markdown."""

from collections.abc import Iterator, Sequence

from tabulate import SEPARATING_LINE, tabulate

from resnet_backbone.analysis.analyze import NetworkAnalysis, StageAnalysis


def format_table(analyses: Sequence[NetworkAnalysis], *, markdown: bool = False) -> str:
    """Return the paper's Table 1 for these networks, followed by each stage's cost and receptive field.

    Stages with the same output size share a row, as in the paper's Figure 3. As text, up to five networks fit in 120
    columns.
    """
    stages = _aligned(analyses)
    structure = [["", "output", *(analysis.name for analysis in analyses)]]
    for row in stages:
        size = next(_output_size(stage) for stage in row if stage)
        cells = ["" if stage is None else _structure(stage, markdown) for stage in row]
        structure.append([", ".join(_names(row)), f"{size}×{size}", *cells])
    structure += [[title, "", *texts] for title, texts in _totals(analyses)]
    counts = [["", *("\n".join(_names(row)) for row in stages), "total"], *_counts(analyses, stages)]
    tables = [_render(structure, markdown), _render(counts, markdown, numbers_from=1)]
    return "\n\n".join([_setting(analyses), *tables])


def format_overview(analyses: Sequence[NetworkAnalysis], *, markdown: bool = False) -> str:
    """Return one row per network: totals next to the paper's numbers, and the last feature map's receptive field."""
    columns = ("image", "layers", "parameters", "paper", "multiply-\nadds", "paper", "activations", "receptive\nfield")
    rows = [["network", *columns]]
    for analysis in analyses:
        last = [stage for stage in analysis.stages if stage.receptive_field is not None][-1]
        row = (
            analysis.name + (", stride in 1×1" if analysis.stride_in_1x1 else ""),
            str(analysis.image_size),
            str(analysis.layers),
            f"{analysis.parameters:,}",
            _paper_parameters(analysis),
            _short(analysis.multiply_adds),
            _paper_multiply_adds(analysis),
            _short(analysis.activations),
            str(last.receptive_field),
        )
        rows.append(row)
    return _render(rows, markdown, numbers_from=1)


def _aligned(analyses: Sequence[NetworkAnalysis]) -> list[tuple[StageAnalysis | None, ...]]:
    """Group stages into rows of equal output size, aligning each network's last stage of a size in the last row."""
    rows: list[tuple[StageAnalysis | None, ...]] = []
    sizes = {_output_size(stage) for analysis in analyses for stage in analysis.stages}
    for size in sorted(sizes, reverse=True):
        columns = [[stage for stage in analysis.stages if _output_size(stage) == size] for analysis in analyses]
        height = max(map(len, columns))
        rows += zip(*([None] * (height - len(column)) + column for column in columns), strict=True)
    return rows


def _output_size(stage: StageAnalysis) -> int:
    return stage.output_shape[1] if len(stage.output_shape) == 3 else 1


def _names(row: Sequence[StageAnalysis | None]) -> list[str]:
    return list(dict.fromkeys(stage.name for stage in row if stage))


def _setting(analyses: Sequence[NetworkAnalysis]) -> str:
    """Return the sentences above the table: image size, and where the stride is if that matters."""
    sizes = " and ".join(dict.fromkeys(f"{analysis.image_size}×{analysis.image_size}" for analysis in analyses))
    text = f"Images of {sizes} pixels; stem, res2, res3 … are the paper's conv1, conv2_x, conv3_x …"
    if any(analysis.stride_in_1x1 for analysis in analyses):
        text += "\nBottlenecks have their stride in the first 1×1 convolution, as in the paper."
    elif any(analysis.stride_in_1x1 is False for analysis in analyses):
        text += (
            "\nBottlenecks have their stride in the 3×3 convolution, as torchvision's; the paper's in the first 1×1."
        )
    return text


def _structure(stage: StageAnalysis, markdown: bool) -> str:
    """Return a cell of Table 1: one line per layer in text, one line per block in Markdown."""
    if markdown:
        return "\n".join(map(str, stage.structure))
    lines = []
    for unit in stage.structure:
        if unit.bracketed:
            width = max(map(len, unit.layers))
            bracket = [f"[{layer:<{width}}]" for layer in unit.layers]
            bracket[len(bracket) // 2] += f" × {unit.count}"
            lines += bracket
        else:
            lines += unit.layers
    return "\n".join(lines)


def _totals(analyses: Sequence[NetworkAnalysis]) -> Iterator[tuple[str, list[str]]]:
    """Yield the bottom rows of Table 1, including the paper's numbers where it reports any."""
    yield "layers", [str(analysis.layers) for analysis in analyses]
    yield "parameters", [f"{analysis.parameters:,}" for analysis in analyses]
    if any(texts := [_paper_parameters(analysis) for analysis in analyses]):
        yield "  paper", texts
    yield "multiply-\nadds", [_short(analysis.multiply_adds) for analysis in analyses]
    if any(texts := [_paper_multiply_adds(analysis) for analysis in analyses]):
        yield "  paper", texts
    yield "activations", [_short(analysis.activations) for analysis in analyses]


def _paper_parameters(analysis: NetworkAnalysis) -> str:
    return f"{analysis.paper.parameters / 1e6:g}e6" if analysis.paper and analysis.paper.parameters else ""


def _paper_multiply_adds(analysis: NetworkAnalysis) -> str:
    return f"{analysis.paper.multiply_adds / 1e9:g}e9" if analysis.paper and analysis.paper.multiply_adds else ""


def _counts(
    analyses: Sequence[NetworkAnalysis], stages: Sequence[tuple[StageAnalysis | None, ...]]
) -> Iterator[list[str]]:
    """Yield, for each count, a title row and one row per network with its stages and total."""
    for title, key in (
        ("parameters", "parameters"),
        ("multiply-adds", "multiply_adds"),
        ("activations", "activations"),
        ("receptive field", "receptive_field"),
        ("stride", "stride"),
    ):
        totals = [getattr(analysis, key, None) for analysis in analyses]
        exponent = 0 if None in totals else _exponent(max(totals))
        unit = f"1e{exponent}" if exponent else "pixels"
        yield [f"{title}, {unit}", *[""] * (len(stages) + 1)]
        for i, analysis in enumerate(analyses):
            values = [*(getattr(row[i], key, None) for row in stages), totals[i]]
            texts = ["" if value is None else f"{value / 10**exponent:.{2 if exponent else 0}f}" for value in values]
            yield [f"  {analysis.name}", *texts]


def _exponent(value: int) -> int:
    return next((exponent for exponent in (9, 6) if value >= 10**exponent), 3)


def _short(value: int) -> str:
    return f"{value / 10 ** _exponent(value):.2f}e{_exponent(value)}"


def _render(rows: Sequence[Sequence[str]], markdown: bool, numbers_from: int | None = None) -> str:
    """Render the rows as a table, the first as the header; columns from `numbers_from` on are right-aligned."""
    left = len(rows[0]) if numbers_from is None else numbers_from
    if markdown:
        # Rejoin words that were hyphenated for a terminal's narrow columns.
        joined = [[cell.replace("-\n", "-").replace("\n", "<br>") for cell in row] for row in rows]
        header, body = joined[0], joined[1:]
    else:
        # A real header would make tabulate's columns two wider, and five networks would not fit.
        header, body = (), [rows[0], SEPARATING_LINE, *rows[1:]]
    return tabulate(
        body,
        header,
        tablefmt="pipe" if markdown else "simple",
        colalign=["left"] * left + ["right"] * (len(rows[0]) - left),
        disable_numparse=True,
        preserve_whitespace=True,
    )
