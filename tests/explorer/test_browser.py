"""The explorer in a real browser: JupyterLab on this machine, headless Chromium, a reader's
clicks."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat
import pytest

from qlutils.driver.execute import kernel_environment
from qlutils.paths import NOTEBOOKS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
FACT = "P36|France|Paris"


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is missing (it is in the test extra)"
    )
    with playwright.sync_playwright() as session:
        chromium = session.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def lab(tmp_path):
    """Start (a time) and address of a JupyterLab server with the notebook, on the loopback
    interface, with a token."""
    notebook = nbformat.read(NOTEBOOKS / "explore_fact.ipynb", 4)
    notebook.cells = [
        cell
        for cell in notebook.cells
        if "injected-parameters" not in cell.metadata.get("tags", ())  # a pretrained model's
    ]
    notebook.metadata.kernelspec = {
        "name": "qlutils",
        "display_name": "qlutils",
        "language": "python",
    }
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(notebook, folder / "explore_fact.ipynb")
    settings = (
        tmp_path / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    )
    settings.parent.mkdir(parents=True)
    settings.write_text(
        json.dumps({"windowingMode": "none"})
    )  # the page keeps what is scrolled out of sight
    labels = tmp_path / "config" / "labconfig" / "page_config.json"
    labels.parent.mkdir(parents=True)
    labels.write_text(
        json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}})
    )
    token = secrets.token_hex(16)
    places = {
        name: tmp_path / name.split("_")[1].lower()
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR")
    }
    env = kernel_environment(
        tmp_path / "kernel",
        JUPYTERLAB_SETTINGS_DIR=tmp_path / "settings",
        JUPYTER_TOKEN=token,
        JUPYTERLAB_WORKSPACES_DIR=tmp_path / "workspaces",
        IPYTHONDIR=tmp_path / "ipython",
        QLUTILS_RUNS=tmp_path / "runs",
        OMP_NUM_THREADS=1,
        **places,
    )
    env.pop("QLUTILS_PROGRESS", None)
    started = time.perf_counter()
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--ip=127.0.0.1",
                "--port=0",
                "--allow-root",
                f"--ServerApp.root_dir={folder}",
            ],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
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
            url = json.loads(record.read_text())["url"]
            try:
                with urllib.request.urlopen(f"{url}api", timeout=5):
                    return url
            except (urllib.error.URLError, OSError):
                pass
        time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{(folder / 'server.log').read_text()[-2000:]}")


def before_and_after(shown):
    """[(role, before, after)] of the rows of a table of changes, a page's text taken literally."""
    rows = [row for row in shown.locator("tr").all_inner_texts() if "→" in row]
    return [
        (row.split("\t")[0], *map(float, re.search(r"(\d\.\d+) → (\d\.\d+)", row).groups()))
        for row in rows
    ]


@pytest.fixture
def page(browser, lab, tmp_path, capsys):
    """The notebook, open; what it looked like at last is kept as `last.png`."""
    page = browser.new_page(viewport={"width": 1280, "height": 1050})
    page.set_default_timeout(45_000)
    page.goto(lab[1])
    yield page
    page.screenshot(path=tmp_path / "last.png")
    with capsys.disabled():
        print(f"\nscreenshots: {', '.join(map(str, sorted(tmp_path.glob('*.png'))))}")
    page.close()


@pytest.mark.browser
def test_a_reader_runs_the_notebook_suppresses_neurons_picks_a_fact_and_moves_the_slider(
    page, lab, tmp_path, capsys
):
    page.locator(".jp-Notebook").wait_for()
    page.get_by_text("qlutils | Idle").wait_for()

    def keep(name):
        page.locator(".jp-Cell", has=page.locator(".widget-tab")).evaluate(
            "e => e.scrollIntoView()"
        )
        page.screenshot(path=tmp_path / f"{name}.png")

    def press(name):
        """Press a button; the rows of the table that comes."""
        titles = {
            "Suppress": "Suppressed (× 0)",
            "Enhance": "Enhanced (× 2)",
            "Synapses alone": "Neurons left alone",
        }
        page.locator("button", has_text=re.compile(f"^ ?{name}$")).click()
        shown = page.locator(".widget-html-content", has_text=titles[name])
        shown.wait_for()
        return before_and_after(shown)

    # the newcomer's path: run the notebook, switch neurons off, see the answer change
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator('[data-command="runmenu:run-all"]').click()
    status = page.locator(".widget-html-content", has_text="scores computed now")
    status.filter(has_text=FACT).wait_for(
        state="attached"
    )  # JupyterLab hides what is scrolled out of sight
    status.evaluate("e => e.closest('.jp-Cell').scrollIntoView()")
    keep("prompts")
    page.get_by_role("tab", name="Change it").click()
    values = press("Suppress")
    seconds = time.perf_counter() - lab[0]
    assert [role for role, *_ in values][-2:] == [
        "control: same relation",
        "control: other relation",
    ]
    assert len(values) > 4 and all(
        0 <= before <= 1 and 0 <= after <= 1 for _, before, after in values
    )
    assert values[0][1] > values[0][2] and "q0" in values[0][0]  # its own neurons are gone
    with capsys.disabled():
        print(f"\nfrom `jupyter lab` to the first changed answer: {seconds:.0f} s")
    assert seconds < 180
    keep("suppressed")

    again = press("Enhance")
    assert [before for _, before, _ in again] == [
        before for _, before, _ in values
    ]  # the model was as before
    assert [after for *_, after in again] != [after for *_, after in values]
    synapses = page.locator(
        ".widget-dropdown", has=page.get_by_text("synapses", exact=True)
    ).locator("select")
    synapses.select_option(index=1)
    off = press("Synapses alone")
    assert [before for _, before, _ in off] == [before for _, before, _ in values]
    assert [after for *_, after in off] not in (
        [after for *_, after in again],
        [before for _, before, _ in off],
    )
    keep("synapses")
    page.get_by_role("tab", name="Copy as code").click()
    keep("code")

    # another fact, another threshold
    dropdown = page.locator(".widget-dropdown", has=page.get_by_text("Fact", exact=True)).locator(
        "select"
    )
    dropdown.select_option(index=(dropdown.evaluate("e => e.selectedIndex") + 1) % 3)
    page.locator("button", has_text=re.compile("^ ?Run$")).click()
    page.wait_for_function(
        f"() => !document.body.innerText.includes({json.dumps(FACT + ': scores')})"
    )
    status.wait_for()
    page.get_by_role("tab", name="Prompts").click()
    first_prompt = page.locator("table", has_text="runners-up").first.inner_text()
    assert "known" in first_prompt and "France" not in first_prompt
    page.get_by_role("tab", name="Neurons").click()
    tiles = page.locator(".widget-html-content", has_text="in more than one").first
    before = tiles.inner_text()
    slider = page.locator(".widget-slider .noUi-handle").first
    for _ in range(4):
        slider.press("ArrowRight")
    page.locator(".widget-readout", has_text="0.40").wait_for()
    page.wait_for_function(
        "old => ![...document.querySelectorAll('.widget-html-content')]"
        ".some(e => e.innerText === old)",
        arg=before,
    )
    size = lambda text: int(re.search(r"neurons\n(\d+)", text)[1])  # noqa: E731
    assert 0 < size(tiles.inner_text()) < size(before)
    status.wait_for()
    keep("neurons")
    page.get_by_role("tab", name="One neuron").click()
    keep("one_neuron")
    assert not page.get_by_text("Traceback").count()
