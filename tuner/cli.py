"""The command line: read options, build the parts, call one function, choose the exit code.

Results go to standard output, progress and warnings to standard error. Exit codes: 0 the goal was
reached (or there was none to miss), 1 something failed, 2 the command was wrong, 3 the threshold was
not reached, by the confirmation where there is one, 130 and 143 interrupted. Whatever happens, finished
trials are kept.
"""

from __future__ import annotations

import contextlib
import errno
import math
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tuner import __version__
from tuner.space import Refused

if TYPE_CHECKING:
    from tuner.assemble import Bench
    from tuner.calls import Call
    from tuner.compare import Question, Store
    from tuner.confirm import Saving
    from tuner.control import PowerControl
    from tuner.convergence import Target as Goal
    from tuner.display import Screen
    from tuner.files import Kind
    from tuner.journal import Changes, End, Header, Journal, Plan
    from tuner.meters import MeterOptions
    from tuner.outcome import Outcome
    from tuner.study import Threshold
    from tuner.trial import Chat, Target, Trial

app = typer.Typer(
    name="tune",
    help="Find the runtime setting with the least energy per token, or per image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

DEFAULT_TRIALS = 15
DEFAULT_PAIRS = 8
LEAST_PAIRS = 6
"""Fewer pairs show nothing with 95 % confidence (`tuner.intervals.LEAST_VALUES`)."""

SUCCESS, FAILURE, USAGE, UNFINISHED = 0, 1, 2, 3


# Panels of `--help`.
LOAD = "What is run"
PROPOSE = "Who proposes"
SPACE = "What may change"
STOP = "When to stop"
MEASURE = "How it is measured"
TRUST = "How sure to be"
STUDY = "The study"
COMPARE = "What is compared"
OUTPUT = "What comes out"
MONEY = "What it costs"


class Terminated(BaseException):
    """SIGTERM or SIGHUP: leave as Ctrl-C does, with the signal's own exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


# --- options that several commands have --------------------------------------------------------

Workload = Annotated[
    str,
    typer.Option(
        "--workload",
        "-w",
        help="Engine to tune: a runner's name, a path to a runner's file, or a TOML file that describes a command"
        " (the same as `--workload command --spec FILE`).",
        rich_help_panel=LOAD,
    ),
]
Model = Annotated[str | None, typer.Option(help="Model to run. Left out, the runner makes one.", rich_help_panel=LOAD)]
Size = Annotated[str | None, typer.Option(help="Size of the model that the runner makes.", rich_help_panel=LOAD)]
Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="With `--workload server`: a server that runs already, `http://localhost:8000/v1`.",
        rich_help_panel=LOAD,
    ),
]
Spec = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="With `--workload command`: the TOML file of your own benchmark.", rich_help_panel=LOAD
    ),
]
DummyWeights = Annotated[
    bool,
    typer.Option(
        "--dummy-weights", help="Random weights in the model's shape, where the engine can.", rich_help_panel=LOAD
    ),
]
EngineArg = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WORD",
        help="Further argument of the engine, the same for every trial. The flag of a parameter takes it out of the"
        " space (`--pin` holds it there); what tune sets itself is refused. Repeatable.",
        rich_help_panel=LOAD,
    ),
]
RequestRate = Annotated[
    float | None,
    typer.Option(
        min=1e-6,
        help="Requests a second, whether or not earlier ones are answered (open loop). Left out, as many at a time as"
        " the setting's concurrency.",
        rich_help_panel=LOAD,
    ),
]
Pixels = Annotated[int, typer.Option(min=8, max=16384, help="Width and height of an image.", rich_help_panel=LOAD)]
Limits = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        metavar="METRIC<=NUMBER",
        help="What a setting must keep to, whatever it saves: `ttft_p95_s<=0.5`, `tokens_per_s>=20`,"
        " `quality_loss<=0.01` (which also allows lossy parameters). Repeatable.",
        rich_help_panel=SPACE,
    ),
]
Prompts = Annotated[
    int,
    typer.Option(
        min=1,
        max=100_000,
        help="Requests in one pass of the load; images, where images are made.",
        rich_help_panel=LOAD,
    ),
]
PromptTokens = Annotated[int, typer.Option(min=1, max=10_000_000, help="Tokens of each prompt.", rich_help_panel=LOAD)]
OutputTokens = Annotated[
    int, typer.Option(min=1, max=10_000_000, help="Tokens generated for each prompt.", rich_help_panel=LOAD)
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the prompts and of the proposer.", rich_help_panel=LOAD)]
AllowLossy = Annotated[
    bool,
    typer.Option("--allow-lossy", help="Also tune what can change the quality of the output.", rich_help_panel=SPACE),
]
Pin = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Keep a parameter at a value. Repeatable.", rich_help_panel=SPACE),
]
Narrow = Annotated[
    list[str] | None,
    typer.Option(
        "--range", metavar="NAME=LOW..HIGH", help="Narrow a parameter's range. Repeatable.", rich_help_panel=SPACE
    ),
]
AllowPowerControl = Annotated[
    bool,
    typer.Option(
        "--allow-power-control",
        help="Also tune the GPU's power limit and locked SM clock. Needs root; they are put back afterwards."
        " Left out, neither is touched.",
        rich_help_panel=SPACE,
    ),
]
MeterSpec = Annotated[
    str,
    typer.Option(
        help="Where energy is read: `auto`, `nvml`, `rapl`, `nvml+rapl`, `zeus`, `rapl+zeus`, `wall` or `estimate`.",
        rich_help_panel=MEASURE,
    ),
]
RequireMeasured = Annotated[
    bool, typer.Option("--require-measured", help="Refuse to run on estimated energy.", rich_help_panel=MEASURE)
]
CpuWatts = Annotated[
    str | None,
    typer.Option(
        metavar="LOW..HIGH",
        help="Full-load watts of your CPU, for the estimate where there is no counter.",
        rich_help_panel=MEASURE,
    ),
]
WallCommand = Annotated[
    str | None,
    typer.Option(
        metavar="CMD",
        help="With --meter wall: a command that prints watts, joules or watt-hours. Write secrets as '${NAME}',"
        " read from the environment.",
        rich_help_panel=MEASURE,
    ),
]
WallUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="With --meter wall: an HTTP address in place of a command.", rich_help_panel=MEASURE
    ),
]
WallUnit = Annotated[
    str | None,
    typer.Option(
        metavar="UNIT", help="Unit of a number that has none: `W`, `kW`, `J`, `Wh`, `kWh`, ...", rich_help_panel=MEASURE
    ),
]
WallField = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Which number: `aenergy.total` in JSON, or the words before it in a text.",
        rich_help_panel=MEASURE,
    ),
]
WallInterval = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Between two samples of power. [default: 1s]", rich_help_panel=MEASURE),
]
Windows = Annotated[int, typer.Option(min=1, max=1000, help="Measured windows in one trial.", rich_help_panel=MEASURE)]
Window = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="Least length of one window; it holds whole passes. [default: 2s, on a GPU counter 10s, at the wall 30s]",
        rich_help_panel=MEASURE,
    ),
]
Timeout = Annotated[str, typer.Option(metavar="TIME", help="End a trial that takes longer.", rich_help_panel=MEASURE)]
WarmUp = Annotated[
    str | None,
    typer.Option(
        metavar="LEAST..MOST",
        help="Time before the first window, until throughput and temperature are steady."
        " [default: 1s..10s, on a GPU counter 10s..120s]",
        rich_help_panel=MEASURE,
    ),
]
CoolDown = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="Wait at most so long before a trial for the temperature of the first one."
        " [default: 60s on a GPU counter, 30s on a CPU counter, else 0]",
        rich_help_panel=MEASURE,
    ),
]
MostOthers = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Share of all CPUs that other processes may use before a window does not count; 1 counts"
        " every window, also beside other processes on the GPU.",
        rich_help_panel=MEASURE,
    ),
]


# --- tune run --------------------------------------------------------------------------------


@app.command()
def run(
    context: typer.Context,
    workload: Workload = "llama",
    template: Annotated[
        str | None,
        typer.Option(
            help="Prompt for the LLM: `enhanced`, `baseline`, or a file of your own. [default: enhanced]",
            rich_help_panel=PROPOSE,
        ),
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option(
            help="Who proposes: `openai:MODEL`, `anthropic:MODEL`, or `paste` (you carry prompts to a chat)."
            " Left out, a key in the environment picks its provider.",
            rich_help_panel=PROPOSE,
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            help="Server of an `openai:` model: Ollama, vLLM, llama.cpp, LM Studio, OpenRouter.",
            rich_help_panel=PROPOSE,
        ),
    ] = None,
    proposer: Annotated[
        str | None,
        typer.Option(
            help="Propose without an LLM: `rules`, `sobol`, `random`, `tpe`, `gp`, `cmaes` or `grid`.",
            rich_help_panel=PROPOSE,
        ),
    ] = None,
    batch: Annotated[
        bool, typer.Option("--batch", help="Run every proposal without asking.", rich_help_panel=PROPOSE)
    ] = False,
    model: Model = None,
    size: Size = None,
    prompts: Prompts = 8,
    prompt_tokens: PromptTokens = 96,
    output_tokens: OutputTokens = 32,
    request_rate: RequestRate = None,
    pixels: Pixels = 256,
    url: Url = None,
    spec: Spec = None,
    dummy_weights: DummyWeights = False,
    engine_arg: EngineArg = None,
    seed: Seed = 0,
    allow_lossy: AllowLossy = False,
    pin: Pin = None,
    narrow: Narrow = None,
    limit: Limits = None,
    allow_power_control: AllowPowerControl = False,
    threshold: Annotated[
        str | None,
        typer.Option(
            help="Stop at this energy: `0.8x` of the default's, or `0.45J` per token or image.", rich_help_panel=STOP
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Stop after so many trials, the default's too. [default: {DEFAULT_TRIALS}, none with --time]",
            rich_help_panel=STOP,
        ),
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(
            "--time",
            metavar="TIME",
            help="Stop when the trials took `90s`, `20m` or `2h` together.",
            rich_help_panel=STOP,
        ),
    ] = None,
    meter: MeterSpec = "auto",
    require_measured: RequireMeasured = False,
    cpu_watts: CpuWatts = None,
    wall_command: WallCommand = None,
    wall_url: WallUrl = None,
    wall_unit: WallUnit = None,
    wall_field: WallField = None,
    wall_interval: WallInterval = None,
    windows: Windows = 5,
    window: Window = None,
    timeout: Timeout = "10m",
    warm_up: WarmUp = None,
    cool_down: CoolDown = None,
    most_others: MostOthers = 0.25,
    repeats: Annotated[
        str,
        typer.Option(
            metavar="auto|N",
            help="Launches of a setting that would be the best, and of default or best every fourth trial: `auto`"
            " until the 95 % interval is within 2 %, at most 4; a number is the most; 1 never repeats.",
            rich_help_panel=TRUST,
        ),
    ] = "auto",
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="Short windows, single launches, no confirmation: it ranks, and claims nothing.",
            rich_help_panel=TRUST,
        ),
    ] = False,
    confirm_pairs: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Fresh pairs of default and best after the search; a saving is claimed from them alone."
            f" An even number from {LEAST_PAIRS}, or 0. [default: {DEFAULT_PAIRS}]",
            rich_help_panel=TRUST,
        ),
    ] = None,
    prune: Annotated[
        bool,
        typer.Option(
            help="Put changes that are worth less than 1 % back to their defaults once it is confirmed.",
            rich_help_panel=TRUST,
        ),
    ] = True,
    name: Annotated[
        str | None, typer.Option(help="Name of the study. Left out, one is made.", rich_help_panel=STUDY)
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder that holds the studies.", rich_help_panel=STUDY)] = Path(
        "results"
    ),
    resume: Annotated[
        Path | None,
        typer.Option(metavar="STUDY", help="Go on with a study, given by its folder.", rich_help_panel=STUDY),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Resume on another machine, engine or model, as a segment of its own.",
            rich_help_panel=STUDY,
        ),
    ] = False,
) -> None:
    """Tune an engine: propose a setting, run it, measure its energy, and so on.

    Trial 0 is the engine's own default. Without `--batch`, each proposal is shown and you accept, edit or
    reject it. At the end the best setting is measured afresh against the default.
    """
    from tuner.assemble import choose_proposer
    from tuner.journal import Changes, Header

    with _screen() as screen:
        pairs = _pairs("--confirm-pairs", confirm_pairs, or_none=True)
        if resume is not None:
            _refuse_with_resume(context)
            _resume(
                screen,
                resume,
                Changes(
                    trials=trials,
                    time_seconds=seconds("--time", time_limit) if time_limit else None,
                    threshold=threshold,
                    confirm_pairs=pairs,
                    prune=prune if _given(context, "prune") else None,
                    llm=llm,
                    base_url=base_url,
                    template=_lasting("prompts", template, named=True) if template else None,
                ),
                batch=batch,
                force=force,
            )
            return
        if force:
            raise Refused("--force: it goes with --resume STUDY")
        if fast and (pairs or _given(context, "repeats")):
            option = "--confirm-pairs" if pairs else "--repeats"
            raise Refused(f"--fast {option}: fast mode launches once and claims nothing; leave one of them out")
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise Refused(f"--name {name!r}: expected letters, digits, dots, dashes and underscores, at most 100")
        header = Header(
            name=name or "",
            workload=_runner_of(context, workload),
            target=_target(context.params),
            proposer=proposer or "llm",
            base_url=base_url,
            seed=seed,
            pins=tuple(pin or ()),
            ranges=tuple(narrow or ()),
            limits=tuple(limit or ()),
            threshold=threshold,
            trials=trials or (None if time_limit else DEFAULT_TRIALS),
            time_seconds=seconds("--time", time_limit) if time_limit else None,
            confirm_pairs=0 if fast else DEFAULT_PAIRS if pairs is None else pairs,
            prune=prune,
            plan=_plan(
                context.params,
                windows=3 if fast and not _given(context, "windows") else None,
                repeats="1" if fast else repeats,
                fast=fast,
            ),
            require_measured=require_measured,
            power_control=allow_power_control,
            tune_version=__version__,
            started_unix=time.time(),
        )
        choice = choose_proposer(
            proposer=proposer,
            llm=llm,
            template=_lasting("prompts", template, named=True) if template else None,
            base_url=base_url,
            offer=None if batch else screen.offer_without_llm(),
        )
        header = replace(header, proposer=choice.proposer, llm=choice.llm, template=choice.template)
        _start(
            screen,
            header,
            results,
            warning=choice.warning,
            batch=batch,
            meter=meter,
            options=_meter_options(context.params),
        )


_ALLOWED_WITH_RESUME = frozenset(
    {
        "resume",
        "force",
        "batch",
        "trials",
        "time_limit",
        "threshold",
        "confirm_pairs",
        "prune",
        "llm",
        "base_url",
        "template",
    }
)


def _refuse_with_resume(context: typer.Context) -> None:
    """A resumed study keeps its workload, load and measurement: silently ignoring an option would mislead."""
    for option in context.command.params:
        if option.name and option.name not in _ALLOWED_WITH_RESUME and _given(context, option.name):
            raise Refused(
                f"{option.opts[0]}: a resumed study keeps the setting it was started with;"
                " leave it out, or start a new study"
            )


def _pairs(option: str, pairs: int | None, *, or_none: bool) -> int | None:
    """A number of pairs that can show something, and in which steady drift cancels."""
    if pairs is None or (or_none and pairs == 0):
        return pairs
    if pairs % 2 or pairs < LEAST_PAIRS:
        raise Refused(
            f"{option} {pairs}: expected an even number, so that steady drift cancels, and {LEAST_PAIRS} or more,"
            f" because fewer show nothing with 95 % confidence{'; or 0 for no confirmation' if or_none else ''}"
        )
    return pairs


# Options that several commands have are read from the command's parameters, by the names that they have there.
_LOAD_OPTIONS = (
    "model",
    "size",
    "prompts",
    "prompt_tokens",
    "output_tokens",
    "request_rate",
    "pixels",
    "url",
    "spec",
    "dummy_weights",
    "engine_arg",
    "seed",
    "allow_lossy",
)
_WALL_OPTIONS = ("wall_command", "wall_url", "wall_unit", "wall_field")
_PLAN_OPTIONS = ("windows", "window", "timeout", "warm_up", "cool_down", "most_others")


def _meter_options(params: Mapping[str, Any]) -> MeterOptions:
    from tuner.meters import MeterOptions

    wall = {name: params[name] for name in _WALL_OPTIONS}
    interval = params["wall_interval"]
    return MeterOptions.parse(
        params["cpu_watts"], wall_interval=seconds("--wall-interval", interval) if interval else None, **wall
    )


def _target(params: Mapping[str, Any]) -> Target:
    from tuner.limits import QUALITY_LOSS
    from tuner.trial import Target

    load = {name: params[name] for name in _LOAD_OPTIONS if name in params}
    if _describes_command(workload := params["workload"] or ""):
        if load["spec"]:
            raise Refused(f"--workload {workload} --spec {load['spec']}: both name a file; leave one of them out")
        load["spec"] = workload
    # Files are named from where the person stands now; a resume may stand elsewhere.
    local = Path(load["model"]).expanduser() if load["model"] else None
    load["model"] = str(local.absolute()) if local and local.exists() else load["model"]
    load["spec"] = str(Path(load["spec"]).expanduser().absolute()) if load["spec"] else None
    load["engine_args"] = tuple(load.pop("engine_arg") or ())
    # A limit on quality is what makes lossy parameters safe to offer, and consent to them is a reason to look.
    on_quality = any(text.strip().startswith(QUALITY_LOSS) for text in params.get("limit") or ())
    lossy = load["allow_lossy"] or on_quality
    return Target(**{**load, "allow_lossy": lossy, "quality": lossy})


def _describes_command(workload: str) -> bool:
    """Whether a workload is no runner but a file that describes a command for the runner `command`."""
    return workload.endswith(".toml")


def _runner_of(context: typer.Context, workload: str) -> str:
    """The runner that a workload means."""
    return (
        "command" if _describes_command(workload) else _lasting("runners", workload, named=_given(context, "workload"))
    )


def _plan(params: Mapping[str, Any], *, windows: int | None = None, repeats: str = "1", fast: bool = False) -> Plan:
    """`windows`: in place of those that were typed or are usual."""
    from tuner.journal import Plan

    usual = Plan()
    if repeats != "auto" and not (repeats.isascii() and repeats.isdigit() and 1 <= int(repeats) <= 100):
        raise Refused(f"--repeats {repeats[:40]!r}: expected auto, or a number of launches from 1 to 100")
    window, warm_up, cool_down = params["window"], params["warm_up"], params["cool_down"]
    return Plan(
        windows=windows or params["windows"],
        window_seconds=seconds("--window", window) if window else None,
        timeout_seconds=seconds("--timeout", params["timeout"]),
        warm_up_seconds=_span("--warm-up", warm_up) if warm_up else None,
        cool_down_seconds=_seconds_or_0("--cool-down", cool_down) if cool_down else None,
        most_others=params["most_others"],
        launches=usual.launches if repeats == "auto" else int(repeats),
        sentinel_every=0 if repeats == "1" else usual.sentinel_every,
        fast=fast,
    )


def _seconds_or_0(option: str, text: str) -> float:
    return 0.0 if text.strip() in ("0", "0s") else seconds(option, text)


def _span(option: str, text: str) -> tuple[float, float]:
    """`1s..10s` as seconds; one time alone is both."""
    least, dots, most = text.partition("..")
    low = seconds(option, least)
    high = seconds(option, most) if dots else low
    if low > high:
        raise Refused(f"{option} {text[:40]!r}: expected LEAST..MOST with the smaller time first, such as 1s..10s")
    return low, high


def _refuse_without_person(*, batch: bool) -> None:
    if not batch and not sys.stdin.isatty():
        raise Refused(
            "nobody can be asked: standard input is no terminal; add --batch to run every proposal without asking"
        )


def _start(
    screen: Screen,
    header: Header,
    results: Path,
    *,
    warning: str | None,
    batch: bool,
    meter: str,
    options: MeterOptions,
) -> None:
    from tuner.assemble import free_name, prepare, results_folder
    from tuner.journal import Journal, lock
    from tuner.study import Threshold

    if header.threshold:
        Threshold.parse(header.threshold)
    header, bench = prepare(header, meter=meter, options=options, say=screen.say)
    if not header.name:
        parts = (
            Path(header.target.spec or header.workload).stem,
            Path(header.template or header.proposer).stem.removesuffix(".md"),
        )
        header = replace(header, name=free_name(results, "-".join((*parts, time.strftime("%Y%m%d-%H%M%S")))))
    chat = _open_chat(screen, header)
    _check_proposer(header, bench, chat)
    _refuse_without_person(batch=batch)
    with _signals(), _powered(header, bench, screen) as control:
        if control is not None:
            # What the GPUs were set to is on disk, twice, before anything changes it.
            before = {f"before_{gpu}": was for gpu, was in control.observed.items()}
            header = replace(header, machine={**header.machine, **before})
        folder = results_folder(results, header.name)
        if warning:
            screen.warn(warning)
        with lock(folder), Journal.create(folder, header) as journal:
            _go(screen, journal, header, bench, chat, control, batch=batch)


@contextlib.contextmanager
def _powered(header: Header, bench: Bench, screen: Screen) -> Iterator[PowerControl | None]:
    """The GPUs held for this study, where their power and clock may be tuned."""
    from tuner.control import PowerControl, held, pending

    if not header.power_control:
        for sentence in [*pending(), *held()]:
            screen.warn(sentence)
        yield None
        return
    with PowerControl(bench.space.parameters, screen.say) as control:
        yield control


def _resume(screen: Screen, folder: Path, changes: Changes, *, batch: bool, force: bool) -> None:
    from tuner.assemble import reopen
    from tuner.journal import Changes, Journal, lock, read
    from tuner.study import Threshold, resumed

    recorded = read(folder).header
    _refuse_without_person(batch=batch)
    if recorded.proposer != "llm" and (given := changes.llm or changes.base_url or changes.template):
        raise Refused(f"{given}: {folder} is a study of {recorded.proposer}, which uses no LLM; start a new study")
    if changes.threshold:
        Threshold.parse(changes.threshold)
    with lock(folder), Journal.resume(folder) as journal:
        bench, segment = reopen(journal.study, force=force, say=screen.say)
        header = changes.made_to(journal.study.header)
        if 0 < header.confirm_pairs < LEAST_PAIRS:
            screen.say(f"{header.confirm_pairs} pairs show nothing with 95 % confidence: {LEAST_PAIRS} are made")
            changes = replace(changes, confirm_pairs=LEAST_PAIRS)
            header = changes.made_to(journal.study.header)
        chat = _open_chat(screen, header)
        _check_proposer(header, bench, chat)
        if segment:
            screen.warn(f"going on as segment {segment.number}: {'; '.join(segment.differences)}")
            journal.append(segment)
        if changes != Changes():
            journal.append(changes)
        with _signals(), _powered(header, bench, screen) as control:
            resumed(journal)
            _go(screen, journal, header, bench, chat, control, batch=batch)


def _given(context: typer.Context, name: str) -> bool:
    """Whether the person typed this option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _lasting(kind: Kind, name: str, *, named: bool) -> str:
    """A name that means the same file from any folder: a shipped one as it is, anything else as its path.

    A file below the current folder is taken for a bare name only when the person typed the name.
    """
    from tuner.files import find, shipped

    path = find(kind, name, local=named)
    return name if "/" not in name and shipped(path) else str(path)


def _open_chat(screen: Screen, header: Header) -> Chat | None:
    from tuner.chats import open_chat

    if header.proposer != "llm" or header.llm is None:
        return None
    person = screen.ask_paste if sys.stdin.isatty() else None
    return open_chat(header.llm, base_url=header.base_url, ask_person=person, notify=screen.say)


def _check_proposer(header: Header, bench: Bench, chat: Chat | None) -> None:
    """Build the proposer once for nothing: what it refuses is refused before a folder exists."""
    from tuner.assemble import open_proposer

    open_proposer(header, bench, chat)


def _go(
    screen: Screen,
    journal: Journal,
    header: Header,
    bench: Bench,
    chat: Chat | None,
    control: PowerControl | None,
    *,
    batch: bool,
) -> None:
    """Run the study in the open journal to its end, confirm what it found, and leave with the exit code."""
    from tuner.session import Session
    from tuner.study import Threshold

    session = Session(
        screen=screen, journal=journal, header=header, bench=bench, chat=chat, batch=batch, control=control
    )
    end, found = session.run()
    if end.kind in ("failures", "chat") or journal.study.history.best is None:
        raise typer.Exit(FAILURE)
    threshold = Threshold.parse(header.threshold) if header.threshold else None
    confirmed = bool(journal.study.pairs)
    reached = threshold is None or _reached(threshold, end, found, confirmed=confirmed)
    raise typer.Exit(SUCCESS if reached else UNFINISHED)


def _reached(threshold: Threshold, end: End, found: Saving | None, *, confirmed: bool) -> bool:
    """Whether the threshold was reached: by fresh runs where there are any, else by the search's own figure.

    Fresh runs that show nothing, because the best failed in one of them, reach nothing.
    """
    if end.kind != "goal":
        return False
    return not confirmed if found is None else threshold.reached(found.ratio, found.best_joules_per_unit)


# --- tune confirm ------------------------------------------------------------------------------


@app.command()
def confirm(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's folder: results/NAME.")],
    pairs: Annotated[
        int, typer.Option(help=f"Fresh pairs of default and best, an even number from {LEAST_PAIRS}.")
    ] = DEFAULT_PAIRS,
    prune: Annotated[
        bool, typer.Option(help="Put changes that are worth less than 1 % back to their defaults once it is confirmed.")
    ] = True,
) -> None:
    """Measure the best setting of a study afresh against its default: the only source of a claim.

    Both run in fresh processes, in ABBA order. Exit code 0: a saving is shown; 3: none is; 1: it could not be measured.
    """
    from tuner.assemble import reopen
    from tuner.journal import Journal, lock, read
    from tuner.session import Session

    _pairs("--pairs", pairs, or_none=False)
    with _screen() as screen:
        history = read(study).history
        if history.best is None or history.default is None:
            raise Refused(f"{study}: nothing to confirm, the default or any other trial was not measured")
        if history.best.config == history.default.config:
            raise Refused(f"{study}: nothing to confirm, no setting used less energy than the default")
        with lock(study), Journal.resume(study) as journal:
            bench, _ = reopen(journal.study, force=False, say=screen.say)
            header = replace(journal.study.header, confirm_pairs=pairs, prune=prune)
            with _signals(), _powered(header, bench, screen) as control:
                found = Session(
                    screen=screen,
                    journal=journal,
                    header=header,
                    bench=bench,
                    chat=None,
                    batch=True,
                    control=control,
                ).confirm()
    if found is None:
        raise typer.Exit(FAILURE)
    raise typer.Exit(SUCCESS if found.shown else UNFINISHED)


# --- tune apply --------------------------------------------------------------------------------


@app.command()
def apply(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's folder: results/NAME.")],
    form: Annotated[
        str,
        typer.Option(
            "--as",
            metavar="FORM",
            help="`command`, `systemd`, `compose`, `kubernetes`, `modelfile` (Ollama) or `python`, as far as the engine"
            " offers it.",
        ),
    ] = "command",
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write it there. Left out, it is printed and nothing is written."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file of --output.")] = False,
    unconfirmed: Annotated[
        bool,
        typer.Option("--unconfirmed", help="Take the best of the search where no confirmation shows a saving."),
    ] = False,
) -> None:
    """Write down how to run the confirmed best of a study for good. Nothing is started.

    Exit code 2: no saving is confirmed, or the engine does not offer this form.
    """
    from tuner.apply import choose, launch_of, not_here, render, save
    from tuner.journal import read

    with _screen() as screen:
        if force and output is None:
            raise Refused("--force: it goes with --output FILE")
        found = read(study)
        chosen = choose(found, unconfirmed=unconfirmed)
        launch = launch_of(found, chosen, screen.say)
        text = render(form, launch)
        (screen.say if chosen.confirmed else screen.warn)(chosen.said)
        if lack := not_here(form, launch):
            screen.warn(lack)
        if output is None:
            typer.echo(text, nl=False)
            return
        save(text, output, force=force)
        screen.say(f"written to {output}")


# --- tune calibrate ----------------------------------------------------------------------------


@app.command()
def calibrate(
    context: typer.Context,
    workload: Workload = "llama",
    launches: Annotated[
        int,
        typer.Option(max=1000, help="Launches of one configuration, from 4; from 12 they are checked in pairs too."),
    ] = 8,
    model: Model = None,
    size: Size = None,
    prompts: Prompts = 8,
    prompt_tokens: PromptTokens = 96,
    output_tokens: OutputTokens = 32,
    request_rate: RequestRate = None,
    pixels: Pixels = 256,
    url: Url = None,
    spec: Spec = None,
    dummy_weights: DummyWeights = False,
    engine_arg: EngineArg = None,
    seed: Seed = 0,
    allow_lossy: AllowLossy = False,
    pin: Pin = None,
    meter: MeterSpec = "auto",
    require_measured: RequireMeasured = False,
    cpu_watts: CpuWatts = None,
    wall_command: WallCommand = None,
    wall_url: WallUrl = None,
    wall_unit: WallUnit = None,
    wall_field: WallField = None,
    wall_interval: WallInterval = None,
    windows: Windows = 5,
    window: Window = None,
    timeout: Timeout = "10m",
    warm_up: WarmUp = None,
    cool_down: CoolDown = None,
    most_others: MostOthers = 0.25,
) -> None:
    """Measure this machine's noise: the same configuration launched again and again, each time in a fresh process.

    Says how small a saving can be seen here, checks the counters, and keeps the result: `tune run` with the same
    engine, model, load, windows and meter finds it. Ctrl-C keeps what is done, from four launches on.
    Exit code 0: calibrated; 1: too little could be measured.
    """
    from tuner.assemble import prepare
    from tuner.calibrate import LEAST_LAUNCHES, Calibration, CalibrationError, run_calibration, sentences, store
    from tuner.evaluate import Launcher
    from tuner.journal import Header
    from tuner.session import idle_seconds

    with _screen() as screen, tempfile.TemporaryDirectory(prefix="tune-calibrate-") as folder:
        if launches < LEAST_LAUNCHES:
            raise Refused(f"--launches {launches}: expected {LEAST_LAUNCHES} or more, since fewer show no spread")
        header = Header(
            name="calibration",
            workload=_runner_of(context, workload),
            target=_target(context.params),
            proposer="default",
            pins=tuple(pin or ()),
            plan=_plan(context.params),
            require_measured=require_measured,
        )
        header, bench = prepare(
            header,
            meter=meter,
            options=_meter_options(context.params),
            say=screen.say,
            search=False,
        )
        screen.say(header.meter_sentence)
        launcher = Launcher(
            folder=Path(folder),
            runner=bench.runner_path,
            target=header.target,
            meters=bench.meters.names,
            meter_options=dict(header.meter_options),
            plan=header.plan,
            idle_seconds_for=lambda _number: idle_seconds(bench.meters.names),
        )

        def keep(calibration: Calibration) -> None:
            screen.close()
            screen.facts(sentences(calibration))
            screen.say(f"kept in {store(calibration)}")

        screen.working("calibration")
        with _signals(), _powered(header, bench, screen):
            try:
                run_calibration(bench, header, launcher, launches, report=screen.phase, say=screen.say, keep=keep)
            except CalibrationError as error:
                _fail(str(error), FAILURE)


# --- tune report, prompt, doctor ---------------------------------------------------------------


@app.command()
def report(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's folder: results/NAME.")],
    csv: Annotated[
        str | None, typer.Option(metavar="FILE", help="Tidy CSV, one row a measurement; `-` is standard output.")
    ] = None,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="The same as JSON; `-` is standard output.")] = None,
    price: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT/kWh",
            help="Price of electricity: `0.25EUR/kWh`, `250/MWh`. Left out, no cost is shown.",
            rich_help_panel=MONEY,
        ),
    ] = None,
    carbon: Annotated[
        str | None,
        typer.Option(
            metavar="GRAMS/kWh",
            help="Carbon intensity: `380g/kWh`. Left out, no carbon is shown.",
            rich_help_panel=MONEY,
        ),
    ] = None,
    pue: Annotated[
        str | None,
        typer.Option(
            help="Energy of the whole facility over that of its computers. [default: 1]", rich_help_panel=MONEY
        ),
    ] = None,
    tokens_per_day: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER",
            help="Load for yearly figures: `50M` output tokens (or images) a day.",
            rich_help_panel=MONEY,
        ),
    ] = None,
    llm_price: Annotated[
        str | None,
        typer.Option(
            metavar="IN,OUT/M",
            help="Price of a million input and output tokens of the LLM: `2.5,10/M`.",
            rich_help_panel=MONEY,
        ),
    ] = None,
) -> None:
    """Show a study as a table, with what its energy costs, or write its measurements to a file."""
    from tuner.confirm import concluded, shown_by
    from tuner.cost import CostOptions, assess, record, rows, saving_record
    from tuner.journal import read

    with _screen() as screen:
        # Before the study is read: a typing error is said at once.
        options = CostOptions.parse(
            price=price, carbon=carbon, pue=pue, tokens_per_day=tokens_per_day, llm_price=llm_price
        )
        found = read(study)
        shown = shown_by(found)[0]
        costs = assess(found, shown, options)
        if csv is None and json is None:
            screen.report(found, concluded(found), rows(costs))
            return
        from tuner import export

        if csv is not None:
            export.to_csv(found, csv)
        if json is not None:
            export.to_json(found, json, saving=saving_record(shown, concluded(found)), costs=record(costs))


@app.command()
def prompt(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's folder: results/NAME.")],
    template: Annotated[
        str | None, typer.Option(help="Another prompt than the study's: a name or a file. [default: the study's]")
    ] = None,
) -> None:
    """Print the exact next prompt of a study. Nothing is sent."""
    from tuner.assemble import next_messages
    from tuner.journal import read

    with _screen() as screen:
        named = _lasting("prompts", template, named=True) if template else None
        screen.messages(next_messages(read(study), named, screen.say))


@app.command()
def doctor(
    context: typer.Context,
    cpu_watts: CpuWatts = None,
    wall_command: WallCommand = None,
    wall_url: WallUrl = None,
    wall_unit: WallUnit = None,
    wall_field: WallField = None,
    wall_interval: WallInterval = None,
) -> None:
    """Say what can be measured here, what stands in the way, and how to mend it."""
    from tuner.doctor import examine

    with _screen() as screen:
        options = _meter_options(context.params)
        screen.doctor(examine(options))


@app.command("restore")
def restore_gpus() -> None:
    """Put back GPU power limits and clocks that a killed run left changed."""
    from tuner.control import restore

    with _screen():
        restore(typer.echo)


# --- tune tables, compare, record --------------------------------------------------------------


@app.command()
def tables(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One table in full: a name, or a CSV file.")
    ] = None,
) -> None:
    """List the recorded problems that methods can be compared on: real measurements, looked up instead of run."""
    from tuner.files import names
    from tuner.replay import Table

    with _screen() as screen:
        if name is not None:
            screen.table(Table.named(name))
            return
        screen.tables([Table.named(one) for one in names("recorded")])


DEFAULT_METHODS = "rules,sobol,random,tpe"
DEFAULT_SEEDS, DEFAULT_SEEDS_LLM, DEFAULT_SEEDS_LIVE = 50, 5, 3
DEFAULT_PROPOSALS, DEFAULT_PROPOSALS_LIVE = 20, 12


@app.command()
def compare(
    context: typer.Context,
    studies: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[STUDY]...", help="Studies that exist already: results/NAME, two or more."),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...|all",
            help="Recorded problems, see `tune tables`: nothing is launched.",
            rich_help_panel=COMPARE,
        ),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            "--workload",
            "-w",
            help="A live engine: each method and seed is a study of its own, in fast mode.",
            rich_help_panel=COMPARE,
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="`rules`, `sobol`, `random`, `tpe`, `gp`, `cmaes`, `grid`, `largest` (the largest batch that meets the"
            " limit), and templates: `enhanced`, `baseline` or files, with --llm.",
            rich_help_panel=COMPARE,
        ),
    ] = DEFAULT_METHODS,
    seeds: Annotated[
        int | None,
        typer.Option(
            help=f"Runs of each method on each problem. [default: {DEFAULT_SEEDS}, with an LLM {DEFAULT_SEEDS_LLM},"
            f" live {DEFAULT_SEEDS_LIVE}]",
            rich_help_panel=COMPARE,
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            help="Proposals of each run, after the default."
            f" [default: {DEFAULT_PROPOSALS}, live {DEFAULT_PROPOSALS_LIVE}]",
            rich_help_panel=COMPARE,
        ),
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE|resample",
            help="Noise on replayed energies: a standard deviation such as `4%`, or `resample` to draw from recorded"
            " repeats. Left out, replay is exact.",
            rich_help_panel=COMPARE,
        ),
    ] = None,
    anonymise: Annotated[
        bool,
        typer.Option(
            "--anonymise",
            help="Run each table's twin too, without names: a method that does worse there remembered the table.",
            rich_help_panel=COMPARE,
        ),
    ] = False,
    llm: Annotated[
        str | None,
        typer.Option(
            help="Who answers the templates: `openai:MODEL`, `anthropic:MODEL` or `paste`.", rich_help_panel=PROPOSE
        ),
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="Server of an `openai:` model.", rich_help_panel=PROPOSE)] = None,
    max_prompts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Prompts in all; runs that it cuts short are listed as missing. Left out, there is no cap.",
            rich_help_panel=PROPOSE,
        ),
    ] = None,
    replay_llm: Annotated[
        Path | None,
        typer.Option(
            metavar="COMPARISON",
            help="Take the answers stored with an earlier comparison; nobody is asked.",
            rich_help_panel=PROPOSE,
        ),
    ] = None,
    within: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE,...",
            help="Converged is who gets so close to the best. [default: 5%,10%]",
            rich_help_panel=STOP,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="Compare every method with this one only: fewer comparisons to correct for, if you choose it"
            " beforehand. Left out, every two are compared.",
            rich_help_panel=COMPARE,
        ),
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            help="Converged is who gets to `0.8x` of the default's energy, or to `0.45J`. No run stops there; on tables"
            " the templates are told it.",
            rich_help_panel=STOP,
        ),
    ] = None,
    model: Model = None,
    size: Size = None,
    prompts: Prompts = 8,
    prompt_tokens: PromptTokens = 96,
    output_tokens: OutputTokens = 32,
    request_rate: RequestRate = None,
    pixels: Pixels = 256,
    url: Url = None,
    spec: Spec = None,
    dummy_weights: DummyWeights = False,
    engine_arg: EngineArg = None,
    allow_lossy: AllowLossy = False,
    limit: Limits = None,
    pin: Pin = None,
    narrow: Narrow = None,
    meter: MeterSpec = "auto",
    require_measured: RequireMeasured = False,
    cpu_watts: CpuWatts = None,
    wall_command: WallCommand = None,
    wall_url: WallUrl = None,
    wall_unit: WallUnit = None,
    wall_field: WallField = None,
    wall_interval: WallInterval = None,
    windows: Windows = 3,
    window: Window = None,
    timeout: Timeout = "10m",
    warm_up: WarmUp = None,
    cool_down: CoolDown = None,
    most_others: MostOthers = 0.25,
    name: Annotated[
        str | None,
        typer.Option(help="The comparison's folder is `compare-NAME`. Left out, one is made.", rich_help_panel=STUDY),
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder that holds the comparisons.", rich_help_panel=STUDY)] = Path(
        "results"
    ),
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="COMPARISON",
            help="Go on with what is missing, or show a finished comparison again.",
            rich_help_panel=STUDY,
        ),
    ] = None,
    csv: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A row for each method, problem and target; `-` is standard output.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Tidy CSV, a row for each proposal of each run.", rich_help_panel=OUTPUT),
    ] = None,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="All of it as JSON.", rich_help_panel=OUTPUT)] = None,
    html: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="A report as one page, with figures; it needs no network.", rich_help_panel=OUTPUT
        ),
    ] = None,
    llm_price: Annotated[
        str | None,
        typer.Option(
            metavar="IN,OUT/M",
            help="Price of a million input and output tokens of the LLM: `2.5,10/M`.",
            rich_help_panel=MONEY,
        ),
    ] = None,
) -> None:
    """Compare methods: how many proposals each needs, how sure that is, and which can be told apart.

    On recorded tables (`--table`), on a live engine (`--workload`), or in studies that exist already. Ctrl-C keeps
    what is done, `--resume` goes on. Exit code 0: every run is there; 1: some are missing.
    """
    from tuner import compare as comparing
    from tuner.cost import CostOptions
    from tuner.outcome import parse_targets

    with _screen() as screen:
        _refuse_mixed_ways(context)
        prices = CostOptions.parse(llm_price=llm_price).llm_prices
        targets = parse_targets(within, threshold)
        files = {"csv": csv, "steps": steps, "json": json, "html": html}
        if studies:
            outcome = _compare_studies(screen, studies, targets, against)
        elif resume is not None:
            asked = comparing.read_question(resume)
            if max_prompts is not None:
                asked = replace(asked, max_prompts=max_prompts)
            if within is None:
                targets = parse_targets(",".join(asked.targets) or None, asked.threshold)
            outcome = _run_comparison(screen, asked, resume, targets, against, fresh=False)
        else:
            names = comparing.parse_methods(methods)
            templates = any(map(comparing.uses_llm, names))
            if replay_llm is not None:
                earlier = comparing.read_question(replay_llm)
                llm, base_url = earlier.llm, earlier.base_url
            elif templates:
                llm = _chat_for(llm, base_url, names)
            elif llm:
                raise Refused(f"--llm {llm}: none of these methods asks a model; add enhanced or baseline to --methods")
            usual_seeds = DEFAULT_SEEDS_LIVE if workload else DEFAULT_SEEDS_LLM if templates else DEFAULT_SEEDS
            usual_trials = DEFAULT_PROPOSALS_LIVE if workload else DEFAULT_PROPOSALS
            about: dict[str, Any] = {
                "name": name or time.strftime("%Y%m%d-%H%M%S"),
                "methods": names,
                "seeds": usual_seeds if seeds is None else seeds,
                "trials": usual_trials if trials is None else trials,
                "targets": (within,) if within else (),
                "threshold": threshold,
                "max_prompts": max_prompts,
            }
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,90}", about["name"]):
                raise Refused(f"--name {name!r}: expected letters, digits, dots, dashes and underscores, at most 90")
            if workload is not None:
                from tuner.journal import Header
                from tuner.live import ask_workload

                asked = ask_workload(
                    Header(
                        name="",
                        workload=_runner_of(context, workload),
                        target=_target(context.params),
                        proposer="default",
                        llm=llm,
                        base_url=base_url,
                        pins=tuple(pin or ()),
                        ranges=tuple(narrow or ()),
                        limits=tuple(limit or ()),
                        plan=_plan(context.params, fast=True),
                        require_measured=require_measured,
                        tune_version=__version__,
                        started_unix=time.time(),
                    ),
                    meter=meter,
                    options=_meter_options(context.params),
                    screen=screen,
                    **about,
                )
            else:
                assert table is not None
                asked = comparing.question(
                    tables=comparing.parse_tables(table),
                    anonymised=anonymise,
                    noise_sigma=_noise(noise),
                    resample=noise == "resample",
                    llm=llm,
                    base_url=base_url,
                    replay_llm=str(replay_llm) if replay_llm else None,
                    **about,
                )
            outcome = _run_comparison(screen, asked, results / f"compare-{asked.name}", targets, against, fresh=True)
        outcome = replace(outcome, prices=prices)
        _show_outcome(screen, outcome, files)
    raise typer.Exit(FAILURE if outcome.missing else SUCCESS)


_LIVE_ONLY = frozenset(
    {
        *_LOAD_OPTIONS,
        *_WALL_OPTIONS,
        *_PLAN_OPTIONS,
        "pin",
        "narrow",
        "limit",
        "meter",
        "require_measured",
        "cpu_watts",
        "wall_interval",
    }
)
_TABLE_ONLY = frozenset({"noise", "anonymise", "replay_llm"})
_OUTPUTS = frozenset({"csv", "steps", "json", "html", "within", "against", "llm_price"})


def _refuse_mixed_ways(context: typer.Context) -> None:
    """One thing is compared at a time, and an option that would change nothing is refused."""
    ways = {"studies": "STUDY", "table": "--table", "workload": "--workload", "resume": "--resume"}
    given = [way for way in ways if _given(context, way) and context.params[way]]
    if not given:
        raise Refused(
            "what is compared? --table NAME or --table all (`tune tables` lists them), --workload NAME,"
            " or the folders of two or more studies"
        )
    if len(given) > 1:
        raise Refused(f"{ways[given[0]]} and {ways[given[1]]}: one thing is compared at a time; leave one of them out")
    idle = {
        "studies": ("threshold", *_OUTPUTS),
        "resume": ("max_prompts", *_OUTPUTS),
        "table": frozenset(context.params) - _LIVE_ONLY,
        "workload": frozenset(context.params) - _TABLE_ONLY,
    }[given[0]]
    for option in context.command.params:
        if option.name and option.name != given[0] and option.name not in idle and _given(context, option.name):
            why = {
                "studies": "existing studies are what they are",
                "resume": "a comparison goes on as it was begun",
                "table": "a recorded table runs no engine",
                "workload": "a live engine is measured",
            }[given[0]]
            raise Refused(f"{option.opts[0]}: {why}; leave it out")


def _noise(text: str | None) -> float:
    if text is None or text == "resample":
        return 0.0
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text)
    if not match:
        raise Refused(f"--noise {text[:40]!r}: expected a standard deviation such as 4% or 0.04, or resample")
    return float(match[1]) / (100 if match[2] else 1)


def _chat_for(llm: str | None, base_url: str | None, methods: tuple[str, ...]) -> str:
    """The model that answers the templates. Raises `Refused` where nobody does."""
    from tuner.chats import from_environment
    from tuner.compare import uses_llm

    if base_url and not llm:
        raise Refused("--base-url: name the model of that server too, with --llm openai:MODEL")
    chosen = llm or from_environment()
    if chosen is None:
        asking = next(filter(uses_llm, methods))
        raise Refused(
            f"--methods {asking}: which model? Pass --llm openai:MODEL, anthropic:MODEL or paste,"
            " or --replay-llm COMPARISON for stored answers"
        )
    return chosen


def _run_comparison(
    screen: Screen, asked: Question, folder: Path, targets: tuple[Goal, ...], against: str | None, *, fresh: bool
) -> Outcome:
    """Make what is missing of a comparison, and analyse what is there."""
    from tuner.chats import open_chat
    from tuner.compare import HEADER, Store, make_runs, method_name, uses_llm
    from tuner.convergence import check_targets
    from tuner.journal import lock
    from tuner.outcome import Outcome

    check_targets(asked.problems, targets)
    _check_against(against, map(method_name, asked.methods))
    others = _stored_answers(asked)
    chat: Chat | None = None
    if asked.llm and others is None and any(map(uses_llm, asked.methods)):
        person = screen.ask_paste if sys.stdin.isatty() else None
        chat = open_chat(asked.llm, base_url=asked.base_url, ask_person=person, notify=screen.say)
    if fresh and (folder / HEADER).exists():
        raise Refused(f"{folder}: there is a comparison of that name; go on with `tune compare --resume {folder}`")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{folder}: {error.strerror}; choose another place with --results") from error
    for sentence in asked.left_out:
        screen.say(sentence)
    with lock(folder), Store.create(folder, asked) if fresh else Store(folder) as store:
        screen.say(f"comparison: {folder}")
        try:
            with _signals():
                if asked.study is None:
                    make_runs(
                        asked,
                        store,
                        chat=chat,
                        others=others,
                        report=screen.counted,
                        inline_chat=asked.llm == "paste",
                    )
                else:
                    _run_live(screen, asked, store, chat)
        except BaseException as leaving:
            if not isinstance(leaving, Exception):
                screen.close()
                screen.warn(f"stopped; {len(store.runs)} runs are kept. Go on with `tune compare --resume {folder}`")
            raise
        finally:
            screen.close()
        runs = list(store.runs.values())
    return Outcome.of(
        asked.name, asked.problems, runs, targets, expected=_expected(asked), against=against, asked=asked
    )


def _check_against(against: str | None, methods: Iterable[str]) -> None:
    """Refuse a method that takes no part, before anything is run."""
    if against is not None and against not in (known := list(methods)):
        raise Refused(f"--against {against[:40]}: expected one of the methods compared: {', '.join(known)}")


def _stored_answers(asked: Question) -> dict[str, Call] | None:
    from tuner.calls import NAME, read_calls

    if asked.replay_llm is None:
        return None
    if not (found := read_calls(Path(asked.replay_llm))):
        raise Refused(f"--replay-llm {asked.replay_llm}: no stored answers there (expected {NAME})")
    return found


def _expected(asked: Question) -> int:
    return len(asked.problems) * len(asked.methods) * asked.seeds - len(asked.left_out) * asked.seeds


def _run_live(screen: Screen, asked: Question, store: Store, chat: Chat | None) -> None:
    """Run the studies of a live workload; what they say is kept as runs, however it ends."""
    from tuner.live import live_runs, run_studies

    def report(done: int, total: int, left: float | None) -> None:
        from tuner.summary import seconds_text

        more = f", about {seconds_text(left)} left" if left else ""
        screen.say(
            f"study {min(done + 1, total)} of {total}{more}" if done < total else f"all {total} studies are over"
        )

    try:
        run_studies(asked, store.folder, screen.aside(), chat, report)
    finally:
        for run in live_runs(asked, store.folder):
            if store.runs.get((run.problem, run.method, run.seed)) != run:
                store.add(run)


def _compare_studies(screen: Screen, studies: list[Path], targets: tuple[Goal, ...], against: str | None) -> Outcome:
    from tuner.live import compare_studies
    from tuner.outcome import Outcome

    if len(studies) < 2:
        raise Refused(f"{studies[0]}: one study is no comparison; name two or more, or see `tune report {studies[0]}`")
    problem, runs, notes = compare_studies(studies)
    for note in notes:
        screen.say(note)
    _check_against(against, sorted({run.method for run in runs}))
    return Outcome.of("studies", [problem], runs, targets, expected=len(runs), against=against)


def _show_outcome(screen: Screen, outcome: Outcome, files: dict[str, str | None]) -> None:
    """The tables on standard output, unless a file goes there; and every file that was asked for."""
    from tuner.outcome import write

    if "-" not in files.values():
        screen.comparison(outcome.problems, outcome.analysis, outcome.methods, outcome.chats)
        screen.facts([(f"cost of {method}", cost) for method, cost in outcome.costs.items()])
    made: dict[str, Callable[[], str]] = {
        "csv": outcome.to_csv,
        "steps": outcome.steps_to_csv,
        "json": outcome.to_json,
        "html": outcome.to_html,
    }
    for kind, destination in files.items():
        if destination is not None:
            write(destination, made[kind]())
    if outcome.missing:
        screen.warn(
            f"{outcome.missing} of {outcome.expected} runs are missing or ended early; nothing stands in for them"
        )


@app.command()
def record(
    context: typer.Context,
    workload: Workload = "llama",
    sample: Annotated[
        str,
        typer.Option(
            metavar="grid|sobol:N|random:N",
            help="Which configurations are measured; the default is always one of them.",
            rich_help_panel=MEASURE,
        ),
    ] = "sobol:64",
    repeats: Annotated[
        int, typer.Option(min=1, max=100, help="Launches of each configuration.", rich_help_panel=MEASURE)
    ] = 3,
    model: Model = None,
    size: Size = None,
    prompts: Prompts = 8,
    prompt_tokens: PromptTokens = 96,
    output_tokens: OutputTokens = 32,
    request_rate: RequestRate = None,
    pixels: Pixels = 256,
    url: Url = None,
    spec: Spec = None,
    dummy_weights: DummyWeights = False,
    engine_arg: EngineArg = None,
    seed: Seed = 0,
    allow_lossy: AllowLossy = False,
    pin: Pin = None,
    narrow: Narrow = None,
    allow_power_control: AllowPowerControl = False,
    meter: MeterSpec = "auto",
    require_measured: RequireMeasured = False,
    cpu_watts: CpuWatts = None,
    wall_command: WallCommand = None,
    wall_url: WallUrl = None,
    wall_unit: WallUnit = None,
    wall_field: WallField = None,
    wall_interval: WallInterval = None,
    windows: Windows = 3,
    window: Window = None,
    timeout: Timeout = "10m",
    warm_up: WarmUp = None,
    cool_down: CoolDown = None,
    most_others: MostOthers = 0.25,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the table; the same name goes on with a recording that was cut short.", rich_help_panel=STUDY
        ),
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder that the table is written to.", rich_help_panel=STUDY)] = Path(
        "results/recorded"
    ),
) -> None:
    """Make a table of your own machine: measure a sample of configurations, to compare methods on it later.

    Ctrl-C keeps what is done; the same command goes on.
    """
    from tuner.assemble import prepare
    from tuner.journal import Header
    from tuner.record import RecordError, Sample, default_name
    from tuner.record import record as make_table
    from tuner.summary import launch_text

    with _screen() as screen:
        chosen = Sample.parse(sample)
        header = Header(
            name="recording",
            workload=_runner_of(context, workload),
            target=_target(context.params),
            proposer=str(chosen),
            seed=seed,
            pins=tuple(pin or ()),
            ranges=tuple(narrow or ()),
            plan=_plan(context.params),
            require_measured=require_measured,
            power_control=allow_power_control,
        )
        header, bench = prepare(
            header,
            meter=meter,
            options=_meter_options(context.params),
            say=screen.say,
        )
        screen.say(header.meter_sentence)

        def ended(trial: Trial, done: int, planned: int) -> None:
            screen.say(f"launch {done} of {planned}: {launch_text(trial)}")

        try:
            with _signals(), _powered(header, bench, screen) as control:
                made = make_table(
                    header,
                    bench,
                    sample=chosen,
                    repeats=repeats,
                    name=name or default_name(workload, chosen),
                    tables=results,
                    control=control,
                    say=screen.say,
                    report=screen.phase,
                    ended=ended,
                )
        except RecordError as error:
            _fail(str(error), FAILURE)
        screen.close()
        screen.facts([("table", str(made)), ("next", f"tune tables {made}"), ("", f"tune compare --table {made}")])


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"tune {__version__}")
        raise typer.Exit


# --- what people type --------------------------------------------------------------------------


def seconds(option: str, text: str) -> float:
    """`90s`, `20m`, `1.5h` or plain seconds, as seconds."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(s|m|h|)\s*", text)
    value = float(match[1]) * {"s": 1, "": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not 0 < value < math.inf:
        raise Refused(f"{option} {text[:40]!r}: expected a time such as 90s, 20m or 2h")
    return value


# --- the edge ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _screen() -> Iterator[Screen]:
    """The terminal for one command, and the edge where what goes wrong becomes a sentence."""
    from tuner.display import Screen
    from tuner.journal import JournalError

    screen = Screen()
    try:
        yield screen
    except KeyboardInterrupt:
        raise Terminated(signal.SIGINT) from None
    except JournalError as error:
        _fail(str(error), FAILURE)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        _fail(f"{error.filename or 'standard output'}: {error.strerror or error}", FAILURE)
    finally:
        screen.close()


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """While a study runs, SIGTERM and SIGHUP unwind like Ctrl-C, so that nothing is left running."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise Terminated(number)

    # A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    watched = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in watched}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """Run the command line. Every error leaves as one sentence and an exit code."""
    try:
        app()
    except Refused as refused:
        _fail(str(refused), USAGE)
    except Terminated as terminated:
        _fail(f"stopped by {signal.Signals(terminated.number).name}", 128 + terminated.number)


def _fail(sentence: str, code: int) -> NoReturn:
    sys.stderr.write(f"tune: {sentence}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
