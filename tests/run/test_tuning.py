"""Tuning by arms: every client trains in one arm, the best value goes on with all, and all of it costs one run."""

import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from shared.runs import json_lines, reservations, resume, run_quietly

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.cli.plan import require_accepted
from fedveil.configs.settings import settings_from_overrides
from fedveil.deployment.device.order_policy import require_arm
from fedveil.evidence.binding.recompute_ledger import main as recomputed
from fedveil.evidence.content import report_of
from fedveil.evidence.page import page_of
from fedveil.evidence.page_text import differences
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.training_order import ClientClaim, ModeName, TrainingOrder, display_name
from fedveil.privacy.arms import ArmDeal
from fedveil.privacy.budget import Adjacency
from fedveil.privacy.ledger.ledger import read_entries, verify
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.questions import client as asking_client
from fedveil.questions.client import measured_at
from fedveil.questions.evaluation_plan import scoring_plan
from fedveil.run import prepare
from fedveil.run import run as run_module
from fedveil.run.build import build
from fedveil.run.display import tuned_line
from fedveil.run.queries import Query
from fedveil.run.run_files import read_run
from fedveil.run.sum_plan import sum_plan
from fedveil.run.tuning import charged_scores, require_arms, tuning_of
from fedveil.server.participants import Participants
from fedveil.server.query_rows import name_of
from fedveil.simulations.simulate import simulate
from fedveil.strategies.cohorts import All, Fixed, OverSelected, Poisson, in_arm

pytestmark = pytest.mark.usefixtures("fast_runs")

DEAL = ArmDeal("5e" * 16, 3)
SMALL = ("task=digits", "task.num_clients=30", "num_rounds=3")
GIVEN = ("privacy.noise_multiplier=1", "privacy.target_epsilon=null", "privacy.allow_large_delta=true")
TUNE = ("tune=learning_rate", "tune.values=[0.02,0.5]", "tune.rounds=2")


class Nodes:
    """Grid of so many nodes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_node_ids(self) -> range:
        return range(2, 2 + self.count)


# --- whose turn it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cohort", [All(), Poisson(0.5), Fixed(6), OverSelected(Fixed(8), Fixed(6))])
def test_the_cohorts_of_arms_are_of_their_clients_alone(cohort: Any) -> None:
    everybody = Participants(Nodes(60), cohort, 60)  # type: ignore[arg-type]
    arms = [DEAL.arm(number) for number in (1, 2, 3)]
    members = [set(everybody.members(arm)) for arm in arms]
    assert set.union(*members) == set(range(2, 62)) and sum(map(len, members)) == 60
    for arm, own in zip(arms, members, strict=True):
        everybody.arm = arm
        drawn = everybody.draw(Randomness(3).stream("cohort", 1), arm=arm)
        assert set(drawn) <= own and everybody.expected == in_arm(cohort, 3).expected_size(len(own))
        assert everybody.pool_size == len(own)
    everybody.arm = None
    assert everybody.expected == cohort.expected_size(60)


def test_names_decide_the_arm_and_a_growing_roster_moves_nobody() -> None:
    names = {node: f"clinic-{node}" for node in range(2, 62)}
    everybody = Participants(Nodes(50), All(), 50, names=names)  # type: ignore[arg-type]
    before = [everybody.members(DEAL.arm(number)) for number in (1, 2, 3)]
    everybody.renew(list(names), everybody.answers, names)
    after = [everybody.members(DEAL.arm(number)) for number in (1, 2, 3)]
    assert all(set(one) <= set(more) for one, more in zip(before, after, strict=True))
    assert all(DEAL.arm_of(names[node]) == 2 for node in after[1])


# --- runs ---------------------------------------------------------------------------------------------------------


def test_tuned_run_costs_like_one_run_and_names_its_choice(tmp_path: Path) -> None:
    asked = [*SMALL, *GIVEN, "cohort.rate=0.4"]
    whole = run_quietly(asked, tmp_path / "whole").result
    tuned = run_quietly([*asked, *TUNE], tmp_path / "arms").result
    assert tuned["status"] == "completed" and tuned["rounds_completed"] == 5
    assert tuned["privacy"][2]["epsilon"] == pytest.approx(whole["privacy"][2]["epsilon"], abs=1e-9)
    assert whole["tuning"] is None and tuned["tuning"]["winner"] == 2 and tuned["tuning"]["value"] == 0.5
    assert [arm["value"] for arm in tuned["tuning"]["arms"]] == [0.02, 0.5]
    rows = json_lines(tmp_path / "arms" / "metrics.jsonl")
    assert [row.get("arm") for row in rows] == [1, 2, 1, 2, None]
    assert [row["invited"] for row in rows] == [6, 6, 6, 6, 12]
    assert rows[0]["epsilon_client"] == rows[1]["epsilon_client"] < rows[2]["epsilon_client"]
    entries = [
        json.loads(e.payload) for e in read_entries(tmp_path / "arms" / "ledger") if e.kind == "reserve"
    ]
    assert [entry.get("arm", {}).get("arm") for entry in entries] == [1, 2, 1, 2, None]
    assert {entry["arm"]["deal"] for entry in entries[:4]} == {tuned["tuning"]["deal"]}
    assert verify(tmp_path / "arms" / "ledger").ok
    report = report_of(read_run(tmp_path / "arms"))
    assert report["tuning"]["value"] == 0.5 and report["run"]["rounds_planned"] == 5
    assert {event["count"] for event in report["ledger"]["events"]} == {3}  # as many as one client lost


class EndsAfter:
    """Callback that ends a run after so many sums."""

    def __init__(self, sums: int) -> None:
        self.sums = sums

    def start(self, run: object) -> None: ...

    def round(self, done: fv.RoundEnd) -> None:
        if done.round == self.sums:
            signal.raise_signal(signal.SIGTERM)

    def end(self, ending: object) -> None: ...


def test_run_past_its_arms_goes_on_with_any_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, run = settings_from_overrides([*SMALL, "privacy=none", "cohort=all", *TUNE]), tmp_path / "run"
    assert simulate(asked, run, quiet=True, callbacks=[EndsAfter(4)]).result["status"] == "interrupted"

    def nobody(*_: object) -> None:
        raise Refusal("tune.values", 2, "an arm has no client")

    monkeypatch.setattr(prepare, "require_arms", nobody)
    resumed = resume(run).result
    assert resumed["status"] == "completed" and resumed["rounds_completed"] == 5


MODES = {
    "distributed": ("privacy=client_distributed", "cohort=all", "privacy.target_delta=1e-3"),
    "record": ("privacy=record", "cohort=all"),
    "together": ("privacy=record_distributed", "cohort=all"),
    "none": ("privacy=none", "strategy=fedadam"),
    "clip": (*GIVEN, "cohort.rate=0.4", "tune=clipping_norm"),
    "fixed": (*GIVEN, "cohort=fixed", "cohort.size=10"),
}


@pytest.mark.parametrize(
    "mode", [pytest.param(each, marks=[pytest.mark.campaign] * (each == "distributed")) for each in MODES]
)
def test_arms_work_in_every_mode_that_has_rounds_of_its_own(tmp_path: Path, mode: str) -> None:
    tune = [each for each in TUNE if not each.startswith("tune=") or mode != "clip"]
    run = simulate(
        settings_from_overrides([*SMALL, *tune, *MODES[mode]]), tmp_path / "run", quiet=True
    ).result
    assert run["status"] == "completed" and run["tuning"]["winner"] in (1, 2)
    budget = run["privacy"][2]["target_epsilon"]
    assert mode == "none" or budget is None or run["privacy"][2]["epsilon"] <= budget
    rows = json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row.get("arm") for row in rows] == [1, 2, 1, 2, None] and not any(
        row["abandoned"] for row in rows
    )
    if mode == "clip":  # the noise goes with the norm, so that the charge is the same
        assert [row["clipping_norm"] for row in rows[:2]] == [0.02, 0.5]


def test_encrypted_arms_and_evaluations_have_the_same_bits_for_a_seed(tmp_path: Path) -> None:
    asked = [*SMALL, *MODES["distributed"], "task.num_clients=8", *TUNE[:2], "tune.rounds=1"]
    runs = [run_quietly([*asked, "evaluate.clients=final"], tmp_path / name) for name in ("one", "other")]
    one, other = [(run.folder / "model.safetensors").read_bytes() for run in runs]
    assert one == other
    one, other = [run.result["evaluations"] for run in runs]
    assert one[0]["answers"] and one == other


@pytest.mark.parametrize("broken, said", [
    (["cohort=min_separation"], "needs rounds that are a release each"),
    (["audit=full"], "its canaries are in no arm"),
    (["audit.on_alarm=rollback"], "none can be rolled back"),
    (["privacy.clipping=adaptive"], "depends on the releases of all clients"),
    (["tune.values=[1,1]"], "try each value once"),
    (["tune.values=[1]"], "must be a list of 2 to 32 values"),
    (["tune.rounds=100"], "leaves none of num_rounds=100"),
    (["tune=local_epochs", "tune.values=[1,2]", "privacy=record"], "charged for each local step"),
    (["tune=clipping_norm", "privacy=record"], "no whole client is clipped"),
    (
        ["privacy=record_distributed", "privacy.per_person=1", "privacy.clients_per_person=2"],
        "clients of one person may be in several arms",
    ),
    (["tune.by=repeat_and_select"], "may be claimed only against an adversary that sees only the winner"),
    (["tune=repeat_and_select"], "against clients whole runs compose"),
    (["tune=learning_rate=5,20,80"], r"write tune=learning_rate tune.values=\[5,20,80\]"),
])  # fmt: skip
def test_unsupported_use_of_arms_is_refused_by_name(broken: list[str], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        settings_from_overrides(["tune=learning_rate", "tune.values=[1,2]", *broken])


def test_empty_arms_and_private_data_are_refused() -> None:
    asked = ["task=digits", "task.num_clients=3", "privacy=none", "tune=learning_rate"]
    many = build(settings_from_overrides([*asked, f"tune.values={list(range(1, 9))}"]))
    tuning = tuning_of(many)
    assert tuning is not None
    with pytest.raises(Refusal, match="try fewer values"):
        require_arms(many, tuning)
    with pytest.raises(Refusal, match="compared on public held-out data"):
        tuning_of(build(settings_from_overrides([*asked, "tune.values=[1,2]", "task.held_out=private"])))
    with pytest.raises(Refusal, match="the task reports accuracy, loss"):
        tuning_of(build(settings_from_overrides([*asked, "tune.values=[1,2]", "tune.metric=auc"])))


def test_plan_shows_the_cost_of_whole_runs() -> None:
    tune = {"name": "learning_rate", "values": [5, 20, 80]}
    (arms,) = fv.plan("digits", privacy={"target_epsilon": 2.0}, num_rounds=20, tune=tune)
    (alone,) = fv.plan("digits", privacy={"target_epsilon": 2.0}, num_rounds=20)
    assert arms.epsilon == alone.epsilon and arms.noise_multiplier == alone.noise_multiplier
    assert (arms.tries, alone.tries) == (3, 1) and arms.tries_epsilon > 1.5 * arms.epsilon[-1][1]


WARDS = """
import torch, fedveil as fv

class Wards:
    held_out_public, data_id, num_clients, simulated = True, "wards", 40, False

    def __init__(self, num_clients=40): pass
    def model(self): return torch.nn.Linear(4, 2)
    def loss(self, outputs, targets): return torch.nn.functional.cross_entropy(outputs, targets)
    def metrics(self, outputs, targets): return {"accuracy": 0.5}
    def client_data(self, client): return fv.Examples(torch.zeros(8, 4), torch.zeros(8).long())
    def held_out(self): return self.client_data(0)
"""


def test_sweep_on_real_data_states_its_cost_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wards_of_a_sweep.py").write_text(WARDS)
    monkeypatch.syspath_prepend(tmp_path)
    asked = [
        "task=custom",
        "task.target=wards_of_a_sweep:Wards",
        "allow_modules=[wards_of_a_sweep]",
        "privacy.target_delta=1e-3",
    ]
    jobs = [settings_from_overrides([*asked, f"learning_rate={rate}"]) for rate in (1, 5, 20, 80)]
    plan = sum_plan(build(jobs[0]))
    assert plan is not None
    with pytest.raises(Refusal, match=r"tune=learning_rate .* --accept-sweep runs them") as refused:
        require_accepted(jobs)
    together = plan.epsilon(1e-3, 4 * plan.num_rounds)
    assert f"they cost epsilon {together:.3g} for one client" in str(refused.value) and together > 5
    require_accepted(jobs[:1])
    require_accepted([settings_from_overrides([f"seed={seed}"]) for seed in (0, 1)])
    require_accepted([settings_from_overrides([*asked[:3], "privacy=none"]) for _ in "ab"])


# --- scored at the clients ----------------------------------------------------------------------------------------

ASK = ("tune.score=clients", "evaluate.noise_multiplier=0.5", "tune.resolution=0.5")


def test_scores_are_charged_once_to_the_clients_of_each_arm(tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = [*SMALL, *GIVEN, "cohort.rate=0.4", *TUNE, *ASK]
    result = run_quietly(asked, run).result
    assert result["status"] == "completed" and result["rounds_completed"] == 5
    told = result["tuning"]
    assert told["scored_by"] == "clients" and told["noise_multiplier"] == 0.5 and told["winner"] in (1, 2)
    assert sum(arm["clients"] for arm in told["arms"]) == 30
    for arm in told["arms"]:
        assert arm["low"] < arm["score"] < arm["high"] or arm["score"] in (0.0, 1.0)
    best = max(told["arms"], key=lambda arm: arm["score"])
    assert best["arm"] == told["winner"]
    entries = reservations(run / "ledger")
    questions = [entry for entry in entries if entry.get("kind") == "question"]
    assert [entry["arm"]["arm"] for entry in questions] == [1, 2]
    assert {entry["arm"]["deal"] for entry in questions} == {told["deal"]}
    assert all(entry["segments"] == {"accuracy": "evaluation"} for entry in questions)
    event = PoissonSampledDpEvent(0.4, GaussianDpEvent(1.0))
    one_client = SelfComposedDpEvent(event, 3), GaussianDpEvent(0.5)
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, 1e-4)
    for each in one_client:
        accountant.compose(each)
    by_pld = verify(run / "ledger").epsilon_pld
    assert by_pld == pytest.approx(accountant.get_epsilon(result["privacy"][2]["delta"]), abs=1e-9)
    assert recomputed(result["ledger"])["model"]["epsilon"] == pytest.approx(by_pld, abs=1e-9)
    rows = json_lines(run / "metrics.jsonl")
    assert ["scores" in row for row in rows] == [False, False, False, True, False]
    assert rows[3]["epsilon_client"] > 1.5 * rows[1]["epsilon_client"]
    report = report_of(read_run(run))
    assert report["tuning"]["scored_by"] == "clients" and differences(page_of(report), report) == []


@pytest.mark.parametrize("other, apart", [(0.77, True), (0.79, False), (None, False), ("silent", False)])
def test_winner_needs_a_lead_beyond_both_noises(other: Any, apart: bool) -> None:
    def record(arm: int, value: float | None) -> dict[str, Any]:
        ends = {"low": None, "high": None} if value is None else {"low": value - 0.05, "high": value + 0.05}
        return {"arm": arm, "epsilon": 0.1, "answers": [{"figures": [{"value": value, **ends}]}]}

    first = {"arm": 1, "epsilon": 0.1, "answers": []} if other == "silent" else record(1, other)
    told = charged_scores([first, record(2, 0.85)], 2)
    assert told["apart"] is apart and told["epsilon"] == 0.1


def test_arm_without_a_score_is_reported_as_such() -> None:
    arms = [{"value": 0.5, "score": 0.2}, {"value": 2.0, "score": None}]
    said = tuned_line({"key": "learning_rate", "value": 0.5, "arms": arms, "apart": False})
    assert "is best of 0.5, 2 (no score), but the difference is within the noise" in said


def test_each_arm_is_scored_by_its_own_clients_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_of: list[int] = []

    def spied(bench: Any, client: int, *more: Any) -> Any:
        asked_of.append(client)
        return measured_at(bench, client, *more)

    monkeypatch.setattr(asking_client, "measured_at", spied)
    asked = settings_from_overrides([*SMALL, *GIVEN, "cohort.rate=0.4", *TUNE, *ASK])
    told = simulate(asked, tmp_path / "run", quiet=True).result["tuning"]
    deal = ArmDeal(told["deal"], 2)
    assert sorted(asked_of) == list(range(30))
    assert asked_of == sorted(asked_of, key=lambda client: (deal.arm_of(str(client)), client))


def test_target_includes_the_scores(tmp_path: Path) -> None:
    asked = [*SMALL, "privacy.allow_large_delta=true", "cohort.rate=0.4", *TUNE, *ASK]
    plan, with_final = (
        sum_plan(build(settings_from_overrides([*asked, "evaluate.noise_multiplier=3", *more])))
        for more in ((), ("evaluate.clients=final",))
    )
    without = sum_plan(build(settings_from_overrides([*asked, "tune.score=public"])))
    noises = [float((each and each.noise_multiplier) or 0) for each in (without, plan, with_final)]
    assert 0 < noises[0] < noises[1] < noises[2]
    asked += ["evaluate.noise_multiplier=3", "evaluate.clients=final", "tune.resolution=5"]
    result = run_quietly(asked, tmp_path / "run").result
    assert 2.9 < result["privacy"][2]["epsilon"] <= 3.0 and len(result["evaluations"]) == 1
    assert result["status"] == "completed" and result["tuning"]["epsilon"] is not None


def test_indistinguishable_scores_are_refused_before_spending(tmp_path: Path) -> None:
    asked = [*SMALL, *GIVEN, "cohort.rate=0.4", *TUNE, "tune.score=clients", "evaluate.noise_multiplier=5"]
    with pytest.raises(Refusal, match=r"tune.resolution=0.1.* evaluate.noise_multiplier=1\.") as refused:
        run_quietly(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    enough = re.search(r"evaluate.noise_multiplier=([\d.]+)", str(refused.value))
    assert enough is not None
    asked.append(f"evaluate.noise_multiplier={float(enough[1]) * 0.99}")
    plan = scoring_plan(build(settings_from_overrides(asked)))
    assert plan is not None and plan.clients == 15 and plan.half_width is not None
    assert plan.half_width * math.sqrt(2) == pytest.approx(0.099, rel=0.01)


def test_arms_of_private_held_out_data_are_scored_by_clients(tmp_path: Path) -> None:
    asked = [*SMALL, *GIVEN, "cohort.rate=0.4", *TUNE, *ASK, "task.held_out=private"]
    result = run_quietly(asked, tmp_path / "run").result
    assert result["status"] == "completed" and result["tuning"]["metric"] == "accuracy"
    rows = json_lines(tmp_path / "run" / "metrics.jsonl")
    assert not any("accuracy" in row for row in rows)


def test_a_run_killed_after_its_scores_charges_them_once(tmp_path: Path) -> None:
    asked = settings_from_overrides([*SMALL, *GIVEN, "cohort.rate=0.4", *TUNE, *ASK])
    whole = simulate(asked, tmp_path / "whole", quiet=True).result
    simulate(asked, tmp_path / "run", quiet=True, callbacks=[EndsAfter(4)])
    resumed = resume(tmp_path / "run")
    assert resumed.result["tuning"] == whole["tuning"]
    assert resumed.result["privacy"][2]["epsilon"] == whole["privacy"][2]["epsilon"]


def test_no_value_goes_on_where_no_arm_can_be_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object) -> list[dict[str, Any]]:
        return [{"arm": arm, "reason": "too few clients answered", "answers": []} for arm in (1, 2)]

    monkeypatch.setattr(run_module, "queries_of", lambda settings: (Query(scores=silent),))
    asked = settings_from_overrides([*SMALL, *GIVEN, "cohort.rate=0.4", *TUNE, *ASK])
    result = simulate(asked, tmp_path / "run", quiet=True).result
    assert result["status"] == "failed" and "too few clients answered" in result["reason"]
    assert result["tuning"]["winner"] is None and result["rounds_completed"] == 3


@pytest.mark.parametrize("broken, said", [
    (["privacy=record_distributed"], "clients are hidden as a whole when they evaluate"),
    (["privacy=none"], "clients are hidden as a whole when they evaluate"),
    (["tune.metric=loss"], "has no bound"),
])  # fmt: skip
def test_scores_that_no_client_may_give_are_refused(broken: list[str], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        settings_from_overrides(["tune=learning_rate", "tune.values=[1,2]", "tune.score=clients", *broken])


def test_a_device_scores_in_its_own_arm_of_the_runs_deal(tmp_path: Path) -> None:
    own = DEAL.arm_of("boston")
    require_arm(DEAL.arm(own), "boston", display_name("spring@0f"), tmp_path)
    asked = display_name(name_of("spring@0f"))
    require_arm(DEAL.arm(own), "boston", asked, tmp_path)
    other = next(deal for n in range(99) if (deal := ArmDeal(f"{n:032x}", 3)).arm_of("boston") != own)
    with pytest.raises(Refusal, match="already dealt its clients"):
        require_arm(other.arm(other.arm_of("boston")), "boston", asked, tmp_path)


# --- devices ------------------------------------------------------------------------------------------------------

CLAIM = ClientClaim(3.0, Adjacency.ZERO_OUT)


def test_an_order_names_its_arm_and_only_where_there_is_one() -> None:
    order = TrainingOrder(
        "spring", ModeName.CLIENT_CENTRAL, LocalTraining(0.1), client=CLAIM, arm=DEAL.arm(2)
    )
    assert TrainingOrder.from_json(order.to_json()) == order
    plain = TrainingOrder("spring", ModeName.CLIENT_CENTRAL, LocalTraining(0.1), client=CLAIM)
    assert "arm" not in json.loads(plain.to_json()) and TrainingOrder.from_json(plain.to_json()) == plain
    with pytest.raises(Refusal):
        TrainingOrder.from_json(order.to_json().replace('"arm": 2', '"arm": 4'))


def test_a_device_answers_its_own_arm_of_the_first_deal_of_a_run(tmp_path: Path) -> None:
    own = DEAL.arm_of("boston")
    require_arm(DEAL.arm(own), "boston", "spring", tmp_path)
    require_arm(DEAL.arm(own), "boston", "spring", tmp_path)
    with pytest.raises(Refusal, match=f"this client is in arm {own}"):
        require_arm(DEAL.arm(own % 3 + 1), "boston", "spring", tmp_path)
    other = next(deal for n in range(99) if (deal := ArmDeal(f"{n:032x}", 3)).arm_of("boston") != own)
    with pytest.raises(Refusal, match="already dealt its clients"):
        require_arm(other.arm(other.arm_of("boston")), "boston", "spring", tmp_path)
    require_arm(other.arm(other.arm_of("boston")), "boston", "summer", tmp_path)  # a run of its own
    renamed = next(name for n in range(99) if DEAL.arm_of(name := f"boston-{n}") != own)
    with pytest.raises(Refusal, match="each has one arm"):
        require_arm(DEAL.arm(DEAL.arm_of(renamed)), renamed, "spring", tmp_path)
    (tmp_path / "deals.json").write_text("{")
    with pytest.raises(Refusal, match="cannot be read"):
        require_arm(DEAL.arm(own), "boston", "spring", tmp_path)


def test_a_client_has_no_more_rounds_than_without_arms() -> None:
    settings = settings_from_overrides(
        ["num_rounds=5", "tune=learning_rate", "tune.values=[1,2,3]", "tune.rounds=2"]
    )
    assert settings.steps == 9
    begun = [settings.rounds_begun(done) for done in range(10)]
    left = [settings.rounds_left(done) for done in range(10)]
    assert begun == [0, 1, 1, 1, 2, 2, 2, 3, 4, 5] and left == [5, 5, 5, 4, 4, 4, 3, 2, 1, 0]
    assert [build(settings).settings.rounds_left(0), settings_from_overrides(["num_rounds=5"]).steps] == [
        5,
        5,
    ]
