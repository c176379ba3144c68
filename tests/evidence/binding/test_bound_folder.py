"""Folder under verification: runs without a result, a ledger or an end."""

import shutil
from pathlib import Path

import pytest
from shared.bundles import Signed, wrong
from shared.runs import run_quietly

from fedveil.base.refusal import Refusal
from fedveil.cli.report import bundle
from fedveil.cli.verify import verify
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.verify import verify_folder
from fedveil.run.files import MANIFEST, RESULT

pytestmark = pytest.mark.usefixtures("without_jinja")


def test_a_run_that_goes_on_cannot_be_verified_yet(tmp_path: Path, signed: Signed) -> None:
    run = Path(shutil.copytree(signed.run, tmp_path / "run"))
    for name in (RESULT, MANIFEST):
        (run / name).unlink()
    with pytest.raises(Refusal, match="has not ended"):
        verify(run, [])


def test_a_run_without_a_ledger_is_bound_by_its_signature_alone(tmp_path: Path, signed: Signed) -> None:
    given = ("task=digits", "task.num_clients=4", "num_rounds=1", "batch_size=40", "privacy=none")
    run_quietly([*given], tmp_path / "run")
    assert bundle(tmp_path / "run", None, [signed.keys / "federation"]) == 0
    lines = {
        line.name: line
        for line in verify_folder(tmp_path / "run" / "bundle", Knowledge((signed.federation,)))
    }
    assert not wrong(list(lines.values())) and lines["close"].ok is None


def test_a_result_that_cannot_be_read_is_named(copy: Path) -> None:
    (copy / "result.json").write_text('{"epsilon": 0.99.1}')
    said = wrong(verify_folder(copy, Knowledge()))
    assert len(said) > 5 and not [
        each for each in said.values() if "delimiter" in each and "result.json" not in each
    ]
