"""Runs that were signed before and after an authority was replaced: the old key and the new one verify both, by its rollovers."""

import json
import runpy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedveil.cli.verify import verify
from fedveil.deployment.rollover import roll_over
from fedveil.deployment.serve import serve
from fedveil.evidence.binding.bound_folder import BoundFolder
from fedveil.evidence.binding.receipts import Receipts, read_receipts, write_receipts
from fedveil.privacy.secagg.rollover import DAY_SECONDS, Rollover

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

SERVED = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "served.py"))
ASKED = (
    *("task=digits", "num_rounds=1", "batch_size=40", "privacy.allow_large_delta=true", "link.wait=0.3"),
    *("accept_vacuous=true", "privacy=client_distributed", "privacy.noise_multiplier=40"),
)
DAYS = 5.0


@dataclass(frozen=True)
class World:
    """A federation with a run before its rollover, and one after."""

    hearts: Path
    last: Rollover

    def run(self, name: str) -> Path:
        return self.hearts / "server" / "runs" / name

    @property
    def chain(self) -> str:
        return str(self.hearts / "server" / "rollovers.json")

    def verified(self, name: str, *keys: str, **known: Any) -> int:
        return verify(self.run(name), keys, **known)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    hearts = SERVED["make_federation"](tmp_path_factory.mktemp("desk"))
    grid = SERVED["Devices"](hearts / "clients")
    reach = SERVED["reaching"](grid)
    assert serve(hearts / "server", [*ASKED, "run=before", "privacy.target_epsilon=8"], reach=reach) == 0
    last = roll_over(hearts, DAYS).authority.rollovers[-1]
    grid = SERVED["Devices"](hearts / "clients")
    reach = SERVED["reaching"](grid)
    assert serve(hearts / "server", [*ASKED, "run=after", "privacy.target_epsilon=16"], reach=reach) == 0
    return World(hearts, last)


def test_each_run_is_verified_by_each_key(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, chain = world.last.old, world.last.new, world.chain
    assert read_receipts(world.run("before")).authority.hex() == old
    assert read_receipts(world.run("after")).authority.hex() == new
    for keys in ([old], [chain], [old, chain], [new, chain]):
        assert world.verified("before", *keys) == 0, keys
    for keys in ([old], [new], [chain], [old, new]):
        assert world.verified("after", *keys) == 0, keys
    capsys.readouterr()
    assert world.verified("before", new) == 2  # nothing leads from one to the other
    assert "signatures: FAILED" not in capsys.readouterr().out


def test_both_runs_are_on_one_ledger(world: World) -> None:
    assert len(list((world.hearts / "server" / "ledgers").glob("*.ledger"))) == 1


def rewritten(world: World, name: str, **changed: Any) -> None:
    given = read_receipts(world.run(name))
    values = {
        each: getattr(given, each) for each in ("description", "authority", "roster", "signed", "rollovers")
    }
    write_receipts(world.run(name), Receipts(**{**values, **changed}))


def test_a_chain_that_is_not_signed_leads_nowhere(world: World, tmp_path: Path) -> None:
    kept = (world.run("after") / "receipts.json").read_bytes()
    found = json.loads(kept)
    wrong = json.loads(found["rollovers"])
    wrong["rollovers"][0]["old"] = "ab" * 32
    rewritten(world, "after", rollovers=())
    try:
        assert world.verified("after", world.last.new) == 0
        assert world.verified("after", world.last.old) == 2
        text = json.dumps(wrong)
        (tmp_path / "rollovers.json").write_text(text)
        with pytest.raises(Exception, match="holds no rollovers of an authority"):
            world.verified("after", str(tmp_path / "rollovers.json"))
    finally:
        (world.run("after") / "receipts.json").write_bytes(kept)


def test_the_old_key_alone_signs_no_run_of_after_the_overlap(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A thief of the old key must put the end of a run before the end of the overlap."""
    kept = (world.run("before") / "receipts.json").read_bytes()
    monkeypatch.setattr(BoundFolder, "seconds_of_end", int(time.time() + (DAYS + 1) * DAY_SECONDS))
    assert world.verified("before", world.chain) == 2
    assert "was replaced, and the run did not end before" in " ".join(capsys.readouterr().out.split())
    rewritten(world, "before", rollovers=read_receipts(world.run("after")).rollovers)
    try:
        assert world.verified("before", world.last.old) == 2
    finally:
        (world.run("before") / "receipts.json").write_bytes(kept)
