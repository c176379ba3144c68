"""A server whose cohort is whoever answers first: devices in any order, kills, and what their own ledgers charge."""

import itertools
import json
import runpy
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from dp_accounting.dp_event import GaussianDpEvent, NoOpDpEvent, SelfComposedDpEvent
from flwr.app import Message
from shared.runs import json_lines, reservations

from fedveil.base.refusal import Refusal
from fedveil.deployment.serve import serve
from fedveil.privacy.budget import Adversary
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.ledger.ledger_state import read_events
from fedveil.run.run_files import read_object

MADE = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "served.py"))
FIRST = (
    *("task=digits", "batch_size=40", "num_rounds=4", "link.wait=0.3", "accept_vacuous=true"),
    *("privacy=client_central", "privacy.allow_large_delta=true", "privacy.target_epsilon=8"),
    *("cohort=first", "cohort.size=2", "cohort.separation=2"),
)


class Killed(BaseException):
    """Stands for the end of the process."""


class Racing(MADE["Devices"]):
    """Devices that answer in another order in every exchange, the last one first in every second."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        requests = sorted(messages, key=lambda each: each.metadata.dst_node_id, reverse=self.count % 2 == 0)
        yield from super().send_and_receive(requests, timeout=timeout)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MADE["make_federation"](tmp_path_factory.mktemp("desk"))


@pytest.fixture
def hearts(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "hearts"))


def served(hearts: Path, *argv: str, killed_at: int = -1) -> int:
    def fault(message: Message, count: int) -> None:
        if count == killed_at:
            raise Killed

    grid = Racing(hearts / "clients", fault)
    return serve(hearts / "server", list(argv), reach=MADE["reaching"](grid))


def population_of(hearts: Path) -> Path:
    (path,) = (hearts / "server" / "ledgers").glob("population-*.ledger")
    return path


def cohorts_of(hearts: Path) -> dict[int, list[int]]:
    notes = [entry for entry in read_entries(population_of(hearts)) if entry.kind == "note"]
    return {json.loads(each.key)[1]: json.loads(each.payload)["cohort"] for each in notes}


def kept(cohorts: dict[int, list[int]]) -> None:
    for one, other in itertools.combinations(cohorts, 2):
        assert abs(one - other) >= 2 or not set(cohorts[one]) & set(cohorts[other])


def test_first_answers_are_the_cohort_and_each_owner_charges_its_own(hearts: Path) -> None:
    assert served(hearts, *FIRST) == 0
    cohorts = cohorts_of(hearts)
    assert [len(each) for each in cohorts.values()] == [2, 2, 2, 2]
    kept(cohorts)
    counts = json_lines(hearts / "server" / "runs" / "run-1" / "operator.jsonl")[:4]
    assert [(each["replies"], each["dropped"]) for each in counts] == [(2, {"not needed": 1})] * 4
    # The run is one release at the server, and each answer one at the device that gave it.
    whole, *rest = read_events(population_of(hearts), Adversary.MODEL)
    assert isinstance(whole, GaussianDpEvent) and rest == [SelfComposedDpEvent(NoOpDpEvent(), 3)]
    own = [*(hearts / "clients").glob("*/state/ledgers/*.ledger")]
    assert sum(len(reservations(each)) for each in own) == 8


def test_masked_sum_of_the_first_is_charged_with_the_noise_of_a_round(hearts: Path) -> None:
    masked = [each for each in FIRST if not each.startswith(("privacy=", "cohort"))]
    cohort = ("cohort=first", "cohort.size=4", "cohort.over_selection=1.25", "cohort.staleness=0")
    argv = (*masked, "privacy=client_distributed", *cohort, "num_rounds=2", "cohort.separation=1")
    assert served(hearts, *argv) == 0
    assert [len(each) for each in cohorts_of(hearts).values()] == [4, 4]
    result = read_object(hearts / "server" / "runs" / "run-1" / "result.json")
    own = [*(hearts / "clients").glob("*/state/ledgers/client-*.ledger")]
    charges = [each["events"]["model"] for ledger in own for each in reservations(ledger)]
    noises = {each["noise_multiplier"] for each in charges}
    assert len(charges) >= 8 and [*noises] == [pytest.approx(result["noise_multiplier"] * 2**0.5)]


@pytest.mark.parametrize("killed_at", [1, 2, 3, 4, 6])
def test_killed_server_lets_nobody_come_back_too_soon(hearts: Path, killed_at: int) -> None:
    with pytest.raises(Killed):
        served(hearts, *FIRST, killed_at=killed_at)
    assert served(hearts, *FIRST) in (
        0,
        3,
    )  # a lost row is not used again, so that the last round may be missing
    kept(cohorts_of(hearts))
    assert (
        len({json.loads(e.key)[0] for e in read_entries(population_of(hearts)) if e.kind == "reserve"}) == 1
    )


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("link.enough=0.5", "cohort.size says how many"),
        ("link=flower", "lost with its round"),
        ("privacy.noise=correlated", "only for independent noise"),
        ("speed.sigma=1", "is a simulation's"),
    ],
    ids=["enough", "flower", "correlated", "speed"],
)
def test_settings_of_a_server_that_lose_arrivals_are_refused(
    hearts: Path, override: str, sentence: str
) -> None:
    with pytest.raises(Refusal, match=sentence):
        served(hearts, *FIRST, override)
    assert not (hearts / "server" / "ledgers").exists()
