"""Deferred packages: their own code runs when a name in them is first used, and not when a module below them is imported.

`import dp_accounting.dp_event` runs all of dp_accounting, which loads half of SciPy: 1.7 s of CPU for a table that
needs neither its statistics nor its signals. Flower imports an HTTP client that a simulation never calls.
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
_execution = threading.RLock()  # reentrant, since the code of one package may use a name of another
_executed: list[ModuleType] = []  # packages whose code runs or has run


class _Deferred(ModuleType):
    """Package whose code has not run yet. It becomes an ordinary module when a name is used that is no submodule."""

    def __getattr__(self, name: str) -> Any:
        """Return the submodule of this name, imported; for any other name run the package's code once, and look there."""
        # Python and inspection ask every module for such names; only `import *` asks for __all__.
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        if find_spec(f"{self.__name__}.{name}"):
            return import_module(f"{self.__name__}.{name}")
        with _execution:
            if self not in _executed:
                _executed.append(self)
                assert self.__spec__ is not None and self.__spec__.loader is not None
                self.__spec__.loader.exec_module(self)
                module: Any = self
                module.__class__ = ModuleType
        return ModuleType.__getattribute__(self, name)


def defer(*names: str) -> None:
    """Defer packages that will be imported later; those that are loaded already or not installed stay as they are."""
    for name in names:
        if name not in sys.modules and (spec := find_spec(name)):
            sys.modules[name] = module = module_from_spec(spec)
            module.__class__ = _Deferred


@contextmanager
def importing() -> Generator[None]:
    """Disable garbage collection in a block that imports PyTorch for the first time, which takes a sixth less time then."""
    first = "torch" not in sys.modules
    if first:
        gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
            gc.unfreeze()  # with freeze: all objects are in the oldest generation now, which is rarely searched
            gc.enable()
