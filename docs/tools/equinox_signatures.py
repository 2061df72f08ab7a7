"""A Griffe extension: the signature of an Equinox module or a named tuple is made of its fields.

Griffe reads source code. Of generated `__init__` methods it knows those of classes decorated with `@dataclass`. A class
that derives from `equinox.Module` or `NamedTuple` has one too: a parameter for each annotated field, the fields of its
bases first. This extension adds that method, and the reference shows it with annotations and defaults.
"""

from __future__ import annotations

from collections.abc import Iterator

import griffe

BASES = ("equinox.Module", "typing.NamedTuple")
NOT_FIELDS = ("ClassVar", "AbstractClassVar")


class EquinoxSignatures(griffe.Extension):
    """Gives every such class of a package an `__init__` with its fields as parameters."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Once the package is loaded, so that bases in other files are known."""
        for cls in classes(pkg):
            if "__init__" not in cls.members and has_fields(cls):
                cls.set_member("__init__", init_of(cls))


def classes(scope: griffe.Module | griffe.Class) -> Iterator[griffe.Class]:
    """Every class that is written in a module, at any depth."""
    for member in scope.members.values():
        if member.is_alias:
            continue
        if isinstance(member, griffe.Class):
            yield member
        if isinstance(member, (griffe.Module, griffe.Class)):
            yield from classes(member)


def has_fields(cls: griffe.Class) -> bool:
    """Whether a class derives from one of `BASES`, directly or not."""
    lineage = [cls, *cls.mro()]
    return any(str(getattr(b, "canonical_path", b)) in BASES for c in lineage for b in c.bases)


def init_of(cls: griffe.Class) -> griffe.Function:
    """The `__init__` that is generated."""
    parameters: dict[str, griffe.Parameter] = {}
    for base in [*reversed(cls.mro()), cls]:
        inherited = base.members.get("__init__")
        if inherited is not None and "generated" not in inherited.labels:
            parameters = {p.name: p for p in list(inherited.parameters)[1:]}  # written by hand
            continue
        for member in base.members.values():
            parameter = field_of(member)
            if parameter is not None:
                parameters[member.name] = parameter
            elif member.is_function or member.is_attribute:
                parameters.pop(member.name, None)  # no longer a field
    receiver = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
    init = griffe.Function(
        "__init__", parameters=griffe.Parameters(receiver, *parameters.values()), parent=cls
    )
    init.labels.add("generated")
    return init


def field_of(member: griffe.Object | griffe.Alias) -> griffe.Parameter | None:
    """The parameter that a member of a class stands for, if it is a field."""
    if not isinstance(member, griffe.Attribute) or member.annotation is None:
        return None
    if (
        "property" in member.labels
        or str(member.annotation).split("[")[0].split(".")[-1] in NOT_FIELDS
    ):
        return None
    if (
        "instance-attribute" not in member.labels and "class-attribute" in member.labels
    ):  # griffe unwraps ClassVar
        return None
    default = member.value
    if isinstance(default, griffe.ExprCall) and str(default.function).split(".")[-1] == "field":
        given = {a.name: a.value for a in default.arguments if isinstance(a, griffe.ExprKeyword)}
        if str(given.get("init")) == "False":
            return None
        default = given.get("default", given.get("default_factory"))
    return griffe.Parameter(
        member.name,
        annotation=member.annotation,
        kind=griffe.ParameterKind.positional_or_keyword,
        default=default,
        docstring=member.docstring,
    )
