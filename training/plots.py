"""Plots as SVG made here: points in a box, and the numbers beside them. Templates draw them; nothing is inline."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 300.0, 96.0
MARGIN = 6.0


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Plot:
    """One curve. Coordinates are of the SVG's user space, y downwards."""

    title: str
    points: str  # of a polyline
    low: str
    high: str
    last: str
    first_x: str
    last_x: str
    dots: Sequence[Dot] = ()
    band: str = ""  # of a polygon: an interval around the curve
    limit_y: float | None = None  # a threshold, where it lies inside the box
    limit: str = ""


def line(
    title: str,
    xs: Sequence[float],
    ys: Sequence[float | None],
    *,
    limit: float | None = None,
    labels: Sequence[str] = (),
    bounds: Sequence[tuple[float, float]] = (),
) -> Plot | None:
    """A curve through the known points; None when there are none.

    Args:
        limit: a threshold to draw, if the curve comes near it.
        labels: one a point: then each gets a dot with its label.
        bounds: one (low, high) a point: drawn as a band.
    """
    known = [
        (x, y, number) for number, (x, y) in enumerate(zip(xs, ys, strict=True)) if y is not None and math.isfinite(y)
    ]
    if not known:
        return None
    values = [y for _, y, _ in known] + [value for pair in bounds for value in pair]
    if limit is not None:
        values.append(limit)
    low, high = min(values), max(values)
    spread = (high - low) or max(abs(high), 1.0) * 0.1
    left, right = known[0][0], known[-1][0]

    def across(x: float) -> float:
        return round(MARGIN + (WIDTH - 2 * MARGIN) * ((x - left) / (right - left) if right > left else 0.5), 2)

    def down(y: float) -> float:
        return round(MARGIN + (HEIGHT - 2 * MARGIN) * (1 - (y - low) / spread), 2)

    band = ""
    if bounds:
        upper = [(across(x), down(bounds[number][1])) for x, _, number in known]
        lower = [(across(x), down(bounds[number][0])) for x, _, number in reversed(known)]
        band = " ".join(f"{x},{y}" for x, y in (*upper, *lower))
    return Plot(
        title=title,
        points=" ".join(f"{across(x)},{down(y)}" for x, y, _ in known),
        low=number_text(low),
        high=number_text(high),
        last=number_text(known[-1][1]),
        first_x=number_text(left),
        last_x=number_text(right),
        dots=[Dot(across(x), down(y), labels[number]) for x, y, number in known] if labels else (),
        band=band,
        limit_y=down(limit) if limit is not None else None,
        limit=number_text(limit) if limit is not None else "",
    )


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    label: str


def histogram(values: Sequence[float], *, bins: int = 21) -> list[Bar]:
    """Counts over equal bins from the lowest to the highest value."""
    if not values:
        return []
    low, high = min(values), max(values)
    step = (high - low) / bins or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / step))] += 1
    most = max(counts)
    width = (WIDTH - 2 * MARGIN) / bins
    bars = []
    for number, count in enumerate(counts):
        height = (HEIGHT - 2 * MARGIN) * count / most
        start = low + number * step
        bars.append(
            Bar(
                x=round(MARGIN + number * width, 2),
                y=round(HEIGHT - MARGIN - height, 2),
                width=round(width * 0.9, 2),
                height=round(height, 2),
                label=f"{number_text(start)} to {number_text(start + step)}: {count}",
            )
        )
    return bars


def number_text(value: float) -> str:
    """Short, and never in a form that needs thinking about."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1e}"
