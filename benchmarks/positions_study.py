"""The study of positions: does CORM depend on how positions enter attention? Small models that differ in nothing else.

    pip install -e ".[study]"
    python benchmarks/positions_study.py train DIRECTORY --held HELD --out STUDY       # 101 minutes of one core
    python benchmarks/positions_study.py measure HELD --study STUDY                    # STUDY/measures/*.json
    python benchmarks/positions_study.py tune DIRECTORY --held HELD --study STUDY      # STUDY/tuned/*.json
    python benchmarks/positions_study.py collect --study STUDY --out benchmarks/results/positions.json
    python benchmarks/positions_study.py report --figures docs                         # tables of the results kept here

DIRECTORY has the texts to train on and HELD others, as .txt files. Five kinds of models, rotary, ALiBi, learned, none
and the hybrid of rotary and ALiBi, are trained, with each of several seeds; see `benchmarks/positions/`. Whatever is
killed goes on where it was. Each command leaves out what is done already.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import jax
from positions import data, measure, report, train, tune
from positions.models import KINDS

from corm_jax.errors import CormError
from corm_jax.files import write_json
from corm_jax.terminal.console import Group, progress_bar

SIZE = {"vocab": 256, "dim": 128, "hidden": 256, "layers": 2, "heads": 4, "context": 512}
KEPT = Path(__file__).parent / "results" / "positions.json"


class Study:
    """A directory with the models of a study, and how they were made: ``study.json``, which cannot change."""

    def __init__(self, folder: Path, size: dict[str, int] | None = None, recipe: train.Recipe | None = None):
        self.folder, path = folder, folder / "study.json"
        if size and recipe:
            folder.mkdir(parents=True, exist_ok=True)
            asked = {"size": size, "recipe": json.loads(json.dumps(recipe._asdict()))}
            if path.exists() and (found := json.loads(path.read_text())) != asked:
                raise CormError(f"{path} says {found}, and {asked} is asked for: choose another --out")
            write_json(path, asked)
        if not path.exists():
            raise CormError(f"{folder} is no study, since it has no study.json: train first")
        said = json.loads(path.read_text())
        self.size, recipe_said = said["size"], said["recipe"]
        self.recipe = train.Recipe(**recipe_said | {"stages": tuple(map(tuple, recipe_said["stages"]))})

    def model(self, kind: str, seed: int):
        return train.load(self.of(kind, seed), kind, self.size, self.recipe)

    def of(self, kind: str, seed: int) -> Path:
        return self.folder / "models" / f"{kind}-{seed}"

    def trained(self, kinds=(), seeds=()) -> list[tuple[str, int]]:
        """The kinds and seeds of which there are models: all, or those asked for."""
        names = [path.name.rsplit("-", 1) for path in sorted((self.folder / "models").glob("*-*"))]
        found = [(kind, int(seed)) for kind, seed in names]
        asked = [one for one in found if one[0] in (kinds or KINDS) and one[1] in (seeds or [one[1]])]
        return sorted(asked, key=lambda one: (one[1], [*KINDS].index(one[0])))


@click.group(cls=Group)
def main() -> None:
    """Measure whether CORM depends on how positions enter attention."""


kinds = click.option("--kind", "kinds", multiple=True, type=click.Choice([*KINDS]), help="only these kinds")
seeds = click.option("--seed", "seeds", multiple=True, type=int, help="only these seeds")
study_option = data.folder_option("--study", help="what `train` has written")
held_option = data.folder_option("--held", help="texts to evaluate on")
each_option = click.option("--each", default=2, show_default=True, help="passages of each text")


@main.command("train")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@held_option
@click.option("--out", type=click.Path(path_type=Path), required=True, help="the directory of the study")
@kinds
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1), show_default=True)
@click.option(
    "--stage",
    "stages",
    type=(int, int, int, click.Choice(["", "noise"])),
    multiple=True,
    default=train.Recipe().stages,
    show_default=True,
    help="steps, rows, tokens a row, and the only kind of rows, or ''",
)
@click.option("--every", default=300, show_default=True, help="steps between checkpoints")
@click.option("--compute", type=click.Choice(["float32", "bfloat16"]), help="default: float32 on a CPU, else bfloat16")
def train_models(directory, held, out, kinds, seeds, stages, every, compute):
    """Trains the models."""
    compute = compute or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    study = Study(out, SIZE, train.Recipe(stages=tuple(stages)))
    texts = data.corpus(data.books(directory))
    passages = data.passages(data.corpus(data.books(held)), SIZE["context"], 2)
    print(f"{sum(map(len, texts)):,} bytes, {device()}", flush=True)
    for seed in seeds:
        for kind in kinds or KINDS:
            folder, started = study.of(kind, seed), time.perf_counter()
            folder.mkdir(parents=True, exist_ok=True)
            with counted(kind, seed, study.recipe.steps) as progress:
                train.train(
                    folder,
                    kind,
                    study.size,
                    seed,
                    study.recipe,
                    texts,
                    compute=compute,
                    watch=lambda model: measure.watch(passages, model),
                    progress=progress,
                    every=every,
                )
            *_, last = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
            said = ", ".join(f"{name} {last[name]:.3f}" for name in ("loss", "text", "first", "again"))
            print(f"{kind:8} seed {seed}: {said}; {time.perf_counter() - started:.0f} s", flush=True)


@main.command("measure")
@click.argument("held", type=click.Path(exists=True, file_okay=False, path_type=Path))
@study_option
@kinds
@seeds
@each_option
def measure_models(held, study, kinds, seeds, each):
    """Measures the models on passages of other texts."""
    study = Study(study)
    texts = data.passages(data.corpus(data.books(held)), study.size["context"], each)
    results_of(
        study,
        "measures",
        study.trained(kinds, seeds),
        len(texts),
        lambda kind, seed, progress: measure.measure(study.model(kind, seed), texts, progress),
    )


@main.command("tune")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@held_option
@study_option
@kinds
@seeds
@each_option
@click.option("--steps", default=tune.Tuning().steps, show_default=True)
def tune_models(directory, held, study, kinds, seeds, each, steps):
    """Fine-tunes models with CORM in their caches, and with the full cache for comparison."""
    study, recipe = Study(study), tune.Tuning(steps=steps)
    texts = data.corpus(data.books(directory))
    passages = data.passages(data.corpus(data.books(held)), study.size["context"], each)
    results_of(
        study,
        "tuned",
        study.trained(kinds, seeds),
        2 * steps,
        lambda kind, seed, progress: {
            "recipe": recipe._asdict(),
            **tune.compared(study.model(kind, seed), texts, passages, recipe, seed, progress),
        },
    )


@main.command("collect")
@study_option
@click.option("--out", type=click.Path(path_type=Path), required=True)
def collect(study, out):
    """Puts the results of a study, not its weights, into one file."""
    study = Study(study)
    every: dict[str, Any] = {"size": study.size, "recipe": study.recipe._asdict()}
    for name in ("measures", "tuned"):
        every[name] = [json.loads(path.read_text()) for path in sorted((study.folder / name).glob("*.json"))]
    every["logs"] = {
        f"{kind}-{seed}": [json.loads(line) for line in (study.of(kind, seed) / "log.jsonl").read_text().splitlines()]
        for kind, seed in study.trained()
    }
    write_json(out, rounded(every))


@main.command("report")
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=KEPT)
@click.option("--figures", type=click.Path(file_okay=False, path_type=Path), help="a directory for the pictures")
def report_results(results, figures):
    """Prints the tables, and draws the figures."""
    report.report(json.loads(results.read_text()), figures)


@contextmanager
def counted(kind: str, seed: int, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar for one model: what is yielded takes how much is done."""
    with progress_bar() as bar:
        task = bar.add_task(f"{kind}, seed {seed}", total=total)
        yield lambda done: bar.update(task, completed=done)


def results_of(
    study: Study,
    name: str,
    models: list[tuple[str, int]],
    total: int,
    find: Callable[[str, int, Callable[[int], None]], dict[str, Any]],
) -> None:
    """Writes what is found of each model into the folder ``name`` of a study, unless it is there."""
    for kind, seed in models:
        path = study.folder / name / f"{kind}-{seed}.json"
        if path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        started = time.perf_counter()
        with counted(kind, seed, total) as progress:
            found = find(kind, seed, progress)
        seconds = time.perf_counter() - started
        write_json(path, {"kind": kind, "seed": seed, "seconds": seconds, "device": device(), **found})
        print(f"{path}: {seconds:.0f} s", flush=True)


def rounded(value: Any) -> Any:
    """The same with floats of four digits behind the point."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def device() -> str:
    """What the work is done on."""
    found = jax.devices()[0]
    return f"{os.cpu_count()} {platform.machine()} cores" if found.platform == "cpu" else found.device_kind


if __name__ == "__main__":
    try:
        main()
    except CormError as error:
        raise SystemExit(f"positions_study: {error}") from None
