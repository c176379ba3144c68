"""A SuperNode's calls to a SuperLink (Flower's Fleet interface), by Flower's own client, and how a front knows them.

Like `flower_adapter.py` it touches what Flower does not publish.
"""

from __future__ import annotations

import hashlib
from base64 import b64decode
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import (
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
)
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes, verify_signature
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

# All that a SuperNode asks for. `register-node` and `unregister-node` are left to who runs the SuperLink.
FLEET_PATHS = frozenset(
    f"/v1/fleet/{call}"
    for call in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
PUSH_MESSAGES, PUSH_OBJECT = "/v1/fleet/push-messages", "/v1/fleet/push-object"
# Flower has 30, and believes for twice as long that a node is there; a device that lost its power waits that out.
HEARTBEAT_SECONDS = 15
# Flower looks for a part that is not there yet after 1 s, then 2, 4 ...
PULL_AGAIN_SECONDS, PULL_AGAIN_AT_MOST_SECONDS = 0.1, 2.0
UNKNOWN_NODE, RUN_OVER, TOO_LARGE = 401, 403, 413  # HTTP status codes
PULL_SECONDS = 180.0  # after which a SuperLink gives up the end that has announced a message
# What goes wrong when server or network do; Flower gives a message that is not understood as a ValueError.
FLEET_FAILURES = (httpx.HTTPError, ObjectPullError, ObjectPushError, ValueError, TypeError, KeyError)


def node_fingerprint(public_pem: bytes) -> str:
    """Return SHA-256 of a SuperNode's public key as it travels, in hexadecimal."""
    return hashlib.sha256(public_pem).hexdigest()


def signed_by(headers: Mapping[str, str]) -> str | None:
    """Return the fingerprint of the key that signed a call's time within Flower's tolerance, or None.

    It needs the headers only, so that who sends a call is known before any of its body is read.
    """
    try:
        public = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        signed = headers[TIMESTAMP_HEADER]
        age = (now() - datetime.fromisoformat(signed)).total_seconds()
        if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            return None
        if not verify_signature(bytes_to_public_key(public), signed.encode("ascii"), signature):
            return None
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
    return node_fingerprint(public)


def at_most(most_bytes: int, pull: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """Return `pull` with a bound on the bytes of all that it pulls; ObjectPullError beyond."""
    taken = 0

    def counted(name: str) -> bytes:
        nonlocal taken
        content = pull(name)
        taken += len(content)
        if taken > most_bytes:
            raise ObjectPullError(name, f"the message has more than {most_bytes} bytes")
        return content

    return counted


def pull_message(
    tree: ObjectTree, pull: Callable[[str], bytes], confirm: Callable[[str], None], seconds: float
) -> Message:
    """Return a message, of which the other end has the parts or will have them within so many seconds.

    Raises:
      FLEET_FAILURES: they do not come, or are no message.
    """
    message = pull_and_inflate_object_from_tree(
        tree,
        pull,
        confirm,
        return_type=Message,
        max_time=seconds,
        initial_backoff=PULL_AGAIN_SECONDS,
        backoff_cap=PULL_AGAIN_AT_MOST_SECONDS,
    )
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message


def load_node_key(key: bytes) -> EllipticCurvePrivateKey:
    """Return the private key, in OpenSSH's form, of a SuperNode. ValueError if it is none, or of another kind."""
    private = load_ssh_private_key(key, None)
    if not isinstance(private, EllipticCurvePrivateKey):
        raise ValueError("a SuperNode's key is one of an elliptic curve")  # noqa: TRY004 (as for no key at all)
    return private


class FleetNode:
    """One SuperNode's connection; all calls raise one of `FLEET_FAILURES` when they fail.

    Args:
      server: host and port.
      ca: the authority's certificate in PEM.
      key: the node's private key.
      most_bytes: a larger message is not taken.
    """

    def __init__(self, server: str, ca: bytes, key: EllipticCurvePrivateKey, most_bytes: int) -> None:
        self._public = public_key_to_bytes(key.public_key())
        self._most_bytes = most_bytes
        self._node = Node()
        self._client = FleetHttpClient.from_server_address(
            server,
            False,
            ca,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )

    def come(self) -> None:
        """Come on line, or go on after an interruption: Flower takes nobody in whom it still believes to be there."""
        if self._node.node_id:
            try:
                return self.beat()
            except httpx.HTTPStatusError as refused:
                if refused.response.status_code != UNKNOWN_NODE:
                    raise
        asked = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_SECONDS)
        self._node = Node(node_id=self._client.ActivateNode(asked).node_id)

    def beat(self) -> None:
        """Stay on line for another two intervals."""
        if self._node.node_id:
            asked = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_SECONDS)
            self._client.SendNodeHeartbeat(asked)

    def go(self) -> None:
        """Go off line, and say so if the server can be reached."""
        with suppress(*FLEET_FAILURES):
            if self._node.node_id:
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        self._client.close()

    def receive(self) -> Message | None:
        """Return the next message, if there is one; it is not delivered a second time."""
        given = self._client.PullMessages(PullMessagesRequest(node=self._node))
        if not given.messages_list:
            return None
        tree, run = given.message_object_trees[0], given.messages_list[0].metadata.run_id
        pull = make_pull_object_fn_protobuf(self._client.PullObject, self._node, run)
        confirm = make_confirm_message_received_fn_protobuf(
            self._client.ConfirmMessageReceived, self._node, run
        )
        try:
            return pull_message(tree, at_most(self._most_bytes, pull), confirm, PULL_SECONDS)
        except httpx.HTTPStatusError as refused:
            if refused.response.status_code != RUN_OVER:
                raise
            return None

    def send(self, reply: Message) -> None:
        """Hand over the reply to a message that was received."""
        run = reply.metadata.run_id
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            objects: dict[str, Any] = get_all_nested_objects(reply)
            asked = self._client.PushMessages(
                PushMessagesRequest(
                    node=self._node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[get_object_tree(reply)],
                    clientapp_runtime_list=[0.0],
                )
            )
            push = make_push_object_fn_protobuf(self._client.PushObject, self._node, run, asked.session_id)
            push_objects(objects, push, object_ids_to_push=set(asked.objects_to_push))
