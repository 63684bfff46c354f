"""Signatures of equinox modules in the API reference: their fields are the arguments of their constructor.

Griffe reads the package for mkdocstrings without importing it. It knows that the fields of a `dataclasses.dataclass`
are arguments. This extension tells it the same about subclasses of `equinox.Module`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import griffe

MODULE = "equinox.Module"
FIELD = "equinox.field"
ABSTRACT = ("equinox.AbstractVar", "equinox.AbstractClassVar")


class EquinoxSignatures(griffe.Extension):
    """Give each equinox module that writes no `__init__` the one that equinox makes from its fields."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Visit every class of a loaded package.

        Args:
            pkg: the loaded package.
            **kwargs: further arguments of griffe, which are not used.
        """
        for class_ in _classes(pkg):
            if not _is_module(class_) or "__init__" in class_.members:
                continue
            modules = [base for base in class_.mro() if _is_module(base)]
            if any("__init__" in base.members and base.members["__init__"].lineno for base in modules):
                continue  # a written `__init__` is inherited
            fields: dict[str, griffe.Parameter] = {}
            for base in [*reversed(modules), class_]:
                fields.update(_fields(base))
            if not fields:
                continue
            self_ = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
            init = griffe.Function("__init__", parameters=griffe.Parameters(self_, *fields.values()), parent=class_)
            class_.set_member("__init__", init)


def _classes(parent: griffe.Module | griffe.Class) -> Iterator[griffe.Class]:
    """The classes below a module or class, without those that it imports."""
    for member in list(parent.members.values()):
        if member.is_alias:
            continue
        if isinstance(member, griffe.Class):
            yield member
        if isinstance(member, griffe.Class | griffe.Module):
            yield from _classes(member)


def _is_module(class_: griffe.Class) -> bool:
    """Whether a class derives from `equinox.Module`."""
    paths = [base.canonical_path for base in class_.bases if isinstance(base, griffe.Expr)]
    return MODULE in paths or any(_is_module(base) for base in class_.mro())


def _fields(class_: griffe.Class) -> dict[str, griffe.Parameter]:
    """The arguments that a class's own fields become, by their names."""
    found = {}
    for member in class_.members.values():
        if not isinstance(member, griffe.Attribute) or member.annotation is None or "property" in member.labels:
            continue
        # Griffe gives an annotated value without `ClassVar` both labels, and one with it the first alone.
        if "class-attribute" in member.labels and "instance-attribute" not in member.labels:
            continue
        annotation = member.annotation
        of = annotation.left if isinstance(annotation, griffe.ExprSubscript) else annotation
        if isinstance(of, griffe.Expr) and of.canonical_path in ABSTRACT:
            continue
        default = member.value
        if isinstance(default, griffe.ExprCall) and default.canonical_path == FIELD:
            given = {a.name: a.value for a in default.arguments if isinstance(a, griffe.ExprKeyword)}
            if str(given.get("init")) == "False":
                continue
            default = given.get("default")
            if "default_factory" in given:
                default = griffe.ExprCall(given["default_factory"], [])
        found[member.name] = griffe.Parameter(
            member.name, annotation=annotation, kind=griffe.ParameterKind.positional_or_keyword, default=default
        )
    return found
