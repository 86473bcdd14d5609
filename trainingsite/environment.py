"""Strict readers of the environment: a value that cannot be meant stops the start with a sentence."""

import os
from collections.abc import Mapping
from pathlib import Path

from django.core.exceptions import ImproperlyConfigured

TRUE = frozenset({"1", "true", "yes", "on"})
FALSE = frozenset({"0", "false", "no", "off", ""})


class Environment:
    """Reads typed values out of `source`; each reader names the variable it could not read."""

    def __init__(self, source: Mapping[str, str] | None = None) -> None:
        self._source = os.environ if source is None else source

    def text(self, name: str, default: str = "") -> str:
        return self._source.get(name, "").strip() or default

    def flag(self, name: str, *, default: bool) -> bool:
        raw = self._source.get(name)
        if raw is None:
            return default
        if raw.strip().lower() in TRUE:
            return True
        if raw.strip().lower() in FALSE:
            return False
        raise ImproperlyConfigured(f"{name}={raw!r} is not a yes or no. Use 1 or 0.")

    def integer(self, name: str, default: int, *, at_least: int | None = None, at_most: int | None = None) -> int:
        raw = self._source.get(name, "").strip()
        if not raw:
            return default
        try:
            value = int(raw)
        except ValueError:
            raise ImproperlyConfigured(f"{name}={raw!r} is not a whole number.") from None
        self._range(name, value, at_least, at_most)
        return value

    def number(
        self, name: str, default: float, *, at_least: float | None = None, at_most: float | None = None
    ) -> float:
        raw = self._source.get(name, "").strip()
        if not raw:
            return default
        try:
            value = float(raw)
        except ValueError:
            raise ImproperlyConfigured(f"{name}={raw!r} is not a number.") from None
        if value != value or value in (float("inf"), float("-inf")):
            raise ImproperlyConfigured(f"{name}={raw!r} is not a finite number.")
        self._range(name, value, at_least, at_most)
        return value

    def path(self, name: str, default: Path) -> Path:
        raw = self._source.get(name, "").strip()
        return Path(raw).expanduser().resolve() if raw else default

    def words(self, name: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Comma-separated words, without empty ones."""
        raw = self._source.get(name, "")
        return tuple(word.strip() for word in raw.split(",") if word.strip()) or default

    @staticmethod
    def _range(name: str, value: float, at_least: float | None, at_most: float | None) -> None:
        if at_least is not None and value < at_least:
            raise ImproperlyConfigured(f"{name}={value} is below {at_least}.")
        if at_most is not None and value > at_most:
            raise ImproperlyConfigured(f"{name}={value} is above {at_most}.")
