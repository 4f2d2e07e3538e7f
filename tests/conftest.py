import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from qlutils import paths


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the long variants")


# Files that take minutes: begun first, so that no worker is left alone with one at the end.
LONG = ("test_run", "test_notebooks", "test_kills", "test_readme", "test_report", "test_demo")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="long variant: give --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """All results of the test go to a folder of its own, here and in processes it starts."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("QLUTILS_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def one_thread():
    """Tensors of the tests are so small that threads only wait for one another."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
