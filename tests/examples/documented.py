"""Writes the stock Flower app, as it is or edited as docs/flower-app.md says, and imports it."""

import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

ROOT = Path(__file__).parents[2]
STOCK = Path(__file__).parent / "stock_flower"
PAGE = ROOT / "docs" / "flower-app.md"
RUN_CONFIG: dict[str, Any] = {"fraction-train": 1.0, "num-server-rounds": 3, "lr": 0.5, "local-epochs": 3}


@dataclass(frozen=True)
class Edit:
    """One ```diff block: a text that stands once in a file, and what takes its place."""

    file: str
    before: str
    after: str


@dataclass(frozen=True)
class App:
    """A Flower app in a folder of its own."""

    server: ServerApp
    client: ClientApp

    def run(self, grid: Grid) -> None:
        """Run the server's half on this grid, as Flower does."""
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=RUN_CONFIG)
        self.server(grid, context)


def documented_edits() -> list[Edit]:
    """Return the edits that the page shows, in its order."""
    blocks = re.findall(r"^```diff (\S+)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return [Edit(file, _side(body, "-"), _side(body, "+")) for file, body in blocks]


def _side(body: str, sign: str) -> str:
    return "".join(line[1:] for line in body.splitlines(keepends=True) if line[:1] in (" ", sign))


def write_app(folder: Path, edits: list[Edit]) -> None:
    """Write the app as the package `stock_flower` in this folder."""
    package = folder / "stock_flower"
    package.mkdir(parents=True)
    for source in STOCK.glob("*.py"):
        text = source.read_text()
        for edit in edits:
            if edit.file == source.name:
                assert text.count(edit.before) == 1, edit
                text = text.replace(edit.before, edit.after)
        (package / source.name).write_text(text)


def import_app(folder: Path) -> App:
    """Import the app that stands in this folder; another one of the same name is forgotten."""
    for name in [name for name in sys.modules if name.split(".")[0] == "stock_flower"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        server = importlib.import_module("stock_flower.server_app").app
        return App(server, importlib.import_module("stock_flower.client_app").app)
    finally:
        sys.path.remove(str(folder))


def accuracy(model: Path) -> float:
    """Return the share of all clients' test data that the app's saved model gets right."""
    import torch

    task = importlib.import_module("stock_flower.task")
    net = task.Net()
    net.load_state_dict(torch.load(model))
    shares = [task.test(net, task.load_data(client, 20)[1])[1] for client in range(20)]
    return sum(shares) / len(shares)
