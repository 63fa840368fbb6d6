"""Work beside the main thread: the newest question first, long work in between, cells by turns."""

import threading
import time

import pytest

from workbench.lab.jobs import CELLS, MODEL, Cells, Task, Worker


@pytest.fixture
def worker():
    failures = []
    made = Worker(failures.append)
    made.failures = failures
    yield made
    made.close()
    if made.thread is not None:
        made.thread.join(10)
        assert not made.thread.is_alive()


class Log:
    """What a task told, and how it ended."""

    def __init__(self):
        self.shown, self.ended = [], []

    def task(self, steps, name="work"):
        return Task(name, iter(steps), self.shown.append, lambda *how: self.ended.append(how))


def test_long_work_is_shown_step_by_step_and_ends(worker):
    log = Log()
    assert worker.start(log.task(range(3)))
    assert worker.wait(10)
    assert (log.shown, log.ended) == ([0, 1, 2], [("done", None)])


def test_questions_are_answered_between_two_steps_of_long_work(worker):
    log, order, begun = Log(), [], threading.Event()

    def steps():
        for i in range(3):
            order.append(i)
            if i == 0:
                begun.set()
                asked.wait(10)
            yield i

    asked = threading.Event()
    worker.start(log.task(steps()))
    assert begun.wait(10)
    worker.ask(lambda: order.append("question"))
    asked.set()
    assert worker.wait(10)
    assert order == [0, "question", 1, 2]


def test_a_question_that_was_asked_again_is_dropped(worker):
    answered, hold = [], threading.Event()
    worker.ask(lambda: hold.wait(10))
    while worker.question is not None:
        time.sleep(0.001)
    for i in range(5):
        worker.ask(lambda i=i: answered.append(i))
    hold.set()
    assert worker.wait(10)
    assert answered == [4]


def test_only_one_long_work_at_a_time(worker):
    log, hold = Log(), threading.Event()
    assert worker.start(log.task(hold.wait(10) for _ in range(1)))
    assert not worker.start(log.task(range(3)))
    hold.set()
    assert worker.wait(10)
    assert worker.start(log.task(range(3)))


def test_cancelling_ends_long_work_after_its_step_and_closes_it(worker):
    log, closed, begun, go = Log(), [], threading.Event(), threading.Event()

    def steps():
        try:
            for i in range(1000):
                begun.set()
                go.wait(10)
                yield i
        finally:
            closed.append(True)

    worker.start(log.task(steps()))
    assert begun.wait(10)
    worker.cancel()
    go.set()
    assert worker.wait(10)
    assert log.shown == [0]
    assert log.ended == [("cancelled", None)]
    assert closed == [True]
    # The next one isn't cancelled with it.
    again = Log()
    worker.start(again.task(range(2)))
    assert worker.wait(10)
    assert again.ended == [("done", None)]


def test_a_failure_is_told_and_the_thread_goes_on(worker):
    def dies():
        yield 1
        raise RuntimeError("CUDA error: device-side assert")

    log = Log()
    worker.start(log.task(dies()))
    assert worker.wait(10)
    how, error = log.ended[0]
    assert how == "failed"
    assert "CUDA" in str(error)

    def question():
        raise ValueError("no")

    worker.ask(question)
    assert worker.wait(10)
    assert [type(e) for e in worker.failures] == [ValueError]
    worker.start(log.task(range(1)))
    assert worker.wait(10)
    assert log.ended[-1] == ("done", None)


def test_a_failure_of_what_is_told_at_the_end_does_not_end_the_thread(worker):
    def broken(*_how):
        raise TypeError("a bug")

    worker.start(Task("work", iter(range(1)), lambda _found: None, broken))
    assert worker.wait(10)
    assert [type(e) for e in worker.failures] == [TypeError]
    log = Log()
    assert worker.start(log.task(range(2)))
    assert worker.wait(10)
    assert log.ended == [("done", None)]


def test_waiting_may_be_given_up(worker):
    hold = threading.Event()
    worker.ask(lambda: hold.wait(10))
    assert not worker.wait(0.05)
    hold.set()
    assert worker.wait(10)


def test_a_closed_worker_takes_nothing_on():
    closed = Worker(print)
    closed.close()
    assert not closed.start(Log().task(range(1)))
    closed.ask(print)
    assert closed.wait(1)


def test_while_a_cell_runs_the_worker_waits_for_it(worker):
    cells, ran = Cells(), threading.Event()
    cells.begin()
    try:
        worker.ask(ran.set)
        assert not ran.wait(0.1)
    finally:
        cells.end()
    assert ran.wait(10)


def test_a_cell_waits_for_the_step_that_is_running(worker):
    cells, inside, go = Cells(), threading.Event(), threading.Event()
    seen = []

    def question():
        inside.set()
        go.wait(10)
        seen.append("answered")

    worker.ask(question)
    assert inside.wait(10)
    threading.Timer(0.1, go.set).start()
    cells.begin()
    seen.append("cell")
    cells.end()
    assert seen == ["answered", "cell"]


def test_a_cell_that_waits_lends_the_model(worker, monkeypatch):
    CELLS.begin()
    try:
        done = []
        worker.ask(lambda: done.append(1))
        assert worker.wait(10)
        assert done == [1]
        # It has it back: another thread can't take it.
        taken = []
        other = threading.Thread(target=lambda: taken.append(MODEL.acquire(timeout=0.05)))
        other.start()
        other.join()
        assert taken == [False]
    finally:
        CELLS.end()


def test_an_interrupt_leaves_no_cell_without_the_model(worker, capsys, monkeypatch):
    log, inside, go = Log(), threading.Event(), threading.Event()

    def steps():
        inside.set()
        go.wait(10)
        yield 1
        yield 2

    class Interrupted:
        """The lock, at which somebody presses stop once."""

        pressed = False

        def acquire(self):
            if not self.pressed:
                self.pressed = True
                raise KeyboardInterrupt
            go.set()
            return MODEL.acquire()

        __enter__ = staticmethod(MODEL.__enter__)

        def __exit__(self, *_error):
            MODEL.release()

    worker.start(log.task(steps()))
    assert inside.wait(10)
    cells = Cells()
    with monkeypatch.context() as patched:
        patched.setattr("workbench.lab.jobs.MODEL", Interrupted())
        patched.setattr("workbench.lab.jobs.WORKERS", [worker])
        cells.begin()
    assert cells.held == 1
    cells.end()
    assert worker.wait(10)
    assert log.ended == [("cancelled", None)]
    assert "was stopped" in capsys.readouterr().out


def test_an_end_without_a_beginning_is_none():
    Cells().end()
    assert MODEL.acquire(timeout=1)
    MODEL.release()


class Shell:
    """As much of IPython's shell as is listened to."""

    def __init__(self, running):
        self.called = {}
        self.events = self
        self.display_trap = type("Trap", (), {"is_active": running})()

    def register(self, name, function):
        self.called.setdefault(name, []).append(function)


@pytest.mark.parametrize("running", [True, False])
def test_the_cell_that_begins_it_holds_the_model_to_its_end(monkeypatch, running):
    shell, cells = Shell(running), Cells()
    monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: shell)
    cells.watch()
    cells.watch()
    assert {name: len(found) for name, found in shell.called.items()} == {
        "pre_run_cell": 1,
        "post_run_cell": 1,
    }
    assert cells.held == int(running)
    shell.called["post_run_cell"][0](None)
    assert cells.held == 0
