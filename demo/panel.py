"""The routing panel's numbers as HTML: a legend with shares of the chosen layer, and all layers at a glance."""

from collections.abc import Sequence

import numpy as np

from demo.routing_view import Routing, palette, shares

DENSE = (
    '<p class="routing-note">This model\'s vision tower is dense: it has no experts, so there is no routing to show.'
    " Load a model whose tower is a CLIP-MoE.</p>"
)
EMPTY = '<p class="routing-note">Send a picture to see which expert takes which patch.</p>'

CSS = """
.routing-note {color: var(--body-text-color-subdued); margin: 0.4rem 0}
.routing-row {display: grid; grid-template-columns: 5.5rem 1fr 8.5rem; align-items: center; gap: 0.6rem;
  font-size: 0.85rem; line-height: 1.5rem; font-variant-numeric: tabular-nums}
.routing-row .swatch {display: inline-block; width: 0.75rem; height: 0.75rem; border-radius: 2px; margin-right: 0.4rem}
.routing-bar {display: flex; height: 0.6rem; border-radius: 3px; overflow: hidden;
  background: var(--background-fill-secondary)}
.routing-number {color: var(--body-text-color-subdued); text-align: right; white-space: nowrap}
.routing-title {font-size: 0.85rem; font-weight: 600; margin: 0.9rem 0 0.2rem}
.routing-layer {grid-template-columns: 5.5rem 1fr}
.routing-layer .routing-bar {height: 0.8rem}
.routing-layer.chosen {font-weight: 600}
.routing-layer.chosen .routing-bar {outline: 2px solid var(--body-text-color); outline-offset: 1px}
"""


def legend(routing: Routing, layer: int, blocks: Sequence[int]) -> str:
    """Share of the patches and mean gate per expert in one layer, then the shares of all layers.

    Args:
        routing: of the picture.
        layer: position in the routing's layers.
        blocks: indices of these layers among all blocks of the tower.
    """
    colors = [_hex(color) for color in palette(routing.num_experts)]
    experts_HW, gates_HW = routing.expert_maps[layer], routing.gate_maps[layer]
    rows = [f'<div class="routing-title">Block {blocks[layer]}: patches by first choice</div>']
    for expert, share in enumerate(shares(experts_HW, routing.num_experts)):
        gate = f"gate {gates_HW[experts_HW == expert].mean():.2f}" if share else "unused"
        rows.append(
            f'<div class="routing-row"><span><span class="swatch" style="background:{colors[expert]}"></span>'
            f'Expert {expert}</span><span class="routing-bar">{_bar(share, colors[expert])}</span>'
            f'<span class="routing-number">{100 * share:.0f} %, {gate}</span></div>'
        )
    rows.append('<div class="routing-title">All blocks</div>')
    for index, experts in enumerate(routing.expert_maps):
        parts = zip(shares(experts, routing.num_experts), colors, strict=True)
        chosen = " chosen" if index == layer else ""
        rows.append(
            f'<div class="routing-row routing-layer{chosen}"><span>Block {blocks[index]}</span>'
            f'<span class="routing-bar">{"".join(_bar(share, color) for share, color in parts)}</span></div>'
        )
    return "".join(rows)


def _bar(share: float, color: str) -> str:
    return f'<span style="width:{100 * share:.2f}%;background:{color}"></span>'


def _hex(color: np.ndarray) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in color)
