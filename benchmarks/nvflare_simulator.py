"""NVFLARE's simulator on two threads: FedAvg as its documents write it, without clipping, noise or a ledger.

It starts a process for each client and round where clients are more than threads, and all its clients take part in each round.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from pathlib import Path

from torch import Tensor, nn

from .stopwatch import Stopwatch
from .workload import Size, build

THREADS = 2
_POLL_SECONDS = 0.01
_STARTED = "started."  # of a line of the server's log: "Round 3 started."


class Net(nn.Module):
    """Model of a workload, by its name.

    Args:
      workload: a key of `workload.MODELS`.
    """

    def __init__(self, workload: str) -> None:
        super().__init__()
        self.net = build(workload)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the model's outputs."""
        return self.net(inputs)


def run_nvflare(workload: str, size: Size, watch: Stopwatch) -> None:
    """Run the rounds, and note when the server's log says that the next one begins.

    Args:
      workload: a key of `workload.MODELS`.
      size: how many clients, all of which take part, and rounds.
      watch: notes when rounds end.
    """
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.recipe.sim_env import SimEnv

    logging.disable()
    recipe = FedAvgRecipe(
        name="fedavg",
        model={"class_path": f"{__spec__.name}.Net", "args": {"workload": workload}},
        min_clients=size.cohort,
        num_rounds=size.rounds + 2,  # the start of the last one is the end of the one before
        train_script=str(Path(__file__).with_name("nvflare_client.py")),
        train_args=workload,
    )
    ended = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "fedavg", "server", "log.txt")
        watcher = threading.Thread(target=_watch, args=(log, size.rounds + 1, watch, ended))
        watcher.start()
        try:
            recipe.execute(SimEnv(num_clients=size.cohort, num_threads=THREADS, workspace_root=folder))
        finally:
            ended.set()
            watcher.join()


def _watch(log: Path, rounds: int, watch: Stopwatch, ended: threading.Event) -> None:
    """Note the end of each round.

    Args:
      log: of the server.
      rounds: to note.
      watch: takes them.
      ended: set when there is no more to read.
    """
    laps = 0
    while not ended.wait(_POLL_SECONDS) and laps < rounds:
        starts = log.read_text().count(_STARTED) if log.is_file() else 0
        if starts > laps + 1:
            watch.lap()
            laps += 1
