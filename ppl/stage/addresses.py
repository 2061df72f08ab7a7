"""Addresses: nested dicts of choices, their dotted names, and wildcards over them.

Choices are plain nested dicts of arrays. A nested address is written ``"a.b"`` or ``("a", "b")``; ``"*"`` matches one
level of it and ``"**"`` any number of levels.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import AddressError

Address = str | tuple[str, ...]


def dotted(address: Address) -> str:
    """The dotted form of an address."""
    if isinstance(address, str):
        return address
    if isinstance(address, tuple) and all(isinstance(name, str) for name in address):
        return ".".join(address)
    raise TypeError(f"an address is a string or a tuple of strings, got {address!r}")


def flatten(tree: Mapping[Any, Any] | None) -> dict[str, Any]:
    """Turn a nested dict into ``{"a.b": leaf}``, in order. Keys may be dotted or tuples already.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in (tree or {}).items():
        key = dotted(key)
        if isinstance(value, Mapping):
            flat.update({f"{key}.{k}": v for k, v in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def unflatten(flat: Mapping[Any, Any]) -> dict[str, Any]:
    """Turn ``{"a.b": leaf}`` into a nested dict.

    >>> unflatten({"a.b": 1, "c": 2})
    {'a': {'b': 1}, 'c': 2}
    """
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *scopes, name = dotted(key).split(".")
        node = tree
        for scope in scopes:
            node = node.setdefault(scope, {})
        node[name] = value
    return tree


def get(tree: Mapping[Any, Any], address: Address) -> Any:
    """The entry of a nested dict at an address.

    Raises:
        AddressError: if there is no such entry. The message names the nearest address.
    """
    node: Any = tree
    for name in dotted(address).split("."):
        if not isinstance(node, Mapping) or name not in node:
            raise AddressError(unknown(dotted(address), flatten(tree)))
        node = node[name]
    return node


def matches(pattern: Address, address: Address) -> bool:
    """Whether an address matches a pattern with wildcards.

    >>> matches("a.*", "a.b"), matches("*", "a.b"), matches("**", "a.b"), matches("a", "a.b")
    (True, False, True, False)
    """
    return _match(tuple(dotted(pattern).split(".")), tuple(dotted(address).split(".")))


def _match(pattern: tuple[str, ...], address: tuple[str, ...]) -> bool:
    if not pattern:
        return not address
    if pattern[0] == "**":
        return any(_match(pattern[1:], address[i:]) for i in range(len(address) + 1))
    return bool(address) and pattern[0] in ("*", address[0]) and _match(pattern[1:], address[1:])


def covers(pattern: Address, address: Address) -> bool:
    """Whether a pattern matches an address or one of the scopes that hold it."""
    parts = dotted(address).split(".")
    return any(matches(pattern, ".".join(parts[: i + 1])) for i in range(len(parts)))


def select(tree: Mapping[Any, Any], patterns: Address | Iterable[Address]) -> dict[str, Any]:
    """The part of a nested dict whose addresses match one of the patterns. The name of a scope selects the whole scope.

    Raises:
        AddressError: if a pattern matches nothing.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    flat = flatten(tree)
    for pattern in patterns:
        if not any(covers(pattern, a) for a in flat):
            raise AddressError(unknown(dotted(pattern), flat))
    return unflatten({a: v for a, v in flat.items() if any(covers(p, a) for p in patterns)})


def nearest(address: str, known: Iterable[str]) -> str | None:
    """The known address that is most like the given one; None if none is like it."""
    found = difflib.get_close_matches(address, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown(address: str, known: Iterable[str], where: str = "") -> str:
    """The error message for an address that does not exist."""
    known = list(known)
    close = nearest(address, known)
    hint = f"; did you mean {close!r}?" if close else ""
    listing = ", ".join(repr(k) for k in known[:12]) + (", ..." if len(known) > 12 else "")
    return f"no address {address!r}{where}{hint} (there: {listing or 'none'})"
