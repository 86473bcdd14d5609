"""What a project's rules take out of a recording, before payload, shared texts, search and log see it.

A rule is {"name", "pattern"} (a regular expression over every text) or {"name", "path"} (dotted, `*` for any key or
index: "steps.*.environment_state.email"). Ids keep as they are: they are how a trajectory is found.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from trajectories.errors import Refused
from trajectories.models import Project
from trajectories.payloads import Payload

P = TypeVar("P", bound=Payload)

TOKENS = "token ids of redacted text"  # the rule's name under which dropped token ids are counted
KEPT = frozenset(
    {
        "trajectory_id",
        "agent_id",
        "scenario_id",
        "group_id",
        "episode_id",
        "parent_trajectory_id",
        "retry_of",
        "evaluation_id",
        "final_status",
        "policy_version",
        "model",
        "model_version",
        "started_at",
        "ended_at",
        "timestamp",
    }
)


class Rule(msgspec.Struct, frozen=True):
    name: str
    pattern: re.Pattern[str] | None
    path: tuple[str, ...]

    @property
    def mark(self) -> str:
        return f"[redacted: {self.name}]"


def rules(project: Project) -> list[Rule]:
    """Raises Refused: a rule cannot be used. Nothing is recorded then: a leak could not be taken back."""
    found: list[Rule] = []
    for number, rule in enumerate(project.redaction_rules or []):
        name = str(rule.get("name") or f"rule {number + 1}")[:100] if isinstance(rule, dict) else ""
        pattern, path = (rule.get("pattern"), rule.get("path")) if isinstance(rule, dict) else (None, None)
        try:
            if isinstance(pattern, str) and pattern:
                found.append(Rule(name, re.compile(pattern), ()))
                continue
        except re.error as exc:
            raise Refused(
                f"The redaction rule {name!r} of {project} is no regular expression ({exc}), so nothing is recorded. "
                "Correct it in the project's settings."
            ) from exc
        if not isinstance(path, str) or not path:
            raise Refused(
                f"Redaction rule {number + 1} of {project} has neither pattern nor path, so nothing is recorded. "
                "Correct it in the project's settings."
            )
        found.append(Rule(name, None, tuple(path.split("."))))
    return found


def redact(payload: P, with_rules: Sequence[Rule]) -> tuple[P, Counter[str]]:
    """The payload without what the rules name, and how often each took something.

    Where a text was changed, all token ids go too: they spell it.
    """
    counts: Counter[str] = Counter()
    if not with_rules:
        return payload, counts
    value: object = msgspec.json.decode(msgspec.json.encode(payload))  # to_builtins leaves tuples
    for rule in with_rules:
        if rule.path:
            _take_path(value, rule.path, rule, counts)
    patterns = [rule for rule in with_rules if rule.pattern is not None]
    if patterns:
        value = _take_patterns(value, patterns, counts)
    if not counts:
        return payload, counts
    _drop_tokens(value, counts)
    return msgspec.convert(value, type(payload)), counts


def text(value: str, with_rules: Sequence[Rule]) -> str:
    """The same for one text: reasons, comments, descriptions."""
    for rule in with_rules:
        if rule.pattern is not None:
            value = rule.pattern.sub(rule.mark, value)
    return value


def value(found: object, with_rules: Sequence[Rule]) -> object:
    """The same for any JSON."""
    return _take_patterns(found, [rule for rule in with_rules if rule.pattern is not None], Counter())


def _take_path(found: object, path: Sequence[str], rule: Rule, counts: Counter[str]) -> None:
    head, *rest = path
    if isinstance(found, dict):
        keys: list[object] = list(found) if head == "*" else [head] if head in found else []
        for key in keys:
            if rest:
                _take_path(found[key], rest, rule, counts)
            elif found[key] is not None and key not in KEPT:
                found[key] = _like(found[key], rule.mark)
                counts[rule.name] += 1
    elif isinstance(found, list):
        for index, inner in enumerate(found):
            if head not in ("*", str(index)):
                continue
            if rest:
                _take_path(inner, rest, rule, counts)
            else:
                found[index] = _like(inner, rule.mark)
                counts[rule.name] += 1


def _like(was: object, mark: str) -> object:
    """In place of a value: of a type that the payload takes there."""
    if isinstance(was, str):
        return mark
    if isinstance(was, dict):
        return {"redacted": mark}
    return [] if isinstance(was, list) else None


def _take_patterns(found: object, patterns: Sequence[Rule], counts: Counter[str], key: str = "") -> object:
    if isinstance(found, str):
        if key in KEPT:
            return found
        for rule in patterns:
            assert rule.pattern is not None
            found, number = rule.pattern.subn(rule.mark, found)
            if number:
                counts[rule.name] += number
        return found
    if isinstance(found, dict):
        return {name: _take_patterns(inner, patterns, counts, str(name)) for name, inner in found.items()}
    if isinstance(found, list):
        return [_take_patterns(inner, patterns, counts) for inner in found]
    return found


def _drop_tokens(found: object, counts: Counter[str]) -> None:
    if isinstance(found, dict):
        for name in ("prompt_token_ids", "token_ids", "logprobs"):
            if found.get(name):
                del found[name]
                counts[TOKENS] += 1
        for inner in found.values():
            _drop_tokens(inner, counts)
    elif isinstance(found, list):
        for inner in found:
            _drop_tokens(inner, counts)
