"""The naive reference: integrated gradients by whole forward passes, one layer at a time."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from tiny import spec_of
from torch import nn


@contextmanager
def keeping_float64():
    """In here, neither a softmax nor `.to(torch.float32)` or `.float()` rounds what is float64."""
    softmax, to = nn.functional.softmax, torch.Tensor.to

    def exact_softmax(scores, dim=None, dtype=None, **kwargs):
        dtype = None if scores.dtype == torch.float64 else dtype
        return softmax(scores, dim=dim, dtype=dtype, **kwargs)

    def exact_to(tensor, *args, **kwargs):
        rounds = tensor.dtype == torch.float64 and args == (torch.float32,)
        return tensor if rounds else to(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", exact_softmax)
        patch.setattr(torch.Tensor, "to", exact_to)
        patch.setattr(torch.Tensor, "float", lambda x: exact_to(x, torch.float32))
        yield


@contextmanager
def scaled_by_hand(model, family, neurons, factor, first, rows=1):
    """Inside, the neurons at the down-projection's input are multiplied, from token `first` on."""
    with ExitStack() as stack:
        for layer, index in neurons:

            def scale(_, inputs, index=index):
                x = inputs[0].clone()
                x.view(rows, -1, x.shape[-1])[:, first:, index] *= factor
                return (x,)

            down = spec_of(family).modules(model, "down")[layer]
            stack.enter_context(down.register_forward_pre_hook(scale))
        yield


@torch.no_grad()
def plain_score(lm, prompt, target):
    """(log probability of `target`, greedy tokens in its places), by one whole forward pass."""
    logits = lm.model(torch.tensor([[*prompt, *target[:-1]]]), use_cache=False).logits[0]
    log_p = torch.log_softmax(logits[len(prompt) - 1 :], -1)
    return float(log_p.gather(1, torch.tensor(target)[:, None]).sum()), log_p.argmax(-1).tolist()


class Naive:
    """One layer at a time, whole sequences, the model's own logits, autograd: section 2's table,
    word for word."""

    def __init__(self, model, family, site="down_input", bos=False):
        self.model, self.site = model, site
        self.first, self.eos = int(bos), 0  # the first token that a baseline replaces, and by what
        self.modules = spec_of(family).modules(model, "down" if site == "down_input" else "up")
        downs = spec_of(family).modules(model, "down")[0]
        self.width = downs.in_features if isinstance(downs, nn.Linear) else downs.weight.shape[0]

    def logits(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits[:, -1]

    def _hook(self, module, change):
        """Call `change` on the (B, T, N) values of the neurons; what it returns, if anything, takes
        their place."""

        def around(values):
            whole = values.reshape(self.shape + (-1,))
            new = change(whole[..., : self.width])
            if new is not None:
                return torch.cat([new, whole[..., self.width :]], -1).reshape(values.shape)

        if self.site == "pre_activation":
            return module.register_forward_hook(lambda _, inputs, output: around(output))
        return module.register_forward_pre_hook(lambda _, inputs: around(inputs[0]))

    @torch.no_grad()
    def vectors(self, ids):
        """(L, N) neuron vectors at the last position of `ids` (T,)."""
        seen, self.shape = [], (1, len(ids))
        keep = lambda values: seen.append(values[0, -1].clone())  # noqa: E731
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(self._hook(module, keep))
            self.logits(torch.tensor([ids]))
        return torch.stack(seen)

    def probability(self, ids, token, layer, vectors):
        """(B,) probability of `token` after `ids`, `layer`'s neurons at the last position being
        `vectors`."""
        self.shape = (len(vectors), len(ids))

        def put(values):
            return torch.cat([values[:, :-1], vectors[:, None]], 1)

        with self._hook(self.modules[layer], put):
            logits = self.logits(torch.tensor([ids] * len(vectors)))
        return torch.softmax(logits.double(), -1)[:, token]

    def baselines(self, prompt, gold, method):
        if method == "ig":
            return [torch.zeros_like(self.vectors(prompt + gold))]
        if method == "amig":
            replaced = [self.eos] * (len(prompt) - self.first)
            return [self.vectors(prompt[: self.first] + replaced + gold)]
        return [
            self.vectors(prompt[:i] + [self.eos] + prompt[i + 1 :] + gold)
            for i in range(self.first, len(prompt))
        ]

    def attribute(self, prompt, answer, method, nodes, weights, answers="all", factor="w-b"):
        """(scores (L, N), completeness gap (L,)) of one query."""
        used = answer if answers == "all" else answer[:1]
        raw, missing = 0, 0
        for k, token in enumerate(used):
            ids = prompt + used[:k]
            w, starts = self.vectors(ids), torch.stack(self.baselines(prompt, used[:k], method), 1)
            paths = [
                self._paths(ids, token, layer, w[layer], starts[layer], nodes, weights, factor)
                for layer in range(len(w))
            ]
            raw = raw + torch.stack([scores for scores, _ in paths]) / len(used)
            missing = missing + torch.stack([lost for _, lost in paths]) / len(used)
        if method == "sig":
            return raw / raw.norm(), missing.abs()
        return (raw / raw.sum().abs() if method == "amig" else raw), missing.abs()

    def _paths(self, ids, token, layer, w, starts, nodes, weights, factor):
        """Scores (N,) of one layer, summed over its baselines `starts` (B, N), and what they lack
        to completeness."""
        points = torch.stack([b + node * (w - b) for b in starts for node in nodes])
        points.requires_grad_()
        p = self.probability(ids, token, layer, points)
        [gradients] = torch.autograd.grad(p.sum(), points)
        scores, missing = 0, 0
        with torch.no_grad():
            p_w, *p_starts = self.probability(ids, token, layer, torch.cat([w[None], starts]))
        for b, p_b, along in zip(starts, p_starts, gradients.view(len(starts), len(nodes), -1)):
            mean = sum(weight * gradient for weight, gradient in zip(weights, along))
            raw = (w if factor == "w" else w - b) * mean
            scores, missing = scores + raw, missing + raw.sum() - (p_w - p_b)
        return scores, missing
