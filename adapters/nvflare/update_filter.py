"""Client's half of the private sum, as a filter of NVFLARE on the tasks that come and on the results that leave."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import Filter, FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply

from ...base.refusal import positive
from ...privacy.mechanisms.private_sum import Contribution, NotFinite, encode
from .exchange import SPEC, VECTOR, Model, float_arrays, layout_of, spec_of, terms_of

RECEIVED, ENCODED = (
    "fedveil.received",
    "fedveil.encoded",
)  # in the context of one task, which stays at the client


class UpdateFilter(Filter):
    """Filter that replaces a client's result by its clipped update on the lattice.

    It stands on both chains of a client, of a job or of a site's privacy scope. The update is the arrays that the script
    returns minus the arrays that came, or the differences that it returns. All else of the result stays at the client:
    metrics, meta, headers, texts of errors. A result of another task than `task_name` is replaced by an error code.

    Args:
      clipping_norm: L2 norm of the largest update, all parameters together, above 0.
      task_name: the one task whose result may leave.
    """

    def __init__(self, clipping_norm: float, task_name: str = "train") -> None:
        super().__init__()
        self.clipping_norm = positive("clipping_norm", clipping_norm)
        self.task_name = task_name

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Keep the model of a task that comes, or return the one vector of a result that leaves.

        Args:
          shareable: the task or the result.
          fl_ctx: context of the task.
        """
        if self.get_prop(FilterContextKey.CHAIN_TYPE) == FilterChainType.TASK_DATA_CHAIN:
            self._keep(shareable, fl_ctx)
            return shareable
        if fl_ctx.get_prop(ENCODED) is shareable:  # by the same filter of the site, before the job's
            return shareable
        if fl_ctx.get_prop(FLContextKey.TASK_NAME) != self.task_name:
            return make_reply(ReturnCode.TASK_UNSUPPORTED)
        if (code := shareable.get_return_code()) != ReturnCode.OK:
            return make_reply(code)
        try:
            reply = self._reply(from_shareable(shareable), fl_ctx)
        except Exception as error:  # noqa: BLE001 (of any kind; it may depend on the data, and only the owner may read it)
            self.log_exception(fl_ctx, f"the update cannot be encoded: {error}", fire_event=False)
            return make_reply(ReturnCode.EXECUTION_RESULT_ERROR)
        fl_ctx.set_prop(ENCODED, reply, private=True, sticky=False)
        return reply

    def _keep(self, shareable: Shareable, fl_ctx: FLContext) -> None:
        """Keep a copy of the model that came: the script may modify its own."""
        if fl_ctx.get_prop(FLContextKey.TASK_NAME) != self.task_name:
            return
        arrays = float_arrays(cast(Model, from_shareable(shareable).data))
        received = {name: value.copy() for name, value in arrays.items()}
        fl_ctx.set_prop(RECEIVED, received, private=True, sticky=False)

    def _reply(self, result: DXO, fl_ctx: FLContext) -> Shareable:
        """Return the reply with the vector of a result, and nothing else."""
        received = cast("dict[str, NDArray[np.floating]] | None", fl_ctx.get_prop(RECEIVED))
        if not received:
            raise ValueError("no model came: the filter must also be on the task data")
        spec = spec_of(self.clipping_norm, layout_of(received))
        update = update_of(result, received)
        try:
            vector: Contribution = encode(update, {}, spec)[0]
        except NotFinite as error:  # a failure would reveal it, uncharged
            self.log_warning(fl_ctx, f"{error}; this client answers with a zero update", fire_event=False)
            vector = encode({name: np.zeros_like(value) for name, value in update.items()}, {}, spec)[0]
        self.log_info(fl_ctx, f"stays at this client: {', '.join(sorted(result.meta)) or 'nothing'}")
        return DXO(DataKind.WEIGHT_DIFF, data={VECTOR: vector}, meta={SPEC: terms_of(spec)}).to_shareable()


def update_of(result: DXO, received: dict[str, NDArray[np.floating]]) -> dict[str, NDArray[np.floating]]:
    """Return a client's update, by name in the order of the model that came.

    Args:
      result: of the script, whole arrays or differences.
      received: the arrays that came and are averaged, by name.

    Raises:
      ValueError: the result is of another kind, or an array is missing or has another shape.
    """
    if result.data_kind not in (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF):
        raise ValueError(f"a result of the kind {result.data_kind} has no update")
    arrays = cast("dict[str, Any]", result.data)
    update = {name: np.asarray(arrays.get(name, ())) for name in received}
    for name, value in update.items():
        if value.shape != received[name].shape:
            raise ValueError(f"array {name} has shape {value.shape}, expected {received[name].shape}")
    if result.data_kind == DataKind.WEIGHT_DIFF:
        return update
    return {name: np.subtract(value, received[name]) for name, value in update.items()}
