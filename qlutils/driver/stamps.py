"""What a finished job leaves: what it was made from and the files it made, runs/.../NAME.json.

A job is done when its stamp holds its present inputs and its files are as it left them.
"""

import json
import os
from pathlib import Path

from qlutils.files import file_hash, sha256, write_json
from qlutils.study import identity


def inputs_of(job, root, facts):
    """What a job's results are made from; `facts` is the hash of the run's."""
    corpus = job.parameters.get("corpus")
    return {
        "notebook": cells_hash(json.loads(job.notebook.read_bytes())["cells"]),
        "parameters": job.parameters,
        "code": identity.code_versions(),
        "data": facts,
        "model": job.model and identity.model_content(job.model),
        "shown": job.shown,
        "corpus": _text(corpus) if isinstance(corpus, str) else None,
        "needs": {need: sha256(read_stamp(root, need).get("inputs")) for need in job.needs},
    }


def path_of(root, name):
    """The stamp of a job."""
    return root / "notebooks" / f"{name}.json"


def read_stamp(root, name):
    """A job's stamp; {} where there is none, or half of one."""
    try:
        stamp = json.loads(path_of(root, name).read_bytes())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(root, name, inputs, files):
    """Vouch for the files that a job made from its inputs."""
    outputs = {file.relative_to(root).as_posix(): file_hash(file) for file in files}
    write_json(path_of(root, name), {"inputs": inputs, "outputs": outputs})


def is_done(root, name, inputs):
    """Whether a job need not run."""
    stamp = read_stamp(root, name)
    outputs = stamp.get("outputs")
    if not isinstance(outputs, dict) or sha256(stamp.get("inputs")) != sha256(inputs):
        return False
    try:
        return all(file_hash(root / output) == made for output, made in outputs.items())
    except OSError:  # one is gone
        return False


def cells_hash(cells):
    """A hash of a notebook's cells; of its outputs nothing depends."""
    sources = []
    for cell in cells:
        tags = cell["metadata"].get("tags", [])
        sources.append([cell["cell_type"], "".join(cell["source"]), tags])
    return sha256(sources)


def _text(corpus):
    """A hash of a text of one's own for perplexity; None for those that have a name."""
    path = Path(corpus)
    path = path / "test.txt" if os.path.isdir(path) else path
    return sha256(path.read_bytes()) if os.path.isfile(path) else None
