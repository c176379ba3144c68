"""Bill of materials of a run's model."""

import json
from typing import Any

import pytest

from fedveil.evidence.materials import materials_of

EVIL = "x|y\n---\n# <script>alert(1)</script> [a](javascript:b) `c`"


def test_the_bill_of_materials_is_cyclonedx(golden: dict[str, Any]) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    for task in (golden["run"]["task"], EVIL):
        golden["run"]["task"] = task
        assert validator.validate_str(materials_of(golden)) is None


def test_bill_names_the_model_and_its_tools(golden: dict[str, Any]) -> None:
    bill = json.loads(materials_of(golden))
    model = bill["metadata"]["component"]
    assert model["hashes"] == [{"alg": "SHA-256", "content": golden["run"]["model_sha256"]}]
    assert {each["name"] for each in bill["components"]} == set(golden["versions"])
    told = {each["name"]: each["value"] for each in model["modelCard"]["properties"]}
    assert float(told["fedveil:client:model:epsilon"]) == golden["privacy"][2]["epsilon"]
    assert "time" not in json.dumps(bill["metadata"]).split('"modelCard"')[0]
