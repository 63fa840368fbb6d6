"""The tasks as data: LaMP's, LongLaMP's and the testbed's in one table.

Source: LaMP (Salemi et al., 2023), its published prompts and schema; LongLaMP (Kumar et al., 2024,
arXiv 2407.11016). LongLaMP's item templates, joints and retrieval texts are those of its authors'
code, as the public programs that were ported from it give them; its file itself could not be read.
Left out are a space behind each review and post, and the cut of abstracts to 750 words: the
prompt's token budget shortens them where needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from workbench.errors import InputError

Kind = Literal["classification", "rating", "generation"]
Ranking = Literal["bm25", "recency", "first"]
TEXT = "text"


@dataclass(frozen=True)
class Task:
    """What the workbench knows of a task.

    Attributes:
        kind: Decides the metrics.
        fields: What every profile item must hold.
        item: How an item is shown in the prompt, with the fields in braces.
        joint: Between two items.
        compose: (shown items, joined; query) to the prompt; not called without items.
        shorten: The field that gives way when the prompt is too long.
        match: Reads off the query what items are ranked against.
        search: Fields of an item that are searched.
        labels: The possible answers of a classification or rating.
        metric: The metric named first.
        ranking: How items are chosen unless the user asks otherwise.
        cue: Ends a plain prompt; the answer follows it.
    """

    kind: Kind
    fields: tuple[str, ...]
    item: str
    joint: str
    compose: Callable[[str, str], str]
    shorten: str
    match: re.Pattern[str]
    search: tuple[str, ...]
    metric: str
    labels: tuple[str, ...] = ()
    ranking: Ranking = "bm25"
    cue: str = "\n"


def _citation(items: str, query: str) -> str:
    # LaMP-1 puts the history inside the question, beside the title that it names.
    title = re.search(r'title\s+"(.*?)"(?=, which reference)', query, re.DOTALL)
    if title is None:
        return f"{items}. {query}"
    return f"{query[: title.end()]}, and {items}{query[title.end() :]}"


_AFTER_COLON = re.compile(r"^[^:]*:\s*(.*)$", re.DOTALL)
_MOVIE_TAGS = (
    *("sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia"),
    *("dark comedy", "classic", "psychology", "fantasy", "romance", "thought-provoking"),
    *("social commentary", "violence", "true story"),
)
_ALL = re.compile(r"^(.*)$", re.DOTALL)
_RATINGS = ("1", "2", "3", "4", "5")

TASKS: dict[str, Task] = {
    "LaMP-1": Task(
        kind="classification",
        fields=("title", "abstract"),
        item='"{title}"',
        joint=", and ",
        compose=_citation,
        shorten="title",
        # "[1]:" opens the references; "[1] or [2]" stands in the question before them.
        match=re.compile(r"(\[1\]:.*)$", re.DOTALL),
        search=("title", "abstract"),
        labels=("[1]", "[2]"),
        metric="accuracy",
    ),
    "LaMP-2": Task(
        kind="classification",
        fields=("description", "tag"),
        item='the tag for the movie: "{description}" is "{tag}"',
        joint=", and ",
        compose=lambda items, query: f"{items}. {query}",
        shorten="description",
        match=re.compile(r"description:\s*(.*)$", re.DOTALL),
        search=("description",),
        labels=_MOVIE_TAGS,
        metric="accuracy",
    ),
    "LaMP-3": Task(
        kind="rating",
        fields=("text", "score"),
        item='{score} is the score for "{text}"',
        joint=", and ",
        compose=lambda items, query: f"{items}. {query}",
        shorten="text",
        match=re.compile(r"review:\s*(.*)$", re.DOTALL),
        search=("text",),
        labels=_RATINGS,
        metric="mae",
    ),
    "LaMP-4": Task(
        kind="generation",
        fields=("title", "text"),
        item='"{title}" is the title for "{text}"',
        joint=", and ",
        compose=lambda items, query: f"{items}. {query}",
        shorten="text",
        match=_AFTER_COLON,
        search=("title", "text"),
        metric="rouge1",
    ),
    "LaMP-5": Task(
        kind="generation",
        fields=("title", "abstract"),
        item='"{title}" is the title for "{abstract}"',
        joint=", and ",
        compose=lambda items, query: f"{items}. Following the given patterns {query}",
        shorten="abstract",
        match=_AFTER_COLON,
        search=("title", "abstract"),
        metric="rouge1",
    ),
    "LaMP-7": Task(
        kind="generation",
        fields=("text",),
        item='"{text}"',
        joint=", and ",
        compose=lambda items, query: (
            f"{items} are written by a person. Following the given patterns {query}"
        ),
        shorten="text",
        match=_AFTER_COLON,
        search=("text",),
        metric="rouge1",
    ),
    "testbed-tag": Task(
        kind="classification",
        fields=("description", "tag"),
        item="movie : {description} {tag}",
        joint="\n",
        compose=lambda items, query: f"{items}\n{query}",
        shorten="description",
        match=_AFTER_COLON,
        search=("description",),
        labels=("western", "horror", "comedy", "romance", "crime", "fantasy", "war", "sport"),
        metric="accuracy",
        ranking="first",
        cue="",
    ),
    "testbed-rating": Task(
        kind="rating",
        fields=("text", "score"),
        item="review : {text} {score}",
        joint="\n",
        compose=lambda items, query: f"{items}\n{query}",
        shorten="text",
        match=_AFTER_COLON,
        search=("text",),
        labels=_RATINGS,
        metric="mae",
        ranking="first",
        cue="",
    ),
    "testbed-headline": Task(
        kind="generation",
        fields=("text", "title"),
        item="article : {text} headline = {title}",
        joint="\n",
        compose=lambda items, query: f"{items}\n{query}",
        shorten="text",
        match=_AFTER_COLON,
        search=("text",),
        metric="style",
        ranking="first",
        cue="",
    ),
}
_LONG: dict[str, Task] = {
    "abstract_generation": Task(
        kind="generation",
        fields=("title", "abstract"),
        item='"{abstract}" is the abstract for the title "{title}"',
        joint=", and ",
        compose=lambda items, query: (
            f"{items}. Use the above abstracts as context to understand the style and language of "
            f"the user and, {query}"
        ),
        shorten="abstract",
        match=re.compile(r"items:\s*(.*)$", re.DOTALL),
        search=("title", "abstract"),
        metric="rouge1",
    ),
    "product_review": Task(
        kind="generation",
        fields=("overall", "description", "summary", "reviewText"),
        item='"{overall}" is a rating for the product with description "{description}". '
        '"{summary}" is summary for "{reviewText}"',
        joint=", and ",
        compose=lambda items, query: f"{items}. Following the given patterns {query}",
        shorten="reviewText",
        match=_ALL,
        search=("overall", "summary", "description", "reviewText"),
        metric="rouge1",
    ),
    "topic_writing": Task(
        kind="generation",
        fields=("summary", "content"),
        item='"{summary}" is a summary for "{content}"',
        joint=", and ",
        compose=lambda items, query: f"{items}. Following the given patterns, {query}",
        shorten="content",
        match=_ALL,
        search=("summary", "content"),
        metric="rouge1",
    ),
}
# The settings differ in whom and when the rows come from, not in the task.
TASKS |= {
    f"LongLaMP-{name}_{setting}": task
    for name, task in _LONG.items()
    for setting in ("user", "temporal")
}
# Whatever somebody wrote, and a beginning to go on from: for texts of no dataset.
TASKS[TEXT] = Task(
    kind="generation",
    fields=("text",),
    item="{text}",
    joint="\n\n",
    compose=lambda items, query: f"{items}\n\n{query}",
    shorten="text",
    match=_ALL,
    search=("text",),
    metric="rouge1",
    ranking="first",
    cue="",
)
LAMP_TASKS = tuple(name for name in TASKS if name.startswith("LaMP"))
LONGLAMP_TASKS = tuple(name for name in TASKS if name.startswith("LongLaMP"))
TESTBED_TASKS = tuple(name for name in TASKS if name.startswith("testbed"))


def get_task(name: str) -> Task:
    """Look a task up.

    Raises:
        InputError: There is no such task; the message lists those there are.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise InputError(f"unknown task {name!r}; known are {', '.join(TASKS)}") from None
