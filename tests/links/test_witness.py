"""Witnesses of a server's log: each co-signs what extends its last head, and owners and verifiers count them."""

import json
import logging
import runpy
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.deployment import serve as serving
from fedveil.deployment.device.client_bundle import read_client_bundle
from fedveil.deployment.device.log_copy import BRANCHES, LogCopy
from fedveil.evidence.binding.signatures import make_key
from fedveil.links.cosigned_heads import FILE, CosignedHeads, read_cosigned
from fedveil.links.log_export import LogExport, to_text
from fedveil.links.log_wire import LogStatement, log_of, log_record
from fedveil.links.logged_grid import LoggedGrid
from fedveil.links.server_bundle import read_server_bundle
from fedveil.links.server_log import LOG, ServerLog, contradicting_entries, manifest_entry, read_entries
from fedveil.links.tree_head import TreeHead, sign_head
from fedveil.privacy.merkle import leaf_hash, root_of
from fedveil.privacy.witness import HeadCosignature, cosign_head
from fedveil.run.callbacks import RunEnd
from fedveil.run.manifest import read_manifest

MADE: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "devices.py"))
Devices, device_of, in_the_clear = MADE["Devices"], MADE["device_of"], MADE["in_the_clear"]
KEPT = Path(__file__).parents[1] / "fixtures" / "signed_run" / "run"
KEYS = {name: Ed25519PrivateKey.generate() for name in ("north", "south")}
PUBLIC = {name: key.public_key().public_bytes_raw().hex() for name, key in KEYS.items()}
Cosign = Callable[[TreeHead], tuple[HeadCosignature, ...]]


def cosign(head: TreeHead, *names: str) -> tuple[HeadCosignature, ...]:
    return tuple(cosign_head(head.federation, head.size, head.root, 9, KEYS[name]) for name in names)


def client(made: Path, at_least: int = 1, *names: str) -> Any:
    witnesses = {name: PUBLIC[name] for name in names or KEYS}
    return device_of(made / "clients" / "c0", witnesses=witnesses, witnessed_by_at_least=at_least)


def logged(made: Path, grid: Any, cosigned: Cosign, name: str = LOG) -> LoggedGrid:
    server = read_server_bundle(made / "server")
    rosters = (server.roster, server.signed_roster)
    log = ServerLog(server.folder / name)
    return LoggedGrid(grid, log, server, lambda: server.credentials, lambda: rosters, cosigned)


def asked(grid: Any, number: int = 1) -> bool:
    [reply] = grid.send_and_receive([in_the_clear(number=number)])
    return not reply.has_error()


def known(made: Path) -> int:
    bundle = read_client_bundle(made / "clients" / "c0")
    return len(LogCopy(bundle.state, "made", bundle.credentials.ca).leaves)


# --- an owner who demands witnesses ---------------------------------------------------------------------------------


def test_instruction_is_followed_with_enough_co_signatures(
    made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    signers = ["north"]
    device = client(made, 2)
    grid = logged(made, devices := Devices({2: device}), lambda head: cosign(head, *signers))
    with caplog.at_level(logging.ERROR, "fedveil.client"):
        assert not asked(grid, 1)
    said = "is co-signed by north of [witnesses], and witnessed_by_at_least=2"
    assert said in caplog.text and known(made) == 0 and not (device.bundle.state / FILE).exists()
    signers.append("south")
    assert asked(grid, 2) and known(made) == 3
    assert {each["public"] for each in json.loads((device.bundle.state / FILE).read_text())} == {
        *PUBLIC.values()
    }
    told = log_of(devices.seen[-1][0].content)
    assert told is not None and len(told.cosignatures) == 2


@pytest.mark.parametrize(
    "how",
    ["a key twice", "a stranger's key", "another log's", "an older head's", "a changed time", "malformed"],
)
def test_co_signature_of_another_head_counts_for_nothing(made: Path, how: str) -> None:
    earlier: list[TreeHead] = []

    def of(head: TreeHead) -> tuple[HeadCosignature, ...]:
        earlier.append(head)
        [one] = cosign(head, "north")
        match how:
            case "a key twice":
                return one, replace(one, at=10), one
            case "a stranger's key":
                return one, cosign_head("made", head.size, head.root, 9, Ed25519PrivateKey.generate())
            case "another log's":
                return one, cosign_head("another", head.size, head.root, 9, KEYS["south"])
            case "an older head's":
                return one, *cosign(earlier[0], "south")
            case "a changed time":
                return one, replace(cosign(head, "south")[0], at=10)
            case _:
                return one, replace(one, public="x")

    device = client(made, 0)
    grid = logged(made, Devices({2: device}), of)
    assert asked(grid, 1) and known(made) == 2
    grid = logged(made, Devices({2: client(made, 2)}), of)
    assert not asked(grid, 2) and known(made) == 2


def test_log_beyond_any_witness_is_refused_where_none_is_sent(made: Path) -> None:
    assert not asked(Devices({2: client(made)}))  # require_log is off here
    assert not asked(logged(made, Devices({2: client(made)}), lambda _: ()), 2)
    assert asked(logged(made, Devices({2: client(made, 0)}), lambda _: ()), 3)


def test_a_witness_that_signs_two_branches_is_named_with_both_heads(
    made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = client(made)
    assert asked(logged(made, Devices({2: device}), lambda head: cosign(head, "north")), 1)
    other = cosign_head("made", 2, "ab" * 32, 9, KEYS["north"])
    with caplog.at_level(logging.ERROR, "fedveil.client"):
        grid = logged(made, Devices({2: device}), lambda head: (*cosign(head, "south"), other))
        assert not asked(grid, 2)
    own = json.loads((device.bundle.state / FILE).read_text())[0]
    assert (
        f"witness='north': has co-signed two branches: {other}; and 2 entries, root {own['root']}"
        in caplog.text
    )
    evidence = json.loads((device.bundle.state / BRANCHES).read_text())
    assert [HeadCosignature(**evidence[each]).holds for each in ("own", "other")] == [True, True]
    assert known(made) == 2
    south = replace(other, public=PUBLIC["south"])
    south = replace(south, signature=KEYS["south"].sign(south.signed).hex())
    with caplog.at_level(
        logging.ERROR, "fedveil.client"
    ):  # it has signed nothing of this log: the server forked
        assert not asked(logged(made, Devices({2: device}), lambda head: (*cosign(head, "north"), south)), 3)
    assert f"witness='south': has co-signed another branch: {south}; and 2 entries" in caplog.text


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ('witnessed_by_at_least = 2\n[witnesses]\na = "{north}"', "must be from 0 to 1"),
        ('[witnesses]\na = "{north}"\nb = "{north}"', "is the key of another name, too"),
        ('[witnesses]\na = "{authority}"', "is the authority's key"),
        ('[witnesses]\na = "1"', "must be 32 bytes"),
    ],
)
def test_a_policy_names_each_witness_once_and_never_the_authority(made: Path, lines: str, why: str) -> None:
    folder = made / "clients" / "c0"
    path, authority = folder / "policy.toml", read_client_bundle(folder).policy.authority
    written = path.read_text()
    assert "witness" not in written  # a device of an earlier release reads it
    key, _, section = lines.format(authority=authority, **PUBLIC).rpartition("[witnesses]")
    path.write_text(f"{key}{written}[witnesses]{section}\n")
    with pytest.raises(Refusal, match=why):
        read_client_bundle(folder)


def test_a_device_of_an_earlier_release_skips_co_signatures() -> None:
    [each] = cosign(TreeHead("made", 1, "0" * 64, 9, "", ""), "north")
    plain = LogStatement("{}", 0, (bytes(32),))
    assert {*log_record(replace(plain, cosignatures=(each.to_json(),)))} - {*log_record(plain)} == {
        "cosignatures"
    }


# --- a witness ------------------------------------------------------------------------------------------------------


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    make_key(tmp_path / "witness.key", False, None)
    return tmp_path / "witness.key"


def exported(made: Path, *entries: bytes) -> Path:
    """Write the export of a log with these entries, as its server would sign it."""
    own, leaves = read_server_bundle(made / "server").credentials, [leaf_hash(each) for each in entries]
    head = sign_head("made", len(leaves), root_of(leaves), own)
    path = made / "export.json"
    path.write_text(to_text(LogExport(head, tuple(each.hex() for each in leaves))))
    return path


def cosigns(made: Path, key: Path, log: Path) -> int:
    return run(["client", "witness", str(log), "--key", str(key), "--ca", str(made / "server" / "ca.pem")])


def test_witness_signs_extensions_of_its_head_and_refuses_a_fork(
    made: Path, witness: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cosigns(made, witness, exported(made, b"a", b"b")) == 0
    first = HeadCosignature(**json.loads(capsys.readouterr().out))
    assert first.holds and first.size == 2 and first.root == root_of([leaf_hash(b"a"), leaf_hash(b"b")]).hex()
    assert cosigns(made, witness, exported(made, b"a", b"b")) == 0
    assert HeadCosignature(**json.loads(capsys.readouterr().out)) == first
    record = witness.with_name("witness.key.heads.json")
    before = record.read_bytes()
    for entries, why in (
        ((b"a", b"x"), "its first 2 entries are others"),
        ((b"a", b"x", b"c"), "its first 2 entries are others"),
        ((b"a",), "the log was cut, or is forked"),
    ):
        assert cosigns(made, witness, exported(made, *entries)) == 1
        said = capsys.readouterr()
        root = root_of([leaf_hash(each) for each in entries]).hex()
        assert not said.out and why in said.err and "nothing is signed" in said.err
        assert first.root in said.err and root in said.err
        assert record.read_bytes() == before
    assert cosigns(made, witness, exported(made, b"a", b"b", b"c")) == 0
    assert json.loads(capsys.readouterr().out)["size"] == 3


def test_a_proof_of_consistency_is_enough_for_a_witness(
    made: Path, witness: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = logged(made, Devices({2: client(made, 0)}), lambda _: ())
    assert asked(grid, 1)

    def proof(*words: str) -> Path:
        assert run(["server", "log", str(made / "server"), *words]) == 0
        (made / "proof.json").write_text(capsys.readouterr().out)
        return made / "proof.json"

    assert cosigns(made, witness, proof("--json")) == 0
    assert asked(grid, 2)
    capsys.readouterr()
    assert cosigns(made, witness, proof("--consistency", "1")) == 2
    assert "shows nothing of the first 2 entries" in capsys.readouterr().err
    assert cosigns(made, witness, proof("--consistency", "2")) == 0
    assert json.loads(capsys.readouterr().out)["size"] == 3


def test_a_witness_signs_nothing_that_the_server_did_not(
    made: Path, witness: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported(made, b"a")
    fields = json.loads(path.read_text())
    fields["head"]["size"] = 2
    path.write_text(json.dumps(fields))
    assert cosigns(made, witness, path) == 2
    witness.with_name("witness.key.heads.json").write_text("{")
    assert cosigns(made, witness, exported(made, b"a")) == 2
    said = capsys.readouterr()
    assert not said.out and "restore its newest copy" in said.err


# --- a server and its witnesses -------------------------------------------------------------------------------------


def test_a_server_has_each_new_head_co_signed_before_it_sends_it(
    made: Path, witness: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fedveil.links.cosigned_heads.WITNESS_SECONDS", 3600.0)  # on a slow machine
    server = read_server_bundle(made / "server")
    words = ["client", "witness", "-", "--key", str(witness), "--ca", str(made / "server" / "ca.pem")]
    command = shlex.join([sys.executable, "-m", "fedveil", *words]) + ";"
    public = witness.with_name("witness.key.pub").read_text().strip()
    device = device_of(made / "clients" / "c0", witnesses={"w": public}, witnessed_by_at_least=1)
    log, rosters = ServerLog(server.folder / LOG), (server.roster, server.signed_roster)
    cosigned = CosignedHeads(server.folder, "made", log, command)
    grid = LoggedGrid(
        Devices({2: device}), log, server, lambda: server.credentials, lambda: rosters, cosigned.of
    )
    assert asked(grid, 1)
    [kept] = read_cosigned(server.folder)
    assert (kept.public, kept.size, kept.root) == (public, 2, log.root.hex())
    # Another branch: the witness refuses it, and so does the server before its run.
    (server.folder / "other.jsonl").write_bytes(b'{"kind":"x"}\n' + b'{"kind":"y"}\n')
    other = ServerLog(server.folder / "other.jsonl")
    forked = sign_head("made", 2, other.root, server.credentials)
    with pytest.raises(Refusal, match=f"exit code 1: REFUSED: the log is forked.*{other.root.hex()}"):
        CosignedHeads(server.folder, "made", other, command).require(forked)


@pytest.mark.parametrize(
    ("command", "why"), [("/none", "cannot be run"), ("false", "exit code 1: silent"), ("true", "not one of")]
)
def test_failing_witness_is_named_and_costs_only_its_co_signature(
    made: Path, caplog: pytest.LogCaptureFixture, command: str, why: str
) -> None:
    server = read_server_bundle(made / "server")
    (server.folder / LOG).write_bytes(b'{"kind":"x"}\n')
    log = ServerLog(server.folder / LOG)
    head = sign_head("made", 1, log.root, server.credentials)
    (server.folder / "good.json").write_text(cosign(head, "north")[0].to_json())
    both = CosignedHeads(server.folder, "made", log, f"{command}; cat {server.folder / 'good.json'}")
    with caplog.at_level(logging.ERROR, "fedveil.server"):
        assert [each.public for each in both.of(head)] == [PUBLIC["north"]]
    assert "no co-signature of 1 entries" in caplog.text and why in caplog.text
    with pytest.raises(Refusal, match=why):
        both.require(head)
    later = sign_head("made", 2, log.root, server.credentials)
    with pytest.raises(Refusal, match="co-signed another head, of 1 entries"):
        CosignedHeads(server.folder, "made", log, f"cat {server.folder / 'good.json'}").require(later)
    with pytest.raises(Refusal, match="is no list of commands"):
        CosignedHeads(server.folder, "made", log, "'")


def test_an_operator_takes_co_signatures_of_its_own_log_alone(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(logged(made, Devices({2: client(made, 0)}), lambda _: ()), 1)
    leaves = [leaf_hash(each) for each in read_entries(made / "server" / LOG)]
    root, file = root_of(leaves).hex(), made / "cosignature.json"

    def take(each: HeadCosignature) -> str:
        file.write_text(each.to_json())
        code = run(["server", "log", str(made / "server"), "--cosigned", str(file)])
        said = capsys.readouterr()
        assert (code == 0) == (not said.err)
        return said.out + said.err

    good = cosign_head("made", 2, root, 9, KEYS["north"])
    assert f"co-signed by {PUBLIC['north']}" in take(good)
    wrong = {
        "did not sign this": replace(good, at=10),
        "co-signed the log of 'another'": cosign_head("another", 2, root, 9, KEYS["north"]),
        "restored from an older copy, or forked": cosign_head("made", 3, root, 9, KEYS["north"]),
        f"has co-signed two branches: 2 entries, root {'ab' * 32}; and 2 entries, root {root}": cosign_head(
            "made", 2, "ab" * 32, 9, KEYS["north"]
        ),
        f"co-signed another branch: 2 entries, root {'ab' * 32}; this log has 2 entries, root {root}": (
            cosign_head("made", 2, "ab" * 32, 9, KEYS["south"])
        ),
    }
    for why, each in wrong.items():
        assert why in take(each)
    assert read_cosigned(made / "server") == (good,)
    (made / "server" / FILE).write_text("{}")
    with pytest.raises(Refusal, match="ask the witnesses again"):
        read_cosigned(made / "server")


def test_two_owners_find_a_witness_of_both_branches(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate((LOG, "other.jsonl")):
        device = device_of(made / "clients" / f"c{number}", witnesses=PUBLIC)
        grid = logged(made, Devices({2 + number: device}), lambda head: cosign(head, "north"), name)
        message = in_the_clear(number=number + 1)
        [reply] = grid.send_and_receive([Message(message.content, 2 + number, "train")])
        assert not reply.has_error()
    assert run(["client", "log", str(made / "clients" / "c1"), "--json"]) == 0
    export = capsys.readouterr().out
    (made / "other.json").write_text(export)
    assert run(["client", "log", str(made / "clients" / "c0"), "--against", str(made / "other.json")]) == 1
    roots = [
        root_of([leaf_hash(each) for each in read_entries(made / "server" / name)]).hex()
        for name in (LOG, "other.jsonl")
    ]
    assert (
        f"witness {PUBLIC['north']} has co-signed two branches: 2 entries, root {roots[0]}; and 2 entries, root {roots[1]}"
        in capsys.readouterr().out
    )
    fields = json.loads(export)
    fields["cosignatures"][0]["root"] = "ab" * 32
    (made / "other.json").write_text(json.dumps(fields))
    assert run(["client", "log", str(made / "clients" / "c0"), "--against", str(made / "other.json")]) == 2


def test_log_holds_the_manifest_of_a_run_ending_without_connections(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("apply_answer", SimpleNamespace(moments=None, task=None)), ("agreement_of", "")):
        monkeypatch.setattr(serving, name, lambda *_, value=value: value)
    grid = logged(made, Devices({}), lambda _: ())
    link: Any = SimpleNamespace(grid=grid, presence=lambda: SimpleNamespace(connected_since={}))
    nothing: Any = None
    farewell = serving.Farewell(link, nothing, read_server_bundle(made / "server"), nothing, "kept")
    rounds = {"rounds_completed": 1, "rounds_abandoned": 0}
    farewell.end(RunEnd("completed", "1 round", KEPT, rounds, {"w": np.zeros(1)}))
    kinds = [json.loads(entry)["kind"] for entry in read_entries(made / "server" / LOG)]
    assert kinds == ["roster", "final", "manifest"]
    entry = manifest_entry("kept", read_manifest(KEPT).hash)
    assert read_entries(made / "server" / LOG)[-1] == entry
    assert contradicting_entries([entry.decode(), manifest_entry("kept", "0" * 64).decode()]) == {1}
