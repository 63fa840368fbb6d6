"""`workbench lab`: a real server, reached as a browser or a stranger would reach it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import psutil
import pytest
import zmq
from conftest import ROOT
from labserver import LAB, environment, running

from workbench.errors import InputError
from workbench.lab import server

NAMES = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


def token(lab):
    return parse_qs(urlsplit(lab.url).query)["token"][0]


def ask(lab, path, given=None, data=None):
    """Status, final address and text of an answer; `given` is a token."""
    where = urlsplit(lab.url)
    request = urllib.request.Request(f"http://{where.netloc}{path}", data=data)
    if given is not None:
        request.add_header("Authorization", f"token {given}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return answer.status, answer.url, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.url, ""


def refused(*arguments, cwd, first=""):
    """What the command says that ends with code 2."""
    done = subprocess.run(
        [sys.executable, "-c", first + LAB, "lab", *map(str, arguments)],
        cwd=cwd,
        env=environment(cwd),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A server whose person has a kernel `python3` of another Python, and prefers such."""
    home = tmp_path_factory.mktemp("lab")
    spec = home / "data" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    other = {"argv": ["another-python", "{connection_file}"], "display_name": "Other"}
    spec.write_text(json.dumps({**other, "language": "python"}))
    with running(home, JUPYTER_PREFER_ENV_PATH="0") as lab:
        yield lab


def test_nothing_is_shown_without_the_token(started):
    assert ask(started, "/api/contents")[0] == 403
    assert ask(started, "/api/contents", "wrong")[0] == 403
    assert ask(started, "/api/kernels", data=b"{}")[0] == 403
    assert "/login" in ask(started, "/lab")[1]
    status, _, text = ask(started, "/api/contents", token(started))
    assert status == 200
    shown = {entry["name"] for entry in json.loads(text)["content"]}
    assert set(NAMES) <= shown
    assert len(token(started)) >= 32


def test_server_and_kernels_listen_to_this_machine_only(started):
    status, _, _ = ask(started, "/api/kernels", token(started), b'{"name": "python3"}')
    assert status == 201
    me = psutil.Process(started.process.pid)
    for _ in range(300):
        listening = [
            connection
            for process in [me, *me.children(recursive=True)]
            for connection in process.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        if len(listening) > 5:  # the server's one port, and the five of a kernel
            break
        time.sleep(0.1)
    assert len(listening) > 5
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}
    assert urlsplit(started.url).port in {connection.laddr.port for connection in listening}
    connections = (started.folder.parent / "runtime").glob("kernel-*.json")
    encrypted = {"curve_publickey" in json.loads(path.read_text()) for path in connections}
    assert encrypted == {zmq.has("curve")}


def test_kernel_is_of_the_python_that_runs_the_workbench(started):
    me = psutil.Process(started.process.pid)
    ask(started, "/api/kernels", token(started), b'{"name": "python3"}')
    commands = [process.cmdline() for process in me.children(recursive=True)]
    kernels = [command for command in commands if "ipykernel_launcher" in command]
    assert kernels
    assert {command[0] for command in kernels} == {sys.executable}


def test_page_fetches_no_news_updates_or_extensions(started):
    page = ask(started, "/lab", token(started))[2]
    config = json.loads(re.search(r'id="jupyter-config-data"[^>]*>(.*?)</script>', page, re.S)[1])
    assert config["news"] == {"disabled": True}
    assert config["extensionManager"]["can_install"] is False
    name = "@jupyterlab/apputils-extension:notification"
    text = ask(started, f"/lab/api/settings/{name}", token(started))[2]
    properties = json.loads(text)["schema"]["properties"]
    assert properties["fetchNews"]["default"] == "false"
    assert properties["checkForUpdates"]["default"] is False
    assert json.loads(ask(started, "/lab/api/update", token(started))[2]) == {"notification": None}


def test_a_configuration_that_opens_the_server_to_others_is_overruled(tmp_path):
    settings = {
        "ServerApp": {
            **{"ip": "0.0.0.0", "port": 9, "certfile": "missing.pem", "base_url": "/other"},  # noqa: S104
            **{"sock": str(tmp_path / "socket"), "allow_remote_access": True, "token": "known"},
        },
        "IdentityProvider": {"token": "known"},
        "PasswordIdentityProvider": {"token": "known"},
    }
    written = tmp_path / "config" / "jupyter_server_config.json"
    written.parent.mkdir()
    written.write_text(json.dumps(settings))
    with running(tmp_path, JUPYTER_PREFER_ENV_PATH="0") as lab:
        me = psutil.Process(lab.process.pid)
        found = me.net_connections(kind="inet")
        assert {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
        assert ask(lab, "/api/contents", "known")[0] == 403
        assert ask(lab, "/api/contents", token(lab))[0] == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_server_and_kernels(number, tmp_path):
    with running(tmp_path, JUPYTER_TOKEN="a token/of?one's own") as lab:
        assert token(lab) == "a token/of?one's own"
        ask(lab, "/api/kernels", token(lab), b'{"name": "python3"}')
        kernels = psutil.Process(lab.process.pid).children(recursive=True)
        assert kernels
        lab.process.send_signal(number)
        out, _ = lab.process.communicate(timeout=30)
        assert lab.process.returncode == 0
        assert out == f"JupyterLab has ended. The notebooks are in {lab.folder}\n"
        # Jupyter's own words of a signal are spared; a kernel may have written what it likes.
        assert "received signal" not in lab.log.read_text()
    assert psutil.wait_procs(kernels, timeout=10)[1] == []


@pytest.fixture
def signals():
    """What the signals do afterwards is what they did before."""
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield former
    for number, handler in former.items():
        signal.signal(number, handler)


def test_second_interrupt_does_not_wait_and_an_ignored_one_stays_ignored(signals):
    asked, during = [], []
    fake = SimpleNamespace(
        io_loop=SimpleNamespace(add_callback=lambda call: call()),
        start=lambda: during.append([signal.getsignal(number) for number in signals]),
        stop=lambda **given: asked.append(given),
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server.serve(fake, lambda: None)
    assert during[0][0] is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)
    server.serve(fake, lambda: None)
    during[1][0](signal.SIGINT, None)
    assert asked == [{"from_signal": True}]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# The notebooks


def test_what_is_in_the_folder_is_kept_and_what_is_missing_is_copied(tmp_path):
    own = {name: (ROOT / "notebooks" / name).read_bytes() for name in NAMES}
    first = server.copy_notebooks(tmp_path / "a" / "b")
    assert first == server.Copied(tuple(NAMES), ())
    assert {path.name: path.read_bytes() for path in (tmp_path / "a/b").iterdir()} == own
    (tmp_path / "a/b" / NAMES[0]).write_text("my own words")
    assert server.copy_notebooks(tmp_path / "a/b") == server.Copied((), tuple(NAMES))
    assert (tmp_path / "a/b" / NAMES[0]).read_text() == "my own words"
    (tmp_path / "a/b" / NAMES[0]).unlink()
    assert server.copy_notebooks(tmp_path / "a/b") == server.Copied((NAMES[0],), tuple(NAMES[1:]))
    assert {name: (ROOT / "notebooks" / name).read_bytes() for name in NAMES} == own


def test_copies_can_be_written_though_the_installation_is_read_only(tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    (own / "x.ipynb").write_text("{}")
    (own / "x.ipynb").chmod(0o444)
    monkeypatch.setattr(server, "notebooks_path", lambda: own)
    server.copy_notebooks(tmp_path / "mine")
    assert (tmp_path / "mine/x.ipynb").stat().st_mode & 0o200


def test_fresh_copies_go_to_the_next_folder_that_is_unused(tmp_path):
    folder = tmp_path / "notebooks"
    assert server.unused(folder) == folder
    folder.mkdir()
    assert server.unused(folder) == tmp_path / "notebooks-2"
    (tmp_path / "notebooks-2").write_text("a file")
    assert server.unused(folder) == tmp_path / "notebooks-3"


def test_an_installed_package_has_its_notebooks_inside(tmp_path, monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    carried = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert carried["notebooks"] == "workbench/_notebooks"
    shutil.copytree(ROOT / "notebooks", tmp_path / carried["notebooks"])
    monkeypatch.setattr(server, "__file__", str(tmp_path / "workbench/lab/server.py"))
    assert server.notebooks_path() == tmp_path / "workbench/_notebooks"
    shutil.rmtree(tmp_path / "workbench/_notebooks")
    with pytest.raises(InputError, match="notebooks are missing"):
        server.notebooks_path()


def test_a_folder_that_can_not_take_copies_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; name a folder"):
        server.copy_notebooks(tmp_path / "file")
    with pytest.raises(InputError, match=r"below can't hold the notebooks \(not a directory\)"):
        server.copy_notebooks(tmp_path / "file" / "below")
    with pytest.raises(InputError, match="the package's own notebooks; name another"):
        server.copy_notebooks(ROOT / "notebooks")
    server.copy_notebooks(tmp_path / "mine")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError, match=r"mine can't hold the notebooks \(permission denied\)"):
        server.copy_notebooks(tmp_path / "mine")


# Ports, missing parts, ssh


def test_a_port_that_was_asked_for_and_is_taken_is_named_and_nothing_written(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        said = refused("notebooks", "--port", port, cwd=tmp_path)
    assert f"error: port {port} can't be listened on (address already in use)" in said
    assert not (tmp_path / "notebooks").exists()


def test_without_jupyterlab_the_message_says_how_to_install_it(tmp_path):
    said = refused("notebooks", cwd=tmp_path, first="import sys; sys.modules['jupyterlab'] = None;")
    assert said == "error: JupyterLab is not installed: pip install jupyterlab"


@pytest.fixture
def opener(tmp_path):
    """A command for $BROWSER that notes what it was asked to open."""
    noted = tmp_path / "opened"
    script = tmp_path / "opener.sh"
    script.write_text(f'#!/bin/sh\necho "$1" >> "{noted}"\n')
    script.chmod(0o755)
    return str(script), noted


def test_a_free_port_is_taken_where_the_usual_is_not_and_a_browser_opened(tmp_path, opener):
    command, noted = opener
    (tmp_path / "notebooks").mkdir()
    with socket.socket() as other:
        try:
            other.bind(("127.0.0.1", server.PORT))
            other.listen()
        except OSError:
            pass  # somebody else's; taken is taken
        with running(tmp_path, "--browser", "--fresh", BROWSER=f"{command} %s") as lab:
            assert urlsplit(lab.url).port != server.PORT
            assert ask(lab, "/api/contents", token(lab))[0] == 200
            for _ in range(100):
                if noted.exists() and noted.read_text().endswith("\n"):
                    break
                time.sleep(0.1)
            assert noted.read_text().startswith("file:")
            assert sorted(path.name for path in (tmp_path / "notebooks-2").iterdir()) == NAMES
            assert list(lab.folder.iterdir()) == []


def test_over_ssh_the_line_that_forwards_is_printed_and_no_browser_opened(tmp_path, opener):
    command, noted = opener
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / NAMES[0]).write_text("{}")
    came = "203.0.113.9 50000 198.51.100.7 2222"
    more = {"SSH_CONNECTION": came, "BROWSER": f"{command} %s", "LOGNAME": "somebody"}
    with running(tmp_path, "--browser", **more) as lab:
        assert ask(lab, "/api/contents", token(lab))[0] == 200
        said = lab.log.read_text()
        port = urlsplit(lab.url).port
        line = f"ssh -N -L {port}:127.0.0.1:{port} -p 2222 somebody@198.51.100.7"
        assert line in said.splitlines()
        kept = f"{len(NAMES) - 1} copied, 1 there already and kept as they are"
        assert said.splitlines()[0] == f"Notebooks in {lab.folder}: {kept}"
        assert "(--fresh copies them anew, into another folder)" in said.splitlines()
    assert not noted.exists()
    assert max(map(len, said.replace(str(tmp_path), "").splitlines())) <= 80


def test_forwarding_names_the_port_of_ssh_only_where_it_is_another(monkeypatch):
    monkeypatch.setenv("LOGNAME", "somebody")
    usual = {"SSH_CONNECTION": "203.0.113.9 50000 2001:db8::7 22"}
    assert server.forwarding({}, 8888) is None
    assert server.forwarding(usual, 8899) == ("ssh -N -L 8899:127.0.0.1:8899 somebody@2001:db8::7")
    unknown = server.forwarding({"SSH_CONNECTION": "of another shape"}, 8888)
    assert unknown == f"ssh -N -L 8888:127.0.0.1:8888 somebody@{socket.gethostname()}"
