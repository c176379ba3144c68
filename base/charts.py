"""Charts as SVG: axes, lines, points and intervals, whose colours are those of a style sheet.

Labels of a report's values carry their reference, as everywhere on its page; numbers along the axes are the scale's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 380.0, 236.0  # of a chart, in units of the SVG, as all lengths here
LEFT, RIGHT, TOP, BOTTOM = 54.0, 16.0, 16.0, 40.0  # margins around the axes
MAX_POINTS = 160  # of a line; more would not be seen
TICKS = 5  # intervals of an axis, about
HEADROOM = 1.12  # end of the vertical axis over the highest point
HEAD = 26.0  # height of a document's heading
# Of a document by itself; a page has its own style sheet. Colours are those of the page of a run, in its light form.
STYLE = (
    "text{font:11.5px system-ui,sans-serif;fill:#5a5751}.heading{font-size:14px;font-weight:600;fill:#1d1c1a}"
    ".value{font-size:13px;font-weight:600;fill:#1d1c1a}.end{text-anchor:end}.middle{text-anchor:middle}"
    ".grid{stroke:#dcd8cf}.axis{stroke:#6a665f}.line{fill:none;stroke-width:2.4;stroke-linejoin:round;stroke:#a63c0a}"
    ".line.accuracy{stroke:#175e94}.line.record{stroke-dasharray:6 4}"
    ".point{fill:#a63c0a}.point.accuracy{fill:#175e94}"
)
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """Line of a chart."""

    points: Points  # (x, y), in the order of x
    look: str  # class of the style sheet
    step: bool = False  # whether y holds until the next x


@dataclass(frozen=True)
class Caption:
    """Text beside a mark.

    Attributes:
      text: as it is shown.
      pointer: of the report's value that the text shows; None outside a report.
      form: of that text.
    """

    text: str
    pointer: str | None = None
    form: str = "plain"


@dataclass(frozen=True)
class Mark:
    """Point of a chart.

    Attributes:
      x, y: on the axes.
      look: class of the style sheet.
      label: its text; None for a point without one.
      cross: whether it is a cross, as what was refused is.
      position: of the label: `left` above the point, `right` above it, or `beside` it.
    """

    x: float
    y: float
    look: str
    label: Caption | None = None
    cross: bool = False
    position: Literal["left", "right", "beside"] = "left"


@dataclass(frozen=True)
class Whisker:
    """Interval at one x."""

    x: float
    low: float
    high: float
    look: str


@dataclass(frozen=True)
class Chart:
    """Chart with two axes.

    Attributes:
      name: unique in its document.
      title: description for readers who cannot see it.
      across: label of the horizontal axis.
      up: label of the vertical axis.
      lines: drawn first.
      intervals: drawn next.
      marks: drawn last.
      logarithmic: whether the horizontal axis is.
      top: upper end of the vertical axis; None lies above all points.
      bottom: lower end of the vertical axis.
      shares: whether both axes are labelled in percent.
      shares_up: whether the vertical axis is labelled in percent.
      whole: whether the horizontal axis has whole numbers only.
      from_zero: whether the horizontal axis begins at 0.
    """

    name: str
    title: str
    across: str
    up: str
    lines: Sequence[Line] = ()
    intervals: Sequence[Whisker] = ()
    marks: Sequence[Mark] = ()
    logarithmic: bool = False
    top: float | None = None
    bottom: float = 0.0
    shares: bool = False
    shares_up: bool = False
    whole: bool = False
    from_zero: bool = True


def svg(chart: Chart) -> str:
    """Return a chart as SVG; the same chart gives the same bytes."""
    return picture(chart.name, chart.title, HEIGHT, _parts(chart))


def document(heading: str, charts: Sequence[Chart]) -> str:
    """Return charts side by side under a heading as an SVG document by itself, with its style sheet."""
    width, height = WIDTH * len(charts) + 2 * RIGHT, HEAD + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">',
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#ffffff"/>',
        label(width / 2, HEAD - 8, heading, "heading middle"),
    ]
    for index, chart in enumerate(charts):
        body = f"<title>{escape(chart.title)}</title>" + "".join(_parts(chart))
        parts.append(f'<g role="img" transform="translate({WIDTH * index:g} {HEAD:g})">{body}</g>')
    return "".join((*parts, "</svg>\n"))


def _parts(chart: Chart) -> list[str]:
    """Return the elements of a chart."""
    frame = _frame(chart)
    return [
        *_scale(chart, frame),
        *(_line(line, frame) for line in chart.lines if line.points),
        *(_interval(each, frame) for each in chart.intervals),
        *(part for mark in chart.marks for part in _mark(mark, frame)),
    ]


def picture(name: str, title: str, height: float, body: Sequence[str]) -> str:
    """Return the SVG element of a chart.

    Args:
      name: unique in its document.
      title: description for readers who cannot see it.
      height: in units of the SVG.
      body: its parts.
    """
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-labelledby="{escape(name)}-title">'
        f'<title id="{escape(name)}-title">{escape(title)}</title>' + "".join(body) + "</svg>"
    )


@dataclass(frozen=True)
class _Frame:
    """Ends of a chart's axes, and the place of a value on them, in the units of the SVG."""

    x_min: float
    x_max: float
    y_min: float
    y_max: float
    logarithmic: bool

    def x(self, value: float) -> float:
        ends = (value, self.x_min, self.x_max)
        at, low, high = map(math.log10, ends) if self.logarithmic else ends
        share = 0.5 if high == low else (at - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (min(value, self.y_max) - self.y_min) / (self.y_max - self.y_min)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _frame(chart: Chart) -> _Frame:
    """Return the axes that hold all points, whiskers and marks of a chart."""
    xs = [x for line in chart.lines for x, _ in line.points] + [each.x for each in chart.marks]
    xs += [each.x for each in chart.intervals] or ([] if xs else [0.0, 1.0])
    ys = [y for line in chart.lines for _, y in line.points if math.isfinite(y)]
    ys += [mark.y for mark in chart.marks] + [each.high for each in chart.intervals]
    highest = max([y for y in ys if math.isfinite(y)], default=1.0) or 1.0
    top = highest * HEADROOM if chart.top is None else chart.top
    x_min = min([0.0, *xs]) if chart.from_zero and not chart.logarithmic else min(xs)
    return _Frame(x_min, max(xs), chart.bottom, max(top, chart.bottom + 1e-9), chart.logarithmic)


def _scale(chart: Chart, frame: _Frame) -> list[str]:
    """Return the axes with their labels, ticks and grid."""
    right, base = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value in _ticks(frame.y_min, frame.y_max):
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{LEFT:g} {y:.1f}H{right:g}"/>')
        parts.append(label(LEFT - 6, y + 4, _number(value, chart.shares or chart.shares_up), "tick end"))
    for value in _across(chart, frame):
        text = f"1e{round(math.log10(value))}" if chart.logarithmic else _number(value, chart.shares)
        parts.append(label(frame.x(value), base + 15, text, "tick middle"))
    parts.append(f'<path class="axis" d="M{LEFT:g} {base:g}H{right:g}"/>')
    parts.append(label((LEFT + right) / 2, HEIGHT - 6, chart.across, "label middle"))
    middle = (TOP + base) / 2
    turned = f'transform="rotate(-90 11 {middle:g})"'
    parts.append(f'<text class="label middle" x="11" y="{middle:g}" {turned}>{escape(chart.up)}</text>')
    return parts


def _across(chart: Chart, frame: _Frame) -> list[float]:
    """Return the ticks of the horizontal axis."""
    if chart.logarithmic:
        low, high = round(math.log10(frame.x_min)), round(math.log10(frame.x_max))
        return [10.0**power for power in range(low, high + 1)]
    ticks = _ticks(frame.x_min, frame.x_max)
    return [each for each in ticks if each == int(each)] if chart.whole else ticks


def _ticks(low: float, high: float) -> list[float]:
    """Return at most about `TICKS` round numbers between two."""
    if high <= low:
        return [low]
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(step * at, 12) for at in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float, share: bool) -> str:
    return f"{100 * value:g} %" if share else f"{value:g}"


def _line(line: Line, frame: _Frame) -> str:
    """Return the path of a line, as straight parts or as steps."""
    points = [(x, y) for x, y in thin(line.points) if math.isfinite(y)]
    parts: list[str] = []
    for at, (x, y) in enumerate(points):
        if at and line.step:
            parts.append(f"H{frame.x(x):.1f}V{frame.y(y):.1f}")
        else:
            parts.append(f"{'L' if at else 'M'}{frame.x(x):.1f} {frame.y(y):.1f}")
    return f'<path class="line {line.look}" d="{"".join(parts)}"/>'


def thin(points: Points, max_points: int = MAX_POINTS) -> Points:
    """Return a bounded number of the points, evenly spaced, including the first and the last."""
    if len(points) <= max_points:
        return points
    return [points[round(at * (len(points) - 1) / (max_points - 1))] for at in range(max_points)]


def _interval(each: Whisker, frame: _Frame) -> str:
    x, low, high = frame.x(each.x), frame.y(max(each.low, frame.y_min)), frame.y(each.high)
    ends = "".join(f"M{x - 4:.1f} {y:.1f}h8" for y in (low, high))
    return f'<path class="interval {each.look}" d="M{x:.1f} {low:.1f}V{high:.1f}{ends}"/>'


def _mark(mark: Mark, frame: _Frame) -> list[str]:
    """Return the symbol of a mark and, if it refers to a value, its label, within the chart."""
    x, y = frame.x(mark.x), frame.y(mark.y)
    if mark.cross:
        symbol = f'<path class="cross {mark.look}" d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"/>'
    else:
        symbol = f'<circle class="point {mark.look}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    if mark.label is None:
        return [symbol]
    is_left = mark.position == "left" and x > WIDTH / 3
    up = -4.0 if mark.position == "beside" else 8.0
    at = f'x="{x - 8 if is_left else x + 9:.1f}" y="{max(y - up, TOP - 2):.1f}"'
    pointer = mark.label.pointer
    refers = f' data-ref="{escape(pointer)}" data-form="{mark.label.form}"' if pointer else ""
    return [
        symbol,
        f'<text class="value{" end" if is_left else ""}" {at}{refers}>{escape(mark.label.text)}</text>',
    ]


BAR, THICK = 180.0, 15.0  # width of a bar's axis, and height of its row
NAME_WIDTH, LONGEST = 150.0, 24  # width of the names beside bars, and their characters


def bar(value: float, low: float, high: float, ends: Sequence[float]) -> str:
    """Return a bar from 0 to a figure, and its interval, for the row of a table with both.

    Args:
      value: of the figure.
      low: end of its interval.
      high: the other end.
      ends: of the axis.
    """
    first, last = ends

    def x(at: float) -> float:
        share = (min(max(at, first), last) - first) / (last - first)
        return 2 + share * (BAR - 4)

    middle = THICK / 2
    start, end = sorted((x(0.0), x(value)))
    caps = "".join(f"M{x(each):.1f} {middle - 4:g}v8" for each in (low, high))
    return (
        f'<svg class="bar" viewBox="0 0 {BAR:g} {THICK:g}" width="{BAR:g}" height="{THICK:g}" aria-hidden="true">'
        f'<rect class="full" x="{start:.1f}" y="3" width="{end - start:.1f}" height="{THICK - 6:g}"/>'
        f'<path class="axis" d="M{x(0.0):.1f} 0v{THICK:g}"/>'
        f'<path class="interval" d="M{x(low):.1f} {middle:g}H{x(high):.1f}{caps}"/></svg>'
    )


def bars(name: str, title: str, rows: Sequence[tuple[str, float]], ends: tuple[float, float]) -> str:
    """Return a bar to the left or right of 0 for each of several names.

    Args:
      name: unique on the page.
      title: description for readers who cannot see it.
      rows: names and values.
      ends: of the axis, on both sides of 0.
    """
    height = THICK * len(rows) + 8
    lowest, highest = ends

    def x(at: float) -> float:
        return NAME_WIDTH + (at - lowest) / (highest - lowest) * (WIDTH - NAME_WIDTH - RIGHT)

    parts: list[str] = []
    for index, (word, value) in enumerate(rows):
        y = THICK * index + 4
        start, end = sorted((x(0.0), x(value)))
        parts.append(label(NAME_WIDTH - 8, y + 11, shortened(word, LONGEST), "tick end"))
        parts.append(
            f'<rect class="full" x="{start:.1f}" y="{y + 2:g}" width="{end - start:.1f}" height="{THICK - 4:g}"/>'
        )
    parts.append(f'<path class="axis" d="M{x(0.0):.1f} 0V{height:g}"/>')
    return picture(name, title, height, parts)


def shortened(word: str, longest: int) -> str:
    """Return a word with at most so many characters."""
    return word if len(word) <= longest else f"{word[: longest - 1]}\u2026"


def label(x: float, y: float, text: str, look: str) -> str:
    """Return a text of a chart at a point; `look` names classes of the style sheet."""
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
