"""Bundles of runs: what is in them, who has signed them, and that no edit of one goes unnoticed or unnamed."""

import json
import random
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from dp_accounting.dp_event import GaussianDpEvent
from shared.runs import json_lines, run_quietly

from fedveil.base.refusal import Refusal
from fedveil.cli.report import bundle, key, sign
from fedveil.cli.verify import verify
from fedveil.configs.passphrase import is_scrypt
from fedveil.configs.settings import settings_from_overrides
from fedveil.evidence.binding import page as page_module
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.bundle import LIST, add_signature, read_list
from fedveil.evidence.binding.signatures import FILE as SIGNATURES
from fedveil.evidence.binding.signatures import (
    PASSPHRASE,
    Signature,
    message,
    read_key,
    read_public,
    read_signatures,
    signatures_text,
)
from fedveil.evidence.binding.verify import CheckLine, verify_folder
from fedveil.evidence.page_text import differences, resolve_pointer, text_of
from fedveil.privacy.budget import Budget, Release
from fedveil.privacy.ledger.export import export_text, read_export
from fedveil.privacy.ledger.hash_chain import START, Draft, Entry, Head, canonical, linked
from fedveil.privacy.ledger.ledger import Ledger, read_entries
from fedveil.privacy.ledger.ledger_state import verify_entries
from fedveil.run.files import MANIFEST, RESULT
from fedveil.run.manifest import hashes, read_manifest, reveals_counts
from fedveil.simulations.simulate import simulate

OFFICER = "data protection officer"
KEPT = Path(__file__).parents[2] / "fixtures" / "signed_run"
MADE_AGAIN = page_module.page_again


@pytest.fixture(autouse=True)
def without_jinja(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify as the base installation does: the kept page is of an earlier release, and this one makes another."""
    monkeypatch.setattr(page_module, "page_again", lambda _: None)


@dataclass(frozen=True)
class Signed:
    """A run, its bundle that two have signed, and another run of the same task."""

    run: Path
    bundle: Path
    other: Path
    keys: Path
    federation: str
    officer: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    """A run of 26 November 2026, the bundle that two have signed, files of a run by another seed, and everybody's keys.

    Of the bundle the fixture keeps what the run's folder does not hold.
    """
    folder = Path(shutil.copytree(KEPT, tmp_path_factory.mktemp("made") / "kept"))
    for name in read_list(folder / "bundle").files:
        if not (folder / "bundle" / name).exists():
            shutil.copy(folder / "run" / name, folder / "bundle" / name)
    for path in (folder / "keys").iterdir():  # keys in a checkout are readable by all
        path.chmod(0o600)
    (folder / "run" / "ledger").chmod(0o600)
    public = {name: read_public(str(folder / "keys" / f"{name}.pub")) for name in ("federation", "officer")}
    return Signed(folder / "run", folder / "bundle", folder / "other", folder / "keys", **public)


@pytest.fixture
def copy(made: Signed, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.bundle, tmp_path / "copy"))


def wrong(lines: list[CheckLine]) -> dict[str, str]:
    return {line.name: line.finding for line in lines if line.ok is False}


def asked(made: Signed) -> Knowledge:
    return Knowledge((made.federation, made.officer))


# --- what holds ---------------------------------------------------------------------------------------------------


def test_a_run_and_its_bundle_hold(made: Signed, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (made.run, made.bundle):
        assert verify(folder, []) == 0, capsys.readouterr().out
    assert verify(made.bundle, [str(made.keys / "officer.pub"), made.federation]) == 0
    assert f"{OFFICER}, 2026-11-26" in capsys.readouterr().out
    names = {path.name for path in made.bundle.iterdir()}
    assert {"ledger.json", "recompute_ledger.py", "report.html", "assessment.yaml", "audit.npy"} < names
    assert not names & {"operator.jsonl", "checkpoint.safetensors", "audit.key", "ledger"}


def test_a_page_of_an_earlier_release_counts_by_its_signed_hash(
    made: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "page_again", MADE_AGAIN)
    (line,) = (each for each in verify_folder(made.bundle, asked(made)) if each.name == "page")
    assert line.ok is None and "makes another page" in line.finding
    (line,) = (each for each in verify_folder(made.run, Knowledge()) if each.name == "page")
    assert line.ok is False and "fedveil report makes it again" in line.finding


def test_a_path_that_is_not_there_is_refused_as_a_path(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"^PATH='.*nothere': does not exist; name a run folder, a bundle"):
        verify(tmp_path / "nothere", [])


def test_json_tells_every_check(made: Signed, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(made.bundle, [], as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    unshown = [each["name"] for each in told["checks"] if each["ok"] is None]
    assert told["ok"] and unshown == ["client ledgers", "receipts", "blame"] and len(told["checks"]) == 13


def test_the_same_run_makes_the_same_bundle(made: Signed, tmp_path: Path) -> None:
    for name in ("one", "two"):
        bundle(made.run, tmp_path / name, [])
    assert (tmp_path / "one" / LIST).read_bytes() == (tmp_path / "two" / LIST).read_bytes()
    with pytest.raises(Refusal, match="is not empty"):
        bundle(made.run, tmp_path / "one", [])


def test_checking_needs_no_torch_flower_or_hydra(made: Signed) -> None:
    program = (
        "import sys\n"
        "from fedveil.__main__ import run\n"
        f"code = run(['verify', {str(made.bundle)!r}])\n"
        "heavy = ('torch', 'flwr', 'hydra', 'omegaconf', 'pydantic', 'yaml', 'opacus', 'safetensors', 'matplotlib')\n"
        "sys.exit(code or ' '.join(name for name in heavy if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout


def test_the_bundle_recomputes_its_ledger_without_fedveil(made: Signed) -> None:
    script = runpy.run_path(str(made.bundle / "recompute_ledger.py"))
    assert "fedveil" not in re.sub(
        '""".*?"""', "", (made.bundle / "recompute_ledger.py").read_text(), flags=re.DOTALL
    )
    found = script["main"](str(made.bundle / "ledger.json"))
    result = json.loads((made.bundle / "result.json").read_text())
    claimed = {row["adversary"]: row["epsilon"] for row in result["privacy"] if row["sampling"] != "none"}
    assert {who: each["epsilon"] for who, each in found.items()} == pytest.approx(claimed, rel=0.02)


def test_the_program_that_recomputes_prints_epsilon_alone(made: Signed) -> None:
    program = Path(__file__).parents[3] / "evidence" / "binding" / "recompute_ledger.py"
    command = [sys.executable, str(program), str(made.bundle / "ledger.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "clients" in json.loads(done.stdout) and done.stderr == ""


def test_later_head_is_looked_for(made: Signed) -> None:
    last = read_entries(made.run / "ledger")[-1]
    assert verify(made.bundle, [], (str(last.seq), last.hash)) == 0
    for head in (Head(last.seq, "0" * 64), Head(last.seq + 1, last.hash), Head(0, last.hash)):
        assert "known head" in wrong(verify_folder(made.bundle, Knowledge(head=head)))


def test_a_run_that_was_never_closed_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(__file__).parents[2] / "fixtures" / "before_the_rooms" / "run"
    run = Path(shutil.copytree(before, tmp_path / "run"))
    assert verify(run, []) == 2
    assert "resume the run, which closes it" in capsys.readouterr().out
    with pytest.raises(Refusal, match=r"check .* failed"):
        bundle(run, None, [])


def test_a_run_that_goes_on_cannot_be_verified_yet(tmp_path: Path, made: Signed) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    for name in (RESULT, MANIFEST):
        (run / name).unlink()
    with pytest.raises(Refusal, match="has not ended"):
        verify(run, [])


def test_another_run_on_the_ledger_may_have_had_another_adversary(made: Signed, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    identity = json.loads(read_entries(run / "ledger")[0].payload)
    budget = Budget(identity["unit"], 9.0, 1e-4, adjacency=identity["adjacency"])
    with Ledger.open(run / "ledger", budget, owner=identity["owner"], simulated=True) as ledger:
        events = {"server": GaussianDpEvent(50.0)}
        ledger.reserve(Release(identity["unit"], "masked", 1, "private_sum", events, rng="system"))
        head = list(ledger.head)
    result = json.loads((run / RESULT).read_text())
    (run / RESULT).write_text(json.dumps({**result, "ledger_head": head}))
    line = next(each for each in verify_folder(run, Knowledge()) if each.name == "epsilon")
    assert line.ok, line.finding


def test_ledgers_and_their_folders_are_checked_without_locks(
    made: Signed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(made.run / "ledger", tmp_path / "a.ledger")
    shutil.copy(made.run / "ledger", tmp_path / "b.ledger")
    (tmp_path / "a.ledger.lock").write_text("1")
    assert verify(tmp_path, []) == 0
    assert capsys.readouterr().out.count("every hash is correct") == 2
    (tmp_path / "b.ledger").write_bytes(b"no ledger")
    assert verify(tmp_path, []) == 2
    assert "failed: b.ledger" in capsys.readouterr().out
    assert verify(tmp_path / "a.ledger", []) == 0
    for path in (tmp_path / "none", made.keys):
        with pytest.raises(Refusal):
            verify(path, [])


@pytest.mark.campaign
def test_records_of_a_simulation_are_recomputed_from_its_ledgers(tmp_path: Path) -> None:
    given = (
        "task=digits",
        "task.num_clients=4",
        "num_rounds=2",
        "batch_size=40",
        "privacy=record",
        "audit=off",
    )
    run = tmp_path / "run"
    assert (
        simulate(
            settings_from_overrides(
                [*given, "cohort=all", "privacy.noise_multiplier=1", "privacy.target_epsilon=null"]
            ),
            run,
            quiet=True,
        ).exit_code
        == 0
    )
    assert bundle(run, None, []) == 0
    for folder in (run, run / "bundle"):
        lines = {line.name: line for line in verify_folder(folder, Knowledge())}
        assert not wrong(list(lines.values())) and lines["client ledgers"].ok, lines
    whole = json.loads((run / "bundle" / "client_ledgers.json").read_text())
    name = next(iter(whole))
    whole[name]["entries"].pop()
    (run / "bundle" / "client_ledgers.json").write_text(json.dumps(whole))
    assert "lacks entry" in wrong(verify_folder(run / "bundle", Knowledge()))["client ledgers"]


def test_a_run_without_a_ledger_is_bound_by_its_signature_alone(tmp_path: Path, made: Signed) -> None:
    given = ("task=digits", "task.num_clients=4", "num_rounds=1", "batch_size=40", "privacy=none")
    run_quietly([*given], tmp_path / "run")
    assert bundle(tmp_path / "run", None, [made.keys / "federation"]) == 0
    lines = {
        line.name: line for line in verify_folder(tmp_path / "run" / "bundle", Knowledge((made.federation,)))
    }
    assert not wrong(list(lines.values())) and lines["close"].ok is None


@pytest.mark.parametrize(
    ("data", "seconds", "tells"), [("real", None, True), ("real", 3.0, False), ("simulation", None, False)]
)
def test_rows_of_real_clients_under_a_trusted_server_tell_counts(
    tmp_path: Path, data: str, seconds: float | None, tells: bool
) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"data": data, "seconds": seconds}))
    assert reveals_counts(tmp_path) is tells  # whether or not the operator's file still lies there


def test_audit_rows_of_real_rounds_stay_with_the_operator(copy: Path, made: Signed, tmp_path: Path) -> None:
    from fedveil.run import manifest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "reveals_counts", lambda run: True)
        bundle(made.run, tmp_path / "without", [])
        bundle(made.run, tmp_path / "with", [], with_audit_rows=True)
    assert not (tmp_path / "without" / "audit.npy").exists() and (tmp_path / "with" / "audit.npy").exists()
    lines = {line.name: line for line in verify_folder(tmp_path / "without", Knowledge())}
    assert not wrong(list(lines.values())) and lines["audit"].ok is None


# --- keys and signatures ------------------------------------------------------------------------------------------


def test_keys_under_a_passphrase_and_of_other_programs_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSPHRASE, "long and quiet")
    key(tmp_path / "mine")
    assert is_scrypt((tmp_path / "mine").read_bytes()) and (tmp_path / "mine").stat().st_mode & 0o777 == 0o600
    other, locks = Ed25519PrivateKey.generate(), BestAvailableEncryption(b"long and quiet")
    for name, form in (("pem", PrivateFormat.PKCS8), ("ssh", PrivateFormat.OpenSSH)):
        for locked, lock in ((name, NoEncryption()), (f"{name}-locked", locks)):
            if locked == "ssh-locked" and find_spec("bcrypt") is None:
                continue  # OpenSSH's own way to lock a key
            (tmp_path / locked).write_bytes(other.private_bytes(Encoding.PEM, form, lock))
            (tmp_path / locked).chmod(0o600)
            assert read_key(tmp_path / locked).public == other.public_key().public_bytes_raw().hex()
    public = other.public_key()
    (tmp_path / "a.pub").write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "b.pub").write_bytes(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    assert {read_public(str(tmp_path / name)) for name in ("a.pub", "b.pub")} == {
        public.public_bytes_raw().hex()
    }
    monkeypatch.setenv(PASSPHRASE, "wrong")
    with pytest.raises(Refusal, match="holds no readable private key"):
        read_key(tmp_path / "mine")
    with pytest.raises(Refusal, match="exists; name another"):
        key(tmp_path / "mine", unlocked=True)
    (tmp_path / "pem").chmod(0o644)
    with pytest.raises(Refusal, match="may be read by others"):
        read_key(tmp_path / "pem")


def test_both_algorithms_sign_and_both_are_checked(copy: Path, made: Signed) -> None:
    first, second = read_signatures(copy)
    assert set(first.signatures) == {"ed25519", "ml-dsa-65"} and set(second.signatures) == {"ed25519"}
    for name in first.signatures:
        bad = {**first.signatures, name: ("00" * 64 if name == "ed25519" else "00" * 3309)}
        write_signatures(copy, [replace(first, signatures=bad), second])
        assert f"is not valid under {name}" in wrong(verify_folder(copy, Knowledge()))["signatures"]
    left = {name: first.signatures[name] for name in ("ed25519",)}
    write_signatures(copy, [replace(first, signatures=left, keys={"ed25519": first.keys["ed25519"]}), second])
    assert "signature 1" in wrong(verify_folder(copy, Knowledge()))["signatures"]


def write_signatures(folder: Path, signatures: list[Any]) -> None:
    whole = {"format": "fedveil signatures 1", "signatures": [each.to_json() for each in signatures]}
    (folder / SIGNATURES).write_text(json.dumps(whole, indent=1) + "\n")


def test_invalid_statement_is_signed_by_nobody(copy: Path, made: Signed) -> None:
    (copy / "model.safetensors").write_bytes(b"another")
    with pytest.raises(Refusal, match=r"model\.safetensors differs from the bundled file"):
        sign(copy, "auditor", [made.keys / "stranger"], None)
    for role, day in (("", None), ("a\nb", None), ("auditor", "tomorrow")):
        with pytest.raises(Refusal):
            sign(made.bundle, role, [made.keys / "stranger"], day)
    with pytest.raises(Refusal, match="at most one of each"):
        sign(made.bundle, "auditor", [made.keys / "stranger", made.keys / "officer"], None)


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


def test_a_result_that_cannot_be_read_is_named(copy: Path) -> None:
    (copy / "result.json").write_text('{"epsilon": 0.99.1}')
    said = wrong(verify_folder(copy, Knowledge()))
    assert len(said) > 5 and not [
        each for each in said.values() if "delimiter" in each and "result.json" not in each
    ]


def test_a_key_that_has_not_signed_is_named(made: Signed) -> None:
    stranger = read_public(str(made.keys / "stranger.pub"))
    said = wrong(verify_folder(made.bundle, Knowledge((stranger,))))
    assert said == {"signatures": f"the key {stranger[:16]} has not signed, nor the roster of receipts.json"}


# --- edits --------------------------------------------------------------------------------------------------------

Edit = Callable[[Path, Signed, random.Random], str]


def a_byte(copy: Path, made: Signed, draw: random.Random) -> str:
    path = draw.choice(sorted(copy.iterdir()))
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    data[at] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return path.name


def a_number_of_the_page(copy: Path, made: Signed, draw: random.Random) -> str:
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


def a_swapped_signature(copy: Path, made: Signed, draw: random.Random) -> str:
    first, second = read_signatures(copy)
    stranger = [read_key(made.keys / "stranger")]
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


def an_entry(copy: Path, made: Signed, draw: random.Random) -> str:
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


def a_model_of_another_run(copy: Path, made: Signed, draw: random.Random) -> str:
    name = draw.choice(["model.safetensors", "result.json", "audit.npy", "metrics.jsonl", "run.json"])
    shutil.copy(made.other / name, copy / name)
    if draw.random() < 0.5:
        list_anew(copy)
    return name


def an_older_manifest(copy: Path, made: Signed, draw: random.Random) -> str:
    manifest = read_manifest(copy)
    if draw.random() < 0.5:
        shutil.copy(made.other / "manifest.json", copy / "manifest.json")
        list_anew(copy)
        return "manifest|left"
    older = replace(manifest, status="failed", files={**manifest.files, "model.safetensors": "0" * 64})
    (copy / "manifest.json").write_text(older.text)
    if draw.random() < 0.5:
        list_anew(copy)
        return "model.safetensors"
    return "manifest.json"


def list_anew(copy: Path) -> None:
    """Make the list of hashes fit what lies in a bundle, as whoever edits it would; a signature nobody can make."""
    listed = read_list(copy)
    names = sorted(path.name for path in copy.iterdir() if path.name not in (LIST, SIGNATURES))
    (copy / LIST).write_bytes(replace(listed, files=hashes(copy, names)).text)


EDITS: tuple[Edit, ...] = (
    a_byte,
    a_byte,
    a_number_of_the_page,
    a_swapped_signature,
    an_entry,
    a_model_of_another_run,
    an_older_manifest,
)


def missed(made: Signed, folder: Path, number: int) -> str | None:
    """Return what an edit was, where it was not seen or not named; None where it was."""
    draw, copy = random.Random(number), folder / str(number)
    shutil.copytree(made.bundle, copy)
    edit = EDITS[number % len(EDITS)]
    name = edit(copy, made, draw)
    said = wrong(verify_folder(copy, asked(made)))
    named = any(
        re.search(name if "|" in name else re.escape(name), f"{each}: {text}") for each, text in said.items()
    )
    shutil.rmtree(copy)
    return None if named else f"{number} {edit.__name__}: {name!r} in {said}"


def test_no_edit_goes_unnoticed_or_unnamed(made: Signed, tmp_path: Path) -> None:
    assert [each for number in range(63) if (each := missed(made, tmp_path, number))] == []


@pytest.mark.campaign
def test_of_five_hundred_edits_none_goes_unnoticed_or_unnamed(made: Signed, tmp_path: Path) -> None:
    assert [each for number in range(1000, 1500) if (each := missed(made, tmp_path, number))] == []


# --- edits by whoever makes every hash fit, and whom only what is recomputed betrays ---------------------------------


def close_anew(copy: Path) -> None:
    """Make manifest, close and list fit what lies in an unsigned bundle."""
    (copy / SIGNATURES).unlink(missing_ok=True)
    manifest = read_manifest(copy)
    status = json.loads((copy / "result.json").read_text())["status"]
    fresh = replace(manifest, status=status, files=hashes(copy, manifest.files))
    (copy / "manifest.json").write_text(fresh.text)
    *before, last = read_export((copy / "ledger.json").read_bytes(), "")
    said = {**json.loads(last.payload), "manifest": fresh.hash, "status": status}
    close = linked(Draft("close", last.key, canonical(said)), before[-1].head)
    (copy / "ledger.json").write_text(export_text([*before, close]) + "\n")
    listed = read_list(copy)
    (copy / LIST).write_bytes(replace(listed, close=close.head).text)
    list_anew(copy)


def of_result(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(copy: Path) -> None:
        result = json.loads((copy / "result.json").read_text())
        change(result)
        (copy / "result.json").write_text(json.dumps(result))

    return edit


def claim(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(result: dict[str, Any]) -> None:
        for row in result["privacy"]:
            if row["sampling"] != "none":
                row[name] = value

    return change


def of_rounds(copy: Path) -> None:
    rows = json_lines(copy / "metrics.jsonl")
    rows[1]["epsilon_client"] *= 0.9
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def other_report(copy: Path) -> None:
    whole = json.loads((copy / "report.json").read_text())
    for row in whole["privacy"]:
        row["epsilon"] = 0.5
    (copy / "report.json").write_text(json.dumps(whole))
    text = (copy / "report.html").read_text()
    form = r'(data-ref="/privacy/\d+/epsilon"[^>]*>)[^<]*<'
    (copy / "report.html").write_text(re.sub(form, r"\g<1>0.50<", text))


def shown_otherwise(pointer: str, value: Any) -> Callable[[Path], None]:
    """Return an edit of one value of the report, and of its page with it."""

    def edit(copy: Path) -> None:
        path, page = copy / "report.json", copy / "report.html"
        whole = json.loads(path.read_text())
        above, _, name = pointer.rpartition("/")
        place = resolve_pointer(whole, above)
        place[int(name) if isinstance(place, list) else name] = value
        path.write_text(json.dumps(whole))
        form = rf'(data-ref="{pointer}"(?: data-form="(\w+)")?>)[^<]*<'
        text = re.sub(
            form, lambda found: f"{found[1]}{text_of(value, found[2] or 'plain')}<", page.read_text()
        )
        page.write_text(text)
        assert differences(text, whole) == []

    return edit


def other_card(copy: Path) -> None:
    (copy / "CARD.md").write_text("Recipients of the model can tell nothing: epsilon is 0.1.")


RECOMPUTED_EDITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "epsilon": (of_result(claim("epsilon", 1.0)), "epsilon"),
    "a larger epsilon": (of_result(claim("epsilon", 29.0)), "epsilon"),
    "delta": (of_result(claim("delta", 1e-9)), "epsilon"),
    "adjacency": (of_result(claim("adjacency", "replace-one")), "epsilon"),
    "no promise at all": (of_result(lambda result: result["privacy"].clear()), "epsilon"),
    "ledger head": (of_result(lambda result: result.update(ledger_head=[2, "0" * 64])), "known head"),
    "verdict": (of_result(lambda result: result["audit"].update(verdict="consistent", said="fine")), "audit"),
    "measured": (of_result(lambda result: result["audit"]["measured"].update(epsilon=0.01)), "audit"),
    "a round's epsilon": (of_rounds, "epsilon of each round"),
    "a page of other claims": (other_report, "page"),
    "a page with another stamp": (shown_otherwise("/stamps/claimed/epsilon", 0.5), "page"),
    "a page that measured less": (shown_otherwise("/stamps/measured/high", 0.01), "page"),
    "a page with another verdict": (shown_otherwise("/stamps/verdict", "consistent"), "page"),
    "a page of a better model": (shown_otherwise("/metrics/0/value", 0.999), "page"),
    "a card of another guarantee": (other_card, "page"),
    "a page of another ending": (shown_otherwise("/run/status", "exhausted"), "page"),
}


@pytest.mark.parametrize("name", RECOMPUTED_EDITS)
def test_epsilon_is_recomputed_under_valid_hashes(copy: Path, made: Signed, name: str) -> None:
    edit, expected = RECOMPUTED_EDITS[name]
    close_anew(copy)
    assert wrong(verify_folder(copy, Knowledge())) == {}  # nothing but the signature tells
    edit(copy)
    close_anew(copy)
    assert expected in wrong(verify_folder(copy, Knowledge()))


def test_another_manifest_than_the_close_knows_is_named(copy: Path, made: Signed) -> None:
    of_result(lambda result: result.update(seed=5))(copy)
    manifest = read_manifest(copy)
    (copy / "manifest.json").write_text(replace(manifest, files=hashes(copy, manifest.files)).text)
    list_anew(copy)
    (copy / SIGNATURES).unlink()
    assert set(wrong(verify_folder(copy, Knowledge()))) == {"close"}


def test_a_number_of_the_page_is_named_where_every_hash_fits(copy: Path, made: Signed) -> None:
    text = (copy / "report.html").read_text()
    (copy / "report.html").write_text(
        text.replace('data-ref="/run/clients">40<', 'data-ref="/run/clients">41<', 1)
    )
    list_anew(copy)
    (copy / SIGNATURES).unlink()
    assert "/run/clients" in wrong(verify_folder(copy, Knowledge()))["page"]


def test_overdrawn_and_later_raised_budget_is_detected() -> None:
    events = {"model": {"kind": "Gaussian", "noise_multiplier": 1.0}}
    first = {"version": 1, "unit": "client", "adjacency": "zero-out", "owner": "all", "simulated": False}

    def chain(*targets: float) -> list[Entry]:
        found = [linked(Draft("open", "", canonical(first)), START)]
        for number, target in enumerate(targets, 1):
            said = {
                "budget": {"target_epsilon": target, "target_delta": 1e-5},
                "events": events,
                "rng": "system",
            }
            draft = Draft("reserve", canonical(["a", number, "sum"]), canonical(said))
            found.append(linked(draft, found[-1].head))
        return found

    assert verify_entries(chain(10.0, 10.0), "it").ok
    found = verify_entries(chain(1.0, 10.0), "it")
    assert not found.ok and "before entry 3" in str(found.problem)


def test_a_bundle_holds_no_link_and_no_file_more(copy: Path, made: Signed) -> None:
    (copy / "more.txt").write_text("trust me")
    assert wrong(verify_folder(copy, Knowledge())) == {"files": "more.txt is not listed"}
    (copy / "more.txt").unlink()
    (copy / "model.safetensors").rename(copy.parent / "model")
    (copy / "model.safetensors").symlink_to(copy.parent / "model")
    assert "model.safetensors" in wrong(verify_folder(copy, Knowledge()))["files"]
    (copy / "bundle.json").unlink()
    assert {"files", "signatures"} <= set(wrong(verify_folder(copy, Knowledge())))


def test_a_run_that_went_on_after_its_close_is_named(made: Signed, tmp_path: Path) -> None:
    from dp_accounting import GaussianDpEvent

    import fedveil as fv

    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    identity = json.loads(read_entries(run / "ledger")[0].payload)
    budget = fv.Budget("client", 1e6, 1e-5, identity["adjacency"])
    name = read_manifest(run).run
    with Ledger.open(run / "ledger", budget, owner=identity["owner"], simulated=True) as ledger:
        ledger.reserve(fv.Release("client", name, 9, "sum", {"model": GaussianDpEvent(50.0)}, rng="seeded"))
    assert "continued after it was closed" in wrong(verify_folder(run, Knowledge()))["close"]
