"""What each expert takes over many pictures: its share of the patches, and those it took most surely.

Shapes: L layers, E experts, H x W patch grid.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from demo.routing_view import Routing, shares


class Best(NamedTuple):
    """A patch and the gate with which an expert was its first choice.

    gate: in [0, 1]; picture: position in the folder; patch: row by row from 0.
    """

    gate: float
    picture: int
    patch: int


class Survey:
    """Gathers routings, one picture at a time.

    Args:
        num_kept: patches kept of each expert and layer, at most one of a picture.
    """

    def __init__(self, num_kept: int) -> None:
        self.num_pictures = 0
        self._num_kept = num_kept
        self._shares_LE: NDArray[np.float64] | None = None
        self._best: list[list[list[Best]]] = []

    def add(self, routing: Routing, picture: int) -> None:
        """Takes in the routing of the picture at this position of the folder."""
        shares_LE = np.stack([shares(experts, routing.num_experts) for experts in routing.expert_maps])
        if self._shares_LE is None:
            self._shares_LE = np.zeros_like(shares_LE)
            self._best = [[[] for _ in row] for row in shares_LE]
        self._shares_LE += shares_LE
        self.num_pictures += 1
        for best_E, experts_HW, gates_HW in zip(self._best, routing.expert_maps, routing.gate_maps, strict=True):
            for expert in np.unique(experts_HW):
                gates_P = np.where(experts_HW == expert, gates_HW, -1.0).ravel()
                patch = int(gates_P.argmax())
                best_E[expert].append(Best(float(gates_P[patch]), picture, patch))
                # Stable: of equal gates the first picture stays.
                best_E[expert].sort(key=lambda best: -best.gate)
                del best_E[expert][self._num_kept :]

    def shares(self, layer: int) -> NDArray[np.float64]:
        """Share of all patches whose first choice is each expert of a layer: float[E], sums to 1."""
        assert self._shares_LE is not None
        return self._shares_LE[layer] / self.num_pictures

    def best(self, layer: int) -> list[list[Best]]:
        """By expert, the surest first; an expert that no patch chose has none."""
        return self._best[layer]
