"""Command line of the benchmarks, ``python -m fedveil.benchmarks NAME``: run one, print it, write JSON.

``python -m fedveil.benchmarks show FILE.json`` prints what was written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..base.refusal import Refusal
from .accuracies import TASKS
from .audit_share import run_audit
from .commands import run_commands
from .contenders import ALL, NAMED
from .dp_sgd import LARGE, PRIVATE, USUAL, run_dp_sgd
from .engines import Options, run_engines, run_overhead
from .gpu import run_gpu
from .link import run_link
from .loading import run_loading
from .long_runs import run_long
from .memory import run_memory
from .modes import run_modes
from .noise import run_noise
from .precision import run_precision
from .privacy_share import run_privacy
from .secagg import run_secagg
from .secagg_checks import run_checks
from .secagg_length import run_length
from .stacks import KINDS, run_stacks
from .steps import run_steps
from .supernodes import run_supernodes
from .tables import Row, as_markdown, publish
from .workload import MODELS, OTHERS, TRAINED, WORKLOADS, Size

_BENCHMARKS: dict[str, tuple[Callable[[Options], Row], tuple[str, ...]]] = {
    "engines": (run_engines, (*TRAINED, "tiny-power", *OTHERS)),
    "overhead": (run_overhead, ()),
    "privacy": (run_privacy, ("cnn-100k", "cnn-1m")),
    "memory": (run_memory, ("tiny", "cnn-100k")),
    "link": (run_link, ()),
    "supernodes": (run_supernodes, ()),
    "steps": (run_steps, ()),
    "dp_sgd": (run_dp_sgd, USUAL),
    "gpu": (run_gpu, LARGE),
    "loading": (run_loading, ("tiny-equal", "cnn-100k-equal")),
    "precision": (run_precision, (*tuple(MODELS)[:3], "lstm-82k", *TASKS)),
    "secagg": (run_secagg, ()),
    "secagg_checks": (run_checks, ()),
    "secagg_length": (run_length, ()),
    "noise": (run_noise, ()),
    "audit": (run_audit, ()),
    "modes": (run_modes, ()),
    "long_runs": (run_long, ()),
    "commands": (run_commands, ()),
    "stacks": (run_stacks, tuple(f"tiny{kind}" for kind in KINDS)),
}


_SHOW = "show"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the arguments name; 0 when it was measured."""
    size = Size()
    parser = argparse.ArgumentParser("python -m fedveil.benchmarks", description=__doc__)
    named = [*sorted(_BENCHMARKS), _SHOW]
    models, which = sorted({*WORKLOADS, *PRIVATE, *TASKS}), f"which, of engines: {'; '.join(NAMED)}"
    parser.add_argument("benchmark", choices=named, metavar="NAME", help=", ".join(named))
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help=f"written before, of {_SHOW}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--pfl-python", metavar="PATH", help="a Python with pfl 0.6 and torch")
    parser.add_argument("--before", metavar="PATH", help="an earlier checkout, for secagg_checks")
    parser.add_argument("--workloads", nargs="+", choices=models, metavar="MODEL", help=", ".join(models))
    parser.add_argument("--contenders", nargs="+", choices=NAMED, default=ALL, metavar="WHO", help=which)
    parser.add_argument("--clients", type=int, default=size.clients, help="the population")
    parser.add_argument("--cohort", type=int, default=size.cohort, help="clients of a round")
    parser.add_argument("--rounds", type=int, default=size.rounds, help="measured rounds of a process")
    parser.add_argument("--repeats", type=int, default=Options.repeats, help="processes of each contender")
    parser.add_argument(
        "--device", default=Options.device, metavar="NAME", help="of gpu, such as cuda or cpu"
    )
    given = parser.parse_args(arguments)
    if given.benchmark == _SHOW:
        return _show(given.files)
    run, usual = _BENCHMARKS[given.benchmark]
    size = Size(given.clients, given.cohort, given.rounds)
    workloads, contenders = tuple(given.workloads or usual), tuple(given.contenders)
    options = Options(
        size, given.repeats, given.pfl_python, workloads, given.before, contenders, given.device
    )
    try:
        publish(run(options), given.json)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return 0


def _show(files: Sequence[Path]) -> int:
    if not files:
        print("show: name a file that a benchmark wrote by --json", file=sys.stderr)
        return 2
    print(as_markdown([json.loads(path.read_text()) for path in files]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
