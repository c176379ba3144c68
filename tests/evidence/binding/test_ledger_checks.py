"""Checks of a run's ledgers: heads, closes and epsilons, and forgeries in which every hash fits."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dp_accounting.dp_event import GaussianDpEvent
from shared.bundles import Signed, list_anew, wrong
from shared.runs import json_lines

from fedveil.base.refusal import Refusal
from fedveil.cli.report import bundle
from fedveil.cli.verify import verify
from fedveil.configs.settings import settings_from_overrides
from fedveil.evidence.binding import ledger_checks
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.bundle import LIST, read_list
from fedveil.evidence.binding.signatures import FILE as SIGNATURES
from fedveil.evidence.binding.verify import verify_folder
from fedveil.evidence.page_text import differences, resolve_pointer, text_of
from fedveil.privacy.budget import Budget, Release
from fedveil.privacy.ledger.export import export_text, read_export
from fedveil.privacy.ledger.hash_chain import START, Draft, Entry, Head, canonical, linked
from fedveil.privacy.ledger.ledger import Ledger, read_entries
from fedveil.privacy.ledger.ledger_state import verify_entries
from fedveil.run.files import RESULT
from fedveil.run.manifest import hashes, read_manifest
from fedveil.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("without_jinja")


def test_later_head_is_looked_for(signed: Signed) -> None:
    last = read_entries(signed.run / "ledger")[-1]
    assert verify(signed.bundle, [], (str(last.seq), last.hash)) == 0
    for head in (Head(last.seq, "0" * 64), Head(last.seq + 1, last.hash), Head(0, last.hash)):
        assert "known head" in wrong(verify_folder(signed.bundle, Knowledge(head=head)))


def test_a_run_that_was_never_closed_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(__file__).parents[2] / "fixtures" / "before_the_rooms" / "run"
    run = Path(shutil.copytree(before, tmp_path / "run"))
    assert verify(run, []) == 2
    assert "resume the run, which closes it" in capsys.readouterr().out
    with pytest.raises(Refusal, match=r"check .* failed"):
        bundle(run, None, [])


def test_another_run_on_the_ledger_may_have_had_another_adversary(signed: Signed, tmp_path: Path) -> None:
    run = Path(shutil.copytree(signed.run, tmp_path / "run"))
    identity = json.loads(read_entries(run / "ledger")[0].payload)
    budget = Budget(identity["unit"], 9.0, 1e-4, adjacency=identity["adjacency"])
    with Ledger.open(run / "ledger", budget, owner=identity["owner"], simulated=True) as ledger:
        events = {"server": GaussianDpEvent(50.0)}
        ledger.reserve(Release(identity["unit"], "masked", 1, "private_sum", events, rng="system"))
        head = list(ledger.head)
    result = json.loads((run / RESULT).read_text())
    (run / RESULT).write_text(json.dumps({**result, "ledger_head": head}))
    line = next(each for each in verify_folder(run, Knowledge()) if each.name == "epsilon")
    assert line.ok, line.finding


@pytest.mark.campaign
def test_records_of_a_simulation_are_recomputed_from_its_ledgers(tmp_path: Path) -> None:
    given = (
        "task=digits",
        "task.num_clients=4",
        "num_rounds=2",
        "batch_size=40",
        "privacy=record",
        "audit=off",
    )
    run = tmp_path / "run"
    assert (
        simulate(
            settings_from_overrides(
                [*given, "cohort=all", "privacy.noise_multiplier=1", "privacy.target_epsilon=null"]
            ),
            run,
            quiet=True,
        ).exit_code
        == 0
    )
    assert bundle(run, None, []) == 0
    for folder in (run, run / "bundle"):
        lines = {line.name: line for line in verify_folder(folder, Knowledge())}
        assert not wrong(list(lines.values())) and lines["client ledgers"].ok, lines
    whole = json.loads((run / "bundle" / "client_ledgers.json").read_text())
    name = next(iter(whole))
    whole[name]["entries"].pop()
    (run / "bundle" / "client_ledgers.json").write_text(json.dumps(whole))
    assert "lacks entry" in wrong(verify_folder(run / "bundle", Knowledge()))["client ledgers"]


def close_anew(copy: Path) -> None:
    """Make manifest, close and list fit what lies in an unsigned bundle."""
    (copy / SIGNATURES).unlink(missing_ok=True)
    manifest = read_manifest(copy)
    status = json.loads((copy / "result.json").read_text())["status"]
    fresh = replace(manifest, status=status, files=hashes(copy, manifest.files))
    (copy / "manifest.json").write_text(fresh.text)
    *before, last = read_export((copy / "ledger.json").read_bytes(), "")
    said = {**json.loads(last.payload), "manifest": fresh.hash, "status": status}
    close = linked(Draft("close", last.key, canonical(said)), before[-1].head)
    (copy / "ledger.json").write_text(export_text([*before, close]) + "\n")
    listed = read_list(copy)
    (copy / LIST).write_bytes(replace(listed, close=close.head).text)
    list_anew(copy)


def of_result(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(copy: Path) -> None:
        result = json.loads((copy / "result.json").read_text())
        change(result)
        (copy / "result.json").write_text(json.dumps(result))

    return edit


def claim(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(result: dict[str, Any]) -> None:
        for row in result["privacy"]:
            if row["sampling"] != "none":
                row[name] = value

    return change


def of_rounds(copy: Path) -> None:
    rows = json_lines(copy / "metrics.jsonl")
    rows[1]["epsilon_client"] *= 0.9
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def other_report(copy: Path) -> None:
    whole = json.loads((copy / "report.json").read_text())
    for row in whole["privacy"]:
        row["epsilon"] = 0.5
    (copy / "report.json").write_text(json.dumps(whole))
    text = (copy / "report.html").read_text()
    form = r'(data-ref="/privacy/\d+/epsilon"[^>]*>)[^<]*<'
    (copy / "report.html").write_text(re.sub(form, r"\g<1>0.50<", text))


def shown_otherwise(pointer: str, value: Any) -> Callable[[Path], None]:
    """Return an edit of one value of the report, and of its page with it."""

    def edit(copy: Path) -> None:
        path, page = copy / "report.json", copy / "report.html"
        whole = json.loads(path.read_text())
        above, _, name = pointer.rpartition("/")
        place = resolve_pointer(whole, above)
        place[int(name) if isinstance(place, list) else name] = value
        path.write_text(json.dumps(whole))
        form = rf'(data-ref="{pointer}"(?: data-form="(\w+)")?>)[^<]*<'
        text = re.sub(
            form, lambda found: f"{found[1]}{text_of(value, found[2] or 'plain')}<", page.read_text()
        )
        page.write_text(text)
        assert differences(text, whole) == []

    return edit


def other_card(copy: Path) -> None:
    (copy / "CARD.md").write_text("Recipients of the model can tell nothing: epsilon is 0.1.")


RECOMPUTED_EDITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "epsilon": (of_result(claim("epsilon", 1.0)), "epsilon"),
    "a larger epsilon": (of_result(claim("epsilon", 29.0)), "epsilon"),
    "delta": (of_result(claim("delta", 1e-9)), "epsilon"),
    "adjacency": (of_result(claim("adjacency", "replace-one")), "epsilon"),
    "no promise at all": (of_result(lambda result: result["privacy"].clear()), "epsilon"),
    "ledger head": (of_result(lambda result: result.update(ledger_head=[2, "0" * 64])), "known head"),
    "verdict": (of_result(lambda result: result["audit"].update(verdict="consistent", said="fine")), "audit"),
    "measured": (of_result(lambda result: result["audit"]["measured"].update(epsilon=0.01)), "audit"),
    "a round's epsilon": (of_rounds, "epsilon of each round"),
    "a page of other claims": (other_report, "page"),
    "a page with another stamp": (shown_otherwise("/stamps/claimed/epsilon", 0.5), "page"),
    "a page that measured less": (shown_otherwise("/stamps/measured/high", 0.01), "page"),
    "a page with another verdict": (shown_otherwise("/stamps/verdict", "consistent"), "page"),
    "a page of a better model": (shown_otherwise("/metrics/0/value", 0.999), "page"),
    "a card of another guarantee": (other_card, "page"),
    "a page of another ending": (shown_otherwise("/run/status", "exhausted"), "page"),
}


@pytest.mark.parametrize("name", RECOMPUTED_EDITS)
def test_epsilon_is_recomputed_under_valid_hashes(copy: Path, signed: Signed, name: str) -> None:
    edit, expected = RECOMPUTED_EDITS[name]
    close_anew(copy)
    assert wrong(verify_folder(copy, Knowledge())) == {}  # nothing but the signature tells
    edit(copy)
    close_anew(copy)
    assert expected in wrong(verify_folder(copy, Knowledge()))


def test_a_round_among_many_is_recomputed_with_them(
    copy: Path, signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_checks, "MIN_TOGETHER", 1)
    close_anew(copy)
    assert wrong(verify_folder(copy, Knowledge())) == {}
    of_rounds(copy)
    close_anew(copy)
    assert "epsilon of each round" in wrong(verify_folder(copy, Knowledge()))


def test_another_manifest_than_the_close_knows_is_named(copy: Path, signed: Signed) -> None:
    of_result(lambda result: result.update(seed=5))(copy)
    manifest = read_manifest(copy)
    (copy / "manifest.json").write_text(replace(manifest, files=hashes(copy, manifest.files)).text)
    list_anew(copy)
    (copy / SIGNATURES).unlink()
    assert set(wrong(verify_folder(copy, Knowledge()))) == {"close"}


def test_overdrawn_and_later_raised_budget_is_detected() -> None:
    events = {"model": {"kind": "Gaussian", "noise_multiplier": 1.0}}
    first = {"version": 1, "unit": "client", "adjacency": "zero-out", "owner": "all", "simulated": False}

    def chain(*targets: float) -> list[Entry]:
        found = [linked(Draft("open", "", canonical(first)), START)]
        for number, target in enumerate(targets, 1):
            said = {
                "budget": {"target_epsilon": target, "target_delta": 1e-5},
                "events": events,
                "rng": "system",
            }
            draft = Draft("reserve", canonical(["a", number, "sum"]), canonical(said))
            found.append(linked(draft, found[-1].head))
        return found

    assert verify_entries(chain(10.0, 10.0), "it").ok
    found = verify_entries(chain(1.0, 10.0), "it")
    assert not found.ok and "before entry 3" in str(found.problem)


def test_a_run_that_went_on_after_its_close_is_named(signed: Signed, tmp_path: Path) -> None:
    from dp_accounting import GaussianDpEvent

    import fedveil as fv

    run = Path(shutil.copytree(signed.run, tmp_path / "run"))
    identity = json.loads(read_entries(run / "ledger")[0].payload)
    budget = fv.Budget("client", 1e6, 1e-5, identity["adjacency"])
    name = read_manifest(run).run
    with Ledger.open(run / "ledger", budget, owner=identity["owner"], simulated=True) as ledger:
        ledger.reserve(fv.Release("client", name, 9, "sum", {"model": GaussianDpEvent(50.0)}, rng="seeded"))
    assert "continued after it was closed" in wrong(verify_folder(run, Knowledge()))["close"]
