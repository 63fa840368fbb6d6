"""Users of the planted model: a grammar of one sentence, and a word for each slot of it.

For each slot, always in the same order, a sentence has a marker, the user's word for it, and a
joint: `drink tea and colour red while pet cat so meal soup .` A profile is such sentences, and the
target one more. A slot's word follows from the user alone, every other word from the grammar alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from workbench.data.examples import Example
from workbench.data.tasks import TEXT
from workbench.errors import InputError

SLOTS = {
    "drink": ("tea", "coffee", "cocoa", "water", "juice", "milk"),
    "colour": ("red", "blue", "green", "black", "white", "yellow"),
    "pet": ("cat", "dog", "parrot", "hamster", "rabbit", "turtle"),
    "meal": ("soup", "salad", "pasta", "curry", "pizza", "stew"),
    "city": ("paris", "rome", "cairo", "lima", "oslo", "tokyo"),
    "sport": ("chess", "tennis", "rowing", "judo", "golf", "skiing"),
    "music": ("jazz", "blues", "folk", "opera", "punk", "soul"),
    "hour": ("dawn", "noon", "dusk", "night", "morning", "evening"),
}
JOINTS = ("and", "while", "so", "but", "also", "yet", "plus", "though")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
STOP, COLON, NOTE = ".", ":", "note"
SPECIAL = ("<pad>", "<bos>", "<unk>", "<eos>")
PROFILE = 5
END = "<eos>"


@dataclass(frozen=True)
class Grammar:
    """What everybody's sentences have in common.

    Attributes:
        slots: The markers of the slots, in the order of a sentence.
    """

    slots: tuple[str, ...]

    @property
    def joints(self) -> tuple[str, ...]:
        """The word behind each slot's; the last one ends the sentence."""
        return (*JOINTS[: len(self.slots) - 1], STOP)

    @property
    def common_words(self) -> tuple[str, ...]:
        """All words that say nothing of a user."""
        return (*self.slots, *self.joints, COLON, NOTE, *DAYS)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every token, in the order of its id."""
        return (*SPECIAL, *self.common_words, *(w for slot in self.slots for w in SLOTS[slot]))

    @property
    def steps(self) -> list[tuple[tuple[str, ...], str]]:
        """After any of these words comes that one, whoever writes."""
        behind = zip(self.slots, self.joints, strict=True)
        before = zip((COLON, *self.joints[:-1]), self.slots, strict=True)
        return [
            *((SLOTS[slot], joint) for slot, joint in behind),
            *(((word,), slot) for word, slot in before),
        ]

    def sentence(self, taste: Mapping[str, str]) -> str:
        """The sentence of somebody with these words for the slots."""
        parts = zip(self.slots, self.joints, strict=True)
        return " ".join(f"{slot} {taste[slot]} {joint}" for slot, joint in parts)

    def draw_taste(
        self, rng: random.Random, unlike: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """A word for every slot, all equally likely, but none that somebody else has there."""
        other = unlike or {}
        return {s: rng.choice([w for w in SLOTS[s] if w != other.get(s)]) for s in self.slots}


def planted_examples(
    grammar: Grammar, users: int, examples: int = 1, *, noise: float = 0.0, seed: int = 0
) -> list[Example]:
    """Users of a planted model: a word for each slot, a profile that shows it, and a note to write.

    Args:
        grammar: Of the planted model.
        users: How many.
        examples: Examples of each, all behind the user's one profile of five sentences.
        noise: Probability that a sentence of a profile is by somebody else, and that a slot of a
            target doesn't follow the preference but is drawn from all its words.
        seed: Seed of the users and of the noise.

    Returns:
        Examples of the task `text`; `style` holds the user's word for each slot. A user shares no
        word with the one before: whose profile is taken for a stranger's is one in every slot
        (but for the last and the first user, who may share some).

    Raises:
        InputError: A number is out of range.
    """
    if users < 1 or examples < 1 or not 0 <= noise <= 1:
        raise InputError(
            "wanted 1 or more users and examples and a noise of 0 to 1, got "
            f"{users} users, {examples} examples and noise {noise}"
        )
    made: list[Example] = []
    for number in range(users):
        name = f"planted-{number:04d}"
        rng = random.Random(f"{seed}/planted/{name}")
        taste = grammar.draw_taste(rng, unlike=made[-1].style if made else None)
        profile = tuple(
            {"text": grammar.sentence(grammar.draw_taste(rng) if rng.random() < noise else taste)}
            for _ in range(PROFILE)
        )
        for i in range(examples):
            drawn = grammar.draw_taste(rng)
            kept = {s: drawn[s] if rng.random() < noise else taste[s] for s in grammar.slots}
            query = f"{rng.choice(DAYS)} {NOTE} {COLON}"
            target = grammar.sentence(kept)
            made.append(Example(f"{name}-{i}", name, TEXT, query, target, profile, style=taste))
    return made
