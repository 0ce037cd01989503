"""Comparisons made up for tests of what is computed and drawn from them: no method, table or model in them is real."""

import math
import random

from tuner.runs import Problem, Run, Step

METHODS = ("rules", "sobol", "random", "tpe", "gp", "cmaes", "enhanced", "baseline")
LLM_METHODS = ("enhanced", "baseline")
NAMES = (
    "text-to-image-stable-example-3.5-medium",
    "image-chat-example-vl-235b-a22b-instruct-anyprec",
    "gpqa-example-oss-120b",
    "lm-arena-chat-example-3.1-405b-instruct-anyprec",
    "text-to-image-example-dit-v1.2-diffusers",
    "a40-squad-example-base-uncased",
    "v100-cifar100-example-net-v2",
    "tx2-example-v3-400px",
    "lm-arena-chat-example-32b",
    "llm-chat-8x22b-instruct-v0.1",
    "1024-example-3-8b",
    "text-to-image-example-sigma-xl-2-1024-ms",
)
SKILL = {"rules": 0.55, "gp": 0.5, "tpe": 0.4, "enhanced": 0.7, "baseline": 0.45, "cmaes": 0.3}
"""How often a step goes to a neighbour of the best row instead of anywhere."""


def table(name, rows=90, seed=0):
    """(joules, throughput, feasible) of each row, the best feasible one in the interior."""
    draw = random.Random(f"{name}-{seed}")
    scale = 10 ** draw.uniform(-1, 3)
    made = []
    for row in range(rows):
        batch = 2 ** (row * 8 / rows)
        joules = scale * (1 + 3 / batch) * math.exp(draw.gauss(0, 0.18))
        speed = 40 * batch**0.7 * math.exp(draw.gauss(0, 0.2)) / scale**0.5
        made.append((joules, speed))
    limit = sorted(speed for _, speed in made)[rows // 3]
    return [(joules, speed, speed >= limit) for joules, speed in made], limit


def problem(name, number=0, **fields):
    rows, limit = table(name)
    unit = ("token", "image", "epoch")[number % 3]
    given = {
        "name": name,
        "unit": unit,
        "objective": f"energy_per_{unit}_j",
        "parameters": ("max_num_seqs", "num_gpus", "gpu_model"),
        "configurations": len(rows),
        "feasible": sum(feasible for *_, feasible in rows),
        "best_joules_per_unit": min(joules for joules, _, feasible in rows if feasible),
        "default_joules_per_unit": rows[-1][0],
        "limits": (f"throughput_{unit}s_per_sec>={limit:.5g}",),
        "facts": {
            "hardware": "Example GPU x 8",
            "model": "example/model-1",
            "engine": "engine 0.1",
            "source": "made up for tests",
            "licence": "Apache-2.0",
            "trust": "A",
        },
    } | fields
    return Problem(**given)


def problems(count=12):
    return [problem(name, number) for number, name in enumerate(NAMES[:count])]


def run(of, method, seed, budget=20, stop=None, **fields):
    """One run: step 0 is the table's last row, then random rows or, by skill, rows like the best ones."""
    rows, limit = table(of.name)
    draw = random.Random(f"{of.name}-{method}-{seed}")
    ranked = sorted(range(len(rows)), key=lambda row: (not rows[row][2], rows[row][0]))
    steps = []
    for number in range(budget + 1 if stop is None else stop):
        reach = max(3, round(len(rows) * 0.9 ** (number * 1.7)))
        skilled = draw.random() < SKILL.get(method, 0.0)
        row = len(rows) - 1 if number == 0 else draw.choice(ranked[:reach] if skilled else ranked)
        joules, speed, feasible = rows[row]
        failed = number > 0 and draw.random() < 0.02
        steps.append(
            Step(
                number=number,
                config={"row": row},
                joules_per_unit=None if failed else joules,
                true_joules_per_unit=None if failed else joules,
                feasible=feasible and not failed,
                error="out of memory" if failed else None if feasible else f"throughput below {limit:.5g}",
                units_per_second=None if failed else speed,
            )
        )
    prompts = budget if method in LLM_METHODS else 0
    given = {
        "problem": of.name,
        "method": method,
        "seed": seed,
        "steps": tuple(steps),
        "budget": budget,
        "prompts": prompts,
        "input_tokens": 900 * prompts if prompts else None,
        "output_tokens": 120 * prompts if prompts else None,
        "llm": "example-chat-1" if prompts else None,
        "seconds": 1.5,
        "started_unix": 1_790_000_000.0 + seed,
    } | fields
    return Run(**given)


def runs(of, methods=METHODS, seeds=50, budget=20):
    return [run(one, method, seed, budget) for one in of for method in methods for seed in range(seeds)]
