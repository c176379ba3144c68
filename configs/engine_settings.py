"""Models of the group engine: where the clients of a simulation train."""

from typing import Annotated, ClassVar, Literal, Protocol

from pydantic import BeforeValidator, Field

from .group import Group, remedy
from .values import Positive


def _decimal(value: object) -> object:
    """Return a whole number in decimal, and any other value unchanged."""
    if type(value) is int:
        return str(value)
    return value


def _none_if_auto(value: object) -> object:
    """Return None for auto, and any other value unchanged."""
    return None if value == "auto" else value


_EXAMPLES = "must be auto, or a whole number of at least 1"
AtOnce = Annotated[str, BeforeValidator(_decimal), remedy(_EXAMPLES, pattern=r"^(auto|[1-9][0-9]{0,8})$")]


class Engine(Protocol):
    """Settings that every engine has, as they are described in `InProcess`.

    `address` is that of a cluster of machines, and `elsewhere` whether clients and their ledgers may be on other machines.
    """

    @property
    def option(self) -> str: ...
    @property
    def workers(self) -> int | None: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> Literal["float32", "bfloat16"]: ...
    @property
    def examples_at_once(self) -> str: ...
    @property
    def deadline(self) -> float: ...
    @property
    def address(self) -> str | None: ...
    @property
    def elsewhere(self) -> bool: ...


class InProcess(Group):
    """Engine on this machine: clients run in this process or, with more workers, in as many processes."""

    name: Literal["inprocess"] = "inprocess"
    workers: Annotated[Annotated[int, Field(ge=1, le=1024)] | None, BeforeValidator(_none_if_auto)] = None
    """Processes; null or auto: one for each GPU, or for each core that is idle in the first second of training."""
    device: Annotated[
        str,
        remedy(
            "must be auto, cpu, mps, cuda, or one GPU as cuda:N",
            pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$",
        ),
    ] = "cpu"
    """Device on which models train and are evaluated; auto: a CUDA GPU if there is one. Workers share several GPUs."""
    dtype: Annotated[Literal["float32", "bfloat16"], remedy("float16 would need a loss that is scaled")] = (
        "float32"
    )
    """Precision of models, by autocast; parameters and updates stay in float32."""
    examples_at_once: AtOnce = "auto"
    """Examples in memory at a time in steps of DP-SGD and evaluations; auto: as many as 256 MiB for each thread hold."""
    deadline: Positive = 60.0
    """Seconds until one client's reply is late."""
    address: ClassVar[None] = None
    elsewhere: ClassVar[bool] = False
