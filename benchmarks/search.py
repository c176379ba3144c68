"""Search for the settings that suit a shipped task under a mode of privacy, on the task's public data.

``python -m fedveil.benchmarks.search --task digits --mode client_distributed num_rounds=20,40 task.clipping_norm=2,4``
prints each combination with the accuracy that it is predicted to reach, the best one first. Rows of `configs/tuned.yaml`
are chosen in this way. It takes shipped tasks alone, so no user's data are looked at.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..configs.compose import compose_jobs, parse_arguments
from ..configs.settings import settings_of
from ..simulations.prediction import predict, public_federation
from ..tasks import TASKS


def main(argv: Sequence[str] | None = None) -> int:
    """Print the combinations of the given values, the best one first."""
    parser = argparse.ArgumentParser("python -m fedveil.benchmarks.search", description=__doc__)
    parser.add_argument("--task", choices=sorted(set(TASKS) - {"csv"}), default="mnist5k")
    parser.add_argument("--mode", default="client_central", help="of privacy")
    parser.add_argument("--epsilon", type=float, default=3.0, help="of the mode's unit")
    parser.add_argument("--seeds", type=int, default=2, help="simulations of each combination")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE,VALUE", help="values to try, as in a sweep")
    given = parser.parse_args(argv)
    fixed = [f"task={given.task}", f"privacy={given.mode}", f"privacy.target_epsilon={given.epsilon}"]
    found: list[tuple[float, str]] = []
    for job in compose_jobs(parse_arguments(["-m", *fixed, *given.keys])):
        prediction = predict(public_federation(settings_of(job)), range(given.seeds))
        spread = f"{min(prediction.values):.3f} to {max(prediction.values):.3f}"
        found.append((prediction.mean, f"{prediction.mean:.4f}  {spread}  {' '.join(job.overrides[3:])}"))
        print(found[-1][1], file=sys.stderr, flush=True)
    for _, line in sorted(found, reverse=True):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
