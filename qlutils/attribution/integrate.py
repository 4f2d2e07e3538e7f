"""The integral over each path: the paper's sum and other fixed rules, or refined until converged.

Shapes: Q queries, B baselines a query, P points a layer, L layers, N neurons a layer, W the width
of a row (see `paths`).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from qlutils.attribution.bisection import bisect
from qlutils.attribution.gradients import Leaf, Replay
from qlutils.attribution.paths import Paths
from qlutils.attribution.quadrature import fixed_plan
from qlutils.model.answer import final_logits
from qlutils.model.passes import on_device


@dataclass
class Attribution:
    """Scores of Q queries: `scores` (Q, L, N), normalised as the method says; `completeness_gap`
    (Q, L), of the raw scores; `probability` (Q,) of the whole answer; `known` (Q,), whether greedy
    decoding gives it; `converged` (Q,), whether the rule "converged" got all integrals below its
    tolerance (None for the other rules, which cannot tell); `evaluations` (Q,), gradients taken a
    layer and baseline, mean over layers and answer tokens; `row_budget`, the rows a batch was
    allowed in the end (halved after running out of memory)."""

    scores: Tensor
    completeness_gap: Tensor
    probability: Tensor
    known: Tensor
    converged: Tensor | None
    evaluations: Tensor
    row_budget: int

    def cpu(self):
        """The same in main memory."""
        moved = {k: v.cpu() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def integrate(lm, clean, target, starts, spec):
    """The `Attribution` of the answer tokens `target` (Q,) alone from baselines `starts` (Q, B, L,
    N; None: zero) to the clean neurons: scores are raw and summed over baselines, gaps signed."""
    hidden = clean.inputs[-1][:, 0]  # (Q, d)
    logits = final_logits(lm, hidden)
    p = torch.softmax(logits, -1)  # (Q, V)
    p_clean = p.gather(1, target[:, None])[:, 0]
    paths = Paths.of(lm, clean, starts, spec)
    replay = Replay(lm, clean, target, paths)
    if spec.rule == "converged":
        mean, p_start, converged, evaluations = bisect(replay, p_clean, spec)
    else:
        mean, p_start = _fixed_sum(replay, spec)
        converged = None
        evaluations = torch.full(target.shape, spec.steps, dtype=torch.float64)
    scores = [paths.scores(mean[:, :, layer], layer) for layer in range(lm.num_layers)]
    scores = torch.stack(scores, 1)
    rise = p_clean[:, None, None] - p_start  # (Q, B, L)
    return Attribution(
        scores=scores,
        completeness_gap=scores.sum(-1) - rise.sum(1),
        probability=p_clean,
        known=logits.argmax(-1) == target,
        converged=converged,
        evaluations=evaluations,
        row_budget=spec.row_budget,
    )


def _fixed_sum(replay, spec):
    """The mean gradient of each path (Q, B, L, W) by a rule whose nodes are known in advance, and
    the probabilities (Q, B, L) at the paths' beginnings."""
    paths = replay.paths
    queries, baselines, layers, _ = paths.factor.shape
    points, at_end = fixed_plan(spec.rule, spec.steps, baselines)
    size = max(1, spec.row_budget // (layers * queries))
    points = [on_device(one, replay.target.device) for one in points]
    parts = [one.split(size, 1) for one in points]
    begin = torch.stack(list(paths.begin), 2)  # (Q, B, L, W)
    mean = torch.zeros_like(begin, dtype=replay.lm.score_dtype)
    p = []
    for index, node, weight in zip(*parts):
        leaves = [Leaf(index, node)] * layers
        gradients, probability = replay.gradients(leaves)
        p.append(probability.unflatten(1, (layers, -1)))
        of_baseline = one_hot(index, baselines) * weight[..., None]  # (1, P, B)
        of_baseline = of_baseline.mT.to(mean)
        for layer, gradient in enumerate(gradients):
            mean[:, :, layer] += of_baseline @ gradient.to(mean)
    if at_end:
        mean += at_end * replay.gradients_at_end()[:, None]
    first = torch.cat(p, 2)[:, :, :baselines]  # the paths' beginnings, see `fixed_plan`
    return mean, first.mT
