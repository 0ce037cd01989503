"""What every runner keeps, whatever engine it drives.

A test class inherits `RunnerContract`, gives the fixtures `runner` and `target` and one configuration
that its engine cannot load, and gets these tests. Engines are started for real: choose a target that
loads in a fraction of a second.
"""

from __future__ import annotations

import inspect
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, get_args

import psutil
import pytest

from tuner.space import Config, Effect, Lever, Refused, Scope, SearchSpace, Value
from tuner.trial import Target, Work


class RunnerContract:
    unloadable: ClassVar[Mapping[str, Value]]
    """Changes to the default configuration that the engine itself refuses. The space may not know them."""

    unreadable: ClassVar[frozenset[str]] = frozenset()
    """Parameters that the engine gives no way to read back; each has its reason in the runner."""

    unit: ClassVar[str] = "token"
    """What a pass makes; images have no prompt tokens to count."""

    starts_none: ClassVar[bool] = False
    """Whether it starts no engine: a client is printed, where others print a command."""

    one_clock: ClassVar[str | None] = None
    """Why prefill and decode cannot be timed apart; None where they are."""

    @pytest.fixture
    def runner(self) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def target(self) -> Target:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def engine_log(self, log: Path) -> Path:
        return log

    @pytest.fixture
    def space(self, runner: Any, target: Target) -> SearchSpace:
        space = runner.space(target)
        assert isinstance(space, SearchSpace)
        return space

    @pytest.fixture
    def default(self, space: SearchSpace) -> Config:
        return space.default()

    def test_the_four_functions_take_what_the_protocol_says(self, runner: Any) -> None:
        taken = {"space": ["target"], "identity": ["target"], "launch": ["config", "target"]}
        last = {"client": ["config", "target", "said"]} if self.starts_none else {"command": ["config", "target"]}
        assert {n: list(inspect.signature(getattr(runner, n)).parameters) for n in taken | last} == taken | last
        assert hasattr(runner, "command") != self.starts_none

    def test_the_default_configuration_passes_its_own_check(self, space: SearchSpace, default: Config) -> None:
        assert space.check(default) == default

    def test_every_parameter_says_what_it_does_when_it_changes_and_what_it_costs(self, space: SearchSpace) -> None:
        assert space.parameters
        for parameter in space.parameters:
            assert len(parameter.meaning.split()) >= 5, f"{parameter.name}: a name is no sentence"
            assert not parameter.meaning.endswith("."), f"{parameter.name}: tables and prompts add the full stop"
            assert "\n" not in parameter.meaning
            assert parameter.scope in get_args(Scope)
            assert parameter.effect in get_args(Effect)
            assert parameter.lever in get_args(Lever)

    def test_nothing_lossy_is_offered_unless_it_is_allowed(self, runner: Any, target: Target) -> None:
        assert not target.allow_lossy
        assert [p.name for p in runner.space(target).parameters if p.effect == "lossy"] == []

    def test_the_space_is_the_same_each_time_it_is_asked_for(self, runner: Any, target: Target) -> None:
        assert runner.space(target).record() == runner.space(target).record()

    def test_identity_names_engine_version_and_model(self, runner: Any, target: Target) -> None:
        identity = runner.identity(target)
        assert identity == runner.identity(target)
        assert {"engine", "engine_version", "model"} <= set(identity)
        assert all(isinstance(value, str) and value for value in identity.values())

    def test_a_pass_counts_exactly_the_work_that_was_asked_for(
        self, runner: Any, target: Target, default: Config
    ) -> None:
        with runner.launch(default, target) as engine:
            passes = [engine.run_pass() for _ in range(2)]
        for work in passes:
            assert isinstance(work, Work)
            assert work.unit == self.unit
            assert work.units == target.prompts * (target.output_tokens if self.unit == "token" else 1)
            if self.unit == "token":
                assert work.prompt_tokens == target.prompts * target.prompt_tokens
            assert len(work.request_seconds) == target.prompts
            assert all(seconds > 0 for seconds in work.request_seconds)

    def test_prefill_and_decode_are_timed_apart(self, runner: Any, target: Target, default: Config) -> None:
        with runner.launch(default, target) as engine:
            work = engine.run_pass()
        if self.one_clock:
            assert (work.prefill_seconds, work.decode_seconds) == (None, None), "they are timed, so take one_clock away"
            return
        assert work.prefill_seconds > 0
        assert work.decode_seconds > 0
        assert work.prefill_seconds + work.decode_seconds <= sum(work.request_seconds) * 1.05

    def test_every_tunable_parameter_is_read_back_from_the_engine(
        self, runner: Any, target: Target, space: SearchSpace, default: Config
    ) -> None:
        with runner.launch(default, target) as engine:
            effective = dict(engine.effective)
        assert set(space.names) - set(effective) == self.unreadable
        assert all(isinstance(value, bool | int | float | str) for value in effective.values())

    def test_shutdown_leaves_no_thread_process_or_port_behind(
        self, runner: Any, target: Target, default: Config
    ) -> None:
        with runner.launch(default, target):
            pass  # what the engine's libraries keep for the life of the process exists from here on
        before = _traces()
        with runner.launch(default, target) as engine:
            engine.run_pass()
        assert _until(lambda: _traces() <= before), f"left behind: {_traces() - before}"

    def test_shutdown_after_a_failure_inside_the_block_leaves_nothing_behind(
        self, runner: Any, target: Target, default: Config
    ) -> None:
        with runner.launch(default, target):
            pass
        before = _traces()
        with pytest.raises(ZeroDivisionError), runner.launch(default, target):
            raise ZeroDivisionError
        assert _until(lambda: _traces() <= before), f"left behind: {_traces() - before}"

    def test_what_the_engine_cannot_load_raises_and_is_not_measured(
        self, runner: Any, target: Target, default: Config
    ) -> None:
        with (
            pytest.raises((RuntimeError, Refused)) as raised,
            runner.launch({**default, **self.unloadable}, target),
        ):
            pytest.fail("an engine was yielded")
        assert str(raised.value)

    def test_the_command_survives_the_shell(self, runner: Any, target: Target, space: SearchSpace) -> None:
        for parameter in space.free:
            for value in parameter.neighbours(parameter.default):
                config = {**space.default(), parameter.name: value}
                if self.starts_none:
                    command = runner.client(config, target, runner.identity(target)).command()
                else:
                    command = runner.command(config, target)
                assert shlex.join(shlex.split(command)) == command


def _traces() -> set[tuple[str, int]]:
    """What this process holds that a stopped engine must have given back."""
    me = psutil.Process()
    listening = {("port", c.laddr.port) for c in me.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return listening | {("thread", t.id) for t in me.threads()} | {("process", c.pid) for c in me.children(True)}


def _until(holds: Callable[[], bool], seconds: float = 5) -> bool:
    """Whether `holds` within a while: the kernel takes a moment to forget a thread."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
