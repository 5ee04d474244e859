"""Mutants: the small changes that `benchmarks/mutation.py` makes, one at a time, to see whether a test fails.

A mutant changes a comparison or its bound, an arithmetic or logical operator, or a number by one; it exchanges names
(``min`` and ``max``, ``any`` and ``all``) or the branches of `jnp.where`; or it removes a ``~``, a bound, an operand, a
keyword argument, a statement, or an early return.
"""

import ast
import builtins
import collections
import difflib
import hashlib
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass

SYMBOLS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"), ast.Pow: ("**", "*"), ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.BitXor: ("^", "|"),
    ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "argmin": "argmax", "argmax": "argmin", "mean": "sum",
    "minimum": "maximum", "maximum": "minimum", "cummax": "cummin", "cumsum": "cumprod", "sum": "max", "inf": "nan",
    "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like", "ones_like": "zeros_like", "floor": "ceil",
    "ceil": "floor", "tril": "triu", "triu": "tril", "sin": "cos", "cos": "sin",
}  # fmt: skip
SIMPLE = (ast.Name, ast.Constant, ast.Call, ast.Attribute, ast.Subscript)
BOUNDS = ("clip", "minimum", "maximum", "min", "max")
DECLARATIONS = ("field", "number", "choice", "static", "dataclass")


@dataclass(frozen=True)
class Mutant:
    """One change in ``module``, inside the function ``where``: the lines ``line`` become ``becomes``."""

    module: str
    where: str
    operator: str
    line: str
    becomes: str
    nth: int  # the index among equal changes in this function
    start: int
    end: int
    text: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Identifies the change, independent of where in the module the function is."""
        return self.module, self.where, self.line, self.becomes

    @property
    def id(self) -> str:
        """A short name."""
        return shortened((*self.key, self.nth))

    def applied(self, source: str) -> str:
        """The module's text with the change."""
        data = source.encode()
        return (data[: self.start] + self.text.encode() + data[self.end :]).decode()

    def diff(self, source: str) -> str:
        """The change as a unified diff."""
        old, new = source.splitlines(), self.applied(source).splitlines()
        return "\n".join(difflib.unified_diff(old, new, self.module, self.module, "", self.id, n=2, lineterm=""))


class Source:
    """The text of a module, and the places of its nodes in it, in bytes from the beginning."""

    def __init__(self, text: str):
        self.data = text.encode()
        self.starts = [0, *(match.end() for match in re.finditer(rb"\n", self.data))]
        code, lines = bytearray(self.data), text.split("\n")
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                begin, size = self.starts[row - 1] + len(lines[row - 1][:column].encode()), len(token.string.encode())
                code[begin : begin + size] = b" " * size
        self.code = bytes(code)  # without comments: operators are searched in it

    def span(self, node: ast.AST) -> tuple[int, int]:
        """The beginning and the end of a node."""
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def of(self, node: ast.AST) -> str:
        """The text of a node, in parentheses if it may need them."""
        begin, end = self.span(node)
        return self.data[begin:end].decode() if isinstance(node, SIMPLE) else f"({self.data[begin:end].decode()})"

    def find(self, symbol: str, begin: int, end: int, last: bool = False) -> tuple[int, int]:
        """The place of an operator, or of a word, between two places."""
        pattern = re.escape(symbol).replace(r"\ ", r"\s+")
        pattern = rf"\b{pattern}\b" if symbol[0].isalpha() else pattern
        match = [*re.finditer(pattern.encode(), self.code[begin:end])][-1 if last else 0]
        return begin + match.start(), begin + match.end()

    def between(self, left: ast.AST, symbol: str, right: ast.AST) -> tuple[int, int]:
        """The place of the operator between two nodes."""
        return self.find(symbol, self.span(left)[1], self.span(right)[0])


def mutants(module: str, source: str) -> list[Mutant]:
    """All mutants of a module, in the order of its text.

    Left out is what is not executed, or only describes something: docstrings, annotations, strings, and errors that
    are raised.
    """
    read = Source(source)
    found: list[Mutant] = []
    seen: collections.Counter = collections.Counter()

    def add(where: str, operator: str, begin: int, end: int, replacement: str) -> None:
        first, last = read.data.rfind(b"\n", 0, begin) + 1, read.data.find(b"\n", end)
        old = read.data[first:last].decode()
        new = (read.data[first:begin] + replacement.encode() + read.data[end:last]).decode()
        old, new = (" ".join(x.split()) for x in (old, new))
        if old != new:
            nth = seen[where, old, new]
            seen[where, old, new] += 1
            found.append(Mutant(module, where, operator, old, new, nth, begin, end, replacement))

    for node, where, last in _executed(ast.parse(source)):
        for operator, (begin, end), replacement in _changes(node, last, read):
            add(where, operator, begin, end, replacement)
    return sorted(found, key=lambda one: one.start)


def _executed(tree: ast.Module) -> Iterator[tuple[ast.AST, str, bool]]:
    """Every node that is executed, the function or class that it is in, and whether it is the last statement there."""

    def visit(node: ast.AST, where: str, last: bool):
        yield node, where, last
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            where = f"{where}.{node.name}" if where else node.name
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "ctx", "bases"):
                continue
            for child in value if isinstance(value, list) else [value]:
                whole = isinstance(node, ast.UnaryOp) and isinstance(child, ast.Constant)  # -1 is one number
                if isinstance(child, ast.AST) and not whole and not _inert(child):
                    yield from visit(child, where, isinstance(node, ast.FunctionDef) and child is node.body[-1])

    yield from visit(tree, "", False)


def _inert(node: ast.AST) -> bool:
    """Whether a node is left as it is, with everything in it."""
    if isinstance(node, ast.keyword):
        return node.arg in ("strict", "help")  # a check against mistakes, and a text
    if isinstance(node, ast.Assign):
        return _name(node.targets[0]) in ("__all__", "Policies")
    if isinstance(node, ast.AnnAssign):
        return "TypeAlias" in ast.dump(node.annotation)
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Call):
        return _name(node.func) in ("isinstance", "TypeVar", "dataclass_transform")
    return isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom)


def _name(node: ast.AST) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def _changes(node: ast.AST, last: bool, read: Source) -> Iterator[tuple[str, tuple[int, int], str]]:
    """The changes of one node: the kind, the place of what is replaced, and the new text."""
    match node:
        case ast.Compare():
            sides = [node.left, *node.comparators]
            for left, operator, right in zip(sides, node.ops, sides[1:], strict=False):
                old, new = SYMBOLS[type(operator)]
                yield "compare", read.between(left, old, right), new
        case ast.BinOp() if type(node.op) in SYMBOLS:
            old, new = SYMBOLS[type(node.op)]
            logical = isinstance(node.op, ast.BitAnd | ast.BitOr)
            yield "logic" if logical else "arithmetic", read.between(node.left, old, node.right), new
            if logical:
                yield "operand", read.span(node), read.of(node.left)
                yield "operand", read.span(node), read.of(node.right)
        case ast.BoolOp():
            old, new = SYMBOLS[type(node.op)]
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield "logic", read.between(left, old, right), new
            for one in node.values:
                others = [read.of(other) for other in node.values if other is not one]
                yield "operand", read.span(node), f"({f' {old} '.join(others)})"
        case ast.AugAssign() if type(node.op) in SYMBOLS:
            old, new = SYMBOLS[type(node.op)]
            yield "arithmetic", read.between(node.target, f"{old}=", node.value), f"{new}="
            yield "statement", read.span(node), "pass"
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))):
            yield from (("constant", read.span(node), str(changed)) for changed in (1 - number, -1 - number))
        case ast.UnaryOp() if not isinstance(node.op, ast.UAdd):
            yield "negation", read.span(node), read.of(node.operand)
        case ast.Constant(value=bool(value)):
            yield "constant", read.span(node), str(not value)
        case ast.Constant(value=int(value)):
            yield from (("constant", read.span(node), str(changed)) for changed in (value + 1, value - 1))
        case ast.Constant(value=float(value)):
            yield "constant", read.span(node), repr(2 * value) if value else "1.0"
        case ast.Attribute(attr=name, value=value) if name in NAMES and _name(value) != "self":
            end = read.span(node)[1]
            yield "name", (end - len(name), end), NAMES[name]
        case ast.Name(id=name) if name in NAMES and name in vars(builtins):
            yield "name", read.span(node), NAMES[name]
        case ast.Return() if not last:
            yield "return", read.span(node), "pass"
        case ast.Expr(value=ast.Call()):
            yield "statement", read.span(node), "pass"
        case ast.If() | ast.IfExp() if not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
            yield "condition", read.span(node.test), f"(not {read.of(node.test)})"
        case ast.Slice():
            for bound in filter(None, (node.lower, node.upper)):
                if not isinstance(bound, ast.Constant | ast.UnaryOp):
                    yield "bound", read.span(bound), f"{read.of(bound)} + 1"
        case ast.Call():
            yield from _changes_of_call(node, read)


def _changes_of_call(node: ast.Call, read: Source) -> Iterator[tuple[str, tuple[int, int], str]]:
    name = _name(node.func)
    plain = [one for one in node.args if not isinstance(one, ast.Starred)]
    if name == "where" and len(plain) == 3:
        first, second = (read.span(one) for one in plain[1:])
        yield "branches", (first[0], second[1]), f"{read.of(plain[2])}, {read.of(plain[1])}"
    if name in BOUNDS and len(plain) == len(node.args) >= 2:
        for one in plain if name != "clip" else plain[:1]:
            yield "bound", read.span(node), read.of(one)
    if name in ("range", "arange") and plain and not isinstance(plain[-1], ast.Constant):
        yield from (("range", read.span(plain[-1]), f"{read.of(plain[-1])} {change}") for change in ("+ 1", "- 1"))
    if name and not name[0].isupper() and name not in DECLARATIONS:
        for keyword in (one for one in node.keywords if one.arg and not _inert(one)):
            begin, end = read.span(keyword)
            later = [read.span(other)[0] for other in node.keywords if read.span(other)[0] > end]
            if node.args or node.keywords[0] is not keyword:
                yield "keyword", (read.find(",", read.span(node.func)[1], begin, last=True)[0], end), ""
            elif later:
                yield "keyword", (begin, later[0]), ""


def drawn(every: list[Mutant], seed: int) -> list[Mutant]:
    """All mutants in the order in which they are drawn: at random, but spread over modules and operators.

    From a group (a module and an operator) of n mutants, the number that is drawn is about proportional to the square
    root of n.
    """
    groups = collections.defaultdict(list)
    for one in every:
        groups[one.module, one.operator].append(one)

    def chance(one: Mutant) -> float:
        return int(hashlib.sha256(f"{seed} {one.id}".encode()).hexdigest()[:12], 16) / 16**12

    turn = {
        one: (rank + chance(one)) / len(group) ** 0.5
        for group in groups.values()
        for rank, one in enumerate(sorted(group, key=chance))
    }
    return sorted(every, key=turn.__getitem__)


def shortened(value: object) -> str:
    """A name of eight characters for any value."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]
