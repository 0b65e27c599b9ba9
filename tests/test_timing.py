"""What judges linear time can tell it from quadratic time, whatever the noise."""
import random

import pytest
from timing import assert_linear, cpu_seconds


def noisy(seconds, noise, seed):
    "A clock that says up to `noise` times as much."
    draw = random.Random(seed)
    return lambda n: seconds(n) * draw.uniform(1, noise)


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("scale", [1, 100])
def test_noise_makes_no_difference(seed, scale):
    assert_linear(noisy(lambda n: n * scale * 1e-8, 2, seed), 1_000_000)
    assert_linear(noisy(lambda n: n * n.bit_length() * scale * 1e-9, 2, seed), 1_000_000)
    with pytest.raises(AssertionError, match="times as long"):
        assert_linear(noisy(lambda n: n**2 * scale * 1e-11, 2, seed), 1_000_000, most=1e9)


def test_the_guard():
    with pytest.raises(AssertionError, match="at most 10 s"):
        assert_linear(lambda n: n * 1e-5, 2_000_000)


def test_a_real_quadratic_program_is_found():
    text = "ab" * 5000

    def again(n):
        "Looks at all that was read before, at each piece."
        return [sum(map(ord, text[:i])) for i in range(0, n, 4)]

    def once(n):
        return [sum(map(ord, text[i:i + 4])) for i in range(0, n, 4)]
    assert_linear(lambda n: cpu_seconds(once, n), len(text))
    with pytest.raises(AssertionError, match="times as long"):
        assert_linear(lambda n: cpu_seconds(again, n), len(text), most=1e9)
