"""Bundles of runs: what is in them, who has signed them, and that no edit of one goes unnoticed or unnamed."""

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from shared.bundles import Signed, list_anew, write_signatures, wrong

from fedveil.base.refusal import Refusal
from fedveil.cli.report import bundle
from fedveil.cli.verify import verify
from fedveil.evidence.binding import page as page_module
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.bundle import LIST, add_signature, read_list
from fedveil.evidence.binding.signatures import FILE as SIGNATURES
from fedveil.evidence.binding.signatures import (
    Signature,
    message,
    read_key,
    read_signatures,
    signatures_text,
)
from fedveil.evidence.binding.verify import verify_folder
from fedveil.privacy.ledger.export import export_text, read_export
from fedveil.privacy.ledger.hash_chain import START, Draft, Entry, linked
from fedveil.run.manifest import hashes, read_manifest, reveals_counts

pytestmark = pytest.mark.usefixtures("without_jinja")

OFFICER = "data protection officer"


# --- what holds ---------------------------------------------------------------------------------------------------


def test_a_run_and_its_bundle_hold(signed: Signed, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (signed.run, signed.bundle):
        assert verify(folder, []) == 0, capsys.readouterr().out
    assert verify(signed.bundle, [str(signed.keys / "officer.pub"), signed.federation]) == 0
    assert f"{OFFICER}, 2026-11-26" in capsys.readouterr().out
    names = {path.name for path in signed.bundle.iterdir()}
    assert {"ledger.json", "recompute_ledger.py", "report.html", "assessment.yaml", "audit.npy"} < names
    assert not names & {"operator.jsonl", "checkpoint.safetensors", "audit.key", "ledger"}


def test_a_path_that_is_not_there_is_refused_as_a_path(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"^PATH='.*nothere': does not exist; name a run folder, a bundle"):
        verify(tmp_path / "nothere", [])


def test_json_tells_every_check(signed: Signed, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(signed.bundle, [], as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    unshown = [each["name"] for each in told["checks"] if each["ok"] is None]
    assert told["ok"] and unshown == ["client ledgers", "receipts", "blame"] and len(told["checks"]) == 13


def test_the_same_run_makes_the_same_bundle(signed: Signed, tmp_path: Path) -> None:
    for name in ("one", "two"):
        bundle(signed.run, tmp_path / name, [])
    assert (tmp_path / "one" / LIST).read_bytes() == (tmp_path / "two" / LIST).read_bytes()
    with pytest.raises(Refusal, match="is not empty"):
        bundle(signed.run, tmp_path / "one", [])


def test_checking_needs_no_torch_flower_or_hydra(signed: Signed) -> None:
    program = (
        "import sys\n"
        "from fedveil.__main__ import run\n"
        f"code = run(['verify', {str(signed.bundle)!r}])\n"
        "heavy = ('torch', 'flwr', 'hydra', 'omegaconf', 'pydantic', 'yaml', 'opacus', 'safetensors', 'matplotlib')\n"
        "sys.exit(code or ' '.join(name for name in heavy if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout


def test_ledgers_and_their_folders_are_checked_without_locks(
    signed: Signed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(signed.run / "ledger", tmp_path / "a.ledger")
    shutil.copy(signed.run / "ledger", tmp_path / "b.ledger")
    (tmp_path / "a.ledger.lock").write_text("1")
    assert verify(tmp_path, []) == 0
    assert capsys.readouterr().out.count("every hash is correct") == 2
    (tmp_path / "b.ledger").write_bytes(b"no ledger")
    assert verify(tmp_path, []) == 2
    assert "failed: b.ledger" in capsys.readouterr().out
    assert verify(tmp_path / "a.ledger", []) == 0
    for path in (tmp_path / "none", signed.keys):
        with pytest.raises(Refusal):
            verify(path, [])


@pytest.mark.parametrize(
    ("data", "seconds", "tells"), [("real", None, True), ("real", 3.0, False), ("simulation", None, False)]
)
def test_rows_of_real_clients_under_a_trusted_server_tell_counts(
    tmp_path: Path, data: str, seconds: float | None, tells: bool
) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"data": data, "seconds": seconds}))
    assert reveals_counts(tmp_path) is tells  # whether or not the operator's file still lies there


def test_audit_rows_of_real_rounds_stay_with_the_operator(copy: Path, signed: Signed, tmp_path: Path) -> None:
    from fedveil.run import manifest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "reveals_counts", lambda run: True)
        bundle(signed.run, tmp_path / "without", [])
        bundle(signed.run, tmp_path / "with", [], with_audit_rows=True)
    assert not (tmp_path / "without" / "audit.npy").exists() and (tmp_path / "with" / "audit.npy").exists()
    lines = {line.name: line for line in verify_folder(tmp_path / "without", Knowledge())}
    assert not wrong(list(lines.values())) and lines["audit"].ok is None


# --- keys and signatures ------------------------------------------------------------------------------------------


def test_foreign_program_in_a_bundle_is_reported(copy: Path) -> None:
    beware = "recompute_ledger.py is not this installation's: read it before you run it"
    found = verify_folder(copy, Knowledge())[0]
    assert found.ok and found.finding.endswith(beware)  # of an earlier release, or anybody's
    shutil.copyfile(Path(page_module.__file__).with_name("recompute_ledger.py"), copy / "recompute_ledger.py")
    listed = read_list(copy)
    (copy / LIST).write_bytes(replace(listed, files=hashes(copy, sorted(listed.files))).text)
    found = verify_folder(copy, Knowledge())[0]
    assert found.ok and beware not in found.finding


def test_texts_of_a_bundle_steer_no_terminal(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    role, key = "officer\x1b[1A\x1b[2K\u202e \x1b[8m", Ed25519PrivateKey.generate()
    said = {
        "role": role,
        "date": "2026-11-26",
        "keys": {"ed25519": key.public_key().public_bytes_raw().hex()},
    }
    signature = key.sign(message((copy / LIST).read_bytes(), [], said)).hex()
    forged = Signature(role, said["date"], said["keys"], {"ed25519": signature})
    (copy / SIGNATURES).write_bytes(signatures_text([forged]))
    (copy / "\x1b[8mhidden").touch()
    assert verify(copy, []) == 2
    out = capsys.readouterr().out
    assert "officer\\x1b[1A\\x1b[2K\\u202e \\x1b[8m" in out and "\\x1b[8mhidden is not listed" in out
    assert all(each.isprintable() or each == "\n" for each in out)


# --- edits --------------------------------------------------------------------------------------------------------

Edit = Callable[[Path, Signed, random.Random], str]


def a_byte(copy: Path, signed: Signed, draw: random.Random) -> str:
    path = draw.choice(sorted(copy.iterdir()))
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    data[at] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return path.name


def a_number_of_the_page(copy: Path, signed: Signed, draw: random.Random) -> str:
    text = (copy / "report.html").read_text()
    spans = [m for m in re.finditer(r'data-ref="([^"]+)"[^>]*>([^<]*\d[^<]*)<', text)]
    found = draw.choice(spans)
    at = draw.choice([found.start(2) + i for i, letter in enumerate(found[2]) if letter.isdecimal()])
    digit = draw.choice([each for each in "0123456789" if each != text[at]])
    (copy / "report.html").write_text(text[:at] + digit + text[at + 1 :])
    if draw.random() < 0.5:
        list_anew(copy)
        return found[1]
    return "report.html"


def a_swapped_signature(copy: Path, signed: Signed, draw: random.Random) -> str:
    first, second = read_signatures(copy)
    stranger = [read_key(signed.keys / "stranger")]
    forged: list[Callable[[], list[Any]]] = [
        lambda: [second, first],
        lambda: [first, replace(second, role="controller")],
        lambda: [first, replace(second, date="2026-11-25")],
        lambda: [replace(first, keys=second.keys, signatures=second.signatures), second],
        lambda: [first, replace(second, signatures={"ed25519": first.signatures["ed25519"]})],
        lambda: [second],
        list,
    ]
    choice = draw.randrange(len(forged) + 1)
    if choice == len(forged):
        (copy / SIGNATURES).unlink()
        add_signature(copy, OFFICER, "2026-11-26", stranger)
        return "has not signed"
    write_signatures(copy, forged[choice]())
    return "signature 1" if choice in (0, 3, 5) else "has not signed" if choice == 6 else "signature 2"


def an_entry(copy: Path, signed: Signed, draw: random.Random) -> str:
    entries = read_export((copy / "ledger.json").read_bytes(), "")
    at, how = draw.randrange(len(entries)), draw.choice(["drop", "repeat", "swap"])
    drafts = [Draft(each.kind, each.key, each.payload) for each in entries]
    if how == "drop":
        drafts.pop(at)
    elif how == "repeat":
        drafts.insert(at, drafts[at])
    else:
        at = max(1, at)
        drafts[at - 1], drafts[at] = drafts[at], drafts[at - 1]
    if draw.random() < 0.5:  # the chain is made anew
        chain: list[Entry] = []
        for draft in drafts:
            chain.append(linked(draft, chain[-1].head if chain else START))
    else:
        by_draft = {(each.kind, each.key): each for each in entries}
        chain = [by_draft[draft.kind, draft.key] for draft in drafts]
    (copy / "ledger.json").write_text(export_text(chain) + "\n")
    if draw.random() < 0.5:
        list_anew(copy)
        return "entry|entries|ledger|manifest"
    return "ledger.json"


def a_model_of_another_run(copy: Path, signed: Signed, draw: random.Random) -> str:
    name = draw.choice(["model.safetensors", "result.json", "audit.npy", "metrics.jsonl", "run.json"])
    shutil.copy(signed.other / name, copy / name)
    if draw.random() < 0.5:
        list_anew(copy)
    return name


def an_older_manifest(copy: Path, signed: Signed, draw: random.Random) -> str:
    manifest = read_manifest(copy)
    if draw.random() < 0.5:
        shutil.copy(signed.other / "manifest.json", copy / "manifest.json")
        list_anew(copy)
        return "manifest|left"
    older = replace(manifest, status="failed", files={**manifest.files, "model.safetensors": "0" * 64})
    (copy / "manifest.json").write_text(older.text)
    if draw.random() < 0.5:
        list_anew(copy)
        return "model.safetensors"
    return "manifest.json"


EDITS: tuple[Edit, ...] = (
    a_byte,
    a_byte,
    a_number_of_the_page,
    a_swapped_signature,
    an_entry,
    a_model_of_another_run,
    an_older_manifest,
)


def missed(signed: Signed, folder: Path, number: int) -> str | None:
    """Return what an edit was, where it was not seen or not named; None where it was."""
    draw, copy = random.Random(number), folder / str(number)
    shutil.copytree(signed.bundle, copy)
    edit = EDITS[number % len(EDITS)]
    name = edit(copy, signed, draw)
    said = wrong(verify_folder(copy, signed.knowledge))
    named = any(
        re.search(name if "|" in name else re.escape(name), f"{each}: {text}") for each, text in said.items()
    )
    shutil.rmtree(copy)
    return None if named else f"{number} {edit.__name__}: {name!r} in {said}"


def test_no_edit_goes_unnoticed_or_unnamed(signed: Signed, tmp_path: Path) -> None:
    assert [each for number in range(63) if (each := missed(signed, tmp_path, number))] == []


@pytest.mark.campaign
def test_of_five_hundred_edits_none_goes_unnoticed_or_unnamed(signed: Signed, tmp_path: Path) -> None:
    assert [each for number in range(1000, 1500) if (each := missed(signed, tmp_path, number))] == []


# --- edits by whoever makes every hash fit, and whom only what is recomputed betrays ---------------------------------


def test_a_bundle_holds_no_link_and_no_file_more(copy: Path, signed: Signed) -> None:
    (copy / "more.txt").write_text("trust me")
    assert wrong(verify_folder(copy, Knowledge())) == {"files": "more.txt is not listed"}
    (copy / "more.txt").unlink()
    (copy / "model.safetensors").rename(copy.parent / "model")
    (copy / "model.safetensors").symlink_to(copy.parent / "model")
    assert "model.safetensors" in wrong(verify_folder(copy, Knowledge()))["files"]
    (copy / "bundle.json").unlink()
    assert {"files", "signatures"} <= set(wrong(verify_folder(copy, Knowledge())))
