"""The committed figures of TRL's PPO, GRPO and RLOO are what TRL gives; the chapters hold the course's functions to these figures."""
import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = json.loads((ROOT / "data" / "trl_ppo.json").read_text(encoding="utf-8"))


def differences(a, b, where=""):
    "Where two nested values differ by more than rounding."
    if isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        return [d for k in a for d in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, list):
        assert isinstance(b, list) and len(a) == len(b), where
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{where}/{i}")]
    same = abs(a - b) <= 1e-9 * max(1.0, abs(a)) if isinstance(a, (int, float)) and isinstance(b, (int, float)) else a == b
    return [] if same else [f"{where}: {a} {b}"]


def test_it_is_small():
    assert (ROOT / "data" / "trl_ppo.json").stat().st_size < 60_000


def test_trl_still_says_so(monkeypatch):
    pytest.importorskip("trl.experimental.ppo", reason="PPO is in trl up to version 1.12")
    if version("trl") != COMMITTED["versions"]["trl"]:
        pytest.skip(f"the figures are of trl {COMMITTED['versions']['trl']}, installed is {version('trl')}")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("trl_ppo", None)
    import trl_ppo
    assert differences({k: COMMITTED[k] for k in ("ppo", "whiten", "grpo", "advantages")}, trl_ppo.figures()) == []


def test_the_cases_are_not_trivial():
    "Answers of several lengths, some with a place after them and some without; clipping at work in the second pass, and not in the first."
    for run in COMMITTED["ppo"]:
        lengths = {row.count(0) for row in run["padding_mask"]}
        assert len(lengths) >= 3 and max(lengths) == len(run["padding_mask"][0])
        first, second = run["passes"]
        assert first["pg_clipfrac"] == 0 and 0 < second["pg_clipfrac"] < 1 and 0 < second["vf_clipfrac"] < 1
