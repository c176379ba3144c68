"""An authority whose keys are on a PKCS#11 token, SoftHSM's: they are made there, sign there, and lie in no file."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedveil.base.refusal import Refusal
from fedveil.deployment.device.client_bundle import read_client_bundle
from fedveil.deployment.device.enrol import enrol
from fedveil.deployment.enrolment import approve, issue_tokens
from fedveil.deployment.provision import provision, renew, revoke
from fedveil.deployment.token_keys import TokenChoice, _pin, token_keys
from fedveil.links.server_bundle import read_server_bundle

LIBRARIES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so")
FEDERATION = """\
federation: hearts
server: {{address: "localhost:8443"}}
task: {{name: digits}}
policy: {{target_epsilon: 8.0, target_delta: 1e-5}}
authority: {{pkcs11: "{module}", token: {label}}}
clients: [{{name: a}}, {{name: b}}, {{name: c}}]
"""


def test_a_token_without_its_package_or_library_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "federation.yaml"
    file.write_text(FEDERATION.format(module=tmp_path / "none.so", label="hearts"))
    monkeypatch.setenv("FEDVEIL_PIN", "98765")
    with pytest.raises(Refusal, match=r"needs the package python-pkcs11|cannot be loaded|cannot be used"):
        provision(file, tmp_path / "hearts", None)
    assert not (tmp_path / "hearts").exists()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the library of a token labelled hearts, with the PIN 98765."""
    pytest.importorskip("pkcs11")
    tool = os.environ.get("SOFTHSM2_UTIL") or shutil.which("softhsm2-util")
    found = [each for each in (os.environ.get("SOFTHSM2_MODULE", ""), *LIBRARIES) if Path(each).is_file()]
    if not tool or not found:
        pytest.skip("SoftHSM is not installed: apt-get install softhsm2")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm2.conf").write_text(f"directories.tokendir = {tmp_path / 'tokens'}\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "softhsm2.conf"))
    monkeypatch.setenv("FEDVEIL_PIN", "98765")
    made = [tool, "--init-token", "--free", "--label", "hearts", "--so-pin", "1234567890", "--pin", "98765"]
    subprocess.run([*made, "--module", found[0]], check=True, capture_output=True)
    return found[0]


def test_an_authority_on_a_token_provisions_and_revokes(module: str, tmp_path: Path) -> None:
    file = tmp_path / "federation.yaml"
    file.write_text(FEDERATION.format(module=module, label="hearts"))
    out = provision(file, tmp_path / "hearts", None).folder
    assert not list((out / "authority").glob("*.key")) and (out / "authority" / "ca.pem").exists()
    assert revoke(out, ["c"]).register.version == 2
    assert [each.name for each in read_server_bundle(out / "server").roster.members] == ["a", "b"]
    assert read_client_bundle(out / "clients" / "a").identity.roster.version == 2
    signer, ca = token_keys(TokenChoice(module, "hearts"), "hearts", make=False)
    for key in (signer, ca):
        with pytest.raises(NotImplementedError, match="never leaves"):
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(Refusal, match="cannot be used"):
        token_keys(TokenChoice(module, "hearts"), "others", make=False)
    with pytest.raises(Refusal, match="cannot be used"):
        token_keys(TokenChoice(module, "nobody's"), "hearts", make=False)


def test_a_device_enrols_with_an_authority_on_a_token_of_pkcs11(
    module: str, provisioned: Callable[[str], Path], enrolling: Callable[..., Any], tmp_path: Path
) -> None:
    """By the one-time token of an enrolment, approved, renewed and revoked by keys that nobody ever reads."""
    own = '"localhost:{link}", listen: "127.0.0.1:{link}", enrolment: "localhost:{port}"'
    text = FEDERATION.replace('"localhost:8443"', own).replace("{{name: c}}", "{{name: c-*}}")
    desk = provisioned(text.replace("{module}", module).replace("{label}", "hearts"))
    assert not list((desk / "authority").glob("*.key"))
    (token,) = issue_tokens(desk, ["c-1"])
    device = tmp_path / "device"
    with enrolling(desk):
        assert not enrol(token, device, wait=0, notify=lambda _: None)
        assert approve(desk).admitted == ("c-1",)
        assert enrol(token, device, wait=0, notify=lambda _: None)
    bundle = read_client_bundle(device)
    assert bundle.settings.name == "c-1" and bundle.identity.roster.version == 2
    assert renew(desk, ["c-1"], within=400).register.find("c-1") is not None
    assert revoke(desk, ["c-1"]).register.version == 4


def test_missing_pin_is_requested_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDVEIL_PIN", raising=False)
    with pytest.raises(Refusal, match="requires a PIN; set FEDVEIL_PIN"):
        _pin(TokenChoice("libsofthsm2.so", "hearts"))
