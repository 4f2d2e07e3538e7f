"""Files of results: frames that one notebook keeps for another, and the record of each notebook."""

import json
import warnings

from qlutils.files import as_frame, json_bytes, read_parquet, sha256, write_json, write_parquet
from qlutils.study.identity import differing


class Missing(ValueError):
    """A result that is needed is not there; the message says which and why."""


def save_frame(frame, path, inputs, **more):
    """Write a DataFrame with what it was made from."""
    write_parquet(frame, path, sha256(inputs), inputs=inputs, **more)


def load_frame(path, inputs):
    """The DataFrame of `save_frame`; ValueError says why it is none of a run with these inputs."""
    if not path.exists():
        raise ValueError("it was not made yet")
    table, made = read_parquet(path)
    if table is None:
        raise ValueError(made)
    if differ := differing(inputs, made.get("inputs", {})):
        raise ValueError(f"it was made from other {', '.join(differ)}")
    return as_frame([table])


def saved_frame(path, inputs):
    """`load_frame`, None where it raises."""
    try:
        return load_frame(path, inputs)
    except ValueError:
        return None


def write_record(path, notebook, entry):
    """Put a notebook's entry into a run.json, sealed with its own SHA-256."""
    entry = json.loads(json_bytes({"notebook": notebook, **entry}))
    entries = {**read_record(path), notebook: {**entry, "sha256": sha256(entry)}}
    write_json(path, dict(sorted(entries.items())))


def read_record(path):
    """{notebook: entry} of a run.json; damaged entries are left out with a warning."""
    try:
        found = dict(json.loads(path.read_bytes())) if path.exists() else {}
    except (OSError, ValueError, TypeError):
        found = {"all of it": {}}
    good = {notebook: entry for notebook, entry in found.items() if _is_whole(notebook, entry)}
    if lost := sorted(found.keys() - good.keys()):
        warnings.warn(
            f"record {path} is damaged: {', '.join(lost)} is left out. Run the notebook again",
            stacklevel=2,
        )
    return good


def _is_whole(notebook, entry):
    content = {name: value for name, value in dict(entry).items() if name != "sha256"}
    return content.get("notebook") == notebook and entry.get("sha256") == sha256(content)
