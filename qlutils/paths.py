"""Every path of the project comes from here. `QLUTILS_RUNS` moves all results elsewhere."""

import hashlib
import json
import os
import re
from pathlib import Path

import pooch

PACKAGE = Path(__file__).resolve().parent
# The checkout; where the package was installed without one, the folder the user works in.
ROOT = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else Path.cwd()
RUNS = Path(os.environ.get("QLUTILS_RUNS") or ROOT / "runs").absolute()
NOTEBOOKS = ROOT / "notebooks"
FIGURES = ROOT / "figures"
DEMO = PACKAGE / "demo"  # bundled facts, text and models
BUNDLED = ("demo/gpt2", "demo/llama2", "demo/llama3")
COMPARES = "02"  # the notebook that compares methods: its results stand in a model's folder `all`


def packaged(name):
    """The text of a file that lies in the package."""
    return (PACKAGE / name).read_text("utf-8")


def run_folder(output):
    """Folder of one run: `RUNS/<output>`. ValueError unless `output` is one plain folder name."""
    if not isinstance(output, str) or not re.fullmatch(r"\w[\w.-]*", output):
        raise ValueError(
            f"output {output!r}: want one folder name of letters, digits, '.', '_' and '-'"
        )
    return RUNS / output


def results_folder(root, model, method=None):
    """Where a run keeps results of a model and method; "all" where a notebook compares methods."""
    folder = root / "results"
    return folder / slug(model) / (method or "all") if model is not None else folder


def figures_folder(output):
    """Where a named run's tables and figures are copied: `figures/<output>`, beside `runs`."""
    return RUNS.parent / "figures" / run_folder(output).name


def cache():
    """Where downloads are kept: QLUTILS_CACHE, or the user's cache."""
    folder = os.environ.get("QLUTILS_CACHE") or pooch.os_cache("qlutils")
    return Path(folder).expanduser().absolute()


def is_gguf_path(model):
    """Whether a model's name is the path of a GGUF file, there or not."""
    return str(model).lower().endswith(".gguf")


def is_local(model):
    """Whether a model's name means a folder or a GGUF file of this machine."""
    name = str(model)
    if name.startswith(("demo/", "pretrained/")) or "\0" in name:
        return False
    where = os.path.expanduser(name)  # `os.path` says False where `Path` raises: no path at all
    return os.path.isdir(where) or (is_gguf_path(name) and os.path.isfile(where))


def model_folder(model):
    """The folder that a model's name means, there or not: of a bundled one, or the name itself."""
    if model.startswith("demo/"):
        return DEMO / "models" / model.removeprefix("demo/")
    return Path(os.path.expanduser(model))


def slug(model):
    """Folder name of a model: `demo/gpt2` -> `demo--gpt2`; a local one gets its name and a hash."""
    if not isinstance(model, str) or not model.strip():
        raise ValueError(f"model {model!r}: want a bundled name, a Hugging Face id or a folder")
    name = model
    if is_local(model):
        where = Path(model).expanduser().resolve()
        name = f"{where.name[:40]}-{hashlib.sha256(os.fsencode(where)).hexdigest()[:8]}"
    return re.sub(r"[^\w.-]", "_", name.replace("/", "--")).lstrip(".") or "_"


def job_name(notebook, model, method):
    """Of an executed notebook and its stamp, without suffix."""
    return "--".join(filter(None, [notebook, model and slug(model), method]))


def stamp_file(root, name):
    """What says of which inputs a job's results are, see `driver.stamps`."""
    return root / "notebooks" / f"{name}.json"


def label(model, among=None):
    """Name of a model in tables and figures.

    Of a local folder or file the end of its path, as much of it as no other of `among` ends with;
    of any other model its own name. among: the run's models, by default those in QLUTILS_MODELS,
    where the driver puts them.
    """
    if not (os.path.isabs(model) or is_local(model)):
        return model
    if among is None:
        among = json.loads(os.environ.get("QLUTILS_MODELS") or "[]")
    own = Path(model).parts
    others = {Path(other).parts for other in among} - {own}
    for length in range(1, len(own) + 1):
        if own[-length:] not in {other[-length:] for other in others}:
            return str(Path(*own[-length:]))
    return model
