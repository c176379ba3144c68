"""Bodies of `fedveil simulate` and `fedveil plan`: jobs that passed the preflight, one alone or those of a sweep.

A single run is a call in this process. A job of a sweep may run on any machine to which Hydra's launcher sends it, so it
leaves `job.json` in its folder, from which the table and the exit code of a sweep are made.
"""

import contextlib
import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from .compare import JOB, format_table, natural_key, read_rows, write_csv, write_json
from .deferred import HEAVY, defer, importing

FAILED, REFUSED, INTERRUPTED = 1, 2, 130
# From best to worst; the worst job of a sweep decides its exit code.
STATUSES = ("completed", "exhausted", "refused", "failed", "interrupted")
TABLE = "sweep.csv"


@dataclass(frozen=True)
class Ended:
    """One job that has ended.

    Attributes:
        overrides: overrides of the job.
        exit_code: exit code of the job alone.
        result: content of result.json, or at least a status.
    """

    overrides: tuple[str, ...]
    exit_code: int
    result: Mapping[str, Any]

    @property
    def status(self) -> str:
        """Status in the result, one of `STATUSES` or of an audit."""
        return str(self.result.get("status", "failed"))


def simulate(
    argv: Sequence[str], as_json: bool = False, page_port: int | None = None, accept_sweep: bool = False
) -> int:
    """Run ``fedveil simulate``; return 0 when every job completed, otherwise the exit code of the worst.

    Args:
        argv: Hydra's flags and overrides.
        as_json: print results as JSON, and nothing else.
        page_port: port of the page that is served during the run; 0 for any free port, None for no page.
        accept_sweep: whether a sweep of private runs on real data is not refused.
    """
    argv = allow_arguments(argv)
    checked = preflight(argv, writes=True)
    if _print_flags(checked):
        return 0
    if checked.folder is None:  # there is no job: Hydra prints what its flags request
        return _hydra(checked, argv, _job)
    new_folders = [each for each in (checked.folder, *checked.folder.parents) if not each.exists()]
    if checked.sweep:
        if page_port is not None:
            raise Refusal("--page", "with a sweep", "one page shows one run; give one value to each key")
        if not accept_sweep:
            from .plan import require_accepted

            require_accepted([settings for _, settings in checked.jobs])
        return _sweep(checked, checked.folder, new_folders, argv, as_json)
    defer(*HEAVY)
    from ..evidence.live_page import live_page

    ended: list[Ended] = []  # filled by the job, unless Hydra fails before it
    ((job, _),) = checked.jobs
    with live_page(page_port) as callbacks:

        def run(config: DictConfig) -> None:
            ended.append(_run(_this_job(config), _folder(), as_json, callbacks))

        code = run_composed(job, checked.arguments, _make_folder(checked.folder), run)
    if ended and ended[0].status == "refused":
        _remove_empty(new_folders)
    if as_json:
        _print_json(ended)
    return code or (ended[0].exit_code if ended else FAILED)


def plan(argv: Sequence[str], as_json: bool = False, plot: Path | None = None, accuracy: bool = False) -> int:
    """Run ``fedveil plan`` on a command line of simulate; return the exit code. With `accuracy` print predictions instead."""
    checked = preflight(argv, writes=False)
    if plot and checked.sweep:
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
    """Print for --help and --cfg what Hydra would not: meanings of keys, each job of a sweep; return whether that was all."""
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


def _job(config: DictConfig) -> float | None:
    """Run one job of a sweep, which Hydra calls by the name of this function; see `_run_sweep_job`."""
    return _run_sweep_job(config, quiet=False)


def _quiet_job(config: DictConfig) -> float | None:
    return _run_sweep_job(config, quiet=True)


def _run_sweep_job(config: DictConfig, quiet: bool) -> float | None:
    """Run one job of a sweep and write job.json; return the metric that `optimize` names, for a sweeper."""
    folder = _folder()
    ended = _run(_this_job(config), folder, quiet)
    fields = {"overrides": ended.overrides, "exit_code": ended.exit_code, "result": _finite(ended.result)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOB).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    if ended.status == "interrupted":
        raise KeyboardInterrupt  # ends the sweep
    metrics = ended.result.get("metrics") or {}
    objective = config.get("optimize")
    if objective is None:
        return None
    if ended.exit_code not in (0, 3) or objective not in metrics:  # 3: the budget was spent
        names = ", ".join(sorted(metrics)) or "nothing: it did not complete"
        print(Refusal("optimize", objective, f"the run reports {names}"), file=sys.stderr)
        sys.exit(REFUSED)  # Hydra shows an exception of a job as a traceback
    return float(metrics[objective])


def _this_job(config: DictConfig) -> Job:
    """Return the job that Hydra is running, of this configuration."""
    hydra_node: Any = HydraConfig.get()
    return Job(tuple(str(each) for each in hydra_node.overrides.task), config, hydra_node)


def _folder() -> Path:
    """Return the folder of the job that Hydra is running."""
    return Path(HydraConfig.get().runtime.output_dir)


def _run(job: Job, folder: Path, quiet: bool, callbacks: Sequence[Callback] = ()) -> Ended:
    """Run a job and return how it ended; errors are printed, and no exception is raised."""
    defer(*HEAVY)
    try:
        with importing():
            from ..simulations.simulate import simulate as run

        outcome = run(settings_of(job), folder, quiet=quiet, callbacks=callbacks)
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
    """Run Hydra on the command line, which makes the folder of each job and calls `job`; return Hydra's exit code."""
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
    except SystemExit as stop:  # Hydra has printed something, or failed
        return stop.code if isinstance(stop.code, int) else FAILED if stop.code else 0
    return 0


def _make_folder(folder: Path) -> Path:
    """Create the folder of a run or a sweep, and return it."""
    with refusing("hydra.run.dir", folder, "cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that are empty; each contains the one before it in the list."""
    with contextlib.suppress(OSError):  # the first that is not empty stays, with those above it
        for each in folders:
            each.rmdir()


# --- a sweep ------------------------------------------------------------------------------------------------------


def _sweep(
    checked: CheckedJobs, sweep: Path, new_folders: Sequence[Path], argv: Sequence[str], as_json: bool
) -> int:
    """Run a sweep into a folder, write and print its table, and return the exit code.

    If all jobs are refused, `new_folders`, which did not exist before, are removed again.
    """
    code = _hydra(checked, argv, _quiet_job if as_json else _job)
    folders = sorted((path.parent for path in sweep.rglob(JOB)), key=natural_key)
    ended = [_read(folder) for folder in folders]
    rows = read_rows(folders, sweep)
    with contextlib.suppress(OSError):  # on a full disk only the summary is lost
        if ended and all(each.status == "refused" for each in ended):
            _remove_refused(folders, sweep)
            _remove_empty(new_folders)
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


def _remove_refused(folders: Sequence[Path], sweep: Path) -> None:
    """Remove job.json of each job and Hydra's multirun.yaml from a sweep whose jobs were all refused, and empty folders."""
    for folder in folders:
        (folder / JOB).unlink()
        _remove_empty([each for each in (folder, *folder.parents) if sweep in each.parents])
    (sweep / "multirun.yaml").unlink(missing_ok=True)


def _read(folder: Path) -> Ended:
    """Return how the job of a folder ended, from job.json."""
    fields = json.loads((folder / JOB).read_text(encoding="utf-8"))
    return Ended(tuple(fields["overrides"]), fields["exit_code"], fields["result"])


def _print_json(ended: Sequence[Ended]) -> None:
    for each in ended:
        print(json.dumps(_finite(each.result), allow_nan=False))


def _finite(value: Any) -> Any:
    """Return a value of JSON with null for numbers that are not finite: a model that diverged has a loss of NaN."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _badness(job: Ended) -> int:
    """Return the place of a job's status in `STATUSES`; a status that is not listed is the worst."""
    return STATUSES.index(job.status) if job.status in STATUSES else len(STATUSES)
