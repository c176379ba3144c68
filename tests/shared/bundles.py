"""Signed runs of tests, and forgeries of their bundles."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedveil.evidence.binding.bound_folder import Knowledge
from fedveil.evidence.binding.bundle import LIST, read_list
from fedveil.evidence.binding.signatures import FILE as SIGNATURES
from fedveil.evidence.binding.signatures import Signature
from fedveil.evidence.binding.verify import CheckLine, verify_folder
from fedveil.run.manifest import hashes


@dataclass(frozen=True)
class Signed:
    """A run, its bundle that two have signed, and another run of the same task.

    Attributes:
      run: folder of the run.
      bundle: its bundle.
      other: folder of the other run.
      keys: folder of everybody's keys.
      federation: public key of the federation.
      officer: public key of the officer.
    """

    run: Path
    bundle: Path
    other: Path
    keys: Path
    federation: str
    officer: str

    @property
    def knowledge(self) -> Knowledge:
        """Knowledge of a verifier who has both signers' keys."""
        return Knowledge((self.federation, self.officer))


def wrong(lines: Iterable[CheckLine]) -> dict[str, str]:
    """Return the findings of the checks that failed, by name."""
    return {line.name: line.finding for line in lines if line.ok is False}


def line(folder: Path, name: str, knowledge: Knowledge) -> CheckLine | None:
    """Return the line of one check of a folder; None if the check is not made."""
    return next((each for each in verify_folder(folder, knowledge) if each.name == name), None)


def write_signatures(folder: Path, signatures: Sequence[Signature]) -> None:
    """Write the file of signatures, whatever they are."""
    content = {"format": "fedveil signatures 1", "signatures": [each.to_json() for each in signatures]}
    (folder / SIGNATURES).write_text(json.dumps(content, indent=1) + "\n")


def list_anew(copy: Path) -> None:
    """Make the list of hashes fit what lies in a bundle, as whoever edits it would; a signature nobody can make."""
    listed = read_list(copy)
    names = sorted(path.name for path in copy.iterdir() if path.name not in (LIST, SIGNATURES))
    (copy / LIST).write_bytes(replace(listed, files=hashes(copy, names)).text)
