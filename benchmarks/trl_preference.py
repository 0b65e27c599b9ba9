"""What TRL 1.12.0's own methods give on small random tensors, losses and gradients: the fixtures that the chapter's losses are compared with.

TRL has no loss functions, only methods of trainers. Here they are called as they are, with a stand-in for the trainer and models that return
given logits. Writes data/trl_preference.json; tests/test_trl_preference.py runs it again where trl is installed."""
import json
import warnings
from collections import defaultdict
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import torch

B, T, V = 3, 6, 4            # pairs, tokens, vocabulary
ENDS = (6, 5, 4, 5, 6, 3)    # tokens of each sequence, chosen first
PROMPTS = (2, 1, 2, 2, 1, 2)
LABELS = (True, False, True, True, False, False)
BETA, GAMMA, SMOOTHING, WEIGHTS = 0.6, 0.5, 0.1, (1.0, 1.33)


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    "Tokens, masks and the logits of policy and reference, for the answers and for KTO's mismatched ones."
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(2 * B, T, V, generator=g, dtype=torch.float64).mul(1e6).round().div(1e6)
    ids = lambda: torch.randint(V, (2 * B, T), generator=g)
    place = torch.arange(T)
    attention = (place < torch.tensor(ENDS)[:, None]).long()
    return {"input_ids": ids(), "kl_ids": ids(), "attention_mask": attention, "completion_mask": attention * (place >= torch.tensor(PROMPTS)[:, None]),
            "logits": draw(), "ref_logits": draw(), "kl_logits": draw(), "ref_kl_logits": draw()}


def trainer(**settings) -> SimpleNamespace:
    "The stand-in: what the methods read from their trainer."
    same = lambda x: x
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same, unwrap_model=same)
    model = Returns()
    return SimpleNamespace(**({"model": model, "accelerator": accelerator, "aux_loss_enabled": False, "ld_alpha": None, "precompute_ref_logps": False,
                               "f_divergence_type": "reverse_kl", "use_weighting": False, "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0,
                               "args": SimpleNamespace(gradient_checkpointing_kwargs=None), "label_smoothing": 0.0, "alpha": 0.0, "beta": BETA,
                               "is_encoder_decoder": False, "padding_value": 0, "pad_token_id": 0} | settings))


class Returns(torch.nn.Module):
    "A model that gives the logits that belong to the ids it is asked about, out of pairs of ids and logits."

    def __init__(self, *answers: tuple[torch.Tensor, torch.Tensor]):
        super().__init__()
        self.answers, self.is_gradient_checkpointing = answers, False

    def forward(self, input_ids: torch.Tensor, **_) -> SimpleNamespace:
        return SimpleNamespace(logits=next(logits for ids, logits in self.answers if torch.equal(ids, input_ids)))


def dpo(x: dict, rows: torch.Tensor | None = None, **settings) -> tuple[torch.Tensor, dict]:
    "DPOTrainer._compute_loss on all pairs, or on the given rows."
    from trl import DPOTrainer
    rows = torch.arange(2 * B) if rows is None else rows
    part = {k: v[rows] for k, v in x.items()}
    t = trainer(ref_model=Returns((part["input_ids"], part["ref_logits"])), loss_weights=[1.0], **settings)
    loss = DPOTrainer._compute_loss(t, Returns((part["input_ids"], part["logits"])), {k: part[k] for k in ("input_ids", "attention_mask", "completion_mask")}, False)
    return loss, {k: v[0] for k, v in t._metrics["train"].items() if k.startswith(("rewards", "logps"))}


def cdpo(x: dict) -> tuple[torch.Tensor, dict]:
    "DPOTrainer ignores label_smoothing for `sigmoid`; its `aot` on one pair at a time, where there is nothing to sort, is conservative DPO."
    return sum(dpo(x, torch.tensor([i, i + B]), loss_types=["aot"], label_smoothing=SMOOTHING)[0] for i in range(B)) / B, {}


def kto(x: dict, swap: bool = False) -> tuple[torch.Tensor, dict]:
    "KTOTrainer._compute_loss; with `swap` policy and reference change places on the mismatched answers, so that the estimate is cut off at 0."
    from trl import KTOTrainer
    kl = (x["ref_kl_logits"], x["kl_logits"]) if swap else (x["kl_logits"], x["ref_kl_logits"])
    t = trainer(calculate_KL=True, use_liger_kernel=False, loss_type="kto", desirable_weight=WEIGHTS[0], undesirable_weight=WEIGHTS[1],
                ref_model=Returns((x["input_ids"], x["ref_logits"]), (x["kl_ids"], kl[1])))
    t._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, t)
    batch = {k: x[k] for k in ("input_ids", "attention_mask", "completion_mask")} | {"label": torch.tensor(LABELS)}
    batch |= {"KL_input_ids": x["kl_ids"], "KL_attention_mask": x["attention_mask"], "KL_completion_mask": x["completion_mask"]}
    loss = KTOTrainer._compute_loss(t, Returns((x["input_ids"], x["logits"]), (x["kl_ids"], kl[0])), batch, False)
    return loss, {k: v[0] for k, v in t._metrics["train"].items() if k.startswith(("rewards", "logps", "kl"))}


def without_reference(cls: type, x: dict, **settings) -> tuple[torch.Tensor, dict]:
    "get_batch_loss_metrics of ORPOTrainer or CPOTrainer."
    t = trainer(**settings)
    for name in ("odds_ratio_loss", "cpo_loss", "concatenated_forward"):
        if hasattr(cls, name):
            setattr(t, name, partial(getattr(cls, name), t))
    t.concatenated_inputs, t.get_batch_logps = cls.concatenated_inputs, cls.get_batch_logps
    labels = x["input_ids"].masked_fill(x["completion_mask"] == 0, -100)
    batch = {f"{side}_{k}": v for k, whole in (("input_ids", x["input_ids"]), ("attention_mask", x["attention_mask"]), ("labels", labels))
             for side, v in zip(("chosen", "rejected"), whole.chunk(2))}
    loss, metrics = cls.get_batch_loss_metrics(t, lambda ids, **_: SimpleNamespace(logits=x["logits"]), batch)
    return loss, {k: float(v) for k, v in metrics.items() if k.startswith(("rewards", "logps", "nll"))}


def cases() -> dict:
    "Name of each loss and the call that gives it."
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    kinds = {"dpo": "sigmoid", "hinge": "hinge", "ipo": "ipo", "normed": "sigmoid_norm"}
    return ({name: partial(dpo, loss_types=[kind]) for name, kind in kinds.items()}
            | {"robust": partial(dpo, loss_types=["robust"], label_smoothing=SMOOTHING), "cdpo": cdpo, "kto": kto, "kto_cut": partial(kto, swap=True),
               "orpo": partial(without_reference, ORPOTrainer),
               "cpo": partial(without_reference, CPOTrainer, loss_type="sigmoid", cpo_alpha=1.0), "cpo_smooth": partial(without_reference, CPOTrainer, loss_type="sigmoid", cpo_alpha=0, label_smoothing=SMOOTHING),
               "simpo": partial(without_reference, CPOTrainer, loss_type="simpo", cpo_alpha=0, simpo_gamma=GAMMA),
               "simpo_default": partial(without_reference, CPOTrainer, loss_type="simpo", cpo_alpha=1.0, simpo_gamma=GAMMA)})


def fixtures() -> dict:
    "Inputs, and for each case the value, the gradient with respect to the policy's logits, and the metrics."
    x, out = inputs(), {}
    short = lambda t: [short(i) for i in t] if isinstance(t, list) else float(f"{t:.13g}")
    for name, call in cases().items():
        leaf = x["logits"].clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss, metrics = call(x | {"logits": leaf})
        loss.backward()
        out[name] = {"value": short(loss.item()), "grad": short(leaf.grad.tolist()), "metrics": {k: short(float(v)) for k, v in metrics.items()}}
    return {"what": "losses and gradients of TRL's own methods on small random tensors in float64", "command": "python benchmarks/trl_preference.py",
            "versions": {n: version(n) for n in ("trl", "torch", "transformers")},
            "settings": {"beta": BETA, "gamma": GAMMA, "label_smoothing": SMOOTHING, "weights": list(WEIGHTS), "labels": list(LABELS)},
            "inputs": {k: v.tolist() for k, v in x.items()}, "cases": out}


if __name__ == "__main__":
    from record import ROOT
    path = ROOT / "data" / "trl_preference.json"
    path.write_text(json.dumps(fixtures()) + "\n", encoding="utf-8")
    print(f"written: {path.relative_to(ROOT)}, {path.stat().st_size / 1000:.0f} kB")
