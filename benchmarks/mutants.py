"""Mutants: the small changes that `benchmarks/mutation.py` makes, one at a time, to see whether a test notices.

Comparisons and their bounds, arithmetic, logic, numbers by one, exchanged names (``min`` and ``max``, ``any`` and
``all``), exchanged branches of `jnp.where`, and whatever can be dropped: a ``~``, a bound, an operand, a keyword
argument, a statement, an early return.
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
    """One change: of ``module``, inside the function ``where``, lines that were ``line`` and become ``becomes``."""

    module: str
    where: str
    operator: str
    line: str
    becomes: str
    nth: int  # of those that are alike so far
    start: int
    end: int
    text: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What identifies the change, wherever in the module the function stands."""
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
        lines = difflib.unified_diff(
            source.splitlines(),
            self.applied(source).splitlines(),
            self.module,
            f"{self.module} {self.id}",
            "",
            "",
            2,
            "",
        )
        return "\n".join(lines)


def mutants(module: str, source: str) -> list[Mutant]:
    """All mutants of a module, in the order of its text.

    Left out is what is not executed, or only described: docstrings, annotations, strings, what `raise` raises.
    """
    data, tree = source.encode(), ast.parse(source)
    starts = [0, *(match.end() for match in re.finditer(rb"\n", data))]
    code = bytearray(data)  # without comments: where operators are looked for
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            begin = starts[token.start[0] - 1] + len(token.line[: token.start[1]].encode())
            code[begin : begin + len(token.string.encode())] = b" " * len(token.string.encode())

    def span(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text(node: ast.AST) -> str:
        begin, end = span(node)
        inner = data[begin:end].decode()
        return inner if isinstance(node, SIMPLE) else f"({inner})"

    def between(first: int, end: int, symbol: str, last: bool = False) -> tuple[int, int]:
        pattern = re.escape(symbol).replace(r"\ ", r"\s+")
        pattern = rf"\b{pattern}\b" if symbol[0].isalpha() else pattern
        match = [*re.finditer(pattern.encode(), bytes(code[first:end]))][-1 if last else 0]
        return first + match.start(), first + match.end()

    found: list[Mutant] = []
    seen: collections.Counter = collections.Counter()

    def add(where: str, operator: str, begin: int, end: int, replacement: str) -> None:
        first, last = data.rfind(b"\n", 0, begin) + 1, data.find(b"\n", end)
        old = data[first:last].decode()
        new = (data[first:begin] + replacement.encode() + data[end:last]).decode()
        old, new = (" ".join(x.split()) for x in (old, new))
        if old != new:
            nth = seen[where, old, new]
            seen[where, old, new] += 1
            found.append(Mutant(module, where, operator, old, new, nth, begin, end, replacement))

    for node, where, last in _executed(tree):
        for operator, (begin, end), replacement in _changes(node, last, span, text, between):
            add(where, operator, begin, end, replacement)
    return sorted(found, key=lambda one: one.start)


def _executed(tree: ast.Module) -> Iterator[tuple[ast.AST, str, bool]]:
    """Every node that may matter, with the name of what it stands in, and whether it is the last of a function."""

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
    """Whether nothing in it is to be changed."""
    if isinstance(node, ast.keyword):
        return node.arg in ("strict", "help")  # what only guards against mistakes, and what is only read
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


def _changes(node, last, span, text, between) -> Iterator[tuple[str, tuple[int, int], str]]:
    """The changes of one node: the kind, what is replaced, by what."""
    match node:
        case ast.Compare():
            sides = [node.left, *node.comparators]
            for left, operator, right in zip(sides, node.ops, sides[1:], strict=False):
                old, new = SYMBOLS[type(operator)]
                yield "compare", between(span(left)[1], span(right)[0], old), new
        case ast.BinOp() if type(node.op) in SYMBOLS:
            old, new = SYMBOLS[type(node.op)]
            logical = isinstance(node.op, ast.BitAnd | ast.BitOr)
            yield "logic" if logical else "arithmetic", between(span(node.left)[1], span(node.right)[0], old), new
            if logical:
                yield "operand", span(node), text(node.left)
                yield "operand", span(node), text(node.right)
        case ast.BoolOp():
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield (
                    "logic",
                    between(span(left)[1], span(right)[0], SYMBOLS[type(node.op)][0]),
                    SYMBOLS[type(node.op)][1],
                )
            for one in node.values:
                others = [text(other) for other in node.values if other is not one]
                yield "operand", span(node), f"({f' {SYMBOLS[type(node.op)][0]} '.join(others)})"
        case ast.AugAssign() if type(node.op) in SYMBOLS:
            old, new = SYMBOLS[type(node.op)]
            yield "arithmetic", between(span(node.target)[1], span(node.value)[0], f"{old}="), f"{new}="
            yield "statement", span(node), "pass"
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))):
            yield from (("constant", span(node), str(changed)) for changed in (1 - number, -1 - number))
        case ast.UnaryOp() if not isinstance(node.op, ast.UAdd):
            yield "negation", span(node), text(node.operand)
        case ast.Constant(value=bool(value)):
            yield "constant", span(node), str(not value)
        case ast.Constant(value=int(value)):
            yield from (("constant", span(node), str(changed)) for changed in (value + 1, value - 1))
        case ast.Constant(value=float(value)):
            yield "constant", span(node), repr(2 * value) if value else "1.0"
        case ast.Attribute(attr=name, value=value) if name in NAMES and _name(value) != "self":
            end = span(node)[1]
            yield "name", (end - len(name), end), NAMES[name]
        case ast.Name(id=name) if name in NAMES and name in vars(builtins):
            yield "name", span(node), NAMES[name]
        case ast.Return() if not last:
            yield "return", span(node), "pass"
        case ast.Expr(value=ast.Call()):
            yield "statement", span(node), "pass"
        case ast.If() | ast.IfExp() if not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
            yield "condition", span(node.test), f"(not {text(node.test)})"
        case ast.Slice():
            for bound in filter(None, (node.lower, node.upper)):
                if not isinstance(bound, ast.Constant | ast.UnaryOp):
                    yield "bound", span(bound), f"{text(bound)} + 1"
        case ast.Call():
            yield from _changes_of_call(node, span, text, between)


def _changes_of_call(node: ast.Call, span, text, between) -> Iterator[tuple[str, tuple[int, int], str]]:
    name = _name(node.func)
    plain = [one for one in node.args if not isinstance(one, ast.Starred)]
    if name == "where" and len(plain) == 3:
        first, second = (span(one) for one in plain[1:])
        yield "branches", (first[0], second[1]), f"{text(plain[2])}, {text(plain[1])}"
    if name in BOUNDS and len(plain) == len(node.args) >= 2:
        for one in plain if name != "clip" else plain[:1]:
            yield "bound", span(node), text(one)
    if name in ("range", "arange") and plain and not isinstance(plain[-1], ast.Constant):
        yield from (("range", span(plain[-1]), f"{text(plain[-1])} {change}") for change in ("+ 1", "- 1"))
    if name and not name[0].isupper() and name not in DECLARATIONS:
        for keyword in (one for one in node.keywords if one.arg and not _inert(one)):
            begin, end = span(keyword)
            later = [span(other)[0] for other in node.keywords if span(other)[0] > end]
            if node.args or node.keywords[0] is not keyword:
                yield "keyword", (between(span(node.func)[1], begin, ",", last=True)[0], end), ""
            elif later:
                yield "keyword", (begin, later[0]), ""


def drawn(every: list[Mutant], seed: int) -> list[Mutant]:
    """All mutants in the order in which they are drawn: spread over modules and operators, else by chance.

    A group (module, operator) of n mutants comes in turn about as often as the root of n says.
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
    """A name of eight letters for any value."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]
