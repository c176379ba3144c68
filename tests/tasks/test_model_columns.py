"""Columns of a released model: what it says of a client's rows, and captum's attributions, asked and charged."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from torch import nn

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.client.workbench import Workbench
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.local_training import LocalTraining
from fedveil.privacy.statistics.inquiry import read_inquiry
from fedveil.questions.client import table_of
from fedveil.questions.wire import question_content, question_of
from fedveil.tasks import load_task
from fedveil.tasks.arrays import read_arrays
from fedveil.tasks.data import FEW
from fedveil.tasks.model_columns import columns_with, model_columns, read_released
from fedveil.tasks.tables import Tables

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

HIDE_LITTLE: dict[str, Any] = {
    "noise_multiplier": 0.02,
    "privacy": fv.RecordDistributed(target_epsilon=1e5, target_delta=1e-3),
}


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("shops"), np.random.default_rng(2)
    for number in range(4):
        lines = ["size,kind,sex,paid"]
        for size, kind, sex in zip(
            draw.uniform(0, 1, 50), draw.choice(["a", "b"], 50), draw.choice(["f", "m"], 50), strict=True
        ):
            likely = size + 0.3 * (kind == "b") + 0.2 * draw.normal()
            lines.append(f"{size:.3f},{kind},{sex},{'yes' if likely > 0.6 else 'no'}")
        (folder / f"{number}.csv").write_text("\n".join(lines) + "\n")
    (folder / "schema.yaml").write_text(
        "label: paid\ncolumns:\n  size: {low: 0, high: 1}\n  kind: {categories: [a, b]}\n"
        "  paid: {categories: ['no', 'yes']}\ngroups:\n  sex: {categories: [f, m]}\n"
    )
    return folder


def options(shops: Path) -> dict[str, Any]:
    return {"folder": str(shops), "simulated": True, "groups": ["sex"], "model": "gam"}


@pytest.fixture(scope="module")
def run(shops: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    told = fv.simulate(
        {"name": "csv", **options(shops)},
        privacy="none",
        cohort="all",
        num_rounds=4,
        folder=folder,
        quiet=True,
    )
    assert told.status == "completed"
    return folder


def asked(run: Path, *ask: dict[str, Any], name: str = "q") -> dict[str, Any]:
    return {"name": name, "unit": "record", "model": str(run), "records": 60, "ask": list(ask)}


def pooled(shops: Path, run: Path) -> dict[str, np.ndarray]:
    from fedveil.run.released import model_of

    task: Any = load_task("csv", options(shops))
    model = model_of(run, task)
    tables = [columns_with(task, client, model, attributed=True) for client in range(4)]
    return {name: np.concatenate([each[name] for each in tables]) for name in tables[0]}


def test_the_models_columns_are_of_every_row_of_a_table(shops: Path, run: Path) -> None:
    found = pooled(shops, run)
    assert {len(each) for each in found.values()} == {200}
    assert set(found) >= {"predicted", "score", "attribution size", "attribution kind", "sex", "paid"}
    assert set(found["predicted"]) <= {"no", "yes"}
    np.testing.assert_array_equal(found["predicted"] == "yes", found["score"] > 0.5)


class Mixed(Tables):
    """Tables whose model says of a row how it differs from the others."""

    def model(self) -> nn.Module:
        return nn.Sequential(super().model(), nn.BatchNorm1d(2, track_running_stats=False))


def test_mixing_model_answers_nothing_where_rows_are_hidden(shops: Path) -> None:
    task: Any = load_task("csv", options(shops))
    task = Mixed(**{each.name: getattr(task, each.name) for each in fields(task)})
    file = save(read_arrays(task.model()))
    asked = {
        "name": "q",
        "records": 60,
        "ask": [{"kind": "count"}],
        "model": hashlib.sha256(file).hexdigest(),
    }
    bench = Workbench(ClientSettings("csv", LocalTraining()), task)
    for unit, refused in (("client", nullcontext()), ("record", pytest.raises(Refusal, match="BatchNorm"))):
        inquiry = read_inquiry({**asked, "unit": unit})
        with refused:
            table_of(bench, 0, question_content(inquiry, {}, released=file), inquiry)


def test_few_rows_are_padded_so_that_none_changes_anothers_rounding(shops: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text((shops / "schema.yaml").read_text())
    (tmp_path / "0.csv").write_text("\n".join((shops / "0.csv").read_text().splitlines()[:4]) + "\n")
    task: Any = load_task("csv", {**options(tmp_path), "held_out_file": str(shops / "1.csv")})
    model, seen = task.model().eval(), list[int]()
    model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    found = columns_with(task, 0, model, attributed=True)
    assert {len(each) for each in found.values()} == {3}
    # Besides the rows: zeros that measure the model's memory, and the baseline of attributions.
    assert sorted(set(seen)) == [1, 2, FEW * torch.get_num_threads()]


def test_a_row_on_which_the_model_fails_takes_no_other_along() -> None:
    """It counts as a row of zeros: an answer is missing for no row, whatever one of them holds."""
    words, model = (
        torch.tensor([[1], [99], [2]]),
        torch.nn.Sequential(torch.nn.Embedding(5, 2), torch.nn.Flatten()),
    )
    task: Any = SimpleNamespace(client_data=lambda _: (words, torch.tensor([0, 1, 0])))
    found = columns_with(task, 0, model.eval(), attributed=False)
    truth = model_columns(model, torch.tensor([[1], [0], [2]]), None)
    np.testing.assert_array_equal(found["score"], truth["score"])
    assert words[1, 0] == 99


def test_attributions_are_captums(shops: Path, run: Path) -> None:
    attr = pytest.importorskip("captum.attr")
    from fedveil.run.released import model_of

    task: Any = load_task("csv", options(shops))
    model, inputs = model_of(run, task).double(), task.encode(shops / "0.csv").double()
    which = model(inputs).argmax(1)
    parts = attr.IntegratedGradients(model).attribute(inputs, torch.zeros_like(inputs), target=which)
    own = columns_with(task, 0, model_of(run, task), attributed=True)
    np.testing.assert_allclose(own["attribution size"], parts[:, 0].abs().detach().numpy(), atol=1e-9)
    np.testing.assert_allclose(own["attribution kind"], parts[:, 1:].sum(1).abs().detach().numpy(), atol=1e-9)


def test_attributions_are_means_of_clipped_rows_and_one_entry(shops: Path, run: Path, tmp_path: Path) -> None:
    kind = {"kind": "attributions", "of": {"size": 0.05, "kind": 5.0}}
    record = fv.ask(asked(run, kind), {"name": "csv", **options(shops)}, folder=tmp_path, **HIDE_LITTLE)
    told = {each["name"]: each for each in record["answers"][0]["figures"]}
    truth = pooled(shops, run)
    assert told["attribution size"]["value"] == pytest.approx(
        np.clip(truth["attribution size"], 0, 0.05).mean(), abs=1e-3
    )
    assert told["attribution kind"]["value"] == pytest.approx(truth["attribution kind"].mean(), abs=5e-3)
    clipped = (truth["attribution size"] > 0.05).mean()
    assert record["answers"][0]["clipped"]["value"] == pytest.approx(clipped, abs=0.01)
    assert len(record["question"]["model"]) == 64


def test_fairness_is_of_the_models_predictions(shops: Path, run: Path, tmp_path: Path) -> None:
    kind = {
        "kind": "fairness", "criterion": "equal_opportunity", "of": "sex", "categories": ["f", "m"], "label": "paid",
        "label_categories": ["no", "yes"], "said": "predicted", "said_categories": ["no", "yes"],
    }  # fmt: skip
    record = fv.ask(asked(run, kind), {"name": "csv", **options(shops)}, folder=tmp_path, **HIDE_LITTLE)
    rows = pooled(shops, run)
    for figure, word in zip(record["answers"][0]["figures"], "fm", strict=False):
        here = (rows["sex"] == word) & (rows["paid"] == "yes")
        assert figure["value"] == pytest.approx((rows["predicted"][here] == "yes").mean(), abs=0.01)


def test_another_model_is_another_question(shops: Path, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    task = {"name": "csv", **options(shops)}
    fv.simulate(task, privacy="none", cohort="all", num_rounds=1, folder=other, quiet=True)
    count = {"kind": "histogram", "of": "predicted", "categories": ["no", "yes"]}
    fv.ask(asked(run, count), task, folder=tmp_path / "q", **HIDE_LITTLE)
    with pytest.raises(Refusal, match="use a new name"):
        fv.ask(asked(other, count), task, folder=tmp_path / "q", **HIDE_LITTLE)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "nowhere"}, "model"),
        ({"model": None, "ask": [{"kind": "attributions", "of": {"size": 1.0}}]}, "model"),
        ({"ask": [{"kind": "attributions", "of": {"size": -1.0}}]}, "of.size"),
        ({"ask": [{"kind": "attributions", "of": "size"}]}, "of"),
    ],
)
def test_a_mistake_is_refused_by_name(
    shops: Path, run: Path, tmp_path: Path, change: Any, field: str
) -> None:
    with pytest.raises(Refusal) as refused:
        fv.ask(
            {**asked(run), **change}, {"name": "csv", **options(shops)}, folder=tmp_path / "q", epsilon=1.0
        )
    assert refused.value.field == field and not (tmp_path / "q").exists()


def test_a_model_of_one_output_says_a_number() -> None:
    found = model_columns(torch.nn.Linear(2, 1), torch.zeros(3, 2), None)
    assert set(found) == {"predicted"} and found["predicted"].shape == (3,)


def test_only_a_hash_names_a_model_that_travels() -> None:
    with pytest.raises(Refusal, match="SHA-256"):
        read_inquiry({"name": "q", "model": "runs/first", "records": 5, "ask": [{"kind": "count"}]})


def test_foreign_model_and_invalid_bytes_are_refused_unread(shops: Path, run: Path) -> None:
    model = load_task("csv", options(shops)).model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    file = (run / "model.safetensors").read_bytes()
    for other in (b"", b"no model", file[:-4], save({"weight": np.zeros((2, 4), np.float32)})):
        with pytest.raises(Refusal) as refused:
            read_released(model, other)
        assert refused.value.field == "model"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    read_released(model, file)
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_question_travels_with_the_model_that_it_names_and_no_other(run: Path) -> None:
    file = (run / "model.safetensors").read_bytes()
    plain = {"name": "q", "model": hashlib.sha256(file).hexdigest(), "records": 5, "ask": [{"kind": "count"}]}
    about, of_rows = read_inquiry(plain), read_inquiry({**plain, "model": None})
    found = question_of(question_content(about, {}, released=file))
    assert found == about
    for asked, brought in ((about, None), (about, file + b" "), (of_rows, file)):
        with pytest.raises(Refusal, match="model"):
            question_of(question_content(asked, {}, released=brought))
