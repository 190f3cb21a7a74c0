"""The experts as HTML: patches and tokens in their expert's color, bars of how much each takes, its surest patches."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo.routing_view import Routing, palette, shares

# Of a patch whose gate says no more than chance, and of one whose gate is 1; the picture still shows through.
_FAINTEST, _STRONGEST = 0.35, 0.85
_MAX_EXPERTS = 64
_STYLE = Path(__file__).with_name("style.css")

DENSE = "This model's vision tower is dense: it has no experts to show. Load a model whose tower is a CLIP-MoE."
EMPTY = (
    "Send a picture. Each of its patches then appears here in the color of the expert that took it, the stronger the "
    "surer the router was."
)


def css() -> str:
    """The page's style sheet; pointing at an expert's bar, patch or token fades the others."""
    rules = [_STYLE.read_text(encoding="utf-8")]
    for expert in range(_MAX_EXPERTS):
        pointed = f".experts:has(.e{expert}:hover)"
        rules.append(
            f"{pointed} .patch:not(.e{expert}) {{fill-opacity: 0.04}}"
            f"{pointed} .token:not(.e{expert}), {pointed} .bar-row:not(.e{expert}), {pointed} .segment:not(.e{expert}) "
            "{opacity: 0.25}"
        )
    return "\n".join(rules)


def opacity(gate: float, num_experts: int) -> float:
    """How strongly a color is laid on: from a gate of one in so many experts, which is chance, to a gate of 1.

    By the square root: the first steps away from chance are the ones to be seen in a young router.
    """
    chance = 1 / num_experts
    sureness = 1.0 if num_experts == 1 else min(1.0, max(0.0, (float(gate) - chance) / (1 - chance)))
    return float(_FAINTEST + (_STRONGEST - _FAINTEST) * sureness**0.5)


def note(text: str) -> str:
    """A sentence in the place of what cannot be shown."""
    return f'<p class="experts-note">{html.escape(text)}</p>'


def view(routing: Routing, layer: int, blocks: Sequence[int]) -> str:
    """One layer's routing of a picture or sentence, each expert's share in it, and all layers at a glance.

    Args:
        routing: what is shown.
        layer: position in the routing's layers.
        blocks: indices of these layers among all blocks of the tower.
    """
    colors = palette(routing.num_experts)
    experts_HW, gates_HW = routing.expert_maps[layer], routing.gate_maps[layer]
    gates = [gates_HW[experts_HW == expert] for expert in range(routing.num_experts)]
    notes = [f"gate {found.mean():.2f}" if found.size else "unused" for found in gates]
    what = "tokens" if routing.picture is None else "patches"
    shown = _tokens(routing, layer, colors) if routing.picture is None else _patches(routing, layer, colors)
    return (
        f'<div class="experts">{shown}'
        f'<div class="experts-title">Layer {layer + 1}, block {blocks[layer]} of the tower: share of {what}, gate</div>'
        f"{_bars(shares(experts_HW, routing.num_experts), notes, colors)}"
        f'<div class="experts-title">All layers</div>{_layers(routing, layer, blocks, colors)}</div>'
    )


def surest(shares_E: NDArray[np.float64], tiles: Sequence[Sequence[tuple[Image.Image, str]]]) -> str:
    """A row an expert: its share of the patches, and the patches it took most surely.

    Args:
        shares_E: sums to 1.
        tiles: by expert, a picture of the patch and its surroundings, and what pointing at it says.
    """
    colors = palette(len(shares_E))
    rows = []
    for expert, (share, found) in enumerate(zip(shares_E, tiles, strict=True)):
        shown = "".join(
            f'<img src="{data_uri(tile)}" alt="{html.escape(title)}" title="{html.escape(title)}">'
            for tile, title in found
        )
        rows.append(
            f'<div class="surest-row" style="--expert:{colors[expert]}"><div class="surest-name">'
            f'<span class="swatch"></span>Expert {expert}<b>{100 * share:.0f} %</b>'
            f'<span class="bar"><span style="width:{100 * share:.2f}%;background:var(--expert)"></span></span></div>'
            f'<div class="surest-tiles">{shown or "first choice of no patch"}</div></div>'
        )
    return f'<div class="surest">{"".join(rows)}</div>'


def gallery(columns: Sequence[tuple[str, Sequence[tuple[Image.Image, str, float]]]]) -> str:
    """Found pictures side by side, a column a model.

    Args:
        columns: heading, and the pictures with their name and cosine, best first.
    """
    shown = []
    for heading, hits in columns:
        cards = "".join(
            f'<figure><img src="{data_uri(picture)}" alt="{html.escape(name)}" title="{html.escape(name)}">'
            f"<figcaption><b>{rank}</b> cosine {cosine:.3f}</figcaption></figure>"
            for rank, (picture, name, cosine) in enumerate(hits, start=1)
        )
        shown.append(f'<section><h4>{html.escape(heading)}</h4><div class="found">{cards}</div></section>')
    return f'<div class="found-columns">{"".join(shown)}</div>'


def data_uri(picture: Image.Image) -> str:
    """The picture inside the page itself, so that no file has to be served."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _patches(routing: Routing, layer: int, colors: list[str]) -> str:
    assert routing.picture is not None
    experts_HW, gates_HW = routing.expert_maps[layer], routing.gate_maps[layer]
    height, width = experts_HW.shape
    rectangles = "".join(
        f'<rect class="patch e{expert}" x="{column}" y="{row}" width="1" height="1" fill="{colors[expert]}" '
        f'fill-opacity="{opacity(gates_HW[row, column], routing.num_experts):.3f}"><title>Expert {expert}, gate '
        f"{gates_HW[row, column]:.2f}\nrow {row + 1}, column {column + 1}</title></rect>"
        for (row, column), expert in np.ndenumerate(experts_HW)
    )
    return (
        f'<svg class="patches" viewBox="0 0 {width} {height}" role="img" aria-label="patches by expert">'
        f'<image href="{data_uri(routing.picture)}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
        f"{rectangles}</svg>"
    )


def _tokens(routing: Routing, layer: int, colors: list[str]) -> str:
    experts, gates = routing.expert_maps[layer][0], routing.gate_maps[layer][0]
    strengths = [f"{100 * opacity(gate, routing.num_experts):.0f}%" for gate in gates]
    chips = "".join(
        f'<span class="token e{expert}" style="--expert:{colors[expert]};--strength:{strength}" '
        f'title="Expert {expert}, gate {gate:.2f}">{html.escape(word) or "␣"}<i>{expert}</i></span>'
        for word, expert, gate, strength in zip(routing.words, experts, gates, strengths, strict=True)
    )
    return f'<div class="tokens">{chips}</div>'


def _bars(shares_E: NDArray[np.float64], notes: Sequence[str], colors: list[str]) -> str:
    return "".join(
        f'<div class="bar-row e{expert}" style="--expert:{colors[expert]}">'
        f'<span><span class="swatch"></span>Expert {expert}</span>'
        f'<span class="bar"><span style="width:{100 * share:.2f}%;background:var(--expert)"></span></span>'
        f'<span class="number">{100 * share:.0f} %, {notes[expert]}</span></div>'
        for expert, share in enumerate(shares_E)
    )


def _layers(routing: Routing, chosen: int, blocks: Sequence[int], colors: list[str]) -> str:
    rows = []
    for layer, experts_HW in enumerate(routing.expert_maps):
        segments = "".join(
            f'<span class="segment e{expert}" style="width:{100 * share:.2f}%;background:{colors[expert]}"></span>'
            for expert, share in enumerate(shares(experts_HW, routing.num_experts))
        )
        mark = " chosen" if layer == chosen else ""
        rows.append(
            f'<div class="bar-row layer{mark}" title="block {blocks[layer]} of the tower">'
            f'<span>Layer {layer + 1}</span><span class="bar">{segments}</span></div>'
        )
    return "".join(rows)
