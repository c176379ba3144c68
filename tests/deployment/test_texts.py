"""`task: text` of real clients: each device's own texts, and an order that names base, tokens and adapters."""

from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import yaml
from shared.texts import write_letters

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.deployment.device.client_bundle import read_client_bundle
from fedveil.deployment.device.device import read_device
from fedveil.deployment.device.run_end import RunOver, record_end
from fedveil.deployment.federation_yaml import read_federation
from fedveil.deployment.provision import provision
from fedveil.deployment.serve import settings_for
from fedveil.links.server_bundle import read_server_bundle
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.training_order import ModeName, RecordTerms, TrainingOrder
from fedveil.privacy.budget import Adjacency
from fedveil.tasks.arrays import agreement_of, read_arrays
from fedveil.text.task import load

ADAPTER = {"name": "lora", "rank": 2, "modules": ["q_proj", "v_proj"]}


def federation(base: Path, **options: Any) -> dict[str, Any]:
    """Return the description of a federation of three clients."""
    keys = {"base": str(base), "tokens": 16, "base_bits": 32, "adapter": ADAPTER, **options}
    return {
        "federation": "letters",
        "server": {"address": "localhost:8799", "listen": "127.0.0.1:8799"},
        "task": {"name": "text", "data": "mine.jsonl", "options": keys},
        "policy": {"target_epsilon": 8.0, "target_delta": 1e-4},
        "clients": [{"name": "a"}, {"name": "b", "task": {"data": "texts"}}, {"name": "c"}],
    }


@pytest.fixture
def desk(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("os.fsync", lambda _: None)
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(federation(tiny_base)))
    provision(tmp_path / "f.yaml", tmp_path / "letters", None)
    return tmp_path / "letters"


def test_each_device_trains_on_its_own_texts(desk: Path, tiny_base: Path) -> None:
    written = write_letters(desk.parent / "written", clients=2)
    (written / "client-0.jsonl").rename(desk / "clients" / "a" / "mine.jsonl")
    (desk / "clients" / "b" / "texts").mkdir()
    (written / "client-1.jsonl").rename(desk / "clients" / "b" / "texts" / "1.jsonl")
    (desk / "clients" / "b" / "texts" / "2.txt").write_text("the sea is calm")
    devices = [read_device(read_client_bundle(desk / "clients" / name)) for name in "ab"]
    assert [device.task.count(None) for device in devices] == [10, 11]

    server = load(base=str(tiny_base), tokens=16, base_bits=32, adapter=ADAPTER)
    record = RecordTerms(3.0, 1e-5, 1.0, Adjacency.ZERO_OUT, 10)
    order = TrainingOrder("r", ModeName.RECORD, LocalTraining(), record=record)
    devices[0].task.check_order(replace(order, agreement=agreement_of(server)), None)
    for change in (
        {"tokens": 17},
        {"adapter": {**ADAPTER, "name": "ffa"}},
        {"adapter": {**ADAPTER, "rank": 3}},
    ):
        keys: dict[str, Any] = {"tokens": 16, "base_bits": 32, "adapter": ADAPTER, **change}
        other = agreement_of(load(base=str(tiny_base), **keys))
        with pytest.raises(Refusal, match="another schema, model or base"):
            devices[0].task.check_order(replace(order, agreement=other), None)


def test_a_device_without_texts_is_refused(desk: Path) -> None:
    with pytest.raises(Refusal, match=r"mine.jsonl': does not exist"):
        read_device(read_client_bundle(desk / "clients" / "a"))


def test_a_server_has_no_texts(desk: Path, tiny_base: Path) -> None:
    bundle = read_server_bundle(desk / "server")
    keys = ["task=text", f"task.base={tiny_base}", "privacy.records=20", "privacy.most_records=11"]
    assert settings_for(bundle, keys).task.option == "text"
    with pytest.raises(Refusal, match="the files stay at the clients; leave it out"):
        settings_for(bundle, [*keys, "task.folder=letters"])


def test_options_that_are_no_keys_are_refused(tmp_path: Path, tiny_base: Path) -> None:
    for bad in ({"rank": [[1]]}, {"deep": {"a": 1}}):
        (tmp_path / "f.yaml").write_text(yaml.safe_dump(federation(tiny_base, adapter=bad)))
        with pytest.raises(Refusal, match=r"task\.options\.adapter=.*: must be a finite number, a word"):
            read_federation(tmp_path / "f.yaml")


def test_a_device_predicts_and_writes_by_its_final_model(
    desk: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, task = desk / "clients" / "a", load(base=str(tiny_base), tokens=16, base_bits=32, adapter=ADAPTER)
    (client / "state").mkdir()
    arrays = read_arrays(task.model())
    record_end(client / "state", RunOver("spring", "completed", 20, arrays, agreement_of(task) or ""))
    (desk / "new.txt").write_text("dear friend the sea is calm")
    assert run(["predict", str(client), str(desk / "new.txt")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "perplexity"
    moved = copytree(tiny_base, desk / "moved")
    for more in ([], ["--base", str(moved)]):
        assert run(["generate", str(client), "dear friend", "--tokens", "5", *more]) == 0
        output = capsys.readouterr()
        assert output.out.startswith("dear friend") and "no epsilon is known" in output.err
