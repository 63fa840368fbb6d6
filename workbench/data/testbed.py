"""The built-in testbed: a small world of users with latent taste, leniency and style.

Three task kinds, shaped as LaMP's: `testbed-tag` (classification: a user's favourite genre
decides items that fit two), `testbed-rating` (1 to 5: a user's leniency shifts it) and
`testbed-headline` (generation: a user's own opener, intensifier, closer, register and word
order). A user follows a preference only with probability `consistency`, and profiles are short,
so that a profile helps without settling the answer.

Everything is drawn from `random.Random(seed)`; the same seed gives the same corpus. Which split
a combination of traits belongs to is a checksum of the combination, so that no combination is
found in two splits, whatever the seeds.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workbench.errors import InputError

BUILT_IN = ("testbed", "testbed-small")
TASKS = ("testbed-tag", "testbed-rating", "testbed-headline")
SPLITS = ("train", "discovery", "validation", "test")
HISTORY_TRAIN = {"testbed-tag": 10, "testbed-rating": 10, "testbed-headline": 6}
HISTORY_EVAL = {"testbed-tag": 4, "testbed-rating": 4, "testbed-headline": 2}
CORPUS_USERS = {"discovery": 48, "validation": 60, "test": 240}
CORPUS_QUERIES = {"discovery": 8, "validation": 4, "test": 2}

KEYWORDS = {
    "western": ("cowboy", "desert", "sheriff", "saloon"),
    "horror": ("ghost", "vampire", "cellar", "graveyard"),
    "comedy": ("clown", "prank", "parrot", "circus"),
    "romance": ("kiss", "letter", "ballroom", "sunset"),
    "crime": ("thief", "detective", "jewel", "poison"),
    "fantasy": ("dragon", "wizard", "castle", "unicorn"),
    "war": ("soldier", "bunker", "tank", "general"),
    "sport": ("boxer", "stadium", "coach", "marathon"),
}
GENRES = tuple(KEYWORDS)
# The j-th keyword of a genre also fits the genre this many places further on.
_SECOND_STEP = (1, 2, 3, 5)
CANDIDATES = {
    word: (genre, GENRES[(i + _SECOND_STEP[j]) % len(GENRES)])
    for i, (genre, words) in enumerate(KEYWORDS.items())
    for j, word in enumerate(words)
}
MOVIE_ADJECTIVES = ("dark", "quiet", "silly", "slow", "bright", "strange", "short", "tender")
MOVIE_NOUNS = ("tale", "story", "film", "drama")

PRODUCTS = (
    *("lamp", "kettle", "chair", "phone", "radio", "knife", "towel", "clock"),
    *("mirror", "basket", "heater", "camera", "pillow", "bottle", "wallet", "guitar"),
)
OPINIONS = {
    1: ("awful", "terrible", "dreadful", "horrid"),
    2: ("poor", "weak", "flimsy", "dull"),
    3: ("okay", "average", "ordinary", "decent"),
    4: ("good", "solid", "nice", "handy"),
    5: ("superb", "perfect", "brilliant", "amazing"),
}
GENERIC_SHIFT = {0: 0.6, -1: 0.2, 1: 0.2}

CITIES = (
    *("miami", "boston", "dallas", "denver", "oslo", "paris", "rome", "cairo"),
    *("lima", "tokyo", "delhi", "berlin"),
)
ACTORS = (
    *("mayor", "judge", "teacher", "farmer", "pilot", "doctor", "banker", "painter"),
    *("sailor", "writer", "miner", "singer", "lawyer", "baker", "officer", "student"),
)
OBJECTS = (
    *("bridge", "school", "museum", "market", "harbor", "tunnel", "library", "garden"),
    *("factory", "hotel", "theater", "railway", "airport", "statue", "fountain", "tower"),
)
FORMAL_VERB = {
    "starts": "commences",
    "stops": "halts",
    "buys": "acquires",
    "sells": "unloads",
    "fixes": "restores",
    "breaks": "wrecks",
    "finds": "discovers",
    "shows": "reveals",
    "wants": "demands",
    "likes": "endorses",
    "fears": "dreads",
    "helps": "assists",
}
OPENERS = ("update", "hey", "dear", "look", "listen", "folks", "wow", "exclusive")
INTENSIFIERS = ("big", "huge", "wild", "great", "sweet", "odd", "fresh", "grim")
CLOSERS = ("details", "cheers", "regards", "enjoy", "stay-tuned", "goodbye", "amen", "hooray")
STYLE_VALUES: dict[str, tuple[str, ...]] = {
    "opener": OPENERS,
    "intensifier": INTENSIFIERS,
    "closer": CLOSERS,
    "register": ("plain", "formal"),
    "order": ("actor-first", "object-first"),
}
IDIOSYNCRATIC_SLOTS = 3
GENERIC_HOME_GENRE = 0.7
FAVOURITE_FITS = 0.7
FUNCTION_WORDS = (
    *("movie", "review", "article", "headline", ":", "=", ",", "-"),
    *("a", "about", "the", "is", "in", "news", "1", "2", "3", "4", "5"),
)
END_OF_TEXT = "\n"
SPECIAL_TOKENS = ("<pad>", "<bos>", "<unk>", END_OF_TEXT)


def vocabulary() -> list[str]:
    """All words of the corpus, special tokens first; the order is the token id."""
    words: dict[str, None] = dict.fromkeys(SPECIAL_TOKENS)
    for group in (
        *(FUNCTION_WORDS, GENRES, CANDIDATES, MOVIE_ADJECTIVES, MOVIE_NOUNS, PRODUCTS),
        *OPINIONS.values(),
        *(CITIES, ACTORS, OBJECTS, FORMAL_VERB, FORMAL_VERB.values()),
        *(OPENERS, INTENSIFIERS, CLOSERS),
    ):
        words.update(dict.fromkeys(group))
    return list(words)


@dataclass(frozen=True)
class User:
    """Latent traits of one user.

    Attributes:
        name: Unique in a corpus.
        favourite: The genre taken where a movie fits it.
        leniency: -1 or +1, added to a review's base rating.
        style: The user's own value for `IDIOSYNCRATIC_SLOTS` of the five style slots; the others
            are drawn from a prior that all users share.
        consistency: Probability of following each preference, each time.
    """

    name: str
    favourite: str
    leniency: int
    style: Mapping[str, str]
    consistency: float

    def traits(self) -> str:
        """The combination of traits, as one line; decides the split."""
        style = ",".join(f"{k}={v}" for k, v in sorted(self.style.items()))
        return f"{self.favourite}|{self.leniency:+d}|{style}"

    def split(self) -> str:
        """The one split in which this combination of traits may occur."""
        share = zlib.crc32(self.traits().encode()) % 10
        return "train" if share < 7 else SPLITS[share - 6]


@dataclass(frozen=True)
class Item:
    """One thing a user wrote: the text it answers and the answer."""

    text: str
    answer: str


def draw_user(rng: random.Random, split: str, name: str, consistency: tuple[float, float]) -> User:
    """Draw a user whose combination of traits belongs to `split`.

    Args:
        rng: Source of randomness.
        split: One of `SPLITS`.
        name: The user's name.
        consistency: Range from which the probability of following a preference is drawn.
    """
    while True:
        slots = rng.sample(sorted(STYLE_VALUES), IDIOSYNCRATIC_SLOTS)
        user = User(
            name=name,
            favourite=rng.choice(GENRES),
            leniency=rng.choice((-1, 1)),
            # The first value is the prior's favourite: having it would not be a trait.
            style={slot: rng.choice(STYLE_VALUES[slot][1:]) for slot in sorted(slots)},
            consistency=rng.uniform(*consistency),
        )
        if user.split() == split:
            return user


def draw_item(rng: random.Random, user: User, task: str, query: bool = False) -> Item:
    """Draw one item of a task as this user would write it.

    Args:
        rng: Source of randomness.
        user: Who writes.
        task: One of `TASKS`.
        query: A movie to be asked about always fits the favourite genre and one other, so that
            taste decides; which of the two is the more usual one is left to chance.
    """
    if task == "testbed-tag":
        return _draw_movie(rng, user, always_fits=query)
    if task == "testbed-rating":
        return _draw_review(rng, user)
    return _draw_headline(rng, user)


def _draw_movie(rng: random.Random, user: User, always_fits: bool) -> Item:
    words = list(CANDIDATES)
    if always_fits or rng.random() < FAVOURITE_FITS:
        words = [w for w in words if user.favourite in CANDIDATES[w]]
    word = rng.choice(words)
    home, second = CANDIDATES[word]
    genre = home if rng.random() < GENERIC_HOME_GENRE else second
    if user.favourite in (home, second) and rng.random() < user.consistency:
        genre = user.favourite
    adjective, noun = rng.choice(MOVIE_ADJECTIVES), rng.choice(MOVIE_NOUNS)
    return Item(f"a {adjective} {noun} about a {word}", genre)


def _draw_review(rng: random.Random, user: User) -> Item:
    base = rng.choice(list(OPINIONS))
    shift = rng.choices(list(GENERIC_SHIFT), list(GENERIC_SHIFT.values()))[0]
    if rng.random() < user.consistency:
        shift = user.leniency
    text = f"the {rng.choice(PRODUCTS)} is {rng.choice(OPINIONS[base])}"
    return Item(text, str(min(5, max(1, base + shift))))


def _draw_headline(rng: random.Random, user: User) -> Item:
    city, actor, thing = rng.choice(CITIES), rng.choice(ACTORS), rng.choice(OBJECTS)
    verb = rng.choice(list(FORMAL_VERB))
    style = {}
    for slot, values in STYLE_VALUES.items():
        skewed = [0.5**rank for rank in range(len(values))]
        style[slot] = rng.choices(values, skewed)[0]
        if slot in user.style and rng.random() < user.consistency:
            style[slot] = user.style[slot]
    return Item(f"in {city} the {actor} {verb} the {thing}", _headline(style, actor, verb, thing))


def _headline(style: Mapping[str, str], actor: str, verb: str, thing: str) -> str:
    verb = FORMAL_VERB[verb] if style["register"] == "formal" else verb
    clause = f"{actor} {verb} {thing}"
    if style["order"] == "object-first":
        clause = f"{thing} : {actor} {verb}"
    return f"{style['opener']} {style['intensifier']} news , {clause} - {style['closer']}"


def read_style(headline: str) -> dict[str, str]:
    """Read the style slots off a headline; a slot that can't be read is left out.

    The inverse of how headlines are made, for text that a model wrote and that may be malformed.
    """
    words = headline.split()
    found: dict[str, str] = {}
    if words and words[0] in OPENERS:
        found["opener"] = words[0]
    if len(words) > 1 and words[1] in INTENSIFIERS:
        found["intensifier"] = words[1]
    if len(words) > 1 and words[-2] == "-" and words[-1] in CLOSERS:
        found["closer"] = words[-1]
    verbs = [w for w in words if w in FORMAL_VERB or w in FORMAL_VERB.values()]
    if verbs:
        found["register"] = "plain" if verbs[0] in FORMAL_VERB else "formal"
        found["order"] = "object-first" if ":" in words else "actor-first"
    return found


def draw_lines(
    rng: random.Random, task: str, consistency: tuple[float, float], shuffled: bool
) -> list[Item]:
    """Draw one training sequence: a profile and a query by one user of the training split.

    Args:
        rng: Source of randomness.
        task: One of `TASKS`.
        consistency: Range of the users' consistency.
        shuffled: Every line is by another user, so that the history says nothing.
    """
    user = draw_user(rng, "train", "t", consistency)
    items = []
    for _ in range(HISTORY_TRAIN[task] + 1):
        if shuffled:
            user = draw_user(rng, "train", "t", consistency)
        items.append(draw_item(rng, user, task))
    return items


def corpus_users(split: str, seed: int = 0) -> list[User]:
    """The users of one evaluation split, no combination of traits twice."""
    rng = random.Random(f"{seed}/users/{split}")
    users: dict[str, User] = {}
    while len(users) < CORPUS_USERS[split]:
        user = draw_user(rng, split, f"{split}-{len(users):03d}", (0.7, 1.0))
        users.setdefault(user.traits(), user)
    return list(users.values())


_FIELDS = {
    "testbed-tag": ("description", "tag", "movie : {}"),
    "testbed-rating": ("text", "score", "review : {}"),
    "testbed-headline": ("text", "title", "article : {} headline ="),
}


def query_text(task: str, text: str) -> str:
    """The line that asks for an answer; in a history the answer follows on the same line."""
    return _FIELDS[task][2].format(text)


def corpus_rows(
    task: str, split: str, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Questions and gold outputs of one task and split, in the official LaMP row schema.

    Rows carry one key more than the official ones, `user_id`, since a user has several queries.
    """
    text_field, answer_field, _ = _FIELDS[task]
    questions, golds = [], []
    for user in corpus_users(split, seed):
        rng = random.Random(f"{seed}/{task}/{user.name}")
        profile = [
            {"id": f"{user.name}-p{i}", text_field: item.text, answer_field: item.answer}
            for i, item in enumerate(draw_item(rng, user, task) for _ in range(HISTORY_EVAL[task]))
        ]
        for i in range(CORPUS_QUERIES[split]):
            item = draw_item(rng, user, task, query=True)
            row_id = f"{user.name}-q{i}"
            query = query_text(task, item.text)
            questions.append(
                {"id": row_id, "user_id": user.name, "input": query, "profile": profile}
            )
            golds.append({"id": row_id, "output": item.answer})
    return questions, golds


def write_corpus(root: Path, seed: int = 0) -> Iterator[Path]:
    """Write the corpus as official LaMP files, yielding each path once it is written.

    Args:
        root: Folder to fill: `testbed-tag/discovery_questions.json` and so on, and
            `{split}_users.json` with the latent traits.
        seed: Seed of the corpus.
    """
    for split in CORPUS_USERS:
        users = {user.name: asdict(user) for user in corpus_users(split, seed)}
        yield _write_json(root / f"{split}_users.json", users)
        for task in TASKS:
            questions, golds = corpus_rows(task, split, seed)
            yield _write_json(root / task / f"{split}_questions.json", questions)
            outputs = {"task": task.replace("-", "_"), "golds": golds}
            yield _write_json(root / task / f"{split}_outputs.json", outputs)


def _write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n", encoding="utf-8")
    return path


def located(model: str | Path) -> str | Path:
    """The folder of a built-in checkpoint by its name; any other name as it is."""
    return testbed_path(str(model)) if str(model) in BUILT_IN else model


def testbed_path(name: str = "testbed") -> Path:
    """The folder of a built-in checkpoint; that of `testbed` holds the corpus too.

    Raises:
        InputError: It isn't there.
    """
    package = Path(__file__).resolve().parent.parent
    # A wheel carries the data inside the package, a checkout beside it.
    inside = package / f"_{name}"
    for folder in (inside, package.parent / "data" / name):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(f"the built-in {name} is missing; make it with `workbench testbed train`")
