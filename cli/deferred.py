"""Packages whose own code runs when a name of theirs is used, and not when a module inside them is imported.

`import dp_accounting.dp_event` runs all of dp_accounting, which loads half of SciPy: 1.7 s of CPU for a table that
needs neither its statistics nor its signals. Flower imports an HTTP client that a simulation never calls. A package
deferred here costs nothing until a name that is not a submodule is accessed; it is then imported as usual.
"""

import gc
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

HEAVY = "dp_accounting", "httpx", "scipy.signal", "scipy.stats"
_running = threading.RLock()  # held by the thread that runs one; what it runs may ask for another
_started: list[ModuleType] = []


class _Deferred(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        if find_spec(f"{self.__name__}.{name}"):
            return import_module(f"{self.__name__}.{name}")
        with _running:
            if self not in _started:
                _started.append(self)
                assert self.__spec__ is not None and self.__spec__.loader is not None
                self.__spec__.loader.exec_module(self)
                module: Any = self
                module.__class__ = ModuleType
        return ModuleType.__getattribute__(self, name)


def defer(*names: str) -> None:
    """Defer these packages, except those that are loaded already."""
    for name in names:
        spec = None if name in sys.modules else find_spec(name)
        if spec is not None:
            sys.modules[name] = module = module_from_spec(spec)
            module.__class__ = _Deferred


@contextmanager
def importing() -> Generator[None]:
    """Look for no garbage while the block imports PyTorch for the first time: a sixth of its time would go into that."""
    first = "torch" not in sys.modules
    if first:
        gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
            gc.unfreeze()  # all objects are of the oldest generation now
            gc.enable()
