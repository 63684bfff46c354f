"""Every public name resolves, says in one line what it is, and is documented on one page of the API reference.

The pages are read, not built: .ci/run builds them.
"""

import ast
import importlib
import inspect
import json
import pkgutil
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpyro_diffusion_da as ndda

ROOT = Path(__file__).parent.parent
PACKAGE = ndda.__name__
importlib.import_module("numpyro_diffusion_da.assimilation")  # the root waits with it until it is used
FOLDERS = [m for m in vars(ndda).values() if isinstance(m, ModuleType) and hasattr(m, "__all__")]
NAMESPACES = [
    value for folder in FOLDERS for name in folder.__all__ if isinstance(value := getattr(folder, name), ModuleType)
]


class PublicName(NamedTuple):
    namespace: ModuleType
    name: str

    def __str__(self):
        return f"{self.namespace.__name__}.{self.name}"


def names_of(namespace):
    """The names in `__all__`; of a module without one, the classes and functions that it defines."""
    if hasattr(namespace, "__all__"):
        return list(namespace.__all__)
    defined = [n.name for n in tree(namespace).body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    return [name for name in defined if not name.startswith("_")]


@cache
def tree(module):
    return ast.parse(Path(module.__file__).read_text())


def docstring(namespace, name):
    """The docstring where a name is defined; of a constant, the string that follows it."""
    value = getattr(namespace, name)
    if isinstance(value, ModuleType):
        return ast.get_docstring(tree(value))
    body = tree(namespace).body
    # From the end: the last definition of a name is the one that counts, after its overloads.
    for node, following in reversed(list(zip(body, [*body[1:], None], strict=True))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith(PACKAGE):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return docstring(importlib.import_module(node.module), alias.name)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node)
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            is_string = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            return inspect.cleandoc(following.value.value) if is_string else None
    return None


PUBLIC = [PublicName(module, name) for module in [ndda, *FOLDERS, *NAMESPACES] for name in names_of(module)]


class Block(NamedTuple):
    """A `:::` directive of a reference page."""

    page: str
    identifier: str
    options: str
    filters: list[str]

    def documents(self, public):
        if isinstance(getattr(public.namespace, public.name), ModuleType):
            return False  # a module has a block of its own
        if Path(public.namespace.__file__).with_name(f"{public.name}.py").exists():
            # The reference takes the name for the module, which the block of the folder does not show.
            return self.identifier == f"{public}.{public.name}"
        if self.identifier != public.namespace.__name__ or "names_only: true" in self.options:
            return False
        return not any(re.search(pattern.removeprefix("!"), public.name) for pattern in self.filters)


def blocks():
    [default] = filters((ROOT / "mkdocs.yml").read_text())
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        for match in re.finditer(r"^::: (\S+)\n((?:    .*\n|\n)*)", page.read_text() + "\n", re.MULTILINE):
            identifier, options = match.groups()
            own = filters(options)
            yield Block(page.name, identifier, options, own[0] if own else default)


def filters(text):
    return [json.loads(found) for found in re.findall(r"^\s*filters: (\[.*\])$", text, re.MULTILINE)]


BLOCKS = list(blocks())


def home(public):
    """The name as its folder exports it: what the root or a kernel module exports again is documented there."""
    if public.namespace in FOLDERS:
        return public
    value = getattr(public.namespace, public.name)
    again = [PublicName(f, n) for f in FOLDERS for n in f.__all__ if getattr(f, n) is value]
    return again[0] if again else public


def test_there_are_names_and_pages():
    assert {folder.__name__.split(".")[1] for folder in FOLDERS} >= {"smc", "priors", "filters", "inference"}
    assert {module.__name__.split(".")[-1] for module in NAMESPACES} >= {"fa_apf", "smc2", "parametrization"}
    assert BLOCKS


def fault(public):
    """What is wrong with the first line about a public name, or None; an editor shows that line alone."""
    text = docstring(*public)
    if not text:
        return "no docstring"
    first = text.splitlines()[0]
    leans = r"(Their|Its|It|Itself|As|See|The same|The others?|None|What|Those|That|This|Both|Zeros?|Also)\b"
    if not first[0].isupper():
        return f"begin with a capital letter: {first!r}"
    if len(first) < 18:
        return f"say more: {first!r}"
    return f"the first line leans on something before it: {first!r}" if re.match(leans, first) else None


def test_names_say_what_they_are():
    """All names at once, here and below: there are hundreds."""
    faults = {str(public): fault(public) for public in PUBLIC}
    assert {name: found for name, found in faults.items() if found} == {}


def pages_of(public):
    value = getattr(public.namespace, public.name)
    if isinstance(value, ModuleType):
        return [block.page for block in BLOCKS if block.identifier == value.__name__]
    at = home(public)
    return [block.page for block in BLOCKS if block.documents(at)]


def test_names_are_on_one_reference_page():
    pages = {str(public): pages_of(public) for public in PUBLIC}
    assert {name: found for name, found in pages.items() if len(found) != 1} == {}


def test_names_are_exported_by_one_folder():
    folders = [(n, f.__name__) for f in FOLDERS for n in f.__all__]
    again = {name for name, _ in folders if sum(name == other for other, _ in folders) > 1}
    assert not again, f"exported by two folders: {sorted(again)}"
    for name in ndda.__all__:
        assert any(name in folder.__all__ for folder in FOLDERS), f"ndda.{name} is in no folder's __all__"


def test_root_page_lists_the_root():
    [block] = [block for block in BLOCKS if block.identifier == PACKAGE]
    assert "names_only: true" in block.options
    assert "summary:" in block.options


def test_pages_list_names_by_themselves():
    """Members come from `__all__`: a list written by hand would go out of date."""
    assert [block for block in BLOCKS if re.search(r"^\s*members:", block.options, re.MULTILINE)] == []
    for block in BLOCKS:
        pkgutil.resolve_name(block.identifier)


def test_every_folder_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    index = (ROOT / "docs" / "reference" / "index.md").read_text()
    for folder in FOLDERS:
        page = f"{folder.__name__.split('.')[1]}.md"
        assert f"reference/{page}" in navigation
        assert f"]({page})" in index
