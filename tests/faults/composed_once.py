"""Memory of what Hydra composes of the same choices: a third of the time of a short run is spent on it.

Only what packages hold is kept: files of a user may change between two calls.
"""

import copy
import pickle
from typing import Any

PACKAGED = ("pkg", "structured")
COMPOSED = "_compose_config_from_defaults_list"
USUAL = (
    ["task=digits"],
    ["task=digits", "privacy=record"],
    ["task=digits", "privacy=record_distributed"],
    ["task=heart", "privacy=record"],
)
KEPT: dict[Any, bytes] = {}


def remember(patch: Any) -> None:
    """Let `patch`, as pytest's monkeypatch does, put the memory in the places of Hydra's own functions."""
    from hydra._internal import config_loader_impl, config_repository, defaults_list
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.plugins import Plugins

    Plugins.instance()
    source: Any = SourcesRegistry.instance().resolve("pkg")
    loader: Any = config_loader_impl.ConfigLoaderImpl
    true: Any = vars(defaults_list)["_create_interpolation_map"]
    read, listed, whole = source.load_config, defaults_list.create_defaults_list, vars(loader)[COMPOSED]

    def map_of(overrides: Any, listed: Any, own: bool) -> Any:
        return true(overrides, listed, own) if any(each.is_interpolation() for each in listed) else None

    def once(key: Any, make: Any) -> Any:
        if key not in KEPT:
            KEPT[key] = pickle.dumps(make())
        return pickle.loads(KEPT[key])  # noqa: S301 (of these very bytes)

    def load_config(self: Any, config_path: str) -> Any:
        return once((self.provider, self.path, config_path), lambda: read(self, config_path))

    def create_defaults_list(repo: Any, overrides_list: Any, **more: Any) -> Any:
        places = _places(repo)
        if places is None or any(each.is_sweep_override() for each in overrides_list):
            return listed(repo=repo, overrides_list=overrides_list, **more)
        values = [each for each in overrides_list if _is_value(repo, each)]
        choices = [each for each in overrides_list if not any(each is value for value in values)]
        key = places, tuple(each.input_line for each in choices), tuple(more.items())
        made = once(key, lambda: listed(repo=repo, overrides_list=choices, **more))
        made.config_overrides[:] = values
        return made

    def compose(self: Any, defaults: Any, repo: Any) -> Any:
        if (places := _places(repo)) is None:
            return whole(self, defaults, repo)
        return once((places, repr(defaults)), lambda: whole(self, defaults, repo))

    patch.setattr(config_repository.ConfigRepository, "__deepcopy__", lambda self, _: copy.copy(self), False)
    patch.setattr(source, "load_config", load_config)
    patch.setattr(defaults_list, "_create_interpolation_map", map_of)
    patch.setattr(config_loader_impl, "create_defaults_list", create_defaults_list)
    patch.setattr(loader, COMPOSED, compose)


def compose_usual() -> None:
    """Compose what most commands begin with, so that forks of this process need not."""
    from fedveil.configs.settings import settings_from_overrides

    for words in USUAL:
        settings_from_overrides(words)


def _places(repo: Any) -> tuple[tuple[str, str], ...] | None:
    """Return where configurations come from; nothing if a place is not of a package."""
    sources = repo.get_sources()
    packaged = all(each.scheme() in PACKAGED for each in sources)
    return tuple((each.provider, each.path) for each in sources) if packaged else None


def _is_value(repo: Any, override: Any) -> bool:
    """Whether an override changes a key, and chooses no file."""
    return isinstance(override.value(), dict) or not repo.group_exists(override.key_or_group)
