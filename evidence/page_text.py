"""Text of a report's values on the page, and the check of a page against its JSON.

Every value of report.json is in an element with `data-ref`, a JSON pointer (RFC 6901). Its text is
`text_of(value, form)`, where the form is the element's `data-form`. This module needs
only the standard library, so that a page can be checked without other packages.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

UNKNOWN = "not recorded"
UNSAID = "cannot be said"  # of a figure that is lost in the noise
PREFIX = 16  # of a hash, hexadecimal digits
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
# What pages are made of, earlier ones too: no element or attribute runs, loads or sends anything.
_NAMES = re.compile(
    "html|head|meta|title|style|body|header|main|nav|section|footer|details|summary|h1|h2|h3|p|div|span|strong|b|i|br|a|code|pre|ul|li|"
    "dl|dt|dd|table|caption|thead|tbody|tr|th|td|figure|figcaption|svg|g|path|rect|circle|line|polyline|text"
)
_ATTRIBUTES = re.compile(
    "lang|charset|http-equiv|content|name|class|id|style|href|role|scope|tabindex|colspan|rowspan|data-ref|data-form|"
    "data-label|aria-label|aria-labelledby|aria-hidden|viewBox|width|height|d|x|y|cx|cy|r|transform"
)
_TAG = re.compile(r'</?([a-zA-Z][a-zA-Z0-9]*)((?:\s+[a-zA-Z-]+="[^"<>]*")*)\s*/?>')
_ATTRIBUTE = re.compile(r'([a-zA-Z-]+)="([^"]*)"')
_STYLES = re.compile(r'<style>([^<]*)|style="([^"]*)"')
_LOADING = re.compile(r"[\\&]|url\(|src\(|image|@import", re.IGNORECASE)  # in a style
_VOID = frozenset(("br", "hr", "img", "input", "link", "meta", "wbr", "col"))  # have no end tag


def text_of(value: object, form: str = "plain") -> str:
    """Return the text of a value of report.json.

    Args:
      value: a string, a number, a bool or None; the string `"infinity"` stands for the number.
      form: `plain`, `figure` (of an answer) and `share` (in percent), both of which have words for what is lost in the
        noise, `epsilon` (of a promise: two decimals, rounded up), `decimal` (two decimals), `percent` (of a share from
        0 to 1), `of100` (of a share, in whole hundredths, rounded up), `exact` (every digit), `bytes`, `hash` (its
        first digits), `day` and `hour` (of a time), `unit` (of privacy), `metric` (four decimals below 10), `word` (a name
        as words) or `members` (of a roster, each as "name fingerprint").

    Returns:
      The text; `UNKNOWN` or `UNSAID` for None.
    """
    if value is None:
        return UNSAID if form in ("figure", "share") else UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == "infinity":
        return "infinite"
    return _FORMS[form](value)


def is_finite(value: object) -> bool:
    """Return whether a value of a report is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> str:
    """Return a value as text: a long whole number in groups of three digits, any other number with four digits."""
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rounded_up(value: float, decimals: int) -> str:
    """Return a number rounded up, so that 2.9998 becomes 3.00, but not by an error of floating point."""
    scale = 10**decimals
    return f"{math.ceil(round(float(value) * scale, 6)) / scale:.{decimals}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _members(value: Sequence[str]) -> str:
    """Return members by name and the first digits of their fingerprints."""
    parts = (each.partition(" ") for each in value)
    return ", ".join(f"{name} ({digits[:PREFIX]})" for name, _, digits in parts) or "nobody"


def _bytes(value: float) -> str:
    """Return a number of bytes in the unit that leaves at most three digits before the point."""
    step = 0
    while value >= 1000 and step < len(_UNITS) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.0f} B" if step == 0 else f"{value:.3g} {_UNITS[step]}"


_FORMS: Mapping[str, Callable[[Any], str]] = {
    "plain": _plain,
    "epsilon": lambda value: _rounded_up(value, 2),
    "decimal": lambda value: f"{value:.2f}",
    "percent": _percent,
    "figure": lambda value: _plain(round(value) if abs(value) >= 10_000 else value),
    "share": _percent,
    "of100": lambda value: _rounded_up(100 * value, 0),
    "exact": str,
    "bytes": _bytes,
    "hash": lambda value: str(value)[:PREFIX],
    "day": lambda value: str(value)[:10],
    "metric": lambda value: f"{value:.4f}" if isinstance(value, float) and abs(value) < 10 else _plain(value),
    "word": lambda value: str(value).replace("_", " "),
    "hour": lambda value: str(value)[11:19],
    "unit": lambda value: str(value).partition("_")[0],
    "members": _members,
}


def resolve_pointer(report: Any, pointer: str) -> Any:
    """Return the value that a JSON pointer names.

    Args:
      report: the whole report, as JSON.
      pointer: such as `/privacy/0/epsilon`; `~1` stands for a slash and `~0` for a tilde.

    Raises:
      LookupError: there is none.
    """
    value = report
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and name.isdecimal():
            value = value[int(name)]
        elif isinstance(value, dict) and name in value:
            value = value[name]
        else:
            raise LookupError(pointer)
    return value


def step(name: str) -> str:
    """Return a name as one step of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


@dataclass(frozen=True)
class Reference:
    """Text of a page that refers to its report."""

    pointer: str  # into report.json
    form: str  # as in `text_of`
    text: str  # as the page has it


def active_parts(html: str) -> list[str]:
    """Return the parts of a page that could run, load or send something; a page that fedveil makes has none.

    The text is matched and not parsed, since a browser may see an element where another parser sees none: each `<`
    must begin a tag of the few that pages have.
    """
    page, parts = html.removeprefix("<!DOCTYPE html>"), list[str]()
    for offset in (each.start() for each in re.finditer("<", page)):
        tag = _TAG.match(page, offset)
        if tag is None or not _NAMES.fullmatch(tag[1]):
            parts.append(page[offset : offset + PREFIX])
            continue
        for name, value in _ATTRIBUTE.findall(tag[2]):
            leaves_page = name == "href" and not value.startswith("#")
            redirects = name == "http-equiv" and value != "Content-Security-Policy"
            if not _ATTRIBUTES.fullmatch(name) or leaves_page or redirects:
                parts.append(f"{tag[1]} {name}")
    styles = (style for element_and_attribute in _STYLES.findall(page) for style in element_and_attribute)
    return parts + [match[0] for match in map(_LOADING.search, styles) if match]


def references(html: str) -> list[Reference]:
    """Return every text of a page that refers to its report, in order."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.references


def differences(html: str, report: Any) -> list[str]:
    """Return a sentence for each place where a page differs from its report, the JSON of report.json."""
    sentences: list[str] = []
    for ref in references(html):
        try:
            expected = text_of(resolve_pointer(report, ref.pointer), ref.form)
        except (LookupError, ValueError, TypeError):
            sentences.append(f"{ref.pointer}: the page refers to what the report does not hold")
            continue
        if ref.text != expected:
            sentences.append(f"{ref.pointer}: the page says {ref.text!r}, the report {expected!r}")
    return sentences


@dataclass
class _Open:
    """Element with a reference that has begun, at a depth of nested elements, and its text so far."""

    pointer: str
    form: str
    depth: int
    text: list[str] = field(default_factory=list[str])


class _Reader(HTMLParser):
    """Reader of a page; an element with a reference contains only text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.references: list[Reference] = []
        self._depth = 0
        self._open: _Open | None = None

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            return
        self._depth += 1
        attributes = dict(attrs)
        pointer = attributes.get("data-ref")
        if pointer is not None:
            self._end()
            self._open = _Open(pointer, attributes.get("data-form") or "plain", self._depth)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        """Leave out an element without content, which shows nothing."""

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID:
            return
        if self._open is not None and self._open.depth == self._depth:
            self._end()
        self._depth -= 1

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self._open.text.append(data)

    def close(self) -> None:
        super().close()
        self._end()

    def _end(self) -> None:
        """Add the open element, if there is one, to the references."""
        if self._open is not None:
            self.references.append(Reference(self._open.pointer, self._open.form, "".join(self._open.text)))
        self._open = None
