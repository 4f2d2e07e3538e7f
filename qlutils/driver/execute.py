"""One notebook, run by papermill in a process of its own, with this very interpreter as its
kernel."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from qlutils.files import write_json
from qlutils.paths import PACKAGE


def kernel_environment(folder, **variables):
    """Environment whose Jupyter finds, under the name `qlutils`, a kernel that is this interpreter.

    The kernel called `python3` may be another one that is installed on the machine."""
    launch = "-Xfrozen_modules=off -m ipykernel_launcher -f {connection_file}".split()
    kernel = {"argv": [sys.executable, *launch], "display_name": "qlutils", "language": "python"}
    write_json(Path(folder) / "kernels" / "qlutils" / "kernel.json", kernel)
    first = {"JUPYTER_PATH": folder, "PYTHONPATH": PACKAGE.parent}  # and this very source
    for name, path in first.items():
        variables[name] = os.pathsep.join(filter(None, [str(path), os.environ.get(name)]))
    return {**os.environ, **{name: str(value) for name, value in variables.items()}}


def execute(notebook, output, parameters, env, log, stop=None):
    """Run `notebook` with `parameters` into `output`; returns what failed in one line, or "".

    env: from `kernel_environment`. log: file for what the process says. stop: a `threading.Event`,
    once set, ends the process and its kernel, and this call; so does whatever interrupts it."""
    Path(output).unlink(missing_ok=True)
    code = "from qlutils.driver.execute import run_papermill; run_papermill()"
    spec = json.dumps([str(notebook), str(output), parameters, os.getpid()])
    with open(log, "wb") as stream:
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            env=env,
            cwd=Path(notebook).parent,
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        with suppress(BrokenPipeError):
            child.stdin.write(spec.encode())
            child.stdin.close()
        while child.poll() is None and not (stop and stop.is_set()):
            time.sleep(0.1)
    finally:
        child.terminate()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    return _what_failed(Path(output), Path(log), child.returncode) if child.returncode else ""


def run_papermill():
    """In the process: execute one notebook, and end with the driver, whatever ends that."""
    notebook, output, parameters, driver = json.load(sys.stdin)

    def watch():
        while os.getppid() == driver:
            time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)  # papermill's client then kills the kernel
        time.sleep(3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    import papermill

    # papermill formats paths, so a brace in a folder's name is doubled
    source, target = (path.replace("{", "{{").replace("}", "}}") for path in (notebook, output))
    options = dict(kernel_name="qlutils", language="python", shutdown_kernel="immediate")
    papermill.execute_notebook(source, target, parameters, progress_bar=False, **options)


def _what_failed(output, log, code):
    killed = f"its process was killed by signal {-code}"
    if code < 0:  # not by us; what it wrote last is not why
        return killed + " (out of memory?)" * (code == -signal.SIGKILL)
    try:
        cells = json.loads(output.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):
        cells = []
    for cell in cells:
        for item in cell.get("outputs", ()):
            if item["output_type"] == "error":
                said = item["evalue"].strip().split("\n")[0]
                return f"{item['ename']}: {said[:300]} (In [{cell['execution_count']}])"
    written = log.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = [line for line in written if line.strip()]
    said = lines[-1][:300] if lines else f"its process ended with status {code}"
    return said + " (out of memory?)" * ("DeadKernelError" in said)
