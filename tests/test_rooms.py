"""Which room of the two packages may import which, and that nothing imports itself in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOMS = {
    "errors": "",
    "files": "errors",
    "showing": "errors",
    "core": "showing errors",
    "policies": "core showing files errors",
    "model": "policies core showing files errors",
    "adapters": "model core errors",
    "traces": "showing files errors",
    "terminal": "policies core files errors",
    "runs": "model policies core showing files errors",
    "evaluation": "runs model policies core showing files errors",
    "command": "evaluation runs model policies core showing traces terminal files errors",
    "corm_jax": "adapters model policies core errors",
    "simulator": "policies core showing traces terminal files errors",
}
"""What a room may import beside itself. No room needs `corm_jax`, the names that ``import corm_jax`` gives."""

ROOT = Path(__file__).parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("corm_jax", "simulator")
    for path in (ROOT / package).rglob("*.py")
}


def imports(module):
    """The modules of both packages that a module imports: anywhere, in functions and for type checkers too."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports {node.module} without its package"
            inner = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name if name in FILES else node.module for name in inner)


IMPORTS = {module: {name for name in imports(module) if name in FILES} for module in FILES}


def room(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "corm_jax" and len(parts) > 1 else parts[0]


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_what_it_may(name):
    inside = [module for module in FILES if room(module) == name]
    assert inside
    pairs = {(module, other) for module in inside for other in IMPORTS[module]}
    assert {pair for pair in pairs if room(pair[1]) not in (name, *ROOMS[name].split())} == set()


def test_every_module_is_in_a_room():
    assert {room(module) for module in FILES} == set(ROOMS)


@pytest.mark.parametrize("graph", [IMPORTS, {name: others.split() for name, others in ROOMS.items()}])
def test_there_is_no_circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))
