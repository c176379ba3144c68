"""Attributions of predictions: w(x - b) of a linear model, captum's of any other, and nothing of anybody else's rows."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import fedveil as fv
from fedveil.__main__ import run as fedveil
from fedveil.base.refusal import Refusal
from fedveil.tasks.attribution import NEEDED_DATA, check_method, explained, integrated_gradients
from fedveil.tasks.exported import schema_predictions
from fedveil.tasks.shapes import shapes
from fedveil.tasks.table_schema import Column, Schema

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")


def network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 9), nn.GELU(), nn.Linear(9, 3)).eval()


def test_of_a_linear_model_an_attribution_is_its_weight_times_the_way() -> None:
    torch.manual_seed(1)
    model, x, b = nn.Linear(5, 3), torch.randn(7, 5), torch.randn(5)
    which = torch.arange(7) % 3
    found = integrated_gradients(model, x, b, which)
    wanted = model.weight.detach().double()[which] * (x.double() - b.double())
    assert (found - wanted).abs().max() < 1e-6
    assert model.weight.dtype == torch.float32 and model.weight.grad is None


def test_attributions_are_captums() -> None:
    attr = pytest.importorskip("captum.attr")
    model, x, b = network(), torch.randn(8, 6), torch.randn(1, 6)
    which = model(x).argmax(1)
    exact = network().double()
    wanted = attr.IntegratedGradients(exact).attribute(x.double(), b.double(), target=which, n_steps=50)
    found = integrated_gradients(model, x, b[0], which)
    assert (found - wanted).abs().max() < 1e-9


def test_attributions_sum_to_the_score_less_the_baselines() -> None:
    model, x = network(), torch.randn(20, 6)
    found = explained(model, x, None, classifies=True)
    parts = np.sum([found[f"input_{place}"] for place in range(6)], 0)
    assert np.abs(found["at_baseline"] + parts - found["score"]).max() < 1e-6
    logits = model(x).detach()
    assert np.abs(found["score"] - logits.max(1).values.numpy()).max() < 1e-5
    number = explained(nn.Sequential(nn.Linear(6, 1)), x, None, classifies=False)
    assert list(number)[:3] == ["score", "at_baseline", "input_0"]


def test_words_have_no_gradient() -> None:
    with pytest.raises(Refusal, match="are integers"):
        integrated_gradients(nn.Embedding(5, 2), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3), None)
    with pytest.raises(Refusal, match="are integers"):
        explained(nn.Embedding(5, 2), torch.zeros(2, 3, dtype=torch.int64), None, classifies=False)


def test_no_rows_have_no_attributions() -> None:
    found = explained(network(), torch.zeros(0, 6), None, classifies=True)
    assert len(found) == 8 and all(each.shape == (0,) for each in found.values())


def test_a_number_is_explained_in_its_own_unit() -> None:
    torch.manual_seed(2)  # outputs lie within the bounds
    columns = (Column("x", -1, 1), Column("kind", categories=(("p",), ("q",))), Column("y", 20, 100))
    schema, model = Schema(columns, "y"), nn.Linear(3, 1)
    x = torch.tensor([[0.5, 1, 0], [0, 0, 0]])
    found = explained(model, x, schema, classifies=False)
    with torch.no_grad():
        said = schema_predictions(schema, model(x).numpy())["y"]
    assert found["score"] == pytest.approx(said) and found["at_baseline"] == pytest.approx(said[1])
    assert found["at_baseline"] + found["x"] + found["kind"] == pytest.approx(said)
    binned = schema.binned(2)
    wide = nn.Linear(4, 1)
    with torch.no_grad():
        said = schema_predictions(binned, wide(torch.tensor([[0.0, 1, 0, 1]])).numpy())["y"]
    told = shapes(binned, *(each.detach().numpy() for each in (wide.weight, wide.bias)))
    parts = {each["column"]: each["values"][0] for each in told["shapes"]}
    assert told["intercept"][0] + parts["x"][1] + parts["kind"][1] == pytest.approx(said[0])


@pytest.mark.parametrize("name", [*NEEDED_DATA, "Kernel-SHAP"])
def test_explainer_with_others_rows_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(
        Refusal,
        match=r"needs .*training data.*that is a release without a ledger entry; use integrated_gradients",
    ):
        check_method(name)


def test_a_method_that_there_is_not_is_refused_with_the_nearest() -> None:
    check_method("integrated-gradients")
    with pytest.raises(Refusal, match="did you mean 'integrated_gradients'"):
        check_method("integrated_gradient")


def test_the_owner_reads_why_a_row_is_predicted_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tables").mkdir()
    draw = np.random.default_rng(0)
    for name in "ab":
        lines = [
            f"{x:.2f},{k},{'yes' if x > 0 else 'no'}"
            for x, k in zip(draw.normal(size=90), draw.choice(["p", "q"], 90), strict=True)
        ]
        (tmp_path / "tables" / f"{name}.csv").write_text("\n".join(["x,kind,y", *lines, ""]))
    columns = {
        "x": {"low": -3, "high": 3},
        "kind": {"categories": ["p", "q"]},
        "y": {"categories": ["no", "yes"]},
    }
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump({"label": "y", "columns": columns}, sort_keys=False))
    task = {
        "name": "csv",
        "folder": str(tmp_path / "tables"),
        "schema": str(tmp_path / "schema.yaml"),
        "simulated": True,
        "model": "linear",
    }
    run = fv.simulate(task, privacy="none", num_rounds=5, folder=tmp_path / "run", quiet=True)
    (tmp_path / "new.csv").write_text("x,kind\n2.4,p\n-1.5,q\n")
    asked = [str(tmp_path / "run"), str(tmp_path / "new.csv")]
    assert fedveil(["predict", *asked, "--explain", "integrated_gradients"]) == 0
    header, first, second = (line.split(",") for line in capsys.readouterr().out.splitlines())
    assert header == ["y", "probability", "score", "at_baseline", "x", "kind"]
    weight = run.model.get_parameter("weight").detach().numpy()
    for row, x, said in ((first, 2.4, 1), (second, -1.5, 0)):
        assert float(row[4]) == pytest.approx(weight[said, 0] * x / 3, rel=1e-4)
        assert sum(map(float, row[3:])) == pytest.approx(float(row[2]), abs=1e-4)
    told = ["predict", *asked, "--explain", "integrated_gradients", "--out", str(tmp_path / "out.csv")]
    assert fedveil(told) == 0
    lines = capsys.readouterr().out.splitlines()
    means = {name: float(value) for value, name in (each.split() for each in lines[-2:])}
    assert means["x"] == pytest.approx((abs(float(first[4])) + abs(float(second[4]))) / 2, abs=1e-4)
    assert "nothing was charged" in lines[-3]
    (tmp_path / "unknown.csv").write_text("x,kind\n,\n")
    assert (
        fedveil(["predict", asked[0], str(tmp_path / "unknown.csv"), "--explain", "integrated_gradients"])
        == 0
    )
    unknown = [float(each) for each in capsys.readouterr().out.splitlines()[1].split(",")[2:]]
    assert unknown == [unknown[0], unknown[0], 0, 0]
    assert fedveil(["client", "explain", *asked, "--row", "2"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("row 2: y no, probability") and "nothing was charged" in told
    assert fedveil(["client", "explain", *asked, "--row", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["y"] == "no"
    assert fedveil(["client", "explain", *asked, "--row", "3"]) == 2
    assert "has rows 1 to 2" in capsys.readouterr().err
    assert fedveil(["predict", *asked, "--explain", "lime"]) == 2
    assert "use integrated_gradients" in capsys.readouterr().err
    assert fedveil(["export", asked[0], "--to", "int8"]) == 0
    assert fedveil(["predict", asked[0] + "/export/int8", asked[1], "--explain", "integrated_gradients"]) == 2
    assert "has no gradients" in capsys.readouterr().err
