"""Deferred packages, and what each verb imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    *(
        "torch",
        "opacus",
        "flwr",
        "ray",
        "hydra",
        "matplotlib",
        "dp_accounting",
        "scipy",
        "scipy.optimize",
        "scipy.signal._signaltools",
        "scipy.stats._stats_py",
        "sklearn",
        "pydantic",
        "sympy",
        "httpx._client",
    ),
    *("rich", "numpy", "typer"),
)


UNUSED_BY_A_RUN = {
    *("opacus", "sympy", "ray", "sklearn", "httpx._client"),
    *("scipy.optimize", "scipy.signal._signaltools", "scipy.stats._stats_py"),
}


ACCOUNTING = {name for name in HEAVY if name.startswith("scipy")} | {"dp_accounting"}


def imported(*argv: str, folder: Path) -> set[str]:
    """Return which of the heavy modules a command has imported when it is over."""
    script = (
        "import sys; from fedveil.__main__ import main; sys.argv[0] = 'fedveil'; main();"
        f"print('IMPORTED', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    command, at_home = [sys.executable, "-c", script, *argv], {**os.environ, "HOME": str(folder)}
    process = subprocess.run(command, cwd=folder, env=at_home, capture_output=True, text=True, check=True)
    return set(process.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    ("argv", "allowed"),
    [
        (("--version",), set[str]()),
        (("--help",), {"typer"}),
        (("ledger", "show"), {"typer"}),
        (("ledger", "show", "--help"), {"typer"}),
        (("simulat",), {"typer"}),
        (("client", "status", "nowhere"), {"typer", "flwr", "rich", "numpy", "pydantic", "httpx._client"}),
        (("client", "status", "nowhere", "--probe"), {"typer"}),
        (("server", "status", "nowhere", "--probe"), {"typer"}),
        (("server", "status", "nowhere"), {"typer", "rich", "numpy"}),
        (("audit", "claim", "--epsilon", "x", "--delta", "0"), ACCOUNTING | {"typer", "numpy"}),
        (("budget", "show"), {"typer", "numpy", "rich"}),
        (("simulate", "--cfg", "job"), {"typer", "hydra", "numpy", "pydantic"}),
        (("simulate", "num_rounds=0"), {"typer", "hydra", "numpy", "pydantic"}),
        (("simulate", "num_rounds=1"), set(HEAVY) - UNUSED_BY_A_RUN),
        # What a record loses by sums of whole clients is dp_accounting's own, under replace-one.
        (("plan",), ACCOUNTING | {"typer", "hydra", "numpy", "pydantic", "rich"}),
    ],
)
def test_verb_imports_only_its_needs(argv: tuple[str, ...], allowed: set[str], tmp_path: Path) -> None:
    assert imported(*argv, folder=tmp_path) <= allowed


def test_a_deferred_package_is_the_one_that_is_installed() -> None:
    script = """
import sys
import gc
from fedveil.cli.deferred import HEAVY, defer, importing
defer(*HEAVY)
looked = []
for _ in range(2):
    with importing():
        looked.append(gc.isenabled())
        sys.modules["torch"] = sys
del sys.modules["torch"]
assert looked == [False, True] and gc.isenabled() and gc.get_freeze_count() == 0
from dp_accounting.pld import PLDAccountant
assert "scipy.optimize" not in sys.modules and "scipy.stats._stats_py" not in sys.modules
import dp_accounting, scipy.stats
assert "norm" in scipy.stats.__all__
from dp_accounting import GaussianDpEvent, get_epsilon_gaussian
from scipy.signal import fftconvolve
from scipy.stats import norm
assert GaussianDpEvent is dp_accounting.dp_event.GaussianDpEvent and dp_accounting.pld.PLDAccountant is PLDAccountant
assert norm is scipy.stats.norm and norm.cdf(0) == 0.5 and list(fftconvolve([1], [2])) == [2]
print(round(get_epsilon_gaussian(1.0, 1e-5), 3), hasattr(dp_accounting, "nothing"))
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout == "4.377 False\n"
