"""What a release rests on: locks that name bytes, a bill of materials, and a signed statement that a stranger can check."""

import base64
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedveil.deployment.requirements import wheel_requirements

ROOT = Path(__file__).parents[1]
EXTRAS = {
    "containers/client.lock": ("client", "tables"),
    "containers/server.lock": ("simulation",),
    ".ci/dev.lock": ("dev",),
}


def load() -> Any:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release = load()


def asked_by(extras: tuple[str, ...]) -> list[Requirement]:
    """What these extras ask for by name, those that they are made of included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, left = [Requirement(each) for each in project["dependencies"]], list(extras)
    while left:
        for each in map(Requirement, project["optional-dependencies"][left.pop()]):
            left += each.extras if each.name == "fedveil" else []
            found += [] if each.name == "fedveil" else [each]
    return found


@pytest.mark.parametrize("name", EXTRAS)
def test_a_lock_holds_all_that_its_extras_ask_for_and_a_hash_for_each(name: str) -> None:
    text = (ROOT / name).read_text()
    blocks = [each for each in re.split(r"\n(?=[a-z0-9])", text) if not each.startswith("#")]
    locked: dict[str, list[str]] = {}
    for block in blocks:
        found = re.match(r"([a-z0-9._-]+)==(\S+)", block)
        assert found is not None and "--hash=sha256:" in block, block[:60]
        locked.setdefault(canonicalize_name(found[1]), []).append(found[2])
    assert "fedveil" not in locked
    for each in asked_by(EXTRAS[name]):
        versions = locked[canonicalize_name(each.name)]
        assert any(each.specifier.contains(version) for version in versions), f"{each}; run: bash .ci/lock"


@pytest.fixture(scope="module")
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture
def folder(tmp_path: Path, key: Ed25519PrivateKey) -> Path:
    made = tmp_path / "release"
    made.mkdir()
    (made / "fedveil-0.1.0-py3-none-any.whl").write_bytes(b"a wheel")
    (made / "fedveil-0.1.0.tar.gz").write_bytes(b"a source")
    told = release.statement(made, "0" * 40, "2026-01-01T00:00:00Z")
    (made / "provenance.json").write_text(json.dumps(release.signed(told, key)))
    return made


def change(folder: Path, **fields: object) -> None:
    """Change the statement and leave its signature."""
    path = folder / "provenance.json"
    envelope = json.loads(path.read_text())
    told = json.loads(base64.b64decode(envelope["payload"])) | fields
    path.write_text(json.dumps({**envelope, "payload": base64.b64encode(json.dumps(told).encode()).decode()}))


def test_release_is_whole_and_signed_or_names_its_fault(folder: Path, key: Ed25519PrivateKey) -> None:
    public = key.public_key()
    assert release.faults(folder, public) == []
    (folder / "more.whl").write_bytes(b"")
    assert release.faults(folder, public) == ["more.whl: is not of this release"]
    (folder / "more.whl").unlink()
    (folder / "fedveil-0.1.0.tar.gz").write_bytes(b"another source")
    assert release.faults(folder, public) == ["fedveil-0.1.0.tar.gz: has other bytes than were signed"]
    (folder / "fedveil-0.1.0.tar.gz").unlink()
    assert release.faults(folder, public) == ["fedveil-0.1.0.tar.gz: is missing"]
    other = Ed25519PrivateKey.generate().public_key()
    assert release.faults(folder, other) == ["provenance.json: another key signed it, or it was changed"]
    change(folder, subject=[])
    assert release.faults(folder, public) == ["provenance.json: another key signed it, or it was changed"]
    (folder / "provenance.json").write_text("{}")
    assert release.faults(folder, public)[0].startswith("provenance.json: cannot be read")


def test_packages_of_the_checks_are_locked_by_hash() -> None:
    """Every line that installs requires hashes, but for the checkout itself, which brings nothing along."""
    text = (ROOT / ".ci" / "run").read_text()
    assert "--no-deps --no-build-isolation" in text and text.count("-m pip install") == 1
    lines = [line for line in text.splitlines() if re.search(r"(?<!pip )\binstall\b (?!\(\))", line)]
    bare = [line for line in lines if "--require-hashes" not in line and not line.startswith("#")]
    assert [line.strip() for line in bare if not line.startswith("install()")] == ["install --editable ."]
    for name in ("alone", "torch"):
        blocks = (ROOT / ".ci" / f"{name}.lock").read_text().replace("\\\n", "").splitlines()
        assert all(line.startswith("#") or "--hash=sha256:" in line for line in blocks)


@pytest.mark.parametrize(
    ("why", "codes"),
    [
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", ["setuptools", "torch.lock", "cuda"]),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", ["setuptools", "torch.lock"]),
        ("ERROR: No space left on device", ["setuptools", "torch.lock"]),
    ],
)
def test_checks_take_another_torch_only_without_a_cuda_free_one(
    tmp_path: Path, why: str, codes: list[str]
) -> None:
    """A hash that does not match is an error, and no reason to load another build, unseen."""
    (tmp_path / "bin").mkdir()
    python, log = tmp_path / "bin" / "python", tmp_path / "log"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in\n'
        f"*torch.lock*) echo torch.lock >> {log}; echo '{why}' >&2; exit 1;;\n"
        f"*) if grep -q ^setuptools= {tmp_path}/lock; then echo setuptools >> {log}; else echo cuda >> {log}; exit 9; fi;;\n"
        "esac\n"
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / ".ci" / "run")],
        env={**os.environ, "FEDVEIL_VENV": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert log.read_text().split() == codes
    assert done.returncode == (9 if "cuda" in codes else 1) and (why in done.stderr) is ("cuda" not in codes)


def test_the_locks_say_where_the_checks_run_another_torch() -> None:
    found = [
        re.search(r"^torch==([0-9.]+)", (ROOT / ".ci" / f"{name}.lock").read_text(), re.MULTILINE)
        for name in ("torch", "dev")
    ]
    without, others = (each[1] for each in found if each is not None)
    assert f"torch {without} without CUDA, in place of PyPI's {others}" in (ROOT / "SECURITY.md").read_text()


AUDITED = {
    "dependencies": [
        {"name": "torch", "version": "2.10.0", "vulns": [{"id": "PYSEC-1", "fix_versions": []}]},
        {"name": "sympy", "version": "1.14", "vulns": []},
        {"name": "local", "skip_reason": "is on no index"},
    ]
}


def test_release_states_each_advisory_and_the_gaps_of_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    audit, judged = tmp_path / "audit", tmp_path / "advisories.json"
    monkeypatch.setattr(release, "AUDIT", (str(audit),))
    monkeypatch.setattr(release, "JUDGED", judged)
    judged.write_text("{}")
    found = release.vex()
    assert found["vulnerabilities"] == [] and "pip-audit is not installed" in capsys.readouterr().err
    assert found["metadata"]["properties"][0]["value"] == "pip-audit is not installed"
    assert release.main(["scan"]) == 0
    assert "not looked up: pip-audit is not installed" in capsys.readouterr().out
    audit.write_text("#!/bin/sh\necho 'no service answers' >&2; exit 1\n")
    audit.chmod(0o755)
    release.vex()
    assert "client.lock: no service answers" in capsys.readouterr().err
    audit.write_text(f"#!/bin/sh\necho '{json.dumps(AUDITED)}'; exit 1\n")
    with pytest.raises(SystemExit, match=r"does not judge PYSEC-1 \(pkg:pypi/torch@2\.10\.0\)"):
        release.vex()
    judgement = {"state": "not_affected", "justification": "code_not_reachable", "detail": "is not called"}
    judged.write_text(json.dumps({"PYSEC-1": judgement}))
    (statement,) = release.vex()["vulnerabilities"]
    assert statement == {
        "id": "PYSEC-1",
        "affects": [{"ref": "pkg:pypi/torch@2.10.0"}],
        "analysis": judgement,
    }
    assert "client.lock: 1 of 3 packages (is on no index)" in capsys.readouterr().err


def commands() -> str:
    """The commands by which SECURITY.md checks a release without fedveil."""
    found = re.search(r"```bash\n(python3 - .*?)```", (ROOT / "SECURITY.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_commands_of_security_md_check_a_release_without_our_code(
    folder: Path, key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "release.pub").write_bytes(public)

    def check() -> subprocess.CompletedProcess[str]:
        command = ["bash", "-ec", commands()]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = check()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Signature Verified Successfully" in done.stdout and done.stdout.count(": OK") == 2
    (folder / "fedveil-0.1.0.tar.gz").write_bytes(b"another source")
    assert check().returncode != 0


def install(folder: Path, release: Path) -> None:
    """Install a release's wheels as a device does, and not one that was changed behind the hash."""
    (folder / "wheels").mkdir()
    copied, privacy = (Path(shutil.copy(each, folder / "wheels")) for each in sorted(release.glob("*.whl")))
    assert privacy.name.startswith("fedveil_privacy-")
    (folder / "requirements.txt").write_text(wheel_requirements(folder / "wheels"))
    options = ("--quiet", "--no-deps", "--no-index", "--require-hashes", "--target", "site")
    command = [sys.executable, "-m", "pip", "install", *options, "-r", "requirements.txt"]

    def installed() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    done = installed()
    assert done.returncode == 0, done.stderr
    modules = {path.relative_to(folder / "site").as_posix() for path in (folder / "site").rglob("*.py")}
    assert {
        "fedveil/__init__.py",
        "fedveil/privacy/plan.py",
        "fedveil/base/refusal.py",
        "fedveil/face.py",
    } < modules
    shutil.rmtree(folder / "site")
    copied.write_bytes(copied.read_bytes() + b"x")
    done = installed()
    assert done.returncode != 0 and "Expected sha256" in done.stderr and not (folder / "site").exists()


@pytest.mark.campaign
def test_release_command_makes_a_verifiable_release(tmp_path: Path, key: Ed25519PrivateKey) -> None:
    pytest.importorskip("cyclonedx_py")
    tree = tmp_path / "tree"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tree)], check=True)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "release.key").write_bytes(private)
    wheels: list[list[bytes]] = []
    for place in ("one", "two"):
        command = [sys.executable, str(tree / ".ci" / "release.py"), "make", str(tmp_path / place)]
        done = subprocess.run(
            [*command, "--key", str(tmp_path / "release.key")], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        wheels.append([path.read_bytes() for path in sorted((tmp_path / place).glob("*.whl"))])
    assert wheels[0] == wheels[1]  # anyone can build them again and compare
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {"requirements-client.txt", "requirements-server.txt", "provenance.json", "vex.cdx.json"} < names
    bill = json.loads((tmp_path / "one" / "sbom-client.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX" and bill["metadata"]["component"]["name"] == "fedveil"
    locked = re.findall(r"^([a-z0-9._-]+)==", (ROOT / "containers/client.lock").read_text(), re.MULTILINE)
    assert sorted(each["name"] for each in bill["components"]) == sorted(locked)
    install(tmp_path, tmp_path / "one")
    (tree / "more.txt").write_text("not in a commit")
    done = subprocess.run(
        [*command, "--key", str(tmp_path / "release.key")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "the checkout has changes that no commit holds" in done.stderr
