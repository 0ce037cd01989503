"""Methods against each other on a live workload, and in studies that exist already.

On a live workload each method and seed is a study of its own, in fast mode, with all that a study has: a
journal, transcripts, a resume. The order is a Latin square over rounds, a round for each seed: a machine
that drifts over the day drifts for every method alike. What the studies say is read back from their
journals, so that studies which somebody ran by hand are compared in the same way, if they may be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tuner import machine
from tuner.assemble import Bench, open_proposer, prepare, reopen
from tuner.calls import CappedChat
from tuner.compare import Question, check_counts, machine_here, method_name, sentence_of, uses_llm, versions_here
from tuner.display import Screen
from tuner.journal import NAME as JOURNAL
from tuner.journal import Header, Journal, Study, lock, read
from tuner.meters import MeterOptions
from tuner.runs import Problem, Run, Step
from tuner.session import Session
from tuner.space import Refused, excerpt
from tuner.study import resumed
from tuner.summary import exchanges, load_text, usage
from tuner.trial import Chat, ChatError, Trial

STUDIES = "studies"
"""The folder below the comparison's that holds its studies, `METHOD-SEED` each."""

OVER = ("goal", "budget", "exhausted", "failures")
"""Ends after which a study does not go on; a person and a chat may come back."""


# --- the order -----------------------------------------------------------------------------------


def latin_order(methods: Sequence[str], seeds: int) -> list[tuple[str, int]]:
    """Every method with every seed; in each round, one seed, the methods start one place further on.

    Over as many rounds as there are methods, each stands in each place once: R. A. Fisher, The Design of
    Experiments (1935), ch. 5. What a place in a round is worth, such as a machine that is still cold, then
    hits all methods alike.
    """
    count = len(methods)
    return [(methods[(place + seed) % count], seed) for seed in range(seeds) for place in range(count)]


# --- live ----------------------------------------------------------------------------------------


def ask_workload(
    header: Header,
    *,
    name: str,
    methods: Sequence[str],
    seeds: int,
    trials: int,
    targets: Sequence[str],
    threshold: str | None,
    max_prompts: int | None,
    meter: str,
    options: MeterOptions,
    screen: Screen,
) -> Question:
    """What is asked of a live workload, with all that was found out about this machine.

    `header` is what the studies share; who proposes, the seed and the name differ.

    Raises:
        Refused: `prepare` does, `largest` is among the methods, or a proposer cannot be opened.
    """
    check_counts(methods, seeds, trials)
    if "largest" in methods:
        raise Refused("--methods largest: a live workload has no limit that it could meet; leave it out")
    shared, bench = prepare(header, meter=meter, options=options, say=screen.say)
    shared = replace(shared, trials=trials + 1)
    for method in methods:
        open_proposer(_of(shared, method, 0), bench, _NOBODY)
    return Question(
        name=name,
        problems=(_problem(_studied(shared, bench), "workload"),),
        methods=tuple(methods),
        seeds=seeds,
        trials=trials,
        targets=tuple(targets),
        threshold=threshold,
        llm=header.llm,
        base_url=header.base_url,
        max_prompts=max_prompts,
        study=shared,
        machine=machine_here(),
        versions=versions_here(),
    )


class _Nobody:
    """Stands where a chat would, while a template is only tried."""

    name = "none"

    def reply(self, messages: object, schema: object) -> object:
        raise AssertionError("nothing is sent")


_NOBODY: Chat = _Nobody()  # type: ignore[assignment]


def _studied(header: Header, bench: Bench) -> Study:
    return Study(folder=bench.runner_path, header=header)


def _of(shared: Header, method: str, seed: int) -> Header:
    """The header of one study. The load keeps its own seed: the same prompts for all."""
    llm = uses_llm(method)
    return replace(
        shared,
        name=study_name(method, seed),
        proposer="llm" if llm else method,
        template=method if llm else None,
        llm=shared.llm if llm else None,
        base_url=shared.base_url if llm else None,
        seed=seed,
    )


def study_name(method: str, seed: int) -> str:
    """The folder of one study of a comparison."""
    return f"{method_name(method)}-{seed}"


def run_studies(
    asked: Question, folder: Path, screen: Screen, chat: Chat | None, report: Callable[[int, int, float | None], None]
) -> None:
    """Run every study that is missing, in the order of the Latin square; a chat that stays away ends its methods."""
    assert asked.study is not None
    order = latin_order(asked.methods, asked.seeds)
    left = [10**9 if asked.max_prompts is None else asked.max_prompts - _prompts(asked, folder)]
    capped = CappedChat(chat, left) if chat is not None else None
    away = False
    seconds: list[float] = []
    for done, (method, seed) in enumerate(order):
        mean = sum(seconds) / len(seconds) if seconds else None
        report(done, len(order), mean and mean * (len(order) - done))
        place = folder / STUDIES / study_name(method, seed)
        if _is_over(place) or (away and uses_llm(method)):
            continue
        away = _run_study(_of(asked.study, method, seed), place, screen, capped) == "chat" or away
        seconds.append(sum(t.seconds for t in read(place).history.trials))
    report(len(order), len(order), None)


def _prompts(asked: Question, folder: Path) -> int:
    """Prompts that the studies so far were answered."""
    places = [folder / STUDIES / study_name(m, s) for m, s in latin_order(asked.methods, asked.seeds)]
    return sum(len(exchanges(read(place).history)) for place in places if (place / JOURNAL).exists())


def _is_over(place: Path) -> bool:
    if not (place / JOURNAL).exists():
        return False
    ends = read(place).ends
    return bool(ends) and ends[-1].kind in OVER


def _run_study(header: Header, place: Path, screen: Screen, chat: Chat | None) -> str:
    """Run one study, or go on with it; the kind of its end."""
    exists = (place / JOURNAL).exists()
    place.mkdir(parents=True, exist_ok=True)
    with lock(place), Journal.resume(place) if exists else Journal.create(place, header) as journal:
        bench, _ = reopen(journal.study, force=False, say=screen.say)
        if exists:
            resumed(journal)
        session = Session(
            screen=screen,
            journal=journal,
            header=journal.study.header,
            bench=bench,
            chat=chat if header.proposer == "llm" else None,
            batch=True,
        )
        end, _found = session.run()
    return end.kind


def live_runs(asked: Question, folder: Path) -> list[Run]:
    """What the studies of a live comparison say, as far as they are there."""
    places = [(m, s, folder / STUDIES / study_name(m, s)) for m, s in latin_order(asked.methods, asked.seeds)]
    return [
        replace(_run(read(place), asked.problems[0].name), method=method_name(method), seed=seed, budget=asked.trials)
        for method, seed, place in places
        if (place / JOURNAL).exists() and read(place).history.trials
    ]


# --- studies that exist --------------------------------------------------------------------------


def compare_studies(folders: Sequence[Path]) -> tuple[Problem, list[Run], list[str]]:
    """The problem that these studies share, what they did on it, and what a person should know.

    A method that comes twice with one seed gets the next free seed: seeds only say what is paired.

    Raises:
        Refused: two studies are not of the same machine, engine, model, meter, load or space, or one has no trial.
    """
    studies = [read(folder) for folder in folders]
    for study in studies:
        if not study.history.trials:
            raise Refused(f"{study.folder}: it has no trial yet")
        if study.segments:
            raise Refused(
                f"{study.folder}: it was resumed on another machine or engine; its segments are not one study"
            )
        refuse_mixed(studies[0], study)
    of = _problem(studies[0], "study")
    runs: list[Run] = []
    notes = []
    taken: set[tuple[str, int]] = set()
    for study in studies:
        run = _run(study, of.name)
        seed = run.seed
        while (run.method, seed) in taken:
            seed += 1
        if seed != run.seed:
            notes.append(f"{study.folder}: counted as seed {seed}, because {run.method} was there with seed {run.seed}")
        taken.add((run.method, seed))
        runs.append(replace(run, seed=seed))
    return of, runs, notes


def refuse_mixed(first: Study, other: Study) -> None:
    """Refuse studies whose energies are different quantities, naming what differs and both values."""
    ours, theirs = _ground(first), _ground(other)
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        if ours.get(key) != theirs.get(key):
            raise Refused(
                f"{first.folder} and {other.folder} cannot be compared: {key} is"
                f" {excerpt(ours.get(key, 'not recorded'))} in the one and {excerpt(theirs.get(key, 'not recorded'))}"
                " in the other; compare studies of one machine, engine, model, meter and load"
            )


def _ground(study: Study) -> Mapping[str, object]:
    """Everything that must agree. Not the load's seed: other prompts of the same length are the same load."""
    header = study.header
    load = header.target
    same = {key for key in header.machine if key in machine.MUST_MATCH or key.startswith(("gpu", "scope_"))}
    return {
        **{f"machine {key}": header.machine[key] for key in sorted(same)},
        **{f"identity {key}": value for key, value in sorted(header.identity.items())},
        "meter": "+".join(header.meters),
        "load model": load.model or load.size or "",
        "load prompts": load.prompts,
        "load prompt tokens": load.prompt_tokens,
        "load output tokens": load.output_tokens,
        "load pixels": load.pixels,
        "search space": [[p["name"], p["range"], p["default"]] for p in header.space],
    }


def _problem(study: Study, kind: str) -> Problem:
    header = study.header
    load = header.target
    measured = next(iter(study.history.measured), None)
    name = Path(header.workload).stem
    return Problem(
        name=name,
        kind="workload" if kind == "workload" else "study",
        unit=measured.valid[0].work.unit if measured else header.unit,
        objective="joules per unit",
        parameters=tuple(str(p["name"]) for p in header.space),
        facts={
            "hardware": header.machine.get("gpus") or header.machine.get("cpu", ""),
            "model": header.identity.get("model", ""),
            "engine": " ".join(filter(None, (header.identity.get("engine"), header.identity.get("engine_version")))),
            "task": load_text(load, header.unit),
            "machine": ", ".join(f"{k} {v}" for k, v in header.machine.items() if k != "host"),
            "meter": header.meter_sentence.removeprefix("meter: "),
        },
    )


def _run(study: Study, name: str) -> Run:
    """A study as a run. One that ended for another reason than its budget, a goal or its space says why."""
    header, history = study.header, study.history
    trials = history.current
    end = study.ends[-1] if study.ends else None
    made = len(trials) - 1
    over = end is not None and end.kind in ("goal", "budget", "exhausted")
    allowed = (header.trials or len(trials)) - 1
    used = usage(history)
    models = dict.fromkeys(e.reply.model for e in exchanges(history))
    return Run(
        problem=name,
        method=method_name(header.template) if header.template and header.proposer == "llm" else header.proposer,
        seed=header.seed,
        steps=tuple(_step(number, trial) for number, trial in enumerate(trials)),
        # A study that reached its threshold was stopped there: what more proposals would have brought is not known.
        budget=max(allowed, made),
        prompts=used.prompts,
        input_tokens=used.input_tokens,
        output_tokens=used.output_tokens,
        llm=", ".join(models) or None,
        error=None if over else sentence_of(ChatError(end.reason)) if end else "it was not finished",
        exhausted=end is not None and end.kind == "exhausted",
        seconds=sum(t.seconds + sum(r.seconds for r in t.repeats) for t in trials),
        started_unix=header.started_unix,
    )


def _step(number: int, trial: Trial) -> Step:
    joules = trial.joules_per_unit
    return Step(
        number=number,
        config=trial.config,
        joules_per_unit=joules,
        feasible=joules is not None,
        error=None if joules is not None else trial.error or "no window counted",
        units_per_second=trial.units_per_second,
    )
