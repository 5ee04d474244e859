"""A Sphinx extension for the reference: names in docstrings become links, signatures are shown as they are written.

Docstrings put names into single backticks. Each has to be a name of the module of that docstring, of the package, or a
path from there. One that is none of these fails a strict build, and so does a public name without an entry.
"""

import ast
import builtins
import dataclasses
import importlib
import importlib.util
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
    app.connect("autodoc-process-docstring", escape_letters, priority=400)  # before napoleon's
    app.connect("autodoc-process-docstring", link_names)
    app.connect("autodoc-process-signature", as_written)
    app.connect("autodoc-skip-member", skip)
    app.connect("missing-reference", resolve)
    app.connect("doctree-read", keep_intervals)
    app.connect("env-check-consistency", check_all_documented)
    app.connect("html-page-context", link_back)
    return {"parallel_read_safe": True}


def warn(message: str, **where: Any) -> None:
    """A warning, which a strict build counts as an error."""
    from sphinx.util import logging

    logging.getLogger(__name__).warning(message, type="reference", **where)


def escape_letters(app, what, name, obj, options, lines: list[str]) -> None:
    """Keeps an explanation that begins with one letter, such as ``multiple: m. ...``, from becoming a list."""
    lines[:] = [re.sub(r"^(\s+[\w, ]+: )([A-Za-z]\. )", r"\1\\\2", line) for line in lines]


def link_names(app, what, name, obj, options, lines: list[str]) -> None:
    """Makes `names` in single backticks links, anything else in them code, and indented paragraphs blocks of code."""
    where = inspect.getmodule(inspect.unwrap(obj) if callable(obj) else obj) or importlib.import_module(PROJECT[0])
    if where.__name__.split(".")[0] not in PROJECT:
        return

    def link(match: re.Match) -> str:
        text = match[1]
        if not NAME.fullmatch(text) or hasattr(builtins, text) or _installed(text.split(".")[0]):
            return f"``{text}``"
        if path := find(text, where, owner_of(name)):
            return f":py:obj:`{text} <{path}>`"
        warn(f"the docstring of {name} mentions `{text}`, of which {where.__name__} knows nothing")
        return f"``{text}``"

    shown, before, kind, inside = [], "", "", ""  # the last line that was not blank, and whether it stood in code
    for index, line in enumerate(lines):
        blank, first = not line.strip(), index > 0 and not lines[index - 1].strip()
        if first and not blank:
            kind = ""
            if line.startswith("    ") and before[:1] not in " :.->*" and not before.endswith("::"):
                shown += [".. code-block:: none", ""]
                kind = "block"
            elif line.startswith("    ") and before.startswith("    ") and shown and inside == "block":
                kind = "block"
        if line.lstrip().startswith(">>>"):
            kind = "doctest"
        shown.append(line if kind or blank else SINGLE.sub(link, line))
        if not blank:
            before, inside = line, kind
    lines[:] = shown


def _installed(package: str) -> bool:
    """Whether a name is that of a package other than the project's."""
    return package not in PROJECT and importlib.util.find_spec(package) is not None


def owner_of(name: str) -> Any:
    """The class, or module, in which something documented by that name stands."""
    return imported(name) if inspect.isclass(imported(name)) else imported(name.rpartition(".")[0])


def find(text: str, where: Any, owner: Any) -> str | None:
    """The path by which the reference documents a name that a docstring of a module, or of a class in it, mentions.

    Looked for in the class, in the module, beside the module, in the package, in what a policy is, and among constants.
    """
    package = importlib.import_module(PROJECT[0])
    first, *rest = text.split(".")
    for start in (owner, where, package, package.Policy, package.Traits):
        found = getattr(start, first, None)
        if inspect.isclass(start) and (found is not None or first in getattr(start, "__annotations__", {})):
            return f"{public(start)}.{text}"
        if found is not None and not inspect.ismodule(found):
            return ".".join([public(found) or f"{start.__name__}.{first}", *rest])
    for path in (text, f"{where.__package__}.{text}"):
        if (found := imported(path)) is not None:
            return public(found) or path
    homes = [one for one in sys.modules if one.split(".")[0] in PROJECT and first in vars(sys.modules[one])]
    return f"{homes[0]}.{text}" if homes and first.isupper() else None


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
    if node.args.args and node.args.args[0].arg in ("self", "cls"):
        del node.args.args[0]
    node = _Linked(vars(inspect.getmodule(inspect.unwrap(obj)))).visit(node)
    return f"({ast.unparse(node.args)})", ast.unparse(node.returns) if node.returns else None


class _Linked(ast.NodeTransformer):
    """Puts the path at which the reference has a class in place of its name in annotations; only the name is shown."""

    def __init__(self, names: dict[str, Any]):
        self.names = names

    def visit_FunctionDef(self, node):
        node.returns = node.returns and self.visit(node.returns)
        for one in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]:
            if one is not None and one.annotation:
                one.annotation = self.visit(one.annotation)
        return node

    def visit_Name(self, node):
        found = self.names.get(node.id)
        path = public(found) if inspect.isclass(found) else None
        return ast.Name(f"~{path}") if path else node


def _definition(obj: Any) -> ast.FunctionDef | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None


def _of_fields(cls: type) -> str:
    """The constructor of a dataclass."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    shown = [
        field.name + ("" if field.default is dataclasses.MISSING else f"={field.default!r}")
        for field in sorted(fields, key=lambda field: field.kw_only)
    ]
    return f"({', '.join(['*'] * any(field.kw_only for field in fields) + shown)})"


def entry_of(env, found: Any) -> str | None:
    """The path under which the reference has an object, by whichever path it was found."""
    objects = env.domains["py"].objects
    if len(objects) != len(_entries):
        _entries.clear()
        _entries.update({path: imported(path) for path in objects})
    path = public(found) if found is not None else None
    if path in objects or found is None:
        return path
    return next((path for path, one in _entries.items() if one is found), None)


_entries: dict[str, Any] = {}


def resolve(app, env, node, contnode):
    """A link to what a name stands for, wherever it is documented; plain text for what is not the project's."""
    if node.get("refdomain") != "py":
        return None
    from sphinx.util.nodes import make_refnode

    target, objects = node["reftarget"], env.domains["py"].objects
    found = imported(target)
    path = next((one for one in (entry_of(env, found), target, target.rpartition(".")[0]) if one in objects), None)
    if path is not None:
        entry = objects[path]
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, path)
    known = found is not None or target.split(".")[0] not in PROJECT
    return contnode if known else None


def skip(app, what, name, obj, skipped, options) -> bool | None:
    """Leaves out the fields of named tuples, which the docstring of the class explains."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def check_all_documented(app, env) -> None:
    """Warns of public names without an entry."""
    objects = env.domains["py"].objects
    for module in (PROJECT[0], f"{PROJECT[1]}.testing"):
        for name in importlib.import_module(module).__all__:
            path = f"{module}.{name}"
            if path not in objects and public(getattr(importlib.import_module(module), name)) not in objects:
                warn(f"{path} is public and has no entry in docs/api")


def keep_intervals(app, doctree) -> None:
    """Keeps an interval such as [0.1, 0.2] on one line of a table."""
    from docutils import nodes

    for entry in doctree.findall(nodes.entry):
        for text in list(entry.findall(nodes.Text)):
            whole = re.sub(r"\[[^]]*\]", lambda match: match[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
            text.parent.replace(text, nodes.Text(whole))


def link_back(app, page, template, context, doctree) -> None:
    """Makes links from pages of source lead to the entries, for modules of which some names are the package's."""
    if page.startswith("_modules/") and "body" in context:
        module = page.removeprefix("_modules/").replace("/", ".")
        objects = app.env.domains["py"].objects
        blocks = context["body"].split('<div class="viewcode-block" id="')
        shown = [blocks[0]]
        for block in blocks[1:]:
            name = block.partition('"')[0]
            path = entry_of(app.env, imported(f"{module}.{name}")) or f"{module}.{name}"
            path = objects[path].node_id if path in objects else path
            shown.append(re.sub(r'(viewcode-back" href="[^"#]*#)[^"]*', rf"\g<1>{path}", block, count=1))
        context["body"] = '<div class="viewcode-block" id="'.join(shown)
