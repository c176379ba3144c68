"""Bundle of a run: everything that a verifier needs, in one folder, with a list of hashes that roles sign."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.bounded_decoding import build, plain_of
from ...base.durable_files import replace_file
from ...base.refusal import Refusal, refusing
from ...privacy.ledger.export import export_text
from ...privacy.ledger.hash_chain import Entry, Head, canonical
from ...run.files import AUDIT_ROWS, FAREWELL, MANIFEST, RECEIPTS, TIME_STAMP, WITNESSES
from ...run.manifest import LATER_FILES, PUBLIC_MODE, SALT, Manifest, check_in_folder, hashes
from .signatures import FILE as SIGNATURES
from .signatures import Signature, SigningKey, check, make_signature, read_signatures, signatures_text

LIST, FORMAT = "bundle.json", "fedveil bundle 1"
LEDGER, CLIENT_LEDGERS = "ledger.json", "client_ledgers.json"
RECOMPUTE = "recompute_ledger.py"
# Files that only the operator has where a trusted server draws clients in secret.
OPERATORS = (AUDIT_ROWS, SALT, RECEIPTS)


@dataclass(frozen=True)
class Listing:
    """List of a bundle's content.

    Attributes:
      run: the run's name.
      close: the entry that closed it; None if it has no ledger of its own.
      files: SHA-256 in hexadecimal, by name.
    """

    run: str
    close: Head | None
    files: Mapping[str, str]

    @property
    def text(self) -> bytes:
        """The list as canonical JSON."""
        return canonical({"format": FORMAT, **plain_of(self)}).encode()


@dataclass(frozen=True)
class Contents:
    """Content of a bundle."""

    run: Path  # folder of the run
    manifest: Manifest  # of the run
    entries: Sequence[Entry]  # of the run's ledger up to its close; empty without a ledger
    client_entries: Mapping[str, Sequence[Entry]]  # of the clients' ledgers, by ledger


def make_bundle(contents: Contents, out: Path, *, with_audit_rows: bool) -> list[str]:
    """Write the unsigned bundle of a verified run; return the names of its files.

    Args:
      contents: by `contents_of`, which refuses a run that fails a check.
      out: a folder that does not exist, or is empty.
      with_audit_rows: include the audit's rows, although they reveal how many clients took part, and the receipts,
        although they reveal the members.

    Raises:
      Refusal: the folder is not empty or cannot be written.
    """
    run = contents.run
    files: dict[str, bytes] = {}
    try:
        added = (SALT, MANIFEST, RECEIPTS, WITNESSES, TIME_STAMP, FAREWELL)
        for name in (*contents.manifest.files, *added, *LATER_FILES):
            if (run / name).is_file() and (with_audit_rows or name not in OPERATORS):
                files[name] = (run / name).read_bytes()
        if contents.entries:
            files[RECOMPUTE] = (Path(__file__).parent / RECOMPUTE).read_bytes()
            files[LEDGER] = (export_text(contents.entries) + "\n").encode()
        if contents.client_entries:
            exports = {name: json.loads(export_text(each)) for name, each in contents.client_entries.items()}
            files[CLIENT_LEDGERS] = (json.dumps(exports) + "\n").encode()
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise Refusal("--out", str(out), "is not empty; name a new folder")
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            replace_file(out / name, data, PUBLIC_MODE)
        close = contents.entries[-1].head if contents.entries else None
        listing = Listing(contents.manifest.run, close, hashes(out, sorted(files)))
        replace_file(out / LIST, listing.text, PUBLIC_MODE)
    except OSError as problem:
        remedy = f"cannot be written ({problem.strerror}); choose another"
        raise Refusal("--out", str(out), remedy) from problem
    return [*files, LIST]


def read_list(folder: Path) -> Listing:
    """Return a bundle's list of its content; refuse a folder without a readable one."""
    path = folder / LIST
    try:
        text = path.read_bytes()
        fields: dict[str, Any] = json.loads(text)
        if (form := fields.pop("format")) != FORMAT:
            raise ValueError(f"format {form!r}")
        listing = build(Listing, fields)
        check_in_folder(listing.files)
        if listing.text != text:
            raise ValueError("it is not in canonical form")
    except FileNotFoundError:
        raise Refusal("bundle", str(folder), f"holds no {LIST}; give the folder of a bundle") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as problem:
        raise Refusal("bundle", str(path), f"cannot be read ({problem}); ask for a true copy") from problem
    return listing


def add_signature(folder: Path, role: str, date: str, keys: Sequence[SigningKey]) -> Signature:
    """Sign a bundle and its earlier signatures, which must be valid.

    Args:
      folder: of the bundle, whose files were checked.
      role: of the signer, in words.
      date: YYYY-MM-DD.
      keys: one of Ed25519, and optionally one of ML-DSA.

    Raises:
      Refusal: an earlier signature is invalid, or the new one cannot be written.
    """
    bundle, before = (folder / LIST).read_bytes(), read_signatures(folder)
    check(bundle, before)
    signature = make_signature(bundle, before, role, date, keys)
    with refusing("bundle", folder, "cannot be signed there"):
        replace_file(folder / SIGNATURES, signatures_text([*before, signature]), PUBLIC_MODE)
    return signature
