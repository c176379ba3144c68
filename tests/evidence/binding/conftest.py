"""Runs and bundles that the tests of verification share."""

import shutil
from pathlib import Path

import pytest
from shared.bundles import Signed

from fedveil.evidence.binding import page
from fedveil.evidence.binding.bundle import read_list
from fedveil.evidence.binding.signatures import read_public

KEPT = Path(__file__).parents[2] / "fixtures" / "signed_run"


@pytest.fixture
def without_jinja(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify as the base installation does: the kept page is of an earlier release, and this one makes another."""
    monkeypatch.setattr(page, "page_again", lambda _: None)


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    """A run of 26 November 2026, the bundle that two have signed, files of a run by another seed, and everybody's keys.

    Of the bundle the fixture keeps what the run's folder does not hold.
    """
    folder = Path(shutil.copytree(KEPT, tmp_path_factory.mktemp("signed") / "kept"))
    for name in read_list(folder / "bundle").files:
        if not (folder / "bundle" / name).exists():
            shutil.copy(folder / "run" / name, folder / "bundle" / name)
    for path in (folder / "keys").iterdir():  # keys in a checkout are readable by all
        path.chmod(0o600)
    (folder / "run" / "ledger").chmod(0o600)
    public = {name: read_public(str(folder / "keys" / f"{name}.pub")) for name in ("federation", "officer")}
    return Signed(folder / "run", folder / "bundle", folder / "other", folder / "keys", **public)


@pytest.fixture
def copy(signed: Signed, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed.bundle, tmp_path / "copy"))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Return a run that is closed, without its page, of which this release makes another."""
    left_out = shutil.ignore_patterns("report.html", "report.json")
    return Path(shutil.copytree(KEPT / "run", tmp_path / "runs" / "kept", ignore=left_out))
