"""Transparency log of a server, shown at the server and at a device: exports, proofs, co-signatures, comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from ..base.refusal import Refusal, refusing
from ..configs.bundle_files import read_file
from ..deployment.device.client_bundle import read_client_bundle
from ..deployment.device.log_copy import FORK, LogCopy, stored_cosignatures
from ..deployment.serve import RUNS
from ..evidence.binding.witnesses import note_witnesses
from ..links.cosigned_heads import CosignedHeads, read_cosigned
from ..links.log_export import (
    ConsistencyProof,
    InclusionProof,
    LogExport,
    double_signers,
    fork_between,
    read_log,
    to_text,
)
from ..links.roster_watch import followed_credentials
from ..links.server_bundle import ServerBundle, read_server_bundle
from ..links.server_log import LOG, ServerLog, contradicting_entries, fields_of, read_entries
from ..links.tree_head import TreeHead, sign_head
from ..messages.training_order import NEW
from ..privacy.merkle import consistency_proof, inclusion_proof, leaf_hash, root_of
from ..privacy.witness import TWO_BRANCHES, HeadCosignature, read_cosignature
from ..run.display import visible

FORKED = 1
SHORT = 16  # hexadecimal digits of a hash


def of_server(
    folder: Path,
    inclusion: int | None,
    consistency: int | None,
    cosigned: Sequence[Path] = (),
    *,
    as_json: bool = False,
) -> int:
    """Print a server's log or a proof of it, or store co-signatures of witnesses; return the exit code.

    `inclusion` is the number of an entry, from 0, and `consistency` a number of first entries, to prove; `cosigned` has
    files of co-signatures to store.

    Raises:
      Refusal: the bundle cannot be used, there is no such entry, or a co-signature is not under this log.
    """
    bundle, entries = read_server_bundle(folder), read_entries(folder / LOG)
    if cosigned:
        return _store_cosignatures(bundle, cosigned)
    leaves = [leaf_hash(entry) for entry in entries]
    head = sign_head(bundle.federation, len(leaves), root_of(leaves), followed_credentials(bundle)())
    texts = tuple(entry.decode() for entry in entries)
    try:
        if inclusion is not None:
            proof = tuple(each.hex() for each in inclusion_proof(leaves, inclusion))
            print(to_text(InclusionProof(head, texts[inclusion], inclusion, proof)))
            return 0
        if consistency is not None:
            proof = tuple(each.hex() for each in consistency_proof(leaves, consistency))
            root = root_of(leaves[:consistency]).hex()
            print(to_text(ConsistencyProof(head, consistency, root, proof)))
            return 0
    except ValueError:
        number = consistency if inclusion is None else inclusion
        raise Refusal("log", number, f"the log has {len(leaves)} entries, counted from 0") from None
    cosignatures = read_cosigned(folder)
    if as_json:
        hashes = tuple(each.hex() for each in leaves)
        print(to_text(LogExport(head, hashes, texts, cosignatures=cosignatures)))
        return 0
    for line in (_format_head(head), *map(_format_cosignature, cosignatures), *_entry_lines(texts)):
        print(line)
    return 0


def _store_cosignatures(bundle: ServerBundle, cosigned: Sequence[Path]) -> int:
    """Store witnesses' co-signatures of the log, from files, beside it and in the runs whose files it lists."""
    cosignatures = [read_cosignature(read_file(each)) for each in cosigned]
    with refusing("file", bundle.folder / LOG, "cannot be read, or its co-signatures cannot be stored"):
        log = ServerLog(bundle.folder / LOG)
        CosignedHeads(bundle.folder, bundle.federation, log).add(*cosignatures)
        changed_runs = note_witnesses(bundle.folder / RUNS, log.leaves, read_cosigned(bundle.folder))
    for each in cosignatures:
        print(_format_cosignature(each))
    for run in changed_runs:
        print(f"{run}: its files are in a log that witnesses have co-signed")
    return 0


def of_client(folder: Path, against: Path | None, *, as_json: bool = False) -> int:
    """Print what a device has seen of its server's log, or compare it with another's; return 1 if they contradict.

    `against` is an export or proof of another client or of the server; None prints this device's own log.

    Raises:
      Refusal: the bundle or the file cannot be used, or the device has seen no log.
    """
    bundle = read_client_bundle(folder)
    federation, authority = bundle.settings.federation, bundle.authority
    # A replaced authority may have signed the head's certificate.
    ca = authority.ca + b"\n" + authority.earlier_ca
    seen_log = LogCopy(bundle.state, federation, ca)
    if seen_log.head is None:
        remedy = "this device has no log yet; the server sends it with the first instruction"
        raise Refusal("log", str(folder), remedy)
    hashes = tuple(each.hex() for each in seen_log.leaves)
    export = LogExport(seen_log.head, hashes, cosignatures=stored_cosignatures(bundle.state))
    fork = bundle.state / FORK
    if against:
        return _compare(export, against, ca, federation)
    if as_json:
        print(to_text(export))
    else:
        print("\n".join([_format_head(seen_log.head), *map(_format_cosignature, export.cosignatures)]))
        if fork.exists():
            print(f"FORKED: the server later signed a head that contradicts this one: {fork}")
    return FORKED if fork.exists() else 0


def _compare(mine: LogExport, against: Path, ca: bytes, federation: str) -> int:
    """Print whether another's log, in a file, agrees with this device's; return 1 if one contradicts the other, or itself."""
    other = read_log(against, ca, federation)
    if fork := fork_between(mine, other):
        print(f"FORKED: {fork}; the server signed both, so it kept two logs. Keep both files")
        for one, another in double_signers(mine, other):
            print(f"witness {one.public} {TWO_BRANCHES}: {one}; and {another}. Keep both files")
        return FORKED
    texts = other.entries if isinstance(other, LogExport) else ()
    for line in _entry_lines(texts):
        print(line)
    common_size = min(mine.head.size, other.head.size)
    print(f"the logs agree on their first {common_size} entries")
    if conflicts := contradicting_entries(texts):
        print(f"CONFLICT in one log: entries {', '.join(map(str, sorted(conflicts)))}. Keep the file")
        return FORKED
    return 0


def _format_head(head: TreeHead) -> str:
    at = datetime.fromtimestamp(head.at, UTC).isoformat(timespec="seconds")
    return f"{head.federation}: {head.size} entries, root {head.root}, signed by the server at {at}"


def _format_cosignature(each: HeadCosignature) -> str:
    at = datetime.fromtimestamp(each.at, UTC).isoformat(timespec="seconds")
    return f"co-signed by {each.public} at {at}: {each}"


def _entry_lines(texts: Sequence[str]) -> Iterator[str]:
    """Yield a line for each entry; one that contradicts an earlier one is marked."""
    conflicts = contradicting_entries(texts)
    for index, text in enumerate(texts):
        entry = fields_of(text)
        name, new, suffix = entry.get("run", "").partition(NEW)
        run, digits = f"{name}{new}{suffix[:8]}", entry.get("model", entry.get("hash", ""))[:SHORT]
        match entry.get("kind"):
            case "roster":
                description = f"roster version {entry.get('version')}  {digits}"
            case "model":
                description = f"model of round {entry.get('round', '')} of {run}  {digits}"
            case "final":
                description = f"final model of {run}  {digits}"
            case "manifest":
                description = f"manifest of {run}  {digits}"
            case _:
                description = "an entry of an unknown kind"
        yield visible(f"{index:6}  {description}{'  CONFLICT' if index in conflicts else ''}")
