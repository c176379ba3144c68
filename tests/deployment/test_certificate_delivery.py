"""Delivery of certificates to connected devices, and what devices report."""

from collections.abc import Iterator

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedveil.deployment.certificate_delivery import CertificateDelivery
from fedveil.messages.flower_adapter import claim_identity, name_sender
from fedveil.messages.notices import DeviceFacts, facts_reply, read_facts, read_renewal, renewal_to

claim_identity(1)


@pytest.mark.parametrize(
    "told",
    [
        {"version": "0.1\n", "certificate_ends": 1, "roster": 1, "suites": [1]},
        {"version": "x" * 33, "certificate_ends": 1, "roster": 1, "suites": [1]},
        {"version": "0.1", "certificate_ends": 2**62, "roster": 1, "suites": [1]},
        {"version": "0.1", "certificate_ends": -1, "roster": 1, "suites": [1]},
        {"version": "0.1", "certificate_ends": 1, "roster": 1.0, "suites": [1]},
        {"version": "0.1", "certificate_ends": 1, "roster": 1, "suites": [1] * 65},
        {"version": "0.1", "certificate_ends": 1, "roster": 1},
    ],
)
def test_self_description_of_a_device_is_read_strictly(told: dict[str, object]) -> None:
    question = renewal_to(2, "")
    facts = DeviceFacts("0.1.0", 1_900_000_000, 3, (1, 2))
    assert read_renewal(question) == "" and read_facts(facts_reply(question, facts)) == facts
    reply = Message(RecordDict({"device": ConfigRecord(told)}), reply_to=question)  # pyright: ignore
    assert read_facts(reply) is None


def test_courier_asks_each_stream_once_per_certificate() -> None:
    asked: list[tuple[int, str]] = []
    since, certificates = {2: 1.0, 3: 1.0}, {"2": "first"}

    class Grid:
        def send_and_receive(self, messages: list[Message], *, timeout: float) -> Iterator[Message]:
            for each in messages:
                node = each.metadata.dst_node_id
                asked.append((node, read_renewal(each) or ""))
                if node == 2:  # the other one trains
                    yield name_sender(facts_reply(each, DeviceFacts("1", 1, 1, ())), node)

    delivery = CertificateDelivery(Grid(), lambda: since, lambda: certificates)  # pyright: ignore
    assert delivery.deliver() == 1 and set(delivery.facts) == {2}
    assert delivery.deliver() == 0
    assert asked == [(2, "first"), (3, ""), (3, "")]
    certificates["2"] = "second"
    delivery.deliver()
    since[2] = 2.0  # it came again
    delivery.deliver()
    assert [each for each in asked if each[0] == 2] == [(2, "first"), (2, "second"), (2, "second")]
