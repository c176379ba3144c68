"""Runs that the preflight let pass: one job or a sweep, and the table and exit code that come of it.

A single run is Hydra's call in this process. A job of a sweep may run anywhere that a launcher takes it: it leaves
`job.json` in its folder, and all that is said of a sweep is read from there.
"""

import contextlib
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ..base.refusal import Refusal, refusing
from ..configs.compose import (
    PRIMARY,
    SHIPPED_CONFIGS,
    VERSION_BASE,
    Job,
    allow_arguments,
    compose_jobs,
    run_composed,
)
from ..configs.overrides import quoted
from ..configs.preflight import SWEEP, CheckedJobs, preflight
from ..configs.settings import settings_of
from ..run.callbacks import Callback
from .compare import JOB, format_table, read_rows, write_csv, write_json
from .deferred import HEAVY, defer, importing

REFUSED = 2
FAILED = 1
INTERRUPTED = 130
# From best to worst; the worst job of a sweep decides its exit code.
STATUSES = ("completed", "exhausted", "refused", "failed", "interrupted")
TABLE = "sweep.csv"


@dataclass(frozen=True)
class Ended:
    """How one job ended.

    Attributes:
        overrides: that made the job.
        exit_code: of the job alone.
        result: as result.json has it, at least a status.
    """

    overrides: tuple[str, ...]
    exit_code: int
    result: Mapping[str, Any]

    @property
    def status(self) -> str:
        """Word of the result."""
        return str(self.result.get("status", "failed"))


def simulate(
    argv: Sequence[str], as_json: bool = False, page_port: int | None = None, accept_sweep: bool = False
) -> int:
    """Run ``fedveil simulate``; return 0 when every job completed, otherwise the exit code of the worst.

    Args:
        argv: Hydra's flags and overrides.
        as_json: print results as JSON, and nothing else.
        page_port: of the page that is served while the run goes on; 0 lets the system choose, None serves none.
        accept_sweep: run several private runs on real data without asking.
    """
    argv = allow_arguments(argv)
    checked = preflight(argv, writes=True)
    if _print_flags(checked):
        return 0
    if not checked.jobs:
        return _hydra(checked, argv, _job)
    assert checked.folder is not None
    new = [each for each in (checked.folder, *checked.folder.parents) if not each.exists()]
    if checked.sweep:
        if page_port is not None:
            raise Refusal("--page", "with a sweep", "one page shows one run; give one value to each key")
        if not accept_sweep:
            from .plan import require_accepted

            require_accepted([settings for _, settings in checked.jobs])
        return _sweep(checked, new, argv, as_json)
    defer(*HEAVY)
    from ..evidence.live_page import live_page

    ended: list[Ended] = []
    ((job, _),) = checked.jobs
    with live_page(page_port) as watching:
        run_into = partial(_run_into, ended, as_json, watching)
        code = run_composed(job, checked.arguments, _make_folder(checked.folder), run_into)
    if ended and ended[0].status == "refused":
        _remove_empty(new)
    if as_json:
        _print_json(ended)
    return code or (ended[0].exit_code if ended else FAILED)


def plan(argv: Sequence[str], as_json: bool = False, plot: Path | None = None, accuracy: bool = False) -> int:
    """Run ``fedveil plan``: the same command line, no training and no folder."""
    checked = preflight(argv, writes=False)
    if plot is not None and checked.sweep:
        raise Refusal("--plot", str(plot), "one picture shows one plan; give one value to each key")
    if _print_flags(checked):
        return 0
    if not checked.jobs:
        return _hydra(checked, argv, _job)
    if accuracy:
        from .plan import show_accuracy

        return max(show_accuracy(job, settings, as_json=as_json) for job, settings in checked.jobs)
    defer(*HEAVY)
    from .plan import show_plan

    codes: list[int] = []
    for job, settings in checked.jobs:
        if checked.sweep and not as_json:
            print(f"# {' '.join(job.overrides)}")
        codes.append(show_plan(settings, as_json=as_json, plot=plot))
    return max(codes)


def _print_flags(checked: CheckedJobs) -> bool:
    """Print the output of Hydra's flags that Hydra lacks: keys and their meaning, a sweep's jobs."""
    args = checked.arguments
    if args.help:
        from ..configs.reference import help_text
        from ..configs.schema import SimulationSettings

        print(help_text(compose_jobs(args)[0].config, SimulationSettings))
        return True
    if args.cfg == "job" and checked.sweep:
        for job in checked.config_jobs:
            print(f"# {' '.join(job.overrides)}\n{OmegaConf.to_yaml(job.config, resolve=args.resolve)}")
        return True
    return False


# --- one job ------------------------------------------------------------------------------------------------------


def _run_into(ended: list[Ended], quiet: bool, watching: "Sequence[Callback]", config: DictConfig) -> None:
    ended.append(_run(_this(config), _folder(), quiet, watching))


def _job(config: DictConfig) -> float | None:
    """Run one job of a sweep; return its objective, if a sweeper wants one."""
    return _run_sweep_job(config, quiet=False)


def _quiet_job(config: DictConfig) -> float | None:
    return _run_sweep_job(config, quiet=True)


def _run_sweep_job(config: DictConfig, quiet: bool) -> float | None:
    folder = _folder()
    ended = _run(_this(config), folder, quiet)
    fields = {"overrides": ended.overrides, "exit_code": ended.exit_code, "result": _finite(ended.result)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOB).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    if ended.status == "interrupted":
        raise KeyboardInterrupt
    metrics = ended.result.get("metrics") or {}
    objective = config.get("optimize")
    if objective is None:
        return None
    if ended.exit_code not in (0, 3) or objective not in metrics:
        names = ", ".join(sorted(metrics)) or "nothing: it did not complete"
        print(Refusal("optimize", objective, f"the run reports {names}"), file=sys.stderr)
        sys.exit(REFUSED)  # Hydra shows an exception of a job as a traceback
    return float(metrics[objective])


def _this(config: DictConfig) -> Job:
    context: Any = HydraConfig.get()
    return Job(tuple(str(each) for each in context.overrides.task), config, context)


def _folder() -> Path:
    return Path(HydraConfig.get().runtime.output_dir)


def _run(job: Job, folder: Path, quiet: bool, watching: "Sequence[Callback]" = ()) -> Ended:
    defer(*HEAVY)
    try:
        with importing():
            from ..simulations.simulate import simulate as run

        outcome = run(settings_of(job), folder, quiet=quiet, callbacks=watching)
        return Ended(job.overrides, outcome.exit_code, outcome.result)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return Ended(job.overrides, REFUSED, {"status": "refused", "reason": str(refusal)})
    except KeyboardInterrupt:
        return Ended(job.overrides, INTERRUPTED, {"status": "interrupted"})
    except Exception as error:  # noqa: BLE001 (the other jobs of a sweep go on)
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        print(f"fedveil: the run failed: {reason}", file=sys.stderr)
        return Ended(job.overrides, FAILED, {"status": "failed", "reason": reason})


# --- Hydra --------------------------------------------------------------------------------------------------------


def _hydra(checked: CheckedJobs, argv: Sequence[str], job: Callable[[DictConfig], Any]) -> int:
    """Hand the command line to Hydra, which makes the folder of each job and calls it.

    Returns:
        0 unless Hydra itself could not go on.
    """
    flags = [*argv]
    if checked.arguments.config_path is not None:
        flags += ["--config-path", checked.arguments.config_path]
    if checked.folder is not None:
        flags.append(f"hydra.sweep.dir={quoted(str(_make_folder(checked.folder)))}")
    sys.argv = ["fedveil", *flags]
    try:
        hydra.main(config_path=SHIPPED_CONFIGS, config_name=PRIMARY, version_base=VERSION_BASE)(job)()
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:  # how Hydra ends when it has shown something, or could not go on
        return stop.code if isinstance(stop.code, int) else FAILED if stop.code else 0
    return 0


def _make_folder(folder: Path) -> Path:
    with refusing("hydra.run.dir", folder, "cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that hold nothing, each before the one that holds it."""
    with contextlib.suppress(OSError):  # the first that holds something, and those above it, stay
        for each in folders:
            each.rmdir()


# --- a sweep ------------------------------------------------------------------------------------------------------


def _sweep(checked: CheckedJobs, new: Sequence[Path], argv: Sequence[str], as_json: bool) -> int:
    assert checked.folder is not None
    sweep = checked.folder
    code = _hydra(checked, argv, _quiet_job if as_json else _job)
    folders = sorted((path.parent for path in sweep.rglob(JOB)), key=_order)
    ended = [_read(folder) for folder in folders]
    rows = read_rows(folders, sweep)
    with contextlib.suppress(OSError):  # a full disk loses no more than the summary
        if ended and all(each.status == "refused" for each in ended):
            _forget(folders, sweep)
            _remove_empty(new)
        else:
            write_json(rows, sweep / SWEEP)
            write_csv(rows, sweep / TABLE)
    if as_json:
        _print_json(ended)
    else:
        print(format_table(rows))
    worst = max(ended, key=_badness).exit_code if ended else 0
    if code == INTERRUPTED or any(each.status == "interrupted" for each in ended):
        return INTERRUPTED
    if checked.all_jobs and len(ended) < len(checked.jobs):
        print(f"fedveil: only {len(ended)} of {len(checked.jobs)} jobs reported a result", file=sys.stderr)
        return FAILED
    return worst or code


def _forget(folders: Sequence[Path], sweep: Path) -> None:
    """Remove what refused jobs, and Hydra, have left of a sweep in which no job ran."""
    for folder in folders:
        (folder / JOB).unlink()
        _remove_empty([each for each in (folder, *folder.parents) if sweep in each.parents])
    (sweep / "multirun.yaml").unlink(missing_ok=True)


def _read(folder: Path) -> Ended:
    fields = json.loads((folder / JOB).read_text(encoding="utf-8"))
    return Ended(tuple(fields["overrides"]), fields["exit_code"], fields["result"])


def _order(folder: Path) -> tuple[int, str]:
    """Return the sort key of a folder: the number of its job, otherwise its name."""
    return (int(folder.name), "") if folder.name.isdigit() else (0, str(folder))


def _print_json(ended: Iterator[Ended] | Sequence[Ended]) -> None:
    for each in ended:
        print(json.dumps(_finite(each.result), allow_nan=False))


def _finite(value: Any) -> Any:
    """Return the same with null for what JSON has no number for: a model that diverged has a loss of NaN."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _badness(job: Ended) -> int:
    return STATUSES.index(job.status) if job.status in STATUSES else len(STATUSES)
