"""Rollover of an authority at the operator's desk: new keys, and the statement by which devices follow them."""

import time
from dataclasses import replace
from pathlib import Path

from ..base.durable_files import replace_file
from ..base.refusal import Refusal
from ..configs.bundle_files import ROLLOVERS
from ..privacy.secagg.rollover import (
    DAY_SECONDS,
    MAX_DAYS,
    MAX_ROLLOVERS,
    Rollover,
    sign_rollover,
    write_chain,
)
from .authority import make_keys, open_authority
from .enrolment import end_tokens
from .provision import AUTHORITY, Desk, open_desk, publish

DAYS = 30  # of an overlap


def roll_over(folder: Path, days: float = DAYS) -> Desk:
    """Replace the authority's keys, and give all certificates and the roster by the new ones.

    The file of the rollovers decides: before it is written the old keys are in force, and after it the next command
    completes what was cut short. The old keys sign rosters too for so many days, in which devices accept both; then they
    are removed. Open enrolment tokens end, since they name the old authority.

    Args:
      folder: that `provision` made.
      days: of the overlap.

    Raises:
      Refusal: there are no days of overlap, or too many.
    """
    if not 0 < days <= MAX_DAYS:
        raise Refusal("days", days, f"must be above 0 and at most {MAX_DAYS}: as long, the old keys count")
    with open_desk(folder) as desk:
        old, federation, keys_folder = desk.authority, desk.federation, desk.folder / AUTHORITY
        number, now = len(old.rollovers) + 1, int(time.time())
        if number > MAX_ROLLOVERS:
            remedy = f"has had {MAX_ROLLOVERS} rollovers, the most; make a new federation"
            raise Refusal("federation", federation.name, remedy)
        new = make_keys(keys_folder, federation.name, federation.content.authority.care, number + 1)
        old_key, new_key = (each.public(federation.content.post_quantum).hex() for each in (old, new))
        old_ca, new_ca = (each.ca_pem.decode() for each in (old, new))
        until = now + max(1, int(days * DAY_SECONDS))
        rollover = Rollover(federation.name, number, old_key, new_key, old_ca, new_ca, now, until)
        chain = (*old.rollovers, sign_rollover(rollover, old.signer, new.signer))
        replace_file(keys_folder / ROLLOVERS, write_chain(chain).encode())
        desk = replace(
            desk, authority=open_authority(keys_folder, federation.name, federation.content.authority.care)
        )
        end_tokens(desk)
        return publish(desk)
