"""Tests of tables/label_keys.py: columns and numbers of a label."""

import pytest

from fedveil.base.refusal import Refusal
from fedveil.tables.label_keys import DeclaredLabel, LabelKeys
from fedveil.tasks.table_schema import Column

COLUMNS = (Column("First Visit"), Column("grade"))


def keys(**values: object) -> LabelKeys:
    return LabelKeys(DeclaredLabel("s.yaml: label", values, COLUMNS), [*values])


def test_a_column_goes_by_its_name_without_case() -> None:
    assert keys(column="first  visit").column("column") is COLUMNS[0]
    assert keys(columns=["GRADE", "First visit"]).several("columns") == (COLUMNS[1], COLUMNS[0])


@pytest.mark.parametrize("value", [["grade"], ["grade", "Grade"], "grade", None])
def test_a_list_needs_two_different_columns(value: object) -> None:
    with pytest.raises(Refusal, match=r"s\.yaml: label\.columns=.*at least two different columns"):
        keys(columns=value).several("columns")


@pytest.mark.parametrize("value", ["x", "nan", ["1"]])
def test_a_number_is_finite(value: object) -> None:
    assert keys().number("mean", 2.0) == 2 and keys(mean="3.5").number("mean", 2.0) == 3.5
    with pytest.raises(Refusal, match=r"label\.mean="):
        keys(mean=value).number("mean", 2.0)
