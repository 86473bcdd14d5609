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
    start: str = ""
    end: str = ""


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
                start=number_text(start),
                end=number_text(start + step),
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


# --- small ones, inside a line or a table ---------------------------------------------------------------------------

SPARK_WIDTH, SPARK_HEIGHT = 120.0, 24.0
WIDE_SPARK = 504.0  # three a bar, of a week's hours


@dataclass(frozen=True)
class Spark:
    """A curve or bars without axes, for the eye alone: the numbers stand beside it."""

    width: float
    height: float
    points: str  # of a polyline; "" with bars
    bars: Sequence[Bar]
    limit_y: float | None  # a threshold, where it lies inside
    last_x: float
    last_y: float


def spark(values: Sequence[float], *, limit: float | None = None, bars: bool = False) -> Spark | None:
    """None without values. Bars start at 0; a curve fills the height it has."""
    if not values:
        return None
    low, high = (0.0 if bars else min(values)), max(values)
    if limit is not None and (not bars or limit <= 2 * high):
        low, high = min(low, limit), max(high, limit)
    width = WIDE_SPARK if bars else SPARK_WIDTH
    height = 2 * SPARK_HEIGHT if bars else SPARK_HEIGHT
    spread = (high - low) or 1.0

    def down(value: float) -> float:
        return round(2 + (height - 4) * (1 - (value - low) / spread), 2)

    each = width / len(values)
    boxes = [
        Bar(round(number * each, 2), down(value), round(each * 0.8, 2), round(height - 2 - down(value), 2), "")
        for number, value in enumerate(values)
        if bars and value > 0
    ]
    across = [round(2 + (width - 4) * number / max(1, len(values) - 1), 2) for number in range(len(values))]
    points = " ".join(f"{x},{down(value)}" for x, value in zip(across, values, strict=True))
    inside = limit is not None and low <= limit <= high
    return Spark(
        width=width,
        height=height,
        points="" if bars else points,
        bars=boxes,
        limit_y=down(limit) if inside and limit is not None else None,
        last_x=across[-1],
        last_y=down(values[-1]),
    )


@dataclass(frozen=True)
class ForestRow:
    """One interval: a line from `left` to `right` with a dot at `x`."""

    name: str
    url: str
    mean: str
    interval: str
    n: str
    left: float
    x: float
    right: float


@dataclass(frozen=True)
class Forest:
    rows: Sequence[ForestRow]
    low: str
    high: str
    zero: float | None  # where 0 lies, when inside


def forest(rows: Sequence[tuple[str, float, float, float, str, str]], *, signed: bool = False) -> Forest | None:
    """Intervals on one scale. Rows are (name, mean, lower, upper, n, url); None without any.

    Args:
        signed: they are differences: with their signs, on a scale that has 0 in it.
    """
    if not rows:
        return None
    low, high = min(row[2] for row in rows), max(row[3] for row in rows)
    if signed:
        low, high = min(low, 0.0), max(high, 0.0)
    spread = (high - low) or max(abs(high), 1.0) * 0.1
    form = "+.3f" if signed else ".3f"

    def across(value: float) -> float:
        return round(MARGIN + (WIDTH - 2 * MARGIN) * (value - low) / spread, 2)

    return Forest(
        [
            ForestRow(
                name,
                url,
                f"{mean:{form}}",
                f"{lower:{form}} to {upper:{form}}",
                n,
                across(lower),
                across(mean),
                across(upper),
            )
            for name, mean, lower, upper, n, url in rows
        ],
        number_text(low),
        number_text(high),
        across(0.0) if low <= 0 <= high and (signed or low < 0 < high) else None,
    )
