"""Runs that are bound to their ledger: how each ends with one entry that holds the hash of all that it left."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.runs import resume, run_quietly

import fedveil as fv
import fedveil.run.run
from fedveil.base.refusal import Refusal
from fedveil.cli.report import bundle, key
from fedveil.cli.report import report as make_report
from fedveil.cli.verify import UNBOUND
from fedveil.cli.verify import verify as verify_path
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.verify import verify_folder
from fedveil.evidence.content import to_json
from fedveil.evidence.page import page_of
from fedveil.privacy.ledger.ledger import Ledger, read_entries, verify
from fedveil.run import progress as recording
from fedveil.run import result as results
from fedveil.run import run as running
from fedveil.run.manifest import Manifest, manifest_of, read_manifest, write_manifest
from fedveil.run.result import close_again
from fedveil.run.run import RunResult

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")

NOISY = ("privacy.noise_multiplier=1", "privacy.target_epsilon=null", "privacy.allow_large_delta=true")
QUICK = ("task=digits", "task.num_clients=20", "num_rounds=2", "batch_size=40", "cohort.rate=0.4", *NOISY)


def begin(folder: Path, *more: str) -> RunResult:
    return run_quietly([*QUICK, *more], folder)


def closes(run: Path) -> list[dict[str, Any]]:
    return [json.loads(entry.payload) for entry in read_entries(run / "ledger") if entry.kind == "close"]


def bound(run: Path) -> Manifest:
    """Return the manifest of a closed run, of which everything holds."""
    manifest = read_manifest(run)
    assert read_entries(run / "ledger")[-1].kind == "close"
    assert closes(run)[-1]["manifest"] == hashlib.sha256((run / "manifest.json").read_bytes()).hexdigest()
    assert (
        closes(run)[-1]["status"]
        == manifest.status
        == json.loads((run / "result.json").read_text())["status"]
    )
    for name, digest in manifest.files.items():
        assert hashlib.sha256((run / name).read_bytes()).hexdigest() == digest, name
    return manifest


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert begin(
        run, "audit=full", "audit.canaries=40", "audit.looks=2", "audit.on_alarm=note"
    ).exit_code in (0, 4)
    return run


def test_last_entry_binds_the_files_of_the_run(finished: Path) -> None:
    files = {"config.yaml", "run.json", "metrics.jsonl", "result.json", "model.safetensors"}
    assert set(bound(finished).files) == files | {"audit.json", "audit.npy"}
    assert len(closes(finished)) == 1


def test_a_close_costs_nothing(finished: Path, tmp_path: Path) -> None:
    found = verify(finished / "ledger")
    entries = read_entries(finished / "ledger")
    result = json.loads((finished / "result.json").read_text())
    assert found.ok and found.head == entries[-1].head
    (spent,) = {row["epsilon"] for row in result["privacy"] if row["adversary"] == "model"}
    assert found.epsilon == pytest.approx(spent, rel=1e-9)


def test_files_of_the_task_are_bound_with_the_model(tmp_path: Path, finished: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    saved = json.loads((run / "run.json").read_text())
    (run / "table.yaml").write_text("columns: []\n")
    (run / "assessment.yaml").write_text("purpose: none\n")
    (run / "run.json").write_text(json.dumps({**saved, "beside": ["table.yaml"]}))
    assert {"table.yaml", "assessment.yaml"} <= set(manifest_of(run).files)
    assert "operator.jsonl" not in manifest_of(run).files and (run / "operator.jsonl").exists()


def test_an_exhausted_run_closes_once_however_often_it_is_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("privacy.target_epsilon=8", "num_rounds=50")
    assert begin(run, *more).result["status"] == "exhausted" == bound(run).status
    assert resume(run).exit_code == 3
    assert bound(run).status == "exhausted" and len(closes(run)) == 1


def test_a_run_that_failed_closes_and_closes_again_when_it_went_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, true = tmp_path / "run", running.keep

    def full(progress: Any, state: Any) -> None:
        if state.round == 2:
            raise OSError(28, "No space left on device")
        true(progress, state)

    with monkeypatch.context() as patch:
        patch.setattr(running, "keep", full)
        assert begin(run, "audit=off").result["status"] == "failed"
    assert bound(run).status == "failed"
    assert resume(run).exit_code == 0
    assert bound(run).status == "completed" and len(closes(run)) == 2


def test_an_alarmed_run_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedveil.audit.auditor import Auditor
    from fedveil.privacy.audit.alarms import Alarm, Check, Level

    monkeypatch.setattr(Auditor, "take", lambda *_: [Alarm(Level.RED, Check.NORM, 1e-20, 1e-3)])
    result = begin(tmp_path / "run", "audit=light", "audit.on_alarm=stop").result
    assert (result["status"], bound(tmp_path / "run").status) == ("alarmed", "alarmed")


# --- interrupted, killed ------------------------------------------------------------------------------------------


def dying(module: Any, name: str, after: bool) -> Callable[[], None]:
    """Return what kills this process as it writes the result or closes the run, before or after that."""

    def arrange() -> None:
        true = getattr(module, name)

        def deadly(*given: Any) -> None:
            if after:
                true(*given)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(module, name, deadly)

    return arrange


@pytest.mark.parametrize(
    ("module", "name"), [(results, "write_results"), (results, "close_run"), (recording, "save")]
)
def test_a_run_that_was_killed_and_resumed_closes_once(commands: Any, module: Any, name: str) -> None:
    run = commands.folder / "run"
    code, _ = commands.run("simulate", *QUICK, f"hydra.run.dir={run}", first=dying(module, name, after=True))
    assert code == -signal.SIGKILL
    assert len(closes(run)) == (name == "close_run")
    code, command = commands.run("simulate", f"resume={run}")
    assert code == 0, command.err
    assert bound(run).status == "completed"
    assert len(closes(run)) == 1  # the same result again is the same manifest


def test_an_interrupted_run_is_not_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, true = tmp_path / "run", running.keep

    def interrupt(progress: Any, state: Any) -> None:
        true(progress, state)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(running, "keep", interrupt)
        assert begin(run).result["status"] == "interrupted"
    assert closes(run) == [] and not (run / "manifest.json").exists()
    assert resume(run).exit_code == 0
    assert bound(run).status == "completed" and len(closes(run)) == 1


def test_a_run_that_was_not_closed_is_closed_from_its_folder_alone(tmp_path: Path, finished: Path) -> None:
    entries = len(read_entries(finished / "ledger"))
    close_again(finished)  # is closed
    assert len(read_entries(finished / "ledger")) == entries


def test_ledger_names_writers_after_the_close(tmp_path: Path) -> None:
    from dp_accounting import GaussianDpEvent

    import fedveil as fv

    budget = fv.Budget("client", 10.0, 1e-5)

    def release(run: str, number: int) -> fv.Release:
        return fv.Release("client", run, number, "sum", {"model": GaussianDpEvent(5.0)}, rng="system")

    with Ledger.open(tmp_path / "ledger", budget, owner="all", simulated=False) as ledger:
        ledger.reserve_new(release("a", 1))
        first = ledger.close_run("a", "00", "failed")
        assert ledger.close_run("a", "00", "failed") == first == ledger.closed("a")
        ledger.reserve_new(release("b", 1))
        assert ledger.closed("a") == first and ledger.closed("b") is None
        ledger.reserve_new(release("a", 2))
        assert ledger.closed("a") is None
        again = ledger.close_run("a", "00", "completed")
        assert again.seq == ledger.head.seq and ledger.closed("a") == again
    with Ledger.open(tmp_path / "ledger", budget, owner="all", simulated=False) as ledger:
        assert ledger.closed("a") == again and ledger.epsilon() > 0
    assert verify(tmp_path / "ledger").ok


def test_manifest_hides_the_participants(finished: Path, tmp_path: Path) -> None:
    """The rows of a trusted server's audit are hashed behind a salt, and manifest and salt are the operator's alone."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "data": "real", "seconds": None}))
    manifest = manifest_of(run)
    write_manifest(run, manifest)
    rows = (run / "audit.npy").read_bytes()
    assert manifest.files["audit.npy"] != hashlib.sha256(rows).hexdigest()
    assert manifest.files == manifest_of(run).files
    assert manifest.files["audit.npy"] == hashlib.sha256((run / "audit.salt").read_bytes() + rows).hexdigest()
    assert not any((run / name).stat().st_mode & 0o077 for name in ("manifest.json", "audit.salt"))


@pytest.mark.parametrize("name", ["/etc/hostname", "../ledger", "sub/model.safetensors", ".."])
def test_a_manifest_names_nothing_outside_its_folder(finished: Path, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    manifest = read_manifest(run)
    write_manifest(run, replace(manifest, files={**manifest.files, name: "0" * 64}))
    with pytest.raises(Refusal, match="not the name of a file in the folder"):
        read_manifest(run)


# --- what binds a run, told by `fedveil verify` -------------------------------------------------------------------------


def test_run_vouched_for_by_its_own_files_is_not_called_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, records = tmp_path / "run", ("privacy=record", "privacy.target_epsilon=8", "num_rounds=1")
    quick = ("task=digits", "task.num_clients=4", "batch_size=40")
    run_quietly([*quick, *records], run)
    assert verify_path(run, []) == UNBOUND
    said = capsys.readouterr().out
    assert (
        "2 passed; 9 could not be made: ledger, close, known head, epsilon, epsilon of each round, receipts"
        in said
    )
    assert "no ledger, signature or receipt binds these files" in said and "every check" not in said
    assert verify_path(run, [], as_json=True) == UNBOUND
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and not told["bound"]
    key(tmp_path / "key", unlocked=True)
    bundle(run, tmp_path / "bundle", [tmp_path / "key"])
    assert verify_path(tmp_path / "bundle", []) == 0
    (run / "model.safetensors").write_bytes(b"another")
    assert verify_path(run, []) == 2
    assert "1 failed: manifest; " in capsys.readouterr().out


def test_confusions_of_a_page_are_those_of_its_result(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    make_report(run)
    report = json.loads((run / "report.json").read_text())
    report["model"]["confusion"][0]["counts"][0] = 999
    (run / "report.json").write_text(to_json(report))
    (run / "report.html").write_text(page_of(report))
    (line,) = (each for each in verify_folder(run, Knowledge()) if each.name == "page")
    assert line.ok is False and line.finding.startswith("confusion matrix is [[999")


def test_a_run_that_its_ledger_binds_is_verified(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_path(finished, []) == 0
    assert capsys.readouterr().out.endswith(
        "7 passed; 4 could not be made: client ledgers, receipts, blame, page\n"
    )


class Shops:
    """Three shops with real records."""

    simulated, data_id, num_clients = False, "shops-2026", 3

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(2, 2)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        return {}

    def client_data(self, client: int) -> fv.Examples:
        inputs = torch.randn(60, 2, generator=torch.Generator().manual_seed(client))
        return fv.Examples(inputs, (inputs[:, 0] > 0).long())

    def held_out(self) -> fv.Examples:
        return self.client_data(9)


def test_ledgers_of_real_records_on_this_machine_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, home = tmp_path / "run", tmp_path / "ledgers"
    keys: dict[str, Any] = {
        "privacy": "record",
        "cohort": "all",
        "num_rounds": 2,
        "batch_size": 20,
        "ledger.dir": str(home),
        "quiet": True,
    }
    fv.simulate(Shops(), folder=run, **keys)
    assert verify_path(run, []) == UNBOUND
    said = capsys.readouterr().out
    assert "3 ledgers on this machine are correct, epsilon at most" in said, said
    result = json.loads((run / "result.json").read_text())
    for row in result["privacy"]:
        row["epsilon"] = 1.0
    (run / "result.json").write_text(json.dumps(result))
    assert verify_path(run, []) == 2
    assert "the result states 1 for records, and a ledger on this machine " in capsys.readouterr().out
    shutil.rmtree(home)
    assert verify_path(run, []) == 2
    assert "no ledger of this run's clients is on this machine" in capsys.readouterr().out
