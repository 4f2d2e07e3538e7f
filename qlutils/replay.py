"""Replaying the last token of many queries: the machinery under the fast exact attribution.

In a causal model a change at the last position leaves every earlier key and value as it was. So the prefix is
run once, its keys and values are kept, and any number of changed copies ("rows") of the last token are pushed
through the decoder layers, each attending to the shared prefix and to itself. Layers are the model's own modules,
called with the arguments captured from a clean pass; nothing is rebuilt by hand.

Shapes: Q queries of equal length T, P rows a query, d the residual width, N neurons a layer, V the vocabulary.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache

from .arch import UnsupportedModel, expand_call_argument, tail_modules
from .attention import controlled_weights

_LOCAL = threading.local()  # the prefix the layer now running attends to
VOCAB_CHUNK = 8192


class PrefixCache:
    """Stands in for a model's key-value cache: hands every row the clean prefix and is never written to."""

    def __init__(self, prefix: list[tuple[Tensor, Tensor]], layout: str):
        self.prefix, self.layout = prefix, layout

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_, **__):
        prefix_key, prefix_value = self.prefix[layer_idx]  # (Q, Hkv, T-1, dh)
        if self.layout == "sequence":  # `prefix_attention` joins them without copying the prefix for every row
            _LOCAL.prefix = prefix_key, prefix_value
            return key, value
        repeats = key.shape[0] // prefix_key.shape[0]
        return (torch.cat([prefix_key.repeat_interleave(repeats, 0), key], -2),
                torch.cat([prefix_value.repeat_interleave(repeats, 0), value], -2))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prefix[layer_idx][0].shape[-2]


def prefix_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
    """Attention of P independent rows, each over the shared prefix and itself.

    query (Q, H, P, dh), key and value (Q, Hkv, P, dh) of the rows themselves; the prefix comes from `PrefixCache`.
    Returns (Q, P, H, dh) as transformers' attention interface asks."""
    prefix_key, prefix_value = _LOCAL.prefix
    groups = query.shape[1] // key.shape[1]
    queries, heads, rows, width = query.shape
    query = query.reshape(queries, heads // groups, groups * rows, width)
    if groups > 1:
        key, value = key.repeat(1, 1, groups, 1), value.repeat(1, 1, groups, 1)
    own = (query * key).sum(-1, keepdim=True)
    scores = torch.cat([query @ prefix_key.transpose(-1, -2), own], -1)
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:  # (1, 1, 1, T): the window of a sliding-window layer
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, float("-inf"))
        else:
            scores = scores + attention_mask
    weights = torch.softmax(scores, -1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    weights = controlled_weights(module, weights.view(queries, heads, rows, -1), None).view_as(weights).to(value.dtype)
    out = weights[..., :-1] @ prefix_value + weights[..., -1:] * value
    return out.reshape(queries, heads, rows, -1).transpose(1, 2), None


AttentionInterface.register("qlutils_prefix", prefix_attention)


@contextmanager
def attention_implementation(model, name: str):
    """Run `model` with another attention implementation; the old one is back afterwards, whatever happens."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs
              if getattr(config, "_attn_implementation", None)]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, old in before:
            config._attn_implementation_internal = old


@dataclass
class CleanPass:
    """What one clean pass over Q queries of equal length leaves behind (all without gradients)."""

    calls: list[tuple[tuple, dict]]  # the arguments of each decoder layer after the hidden state
    inputs: list[Tensor]  # L x (Q, 1, d): each layer's input at the last token
    neurons: list[Tensor]  # L x (Q, N): the neuron vectors at the last token
    logits: Tensor  # (Q, V), at least float32
    cache: PrefixCache


def site_module(lm, layer: int, site: str):
    """The module at whose input (down_input) or output (pre_activation) a layer's neurons are read."""
    return lm.downs[layer] if site == "down_input" else lm.arch.ups[layer]


def _read(site: str, num_neurons: int, inputs, output) -> Tensor:
    return inputs[0] if site == "down_input" else output[..., :num_neurons]


@torch.no_grad()
def neuron_vectors(lm, ids: Tensor, site: str = "down_input", chunk: int = 256) -> Tensor:
    """(R, L, N) neuron vectors at the last position of the sequences `ids` (R, T), no padding."""
    kept: list[list[Tensor]] = [[] for _ in range(lm.num_layers)]

    def keep(layer):
        return lambda _, inputs, output: kept[layer].append(
            _read(site, lm.num_neurons, inputs, output).view(-1, seq, lm.num_neurons)[:, -1])

    seq = ids.shape[1]
    handles = [site_module(lm, layer, site).register_forward_hook(keep(layer)) for layer in range(lm.num_layers)]
    try:
        for part in ids.split(chunk):
            lm.model.base_model(input_ids=part, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([torch.cat(parts) for parts in kept], 1)


@torch.no_grad()
def clean_pass(lm, ids: Tensor, site: str = "down_input") -> CleanPass:
    """Run `ids` (Q, T), T >= 2: the prefix once, then the last token, recording how every layer is called."""
    cache = DynamicCache()
    lm.model.base_model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    prefix = [(layer.keys, layer.values) for layer in cache.layers]
    calls, inputs, neurons = [], [], []

    def before_layer(_, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        inputs.append(hidden)
        calls.append((tuple(args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    def at_site(_, layer_inputs, output):
        neurons.append(_read(site, lm.num_neurons, layer_inputs, output).reshape(ids.shape[0], -1))

    handles = [layer.register_forward_pre_hook(before_layer, with_kwargs=True) for layer in lm.layers]
    handles += [site_module(lm, layer, site).register_forward_hook(at_site) for layer in range(lm.num_layers)]
    try:
        out = lm.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    logits = out.logits[:, -1].to(lm.score_dtype)
    return CleanPass(calls, inputs, neurons, logits, PrefixCache(prefix, lm.layout))


def run_layer(lm, clean: CleanPass, layer: int, hidden: Tensor) -> Tensor:
    """Decoder layer `layer` on rows (Q, P, d), with the arguments of the clean pass and the shared prefix.

    In the "sequence" layout rows lie along the sequence (all at the last position); models whose attention does not
    go through transformers' interface get them along the batch instead."""
    queries, rows, width = hidden.shape
    batch_layout = lm.layout == "batch"
    if batch_layout:
        hidden = hidden.reshape(queries * rows, 1, width)
    batch = clean.inputs[0].shape[0]

    def fit(key, value):
        if isinstance(value, Cache):
            return clean.cache
        if isinstance(value, tuple):
            return tuple(fit(key, v) for v in value)
        return expand_call_argument(key, value, batch, hidden.shape[0], lm.num_heads)

    args, kwargs = clean.calls[layer]
    out = lm.layers[layer](hidden, *[fit(None, a) for a in args], **{k: fit(k, v) for k, v in kwargs.items()})
    out = out[0] if isinstance(out, tuple) else out
    return out.reshape(queries, -1, out.shape[-1]) if batch_layout else out


def start_rows(lm, clean: CleanPass, layer: int, vectors: Tensor, site: str = "down_input") -> Tensor:
    """(Q, P, d) output of `layer` for rows that are clean except for their neuron vectors (Q, P, N) in it.

    In the sequence layout the part of the layer before the neurons runs once a query, not once a row: the rows
    appear where the vectors enter, and the residual stream broadcasts."""
    hidden = clean.inputs[layer]
    if lm.layout == "batch":
        hidden = hidden.expand(-1, vectors.shape[1], -1)
    with neurons_replaced(lm, layer, site, vectors):
        return run_layer(lm, clean, layer, hidden)


@contextmanager
def replaying(lm):
    """Inside, the model's attention is `prefix_attention` where the model uses transformers' interface."""
    if lm.layout == "batch":
        yield
    else:
        with attention_implementation(lm.model, "qlutils_prefix"):
            yield


@contextmanager
def neurons_replaced(lm, layer: int, site: str, vectors: Tensor):
    """Inside, layer `layer` works with `vectors` (Q, P, N) in place of its neurons."""

    def shaped(like):  # OPT flattens batch and sequence before its MLP
        return vectors if lm.layout == "sequence" else vectors.reshape(*like.shape[:-1], -1)

    def before(_, inputs):
        return (shaped(inputs[0]),)

    def after(_, __, output):
        rows = shaped(output)
        rest = output[..., lm.num_neurons:]  # the other half of a fused gate_up_proj
        return torch.cat([rows, rest.expand(*rows.shape[:-1], -1)], -1) if rest.shape[-1] else rows

    module = site_module(lm, layer, site)
    handle = module.register_forward_pre_hook(before) if site == "down_input" else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def final_hidden(lm, hidden: Tensor) -> Tensor:
    """From the last layer's output to the unembedding's input."""
    for module in lm.arch.tail:
        hidden = module(hidden)
    return hidden


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b accumulated and returned in `dtype`, without rounding the result to bfloat16 in between."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


class AnswerProbability(torch.autograd.Function):
    """p_y = softmax(logits(h))_y for rows h (R, d) and one answer token y (R,) a row, with its analytic gradient.

    dp_y/dh = p_y (t'_y W_y - sum_v p_v t'_v W_v), t the map from unembedding output to logits. Both sums run over the
    vocabulary in chunks with a running maximum, so no (R, V) matrix is ever kept."""

    @staticmethod
    def forward(ctx, hidden, lm, target, need_grad):
        weight, bias = lm.arch.head.weight, getattr(lm.arch.head, "bias", None)
        dtype, scale, cap = lm.score_dtype, lm.arch.scale, lm.arch.softcap
        rows = hidden.shape[0]
        top = torch.full((rows, 1), float("-inf"), dtype=dtype, device=hidden.device)
        total = torch.zeros_like(top)
        mean = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if need_grad else None
        for start in range(0, weight.shape[0], VOCAB_CHUNK):
            part = weight[start:start + VOCAB_CHUNK]
            z = _matmul(hidden, part.T, dtype)
            if bias is not None:
                z += bias[start:start + VOCAB_CHUNK]
            z, slope = _to_logits(z, scale, cap)
            new_top = torch.maximum(top, z.amax(-1, keepdim=True))
            shrink = (top - new_top).exp_()
            z = z.sub_(new_top).exp_()
            total = total * shrink + z.sum(-1, keepdim=True)
            if need_grad:
                z = z if slope is None else z.mul_(slope)
                mean = mean.mul_(shrink).add_(_matmul(z.to(part.dtype), part, dtype))
            top = new_top
        own_weight = weight[target]
        z_own = (hidden.to(dtype) * own_weight.to(dtype)).sum(-1, keepdim=True)
        if bias is not None:
            z_own = z_own + bias[target, None]
        z_own, slope = _to_logits(z_own, scale, cap)
        p = (z_own - top).exp_() / total
        if need_grad:
            own = own_weight.to(dtype) if slope is None else own_weight.to(dtype) * slope
            ctx.save_for_backward((p * (own - mean / total)) * (scale if cap is None else 1.0))
        ctx.hidden_dtype = hidden.dtype
        return p.squeeze(-1)

    @staticmethod
    def backward(ctx, grad):
        return (ctx.saved_tensors[0] * grad.unsqueeze(-1)).to(ctx.hidden_dtype), None, None, None


def _to_logits(z, scale, cap):
    """Logits from the unembedding's output, and the slope of the map where it is not the constant `scale`."""
    if scale != 1.0:
        z = z * scale
    if cap is None:
        return z, None
    squashed = torch.tanh(z / cap)
    return cap * squashed, scale * (1 - squashed**2)


def answer_probabilities(lm, hidden: Tensor, target: Tensor, need_grad: bool) -> Tensor:
    """(Q, P) probabilities of each query's answer token `target` (Q,) for rows `hidden` (Q, P, d)."""
    queries, rows, width = hidden.shape
    flat = final_hidden(lm, hidden).reshape(-1, lm.arch.head.weight.shape[1])
    return AnswerProbability.apply(flat, lm, target.repeat_interleave(rows), need_grad).view(queries, rows)


@torch.no_grad()
def verify(lm) -> None:
    """Refuse, by name, a model whose logits our path does not reproduce: the check that makes "any causal LM" honest.

    Compared on two random queries: the model's own logits on the full sequence, the replayed clean row in a batch
    with another row, and (causality) an earlier position's logits under another last token."""
    generator = torch.Generator().manual_seed(0)
    length = min(6, lm.context)
    ids = torch.randint(0, lm.arch.head.weight.shape[0], (2, length), generator=generator)
    ids[0, :2] = ids[1, :2]
    ids = ids.to(lm.device)
    lm.arch.tail = tail_modules(lm.model, lm.arch, ids)
    own = lm.model(input_ids=ids, use_cache=False).logits.to(lm.score_dtype)
    other = ids.clone()
    other[:, -1] = ids.flip(0)[:, -1]
    if not torch.allclose(own[:, 0], lm.model(input_ids=other, use_cache=False).logits[:, 0].to(own), atol=1e-2, rtol=1e-2):
        raise UnsupportedModel(f"{lm.name}: not causal: a later token changes an earlier position's prediction")
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(lm.dtype, 0.1)
    problem = ""
    for layout in dict.fromkeys((lm.layout, "batch")):
        lm.layout = layout
        try:
            problem = _replay_error(lm, ids, own[:, -1], tolerance)
        except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
            problem = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if not problem:
            return
    raise UnsupportedModel(
        f"{lm.name} ({type(lm.model).__name__}): its last token cannot be replayed exactly, so its neurons would be "
        f"attributed wrongly. {problem}"
    )


def _replay_error(lm, ids, own, tolerance) -> str:
    clean = clean_pass(lm, ids)
    scale = own.abs().max().clamp_min(1e-6)
    probability = torch.softmax(own, -1)
    hidden = torch.cat([clean.inputs[0], clean.inputs[0] * 0.5], 1)
    with replaying(lm):
        for layer in range(lm.num_layers):
            hidden = run_layer(lm, clean, layer, hidden)
        restarted = start_rows(lm, clean, lm.num_layers - 1, clean.neurons[-1].unsqueeze(1).repeat(1, 3, 1))
    for what, rows in (("replayed row", hidden[:, :1]), ("row with its own neurons put back", restarted[:, 1:])):
        target = own.argmax(-1)
        p = answer_probabilities(lm, rows, target, need_grad=False)[:, 0]
        error = float((p / probability.gather(1, target[:, None])[:, 0] - 1).abs().max())
        if not error <= tolerance:
            return f"The {what} gives another probability of the top token (relative difference {error:.1e})."
    error = float((clean.logits - own).abs().max() / scale)
    return "" if error <= tolerance else f"A pass with a key-value cache gives other logits (difference {error:.1e})."
