"""Loading a causal language model and turning (prompt, answer) pairs into tokens."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
import sys
from collections.abc import Iterable, Set
from functools import cached_property
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from torch.nn.modules import module as every_module
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from qlutils import paths
from qlutils.facts import check_text, continuation
from qlutils.model import architecture as arch
from qlutils.model import pretrained
from qlutils.model.architecture import UnsupportedModel
from qlutils.model.attention import is_controlled
from qlutils.model.check import verify
from qlutils.model.passes import full_precision

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What transformers reads of a repository with safetensors weights.
MODEL_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
ADAPTER = "adapter_config.json"
BUNDLED = ("demo/gpt2", "demo/llama2", "demo/llama3")


class LanguageModel:
    """A causal language model, its tokenizer, and the places this study looks at.

    `layers[l]` is decoder layer l, `downs[l]` its down-projection; neuron (l, p) is coordinate p of
    the input of `downs[l]`. Weights are frozen and the model is in evaluation mode. Construction
    replays a clean row through the fast path and raises `UnsupportedModel` unless the model's own
    logits come out.
    """

    num_embeddings: float = math.inf  # tokens with both embeddings; a tokenizer alone has no limit
    rope_switches: Iterable[int] = ()  # lengths beyond which rotary frequencies are others

    def __init__(self, model, tokenizer, name: str):
        if hasattr(model, "_orig_mod"):
            raise UnsupportedModel(
                f"{name}: a compiled model, which leaves out hooks; give the model itself"
            )
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModel(
                f"{name}: a {type(model).__name__}, not a transformers model; "
                "give the model inside it (DataParallel: its `module`; "
                "PeftModel: what `merge_and_unload()` returns)"
            )
        if any(parameter.is_inference() for parameter in model.parameters()):
            raise UnsupportedModel(
                f"{name}: a model made inside torch.inference_mode(), which "
                "takes no gradients; make it outside"
            )
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self._fingerprint: tuple = (None, "")
        self._forwards = self._replaced_forwards()  # some loaders set their own
        with arch.refusing(name, "finding its parts"):
            self.arch = arch.find_architecture(model, name)
            arch.use_fused_gelu(model)
            if self.device.type == "cuda":
                arch.use_fused_norms(model)
            embeddings = model.get_input_embeddings(), self.arch.head
            self.num_embeddings = min(module.weight.shape[0] for module in embeddings)
            self.rope_switches = arch.rope_switches(model.config.get_text_config())
        self._parts = list(model.modules())
        self.layers, self.downs = self.arch.layers, self.arch.downs
        self.num_layers, self.num_neurons, self.num_heads = (
            len(self.layers),
            self.arch.num_neurons,
            self.arch.num_heads,
        )
        self.layout = "sequence" if self.arch.uses_attention_interface else "batch"
        with full_precision(self.device):
            verify(self)

    @property
    def device(self) -> torch.device:
        return self.arch.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.arch.head.weight.dtype

    @property
    def score_dtype(self) -> torch.dtype:
        """Softmax, probabilities and scores: float32, or float64 for a float64 model."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @cached_property
    def bos_offset(self) -> int:
        """How many tokens the tokenizer puts in front of every prompt: 1 for BOS (XGLM: </s>), 2
        for GLM's [gMASK]<sop>."""
        ids, bare = (
            list(self.tokenizer("1", add_special_tokens=special).input_ids)
            for special in (True, False)
        )
        for place in range(len(ids)):
            if ids[place : place + len(bare)] == bare:
                return place
        raise ValueError(
            f"{self.name}: what its tokenizer puts in front of a prompt cannot be "
            f"told from the prompt, so no baseline can keep it: '1' is {ids} with it "
            f"and {bare} without"
        )

    @cached_property
    def context(self) -> int:
        """Longest input in tokens (a large number where the configuration states none)."""
        return arch.context_length(self.model.config)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the weights' content, the configuration and the tokenizer: what a result
        depends on. Computed anew when a weight was changed in place."""
        state = tuple(
            (tensor.data_ptr(), tensor._version) for tensor in self.model.state_dict().values()
        )
        if self._fingerprint[0] != state:
            self._fingerprint = state, self._digest()
        return self._fingerprint[1]

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(
                value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            )
        config = {
            k: v for k, v in self.model.config.to_diff_dict().items() if not k.startswith("_")
        }
        config.pop("transformers_version", None)
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        digest.update(
            backend.to_str().encode() if backend is not None else repr(self.tokenizer).encode()
        )
        special = getattr(
            self.tokenizer, "special_tokens_map", {}
        )  # which tokens are EOS, pad and mask: baselines
        digest.update(json.dumps(special, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def check_ready(self) -> None:
        """ValueError for a state of the model in which hooks or numbers would be wrong without a
        word."""
        if self.model.get_output_embeddings() is not self.arch.head:
            raise ValueError(
                f"{self.name} got another unembedding after it was loaded (its embeddings were "
                f"resized?); make a "
                "LanguageModel of it anew"
            )
        if any(module.training for module in self.model.modules()):
            raise ValueError(
                f"{self.name} is in training mode, where dropout changes every number; call "
                f"lm.model.eval()"
            )
        if getattr(self.model, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{self.name} was compiled after it was loaded, and a compiled model leaves out "
                f"hooks; load it anew"
            )
        self.check_parts()

    def check_parts(self) -> None:
        """ValueError where a module was put into the model after loading (an adapter, a new
        projection): forward passes may not go through the places this study looks at any more."""
        now = list(map(id, self.model.modules()))
        if now != list(map(id, self._parts)):
            raise ValueError(
                f"{self.name}: modules were added or exchanged after it was loaded "
                "(an adapter, weight_norm, quantisation?); make a LanguageModel of it "
                "anew"
            )

    def check_hooks(self) -> None:
        """ValueError for what other code hangs on the model's forward passes: hooks, or a `forward`
        replaced since loading. Rows stand side by side where a text's tokens would, and much of a
        pass is left out: what it would do to them is not known."""
        registered = [
            (name, hook)
            for name, module in self.model.named_modules()
            for kind in (module._forward_pre_hooks, module._forward_hooks)
            for hook in kind.values()
        ]
        registered += [
            ("every module", hook)
            for kind in (every_module._global_forward_pre_hooks, every_module._global_forward_hooks)
            for hook in kind.values()
        ]
        for name, hook in registered:
            if (getattr(hook, "__module__", None) or "").split(".")[0] not in (
                "qlutils",
                "transformers",
                "accelerate",
                "torch",
            ):
                raise ValueError(
                    f"{self.name} has a forward hook of other code on {name or 'the model'}, with "
                    f"which numbers would "
                    "be wrong without a word: remove it, or write what it does into the weights"
                )
        if self._replaced_forwards() != self._forwards:
            raise ValueError(
                f"a forward method in {self.name} was replaced since it was loaded, with which "
                f"numbers would be wrong "
                "without a word: put it back, or load the model anew"
            )

    def _replaced_forwards(self) -> dict:
        return {
            name: module.__dict__["forward"]
            for name, module in self.model.named_modules()
            if "forward" in module.__dict__
        }

    def check_untouched(self) -> None:
        """ValueError while a context changes the model: what is computed then must not be kept as
        the model's."""
        self.check_hooks()
        if self.__dict__.get("scales") or is_controlled(self.model):
            raise ValueError(
                f"{self.name} is being changed by scale_neurons or scale_synapses: results are "
                f"kept for the model as it "
                "was loaded; leave the context first"
            )

    def value_vectors(self, layer: int) -> Tensor:
        """(N, d) view of layer `layer`'s down-projection: row p is what neuron p writes.
        `UnsupportedModel` where no forward pass reads it as it stands."""
        return arch.value_vectors(self.downs[layer])

    def check_neurons(self, neurons) -> list[tuple[int, int]]:
        """`neurons` as a sorted list of (layer, index); ValueError for one outside the model."""
        pairs = sorted(set(whole_numbers(neurons, ("layer", "index"), "neuron")))
        for layer, index in pairs:
            if not (0 <= layer < self.num_layers and 0 <= index < self.num_neurons):
                raise ValueError(
                    f"neuron ({layer}, {index}) is outside {self.name}, which has "
                    f"{self.num_layers} layers of "
                    f"{self.num_neurons} neurons, counted from 0"
                )
        return pairs

    # -- tokens ------------------------------------------------------------------------------------
    def _tokenize(self, text: str) -> list[int]:
        check_text(text, "text")
        # Text that spells a special token ("<s>") is data here, never the token itself.
        ids = self.tokenizer(text, split_special_tokens=True).input_ids
        unknown = [token for token in ids if token >= self.num_embeddings]
        if unknown:  # else an index error on a CPU, and a dead process on a GPU
            raise ValueError(
                f"text {text[:60]!r} holds the token "
                f"{self.tokenizer.convert_ids_to_tokens(unknown[0])!r} "
                f"({unknown[0]}), and {self.name} embeds only the tokens 0 to "
                f"{self.num_embeddings - 1}: "
                "the tokenizer is another model's, or the embeddings were not resized for it"
            )
        eos = self.tokenizer.eos_token_id
        if len(ids) > 1 and ids[-1] == eos and not text.endswith(str(self.tokenizer.eos_token)):
            ids = ids[:-1]  # a trailing EOS would end the sentence before the answer
        return list(ids)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with the tokenizer's own BOS and without a trailing EOS. Spaces at
        the end are dropped, as the answer brings its own, and so is a final `[Y]`, the answer's
        place (`data.continuation`). ValueError: not text, empty, other white space at the end, one
        token, longer than the context."""
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt must be text, got {type(prompt).__name__}: {prompt!r}")
        text, _ = continuation(prompt)
        if not text.strip():
            raise ValueError("a prompt is empty; it needs the text that leads up to the answer")
        ids = self._tokenize(text)
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
        the prompt. A prompt that ends with `[Y]` right after its text, "法国的首都是[Y]", has no space
        there.

        ValueError, naming prompt and answer: an empty answer, one that changes how the prompt is
        tokenised, or a query longer than the context."""
        prompt_ids = self.encode_prompt(prompt)
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(
                f"the answer to {prompt!r} is {answer!r}; it must be text that is not empty"
            )
        joint = self._tokenize("".join(continuation(prompt)) + answer.strip())
        if joint[: len(prompt_ids)] != prompt_ids or len(joint) == len(prompt_ids):
            raise ValueError(
                f"the answer {answer!r} is not a continuation of the prompt {prompt!r}: together "
                f"they are tokenised "
                "differently; end the prompt at a word boundary"
            )
        if len(joint) > self.context:
            raise ValueError(
                f"{prompt[:60]!r}... with its answer has {len(joint)} tokens; {self.name} reads "
                f"{self.context}"
            )
        self._check_rope(prompt, len(prompt_ids), len(joint))
        return prompt_ids, joint[len(prompt_ids) :]

    def _check_rope(self, prompt: str, prompt_length: int, length: int) -> None:
        """ValueError where the forward passes that a query needs have different rotary frequencies:
        one pass over all but its last token is then not what passes token by token give, nor one
        that continues a cache of all but the prompt's last."""
        for switch in self.rope_switches:
            if prompt_length - 1 <= switch < length - 1:
                raise ValueError(
                    f"{prompt[:60]!r}... with its answer has {length} tokens and "
                    f"straddles {switch}, beyond which {self.name} uses other rotary "
                    "frequencies (longrope), so its parts would be read differently; "
                    "use a shorter or a longer prompt"
                )

    def encode_all(self, prompts, answers) -> list[tuple[list[int], list[int]]]:
        """`encode` of each prompt with its answer, two lists of texts; ValueError where they are
        anything else."""
        for name, texts in (("prompts", prompts), ("answers", answers)):
            if isinstance(texts, str):
                raise ValueError(
                    f"{name} must be a list of texts, one answer a prompt; got the single text "
                    f"{texts[:60]!r}"
                )
            if not is_sequence(texts):
                raise ValueError(
                    f"{name} must be a list of texts, one answer a prompt; got "
                    f"{type(texts).__name__}: {str(texts)[:60]!r}"
                )
        prompts, answers = list(prompts), list(answers)
        if len(prompts) != len(answers):
            raise ValueError(
                f"{len(prompts)} prompts but {len(answers)} answers; give one answer a prompt"
            )
        return [self.encode(prompt, answer) for prompt, answer in zip(prompts, answers)]


def is_sequence(value) -> bool:
    """Whether iterating `value` gives its entries in an order that means something: not so for
    sets, nor for what iterates over its keys (dictionaries, data frames)."""
    of_keys = hasattr(value, "keys") and not hasattr(value, "to_list")  # a Series has both
    return isinstance(value, Iterable) and not isinstance(value, Set) and not of_keys


def whole_numbers(groups, names, what) -> list[tuple[int, ...]]:
    """`groups`, for example of (layer, index), as tuples of ints. ValueError, naming the first that
    is none: a neuron (0.7, 1) is not neuron (0, 1), and True is not 1."""
    if isinstance(groups, (str, bytes)) or not (isinstance(groups, Set) or is_sequence(groups)):
        raise ValueError(f"{what}s must be a set of ({', '.join(names)}); got {groups!r}")
    found = []
    for group in groups:
        try:
            numbers = tuple(
                operator.index(number) for number in group if not isinstance(number, bool)
            )
        except TypeError:
            numbers = ()
        if isinstance(group, (set, frozenset)):
            raise ValueError(
                f"{what}s must be one set of ({', '.join(names)}); got several sets: pass one of "
                f"them"
            )
        if len(numbers) != len(names) or len(numbers) != len(group):
            raise ValueError(
                f"{what} {group!r} must be ({', '.join(names)}), whole numbers counted from 0"
            )
        found.append(numbers)
    return found


@torch.inference_mode(False)  # whose tensors take no gradients
def load_model(
    name_or_path: str, *, device: str | None = None, dtype: str | None = None
) -> LanguageModel:
    """Load a bundled model ("demo/gpt2"), a pretrained one that the package index carries
    ("pretrained/smollm2-135m", dequantised to float32), a Hugging Face id, a local folder, or a
    GGUF file.

    `device`: "cpu", "cuda", "cuda:1"; default: CUDA where there is one. `dtype`: "float64",
    "float32", "bfloat16", "float16"; default: float32 on a CPU, the checkpoint's own on CUDA. Only
    safetensors and GGUF are read and no code from a checkpoint is run. ValueError
    (`UnsupportedModel` for a kind of model) says what to do.
    """
    if not isinstance(name_or_path, (str, Path)) or not str(name_or_path).strip():
        raise ValueError(f"model must be a name or a folder, got {name_or_path!r}")
    name = str(name_or_path)
    device = _device(device)
    dtype = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if dtype is not None and not (isinstance(dtype, str) and dtype in DTYPES):
        raise ValueError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    torch_dtype = DTYPES[dtype] if dtype else (torch.float32 if device.type == "cpu" else "auto")
    source = _source(name)
    if name in BUNDLED or pretrained.is_gguf(
        name
    ):  # loaded at once; a progress bar would only be litter in a notebook
        transformers.utils.logging.disable_progress_bar()
    try:
        if not os.path.isdir(source):
            _check_adapter(source)
        _check_shards(source)
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch_dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (
        Exception
    ) as error:  # transformers raises many kinds; each becomes one message with a way out
        raise ValueError(f"could not load model {name!r}: {_advice(name, error)}") from error
    if info["missing_keys"]:  # transformers would fill them with random numbers and only warn
        raise ValueError(
            f"model {name!r} is incomplete: its weights lack "
            f"{', '.join(sorted(info['missing_keys'])[:5])}"
        )
    return LanguageModel(model.to(device), tokenizer, name)


def _device(device) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or isinstance(device, int) or found.type not in ("cpu", "mps", "cuda"):
        raise ValueError(f"device {device!r} is unknown; use cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        there = (
            f"{torch.cuda.device_count()}, counted from 0"
            if torch.cuda.is_available()
            else "no CUDA device"
        )
        raise ValueError(
            f"device {str(device)!r} was asked for, but torch sees {there}; use cpu or one that "
            f"is there"
        )
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            f"device {str(device)!r} was asked for, but torch sees no Apple GPU; use cpu"
        )
    return found


def _source(name: str) -> str:
    if name.startswith("demo/"):
        if name not in BUNDLED:
            raise ValueError(
                f"there is no bundled model {name!r}; bundled are {', '.join(BUNDLED)}"
            )
        return str(paths.DEMO / "models" / name.split("/", 1)[1])
    if pretrained.is_gguf(name):
        beside = os.path.dirname(os.path.expanduser(name)) or "."
        if paths.is_gguf_path(name) and os.path.isdir(beside):
            _check_adapter(beside)  # transformers would take it for the file's
        return str(pretrained.folder(name))
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):  # False, where `Path.is_dir` raises, for what cannot be a path
        _check_adapter(str(folder))
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"the folder {name} holds no config.json; a model folder is what save_pretrained "
                f"writes"
            )
        if not list(folder.glob("*.safetensors")):
            raise ValueError(
                f"the folder {name} holds no .safetensors weights; save the model with safetensors "
                "(pickled weights are never read)"
            )
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no model folder {name!r}")
    return name


def fetch_model(name: str) -> None:
    """Have everything of a model on this machine that `load_model` will read, without loading its
    weights; what is there is not downloaded again. ValueError as `load_model`'s."""
    source = _source(name)
    try:
        if not os.path.isdir(source):
            _check_adapter(source)
            source = snapshot_download(source, allow_patterns=MODEL_FILES)
        files = _check_shards(source) or list(Path(source).glob("model*.safetensors"))
        if not files:
            raise ValueError("it has no .safetensors weights")
        for file in files:
            with safe_open(Path(source, file), "pt"):  # its header does not fit a file cut short
                pass
        AutoConfig.from_pretrained(source, trust_remote_code=False)
        AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the hub and transformers raise many kinds
        raise ValueError(f"could not load model {name!r}: {_advice(name, error)}") from error


def _file_of(source: str, file: str) -> str | None:
    """The path of a file of a model, in its folder or fetched from the Hub, if it has it."""
    return cached_file(
        source,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _check_adapter(source: str) -> None:
    """Refuse an adapter: transformers loads it with the model where peft is installed and overlooks
    it elsewhere, two models of one name."""
    if _file_of(source, ADAPTER):
        raise ValueError(
            f"the model {source} holds an adapter ({ADAPTER}), which changes it or "
            "not depending on what is installed; merge it first (peft: "
            "merge_and_unload, then save_pretrained) or take the file away"
        )


def _check_shards(source: str) -> list[str]:
    """The files that the index of a model lists, [] without an index. ValueError unless all are
    safetensors: `use_safetensors` binds transformers to the index's name only, and a pickle that is
    listed in it would be opened."""
    index = _file_of(source, "model.safetensors.index.json")
    if not index:
        return []
    shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    for shard in shards:
        if not str(shard).endswith(".safetensors") or Path(shard).name != shard:
            raise ValueError(
                f"model.safetensors.index.json lists {shard!r}, and only safetensors files of its "
                f"own "
                "folder are read"
            )
    return shards


def _advice(name: str, error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    first = text.strip().splitlines()[0][:300]
    if isinstance(error, UnicodeError) and sys.getfilesystemencoding() != "utf-8":
        return (
            "its name needs UTF-8, which this locale has not: start Python with PYTHONUTF8=1. "
            f"({first})"
        )
    if "gated" in text.lower() or "401" in text or "403" in text:
        return f"the model is gated. Accept its licence on its Hugging Face page, then run `hf auth login`. ({first})"
    if "safetensors" in text.lower():
        return f"only safetensors weights are read; convert the checkpoint or pick a revision that has them. ({first})"
    if any(
        word in text.lower()
        for word in (
            "connect",
            "offline",
            "resolve",
            "not a valid model identifier",
            "not a local folder",
            "couldn't",
            "can't load",
            "timed out",
        )
    ):
        return (
            "it is neither a local folder nor reachable on the Hugging Face Hub. Check the "
            "spelling and the "
            f"network; offline, pass the folder of a downloaded copy, or a bundled model "
            f"({', '.join(BUNDLED)}). ({first})"
        )
    if "unrecognized configuration" in text.lower() or "trust_remote_code" in text.lower():
        return f"transformers {transformers.__version__} has no causal language model of this kind. ({first})"
    return first
