"""Training, whole steps: our Trainer, a plain loop in nanoGPT's manner, and transformers' Trainer, side by side.

The same shape, the same weights at the start, the same rows, precision, batch, optimizer (fused AdamW), clipping and schedule. A second plain loop
multiplies by `llm_course.products`, as ours does: what remains of the difference is what the trainer costs. Each
round runs all of them in turn; the record keeps the median speed of each, and the ratios of the rounds. Measured is from the end of the
third step to the end of the last, so that nothing of the start counts. A last part measures what data loading costs: rows from a token
file against one batch that is always the same."""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import record
from llm_course.hub import save_model
from llm_course.model import ModelConfig, Transformer
from llm_course.packing import TokenRows, packed_loss, stack_rows, write_tokens
from llm_course.products import Linear, linear
from llm_course.step import TrainConfig, learning_rate
from llm_course.trainer import Callback, Trainer, batch_indices

SKIP = 3  # steps that are not timed
SHAPES = {  # configuration; rows a step; tokens a row; steps a round
    "laptop": (ModelConfig(1024, dim=128, n_layers=4, n_heads=4, max_seq_len=256), 16, 128, 23),
    "medium": (ModelConfig(8192, dim=384, n_layers=6, n_heads=6, max_seq_len=512), 8, 128, 13),
    "14M": (ModelConfig(4096, dim=384, n_layers=6, n_heads=6, max_seq_len=512), 4, 512, 13),
}


def settings(steps: int, batch: int, precision: str) -> TrainConfig:
    return TrainConfig(steps=steps, batch_size=batch, lr=1e-3, warmup=0.1, log_every=10_000, precision=precision, seed=1)


class Clock(Callback):
    "The time at the end of each step."

    def __init__(self):
        self.times, self.losses = [], []

    def after_step(self, trainer, record):
        self.times.append(time.perf_counter())
        self.losses.append(record["loss"])


def speed(times: list[float], tokens: int) -> float:
    return (len(times) - SKIP) * tokens / (times[-1] - times[SKIP - 1])


def fresh(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config)


def ours(config, rows, c: TrainConfig) -> tuple[list[float], float]:
    clock = Clock()
    Trainer(fresh(config), packed_loss, rows, c, stack_rows, callbacks=[clock]).fit()
    return clock.times, clock.losses[-1]


class PlainBlock(nn.Module):
    "A layer as one writes it in an afternoon: RMSNorm, rotary attention, SwiGLU."

    def __init__(self, c: ModelConfig, layer: type[nn.Linear]):
        super().__init__()
        self.heads, self.n1, self.n2 = c.n_heads, nn.RMSNorm(c.dim, c.norm_eps), nn.RMSNorm(c.dim, c.norm_eps)
        self.q, self.k, self.v, self.o = (layer(c.dim, c.dim, bias=False) for _ in range(4))
        self.gate, self.up, self.down = layer(c.dim, c.ffn_dim, bias=False), layer(c.dim, c.ffn_dim, bias=False), layer(c.ffn_dim, c.dim, bias=False)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        h = self.n1(x)
        q, k, v = (p(h).view(B, T, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        turn = lambda t: t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin
        y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, C))
        h = self.n2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Plain(nn.Module):
    "The same model in plain PyTorch, with the weights of ours."

    def __init__(self, model: Transformer, layer: type[nn.Linear]):
        super().__init__()
        c, self.product = model.config, F.linear if layer is nn.Linear else linear
        self.embed, self.layers, self.norm = nn.Embedding(c.vocab_size, c.dim), nn.ModuleList(PlainBlock(c, layer) for _ in range(c.n_layers)), nn.RMSNorm(c.dim, c.norm_eps)
        self.register_buffer("cos", model.rope_cos)
        self.register_buffer("sin", model.rope_sin)
        with torch.no_grad():
            self.embed.weight.copy_(model.embed_tokens.weight)
            for mine, yours in zip(self.layers, model.layers):
                a, f = yours.self_attn, yours.mlp
                for x, y in zip((mine.q, mine.k, mine.v, mine.o, mine.gate, mine.up, mine.down), (a.q_proj, a.k_proj, a.v_proj, a.o_proj, f.gate_proj, f.up_proj, f.down_proj)):
                    x.weight.copy_(y.weight)

    def forward(self, ids, targets):
        x, T = self.embed(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:T].to(x.dtype), self.sin[:T].to(x.dtype))
        logits = self.product(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def plain(config, rows, c: TrainConfig, layer: type[nn.Linear] = nn.Linear) -> tuple[list[float], float]:
    "The loop of nanoGPT: a batch from the token array, loss, backward, clip, step."
    model, times = Plain(fresh(config), layer), []
    matrices, rest = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": c.weight_decay}, {"params": rest, "weight_decay": 0.0}], lr=c.lr, betas=c.betas, fused=True)
    for step in range(c.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, c)
        ids = torch.stack([torch.from_numpy(rows.tokens[i * rows.seq_len:(i + 1) * rows.seq_len].astype(np.int64)) for i in batch_indices(step, c, len(rows))])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=c.precision == "bf16"):
            loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = loss.item()
        times.append(time.perf_counter())
    return times, last


def theirs(config, rows, c: TrainConfig) -> tuple[list[float], float]:
    "transformers: LlamaForCausalLM and its Trainer, on the same rows in the same order."
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_model(fresh(config), folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
        order = [i for step in range(c.steps) for i in batch_indices(step, c, len(rows))]
        data = [{"input_ids": rows[i]["input_ids"], "labels": rows[i]["input_ids"]} for i in order]
        times = []

        class Ticks(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kw):
                times.append(time.perf_counter())

        class InOrder(transformers.Trainer):
            def _get_train_sampler(self, *args):
                return torch.utils.data.SequentialSampler(data)

        args = transformers.TrainingArguments(
            folder, max_steps=c.steps, per_device_train_batch_size=c.batch_size, learning_rate=c.lr, weight_decay=c.weight_decay, adam_beta1=c.betas[0],
            adam_beta2=c.betas[1], max_grad_norm=c.clip, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": c.min_lr},
            warmup_steps=max(1, round(c.warmup * c.steps)), optim="adamw_torch_fused", bf16=c.precision == "bf16", use_cpu=True, report_to=[], save_strategy="no",
            logging_strategy="steps", logging_steps=c.steps, disable_tqdm=True, dataloader_num_workers=0, seed=1)
        trainer = InOrder(model=model, args=args, train_dataset=data, callbacks=[Ticks()])
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=c.precision == "bf16"):
            ids = torch.stack([d["input_ids"] for d in data[-c.batch_size:]])
            return times, model(ids, labels=ids, use_cache=False).loss.item()


CONTENDERS = {"ours": ours, "plain loop": plain, "plain loop, our products": partial(plain, layer=Linear), "transformers Trainer": theirs}


class SameRow:
    "Data that costs nothing: always the same row."

    def __init__(self, rows):
        self.row, self.n = rows[0], len(rows)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.row


def peak_memory(shape: str, precision: str, name: str) -> float:
    "Highest memory of a fresh process that runs one contender, in MiB."
    done = subprocess.run([sys.executable, __file__, "--only", name, "--shapes", shape, "--precision", precision], capture_output=True, text=True, check=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    return json.loads(done.stdout.splitlines()[-1])["peak_mib"]


def high_water() -> float:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) / 1024


def rows_of(config, length: int, n: int, folder: str) -> TokenRows:
    "A token file of random tokens: one document a row, so that all contenders may attend to the same tokens."
    draw = np.random.default_rng(0)
    write_tokens(f"{folder}/train.bin", ([1, *draw.integers(2, config.vocab_size, length - 1)] for _ in range(n)), config.vocab_size)
    return TokenRows(f"{folder}/train.bin", length, 1)


def measure(shape: str, precision: str, repeats: int, folder: str) -> dict:
    config, batch, length, steps = SHAPES[shape]
    rows, c = rows_of(config, length, batch * steps, folder), settings(steps, batch, precision)
    speeds, losses, data = {n: [] for n in CONTENDERS}, {}, []
    for r in range(repeats + 1):  # the first round warms up
        for name in list(CONTENDERS) if r % 2 else list(CONTENDERS)[::-1]:
            times, losses[name] = CONTENDERS[name](config, rows, c)
            speeds[name].append(speed(times, batch * length))
        data.append(speed(ours(config, SameRow(rows), c)[0], batch * length) / speeds["ours"][-1])
    ratio = lambda values: {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}
    return {"shape": shape, "precision": precision, "batch": batch, "length": length, "parameters": sum(p.numel() for p in fresh(config).parameters()), "rounds": repeats,
            "tokens_per_second": {n: round(statistics.median(v[1:])) for n, v in speeds.items()},
            "ours_over": {n: ratio([a / b for a, b in zip(speeds["ours"][1:], v[1:])]) for n, v in speeds.items() if n != "ours"},
            "last_loss": {n: round(v, 4) for n, v in losses.items()}, "no_data_over_data": ratio(data[1:]),
            "peak_mib": {n: round(peak_memory(shape, precision, n)) for n in CONTENDERS}}


def main() -> None:
    args = record.arguments(__doc__, repeats=5, shapes=",".join(SHAPES), precision="no,bf16", only="")
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        if args.only:
            config, batch, length, steps = SHAPES[args.shapes]
            CONTENDERS[args.only](config, rows_of(config, length, batch * steps, folder), settings(6, batch, args.precision))
            print(json.dumps({"peak_mib": high_water()}))
            return
        figures = []
        for shape in args.shapes.split(","):
            for precision in args.precision.split(","):
                figures.append(measure(shape, precision, args.repeats, folder))
                print(json.dumps(figures[-1], indent=1))
    if args.save:
        record.save("training_speed", "Whole training steps (tokens a second) of our Trainer, of a plain PyTorch loop and of transformers' Trainer, side by side, on a CPU",
                    figures, ("transformers", "accelerate"))


if __name__ == "__main__":
    main()
