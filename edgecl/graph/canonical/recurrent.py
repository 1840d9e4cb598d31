"""Recurrent layers, unrolled: every step of a sequence of fixed length is in the graph.

The products with the inputs of all steps are one matrix product a layer; those with the hidden state are one a step. Signatures are those
of ``torch.gru`` and its like for plain tensors.

Source: the equations in PyTorch's documentation of ``nn.GRU``, ``nn.LSTM`` and ``nn.RNN``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Cell = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
"""New states, the first of which is the output, from the gates of input and hidden state, [N, gates * H] each, and old states [N, H]."""


def gru(x: Tensor, hidden: Tensor, weights: Sequence[Tensor], *options: Any) -> Any:
    """``torch.gru`` for plain tensors: outputs, and the last hidden state of each layer and direction."""
    found = _run(_gru_cell, x, (hidden,), weights, *options)
    return found if found is NotImplemented else (found[0], found[1][0])


def lstm(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], *options: Any) -> Any:
    """``torch.lstm`` for plain tensors: outputs, and the last hidden and cell state of each layer and direction."""
    found = _run(_lstm_cell, x, tuple(states), weights, *options)
    return found if found is NotImplemented else (found[0], *found[1])


def rnn_tanh(x: Tensor, hidden: Tensor, weights: Sequence[Tensor], *options: Any) -> Any:
    """``torch.rnn_tanh`` for plain tensors."""
    found = _run(lambda i, h, states: (torch.tanh(i + h),), x, (hidden,), weights, *options)
    return found if found is NotImplemented else (found[0], found[1][0])


def rnn_relu(x: Tensor, hidden: Tensor, weights: Sequence[Tensor], *options: Any) -> Any:
    """``torch.rnn_relu`` for plain tensors."""
    found = _run(lambda i, h, states: (torch.relu(i + h),), x, (hidden,), weights, *options)
    return found if found is NotImplemented else (found[0], found[1][0])


def _gru_cell(inputs: Tensor, hidden: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    size = states[0].shape[1]
    gates = torch.sigmoid(inputs[:, : 2 * size] + hidden[:, : 2 * size])
    reset, update = gates[:, :size], gates[:, size:]
    new = torch.tanh(inputs[:, 2 * size :] + reset * hidden[:, 2 * size :])
    return (new + update * (states[0] - new),)


def _lstm_cell(inputs: Tensor, hidden: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    size = states[0].shape[1]
    gates = inputs + hidden
    both, leave = torch.sigmoid(gates[:, : 2 * size]), torch.sigmoid(gates[:, 3 * size :])
    cell = both[:, size:] * states[1] + both[:, :size] * torch.tanh(gates[:, 2 * size : 3 * size])
    return leave * torch.tanh(cell), cell


def _run(
    cell: Cell,
    x: Tensor,
    states: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """Outputs [T, N, directions * H], and the last of each state [layers * directions, N, H]; with the batch in front if asked for."""
    directions, each = 1 + bidirectional, 2 + 2 * has_biases
    if len(weights) != layers * directions * each:  # a projection of the hidden state
        return NotImplemented
    x = x.transpose(0, 1) if batch_first else x
    last: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        parts = []
        for direction in range(directions):
            i = layer * directions + direction
            own = list(weights[i * each : (i + 1) * each]) + [None] * (4 - each)
            outputs, final = _direction(cell, x, tuple(state[i] for state in states), own, bool(direction))
            parts.append(outputs)
            last.append(final)
        x = torch.cat(parts, 2) if bidirectional else parts[0]
        if dropout and training and layer < layers - 1:
            x = F.dropout(x, dropout)
    return x.transpose(0, 1) if batch_first else x, tuple(torch.stack(kind) for kind in zip(*last, strict=True))


def _direction(
    cell: Cell, x: Tensor, states: tuple[Tensor, ...], weights: Sequence[Any], backwards: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    of_input, of_hidden, bias_input, bias_hidden = weights
    gates = F.linear(x, of_input, bias_input)
    found = []
    for step in reversed(range(len(x))) if backwards else range(len(x)):
        # one row at a time: each slice of one of unbind's results would be captured with all of them
        states = cell(gates[step], F.linear(states[0], of_hidden, bias_hidden), states)
        found.append(states[0])
    return torch.stack(found[::-1] if backwards else found), states
