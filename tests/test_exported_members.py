"""The public faces: every name is there, documented, with an example that runs, and the lists are sorted."""

import doctest
import enum
import inspect
import warnings
from importlib.metadata import version

import pytest

import fedveil
import fedveil.privacy
import fedveil.tasks
from fedveil.privacy.mechanisms.sum_spec import SumSpec

FACES = (fedveil, fedveil.privacy, fedveil.tasks)
PROMISED = {
    "simulate",
    "load",
    "plan",
    "protect",
    "private_update",
    "epsilon",
    "Task",
    "Examples",
    "Ledger",
    "Budget",
}


@pytest.mark.parametrize("module", FACES, ids=lambda module: module.__name__)
def test_all_lists_the_public_names(module: object) -> None:
    names = getattr(module, "__all__")  # noqa: B009
    assert list(names) == sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert all(hasattr(module, name) for name in names)


def test_the_promised_names() -> None:
    assert {"Budget", "Release", "Ledger", "Plan", "epsilon"} <= set(fedveil.privacy.__all__)
    assert PROMISED <= set(fedveil.__all__) <= set(dir(fedveil))
    assert sorted(fedveil._HOMES) == sorted(fedveil.__all__)


@pytest.mark.parametrize("name", fedveil.__all__)
def test_name_of_the_face_documents_arguments_and_errors(name: str) -> None:
    member = getattr(fedveil, name)
    text = inspect.getdoc(member) or ""
    if inspect.isfunction(member):
        assert "Args:" in text and ("Returns:" in text or "Return " in text), name
        arguments = text.partition("Args:")[2]
        assert all(f"{each}:" in arguments for each in inspect.signature(member).parameters if each != "keys")
    elif not issubclass(member, enum.Enum):
        fields = getattr(member, "__dataclass_fields__", {})
        told = [each for each, field in fields.items() if field.init and not each.startswith("_")]
        assert all(f"{each}:" in text for each in told), name
    assert "Example:" in text, name


@pytest.mark.parametrize("name", [*fedveil.__all__, fedveil.privacy.Plan, SumSpec])
def test_the_example_of_a_name_runs(name: str | type, capsys: pytest.CaptureFixture[str]) -> None:
    text = inspect.getdoc(getattr(fedveil, name) if isinstance(name, str) else name) or ""
    example = doctest.DocTestParser().get_doctest(text, {}, str(name), None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = doctest.DocTestRunner().run(example)
    assert done.attempted > 1 and done.failed == 0, capsys.readouterr().out


def test_the_version_is_the_packages() -> None:
    assert fedveil.__version__ == version("fedveil")
