"""Energy of the whole machine, from a meter between it and the socket.

Whatever a command or an HTTP address can read will do: smart plugs, PDUs, a BMC through ipmitool, laboratory
meters. It shows power (W) or energy (J, Wh); the unit says which of the two it is.

Power is sampled in a thread and added up by the trapezoid rule: `sampled`. A reading never waits for a
sample, because that one would be taken after the window, at another load; from the last sample up to the
reading the power counts as it was seen last.

Energy is a counter, read when a reading is asked for: `measured`. Such counters are coarse (1 Wh is
3600 J) or slow (some move once a minute), and neither is known beforehand. The thread watches how the
counter moves, and every reading has its step as bounds.

Invariants: a sample that fails, is late, or is no number with a unit makes the window that it falls into
invalid; it is never 0. A question has a time limit, and a command that exceeds it is killed with its
process group. What the environment fills in for `${NAME}` is in no record and in no error.

Glossary
    source   the command or the address
    figure   the number that it shows, with its unit
    step     what the counter moves by at least
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import selectors
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any, Literal, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from tuner.meters import Availability, Unavailable
from tuner.meters.rapl import boot_seconds
from tuner.space import Lever, Refused, closest, excerpt
from tuner.trial import MeterError, Quality, Reading

DOMAIN = "wall0"

Kind = Literal["power", "energy"]

UNITS: dict[str, tuple[Kind, int]] = {
    "W": ("power", 10**6),
    "mW": ("power", 10**3),
    "kW": ("power", 10**9),
    "J": ("energy", 10**6),
    "mJ": ("energy", 10**3),
    "kJ": ("energy", 10**9),
    "MJ": ("energy", 10**12),
    "Wh": ("energy", 3600 * 10**6),
    "mWh": ("energy", 3600 * 10**3),
    "kWh": ("energy", 3600 * 10**9),
    "MWh": ("energy", 3600 * 10**12),
}
"""What a unit measures, and how many microwatts or microjoules it is."""

_SPELLINGS = {"watt": "W", "watts": "W", "joule": "J", "joules": "J"} | {
    # `KWH` is a kilowatt-hour wherever it is written; `mwh` may be a milli- or a megawatt-hour.
    unit.casefold(): unit
    for unit in UNITS
    if unit[0] not in "mM"
}

LIMIT_SECONDS = 5.0
"""How long one question may take. ipmitool needs up to 2 s, a plug on a bad Wi-Fi link about 1 s."""

MOST_BYTES = 16 * 1024
"""More is no meter's answer: a plug's whole status page has 4 KiB."""

MOST_DIGITS = 12
"""Before the decimal point, in the source's own unit."""

LATE_INTERVALS = 3
"""A gap between two samples that is longer is a gap in the measurement."""

INTERVALS = (0.1, 60.0)
"""Shortest and longest, in seconds."""

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")

_SECRET = ("auth", "key", "passw", "pwd", "secret", "token")
"""Parts of the names of query parameters that hold what must not be written down."""

_FIGURE = re.compile(
    r"(?P<number>[-+]?+(?:[0-9]{1,30}+(?:\.[0-9]{0,30}+)?+|\.[0-9]{1,30}+)(?:[eE][-+]?[0-9]{1,2}+)?+)"
    r" ?+(?P<unit>[A-Za-z]{0,12}+)\.?+(?P<rest>.*+)"
)
"""Every repetition is possessive, so that no text takes long. `rest` may only be a remark in brackets."""


# --- where it is read ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WallSource:
    """A command or an address, and which of its numbers is meant. Raises `Refused` for what cannot be meant.

    In both, `${NAME}` is filled in from the environment each time a meter is opened, so that a password or
    a key stays out of the journal.
    """

    command: str | None = None
    """Split into words as a shell does, and run without one."""
    url: str | None = None
    """http or https, fetched with GET, without a proxy. Redirects are not followed."""
    unit: str | None = None
    """Of a number that comes without one: a key of `UNITS`."""
    field: str | None = None
    """In JSON the dotted path to the number, `aenergy.total` or `meters.0.power`; in a text of several
    lines the words before the number, `Instantaneous power reading`."""
    interval_seconds: float = 1.0
    """Between two samples."""

    def __post_init__(self) -> None:
        if (self.command is None) == (self.url is None):
            raise Refused("wall meter: expected one of --wall-command CMD and --wall-url URL")
        if self.command is not None:
            _check_command(self.command)
        if self.url is not None:
            _check_url(self.url)
        if self.unit is not None and self.unit not in UNITS:
            known = _SPELLINGS.get(self.unit.casefold())
            if known is None:
                raise Refused(
                    f"--wall-unit {excerpt(self.unit)}: expected {', '.join(UNITS)}{closest(self.unit, tuple(UNITS))}"
                )
            object.__setattr__(self, "unit", known)
        if self.field is not None and not self.field.strip():
            raise Refused("--wall-field: expected a path such as aenergy.total, or the words before the number")
        shortest, longest = INTERVALS
        if not shortest <= self.interval_seconds <= longest:
            raise Refused(
                f"--wall-interval {self.interval_seconds:g}: expected {shortest:g} to {longest:g} s between samples"
            )

    @property
    def option(self) -> str:
        """The option that it was given with."""
        return "--wall-url" if self.command is None else "--wall-command"

    def __str__(self) -> str:
        return self.command or self.url or ""

    def record(self) -> dict[str, object]:
        """Plain JSON values of what was given; `from_record` is the way back."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in given.items() if value is not None}

    @classmethod
    def from_record(cls, record: object) -> Self:
        """From a study's header."""
        known = {f.name: (float, int) if f.name == "interval_seconds" else (str,) for f in fields(cls)}
        if not isinstance(record, Mapping) or any(
            name not in known or type(value) not in known[name] for name, value in record.items()
        ):
            raise Refused(f"meter option wall={excerpt(record)}: expected {', '.join(known)}")
        return cls(**record)


def _check_command(command: str) -> None:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise Refused(f"--wall-command {excerpt(command)}: {error}") from error
    if not words or not words[0] or "\0" in command:
        raise Refused(f"--wall-command {excerpt(command)}: expected a program and its arguments")


def _check_url(url: str) -> None:
    # What is wrong is said without the address, as long as it may hold a password.
    try:
        parts = urlsplit(url)
        user, place = _user(parts.netloc)
        host = urlsplit(f"//{place}")
        named = bool(host.hostname) and host.port != 0
    except ValueError as error:
        raise Refused(f"--wall-url: {error}; expected an address such as http://192.168.1.20/status") from error
    password = user.partition(":")[2]
    if password and not _VARIABLE.fullmatch(password):
        raise Refused(
            "--wall-url: it holds a password, which would be written into the journal;"
            " put it into an environment variable and write 'http://USER:${PLUG_PASSWORD}@HOST/...'"
        )
    for name, value in parse_qsl(parts.query):
        if any(part in name.casefold() for part in _SECRET) and not _VARIABLE.fullmatch(value):
            raise Refused(
                f"--wall-url: {excerpt(name)} looks like a key, which would be written into the journal;"
                f" put it into an environment variable and write '{name}=${{PLUG_KEY}}'"
            )
    if parts.scheme not in ("http", "https") or not named or not re.fullmatch(r"[!-~]{1,2000}", url):
        raise Refused(f"--wall-url {excerpt(url)}: expected an address such as http://192.168.1.20/status")


def _user(netloc: str) -> tuple[str, str]:
    """`user:password` and `host:port`."""
    user, _, place = netloc.rpartition("@")
    return user, place


class Asker:
    """A source, with the environment's values filled in. Raises `Unavailable` when one is missing."""

    def __init__(self, source: WallSource, environment: Mapping[str, str]) -> None:
        self.source = source
        names = dict.fromkeys(_VARIABLE.findall(str(source)))
        missing = [name for name in names if not environment.get(name)]
        if missing:
            raise Unavailable(f"{source.option} names {missing[0]}, which is not set", f"export {missing[0]}=...")
        self._values = {name: environment[name] for name in names}

    def __call__(self) -> str:
        """What the source says now. Raises `MeterError` within `LIMIT_SECONDS`."""
        if self.source.command is not None:
            return self._run([self._fill(word) for word in shlex.split(self.source.command)])
        return self._get(self.source.url or "")

    def shown(self, text: str) -> str:
        """A text from outside as errors may show it: cut, printable, without what was filled in."""
        for name, value in self._values.items():
            text = text.replace(value, f"${{{name}}}")
        return excerpt(text.strip())

    def _fill(self, text: str) -> str:
        return _VARIABLE.sub(lambda found: self._values[found[1]], text)

    def _run(self, words: list[str]) -> str:
        name, deadline = excerpt(self.source.command), time.monotonic() + LIMIT_SECONDS
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
            )
        except (OSError, ValueError) as error:
            raise MeterError(
                f"{DOMAIN}: {name} cannot be started: {getattr(error, 'strerror', None) or error}"
            ) from error
        try:
            out, err = _drain(process, name, deadline)
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise MeterError(f"{DOMAIN}: {name} did not end within {LIMIT_SECONDS:g} s") from error
        finally:
            for pipe in (process.stdout, process.stderr):
                if pipe:
                    pipe.close()
            # Not reaped yet, so the number of its group is still its own.
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status != 0:
            how = f"ended with exit status {status}" if status > 0 else f"was ended by signal {-status}"
            words_of_it = err.decode(errors="replace").strip().rpartition("\n")[2]
            raise MeterError(f"{DOMAIN}: {name} {how}{f': {self.shown(words_of_it)}' if words_of_it else ''}")
        return out.decode(errors="replace")

    def _get(self, url: str) -> str:
        parts = urlsplit(url)
        user, place = _user(parts.netloc)
        headers = {"Accept": "application/json, text/plain", "Connection": "close"}
        if user:
            headers["Authorization"] = f"Basic {base64.b64encode(self._fill(unquote(user)).encode()).decode()}"
        path = _VARIABLE.sub(
            lambda found: quote(self._values[found[1]], safe=""),
            (parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
        )
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        expired = threading.Event()
        try:
            host = urlsplit(f"//{self._fill(place)}")
            with (
                contextlib.closing(kind(host.hostname or "", host.port, timeout=LIMIT_SECONDS)) as connection,
                _deadline(connection, expired),
            ):
                connection.request("GET", path, headers=headers)
                with connection.getresponse() as response:
                    status, reason, body = response.status, response.reason, response.read(MOST_BYTES + 1)
                    # `read` with a length gives the beginning of an answer whose end is missing: `12` of `123 W`.
                    if expired.is_set() or (response.length and len(body) <= MOST_BYTES):
                        raise http.client.IncompleteRead(body)
        except (OSError, ValueError, http.client.HTTPException) as error:
            late = expired.is_set() or isinstance(error, TimeoutError)
            why = f"no answer within {LIMIT_SECONDS:g} s" if late else _without_address(error)
            # Not `from error`: some of these hold the whole address.
            raise MeterError(f"{DOMAIN}: {excerpt(url)} cannot be read: {why}") from None
        if 300 <= status < 400:
            raise MeterError(f"{DOMAIN}: {excerpt(url)} leads to another address (HTTP {status}); name that one")
        if status != 200:
            raise MeterError(f"{DOMAIN}: {excerpt(url)} answered HTTP {status} {self.shown(reason)}")
        if len(body) > MOST_BYTES:
            raise MeterError(f"{DOMAIN}: {excerpt(url)} answered with more than {MOST_BYTES // 1024} KiB")
        return body.decode(errors="replace")


def _without_address(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"it does not answer in HTTP ({type(error).__name__})"


def _drain(process: subprocess.Popen[bytes], name: str, deadline: float) -> tuple[bytes, bytes]:
    """All of standard output, and the end of standard error."""
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = b"", b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        while selector.get_map():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise subprocess.TimeoutExpired(name, LIMIT_SECONDS)
            for key, _ in selector.select(remaining):
                part = os.read(key.fd, 4096)
                if not part:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    out += part
                else:
                    err = (err + part)[-4096:]
            if len(out) > MOST_BYTES:
                raise MeterError(f"{DOMAIN}: {name} printed more than {MOST_BYTES // 1024} KiB")
    return out, err


@contextlib.contextmanager
def _deadline(connection: http.client.HTTPConnection, expired: threading.Event) -> Iterator[None]:
    """Connect, and cut the connection after `LIMIT_SECONDS`.

    A socket's own timeout starts anew with every byte, so a server that sends one now and then would be
    listened to for ever.
    """
    connection.connect()
    reached = connection.sock

    def cut() -> None:
        expired.set()
        with contextlib.suppress(OSError):
            reached.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(LIMIT_SECONDS, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


# --- what it shows ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A power or an energy."""

    kind: Kind
    micro: int
    """Microwatts or microjoules."""
    step: int
    """One in the last place that was printed, in the same unit."""


def figure(text: str, source: WallSource, shown: Callable[[str], str] = excerpt) -> Figure:
    """The number that is meant in what a source said.

    Args:
        text: `123.4 W`, or JSON, or lines of words and numbers.
        source: the unit of a bare number, and which number is meant where there are several.
        shown: how an error may quote the text.

    Raises:
        MeterError: there is no such number, it is negative or not finite, or its unit is unknown.
    """
    found = _chosen(text.strip().removeprefix("\ufeff"), source, shown)
    if isinstance(found, Decimal):
        number, unit = found, ""
    else:
        line = " ".join(found.split())
        match = _FIGURE.fullmatch(line)
        if match is None or match["rest"].lstrip()[:1] not in ("", "(", "["):
            raise MeterError(f"{DOMAIN}: expected a number with a unit such as `123.4 W`, got {shown(line)}")
        number, unit = Decimal(match["number"]), match["unit"]
    name = _unit(unit, source, number)
    if number < 0 or number.adjusted() >= MOST_DIGITS:
        raise MeterError(f"{DOMAIN}: expected 0 or more, with {MOST_DIGITS} digits at most, got {shown(str(number))}")
    kind, factor = UNITS[name]
    if kind == "power" and number == 0:
        raise MeterError(f"{DOMAIN}: 0 W, and a machine that runs draws more; is this the meter of this machine?")
    # The exponent of the last digit that was printed: -1 for `1234.5`.
    place = max(int(number.as_tuple().exponent), -30)
    return Figure(kind, int(number * factor), max(1, int(Decimal(1).scaleb(place) * factor)))


def _unit(printed: str, source: WallSource, number: Decimal) -> str:
    if not printed:
        if source.unit is None:
            raise MeterError(f"{DOMAIN}: the number {number} has no unit; say which one with --wall-unit W, Wh, J, ...")
        return source.unit
    unit = printed if printed in UNITS else _SPELLINGS.get(printed.casefold())
    if unit is None:
        raise MeterError(f"{DOMAIN}: the unit {excerpt(printed)} is none of {', '.join(UNITS)}")
    if source.unit not in (None, unit):
        raise MeterError(f"{DOMAIN}: the unit is {unit}, and --wall-unit says {source.unit}")
    return unit


def _chosen(text: str, source: WallSource, shown: Callable[[str], str]) -> str | Decimal:
    """The text around the number, or the number itself where it stands in JSON."""
    if text[:1] in ("{", "["):
        with contextlib.suppress(ValueError, ArithmeticError, RecursionError):
            # As they were printed: the decimals tell the counter's step.
            return _at(json.loads(text, parse_float=Decimal, parse_int=Decimal, parse_constant=str), source.field)
    if source.field is None:
        return text
    wanted = " ".join(source.field.split())
    lines = [line for line in (" ".join(each.split()) for each in text.splitlines()) if wanted in line]
    if len(lines) != 1:
        raise MeterError(f"{DOMAIN}: expected one line with {excerpt(wanted)}, got {len(lines)} in {shown(text)}")
    return lines[0].partition(wanted)[2].lstrip(" :=|\"'")


def _at(tree: Any, path: str | None) -> str | Decimal:
    choices = ", ".join(path for path, _ in zip(_numbers(tree), range(12), strict=False))
    if path is None:
        raise MeterError(
            f"{DOMAIN}: it answers in JSON; say which number with --wall-field ({choices or 'it has none'})"
        )
    for key in path.split("."):
        if isinstance(tree, list):
            tree = tree[int(key)] if key.isdecimal() and int(key) < len(tree) else None
        else:
            tree = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(tree, (str, Decimal)):
        raise MeterError(f"{DOMAIN}: no number at {excerpt(path)}; there is {choices or 'none at all'}")
    return tree


def _numbers(tree: Any, path: str = "") -> Iterator[str]:
    """The paths of all numbers."""
    if isinstance(tree, Decimal):
        yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, below in items:
        yield from _numbers(below, f"{path}.{key}" if path else str(key))


# --- adding up -------------------------------------------------------------------------------


class Power:
    """Energy by the trapezoid rule over samples of power: no source, no thread, no clock of its own."""

    def __init__(self, sample: Figure, at: float, longest_gap: float) -> None:
        self._microwatts = sample.micro
        self._at = self._sampled_at = at
        self._longest_gap = longest_gap
        self._microjoules = 0.0

    def watch(self, sample: Figure, at: float) -> None:
        """Take a sample at the time `at` in seconds. Raises `MeterError` when it is late; the next one starts here."""
        gap, elapsed, before = at - self._sampled_at, at - self._at, self._microwatts
        self._microwatts, self._at, self._sampled_at = sample.micro, at, at
        if gap > self._longest_gap:
            raise MeterError(f"{DOMAIN}: {gap:.1f} s passed between two samples of power")
        self._microjoules += elapsed * (before + sample.micro) / 2

    def reading(self, at: float) -> Reading:
        """Up to the time `at`, from the last sample on with its power. Raises `MeterError` when that one is too old."""
        if at - self._sampled_at > self._longest_gap:
            raise MeterError(f"{DOMAIN}: no sample of power for {at - self._sampled_at:.1f} s")
        self._microjoules += (at - self._at) * self._microwatts
        self._at = at
        return Reading.exact(int(self._microjoules))


class Counter:
    """Energy of a counter that moves in steps, whose size is learnt from how it is printed and how it moves.

    What passed between two readings is their difference, give or take one step: the first one may have
    been made just after a step, and the last one just before one, or the other way round. A step is one in
    the last place of a coarse counter, or what a slow one moves by at once; of one that moves with every
    poll it is not known how much sooner it would have moved, so the whole way between two polls counts.
    """

    def __init__(self, first: Figure) -> None:
        self._newest = self._watched = self._read = first.micro
        self._printed = first.step
        self._jump = 0
        self._total = self._low = self._high = 0

    @property
    def step(self) -> int:
        """In microjoules: one in the last place, or the largest move between two polls."""
        return max(self._printed, self._jump)

    def watch(self, now: Figure, at: float) -> None:
        """Look how it moves. Raises `MeterError` when it went back; the next reading starts here."""
        self._see(now)
        self._jump = max(self._jump, now.micro - self._watched)
        self._watched = now.micro

    def reading(self, now: Figure) -> Reading:
        """Energy since the first figure. Raises `MeterError` when the counter went back."""
        self._see(now)
        moved, self._read = now.micro - self._read, now.micro
        if moved:
            self._total += moved
            self._low += max(0, moved - self.step)
            self._high += moved + self.step
        return Reading(self._total, self._low, self._high)

    def _see(self, now: Figure) -> None:
        back, self._newest = self._newest - now.micro, now.micro
        # JSON leaves out zeros at the end, so the finest place that was ever printed is the last one.
        self._printed = min(self._printed, now.step)
        if back > 0:
            self._watched = self._read = now.micro
            raise MeterError(f"{DOMAIN}: the energy counter went back by {back / 1e6:g} J")


# --- the meter -------------------------------------------------------------------------------


def probe(source: WallSource | None) -> Availability:
    """Whether the source answers with a power or an energy."""
    try:
        meter = WallMeter(source)
    except Unavailable as error:
        return Availability("wall", ok=False, domains=(), quality="sampled", reason=error.reason, remedy=error.remedy)
    with contextlib.closing(meter):
        return Availability(
            "wall",
            ok=True,
            domains=meter.domains(),
            quality=meter.quality,
            reason=f"{DOMAIN} is {meter.said} by {excerpt(str(source))}",
            remedy="",
            how=meter.how,
        )


class WallMeter:
    """Energy of the whole machine since this object was made. Raises `Unavailable`."""

    name = "wall"
    blind_to: frozenset[Lever] = frozenset()

    def __init__(
        self,
        source: WallSource | None,
        *,
        seconds: Callable[[], float] = boot_seconds,
        ask: Callable[[], str] | None = None,
    ) -> None:
        if source is None:
            raise Unavailable(
                "neither --wall-command CMD nor --wall-url URL says where to read it",
                "tune run --meter wall --wall-command CMD  # or --wall-url URL",
            )
        asker = Asker(source, os.environ)
        self._source, self._seconds = source, seconds
        self._ask, self._shown = ask or asker, asker.shown
        self._kind: Kind | None = None
        try:
            first = self._figure()
        except MeterError as error:
            remedy = shlex.join(["curl", source.url]) if source.url else source.command
            raise Unavailable(str(error).removeprefix(f"{DOMAIN}: "), f"{remedy}  # shows what it says") from error
        self._kind = first.kind
        self.quality: Quality = "sampled" if first.kind == "power" else "measured"
        # A counter is read when it is asked for; how often it moves by itself is in the bounds of its readings.
        self.update_seconds = source.interval_seconds if first.kind == "power" else 0.0
        self.said = f"{first.micro / 1e6:g} {'W' if first.kind == 'power' else 'J'}"
        """What it showed when it was opened."""
        self._asking = threading.Lock()
        """Held while the source is asked, so that answers are taken in the order in which they were given."""
        self._lock = threading.Lock()
        self._fault: MeterError | None = None
        self._closed = threading.Event()
        self._power = Power(first, seconds(), LATE_INTERVALS * source.interval_seconds)
        self._counter = Counter(first)
        self._thread = threading.Thread(target=self._poll, name="wall", daemon=True)
        self._thread.start()

    @property
    def resolution_joules(self) -> float:
        """The counter's step as it is known by now; 0.0 where power is read."""
        return self._counter.step / 1e6 if self._kind == "energy" else 0.0

    @property
    def how(self) -> str:
        """What the quality means here."""
        if self._kind == "energy":
            return f"in steps of {self.resolution_joules:g} J"
        return f"every {self._source.interval_seconds:g} s"

    def domains(self) -> tuple[str, ...]:
        return (DOMAIN,)

    def read(self) -> dict[str, Reading]:
        if self._closed.is_set():
            raise MeterError("wall: the meter is closed")
        reading = self._reading_of_power if self._kind == "power" else self._reading_of_counter
        with self._lock:
            fault, self._fault = self._fault, None
        if fault is not None:
            raise fault
        return {DOMAIN: reading()}

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _reading_of_power(self) -> Reading:
        with self._lock:
            return self._power.reading(self._seconds())

    def _reading_of_counter(self) -> Reading:
        with self._asking:
            now = self._figure()
            with self._lock:
                return self._counter.reading(now)

    def _poll(self) -> None:
        rest = self._source.interval_seconds
        while not self._closed.wait(max(rest, 0.0)):
            begun = time.monotonic()
            self._sample()
            rest = self._source.interval_seconds - (time.monotonic() - begun)

    def _sample(self) -> None:
        """Ask once; a fault is kept for the next `read`, whose window it falls into."""
        watched = self._power if self._kind == "power" else self._counter
        with self._asking:
            try:
                now = self._figure()
                with self._lock:
                    watched.watch(now, self._seconds())
            except MeterError as fault:
                with self._lock:
                    self._fault = self._fault or fault

    def _figure(self) -> Figure:
        now = figure(self._ask(), self._source, self._shown)
        if self._kind not in (None, now.kind):
            raise MeterError(f"{DOMAIN}: it showed {self._kind} before, and now {now.kind}")
        return now
