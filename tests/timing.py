"""Is the time in proportion to the size? Judged so that neither a slow machine nor a busy one changes the answer."""
import time
from collections.abc import Callable


def cpu_seconds(f: Callable, *args) -> float:
    "CPU time of `f(*args)`: what other programs do meanwhile does not count."
    start = time.process_time()
    f(*args)
    return time.process_time() - start


def assert_linear(seconds: Callable[[int], float], size: int, most: float = 10, factor: int = 16, rounds: int = 4) -> None:
    """Compare `seconds(size)` with `seconds(size // factor)`: linear work takes `factor` times as long, quadratic work `factor` squared.

    The limit lies between, `factor ** 1.5` (64 for 16): a factor of 4 from both. Large and small are measured in turn, the small one before
    and after, and the least of each counts; a comparison that fails is repeated, up to `rounds` times. What takes less than 2
    milliseconds counts as that. `most`: a guard for the large one, generous, in seconds of CPU time."""
    small = large = float("inf")
    for _ in range(rounds):
        small = min(small, seconds(size // factor))
        large = min(large, seconds(size))
        small = min(small, seconds(size // factor))
        if large < factor ** 1.5 * max(small, 2e-3) and large < most:
            return
    raise AssertionError(f"size {size // factor}: {small:.4f} s, size {size}: {large:.4f} s, {large / max(small, 1e-9):.0f} times as long; linear would be {factor}, quadratic {factor**2}; at most {most} s")
