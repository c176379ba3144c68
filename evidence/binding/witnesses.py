"""Witnesses of a run: co-signatures of its server's log, each with the proof that the log holds the run's manifest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from ...base.bounded_decoding import Undecodable, build, read_json
from ...base.durable_files import replace_file
from ...base.refusal import Refusal
from ...links.server_log import manifest_entry
from ...messages.training_order import display_name
from ...privacy.merkle import includes, inclusion_proof, leaf_hash
from ...privacy.witness import HeadCosignature
from ...run.files import MANIFEST, RECEIPTS, WITNESSES
from ...run.manifest import PUBLIC_MODE, Manifest, read_manifest
from .bound_folder import BoundFolder, Wrong
from .signatures import SHORT

FORMAT = "fedveil witnesses 1"


@dataclass(frozen=True)
class Witness:
    """Co-signature of a log that holds a run's manifest.

    Attributes:
      cosignature: of a head.
      inclusion: hashes of the proof that the head's tree holds the manifest's entry, in hexadecimal.
    """

    cosignature: HeadCosignature
    inclusion: tuple[str, ...]


@dataclass(frozen=True)
class RunWitnesses:
    """File `WITNESSES` of a run folder."""

    place: int  # of the manifest's entry in the log, from 0
    witnesses: tuple[Witness, ...]  # one for each key, by the keys' order
    format: str = FORMAT


def note_witnesses(runs: Path, leaves: Sequence[bytes], cosignatures: Sequence[HeadCosignature]) -> list[str]:
    """Write into each closed run what witnesses have co-signed of its log; return the names of the changed folders.

    Args:
      runs: folder of a server's runs.
      leaves: hashes of the log's entries, in order.
      cosignatures: under heads of this log. The earlier one of a key stays, since it is closer to the run's end.

    Raises:
      OSError: a file of witnesses cannot be written.
      Refusal: a file of an earlier note, or a manifest, cannot be read.
    """
    changed: list[str] = []
    for folder in sorted(each.parent for each in runs.glob(f"*/{MANIFEST}")):
        leaf = leaf_hash(_entry(read_manifest(folder)))
        if leaf not in leaves:
            continue
        position = list(leaves).index(leaf)
        previous = _by_key(read_witnesses(folder)) if (folder / WITNESSES).exists() else {}
        current = dict(previous)
        for cosignature in cosignatures:
            if cosignature.size > position and cosignature.public not in current:
                proof = inclusion_proof(leaves[: cosignature.size], position)
                current[cosignature.public] = Witness(cosignature, tuple(step.hex() for step in proof))
        if current != previous:
            record = RunWitnesses(position, tuple(current[public] for public in sorted(current)))
            text = json.dumps(asdict(record), indent=1)
            replace_file(folder / WITNESSES, f"{text}\n".encode(), PUBLIC_MODE)
            changed.append(folder.name)
    return changed


def read_witnesses(folder: Path) -> RunWitnesses:
    """Return the witnesses in a run folder, unchecked; refuse an unreadable file."""
    path = folder / WITNESSES
    try:
        witnesses = build(RunWitnesses, read_json(path.read_bytes()))
        if witnesses.format != FORMAT:
            raise Undecodable(f"format {witnesses.format!r}")
    except (OSError, Undecodable) as problem:
        raise Refusal("witnesses", str(path), f"cannot be read ({problem}); ask for a true copy") from None
    return witnesses


def check_witnesses(folder: BoundFolder) -> str:
    """Check the co-signatures of the log that holds this run's manifest; return who co-signed it, and when.

    Raises:
      Refusal: one does not hold, is of another federation's log, or is under a head without this manifest.
      Wrong: one is missing that the verifier requires.
    """
    if not (folder.path / WITNESSES).exists():
        raise Wrong(f"{WITNESSES} is missing, and --witness is given")
    record, leaf = read_witnesses(folder.path), leaf_hash(_entry(folder.manifest))
    for witness in record.witnesses:
        _require_inclusion(witness, leaf, record.place)
    if (folder.path / RECEIPTS).exists():
        _require_federation(record, folder.receipts.description.federation)
    cosignatures = {public: witness.cosignature for public, witness in _by_key(record).items()}
    for key in folder.knowledge.witnesses:
        if key not in cosignatures:
            raise Wrong(f"the witness {key[:SHORT]} has not co-signed the log of this run")
        if key in folder.authorities:
            raise Wrong(f"the witness {key[:SHORT]} is the authority")
    signers = [f"{public[:SHORT]} at {_utc(each.at)}" for public, each in sorted(cosignatures.items())]
    advice = "" if folder.knowledge.witnesses else "; compare the keys with those you know, or give --witness"
    return f"the log with this manifest is co-signed by {len(cosignatures)}: {', '.join(signers)}{advice}"


def _require_inclusion(witness: Witness, leaf: bytes, position: int) -> None:
    """Require a witness's signature under a head of a log that has this leaf at this position."""
    head = witness.cosignature
    if not head.holds:
        raise Refusal("witness", head.public, "did not sign this head")
    try:
        proof, root = [bytes.fromhex(step) for step in witness.inclusion], bytes.fromhex(head.root)
    except ValueError:
        proof, root = [], b""  # which shows nothing
    if not includes(root, head.size, leaf, position, proof):
        remedy = f"co-signed a log of {head.size} entries that is not shown to hold this run's manifest"
        raise Refusal("witness", head.public, remedy)


def _require_federation(record: RunWitnesses, federation: str) -> None:
    """Require that all witnesses co-signed the log of this federation's server."""
    for head in (witness.cosignature for witness in record.witnesses):
        if head.federation != federation:
            remedy = f"co-signed the log of {head.federation!r}, and this run is of {federation!r}"
            raise Refusal("witness", head.public, remedy)


def _utc(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat(timespec="seconds")


def _by_key(record: RunWitnesses) -> dict[str, Witness]:
    return {each.cosignature.public: each for each in record.witnesses}


def _entry(manifest: Manifest) -> bytes:
    """Return the log's entry of a manifest; the log names a run as people call it."""
    return manifest_entry(display_name(manifest.run), manifest.hash)
