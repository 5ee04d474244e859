"""How the command lines begin and end: help, absurd numbers, closed streams, signals, progress, compiled programs."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import click
import jax
import pytest

from corm_jax.command import cli, compare, inputs
from corm_jax.errors import CormError
from corm_jax.terminal import compiled, console, limits
from corm_jax.terminal.console import Real, Whole
from simulator import cli as simulator_cli
from simulator import synthetic
from tests.test_checkpoint import TEXT

LINES = {"corm": cli, "simulator": simulator_cli}
ABSURD = ["0", "-1", "2147483647", "2147483648", str(2**63), "1e308", "nan", "inf", "-inf", "", "1" * 5000, "0x10", "٣"]


def commands():
    """All commands of both command lines: the name of the line, the words that call it, the command."""

    def walk(line, words, command):
        yield line, words, command
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                yield from walk(line, (*words, name), command.get_command(context, name))

    yield from walk("corm", (), cli.corm)
    yield from walk("simulator", (), simulator_cli.simulator)


def options(names, types):
    """The options of these types, or names, of all commands."""
    for line, words, command in commands():
        for option in command.params:
            if isinstance(option, click.Option) and (isinstance(option.type, types) or option.opts[0] in names):
                yield line, words, option.opts[0]


@pytest.fixture
def run(run_main):
    return lambda line, *words: run_main(LINES[line].main, line, *words)


@pytest.fixture
def places(tmp_path, model, data):
    """Arguments with which each command works."""
    text, trace = tmp_path / "text.txt", tmp_path / "trace"
    text.write_text(TEXT * 9, encoding="utf-8")
    synthetic.topics(layers=2, steps=40, kv_heads=2, group=2, head_dim=8, length=16).save(trace)
    common, out = ("--model", model, "--text", text), ("--out", tmp_path / "out")
    return {
        "compare": (*common, "--tokens", 40),
        "generate": ("--model", model, "--prompt", "a b"),
        "record": (*common, *out, "--tokens", 20),
        "calibrate": (*common, *out, "--target-live", 0.5, "--tokens", 280),
        "analyse": (*common, *out, "--tokens", 128),
        "perplexity": (*common, *out, "--tokens", 40, "--policy", "full"),
        "agreement": (*common, *out, "--tokens", 40, "--policy", "full"),
        "recall": (*common, *out, "--policy", "full", "--task", "passkey"),
        "longbench": ("--model", model, *out, "--data", data, "--policy", "full"),
        "sweep": (trace, "--grid", "window=4,8"),
        "plot": (trace, "--out", tmp_path / "out"),
        "plan": (trace, "--out", tmp_path / "out"),
        "view": (trace, "--policy", "full", "--out", tmp_path / "out"),
        **dict.fromkeys(("replay", "bounds", "check"), (trace,)),
        "soak": (),
    }


# Help


@pytest.mark.parametrize(
    ("line", "words", "command"), [pytest.param(*x, id=" ".join((x[0], *x[1]))) for x in commands()]
)
def test_help(run, line, words, command):
    code, out, err = run(line, *words, "-h")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: {'corm' if line == 'corm' else 'python -m simulator'} {' '.join(words)}".strip())
    assert run(line, *words, "--help")[1] == out
    if isinstance(command, click.Group) or any(parameter.required for parameter in command.params):
        assert run(line, *words) == (2, out, "")  # as it is formatted, and no error


@pytest.mark.parametrize("line", LINES)
def test_version(run, line):
    from importlib.metadata import version

    assert run(line, "--version") == (0, f"corm-jax {version('corm-jax')}\n", "")


# Absurd values


class ReachedError(CormError):
    """The work would begin."""


@pytest.fixture
def idle(monkeypatch, model):
    """Commands end where their work would begin."""

    def reached(*_, **__):
        raise ReachedError("the work was reached")

    loaded = inputs.load(model, "float32")
    monkeypatch.setattr("corm_jax.command.inputs.load", lambda *_: loaded)
    for name in (
        *(
            "corm_jax.command.compare.read_text",
            "corm_jax.command.compare.fitted",
            "corm_jax.command.generate.stream",
            "corm_jax.runs.recording.resume",
        ),
        *(
            "corm_jax.runs.calibrate.calibrate",
            "corm_jax.evaluation.suite.Suite.run",
            "corm_jax.evaluation.recall.tasks",
        ),
        *(
            "corm_jax.evaluation.analysis.analyse",
            "simulator.cli.replay",
            "simulator.cli.sweep",
            "simulator.cli.verify",
        ),
        *("simulator.planner.plan", "simulator.soak.soak"),
    ):
        monkeypatch.setattr(name, reached)


@contextlib.contextmanager
def little_memory(more):
    """Limits the memory of the process to ``more`` bytes above its present size."""
    resource = pytest.importorskip("resource")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


NUMERIC = list(options({"--capacity", "--budget", "--layers"}, (Whole, Real)))
ABOUT = {"--limit": "prompt", "--length": "prompt", "--tokens": "tokens"}
"""What an error may name instead of the option."""


@pytest.mark.parametrize(("line", "words", "option"), [pytest.param(*x, id=" ".join((*x[1], x[2]))) for x in NUMERIC])
def test_an_absurd_number_is_refused_or_works(run, idle, places, tmp_path, monkeypatch, line, words, option):
    """In one line that names the option, before the work, and without memory for it."""
    monkeypatch.setattr(limits, "memory", lambda: 2**34)
    with little_memory(2**30):
        for index, value in enumerate(ABSURD):
            fresh = ("--out", tmp_path / f"out-{index}") if "--out" in places[words[-1]] else ()
            code, _, err = run(line, *words, *places[words[-1]], *fresh, f"{option}={value}")
            assert code == 2, value
            (error,) = (found for found in err.splitlines() if not found.startswith("corm: note: "))
            named = option in error or ABOUT.get(option, option) in error or "the work was reached" in error
            assert named, (value, error)
            assert len(error) < 400


def test_all_numbers_are_tried():
    assert len(NUMERIC) > 50
    plain = list(options((), (type(click.INT), type(click.FLOAT), click.IntRange, click.FloatRange)))
    assert plain == []  # which take NaN, or raise for more digits than int() does


def test_the_largest_and_the_smallest_that_are_allowed(run, places, tmp_path):
    most = str(2**31 - 1)
    generate = (
        "generate",
        *places["generate"],
        "--max-new-tokens",
        3,
        "--chunk",
        most,
        "--policy",
        "corm:window=4,recent=2",
    )
    code, out, _ = run("corm", *generate, "--seed", most, "--temperature", "1e6", "--top-p", "1e-6")
    assert (code, "[cache: " in out) == (0, True)
    code, _, err = run("corm", *generate, "--temperature", "1e-45")
    assert (code, "--temperature must be 0 or at least 0.001, not 1e-45" in err) == (2, True)
    replay = ("replay", *places["replay"], "--chunk", most, "--capacity", most, "--policy", "corm:window=4,recent=2")
    code, out, _ = run("simulator", *replay)
    assert (code, "2147483647 slots a head" in out) == (0, True)
    code, out, _ = run("simulator", "check", *replay[1:], "--tokens", 12, "--layers", 0)
    assert (code, "NO" in out) == (0, False)


def test_what_cannot_fit_into_memory_names_the_bytes(run, places, monkeypatch):
    monkeypatch.setattr("corm_jax.command.compare.read_text", lambda *_, **__: pytest.fail("something was allocated"))
    compare = ("compare", *places["compare"], "--policy", "full")
    code, _, err = run("corm", *compare, "--capacity", 2**31 - 1)
    slots = r"--policy full, --capacity 2147483647: the model and caches of 2,147,483,647 slots a head"
    assert code == 2
    assert re.search(rf"{slots} take at least [\d,.]+ GiB, there are [\d,.]+: lower --capacity", err)
    code, _, err = run("corm", "generate", *places["generate"], "--max-new-tokens", 2**31 - 1, "--policy", "full")
    assert (code, "lower --max-new-tokens" in err) == (2, True)
    code, _, err = run("corm", *compare, "--tokens", 41, "--chunk", 42)
    assert (code, "--chunk 42 is more than --tokens 41" in err) == (2, True)
    monkeypatch.setattr(limits, "memory", lambda: 2**18)
    code, _, err = run("corm", *compare, "--chunk", 40)
    assert (code, "take at least 0.0 GiB" in err) == (2, True)


def test_memory_is_a_number_of_this_machine():
    assert 2**28 < limits.memory() < 2**50


def test_errors_name_the_option_and_the_policy(run, places, tmp_path):
    compare = ("compare", *places["compare"], "--policy", "full")
    for arguments, message in {
        ("--policy", "snapkv"): "--policy snapkv waits for the end of the prompt: .* with --prompt",
        ("--policy", "corm", "--capacity", 20): "--policy corm, --capacity: capacity 20 cannot hold",
        ("--policy", "h3o"): "'--policy': unknown policy 'h3o'",
        ("--policy", "corm:windw=3"): "'--policy': unknown option 'windw=3' in 'corm:windw=3'",
        ("--budget", "1.5"): "'--budget': a budget must be",
        ("--budget", ""): "'--budget': ",
        ("--budget", 41, "--policy", "corm"): "--budget 41 is more than --tokens 40, and corm cannot keep more: lower",
        (
            "--budget",
            5,
            "--policy",
            "h2o:recent=9",
        ): "--policy, --budget: a budget of 5 keys is below the 9 .* .in .h2o:recent=9,budget=5",
        ("--capacity", "half"): "'--capacity': 'half' is neither a number of slots nor the file of a plan",
        ("--json", tmp_path): "--json: cannot write .* it is a directory",
        ("--prompt", 40): "--policy full, --prompt 40: a prompt of 40 tokens",
    }.items():
        code, _, err = run("corm", *compare, *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert re.search(message, err), err


def test_out_of_memory_is_an_error_in_one_line(run, places, monkeypatch):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes")

    monkeypatch.setattr("corm_jax.command.generate.stream", exhausted)
    code, _, err = run("corm", "generate", *places["generate"])
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("corm: out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes: ask for fewer")


# One rule for all outputs


def writing(places, tmp_path):
    """Commands with an option that names a file."""
    quick = ("--policy", "corm:window=4,recent=2")
    compare, replay = (
        ("corm", "compare", *places["compare"], *quick),
        ("simulator", "replay", *places["replay"], *quick),
    )
    return {
        "compare --json": (*compare, "--json", "{file}"),
        "compare --plot": (*compare, "--plot", "{file}"),
        "replay --json": (*replay, "--json", "{file}"),
        "sweep --plot": ("simulator", "sweep", *places["sweep"], "--grid", "recent=1,2", "--plot", "{file}"),
        "bounds --plot": ("simulator", "bounds", *places["bounds"], *quick, "--plot", "{file}"),
        "plan --out": ("simulator", "plan", *places["replay"], *quick, "--out", "{file}"),
    }


@pytest.mark.parametrize(
    "name", ["compare --json", "compare --plot", "replay --json", "sweep --plot", "bounds --plot", "plan --out"]
)
def test_an_output_that_exists_is_replaced_only_on_overwrite(run, places, tmp_path, name):
    file = tmp_path / "there"
    file.write_text("before")
    arguments = [str(word).format(file=file) for word in writing(places, tmp_path)[name]]
    code, _, err = run(*arguments)
    option = name.split()[1]
    assert (code, err.count("\n"), file.read_text()) == (2, 1, "before")
    assert f"{option} {file} exists already: choose another name, delete it, or add --overwrite" in err
    before = set(tmp_path.rglob("*"))
    assert run(*arguments, "--overwrite")[0] == 0
    assert file.read_bytes() != b"before"
    assert set(tmp_path.rglob("*")) == before


def test_what_cannot_be_written_at_the_end_is_kept_and_everything_else_done(run, places, tmp_path, monkeypatch):
    """The folder of the JSON file disappears during the work; the picture and the table are there all the same."""
    kept, folder, plot = tmp_path / "kept", tmp_path / "folder", tmp_path / "plot.png"
    kept.mkdir()
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(kept))
    read_text = compare.read_text
    monkeypatch.setattr(
        compare, "read_text", lambda *a, **o: (folder.exists() and folder.rmdir(), read_text(*a, **o))[1]
    )
    options = ("--json", folder / "a.json", "--plot", plot, "--policy", "corm:window=4,recent=2")
    code, out, err = run("corm", "compare", *places["compare"], *options)
    assert (code, err.count("\n")) == (2, 1)
    where = re.fullmatch(rf"corm: cannot write {folder}/a.json: .*: the result is in (.*)\n", err)[1]
    assert where.startswith(str(kept))
    assert '"policy": "corm:window=4,recent=2"' in Path(where).read_text()
    assert "corm:window=4,recent=2" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_two_recordings_in_one_place(run, places, tmp_path):
    from corm_jax.evaluation.lock import only_writer

    with only_writer(tmp_path / ".out.lock", "a trace", "wait"):
        code, _, err = run("corm", "record", *places["record"])
    assert (code, "another process writes to" in err, "choose another --out" in err) == (2, True, True)
    assert run("corm", "record", *places["record"])[0] == 0
    code, _, err = run("corm", "record", *places["record"])
    assert (code, "exists already" in err) == (2, True)


def test_a_trace_that_does_not_fit_on_the_disk(run, places, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr("corm_jax.runs.recording.resume", lambda *_, **__: pytest.fail("a layer was read"))
    code, _, err = run("corm", "record", *places["record"])
    assert (code, "--out" in err, "are free: make room, or lower --tokens" in err) == (2, True, True)


# Processes of their own: streams, signals, terminals

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
PROGRESS = re.compile(r"^(corm: note: .*|.*: [\d,]+ of [\d,]+, \d+ s(, compiling)?)\n", re.MULTILINE)
MAIN = "import sys, corm_jax.command.cli as c; print('ready', file=sys.stderr, flush=True); c.main()"


def shell(command, **environment):
    """Runs a line of shell, in which ``$corm`` is the command line."""
    corm = f"{sys.executable} -c 'from corm_jax.command.cli import main; main()'"
    ran = subprocess.run(
        ["bash", "-c", f'corm="{corm}"; run() {{ eval "$corm" "$@"; }}; {command}'],
        env=ENVIRONMENT | {"JAX_ENABLE_COMPILATION_CACHE": "false"} | environment,
        capture_output=True,
        check=False,
    )
    return ran.returncode, ran.stdout, ran.stderr.decode()


def test_streams_that_are_closed_full_or_of_another_encoding():
    """One shell after the other, each with one command that takes no model."""
    _, out, err = shell(
        """
        run policies | true; echo ${PIPESTATUS[0]}
        run policies >/dev/full; echo $?
        run policies >&-; echo $?
        run fly 2>&-; echo $?
        export PYTHONIOENCODING=ascii COLUMNS=20 TERM=dumb NO_COLOR=1 LC_ALL=C
        run policies | grep -c '[^ -~]'; echo ${PIPESTATUS[0]}
        """
    )
    assert out.split() == [b"141", b"2", b"0", b"2", b"0", b"0"]
    assert err.splitlines() == ["corm: cannot use standard output: No space left on device"]


@pytest.fixture
def long_reading(places):
    """A command that takes many seconds: most of them to compile."""
    policies = [word for window in range(3, 30) for word in ("--policy", f"corm:window={window},recent=2,eager=true")]
    return [
        "compare",
        *map(str, places["compare"]),
        "--tokens",
        "280",
        *policies[:4],
        *("--policy", "h2o:recent=4,budget=9"),
        *policies,
    ]


@pytest.mark.slow
def test_interrupted_at_any_moment(long_reading, tmp_path):
    """Ctrl-C while XLA compiles used to end in a segmentation fault, more often than not."""
    report = str(tmp_path / "report.json")
    moments, processes = random.Random(0), []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGINT, signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, *long_reading, "--json", report],
            env=ENVIRONMENT | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr.readline() == "ready\n"
        processes.append((time.monotonic() + 6 * moments.random(), number, process))
    for moment, number, process in sorted(processes, key=lambda one: one[0]):
        time.sleep(max(moment - time.monotonic(), 0))
        process.send_signal(number)
    for _, number, process in processes:
        out, err = process.communicate()
        word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
        assert (process.returncode, out, PROGRESS.sub("", err)) == (128 + number, "", f"corm: {word}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["longbench", "text.txt", "trace"]


def test_an_exception_that_is_lost_in_a_callback():
    """JAX runs Python at garbage collections: by default an exception there is printed and lost."""
    code = """
import os, signal, time
from corm_jax.terminal.stopping import stoppable
class Busy:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000): pass
with stoppable("it"):
    Busy()
    time.sleep(0.5)
    time.sleep(20)
    print("nobody stopped it")
"""
    begin = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "it: interrupted\n")
    assert time.monotonic() - begin < 20


def test_a_process_that_does_not_listen_is_ended():
    code = """
import os, signal, time
from corm_jax.terminal.stopping import stoppable
with stoppable("it"):
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        try:
            time.sleep(20)
        except BaseException:
            pass
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (ran.returncode, ran.stderr) == (143, "it: terminated\n")


@pytest.mark.parametrize("columns", [20, 80])
def test_on_a_real_terminal(columns):
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    import struct

    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", "from corm_jax.command.cli import main; main()", "policies"],
        env={name: value for name, value in ENVIRONMENT.items() if name != "COLUMNS"},
        stdout=other,
        stderr=other,
    )
    os.close(other)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while part := os.read(main, 2**16):
            shown += part
    os.close(main)
    lines = shown.decode().splitlines()
    assert process.wait() == 0
    assert columns - 12 < max(map(len, lines)) <= columns
    assert "scissorhands" in shown.decode()


# Progress


def test_lines_of_progress_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(console, "FIRST", 0.05)
    monkeypatch.setattr(console, "EVERY", 0.05)
    monkeypatch.setattr(console, "_begun", begun := [])
    with console.progress_bar() as progress:
        task = progress.add_task("[b] full", total=300)
        progress.add_task("hidden", total=4, visible=False)
        progress.add_task("later", total=4)
        progress.update(task, completed=256)
        time.sleep(0.3)
        begun.append(time.monotonic() - 1)
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\[b\] full: 256 of 300, 0 s", lines[0])
    assert re.fullmatch(r"\[b\] full: 256 of 300, [01] s, compiling", lines[-1])
    assert 2 <= len(lines) <= 12


def test_short_work_prints_no_progress(capsys):
    with console.progress_bar() as progress:
        assert list(progress.track([1, 2, 3], description="short")) == [1, 2, 3]
    assert capsys.readouterr().err == ""


def test_compiling_is_noticed():
    console._listen()
    seen = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: (
            event.endswith("/jaxpr_to_mlir_module_duration") and seen.append(list(console._begun))
        )
    )
    jax.jit(lambda x: x * 3 + 1)(jax.numpy.arange(3.0)).block_until_ready()
    assert seen
    assert all(len(begun) == 1 for begun in seen)
    assert console._begun == []


# Compiled programs


@pytest.fixture
def updates(monkeypatch):
    """What JAX's configuration is told; and no variable of the environment stands in the way."""
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    for name in list(os.environ):
        if name.startswith("JAX_"):
            monkeypatch.delenv(name)
    return found


def test_compiled_programs_are_kept_unless_the_environment_says_otherwise(updates, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.keep()
    folder = updates["jax_compilation_cache_dir"]
    assert folder.startswith(str(tmp_path / "corm-jax" / "compiled"))
    assert updates["jax_persistent_cache_min_compile_time_secs"] == compiled.SHORTEST
    for name, value in (("JAX_COMPILATION_CACHE_DIR", "/x"), ("JAX_ENABLE_COMPILATION_CACHE", "false")):
        updates.clear()
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            compiled.keep()
        assert updates == {}
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # nothing can be made there
    compiled.keep()
    assert updates == {}


def test_entries_that_were_cut_short_are_removed(tmp_path):
    entry = zlib.compress(os.urandom(5000))
    for name, content in {"a": entry, "b": entry[:-1], "c": b"", "d": os.urandom(99)}.items():
        (tmp_path / f"{name}-cache").write_bytes(content)
    (tmp_path / "e-other").write_bytes(b"")
    compiled.tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-cache", "e-other", "looked-through"]
    os.utime(tmp_path / "a-cache", (1, 1))
    (tmp_path / "a-cache").write_bytes(b"")
    os.utime(tmp_path / "a-cache", (1, 1))
    compiled.tidy(tmp_path)
    assert (tmp_path / "a-cache").exists()  # what was looked through is not read again


def test_the_oldest_entries_go_when_there_are_too_many(tmp_path, monkeypatch):
    sizes = []
    for age in range(5):
        path = tmp_path / f"{age}-cache"
        path.write_bytes(zlib.compress(os.urandom(1000)))
        os.utime(path, (time.time() - age, time.time() - age))
        sizes.append(path.stat().st_size)
    monkeypatch.setattr(compiled, "LARGEST", sum(sizes[:3]))
    compiled.tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == ["0-cache", "1-cache", "2-cache"]


@pytest.mark.slow
def test_two_commands_share_compiled_programs_and_survive_damaged_ones(places, tmp_path):
    """Both at once, then one on entries that are cut short: no word about it, and whole entries after it."""
    cache = tmp_path / "cache"
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [
        sys.executable,
        "-m",
        "simulator",
        "replay",
        str(places["replay"][0]),
        "--policy",
        "corm:window=4,recent=2",
    ]

    def start():
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def end(process):
        out, err = process.communicate()
        assert (process.returncode, PROGRESS.sub("", err)) == (0, "")
        return re.sub(r"\d+\.\d$", "", out, flags=re.M)

    both = start(), start()
    expected = end(both[0])
    assert end(both[1]) == expected
    entries = list(cache.rglob("*-cache"))
    assert len(entries) > 2
    for path in entries:
        path.write_bytes(path.read_bytes()[:100])
    assert end(start()) == expected
    assert all(compiled.is_complete(path) for path in cache.rglob("*-cache"))
    assert len(list(cache.rglob("*-cache"))) == len(entries)
