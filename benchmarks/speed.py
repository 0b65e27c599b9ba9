"""Training steps and generation: our Transformer against transformers' LlamaForCausalLM, with the same weights, side by side.

Each measurement runs ours and theirs in turn, several times; the record keeps the medians of both and the ratio of each pair.
On a GPU (--device cuda) both run in bfloat16, each as it is and compiled."""
import os
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial

import torch
import torch.nn.functional as F

import record
from llm_course.generate import PackedModel, generate
from llm_course.hub import save_model
from llm_course.model import ModelConfig, Transformer

TIMER = "wall"  # "cpu" counts processor time: for a machine that others use as well, with one thread
SHAPES = {  # name: configuration; batch x length of a training step; tokens of prompt and answer in generation
    "laptop": (ModelConfig(1024, dim=128, n_layers=4, n_heads=4, max_seq_len=256), [(8, 128), (32, 128)], (32, 96)),
    "medium": (ModelConfig(8192, dim=384, n_layers=6, n_heads=6, max_seq_len=512), [(1, 512), (8, 128)], (32, 64)),
    "SmolLM2-135M": (ModelConfig(49152, dim=576, n_layers=30, n_heads=9, n_kv_heads=3, ffn_dim=1536, max_seq_len=2048, rope_theta=100_000.0),
                     [(1, 128)], (8, 32)),
}


def pair(config: ModelConfig, device: str, dtype: torch.dtype):
    "Our model with random weights, and the same weights in transformers."
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    ours = Transformer(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()
    return ours.to(device, dtype), theirs.to(device, dtype)


def clock(f, device: str) -> float:
    "Seconds that a call takes."
    now = time.process_time if TIMER == "cpu" else time.perf_counter
    start = now()
    f()
    if device == "cuda":
        torch.cuda.synchronize()
    return now() - start


def versus(runs: dict, device: str, repeats: int, units: int) -> dict:
    """Units a second of each entry of `runs`, by the median; for all but the first (ours) the median, smallest and largest ratio
    of its time to ours in the same round."""
    for f in runs.values():
        f()  # warm up, compile
    names, times = list(runs), {n: [] for n in runs}
    for r in range(repeats):
        for n in names if r % 2 == 0 else reversed(names):
            times[n].append(clock(runs[n], device))
    out = {"per_second": {n: round(units / statistics.median(t), 1) for n, t in times.items()}, "ratio": {}}
    for n in names[1:]:
        ratios = [t / o for t, o in zip(times[n], times[names[0]])]
        out["ratio"][n] = {"median": round(statistics.median(ratios), 2), "min": round(min(ratios), 2), "max": round(max(ratios), 2)}
    return out


def step(forward, model, ids) -> float:
    "Loss and gradients of next-token prediction."
    model.zero_grad(set_to_none=True)
    logits = forward(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    return loss.item()


def train(ours, theirs, batch: int, length: int, device: str, repeats: int) -> dict:
    ids = torch.randint(0, ours.config.vocab_size, (batch, length + 1), device=device)
    hf = lambda m, x: m(x, use_cache=False).logits
    runs = {"ours": partial(step, ours, ours, ids), "transformers": partial(step, partial(hf, theirs), theirs, ids)}
    if device == "cuda":
        a, b = torch.compile(ours), torch.compile(theirs)
        runs |= {"ours, compiled": partial(step, a, ours, ids), "transformers, compiled": partial(step, partial(hf, b), theirs, ids)}
    losses = {n: round(f(), 6) for n, f in runs.items()}
    gap = (ours.embed_tokens.weight.grad - theirs.model.embed_tokens.weight.grad).abs().max().item()
    assert max(losses.values()) - min(losses.values()) < (1e-4 if device == "cpu" else 2e-2), losses
    return versus(runs, device, repeats, batch * length) | {"batch": batch, "length": length, "gradient_difference": gap}


@torch.inference_mode()
def bare_loop(model, ids, n: int) -> list[list[int]]:
    "Greedy decoding by hand with transformers' model and cache: what its `generate` costs on top is left out."
    from transformers import DynamicCache
    cache, out = DynamicCache(config=model.config), []
    for _ in range(n):
        token = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
        out.append(token)
        ids = token[:, None]
    return torch.stack(out, 1).tolist()


def their_generate(model, ids, n: int, **more) -> list[list[int]]:
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0, **more)
    return out[:, ids.shape[1]:].tolist()


def decode(ours, theirs, batch: int, lengths: tuple[int, int], device: str, repeats: int) -> dict:
    prompt, n = lengths
    ids = torch.randint(0, ours.config.vocab_size, (batch, prompt), device=device)
    prompts = ids.tolist()
    runs = {"ours": lambda: generate(ours, prompts, n, -1, 0)}
    if device == "cpu":
        packed = PackedModel(ours, batch)
        runs["ours, packed before"] = lambda: generate(packed, prompts, n, -1, 0)
    runs |= {"transformers generate": partial(their_generate, theirs, ids, n), "transformers bare loop": partial(bare_loop, theirs, ids, n)}
    if theirs.config.vocab_size < 40_000 or device == "cuda":  # the static cache once, where it is cheap
        runs["transformers generate, static cache"] = partial(their_generate, theirs, ids, n, cache_implementation="static",
                                                              **({"disable_compile": True} if device == "cpu" else {}))
    answers = {name: f() for name, f in runs.items()}
    same = {name: sum(x == y for a, b in zip(answers["ours"], rows) for x, y in zip(a, b)) / (batch * n) for name, rows in answers.items()}
    return versus(runs, device, repeats, batch * n) | {"batch": batch, "prompt": prompt, "new_tokens": n, "same_ids": same}


def main() -> None:
    global TIMER
    args = record.arguments(__doc__, device="cpu", repeats=5, shapes=",".join(SHAPES), timer="wall")
    TIMER = args.timer
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here: run this with --device cpu")
    warnings.filterwarnings("ignore")
    dtype, figures = torch.float32 if args.device == "cpu" else torch.bfloat16, {}
    for name in args.shapes.split(","):
        config, steps, lengths = SHAPES[name]
        ours, theirs = pair(config, args.device, dtype)
        ids = torch.randint(0, config.vocab_size, (2, 32), device=args.device)
        with torch.no_grad():
            gap = (ours(ids) - theirs(ids).logits).abs().max().item()
        assert gap < (1e-4 if args.device == "cpu" else 0.2), gap
        figures[name] = {"parameters": sum(p.numel() for p in ours.parameters()), "logit_difference": gap,
                         "training": [train(ours, theirs, b, t, args.device, args.repeats) for b, t in steps],
                         "generation": [decode(ours, theirs, b, lengths, args.device, args.repeats) for b in (1, 16)]}
        for kind in ("training", "generation"):
            for r in figures[name][kind]:
                print(name, kind, r, flush=True)
    figures["settings"] = {"device": args.device, "dtype": str(dtype), "repeats": args.repeats, "threads": torch.get_num_threads(),
                           "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "attention": "sdpa", "timer": args.timer}
    if args.save:
        record.save(f"speed_{args.device}", "Training steps and greedy generation (tokens a second) of our Transformer and of transformers' "
                    "LlamaForCausalLM with the same weights, side by side", figures, ("transformers",))


if __name__ == "__main__":
    main()
