from dataclasses import replace

import numpy as np
import pytest

from edgecl_device import Generator, InputError, ReplayMemory, ReplaySpec, TensorSpec
from edgecl_device.memory import memory_layout

CLASSES = 5
FIELDS = (TensorSpec("z", (3,), "uint8"), TensorSpec("scale", (), "float32"))
ROW = 3 + 4 + 12


def make(rows=8, policy="reservoir", rows_per_step=4, seed=1, classes=CLASSES):
    capacity = rows_per_step * (3 + 4 + 12) + 4 * (classes + 2) + rows * ROW
    memory = ReplayMemory(ReplaySpec(FIELDS, rows_per_step, capacity, policy, seed), classes)
    assert memory.rows == rows
    return memory


def row(sample_id):
    return {"z": np.array([sample_id % 256, sample_id // 256, 7], np.uint8), "scale": np.float32(sample_id / 2)}


def kept(memory):
    """(id, label) of every row, checked against the row's own content."""
    rows = memory.rows_by_name()
    for i, sample_id in enumerate(rows["replay.sample_id"]):
        assert (rows["replay.z"][i] == row(int(sample_id))["z"]).all()
        assert rows["replay.scale"][i] == row(int(sample_id))["scale"]
    return dict(zip(rows["replay.sample_id"].tolist(), rows["replay.target"].tolist(), strict=True))


def arrays(memory):
    found = []
    for value in [*vars(memory).values(), *vars(memory._rows).values()]:
        found += [value] if isinstance(value, np.ndarray) else list(value.values()) if isinstance(value, dict) else []
    return found


@pytest.mark.parametrize("capacity", [141, 300, 1000, 4097, 100_003])
def test_every_byte_counts_and_none_is_left_that_would_hold_a_row(capacity):
    spec = ReplaySpec(FIELDS, 4, capacity, "largest-class", 1)
    memory = ReplayMemory(spec, CLASSES)
    real = sum(array.nbytes for array in arrays(memory))
    assert memory.nbytes == real == memory_layout(spec, CLASSES)[1]
    assert real <= capacity < real + ROW
    for i in range(3 * min(memory.rows, 100)):
        memory.offer(row(i), i % CLASSES, i)
        memory.draw()
    assert sum(array.nbytes for array in arrays(memory)) == real


def test_the_error_names_the_smallest_capacity():
    smallest = 4 * 19 + 4 * 7 + ROW
    with pytest.raises(InputError, match=rf"at least {smallest} .* got {smallest - 1}"):
        ReplayMemory(ReplaySpec(FIELDS, 4, smallest - 1, "reservoir", 1), CLASSES)
    assert ReplayMemory(ReplaySpec(FIELDS, 4, smallest, "reservoir", 1), CLASSES).rows == 1


@pytest.mark.parametrize("capacity", [10**12, 10**15, 10**30])
def test_a_capacity_that_no_memory_has_is_refused_before_it_is_allocated(monkeypatch, capacity):
    monkeypatch.setattr(ReplayMemory, "_allocate", lambda self: 1 / 0)
    most = min(1 << 40, 4 * 19 + 4 * 7 + (1 << 31) * ROW - 1)
    with pytest.raises(InputError, match=f"capacity_bytes: must be at most {most} for rows of {ROW} bytes, got {capacity}; lower it"):
        ReplayMemory(ReplaySpec(FIELDS, 4, capacity, "reservoir", 1), CLASSES)
    assert memory_layout(ReplaySpec(FIELDS, 4, most, "reservoir", 1), CLASSES)[0] == (1 << 31) - 1


def test_a_machine_without_memory_for_the_rows_names_the_capacity(monkeypatch):
    def no_memory(self):
        raise MemoryError

    monkeypatch.setattr(ReplayMemory, "_allocate", no_memory)
    with pytest.raises(InputError, match="capacity_bytes: this machine has no memory for 997 bytes of rows; lower it"):
        ReplayMemory(ReplaySpec(FIELDS, 4, 1000, "reservoir", 1), CLASSES)


@pytest.mark.parametrize(("change", "name"), [({"policy": "fifo"}, "policy"), ({"rows_per_step": 0}, "rows_per_step")])
def test_a_wrong_spec_is_refused(change, name):
    with pytest.raises(InputError, match=name):
        ReplayMemory(replace(ReplaySpec(FIELDS, 4, 1000, "reservoir", 1), **change), CLASSES)


@pytest.mark.parametrize("policy", ["reservoir", "largest-class"])
def test_a_random_history_agrees_with_plain_dictionaries(policy):
    memory, rng, model, free = make(policy=policy), np.random.default_rng(0), {}, set(range(8))
    slots = {}
    for i in range(1500):
        action = rng.random()
        if model and action < 0.15:
            sample_id = int(rng.choice(list(model)))
            assert memory.remove(sample_id)
            free.add(slots.pop(sample_id))
            del model[sample_id]
        elif model and action < 0.3:
            sample_id, label = int(rng.choice(list(model))), int(rng.integers(CLASSES))
            assert memory.relabel(sample_id, label)
            model[sample_id] = label
        else:
            label = int(rng.integers(CLASSES))
            slot = memory.offer(row(i), label, i)
            if slot is not None:
                evicted = [key for key, value in slots.items() if value == slot]
                assert bool(evicted) == (slot not in free)
                for key in evicted:
                    del slots[key], model[key]
                free.discard(slot)
                slots[i], model[i] = slot, label
        assert kept(memory) == model
        assert len(memory) == len(model)
        assert memory.class_counts().tolist() == np.bincount(list(model.values()), minlength=CLASSES).tolist()
        assert sorted(memory._slots.tolist()) == list(range(8))


def test_unknown_samples_are_neither_removed_nor_relabelled():
    memory = make()
    memory.offer(row(3), 1, 3)
    assert not memory.remove(4)
    assert not memory.remove(-1)
    assert not memory.relabel(4, 2)
    assert kept(memory) == {3: 1}


def test_a_removed_row_leaves_no_trace():
    memory = make()
    for i in range(5):
        memory.offer(row(200 + i), 1, 200 + i)
    memory.remove(202)
    content = b"".join(array.tobytes() for array in memory.snapshot().values())
    assert np.int64(202).tobytes() not in content
    assert not any((array == 202).any() for array in memory.rows_by_name().values())
    assert not any((array == 202).any() for array in memory._rows.arrays.values())


def test_reservoir_is_algorithm_r():
    memory, plain = make(rows=4, seed=3), Generator(3)
    for n in range(1, 60):
        expected = n - 1 if n <= 4 else plain.below(n)
        slot = memory.offer(row(n), 0, n)
        assert (slot is None) == (expected >= 4)
        assert memory.generator.counter == plain.counter


@pytest.mark.parametrize("removals", [False, True])
def test_reservoir_keeps_a_uniform_sample_also_after_removals(removals):
    trials, counts = 1500, np.zeros(30)
    for seed in range(trials):
        memory = make(rows=5, seed=seed)
        for i in range(30):
            memory.offer(row(i), i % CLASSES, i)
            if removals and i == 19:
                for sample_id in range(3, 12):
                    memory.remove(sample_id)
        for sample_id in kept(memory):
            counts[sample_id] += 1
    live = np.array([i for i in range(30) if not (removals and 3 <= i < 12)])
    assert counts.sum() == counts[live].sum()
    expected = counts.sum() / len(live)
    assert ((counts[live] - expected) ** 2 / expected).sum() < (58.3 if len(live) == 30 else 45.3)  # 0.999 quantiles
    assert memory.seen == len(live)


def test_largest_class_evicts_from_the_largest_with_the_offered_one_counted():
    memory, rng = make(rows=9, policy="largest-class", seed=2), np.random.default_rng(1)
    before = {}
    went_itself = 0
    for i in range(600):
        label = int(rng.choice(CLASSES, p=[0.5, 0.2, 0.15, 0.1, 0.05]))
        slot = memory.offer(row(i), label, i)
        after = kept(memory)
        if len(before) == 9:
            with_new = {**before, i: label}
            counts = np.bincount(list(with_new.values()), minlength=CLASSES)
            gone = set(with_new) - set(after)
            assert len(gone) == 1
            assert with_new[gone.pop()] == counts.argmax()
            went_itself += slot is None
        before = after
    assert 20 < went_itself < 400
    assert np.ptp(memory.class_counts()) <= 1


def test_largest_class_evicts_every_row_of_the_class_equally_often():
    gone = np.zeros(5)
    for seed in range(2000):
        memory = make(rows=4, policy="largest-class", seed=seed)
        for i in range(5):
            memory.offer(row(i), 2, i)
        gone[next(iter(set(range(5)) - set(kept(memory))))] += 1
    assert ((gone - 400) ** 2 / 400).sum() < 18.5  # 0.999 quantile, 4 degrees of freedom


def test_draw_is_distinct_rows_with_their_labels():
    memory = make()
    for i in range(8):
        memory.offer(row(i), i % 3, i)
    seen = set()
    for _ in range(40):
        drawn = memory.draw()
        ids = drawn["replay.z"][:, 0].tolist()
        assert len(set(ids)) == 4
        assert drawn["replay.target"].tolist() == [i % 3 for i in ids]
        assert drawn["replay.scale"].tolist() == [i / 2 for i in ids]
        assert drawn["replay.weight"].tolist() == [1, 1, 1, 1]
        seen.update(ids)
    assert seen == set(range(8))


def test_draw_fills_up_with_zeros_at_weight_zero_also_after_a_fuller_draw():
    memory = make()
    for i in range(1, 6):
        memory.offer(row(i), 3, i)
    memory.draw()
    for i in range(1, 5):
        memory.remove(i)
    drawn = memory.draw()
    assert drawn["replay.weight"].tolist() == [1, 0, 0, 0]
    assert drawn["replay.target"].tolist() == [3, 0, 0, 0]
    assert drawn["replay.z"].tolist() == [[5, 0, 7], [0] * 3, [0] * 3, [0] * 3]
    assert drawn["replay.target"].dtype == np.int64 and drawn["replay.weight"].dtype == np.float32


def test_an_empty_memory_draws_only_filler_and_no_word():
    memory = make()
    assert memory.draw()["replay.weight"].tolist() == [0, 0, 0, 0]
    assert memory.generator.counter == 0


def test_a_draw_is_undone_by_the_counter():
    memory = make()
    for i in range(8):
        memory.offer(row(i), i % 3, i)
    before = memory.snapshot()
    first = memory.draw()["replay.z"].copy()
    memory.generator.counter = int(before["memory.counters"][1])
    assert all((value == before[name]).all() for name, value in memory.snapshot().items())
    assert (memory.draw()["replay.z"] == first).all()


@pytest.mark.parametrize("policy", ["reservoir", "largest-class"])
@pytest.mark.parametrize("offers", [0, 3, 50])
def test_a_restored_memory_goes_on_bit_for_bit(policy, offers):
    memory = make(policy=policy)
    for i in range(offers):
        memory.offer(row(i), i % CLASSES, i)
        memory.draw()
    if offers:
        memory.remove(offers - 1)
    other = make(policy=policy)
    other.offer(row(77), 4, 77)
    other.restore(memory.snapshot())
    for i in range(100, 130):
        assert memory.offer(row(i), i % 4, i) == other.offer(row(i), i % 4, i)
        a, b = ({name: array.copy() for name, array in m.draw().items()} for m in (memory, other))
        assert all((a[name] == b[name]).all() for name in a)
    a, b = memory.snapshot(), other.snapshot()
    assert a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_a_snapshot_does_not_change_with_the_memory():
    memory = make()
    memory.offer(row(1), 1, 1)
    before = memory.snapshot()
    copy = {name: array.copy() for name, array in before.items()}
    memory.remove(1)
    assert all((before[name] == copy[name]).all() for name in copy)


def test_a_wrong_snapshot_changes_nothing():
    memory = make()
    memory.offer(row(1), 1, 1)
    good = memory.snapshot()
    for name in good:
        with pytest.raises(InputError, match=f"{name}: is missing"):
            memory.restore({key: value for key, value in make().snapshot().items() if key != name})
    with pytest.raises(InputError, match="slots"):
        memory.restore(make(rows=9).snapshot())
    assert all((value == good[name]).all() for name, value in memory.snapshot().items())


def test_rows_fill_another_memory_that_draws_the_same():
    memory = make(rows=20)
    for i in range(15):
        memory.offer(row(i), (7 * i) % CLASSES, i)
    other = make(rows=20)
    other.fill(memory.rows_by_name())
    assert kept(other) == kept(memory)
    assert (other.draw()["replay.z"] == memory.draw()["replay.z"]).all()


def test_filled_rows_without_ids_are_grouped_by_class():
    memory = make()
    memory.fill(
        {
            "replay.z": np.arange(9, dtype=np.uint8).reshape(3, 3),
            "replay.scale": np.zeros(3, np.float32),
            "replay.target": np.array([4, 0, 4]),
        }
    )
    rows = memory.rows_by_name()
    assert rows["replay.target"].tolist() == [0, 4, 4]
    assert rows["replay.z"].tolist() == [[3, 4, 5], [0, 1, 2], [6, 7, 8]]
    assert rows["replay.sample_id"].tolist() == [-1] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replay.target": np.array([0, 5])}, "labels must be in"),
        ({"replay.target": np.array([0, -1])}, "labels must be in"),
        ({"replay.target": np.array([0.0, 1.0])}, "int64"),
        ({"replay.target": np.zeros(9, np.int64)}, "8 rows fit"),
        ({"replay.z": np.zeros((3, 3), np.uint8)}, r"replay\.z: shape"),
        ({"replay.scale": np.full(2, np.nan, np.float32)}, r"replay\.scale: values must be finite"),
        ({"replay.z": None}, r"replay\.z"),
    ],
)
def test_wrong_rows_are_refused(change, message):
    memory = make()
    rows = {"replay.z": np.zeros((2, 3), np.uint8), "replay.scale": np.zeros(2, np.float32), "replay.target": np.array([0, 1]), **change}
    with pytest.raises(InputError, match=message):
        memory.fill(rows)
    assert len(memory) == 0
