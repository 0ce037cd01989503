"""Methods against each other on recorded tables: the same problems, the same start, paired seeds.

A run is one method on one problem with one seed, and a function of these three alone: which other runs
there are, in which order and on how many cores they go, changes nothing in it. So a comparison that was
stopped goes on to the same end, and any one of its runs can be repeated alone.

A comparison is a folder: `header.json` says what was asked, `runs.jsonl` holds one run a line as they end,
and `calls.jsonl` every prompt that was answered. A run that ended early, because the chat stayed away, is
kept with the reason; a resume makes it again, with the stored answers as far as they go. Nothing is filled in.

Glossary
    job         a run that is still to be made
    lane        a process, or a thread where a chat is asked, that makes one run after another
    moved       a proposal that the table does not hold, and that was answered with the nearest row
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import queue
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from tuner import __version__, machine
from tuner.assemble import limits_told, rehearsal
from tuner.calls import Call, Calls, StoredChat
from tuner.files import find, names
from tuner.journal import Header, JournalError
from tuner.proposers import CLASSICAL, LIMITED, open_classical
from tuner.proposers.first import DefaultFirst
from tuner.proposers.largest import BATCHES, Largest
from tuner.proposers.llm import Llm, View, read_template, render
from tuner.replay import Replay, Table, anonymise, problem, step_of
from tuner.runs import Problem, Run, Step
from tuner.space import Refused, closest, excerpt
from tuner.study import Threshold
from tuner.trial import Chat, ChatError, Decision, History, Proposer

# Version 1: header.json, runs.jsonl, calls.jsonl.
FORMAT = 1

HEADER, RUNS = "header.json", "runs.jsonl"

METHODS = (*CLASSICAL, *LIMITED)
"""Those that need no chat model; beside them, every template is a method."""

TWIN_SEED = 0
"""Of anonymised twins: every comparison meets the same ones, so that comparisons can be compared."""

LLM_LANES = 4
"""Conversations at a time: a provider's limits are per minute, and a local model has few slots."""

MOST_TRIALS = 10_000
MOST_SEEDS = 10_000


# --- what is asked -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a comparison was asked to find out: everything that its runs depend on."""

    name: str
    problems: tuple[Problem, ...]
    methods: tuple[str, ...]
    """As they were typed: names of proposers, and names or paths of templates."""
    seeds: int
    """Each method runs with the seeds 0, 1, ... on every problem."""
    trials: int
    """Proposals that a run may make after the default."""
    tables: tuple[str, ...] = ()
    """Names or paths; empty for a live workload."""
    anonymise: bool = False
    """Whether each table is followed by its twin."""
    noise_sigma: float = 0.0
    resample: bool = False
    targets: tuple[str, ...] = ()
    """As typed: `5%` of the best, `0.8x` of the default, `0.45J`."""
    threshold: str | None = None
    """What the chat models are told to get to; it is also a target."""
    llm: str | None = None
    base_url: str | None = None
    max_prompts: int | None = None
    replay_llm: str | None = None
    """The comparison whose stored answers took the place of the model's."""
    study: Header | None = None
    """What the studies of a live workload share."""
    left_out: tuple[str, ...] = ()
    """Combinations of method and problem that make no sense, as sentences."""
    machine: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    started_unix: float = 0.0
    format: int = FORMAT

    @property
    def command(self) -> str:
        """What makes the same runs again, without what only says where they go."""
        every = set(self.tables) == set(names("recorded"))
        options = {
            "--table": "all" if every else ",".join(self.tables) or None,
            "--workload": self.study.workload if self.study else None,
            "--methods": ",".join(self.methods),
            "--seeds": self.seeds,
            "--trials": self.trials,
            "--noise": "resample" if self.resample else f"{self.noise_sigma:g}" if self.noise_sigma else None,
            "--within": ",".join(self.targets) or None,
            "--threshold": self.threshold,
            "--llm": self.llm if self.replay_llm is None else None,
            "--base-url": self.base_url if self.replay_llm is None else None,
            "--max-prompts": self.max_prompts,
            "--replay-llm": self.replay_llm,
        }
        given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
        return shlex.join(["tune", "compare", *given, *(["--anonymise"] if self.anonymise else [])])


def method_name(method: str) -> str:
    """What tables call a method: a template by its file's name."""
    return Path(method).name.removesuffix(".j2").removesuffix(".md")


def parse_methods(text: str) -> tuple[str, ...]:
    """`rules,sobol,enhanced,./mine.md.j2`: each a proposer or a template.

    Raises:
        Refused: an unknown one, one that is named twice, or none.
    """
    asked = [part.strip() for part in text.split(",") if part.strip()]
    if not asked:
        raise Refused("--methods: expected names, such as rules,sobol,tpe")
    found = []
    for name in asked:
        if name in METHODS:
            open_classical(name, 0)  # what is not installed is said now
            found.append(name)
        elif "/" in name or name.endswith((".j2", ".md")):
            found.append(str(find("prompts", name)))
        elif name in names("prompts"):
            path = find("prompts", name)
            found.append(name if path == find("prompts", name, local=False) else str(path))
        else:
            templates = names("prompts")
            raise Refused(
                f"--methods {excerpt(name)}: no such method{closest(name, [*METHODS, *templates])} (there is"
                f" {', '.join(METHODS)}; with --llm the templates {', '.join(templates)}, or a path to one)"
            )
    called = [method_name(m) for m in found]
    if twice := next((name for name in called if called.count(name) > 1), None):
        raise Refused(f"--methods: {twice} is named twice; give each method a name of its own")
    return tuple(found)


def parse_tables(text: str) -> tuple[str, ...]:
    """`all`, or names and paths with commas between them."""
    if text.strip() == "all":
        if not (every := names("recorded")):
            raise Refused("--table all: there are no recorded tables here; `tune record` makes one")
        return tuple(every)
    asked = [part.strip() for part in text.split(",") if part.strip()]
    if not asked:
        raise Refused("--table: expected names, or all; `tune tables` lists them")
    if twice := next((name for name in asked if asked.count(name) > 1), None):
        raise Refused(f"--table: {twice} is named twice")
    for name in asked:
        find("recorded", name)
    return tuple(str(Path(name).absolute()) if "/" in name or name.endswith(".csv") else name for name in asked)


def uses_llm(method: str) -> bool:
    """Whether a chat model proposes."""
    return method not in METHODS


def question(
    *,
    name: str,
    tables: Sequence[str],
    methods: Sequence[str],
    seeds: int,
    trials: int,
    anonymised: bool = False,
    noise_sigma: float = 0.0,
    resample: bool = False,
    targets: Sequence[str] = (),
    threshold: str | None = None,
    llm: str | None = None,
    base_url: str | None = None,
    max_prompts: int | None = None,
    replay_llm: str | None = None,
) -> Question:
    """What is asked of recorded tables, checked: whatever can be refused is refused before a folder exists."""
    check_counts(methods, seeds, trials)
    problems, left_out = [], []
    for asked in tables:
        for twin in (False, True) if anonymised else (False,):
            table = load_table(asked, twin=twin)
            Replay(table, noise_sigma=noise_sigma, resample=resample)
            of = problem(table, noise_sigma=noise_sigma, resample=resample)
            problems.append(of)
            left_out += [why for method in methods if (why := unsuited(method, table))]
            for method in filter(uses_llm, methods):
                _rehearse(method, table, of, trials, threshold)
    if "largest" in methods and len([w for w in left_out if w.startswith("largest")]) == len(problems):
        raise Refused(f"--methods largest: none of these tables has a limit and a batch ({', '.join(BATCHES)})")
    return Question(
        name=name,
        problems=tuple(problems),
        tables=tuple(tables),
        methods=tuple(methods),
        seeds=seeds,
        trials=trials,
        anonymise=anonymised,
        noise_sigma=noise_sigma,
        resample=resample,
        targets=tuple(targets),
        threshold=threshold,
        llm=llm,
        base_url=base_url,
        max_prompts=max_prompts,
        replay_llm=replay_llm,
        left_out=tuple(left_out),
        machine=machine_here(),
        versions=versions_here(),
        started_unix=round(time.time(), 3),
    )


def check_counts(methods: Sequence[str], seeds: int, trials: int) -> None:
    """Refuse a comparison of nothing, or of more than anybody waits for."""
    if not 1 <= seeds <= MOST_SEEDS:
        raise Refused(f"--seeds {seeds}: expected 1 to {MOST_SEEDS}; with fewer than 6 little can be shown")
    if not 1 <= trials <= MOST_TRIALS:
        raise Refused(f"--trials {trials}: expected 1 to {MOST_TRIALS} proposals after the default")
    if not methods:
        raise Refused("--methods: expected at least one")


def unsuited(method: str, table: Table) -> str | None:
    """Why a method makes no sense on a table, as a sentence; None where it does."""
    if method != "largest":
        return None
    if not table.limits:
        return f"largest is left out on {table.name}: it has no limit to meet"
    if batch_name(table) is None:
        return f"largest is left out on {table.name}: none of its parameters is a batch"
    return None


def batch_name(table: Table) -> str | None:
    """The parameter that is the batch: named by the metadata, else by its usual names."""
    named = (table.about.batch, *BATCHES)
    return next((name for name in named if name in table.about.parameters), None)


@lru_cache(maxsize=64)
def load_table(name: str, *, twin: bool = False) -> Table:
    """The table, or its twin; read once in a process."""
    table = Table.named(name)
    return anonymise(table, TWIN_SEED) if twin else table


def machine_here() -> dict[str, str]:
    """What the machine is that made the comparison; replayed energies do not depend on it."""
    return {key: fact for key, fact in machine.describe().items() if key != "host"}


def versions_here() -> dict[str, str]:
    """Tune, Python, and the packages that draw the proposals."""
    found = {"python": platform.python_version()}
    for package in ("numpy", "scipy", "optuna", "cmaes", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return {"tune": __version__, **found}


# --- one run -----------------------------------------------------------------------------------

MOVED = "that combination was never measured; the nearest one that was took its place"


def run_one(
    table: Table,
    proposer: Proposer,
    *,
    method: str,
    seed: int,
    budget: int,
    noise_sigma: float = 0.0,
    resample: bool = False,
) -> Run:
    """One method on one table, in memory, until the budget is spent or nothing is left.

    A proposal that was moved counts as edited: the method is told what was measured in its place, and
    does not propose it again.

    Args:
        table: the problem.
        proposer: asked with everything that happened, but for step 0, which is the default.
        method: what tables call it.
        seed: of the replayed noise; the proposer has its own copy.
        budget: proposals after the default.
        noise_sigma: of the replayed noise.
        resample: answer with one of the recorded repeats.
    """
    replay = Replay(table, noise_sigma=noise_sigma, seed=seed, resample=resample)
    history = History()
    steps: list[Step] = []
    error, exhausted = None, False
    started_unix, started = time.time(), time.perf_counter()
    asked: Proposer = DefaultFirst(proposer)
    while len(steps) <= budget:
        if not replay.left:
            exhausted = True
            break
        try:
            proposal = asked.propose(table.space, history)
        except ChatError as away:
            error = sentence_of(away)
            break
        if proposal is None:
            exhausted = True
            break
        trial = replay(len(steps), proposal)
        history = history.add(trial)
        if trial.config != proposal.config:
            measured = replace(proposal, config=trial.config)
            history = history.add(
                Decision(action="edit", before_trial=trial.number, remark=MOVED, proposal=proposal, edited=measured)
            )
        steps.append(step_of(trial, table))
        # A default that breaks a limit breaks it again: asking `DefaultFirst` once more would waste a proposal.
        asked = proposer
    return Run(
        problem=table.name,
        method=method,
        seed=seed,
        steps=tuple(steps),
        budget=budget,
        error=error,
        exhausted=exhausted,
        seconds=time.perf_counter() - started,
        started_unix=round(started_unix, 3),
    )


def sentence_of(away: ChatError) -> str:
    """Why the chat stayed away, without the advice that fits a study alone."""
    return str(away).split("; everything measured is kept")[0]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is still to be made; small enough to be sent to a process."""

    table: str
    twin: bool
    problem: str
    method: str
    seed: int
    budget: int
    noise_sigma: float
    resample: bool

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.problem, method_name(self.method), self.seed)


def jobs_of(asked: Question, done: Mapping[tuple[str, str, int], Run]) -> list[Job]:
    """What is missing, seed by seed: whatever stops a comparison, what it has is paired as far as possible."""
    tables = [(t, twin) for t in asked.tables for twin in ((False, True) if asked.anonymise else (False,))]
    loaded = [(name, twin, load_table(name, twin=twin)) for name, twin in tables]
    every = (
        Job(
            table=name,
            twin=twin,
            problem=table.name,
            method=method,
            seed=seed,
            budget=asked.trials,
            noise_sigma=asked.noise_sigma,
            resample=asked.resample,
        )
        for seed in range(asked.seeds)
        for name, twin, table in loaded
        for method in asked.methods
        if unsuited(method, table) is None
    )
    return [job for job in every if job.key not in done or not done[job.key].complete]


def replayed(job: Job) -> Run:
    """Make the run of a classical method."""
    table = load_table(job.table, twin=job.twin)
    if job.method == "largest":
        proposer: Proposer = Largest(job.seed, batch=batch_name(table))
    else:
        proposer = open_classical(job.method, job.seed)
    return _made(job, table, proposer)


def _made(job: Job, table: Table, proposer: Proposer) -> Run:
    return run_one(
        table,
        proposer,
        method=method_name(job.method),
        seed=job.seed,
        budget=job.budget,
        noise_sigma=job.noise_sigma,
        resample=job.resample,
    )


def asked_of_chat(job: Job, asked: Question, calls: Calls, chat: Chat | None) -> Run:
    """Make the run of a template, with the stored answers first."""
    table = load_table(job.table, twin=job.twin)
    of = next(p for p in asked.problems if p.name == job.problem)
    stored = StoredChat(
        calls=calls,
        inner=chat,
        problem=job.problem,
        method=method_name(job.method),
        seed=job.seed,
        name=asked.llm or "stored answers",
    )
    proposer = Llm(
        chat=stored,
        template=find("prompts", job.method),
        fallback=open_classical("rules", job.seed),
        view=view_of(of, job.budget, asked.threshold),
    )
    made = _made(job, table, proposer)
    read = [r.input_tokens for r in stored.replies if r.input_tokens is not None]
    written = [r.output_tokens for r in stored.replies if r.output_tokens is not None]
    return replace(
        made,
        prompts=len(stored.replies),
        input_tokens=sum(read) if read else None,
        output_tokens=sum(written) if written else None,
        llm=", ".join(dict.fromkeys(r.model for r in stored.replies)) or None,
    )


def view_of(of: Problem, budget: int, threshold: str | None) -> View:
    """What a template may see of a recorded problem: what a person at that machine would know.

    The energies are called measured, which they were; that they are replayed would invite a model to
    remember them. Of the table's rows and its best value it sees nothing.
    """
    told = {key: fact for key, fact in of.facts.items() if fact and fact != NOT_TOLD}
    workload = {
        "engine": told.get("engine", "an inference engine"),
        "model": told.get("model", ""),
        "load": told.get("task", ""),
        **limits_told(of.limits),
    }
    return View(
        machine={"hardware": told["hardware"]} if "hardware" in told else {},
        workload={**{key: fact for key, fact in workload.items() if fact}, "quality": "measured"},
        unit=of.unit,
        threshold=Threshold.parse(threshold).joules_per_unit if threshold else lambda _history: None,
        trials=budget + 1,
    )


NOT_TOLD = "not told"
"""What an anonymised twin says of its hardware, model and engine."""


def _rehearse(method: str, table: Table, of: Problem, budget: int, threshold: str | None) -> None:
    """Refuse a broken template before anything runs."""
    path = find("prompts", method)
    text, view = read_template(path), view_of(of, budget, threshold)
    for history in (History(), rehearsal(table.space)):
        render(text, path, view.of(table.space, history))


# --- the folder --------------------------------------------------------------------------------


def read_question(folder: Path) -> Question:
    """What was asked. Raises `Refused` where there is no comparison, or one of a newer format."""
    path = folder / HEADER
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise Refused(f"{folder}: no comparison here (expected {HEADER})") from None
    try:
        if (version := msgspec.json.decode(content, type=_Version).format) > FORMAT:
            raise Refused(f"{path}: written in format {version}, this tune reads up to {FORMAT}; use a newer tune")
        return msgspec.json.decode(content, type=Question)
    except msgspec.MsgspecError as error:
        raise Refused(f"{path}: no header of a comparison ({error})") from error


class _Version(msgspec.Struct):
    format: int


def read_runs(folder: Path) -> dict[tuple[str, str, int], Run]:
    """The runs in `folder`, the newest of each. A torn last line is passed over.

    Raises:
        Refused: a line before the last one is damaged.
    """
    path = folder / RUNS
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    found: dict[tuple[str, str, int], Run] = {}
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            run = msgspec.json.decode(line, type=Run)
        except msgspec.MsgspecError as error:
            raise Refused(
                f"{path}: line {number} is damaged ({error}); take that line out and `tune compare --resume {folder}`"
                " makes its run again"
            ) from error
        found[run.problem, run.method, run.seed] = run
    return found


class Store:
    """The open folder of a comparison; this process holds its lock."""

    FLUSH_SECONDS = 1.0
    """Between two syncs: a run takes milliseconds to make again, a sync may take as long."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = read_runs(folder)
        path = folder / RUNS
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._descriptor, path.read_bytes().rfind(b"\n") + 1)
        os.lseek(self._descriptor, 0, os.SEEK_END)
        self._waiting: list[bytes] = []
        self._flushed = time.monotonic()

    @classmethod
    def create(cls, folder: Path, asked: Question) -> Self:
        """Start a comparison in `folder`, which exists and is locked."""
        part = folder / f"{HEADER}.part"
        part.write_bytes(msgspec.json.format(msgspec.json.encode(asked), indent=1) + b"\n")
        part.replace(folder / HEADER)
        return cls(folder)

    def add(self, run: Run) -> None:
        """Keep a run; on disk within `FLUSH_SECONDS` of the next one, and at the end."""
        self.runs[run.problem, run.method, run.seed] = run
        self._waiting.append(msgspec.json.encode(run) + b"\n")
        if time.monotonic() - self._flushed >= self.FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits, and sync. Raises `JournalError` when it cannot; whole lines stay whole."""
        lines, self._waiting = b"".join(self._waiting), []
        self._flushed = time.monotonic()
        before = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            while lines:
                lines = lines[os.write(self._descriptor, lines) :]
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, before)
            raise JournalError(
                f"{self.folder / RUNS}: {error.strerror}; the runs before are kept."
                f" Mend that, then go on with `tune compare --resume {self.folder}`"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not isinstance(error, JournalError):
                self.flush()
        finally:
            os.close(self._descriptor)


# --- all runs ----------------------------------------------------------------------------------

Report = Callable[[int, int, float | None], None]
"""Told how many runs are done, of how many, and the seconds that are left; None while nobody knows."""


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def make_runs(
    asked: Question,
    store: Store,
    *,
    chat: Chat | None,
    others: Mapping[str, Call] | None,
    report: Report,
    inline_chat: bool = False,
) -> None:
    """Make every run that is missing. Whatever ends this early, finished runs are in the store.

    Classical methods run in a process for each core, templates in threads that ask `chat`. When a chat
    stays away, no further conversation is started: what is left of them is missing.

    Args:
        asked: what to compare.
        store: where runs go.
        chat: asked by the templates; None where there are none, or where `others` answers.
        others: stored answers of another comparison, by key; nobody is asked then.
        report: told the progress.
        inline_chat: the chat is a person at this terminal, who is asked by this thread once all else is done.
    """
    jobs = jobs_of(asked, store.runs)
    classical = [job for job in jobs if not uses_llm(job.method)]
    talks = [job for job in jobs if uses_llm(job.method)]
    if not jobs:
        return
    clock = _Clock(len(jobs), jobs)
    report(0, len(jobs), None)
    ended: queue.SimpleQueue[tuple[Job, Run | BaseException]] = queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        calls = None
        if talks:
            calls = Calls(store.folder, others=others, most=asked.max_prompts)
            stack.callback(calls.close)
        waiting = 0
        if classical:
            stack.enter_context(_processes(classical, ended))
            waiting += len(classical)
        if calls is not None and not inline_chat:
            waiting += stack.enter_context(_threads(talks, asked, calls, chat, ended))
        while waiting:
            job, outcome = ended.get()
            waiting -= 1
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is NOT_STARTED:
                continue
            store.add(outcome)
            report(clock.done(job, outcome), len(jobs), clock.left(cores()))
        if calls is not None and inline_chat:
            for job in talks:
                run = asked_of_chat(job, asked, calls, chat)
                store.add(run)
                store.flush()
                report(clock.done(job, run), len(jobs), None)
                if not run.complete:
                    break


NOT_STARTED = Run(problem="", method="", seed=0)
"""Stands for a conversation that was not begun, because the chat stays away."""


class _Clock:
    """How long the rest takes: what is left of each method, times the mean of its runs so far."""

    def __init__(self, jobs: int, waiting: Iterable[Job]) -> None:
        self._jobs = jobs
        self._left: dict[str, int] = {}
        for job in waiting:
            self._left[job.method] = self._left.get(job.method, 0) + 1
        self._spent: dict[str, tuple[int, float]] = {}

    def done(self, job: Job, run: Run) -> int:
        """Count a run; how many are done."""
        count, seconds = self._spent.get(job.method, (0, 0.0))
        self._spent[job.method] = (count + 1, seconds + run.seconds)
        self._left[job.method] -= 1
        return self._jobs - sum(self._left.values())

    def left(self, lanes: int) -> float | None:
        """Seconds, with so many lanes; None until each method that is left has a run."""
        if any(left and method not in self._spent for method, left in self._left.items()):
            return None
        means = {method: seconds / count for method, (count, seconds) in self._spent.items()}
        asked = sum(left * means[m] for m, left in self._left.items() if left and uses_llm(m)) / LLM_LANES
        return max(asked, sum(left * means[m] for m, left in self._left.items() if left and not uses_llm(m)) / lanes)


@contextlib.contextmanager
def _processes(jobs: Sequence[Job], ended: queue.SimpleQueue[tuple[Job, Run | BaseException]]) -> Iterator[None]:
    """A process for each core, working on `jobs`; gone when this is left, whatever they were at."""
    pool = ProcessPoolExecutor(
        min(cores(), len(jobs)), mp_context=multiprocessing.get_context("spawn"), initializer=_settle
    )

    def tell(job: Job, future: Future[Run]) -> None:
        if not future.cancelled():
            ended.put((job, _outcome(future)))

    try:
        with _deaf():
            # Submitting is what starts the processes.
            futures = [pool.submit(replayed, job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            future.add_done_callback(partial(tell, job))
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()


def _outcome(future: Future[Run]) -> Run | BaseException:
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        return JournalError(
            "a process that made runs was killed (out of memory?); the runs before are kept, --resume goes on"
        )
    return error or future.result()


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started here inherit that Ctrl-C is none of their business: this one ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _settle() -> None:
    """One thread for linear algebra: with a process on each core more of them stand in each other's way."""
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")


@contextlib.contextmanager
def _threads(
    jobs: Sequence[Job],
    asked: Question,
    calls: Calls,
    chat: Chat | None,
    ended: queue.SimpleQueue[tuple[Job, Run | BaseException]],
) -> Iterator[int]:
    """Threads that hold conversations; yields how many outcomes will come.

    They die with the process: a model may take minutes to answer, and Ctrl-C does not wait for it.
    """
    todo: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    for job in [*jobs, *[None] * LLM_LANES]:
        todo.put(job)
    away = threading.Event()

    def converse() -> None:
        while (job := todo.get()) is not None:
            if away.is_set():
                ended.put((job, NOT_STARTED))
                continue
            try:
                run = asked_of_chat(job, asked, calls, chat)
            except BaseException as error:  # noqa: BLE001  raised again in the main thread
                ended.put((job, error))
                return
            if not run.complete:
                away.set()
            ended.put((job, run))

    for lane in range(LLM_LANES):
        threading.Thread(target=converse, name=f"conversation {lane}", daemon=True).start()
    try:
        yield len(jobs)
    except BaseException:
        away.set()
        raise
