"""Settings of the engines on other machines: the group engine."""

from typing import Annotated, ClassVar, Literal

from ..configs.engine_settings import AtOnce, InProcess
from ..configs.group import Group
from ..configs.values import By, Positive, Text


class Ray(Group):
    """Engine of actors on Ray: one machine, or a cluster by its address."""

    name: Literal["ray"] = "ray"
    address: Text | None = None
    """Address of a running cluster, such as auto or ray://head:10001; null: this machine."""
    num_cpus: Positive | None = None
    """CPUs, one for each actor; null: all that Ray has."""
    workers: ClassVar[None] = None
    device: ClassVar[Literal["cpu"]] = "cpu"
    dtype: ClassVar[Literal["float32"]] = "float32"
    elsewhere: ClassVar[bool] = True
    examples_at_once: AtOnce = "auto"
    """As of engine=inprocess, in each actor."""
    deadline: Positive = 60.0
    """Seconds until one client's reply is late."""


ENGINE = Annotated[InProcess | Ray, By]
