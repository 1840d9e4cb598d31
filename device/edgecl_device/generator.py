"""The portable random generator: Philox4x32-10, a counter-based stream of 32-bit words.

A draw depends only on the seed and on how many words were drawn before, so that any language draws the same rows, and
the one integer ``counter`` is all there is to save. ``docs/generator.md`` specifies it with test vectors.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox); Lemire, "Fast random
integer generation in an interval", 2019 (:meth:`Generator.below`); Bentley and Floyd, "A sample of brilliance", 1987
(:meth:`Generator.sample`).
"""

from edgecl_device.errors import InputError

WORD = 1 << 32
_MASK = WORD - 1


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One block: ten rounds of Philox over four counter words and two key words, all of 32 bits.

    >>> [f"{word:08x}" for word in philox4x32((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0 = 0xD2511F53 * c0
        p1 = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0 = (k0 + 0x9E3779B9) & _MASK
        k1 = (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


class Generator:
    """A stream of 32-bit words: word ``i`` is lane ``i % 4`` of block ``i // 4``.

    Args:
        seed: Key of 64 bits.
        counter: Words already drawn; the whole state.

    Raises:
        InputError: when one of them is out of range.

    >>> generator = Generator(seed=7)
    >>> rows = generator.sample(100, 3)
    >>> resumed = Generator(seed=7, counter=generator.counter)
    >>> resumed.below(10) == generator.below(10)
    True
    """

    def __init__(self, seed: int, counter: int = 0) -> None:
        if not 0 <= seed < 1 << 64:
            raise InputError(f"seed: must be in [0, 2**64), got {seed}; take it modulo 2**64")
        self.seed = seed
        self.counter = counter

    @property
    def counter(self) -> int:
        """Words drawn so far. Set it to go back or forth in the stream."""
        return self._counter

    @counter.setter
    def counter(self, value: int) -> None:
        if not 0 <= value < 1 << 66:
            raise InputError(f"counter: must be in [0, 2**66), got {value}; use a counter that a generator returned")
        self._counter = value
        self._block = -1

    def word(self) -> int:
        """The next word, in [0, 2**32)."""
        block, lane = divmod(self._counter, 4)
        if block != self._block:
            self._words = philox4x32((block & _MASK, block >> 32, 0, 0), (self.seed & _MASK, self.seed >> 32))
            self._block = block
        self._counter += 1
        return self._words[lane]

    def below(self, n: int) -> int:
        """An unbiased integer in [0, n), by multiply and shift with rejection; draws one word or, rarely, more.

        Raises:
            InputError: unless 1 <= n <= 2**32.
        """
        if not 1 <= n <= WORD:
            raise InputError(f"n: must be in [1, 2**32], got {n}; draw from a smaller, not empty range")
        product = self.word() * n
        if product & _MASK < n:
            threshold = (WORD - n) % n
            while product & _MASK < threshold:
                product = self.word() * n
        return product >> 32

    def sample(self, n: int, k: int) -> list[int]:
        """``k`` distinct integers of [0, n), by Floyd's algorithm, in the order in which it finds them.

        For j = n-k ... n-1: t = below(j + 1); take t, or j when t was taken before. Every set is equally likely; the
        order within it is not (an integer near n comes late).

        Raises:
            InputError: unless 0 <= k <= n <= 2**32.
        """
        if not 0 <= k <= n <= WORD:
            raise InputError(f"k: must be in [0, n] with n <= 2**32, got k={k}, n={n}; draw fewer")
        taken: dict[int, None] = {}
        for j in range(n - k, n):
            t = self.below(j + 1)
            taken[j if t in taken else t] = None
        return list(taken)
