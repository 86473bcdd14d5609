"""The demo's task: read one headline by a tool, answer BUY or SELL.

Plain Python, no model and no database: the demo's agents act it out over the wire, the recipe was found with it.
A headline is "<company> <what> and <what more>"; both halves are good news or both are bad, and that is the answer.
Four sets share no scenario:

    train            known companies, known pairs of phrases
    new_companies    (a) companies never seen, pairs of phrases that were
    new_pairs        (b) known companies and phrases, in pairs never seen
    new_phrases      (c) phrases never seen; nobody promises that this rises

Everything is drawn with seeds, so two runs of the demo meet the same headlines.
"""

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["train", "new_companies", "new_pairs", "new_phrases"]
HELD_OUT: tuple[Kind, ...] = ("new_companies", "new_pairs", "new_phrases")
LETTERS: dict[Kind, str] = {"train": "", "new_companies": "a", "new_pairs": "b", "new_phrases": "c"}

ANSWERS = ("BUY", "SELL")

COMPANIES = (
    "Arlo", "Bexo", "Cadmia", "Dorvan", "Eltra", "Fenwick", "Galdor", "Harpo", "Istra", "Jutland", "Kelso", "Lumen",
    "Marl", "Norvik", "Oakum", "Pellar", "Quanta", "Rudo", "Selva", "Tarn", "Ulmo", "Vexa", "Wendel", "Xylo", "Yarrow",
    "Zenda", "Aldis", "Brill", "Corvus", "Delph", "Ember", "Fjord",
)  # fmt: skip
NEW_COMPANIES = (
    "Gorse", "Hollis", "Ibex", "Jasper", "Korda", "Lodge", "Mistral", "Nadir", "Onyx", "Piper", "Quill", "Roan",
)  # fmt: skip

GOOD = (
    "beats forecasts",
    "wins a big order",
    "lifts its outlook",
    "posts record sales",
    "cuts its debt",
    "gains share",
)
BAD = ("misses forecasts", "loses a big order", "cuts its outlook", "posts weak sales", "adds new debt", "loses share")
GOOD_MORE = ("shares jump", "analysts cheer", "profit grows", "demand is strong", "rivals fall back", "cash piles up")
BAD_MORE = ("shares sink", "analysts warn", "profit shrinks", "demand is weak", "rivals pull ahead", "cash runs low")

NEW_GOOD = ("lands a rich contract", "opens a busy plant", "gets approval")
NEW_BAD = ("faces a costly recall", "shuts a plant", "gets sued")
NEW_GOOD_MORE = ("investors rejoice", "margins widen", "hiring picks up")
NEW_BAD_MORE = ("investors flee", "margins narrow", "layoffs follow")

SYSTEM = "Trade on the headline. Answer BUY or SELL."
TOOLS: list[dict[str, object]] = []

Message = dict[str, object]


@dataclass(frozen=True)
class Task:
    """One scenario: a headline, which set it belongs to, and the right answer."""

    scenario_id: str
    kind: Kind
    company: str
    headline: str
    answer: str

    @property
    def description(self) -> str:
        return f"Decide whether to BUY or SELL {self.company} on its headline."


def _held_out_pairs() -> frozenset[tuple[int, int]]:
    """A quarter of the pairs, such that every phrase is seen in others: (first, second) with a fixed residue."""
    return frozenset((i, j) for i in range(len(GOOD)) for j in range(len(GOOD_MORE)) if (i + 2 * j) % 4 == 0)


def scenarios(kind: Kind, count: int, seed: int = 0) -> list[Task]:
    """`count` different scenarios of one set, half of them BUY; the same seed gives the same ones.

    Raises:
        ValueError: the set has fewer different headlines than asked for.
    """
    pairs = _held_out_pairs()
    new = kind == "new_phrases"
    companies = NEW_COMPANIES if kind == "new_companies" else COMPANIES
    found: dict[str, list[Task]] = {}
    for answer, first, second in (
        ("BUY", NEW_GOOD if new else GOOD, NEW_GOOD_MORE if new else GOOD_MORE),
        ("SELL", NEW_BAD if new else BAD, NEW_BAD_MORE if new else BAD_MORE),
    ):
        found[answer] = [
            Task(
                scenario_id=f"{kind}-{company}-{i}{j}-{answer}".lower().replace("_", "-"),
                kind=kind,
                company=company,
                headline=f"{company} {what}, {more}",
                answer=answer,
            )
            for company in companies
            for i, what in enumerate(first)
            for j, more in enumerate(second)
            if new or ((i, j) in pairs) == (kind == "new_pairs")
        ]
    most = 2 * min(len(found["BUY"]), len(found["SELL"]))
    if count > most:
        raise ValueError(f"{kind} has {most} different headlines, {count} were asked for.")
    draw = random.Random(f"{kind}:{seed}")
    halves = [draw.sample(found[answer], (count + k) // 2) for k, answer in ((1, "BUY"), (0, "SELL"))]
    chosen = halves[0] + halves[1]
    draw.shuffle(chosen)
    return chosen


def messages(task: Task) -> list[Message]:
    """The conversation up to the answer: asked, one tool turn that the program takes, the headline."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": task.company},
        {
            "role": "assistant",
            "content": "",
            "weight": 0,  # the program's own call, not the model's words
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "news", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": task.headline},
    ]


def reward(task: Task, answer: str) -> float:
    """1.0 for the right word alone, else 0.0: no credit for form (TRAINER's finding: it teaches the wrong word)."""
    return 1.0 if answer.strip() == task.answer else 0.0
