"""Server and clients killed by SIGKILL at every stage of a round of secure aggregation: processes, TLS, one federation.

Noise and masks of these processes come from a seed, so that a run whose rounds had the same cohorts has, bit for bit,
the model of a run without faults. Figures for docs/reliability.md.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedveil.server.checkpoint import read

HERE = Path(__file__).parent
FAULTS = HERE / "faults"
ENDS = runpy.run_path(str(HERE / "test_end_to_end_federation.py"))
RULES = runpy.run_path(str(FAULTS / "federation_rules.py"))
make_federation = runpy.run_path(str(FAULTS / "served.py"))["make_federation"]
STAGES = runpy.run_path(str(FAULTS / "deaths.py"))
ROUNDS, CLIENTS, VICTIM = 4, 5, "boston"
EPSILON, OWNERS_EPSILON = 18.0, 20.0  # of all runs together
ARGV = (
    *("task=digits", "batch_size=40", "privacy=client_distributed", "privacy.allow_large_delta=true"),
    *("privacy.noise_multiplier=20", f"privacy.target_epsilon={EPSILON}"),
    *("link.clients=1", "link.wait=60", "link.deadline=20"),
)
Death = tuple[str, int]  # stage and round
NOBODY: Death = ("", 0)


@dataclass
class World:
    """A folder of bundles, and the processes on them."""

    hearts: Path
    starter: subprocess.Popen[str]
    clients: dict[str, Any] = field(default_factory=dict[str, Any])
    count: int = 0

    def start(self, death: Death, *argv: object) -> Any:
        self.count += 1
        file = self.hearts / f"{self.count}.out"
        asked = [[str(each) for each in argv], str(file), "", "", *death]
        assert self.starter.stdin is not None and self.starter.stdout is not None
        self.starter.stdin.write(json.dumps(asked) + "\n")
        self.starter.stdin.flush()
        return ENDS["Process"](int(self.starter.stdout.readline()), file)

    def client(self, name: str, death: Death = NOBODY) -> None:
        self.clients[name] = self.start(death, "client", "start", self.hearts / "clients" / name)

    def server(self, run: str, rounds: int, death: Death = NOBODY) -> Any:
        asked = (self.hearts / "server", *ARGV, f"num_rounds={rounds}", f"run={run}")
        return self.start(death, "server", *asked)


@contextmanager
def federation(folder: Path) -> Iterator[World]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    starter = subprocess.Popen(
        [sys.executable, str(FAULTS / "commands.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "GRPC_VERBOSITY": "NONE"},
    )
    world = World(make_federation(folder, port), starter)
    try:
        for bundle in sorted((world.hearts / "clients").iterdir()):
            world.client(bundle.name)
        yield world
    finally:
        for each in world.clients.values():
            if each.alive:
                os.kill(each.pid, signal.SIGKILL)
        starter.communicate()


def lived(world: World, run: str, rounds: int, deaths: Sequence[Death] = (), client: Death = NOBODY) -> Any:
    """Let a run live, its server as often as it dies, and a client that dies once; each is started again at once."""
    found = RULES["Lived"](world.hearts, run, rounds, len(deaths))
    if client != NOBODY:
        world.clients[VICTIM].kill()
        world.client(VICTIM, client)
    for death in deaths:
        assert world.server(run, rounds, death).wait() is None, f"{death} never came"
        saved = read(found.folder)  # a round is done once it is in the checkpoint
        found.before = RULES["rows_of"](found.folder)[: saved.round if saved else 0]
        found.paid = RULES["entries_of"](world.hearts)
    server = world.server(run, rounds)
    if client != NOBODY:
        ENDS["until"](lambda: not (world.clients[VICTIM].alive and server.alive), lambda: server.said)
        assert server.alive, f"{client} never came: {server.said}"
        found.paid = RULES["entries_of"](world.hearts)
        world.client(VICTIM)
    if server.wait():
        raise RuntimeError(server.said)
    return found


def opens_all(client: Death) -> bool:
    """Whether a client that dies there opens its sum in the end, and with it the noise that nobody needs."""
    stage, _, exchange = client[0].partition(": ")
    return stage in ("", "told", "acknowledged") or exchange not in ("survivors", "confirmed")


def wrongs(found: Any, calm: Any, client: Death = NOBODY) -> list[str]:
    """Return what must not be, a model among it that is another than that of the same cohorts without faults."""
    wrong = list(RULES["wrongs"](found, EPSILON, OWNERS_EPSILON))
    cohorts = [[row["replies"] for row in RULES["rows_of"](each.folder)] for each in (found, calm)]
    models = [(each.folder / "model.safetensors").read_bytes() for each in (found, calm)]
    if cohorts[0] == cohorts[1] and opens_all(client) and models[0] != models[1]:
        wrong.append("the model is another than without faults")
    return wrong


def replies(found: Any) -> list[int]:
    return [row["replies"] for row in RULES["rows_of"](found.folder)]


@pytest.mark.campaign
def test_killed_at_stage_after_stage_a_run_has_the_model_of_a_calm_one(tmp_path: Path) -> None:
    server = [("first reply: inbox", 1), ("within the checkpoint", 2)]
    with federation(tmp_path) as world:
        calm = lived(world, "calm", 2)
        found = lived(world, "killed", 2, server, ("acknowledged: inbox", 2))
        assert not wrongs(found, calm)
        assert replies(found) == replies(calm) == [CLIENTS] * 2


# --- each stage by itself -----------------------------------------------------------------------------------------

KEYS = ("proposal", "cohort")  # of round 2 they travel beside round 1


def stages(kind: str) -> list[Death]:
    """Return every stage at which a server, or a client, dies, with the round: keys travel alone in the first only."""
    return [(stage, 1 if stage.endswith(KEYS) else 2) for stage in STAGES[kind]]


def one_run(world: World, calm: Any, number: int, server: Sequence[Death], client: Death) -> dict[str, Any]:
    run = f"run-{number}"
    try:
        found = lived(world, run, ROUNDS, server, client)
        wrong, rows = wrongs(found, calm, client), RULES["rows_of"](found.folder)
    except (OSError, RuntimeError, AssertionError, ValueError) as error:
        wrong, rows = [f"{type(error).__name__}: {error}"], []
    told = {
        "server": server,
        "client": client,
        "replies": [row["replies"] for row in rows],
        "equal": opens_all(client) and [row["replies"] for row in rows] == [CLIENTS] * ROUNDS,
        "wrong": wrong,
    }
    print(json.dumps(told), flush=True)
    return told


@pytest.mark.campaign
def test_killed_at_every_stage(tmp_path: Path) -> None:
    alone = [([death], NOBODY) for death in stages("SERVER")] + [([], death) for death in stages("CLIENT")]
    with federation(tmp_path) as world:
        calm = lived(world, "calm", ROUNDS)
        found = [one_run(world, calm, number, *deaths) for number, deaths in enumerate(alone)]
        spent = ENDS["verify"](calm.population).epsilon
    figures = {
        "runs": len(found),
        "kills of the server": sum(len(each["server"]) for each in found),
        "kills of a client": sum(each["client"] != NOBODY for each in found),
        "rounds": sum(len(each["replies"]) for each in found),
        "without the victim": sum(count < CLIENTS for each in found for count in each["replies"]),
        "models compared, bit for bit": sum(each["equal"] for each in found),
        "epsilon on the one ledger": round(spent, 2),
        "wrong": sum(bool(each["wrong"]) for each in found),
    }
    print(json.dumps(figures))
    assert not figures["wrong"], [each for each in found if each["wrong"]]
