"""Executor of NVFLARE's client scripts whose metrics stay at the client."""

from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor


class QuietExecutor(ClientAPIExecutor):
    """Executor that sends no metric of a script which runs in a process of its own; arguments as of NVFLARE's.

    NVFLARE's own sends these to the server past all filters. Here they are an event at the client, as those of a script in the
    client's process are.
    """

    def set_analytics_fire_fed_event(self, enabled: bool) -> None:
        """Keep metrics at the client, whatever a backend asks for.

        Args:
          enabled: ignored.
        """
        super().set_analytics_fire_fed_event(False)
