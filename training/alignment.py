"""Attempts beside each other: what all of them have in common once, then each from where they part.

Works on any sequences that can be compared item by item; nothing here knows what a turn is. The work is one pass over
the items and one over the columns, whatever the attempts hold.
"""

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True)
class Alignment:
    """`prefix` items are the same in all; the rest of column `order[i]` begins there."""

    prefix: int
    order: tuple[int, ...]  # attempts, so that those that share a longer beginning are neighbours
    shared: tuple[int, ...]  # by place in `order`: so many items from the start are the same as its left neighbour's


def align(attempts: Sequence[Sequence[Item]]) -> Alignment:
    """Lay attempts beside each other; among equals the order that was given stays.

    A sub-family (attempts that go the same way for longer) stands where its first member would.
    """
    order: list[int] = []
    waiting: list[tuple[list[int], int]] = [(list(range(len(attempts))), 0)]
    while waiting:
        family, known = waiting.pop()
        if len(family) == 1:
            order += family
            continue
        at = shared_by_all([attempts[one] for one in family], known)
        branches: dict[Item | None, list[int]] = {}
        ended: list[int] = []
        for one in family:
            if at < len(attempts[one]):
                branches.setdefault(attempts[one][at], []).append(one)
            else:
                ended.append(one)
        if not branches:
            order += family
            continue
        parts = sorted([*branches.values(), *([ended] if ended else [])], key=lambda part: part[0])
        # One that has ended is the beginning of the others: a family of its own with nothing left to compare.
        waiting += [(part, at if part is ended else at + 1) for part in reversed(parts)]
    prefix = shared_by_all(attempts, 0) if len(attempts) > 1 else 0
    shared = [0] + [shared_by_all([attempts[a], attempts[b]], 0) for a, b in itertools.pairwise(order)]
    return Alignment(prefix, tuple(order), tuple(shared[: len(order)]))


def shared_by_all(attempts: Sequence[Sequence[Item]], known: int) -> int:
    """How many items from the start are the same in all; the first `known` are taken for granted."""
    if not attempts:
        return 0
    first, *others = attempts
    end = min(map(len, attempts))
    at = known
    while at < end and all(other[at] == first[at] for other in others):
        at += 1
    return at
