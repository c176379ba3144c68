"""State of a run that is saved before its first round, and that a later process resumes the run by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

from ..base.bounded_decoding import build, read_json
from ..base.durable_files import replace_file
from ..base.refusal import Refusal, refusing
from ..server.run_status import Status
from ..tasks.arrays import hash_of_base, read_arrays
from ..tasks.protocol import PredictingTask
from .files import BASE, CONFIG, RESULT, SAVED, SCALING, SINGLY
from .manifest import TASK_FILES
from .prepared_run import Run, Saved
from .run_files import MIXED, read_object


def require_free(folder: Path) -> None:
    """Refuse a folder that already holds a run."""
    if (folder / CONFIG).exists():
        raise Refusal("hydra.run.dir", str(folder), "holds a run; choose another folder, or use resume=")


def read_saved(folder: Path) -> Saved:
    """Return the state that an earlier process left in this run folder.

    Raises:
      Refusal: it left no readable state or result, or an audit or mixed examples have ended the run.
    """
    result = read_object(folder / RESULT)
    if str(result.get("reason")).startswith(MIXED):
        raise Refusal("resume", str(folder), f"{MIXED}; mend the task and start a new run")
    if result.get("status") == Status.ALARMED:
        remedy = "an alarm of its audit ended it; find the cause and start a new run (audit.on_alarm=pause can be resumed)"
        raise Refusal("resume", str(folder), remedy)
    try:
        content = read_json((folder / SAVED).read_bytes())
        values = {field.name: content.get(field.name) for field in fields(Saved)}
        return build(Saved, {**values, "name": content["run"]})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, Refusal) as problem:
        remedy = f"its {SAVED} cannot be read ({problem}); start a new run"
        raise Refusal("resume", str(folder), remedy) from problem


def write_start(run: Run) -> None:
    """Write the state, the files of the model and, last, the configuration, with which there is a run to resume."""
    federation, folder, files = run.federation, run.folder, _files_of_model(run)
    state = asdict(_state_of(run))
    content = {
        "run": state.pop("name"),
        **state,
        SINGLY: not federation.settings.group_equal_rows,
        TASK_FILES: sorted(files),
        # For the report of a run without a result.
        "ledger": None if run.ledger is None else str(run.ledger.path),
        "population": federation.declared_clients,
        "parameters": sum(array.size for array in read_arrays(federation.task.model()).values()),
    }
    with refusing(
        federation.population.words.folder, folder, "it cannot be written; make room, or choose another"
    ):
        replace_file(folder / SAVED, json.dumps(content).encode(), mode=None)
        _write_files(folder, files)
        for roster in federation.population.rosters:
            from .rosters_in_force import note_roster  # of real clients alone

            note_roster(folder, roster, run.checkpoint.state.round + 1)
        if not (folder / CONFIG).exists():
            replace_file(folder / CONFIG, federation.settings.source.encode(), mode=None)


def _state_of(run: Run) -> Saved:
    """Return what a later process of this run needs, once its plan is fixed."""
    cohort, privacy = run.federation.cohort, run.privacy
    turns = None if cohort.turns is None else cohort.name
    state = Saved(run.name, turns=turns, deal=run.tuning.key)
    if privacy is None:
        return state
    return replace(
        state,
        noise=privacy.plan.noise_multiplier,
        filter_order=privacy.plan.filter_order,
        places=run.federation.population.position_digest(privacy.noise_key),
    )


def _files_of_model(run: Run) -> Mapping[str, bytes]:
    """Return the files that the task stores with its model, by name, and the answer by which its inputs are scaled."""
    task, files = run.federation.task, dict[str, bytes]()
    if base := hash_of_base(task):
        files[BASE] = json.dumps({"sha256": base}).encode()
    if not isinstance(task, PredictingTask):
        task = getattr(task, "task", None)  # of a task with planted examples
    if isinstance(task, PredictingTask):
        files |= task.beside_the_model()
    if run.federation.moments is not None:
        files[SCALING] = (run.folder / SCALING).read_bytes()
    return files


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of the model; refuse a resumed run whose files differ from those that it began with."""
    is_resumed = (folder / CONFIG).exists()  # otherwise they are left by a start that was killed
    for name, content in files.items():
        path = folder / name
        if is_resumed and path.exists() and path.read_bytes() != content:
            remedy = f"started with another {name}; restore it, or start a new run"
            raise Refusal("resume", str(folder), remedy)
        replace_file(path, content, mode=None)
