"""Co-signature of a roster by a member: a file for the authority, which other owners may require."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tomli_w

from ...base.durable_files import PUBLIC, replace_file
from ...base.refusal import Range, Refusal, refusing
from ...configs.bundle_files import Name, hexadecimal, read_toml
from ...privacy.secagg.roster import Roster, cosign, cosigned_by
from ...privacy.secagg.suite import KEY_BYTES, SIGNATURE_BYTES, public_of
from ...privacy.secagg.transcript import HASH_BYTES
from .client_bundle import ClientBundle
from .owner_policy import NEWEST_ROSTER


@dataclass(frozen=True)
class Cosignature:
    """Signature by the member `name`, whose key is `public`, of the roster of a version and a hash."""

    name: Name
    version: Annotated[int, Range(ge=1, le=NEWEST_ROSTER)]
    hash: Annotated[str, hexadecimal(HASH_BYTES)]
    public: Annotated[str, hexadecimal(KEY_BYTES)]
    signature: Annotated[str, hexadecimal(SIGNATURE_BYTES)]


def write_cosignature(bundle: ClientBundle, roster: Roster) -> Path:
    """Sign a roster with the device's identity; return the file, in its bundle.

    Raises:
      Refusal: it is neither the device's roster nor follows from it, or the file cannot be written.
    """
    current, key = bundle.identity.roster, bundle.identity.key
    if roster.hash != current.hash and not roster.follows(current):
        remedy = f"does not follow from version {current.version}, which this device has: ask the authority"
        raise Refusal("roster", f"version {roster.version}", remedy)
    public, signature = public_of(key).hex(), cosign(roster, key).hex()
    signed = Cosignature(bundle.settings.name, roster.version, roster.hash.hex(), public, signature)
    path = bundle.folder / f"cosignature-{roster.version}.toml"
    with refusing("folder", bundle.folder, "cannot be written"):
        replace_file(path, tomli_w.dumps(asdict(signed)).encode(), PUBLIC)
    return path


def read_cosignature(path: Path, roster: Roster) -> Cosignature:
    """Return a co-signature of this roster.

    Raises:
      Refusal: the file is not a co-signature, is for another roster, or its signature is invalid.
    """
    cosignature = read_toml(Cosignature, path)
    if (cosignature.version, cosignature.hash) != (roster.version, roster.hash.hex()):
        remedy = f"is for a roster other than this desk's version {roster.version}; ask {cosignature.name} to sign that"
        raise Refusal("cosignature", str(path), remedy)
    signatures = {bytes.fromhex(cosignature.public): bytes.fromhex(cosignature.signature)}
    if not cosigned_by(roster, signatures):
        remedy = f"was not made by the key that it names; ask {cosignature.name}"
        raise Refusal("cosignature", str(path), remedy)
    return cosignature
