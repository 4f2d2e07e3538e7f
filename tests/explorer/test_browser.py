"""The explorer in a real browser: JupyterLab here, headless Chromium, a reader's clicks."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest

from qlutils.driver.execute import kernel_environment
from qlutils.paths import NOTEBOOKS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
FACT = "P36|France|Paris"
TITLES = {
    "Suppress": "Suppressed (× 0)",
    "Enhance": "Enhanced (× 2)",
    "Synapses alone": "Neurons left alone",
}
SETTINGS = {  # the page keeps what is scrolled out of sight, and nothing is asked
    "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {
        "windowingMode": "none"
    },
    "config/labconfig/page_config.json": {
        "disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}
    },
}


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing")
    with playwright.sync_playwright() as session:
        chromium = session.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


def write_room(folder):
    """The notebook, not executed and of its declared parameters, and JupyterLab's settings."""
    notebook = nbformat.read(NOTEBOOKS / "explore_fact.ipynb", 4)
    tags = [cell.metadata.get("tags", ()) for cell in notebook.cells]
    notebook.cells = [
        cell for cell, own in zip(notebook.cells, tags) if "injected-parameters" not in own
    ]
    notebook.metadata.kernelspec = dict(name="qlutils", display_name="qlutils", language="python")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (folder / "notebooks").mkdir()
    nbformat.write(notebook, folder / "notebooks" / "explore_fact.ipynb")
    for name, content in SETTINGS.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps(content))


@pytest.fixture
def lab(tmp_path):
    """Start (a time) and address of a JupyterLab server with the notebook, on the loopback
    interface, with a token."""
    write_room(tmp_path)
    token = secrets.token_hex(16)
    env = kernel_environment(
        tmp_path / "kernel",
        JUPYTER_CONFIG_DIR=tmp_path / "config",
        JUPYTER_RUNTIME_DIR=tmp_path / "runtime",
        JUPYTER_DATA_DIR=tmp_path / "data",
        JUPYTERLAB_SETTINGS_DIR=tmp_path / "settings",
        JUPYTERLAB_WORKSPACES_DIR=tmp_path / "workspaces",
        JUPYTER_TOKEN=token,
        IPYTHONDIR=tmp_path / "ipython",
        QLUTILS_RUNS=tmp_path / "runs",
        OMP_NUM_THREADS=1,
    )
    env.pop("QLUTILS_PROGRESS", None)
    options = ["--no-browser", "--port=0", f"--ServerApp.root_dir={tmp_path / 'notebooks'}"]
    command = [sys.executable, "-m", "jupyterlab", "--ip=127.0.0.1", "--allow-root", *options]
    started = time.perf_counter()
    with open(tmp_path / "server.log", "wb") as log:
        own = dict(env=env, stdout=log, stderr=log, start_new_session=True)
        server = subprocess.Popen(command, **own)
    try:
        yield started, f"{_address(server, tmp_path)}doc/tree/explore_fact.ipynb?token={token}"
    finally:
        server.terminate()  # a server that is asked to end ends its kernels first
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _address(server, folder, patience=40):
    end = time.time() + patience
    while time.time() < end and server.poll() is None:
        for record in (folder / "runtime").glob("jpserver-*.json"):
            try:
                url = json.loads(record.read_text())["url"]
                with urllib.request.urlopen(f"{url}api", timeout=5):
                    return url
            except (OSError, ValueError):  # not yet
                pass
        time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{(folder / 'server.log').read_text()[-2000:]}")


@pytest.fixture
def page(browser, lab):
    """The notebook, open."""
    page = browser.new_page(viewport={"width": 1280, "height": 1050})
    page.set_default_timeout(45_000)
    page.goto(lab[1])
    yield page
    page.close()


def press(page, name):
    """Press a button: the roles, and the values before and after, of the table that comes."""
    page.locator("button", has_text=re.compile(f"^ ?{name}$")).click()
    shown = page.locator(".widget-html-content", has_text=TITLES[name])
    shown.wait_for()
    rows = [row for row in shown.locator("tr").all_inner_texts() if "→" in row]
    values = [re.search(r"(\d\.\d+) → (\d\.\d+)", row).groups() for row in rows]
    before, after = ([float(value) for value in one] for one in zip(*values))
    return [row.split("\t")[0] for row in rows], before, after


@pytest.mark.browser
def test_a_reader_runs_the_notebook_and_changes_neurons_and_synapses(page, lab):
    page.locator(".jp-Notebook").wait_for()
    page.get_by_text("qlutils | Idle").wait_for()
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator('[data-command="runmenu:run-all"]').click()
    status = page.locator(".widget-html-content", has_text="scores computed now")
    status.filter(has_text=FACT).wait_for(state="attached")  # hidden while out of sight
    status.evaluate("e => e.closest('.jp-Cell').scrollIntoView()")
    page.get_by_role("tab", name="Change it").click()
    roles, before, suppressed = press(page, "Suppress")
    assert time.perf_counter() - lab[0] < 180
    assert roles[-2:] == ["control: same relation", "control: other relation"]
    assert len(roles) > 4 and all(0 <= p <= 1 for p in (*before, *suppressed))
    assert "q0" in roles[0] and before[0] > suppressed[0]  # its own neurons are gone
    _, again, enhanced = press(page, "Enhance")
    label = page.get_by_text("synapses", exact=True)
    page.locator(".widget-dropdown", has=label).locator("select").select_option(index=1)
    _, off, without = press(page, "Synapses alone")
    assert before == again == off  # the model was as before
    assert len({tuple(one) for one in (before, suppressed, enhanced, without)}) == 4
    page.get_by_role("tab", name="Copy as code").click()

    assert not page.get_by_text("Traceback").count()
