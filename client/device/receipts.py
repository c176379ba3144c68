"""Receipts of a device: for each finished run the opening of its commitment, in the state folder."""

import logging
import secrets
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...privacy.ledger.book import read_entries
from ...privacy.ledger.durable_files import replace_file
from ...privacy.ledger.receipt import (
    SALT_BYTES,
    Receipt,
    ReceiptOpening,
    RunDescription,
    commitment_of,
    opening_text,
    read_opening,
    sign_receipt,
)
from ...privacy.refusal import Refusal
from ...strategies.run_over import RunOver
from .client_bundle import ClientBundle

logger = logging.getLogger("fedveil.client")

RECEIPTS, LEDGERS = "receipts", "ledgers"
MOST = 1024  # stored openings; a limit, so that a server cannot fill the disk


def receipt_for(bundle: ClientBundle, over: RunOver) -> Receipt | None:
    """Return a device's receipt for a closed run; None for another run, or if a ledger cannot be read.

    Args:
      bundle: of the device.
      over: the server's message.

    Raises:
      OSError: the opening cannot be written.
    """
    if not over.manifest:
        return None
    description = RunDescription(bundle.settings.federation, over.run, over.manifest)
    try:
        return give_receipt(bundle.state, description, bundle.identity.node, bundle.identity.key)
    except Refusal as refusal:
        logger.error("no receipt is given: %s", refusal)
        return None


def give_receipt(state: Path, description: RunDescription, node: int, key: Ed25519PrivateKey) -> Receipt:
    """Return the device's receipt for a run, once its opening is on disk; the same run gets the same receipt again.

    Raises:
      OSError: the opening cannot be written.
      Refusal: a ledger cannot be read.
    """
    path = state / RECEIPTS / f"{description.manifest}.json"
    if path.exists():
        opening = read_opening(path)
    else:
        heads = {
            each.name: read_entries(each)[-1].head for each in sorted((state / LEDGERS).glob("*.ledger"))
        }
        opening = ReceiptOpening(secrets.token_hex(SALT_BYTES), heads)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        replace_file(path, opening_text(opening, description, node))
        _forget_oldest(path.parent)
    return sign_receipt(key, description, node, commitment_of(opening))


def _forget_oldest(folder: Path) -> None:
    kept = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in kept[:-MOST]:
        path.unlink(missing_ok=True)
