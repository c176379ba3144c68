"""A second device for machines without one: tensors that say they are on `meta`, hold numbers, and mix with no others.

Inside `other_device()` a tensor that is made on, or moved to, `meta` is an `Elsewhere`. Its operations run on the processor
and give such tensors again. An operation between it and a tensor on the processor raises, as a GPU's would, and so does
`.numpy()`. Copies in each direction are counted.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
ATEN = torch.ops.aten
# As on a GPU: an index may lie on the processor, and copies go anywhere.
CROSSING = {ATEN.copy_.default, ATEN._to_copy.default, ATEN.index.Tensor, ATEN._index_put_impl_.default,
            ATEN.index_put_.default, ATEN._foreach_copy_.default}  # fmt: skip


@dataclass
class Copies:
    there: int = 0
    back: int = 0


COPIES = Copies()


class Elsewhere(torch.Tensor):
    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False) -> Self:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Made(TorchDispatchMode):
    """Catch what makes tensors on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    there = [each for each in flat if isinstance(each, Elsewhere)]
    strays = [each for each in flat if not isinstance(each, Elsewhere) and each.dim() > 0]
    if there and strays and func not in CROSSING:
        raise RuntimeError(f"{func}: tensors on meta and on cpu, of shape {tuple(strays[0].shape)}")
    asked = kwargs.get("device")
    to = torch.device(asked) if asked is not None else None
    if func is ATEN._to_copy.default and to is not None:
        COPIES.there += to.type == DEVICE.type and not there
        COPIES.back += to.type == "cpu" and bool(there)
    if func is ATEN.copy_.default and isinstance(args[0], Elsewhere) != isinstance(args[1], Elsewhere):
        COPIES.there += isinstance(args[0], Elsewhere)
        COPIES.back += not isinstance(args[0], Elsewhere)
    if to is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    unwrap = lambda each: each.held if isinstance(each, Elsewhere) else each
    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if func is ATEN._local_scalar_dense.default:
        return out
    # In place: hand the same object back, as autograd expects.
    if there and func._schema.name.endswith("_") and isinstance(args[0], torch.Tensor):
        return args[0]
    on_device = to.type == DEVICE.type if to is not None else bool(there)
    if func is ATEN.copy_.default:
        return args[0]
    return tree_map(
        lambda each: Elsewhere(each) if isinstance(each, torch.Tensor) and on_device else each, out
    )


@contextmanager
def other_device() -> Generator[Copies]:
    """Let `meta` be a device in this block."""
    COPIES.there = COPIES.back = 0
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with Made():
            yield COPIES
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
