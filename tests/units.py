"""Units of work for tests of the store and of faults: tasks without a model, what runs them, and a
unit of notebooks 04 to 06.

Processes that tests start import this module too, with IMPORT_PATH; torch is not imported before it
is needed.
"""

import os
import random
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from qlutils import files, paths
from qlutils.study import store

IMPORT_PATH = os.pathsep.join([str(Path(__file__).parent), str(paths.PACKAGE.parent)])
UNITS = [[{"x": i, "name": f"é{i}"}, {"x": i + 1, "name": "‏עברית 🦉"}] for i in range(4)]


def fake_model(fingerprint="abc", dtype="torch.float32"):
    return SimpleNamespace(
        fingerprint=fingerprint,
        device=SimpleNamespace(type="cpu"),
        dtype=dtype,
        check_untouched=lambda: None,
    )


def numbers(lm, unit, scale=1.0):
    """Every kind of column that results have."""
    return pd.DataFrame(
        {
            "name": [fact["name"] for fact in unit],
            "count": [fact["x"] for fact in unit],
            "single": np.float32([fact["x"] / 3 for fact in unit]),
            "double": [scale * fact["x"] / 7 for fact in unit],
            "known": [fact["x"] % 2 == 0 for fact in unit],
            "layer": [list(range(fact["x"])) for fact in unit],
            "score": [np.float32(np.arange(fact["x"]) / 3) for fact in unit],
            "first_only": [[1.5] if fact["x"] == 0 else None for fact in unit],
        },
        index=[5] * len(unit),
    )


numbers.VERSION = 1


def breaks_at_two(lm, unit):
    if unit[0]["x"] == 2:
        raise FloatingPointError("probability is not finite")
    return numbers(lm, unit)


breaks_at_two.VERSION = 1


def signed(lm, unit, log="", pause=0.5):
    """Leaves the number of its process."""
    with open(log, "a") as stream:
        stream.write(f"{os.getpid()}\n")
    time.sleep(pause)
    return numbers(lm, unit)


signed.VERSION = 1


# -- running them ----------------------------------------------------------------------------------
def without_model():
    """From here on, this process takes `fake_model` for every model."""
    store.cached_model = lambda *_: fake_model()


def run(root, task=numbers, config=None, units=UNITS):
    """(frame, info, what was warned of)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        info = {}
        frame = store.run_units(task, "m", units, config, desc="test", root=root, info=info)
    return frame, info, [str(w.message) for w in caught]


def unit_files(root):
    return {path.name: path.read_bytes() for path in sorted((root / "units").glob("*.parquet"))}


def lock_of(root):
    """The lock that `run(root)` holds while it computes."""
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "locked", lambda path: taken.append(path) or files.locked(path))
        run(root)
    for file in unit_files(root):
        (root / "units" / file).unlink()
    return taken[0]


def damaged(data, step):
    """`data` with one bit flipped, at every `step`-th byte, cut short, and made longer."""
    rng = random.Random(0)
    for at in range(0, len(data), step):
        yield data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    yield from (data[:size] for size in (0, 1, 100, len(data) // 2, len(data) - 2, len(data) - 1))
    yield data + b"x"


# -- a unit of notebooks 04 to 06 ------------------------------------------------------------------
EFFECTS_UNIT = [
    dict(
        fact="R1|a|8 6",
        relation="R1",
        object="8 6",
        prompts=["13 17 8 25", "5 17 8", "9 13 30 12"],
        prompt_index=[0, 2, 3],
        layer=[[0, 0, 2], [0, 1], []],
        neuron=[[3, 7, 40], [3, 5], []],
        same_relation=[[[2, 9]], [], []],
        other_relation=[[[0, 1], [0, 2]], [], []],
    )
]
