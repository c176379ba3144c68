"""Campaign of evaluations on the main job: what they cost, how wide they are, how often their intervals hold."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedveil.client.workbench import Workbench
from fedveil.configs.settings import settings_from_overrides
from fedveil.messages.wire import memory_arrays
from fedveil.privacy.mechanisms.private_sum import add_noise, decode_counts, encode
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.privacy.statistics.evaluation import METRIC
from fedveil.questions.client import measured_at
from fedveil.questions.evaluation_plan import evaluation_of, one_evaluation
from fedveil.questions.sums import CELLS
from fedveil.questions.wire import evaluation_content
from fedveil.run.build import build
from fedveil.run.client_instructions import client_settings
from fedveil.run.sum_plan import sum_plan
from fedveil.simulations.simulate import run_simulation

REPETITIONS = 1000
ADDED = {5: 0.101, 10: 0.025, 20: 0.006}  # to epsilon 3.0 at delta 1e-4


def main_job(*overrides: str):
    return build(settings_from_overrides(["evaluate.clients=final", *overrides]))


def test_the_evaluation_of_the_main_job_is_planned() -> None:
    assert one_evaluation(main_job()) is not None


@pytest.mark.campaign
def test_evaluations_of_the_main_job_cost_the_pages_figure() -> None:
    rounds = sum_plan(build(settings_from_overrides([])))
    assert rounds is not None
    before = rounds.epsilon(1e-4)
    for noise, added in ADDED.items():
        one = one_evaluation(main_job(f"evaluate.noise_multiplier={noise}"))
        assert one is not None
        found = rounds.epsilon(1e-4, prior=[one.event()]) - before
        print(f"z {noise}: +{found:.4f} to {before:.4f}")
        assert found == pytest.approx(added, abs=0.0015)


@pytest.mark.campaign
def test_the_centre_is_the_truth_of_all_clients_within_the_interval(tmp_path: Path) -> None:
    parts = main_job("num_rounds=8", "audit=off")
    result = run_simulation(parts, tmp_path, quiet=True).result
    assert result["status"] == "completed"
    model = load_file(tmp_path / "model.safetensors")
    whole, bench = evaluation_of(parts, "e"), Workbench(client_settings(parts, tmp_path), parts.task)
    content = evaluation_content(whole, memory_arrays(model), {})
    said = [measured_at(bench, client, content, whole) for client in range(parts.num_clients)]
    there = [each for each in said if each is not None]
    assert len(there) == parts.num_clients == 400
    truth = {
        "accuracy": float(np.mean([each.metric for each in there])),
        "loss": float(np.mean([min(each.loss, 5.0) for each in there])),
        "clients": float(len(there)),
    }
    for figures in ((METRIC,), whole.figures):
        asked = replace(whole, figures=figures)
        spec = SumSpec(1.0, asked.segments, cells=CELLS)
        total = np.sum(
            [encode({}, asked.contribution(each), spec)[0] for each in said], axis=0, dtype=np.float64
        )
        held, errors = dict.fromkeys(truth, 0), []
        for number in range(REPETITIONS):
            noised, _ = add_noise(total.copy(), 5.0, spec, Randomness(number).stream("noise", 1))
            told = {
                each.name: each
                for _, parts_of_it in asked.answers(decode_counts(noised, 0, spec), 5.0, 400)
                for each in parts_of_it
            }
            errors.append(told["accuracy"].value - truth["accuracy"])
            for name in truth.keys() & told.keys():
                held[name] += told[name].low <= truth[name] <= told[name].high
        half, error = asked.half_width(5.0, 400), 100 * math.sqrt(np.mean(np.square(errors)))
        print(
            f"{figures}: planned +-{100 * (half or 0):.2f} points, error {error:.2f}, held {held} of {REPETITIONS}"
        )
        for name in truth.keys() & {each.name for each in asked.segments}:
            assert 0.93 <= held[name] / REPETITIONS <= 0.97, (name, held[name])
        if figures == (METRIC,):
            assert half is not None and round(100 * half, 1) == 1.2 and error < 1.2 / 1.96 * 1.15
