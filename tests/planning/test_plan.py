"""Plans: exact costs, measured accuracy, the front, the budget."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from edgecl import METHODS, prepare
from edgecl.ledger import RAM
from edgecl.methods import NearestMean
from edgecl.planning import FLASH, Candidate, Costs, InfeasibleError, Limits, Option, plan
from edgecl.planning.search import front
from edgecl_device import Learner
from edgecl_device.errors import InputError
from edgecl_device.memory import memory_layout
from edgecl_export import export


def exported(small, split, option, folder):
    candidate, stream = option.candidate, small.scenario(split, 0)
    net = small.network()
    at = list(candidate.at) if isinstance(candidate.at, tuple) else candidate.at
    ready = prepare(net.model, at=at, example=net.example, method=candidate.method, classes=net.classes, config=candidate.config)
    return export(ready.fit(*stream.base), folder, pending_capacity=1), stream


def kinds(planned):
    """The best option of each method and codec."""
    found = {}
    for option in planned.options:
        if option.accuracy:
            found.setdefault((option.candidate.method, option.candidate.codec), option)
    return found


def test_costs_and_accuracy_are_those_of_the_bundle_on_the_device(small, split, planned, tmp_path):
    found = kinds(planned)
    assert {method for method, _ in found} == {"finetune", "ncm", "slda", "ridge", "latent_replay"}
    assert {codec for _, codec in found} == {"", "float32", "uint8", "packed, 4 bits", "pq, 8 bytes a position"}
    chosen = [
        option
        for (method, codec), option in found.items()
        if method in ("finetune", "ridge") or codec in ("packed, 4 bits", "pq, 8 bytes a position")
    ]
    for i, option in enumerate(chosen):
        bundle, stream = exported(small, split, option, tmp_path / str(i))
        assert bundle.manifest.ledger == option.costs.ledger
        assert {name: step.canonical_macs for name, step in bundle.manifest.steps.items()} == option.costs.macs_by_step
        if bundle.manifest.replay is not None:
            assert memory_layout(bundle.manifest.replay, small.CLASSES) == (option.costs.rows, option.costs.capacity_bytes)
        with Learner.load(bundle.path) as learner:
            for sample in stream:
                learner.learn(sample.x, sample.y)
            tests = [stream.test(task) for task in range(stream.tasks)]
            right = [learner.predict(x).label == label for xs, ys in tests for x, label in zip(xs, ys, strict=True)]
        assert option.accuracy[0] == np.mean(right), option.candidate.words()


def test_nothing_exceeds_a_limit_and_memories_fill_the_budget(small, planned):
    for option in planned.options:
        assert small.LIMITS.allow(option.costs.totals())
    full = [option for option in planned.options if option.candidate.codec == "float32"]
    spec = full[0].candidate.learner(planned_depth(small, full[0])).replay
    row = sum(field.nbytes for field in spec.fields) + 12
    assert all(small.LIMITS.ram - option.costs.totals()["ram"] < row for option in full)


def test_an_update_holds_its_share_of_a_refresh(small, split):
    """As ``edgecl run`` counts it, whose budget a written plan becomes."""
    for method in ("ridge", "slda"):
        config = METHODS[method].Config(delay=4)
        planned = plan(small.network(), split, small.scenario, Limits(), small.settings(configs={method: config}, orders=1))
        option = next(option for option in planned.options if option.accuracy)
        macs = option.costs.macs_by_step
        share = -(-macs["refresh"] // 4)
        assert option.costs.update_macs == macs["learn"] + share > macs["learn"]
        assert option.costs.totals()["macs"] == macs["encode"] + macs["learn"] + share


def planned_depth(small, option):
    from edgecl.planning.space import opened

    return opened(small.network(), option.candidate.at, 0)


def test_the_search_looks_at_training_samples_alone(small, split, planned):
    data = small.windows()  # its test samples are not numbers
    rows = {row.tobytes() for row in data.x}
    held, kept = {row.tobytes() for row in split.x_test}, {row.tobytes() for row in split.x}
    assert held | kept == rows and not held & kept
    assert planned.validation == len(held) == 25 and np.bincount(split.y_test).tolist() == [5] * 5
    assert all(option.failed == "" for option in planned.options)


def test_the_best_is_the_most_accurate_of_several_orders(planned):
    several = [option for option in planned.options if len(option.accuracy) == 2]
    assert len(several) == 3 and planned.best.mean == max(option.mean for option in several)
    assert any(option is planned.best for option in planned.front())


def option(accuracy, ram, flash, macs):
    ledger = {**dict.fromkeys(RAM + FLASH, 0), "replay": ram, "graphs": flash}
    return Option(Candidate("a", "ncm", None), Costs(ledger, {"encode": macs, "learn": 0}), [accuracy])


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), max_size=12))
def test_front_against_brute_force(points):
    options = [option(*point) for point in points]

    def beats(a, b):
        return a[0] >= b[0] and all(x <= y for x, y in zip(a[1:], b[1:], strict=True)) and a != b

    wanted = [mine for mine, point in zip(options, points, strict=True) if not any(beats(other, point) for other in points)]
    assert front(options, lambda option: option.mean) == wanted


@pytest.mark.parametrize(
    ("method", "limits"),
    [("latent_replay", Limits(ram=900, flash=40_000, macs=20_000)), ("ncm", Limits(ram=8000, macs=150))],
    ids=str,
)
def test_a_refused_budget_names_the_nearest(small, split, method, limits):
    config = small.configs()[method]
    config = dataclasses.replace(config, codec="packed") if method == "latent_replay" else config
    look = small.settings(configs={method: config}, orders=1, samples=40)
    with pytest.raises(InfeasibleError) as refused:
        plan(small.network(), split, small.scenario, limits, look)
    near = {name: found.costs[name] for name, found in refused.value.alone.items() if found is not None}
    assert near
    for name, value in near.items():
        assert value > getattr(limits, name) and f"--{name} {value}" in str(refused.value)
        enough, short = (dataclasses.replace(limits, **{name: v}) for v in (value, value - 1))
        assert plan(small.network(), split, small.scenario, enough, look).options
        with pytest.raises(InfeasibleError):
            plan(small.network(), split, small.scenario, short, look)
    least = refused.value.least
    assert least is not None
    given_up = {name: max(value, least.costs[name]) for name, value in limits.given().items()}
    assert plan(small.network(), split, small.scenario, Limits(**given_up), look).options


def test_a_budget_that_no_single_limit_mends(small, split):
    look = small.settings(configs={"ncm": small.configs()["ncm"]}, orders=1)
    with pytest.raises(
        InfeasibleError, match=r"no value of --ram or --macs alone is enough; the least excess overall: --ram \d+ --macs \d+"
    ):
        plan(small.network(), split, small.scenario, Limits(ram=1, macs=1), look)


class Late(NearestMean):
    """A method that is registered later, with a memory's fields missing."""

    name = "late"


def test_a_method_registered_later_is_tried(small, split, monkeypatch):
    from edgecl.planning import default_configs

    monkeypatch.setitem(METHODS, "late", Late)
    assert "late" in default_configs() and "joint" not in default_configs()
    found = plan(small.network(), split, small.scenario, Limits(), small.settings(configs=default_configs(("late", "ncm")), orders=1))
    late, ncm = ([o for o in found.options if o.candidate.method == name] for name in ("late", "ncm"))
    assert len(late) == len(ncm) == 1
    assert [o.accuracy for o in late] == [o.accuracy for o in ncm]


def test_dropout_by_functions_is_refused_as_prepare_does(small, split):
    class Function(nn.Module):
        def forward(self, x):
            return F.dropout(x, training=self.training)

    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.5), Function(), nn.Linear(8, small.CLASSES)).eval()
    network = dataclasses.replace(small.network(), model=net)
    configs = {"latent_replay": METHODS["latent_replay"].Config(rows_per_step=4, dropout=True)}
    with pytest.raises(
        InputError, match="latent_replay at 2: dropout: must be False for a suffix that calls dropout in training, in module '4'"
    ):
        plan(network, split, small.scenario, Limits(), small.settings(configs=configs))


def test_a_method_without_classes_is_refused_by_name(monkeypatch):
    from edgecl.planning import default_configs

    class Vectors(NearestMean):
        name = "vectors"
        targets = ("vector",)

    monkeypatch.setitem(METHODS, "vectors", Vectors)
    with pytest.raises(InputError, match=r"--method: must be among .*one class a sample.*got 'vectors'"):
        default_configs(("vectors",))
    assert "vectors" not in default_configs()


def test_many_candidates_are_halved_and_the_time_is_kept(small):
    from edgecl.planning.search import Search

    options = [option(i / 40, 1 + i % 7, 1, 1) for i in range(40)]
    order = {id(o.candidate): i for i, o in enumerate(options)}
    calls = []

    def measure(candidate, share, turn):
        calls.append((order[id(candidate)], share, turn))
        return order[id(candidate)] / 40

    for o in options:
        o.accuracy = []
    search = Search(measure, lambda share: int(100 * share), lambda left: [], top=4, orders=2, seconds=1e9, progress=lambda *_: None)
    search.run(options)
    cheap = max(i for i in range(40) if i % 7 == 0)
    full = {i for i, share, turn in calls if share == 1 and turn == 0}
    assert [(r.samples, r.order, r.measured) for r in search.rounds[:1]] == [(25, 1, 40)]
    assert full >= set(range(20, 40)) | {cheap}
    assert {i for i, share, turn in calls if turn == 1} == {36, 37, 38, 39}
    calls.clear()
    again = [dataclasses.replace(o, accuracy=[], first=None) for o in options]
    late = dataclasses.replace(search, seconds=-1.0, rounds=[])
    late.run(again)
    assert list(itertools.chain(*[[r.measured] for r in late.rounds])) == [1, 1, 0]
