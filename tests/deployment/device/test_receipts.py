"""Receipts of devices: what they bind, what they tell nobody, and what of them is checked."""

import hashlib
import json
import runpy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord

from fedveil.base.tensor_file import safetensors_parts
from fedveil.cli.report import bundle
from fedveil.deployment.device.client_bundle import ClientBundle, read_client_bundle
from fedveil.deployment.device.receipts import MAX_OPENINGS, give_receipt, receipt_for
from fedveil.deployment.serve import serve
from fedveil.deployment.watch import LOG
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.receipts import fewest_receipts, read_receipts, verify_roster
from fedveil.evidence.binding.verify import CheckLine, verify_folder
from fedveil.messages.flower_adapter import records_of
from fedveil.messages.notices import MAX_MANIFEST, RunOver, message_to, read_over, read_receipt, reply_with
from fedveil.privacy.budget import Budget, Unit
from fedveil.privacy.ledger.hash_chain import canonical
from fedveil.privacy.ledger.ledger import Ledger, read_entries
from fedveil.privacy.ledger.receipt import RunDescription, commitment_of, holds, read_opening
from fedveil.run.manifest import Manifest

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


SERVED = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "served.py"))
COMMON = ("task=digits", "num_rounds=1", "batch_size=40", "privacy.allow_large_delta=true", "link.wait=0.3")
ASKED = (*COMMON, "accept_vacuous=true", "privacy.target_epsilon=8")
MODEL = {"w": np.arange(3.0)}
LISTED = Manifest(
    "spring@5f", "completed", {"model.safetensors": sha256(b"".join(safetensors_parts(MODEL)))}
).text
MANIFEST = sha256(LISTED.encode())
OVER = RunOver("spring", "completed", 3, MODEL, manifest=MANIFEST, listed=LISTED)


@dataclass(frozen=True)
class World:
    """A federation whose runs `masked` and `central` are over."""

    hearts: Path

    def run(self, name: str) -> Path:
        return self.hearts / "server" / "runs" / name

    def device(self, name: str) -> ClientBundle:
        return read_client_bundle(self.hearts / "clients" / name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    hearts = SERVED["make_federation"](tmp_path_factory.mktemp("desk"))
    for mode, run in (("client_distributed", "masked"), ("client_central", "central")):
        grid = SERVED["Devices"](hearts / "clients")
        asked = [*ASKED, f"privacy={mode}", f"run={run}"]
        if mode == "client_central":
            asked += ["privacy.target_epsilon=16", "cohort=poisson", "cohort.rate=0.6"]
        reach = SERVED["reaching"](grid, 4 if mode == "client_central" else 5)
        assert serve(hearts / "server", asked, reach=reach) == 0
    return World(hearts)


def line(folder: Path, device: Path | None = None, **known: Any) -> CheckLine:
    lines = verify_folder(folder, Knowledge(device=device, **known))
    return next(each for each in lines if each.name == "receipts")


def authority_of(hearts: Path) -> str:
    policy = (hearts / "clients" / "boston" / "policy.toml").read_text()
    return policy.partition('authority = "')[2].partition('"')[0]


def test_every_present_device_signs_the_results_of_the_run(world: World, tmp_path: Path) -> None:
    assert line(world.run("masked")).finding.startswith("5 of 5 members have signed the run's files")
    bundle(world.run("masked"), tmp_path / "bundle", [])
    found = line(tmp_path / "bundle", world.hearts / "clients" / "boston" / "state", receipts=5)
    assert found.ok and f"the ledgers of node {world.device('boston').identity.node} match" in found.finding
    authority = authority_of(world.hearts)
    for folder in (world.run("masked"), tmp_path / "bundle"):
        found = {each.name: each for each in verify_folder(folder, Knowledge(keys=(authority,), receipts=5))}
        assert found["receipts"].ok and "compare" not in found["receipts"].finding
        assert "members have signed the run's files, by roster version 1" in found["receipts"].finding
        assert all(each.ok is not False for each in found.values())
        found = {each.name: each for each in verify_folder(folder, Knowledge(keys=("0" * 64,)))}
        assert found["signatures"].ok is False and "compare" in found["receipts"].finding


def test_receipts_of_a_roster_that_nobody_named_bind_nothing(world: World) -> None:
    """An older roster may have had members of whom all collude."""
    found = line(world.run("masked"), keys=(authority_of(world.hearts),))
    assert found.ok is None and "give --roster, or --receipts" in found.finding


def test_one_receipt_never_binds_a_run(world: World) -> None:
    """The first roster of a federation may have one member."""
    roster = verify_roster(read_receipts(world.run("masked")))
    assert [fewest_receipts(replace(roster, members=roster.members[:n]), 0) for n in (1, 2, 5)] == [2, 2, 2]
    assert fewest_receipts(roster, 3) == 4


def test_with_a_trusted_server_receipts_stay_with_the_operator(world: World, tmp_path: Path) -> None:
    run = world.run("central")
    assert (run / "receipts.json").stat().st_mode & 0o777 == 0o600
    assert line(run).finding.startswith("4 of 5 members")  # who was connected, not who was drawn
    assert line(run, receipts=4).ok
    bundle(run, tmp_path / "bundle", [])
    assert not (tmp_path / "bundle" / "receipts.json").exists() and line(tmp_path / "bundle").ok is None
    bundle(run, tmp_path / "with", [], with_audit_rows=True)
    assert line(tmp_path / "with", receipts=4).ok


def test_repeated_name_gets_no_receipts_and_its_server_says_so(world: World, tmp_path: Path) -> None:
    hearts = Path(shutil.copytree(world.hearts, tmp_path / "hearts"))
    run = hearts / "server" / "runs" / "central"
    shutil.rmtree(run)
    grid = SERVED["Devices"](hearts / "clients")
    asked = [*ASKED, "privacy=client_central", "run=central", "privacy.target_epsilon=24", "cohort=all"]
    assert serve(hearts / "server", asked, reach=SERVED["reaching"](grid, 4)) == 0
    said = (hearts / "server" / LOG).read_text()
    assert "4 of 4 devices gave no receipt: they are away, or signed a run of this name before" in said
    assert not (run / "receipts.json").exists()


def test_a_receipt_tells_nothing_of_a_ledger(world: World, tmp_path: Path) -> None:
    boston = world.device("boston")
    state = Path(shutil.copytree(boston.state, tmp_path / "state"))
    told = [RunDescription("hearts", run, digit * 64) for run, digit in (("a", "a"), ("b", "b"))]
    one, other = (give_receipt(state, each, boston.identity.node, boston.identity.key) for each in told)
    assert (
        one.commitment != other.commitment
    )  # of the same heads: a run in which nobody was drawn shows nothing
    openings = [read_opening(state / "receipts" / f"{each.manifest}.json") for each in told]
    assert openings[0].heads == openings[1].heads and openings[0].salt != openings[1].salt
    for name, head in openings[0].heads.items():
        assert read_entries(state / "ledgers" / name)[-1].head == head
    again = give_receipt(state, told[0], boston.identity.node, boston.identity.key)
    assert again == one  # asked twice, and the server may hold either


def test_nothing_else_leaves_with_a_receipt(world: World) -> None:
    message = message_to(2, OVER)
    over = read_over(message)
    assert over is not None and (over.manifest, over.listed) == (MANIFEST, LISTED)
    reply = reply_with(receipt_for(world.device("boston"), over), message)
    (fields,) = records_of(reply.content, ConfigRecord).values()
    assert {name: len(value) for name, value in fields.items()} == {"commitment": 32, "signature": 64}


def test_a_device_that_has_no_ledger_gives_a_receipt_like_any_other(tmp_path: Path) -> None:
    tmp_path.joinpath("state").mkdir()
    key = Ed25519PrivateKey.generate()
    told = RunDescription("hearts", "spring", MANIFEST)
    receipt = give_receipt(tmp_path / "state", told, 4, key)
    assert len(receipt.commitment) == 32 and holds(receipt, told, key.public_key().public_bytes_raw())
    assert not holds(
        receipt, RunDescription("hearts", "spring", "0" * 64), key.public_key().public_bytes_raw()
    )
    assert not holds(receipt, told, Ed25519PrivateKey.generate().public_key().public_bytes_raw())


def with_manifest(**changed: Any) -> RunOver:
    found = {**json.loads(LISTED), **changed}
    listed = Manifest(found["run"], found["status"], found["files"]).text
    return replace(OVER, listed=listed, manifest=sha256(listed.encode()))


@pytest.mark.parametrize(
    ("over", "says"),
    [
        (
            replace(OVER, listed=""),
            "not in the server's last message",
        ),  # of an earlier release, or so it says
        (replace(OVER, listed=LISTED + " "), "has another hash"),
        (replace(OVER, status="exhausted"), "lists status completed"),
        (replace(OVER, model={"w": np.arange(1.0, 4.0)}), "lists model"),
        (replace(OVER, model={}), "lists model"),
        (with_manifest(run="autumn@5f"), "lists run autumn"),
        (with_manifest(files={}), "lists model None"),
        (replace(OVER, listed="[]", manifest=sha256(b"[]")), "cannot be read"),
    ],
    ids=["no manifest", "hash", "status", "model", "no model", "run", "no file of a model", "no object"],
)
def test_device_signs_nothing_against_its_own_messages(
    world: World, over: RunOver, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert receipt_for(world.device("cleveland"), over) is None
    assert says in caplog.text


def test_device_signs_an_alarmed_runs_manifest_without_its_model(world: World) -> None:
    over = replace(
        with_manifest(run="alarmed@1", status="alarmed"), run="alarmed", status="alarmed", model={}
    )
    assert receipt_for(world.device("cleveland"), over) is not None


def test_a_device_gives_one_receipt_a_run(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cleveland = world.device("cleveland")
    bundle = replace(cleveland, folder=Path(shutil.copytree(cleveland.folder, tmp_path / "cleveland")))
    first = receipt_for(bundle, OVER)
    assert first is not None and receipt_for(bundle, OVER) == first
    other = with_manifest(run="spring@60")
    assert receipt_for(bundle, other) is None
    assert "a device gives one receipt a run" in caplog.text
    # Neither a flood of other runs nor an earlier release's folder makes it forget.
    (bundle.state / "receipts" / f"{MANIFEST}.json").unlink()
    assert receipt_for(bundle, other) is None
    assert receipt_for(bundle, OVER) is not None
    (bundle.state / "receipts" / "signed").unlink()
    autumn = replace(with_manifest(run="autumn@1"), run="autumn")
    assert receipt_for(bundle, autumn) is not None and receipt_for(bundle, other) is None


def test_openings_do_not_fill_a_disk(tmp_path: Path) -> None:
    folder = tmp_path / "receipts"
    folder.mkdir()
    for number in range(MAX_OPENINGS + 3):
        (folder / f"{number}.json").touch()
    (folder / "signed").touch()
    give_receipt(tmp_path, RunDescription("hearts", "spring", MANIFEST), 4, Ed25519PrivateKey.generate())
    assert len(list(folder.glob("*.json"))) == MAX_OPENINGS and (folder / f"{MANIFEST}.json").exists()


def test_no_receipt_of_a_run_that_was_not_closed_and_none_from_a_bomb(world: World) -> None:
    assert receipt_for(world.device("boston"), replace(OVER, manifest="", listed="")) is None
    for wrong in ("../../etc/passwd", "5F" * 32, "5f" * 31):
        assert read_over(message_to(2, replace(OVER, manifest=wrong))) is None
    assert read_over(message_to(2, replace(OVER, listed="0" * (MAX_MANIFEST + 1)))) is None
    reply = reply_with(None, message_to(2, OVER))
    assert read_receipt(reply) is None
    for fields in ({"commitment": b"1" * 31, "signature": b"2" * 64}, {"commitment": "1", "signature": 2}):
        reply.content["receipt"] = ConfigRecord(fields)
        assert read_receipt(reply) is None


def test_a_ledger_that_was_changed_since_is_named(world: World, tmp_path: Path) -> None:
    state = Path(shutil.copytree(world.device("boston").state, tmp_path / "state"))
    (path,) = (state / "ledgers").glob("client-*.ledger")
    owner = json.loads(read_entries(path)[0].payload)["owner"]
    path.unlink()
    with Ledger.open(path, Budget(Unit.CLIENT, 20.0, 1e-5), owner=owner, simulated=False):
        pass
    found = line(world.run("masked"), state)
    assert found.ok is False and "whose hash node" in found.finding
    (tmp_path / "other" / "receipts").mkdir(parents=True)
    assert line(world.run("masked"), tmp_path / "other").ok is False


def drop_signature(whole: dict) -> None:
    whole["receipts"][0]["signature"] = whole["receipts"][1]["signature"]


def repeat(whole: dict) -> None:
    whole["receipts"].append(whole["receipts"][-1])


def drop_all(whole: dict) -> None:
    whole["receipts"] = []


def other_run(whole: dict) -> None:
    whole["manifest"] = "0" * 64


def other_name(whole: dict) -> None:
    whole["run"] = "other"


def other_authority(whole: dict) -> None:
    whole["authority"] = "00" * 32


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (drop_signature, "did not sign this receipt"),
        (repeat, "must be one for each node"),
        (drop_all, "at least one"),
        (other_run, "belong to another run"),
        (other_name, "did not sign this receipt"),
        (other_authority, "is not signed by the authority"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_receipts_that_do_not_hold_are_named(
    world: World, tmp_path: Path, edit: Callable[[dict], None], says: str
) -> None:
    run = Path(shutil.copytree(world.run("masked"), tmp_path / "run"))
    whole = json.loads((run / "receipts.json").read_text())
    edit(whole)
    (run / "receipts.json").write_text(canonical(whole))
    found = line(run)
    assert found.ok is False and says in found.finding


def test_a_roster_that_was_not_in_force_is_named(world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world.run("masked"), tmp_path / "run"))
    result = json.loads((run / "result.json").read_text())
    result["rosters"][0]["hash"] = "0" * 64
    (run / "result.json").write_text(json.dumps(result))
    assert "was not in force" in line(run).finding


def test_a_commitment_binds_its_heads(world: World) -> None:
    path = next((world.device("boston").state / "receipts").glob("*.json"))
    opening = read_opening(path)
    name, head = next(iter(opening.heads.items()))
    moved = type(opening)(opening.salt, {**opening.heads, name: head._replace(seq=head.seq + 1)})
    assert commitment_of(moved) != commitment_of(opening)
