"""What the fast paths assume of a model, checked at load: what makes "any causal LM" honest.

Each layer's replayed rows are compared with the layer's own whole sequences, and the logits with
the model's own. In half precision a wrong replay hides in the rounding, so such a model computes in
float32 meanwhile, one layer at a time.

Shapes: Q queries of equal length T, d the residual width, W the width of what a layer's site module
gives (see `passes.site_modules`), V the vocabulary.
"""

from contextlib import ExitStack, contextmanager
from itertools import product

import torch
from torch import nn

from qlutils.checks import SITES
from qlutils.model.answer import answer_probabilities, final_logits
from qlutils.model.architecture import PLAIN_DTYPES, UnsupportedModel, refusing
from qlutils.model.passes import (
    clean_pass,
    join_passes,
    replaying,
    run_layer,
    site_modules,
    start_rows,
)
from qlutils.model.trace import edited, first, replaced, traced

# By how much, relative to the largest number, two ways of computing the same may differ in a dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}


def differ(found, wanted, size, tolerance):
    """Whether two tensors differ, or one has NaN: by more than `tolerance` of the largest number in
    `size`, and by more than the numbers themselves are rounded."""
    rounding = 16 * torch.finfo(wanted.dtype).eps * wanted.abs().max()
    return not bool((found - wanted).abs().max() <= tolerance * size.abs().max() + rounding)


def sample_ids(lm, length):
    """(2, `length`) tokens to check a model on, drawn from its vocabulary."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, min(length, lm.context))
    ids = torch.randint(0, lm.num_embeddings, shape, generator=generator, device="cpu")
    return ids.to(lm.device)


# --- computing in float32 -------------------------------------------------------------------------


@contextmanager
def sharply(lm):
    """Inside, the model computes in float32 at least, without gradients, from weights that are cast
    while the layer they belong to runs; gives the tolerance for numbers computed inside. Weights
    are the same tensors afterwards.

    Quantised or offloaded weights have to stay what they are, and with them the model's dtype."""
    plain = all(
        type(one) is nn.Parameter and one.dtype in PLAIN_DTYPES and not one.is_meta
        for one in lm.model.parameters()
    )
    with lm.in_use, torch.inference_mode(False), torch.no_grad():
        if plain and lm.dtype.itemsize == 2:
            with _layers_in_float32(lm):
                yield TOLERANCE[torch.float32]
        else:
            yield TOLERANCE[lm.dtype]


@contextmanager
def _layers_in_float32(lm):
    """Inside, the model computes in float32: what is outside its decoder layers is cast, and one
    layer at a time while it runs."""
    inside = {one for layer in lm.layers for one in _tensors(layer)}
    outside = [one for one in _tensors(lm.model) if one not in inside]
    with _in_float32(outside), ExitStack() as running:

        def before(layer, args, kwargs):
            running.enter_context(_in_float32(_tensors(layer)))

        with edited(lm.layers, before=before, after=lambda *_: running.close()):
            yield


def _in_float32(tensors):
    small = [one for one in tensors if one.is_floating_point() and one.dtype.itemsize < 4]
    return replaced(small, "data", torch.Tensor.float)


def _tensors(module):
    return [*module.parameters(), *module.buffers()]


# --- the check at load ----------------------------------------------------------------------------


@torch.no_grad()
def verify(lm):
    """Find the layout of rows that replays the model exactly, and whether layers add what their
    MLPs write as it is: `lm.layout` and `lm.adds_mlp_output`, which nobody else sets.
    `UnsupportedModel` where there is none."""
    ids = sample_ids(lm, 5)
    ids[0, :2] = ids[1, :2]
    with refusing("a pass over a few tokens"), sharply(lm) as tolerance:
        own = _causal_logits(lm, ids, tolerance)
    problem = None
    for layout, adds in product(("sequence", "batch"), (True, False)):  # faster ones first
        lm.layout = layout
        lm.adds_mlp_output = adds
        try:
            with refusing("A replay"):
                _check_replay(lm, ids, own)
            return
        except UnsupportedModel as error:
            problem = error
    raise UnsupportedModel(
        f"{type(lm.model).__name__}: its last token cannot be replayed exactly, so its neurons "
        f"would be attributed wrongly. {problem}"
    )


def _causal_logits(lm, ids, tolerance):
    """(Q, V) logits at the last token; `UnsupportedModel` where it changes earlier ones'."""
    other = ids.clone()
    other[:, -1] = ids.flip(0)[:, -1]
    own, changed = map(lm.logits, (ids, other))
    if not torch.isfinite(own).all():
        raise UnsupportedModel(
            f"gives infinite or NaN logits in {lm.dtype}; check its weights, or try float32"
        )
    if differ(changed[:, :-1], own[:, :-1], own, tolerance):
        raise UnsupportedModel(
            "not causal: a later token changes an earlier position's prediction (of itself, or as "
            "activations are quantised together)"
        )
    return own[:, -1]


def _check_replay(lm, ids, own):
    """`UnsupportedModel` unless rows, run as `lm` says now, are what whole sequences give; `own`
    (Q, V): the model's logits."""
    with sharply(lm) as tolerance:
        if lm.adds_mlp_output:
            if tolerance > 0.01:
                raise UnsupportedModel(
                    "A multiplier of the MLP's output could hide in the rounding."
                )
            for layer in range(lm.num_layers):
                lm.value_vectors(layer)
        for site in SITES:
            _check_layers(lm, ids, site, tolerance)
        _check_logits(lm, ids, own, tolerance)
    if lm.dtype.itemsize == 2:  # as it will run
        own = lm.logits(ids)[:, -1]
        _check_logits(lm, ids, own, TOLERANCE[lm.dtype])


def _check_layers(lm, ids, site, tolerance):
    """`UnsupportedModel` unless each layer gives for rows what it gives for whole sequences, from
    its input on and from changed neurons on.

    Whole sequences run in 1 + L passes at once: pass 0 is clean, pass 1 + l has another output of
    layer l's site module. At layer l the passes that are changed elsewhere are rows for
    `run_layer`, and the one that is changed here a row for `start_rows`, between two clean ones, so
    that what leaks from row to row shows."""
    clean = clean_pass(lm, ids, site)
    if lm.layout == "sequence":  # where a prompt may be padded to the length of another
        longer = torch.cat([ids[:1, :1], ids[:1]], 1)
        both = join_passes([clean, clean_pass(lm, longer, site)])
        clean = both.pick(torch.arange(len(ids), device=lm.device))
    old = clean.written if site == "down_input" else clean.neurons
    new = [one + one.std() * torch.linspace(-1, 1, one.shape[-1]).to(one) for one in old]
    for layer, (inputs, wanted) in enumerate(_changed_passes(lm, ids, site, new)):
        added = wanted[:, :1] - inputs[:, :1]
        here = 1 + layer
        others = [n for n in range(1 + lm.num_layers) if n != here]
        mixed = torch.cat([old[layer], new[layer], old[layer]], 1)
        with replaying(lm):
            rows = run_layer(lm, clean, layer, inputs[:, others])
            changed = start_rows(lm, clean, layer, mixed, site)
        if differ(rows, wanted[:, others], added, tolerance):
            raise UnsupportedModel(f"Layer {layer}: rows differ from whole sequences.")
        if differ(changed, wanted[:, [0, here, 0]], added, tolerance):
            raise UnsupportedModel(
                f"Layer {layer}: rows of changed neurons ({site}) differ from whole sequences."
            )


def _changed_passes(lm, ids, site, new):
    """Input and output of each layer at the last token, (Q, 1 + L, d) each, in passes over whole
    sequences: a clean one, and one for each layer, whose site module gives `new` (Q, 1, W)."""
    shape = len(ids), 1 + lm.num_layers
    layer_of = {module: layer for layer, module in enumerate(site_modules(lm, site))}

    def put(module, _, output):
        layer = layer_of[module]
        output = output.contiguous().clone()  # of which the next line takes a view
        rows = output.view(*shape, ids.shape[1], -1)  # OPT flattens batch and sequence
        rows[:, 1 + layer, -1, : new[layer].shape[-1]] = new[layer][:, 0]
        return output

    def at_last(call):
        ends = call.arguments["hidden_states"], first(call.output)
        return tuple(one[:, -1].unflatten(0, shape).clone() for one in ends)

    with edited(layer_of, after=put), traced(lm.layers, at_last) as ends:
        lm.model.base_model(input_ids=ids.repeat_interleave(shape[1], 0), use_cache=False)
    return ends


def _check_logits(lm, ids, own, tolerance):
    """`UnsupportedModel` unless the replay of the whole model gives its logits `own` (Q, V)."""
    clean = clean_pass(lm, ids)
    own = own.to(lm.score_dtype)
    if differ(final_logits(lm, clean.inputs[-1][:, -1]), own, own, tolerance):
        raise UnsupportedModel("A pass with a key-value cache gives other logits.")
    hidden = torch.cat([clean.inputs[0], clean.inputs[0] / 2], 1)
    with replaying(lm):
        for layer in range(lm.num_layers):
            hidden = run_layer(lm, clean, layer, hidden)
    log_p = answer_probabilities(lm, hidden[:, :1], own.argmax(-1), need_grad=False).log()
    wanted = torch.log_softmax(own, -1).amax(-1, keepdim=True)
    size = own.abs().clamp_min(1.0)  # the error is that of the logits, which grows with them
    if differ(log_p, wanted, size, tolerance):
        raise UnsupportedModel("The replayed row gives another probability.")
