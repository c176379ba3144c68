"""Trackers of runs as callbacks: a CSV file, TensorBoard, MLflow, Weights & Biases."""

from __future__ import annotations

import csv
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from ..configs.strict import leaves
from .callbacks import RoundEnd, RunEnd, RunStart

ONE_RUN = "fedveil.run"  # MLflow's tag that identifies a resumed run


def numbers_of(row: Mapping[str, Any], above: str = "") -> dict[str, float]:
    """Return the finite numbers of a round's line, `dropped` by its reasons.

    Args:
      row: a line of metrics.jsonl.
      above: prefix of each name.
    """
    numbers: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            numbers |= numbers_of(value, f"{above}{name}/")
        elif isinstance(value, int | float) and value - value == 0:  # neither infinite nor NaN
            numbers[above + name] = float(value)
    return numbers


def texts_of(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the keys of a configuration, in the command line's spelling, and their values as text."""
    for name, value in leaves(config):
        if value is not None:
            yield name, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _id_of(run: RunStart) -> str:
    """Return a name that stays the same when the run of this folder resumes."""
    return hashlib.sha256(str(run.folder.resolve()).encode()).hexdigest()[:16]


class MetricsCsv:
    """Writes metrics.csv into the run folder: a row for each round, a column for each number of any round."""

    def start(self, run: RunStart) -> None:
        """Write the finished rounds."""
        self._path, self._rows = run.folder / "metrics.csv", list[dict[str, Any]]()
        self._columns: dict[str, None] = {}
        for row in run.rows:
            self._write(row)

    def round(self, end: RoundEnd) -> None:
        """Write the round's row."""
        self._write(end.row)

    def _write(self, row: Mapping[str, Any]) -> None:
        self._rows.append({k: v for k, v in row.items() if not isinstance(v, Mapping | list | tuple)})
        fresh = self._rows[-1].keys() - self._columns  # an evaluation's, which not every round has
        self._columns |= dict.fromkeys(self._rows[-1])
        with open(self._path, "w" if fresh else "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            if fresh:
                writer.writeheader()
            writer.writerows(self._rows if fresh else self._rows[-1:])

    def end(self, ending: RunEnd) -> None:
        """Do nothing: every row is written."""


class TensorBoard:
    """Writes event files into the folder `tensorboard` of the run; `tensorboard --logdir runs` finds them."""

    def start(self, run: RunStart) -> None:
        """Open an event file, and write the configuration as text."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=len(run.rows) + 1)
        lines = "\n".join(f"    {key}={value}" for key, value in texts_of(run.config))
        self._writer.add_text("configuration", lines, len(run.rows))

    def round(self, end: RoundEnd) -> None:
        """Write the round's numbers."""
        for name, value in numbers_of(end.row).items():
            self._writer.add_scalar(name, value, end.round)
        self._writer.flush()

    def end(self, ending: RunEnd) -> None:
        """Write how the run ended."""
        self._writer.add_text(
            "ending", f"{ending.status}: {ending.reason}", ending.result["rounds_completed"]
        )
        self._writer.close()


class MLflow:
    """Logs to MLflow's tracking server, where MLFLOW_TRACKING_URI says, in the experiment MLFLOW_EXPERIMENT_NAME.

    A resumed run continues the same run of MLflow.
    """

    def start(self, run: RunStart) -> None:
        """Begin or continue MLflow's run, with the configuration as its parameters."""
        self._mlflow: Any = import_module("mlflow")
        self._client = self._mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedveil")
        existing = self._client.get_experiment_by_name(name)
        experiment = existing.experiment_id if existing else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment], f"tags.`{ONE_RUN}` = '{_id_of(run)}'")
        if runs:
            self._run = runs[0].info.run_id
            return
        created = self._client.create_run(experiment, tags={ONE_RUN: _id_of(run)}, run_name=run.name)
        self._run = created.info.run_id
        params = [self._mlflow.entities.Param(key, value[:500]) for key, value in texts_of(run.config)]
        self._client.log_batch(self._run, params=params)

    def round(self, end: RoundEnd) -> None:
        """Log the round's numbers."""
        now, metric = int(1000 * time.time()), self._mlflow.entities.Metric
        metrics = [metric(name, value, now, end.round) for name, value in numbers_of(end.row).items()]
        self._client.log_batch(self._run, metrics=metrics)

    def end(self, ending: RunEnd) -> None:
        """Log result and model as artifacts, and end MLflow's run."""
        for name in ("result.json", "model.safetensors"):
            if (ending.folder / name).exists():
                self._client.log_artifact(self._run, str(ending.folder / name))
        self._client.set_tag(self._run, "status", ending.status)
        over = "FINISHED" if ending.status in ("completed", "exhausted") else "FAILED"
        self._client.set_terminated(self._run, "KILLED" if ending.status == "interrupted" else over)


class WandB:
    """Logs to Weights & Biases, by its own settings: WANDB_PROJECT, WANDB_MODE=offline and the others.

    A resumed run continues the same run there.
    """

    def start(self, run: RunStart) -> None:
        """Begin or continue the run."""
        wandb: Any = import_module("wandb")
        config, folder = dict(texts_of(run.config)), str(run.folder)
        self._run: Any = wandb.init(
            id=_id_of(run), name=run.name, dir=folder, config=config, resume="allow", reinit="create_new"
        )

    def round(self, end: RoundEnd) -> None:
        """Log the round's numbers."""
        self._run.log(numbers_of(end.row), step=end.round)

    def end(self, ending: RunEnd) -> None:
        """Write how the run ended."""
        self._run.summary["status"] = ending.status
        self._run.finish(exit_code=0 if ending.status in ("completed", "exhausted") else 1)
