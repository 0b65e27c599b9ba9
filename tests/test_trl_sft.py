"""data/trl_sft.json is what TRL 1.12.0 gives: its own methods, called again where it is installed."""
import json
import sys
from pathlib import Path

import pytest

trl = pytest.importorskip("trl", reason="TRL is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))


def close(a, b, eps=1e-9) -> bool:
    "Nested lists and dicts of numbers, equal to `eps`."
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k], eps) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(close(x, y, eps) for x, y in zip(a, b))
    return abs(a - b) < eps


@pytest.mark.skipif(trl.__version__ != "1.12.0", reason="written by TRL 1.12.0")
def test_the_fixture_is_what_trl_gives():
    import trl_sft
    kept, now = json.loads(trl_sft.PATH.read_text()), json.loads(json.dumps(trl_sft.fixture()))
    assert kept.keys() == now.keys() and all(close(kept[k], now[k]) for k in ("inputs", "nll", "dft", "nll one by one"))
    assert kept["versions"]["trl"] == "1.12.0" and trl_sft.PATH.stat().st_size < 60_000
