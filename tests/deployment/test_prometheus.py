"""Status of a server as numbers for Prometheus."""

from fedveil.deployment.prometheus import text_of
from fedveil.deployment.watch import rounds_of

UNSEEN = {
    "state": "waiting",
    "figures": {},
    **dict.fromkeys(("round_seconds", "last_invited", "last_replies")),
}


def test_labels_are_escaped_and_infinity_has_its_word() -> None:
    status = {
        **dict.fromkeys(("round", "num_rounds", "invited", "replies", "abandoned", "untrue"), 0),
        **UNSEEN,
        "clients": [],
        "dropped": {'a "b"\\\n': 1},
        "turned_away": {},
        "bytes": {},
        "privacy": [{"unit": "client", "spent": "infinity", "target": None}],
    }
    text = text_of(status)
    assert 'fedveil_dropped_total{reason="a \\"b\\"\\\\\\n"} 1' in text
    assert 'fedveil_epsilon_spent{unit="client"} +Inf' in text


def test_prometheus_answers_before_the_first_round() -> None:
    """Nobody has replied yet, which is no secret; bytes already are the operator's."""
    status = {**UNSEEN, **rounds_of([]), "num_rounds": 3, "clients": [], "privacy": [], "audit": None}
    text = text_of({**status, "bytes": None, "turned_away": {}})
    assert "fedveil_round 0" in text and "fedveil_replies" not in text and "fedveil_bytes" not in text
