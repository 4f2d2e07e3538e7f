"""qlutils: where a language model keeps a fact, per query (Query Localization, ICLR 2025).

Names are imported when first used, so that `import qlutils` does not wait for torch.
"""

import os
import sys
import warnings
from importlib import import_module

# torch's threads spin while they wait for one another. On a machine that does anything else that
# made attribution nine times slower (9.7 s a query against 1.6 s with this limit), and not spinning
# at all makes small models twice as slow on a quiet one. Read when torch is first imported, and
# nothing changes it afterwards.
_chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ)
if not _chosen:
    os.environ["GOMP_SPINCOUNT"] = "50000"
    _torch = sys.modules.get("torch")
    if sys.platform == "linux" and _torch is not None and _torch.get_num_threads() > 1:
        warnings.warn(
            "torch was imported before qlutils, so its threads spin while they wait: many times "
            "slower on a CPU that anything else is using. Import qlutils first, or start Python "
            "with GOMP_SPINCOUNT=50000 or with OMP_NUM_THREADS=1.",
            stacklevel=2,
        )

_PUBLIC = {
    "load_model": "model.loading",
    "LanguageModel": "model.language_model",
    "UnsupportedModel": "model.architecture",
    "Fact": "facts",
    "load_facts": "facts",
    "attribute": "attribution.attribute",
    "knowledge_neurons": "neurons.sets",
    "consistency": "neurons.sets",
    "answer_probability": "change.scaling",
    "scale_neurons": "change.scaling",
    "edit_weights": "change.editing",
    "save_edited": "change.editing",
    "perplexity": "change.editing",
    "find_synapses": "change.synapses",
    "scale_synapses": "change.synapses",
}
_HOME = _PUBLIC | {  # and what the study and the driver use of the modules that import torch
    "fetch_model": "model.loading",
    "find_device": "model.loading",
    "score_queries": "change.rows",
    "Spec": "attribution.attribute",
}
__all__ = sorted(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name):
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(
        f"module 'qlutils' has no attribute {name!r}; public names: {', '.join(__all__)}"
    )


def __dir__():
    return __all__
