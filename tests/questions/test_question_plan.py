"""Question rounds: one entry each, refused before it is charged, answered once, and the same sum masked and in the clear."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from shared.questions import CLIENTS, FREE, ROWS, Ages, Few, federation, figure, inquiry
from shared.runs import reservations

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.cli.ask import ask as ask_command
from fedveil.configs.question_file import InquiryOptions, QuestionOptions
from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.ledger.acts import VACUOUS
from fedveil.privacy.ledger.caps import Cap, set_cap
from fedveil.privacy.ledger.data_sets import adopt, population_ledger
from fedveil.privacy.ledger.ledger import BudgetExhausted, read_entries, verify
from fedveil.privacy.mechanisms.distributed import decode_counts_of, encode_share
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.privacy.statistics.inquiry import read_inquiry
from fedveil.questions import simulated as asking
from fedveil.questions.question_plan import Spend
from fedveil.questions.simulated import ask_here
from fedveil.questions.sums import CELLS
from fedveil.run.build import build
from fedveil.tasks import load_task
from fedveil.tasks.columns import columns_of


class Wards(Ages):
    """The same, where a client fails."""

    def columns(self, client: int) -> Mapping[str, np.ndarray]:
        if client == 3:
            raise OSError("no table")
        return super().columns(client)


MEAN = np.mean([Ages().columns(client)["age"] for client in range(CLIENTS)])


def test_answer_is_right_within_its_interval_and_one_ledger_entry(tmp_path: Path) -> None:
    record = ask_here(federation(), inquiry(), FREE, tmp_path)
    mean = figure(record, "mean")
    assert mean["low"] <= MEAN <= mean["high"] and mean["high"] - mean["low"] < 0.5
    (entry,) = reservations(tmp_path / "ledger")
    assert entry["kind"] == "question" and entry["purpose"] == "How old are they?"
    assert entry["segments"] == {"age": "statistics", "age: clipped": "statistics"}
    assert verify(tmp_path / "ledger").ok
    # Over those of a message, the bytes of all would be how many answered a trusted server.
    sizes, operators = record["message_bytes"], tmp_path / "operator.jsonl"
    carried = json.loads(operators.read_text())["bytes"]
    assert record["bytes"] is None and not operators.stat().st_mode & 0o077
    for way in ("down", "up"):
        assert carried[way] == {"questions": CLIENTS * sizes[way]} and sizes[way] > 200


@pytest.mark.parametrize("cohort", ["cohort=all", "cohort=poisson"])
def test_epsilon_is_dp_accountings_of_the_same_event(tmp_path: Path, cohort: str) -> None:
    spend = Spend(noise_multiplier=3.0)
    record = ask_here(
        federation(cohort, *(["cohort.rate=0.5"] if "poisson" in cohort else [])), inquiry(), spend, tmp_path
    )
    event = GaussianDpEvent(3.0)
    event = event if cohort == "cohort=all" else PoissonSampledDpEvent(0.5, event)
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, 1e-4).compose(event)
    assert record["epsilon"] == pytest.approx(accountant.get_epsilon(0.005), rel=1e-3)
    assert record["epsilon_before"] == 0 and record["epsilon_after"] == pytest.approx(
        record["epsilon"], rel=1e-3
    )


def test_budget_makes_the_noise_and_two_questions_compose(tmp_path: Path) -> None:
    parts = federation()
    one = ask_here(parts, inquiry("one"), Spend(epsilon=0.2), tmp_path)
    two = ask_here(parts, inquiry("two"), Spend(epsilon=0.2), tmp_path)
    assert one["epsilon"] == pytest.approx(0.2, rel=1e-3)
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, 1e-4)
    accountant.compose(GaussianDpEvent(one["noise_multiplier"]), 2)
    assert two["epsilon_after"] == pytest.approx(accountant.get_epsilon(0.005), rel=2e-3)
    assert figure(one, "rows")["value"] != figure(two, "rows")["value"]  # noise of its own


@pytest.mark.parametrize("kind", [Ages, Wards])
def test_clients_count_alike_by_messages_and_without(tmp_path: Path, kind: type[Ages]) -> None:
    parts = federation(task=kind())
    by_message = federation("faults.dropout=1e-9", task=kind())  # hardly ever: clients are called one by one
    one = ask_here(parts, inquiry(), Spend(noise_multiplier=0.1), tmp_path / "one")
    two = ask_here(by_message, inquiry(), Spend(noise_multiplier=0.1), tmp_path / "two")
    assert one["answers"] == two["answers"] != []


def test_too_wide_question_is_refused_before_a_charge(tmp_path: Path) -> None:
    parts, spend = federation(), Spend(epsilon=0.2)
    with pytest.raises(Refusal, match=r"epsilon [\d.]+ would suffice, or \d+ rows") as refused:
        ask_here(parts, inquiry(resolution=2, at_least=400), spend, tmp_path)
    assert not (tmp_path / "ledger").exists()
    enough = float(str(refused.value).split("epsilon ")[1].split()[0])
    record = ask_here(parts, inquiry(resolution=2, at_least=400), Spend(epsilon=enough * 1.02), tmp_path)
    mean = figure(record, "mean")
    assert (mean["high"] - mean["low"]) / 2 < 2.5
    with pytest.raises(Refusal, match="give the number of rows"):
        ask_here(parts, inquiry("other", resolution=2), spend, tmp_path)


@pytest.mark.parametrize("kind", ["count", "mean", "quantiles"])
def test_drowned_question_is_refused_on_real_data_until_accepted(kind: str, tmp_path: Path) -> None:
    of = {} if kind == "count" else {"of": "age", "low": 0, "high": 100}
    asked = read_inquiry({"name": "q", "records": ROWS, "ask": [{"kind": kind, **of}]})
    given = f"ledger.dir={tmp_path / 'ledgers'}", "task.held_out=public"
    spend = Spend(epsilon=0.5)
    with pytest.raises(
        Refusal, match=r"leaves only noise, .*, or accept it with accept_vacuous=true"
    ) as refused:
        ask_here(federation(*given, task=Few()), asked, spend, tmp_path / "q")
    assert refused.value.field == "epsilon" and not any(tmp_path.iterdir())
    enough = float(re.findall(r"give more than ([\d.]+)", str(refused.value))[0])
    for number, said in enumerate((Spend(epsilon=enough * 1.1), spend)):
        parts = federation(*given, *["accept_vacuous=true"] * number, task=Few())
        named = read_inquiry({**json.loads(asked.text), "name": f"q{number}"})
        assert ask_here(parts, named, said, tmp_path / "q")["released"]
    (ledger,) = (tmp_path / "ledgers").glob("*.ledger")
    acts = [json.loads(each.payload) for each in read_entries(ledger) if each.kind == VACUOUS]
    assert len(acts) == 1


def test_a_simulated_question_that_the_noise_drowns_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask_here(federation(), inquiry(), Spend(epsilon=0.005), tmp_path)["released"]
    assert capsys.readouterr().err.startswith("warning: epsilon=0.005: leaves only noise")


def test_question_to_tables_hides_a_row_by_default(tmp_path: Path) -> None:
    for name in ("one", "two"):
        rows = "".join(f"{20 + each},{each % 2}\n" for each in range(40))
        (tmp_path / "tables" / f"{name}.csv").parent.mkdir(exist_ok=True)
        (tmp_path / "tables" / f"{name}.csv").write_text(f"age,ill\n{rows}")
    task = {"name": "csv", "folder": str(tmp_path / "tables"), "label": "ill", "simulated": True}
    keys: dict[str, Any] = {"epsilon": 1.0, "privacy.allow_large_delta": True}
    count = {"records": 40, "ask": [{"kind": "count"}]}
    said: list[tuple[str, dict[str, Any], str]] = [
        ("default", {}, "record"),
        ("named", {"unit": "client"}, "client"),
        ("mode", {"privacy": fv.ClientCentral(target_epsilon=9.0)}, "client"),
    ]
    for name, more, unit in said:
        record = fv.ask({**count, "name": name}, task, folder=tmp_path / name, **keys, **more)
        assert record["unit"] == unit
    given = ["task=csv", f"task.folder={tmp_path / 'tables'}", "task.label=ill", "task.simulated=true"]
    options = vars(InquiryOptions(name="n", records=40.0, epsilon=1.0)) | vars(QuestionOptions())
    for place, (more, unit) in enumerate((([], "record"), (["privacy=client_central"], "client"))):
        where = tmp_path / f"typed{place}"
        words = [*given, *more, "privacy.allow_large_delta=true"]
        assert ask_command(what="count", words=words, into=where, **options) == 0
        assert json.loads((where / "n.json").read_text())["unit"] == unit
    # Stored answers of other tasks stay theirs.
    assert "unit" not in read_inquiry({**count, "name": "digits"}).text


def test_question_beyond_the_budget_is_refused_and_not_sent(tmp_path: Path) -> None:
    parts = federation("privacy.target_epsilon=1")
    with pytest.raises(BudgetExhausted):
        ask_here(parts, inquiry(), FREE, tmp_path)
    assert not reservations(tmp_path / "ledger") and not (tmp_path / "ages.json").exists()


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["privacy=record"], "unit"),
        (["privacy=record_and_client"], "privacy"),
        (["privacy=none"], "privacy"),
        (["cohort=fixed", "cohort.size=10"], "cohort"),
    ],
)
def test_unsupported_part_of_a_question_is_refused_by_name(
    tmp_path: Path, overrides: list[str], field: str
) -> None:
    common = ["task=digits", "task.num_clients=40"]
    parts = build(settings_from_overrides([*common, *overrides]))
    with pytest.raises(Refusal) as refused:
        ask_here(parts, inquiry(), FREE, tmp_path)
    assert refused.value.field == field


def test_a_client_that_fails_is_a_zero_and_the_others_answer(tmp_path: Path) -> None:
    record = ask_here(federation(task=Wards()), inquiry(), FREE, tmp_path)
    assert figure(record, "rows")["value"] == pytest.approx((CLIENTS - 1) * ROWS, abs=5)


def test_poisson_draw_states_its_own_uncertainty(tmp_path: Path) -> None:
    record = ask_here(federation("cohort=poisson", "cohort.rate=0.5"), inquiry(), FREE, tmp_path)
    rows = figure(record, "rows")
    assert rows["low"] <= CLIENTS * ROWS <= rows["high"]
    assert rows["high"] - rows["low"] > 2 * 1.96 * np.sqrt(CLIENTS) * ROWS


def test_faults_and_workers_go_the_same_way(tmp_path: Path) -> None:
    parts = federation("engine.workers=2", "faults.dropout=0.2")
    record = ask_here(parts, inquiry(), FREE, tmp_path)
    mean, rows = figure(record, "mean"), figure(record, "rows")
    assert abs(mean["value"] - MEAN) < 5 and 0.5 * CLIENTS * ROWS < rows["value"] < CLIENTS * ROWS


SHARES = ("privacy=client_distributed", "secagg.dropout=0.2", "secagg.collusion=0")


def test_question_to_too_few_for_an_encrypted_sum_is_refused(tmp_path: Path) -> None:
    parts = federation("privacy=client_distributed", "secagg.collusion=0.99")
    with pytest.raises(Refusal, match=r"secagg\.collusion=0\.99: leaves no two of"):
        ask_here(parts, inquiry(), FREE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_shares_of_noise_suffice_for_the_statement(tmp_path: Path) -> None:
    spend = Spend(noise_multiplier=1.0)
    record = ask_here(federation(*SHARES), inquiry(), spend, tmp_path / "shares")
    mean, rows = figure(record, "mean"), figure(record, "rows")
    assert record["adversaries"] == ["server", "clients", "model"]
    assert record["message_bytes"] is None and not (tmp_path / "shares" / "operator.jsonl").exists()
    assert set(record["bytes"]["down"]) == set(record["bytes"]["up"]) == {"questions", "keys"}
    assert mean["low"] <= MEAN <= mean["high"]
    central = figure(ask_here(federation(), inquiry(), spend, tmp_path / "central"), "rows")
    assert 1 <= (rows["high"] - rows["low"]) / (central["high"] - central["low"]) < 1.2


def test_masked_answer_has_the_bits_of_the_same_vectors_unmasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedveil.server import masked_sums

    seen: list[Any] = []
    decode = masked_sums.decode_counts_of

    def told(total: Any, spec: Any, seed: bytes) -> Any:
        seen.append((total.copy(), spec, seed))
        return decode(total, spec, seed)

    monkeypatch.setattr(masked_sums, "decode_counts_of", told)
    parts, asked = federation(*SHARES), inquiry()
    ask_here(parts, asked, FREE, tmp_path)
    ((total, spec, seed),) = seen
    assert parts.seed is not None
    drawn = Randomness(asking.seed_of(parts.seed, asked.name))
    unmasked: Any = np.zeros(spec.size, spec.dtype)
    closed = [layer for layer in spec.layers if layer.survivors <= CLIENTS]
    assert len(closed) == len(spec.layers)
    bare = replace(spec, layers=())
    for client in range(CLIENTS):
        stream = drawn.stream("share", 1, 0, client + 2)
        layers = [stream.bytes(32) for _ in spec.layers]
        assert len(layers) == len(spec.layers)  # taken from the stream as the client does; all are taken back
        values = asked.contribution(Ages().columns(client))
        unmasked += encode_share({}, values, bare, stream, seed)[0]
    np.testing.assert_array_equal(total, unmasked)
    np.testing.assert_array_equal(
        decode_counts_of(total, spec, seed)["age"], decode_counts_of(unmasked, bare, seed)["age"]
    )


def test_answers_reveal_a_clients_presence_no_better_than_claimed(tmp_path: Path) -> None:
    """Half the epsilon of a Gaussian of this noise, by the best threshold along the client's own vector."""
    from fedveil.privacy.mechanisms.private_sum import add_noise, encode

    asked, noise, draws = inquiry(), 1.0, 4000
    spec = SumSpec(1.0, asked.segments, cells=CELLS)
    own = encode({}, asked.contribution({"age": np.full(10 * ROWS, 100.0)}), spec)[0].astype(float)
    direction = own / np.linalg.norm(own)
    scores = []
    for there in (0.0, 1.0):
        stream = [
            add_noise(there * own, noise, spec, Randomness(n).stream("noise", int(there)))[0]
            for n in range(draws)
        ]
        scores.append(np.array([each @ direction for each in stream]) / spec.cells)
    thresholds = np.linspace(-1, 2, 61)
    false, missed = (np.array([np.mean(s > t) for t in thresholds]) for s in scores)
    advantage = np.max(missed - false)
    assert advantage <= 0.3829 + 3 * np.sqrt(0.5 / draws)  # 2 Phi(1/2) - 1, of a sensitivity of one norm
    assert np.linalg.norm(own) <= spec.cells


# --- the command line and the Python face -----------------------------------------------------------------------


DIGITS = ("task=digits", "task.num_clients=60")


def command(what: str, *given: str, into: Path, as_json: bool = False, **asked: Any) -> int:
    options = vars(InquiryOptions()) | vars(QuestionOptions()) | asked
    return ask_command(what=what, words=[*given, *DIGITS], into=into, as_json=as_json, **options)


def test_command_prints_each_figure_with_its_interval_in_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {"name": "mix", "records": 5.0, "epsilon": 1.0, "categories": "0,1"}
    assert command("histogram", "label", into=tmp_path, **asked) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert (
        re.search(r"^  1 +[-\d.]+ +[-\d.]+ to [-\d.]+$", said, re.MULTILINE) and "epsilon 1 at delta" in said
    )
    assert re.search(r"^bytes: [\d.]+ kB to a client, \d+ B back$", said, re.MULTILINE)
    assert command("histogram", "label", into=tmp_path, **asked) == 0
    assert "from the stored answer, at no cost" in capsys.readouterr().out
    assert command("histogram", "label", into=tmp_path, as_json=True, **asked) == 0
    assert json.loads(capsys.readouterr().out)["from_record"]
    more: dict[str, Any] = {**asked, "name": "dear", "epsilon": 50.0}
    assert command("histogram", "label", into=tmp_path, **more) == 3
    assert "budget is spent" in capsys.readouterr().err


def test_a_file_of_questions_and_the_python_face_give_one_record(tmp_path: Path) -> None:
    file = tmp_path / "q.yaml"
    file.write_text(
        "{name: q, records: 5, epsilon: 1.0, ask: [{kind: count}, {kind: mean, of: label, low: 0, high: 9}]}"
    )
    assert command(str(file), into=tmp_path / "one") == 0
    record = fv.ask(file, {"name": "digits", "num_clients": 60}, folder=tmp_path / "two")
    assert record == json.loads((tmp_path / "one" / "q.json").read_text())
    assert record["epsilon"] == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("what", "given", "asked", "field"),
    [
        ("nothing", [], {}, "FILE"),
        ("mean", [], {}, "COLUMN"),
        ("mean", ["label"], {"low": 0.0, "high": 9.0, "records": 5.0}, "name"),
        ("mean", ["label"], {"name": "a/b", "low": 0.0, "high": 9.0, "records": 5.0, "epsilon": 1.0}, "name"),
        ("mean", ["label"], {"name": "a", "low": 0.0, "high": 9.0, "records": 5.0}, "epsilon"),
        ("histogram", ["label"], {"name": "a", "edges": "0,x", "records": 5.0}, "edges"),
    ],
)
def test_a_mistake_on_the_command_line_is_refused_by_name(
    tmp_path: Path, what: str, given: list[str], asked: dict[str, Any], field: str
) -> None:
    with pytest.raises(Refusal) as refused:
        command(what, *given, into=tmp_path, **asked)
    assert refused.value.field == field and not list(tmp_path.iterdir())


def test_owners_caps_on_questions_hold_on_this_machine(tmp_path: Path) -> None:
    class Real(Ages):
        simulated, data_id = False, "ages-2026"

    home = tmp_path / "ledgers"
    parts = federation(f"ledger.dir={home}", "task.held_out=public", task=Real())
    set_cap(home, Cap("all", 100.0, 0.005, questions=0.35))
    with pytest.raises(BudgetExhausted, match="of a record questions may spend"):  # half the noise hides it
        ask_here(parts, inquiry("one"), Spend(epsilon=0.3), tmp_path)
    set_cap(home, Cap("all", 100.0, 0.005, questions=0.8, purposes=("statistics",)))
    ask_here(parts, inquiry("one"), Spend(epsilon=0.3), tmp_path)
    with pytest.raises(BudgetExhausted, match="questions may spend"):
        ask_here(parts, inquiry("two"), Spend(epsilon=0.3), tmp_path)
    ask = [{"kind": "count", "name": "c"}]
    other = read_inquiry({"name": "three", "purpose": "sales", "records": 1, "ask": ask})
    with pytest.raises(Refusal, match="statistics") as refused:
        ask_here(parts, other, Spend(epsilon=0.1), tmp_path)
    assert refused.value.field == "purpose"


def test_spending_under_an_older_name_counts(tmp_path: Path) -> None:
    class Real(Ages):
        simulated, data_id = False, "ages-2026"

    class Renamed(Real):
        data_id = "ages-2027"

    home = tmp_path / "ledgers"
    set_cap(home, Cap("all", 100.0, 0.005, questions=0.9))  # of which a record loses more than its client
    overrides = f"ledger.dir={home}", "task.held_out=public"
    ask_here(federation(*overrides, task=Real()), inquiry("one"), Spend(epsilon=0.3), tmp_path)
    adopt(home, f"population-{population_ledger('ages-2026')[:32]}", "ages-2027")
    with pytest.raises(BudgetExhausted, match="questions may spend"):
        ask_here(federation(*overrides, task=Renamed()), inquiry("two"), Spend(epsilon=0.3), tmp_path)
    two = ask_here(federation(*overrides, task=Renamed()), inquiry("two"), Spend(epsilon=0.1), tmp_path)
    assert two["epsilon_before"] == pytest.approx(0.3, rel=1e-3)  # charged once


def test_columns_of_tables_are_as_they_stand_there(tmp_path: Path) -> None:
    for name, rows in (("a", "30,calm,1\n,bad,0\n"), ("b", "70,,1\n"), ("public", "30,bad,1\n")):
        (tmp_path / f"{name}.csv").write_text(f"age,pain,ill\n{rows}")
    (tmp_path / "schema.yaml").write_text(
        "label: ill\ncolumns:\n  age: {low: 0, high: 50}\n  pain: {categories: [calm, bad]}\n  ill: {categories: ['0', '1']}\n"
    )
    tables = load_task(
        "csv",
        {
            "folder": str(tmp_path),
            "label": "ill",
            "simulated": True,
            "held_out_file": str(tmp_path / "public.csv"),
        },
    )
    one, two = (columns_of(tables, client) for client in (0, 1))
    np.testing.assert_array_equal(one["age"], [30, np.nan])
    assert list(one["pain"]) == ["calm", "bad"] and list(two["pain"]) == [""] and list(two["age"]) == [70]
    assert list(one["ill"]) == ["1", "0"]


def test_word_outside_the_schema_is_clipped_and_fails_no_client(tmp_path: Path) -> None:
    for name, rows in (("a", "30,f,1\n40,x,0\n"), ("b", "70,m,1\n50,,1\n")):
        (tmp_path / f"{name}.csv").write_text(f"age,sex,ill\n{rows}")
    (tmp_path / "schema.yaml").write_text(
        "label: ill\ncolumns:\n  age: {low: 0, high: 90}\n  ill: {categories: ['0', '1']}\n"
        "groups:\n  sex: {categories: [F, m]}\n"
    )
    tables = load_task("csv", {"folder": str(tmp_path), "simulated": True, "held_out_share": 0.5})
    one, two = (columns_of(tables, client)["sex"] for client in (0, 1))
    assert list(one) == ["F", "x"] and list(two) == ["m", ""]
    ask = {"kind": "histogram", "name": "h", "of": "sex", "categories": ["F", "m"]}
    asked = read_inquiry({"name": "q", "records": 5, "ask": [ask]})
    values = asked.contribution({"sex": one})
    assert list(values["h"]) == [1, 0] and values["h: clipped"] == 0.5  # pyright: ignore[reportArgumentType]
