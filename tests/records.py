"""Records that tests build studies from."""

from tuner.space import Choice, Constraint, Int, SearchSpace
from tuner.trial import Energy, Measurement, Proposal, Trial, Work

SPACE = SearchSpace(
    (
        Int(name="parallel", meaning="Sequences decoded together.", default=4, low=1, high=32, log=True),
        Int(name="threads", meaning="Threads that compute.", default=2, low=1, high=4),
        Choice(
            name="flash", meaning="Fused attention.", default="auto", values=("off", "on", "auto"), effect="numerics"
        ),
    ),
    (Constraint("threads <= parallel", lambda c: c["threads"] <= c["parallel"]),),
)

LOSSY = SearchSpace(
    (
        *SPACE.parameters,
        Choice(name="cache", meaning="Type of the cache.", default="f16", values=("f16", "q8", "q4"), effect="lossy"),
    ),
    SPACE.constraints,
)


def lossy(number, cache, joules_per_unit, loss=None, **changes):
    """A trial in `LOSSY`, whose engine reports `loss` where one is given."""
    figures = {} if loss is None else {"quality_loss": loss}
    return trial(number, {"cache": cache, **changes}, (joules_per_unit,), figures=figures)


def window(joules_per_unit, *, units=100, quality="measured", invalid=(), seconds=2.0):
    joules = joules_per_unit * units
    spread = 0.5 if quality == "estimated" else 0.0
    energy = {"cpu0": Energy(joules, joules * (1 - spread), joules * (1 + spread))}
    return Measurement(
        work=Work(units=units, prompt_tokens=300, prefill_seconds=1.0, decode_seconds=3.0),
        seconds=seconds,
        energy={} if invalid else energy,
        quality=quality,
        meter="rapl",
        cpu_seconds=3.0,
        invalid=tuple(invalid),
    )


def trial(number, changes=None, joules=(1.0, 1.01, 0.99), *, source="rules", error=None, segment=0, **more):
    config = {**SPACE.default(), **(changes or {})}
    proposal = more.pop("proposal", None) or Proposal(config=config, source="default" if number == 0 else source)
    return Trial(
        number=number,
        config=config,
        proposal=proposal,
        measurements=() if error else tuple(window(j) for j in joules),
        error=error,
        segment=segment,
        seconds=10.0,
        **more,
    )
