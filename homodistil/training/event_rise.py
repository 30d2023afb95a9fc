"""How much an event raises each term of the loss: the step behind it against the last logged step before it.

The ratio is logged (`event_rise/kl` and so on), and a term that an event lets run away is warned of, once, with what to
set. The values of the step behind an event stay on the device until the next logged step brings them along.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from homodistil.config.schema import LossConfig
from homodistil.metrics.term_labels import term_label
from homodistil.training.loss_balance import LIMIT, NOT_OF_A_COPY, Balance

MOST_RISE = 10.0
"""Times its value before an event, beyond which a term is warned of."""
MOST_RATIO = 1000.0
"""Times another term (by weight x value), beyond which a term that leaves nothing to the others is warned of."""


class BehindEvent(NamedTuple):
    """The step behind an event."""

    step: int
    losses: Mapping[str, float]
    """Term with a weight -> its unweighted value."""


class EventRises:
    """Compares the steps behind events with the logged step before them.

    Args:
        loss: weights, and what the terms compare.
        balance: of the same run.
        task: of the run (data.task), for what the terms are called.
    """

    def __init__(self, loss: LossConfig, balance: Balance, task: str = "mlm") -> None:
        self._loss, self._balance, self._task = loss, balance, task
        self._step, self._before, self._was_cut = 0, {}, False
        self._held: dict[int, Tensor] = {}
        self._behind: list[BehindEvent] = []
        self._warned: set[str] = set()

    # -- the steps behind events since the last logged step

    @property
    def names(self) -> list[str]:
        """Names of the terms that are followed."""
        return list(self._loss.weights)

    def hold(self, step: int, means: Tensor) -> None:
        """Keep the values of a step behind an event where they are. `means`: of `names` on this rank, (terms,)."""
        self._held[step] = means

    @property
    def held(self) -> list[Tensor]:
        return list(self._held.values())

    def receive(self, means: Sequence[float]) -> None:
        """What was `held`, one step behind the other, as means over ranks."""
        for i, step in enumerate(self._held):
            values = means[i * len(self.names) : (i + 1) * len(self.names)]
            self._behind.append(BehindEvent(step, dict(zip(self.names, values, strict=True))))
        self._held.clear()

    # -- a logged step

    def ratios(self) -> dict[str, float]:
        """Term -> the largest of its values behind these events, in units of its value before; of terms that were not
        0."""
        names = self.names if self._behind else ()
        largest = {name: max(self._ratio(name, event) for event in self._behind) for name in names}
        return {name: ratio for name, ratio in largest.items() if 0 < ratio < math.inf}

    def lines(self) -> list[str]:
        """One warning for each term that an event has let run away, the first time."""
        return [line for event in self._behind for name in self.names if (line := self._line(name, event))]

    def end(self, step: int, losses: Mapping[str, float], is_cut: bool) -> None:
        """Remember the logged step, which the next events are compared with.

        Args:
            losses: unweighted, as logged: "loss/kl" and so on.
            is_cut: whether the student was narrower than its teacher: what a copy has learnt to differ is no base.
        """
        self._step, self._was_cut = step, is_cut
        self._before = {name: losses[f"loss/{name}"] for name in self.names}
        self._behind.clear()

    # -- checkpoints

    def state_dict(self) -> dict:
        """What a resumed run goes on with, once nothing is `held`: JSON values."""
        behind = {str(event.step): dict(event.losses) for event in self._behind}
        return {"step": self._step, "before": self._before, "was_cut": self._was_cut, "behind": behind}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step, self._before, self._was_cut = state["step"], state["before"], state["was_cut"]
        self._behind = [BehindEvent(int(step), losses) for step, losses in state["behind"].items()]

    # -- what is said

    def _ratio(self, name: str, event: BehindEvent) -> float:
        """0 where there is nothing to compare with."""
        before = self._before.get(name, 0.0)
        return event.losses[name] / before if before > 0 else 0.0

    def _line(self, name: str, event: BehindEvent) -> str | None:
        text = None if name in self._warned else self._rise(name, event) or self._dominance(name, event)
        if text:
            self._warned.add(name)
        return text

    def _rise(self, name: str, event: BehindEvent) -> str | None:
        """Of a term that had a base to rise from."""
        ratio, has_base = self._ratio(name, event), self._was_cut or name in NOT_OF_A_COPY
        if not has_base or ratio <= MOST_RISE:
            return None
        before, after = self._before[name], event.losses[name]
        weight = self._loss.weights[name] / ratio
        return (
            f"warning: the event at step {event.step - 1} raised the {self._label(name)} term {ratio:.3g}-fold "
            f"({before:.3g} at step {self._step}, {after:.3g} at step {event.step}); set {self._remedy(name, weight)}"
        )

    def _dominance(self, name: str, event: BehindEvent) -> str | None:
        """Of a term that has nearly all of the loss, and another next to nothing; unless `balance` has just said so."""
        if name in NOT_OF_A_COPY or name in self._balance.warned:
            return None
        shares = self._balance.shares({f"loss/{term}": value for term, value in event.losses.items()})
        rest = {term: share for term, share in shares.items() if term != name and share > 0}
        least = min(rest, key=rest.get, default=None)
        if least is None or shares[name] <= LIMIT or shares[name] / rest[least] <= MOST_RATIO:
            return None
        times, weight = shares[name] / rest[least], self._loss.weights[name] * sum(rest.values()) / shares[name]
        rise = f" (a {self._ratio(name, event):.3g}-fold rise)" if self._ratio(name, event) else ""
        return (
            f"warning: behind the event at step {event.step - 1} the {self._label(name)} term is {shares[name]:.1%} of "
            f"the loss and {times:,.0f} times the {self._label(least)} term{rise}; set {self._remedy(name, weight)}"
        )

    def _remedy(self, name: str, weight: float) -> str:
        """What bounds the term, where it is not bounded; else `weight`, which makes it as small as wanted."""
        if name in ("hidden", "embedding") and self._loss.hidden_space == "raw":
            return "loss.hidden_space=normalised"
        if name == "attention" and self._loss.attention_target == "scores":
            return "loss.attention_target=centred_scores or probabilities_kl"
        return self._balance.setting(name, weight)

    def _label(self, name: str) -> str:
        return term_label(name, self._task)
