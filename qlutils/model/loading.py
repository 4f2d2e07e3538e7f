"""Loading a model by name: bundled, pretrained, of the Hugging Face Hub, a folder or a GGUF file.

Only safetensors and GGUF weights are read, and no code from a checkpoint is run.
"""

import json
import os
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from qlutils import paths
from qlutils.checks import DTYPES, one_of
from qlutils.model import pretrained
from qlutils.model.architecture import describe
from qlutils.model.language_model import LanguageModel
from qlutils.paths import BUNDLED

# Of a repository, without the copies of the weights that some hold in other formats.
MODEL_FILES = ("model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"


@torch.inference_mode(False)  # whose tensors take no gradients
def load_model(
    name_or_path: str, *, device: str | None = None, dtype: str | None = None
) -> LanguageModel:
    """Load a bundled model ("demo/gpt2"), a pretrained one that the package index carries
    ("pretrained/smollm2-135m", dequantised to float32), a Hugging Face id, a local folder, or a
    GGUF file.

    `device`: "cpu", "cuda", "cuda:1"; default: CUDA where there is one. `dtype`: "float64",
    "float32", "bfloat16", "float16"; default: float32 on a CPU, the checkpoint's own on CUDA, but
    bfloat16 for float16, which cannot be attributed. Both may be torch's objects. Only safetensors
    and GGUF are read and no code from a checkpoint is run. ValueError (`UnsupportedModel` for a
    kind of model) says what to do.
    """
    if not isinstance(name_or_path, (str, Path)) or not str(name_or_path).strip():
        raise ValueError(f"model must be a name or a folder, got {name_or_path!r}")
    name = str(name_or_path)
    device = find_device(device)
    if dtype is not None:
        dtype = str(dtype).removeprefix("torch.")
        one_of("dtype", dtype, DTYPES)
    if name in BUNDLED or pretrained.is_gguf(name):  # loaded at once: a bar would be litter
        transformers.utils.logging.disable_progress_bar()
    source = find_source(name)
    with _explained(name):
        _check_files(source)
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype or ("float32" if device.type == "cpu" else "auto"),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    _check_whole(name, model, info)
    if dtype is None and model.dtype == torch.float16:  # `model.to` would round its buffers, too
        return load_model(name, device=device, dtype="bfloat16")
    return LanguageModel(model.to(device), tokenizer, name)


def _check_whole(name, model, info):
    """ValueError where the checkpoint lacks weights or some would not be read; `info` is what
    transformers says of it."""
    if info["missing_keys"]:  # transformers would fill them with random numbers and only warn
        raise ValueError(
            f"model {name!r} is incomplete: its weights lack "
            f"{', '.join(sorted(info['missing_keys'])[:5])}"
        )
    any_layer = partial(re.sub, r"\.\d+\.", ".0.")
    named = (f"{one.rpartition('.')[0]}." for one, _ in model.named_parameters())
    modules = tuple(set(map(any_layer, named)))
    left = sorted(key for key in info["unexpected_keys"] if any_layer(key).startswith(modules))
    if left:  # a bias or a layer that config.json denies, an adapter: not the model that was saved
        raise ValueError(
            f"model {name!r} would be read without some weights of its layers: "
            f"{', '.join(left[:5])}. Merge an adapter first; is its config.json right?"
        )


def fetch_model(name):
    """Have everything of a model on this machine that `load_model` will read, without loading its
    weights; what is there is not downloaded again. ValueError as `load_model`'s."""
    source = find_source(name)
    with _explained(name):
        _check_files(source)
        if not os.path.isdir(source):
            source = snapshot_download(source, allow_patterns=MODEL_FILES)
        files = _shards(source) or list(Path(source).glob("model*.safetensors"))
        if not files:
            raise ValueError("it has no .safetensors weights")
        for file in files:
            with safe_open(Path(source, file), "pt"):  # its header does not fit a file cut short
                pass
        AutoConfig.from_pretrained(source, trust_remote_code=False)
        AutoTokenizer.from_pretrained(source, trust_remote_code=False)


@contextmanager
def _explained(name):
    """Inside, whatever fails is a ValueError with a way out: transformers and the hub raise many
    kinds."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"could not load model {name!r}: {_advice(error)}") from error


def find_device(device):
    """The device of that name; None: CUDA where there is one. ValueError for one that is not
    there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = ""
    if str(device).split(":")[0] in ("cpu", "mps", "cuda"):
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:  # the latter: torch without CUDA
            reason = f" ({describe(error)})"
    raise ValueError(f"device {device!r} is unknown or not there; use cpu, cuda or cuda:N{reason}")


def find_source(name):
    """The folder of a model, or its Hugging Face id, there or not. ValueError: a name that begins
    with demo/ and is no bundled model's."""
    if name.startswith("demo/") and name not in BUNDLED:
        raise ValueError(f"there is no bundled model {name!r}; bundled are {', '.join(BUNDLED)}")
    where = paths.model_folder(name)
    # transformers would take an adapter beside a GGUF file for the file's
    beside = where.parent if paths.is_gguf_path(name) else where
    if os.path.isdir(beside):  # False, where `Path.is_dir` raises, for what cannot be a path
        _check_adapter(beside)
    if pretrained.is_gguf(name):
        return str(pretrained.folder(name))
    return str(where) if os.path.isdir(where) else name


# --- what may be read -----------------------------------------------------------------------------


def _check_files(source):
    """ValueError for files of a model that must not be read with it."""
    if not os.path.isdir(source):
        _check_adapter(source)
    _shards(source)


def _file_of(source, file):
    """The path of a file of a model, in its folder or fetched from the Hub, if it has it."""
    return cached_file(
        source,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _check_adapter(source):
    """Refuse an adapter: transformers loads it with the model where peft is installed and overlooks
    it elsewhere, two models of one name."""
    if _file_of(source, ADAPTER):
        raise ValueError(
            f"the model {source} holds an adapter ({ADAPTER}), which changes it or not depending "
            "on what is installed; merge it first (peft: merge_and_unload, then save_pretrained) "
            "or take the file away"
        )


def _shards(source):
    """The files that the index of a model lists, [] without an index. ValueError unless all are
    safetensors: `use_safetensors` binds transformers to the index's name only, and a pickle that is
    listed in it would be opened."""
    index = _file_of(source, INDEX)
    if not index:
        return []
    shards = sorted(set(json.loads(Path(index).read_bytes())["weight_map"].values()))
    for shard in shards:
        if not str(shard).endswith(".safetensors") or Path(shard).name != shard:
            raise ValueError(
                f"{INDEX} lists {shard!r}, and only safetensors files of its own folder are read"
            )
    return shards


UNREACHABLE = (
    "connect|offline|resolve|not a valid model identifier|repo id must|not a local folder|couldn't|"
    "can't load|timed out"
)
# What is in an error, and what to do about it; the first row that fits.
ADVICE = {
    "gated|401|403": "the model is gated. Accept its licence on its Hugging Face page, then run "
    "`hf auth login`.",
    "safetensors": "only safetensors weights are read; convert the checkpoint or pick a revision "
    "that has them.",
    "tokenizer": "its tokenizer is missing or cannot be read; save it beside the weights.",
    UNREACHABLE: "it is neither a local folder nor reachable on the Hugging Face Hub. Check the "
    "spelling and the network; offline, pass the folder of a downloaded copy, or a bundled model "
    f"({', '.join(BUNDLED)}).",
    "unrecognized configuration|trust_remote_code": f"transformers {transformers.__version__} has "
    "no causal language model of this kind.",
}


def _advice(error):
    first = describe(error)
    said = re.sub(r"\S*/\S*", "", f"{first} {error}")  # not the names of folders
    for words, advice in ADVICE.items():
        if re.search(words, said, re.IGNORECASE):
            return f"{advice} ({first})"
    return first
