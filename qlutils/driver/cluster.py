"""Workers that compute units: local processes, or a dask cluster that is there."""

from contextlib import contextmanager

OWN = {"host": "127.0.0.1"}  # nobody else may connect


@contextmanager
def scheduler(workers, address):
    """Address of the dask scheduler that computes, or None: units are then computed in the
    notebooks. Each worker has a GPU of its own where there are GPUs."""
    if not workers:
        yield address or None
        return
    import torch
    from distributed import Nanny, Scheduler, SpecCluster

    gpus = torch.cuda.device_count()
    nannies = {}
    for number in range(workers):
        env = {"CUDA_VISIBLE_DEVICES": str(number % gpus)} if gpus else {}
        options = {**OWN, "silence_logs": 40, "nthreads": 1, "memory_limit": 0, "env": env}
        nannies[number] = {"cls": Nanny, "options": options}
    head = {"cls": Scheduler, "options": {**OWN, "dashboard": False}}
    with SpecCluster(nannies, head, silence_logs=40) as cluster:
        yield cluster.scheduler_address
