"""A Sphinx extension for the reference: names in docstrings become links, signatures are shown as they are written.

Docstrings put names into single backticks. Each has to be a name of the module of that docstring, of the package, or a
path from there. One that is none of these fails a strict build, and so does a public name without an entry.
"""

import ast
import builtins
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from functools import cache
from typing import Any

PROJECT = ("corm_jax", "simulator")
SINGLE = re.compile(r"(?<![`:\w])`([^`\n]+)`(?!`)")
NAME = re.compile(r"[A-Za-z_][\w.]*")


def setup(app):
    """Registers what follows."""
    app.connect("autodoc-process-docstring", link_names)
    app.connect("autodoc-process-signature", as_written)
    app.connect("missing-reference", resolve)
    app.connect("env-check-consistency", check_all_documented)
    return {"parallel_read_safe": True}


def warn(message: str, **where: Any) -> None:
    """A warning, which a strict build counts as an error."""
    from sphinx.util import logging

    logging.getLogger(__name__).warning(message, type="reference", **where)


def link_names(app, what, name, obj, options, lines: list[str]) -> None:
    """Makes `names` in single backticks links, and anything else in them code."""
    where = inspect.getmodule(inspect.unwrap(obj) if callable(obj) else obj) or importlib.import_module(PROJECT[0])

    def link(match: re.Match) -> str:
        text = match[1]
        if not NAME.fullmatch(text):
            return f"``{text}``"
        if path := find(text, where, owner_of(name)):
            return f":py:obj:`{text} <{path}>`"
        if text.split(".")[0] in sys.modules or hasattr(builtins, text):
            return f"``{text}``"
        warn(f"the docstring of {name} mentions `{text}`, of which {where.__name__} knows nothing")
        return f"``{text}``"

    code = False
    for index, line in enumerate(lines):
        code = (code or line.lstrip().startswith(">>>")) and bool(line.strip())
        if not code:
            lines[index] = SINGLE.sub(link, line)


def owner_of(name: str) -> Any:
    """The class, or module, in which something documented by that name stands."""
    return imported(name) if inspect.isclass(imported(name)) else imported(name.rpartition(".")[0])


def find(text: str, where: Any, owner: Any) -> str | None:
    """The path by which the reference documents a name that a docstring of a module, or of a class in it, mentions."""
    for start in (owner, where, importlib.import_module(PROJECT[0])):
        first, *rest = text.split(".")
        found = getattr(start, first, None)
        if found is None and first in getattr(start, "__annotations__", {}):
            return public(start) + f".{first}"
        if found is None or inspect.ismodule(found):
            continue
        if inspect.isclass(start) and start is owner:
            return ".".join([public(start), text])
        path = public(found) or f"{start.__name__}.{first}"
        return ".".join([path, *rest])
    return public(found) or text if (found := imported(text)) is not None else None


@cache
def imported(path: str) -> Any:
    """What a dotted path within the project leads to, or None."""
    parts = path.split(".")
    if parts[0] not in PROJECT:
        return None
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            if part in getattr(found, "__dataclass_fields__", {}):
                return found
            found = getattr(found, part, None)
        return found
    return None


def public(found: Any) -> str | None:
    """The path by which the reference documents an object of the project: the package's own names come first."""
    if inspect.ismodule(found):
        return found.__name__
    name, module = getattr(found, "__qualname__", None), getattr(found, "__module__", None) or ""
    if not isinstance(name, str) or module.split(".")[0] not in PROJECT:
        return None
    first = name.split(".")[0]
    package = importlib.import_module(PROJECT[0])
    own = first in package.__all__ and getattr(package, first) is getattr(importlib.import_module(module), first, None)
    return f"{PROJECT[0]}.{name}" if own else f"{module}.{name}"


def as_written(app, what, name, obj, options, signature, returns):
    """The signature as the source has it, with the axes of arrays, in place of what Python makes of it."""
    if what == "class":
        if dataclasses.is_dataclass(obj):
            return _of_fields(obj), None
        return signature, None
    if what not in ("function", "method") or signature is None:
        return None
    node = _definition(obj)
    if node is None:
        return None
    args = node.args
    if what == "method" and args.args and not isinstance(inspect.getattr_static(obj, "__self__", None), type):
        first = args.args[0].arg
        args.args = args.args[1:] if first in ("self", "cls") else args.args
    return f"({ast.unparse(args)})", ast.unparse(node.returns) if node.returns else None


def _definition(obj: Any) -> ast.FunctionDef | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None


def _of_fields(cls: type) -> str:
    """The constructor of a dataclass."""
    shown = []
    for field in dataclasses.fields(cls):
        default = "" if field.default is dataclasses.MISSING else f"={field.default!r}"
        shown.append(f"{field.name}{default}")
    star = "*, " if shown and cls.__dataclass_params__.kw_only else ""
    return f"({star}{', '.join(shown)})"


def resolve(app, env, node, contnode):
    """A link to what a name stands for, wherever it is documented; plain text for what is not the project's."""
    if node.get("refdomain") != "py":
        return None
    from sphinx.util.nodes import make_refnode

    target, objects = node["reftarget"], env.domains["py"].objects
    found = imported(target)
    path = next((x for x in (public(found) if found is not None else None, target) if x in objects), None)
    if path is None and node.get("reftype") != "obj":  # in a signature: names as the source has them
        last = target.rpartition(".")[2]
        same = [one for one in objects if one.rpartition(".")[2] == last and objects[one].objtype in ("class", "data")]
        path = same[0] if len(same) == 1 else None
    if path is not None:
        entry = objects[path]
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, path)
    known = found is not None or target.split(".")[0] not in PROJECT
    return contnode if known else None


def check_all_documented(app, env) -> None:
    """Warns of public names without an entry."""
    objects = env.domains["py"].objects
    for module in (PROJECT[0], f"{PROJECT[1]}.testing"):
        for name in importlib.import_module(module).__all__:
            path = f"{module}.{name}"
            if path not in objects and public(getattr(importlib.import_module(module), name)) not in objects:
                warn(f"{path} is public and has no entry in docs/api")
