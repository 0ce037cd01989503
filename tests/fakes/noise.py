"""A machine that never measures the same twice: what simulated studies run on. Seeded.

    ln(J/unit of a window) = ln(true) + launch + drift(t) + disturbance + window

    launch        N(0, .) for each start of the engine: memory layout, clocks, neighbours
    window        N(0, .) for each window of a launch
    drift(t)      warm-up, an exponential approach (leakage grows with temperature), plus wander, an
                  Ornstein-Uhlenbeck process, which is AR(1) at equal distances
    disturbance   now and then a launch is several percent too high: something else was running. Exponential,
                  so that the tail is heavy

Time is simulated; it advances with each launch. Nothing sleeps.
"""

import math
import random
from dataclasses import dataclass

from tuner.evaluate import Launcher
from tuner.trial import Energy, Measurement, Trial, Work

WINDOW_SHARE = 0.5
"""Spread between the windows of a launch, as a share of that between launches: what llama.cpp shows on two cores."""

UNITS = 256


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How bad it is. Shares, in ln(J/unit)."""

    sigma: float = 0.02
    """Standard deviation between launches, their windows' part included."""
    warm_up: float = 0.03
    """What the warm-up adds in the end."""
    warm_up_seconds: float = 900.0
    """Its time constant."""
    wander: float = 0.01
    """Standard deviation of the wander."""
    wander_seconds: float = 1800.0
    """Its correlation time."""
    disturbed: float = 0.03
    """Share of the launches that are disturbed."""
    disturbance: float = 0.05
    """Mean of what a disturbance adds."""
    launch_seconds: float = 30.0
    """Loading and windows."""


def still(sigma):
    """Launches that differ by `sigma` and by nothing else."""
    return Conditions(sigma=sigma, warm_up=0.0, wander=0.0, disturbed=0.0)


class Machine:
    """Launches configurations one after the other; `truth` gives their J/unit where nothing disturbs."""

    def __init__(self, conditions, seed, truth=lambda config: 1.0):
        self.conditions, self.truth = conditions, truth
        self.random = random.Random(f"machine {seed}")
        self.seconds = 0.0
        self.launches = 0
        self._wander = self.random.gauss(0, conditions.wander)

    def drift(self):
        """ln of what the machine now uses over what it used cold."""
        here = self.conditions
        return here.warm_up * -math.expm1(-self.seconds / here.warm_up_seconds) + self._wander

    def launch(self, config, windows=5):
        """The windows of one launch, as J/unit."""
        here, draw = self.conditions, self.random
        of_window = WINDOW_SHARE * here.sigma
        of_launch = math.sqrt(here.sigma**2 - of_window**2 / windows)
        level = math.log(self.truth(config)) + self.drift() + draw.gauss(0, of_launch)
        if draw.random() < here.disturbed:
            level += draw.expovariate(1 / here.disturbance)
        self._pass(here.launch_seconds)
        return tuple(math.exp(level + draw.gauss(0, of_window)) for _ in range(windows))

    def _pass(self, seconds):
        keep = math.exp(-seconds / self.conditions.wander_seconds)
        self._wander = keep * self._wander + self.random.gauss(0, self.conditions.wander * math.sqrt(1 - keep * keep))
        self.seconds += seconds
        self.launches += 1


def measured(joules_per_unit, seconds=2.0):
    """A window as a meter would record it."""
    joules = joules_per_unit * UNITS
    return Measurement(
        work=Work(units=UNITS, prompt_tokens=768, prefill_seconds=1.0, decode_seconds=3.0),
        seconds=seconds,
        energy={"cpu0": Energy(joules, joules, joules)},
        quality="simulated",
        meter="simulated",
        cpu_seconds=3.0,
        other_cpu_seconds=0.0,
    )


def launched(machine, number, proposal, segment=0, windows=5):
    """One launch as a trial."""
    return Trial(
        number=number,
        config=proposal.config,
        proposal=proposal,
        measurements=tuple(map(measured, machine.launch(proposal.config, windows))),
        seconds=machine.conditions.launch_seconds,
        load_seconds=2.0,
        segment=segment,
    )


@dataclass(frozen=True, kw_only=True)
class Simulated(Launcher):
    """The launcher, without a worker."""

    machine: Machine

    def __call__(self, number, proposal):
        self.report(number, "measuring")
        return launched(self.machine, number, proposal, self.segment, self.plan.windows)
