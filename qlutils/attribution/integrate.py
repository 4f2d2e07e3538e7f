"""The integral over each path: the paper's sum and other fixed rules, or refined until converged.

Shapes: Q queries, B baselines a query, P points a layer, L layers, N neurons a layer, W the width
of a row (see `paths`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    replay = Replay(lm, clean, target, p_clean, Paths.of(lm, clean, starts, spec))
    if spec.rule == "converged":
        integral, p_start = _converge(replay, spec)
        mean, converged = integral.mean, integral.converged
        evaluations = integral.evaluations.mean(1)
    else:
        mean, p_start = _fixed_sum(replay, spec)
        converged = None
        evaluations = torch.full((len(target),), spec.steps, dtype=torch.float64)
    scores = [replay.paths.scores(mean[:, :, layer], layer) for layer in range(lm.num_layers)]
    scores = torch.stack(scores, 1)
    known = logits.argmax(-1) == target
    gap = scores.sum(-1) - (p_clean[:, None, None] - p_start).sum(1)
    return Raw(scores, gap, p_clean, known, converged, evaluations)


def _fixed_sum(replay: Replay, spec) -> tuple[Tensor, Tensor]:
    """Mean gradients (Q, B, L, W) by a rule whose nodes are known in advance, and the probabilities
    (Q, B, L) at the paths' beginnings."""
    layers, device = replay.lm.num_layers, replay.target.device
    queries, baselines = replay.paths.factor.shape[:2]
    plan, at_end = fixed_plan(spec.rule, spec.steps, baselines)
    index, node, weight = (on_device(one, device) for one in plan)
    begin = torch.stack(replay.paths.begin, 2)
    mean = torch.zeros_like(begin, dtype=replay.lm.score_dtype)  # (Q, B, L, W)
    first = []
    size = max(1, spec.row_budget // (layers * queries))
    for start in range(0, index.shape[1], size):
        part = slice(start, start + size)
        with_end = at_end is not None and start == 0
        found = replay.gradients([Leaf(index[:, part], node[:, part])] * layers, with_end=with_end)
        of_baseline = torch.nn.functional.one_hot(index[:, part], baselines) * weight[:, part, None]
        for layer, gradient in enumerate(found.at):
            mean[:, :, layer] += of_baseline.mT.to(mean) @ gradient.to(mean)
            if with_end:
                mean[:, :, layer] += at_end * found.end[layer][:, None]
        first.append(found.probability.unflatten(1, (layers, -1)))
    return mean, torch.cat(first, 2)[:, :, :baselines].mT


def _converge(replay: Replay, spec) -> tuple[Integral, Tensor]:
    """The integral refined until it has settled, and the probabilities (Q, B, L) at the paths'
    beginnings."""
    coordinate = replay.paths.coordinate()
    whole = _whole_paths(replay, coordinate, spec.row_budget)
    p_start = whole.probability[:, 0].view(coordinate.center.shape)
    return bisect(replay, coordinate, whole, spec), p_start


def _whole_paths(replay: Replay, coordinate: Coordinate, row_budget: int) -> Intervals:
    """Every path as one interval: gradients at its beginning, its middle and its end."""
    queries, baselines, layers = coordinate.center.shape
    path = torch.cartesian_prod(*(torch.arange(n) for n in coordinate.center.shape)).T  # (3, K)
    places = [torch.full((path.shape[1],), u, dtype=torch.float64) for u in (0.0, 0.5, 1.0)]
    alpha = torch.cat([coordinate.alpha(path, u) for u in places[:2]])
    gradient, probability = replay.gradients_at(path.repeat(1, 2), alpha, row_budget)
    nowhere = Leaf(path.new_zeros(1, 0).to(gradient.device), gradient.new_zeros(1, 0))
    end = replay.gradients([nowhere] * layers, with_end=True).end  # which a query's paths share
    end = torch.stack(end, 1)[:, None].expand(-1, baselines, -1, -1).flatten(0, 2)
    p_end = replay.p_clean.repeat_interleave(baselines * layers)
    gradient = torch.stack([*gradient.chunk(2), end], 1)  # (K, 3, W)
    probability = torch.stack([*probability.chunk(2), p_end], 1)  # (K, 3)
    slopes = torch.stack([coordinate.slope(path, u) for u in places], 1)
    return Intervals.whole(path, gradient * slopes.to(gradient)[..., None], probability)
