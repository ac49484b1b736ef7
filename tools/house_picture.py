"""Draw docs/design/house.svg: the rooms of `src/tunesmith` on their layers, and the imports between them.

Rooms of one layer that import one another stand one below the other. An import that a longer path implies is not drawn, and
imports of the same room share a lane. The layout is Sugiyama's (1981): a lane has a node on every row that it passes, rows are
ordered by barycenters, and x positions draw neighbors together without overlap.
"""

from __future__ import annotations

import itertools
import math
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tools import check_layers
from tools.house import imports
from tools.house.imports import House

PAGE = Path(__file__).parent.parent / "docs" / "design" / "house.svg"

WIDTH, MARGIN = 900, 24
NAME, SMALL = 15, 12  # px
CHARACTER = 6.8  # px, of small text; a little more than system fonts take
LINES = 3  # of files in a box: a box is as wide as that takes, up to the widest
NARROWEST, WIDEST = 24, 90  # characters
LANE, GAP, ROW_GAP, HEAD = 14, 16, 28, 5
ROOM_FOR_LANES = 100
INK, QUIET, PAPER, BOX, EDGE, ARROW, UPWARDS = "#1f2328", "#57606a", "#ffffff", "#f6f8fa", "#8c959f", "#a4adb8", "#bc4c00"
FONT = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"

Edge = tuple[str, str]


def main() -> int:
    house = imports.read(check_layers.SOURCE, check_layers.DISCOVERY)
    PAGE.write_text(draw(house, check_layers.LAYERS), encoding="utf-8")
    return 0


@dataclass(eq=False)
class Node:
    """A room's box, or a place where a lane passes a row."""

    name: str
    row: int
    width: float
    height: float = 0
    text: Sequence[str] = ()
    lane: str = ""  # of a lane, what it leads to; the nodes of one lane have this in common
    x: float = 0  # of the middle
    y: float = 0  # of the top
    row_top: float = 0
    row_bottom: float = 0
    above: list[Node] = field(default_factory=list)
    below: list[Node] = field(default_factory=list)

    @property
    def upwards(self) -> bool:
        return self.lane.startswith("^")


def draw(house: House, layers: Sequence[Sequence[str]]) -> str:
    """The picture as SVG text."""
    pairs = {(imports.room(each.source), imports.room(each.target)) for each in house.between_rooms()}
    rows = _rows(house, layers, pairs)
    at = {name: row for row, names in enumerate(rows) for name in names}
    up = sorted(pair for pair in pairs if at[pair[1]] <= at[pair[0]])
    down = _reduced(pairs - set(up))
    grid = _grid(house, rows, down, up)
    _order(grid)
    _place(grid)
    height = _stack(grid)
    caption = (
        f"{len(house.rooms)} rooms, {len(pairs)} imports between rooms, {len(up)} upwards. An arrow points to the room that is "
        "imported; an import that longer paths imply is not drawn."
    )
    boxes = [_box(node) for row in grid for node in row if not node.lane]
    return _page([*_arrows(grid)], boxes, height, caption)


# --- rows and edges ---------------------------------------------------------------------------------------------------


def _rows(house: House, layers: Sequence[Sequence[str]], pairs: set[Edge]) -> list[list[str]]:
    """The layers, split into rows of rooms that fit beside one another and do not import one another.

    Rooms without a layer come first.
    """
    placed = {name for names in layers for name in names}
    rows = []
    for names in [[name for name in house.rooms if name not in placed], *layers]:
        rest = [name for name in names if name in house.rooms]
        while rest:
            free = [name for name in rest if not any((other, name) in pairs for other in rest)] or rest
            rows += _fitting(house, free)
            rest = [name for name in rest if name not in free]
    return rows


def _fitting(house: House, names: list[str]) -> list[list[str]]:
    """The names as one row, or halved until the boxes of a row leave room for lanes."""
    if len(names) == 1 or sum(_box_node(house, name, 0).width + GAP for name in names) < WIDTH - 2 * MARGIN - ROOM_FOR_LANES:
        return [names]
    half = len(names) // 2
    return [*_fitting(house, names[:half]), *_fitting(house, names[half:])]


def _reduced(edges: set[Edge]) -> list[Edge]:
    """The edges that no longer path implies; the graph has no cycle."""
    below: dict[str, set[str]] = {}

    def reached(node: str) -> set[str]:
        if node not in below:
            direct = {target for source, target in edges if source == node}
            below[node] = direct.union(*(reached(target) for target in direct))
        return below[node]

    return sorted(
        (source, target)
        for source, target in edges
        if not any(target in reached(other) for first, other in edges if first == source and other != target)
    )


def _grid(house: House, rows: list[list[str]], down: list[Edge], up: list[Edge]) -> list[list[Node]]:
    """The nodes by rows: boxes, and the lanes of edges on every row that they pass; an upward edge has a lane of its own."""
    grid = [[_box_node(house, name, row) for name in names] for row, names in enumerate(rows)]
    nodes = {node.name: node for row in grid for node in row}
    for source, target in [*down, *((high, low) for low, high in up)]:
        here, end = nodes[source], nodes[target]
        lane = f"^{target} {source}" if (target, source) in up else target
        for row in range(here.row + 1, end.row):
            name = f"{lane} {row}"
            if name not in nodes:
                nodes[name] = Node(name, row, LANE, lane=lane)
                grid[row].append(nodes[name])
            _join(here, nodes[name])
            here = nodes[name]
        _join(here, end)
    for low, high in up:
        label = nodes.get(f"^{low} {high} {nodes[low].row - 1}")
        if label is not None:
            label.text = ["discovers methods" if (low, high) in check_layers.DISCOVERY else "upwards"]
            label.width = _text_width(label.text[0], SMALL)
    return grid


def _join(upper: Node, lower: Node) -> None:
    if lower not in upper.below:
        upper.below.append(lower)
        lower.above.append(upper)


def _box_node(house: House, name: str, row: int) -> Node:
    files = house.files_of(name)
    if files == [f"{name}.py"]:
        return Node(name, row, _text_width(f"{name}.py", NAME) + 24, NAME + 16, [f"{name}.py"])
    inside = ", ".join(file.split("/", 1)[1].removesuffix(".py") for file in files if not file.endswith("__init__.py"))
    wide = NARROWEST
    while len(wrapped := textwrap.wrap(inside, wide, break_long_words=False)) > LINES and wide < WIDEST:
        wide += 1
    width = max([_text_width(f"{name}/", NAME), *(_text_width(line, SMALL) for line in wrapped)]) + 24
    return Node(name, row, width, NAME + 16 + len(wrapped) * (SMALL + 4), [f"{name}/", *wrapped])


def _text_width(text: str, size: float) -> float:
    return len(text) * CHARACTER * size / SMALL * (1.05 if size == NAME else 1)


# --- positions --------------------------------------------------------------------------------------------------------


def _order(grid: list[list[Node]]) -> None:
    """Sort every row by the mean position of neighbors, downwards and upwards in turn; keep the best order met."""
    best, fewest = [list(row) for row in grid], _crossings(grid)
    for turn in range(24):
        downwards = turn % 2 == 0
        for row in grid if downwards else reversed(grid):
            places = {node.name: place for other in grid for place, node in enumerate(other)}
            spot = {node.name: _mean_place(node, downwards, places) for node in row}
            row.sort(key=lambda node: (spot[node.name], places[node.name]))
        if (crossings := _crossings(grid)) < fewest:
            best, fewest = [list(row) for row in grid], crossings
    for row, names in zip(grid, best):
        row[:] = names


def _mean_place(node: Node, downwards: bool, places: dict[str, int]) -> float:
    neighbors = node.above if downwards else node.below
    if not neighbors:
        return float(places[node.name])
    return sum(places[other.name] for other in neighbors) / len(neighbors)


def _crossings(grid: list[list[Node]]) -> int:
    count = 0
    for upper, lower in itertools.pairwise(grid):
        place = {node.name: position for position, node in enumerate(lower)}
        ends = [place[other.name] for node in upper for other in sorted(node.below, key=lambda each: place[each.name])]
        count += sum(first > second for position, first in enumerate(ends) for second in ends[position + 1 :])
    return count


def _place(grid: list[list[Node]]) -> None:
    """x positions: each row as near to its neighbors as its order and widths allow, again and again; lanes end up straight."""
    for row in grid:
        _spread(row, [WIDTH / 2] * len(row), [1.0] * len(row))
    lanes: dict[str, list[Node]] = {}
    for node in (node for row in grid for node in row if node.lane):
        lanes.setdefault(node.lane, []).append(node)
    for turn in range(120):
        straight = {lane: _middle([node.x for node in nodes]) for lane, nodes in lanes.items()}
        for row in grid if turn % 2 == 0 else reversed(grid):
            wanted, weights = [], []
            for node in row:
                pulls = [(other.x, _pull(node, other)) for other in [*node.above, *node.below]] or [(WIDTH / 2, 0.1)]
                if node.lane and turn >= 40:
                    pulls.append((straight[node.lane], turn if turn < 100 else 1000.0))
                weights.append(math.fsum(weight for _, weight in pulls))
                wanted.append(math.fsum(x * weight for x, weight in pulls) / weights[-1])
            _spread(row, wanted, weights)


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _pull(one: Node, other: Node) -> float:
    return {0: 1.0, 1: 2.0, 2: 8.0}[bool(one.lane) + bool(other.lane)]


def _spread(row: list[Node], wanted: Sequence[float], weights: Sequence[float]) -> None:
    """Set each x as near as can be to what is wanted, least squares, without overlap and within the page."""
    offsets = [0.0]
    for left, right in itertools.pairwise(row):
        offsets.append(offsets[-1] + (left.width + right.width) / 2 + GAP)
    fitted = _increasing([want - offset for want, offset in zip(wanted, offsets)], weights)
    low = MARGIN + row[0].width / 2
    high = WIDTH - MARGIN - row[-1].width / 2 - offsets[-1]
    for node, value, offset in zip(row, fitted, offsets):
        node.x = max(low, min(high, value)) + offset


def _increasing(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest sequence that does not decrease (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, weight in zip(values, weights):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, wa, na), (b, wb, nb) = pools[-2:]
            pools[-2:] = [((a * wa + b * wb) / (wa + wb), wa + wb, na + nb)]
    return [mean for mean, _, many in pools for _ in range(many)]


def _stack(grid: list[list[Node]]) -> float:
    """y positions; returns where the next row would start."""
    y = float(MARGIN)
    for row in grid:
        height = max(node.height for node in row)
        for node in row:
            node.y = y + (0 if node.lane else (height - node.height) / 2)
            node.height = height if node.lane else node.height
            node.row_top, node.row_bottom = y, y + height
        y += height + ROW_GAP
    return y


# --- drawing ----------------------------------------------------------------------------------------------------------


def _arrows(grid: list[list[Node]]) -> Iterable[str]:
    for node in (node for row in grid for node in row):
        for other in node.below:
            upwards = node.upwards or other.upwards or other.row <= node.row
            yield _line(node, other, upwards)
        if node.lane:
            style = _UPWARDS if node.upwards else ""
            yield f'<path d="M{node.x:.0f} {node.y:.0f}V{node.y + node.height:.0f}"{style}/>'
            yield from (_label(node, text) for text in node.text)


_UPWARDS = f' stroke="{UPWARDS}" stroke-dasharray="5 3"'


def _line(upper: Node, lower: Node, upwards: bool) -> str:
    """The line between two nodes on neighboring rows, with an arrowhead where it ends at a box."""
    x, end_x = _port(upper, upper.below, lower), _port(lower, lower.above, upper)
    to_box, from_box = not upwards and not lower.lane, upwards and not upper.lane
    style = (_UPWARDS if upwards else "") + (' marker-end="url(#down)"' if to_box else "")
    style += ' marker-start="url(#up)"' if from_box else ""
    top, start = (y + HEAD * from_box for y in (upper.y + upper.height, upper.row_bottom))
    end, bottom = (y - HEAD * to_box for y in (lower.row_top, lower.y))
    middle = (start + end) / 2  # between the rows the line bends, beside boxes of its row it is straight
    before, after = ("" if a == b else f"V{b:.0f}" for a, b in ((top, start), (end, bottom)))
    bend = f"C{x:.0f} {middle:.0f} {end_x:.0f} {middle:.0f} {end_x:.0f} {end:.0f}"
    return f'<path d="M{x:.0f} {top:.0f}{before}{bend}{after}"{style}/>'


def _label(node: Node, text: str) -> str:
    y = node.y + node.height / 2
    width = _text_width(text, SMALL)
    return (
        f'<rect x="{node.x - width / 2:.0f}" y="{y - 9:.0f}" width="{width:.0f}" height="18" fill="{PAPER}" stroke="none"/>'
        f'<text class="small" x="{node.x:.0f}" y="{y + 4:.0f}" text-anchor="middle" style="fill: {UPWARDS}">{text}</text>'
    )


def _port(node: Node, neighbors: list[Node], other: Node) -> float:
    """Where at the node's edge the line to `other` starts: as straight above or below it as the other lines allow."""
    if node.lane:
        return node.x
    ordered = sorted(neighbors, key=lambda each: (each.x, each.name))
    room = node.width - 24
    step = min(14.0, room / max(len(ordered) - 1, 1))
    fitted = _increasing([each.x - step * place for place, each in enumerate(ordered)], [1.0] * len(ordered))
    left, right = node.x - room / 2, node.x + room / 2 - step * (len(ordered) - 1)
    place = ordered.index(other)
    return max(left, min(right, fitted[place])) + step * place


def _box(node: Node) -> str:
    left, top = node.x - node.width / 2, node.y
    lines = [
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{node.width:.0f}" height="{node.height:.0f}" rx="6"/>',
        f'<text class="name" x="{left + 12:.0f}" y="{top + NAME + 6:.0f}">{node.text[0]}</text>',
    ]
    for number, line in enumerate(node.text[1:], 1):
        lines.append(f'<text class="small" x="{left + 12:.0f}" y="{top + NAME + 6 + number * (SMALL + 4):.0f}">{line}</text>')
    return "\n".join(lines)


def _page(arrows: Sequence[str], boxes: Sequence[str], height: float, caption: str) -> str:
    lines = textwrap.wrap(caption, int((WIDTH - 2 * MARGIN) / CHARACTER))
    whole = height + len(lines) * (SMALL + 4) + 4
    head = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {whole:.0f}" width="{WIDTH}" role="img">
<title>The rooms of tunesmith and the imports between them</title>
<style>
text {{ font-family: {FONT}; stroke: none; }}
.name {{ font-size: {NAME}px; font-weight: 600; fill: {INK}; }}
.small {{ font-size: {SMALL}px; fill: {QUIET}; }}
</style>
<defs>
{_head("down", ARROW)}
{_head("up", UPWARDS)}
</defs>
<rect width="{WIDTH}" height="{whole:.0f}" fill="{PAPER}"/>
<g fill="none" stroke="{ARROW}" stroke-width="1.3">"""
    notes = [
        f'<text class="small" x="{MARGIN}" y="{height + SMALL + n * (SMALL + 4):.0f}">{line}</text>'
        for n, line in enumerate(lines)
    ]
    return "\n".join([head, *arrows, "</g>", f'<g fill="{BOX}" stroke="{EDGE}">', *boxes, "</g>", *notes, "</svg>", ""])


def _head(name: str, color: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="2" refY="4" markerWidth="6" markerHeight="6" orient="auto-start-reverse">'
        f'<path d="M0 0L8 4L0 8z" fill="{color}" stroke="none"/></marker>'
    )


if __name__ == "__main__":
    sys.exit(main())
