import json
import re
from pathlib import Path

import numpy as np
import pytest

from edgecl_device.generator import Generator
from edgecl_device.manifest import DrawSpec, ReplaySpec, TensorSpec
from edgecl_device.memory import ReplayMemory

PAGE = Path(__file__).resolve().parents[1] / "docs" / "generator.md"
VECTORS = json.loads(re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0])


def kinds(vector):
    return {"word", "below", "sample", "draws", "policy"} & set(vector)


def test_the_page_has_vectors_of_every_kind_with_a_rejection_and_a_collision():
    assert set().union(*map(kinds, VECTORS)) == {"word", "below", "sample", "draws", "policy"}
    assert any(int(v["counter_after"]) > len(v["result"]) for v in VECTORS if "below" in v)
    assert len(VECTORS) == sum(map(len, map(kinds, VECTORS)))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: kinds(v).pop())
def test_the_package_draws_what_the_page_says(vector):
    generator = Generator(int(vector["seed"]), int(vector["counter"]))
    if "draws" in vector:
        draws = tuple(DrawSpec(name, tuple(shape), below) for name, shape, below in vector["draws"])
        spec = ReplaySpec((TensorSpec("z", (), "uint8"),), 2, 1000, "reservoir", generator.seed, generator.counter, draws=draws)
        memory = ReplayMemory(spec, 2)
        found = memory.draw()
        assert [found[f"draw.{draw.name}"].tolist() for draw in draws] == vector["result"]
        assert str(memory.generator.counter) == vector["counter_after"]
    elif "word" in vector:
        assert [f"{generator.word():08x}" for _ in vector["word"]] == vector["word"]
    elif "below" in vector:
        assert [generator.below(vector["below"]) for _ in vector["result"]] == vector["result"]
        assert str(generator.counter) == vector["counter_after"]
    elif "sample" in vector:
        assert generator.sample(*vector["sample"]) == vector["result"]
        assert str(generator.counter) == vector["counter_after"]
    else:
        rows, classes = vector["rows"], vector["classes"]
        capacity = 2 * (1 + 12) + 4 * (classes + 2) + rows * (1 + 12)
        spec = ReplaySpec((TensorSpec("z", (), "uint8"),), 2, capacity, vector["policy"], int(vector["seed"]))
        memory = ReplayMemory(spec, classes)
        assert memory.rows == rows
        assert [memory.offer({"z": np.uint8(i)}, y, i) for i, y in enumerate(vector["labels"])] == vector["slots"]
        assert memory.rows_by_name()["replay.sample_id"].tolist() == vector["kept"]
        assert memory.draw()["replay.z"].tolist() == vector["drawn"]
        assert str(memory.generator.counter) == vector["counter_after"]
