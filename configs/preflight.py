"""Preflight of a command line: refusals before a folder is made, a ledger opened or data loaded."""

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
# Flags of Hydra that print something and run nothing.
SHOW_ONLY = ("help", "hydra_help", "shell_completion", "info")


@dataclass(frozen=True)
class CheckedJobs:
    """Command line without mistakes."""

    arguments: Namespace  # as `parse_arguments` returns them
    jobs: tuple[tuple[Job, SimulationSettings], ...] = ()  # to run; none if Hydra only prints something
    folder: Path | None = None  # absolute path of the folder of the run or sweep, if it writes one
    config_jobs: tuple[Job, ...] = ()  # whose configurations --cfg prints

    @property
    def sweep(self) -> bool:
        """Whether Hydra runs more than one job."""
        return is_sweep(self.arguments)

    @property
    def all_jobs(self) -> bool:
        """Whether `jobs` are all jobs that will run: a sweeper other than Hydra's own chooses them during the sweep."""
        return all(job.hydra.sweeper.get("_target_") == BASIC_SWEEPER for job, _ in self.jobs)


def preflight(argv: Sequence[str], *, writes: bool) -> CheckedJobs:
    """Compose and validate every job of this command line.

    Args:
        argv: Hydra's flags and overrides.
        writes: whether the jobs will write a run folder, which is then checked too.

    Raises:
        Refusal: one sentence for each mistake, of all jobs together.
    """
    args = parse_arguments(argv)
    if any(getattr(args, flag) for flag in SHOW_ONLY):
        return CheckedJobs(args)
    jobs = compose_jobs(args, from_config)
    if args.cfg is not None:
        return CheckedJobs(args, config_jobs=tuple(jobs))
    checked: list[tuple[Job, SimulationSettings]] = []
    folders: list[Path] = []
    mistakes: list[Refusal] = []
    for job in jobs:
        try:
            settings = settings_of(job)
            if writes:
                folders.append(check_folder(job, settings, sweep=is_sweep(args)))
            checked.append((job, settings))
        except Mistakes as several:
            mistakes += several.each
        except Refusal as mistake:
            mistakes.append(mistake)
    if mistakes:
        raise Mistakes(unique(mistakes))
    folder = next(iter(folders), None)  # the first: others of a sweep may have the next second in their name
    return CheckedJobs(args, tuple(checked), folder)


def check_folder(job: Job, settings: SimulationSettings, *, sweep: bool) -> Path:
    """Check the folder of a job's run, or of its sweep, without creating it; return its absolute path.

    Raises:
        Refusal: the folder cannot be written, has ".." in its path, or contains a run or sweep already.
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
    """Return a folder's absolute path; refuse it if it, or the lowest folder above it that exists, cannot be written."""
    nearest = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise Refusal(key, str(folder), f"{nearest} is a file; choose another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise Refusal(key, str(folder), f"{nearest} cannot be written; choose another folder")
    return folder.absolute()
