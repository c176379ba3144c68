"""Tests of ``average``."""

import numpy as np
import pytest
from shared.callbacks import Log

import fedveil as fv
from fedveil.run.average import early_of

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")


TWO = {"num_rounds": 2, "quiet": True}


def test_average_is_of_the_last_models_and_longer_under_more_noise() -> None:
    lengths: list[int] = []
    for noise in (3.0, 9.0):
        log = Log()
        privacy = fv.ClientCentral(noise_multiplier=noise, target_epsilon=None)
        run = fv.simulate(
            "digits", privacy=privacy, num_rounds=20, callbacks=[log], quiet=True, model="average"
        )
        _, *rounds, end = log.values
        lengths.append(end.result["models_averaged"])
        for name, value in run.model.state_dict().items():
            last = np.stack([done.model[name] for done in rounds[-lengths[-1] :]])
            assert np.allclose(value.numpy(), last.mean(0, dtype=np.float64), atol=1e-6)
            assert not np.allclose(value.numpy(), last[-1], atol=1e-3)
        assert run.metrics["accuracy"] != rounds[-1].metrics["accuracy"]
    assert 1 < lengths[0] < lengths[1] == 10


def test_without_noise_there_is_no_average_to_take() -> None:
    log = Log()
    run = fv.simulate("digits", privacy="none", callbacks=[log], model="average", **TWO)
    assert log.values[-1].result["models_averaged"] == 1
    assert log.values[-2].metrics.items() <= run.metrics.items()


@pytest.mark.parametrize(
    ("last", "mean", "early"), [(1.0, 1.2, True), (1.0, 1.05, False), (1.0, 0.7, False), (None, 1.0, False)]
)
def test_mean_of_unconverged_models_is_reported_as_worse(
    last: float | None, mean: float, early: bool
) -> None:
    said = early_of({"loss": last}, {"loss": mean}, 7)
    assert (said is not None) is early
    assert early_of({"loss": last}, {}, 1) is None
    assert not early or "the last 7 models" in str(said)
