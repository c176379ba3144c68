"""Texts of a report's values, and the check that a page shows what its JSON holds."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.evidence.page_text import (
    Reference,
    active_parts,
    differences,
    references,
    resolve_pointer,
    step,
    text_of,
)

REPORT: dict[str, Any] = {"privacy": [{"epsilon": 2.99983, "who": "a<b & c"}], "a/b": {"~": 7}, "no": None}
PAGE = (
    '<p>At most <b data-ref="/privacy/0/epsilon" data-form="epsilon">3.00</b><br>'
    '<svg><path d="M0 0"/><text data-ref="/privacy/0/who">a&lt;b &amp; c</text></svg> 12</p>'
    '<td data-ref="/a~1b/~0">7</td><i data-ref="/no">not recorded</i>'
)


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (2.999832, "epsilon", "3.00"),
        (3.0, "epsilon", "3.00"),
        (3.0000000001, "epsilon", "3.00"),
        (3.001, "epsilon", "3.01"),
        ("infinity", "epsilon", "infinite"),
        (None, "epsilon", "not recorded"),
        (0.9649999737, "percent", "96.5 %"),
        (0.95, "percent", "95 %"),
        (1.3714, "decimal", "1.37"),
        (0.1859, "of100", "19"),
        (1e-4, "plain", "0.0001"),
        (1e-7, "plain", "1e-07"),
        (400, "plain", "400"),
        (1234567, "plain", "1\u202f234\u202f567"),
        (True, "plain", "yes"),
        (0, "bytes", "0 B"),
        (10_280, "bytes", "10.3 kB"),
        ("ab" * 32, "hash", "ab" * 8),
        ("2026-11-26T14:31:01+00:00", "day", "2026-11-26"),
        ("<script>", "plain", "<script>"),
    ],
)
def test_a_value_has_one_text(value: object, form: str, text: str) -> None:
    assert text_of(value, form) == text


@given(st.floats(0, 1e6))
def test_epsilon_is_never_rounded_down(value: float) -> None:
    assert float(text_of(value, "epsilon")) >= value - 1e-7
    assert float(text_of(value, "epsilon")) <= value + 0.01 + 1e-7


def test_a_page_that_shows_its_report_has_no_differences() -> None:
    assert differences(PAGE, REPORT) == []
    assert references(PAGE)[1] == Reference("/privacy/0/who", "plain", "a<b & c")
    assert len(references(PAGE)) == 4


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [
        (">3.00<", ">1.00<", "/privacy/0/epsilon"),
        ("/privacy/0/epsilon", "/privacy/1/epsilon", "/privacy/1/epsilon"),
        ('"/no"', '"/missing"', "/missing"),
        ("a&lt;b", "a&lt;c", "/privacy/0/who"),
        ('data-form="epsilon"', 'data-form="nothing"', "/privacy/0/epsilon"),
    ],
)
def test_a_page_that_was_changed_is_named(before: str, after: str, names: str) -> None:
    assert PAGE.count(before) == 1
    found = differences(PAGE.replace(before, after), REPORT)
    assert len(found) == 1 and found[0].startswith(f"{names}: ")


@given(st.text())
def test_a_step_of_a_pointer_comes_back(name: str) -> None:
    assert resolve_pointer({name: 1}, f"/{step(name)}") == 1


@pytest.mark.parametrize("pointer", ["/privacy/x", "/privacy/9", "/no/further", "/privacy/-1"])
def test_a_pointer_to_nothing_is_an_error(pointer: str) -> None:
    with pytest.raises(LookupError):
        resolve_pointer(REPORT, pointer)


PAGES = sorted(Path(__file__).parents[1].joinpath("fixtures").rglob("report.html"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(page.parents[2]).parts[0])
def test_pages_of_this_and_earlier_releases_do_nothing(page: Path) -> None:
    assert active_parts(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "part",
    [
        "<script>1</script>",
        "<SCRIPT>1</SCRIPT>",
        "<script/x>1</script>",
        "<script",
        "<!--><script>1</script>-->",
        "<title><!--</title><script>1</script>",
        "<xmp><!--</xmp><img src=x onerror=1>",
        '<noscript><p title="</noscript><img src=x onerror=1>">',
        '<textarea><p title="</textarea><script>1</script>">',
        '<p title=">" onclick="1">',
        '<p onclick="1">',
        "<p/onclick=1>",
        '<svg onload="1"></svg>',
        '<img srcset="http://a">',
        '<video poster="http://a"></video>',
        '<body background="http://a">',
        '<svg><image href="http://a"/></svg>',
        '<a href="javascript:1">',
        '<a href="http://a">',
        '<meta http-equiv="refresh" content="0;url=http://a">',
        '<p style="background:url(http://a)">',
        '<p style="background:u\\72l(http://a)">',
        '<p style="background:&#117;rl(http://a)">',
        '<style>@import "http://a";</style>',
        '<style>p{background:image-set("http://a" 1x)}</style>',
        "<?php ?>",
        "<![CDATA[<script>]]>",
        "a < b",
    ],
)
def test_page_with_an_active_part_is_refused(part: str) -> None:
    page = PAGES[0].read_text(encoding="utf-8")
    assert active_parts(page.replace("</main>", part + "</main>", 1)) and active_parts(part + page)
