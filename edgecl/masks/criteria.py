"""Criteria: how much a weight, or a unit, is worth. Pure functions from tensors to scores; a higher score is kept."""

import math

import torch
from torch import Tensor

from edgecl_device.generator import WORD


def magnitude(weight: Tensor) -> Tensor:
    """``|w|``.

    Source: Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015; in continual
    learning PackNet (Mallya & Lazebnik, CVPR 2018) and dynamic sparse training (Mocanu et al., SET, 2018).

    >>> magnitude(torch.tensor([-2.0, 0.5])).tolist()
    [2.0, 0.5]
    """
    return weight.abs()


def gradient(of_loss: Tensor) -> Tensor:
    """``|g|``: of masked weights it says which ones the loss would move, of others which ones it moves.

    Source: Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery", ICML 2020 (growth).
    """
    return of_loss.abs()


def cwi(weight: Tensor, of_task: Tensor, of_memory: Tensor, alpha: float = 0.5, beta: float = 1.0) -> Tensor:
    """Continual weight importance ``|w| + alpha |dL~(task) / dw| + beta |dL(memory) / dw|``.

    Args:
        weight: Weights, of any shape.
        of_task: Gradient of the loss on the current task's samples, over its classes alone.
        of_memory: Gradient of the loss on replayed samples.
        alpha: Weight of the first.
        beta: Weight of the second.

    Source: Wang et al., "SparCL: Sparse Continual Learning on the Edge", NeurIPS 2022. The authors' code has one gradient for both terms:
    that of the last batch, zero where a weight is masked.

    >>> cwi(torch.tensor([1.0, -2.0]), torch.tensor([4.0, 0.0]), torch.tensor([-3.0, 0.25])).tolist()
    [6.0, 2.25]
    """
    return weight.abs() + of_task.abs() * alpha + of_memory.abs() * beta


def output_magnitude(output: Tensor) -> Tensor:
    """Sum of ``|y|`` of each output channel: [O] of outputs [N, O, ...].

    Source: Du et al., "Unlocking Continual Learning Abilities in Language Models" (MIGU), EMNLP Findings 2024. Their norm over all outputs
    changes no order.

    >>> output_magnitude(torch.tensor([[1.0, -3.0], [1.0, 0.0]])).tolist()
    [2.0, 3.0]
    """
    return output.abs().sum([0, *range(2, output.dim())])


def fixed_half(units: int) -> Tensor:
    """One for every second unit, zero for the others: the half that an update may change is known before the first sample.

    Source: Hui et al., "HFT: Half Fine-Tuning for Large Language Models", 2024, which freezes half of the parameters.

    >>> fixed_half(5).tolist()
    [0.0, 1.0, 0.0, 1.0, 0.0]
    """
    return (torch.arange(units) % 2).to(torch.float32)


def table_shape(units: int) -> tuple[int, int]:
    """Lengths of the two tables of drawn integers that :func:`random` makes the scores of so many units from.

    >>> table_shape(10), table_shape(2359296)
    ((3, 4), (1536, 1536))
    """
    rows = max(1, math.isqrt(units))
    return rows, -(-units // rows)


def random(first: Tensor, second: Tensor, units: int) -> Tensor:
    """A random integer below 2**32 for each unit, int64 [units], from few drawn ones: ``(first_i + second_j) mod 2**32``.

    The device draws about 2 sqrt(units) integers in place of ``units``; scores of any three units are independent. Equal ones are rare,
    and go to the lower index.

    Args:
        first: int64 [rows], drawn below 2**32; see :func:`table_shape`.
        second: int64 [columns], too.
        units: At most rows times columns.

    Source: simple tabulation, Patrascu & Thorup, "The Power of Simple Tabulation Hashing", J. ACM 2012, with a sum for their exclusive or.

    >>> random(torch.tensor([1, 2**32 - 1]), torch.tensor([0, 5]), 3).tolist()
    [1, 6, 4294967295]
    """
    joined = (first.unsqueeze(1) + second.unsqueeze(0)).reshape(-1)[:units]
    return torch.where(joined >= WORD, joined - WORD, joined)
