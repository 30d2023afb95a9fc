"""Which share of the total loss each term has: told at the start and after the first cut, with a warning where one
term of the imitation leaves nothing to the others.

Shares are weight x value. They say what is minimised, not what a gradient weighs, but a term of 80 % or more mostly
drowns the rest: the attention scores of a 12-layer teacher were 81 %.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from homodistil.metrics.term_labels import term_label

LIMIT = 0.8
"""Share of the total from which on a term is warned of."""
NOT_OF_A_COPY = ("mlm", "labels")
"""Terms that a copy of its teacher has: a cross-entropy to text or labels never falls to 0, and a copy begins with
nothing else, whatever it weighs."""


class Balance:
    """Reports the share of each term in the total loss.

    Args:
        name: of the run, for the lines.
        weights: of the terms that are trained.
        extra: names of those whose weights stand in loss.extra.
        task: of the run (data.task), for what the terms are called in the lines.
    """

    def __init__(self, name: str, weights: Mapping[str, float], extra: Collection[str] = (), task: str = "mlm") -> None:
        self._name, self._weights, self._extra, self._task = name, dict(weights), extra, task
        self._told: set[bool] = set()
        self.warned: set[str] = set()
        """Terms that were warned of."""

    def shares(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Term -> its share of the total, in [0, 1]; {} where there are not two terms to compare.

        Args:
            losses: unweighted, as logged: "loss/kl" and so on.
        """
        weighted = {name: weight * losses[f"loss/{name}"] for name, weight in self._weights.items()}
        total = sum(weighted.values())
        return {name: value / total for name, value in weighted.items()} if len(weighted) > 1 and total > 0 else {}

    def lines(self, step: int, losses: Mapping[str, float], hidden: int, is_cut: bool) -> list[str]:
        """What is to be said of the logged step `step`, of a student `hidden` wide: nothing nearly always.

        Args:
            is_cut: whether it was narrower than its teacher: imitating it costs a copy nothing, so this is told before
                and after the first cut.
        """
        shares = self.shares(losses)
        if not shares or is_cut in self._told:
            return []
        self._told.add(is_cut)
        total = sum(weight * losses[f"loss/{name}"] for name, weight in self._weights.items())
        heavy = [name for name, share in shares.items() if LIMIT < share < 1 and name not in NOT_OF_A_COPY]
        self.warned |= set(heavy)
        named = ", ".join(f"{term_label(name, self._task)} {share:.0%}" for name, share in shares.items())
        line = f"{self._name}: at step {step}, hidden {hidden}, the loss is {total:.4g}: {named}"
        return [line, *(self._warning(name, shares[name], total) for name in heavy)]

    def setting(self, name: str, weight: float) -> str:
        """How the config gives this weight to a term."""
        return f"loss.extra={{{name}: {weight:.2g}}}" if name in self._extra else f"loss.{name}={weight:.2g}"

    def _warning(self, name: str, share: float, total: float) -> str:
        """The weight it proposes makes the term as large as all others together."""
        weight = self._weights[name] * (1 - share) / share
        return (
            f"warning: the {name} term is {share:.0%} of the loss ({share * total:.3g} of {total:.3g}); "
            f"{self.setting(name, weight)} would make it as large as all the others together"
        )
