"""Small random models of every family, word tokenizers for them, and a small dataset in ParaRel's
layout.

The place of each family's MLP is written down here, on purpose not taken from
`qlutils.model.architecture`.
"""

import ast
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qlutils import paths
from qlutils.driver import running
from qlutils.model.language_model import LanguageModel

VOCABULARY = 97
SPECIAL = ("<eos>", "<bos>", "<unk>", "<mask>")
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
)
GPT = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64)
GROUPED = dict(SMALL, num_key_value_heads=2)
WINDOW = dict(GROUPED, sliding_window=3)  # shorter than the prompts of the tests
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)


@dataclass(frozen=True)
class Family:
    """`down`, `up`: dotted paths, with {} for the layer, of the MLP's last and first (or gate)
    projection."""

    config: str
    options: dict = field(hash=False)
    layer: str = "model.layers.{}"
    down: str = "mlp.down_proj"
    up: str = "mlp.gate_proj"

    def modules(self, model, which):
        count = model.config.get_text_config().num_hidden_layers
        return [
            model.get_submodule(f"{self.layer.format(i)}.{getattr(self, which)}")
            for i in range(count)
        ]


def sized(width, layers, heads, **more):
    """The sizes of SMALL under other names."""
    return {"vocab_size": VOCABULARY, width: 32, layers: 3, heads: 4, **more}


def _gpt(config, down, up, options, layer="transformer.h.{}"):
    return Family(config, options, layer, f"mlp.{down}", f"mlp.{up}")


def _neox(config, options, layer="transformer.h.{}"):
    return _gpt(config, "dense_4h_to_h", "dense_h_to_4h", options, layer)


def _opt(**options):
    sizes = sized("hidden_size", "num_hidden_layers", "num_attention_heads", ffn_dim=48)
    options = {**sizes, "max_position_embeddings": 64, **options}
    return Family("OPTConfig", options, "model.decoder.layers.{}", "fc2", "fc1")


GPT_NEO = sized("hidden_size", "num_layers", "num_heads", max_position_embeddings=64, window_size=3)
GPT_NEO |= dict(num_layers=2, attention_types=[[["global", "local"], 1]])
FALCON = sized("hidden_size", "num_hidden_layers", "num_attention_heads")
CAPPED = dict(WINDOW, head_dim=8, layer_types=ALTERNATING)
SCALED = dict(SMALL, logits_scaling=3.0, residual_multiplier=0.5)
GEMMA_4 = dict(WINDOW, head_dim=8, global_head_dim=8, num_global_key_value_heads=2)
GEMMA_4 |= dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"])
# each layer has an input of its own, from the token
GEMMA_4 |= dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY)
GEMMA_4 |= dict(num_kv_shared_layers=0, use_double_wide_mlp=False)
FAMILIES = {
    "gpt2": _gpt("GPT2Config", "c_proj", "c_fc", GPT),
    "gptj": _gpt("GPTJConfig", "fc_out", "fc_in", dict(GPT, rotary_dim=4)),
    "neox": _neox("GPTNeoXConfig", SMALL, "gpt_neox.layers.{}"),
    "neox-serial": _neox(
        "GPTNeoXConfig", dict(SMALL, use_parallel_residual=False), "gpt_neox.layers.{}"
    ),
    "gpt-neo": _gpt("GPTNeoConfig", "c_proj", "c_fc", GPT_NEO),
    "codegen": _gpt("CodeGenConfig", "fc_out", "fc_in", dict(GPT, rotary_dim=4)),
    "opt": _opt(word_embed_proj_dim=32),
    "opt-350m": _opt(word_embed_proj_dim=16, do_layer_norm_before=False),
    "llama2": Family("LlamaConfig", SMALL),
    "llama3": Family(
        "LlamaConfig", dict(GROUPED, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE)
    ),
    "mistral": Family("MistralConfig", WINDOW),
    "qwen2": Family("Qwen2Config", GROUPED),
    "qwen2-window": Family(
        "Qwen2Config", dict(WINDOW, use_sliding_window=True, layer_types=ALTERNATING)
    ),
    "qwen3": Family("Qwen3Config", dict(GROUPED, head_dim=8)),
    "gemma": Family("GemmaConfig", dict(SMALL, num_key_value_heads=1, head_dim=8)),
    "gemma2": Family(
        "Gemma2Config", dict(CAPPED, attn_logit_softcapping=2.0, final_logit_softcapping=5.0)
    ),
    "gemma3": Family("Gemma3TextConfig", CAPPED),
    "phi": Family("PhiConfig", SMALL, down="mlp.fc2", up="mlp.fc1"),
    "phi3": Family("Phi3Config", dict(SMALL, pad_token_id=0), up="mlp.gate_up_proj"),
    "olmo2": Family("Olmo2Config", SMALL),
    "starcoder2": Family("Starcoder2Config", GROUPED, down="mlp.c_proj", up="mlp.c_fc"),
    "granite": Family(
        "GraniteConfig", dict(SCALED, attention_multiplier=0.7, embedding_multiplier=2.0)
    ),
    "cohere": Family("CohereConfig", dict(SMALL, logit_scale=0.3)),
    "stablelm": Family("StableLmConfig", dict(SMALL, num_key_value_heads=4)),
    "falcon": _neox("FalconConfig", FALCON),
    "falcon-alibi": _neox(
        "FalconConfig", dict(FALCON, alibi=True, multi_query=False, parallel_attn=False)
    ),
    "bloom": _neox("BloomConfig", sized("hidden_size", "n_layer", "n_head")),
    "granite-swa": Family("GraniteSWAConfig", WINDOW),  # attention sinks
    "gemma4": Family("Gemma4TextConfig", GEMMA_4),
}


def spec_of(family) -> Family:
    return family if isinstance(family, Family) else FAMILIES[family]


def tiny_model(family, dtype=torch.float64, seed=0, scale=4.0, **changes):
    """A random model whose attention is far from uniform and whose every parameter, biases and
    norms too, counts.

    `family`: a name of FAMILIES or a `Family`. A smaller `scale` makes a smoother one."""
    torch.manual_seed(seed)
    spec = spec_of(family)
    config = getattr(transformers, spec.config)(**{**spec.options, **changes})
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale).add_(0.025 * scale * torch.randn_like(parameter))
        model.tie_weights()
    return model.to(dtype).eval()


def tiny_lm(family: str, dtype=torch.float64, bos=False, seed=0, **changes):
    return LanguageModel(
        tiny_model(family, dtype, seed, **changes), word_tokenizer(bos=bos), f"tiny-{family}"
    )


def word_tokenizer(words=None, bos=False, eos_after=False, before=(), **special):
    """A tokenizer of whole words, by default the numbers from 4 on, each its own id: "17" is token
    17.

    `bos`, `eos_after`: what it puts around a text; `before`: tokens of SPECIAL that it puts in
    front instead of BOS. `special`: mask_token="<mask>" and the like."""
    words = [str(i) for i in range(len(SPECIAL), VOCABULARY)] if words is None else words
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    before = ["<bos>"] if bos else list(before)
    if before or eos_after:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join([*before, "$A"]) + " <eos>" * eos_after,
            special_tokens=[(token, SPECIAL.index(token)) for token in SPECIAL],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        unk_token="<unk>",
        **({"bos_token": "<bos>"} if bos else {}),
        **special,
    )


def save_checkpoint(
    folder, family="llama3", tokenizer=None, dtype=torch.float32, seed=0, **changes
):
    """A folder that `load_model` reads; returns its name."""
    tiny_model(family, dtype, seed, **changes).save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return str(folder)


# --- a dataset ------------------------------------------------------------------------------------
PATTERNS = {
    "P1": [
        "[X] lives in [Y] .",
        "the home of [X] is [Y] .",
        "[X] has a house in [Y] .",
        "you find [X] in [Y] .",
    ],
    "P2": ["[X] speaks [Y] .", "the language of [X] is [Y] .", "[X] writes in [Y] ."],
}
FACTS = {
    "P1": [("ann", "rome"), ("bob", "oslo"), ("cy", "new york")],
    "P2": [("ann", "latin"), ("dan", "norse")],
}
WORDS = sorted(
    {word for texts in PATTERNS.values() for text in texts for word in text.split()}
    | {word for pairs in FACTS.values() for pair in pairs for text in pair for word in text.split()}
)


def save_dataset(folder, patterns=None, facts=None):
    """PATTERNS and FACTS (or others) as a folder in ParaRel's layout; returns its name."""
    for kind, content, names in (
        ("pattern_data/graphs_json", patterns or PATTERNS, ("pattern",)),
        ("trex_lms_vocab", facts or FACTS, ("sub_label", "obj_label")),
    ):
        (folder / kind).mkdir(parents=True)
        for relation, rows in content.items():
            rows = [row if isinstance(row, tuple) else (row,) for row in rows]
            text = "".join(json.dumps(dict(zip(names, row))) + "\n" for row in rows)
            (folder / kind / f"{relation}.jsonl").write_text(text, encoding="utf-8")
    return str(folder)


def query_row(fact, index, neurons, **more):
    """A row of a `queries` frame: `fact` is "relation|subject|object", `neurons` are its KNs,
    (layer, neuron), which all score 1; `more` replaces columns."""
    relation, subject, obj = fact.split("|")
    row = dict(fact=fact, relation=relation, subject=subject, object=obj, prompt_index=index)
    row |= dict(prompt=f"{subject} {index}", prompt_tokens=3, probability=0.5, known=True)
    row |= dict(layer=[layer for layer, _ in neurons], neuron=[neuron for _, neuron in neurons])
    return row | dict(score=[1.0] * len(neurons)) | more


def trusted(hook):
    """A hook of a test that only watches or fails, passed off as one of the package's own: others
    are refused."""
    hook.__module__ = "qlutils.tests"
    return hook


@contextmanager
def hooked(handle):
    try:
        yield
    finally:
        handle.remove()


def last_activations(lm, prompt):
    """What a plain forward pass sends into each layer's down-projection at the last token,
    (layers, neurons)."""
    seen = []
    watch = trusted(lambda _, inputs: seen.append(inputs[0][0, -1]))
    handles = [down.register_forward_pre_hook(watch) for down in lm.downs]
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([lm.encode_prompt(prompt)]))
    for handle in handles:
        handle.remove()
    return torch.stack(seen).numpy()


@contextmanager
def watched_rows(lm, limit=None):
    """The largest number of rows (of one token) that enter the last decoder layer at once, and, in
    `calls`, how often it is called; above `limit` the memory of this pretended device is full."""
    seen = {"most": 0, "calls": 0}

    def look(_, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        rows = hidden.shape[0] * hidden.shape[1]
        seen["most"], seen["calls"] = max(seen["most"], rows), seen["calls"] + 1
        if limit is not None and rows > limit:
            raise torch.OutOfMemoryError("pretended")

    with hooked(lm.layers[-1].register_forward_pre_hook(trusted(look), with_kwargs=True)):
        yield seen


def readme_table(heading, file="README.md"):
    """The first table after a heading of README.md or another file, as dicts."""
    text = (paths.ROOT / file).read_text("utf-8").split(heading, 1)[1]
    rows = re.search(r"(^\|.*\n)+", text, re.M)[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def write_notebook(folder, name, parameters, *cells):
    """A notebook with a cell of parameters and others, for a kernel that is not there."""
    kernel = {"name": "python3", "display_name": "x", "language": "python"}
    book = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    book.cells = [nbformat.v4.new_code_cell(cell) for cell in (parameters, *cells)]
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, folder / f"{name}.ipynb")


def run_cells(notebook, parameters, display=lambda *_: None):
    """Run a notebook's code here, as papermill would: in order, with `parameters` after its own, in
    place of those that it was run with before. `display` gets what a cell shows."""
    names = {"__name__": "__main__", "display": display}
    for cell in nbformat.read(notebook, as_version=4).cells:
        tags = cell.metadata.get("tags", ())
        if cell.cell_type == "code" and "injected-parameters" not in tags:
            code = ast.parse(cell.source)
            if isinstance(last := code.body[-1], ast.Expr):
                last.value = ast.Call(ast.Name("display", ast.Load()), [last.value], [])
            code = ast.fix_missing_locations(code)
            exec(compile(code, Path(notebook).name, "exec"), names)
        if "parameters" in tags:
            names |= parameters


def without_kernels(patch):
    """From here on the driver runs notebooks in this process: kernels take seconds each."""

    def execute(notebook, output, parameters, env, log, stop=None):
        patch.setattr(paths, "NOTEBOOKS", notebook.parent)
        for name in "COMMAND", "RUNS", "MODELS", "PROGRESS":
            patch.setenv(f"QLUTILS_{name}", str(env[f"QLUTILS_{name}"]))
        try:
            Path(output).unlink(missing_ok=True)
            run_cells(notebook, parameters)
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
        nbformat.write(nbformat.v4.new_notebook(), output)
        return ""

    patch.setattr(running, "execute", execute)
