"""JupyterLab in a real browser: what tests of notebooks, the explorer and the report drive.

Fixtures (tests/conftest.py), for tests marked `browser`:

- `lab` (a module's own): `workbench lab` on a copy of notebooks/, a `Lab`: `lab.folder` is the
  copy, where a test may write notebooks of its own (`write_notebook`).
- `page` (a test's own): a Playwright page (sync API) of Debian's Chromium that finds no other
  machine. When the test ends it fails if the page asked for anything beyond this machine, wrote an
  error to the console, or raised one.  `page.goto("file://...")` may be used without `lab`.

Helpers here:

    open_notebook(page, lab, "01_quickstart")    opens it and waits for its kernel
    run_all(page, timeout=120)                   Run > Run All Cells, waits until all have run
    errors(page)                                 texts of outputs that are errors
    screenshot(page, "name", whole=True)         PNG, to be looked at; returns its path
    write_notebook(lab.folder / "x.ipynb", ["code of a cell", "of the next"])
    code_cells(page)                             source, execution_count and outputs of each
    end_kernel(page)                             where many notebooks would fill the memory
    covered(page, figure)                        pixels that a Plotly figure's marks cover

Screenshots go to build/screenshots/, or where `WORKBENCH_SCREENSHOTS` says. A test with another
window: `page.set_viewport_size({"width": 800, "height": 900})`. All cells are attached to the
page (windowing mode none), so that a selector finds those out of sight too.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO
from urllib.parse import quote, urlsplit

import nbformat
from conftest import ROOT

SCREENSHOTS = Path(os.environ.get("WORKBENCH_SCREENSHOTS", ROOT / "build" / "screenshots"))
LAB = "from workbench.cli import main; main()"
START = 120  # seconds that a server may take until it says where it is
LOCAL = {"localhost", "127.0.0.1"}
INLINE = {"data", "blob", "file", "about"}
CHROMIUM = (
    *("--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"),
    # No name is looked up, so that a request for another machine fails at once.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)
FILES = {
    # With other windowing modes cells out of sight aren't drawn.
    "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {
        "windowingMode": "none"
    },
    # The page's `jupyterapp`, from which a test reads what the cells hold.
    "config/jupyter_lab_config.json": {"LabApp": {"expose_app_in_browser": True}},
}


@dataclass(frozen=True)
class Lab:
    """A running `workbench lab`."""

    url: str  # with the token
    folder: Path
    process: subprocess.Popen[str]
    log: Path

    def of(self, name: str) -> str:
        """The address of a notebook, in a workspace of its own."""
        where, _, token = self.url.partition("?")
        path = quote(f"{name}.ipynb")
        return f"{where}/workspaces/{quote(name)}/tree/{path}?reset&{token}"


def environment(home: Path) -> dict[str, str]:
    """Of a server that reads and writes no file of the person who runs the tests."""
    for name, content in FILES.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    outer = {k: v for k, v in os.environ.items() if not k.startswith(("SSH_", "JUPYTER"))}
    return {
        **outer,
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
        "NO_COLOR": "1",
        "TERM": "dumb",
    }


@contextmanager
def running(home: Path, *options: str, **more: str) -> Iterator[Lab]:
    """`workbench lab` in a process of its own, ended by its id."""
    folder, log = home / "notebooks", home / "log.txt"
    with log.open("w", encoding="utf-8") as written:
        process = subprocess.Popen(
            [sys.executable, "-c", LAB, "lab", str(folder), "--no-browser", *options],
            cwd=home,
            env={**environment(home), **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=written,
            text=True,
        )
        # With the process its output ends, which is all that is waited for.
        late = threading.Timer(START, process.kill)
        late.start()
        try:
            url = _address(process, written)
            late.cancel()
            written.flush()
            assert url, f"JupyterLab did not start:\n{log.read_text(encoding='utf-8')}"
            yield Lab(url, folder, process, log)
        finally:
            late.cancel()
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                raise


def _address(process: subprocess.Popen[str], log: TextIO) -> str:
    """What a server says of where it is; nothing where it ends before it has said all."""
    assert process.stdout is not None
    url = ""
    for line in process.stdout:
        log.write(line)
        url = url or next(iter(re.findall(r"http://\S+", line)), "")
        if line.startswith("Ctrl-C"):
            return url
    return ""


class Watch:
    """What a page asked for and complained about."""

    def __init__(self, context) -> None:
        self.foreign: list[str] = []
        self.told: list[str] = []
        # An error is written with where it came from.
        context.add_init_script(
            "const told = console.error;"
            "console.error = (...all) => told(...all.map(one => one?.stack ?? one));"
        )
        context.on("request", self._request)
        context.on("console", self._console)
        context.on("weberror", lambda error: self.told.append(f"raised: {error.error}"))
        # WebSockets are no requests to Playwright; every page's are looked at too.
        context.on("page", lambda page: page.on("websocket", self._request))

    def _request(self, request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in INLINE and address.hostname not in LOCAL:
            self.foreign.append(request.url)

    def _console(self, message) -> None:
        if message.type == "error":
            place = message.location.get("url", "")
            self.told.append(f"{message.text} ({place})")

    def check(self) -> None:
        """Fail where something was asked of another machine, or was an error."""
        found = [f"asked for {url}" for url in self.foreign] + self.told
        assert not found, "in the browser:\n" + "\n".join(found)


def write_notebook(path: Path, cells: list[str]) -> Path:
    """A notebook of code cells for the kernel that runs the tests."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    nbformat.write(notebook, path)
    return path


PANEL = ".jp-NotebookPanel:not(.lm-mod-hidden)"


def open_notebook(page, lab: Lab, name: str, timeout: float = 60) -> None:
    """Open a notebook of `lab.folder` and wait until its kernel is idle; outputs are cleared."""
    page.goto(lab.of(name))
    page.locator(f"{PANEL} .jp-Cell").first.wait_for(timeout=timeout * 1000)
    _until_idle(page, timeout)
    _menu(page, "Edit", "Clear Outputs of All Cells")


# What the page shows as idle may be a kernel that nothing has been heard of yet.
IDLE = """() => {
    const kernel = jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel;
    return kernel?.connectionStatus === 'connected' && kernel.status === 'idle';
}"""


def _until_idle(page, timeout: float, after=lambda: True) -> None:
    """Until the kernel is idle; a dialog that asks which one gets the default."""
    choose = page.locator(".jp-Dialog button.jp-mod-accept")
    seen, end = 0, time.monotonic() + timeout
    while time.monotonic() < end:
        if choose.count():
            choose.first.click()
        # Between two cells a kernel is idle for a moment.
        seen = seen + 1 if page.evaluate(IDLE) and after() else 0
        if seen == 5:
            return
        page.wait_for_timeout(100)
    shown = screenshot(page, "not-idle")
    raise AssertionError(f"the kernel is not idle after {timeout} s; see {shown}")


def _menu(page, menu: str, item: str) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{menu}$")).click()
    entry = page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{item}$"))
    entry.click()


def code_cells(page) -> list[dict]:
    """The code cells as a notebook file would hold them: source, execution_count, outputs."""
    cells = page.evaluate("() => jupyterapp.shell.currentWidget.content.model.toJSON().cells")
    return [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"])]


def run_all(page, timeout: float = 120) -> None:
    """Run all cells; wait until all have run, or an error has kept the rest from it."""
    _menu(page, "Run", "Run All Cells")
    _until_idle(page, timeout, after=lambda: _have_run(page))


def _have_run(page) -> bool:
    return all(cell["execution_count"] for cell in code_cells(page)) or bool(errors(page))


def end_kernel(page) -> None:
    """End the open notebook's kernel; the model that it holds goes with it."""
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def errors(page) -> list[str]:
    """What outputs say that are errors, of the kernel or of a widget that was not drawn."""
    told = [
        f"{output['ename']}: {output['evalue']}"
        for cell in code_cells(page)
        for output in cell["outputs"]
        if output["output_type"] == "error"
    ]
    widgets = page.locator(f"{PANEL} .jupyter-widgets-error-widget, {PANEL} .jp-mod-error")
    return told + widgets.all_inner_texts()


def screenshot(page, name: str, whole: bool = False) -> Path:
    """A picture for whoever looks; `whole`: of a notebook from its first to its last cell.

    JupyterLab scrolls inside its window, so for a whole one the window grows for a moment.
    """
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / f"{name}.png"
    if not whole:
        page.screenshot(path=path)
        return path
    before = page.viewport_size
    height = page.evaluate(
        """selector => {
            const box = document.querySelector(selector + ' .jp-WindowedPanel-outer');
            if (!box) return document.documentElement.scrollHeight;
            const cells = [...box.querySelectorAll('.jp-Cell')];
            const end = Math.max(...cells.map(cell => cell.getBoundingClientRect().bottom));
            const start = Math.min(...cells.map(cell => cell.getBoundingClientRect().top));
            return end - start + innerHeight - box.clientHeight + 40;
        }""",
        PANEL,
    )
    page.set_viewport_size({"width": before["width"], "height": min(int(height), 16000)})
    page.wait_for_timeout(500)
    page.evaluate(
        "selector => (document.querySelector(selector + ' .jp-WindowedPanel-outer') ?? window)"
        ".scrollTo(0, 0)",
        PANEL,
    )
    page.wait_for_timeout(500)
    page.screenshot(path=path)
    page.set_viewport_size(before)
    return path


PLOT = ".js-plotly-plot"
_DIFFERENT = """async ([shown, hidden, boxes]) => {
    const pixels = async text => {
        const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
        const image = await createImageBitmap(new Blob([bytes], {type: 'image/png'}));
        const canvas = new OffscreenCanvas(image.width, image.height).getContext('2d');
        canvas.drawImage(image, 0, 0);
        return canvas.getImageData(0, 0, image.width, image.height);
    };
    const [one, other] = [await pixels(shown), await pixels(hidden)];
    if (one.width !== other.width || one.height !== other.height) throw Error('it moved');
    return boxes.map(({left, top, right, bottom}) => {
        let count = 0;
        for (let y = Math.max(0, top); y < Math.min(one.height, bottom); y++)
            for (let x = Math.max(0, left); x < Math.min(one.width, right); x++) {
                const i = 4 * (y * one.width + x);
                if ([0, 1, 2].some(c => Math.abs(one.data[i + c] - other.data[i + c]) > 8)) count++;
            }
        return count;
    });
}"""
_BOXES = """figure => {
    const own = figure.getBoundingClientRect();
    return [...figure.querySelectorAll('.nsewdrag')].map(area => {
        const box = area.getBoundingClientRect();
        return {
            left: Math.floor(box.left - own.left), right: Math.ceil(box.right - own.left),
            top: Math.floor(box.top - own.top), bottom: Math.ceil(box.bottom - own.top),
        };
    });
}"""


def covered(page, figure) -> list[int]:
    """How many pixels the marks of each subplot of a Plotly figure cover.

    The figure is pictured as it is and with its marks hidden; what differs are the marks. Axes,
    titles and colour bars don't count.
    """
    figure.scroll_into_view_if_needed()
    page.mouse.move(0, 0)
    shown = figure.screenshot()
    layers = "layers => layers.forEach(layer => layer.style.display = %r)"
    marks = figure.locator(".cartesianlayer .overplot")
    marks.evaluate_all(layers % "none")
    hidden = figure.screenshot()
    marks.evaluate_all(layers % "")
    pictures = [base64.b64encode(picture).decode() for picture in (shown, hidden)]
    return page.evaluate(_DIFFERENT, [*pictures, figure.evaluate(_BOXES)])


def pictures(page) -> list[int]:
    """The width in pixels of every picture on the page and in the outputs; 0 of a broken one."""
    stored = [
        "data:image/png;base64," + "".join(output["data"]["image/png"])
        for cell in code_cells(page)
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    return page.evaluate(
        """async ([stored, selector]) => {
            const load = source => new Promise(done => {
                const image = new Image();
                image.onload = () => done(image.naturalWidth);
                image.onerror = () => done(0);
                image.src = source;
            });
            const shown = [...document.querySelectorAll(selector)].map(one => one.naturalWidth);
            return [...shown, ...await Promise.all(stored.map(load))];
        }""",
        [stored, f"{PANEL} .jp-Cell img"],
    )
