"""Virtual time of simulated clients: who is first, who is late, and whose model a late client trained."""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from shared.runs import json_lines, resume, run_quietly

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.configs.schema import SpeedSettings
from fedveil.configs.settings import settings_from_overrides
from fedveil.messages.flower_adapter import claim_identity
from fedveil.messages.grids import AskingGrid
from fedveil.messages.wire import EVALUATION_KEY, instruct, read_round
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.mechanisms.private_sum import CohortSum
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.privacy.secagg.server import Due
from fedveil.server.accounts import Protected
from fedveil.server.secure_sum import Attempt
from fedveil.simulations.arrivals import ArrivingGrid, VirtualRounds, times_of
from fedveil.simulations.simulate import simulate

SPEC = SumSpec(1.0)
TIMES = {1: 1.0, 2: 2.0, 3: 3.0, 4: 10.0, 5: 30.0}


class Adding(AskingGrid):
    """Clients that each add the number of the round whose order they follow."""

    def __init__(self) -> None:
        self._run = claim_identity(1)
        self.asked: list[tuple[int, list[int]]] = []

    def get_node_ids(self) -> list[int]:
        return list(TIMES)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Any:
        raise AssertionError("no message goes to one client alone")

    def sum_replies(self, order: Message, nodes: Sequence[int], spec: SumSpec, size: int) -> CohortSum:
        _, row = read_round(order.content)
        self.asked.append((row, list(nodes)))
        return CohortSum(np.full(size, float(row * len(nodes))), len(nodes))


def rounds_of(enough: int | None = 2, deadline: float = 1e9, staleness: int = 1) -> VirtualRounds:
    return VirtualRounds(TIMES, enough, deadline, staleness)


def order(row: int) -> Message:
    return Message(instruct(RecordDict(), SPEC, "run", row), 0, "train")


def test_first_to_answer_end_the_round() -> None:
    assert rounds_of().round(1, [5, 3, 1, 2]) == ({1: [1, 2]}, 2.0)
    assert rounds_of(enough=None).round(1, [5, 3, 1]) == ({1: [1, 3, 5]}, 30.0)


def test_client_at_work_answers_in_the_next_round_and_no_later() -> None:
    rounds = rounds_of()
    assert rounds.round(1, [1, 2, 3, 4]) == ({1: [1, 2]}, 2.0)
    # 3 has 1 left and 4 has 8; of the new ones 1 takes 1: the order of arrival is 1 and 3.
    assert rounds.round(2, [1, 5]) == ({1: [3], 2: [1]}, 1.0)
    # 4 has worked since round 1: it is too late, and begins anew if it is invited.
    assert rounds.round(3, [4, 3]) == ({3: [3, 4]}, 10.0)


def test_client_at_work_is_late_without_staleness() -> None:
    rounds = rounds_of(staleness=0)
    rounds.round(1, [1, 2, 3])
    assert rounds.round(2, [4, 5]) == ({2: [4, 5]}, 30.0)


def test_deadline_ends_a_round_with_fewer() -> None:
    rounds = rounds_of(enough=3, deadline=5.0)
    assert rounds.round(1, [1, 4, 5]) == ({1: [1]}, 5.0)
    assert rounds.round(2, [2]) == ({1: [4], 2: [2]}, 5.0)


@given(st.data())
def test_nobody_works_for_two_rounds_at_once(data: st.DataObject) -> None:
    staleness = data.draw(st.integers(0, 1))
    rounds, starts = rounds_of(data.draw(st.integers(1, 4)), 12.0, staleness), dict[tuple[int, int], int]()
    for row in range(1, 8):
        arrived, length = rounds.round(row, data.draw(st.lists(st.sampled_from([*TIMES]), unique=True)))
        assert 0 <= length <= 12.0 and all(row - staleness <= start <= row for start in arrived)
        nodes = [node for each in arrived.values() for node in each]
        assert len(nodes) == len(set(nodes)) <= 4
        for start, each in arrived.items():
            for node in each:
                assert starts.setdefault((node, start), row) == row  # one answer to each order


def test_late_client_trains_the_model_of_its_own_round() -> None:
    inner = Adding()
    grid = ArrivingGrid(inner, rounds_of())
    first = grid.sum_replies(order(1), [1, 2, 3], SPEC, 1)
    second = grid.sum_replies(order(2), [1, 5], SPEC, 1)
    assert inner.asked == [(1, [1, 2]), (1, [3]), (2, [1])]
    assert (first.total[0], first.nodes, first.virtual_time) == (2.0, [1, 2], 2.0)
    assert (second.total[0], sorted(second.nodes), second.replies) == (3.0, [1, 3], 2)
    assert (first.dropped, second.dropped) == ({"not needed": 1}, {"not needed": 1})


def test_question_goes_to_all() -> None:
    content = instruct(RecordDict({"config": ConfigRecord({EVALUATION_KEY: "{}"})}), SPEC, "run", 3)
    inner = Adding()
    ArrivingGrid(inner, rounds_of()).sum_replies(Message(content, 0, "train"), [4, 5], SPEC, 1)
    assert inner.asked == [(3, [4, 5])]


def test_times_are_log_normal_with_slow_clients() -> None:
    speed = SpeedSettings(sigma=0.5, slow=0.25, slow_factor=1000)
    times = np.array([*times_of(speed, range(4000), Randomness(3)).values()])
    is_slow = times > 50
    assert 0.2 < is_slow.mean() < 0.3
    assert np.log(times[~is_slow]).std() == pytest.approx(0.5, rel=0.1)
    assert times.tolist() == [*times_of(speed, range(4000), Randomness(3)).values()]
    assert set(times_of(SpeedSettings(), range(9), Randomness(3)).values()) != {
        1.0
    }  # ties are broken by chance
    assert max(times_of(SpeedSettings(), range(9), Randomness(3)).values()) == pytest.approx(1)


# --- whole runs ---------------------------------------------------------------------------------------------------

RUN = (
    *(
        "task=digits",
        "task.num_clients=40",
        "num_rounds=6",
        "privacy.allow_large_delta=true",
        "batch_size=40",
    ),
    *("cohort=first", "cohort.size=6", "cohort.separation=3", "speed.sigma=1", "speed.slow=0.1"),
)


def cohorts_of(run: Path) -> list[list[int]]:
    notes = (entry for entry in read_entries(run / "ledger") if entry.kind == "note")
    return [json.loads(each.payload)["cohort"] for each in notes]


def kept(cohorts: list[list[int]]) -> None:
    for first, second in itertools.combinations(range(len(cohorts)), 2):
        assert second - first >= 3 or not set(cohorts[first]) & set(cohorts[second])


@pytest.mark.parametrize("noise", ["independent", "correlated"])
def test_run_repeats_by_its_seed_and_keeps_the_separation(tmp_path: Path, noise: str) -> None:
    for name in ("a", "b"):
        assert run_quietly([*RUN, f"privacy.noise={noise}"], tmp_path / name).exit_code == 0
    models = {(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")}
    assert len(models) == 1
    cohorts = cohorts_of(tmp_path / "a")
    assert {len(each) for each in cohorts} == {6} and len(cohorts) == 6
    kept(cohorts)
    rows = json_lines(tmp_path / "a" / "metrics.jsonl")
    assert all(0 < row["virtual_time"] < 10 for row in rows)
    assert rows[0]["epsilon_client"] == rows[-1]["epsilon_client"] <= 3


def test_run_killed_before_its_release_keeps_the_separation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, true = 0, Protected.noised

    def killed(self: Protected, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return true(self, *args)

    monkeypatch.setattr(Protected, "noised", killed)
    with pytest.raises(KeyboardInterrupt):
        run_quietly(RUN, tmp_path / "run")
    result = resume(tmp_path / "run").result
    # The row of the fourth round was lost, and is not used again: the run is one round shorter.
    assert (result["status"], result["rounds_completed"]) == ("completed", 5)
    assert len(cohorts_of(tmp_path / "run")) == 6
    kept(cohorts_of(tmp_path / "run"))


def test_slow_clients_of_a_drawn_cohort_are_late(tmp_path: Path) -> None:
    argv = [*RUN[:5], "cohort.rate=0.5", "speed.slow=0.3", "speed.deadline=2", "num_rounds=2"]
    assert run_quietly(argv, tmp_path / "run").exit_code == 0
    counts = json_lines(tmp_path / "run" / "operator.jsonl")[:2]
    assert all(row["dropped"]["late"] == row["invited"] - row["replies"] > 0 for row in counts)
    assert {row["virtual_time"] for row in json_lines(tmp_path / "run" / "metrics.jsonl")} == {2.0}


def test_clients_that_all_miss_a_deadline_may_come_a_round_later(tmp_path: Path) -> None:
    """They come a round later: to record them as the earlier round's would end the run."""
    words = ("task=digits", "cohort=first", "cohort.size=10", "cohort.separation=3", "num_rounds=6")
    more = ("speed.deadline=0.6", "privacy.allow_large_delta=true", "accept_vacuous=true")
    run = run_quietly((*words, *more), tmp_path / "run")
    assert run.result["status"] == "completed"
    cohorts = cohorts_of(tmp_path / "run")
    assert 0 < len(cohorts) < 6  # nobody came to one of the rounds


MASKED = (
    *("task=digits", "task.num_clients=16", "num_rounds=3", "privacy=client_distributed", "batch_size=40"),
    *(
        "cohort=first",
        "cohort.size=6",
        "cohort.separation=2",
        "cohort.over_selection=1.3",
        "cohort.staleness=0",
    ),
    *("privacy.allow_large_delta=true", "privacy.target_epsilon=8", "speed.sigma=1"),
)


def test_members_of_a_masked_sum_are_recorded_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openings: list[tuple[int, bool]] = []
    noises, true = set[float](), Attempt.send

    def send(self: Attempt) -> None:
        noises.add(self.request.noise_multiplier)
        if self.server.due is Due.REVEALED:
            cohorts = cohorts_of(tmp_path / "run")
            row = self.request.row
            openings.append((row, len(cohorts) == row and cohorts[-1] == list(self.server.alive)))
        true(self)

    monkeypatch.setattr(Attempt, "send", send)
    result = run_quietly(MASKED, tmp_path / "run").result
    assert openings == [(1, True), (2, True), (3, True)]
    cohorts = cohorts_of(tmp_path / "run")
    assert [len(each) for each in cohorts] == [6, 6, 6]
    assert all(not set(one) & set(other) for one, other in itertools.pairwise(cohorts))
    # A client takes part in two rounds, and each of them has the noise of both.
    assert [*noises] == [pytest.approx(result["noise_multiplier"] * 2**0.5)]
    counts = json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [(row["replies"], row["dropped"]) for row in counts] == [(6, {"not needed": 2})] * 3
    by_adversary = {row["adversary"]: row["epsilon"] for row in result["privacy"]}
    assert 7.9 < by_adversary["server"] == by_adversary["model"] <= 8


def test_less_noise_than_all_rounds_of_a_client_need_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Protected, "noise_of_sum", property(lambda self: self.noise))
    with pytest.raises(AssertionError, match="less noise than was reserved"):
        run_quietly(MASKED, tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("cohort.staleness=1", "a late one cannot join the next"),
        ("cohort.over_selection=2", "invite fewer"),
        ("speed.deadline=2", "which have no virtual time"),
    ],
    ids=["staleness", "over_selection", "deadline"],
)
def test_masked_sums_that_arrivals_cannot_have_are_refused(
    tmp_path: Path, override: str, sentence: str
) -> None:
    with pytest.raises(Refusal, match=sentence):
        run_quietly([*MASKED, override], tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("privacy.adjacency=replace-one", "a client's replacement may arrive in other rounds"),
        ("privacy.adjacency=add-or-remove-one", "use cohort=poisson, or zero-out"),
        ("privacy.clipping=adaptive", "one release"),
        ("cohort.separation=7", "with 6 of 40 clients a round give at most 6"),
        ("compress=mask", "compressed by that round's draw"),
        ("audit=full", "would have to arrive among the first"),
        ("tune=learning_rate", "choose another cohort"),
        ("budget.runs=2", "choose another cohort"),
    ],
    ids=lambda each: str(each).partition(" ")[0],
)
def test_settings_that_do_not_meet_arrivals_are_refused(tmp_path: Path, override: str, sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence):
        run_quietly([*RUN, override], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_grid_without_virtual_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="only fedveil simulate has the virtual time"):
        simulate(settings_from_overrides(list(RUN)), tmp_path / "run", quiet=True, grid=AskedAlone())
    assert not (tmp_path / "run").exists()


class AskedAlone(AskingGrid):
    """A grid that does not add."""

    def get_node_ids(self) -> list[int]:
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Any:
        raise AssertionError("nobody is asked")


class Wards:
    """Real data of four wards."""

    simulated, data_id, num_clients = False, "wards", 4

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(2, 2)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        return {"accuracy": (outputs.argmax(1) == targets).float().mean().item()}

    def client_data(self, client: int) -> fv.Examples:
        return fv.Examples(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))

    def held_out(self) -> fv.Examples:
        return self.client_data(0)


def test_real_data_on_one_machine_are_never_late(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="real data on one machine have no clients that are late"):
        fv.simulate(Wards(), privacy=fv.ClientCentral(), cohort=fv.First(2, 2, 50), folder=tmp_path / "run")
