"""Putting a run together from its header: the bench (what is tuned and how it is measured) and the proposer.

A new study and a resumed one take the same road, so that a resumed study cannot differ from the one that
was interrupted. Nothing here writes anything: all that can be refused is refused before a folder exists.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from tuner import machine
from tuner.checks import COUNTER_PERIODS, PERIODS_IN_A_WINDOW, SAMPLED_WINDOW_SECONDS
from tuner.files import find, load_runner, shipped, unit_of
from tuner.journal import NAME as JOURNAL
from tuner.journal import Header, Plan, Segment, Study
from tuner.limits import Limit, columns_of, parse_limits
from tuner.limits import names as limit_names
from tuner.meters import MeterChoice, MeterOptions, choose, counts
from tuner.proposers import CLASSICAL, open_classical
from tuner.proposers.first import DefaultFirst
from tuner.proposers.llm import Keep, Llm, Lose, View, forget, nobody, read_template, render
from tuner.proposers.review import forbidden
from tuner.space import Config, Refused, SearchSpace, excerpt, show
from tuner.study import Threshold
from tuner.summary import load_text
from tuner.trial import (
    Chat,
    ChatError,
    Decision,
    Energy,
    History,
    Measurement,
    Message,
    Proposal,
    Proposer,
    Reply,
    Runner,
    Service,
    Target,
    Trial,
    Unit,
    Work,
)

T = TypeVar("T")

DEFAULT_TEMPLATE = "enhanced"

NOT_OFFLOADED = (0, "none", "off", "cpu")
"""Values of an `offload` parameter that leave all work on the CPU."""

PRIVATE = ("host",)
"""Keys of the machine's description that no chat provider is told."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """An engine with its space and meters, on this machine."""

    runner_path: Path
    runner: Runner
    space: SearchSpace
    meters: MeterChoice
    machine: Mapping[str, str]
    identity: Mapping[str, str]
    limits: tuple[Limit, ...] = ()
    unit: Unit = "token"
    """What the engine puts out and energy is divided by."""
    notes: tuple[str, ...] = ()
    """What was decided on the way and a person should read."""


Say = Callable[[str], None]


def prepare(
    header: Header, *, meter: str, options: MeterOptions, say: Say, search: bool = True
) -> tuple[Header, Bench]:
    """The bench of a new study, and the header with all that was found out.

    `say` is told what a person should know before it happens. `search`: something must be left to tune.

    Raises:
        Refused: the workload, the model, a pin, a range or the meter cannot be had.
    """
    meters = choose(meter, options, require_measured=header.require_measured)
    bench = _bench(header, meters, say, search=search)
    if not _counts_its_processor(bench):
        if meter != "auto":
            raise Refused(
                f"--meter {meter}: this engine computes on the CPU, which {meter} does not count;"
                " use --meter auto, rapl or estimate (`tune doctor` says which can be read)"
            )
        say(f"not used: {'+'.join(meters.names)}, because this engine computes on the CPU; `tune doctor` mends rapl")
        meters = choose("estimate", options, require_measured=header.require_measured)
        bench = _bench(header, meters, say, search=search)
    plan, asked_for = _planned(header.plan, meters), header.plan.window_seconds
    if asked_for and plan.window_seconds and plan.window_seconds > asked_for:
        sampled = meters.quality == "sampled"
        why = "thirty samples of power" if sampled else f"{PERIODS_IN_A_WINDOW} updates of the slowest counter"
        way_out = "; --fast keeps to what was asked for" if search else ""
        say(f"windows last {plan.window_seconds:g} s and not {asked_for:g} s: {why}{way_out}")
    return _with_noise(
        replace(
            header,
            plan=plan,
            meters=meters.names,
            meter_options=options.record(),
            meter_sentence=meters.sentence,
            blind=tuple(p.name for p in bench.space.parameters if p.lever in meters.blind_to),
            space=tuple(bench.space.record()),
            machine=bench.machine,
            identity=bench.identity,
            unit=bench.unit,
        ),
        bench,
    )


def _with_noise(header: Header, bench: Bench) -> tuple[Header, Bench]:
    """The header with the noise that a calibration found under these very conditions."""
    from tuner.calibrate import find as calibrated

    noise, told = calibrated(header)
    return replace(header, noise=noise), replace(bench, notes=(*bench.notes, told)) if told else bench


def reopen(study: Study, *, force: bool, say: Say) -> tuple[Bench, Segment | None]:
    """The bench of a study that goes on, and the new segment when it goes on elsewhere.

    Raises:
        Refused: machine, engine, model, meter or space differ from the study's and `force` is not given.
    """
    header = study.header
    options = MeterOptions.from_record(header.meter_options)
    spec = "+".join(study.segments[-1].meters if study.segments else header.meters)
    try:
        meters = choose(spec, options, require_measured=header.require_measured)
    except Refused:
        if not force:
            raise
        options = replace(options, wall=None)
        meters = choose("auto", options, require_measured=header.require_measured)
    bench = _bench(header, meters, say)
    differences = [
        *machine.differences(study.machine, bench.machine, (*machine.MUST_MATCH, *_boards(meters))),
        *machine.differences(study.identity, bench.identity, sorted({*study.identity, *bench.identity})),
    ]
    if list(study.space) != bench.space.record():
        differences.append("search space: the runner offers other parameters or ranges than it did")
    if meters.names != tuple(spec.split("+")):
        differences.append(f"meter: recorded {spec!r}, here {'+'.join(meters.names)!r}")
    if not differences:
        return bench, None
    if not force:
        raise Refused(
            f"{study.folder}: results from here would not compare with the recorded ones: {'; '.join(differences)}."
            " Resume where it was recorded, or add --force to go on as a segment of its own"
        )
    return bench, Segment(
        number=study.segment + 1,
        differences=tuple(differences),
        machine=bench.machine,
        identity=bench.identity,
        meters=meters.names,
        meter_sentence=meters.sentence,
        space=tuple(bench.space.record()),
        noise=_with_noise(replace(header, machine=bench.machine, identity=bench.identity, meters=meters.names), bench)[
            0
        ].noise,
    )


def _bench(header: Header, meters: MeterChoice, say: Say, *, search: bool = True) -> Bench:
    path = find("runners", header.workload, local=False)
    if not shipped(path):
        say(f"running the code of {path}")
    if header.target.spec is not None:
        say(f"running the commands of {header.target.spec}")
    runner = load_runner(path)
    notes: list[str] = []
    space = asked(path, "space", lambda: runner.space(header.target))
    if header.power_control:
        space = _with_knobs(space, meters, say)
    for option, assignments, change in (
        ("--pin", header.pins, SearchSpace.pin),
        ("--range", header.ranges, SearchSpace.narrow),
    ):
        for assignment in assignments:
            name, equals, text = assignment.partition("=")
            if not equals:
                raise Refused(f"{option} {excerpt(assignment)}: expected NAME=VALUE")
            before = space[name].default
            space = change(space, name, text)
            if option == "--range" and space[name].default != before:
                notes.append(f"{name} starts at {space[name].default}: its default {before} is outside {text}")
    space, blind = _without_blind(space, meters, asked={a.partition("=")[0] for a in header.ranges})
    if blind:
        notes.append(f"kept at their defaults, because this meter cannot see what they do: {', '.join(blind)}")
    if faults := space.broken(space.default()):
        raise Refused(
            f"the configuration to start from is not legal: {'; '.join(faults)}; start from another one with --pin or "
            "--range, or take a smaller model or load"
        )
    if search and not space.free:
        rate = header.target.request_rate
        why = "every parameter is pinned or has a single value"
        if rate is not None:
            why += f", and --request-rate {rate:g} decides how many requests are in flight: leave it out"
        raise Refused(f"nothing is left to tune: {why}")
    return Bench(
        runner_path=path,
        runner=runner,
        space=space,
        meters=meters,
        machine={**machine.describe(), **_boards(meters), **_scopes(meters)},
        identity=asked(path, "identity", lambda: runner.identity(header.target)),
        limits=_limits(path, runner, header),
        unit=asked(path, "unit", lambda: unit_of(runner, header.target)),
        notes=tuple(notes),
    )


def _limits(path: Path, runner: Runner, header: Header) -> tuple[Limit, ...]:
    """What is asked for, refused at once where the runner knows that it will never report the figure."""
    known = metrics_of(path, runner, header.target)
    lacks = getattr(runner, "lacks", None)
    never = asked(path, "lacks", lambda: lacks(header.target)) if lacks and header.limits else {}
    reported = tuple(name for name in known if name not in never)
    if column := next((name for name in columns_of(header.limits) if name in never), None):
        text = next(text for text in header.limits if columns_of([text]) == (column,))
        raise Refused(f"--limit {text}: {never[column]} (it reports {', '.join(reported)})")
    return parse_limits(header.limits, reported)


def metrics_of(path: Path, runner: Runner, target: Target) -> tuple[str, ...]:
    """The figures that limits may be set on: those that any engine of its unit may report, and this runner's own."""
    own = getattr(runner, "metrics", None)
    more = tuple(asked(path, "metrics", lambda: own(target))) if own else ()
    return tuple(dict.fromkeys([*more, *limit_names(asked(path, "unit", lambda: unit_of(runner, target)))]))


def _with_knobs(space: SearchSpace, meters: MeterChoice, say: Say) -> SearchSpace:
    """The space with the GPU's power limit and clock. Raises `Refused` where the meter would not see what they do."""
    if not counts(meters.domains, "gpu"):
        raise Refused(
            f"--allow-power-control: the {'+'.join(meters.names)} meter does not count the GPU, so what its limit and"
            " clock do would not be seen; use --meter nvml or wall (`tune doctor` says which can be read)"
        )
    from tuner.control import knobs

    return replace(space, parameters=(*space.parameters, *knobs(say)))


def own_load(bench: Bench, target: Target) -> str | None:
    """The load in a runner's own words, where it brings one that is not in the target; else None."""
    load = getattr(bench.runner, "load", None)
    return str(asked(bench.runner_path, "load", lambda: load(target))) if load else None


def asked(runner: Path, question: str, answer: Callable[[], T]) -> T:
    """What a runner answers; what it did not mean to raise becomes a sentence that names it."""
    try:
        return answer()
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{runner}: its {question}() failed ({type(error).__name__}: {error})") from error


def launch_text(path: Path, runner: Runner, config: Config, study: Study) -> str:
    """The engine's own command for `config`, or what a client does where no engine is started."""
    if (found := client_of(path, runner, config, study)) is not None:
        return found.command()
    return asked(path, "command", lambda: runner.command(config, study.header.target))


def client_of(path: Path, runner: Runner, config: Config, study: Study) -> Service | None:
    """The client of a server that is not the runner's to start, from the journal alone; None for an engine."""
    of = getattr(runner, "client", None)
    if of is None:
        return None
    ran = next((trial.effective for trial in reversed(study.history.trials) if trial.effective), {})
    found: Service = asked(path, "client", lambda: of(config, study.header.target, {**ran, **study.identity}))
    return found


GPU_WARM_UP_SECONDS = (10.0, 120.0)
CPU_WARM_UP_SECONDS = (1.0, 10.0)
"""At least and at most: a GPU board takes tens of seconds to come to its temperature and clock."""

GPU_WINDOW_SECONDS = 10.0
CPU_WINDOW_SECONDS = 2.0
WALL_WINDOW_SECONDS = SAMPLED_WINDOW_SECONDS


def counter_seconds(meters: MeterChoice) -> float:
    """Between two updates of the slowest counter; 0.0 where nothing is counted."""
    if meters.quality != "measured":
        return 0.0
    return max((COUNTER_PERIODS.get(domain.rstrip("0123456789"), 0.0) for domain in meters.domains), default=0.0)


def _planned(plan: Plan, meters: MeterChoice) -> Plan:
    """The plan with what depends on the meter. Windows hold `PERIODS_IN_A_WINDOW`, but in fast mode."""
    on_gpu = any(name in meters.names for name in ("nvml", "zeus", "wall"))
    usual = GPU_WINDOW_SECONDS if on_gpu else CPU_WINDOW_SECONDS
    usual = WALL_WINDOW_SECONDS if "wall" in meters.names else usual
    asked = plan.window_seconds or (usual / 2 if plan.fast else usual)
    least = 0.0 if plan.fast else PERIODS_IN_A_WINDOW * counter_seconds(meters)
    if meters.quality == "sampled" and not plan.fast:
        least = SAMPLED_WINDOW_SECONDS
    return replace(
        plan,
        window_seconds=max(asked, least),
        warm_up_seconds=plan.warm_up_seconds or (GPU_WARM_UP_SECONDS if on_gpu else CPU_WARM_UP_SECONDS),
        cool_down_seconds=_cool_down_seconds(meters) if plan.cool_down_seconds is None else plan.cool_down_seconds,
    )


def _cool_down_seconds(meters: MeterChoice) -> float:
    """An estimate does not see temperature, so there is nothing to wait for."""
    return 60.0 if "nvml" in meters.names else 30.0 if meters.quality in ("measured", "sampled") else 0.0


def thorough(plan: Plan, meters: MeterChoice) -> Plan:
    """The plan that a claim is measured with: that of the study, or one of longer windows where it was a fast one."""
    if not plan.fast:
        return plan
    twice = replace(
        plan, fast=False, windows=max(plan.windows, Plan().windows), window_seconds=2 * (plan.window_seconds or 0.0)
    )
    return _planned(twice, meters)


def _counts_its_processor(bench: Bench) -> bool:
    """Whether the meter counts the processor that the engine computes on.

    A GPU's counter beside an engine that computes on the CPU would measure idling, and call it measured.
    """
    offload = [p for p in bench.space.parameters if p.lever == "offload"]
    on_cpu = bench.identity.get("device") == "cpu" or any(p.default in NOT_OFFLOADED for p in offload)
    return not on_cpu or counts(bench.meters.domains, "cpu")


def _boards(meters: MeterChoice) -> dict[str, str]:
    """Which GPU stands behind each domain: part of the record, so that studies of two boards never meet."""
    if "nvml" in meters.names:
        from tuner.meters import nvml

        return nvml.boards()
    if "zeus" in meters.names:
        from tuner.meters import zeus

        return zeus.boards()
    return {}


SCOPES = {"gpu": "board", "cpu": "package", "dram": "memory", "soc": "module", "wall": "whole machine"}


def _scopes(meters: MeterChoice) -> dict[str, str]:
    """What each counter covers: energies of different boundaries are different quantities."""
    if meters.quality == "estimated":
        return {}
    kinds = {domain: re.split(r"\d", domain)[0] for domain in meters.domains}
    return {f"scope_{domain}": SCOPES[kind] for domain, kind in kinds.items() if kind in SCOPES}


def _without_blind(space: SearchSpace, meters: MeterChoice, asked: set[str]) -> tuple[SearchSpace, list[str]]:
    """The space without what the meter is blind to.

    Refused is a parameter that was asked for by name, and work on a GPU that nothing counts: moving it
    there would look like a saving.
    """
    blind = [p.name for p in space.free if p.lever in meters.blind_to]
    if wanted := [name for name in blind if name in asked]:
        raise Refused(
            f"--range {wanted[0]}: the {'+'.join(meters.names)} meter cannot see what {wanted[0]} does to energy;"
            " choose a meter with a counter (`tune doctor` says which), or leave it out"
        )
    for parameter in space.parameters:
        offloads = parameter.lever == "offload" and parameter.default not in NOT_OFFLOADED
        if offloads and not counts(meters.domains, "gpu"):
            raise Refused(
                f"{parameter.name}={show(parameter.default)} computes on a GPU, whose energy the"
                f" {'+'.join(meters.names)} meter does not count; use a meter that does (`tune doctor` says which),"
                f" or keep the work on the CPU with --pin {parameter.name}={show(parameter.at(0.0))}"
            )
    for name in blind:
        space = space.freeze(name)
    return space, blind


# --- who proposes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Who proposes, and what a person should be told about it."""

    proposer: str
    llm: str | None = None
    template: str | None = None
    warning: str | None = None


def choose_proposer(
    *,
    proposer: str | None,
    llm: str | None,
    template: str | None,
    base_url: str | None = None,
    offer: Callable[[], str] | None,
) -> Choice:
    """Who proposes, given what was asked for and what is there.

    Args:
        proposer: a classical proposer's name, or None or `llm` for a chat model.
        llm: a chat's specification, or None to take the provider whose key is in the environment.
        template: the prompt's name or path.
        base_url: the server of a compatible model.
        offer: asks the person for `paste` or `rules`; None where nobody can be asked.
    """
    from tuner.chats import from_environment

    if base_url and not llm:
        raise Refused("--base-url: name the model of that server too, with --llm openai:MODEL")
    if proposer not in (None, "llm"):
        if llm or template:
            given = f"--llm {llm}" if llm else f"--template {template}"
            raise Refused(f"--proposer {proposer} uses no LLM, and {given} asks for one; leave one of them out")
        if proposer not in CLASSICAL:
            raise Refused(f"unknown proposer {excerpt(proposer)} (there is llm, {', '.join(CLASSICAL)})")
        return Choice(proposer=str(proposer))
    name = template or DEFAULT_TEMPLATE
    find("prompts", name, local=False)
    chosen = llm or from_environment()
    if chosen is None and proposer == "llm":
        raise Refused(
            "--proposer llm: which one? Pass --llm openai:MODEL, anthropic:MODEL or paste,"
            " or set OPENAI_API_KEY or ANTHROPIC_API_KEY"
        )
    if chosen is None and offer is not None and (chosen := offer()) == "rules":
        return Choice(proposer="rules")
    if chosen is None:
        return Choice(
            proposer="rules",
            warning="NO LLM IS IN USE: no --llm and no key in the environment."
            " Proposals come from `rules`, the offline adviser, which is not an LLM."
            " Set OPENAI_API_KEY or ANTHROPIC_API_KEY, or pass --llm, to use one.",
        )
    return Choice(proposer="llm", llm=chosen, template=name)


def open_proposer(
    header: Header, bench: Bench, chat: Chat | None, keep: Keep = forget, lose: Lose = nobody
) -> Proposer:
    """The proposer that the header names, with the default configuration first."""
    if header.proposer != "llm":
        return DefaultFirst(open_classical(header.proposer, header.seed))
    assert chat is not None
    return DefaultFirst(llm_proposer(header, bench, chat, keep, lose))


def llm_proposer(header: Header, bench: Bench, chat: Chat, keep: Keep = forget, lose: Lose = nobody) -> Llm:
    """The LLM with its template, tried on an empty and a made-up history: a broken template is refused at the start."""
    template = find("prompts", header.template or DEFAULT_TEMPLATE, local=False)
    view = view_of(header, bench)
    text = read_template(template)
    for history in (History(), rehearsal(bench.space)):
        render(text, template, view.of(bench.space, history))
    return Llm(
        chat=chat, template=template, fallback=open_classical("rules", header.seed), view=view, keep=keep, lose=lose
    )


def rehearsal(space: SearchSpace) -> History:
    """A made-up history with one of everything, so that a template's mistake shows before the first trial."""
    proposal = Proposal(config=space.default(), source="default")
    energy = {"cpu0": Energy(1.0, 1.0, 1.0)}
    window = Measurement(work=Work(units=1), seconds=1.0, energy=energy, quality="simulated", meter="none")
    measured = Trial(number=0, config=space.default(), proposal=proposal, measurements=(window, window))
    history = History().add(measured).add(replace(measured, number=1, measurements=(), error="failed", log=("line",)))
    for action in ("remark", "reject", "edit"):
        history = history.add(
            Decision(action=action, before_trial=2, remark="remark", proposal=proposal, edited=proposal)
        )
    name = space.free[0].name
    return history.add(Decision(action="forbid", before_trial=2, parameter=name, value=space.default()[name]))


def limits_told(limits: Sequence[str]) -> dict[str, str]:
    """What a template sees of the limits; nothing where there are none."""
    return {"limits": f"{' and '.join(limits)}; a configuration that breaks one counts as failed"} if limits else {}


def view_of(header: Header, bench: Bench) -> View:
    """What a template may see of this study."""
    return View(
        machine={k: v for k, v in bench.machine.items() if k not in PRIVATE},
        workload={
            "engine": " ".join(filter(None, (bench.identity.get("engine"), bench.identity.get("engine_version")))),
            "model": bench.identity.get("model", ""),
            "load": own_load(bench, header.target) or _load_of(header.target, bench.unit),
            "quality": bench.meters.quality,
            **limits_told(header.limits),
        },
        unit=bench.unit,
        threshold=Threshold.parse(header.threshold).joules_per_unit if header.threshold else lambda _history: None,
        trials=header.trials,
    )


def _load_of(load: Target, unit: Unit) -> str:
    if unit == "token":
        return (
            f"{load.prompts} requests sent at once, {load.prompt_tokens} prompt tokens and"
            f" {load.output_tokens} output tokens each"
        )
    text = load_text(load, unit)
    return f"{text}, each from a prompt and a seed of its own, the same in every trial" if unit == "image" else text


class _NoChat:
    """Stands where a chat would, for a prompt that is printed and not sent."""

    name = "none"

    def reply(self, messages: Sequence[Message], schema: Mapping[str, object] | None) -> Reply:
        raise ChatError("nothing is sent")


def next_messages(study: Study, template: str | None, say: Say) -> list[Message]:
    """The exact messages that the next proposal of `study` would send."""
    header = replace(study.header, template=template or study.header.template or DEFAULT_TEMPLATE)
    bench, elsewhere = reopen(study, force=True, say=say)
    if elsewhere:
        say(f"the search space is that of this machine ({'; '.join(elsewhere.differences)}); all else is the study's")
    # What the prompt says of machine and energy is what was recorded, wherever it is printed.
    quality = next((q for t in study.history.measured if (q := t.quality)), bench.meters.quality)
    bench = replace(
        bench,
        machine=study.machine,
        identity=study.identity,
        meters=replace(bench.meters, quality=quality),
    )
    llm = llm_proposer(header, bench, _NoChat())
    history = study.history
    return llm.messages(forbidden(bench.space, history.decisions), history)


def results_folder(results: Path, name: str) -> Path:
    """The folder of a new study, there and without a journal.

    Raises:
        Refused: it holds a study, or cannot be made.
    """
    folder = results / name
    if (folder / JOURNAL).exists():
        raise Refused(f"{folder}: there is a study of that name; go on with `tune run --resume {folder}`")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{folder}: {error.strerror}; choose another place with --results") from error
    return folder


def free_name(results: Path, wanted: str) -> str:
    """`wanted` in characters that a folder's name may have, with a number where it is taken."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", wanted).strip(".-") or "study"
    candidates = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    return next(candidate for candidate in candidates if not (results / candidate).exists())
