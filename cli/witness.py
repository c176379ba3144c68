"""``fedveil client witness``: the co-signature of a log's head by a party that follows the log."""

import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..base.refusal import Refusal, refusing
from ..configs.bundle_files import LARGEST_FILE, read_file
from ..evidence.binding.signatures import read_key
from ..links.log_export import log_in
from ..links.witness import contradiction, cosign_log, heads_of_key
from ..privacy.ledger.folder_lock import alone

FORKED = 1
STANDARD_INPUT = Path("-")


def cosign(log: Path, key: Path, ca: Path) -> int:
    """Print a witness's co-signature of a log's head; return 1, and print none, if the log was cut or forked.

    Arguments as of `fedveil client witness`.

    Raises:
      Refusal: the key is not of Ed25519, the log is not the server's, or it shows nothing of the last head.
    """
    signer = read_key(key).key
    if not isinstance(signer, Ed25519PrivateKey):
        raise Refusal("--key", str(key), "is not of Ed25519; make one with fedveil report key")
    text = sys.stdin.buffer.read(LARGEST_FILE) if log == STANDARD_INPUT else read_file(log)
    told = log_in(text, str(log), read_file(ca))
    with refusing("--key", key, "has a folder that cannot be written"), alone(key, "witness"):
        last = heads_of_key(key).get(told.head.federation)
        fault = "" if last is None else contradiction(last.head, told)
        if fault:
            print(f"REFUSED: {fault}; nothing is signed. Keep this log and {key}.heads.json", file=sys.stderr)
            return FORKED
        if last is None:
            said = f"the first head of {told.head.federation} that this key co-signs: nothing earlier is compared"
            print(said, file=sys.stderr)
        print(cosign_log(told, signer, key).to_json())
    return 0
