"""Enrolments at the authority's desk: it issues tokens, and admits requests under them.

The server transports both and can forge neither. A request is sealed under a key of its token that the server never
sees, and the desk's answer is signed by the authority for the keys of that device.
"""

import hmac
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..base.bounded_decoding import build, read_json
from ..base.durable_files import replace_file
from ..base.refusal import Refusal
from ..configs.bundle_files import NAME, NAME_FORM, read_file
from ..links.enrolment.server_end import QUEUE, TOKENS, OpenToken, queue_stem
from ..links.enrolment.token import SECRET_BYTES, Token, fingerprint_of, lock_of, seal_of
from ..links.server_bundle import SERVER
from ..privacy.secagg.suite import derive
from ..privacy.secagg.transcript import Purpose, frame
from .device.admission import write_admission
from .device.enrolment import Enrolment, parse_request
from .provision import AUTHORITY, Desk, admit, check_request, open_desk, publish, requirements_of
from .write_bundles import client_files

HOURS, MAX_HOURS = 24, 24 * 30  # of a token: by default, and at most
SEAL_BYTES = 32  # at the start of a request's file
ISSUED_TOKENS = "tokens.json"  # in the authority's folder, with the keys that seal, encrypted
NONCE_BYTES = 12


@dataclass(frozen=True)
class IssuedToken:
    """Issued token, as stored at the desk.

    Attributes:
      lock: hash by which the server knows the token; see `lock_of`.
      seal: the key that seals the request, in hexadecimal, secret; in the file it is encrypted.
      end: Unix second.
      answered: whether a device was admitted by it.
    """

    lock: str
    seal: str
    end: int
    answered: bool = False


@dataclass(frozen=True)
class Approval:
    """Result for the requests under open tokens.

    Attributes:
      desk: as published, with the admitted devices.
      admitted: names of the admitted devices.
      refused: why a request was refused, by name.
      silent: names whose open tokens have no request yet.
    """

    desk: Desk
    admitted: tuple[str, ...]
    refused: Mapping[str, str]
    silent: tuple[str, ...]


def issue_tokens(folder: Path, names: Sequence[str], hours: float = HOURS) -> list[Token]:
    """Store and return one new token for each name; an earlier one of that name ends.

    Args:
      folder: that `provision` made.
      names: of clients in `federation.yaml`, or that fit a pattern there; an admitted one gets new keys.
      hours: until the tokens end.

    Raises:
      Refusal: a name has no place in the federation, or the federation no port for enrolments.
    """
    if not 0 < hours <= MAX_HOURS:
        raise Refusal("hours", hours, f"must be above 0 and at most {MAX_HOURS}")
    with open_desk(folder) as desk:
        port = desk.federation.content.server.enrolment_addresses
        if port is None:
            remedy = "has no port for enrolments; give server.enrolment: HOST:PORT, and provision again"
            raise Refusal("federation", desk.federation.name, remedy)
        names = tuple(dict.fromkeys(names))
        for name in names:
            _check_name(desk, name)
        fingerprint = fingerprint_of(
            desk.authority.ca_pem, desk.authority.public(desk.federation.content.post_quantum)
        )
        end = int(time.time() + hours * 3600)
        tokens = [Token(port.address, name, end, fingerprint, os.urandom(SECRET_BYTES)) for name in names]
        issued = {name: each for name, each in _read_tokens(desk).items() if each.end >= time.time()}
        for each in tokens:
            issued[each.name] = IssuedToken(lock_of(each.port_key), each.seal_key.hex(), end)
        _write_tokens(desk, issued)
        return tokens


def approve(folder: Path, names: Sequence[str] = ()) -> Approval:
    """Admit the devices with requests under open tokens, and write the answers for their server to deliver.

    Args:
      folder: that `provision` made; the server's part of it holds requests and answers.
      names: of clients; none stands for all.

    Raises:
      Refusal: a name has no open token.
    """
    with open_desk(folder) as desk:
        tokens = _read_tokens(desk)
        for name in names:
            if name not in tokens:
                raise Refusal("name", name, "has no token; create one with fedveil provision token")
        requests: dict[str, Enrolment] = {}
        refused: dict[str, str] = {}
        without_request: list[str] = []
        for name, token in tokens.items():
            if token.answered or (names and name not in names):
                continue
            try:
                request = _request_under(desk, name, token)
            except Refusal as refusal:
                refused[name] = str(refusal)
                continue
            if request is None:
                without_request.append(name)
                continue
            requests[name] = request
            client = desk.register.find(name)
            # An admitted client with these keys is of an approval that was interrupted after the register.
            if client is None or client.identity != request.identity.hex():
                desk = admit(desk, name, request, by_token=True)
        desk = publish(desk)
        for name, enrolment in requests.items():
            _answer(desk, name, tokens[name], enrolment)
        _write_tokens(desk, tokens | {name: replace(tokens[name], answered=True) for name in requests})
        return Approval(desk, tuple(requests), refused, tuple(without_request))


def end_tokens(desk: Desk) -> None:
    """End all tokens, as a rollover does: each names the authority before."""
    _write_tokens(desk, {})


def _check_name(desk: Desk, name: str) -> None:
    """Check that a name is of one client in the federation: no pattern, not the server, and not revoked."""
    if not NAME.fullmatch(name) or name == SERVER:
        raise Refusal("name", name, f"must name one client, {NAME_FORM}")
    if desk.federation.entry(name) is None:
        remedy = "is not in federation.yaml; add an entry, or a pattern such as name: 'sensor-*'"
        raise Refusal("name", name, f"{remedy}, and provision again")
    client = desk.register.find(name)
    if client is not None and client.revoked:
        raise Refusal("name", name, "was revoked; admit the device under another name")


def _request_under(desk: Desk, name: str, token: IssuedToken) -> Enrolment | None:
    """Return the keys in the request under a token; None without a request.

    Raises:
      Refusal: the token has expired, or its holder did not request these keys.
    """
    path_stem = queue_stem(desk.folder / SERVER, name, token.lock)
    path = path_stem.with_name(f"{path_stem.name}.request")
    if not path.exists():
        return None
    if time.time() > token.end:
        raise Refusal("token", name, "has expired; create another")
    _check_name(desk, name)
    content = read_file(path)
    seal, request = content[:SEAL_BYTES], content[SEAL_BYTES:]
    if not hmac.compare_digest(seal, seal_of(bytes.fromhex(token.seal), request)):
        remedy = "was not sealed with the token; investigate, and create another token"
        raise Refusal("request", name, remedy)
    enrolment = parse_request(request, str(path))
    check_request(name, enrolment, desk.federation.content.post_quantum)
    desk.register.refuse_shared([enrolment])
    return enrolment


def _answer(desk: Desk, name: str, token: IssuedToken, enrolment: Enrolment) -> None:
    """Put the bundle of an admitted client into the server's queue, signed for its keys."""
    issued = desk.register.find(name)
    assert issued is not None
    files = client_files(desk.federation, desk.authority, desk.register, issued, requirements_of(desk))
    path_stem = queue_stem(desk.folder / SERVER, name, token.lock)
    doubly = desk.register.post_quantum
    answer = write_admission(desk.authority.signer, name, enrolment.identity, files, doubly=doubly)
    replace_file(path_stem.with_name(f"{path_stem.name}.answer"), answer)


def _cipher(desk: Desk) -> AESGCM:
    """Return the cipher of the keys that seal; its key is derived from a signature of the authority."""
    return AESGCM(
        derive(desk.authority.signer.sign(frame(Purpose.TOKEN, "desk")), frame(Purpose.TOKEN, "keys"))
    )


def _write_tokens(desk: Desk, tokens: Mapping[str, IssuedToken]) -> None:
    """Write the list of tokens for the desk and for the server, and remove requests under other tokens."""
    folder, cipher = desk.folder, _cipher(desk)
    sealed: dict[str, object] = {}
    for name, each in tokens.items():
        nonce = os.urandom(NONCE_BYTES)
        ciphertext = nonce + cipher.encrypt(nonce, bytes.fromhex(each.seal), each.lock.encode())
        sealed[name] = asdict(replace(each, seal=ciphertext.hex()))
    replace_file(folder / AUTHORITY / ISSUED_TOKENS, (json.dumps(sealed, indent=1) + "\n").encode())
    open_tokens = {name: asdict(OpenToken(each.lock, each.end)) for name, each in tokens.items()}
    replace_file(folder / SERVER / TOKENS, (json.dumps(open_tokens, indent=1) + "\n").encode())
    names = {queue_stem(folder / SERVER, name, each.lock).name for name, each in tokens.items()}
    queue = folder / SERVER / QUEUE
    queue.mkdir(mode=0o700, exist_ok=True)
    for path in queue.iterdir():
        if path.stem not in names and (
            path.is_symlink() or not path.is_dir()
        ):  # the server may write anything there
            path.unlink(missing_ok=True)  # the port may remove it meanwhile


def _read_tokens(desk: Desk) -> dict[str, IssuedToken]:
    """Return the issued tokens by name, their keys decrypted."""
    path, cipher = desk.folder / AUTHORITY / ISSUED_TOKENS, _cipher(desk)
    if not path.exists():
        return {}
    try:
        tokens = {name: build(IssuedToken, each) for name, each in read_json(read_file(path)).items()}
        return {name: replace(each, seal=_decrypt_seal(cipher, each).hex()) for name, each in tokens.items()}
    except InvalidTag:
        remedy = "is of another authority, or was changed; remove it, and create the open tokens anew"
        raise Refusal("file", str(path), remedy) from None
    except (ValueError, AttributeError) as error:
        raise Refusal("file", str(path), f"cannot be read ({error}); restore it from a backup") from None


def _decrypt_seal(cipher: AESGCM, token: IssuedToken) -> bytes:
    """Return the key that seals, 32 bytes; an earlier release wrote it unencrypted."""
    content = bytes.fromhex(token.seal)
    if len(content) == SECRET_BYTES:
        return content
    return cipher.decrypt(content[:NONCE_BYTES], content[NONCE_BYTES:], token.lock.encode())
