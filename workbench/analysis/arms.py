"""What each arm of the comparison of `routing.py` decodes against.

| arm | gates of the view that is decoded against |
|---|---|
| `plain` | none: the plain model |
| `global` | one weight map, of all discovery users together |
| `hard`, `soft` | of the nearest cluster; of all, mixed by softmax(-distance / temperature) |
| `soft-tempered` | as `soft`, at the temperature of `temperature_from_distances` |
| `random-clusters` | as `hard`, with all users dealt to clusters of the same sizes at random |
| `random-weights` | `global` with its weights permuted over the heads of each layer |
| `random-mask` | random heads, in each layer as many as `global` weighs, removed whole |
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workbench.data.examples import Example
from workbench.heads import Gates, Head, HeadSet, random_matched
from workbench.scores import HeadScores
from workbench.steering.routing import (
    SHARE,
    USERS,
    Router,
    gates_of,
    head_weights,
    is_uniform,
    route,
    routing_entropy,
    temperature_from_distances,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ROUTED = ("hard", "soft", "soft-tempered")
# What each random arm is drawn in the place of.
RIVALS = {"random-clusters": "hard", "random-weights": "global", "random-mask": "global"}
ARMS = ("plain", "global", *ROUTED, *RIVALS)
MAPS = ("global", "random-weights", "random-mask")


@dataclass(frozen=True)
class RoutingSettings:
    """How users are clustered, weighed and routed.

    Attributes:
        size: Users of a cluster, about; the testbed's 48 users make one cluster of 100 and four
            of 12.
        clusters: How many clusters instead.
        share: Fraction of the heads that a cluster keeps; of 32 heads 0.04 keeps one.
        power: Weights are raised to it.
        temperature: Of the arm `soft`.
        target: Mean normalised entropy that the temperature of `soft-tempered` is chosen for, on
            the discovery users.
        embedder: As `make_embedder` takes it.
    """

    size: int = USERS
    clusters: int | None = None
    share: float = SHARE
    power: float = 1.0
    temperature: float = 1.0
    target: float = 0.5
    embedder: str = "tfidf"


@dataclass(frozen=True)
class Plan:
    """What one task's arms decode against, and what is known of them before.

    Attributes:
        gates: Of each arm, one or one a draw: for all users, or by user.
        known: Columns of the table that need no answer: of the task, or [arm].
    """

    gates: dict[str, list[Gates | dict[str, Gates]]]
    known: dict[str, Any]


def plan_arms(
    model: TransformerBridge,
    scores: HeadScores,
    discovery: Sequence[Example],
    asked: Sequence[Example],
    options: tuple[RoutingSettings, int, int],
) -> Plan:
    """The arms of one task.

    Args:
        model: Whose heads, and for `residual` whose stream.
        scores: On discovery users, of all tasks.
        discovery: The scored examples, likewise.
        asked: One task's examples, by other users.
        options: How users are routed, draws of each random arm, and their seed.

    Raises:
        InputError: What `Router.fit`, `Router.distances` and `temperature_from_distances` refuse.
    """
    settings, draws, seed = options
    task = asked[0].task
    part = scores.select(tasks=[task])
    seen = [example for example in discovery if example.task == task]
    router = Router.fit(
        part,
        seen,
        embedder=settings.embedder,
        model=model,
        size=settings.size,
        clusters=settings.clusters,
        share=settings.share,
        power=settings.power,
        seed=seed,
    )
    users, distances = router.distances(asked)
    rng = _rng(seed, task)
    drawn = random_maps(weight_map(part, settings.share, settings.power), draws, seed, task)
    gates: dict[str, list[Gates | dict[str, Gates]]] = {
        name: [Gates.from_weights(one, router.heads_per_layer) for one in maps]
        for name, maps in drawn.items()
    }
    temperatures = {"soft": settings.temperature}
    if len(router.weights) > 1:
        own = router.distances(seen)[1]
        temperatures["soft-tempered"] = temperature_from_distances(own, settings.target)
    shares = {
        arm: route(distances, "soft" if arm in temperatures else "hard", temperatures.get(arm, 1.0))
        for arm in ROUTED
    }
    for arm, share in shares.items():
        gates[arm] = [dict(zip(users, router.gates(share), strict=True))]
    gates["random-clusters"] = [
        dict(zip(users, _dealt(router, part, len(users), settings, rng), strict=True))
        for _ in range(draws)
    ]
    weighed = int((np.nan_to_num(drawn["global"][0]) > 0).sum())
    known = {**_known(router, shares, temperatures), "heads": weighed}
    return Plan(gates, known)


def _rng(seed: int, task: str) -> np.random.Generator:
    return np.random.default_rng((seed, zlib.crc32(task.encode())))


def _dealt(
    router: Router,
    scores: HeadScores,
    users: int,
    settings: RoutingSettings,
    rng: np.random.Generator,
) -> list[Gates]:
    """Gates of so many users, all users being dealt to clusters at random."""
    clusters = router.clusters
    labels = dict(zip(clusters.users, rng.permutation(clusters.labels).tolist(), strict=True))
    weights = head_weights(scores, labels, settings.share, settings.power)
    share = np.array(clusters.sizes) / len(clusters.users)
    chosen = np.eye(len(weights))[rng.choice(len(weights), size=users, p=share)]
    return gates_of(chosen, weights, router.heads_per_layer)


def weight_map(scores: HeadScores, share: float, power: float) -> NDArray[np.float64]:
    """One weight map [layer, head] of all users of some scores together."""
    everybody = dict.fromkeys(scores.data["user"].values.tolist(), 0)
    return head_weights(scores, everybody, share, power)[0]


def random_maps(
    weights: NDArray[np.float64], draws: int, seed: int, task: str
) -> dict[str, list[NDArray[np.float64]]]:
    """A weight map and what it is held against, by the names of `MAPS`.

    Args:
        weights: The map, [layer, head]; NaN where a layer has no such head.
        draws: Of each random map.
        seed: Of the draws, with the task's name.
        task: The task.

    Returns:
        `global`, the map itself; `random-weights`, its weights permuted over the heads of each
        layer; `random-mask`, 1 at random heads, in each layer as many as it weighs, else 0.
    """
    rng = np.random.default_rng((seed, zlib.crc32(task.encode()), 1))
    shape = [int((~np.isnan(row)).sum()) for row in weights]
    layers, heads = np.nonzero(np.nan_to_num(weights) > 0)
    weighed = HeadSet(tuple(Head(int(a), int(b)) for a, b in zip(layers, heads, strict=True)))
    found: dict[str, list[NDArray[np.float64]]] = {"global": [weights]}
    for _ in range(draws):
        mixed = weights.copy()
        for layer, count in enumerate(shape):
            mixed[layer, :count] = rng.permutation(weights[layer, :count])
        found.setdefault("random-weights", []).append(mixed)
        mask = 1.0 - random_matched(weighed, shape, rng).gates(shape)
        found.setdefault("random-mask", []).append(np.where(np.isnan(weights), np.nan, mask))
    return found


def _known(
    router: Router, shares: Mapping[str, NDArray[np.float64]], temperatures: Mapping[str, float]
) -> dict[str, Any]:
    flat = np.nan_to_num(router.weights).reshape(len(router.weights), -1)
    mean = flat.mean(axis=0)
    columns: dict[str, dict[str, Any]] = {name: {} for name in ("entropy", "cosine", "uniform")}
    for arm, share in shares.items():
        mixed = share @ flat
        sizes = np.linalg.norm(mixed, axis=1) * np.linalg.norm(mean)
        angle = np.divide(mixed @ mean, sizes, out=np.full(len(mixed), np.nan), where=sizes > 0)
        columns["entropy"][arm] = float(routing_entropy(share).mean())
        columns["cosine"][arm] = float(angle.mean())
        columns["uniform"][arm] = is_uniform(share)
    every = {name: [column.get(arm, np.nan) for arm in ARMS] for name, column in columns.items()}
    return {
        **{name: ("arm", column) for name, column in every.items()},
        "uniform": ("arm", [bool(columns["uniform"].get(arm, False)) for arm in ARMS]),
        "temperature": ("arm", [temperatures.get(arm, np.nan) for arm in ARMS]),
        "clusters": len(router.weights),
        "sizes": ", ".join(map(str, router.clusters.sizes)),
        "idle": int((flat.max(axis=1) == 0).sum()),
        "discovery_users": len(router.clusters.users),
    }
