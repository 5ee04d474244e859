"""The mutation testing command, on a module of a few lines."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

MODULE = """def clipped(x: int = 0) -> int:
    if x > 10:  # not < 10
        return 10
    while x < -5:
        x = -x
    return x


SLACK = 5
"""
TEST = """from tiny import clipped, SLACK

def test_clipped():
    assert [clipped(x) for x in (-7, -6, -5, 10, 11)] == [7, 6, -5, 10, 10]
    assert clipped() == 0
"""
EQUIVALENT = """
[[equivalent]]
module = "tiny.py"
where = "clipped"
line = "if x > 10: # not < 10"
becomes = "if x >= 10: # not < 10"
why = "10 is 10 either way"

[[equivalent]]
module = "tiny.py"
where = "clipped"
line = "if x > 1:"
becomes = "if x >= 1:"
why = "of a line that is no more"
"""


@pytest.fixture
def run(tmp_path):
    """Runs the command on a tree of that module and its test: what it printed, and its results by what was changed."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "tiny.py").write_text(MODULE)
    (tmp_path / "tree" / "test_tiny.py").write_text(TEST)
    table, out = tmp_path / "table.toml", tmp_path / "results.jsonl"
    table.write_text(
        'grace = 1\npreload = ["hypothesis"]\n[[suite]]\nmodules = ["tiny.py"]\ntests = ["test_tiny.py"]\n'
    )

    def run(*options, equivalent=""):
        with table.open("a") as file:
            file.write(equivalent)
        command = [
            sys.executable,
            BENCHMARKS / "mutation.py",
            "--root",
            tmp_path / "tree",
            "--table",
            table,
            "--out",
            out,
        ]
        done = subprocess.run([*command, "--workers", "2", *options], capture_output=True, text=True, check=True)
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        return done.stdout, {line["becomes"]: line for line in lines if "becomes" in line}

    run.tree, run.out = tmp_path / "tree", out
    return run


@pytest.mark.slow
def test_the_command(run):
    """Some mutants are killed, one hangs, some survive, which a further test kills; what was tried is kept."""
    printed, results = run()
    outcomes = {becomes: result["outcome"] for becomes, result in results.items()}
    assert outcomes["def clipped(x: int = 1) -> int:"] == "killed"
    assert outcomes["return 11"] == "killed"
    assert outcomes["x = x"] == "timeout"
    assert outcomes["SLACK = 6"] == outcomes["if x >= 10: # not < 10"] == "survived"
    assert results["return 11"]["by"] == "test_tiny.py::test_clipped"
    assert "-SLACK = 5\n+SLACK = 6\n" in printed
    killed = sum(outcome != "survived" for outcome in outcomes.values())
    assert f" {killed / len(outcomes):.1%}" in printed.splitlines()[-1]
    assert (run.tree / "tiny.py").read_text() == MODULE

    run.out.write_text(run.out.read_text() + '{"id": "half a li')
    assert f"{len(outcomes)} are drawn, besides 0 equivalent ones; 0 are to be tried" in run()[0]
    (run.tree / "test_tiny.py").write_text(TEST + "    assert SLACK == 5\n")
    printed, results = run(equivalent=EQUIVALENT)
    survived = sum(outcome == "survived" for outcome in outcomes.values())
    assert f"{len(outcomes) - 1} are drawn, besides 1 equivalent ones; {survived - 1} are to be tried" in printed
    assert results["SLACK = 6"]["outcome"] == "killed"
    assert "mutant that does not exist any more: tiny.py | clipped | if x > 1: | if x >= 1:" in printed
    assert "+SLACK = 6" in run("--show", results["SLACK = 6"]["id"])[0]


def test_a_test_that_fails_unmutated_is_said(run):
    (run.tree / "test_tiny.py").write_text("def test_nothing():\n    assert False\n")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run()
    assert "test_tiny.py fails without any mutant" in failed.value.stderr


def changed(source, every=1):
    """The mutated lines of a module, one mutant each; every ``every``-th mutant is compiled as a program."""
    spec = importlib.util.spec_from_file_location("mutants", BENCHMARKS / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclass
    spec.loader.exec_module(module)
    found = module.mutants("module.py", source)
    for one in found[::every]:
        compile(one.applied(source), "module.py", "exec")
    return [one.becomes for one in found]


@pytest.mark.parametrize(
    ("source", "mutants"),
    [
        ("y = (a) <= -b", ["y = (a) < -b", "y = (a) <= b"]),
        ("y = a is not b", ["y = a is b"]),
        ("y = x[-1]", ["y = x[0]", "y = x[-2]"]),
        ("y = ~a & b", ["y = (~a)", "y = b", "y = a & b", "y = ~a | b"]),
        ("y = a and not b", ["y = (a)", "y = ((not b))", "y = a or not b", "y = a and b"]),
        ("y = np.where(a, b, c)", ["y = np.where(a, c, b)"]),
        ("y = np.clip(a, b, c)", ["y = a"]),
        ("y = max(a, 2.0)", ["y = min(a, 2.0)", "y = a", "y = 2.0", "y = max(a, 4.0)"]),
        ("y = x.any(axis=0)", ["y = x.all(axis=0)", "y = x.any(axis=1)", "y = x.any(axis=-1)"]),
        ("y = f(a, b=c)", ["y = f(a)"]),
        ("y = f(b=c, d=e)", ["y = f(d=e)", "y = f(b=c)"]),
        ("y = range(n)", ["y = range(n + 1)", "y = range(n - 1)"]),
        ("y = x[:n]", ["y = x[:n + 1]"]),
        ("y = a if b else c", ["y = a if (not b) else c"]),
        ("check(a)", ["pass"]),
        ("y: int = True", ["y: int = False"]),
        ("def f():\n    if a < b:\n        return c\n    return d", ["if a <= b:", "pass"]),
        ("def f(a: 'x - 1' = 1) -> 2 + 2:\n    'a - b'\n    raise E(a - 1)",
         ["def f(a: 'x - 1' = 2) -> 2 + 2:", "def f(a: 'x - 1' = 0) -> 2 + 2:"]),
        ("__all__ = ['a' + 'b']\nimport a\nassert f'{a - b}'\nKind: TypeAlias = 1 | 2", []),
    ],
)  # fmt: skip
def test_what_is_changed(source, mutants):
    assert sorted(changed(source + "\n")) == sorted(mutants)


def test_every_mutant_of_the_library_can_be_read():
    import tomllib

    table = tomllib.loads((BENCHMARKS / "mutation.toml").read_text())
    listed = [module for suite in table["suite"] for module in suite["modules"]]
    root = BENCHMARKS.parent
    assert {
        str(path.relative_to(root))
        for path in root.glob("corm_jax/policies/*.py")
        if path.name not in ("plan.py", "profile.py")
    } <= {*listed}
    assert len(listed) == len({*listed})
    for module in listed[:3]:
        assert len(changed((root / module).read_text(), every=17)) > 50
    for one in table.get("equivalent", []):
        assert one["module"] in listed
        assert one["why"]
