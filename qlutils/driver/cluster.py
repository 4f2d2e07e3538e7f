"""Workers that compute units: local processes, or a dask cluster that is there."""

from contextlib import contextmanager

HOST = "127.0.0.1"  # nobody else may connect


@contextmanager
def scheduler(workers, address):
    """Address of the dask scheduler that computes, or None: units are then computed in the
    notebooks."""
    if not workers:
        yield address or None
        return
    from distributed import Nanny, Scheduler, SpecCluster

    local = {"host": HOST, "dashboard": False}
    nannies = {number: {"cls": Nanny, "options": _options(number)} for number in range(workers)}
    head = {"cls": Scheduler, "options": local}
    with SpecCluster(nannies, head, silence_logs=40) as cluster:
        yield cluster.scheduler_address


def _options(number):
    """Of one worker, with a GPU of its own where there are GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    return {
        "host": HOST,
        "nthreads": 1,
        "memory_limit": 0,
        "silence_logs": 40,
        "env": {"CUDA_VISIBLE_DEVICES": str(number % gpus)} if gpus else {},
    }
