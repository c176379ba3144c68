"""What must hold of a federation of processes, whatever was killed or cut off: read from the files that it left."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedveil.privacy.ledger.ledger import read_entries, verify

Entries = dict[Path, list[tuple[int, str]]]


@dataclass
class Lived:
    """A run that has ended.

    Attributes:
      hearts: the federation's folder.
      run: the name that people give it.
      rounds: how many it was to have.
      kills: how often its server was killed.
      before: the rows of its rounds that were done at the server's last kill.
      paid: what stood on which ledger at some moment before the end.
    """

    hearts: Path
    run: str
    rounds: int
    kills: int = 0
    before: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    paid: Entries = field(default_factory=Entries)

    @property
    def folder(self) -> Path:
        return self.hearts / "server" / "runs" / self.run

    @property
    def population(self) -> Path:
        (path,) = (self.hearts / "server" / "ledgers").glob("*.ledger")
        return path

    @property
    def own(self) -> list[Path]:
        return sorted((self.hearts / "clients").glob("*/state/ledgers/client-*.ledger"))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rounds in a run's folder, but for a line in the making."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def entries_of(hearts: Path) -> Entries:
    """Return what stands on every ledger of a federation."""
    return {path: [(e.seq, e.hash) for e in read_entries(path)] for path in hearts.rglob("*.ledger")}


def reservations(path: Path, run: str) -> list[tuple[str, int]]:
    """Return run and round of all that is reserved on a ledger in the run's name, oldest first."""
    keys = [json.loads(entry.key) for entry in read_entries(path) if entry.kind == "reserve"]
    return [(name, number) for name, number, _ in keys if name.startswith(f"{run}@")]


def names_of(path: Path, run: str) -> dict[int, list[str]]:
    """Return the names under which each round is on a ledger, oldest first; after a kill there is a new one."""
    found: dict[int, list[str]] = {}
    for name, number in reservations(path, run):
        found.setdefault(number, []).append(name)
    return found


def noise_over_charge(lived: Lived) -> Iterator[float]:
    """Return for each round by how much its sum moved the model, over the noise that its reservation names.

    The updates are small beside the noise; who is assumed to collude adds more than is charged. A model that did not
    move gives 0. Of a model that begins at zero, with the checkpoint of every round (`deaths.py` keeps them).
    """
    before: Any = 0.0
    for row in rows_of(lived.folder):
        arrays = load_file(lived.folder / f"{row['round']}.safetensors")
        model = [value.ravel() for name, value in sorted(arrays.items()) if name.startswith("model/")]
        after = np.concatenate(model)
        charged = _charged(lived, row["round"]) * row["clipping_norm"]
        yield float(np.std(after - before)) * max(1, row["replies"]) / charged
        before = after


def _charged(lived: Lived, number: int) -> float:
    name = names_of(lived.population, lived.run)[number][-1]
    reserved = {e.key: e.payload for e in read_entries(lived.population) if e.kind == "reserve"}
    (payload,) = (reserved[key] for key in reserved if json.loads(key)[:2] == [name, number])
    return min(event["noise_multiplier"] for event in json.loads(payload)["events"].values())


def whole_status(lost: int, kills: int, reason: str) -> str:
    """Return the status of a run that lacks so many rounds, after so many kills of its server.

    A round that was paid for and lost with a killed server cannot be paid again: then the run is over without it.
    """
    paid = 0 < lost <= kills and "lost when the run was stopped" in reason
    return "completed" if lost == 0 or paid else "interrupted"


def wrongs(lived: Lived, most: float, owners_most: float) -> Iterator[str]:
    """Return what must not be; the population's epsilon is at most `most`, each client's own `owners_most`."""
    rows, result = rows_of(lived.folder), json.loads((lived.folder / "result.json").read_text())
    whole = whole_status(lived.rounds - len(rows), lived.kills, result["reason"])
    if result["status"] != whole or [row["round"] for row in rows] != list(range(1, len(rows) + 1)):
        yield f"{result['status']} with rounds {[row['round'] for row in rows]}"
    if result["status"] == "completed" and all(row["abandoned"] for row in rows):
        yield "completed, though no round released anything"
    if rows[: len(lived.before)] != lived.before:
        yield "rounds that were done before the kill are others after it"
    if len({row["noise_multiplier"] for row in rows}) > 1 + lived.kills:
        yield "the noise was planned anew without a kill"
    for path, known in lived.paid.items():
        if entries_of(lived.hearts)[path][: len(known)] != known:
            yield f"{path}: what stood there is gone"
    yield from _wrong_ledgers(
        lived, rows, result, {lived.population: most} | dict.fromkeys(lived.own, owners_most)
    )


def _wrong_ledgers(
    lived: Lived, rows: list[dict[str, Any]], result: dict[str, Any], most: dict[Path, float]
) -> Iterator[str]:
    named = names_of(lived.population, lived.run)
    if sum(len(names) - 1 for names in named.values()) > lived.kills:
        yield f"more rounds lost than kills: {named}"
    for path, epsilon in most.items():
        found = verify(path)
        if not found.ok or not 0 < found.epsilon <= epsilon:
            yield f"{path}: {found}"
    if {row["epsilon"] for row in result["privacy"]} != {verify(lived.population).epsilon}:
        yield f"told {result['privacy']}, but on the ledger is {verify(lived.population).epsilon}"
    reserved = set(reservations(lived.population, lived.run))
    for each in lived.own:
        if not set(reservations(each, lived.run)) <= reserved:
            yield f"{each}: more was asked of it than the server had reserved"
    own = [names_of(each, lived.run) for each in lived.own]
    for row in rows:
        names = named.get(row["round"], [])
        if not row["abandoned"] and not names:
            yield f"round {row['round']} was released without a reservation"
        paid = sum(names[-1:] == each.get(row["round"], [])[-1:] for each in own)
        if paid < row["replies"]:
            yield f"round {row['round']}: {row['replies']} sent a vector, {paid} have it on their ledgers"
