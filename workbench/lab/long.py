"""The explorer's long work: writing a text, scoring examples. In the background, cancellable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from workbench.data.neutral import BUILTIN, NOBODY, neutral_examples
from workbench.data.testbed import TASKS
from workbench.discovery.parts import joined, score_in_parts
from workbench.errors import InputError
from workbench.figures import text
from workbench.lab.jobs import Task, Worker
from workbench.lab.maps import Maps
from workbench.lab.scored import PCS
from workbench.scores import HeadScores
from workbench.steering.contrast import contrast_name
from workbench.steering.writing import Pair, write_steps

if TYPE_CHECKING:
    from workbench.lab.explorer import Explorer

P = ParamSpec("P")
REDRAWN = 0.1  # seconds between two pictures of a text that is being written


def handles(action: Callable[Concatenate[Any, P], None]) -> Callable[Concatenate[Any, P], None]:
    """An answer to a click: one at a time, and what can't be done is said."""

    @wraps(action)
    def handle(owner: Any, *args: P.args, **kwargs: P.kwargs) -> None:
        explorer = getattr(owner, "explorer", owner)
        with explorer.ui:
            try:
                action(owner, *args, **kwargs)
            except Exception as error:
                # Raised in a callback it would be in the kernel's log, where nobody looks.
                explorer.work.failed(error, "that")

    return handle


class LongWork:
    """What an explorer does that takes long.

    Args:
        explorer: Whose buttons, and where it is shown.
    """

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        self.worker = Worker(self.failed)

    @handles
    def write(self) -> None:
        """Write the example's answer plain and by the contrast that is set."""
        one = self.explorer
        limit = one.controls.tokens.value
        steps = write_steps(
            one.model,
            one.example,
            one.contrast,
            max_new_tokens=limit,
            prompt=one.settings,
            prompts=one.prompts,
        )
        drawn = 0.0

        def show(pair: Pair) -> None:
            nonlocal drawn
            one.pair = pair
            if time.monotonic() - drawn >= REDRAWN:
                drawn = time.monotonic()
                self._show_pair(pair.steps / limit)

        self._start("writing", steps, show, lambda: self._show_pair(1.0))

    @handles
    def score(self) -> None:
        """Score all heads on all examples."""
        one = self.explorer
        every = [example for theirs in one.users.values() for example in theirs]

        # What was scored before a cancelled run was cancelled is gone on with.
        before = one.scored.parts.get(PCS)
        done = set() if before is None else set(before.data["example"].values.tolist())
        left = [example for example in every if example.name not in done]

        def show(scores: HeadScores) -> None:
            whole = scores if before is None else joined(before, scores)
            one.maps = Maps(one.scored.with_own(whole), one.shape)
            one.show_map()
            self._progress((len(done) + scores.data.sizes["example"]) / len(every))
            if one.scored.folder is not None:
                whole.save(one.scored.folder)

        def end() -> None:
            if one.scored.folder is not None:
                one.say(f"scoring: done, kept in {one.scored.folder}")

        steps = score_in_parts(one.model, left, prompt=one.settings)
        self._start(f"scoring {len(left)} examples on {sum(one.shape)} heads", steps, show, end)

    def score_neutral(self, then: Callable[[], None]) -> None:
        """Score all heads on text that has no user.

        Args:
            then: Called when that is done.

        Raises:
            InputError: Something long is going on.
        """
        one = self.explorer
        every = neutral_examples(NOBODY if one.example.task in TASKS else BUILTIN)

        found: list[HeadScores] = []

        def show(scores: HeadScores) -> None:
            found[:] = [scores]
            self._progress(scores.data.sizes["example"] / len(every))

        def end() -> None:
            # Of a part of the text other heads would be the highest.
            one.maps.scored = one.scored.with_neutral(found[0])
            then()

        # An aspect of users' answers is none of this text.
        prompt = None if one.settings is None else replace(one.settings, aspect=None)
        steps = score_in_parts(one.model, every, prompt=prompt)
        name = f"scoring {len(every)} texts without a user on {sum(one.shape)} heads"
        self._start(name, steps, show, end)

    def failed(self, error: Exception, name: str = "the model's answer") -> None:
        """Say what went wrong; nothing that is shown is lost."""
        reason = str(error).strip().split("\n")[0]
        if not isinstance(error, InputError):
            reason = f"{name} failed: {type(error).__name__}: {reason}"
        self.explorer.say(reason, "error")

    def _show_pair(self, part: float) -> None:
        pair = self.explorer.pair
        if pair is None:
            return
        sets = "; ".join(map(str, pair.contrast.head_sets))
        name = f"{contrast_name(pair.contrast)}{f', heads {sets}' if sets else ''}"
        name += f", on {pair.steered.example.name}"
        self.explorer.controls.written.value = text.side_by_side(
            pair.words, pair.pieces, pair.steered.kl, name
        )
        self._progress(part)

    def _progress(self, part: float) -> None:
        self.explorer.controls.progress.value = min(1.0, part)

    def _start(
        self,
        name: str,
        steps: Iterator[Any],
        show: Callable[[Any], None],
        end: Callable[[], None],
    ) -> None:
        one, see = self.explorer, self.explorer.controls

        def shown(found: Any) -> None:
            with one.ui:
                show(found)

        def done(how: str, error: Exception | None) -> None:
            with one.ui:
                for button in (see.write, see.score):
                    button.disabled = False
                see.cancel.disabled = True
                one.say(f"{name}: {how}")
                if error is not None:
                    self.failed(error, name)
                elif how == "done":
                    end()

        if not self.worker.start(Task(name, steps, shown, done)):
            raise InputError("something long is going on already; let it end, or cancel it")
        for button in (see.write, see.score):
            button.disabled = True
        see.cancel.disabled = False
        self._progress(0.0)
        one.say(f"{name} …")
