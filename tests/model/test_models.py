"""Finding the parts of a model, refusing what cannot be studied, loading from folders,
fingerprints."""

import copy
import json
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from tiny import (
    FAMILIES,
    save_checkpoint,
    tiny_lm,
    tiny_model,
    word_tokenizer,
)
from torch import nn

from qlutils import (
    answer_probability,
    attribute,
    edit_weights,
    find_synapses,
    load_model,
    scale_neurons,
)
from qlutils.attribution.attribute import Spec, attribute_encoded
from qlutils.model import architecture as arch
from qlutils.model import loading, verify
from qlutils.model.answer import final_logits
from qlutils.model.architecture import UnsupportedModel, join_call_arguments
from qlutils.model.language_model import LanguageModel
from qlutils.model.loading import BUNDLED
from qlutils.model.passes import clean_pass, join_passes, replaying, run_layer
from qlutils.model.trace import Trace
from qlutils.model.verify import sharply
from qlutils.study import store

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


# --- the parts of a model -------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_and_projections_are_found(family):
    lm, spec = tiny_lm(family, torch.float32), FAMILIES[family]
    assert lm.downs == spec.modules(lm.model, "down")
    assert lm.arch.ups == spec.modules(lm.model, "up")
    assert lm.layers == [lm.model.get_submodule(spec.layer.format(i)) for i in range(lm.num_layers)]
    assert lm.num_layers == lm.model.config.num_hidden_layers and lm.num_heads == 4
    states_no_number = {"n_embd", "n_layer", "alibi", "window_size"} & set(spec.options)
    wide = states_no_number or family == "falcon"  # then it is four times the width
    assert lm.num_neurons == (128 if wide else 48)
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_share_the_prefix_in_every_family_that_can(family):
    """A family whose fast layout fails falls back to the slow one, which is exact, so no other test
    would notice."""
    slow = "gpt-neo falcon falcon-alibi bloom opt opt-350m granite-swa".split()
    for dtype in DTYPES:
        assert tiny_lm(family, dtype).layout == ("batch" if family in slow else "sequence"), dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "family, multiplier, adds",
    [
        ("granite", 0.95, False),
        ("granite", 1.05, False),
        ("granite", 1.0, True),
        ("llama3", None, True),
        ("gemma2", None, False),
        ("olmo2", None, False),
        ("opt-350m", None, False),
    ],
)
def test_only_a_layer_that_adds_its_mlps_output_as_it_is_need_not_run(
    family, multiplier, adds, dtype
):
    changes = {} if multiplier is None else {"residual_multiplier": multiplier}
    assert tiny_lm(family, dtype, **changes).adds_mlp_output is adds


@pytest.mark.parametrize("family", ["gpt2", "llama3", "phi", "opt", "bloom", "phi3"])
def test_a_value_vector_is_what_a_neuron_writes_and_a_view_of_the_weight(family):
    lm = tiny_lm(family)
    vectors, down = lm.value_vectors(1), lm.downs[1]
    assert vectors.shape == (lm.num_neurons, 32)
    one = torch.zeros(1, 1, lm.num_neurons, dtype=torch.float64)
    with torch.no_grad():
        silent = down(one)
        one[..., 7] = 2.5
        torch.testing.assert_close((down(one) - silent)[0, 0], 2.5 * vectors[7])
    vectors[7] = 0
    assert vectors.data_ptr() == down.weight.data_ptr()
    column = down.weight[7] if family == "gpt2" else down.weight[:, 7]
    assert column.count_nonzero() == 0


def test_neurons_outside_the_model_are_refused():
    lm = tiny_lm("llama2", torch.float32)
    assert lm.check_neurons([(2, 47), (0, 0), (2, 47)]) == [(0, 0), (2, 47)]
    for neuron in ((3, 0), (0, 48), (-1, 0), (0, -1)):
        named = rf"neuron \({neuron[0]}, {neuron[1]}\) is outside tiny-llama2.*3 layers of 48"
        with pytest.raises(ValueError, match=named):
            lm.check_neurons([neuron])


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "bloom"])
@pytest.mark.parametrize("prefix", [0, 2, None])
def test_a_clean_pass_is_the_models_own_from_wherever_it_is_recorded(family, prefix):
    lm, ids = tiny_lm(family), torch.tensor([[5, 6, 7, 8], [9, 8, 40, 6]])
    start = ids.shape[1] - 1 if prefix is None else prefix
    clean = clean_pass(lm, ids, prefix=prefix, layers=[2, 0])
    with torch.no_grad(), Trace([lm.downs[0], lm.downs[2]]) as trace:
        logits = lm.model(ids, use_cache=False).logits[:, start:]
    torch.testing.assert_close(final_logits(lm, clean.inputs[3]), logits)
    assert (clean.prefix is None) == (prefix == 0) and set(clean.neurons) == {0, 2}
    for layer, call in zip((0, 2), trace.kept):
        neurons, written = (
            one.view(*ids.shape, -1)[:, start:] for one in (call.args[0], call.output)
        )
        torch.testing.assert_close(clean.neurons[layer], neurons)
        if family != "bloom":  # which adds to what is written in place
            torch.testing.assert_close(clean.written[layer], written)
    one = clean.pick(torch.tensor([1])) if prefix else clean
    assert torch.equal(one.inputs[3][-1], clean.inputs[3][-1])


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama3", "mistral", "gemma2"])
def test_joined_passes_over_prompts_of_two_lengths_replay_as_each_alone(family):
    lm, short, long = tiny_lm(family), [[5, 6, 7], [9, 8, 4]], [[5, 6, 7, 8, 9, 10]]
    passes = [clean_pass(lm, torch.tensor(ids)) for ids in (short, long)]
    joined, hidden = join_passes(passes), torch.randn(3, 4, 32, dtype=torch.float64)
    assert torch.equal(joined.pick(torch.tensor([2])).inputs[2], passes[1].inputs[2])
    with replaying(lm):
        for layer in range(lm.num_layers):
            parts = zip(passes, hidden.split([2, 1]))
            alone = [run_layer(lm, clean, layer, rows) for clean, rows in parts]
            torch.testing.assert_close(run_layer(lm, joined, layer, hidden), torch.cat(alone))


def test_prompts_of_several_lengths_that_change_one_another_are_noticed_at_load(monkeypatch):
    """Then they are not refined together; what is found stays right."""
    assert tiny_lm("llama2").layout == "sequence"
    whole = verify.join_passes
    monkeypatch.setattr(verify, "join_passes", lambda passes: replace(whole(passes), padding=None))
    assert tiny_lm("llama2").layout == "batch"


@pytest.mark.parametrize("given", [[None, torch.ones(1, 3)], [torch.ones(1), torch.ones(2)]])
def test_arguments_that_cannot_be_joined_are_refused(given):
    with pytest.raises(UnsupportedModel, match="argument 'position_bias'"):
        join_call_arguments("position_bias", given, [1, 1], 4)


def test_masks_given_by_place_are_joined_as_named_ones():
    lm = tiny_lm("gpt2")
    lm.model.set_attn_implementation("eager")
    queries, spec = [([5, 6, 7, 8], [9]), ([5, 6], [7])], Spec(method="ig", rule="converged")
    together = attribute_encoded(lm, queries, spec).scores
    for found, query in zip(together, queries):
        torch.testing.assert_close(found, attribute_encoded(lm, [query], spec).scores[0])


# --- what cannot be studied -----------------------------------------------------------------------
def test_a_model_that_looks_ahead_is_refused():
    model = tiny_model("llama2")
    bidirectional = lambda ids: torch.zeros(1, 1, ids.shape[1], ids.shape[1], dtype=torch.float64)  # noqa: E731
    forward = model.forward
    model.forward = lambda input_ids, **kwargs: forward(
        input_ids,
        **kwargs,
        **({} if "cache" in kwargs else {"attention_mask": bidirectional(input_ids)}),
    )
    with pytest.raises(UnsupportedModel, match="looks-ahead: not causal"):
        LanguageModel(model, word_tokenizer(), "looks-ahead")


def extra_logit_step(model):
    """A step behind the unembedding that the package cannot know of."""
    forward = model.forward

    def changed(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 3)
        return out

    model.forward = changed


def extra_hidden_step(model):
    """Something between the last layer and the norm that is no module."""
    forward = model.model.norm.forward
    embedding = model.model.embed_tokens.weight
    model.model.norm.forward = lambda x: forward(x + (embedding[5] if x.shape[1] > 1 else 0))


def mixing_layer(model):
    """A layer whose output depends on the other tokens of the pass, not through attention: a
    running mean."""
    layer = model.model.layers[1]
    forward = layer.forward

    def changed(hidden_states, **kwargs):
        out = forward(hidden_states, **kwargs)
        count = torch.arange(1, out.shape[1] + 1, dtype=out.dtype)[:, None]
        return out + out.cumsum(1) / count

    layer.forward = changed


@pytest.mark.parametrize("change", [extra_logit_step, extra_hidden_step, mixing_layer])
def test_a_model_whose_logits_are_not_reproduced_is_refused(change):
    model = tiny_model("llama2")
    LanguageModel(model, word_tokenizer(), "plain")
    change(model)
    with pytest.raises(
        UnsupportedModel, match="odd-model.*LlamaForCausalLM.*cannot be replayed exactly"
    ):
        LanguageModel(model, word_tokenizer(), "odd-model")


def a_little_of(module, share):
    """Make `module` forget `share` of what it reads, wherever it runs on one token alone."""
    forward = module.forward

    def changed(x, *args, **kwargs):
        return forward(x * (1 - share * (x.shape[1] == 1)), *args, **kwargs)

    module.forward = changed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["model.layers.1.mlp", "model.layers.1.self_attn.o_proj"])
def test_rows_that_are_wrong_by_three_percent_are_noticed_in_every_dtype(place, dtype):
    model = tiny_model("llama2", dtype, scale=2)
    LanguageModel(model, word_tokenizer(), "plain")
    a_little_of(model.get_submodule(place), 0.03)
    with pytest.raises(UnsupportedModel, match="odd-model.*Layer 1: rows "):
        LanguageModel(model, word_tokenizer(), "odd-model")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiplier", [0.95, 1.05])
def test_a_logit_multiplier_nobody_knows_of_is_noticed_in_every_dtype(multiplier, dtype):
    model = tiny_model("llama2", dtype)
    forward = model.forward

    def changed(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = multiplier * out.logits
        return out

    model.forward = changed
    with pytest.raises(UnsupportedModel, match="odd-model.*cannot be replayed exactly"):
        LanguageModel(model, word_tokenizer(), "odd-model")


def test_layers_of_different_widths_are_refused():
    model = tiny_model("llama2")
    model.model.layers[1].mlp.down_proj = nn.Linear(40, 32, bias=False)
    model.model.layers[1].mlp.gate_proj = nn.Linear(32, 40, bias=False)
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 40, bias=False)
    with pytest.raises(UnsupportedModel, match="different numbers of neurons.*40, 48"):
        LanguageModel(model.double(), word_tokenizer(), "uneven")


def test_nan_weights_do_not_load():
    model = tiny_model("llama2")
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UnsupportedModel, match="broken"):
        LanguageModel(model, word_tokenizer(), "broken")


def test_quantised_value_vectors_are_refused():
    lm = tiny_lm("llama2")
    lm.downs[0].weight = nn.Parameter(lm.downs[0].weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModel, match="quantised weights.*float32 or bfloat16"):
        lm.value_vectors(0)


class Adapted(nn.Linear):
    """Writes more than its weights say, as a projection with an adapter does."""

    def forward(self, x):
        return super().forward(x) + x[..., :1]


def test_value_vectors_of_a_projection_with_an_adapter_are_refused():
    model = tiny_model("llama2")
    down = model.model.layers[1].mlp.down_proj
    adapted = Adapted(down.in_features, down.out_features, bias=False).to(down.weight)
    adapted.load_state_dict(down.state_dict())
    model.model.layers[1].mlp.down_proj = adapted
    lm = LanguageModel(model, word_tokenizer(), "adapted")
    with pytest.raises(UnsupportedModel, match="Adapted.*adapter.*merge"):
        lm.value_vectors(1)
    assert lm.value_vectors(0).shape == (lm.num_neurons, 32)


def test_an_unembedding_exchanged_after_loading_is_refused():
    lm = tiny_lm("llama2")
    lm.model.resize_token_embeddings(lm.num_embeddings + 3)
    with pytest.raises(ValueError, match="tiny-llama2 got another unembedding after it was loaded"):
        lm.check_ready()


def test_modules_that_serve_several_layers_are_refused():
    """A hook on one layer's projection would act in the other layer too."""
    for part in ("mlp.down_proj", "mlp.gate_proj", ""):
        model = tiny_model("llama2")
        first, second = model.model.layers[:2]
        if part:
            setattr(second.mlp, part.split(".")[1], first.get_submodule(part))
        else:
            model.model.layers[1] = first
        with pytest.raises(UnsupportedModel, match="twice: one .* module serves several layers"):
            LanguageModel(model, word_tokenizer(), "twice")


def test_tokens_that_the_unembedding_cannot_give_are_refused():
    model = tiny_model("llama2", tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight[:90].clone(), requires_grad=False)
    lm = LanguageModel(model, word_tokenizer(), "short")
    with pytest.raises(ValueError, match=r"'95' \(95\).*only the tokens 0 to 89"):
        answer_probability(lm, ["10 11"], ["95"])


# --- loading --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), "llama3", word_tokenizer(bos=True)
    )


def test_a_folder_loads_as_the_model_that_was_saved(checkpoint):
    lm, model = load_model(checkpoint), tiny_model("llama3", torch.float32)
    assert (lm.num_layers, lm.num_neurons, lm.num_heads, lm.bos_offset) == (3, 48, 4, 1)
    assert lm.dtype == torch.float32 and lm.name == checkpoint and lm.context == 64
    ids = torch.tensor([[1, 9, 8, 7]])
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert lm.encode("9 8 7", "6 5") == ([1, 9, 8, 7], [6, 5])
    assert bool(torch.isfinite(attribute(lm, ["9 8 7"], ["6"], steps=2).scores).all())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_the_dtype_is_the_one_asked_for(checkpoint, dtype):
    lm = load_model(checkpoint, device="cpu", dtype=dtype)
    assert lm.dtype == getattr(torch, dtype) and {p.dtype for p in lm.model.parameters()} == {
        lm.dtype
    }
    assert lm.score_dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert lm.device == torch.device("cpu")


def test_on_a_cpu_a_bfloat16_checkpoint_becomes_float32(tmp_path):
    assert (
        load_model(save_checkpoint(tmp_path, "gpt2", dtype=torch.bfloat16), device="cpu").dtype
        == torch.float32
    )


def with_files(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    return str(folder)


def test_names_that_lead_nowhere_say_what_would(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, message in (
        ("demo/gpt5", "no bundled model 'demo/gpt5'.*demo/gpt2, demo/llama2, demo/llama3"),
        (str(tmp_path / "absent"), "no model folder"),
        ("./absent", "no model folder"),
        (with_files(tmp_path / "empty"), "no config.json.*save_pretrained"),
        (with_files(tmp_path / "bare", "config.json"), "no .safetensors weights"),
        ("", "a name or a folder"),
        (None, "a name or a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(name)


@pytest.mark.parametrize("alone", [False, True])
def test_a_folder_with_an_adapter_is_refused(alone, tmp_path):
    """With peft it would be loaded, without it overlooked: two models of one name."""
    if not alone:
        save_checkpoint(tmp_path, "llama2")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config.json\).*merge it"):
        load_model(str(tmp_path), device="cpu")


def test_a_hub_model_with_an_adapter_is_refused(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    held = {"adapter_config.json": str(tmp_path / "adapter_config.json")}
    monkeypatch.setattr(loading, "cached_file", lambda source, file, **_: held.get(file))
    with pytest.raises(ValueError, match="some-one/tuned holds an adapter.*merge it first"):
        load_model("some-one/tuned", device="cpu")


def test_dtypes_and_devices_are_checked_before_anything_is_read(tmp_path):
    for options, message in (
        (dict(dtype="int8"), "dtype 'int8'.*float64, float32, bfloat16, float16"),
        (dict(device="gpu"), "device 'gpu' is unknown.*use cpu, cuda"),
        (dict(device="cuda:99x"), "device 'cuda:99x' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(str(tmp_path), **options)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' is unknown or not there.*CUDA"):
            load_model(str(tmp_path), device="cuda")


def test_an_unreachable_hub_model_says_what_to_do_offline():
    """In a process of its own: the hub's client reads its environment at import."""
    code = (
        "import qlutils\ntry:\n qlutils.load_model('some-one/some-model')\n"
        "except ValueError as error:\n print(error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"},
    )
    assert "could not load model 'some-one/some-model'" in out.stdout, out.stderr
    assert (
        "offline, pass the folder of a downloaded copy" in out.stdout and "demo/gpt2" in out.stdout
    )


class Sentinel:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_weights_are_refused_and_never_unpickled(tmp_path):
    folder, sentinel = tmp_path / "pickled", tmp_path / "was-unpickled"
    save_checkpoint(folder, "gpt2")
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({"lm_head.weight": Sentinel(str(sentinel))}, file)
    with pytest.raises(
        ValueError, match="pickled.*no .safetensors weights.*pickled weights are never read"
    ):
        load_model(str(folder))
    # and with some safetensors file beside it that is not the weights
    save_checkpoint(tmp_path / "other", "gpt2")
    (tmp_path / "other" / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(ValueError, match="safetensors"):
        load_model(str(folder))
    assert not sentinel.exists()


@pytest.mark.parametrize("model_type", ["llama", "of-its-own"])
def test_code_in_a_checkpoint_is_never_run(tmp_path, model_type):
    folder, sentinel = tmp_path / "model", tmp_path / "was-run"
    save_checkpoint(folder, "llama2")
    (folder / "modeling_own.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass Own: pass\n")
    for name, part in (
        (
            "config.json",
            {
                "model_type": model_type,
                "auto_map": {
                    "AutoConfig": "modeling_own.Own",
                    "AutoModelForCausalLM": "modeling_own.Own",
                },
            },
        ),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["modeling_own.Own", "modeling_own.Own"]}},
        ),
    ):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **part}))
    if model_type == "llama":  # transformers has this kind itself
        assert load_model(str(folder)).num_layers == 3
    else:
        with pytest.raises(ValueError, match="could not load model.*model"):
            load_model(str(folder))
    assert not sentinel.exists()


def test_a_damaged_weight_file_is_named(tmp_path):
    save_checkpoint(tmp_path, "gpt2")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="could not load model"):
        load_model(str(tmp_path))


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path):
    """Transformers itself fills a missing tensor with random numbers and only warns."""
    from safetensors.torch import load_file, save_file

    save_checkpoint(tmp_path, "llama2")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.layers.1.mlp.down_proj.weight"):
        load_model(str(tmp_path))


# --- fingerprints ---------------------------------------------------------------------------------
def test_two_loads_have_one_fingerprint_and_the_folders_name_does_not_count(checkpoint, tmp_path):
    first = load_model(checkpoint).fingerprint
    copy = save_checkpoint(tmp_path / "copy", "llama3", word_tokenizer(bos=True))
    assert first == load_model(checkpoint).fingerprint == load_model(copy).fingerprint
    assert len(first) == 64 and int(first, 16) >= 0


def test_a_fingerprint_changes_with_one_weight_the_dtype_the_config_or_the_tokenizer(checkpoint):
    def changed(change):
        lm = load_model(checkpoint)
        change(lm)
        return lm.fingerprint

    def one_weight(lm):
        weight = lm.downs[2].weight
        weight.view(-1)[17] = torch.nextafter(weight.view(-1)[17], torch.tensor(9.0))

    def configuration(lm):
        lm.model.config.rms_norm_eps *= 2

    def tokenizer(lm):
        lm.tokenizer = word_tokenizer()

    found = [changed(c) for c in (lambda lm: None, one_weight, configuration, tokenizer)]
    found.append(load_model(checkpoint, dtype="float64").fingerprint)
    assert len(set(found)) == 5


def test_a_fingerprint_follows_a_change_in_place_and_comes_back_with_the_weights(checkpoint):
    lm = load_model(checkpoint)
    before = lm.fingerprint
    with edit_weights(lm, {(0, 3)}, "erase"):
        assert lm.fingerprint != before
    assert lm.fingerprint == before


def test_a_fingerprint_tells_which_token_is_the_pad_token(checkpoint):
    lm, other = load_model(checkpoint), load_model(checkpoint)
    other.tokenizer.pad_token = lm.tokenizer.convert_ids_to_tokens(7)
    assert other.tokenizer.backend_tokenizer.to_str() == lm.tokenizer.backend_tokenizer.to_str()
    assert other.fingerprint != lm.fingerprint


def test_a_model_saved_again_into_its_folder_is_loaded_anew(tmp_path):
    folder = save_checkpoint(tmp_path / "m", "gpt2", word_tokenizer())
    first = store.cached_model(folder, "cpu")
    assert store.cached_model(folder, "cpu") is first
    with torch.no_grad():
        first.downs[0].weight.mul_(2)
    first.model.save_pretrained(folder)
    again = store.cached_model(folder, "cpu")
    assert again is not first and again.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda lm: lm.model.train(), "training mode"),
        (lambda lm: lm.model.compile(backend="eager"), "compiled"),
    ],
)
def test_a_model_in_a_state_in_which_numbers_would_be_wrong_is_refused(spoil, said):
    lm, query = tiny_lm("gpt2", torch.float32), (["10 11 12"], ["13"])
    spoil(lm)
    for use in (
        lambda: attribute(lm, *query),
        lambda: answer_probability(lm, *query),
        lambda: find_synapses(lm, *query[0]),
        lambda: scale_neurons(lm, {(0, 1)}, 0.0).__enter__(),
    ):
        with pytest.raises(ValueError, match=said):
            use()


# --- what fails while a model is looked at -----------------------------------------------------
class PeftModel(nn.Module):
    """As peft's wrapper: another module around the model, which answers for it."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.config = model, model.config


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def with_head_of_two_steps(model):
    model.lm_head = nn.Sequential(model.lm_head, nn.Identity())
    return model


def with_a_layer_in_bfloat16(model):
    model.model.layers[1].bfloat16()
    return model


def that_fails(model):
    model.model.layers[1].mlp.forward = lambda x: x.new_zeros(1)[7]
    return model


def made_in_inference_mode(_):
    with torch.inference_mode():
        return tiny_model("llama2", torch.float32)


@pytest.mark.parametrize(
    "wrap, said",
    [
        (quantised, "its unembedding is a Linear without a matrix of floating-point weights"),
        (with_head_of_two_steps, "its unembedding is a Sequential"),
        (nn.DataParallel, "a DataParallel.*its `module`"),
        (PeftModel, "a PeftModel.*merge_and_unload"),
        (lambda model: model.to("meta"), "its unembedding is offloaded.*device_map"),
        (with_a_layer_in_bfloat16, "a pass over a few tokens failed with RuntimeError"),
        (that_fails, "a pass over a few tokens failed with IndexError"),
        (made_in_inference_mode, "inference_mode.*make it outside"),
        (lambda _: None, "a NoneType, not a transformers model"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_whatever_fails_while_a_model_is_looked_at_names_the_model_and_the_step(wrap, said):
    with pytest.raises(UnsupportedModel, match=f"^the-model: .*{said}"):
        LanguageModel(wrap(tiny_model("llama2", torch.float32)), word_tokenizer(), "the-model")


def test_a_model_whose_parts_cannot_be_looked_for_names_that_step(monkeypatch):
    model = tiny_model("llama2")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: {}["head"])
    said = "^the-model: finding its parts failed with KeyError: 'head'"
    with pytest.raises(UnsupportedModel, match=said):
        LanguageModel(model, word_tokenizer(), "the-model")


def test_memory_that_runs_out_is_not_said_to_be_the_models_fault():
    model = tiny_model("llama2")

    def full(*_, **__):
        raise torch.OutOfMemoryError("pretended")

    model.model.layers[1].forward = full
    with pytest.raises(torch.OutOfMemoryError, match="pretended"):
        LanguageModel(model, word_tokenizer(), "large")


def test_a_model_loads_inside_inference_mode(checkpoint):
    with torch.inference_mode():
        lm = load_model(checkpoint)
    assert bool(torch.isfinite(attribute(lm, ["9 8 7"], ["6"], steps=2).scores).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_that_share_keys_and_values_are_refused(dtype):
    model = tiny_model(
        "gemma4",
        dtype,
        num_kv_shared_layers=2,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    said = "the-model: .*cannot be replayed exactly"
    with pytest.raises(UnsupportedModel, match=said):
        LanguageModel(model, word_tokenizer(), "the-model")


# --- a model in half precision is checked in float32 -------------------------------------------
def weights(lm):
    return {
        name: (tensor.data_ptr(), tensor.dtype, tensor.clone())
        for name, tensor in lm.model.state_dict().items()
    }


@pytest.mark.parametrize("family", ["llama3", "gemma", "opt-350m"])
def test_inside_the_check_one_layer_at_a_time_is_float32_and_afterwards_none(family):
    lm, seen = tiny_lm(family, torch.bfloat16), []
    before, ids, own = weights(lm), torch.tensor([[5, 6, 7]]), lm.downs[0].weight

    def look(*_):
        seen.append([down.weight.dtype for down in lm.downs])

    for stop in (None, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext(), sharply(lm) as tolerance:
            handles = [down.register_forward_hook(look) for down in lm.downs]
            try:
                logits = lm.model(ids).logits
                if stop:
                    raise stop
            finally:
                for handle in handles:
                    handle.remove()
        assert lm.downs[0].weight is own and tolerance < 1e-3
        assert logits.dtype == torch.float32
        exact = copy.deepcopy(lm.model).double()(ids).logits
        # embeddings stay rounded, and so does Gemma's factor of them
        most = 1e-2 if family == "gemma" else 1e-5
        assert (logits - exact).abs().max() < most * exact.abs().max()
        for name, (pointer, dtype, tensor) in weights(lm).items():
            assert (pointer, dtype) == before[name][:2] and torch.equal(tensor, before[name][2])
    assert [dtypes.count(torch.float32) for dtypes in seen] == [1] * len(seen)
    assert lm.model(ids).logits.dtype == torch.bfloat16


def test_a_compiled_model_is_refused():
    with pytest.raises(UnsupportedModel, match="the-model: a compiled model"):
        LanguageModel(
            torch.compile(tiny_model("gpt2"), backend="eager"), word_tokenizer(), "the-model"
        )


def test_bundled_models_load():
    for name in BUNDLED:
        lm = load_model(name, device="cpu")
        assert lm.name == name and lm.context >= 512 and lm.bos_offset == (name != "demo/gpt2")
        prompt, answer = lm.encode("The capital of France is", "Paris")
        assert lm.tokenizer.decode(answer).strip() == "Paris" and len(prompt) >= 2


# --- faster modules in place of the model's own ---------------------------------------------------
class CentredRMSNorm(nn.Module):
    """Looks like the others, and takes the mean off first."""

    def __init__(self, like):
        super().__init__()
        self.weight, self.eps = like.weight, like.variance_epsilon

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def norms(model):
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RMSNorm")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family, fused",
    [
        ("llama3", True),
        ("qwen3", True),
        ("olmo2", True),
        ("phi3", True),
        ("mistral", True),
        ("gemma", False),
        ("gemma2", False),
        ("gemma3", False),
    ],
)
def test_torch_s_rms_norm_stands_in_for_norms_that_compute_the_same_and_for_no_other(
    family, fused, dtype
):
    """And the logits are as near to those of float64 as the model's own are, which round once
    more."""
    model, exact = tiny_model(family, dtype), tiny_model(family)
    exact.load_state_dict(model.state_dict())
    ids, own, weights = (
        torch.arange(5, 45).reshape(8, 5),
        norms(model),
        {k: v.data_ptr() for k, v in model.state_dict().items()},
    )
    with torch.no_grad():
        wanted, before = exact(ids).logits, model(ids).logits
        arch.use_fused_norms(model)
        after = model(ids).logits
    assert own and list(norms(model)) == list(own)
    assert {isinstance(module, nn.RMSNorm) for module in norms(model).values()} == {fused}
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == weights
    assert (after - wanted).norm() <= 1.2 * (before - wanted).norm()
    assert fused or torch.equal(after, before)


def test_norms_that_others_changed_stay():
    model = tiny_model("llama3", torch.float32)
    first, second, third = model.model.layers
    first.input_layernorm.register_forward_hook(lambda *_: None)
    second.input_layernorm.forward = second.input_layernorm.forward
    third.input_layernorm = CentredRMSNorm(third.input_layernorm)
    kept = [layer.input_layernorm for layer in model.model.layers]
    arch.use_fused_norms(model)
    assert [layer.input_layernorm for layer in model.model.layers] == kept
    assert isinstance(first.post_attention_layernorm, nn.RMSNorm)
