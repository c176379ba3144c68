"""Files of a run folder, from a simulation, a server or an older release.

Only public files are read: files that only their owner may read (`audit.npy`, checkpoints) are skipped, except for the
ledger, whose entries the report shows. `operator.jsonl` is read of a declared simulation, and for its operator.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..base.refusal import Refusal, unreadable
from ..privacy.ledger.hash_chain import Entry
from ..privacy.ledger.ledger_state import read_entries
from ..privacy.ledger.store import ledgers_in
from .files import AUDIT_TERMS, CONFIG, FAREWELL, MANIFEST, METRICS, MODEL, OPERATOR, QUESTIONS, RESULT, SAVED

OWN_LEDGERS = "each client's own ledger, which limits its epsilon to this"  # the accountant of a row
MIXED = "the task mixed the examples of a step: no epsilon holds"  # begins the reason of a run that ended so
LEDGER, CLIENT_LEDGERS = "ledger", "client_ledgers"
# Files that a report is made from, beside the ledger.
READ = (CONFIG, SAVED, RESULT, METRICS, AUDIT_TERMS, MODEL)
SIMULATION = "simulation"  # `data` of a result whose data are declared simulated or public
TOTALS = ("seconds", "cpu_seconds", "joules", "bytes")  # of a run, in the last line of the operator's file
MAX_HEADER = 1 << 24  # bytes of a safetensors file's header; its readers take no longer one
Fields = Mapping[str, Any]


def read_rows(path: Path, last: float = math.inf) -> list[dict[str, Any]]:
    """Return the rounds in a file up to `last` or to the first line truncated by a crash; none without a file."""
    return [row for row in rows_in(path) if row["round"] <= last]


def rows_in(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rounds in a file, one after the other, up to the first line truncated by a crash; none without a file."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not isinstance(row, dict) or not isinstance(cast("Mapping[str, Any]", row).get("round"), int):
                return
            yield cast("dict[str, Any]", row)


@dataclass(frozen=True)
class Assessment:
    """Answers of the organisation.

    Attributes:
      answers: answers to the items of forms, by field.
      prices: prices of energy and bytes, by field.
    """

    answers: Mapping[str, str] = field(default_factory=dict[str, str])
    prices: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class RunFiles:
    """Content of a run folder.

    Attributes:
      folder: folder of the run.
      config: configuration that ran, with its references resolved.
      publishable: the same as it may be published, without values of the environment.
      result: result of a run that has ended; empty for one that has not.
      rounds: the finished rounds, as metrics.jsonl has them.
      audit: terms of the audit; empty without one.
      saved: what the run wrote down before its first round; empty where the folder does not say.
      ledger: path of the ledger of all clients together; None where there is none, or it lies elsewhere.
      entries: entries of that ledger.
      num_client_ledgers: how many ledgers of single clients lie in the folder.
      shapes: shapes of the released model's arrays, by name; empty without a model.
      model: SHA-256 of the released model's file; None without one.
      manifest: SHA-256 of the manifest by which the run was closed; None for one that was not.
      changed: files of `READ` that are not the ones of that manifest.
      assessment: what the organisation has answered.
      questions: folder of the answers that clients gave to questions; None where nobody names one.
      farewell: bytes that went after the run was closed; empty where nobody counted them.
    """

    folder: Path
    config: Fields
    publishable: Fields
    result: Fields
    rounds: Sequence[Fields]
    audit: Fields
    saved: Fields
    ledger: Path | None
    entries: Sequence[Entry]
    num_client_ledgers: int
    shapes: Mapping[str, Sequence[int]]
    model: str | None
    manifest: str | None
    changed: Sequence[str]
    assessment: Assessment
    questions: Path | None = None
    farewell: Fields = field(default_factory=dict[str, Any])

    @property
    def name(self) -> str | None:
        """Name of the run on its ledgers; None if the folder does not give it."""
        return self.saved.get("run")

    @property
    def deployed(self) -> bool:
        """Whether a server ran it for real clients."""
        return "link" in self.config

    def setting(self, *path: str) -> Any:
        """Return a value of the configuration, or None."""
        value: Any = self.config
        for step in path:
            value = cast("Fields", value).get(step) if isinstance(value, Mapping) else None
        return value


def read_run(
    folder: Path, assessment: Assessment | None = None, questions: Path | None = None, operator: bool = False
) -> RunFiles:
    """Read a run folder.

    Args:
      folder: of the run.
      assessment: what the organisation has answered.
      questions: folder of answers; by default that of the server whose run it is.
      operator: whether to read what a trusted server's operator alone may know.

    Raises:
      Refusal: it holds no run, or a file of it cannot be read.
    """
    if not (folder / CONFIG).is_file():
        raise Refusal("RUN", str(folder), "holds no run; a run that was refused wrote and spent nothing")
    result = read_object(folder / RESULT)
    saved = read_object(folder / SAVED)
    ledger = _ledger(folder, result.get("ledger") or saved.get("ledger"))
    config, publishable = read_config(folder / CONFIG)
    rounds = read_rows(folder / METRICS)
    if operator or result.get("data") == SIMULATION:
        result, rounds = _with_counts(folder, result, rounds)
    return RunFiles(
        folder=folder,
        config=config,
        publishable=publishable,
        result=result,
        rounds=rounds,
        audit=read_object(folder / AUDIT_TERMS),
        saved=saved,
        ledger=ledger,
        entries=() if ledger is None else read_entries(ledger),
        num_client_ledgers=len(ledgers_in(folder / CLIENT_LEDGERS)),
        shapes=_shapes(folder / MODEL),
        model=_hash(folder / MODEL),
        manifest=_hash(folder / MANIFEST),
        changed=_changed(folder),
        assessment=assessment or Assessment(),
        questions=questions or (folder.parent.parent / QUESTIONS if "link" in config else None),
        farewell=read_object(folder / FAREWELL),
    )


def _with_counts(folder: Path, result: Fields, rounds: Sequence[Fields]) -> tuple[Fields, list[Fields]]:
    """Return a result and rounds with the times, bytes and counts of the operator's file, where there is one."""
    path = folder / OPERATOR
    counts = {row["round"]: row for row in read_rows(path)}
    if result and path.is_file():
        last_line: Fields = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        result = {**result, **{name: last_line[name] for name in TOTALS if name in last_line}}
    return result, [{**row, **counts.get(row["round"], {})} for row in rounds]


@contextmanager
def as_a_run_wrote(folder: Path) -> Generator[None]:
    """Refuse files of a run in which the block finds a value missing, or of another kind than any run has written."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as problem:
        what = f"holds what no run has written ({type(problem).__name__}: {problem})"
        remedy = "`fedveil verify` names a changed file; if there is none, report a bug of fedveil"
        raise Refusal("RUN", str(folder), f"{what}; {remedy}") from problem


def _hash(path: Path) -> str | None:
    """Return the SHA-256 of a file, in hexadecimal; None without one."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _changed(folder: Path) -> list[str]:
    """Return the files that differ from the manifest; none for a run without one."""
    hashes = read_object(folder / MANIFEST).get("files", {})
    return [name for name in READ if name in hashes and _hash(folder / name) != hashes[name]]


def read_config(path: Path) -> tuple[Fields, Fields]:
    """Return a stored configuration with its references resolved, and as it may be published; refuse a file without one."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from ..configs.settings import publishable_keys
    from ..configs.yaml_guard import check_file

    check_file(path)
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig):
        raise Refusal("file", str(path), "holds no configuration; restore it")
    try:
        whole: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:  # an older release named other keys
        whole = OmegaConf.to_container(config, resolve=False)
    return whole, publishable_keys(config)


def flat(config: Fields, before: str = "") -> Iterator[tuple[str, str]]:
    """Yield each key of a resolved configuration with its dots, after `before`, and its value as an override takes it."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(cast("Fields", value), f"{before}{name}.")
        else:
            yield f"{before}{name}", value if isinstance(value, str) else json.dumps(value)


def read_object(path: Path) -> Fields:
    """Return the JSON object in a file of a run; empty without a file; refuse a damaged one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise Refusal("file", str(path), unreadable(problem, "restore it")) from None
    if not isinstance(content, dict):
        raise Refusal("file", str(path), "holds no JSON object; restore it")
    return cast("Fields", content)


def _ledger(folder: Path, path: str | None) -> Path | None:
    """Return the ledger of all clients: in the folder, or at the path that the run gives."""
    paths = [folder / LEDGER]
    if path:  # of a server's bundle that was moved, in its folder
        paths += [Path(path), folder.parent.parent / "ledgers" / Path(path).name]
    return next((candidate for candidate in paths if candidate.is_file()), None)


def _shapes(path: Path) -> Mapping[str, Sequence[int]]:
    """Return the shapes in a safetensors file's header, without reading arrays."""
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header: Any = json.loads(file.read(size)) if size <= MAX_HEADER else None
            return {name: each["shape"] for name, each in header.items() if name != "__metadata__"}
        except (ValueError, AttributeError, TypeError, KeyError):
            raise Refusal("file", str(path), "is not a safetensors file; restore it") from None
