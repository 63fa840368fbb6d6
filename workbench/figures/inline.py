"""Figures in a notebook: interactive where it is open, and a picture where it is only read."""

from __future__ import annotations

import asyncio
import atexit
import base64
from collections.abc import Coroutine
from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

import plotly.io as pio
from plotly.io.base_renderers import PlotlyRenderer

if TYPE_CHECKING:
    from kaleido import Kaleido

RENDERER = "workbench"
INTERACTIVE, PICTURE = "application/vnd.plotly.v1+json", "image/png"
WAIT = 60.0  # seconds; a browser that neither starts nor draws within them won't
T = TypeVar("T")


def inline(scale: float = 1.0) -> None:
    """Show the figures of this notebook as interactive ones, each with a picture beside it.

    JupyterLab shows the picture until the mouse is over it, and the interactive one from then on.
    Where nothing draws, on a forge or in print, the picture stays. One browser without a network
    draws them all. Without a browser figures are interactive only, and a printed line says so.

    Args:
        scale: Pixels of a picture for each of the figure's.

    Raises:
        ValueError: `scale` is not above 0.
    """
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    before = dict(pio.renderers.items()).get(RENDERER)
    artist = before.artist if isinstance(before, _Renderer) else _Artist()
    artist.start()
    pio.renderers[RENDERER] = _Renderer(artist, scale)
    pio.renderers.default = RENDERER


class _Renderer(PlotlyRenderer):
    """What Plotly asks for the forms of a figure."""

    def __init__(self, artist: _Artist, scale: float) -> None:
        super().__init__()
        self.artist = artist
        self.scale = scale

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
        bundle: dict[str, Any] = super().to_mimebundle(fig_dict)
        picture = self.artist.draw(bundle[INTERACTIVE], self.scale)
        return bundle if picture is None else bundle | {PICTURE: picture}


class _Artist:
    """Draws pictures in one browser, from a thread of its own until the process ends.

    Kaleido's own server waits for ever if its browser doesn't start, and the kernel's event loop
    is busy with the cell that wants the picture.
    """

    def __init__(self) -> None:
        self._browser: Kaleido | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def start(self) -> None:
        """Start the browser unless it runs; say so where there is none."""
        from kaleido.errors import ChromeNotFoundError

        if self._browser is not None:
            return
        try:
            self._browser = self._wait(_open())
        except ChromeNotFoundError:
            print(
                "Figures are interactive only: no Chrome or Chromium was found to draw pictures "
                "of them. Install one (on Debian: apt install chromium) or set BROWSER_PATH."
            )
        except Exception as error:
            self._give_up(error)

    def draw(self, figure: dict[str, Any], scale: float) -> str | None:
        """A figure as PNG of its own size, in base64; None if it can't be drawn."""
        if self._browser is None:
            return None
        try:
            options = {"format": "png", "scale": scale}
            picture = self._wait(self._browser.calc_fig(figure, options))
        # Whatever happens to the picture, the figure itself must be shown.
        except Exception as error:
            asyncio.run_coroutine_threadsafe(self._browser.close(), self._loop)
            self._give_up(error)
            return None
        return base64.b64encode(picture).decode()

    def close(self) -> None:
        """End the browser and the thread, once; nothing can be drawn then."""
        if self._loop.is_closed():
            return
        atexit.unregister(self.close)
        if self._browser is not None:
            # A browser that is slow to end, or a file that it holds on to, is the system's.
            with suppress(OSError):
                self._wait(self._browser.close())
            self._browser = None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT)

    def _give_up(self, error: Exception) -> None:
        self._browser = None
        reason = " ".join(map(str, error.args)) or type(error).__name__
        print(f"Figures are interactive only from here on: the browser failed ({reason}).")


async def _open() -> Kaleido:
    from kaleido import Kaleido

    # Without MathJax, which would come from a CDN.
    browser = Kaleido(mathjax=False, timeout=WAIT / 2)
    await browser.open()
    return browser
