"""Running one trial: start a worker, watch it, end it, say what happened.

The worker and all that it starts form one process group. That group, and nothing else, is ended when
the trial is over, when it takes too long and when this program stops; nothing is ever looked for by
name. A worker that crashes, hangs or is killed for lack of memory is a failed trial with a cause and
the last lines of its log.

A worker whose engine runs well may be held after its trial: where the next configuration differs in `request`
and `live` parameters only, it is measured on the running engine (docs/design/reuse.md).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from tuner.control import ControlError, PowerControl, split
from tuner.journal import JournalError, Plan
from tuner.limits import QUALITY_LOSS, Limit, broken
from tuner.measure import settling_seconds
from tuner.space import Config, Refused, RefusedForGood, closest
from tuner.summary import grouped
from tuner.supervise import out_of_memory_kills, signal_name
from tuner.telemetry import WATCHES_GPUS, Sampler
from tuner.trial import Proposal, Target, Trial
from tuner.worker import LEAVE_SECONDS, STOPPING, Job, Result

STARTING = "starting"
"""The phase of a worker that has told none yet."""

GRACE_SECONDS = 5.0
"""Between asking a worker's group to end and killing it, where it does not answer that it is stopping its engine."""

SILENT_SECONDS = 1.0
"""How long an engine may take to stop without a word about it."""

TICK_SECONDS = 0.25
"""How often the live view may redraw. The parent runs beside the measurement: it must sleep."""

RELEASE_SECONDS = 30.0
RELEASE_SLACK_BYTES = 64 << 20
"""How long, and to within what, GPU memory is waited for after an engine has ended."""

COOL_CELSIUS = 2.0
"""How much warmer than before the first trial a device may be when the next one begins."""

COOL_PERIOD_SECONDS = 1.0

REFERENCE = "quality-reference"
"""The file in a study's folder, one a segment, that holds what the default configuration puts out."""

NO_VALID_WINDOW = "no valid window"
"""How the error of a launch begins whose engine ran while nothing could be measured."""

LOG_LINES = 16
LOG_LINE_LENGTH = 300

Evaluate = Callable[[int, Proposal], Trial]


@dataclass(frozen=True, kw_only=True)
class Held:
    """A worker that waits for another job, with its engine loaded."""

    worker: subprocess.Popen[bytes]
    launcher: Launcher
    """The one that started it."""
    config: Config
    """What the engine was launched with, or changed to since."""
    phases: int
    jobs: int
    """The end of a pipe that the path of the next job goes into."""
    scratch: tempfile.TemporaryDirectory[str]
    log: Path
    used_memory: int | None
    """GPU memory before it was started."""
    number: int
    """Of the last trial that it was asked for."""


@dataclass
class Known:
    """What one trial leaves for the next; launchers made from each other by `replace` share it."""

    celsius: dict[str, float] | None = None
    """Temperatures at the start of the segment's first trial, by gauge: where to cool down to; None until then."""
    idle_watts: float | None = None
    """What the machine drew without an engine; None when it was not measured."""
    held: Held | None = None
    measured: bool = False
    """Whether any engine came so far that something was measured."""

    def close(self) -> None:
        """End the engine that is held, if there is one."""
        held, self.held = self.held, None
        if held is not None:
            held.launcher.end(held)


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Evaluates a proposal by running the engine."""

    folder: Path
    """The study's folder; a trial's log goes into `trials/<number>/`."""
    runner: Path
    target: Target
    meters: tuple[str, ...]
    meter_options: dict[str, object]
    plan: Plan
    segment: int = 0
    report: Callable[[int, str], None] = field(default=lambda _number, _phase: None)
    """Told the trial's number and phase when a phase begins, and again at every tick."""
    log_name: str = "engine.log"
    idle_seconds_for: Callable[[int], float] = field(default=lambda _number: 0.0)
    """How long idle power is measured with the trial of this number, twice; 0 for not at all."""
    known: Known = field(default_factory=Known)
    control: PowerControl | None = None
    """Sets GPU power and clock before each launch; the engine never sees those parameters."""

    limits: tuple[Limit, ...] = ()
    """What a configuration must keep to."""
    changeable: frozenset[str] = frozenset()
    """Parameters that need no restart. With any of them the engine is held after a trial, in `known`, until another
    launch or `Known.close` ends it."""

    def __call__(self, number: int, proposal: Proposal) -> Trial:
        started_unix, started = time.time(), time.monotonic()
        log = trial_folder(self.folder, number) / self.log_name
        engine, settings = split(proposal.config)
        if not self._fits(self.known.held, engine):
            self.known.close()
        start_celsius = self._cool_down(number)
        try:
            if self.control is not None:
                self.control.apply(settings)
            outcome = self._run(number, engine, log, self._reference(proposal))
        except ControlError as error:
            outcome = Result(error=str(error))
        if outcome.idle:
            self.known.idle_watts = outcome.idle.machine_watts
        self.known.measured = self.known.measured or bool(outcome.measurements)
        if outcome.refused and outcome.error and proposal.source == "default" and not self.known.measured:
            # Where the default is refused from the start, every other trial would be too.
            raise Refused(outcome.error)
        trial = Trial(
            number=number,
            config=proposal.config,
            proposal=proposal,
            measurements=outcome.measurements,
            error=outcome.error,
            log=tuple(last_lines(log)) if outcome.error is not None else (),
            effective=outcome.effective,
            seconds=time.monotonic() - started,
            load_seconds=outcome.load_seconds,
            started_unix=started_unix,
            segment=self.segment,
            warm_up=outcome.warm_up,
            idle=outcome.idle,
            start_celsius=start_celsius,
            spent=outcome.spent,
            load_energy=outcome.load_energy,
            reused=outcome.reused,
            figures=outcome.figures,
        )
        return within_limits(trial, self.limits, self._reference(proposal) is not None)

    def _reference(self, proposal: Proposal) -> Path | None:
        """Where the default's output is; None where quality is not asked for, or there is nothing to hold it against.

        Only the default makes that file: anything else would be held against itself, and lose nothing.
        """
        path = (self.folder / f"{REFERENCE}-{self.segment}").absolute()
        return path if self.target.quality and (proposal.source == "default" or path.exists()) else None

    def _fits(self, held: Held | None, engine: Config) -> bool:
        """Whether the engine that is held can be changed into `engine`; only the launcher of its kind may."""
        if held is None or not self.changeable:
            return False
        same = all(engine.get(name) == value for name, value in held.config.items() if name not in self.changeable)
        return same and not has_exited(held.worker) and held.launcher.plan == self.plan

    def _cool_down(self, number: int) -> dict[str, float]:
        """Wait until no device is warmer than before the first trial, so that each begins like the others.

        Returns the temperatures that the trial begins with, also where the time for it was over before.
        """
        give_up = time.monotonic() + (self.plan.cool_down_seconds or 0.0)
        with contextlib.closing(Sampler(self.meters, period=None)) as sampler:
            now = sampler.celsius()
            if self.known.celsius is None:
                self.known.celsius = now
            first = self.known.celsius
            while any(now[d] > first[d] + COOL_CELSIUS for d in now if d in first) and time.monotonic() < give_up:
                self.report(number, "cooling down")
                time.sleep(COOL_PERIOD_SECONDS)
                now = sampler.celsius()
        return now

    def _gpu_memory(self) -> int | None:
        if not WATCHES_GPUS.intersection(self.meters):
            return None
        from tuner.meters.nvml import used_memory_bytes

        return used_memory_bytes()

    def _wait_for_gpu_memory(self, number: int, before: int | None) -> None:
        """A dead process gives its GPU memory back a little later; the next engine must not find it taken."""
        give_up = time.monotonic() + RELEASE_SECONDS
        while before is not None and time.monotonic() < give_up:
            now = self._gpu_memory()
            if now is None or now <= before + RELEASE_SLACK_BYTES:
                return
            self.report(number, "waiting for GPU memory")
            time.sleep(TICK_SECONDS)

    def _run(self, number: int, config: Config, log: Path, reference: Path | None) -> Result:
        held = self.known.held
        killed_before = out_of_memory_kills()
        handed_on = held is not None
        if held is None:
            held = self._start(number, config, log, reference)
        else:
            self._hand_on(held, number, config, log, reference)
            held = replace(held, config=config, number=number)
        self.known.held = held
        # What is not held is ended; also where Ctrl-C comes in between.
        keep = False
        try:
            idle_seconds = self.idle_seconds_for(number)
            phase, in_time = self._watch(held, number, self._allowance(idle_seconds))
            result = self._result(held, number)
            keep = bool(self.changeable) and result is not None and result.error is None and in_time
            keep = keep and not has_exited(held.worker)
        finally:
            if not keep:
                self.known.held = None
                status, result = self.end(held)
        if not in_time and (result is None or result.error):
            return Result(
                error=f"took longer than {self.plan.timeout_seconds:g} s (phase: {phase}) and was ended;"
                " raise --timeout if that is its normal speed"
            )
        if result is not None:
            return judged(result)
        if handed_on and phase == STARTING:
            # It died before it looked at this job, so it says nothing of this configuration.
            return self._run(number, config, log, reference)
        lack_of_memory = out_of_memory_kills() > killed_before
        return Result(error=cause_of_death(status, phase, lack_of_memory=lack_of_memory))

    def _result(self, held: Held, number: int) -> Result | None:
        """What the worker left for this trial; None when it left nothing."""
        path = self._result_path(held, number)
        if not path.is_file():
            return None
        try:
            return msgspec.json.decode(path.read_bytes(), type=Result)
        except msgspec.MsgspecError as error:
            return Result(error=f"the runner reported what cannot be recorded: {error}")

    def _result_path(self, held: Held, number: int) -> Path:
        return Path(held.scratch.name) / f"result-{number}.json"

    def _job(
        self,
        scratch: Path,
        number: int,
        config: Config,
        reference: Path | None,
        *,
        phases: int,
        following: int | None,
    ) -> Path:
        """The file that tells a worker what to do."""
        path = scratch / f"job-{number}.json"
        path.write_bytes(
            msgspec.json.encode(
                Job(
                    runner=str(self.runner),
                    config=config,
                    target=self.target,
                    meters=self.meters,
                    meter_options=self.meter_options,
                    plan=self.plan,
                    result=str(scratch / f"result-{number}.json"),
                    phases=phases,
                    idle_seconds=self.idle_seconds_for(number),
                    idle_watts=self.known.idle_watts,
                    following=following,
                    reference=str(reference) if reference else None,
                )
            )
        )
        return path

    def _start(self, number: int, config: Config, log: Path, reference: Path | None) -> Held:
        """A worker on its first job."""
        used_memory = self._gpu_memory()
        scratch = tempfile.TemporaryDirectory(prefix="tune-", ignore_cleanup_errors=True)
        # Whatever an engine leaves among its temporary files goes with them, however it ends. The name is short because
        # sockets lie there, and the path of one has 107 characters at most.
        temporary = Path(scratch.name) / "t"
        ours: list[int] = []
        theirs: list[int] = []
        try:
            temporary.mkdir()
            for _ in range(2):
                end, other = os.pipe()
                ours.append(end)
                theirs.append(other)
            (phases, next_job), (phases_end, jobs) = ours, theirs
            # Of the second pipe the worker reads and this process writes.
            ours[1], theirs[1] = jobs, next_job
            following = next_job if self.changeable else None
            job = self._job(Path(scratch.name), number, config, reference, phases=phases_end, following=following)
            with log.open("wb") as output:
                # -P: a folder named `tuner` where the person stands must not become the worker.
                worker = subprocess.Popen(
                    [sys.executable, "-P", "-m", "tuner.worker", str(job), scratch.name],
                    env={**os.environ, "TMPDIR": str(temporary)},
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=tuple(theirs),
                    start_new_session=True,
                )
        except BaseException:
            for descriptor in ours:
                os.close(descriptor)
            scratch.cleanup()
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        return Held(
            worker=worker,
            launcher=self,
            config=config,
            phases=phases,
            jobs=jobs,
            scratch=scratch,
            log=log,
            used_memory=used_memory,
            number=number,
        )

    def _hand_on(self, held: Held, number: int, config: Config, log: Path, reference: Path | None) -> None:
        """Give a held worker its next job. Its log stays where it began; the trial's own says where."""
        (self._result_path(held, number)).unlink(missing_ok=True)
        # The worker keeps to the pipes that it has.
        job = self._job(Path(held.scratch.name), number, config, reference, phases=-1, following=None)
        log.write_text(f"measured on the engine that was started for {held.log}\n", encoding="utf-8")
        # The worker may have died meanwhile: then its exit status says why.
        with contextlib.suppress(BrokenPipeError):
            os.write(held.jobs, f"{job}\n".encode())

    def end(self, held: Held) -> tuple[int, Result | None]:
        """End a worker and its engine, and wait until its GPU memory is back.

        Returns the worker's exit status, and what it left for its last trial.
        """
        try:
            os.close(held.jobs)
            status = end_group(
                held.worker,
                held.phases,
                # One that has left its result stops its engine by itself, once no other job can come.
                leaving=self._result_path(held, held.number).is_file(),
                waiting=lambda: self.report(held.number, "stopping the engine"),
            )
            return status, self._result(held, held.number)
        finally:
            os.close(held.phases)
            held.scratch.cleanup()
            self._wait_for_gpu_memory(held.number, held.used_memory)

    def _allowance(self, idle_seconds: float) -> float:
        """What measuring idle power takes: two windows, the wait before the second, and the warm-up after it."""
        if not idle_seconds:
            return 0.0
        _, most = self.plan.warm_up_seconds or (0.0, 0.0)
        return 2 * idle_seconds + settling_seconds(idle_seconds) + most

    def _watch(self, held: Held, number: int, idle_seconds: float) -> tuple[str, bool]:
        """Follow the worker until its trial is over. Returns its last phase and whether it was in time.

        The time in which the engine is told to wait is not held against it, and neither is that in which it is stopped.
        """
        deadline = time.monotonic() + self.plan.timeout_seconds + idle_seconds
        phase = STARTING
        done = self._result_path(held, number)
        with selectors.DefaultSelector() as selector:
            selector.register(held.phases, selectors.EVENT_READ)
            while not has_exited(held.worker):
                if phase == STOPPING or done.is_file():
                    return phase, True
                if time.monotonic() > deadline:
                    return phase, False
                self.report(number, phase)
                if not selector.get_map():
                    time.sleep(TICK_SECONDS)
                    continue
                for _ in selector.select(TICK_SECONDS):
                    told = os.read(held.phases, 4096).decode(errors="replace").splitlines()
                    if told:
                        phase = told[-1]
                    else:
                        # End of file: the worker is on its way out, wait for its exit without spinning.
                        selector.unregister(held.phases)
        return phase, True


def within_limits(trial: Trial, limits: Sequence[Limit], judged_by_default: bool) -> Trial:
    """The trial, as failed where it breaks a limit; its windows stay as they were measured.

    `judged_by_default`: the default's output is there, so that a limit on quality can be judged.

    Raises:
        RefusedForGood: a limit is set on a figure that this engine does not report, so that nothing could keep to it.
    """
    if trial.error is not None or not limits:
        return trial
    metrics = trial.metrics
    on_quality = next((limit for limit in limits if limit.column == QUALITY_LOSS), None)
    if on_quality and not judged_by_default:
        return replace(
            trial, error=f"{on_quality} cannot be judged: the default has put nothing out to hold it against"
        )
    if unknown := next((limit for limit in limits if limit.column not in metrics), None):
        raise RefusedForGood(
            f"--limit {unknown}: this engine reports no {unknown.column}{closest(unknown.column, list(metrics))}"
            f" (it reports {', '.join(metrics) or 'nothing'}); start again with a limit on one of these"
        )
    fault = broken(limits, metrics)
    return trial if fault is None else replace(trial, error=fault, over_limit=True)


def trial_folder(folder: Path, number: int) -> Path:
    """`trials/0007` of a study, made when it is not there."""
    path = folder / "trials" / f"{number:04d}"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JournalError(
            f"{path}: {error.strerror}; finished trials are kept. Mend that, then go on with"
            f" `tune run --resume {folder}`"
        ) from error
    return path


def has_exited(worker: subprocess.Popen[bytes]) -> bool:
    """Whether the worker has exited, leaving it unreaped: until then its group's number cannot be reused."""
    return os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end_group(
    worker: subprocess.Popen[bytes],
    phases: int,
    *,
    leaving: bool = False,
    waiting: Callable[[], None] = lambda: None,
) -> int:
    """Let the worker stop its engine, end what is left of its process group, and return the worker's exit status.

    Args:
        worker: leads the group.
        phases: the end of the pipe that it tells its phases through.
        leaving: whether it ends by itself, and need not be asked to.
        waiting: called again and again once it takes longer.

    The first Ctrl-C since the trial began does not cut this short, a second one does; neither leaves the group behind.
    """
    started, patience = time.monotonic(), LEAVE_SECONDS if leaving else GRACE_SECONDS
    os.set_blocking(phases, False)

    def see_out() -> None:
        nonlocal patience
        while not has_exited(worker) and time.monotonic() < started + patience:
            with contextlib.suppress(BlockingIOError):
                if STOPPING in os.read(phases, 1 << 16).decode(errors="replace").splitlines():
                    patience = LEAVE_SECONDS
            if time.monotonic() > started + SILENT_SECONDS:
                waiting()
            time.sleep(0.02)

    try:
        if not leaving:
            _signal_group(worker, signal.SIGTERM)
        # Where an interruption is what brought the caller here, the next one is the second.
        interrupted = _interrupts(sys.exc_info()[1])
        try:
            see_out()
        except BaseException as leaves:
            if interrupted or not _interrupts(leaves):
                raise
            see_out()
            raise
    finally:
        _signal_group(worker, signal.SIGKILL)
        if worker.stdin:
            worker.stdin.close()
        status = worker.wait()
    return status


def _interrupts(error: BaseException | None) -> bool:
    """Whether a person or a signal is behind it, and no failure."""
    return error is not None and not isinstance(error, Exception)


def _signal_group(worker: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, number)


def judged(result: Result) -> Result:
    """A result with no valid window is a failure, whose cause is that of its windows."""
    if result.error is None and not any(m.valid for m in result.measurements):
        causes = grouped(c for m in result.measurements for c in m.invalid)
        return replace(result, error=f"{NO_VALID_WINDOW} in {len(result.measurements)}: {'; '.join(causes)}")
    return result


def cause_of_death(status: int, phase: str, *, lack_of_memory: bool) -> str:
    """Why a worker ended without a result, from its exit status (negative: the signal's number)."""
    if status >= 0:
        return f"the engine ended its process with exit status {status} (phase: {phase})"
    name = signal_name(-status)
    if lack_of_memory and name == "SIGKILL":
        return f"out of memory: the kernel killed the engine (SIGKILL, phase: {phase})"
    meaning = {
        "SIGSEGV": " (it crashed)",
        "SIGABRT": " (it gave up: see the log)",
        "SIGILL": " (built for another CPU)",
        "SIGBUS": " (it crashed, or the disk is full)",
    }.get(name, "")
    return f"the engine was killed by {name}{meaning} (phase: {phase})"


def last_lines(log: Path, lines: int = LOG_LINES) -> Iterator[str]:
    """The end of an engine's log, printable and cut to a sensible width."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 64 * 1024))
            text = file.read().decode(errors="replace")
    except OSError:
        return
    for line in text.splitlines()[-lines:]:
        yield "".join(c if c.isprintable() else " " for c in line)[:LOG_LINE_LENGTH].rstrip()
