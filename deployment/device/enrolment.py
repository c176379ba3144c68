"""Enrolment of a client: its keys, made on the device, and the request to admit their public keys."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_public_key,
)
from cryptography.x509.oid import NameOID

from ...base.durable_files import PUBLIC, replace_file, replace_files
from ...base.refusal import Form, Refusal, refusing
from ...configs.bundle_files import NAME, NAME_FORM, Name, hexadecimal, read_file, read_toml_text, spki
from ...privacy.secagg.double_signature import ML_DSA_KEY_BYTES, post_quantum_public
from ...privacy.secagg.suite import KEY_BYTES, SIGNATURE_BYTES, public_of, sign, verify
from ...privacy.secagg.transcript import Purpose, digest, frame

REQUEST = "request.toml"
IDENTITY, TLS, SUPERNODE = PRIVATE = ("identity.key", "tls.key", "supernode.key")
PEM = Form(
    "-----BEGIN CERTIFICATE REQUEST-----[A-Za-z0-9+/=\n]{1,4000}-----END CERTIFICATE REQUEST-----\n?",
    "must be a certificate request in PEM",
    printable=False,
)
_CONTEXT = digest(Purpose.ENROLMENT)


@dataclass(frozen=True)
class Enrolment:
    """Public keys of a client, which the authority admits.

    Attributes:
      name: of the client.
      identity: Ed25519, 32 bytes, for secure aggregation.
      tls: P-256, for the gRPC link.
      supernode: P-384 in OpenSSH's form, for Flower's link.
      post_quantum: ML-DSA-65, for secure aggregation by suite 3; empty in older requests.
    """

    name: str
    identity: bytes
    tls: EllipticCurvePublicKey
    supernode: str
    post_quantum: bytes = field(default=b"", repr=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the SubjectPublicKeyInfo of the key for TLS, in hexadecimal."""
        return hashlib.sha256(spki(self.tls)).hexdigest()

    @property
    def supernode_fingerprint(self) -> str:
        """SHA-256 of the key for Flower as a SuperNode sends it, in hexadecimal."""
        public = load_ssh_public_key(self.supernode.encode())
        return hashlib.sha256(
            public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        ).hexdigest()


@dataclass(frozen=True)
class Request:
    """Content of the file request.toml: the keys of an `Enrolment` as text, signed by the first."""

    name: Name
    identity: Annotated[str, hexadecimal(KEY_BYTES)]
    tls: Annotated[str, PEM]
    supernode: str
    signature: Annotated[str, hexadecimal(SIGNATURE_BYTES)]
    post_quantum: str | None = None


@dataclass(frozen=True)
class Keys:
    """Private keys of a client, for the same purposes as in `Enrolment`."""

    identity: Ed25519PrivateKey = field(repr=False)
    tls: EllipticCurvePrivateKey = field(repr=False)
    supernode: EllipticCurvePrivateKey = field(repr=False)

    def enrolment(self, name: str) -> Enrolment:
        """Return the public keys."""
        supernode = self.supernode.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        second = post_quantum_public(self.identity)
        return Enrolment(name, public_of(self.identity), self.tls.public_key(), supernode.decode(), second)


def make_keys(folder: Path) -> Keys:
    """Return new keys from the system's generator, written to files in `folder` that only their owner may read."""
    keys = Keys(Ed25519PrivateKey.generate(), new_tls_key(), generate_private_key(SECP384R1()))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    openssh = keys.supernode.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    replace_files(folder, {IDENTITY: pem_of(keys.identity), TLS: pem_of(keys.tls), SUPERNODE: openssh})
    return keys


def new_tls_key() -> EllipticCurvePrivateKey:
    """Return a new key for TLS, on P-256 because gRPC's library does not support Ed25519."""
    return generate_private_key(SECP256R1())


def pem_of(key: Ed25519PrivateKey | EllipticCurvePrivateKey) -> bytes:
    """Return a private key in PEM."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def write_request(folder: Path, name: str) -> Path:
    """Generate keys and the request to admit them; return the request's file.

    Raises:
      Refusal: the name is invalid, the folder already holds keys, or it cannot be written.
    """
    if not NAME.fullmatch(name):
        raise Refusal("name", name, f"must be {NAME_FORM}")
    if any((folder / each).exists() for each in PRIVATE):
        raise Refusal("folder", str(folder), "already holds keys; name another folder for new ones")
    with refusing("folder", folder, "cannot be written"):
        keys = make_keys(folder)
        replace_file(folder / REQUEST, tomli_w.dumps(_request(keys, name)).encode(), PUBLIC)
    return folder / REQUEST


def read_request(path: Path) -> Enrolment:
    """Return the public keys that a request asks to admit.

    Raises:
      Refusal: the file is not a request, or one of its signatures is not by the key that it names.
    """
    return parse_request(read_file(path), str(path))


def parse_request(data: bytes, where: str) -> Enrolment:
    """Return the public keys in the bytes of a request, as of `read_request`; a refusal says `where` they came from."""
    request = read_toml_text(Request, data, where)
    identity, second_key = bytes.fromhex(request.identity), request.post_quantum or ""
    try:
        signed = [request.name, request.identity, request.tls, request.supernode]
        signed += [second_key] if second_key else []
        verify(identity, _CONTEXT, _body(*signed), bytes.fromhex(request.signature))
        post_quantum = bytes.fromhex(second_key)
        if len(post_quantum) not in (0, ML_DSA_KEY_BYTES):
            raise ValueError("its ML-DSA key has the wrong length")
        certificate = x509.load_pem_x509_csr(request.tls.encode())
        public, is_self_signed = certificate.public_key(), certificate.is_signature_valid
        node = load_ssh_public_key(request.supernode.encode())
    except Exception as error:  # noqa: BLE001 (cryptography's readers document no closed set)
        raise Refusal("request", where, f"is damaged ({error}); make another on the device") from None
    curves = [key.curve for key in (public, node) if isinstance(key, EllipticCurvePublicKey)]
    if [type(curve) for curve in curves] != [SECP256R1, SECP384R1] or not is_self_signed:
        raise Refusal("request", where, "holds keys of other kinds, or keys of another device; make another")
    tls = cast(EllipticCurvePublicKey, public)
    return Enrolment(request.name, identity, tls, request.supernode, post_quantum)


def _request(keys: Keys, name: str) -> dict[str, str]:
    """Return the fields of a `Request`; its certificate request bears the signature of the key for TLS."""
    public = keys.enrolment(name)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    tls = builder.sign(keys.tls, SHA256()).public_bytes(Encoding.PEM).decode()
    fields = {"name": name, "identity": public.identity.hex(), "tls": tls, "supernode": public.supernode}
    if public.post_quantum:
        fields["post_quantum"] = public.post_quantum.hex()
    return {**fields, "signature": sign(keys.identity, _CONTEXT, _body(*fields.values())).hex()}


def _body(*request: str) -> bytes:
    """Return what the identity signs: the fields before the signature, in their order."""
    return frame(Purpose.ENROLMENT, *request)
