"""JupyterLab on a copy of the notebooks: on this machine's own address, behind a token.

The server is JupyterLab's own, started in this process. What a configuration file of the user's
says of address, port, token and certificate is overruled, as a command line does it; all else in
it (themes, keys, extensions) holds. Kernels are of the Python that runs this.
"""

from __future__ import annotations

import errno
import getpass
import os
import secrets
import shutil
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING
from urllib.parse import quote

from workbench.errors import InputError

if TYPE_CHECKING:
    from jupyter_server.serverapp import ServerApp

ADDRESS = "127.0.0.1"
PORT = 8888
SSH_PORT = "22"
# JupyterLab would ask on its first page whether to fetch news; here the setting is "no".
_SETTINGS = Path(__file__).resolve().parent / "jupyter"


@dataclass(frozen=True)
class Copied:
    """The notebooks of a folder, by name.

    Attributes:
        new: Copied now.
        kept: Were there before, and are as they were.
    """

    new: tuple[str, ...]
    kept: tuple[str, ...]


def notebooks_path() -> Path:
    """The folder of the package's own notebooks.

    Raises:
        InputError: It isn't there.
    """
    package = Path(__file__).resolve().parent.parent
    # A wheel carries them inside the package, a checkout beside it.
    for folder in (package / "_notebooks", package.parent / "notebooks"):
        if any(folder.glob("*.ipynb")):
            return folder
    raise InputError("the package's notebooks are missing; install the workbench again")


def copy_notebooks(folder: Path) -> Copied:
    """Copy the package's notebooks into a folder; what is there already stays as it is.

    Raises:
        InputError: The folder is a file or the package's own, or can't be made or written.
    """
    own = notebooks_path()
    if folder.resolve() == own:
        raise InputError(f"{folder} holds the package's own notebooks; name another for the copies")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the notebooks")
    new, kept = [], []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        for path in sorted(own.glob("*.ipynb")):
            if (folder / path.name).exists():
                kept.append(path.name)
                continue
            # Contents only: a read-only installation would make read-only copies.
            shutil.copyfile(path, folder / path.name)
            new.append(path.name)
    except OSError as error:
        raise InputError(
            f"{folder} can't hold the notebooks ({_reason(error)}); name another folder"
        ) from None
    return Copied(tuple(new), tuple(kept))


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def unused(folder: Path) -> Path:
    """The folder if nothing is there, or the first of folder-2, folder-3 … that is unused."""
    number, found = 1, folder
    while found.exists():
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


def check(port: int | None = None) -> None:
    """Look whether a server could start, before anything is written.

    Raises:
        InputError: JupyterLab isn't installed, or the port that was asked for is taken.
    """
    if find_spec("jupyterlab") is None:
        raise InputError("JupyterLab is not installed: pip install jupyterlab")
    if port is None:
        return
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            tried.bind((ADDRESS, port))
        except OSError as error:
            raise InputError(
                f"port {port} can't be listened on ({_reason(error)}); name another, or none for "
                "a free one"
            ) from None


def prepare(folder: Path, port: int | None = None, token: str = "") -> ServerApp:
    """A JupyterLab server with its port and token; it listens when it is served.

    Args:
        folder: What it shows.
        port: A free one, 8888 if it is, where none is given.
        token: A fresh random one where none is given.

    Raises:
        InputError: JupyterLab doesn't start.
    """
    from jupyterlab.labapp import LabApp

    token = token or secrets.token_urlsafe(24)
    paths = (str(_SETTINGS), os.environ.get("JUPYTER_CONFIG_PATH"))
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, paths))
    # A kernel `python3` of the user's may be of a Python without the workbench.
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    try:
        return LabApp.initialize_server(argv=_options(folder.resolve(), port, token))
    except SystemExit:
        raise InputError("JupyterLab did not start; what it said is above") from None


def _options(folder: Path, port: int | None, token: str) -> list[str]:
    """JupyterLab's command line."""
    import zmq

    server = {
        "ip": ADDRESS,
        "port": port or PORT,
        "port_retries": 0 if port else 50,
        "sock": "",
        "certfile": "",
        "keyfile": "",
        "base_url": "/",
        "allow_remote_access": False,
        "allow_root": True,  # who is root already opens no more to others by this
        "answer_yes": True,
        "open_browser": False,
        "root_dir": folder,
        "preferred_dir": folder,
        "identity_provider_class": "jupyter_server.auth.identity.PasswordIdentityProvider",
    }
    lab = {
        # Without these JupyterLab asks its own sites for news, updates and extensions.
        "news_url": None,
        "check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        "extension_manager": "readonly",
    }
    told = [f"--ServerApp.{name}={value}" for name, value in server.items()]
    told += [f"--LabApp.{name}={value}" for name, value in lab.items()]
    told.append(f"--PasswordIdentityProvider.token={token}")
    if zmq.has("curve"):  # what kernels are told and answer is encrypted on its way too
        told.append("--KernelManager.transport_encryption=auto")
    return [*told, "--Application.log_level=ERROR"]


def serve(server: ServerApp, ready: Callable[[], None]) -> None:
    """Answer until Ctrl-C or SIGTERM; then end the kernels and the server.

    `ready` is called as soon as the server listens.

    A second Ctrl-C doesn't wait for the kernels. A signal that is ignored (`nohup`) stays so.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        server.stop(from_signal=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    # Jupyter's loop begins to listen in its first callback; this one comes behind it.
    server.io_loop.add_callback(ready)
    server.start()


def address(server: ServerApp) -> str:
    """Where a browser finds the server, its token in it."""
    token = quote(server.identity_provider.token, safe="")
    return f"http://{ADDRESS}:{server.port}/lab?token={token}"


def forwarding(environment: Mapping[str, str], port: int) -> str | None:
    """The line that brings the server's port to one's own machine; None where ssh isn't in use.

    The machine is named by the address that the ssh connection came in at.
    """
    connection = environment.get("SSH_CONNECTION", "").split()
    if not connection:
        return None
    machine, ssh_port = connection[2:] if len(connection) == 4 else (socket.gethostname(), SSH_PORT)
    way = "" if ssh_port == SSH_PORT else f"-p {ssh_port} "
    return f"ssh -N -L {port}:{ADDRESS}:{port} {way}{getpass.getuser()}@{machine}"
