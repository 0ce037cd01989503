"""Ways of choosing the next configuration; each file is one way.

A proposer keeps no memory: what it says is a function of the search space, the history and the seed
it was built with. So a resumed study goes on as the uninterrupted one would have, and asking twice
gives the same answer. What it proposes is legal, and is neither a configuration that was run before
(successfully or not) nor one that the person turned down. None means that nothing of that kind is left.
"""

from __future__ import annotations

from importlib.util import find_spec

from tuner.space import Refused, closest, excerpt
from tuner.trial import Proposer

CLASSICAL = ("rules", "sobol", "random", "tpe", "gp", "cmaes", "grid")
"""The proposers that need no chat model."""

LIMITED = ("largest",)
"""Those that make sense only where a limit may be broken: in comparisons, on problems that have one."""


def open_classical(name: str, seed: int) -> Proposer:
    """The proposer called `name`. Only its own file is imported: scipy and optuna take seconds.

    Args:
        name: one of `CLASSICAL` or `LIMITED`.
        seed: 0 or more; the same seed and history give the same proposals.

    Raises:
        Refused: there is no such proposer, the seed is negative, or `gp` is asked for without torch.
    """
    if seed < 0:
        raise Refused(f"--seed {seed}: expected 0 or more")
    match name:
        case "rules":
            from tuner.proposers.rules import Rules

            return Rules(seed)
        case "sobol":
            from tuner.proposers.sobol import Sobol

            return Sobol(seed)
        case "random":
            from tuner.proposers.random import Random

            return Random(seed)
        case "grid":
            from tuner.proposers.grid import Grid

            return Grid(seed)
        case "largest":
            from tuner.proposers.largest import Largest

            return Largest(seed)
        case "tpe" | "gp" | "cmaes":
            if name == "gp" and find_spec("torch") is None:
                raise Refused(
                    "--proposer gp: Optuna's Gaussian process needs torch, which is not installed;"
                    " `pip install torch` (the CPU build suffices), or take --proposer tpe"
                )
            from tuner.proposers.optuna_samplers import OptunaSampler

            return OptunaSampler(name, seed)
    choices = ", ".join(CLASSICAL)
    raise Refused(f"no proposer called {excerpt(name)}{closest(name, CLASSICAL)} (those without a chat are {choices})")
