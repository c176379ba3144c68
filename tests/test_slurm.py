"""Slurm's scripts of examples/slurm: which command each task runs, by programs in the place of Slurm's, Ray's and fedveil's."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedveil.configs.settings import settings_from_overrides

SCRIPTS = Path(__file__).parents[1] / "examples" / "slurm"
# Each writes its arguments to a file; srun then runs the command after its own options.
SRUN = """\
echo srun "$@" >> "$SAID"
while case $1 in --*) true ;; *) false ;; esac; do shift; done
exec "$@"
"""
SAYS = 'echo $(basename "$0") "$@" >> "$SAID"\n'
PROGRAMS = {
    "srun": SRUN,
    # It begins once Ray has, which the scripts start beside it.
    "fedveil": 'while [ $(grep -c "^ray start" "$SAID") -lt ${STARTS:-0} ]; do sleep 0.1; done\n' + SAYS,
    "scontrol": "echo n1; echo n2\n",
    "ray": '[ "$RAY_AUTH_MODE" = token ] && echo "$RAY_AUTH_TOKEN" >> "$TOKEN"\n' + SAYS,
    "hostname": "echo 192.0.2.7 192.0.2.8\n",
}
CELLS = [f"privacy.target_epsilon={epsilon} seed={seed}" for epsilon in (1, 3) for seed in (0, 1)]


def said(folder: Path, script: str, environment: Mapping[str, str], code: int = 0) -> list[str]:
    """Return the commands of a script, and expect an exit code."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, body in PROGRAMS.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{body}")
        (folder / "bin" / name).chmod(0o755)
    (folder / "said").write_text("")
    paths = {"SAID": str(folder / "said"), "TOKEN": str(folder / "token")}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(SCRIPTS / script)],
        cwd=folder,
        env={"PATH": path, "SLURM_CPUS_PER_TASK": "2", **paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return (folder / "said").read_text().splitlines()


def require_settings(command: str) -> None:
    """Read the settings of a command as `fedveil simulate` does."""
    settings_from_overrides([each for each in command.split()[2:] if not each.startswith("hydra.")])


@pytest.mark.parametrize("task", range(len(CELLS)))
def test_a_task_of_a_sweep_runs_its_cell(task: int, tmp_path: Path) -> None:
    *_, command = said(tmp_path, "sweep.sbatch", {"SLURM_ARRAY_TASK_ID": str(task)})
    assert command == f"fedveil simulate task=digits num_rounds=30 {CELLS[task]} hydra.run.dir=sweep/{task}"
    require_settings(command)


def test_a_requeued_task_of_a_sweep_goes_on(tmp_path: Path) -> None:
    (tmp_path / "sweep" / "1").mkdir(parents=True)
    (tmp_path / "sweep" / "1" / "run.json").touch()
    *_, command = said(tmp_path, "sweep.sbatch", {"SLURM_ARRAY_TASK_ID": "1"})
    assert command == "fedveil simulate resume=sweep/1"


def test_a_task_without_a_cell_is_refused(tmp_path: Path) -> None:
    assert said(tmp_path, "sweep.sbatch", {"SLURM_ARRAY_TASK_ID": str(len(CELLS))}, code=2) == []


def test_a_run_on_two_nodes_starts_ray_behind_a_token(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "31", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "STARTS": "2"}
    commands = said(tmp_path, "ray.sbatch", job)
    other, head = sorted(each for each in commands if each.startswith("ray start"))
    address = "192.0.2.7:20031"
    assert head.startswith("ray start --head --node-ip-address=192.0.2.7 --port=20031 ")
    assert other.startswith(f"ray start --address={address} ")
    assert [
        each
        for each in commands
        if each.startswith("srun") and "--exclude=n1 " in each and "--nodes=1 " in each
    ]
    (run,) = [each for each in commands if each.startswith("fedveil")]
    assert f"engine=ray engine.address={address} engine.num_cpus=4 hydra.run.dir=ray-31" in run
    require_settings(run)
    (token,) = set((tmp_path / "token").read_text().split())
    assert len(token) == 64 and not [each for each in commands if token in each]
