"""What an alarm does to a run: it ends, pauses, gets more noise, or goes back; and what stays spent."""

import json
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
from shared.audits import NOISE, ROUNDS, SMALL, noise_halved, run_audited
from shared.runs import reservations, resume

from fedveil.audit.auditor import Auditor
from fedveil.audit.line import AuditLine, format_alarm
from fedveil.audit.result import as_json, recompute_audit
from fedveil.base.refusal import Refusal
from fedveil.cli.audit import audit_run
from fedveil.configs.settings import settings_from_overrides
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.verify import verify_folder
from fedveil.privacy.audit import round_rows
from fedveil.privacy.audit import sum_audit as watching
from fedveil.privacy.audit.alarms import Alarm, Check, Level
from fedveil.privacy.audit.free_checks import NORM_TESTS, draw_p, draw_sums
from fedveil.privacy.audit.run_audit import AuditTerms
from fedveil.privacy.ledger.ledger import Ledger, read_entries, verify
from fedveil.privacy.mechanisms.released_sum import ReleasedSum, RoundCohort
from fedveil.run.callbacks import RoundEnd, RunEnd, RunStart
from fedveil.run.files import AUDIT_ROWS, OPERATOR
from fedveil.run.run import exit_code_of
from fedveil.simulations.simulate import simulate
from fedveil.strategies.cohorts import OverSelected

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")


def reserved(folder: Path) -> list[Any]:
    return [payload["events"] for payload in reservations(folder / "ledger")]


def test_stop_ends_the_run_for_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with noise_halved(since=3):
        outcome = run_audited(tmp_path / "run")
    assert outcome.exit_code == 5 and outcome.result["status"] == "alarmed"
    assert outcome.result["rounds_completed"] == 3
    alarm, *others = outcome.result["audit"]["alarms"]
    assert (alarm["round"], alarm["level"], alarm["test"]) == (3, "red", "norm")
    assert [each["test"] for each in others] == ["reuse"]  # too little energy is too little that is new
    assert "stays released" in alarm["cannot_undo"]
    notes = [e for e in read_entries(tmp_path / "run" / "ledger") if e.kind == "note"]
    assert [json.loads(e.key)[1:] for e in notes] == [[3, "audit norm"], [3, "audit reuse"]]
    assert json.loads(notes[0].payload)["action"] == "stop"
    found = verify(tmp_path / "run" / "ledger")
    assert found.ok and found.epsilon == pytest.approx(outcome.result["privacy"][-1]["epsilon"], rel=1e-3)
    with pytest.raises(Refusal, match="an alarm of its audit ended it"):
        resume(tmp_path / "run")
    assert audit_run(tmp_path / "run") == 3
    assert "violated: a released sum is shorter than its claimed noise (round 3" in capsys.readouterr().out


@pytest.mark.parametrize(("suspect", "rounds", "exit_code"), [({2}, ROUNDS, 4), ({2, 4}, 4, 5)])
def test_chance_alarm_stops_the_run_when_it_comes_again(
    suspect: set[int], rounds: int, exit_code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of two hundred correct runs raises such an alarm; it is shown, written down, and left at that."""
    numbers = iter(range(1, ROUNDS + 1))
    with patch.object(watching, "norm_p", lambda *layers: 1e-4 if next(numbers) in suspect else 1.0):
        outcome = run_audited(tmp_path / "run")
    assert (outcome.exit_code, outcome.result["rounds_completed"]) == (exit_code, rounds)
    assert exit_code_of(json.loads((tmp_path / "run" / "result.json").read_text())) == exit_code
    alarms = outcome.result["audit"]["alarms"]
    assert [(each["round"], each["level"], each["action"]) for each in alarms] == [
        (number, *(("red", "stop") if number == 4 else ("orange", "note"))) for number in sorted(suspect)
    ]
    notes = [e for e in read_entries(tmp_path / "run" / "ledger") if e.kind == "note"]
    assert [json.loads(e.key)[1:] for e in notes] == [[number, "audit norm"] for number in sorted(suspect)]
    assert audit_run(tmp_path / "run") == (3 if exit_code == 5 else 4)
    assert ("perhaps a released sum is shorter" in capsys.readouterr().out) is (exit_code == 4)


def test_ten_numbers_without_noise_turn_red_though_no_round_shows_it(tmp_path: Path) -> None:
    rng, levels = np.random.default_rng(0), list[str]()
    auditor = Auditor(AuditTerms(100, 0.01, dimension=310, delta=1e-4), tmp_path / "rows")
    for number in range(1, 16):
        layers = [rng.standard_normal((30, 10)), 0.6 * rng.standard_normal(10)]
        levels += [
            each.level for each in auditor.take(number, ReleasedSum(number, layers, 1.0, 1.0, 1.0), {})
        ]
    assert levels[0] == "orange" and "red" in levels


def test_a_round_takes_the_work_and_memory_of_one_row(tmp_path: Path) -> None:
    """A check read all rows of a run again, which were kept with their layers, in 1.9 kB each."""
    rng, rows = np.random.default_rng(0), list[int]()

    def noted(energies: Any, dimensions: Any) -> float:
        rows.append(len(energies))
        return 1.0

    auditor = Auditor(AuditTerms(512, 0.01, dimension=310, delta=1e-4, clients=400), tmp_path / "rows")
    with patch.object(watching, "run_p", noted):
        for number in range(1, 513):
            cohort = RoundCohort(int(rng.binomial(400, 0.25)), population=400)
            layers = [rng.standard_normal((30, 10)), rng.standard_normal(10)]
            auditor.take(number, ReleasedSum(number, layers, 1.0, 0.25, 1.0, cohort), {})
    arrays = [each for each in vars(auditor).values() if isinstance(each, np.ndarray)]
    assert set(rows) == {1} and sum(each.nbytes for each in arrays) <= 10_000
    assert auditor.rows["round"].tolist() == [*range(1, 513)]


def test_lost_rows_are_an_error_of_the_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    auditor = Auditor(AuditTerms(10, 0.01, dimension=310, delta=1e-4), tmp_path / "rows")
    for number in range(1, 4):
        if number == 3:
            (tmp_path / "rows").unlink()
        layers = [rng.standard_normal((30, 10)), rng.standard_normal(10)]
        auditor.take(number, ReleasedSum(number, layers, 1.0, 1.0, 1.0), {})
    with pytest.raises(OSError, match="rows has 1 rows of 3 audited rounds"):
        auditor.end({}, {})


def test_sums_of_rows_give_the_p_values_of_all_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    auditor = Auditor(AuditTerms(40, 0.01, dimension=310, delta=1e-4, clients=400), tmp_path / "rows")
    for number in range(1, 41):
        cohort = RoundCohort(int(rng.binomial(400, 0.25)), population=400)
        layers = [rng.standard_normal((30, 10)), rng.standard_normal(10)]
        auditor.take(number, ReleasedSum(number, layers, 1.0, 0.25, 1.0, cohort), {})
    rows = round_rows.read(tmp_path / "rows", 0)
    assert not auditor.raised
    assert rows["draw_p"][-1] == pytest.approx(
        draw_p(draw_sums(rows["clients"], rows["population"], 0.25), 0.25)
    )
    pooled = watching.noise_p(watching.noise_sums(rows))
    one = watching.norm_p(layers, 1.0)
    assert rows["norm_p"][-1] == pytest.approx(min(1.0, NORM_TESTS * min(pooled, one)))
    again = Auditor(auditor.terms, tmp_path / "again")
    again.replay([rows])
    assert again.energy.tolist() == auditor.energy.tolist()


def test_pause_ends_it_until_somebody_resumes(tmp_path: Path) -> None:
    with noise_halved(since=2):
        outcome = run_audited(tmp_path / "run", "audit.on_alarm=pause")
    assert outcome.exit_code == 5 and outcome.result["status"] == "paused"
    again = resume(tmp_path / "run")
    assert again.exit_code == 0 and again.result["rounds_completed"] == ROUNDS
    assert {each["round"] for each in again.result["audit"]["alarms"]} == {2}
    assert again.result["audit"]["verdict"] == "violated"


def test_an_audit_without_the_rows_of_its_alarm_is_not_recomputed(tmp_path: Path) -> None:
    """Somebody deletes the rows of a paused run, which goes on without its alarm."""
    folder = tmp_path / "run"
    with noise_halved(since=2):
        run_audited(folder, "audit.on_alarm=pause")
    (folder / AUDIT_ROWS).unlink()
    again = resume(folder)
    assert again.result["audit"]["alarms"] == []
    with pytest.raises(Refusal, match=f"has {ROUNDS - 2} rows of {ROUNDS} audited rounds; restore it"):
        recompute_audit(folder)
    failed = [line for line in verify_folder(folder, Knowledge()) if line.ok is False]
    assert [line.name for line in failed] == ["audit"] and "audited rounds" in failed[0].finding


def test_raised_noise_is_there_and_charged_as_planned(tmp_path: Path) -> None:
    """What is chosen from outputs may not lower a charge: later rounds cost what they would have cost."""
    with noise_halved(since=2):
        outcome = run_audited(tmp_path / "run", "audit.on_alarm=raise_noise")
    calm = run_audited(tmp_path / "calm")
    assert outcome.exit_code == 0
    assert reserved(tmp_path / "run") == reserved(tmp_path / "calm")
    assert outcome.result["privacy"] == calm.result["privacy"]
    noises = round_rows.read(tmp_path / "run" / "audit.npy", 0)["noise"]
    assert noises == pytest.approx([2, 2, 4, 4, 4])
    norms = round_rows.read(tmp_path / "run" / "audit.npy", 0)["norm"] / np.sqrt(650)
    # Halved by the fault, doubled by the alarm.
    assert norms[2:] == pytest.approx(2, rel=0.3) and norms[1] == pytest.approx(1, rel=0.5)


def test_rollback_goes_back_to_the_last_model_without_suspicion(tmp_path: Path) -> None:
    with noise_halved(since=3):
        outcome = run_audited(tmp_path / "run", "audit.on_alarm=rollback")
    assert outcome.exit_code == 5 and outcome.result["rounds_completed"] == 2
    assert len(reserved(tmp_path / "run")) == 3
    assert "their epsilon stays spent" in outcome.result["audit"]["alarms"][0]["cannot_undo"]
    run_audited(tmp_path / "two", "num_rounds=2")
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "two")]
    assert models[0] == models[1]
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert outcome.result["metrics"] == two["metrics"]


def test_rollback_leaves_the_round_whose_secret_draw_raised_the_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other p-value of that round is suspicious."""
    take = Auditor.take

    def with_draw(self: Auditor, number: int, *rest: Any) -> list[Alarm]:
        return [
            *take(self, number, *rest),
            *([Alarm(Level.RED, Check.DRAW, 1e-9, 1e-9)] if number == 3 else []),
        ]

    monkeypatch.setattr(Auditor, "take", with_draw)
    outcome = run_audited(tmp_path / "run", "audit.on_alarm=rollback")
    assert outcome.exit_code == 5 and outcome.result["rounds_completed"] == 2


def test_a_run_that_was_wrong_from_the_start_goes_back_to_its_start(tmp_path: Path) -> None:
    with noise_halved():
        outcome = run_audited(tmp_path / "run", "audit.on_alarm=rollback")
    assert outcome.exit_code == 5 and outcome.result["rounds_completed"] == 0


def test_note_writes_it_down_and_goes_on(tmp_path: Path) -> None:
    with noise_halved(since=4):
        outcome = run_audited(tmp_path / "run", "audit.on_alarm=note")
    assert outcome.exit_code == 0
    assert {each["round"] for each in outcome.result["audit"]["alarms"]} == {4, 5}


def test_ledger_with_less_than_the_releases_raises_an_alarm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No chance is in it, so that one look is enough; the audit counts on its own what the sums cost."""
    real = Ledger.epsilon
    with patch.object(Ledger, "epsilon", lambda self, *asked: 0.9 * real(self, *asked)):
        outcome = run_audited(tmp_path / "run", "audit=light")
    assert (outcome.exit_code, outcome.result["rounds_completed"]) == (5, 1)
    assert [(each["test"], each["p_value"]) for each in outcome.result["audit"]["alarms"]] == [("books", 0)]
    assert audit_run(tmp_path / "run") == 3
    assert "violated: the ledger counts less than what the released sums cost" in capsys.readouterr().out


@pytest.mark.parametrize(("accounted", "exit_code"), [("invited", 0), ("planned", 5)])
def test_draw_is_checked_under_over_selection(accounted: str, exit_code: int, tmp_path: Path) -> None:
    twice = ("cohort.rate=0.3", "cohort.over_selection=2")
    with patch.object(OverSelected, "event", lambda self, one: getattr(self, accounted).event(one)):
        outcome = run_audited(tmp_path / "run", "task.num_clients=100", *twice)
    assert outcome.exit_code == exit_code
    assert [(each["test"], each["round"]) for each in outcome.result["audit"]["alarms"]] == (
        [("draw", 1)] if exit_code else []
    )


@pytest.mark.parametrize("counts", [(24, 36), (70, 90)], ids=["no alarm", "an alarm"])
def test_size_of_a_secret_draw_changes_no_displayed_figure(counts: tuple[int, int], tmp_path: Path) -> None:
    """Two rounds with one released sum and other numbers of clients: an exact p-value of the draw would tell them apart."""
    layers = [np.random.default_rng(1).standard_normal(310)]
    terms = AuditTerms(100, 0.01, dimension=310, delta=1e-4, clients=100)
    shown: list[Any] = []
    for count in counts:
        auditor = Auditor(terms, tmp_path / f"{count}")
        auditor.take(1, ReleasedSum(1, layers, 1.0, 0.25, 1.0, RoundCohort(count, population=100)), {})
        alarms = [(each.content, format_alarm(each.alarm), each.alarm) for each in auditor.raised]
        shown.append((auditor.p_values, auditor.columns(1), auditor.is_clean, alarms))
        assert Check.DRAW not in auditor.p_values and (count > 60) is bool(alarms)
        summary = auditor.end({}, {})
        assert summary is not None
        shown[-1] += (as_json(terms, summary, auditor.raised, "note"),)
    assert shown[0] == shown[1]


def test_no_callback_and_no_status_has_the_p_value_of_a_secret_draw(tmp_path: Path) -> None:
    class Watching:
        lines: ClassVar[list[AuditLine]] = []

        def start(self, run: RunStart) -> None:
            pass

        def end(self, ending: RunEnd) -> None:
            pass

        def round(self, done: RoundEnd) -> None:
            assert done.audit is not None
            self.lines.append(done.audit)

    settings = settings_from_overrides([*SMALL, *NOISE, "audit=light"])
    simulate(settings, tmp_path / "run", quiet=True, callbacks=[Watching()])
    assert len(Watching.lines) == ROUNDS
    assert all("draw" not in line.p_values and "norm" in line.p_values for line in Watching.lines)
    assert all("draw" not in line.status()["p_values"] for line in Watching.lines)
    rows = round_rows.read(tmp_path / "run" / AUDIT_ROWS, 0)
    exact = {repr(float(p)) for p in rows["draw_p"]} | {f"{float(p):.2g}" for p in rows["draw_p"]} - {"1"}
    private = {AUDIT_ROWS, OPERATOR}
    texts = [
        path.read_text(errors="replace")
        for path in (tmp_path / "run").rglob("*")
        if path.is_file() and path.name not in private and path.suffix in (".json", ".jsonl", ".yaml", ".csv")
    ]
    assert texts and not [p for p in exact for text in texts if len(p) > 8 and p in text]
    assert (tmp_path / "run" / AUDIT_ROWS).stat().st_mode & 0o077 == 0
