"""Masks on single weights: as the paper has them. They save no work: a dense product with zeros is a dense product."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgecl.learner import State
from edgecl.masks import Density, Schedule, cwi, magnitude, pack, top, unpack
from edgecl.methods._sparse_form import Choice, Form, Tensors, as_count


class Unstructured(Form):
    """Each sparse layer has its dense weights, zero where masked, and two bitmaps of one bit a weight: ``mask.NAME``, ``moves.NAME``."""

    def __init__(self, suffix: nn.Module, layers: Sequence[str], config: Any) -> None:
        self._suffix, self._layers, self._config = suffix, list(layers), config
        self._base = {name: suffix.get_parameter(f"{name}.weight").detach() for name in layers}
        share = (config.grow, config.exchange) if config.refresh_every else (0.0, 0.0)
        self.schedules = {name: Schedule(self._base[name].numel(), 1 - config.sparsity, *share) for name in layers}
        self._moving = {name: min(max(1, round((1 - config.gradient_sparsity) * s.units)), s.base) for name, s in self.schedules.items()}

    def init(self, weights: Tensors) -> State:
        """Masks by magnitude; of gradients, too."""
        state = {f"param.{name}": weight for name, weight in weights.items()}
        for name, schedule in self.schedules.items():
            weight = weights[f"{name}.weight"]
            score = magnitude(weight).reshape(-1)
            mask = top(score, torch.tensor([schedule.base]), schedule.base)
            state[f"param.{name}.weight"] = torch.where(mask.reshape(weight.shape), weight, 0.0)
            if self._config.refresh_every:  # one that stays is in the zeros, and in the bits of those that move
                state[f"mask.{name}"] = pack(mask)
            state[f"moves.{name}"] = pack(self._moves(name, score, mask))
        return state

    def scores(self, call: Callable[..., Tensor], parameters: Tensors, state: State, z: Any) -> Tensor:
        """The suffix itself: masked weights are zeros."""
        return call(self._suffix, parameters, z)

    def updated(self, parameters: Tensors, gradients: Tensors, state: State) -> Tensors:
        """Only weights whose bit in ``moves`` is set change; masked ones stay zero."""
        new = {}
        for name, parameter in parameters.items():
            new[name] = parameter - gradients[name]
            layer = name.removesuffix(".weight")
            if layer in self.schedules and name != layer:
                moves = unpack(state[f"moves.{layer}"], parameter.numel()).reshape(parameter.shape)
                new[name] = torch.where(moves, new[name], parameter)
        return new

    def refreshed(self, state: State, choice: Choice) -> State:
        """See the class; weights that grow start at zero, or at the bundle's own."""
        new: State = {}
        for name, schedule in self.schedules.items():
            key = f"{name}.weight"
            weight, mask = state[f"param.{key}"], unpack(state[f"mask.{name}"], schedule.units)
            if self.moves:
                worth = cwi(weight, choice.of_task[key], choice.of_memory[key], choice.alpha, choice.beta).reshape(-1)
                survive, grow = schedule.counts(as_count(mask), choice.new)
                kept = top(torch.where(mask, worth, -1.0), survive, schedule.most)
                free = torch.where(kept, -1, self.priorities(name, choice.draw))
                grown = top(free, grow, schedule.most_grown)
                start = self._base[name].reshape(-1) if self._config.regrow == "base" else 0.0
                flat = torch.where(kept, weight.reshape(-1), 0.0)
                new[f"param.{key}"] = torch.where(grown, start, flat).reshape(weight.shape)
                mask = kept | grown
                new[f"mask.{name}"] = pack(mask)
            pull = torch.where(mask, choice.movement(key).reshape(-1), -1.0)
            new[f"moves.{name}"] = pack(self._moves(name, pull, mask))
        return new

    def _moves(self, name: str, score: Tensor, mask: Tensor) -> Tensor:
        """Which weights an update changes, bool [P]: the highest scores, or all living ones, those that have grown for a while as well."""
        if self._config.gradient_sparsity == self._config.sparsity:
            return mask
        return top(score, torch.tensor([self._moving[name]]), self._moving[name])

    def densities(self) -> dict[str, Density]:
        """Of nominal work."""
        return {name: Density(s.base / s.units, self._moving[name] / s.units) for name, s in self.schedules.items()}

    def dense(self, state: State) -> Tensors:
        """The parameters."""
        return {name.removeprefix("param."): value for name, value in state.items() if name.startswith("param.")}
