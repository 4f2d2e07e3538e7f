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

from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map
from transformers import DynamicCache
from transformers.cache_utils import Cache

from qlutils.model.architecture import join_call_arguments, pick_call_argument
from qlutils.model.attention import PREFIX, SHARED, attention_implementation
from qlutils.model.trace import edited, first, traced

# --- how a model computes -------------------------------------------------------------------------


@contextmanager
def full_precision(device):
    """Inside, what the model computes has its own dtype and tensors are made on the CPU unless told
    otherwise, whatever the caller has set: no autocast, no other default device. ValueError for
    float32 products rounded to TF32 or bfloat16: a setting of the process, not of a thread."""
    try:
        chosen = torch.get_float32_matmul_precision()
    except RuntimeError:  # one device's is set by itself
        chosen = "mixed"
    if chosen != "highest":
        raise ValueError(
            f"torch rounds float32 products to another precision here ({chosen!r}), which would "
            "change every number under the same dtype; call "
            "torch.set_float32_matmul_precision('highest')"
        )
    elsewhere = torch.get_default_device().type != "cpu"
    on_cpu = torch.device("cpu") if elsewhere else nullcontext()
    with torch.autocast(device.type, enabled=False), on_cpu:
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


def within_memory(compute, size, least=1):
    """compute(size), with `size` halved down to `least` as long as memory runs out."""
    while True:
        try:
            return compute(size)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is the latter
            full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            full = full or "can't allocate memory" in str(error)
            if not full or size <= least:
                raise
        torch.cuda.empty_cache()  # does nothing without CUDA
        size = max(least, size // 2)


def on_device(data, device):
    """`data` as a tensor on `device`, without waiting for what the device is still at."""
    tensor = torch.as_tensor(data)  # on another device where the caller set a default one
    pinned = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if pinned else tensor.to(device)


# --- what a clean pass leaves behind --------------------------------------------------------------


@dataclass
class CleanPass:
    """What one clean pass over Q queries leaves behind of their last S tokens, without
    gradients."""

    calls: list[dict[str, Any]]  # each layer's arguments beside its hidden states
    inputs: list[Tensor]  # L + 1 of (Q, S, d): each layer's input, and the last one's output
    neurons: list[Tensor]  # L of (Q, S, N): neuron vectors; none where no site was asked for
    written: list[Tensor]  # L of (Q, S, W): what their site modules gave
    prefix: list[tuple[Tensor, Tensor]] | None  # each layer's (Q, Hkv, T - S, dh) keys and values
    padding: Tensor | None = None  # (Q, 1, 1, T), True where a shorter prompt has no token

    def pick(self, queries):
        """What the pass leaves behind for some of its queries."""

        def some(tensor):
            return None if tensor is None else tensor[queries]

        calls = [self.arguments(layer, queries) for layer in range(len(self.calls))]
        tensors = self.inputs, self.neurons, self.written, self.prefix, self.padding
        return CleanPass(calls, *tree_map(some, tensors))

    def arguments(self, layer, queries):
        """Those of the layer's call for rows of the queries `queries` (R,); None: as they are."""
        call = self.calls[layer]
        batch = len(self.inputs[0])
        if queries is None:
            return dict(call)
        return {name: pick_call_argument(name, call[name], batch, queries) for name in call}


@dataclass
class PrefixCache:
    """Stands in for a model's key-value cache: hands every row its query's prefix and is never
    written to. `query_of_row` (R,); None where `prefix_attention` joins them without copying the
    prefix for every row."""

    clean: CleanPass
    query_of_row: Tensor | None

    def update(self, key, value, layer_idx, *_, **__):
        old_key, old_value = self.clean.prefix[layer_idx]
        if self.query_of_row is None:
            SHARED.prefix = old_key, old_value, self.clean.padding
            return key, value
        old_key = old_key[self.query_of_row]
        old_value = old_value[self.query_of_row]
        return torch.cat([old_key, key], -2), torch.cat([old_value, value], -2)

    def get_seq_length(self, layer_idx=0):
        return self.clean.prefix[layer_idx][0].shape[-2]


def site_modules(lm, site):
    """The L modules at whose input (down_input) or output (pre_activation) neurons are read."""
    return lm.downs if site == "down_input" else lm.arch.ups


def _neurons(lm, site, call):
    """(..., N) neuron vectors at a call of a site module (a fused gate_up_proj gives more)."""
    return call.args[0] if site == "down_input" else call.output[..., : lm.num_neurons]


@torch.no_grad()
def neuron_vectors(lm, ids, site="down_input", chunk=256):
    """(R, L, N) neuron vectors at the last position of the sequences `ids` (R, T), no padding."""
    modules = site_modules(lm, site)

    def at_last(call):  # OPT flattens batch and sequence before its MLP
        return _neurons(lm, site, call).view(-1, ids.shape[1], lm.num_neurons)[:, -1]

    found = []
    with computing(lm):
        for part in ids.split(chunk):
            with traced(modules, at_last) as vectors:
                lm.model.base_model(input_ids=part, use_cache=False)
            found.append(torch.stack(vectors, 1))
    return torch.cat(found)


@torch.no_grad()
def clean_pass(lm, ids, site=None, prefix=None):
    """Run the first `prefix` tokens (default: all but the last one) of `ids` (Q, T), then the
    others, and record how every layer is called for these, and the neurons at `site`, if any."""
    prefix = ids.shape[1] - 1 if prefix is None else prefix
    body = lm.model.base_model
    cache = None
    held = None
    if prefix:
        cache = DynamicCache()
        body(input_ids=ids[:, :prefix], use_cache=True, cache=cache)
        held = [(layer.keys, layer.values) for layer in cache.layers]
    rest = ids[:, prefix:]

    neurons = []
    written = []

    def read(call):  # OPT flattens batch and sequence; Falcon adds to what is written in place
        neurons.append(_neurons(lm, site, call).reshape(*rest.shape, -1))
        written.append(call.output.reshape(*rest.shape, -1).clone())

    sites = site_modules(lm, site) if site else ()
    with traced(lm.layers) as calls, traced(sites, read):
        body(input_ids=rest, use_cache=bool(prefix), cache=cache)
    arguments = [call.arguments for call in calls]
    inputs = [call.pop("hidden_states") for call in arguments]
    inputs.append(first(calls[-1].output))
    return CleanPass(arguments, inputs, neurons, written, held)


def join_passes(passes):
    """Clean passes over prompts of different lengths, recorded at their last tokens, as one, for
    the layout "sequence": prefixes are padded on the left."""
    if len(passes) == 1:
        return passes[0]
    queries = [len(one.inputs[0]) for one in passes]
    lengths = [one.prefix[0][0].shape[2] + 1 for one in passes]
    length = max(lengths)

    def join(*parts):
        return torch.cat(parts)

    def join_padded(*parts):  # (Q, Hkv, tokens, dh), as many tokens as the longest prefix has
        return torch.cat([pad(one, (0, 0, length - 1 - one.shape[2], 0)) for one in parts])

    calls = []
    for layer, names in enumerate(passes[0].calls):
        given = {name: [one.calls[layer][name] for one in passes] for name in names}
        calls.append({k: join_call_arguments(k, v, queries, length) for k, v in given.items()})
    device = passes[0].inputs[0].device
    own = on_device(lengths, device).repeat_interleave(on_device(queries, device))  # (Q,)
    return CleanPass(
        calls=calls,
        inputs=tree_map(join, *(one.inputs for one in passes)),
        neurons=tree_map(join, *(one.neurons for one in passes)),
        written=tree_map(join, *(one.written for one in passes)),
        prefix=tree_map(join_padded, *(one.prefix for one in passes)),
        padding=torch.arange(length, device=device) < length - own[:, None, None, None],
    )


# --- rows -----------------------------------------------------------------------------------------


def run_rows(lm, clean, layer, hidden, query_of_row):
    """(R, S, d) output of decoder layer `layer` for rows `hidden` (R, S, d) of the queries
    `query_of_row` (R,) of the clean pass; None: see `run_layer`."""
    arguments = clean.arguments(layer, query_of_row)
    for name, value in arguments.items():
        if isinstance(value, Cache):
            arguments[name] = PrefixCache(clean, query_of_row)
        elif isinstance(value, Mapping):  # a layer may write into it
            arguments[name] = copy(value)
    return first(lm.layers[layer](hidden, **arguments))


def run_layer(lm, clean, layer, hidden):
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


def start_rows(lm, clean, layer, rows, site):
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
        new = rows.reshape(shape)
        rest = output[..., rows.shape[-1] :]  # the other half of a fused gate_up_proj
        return torch.cat([new, rest.expand(*new.shape[:-1], -1)], -1)

    with edited([site_modules(lm, site)[layer]], after=put):
        return run_layer(lm, clean, layer, hidden)


def replaying(lm):
    """Inside, rows may lie along the sequence: the model's attention is `prefix_attention`."""
    if lm.layout == "batch":
        return nullcontext()
    return attention_implementation(lm.model, PREFIX)
