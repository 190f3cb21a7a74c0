"""How the forward pass's cost grows with tokens, experts, experts per token and picture size; float32."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from encoder import LOOP, OPEN_CLIP, make_towers, sizes
from layers import Case, make_inputs, make_variants, runner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measure import OURS, Row, interleave, rows_of

from vision_moe.files import replacing
from vision_moe.plots import COLORS

LABELS = {
    "tokens": "tokens (E = 4, k = 2)",
    "experts": "experts (1,024 tokens, k = 2)",
    "experts per token": "experts per token (1,024 tokens, E = 8)",
    "picture": "picture's side in pixels (ViT-B/16, one picture)",
}


def layer_cases(*, tiny: bool) -> dict[str, list[tuple[int, Case]]]:
    """Axis to its values and the layers at them, of ViT-B's widths."""
    T, D, F = (64, 32, 64) if tiny else (1024, 768, 3072)
    return {
        "tokens": [(t, Case("", t, D, F, 4)) for t in (T // 16, T // 4, T, 3 * T)],
        "experts": [(e, Case("", T, D, F, e)) for e in (2, 4, 8, 16)],
        "experts per token": [(k, Case("", T, D, F, 8, k)) for k in (1, 2, 4)],
    }


def all_rows(rounds: int, *, tiny: bool) -> list[Row]:
    """Seconds of every variant at every value of each axis."""
    rows: list[Row] = []
    for axis, cases in layer_cases(tiny=tiny).items():
        for value, case in cases:
            inputs, variants = make_inputs(case, torch.float32), make_variants(case, torch.float32)
            runners = {name: runner(module, inputs, "forward") for name, module in variants.items()}
            rows += rows_of(interleave(runners, rounds, f"{axis} {value}"), "loop", axis=axis, value=value)
    for side in (112, 224, 336):
        towers = make_towers(sizes(16, side, tiny=tiny), torch.float32)
        pixels = torch.randn(1, 3, side, side)
        with torch.no_grad():
            runners = {name: partial(towers[name], pixels) for name in (LOOP, OURS, OPEN_CLIP)}
            rows += rows_of(interleave(runners, rounds, f"picture {side}"), LOOP, axis="picture", value=side)
    return rows


def plot(rows: Sequence[Mapping[str, str | float]], file: Path) -> None:
    """One panel per axis, one line per variant, CPU seconds over the axis."""
    figure = Figure(figsize=(9.0, 6.4), layout="constrained")
    for panel, (axis, label) in zip(figure.subplots(2, 2).flat, LABELS.items(), strict=True):
        own = [row for row in rows if row["axis"] == axis]
        names = list(dict.fromkeys(str(row["variant"]) for row in own))
        for color, name in zip(COLORS, names, strict=False):
            points = [(float(row["value"]), float(row["seconds"])) for row in own if row["variant"] == name]
            panel.plot(*zip(*points, strict=True), label=name, color=color, marker="o", markersize=3, linewidth=1.4)
        panel.set(xlabel=label, ylabel="CPU seconds", ylim=(0, None), xlim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure)
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
