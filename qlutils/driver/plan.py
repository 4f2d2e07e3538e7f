"""What the localisation would cost, before anything is started: `./run_all.sh --plan ...`.

Tokens are estimated from words. The hours are the arithmetic of attribution over the rate that the
device's matrix products reach now; on a GPU a fixed time a query comes on top.
"""

from typing import NamedTuple

import pandas as pd

import qlutils
from qlutils import paths
from qlutils.driver.jobs import FIRST
from qlutils.facts import prompt_tokens
from qlutils.model import pretrained
from qlutils.study.notebook import Study

# of the matmul rate that attribution reaches, on a CPU and on a GPU; tests/benchmarks measures it
FRACTION = 0.7
# a baseline, and twice that a query, beside the arithmetic: most of what a small model costs a GPU
GPU_SECONDS = 0.25e-3
BATCH_BYTES = 2**31  # activations of a batch on a CPU (attribution.attribute.CPU_MEMORY)
# model types whose MLP has two matrices, not three
UNGATED = "gpt2 gpt_neo gptj codegen gpt_neox opt bloom falcon phi starcoder2".split()
LOCALISATION = """\
Hours in all: {:,.3g} for localisation on one such device; notebooks 03-07 and the report come on \
top. Nothing was started."""
KNOWN = """\
Which facts a model knows, and so how many there are to localise, is not known before it is asked: \
the numbers above are for as many facts as may be kept, and a model may know fewer.
Looking for them takes {:,.3g} hours a model at most, when every fact is asked."""


class Shape(NamedTuple):
    """The sizes of a model; kv: width of the keys / width of the queries."""

    layers: int
    width: int
    neurons: int
    vocabulary: int
    kv: float
    gated: bool

    @property
    def layer_weights(self):
        attention = self.width**2 * (2 + 2 * self.kv)
        return attention + self.width * self.neurons * (3 if self.gated else 2)


# Of the paper's models and of those fetched by name. A head of Gemma 3 is wider than width / heads:
# its share makes the size of the attention come out right.
SHAPES = {
    "gpt2": Shape(12, 768, 3072, 50257, 1.0, False),
    "meta-llama/Llama-2-7b-hf": Shape(32, 4096, 11008, 32000, 1.0, True),
    "meta-llama/Meta-Llama-3-8B": Shape(32, 4096, 14336, 128256, 0.25, True),
    "pretrained/smollm2-135m": Shape(30, 576, 1536, 49152, 1 / 3, True),
    "pretrained/gemma-3-270m": Shape(18, 640, 2048, 262144, 1.0, True),
    "pretrained/qwen2.5-coder-1.5b": Shape(28, 1536, 8960, 151936, 1 / 6, True),
}


def model_shape(name):
    """The shape of a model from its local configuration, or from the table above."""
    local = pretrained.folder if paths.is_gguf_path(name) else paths.model_folder
    folder = local(name)
    if folder.is_dir():
        return _configured_shape(folder)
    if name not in SHAPES:
        raise ValueError(
            f"the shape of {name!r} is not known here: plan with a local folder that holds its "
            f"config.json, a bundled model, or one of {', '.join(SHAPES)}"
        )
    return SHAPES[name]


def _configured_shape(folder):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    layers = config.num_hidden_layers
    width = config.hidden_size
    heads = config.num_attention_heads
    said = config.to_dict().get
    neurons = said("intermediate_size") or said("n_inner") or said("ffn_dim") or 4 * width
    kv = (said("num_key_value_heads") or heads) / heads
    return Shape(layers, width, neurons, config.vocab_size, kv, config.model_type not in UNGATED)


def baselines(method, tokens):
    """How many a prompt has."""
    return tokens if method == "sig" else 1


def query_flops(shape, method, steps, tokens):
    """Floating-point operations of one answer token's attribution: forward and backward of `steps`
    rows a layer (and baseline) through the layers above and the unembedding."""
    rows = steps * baselines(method, tokens)
    through_layers = 4 * shape.layer_weights * rows * shape.layers * (shape.layers + 1) / 2
    return through_layers + 4 * rows * shape.layers * shape.width * shape.vocabulary


def query_seconds(shape, method, steps, tokens, rate, gpu):
    """Seconds of one answer token's attribution on a device of `rate` FLOP/s."""
    fixed = GPU_SECONDS * (2 + baselines(method, tokens)) if gpu else 0.0
    return query_flops(shape, method, steps, tokens) / (FRACTION * rate) + fixed


def matmul_rate(device, dtype, shape):
    """(device name, dtype, FLOP/s) of the device's matmul at this model's MLP shape: best of two
    seconds."""
    import torch
    from torch.utils.benchmark import Timer

    chosen = qlutils.find_device(device)
    cpu = chosen.type == "cpu"
    threads = torch.get_num_threads()
    kind = dtype or ("float32" if cpu else "bfloat16")
    rows = 512 if cpu else 8192
    options = {"device": chosen, "dtype": getattr(torch, kind)}
    a = torch.randn(rows, shape.width, **options)
    b = torch.randn(shape.width, shape.neurons, **options)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=threads)
    seconds = min(timer.blocked_autorange(min_run_time=2).times)
    cuda = chosen.type == "cuda"
    name = torch.cuda.get_device_name(chosen) if cuda else f"{chosen.type}, {threads} threads"
    return name, kind, 2 * rows * shape.width * shape.neurons / seconds


def plan(study, models, methods, spec):
    """A row a model and method: queries, FLOPs, hours on this device, and memory; with
    `known_prompts` for as many facts as may be kept, and the hours of asking every fact."""
    import torch

    facts = study.candidates(study.facts_per_relation)
    asked = study.candidates() if study.known_prompts else []
    prompts = [prompt for fact in facts for prompt in fact.prompts]
    tokens = sum(map(prompt_tokens, prompts)) / len(prompts)
    answers = len(prompts)  # tokens that are attributed
    if spec.answer == "all":
        answers = sum(len(fact.prompts) * prompt_tokens(fact.object) for fact in facts)
    scanned = sum(prompt_tokens(f"{prompt} {f.object}") for f in asked for prompt in f.prompts)
    rows = []
    for model in models:
        shape = model_shape(model)
        name, kind, rate = matmul_rate(study.device, study.dtype, shape)
        reached = FRACTION * rate
        gpu = not name.startswith("cpu")
        weights = shape.layers * shape.layer_weights + 2 * shape.vocabulary * shape.width
        for method in methods:
            work = shape, method, spec.steps, tokens
            rows.append(
                {
                    "model": model,
                    "method": method,
                    "facts": len(facts),
                    "queries": len(prompts),
                    "PFLOP": query_flops(*work) * answers / 1e15,
                    "device": name,
                    "dtype": kind,
                    "TFLOP/s": reached / 1e12,
                    "hours": query_seconds(*work, rate, gpu) * answers / 3600,
                    "scan hours": 2 * weights * scanned / reached / 3600,
                    "memory GB": (weights * getattr(torch, kind).itemsize + BATCH_BYTES) / 1e9,
                }
            )
    table = pd.DataFrame(rows)
    return table if asked else table.drop(columns="scan hours")


def print_plan(args, jobs):
    """Print what notebook 01 of these jobs would cost. Returns the exit status, 0."""
    first = [job for job in jobs if job.is_of(FIRST)]
    if not first:
        raise ValueError("--plan: with these options nothing is localised")
    study = Study(FIRST, **first[0].parameters)
    chosen = study.parameters.keys() & {"steps", "rule", "answer", "site", "amig_factor"}
    spec = qlutils.Spec(**{name: study.parameters[name] for name in chosen})  # or ValueError
    models = dict.fromkeys(args.models)
    methods = dict.fromkeys(args.methods)
    costs = plan(study, models, methods, spec)

    def digits(number):
        return f"{number:,.3g}" if number < 1e4 else f"{number:,.0f}"

    print(costs.to_string(index=False, float_format=digits))
    print(LOCALISATION.format(costs["hours"].sum()))
    if study.known_prompts:
        print(KNOWN.format(costs["scan hours"].max()))
    return 0
