"""What all tests share: no network, few threads, tiny models and the folders they are given."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

# Before anything imports torch, transformers or datasets, all of which read these once.
_CACHE = tempfile.mkdtemp(prefix="workbench-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = _CACHE
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # repeatable matrix products on a GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them press.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root():
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared():
    """The folder `shared` beside the checkout: published score files and real LaMP rows."""
    folder = Path(os.environ.get("WORKBENCH_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; WORKBENCH_SHARED names where the shared data lies")
    return folder


@pytest.fixture(scope="session")
def browser():
    """A Chrome or Chromium. Where one must be there (in CI), its absence fails the test."""
    from choreographer.browsers.chromium import Chromium

    path = Chromium.find_browser(skip_local=False)
    if path and Path(path).is_file():
        return path
    if os.environ.get("WORKBENCH_REQUIRE_BROWSER"):
        pytest.fail("WORKBENCH_REQUIRE_BROWSER is set, and there is no Chrome or Chromium")
    pytest.skip("no Chrome or Chromium on this machine")


@pytest.fixture
def rendered(browser, tmp_path):
    """What a page is after a browser without any network has drawn it, as HTML."""

    def draw(page):
        done = subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"),
                f"--user-data-dir={tmp_path / 'chromium'}",
                *("--virtual-time-budget=20000", "--dump-dom", page.as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout

    return draw


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """`workbench lab` on a copy of the notebooks, for the tests of a module; see labserver.py."""
    from labserver import running

    with running(tmp_path_factory.mktemp("lab")) as started:
        yield started


@pytest.fixture(scope="session")
def chromium(browser):
    """Debian's browser, driven by Playwright; it finds no other machine."""
    from labserver import CHROMIUM
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        driven = playwright.chromium.launch(executable_path=browser, args=list(CHROMIUM))
        yield driven
        driven.close()


@pytest.fixture
def open_page(chromium):
    """Open pages, each in a context with its own options; all are checked when the test ends."""
    from labserver import Watch

    watched = []

    def open_one(**options):
        context = chromium.new_context(**options)
        watched.append((context, Watch(context)))
        return context.new_page()

    yield open_one
    for context, _ in watched:
        context.close()
    for _, watch in watched:
        watch.check()


@pytest.fixture
def page(open_page):
    """A page of a middling window; the test fails if it leaves this machine or tells of errors."""
    return open_page(viewport={"width": 1280, "height": 900})


@pytest.fixture(scope="session")
def one_thread():
    """torch with one thread: the sums of two runs then have the same order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def testbed_model(one_thread):
    """The built-in checkpoint."""
    import workbench as wb

    return wb.load_model("testbed", device="cpu")


@pytest.fixture(scope="session")
def tiny_model(one_thread, tmp_path_factory):
    """Load a random model of an architecture in `architectures.py`, each once."""
    from architectures import write_model

    from workbench.models import load_model

    models = {}

    def load(kind):
        if kind not in models:
            folder = tmp_path_factory.mktemp(kind)
            write_model(kind, folder)
            models[kind] = load_model(folder, device="cpu")
        return models[kind]

    return load


LISTS = pytest.StashKey[dict[str, list[str]]]()


@pytest.fixture
def listing(request):
    """Keep a line under a title; the lists are printed when the tests have run."""
    lists = request.config.stash.setdefault(LISTS, {})
    return lambda title, line: lists.setdefault(title, []).append(line)


def pytest_terminal_summary(terminalreporter, config):
    """Print what tests listed."""
    for title, lines in config.stash.get(LISTS, {}).items():
        terminalreporter.write_sep("-", title)
        terminalreporter.write_line("\n".join(lines))
