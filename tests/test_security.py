"""What a checkpoint, a data set, a parameter or a neighbour on the network cannot do.

Code in a checkpoint and wrong checksums are also in model/test_models.py and test_facts.py; what is
here is the rest: nothing in the project could unpickle or evaluate, no text is a path out of the
run's folder, nothing listens beyond this machine.
"""

import ast
import ipaddress
import json
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import nbformat
import pandas as pd
import papermill.parameterize
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jupyter_client.manager import start_new_kernel
from jupyter_server.serverapp import ServerApp
from matplotlib.figure import Figure
from safetensors.torch import load_file
from tiny import WORDS, save_checkpoint, save_dataset, word_tokenizer, write_notebook

from qlutils import facts as data
from qlutils import load_model, paths, run
from qlutils.driver.execute import kernel_environment
from qlutils.driver.jobs import Job, literal
from qlutils.experiments.localize import localise
from qlutils.paths import ROOT
from qlutils.show.plots import save_figure
from qlutils.show.tables import write_table
from qlutils.study.notebook import Study
from qlutils.study.parameters import check_given, declared_parameters

# --- nothing in the project evaluates, unpickles or trusts ----------------------------------------
UNPICKLING = set("pickle cPickle _pickle dill cloudpickle joblib shelve marshal jsonpickle".split())
FORBIDDEN = set(  # as whole names: `model.eval()` is another
    """eval exec compile __import__ input breakpoint os.system os.popen os.execv torch.load
    yaml.load yaml.unsafe_load np.fromfile subprocess.getoutput pty.spawn torch.hub.load ctypes.CDLL
    importlib.reload runpy.run_path""".split()
)
ENDINGS = ("to_pickle", "read_pickle", "import_module")
ALLOWED = {("qlutils/__init__.py", "import_module")}  # the package's own modules


def dangers(source, where="<text>"):
    """What of the above a Python source does, as texts."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in UNPICKLING)
        if not isinstance(node, ast.Call) or (where, ast.unparse(node.func)) in ALLOWED:
            continue
        name, options = ast.unparse(node.func), {one.arg: one.value for one in node.keywords}
        values = {option: getattr(value, "value", "?") for option, value in options.items()}
        if name in FORBIDDEN or name.endswith(ENDINGS):
            yield f"calls {name}"
        for option in ("shell", "allow_pickle", "trust_remote_code"):
            if values.get(option, False) is not False:
                yield f"{option} is not False in {name}"
        if name.endswith(".from_pretrained"):
            if "trust_remote_code" not in options:
                yield f"{name} without trust_remote_code=False"
            reads_weights = "Tokenizer" not in name and "AutoConfig" not in name
            if reads_weights and values.get("use_safetensors") is not True:
                yield f"{name} without use_safetensors=True"


def sources():
    """(name, Python source) of the package, the notebooks' code cells, and the Python inside
    run_all.sh."""
    for file in sorted((ROOT / "qlutils").rglob("*.py")):
        yield file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(file, as_version=4).cells:
            if cell.cell_type == "code":  # a magic or a shell line is no Python
                yield file.name, cell.source
    for program in re.findall(r"-c '([^']*)'", (ROOT / "run_all.sh").read_text(encoding="utf-8")):
        yield "run_all.sh", program


def test_no_source_unpickles_evaluates_starts_a_shell_or_trusts_remote_code():
    found = [(name, danger) for name, source in sources() for danger in dangers(source, name)]
    assert not found and len(list(sources())) > 100
    assert any("from_pretrained(" in source for _, source in sources())


HARMFUL = """\
from joblib import load
eval('1')
np.load(path, allow_pickle=flag)
subprocess.run('ls', shell=True)
frames[0].to_pickle(path)
AutoModel.from_pretrained(name, use_safetensors=True)
AutoModel.from_pretrained(name, trust_remote_code=False)
AutoTokenizer.from_pretrained(name, trust_remote_code=True)"""
HARMLESS = """\
load(name).eval()
ast.literal_eval(text)
AutoModel.from_pretrained(n, use_safetensors=True, trust_remote_code=False)
subprocess.run(['ls'], shell=False)"""


def test_the_scan_finds_what_it_looks_for_and_passes_what_is_harmless():
    assert [line for line in HARMFUL.splitlines() if not list(dangers(line))] == []
    assert list(dangers(HARMLESS)) == []


def test_the_script_evaluates_and_downloads_nothing_itself():
    text = (ROOT / "run_all.sh").read_text(encoding="utf-8")
    lines = [line.split(" #")[0] for line in text.splitlines()]
    code = "\n".join(re.sub(r'"(\\.|[^"\\])*"', '""', line) for line in lines)
    assert not re.search(r"\b(eval|source|curl|wget|sudo)\b|\|\s*(ba)?sh\b", code)
    assert "set -euo pipefail" in text
    assert "--index-url" not in text and "--trusted-host" not in text


# --- checkpoints ----------------------------------------------------------------------------------
@pytest.fixture
def no_unpickling(monkeypatch):
    for module, name in ((torch, "load"), *((pickle, f) for f in ("load", "loads", "Unpickler"))):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("something was unpickled"))


PICKLES = """pytorch_model.bin training_args.bin optimizer.pt scheduler.pt rng_state.pth
tokenizer.pkl model.pkl adapter_model.bin vocab.bin""".split()


def test_pickles_beside_the_weights_are_not_opened(tmp_path, no_unpickling):
    name = save_checkpoint(tmp_path, "gpt2")
    for file in PICKLES:
        (tmp_path / file).write_bytes(b"csys\nexit\n(tR.")  # unpickled, it ends the test
    assert load_model(name, device="cpu").num_layers == 3


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../outside.safetensors", "model"])
def test_an_index_cannot_lead_from_safetensors_to_a_pickle(tmp_path, shard, no_unpickling):
    """The weights in it are good ones: it is refused for being a pickle, or elsewhere."""
    folder = tmp_path / "model"
    save_checkpoint(folder, "gpt2")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    torch.save(weights, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: shard for name in weights}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    said = rf"model.safetensors.index.json.*{shard}.*only safetensors"
    with pytest.raises(ValueError, match=said):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    "key, value",
    [
        ("attn_implementation", "some-one/some-kernel"),
        ("_attn_implementation", "some-one/some-kernel"),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("architectures", ["os.system"]),
        ("torch_dtype", "__import__('os')"),
        ("model_type", "../../evil"),
    ],
)
def test_a_configuration_cannot_make_the_loader_fetch_or_run_anything(
    tmp_path, key, value, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = save_checkpoint(tmp_path, "llama2")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    tried = []
    monkeypatch.setattr(socket.socket, "connect", lambda *given: tried.append(given) or 1 / 0)
    before = set(sys.modules)
    try:
        lm = load_model(name, device="cpu")
    except ValueError as error:
        assert "model" in str(error)
    else:
        assert lm.num_layers == 3 and "/" not in lm.model.config._attn_implementation
    assert not tried
    assert not any("kernels" == name.split(".")[0] for name in set(sys.modules) - before)


# --- downloads ------------------------------------------------------------------------------------
def test_every_file_that_is_downloaded_is_pinned_and_has_a_checksum(monkeypatch):
    registry = data.pararel_registry()
    assert registry and all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in registry.values())
    kinds = r"(pattern_data/graphs_json|trex_lms_vocab)/P\d+\.jsonl"
    assert all(re.fullmatch(kinds, name) for name in registry)
    assert re.match(r"https://.*/[0-9a-f]{40}/", data.PARAREL_URL)
    asked = {}

    def download(*args, **options):
        asked.update(options)
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ValueError, match="go online once"):
        data.perplexity_texts("wikitext-2")
    assert re.fullmatch(r"[0-9a-f]{40}", asked["revision"]) and asked["repo_type"] == "dataset"


def test_only_the_loaders_of_facts_texts_and_models_download():
    """Others may name a place to read about, never to fetch from."""
    fetching = (
        r"\b(urlopen|urlretrieve|requests\.get|httpx\.get|hf_hub_download|snapshot_download|"
        r"pooch\.create|pooch\.retrieve)\("
    )
    found = {name for name, source in sources() if re.search(fetching, source)}
    assert found == {"qlutils/facts.py", "qlutils/model/loading.py"}


# --- parameters -----------------------------------------------------------------------------------
EVIL = "'\"\"\"\n'''\\'\nimport os; os.system('touch was-run')\n#"
INJECTED = [EVIL, [EVIL, {EVIL: EVIL}], "\\\" + __import__('os').getcwd() + \\\"", "\r\nexit()\r"]
INJECTED += ["\u2028import os\u2029", "{x}{x.__class__}%(x)s", None, True, -1e-300, 10**30]


@pytest.mark.parametrize("value", INJECTED, ids=ascii)
def test_what_is_injected_into_a_notebook_is_the_value_and_no_code(value, tmp_path):
    write_notebook(tmp_path, "x", "x = 0.2")
    book = nbformat.read(tmp_path / "x.ipynb", as_version=4)
    book.metadata["papermill"] = {}
    made = papermill.parameterize.parameterize_notebook(book, {"x": value})
    [cell] = [cell for cell in made.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    [line] = ast.parse(cell.source).body
    assert ast.literal_eval(line.value) == value


CODE = """\
t = __import__('os').system('touch was-run')
t = [open('was-run', 'w') for _ in 'a']
import os; t = 0.2
t = 0.2; open('was-run', 'w')
def t(): pass
t = f'{open("was-run", "w")}'
t: float = open('was-run', 'w')
t = s = 0.2
t.x = 1
t, s = 1, 2
t = float('nan')
t = """.split("\n")


@pytest.mark.parametrize("source", CODE)
def test_a_parameter_that_is_code_is_refused_and_never_run(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_notebook(tmp_path, "01", source)
    with pytest.raises(ValueError, match="must hold nothing but lines `name = literal value`"):
        declared_parameters("01.ipynb")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("name", ["t; import os", "t\nimport os", "__class__", "t"])
@pytest.mark.parametrize("value", ["__import__('os').system('touch was-run')", "[].__class__"])
def test_the_driver_passes_on_no_code(name, value, tmp_path, monkeypatch, runs, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):
        check_given({name: literal(value)}, {"t": 0.2})
    assert run.main(["--models", "demo/gpt2", "--relations", "P36", "-p", name, value]) == 2
    assert "was-run" not in os.listdir(tmp_path) and "run_all.sh: " in capsys.readouterr().err


# --- paths ----------------------------------------------------------------------------------------
LEADING_OUT = (
    r".. . / ../.. a/../../b /etc/passwd ~ ~root C:\x \\host\share ..\.. con ．．／".split()
)
LEADING_OUT += ["..%2f..", "a\0b", "\u202e..", "a" * 200]
NAMES = st.one_of(
    st.text(max_size=30), st.text("./\\~\0:* aä\n", max_size=12), st.sampled_from(LEADING_OUT)
)
FIXED = dict(max_examples=60, deadline=None, derandomize=True, database=None)


@settings(**FIXED, suppress_health_check=list(HealthCheck))
@given(name=NAMES)
def test_no_name_is_a_path_out_of_the_run(name):
    inner = paths.RUNS / "run"
    for inside, make in (
        (paths.RUNS, lambda: paths.run_folder(name)),
        (inner, lambda: inner / f"{Job(Path('01_localize'), name, 'ig', {}).name}.ipynb"),
        (inner, lambda: Study("01", model=name, method="ig", output="run").results),
    ):
        try:
            place = make()
        except ValueError as error:
            assert "model" in str(error) or "output" in str(error)
            continue
        assert Path(os.path.normpath(place)) == place and inside in place.parents
        assert "\0" not in str(place) and place.resolve().is_relative_to(paths.RUNS.resolve())


@pytest.mark.parametrize("stem", ["", *LEADING_OUT], ids=ascii)
def test_no_stem_of_a_table_or_figure_is_a_path_out_of_its_folder(stem, tmp_path):
    folder, frame = tmp_path / "results", pd.DataFrame({"a": [1]})
    write = lambda: write_table(frame, stem, folder)  # noqa: E731
    draw = lambda: save_figure(Figure(), stem, folder, frame)  # noqa: E731
    for make in (write, draw):
        try:
            written = make()
        except ValueError as error:
            assert "stem" in str(error)
        else:
            assert all(path.resolve().parent == folder.resolve() for path in written.values())
            assert re.fullmatch(r"[\w.-]+", stem)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["results"])


def test_a_run_on_a_data_set_of_hostile_names_writes_in_its_own_folder_only(
    tmp_path, runs, monkeypatch
):
    evil = {
        "..": "../../outside",
        "P1 ; touch was-run": "$(touch was-run)",
        "~": "/etc/outside",
        "..P2": "`touch was-run`",
    }
    asked = ["[X] lives in [Y] .", "[X] has a house in [Y] .", "the home of [X] is [Y] ."]
    facts = {name: [(subject, "rome")] for name, subject in evil.items()}
    monkeypatch.chdir(tmp_path)
    folder = save_dataset(tmp_path / "data", dict.fromkeys(evil, asked), facts)
    model = save_checkpoint(tmp_path / "model ..", "gpt2", word_tokenizer([*WORDS, *evil.values()]))
    before = set(tmp_path.rglob("*"))
    given = dict(model=model, method="ig", data=folder, device="cpu", output="safe..name")
    study = Study("01_localize", **given)
    queries = localise(study, steps=2)
    study.table(queries[["fact", "prompt"]], "t")
    study.record()
    assert set(queries["relation"]) == set(evil)
    made = set(tmp_path.rglob("*")) - before - {runs}
    assert made and all(path.is_relative_to(runs / "safe..name") for path in made)
    assert all(path.resolve().is_relative_to(runs) for path in made)


# --- the network ----------------------------------------------------------------------------------
def listening(pid):
    """Addresses on which a process and its children wait for connections."""
    process, found = psutil.Process(pid), []
    for one in [process, *process.children(recursive=True)]:
        found += one.net_connections(kind="inet")
    return {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}


def beyond_this_machine(addresses):
    return {ip for ip in addresses if not ipaddress.ip_address(ip).is_loopback}


def test_the_check_sees_a_socket_that_is_open_to_the_network():
    with socket.create_server(("0.0.0.0", 0)):
        assert beyond_this_machine(listening(os.getpid())) == {"0.0.0.0"}


CLUSTER = """
import sys
from distributed import Client
from qlutils.driver.cluster import scheduler
if __name__ == "__main__":
    with scheduler(1, None) as address, Client(address, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=60)
        print(address, flush=True)
        sys.stdin.read()
"""


def test_a_local_cluster_listens_on_this_machine_only(tmp_path):
    """In a process of its own: scheduler, nanny and worker, with their web servers."""
    pytest.importorskip("distributed")
    script = tmp_path / "cluster.py"
    script.write_text(CLUSTER)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    piped = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, env=env, **piped)
    try:
        assert child.stdout.readline().startswith("tcp://127.0.0.1:")
        open_at = listening(child.pid)
        assert open_at and not beyond_this_machine(open_at)
    finally:
        child.stdin.close()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def test_a_kernel_listens_on_this_machine_only(tmp_path, monkeypatch):
    for name, value in kernel_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    manager, client = start_new_kernel(kernel_name="qlutils")
    try:
        open_at = listening(manager.provisioner.process.pid)
        assert open_at and not beyond_this_machine(open_at)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_jupyter_is_only_ever_told_to_listen_on_this_machine():
    # what the README's `jupyter lab` does
    assert ServerApp.ip.default_value in ("localhost", "127.0.0.1")
    kinds = ("tests/**/*.py", "qlutils/**/*.py", "*.sh", "*.md", ".ci/*")
    started = 0
    for file in {file for kind in kinds for file in ROOT.glob(kind)} - {Path(__file__)}:
        text = file.read_text(encoding="utf-8")
        for place in re.finditer(r'"jupyter(lab|_server)"|-m jupyter', text):
            command = text[place.start() : place.start() + 300]
            if "--version" not in command[:40]:
                started += 1
                assert "--ip=127.0.0.1" in command, file
        assert not re.search(r"0\.0\.0\.0|--ip[= ]\*|allow_remote_access", text), file
    assert started
