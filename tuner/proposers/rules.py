"""The offline adviser: what an expert would try first, then one change at a time from the best.

It is not a language model and learns nothing from one study to the next. What it knows is the table
`ADVICE`; everything else it reads off the trials:

1. The usual first moves, all at once.
2. From the best trial, single changes, the most promising first. A direction that has just paid off is
   followed further, one that cost energy elsewhere comes late, and what was tried from here is spent.
   A change that a constraint forbids is made together with one that makes it legal.
3. Two changes at once; then the same around the next best trials; then a random configuration.

While nothing has run without failing, it first asks for less and less memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from tuner.proposers.random import instead_of
from tuner.proposers.untried import Untried, inside
from tuner.space import Choice, Config, Float, Int, Parameter, SearchSpace, Value, show
from tuner.summary import ASSUMED, noise, percent_text, told_apart
from tuner.trial import History, Proposal

# --- what an expert knows --------------------------------------------------------------------

Target = Callable[[Parameter], Value | None]
"""The value that an expert would try first; None when there is no such value."""


def to(*wanted: Value) -> Target:
    """The first of `wanted` that is legal; `to()` knows the parameter and advises nothing."""
    return lambda parameter: next((w for w in wanted if _is_legal(parameter, w)), None)


def at_least(number: float) -> Target:
    """`number` or twice the default, whichever is more, as far as the range goes."""

    def target(parameter: Parameter) -> Value | None:
        default = parameter.default
        return None if isinstance(default, bool | str) else _nearest(parameter, max(number, 2 * default))

    return target


def share(fraction: float) -> Target:
    """Part of the high end of the range."""

    def target(parameter: Parameter) -> Value | None:
        top = parameter.at(_HIGH_END)
        return None if isinstance(top, bool | str) else _nearest(parameter, fraction * top)

    return target


_HIGH_END = math.nextafter(1.0, 0.0)


def _is_legal(parameter: Parameter, value: Value) -> bool:
    try:
        parameter.check(value)
    except ValueError:
        return False
    return True


def _nearest(parameter: Parameter, number: float) -> Value:
    """The legal value that is nearest to `number`: a target may lie outside the range of this machine."""
    if isinstance(parameter, Choice):
        return min(parameter.values, key=lambda v: abs(float(v) - number) if _is_number(v) else math.inf)
    low, high = parameter.at(0.0), parameter.at(_HIGH_END)
    clipped = min(max(number, float(low)), float(high))
    return parameter.check(clipped if isinstance(parameter.default, float) else round(clipped))


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Advice:
    """What is known about a parameter before anything is measured."""

    why: str
    target: Target
    usual: bool = True
    """Part of the first proposal, which makes all usual moves at once."""
    memory: bool = False
    """Lower values need less memory."""


_TOGETHER = "sequences decoded together share each read of the weights"
_IMAGES = "images made together share each read of the weights"
_CHUNK = "larger pieces of prompt share each read of the weights"
_FUSED = "the fused attention kernel moves less data through memory"
_SMALLER = "smaller weights are fewer bytes to read for each token"
_CACHE = "a quantised cache costs arithmetic and pays at long contexts only"
_COMPILED = "recorded or compiled kernels spare the CPU's work on each step"
_UNGUIDED = "without guidance there is one pass in place of two"
_STEPS = "each step costs the same energy"
_MEMORY = "more memory for the cache lets more sequences run"

ADVICE: Mapping[str, Advice] = {
    # Listed by expected effect, the largest first. Sequences in flight:
    "parallel": Advice(_TOGETHER, at_least(8), memory=True),
    "max_num_seqs": Advice(_TOGETHER, at_least(64), memory=True),
    "max_running_requests": Advice(_TOGETHER, at_least(64), memory=True),
    "max_batch_size": Advice(_TOGETHER, at_least(8), memory=True),
    "batch_size": Advice("what is computed together shares each read of the weights", at_least(8), memory=True),
    "num_images_per_prompt": Advice(_IMAGES, at_least(4), memory=True),
    "concurrency": Advice("an engine can only batch what it is sent at the same time", at_least(8), memory=True),
    "continuous_batching": Advice("a free slot takes the next request at once", to(True)),
    # Bytes and work for each token:
    "weights": Advice(_SMALLER, to("q4_0", "Q4_0", "q4_k_m", "Q4_K_M", "q8_0", "Q8_0")),
    "quantization": Advice(_SMALLER, to("int8", "fp8", "awq", "gptq"), usual=False),
    "gpu_layers": Advice("layers on the GPU keep the slower device out of the loop", share(1.0), memory=True),
    "repack": Advice("weights laid out for the vector units cost less per multiplication", to(True)),
    "flash_attention": Advice(_FUSED, to(True, "on")),
    "attention": Advice(_FUSED, to("flash_attention_2", "flash", "sdpa")),
    "attn_implementation": Advice(_FUSED, to("flash_attention_2", "sdpa")),
    "enforce_eager": Advice(_COMPILED, to(False)),
    "disable_cuda_graph": Advice(_COMPILED, to(False)),
    "compile": Advice(_COMPILED, to(True), usual=False),
    "async_scheduling": Advice("the next step is prepared while this one runs", to(True)),
    "guidance_scale": Advice(_UNGUIDED, to(1.0), usual=False),
    "guidance": Advice(_UNGUIDED, to(False), usual=False),
    "num_inference_steps": Advice(_STEPS, share(0.5), usual=False),
    "steps": Advice(_STEPS, share(0.25), usual=False),
    # The hardware; half of the logical processors are the cores of most machines:
    "threads": Advice(
        "where memory is waited for, a core's second thread adds power, not speed", share(0.5), usual=False
    ),
    "num_threads": Advice("a core's second thread adds power, not speed", share(0.5), usual=False),
    "gpu_sm_clock_mhz": Advice("decoding waits for memory: a lower clock costs little time", share(0.7), usual=False),
    "gpu_power_limit_w": Advice("the last watts buy the least speed", share(0.7), usual=False),
    # Prompt processing:
    "threads_batch": Advice("prompts are limited by arithmetic: every processor helps", share(1.0), usual=False),
    "max_num_batched_tokens": Advice(_CHUNK, at_least(8192), usual=False, memory=True),
    "n_ubatch": Advice(_CHUNK, at_least(512), usual=False, memory=True),
    "n_batch": Advice(_CHUNK, at_least(512), usual=False, memory=True),
    "max_prefill_tokens": Advice(_CHUNK, at_least(8192), usual=False, memory=True),
    "chunked_prefill_size": Advice(_CHUNK, at_least(4096), usual=False, memory=True),
    "enable_chunked_prefill": Advice("prompts fill the steps that decoding leaves half empty", to(True)),
    # Numbers and memory:
    "dtype": Advice("half the bytes for each weight", to("bfloat16", "float16"), usual=False),
    "kv_unified": Advice("one cache for all slots keeps no room for the length of each", to(True), usual=False),
    "attention_slicing": Advice("the fused attention kernel computes all heads at once", to(False)),
    "vae_slicing": Advice("smaller pieces may stay in the cache", to(True), usual=False),
    "channels_last": Advice("the layout in which convolutions read", to(True)),
    "cpu_offload_gb": Advice("weights that stay on the GPU are not copied at each step", to(0)),
    # Known, and rarely worth an early trial:
    "gpu_memory_utilization": Advice(_MEMORY, to(), memory=True),
    "mem_fraction_static": Advice(_MEMORY, to(), memory=True),
    "cache_type_k": Advice(_CACHE, to()),
    "cache_type_v": Advice(_CACHE, to()),
    "kv_cache_dtype": Advice(_CACHE, to()),
    "mmap": Advice("mapping the file changes the loading, hardly the decoding", to()),
}

# Expected savings in ln(joules per unit) before there is evidence: what orders untested changes among
# themselves and against tested ones. A direction that saved more than 15 % is followed before all of them.
_USUAL, _DOUBTFUL, _UNKNOWN, _AGAINST = 0.08, 0.05, 0.04, 0.02
_NOISE = 0.01
"""Trials that differ by less than this say that the parameter hardly matters."""
_FAILED = -1.0
"""A change that made a trial fail ranks as if it had cost 170 %."""


# --- what the trials say ---------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A configuration of this space that was run."""

    config: Config
    number: int
    log_energy: float | None
    """ln(joules per unit); None when it failed."""


@dataclass(frozen=True)
class Effect:
    """What a change of one value did, as far as two trials can tell."""

    old: Value
    new: Value
    saving: float
    """ln(energy before) - ln(energy after): 0.1 is a saving of 10 %, negative is a loss."""
    changed: int
    """In how many parameters the two trials differ; they share the saving equally."""
    failed: bool = False
    """The later trial failed: `saving` is a rank then, not a measurement."""
    margin: float = told_apart(ASSUMED)
    """A saving or loss below this cannot be told from noise."""

    def __str__(self) -> str:
        others = f" (one of {self.changed} changes, which share the effect)" if self.changed > 1 else ""
        if self.failed:
            result = "failed"
        elif self.saving > 0:
            result = f"used {percent_text(-math.expm1(-self.saving))} less"
        else:
            result = f"used {percent_text(math.expm1(-self.saving))} more"
        if not self.failed and abs(self.saving) < self.margin:
            result += " (within noise)"
        return f"{show(self.old)} -> {show(self.new)}{others} {result}"


def seen_trials(space: SearchSpace, history: History) -> list[Seen]:
    """The comparable trials whose configurations are of this space."""
    return [
        Seen(config, trial.number, math.log(energy) if (energy := trial.joules_per_unit) else None)
        for trial in history.current
        if (config := inside(space, trial.config)) is not None
    ]


def effects(space: SearchSpace, seen: Sequence[Seen], margin: float) -> dict[str, list[Effect]]:
    """What the trials tell about each parameter, from each earlier trial to each later one.

    Trials that differ in several parameters are compared only with the best before them, which they
    were most likely made from, and only when they saved: which of several changes cost energy cannot
    be told, and the others must not be blamed.
    """
    found: dict[str, list[Effect]] = {p.name: [] for p in space.free}
    best = math.inf
    for place, after in enumerate(seen):
        for before in seen[:place]:
            if before.log_energy is None:
                continue
            saving = _FAILED if after.log_energy is None else before.log_energy - after.log_energy
            names = [name for name in found if before.config[name] != after.config[name]]
            if len(names) == 1 or (before.log_energy == best and saving > 0):
                share_of_each, failed = saving / len(names), after.log_energy is None
                for name in names:
                    old, new = before.config[name], after.config[name]
                    found[name].append(Effect(old, new, share_of_each, len(names), failed, margin))
        best = best if after.log_energy is None else min(best, after.log_energy)
    return found


# --- what to do next -------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """Changes to make to a configuration, what they promise, and why."""

    changes: Config
    why: str
    promise: float = 0.0
    """Expected saving in ln(joules per unit)."""


class Rules:
    """Expert first moves, then improvement step by step from the best trial."""

    name = "rules"

    def __init__(self, seed: int) -> None:
        """Only the last resort, a random configuration, depends on `seed`."""
        self.seed = seed

    def propose(self, space: SearchSpace, history: History) -> Proposal | None:
        """The first move that leads to an untried configuration."""
        untried = Untried.of(space, history)
        for base, name, move in _moves(space, seen_trials(space, history), told_apart(noise(history))):
            config = {**base, **move.changes}
            if config in untried:
                changes = (f"{n} {show(base[n])} -> {show(v)}" for n, v in move.changes.items() if v != base[n])
                reason = f"{', '.join(changes)}, from {name}: {move.why}"
                return Proposal(config=space.check(config), source=self.name, reason=reason)
        return instead_of(self.name, "no rule leads to anything new", space, history, self.seed)


def _moves(space: SearchSpace, seen: Sequence[Seen], margin: float) -> Iterator[tuple[Config, str, Move]]:
    """Every move in the order in which it is to be tried: where from, the name of that, and what."""
    measured = sorted((s for s in seen if s.log_energy is not None), key=lambda s: (s.log_energy, s.number))
    bases = [(s.config, f"trial {s.number}") for s in measured if not space.broken(s.config)]
    bases = bases or [(space.default(), "the default")]
    best, best_name = bases[0]
    if seen and not measured:
        yield from ((best, best_name, move) for move in _less_memory(space))
    usual = _usual_moves(space, best)
    if not any(usual.changes.items() <= s.config.items() for s in seen):
        yield best, best_name, usual
    known = effects(space, seen, margin)
    for base, name in bases:
        steps = sorted(_steps(space, base, known, seen), key=lambda step: -step.promise)
        yield from ((base, name, _mended(space, base, step)) for step in steps)
        yield from ((base, name, pair) for pair in _pairs(steps))


def _less_memory(space: SearchSpace) -> Iterator[Move]:
    """All that takes memory one step lower, then two, until nothing can be lowered."""
    hungry = [p for p in space.free if p.name in ADVICE and ADVICE[p.name].memory]
    values: Config = {p.name: p.default for p in hungry}
    for _ in range(32):
        lower: Config = {
            p.name: min((values[p.name], *p.neighbours(values[p.name])), key=p.position)
            for p in hungry
        }  # fmt: skip
        if lower == values:
            return
        yield Move(lower, "nothing has run yet, so ask for less memory")
        values = lower


def _usual_moves(space: SearchSpace, base: Config) -> Move:
    """The usual first moves together, but for those that no constraint lets through."""
    config, reasons = base, []
    for parameter in _by_expectation(space):
        advice = ADVICE.get(parameter.name)
        target = advice.target(parameter) if advice and advice.usual else None
        if advice is None or target is None or target == config[parameter.name]:
            continue
        changed = {**config, **_mended(space, config, Move({parameter.name: target}, advice.why)).changes}
        if not space.broken(changed):
            config = changed
            reasons.append(advice.why)
    changes = {name: value for name, value in config.items() if value != base[name]}
    return Move(changes, "; ".join(dict.fromkeys(reasons)))


def _by_expectation(space: SearchSpace) -> list[Parameter]:
    """The free parameters, those with the largest expected effect first."""
    rank = {name: place for place, name in enumerate(ADVICE)}
    return sorted(space.free, key=lambda p: rank.get(p.name, len(rank)))


def _steps(
    space: SearchSpace, base: Config, known: Mapping[str, Sequence[Effect]], seen: Sequence[Seen]
) -> Iterator[Move]:
    """All single changes of `base`; of two that promise the same, the bolder one first."""
    for parameter in _by_expectation(space):
        old = base[parameter.name]
        values = set(
            _values_to_try(parameter, old, known[parameter.name], [s.config[parameter.name] for s in seen])
        ) - {old}
        here = parameter.position(old)
        for value in sorted(values, key=lambda v: (-abs(parameter.position(v) - here), -parameter.position(v))):
            promise, why = _promise(parameter, old, value, known[parameter.name])
            yield Move({parameter.name: value}, why, promise)


def _values_to_try(
    parameter: Parameter, old: Value, known: Sequence[Effect], tried: Sequence[Value]
) -> Iterator[Value]:
    """The advised value and the natural steps; on a range also further the way that paid off, and between."""
    if parameter.name in ADVICE and (advised := ADVICE[parameter.name].target(parameter)) is not None:
        yield advised
    if isinstance(parameter, Choice):
        yield from parameter.neighbours(old)
        return
    number = float(old)
    numbers = [*map(float, parameter.neighbours(old))]
    numbers += [_further(parameter, float(e.old), number) for e in known if e.new == old and e.saving > 0]
    ends = (float(parameter.at(0.0)), float(parameter.at(_HIGH_END)))
    next_integer = 1 if isinstance(parameter, Int) else 0  # too small a step to stand for its direction
    for side, end in zip((-1, 1), ends, strict=True):
        if bounds := [float(v) for v in tried if (float(v) - number) * side > 0]:
            numbers.append(_between(parameter, number, min(bounds, key=lambda v: abs(v - number))))
        elif not any((n - number) * side > next_integer for n in numbers):
            numbers.append(end)
    here = parameter.position(old)
    for value in (_nearest(parameter, n) for n in numbers):
        if abs(parameter.position(value) - here) >= _SMALLEST_STEP:
            yield value


def _further(parameter: Parameter, old: float, new: float) -> float:
    """Twice the step from `old` to `new`, once more from `new`."""
    return new * (new / old) ** 2 if _is_log(parameter) else new + 2 * (new - old)


def _between(parameter: Parameter, one: float, other: float) -> float:
    return math.sqrt(one * other) if _is_log(parameter) else (one + other) / 2


def _is_log(parameter: Parameter) -> bool:
    return isinstance(parameter, Int | Float) and parameter.log


_SMALLEST_STEP = 0.04
"""A fiftieth of a range: what a smaller step does is lost in the noise of the measurement."""


def _promise(parameter: Parameter, old: Value, new: Value, known: Sequence[Effect]) -> tuple[float, str]:
    """The expected saving of a change, and why it is expected: the trials first, then the table."""
    if isinstance(parameter, Choice) and not parameter.ordered:
        found = _from_effects_of_values(old, new, known)
    else:
        found = _from_effects_on_a_scale(parameter, old, new, known)
    return found or _from_advice(parameter, old, new)


def _from_effects_of_values(old: Value, new: Value, known: Sequence[Effect]) -> tuple[float, str] | None:
    """What the trials say about one value in place of another, where the values have no order."""
    for effect in sorted(known, key=lambda e: (e.changed, e.old != old)):
        if effect.new == new:
            return (effect.saving, str(effect)) if effect.saving > 0 else (effect.saving, f"{effect}{_LATE}")
        if effect.old == new and effect.saving > 0:
            return -effect.saving, f"{effect}{_LATE}"
    return None


def _from_effects_on_a_scale(
    parameter: Parameter, old: Value, new: Value, known: Sequence[Effect]
) -> tuple[float, str] | None:
    """What the nearest known change says about this one.

    Constants are judgements, not measurements: returns diminish, so the next step the same way is
    worth half of the last one; the other way from a loss is worth a quarter of it; between two tried
    values lies an eighth of what they differ in, and less off the middle.
    """
    at = parameter.position
    start, end = at(old), at(new)

    def distance(effect: Effect) -> float:
        # An effect elsewhere on the scale says less, and one that k changes share counts as k times as far.
        apart = abs(at(effect.old) + at(effect.new) - start - end) / 2
        return effect.changed * (0.05 + apart + (0.0 if old in (effect.old, effect.new) else 0.2))

    if not known:
        return None
    effect = min(reversed(known), key=distance)
    if abs(effect.saving) < _NOISE:
        return -_NOISE, f"{effect}, which is next to nothing{_LATE}"
    low, high = sorted((at(effect.old), at(effect.new)))
    if low < end < high and start in (low, high):
        share_of_way = abs(end - start) / (high - low)
        return min(_UNKNOWN, abs(effect.saving) / 8) * (
            1 - abs(2 * share_of_way - 1)
        ), f"{effect}, and the best may lie between"
    if (at(effect.new) - at(effect.old)) * (end - start) > 0:
        if effect.saving <= 0:
            return effect.saving, f"{effect}{_LATE}"
        return effect.saving * (1.0 if (effect.old, effect.new) == (old, new) else 0.5), str(effect)
    if effect.saving > 0:
        return -effect.saving, f"{effect}{_LATE}"
    if effect.failed:
        return None
    return min(_USUAL, -effect.saving / 4), f"{effect}, so the other way may save"


_LATE = ", but what promised more was tried"


def _from_advice(parameter: Parameter, old: Value, new: Value) -> tuple[float, str]:
    """What the table says about a change on which no trial has a say."""
    advice = ADVICE.get(parameter.name)
    if advice is None:
        return _UNKNOWN, "its effect is unknown"
    target = advice.target(parameter)
    if target is None:
        return _AGAINST, f"{advice.why}{_LATE}"
    if new == target:
        return (_USUAL if advice.usual else _DOUBTFUL), advice.why
    if _is_number(target):
        here, there, aim = (parameter.position(v) for v in (old, new, target))
        if (there - here) * (aim - here) > 0:
            return (_USUAL if advice.usual else _DOUBTFUL), advice.why
        return _UNKNOWN, f"its effect beyond {show(target)} is unknown"
    return _AGAINST, f"{show(target)} is usually better{_LATE}"


def _mended(space: SearchSpace, base: Config, move: Move) -> Move:
    """The move, with the first change of one other parameter that makes it legal where it is not."""
    config = {**base, **move.changes}
    if not space.broken(config):
        return move
    for parameter in space.free:
        if parameter.name in move.changes:
            continue
        old = base[parameter.name]
        values = parameter.values if isinstance(parameter, Choice) else parameter.neighbours(old)
        here = parameter.position(old)
        for value in sorted(values, key=lambda v: abs(parameter.position(v) - here)):
            if not space.broken({**config, parameter.name: value}):
                why = f"{move.why}; {parameter.name} changes with it so that it is allowed"
                return Move({**move.changes, parameter.name: value}, why, move.promise)
    return move


def _pairs(steps: Sequence[Move]) -> Iterator[Move]:
    """Two changes at once, the most promising first."""
    ranks = combinations(range(len(steps)), 2)
    for first, second in sorted(ranks, key=sum):
        one, other = steps[first].changes, steps[second].changes
        if one.keys() != other.keys():
            yield Move({**one, **other}, "every single change from here was tried")
