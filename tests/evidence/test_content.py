"""Reports of runs of all kinds: what they say, what they cannot show, and that nothing given by a user becomes markup."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
from safetensors.numpy import save_file
from shared.runs import json_lines

from fedveil.base.refusal import Refusal
from fedveil.cli.report import report as make_report
from fedveil.evidence.answers import report_of_answers
from fedveil.evidence.binding.verify import Knowledge, verify_folder
from fedveil.evidence.card import card_of
from fedveil.evidence.content import report_of, to_json
from fedveil.evidence.forms import FIELDS, empty_assessment, nist_blocks, read_assessment
from fedveil.evidence.materials import materials_of
from fedveil.evidence.page import PAGE, page_of
from fedveil.evidence.page_text import differences, references
from fedveil.privacy.audit.round_rows import row_type
from fedveil.privacy.audit.run_audit import AuditTerms, Evidence
from fedveil.privacy.audit.summary import summarise
from fedveil.privacy.budget import Adversary, Budget, Release
from fedveil.privacy.ledger.ledger import Ledger, read_entries
from fedveil.run.promise import promise_rows, sentences
from fedveil.run.run_files import Assessment, read_run
from fedveil.tasks.shapes import read_shapes

FIXTURES = Path(__file__).parents[1] / "fixtures"
KEPT, OLD = FIXTURES / "reported_run", FIXTURES / "before_the_rooms"
GOLDEN = KEPT / "golden" / "report.json"
OLD_RUNS = (OLD / "run", OLD / "run_of_records", OLD / "hearts" / "server" / "runs" / "before")


@pytest.fixture
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return Path(shutil.copytree(KEPT, tmp_path / "kept"))


def edited(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    fields = json.loads((folder / name).read_text())
    change(fields)
    (folder / name).write_text(json.dumps(fields))


def validated(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report that its own published schema accepts."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((PAGE / "report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(report)] == []
    return report


# --- runs of all kinds ---


def test_the_golden_report_is_of_the_schema(golden: dict[str, Any]) -> None:
    validated(golden)


@pytest.mark.parametrize("folder", OLD_RUNS, ids=lambda path: path.name)
def test_older_run_names_its_gaps(folder: Path) -> None:
    report = validated(json.loads(to_json(report_of(read_run(folder)))))
    assert any("stored one point of its guarantee" in each for each in report["missing"])
    page = page_of(report)
    assert differences(page, report) == []
    assert "What this folder cannot show" in page
    if "hearts" in folder.parts:  # two real clients; 100 is what a simulation of this task would have had
        assert report["run"]["clients"] is None and ">100<" not in page.split("<main>")[0]


def test_report_of_hidden_records_says_that_they_were_not_tested(tmp_path: Path) -> None:
    old = OLD / "run_of_records"
    report = report_of(read_run(old))
    said = [report["stamps"]["said"], card_of(report), page_of(report), to_json(report)]
    assert all("the promise for single records was not tested" in each for each in said)
    assert not any("nothing is claimed" in each or "no claim" in each for each in said)
    assert verify_folder(old, Knowledge())[-2].ok is None


@pytest.mark.parametrize(
    ("unit", "more", "clause"),
    [
        ("record", {}, "the promise for single records was not tested: each client adds its own noise"),
        ("person", {}, "the promise for a person's records at one client was not tested: each client"),
        (
            "person_everywhere",
            {"looks": (3,)},
            "the promise for a person's records at all clients was not tested",
        ),
        ("record", {"looks": (3,), "records": True}, "was not tested: too few canary records were drawn"),
        ("record", {"looks": (3,), "losses": True}, "was tested by the losses of planted records alone"),
        ("", {}, "nothing is promised, so there is no claim to test"),
    ],
)
def test_audit_names_its_gaps_in_the_runs_own_unit(unit: str, more: dict[str, Any], clause: str) -> None:
    terms = AuditTerms(3, 0.01, own_noise=unit, **more)
    rows = np.zeros(1, row_type(0))
    rows["records"] = np.nan
    summary = summarise(Evidence(terms, np.zeros(0, bool), rows), [], None)
    assert summary.verdict is None and clause in summary.sentence
    both = summarise(Evidence(replace(terms, delta=1e-5), np.zeros(0, bool), rows), [], None).sentence
    assert "the released sums hold the claimed noise" in both and (clause in both) is bool(unit)


def test_a_run_that_was_refused_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="wrote and spent nothing"):
        read_run(tmp_path)


def test_a_run_that_was_killed_is_not_called_final(kept: Path) -> None:
    (kept / "result.json").unlink()
    lines = (kept / "metrics.jsonl").read_text()
    (kept / "metrics.jsonl").write_text(lines[: len(lines) * 2 // 3])  # cut within a line
    report = validated(report_of(read_run(kept)))
    assert report["run"]["status"] == "not ended"
    assert 0 < report["run"]["rounds_completed"] < 6
    assert report["forms_counted"]["run"] == 0
    page = page_of(report)
    assert "no value is final" in page
    assert differences(page, report) == []


def test_unfinished_run_reports_its_ledger(kept: Path, golden: dict[str, Any]) -> None:
    (kept / "result.json").unlink()
    report = validated(report_of(read_run(kept)))
    told = [(row["adversary"], row["epsilon"], row["relies_on"]) for row in golden["privacy"]]
    so_far = [(row["adversary"], row["epsilon"], row["relies_on"]) for row in report["privacy"]]
    for (who, ended, relies), (other, size, also) in zip(told, so_far, strict=True):
        assert (who, relies) == (other, also)
        assert size == ended if isinstance(ended, str) else math.isclose(size, ended, rel_tol=1e-2)
    assert report["promise"][2] == "The run has not ended: each further round adds to this, up to its budget."
    assert report["stamps"]["measured"]["epsilon"] == golden["looks"][-1]["epsilon"]
    assert ", so far: bound on what" in page_of(report)


def test_trusted_server_sees_all_despite_the_secrets_of_another_run(kept: Path) -> None:
    (kept / "result.json").unlink()
    identity = json.loads(read_entries(kept / "ledger")[0].payload)
    budget = Budget(identity["unit"], 9.0, 1e-4, adjacency=identity["adjacency"])
    with Ledger.open(kept / "ledger", budget, owner=identity["owner"], simulated=True) as ledger:
        events = dict.fromkeys(Adversary, GaussianDpEvent(50.0))
        ledger.reserve(Release(identity["unit"], "masked", 1, "private_sum", events, rng="system"))
    rows = {row["adversary"]: row["epsilon"] for row in report_of(read_run(kept))["privacy"]}
    assert rows["server"] == "infinity" and rows["model"] > 0


def test_a_run_that_has_released_nothing_promises_nothing_yet(kept: Path) -> None:
    for name in ("result.json", "metrics.jsonl", "ledger"):
        (kept / name).unlink()
    report = validated(report_of(read_run(kept)))
    assert report["privacy"] == [] and report["stamps"]["claimed"] is None
    assert report["promise"][0] == "This run has not ended and has released nothing yet."
    page = page_of(report)
    assert "No noise was added" not in page and "nothing was released" in page
    assert differences(page, report) == []


def test_an_audit_that_has_not_looked_yet_is_not_called_missing(kept: Path) -> None:
    for name in ("result.json", "metrics.jsonl"):
        (kept / name).unlink()
    page = page_of(report_of(read_run(kept)))
    assert "its audit has no result yet" in page and "no attack with canaries has run yet" in page
    assert "this run had no attack" not in page and "not detected without canaries" not in page
    (kept / "audit.json").unlink()  # which is written when there is something to keep
    assert "its audit has no result yet" in report_of(read_run(kept))["stamps"]["said"]
    config = kept / "config.yaml"
    config.write_text(config.read_text().replace("name: full", "name: 'off'"))
    assert "this run had no audit" in report_of(read_run(kept))["stamps"]["said"]


def test_a_violated_promise_is_called_so(kept: Path, golden: dict[str, Any]) -> None:
    edited(kept, "result.json", lambda fields: fields["audit"].update(verdict="violated"))
    promise = validated(report_of(read_run(kept)))["promise"]
    assert promise == [*golden["promise"], "The audit of this run found that this does not hold."]


OF_RECORDS = {"target_epsilon": 2.0, "target_delta": 1e-5, "adjacency": "zero-out", "per_person": None}


@pytest.mark.parametrize(
    ("privacy", "unit", "epsilon"),
    [
        ({"name": "none"}, "client", "infinity"),
        ({"name": "record", **OF_RECORDS}, "record", 2.0),
        ({"name": "record", **OF_RECORDS, "per_person": 3}, "person", 2.0),
        ({"name": "record_and_client", "record": OF_RECORDS, "client": {}}, "record", 2.0),
    ],
)
def test_values_from_client_ledgers_hold_during_a_run(
    kept: Path, privacy: dict[str, Any], unit: str, epsilon: float | str
) -> None:
    for name in ("result.json", "ledger"):
        (kept / name).unlink()
    config = yaml.safe_load((kept / "config.yaml").read_text()) | {"privacy": privacy}
    (kept / "config.yaml").write_text(yaml.safe_dump(config))
    rows = validated(report_of(read_run(kept)))["privacy"]
    assert [(row["unit"], row["epsilon"]) for row in rows] == [(unit, epsilon)] * 3


def test_the_blocks_of_nist_name_each_unit_that_is_hidden(golden: dict[str, Any]) -> None:
    record = {"unit": "record", "hides": "one example of one client", "epsilon": 1.0, "delta": 1e-5}
    rows = [{**golden["privacy"][-1], **record}, *golden["privacy"]]
    size, unit = (block["says"] for block in nist_blocks({**golden, "privacy": rows})[:2])
    alone = golden["nist"][0]["says"].removesuffix(".").removeprefix("At most ")
    assert size == f"At most 1.00 at delta 1e-05 for one record, and {alone} for one client."
    assert unit.startswith("One record: ") and unit.endswith(golden["nist"][1]["says"])


def test_a_budget_that_ended_a_run_is_a_refusal_on_the_page(kept: Path) -> None:
    reason = "the client budget is spent"
    edited(kept, "result.json", lambda fields: fields.update(status="exhausted", reason=reason))
    report = validated(report_of(read_run(kept)))
    assert report["ledger"]["refusals"] == [
        {"run": report["run"]["name"], "round": 7, "said": reason, "seq": None}
    ]
    page = page_of(report)
    assert 'class="cross refused"' in page and reason in page


def test_a_refusal_on_the_ledger_has_its_round(tmp_path: Path, commands: Any) -> None:
    folder = tmp_path / "run"
    overdrawn = ("privacy.noise_multiplier=2.5", "privacy.target_epsilon=0.6")
    code, _ = commands.run("simulate", "task=digits", "num_rounds=9", *overdrawn, f"hydra.run.dir={folder}")
    assert code == 3
    report = validated(report_of(read_run(folder)))
    (refusal,) = report["ledger"]["refusals"]
    assert refusal["round"] == report["run"]["rounds_completed"] + 1 and refusal["seq"]
    assert "is spent" in refusal["said"]
    assert 'class="cross refused"' in page_of(report)


def test_without_privacy_nothing_is_promised(kept: Path) -> None:
    def unprotected(fields: dict[str, Any]) -> None:
        for row in fields["privacy"]:
            row.update(epsilon="infinity", target_epsilon=None, curve=None)

    edited(kept, "result.json", unprotected)
    report = validated(report_of(read_run(kept)))
    assert report["stamps"]["claimed"] is None
    assert report["promise"][0] == "This run gives no guarantee."
    assert {row["recognised"] for row in report["privacy"]} == {1.0}
    assert {row["mechanism"] for row in report["privacy"]} == {"none"}
    assert [each["limit"] for each in report["not_covered"]] == ["Everything"]
    assert differences(page_of(report), report) == []


def test_a_ledger_that_lost_its_head_is_named(kept: Path) -> None:
    edited(kept, "result.json", lambda fields: fields.update(ledger_head=[11, "0" * 64]))
    assert any("does not hold the entry" in each for each in report_of(read_run(kept))["missing"])


def test_canary_records_are_measured_where_records_are_promised(kept: Path) -> None:
    found = {"epsilon": 2.9, "low": 1.1, "high": 5.0}

    def of_records(fields: dict[str, Any]) -> None:
        for row in fields["privacy"]:
            row.update(unit="record", epsilon=3.0)
        fields["audit"].update(
            measured=None,
            ceiling=None,
            records={"claimed": 3.0, "ceiling": 22.0, "lower_bounds": {}, "measured": found},
        )

    edited(kept, "result.json", of_records)
    line = {"round": 1, "epsilon_record": 3.0, "audit/records/claimed": 3.0, "audit/records/ceiling": 22.0}
    line |= {f"audit/records/{name}": value for name, value in found.items()}
    (kept / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    report = validated(report_of(read_run(kept)))
    assert report["stamps"]["measured"] == {**found, "confidence": 0.95}
    assert report["stamps"]["ceiling"] == 22.0 and report["stamps"]["canaries"] is None
    assert report["looks"] == [{"round": 1, "claimed": 3.0, "ceiling": 22.0, **found}]
    assert "by canary records" in page_of(report)


def test_all_runs_of_a_ledger_are_added_up(kept: Path) -> None:
    identity = json.loads(read_entries(kept / "ledger")[0].payload)
    budget = Budget("client", 9.0, 1e-4)
    with Ledger.open(kept / "ledger", budget, owner=identity["owner"], simulated=True) as ledger:
        for run in ("second", "third"):
            event = PoissonSampledDpEvent(0.25, GaussianDpEvent(2.0))
            events = {Adversary.MODEL: event, Adversary.CLIENTS: event}
            ledger.reserve_new(Release("client", run, 1, "private_sum", events, rng="seeded"))
        ledger.reserve_new(Release("client", "third", 2, "histogram", events, rng="seeded"))
    report = validated(report_of(read_run(kept)))
    runs = report["ledger"]["runs"]
    assert [row["this"] for row in runs] == [True, False, False]
    assert [row["releases"] for row in runs] == [6, 1, 2]
    sizes = [row["epsilon_after"] for row in runs]
    assert sizes == sorted(set(sizes)) and sizes[-1] == report["ledger"]["verified"]["epsilon"]
    assert {row["what"] for row in report["ledger"]["releases"]} == {"round of training", "question"}
    page = page_of(report)
    assert "chart-runs" in page and differences(page, report) == []


def test_run_is_compared_with_its_close(tmp_path: Path, commands: Any) -> None:
    folder = tmp_path / "run"
    code, said = commands.run("simulate", "task=digits", "num_rounds=1", f"hydra.run.dir={folder}")
    assert code == 0, said.err
    report = validated(report_of(read_run(folder)))
    assert report["ledger"]["close"]["held"] is True and report["missing"] == []
    assert report["ledger"]["acts"] == []
    edited(folder, "result.json", lambda fields: fields["metrics"].update(accuracy=1.0))
    report = validated(report_of(read_run(folder)))
    assert report["ledger"]["close"]["changed"] == ["result.json"]
    assert any(each.startswith("CHANGED since the run was closed: result.json") for each in report["missing"])
    edited(folder, "manifest.json", lambda fields: fields["files"].pop("result.json"))
    assert report_of(read_run(folder))["ledger"]["close"]["changed"] == ["manifest.json"]


def test_operators_file_is_not_read(kept: Path, golden: dict[str, Any]) -> None:
    for name in ("operator.jsonl", "checkpoint.safetensors", "audit.npy", "clients.log"):
        (kept / name).write_bytes(b'{"round": 1, "invited": 31337}\n')
    edited(kept, "result.json", lambda result: result.update(data="real"))
    report = report_of(read_run(kept))
    assert "31337" not in to_json(report)
    assert report["cost"]["answers"] == golden["cost"]["answers"]
    assert report["cost"]["answers"]["public"] is False


# --- words ---


def test_a_promise_is_two_sentences_without_symbols(golden: dict[str, Any]) -> None:
    assert len(golden["promise"]) == 2
    for sentence in golden["promise"]:
        assert sentence.endswith(".") and sentence.count(". ") == 0
        assert not re.search(r"[=<>εδ^%]|epsilon|delta", sentence)


def test_a_weak_promise_is_not_called_almost_nothing(golden: dict[str, Any]) -> None:
    rows = [{**row, "recognised": 0.97} for row in golden["privacy"]]
    first, second = sentences(rows, True)
    assert "does not prevent" in first and "97 of 100" in second


def test_the_rows_have_the_names_of_the_registry(golden: dict[str, Any]) -> None:
    names = {"unit", "epsilon", "delta", "adjacency", "mechanism", "accountant", "adversary"}
    assert all(names <= set(row) for row in golden["privacy"])
    assert promise_rows(read_run(KEPT)) == golden["privacy"]


# --- answers of the organisation ---


def test_an_empty_assessment_answers_nothing(tmp_path: Path) -> None:
    path = tmp_path / "assessment.yaml"
    assert read_assessment(path) == Assessment()
    path.write_text(empty_assessment())
    assert read_assessment(path) == Assessment()
    assert all(f"\n{field}: ''\n" in empty_assessment() for field in FIELDS)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gdpr_35_7_z: 'x'", "gdpr_35_7_z"),
        ("gdpr_35_7_a: 3", "gdpr_35_7_a"),
        ("gdpr_35_7_a: {a: b}", "gdpr_35_7_a"),
        ("price_of_kwh: dear", "price_of_kwh"),
        ("price_of_kwh: -1", "at least 0"),
        ("watts_of_core: true", "watts_of_core"),
        ("- a", "holds no fields"),
        (f"gdpr_35_7_a: '{'x' * 4001}'", "at most 4000"),
    ],
)
def test_an_answer_that_is_none_is_refused(tmp_path: Path, text: str, names: str) -> None:
    path = tmp_path / "assessment.yaml"
    path.write_text(text)
    with pytest.raises(Refusal, match=names):
        read_assessment(path)


def test_energy_carbon_and_money_come_from_prices(kept: Path, tmp_path: Path) -> None:
    path = tmp_path / "assessment.yaml"
    path.write_text("watts_of_core: 5\ngrams_co2_of_kwh: 400\nprice_of_kwh: 0.3\nprice_of_gigabyte: 2\n")
    edited(kept, "result.json", lambda fields: fields.update(seconds=900.0, cpu_seconds=720.0))
    report = validated(report_of(read_run(kept, read_assessment(path))))
    found = {each["what"].split(" of ")[0]: each for each in report["cost"]["work"]}
    assert found["energy"]["value"] == pytest.approx(1.0)  # 720 s times 5 W are 3 600 J
    assert found["carbon dioxide"]["value"] == pytest.approx(0.4)
    sent = sum(each["value"] for each in report["cost"]["bytes"][2:])
    assert found["money"]["value"] == pytest.approx(0.3 / 1000 + 2 * sent / 1e9)
    assert all(found[name]["source"].startswith("estimate") for name in ("energy", "carbon dioxide", "money"))
    unpriced = {each["what"].split(" of ")[0]: each for each in report_of(read_run(kept))["cost"]["work"]}
    assert unpriced["energy"]["value"] == pytest.approx(0.8) and "CodeCarbon" in unpriced["energy"]["source"]
    assert unpriced["carbon dioxide"]["value"] is None and unpriced["money"]["value"] is None


def counted(kept: Path) -> None:
    """Make the run one whose bytes were counted and may be told: half of them training, as much up as down."""
    rows = json_lines(kept / "metrics.jsonl")
    each = {"training": 500_000_000, "control": 500_000_000}
    for row in rows:
        row |= {"bytes": {"down": each, "up": each}, "message_bytes": {"down": 2700, "up": 1500}}
    (kept / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = {name: size * len(rows) for name, size in each.items()}
    told = {"source": "counted by the link", "down": whole, "up": whole}
    edited(kept, "result.json", lambda fields: fields.update(bytes=told, seconds=900.0, cpu_seconds=720.0))
    (kept / "farewell.json").write_text(json.dumps({"down": {"training": 1_000_000}, "up": {"control": 10}}))


def test_bytes_that_a_link_counted_stand_by_purpose_and_are_priced(kept: Path) -> None:
    counted(kept)
    run = read_run(kept)
    prices = {
        "watts_of_core": 5.0,
        "price_of_kwh": 0.3,
        "price_of_gigabyte": 2.0,
        "joules_of_gigabyte": 3600.0,
        "grams_co2_of_kwh": 400.0,
        "currency": "EUR",
        "examples_of_client": 100,
        "flops_of_client": 39_000.0,
    }
    run = replace(run, config={**run.config, "cost": prices})
    report = validated(json.loads(to_json(report_of(run))))
    assert differences(page_of(report), report) == []
    traffic, rounds = report["cost"]["traffic"], len(run.rounds)
    by_purpose = {each["purpose"]: each for each in traffic["purposes"]}
    assert traffic["source"] == "counted by the link" and list(by_purpose) == ["training", "control", "all"]
    assert by_purpose["all"]["down"] == rounds * 10**9 + 1_000_000
    assert by_purpose["all"]["up_round"] == pytest.approx(by_purpose["all"]["up"] / rounds)
    sizes = {each["what"]: each["value"] for each in report["cost"]["bytes"]}
    assert (sizes["model to one client, one round"], sizes["update from one client, one round"]) == (
        2700,
        1500,
    )
    work = {each["what"]: each for each in report["cost"]["work"]}
    gigabytes = (by_purpose["all"]["down"] + by_purpose["all"]["up"]) / 1e9
    network = work["energy of the network for these bytes"]["value"]
    assert network == pytest.approx(gigabytes)  # 3600 J a gigabyte are 1 Wh
    assert work["carbon dioxide of that energy"]["value"] == pytest.approx(0.4 * (1 + network))
    assert work["money"]["value"] == pytest.approx(0.0003 * (1 + network) + 2 * gigabytes)
    assert work["money"]["unit"] == "EUR" and "of the configuration" in work["money"]["source"]
    assert work["CPU of a client, one round at most"]["value"] == pytest.approx(
        3900 * 100 * 5 / 39_000
    )  # 5 epochs


def test_assessment_precedes_the_configuration_and_names_gaps(kept: Path) -> None:
    counted(kept)
    run = read_run(kept, Assessment(prices={"watts_of_core": 10.0}))
    run = replace(run, config={**run.config, "cost": {"watts_of_core": 5.0, "price_of_kwh": None}})
    work = {each["what"]: each for each in report_of(run)["cost"]["work"]}
    energy, money = work["energy of that CPU"], work["money"]
    assert energy["value"] == pytest.approx(2.0) and energy["source"].endswith("of assessment.yaml")
    assert money["value"] is None and "cost.price_of_kwh, which is not set" in money["source"]


def test_energy_that_the_processors_count_is_no_estimate(kept: Path, tmp_path: Path) -> None:
    path = tmp_path / "assessment.yaml"
    path.write_text("watts_of_core: 5\ngrams_co2_of_kwh: 400\n")
    edited(kept, "result.json", lambda fields: fields.update(seconds=90.0, cpu_seconds=72.0, joules=7200.0))
    report = validated(report_of(read_run(kept, read_assessment(path))))
    found = {each["what"]: each for each in report["cost"]["work"]}
    energy = found["energy of the machine's processors"]
    assert energy["value"] == pytest.approx(2.0) and energy["source"].startswith("counted by the processors")
    assert found["carbon dioxide of that energy"]["value"] == pytest.approx(0.8)
    front = next(yaml.safe_load_all(card_of(report)))
    assert front["co2_eq_emissions"]["emissions"] == pytest.approx(0.8)
    assert "fedveil:cost:energy of the machine's processors" in materials_of(report)


@pytest.mark.parametrize(
    ("changed", "bits", "sent"),
    [
        ({}, 18, 650),
        ({"compress": {"name": "mask", "ratio": 0.25, "cells": None}}, 18, 162),
        ({"compress": {"name": "project", "ratio": 0.1, "cells": 256}}, 10, 65),
        ({"privacy": {"name": "none"}}, 64, 650),
    ],
)
def test_bytes_of_an_update_are_those_of_its_compression_and_grid(
    kept: Path, changed: dict[str, Any], bits: int, sent: int
) -> None:
    run = read_run(kept)
    found = report_of(replace(run, config={**run.config, **changed}))["cost"]["bytes"]
    down, up = found[:2]
    assert down["value"] == 4 * 650
    assert (up["value"], up["source"]) == (
        -(-sent * bits // 8),
        f"estimate: {bits} bits for each of {sent} coordinates",
    )


def test_only_the_operator_of_a_trusted_server_reads_the_time(kept: Path) -> None:
    rows = [{"round": number, "invited": 7, "replies": 6, "bytes": None} for number in range(1, 7)]
    (kept / "operator.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, {"seconds": 4.5}]))
    edited(kept, "result.json", lambda result: result.update(data="real"))
    told = report_of(read_run(kept))["cost"]
    work = {each["what"]: each for each in told["work"]}
    for what in ("clock", "CPU of the server and all simulated clients"):
        assert work[what]["value"] is None and "fedveil report --operator" in work[what]["source"]
    assert told["answers"]["replies"] is None
    assert make_report(kept, operator=True) == 0
    private = kept / "operator" / "report.json"
    assert private.stat().st_mode & 0o777 == 0o600 and not (kept / "report.json").exists()
    told = validated(json.loads(private.read_text()))["cost"]
    assert told["work"][0]["value"] == 4.5 and told["answers"]["replies"] == 36
    (kept / "operator.jsonl").unlink()
    with pytest.raises(Refusal, match=r"has no operator\.jsonl: all that is known of the run is public"):
        make_report(kept, operator=True)


def test_report_of_a_simulation_has_its_time(kept: Path) -> None:
    assert (
        report_of(read_run(kept))["cost"]["work"][0]["source"]
        == "not known: the folder has no operator.jsonl"
    )
    (kept / "operator.jsonl").write_text(
        '{"seconds": 4.5, "cpu_seconds": 3.0, "joules": null, "bytes": null}\n'
    )
    work = {each["what"]: each["value"] for each in report_of(read_run(kept))["cost"]["work"]}
    assert work["clock"] == 4.5 and work["energy of that CPU"] == pytest.approx(3.0 * 4 / 3600)


# --- strings of users ---

INJECTIONS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</text></svg><script>alert(1)</script>",
    "javascript:alert(1)",
    "&lt;script&gt;&#60;script&#62;",
    "{{ 7 * 7 }}{% for x in range(9) %}<b>{% endfor %}",
    "]]><!--<script>--><?php echo 1 ?>",
    "\u202ereversed\u2066 \x00\x1b[31m",
    "a/b~c~0~1",
)
LAYOUT = (
    "/status",
    "/state",
    "/unit",
    "/adversary",
    "/data",
    "/epsilon",
    "/format",
    "/who",
    "/verdict",
    "/what",
    "/form",
)


class Structure(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[object] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [name for name, _ in attrs]))

    def handle_endtag(self, tag: str) -> None:
        self.found.append(tag)

    def handle_comment(self, data: str) -> None:
        self.found.append("comment")

    handle_decl = handle_pi = unknown_decl = handle_comment


def structure(page: str) -> list[object]:
    parser = Structure()
    parser.feed(page)
    return parser.found


def with_strings(value: Any, text: str, at: str = "") -> Any:
    """Return a report whose strings, and names of metrics and versions, are all this text."""
    if isinstance(value, dict):
        named = at.endswith(("/versions", "/metrics"))
        return {
            (f"{name}{text}" if named else name): with_strings(each, text, f"{at}/{name}")
            for name, each in value.items()
        }
    if isinstance(value, list):
        return [with_strings(each, text, f"{at}/{place}") for place, each in enumerate(value)]
    if at == "/metric" or re.fullmatch(r"/metrics/\d+/name", at):
        return f"{value}{text}"
    return text if isinstance(value, str) and not at.endswith(LAYOUT) else value


def everything(golden: dict[str, Any]) -> dict[str, Any]:
    """Return a report that has all that any run's has."""
    asked = report_of_answers(FIXTURES / "asked_questions")
    unanswered = {**asked["answers"][0], "released": False, "reason": "too few", "on_this_ledger": False}
    words = {"column": "sex", "score": "ill", "edges": None, "words": ["f", "m"], "values": [0.1, -0.2]}
    numbers = {"column": "age", "score": "ill", "edges": [18, 40, 90], "words": None, "values": [1.0, -1.0]}
    ends = {"lowest": -1.0, "highest": 1.0, "missing": 0.2}
    answers = asked["answers"][0]["answers"]
    evaluated = {"epsilon": 0.1, "noise_multiplier": 5.0, "clients": 9, "answers": answers}
    evaluated |= {"share": 0.2, "confidence": 0.95, "reason": None}
    return {
        **golden,
        "ledger": {**golden["ledger"], "questions": asked["ledgers"][0]["questions"]},
        "answers": [*asked["answers"], unanswered],
        "groups": {"figures": ["accuracy"], "rows": [{"group": "sex=f", "values": [0.5]}]},
        "evaluations": [{"round": number, **evaluated} for number in (1, 2)],
        "shapes": {"intercept": [0.0], "shapes": [{**each, **ends} for each in (words, numbers)]},
        "receipts": {"public": True, "ended": True, "given": 3, "members": 5, "of_this_run": True},
    }


@pytest.mark.parametrize("text", INJECTIONS)
@pytest.mark.parametrize("kind", ["run", "answers"])
def test_no_string_becomes_markup(golden: dict[str, Any], text: str, kind: str) -> None:
    whole = (
        everything(golden)
        if kind == "run"
        else {**report_of_answers(FIXTURES / "asked_questions"), "missing": ["x"]}
    )
    report = with_strings(whole, text)
    page = page_of(report)
    assert structure(page) == structure(page_of(with_strings(whole, "x")))
    for tag, names in (each for each in structure(page) if isinstance(each, tuple)):
        assert tag != "script" and not [name for name in names if name.startswith("on")]
    if text.isprintable():  # a browser's parser reads NUL as another character
        assert differences(page, report) == []


# --- the model ---

HOSPITALS = """label: num
columns:
  age: {low: 20, high: 90}
  pain: {categories: ["FALSE", "TRUE"]}
  num: {categories: [healthy, ill]}
"""


def of_tables(kept: Path) -> None:
    """Let a kept run be one of tables, whose rows were hidden."""
    config = yaml.safe_load((kept / "config.yaml").read_text())
    task = {
        "name": "csv",
        "folder": "/home/somebody/hospitals",
        "data_id": None,
        "model": "mlp",
        "hidden": [8, 4],
    }
    privacy = {"name": "record", "max_grad_norm": 0.75, **OF_RECORDS}
    (kept / "config.yaml").write_text(yaml.safe_dump(config | {"task": task, "privacy": privacy}))
    (kept / "schema.yaml").write_text(HOSPITALS)
    edited(kept, "result.json", lambda result: result.update(confusion=[[5, 1], [2, 7]]))
    lines = json_lines(kept / "metrics.jsonl")
    rows = [json.dumps({**row, "clipping_norm": None, "balanced_accuracy": 0.662}) for row in lines]
    (kept / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    edited(kept, "result.json", lambda result: result["metrics"].update(balanced_accuracy=0.662))


def test_page_and_card_describe_the_model(kept: Path) -> None:
    of_tables(kept)
    report = validated(report_of(read_run(kept, Assessment({"ai_annex_iv_1": "Sorts letters."}))))
    page, card = page_of(report), card_of(report)
    assert differences(page, report) == []
    shown = {each.pointer: each.text for each in references(page)}
    assert shown["/model/title"] == "num of hospitals" and "# num of hospitals" in card
    assert (
        shown["/model/architecture"] == "mlp, hidden layers of 8, 4" and "mlp, hidden layers of 8, 4" in card
    )
    assert [shown[f"/model/inputs/{at}/values"] for at in (0, 1)] == ["20 to 90", "FALSE, TRUE"]
    assert shown["/model/classes/1"] == "ill" and "- Classes: healthy, ill" in card
    assert shown["/model/intended"] == "Sorts letters." and "- Intended use: Sorts letters" in card
    assert shown["/model/confusion/1/counts/0"] == "2" and "| ill | 2 | 7 |" in card
    assert shown["/model/max_grad_norm"] == "0.75" and "Clipping norm</th>" not in page
    assert "balanced accuracy 0.6620" in card
    assert {"balanced accuracy", "0.6620"} <= set(shown.values()) and "0.662" not in shown.values()


def test_model_of_little_evidence_claims_nothing(kept: Path) -> None:
    report = report_of(read_run(kept))
    assert report["model"]["confusion"] is None and report["model"]["inputs"] == []
    card = card_of(report)
    assert "- Intended use: not stated" in card and "Confusion matrix" not in page_of(report)
    assert "arrays bias 10, weight 10 x 64" in card and "- Parameters: 650" in card


def test_accuracy_comes_before_the_forms(golden: dict[str, Any]) -> None:
    page = page_of(golden)
    assert (
        page.index("What is promised to whom")
        < page.index("Accuracy and its epsilon")
        < page.index("Forms of impact")
    )


def test_linear_model_of_tables_shows_the_part_of_each_column(kept: Path) -> None:
    of_tables(kept)
    weight = np.array([[0, 0, 0], [0.5, -1.0, 2.0]], np.float32)  # age, and the two words of pain
    save_file({"weight": weight, "bias": np.zeros(2, np.float32)}, kept / "model.safetensors")
    report = validated(
        report_of(read_run(kept), shapes=read_shapes(kept / "schema.yaml", kept / "model.safetensors"))
    )
    shown = {each["column"]: each for each in report["shapes"]["shapes"]}
    assert shown["age"]["edges"] == [20, 90] and shown["age"]["values"] == [-0.5, 0.5]
    assert shown["pain"]["values"] == [-1.5, 1.5] and shown["age"]["missing"] is None
    page = page_of(report)
    assert differences(page, report) == [] and "a number without bins adds a straight line" in page
