"""Manifests of the chart in `tests/fixtures/chart`, rendered by Helm and valid by the JSON schemas of Kubernetes.

    pip install helm-python-sdk==0.2.2 kubernetes-validate==1.37.0
    python tests/oracles/rendered_chart.py

helm-python-sdk (Apache-2.0) is Helm's own Go SDK 4.2.3 as a shared library. It lints the chart, checks the values by
`values.schema.json` and renders; the schemas are those of Kubernetes' API, in which a key that is unknown is a fault.
"""

import hashlib
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART, RENDERED = ROOT / "containers" / "chart", ROOT / "tests" / "fixtures" / "chart"
KUBERNETES = ("1.33", "1.37")  # the oldest and the newest that kubernetes-validate 1.37.0 has
POLICY = "target_epsilon = 3.0\ntarget_delta = 1e-05\n"
VALUES: dict[str, dict[str, Any]] = {
    "server": {
        "role": "server",
        "image": f"registry.example.org/fedveil-server@sha256:{'a' * 64}",
        "bundle": "five-server",
        "run": ["task=digits", "num_rounds=2", "privacy=record", "secagg=masked", "accept_vacuous=true"],
        "networkPolicy": {"from": [{"ipBlock": {"cidr": "203.0.113.0/24"}}]},
        "metrics": {"port": 9464, "from": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]},
    },
    "client": {
        "role": "client",
        "image": f"registry.example.org/fedveil-client@sha256:{'b' * 64}",
        "bundle": "five-a",
        "policy": POLICY,
        "data": {"claim": "rows"},
        "env": {"OMP_NUM_THREADS": "1"},
        "nodeSelector": {"site": "a"},
    },
}


def digest() -> str:
    """Return one SHA-256 of the chart's files, their names and these values."""
    summary = hashlib.sha256(repr(sorted(VALUES.items())).encode())
    for path in sorted(CHART.rglob("*")):
        if path.is_file():
            summary.update(str(path.relative_to(CHART)).encode() + b"\0" + path.read_bytes() + b"\0")
    return summary.hexdigest()


def rendered(role: str) -> str:
    """Return what Helm renders for a role; refuse what it finds fault with."""
    helm = import_module("helm_python")
    lint = helm.lint(CHART, VALUES[role], strict=True)
    assert not lint["errors"], lint["errors"]
    manifests: dict[str, str] = helm.Chart.load(CHART).render(VALUES[role], name=f"five-{role}")
    texts = [
        text.strip() for name, text in sorted(manifests.items()) if name.endswith(".yaml") and text.strip()
    ]
    return "".join(f"---\n{text}\n" for text in texts)


def objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a manifest."""
    yield from (each for each in yaml.safe_load_all(text) if each is not None)


def main() -> int:
    validator = import_module("kubernetes_validate")
    for role in VALUES:
        text = rendered(role)
        for each in objects(text):
            for version in KUBERNETES:
                validator.validate(each, version, strict=True)
        RENDERED.mkdir(exist_ok=True)
        heading = f"# Rendered by tests/oracles/rendered_chart.py from the chart and values of SHA-256\n# {digest()}\n"
        (RENDERED / f"{role}.yaml").write_text(heading + text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
