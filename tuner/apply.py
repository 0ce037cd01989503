"""Putting what a study found to work: the best setting as a command, a service, a container or a script.

A setting is written down only because a confirmation showed that it saves; else a person has to ask for it.
Nothing here starts anything or touches a file that is there. What is made is text for other programs, each with
rules of its own: every value goes through the quoting of its form, and no form is read by a shell.

Sources
    systemd     systemd.syntax(7), "Quoting" and "Command lines" of systemd.service(5), systemd.unit(5) for `%`
    compose     docs.docker.com/reference/compose-file: services, interpolation (`$$`), resource reservations
    kubernetes  kubernetes.io/docs: Deployment, Service, `$(VAR)` in args (`$$`), device plugins for GPUs
    YAML        a JSON string is a YAML double-quoted scalar (YAML 1.2, section 1.3) of printable characters
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tuner.assemble import asked, client_of, launch_text
from tuner.confirm import concluded, shortened, shown_by
from tuner.control import commands, split
from tuner.export import write
from tuner.files import find, load_runner, shipped
from tuner.journal import Study
from tuner.machine import differences
from tuner.space import Config, Refused, closest, excerpt, show
from tuner.summary import changes_text, clean, loss_text
from tuner.trial import Runner, Service, Target

Form = Literal["command", "compose", "systemd", "kubernetes", "modelfile", "python"]
FORMS: tuple[Form, ...] = get_args(Form)

NEEDS: Mapping[Form, Callable[[Service], bool]] = {
    "command": lambda _: True,
    "systemd": lambda s: bool(s.argv and s.port),
    "compose": lambda s: bool(s.image),
    "kubernetes": lambda s: bool(s.image),
    "modelfile": lambda s: bool(s.modelfile),
    "python": lambda s: bool(s.python),
}
"""What an engine must bring for each form. What listens nowhere runs to its end: that is no service."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Chosen:
    """The configuration to put to work."""

    config: Config
    confirmed: bool
    """Whether fresh pairs showed that it saves."""
    said: str
    """Why it is this one, as a sentence."""


def choose(study: Study, *, unconfirmed: bool) -> Chosen:
    """The shortest setting that the confirmation shows to save; with `unconfirmed` else the best of the search.

    Raises:
        Refused: no saving is shown, and nobody asked for the best without; or nothing was measured at all.
    """
    shown, _ = shortened(study)
    if shown is not None:
        return Chosen(shown, True, concluded(study) or "")
    folder, best, default = study.folder, study.history.best, study.history.default
    if best is None:
        raise Refused(f"{folder}: nothing could be measured, so there is nothing to apply")
    if unconfirmed:
        loss = loss_text(study.space, [best])
        lost = f" ({loss})" if loss else ""
        return Chosen(
            best.config, False, f"trial {best.number} is the best of the search{lost}; no saving is confirmed"
        )
    either = f"; `tune apply {folder} --unconfirmed` writes the best of the search all the same"
    if default is not None and best.config == default.config:
        raise Refused(f"{folder}: no setting used less energy than the default: leave the engine as it is{either}")
    if not study.pairs:
        raise Refused(f"{folder}: nothing is confirmed yet; measure it with `tune confirm {folder}`{either}")
    _, done = shown_by(study)
    planned = study.pairs[-1].planned
    if done < planned:
        raise Refused(
            f"{folder}: {done} of {planned} pairs of the confirmation are done; go on with"
            f" `tune confirm {folder} --pairs {planned}`{either}"
        )
    raise Refused(f"{folder}: the confirmation showed no saving, so the default stays{either}")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Everything that a form is made of."""

    name: str
    """The study's, of small letters, digits and dashes: what a service may be called."""
    about: tuple[str, ...]
    """Sentences for the head of a file."""
    command: str
    settings: tuple[str, ...]
    """Commands that set the GPUs, as a person types them; empty where they were not tuned."""
    gpus: int
    """GPUs of the machine that it was tuned on."""
    service: Service


def launch_of(study: Study, chosen: Chosen, say: Say) -> Launch:
    """What the study's runner says of `chosen`.

    Raises:
        Refused: the runner is gone, or does not know this configuration any more.
    """
    header = study.header
    path = find("runners", header.workload, local=False)
    if not shipped(path):
        say(f"running the code of {path}")
    runner = load_runner(path)
    engine, settings = split(chosen.config)
    client = client_of(path, runner, engine, study)
    here = asked(path, "identity", lambda: runner.identity(header.target)) if client is None else study.identity
    if changed := differences(study.identity, here, sorted({*study.identity, *here})):
        say(f"tuned with another engine or model than there is now: {'; '.join(changed)}")
    ran = " ".join(filter(None, (here.get("engine"), here.get("engine_version"))))
    usual = {str(row["name"]): row["default"] for row in study.space}
    boards = [board for key, board in study.machine.items() if re.fullmatch(r"gpu\d+", key)]
    uuids = [match[1] for board in boards if (match := re.search(r"\(([\w-]+)\)$", board))]
    tuned = {name: value for name, value in settings.items() if value != usual.get(name)}
    changes = changes_text(chosen.config, usual, [n for n in chosen.config if chosen.config[n] != usual.get(n)])  # type: ignore[arg-type]  # a record's defaults are values
    if part := "" if client else _clients_part(study, engine):
        say(part)
    return Launch(
        name=_name(header.name),
        about=(
            f"made by `tune apply` from the study {header.name}",
            f"engine: {ran}, model: {here.get('model', '')}",
            f"changes from the default: {changes or 'none'}",
            part,
            chosen.said,
        ),
        command=launch_text(path, runner, engine, study),
        settings=tuple(commands(tuned, uuids)),
        gpus=len(boards),
        service=_service(path, runner, engine, header.target) if client is None else client,
    )


def _service(path: Path, runner: Runner, config: Config, target: Target) -> Service:
    of = getattr(runner, "service", None)
    return asked(path, "service", lambda: of(config, target)) if of else Service()


def _clients_part(study: Study, config: Config) -> str:
    """What a changed `concurrency` asks of whoever sends the requests; empty where nothing."""
    own = {row["name"]: row["default"] for row in study.space if row.get("scope") == "request"}
    if config.get("concurrency", own.get("concurrency")) == own.get("concurrency"):
        return ""
    return f"concurrency is the client's part: keep {show(config['concurrency'])} requests in flight at a time"


def _name(text: str) -> str:
    """A DNS label (RFC 1035), which Kubernetes asks for; the others take it too."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:50].strip("-")
    return name if name[:1].isalpha() else f"tune-{name}".strip("-")


def render(form: str, launch: Launch) -> str:
    """The text of a form.

    Raises:
        Refused: there is no such form, or this engine does not offer it.
    """
    if form not in FORMS:
        raise Refused(f"--as {excerpt(form)}: expected one of {', '.join(FORMS)}{closest(form, FORMS)}")
    if not NEEDS[form](launch.service):
        offered = ", ".join(f for f in FORMS if NEEDS[f](launch.service))
        raise Refused(f"--as {form}: this engine offers {offered}")
    text = _RENDER[form](launch)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"--as {form}: a name in it is no text ({excerpt(text[error.start : error.end])})") from error
    return text


def not_here(form: str, launch: Launch) -> str | None:
    """The program that a form starts, where this machine has none of that name; None where it has."""
    service = launch.service
    if form not in ("command", "systemd") or not service.argv:
        return None
    if shutil.which(_program(service.argv[0], service.folder)):
        return None
    either = "; --as python does without" if service.python else ""
    return f"{excerpt(service.argv[0])} is not found on this machine: install it first{either}"


def save(text: str, destination: Path, *, force: bool) -> None:
    """Write the text to a file. Raises `Refused` where one is there already and `force` is not given."""
    path = destination.expanduser()
    if path.is_dir():
        raise Refused(f"--output {destination}: expected a file, got a folder")
    if not force and (path.exists() or path.is_symlink()):
        raise Refused(f"--output {destination}: there is a file; --force overwrites it")
    write(path, text)


# --- the forms -------------------------------------------------------------------------------


def _comments(lines: Iterable[str]) -> str:
    """Each as one line that begins with `#`."""
    return "".join(f"# {clean(line)}\n" for line in lines if line)


def _first(launch: Launch) -> list[str]:
    """What to do on the host beforehand, for a form that cannot do it itself."""
    if not launch.settings:
        return []
    return ["the GPUs were tuned too; set them on the host first, and after each boot:", *launch.settings]


def _command(launch: Launch) -> str:
    return "\n".join([*launch.settings, launch.command]) + "\n"


def systemd_word(word: str, *, command: bool = True) -> str:
    """One word of a systemd unit, quoted so that systemd reads exactly this word.

    `%` begins a specifier everywhere, `$` a variable in command lines only.
    """
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    if command:
        escaped = escaped.replace("$", "$$")
    escaped = "".join(f"\\x{ord(c):02x}" if ord(c) < 32 or ord(c) == 127 else c for c in escaped)
    return escaped if re.fullmatch(r"[A-Za-z0-9_@+=:,./%-]+", escaped) else f'"{escaped}"'


def _line(text: str) -> str:
    """A value that systemd does not split: a description or a folder."""
    return clean(text).replace("%", "%%")


def _systemd(launch: Launch) -> str:
    service = launch.service
    program = _program(service.argv[0], service.folder)
    words = [systemd_word(program, command=False), *map(systemd_word, service.argv[1:])]
    lines = [
        "[Unit]",
        f"Description={_line(launch.name)}: the setting that tune found",
        "After=network-online.target",
        "Wants=network-online.target",
        "",
        "[Service]",
        "Type=exec",
        "# Add User=NAME: somebody who may read the model.",
    ]
    if service.folder:
        lines.append(f"WorkingDirectory={_line(service.folder)}")
    for name, value in service.env.items():
        lines.append(f"Environment={systemd_word(f'{name}={value}', command=False)}")
    # `+`: as root, whatever User= says. They outlive the service, like any setting of a GPU.
    for setting in launch.settings:
        tool, *rest = shlex.split(setting.removeprefix("sudo "))
        lines.append(" ".join([f"ExecStartPre=+{_program(tool, None)}", *map(systemd_word, rest)]))
    lines += [
        f"ExecStart={' '.join(words)}",
        "Restart=on-failure",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return f"{_comments(launch.about)}\n" + "\n".join(lines) + "\n"


def _program(name: str, folder: str | None) -> str:
    """Where a program lies here, in PATH or beside this Python; systemd looks in folders of its own."""
    if "/" in name:
        return str(Path(folder or ".").absolute() / name)
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent)) or name


def yaml_text(text: str) -> str:
    """A text as a JSON string, which YAML reads as the same text."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if _printable(c) else f"\\u{ord(c):04x}" for c in quoted)


def _printable(character: str) -> bool:
    """What a YAML stream may hold as it is, without the line breaks that only Unicode knows."""
    code = ord(character)
    return (
        0x20 <= code <= 0x7E
        or (0xA0 <= code <= 0xD7FF and code not in (0x2028, 0x2029))
        or (0xE000 <= code <= 0xFFFD and code != 0xFEFF)
        or code >= 0x10000
    )


Yaml = str | int | bool | list["Yaml"] | dict[str, "Yaml"]


def yaml(value: Yaml, indent: int = 0) -> str:
    """Block style, keys in the order that they come in. No list and no mapping in it may be empty."""
    pad = " " * indent
    lines = []
    if isinstance(value, dict):
        for key, inner in value.items():
            nested = isinstance(inner, dict | list)
            lines.append(f"{pad}{_key(key)}:" + (f"\n{yaml(inner, indent + 2)}" if nested else f" {_scalar(inner)}"))
    elif isinstance(value, list):
        # The first line of what an entry holds stands beside its dash.
        lines += [f"{pad}- {yaml(inner, indent + 2).removeprefix(pad + '  ')}" for inner in value]
    else:
        return _scalar(value)
    return "\n".join(lines)


_WORDS = frozenset({"yes", "no", "true", "false", "null", "off", "on"})
"""What YAML 1.1 takes for something else than a text."""


def _key(text: str) -> str:
    plain = re.fullmatch(r"[A-Za-z]{3}[A-Za-z_./]*", text) and text.lower() not in _WORDS
    return text if plain else yaml_text(text)


def _scalar(value: Yaml) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else yaml_text(str(value))


def _dollars(text: str) -> str:
    """Compose and Kubernetes put variables in for `$`; doubled, it is itself."""
    return text.replace("$", "$$")


def _compose(launch: Launch) -> str:
    service = launch.service
    assert service.image is not None
    one: dict[str, Yaml] = {"image": _dollars(service.image), "command": [_dollars(w) for w in service.image_argv]}
    if service.env:
        one["environment"] = {name: _dollars(value) for name, value in service.env.items()}
    if service.port:
        # Such servers let in everybody who reaches them.
        one["ports"] = [f"127.0.0.1:{service.port}:{service.port}"]
    if service.paths:
        one["volumes"] = [
            {"type": "bind", "source": _dollars(path), "target": _dollars(path), "read_only": True}
            for path in service.paths
        ]
    if service.gpus:
        gpu: dict[str, Yaml] = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        one["deploy"] = {"resources": {"reservations": {"devices": [gpu]}}}
    one["restart"] = "unless-stopped"
    if not service.image_argv:
        del one["command"]
    return f"{_comments([*launch.about, *_first(launch)])}\n{yaml({'services': {launch.name: one}})}\n"


def _kubernetes(launch: Launch) -> str:
    service, name = launch.service, launch.name
    assert service.image is not None
    container: dict[str, Yaml] = {"name": name, "image": service.image}
    if service.image_argv:
        container["args"] = [_dollars(w) for w in service.image_argv]
    if service.env:
        container["env"] = [{"name": key, "value": _dollars(value)} for key, value in service.env.items()]
    if service.port:
        container["ports"] = [{"name": "http", "containerPort": service.port}]
        container["readinessProbe"] = {"tcpSocket": {"port": service.port}, "periodSeconds": 5}
    if service.gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": max(1, launch.gpus)}}
    pod: dict[str, Yaml] = {"containers": [container]}
    if service.paths:
        container["volumeMounts"] = [
            {"name": f"path-{n}", "mountPath": path, "readOnly": True} for n, path in enumerate(service.paths)
        ]
        pod["volumes"] = [{"name": f"path-{n}", "hostPath": {"path": path}} for n, path in enumerate(service.paths)]
    labels: dict[str, Yaml] = {"app": name}
    deployment: dict[str, Yaml] = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            # A second copy beside the first would wait for a GPU that the first one holds.
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    documents = [yaml(deployment)]
    if service.port:
        documents.append(
            yaml(
                {
                    "apiVersion": "v1",
                    "kind": "Service",
                    "metadata": {"name": name},
                    "spec": {
                        "selector": labels,
                        "ports": [{"name": "http", "port": service.port, "targetPort": "http"}],
                    },
                }
            )
        )
    need = ["the node must have these paths; a volume of your own may stand in their place"] if service.paths else []
    return f"{_comments([*launch.about, *need, *_first(launch)])}\n" + "\n---\n".join(documents) + "\n"


def _modelfile(launch: Launch) -> str:
    return f"{_comments([*launch.about, *_first(launch)])}\n{(launch.service.modelfile or '').strip()}\n"


def _python(launch: Launch) -> str:
    text = f"{_comments([*launch.about, *_first(launch)])}\n{(launch.service.python or '').strip()}\n"
    compile(text, "<tune apply>", "exec")
    return text


_RENDER: Mapping[str, Callable[[Launch], str]] = {
    "command": _command,
    "systemd": _systemd,
    "compose": _compose,
    "kubernetes": _kubernetes,
    "modelfile": _modelfile,
    "python": _python,
}
