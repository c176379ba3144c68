"""Persons of a client's examples: which are selected, what a person's examples do to a sum, and what a run refuses and says."""

import json
from itertools import permutations

import numpy as np
import pytest
import torch
from shared.tasks import Classes

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.client.dp_sgd.rounds import GradientClip, step, union_of
from fedveil.client.workbench import Workbench
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.record_settings import StepTerms
from fedveil.messages.training_order import RecordTerms
from fedveil.privacy.accounting.epsilon import GATE_INTERVAL, epsilon
from fedveil.privacy.accounting.gaussian_mixture import group_event
from fedveil.privacy.budget import Adjacency
from fedveil.privacy.ledger.ledger import read_entries, verify
from fedveil.privacy.ledger.ledger_state import read_events
from fedveil.privacy.ledger.store import ledgers_in
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.strategies.record_plan import PoissonBatches
from fedveil.tasks.persons import Owners, limit_per_person
from fedveil.tasks.pool import Dealt

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

VISITS = 5  # examples of each person


class Visits(Classes):
    """Task whose examples say whose they are; one person's are as far from the others' as can be."""

    num_clients, name, held_out_client = 2, "visits", 1000

    def __init__(self, named=True):
        self.named = named

    def model(self):
        model = torch.nn.Linear(4, 2)
        torch.nn.init.zeros_(model.weight)
        torch.nn.init.zeros_(model.bias)
        return model

    def client_data(self, client):
        inputs = torch.randn(200, 4, generator=torch.Generator().manual_seed(client))
        persons = [f"p{n // VISITS}" for n in range(200)] if self.named else None
        return fv.Examples(inputs, (inputs.sum(1) > 0).long(), persons)


def rows_of(data):
    return sorted(tuple(row) for row in data.inputs.tolist())


def test_at_most_so_many_examples_of_a_person_stay_in_any_order():
    data = Visits().client_data(0)
    few = limit_per_person(data, 2)
    assert len(few) == 80 and all(few.persons.count(each) == 2 for each in set(data.persons))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    shuffled = fv.Examples(data.inputs[order], data.targets[order], [data.persons[n] for n in order])
    assert rows_of(limit_per_person(shuffled, 2)) == rows_of(few) == rows_of(limit_per_person(data, 2))
    assert limit_per_person(data, VISITS) is data and limit_per_person(data, None) is data


def test_selected_examples_of_a_person_depend_on_nobody_else():
    data, alone = (
        Visits().client_data(0),
        fv.Examples(*Visits().client_data(0).batch(torch.arange(5)), ["p0"] * 5),
    )
    assert rows_of(limit_per_person(alone, 2)) == rows_of(
        fv.Examples(*limit_per_person(data, 2).batch(torch.arange(2)))
    )


def test_data_that_are_read_keep_the_same_examples():
    data = Visits().client_data(0)
    items = list(zip(data.inputs, data.targets, strict=True))
    read = fv.LazyExamples(items, persons=data.persons)
    few = limit_per_person(read, 2)
    assert len(few) == 80 and all(few.persons.count(each) == 2 for each in set(data.persons))
    assert few.batch(torch.tensor([0, 79]))[0].shape == (2, 4)
    shares = np.arange(0, 200, 2), np.arange(1, 200, 2)
    for pool in (data, read):
        assert len(limit_per_person(Dealt(None, pool, shares).client_data(0), 2)) == 80


@pytest.mark.parametrize(
    ("persons", "said"),
    [
        (None, "do not say whose they are"),
        (["a"], "give one for each of the 3 examples"),
        (["a", None, "b"], "some examples have no person"),
        (["a", float("nan"), "b"], "some examples have no person"),
        (["a", " ", "b"], "some examples have no person"),
    ],
)
def test_data_that_do_not_name_a_person_for_each_example_are_refused(persons, said):
    with pytest.raises(Refusal, match=said):
        limit_per_person(fv.Examples(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), persons), 1)


def test_numbers_and_words_name_the_same_persons():
    data = fv.Examples(torch.arange(4.0)[:, None], torch.zeros(4, dtype=torch.int64), [7, 7.0, "7", " 7"])
    assert len(limit_per_person(data, 1)) == 1
    whole = fv.Examples(data.inputs, data.targets, np.array([1, 1, 2, 2]))
    assert len(limit_per_person(whole, 1)) == 2


# --- what a person does to a sum


class Loud(Visits):
    """Task with one client, at which one person has fifty examples of the same enormous gradient."""

    num_clients = 1

    def client_data(self, client):
        inputs = torch.cat([torch.full((50, 4), 1e3), torch.zeros(10, 4)])
        return fv.Examples(inputs, torch.zeros(60, dtype=torch.int64), ["loud"] * 50 + list(range(10)))


@pytest.mark.parametrize("per_person", [1, 3])
def test_person_moves_a_sum_by_at_most_the_clips_of_its_examples(per_person):
    terms = StepTerms(RecordTerms(8.0, 1e-5, 0.5, Adjacency.ZERO_OUT, per_person=per_person, sample_rate=1.0))
    bench = Workbench(ClientSettings("loud", LocalTraining(), step=terms), Loud())
    data = bench.data_of(0, bench.settings)
    own = np.array([n for n, name in enumerate(data.persons) if name == "loud"])
    layout = {"weight": (2, 4), "bias": (2,)}
    sums = [
        step(bench.model, bench.task, data, rows, GradientClip(0.5), 1.0, layout)
        for rows in (np.arange(len(data)), np.setdiff1d(np.arange(len(data)), own))
    ]
    moved = np.sqrt(sum(((sums[0][name] - sums[1][name]) ** 2).sum() for name in layout))
    assert moved == pytest.approx(per_person * 0.5, rel=1e-4)


def test_attack_on_a_person_stays_below_its_claim_above_one_example():
    records, rate, noise, tests, delta = 5, 0.5, 2.0, 200_000, 1e-5
    sampling, stream = PoissonBatches(rate, tests, of_unit=records), Randomness(3).stream("coins")
    drawn = np.array([len(batch) for batch in sampling.draw(records, stream)])
    normal = np.random.default_rng(0).standard_normal((2, tests)) * noise
    seen, without = drawn + normal[0], normal[1]
    claims = [epsilon([group_event(noise, rate, n)], delta) for n in (records, 1)]
    threshold = 4.0
    found, alarm = (seen > threshold).mean(), (without > threshold).mean()
    slack = 5 * np.sqrt(found / tests)
    assert found - slack <= np.exp(claims[0]) * (alarm + 5 * np.sqrt(alarm / tests)) + delta
    assert found - slack > np.exp(claims[1]) * (alarm + 5 * np.sqrt(alarm / tests)) + delta


class Everywhere(Visits):
    """Task with four clients, at each of which one person has three examples of the same enormous gradient."""

    num_clients = 4

    def client_data(self, client):
        inputs = torch.cat([torch.full((3, 4), 1e3), torch.zeros(10, 4)])
        persons = ["loud"] * 3 + [f"{client}-{n}" for n in range(10)]
        return fv.Examples(inputs, torch.zeros(13, dtype=torch.int64), persons)


def test_as_many_clients_train_on_a_person_as_the_clients_that_may():
    for name in map(str, range(50)):
        allowed = {client for client in range(7) if Owners(client, range(7), 2).include(name)}
        assert len(allowed) == 2
        # A client more takes somebody's place, and changes nothing else.
        more = {client for client in range(8) if Owners(client, range(8), 2).include(name)}
        assert more == allowed or (7 in more and len(more & allowed) == 1)
    chosen = [sum(Owners(client, range(7), 2).include(str(n)) for n in range(2000)) for client in range(7)]
    assert min(chosen) > 450 and max(chosen) < 700


def test_among_many_clients_few_are_hashed_for_their_persons(monkeypatch):
    asked, weight = [], Owners._weight
    monkeypatch.setattr(Owners, "_weight", lambda *given: asked.append(given) or weight(*given))
    persons = [str(n) for n in range(200)]
    assert not any(Owners(n, range(100_000), 2).include(name) for n, name in enumerate(persons))
    assert len(asked) < 100 * len(persons)


@pytest.mark.parametrize(("clients", "moved"), [(None, 4), (2, 2), (1, 1)])
def test_person_at_several_clients_moves_their_sum_by_their_clips(clients, moved):
    terms = StepTerms(
        RecordTerms(
            8.0, 1e-5, 0.5, Adjacency.ZERO_OUT, per_person=2, clients_per_person=clients, sample_rate=1.0
        )
    )
    bench = Workbench(ClientSettings("everywhere", LocalTraining(), step=terms), Everywhere())
    union, layout = union_of(bench), {"weight": (2, 4), "bias": (2,)}
    own = np.array([bool(each.any()) for each in union.batch(torch.arange(len(union)))[0]])
    sums = [
        step(bench.model, bench.task, union, np.flatnonzero(rows), GradientClip(0.5), 1.0, layout)
        for rows in (np.ones_like(own), ~own)
    ]
    size = np.sqrt(sum(((sums[0][name] - sums[1][name]) ** 2).sum() for name in layout))
    assert size == pytest.approx(moved * 2 * 0.5, rel=1e-4)


# --- runs


def result_of(run):
    return json.loads((run.folder / "result.json").read_text())


def simulated(tmp_path, task=None, rounds=3, **privacy):
    return fv.simulate(
        task or Visits(),
        privacy=privacy,
        cohort="all",
        num_rounds=rounds,
        quiet=True,
        folder=tmp_path / "run",
    )


def test_a_run_that_bounds_persons_promises_per_person(tmp_path):
    run = simulated(tmp_path, name="record", per_person=2, target_epsilon=2.0)
    result = result_of(run)
    rows = result["privacy"]
    assert {row["unit"] for row in rows} == {"person"} and all(row["epsilon"] <= 2.0 for row in rows)
    assert result["records"]["outside"].startswith("a person at m clients is m units")
    assert all(row["groups"] == [] for row in rows)
    ledger = ledgers_in(run.folder / "client_ledgers")[0]
    charged = [
        json.loads(entry.payload)["events"]["model"]
        for entry in read_entries(ledger)
        if entry.kind == "reserve"
    ]
    assert charged and all(event["event"]["kind"] == "MixtureOfGaussians" for event in charged)
    checked = verify(ledger)
    assert checked.ok, checked.problem


def test_promise_per_example_states_the_loss_per_person(tmp_path):
    result = result_of(simulated(tmp_path, name="record", target_epsilon=1.0))
    row = result["privacy"][-1]
    sizes = dict(row["groups"])
    assert row["unit"] == "record" and row["epsilon"] < sizes[2] < sizes[5] < sizes[10]


def test_without_a_bound_persons_change_nothing(tmp_path):
    runs = [simulated(tmp_path / str(named), Visits(named), name="record") for named in (True, False)]
    shown = [result_of(run) for run in runs]
    assert shown[0]["privacy"] == shown[1]["privacy"]
    models = [(run.folder / "model.safetensors").read_bytes() for run in runs]
    assert models[0] == models[1]


def test_the_sum_of_all_records_counts_a_persons(tmp_path):
    run = simulated(tmp_path, name="record_distributed", per_person=4, target_epsilon=2.0)
    row = result_of(run)["privacy"][-1]
    assert row["unit"] == "person" and row["epsilon"] <= 2.0
    one = fv.plan(Visits(), privacy={"name": "record_distributed", "target_epsilon": 2.0}, num_rounds=3)[0]
    four = fv.plan(
        Visits(), privacy={"name": "record_distributed", "target_epsilon": 2.0, "per_person": 4}, num_rounds=3
    )[0]
    assert (
        four.unit == "person"
        and one.noise_multiplier < four.noise_multiplier < 4 * one.noise_multiplier * 1.001
    )


def test_a_bound_without_persons_is_refused(tmp_path):
    with pytest.raises(Refusal, match="do not say whose they are"):
        simulated(tmp_path, Visits(named=False), name="record", per_person=2)


def test_exchanged_persons_with_several_examples_are_refused(tmp_path):
    with pytest.raises(Refusal, match="no accountant supports several replaced examples"):
        simulated(tmp_path, name="record", per_person=2, adjacency="replace-one")


def test_records_and_persons_are_not_counted_on_one_ledger(tmp_path):
    for number, units in enumerate(permutations(("record", "person", "person_everywhere"), 2)):
        first, other = (fv.Budget(unit, 1.0, 1e-6) for unit in units)
        path = tmp_path / f"{number}.ledger"
        fv.Ledger.open(path, first, owner="clinic", simulated=False).close()
        with pytest.raises(Refusal, match=f"counts what one {units[0]} has lost"):
            fv.Ledger.open(path, other, owner="clinic", simulated=False)


def planned(**privacy):
    privacy = {"name": "record_distributed", "target_epsilon": 2.0, **privacy}
    return fv.plan(Everywhere(), privacy=privacy, num_rounds=3)[0]


def test_a_person_at_two_clients_is_one_unit_of_a_sum_of_both():
    assert (
        planned(per_person=2, clients_per_person=2).noise_multiplier == planned(per_person=4).noise_multiplier
    )
    # More clients than there are do not count.
    assert (
        planned(per_person=1, clients_per_person=9).noise_multiplier == planned(per_person=4).noise_multiplier
    )


def test_loss_of_a_person_at_two_clients_is_that_of_both_ledgers(tmp_path):
    run = simulated(tmp_path, name="record", per_person=2, clients_per_person=2, target_epsilon=2.0)
    found = result_of(run)["records"]
    ledgers = ledgers_in(run.folder / "client_ledgers")
    events = [event for path in ledgers for event in read_events(path, fv.Adversary.MODEL)]
    assert found["person"] >= epsilon(events, found["delta"], interval=GATE_INTERVAL) > max(found["epsilon"])
    assert found["outside"].startswith("nobody: at most 2 clients")


class RosteredVisits(Everywhere):
    """The same four clients, whose data nobody declares simulated."""

    simulated, data_id, held_out_public = False, "visits", True


def test_real_data_keep_the_client_bound_of_their_ledger(tmp_path):
    """A ledger that counted a person at one client says nothing of one who is at several."""
    asked = {"name": "record_distributed", "target_epsilon": 4.0, "per_person": 2, "records": 52}
    given = {"cohort": "all", "num_rounds": 1, "quiet": True, "ledger": {"dir": str(tmp_path / "ledgers")}}

    def run(name, **more):
        task = RosteredVisits()
        privacy = {**asked, "most_records": 13, **more}
        return fv.simulate(task, privacy=privacy, folder=tmp_path / name, **given)

    first = run("one", clients_per_person=2)
    assert {row["unit"] for row in result_of(first)["privacy"]} == {"person_everywhere"}
    with pytest.raises(Refusal, match="counts what one person_everywhere has lost"):
        run("two")


def test_a_bound_on_clients_without_one_on_examples_is_refused(tmp_path):
    with pytest.raises(Refusal, match="give per_person as well"):
        simulated(tmp_path, name="record", clients_per_person=2)
