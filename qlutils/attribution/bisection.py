"""The rule "converged": every path is cut into intervals until the integral on each has settled.

On an interval, Simpson's rule (3 gradients) is compared with Boole's (5, two of them new). Where
they differ by more than a share of what the tolerance allows, or where their sum misses the change
of the probability, the interval is halved; each half has its 3 gradients already. Most layers are
done after the first two rounds; a layer whose probability jumps somewhere gets its gradients there.

Shapes: Q queries, B baselines a query, L layers, N neurons a layer, K intervals or places, W the
width of a row (see `paths`). A path is named by (query, baseline, layer).
"""

from typing import NamedTuple

import torch
from torch import Tensor

# |Boole - Simpson| is the error of Simpson's rule; Boole's, which is what we keep, is far smaller,
# but the errors of some intervals and of the guesses before add up. Chosen on 32 queries each of
# SmolLM2-135M and Gemma 3 270M by ig: at 0.2 the KN sets are the converged ones.
SETTLED = 0.2  # of the tolerance, for one interval
GAP_SHARE = 0.5  # what the sum over a layer's neurons misses may hide in several of them
NARROWEST = 2.0**-10  # an interval that has not settled at this width is given up
ROUNDING = 4  # units in the last place by which a probability may be off: bfloat16 has 8 bits

# The weights of the five quarter points of an interval.
TRAPEZOID = (0.5, 0.0, 0.0, 0.0, 0.5)
SIMPSON = (1 / 6, 0.0, 4 / 6, 0.0, 1 / 6)
BOOLE = (7 / 90, 32 / 90, 12 / 90, 32 / 90, 7 / 90)


class Intervals(NamedTuple):
    """K intervals that partition all paths. `gradient` (K, 5, W), with respect to u, and
    `probability` (K, 5) are those at the quarter points; the 2nd and 4th are there where
    `quartered` (K,). `integral` (K, W) of the gradient, and `error` (K,) of the attributions.
    `path` (K, 3), `start`, `width` (K,), `quartered` and `error` lie on the CPU."""

    path: Tensor
    start: Tensor
    width: Tensor
    gradient: Tensor
    probability: Tensor
    quartered: Tensor
    integral: Tensor
    error: Tensor

    def pick(self, chosen):
        """Those at `chosen`, a mask."""
        return Intervals(*(value[chosen.to(value.device)] for value in self))

    @staticmethod
    def join(parts):
        """All intervals of several."""
        return Intervals(*map(torch.cat, zip(*parts)))

    def halves(self):
        """Two intervals for each, which need their quarter points."""
        width = self.width / 2
        parts = []
        for first, start in ((0, self.start), (2, self.start + width)):
            points = slice(first, first + 3)
            parts.append(
                self._replace(
                    start=start,
                    width=width,
                    gradient=_spread(self.gradient[:, points]),
                    probability=_spread(self.probability[:, points]),
                )
            )
        return Intervals.join(parts)

    def take(self, places, replay, coordinate, row_budget):
        """Take the gradients at some quarter points, a slice of the five, of every interval."""
        quarters = torch.arange(5)[places]
        path = self.path.repeat_interleave(len(quarters), 0)
        u = (self.start[:, None] + self.width[:, None] * quarters / 4).flatten()
        gradient, probability = replay.gradients_at(path, coordinate.alpha(path, u), row_budget)
        gradient = gradient * coordinate.slope(path, u).to(gradient)[:, None]
        self.gradient[:, places] = gradient.unflatten(0, (-1, len(quarters)))
        self.probability[:, places] = probability.unflatten(0, (-1, len(quarters)))

    def judged(self, replay, coarse, fine):
        """With the integral by the rule `fine`, and as error by how much the attributions by both
        rules differ, or what the better one misses of the change of the probability."""
        width = self.width.to(self.gradient)[:, None]
        rules = self.gradient.new_tensor([coarse, fine])
        rough, better = torch.einsum("rp,kpw->rkw", rules, self.gradient) * width
        differs = replay.paths.largest_score(self.path, better - rough)
        change = self.probability[:, 4] - self.probability[:, 0]
        missed = (replay.paths.rise(self.path, better) - change).abs()
        # smaller intervals would not help where the probabilities themselves are rounded
        rounding = ROUNDING * torch.finfo(replay.lm.dtype).eps
        missed = (missed - rounding * self.probability.amax(1)).clamp_min(0)
        error = torch.maximum(differs, GAP_SHARE * missed).double().cpu()
        return self._replace(integral=better, error=error)


def _spread(three):
    """(K, 3, ...) at the places 0, 2, 4 of (K, 5, ...)."""
    five = three.new_zeros(len(three), 5, *three.shape[2:])
    five[:, ::2] = three
    return five


def _whole_paths(replay, coordinate, p_end, row_budget):
    """Every path as one interval: gradients at its beginning, its middle and its end."""
    shape = coordinate.center.shape  # (Q, B, L)
    path = torch.cartesian_prod(*map(torch.arange, shape))
    of_layer = replay.gradients_at_end()[:, None]  # (Q, 1, L, W)
    gradient = of_layer.expand(*shape, -1).flatten(0, 2)
    gradient = gradient * coordinate.slope(path, 1.0).to(gradient)[:, None]
    probability = p_end.repeat_interleave(len(path) // len(p_end))
    start = torch.zeros(len(path), dtype=torch.float64)
    intervals = Intervals(
        path=path,
        start=start,
        width=torch.ones_like(start),
        gradient=gradient[:, None].repeat(1, 5, 1),
        probability=probability[:, None].repeat(1, 5),
        quartered=torch.zeros(len(path), dtype=torch.bool),
        integral=gradient,
        error=start,
    )
    intervals.take(slice(0, 3, 2), replay, coordinate, row_budget)
    return intervals.judged(replay, TRAPEZOID, SIMPSON)


def _largest(scores):
    """(Q,) largest of the scores (Q, N); where none is positive, and so none a knowledge neuron's,
    something small."""
    return torch.maximum(scores.amax(1), 1e-3 * scores.abs().amax(1))


def bisect(replay, p_end, spec):
    """The mean gradient of each path (Q, B, L, W), the probability at its beginning (Q, B, L),
    whether all intervals of a query have settled (Q,), and gradients a baseline and layer (Q,), the
    path's end included. `p_end` (Q,): the probabilities at the ends.

    Intervals are halved until no attribution of a query moves by more than the tolerance's share of
    its largest one. A round: the integrals so far give the scores, and these what an interval's
    error may be; one above that gets its quarter points or, if it has them, gives way to its halves
    with theirs. An interval of 3 gradients, as every path is at first, is judged by the trapezoid
    rule against Simpson's, one of 5 by Simpson's against Boole's. `touched`: layers with new
    scores."""
    coordinate = replay.paths.coordinate()
    intervals = _whole_paths(replay, coordinate, p_end, spec.row_budget)
    queries, baselines, layers = shape = coordinate.center.shape
    p_start = intervals.probability[:, 0].view(shape)
    taken = torch.full((queries,), 3.0, dtype=torch.float64)
    largest = torch.zeros(queries, layers, dtype=torch.float64)
    touched = list(range(layers))
    while True:
        query, baseline, layer = intervals.path.T
        place = ((query * baselines + baseline) * layers + layer).to(p_end.device)
        mean = torch.zeros_like(intervals.integral[:1]).repeat(shape.numel(), 1)
        mean = mean.index_add_(0, place, intervals.integral).view(*shape, -1)
        found = [_largest(replay.paths.scores(mean[:, :, one], one)) for one in touched]
        largest[:, touched] = torch.stack(found, 1).double().cpu()
        allowed = SETTLED * spec.tolerance * largest.amax(1) / baselines**0.5
        moving = intervals.error > allowed[query]
        refined = moving & ((intervals.width > NARROWEST) | ~intervals.quartered)
        if not refined.any():
            converged = torch.ones(queries, dtype=torch.bool)
            converged[query[moving]] = False
            return mean, p_start, converged, taken
        whole = intervals.pick(refined & ~intervals.quartered)
        halved = intervals.pick(refined & intervals.quartered).halves()
        new = Intervals.join([whole._replace(quartered=~whole.quartered), halved])
        new.take(slice(1, None, 2), replay, coordinate, spec.row_budget)
        new = new.judged(replay, SIMPSON, BOOLE)
        taken += 2 * torch.bincount(new.path[:, 0], minlength=queries) / (baselines * layers)
        touched = new.path[:, 2].unique().tolist()
        intervals = Intervals.join([intervals.pick(~refined), new])
