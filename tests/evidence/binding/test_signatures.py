"""Signatures of bundles: both algorithms, keys of other programs, and what nobody signs."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from shared.bundles import Signed, write_signatures, wrong

from fedveil.base.refusal import Refusal
from fedveil.cli.report import key, sign
from fedveil.configs.passphrase import is_scrypt
from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.signatures import (
    PASSPHRASE,
    read_key,
    read_public,
    read_signatures,
)
from fedveil.evidence.binding.verify import verify_folder

pytestmark = pytest.mark.usefixtures("without_jinja")


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


def test_both_algorithms_sign_and_both_are_checked(copy: Path, signed: Signed) -> None:
    first, second = read_signatures(copy)
    assert set(first.signatures) == {"ed25519", "ml-dsa-65"} and set(second.signatures) == {"ed25519"}
    for name in first.signatures:
        bad = {**first.signatures, name: ("00" * 64 if name == "ed25519" else "00" * 3309)}
        write_signatures(copy, [replace(first, signatures=bad), second])
        assert f"is not valid under {name}" in wrong(verify_folder(copy, Knowledge()))["signatures"]
    left = {name: first.signatures[name] for name in ("ed25519",)}
    write_signatures(copy, [replace(first, signatures=left, keys={"ed25519": first.keys["ed25519"]}), second])
    assert "signature 1" in wrong(verify_folder(copy, Knowledge()))["signatures"]


def test_invalid_statement_is_signed_by_nobody(copy: Path, signed: Signed) -> None:
    (copy / "model.safetensors").write_bytes(b"another")
    with pytest.raises(Refusal, match=r"model\.safetensors differs from the bundled file"):
        sign(copy, "auditor", [signed.keys / "stranger"], None)
    for role, day in (("", None), ("a\nb", None), ("auditor", "tomorrow")):
        with pytest.raises(Refusal):
            sign(signed.bundle, role, [signed.keys / "stranger"], day)
    with pytest.raises(Refusal, match="at most one of each"):
        sign(signed.bundle, "auditor", [signed.keys / "stranger", signed.keys / "officer"], None)


def test_a_key_that_has_not_signed_is_named(signed: Signed) -> None:
    stranger = read_public(str(signed.keys / "stranger.pub"))
    said = wrong(verify_folder(signed.bundle, Knowledge((stranger,))))
    assert said == {"signatures": f"the key {stranger[:16]} has not signed, nor the roster of receipts.json"}
