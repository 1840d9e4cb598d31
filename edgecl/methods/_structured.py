"""Masks on blocks of output channels: a sparse layer is a smaller dense one, with its weights and the numbers of its channels as state."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgecl.learner import State
from edgecl.masks import Density, Schedule, by_unit, channels_of, cwi, magnitude, places, slots, top
from edgecl.methods._features import require
from edgecl.methods._sparse_form import Choice, Form, Tensors, as_count
from edgecl.methods._units import Units, place_of, units_of

_NORM = ("weight", "bias", "running_mean", "running_var")


class Structured(Form):
    """Each group of units has ``units.KEY`` int64 [k], the numbers of its blocks of channels; the first ``live.KEY`` int64 [1] count.

    ``param.NAME.weight`` of the layer that they are the output of is [k block, I, ...]; of the one that reads them, if it is one alone,
    [O, k block, ...]. ``moves.KEY`` int64 [m] are the places, of the k, of the blocks whose gradient an update computes, in both layers.
    Where a mask shrinks, the last blocks hold zeros. Masks that never change are no state: the numbers are constants.
    """

    def __init__(self, suffix: nn.Module, layers: Sequence[str], config: Any) -> None:
        self._suffix, self._config = suffix, config
        self._module, units = units_of(suffix, layers)
        self._units = {found.rows: found for found in units}
        share = (config.grow, config.exchange) if config.refresh_every else (0.0, 0.0)
        self.schedules = {}
        for found in units:
            mend = "use 1, or leave the layer out of sparse"
            require(
                found.channels % config.block == 0, "block", f"divide the {found.channels} channels of {found.rows}", config.block, mend
            )
            self.schedules[found.rows] = Schedule(found.channels // config.block, 1 - config.sparsity, *share)
        share = (1 - config.gradient_sparsity) / (1 - config.sparsity)
        self._moving = {key: max(1, round(share * s.base)) for key, s in self.schedules.items()}
        """Blocks whose gradient is computed."""
        self._first = {key: self._largest(key, found) for key, found in self._units.items()}

    def _largest(self, key: str, found: Units) -> Tensor:
        """The blocks of largest magnitude, in both layers of a pair."""
        schedule = self.schedules[key]
        score = self._over_pair(found, lambda name: magnitude(self._suffix.get_parameter(name).detach()))
        return places(top(score, torch.tensor([schedule.base]), schedule.base), schedule.most)

    def _numbers(self, state: State, key: str) -> tuple[Tensor, Tensor]:
        """The numbers of the blocks, int64 [k], and how many of them live, int64 [1]."""
        if self.moves:
            return state[f"units.{key}"], state[f"live.{key}"]
        return self._first[key], torch.tensor([self.schedules[key].base])

    def _selects(self, key: str) -> bool:
        """Whether an update computes the gradient of some blocks alone."""
        return bool(self._moving[key] < self.schedules[key].base)

    def _shrinks(self, key: str) -> bool:
        return self.schedules[key].most > self.schedules[key].base

    def init(self, weights: Tensors) -> State:
        """The first blocks."""
        block = self._config.block
        state = {f"param.{name}": weight for name, weight in weights.items()}

        def large(name: str) -> Tensor:
            return magnitude(state[f"param.{name}"])

        for key, found in self._units.items():
            schedule, rows, units = self.schedules[key], weights[f"{key}.weight"], self._first[key].clone()
            live = _live(torch.tensor([schedule.base]), schedule.most, block)
            channels = channels_of(units, block)
            if self.moves:
                state |= {f"units.{key}": units, f"live.{key}": torch.tensor([schedule.base])}
            state[f"param.{key}.weight"] = torch.where(_along(live, 0, rows.dim()), rows.index_select(0, channels), 0.0)
            if found.columns is not None:
                columns = weights[f"{found.columns}.weight"]
                state[f"param.{found.columns}.weight"] = torch.where(_along(live, 1, columns.dim()), columns.index_select(1, channels), 0.0)
            if self._selects(key):
                state[f"moves.{key}"] = self._chosen(key, self._over_pair(found, large))
        return state

    def _chosen(self, key: str, pull: Tensor) -> Tensor:
        moving = self._moving[key]
        return places(top(pull, torch.tensor([moving]), moving), moving)

    def scores(self, call: Callable[..., Tensor], parameters: Tensors, state: State, z: Any) -> Tensor:
        """The narrower network; only the output of a layer that many read is put into its places."""
        whole, where = dict(parameters), {}
        for key, found in self._units.items():
            units, count = self._numbers(state, key)
            channels = channels_of(units, self._config.block)
            bias = self._value(parameters, f"{key}.bias")
            if bias is not None:
                whole[f"{key}.bias"] = bias.index_select(0, channels)
            for norm in found.norms:
                for field in _NORM:
                    value = self._value(parameters, f"{norm}.{field}")
                    if value is not None:
                        whole[f"{norm}.{field}"] = value.index_select(0, channels)
            if found.columns is None:
                rest = torch.zeros(found.channels) if bias is None else bias
                live = _live(count, self.schedules[key].most, self._config.block)
                where[key] = place_of(channels, live, rest)
        return call(self._module, whole, z, where)

    def _value(self, parameters: Tensors, name: str) -> Tensor | None:
        """A trained tensor, or a frozen one; None where the layer has none."""
        if name in parameters:
            return parameters[name]
        module, _, field = name.rpartition(".")
        value: Tensor | None = getattr(self._suffix.get_submodule(module), field, None)
        return value

    def updated(self, parameters: Tensors, gradients: Tensors, state: State) -> Tensors:
        """Rows in ``moves`` change, of whose gradient alone anything is computed; channels that do not live stay zero."""
        new = {name: parameter - gradients[name] for name, parameter in parameters.items() if not self._sparse(name)}
        for key, found in self._units.items():
            most, block = self.schedules[key].most, self._config.block
            live = _live(self._numbers(state, key)[1], most, block)
            chosen = channels_of(state[f"moves.{key}"], block) if self._selects(key) else None
            slot = None if chosen is None else slots(chosen, torch.ones(chosen.shape[0], dtype=torch.bool), most * block)
            for layer, axis in ((key, 0), (found.columns, 1)):
                if layer is None:
                    continue
                weight, change = parameters[f"{layer}.weight"], gradients[f"{layer}.weight"]
                if chosen is not None and slot is not None:  # what moves lives
                    change = _taken(change.index_select(axis, chosen), axis, slot)
                elif self._shrinks(key):
                    change = change * _along(live, axis, change.dim()).to(change.dtype)
                new[f"{layer}.weight"] = weight - change
        return {name: new[name] for name in parameters}

    def _sparse(self, name: str) -> bool:
        return any(name in (f"{key}.weight", f"{found.columns}.weight") for key, found in self._units.items())

    def refreshed(self, state: State, choice: Choice) -> State:
        """Blocks of the lowest importance go, others come in at random; then the rows that move are chosen anew."""
        new: State = {}
        for key, found in self._units.items():
            source = self._exchange(key, found, state, choice, new) if self.moves else None
            if self._selects(key):
                pull = self._over_pair(found, choice.movement)
                if source is not None:  # no gradient is known of blocks that have just grown: they move
                    pull = torch.cat([pull.amax().reshape(1) + 1.0, pull]).index_select(0, source)
                alive = _live(self._numbers({**state, **new}, key)[1], self.schedules[key].most, 1)
                new[f"moves.{key}"] = self._chosen(key, torch.where(alive, pull, -1.0))
        return new

    def _over_pair(self, found: Units, score: Callable[[str], Tensor]) -> Tensor:
        """Sum of the scores of each block's weights, in both layers: [k]. ``score`` gives those of a weight by its name."""
        total = by_unit(score(f"{found.rows}.weight"), 0, self._config.block)
        return total if found.columns is None else total + by_unit(score(f"{found.columns}.weight"), 1, self._config.block)

    def _exchange(self, key: str, found: Units, state: State, choice: Choice, new: State) -> Tensor:
        """New units and weights; returns where each block of the compact weights was, counted from one, zero for those that grew."""
        schedule, block = self.schedules[key], self._config.block
        old, living = self._numbers(state, key)
        live = torch.arange(schedule.most) < living

        def worth(name: str) -> Tensor:
            return cwi(state[f"param.{name}"], choice.of_task[name], choice.of_memory[name], choice.alpha, choice.beta)

        score = self._over_pair(found, worth)
        slot = slots(old, live, schedule.units)
        score = torch.cat([torch.full((1,), -1.0), score]).index_select(0, slot)
        survive, grow = schedule.counts(as_count(live), choice.new)
        kept = top(score, survive, schedule.most)
        free = torch.where(kept, -1, self.priorities(key, choice.draw))
        grown = top(free, grow, schedule.most_grown)
        units = places(kept | grown, schedule.most)
        count = as_count(kept | grown)
        alive = torch.arange(schedule.most) < count
        source = torch.where(kept & (slot > 0), slot, 0).index_select(0, units)
        source = torch.where(alive, source, 0)
        channels = torch.where(source.unsqueeze(1) > 0, (source.unsqueeze(1) - 1) * block + torch.arange(1, block + 1), 0).reshape(-1)
        rows = _taken(state[f"param.{key}.weight"], 0, channels)
        if self._config.regrow == "base":
            began = self._suffix.get_parameter(f"{key}.weight").detach().index_select(0, channels_of(units, block))
            fresh = (channels == 0) & _live(count, schedule.most, block)
            rows = torch.where(_along(fresh, 0, rows.dim()), began, rows)
        new |= {f"units.{key}": units, f"live.{key}": count, f"param.{key}.weight": rows}
        if found.columns is not None:
            new[f"param.{found.columns}.weight"] = _taken(state[f"param.{found.columns}.weight"], 1, channels)
        return source

    def densities(self) -> dict[str, Density]:
        """Of nominal work, which is realised."""
        found: dict[str, Density] = {}
        for key, units in self._units.items():
            schedule = self.schedules[key]
            share = Density(schedule.base / schedule.units, self._moving[key] / schedule.units)
            found |= {layer: share for layer in (key, units.columns) if layer is not None}
        return found

    def dense(self, state: State) -> Tensors:
        """Compact weights in their places, zeros elsewhere."""
        whole = {name.removeprefix("param."): value for name, value in state.items() if name.startswith("param.")}
        for key, found in self._units.items():
            units, living = self._numbers(state, key)
            count = int(living) * self._config.block
            channels = channels_of(units, self._config.block)[:count]
            for layer, axis in ((key, 0), (found.columns, 1)):
                if layer is not None:
                    compact = whole[f"{layer}.weight"].narrow(axis, 0, count)
                    whole[f"{layer}.weight"] = torch.zeros_like(self._suffix.get_parameter(f"{layer}.weight")).index_add(
                        axis, channels, compact
                    )
        return whole


def _live(count: Tensor, most: int, block: int) -> Tensor:
    """Which channels of compact weights live, bool [most block]."""
    return torch.arange(most * block) < count * block


def _along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """A vector along one axis."""
    return vector.reshape([-1 if a == axis else 1 for a in range(rank)])


def _taken(x: Tensor, axis: int, source: Tensor) -> Tensor:
    """Entries along an axis by their place counted from one; zeros for zero."""
    nothing = x.narrow(axis, 0, 1) * 0.0  # computed: a constant of this size would be stored in the bundle
    return torch.cat([nothing, x], axis).index_select(axis, source)
