"""Manifest of a run: the SHA-256 of each of its files, as one canonical text whose hash closes the run on its ledger."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.durable_files import replace_file
from ..base.refusal import Refusal, unreadable
from ..privacy.ledger.hash_chain import Head, canonical
from ..server import noise_key
from .files import (
    ASSESSMENT,
    AUDIT_ROWS,
    AUDIT_TERMS,
    BLAME,
    CARD,
    CONFIG,
    INTERVALS,
    MANIFEST,
    MATERIALS,
    METRICS,
    MODEL,
    PAGE,
    REPORT,
    RESULT,
    SAVED,
)

FORMAT = "fedveil manifest 1"
# Files that a run leaves, without OPERATOR: the hash of a short secret reveals it.
OF_THE_RUN = (CONFIG, SAVED, METRICS, RESULT, BLAME, AUDIT_TERMS, AUDIT_ROWS, INTERVALS, MODEL)
# Files that may be made again after the run was closed; the bundle's signature binds them.
LATER_FILES = (REPORT, PAGE, CARD, MATERIALS, ASSESSMENT)
TASK_FILES = "beside"  # key of SAVED: names of the task's files that lie with its model
PUBLIC_MODE, PRIVATE_MODE = 0o644, 0o600
# Salt of the hash of the audit's rows where these reveal the number of participants: a reader of the manifest could
# guess the few numbers behind a plain hash. The file lies beside the rows and stays with the operator.
SALT = "audit.salt"


@dataclass(frozen=True)
class Manifest:
    """Files of a finished run.

    Attributes:
      run: name of the run on the ledger.
      status: how the run ended.
      files: SHA-256 in hexadecimal, by the file's name.
      heads: heads of the clients' own ledgers, by name, in a simulation; otherwise empty.
    """

    run: str
    status: str
    files: Mapping[str, str]
    heads: Mapping[str, Head] = field(default_factory=dict[str, Head])

    @property
    def text(self) -> str:
        """The manifest as canonical JSON."""
        heads = {name: list(head) for name, head in self.heads.items()}
        return canonical(
            {
                "format": FORMAT,
                "run": self.run,
                "status": self.status,
                "files": dict(self.files),
                "heads": heads,
            }
        )

    @property
    def hash(self) -> str:
        """SHA-256 of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def manifest_of(folder: Path, heads: Mapping[str, Head] | None = None) -> Manifest:
    """Return the manifest of a run that has ended, from its folder; make the salt of the audit's rows there, if needed.

    Args:
      folder: folder of the run.
      heads: heads of the clients' own ledgers, by name, in a simulation.

    Raises:
      OSError: a file cannot be read.
    """
    saved = json.loads((folder / SAVED).read_bytes())
    status = json.loads((folder / RESULT).read_bytes())["status"]
    names = (*OF_THE_RUN, *saved.get(TASK_FILES, ()), *LATER_FILES)
    files = hashes(folder, names)
    if AUDIT_ROWS in files and reveals_counts(folder):
        if not (folder / SALT).exists():
            noise_key.make(folder, SALT)
        files[AUDIT_ROWS] = audit_hash(folder)
    return Manifest(saved["run"], status, files, heads or {})


def reveals_counts(run: Path) -> bool:
    """Return whether only the operator may read the rows of a run's audit, which reveal how many clients took part."""
    result = json.loads((run / RESULT).read_bytes())
    return result["data"] == "real" and _secret_draw(result)


def _secret_draw(result: Mapping[str, Any]) -> bool:
    """Return whether only the operator may know the cohorts: then the result has no times, which depend on them."""
    return result["seconds"] is None


def audit_hash(folder: Path) -> str:
    """Return the SHA-256 of an audit's rows in hexadecimal, with their salt if there is a salt file."""
    salt = folder / SALT
    rows = (folder / AUDIT_ROWS).read_bytes()
    return hashlib.sha256((salt.read_bytes() if salt.exists() else b"") + rows).hexdigest()


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 by name of the listed files that exist in the folder."""
    return {name: sha256_of(folder / name) for name in names if (folder / name).is_file()}


def check_in_folder(files: Iterable[str]) -> None:
    """Check that each name is that of a file in the folder of the list itself, without a path.

    Raises:
      ValueError: a name leads out of the folder.
    """
    for name in files:
        if name in ("", "..") or Path(name).name != name:
            raise ValueError(f"{name!r} is not the name of a file in the folder")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest beside the files that it names; it is on disk when this returns.

    If only the operator may read the audit's rows, the same holds for the manifest, which depends on them.

    Raises:
      OSError: it cannot be written.
    """
    secret = _secret_draw(json.loads((folder / RESULT).read_bytes()))
    mode = PRIVATE_MODE if secret else PUBLIC_MODE
    replace_file(folder / MANIFEST, manifest.text.encode(), mode)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest in a folder.

    Raises:
      Refusal: there is none, or it is not one.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        fields: dict[str, Any] = json.loads(text)
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']!r}")
        heads = {str(name): Head(int(seq), str(digest)) for name, (seq, digest) in fields["heads"].items()}
        files = {str(name): str(digest) for name, digest in fields["files"].items()}
        check_in_folder(files)
        manifest = Manifest(str(fields["run"]), str(fields["status"]), files, heads)
        if manifest.text.encode() != text:
            raise ValueError("it is not in canonical form")
    except FileNotFoundError:
        raise Refusal("manifest", str(path), "is missing; resume the run, which closes it") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as problem:
        raise Refusal("manifest", str(path), unreadable(problem, "restore it")) from problem
    return manifest
