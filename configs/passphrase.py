"""Encryption of private keys under a passphrase: PKCS#8 in PEM, with a key derived by scrypt.

`cryptography` reads this format, but writes only PBKDF2 with 2048 rounds, by which a guess takes a millisecond.
"""

import os
from binascii import a2b_base64
from ssl import DER_cert_to_PEM_cert

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

# OWASP's password storage cheat sheet: each guess takes 16 MiB five times, the most that the command openssl accepts.
COST, BLOCK_SIZE, PARALLELISM, KEY_BYTES, SALT_BYTES = 1 << 14, 8, 5, 32, 16
AES_BLOCK_BITS = 128  # FIPS 197
# Object identifiers of PBES2 (RFC 8018), scrypt (RFC 7914) and AES-256-CBC; tags of ASN.1.
PBES2, SCRYPT, AES = map(bytes.fromhex, ("2a864886f70d01050d", "2b06010401da47040b", "60864801650304012a"))
SEQUENCE, INTEGER, OCTETS, IDENTIFIER = 0x30, 0x02, 0x04, 0x06


def encrypted(key: Ed25519PrivateKey | EllipticCurvePrivateKey | MLDSA65PrivateKey, secret: bytes) -> bytes:
    """Return a private key in PEM, encrypted under a passphrase (`secret`)."""
    salt, iv = os.urandom(SALT_BYTES), os.urandom(AES_BLOCK_BITS // 8)
    derived = Scrypt(salt, KEY_BYTES, n=COST, r=BLOCK_SIZE, p=PARALLELISM).derive(secret)
    padder, cipher = PKCS7(AES_BLOCK_BITS).padder(), Cipher(AES256(derived), CBC(iv)).encryptor()
    plain = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    body = cipher.update(padder.update(plain) + padder.finalize()) + cipher.finalize()
    # EncryptedPrivateKeyInfo of RFC 5958, with the parameters of PBES2 (RFC 8018) and scrypt (RFC 7914).
    numbers = (_integer(each) for each in (COST, BLOCK_SIZE, PARALLELISM, KEY_BYTES))
    derivation = _der(SEQUENCE, _der(IDENTIFIER, SCRYPT), _der(SEQUENCE, _der(OCTETS, salt), *numbers))
    encryption = _der(SEQUENCE, _der(IDENTIFIER, AES), _der(OCTETS, iv))
    algorithm = _der(SEQUENCE, _der(IDENTIFIER, PBES2), _der(SEQUENCE, derivation, encryption))
    # ssl encodes any DER in base64 between lines that name a certificate; the name is replaced.
    text = DER_cert_to_PEM_cert(_der(SEQUENCE, algorithm, _der(OCTETS, body)))
    return text.replace("CERTIFICATE", "ENCRYPTED PRIVATE KEY").encode()


def is_scrypt(pem: bytes) -> bool:
    """Return whether a private key in PEM is encrypted as `encrypted` does it; earlier releases used PBKDF2."""
    return SCRYPT in a2b_base64(b"".join(pem.split(b"-----")[2:3]))


def _integer(number: int) -> bytes:
    return _der(INTEGER, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _der(tag: int, *parts: bytes) -> bytes:
    """Return an element of DER (X.690): tag, length of the parts, parts; a length from 128 on has a first byte of its own."""
    body = b"".join(parts)
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8 or 1, "big")
    return bytes([tag, *([] if len(body) < 0x80 else [0x80 | len(size)]), *size]) + body
