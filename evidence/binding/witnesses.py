"""Witnesses of a run: co-signatures of its server's log, each with the proof that the log holds the run's manifest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...base.bounded_decoding import Undecodable, build, read_json
from ...base.durable_files import replace_file
from ...base.refusal import Refusal
from ...links.server_log import manifest_entry
from ...messages.training_order import display_name
from ...privacy.merkle import includes, inclusion_proof, leaf_hash
from ...privacy.witness import HeadCosignature
from ...run.files import MANIFEST, WITNESSES
from ...run.manifest import PUBLIC_MODE, Manifest, read_manifest

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
    """File `WITNESSES` of a run folder.

    Attributes:
      place: of the manifest's entry in the log, from 0.
      witnesses: one for each key, by the keys' order.
      format: `FORMAT`.
    """

    place: int
    witnesses: tuple[Witness, ...]
    format: str = FORMAT


def note_witnesses(runs: Path, leaves: Sequence[bytes], cosignatures: Sequence[HeadCosignature]) -> list[str]:
    """Write into each closed run what witnesses have co-signed of its log; return the names of the changed folders.

    Args:
      runs: folder of a server's runs.
      leaves: hashes of the log's entries.
      cosignatures: under heads of this log. Of a key that a run has already, the earlier one stays: it is closer to the
        run's end.

    Raises:
      OSError: one cannot be written.
      Refusal: a file of an earlier note, or a manifest, cannot be read.
    """
    changed: list[str] = []
    for folder in sorted(each.parent for each in runs.glob(f"*/{MANIFEST}")):
        entry = leaf_hash(_entry(read_manifest(folder)))
        if entry not in leaves:
            continue
        position = list(leaves).index(entry)
        previous = {} if not (folder / WITNESSES).exists() else _by_key(read_witnesses(folder))
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
    """Return the witnesses in a run folder, unchecked.

    Raises:
      Refusal: the file cannot be read.
    """
    path = folder / WITNESSES
    try:
        witnesses = build(RunWitnesses, read_json(path.read_bytes()))
        if witnesses.format != FORMAT:
            raise Undecodable(f"format {witnesses.format!r}")
    except (OSError, Undecodable) as problem:
        raise Refusal("witnesses", str(path), f"cannot be read ({problem}); ask for a true copy") from None
    return witnesses


def verify_witnesses(folder: Path, manifest: Manifest, federation: str | None) -> dict[str, HeadCosignature]:
    """Return the co-signatures of a log that holds this manifest, by key.

    Args:
      folder: of the run, or of its bundle.
      manifest: of the run.
      federation: whose server's log it is; None if the run's files do not name it.

    Raises:
      Refusal: one does not hold, is of another log, or is under a head without this manifest.
    """
    record, leaf = read_witnesses(folder), leaf_hash(_entry(manifest))
    for witness in record.witnesses:
        head = witness.cosignature
        if not head.holds:
            raise Refusal("witness", head.public, "did not sign this head")
        if federation is not None and head.federation != federation:
            raise Refusal(
                "witness",
                head.public,
                f"co-signed the log of {head.federation!r}, and this run is of {federation!r}",
            )
        try:
            proof, root = [bytes.fromhex(step) for step in witness.inclusion], bytes.fromhex(head.root)
        except ValueError:
            proof, root = [], b""
        if not includes(root, head.size, leaf, record.place, proof):
            remedy = f"co-signed a log of {head.size} entries that is not shown to hold this run's manifest"
            raise Refusal("witness", head.public, remedy)
    return {public: each.cosignature for public, each in _by_key(record).items()}


def _by_key(record: RunWitnesses) -> dict[str, Witness]:
    return {each.cosignature.public: each for each in record.witnesses}


def _entry(manifest: Manifest) -> bytes:
    return manifest_entry(display_name(manifest.run), manifest.hash)
