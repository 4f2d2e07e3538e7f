"""Everything that differs between model families, and nothing else.

The rest of the package sees a model through the `Architecture` found here: its decoder layers, the
down-projection of each MLP (whose *input* holds the neurons), the modules between the last layer
and the unembedding, and the elementwise map from unembedding output to logits. What is found is not
trusted: at load `models.LanguageModel` replays a row through it and compares the logits with the
model's own.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlutils.model import attention

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
# The projection whose output is the pre-activation, a sibling of the down-projection.
UP_PROJECTIONS = (
    "gate_proj",
    "gate_up_proj",
    "c_fc",
    "dense_h_to_4h",
    "fc_in",
    "fc1",
    "up_proj",
    "input_linear",
)
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
def refusing(name: str, step: str):
    """Inside, whatever fails is an `UnsupportedModel` that names the model and the `step`. Memory
    that runs out is not the model's fault."""
    try:
        yield
    except (UnsupportedModel, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind: it comes from other libraries' code
        raise UnsupportedModel(f"{name}: {step} failed with {describe(error)}") from error


def describe(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


@dataclass
class Architecture:
    """The parts of one causal language model.

    `layers` are the decoder layers, `downs` their down-projections, `tail` the modules between the
    last layer and the unembedding `head`. Logits are `softcap * tanh(scale * head(x) / softcap)`,
    or `scale * head(x)` where there is no soft cap.
    """

    name: str
    layers: list[nn.Module]
    downs: list[nn.Module]
    ups: list[nn.Module]
    mlps: list[nn.Module | None]  # None where the projections sit in the layer itself (OPT)
    head: nn.Module
    num_neurons: int
    num_heads: int
    scale: float = 1.0
    softcap: float | None = None
    tail: list[nn.Module] = field(default_factory=list)
    norm_epsilons: list[float | None] = field(default_factory=list)  # see the function of that name
    uses_attention_interface: bool = True
    attention_method: str | None = (
        None  # where a layer computes attention itself, if it can be replaced there
    )


def find_architecture(model: nn.Module, name: str) -> Architecture:
    """Locate the parts of `model`; `UnsupportedModel` names what is missing."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    _check_kind(model, config, text, name)
    if getattr(text, "attn_logit_softcapping", None):
        # Gemma 2 caps its attention scores; transformers' default fused attention silently leaves
        # the cap out.
        model.set_attn_implementation(attention.NAME)
    layers = _decoder_layers(model, text.num_hidden_layers, name)
    downs = [
        _first(
            layer,
            DOWN_PROJECTIONS,
            f"{name}: layer {i} ({type(layer).__name__})",
            "down-projection",
        )
        for i, layer in enumerate(layers)
    ]
    parents = [_parent(layer, down) for layer, down in zip(layers, downs)]
    ups = [
        _first(parent, UP_PROJECTIONS, f"{name}: layer {i}", "up-projection")
        for i, parent in enumerate(parents)
    ]
    for what, found in (("layer", layers), ("down-projection", downs), ("up-projection", ups)):
        if len({id(one) for one in found}) < len(found):
            raise UnsupportedModel(
                f"{name}: one {what} module serves several layers, so a change "
                "of one layer's neurons would be a change of the others' too; "
                "give each layer modules of its own"
            )
    widths = {_in_features(down) for down in downs}
    if len(widths) != 1:
        raise UnsupportedModel(f"{name}: layers have different numbers of neurons {sorted(widths)}")
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModel(
            f"{name}: {type(model).__name__} has no unembedding (language-model head)"
        )
    matrix = getattr(head, "weight", None)
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or not matrix.is_floating_point():
        kind = type(head).__name__
        raise UnsupportedModel(
            f"{name}: its unembedding is a {kind} without a matrix of "
            "floating-point weights (quantised, or of several steps?); give the "
            "model in float32 or bfloat16"
        )
    if matrix.is_meta:
        raise UnsupportedModel(
            f"{name}: its unembedding is offloaded; load the model without "
            "device_map, or with one that keeps the unembedding on a device"
        )
    return Architecture(
        name=name,
        layers=layers,
        downs=downs,
        ups=ups,
        head=head,
        mlps=[None if parent is layer else parent for layer, parent in zip(layers, parents)],
        num_neurons=widths.pop(),
        num_heads=text.num_attention_heads,
        scale=_logit_scale(model, text),
        softcap=getattr(text, "final_logit_softcapping", None),
        # Falcon, BLOOM and GPT-Neo write attention out in their own module; so did GPT-J and
        # CodeGen before transformers 5.24.
        uses_attention_interface=hasattr(
            sys.modules[type(layers[0]).__module__], "ALL_ATTENTION_FUNCTIONS"
        ),
        attention_method="attn._attn"
        if text.model_type == "gptj" and _get(layers[0], "attn._attn")
        else None,
    )


def _check_kind(model, config, text, name) -> None:
    """`UnsupportedModel` for a kind of model that has no neurons of its own a layer, or no last
    token that could be replayed."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{name}: an encoder-decoder model; this study needs a causal (decoder-only) one"
        )
    experts = [n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] in ("experts", "router")]
    if experts:
        raise UnsupportedModel(
            f"{name}: a mixture-of-experts model ({experts[0]}); its MLP has no single set of "
            "neurons a layer"
        )
    recurrent = [kind for kind in getattr(text, "layer_types", None) or () if kind in RECURRENT]
    if recurrent:
        raise UnsupportedModel(
            f"{name}: has recurrent or convolutional layers ({recurrent[0]}); its last token "
            "depends on earlier ones through more than keys and values, so it cannot be replayed"
        )


def _decoder_layers(model, depth, name):
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and any(_get(module[0], path) is not None for path in DOWN_PROJECTIONS)
    ]
    if len(found) > 1:  # a vision tower as deep as the decoder
        found = [layers for layers in found if _runs_on_text(model, layers)]
    if not found:
        raise UnsupportedModel(
            f"{name}: found no list of {depth} decoder layers with a down-projection named one of "
            f"{', '.join(DOWN_PROJECTIONS)} ({type(model).__name__})"
        )
    layers = list(found[0])
    for path in CROSS_ATTENTION:
        if any(_get(layer, path) is not None for layer in layers):
            raise UnsupportedModel(
                f"{name}: the decoder of an encoder-decoder model ({type(model).__name__}; "
                f"{path}), whose layers attend to an encoder that a text alone does not have; this "
                "study needs a causal one"
            )
    return layers


@torch.no_grad()
def _runs_on_text(model, layers) -> bool:
    """Whether `model` runs `layers` when it is given nothing but tokens."""
    called: list[nn.Module] = []
    handle = layers[0].register_forward_hook(lambda module, *_: called.append(module))
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        handle.remove()
    return bool(called)


def _logit_scale(model, config) -> float:
    if getattr(config, "logits_scaling", None):  # Granite divides
        return 1.0 / config.logits_scaling
    return float(getattr(model, "logit_scale", None) or 1.0)  # Cohere multiplies


def _get(module, path):
    for part in path.split("."):
        module = getattr(module, part, None)
        if module is None:
            return None
    return module


def _first(module, paths, where, what):
    for path in paths:
        found = _get(module, path)
        if found is not None:
            return found
    raise UnsupportedModel(f"{where}: no {what} named one of {', '.join(paths)}")


def _parent(layer, child):
    for module in layer.modules():
        if any(candidate is child for candidate in module.children()):
            return module


def _in_features(down) -> int:
    return down.weight.shape[0] if isinstance(down, Conv1D) else down.in_features


def tail_modules(model: nn.Module, arch: Architecture, input_ids: Tensor) -> list[nn.Module]:
    """The modules called between the last decoder layer and the unembedding, in order (the final
    norm; OPT-350m adds a projection). Found by watching one forward pass instead of by name."""
    parent = next(
        m
        for m in model.modules()
        if any(
            isinstance(c, nn.ModuleList) and len(c) and c[0] is arch.layers[0] for c in m.children()
        )
    )
    called: list[nn.Module] = []
    handles = [
        child.register_forward_hook(lambda module, *_: called.append(module))
        for child in [*parent.children(), arch.layers[-1]]
    ]
    try:
        with torch.no_grad():
            model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return called[called.index(arch.layers[-1]) + 1 :]


def norm_epsilons(model: nn.Module, arch: Architecture, input_ids: Tensor) -> list[float | None]:
    """For each layer, the epsilon of the norm that what its MLP writes goes through (Gemma 2 and 3,
    OLMo 2, GLM 4), None where it goes to the residual stream as it is. The norm is found by
    watching one forward pass: it is the module that is given the very tensor the down-projection
    made."""
    written: dict[int, Tensor] = {}
    found: list[float | None] = [None] * len(arch.layers)

    def keep(layer):
        return lambda _, __, output: written.__setitem__(layer, output)

    def compare(layer):
        def hook(module, inputs):
            epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            if epsilon is not None and inputs and inputs[0] is written.get(layer):
                found[layer] = float(epsilon)

        return hook

    handles = []
    try:
        for layer, (module, down) in enumerate(zip(arch.layers, arch.downs)):
            handles.append(down.register_forward_hook(keep(layer)))
            handles += [
                child.register_forward_pre_hook(compare(layer)) for child in module.children()
            ]
        with torch.no_grad():
            model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def use_fused_gelu(model: nn.Module) -> None:
    """GPT-2's `gelu_new` in Python is eight memory-bound kernels; torch's tanh GELU is the same
    function in one. (Differences are of the order of rounding; BLOOM's own GELU has its own
    backward and is left alone.)"""
    for module in list(model.modules()):
        for child_name, child in module.named_children():
            if type(child).__name__ in ("NewGELUActivation", "FastGELUActivation", "GELUTanh"):
                setattr(module, child_name, nn.GELU(approximate="tanh").train(False))


def use_fused_norms(model: nn.Module) -> None:
    """RMSNorm in Python is six memory-bound kernels on a GPU, and more backward; torch's is one
    each, and rounds once instead of twice. Norms of other formulas (Gemma's 1 + w) are told by what
    they compute and left alone, and so is what a loader or a hook has changed."""
    for module in list(model.modules()):
        for child_name, child in module.named_children():
            weight, eps = (
                getattr(child, "weight", None),
                getattr(child, "variance_epsilon", getattr(child, "eps", None)),
            )
            changed = (
                "forward" in child.__dict__ or child._forward_hooks or child._forward_pre_hooks
            )
            if (
                not type(child).__name__.endswith("RMSNorm")
                or changed
                or weight is None
                or eps is None
            ):
                continue
            fused = nn.RMSNorm(weight.shape, eps=eps, device="meta").train(False)
            fused.weight = child.weight
            x = torch.linspace(-1, 3, weight.numel(), device=weight.device, dtype=weight.dtype)[
                None
            ]
            with torch.no_grad():
                if torch.allclose(
                    fused(x), child(x), rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-6
                ):
                    setattr(module, child_name, fused)


def expand_call_argument(key: str | None, value, batch: int, query_of_row: Tensor):
    """Make one argument of a decoder layer, captured in a pass over `batch` queries, fit rows of
    these queries; `query_of_row` (R,).

    A tensor with an entry for each query (Gemma 4's inputs of each layer, say) gives every row its
    query's. ALiBi biases (BLOOM, older Falcons) fold the heads into the batch."""
    if not isinstance(value, Tensor) or value.dim() < 2:  # positions, equal for all rows
        return value
    if key == "alibi":
        return value.unflatten(0, (batch, -1))[query_of_row].flatten(0, 1)
    if key == "position_bias" or value.shape[0] != batch:  # MPT's ALiBi has a row a head
        return value
    if batch > 1 and value.stride(0) != 0:
        return value[query_of_row]
    if value.dim() == 4:  # one mask, which all rows see; XGLM counts its rows
        return value[:1].expand(len(query_of_row), -1, -1, -1)
    return value[:1]


def pick_call_argument(key: str | None, value, batch: int, queries: Tensor):
    """One captured argument of a decoder layer for some `queries` of the `batch` it was captured
    for."""
    if isinstance(value, tuple):
        return tuple(pick_call_argument(key, one, batch, queries) for one in value)
    if not isinstance(value, Tensor) or value.dim() < 2:  # positions, equal for all queries
        return value
    if key == "alibi":
        return value.unflatten(0, (batch, -1))[queries].flatten(0, 1)
    if key == "position_bias":  # MPT's ALiBi has a row a head
        return value
    return value[queries] if value.shape[0] == batch else value


def join_call_arguments(key: str | None, values: list, queries: list[int], length: int):
    """One argument of a decoder layer from passes over `queries` prompts of different lengths, for
    all of them together; masks are padded on the left to `length` (what they hold there is not
    used)."""
    if isinstance(values[0], tuple):
        return tuple(join_call_arguments(key, list(some), queries, length) for some in zip(*values))
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return values[0]
    if min(value.dim() for value in tensors) < 2:
        raise UnsupportedModel(f"the layers' argument {key!r} is not one for each prompt")
    joined = []
    for value, count in zip(values, queries):
        if value is None:  # no mask where the prompt is shorter than the window
            whole = tensors[0].dtype == torch.bool
            value = tensors[0].new_full((1, *tensors[0].shape[1:]), whole)
        if key == "attention_mask":
            value = nn.functional.pad(value, (length - value.shape[-1], 0))
        joined.append(value.expand(count, *value.shape[1:]))
    return torch.cat(joined)


def value_vectors(down: nn.Module) -> Tensor:
    """(N, d) view of the down-projection's weight: row p is the value vector of neuron p (what the
    projection multiplies its activation with): a row of GPT-2's Conv1D, a column of a Linear.
    `UnsupportedModel` unless a forward pass reads what stands there (see `plain_weight`)."""
    weight = plain_weight(down)
    if not isinstance(down, (nn.Linear, Conv1D)):
        raise UnsupportedModel(
            f"{type(down).__name__}: not a linear projection, so its neurons have no value vectors"
        )
    return weight if isinstance(down, Conv1D) else weight.T


def plain_weight(module: nn.Module) -> Tensor:
    """The matrix that a projection or an embedding holds. `UnsupportedModel` where a forward pass
    may use another: what is written to this one would be lost, what is read from it be wrong."""
    weight = module._parameters.get("weight")
    if weight is None:
        reason = (
            "its weight is made from other tensors before each use (pruning, weight_norm, "
            "parametrize, quantisation, an adapter?); write it into the weights first "
            "(prune.remove, remove_parametrizations, merge_and_unload)"
        )
    elif not _is_plain(weight):
        reason = (
            f"quantised weights ({weight.dtype}) cannot be edited exactly; load the model in "
            "float32 or bfloat16"
        )
    elif weight.device.type == "meta":
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
    elif _is_altered(module):
        reason = (
            "other code hangs on it (a hook, or a forward method of its own), which may "
            "change its weight or its output; remove it"
        )
    else:
        return weight
    raise UnsupportedModel(f"{type(module).__name__}: {reason}")


def _is_plain(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.dtype in PLAIN_DTYPES and weight.dim() == 2


def _is_altered(module: nn.Module) -> bool:
    """Whether code that is neither the module's class nor ours runs in its forward pass."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if (getattr(hook, "__module__", None) or "").split(".")[0] != "qlutils":
            return True
    # accelerate's own moves inputs between devices; where it fetches weights, they are on `meta`
    return "forward" in module.__dict__ and not hasattr(module, "_hf_hook")


def check_sole_owner(model: nn.Module, module: nn.Module) -> None:
    """`UnsupportedModel` where the weight of `module` is another module's too, so that an edit
    would change both."""
    place = module.weight.data_ptr()
    held = model.named_parameters(remove_duplicate=False)
    owners = [name.removesuffix(".weight") for name, one in held if one.data_ptr() == place]
    if len(owners) != 1:
        raise UnsupportedModel(
            f"{type(module).__name__}: its weight is shared by "
            f"{', '.join(owners)}, so an edit would change the value vectors of "
            "each; give them weights of their own first"
        )


def rope_kinds(config) -> list[dict]:
    """The rotary settings of a text configuration: one for all layers, or one a kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    return [
        rope for rope in (given, *given.values()) if isinstance(rope, dict) and "rope_type" in rope
    ]


def rope_switches(config) -> list[int]:
    """Lengths in tokens beyond which a forward pass uses other rotary frequencies, for all of its
    tokens: "longrope", as in Phi-3."""
    return [
        rope["original_max_position_embeddings"]
        for rope in rope_kinds(config)
        if rope["rope_type"] == "longrope"
    ]


def context_length(config) -> int:
    """Longest input in tokens (a large number where the configuration states none). One less with
    "dynamic" rotary scaling: beyond `max_position_embeddings` its frequencies grow with the input,
    and an input of just that length would be read with those that a longer one before it left."""
    text = config.get_text_config()
    keys = ("max_position_embeddings", "max_seq_len")  # the latter MPT's
    given = (getattr(text, key, None) for key in keys)
    stated = next((length for length in given if length), 10**9)
    return stated - any("dynamic" in rope["rope_type"] for rope in rope_kinds(text))
