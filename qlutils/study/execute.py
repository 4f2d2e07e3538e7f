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

    The kernel called `python3` may be another one that is installed on the machine.
    """
    argv = [
        sys.executable,
        "-Xfrozen_modules=off",
        "-m",
        "ipykernel_launcher",
        "-f",
        "{connection_file}",
    ]
    write_json(
        Path(folder) / "kernels" / "qlutils" / "kernel.json",
        {"argv": argv, "display_name": "qlutils", "language": "python"},
    )
    first = {"JUPYTER_PATH": folder, "PYTHONPATH": PACKAGE.parent}  # and this very source
    variables |= {
        name: os.pathsep.join(filter(None, [str(path), os.environ.get(name)]))
        for name, path in first.items()
    }
    return {**os.environ, **{name: str(value) for name, value in variables.items()}}


def execute(notebook, output, parameters, env, log, stop=None):
    """Run `notebook` with `parameters` into `output`; returns what failed in one line, or "".

    env: from `kernel_environment`. log: file for what the process says. stop: a `threading.Event`,
    once set, ends the process and its kernel, and this call; so does whatever interrupts it.
    """
    Path(output).unlink(missing_ok=True)
    with open(log, "wb") as stream:
        child = subprocess.Popen(
            [sys.executable, "-c", "from qlutils.study.execute import _child; _child()"],
            env=env,
            cwd=Path(notebook).parent,
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        try:
            spec = [str(notebook), str(output), parameters, os.getpid()]
            child.stdin.write(json.dumps(spec).encode())
            child.stdin.close()
            while child.poll() is None and not (stop and stop.is_set()):
                time.sleep(0.1)
        except BrokenPipeError:
            child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(5)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
    return "" if child.returncode == 0 else _what_failed(Path(output), Path(log), child.returncode)


def _child():
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
    papermill.execute_notebook(
        source,
        target,
        parameters=parameters,
        kernel_name="qlutils",
        language="python",
        progress_bar=False,
        shutdown_kernel="immediate",
    )


def _what_failed(output, log, code):
    if code < 0:  # not by us; what it wrote last is not why
        return f"its process was killed by signal {-code}" + " (out of memory?)" * (
            code == -signal.SIGKILL
        )
    try:
        cells = json.loads(output.read_text(encoding="utf-8"))["cells"]
        for cell in cells:
            for item in cell.get("outputs", ()):
                if item["output_type"] == "error":
                    said = item["evalue"].strip().splitlines()[:1]
                    return (
                        f"{item['ename']}: {''.join(said)[:300]} (In [{cell['execution_count']}])"
                    )
    except (OSError, ValueError, KeyError):
        pass
    written = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in written.splitlines() if line.strip()]
    said = lines[-1][:300] if lines else f"its process ended with status {code}"
    return said + " (out of memory?)" * ("DeadKernelError" in said)
