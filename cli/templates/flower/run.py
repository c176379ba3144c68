"""Run of both halves in one process, without SuperLink and Ray: python run.py"""

import client_app
import server_app
from flwr.app import Context, RecordDict

from fedveil.simulations.in_process import InProcessGrid


def main() -> None:
    """Run the app and print the accuracy of its model."""
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    server_app.app(InProcessGrid(client_app.app, server_app.CLIENTS, {}), context)
    print(f"accuracy {server_app.accuracy('model.pt'):.3f}; fedveil budget show")


if __name__ == "__main__":
    main()
