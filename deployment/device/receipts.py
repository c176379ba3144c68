"""Receipts of a device, one for each finished run: its manifest, and the opening of the commitment, in the state folder."""

import hashlib
import json
import logging
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...base.bounded_decoding import read_json, read_lines
from ...base.durable_files import append_line, replace_file
from ...base.refusal import Refusal
from ...base.tensor_file import safetensors_parts
from ...messages.notices import RunOver
from ...messages.training_order import display_name
from ...privacy.ledger.ledger_state import read_entries
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
from .client_bundle import ClientBundle
from .ledger_heads import LEDGERS, RECEIPTS, LedgerHeads
from .run_end import MODEL

logger = logging.getLogger("fedveil.client")

SIGNED = "signed"  # file of a line for each run that got a receipt, never forgotten
# Limits of stored openings and of runs, so that a server cannot fill the disk.
MAX_OPENINGS, MAX_RUNS = 1024, 65_536
ALARMED = "alarmed"  # status of a run whose model is not sent


@dataclass(frozen=True)
class SignedRun:
    """Run that got a receipt, and the SHA-256 of its manifest."""

    run: str
    manifest: str


def receipt_for(bundle: ClientBundle, over: RunOver) -> Receipt | None:
    """Return a device's receipt for the run of a server's last message.

    It is None if the run has no manifest, if the manifest contradicts the message, or if a ledger cannot be read or
    lacks releases of this device.

    Raises:
      OSError: the opening cannot be written.
    """
    description = RunDescription(bundle.settings.federation, over.run, over.manifest)
    try:
        LedgerHeads(bundle.state).require()
        if not over.manifest:
            return None
        require_agreement(over)
        return give_receipt(bundle.state, description, bundle.identity.node, bundle.identity.key)
    except Refusal as refusal:
        logger.error("no receipt is given: %s", refusal)
        return None


def require_agreement(over: RunOver) -> None:
    """Compare the manifest in the server's message with the message: its hash, run, status and model.

    Raises:
      Refusal: they differ, or the message lacks the manifest or the model.
    """
    if hashlib.sha256(over.listed.encode()).hexdigest() != over.manifest:
        fault = "has another hash"
        if not over.listed:
            fault = "is not in the server's last message: update the server"
        raise Refusal("manifest", over.manifest, fault)
    try:
        manifest = read_json(over.listed)
        run, status, model = display_name(manifest["run"]), manifest["status"], manifest["files"].get(MODEL)
    except (ValueError, LookupError, TypeError, AttributeError) as problem:
        raise Refusal("manifest", over.manifest, f"cannot be read ({problem})") from None
    arrays = {name: np.asarray(value, order="C") for name, value in over.model.items()}
    digest = hashlib.sha256()
    for part in safetensors_parts(arrays):
        digest.update(part)
    received = digest.hexdigest() if arrays else None
    if status == ALARMED and not arrays:
        received = model  # which is not sent
    comparisons = (("run", run, over.run), ("status", status, over.status), ("model", model, received))
    for name, listed, actual in comparisons:
        if listed != actual:
            raise Refusal("manifest", over.manifest, f"lists {name} {listed}, and the server sent {actual}")


def give_receipt(state: Path, description: RunDescription, node: int, key: Ed25519PrivateKey) -> Receipt:
    """Return the device's receipt for a run, once its opening is on disk; the same run gets the same receipt again.

    Raises:
      OSError: the opening cannot be written.
      Refusal: a ledger cannot be read, or the run has a receipt for another manifest.
    """
    path = state / RECEIPTS / f"{description.manifest}.json"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    _record_manifest(path.parent, SignedRun(description.run, description.manifest))
    if path.exists():
        opening = read_opening(path)
    else:
        heads = {
            each.name: read_entries(each)[-1].head for each in sorted((state / LEDGERS).glob("*.ledger"))
        }
        opening = ReceiptOpening(secrets.token_hex(SALT_BYTES), heads)
        replace_file(path, opening_text(opening, description, node))
        _forget_oldest(path.parent)
    return sign_receipt(key, description, node, commitment_of(opening))


def _record_manifest(folder: Path, signed_run: SignedRun) -> None:
    """Record the manifest of a run, before anything is signed; refuse another manifest of the same run."""
    if not (folder / SIGNED).exists():  # receipts of earlier releases are in their openings alone
        lines = ""
        for each in folder.glob("*.json"):
            with suppress(ValueError, LookupError, TypeError):
                opening = read_json(each.read_bytes())
                lines += json.dumps({"run": opening["run"], "manifest": opening["manifest"]}) + "\n"
        replace_file(folder / SIGNED, lines.encode())
    manifests = {each.run: each.manifest for each in read_lines(SignedRun, folder / SIGNED)}
    earlier = manifests.get(signed_run.run)
    if earlier == signed_run.manifest:
        return
    if earlier:
        remedy = f"a device gives one receipt a run, and {signed_run.run} has one for {earlier}"
        raise Refusal("manifest", signed_run.manifest, remedy)
    if len(manifests) >= MAX_RUNS:
        raise Refusal("receipts", str(folder), f"holds {len(manifests)} runs, the most; it gives no more")
    append_line(folder / SIGNED, asdict(signed_run))


def _forget_oldest(folder: Path) -> None:
    """Remove the oldest openings beyond the limit."""
    openings = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in openings[:-MAX_OPENINGS]:
        path.unlink(missing_ok=True)
