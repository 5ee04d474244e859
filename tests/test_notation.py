"""Policies by SPEC: ours, those of installed packages, and classes of one's own as ``module:Class``."""

import json
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

import corm_jax as cj
from corm_jax.policies import Notation, held_by, keeps_everything, lacks_window, on_budget, registry
from corm_jax.policies.plan import Plan
from simulator import cli
from simulator.synthetic import noise
from tests.mistakes import refused

MODULE = '''
import dataclasses

import corm_jax as cj
import jax.numpy as jnp
from corm_jax.policies import choice, number
from simulator.rules import Rule
from simulator.specification import specifies


@cj.policy
class Odd(cj.Policy):
    """Odd positions outlive even ones."""

    first: int = number(0, "first tokens that are never evicted", least=0)
    odd: str = choice("yes", "no", help="or even ones")

    @property
    def traits(self):
        return cj.Traits(protected=self.first, needs=())

    def score(self, state, slots):
        rank = slots.position % 2 if self.odd == "yes" else 1 - slots.position % 2
        return jnp.where(slots.position < slots.broadcast(self.first), 2, rank)


@specifies(Odd)
class OddRule(Rule):
    def __init__(self, *, first, odd):
        self.first, self.odd = first, odd == "yes"

    def order(self, i, t):
        return i % 2 if self.odd else 1 - i % 2

    def exempt(self, i, t):
        return i < self.first


@cj.policy
class Half(Odd):
    """Evicts by itself."""

    def retain(self, state, slots):
        return slots.live & (slots.position % 2 == 1)


@cj.policy
class Needy(Odd):
    shift: int

    def score(self, state, slots):
        return slots.position + self.shift


class Plain:
    def score(self, state, slots):
        return slots.position


class Undecorated(cj.Policy):
    score = Plain.score


@dataclasses.dataclass(frozen=True)
class Frozen(Undecorated):
    first: int = 0


@cj.policy
class Empty(cj.Policy):
    first: int = 0


odd = Odd()
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of a user's in the current directory, under a name that no other test has."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    for broken, words in (
        ("needs", "import no_such_thing"),
        ("divides", "x = 1\n1 / x * 0\n1 / 0"),
        ("exits", "exit(3)"),
    ):
        (tmp_path / f"{name}_{broken}.py").write_text(words)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path, ""])
    return name


def test_a_class_of_ones_own(own):
    assert repr(cj.parse(f"{own}:Odd")) == "Odd(first=0, odd='yes')"
    policy = cj.parse(f" {own}:Odd: first=2, odd=no, budget=8,sinks=1,oneshot=true ")
    inner = cj.protect(policy.policy.policy.policy, sinks=1)
    assert policy == cj.oneshot(cj.budget(inner, 8))
    assert repr(inner.policy) == "Odd(first=2, odd='no')"
    assert cj.parse(f"{own}:Odd:first=[1,2]").first.tolist() == [1, 2]
    assert cj.parse("corm:window=[[3, 4], [5, 6]],recent=[1, 2]").window.tolist() == [[3, 4], [5, 6]]
    assert on_budget(f"{own}:Odd", 9) == f"{own}:Odd:budget=9"
    assert (held_by(f"{own}:Odd"), held_by(f"{own}:Half")) == ("fixed", "cap")
    assert (keeps_everything(f"{own}:Odd"), keeps_everything(f"{own}:Half")) == (True, False)
    assert not lacks_window(f"{own}:Odd")


def test_a_spec_is_read_and_written():
    for text in ("full", "corm:window=3", "a.b:C", "a.b:C:d=[1, (2, 3)],e=x", "tova:budget=0.25,sinks=4"):
        assert str(Notation.read(text)) == text
    assert str(Notation.read("a.b:C(d=[1, 2], e=x)")) == "a.b:C:d=[1, 2],e=x"
    assert str(Notation.read("a.b:C()")) == "a.b:C"
    refused("unknown option 'C' in 'corm:C'", Notation.read, "corm:C")
    assert Notation.read("a:b=3").name == "a"
    refused("option 'b' is given twice", Notation.read("a:b=3").having, b=4)


def test_what_is_no_policy_is_said(own):
    for spec, message in {
        "no_such_module:Odd": "there is no module 'no_such_module' for the policy 'no_such_module:Odd': install it, or",
        f"{own}.sub:Odd": "there is no module .*sub",
        f"{own}:Even": r"has no Even: its policies are Odd, Half, Needy, Undecorated, Frozen, Empty",
        f"{own}:odd": "odd in .* is no class, but a Odd: name the class",
        f"{own}:Plain": "is not a policy: it does not inherit from corm_jax.Policy and lacks init, observe, retain",
        f"{own}:Undecorated": "is not a policy yet: decorate the class with corm_jax.policy",
        f"{own}:Frozen": "Frozen is no pytree: decorate the class with corm_jax.policy",
        f"{own}:Empty": "has no `score`: say how much each key is worth",
        f"{own}:Needy": r"needs shift=\.\.\.",
        f"{own}:Odd:last=3": r"unknown option 'last=3' in .*: .*:Odd has first=\.\.\., odd=\.\.\., budget=",
        f"{own}:Odd:first=-1": "first must be a whole number from 0",
        f"{own}:Odd:first=__import__('os')": 'first must be a whole number from 0 .* not "__import__',
        f"{own}:Odd:odd=maybe": "odd must be yes or no, not 'maybe'",
        f"{own}:Odd(first=2": rf"has no closing parenthesis at its end: write {own}:Odd\(option=value,...\)",
        f"{own}:Odd(2)": "unknown option '2' in .*: write each as option=value",
        f"{own}_needs:Odd": "cannot be imported: it needs no_such_thing, which is not installed",
        f"{own}_divides:Odd": r"cannot be imported: ZeroDivisionError: division by zero \(.*_divides.py, line 3\)",
        f"{own}_exits:Odd": "cannot be imported: SystemExit: 3",
        "a b:C": "names no policy: write name:option=value",
        ":C": "names no policy",
    }.items():
        refused(message, cj.parse, spec)


def test_the_commands_take_it(own, run_main, tmp_path):
    noise(layers=1, steps=40).save(tmp_path / "trace")

    def simulator(*arguments):
        return run_main(cli.main, "simulator", *arguments)

    spec = f"{own}:Odd:first=1,budget=8"
    code, _, err = simulator("replay", "trace", "--policy", spec, "--json", "replay.json")
    assert (code, json.loads((tmp_path / "replay.json").read_text())["rows"][0]["policy"]) == (0, spec), err
    code, out, _ = simulator("check", "trace", "--policy", spec)
    assert (code, "specification" in out) == (0, True)
    code, out, _ = simulator("check", "trace", "--policy", f"{own}:Half")
    assert (code, "there is none: register its rule in NumPy with" in " ".join(out.split())) == (1, True)
    code, _, err = simulator(
        "sweep", "trace", "--policy", f"{own}:Odd:budget=8", "--grid", "first=1,2", "--json", "s.json"
    )
    assert (code, [row["first"] for row in json.loads((tmp_path / "s.json").read_text())["rows"]]) == (0, [1, 2]), err
    assert simulator("plan", "trace", "--policy", spec, "--out", "plan.json")[0] == 0
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.is_for(spec)
    assert not plan.is_for(f"{own}:Odd:first=2,budget=8")
    assert not plan.is_for("tova:budget=8")
    code, _, err = simulator("replay", "trace", "--policy", f"{own}:Even")
    assert (code, "has no Even" in err) == (2, True)


def test_no_file_has_a_module_imported(own, tmp_path):
    """A plan names a module that would fail: neither to read it nor to compare it with another SPEC imports that."""
    plan = Plan(
        model="m", policy=f"{own}_divides:Odd:budget=8", kv_heads=1, head_dim=1, chunk=1, tokens=9, overflow=0.0,
        capacity=(9,),
    )  # fmt: skip
    plan.save(tmp_path / "plan.json")
    assert not Plan.load(tmp_path / "plan.json").is_for("tova:budget=8")
    assert f"{own}_divides" not in sys.modules


def test_the_current_directory_comes_last(own, tmp_path):
    """It is searched by the command itself, and hides no installed module."""
    (tmp_path / "rich.py").write_text("raise SystemExit('hidden')")
    code = """
import sys
sys.path, sys.argv = [place for place in sys.path if place], ["corm", "policies"]
from corm_jax.command.cli import main
main()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, "streaming_llm" in ran.stdout) == (0, True), ran.stderr


def test_policies_of_installed_packages(own, run_main, monkeypatch):
    from corm_jax.command.cli import main

    plugins = [
        EntryPoint("odd", f"{own}:Odd", registry.GROUP),
        EntryPoint("gone", "no_such_module:Odd", registry.GROUP),
        EntryPoint("corm", f"{own}:Half", registry.GROUP),
        *(EntryPoint("twice", f"{own}:{name}", registry.GROUP) for name in ("Odd", "Half")),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: plugins)
    registry.registered.cache_clear()
    try:
        assert repr(cj.parse("odd:first=2")) == "Odd(first=2, odd='yes')"
        assert on_budget("odd", 9) == "odd:budget=9"
        assert isinstance(cj.parse("corm"), cj.Corm)
        refused("two policies are called 'twice', .*:Odd and .*:Half: uninstall the package of one", cj.parse, "twice")
        refused("there is no module 'no_such_module' for the policy 'gone'", cj.parse, "gone")
        refused(
            "choose from full, .*, random, gone, odd, twice, or name a class of yours as module:Class", cj.parse, "even"
        )
        code, out, _ = run_main(main, "corm", "policies")
        assert code == 0
        assert "Odd positions outlive even ones." in " ".join(out.split())
        assert "there is no module 'no_such_module'" in " ".join(out.split())
    finally:
        registry.registered.cache_clear()
