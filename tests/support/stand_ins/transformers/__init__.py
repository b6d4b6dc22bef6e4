"""A stand-in for transformers, whose import takes a second: nothing that is tested calls it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Anything(type):
    """The type of a class that has every method, as mlx_lm registers a tokenizer."""

    def __getattr__(cls, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


def _stand_in(name: str) -> type:
    """Return an empty class for any name that is imported from here."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (), {})


class _Submodules(MetaPathFinder, Loader):
    """A finder of every submodule, which gives each name an empty class too."""

    def find_spec(self, name: str, _: Sequence[str] | None, __: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.startswith(f"{__package__}.") else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _stand_in  # type: ignore[method-assign]


__getattr__ = _stand_in
sys.meta_path.append(_Submodules())
