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
    def of(cls, begin, end, epsilons):
        """Of layers whose down-projections' outputs go from `begin` L x (Q, B, d) to `end` L x
        (Q, 1, d), each through a norm with an epsilon (infinity: through none)."""
        centers = []
        floors = []
        for start, stop, epsilon in zip(begin, end, epsilons):
            start = start.double()
            change = stop.double() - start
            squared = change.square().mean(-1).clamp_min(1e-300)
            center = -(start * change).mean(-1) / squared
            shortest = (start + center[..., None] * change).square().mean(-1)
            floor = ((shortest + epsilon) / squared).sqrt()
            straight = ~(floor < STRAIGHT)  # hardly a change, or none
            centers.append(center.masked_fill(straight, 0.0))
            floors.append(floor.masked_fill(straight, STRAIGHT))
        return cls(torch.stack(centers, 2).cpu(), torch.stack(floors, 2).cpu())

    def _at(self, path, u):
        """Center and floor of the paths, the argument of sinh at `u`, and its range."""
        place = tuple(path.T)
        center = self.center[place]
        floor = self.floor[place]
        low = torch.asinh(-center / floor)
        reach = torch.asinh((1 - center) / floor) - low
        return center, floor, low + u * reach, reach

    def alpha(self, path, u):
        """(K,) places on the paths `path` (K, 3)."""
        center, floor, argument, _ = self._at(path, u)
        return (center + floor * torch.sinh(argument)).clamp(0, 1)

    def slope(self, path, u):
        """(K,) derivatives of alpha with respect to u."""
        _, floor, argument, reach = self._at(path, u)
        return floor * torch.cosh(argument) * reach
