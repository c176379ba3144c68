"""Calls of a SuperNode to a SuperLink (Flower's Fleet interface), made by Flower's own client, and their signatures.

Like `messages/flower_adapter.py` it uses what Flower does not publish.
"""

from __future__ import annotations

import hashlib
import threading
from base64 import b64decode
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
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

if TYPE_CHECKING:
    from flwr.supercore.runtime import RuntimeHttpClient

# All calls of a SuperNode. `register-node` and `unregister-node` are left to the SuperLink's operator.
FLEET_PATHS = frozenset(
    f"/v1/fleet/{call}"
    for call in (
        *("activate-node", "deactivate-node", "send-node-heartbeat", "get-run", "get-fab"),
        *("pull-messages", "push-messages", "push-object", "pull-object", "confirm-message-received"),
    )
)
PUSH_MESSAGES, PUSH_OBJECT = "/v1/fleet/push-messages", "/v1/fleet/push-object"
PULL_OBJECT = "/v1/fleet/pull-object"
# Flower's own is 30. It counts a node as present for twice as long, and a device that lost power waits that long.
HEARTBEAT_SECONDS = 15
# Flower itself retries a missing part after 1 s, then 2, 4 ...
FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.1, 2.0
UNKNOWN_NODE, RUN_OVER, TOO_LARGE = 401, 403, 413  # HTTP status codes
PULL_SECONDS = 180.0  # after which a SuperLink gives up an announced message that is not sent
# Failures of server and network; Flower raises ValueError for a message that it does not understand.
FLEET_FAILURES = (httpx.HTTPError, ObjectPullError, ObjectPushError, ValueError, TypeError, KeyError)


def node_fingerprint(public_pem: bytes) -> str:
    """Return SHA-256, in hexadecimal, of a SuperNode's public key in PEM."""
    return hashlib.sha256(public_pem).hexdigest()


def signed_by(headers: Mapping[str, str]) -> str | None:
    """Return the fingerprint of the key that signed a call's time, if that is within Flower's tolerance; None otherwise.

    The headers alone decide, so that the caller is known before any of the body is read.
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


def pull_message(
    client: FleetHttpClient | RuntimeHttpClient,
    node: Node,
    run: int,
    tree: ObjectTree,
    max_bytes: int,
    seconds: float,
) -> Message:
    """Pull the parts of a message from the other end and return the message.

    Args:
      client: makes the calls.
      node: the node that pulls.
      run: Flower's number of the run.
      tree: ids of the message's parts.
      max_bytes: largest size of all parts together.
      seconds: how long to wait for parts that the other end does not have yet.

    Raises:
      FLEET_FAILURES: the parts do not come, have more bytes, or are no message.
    """
    pull, received = make_pull_object_fn_protobuf(client.PullObject, node, run), 0

    def pull_part(name: str) -> bytes:
        """Return the part with this id, unless the message becomes too large."""
        nonlocal received
        content = pull(name)
        received += len(content)
        if received > max_bytes:
            raise ObjectPullError(name, f"the message has more than {max_bytes} bytes")
        return content

    message = pull_and_inflate_object_from_tree(
        tree,
        pull_part,
        make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, run),
        return_type=Message,
        max_time=seconds,
        initial_backoff=FIRST_RETRY_SECONDS,
        backoff_cap=MAX_RETRY_SECONDS,
    )
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message


def load_node_key(key: bytes) -> EllipticCurvePrivateKey:
    """Return a SuperNode's private key from OpenSSH's form.

    Raises:
      ValueError: it is no key, or one of another kind.
    """
    private = load_ssh_private_key(key, None)
    if not isinstance(private, EllipticCurvePrivateKey):
        raise ValueError("a SuperNode's key must be of an elliptic curve")  # noqa: TRY004 (as for no key at all)
    return private


@contextmanager
def beating(beat: Callable[[], object], seconds: float) -> Generator[None]:
    """Call `beat` at a fixed interval from another thread within the context, whether or not it fails."""
    over = threading.Event()

    def keep() -> None:
        while not over.wait(seconds):
            with suppress(Exception):  # the main thread's next call meets the failure too
                beat()

    thread = threading.Thread(target=keep, name="flower heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class FleetNode:
    """Connection of one SuperNode; all calls raise one of `FLEET_FAILURES` when they fail.

    Args:
      server: host and port.
      ca: the authority's certificate in PEM.
      key: the node's private key.
      max_bytes: size of the largest message that is accepted.
    """

    def __init__(self, server: str, ca: bytes, key: EllipticCurvePrivateKey, max_bytes: int) -> None:
        self._public = public_key_to_bytes(key.public_key())
        self._max_bytes = max_bytes
        self._node = Node()  # without an id before the first `go_online`
        self._client = FleetHttpClient.from_server_address(
            server,
            False,
            ca,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )

    def go_online(self) -> None:
        """Go online, or continue after an interruption: Flower refuses a node that it still counts as present."""
        if self._node.node_id:
            try:
                return self.beat()
            except httpx.HTTPStatusError as refused:
                if refused.response.status_code != UNKNOWN_NODE:
                    raise
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_SECONDS)
        self._node = Node(node_id=self._client.ActivateNode(request).node_id)

    def beat(self) -> None:
        """Stay online for two more heartbeat intervals."""
        if self._node.node_id:
            request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_SECONDS)
            self._client.SendNodeHeartbeat(request)

    def go_offline(self) -> None:
        """Go offline, and tell the server if it is reachable."""
        with suppress(*FLEET_FAILURES):
            if self._node.node_id:
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        self._client.close()

    def receive(self) -> Message | None:
        """Return the next message, if any; it is delivered only once."""
        response = self._client.PullMessages(PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        tree, run = response.message_object_trees[0], response.messages_list[0].metadata.run_id
        try:
            return pull_message(self._client, self._node, run, tree, self._max_bytes, PULL_SECONDS)
        except httpx.HTTPStatusError as refused:
            if refused.response.status_code != RUN_OVER:
                raise
            return None

    def send(self, reply: Message) -> None:
        """Deliver the reply to a received message, as Flower's own client does: announce its parts, then push them."""
        run = reply.metadata.run_id
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            objects: dict[str, Any] = get_all_nested_objects(reply)
            response = self._client.PushMessages(
                PushMessagesRequest(
                    node=self._node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[get_object_tree(reply)],
                    clientapp_runtime_list=[0.0],  # seconds of work, which may depend on the data
                )
            )
            push = make_push_object_fn_protobuf(self._client.PushObject, self._node, run, response.session_id)
            push_objects(objects, push, object_ids_to_push=set(response.objects_to_push))
