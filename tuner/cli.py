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
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from tuner import __version__
from tuner.space import Refused

if TYPE_CHECKING:
    from tuner.assemble import Bench
    from tuner.confirm import Saving
    from tuner.display import Screen
    from tuner.files import Kind
    from tuner.journal import Changes, End, Header, Journal
    from tuner.study import Threshold
    from tuner.trial import Chat

app = typer.Typer(
    name="tune",
    help="Find the runtime setting with the least energy per token.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

DEFAULT_TRIALS = 15
DEFAULT_PAIRS = 4

SUCCESS, FAILURE, USAGE, UNFINISHED = 0, 1, 2, 3


class Terminated(BaseException):
    """SIGTERM or SIGHUP: leave as Ctrl-C does, with the signal's own exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


# --- tune run --------------------------------------------------------------------------------


@app.command()
def run(
    context: typer.Context,
    workload: Annotated[
        str, typer.Option("--workload", "-w", help="Engine to tune: a runner's name, or a path to a runner's file.")
    ] = "llama",
    template: Annotated[
        str | None,
        typer.Option(help="Prompt for the LLM: `enhanced`, `baseline`, or a file of your own. [default: enhanced]"),
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option(
            help="Who proposes: `openai:MODEL`, `anthropic:MODEL`, or `paste` (you carry prompts to a chat)."
            " Left out, a key in the environment picks its provider."
        ),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Server of an `openai:` model: Ollama, vLLM, llama.cpp, LM Studio, OpenRouter.")
    ] = None,
    proposer: Annotated[
        str | None, typer.Option(help="Propose without an LLM: `rules`, `sobol`, `random`, `tpe`, `gp` or `cmaes`.")
    ] = None,
    batch: Annotated[bool, typer.Option("--batch", help="Run every proposal without asking.")] = False,
    model: Annotated[str | None, typer.Option(help="Model to run. Left out, the runner makes one.")] = None,
    size: Annotated[str | None, typer.Option(help="Size of the model that the runner makes.")] = None,
    prompts: Annotated[int, typer.Option(min=1, max=100_000, help="Requests in one pass of the load.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=10_000_000, help="Tokens of each prompt.")] = 96,
    output_tokens: Annotated[int, typer.Option(min=1, max=10_000_000, help="Tokens generated for each prompt.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the prompts and of the proposer.")] = 0,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Also tune what can change the quality of the output.")
    ] = False,
    pin: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Keep a parameter at a value. Repeatable.")
    ] = None,
    narrow: Annotated[
        list[str] | None,
        typer.Option("--range", metavar="NAME=LOW..HIGH", help="Narrow a parameter's range. Repeatable."),
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(help="Stop at this energy: `0.8x` of the default's, or `0.45J` per token."),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Stop after so many trials, the default's too. [default: {DEFAULT_TRIALS}, none with --time]",
        ),
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option("--time", metavar="TIME", help="Stop when the trials took `90s`, `20m` or `2h` together."),
    ] = None,
    meter: Annotated[
        str, typer.Option(help="Where energy is read: `auto`, `nvml`, `rapl`, `nvml+rapl` or `estimate`.")
    ] = "auto",
    require_measured: Annotated[
        bool, typer.Option("--require-measured", help="Refuse to run on estimated energy.")
    ] = False,
    cpu_watts: Annotated[
        str | None,
        typer.Option(
            metavar="LOW..HIGH", help="Full-load watts of your CPU, for the estimate where there is no counter."
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, max=1000, help="Measured windows in one trial.")] = 5,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Least length of one window; it holds whole passes. [default: 2s, on a GPU counter 10s]",
        ),
    ] = None,
    timeout: Annotated[str, typer.Option(metavar="TIME", help="End a trial that takes longer.")] = "10m",
    confirm_pairs: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Fresh pairs of default and best after the search; a saving is claimed from them alone. [default: 4]",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the study. Left out, one is made.")] = None,
    results: Annotated[Path, typer.Option(help="Folder that holds the studies.")] = Path("results"),
    resume: Annotated[
        Path | None, typer.Option(metavar="STUDY", help="Go on with a study, given by its folder.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Resume on another machine, engine or model, as a segment of its own.")
    ] = False,
) -> None:
    """Tune an engine: propose a setting, run it, measure its energy, and so on.

    Trial 0 is the engine's own default. Without `--batch`, each proposal is shown and you accept, edit or
    reject it. At the end the best setting is measured afresh against the default.
    """
    from tuner.assemble import choose_proposer
    from tuner.journal import Changes, Header, Plan
    from tuner.trial import Target

    with _screen() as screen:
        if confirm_pairs is not None and confirm_pairs % 2:
            raise Refused(
                f"--confirm-pairs {confirm_pairs}: expected an even number, so that steady drift cancels, or 0"
            )
        if resume is not None:
            _refuse_with_resume(context)
            _resume(
                screen,
                resume,
                Changes(
                    trials=trials,
                    time_seconds=seconds("--time", time_limit) if time_limit else None,
                    threshold=threshold,
                    confirm_pairs=confirm_pairs,
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
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise Refused(f"--name {name!r}: expected letters, digits, dots, dashes and underscores, at most 100")
        local = Path(model).expanduser() if model else None
        header = Header(
            name=name or "",
            workload=_lasting("runners", workload, named=_given(context, "workload")),
            target=Target(
                # A model file is named from where the person stands now; a resume may stand elsewhere.
                model=str(local.absolute()) if local and local.exists() else model,
                size=size,
                prompts=prompts,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                seed=seed,
                allow_lossy=allow_lossy,
            ),
            proposer=proposer or "llm",
            base_url=base_url,
            seed=seed,
            pins=tuple(pin or ()),
            ranges=tuple(narrow or ()),
            threshold=threshold,
            trials=trials or (None if time_limit else DEFAULT_TRIALS),
            time_seconds=seconds("--time", time_limit) if time_limit else None,
            confirm_pairs=DEFAULT_PAIRS if confirm_pairs is None else confirm_pairs,
            plan=Plan(
                windows=windows,
                window_seconds=seconds("--window", window) if window else None,
                timeout_seconds=seconds("--timeout", timeout),
            ),
            require_measured=require_measured,
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
            cpu_watts=cpu_watts,
        )


_ALLOWED_WITH_RESUME = frozenset(
    {"resume", "force", "batch", "trials", "time_limit", "threshold", "confirm_pairs", "llm", "base_url", "template"}
)


def _refuse_with_resume(context: typer.Context) -> None:
    """A resumed study keeps its workload, load and measurement: silently ignoring an option would mislead."""
    for option in context.command.params:
        if option.name and option.name not in _ALLOWED_WITH_RESUME and _given(context, option.name):
            raise Refused(
                f"{option.opts[0]}: a resumed study keeps the setting it was started with;"
                " leave it out, or start a new study"
            )


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
    cpu_watts: str | None,
) -> None:
    from tuner.assemble import free_name, prepare, results_folder
    from tuner.journal import Journal, lock
    from tuner.meters import MeterOptions
    from tuner.study import Threshold

    if header.threshold:
        Threshold.parse(header.threshold)
    header, bench = prepare(header, meter=meter, options=MeterOptions.parse(cpu_watts), say=screen.say)
    if not header.name:
        parts = (Path(header.workload).stem, Path(header.template or header.proposer).stem.removesuffix(".md"))
        header = replace(header, name=free_name(results, "-".join((*parts, time.strftime("%Y%m%d-%H%M%S")))))
    chat = _open_chat(screen, header)
    _check_proposer(header, bench, chat)
    _refuse_without_person(batch=batch)
    folder = results_folder(results, header.name)
    if warning:
        screen.warn(warning)
    with lock(folder), Journal.create(folder, header) as journal:
        _go(screen, journal, header, bench, chat, batch=batch)


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
        chat = _open_chat(screen, header)
        _check_proposer(header, bench, chat)
        if segment:
            screen.warn(f"going on as segment {segment.number}: {'; '.join(segment.differences)}")
            journal.append(segment)
        if changes != Changes():
            journal.append(changes)
        resumed(journal)
        _go(screen, journal, header, bench, chat, batch=batch)


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


def _go(screen: Screen, journal: Journal, header: Header, bench: Bench, chat: Chat | None, *, batch: bool) -> None:
    """Run the study in the open journal to its end, confirm what it found, and leave with the exit code."""
    from tuner.session import Session
    from tuner.study import Threshold

    session = Session(screen=screen, journal=journal, header=header, bench=bench, chat=chat, batch=batch)
    with _signals():
        end, found = session.run()
    if end.kind in ("failures", "chat") or journal.study.history.best is None:
        raise typer.Exit(FAILURE)
    threshold = Threshold.parse(header.threshold) if header.threshold else None
    raise typer.Exit(SUCCESS if threshold is None or _reached(threshold, end, found) else UNFINISHED)


def _reached(threshold: Threshold, end: End, found: Saving | None) -> bool:
    """Whether the threshold was reached: by fresh runs where there are any, else by the search's own figure."""
    if end.kind != "goal":
        return False
    return found is None or threshold.reached(found.ratio, found.best_joules_per_unit)


# --- tune report, prompt, doctor ---------------------------------------------------------------


@app.command()
def report(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's folder: results/NAME.")],
    csv: Annotated[
        str | None, typer.Option(metavar="FILE", help="Tidy CSV, one row a measurement; `-` is standard output.")
    ] = None,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="The same as JSON; `-` is standard output.")] = None,
) -> None:
    """Show a study as a table, or write its measurements to a file."""
    from tuner.confirm import concluded
    from tuner.journal import read

    with _screen() as screen:
        found = read(study)
        if csv is None and json is None:
            screen.report(found, concluded(found))
            return
        from tuner import export

        if csv is not None:
            export.to_csv(found, csv)
        if json is not None:
            export.to_json(found, json)


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
    cpu_watts: Annotated[
        str | None, typer.Option(metavar="LOW..HIGH", help="Full-load watts of your CPU, for the estimate.")
    ] = None,
) -> None:
    """Say what can be measured here, what stands in the way, and how to mend it."""
    from tuner.doctor import examine
    from tuner.meters import MeterOptions

    with _screen() as screen:
        screen.doctor(examine(MeterOptions.parse(cpu_watts)))


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
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}", FAILURE)
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
