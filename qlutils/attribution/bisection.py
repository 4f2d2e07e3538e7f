"""The rule "converged": every path is cut into intervals until the integral on each has settled.

On an interval, Simpson's rule (3 gradients) is compared with Boole's (5, two of them new). Where
they differ by more than a share of what the tolerance allows, or where their sum misses the change
of the probability, the interval is halved; each half has its 3 gradients already. Most layers are
done after the first two rounds; a layer whose probability jumps somewhere gets its gradients there.

Shapes: Q queries, B baselines a query, L layers, N neurons a layer, K intervals or places, W the
width of a row (see `paths`). A path is named by (query, baseline, layer).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

# |Boole - Simpson| is the error of Simpson's rule; Boole's, which is what we keep, is far smaller,
# but the errors of some intervals and of the guesses before add up. Chosen on 32 queries each of
# SmolLM2-135M and Gemma 3 270M by ig: at 0.2 the KN sets are the converged ones.
SETTLED = 0.2  # of the tolerance, for one interval
GAP_SHARE = 0.5  # what the sum over a layer's neurons misses may hide in several of them
NARROWEST = 2.0**-10  # an interval that has not settled at this width is given up
ROUNDING = 4  # units in the last place by which a probability may be off: bfloat16 has 8 bits

Rule = tuple[float, ...]  # the weights of the five quarter points of an interval
TRAPEZOID = (0.5, 0.0, 0.0, 0.0, 0.5)
SIMPSON = (1 / 6, 0.0, 4 / 6, 0.0, 1 / 6)
BOOLE = (7 / 90, 32 / 90, 12 / 90, 32 / 90, 7 / 90)


@dataclass
class Intervals:
    """K intervals that partition all paths. `gradient` (K, 5, W), with respect to u, and
    `probability` (K, 5) are those at the quarter points; the 2nd and 4th are there where
    `quartered`. `path` (3, K), `start`, `width` (K,) and `quartered` lie on the CPU."""

    path: Tensor
    start: Tensor
    width: Tensor
    gradient: Tensor
    probability: Tensor
    quartered: Tensor
    error: Tensor

    @classmethod
    def whole(cls, path, gradient, probability):
        """One interval a path, from gradients (K, 3, W) and probabilities (K, 3) at its beginning,
        middle and end."""
        count = path.shape[1]
        start = torch.zeros(count, dtype=torch.float64)
        return cls(
            path=path,
            start=start,
            width=torch.ones_like(start),
            gradient=_spread(gradient),
            probability=_spread(probability),
            quartered=torch.zeros(count, dtype=torch.bool),
            error=torch.zeros_like(start),
        )

    def pick(self, chosen):
        """Those at `chosen`, a mask or indices."""

        def part(name):
            value = getattr(self, name)
            return value[:, chosen] if name == "path" else value[chosen.to(value.device)]

        return Intervals(**{field.name: part(field.name) for field in fields(self)})

    @staticmethod
    def join(parts):
        """All intervals of several."""
        names = [field.name for field in fields(Intervals)]
        return Intervals(
            **{
                name: torch.cat([getattr(part, name) for part in parts], 1 if name == "path" else 0)
                for name in names
            }
        )

    def halves(self):
        """Two intervals for each, which need their quarter points."""
        width = self.width / 2
        ready = torch.zeros_like(self.quartered)

        def half(first, start):
            points = slice(first, first + 3)
            return Intervals(
                self.path,
                start,
                width,
                _spread(self.gradient[:, points]),
                _spread(self.probability[:, points]),
                ready,
                self.error,
            )

        return Intervals.join([half(0, self.start), half(2, self.start + width)])

    def integral(self, rule):
        """(K, W) integrals of the gradient over each interval."""
        weight = self.gradient.new_tensor(rule)
        width = self.width.to(self.gradient)[:, None]
        return torch.einsum("p,kpw->kw", weight, self.gradient) * width

    def best(self):
        """(K, W) integrals by the best rule the known points allow."""
        quartered = self.quartered.to(self.gradient.device)[:, None]
        return torch.where(quartered, self.integral(BOOLE), self.integral(SIMPSON))

    def judge(self, replay, coarse, fine):
        """Set `error` (K,): by how much the attributions by two rules differ, or what the better
        one misses of the change of the probability."""
        better = self.integral(fine)
        differs = replay.paths.largest_score(self.path, better - self.integral(coarse))
        change = self.probability[:, 4] - self.probability[:, 0]
        missed = (replay.paths.rise(self.path, better) - change).abs()
        # smaller intervals would not help where the probabilities themselves are rounded
        rounding = ROUNDING * torch.finfo(replay.lm.dtype).eps
        missed = (missed - rounding * self.probability.amax(1)).clamp_min(0)
        self.error = torch.maximum(differs, GAP_SHARE * missed).double().cpu()


def _spread(three):
    """(K, 3, ...) at the places 0, 2, 4 of (K, 5, ...)."""
    five = three.new_zeros(len(three), 5, *three.shape[2:])
    five[:, ::2] = three
    return five


def _add_quarter_points(intervals, replay, coordinate, row_budget):
    """Take the gradients at the 2nd and 4th quarter point of every interval."""
    path = intervals.path.repeat_interleave(2, 1)
    quarter = torch.tensor([0.25, 0.75], dtype=torch.float64)
    u = (intervals.start[:, None] + intervals.width[:, None] * quarter).flatten()
    gradient, probability = replay.gradients_at(path, coordinate.alpha(path, u), row_budget)
    gradient = gradient * coordinate.slope(path, u).to(gradient)[:, None]
    intervals.gradient[:, 1::2] = gradient.unflatten(0, (-1, 2))
    intervals.probability[:, 1::2] = probability.unflatten(0, (-1, 2))
    intervals.quartered = torch.ones_like(intervals.quartered)


def _largest(scores):
    """(Q,) largest of the scores (Q, N); where none is positive, and so none a knowledge neuron's,
    something small."""
    return torch.maximum(scores.amax(1), 1e-3 * scores.abs().amax(1))


@dataclass
class Integral:
    """`mean` (Q, B, L, W), the mean gradient of each path; `converged` (Q,), whether all intervals
    of a query have settled; `evaluations` (Q, L), gradients a baseline, the path's end included."""

    mean: Tensor
    converged: Tensor
    evaluations: Tensor


def bisect(replay, coordinate, intervals, spec):
    """Halve `intervals` until no attribution of a query moves by more than the tolerance's share of
    its largest one.

    A round: the integrals so far give the scores, and these what an interval's error may be; one
    above that gets its quarter points or, if it has them, gives way to its halves with theirs. An
    interval of 3 gradients, as every path is at first, is judged by the trapezoid rule against
    Simpson's, one of 5 by Simpson's against Boole's. `touched`: layers with new scores."""
    queries, baselines, layers = coordinate.center.shape
    shape = queries * baselines * layers, intervals.gradient.shape[-1]
    evaluations = torch.full((queries, layers), 3.0, dtype=torch.float64)
    largest = torch.zeros(queries, layers, dtype=torch.float64)
    touched = list(range(layers))
    intervals.judge(replay, TRAPEZOID, SIMPSON)
    while True:
        query, baseline, layer = intervals.path
        place = ((query * baselines + baseline) * layers + layer).to(intervals.gradient.device)
        mean = intervals.gradient.new_zeros(shape).index_add_(0, place, intervals.best())
        mean = mean.view(queries, baselines, layers, -1)
        found = [_largest(replay.paths.scores(mean[:, :, one], one)) for one in touched]
        largest[:, touched] = torch.stack(found, 1).double().cpu()
        allowed = SETTLED * spec.tolerance * largest.amax(1) / baselines**0.5
        moving = intervals.error > allowed[query]
        refined = moving & ((intervals.width > NARROWEST) | ~intervals.quartered)
        if not refined.any():
            converged = torch.ones(queries, dtype=torch.bool)
            converged[query[moving]] = False
            return Integral(mean, converged, evaluations)
        chosen = intervals.pick(refined)
        whole, halved = chosen.pick(~chosen.quartered), chosen.pick(chosen.quartered).halves()
        chosen = Intervals.join([whole, halved])
        _add_quarter_points(chosen, replay, coordinate, spec.row_budget)
        chosen.judge(replay, SIMPSON, BOOLE)
        where = chosen.path[0], chosen.path[2]
        more = torch.full((chosen.path.shape[1],), 2.0 / baselines, dtype=torch.float64)
        evaluations.index_put_(where, more, accumulate=True)
        touched = chosen.path[2].unique().tolist()
        intervals = Intervals.join([intervals.pick(~refined), chosen])
