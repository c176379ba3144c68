"""Whole models of a device whose layers stayed: it predicts with them, and nobody gets them unasked."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedveil.base.refusal import Refusal
from fedveil.deployment.device.client_bundle import read_client_bundle
from fedveil.deployment.device.run_end import record_end
from fedveil.deployment.device.saved_model import load_latest, load_saved, own_model_of
from fedveil.deployment.serve import serve

SERVED = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "served.py"))
KEYS = (
    "task=digits",
    "batch_size=40",
    "accept_vacuous=true",
    "privacy.allow_large_delta=true",
    "num_rounds=2",
)

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")


def ended(folder: Path, *keys: str) -> Path:
    """Run on devices that are called in turn, let one note the end, and return its bundle."""
    hearts = SERVED["make_federation"](folder)
    grid = SERVED["Devices"](hearts / "clients")
    asked = [*KEYS, "privacy=client_central", "privacy.target_epsilon=5", "run=one", *keys]
    serve(hearts / "server", asked, reach=SERVED["reaching"](grid))
    bundle = hearts / "clients" / "boston"
    record_end(read_client_bundle(bundle).state, grid.told[-1])
    return bundle


def test_a_device_predicts_with_its_whole_model(tmp_path: Path) -> None:
    bundle = ended(tmp_path, "personal=layers", "personal.layers=[*bias]")
    state = read_client_bundle(bundle).state
    saved, own = load_latest(bundle), own_model_of(bundle)
    assert own is not None and saved.own is not None
    (bias,) = load_file(max(state.rglob("0*.safetensors"))).values()
    (weight,) = load_file(state / "model.safetensors").values()
    values = {name.rpartition(".")[2]: each.detach().numpy() for name, each in saved.model.named_parameters()}
    np.testing.assert_array_equal(values["bias"], bias)
    np.testing.assert_array_equal(values["weight"], weight)
    assert set(own.arrays) == {name for name, _ in saved.model.named_parameters()}


def test_the_shared_part_alone_is_refused(tmp_path: Path) -> None:
    bundle = ended(tmp_path, "personal=layers", "personal.layers=[*bias]")
    for load in (load_saved, lambda folder: load_latest(folder, shared=True)):
        with pytest.raises(Refusal, match="bias, which stay at this client"):
            load(bundle)


def test_a_model_without_such_layers_is_as_before(tmp_path: Path) -> None:
    bundle = ended(tmp_path)
    assert own_model_of(bundle) is None
    assert load_latest(bundle).lacks == load_saved(bundle).lacks == ()
