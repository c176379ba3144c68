"""``fedveil report bundle``, ``sign`` and ``key``: a run's bundle, and the signatures under it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path

from ..base.refusal import Refusal
from ..evidence.binding.bundle import add_signature, make_bundle
from ..evidence.binding.signatures import FEDERATION, SHOWN, make_key, passphrase_for, read_key
from ..evidence.binding.time_stamp import TSA, stamp
from ..evidence.binding.verify import Knowledge, contents_of, verify_folder
from ..run.files import TIME_STAMP
from ..run.manifest import tells_counts

BUNDLE = "bundle"  # folder in the run's, where no other is named


def bundle(
    run: Path, out: Path | None, keys: Sequence[Path], *, with_audit_rows: bool = False, as_json: bool = False
) -> int:
    """Make the bundle of a run that holds, signed where keys are given; return the exit code.

    Arguments as of `fedveil report bundle`.

    Raises:
      Refusal: something of the run does not hold, or the bundle cannot be written.
    """
    signers = [read_key(each) for each in keys]
    contents, lines = contents_of(run)
    target = run / BUNDLE if out is None else out
    names = make_bundle(contents, target, with_audit_rows=with_audit_rows or not tells_counts(run))
    if signers:
        add_signature(target, FEDERATION, _today(), signers)
    if as_json:
        print(json.dumps({"bundle": str(target), "files": names, "signed": bool(signers)}))
        return 0
    for line in lines:
        if line.ok is None:
            print(f"not in it: {line.name}: {line.finding}")
    print(f"{target}: {len(names)} files, {'signed' if signers else 'unsigned'}")
    return 0


def sign(folder: Path, role: str, keys: Sequence[Path], day: str | None) -> int:
    """Sign a bundle that holds; return the exit code.

    Arguments as of `fedveil report sign`.

    Raises:
      Refusal: something of the bundle does not hold, or a key cannot be read.
    """
    dated = _day(day)
    for line in verify_folder(folder, Knowledge()):
        if line.ok is False:
            remedy = f"check {line.name} failed: {line.finding}; do not sign it"
            raise Refusal("bundle", str(folder), remedy)
    made = add_signature(folder, role, dated, [read_key(each) for each in keys])
    signers = ", ".join(f"{name} {public[:SHOWN]}" for name, public in made.keys.items())
    print(f"{folder}: signed by {made.role}, {made.date}, {signers}")
    return 0


def stamp_run(run: Path, tsa: str | None) -> int:
    """Get a time stamp of a run; return the exit code.

    Arguments as of `fedveil report stamp`.

    Raises:
      Refusal: there is no authority, or it gives none.
    """
    url = os.environ.get(TSA) if tsa is None else tsa
    if not url:
        raise Refusal("--tsa", None, f"name an authority for time stamps, here or in {TSA}")
    print(f"{run / TIME_STAMP}: {stamp(run, url).isoformat(timespec='seconds')}, by {url}")
    return 0


def key(path: Path, *, ml_dsa: bool = False, unlocked: bool = False) -> int:
    """Make a key that signs, locked by a passphrase; return the exit code.

    Arguments as of `fedveil report key`.

    Raises:
      Refusal: there is a file, or it cannot be written.
    """
    public = make_key(path, ml_dsa, None if unlocked else passphrase_for(path, again=True))
    print(f"{path}.pub: {public if not ml_dsa else public[:SHOWN] + '...'}")
    return 0


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _day(text: str | None) -> str:
    try:
        return _today() if text is None else date.fromisoformat(text).isoformat()
    except ValueError:
        raise Refusal("--date", text, "give a day as YYYY-MM-DD") from None
