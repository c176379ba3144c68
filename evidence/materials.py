"""Bill of materials of a run's model, in CycloneDX 1.6: the model with its card, and the packages that made it.

It has no time and no random number, so that the same run gives the same bytes.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from ..run.run_files import Fields

MODEL, PYTHON = "model", "python"


def materials_of(report: Fields) -> str:
    """Return the text of `bom.cdx.json`."""
    packages = [_package(name, version) for name, version in report["versions"].items()]
    bill = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": _model(report)},
        "components": packages,
        "dependencies": [{"ref": MODEL, "dependsOn": [each["bom-ref"] for each in packages]}],
    }
    return json.dumps(bill, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _package(name: str, version: str) -> dict[str, Any]:
    if name == PYTHON:
        return {"type": "platform", "bom-ref": PYTHON, "name": PYTHON, "version": version}
    purl = f"pkg:pypi/{quote(name, safe='')}@{quote(version, safe='')}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _model(report: Fields) -> dict[str, Any]:
    """Return the component of the model, with its card."""
    run = report["run"]
    digest = run["model_sha256"]
    return {
        "type": "machine-learning-model",
        "bom-ref": MODEL,
        "name": str(run["task"]),
        "description": " ".join(report["promise"]),
        **({"hashes": [{"alg": "SHA-256", "content": digest}]} if digest else {}),
        "modelCard": {
            "modelParameters": {"task": str(run["task"])},
            "quantitativeAnalysis": {
                "performanceMetrics": [
                    {"type": each["name"], "value": str(each["value"]), "slice": "held-out data"}
                    for each in report["metrics"]
                ]
            },
            "considerations": {
                "technicalLimitations": [
                    f"{each['limit']}: {each['said']}"
                    for each in report["not_covered"]
                    if each["state"] != "covered"
                ],
                "ethicalConsiderations": [_leak(report)],
            },
            "properties": list(_properties(report)),
        },
    }


def _leak(report: Fields) -> dict[str, str]:
    """Return the risk of a leak, with the mechanisms against it."""
    kinds = dict.fromkeys(row["mechanism"] for row in report["privacy"] if row["mechanism"] != "none")
    name = "The model may reveal what one unit contributed"
    return {"name": name, "mitigationStrategy": "; ".join(kinds) or "none"}


def _properties(report: Fields) -> list[dict[str, str]]:
    """Return the guarantee under the registry's names, and its measurement."""
    names = ("epsilon", "delta", "adjacency", "mechanism", "accountant")
    properties = [
        {"name": f"fedveil:{row['unit']}:{row['adversary']}:{name}", "value": str(row[name])}
        for row in report["privacy"]
        for name in names
    ]
    measured = report["stamps"]["measured"] or {}
    properties += [
        {"name": f"fedveil:measured:{name}", "value": str(measured[name])}
        for name in ("epsilon", "low", "high")
        if name in measured
    ]
    properties += [
        {
            "name": f"fedveil:cost:{each['what']}",
            "value": f"{each['value']} {each['unit']} ({each['source']})",
        }
        for each in report["cost"]["work"]
        if each["value"] is not None
    ]
    if report["ledger"]:
        properties.append({"name": "fedveil:ledger:head", "value": report["ledger"]["head"]["hash"]})
    return properties
