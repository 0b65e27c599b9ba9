"""What peft gives for one linear layer with a LoRA adapter, on small random tensors in float64: output, gradients and merged weight, with alpha / r and
with alpha / sqrt(r). Written to data/peft_lora.json. Needs peft.

    python benchmarks/peft_lora.py
"""
import json
from pathlib import Path

import peft
import torch
from torch import nn

PATH = Path(__file__).resolve().parent.parent / "data" / "peft_lora.json"
IN, OUT, RANK, ALPHA = 5, 6, 3, 7.0


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(IN, OUT, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x)


def tensors() -> dict[str, torch.Tensor]:
    "Weight, bias, adapter, input, and the weights of the sum whose gradients are compared; six decimals."
    g = torch.Generator().manual_seed(7)
    shapes = {"weight": (OUT, IN), "bias": (OUT,), "lora_A": (RANK, IN), "lora_B": (OUT, RANK), "x": (4, IN), "into": (4, OUT)}
    return {k: torch.randn(s, generator=g, dtype=torch.float64).mul(1e6).round().div(1e6) for k, s in shapes.items()}


def given(t: dict[str, torch.Tensor], rslora: bool) -> dict:
    "peft's values for these tensors."
    base = One()
    base.load_state_dict({"q_proj.weight": t["weight"], "q_proj.bias": t["bias"]})
    model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"], use_rslora=rslora), autocast_adapter_dtype=False).double()
    layer = model.base_model.model.q_proj
    for k in "AB":
        getattr(layer, f"lora_{k}")["default"].weight.data.copy_(t[f"lora_{k}"])
    x = t["x"].clone().requires_grad_()
    y = model(x)
    parameters = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    grads = torch.autograd.grad((y * t["into"]).sum(), parameters)
    return {"y": y.tolist(), **{f"d_{k}": g.tolist() for k, g in zip(("x", "lora_A", "lora_B"), grads)}, "merged": model.merge_and_unload().q_proj.weight.tolist()}


def fixture() -> dict:
    t = tensors()
    return {"command": "python benchmarks/peft_lora.py", "versions": {"peft": peft.__version__, "torch": torch.__version__.split("+")[0]}, "rank": RANK, "alpha": ALPHA,
            "tensors": {k: v.tolist() for k, v in t.items()}, "lora": given(t, False), "rslora": given(t, True)}


if __name__ == "__main__":
    PATH.write_text(json.dumps(fixture(), separators=(",", ":")) + "\n")
    print(PATH.name, PATH.stat().st_size, "bytes")
