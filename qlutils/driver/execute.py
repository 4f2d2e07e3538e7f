"""One notebook, run by papermill in a process of its own, with this very interpreter as its
kernel."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
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
    asked = json.dumps([str(notebook), str(output), parameters, os.getpid()])
    with open(log, "wb") as stream:
        child = subprocess.Popen(
            [sys.executable, "-c", code, asked],
            env=env,
            cwd=Path(notebook).parent,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        while child.poll() is None and not (stop and stop.is_set()):
            time.sleep(0.1)
    finally:
        child.terminate()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    return _what_failed(Path(log), child.returncode)


def run_papermill():
    """In the process: execute one notebook, and end with the driver, whatever ends that."""
    notebook, output, parameters, driver = json.loads(sys.argv[1])

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
    try:
        papermill.execute_notebook(
            source,
            target,
            parameters,
            progress_bar=False,
            kernel_name="qlutils",
            language="python",
            shutdown_kernel="immediate",
        )
    except papermill.PapermillExecutionError as error:
        said = error.evalue.strip().split("\n")[0]
        sys.exit(f"{error.ename}: {said[:300]} (In [{error.exec_count}])")


def _what_failed(log, code):
    """In one line, or "": the last one that a process wrote, unless it was killed."""
    if code == 0:
        return ""
    said = f"its process ended with status {code}"
    if code < 0:
        said = f"its process was killed by signal {-code}"
    else:
        for line in log.read_text("utf-8", "replace").split("\n"):
            said = line.strip() or said
    memory = code == -signal.SIGKILL or "DeadKernelError" in said
    return said + " (out of memory?)" * memory
