"""The symmetric inverse that recursive methods keep, and its rank-one changes: at once, or a few of them together.

A step that changes all of R [M, M] writes M^2 numbers, and on most machines that takes several times as long as reading them. With
``delay`` = B the changes wait in a matrix U [B, M] of their own,

    R = R_0 - U^T diag(sgn) U        R phi = R_0 phi - U^T (sgn * (U phi))

so that an update reads R_0 once and writes 2 M numbers in place of M^2. The step ``refresh`` adds B changes up in one matrix product.
The mathematics is the same; results differ from those without delay by rounding.

Source: delayed updates as in McDaniel et al., "Delayed Slater determinant update algorithms for high efficiency quantum Monte Carlo",
J. Chem. Phys. 147 (2017), without its small inverse, as each change here is known in full when it comes.
"""

import torch
from torch import Tensor

from edgecl.learner import State
from edgecl_device.manifest import AGE


class Inverse:
    """R [M, M] in a learner's state under ``name``.

    With a delay the state has ``waiting`` [B, M], whose rows are U's; ``sign`` [B], 0 where none waits; and ``age`` float32 [], how many
    wait.

    Args:
        name: Name of R.
        size: M.
        delay: B; 0 changes R at every update.
        dtype: Of R and U.
    """

    def __init__(self, name: str, size: int, delay: int, dtype: torch.dtype) -> None:
        self._name = name
        self._size = size
        self._delay = delay
        self._dtype = dtype

    def init(self, regulariser: float) -> State:
        """R is the identity over ``regulariser``, nothing waits."""
        state = {self._name: torch.eye(self._size, dtype=self._dtype) / regulariser}
        if not self._delay:
            return state
        waiting = torch.zeros(self._delay, self._size, dtype=self._dtype)
        return {**state, "waiting": waiting, "sign": torch.zeros(self._delay, dtype=self._dtype), AGE: torch.zeros(())}

    def times(self, state: State, row: Tensor) -> Tensor:
        """``row`` [1, M] times R."""
        product = torch.mm(row, state[self._name])
        if not self._delay:
            return product
        shares = torch.mm(row, state["waiting"].t()) * (state["sign"] * -1.0).unsqueeze(0)
        return torch.addmm(product, shares, state["waiting"])

    def has_room(self, state: State) -> Tensor | None:
        """Whether one more change can wait, bool []; None without a delay."""
        return state[AGE] < self._delay if self._delay else None

    def less(self, state: State, u: Tensor, negative: Tensor | None = None) -> State:
        """What changes in the state when R becomes R - u^T u, for u [1, M]; R + u^T u where ``negative``, bool [1, 1], is true."""
        minus = u * -1.0
        if not self._delay:
            return {self._name: torch.addmm(state[self._name], (minus if negative is None else torch.where(negative, u, minus)).t(), u)}
        chosen = torch.arange(self._delay) == state[AGE]
        sign = torch.ones(1, dtype=self._dtype) if negative is None else torch.where(negative, -1.0, 1.0).to(self._dtype).reshape(1)
        return {
            "waiting": torch.where(chosen.unsqueeze(1), u, state["waiting"]),
            "sign": torch.where(chosen, sign, state["sign"]),
            AGE: state[AGE] + 1.0,
        }

    def refreshed(self, state: State) -> State:
        """What changes when all that waits goes into R.

        The rows become zero, as nothing of a sample may stay behind that ``forget`` takes out. The square of a row has no sign that
        a product with zero would keep, and is in R already: it is as finite.
        """
        waiting = state["waiting"]
        return {
            self._name: torch.addmm(state[self._name], (waiting * (state["sign"] * -1.0).unsqueeze(1)).t(), waiting),
            "waiting": waiting * waiting * 0.0,
            "sign": state["sign"] * 0.0,
            AGE: state[AGE] * 0.0,
        }
