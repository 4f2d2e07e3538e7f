"""The coordinate in which a path is cut into intervals.

Where a norm follows the MLP, the probability depends on alpha through x / sqrt(mean(x**2) + eps)
with x = x_b + alpha (x_w - x_b): flat but for a jump where x is shortest. In the coordinate u the
jump is as wide as the rest.

Shapes: Q queries, B baselines a query, L layers, d residual width, K places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRAIGHT = 1e3  # a floor from which on a coordinate is a straight line to all digits that matter


@dataclass
class Coordinate:
    """u in [0, 1] for each path, alpha = center + floor * sinh(low + u * (high - low)).

    The jump lies around alpha = `center` and is about `floor` wide; without a norm the floor is
    `STRAIGHT`, and alpha = u. `center` and `floor` are (Q, B, L), float64, on the CPU."""

    center: Tensor
    floor: Tensor

    @classmethod
    def straight(cls, queries, baselines, layers):
        """alpha = u on every path."""
        center = torch.zeros(queries, baselines, layers, dtype=torch.float64)
        return cls(center, torch.full_like(center, STRAIGHT))

    @classmethod
    def of_norm(cls, begin, end, epsilon):
        """(Q, B) center and floor of a layer whose down-projection's output goes from `begin`
        (Q, B, d) to `end` (Q, 1, d) and through a norm with `epsilon`."""
        begin = begin.double()
        change = end.double() - begin
        squared = change.square().mean(-1)
        center = -(begin * change).mean(-1) / squared.clamp_min(1e-300)
        shortest = (begin + center[..., None] * change).square().mean(-1)
        floor = ((shortest + epsilon) / squared.clamp_min(1e-300)).sqrt()
        straight = ~(floor < STRAIGHT)  # hardly a change, or none
        return center.masked_fill(straight, 0.0).cpu(), floor.masked_fill(straight, STRAIGHT).cpu()

    def _ends(self, path):
        center, floor = self.center[tuple(path)], self.floor[tuple(path)]
        return center, floor, torch.asinh(-center / floor), torch.asinh((1 - center) / floor)

    def alpha(self, path, u):
        """(K,) places on the paths `path` (3, K)."""
        center, floor, low, high = self._ends(path)
        return (center + floor * torch.sinh(low + u * (high - low))).clamp(0, 1)

    def slope(self, path, u):
        """(K,) derivatives of alpha with respect to u."""
        _, floor, low, high = self._ends(path)
        return floor * torch.cosh(low + u * (high - low)) * (high - low)
