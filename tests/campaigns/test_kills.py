"""Server and clients killed by SIGKILL at every stage of a round of secure aggregation: processes, TLS, on either link.

Noise and masks of these processes come from a seed, so that runs whose rounds had the same cohorts have, bit for bit,
the same model. Figures for docs/evidence/reliability.md.
"""

import json
import os
import runpy
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedveil.privacy.ledger.ledger import verify
from fedveil.server.checkpoint import read

HERE = Path(__file__).parents[1]
FAULTS = HERE / "faults"
SERVED = runpy.run_path(str(FAULTS / "served.py"))
RULES = runpy.run_path(str(FAULTS / "federation_rules.py"))
STAGES = runpy.run_path(str(FAULTS / "deaths.py"))
LINKS = ("grpc", "flower")
ROUNDS, CLIENTS, VICTIM = 4, 5, "boston"
BELIEVED_SECONDS = 21.0  # two heartbeats of deaths.py, for which a SuperLink takes a dead device to be there
TOO_MANY = (VICTIM, "cleveland", "hungary")  # more than a sum can spare
EPSILON, OWNERS_EPSILON = 18.0, 20.0  # of all runs together
COMMON = (
    *("task=digits", "batch_size=40", "accept_vacuous=true", "privacy=client_distributed"),
    *("privacy.allow_large_delta=true", "link.clients=1", "link.wait=60", "link.deadline=20"),
)
ARGV = (*COMMON, "privacy.noise_multiplier=20", f"privacy.target_epsilon={EPSILON}")
WHOLE = (*COMMON, "privacy.target_epsilon=0.5")  # of each run alone: its rounds spend all of it
Death = tuple[str, int]  # stage and round
NOBODY: Death = ("", 0)


@dataclass
class World(SERVED["Served"]):
    """A folder of bundles, the processes on them, the run without faults, and what came of the others."""

    link: str = "grpc"
    models: dict[tuple[int, ...], bytes] = field(default_factory=dict[tuple[int, ...], bytes])
    told: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def client(self, name: str, death: Death = NOBODY) -> None:
        super().client(name, death)  # nobody's death, too, makes the process draw from the seed

    def server(self, run: str, rounds: int, death: Death = NOBODY, argv: Sequence[str] = ARGV) -> Any:
        asked = (self.hearts / "server", *argv, f"num_rounds={rounds}", f"run={run}")
        return self.start("server", *asked, death=death)


@contextmanager
def federation(folder: Path, link: str) -> Iterator[World]:
    with SERVED["serving"](World, folder, link) as made:
        made.link = link
        yield made


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], World]]:
    """Return what gives a link's federation, made once. As a parameter of the module each test would make its own."""
    made: dict[str, World] = {}
    with ExitStack() as running:

        def of(link: str) -> World:
            if link not in made:
                world = running.enter_context(federation(tmp_path_factory.mktemp("world"), link))
                calm = lived(world, "calm")
                assert not wrongs(world, calm) and replies(calm) == [CLIENTS] * ROUNDS
                made[link] = world
            return made[link]

        yield of
        for world in made.values():
            print(json.dumps(figures(world)))


@pytest.fixture
def world(request: pytest.FixtureRequest, worlds: Callable[[str], World]) -> World:
    return worlds(request.param)


def lived(
    world: World,
    run: str,
    deaths: Sequence[Death] = (),
    client: Death = NOBODY,
    victims: Sequence[str] = (VICTIM,),
) -> Any:
    """Let a run live, its server as often as it dies, and clients that die once; each is started again at once."""
    found = RULES["Lived"](world.hearts, run, ROUNDS, len(deaths))
    for name in victims if client != NOBODY else ():
        world.clients[name].kill(
            signal.SIGTERM
        )  # a SuperLink believes for a while that who was killed is there
        world.client(name, client)
    if client != NOBODY and world.link == "flower":
        time.sleep(BELIEVED_SECONDS)
    for death in deaths:
        assert world.server(run, ROUNDS, death).wait() is None, f"{death} never came"
        saved = read(found.folder)  # a round is done once it is in the checkpoint
        found.before = RULES["rows_of"](found.folder)[: saved.state.round if saved else 0]
        found.paid = RULES["entries_of"](world.hearts)
    server = world.server(run, ROUNDS)
    if client != NOBODY:
        revive(world, server, client, victims)
        found.paid = RULES["entries_of"](world.hearts)
    if server.wait():
        raise RuntimeError(server.said)
    return found


def revive(world: World, server: Any, client: Death, victims: Sequence[str]) -> None:
    """Start each victim again once all are dead."""

    def dead() -> bool:
        return not any(world.clients[name].alive for name in victims)

    SERVED["until"](lambda: dead() or not server.alive, lambda: server.said)
    assert server.alive, f"{client} never came: {server.said}"
    for name in victims:
        world.client(name)


def opens_all(world: World, client: Death) -> bool:
    """Whether a client that dies there opens its sum in the end, and with it the noise that nobody needs.

    Flower's link delivers a message once: who dies with it in hand never answers.
    """
    stage, _, exchange = client[0].partition(": ")
    again = ("told", "acknowledged") if world.link == "grpc" else ("acknowledged",)
    return stage in ("", *again) or exchange not in ("survivors", "confirmed")


def wrongs(world: World, found: Any, compared: bool = True) -> list[str]:
    """Return what must not be: a model other than that of the same cohorts among it, and noise that was not charged."""
    wrong = list(RULES["wrongs"](found, EPSILON, OWNERS_EPSILON))
    if replies(found)[-1] != CLIENTS:
        wrong.append("the last round is not whole")
    for row, ratio in zip(RULES["rows_of"](found.folder), noise_over_charge(found), strict=True):
        if ratio < 1 and not row["abandoned"]:
            wrong.append(f"round {row['round']} has {ratio:.3f} of the noise that was charged")
        if ratio and row["abandoned"]:
            wrong.append(f"round {row['round']} was abandoned, and changed the model")
    model = (found.folder / "model.safetensors").read_bytes()
    if compared and world.models.setdefault(tuple(replies(found)), model) != model:
        wrong.append("the model is another than that of the same cohorts")
    return wrong


def cohorts_are_certain(counts: Sequence[int], client: Death, victims: Sequence[str]) -> bool:
    """Return whether the number of replies of each round identifies its clients.

    From the round on in which a single victim dies, the victim is the missing one. Otherwise any client may be missing:
    on a busy machine one connects late.
    """
    unsure = counts[: client[1] - 1 if len(victims) == 1 else None]
    return all(count in (0, CLIENTS) for count in unsure)


@pytest.mark.parametrize(
    ("counts", "death", "victims", "certain"),
    [
        ([5, 4, 5, 5], ("training: inbox", 2), [VICTIM], True),
        ([4, 4, 5, 5], ("training: inbox", 2), [VICTIM], False),
        ([4, 5, 5, 5], ("told: proposal", 1), [VICTIM], True),
        ([5, 4, 5, 5], ("begun: inbox", 2), TOO_MANY, False),
        ([5, 0, 5, 5], ("begun: inbox", 2), TOO_MANY, True),
        ([4, 5, 5, 5], NOBODY, [], False),
        ([5, 5, 5, 5], NOBODY, [], True),
    ],
)
def test_models_are_compared_where_the_cohorts_are_certain(
    counts: list[int], death: Death, victims: list[str], certain: bool
) -> None:
    assert cohorts_are_certain(counts, death, victims) == certain


def noise_over_charge(found: Any) -> list[float]:
    return list(RULES["noise_over_charge"](found))


def replies(found: Any) -> list[int]:
    return [row["replies"] for row in RULES["rows_of"](found.folder)]


def test_calls_wrapped_by_the_campaign_exist() -> None:
    """The campaign is seldom run: a name that it wraps and that has moved shows here."""
    for stage in ("", *STAGES["SERVER"], *STAGES["CLIENT"], *STAGES["SUPERNODE"]):
        child = os.fork()  # what is wrapped stays so
        if not child:
            code = 1
            try:
                STAGES["arrange"](stage, 1)
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, stage


@pytest.mark.parametrize("link", LINKS)
def test_a_federation_of_the_campaign_is_provisioned_and_begins(tmp_path: Path, link: str) -> None:
    SERVED["begins"](
        SERVED["make_federation"](tmp_path, link=link), [*ARGV, f"num_rounds={ROUNDS}", "run=calm"]
    )


@pytest.mark.campaign
@pytest.mark.parametrize("world", LINKS, indirect=True)
def test_run_killed_at_stage_after_stage_has_the_model_of_a_calm_one(world: World) -> None:
    server = [("first reply: inbox", 1), ("within the checkpoint", 2)]
    found = lived(world, "killed", server, ("acknowledged: inbox", 2))
    assert not wrongs(world, found)
    assert replies(found) == [CLIENTS] * ROUNDS


# --- each stage by itself -----------------------------------------------------------------------------------------

KEYS = ("proposal", "cohort", "parcels")  # of round 2 they travel beside round 1


def stages(link: str) -> Iterator[Any]:
    """Return every stage at which a server, or a client, dies, with the round: keys travel alone in the first only."""
    kinds = ("SERVER", "CLIENT", "SUPERNODE") if link == "flower" else ("SERVER", "CLIENT")
    for kind in kinds:
        for stage in STAGES[kind]:
            death = (stage, 1 if stage.endswith(KEYS) else 2)
            yield pytest.param(link, kind == "SERVER", death, id=f"{link} {kind.lower()} {stage}")


def figures(world: World) -> dict[str, Any]:
    told = world.told
    noise = [ratio for each in told for ratio in each["noise"] if ratio]
    return {
        "link": world.link,
        "kills of the server": sum(each["server"] for each in told),
        "kills of clients": sum(len(each["clients"]) for each in told),
        "rounds": sum(len(each["replies"]) for each in told),
        "without a victim": sum(0 < count < CLIENTS for each in told for count in each["replies"]),
        "abandoned": sum(not count for each in told for count in each["replies"]),
        "models compared, bit for bit": sum(each["compared"] for each in told),
        "noise over what was charged": [round(bound(noise), 3) for bound in (min, max) if noise],
        "epsilon on the one ledger": round(max(each["epsilon"] for each in told), 2) if told else 0,
        "wrong": sum(bool(each["wrong"]) for each in told),
    }


def one_run(world: World, server: Sequence[Death], client: Death, victims: Sequence[str] = ()) -> None:
    known = set(world.models)
    found = lived(world, f"run-{world.count}", server, client, victims)
    compared = opens_all(world, client) and cohorts_are_certain(replies(found), client, victims)
    told = {
        "death": [*server, client][0],
        "server": len(server),
        "clients": victims,
        "replies": replies(found),
        "dropped": [row["dropped"] for row in RULES["rows_of"](found.folder)],
        "compared": compared and tuple(replies(found)) in known,
        "noise": noise_over_charge(found),
        "epsilon": verify(found.population).epsilon,
        "wrong": wrongs(world, found, compared),
    }
    print(json.dumps(told), flush=True)
    world.told.append(told)
    assert not told["wrong"]


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("world", "server", "death"),
    [each for link in LINKS for each in stages(link)],
    indirect=["world"],
)
def test_killed_at_every_stage(world: World, server: bool, death: Death) -> None:
    if server:
        one_run(world, [death], NOBODY)
    else:
        one_run(world, [], death, [VICTIM])


@pytest.mark.campaign
@pytest.mark.parametrize("exchange", STAGES["EXCHANGES"])
@pytest.mark.parametrize("world", LINKS, indirect=True)
def test_more_killed_than_a_sum_can_spare_at_every_stage(world: World, exchange: str) -> None:
    one_run(world, [], (f"begun: {exchange}", 1 if exchange in KEYS else 2), TOO_MANY)


# --- where the rounds spend the whole budget ----------------------------------------------------------------------

AT_THE_END = ("before the result", "between model and result", "before the close", "within the close")


def last_deaths() -> Iterator[Death]:
    """Return the stages of the last two rounds, in which keys do not travel alone, and those of writing the results."""
    for stage in STAGES["SERVER"]:
        if stage in AT_THE_END:
            yield stage, ROUNDS
        elif not stage.endswith(KEYS):
            yield from ((stage, number) for number in (ROUNDS - 1, ROUNDS))


@pytest.mark.campaign
@pytest.mark.parametrize("death", list(last_deaths()), ids=str)
@pytest.mark.parametrize("world", LINKS, indirect=True)
def test_run_killed_in_the_last_rounds_is_finished(world: World, death: Death) -> None:
    run = f"last-{world.count}"
    argv = (*WHOLE, f"ledger.dir={world.hearts / run}")  # which the run has for itself
    assert world.server(run, ROUNDS, death, argv).wait() is None, f"{death} never came"
    server = world.server(run, ROUNDS, NOBODY, argv)
    assert server.wait() == 0, server.said
    found = RULES["Lived"](world.hearts, run, ROUNDS, 1)
    rows, result = RULES["rows_of"](found.folder), json.loads((found.folder / "result.json").read_text())
    (ledger,) = (world.hearts / run).glob("*.ledger")
    spent = verify(ledger)
    print(json.dumps({"death": death, "link": world.link, "rounds": len(rows), "epsilon": spent.epsilon}))
    assert result["status"] == "completed" and result["rounds_completed"] == len(rows) >= ROUNDS - 1
    assert len(rows) == ROUNDS or death[1] == ROUNDS
    assert [row["replies"] for row in rows] == [CLIENTS] * len(rows)
    assert spent.ok and {row["epsilon"] for row in result["privacy"]} == {spent.epsilon}
    assert 0.9 * 0.5 < spent.epsilon <= 0.5
    assert {"model.safetensors", "manifest.json"} <= {path.name for path in found.folder.iterdir()}
