"""Release of fedveil: its wheel and that of fedveil-privacy, source, bills of materials, advisories, requirements with hashes, and a signed provenance.

    python .ci/release.py scan                                 (advisories of the locks, where pip-audit can look them up)
    python .ci/release.py make FOLDER --key release.key        (what Python builds with: build, setuptools, cyclonedx-bom)
    python .ci/release.py verify FOLDER --public release.pub   (needs the package cryptography alone)

The statement is an in-toto statement with SLSA provenance in a DSSE envelope, signed by Ed25519. The key is the one
that is given; a passphrase is read from FEDVEIL_PASSPHRASE.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

ROOT = Path(__file__).parents[1]
LOCKS = ("client", "server")
PROVENANCE = "provenance.json"
# Judgements of advisories: id -> {"state", "justification", "detail"}, the words of CycloneDX 1.6, vulnerabilities.analysis.
JUDGED, VEX = ROOT / ".ci" / "advisories.json", "vex.cdx.json"
AUDIT = ("pip-audit", "--disable-pip", "--require-hashes", "--format=json", "--progress-spinner=off")
# https://in-toto.io/Statement/v1, https://slsa.dev/spec/v1.0/provenance, https://github.com/secure-systems-lab/dsse
STATEMENT, PREDICATE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
PAYLOAD = "application/vnd.in-toto+json"
BUILD = "urn:fedveil:release:1"


def make(folder: Path, key: Ed25519PrivateKey) -> None:
    """Build everything of a clean checkout into an empty folder, and sign what it is and where it comes from."""
    if _git("status", "--porcelain"):
        sys.exit("the checkout has changes that no commit holds: commit them, or take a fresh clone")
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty: name another folder")
    judgements, started = vex(), _now()
    commit, time = _git("rev-parse", "HEAD"), _git("log", "-1", "--format=%ct")
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "fedveil"
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(tree)], check=True)
        _build(tree, "--sdist", folder, time)
        require_privacy(tree / "pyproject.toml")
        for each in (tree / "privacy", tree):
            _build(each, "--wheel", folder, time)
    (folder / VEX).write_text(json.dumps(judgements, indent=1) + "\n")
    for name in LOCKS:
        lock = ROOT / "containers" / f"{name}.lock"
        write_bill(lock, folder / f"sbom-{name}.cdx.json")
        own = [
            f"./wheels/{each.name} --hash=sha256:{digest(each)}\n" for each in sorted(folder.glob("*.whl"))
        ]
        (folder / f"requirements-{name}.txt").write_text("".join([lock.read_text(), *own]))
    (folder / PROVENANCE).write_text(
        json.dumps(signed(statement(folder, commit, started), key), indent=1) + "\n"
    )


def require_privacy(project: Path) -> None:
    """Rewrite fedveil's pyproject.toml so that its wheel requires fedveil-privacy in the place of those rooms."""
    rooms = tomllib.loads((project.parent / "privacy" / "pyproject.toml").read_text())
    lines = project.read_text().splitlines(keepends=True)
    moved = {f'  "{each}",\n' for each in rooms["tool"]["setuptools"]["packages"]}
    data = tuple(f'"{each}" = ' for each in rooms["tool"]["setuptools"]["package-data"])
    stay = [line for line in lines if line not in moved and not line.startswith(data)]
    at = stay.index("dependencies = [\n") + 1
    own = f'  "{rooms["project"]["name"]}=={rooms["project"]["version"]}",\n'
    project.write_text("".join([*stay[:at], own, *stay[at:]]))


def _build(tree: Path, kind: str, folder: Path, time: str) -> None:
    """Build the distribution of a tree, `--wheel` or `--sdist`, into a folder, as of `time` in seconds since 1970."""
    command = [sys.executable, "-m", "build", kind, "--no-isolation", "--outdir", str(folder), str(tree)]
    subprocess.run(command, env={**os.environ, "SOURCE_DATE_EPOCH": time}, stdout=sys.stderr, check=True)


def vex() -> dict[str, Any]:
    """Return the statement, in CycloneDX, on each known advisory of what the locks name; say what was not looked up.

    An advisory that nobody has judged ends the program: a release says of each whether it concerns fedveil.
    """
    judged, found, unseen = json.loads(JUDGED.read_text()), set[tuple[str, str]](), set[str]()
    for name in LOCKS:
        more, left = advisories(ROOT / "containers" / f"{name}.lock")
        found, unseen = found | more, unseen | left
    new = sorted(f"{each} ({package})" for each, package in found if each not in judged)
    if new:
        sys.exit(
            f"{JUDGED.name}: does not judge {', '.join(new)}; take newer versions, or add what they mean for fedveil"
        )
    if unseen:
        print(f"advisories were not looked up: {'; '.join(sorted(unseen))}", file=sys.stderr)
    statements = [
        {"id": each, "affects": [{"ref": package}], "analysis": judged[each]}
        for each, package in sorted(found)
    ]
    component = {"type": "application", "name": "fedveil", "purl": "pkg:generic/fedveil"}
    properties = [{"name": "fedveil:not-looked-up", "value": each} for each in sorted(unseen)]
    metadata = {"timestamp": _now(), "component": component, "properties": properties}
    head = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}
    return {**head, "metadata": metadata, "vulnerabilities": statements}


def advisories(lock: Path) -> tuple[set[tuple[str, str]], set[str]]:
    """Return the advisories of a lock's packages, each with its package, and what could not be looked up, and why."""
    try:
        command = [*AUDIT, "--requirement", str(lock)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        packages = json.loads(done.stdout)["dependencies"]
    except FileNotFoundError:
        return set(), {"pip-audit is not installed"}
    except (ValueError, KeyError):
        return set(), {f"{lock.name}: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}"}
    skipped = [each["skip_reason"] for each in packages if "skip_reason" in each]
    unseen = (
        {f"{lock.name}: {len(skipped)} of {len(packages)} packages ({skipped[0]})"} if skipped else set[str]()
    )
    found = {
        (advisory["id"], f"pkg:pypi/{each['name']}@{each['version']}")
        for each in packages
        for advisory in each.get("vulns", ())
    }
    return found, unseen


def write_bill(lock: Path, to: Path) -> None:
    """Write the CycloneDX bill of materials of an environment that holds fedveil and what a lock names."""
    command = [
        sys.executable,
        "-m",
        "cyclonedx_py",
        "requirements",
        str(lock),
        "--pyproject",
        "pyproject.toml",
    ]
    options = [
        "--output-reproducible",
        "--spec-version",
        "1.6",
        "--output-format",
        "JSON",
        "--output-file",
        str(to),
    ]
    subprocess.run([*command, *options], cwd=ROOT, check=True)


def statement(folder: Path, commit: str, started: str) -> dict[str, Any]:
    """Return what is released, by its hashes, and what it was made from."""
    subjects = [
        {"name": path.name, "digest": {"sha256": digest(path)}}
        for path in sorted(folder.iterdir())
        if path.name != PROVENANCE
    ]
    inputs: list[dict[str, Any]] = [
        {"name": "source", "uri": "git+file:fedveil", "digest": {"gitCommit": commit}},
        *(
            {
                "name": f"containers/{name}.lock",
                "digest": {"sha256": digest(ROOT / "containers" / f"{name}.lock")},
            }
            for name in LOCKS
        ),
        *({"uri": f"pkg:pypi/{name}@{version(name)}"} for name in ("build", "setuptools")),
    ]
    definition = {
        "buildType": BUILD,
        "externalParameters": {"command": "python .ci/release.py make", "commit": commit},
        "internalParameters": {"python": sys.version.split()[0]},
        "resolvedDependencies": inputs,
    }
    run = {"builder": {"id": BUILD}, "metadata": {"startedOn": started, "finishedOn": _now()}}
    predicate = {"buildDefinition": definition, "runDetails": run}
    return {"_type": STATEMENT, "subject": subjects, "predicateType": PREDICATE, "predicate": predicate}


def signed(told: Mapping[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """Return the DSSE envelope of a statement."""
    payload = json.dumps(told, sort_keys=True).encode()
    public = key.public_key().public_bytes_raw()
    signature = {"keyid": hashlib.sha256(public).hexdigest(), "sig": _base64(key.sign(_to_sign(payload)))}
    return {"payloadType": PAYLOAD, "payload": _base64(payload), "signatures": [signature]}


def faults(folder: Path, public: Ed25519PublicKey) -> list[str]:
    """Return what is wrong with a release; nothing if the key signed exactly what lies in the folder."""
    try:
        envelope = json.loads((folder / PROVENANCE).read_text())
        payload = base64.b64decode(envelope["payload"], validate=True)
        (signature,) = (base64.b64decode(each["sig"], validate=True) for each in envelope["signatures"])
        public.verify(signature, _to_sign(payload))
        told = json.loads(payload)
        wanted = {each["name"]: each["digest"]["sha256"] for each in told["subject"]}
    except InvalidSignature:
        return [f"{PROVENANCE}: another key signed it, or it was changed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{PROVENANCE}: cannot be read ({error})"]
    if (told["_type"], told["predicateType"], envelope["payloadType"]) != (STATEMENT, PREDICATE, PAYLOAD):
        return [f"{PROVENANCE}: is a statement of another kind"]
    found = {path.name: path for path in folder.iterdir() if path.name != PROVENANCE}
    missing = [f"{name}: is missing" for name in sorted(wanted.keys() - found.keys())]
    strange = [f"{name}: is not of this release" for name in sorted(found.keys() - wanted.keys())]
    both = sorted(wanted.keys() & found.keys())
    changed = [
        f"{name}: has other bytes than were signed" for name in both if digest(found[name]) != wanted[name]
    ]
    return missing + strange + changed


def digest(path: Path) -> str:
    """Return SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _to_sign(payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD), PAYLOAD.encode(), len(payload), payload)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def main(given: Sequence[str] | None = None) -> int:
    """Make or verify a release; return the exit code."""
    parser = argparse.ArgumentParser(description="A release of fedveil.")
    parser.add_argument("act", choices=("scan", "make", "verify"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--key", type=Path, help="private, Ed25519 in PEM")
    parser.add_argument("--public", type=Path, help="public, Ed25519 in PEM")
    asked = parser.parse_args(given)
    if asked.act == "scan":
        judgements = vex()
        unseen = "; ".join(each["value"] for each in judgements["metadata"]["properties"])
        said = f"{len(judgements['vulnerabilities'])} advisories, all judged in {JUDGED.name}"
        print(f"{said}; not looked up: {unseen}" if unseen else said)
        return 0
    path = asked.key if asked.act == "make" else asked.public
    if path is None or asked.folder is None:
        parser.error("make needs FOLDER and --key, verify needs FOLDER and --public")
    if asked.act == "make":
        passphrase = os.environ.get("FEDVEIL_PASSPHRASE")
        key = load_pem_private_key(path.read_bytes(), passphrase.encode() if passphrase else None)
        if not isinstance(key, Ed25519PrivateKey):
            parser.error(f"{path} is not an Ed25519 key")
        make(asked.folder, key)
    public = key.public_key() if asked.act == "make" else load_pem_public_key(path.read_bytes())
    if not isinstance(public, Ed25519PublicKey):
        parser.error(f"{path} is not an Ed25519 key")
    wrong = faults(asked.folder, public)
    print("\n".join(wrong) or f"{asked.folder}: whole, and signed by this key")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
