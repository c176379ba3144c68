"""Query of a device's owner: only the text and the database that the policy lists are executed."""

import sqlite3
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w

from fedveil.base.refusal import Refusal
from fedveil.deployment.device.client_bundle import TaskChoice, read_client_bundle
from fedveil.deployment.device.device import read_device
from fedveil.deployment.device.enrol import MAKING, _complete
from fedveil.deployment.device.enrolment import PRIVATE
from fedveil.deployment.device.owner_query import is_listed, query_hash, require_listed
from fedveil.links.enrolment.token import Token
from fedveil.tables import queries

FEDERATION = """\
federation: wards
server: {{address: "localhost:{link}", listen: "127.0.0.1:{link}", enrolment: "localhost:{port}"}}
task: {{name: csv, query: "SELECT x, ill FROM stays", database: ward.db, options: {{schema: schema.yaml}}}}
policy: {{target_epsilon: 8.0, target_delta: 1e-4{policy}}}
clients: [{{name: north}}, {{name: south}}, {{name: west}}]
"""
SCHEMA = 'label: ill\ncolumns:\n  x: {low: -3, high: 3}\n  ill: {categories: ["no", "yes"]}\n'
CHOICE = TaskChoice(name="csv", client=0, query="SELECT x, ill FROM stays", database="ward.db")


@pytest.fixture
def desk(provisioned: Callable[[str], Path], tmp_path: Path) -> Path:
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    return provisioned(FEDERATION.replace("{policy}", ""))


def set_policy(bundle: Path, **values: object) -> None:
    path = bundle / "policy.toml"
    path.write_text(tomli_w.dumps({**tomllib.loads(path.read_text()), **values}))


def test_a_query_is_not_executed_before_its_owner_lists_it(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    north, executed = desk / "clients" / "north", list[str]()
    with sqlite3.connect(north / "ward.db") as connection:
        connection.execute("CREATE TABLE stays AS SELECT 1.0 AS x, 'yes' AS ill")
    connection.close()
    result_of = queries._result
    monkeypatch.setattr(queries, "_result", lambda *names: executed.append(names[0]) or result_of(*names))
    listed = query_hash(CHOICE)
    for other in ([], [listed[::-1]]):
        set_policy(north, queries=other)
        with pytest.raises(Refusal) as refusal:
            read_device(read_client_bundle(north))
        assert not executed
        assert str(refusal.value).startswith(
            "task.query='SELECT x, ill FROM stays': is not listed by the owner"
        )
        assert f'set in policy.toml: queries = ["{listed}"]' in str(refusal.value)
    set_policy(north, queries=[listed])
    read_device(read_client_bundle(north))
    assert executed == ["SELECT x, ill FROM stays"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"query": "SELECT x, ill FROM stays "}, id="text"),
        pytest.param({"database": "other.db"}, id="database"),
        pytest.param({"query": 'SELECT x, ill FROM stays", "', "database": "ward.db"}, id="quotes"),
    ],
)
def test_a_list_is_of_exact_texts(change: dict[str, str], desk: Path) -> None:
    policy = replace(read_client_bundle(desk / "clients" / "north").policy, queries=(query_hash(CHOICE),))
    require_listed(CHOICE, policy)
    assert not is_listed(replace(CHOICE, **change), policy)


def test_only_the_owner_lists_queries(desk: Path, tmp_path: Path, provisioned: Callable[[str], Path]) -> None:
    assert "queries" not in (desk / "clients" / "north" / "policy.toml").read_text()
    listed = query_hash(CHOICE)
    with pytest.raises(Refusal, match=r"policy.queries.*are listed by the owner of each device"):
        provisioned(FEDERATION.replace("{policy}", f", queries: [{listed}]"))


def test_an_enrolment_that_brings_a_list_is_refused(desk: Path, tmp_path: Path) -> None:
    north, folder = desk / "clients" / "north", tmp_path / "device"
    (folder / MAKING).mkdir(mode=0o700, parents=True)
    for name in PRIVATE:
        (folder / MAKING / name).write_bytes((north / name).read_bytes())
        (folder / MAKING / name).chmod(0o600)
    set_policy(north, queries=[query_hash(CHOICE)])
    names = ("ca.pem", "tls.pem", "client.toml", "policy.toml", "schema.yaml")
    files = {name: (north / name).read_bytes() for name in names}
    roster = (north / "roster.bin").read_bytes()
    token = Token("h:1", "north", 1, bytes(32), bytes(32))
    with pytest.raises(Refusal, match=r"queries.*came with the bundle, and only the owner lists them"):
        _complete(token, folder, files, roster)
    assert not (folder / "policy.toml").exists()


@pytest.mark.parametrize("key", ["query", "database", "data", "folder"])
def test_options_of_a_task_name_no_rows(key: str) -> None:
    choice = TaskChoice(name="csv", client=0, data="a.csv", options={key: "SELECT 1"})
    assert ("options", f"must not say where the rows are; give {key} beside options") in choice.rules()
