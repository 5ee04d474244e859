"""The contents of a result directory: the configuration of a run, and its rows. Files are checked against them."""

import reprlib
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

from corm_jax.errors import CormError
from corm_jax.files import STRICT

Format = Literal["corm-jax evaluation 2"]
FORMAT: Format = "corm-jax evaluation 2"
Kind = Literal["perplexity", "agreement", "recall", "longbench"]

MOST, NATS = 2**63 - 1, 1e9
RANGES = {
    name: least_and_most
    for names, least_and_most in (
        (("kept", "same", "depth", "score", "exact"), (0, 1)),
        (("live_bytes", "allocated_bytes", "overflow"), (0, MOST)),
        (("full_bytes", "length"), (1, MOST)),
        (("nll", "full_nll", "kl", "margin"), (-NATS, NATS)),
    )
    for name in names
}
"""The least and the largest value of each number of a row."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that determines the numbers of a run.

    Attributes:
      format: the version of the recorded fields and of the way in which prompts are made.
      kind: what is measured.
      policies: SPECs.
      budget: the budget of each policy, as in `corm_jax.policies.keys_of`.
      chunk: tokens between evictions.
      limit: the most examples of each task.
      settings: the settings of this kind of run.
      begin: the ids with which every prompt begins.
      prompts: a checksum of all prompts and answers, as token ids.
      versions, device, weights, data: versions of packages; the name of the device; checksums of weights and data.
    """

    __pydantic_config__: ClassVar = STRICT

    format: Format
    kind: Kind
    model: str
    dtype: str
    policies: list[str]
    budget: str | None
    chunk: int
    limit: int | None
    seed: int
    settings: dict[str, Any]
    begin: list[int]
    prompts: str
    versions: dict[str, str]
    device: str
    weights: str
    data: dict[str, str]

    def flat(self) -> dict[str, Any]:
        """Every setting by its name."""
        found = asdict(self)
        return found | found.pop("settings")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of a policy on an example.

    Attributes:
      policy: the SPEC that the user gave.
      ran: the SPEC with the budget for the example.
      kept: live share of the keys at the end.
      live_bytes, allocated_bytes, full_bytes: live, allocated and full memory of the cache.
      overflow: keys that were evicted for lack of a slot.
    """

    __pydantic_config__: ClassVar = STRICT

    policy: str
    example: str
    task: str
    ran: str
    kept: float
    live_bytes: int
    allocated_bytes: int
    full_bytes: int
    overflow: int

    def __post_init__(self):
        for field in fields(self):
            value, (least, most) = getattr(self, field.name), RANGES.get(field.name, (0, 0))
            if field.name in RANGES and value is not None and not least <= value <= most:
                raise CormError(f"{field.name}: must be from {least} to {most}, not {reprlib.repr(value)}")


@dataclass(frozen=True, kw_only=True)
class Perplexity(Row):
    """The result on a stretch: nats a token, over all positions and over each bucket of positions."""

    nll: float
    nll_by_position: list[float]


@dataclass(frozen=True, kw_only=True)
class Agreement(Row):
    """The result on a stretch: the means of `corm_jax.evaluation.agreement.Agreement`."""

    kl: float
    same: float
    nll: float
    full_nll: float


@dataclass(frozen=True, kw_only=True)
class Recall(Row):
    """The result on a recall task: ``margin`` if there are other answers, ``exact`` if an answer is generated."""

    length: int
    depth: float
    nll: float
    margin: float | None = None
    exact: float | None = None
    answer: str | None = None

    def __post_init__(self):
        super().__post_init__()
        needs = {"margin": self.task in ("pairs", "multikey")}
        needs |= dict.fromkeys(("exact", "answer"), self.task != "repeat")
        for name, needed in needs.items():
            if (getattr(self, name) is not None) != needed:
                raise CormError(f"{name}: the task {self.task!r} {'needs it' if needed else 'has none'}")


@dataclass(frozen=True, kw_only=True)
class LongBench(Row):
    """The result on a question: the task's metric, and the answer of the model."""

    score: float
    answer: str


ROWS: dict[str, type[Row]] = {
    "perplexity": Perplexity,
    "agreement": Agreement,
    "recall": Recall,
    "longbench": LongBench,
}
