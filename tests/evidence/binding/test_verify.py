"""Tampering with a finished run: no edit of its files and no forgery passes with the authority's key.

The forger has every file and the keys of members, of one that was revoked, and of its own. It lacks the authority's key,
and one member's.
"""

import json
import random
import runpy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from shared.runs import json_lines

from fedveil.cli.report import bundle, report
from fedveil.cli.verify import UNBOUND, WRONG, verify
from fedveil.deployment.device.client_bundle import read_client_bundle
from fedveil.deployment.provision import revoke
from fedveil.deployment.serve import serve
from fedveil.evidence.binding.receipts import Receipts, read_receipts
from fedveil.privacy.ledger.receipt import UNCOMPARED, Receipt
from fedveil.privacy.secagg.roster import Roster, read_roster, write_roster
from fedveil.run.files import PAGE, RECEIPTS
from fedveil.run.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

FAULTS = Path(__file__).parents[2] / "faults"
SERVED, FORGER = (runpy.run_path(str(FAULTS / name)) for name in ("served.py", "forged_runs.py"))
forged, signed_by, write = FORGER["forged"], FORGER["signed_by"], FORGER["write"]
ASKED = ("task=digits", "num_rounds=1", "batch_size=40", "privacy.allow_large_delta=true", "link.wait=0.3")
MASKED = ("privacy=client_distributed", "accept_vacuous=true", "privacy.target_epsilon=8")
REVOKED = "switzerland"
EDITS, BEGUN = 500, 6


@dataclass(frozen=True)
class World:
    """Runs `masked`, of five members, and `records`, after one was revoked; with keys by node of the members of each."""

    masked: Path
    records: Path
    keys: dict[int, Ed25519PrivateKey]
    revoked: int
    authority: str

    @property
    def left(self) -> dict[int, Ed25519PrivateKey]:
        return {node: key for node, key in self.keys.items() if node != self.revoked}

    @property
    def colluding(self) -> dict[int, Ed25519PrivateKey]:
        return dict(list(self.left.items())[1:])

    @property
    def before(self) -> Receipts:
        return read_receipts(self.masked)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    hearts = SERVED["make_federation"](tmp_path_factory.mktemp("desk"))
    bundles = {each.name: read_client_bundle(each) for each in sorted((hearts / "clients").iterdir())}
    keys = {each.identity.node: each.identity.key for each in bundles.values()}
    reach = SERVED["reaching"](SERVED["Devices"](hearts / "clients"))
    assert serve(hearts / "server", [*ASKED, *MASKED, "run=masked"], reach=reach) == 0
    revoke(hearts, [REVOKED])
    shutil.rmtree(hearts / "clients" / REVOKED)
    reach = SERVED["reaching"](SERVED["Devices"](hearts / "clients"), 4)
    assert serve(hearts / "server", [*ASKED, "privacy=record", "run=records"], reach=reach) == 0
    runs = hearts / "server" / "runs"
    for run in (runs / "masked", runs / "records"):
        assert report(run) == 0
    authority = read_receipts(runs / "records").authority.hex()
    revoked = bundles[REVOKED].identity.node
    return World(runs / "masked", runs / "records", keys, revoked, authority)


def passes(folder: Path, world: World, **known: Any) -> bool:
    return verify(folder, [world.authority], **known) == 0


def roster_of(run: Path) -> str:
    receipts = read_receipts(run)
    return read_roster(receipts.roster, receipts.authority).hash.hex()


def test_the_true_runs_pass_and_so_does_a_forgery_by_all(world: World, tmp_path: Path) -> None:
    for run, members in ((world.masked, 5), (world.records, 4)):
        for known in ({"roster": roster_of(run)}, {"receipts": members}):
            assert passes(run, world, **known)
    forged(world.records, tmp_path / "all", world.left)
    assert passes(tmp_path / "all", world, roster=roster_of(world.records))
    assert passes(forged(world.masked, tmp_path / "masked", world.keys), world)
    two = dict(list(world.left.items())[:2])
    assert passes(forged(world.records, tmp_path / "two", two), world, receipts=2)  # the verifier has said so


def by(*names: str) -> Callable[[World, Path], Path]:
    """Return the forgery of a run with the keys that the names stand for."""

    def forge(world: World, out: Path) -> Path:
        one = dict([*world.left.items()][:1])
        gone = {world.revoked: world.keys[world.revoked]}
        known = {"one": one, "revoked": gone, "colluding": world.colluding}
        keys = {node: key for name in names[1:] for node, key in known[name].items()}
        return forged(getattr(world, names[0]), out, keys)

    return forge


def changed(world: World, out: Path, change: Callable[[Receipts], Receipts]) -> Path:
    """Return a forgery with the keys of all but one, and with other receipts."""
    forged(world.records, out, world.colluding)
    write(out, change(read_receipts(out)))
    return out


def of_the_old_roster(world: World, out: Path) -> Path:
    def back(found: Receipts) -> Receipts:
        keys = {**world.colluding, world.revoked: world.keys[world.revoked]}
        return replace(found, roster=world.before.roster, signed=signed_by(keys, found.description))

    return changed(world, out, back)


def of_the_old_roster_by_all(world: World, out: Path) -> Path:
    """All five of the old roster, in a run that was drawn from the new one."""

    def back(found: Receipts) -> Receipts:
        return replace(found, roster=world.before.roster, signed=signed_by(world.keys, found.description))

    return changed(world, out, back)


def under_all_names(world: World, out: Path) -> Path:
    def all_by_one(found: Receipts) -> Receipts:
        key = next(iter(world.colluding.values()))
        return replace(found, signed=signed_by(dict.fromkeys(world.left, key), found.description))

    return changed(world, out, all_by_one)


def of_an_earlier_release(world: World, out: Path) -> Path:
    def all_before(found: Receipts) -> Receipts:
        return replace(found, signed=signed_by(world.left, found.description, UNCOMPARED))

    return changed(world, out, all_before)


def with_the_true_receipt_of_the_last(world: World, out: Path) -> Path:
    def mixed(found: Receipts) -> Receipts:
        true = [each for each in read_receipts(world.records).signed if each.node not in world.colluding]
        return replace(found, signed=sorted([*found.signed, *true], key=lambda each: each.node))

    return changed(world, out, mixed)


def with_the_true_receipts(world: World, out: Path) -> Path:
    return changed(world, out, lambda found: read_receipts(world.records))


def with_true_signatures(world: World, out: Path) -> Path:
    return changed(world, out, lambda found: replace(found, signed=read_receipts(world.records).signed))


def with_receipts_of_another_run(world: World, out: Path) -> Path:
    return changed(world, out, lambda found: world.before)


def with_one_receipt_twice(world: World, out: Path) -> Path:
    return changed(world, out, lambda found: replace(found, signed=[*found.signed, found.signed[-1]]))


def with_an_empty_receipt(world: World, out: Path) -> Path:
    def add(found: Receipts) -> Receipts:
        missing = next(node for node in world.left if node not in world.colluding)
        signed = [*found.signed, Receipt(missing, bytes(32), bytes(64))]
        return replace(found, signed=sorted(signed, key=lambda each: each.node))

    return changed(world, out, add)


def own_members(world: World, found: Receipts, authority: Ed25519PrivateKey) -> Receipts:
    """Return receipts of a roster with the same names and the forger's keys."""
    roster, own = read_roster(found.roster, found.authority), Ed25519PrivateKey.generate
    keys = {node: own() for node in world.left}
    members = tuple(
        replace(each, public=keys[each.node].public_key().public_bytes_raw()) for each in roster.members
    )
    signed = write_roster(Roster(roster.version, members, roster.earlier), authority)
    return replace(found, roster=signed, signed=signed_by(keys, found.description))


def of_own_members(world: World, out: Path) -> Path:
    own = Ed25519PrivateKey.generate()
    return changed(world, out, lambda found: own_members(world, found, own))


def of_an_own_authority(world: World, out: Path) -> Path:
    own = Ed25519PrivateKey.generate()
    public = own.public_key().public_bytes_raw()
    return changed(world, out, lambda found: replace(own_members(world, found, own), authority=public))


def two_manifests(world: World, out: Path) -> Path:
    """The forged result beside the true manifest and its true receipts."""
    forged(world.records, out, world.colluding)
    for name in ("manifest.json", RECEIPTS):
        shutil.copy(world.records / name, out / name)
    return out


def without_receipts(world: World, out: Path) -> Path:
    forged(world.records, out, world.colluding).joinpath(RECEIPTS).unlink()
    return out


def ended_long_ago(world: World, out: Path) -> Path:
    """All members' keys had ended by the time that the files state."""

    def later(result: dict[str, Any]) -> None:
        FORGER["better"](result)
        result["rosters"][-1]["at"] = "2199-01-01T00:00:00+00:00"

    return forged(world.records, out, world.left, later)


def few_answered(world: World, out: Path) -> Path:
    """The result and the rounds state that two took part in the last round."""
    shutil.copytree(world.records, out.with_name("few"))
    path = out.with_name("few") / "metrics.jsonl"
    rows = json_lines(path)
    path.write_text("".join(json.dumps({**row, "invited": 2, "replies": 2}) + "\n" for row in rows))
    return forged(path.parent, out, dict(list(world.colluding.items())[:2]))


def bundled(world: World, out: Path) -> Path:
    run = forged(world.records, out.with_name("forged run"), world.colluding)
    bundle(run, out, [])
    return out


FORGERIES = {
    "one member": by("records", "one"),
    "one member and a rewritten ledger": by("masked", "one"),
    "all but one": by("records", "colluding"),
    "all but one and a rewritten ledger": by("masked", "colluding", "revoked"),
    "a revoked member": by("records", "revoked"),
    "a revoked member and one": by("records", "revoked", "one"),
    "all but one, by the old roster": of_the_old_roster,
    "all of the old roster": of_the_old_roster_by_all,
    "one key under all names": under_all_names,
    "receipts as of an earlier release": of_an_earlier_release,
    "the last one's true receipt": with_the_true_receipt_of_the_last,
    "the true receipts": with_the_true_receipts,
    "the true signatures": with_true_signatures,
    "receipts of another run": with_receipts_of_another_run,
    "one receipt twice": with_one_receipt_twice,
    "an empty receipt": with_an_empty_receipt,
    "members of its own": of_own_members,
    "an authority of its own": of_an_own_authority,
    "two manifests": two_manifests,
    "no receipts": without_receipts,
    "a time when all keys had ended": ended_long_ago,
    "a last round of two": few_answered,
    "a bundle": bundled,
}


@pytest.mark.parametrize("name", FORGERIES)
def test_no_forgery_passes(world: World, tmp_path: Path, name: str) -> None:
    folder = FORGERIES[name](world, tmp_path / "forged")
    run, members = (world.masked, 5) if "rewritten ledger" in name else (world.records, 4)
    assert not passes(folder, world) and not passes(folder, world, roster=roster_of(run))
    for fewest in (0, 1, members):  # the first two may all collude
        assert not passes(folder, world, receipts=fewest)


def test_a_forgery_by_one_member_is_bound_by_nothing(world: World, tmp_path: Path) -> None:
    assert verify(by("records", "one")(world, tmp_path / "forged"), []) == UNBOUND


def test_a_roster_from_elsewhere_is_the_one_of_the_receipts(world: World, tmp_path: Path) -> None:
    roster, old = roster_of(world.records), roster_of(world.masked)
    assert passes(world.records, world, roster=roster) and not passes(world.records, world, roster=old)
    assert verify(world.records, [], roster=roster) == 0

    # All of the old roster collude, and the result states that it was in force: only who knows the roster can tell.
    def older(result: dict[str, Any]) -> None:
        result["rosters"] = json.loads((world.masked / "result.json").read_bytes())["rosters"]

    run = forged(world.records, tmp_path / "old", world.keys, older)
    found = read_receipts(run)
    write(run, replace(found, roster=world.before.roster))
    assert verify(run, [world.authority]) == UNBOUND and not passes(run, world, roster=roster)


# --- edits --------------------------------------------------------------------------------------------------------


def flip(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def cut(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + data[at + draw.randint(1, len(data) - at) :]


def add(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.choice((b"0", b" ", b"<b>epsilon 0.01</b>", b"<script>1</script>")) + data[at:]


def other_number(data: bytes, draw: random.Random) -> bytes:
    places = [at for at, byte in enumerate(data) if chr(byte).isdigit()]
    at = draw.choice(places)
    return data[:at] + bytes([48 + (data[at] - 48 + draw.randint(1, 9)) % 10]) + data[at + 1 :]


def edited(run: Path, other: Path, out: Path, draw: random.Random) -> str:
    """Make a copy of a run with one edit of what binds it or is bound; return what was done."""
    shutil.copytree(run, out)
    name = draw.choice([*read_manifest(run).files, "manifest.json", RECEIPTS, PAGE])
    kind = draw.choice(("flip", "cut", "add", "number", "gone", "other"))
    if kind == "gone":
        (out / name).unlink()
    elif (
        kind == "other"
        and (other / name).exists()
        and (other / name).read_bytes() != (run / name).read_bytes()
    ):
        shutil.copy(other / name, out / name)
    else:
        data = (out / name).read_bytes()
        change = {"cut": cut, "add": add, "number": other_number}.get(kind, flip)
        (out / name).write_bytes(change(data, draw))
    return f"{name}: {kind}"


def edits(world: World, folder: Path, number: int) -> list[str]:
    """Return the edits that pass."""
    draw, through = random.Random(29), list[str]()
    for each in range(number):
        run, other = (world.records, world.masked)[:: 1 if each % 8 else -1]
        done = edited(run, other, folder / "edited", draw)
        if passes(folder / "edited", world, roster=roster_of(run)):
            through.append(f"{each} {done}")
        shutil.rmtree(folder / "edited")
    return through


def test_edits_of_a_run_begin(world: World, tmp_path: Path) -> None:
    assert edits(world, tmp_path, BEGUN) == []


@pytest.mark.campaign
def test_no_edit_of_a_run_passes(world: World, tmp_path: Path) -> None:
    assert edits(world, tmp_path, EDITS) == []


# --- the page -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        "<script>document.title = 1</script>",
        '<div style="position:fixed;inset:0;background:white">epsilon 0.01, approved</div>',
        '<p onclick="alert(1)">approved</p>',
        "<style>.stamp { display: none }</style>",
        "<!-- epsilon 0.01 -->",
    ],
)
def test_a_page_holds_nothing_that_its_report_does_not_make(
    world: World, tmp_path: Path, more: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(world.records, tmp_path / "run"))
    page = (run / PAGE).read_text()
    (run / PAGE).write_text(page.replace("</body>", f"{more}</body>"))
    assert verify(run, []) == WRONG and "failed: page" in capsys.readouterr().out


def test_without_jinja_a_page_counts_by_its_hash_and_a_script_never(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedveil.evidence.binding import page as page_module

    monkeypatch.setattr(page_module, "page_again", lambda _: None)
    run = Path(shutil.copytree(world.records, tmp_path / "run"))
    assert verify(run, [], receipts=4) == 0 and "could not be made: " in capsys.readouterr().out
    (run / PAGE).write_text((run / PAGE).read_text().replace("</body>", "<script>1</script></body>"))
    assert verify(run, []) == WRONG
