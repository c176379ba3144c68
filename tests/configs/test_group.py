"""Groups of keys: refusals of their mistakes, and the JSON schema with the meaning of every key."""

from typing import Any

import pytest

from fedveil.base.refusal import Refusal
from fedveil.configs.group import Group, node_at, schema_of
from fedveil.configs.privacy_settings import ClientCentral, ClientDistributed, Record
from fedveil.configs.schema import SimulationSettings
from fedveil.configs.settings import settings_from_overrides
from fedveil.deployment.settings import ServerSettings
from fedveil.messages.local_training import ORDER_KEYS


@pytest.mark.parametrize(
    ("make", "sentences"),
    [
        (lambda: ClientCentral(target_epsilon=-1.0), ["target_epsilon=-1.0: must be above 0"]),
        (lambda: Record(target_epsilon=None), ["target_epsilon=None: give a budget or a noise_multiplier"]),
        (
            lambda: ClientDistributed(clipping="adaptive", target_delta=2.0),
            [
                "clipping='adaptive': there is no such key; did you mean 'clipping_norm'?",
                "target_delta=2.0: must be",
            ],
        ),
        (lambda: Record(target_epsilon="8"), ["target_epsilon='8': must be a number, not text"]),
    ],
)
def test_mistakes_in_python_get_the_same_sentences(make: Any, sentences: list[str]) -> None:
    with pytest.raises(Refusal) as refused:
        make()
    lines = sorted(str(refused.value).splitlines())
    assert len(lines) == len(sentences)
    assert all(line.startswith(sentence) for line, sentence in zip(lines, sentences, strict=True))


def test_rules_between_keys_are_reported_all_at_once() -> None:
    wrong = ["privacy.bands=3", "privacy.noise_schedule=adaptive", "privacy.metrics_share=0"]
    with pytest.raises(Refusal) as refused:
        settings_from_overrides(wrong)
    assert {line.partition("=")[0] for line in str(refused.value).splitlines()} == {
        "privacy.bands",
        "privacy.metrics_share",
    }
    with pytest.raises(Refusal) as refused:
        settings_from_overrides([*wrong, "num_rounds=0"])
    assert "num_rounds=0" in str(refused.value)


@pytest.mark.parametrize("model", [SimulationSettings, ServerSettings])
def test_every_key_of_the_schema_has_a_meaning_and_a_type(model: type[Group]) -> None:
    schema = schema_of(model)
    groups = [schema, *(each for name, each in schema["$defs"].items() if "properties" in each)]
    silent = {
        "server_learning_rate",
        "server_momentum",
        "beta_1",
        "beta_2",
        "proximal_mu",
        "record",
        "client",
        "name",
    }
    for group in groups:
        for key, each in group["properties"].items():
            has_type = "description" in each or "$ref" in each or "discriminator" in each
            assert has_type or key in silent, f"{group.get('description')}: {key}"
    assert set(ORDER_KEYS) <= set(schema["properties"]) and "source" not in schema["properties"]


def test_position_in_the_schema_is_resolved_through_the_options() -> None:
    place = node_at(schema_of(SimulationSettings), ("privacy", "record_and_client", "client", "bands"))
    assert place.path == ("privacy", "client", "bands")
    assert (place.schema["minimum"], place.schema["maximum"]) == (1, 128)
