"""What results owe to the code and the model, and whether results are of this run: `differing`."""

import os
import re
from functools import cache
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from qlutils import paths
from qlutils.files import folder_hash, sha256
from qlutils.model import pretrained

# Of what notebooks make of the units: statistics, tables, claims. Raise it when those numbers move.
RESULTS_VERSION = 4


def differing(wanted, made):
    """The names of what a result was made from (`made`) that is not what this run wants."""
    return [name for name, value in wanted.items() if made.get(name) != value]


@cache
def code_versions():
    """{task: its VERSION, ..., "results": RESULTS_VERSION}: what results owe to the code.

    Read from the package's text, so that a notebook that only reads results need not import torch.
    """
    found = {"results": RESULTS_VERSION}
    for file in sorted(paths.PACKAGE.rglob("*.py")):
        text = file.read_text("utf-8")
        for task, number in re.findall(r"(?m)^(\w+)\.VERSION = (\d+)\b", text):
            found[task] = int(number)
    return found


def revision(model):
    """The downloaded commit of a model of the Hugging Face Hub; None for a local model."""
    file = Path(HF_HUB_CACHE, "models--" + str(model).replace("/", "--"), "refs", "main")
    return file.read_text("utf-8") if os.path.isfile(file) else None


def model_content(model):
    """A hash that changes with a local model's files, or with the downloaded revision of a Hub
    model. ValueError for a model that is not there."""
    if pretrained.is_gguf(model):
        return pretrained.content(model)
    folder = paths.model_folder(model)
    if os.path.isfile(folder / "config.json"):  # False, where `Path` raises: it cannot be a path
        return folder_hash(folder)
    hub_id = re.fullmatch(r"(?!demo/)\w[\w.-]*(/\w[\w.-]*)?", model, re.ASCII)
    if os.path.isdir(folder) or not hub_id or len(model) > 96:
        raise ValueError(
            f"there is no model {model!r}; want a folder with config.json, a Hugging Face id, or a "
            f"bundled one: {', '.join(paths.BUNDLED)}"
        )
    return sha256([model, revision(model) or "not downloaded"])
