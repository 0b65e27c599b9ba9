"""What TRL 1.12.0 computes in PPO, GRPO and RLOO, on small tensors: `data/trl_ppo.json`, to which the chapters and a test hold the course's functions.

TRL's code runs unmodified. Its PPO arithmetic stands inside `PPOTrainer.train`; so that method trains a tiny model for one update, and a tracing function
(`sys.settrace`, what debuggers use) reads its local variables at the lines where they are whole, and asks autograd for the gradients of its loss. The advantages of GRPO and
RLOO are read in the same way from `_generate_and_score_completions`; `GRPOTrainer._compute_loss` is called with given tensors."""
import contextlib
import io
import os
import sys
import tempfile
import warnings
from collections import defaultdict
from types import SimpleNamespace

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
import torch

BATCH, LENGTH, WORDS = 8, 5, [*"abcdefghij"]


class Locals:
    "Within: each time that a function meets a local variable of one of the names `at` anew, `note(name, locals)` is called."

    def __init__(self, function, at, note):
        self.code, self.at, self.note, self.seen = function.__code__, at, note, {}

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(lambda frame, event, arg: self.line if frame.f_code is self.code else None)

    def __exit__(self, *_):
        sys.settrace(self.before)

    def line(self, frame, event, arg):
        found = frame.f_locals
        for name in self.at:
            if name in found and found[name] is not self.seen.get(name):
                self.seen[name] = found[name]
                self.note(name, found)
            elif name not in found:
                self.seen.pop(name, None)
        return self.line


def numbers(x):
    "A tensor as lists that JSON keeps exactly."
    return x.detach().double().tolist() if x.dtype.is_floating_point else x.long().tolist()


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<end>", *WORDS])}, unk_token="a"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<end>", padding_side="left")


def tiny(kind: str, seed: int):
    "A Llama in float64 that ends every second or third word, and never says the padding."
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
                         pad_token_id=0, eos_token_id=1, bos_token_id=None, num_labels=1, tie_word_embeddings=False, initializer_range=0.5)
    if kind == "judge":
        return LlamaForSequenceClassification(config).double()
    model = LlamaForCausalLM(config).double()
    base = model.lm_head.weight.data
    model.lm_head = torch.nn.Linear(16, 12, dtype=torch.float64)
    model.lm_head.weight.data = base
    model.lm_head.bias.data = torch.tensor([-1e4, 2.5] + [0.0] * 10, dtype=torch.float64)
    return model


def ppo_run(**options) -> dict:
    "One update of `PPOTrainer.train` in two passes, as it saw it."
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    words, seen = tokenizer(), {"passes": []}
    rows = Dataset.from_list([{"input_ids": words(" ".join(WORDS[i:i + 2])).input_ids} for i in range(BATCH)])
    settings = dict(bf16=False, gradient_checkpointing=False, report_to=[], use_cpu=True, per_device_train_batch_size=BATCH, num_ppo_epochs=2, total_episodes=BATCH, response_length=LENGTH,
                    stop_token="eos", temperature=1.0, learning_rate=0.03, missing_eos_penalty=1.0, kl_coef=0.1, num_sample_generations=0, save_strategy="no", disable_tqdm=True, seed=3)

    def note(name, v):
        if name == "advantages_reversed":
            seen.update({k: numbers(v[k]) for k in ("logprobs", "ref_logprobs", "scores", "values", "rewards", "kl", "padding_mask", "padding_mask_p1")})
        elif name == "returns":
            seen["advantages"], seen["returns"] = numbers(v["advantages"]), numbers(v["returns"])
        elif name == "ppo_epoch_idx" and "whitened" not in seen:
            seen["whitened"] = numbers(v["advantages"])
        elif name == "loss":
            grads = torch.autograd.grad(v["loss"], [v["new_logprobs"], v["vpred"]], retain_graph=True)
            order = torch.as_tensor(v["micro_batch_inds"]).argsort()      # the rows in the order of the rollouts
            seen["passes"].append({"new_logprobs": numbers(v["new_logprobs"][order]), "vpred": numbers(v["vpred"][order]), "pg_loss": v["pg_loss"].item(), "vf_loss": v["vf_loss"].item(),
                                   "loss": v["loss"].item(), "d_logprobs": numbers(grads[0][order]), "d_values": numbers(grads[1][order])})
        elif name == "approxkl":
            seen["passes"][-1] |= {k: v[k].item() for k in ("pg_clipfrac", "vf_clipfrac")}

    with tempfile.TemporaryDirectory() as out, quiet(), double():
        args = PPOConfig(output_dir=out, **settings | options)
        trainer = PPOTrainer(args, words, tiny("policy", 0), tiny("policy", 1), tiny("judge", 2), rows, tiny("judge", 4))
        with Locals(PPOTrainer.train, ("advantages_reversed", "returns", "ppo_epoch_idx", "loss", "approxkl"), note):
            trainer.train()
    keep = ("kl_coef", "kl_estimator", "cliprange", "cliprange_value", "vf_coef", "gamma", "lam", "whiten_rewards")
    return {"settings": {k: getattr(args, k) for k in keep}} | seen


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def double():
    "Within: what is made of whole numbers is float64, or TRL's count / (count - 1) would round to float32."
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def group_run(method: str, **options) -> dict:
    "Rewards and advantages of one generation of `GRPOTrainer` or `RLOOTrainer`."
    import trl
    from datasets import Dataset
    seen, trainer_class = {}, getattr(trl, f"{method}Trainer")

    def note(name, v):
        if "advantages" in v and "all_process_advantages" in v and "advantages" not in seen:
            seen.update(rewards=numbers(v["rewards"].float()), advantages=numbers(v["all_process_advantages"].float()))

    def reward(completions, **_):
        return [float(len(set(c.split()))) for c in completions]

    with tempfile.TemporaryDirectory() as out, quiet():
        args = getattr(trl, f"{method}Config")(output_dir=out, per_device_train_batch_size=8, num_generations=4, max_completion_length=LENGTH, max_steps=1, use_cpu=True, bf16=False,
                                               gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True, beta=0.0, seed=3, logging_strategy="no", **options)
        trainer = trainer_class(model=tiny("policy", 0).float(), reward_funcs=reward, args=args, processing_class=tokenizer(),
                                train_dataset=Dataset.from_list([{"prompt": w} for w in WORDS]))
        with Locals(trainer_class._generate_and_score_completions, ("all_process_advantages",), note):
            trainer.train()
    return seen | {"group": 4}


def stub(logps, loss_type: str, beta: float, high: float) -> SimpleNamespace:
    "Stands for the trainer in `GRPOTrainer._compute_loss`: settings, and a model that gives the log-probabilities `logps`."
    args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    same = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x)
    return SimpleNamespace(aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=beta, args=args, loss_type=loss_type,
                           epsilon_low=0.2, epsilon_high=high, use_vllm=False, model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, max_completion_length=7,
                           accelerator=same, _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
                           _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None))


def grpo_losses() -> dict:
    "Values and gradients of TRL's GRPO losses on the same four answers."
    from trl import GRPOTrainer
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(4, 6, generator=g, dtype=torch.float64) * 2
    new, ref = (old + 0.3 * torch.randn(4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    advantages = torch.randn(4, generator=g, dtype=torch.float64)
    mask = (torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]).long()
    given, cases = {"logps": new, "old_logps": old, "ref_logps": ref, "advantages": advantages, "mask": mask}, []
    for loss_type in ("grpo", "bnpo", "dapo", "dr_grpo"):
        for beta, high in ((0.0, 0.2), (0.04, 0.28)):
            logps = new.clone().requires_grad_()
            inputs = {"prompt_ids": torch.zeros(4, 1).long(), "prompt_mask": torch.ones(4, 1).long(), "completion_ids": torch.zeros(4, 6).long(), "completion_mask": mask, "advantages": advantages,
                      "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum()}
            loss = GRPOTrainer._compute_loss(stub(logps, loss_type, beta, high), None, inputs)
            cases.append({"loss_type": loss_type, "beta": beta, "clip_high": high, "loss": loss.item(), "grad": numbers(torch.autograd.grad(loss, logps)[0])})
    return {k: numbers(v) for k, v in given.items()} | {"clip": 0.2, "max_new_tokens": 7, "cases": cases}


def whitened() -> dict:
    "TRL's `masked_whiten` with and without the shift of the mean."
    from trl.experimental.ppo.ppo_trainer import masked_mean, masked_var, masked_whiten
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 2
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    with double():
        both = {str(shift): numbers(masked_whiten(x, mask, shift_mean=shift)) for shift in (True, False)}
        return {"x": numbers(x), "mask": numbers(mask), "mean": masked_mean(x, mask).item(), "var": masked_var(x, mask).item(), "whitened": both}


def figures() -> dict:
    "All that TRL says."
    return {"ppo": [ppo_run(), ppo_run(kl_estimator="k3", whiten_rewards=True, gamma=0.9, lam=0.8)], "whiten": whitened(), "grpo": grpo_losses(),
            "advantages": {"grpo": group_run("GRPO"), "dr_grpo": group_run("GRPO", scale_rewards="none"), "rloo": group_run("RLOO")}}


if __name__ == "__main__":
    import json
    from importlib.metadata import version
    from record import ROOT
    torch.set_num_threads(1)
    path = ROOT / "data" / "trl_ppo.json"
    versions = {n: version(n) for n in ("trl", "transformers", "torch")}
    path.write_text(json.dumps({"what": " ".join(__doc__.split()), "command": "python benchmarks/trl_ppo.py", "versions": versions, **figures()}) + "\n", encoding="utf-8")
    print(f"written: {path.relative_to(ROOT)}, {path.stat().st_size} bytes")
