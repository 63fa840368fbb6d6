"""Methods × tasks: settings chosen on validation users, answers of test users, all of them kept.

1. Every method's candidates answer the validation users' queries; the best by the task's primary
   metric is taken, and of equals the first, which is the one that steers least.
2. Random heads are matched, layer by layer, to the set that was chosen for DPS, and DPS + CAD takes
   that set; both have candidates of their own, which answer next: strengths, and no other K.
3. The chosen ones, the plain model and the model without profiles answer the test users' queries.

All methods see the same prompts: the same retrieval and the same truncation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from workbench import runs, tables
from workbench.data.examples import Example
from workbench.data.prompts import Prompt, build_prompts
from workbench.discovery import cluster
from workbench.discovery.cluster import RayOptions
from workbench.discovery.copying import copy_scores, retrieval_heads
from workbench.discovery.crew import Crew
from workbench.errors import InputError
from workbench.evaluation import methods as ways
from workbench.evaluation.choosing import Choice, choose
from workbench.evaluation.findings import COPYING
from workbench.evaluation.methods import Candidate
from workbench.evaluation.protocol import Asked, check_model
from workbench.evaluation.record import manifest_of, write_examples
from workbench.evaluation.results import (
    CHOICES,
    Evaluation,
    load_evaluation,
    stage,
)
from workbench.evaluation.settings import (
    GridSettings,
    check_scores,
    differences_in_words,
    head_sets,
    prompt_differences,
)
from workbench.evaluation.writing import (
    VALIDATION,
    AnswerJob,
    Cell,
    Local,
    Worker,
    Writer,
    clear_parts,
    kept,
)
from workbench.heads import HeadSet, all_heads, random_matched, rank, read_head_scores
from workbench.models import context_length, heads_per_layer
from workbench.scores import HeadScores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

RETRIEVAL = "retrieval-heads.json"


def evaluate(
    model: TransformerBridge,
    asked: Asked,
    folder: Path | str,
    settings: GridSettings | None = None,
    *,
    scores: HeadScores | None = None,
    retrieval: HeadSet | None = None,
    heads_from: str = "the run",
    retrieval_from: str = "a given set",
    ray: RayOptions | None = None,
    progress: bool = True,
) -> Evaluation:
    """Answer all test queries by every method, with settings chosen on validation users.

    The random control is tuned less than DPS: DPS is the best of K x gamma on the validation users,
    each seed's random set, at DPS's K, the best of gamma alone. DPS + CAD is the best of all pairs
    of strengths with DPS's set; its K isn't chosen again. (`analysis.gain` gives random sets the
    gamma that was chosen for DPS.)

    Args:
        model: From `load_model`.
        asked: From `protocol.ask`.
        folder: The run folder. Every shard of answers is kept there when it is done; the same
            call goes on where it was stopped, and with other settings it is refused.
        settings: Methods, their candidates and how answers come about.
        scores: Head scores of this model, for methods with preference heads.
        retrieval: DeCoRe's heads, the highest first; detected with copying probes if None.
        heads_from: What the scores are called in messages.
        retrieval_from: What DeCoRe's heads, if they are given, are called below the table.
        ray: Answer on the workers of a Ray cluster.
        progress: Show a bar on the terminal.

    Returns:
        What the folder holds in the end. A method that can't answer a task (DoLa on a model with
        too few layers) has no answers there, and `choices` says why.

    Raises:
        InputError: As `Asked.check`, `check_scores` and `check_model`; a prompt leaves no room;
            the folder holds another run or is in use; or the plain model gives NaN.
        runs.Stopped: Ctrl-C or SIGTERM; the shards finished so far are kept.
    """
    settings, folder = settings or GridSettings(), Path(folder)
    asked.check(scores)
    names = list(dict.fromkeys(example.task for example in asked.test))
    check_scores(settings, scores, names)
    if scores is not None:
        check_model(scores, model, heads_from)
    counts = settings.head_counts(sum(heads_per_layer(model)))
    sets = head_sets(scores, names, counts) if scores is not None and settings.on_heads else {}
    prompts = {name: _prompts(model, settings, part) for name, part in _groups(asked).items()}
    manifest = manifest_of(model, settings, asked, prompts, sets, retrieval)
    manifest["heads_from"] = heads_from if settings.on_heads else None
    manifest["retrieval_from"] = None if retrieval is None else retrieval_from
    manifest["query_tokens"] = _query_tokens(model, settings, asked.test)
    _tell(manifest, settings, scores, names)
    try:
        with ExitStack() as stack:
            stack.enter_context(runs.hold(folder))
            stop = stack.enter_context(runs.stoppable())
            runs.start(folder, manifest)
            clear_parts(folder)
            write_examples(folder, prompts["test"], asked.leaked)
            worker = _worker(model, _job(settings), ray, stack)
            bar = stack.enter_context(tqdm(unit=" answers", disable=not progress))
            writer = Writer(folder, manifest["settings"]["shard_examples"], stop, bar)
            grid = _Grid(settings, asked, names, sets, heads_per_layer(model), writer, worker)
            if "decore" in settings.methods:
                found = _retrieval(model, retrieval, counts, folder, progress)
                grid.retrieval = {} if isinstance(found, str) else found
                grid.without_retrieval = found if isinstance(found, str) else ""
            grid.run()
    except runs.Stopped:
        raise
    except KeyboardInterrupt:
        raise runs.Stopped(kept(folder), folder) from None
    return load_evaluation(folder)


def _tell(
    manifest: dict[str, Any],
    settings: GridSettings,
    scores: HeadScores | None,
    tasks: Sequence[str],
) -> None:
    """Strengths as tables name them; and, as it changes no answer, beside the settings how the
    prompts that heads were found with differ.
    """
    gammas = [ways.plain_strength(gamma) for gamma in ways.in_order(settings.gamma)]
    manifest["settings"]["gamma"] = gammas
    del manifest["settings"]["other_prompt"]
    if scores is not None and settings.on_heads:
        different = prompt_differences(settings.prompt, scores, tasks)
        manifest["other_prompt"] = differences_in_words(different)


def _groups(asked: Asked) -> dict[str, Sequence[Example]]:
    return {"validation": asked.validation, "test": asked.test}


def _prompts(
    model: TransformerBridge, settings: GridSettings, examples: Sequence[Example]
) -> list[Prompt]:
    return build_prompts(
        examples,
        model.tokenizer,
        context_length(model),
        settings.prompt,
        new_tokens=settings.max_new_tokens,
    )


def _query_tokens(
    model: TransformerBridge, settings: GridSettings, examples: Sequence[Example]
) -> float:
    """Mean tokens of a prompt without profile, CAD's second one; table 3 counts with it."""
    without = replace(settings, prompt=replace(settings.prompt, items=0))
    return float(np.mean([len(prompt.ids) for prompt in _prompts(model, without, examples)]))


def _job(settings: GridSettings) -> AnswerJob:
    return AnswerJob(
        settings.decide == "likelihood",
        settings.prefill,
        settings.max_new_tokens,
        settings.prompt,
        settings.batch_tokens,
    )


def _worker(
    model: TransformerBridge, job: AnswerJob, ray: RayOptions | None, stack: ExitStack
) -> Worker:
    """This process, or workers far away."""
    if ray is None:
        return Local(model, job)
    stack.enter_context(cluster.connect(ray))
    return stack.enter_context(Crew(model, ray)).worker(job)


def _retrieval(
    model: TransformerBridge,
    given: HeadSet | None,
    counts: Sequence[int],
    folder: Path,
    progress: bool,
) -> dict[int, HeadSet] | str:
    """K -> the highest retrieval heads, or why they can't be detected in this model.

    What was detected is kept in the run folder, with how many of them copy above chance.
    """
    shape = heads_per_layer(model)
    if given is None:
        path = folder / RETRIEVAL
        if not path.exists():
            try:
                found = copy_scores(model, progress=progress)
            except InputError as error:
                return f"retrieval heads can't be detected: {error}"
            above = retrieval_heads(found, min(max(counts), sum(shape))).note
            runs.write_text(folder / COPYING, json.dumps({"note": above}) + "\n")
            lists = {
                f"{h.layer}-{h.head}": found.sel(layer=h.layer, head=h.head).values.tolist()
                for h in all_heads(shape)
            }
            runs.write_text(path, json.dumps(lists) + "\n")
        given = HeadSet(tuple(rank(read_head_scores(path, shape))))
    given.check(shape)
    sets = {k: HeadSet(given.heads[:k]) for k in counts if k <= len(given)}
    if not sets:
        raise InputError(f"{len(given)} retrieval heads are too few for K = {counts[0]}")
    return sets


class _Grid:
    """The steps of one evaluation."""

    def __init__(
        self,
        settings: GridSettings,
        asked: Asked,
        tasks: Sequence[str],
        sets: Mapping[str, Mapping[int, HeadSet]],
        shape: Sequence[int],
        writer: Writer,
        worker: Worker,
    ) -> None:
        self.settings = settings
        self.tasks = tasks
        self.sets = sets
        self.shape = shape
        self.writer = writer
        self.worker = worker
        self.retrieval: Mapping[int, HeadSet] = {}
        self.without_retrieval = ""
        self.validation = {t: [e for e in asked.validation if e.task == t] for t in tasks}
        self.test = {t: [e for e in asked.test if e.task == t] for t in tasks}
        fixed = [name for name in settings.methods if name in ways.FIXED]
        self.choices: dict[str, dict[str, Choice]] = {
            task: {name: Choice(ways.fixed(name)) for name in fixed} for task in tasks
        }

    def run(self) -> None:
        """All answers that are missing, and `choices.json`."""
        self.writer.bar.reset(self._count())
        if self.without_retrieval:
            for task in self.tasks:
                self.choices[task]["decore"] = Choice(None, failed=self.without_retrieval)
        self._choose({task: self._independent(task) for task in self.tasks}, "choosing settings")
        self._choose({task: self._dependent(task) for task in self.tasks}, "choosing settings")
        self._save()
        cells = [cell for task in self.tasks for cell in self._final(task)]
        self._write(cells, "answering")
        self._save()

    def _independent(self, task: str) -> dict[str, list[Candidate]]:
        gammas, wanted = self.settings.gamma, self.settings.methods
        found = {}
        if self.settings.on_heads:
            found["dps"] = ways.dps(self.sets[task], gammas)
        if "decore" in wanted and not self.without_retrieval:
            found["decore"] = ways.decore(self.retrieval, gammas)
        if "cad" in wanted:
            found["cad"] = ways.cad(gammas)
        if "dola" in wanted:
            found["dola"] = ways.dola()
        return found

    def _dependent(self, task: str) -> dict[str, list[Candidate]]:
        chosen = self.choices[task]["dps"].candidate if self.settings.on_heads else None
        if chosen is None or chosen.heads is None:
            return {}
        gammas, found = self.settings.gamma, {}
        if ways.RANDOM in self.settings.methods:
            for seed in range(self.settings.seeds):
                rng = np.random.default_rng([self.settings.seed, seed])
                heads = random_matched(chosen.heads, self.shape, rng)
                found[f"{ways.RANDOM}-{seed}"] = ways.random(heads, gammas)
        if ways.BOTH in self.settings.methods:
            found[ways.BOTH] = ways.both(chosen.heads, gammas)
        return found

    def _choose(self, candidates: Mapping[str, Mapping[str, list[Candidate]]], title: str) -> None:
        """Have candidates answer the validation queries and take the best of each method."""
        cells: dict[tuple[str, str], list[Cell]] = {}
        for task, by_name in candidates.items():
            for name, group in by_name.items():
                cells[task, name] = [
                    Cell(f"{VALIDATION}/{task}/{name}-{c.key}", self.validation[task], c)
                    for c in group
                ]
        self._write([cell for group in cells.values() for cell in group], title)
        likelihood = self.settings.decide == "likelihood"
        for (task, name), tried in cells.items():
            found = [(cell.candidate, self._outcome(cell)) for cell in tried]
            self.choices[task][name] = choose(self.validation[task], found, likelihood)

    def _outcome(self, cell: Cell) -> list[str] | str:
        texts = self.writer.texts(cell)
        return self.writer.failed[cell.stage] if texts is None else texts

    def _final(self, task: str) -> list[Cell]:
        cells = []
        for method in self.settings.methods:
            names = [name for name in self.choices[task] if _method(name) == method]
            for name in names:
                candidate = self.choices[task][name].candidate
                if candidate is not None:
                    seed = int(name.rpartition("-")[2]) if method == ways.RANDOM else 0
                    cells.append(Cell(stage(task, method, seed), self.test[task], candidate))
        return cells

    def _write(self, cells: Sequence[Cell], title: str) -> None:
        self.writer.bar.set_description(title)
        self.writer.write(self.worker, cells)

    def _count(self) -> int:
        """Answers that the whole grid takes, if no candidate fails."""
        s, total = self.settings, 0
        for task in self.tasks:
            tried = sum(map(len, self._independent(task).values()))
            seeds = s.seeds if ways.RANDOM in s.methods else 0
            strengths = len(ways.in_order(s.gamma))
            tried += strengths * seeds + strengths**2 * (ways.BOTH in s.methods)
            final = len(s.methods) + max(0, seeds - 1)
            total += tried * len(self.validation[task]) + final * len(self.test[task])
        return total

    def _save(self) -> None:
        value = {task: self._records(task) for task in self.tasks}
        path = self.writer.folder / CHOICES
        runs.write_text(path, json.dumps(tables.plain(value), indent=1) + "\n")

    def _records(self, task: str) -> dict[str, Any]:
        """Method -> its choice; one of random heads has a list of choices, a seed each."""
        records: dict[str, Any] = {}
        for name, choice in self.choices[task].items():
            method, record = _method(name), choice.record()
            failed = self.writer.failed.get(stage(task, method, 0))
            if failed:
                record["failed"] = failed
            if method == ways.RANDOM:
                records.setdefault(method, {"seeds": []})["seeds"].append(record)
            else:
                records[method] = record
        for method in self.settings.methods:
            if method not in records:  # only where DPS, from which they start, failed itself
                records[method] = {"failed": f"no DPS set: {records['dps']['failed']}"}
        return records


def _method(name: str) -> str:
    return ways.RANDOM if name.startswith(f"{ways.RANDOM}-") else name
