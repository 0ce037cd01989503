"""The records of a study, and the protocols of the parts that make them.

A study is an append-only list of trials and of a person's decisions; a proposer is a function of
that list; nothing else has memory. All records are frozen. A failed trial is a row with a reason:
it has no energy, never an energy of 0, NaN or infinity. What follows from a record and is asked for
again and again is worked out once (`cached_property`): a study asks for each energy thousands of times.

Units: seconds are differences of a monotonic clock; joules everywhere but inside a meter, whose
counters are integers of microjoules.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from tuner.space import Config, Lever, Refused, SearchSpace, Value, excerpt, show

Unit = Literal["token", "image", "epoch"]

Quality = Literal["measured", "sampled", "replayed", "simulated", "estimated"]
"""Where a reading comes from, best first. The worst domain labels a total.

measured: a hardware counter of energy; sampled: power readings of a device, added up; replayed: looked up
in a recorded table; simulated: made by a model of noise; estimated: computed from CPU time.
"""

QUALITIES: tuple[Quality, ...] = ("measured", "sampled", "replayed", "simulated", "estimated")


# --- what is run -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is tuned, and under which load. The same for every trial of a study."""

    model: str | None = None
    """A model file, folder or name; None lets the runner make a model of its own."""
    size: str | None = None
    """The size of the runner's own model, where it makes one."""
    url: str | None = None
    """Base URL of a server that runs already, `http://localhost:8000/v1`; None where the runner starts its engine."""
    spec: str | None = None
    """Path of a file that describes the workload, for runners that read one."""
    dummy_weights: bool = False
    """Load random weights in the model's shape, where the engine can: energy needs no trained ones."""
    engine_args: tuple[str, ...] = ()
    """Further arguments of the engine, the same for every trial."""
    prompts: int = 8
    """Requests in one pass; for an image pipeline, images."""
    prompt_tokens: int = 96
    """Tokens of each prompt."""
    output_tokens: int = 32
    """Tokens generated for each prompt; the end of sequence is ignored."""
    request_rate: float | None = None
    """Requests a second, sent whether or not earlier ones are answered (open loop); None: as many at a time as the
    configuration's concurrency (closed loop)."""
    pixels: int = 256
    """Width and height of an image."""
    seed: int = 0
    """Seed of the prompts and of a generated model."""
    allow_lossy: bool = False
    """Whether parameters that can change the output's quality may be tuned."""
    quality: bool = False
    """Whether each launch also measures how far its output is from that of the default configuration."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one pass of the load did, counted by the engine."""

    units: int
    """Output tokens (or images)."""
    unit: Unit = "token"
    prompt_tokens: int = 0
    prefill_seconds: float | None = None
    """Time in prompt processing, summed over the requests. They overlap: it may exceed wall time."""
    decode_seconds: float | None = None
    """Time in token generation, summed over the requests."""
    request_seconds: tuple[float, ...] = ()
    """Wall time of each request."""
    ttft_seconds: tuple[float, ...] = ()
    """Time to the first token of each request, where answers are streamed."""
    itl_seconds: tuple[float, ...] = ()
    """Time between two tokens of one request, of all requests: read for the window's metrics, then dropped."""
    failed_requests: int = 0
    """Requests that brought no answer; a window that holds one does not count."""
    failure: str | None = None
    """Why the first of them brought none; read for the window's faults, then dropped."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Figures that the engine itself reports of this pass, by a name that says the unit; read for the window's
    metrics, as their mean over its passes, then dropped."""


class Engine(Protocol):
    """A loaded, warmed-up engine. `launch` yields it."""

    @property
    def effective(self) -> Mapping[str, Value]:
        """The parameters as the engine says it runs them, read back after loading."""

    def run_pass(self) -> Work:
        """Send the whole load once and wait for the last answer."""


@runtime_checkable
class Changeable(Protocol):
    """An engine whose `request` and `live` parameters can be set while it runs."""

    def change(self, config: Config) -> None:
        """Go on with `config`, which differs from the running one in such parameters only.

        Raises `RuntimeError` where the engine refuses; it is then launched anew.
        """


@runtime_checkable
class Judged(Protocol):
    """An engine that can say how good its output is."""

    def quality(self, reference: Path) -> Mapping[str, float]:
        """How far the output is from that of the default configuration; `quality_loss` is the figure to limit.

        Text: `nll_nats_per_token` of a fixed text, and as loss by how much it is above the default's. Images:
        `ssim` to the default's image of the same seed, and as loss 1 - ssim. The first call, on the default, writes
        what the others are compared with to `reference`, a file that does not exist yet, and has a loss of 0.
        """


@runtime_checkable
class Momentary(Protocol):
    """An engine that may end with each pass, as a benchmark's command does."""

    @property
    def starts_each_pass(self) -> bool:
        """Whether the next pass starts it anew: then loading is inside of every window and not told apart."""


@runtime_checkable
class Explained(Protocol):
    """An engine that found figures outside the windows, such as `compile_seconds`."""

    @property
    def figures(self) -> Mapping[str, float]:
        """By a name that says the unit."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """How an engine is run for good: what `tune apply` writes down in the form that is asked for."""

    argv: tuple[str, ...] = ()
    """The command, word by word."""
    env: Mapping[str, str] = field(default_factory=dict)
    folder: str | None = None
    """Where the command starts; None where that does not matter."""
    port: int | None = None
    """Where it listens."""
    image: str | None = None
    """The engine's official container image."""
    image_argv: tuple[str, ...] = ()
    """The words after the image's entry point."""
    paths: tuple[str, ...] = ()
    """Files and folders that must be there, in the container too."""
    gpus: bool = False
    python: str | None = None
    """A script that does the same, for engines that are libraries."""
    modelfile: str | None = None
    """Ollama's own form."""

    def command(self) -> str:
        """The command with its folder and variables, for any POSIX shell.

        A line break in a word stays one, in quotes: no other form is read alike by every shell.
        """
        before = [
            *(["-C", self.folder] if self.folder else []),
            *(f"{name}={value}" for name, value in self.env.items()),
        ]
        words = [*(["env", *before] if before else []), *self.argv]
        return shlex.join(words)


def python_forms(about: str, imports: Sequence[str], statements: Sequence[str]) -> tuple[str, str]:
    """A Python program as one line for `python -c`, and as a script that begins with `about`.

    No statement may be compound: a line holds none.
    """
    script = [f'"""{about}"""', "", *imports, "", *statements, ""]
    return "; ".join([*imports, *statements]), "\n".join(script)


class Runner(Protocol):
    """A file in `runners/`: four functions at module level.

    One that starts no engine has `client(config, target, said)` in place of `command`: it gives a `Service`; `said` is
    what the journal holds of `identity` and of what the engine named, and nobody is asked again.

    Five more are asked for where a runner has them: `describe(target)` is a sentence on the model, `load(target)` one
    on a load that is not the target's, `metrics(target)` names the figures of its own that limits may be set on,
    `lacks(target)` those of every engine that this one never reports, each with the reason and the way on, and
    `service(config, target)` gives a `Service`.
    """

    def space(self, target: Target) -> SearchSpace:
        """What may be tuned on this machine for this target.

        Raises `Refused` when the target cannot be run (no such model, engine not installed).
        """

    def identity(self, target: Target) -> dict[str, str]:
        """Engine, its version, the model and its hash: what must agree before results may meet."""

    def launch(self, config: Config, target: Target) -> AbstractContextManager[Engine]:
        """Load and warm up before the yield, shut down after it: both outside the measured window."""

    def command(self, config: Config, target: Target) -> str:
        """The shell command that starts this engine with `config`."""


@dataclass(frozen=True)
class _Option:
    """One option of `tune run` that says what is run, by its name in `Target`."""

    flag: str
    taken_by: tuple[str, ...]
    """The shipped workloads that heed it."""


_TEXT = ("llama", "llama-server", "vllm", "sglang", "ollama", "server", "transformers")

OPTIONS: Mapping[str, _Option] = {
    "size": _Option("--size", ("llama", "llama-server", "vllm", "sglang", "transformers", "diffusion")),
    "url": _Option("--url", ("server",)),
    "spec": _Option("--spec", ("command",)),
    "dummy_weights": _Option("--dummy-weights", ("vllm", "sglang", "transformers")),
    "engine_args": _Option("--engine-arg", ("llama-server", "vllm", "sglang", "diffusion")),
    "request_rate": _Option("--request-rate", ("llama-server", "vllm", "sglang", "ollama", "server")),
    "prompt_tokens": _Option("--prompt-tokens", (*_TEXT, "command")),
    "output_tokens": _Option("--output-tokens", (*_TEXT, "command")),
    "pixels": _Option("--pixels", ("diffusion",)),
}
"""Options that some workloads have no use for. What is not listed (--model, --prompts, --seed) all of them heed."""


def refuse_unused(target: Target, workload: str, hints: Mapping[str, str] | None = None) -> None:
    """For every runner: an option that it would pass over in silence makes a study of something else.

    An option at its default counts as left out.

    Args:
        target: what to run.
        workload: the runner's own name, as `OPTIONS` lists it.
        hints: by name in `Target`, what to do instead, as the end of the sentence.

    Raises:
        Refused: all such options at once, each with its value and the workloads that heed it.
    """
    usual = Target()
    faults = []
    for name, option in OPTIONS.items():
        given = getattr(target, name)
        if workload in option.taken_by or given == getattr(usual, name):
            continue
        value = "" if given is True else " ".join(given) if isinstance(given, tuple) else show(given)
        plain = value.isprintable() and len(value) <= 100
        shown = f" {value if plain else excerpt(value, 100)}" if value else ""
        takers = " and ".join(filter(None, (", ".join(option.taken_by[:-1]), option.taken_by[-1])))
        hint = f"; {hints[name]}" if hints and name in hints else ""
        faults.append(
            f"{option.flag}{shown}: the {workload} workload has no use for it ({takers} "
            f"{'has' if len(option.taken_by) == 1 else 'have'}); leave it out{hint}"
        )
    if faults:
        raise Refused("; ".join(faults))


def refuse_empty_load(target: Target) -> None:
    """For runners of language models: a pass needs a request, a prompt and an answer. Raises `Refused`."""
    for option, value in (
        ("--prompts", target.prompts),
        ("--prompt-tokens", target.prompt_tokens),
        ("--output-tokens", target.output_tokens),
    ):
        if value < 1:
            raise Refused(f"{option} {value}: expected at least 1")


def refuse_long_load(target: Target, context: int, whose: str) -> None:
    """For runners of language models: a prompt and its answer fit the model's context. Raises `Refused`.

    Args:
        target: what to run.
        context: tokens; 0 where it is not known, and nothing is refused.
        whose: whose context it is, as the end of the sentence "the context ...".
    """
    if 0 < context < target.prompt_tokens + target.output_tokens:
        raise Refused(
            f"--prompt-tokens {target.prompt_tokens} and --output-tokens {target.output_tokens}: expected at most "
            f"{context} tokens together, the context {whose}"
        )


# --- what is measured ------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """A domain's energy counter: microjoules since some fixed moment, never decreasing.

    `low` and `high` bound it where it is an estimate, and equal it where it is a counter.
    """

    microjoules: int
    low: int
    high: int

    @classmethod
    def exact(cls, microjoules: int) -> Reading:
        return cls(microjoules, microjoules, microjoules)


@dataclass(frozen=True)
class Energy:
    """The energy of one domain over one window, in joules."""

    joules: float
    low: float
    high: float


TRIAL_SECONDS = "TUNE_TRIAL_SECONDS"
"""The variable that tells an engine's client in a worker when its trial is given up."""


class EngineError(RuntimeError):
    """A failure of an engine that its message names in a whole sentence, as that of a plain `RuntimeError` does."""


class MeterError(Exception):
    """A counter could not be read, or what it read cannot be true. The window is invalid."""


@runtime_checkable
class Meter(Protocol):
    """A source of energy readings."""

    name: str
    quality: Quality
    blind_to: frozenset[Lever]
    """Levers whose effect on energy this meter cannot see."""
    update_seconds: float
    """Between two updates of the slowest domain; 0.0 where every reading is made at the moment it is asked for."""

    def domains(self) -> tuple[str, ...]:
        """Names of the domains: `gpu0`, `cpu0`, `dram0`."""

    def read(self) -> dict[str, Reading]:
        """All domains at this moment. Raises `MeterError`; never leaves a domain out, never makes one up."""

    def close(self) -> None:
        """Release handles and threads; may be called twice."""


@dataclass(frozen=True)
class Span:
    """Least, mean and largest of a figure that was sampled about once a second."""

    low: float
    mean: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """What the hardware said of itself during a window, beside its energy. It explains; it is never the objective."""

    samples: int = 0
    spans: Mapping[str, Span] = field(default_factory=dict)
    """`gpu0_celsius`, `gpu0_sm_mhz`, `gpu0_memory_mhz`, `gpu0_watts`, `gpu0_busy` (a share), `cpu_celsius`, `cpu_mhz`;
    only what can be read here."""
    throttled: tuple[str, ...] = ()
    """Every reason to run slower that was reported, `gpu0: hardware thermal slowdown`; also the harmless ones."""


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """How an engine came to its steady state, after loading and before the first window."""

    seconds: float
    units_per_second: tuple[float, ...]
    """Throughput of each slice, in order."""
    steady: bool
    """Whether the last slices agreed before the time for it was over."""


@dataclass(frozen=True, kw_only=True)
class Idle:
    """Power while nothing is asked of the machine: without an engine, and with the engine loaded and waiting."""

    machine_watts: float
    loaded_watts: float
    seconds: float
    """Length of each of the two windows."""
    quality: Quality


@dataclass(frozen=True)
class Noise:
    """How far two launches of one configuration lie apart: the standard deviation of ln(joules per unit)."""

    sigma: float
    degrees: int
    """Degrees of freedom behind `sigma`; 0 where it is an assumption."""
    source: str
    """`calibration NAME`, `the repeats of this study`, or `assumed`."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One window over one pass (or several) of the load."""

    work: Work
    seconds: float
    """Wall time of the window."""
    energy: Mapping[str, Energy]
    """By domain. Empty when the window is invalid."""
    quality: Quality
    """The worst quality among the domains."""
    meter: str
    cpu_seconds: float | None = None
    """CPU time of the worker and its children inside the window."""
    other_cpu_seconds: float | None = None
    """CPU time that everything else on the machine used inside the window."""
    peak_memory_bytes: int | None = None
    """Largest resident set of the worker so far."""
    passes: int = 1
    """Passes of the load in the window."""
    started_unix: float | None = None
    """When it began, for people and for meters outside; never subtracted."""
    readings: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Each domain's counter at the start and at the end, in microjoules, as it was read."""
    aligned: bool = False
    """Whether both ends were put on a tick of the slowest counter."""
    wraps: Mapping[str, int] = field(default_factory=dict)
    """How often a domain's counter started again at 0 inside the window; only domains whose counter did."""
    telemetry: Telemetry | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What else this window showed, by a name that says its unit (`ttft_p95_s`): latencies, throughput, quality."""
    invalid: tuple[str, ...] = ()
    """The causes that make this window invalid; empty when it counts."""

    @property
    def valid(self) -> bool:
        return not self.invalid

    @property
    def joules(self) -> float:
        return sum(e.joules for e in self.energy.values())

    @cached_property
    def joules_per_unit(self) -> float | None:
        """Total joules per output unit, or None for a window that does not count."""
        return self.joules / self.work.units if self.valid and self.energy and self.work.units else None


# --- what is proposed ------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """One turn of a conversation with a chat model."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A chat's answer. Token counts are None where the provider (or the person) gave none."""

    text: str
    model: str
    input_tokens: int | None = None
    output_tokens: int | None = None
    seconds: float = 0.0


class ChatError(Exception):
    """The chat stays away: retries are used up or the provider refuses. The message is one sentence."""


class Chat(Protocol):
    """A chat model, or a person who carries prompts to one."""

    @property
    def name(self) -> str:
        """`openai:MODEL`, `anthropic:MODEL` or `paste`."""

    def reply(self, messages: Sequence[Message], schema: Mapping[str, object] | None) -> Reply:
        """Answer the last message. `schema` is a JSON schema for the answer, used where the provider can.

        Raises `ChatError`. A key never appears in an error.
        """


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One prompt and its answer, as they were sent and received."""

    prompt: str
    reply: Reply
    fault: str | None = None
    """Why the answer was not used; None when it became the proposal."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A configuration to try next, and where it came from."""

    config: Config
    source: str
    """Who proposed it: `default`, `llm`, `rules`, `sobol`, `random`, `tpe`, `gp`, `cmaes`, `human`."""
    reason: str = ""
    predicted_joules_per_unit: float | None = None
    in_place_of: str | None = None
    """The source whose proposal this one replaces: a fallback or a person's edit is never silent."""
    exchanges: tuple[Exchange, ...] = ()
    """The prompts that led to it, also the refused ones; empty where no chat took part."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One configuration, run in a process of its own: once, or again where the search wanted to be sure.

    Every launch is a `Trial`; the first one holds the others in `repeats`. What a launch measured is in
    `launch_joules_per_unit`, what is known of the configuration in `joules_per_unit`.
    """

    number: int
    config: Config
    proposal: Proposal
    measurements: tuple[Measurement, ...] = ()
    error: str | None = None
    """Why it failed, in one sentence; None when it was measured."""
    log: tuple[str, ...] = ()
    """The last lines of the engine's log, of a trial that failed."""
    effective: Mapping[str, Value] = field(default_factory=dict)
    """What the engine really ran with, read back after loading."""
    seconds: float = 0.0
    """Wall time of the whole trial, loading and warm-up included."""
    load_seconds: float | None = None
    started_unix: float = 0.0
    """When it started, for people; never subtracted."""
    segment: int = 0
    """Raised by a forced resume on another machine or engine; segments are not compared."""
    warm_up: WarmUp | None = None
    idle: Idle | None = None
    """Measured with the first trial of a study."""
    start_celsius: Mapping[str, float] = field(default_factory=dict)
    """Temperatures when it started, after the devices had cooled down: `gpu0_celsius`, `cpu_celsius`; only what
    can be read here. The segment's first trial says what the others cool down to, within 2 degrees."""
    spent: Mapping[str, Energy] = field(default_factory=dict)
    """Energy of the trial by domain, from before loading until the engine is stopped; empty when it is not known."""
    load_energy: Mapping[str, Energy] = field(default_factory=dict)
    """Energy of loading alone, by domain; empty when it is not known, or when the engine ran already."""
    reused: bool = False
    """Measured on an engine that ran already: only `request` or `live` parameters were changed."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Figures of this launch taken once, outside the windows: `quality_loss`, `compile_seconds`."""
    over_limit: bool = False
    """It was measured, and breaks a limit: `error` says which. It has no energy that could be the best."""
    repeats: tuple[Trial, ...] = ()
    """Further launches of this configuration, also those that failed."""

    @cached_property
    def valid(self) -> tuple[Measurement, ...]:
        """The windows of this launch that count."""
        return tuple(m for m in self.measurements if m.joules_per_unit is not None)

    @property
    def launch_joules_per_unit(self) -> float | None:
        """Of this launch alone: sum of joules over sum of units of the valid windows; None when it failed."""
        return None if self.error is not None else self.shown_joules_per_unit

    @cached_property
    def shown_joules_per_unit(self) -> float | None:
        """The same of a launch that breaks a limit too: to be shown beside its reason, never to be the best."""
        if (self.error is not None and not self.over_limit) or not self.valid:
            return None
        return sum(m.joules for m in self.valid) / sum(m.work.units for m in self.valid)

    @property
    def launches(self) -> tuple[Trial, ...]:
        """Every launch of this configuration that was measured, this one first; none when this one failed."""
        if self.launch_joules_per_unit is None:
            return ()
        return (self, *(r for r in self.repeats if r.launch_joules_per_unit is not None))

    @cached_property
    def joules_per_unit(self) -> float | None:
        """Geometric mean over the launches; None when the trial failed."""
        return _geometric_mean([t.launch_joules_per_unit for t in self.launches])

    @property
    def joules_per_unit_bounds(self) -> tuple[float, float] | None:
        """The bounds that an estimate's own range gives; both ends equal for a counter."""
        ends = [_bounds(t) for t in self.launches]
        low, high = _geometric_mean([low for low, _ in ends]), _geometric_mean([high for _, high in ends])
        return None if low is None or high is None else (low, high)

    @property
    def relative_sd(self) -> float | None:
        """Standard deviation between the windows of this launch over their mean; None below 2 windows."""
        values = [v for m in self.valid if (v := m.joules_per_unit) is not None]
        if len(values) < 2:
            return None
        mean = statistics.fmean(values)
        return statistics.stdev(values) / mean if mean else None

    @property
    def units_per_second(self) -> float | None:
        """Units over seconds, over the windows of all launches."""
        windows = [m for t in self.launches for m in t.valid]
        return sum(m.work.units for m in windows) / sum(m.seconds for m in windows) if windows else None

    @property
    def metrics(self) -> dict[str, float]:
        """Mean of each metric over the windows of all launches that have it, and of each figure over the launches."""
        launches = self.launches or (self,)
        found = [m.metrics for t in launches for m in t.valid] + [t.figures for t in launches]
        known = {name: [f[name] for f in found if name in f] for figures in found for name in figures}
        return {name: statistics.fmean(values) for name, values in known.items()}

    @property
    def quality(self) -> Quality | None:
        """The worst among all launches."""
        windows = (m for t in (self, *self.launches[1:]) for m in t.valid)
        return max((m.quality for m in windows), key=QUALITIES.index, default=None)


def _bounds(launch: Trial) -> tuple[float, float]:
    units = sum(m.work.units for m in launch.valid)
    energies = [e for m in launch.valid for e in m.energy.values()]
    return sum(e.low for e in energies) / units, sum(e.high for e in energies) / units


def _geometric_mean(values: Sequence[float | None]) -> float | None:
    """One value stays as it is, to the bit; an estimate of 0 J makes the mean 0."""
    known = [v for v in values if v is not None]
    if len(known) < 2:
        return known[0] if known else None
    return math.exp(statistics.fmean(map(math.log, known))) if all(v > 0 for v in known) else 0.0


# --- what has happened -----------------------------------------------------------------------

Action = Literal["accept", "edit", "reject", "remark", "forbid", "batch", "stop", "resume"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a person said between two trials."""

    action: Action
    before_trial: int
    """The number of the trial that comes next."""
    remark: str = ""
    parameter: str | None = None
    value: Value | None = None
    proposal: Proposal | None = None
    """The proposal that was decided on, where there was one."""
    edited: Proposal | None = None
    """What the person made of it, for an edit."""


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """One more launch of a configuration that has been measured, between two trials of the search."""

    trial: Trial
    """The launch; its number is that of the trial that it repeats."""
    purpose: Literal["contender", "sentinel"]
    """contender: would be the best, so one launch is not enough; sentinel: has the machine drifted?"""
    after: int
    """How many trials were done by then."""


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Prompts that were answered but led to no proposal: the chat stayed away, or the study was stopped."""

    before_trial: int
    exchanges: tuple[Exchange, ...]


@dataclass(frozen=True)
class History:
    """Everything that a proposer may know, each kind of event in the order it happened."""

    trials: tuple[Trial, ...] = ()
    decisions: tuple[Decision, ...] = ()
    lost: tuple[Lost, ...] = ()
    repeats: tuple[Repeat, ...] = ()
    """In the order they happened; each one is also in the `repeats` of its trial."""
    noise: Noise | None = None
    """What a calibration of this machine, engine, model and meter found; None without one."""
    segment: int = 0
    """The newest segment; it may have no trial yet."""

    def __len__(self) -> int:
        return len(self.trials)

    def add(self, event: Trial | Repeat | Decision | Lost) -> History:
        """The history with one more event."""
        if isinstance(event, Trial):
            return replace(self, trials=(*self.trials, event), segment=event.segment)
        if isinstance(event, Repeat):
            number, launch = event.trial.number, event.trial
            trials = tuple(replace(t, repeats=(*t.repeats, launch)) if t.number == number else t for t in self.trials)
            return replace(self, trials=trials, repeats=(*self.repeats, event))
        if isinstance(event, Lost):
            return replace(self, lost=(*self.lost, event))
        return replace(self, decisions=(*self.decisions, event))

    @property
    def current(self) -> tuple[Trial, ...]:
        """The trials of the newest segment: the only ones that may be compared with each other."""
        return tuple(t for t in self.trials if t.segment == self.segment)

    @property
    def measured(self) -> tuple[Trial, ...]:
        return tuple(t for t in self.current if t.joules_per_unit is not None)

    @property
    def failed(self) -> tuple[Trial, ...]:
        return tuple(t for t in self.current if t.joules_per_unit is None)

    @property
    def default(self) -> Trial | None:
        """The default configuration's trial, when it was measured."""
        return next((t for t in self.measured if t.proposal.source == "default"), None)

    @property
    def best(self) -> Trial | None:
        """Least joules per unit; the earlier one of two equals."""
        return min(self.measured, key=lambda t: (t.joules_per_unit or 0.0, t.number), default=None)

    def find(self, config: Mapping[str, Value]) -> Trial | None:
        """The newest comparable trial of this very configuration."""
        return next((t for t in reversed(self.current) if t.config == config), None)


class Proposer(Protocol):
    """A way of choosing the next configuration."""

    @property
    def name(self) -> str:
        """What tables call it: a trial's `source`."""

    def propose(self, space: SearchSpace, history: History) -> Proposal | None:
        """The next configuration, checked against `space`; None when nothing is left to try.

        A function of its arguments and of the seed it was built with: asking twice gives the same answer.
        """


Goal = Callable[[History], str | None]
"""The reason to stop as a sentence, or None to go on."""
