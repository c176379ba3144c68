"""Runs what the preflight let pass: one job or a sweep, and the table and exit code that come of it."""

import json
import math
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ..configs.compose import OWN_CONFIGS, PRIMARY, VERSION_BASE, Job
from ..configs.preflight import Checked, preflight
from ..configs.settings import settings_of
from ..privacy.refusal import Refusal

REFUSED = 2
FAILED = 1
INTERRUPTED = 130
# From best to worst; the worst job of a sweep decides its exit code.
STATUSES = ("completed", "exhausted", "refused", "failed", "interrupted")


@dataclass(frozen=True)
class Ended:
    """How one job ended."""

    overrides: str
    exit_code: int
    result: Mapping[str, Any]

    @property
    def status(self) -> str:
        return str(self.result.get("status", "failed"))


def simulate(argv: Sequence[str]) -> int:
    """``fedveil simulate``: 0 when every job completed, otherwise the exit code of the worst."""
    as_json = "--json" in argv
    given = [each for each in argv if each != "--json"]
    checked = preflight(given, writes=True)
    ended: list[Ended] = []
    code = _hydra(checked, given, ended, quiet=as_json)
    if code or not checked.jobs:
        return code
    return _report(checked, ended, as_json)


def plan(argv: Sequence[str]) -> int:
    """``fedveil plan``: the same command line, no training and no folder."""
    as_json = "--json" in argv
    argv = [each for each in argv if each != "--json"]
    checked = preflight(argv, writes=False)
    if not checked.jobs:
        return _hydra(checked, argv, [])
    from .plan import show_plan

    codes: list[int] = []
    for job, settings in checked.jobs:
        if checked.sweep and not as_json:
            print(f"# {' '.join(job.overrides)}")
        codes.append(show_plan(settings, as_json=as_json))
    return max(codes)


def _hydra(checked: Checked, argv: Sequence[str], ended: list[Ended], quiet: bool = False) -> int:
    """Hand the command line to Hydra, which makes the folder of each job and calls it.

    Returns:
        0 unless Hydra itself could not go on; how each job ended is in ``ended``.
    """

    def job(config: DictConfig) -> None:
        context: Any = HydraConfig.get()
        overrides = tuple(str(each) for each in context.overrides.task)
        this = Job(overrides, config, context)
        ended.append(_run(this, Path(context.runtime.output_dir), quiet))
        if ended[-1].status == "interrupted":
            raise KeyboardInterrupt

    flags = [*argv]
    if checked.arguments.config_path is not None:
        flags += ["--config-path", checked.arguments.config_path]
    if checked.folder is not None:
        flags.append(f"hydra.{'sweep' if checked.sweep else 'run'}.dir={_quoted(_made(checked.folder))}")
    sys.argv = ["fedveil", *flags]
    try:
        hydra.main(config_path=OWN_CONFIGS, config_name=PRIMARY, version_base=VERSION_BASE)(job)()
    except KeyboardInterrupt:
        return 0 if ended else INTERRUPTED
    except SystemExit as stop:  # how Hydra ends when it has shown something, or could not go on
        return stop.code if isinstance(stop.code, int) else FAILED if stop.code else 0
    return 0


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal("hydra.run.dir", str(folder), f"cannot be made ({error.strerror})") from None
    return folder


def _quoted(path: Path) -> str:
    """A path as a string of Hydra's grammar."""
    return "'" + str(path).replace("'", "\\'") + "'"


def _run(job: Job, folder: Path, quiet: bool) -> Ended:
    overrides = " ".join(job.overrides) or "defaults"
    try:
        from ..simulations.simulate import simulate as run

        outcome = run(settings_of(job), folder, quiet=quiet)
        return Ended(overrides, outcome.exit_code, outcome.result)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return Ended(overrides, REFUSED, {"status": "refused", "reason": str(refusal)})
    except KeyboardInterrupt:
        return Ended(overrides, INTERRUPTED, {"status": "interrupted"})
    except Exception as error:  # noqa: BLE001 (the other jobs of a sweep go on)
        traceback.print_exc()
        print(f"fedveil: the run failed: {type(error).__name__}: {error}", file=sys.stderr)
        return Ended(overrides, FAILED, {"status": "failed", "reason": f"{type(error).__name__}: {error}"})


def _report(checked: Checked, ended: Sequence[Ended], as_json: bool) -> int:
    if as_json:
        for each in ended:
            print(json.dumps(_finite(each.result), allow_nan=False))
    elif checked.sweep:
        print(_table(ended))
    interrupted = any(each.status == "interrupted" for each in ended)
    if len(ended) < len(checked.jobs) and not interrupted:
        print(f"fedveil: only {len(ended)} of {len(checked.jobs)} jobs told how they ended", file=sys.stderr)
        return FAILED
    return max(ended, key=_badness).exit_code if ended else 0


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for: a model that diverged has a loss of NaN."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _badness(job: Ended) -> int:
    return STATUSES.index(job.status) if job.status in STATUSES else len(STATUSES)


def _table(ended: Sequence[Ended]) -> str:
    rows = [("job", "status", "accuracy", "epsilon")]
    for each in ended:
        accuracy = each.result.get("metrics", {}).get("accuracy")
        rows.append(
            (each.overrides, each.status, _number(accuracy), _epsilons(each.result.get("privacy", [])))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _epsilons(privacy: Sequence[Mapping[str, Any]]) -> str:
    """What whoever gets the model learns, for each unit."""
    units = [f"{row['unit']} {float(row['epsilon']):.3g}" for row in privacy if row["adversary"] == "model"]
    return ", ".join(units) or "-"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"
