"""Users to clusters, clusters to head weights, and both to gates (section 5 of the paper).

1. Users are embedded by their profiles and clustered by k-means, about 100 a cluster.
2. The mean PCS inside a cluster makes its weights W_c [layer, head]: the top share is kept,
   negatives become 0, all are divided by the largest and raised to a power.
3. A user is routed: hard, to the nearest centroid; soft, by softmax(-distance / temperature).
4. Head gates for the masked pass: `clip(1 - sum_c p_c W_c, 0, 1)`.

Distances of embeddings differ little, so that at temperature 1 soft routing is close to giving
every user the mean of all clusters: `routing_entropy` says how close, and
`temperature_from_distances` finds a temperature that tells clusters apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from scipy.special import entr, softmax

from workbench import runs
from workbench.data.examples import Example
from workbench.errors import InputError
from workbench.heads import Gates, top_k
from workbench.scores import HeadScores
from workbench.steering.contrast import DPS, Strength
from workbench.steering.embeddings import Embedder, load_embedder, make_embedder, profile_texts

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Mode = Literal["hard", "soft"]
FORMAT = "workbench.router/1"
USERS = 100  # a cluster, about
SHARE = 0.04  # of the heads are kept: 40 of 1,024
UNIFORM = 0.99  # from here on, to two digits, routing tells users apart by next to nothing
HALVINGS = 80


@dataclass(frozen=True, eq=False)
class Clusters:
    """Users in clusters, the largest cluster first.

    Attributes:
        users: Their names.
        labels: The cluster of each.
        centroids: Mean embeddings, [cluster, dim].
    """

    users: tuple[str, ...]
    labels: NDArray[np.int64]
    centroids: NDArray[np.float32]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Users of each cluster."""
        return tuple(np.bincount(self.labels, minlength=len(self.centroids)).tolist())

    @property
    def by_user(self) -> dict[str, int]:
        """The cluster of each user by name."""
        return dict(zip(self.users, self.labels.tolist(), strict=True))


def find_clusters(
    embeddings: NDArray[np.floating],
    users: Sequence[str],
    size: int = USERS,
    clusters: int | None = None,
    seed: int = 0,
) -> Clusters:
    """Cluster users by k-means.

    Args:
        embeddings: [user, dim].
        users: Their names, in the same order.
        size: Users that a cluster should hold on average, where `clusters` is None.
        clusters: How many clusters; by default users / size, rounded, and one at least.
        seed: Of the starting points.

    Raises:
        InputError: There is one user only, or fewer users than clusters, or so many say the same
            that there are fewer different ones; or a number is below 1.

    Source:
        Section 5 of the paper, item 1. A cluster is never empty here; 22 of 25 are in a run that
        its authors published.
    """
    from sklearn.cluster import KMeans

    values = np.asarray(embeddings, dtype=np.float64)
    if len(values) != len(users):
        raise InputError(f"{len(values)} embeddings for {len(users)} users")
    if len(users) < 2:
        raise InputError(f"clusters need two users or more, got {len(users)}; take one head set")
    if size < 1 or (clusters is not None and clusters < 1):
        raise InputError(f"size and clusters must be 1 or more, got {size} and {clusters}")
    count = max(1, round(len(users) / size)) if clusters is None else clusters
    if count > len(users):
        raise InputError(f"{count} clusters of {len(users)} users; ask for {len(users)} or fewer")
    different = len(np.unique(values, axis=0))
    if count > different:
        raise InputError(
            f"{count} clusters of {len(users)} users, of whom only {different} have profiles that "
            f"differ; ask for {different} or fewer"
        )
    found = KMeans(count, n_init=10, random_state=seed).fit(values)
    order = np.argsort(-np.bincount(found.labels_, minlength=count), kind="stable")
    labels = np.argsort(order)[found.labels_].astype(np.int64)
    return Clusters(tuple(users), labels, found.cluster_centers_[order].astype(np.float32))


def head_weights(
    scores: HeadScores,
    labels: Mapping[str, int],
    share: float = SHARE,
    power: float = 1.0,
) -> NDArray[np.float64]:
    """How much of each head each cluster takes away, from the mean PCS of its users' examples.

    Args:
        scores: PCS of all heads.
        labels: The cluster of each user by name, from 0 on; users without scores are passed over.
        share: Fraction of the heads that is kept, rounded down, one at least.
        power: Weights are raised to it; above 1 it favours the strongest heads.

    Returns:
        [cluster, layer, head] in [0, 1]; NaN where a layer has no such head. A cluster in which
        no head has a positive mean has weights of 0: its users get the plain model.

    Raises:
        InputError: The heads were screened, a user with scores is in no cluster, a cluster has no
            scores or only NaN, or a number is out of range.

    Source:
        Section 5 of the paper, item 2.
    """
    if not 0 < share <= 1 or not power > 0:
        raise InputError(f"share must be in (0, 1] and power above 0, got {share} and {power}")
    scores.need_all_heads("a weight for every head")
    users = scores.data["user"].values.tolist()
    if unknown := [user for user in users if user not in labels]:
        raise InputError(f"user {unknown[0]} has scores and is in no cluster")
    pcs = scores.data["pcs"].values.astype(np.float64)
    member = np.array([labels[user] for user in users])
    # K / n times n may come out a little below K.
    keep = max(1, int(share * sum(scores.heads_per_layer) + 1e-9))
    weights = []
    for cluster in range(max(labels.values()) + 1):
        rows = pcs[member == cluster]
        if not len(rows):
            raise InputError(f"cluster {cluster} has no scored example; ask for fewer clusters")
        weights.append(_one_weights(rows.mean(axis=0), keep, power, cluster))
    return np.stack(weights)


def _one_weights(
    means: NDArray[np.float64], keep: int, power: float, cluster: int
) -> NDArray[np.float64]:
    if np.isnan(means).all():
        raise InputError(f"cluster {cluster}: all scores are NaN; score its examples again")
    weights = np.where(np.isnan(means), np.nan, 0.0)
    for head in top_k(means, min(keep, int((~np.isnan(means)).sum()))):
        weights[head.layer, head.head] = max(means[head.layer, head.head], 0.0)
    largest = np.nanmax(weights)
    return (weights / largest) ** power if largest > 0 else weights


def route(
    distances: NDArray[np.floating], mode: Mode = "hard", temperature: float = 1.0
) -> NDArray[np.float64]:
    """Shares of the clusters in each user.

    Args:
        distances: From each user to each centroid, [user, cluster].
        mode: `hard`, all to the nearest centroid, of equals the first; or `soft`.
        temperature: Of `soft`, in units of distance.

    Returns:
        [user, cluster], each row adding up to 1.

    Raises:
        InputError: The mode is unknown, or the temperature is not above 0.

    Source:
        Section 5 of the paper, item 3.
    """
    if mode not in get_args(Mode):
        raise InputError(f"routing is hard or soft, got {mode!r}")
    if mode == "hard":
        return np.eye(distances.shape[1])[distances.argmin(axis=1)]
    if not (np.isfinite(temperature) and temperature > 0):
        raise InputError(f"temperature must be above 0, got {temperature}")
    return np.asarray(softmax(-np.asarray(distances, np.float64) / temperature, axis=1))


def routing_entropy(shares: NDArray[np.floating]) -> NDArray[np.float64]:
    """Entropy of each user's shares over that of equal shares, [user].

    Returns:
        0 for a user all in one cluster, 1 for one in all of them alike; NaN with one cluster only,
        where there is nothing to route.
    """
    clusters = shares.shape[1]
    if clusters < 2:
        return np.full(len(shares), np.nan)
    return np.asarray(entr(np.asarray(shares, np.float64)).sum(axis=1) / np.log(clusters))


def is_uniform(shares: NDArray[np.floating]) -> bool:
    """Whether routing is uniform to two digits: a mean entropy of .99 or 1.00.

    The weights are then the mean of all clusters' for everybody. The published runs, whose entropy
    is .994, are of this kind.
    """
    return bool(np.round(routing_entropy(shares).mean(), 2) >= UNIFORM)


def temperature_from_distances(distances: NDArray[np.floating], target: float = 0.5) -> float:
    """The temperature at which soft routing has a given entropy.

    Args:
        distances: From each user to each centroid, [user, cluster]. Entropy grows with the
            temperature without exception, so bisection finds it.
        target: Mean normalised entropy over users, between 0 and 1.

    Raises:
        InputError: The target is out of range, there is one cluster, or users are as far from
            their nearest centroid as from others, so that no temperature is cool enough.
    """
    values = np.asarray(distances, dtype=np.float64)
    if not 0 < target < 1:
        raise InputError(f"the target must be between 0 and 1, got {target}")
    if values.shape[1] < 2:
        raise InputError("soft routing needs two clusters or more; with one there is no choice")
    spread = float(np.ptp(values, axis=1).max())
    low, high = spread * 1e-9, spread * 1e9
    if spread == 0 or routing_entropy(route(values, "soft", low)).mean() > target:
        raise InputError(
            "users are as far from one centroid as from another, so no temperature tells them "
            "apart; ask for fewer clusters or take another embedder"
        )
    for _ in range(HALVINGS):
        middle = float(np.sqrt(low * high))
        if routing_entropy(route(values, "soft", middle)).mean() > target:
            high = middle
        else:
            low = middle
    return low


@dataclass(frozen=True, eq=False)
class Router:
    """What routes a user, seen before or not, to gates.

    Attributes:
        embedder: Makes a vector of a profile.
        clusters: The users that it was made from, and the centroids.
        weights: From `head_weights`, [cluster, layer, head].
        heads_per_layer: Of the model that the weights are for.
    """

    embedder: Embedder
    clusters: Clusters
    weights: NDArray[np.float64]
    heads_per_layer: tuple[int, ...]

    @classmethod
    def fit(
        cls,
        scores: HeadScores,
        examples: Sequence[Example],
        *,
        embedder: str = "tfidf",
        model: TransformerBridge | None = None,
        size: int = USERS,
        clusters: int | None = None,
        share: float = SHARE,
        power: float = 1.0,
        seed: int = 0,
    ) -> Router:
        """Cluster the users of scored examples, and weigh the heads of each cluster.

        Args:
            scores: PCS of all heads.
            examples: The scored ones, for their profiles.
            embedder: As `make_embedder` takes it.
            model: For `residual`.
            size: As `find_clusters` takes it.
            clusters: As `find_clusters` takes it.
            share: As `head_weights` takes it.
            power: As `head_weights` takes it.
            seed: Of k-means.

        Raises:
            InputError: A user with scores has no example, or what these refuse.
        """
        scored = set(scores.data["user"].values.tolist())
        texts = profile_texts([e for e in examples if e.user in scored])
        if missing := sorted(scored - texts.keys()):
            raise InputError(f"user {missing[0]} has scores and no example to take a profile from")
        made = make_embedder(embedder, list(texts.values()), model)
        vectors = made.embed(list(texts.values()))
        found = find_clusters(vectors, list(texts), size, clusters, seed)
        weights = head_weights(scores, found.by_user, share, power)
        return cls(made, found, weights, scores.heads_per_layer)

    def distances(self, examples: Sequence[Example]) -> tuple[list[str], NDArray[np.float64]]:
        """The users of some examples, and how far each is from each centroid, [user, cluster].

        Raises:
            InputError: A user has no profile text.
        """
        texts = profile_texts(examples)
        vectors = self.embedder.embed(list(texts.values())).astype(np.float64)
        apart = vectors[:, None] - self.clusters.centroids[None].astype(np.float64)
        return list(texts), np.linalg.norm(apart, axis=-1)

    def gates(self, shares: NDArray[np.floating]) -> list[Gates]:
        """Gates of each user from the shares of the clusters, [user, cluster]."""
        return gates_of(shares, self.weights, self.heads_per_layer)

    def contrasts(
        self,
        examples: Sequence[Example],
        gamma: Strength = 0.5,
        mode: Mode = "hard",
        temperature: float = 1.0,
    ) -> dict[str, DPS]:
        """DPS for each user of some examples, as `generate` takes it.

        Raises:
            InputError: A user has no profile text, or what `route` and `DPS` refuse.
        """
        users, distances = self.distances(examples)
        gates = self.gates(route(distances, mode, temperature))
        return {user: DPS(one, gamma) for user, one in zip(users, gates, strict=True)}

    def save(self, folder: Path | str) -> None:
        """Write `router.json` and `router.safetensors` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            "centroids": self.clusters.centroids,
            "weights": self.weights,
            **{f"embedder.{name}": array for name, array in self.embedder.arrays.items()},
        }
        value = {
            "format": FORMAT,
            "embedder": self.embedder.settings,
            "heads_per_layer": list(self.heads_per_layer),
            "clusters": self.clusters.by_user,
        }
        with runs.atomic(folder / "router.safetensors") as part:
            part.write_bytes(save({k: np.ascontiguousarray(a) for k, a in arrays.items()}))
        runs.write_text(folder / "router.json", json.dumps(value, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path | str, model: TransformerBridge | None = None) -> Router:
        """Read a router written by `save`.

        Args:
            folder: Where it is.
            model: The model, if users were embedded by its residual stream.

        Raises:
            InputError: A file is missing or damaged, or the model is missing or another one.
        """
        path = Path(folder) / "router.json"
        value = runs.read_json(path)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise InputError(f"{path}: no router; wanted a file of format {FORMAT!r}")
        try:
            arrays = load_file(Path(folder) / "router.safetensors")
            own = {k.removeprefix("embedder."): a for k, a in arrays.items() if "." in k}
            labels = value["clusters"]
            return cls(
                load_embedder(value["embedder"], own, model),
                Clusters(
                    tuple(labels), np.array([*labels.values()], np.int64), arrays["centroids"]
                ),
                arrays["weights"],
                tuple(value["heads_per_layer"]),
            )
        except (KeyError, TypeError, OSError, SafetensorError) as error:
            raise InputError(f"{folder}: a damaged router: {error!r}; make it again") from error


def gates_of(
    shares: NDArray[np.floating],
    weights: NDArray[np.floating],
    heads_per_layer: Sequence[int],
) -> list[Gates]:
    """Gates of each user: `clip(1 - sum_c p_c W_c, 0, 1)`.

    Args:
        shares: Of the clusters in each user, [user, cluster].
        weights: Of the heads in each cluster, [cluster, layer, head].
        heads_per_layer: The model's.

    Source:
        Section 5 of the paper, item 4.
    """
    mixed = np.einsum("uc,clh->ulh", shares, weights)
    return [Gates.from_weights(one, heads_per_layer) for one in mixed]
