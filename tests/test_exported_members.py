"""The public face: every name in ``__all__`` is there, and the lists are sorted."""

import pytest

import fedveil
import fedveil.privacy
import fedveil.tasks

FACES = (fedveil.privacy, fedveil.tasks)


@pytest.mark.parametrize("module", FACES, ids=lambda module: module.__name__)
def test_all_is_what_the_module_shows(module: object) -> None:
    names = getattr(module, "__all__")  # noqa: B009
    assert list(names) == sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert all(hasattr(module, name) for name in names)


def test_the_promised_names() -> None:
    promised = {"Budget", "Release", "Ledger", "Plan", "epsilon"}
    assert promised <= set(fedveil.privacy.__all__)


def test_the_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert fedveil.__version__ == version("fedveil")
