"""A chart of a few curves as SVG text for a README, on a light background.

No script, and no font of its own. It knows curves and a line that they should stay below, but not
their meaning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TypeAlias

import attrs

Point: TypeAlias = tuple[float, float]

_WIDTH, _HEIGHT = 760, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 736.0, 64.0, 296.0
_FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"
_INK, _SOFT, _FAINT, _ALARM, _TINT = "#1f2328", "#59636e", "#e4e7eb", "#c1121f", "#fdf1f0"

# Pixels by which a thinned line may be off: less than the eye sees.
_TOLERANCE = 0.5
# Most ticks of the horizontal axis.
_TICKS = 12


@attrs.frozen(kw_only=True)
class Curve:
    """One line, from left to right, and the name beside its colour."""

    name: str
    note: str
    colour: str
    width: float
    points: Sequence[Point]


@attrs.frozen(kw_only=True)
class Chart:
    """The content of a chart.

    The later curves lie above the earlier ones; the legend names them in the order of `legend`.
    """

    title: str
    subtitle: str
    description: str  # for readers without sight
    across: str  # the quantity of the horizontal axis
    limit: float
    limit_name: str
    tick: float  # of the horizontal axis
    curves: Sequence[Curve]
    legend: Sequence[Curve]

    def draw(self) -> str:
        scale = _Scale(
            max(x for curve in self.curves for x, _ in curve.points) * 1.02,
            max(self.limit, *(y for curve in self.curves for _, y in curve.points)) * 1.06,
        )
        parts = [
            *_frame(self, scale),
            *_axes(self, scale),
            *_limit(self, scale),
            *(part for curve in self.curves for part in _curve(curve, scale)),
            *_legend(self.legend),
        ]
        return "\n".join([*parts, "</svg>\n"])


@attrs.frozen
class _Scale:
    """From values to pixels."""

    most_x: float
    most_y: float

    def x(self, value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * value / self.most_x

    def y(self, value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * value / self.most_y


# --- parts


def _frame(chart: Chart, scale: _Scale) -> list[str]:
    look = f'role="img" aria-labelledby="title desc" font-family="{_FONT}" font-size="12"'
    return [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            f'width="{_WIDTH}" height="{_HEIGHT}" {look}>'
        ),
        f'<title id="title">{escape(chart.title)}</title>',
        f'<desc id="desc">{escape(chart.description)}</desc>',
        (
            f'<rect x="0.5" y="0.5" width="{_WIDTH - 1}" height="{_HEIGHT - 1}" rx="10" '
            f'fill="#fff" stroke="{_FAINT}"/>'
        ),
        _text(20, 28, chart.title, size=15, weight=600),
        _text(20, 47, chart.subtitle, colour=_SOFT),
        _block((_LEFT, _TOP), (_RIGHT, scale.y(chart.limit))),
    ]


def _limit(chart: Chart, scale: _Scale) -> list[str]:
    y = scale.y(chart.limit)
    return [
        _line((_LEFT, y), (_RIGHT, y), _ALARM, ' stroke-dasharray="5 5"'),
        # In the middle and below, where lines under the limit leave room.
        _text(
            (_LEFT + _RIGHT) / 2,
            y + 20,
            chart.limit_name,
            colour=_ALARM,
            anchor="middle",
            weight=600,
        ),
    ]


def _axes(chart: Chart, scale: _Scale) -> list[str]:
    parts = [_line((_LEFT, _BOTTOM), (_RIGHT, _BOTTOM), _SOFT)]
    for value in _ticks(chart.limit, scale.most_y):
        y = scale.y(value)
        if value not in {0, chart.limit}:
            parts.append(_line((_LEFT, y), (_RIGHT, y), _FAINT))
        colour = _ALARM if value == chart.limit else _SOFT
        parts.append(_text(_LEFT - 8, y + 4, f"{value:g}", colour=colour, anchor="end"))
    for value in _ticks(chart.tick, scale.most_x):
        x = scale.x(value)
        parts += [
            _line((x, _BOTTOM), (x, _BOTTOM + 5), _SOFT),
            _text(x, _BOTTOM + 19, f"{value:g}", colour=_SOFT, anchor="middle"),
        ]
    return [*parts, _text(_RIGHT, _BOTTOM + 34, chart.across, colour=_SOFT, anchor="end")]


def _ticks(step: float, most: float) -> list[float]:
    step *= math.ceil(most / step / _TICKS)
    return [step * place for place in range(int(most / step) + 1)]


def _curve(curve: Curve, scale: _Scale) -> list[str]:
    points = thinned([(scale.x(x), scale.y(y)) for x, y in curve.points], _TOLERANCE)
    path = "M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in points)
    x, y = points[-1]
    look = (
        f'stroke="{curve.colour}" stroke-width="{curve.width:g}" stroke-linejoin="round" '
        'stroke-linecap="round"'
    )
    return [
        f'<path d="{path}" fill="none" {look}/>',
        (
            f'<circle cx="{_short(x)}" cy="{_short(y)}" r="{curve.width / 2 + 2:g}" '
            f'fill="{curve.colour}"/>'
        ),
    ]


def _legend(curves: Sequence[Curve]) -> list[str]:
    left = _RIGHT - 254
    parts = [_block((left - 8, _TOP + 2), (_RIGHT, _TOP + 6 + 20 * len(curves)))]
    for place, curve in enumerate(curves):
        y = _TOP + 18 + 20 * place
        # One behind the other, so that they cannot meet, with a font of any width.
        named = (
            f'<tspan font-weight="600">{escape(curve.name)}</tspan><tspan dx="8" '
            f'fill="{_SOFT}">{escape(curve.note)}</tspan>'
        )
        parts += [
            _line(
                (left, y - 4),
                (left + 22, y - 4),
                curve.colour,
                f' stroke-width="{curve.width:g}" stroke-linecap="round"',
            ),
            f'<text x="{_short(left + 30)}" y="{_short(y)}" fill="{_INK}">{named}</text>',
        ]
    return parts


def _block(start: Point, end: Point) -> str:
    size = f'width="{_short(end[0] - start[0])}" height="{_short(end[1] - start[1])}"'
    return f'<rect x="{_short(start[0])}" y="{_short(start[1])}" {size} fill="{_TINT}"/>'


def _line(start: Point, end: Point, colour: str, look: str = "") -> str:
    ends = (
        f'x1="{_short(start[0])}" y1="{_short(start[1])}" x2="{_short(end[0])}" '
        f'y2="{_short(end[1])}"'
    )
    return f'<line {ends} stroke="{colour}"{look}/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    colour: str = _INK,
    anchor: str = "start",
    size: float | None = None,
    weight: int = 400,
) -> str:
    look = f' font-weight="{weight}"' if weight != 400 else ""
    look += f' font-size="{size:g}"' if size is not None else ""
    look += f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{_short(x)}" y="{_short(y)}" fill="{colour}"{look}>{escape(text)}</text>'


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


# --- lines


def steps(levels: Iterable[Point]) -> list[Point]:
    """A line that stays on each level until the next begins."""
    line: list[Point] = []
    for at, level in levels:
        if line:
            line.append((at, line[-1][1]))
        line.append((at, level))
    return line


def thinned(line: Sequence[Point], tolerance: float) -> list[Point]:
    """The fewest points that keep a line within this distance everywhere (Douglas and Peucker).

    Both ends stay.
    """
    keep, spans = {0, len(line) - 1}, [(0, len(line) - 1)]
    while spans:
        first, last = spans.pop()
        worst = max(
            range(first + 1, last),
            key=lambda place: _distance(line[place], line[first], line[last]),
            default=first,
        )
        if _distance(line[worst], line[first], line[last]) > tolerance:
            keep.add(worst)
            spans += [(first, worst), (worst, last)]
    return [line[place] for place in sorted(keep)]


def _distance(point: Point, start: Point, end: Point) -> float:
    """From a point to the straight line between two others."""
    across, down = end[0] - start[0], end[1] - start[1]
    length = across * across + down * down
    share = (
        ((point[0] - start[0]) * across + (point[1] - start[1]) * down) / length if length else 0.0
    )
    share = min(1.0, max(0.0, share))
    return math.dist(point, (start[0] + share * across, start[1] + share * down))
