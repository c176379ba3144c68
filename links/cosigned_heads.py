"""Co-signatures of witnesses at a server: asked for by commands of its operator, or brought as files.

A command is given the log on its standard input, and prints a co-signature, as `fedveil client witness -` does.
"""

from __future__ import annotations

import logging
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..base.bounded_decoding import Undecodable
from ..base.durable_files import PUBLIC, replace_file
from ..base.refusal import Refusal
from ..configs.bundle_files import read_file
from ..privacy.merkle import root_of
from ..privacy.witness import (
    TWO_BRANCHES,
    HeadCosignature,
    format_cosignatures,
    newest,
    read_cosignature,
    read_stored_cosignatures,
)
from .log_export import LogExport, covers, to_text
from .server_log import ServerLog
from .tree_head import TreeHead

logger = logging.getLogger("fedveil.server")

FILE = "log.cosigned.json"  # at server and device: the newest co-signature of each witness
WITNESSES = "FEDVEIL_WITNESSES"  # environment variable: a command for each witness, between semicolons
WITNESS_SECONDS = 30.0  # for one witness's command


def read_cosigned(folder: Path) -> tuple[HeadCosignature, ...]:
    """Return the newest co-signature of each witness in the folder of a server's bundle."""
    return read_cosignatures(folder, "remove it, and ask the witnesses again")


def read_cosignatures(folder: Path, remedy: str) -> tuple[HeadCosignature, ...]:
    """Return the co-signatures that a server, or a device in its state folder, has stored; none without a file.

    Raises:
      Refusal: the file cannot be read; the sentence ends in the remedy.
    """
    path = folder / FILE
    if not path.exists():
        return ()
    try:
        return read_stored_cosignatures(read_file(path))
    except Undecodable as error:
        raise Refusal("file", str(path), f"cannot be read ({error}); {remedy}") from None


def _split(text: str) -> list[list[str]]:
    """Return the commands in a text, each as its words; a semicolon in quotes is part of a word; Refusal for open quotes."""
    words = shlex.shlex(text, posix=True, punctuation_chars=";")
    words.whitespace_split, words.commenters = True, ""
    commands: list[list[str]] = [[]]
    try:
        for word in words:
            if word == ";":
                commands.append([])
            else:
                commands[-1].append(word)
    except ValueError as error:
        raise Refusal(WITNESSES, text, f"is no list of commands ({error})") from None
    return [each for each in commands if each]


class CosignedHeads:
    """Heads of a server's log with their co-signatures.

    Args:
      folder: of the server's bundle.
      federation: its name.
      log: of the server, which grows.
      commands: of its operator, one for each witness, between semicolons.

    Raises:
      Refusal: the file of co-signatures cannot be read, or a command is none.
    """

    def __init__(self, folder: Path, federation: str, log: ServerLog, commands: str = "") -> None:
        self._folder, self._federation, self._log = folder, federation, log
        self._commands = _split(commands)
        read_cosigned(folder)

    def add(self, *cosignatures: HeadCosignature) -> None:
        """Store co-signatures of this log; of each key the one with the most entries stays.

        Raises:
          Refusal: one does not hold, or is of another log or branch; the sentence names both heads.
          OSError: they cannot be stored.
        """
        for each in cosignatures:
            if not each.holds:
                raise Refusal("witness", each.public, "did not sign this; ask for its co-signature again")
            if not covers(each, self._federation, self._log.leaves):
                raise Refusal("witness", each.public, self._branch_sentence(each))
        newest_ones = newest((*read_cosigned(self._folder), *cosignatures))
        replace_file(self._folder / FILE, format_cosignatures(newest_ones), PUBLIC)

    def of(self, head: TreeHead) -> tuple[HeadCosignature, ...]:
        """Ask each witness that has a command to co-sign a head, store the answers, and return all co-signatures under it.

        A witness that fails, or refuses, is named in the log of the server.
        """
        answers: list[HeadCosignature] = []
        for command in self._commands if head.size else ():
            try:
                answers.append(self._run_witness(command, head))
            except (Refusal, OSError) as problem:
                logger.error("no co-signature of %d entries: %s", head.size, problem)
        stored = (
            each for each in read_cosigned(self._folder) if (each.size, each.root) == (head.size, head.root)
        )
        return newest((*stored, *answers))

    def require(self, head: TreeHead) -> None:
        """Check that each witness that has a command co-signs a head, and store what it signed.

        Raises:
          Refusal: one does not.
        """
        for command in self._commands if head.size else ():
            self._run_witness(command, head)

    def _run_witness(self, command: Sequence[str], head: TreeHead) -> HeadCosignature:
        """Return, and store, the co-signature of a head that a witness's command prints."""
        leaves = tuple(each.hex() for each in self._log.leaves[: head.size])
        text = to_text(LogExport(head, leaves))
        try:
            process = subprocess.run(
                command, input=text.encode(), capture_output=True, timeout=WITNESS_SECONDS, check=False
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise Refusal(WITNESSES, shlex.join(command), f"cannot be run ({error})") from error
        if process.returncode:
            output = process.stderr.decode(errors="replace").strip()[-1000:] or "silent"
            raise Refusal(WITNESSES, shlex.join(command), f"exit code {process.returncode}: {output}")
        cosignature = read_cosignature(process.stdout)
        if (cosignature.size, cosignature.root) != (head.size, head.root):
            raise Refusal(WITNESSES, shlex.join(command), f"co-signed another head, of {cosignature}")
        self.add(cosignature)
        return cosignature

    def _branch_sentence(self, cosignature: HeadCosignature) -> str:
        """Return the sentence on a valid co-signature that is under no head of this log: another log, a later head or a fork."""
        leaves, size = self._log.leaves, cosignature.size
        if cosignature.federation != self._federation:
            return f"co-signed the log of {cosignature.federation!r}, and this is {self._federation!r}"
        if size > len(leaves):
            return f"co-signed {cosignature}, and this log has {len(leaves)}: it was restored from an older copy, or forked"
        stored = [each for each in read_cosigned(self._folder) if each.public == cosignature.public]
        if stored and stored[0].size >= size:
            return f"{TWO_BRANCHES}: {cosignature}; and {stored[0]}. Keep both"
        branch = f"{size} entries, root {root_of(leaves[:size]).hex()}"
        return f"co-signed another branch: {cosignature}; this log has {branch}. Keep both"
