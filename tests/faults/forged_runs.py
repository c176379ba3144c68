"""Forger of finished runs: has everybody's files and some members' keys, and writes all anew that no other key binds."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.evidence.binding.receipts import Receipts, read_receipts
from fedveil.privacy.ledger.export import export_text
from fedveil.privacy.ledger.hash_chain import START, Draft, canonical, linked
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.ledger.receipt import COMPARED, Receipt, RunDescription, sign_receipt
from fedveil.run.manifest import Manifest, hashes, read_manifest

Keys = Mapping[int, Ed25519PrivateKey]


def better(result: dict[str, Any]) -> None:
    """Make a result as a forger wants it."""
    result["metrics"] = {name: 0.9999 for name in result["metrics"]}
    for row in result["privacy"]:
        row["target_epsilon"] = 0.1
        if row["sampling"].startswith("poisson batches"):
            row["epsilon"] = 0.1


def forged(
    run: Path, out: Path, keys: Keys, edit: Callable[[dict[str, Any]], None] = better, tag: bytes = COMPARED
) -> Path:
    """Return a copy of a run with another result, whose manifest, close and receipts fit it as far as the keys reach."""
    shutil.copytree(run, out)
    for name in ("report.html", "report.json", "CARD.md"):
        (out / name).unlink(missing_ok=True)
    result = json.loads((out / "result.json").read_bytes())
    edit(result)
    charged = result["ledger"] is not None
    entries = read_entries(Path(result["ledger"])) if charged else []
    (out / "result.json").write_text(json.dumps({**result, "ledger": "ledger.json" if charged else None}))
    true = read_manifest(out)
    manifest = Manifest(true.run, result["status"], hashes(out, true.files), true.heads)
    (out / "manifest.json").write_text(manifest.text)
    if charged:
        close = {**json.loads(entries[-1].payload), "manifest": manifest.hash, "status": manifest.status}
        chain, head = [], START
        for each in [*entries[:-1], entries[-1]._replace(payload=canonical(close))]:
            chain.append(linked(Draft(each.kind, each.key, each.payload), head))
            head = chain[-1].head
        (out / "ledger.json").write_text(export_text(chain) + "\n")
    held = read_receipts(run)
    told = RunDescription(held.description.federation, held.description.run, manifest.hash)
    write(out, replace(held, description=told, signed=signed_by(keys, told, tag)))
    return out


def signed_by(keys: Keys, told: RunDescription, tag: bytes = COMPARED) -> list[Receipt]:
    """Return a receipt of each key, under the tag of this or of an earlier release."""
    found = [sign_receipt(keys[node], told, node, bytes(32)) for node in sorted(keys)]
    if tag == COMPARED:
        return found
    texts = {
        each.node: canonical({**vars(told), "node": each.node, "commitment": each.commitment.hex()})
        for each in found
    }
    return [replace(each, signature=keys[each.node].sign(tag + texts[each.node].encode())) for each in found]


def write(folder: Path, receipts: Receipts) -> None:
    (folder / "receipts.json").write_bytes(receipts.text)
