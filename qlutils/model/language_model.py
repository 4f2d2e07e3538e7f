"""A causal language model with its tokenizer: the places this study looks at, and (prompt, answer)
pairs as tokens."""

import hashlib
import json
import operator
from collections.abc import Iterable, Set
from contextlib import suppress
from tempfile import TemporaryDirectory
from threading import RLock

import torch
from torch import Tensor
from torch.nn.modules import module as every_module
from transformers import PreTrainedModel

from qlutils.facts import check_text, continuation
from qlutils.files import folder_hash
from qlutils.model import architecture
from qlutils.model.architecture import UnsupportedModel
from qlutils.model.attention import EXACT, is_controlled
from qlutils.model.passes import full_precision
from qlutils.model.verify import verify

# Packages whose hooks are known: they move tensors between devices, or are removed with the call.
KNOWN_HOOKS = {"qlutils", "transformers", "accelerate", "torch"}
KNOWN_ATTENTION = ("sdpa", "eager", EXACT)
_NO_SETTING = {"transformers_version"}  # of the configuration
PROBES = ("1", "a", "A", "中")  # texts of which a tokenizer has one, be it of letters only


class LanguageModel:
    """A causal language model, its tokenizer, and the places this study looks at.

    `layers[l]` is decoder layer l, `downs[l]` its down-projection; neuron (l, p) is coordinate p of
    the input of `downs[l]`. Weights are frozen and the model is in evaluation mode. Construction
    replays a clean row through the fast path and raises `UnsupportedModel` unless the model's own
    logits come out.
    """

    def __init__(self, model, tokenizer, name: str):
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModel(
                f"{name}: a {type(model).__name__}, not a transformers model; give the one in it "
                "(DataParallel: its `module`; PeftModel: what `merge_and_unload()` returns; a "
                "compiled one, which leaves out hooks: `_orig_mod`)"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.model.requires_grad_(False)
        self.in_use = RLock()  # held by the thread that computes, see `passes.computing`
        self.scales = []  # what contexts of `change.scaling` change now, outermost first
        self.checked = set()  # what was tried out once: "rows", "attention"
        try:
            with architecture.refusing("finding its parts"):
                self._find_parts()
            with full_precision(self.device):
                self.check_ready()
                verify(self)  # which sets `layout` and `adds_mlp_output`
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{name}: {error}") from error

    def _find_parts(self):
        architecture.use_fused_modules(self.model, norms=self.model.device.type == "cuda")
        self.arch = architecture.find_architecture(self.model)
        self.layers = self.arch.layers
        self.downs = self.arch.downs
        self.num_layers = len(self.layers)
        self.num_neurons = self.arch.num_neurons
        text = self.model.config.get_text_config()
        self.num_heads = text.num_attention_heads
        self.rope_switches = architecture.rope_switches(text)
        self.context = architecture.context_length(text)
        self._loaded = self._state()
        self._fingerprint = None, ""  # the state of the weights, and their fingerprint

    @property
    def device(self) -> torch.device:
        return self.arch.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.arch.head.weight.dtype

    @property
    def num_embeddings(self) -> int:
        """How many tokens the model both reads and writes."""
        embeddings = self.model.get_input_embeddings(), self.arch.head
        return min(len(module.weight) for module in embeddings)

    @property
    def score_dtype(self) -> torch.dtype:
        """Softmax, probabilities and scores: float32, or float64 for a float64 model."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def bos_offset(self) -> int:
        """How many tokens the tokenizer puts in front of every prompt: 1 for BOS (XGLM: </s>), 2
        for GLM's [gMASK]<sop>."""
        return len(self._around()[0])

    def _around(self):
        """What the tokenizer puts before and after every text, (tokens, tokens)."""
        for text in PROBES:
            ids = list(self.tokenizer(text).input_ids)
            bare = list(self.tokenizer(text, add_special_tokens=False).input_ids)
            for place in range(len(ids) if bare else 0):
                end = place + len(bare)
                if ids[place:end] == bare:
                    return ids[:place], ids[end:]
        raise ValueError(
            f"{self.name}: what its tokenizer puts before and after a text cannot be told from the "
            f"text, so no baseline can keep it: {text!r} is {ids} with it and {bare} without"
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the weights' content, the configuration and the tokenizer: what a result
        depends on. Computed anew when one was changed, be it through a weight's `.data`."""
        weights = self.model.state_dict()
        config = self.model.config.to_diff_dict()
        config = {key: config[key] for key in config.keys() - _NO_SETTING if key[0] != "_"}
        # which tokens are EOS, pad and mask: baselines
        special = getattr(self.tokenizer, "special_tokens_map", {})
        settings = [json.dumps(one, sort_keys=True, default=str) for one in (config, special)]
        said = list(self.tokenizer(" A word,\n1").input_ids)  # with BOS or without, say
        state = settings, self.tokenizer, len(self.tokenizer), said
        state += tuple(map(_state_of, weights.values()))
        if self._fingerprint[0] != state:
            self._fingerprint = state, self._digest(weights, *settings)
        return self._fingerprint[1]

    def _digest(self, weights, config, special):
        digest = hashlib.sha256()
        for key, value in sorted(weights.items()):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(_bytes_of(value).cpu().numpy().data)
        for text in (config, _written(self.tokenizer), special):
            digest.update(text.encode())
        # what else is put around texts was once misread: units of that must not be found again
        _, after = self._around()
        digits = list(self.tokenizer(PROBES[0], add_special_tokens=False).input_ids)
        if not digits or after not in ([], [self.tokenizer.eos_token_id]):
            digest.update(str(after).encode())
        return digest.hexdigest()

    def check_ready(self):
        """ValueError where the model is not as it was loaded, so that forward passes may not go
        through the places this study looks at, or compute something else there."""
        if self._state() != self._loaded:
            raise ValueError(
                f"{self.name}: modules were added or exchanged after it was loaded, or a forward "
                "method was replaced (an adapter, weight_norm, quantisation?), or it was compiled, "
                "or its logits' scale or soft cap was set, with which numbers would be wrong "
                "without a word; make a LanguageModel of it anew"
            )
        chosen = self.model.config.get_text_config()._attn_implementation
        if chosen not in KNOWN_ATTENTION:
            raise ValueError(
                f"{self.name} runs with attn_implementation={chosen!r}, whose masks (of sliding "
                'windows) single tokens cannot be given; use "sdpa" or "eager", or call '
                'lm.model.set_attn_implementation("sdpa")'
            )
        if any(module.training for module in self.model.modules()):
            raise ValueError(
                f"{self.name} is in training mode, where dropout changes every number; call "
                "lm.model.eval()"
            )

    def _state(self):
        """What becomes of the logits, and of every module its own forward method, which some
        loaders set, and its compiled one."""
        modules = [
            (module, vars(module).get("forward"), module._compiled_call_impl)
            for module in self.model.modules()
        ]
        return architecture.logit_map(self.model), modules

    def check_hooks(self):
        """ValueError for what other code hangs on the model's forward passes. Layers are run one by
        one, on many changed copies of a token at once; a hook that expects the tokens of a text
        there would compute something else without a word."""
        of_all = {**every_module._global_forward_pre_hooks, **every_module._global_forward_hooks}
        packages = set(map(architecture.package_of, of_all.values()))
        for module in self.model.modules():
            packages |= architecture.hooking(module)
        others = packages - KNOWN_HOOKS
        if others:
            raise ValueError(
                f"{self.name} has a forward hook of other code ({', '.join(sorted(others))}), with "
                "which numbers would be wrong without a word: remove it, or write what it does "
                "into the weights"
            )
        self.check_ready()

    def check_untouched(self):
        """ValueError while a context changes the model: what is computed then must not be kept as
        the model's."""
        self.check_hooks()
        if self.scales or is_controlled(self.model):
            raise ValueError(
                f"{self.name} is being changed by scale_neurons or scale_synapses: results are "
                "kept for the model as it was loaded; leave the context first"
            )

    def value_vectors(self, layer: int) -> Tensor:
        """(N, d) view of layer `layer`'s down-projection: row p is what neuron p writes.
        `UnsupportedModel` where no forward pass reads it as it stands."""
        return architecture.value_vectors(self.downs[layer])

    def check_neurons(self, neurons) -> list[tuple[int, int]]:
        """`neurons` as a sorted list of (layer, index); ValueError for one outside the model."""
        pairs = sorted(set(whole_numbers(neurons, ("layer", "index"), "neuron")))
        for layer, index in pairs:
            if not (0 <= layer < self.num_layers and 0 <= index < self.num_neurons):
                raise ValueError(
                    f"neuron ({layer}, {index}) is outside {self.name}, which has "
                    f"{self.num_layers} layers of {self.num_neurons} neurons, counted from 0"
                )
        return pairs

    def logits(self, ids: Tensor) -> Tensor:
        """(Q, T, V) logits of the model itself for the tokens `ids` (Q, T)."""
        return self.model(input_ids=ids, use_cache=False).logits

    # -- tokens ------------------------------------------------------------------------------------
    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text as data: what spells a special token ("<s>") stays text. What the
        tokenizer puts after a text (EOS, [SEP]), which would end the sentence before the answer,
        goes. ValueError for a token that the model does not embed: else an index error on a CPU,
        and a dead process on a GPU."""
        check_text(text, "text")
        ids = list(self.tokenizer(text, split_special_tokens=True).input_ids)
        token = max(ids, default=0)
        if token >= self.num_embeddings:
            raise ValueError(
                f"text {text[:60]!r} holds the token "
                f"{self.tokenizer.convert_ids_to_tokens(token)!r} ({token}), and {self.name} "
                f"embeds only the tokens 0 to {self.num_embeddings - 1}: the tokenizer is another "
                "model's, or the embeddings were not resized for it"
            )
        _, after = self._around()
        kept = len(ids) - len(after)
        return ids[:kept] if ids[kept:] == after else ids

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with the tokenizer's own BOS and without a trailing EOS. Spaces at
        the end are dropped, as the answer brings its own, and so is a final `[Y]`, the answer's
        place (`facts.continuation`). ValueError: not text, empty, other white space at the end, one
        token, longer than the context."""
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt must be text, got {type(prompt).__name__}: {prompt!r}")
        text, _ = continuation(prompt)
        if not text.strip():
            raise ValueError("a prompt is empty; it needs the text that leads up to the answer")
        ids = self.tokenize(text)
        if len(ids) < 2:
            raise ValueError(
                f"prompt {prompt!r} is a single token; it needs at least two, to have a context"
            )
        if len(ids) > self.context:
            raise ValueError(
                f"prompt {prompt[:60]!r}... has {len(ids)} tokens; {self.name} reads at most "
                f"{self.context}"
            )
        return ids

    def encode(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """(prompt ids, answer ids): the answer is what tokenising `prompt + " " + answer` adds to
        the prompt. A prompt that ends with `[Y]` right after its text, "法国的首都是[Y]", has no
        space there.

        ValueError, naming prompt and answer: an empty answer, one that changes how the prompt is
        tokenised, or a query longer than the context."""
        prompt_ids = self.encode_prompt(prompt)
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(
                f"the answer to {prompt!r} is {answer!r}; it must be text that is not empty"
            )
        joint = self.tokenize("".join(continuation(prompt)) + answer.strip())
        if joint[: len(prompt_ids)] != prompt_ids or len(joint) == len(prompt_ids):
            raise ValueError(
                f"the answer {answer!r} is not a continuation of the prompt {prompt!r}: together "
                "they are tokenised differently; end the prompt at a word boundary"
            )
        if len(joint) > self.context:
            raise ValueError(
                f"{prompt[:60]!r}... with its answer has {len(joint)} tokens; {self.name} reads "
                f"{self.context}"
            )
        self._check_rope(prompt, len(prompt_ids), len(joint))
        return prompt_ids, joint[len(prompt_ids) :]

    def _check_rope(self, prompt, prompt_length, length):
        """ValueError where the forward passes that a query needs have different rotary frequencies:
        one pass over all but its last token is then not what passes token by token give, nor one
        that continues a cache of all but the prompt's last."""
        for switch in self.rope_switches:
            if prompt_length - 1 <= switch < length - 1:
                raise ValueError(
                    f"{prompt[:60]!r}... with its answer has {length} tokens and straddles "
                    f"{switch}, beyond which {self.name} uses other rotary frequencies (longrope), "
                    "so its parts would be read differently; use a shorter or a longer prompt"
                )

    def encode_all(self, prompts, answers) -> list[tuple[list[int], list[int]]]:
        """`encode` of each prompt with its answer, two lists of texts; ValueError where they are
        anything else."""
        for name, texts in (("prompts", prompts), ("answers", answers)):
            if not is_sequence(texts):
                kind = "the single text" if isinstance(texts, str) else type(texts).__name__
                raise ValueError(
                    f"{name} must be a list of texts, one answer a prompt; got {kind}: "
                    f"{str(texts)[:60]!r}"
                )
        prompts = list(prompts)
        answers = list(answers)
        if len(prompts) != len(answers):
            raise ValueError(
                f"{len(prompts)} prompts but {len(answers)} answers; give one answer a prompt"
            )
        return list(map(self.encode, prompts, answers))


def check_loaded(lm):
    """ValueError for what is no `LanguageModel`."""
    if not isinstance(lm, LanguageModel):
        raise ValueError(
            f"lm is a {type(lm).__name__}: give what load_model(name) returns; a transformers "
            "model becomes one by LanguageModel(model, tokenizer, name)"
        )


def _written(tokenizer):
    """A tokenizer's content as text; of one in Python a hash of the files it saves."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return backend.to_str()
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return folder_hash(folder)


def _bytes_of(tensor):
    """A tensor's content, as bytes."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _state_of(tensor):
    """What nearly every change of a tensor changes: its place, how often it was written to, and the
    sum of its bytes, eight at a time, as a write through `.data` is not counted."""
    content = _bytes_of(tensor)
    whole = len(content) // 8 * 8
    if content.storage_offset() % 8:
        content = content.clone()
    total = content[:whole].view(torch.int64).sum() + content[whole:].sum()
    return tensor.data_ptr(), tensor._version, int(total)


def is_sequence(value) -> bool:
    """Whether iterating `value` gives its entries in an order that means something: not so for
    sets, nor for what iterates over its keys (dictionaries, data frames) or its letters."""
    of_keys = hasattr(value, "keys") and not hasattr(value, "to_list")  # a Series has both
    ordered = isinstance(value, Iterable) and not isinstance(value, (Set, str, bytes))
    return ordered and not of_keys


def whole_numbers(groups, names, what) -> list[tuple[int, ...]]:
    """`groups`, for example of (layer, index), as tuples of ints. ValueError, naming the first that
    is none: a neuron (0.7, 1) is not neuron (0, 1), True is not 1, and a set has no order."""
    wanted = f"({', '.join(names)}), whole numbers counted from 0"
    if not (isinstance(groups, Set) or is_sequence(groups)):
        raise ValueError(f"{what}s must be a set of {wanted}; got {groups!r}")
    found = []
    for group in groups:
        numbers = ()
        if is_sequence(group):
            with suppress(TypeError):
                numbers = tuple(operator.index(one) for one in group if not isinstance(one, bool))
        if not len(numbers) == len(names) == len(group):
            raise ValueError(f"{what} {group!r} must be {wanted}; of several sets pass one")
        found.append(numbers)
    return found
