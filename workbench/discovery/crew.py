"""Shards on many machines: workers under Ray, each with its own copy of the model.

Ray keeps the nodes, starts the workers and carries the data; nothing is shared but the network.
The driver alone writes shards, so a run folder needs to be seen by one machine only, and a run
begun here can be finished there.

A shard whose worker is lost goes to the next free worker. Ray could send it again by itself
(`max_task_retries`), but only to the same actor, for which there may be no room left once its node
is gone; the shard would wait for ever.
"""

from __future__ import annotations

import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import torch
from tqdm.auto import tqdm

from workbench.data.prompts import Prompt
from workbench.data.testbed import BUILT_IN, testbed_path
from workbench.discovery.check import Prepared, prepare
from workbench.discovery.cluster import GPU_FAILURES, RayOptions, first_line, nodes, seats
from workbench.discovery.room import keep_freed_memory
from workbench.discovery.scorer import Tick, is_out_of_memory
from workbench.discovery.stages import Shard
from workbench.errors import InputError
from workbench.models import load_model, tensors_id

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LOST = 3  # times a shard may lose its worker, or a worker its process, before it is given up
PATIENCE = 60  # seconds without any worker before a word about it
POLL = 5  # seconds between looks at the cluster while nothing is done


Results = Iterator[tuple[int, pa.Table]]


class Openable(Protocol):
    """A job: pickled, sent to every worker once, and opened there with the worker's model."""

    def open(self, model: TransformerBridge) -> Callable[[Any, Tick], pa.Table]:
        """What does a shard, telling how much is done."""
        ...


class Shards(Protocol):
    """Whatever turns a job's shards into tables."""

    def __call__(self, shards: Sequence[Any], tick: Tick) -> Results:
        """Give each shard's index and table as it is done, in any order."""
        ...


class LostGPUError(RuntimeError):
    """A worker's GPU doesn't answer any more."""


# A worker


@dataclass(frozen=True)
class Source:
    """Where every worker loads the model from, and what it must turn out to be.

    Attributes:
        name: A hub id, a folder (the same path on every node) or a built-in name.
        dtype: As `load_model` takes it.
        revision: The hub's commit.
        trust_remote_code: Whether the model's code comes with it.
        tensors: `tensors_id` of the driver's model.
    """

    name: str
    dtype: str
    revision: str | None
    trust_remote_code: bool
    tensors: str

    @classmethod
    def of(cls, model: TransformerBridge) -> Source:
        """Where a model was loaded from."""
        inner = model.original_model
        name = inner.config._name_or_path
        revision = None
        if Path(name).is_dir():
            # Every node has its own copy of what is built in, installed with the workbench.
            folder = Path(name).resolve()
            own = [one for one in BUILT_IN if folder == testbed_path(one).resolve()]
            name = own[0] if own else str(folder)
        else:
            revision = getattr(inner.config, "_commit_hash", None)
        dtype = str(model.cfg.dtype).removeprefix("torch.")
        foreign = type(inner).__module__.startswith("transformers_modules")
        return cls(name, dtype, revision, foreign, tensors_id(model))


class Replica:
    """A model on a node and what is done with it: an actor of Ray's.

    Nothing happens before `load`: an error in an actor's constructor loses its class on the way.
    """

    def load(self, source: Source, threads: int) -> None:
        """Load the model.

        Args:
            source: From where.
            threads: torch's on a CPU; 0 stands for a GPU.

        Raises:
            InputError: It can't be loaded here, or isn't the driver's.
        """
        with _named():
            keep_freed_memory()
            if threads:
                torch.set_num_threads(threads)
            self.model = load_model(
                source.name,
                device="cpu" if threads else "cuda",
                dtype=source.dtype,
                revision=source.revision,
                trust_remote_code=source.trust_remote_code,
            )
            found = tensors_id(self.model)
            if found != source.tensors:
                raise InputError(
                    f"{source.name} holds other weights here ({found[:12]}) than the model that "
                    f"the run was started with ({source.tensors[:12]}); copy the model there, too. "
                    "A model that was changed in memory must be saved first, and loaded from there"
                )
        self.opened: dict[Any, Callable[[Any, Tick], pa.Table]] = {}

    def prepare(self, *arguments: Any) -> Prepared:
        """See `check.prepare`."""
        with _named():
            return prepare(self.model, *arguments)

    def table(self, job: list[Any], shard: Any) -> tuple[pa.Table, int]:
        """A shard's rows, and how much of the job's progress that was.

        Args:
            job: Ray's reference to the job, in a list so that it isn't fetched anew for each
                shard. Its `open` gives what does shards with a model.
            shard: A piece of the job.
        """
        done = 0

        def count(pairs: int) -> None:
            nonlocal done
            done += pairs

        with _named():
            if job[0] not in self.opened:
                import ray

                self.opened[job[0]] = ray.get(job[0]).open(self.model)
            return self.opened[job[0]](shard, count), done


@contextmanager
def _named() -> Iterator[None]:
    """Say on which node it was that something went wrong."""
    import ray

    node = f"worker on {socket.gethostname()} ({ray.util.get_node_ip_address()})"
    try:
        yield
    except InputError as error:
        raise InputError(f"{node}: {error}") from None
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise InputError(
                f"{node}: out of memory: {first_line(error)} Lower --batch-tokens, or take a "
                "smaller --dtype or fewer --workers; finished shards are kept"
            ) from None
        if any(words in str(error) for words in GPU_FAILURES):
            raise LostGPUError(f"{node}: the GPU failed: {first_line(error)}") from None
        raise


# The driver's side


@dataclass(eq=False)
class _Task:
    """A call that some worker is to answer."""

    method: str
    arguments: tuple[Any, ...]
    title: str
    index: int = 0
    lost: int = 0


@dataclass(eq=False)
class _Seat:
    """A worker's place: the actor that sits there now and what it is at."""

    actor: Any
    future: Any  # None: the worker is free
    task: _Task | None = None  # None while the model is being loaded
    lost: int = 0


class Crew:
    """Workers that do shards of jobs with one model; a context manager, since they must be let go.

    Args:
        model: The driver's. Workers load theirs from where it came from.
        options: How many workers. `connect` must have been entered.

    Raises:
        InputError: So many workers don't fit into the cluster.
    """

    def __init__(self, model: TransformerBridge, options: RayOptions) -> None:
        import ray

        self.source = Source.of(model)
        count, self.needs = seats(nodes(), options.workers)
        # A lost actor is replaced here, with a new future to wait for, not restarted by Ray.
        self.actor = ray.remote(Replica).options(**self.needs, max_restarts=0)
        self.seats: list[_Seat] = []
        for _ in range(count):
            self.seats.append(self._sit())
        self.met = False

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for seat in self.seats:
            with suppress(ray.exceptions.RayError):
                ray.kill(seat.actor)

    def prepare(self, prompts: Sequence[Prompt], *arguments: Any) -> Prepared:
        """`check.prepare`, by the first worker that has its model: on the device that counts.

        Raises:
            InputError: As `check.prepare` does, and where workers are lost.
        """
        task = _Task("prepare", (_slim(prompts), *arguments), "checking the engine")
        return next(result for _, result in self._do([task]))

    def worker(self, job: Openable) -> Shards:
        """What does a job's shards in any order, each with an `index` of its own.

        Raises:
            InputError: When it is called: a worker can't go on, or too many were lost.
        """
        import ray

        return partial(self._tables, ray.put(job))

    def _tables(self, job: Any, shards: Sequence[Any], tick: Tick) -> Results:
        tasks = []
        for shard in shards:
            sent = shard
            if isinstance(shard, Shard):
                sent = replace(shard, prompts=_slim(shard.prompts))
            tasks.append(_Task("table", ([job], sent), f"shard {shard.index}", shard.index))
        for task, (table, done) in self._do(tasks):
            tick(done)
            yield task.index, table

    def _do(self, tasks: Sequence[_Task]) -> Iterator[tuple[_Task, Any]]:
        """Have tasks done, and give each with its result as it comes."""
        todo = deque(tasks)
        left = len(todo)
        while left:
            self._hand_out(todo)
            seat = self._next()
            task, future = seat.task, seat.future
            seat.task = seat.future = None
            result = self._result(seat, task, future, todo)
            if task is None or task in todo:
                continue
            left -= 1
            # Before the caller writes this result: its worker has something to do meanwhile.
            self._hand_out(todo)
            yield task, result

    def _hand_out(self, todo: deque[_Task]) -> None:
        for seat in self.seats:
            if seat.future is None and todo:
                seat.task = todo.popleft()
                seat.future = getattr(seat.actor, seat.task.method).remote(*seat.task.arguments)

    def _next(self) -> _Seat:
        """The next worker that has an answer."""
        import ray

        waiting = {seat.future: seat for seat in self.seats if seat.future is not None}
        waited = 0
        while True:
            done, _ = ray.wait(list(waiting), timeout=POLL)
            if done:
                return waiting[done[0]]
            waited += POLL
            if not any(seat.task for seat in waiting.values()):
                self._check_room()
            if waited == PATIENCE and not self.met:
                tqdm.write(
                    "no worker is ready yet: they are loading the model, or other jobs hold the "
                    "cluster (`ray status` tells); Ctrl-C stops",
                    file=sys.stderr,
                )

    def _result(self, seat: _Seat, task: _Task | None, future: Any, todo: deque[_Task]) -> Any:
        """A future's value; what was lost with its worker goes back to the front of the queue."""
        import ray

        try:
            result = ray.get(future)
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, LostGPUError):
                raise error.cause if isinstance(error.cause, InputError) else error from None
            lost: Exception = error.cause
        except ray.exceptions.RaySystemError as error:
            raise InputError(
                f"Ray can't carry a worker's result here: {first_line(error)} Use the same "
                "versions of Python, torch and the workbench on every node"
            ) from error
        except ray.exceptions.RayError as error:
            if getattr(error, "actor_init_failed", False):
                raise InputError(
                    f"a worker can't be started: {str(error).strip().splitlines()[-1]}. Every node "
                    "needs the same version of the workbench: pip install "
                    "'preference-heads-workbench[ray]'"
                ) from error
            lost = error
        else:
            self.met = True
            seat.lost = seat.lost if task is None else 0
            return result
        self._replace(seat, task, lost)
        if task is not None:
            todo.appendleft(task)
        return None

    def _replace(self, seat: _Seat, task: _Task | None, error: Exception) -> None:
        """Put a new worker into a seat, or give up."""
        import ray

        seat.lost += 1
        title = "loading the model"
        if task is not None:
            task.lost += 1
            title = task.title
        if (task is not None and task.lost >= LOST) or (seat.lost >= LOST and len(self.seats) == 1):
            raise InputError(
                f"{title}: the worker was lost {LOST} times, at last so: {first_line(error)} If it "
                "ran out of memory, lower --batch-tokens or take fewer --workers; finished "
                "shards are kept, and the same command goes on"
            ) from error
        if seat.lost >= LOST:
            self.seats.remove(seat)
            tqdm.write(
                f"a worker was lost {LOST} times and is given up: {first_line(error)}",
                file=sys.stderr,
            )
            return
        tqdm.write(f"a worker was lost ({title}); another goes on", file=sys.stderr)
        with suppress(ray.exceptions.RayError):  # a process whose GPU failed is of no more use
            ray.kill(seat.actor)
        new = self._sit()
        seat.actor, seat.future = new.actor, new.future

    def _sit(self) -> _Seat:
        actor = self.actor.remote()
        return _Seat(actor, actor.load.remote(self.source, self.needs["num_cpus"]))

    def _check_room(self) -> None:
        """Raise where no node is left that a worker could be on."""
        kind = "GPU" if self.needs["num_gpus"] else "CPU"
        need = self.needs["num_gpus"] or self.needs["num_cpus"]
        if not any(node.get(kind, 0) >= need for node in nodes()):
            raise InputError(
                f"the cluster has no node left with {need} {kind}{'s' if need > 1 else ''} for a "
                "worker; add machines with `ray start --address=...` and run the same command "
                "again; finished shards are kept"
            )


def _slim(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts without the profiles behind them, which may be long; the tokens say it all."""
    return [replace(p, example=replace(p.example, profile=())) for p in prompts]
