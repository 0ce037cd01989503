"""Finding what a person named: a prompt, a runner or a recorded table.

A name is looked up in `./<kind>/` (tables in `./results/recorded/`), then in the copy that was installed
with tune, then in the checkout beside the package. Something with a slash or a suffix is a path and
nothing else. An error says where was looked and what there is. A runner is a Python module: where its name has
a dash, its file has an underscore.

A runner is code that runs. One in the current folder is taken only when it is named, and the caller
prints its path before loading it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal, cast, get_args

from tuner.space import Refused, closest, excerpt
from tuner.trial import Runner, Target, Unit

Kind = Literal["prompts", "runners", "recorded"]

_SUFFIX: dict[Kind, str] = {"prompts": ".md.j2", "runners": ".py", "recorded": ".csv"}
_THING: dict[Kind, str] = {"prompts": "prompt", "runners": "runner", "recorded": "table"}
_FOLDER: dict[Kind, str] = {"prompts": "prompts", "runners": "runners", "recorded": "results/recorded"}
_PACKAGE = Path(__file__).resolve().parent


def folders(kind: Kind) -> list[Path]:
    """Where things of this kind are looked for, in order."""
    return [Path(_FOLDER[kind]), _PACKAGE / "_bundled" / kind, _PACKAGE.parent / _FOLDER[kind]]


def names(kind: Kind) -> list[str]:
    """What can be named without a path."""
    suffix = _SUFFIX[kind]
    found = {
        _named(kind, file.name.removesuffix(suffix))
        for folder in folders(kind)
        if folder.is_dir()
        for file in folder.glob(f"*{suffix}")
        if not file.name.startswith("_") and (kind != "recorded" or file.with_suffix(".json").is_file())
    }
    return sorted(found)


def _named(kind: Kind, stem: str) -> str:
    return stem.replace("_", "-") if kind == "runners" else stem


def find(kind: Kind, name: str, *, local: bool = True) -> Path:
    """The file that `name` means, as an absolute path.

    `local`: whether a bare name may mean a file below the current folder.
    """
    suffix = _SUFFIX[kind]
    thing = _THING[kind]
    if "/" in name or name.endswith((suffix, ".j2", ".py", ".md", ".csv")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise Refused(f"no such {thing} file: {excerpt(name)}")
        return path.resolve()
    for folder in folders(kind)[0 if local else 1 :]:
        for stem in dict.fromkeys((name, name.replace("-", "_") if kind == "runners" else name)):
            if (path := folder / f"{stem}{suffix}").is_file():
                return path.resolve()
    known = names(kind)
    raise Refused(
        f"unknown {thing} {excerpt(name)}{closest(name, known)}"
        f" (there is {', '.join(known) or 'none'}; a path to a *{suffix} file works too)"
    )


def shipped(path: Path) -> bool:
    """Whether the file came with tune."""
    return any(path.is_relative_to(home) for kind in _SUFFIX for home in folders(kind)[1:])


def load_runner(path: Path) -> Runner:
    """The runner in the file at `path`, executed as a module of its own."""
    name = f"tuner_runner_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise Refused(f"{path}: expected a Python file with a runner")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their own module up in sys.modules while the class body runs.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise Refused(f"{path}: the runner does not load ({type(error).__name__}: {error})") from error
    return _as_runner(module, path)


def unit_of(runner: Runner, target: Target) -> Unit:
    """What the runner's engine puts out and energy is divided by: what its `unit(target)` says, or tokens."""
    say = getattr(runner, "unit", None)
    if say is None:
        return "token"
    said = say(target)
    for unit in get_args(Unit):
        if said == unit:
            return cast("Unit", unit)
    raise Refused(f"the runner's unit() says {excerpt(said)}: expected {', '.join(get_args(Unit))}")


def _as_runner(module: ModuleType, path: Path) -> Runner:
    has = {name for name, found in vars(module).items() if callable(found)}
    missing = [f for f in ("space", "identity", "launch", "command") if f not in has]
    if missing and not (missing == ["command"] and "client" in has):
        raise Refused(
            f"{path}: a runner has functions space, identity, launch, and command, or client where it starts no engine;"
            f" missing: {', '.join(missing)}"
        )
    return cast("Runner", module)


def state_folder() -> Path:
    """Where tune keeps what outlives a study: `$TUNE_STATE`, else `tune` in the person's state folder.

    A relative XDG_STATE_HOME is ignored, as its specification asks.
    """
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        if own := os.environ.get("TUNE_STATE"):
            return Path(own).expanduser().absolute()
        return (base if base.is_absolute() else Path.home() / ".local" / "state") / "tune"
    except RuntimeError as error:
        raise Refused("this user has no home folder to keep records in; export TUNE_STATE=FOLDER") from error
