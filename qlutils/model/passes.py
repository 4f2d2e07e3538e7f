"""One clean pass over queries, and rows that go on from it: the machinery under the fast exact
attribution and under scoring many changes at once.

In a causal model a change at one position leaves every earlier key and value as it was. So a prefix
is run once, its keys and values are kept, and any number of changed copies ("rows") of what follows
are pushed through the decoder layers, each attending to its query's prefix and to itself. Layers
are the model's own modules, called with the arguments captured in the clean pass; nothing is
rebuilt by hand.

Shapes: Q queries of equal length T, the last S tokens of which are recorded; R rows, or P rows a
query; d residual width, N neurons a layer, W width of what a site module gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import Cache

from qlutils.model.architecture import join_call_arguments, pick_call_argument
from qlutils.model.attention import PREFIX, SHARED, attention_implementation
from qlutils.model.trace import Call, Trace, edited, first

SITES = ("down_input", "pre_activation")  # where neurons are read and changed, see `site_module`


# --- how a model computes -------------------------------------------------------------------------


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
            f"torch rounds float32 products to another precision here ({chosen!r}), which would "
            "change every number under the same dtype; call "
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
    """Inside, this thread computes with the model, in the model's precision. ValueError while
    another thread does (hooks are the model's, not a thread's), or for other code's hooks."""
    if not lm.in_use.acquire(blocking=False):
        raise ValueError(
            f"{lm.name} is in use by another thread, and one at a time computes with a model (dask "
            "workers: --nthreads 1)"
        )
    try:
        with full_precision(lm.device):
            lm.check_hooks()
            yield
    finally:
        lm.in_use.release()


def within_memory(compute: Callable, size: int, least: int = 1):
    """compute(size), with `size` halved down to `least` as long as memory runs out."""
    while True:
        try:
            return compute(size)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is the latter
            known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if not (known or "can't allocate memory" in str(error)) or size <= least:
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size = max(least, size // 2)


def on_device(data, device: torch.device) -> Tensor:
    """`data` as a tensor on `device`, without waiting for what the device is still at."""
    tensor = torch.as_tensor(data)  # on another device where the caller set a default one
    pinned = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if pinned else tensor.to(device)


# --- what a clean pass leaves behind --------------------------------------------------------------


@dataclass
class Arguments:
    """What a decoder layer is called with beside its hidden states."""

    args: tuple
    kwargs: dict

    @classmethod
    def of(cls, call: Call) -> Arguments:
        kwargs = {name: one for name, one in call.kwargs.items() if name != "hidden_states"}
        return cls(call.args[1:], kwargs)

    def map(self, change: Callable) -> Arguments:
        """The same with change(name or None, value) in place of each value; of a tuple, in place of
        each of its entries."""

        def fit(name, value):
            if isinstance(value, tuple):
                return tuple(fit(name, one) for one in value)
            return change(name, value)

        args = tuple(fit(None, value) for value in self.args)
        return Arguments(args, {name: fit(name, value) for name, value in self.kwargs.items()})

    @classmethod
    def join(cls, calls: list[Arguments], queries: list[int], length: int) -> Arguments:
        """Those of passes over `queries` prompts of different lengths, as of one over all."""

        def fit(name, values):
            if isinstance(values[0], tuple):
                return tuple(fit(name, list(some)) for some in zip(*values))
            return join_call_arguments(name, values, queries, length)

        args = tuple(fit(None, list(some)) for some in zip(*(call.args for call in calls)))
        kwargs = calls[0].kwargs
        return cls(args, {name: fit(name, [one.kwargs[name] for one in calls]) for name in kwargs})

    def pick(self, batch: int, queries: Tensor | None) -> Arguments:
        """Those of a pass over `batch` queries for rows of the queries `queries` (R,); None: as
        they are."""
        if queries is None:
            return self
        return self.map(lambda name, value: pick_call_argument(name, value, batch, queries))


@dataclass
class PrefixCache:
    """Stands in for a model's key-value cache: hands every row its query's prefix and is never
    written to. `prefix`: each layer's keys and values, (Q, Hkv, T - S, dh); `query_of_row` (R,),
    None where `prefix_attention` joins them without copying the prefix for every row."""

    prefix: list[tuple[Tensor, Tensor]]
    query_of_row: Tensor | None = None
    padding: Tensor | None = None  # see `CleanPass`; for `prefix_attention` alone

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_, **__):
        if self.query_of_row is None:
            SHARED.prefix = (*self.prefix[layer_idx], self.padding)
            return key, value
        old_key, old_value = (one[self.query_of_row] for one in self.prefix[layer_idx])
        return torch.cat([old_key, key], -2), torch.cat([old_value, value], -2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prefix[layer_idx][0].shape[-2]


@dataclass
class CleanPass:
    """What one clean pass over Q queries leaves behind of their last S tokens, without
    gradients."""

    calls: list[Arguments]  # of each layer
    inputs: list[Tensor]  # L + 1 of (Q, S, d): each layer's input, and the last one's output
    neurons: dict[int, Tensor]  # (Q, S, N) neuron vectors of the layers asked for
    written: dict[int, Tensor]  # (Q, S, W) what their site modules gave
    prefix: list[tuple[Tensor, Tensor]] | None  # keys and values of the tokens before
    padding: Tensor | None = None  # (Q, 1, 1, T), True where a shorter prompt has no token

    def cache(self, query_of_row: Tensor | None) -> PrefixCache | None:
        if self.prefix is None:
            return None
        return PrefixCache(self.prefix, query_of_row, self.padding)

    def pick(self, queries: Tensor) -> CleanPass:
        """What the pass leaves behind for some of its queries."""
        batch = len(self.inputs[0])
        return CleanPass(
            calls=[call.pick(batch, queries) for call in self.calls],
            inputs=[one[queries] for one in self.inputs],
            neurons={layer: one[queries] for layer, one in self.neurons.items()},
            written={layer: one[queries] for layer, one in self.written.items()},
            prefix=[(key[queries], value[queries]) for key, value in self.prefix],
            padding=None if self.padding is None else self.padding[queries],
        )


def site_module(lm, layer: int, site: str) -> nn.Module:
    """The module at whose input (down_input) or output (pre_activation) a layer's neurons are
    read."""
    return lm.downs[layer] if site == "down_input" else lm.arch.ups[layer]


def _neurons(lm, site: str, call: Call) -> Tensor:
    """(..., N) neuron vectors at a call of a site module (a fused gate_up_proj gives more)."""
    return call.args[0] if site == "down_input" else call.output[..., : lm.num_neurons]


@torch.no_grad()
def neuron_vectors(lm, ids: Tensor, site: str = "down_input", chunk: int = 256) -> Tensor:
    """(R, L, N) neuron vectors at the last position of the sequences `ids` (R, T), no padding."""
    modules = [site_module(lm, layer, site) for layer in range(lm.num_layers)]

    def at_last(call):  # OPT flattens batch and sequence before its MLP
        return _neurons(lm, site, call).view(-1, ids.shape[1], lm.num_neurons)[:, -1]

    found = []
    with computing(lm):
        for part in ids.split(chunk):
            with Trace(modules, at_last) as trace:
                lm.model.base_model(input_ids=part, use_cache=False)
            found.append(torch.stack(trace.kept, 1))
    return torch.cat(found)


@torch.no_grad()
def clean_pass(
    lm,
    ids: Tensor,
    site: str = "down_input",
    *,
    prefix: int | None = None,
    layers: Iterable[int] | None = None,
) -> CleanPass:
    """Run the first `prefix` tokens (default: all but the last one) of `ids` (Q, T), then the
    others, and record how every layer is called for these. `layers`: those whose neurons are kept
    (default: all)."""
    prefix = ids.shape[1] - 1 if prefix is None else prefix
    layers = range(lm.num_layers) if layers is None else sorted(layers)
    body, cache, held = lm.model.base_model, None, None
    if prefix:
        cache = DynamicCache()
        body(input_ids=ids[:, :prefix], use_cache=True, cache=cache)
        held = [(layer.keys, layer.values) for layer in cache.layers]
    rest = ids[:, prefix:]

    def read(call):  # OPT flattens batch and sequence; Falcon adds to what is written in place
        neurons = _neurons(lm, site, call).reshape(*rest.shape, -1)
        return neurons, call.output.reshape(*rest.shape, -1).clone()

    sites = [site_module(lm, layer, site) for layer in layers]
    with Trace(lm.layers) as trace, Trace(sites, read) as at_sites:
        body(input_ids=rest, use_cache=bool(prefix), cache=cache)
    calls = trace.kept
    return CleanPass(
        calls=[Arguments.of(call) for call in calls],
        inputs=[*(call.hidden for call in calls), first(calls[-1].output)],
        neurons={layer: neurons for layer, (neurons, _) in zip(layers, at_sites.kept)},
        written={layer: written for layer, (_, written) in zip(layers, at_sites.kept)},
        prefix=held,
    )


def join_passes(passes: list[CleanPass]) -> CleanPass:
    """Clean passes over prompts of different lengths, recorded at their last tokens, as one, for
    the layout "sequence": prefixes are padded on the left."""
    if len(passes) == 1:
        return passes[0]
    queries = [len(one.inputs[0]) for one in passes]
    lengths = [one.cache(None).get_seq_length() + 1 for one in passes]
    length, device = max(lengths), passes[0].inputs[0].device

    def pad_left(one):  # (Q, Hkv, tokens, dh) to as many tokens as the longest prefix has
        return pad(one, (0, 0, length - 1 - one.shape[2], 0))

    calls = zip(*(one.calls for one in passes))
    prefixes = zip(*(one.prefix for one in passes))
    missing = torch.tensor([length - one for one in lengths], device=device)
    missing = missing.repeat_interleave(torch.tensor(queries, device=device))  # (Q,)
    return CleanPass(
        calls=[Arguments.join(list(of_layer), queries, length) for of_layer in calls],
        inputs=[torch.cat(some) for some in zip(*(one.inputs for one in passes))],
        neurons=_join([one.neurons for one in passes]),
        written=_join([one.written for one in passes]),
        prefix=[
            (
                torch.cat([pad_left(key) for key, _ in pairs]),
                torch.cat([pad_left(v) for _, v in pairs]),
            )
            for pairs in prefixes
        ],
        padding=torch.arange(length, device=device) < missing[:, None, None, None],
    )


def _join(parts: list[dict[int, Tensor]]) -> dict[int, Tensor]:
    return {layer: torch.cat([one[layer] for one in parts]) for layer in parts[0]}


# --- rows -----------------------------------------------------------------------------------------


def call_layer(module: nn.Module, hidden: Tensor, arguments: Arguments, cache) -> Tensor:
    """The output of a decoder layer for hidden states of ours, with `cache` in place of the cache
    among its `arguments`."""

    def fit(_, value):
        if isinstance(value, Cache):
            return cache
        return copy(value) if isinstance(value, Mapping) else value  # a layer may write into it

    call = arguments.map(fit)
    return first(module(hidden, *call.args, **call.kwargs))


def run_rows(
    lm, clean: CleanPass, layer: int, hidden: Tensor, query_of_row: Tensor | None
) -> Tensor:
    """(R, S, d) output of decoder layer `layer` for rows `hidden` (R, S, d) of the queries
    `query_of_row` (R,) of the clean pass; None: see `run_layer`."""
    arguments = clean.calls[layer].pick(len(clean.inputs[0]), query_of_row)
    return call_layer(lm.layers[layer], hidden, arguments, clean.cache(query_of_row))


def run_layer(lm, clean: CleanPass, layer: int, hidden: Tensor) -> Tensor:
    """(Q, P, d) output of decoder layer `layer` for rows `hidden` (Q, P, d) of the one token that
    was recorded.

    In the layout "sequence" rows lie along the sequence, all at the last position, and what belongs
    to a query broadcasts over them; models whose attention does not go through transformers'
    interface get them along the batch instead.
    """
    if lm.layout == "sequence":
        return run_rows(lm, clean, layer, hidden, None)
    queries, rows, width = hidden.shape
    query_of_row = torch.arange(queries, device=hidden.device).repeat_interleave(rows)
    out = run_rows(lm, clean, layer, hidden.reshape(-1, 1, width), query_of_row)
    return out.reshape(queries, rows, -1)


def start_rows(lm, clean: CleanPass, layer: int, rows: Tensor, site: str = "down_input") -> Tensor:
    """(Q, P, d) output of `layer` for rows that are clean except that its site module (the
    down-projection, or the up-projection for pre-activations) gives `rows` (Q, P, W).

    Where the layer adds what its MLP writes to the residual stream as it is, it need not run: with
    clean output y and MLP output m, a row r gives y + (r - m). Else it runs on its clean input, and
    a hook puts the rows in place of what the site module gives. In the layout "sequence" that input
    is one row a query, so that the part before the site runs once: P rows appear at the site, and
    the residual of the one broadcasts over them.
    """
    if site == "down_input" and lm.adds_mlp_output:
        return clean.inputs[layer + 1] + (rows - clean.written[layer])
    hidden = clean.inputs[layer]
    if lm.layout == "batch":
        hidden = hidden.expand(-1, rows.shape[1], -1)

    def put(_, __, output):
        shape = rows.shape if lm.layout == "sequence" else (*output.shape[:-1], -1)
        new = rows.reshape(shape).clone()
        rest = output[..., rows.shape[-1] :]  # the other half of a fused gate_up_proj
        return torch.cat([new, rest.expand(*new.shape[:-1], -1)], -1) if rest.shape[-1] else new

    with edited([site_module(lm, layer, site)], after=put):
        return run_layer(lm, clean, layer, hidden)


def replaying(lm):
    """Inside, rows may lie along the sequence: the model's attention is `prefix_attention`."""
    if lm.layout == "batch":
        return nullcontext()
    return attention_implementation(lm.model, PREFIX)
