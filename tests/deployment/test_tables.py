"""`task: csv` of real clients: one schema in every bundle, each device's own tables, and an order that names both."""

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import yaml
from safetensors.numpy import load_file

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.deployment.device.client_bundle import read_client_bundle
from fedveil.deployment.device.device import read_device
from fedveil.deployment.device.run_end import record_end
from fedveil.deployment.federation_yaml import read_federation
from fedveil.deployment.provision import provision, rotate
from fedveil.deployment.serve import settings_for
from fedveil.links.server_bundle import read_server_bundle
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.notices import RunOver
from fedveil.messages.training_order import ModeName, RecordTerms, TrainingOrder
from fedveil.privacy.budget import Adjacency
from fedveil.run.released import predictions
from fedveil.tasks.arrays import agreement_of
from fedveil.tasks.table_schema import read_schema
from fedveil.tasks.tables import load

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

SCHEMA = "label: y\ncolumns:\n  x: {low: 0, high: 4}\n  y: {categories: [no, yes]}\n"
ROWS = "x,y\n" + "".join(f"{row % 5},{'no' if row % 5 < 2 else 'yes'}\n" for row in range(40))
FEDERATION: dict[str, Any] = {
    "federation": "shops",
    "server": {"address": "localhost:8799", "listen": "127.0.0.1:8799"},
    "task": {"name": "csv", "data": "table.csv", "options": {"schema": "common/s.yaml"}},
    "policy": {"target_epsilon": 8.0, "target_delta": 1e-4},
    "clients": [{"name": "a"}, {"name": "b", "task": {"data": "tables"}}, {"name": "c"}],
}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("os.fsync", lambda _: None)
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "s.yaml").write_text("# the same for all\n" + SCHEMA)
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(FEDERATION))
    provision(tmp_path / "f.yaml", tmp_path / "shops", None)
    return tmp_path / "shops"


def test_every_bundle_has_the_one_schema_and_a_device_its_own_tables(desk: Path) -> None:
    wanted = read_schema(desk.parent / "common" / "s.yaml")
    for place in ("server", "clients/a", "clients/b", "clients/c", "authority"):
        assert read_schema(desk / place / "schema.yaml") == wanted
    (desk / "clients" / "a" / "table.csv").write_text(ROWS)
    tables = desk / "clients" / "b" / "tables"
    tables.mkdir()
    (tables / "1.csv").write_text(ROWS)
    (tables / "2.csv").write_text(ROWS)
    tasks = [read_device(read_client_bundle(desk / "clients" / name)).task for name in "ab"]
    assert [task.count(None) for task in tasks] == [40, 80]
    assert not (desk / "clients" / "a" / "requirements.txt").exists()


def test_weights_by_group_go_to_every_device_in_the_schema(desk: Path) -> None:
    """The server's orders name the schema with its weights, and a device with others declines them."""
    (desk.parent / "common" / "s.yaml").write_text(SCHEMA + "groups:\n  who: {categories: [a, b]}\n")
    (desk.parent / "w.yaml").write_text("who: {a: {no: 1, yes: 2}, b: {no: 4, yes: 1}}\n")
    options = {"schema": "common/s.yaml", "group_weights": "w.yaml"}
    file = desk.parent / "weighed.yaml"
    file.write_text(yaml.safe_dump({**FEDERATION, "task": {**FEDERATION["task"], "options": options}}))
    folder = desk.parent / "weighed"
    provision(file, folder, None)
    device = folder / "clients" / "a"
    (device / "table.csv").write_text("x,y,who\n" + "1,no,a\n2,yes,b\n3,yes,b\n" * 5)
    task = load(schema=str(device / "schema.yaml"), data=str(device / "table.csv"))
    assert task.weights[-4:] == (0.25, 0.5, 1.0, 0.25)
    assert task.client_data(0).targets.tolist() == [4, 7, 7] * 5
    assert "group_weights" not in read_client_bundle(device).settings.task.options
    served = load(schema=str(folder / "server" / "schema.yaml"))
    assert (
        agreement_of(served)
        == agreement_of(task)
        != agreement_of(load(schema=str(desk / "server" / "schema.yaml")))
    )
    shutil.rmtree(desk.parent / "common")
    rotate(folder, ["a"], None)  # by the desk's copy of the schema, which holds them


def test_numbers_are_scaled_alike_at_every_device(desk: Path) -> None:
    figures = [
        {"name": name, "value": 2.0, "low": 2.0, "high": 2.0} for name in ("mean", "standard deviation")
    ]
    asked = {"kind": "variance", "of": "x", "low": 0, "high": 4}
    answer = {"question": {"ask": [asked]}, "answers": [{"figures": figures}]}
    (desk.parent / "a.json").write_text(json.dumps(answer))
    options = {"schema": "common/s.yaml", "scaling": "a.json"}
    file = desk.parent / "scaled.yaml"
    file.write_text(yaml.safe_dump({**FEDERATION, "task": {**FEDERATION["task"], "options": options}}))
    provision(file, desk.parent / "scaled", None)
    for place in ("server", "clients/a", "clients/c"):
        (number, _) = read_schema(desk.parent / "scaled" / place / "schema.yaml").columns
        assert number.standard == (2.0, 2.0)
    assert "scaling" not in read_client_bundle(desk.parent / "scaled" / "clients" / "a").settings.task.options


def test_each_client_may_name_its_own_tables_and_the_federation_none(desk: Path) -> None:
    task = {key: value for key, value in FEDERATION["task"].items() if key != "data"}
    clients = [{"name": name, "task": {"data": f"/srv/{name}"}} for name in "abc"]
    file = desk.parent / "own.yaml"
    file.write_text(yaml.safe_dump({**FEDERATION, "task": task, "clients": clients}))
    assert [entry.task["data"] for entry in read_federation(file).clients] == ["/srv/a", "/srv/b", "/srv/c"]
    file.write_text(yaml.safe_dump({**FEDERATION, "task": task, "clients": [*clients[:2], {"name": "c"}]}))
    with pytest.raises(Refusal, match=r"task.data=None: is required by a kind"):
        read_federation(file)


def test_new_keys_need_no_schema_but_the_desks_own(desk: Path) -> None:
    shutil.rmtree(desk.parent / "common")
    rotate(desk, ["a"], None)
    assert read_schema(desk / "clients" / "a" / "schema.yaml").label == "y"


def test_device_without_its_table_says_so_before_it_connects(desk: Path) -> None:
    bundle = read_client_bundle(desk / "clients" / "a")
    with pytest.raises(Refusal, match="does not exist"):
        read_device(bundle)
    (desk / "clients" / "a" / "table.csv").write_text(ROWS.replace("3,yes", "3,maybe", 1))
    with pytest.raises(Refusal, match="column 'y', row 5='maybe': is not one of its categories"):
        read_device(bundle)


def test_an_order_of_another_schema_or_model_is_not_followed(desk: Path) -> None:
    (desk / "clients" / "a" / "table.csv").write_text(ROWS)
    device = read_device(read_client_bundle(desk / "clients" / "a"))
    record = RecordTerms(3.0, 1e-5, 1.0, Adjacency.ZERO_OUT, 10)
    order = TrainingOrder("r", ModeName.RECORD, LocalTraining(), record=record)
    schema = str(desk / "server" / "schema.yaml")
    own = agreement_of(load(schema=schema))
    device.task.check_order(replace(order, agreement=own), None)
    assert TrainingOrder.from_json(replace(order, agreement=own).to_json()).agreement == own
    others = [None, agreement_of(load(schema=schema, model="mlp"))]
    (desk / "other.yaml").write_text(SCHEMA.replace("high: 4", "high: 5"))
    others.append(agreement_of(load(schema=str(desk / "other.yaml"))))
    for other in others:
        assert other != own
        with pytest.raises(Refusal, match="another schema, model or base"):
            device.task.check_order(replace(order, agreement=other), None)
    with pytest.raises(Refusal, match="64 hexadecimal digits"):
        replace(order, agreement="0")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "common/none.yaml"}, "none.yaml|schema.yaml.*cannot be read"),
        ({"label": "z"}, "task.label='z': name a column of"),
    ],
)
def test_unavailable_schema_is_refused_before_any_bundle(
    tmp_path: Path, change: dict[str, str], said: str
) -> None:
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "s.yaml").write_text(SCHEMA)
    task = {**FEDERATION["task"], "options": {**FEDERATION["task"]["options"], **change}}
    (tmp_path / "f.yaml").write_text(yaml.safe_dump({**FEDERATION, "task": task}))
    with pytest.raises(Refusal, match=said):
        provision(tmp_path / "f.yaml", tmp_path / "shops", None)
    assert not (tmp_path / "shops").exists()


def test_two_schemas_in_one_federation_are_refused(tmp_path: Path) -> None:
    for name in ("s", "t"):
        (tmp_path / f"{name}.yaml").write_text(SCHEMA)
    clients = [
        {"name": name, "task": {"name": "csv", "data": "t.csv", "options": {"schema": f"{name}.yaml"}}}
        for name in "st"
    ]
    (tmp_path / "f.yaml").write_text(yaml.safe_dump({**FEDERATION, "clients": clients}))
    with pytest.raises(
        Refusal, match=r"s\.yaml, t\.yaml.*must be the same, with the same label, for all clients"
    ):
        provision(tmp_path / "f.yaml", None, None)


def test_a_server_takes_the_schema_of_its_bundle_and_no_tables(desk: Path) -> None:
    bundle = read_server_bundle(desk / "server")
    settings = settings_for(bundle, ["task=csv"])
    assert settings.task.options["schema"] == str(desk / "server" / "schema.yaml")
    with pytest.raises(Refusal, match="the files stay at the clients; leave it out"):
        settings_for(bundle, ["task=csv", "task.folder=hospitals"])
    for key in ("group_weights", "scaling"):
        with pytest.raises(Refusal, match=rf"task.{key}='a.json': devices have it in their schema"):
            settings_for(bundle, ["task=csv", f"task.{key}=a.json"])


def test_predictions_are_words_with_their_probability(desk: Path, tmp_path: Path) -> None:
    task = load(schema=str(desk / "server" / "schema.yaml"))
    (tmp_path / "new.csv").write_text("x\n0\n4\n\n")
    found = predictions(
        lambda inputs: inputs @ task.model().state_dict()["weight"].T, task, tmp_path / "new.csv", True
    )
    assert list(found) == ["y", "probability"] and found["probability"].tolist() == [0.5, 0.5]


def test_device_predicts_by_its_final_model_and_that_models_schema(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = desk / "clients" / "a"
    task = load(schema=str(desk / "server" / "schema.yaml"))
    (tmp_path / "new.csv").write_text("x\n0\n4\n\n")
    asked = ["predict", str(client), str(tmp_path / "new.csv")]
    assert run(asked) == 2 and "holds no model" in capsys.readouterr().err
    model = {"weight": np.float32([[-1], [1]]), "bias": np.zeros(2, np.float32)}
    (client / "state").mkdir()
    record_end(client / "state", RunOver("spring", "completed", 20, model, agreement_of(task) or ""))
    assert run(asked) == 0
    assert capsys.readouterr().out.splitlines()[:3] == ["y,probability", "no,0.880797", "yes,0.880797"]
    assert run(["predict", str(client / "state"), *asked[2:]]) == 0
    record_end(tmp_path, RunOver("spring", "completed", 20, {"scale": np.array(2.0)}))
    assert load_file(tmp_path / "model.safetensors")["scale"].shape == ()
    (client / "schema.yaml").write_text(SCHEMA.replace("4", "8"))
    assert run(asked) == 2 and "is not the schema or model of run spring" in capsys.readouterr().err


def test_a_device_without_torch_keeps_a_model_that_predicts(
    tmp_path: Path, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = desk / "clients" / "a" / "client.toml"
    choice = {"kind": "linear", "data": "table.npz", "client": 0}
    file.write_text(tomli_w.dumps({**tomllib.loads(file.read_text()), "task": choice}))
    model = {"weight": np.float32([[-1, 0], [1, 0], [0, 0]]), "bias": np.zeros(3, np.float32)}
    (file.parent / "state").mkdir()
    record_end(file.parent / "state", RunOver("spring", "completed", 20, model))
    np.save(tmp_path / "new.npy", np.float32([[9, 0], [-9, 1]]))
    assert run(["predict", str(file.parent), str(tmp_path / "new.npy")]) == 0
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == ["c", "1", "0"]


def test_a_device_predicts_survival_by_its_final_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    (tmp_path / "common").mkdir()
    schema = "label: {kind: survival, time: t, event: e, bins: 2}\ncolumns:\n  x: {low: 0, high: 4}\n"
    (tmp_path / "common" / "s.yaml").write_text(
        schema + "  t: {low: 0, high: 8}\n  e: {categories: [no, yes]}\n"
    )
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(FEDERATION))
    provision(tmp_path / "f.yaml", tmp_path / "shops", None)
    client = tmp_path / "shops" / "clients" / "a"
    (client / "table.csv").write_text("x,t,e\n" + "1,2,yes\n3,8,no\n" * 10)
    task = load(schema=str(client / "schema.yaml"))
    device = read_device(read_client_bundle(client))
    assert device.task.count(None) == 20
    model = {"0.weight": np.zeros((1, 1), np.float32), "1.bias": np.float32([0, -1.0986123])}
    record_end(client / "state", RunOver("spring", "completed", 20, model, agreement_of(task) or ""))
    (tmp_path / "new.csv").write_text("x\n2\n")
    assert run(["predict", str(client), str(tmp_path / "new.csv")]) == 0
    assert capsys.readouterr().out.split() == ["median_t,survival_at_4,survival_at_8", "4,0.5,0.375"]
