"""What a finished job leaves: what it was made from and the files it made, runs/.../NAME.json.

A job is done when its stamp holds its present inputs and its files are there.
"""

import json
import os

from qlutils.facts import text_file
from qlutils.files import sha256, write_json
from qlutils.paths import stamp_file
from qlutils.study import identity


def inputs_of(job, root, facts):
    """What a job's results are made from; `facts` is the hash of the run's."""
    corpus = job.parameters.get("corpus", "")
    own_text = os.path.isabs(corpus)  # the others have a name that never changes its meaning
    return {
        "notebook": cells_hash(json.loads(job.notebook.read_bytes())["cells"]),
        "parameters": job.parameters,
        "code": identity.code_versions(),
        "data": facts,
        "model": job.model and identity.model_content(job.model),
        "shown": job.shown,
        "corpus": sha256(text_file(corpus).read_bytes()) if own_text else None,
        "needs": {need: sha256(read_stamp(root, need).get("inputs")) for need in job.needs},
    }


def read_stamp(root, name):
    """A job's stamp; {} where there is none, or half of one."""
    try:
        return json.loads(stamp_file(root, name).read_bytes())
    except (OSError, ValueError):
        return {}


def write_stamp(root, name, inputs, files):
    """Say which files a job made from its inputs."""
    outputs = [file.relative_to(root).as_posix() for file in files]
    write_json(stamp_file(root, name), {"inputs": inputs, "outputs": outputs})


def is_done(root, name, inputs):
    """Whether a job need not run."""
    stamp = read_stamp(root, name)
    agree = sha256(stamp.get("inputs")) == sha256(inputs)
    return agree and all((root / output).exists() for output in stamp["outputs"])


def cells_hash(cells):
    """A hash of a notebook's cells; of its outputs nothing depends."""
    sources = [
        [cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])]
        for cell in cells
    ]
    return sha256(sources)
