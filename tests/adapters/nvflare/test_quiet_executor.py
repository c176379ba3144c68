"""The executor of a protected job: no metric of its script is an event of the federation."""

import pytest
from nvflare.apis.analytix import AnalyticsData, AnalyticsDataType
from nvflare.apis.fl_constant import EventScope, FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor, ExecutionMode

from fedveil.adapters.nvflare.quiet_executor import QuietExecutor


class Scopes:
    """An engine that lists the scope of each event."""

    def __init__(self) -> None:
        self.fired = list[str]()

    def fire_event(self, event: str, fl_ctx: FLContext) -> None:
        self.fired.append(str(fl_ctx.get_prop(FLContextKey.EVENT_SCOPE, EventScope.LOCAL)))


@pytest.mark.parametrize(
    ("kind", "scope"), [(ClientAPIExecutor, EventScope.FEDERATION), (QuietExecutor, EventScope.LOCAL)]
)
def test_metrics_of_a_script_stay_at_the_client(kind: type[ClientAPIExecutor], scope: str) -> None:
    executor = kind(execution_mode=ExecutionMode.EXTERNAL_PROCESS, command=["python3", "client.py"])
    executor.set_analytics_fire_fed_event(True)  # as the backend of such a process does
    engine, context = Scopes(), FLContext()
    context.set_prop(ReservedKey.ENGINE, engine, private=True, sticky=False)
    executor.fire_log_analytics(context, AnalyticsData("loss", 0.5, AnalyticsDataType.SCALAR).to_dxo())
    assert engine.fired == [scope]
