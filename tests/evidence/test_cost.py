"""Cost of a run: bytes, energy, carbon and money, and who may read it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from shared.reports import edited, validated
from shared.runs import json_lines

from fedveil.base.refusal import Refusal
from fedveil.cli.report import report as make_report
from fedveil.evidence.card import card_of
from fedveil.evidence.content import report_of, to_json
from fedveil.evidence.cost import Prices, _energies
from fedveil.evidence.forms import CARBON, NETWORK, read_assessment
from fedveil.evidence.materials import materials_of
from fedveil.evidence.page import page_of
from fedveil.evidence.page_text import differences
from fedveil.run.run_files import Assessment, read_run


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


def test_carbon_is_unknown_where_the_energy_of_the_network_is(kept: Path) -> None:
    prices = Prices({NETWORK: 100.0, CARBON: 400.0}, {NETWORK: "a test", CARBON: "a test"})
    edited(kept, "result.json", lambda fields: fields.update(seconds=900.0, cpu_seconds=720.0))
    for gigabytes, known in ((1.0, True), (None, False)):
        rows = {each["what"]: each["value"] for each in _energies(read_run(kept), prices, gigabytes)}
        assert (rows["energy of the network for these bytes"] is not None) == known
        assert (rows["carbon dioxide of that energy"] is not None) == known


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
