"""Records of all clients hidden in one sum: sensitivity, the step, its law and its cost, and what is refused."""

import json
import math
import runpy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from scipy import stats
from shared.tasks import Classes
from torch import Tensor, nn

import fedveil as fv
from fedveil.audit.record_canaries import coins_of_step
from fedveil.base.refusal import Refusal
from fedveil.cli.audit import audit_run
from fedveil.client.app import train_round
from fedveil.client.dp_sgd.rounds import GradientClip, draw_records, step, sum_of_union, union_of
from fedveil.client.private_update import SUM_PART
from fedveil.client.workbench import Workbench
from fedveil.configs.settings import settings_from_overrides
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.flower_adapter import claim_identity
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.record_settings import CanaryRecords, StepTerms
from fedveil.messages.training_order import RecordTerms
from fedveil.messages.wire import Exchange, instruct, memory_arrays, with_canary_records
from fedveil.privacy.accounting.epsilon import PUBLISH_INTERVAL, epsilon
from fedveil.privacy.budget import Adjacency, Adversary, Budget, Unit
from fedveil.privacy.ledger import data_sets
from fedveil.privacy.ledger.data_sets import PendingCharges
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.mechanisms import private_sum
from fedveil.privacy.mechanisms.discrete_gaussian import sample
from fedveil.privacy.mechanisms.distributed import decode_sum, encode_share, sum_event, take_back
from fedveil.privacy.mechanisms.private_sum import CohortSum, add, add_noise, decode, encode
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sizing import Attendance, ShareSpec, size_shares
from fedveil.privacy.mechanisms.sum_spec import SumSpec, cells_for
from fedveil.run.build import build
from fedveil.run.sum_plan import sum_plan
from fedveil.server.round_terms import Sum
from fedveil.simulations.simulate import simulate

MASKED = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "masked_clients.py"))
TERMS = StepTerms(RecordTerms(8.0, 1e-5, 0.5, Adjacency.ZERO_OUT, sample_rate=0.3))
CLIP = GradientClip(TERMS.terms.max_grad_norm)
claim_identity(1)
SEED = b"public".ljust(32)


def spec_of(size: int, unit: float = 0.5, units: float = 20.0) -> SumSpec:
    return SumSpec(unit * units, cells=cells_for(size, units), unit_norm=unit)


def records(rng: np.random.Generator, count: int, size: int, unit: float) -> np.ndarray:
    """Return gradients of exactly the norm that is allowed, most of them in a few directions, so that they add up."""
    made = rng.normal(size=(count, size)) + 3 * rng.normal(size=size)
    return made * (unit / np.linalg.norm(made, axis=1, keepdims=True))


# --- how far one record moves the sum -----------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.integers(1, 60), st.integers(1, 80), st.floats(1.0, 80.0), st.integers(0, 2**32 - 1))
def test_one_record_moves_a_vector_by_no_more_than_its_sensitivity(
    size: int, count: int, units: float, seed: int
) -> None:
    rng, unit = np.random.default_rng(seed), 0.5
    with_it = records(rng, count, size, unit)
    coarse = replace(spec_of(size, unit, units), cells=max(4 * math.isqrt(size), int(8 * units)))
    for spec in (spec_of(size, unit, units), coarse):
        both = [encode({"w": each.sum(0)}, {}, spec)[0].astype(float) for each in (with_it, with_it[1:])]
        assert np.linalg.norm(both[0] - both[1]) <= spec.sensitivity(size) * (1 + 1e-9)
        assert all(np.linalg.norm(each) <= spec.cells for each in both)


@settings(max_examples=60)
@given(st.integers(1, 60), st.floats(12.0, 80.0), st.floats(0.0, 1.0), st.integers(0, 2**32 - 1))
def test_one_record_moves_a_vector_no_further_at_its_range(
    size: int, units: float, part: float, seed: int
) -> None:
    unit, spec = 0.5, spec_of(size, 0.5, units)
    direction = np.random.default_rng(seed).normal(size=size)
    direction /= np.linalg.norm(direction)
    norms = spec.aim(size) - part * unit, spec.aim(size) + (1 - part) * unit
    both = [encode({"w": norm * direction}, {}, spec)[0].astype(float) for norm in norms]
    assert np.linalg.norm(both[0] - both[1]) <= spec.sensitivity(size) * (1 + 1e-9)


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 80), st.sampled_from([16, 32]), st.integers(0, 2**32 - 1))
def test_one_record_moves_a_masked_vector_by_no_more_than_that(
    size: int, count: int, bits: int, seed: int
) -> None:
    rng, unit = np.random.default_rng(seed), 0.5
    with_it = records(rng, count, size, unit)
    spec = size_shares(spec_of(size, unit, 20), size, Attendance(5, 4, 1), 1.0, bits, layered=True)
    quiet = replace(spec, sigma=0, layers=())
    signed = np.int16 if bits == 16 else np.int32
    both = [
        encode_share({"w": each.sum(0)}, {}, quiet, Randomness(seed).stream("share"), SEED)[0].view(signed)
        for each in (with_it, with_it[1:])
    ]
    moved = np.linalg.norm(both[0].astype(float) - both[1].astype(float))
    assert moved**2 <= spec.sensitivity_squared * (1 + 1e-9)


@pytest.mark.parametrize("part", [0.02, 0.5])
def test_masked_sum_is_rounded_by_independent_coins(part: float) -> None:
    size = 10_000
    norm = part * math.sqrt(size)
    spec = ShareSpec(
        SumSpec(64.0 * norm, cells=round(64 * norm), unit_norm=norm), size, Attendance(2, 2), 0, 32, False
    )
    rest = np.full(size, 0.49 * spec.sum.step)  # to the nearest, all coordinates would move at once
    both = [
        encode_share({"w": rest + more}, {}, spec, Randomness(0).stream("share"), SEED)[0].view(np.int32)
        for more in (0.0, part * spec.sum.step)
    ]
    moved = float(np.sum((both[1] - both[0]).astype(float) ** 2))
    mean, spread = size * (part**2 + part * (1 - part)), size * part * (1 - part)
    assert abs(moved - mean) < 6 * math.sqrt(spread)
    assert moved <= spec.sensitivity_squared < (norm + math.sqrt(size)) ** 2


@pytest.mark.parametrize(("clients", "least"), [(5, 4), (5, 3), (20, 16)])
def test_sixteen_bits_add_at_most_five_percent_to_the_noise(clients: int, least: int) -> None:
    spec = size_shares(spec_of(100_000, units=60), 100_000, Attendance(clients, least, 1), 3.0, layered=True)
    assert spec.bits == 16 and spec.inflation <= 1.05 and spec.min_noise(1) >= 3


def test_rounding_moves_a_vector_as_far_as_is_counted() -> None:
    spec = SumSpec(20.0, cells=20, unit_norm=0.2)  # a grid unit of 1
    below, above = (encode({"w": np.full(100, value)}, {}, spec)[0].astype(float) for value in (0.49, 0.51))
    assert np.linalg.norm(above - below) == 10 <= spec.sensitivity(100) == pytest.approx(10.2)


def test_vector_beyond_its_range_is_scaled_and_rounded() -> None:
    spec = SumSpec(20.0, cells=20, unit_norm=0.2)
    long = np.random.default_rng(0).normal(size=100) * 5
    room = (20 - math.sqrt(100) / 2) * (1 - 1e-9)  # rounding adds at most half a unit to each coordinate
    sent = encode({"w": long}, {}, spec)[0]
    assert np.array_equal(sent, np.rint(long * room / np.linalg.norm(long)))


def test_noise_is_measured_in_the_sensitivity_of_a_record() -> None:
    size = 20_000
    spec = SumSpec(0.5 * 20, cells=20 * 300, unit_norm=0.5)  # rounding adds 47 % to what a record moves
    noised, event = add_noise(np.zeros(size), 1.5, spec, Randomness(3).stream("noise"))
    assert event == GaussianDpEvent(1.5)
    wanted = (1.5 * (300 + math.sqrt(size))) ** 2
    assert stats.chi2.ppf(1e-6, size) <= float(np.sum(noised**2)) / wanted <= stats.chi2.isf(1e-6, size)


def test_noise_of_the_survivors_is_never_below_the_event() -> None:
    size, attendance = 3000, Attendance(10, 6, 1)
    spec = size_shares(spec_of(size), size, attendance, 2.0, layered=True)
    for survivors in (6, 8, 10):
        total = np.zeros(size, spec.dtype)
        opened: list[list[bytes]] = []
        for client in range(survivors):
            seeds = [Randomness(client).stream("layer", n).bytes(32) for n in range(len(spec.layers))]
            words, _ = encode_share(
                {"w": np.zeros(size)}, {}, spec, Randomness(client).stream("s"), SEED, seeds
            )
            total += words
            opened.append(
                [s for s, layer in zip(seeds, spec.layers, strict=True) if survivors >= layer.survivors]
            )
        take_back(total, survivors, spec, opened)
        mean, _ = decode_sum(total, {"w": (size,)}, spec, survivors, 1.0, SEED)
        unit = spec.sum.unit_norm
        assert unit is not None
        z = sum_event(spec, survivors).noise_multiplier
        assert z >= 2.0
        # Noise of the survivors without the colluder, in the units of one record's norm.
        honest = (survivors - 1) / survivors
        squares = float(np.sum(mean["w"] ** 2)) / unit**2 * honest
        assert squares >= z**2 * stats.chi2.ppf(1e-6, size) and squares <= (z * 1.2) ** 2 * stats.chi2.isf(
            1e-6, size
        )


@pytest.mark.parametrize("since", list(Exchange))
def test_noise_is_no_less_than_charged_whenever_a_client_is_lost(since: Exchange) -> None:
    size, layout = 3000, {"w": (3000,)}

    def nothing_drawn(message: Message, client: int) -> Message:
        empty = RecordDict({SUM_PART: memory_arrays({"w": np.zeros(size)}), "m": MetricRecord({})})
        return Message(empty, reply_to=message)

    content = RecordDict(
        {"arrays": memory_arrays({"w": np.zeros(size, np.float32)}), "config": ConfigRecord({})}
    )
    asked = Sum("run", 3, content, "train", SumSpec(0.5 * 20, cells=1, unit_norm=0.5), layout, 2.0)
    opened = MASKED["summed"](MASKED["Clients"](MASKED["gone"](since, 2), training=nothing_drawn), asked)
    assert opened.total is not None and opened.spec is not None
    assert opened.survivors == (7 if since <= Exchange.INBOX else 8)
    mean, _ = decode_sum(opened.total, layout, opened.spec, opened.survivors, 1.0, SEED)
    noise = float(np.sum((mean["w"] / opened.spec.sum.step) ** 2))
    charged = sum_event(opened.spec, opened.survivors).noise_multiplier
    honest = opened.survivors - opened.spec.attendance.colluders
    of_all = charged**2 * opened.spec.sensitivity_squared * opened.survivors / honest
    assert charged >= 2.0 and noise >= of_all * stats.chi2.ppf(1e-6, size)
    if since <= Exchange.INBOX:  # later its layers of noise stay closed
        assert noise <= 1.01 * of_all * stats.chi2.isf(1e-6, size)


# --- the step ---------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


class Made(Classes):
    num_clients, held_out_client = 7, 100

    def model(self) -> nn.Module:
        return Net()

    def client_data(self, client: int) -> fv.Examples:
        inputs = torch.randn(5 + 3 * client, 6, generator=torch.Generator().manual_seed(client))
        return fv.Examples(inputs, (inputs.sum(1) > 0).long() + (inputs[:, 0] > 1).long())


def bench_of(task: Made, seed: int | None = 0) -> Workbench:
    return Workbench(ClientSettings("made", LocalTraining(learning_rate=0.4), step=TERMS, seed=seed), task)


def layout_of_net() -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in Net().named_parameters()}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_fifty_steps_are_those_of_opacus_on_the_pooled_data() -> None:
    task, rate = Made(), 0.4
    union = union_of(bench_of(task))
    ours = Net()
    theirs = GradSampleModule(Net())
    optimizer = DPOptimizer(
        torch.optim.SGD(theirs.parameters(), lr=rate),
        noise_multiplier=0.0,
        max_grad_norm=TERMS.terms.max_grad_norm,
        expected_batch_size=20,
    )
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = np.flatnonzero(rng.random(len(union)) < 0.3)
        noise = {name: rng.normal(size=shape) * 0.5 for name, shape in layout_of_net().items()}
        update = step(ours, task, union, rows, CLIP, rate, layout_of_net())
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                parameter += torch.from_numpy((update[name] - rate * noise[name]) / 20).float()
        index = torch.from_numpy(rows)
        optimizer.zero_grad()
        inputs, targets = union.batch(index)
        task.loss(theirs(inputs), targets).backward()
        optimizer.clip_and_accumulate()
        for (name, _), parameter in zip(Net().named_parameters(), optimizer.params, strict=True):
            parameter.grad = (parameter.summed_grad + torch.from_numpy(noise[name]).float()) / 20
        optimizer.original_optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_writes_of_a_layer_do_not_reach_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Keeping(Net):
        """Writes to a buffer, which a step must not leave behind, and reads it."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, inputs: Tensor) -> Tensor:
            outputs = super().forward(inputs) * (1 + self.seen)
            self.seen += 1
            return outputs

    task = Made()
    data, rows = task.client_data(6), np.arange(20)
    whole, parted = Keeping(), Keeping()
    clip = replace(CLIP, gradients="hooks")
    monkeypatch.setattr("fedveil.client.dp_sgd.train.check_step", lambda *_: None)  # which refuses the layer
    at_once = step(whole, task, data, rows, clip, 0.4, layout_of_net())
    few = replace(clip, examples_at_once="8")
    in_parts = step(parted, task, data, rows, few, 0.4, layout_of_net())
    assert float(whole.seen) == float(parted.seen) == 0
    for name, value in at_once.items():
        np.testing.assert_allclose(in_parts[name], value, rtol=1e-4, atol=1e-6)


def test_union_adds_the_gradients_of_its_clients_one_by_one() -> None:
    task = Made()
    bench, union = bench_of(task), union_of(bench_of(task))
    size = sum(math.prod(shape) for shape in layout_of_net().values())
    spec = spec_of(size)
    content = RecordDict({"arrays": ArrayRecord(Net().state_dict()), "config": ConfigRecord({})})
    content = instruct(content, spec, "run", 4)
    at_once = sum_of_union(bench, union, content, range(7), spec, size)
    one_by_one = CohortSum(np.zeros(size))
    for client in range(7):
        examples = task.client_data(client)
        rows = draw_records(len(examples), TERMS, Randomness(0).stream("batches", 4, client))
        update = step(Net(), task, examples, rows, CLIP, 0.4, layout_of_net())
        add(one_by_one, encode(update, {}, spec)[0], spec)
    assert at_once.replies == one_by_one.replies == 7 and at_once.total.any()
    # Each of the seven rounds by half a grid unit; sums of floats differ in their last bits.
    assert np.abs(at_once.total - one_by_one.total).max() <= 8
    mean, _ = decode(at_once.total, layout_of_net(), spec, 1.0)
    assert sum(float(np.abs(value).max()) for value in mean.values()) > 0.1


def test_every_round_and_client_draws_anew_and_at_the_rate() -> None:
    draws: list[set[int]] = []
    for number, client in ((1, 2), (2, 2), (1, 3)):
        one = client_sums(number, client)
        draws.append({int(row) for row in np.flatnonzero(one)})
    for each in draws:
        assert abs(len(each) - 1200) < 6 * math.sqrt(4000 * 0.21)
    for other in draws[1:]:
        assert abs(len(draws[0] & other) - 360) < 6 * math.sqrt(4000 * 0.09 * 0.91)


def reply_of(bench: Workbench, number: int = 4) -> Message:
    task = bench.task
    content = RecordDict({"arrays": ArrayRecord(task.model().state_dict()), "config": ConfigRecord({})})
    spec = spec_of(sum(p.numel() for p in task.model().parameters()), 0.4 * TERMS.terms.max_grad_norm)
    return train_round(Message(instruct(content, spec, "run", number), 1, "train"), 3, bench, bench.settings)


def test_an_answer_has_nothing_that_tells_how_many_were_drawn(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    benches = [
        Workbench(
            replace(
                bench_of(Made()).settings, step=replace(TERMS, terms=replace(TERMS.terms, sample_rate=rate))
            ),
            Made(),
        )
        for rate in (1e-9, 1.0)
    ]
    nobody, all_of_them = (reply_of(bench).content for bench in benches)
    for content in (nobody, all_of_them):
        assert set(content) == {SUM_PART, "metrics"} and not content["metrics"]
    shapes = [{name: a.shape for name, a in each[SUM_PART].items()} for each in (nobody, all_of_them)]
    assert shapes[0] == shapes[1] and not any(a.numpy().any() for a in nobody[SUM_PART].values())
    assert any(a.numpy().any() for a in all_of_them[SUM_PART].values())
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_repeated_round_draws_anew_but_in_a_seeded_simulation() -> None:
    for seed, same in ((None, False), (3, True)):
        bench = bench_of(Made(), seed)
        one, other = (
            {name: a.numpy() for name, a in reply_of(bench).content[SUM_PART].items()} for _ in range(2)
        )
        assert all(np.array_equal(one[name], other[name]) for name in one) == same


def test_dropout_draws_for_each_example() -> None:
    class Dropping(Made):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 2, bias=False))

    examples = fv.Examples(torch.ones(1, 64), torch.zeros(1, dtype=torch.int64))
    torch.manual_seed(0)
    rows = np.zeros(
        40, np.intp
    )  # one example forty times: with one draw for all, half of its inputs would be dropped
    sums = step(Dropping().model(), Dropping(), examples, rows, CLIP, 1.0, {"1.weight": (2, 64)})
    assert np.count_nonzero(sums["1.weight"][0]) == 64


class OneEach(Made):
    """Each record moves a coordinate of its own, so that a sum tells who was drawn."""

    num_clients = 4

    def model(self) -> nn.Module:
        net = nn.Embedding(4000, 1)
        nn.init.zeros_(net.weight)
        return net

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean()

    def client_data(self, client: int) -> fv.Examples:
        return fv.Examples(torch.arange(4000)[:, None], torch.zeros(4000, dtype=torch.int64))


def client_sums(number: int, client: int) -> np.ndarray:
    task = OneEach()
    spec = SumSpec(0.4 * 4000, cells=1 << 24, unit_norm=0.4 * TERMS.terms.max_grad_norm)
    content = RecordDict({"arrays": ArrayRecord(task.model().state_dict())})
    return sum_of_union(
        bench_of(task), union_of(bench_of(task)), instruct(content, spec, "run", number), [client], spec, 4000
    ).total


class Many(Made):
    """Few clients of many records, so that there is room for a thousand canaries."""

    num_clients = 4

    def client_data(self, client: int) -> fv.Examples:
        inputs = torch.randn(1000, 6, generator=torch.Generator().manual_seed(client))
        return fv.Examples(inputs, (inputs.sum(1) > 0).long() + (inputs[:, 0] > 1).long())


def audited(folder: Path, **more: Any) -> dict[str, Any]:
    """Return what a run's result says of its audit; the noise is large beside a canary, and most of them take part."""
    run = fv.simulate(
        Many(),
        privacy=fv.RecordDistributed(target_epsilon=6.0, sample_rate=0.3),
        cohort=fv.All(),
        audit={"name": "full", "looks": 1, "on_alarm": "note"},
        num_rounds=30,
        learning_rate=0.4,
        seed=0,
        quiet=True,
        folder=folder,
        **more,
    )
    assert run.status == "completed"
    return run.result["audit"]


def test_canary_records_show_less_than_claimed_until_noise_is_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = audited(tmp_path / "whole")
    whole = found["records"]
    assert found["verdict"] == "consistent" and "not measured" not in found["said"]
    assert whole["claimed"] == pytest.approx(6.0, abs=0.01)
    assert 0.2 * whole["claimed"] < max(whole["lower_bounds"].values()) <= whole["claimed"]
    assert 0.5 * whole["claimed"] < whole["measured"]["low"] <= whole["claimed"]
    assert min(whole["p_values"].values()) > 0.01
    monkeypatch.setattr(private_sum, "sample", lambda sigma, *rest: sample(sigma // 2, *rest))
    found = audited(tmp_path / "half")
    assert found["verdict"] == "violated" and {a["test"] for a in found["alarms"]} >= {"norm", "records"}
    assert found["records"]["measured"]["low"] > 1.3 * found["records"]["claimed"]
    assert max(found["records"]["p_values"].values()) < 1e-9
    assert audit_run(tmp_path / "half") == 3


def test_canary_records_of_masked_sums_stand_in_every_clients_vector(tmp_path: Path) -> None:
    found = audited(tmp_path / "masked", secagg="masked")["records"]
    assert 0.5 * found["claimed"] < found["measured"]["low"] <= found["claimed"]


def test_canary_records_are_clipped_and_drawn_and_move_no_model(tmp_path: Path) -> None:
    task, size = Many(), sum(math.prod(shape) for shape in layout_of_net().values())
    plain = bench_of(task)
    told = CanaryRecords(250, 4, "07" * 32, replaced=False)
    terms = replace(TERMS, canaries=told)
    watched = Workbench(replace(plain.settings, step=terms), task)
    content = RecordDict({"arrays": ArrayRecord(Net().state_dict()), "config": ConfigRecord({})})
    unit = 0.4 * TERMS.terms.max_grad_norm
    totals: list[np.ndarray] = []
    for bench, canaries in ((plain, 0), (watched, told.count)):
        spec = SumSpec(unit * 2000, cells=1 << 28, unit_norm=unit)
        sent = instruct(with_canary_records(content, canaries), spec, "run", 4)
        union = union_of(bench)
        whole = sum_of_union(bench, union, sent, range(4), spec, size + canaries).total * spec.step / unit
        alone = sum(
            np.concatenate([np.ravel(a.numpy()) for a in reply.content[SUM_PART].values()]) / unit
            for reply in (
                train_round(Message(sent, 1, "train"), client, bench, bench.settings) for client in range(4)
            )
        )
        np.testing.assert_allclose(whole, alone, atol=1e-4)
        totals.append(whole)
    np.testing.assert_allclose(totals[1][:size], totals[0], atol=1e-4)
    block = -totals[1][size:]
    drawn_ones = block > 0.5
    assert np.allclose(block[drawn_ones], 1, atol=1e-4) and np.allclose(block[~drawn_ones], 0, atol=1e-4)
    coins = coins_of_step(told)
    assert not drawn_ones[~coins].any()
    assert abs(drawn_ones.sum() - 0.3 * coins.sum()) < 6 * math.sqrt(coins.sum() * 0.21)
    assert ClientSettings.from_json(watched.settings.to_json()) == watched.settings


def test_second_local_step_on_a_noise_share_would_cost_far_more() -> None:
    """All records' gradients turn round at half of what one record moves a state: two steps, and the sum alone is seen."""
    noise, clients, drawn_records, runs = 3.0, 1000, 60, 20_000
    rng = np.random.default_rng(0)
    share, others = noise / math.sqrt(clients), noise * math.sqrt(1 - 1 / clients)
    opened: list[np.ndarray] = []
    for member in (1.0, 0.0):
        first = member + share * rng.normal(size=runs)  # the state of the record's client, in clipping norms
        second = drawn_records * np.sign(first - 0.5) + share * rng.normal(size=runs)
        opened.append(first + second + math.sqrt(2) * others * rng.normal(size=runs))
    claimed = epsilon({GaussianDpEvent(noise): 2}, 1e-5)
    hits, misses = (int(np.sum(each > 0)) for each in opened)
    least = stats.beta.ppf(1e-4, hits, runs - hits + 1)  # Clopper and Pearson
    most = stats.beta.isf(1e-4, misses + 1, runs - misses)
    assert claimed < 2.5 and math.log((least - 1e-5) / most) > 3 * claimed


# --- what it costs ----------------------------------------------------------------------------------------------


def settings_of(*overrides: str) -> list[str]:
    return ["task=digits", "task.num_clients=10", "privacy=record_distributed", *overrides]


def test_plan_costs_as_much_as_central_dp_sgd() -> None:
    federation = build(settings_from_overrides(settings_of("num_rounds=40", "privacy.sample_rate=0.2")))
    plan = sum_plan(federation)
    assert plan is not None and plan.noise_multiplier is not None
    step_of_all = PoissonSampledDpEvent(0.2, GaussianDpEvent(float(plan.noise_multiplier)))
    accountant = PLDAccountant(value_discretization_interval=PUBLISH_INTERVAL)
    accountant.compose(SelfComposedDpEvent(step_of_all, 40))
    assert plan.epsilon(1e-5) == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-9)
    assert plan.adversaries == tuple(Adversary)


def test_a_run_charges_its_ledger_of_records_and_says_so(tmp_path: Path) -> None:
    run = fv.simulate(
        Made(),
        privacy=fv.RecordDistributed(target_epsilon=3.0, sample_rate=0.3, target_delta=1e-3),
        cohort=fv.All(),
        num_rounds=6,
        seed=0,
        quiet=True,
        folder=tmp_path / "run",
    )
    rows = run.privacy
    assert {(row["unit"], row["adversary"]) for row in rows} == {("record", str(a)) for a in Adversary}
    assert run.status == "completed" and 2.9 < run.epsilon <= 3.0
    reserved = [entry for entry in read_entries(tmp_path / "run" / "ledger") if entry.kind == "reserve"]
    assert len(reserved) == 6
    event = json.loads(reserved[0].payload)["events"]["server"]
    assert event["kind"] == "PoissonSampled" and event["sampling_probability"] == 0.3
    assert all(row["epsilon_client"] is None and 0 < row["epsilon_record"] <= 3 for row in run.history)


@pytest.mark.parametrize("more", [("secagg=masked",), ("engine.workers=2",), ("faults.dropout=0.1",)])
def test_masked_sums_workers_and_lost_clients_end_in_the_same_promise(
    more: tuple[str, ...], tmp_path: Path
) -> None:
    outcome = simulate(
        settings_from_overrides(settings_of("num_rounds=3", "learning_rate=1", "seed=0", *more)),
        tmp_path / "run",
        quiet=True,
    )
    assert outcome.result["status"] == "completed"
    assert all(2.9 < row["epsilon"] <= 3.0 and row["unit"] == "record" for row in outcome.result["privacy"])


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("local_epochs=2", "local_epochs"),
        ("batch_size=32", "batch_size"),
        ("cohort=poisson", "cohort.name"),
        ("privacy.adjacency=add-or-remove-one", "privacy.adjacency"),
        ("secagg=none", "secagg.name"),
        ("audit=full audit.canaries=7", "audit.canaries"),
        ("optimizer=adamw", "optimizer"),
        ("schedule=cosine", "schedule.name"),
        ("schedule.warmup=2", "schedule.name"),
        ("privacy.sample_rate=1.5", "privacy.sample_rate"),
        ("privacy.target_delta=0.5", "privacy.target_delta"),
    ],
)
def test_impossible_parts_of_one_step_are_refused_by_name(override: str, field: str) -> None:
    with pytest.raises(Refusal) as told:
        build(settings_from_overrides(settings_of(*override.split())))
    assert field in str(told.value)


def test_no_canary_record_stands_among_real_ones(tmp_path: Path) -> None:
    class Real(Many):
        simulated, data_id = False, "many"

    with pytest.raises(Refusal, match="canary records are not added"):
        fv.simulate(Real(), privacy="record_distributed", cohort=fv.All(), audit="full", folder=tmp_path)


def test_a_model_that_mixes_records_is_refused(tmp_path: Path) -> None:
    class Mixing(Made):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(outputs - outputs.mean(0), targets)

    with pytest.raises(Refusal, match="loss"):
        fv.simulate(
            Mixing(),
            privacy=fv.RecordDistributed(target_delta=1e-3),
            cohort=fv.All(),
            num_rounds=1,
            quiet=True,
            folder=tmp_path / "run",
        )


def test_a_tasks_own_optimizer_is_refused_and_not_ignored() -> None:
    class Own(Made):
        def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            return torch.optim.Adam(parameters)

    with pytest.raises(Refusal, match="the strategy takes the step"):
        fv.simulate(Own(), privacy=fv.RecordDistributed(target_delta=1e-3), cohort=fv.All(), num_rounds=1)


def test_real_records_do_not_pay_from_two_budgets(tmp_path: Path) -> None:
    class Real(Made):
        simulated, data_id = False, "made"
        held_out_public = True

    def spend(privacy: fv.Record | fv.RecordDistributed, ledgers: Path) -> None:
        where = {"dir": str(ledgers)}
        fv.simulate(Real(), privacy=privacy, cohort=fv.All(), num_rounds=2, quiet=True, ledger=where)

    modes = fv.Record(target_delta=1e-3), fv.RecordDistributed(target_delta=1e-3)
    for first, second in (modes, modes[::-1]):
        ledgers = tmp_path / first.name
        spend(first, ledgers)
        before = {path: path.read_bytes() for path in ledgers.glob("*.ledger")}
        with pytest.raises(Refusal, match=f"charged by privacy={first.name},"):
            spend(second, ledgers)
        assert {path: path.read_bytes() for path in ledgers.glob("*.ledger")} == before


def test_a_run_that_is_refused_leaves_its_records_to_either_mode(tmp_path: Path) -> None:
    class Real(Made):
        simulated, data_id, held_out_public = False, "made", True

    def asked(privacy: fv.Record | fv.RecordDistributed | fv.RecordAndClient) -> None:
        fv.simulate(
            Real(),
            privacy=privacy,
            cohort=fv.All(),
            num_rounds=2,
            quiet=True,
            accept_vacuous=True,
            ledger={"dir": str(tmp_path)},
        )

    dear = {"target_epsilon": 0.1, "noise_multiplier": 0.5}
    whole = fv.ClientCentral(**dear, allow_large_delta=True)
    both = fv.RecordAndClient(record=fv.Record(target_delta=1e-3), client=whole)
    for refused in (fv.RecordDistributed(target_delta=1e-3, **dear), both):
        with pytest.raises(Refusal, match="not even one round fits"):
            asked(refused)
        for known in data_sets.read_data_sets(tmp_path).values():
            for mode in ("record", "record_distributed"):
                data_sets.require_records(known, mode)
    asked(fv.RecordDistributed(target_delta=1e-3))
    with pytest.raises(Refusal, match="charged by privacy=record_distributed"):
        asked(both)


def test_of_two_modes_that_begin_at_once_one_charges_the_records(tmp_path: Path) -> None:
    names = ["record", "record_distributed"]
    known = data_sets.DataSet()  # which both have seen
    for name in names:
        data_sets.require_records(known, name)
    ready = threading.Barrier(2)

    def begin(name: str) -> str | None:
        ready.wait()
        try:
            data_sets.claim_records(tmp_path, "made", name)
        except Refusal as refusal:
            return str(refusal)
        data_sets.settle(
            tmp_path,
            "made",
            PendingCharges({}, False, data_sets.DataSet(("a",))),
            Budget(Unit.RECORD, 1.0, 1e-5),
        )
        return None

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(begin, names))
    assert sorted(map(bool, said)) == [False, True]
    charged = names[said.index(None)]
    assert data_sets.read_data_sets(tmp_path)["made"] == data_sets.DataSet(("a",), (), charged)
    assert f"charged by privacy={charged}" in next(filter(None, said))


@pytest.mark.parametrize(
    ("known", "refused"),
    [
        (
            data_sets.DataSet(fingerprints=("0" * 64,)),
            "record_distributed",
        ),  # written before modes were noted
        (data_sets.DataSet(adopted=("0" * 32,)), "record_distributed"),
        (data_sets.DataSet(adopted=("population-records-" + "0" * 32,)), "record"),
    ],
)
def test_carried_over_charges_of_a_data_set_count_by_their_mode(
    known: data_sets.DataSet, refused: str
) -> None:
    other = ({"record", "record_distributed"} - {refused}).pop()
    data_sets.require_records(known, other)
    with pytest.raises(Refusal, match=f"charged by privacy={other}"):
        data_sets.require_records(known, refused)
