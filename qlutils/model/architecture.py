"""What differs between model families: where their parts are, and what is refused.

The rest of the package sees a model through the `Architecture` found here: its decoder layers, the
down-projection of each MLP (whose *input* holds the neurons), the modules between the last layer
and the unembedding, and the elementwise map from unembedding output to logits. What is found is not
trusted: at load `verify.verify` replays rows through it and compares them with the model's own.

Elsewhere, where they are used, are: what further arguments of an attention may say
(`attention.HARMLESS`), which model types' MLPs have two matrices (`driver.plan.UNGATED`, for what a
run costs), and that OPT flattens batch and sequence before its MLP (`passes`, `verify`, and `rows`,
`changes` and `synapses` of `change`).
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlutils.model import attention
from qlutils.model.trace import traced

# Where the down-projection sits inside a decoder layer, by family.
DOWN_PROJECTIONS = (
    "mlp.down_proj",  # LLaMA, Mistral, Qwen, Gemma, Phi-3, OLMo, Granite, Cohere, StableLM
    "mlp.c_proj",  # GPT-2, GPT-Neo, GPT-BigCode, StarCoder 2
    "mlp.dense_4h_to_h",  # GPT-NeoX, BLOOM, Falcon
    "mlp.fc_out",  # GPT-J, CodeGen
    "mlp.fc2",  # Phi
    "fc2",  # OPT, XGLM
    "ffn.down_proj",  # MPT
    "shared_mlp.output_linear",  # Granite 4 without experts
)
# The projection whose output is the pre-activation; of a gated MLP its gate.
UP_PROJECTIONS = (
    "mlp.gate_proj mlp.gate_up_proj mlp.c_fc mlp.dense_h_to_4h mlp.fc_in mlp.fc1 mlp.up_proj fc1 "
    "ffn.up_proj shared_mlp.input_linear"
).split()
# Kinds of layers, in transformers' names, that keep a state which a key-value cache does not hold.
RECURRENT = ("linear_attention", "conv", "hybrid", "hybrid_sliding")

# Attention to an encoder, as BART and XGLM, BERT and GPT-2, and Mllama name it.
CROSS_ATTENTION = ("encoder_attn", "crossattention", "cross_attn")


# Weights that are what they seem: neither packed nor scaled by a second tensor.
PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PLAIN_MODULES = ("torch.nn.modules.", "transformers.models.", "transformers.pytorch_utils")


class UnsupportedModel(ValueError):
    """The model cannot be studied exactly; the message names it and says why."""


@contextmanager
def refusing(step):
    """Inside, whatever fails is an `UnsupportedModel` that names the `step`. Memory that runs out
    is not the model's fault."""
    try:
        yield
    except (UnsupportedModel, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind: it comes from other libraries' code
        raise UnsupportedModel(f"{step} failed with {describe(error)}") from error


def describe(error):
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


@dataclass(frozen=True)
class Architecture:
    """The parts of one causal language model of L layers.

    `tail` are the modules between the last layer and the unembedding `head`. Logits are
    `softcap * tanh(scale * head(x) / softcap)`, or `scale * head(x)` where there is no soft cap.
    """

    layers: list[nn.Module]  # L decoder layers
    downs: list[nn.Module]  # L down-projections
    ups: list[nn.Module]  # L projections whose output is the pre-activation
    tail: list[nn.Module]
    head: nn.Module
    norm_epsilons: list[float | None]  # see `_norm_epsilon`
    num_neurons: int  # of a layer
    scale: float
    softcap: float | None


def find_architecture(model):
    """Locate the parts of `model`; `UnsupportedModel` says what is missing."""
    text = model.config.get_text_config()
    _refuse_kind(model, text)
    if getattr(text, "attn_logit_softcapping", None):
        # Gemma 2 caps its attention scores; transformers' default fused attention silently leaves
        # the cap out.
        model.set_attn_implementation(attention.EXACT)
    head = _unembedding(model)
    with refusing("a pass over a few tokens"), torch.no_grad(), traced(model.modules()) as kept:
        model(input_ids=torch.arange(2, device=head.weight.device)[None], use_cache=False)
    calls = {call.module: call for call in kept}
    layers = _decoder_layers(model, text.num_hidden_layers, calls)
    downs = _projections(layers, DOWN_PROJECTIONS)
    ups = _projections(layers, UP_PROJECTIONS)
    parts = [*layers, *downs, *ups]
    if len(set(parts)) < len(parts):
        raise UnsupportedModel(
            "one decoder layer or projection module serves several layers, so a change of one "
            "layer's neurons would be a change of the others' too; give each layer modules of its "
            "own"
        )
    widths = {calls[down].args[0].shape[-1] for down in downs}
    if len(widths) != 1:
        raise UnsupportedModel(f"layers have different numbers of neurons {sorted(widths)}")
    return Architecture(
        layers=list(layers),
        downs=downs,
        ups=ups,
        tail=_tail(model, layers, [call.module for call in kept]),
        head=head,
        norm_epsilons=[_norm_epsilon(calls[down].output, kept) for down in downs],
        num_neurons=widths.pop(),
        **logit_map(model),
    )


def _refuse_kind(model, text):
    """`UnsupportedModel` for a kind of model that has no neurons of its own a layer, or no last
    token that could be replayed."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            "an encoder-decoder model; this study needs a causal (decoder-only) one"
        )
    for name, _ in model.named_modules():
        last = name.rpartition(".")[2]
        if last in ("experts", "router"):
            raise UnsupportedModel(
                f"a mixture-of-experts model ({name}); its MLP has no single set of neurons a layer"
            )
        if last in CROSS_ATTENTION:
            raise UnsupportedModel(
                f"the decoder of an encoder-decoder model ({name}), whose layers attend to an "
                "encoder that a text alone does not have; this study needs a causal one"
            )
    for kind in getattr(text, "layer_types", None) or ():
        if kind in RECURRENT:
            raise UnsupportedModel(
                f"has recurrent or convolutional layers ({kind}); its last token depends on "
                "earlier ones through more than keys and values, so it cannot be replayed"
            )


def _decoder_layers(model, depth, called):
    """The list of decoder layers: a vision tower may be as deep, but is not called for a text."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and module[0] in called:
            if _find(module[0], DOWN_PROJECTIONS) is not None:
                return module
    raise UnsupportedModel(
        f"found no list of {depth} decoder layers with a down-projection named one of "
        f"{', '.join(DOWN_PROJECTIONS)} ({type(model).__name__})"
    )


def _unembedding(model):
    head = model.get_output_embeddings()
    matrix = getattr(head, "weight", None)
    plain = isinstance(matrix, Tensor) and matrix.dim() == 2 and matrix.is_floating_point()
    if not plain or matrix.is_meta:
        raise UnsupportedModel(
            f"its unembedding is a {type(head).__name__} without a matrix of floating-point "
            "weights (none, quantised, offloaded, or of several steps?); give a language model in "
            "float32 or bfloat16, loaded without device_map"
        )
    return head


def _tail(model, layers, called):
    """The modules called between the last decoder layer and the unembedding, in order (the final
    norm; OPT-350m adds a projection)."""
    parent = next(one for one in model.modules() if layers in one.children())
    beside = set(parent.children())
    after = called[called.index(layers[-1]) + 1 :]
    return [module for module in after if module in beside]


def _norm_epsilon(written, calls):
    """The epsilon of the norm that what an MLP writes goes through (Gemma 2 and 3, OLMo 2, GLM 4):
    the module that is given the very tensor `written` that the down-projection made. None where it
    goes to the residual stream as it is."""
    for call in calls:
        if call.args and call.args[0] is written and _epsilon(call.module) is not None:
            return float(_epsilon(call.module))
    return None


def _epsilon(norm):
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def logit_map(model):
    """Scale and soft cap of the logits (see `Architecture`), as the model has them now."""
    config = model.config.get_text_config()
    scale = float(getattr(model, "logit_scale", None) or 1.0)  # Cohere multiplies
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / config.logits_scaling
    return {"scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}


def _find(module, paths):
    """The first of `paths` that `module` has."""
    parts = dict(module.named_modules(remove_duplicate=False))
    return next((parts[path] for path in paths if path in parts), None)


def _projections(layers, paths):
    """The first of `paths` in each decoder layer."""
    found = [_find(layer, paths) for layer in layers]
    if None in found:
        raise UnsupportedModel(
            f"layer {found.index(None)} has no projection named one of {', '.join(paths)}"
        )
    return found


# --- faster modules in place of the model's own ---------------------------------------------------


GELUS = ("NewGELUActivation", "FastGELUActivation", "GELUTanh")


def use_fused_modules(model, norms):
    """GPT-2's `gelu_new` in Python is eight memory-bound kernels; torch's tanh GELU is the same
    function in one. (Differences are of the order of rounding; BLOOM's own GELU has its own
    backward and is left alone.)

    `norms`, for a GPU: RMSNorm in Python is six memory-bound kernels there, and more backward;
    torch's is one each, and rounds once instead of twice. Norms of other formulas (Gemma's 1 + w)
    are told by what they compute and left alone, and so is what a loader or a hook has changed."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            kind = type(child).__name__
            changed = "forward" in vars(child) or hooking(child)
            if kind in GELUS:
                setattr(module, name, nn.GELU(approximate="tanh").train(False))
            elif norms and kind.endswith("RMSNorm") and not changed:
                setattr(module, name, _fused(child))


@torch.no_grad()
def _fused(norm):
    """torch's RMSNorm if it computes what `norm` does, else `norm` itself."""
    weight = getattr(norm, "weight", None)
    epsilon = _epsilon(norm)
    if weight is None or epsilon is None:
        return norm
    fused = nn.RMSNorm(weight.shape, eps=epsilon, device="meta").train(False)
    fused.weight = weight
    x = torch.linspace(-1, 3, weight.numel(), device=weight.device, dtype=weight.dtype)[None]
    rounding = 4 * torch.finfo(weight.dtype).eps
    return fused if torch.allclose(fused(x), norm(x), rtol=rounding, atol=1e-6) else norm


# --- arguments of decoder layers ------------------------------------------------------------------


def pick_call_argument(name, value, batch, queries):
    """One argument of a decoder layer, captured in a pass over `batch` queries, for rows of these
    queries; `queries` (R,) says which query each row belongs to.

    A tensor with an entry for each query (Gemma 4's inputs of each layer, say) gives every row its
    query's. ALiBi biases (BLOOM, older Falcons) fold the heads into the batch; MPT's have a row a
    head.
    """
    if isinstance(value, tuple):
        return tuple(pick_call_argument(name, one, batch, queries) for one in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or name == "position_bias":
        return value  # equal for all queries
    if name == "alibi":
        return value.unflatten(0, (batch, -1))[queries].flatten(0, 1)
    if value.shape[0] != batch:
        return value
    if batch == 1 or value.stride(0) == 0:  # one for all, which need not be copied
        return value[:1].expand(len(queries), *value.shape[1:])
    return value[queries]


def join_call_arguments(name, values, queries, length):
    """One argument of a decoder layer from passes over `queries` prompts of different lengths, for
    all of them together; masks are padded on the left to `length` (what they hold there is not
    used)."""
    if isinstance(values[0], tuple):
        return tuple(join_call_arguments(name, some, queries, length) for some in zip(*values))
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return values[0]
    sample = tensors[0]
    joined = []
    are_masks = sample.dim() == 4
    for value, count in zip(values, queries):
        if are_masks and value is None:  # the prompt is shorter than the window
            value = sample.new_full((1, *sample.shape[1:]), sample.dtype == torch.bool)
        if value is None or value.dim() < 2:
            raise UnsupportedModel(f"the layers' argument {name!r} is not one for each prompt")
        if are_masks:
            value = nn.functional.pad(value, (length - value.shape[-1], 0))
        joined.append(value.expand(count, *value.shape[1:]))
    return torch.cat(joined)


def value_vectors(down):
    """(N, d) view of the down-projection's weight: row p is the value vector of neuron p (what the
    projection multiplies its activation with): a row of GPT-2's Conv1D, a column of a Linear.
    `UnsupportedModel` unless a forward pass reads what stands there (see `plain_weight`)."""
    weight = plain_weight(down)
    if not isinstance(down, (nn.Linear, Conv1D)):
        raise UnsupportedModel(
            f"{type(down).__name__}: not a linear projection, so its neurons have no value vectors"
        )
    return weight if isinstance(down, Conv1D) else weight.T


def plain_weight(module):
    """The matrix that a projection or an embedding holds. `UnsupportedModel` where a forward pass
    may use another: what is written to this one would be lost, what is read from it be wrong."""
    weight = module._parameters.get("weight")
    reason = ""
    if weight is None:
        reason = (
            "its weight is made from other tensors before each use (pruning, weight_norm, "
            "parametrize, quantisation, an adapter?); write it into the weights first "
            "(prune.remove, remove_parametrizations, merge_and_unload)"
        )
    elif type(weight) is not nn.Parameter or weight.dtype not in PLAIN_DTYPES or weight.dim() != 2:
        reason = (
            f"quantised weights ({weight.dtype}) cannot be edited exactly; load the model in "
            "float32 or bfloat16"
        )
    elif weight.is_meta:
        reason = (
            "its weight is offloaded (device_map, disk or CPU offload) and fetched anew for "
            "each forward pass; load the model without device_map, whole on one device"
        )
    elif not type(module).__module__.startswith(PLAIN_MODULES):
        reason = (
            "a module that may write more than its weights say (an adapter?) or round them "
            "cannot be edited exactly; merge the adapter into the weights first, or load the "
            "model unquantised"
        )
    elif hooking(module) - {"qlutils"} or (
        # accelerate's own moves inputs; where it fetches weights, they are on `meta`
        "forward" in vars(module) and not hasattr(module, "_hf_hook")
    ):
        reason = (
            "other code hangs on it (a hook, or a forward method of its own), which may "
            "change its weight or its output; remove it"
        )
    if reason:
        raise UnsupportedModel(f"{type(module).__name__}: {reason}")
    return weight


def package_of(hook):
    """The name of the package that a hook comes from."""
    return (getattr(hook, "__module__", None) or "").split(".")[0]


def hooking(module):
    """The packages whose hooks run in a module's forward pass."""
    hooks = {**module._forward_pre_hooks, **module._forward_hooks}
    return set(map(package_of, hooks.values()))


def check_sole_owner(model, module):
    """`UnsupportedModel` where the weight of `module` is another module's too, so that an edit
    would change both."""
    owners = [
        name.removesuffix(".weight")
        for name, one in model.named_parameters(remove_duplicate=False)
        if one.data_ptr() == module.weight.data_ptr()
    ]
    if len(owners) != 1:
        raise UnsupportedModel(
            f"{type(module).__name__}: its weight is shared by {', '.join(owners)}, so an edit "
            "would change the value vectors of each; give them weights of their own first"
        )


# --- positions ------------------------------------------------------------------------------------


def rope_switches(text):
    """Lengths in tokens beyond which a forward pass uses other rotary frequencies, for all of its
    tokens: "longrope", as in Phi-3."""
    return [
        rope["original_max_position_embeddings"]
        for rope in _ropes(text)
        if rope["rope_type"] == "longrope"
    ]


def context_length(text):
    """Longest input in tokens (a large number where the configuration states none). One less with
    "dynamic" rotary scaling: beyond `max_position_embeddings` its frequencies grow with the input,
    and an input of just that length would be read with those that a longer one before it left."""
    stated = getattr(text, "max_position_embeddings", None)
    stated = stated or getattr(text, "max_seq_len", None) or 10**9  # the latter MPT's
    return stated - any("dynamic" in rope["rope_type"] for rope in _ropes(text))


def _ropes(text):
    """The rotary settings of a text configuration: one for all layers, or one a kind of layer."""
    given = getattr(text, "rope_parameters", None) or {}
    found = [given, *given.values()]
    return [rope for rope in found if isinstance(rope, dict) and "rope_type" in rope]
