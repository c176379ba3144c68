"""The commonest words by a tree of prefixes: NumPy's counts without noise, and what noise makes up as seldom as is claimed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting.dp_event import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from shared.questions import Ages

from fedveil import Examples
from fedveil.base.refusal import Refusal
from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.ledger.caps import Cap, set_cap
from fedveil.privacy.ledger.ledger import BudgetExhausted, read_entries
from fedveil.privacy.statistics.inquiry import Inquiry, read_inquiry
from fedveil.privacy.statistics.prefixes import Prefixes
from fedveil.questions.question_plan import Spend
from fedveil.questions.simulated import ask_here
from fedveil.run.build import RunObjects, build

LETTERS, DRAWS, CLIENTS, ROWS = "abcdefgh", 1000, 30, 12
WORDS = ("bad", "badge", "cab", "dead", "face", "a", "bee", "hag")
ODDS = (0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02)


class Notes(Ages):
    """Clients with a few words each."""

    num_clients = CLIENTS

    def client_data(self, client: int) -> Examples:  # different ones: each has a ledger of its own
        return Examples(torch.full((ROWS, 1), float(client)), torch.zeros(ROWS, dtype=torch.int64))

    def columns(self, client: int) -> Mapping[str, np.ndarray]:
        return {"word": np.random.default_rng(client).choice(WORDS, ROWS, p=ODDS)}


EVERY = np.concatenate([Notes().columns(client)["word"] for client in range(CLIENTS)])
COUNTS = dict(zip(*(each.tolist() for each in np.unique(EVERY, return_counts=True)), strict=True))


def inquiry(name: str = "words", records: float = ROWS, unit: str = "client", **keys: Any) -> Inquiry:
    ask = {"kind": "top", "name": "top", "of": "word", "alphabet": LETTERS, "longest": 5, **keys}
    return read_inquiry({"name": name, "unit": unit, "records": records, "ask": [ask]})


def federation(*overrides: str, mode: str = "client_central", task: Any = None) -> Any:
    common = ["task=custom", "task.target=object:Notes", "allow_modules=[object]", "cohort=all"]
    given = ["privacy.target_delta=0.005", "privacy.target_epsilon=100000", "privacy.allow_large_delta=true"]
    settings = settings_from_overrides([*common, f"privacy={mode}", *given, *overrides])
    return build(settings, objects=RunObjects(task=task or Notes()))


def reservations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(each.payload) for each in read_entries(folder / "ledger") if each.kind == "reserve"]


@pytest.mark.parametrize(
    ("unit", "mode"),
    [("client", "client_central"), ("client", "client_distributed"), ("record", "record"), ("record", "record_distributed")],
)  # fmt: skip
def test_without_noise_worth_naming_the_words_are_numpys(tmp_path: Path, unit: str, mode: str) -> None:
    more = ("secagg.dropout=0.2", "secagg.collusion=0") if mode == "client_distributed" else ()
    record = ask_here(
        federation(*more, mode=mode), inquiry(unit=unit, most=4), Spend(noise_multiplier=0.02), tmp_path
    )
    figures = record["answers"][0]["figures"]
    best = sorted(COUNTS, key=lambda word: -COUNTS[word])[:4]
    assert [each["name"] for each in figures] == best and record["rounds"] == 5
    for each in figures:
        assert each["value"] == pytest.approx(COUNTS[each["name"]], abs=3)
    if mode == "record":  # the sizes of a message are of all rounds, as those of all of them are
        assert {way: {"questions": 30 * size} for way, size in record["message_bytes"].items()} == {
            way: record["bytes"][way] for way in ("down", "up")
        }


def test_each_level_is_one_entry_and_all_are_the_requested_cost(tmp_path: Path) -> None:
    record = ask_here(federation(), inquiry(), Spend(epsilon=50.0), tmp_path)
    entries = reservations(tmp_path)
    assert len(entries) == record["rounds"] and {each["kind"] for each in entries} == {"question"}
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, 1e-3)
    accountant.compose(GaussianDpEvent(record["noise_multiplier"]), record["rounds"])
    assert record["epsilon"] == pytest.approx(accountant.get_epsilon(0.005), rel=1e-2)
    assert record["epsilon"] <= 50.0 and record["epsilon_after"] == pytest.approx(record["epsilon"], rel=1e-2)
    again = ask_here(federation(), inquiry(), Spend(epsilon=50.0), tmp_path)
    assert again == {**record, "from_record": True} and len(reservations(tmp_path)) == len(entries)


def test_levels_have_noise_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    select = Prefixes.select

    def noted(self: Prefixes, cells: np.ndarray, sigma: float) -> object:
        seen.append(cells.ravel()[:3])
        return select(self, cells, sigma)

    monkeypatch.setattr(Prefixes, "select", noted)
    ask_here(federation(), inquiry(), Spend(noise_multiplier=0.1), tmp_path)
    parts = [each - np.rint(each) for each in seen]
    assert all(not np.allclose(one, two) for one, two in pairwise(parts))


def test_noise_makes_up_a_prefix_as_seldom_as_is_claimed() -> None:
    """No cell of 9 x 9 holds anything: some is followed with a probability of at most beta."""
    asked = Prefixes("word", tuple(LETTERS), 5, beta=0.1, prefixes=tuple(LETTERS))
    draws, made_up = np.random.default_rng(0), 0
    for _ in range(DRAWS):
        ended, longer = asked.select(draws.normal(0, 7.0, asked.shape), 7.0)
        made_up += bool(ended or longer)
    assert made_up / DRAWS <= 0.1
    assert asked.threshold(7.0) == pytest.approx(7 * math.sqrt(2 * math.log(2 * 72 / 0.1)))


def test_count_is_off_by_the_formulas_error() -> None:
    asked = inquiry(records=4)
    (question,) = asked.questions
    assert asked.sigma(question, 2.0) == pytest.approx(2 * 4 / math.sqrt(0.98))


def test_rows_outside_the_alphabet_are_counted_and_clients_clipped() -> None:
    asked = inquiry(longest=3)
    rows = {"word": np.array(["bad", "badge", "Bad", "", "b"], dtype=object)}
    cells, outside = asked.questions[0].statistic.count(rows)
    assert cells[0, LETTERS.index("b")] == 3 and cells.sum() == 3 and outside == pytest.approx(2 / 5)
    deep = asked.following(["ba", "ca"]).questions[0].statistic
    cells, _ = deep.count(rows)
    assert cells[0, LETTERS.index("d")] == 2 and cells.sum() == 2
    values = inquiry(records=2).contribution({"word": np.array(["bad"] * 8)})
    assert values["top: clipped"] == pytest.approx(0.75)


def test_search_beyond_the_budget_is_refused_before_its_first_level(tmp_path: Path) -> None:
    parts, noise = federation("privacy.target_epsilon=6"), 1.0
    with pytest.raises(BudgetExhausted):
        ask_here(parts, inquiry(), Spend(noise_multiplier=noise), tmp_path)
    assert not reservations(tmp_path)
    assert ask_here(parts, inquiry("one", longest=1), Spend(noise_multiplier=noise), tmp_path)["released"]


def test_search_above_a_cap_is_refused_before_its_first_level(
    tmp_path: Path,
) -> None:
    class Real(Notes):
        simulated, data_id = False, "notes-2026"

    home = tmp_path / "ledgers"
    set_cap(home, Cap("all", 100000.0, 0.005, questions=30.0))
    parts = federation(f"ledger.dir={home}", "task.held_out=public", task=Real())
    with pytest.raises(BudgetExhausted, match="questions may spend epsilon 30"):
        ask_here(parts, inquiry(), Spend(epsilon=50.0), tmp_path)
    assert not [
        each for path in home.rglob("*.ledger") for each in read_entries(path) if each.kind == "reserve"
    ]
    with pytest.raises(BudgetExhausted, match="of a record questions may spend epsilon 30"):
        ask_here(parts, inquiry(), Spend(epsilon=25.0), tmp_path)
    assert ask_here(parts, inquiry("one"), Spend(epsilon=10.0), tmp_path)["released"]


def test_search_beyond_the_records_budget_is_refused_at_once(
    tmp_path: Path,
) -> None:
    class Real(Notes):
        simulated, data_id = False, "notes-2026"

    home = tmp_path / "ledgers"
    set_cap(home, Cap("all", 60.0, 0.005))  # the clients' too, of which it asks for less
    parts = federation(f"ledger.dir={home}", "task.held_out=public", task=Real())
    with pytest.raises(BudgetExhausted, match="the record budget is spent"):
        ask_here(parts, inquiry(), Spend(epsilon=50.0), tmp_path)
    assert not [
        each for path in home.rglob("*.ledger") for each in read_entries(path) if each.kind == "reserve"
    ]
    assert ask_here(parts, inquiry("one"), Spend(epsilon=15.0), tmp_path)["released"]


def test_words_that_would_be_lost_are_refused_before_they_are_charged(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"epsilon [\d.]+ would suffice"):
        ask_here(federation(), inquiry(resolution=20), Spend(epsilon=5.0), tmp_path)
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"alphabet": "aab"}, "alphabet"),
        ({"alphabet": ""}, "alphabet"),
        ({"alphabet": None}, "alphabet"),
        ({"longest": 0}, "longest"),
        ({"longest": "5"}, "longest"),
        ({"most": 0}, "most"),
        ({"beta": 1}, "beta"),
        ({"prefixes": ["a", "ab"]}, "prefixes"),
        ({"prefixes": ["x"]}, "prefixes"),
    ],
)
def test_a_mistake_is_refused_by_name(keys: dict[str, Any], field: str) -> None:
    with pytest.raises(Refusal) as refused:
        inquiry(**keys)
    assert refused.value.field == field


def test_a_search_stands_alone() -> None:
    top = {"kind": "top", "of": "word", "alphabet": LETTERS, "longest": 5}
    with pytest.raises(Refusal, match="ask it alone"):
        read_inquiry({"name": "q", "records": 5, "ask": [top, {"kind": "count"}]})
