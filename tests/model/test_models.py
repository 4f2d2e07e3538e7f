"""Models that cannot be studied, loading from folders, fingerprints, faster modules. That a model's
parts are found right is in test_families.py: else its scores are wrong."""

import copy
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, hooked, save_checkpoint, tiny_lm, tiny_model, word_tokenizer
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, CTRLTokenizer

from qlutils import (
    answer_probability,
    attribute,
    edit_weights,
    find_synapses,
    load_model,
    perplexity,
)
from qlutils.model import architecture as arch
from qlutils.model import attention, loading, verify
from qlutils.model.architecture import UnsupportedModel, join_call_arguments
from qlutils.model.language_model import LanguageModel
from qlutils.model.verify import sharply

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SLOW = "gpt-neo falcon falcon-alibi bloom opt opt-350m granite-swa".split()
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def load(model, name="the-model"):
    return LanguageModel(model, word_tokenizer(), name)


# --- how rows of a model are run ------------------------------------------------------------------
@in_every_dtype
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_share_the_prefix_in_every_family_that_can(family, dtype):
    """The slow layout is exact too, so no other test would notice."""
    assert tiny_lm(family, dtype).layout == ("batch" if family in SLOW else "sequence")


ADDS = [("granite", {"residual_multiplier": factor}, factor == 1) for factor in (0.95, 1.0, 1.05)]
ADDS += [("llama3", {}, True), ("gemma2", {}, False), ("olmo2", {}, False), ("opt-350m", {}, False)]


@in_every_dtype
@pytest.mark.parametrize("family, changes, adds", ADDS)
def test_only_a_layer_that_adds_its_mlps_output_as_it_is_need_not_run(family, changes, adds, dtype):
    assert tiny_lm(family, dtype, **changes).adds_mlp_output is adds


def test_prompts_of_several_lengths_that_change_one_another_are_noticed_at_load(monkeypatch):
    """Then they are not refined together; what is found stays right."""
    whole = verify.join_passes
    monkeypatch.setattr(verify, "join_passes", lambda passes: replace(whole(passes), padding=None))
    assert tiny_lm("llama2").layout == "batch"


@pytest.mark.parametrize("given", [[None, torch.ones(1, 3)], [torch.ones(1), torch.ones(2)]])
def test_arguments_that_cannot_be_joined_are_refused(given):
    with pytest.raises(UnsupportedModel, match="argument 'position_bias'"):
        join_call_arguments("position_bias", given, [1, 1], 4)


# --- what cannot be studied -----------------------------------------------------------------------
def wrap(module, run):
    """From here on the module gives what `run(forward, ...)` gives, with its own forward."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: run(forward, *args, **kwargs)


def looking_ahead(model):
    def run(forward, input_ids, **kwargs):
        length = input_ids.shape[1]
        if "cache" not in kwargs:
            kwargs["attention_mask"] = torch.zeros(1, 1, length, length, dtype=model.dtype)
        return forward(input_ids, **kwargs)

    wrap(model, run)


def with_other_logits(change):
    """A step behind the unembedding that the package cannot know of."""

    def run(forward, *args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = change(out.logits)
        return out

    return lambda model: wrap(model, run)


def extra_hidden_step(model):
    """Something between the last layer and the norm that is no module."""
    step = model.model.embed_tokens.weight[5]
    wrap(model.model.norm, lambda forward, x: forward(x + step * (x.shape[1] > 1)))


def mixing_layer(model):
    """A layer whose output depends on the other tokens of the pass, not through attention."""

    def run(forward, hidden_states, **kwargs):
        out = forward(hidden_states, **kwargs)
        count = torch.arange(1, out.shape[1] + 1, dtype=out.dtype)[:, None]
        return out + out.cumsum(1) / count

    wrap(model.model.layers[1], run)


def forgetting(place):
    """A module that forgets 3 % of what it reads wherever it runs on one token alone."""

    def run(forward, x, *args, **kwargs):
        return forward(x * (1 - 0.03 * (x.shape[1] == 1)), *args, **kwargs)

    return lambda model: wrap(model.model.layers[1].get_submodule(place), run)


WRONG = [
    (looking_ahead, "not causal"),
    (with_other_logits(lambda logits: 30 * torch.tanh(logits / 3)), "cannot be replayed exactly"),
    (with_other_logits(lambda logits: 1.05 * logits), "cannot be replayed exactly"),
    (extra_hidden_step, "LlamaForCausalLM.*cannot be replayed exactly"),
    (mixing_layer, "cannot be replayed exactly"),
    (forgetting("mlp"), "Layer 1: rows "),
    (forgetting("self_attn.o_proj"), "Layer 1: rows "),
]


@in_every_dtype
@pytest.mark.parametrize("spoil, said", WRONG)
def test_a_model_whose_logits_are_not_reproduced_is_refused(spoil, said, dtype):
    model = tiny_model("llama2", dtype, scale=2)
    load(model)
    spoil(model)
    with pytest.raises(UnsupportedModel, match=f"^the-model: .*{said}"):
        load(model)


def of_another_width(model):
    mlp = model.model.layers[1].mlp
    mlp.down_proj = nn.Linear(40, 32, bias=False)
    mlp.gate_proj, mlp.up_proj = nn.Linear(32, 40, bias=False), nn.Linear(32, 40, bias=False)


def with_nan(model):
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")


def that_fails(model):
    model.model.layers[1].mlp.forward = lambda x: x.new_zeros(1)[7]


def without_parts(model):
    model.get_output_embeddings = lambda: {}["head"]


def sharing(part):
    """With a module for two layers: a hook on one layer's would act in the other layer too."""

    def share(model):
        first, second = model.model.layers[:2]
        if part:
            setattr(second.mlp, part, getattr(first.mlp, part))
        else:
            model.model.layers[1] = first

    return share


def sharing_keys(_):
    kinds = ["sliding_attention", "full_attention"] * 2
    options = dict(num_kv_shared_layers=2, num_hidden_layers=4, layer_types=kinds)
    return tiny_model("gemma4", torch.float32, **options)


class PeftModel(nn.Module):
    """As peft's wrapper: another module around the model, which answers for it."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.config = model, model.config


SHARED = "one .* module serves several layers"
UNUSABLE = [  # what is done to a model, or given in its place
    (of_another_width, "different numbers of neurons.*40, 48"),
    (with_nan, "infinite or NaN"),
    (lambda model: setattr(model, "lm_head", nn.Sequential()), "its unembedding is a Sequential"),
    (lambda model: model.to("meta"), "its unembedding .*offloaded.*device_map"),
    (that_fails, "a pass over a few tokens failed with IndexError"),
    (without_parts, "finding its parts failed with KeyError: 'head'"),
    (sharing("down_proj"), SHARED),
    (sharing("gate_proj"), SHARED),
    (sharing(""), SHARED),
    (sharing_keys, "cannot be replayed exactly"),
    (nn.DataParallel, "a DataParallel.*its `module`"),
    (PeftModel, "a PeftModel.*merge_and_unload"),
    (lambda model: torch.compile(model, backend="eager"), "a OptimizedModule.*leaves out hooks"),
    (lambda _: nn.Identity(), "a Identity, not a transformers model"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change, said", UNUSABLE)
def test_a_model_that_cannot_be_looked_at_is_refused_by_name_and_step(change, said):
    model = tiny_model("llama2", torch.float32)
    instead = change(model)
    with pytest.raises(UnsupportedModel, match=f"^the-model: .*{said}"):
        load(model if instead is None else instead)


def test_memory_that_runs_out_is_not_said_to_be_the_models_fault():
    model = tiny_model("llama2")

    def full(*_, **__):
        raise torch.OutOfMemoryError("pretended")

    model.model.layers[1].forward = full
    with pytest.raises(torch.OutOfMemoryError, match="pretended"):
        load(model)


class Adapted(nn.Linear):
    """Writes more than its weights say, as a projection with an adapter does."""

    def forward(self, x):
        return super().forward(x) + x[..., :1]


def test_value_vectors_of_a_projection_with_an_adapter_are_refused():
    model = tiny_model("llama2")
    down = model.model.layers[1].mlp.down_proj
    down.__class__ = Adapted
    lm = load(model)
    with pytest.raises(UnsupportedModel, match="Adapted.*adapter.*merge"):
        lm.value_vectors(1)
    assert lm.value_vectors(0).shape == (48, 32) and not lm.adds_mlp_output


@pytest.mark.parametrize("part", ["lm_head", "model.embed_tokens"])
def test_tokens_that_the_model_does_not_embed_are_refused_by_text_and_token(part):
    """Else the embedding is read out of its bounds."""
    model = tiny_model("llama2", torch.float32, tie_word_embeddings=False)
    module = model.get_submodule(part)
    module.weight = nn.Parameter(module.weight[:90].clone(), requires_grad=False)
    if part != "lm_head":
        module.num_embeddings = 90
    lm = load(model)
    assert 0 < float(answer_probability(lm, ["10 11"], ["12"])) < 1
    for call in (
        lambda: attribute(lm, ["10 95"], ["12"]),
        lambda: answer_probability(lm, ["10 11"], ["95"]),
        lambda: perplexity(lm, ["10 11 95"]),
        lambda: find_synapses(lm, "10 95"),
    ):
        with pytest.raises(ValueError, match=r"'95' \(95\).*only the tokens 0 to 89"):
            call()


# --- loading --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return save_checkpoint(folder, "llama3", word_tokenizer(bos=True))


@torch.no_grad()
def test_a_folder_loads_as_the_model_that_was_saved(checkpoint):
    lm, model, ids = load_model(checkpoint), tiny_model("llama3", torch.float32), [1, 9, 8, 7]
    assert (lm.num_heads, lm.bos_offset, lm.context, lm.name) == (4, 1, 64, checkpoint)
    own, wanted = (one(torch.tensor([ids])).logits for one in (lm.model, model))
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)
    assert lm.encode("9 8 7", "6 5") == (ids, [6, 5])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", None])
def test_the_dtype_is_the_one_asked_for_and_else_float32(tmp_path, dtype):
    saved = save_checkpoint(tmp_path, "gpt2", dtype=torch.bfloat16)
    given = getattr(torch, dtype) if dtype in ("float64", "float16") else dtype
    lm = load_model(saved, device=torch.device("cpu"), dtype=given)
    assert {p.dtype for p in lm.model.parameters()} == {getattr(torch, dtype or "float32")}
    assert lm.score_dtype == (torch.float64 if dtype == "float64" else torch.float32)


@pytest.mark.parametrize("saved, wanted", [("float16", "bfloat16"), ("float32", "float32")])
def test_a_float16_checkpoint_can_be_attributed_on_a_gpu_too(tmp_path, monkeypatch, saved, wanted):
    """LLaMA-2's is one. "meta" stands for CUDA, on which no dtype means the checkpoint's own."""
    folder = save_checkpoint(tmp_path, "llama2", dtype=getattr(torch, saved))
    monkeypatch.setattr(loading, "find_device", lambda _: torch.device("meta"))
    monkeypatch.setattr(loading, "LanguageModel", lambda model, *_: model)
    model = load_model(folder)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, wanted)}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_model_loads_inside_inference_mode(checkpoint):
    with torch.inference_mode():
        lm = load_model(checkpoint)
    assert bool(torch.isfinite(attribute(lm, ["9 8 7"], ["6"], steps=2).scores).all())


ADAPTER = r"holds an adapter \(adapter_config.json\).*merge it first"


@pytest.mark.parametrize(
    "files, said",
    [
        ([], "model_type.* in its config.json"),
        (["config.json", "pytorch_model.bin"], "only safetensors weights are read"),
        (["adapter_config.json"], ADAPTER),
    ],
)
def test_a_folder_that_is_no_model_says_what_would_be(tmp_path, files, said):
    for name in files:
        (tmp_path / name).write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=said):
        load_model(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_not_called_missing(tmp_path):
    save_checkpoint(tmp_path, "llama2")
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="its tokenizer is missing"):
        load_model(str(tmp_path))


def test_names_that_lead_nowhere_say_what_would(tmp_path, monkeypatch):
    """With peft an adapter would be loaded, without it overlooked: two models of one name."""
    tuned = "some-one/tuned"
    monkeypatch.setattr(loading, "cached_file", lambda source, *_, **__: source == tuned)
    for name, message in {
        "demo/gpt5": "no bundled model 'demo/gpt5'.*demo/gpt2, demo/llama2, demo/llama3",
        str(tmp_path / "gated-401"): "it is neither a local folder nor",
        tuned: f"{tuned} {ADAPTER}",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_model(name, device="cpu")


@pytest.mark.parametrize("model_type", ["llama", "of-its-own"])
def test_code_in_a_checkpoint_is_never_run(tmp_path, model_type):
    folder, sentinel = tmp_path / "model", tmp_path / "was-run"
    save_checkpoint(folder, "llama2")
    (folder / "modeling_own.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass Own: pass\n")
    own = "modeling_own.Own"
    classes = {"AutoConfig": own, "AutoModelForCausalLM": own}
    for name, part in (
        ("config.json", {"model_type": model_type, "auto_map": classes}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [own, own]}}),
    ):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **part}))
    known = model_type == "llama"  # transformers has this kind itself
    with nullcontext() if known else pytest.raises(ValueError, match="could not load model"):
        assert load_model(str(folder)).num_layers == 3
    assert not sentinel.exists()


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1000])


def without_a_tensor(path):
    """Transformers itself fills a missing tensor with random numbers and only warns."""
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def with_a_tensor(name):
    def spoil(path):
        tensors = load_file(path) | {name: torch.ones(4)}
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def test_weights_of_what_the_model_does_not_have_are_no_matter(tmp_path):
    save_checkpoint(tmp_path, "llama2")
    with_a_tensor("model.layers.0.self_attn.rotary_emb.inv_freq")(tmp_path / "model.safetensors")
    with_a_tensor("mtp.layers.0.weight")(tmp_path / "model.safetensors")
    load_model(str(tmp_path))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (with_a_tensor("model.layers.0.mlp.down_proj.bias"), "without .*0.mlp.down_proj.bias"),
        (with_a_tensor("model.layers.1.mlp.up_proj.lora_A.weight"), "without .*up_proj.lora_A"),
        (with_a_tensor("model.layers.12.mlp.up_proj.weight"), "without .*layers.12.mlp.up_proj"),
        (cut_short, "could not load model"),
        (without_a_tensor, "incomplete.*model.layers.1.mlp.down_proj.weight"),
    ],
)
def test_weights_that_do_not_fill_the_model_are_refused(tmp_path, spoil, said):
    save_checkpoint(tmp_path, "llama2")
    spoil(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=said):
        load_model(str(tmp_path))


# --- attention ------------------------------------------------------------------------------------
def test_attention_that_gets_no_mask_of_its_window_is_refused_by_name():
    """Such as flash attention's, which takes the window as a number: a token that is replayed alone
    has no number of tokens before it."""
    AttentionInterface.register("windowed", attention.exact_attention)
    AttentionMaskInterface.register("windowed", lambda *_, **__: None)
    model = tiny_model("mistral", torch.float32)
    lm = load(model)
    model.set_attn_implementation("windowed")
    with pytest.raises(ValueError, match="the-model runs with attn_implementation='windowed'"):
        answer_probability(lm, ["w1 w2"], ["w3"])
    with pytest.raises(ValueError, match='use "sdpa" or "eager"'):
        load(model)
    model.set_attn_implementation("eager")
    assert 0 < answer_probability(lm, ["w1 w2"], ["w3"]) < 1


# --- fingerprints ---------------------------------------------------------------------------------
def one_weight(lm):
    weight = lm.downs[2].weight.view(-1)
    weight[17] = torch.nextafter(weight[17], torch.tensor(9.0))


def through_data(lm):
    """As `weight[...] = ...` is often written; torch does not count it as a write."""
    lm.downs[1].weight.data[3] = 0


def configuration(lm):
    lm.model.config.rms_norm_eps *= 2


def tokenizer(lm):
    lm.tokenizer = word_tokenizer()


def pad_token(lm):
    lm.tokenizer.pad_token = lm.tokenizer.convert_ids_to_tokens(7)


def mask_token(lm):
    lm.tokenizer.mask_token = lm.tokenizer.convert_ids_to_tokens(8)


def no_bos(lm):
    lm.tokenizer.add_bos_token = False


def after_a_text(lm):
    lm.tokenizer = word_tokenizer(bos=True, eos_after=True)
    lm.tokenizer.eos_token = "<mask>"


CHANGES = (
    one_weight,
    through_data,
    configuration,
    tokenizer,
    no_bos,
    pad_token,
    mask_token,
    after_a_text,
)


def test_a_fingerprint_tells_models_apart_by_what_a_result_depends_on(checkpoint, tmp_path):
    lm = load_model(checkpoint)
    own = lm.fingerprint
    twin = save_checkpoint(tmp_path / "copy", "llama3", word_tokenizer(bos=True))
    assert own == load_model(checkpoint).fingerprint == load_model(twin).fingerprint
    found = {own, load_model(checkpoint, dtype="float64").fingerprint}
    with edit_weights(lm, {(0, 3)}, "erase"):
        found.add(lm.fingerprint)
    assert lm.fingerprint == own
    for change in CHANGES:
        lm = load_model(checkpoint)
        assert lm.fingerprint == own
        change(lm)
        found.add(lm.fingerprint)
    assert len(found) == 3 + len(CHANGES)


def test_the_vocabulary_of_a_tokenizer_in_python_is_part_of_the_fingerprint(tmp_path):
    lm = tiny_lm("llama3")
    prints = []
    for place, words in enumerate((["<unk>", "1</w>", "2</w>"], ["<unk>", "2</w>", "1</w>"])):
        folder = tmp_path / f"{place}"
        folder.mkdir()
        vocabulary = {word: i for i, word in enumerate(words)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version\n")
        lm.tokenizer = CTRLTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt")
        prints.append(lm.fingerprint)
    assert len(set(prints)) == 2


# --- a model in half precision is checked in float32 ----------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("stop", [None, KeyboardInterrupt])
def test_inside_the_check_one_layer_at_a_time_is_float32_and_afterwards_none(stop):
    lm, seen, ids = tiny_lm("llama3", torch.bfloat16), [], torch.tensor([[5, 6, 7]])
    before = {k: (one.clone(), one.data_ptr()) for k, one in lm.model.state_dict().items()}
    wanted = copy.deepcopy(lm.model).double()(ids).logits

    def look(*_):
        seen.append([down.weight.dtype for down in lm.downs].count(torch.float32))
        if stop:
            raise stop

    with pytest.raises(stop) if stop else nullcontext(), sharply(lm) as tolerance:
        with hooked(lm.downs[1].register_forward_hook(look)):
            logits = lm.model(ids).logits
        assert tolerance < 1e-3 and logits.dtype == torch.float32
        assert (logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert seen == [1] and lm.model(ids).logits.dtype == torch.bfloat16
    for name, tensor in lm.model.state_dict().items():
        assert torch.equal(tensor, before[name][0]) and tensor.data_ptr() == before[name][1]


# --- faster modules in place of the model's own ---------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", "llama3 qwen3 olmo2 phi3 mistral gemma gemma2 gemma3".split())
def test_torch_s_rms_norm_stands_in_for_norms_that_compute_the_same_and_for_no_other(family, dtype):
    """And the logits are as near to those of float64 as the model's own, which round once more."""
    model, exact, ids = tiny_model(family, dtype), tiny_model(family), torch.arange(40).view(8, 5)
    exact.load_state_dict(model.state_dict())
    before, wanted = model(ids).logits, exact(ids).logits
    arch.use_fused_modules(model, norms=True)
    norms = [one for one in model.modules() if type(one).__name__.endswith("RMSNorm")]
    fused = not family.startswith("gemma")  # whose norms multiply by 1 + w
    assert norms and {isinstance(norm, nn.RMSNorm) for norm in norms} == {fused}
    assert (model(ids).logits - wanted).norm() <= 1.2 * (before - wanted).norm()


def test_norms_that_others_changed_stay():
    model = tiny_model("llama3", torch.float32)
    hooked_one, replaced, plain = norms = [layer.input_layernorm for layer in model.model.layers]
    hooked_one.register_forward_hook(lambda *_: None)
    replaced.forward = replaced.forward
    arch.use_fused_modules(model, norms=True)
    after = [layer.input_layernorm for layer in model.model.layers]
    assert after[:2] == norms[:2] and after[2] is not plain
