"""federation.yaml is read strictly: what is wrong is refused in a sentence, and nothing is made of it."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.base.refusal import Refusal
from fedveil.deployment.federation_yaml import read_federation
from fedveil.deployment.provision import provision, revoke, rotate

SMALLEST: dict[str, Any] = {
    "federation": "hearts",
    "server": {"address": "fl.example.org:8443"},
    "task": {"name": "heart"},
    "policy": {"target_epsilon": 8.0, "target_delta": 1e-5},
    "clients": [{"name": "cleveland"}, {"name": "hungary"}],
}


def changed(path: str, value: object) -> dict[str, Any]:
    """The smallest file with one value put in at a dotted path."""
    values = copy.deepcopy(SMALLEST)
    *above, last = path.split(".")
    place: Any = values
    for each in above:
        place = place[int(each)] if each.isdigit() else place.setdefault(each, {})
    place[last] = value
    return values


def written(folder: Path, values: object) -> Path:
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_smallest_file_is_enough(tmp_path: Path) -> None:
    federation = read_federation(written(tmp_path, SMALLEST))
    assert (federation.content.server.listen_address, federation.content.server.hosts) == (
        "0.0.0.0:8443",
        ("fl.example.org",),
    )
    assert (federation.content.link, federation.content.certificate_days) == ("grpc", 365)
    assert federation.clients[1].policy["minimum_cohort"] == 3
    assert federation.clients[1].policy["trust_server"] is False
    assert federation.clients[1].request is None


def test_a_client_differs_from_the_others_where_it_says_so(tmp_path: Path) -> None:
    values = changed("clients.0.policy", {"target_epsilon": 1.0})
    values["clients"][1]["task"] = {"kind": "linear", "data": "device.npz"}
    values["clients"][1]["request"] = "asked/request.toml"
    first, second = read_federation(written(tmp_path, values)).clients
    assert (first.policy["target_epsilon"], second.policy["target_epsilon"]) == (1.0, 8.0)
    assert (first.task["name"], second.task["name"], second.task["kind"]) == ("heart", None, "linear")
    assert second.request == tmp_path / "asked" / "request.toml"


def test_a_number_in_the_scientific_way_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "federation.yaml"
    path.write_text(yaml.safe_dump(SMALLEST).replace("1.0e-05", "1e-5"))
    assert "1e-5" in path.read_text()
    assert read_federation(path).clients[0].policy["target_delta"] == 1e-5


@pytest.mark.parametrize("value", ["!!timestamp junk", "!!int ''", "!!bool junk", "!!float x", "2020-13-45"])
def test_a_value_that_its_tag_does_not_fit_is_a_refusal(tmp_path: Path, value: str) -> None:
    path = tmp_path / "federation.yaml"
    path.write_text(yaml.safe_dump(SMALLEST).replace("target_epsilon: 8.0", f"target_epsilon: {value}"))
    with pytest.raises(Refusal, match="cannot be read as YAML"):
        read_federation(path)


WRONG = [
    ("federation", "Hearts", "must be at most 48 of a-z"),
    ("federation", "../hearts", "must be at most 48 of a-z"),
    ("federation", None, "must be at most 48 of a-z"),
    ("federatoin", "x", "did you mean 'federation'?"),
    ("server", "fl.example.org:8443", "must be a group of keys"),
    ("server.address", "fl.example.org", "must be host:port"),
    ("server.address", "https://fl.example.org:8443", "must be host:port"),
    ("server.address", "fl.example.org:08443", "must be host:port"),
    ("server.address", "fl.example.org:65536", "must be host:port"),
    ("server.address", "[:::]:1", "must be host:port"),
    ("server.also", ["::g"], "DNS names and IP addresses"),
    ("server.adress", "x:1", "did you mean 'address'?"),
    ("server.also", ["a b"], "DNS names and IP addresses"),
    ("server.also", "localhost", "must be a list"),
    ("link", "http", "must be one of grpc, flower"),
    ("certificate_days", 398, "must be from 1 to 397"),
    ("certificate_days", 90.5, "must be a whole number"),
    ("certificate_days", True, "must be a whole number"),
    ("task", {"name": "heart", "target": "a:B"}, "give one of name, target and kind"),
    ("task", {"target": "a:B"}, "'a' is not among the modules you allow"),
    ("task", {"target": "os.system"}, "must name a class"),
    ("task", {"kind": "linear"}, "is required by a kind"),
    ("task.options", {"x": float("nan")}, "must be a finite number"),
    ("policy.target_epsilon", "8", "must be a number, not text"),
    ("policy.target_epsilon", float("inf"), "must be finite"),
    ("policy.target_epsilon", 0, "must be above 0"),
    ("policy.target_delta", 1, "must be above 0 and below 1"),
    ("policy.until", "tomorrow", "must be a day"),
    ("policy.minimum_cohort", 1, "must be from 2"),
    ("policy.trust_server", "no", "must be true or false"),
    ("policy.epsilon", 8.0, "did you mean 'target_epsilon'?"),
    ("policy.authority", "00" * 32, "is written by provisioning"),
    ("policy.profile", "honest", "must be one of malicious, semi_honest"),
    ("eligibility.hours", "22-24", "two hours of the day"),
    ("eligibility.hours", 22, "two hours of the day"),
    ("eligibility.min_free_megabytes", 5, "did you mean 'min_free_mebibytes'?"),
    ("clients", [], "must be a list of groups of keys"),
    ("clients", ["cleveland"], "must be a list of groups of keys"),
    ("clients", {"cleveland": {}}, "must be a list of groups of keys"),
    ("clients.1.name", "cleveland", "names two clients"),
    ("clients.1.name", "server", "belongs to the server"),
    ("clients.1.name", "../../etc", "must be at most 48 of a-z"),
    ("clients.1.name", "a/b", "must be at most 48 of a-z"),
    ("clients.1.name", ".", "must be at most 48 of a-z"),
    ("clients.1.name", "a\nb", "must be at most 48 of a-z"),
    ("clients.1.name", "a" * 49, "must be at most 48 of a-z"),
    ("clients.1.name", "Ⅷ", "must be at most 48 of a-z"),
    ("clients.1.name", True, "must be at most 48 of a-z"),
    ("clients.1.node", 7, "there is no such key"),
    ("clients.1.policy", {"target_epsilon": -1}, "must be above 0"),
    ("clients.1.request", "nowhere.toml", "cannot be read"),
]


@pytest.mark.parametrize(("path", "value", "said"), WRONG)
def test_mistake_is_refused_in_a_sentence_before_any_file(
    path: str, value: object, said: str, tmp_path: Path
) -> None:
    file = written(tmp_path, changed(path, value))
    with pytest.raises(Refusal) as refused:
        provision(file, tmp_path / "hearts", None)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 2
    assert not (tmp_path / "hearts").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "must be a mapping"),
        (b"- a", "must be a mapping"),
        (b"federation: \xff", "not UTF-8"),
        (b"federation: !!python/object:os.system {}", "could not determine a constructor"),
        (b"a: &x [*x]", "an alias refers to what holds it"),
        (b"federation: a\nfederation: b", r"line \d+: duplicate key federation"),
        (b"clients:\n- {name: a, name: b}", r"line \d+: duplicate key name"),
        (b"until: 2031-02-30", "cannot be read as YAML"),
        (b"{[a]: b}", "unhashable key"),
        (b"a: [", "line 1"),
    ],
)
def test_non_plain_yaml_is_refused(text: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "federation.yaml").write_bytes(text)
    with pytest.raises(Refusal, match=said):
        read_federation(tmp_path / "federation.yaml")


def test_all_mistakes_of_a_part_are_reported_at_once(tmp_path: Path) -> None:
    values = changed("policy", {"target_epsilon": -1, "target_delta": 2, "minimum_cohort": 1})
    with pytest.raises(Refusal) as refused:
        read_federation(written(tmp_path, values))
    assert [line.split("=")[0] for line in str(refused.value).splitlines()] == [
        "policy.target_epsilon",
        "policy.target_delta",
        "policy.minimum_cohort",
    ]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.datetimes(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3)
    ),
    max_leaves=5,
)
PLACES = st.sampled_from(
    [
        *SMALLEST,
        "link",
        "eligibility",
        "certificate_days",
        *(f"server.{key}" for key in ("address", "listen", "also")),
        *(f"task.{key}" for key in ("name", "target", "kind", "data", "allow_modules", "options", "client")),
        *(
            f"policy.{key}"
            for key in ("target_epsilon", "until", "runs", "collusion", "profile", "authority")
        ),
        *(f"eligibility.{key}" for key in ("hours", "max_temperature_celsius", "min_free_mebibytes")),
        *(f"clients.0.{key}" for key in ("name", "request", "task", "policy", "eligibility")),
    ]
)


@settings(max_examples=150)
@given(path=PLACES, value=VALUES)
def test_any_value_in_a_position_is_read_or_refused(path: str, value: object, tmp_path: Path) -> None:
    file = written(tmp_path, changed(path, value))
    try:
        federation = read_federation(file)
    except Refusal as refusal:
        assert str(refusal)
    else:
        assert all(entry.policy["target_epsilon"] > 0 for entry in federation.clients)


@settings(max_examples=100)
@given(text=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_content_of_a_file_is_refused_without_side_effects(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "federation.yaml").write_bytes(text)
    with pytest.raises(Refusal):
        read_federation(tmp_path / "federation.yaml")


def test_a_federation_does_not_lose_a_client_in_silence(tmp_path: Path) -> None:
    file, out = written(tmp_path, SMALLEST), tmp_path / "hearts"
    provision(file, out, None)
    fewer = {**SMALLEST, "clients": SMALLEST["clients"][:1]}
    with pytest.raises(Refusal, match="'hungary': was admitted and is not in the file; revoke it first"):
        provision(written(tmp_path, fewer), out, None)
    revoke(out, ["hungary"])
    provision(file, out, None)
    with pytest.raises(Refusal, match="did you mean 'cleveland'"):
        rotate(out, ["clevland"], None)
    with pytest.raises(Refusal, match="is the authority of hearts"):
        provision(written(tmp_path, {**SMALLEST, "federation": "lungs"}), out, None)
    shutil.rmtree(out)
    with pytest.raises(Refusal, match="holds no federation"):
        revoke(out, ["cleveland"])
    assert not out.exists()
