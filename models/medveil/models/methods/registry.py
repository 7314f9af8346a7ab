"""Every method under its name: what a command line, a bundle's recipe and a bench choose from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from medveil.models.methods import ar, em, em_classwise, lsp, rem, salm, tap
from medveil.models.methods.base import Method, named

__all__ = ["REGISTRY", "get"]

_METHODS: tuple[Method[Any], ...] = (
    salm.METHOD,
    em.METHOD,
    em_classwise.METHOD,
    rem.METHOD,
    tap.METHOD,
    lsp.METHOD,
    ar.METHOD,
)

REGISTRY: Mapping[str, Method[Any]] = MappingProxyType({method.info.name: method for method in _METHODS})


def get(name: str) -> Method[Any]:
    """Return the method called ``name``.

    Raises:
        ConfigurationError: "unknown-method"; the sentence lists the names there are.
    """
    return named(REGISTRY, name)
