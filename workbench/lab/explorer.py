"""The explorer: click a head and see at once what it does for this user.

It computes nothing of its own: what it shows comes from the functions that the package exports
(`head_map`, `choose_heads`, `token_change`, `next_tokens`, `attended`, `write`).
"""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import plotly.graph_objects as go
import xarray as xr

from workbench.analysis.head_map import choose_heads
from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings
from workbench.discovery.attended import attended
from workbench.errors import InputError
from workbench.figures import text
from workbench.figures.head_map import TRACES, chosen
from workbench.figures.head_map import head_map as draw_map
from workbench.heads import Head, HeadSet
from workbench.lab.code import code, said
from workbench.lab.controls import PRESETS, VIEWS, Controls
from workbench.lab.jobs import CELLS
from workbench.lab.long import LongWork, handles
from workbench.lab.maps import Maps, unscored
from workbench.lab.scored import PCS, Given, Scored
from workbench.models import heads_per_layer
from workbench.steering.contrast import Contrast
from workbench.steering.prompts import PromptCache
from workbench.steering.reading import Reading, read_target
from workbench.steering.writing import Pair

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Explorer(widgets.VBox):
    """What heads do for a user; see `explore`.

    Attributes:
        heads: The chosen heads.
        example: The example that is looked at.
        contrast: The contrast that is set, with the chosen heads.
        reading: The example's target under the plain, the ablated and the steered model; None
            until the first answer.
        pair: The last text that was written, plain and steered.
    """

    def __init__(
        self,
        model: TransformerBridge,
        examples: Sequence[Example],
        scores: Given = None,
        *,
        prompt: PromptSettings | None = None,
        k: int = 8,
    ) -> None:
        # First of all: whatever is refused below, `close` is called in the end.
        self.ui = threading.RLock()
        self.work = LongWork(self)
        if not examples:
            raise InputError("there is no example to explore; load some")
        self.model = model
        self.shape = heads_per_layer(model)
        self.prompts = PromptCache(model)
        self.users: dict[str, list[Example]] = {}
        for one in examples:
            self.users.setdefault(one.user, []).append(one)
        scored = Scored.of(scores, model)
        self.settings = scored.prompt(prompt)
        self.maps = Maps(scored, self.shape)
        self.heads = HeadSet(())
        self.preset: str | None = None
        self.seed = 0
        self.reading: Reading | None = None
        self.pair: Pair | None = None
        self.example = examples[0]
        total = sum(self.shape)
        self.table = unscored(self.shape)
        self.controls = Controls(
            _map_widget(self.table),
            list(self.users),
            list(self.scored.parts) or [PCS],
            self.maps.clustered,
            total,
            min(k, total),
        )
        super().__init__(self.controls.layout(), layout=widgets.Layout(padding="6px"))
        self.add_class("workbench-explorer")
        self._listen()
        self._choose_user()
        for note in self.scored.notes:
            self.say(note, "error")

    # What the user does

    def _listen(self) -> None:
        see = self.controls

        def on(widget: widgets.Widget, action: Callable[[], None]) -> None:
            widget.observe(lambda _change: action(), "value")

        on(see.user, self._choose_user)
        on(see.example, self._choose_example)
        on(see.of, self.show_map)
        on(see.part, self.show_map)
        on(see.heads, self._type_heads)
        on(see.k, self._change_k)
        settings = (see.contrast, see.gamma, see.strength, see.plausible, see.max_kl)
        for widget in (*settings, see.attending, see.tokens):
            on(widget, self._ask)
        for widget in (see.view, see.position):
            on(widget, self._show_reading)
        for name, button in see.presets.items():
            button.on_click(lambda _button, name=name: self._preset(name))
        see.score.on_click(lambda _button: self.work.score())
        see.write.on_click(lambda _button: self.work.write())
        see.cancel.on_click(lambda _button: self.work.worker.cancel())
        see.save.on_click(lambda _button: self._save())
        for trace in ("scores", "unscored"):
            see.map.data[TRACES.index(trace)].on_click(self._click)

    @handles
    def _choose_user(self) -> None:
        theirs = self.users[self.controls.user.value]
        # Each with its place among the user's, as two queries may begin alike.
        options = [
            (f"{i + 1}. {one.name}: {' '.join(one.query.split())[:40]}", one)
            for i, one in enumerate(theirs)
        ]
        # Without a choice first: of two equal ones nobody would be told.
        self.controls.example.value = None
        self.controls.example.options = options
        self.controls.example.value = theirs[0]
        self.show_map()

    @handles
    def _choose_example(self) -> None:
        example = self.controls.example.value
        if example is None:
            return
        self.example = example
        # What was said of another example must not stand beside this one.
        self.reading = None
        self.controls.change.value = self.controls.next.value = ""
        self.controls.attention.show(None)
        try:
            prompt = self.prompts.build([example], self.settings, 0)[0]
        except InputError:
            # It is shown all the same, so that one sees what is too long.
            self.controls.text.value = text.example_text(example)
            raise
        self.controls.text.value = text.example_text(example, prompt.shown, prompt.cut_tokens)
        self.controls.position.value = 0
        self._ask()

    @handles
    def _click(self, _trace: object, points: Any, _state: object) -> None:
        for layer, head in zip(points.ys, points.xs, strict=True):
            clicked = Head(int(layer), int(head))
            kept = [one for one in self.heads if one != clicked]
            if len(kept) == len(self.heads):
                kept.append(clicked)
            self.preset = None
            self._set(HeadSet(tuple(kept)), clicked)

    @handles
    def _type_heads(self) -> None:
        typed = self.controls.heads.value
        if typed == said(self.heads):
            return
        try:
            heads = HeadSet.load(typed) if typed.endswith(".json") else HeadSet.parse(typed)
            heads.check(self.shape)
        except InputError:
            self.controls.heads.value = said(self.heads)
            raise
        self.preset = None
        self._set(heads)

    @handles
    def _preset(self, name: str) -> None:
        self.seed += name == "random" and self.preset == name
        kind = PRESETS[name][0]
        if kind == "capability" and self.scored.neutral is None:
            self.work.score_neutral(lambda: self._preset(name))
            return
        k = self.controls.k.value
        capability = self.scored.neutral
        heads = choose_heads(kind, self.table, k, capability=capability, seed=self.seed)
        self.preset = name
        self._set(heads)

    @handles
    def _change_k(self) -> None:
        if self.preset is not None:
            seed, self.seed = self.seed, self.seed - (self.preset == "random")
            self._preset(self.preset)
            self.seed = seed

    @handles
    def _save(self) -> None:
        path = Path(self.controls.path.value.strip() or "heads.json")
        if path.exists():
            HeadSet.load(path)  # which refuses to be taken for one: nothing else is overwritten
        try:
            self.heads.save(path)
        except OSError as error:
            raise InputError(f"{path}: can't be written: {error.strerror}") from None
        self.say(f"{len(self.heads)} heads are in {path}")

    # What it leads to

    @property
    def scored(self) -> Scored:
        """The scores at hand."""
        return self.maps.scored

    @property
    def contrast(self) -> Contrast:
        """The contrast that is set, with the chosen heads."""
        return self.controls.chosen_contrast(self.heads)[0]

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until every click has been answered and no text is being written.

        Args:
            seconds: At most so long; None for as long as it takes.

        Returns:
            Whether it has.
        """
        return self.work.worker.wait(seconds)

    def choose(self, heads: HeadSet | str) -> None:
        """Choose heads from code; `L3H5, L4H0` or a set.

        Raises:
            InputError: A head is outside the model.
        """
        found = HeadSet.parse(heads) if isinstance(heads, str) else heads
        found.check(self.shape)
        with self.ui:
            self.preset = None
            self._set(found)

    def say(self, message: str, kind: str = "") -> None:
        """Put a line under the buttons; of kind `error` in a colour that is seen."""
        color = "var(--jp-error-color1, #b2182b)" if kind == "error" else "inherit"
        self.controls.status.value = (
            f'<div role="status" style="color:{color};line-height:1.4">{html.escape(message)}</div>'
        )

    def _set(self, heads: HeadSet, attending: Head | None = None) -> None:
        see = self.controls
        self.heads = heads
        see.heads.value = said(heads)
        self._frame()
        names = [str(head) for head in heads]
        before = see.attending.value
        see.attending.options = names
        wanted = str(attending) if attending in heads else before
        if names:
            see.attending.value = wanted if wanted in names else names[0]
        self.say("")
        self._ask()

    def _frame(self) -> None:
        """Frames on the map around the chosen heads."""
        figure = self.controls.map
        drawn = chosen(self.heads, 20.0)
        with figure.batch_update():
            for name, trace in zip(TRACES[-2:], drawn, strict=True):
                figure.data[TRACES.index(name)].update(x=trace.x, y=trace.y)

    @handles
    def show_map(self) -> None:
        """Draw the head map that is asked for."""
        see = self.controls
        self.table, note = self.maps.table(see.of.value, see.part.value, self.example.user)
        new = draw_map(self.table, self.heads)
        see.title.value = text.title(new.layout.title.text, new.layout.title.subtitle.text)
        with see.map.batch_update():
            for old, trace in zip(see.map.data, new.data, strict=True):
                old.update(trace.to_plotly_json())
            see.map.layout.coloraxis = new.layout.coloraxis
        see.score.layout.display = "none" if self._all_scored() else ""
        if self.preset in ("top K", "random"):
            self._change_k()
        if note:
            self.say(note)

    def _ask(self) -> None:
        """Ask the model about the example as everything is set now."""
        see = self.controls
        contrast, written = see.chosen_contrast(self.heads)
        see.code.value = code(self.example, self.heads, written, self.settings, see.tokens.value)
        example, heads = self.example, self.heads
        looking = see.attending.value
        attending = HeadSet.parse(looking) if looking in map(str, heads) else None

        def answer() -> None:
            reading = read_target(
                self.model, example, heads, contrast, prompt=self.settings, prompts=self.prompts
            )
            with self.ui:
                if example is not self.example:
                    return  # another one is looked at by now
                self.reading = reading
                self._show_reading()
            table = None
            if attending is not None:
                table = attended(self.model, reading.prompt, attending)
            with self.ui:
                if example is self.example:
                    see.attention.show(table)

        self.work.worker.ask(answer)

    @handles
    def _show_reading(self) -> None:
        see, reading = self.controls, self.reading
        if reading is None:
            return
        see.change.value = text.token_change(reading.token_change(), VIEWS[see.view.value])
        see.position.max = len(reading.texts) - 1
        place = min(see.position.value, len(reading.texts) - 1)
        see.next.value = text.next_tokens(reading.next_tokens(place, 8))

    def close(self) -> None:
        """End its thread, take it off the page, and let go of the model."""
        self.work.worker.close()
        see = vars(self).get("controls")
        for one in [] if see is None else [*vars(see).values(), *see.presets.values()]:
            if isinstance(one, widgets.Widget):
                one.unobserve_all()
                one.close()
        super().close()
        self.__dict__.pop("model", None)

    def __repr__(self) -> str:
        """What is shown where widgets aren't."""
        examples = sum(map(len, self.users.values()))
        return f"Explorer({len(self.users)} users, {examples} examples, {sum(self.shape)} heads)"

    def _all_scored(self) -> bool:
        own = self.scored.parts.get(PCS)
        done = set() if own is None else set(own.data["example"].values.tolist())
        # A map of other users' scores is as it was asked for.
        mine = {one.name for theirs in self.users.values() for one in theirs}
        return bool(done) and not (done & mine and mine - done)


def explore(
    model: TransformerBridge,
    examples: Sequence[Example],
    scores: Given = None,
    *,
    prompt: PromptSettings | None = None,
    k: int = 8,
) -> Explorer:
    """Explore what heads do for users, in JupyterLab.

    A click on the head map takes a head into the set or out of it. For the set it shows what each
    token of the target gains or loses, the next tokens of the plain, the ablated and the steered
    model, what a head looks at, and on demand the text that is written plain and steered.

    Args:
        model: From `load_model`.
        examples: What to look at.
        scores: What the map shows. `HeadScores`; several by name, `own`, `stranger`, `none`,
            `shuffled` (`counterfactual_scores`) and `neutral`; a run folder of `score_heads` or
            `probe`; or nothing, and a button scores the examples in the background. A folder
            that isn't there yet is where those scores are then kept.
        prompt: How prompts are built; as the scores were made by default.
        k: Heads of a preset, at first.

    Returns:
        The widget. Its `heads`, `example`, `contrast`, `reading` and `pair` are there for the
        cells that follow; `choose` sets its heads.

    Raises:
        InputError: There is no kernel that could show a widget, no example, or the scores are of
            another model or prompt.
    """
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    if getattr(shell, "kernel", None) is None:
        raise InputError(
            "an explorer needs a Jupyter kernel, as `workbench lab` starts one; without it the "
            "same is there as functions: head_map, choose_heads, token_change, next_tokens, "
            "attended and write"
        )
    explorer = Explorer(model, examples, scores, prompt=prompt, k=k)
    CELLS.watch()
    return explorer


def _map_widget(table: xr.Dataset) -> go.FigureWidget:
    """The head map; its title stands above it, since Plotly loses its place when it changes."""
    figure = draw_map(table)
    above = figure.layout.margin.t - 12
    height = figure.layout.height - above
    margin = {**figure.layout.margin.to_plotly_json(), "t": 12}
    return go.FigureWidget(figure.update_layout(title=None, height=height, margin=margin))
