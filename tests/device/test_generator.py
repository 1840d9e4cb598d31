import itertools

import numpy as np
import pytest

from edgecl_device import Generator, InputError
from edgecl_device.generator import philox4x32

ONES = 0xFFFFFFFF
PUBLISHED = [  # Random123, kat_vectors, philox4x32 10
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ONES,) * 4, (ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_published_vectors(counter, key, words):
    assert " ".join(f"{word:08x}" for word in philox4x32(counter, key)) == words


def test_words_are_the_lanes_of_blocks_under_the_key():
    seed = 0x0123456789ABCDEF
    start = 4 * ((1 << 32) - 1)  # the next block's number needs the second counter word
    generator = Generator(seed, start)
    blocks = [philox4x32((ONES, 0, 0, 0), (0x89ABCDEF, 0x01234567)), philox4x32((0, 1, 0, 0), (0x89ABCDEF, 0x01234567))]
    assert [generator.word() for _ in range(8)] == list(itertools.chain(*blocks))
    assert generator.counter == start + 8


@pytest.mark.parametrize("words", [0, 1, 3, 4, 9])
def test_the_counter_is_the_whole_state(words):
    generator = Generator(9)
    for _ in range(words):
        generator.word()
    resumed = Generator(9, generator.counter)
    assert [resumed.word() for _ in range(9)] == [generator.word() for _ in range(9)]


def test_setting_the_counter_goes_back():
    generator = Generator(9)
    first = generator.sample(50, 7)
    generator.counter = 0
    assert generator.sample(50, 7) == first


@pytest.mark.parametrize("n", [1, 2, 7, 10])
def test_below_is_uniform(n):
    generator = Generator(1)
    draws = 20_000
    counts = np.bincount([generator.below(n) for _ in range(draws)], minlength=n)
    assert len(counts) == n
    chi2 = ((counts - draws / n) ** 2 / (draws / n)).sum()
    assert chi2 < [0, 10.8, 13.8, 16.3, 18.5, 20.5, 22.5, 24.3, 26.1, 27.9][n - 1] + 1e-9  # 0.999 quantiles for n - 1


def test_below_rejects_exactly_the_words_that_would_bias_it():
    n = 3 << 30  # words that are multiples of 4 are rejected: see docs/generator.md
    plain, generator = Generator(2), Generator(2)
    words = [plain.word() for _ in range(400)]
    expected = [word * n >> 32 for word in words if word % 4]
    assert [generator.below(n) for _ in expected] == expected
    assert 60 < len(words) - len(expected) < 140


def test_below_takes_the_word_itself_at_the_full_range():
    assert Generator(3).below(1 << 32) == Generator(3).word()


@pytest.mark.parametrize(("n", "k"), [(5, 0), (5, 2), (5, 5), (1, 1), (0, 0), (1000, 30)])
def test_samples_are_distinct_and_in_range(n, k):
    generator = Generator(4)
    for _ in range(50):
        drawn = generator.sample(n, k)
        assert len(set(drawn)) == len(drawn) == k
        assert all(0 <= value < n for value in drawn)


def test_every_set_is_equally_likely():
    generator = Generator(6)
    sets = [frozenset(generator.sample(5, 2)) for _ in range(10_000)]
    counts = np.array([sets.count(frozenset(pair)) for pair in itertools.combinations(range(5), 2)])
    assert counts.sum() == 10_000
    assert ((counts - 1000) ** 2 / 1000).sum() < 27.9  # 0.999 quantile, 9 degrees of freedom


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Generator(-1), "seed"),
        (lambda: Generator(1 << 64), "seed"),
        (lambda: Generator(0, -1), "counter"),
        (lambda: Generator(0).below(0), "n:"),
        (lambda: Generator(0).below((1 << 32) + 1), "n:"),
        (lambda: Generator(0).sample(3, 4), "k:"),
        (lambda: Generator(0).sample(3, -1), "k:"),
    ],
)
def test_ranges_are_checked(call, name):
    with pytest.raises(InputError, match=name):
        call()
