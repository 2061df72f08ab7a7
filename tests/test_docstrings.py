"""Every public name says what it does."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import weft.inference
import weft.models
import weft.ppl

import weft


def public() -> Iterator[tuple[str, Any]]:
    """Every public name of Weft's own, and every public method and property of its classes."""
    for module in (weft, weft.ppl, weft.inference, weft.models):
        for name in dir(module):  # also what is loaded on first use
            value = getattr(module, name)
            own = getattr(value, "__module__", "").split(".")[0] == "weft"
            if name.startswith("_") or inspect.ismodule(value) or not own:
                continue
            yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                for attribute, member in vars(value).items():
                    if attribute.startswith("_"):
                        continue
                    if inspect.isroutine(member) or isinstance(member, property):
                        yield f"{module.__name__}.{name}.{attribute}", getattr(value, attribute)


PUBLIC = dict(public())


def test_the_list_holds_what_everybody_uses():
    assert {
        "weft.gen",
        "weft.sample",
        "weft.inference.nuts",
        "weft.inference.Draws.summary",
    } <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_docstring(name):
    assert (inspect.getdoc(PUBLIC[name]) or "").strip(), f"{name} has no docstring"
