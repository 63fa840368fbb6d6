"""Model work beside the kernel's main thread: one thing at a time, the newest question first.

A click asks a question that takes a part of a second; writing a text or scoring examples takes
long. One thread does both. Long work is an iterator that is advanced step by step, and between two
steps a waiting question is answered. A question that has been asked again meanwhile is dropped.

A model with hooks in it must not be used from two threads. Every step holds `MODEL`; while a cell
of the notebook runs, the cell holds it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

MODEL = threading.RLock()
"""Held by whoever uses a model in this process: a cell, or a step of a worker."""


class Cells:
    """Holds `MODEL` while a cell runs.

    `MODEL` is only ever taken and given back here by the thread that runs cells.
    """

    def __init__(self) -> None:
        self.shell: Any = None
        self.held = 0

    def watch(self) -> None:
        """Begin, where there is a notebook; once for a process."""
        from IPython.core.getipython import get_ipython

        shell = get_ipython()
        if shell is None or shell is self.shell:
            return
        self.shell = shell
        shell.events.register("pre_run_cell", self.begin)
        shell.events.register("post_run_cell", self.end)
        # A cell that asks for this is running already, and its end will be told.
        if shell.display_trap.is_active:
            self.begin()

    def begin(self, _info: object = None) -> None:
        """A cell begins: it waits for the step that a worker is at.

        IPython runs the cell whatever comes of this, so that an interrupt must not leave it
        without the model: it ends the workers' long work, and the cell has what it waited for.
        """
        while True:
            try:
                MODEL.acquire()
                break
            except KeyboardInterrupt:
                for worker in list(WORKERS):
                    worker.cancel()
                print("the explorer's work was stopped; this cell goes on. Stop again to end it")
        self.held += 1

    def end(self, _result: object = None) -> None:
        """A cell has ended; its beginning may have been before anybody listened."""
        if self.held:
            self.held -= 1
            MODEL.release()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let workers use the model while a cell waits for them."""
        count = self.held
        for _ in range(count):
            MODEL.release()
        try:
            yield
        finally:
            for _ in range(count):
                MODEL.acquire()


CELLS = Cells()
WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()
"""All workers of this process."""


@dataclass(frozen=True)
class Task:
    """Long work.

    Attributes:
        name: What it is called.
        steps: Advanced until it ends.
        show: Given what each step yields.
        done: Told how it ended: `done`, `cancelled`, or `failed`, then with the error.
    """

    name: str
    steps: Iterator[Any]
    show: Callable[[Any], None]
    done: Callable[[str, Exception | None], None]


class Worker:
    """A thread that answers questions, and does long work in between.

    Args:
        failed: Given an error that a question ended in.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self.failed = failed
        self.state = threading.Condition()
        self.question: Callable[[], Any] | None = None
        self.answering = False
        self.task: Task | None = None
        self.cancelled = False
        self.closed = False
        self.thread: threading.Thread | None = None
        WORKERS.add(self)

    def ask(self, question: Callable[[], None]) -> None:
        """Answer a question as soon as may be; one that still waits is forgotten."""
        with self.state:
            if self.closed:
                return
            self.question = question
            self._wake()

    def start(self, task: Task) -> bool:
        """Begin long work; False while other long work is going on."""
        with self.state:
            if self.task is not None or self.closed:
                return False
            self.task, self.cancelled = task, False
            self._wake()
            return True

    def cancel(self) -> None:
        """End long work after the step that it is at."""
        with self.state:
            self.cancelled = True

    def close(self) -> None:
        """End the thread after what it is at."""
        with self.state:
            self.closed = self.cancelled = True
            self.question = None
            self.state.notify_all()

    @property
    def busy(self) -> bool:
        """Whether anything is to be done."""
        return self.question is not None or self.answering or self.task is not None

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing is to be done; False if that takes longer than so many seconds."""
        with CELLS.lent(), self.state:
            return self.state.wait_for(lambda: not self.busy, seconds)

    def _wake(self) -> None:
        if self.thread is None and not self.closed:
            # A daemon: a kernel that is shut down must not wait for a text.
            self.thread = threading.Thread(target=self._run, name="workbench", daemon=True)
            self.thread.start()
        self.state.notify_all()

    def _run(self) -> None:
        while True:
            with self.state:
                self.state.notify_all()
                self.state.wait_for(lambda: self.closed or self.busy)
                if self.closed and self.task is None:
                    return
                question, self.question = self.question, None
                self.answering = question is not None
                task = self.task
            if question is not None:
                self._answer(question)
            elif task is not None:
                self._advance(task)

    def _answer(self, question: Callable[[], Any]) -> None:
        try:
            with MODEL:
                question()
        except Exception as error:
            self.failed(error)
        finally:
            with self.state:
                self.answering = False

    def _advance(self, task: Task) -> None:
        how, why = "", None
        try:
            with MODEL:
                if self.cancelled:
                    how = "cancelled"
                    getattr(task.steps, "close", int)()
                else:
                    task.show(next(task.steps))
        except StopIteration:
            how = "done"
        except Exception as error:
            how, why = "failed", error
        if not how:
            return
        try:
            task.done(how, why)
        except Exception as error:
            # Whatever it is, the thread goes on: the next click is answered.
            self.failed(error)
        finally:
            with self.state:
                self.task = None
