"""Replaying the last token of many queries: the machinery under the fast exact attribution.

In a causal model a change at the last position leaves every earlier key and value as it was. So the
prefix is run once, its keys and values are kept, and any number of changed copies ("rows") of the
last token are pushed through the decoder layers, each attending to the shared prefix and to itself.
Layers are the model's own modules, called with the arguments captured from a clean pass; nothing is
rebuilt by hand.

Shapes: Q queries of equal length T, P rows a query, d the residual width, N neurons a layer, V the
vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache

from qlutils.model.architecture import (
    expand_call_argument,
    join_call_arguments,
    pick_call_argument,
)
from qlutils.model.attention import check_arguments, controlled_weights, with_cache

SITES = ("down_input", "pre_activation")  # where neurons are read and changed, see `site_module`
_LOCAL = threading.local()  # the prefix the layer now running attends to
ONE_AT_A_TIME = (
    threading.RLock()
)  # hooks are the model's, not a thread's: another thread's pass would run into them
VOCAB_CHUNK = {
    "cpu": 1024,
    "cuda": 16384,
}  # of the unembedding at a time; with ROW_CHUNK rows it fits a core's cache
ROW_CHUNK = {"cpu": 256, "cuda": 2**20}


class PrefixCache:
    """Stands in for a model's key-value cache: hands every row the clean prefix and is never
    written to."""

    def __init__(self, prefix, layout: str, padding: Tensor | None = None):
        self.prefix, self.layout = prefix, layout  # L x 2 x (Q, Hkv, T-1, dh)
        self.padding = padding  # (Q, 1, 1, T), True where a shorter prompt has no token

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_, **__):
        prefix_key, prefix_value = self.prefix[layer_idx]  # (Q, Hkv, T-1, dh)
        if (
            self.layout == "sequence"
        ):  # `prefix_attention` joins them without copying the prefix for every row
            _LOCAL.prefix = prefix_key, prefix_value, self.padding
            return key, value
        repeats = key.shape[0] // prefix_key.shape[0]
        return (
            torch.cat([prefix_key.repeat_interleave(repeats, 0), key], -2),
            torch.cat([prefix_value.repeat_interleave(repeats, 0), value], -2),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prefix[layer_idx][0].shape[-2]


def prefix_attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, **other
):
    """Attention of P independent rows, each over the shared prefix and itself.

    query (Q, H, P, dh), key and value (Q, Hkv, P, dh) of the rows themselves; the prefix comes from
    `PrefixCache`. Returns (Q, P, H, dh) as transformers' attention interface asks."""
    check_arguments(module, other)
    prefix_key, prefix_value, padding = _LOCAL.prefix
    (queries, heads, rows, width), groups = query.shape, query.shape[1] // key.shape[1]
    query = query.reshape(queries, heads // groups, groups, rows, width)
    key, value = (
        key[:, :, None],
        value[:, :, None],
    )  # (Q, Hkv, 1, P, dh): one for the heads of its group
    own = (query * key).sum(-1).flatten(2)
    scores = torch.cat([query.flatten(2, 3) @ prefix_key.transpose(-1, -2), own[..., None]], -1)
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:  # (1, 1, 1, T): the window of a sliding-window layer
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, float("-inf"))
        else:
            scores = scores + attention_mask
    if padding is not None:
        scores = scores.masked_fill(padding, float("-inf"))
    weights = torch.softmax(
        scores, -1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32
    )
    weights = (
        controlled_weights(module, weights.view(queries, heads, rows, -1), None)
        .view_as(weights)
        .to(value.dtype)
    )
    own = weights[..., -1].view(queries, heads // groups, groups, rows, 1)
    out = torch.addcmul((weights[..., :-1] @ prefix_value).view(*own.shape[:-1], -1), own, value)
    return out.view(queries, heads, rows, -1).transpose(1, 2), None


AttentionInterface.register("qlutils_prefix", prefix_attention)


_IMPLEMENTATIONS: dict[
    int, tuple
] = {}  # id of a configuration: its own implementation, {context: the one it runs}


@contextmanager
def attention_implementation(model, name: str):
    """Run `model` with another attention implementation; the old one is back afterwards, whatever
    happens and in whatever order such contexts end."""
    configs = [
        config
        for config in {
            id(m.config): m.config for m in model.modules() if hasattr(m, "config")
        }.values()
        if getattr(config, "_attn_implementation", None)
    ]
    context = object()
    try:
        for config in configs:
            _, running = _IMPLEMENTATIONS.setdefault(id(config), (config._attn_implementation, {}))
            running[context] = config._attn_implementation_internal = name
        yield
    finally:
        for config in configs:
            own, running = _IMPLEMENTATIONS.get(id(config), (config._attn_implementation, {}))
            running.pop(context, None)
            config._attn_implementation_internal = [own, *running.values()][-1]
            if not running:
                _IMPLEMENTATIONS.pop(id(config), None)


@contextmanager
def full_precision(device: torch.device):
    """Inside, what the model computes has its own dtype and tensors are made on the CPU unless told
    otherwise, whatever the caller has set: no autocast, no other default device. ValueError for
    float32 products rounded to TF32 or bfloat16: a setting of the process, not of a thread."""
    backend = getattr(torch.backends, "cuda" if device.type == "cuda" else "mkldnn")
    chosen = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if chosen is None:  # torch before 2.9
        chosen = torch.get_float32_matmul_precision()
    if chosen not in ("none", "ieee", "highest"):
        raise ValueError(
            f"torch rounds float32 products to another precision here ({chosen!r}), "
            "which would change every number under the same dtype; call "
            "torch.set_float32_matmul_precision('highest')"
        )
    with ExitStack() as stack:
        known = torch.amp.is_autocast_available(device.type)
        if known and torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def computing(lm):
    """Inside, this thread alone computes with the model, in the model's precision; ValueError for
    other code's hooks."""
    with ONE_AT_A_TIME, full_precision(lm.device):
        lm.check_hooks()
        yield


@contextmanager
def hooked(handles):
    """Inside, the hooks whose registration the iterable `handles` yields are there. They are
    registered one by one within the `try`, so that an interruption leaves none behind."""
    held = []
    try:
        for handle in handles:
            held.append(handle)
        yield
    finally:
        for handle in held:
            handle.remove()


def within_memory(compute, size: int, least: int = 1):
    """compute(size), with `size` halved down to `least` as long as memory runs out."""
    while True:
        try:
            return compute(size)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            full = isinstance(
                error, (torch.OutOfMemoryError, MemoryError)
            ) or "can't allocate memory" in str(error)
            if not full or size <= least:
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size = max(least, size // 2)


def on_device(data, device: torch.device) -> Tensor:
    """`data` as a tensor on `device`, without waiting for what the device is still at."""
    tensor = torch.as_tensor(data)  # on another device where the caller set a default one
    pinned = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if pinned else tensor.to(device)


@dataclass
class CleanPass:
    """What one clean pass over Q queries of equal length leaves behind (all without gradients)."""

    calls: list[tuple[tuple, dict]]  # the arguments of each decoder layer after the hidden state
    inputs: list[
        Tensor
    ]  # L + 1 x (Q, 1, d): each layer's input at the last token, and the last one's output
    neurons: list[Tensor]  # L x (Q, N): the neuron vectors at the last token
    written: list[Tensor]  # L x (Q, 1, W): the output of each layer's site module at the last token
    logits: Tensor  # (Q, V), at least float32
    cache: PrefixCache

    def pick(self, queries: Tensor) -> CleanPass:
        """What the pass leaves behind for some of its queries."""
        batch = len(self.logits)
        calls = []
        for args, kwargs in self.calls:
            some = [(None, value) for value in args] + list(kwargs.items())
            some = [pick_call_argument(k, v, batch, queries) for k, v in some]
            calls.append((tuple(some[: len(args)]), dict(zip(kwargs, some[len(args) :]))))
        inputs, neurons, written = (
            [one[queries] for one in tensors]
            for tensors in (self.inputs, self.neurons, self.written)
        )
        prefix = [(key[queries], value[queries]) for key, value in self.cache.prefix]
        padding = None if self.cache.padding is None else self.cache.padding[queries]
        cache = PrefixCache(prefix, self.cache.layout, padding)
        return CleanPass(calls, inputs, neurons, written, self.logits[queries], cache)


def join_passes(passes: list[CleanPass]) -> CleanPass:
    """Clean passes over prompts of different lengths as one, for the sequence layout: prefixes are
    padded on the left."""
    if len(passes) == 1:
        return passes[0]
    queries = [len(one.logits) for one in passes]
    lengths = [one.cache.get_seq_length() + 1 for one in passes]
    length, device = max(lengths), passes[0].logits.device
    calls = []
    for of_layer in zip(*(one.calls for one in passes)):
        (args, kwargs), *_ = of_layer
        some = [(None, [call[0][place] for call in of_layer]) for place in range(len(args))]
        some += [(key, [call[1][key] for call in of_layer]) for key in kwargs]
        some = [join_call_arguments(key, values, queries, length) for key, values in some]
        calls.append((tuple(some[: len(args)]), dict(zip(kwargs, some[len(args) :]))))
    inputs, neurons, written = (
        [torch.cat(tensors) for tensors in zip(*(getattr(one, name) for one in passes))]
        for name in ("inputs", "neurons", "written")
    )
    prefix = []
    for of_layer in zip(*(one.cache.prefix for one in passes)):
        padded = [
            [pad(one, (0, 0, length - 1 - one.shape[2], 0)) for one in pair] for pair in of_layer
        ]
        prefix.append(tuple(torch.cat(tensors) for tensors in zip(*padded)))
    missing = torch.tensor([length - one for one in lengths], device=device)
    missing = missing.repeat_interleave(torch.tensor(queries, device=device))
    padding = torch.arange(length, device=device) < missing[:, None, None, None]
    cache = PrefixCache(prefix, passes[0].cache.layout, padding)
    logits = torch.cat([one.logits for one in passes])
    return CleanPass(calls, inputs, neurons, written, logits, cache)


def site_module(lm, layer: int, site: str):
    """The module at whose input (down_input) or output (pre_activation) a layer's neurons are
    read."""
    return lm.downs[layer] if site == "down_input" else lm.arch.ups[layer]


def _read(site: str, num_neurons: int, inputs, output) -> Tensor:
    return inputs[0] if site == "down_input" else output[..., :num_neurons]


@torch.no_grad()
def neuron_vectors(lm, ids: Tensor, site: str = "down_input", chunk: int = 256) -> Tensor:
    """(R, L, N) neuron vectors at the last position of the sequences `ids` (R, T), no padding."""
    kept: list[list[Tensor]] = [[] for _ in range(lm.num_layers)]

    def keep(layer):
        return lambda _, inputs, output: kept[layer].append(
            _read(site, lm.num_neurons, inputs, output).view(-1, seq, lm.num_neurons)[:, -1]
        )

    seq = ids.shape[1]
    watched = (
        site_module(lm, layer, site).register_forward_hook(keep(layer))
        for layer in range(lm.num_layers)
    )
    with computing(lm), hooked(watched):
        for part in ids.split(chunk):
            lm.model.base_model(input_ids=part, use_cache=False)
    return torch.stack([torch.cat(parts) for parts in kept], 1)


@torch.no_grad()
def clean_pass(lm, ids: Tensor, site: str = "down_input") -> CleanPass:
    """Run `ids` (Q, T), T >= 2, once, and record how every layer would be called for the last token
    alone."""
    cache, (queries, length) = DynamicCache(), ids.shape
    inputs, neurons, written = ([None] * lm.num_layers for _ in range(3))
    outputs: list = [None] * lm.num_layers

    def before(layer):
        return lambda _, args, kwargs: inputs.__setitem__(
            layer, (args[0] if args else kwargs["hidden_states"])[:, -1:]
        )

    def at_site(layer):
        def hook(_, site_inputs, output):  # OPT flattens batch and sequence before its MLP
            at = _read(site, lm.num_neurons, site_inputs, output)
            neurons[layer] = at.reshape(queries, length, -1)[:, -1]
            written[layer] = output.reshape(queries, length, -1)[
                :, -1:
            ].clone()  # Falcon adds to it in place

        return hook

    def watched():
        for layer, module in enumerate(lm.layers):
            yield module.register_forward_pre_hook(before(layer), with_kwargs=True)
            yield module.register_forward_hook(
                lambda _, __, out, layer=layer: outputs.__setitem__(layer, out)
            )
            yield site_module(lm, layer, site).register_forward_hook(at_site(layer))

    with hooked(watched()):
        body = lm.model.base_model(
            input_ids=ids, use_cache=True, **with_cache(lm.model.base_model, cache)
        )
    logits, _ = to_logits(
        lm.arch.head(body[0][:, -1]).to(lm.score_dtype), lm.arch.scale, lm.arch.softcap
    )
    cache.crop(-1)
    calls = _calls(lm, ids[:, -1:], cache, outputs)
    last = outputs[-1][0] if isinstance(outputs[-1], tuple) else outputs[-1]
    prefix = [(layer.keys, layer.values) for layer in cache.layers]
    return CleanPass(
        calls, [*inputs, last[:, -1:]], neurons, written, logits, PrefixCache(prefix, lm.layout)
    )


def _calls(lm, ids: Tensor, cache, outputs) -> list[tuple[tuple, dict]]:
    """The arguments, after the hidden state, with which the model calls each layer for one more
    token `ids` (Q, 1). The layers themselves do not run: each hands its input on, in the shape of
    its entry of `outputs`."""
    calls = []

    def stand_in(output):
        def forward(*args, **kwargs):
            hidden = args[0] if args else kwargs.pop("hidden_states")
            calls.append((tuple(args[1:]), kwargs))
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return forward

    own = [
        layer.__dict__.get("forward") for layer in lm.layers
    ]  # wrappers set one; else it is the class's
    try:
        for layer, output in zip(lm.layers, outputs):
            layer.forward = stand_in(output)
        lm.model.base_model(input_ids=ids, use_cache=True, **with_cache(lm.model.base_model, cache))
    finally:
        for layer, forward in zip(lm.layers, own):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward
    return calls


def run_layer(lm, clean: CleanPass, layer: int, hidden: Tensor) -> Tensor:
    """Decoder layer `layer` on rows (Q, P, d), with the arguments of the clean pass and the shared
    prefix.

    In the "sequence" layout rows lie along the sequence (all at the last position); models whose
    attention does not go through transformers' interface get them along the batch instead."""
    queries, rows, width = hidden.shape
    query_of_row = None  # rows along the sequence: what belongs to a query broadcasts over them
    if lm.layout == "batch":
        hidden = hidden.reshape(queries * rows, 1, width)
        query_of_row = torch.arange(queries, device=hidden.device).repeat_interleave(rows)
    out = call_layer(lm, layer, hidden, clean.calls[layer], clean.cache, queries, query_of_row)
    return out.reshape(queries, -1, out.shape[-1])


def call_layer(
    lm, layer: int, hidden: Tensor, call, cache, batch: int, query_of_row: Tensor | None = None
) -> Tensor:
    """The output of decoder layer `layer` for other hidden states than those of the pass over
    `batch` queries in which its arguments `call` were captured, with `cache` in place of its own.
    `query_of_row` (R,): to which of those queries each row of the new batch belongs; None where the
    batch is the old one."""

    def fit(key, value):
        if isinstance(value, Cache):
            return cache
        if isinstance(value, tuple):
            return tuple(fit(key, v) for v in value)
        if isinstance(value, Mapping):  # into which a layer may write
            return copy(value)
        if query_of_row is None:
            return value
        return expand_call_argument(key, value, batch, query_of_row)

    args, kwargs = call
    out = lm.layers[layer](
        hidden, *[fit(None, a) for a in args], **{k: fit(k, v) for k, v in kwargs.items()}
    )
    return out[0] if isinstance(out, tuple) else out


def start_rows(lm, clean: CleanPass, layer: int, rows: Tensor, site: str = "down_input") -> Tensor:
    """(Q, P, d) output of `layer` for rows that are clean except that its site module (the
    down-projection, or the up-projection for pre-activations) gives `rows` (Q, P, W).

    Where the layer adds what its MLP writes to the residual stream as it is, it need not run. Else,
    in the sequence layout, its part before the site runs once a query: the rows appear at the site,
    and the residual broadcasts."""
    if site == "down_input" and lm.adds_mlp_output:
        return clean.inputs[layer + 1] + (rows - clean.written[layer])
    hidden = clean.inputs[layer]
    if lm.layout == "batch":
        hidden = hidden.expand(-1, rows.shape[1], -1)

    def put(_, __, output):
        new = (
            rows.clone()
            if lm.layout == "sequence"
            else rows.reshape(*output.shape[:-1], -1).clone()
        )
        rest = output[..., rows.shape[-1] :]  # the other half of a fused gate_up_proj
        return torch.cat([new, rest.expand(*new.shape[:-1], -1)], -1) if rest.shape[-1] else new

    with hooked(module.register_forward_hook(put) for module in [site_module(lm, layer, site)]):
        return run_layer(lm, clean, layer, hidden)


@contextmanager
def replaying(lm):
    """Inside, the model's attention is `prefix_attention` where the model uses transformers'
    interface."""
    if lm.layout == "batch":
        yield
    else:
        with attention_implementation(lm.model, "qlutils_prefix"):
            yield


def final_hidden(lm, hidden: Tensor) -> Tensor:
    """From the last layer's output to the unembedding's input."""
    for module in lm.arch.tail:
        hidden = module(hidden)
    return hidden


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b accumulated and returned in `dtype`, without rounding the result to bfloat16 in
    between."""
    if a.dtype == b.dtype == dtype:
        return a @ b
    if a.is_cuda and a.dtype == b.dtype:
        try:
            return torch.mm(a, b, out_dtype=dtype)
        except TypeError:  # torch before 2.8
            pass
    return a.to(dtype) @ b.to(dtype)


class AnswerProbability(torch.autograd.Function):
    """p_y = softmax(logits(h))_y for rows h (R, d) and one answer token y (R,) a row, with its
    analytic gradient.

    dp_y/dh = p_y (t'_y W_y - sum_v p_v t'_v W_v), t the map from unembedding output to logits. Both
    sums run over the vocabulary in chunks with a running maximum, so no (R, V) matrix is ever
    kept."""

    @staticmethod
    def forward(ctx, hidden, lm, target, need_grad):
        size, parts = ROW_CHUNK.get(hidden.device.type, 2**20), []
        for part, own in zip(hidden.split(size), target.split(size)):
            parts.append(_answer_probability(part, lm, own, need_grad))
        p, grad = (torch.cat(one) if one[0] is not None else None for one in zip(*parts))
        if need_grad:
            ctx.save_for_backward(grad)
        ctx.hidden_dtype = hidden.dtype
        return p

    @staticmethod
    def backward(ctx, grad):
        return (ctx.saved_tensors[0] * grad.unsqueeze(-1)).to(ctx.hidden_dtype), None, None, None


def _answer_probability(hidden, lm, target, need_grad):
    """(R,) probabilities of the tokens `target` and, if needed, their gradients (R, d)."""
    weight, bias = lm.arch.head.weight, getattr(lm.arch.head, "bias", None)
    dtype, scale, cap = lm.score_dtype, lm.arch.scale, lm.arch.softcap
    top = torch.full((len(hidden), 1), float("-inf"), dtype=dtype, device=hidden.device)
    total = torch.zeros_like(top)
    mean = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if need_grad else None
    size = VOCAB_CHUNK.get(hidden.device.type, 8192)
    for start in range(0, weight.shape[0], size):
        part = weight[start : start + size]
        z = _matmul(hidden, part.T, dtype)
        if bias is not None:
            z += bias[start : start + size]
        z, slope = to_logits(z, scale, cap)
        new_top = torch.maximum(top, z.amax(-1, keepdim=True))
        shrink = (top - new_top).exp_()
        z = z.sub_(new_top).exp_()
        total = total.mul_(shrink).add_(z.sum(-1, keepdim=True))
        if need_grad:
            z = z if slope is None else z.mul_(slope)
            mean = mean.mul_(shrink).add_(_matmul(z.to(part.dtype), part, dtype))
        top = new_top
    own_weight = weight[target]
    z_own = (hidden.to(dtype) * own_weight.to(dtype)).sum(-1, keepdim=True)
    if bias is not None:
        z_own = z_own + bias[target, None]
    z_own, slope = to_logits(z_own, scale, cap)
    p = (z_own - top).exp_() / total
    if not need_grad:
        return p.squeeze(-1), None
    own = own_weight.to(dtype) if slope is None else own_weight.to(dtype) * slope
    return p.squeeze(-1), (p * (own - mean.div_(total))) * (scale if cap is None else 1.0)


def to_logits(z, scale, cap):
    """Logits from the unembedding's output, and the slope of the map where it is not the constant
    `scale`."""
    if scale != 1.0:
        z = z * scale
    if cap is None:
        return z, None
    squashed = torch.tanh(z / cap)
    return cap * squashed, scale * (1 - squashed**2)


def answer_probabilities(lm, hidden: Tensor, target: Tensor, need_grad: bool) -> Tensor:
    """(Q, P) probabilities of each query's answer token `target` (Q,) for rows `hidden` (Q, P,
    d)."""
    queries, rows, width = hidden.shape
    flat = final_hidden(lm, hidden).reshape(-1, lm.arch.head.weight.shape[1])
    return AnswerProbability.apply(flat, lm, target.repeat_interleave(rows), need_grad).view(
        queries, rows
    )
