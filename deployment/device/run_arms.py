"""Arm of a device in each tuning run: its name determines the arm, and the first arm that it answers in is final."""

import json
from pathlib import Path

from ...base.bounded_decoding import Undecodable, read_json
from ...base.durable_files import replace_file
from ...base.refusal import Refusal
from ...privacy.arms import Arm

DEALS = (
    "deals.json"  # in the device's state: by run the deal's key, its number of arms, and the device's own arm
)
MAX_RUNS = 1000  # stored runs; the oldest are dropped


def require_arm(arm: Arm, name: str, run: str, state: Path) -> None:
    """Refuse a round of another arm than this device's, or of a second one in its run, and record the first.

    A device in one arm loses only that arm's releases. A second deal of a run, or a new name, would put it into two.

    Args:
      arm: of the round, from the order.
      name: of the device in the roster.
      run: its name, the same after a resume.
      state: the device's folder.

    Raises:
      Refusal: the arm or the deal is another; the sentence names it.
    """
    if not arm.holds(name):
        remedy = f"this client is in arm {arm.deal.arm_of(name)} of that deal"
        raise Refusal("arm", arm.number, remedy)
    stored_deals, deal = _read_deals(state), [arm.deal.key, arm.deal.arms, arm.number]
    if stored_deals.get(run) == deal:
        return
    if stored_deals.setdefault(run, deal) != deal:
        raise Refusal("deal", arm.deal.key, f"run {run} already dealt its clients, and each has one arm")
    newest = dict(list(stored_deals.items())[-MAX_RUNS:])
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(state / DEALS, json.dumps(newest).encode())


def _read_deals(state: Path) -> dict[str, list[str | int]]:
    """Return the stored deals by run; see `DEALS`."""
    path = state / DEALS
    if not path.exists():
        return {}
    try:
        deals = read_json(path.read_text(encoding="utf-8"))
    except (Undecodable, UnicodeDecodeError) as error:
        raise Refusal("file", str(path), "cannot be read; restore it, or refuse runs that tune") from error
    if not isinstance(deals, dict):
        raise Refusal("file", str(path), "is not a list of deals; restore it")
    return deals
