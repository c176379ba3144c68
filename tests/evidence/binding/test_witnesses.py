"""Witnesses and time stamps of a run: what outside of a server shows that its files were there, checked offline."""

import json
import os
import runpy
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from shared.bundles import line

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.deployment.serve import serve
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.verify import CheckLine
from fedveil.evidence.binding.witnesses import note_witnesses
from fedveil.links.server_log import LOG, manifest_entry, read_entries
from fedveil.messages.training_order import display_name
from fedveil.privacy.merkle import leaf_hash, root_of
from fedveil.privacy.witness import HeadCosignature, cosign_head
from fedveil.run.files import MANIFEST, TIME_STAMP, WITNESSES
from fedveil.run.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

SERVED = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "served.py"))
KEYS = {name: Ed25519PrivateKey.generate() for name in ("north", "south")}
PUBLIC = {name: key.public_key().public_bytes_raw().hex() for name, key in KEYS.items()}


def entry_of(folder: Path) -> bytes:
    manifest = read_manifest(folder)
    return leaf_hash(manifest_entry(display_name(manifest.run), manifest.hash))


def log_with(*middle: bytes) -> list[bytes]:
    return [leaf_hash(b"a"), leaf_hash(b"b"), *middle, leaf_hash(b"c")]


def cosigned(leaves: list[bytes], *names: str, federation: str = "made") -> tuple[HeadCosignature, ...]:
    root = root_of(leaves).hex()
    return tuple(cosign_head(federation, len(leaves), root, 1_900_000_000, KEYS[name]) for name in names)


def witnesses(folder: Path, *names: str) -> CheckLine:
    found = line(folder, "witnesses", Knowledge(witnesses=[PUBLIC[name] for name in names]))
    assert found is not None
    return found


# --- witnesses ------------------------------------------------------------------------------------------------------


def test_run_counts_its_witnesses_and_a_verifier_can_require_them(kept: Path) -> None:
    assert line(kept, "witnesses", Knowledge()) is None
    assert witnesses(kept, "north").ok is False
    leaves = log_with(entry_of(kept))
    assert note_witnesses(kept.parent, leaves, cosigned(leaves, "north")) == ["kept"]
    found = line(kept, "witnesses", Knowledge())
    assert found is not None and found.ok and "is co-signed by 1:" in found.finding
    assert f"{PUBLIC['north'][:16]} at 2030-03-17T17:46:40+00:00; compare the keys" in found.finding
    assert witnesses(kept, "north").ok and "compare" not in witnesses(kept, "north").finding
    missing = witnesses(kept, "north", "south")
    assert missing.ok is False and PUBLIC["south"][:16] in missing.finding
    # A later head of one that has signed changes nothing; a head before the manifest shows nothing.
    later = [*leaves, leaf_hash(b"d")]
    assert note_witnesses(kept.parent, later, cosigned(later, "north")) == []
    assert note_witnesses(kept.parent, later, cosigned(leaves[:2], "south")) == []
    assert note_witnesses(kept.parent, later, cosigned(later, "south")) == ["kept"]
    assert "is co-signed by 2:" in witnesses(kept, "north", "south").finding
    command = ["verify", str(kept), "--witness", PUBLIC["north"]]
    assert run(command) == 0 and run([*command, "--witness", "0" * 64]) == 2
    assert run(["verify", str(kept / "ledger"), "--witness", PUBLIC["north"]]) == 2


def of_another_run(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    leaf = leaf_hash(manifest_entry("another", read_manifest(folder).hash))
    assert manifest["run"] != "another"
    forge(folder, log_with(leaf), 2)


def of_no_log_with_it(folder: Path) -> None:
    forge(folder, log_with(leaf_hash(b"x")), 2)


def of_a_cut_log(folder: Path) -> None:
    """A head before the manifest, shown as that of the log with it."""
    leaves = log_with(entry_of(folder))
    fields = noted(folder, leaves)
    fields["witnesses"][0]["cosignature"] = asdict(cosigned(leaves[:2], "north")[0])
    (folder / WITNESSES).write_text(json.dumps(fields))


def of_a_changed_time(folder: Path) -> None:
    fields = noted(folder, log_with(entry_of(folder)))
    fields["witnesses"][0]["cosignature"]["at"] += 1
    (folder / WITNESSES).write_text(json.dumps(fields))


def with_another_key(folder: Path) -> None:
    fields = noted(folder, log_with(entry_of(folder)))
    fields["witnesses"][0]["cosignature"]["public"] = PUBLIC["south"]
    (folder / WITNESSES).write_text(json.dumps(fields))


def with_no_digits(folder: Path) -> None:
    fields = noted(folder, log_with(entry_of(folder)))
    fields["witnesses"][0]["inclusion"][0] = "x"
    (folder / WITNESSES).write_text(json.dumps(fields))


def cut_short(folder: Path) -> None:
    noted(folder, log_with(entry_of(folder)))
    (folder / WITNESSES).write_bytes((folder / WITNESSES).read_bytes()[:-9])


def noted(folder: Path, leaves: list[bytes]) -> dict[str, object]:
    note_witnesses(folder.parent, leaves, cosigned(leaves, "north"))
    return json.loads((folder / WITNESSES).read_text())


def forge(folder: Path, leaves: list[bytes], place: int) -> None:
    """Write a proof of another entry as that of the manifest's."""
    fields = noted(folder, log_with(entry_of(folder)))
    fields["witnesses"][0]["cosignature"] = asdict(cosigned(leaves, "north")[0])
    fields["place"] = place
    (folder / WITNESSES).write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "change",
    [
        of_another_run,
        of_no_log_with_it,
        of_a_cut_log,
        of_a_changed_time,
        with_another_key,
        with_no_digits,
        cut_short,
    ],
)
def test_no_other_co_signature_passes_for_one_of_this_run(kept: Path, change: Callable[[Path], None]) -> None:
    change(kept)
    assert witnesses(kept).ok is False


def test_repeated_key_counts_once(kept: Path) -> None:
    fields = noted(kept, log_with(entry_of(kept)))
    fields["witnesses"] = [*fields["witnesses"], *fields["witnesses"]]
    (kept / WITNESSES).write_text(json.dumps(fields))
    assert "is co-signed by 1:" in witnesses(kept).finding


# --- time stamps ----------------------------------------------------------------------------------------------------


def test_server_notes_its_witnesses_and_loses_no_run_without_a_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rfc3161_client")
    monkeypatch.setattr("fedveil.links.cosigned_heads.WITNESS_SECONDS", 3600.0)  # on a slow machine
    hearts = SERVED["make_federation"](tmp_path)
    (tmp_path / "north.key").write_bytes(KEYS["north"].private_bytes_raw())
    program = (
        "import json, sys;from fedveil.privacy.witness import cosign_head;"
        "from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey as Key;"
        "head = json.load(sys.stdin)['head'];key = Key.from_private_bytes(open(sys.argv[1], 'rb').read());"
        "print(cosign_head(head['federation'], head['size'], head['root'], 9, key).to_json())"
    )
    command = shlex.join([sys.executable, "-c", program, str(tmp_path / "north.key")])
    monkeypatch.setenv("FEDVEIL_WITNESSES", command)
    monkeypatch.setenv("FEDVEIL_TSA", "http://127.0.0.1:1")
    reach = SERVED["reaching"](SERVED["Devices"](hearts / "clients"))
    asked = ("task=digits", "num_rounds=1", "batch_size=40", "privacy=record", "link.wait=0.3")
    assert serve(hearts / "server", asked, reach=reach) == 0
    folder = hearts / "server" / "runs" / "run-1"
    assert "no time stamp was had" in capsys.readouterr().err and not (folder / TIME_STAMP).exists()
    assert leaf_hash(read_entries(hearts / "server" / LOG)[-1]) == entry_of(folder)
    assert witnesses(folder, "north").ok
    assert os.stat(folder / WITNESSES).st_mode & 0o777 == 0o644
    monkeypatch.setenv("FEDVEIL_WITNESSES", "false")
    with pytest.raises(Refusal, match="exit code 1"):
        serve(hearts / "server", (*asked, "run=second"), reach=reach)
