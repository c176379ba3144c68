"""Everything that can be refused is refused here: before a folder is made, a ledger opened or data loaded."""

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

from ..base.refusal import Refusal
from .compose import BASIC_SWEEPER, Job, compose_jobs, is_sweep, parse_arguments, unique
from .schema import SimulationSettings
from .settings import from_config, settings_of
from .strict import Mistakes

SWEEP = "sweep.json"
SHOW_ONLY = ("help", "hydra_help", "shell_completion", "info")


@dataclass(frozen=True)
class CheckedJobs:
    """A command line that may run."""

    arguments: Namespace
    jobs: tuple[tuple[Job, SimulationSettings], ...] = ()
    """Empty where the command line only asks Hydra to show something."""
    folder: Path | None = None
    """Of the run, or of the whole sweep; absolute."""
    config_jobs: tuple[Job, ...] = ()
    """Jobs of which ``--cfg`` only shows the configuration."""

    @property
    def sweep(self) -> bool:
        """Whether Hydra runs more than one job."""
        return is_sweep(self.arguments)

    @property
    def all_jobs(self) -> bool:
        """Whether these are all jobs that will run; another sweeper than Hydra's own chooses as it goes."""
        return all(job.hydra.sweeper.get("_target_") == BASIC_SWEEPER for job, _ in self.jobs)


def preflight(argv: Sequence[str], *, writes: bool) -> CheckedJobs:
    """Compose and validate every job of this command line.

    Args:
        argv: Hydra's flags and overrides.
        writes: whether the jobs will write a run folder, which then is looked at too.

    Raises:
        Refusal: one sentence for each mistake, of all jobs together.
    """
    args = parse_arguments(argv)
    if any(getattr(args, flag) for flag in SHOW_ONLY):
        return CheckedJobs(args)
    jobs = compose_jobs(args, from_config)
    folder: Path | None = None
    if args.cfg is not None:
        return CheckedJobs(args, config_jobs=tuple(jobs))
    checked: list[tuple[Job, SimulationSettings]] = []
    mistakes: list[Refusal] = []
    for job in jobs:
        try:
            settings = settings_of(job)
            if writes:
                job_folder = check_folder(job, settings, sweep=is_sweep(args))
                folder = folder or job_folder  # the first job's: the clock may move on between two jobs
            checked.append((job, settings))
        except Mistakes as several:
            mistakes += several.each
        except Refusal as mistake:
            mistakes.append(mistake)
    if mistakes:
        raise Mistakes(unique(mistakes))
    return CheckedJobs(args, tuple(checked), folder)


def check_folder(job: Job, settings: SimulationSettings, *, sweep: bool) -> Path:
    """Return the absolute run folder.

    Raises:
        Refusal: it cannot be written, climbs out of where it stands, or holds a run already.
    """
    if settings.resume is not None:
        if sweep:
            raise Refusal("resume", settings.resume, "continues one run; leave out -m")
        return _check_writable("resume", Path(settings.resume))
    key = "hydra.sweep.dir" if sweep else "hydra.run.dir"
    try:
        folder = Path(str((job.hydra.sweep if sweep else job.hydra.run).dir))
    except OmegaConfBaseException as error:
        raise Refusal(key, "${...}", " ".join(str(error).split())) from None
    if ".." in folder.parts:
        raise Refusal(key, str(folder), "must not climb with '..'; name the folder by its own path")
    if sweep and (folder / SWEEP).exists():
        raise Refusal(key, str(folder), "already holds a sweep; choose another folder")
    if not sweep and (folder / "config.yaml").exists():
        raise Refusal(key, str(folder), f"already holds a run; resume={folder} continues it")
    return _check_writable(key, folder)


def _check_writable(key: str, folder: Path) -> Path:
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise Refusal(key, str(folder), f"{nearest} is a file; choose another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise Refusal(key, str(folder), f"{nearest} cannot be written; choose another folder")
    return folder.absolute()
