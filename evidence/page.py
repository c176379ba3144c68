"""Page of a report: one HTML file with its style and its charts in it, for paper and for screens, without a script.

The template refers to values of report.json only by pointers, through `ref`, so that the page can be checked against
the JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..base.charts import bar, thin
from ..run.run_files import Fields
from .answers import FORMAT as ANSWERS
from .held_out import MAX_COEFFICIENTS
from .model_pictures import BASELINE, CURVES, MAX_SHAPES
from .page_text import is_finite, resolve_pointer, step, text_of
from .pictures import curve_ends, curves, exposed, pictures

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

PAGE = Path(__file__).parent / "page"
STYLE = "report.css"
MAX_FIGURES = 64  # of one answer, on the page
MAX_ROWS = 30  # of the table of rounds; the JSON has all of them
BEYOND = 1.08  # end of the strip under the stamps, over the largest of its numbers


def page_of(report: Fields) -> str:
    """Return the page of a report; the same report gives the same bytes."""
    if report["format"] == ANSWERS:
        return _render("questions.html.jinja", report)
    rounds = [(float(at), 0.0) for at in range(len(report["rounds"]))]
    return _render(
        "report.html.jinja",
        report,
        svgs=pictures(report),
        strip=_strip(report["stamps"]),
        exposed=exposed(report),
        memorisation=report.get("memorisation"),
        rows=[round(at) for at, _ in thin(rounds, MAX_ROWS)],
    )


def template_of(folder: Path, name: str) -> Template:
    """Return a template of a folder, in which every value is escaped, and one that is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def _render(
    template: str, report: Fields, svgs: Mapping[str, str] = MappingProxyType({}), **more: object
) -> str:
    """Return the text of a template for a report, with charts as SVG by name and more variables of the template."""
    from markupsafe import Markup

    return template_of(PAGE, template).render(
        report=report,
        ref=_references(report),
        bar=_bar,
        curves=_curves,
        curve_ends=curve_ends,
        step=step,
        charts={name: Markup(each) for name, each in svgs.items()},
        style=Markup((PAGE / STYLE).read_text(encoding="utf-8")),
        max_figures=MAX_FIGURES,
        max_shapes=MAX_SHAPES,
        looks=(BASELINE, *CURVES),
        max_coefficients=MAX_COEFFICIENTS,
        **more,
    )


def _curves(answer: Fields, at: str) -> Markup:
    """Return the picture of an answer's curves, whose pointer is `at`, for the templates."""
    from markupsafe import Markup

    return Markup(curves(answer, at))


def _bar(figure: Fields, ends: Sequence[float]) -> Markup:
    """Return the bar of a figure with its interval, for the templates."""
    from markupsafe import Markup

    return Markup(bar(figure["value"], figure["low"], figure["high"], ends))


def _references(report: Fields) -> Any:
    """Return the templates' function for a value: its element has the pointer and form by which the page is checked."""
    from markupsafe import Markup

    element = Markup('<{tag}{look} data-ref="{pointer}"{form}>{text}</{tag}>')
    look_attribute, form_attribute = Markup(' class="{}"'), Markup(' data-form="{}"')

    def ref(pointer: str, form: str = "plain", look: str = "", tag: str = "span") -> Markup:
        return element.format(
            tag=tag,
            look=look and look_attribute.format(look),
            pointer=pointer,
            form="" if form == "plain" else form_attribute.format(form),
            text=text_of(resolve_pointer(report, pointer), form),
        )

    return ref


def _strip(stamps: Fields) -> Mapping[str, float] | None:
    """Return places on the strip under the stamps, in percent; None if there is nothing to compare."""
    measured: Fields = stamps["measured"] or {}
    claimed: Fields = stamps["claimed"] or {}
    numbers: dict[str, Any] = {"claimed": claimed.get("epsilon"), "ceiling": stamps["ceiling"]}
    numbers |= {name: measured.get(name) for name in ("epsilon", "low", "high")}
    epsilons = {name: float(epsilon) for name, epsilon in numbers.items() if is_finite(epsilon)}
    if not {"claimed", "epsilon", "low", "high"} <= set(epsilons):
        return None
    end = BEYOND * max(epsilons.values()) or 1.0
    return {name: round(100 * max(value, 0.0) / end, 2) for name, value in epsilons.items()}
