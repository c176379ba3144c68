"""Training order of a server to every client of a round: training parameters and privacy promise. All of it is public.

The order is sent as JSON in the strategy's own configuration record, so that secure aggregation binds it to the round
like the model. A client checks it against its owner's policy and merges it with the owner's settings: the task, the
data, the budget. Record-level noise is not in it: each client plans its own from the number of its records.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from ..base.bounded_decoding import RARE, Undecodable, build, check_fields, plain_of, read_json
from ..base.refusal import Form, OneOf, Range, Refusal, real
from ..privacy.arms import Arm
from ..privacy.budget import Adjacency, Budget, Unit
from .local_training import GRAD_NORM, ORDERED, LocalTraining

if TYPE_CHECKING:
    from flwr.app import RecordDict

ORDER_KEY = "fedveil-training"  # in the strategy's configuration record
MAX_ORDER_BYTES = 8192  # one has under 700, and 100 more for each column that it scales
MAX_SCALED = 32  # columns that are scaled, the limit of one question
OWN_LAYERS = "layers that stay at their client"  # option of every task: an `OwnLayers` as plain data
OF_ORDERS = "moments", OWN_LAYERS  # options of tasks that an order adds
HEAD = (
    "the layers that stay have seen a record before its noise, so an update computed with them is not hidden by it; use "
    "personal=after, which trains them after the release"
)
MAX_RUN = 200  # characters of a run's name
DIGEST = Form("[0-9a-f]{64}", "give 64 hexadecimal digits")
NEW = "@"  # between a run's display name and the part that makes it unique
MAX_RUNS = 1000  # that share one budget
MAX_PARTICIPATIONS = 100_000  # as many rounds as the configuration allows
MAX_PER_PERSON = 100  # as many examples as the configuration allows
ABOVE_0 = Range(gt=0)
DELTA = Range(gt=0, lt=1)
RUN_NAME = Form(f".{{1,{MAX_RUN}}}", f"give a name of 1 to {MAX_RUN} printable characters")  # on ledgers
GRADIENTS = ("auto", "hooks", "ghost", "book_keeping", "vmap", "one_by_one")


class ModeName(StrEnum):
    """Name of a mode of privacy: an option of the configuration's group `privacy`."""

    NONE = "none"
    RECORD = "record"
    CLIENT_CENTRAL = "client_central"
    CLIENT_DISTRIBUTED = "client_distributed"
    RECORD_AND_CLIENT = "record_and_client"
    RECORD_DISTRIBUTED = "record_distributed"


CENTRAL_MODES = (ModeName.CLIENT_CENTRAL, ModeName.RECORD_AND_CLIENT)  # the server sees single updates
CLIENT_MODES = (*CENTRAL_MODES, ModeName.CLIENT_DISTRIBUTED)
STEP_MODES = (ModeName.RECORD_DISTRIBUTED,)
ENCRYPTED_MODES = (ModeName.CLIENT_DISTRIBUTED, *STEP_MODES)  # their sums are always encrypted
RECORD_MODES = (ModeName.RECORD, ModeName.RECORD_AND_CLIENT, *STEP_MODES)


@dataclass(frozen=True)
class ClientClaim:
    """Claim of the server about the noise that hides whole clients.

    Attributes:
      noise_multiplier: std of the fresh, independent noise of each round's sum / sensitivity under `adjacency`, above 0.
      adjacency: of clients.

    Raises:
      Refusal: a value is out of range.
    """

    noise_multiplier: Annotated[float, ABOVE_0]
    adjacency: Adjacency

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class RecordTerms:
    """Terms of DP-SGD on records: in an order and in settings. A client's own cap may lower the budget of an order.

    Attributes:
      target_epsilon, target_delta: budget of a client's records, as in `Budget`.
      max_grad_norm: clipping norm of each example's gradient, from 1e-9 to 1e9.
      adjacency: of records.
      participations: number of rounds for which a client plans its noise, at least 1; an upper quantile of its draws.
      gradients: `auto`, or a name of `client.dp_sgd.train.ENGINES`; only speed differs.
      runs: number of runs that share the budget.
      per_person: largest number of one person's examples in training, for privacy per person; None: per example.
      clients_per_person: largest number of clients in the attempt's roster whose examples of one person are in one sum;
        None sets no limit, and each client's examples are a unit. Only with a sampling rate, where the noise is that of
        all clients.
      sample_rate: probability, in (0, 1], with which each record is drawn for one step on all clients' records, with
        the noise that the cohort agreed on; None if each client trains separately with its own noise.

    Raises:
      Refusal: a value is out of range.
    """

    target_epsilon: Annotated[float, ABOVE_0]
    target_delta: Annotated[float, DELTA]
    max_grad_norm: Annotated[float, GRAD_NORM]
    adjacency: Adjacency
    participations: Annotated[int, Range(ge=1, le=MAX_PARTICIPATIONS)] = 1
    gradients: Annotated[str, OneOf(GRADIENTS)] = "auto"
    runs: Annotated[int, Range(ge=1, le=MAX_RUNS)] = 1
    per_person: Annotated[int, Range(ge=1, le=MAX_PER_PERSON)] | None = None
    clients_per_person: Annotated[int, Range(ge=1, le=MAX_PER_PERSON)] | None = None
    sample_rate: Annotated[float, Range(gt=0, le=1)] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.per_person or 1) > 1 and self.adjacency is Adjacency.REPLACE_ONE:
            raise Refusal("per_person", self.per_person, "no accountant supports several replaced examples")
        if self.clients_per_person is not None and (self.per_person is None or self.sample_rate is None):
            remedy = "requires per_person and a sampling rate"
            raise Refusal("clients_per_person", self.clients_per_person, remedy)

    @cached_property
    def budget(self) -> Budget:
        """Budget of the records, or of the persons who have them."""
        if self.per_person is None:
            unit = Unit.RECORD
        else:
            unit = Unit.PERSON if self.clients_per_person is None else Unit.PERSON_EVERYWHERE
        return Budget(unit, self.target_epsilon, self.target_delta, self.adjacency)

    @property
    def records_of_unit(self) -> int:
        """Largest number of one unit's records in one sum, each drawn by its own coin."""
        return (self.per_person or 1) * (self.clients_per_person or 1)


@dataclass(frozen=True)
class OwnLayers:
    """Parts of the model that stay at their client, which stores them from round to round.

    Attributes:
      patterns: of names of parameters and buffers, such as `head.*`; see `fnmatch`.
      rounds: number of the newest rounds that a client may have to go back to: those from one checkpoint to the next.

    Raises:
      Refusal: a value is out of range.
    """

    patterns: tuple[str, ...]
    rounds: Annotated[int, Range(ge=1, le=MAX_PARTICIPATIONS)]

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.patterns:
            raise Refusal("own_layers", [], "name at least one pattern, such as head.*")


@dataclass(frozen=True)
class TrainingOrder:
    """Order of one round's training.

    Attributes:
      run: name of the run on ledgers, the same as the instruction's.
      privacy: mode of protection.
      training: parameters; in JSON its keys are among the others, without those that a strategy sets.
      client: given if and only if `privacy` protects clients.
      record: given if and only if `privacy` protects records; has a sampling rate if and only if a round is one step on
        the records of all clients.
      agreement: hash of the server's schema and model, from `tasks.arrays.agreement_of`; None if the task has no schema.
      held_out: share of its records that a client holds out for evaluation; None holds out none.
      group_equal_rows: whether equal records are held out together, as a server of an earlier release expects; JSON says
        the opposite, `singly`, and only if records are held out.
      arm: arm of tuning that the round trains; in JSON only if given.
      moments: mean and deviation of table columns by name, from the clients' answer, to scale inputs; in JSON only if
        given.
      own_layers: parts of the model that stay at their client; in JSON only if given. Incompatible with a mode that
        protects records.

    Raises:
      Refusal: a value is out of range, or incompatible with `privacy`.
    """

    run: Annotated[str, RUN_NAME]
    privacy: ModeName
    training: LocalTraining
    client: ClientClaim | None = None
    record: RecordTerms | None = None
    agreement: Annotated[str, DIGEST] | None = None
    held_out: Annotated[float, Range(gt=0, lt=1)] | None = None
    group_equal_rows: bool = False
    arm: Annotated[Arm | None, RARE] = None
    moments: Annotated[Mapping[str, tuple[float, float]] | None, RARE, "checked by _moments"] = None
    own_layers: Annotated[OwnLayers | None, RARE] = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.held_out is not None and self.record is not None and self.privacy not in STEP_MODES:
            # The held-out records depend on their content: their number would reveal single records, share by share. A
            # step on the records of all clients has a given rate, and no released number depends on how many train.
            remedy = "the number of training records would reveal which they are"
            raise Refusal("held_out", self.held_out, f"is incompatible with privacy={self.privacy}: {remedy}")
        if self.own_layers and self.record:
            raise Refusal(
                "own_layers",
                list(self.own_layers.patterns),
                f"is incompatible with privacy={self.privacy}: {HEAD}",
            )
        object.__setattr__(self, "moments", _moments(self.moments) if self.moments else None)
        for name, value, modes in (
            ("client", self.client, CLIENT_MODES),
            ("record", self.record, RECORD_MODES),
            ("sample_rate", self.sample_rate, STEP_MODES),
        ):
            if (value is not None) != (self.privacy in modes):
                raise Refusal(name, value, f"is incompatible with privacy={self.privacy}")

    @property
    def sample_rate(self) -> float | None:
        """Rate at which all clients' records are sampled into one step; None if each client trains separately."""
        return self.record and self.record.sample_rate

    @property
    def task_options(self) -> dict[str, object]:
        """Options that the order adds to those of the owner's task: the scaling of tables' inputs, layers that stay."""
        options = dict(zip(OF_ORDERS, (self.moments, plain_of(self.own_layers)), strict=True))
        return {name: value for name, value in options.items() if value}

    def to_json(self) -> str:
        """Return the order as JSON, the same for equal orders."""
        plain = plain_of(replace(self, arm=None))
        training, group_equal_rows = plain.pop("training"), plain.pop("group_equal_rows")
        if self.arm is not None:
            plain["arm"] = self.arm.to_json()
        if self.held_out is not None and not group_equal_rows:
            plain["singly"] = True
        return json.dumps({**plain, **{name: training[name] for name in ORDERED}}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TrainingOrder:
        """Return the order that `to_json` wrote.

        Raises:
          Refusal: the text is not an order: too long, not JSON, with an extra or missing key, or an invalid value.
        """
        if len(text) > MAX_ORDER_BYTES:
            raise Refusal(ORDER_KEY, f"{len(text)} bytes", f"an order has at most {MAX_ORDER_BYTES} bytes")
        try:
            plain = read_json(text)
        except Undecodable as error:
            raise Refusal(ORDER_KEY, text[:40], "is not JSON") from error
        if not isinstance(plain, dict) or plain.keys() - RARE_KEYS != KEYS:
            raise Refusal(ORDER_KEY, str(plain)[:40], f"must have exactly the keys {', '.join(sorted(KEYS))}")
        singly, arm = plain.pop("singly", None), plain.pop("arm", None)
        if singly is not None and singly is not True:
            raise Refusal("singly", singly, "must be true, or left out")
        plain["group_equal_rows"] = singly is None and plain["held_out"] is not None
        plain["arm"] = None if arm is None else Arm.from_json(arm)
        try:
            plain["training"] = build(LocalTraining, {name: plain.pop(name) for name in ORDERED})
            return build(cls, plain, whole=True)
        except ValueError as error:
            raise Refusal(ORDER_KEY, text[:40], f"is no order ({error})") from error


RARE_KEYS = {"arm", "moments", "own_layers", "singly"}
KEYS = {each.name for each in fields(TrainingOrder)} - {"training", "group_equal_rows", *RARE_KEYS} | {
    *ORDERED
}
"""Keys that an order in JSON must have; those of `RARE_KEYS` may be left out."""


def read_order(content: RecordDict) -> TrainingOrder | None:
    """Return the order in an instruction, or None if it has none.

    Raises:
      Refusal: it has two, or one that cannot be read.
    """
    from .flower_adapter import values_under  # Flower is slow to import, and plans use orders

    orders = values_under(content, ORDER_KEY)
    if not orders:
        return None
    if len(orders) > 1 or not isinstance(orders[0], str):
        raise Refusal(ORDER_KEY, f"{len(orders)} values", "an instruction must have one order, as text")
    return TrainingOrder.from_json(orders[0])


def _moments(plain: object) -> dict[str, tuple[float, float]]:
    """Return the mean and deviation of columns by name, from a mapping of lists or tuples.

    Raises:
      Refusal: the value is no such mapping, or has too many columns.
    """
    if not isinstance(plain, Mapping) or not len(plain) <= MAX_SCALED:
        raise Refusal("moments", str(plain)[:40], f"must be a group of at most {MAX_SCALED} columns")
    moments: dict[str, tuple[float, float]] = {}
    for name, pair in plain.items():
        if not isinstance(name, str) or not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Refusal("moments", str(name)[:40], "must be a column with its mean and deviation")
        moments[name] = real("moments", pair[0]), ABOVE_0.check(float, "moments", pair[1])
    return moments


def display_name(run: str) -> str:
    """Return a run's name without the part that a server adds for fresh noise."""
    return run.partition(NEW)[0]
