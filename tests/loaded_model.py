"""Imported by the server that test_kills forks from: a model is loaded, in one thread."""

import torch

from qlutils.study import store

torch.set_num_threads(1)
store.cached_model("demo/gpt2")
