"""Keys of simulated pairs: the same as of real nodes, computed once for both."""

import pytest

from fedveil.privacy.secagg import pair_keys
from fedveil.privacy.secagg.pair_keys import PairKeys
from fedveil.privacy.secagg.refusal import Reason, Refused
from fedveil.privacy.secagg.suite import agree, new_key, public_of


def test_a_pair_computes_its_key_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = list[bytes]()
    monkeypatch.setattr(pair_keys, "agree", lambda *args: computed.append(args[2]) or agree(*args))
    pairs, ours, theirs = PairKeys(), new_key(), new_key()
    for info in (b"a", b"b"):
        expected = agree(ours, public_of(theirs), info)
        assert pairs.agree(ours, public_of(theirs), info, public_of(ours)) == expected
        assert pairs.agree(theirs, public_of(ours), info) == expected
    assert computed == [b"a", b"b"]


def test_another_key_of_the_peer_gives_another_common_key() -> None:
    pairs, ours, theirs, swapped = PairKeys(), new_key(), new_key(), public_of(new_key())
    first = pairs.agree(ours, swapped, b"info")
    assert first == agree(ours, swapped, b"info") != pairs.agree(theirs, public_of(ours), b"info")


def test_a_key_of_low_order_is_refused() -> None:
    with pytest.raises(Refused) as refused:
        PairKeys().agree(new_key(), bytes(32), b"info")
    assert refused.value.reason is Reason.MALFORMED


def test_few_keys_wait_for_the_second_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_keys, "MAX_WAITING", 3)
    pairs, key, peer = PairKeys(), new_key(), public_of(new_key())
    for number in range(5):
        pairs.agree(key, peer, bytes([number]))
    assert [info for *_, info in pairs._waiting] == [bytes([number]) for number in (2, 3, 4)]
