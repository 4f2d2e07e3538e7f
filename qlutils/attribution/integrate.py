"""The integral over each path: the paper's sum and other fixed rules, or refined until converged.

Shapes: Q queries, B baselines a query, P points a layer, L layers, N neurons a layer, W the width
of a row (see `paths`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from qlutils.attribution.bisection import Integral, Intervals, bisect
from qlutils.attribution.coordinate import Coordinate
from qlutils.attribution.gradients import Leaf, Replay
from qlutils.attribution.paths import Paths
from qlutils.attribution.quadrature import fixed_plan
from qlutils.model.answer import final_logits
from qlutils.model.passes import CleanPass, on_device


@dataclass
class Raw:
    """Raw attributions `scores` (Q, L, N), summed over baselines; what their sums lack to
    completeness, `gap` (Q, L), signed; `probability` (Q,) of the answer token and whether it is the
    likeliest, `known`; `converged` (Q,), whether the integrals have settled, None for a rule that
    cannot tell; `evaluations` (Q,), gradients a layer and baseline."""

    scores: Tensor
    gap: Tensor
    probability: Tensor
    known: Tensor
    converged: Tensor | None
    evaluations: Tensor


def integrate(lm, clean: CleanPass, target: Tensor, starts: Tensor | None, spec) -> Raw:
    """Raw attributions of the answer tokens `target` (Q,) from baselines `starts` (Q, B, L, N;
    None: zero) to the clean neurons."""
    logits = final_logits(lm, clean.inputs[-1][:, 0])  # (Q, V)
    p_clean = torch.softmax(logits, -1).gather(1, target[:, None])[:, 0]
    paths = Paths.of(lm, clean, starts, spec)
    replay = Replay(lm, clean, target, p_clean, paths)
    rule = _converge if spec.rule == "converged" else _fixed_sum
    integral, p_start = rule(replay, spec)
    layers = range(lm.num_layers)
    scores = [paths.scores(integral.mean[:, :, layer], layer) for layer in layers]
    scores = torch.stack(scores, 1)
    rise = p_clean[:, None, None] - p_start  # (Q, B, L)
    return Raw(
        scores=scores,
        gap=scores.sum(-1) - rise.sum(1),
        probability=p_clean,
        known=logits.argmax(-1) == target,
        converged=integral.converged,
        evaluations=integral.evaluations.mean(1),
    )


def _fixed_sum(replay: Replay, spec) -> tuple[Integral, Tensor]:
    """The integral by a rule whose nodes are known in advance, and the probabilities (Q, B, L) at
    the paths' beginnings."""
    paths = replay.paths
    queries, baselines, layers, _ = paths.factor.shape
    points = fixed_plan(spec.rule, spec.steps, baselines)
    points = [on_device(one, replay.target.device) for one in points]
    size = max(1, spec.row_budget // (layers * queries))
    begin = torch.stack(paths.begin, 2)  # (Q, B, L, W)
    mean = torch.zeros_like(begin, dtype=replay.lm.score_dtype)
    p = []
    for index, node, weight in zip(*(one.split(size, 1) for one in points)):
        gradients, probability = replay.gradients([Leaf(index, node)] * layers)
        p.append(probability.unflatten(1, (layers, -1)))
        of_baseline = one_hot(index, baselines) * weight[..., None]  # (1, P, B)
        for layer, gradient in enumerate(gradients):
            mean[:, :, layer] += of_baseline.mT.to(mean) @ gradient.to(mean)
    p_begin = torch.cat(p, 2)[:, :, :baselines].mT  # the first points, see `fixed_plan`
    evaluations = torch.full((queries, layers), spec.steps, dtype=torch.float64)
    return Integral(mean, None, evaluations), p_begin


def _converge(replay: Replay, spec) -> tuple[Integral, Tensor]:
    """The integral refined until it has settled, and the probabilities (Q, B, L) at the paths'
    beginnings."""
    coordinate = replay.paths.coordinate()
    whole = _whole_paths(replay, coordinate, spec.row_budget)
    p_start = whole.probability[:, 0].view(coordinate.center.shape)
    return bisect(replay, coordinate, whole, spec), p_start


def _whole_paths(replay: Replay, coordinate: Coordinate, row_budget: int) -> Intervals:
    """Every path as one interval: gradients at its beginning, its middle and its end."""
    shape = coordinate.center.shape
    queries, baselines, layers = shape
    path = torch.cartesian_prod(*map(torch.arange, shape)).T  # (3, K)
    count = path.shape[1]
    begin, middle, end = (torch.full((count,), u, dtype=torch.float64) for u in (0.0, 0.5, 1.0))
    alpha = torch.cat([coordinate.alpha(path, u) for u in (begin, middle)])
    found = replay.gradients_at(path.repeat(1, 2), alpha, row_budget)
    gradient, probability = (list(one.chunk(2)) for one in found)
    at_end = replay.gradients_at_end()[:, None].expand(-1, baselines, -1, -1)
    gradient = torch.stack([*gradient, at_end.flatten(0, 2)], 1)  # (K, 3, W)
    p_end = replay.p_clean.repeat_interleave(baselines * layers)
    probability = torch.stack([*probability, p_end], 1)  # (K, 3)
    slopes = torch.stack([coordinate.slope(path, u) for u in (begin, middle, end)], 1)
    gradient = gradient * slopes.to(gradient)[..., None]
    return Intervals.whole(path, gradient, probability)
