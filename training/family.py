"""The family of a version: what it comes from and what came from it, as a drawing made here."""

from collections import defaultdict
from dataclasses import dataclass

from training.models import TrainedModel

MOST = 400  # versions of a project that are looked through
DRAWN = 40
BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 104.0, 28.0, 44.0, 12.0


@dataclass(frozen=True)
class Node:
    x: float
    y: float
    text_x: float
    text_y: float
    pk: int | None  # None: the base
    name: str
    status: str
    status_label: str
    is_here: bool


@dataclass(frozen=True)
class Edge:
    """A curve from a parent's right side to a child's left."""

    path: str


@dataclass(frozen=True)
class Family:
    nodes: list[Node]
    edges: list[Edge]
    width: float
    height: float
    box_width: float = BOX_WIDTH
    box_height: float = BOX_HEIGHT
    left_out: int = 0


def of(model: TrainedModel) -> Family:
    """Ancestors up to the base and all descendants, oldest at the left. One query."""
    rows = {
        one.pk: one
        for one in TrainedModel.objects.filter(project=model.project_id)
        .only("version", "parent_id", "status", "ordinal", "project_id")
        .order_by("-ordinal")[:MOST]
    }
    rows.setdefault(model.pk, model)
    children: defaultdict[int, list[int]] = defaultdict(list)
    for one in sorted(rows.values(), key=lambda row: row.ordinal):
        if one.parent_id is not None:
            children[one.parent_id].append(one.pk)
    line = [model.pk]  # from the base to the version
    while (parent := rows[line[0]].parent_id) in rows and parent is not None and parent not in line:
        line.insert(0, parent)
    # Depth first, so that each branch keeps a row of its own.
    places: dict[int, tuple[int, int]] = {pk: (depth, 0) for depth, pk in enumerate(line, start=1)}
    row, before = 0, 0
    waiting = [(pk, len(line) + 1) for pk in reversed(children[model.pk])]
    left_out = 0
    while waiting:
        pk, depth = waiting.pop()
        if pk in places:
            continue
        if len(places) >= DRAWN:
            left_out += 1
            continue
        row += depth <= before  # a branch that begins again further left takes a new row
        before = depth
        places[pk] = (depth, row)
        waiting += [(child, depth + 1) for child in reversed(children[pk])]
    return _draw(model, rows, line, places, left_out)


def _draw(
    model: TrainedModel,
    rows: dict[int, TrainedModel],
    line: list[int],
    places: dict[int, tuple[int, int]],
    left_out: int,
) -> Family:
    def corner(depth: int, row: int) -> tuple[float, float]:
        return 1 + depth * (BOX_WIDTH + GAP_X), 1 + row * (BOX_HEIGHT + GAP_Y)

    def node(pk: int | None, name: str, status: str, label: str, at: tuple[int, int]) -> Node:
        x, y = corner(*at)
        return Node(x, y, x + BOX_WIDTH / 2, y + BOX_HEIGHT / 2 + 4, pk, name, status, label, pk == model.pk)

    nodes = [node(None, "the base", "base", "", (0, 0))]
    edges = []
    for pk, at in places.items():
        one = rows[pk]
        nodes.append(node(pk, one.version, one.status, str(one.get_status_display()), at))
        from_ = places.get(one.parent_id, (0, 0)) if one.parent_id is not None else (0, 0)
        (x1, y1), (x2, y2) = corner(*from_), corner(*at)
        start, end = x1 + BOX_WIDTH, x2
        bend = (start + end) / 2
        y1, y2 = y1 + BOX_HEIGHT / 2, y2 + BOX_HEIGHT / 2
        edges.append(Edge(f"M{start:.1f},{y1:.1f} C{bend:.1f},{y1:.1f} {bend:.1f},{y2:.1f} {end:.1f},{y2:.1f}"))
    width = max(one.x for one in nodes) + BOX_WIDTH + 1
    height = max(one.y for one in nodes) + BOX_HEIGHT + 1
    return Family(nodes, edges, width, height, left_out=left_out)
