"""What a program wrote alone and what two processes of it wrote: `curves.json`, records by name, and a file of weights for each name."""
import json
from pathlib import Path

from safetensors.torch import load_file


def assert_same_end(folders: tuple[Path, Path], name: str) -> None:
    "The same records and the same weights, but for rounding."
    one, two = (json.loads((f / "curves.json").read_text())[name] for f in folders)
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        assert all(abs(a[k] - b[k]) < 1e-4 for k in a if k != "tokens"), (a, b)
    before, after = (load_file(f / f"{name}.safetensors") for f in folders)
    assert before.keys() == after.keys()
    assert max(float((before[k] - after[k]).abs().max()) for k in before) < 1e-4
