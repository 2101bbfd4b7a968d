"""This module gives any part of a random order of N samples, in the time and memory of that part.

The order is a keyed bijection of 0..N-1: the generalized Feistel cipher of Black and Rogaway,
"Ciphers with arbitrary finite domains" (CT-RSA 2002), on a grid of at least N places. A number that
it sends to a place from N on is sent on until it lands below N ("cycle walking"). TensorFlow's
`tf.random.index_shuffle` is made for the same purpose in the same way. `tests/plain_loop.py` has
the rule once more, number by number."""

import math

import numpy

# With 12 rounds each of the 120 orders of 5 samples is equally likely up to some 3 %, and 100,000
# orders of 9 samples or more show no favoured position and no favoured pair. Few samples need the
# most rounds, since halves of two or three values have few functions.
ROUNDS = 12
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64's
_FIRST, _SECOND, _HALF = numpy.uint64(FIRST), numpy.uint64(SECOND), numpy.uint64(32)


def permute(positions: range, num_samples: int, seed: int, epoch: int) -> numpy.ndarray:
    """Returns the samples, uint64, at these positions of the order of (seed, epoch)."""
    keys = _round_keys(seed, epoch)
    rows = math.isqrt(num_samples - 1) + 1
    rows += rows % 2  # on a grid with two odd sides, every order would be an even permutation
    columns = -(-num_samples // rows)
    found = numpy.arange(positions.start, positions.stop, dtype=numpy.uint64)
    found = _encipher(found, keys, rows, columns)
    while len(outside := numpy.flatnonzero(found >= num_samples)):
        found[outside] = _encipher(found[outside], keys, rows, columns)
    return found


def _encipher(places: numpy.ndarray, keys: numpy.ndarray, rows: int, columns: int) -> numpy.ndarray:
    """Sends each place of the grid to another one, a bijection.

    Each round turns either the row or the column by a number that hangs on the key and the other
    of the two: the upper half of a product, scaled to below `rows` or `columns`."""
    turned_size, other_size = numpy.uint64(rows), numpy.uint64(columns)
    turned, other = places // other_size, places % other_size
    for key in keys:
        z = other + key
        z *= _FIRST
        z ^= z >> _HALF
        z *= _SECOND
        z >>= _HALF
        z *= turned_size
        z >>= _HALF
        turned += z
        # The remainder by `turned_size`: what was below it becomes huge when it is subtracted.
        numpy.minimum(turned, turned - turned_size, out=turned)
        turned, other, turned_size, other_size = other, turned, other_size, turned_size
    return turned * other_size + other  # ROUNDS is even, so these are the row and the column again


def _round_keys(seed: int, epoch: int) -> numpy.ndarray:
    """Returns a key a round, uint64.

    The seed is mixed before the epoch is added, else (seed, epoch + 1) would be (seed + 1, epoch).
    """
    start = splitmix64(splitmix64(seed) + epoch)
    return numpy.array([splitmix64(start + i) for i in range(ROUNDS)], dtype=numpy.uint64)


def splitmix64(number: int) -> int:
    """Returns the first output of splitmix64 (Steele, Lea and Flood 2014) from this state."""
    z = (number + GOLDEN) % 2**64
    z = (z ^ (z >> 30)) * FIRST % 2**64
    z = (z ^ (z >> 27)) * SECOND % 2**64
    return z ^ (z >> 31)
