"""GPU power limit and locked SM clock as parameters, and the promise to put back what was there.

Both need root, and both outlive the program that set them. So nothing is changed before three things
stand: a lock on each GPU, which keeps a second tuner away; a ledger on the disk, which says what must be
put back; and a watchdog, a process that puts it back when this one is killed. The lock belongs to both
processes and is free when the last of them has ended. Where both were killed, the next start puts back
what the ledger says, and so does `tune restore`.

Put back is the limit that was observed, which need not be the device's default, and only where the limit
is still the one that tune set: what somebody else has set meanwhile stays. NVML has no getter for a
locked clock, so a clock can only be unlocked, and a GPU that looks locked already is refused.

Glossary
    observed   the power limit before tune's first change, to the milliwatt
    ledger     `power/<uuid>.json` in the state folder; there exactly as long as something may have to be put back
    watchdog   waits at a pipe whose other end the tuner alone holds: the end of the file is the tuner's death
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import msgspec

from tuner.files import state_folder
from tuner.meters import Unavailable
from tuner.meters.nvml import FAULTS, NvmlMeter, library
from tuner.space import Choice, Config, Int, Parameter, Refused, Value

POWER = "gpu_power_limit_w"
CLOCK = "gpu_sm_clock_mhz"
AUTO = "auto"
"""The clock is not locked."""

MOST_CLOCKS = 12
"""Values of the clock that are offered, of the hundred or so that a GPU supports."""

TOLERANCE_MILLIWATTS = 1000
"""Limits closer than this are the same: the parameter counts watts, and a driver may round what it is given."""

TOLERANCE_MHZ = 30
"""Two of the 15 MHz steps in which NVIDIA's clocks are supported."""

READ_BACK_SECONDS = 1.0
"""A setting that a GPU does not report after this long was not taken."""

LOCK_SECONDS = 3.0
"""How long a GPU is waited for: a watchdog at its work holds it for a moment."""

WATCHDOG_SECONDS = 30.0
"""A watchdog that has not ended so long after its pipe did is stuck in the driver."""

READINGS = 5
READING_SECONDS = 0.1
"""How often, and how far apart, a GPU is looked at to see whether its clock is locked."""

CLOCKS_SETTING = 0x2
"""`nvmlClocksEventReasonApplicationsClocksSetting`: a setting holds the clock (nvml.h)."""

_AS_ROOT = 'sudo -E env "PATH=$PATH" tune'
"""-E keeps CUDA_VISIBLE_DEVICES and keys; sudo would look for programs in a PATH of its own."""

_FAULTS = {name: reason for name, (reason, _) in FAULTS.items()} | {
    "NO_PERMISSION": "only root may do that (in a container: docker run --cap-add SYS_ADMIN)",
    "NOT_SUPPORTED": "this GPU does not support it",
    "FUNCTION_NOT_FOUND": "the NVIDIA driver is too old for it",
    "INVALID_ARGUMENT": "the driver does not take this value",
    "NOT_FOUND": "this machine has no such GPU",
}
"""What an `NVML_ERROR_*` means where something is set."""

Say = Callable[[str], None]


class ControlError(Exception):
    """A GPU does not do what it was asked, or what was asked could not be noted down first; one sentence."""

    fault: str = ""
    """The name of the `NVML_ERROR_*` behind it, if there is one."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What has to be put back on one GPU. On the disk before the change that it speaks of."""

    format: int = 1
    uuid: str
    model: str
    observed_milliwatts: int | None
    """None where the power limit is not tuned."""
    set_milliwatts: tuple[int, ...] = ()
    """The limits of which the device may have one now because of tune: the last one, and the next. Empty: none."""
    clock_locked: bool = False
    """Whether tune has locked the clock, or is about to."""
    persistence: bool | None = None
    """Whether the driver stays loaded when nobody uses the GPU; None where it does not say."""
    pid: int
    started_unix: float

    def __str__(self) -> str:
        return f"{self.model} ({self.uuid})"


# --- what may be tuned -----------------------------------------------------------------------


def knobs(say: Say = lambda _: None) -> tuple[Parameter, ...]:
    """The power limit and the clock, with the values that all visible GPUs support.

    What a killed run has left changed on them is put back first, because the default is the limit that is
    observed. A knob that a GPU lacks is left out, and said to be.

    Raises:
        Refused: no GPU, no knob at all, GPUs with different limits, or a GPU that another tuner holds.
    """
    with _driver() as nvml:
        boards = _visible(nvml)
        for board in boards:
            if _ledger_path(board.uuid).exists():
                descriptor = _take(board.uuid)
                try:
                    _settle_stale(nvml, board.uuid, say)
                finally:
                    os.close(descriptor)
        found: list[Parameter] = []
        lacking = []
        for make in (_power_knob, _clock_knob):
            try:
                found.append(make(boards))
            except ControlError as error:
                if error.fault != "NOT_SUPPORTED":
                    raise
                lacking.append(str(error))
        if not found:
            raise Refused(f"{'; '.join(lacking)}; leave --allow-power-control out")
        for sentence in lacking:
            say(f"not tuned: {sentence}")
        return tuple(found)


def split(config: Mapping[str, Value]) -> tuple[Config, Config]:
    """What the engine gets to see, and what is set on the GPUs."""
    control = {name: value for name, value in config.items() if name in (POWER, CLOCK)}
    return {name: value for name, value in config.items() if name not in control}, control


def commands(config: Mapping[str, Value], uuids: Iterable[str]) -> list[str]:
    """What a person types to set these GPUs as `config` says, for good; nothing for what it leaves out."""
    gpus = ",".join(uuids)
    typed = []
    if POWER in config:
        typed.append(f"sudo nvidia-smi -i {gpus} -pl {config[POWER]}")
    if config.get(CLOCK, AUTO) != AUTO:
        typed.append(f"sudo nvidia-smi -i {gpus} -lgc {config[CLOCK]},{config[CLOCK]}")
    return typed


def _power_knob(boards: Sequence[Board]) -> Int:
    ranges = [b.do("read the range of its power limit", "nvmlDeviceGetPowerManagementLimitConstraints") for b in boards]
    low = max(math.ceil(least / 1000) for least, _ in ranges)
    high = min(math.floor(largest / 1000) for _, largest in ranges)
    if low > high:
        each = ", ".join(
            f"{least / 1000:g} to {largest / 1000:g} W on {board}"
            for board, (least, largest) in zip(boards, ranges, strict=True)
        )
        raise Refused(f"no power limit suits all GPUs ({each}); let CUDA_VISIBLE_DEVICES show GPUs of one model")
    observed = {board: round(board.limit() / 1000) for board in boards}
    if len(set(observed.values())) > 1:
        each = ", ".join(f"{watts} W on {board}" for board, watts in observed.items())
        raise Refused(
            f"the GPUs have different power limits ({each}), so there is no default for all of them;"
            f" give them one limit: sudo nvidia-smi -i {','.join(b.uuid for b in boards)} -pl {max(observed.values())}"
        )
    return Int(
        name=POWER,
        meaning="the most that the GPU may draw, in watts; it lowers its clock to keep to it",
        default=min(max(observed[boards[0]], low), high),
        low=low,
        high=high,
        scope="live",
        effect="exact",
        lever="power",
    )


def _clock_knob(boards: Sequence[Board]) -> Choice:
    clocks = sorted(set.intersection(*(set(board.clocks()) for board in boards)))
    if not clocks:
        raise Refused("no SM clock is supported by all GPUs; let CUDA_VISIBLE_DEVICES show GPUs of one model")
    return Choice(
        name=CLOCK,
        meaning="the SM clock that the GPU is locked to, in MHz; auto lets it clock as high as it can",
        default=AUTO,
        # Unlocked, a GPU goes to its largest clock when it can: `auto` is the upper end of the scale.
        values=(*spread(clocks, MOST_CLOCKS), AUTO),
        ordered=True,
        scope="live",
        effect="exact",
        lever="clock",
    )


def spread(values: Sequence[int], most: int) -> tuple[int, ...]:
    """At most so many of `values`, evenly spaced, both ends among them."""
    if len(values) <= most:
        return tuple(values)
    return tuple(values[round(i * (len(values) - 1) / (most - 1))] for i in range(most))


# --- one GPU ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Board:
    """One GPU, as the driver gives access to it."""

    nvml: ModuleType = field(repr=False, compare=False)
    handle: Any = field(repr=False, compare=False)
    uuid: str
    model: str

    def __str__(self) -> str:
        return f"{self.model} ({self.uuid})"

    def do(self, what: str, function: str, *arguments: int) -> Any:
        """What `function` of NVML returns. Raises `ControlError`: the GPU, what it does not do, and why."""
        try:
            return getattr(self.nvml, function)(self.handle, *arguments)
        except self.nvml.NVMLError as error:
            raise _control_error(self.nvml, f"{self}: cannot {what}", error) from error

    def ask(self, function: str, *arguments: int) -> Any:
        """What the driver answers, or None: for what may be absent."""
        try:
            return getattr(self.nvml, function)(self.handle, *arguments)
        except self.nvml.NVMLError:
            return None

    def limit(self) -> int:
        """The power limit that is set, in milliwatts."""
        return int(self.do("read its power limit", "nvmlDeviceGetPowerManagementLimit"))

    def set_limit(self, milliwatts: int) -> None:
        self.do(f"set its power limit to {milliwatts / 1000:g} W", "nvmlDeviceSetPowerManagementLimit", milliwatts)

    def clocks(self) -> list[int]:
        """The SM clocks that go with the fastest memory clock, in MHz."""
        what = "list its clocks"
        fastest = max(self.do(what, "nvmlDeviceGetSupportedMemoryClocks"), default=0)
        return [int(mhz) for mhz in self.do(what, "nvmlDeviceGetSupportedGraphicsClocks", fastest)]

    def lock_clock(self, mhz: int) -> None:
        self.do(f"lock its SM clock at {mhz} MHz", "nvmlDeviceSetGpuLockedClocks", mhz, mhz)

    def unlock_clock(self) -> None:
        self.do("unlock its SM clock", "nvmlDeviceResetGpuLockedClocks")

    def held_clock(self) -> int | None:
        """The clock at which something seems to hold this GPU, in MHz; None when nothing speaks for it.

        NVML cannot be asked whether a clock is locked. But a locked GPU keeps its clock also when nothing
        runs (`nvidia-smi --help`, --lock-gpu-clocks), and then it does not say that it is idle
        (JuliaGPU/CUDA.jl#2194). So: the same clock in all readings, neither the largest nor the least one,
        not an application clock, where a waking GPU rests (NVIDIA/k8s-device-plugin#110); and every time
        the driver either says that a setting holds it, or gives no reason at all on a GPU with nothing to do.

        A lock at the largest clock, a range, and a lock on a busy GPU pass unseen.
        """
        nvml = self.nvml
        clocks = self.clocks()
        resting = {
            self.ask(f"nvmlDeviceGet{kind}ApplicationsClock", nvml.NVML_CLOCK_GRAPHICS) for kind in ("", "Default")
        }
        seen = set()
        for reading in range(READINGS):
            time.sleep(READING_SECONDS if reading else 0)
            reasons = self.ask("nvmlDeviceGetCurrentClocksEventReasons")
            if reasons is None:
                # The name it had before driver 535.
                reasons = self.ask("nvmlDeviceGetCurrentClocksThrottleReasons")
            if reasons is None or not (reasons & CLOCKS_SETTING or (reasons == 0 and self._has_nothing_to_do())):
                return None
            seen.add(self.ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM))
        clock = seen.pop() if len(seen) == 1 else None
        return clock if clock is not None and min(clocks) < clock < max(clocks) and clock not in resting else None

    def _has_nothing_to_do(self) -> bool:
        rates = self.ask("nvmlDeviceGetUtilizationRates")
        return rates is not None and rates.gpu == 0 and self.ask("nvmlDeviceGetComputeRunningProcesses") == []


@contextlib.contextmanager
def _driver() -> Iterator[ModuleType]:
    """NVML, open. What goes wrong inside is refused with the next step."""
    try:
        nvml = library()
    except Unavailable as error:
        raise Refused(f"{error.reason}; {error.remedy}") from error
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise Refused(str(_control_error(nvml, "power control", error))) from error
    try:
        yield nvml
    except ControlError as error:
        raise _refused(error) from error
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _visible(nvml: ModuleType) -> list[Board]:
    """The GPUs that the engine will use, `gpu0` first: those that the meter counts."""
    try:
        with contextlib.closing(NvmlMeter()) as meter:
            gpus = list(meter.gpus.values())
    except Unavailable as error:
        raise Refused(f"power control: {error.reason}; {error.remedy}") from error
    return [_board(nvml, gpu.uuid, gpu.model) for gpu in gpus]


def _board(nvml: ModuleType, uuid: str, model: str) -> Board:
    try:
        return Board(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid), uuid, model)
    except nvml.NVMLError as error:
        raise _control_error(nvml, f"{model} ({uuid})", error) from error


def _control_error(nvml: ModuleType, what: str, error: Exception) -> ControlError:
    code = getattr(error, "value", None)
    fault = next((name for name in _FAULTS if getattr(nvml, f"NVML_ERROR_{name}", None) == code), "")
    found = ControlError(f"{what}: {_FAULTS.get(fault) or f'NVML reports: {error}'}")
    found.fault = fault
    return found


def _refused(error: ControlError) -> Refused:
    step = "leave --allow-power-control out"
    if error.fault == "NO_PERMISSION":
        step = f"type: {_AS_ROOT} run ... --allow-power-control, or {step}"
    elif error.fault == "NOT_SUPPORTED" and "clock" in str(error):
        step = f"--pin {CLOCK}={AUTO} tunes the power limit alone"
    return Refused(f"{error}; {step}")


# --- what must be put back -------------------------------------------------------------------


def pending() -> list[str]:
    """A sentence for each GPU that a killed run has left changed. Cheap: the driver is not asked."""
    return [
        f"{_name(path)}: a run that was killed may have left its power limit or clock changed; the next"
        " `tune run --allow-power-control` puts them back, and so does `tune restore`"
        for path in _ledgers()
        if not _is_held(path.stem)
    ]


def held() -> list[str]:
    """A sentence for each GPU whose power or clock another tuner is changing right now."""
    try:
        locks = sorted(_folder().glob("*.lock"))
    except (OSError, Refused):
        return []
    return [
        f"another tune changes power and clock of {path.stem} at this moment: what is measured on it means nothing"
        for path in locks
        if _is_held(path.stem)
    ]


def restore(say: Say) -> list[str]:
    """Put back what killed runs have left changed, on every GPU of which there is a ledger.

    Says, and returns, a sentence for each GPU; also when there is nothing to do.

    Raises:
        Refused: after all others were put back: each GPU that is still being tuned, and by whom, and each
            that could not be put back, and what to type.
    """
    told: list[str] = []

    def tell(sentence: str) -> None:
        told.append(sentence)
        say(sentence)

    paths = _ledgers()
    if not paths:
        tell("nothing to put back: no run has left a GPU's power limit or clock changed")
        return told
    faults = []
    with _driver() as nvml:
        for path in paths:
            try:
                descriptor = _take(path.stem)
                try:
                    _settle_stale(nvml, path.stem, tell)
                finally:
                    os.close(descriptor)
            except (Refused, ControlError) as error:
                faults.append(str(error))
    if faults:
        raise Refused("; ".join(faults))
    return told


def _folder() -> Path:
    return state_folder() / "power"


def _ledger_path(uuid: str) -> Path:
    return _folder() / f"{uuid}.json"


def _ledgers() -> list[Path]:
    try:
        return sorted(path for path in _folder().iterdir() if path.suffix == ".json")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _no_folder(error) from error


def _no_folder(error: OSError) -> Refused:
    return Refused(
        f"{error.filename or _folder()}: {_cause(error)}; the records of what must be put back are kept there:"
        " make it writable, or export TUNE_STATE=FOLDER"
    )


def _cause(error: OSError) -> str:
    return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror)


def _take(uuid: str) -> int:
    """The lock of this GPU, as an open file that holds it.

    Raises:
        Refused: another tuner has it, or it cannot be made.
    """
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        descriptor = os.open(_folder() / f"{uuid}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _no_folder(error) from error
    give_up = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < give_up:
                time.sleep(0.05)
                continue
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            os.close(descriptor)
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise Refused(f"{uuid}: {who} is tuning this GPU; wait for it, or stop it first") from None
        except BaseException:
            os.close(descriptor)
            raise
        _sign(descriptor)
        return descriptor


def _sign(descriptor: int) -> None:
    """Leave this process's number in a lock that it holds, for those who find it taken."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)


def _is_held(uuid: str) -> bool:
    try:
        with (_folder() / f"{uuid}.lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _write(ledger: Ledger) -> None:
    """The ledger is on the disk, whole, before this returns. Raises `ControlError`."""
    path = _ledger_path(ledger.uuid)
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(msgspec.json.encode(ledger) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder()
    except OSError as error:
        raise ControlError(
            f"{path}: {_cause(error)}; without this record nothing was changed on {ledger}:"
            " mend that, or export TUNE_STATE=FOLDER"
        ) from error


def _sync_folder() -> None:
    descriptor = os.open(_folder(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _recorded(uuid: str) -> Ledger:
    path = _ledger_path(uuid)
    try:
        ledger = msgspec.json.decode(path.read_bytes(), type=Ledger)
        if (ledger.format, ledger.uuid) != (1, uuid):
            raise msgspec.ValidationError(f"it is of format {ledger.format} and about {ledger.uuid}")
    except (OSError, msgspec.MsgspecError) as error:
        raise Refused(
            f"{path}: cannot be read ({error}), so it is not known what was there before; look with"
            f" `nvidia-smi -i {uuid} -q -d POWER,CLOCK`, set it with `sudo nvidia-smi -i {uuid} -pl WATTS` and"
            f" `sudo nvidia-smi -i {uuid} -rgc`, then `rm {path}`"
        ) from error
    return ledger


def _name(path: Path) -> str:
    with contextlib.suppress(Refused):
        return str(_recorded(path.stem))
    return path.stem


def _settle_stale(nvml: ModuleType, uuid: str, say: Say) -> None:
    """Put back what a run that is gone has left on the GPU whose lock is held. Raises `Refused`, `ControlError`."""
    if not _ledger_path(uuid).exists():
        say(f"{uuid}: was put back meanwhile")
        return
    ledger = _recorded(uuid)
    for sentence in _settle(nvml, ledger) or [f"{ledger}: nothing had been changed yet"]:
        say(f"after a run that was killed (process {ledger.pid}): {sentence}")


def _settle(nvml: ModuleType, ledger: Ledger) -> list[str]:
    """Put back what `ledger` says, then delete it. Returns what was done.

    Raises:
        ControlError: part of it failed; the ledger is kept, and the sentence says what to type.
    """
    told, faults = [], []
    try:
        board = _board(nvml, ledger.uuid, ledger.model)
        for undo in (_put_limit_back, _put_clock_back):
            try:
                told += undo(board, ledger)
            except ControlError as error:
                faults.append(str(error))
    except ControlError as error:
        faults.append(str(error))
    if faults:
        raise ControlError("; ".join([*told, *faults, _by_hand(ledger)]))
    path = _ledger_path(ledger.uuid)
    try:
        path.unlink(missing_ok=True)
        _sync_folder()
    except OSError as error:
        raise ControlError("; ".join([*told, f"{path}: {_cause(error)}; delete it: sudo rm {path}"])) from error
    return told


def _put_limit_back(board: Board, ledger: Ledger) -> list[str]:
    observed = ledger.observed_milliwatts
    if observed is None or not ledger.set_milliwatts:
        return []
    present = board.limit()
    if present == observed:
        return []
    if not _near(present, *ledger.set_milliwatts):
        before = f"before tune it was {observed / 1000:g} W"
        return [f"{board}: its power limit is {present / 1000:g} W, which tune did not set, so it stays ({before})"]
    board.set_limit(observed)
    after = board.limit()
    if not _near(after, observed):
        raise ControlError(f"{board}: its power limit was set to {observed / 1000:g} W and reads {after / 1000:g} W")
    return [f"{board}: its power limit is back at {observed / 1000:g} W"]


def _put_clock_back(board: Board, ledger: Ledger) -> list[str]:
    if not ledger.clock_locked:
        return []
    board.unlock_clock()
    return [f"{board}: its clock is unlocked"]


def _by_hand(ledger: Ledger) -> str:
    typed = []
    if ledger.observed_milliwatts is not None and ledger.set_milliwatts:
        typed.append(f"`sudo nvidia-smi -i {ledger.uuid} -pl {ledger.observed_milliwatts / 1000:g}`")
    if ledger.clock_locked:
        typed.append(f"`sudo nvidia-smi -i {ledger.uuid} -rgc`")
    return f"to put it back, `{_AS_ROOT} restore`" + (f", or by hand {' and '.join(typed)}" if typed else "")


def _near(milliwatts: int, *limits: int) -> bool:
    return any(abs(milliwatts - limit) < TOLERANCE_MILLIWATTS for limit in limits)


# --- the tuner -------------------------------------------------------------------------------


class PowerControl:
    """Holds the visible GPUs, sets them, and puts them back at its end, however that comes.

    Args:
        parameters: what is tuned, of `knobs`; other parameters are ignored.
        say: told what a person should know, and what was put back.

    Entering raises `Refused`: another tuner, no rights, a clock that looks locked, no place for the ledger.
    """

    def __init__(self, parameters: Iterable[Parameter], say: Say) -> None:
        chosen = {p.name: p for p in parameters}
        clock = chosen.get(CLOCK)
        self._power = POWER in chosen
        self._clock = clock is not None and (clock.size > 1 or clock.default != AUTO)
        self._say = say
        self.observed: dict[str, str] = {}
        """Each GPU, as `gpu0`, with its UUID and what it was set to before the first change; for the record."""
        self._boards: list[Board] = []
        self._locks: dict[str, int] = {}
        self._ledgers: dict[str, Ledger] = {}
        self._clocks: dict[str, Value] = {}
        """What the clock of each GPU is set to; absent while that is not known."""
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._pipe = -1
        self._told: list[str] = []
        self._open = contextlib.ExitStack()
        self._closing = threading.Lock()

    @property
    def uuids(self) -> tuple[str, ...]:
        """The GPUs that are held, in CUDA's order."""
        return tuple(board.uuid for board in self._boards)

    def __enter__(self) -> Self:
        try:
            self._start()
        except ControlError as error:
            self._close()
            raise _refused(error) from error
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close()
        except BaseException:
            # A signal may have come before anything was put back.
            self._close()
            raise

    def apply(self, config: Mapping[str, Value]) -> None:
        """Set every GPU to what `config` says of the power limit and the clock. What it leaves out stays.

        Raises:
            ControlError: a GPU does not take it, somebody else has set it, or the disk takes no record.
        """
        if self._watchdog is not None and self._watchdog.poll() is not None:
            self._say("the process that puts the GPUs back if this one is killed has ended; starting another")
            self._start_watchdog()
        for board in self._boards:
            if self._power and POWER in config:
                self._apply_limit(board, int(config[POWER]))
            if self._clock and CLOCK in config:
                self._apply_clock(board, config[CLOCK])

    def _apply_limit(self, board: Board, watts: int) -> None:
        ledger = self._ledgers[board.uuid]
        observed = ledger.observed_milliwatts
        assert observed is not None
        present = board.limit()
        if not _near(present, *(ledger.set_milliwatts or (observed,))):
            raise ControlError(
                f"{board}: its power limit is {present / 1000:g} W, which tune did not set: somebody else did,"
                " or the driver was loaded anew; end that, then start again"
            )
        # The default stands for what was observed, which need not be whole watts.
        wanted = observed if _near(1000 * watts, observed) else 1000 * watts
        if present == wanted:
            return
        self._note(replace(ledger, set_milliwatts=(present, wanted)))
        board.set_limit(wanted)
        self._read_back(
            lambda: int(board.do("read the limit that it keeps to", "nvmlDeviceGetEnforcedPowerLimit")),
            lambda enforced: _near(enforced, wanted),
            lambda enforced: (
                f"{board}: its power limit was set to {wanted / 1000:g} W, it keeps to {enforced / 1000:g} W"
            ),
        )
        self._ledgers[board.uuid] = replace(self._ledgers[board.uuid], set_milliwatts=(wanted,))

    def _apply_clock(self, board: Board, clock: Value) -> None:
        if self._clocks.get(board.uuid) == clock:
            return
        self._clocks.pop(board.uuid, None)
        if clock == AUTO:
            board.unlock_clock()
        else:
            mhz = int(clock)
            self._note(replace(self._ledgers[board.uuid], clock_locked=True))
            board.lock_clock(mhz)
            # Below the lock it may be, for power or heat; above it is not locked.
            self._read_back(
                lambda: int(board.do("read its SM clock", "nvmlDeviceGetClockInfo", board.nvml.NVML_CLOCK_SM)),
                lambda present: present <= mhz + TOLERANCE_MHZ,
                lambda present: f"{board}: its SM clock was locked at {mhz} MHz, it runs at {present} MHz",
            )
        self._clocks[board.uuid] = clock

    def _read_back(self, read: Callable[[], int], fits: Callable[[int], bool], fault: Callable[[int], str]) -> None:
        give_up = time.monotonic() + READ_BACK_SECONDS
        while not fits(value := read()):
            if time.monotonic() > give_up:
                raise ControlError(fault(value))
            time.sleep(0.05)

    # --- beginning and end ---

    def _start(self) -> None:
        nvml = self._open.enter_context(_driver())
        self._boards = _visible(nvml)
        for board in self._boards:
            self._locks[board.uuid] = _take(board.uuid)
            self._open.callback(os.close, self._locks[board.uuid])
        for board in self._boards:
            if _ledger_path(board.uuid).exists():
                _settle_stale(nvml, board.uuid, self._say)
            if self._clock and (clock := board.held_clock()) is not None:
                raise Refused(
                    f"{board}: its clock looks locked at {clock} MHz already, and a lock cannot be read, so it"
                    f" could not be put back; unlock it: sudo nvidia-smi -i {board.uuid} -rgc,"
                    f" or leave it alone: --pin {CLOCK}={AUTO}"
                )
        self._open.callback(self._dismiss_watchdog)
        self._start_watchdog()
        self._open.callback(self._put_back, nvml)
        for number, board in enumerate(self._boards):
            self._observe(f"gpu{number}", board)
        for board in self._boards:
            self._check_rights(board)
        loose = [str(board) for board in self._boards if self._ledgers[board.uuid].persistence is False]
        if loose:
            self._say(
                f"persistence mode is off on {', '.join(loose)}: when nothing uses the GPU its driver unloads, and"
                " a power limit or locked clock is gone with it; sudo nvidia-smi -pm 1 keeps it loaded"
            )

    def _observe(self, domain: str, board: Board) -> None:
        mode = board.ask("nvmlDeviceGetPersistenceMode")
        ledger = Ledger(
            uuid=board.uuid,
            model=board.model,
            observed_milliwatts=board.limit() if self._power else None,
            persistence=None if mode is None else bool(mode),
            pid=os.getpid(),
            started_unix=time.time(),
        )
        self._note(ledger)
        facts = [str(board)]
        if ledger.observed_milliwatts is not None:
            facts.append(f"power limit {ledger.observed_milliwatts / 1000:g} W")
        if self._clock:
            facts.append("clock not locked")
        if mode is not None:
            facts.append(f"persistence mode {'on' if mode else 'off'}")
        self.observed[domain] = ", ".join(facts)

    def _check_rights(self, board: Board) -> None:
        """Set what is there already: the driver refuses that too where nothing may be set."""
        observed = self._ledgers[board.uuid].observed_milliwatts
        if observed is not None:
            board.set_limit(observed)
        if self._clock:
            # Also makes sure that `auto` is what it says, and that clocks can be locked here at all.
            board.unlock_clock()
            self._clocks[board.uuid] = AUTO

    def _note(self, ledger: Ledger) -> None:
        self._ledgers[ledger.uuid] = ledger
        _write(ledger)

    def _put_back(self, nvml: ModuleType) -> None:
        for ledger in self._ledgers.values():
            try:
                self._told += _settle(nvml, ledger)
            except ControlError as error:
                self._told.append(str(error))

    def _close(self) -> None:
        """Put everything back and let go of it. Signals wait until that is done, however many come.

        It is done in a thread, because Python's signal handlers, and what they raise, run in the main one.
        """
        done = threading.Event()
        raised: list[BaseException] = []

        def close() -> None:
            try:
                with self._closing:
                    self._open.close()
            except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that asked
                raised.append(error)
            finally:
                done.set()

        threading.Thread(target=close, name="put back").start()
        while not done.is_set():
            try:
                done.wait()
            except BaseException as error:  # noqa: BLE001 - raised again below, when all is put back
                raised.append(error)
        while self._told:
            self._say(self._told.pop(0))
        if raised:
            raise raised[0]

    def _start_watchdog(self) -> None:
        self._dismiss_watchdog()
        pipe, self._pipe = os.pipe()
        locks = [f"{uuid}={descriptor}" for uuid, descriptor in self._locks.items()]
        try:
            # -P: a folder named `tuner` where the person stands must not become the watchdog.
            self._watchdog = subprocess.Popen(
                [sys.executable, "-P", "-m", "tuner.control", str(state_folder()), str(pipe), *locks],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=(pipe, *self._locks.values()),
                start_new_session=True,
            )
        except OSError as error:
            raise ControlError(f"the process that watches over the GPUs did not start ({error.strerror})") from error
        finally:
            os.close(pipe)
        assert self._watchdog.stdout is not None
        with self._watchdog.stdout as answer:
            if answer.readline() != b"ready\n":
                raise ControlError("the process that watches over the GPUs did not start; nothing was changed")

    def _dismiss_watchdog(self) -> None:
        """The end of its pipe: it looks whether a ledger is left, tries once more if so, and ends."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        if self._watchdog is not None:
            try:
                self._watchdog.wait(WATCHDOG_SECONDS)
            except subprocess.TimeoutExpired:
                self._watchdog.kill()
                self._watchdog.wait()
            self._watchdog = None


# --- the watchdog ----------------------------------------------------------------------------


def watch(pipe: int, locks: Mapping[str, int], ready: Callable[[], None]) -> None:
    """Wait until the tuner has ended, then put back what it has left.

    Args:
        pipe: the end that is read of a pipe whose other end the tuner alone holds.
        locks: the lock of each GPU, which this process holds together with the tuner.
        ready: called when nothing but the tuner's end is waited for any more.
    """
    with _driver() as nvml:
        ready()
        os.read(pipe, 1)
        for uuid, descriptor in locks.items():
            if _ledger_path(uuid).exists():
                _sign(descriptor)
                try:
                    _settle_stale(nvml, uuid, _tell)
                except (Refused, ControlError) as error:
                    _tell(str(error))


def _tell(sentence: str) -> None:
    # The terminal may be gone with the tuner.
    with contextlib.suppress(OSError):
        os.write(2, f"tune: {sentence}\n".encode())


def main() -> None:
    """`python -m tuner.control FOLDER PIPE UUID=LOCK ...`: the watchdog."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TUNE_STATE"] = sys.argv[1]
    locks = {uuid: int(descriptor) for uuid, _, descriptor in (entry.rpartition("=") for entry in sys.argv[3:])}

    def ready() -> None:
        # The tuner may be dead already.
        with contextlib.suppress(OSError):
            os.write(1, b"ready\n")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)

    try:
        watch(int(sys.argv[2]), locks, ready)
    except Refused as error:
        _tell(str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
