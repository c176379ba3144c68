"""The table `personal` of a device: from federation.yaml into the bundle, where its owner may change it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import yaml

from fedveil.base.refusal import Refusal
from fedveil.configs.strict import read_group
from fedveil.deployment.device.client_bundle import read_device_file
from fedveil.deployment.device.personal_choice import PersonalChoice
from fedveil.deployment.federation_yaml import read_federation
from fedveil.deployment.provision import provision

FEDERATION: dict[str, Any] = {
    "federation": "hearts",
    "server": {"address": "localhost:8443"},
    "task": {"name": "heart"},
    "policy": {"target_epsilon": 8.0, "target_delta": 1e-5},
    "personal": {"name": "after", "steps": 40, "layers": ["head.*"]},
    "clients": [{"name": "a"}, {"name": "b", "personal": {"name": "ditto"}}, {"name": "c", "personal": {}}],
}


def written(folder: Path, **changes: object) -> Path:
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump({**FEDERATION, **changes}))
    return path


def test_a_bundle_says_how_its_device_makes_its_own_model(tmp_path: Path) -> None:
    provision(written(tmp_path), tmp_path / "hearts", None)
    folder = tmp_path / "hearts" / "clients"
    choices = {name: read_device_file(folder / name).personal for name in "abc"}
    after = PersonalChoice(name="after", steps=40, layers=("head.*",))
    assert choices["a"] == choices["c"] == after and after.held_out == 0.2 and after.pull_or_none == 0
    assert (choices["b"].name, choices["b"].steps, choices["b"].pull_or_none) == ("ditto", 40, 0.1)
    path = folder / "a" / "client.toml"
    values = tomllib.loads(path.read_text())
    path.write_text(tomli_w.dumps({**values, "personal": {"name": "after", "steps": 5, "share": 0.3}}))
    assert read_device_file(folder / "a").personal == PersonalChoice(name="after", steps=5, share=0.3)


def test_a_bundle_without_an_own_model_has_no_table_of_it(tmp_path: Path) -> None:
    provision(written(tmp_path, personal={}, clients=[{"name": "a"}]), tmp_path / "hearts", None)
    path = tmp_path / "hearts" / "clients" / "a" / "client.toml"
    assert "personal" not in path.read_text()
    choice = read_device_file(path.parent).personal
    assert not choice.trains and choice.held_out is None


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"name": "before"}, "personal.name='before'"),
        ({"name": "after", "steps": 0}, "personal.steps=0"),
        ({"name": "after", "share": 1.0}, "personal.share=1.0"),
        ({"name": "after", "pull": -1.0}, "personal.pull=-1.0"),
        ({"steps": 5}, "personal.name='none': makes no own model"),
    ],
)
def test_an_unusable_table_is_refused_before_any_bundle(
    tmp_path: Path, values: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(Refusal, match=sentence):
        read_federation(written(tmp_path, personal=values))
    with pytest.raises(Refusal):
        read_group(PersonalChoice, values, "personal")
