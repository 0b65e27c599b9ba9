"""Special tokens before or after pretraining, on a tiny model: what appending rows to the vocabulary does to a trained model, how fine-tuning goes on
from there, what padded rows take from the distribution, and which entries of the vocabulary were never trained."""
import random
import time

import numpy as np
import torch
import torch.nn.functional as F

from llm_course.model import ModelConfig, Transformer
from llm_course.tokenizer import SPECIAL_TOKENS, padded_vocab, token_counts, train_tokenizer, unreachable_tokens
from llm_course.world import answer, make_tasks, make_village, python_code, village_documents
from record import arguments, save

LEN, BATCH = 64, 16
KINDS = ("random 0.02", "random 1", "mean")


def rows_of(ids: list[int]) -> torch.Tensor:
    n = len(ids) // (LEN + 1)
    return torch.tensor(ids[:n * (LEN + 1)]).view(n, LEN + 1)


def train(model, rows, labels, steps, lr, seed, at=(), measure=None):
    "AdamW with a linear decay; returns what `measure` gave at the steps `at`."
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer, generator, seen = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95)), torch.Generator().manual_seed(seed), {}
    for step in range(steps + 1):
        if step in at:
            seen[step] = measure()
        pick = torch.randint(len(rows), (BATCH,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / (steps + 1))
        loss = F.cross_entropy(model(rows[pick, :-1]).flatten(0, 1), labels[pick, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return seen


@torch.no_grad()
def loss_of(model, rows, labels=None):
    labels = rows if labels is None else labels
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).item()


@torch.no_grad()
def mass(model, rows, new: list[int]) -> float:
    "Mean probability of the ids `new` on plain text."
    return model(rows[:, :-1]).softmax(-1)[..., new].sum(-1).mean().item()


def with_rows(model, n: int, kind: str, seed: int):
    "A copy whose vocabulary has n rows more."
    config = ModelConfig(**{**vars(model.config), "vocab_size": model.config.vocab_size + n})
    copy, old = Transformer(config), model.embed_tokens.weight.detach()
    generator = torch.Generator().manual_seed(seed)
    new = old.mean(0).expand(n, -1).clone() if kind == "mean" else torch.randn(n, old.shape[1], generator=generator) * float(kind.split()[1])
    state = {**model.state_dict(), "embed_tokens.weight": torch.cat([old, new])}
    copy.load_state_dict(state)
    return copy


def chat_rows(tokenizer, tasks, rng, roles: dict[str, int] | None, plain: bool = False):
    "Examples padded to a row, and labels on the answers; `roles` gives special tokens other ids, `plain` writes them as text."
    rows, labels = [], []
    for task in tasks:
        messages = [{"role": "user", "content": task["prompt"]}, {"role": "assistant", "content": answer(task, rng)}]
        if plain:
            parts = [tokenizer.encode(s) for s in ("\nUser: " + task["prompt"], "\nAssistant:", " " + messages[1]["content"] + "\nUser:")]
            ids = [tokenizer.bos_id, *parts[0], *parts[1], *parts[2]]
            mask = [0] * (len(ids) - len(parts[2])) + [1] * len(parts[2])
        else:
            ids, mask = tokenizer.chat(messages)
            ids = [(roles or {}).get(i, i) for i in ids]
        if len(tokenizer.encode(task["prompt"] + messages[1]["content"])) <= LEN - 20:      # the same conversations in every form
            assert len(ids) <= LEN + 1
            rows.append(ids + [tokenizer.bos_id] * (LEN + 1 - len(ids)))
            labels.append([i if m else -100 for i, m in zip(ids, mask)] + [-100] * (LEN + 1 - len(ids)))
    return torch.tensor(rows), torch.tensor(labels)


def one_seed(seed: int, steps: int, sft_steps: int) -> dict:
    torch.manual_seed(seed)
    village = make_village(seed)
    texts = [d["text"] for d in village_documents(village, 700_000, seed)]
    code = [d["text"] for d in python_code(200_000)]
    tokenizer = train_tokenizer(texts[:300] + code, 1000)
    bodies = tokenizer.encode_batch(texts)
    ids = [i for b in bodies for i in (tokenizer.bos_id, *b)]
    rows = rows_of(ids)
    held, rows = rows[:64], rows[64:]
    size = padded_vocab(len(tokenizer), 128)
    tasks = make_tasks(village, "train", 400, seed)
    rng = random.Random(seed)
    rng.shuffle(tasks)
    val, tasks = tasks[:200], tasks[200:]
    out = {"vocabulary": len(tokenizer), "padded": size, "sft": {}}

    started = time.process_time()
    before = Transformer(ModelConfig(size, dim=64, n_layers=2, n_heads=2, max_seq_len=LEN))
    out["padded_first_loss"] = loss_of(before, held)
    train(before, rows, rows, steps, 3e-3, seed)
    out["seconds"] = time.process_time() - started
    out["loss"] = loss_of(before, held)
    reserved = [i for i in tokenizer.special_ids if i != tokenizer.bos_id]
    out["reserved_mass"], out["padded_mass"] = mass(before, held, reserved), mass(before, held, list(range(len(tokenizer), size)))

    # the same without any row for the special tokens: ids shifted down by seven, then seven rows appended
    shift = {i: i - 7 for i in range(8, len(tokenizer))} | {0: 0}
    table = torch.tensor([shift.get(i, 0) for i in range(len(tokenizer))])
    torch.manual_seed(seed)
    bare = Transformer(ModelConfig(len(tokenizer) - 7, dim=64, n_layers=2, n_heads=2, max_seq_len=LEN))
    train(bare, table[rows], table[rows], steps, 3e-3, seed)
    out["bare_loss"] = loss_of(bare, table[held])
    n = len(tokenizer) - 7
    moved = shift | {old: n + k for k, old in enumerate(reserved)}
    arms = {"reserved": (before, None), "plain text": (before, "plain")} | {kind: (with_rows(bare, 7, kind, seed), moved) for kind in KINDS}
    for name, (model, roles) in arms.items():
        plain = roles == "plain"
        x, y = chat_rows(tokenizer, tasks, random.Random(1), None if plain else roles, plain)
        vx, vy = chat_rows(tokenizer, val, random.Random(2), None if plain else roles, plain)
        told = {"held_out_after_resize": loss_of(model, held if roles in (None, "plain") else table[held])}
        if roles and not plain:
            told["new_mass"] = mass(model, table[held], list(range(n, n + 7)))
        told["tokens_per_conversation"] = (vx != tokenizer.bos_id).sum().item() / len(vx)
        copy = Transformer(model.config)
        copy.load_state_dict(model.state_dict())
        told["sft_loss"] = train(copy, x, y, sft_steps, 1e-3, seed, at=(0, 20, sft_steps), measure=lambda: loss_of(copy, vx, vy))
        told["sft_loss_per_answer"] = {k: v * (vy[:, 1:] >= 0).sum().item() / len(vy) for k, v in told["sft_loss"].items()}
        out["sft"][name] = told

    # tokens that training never met
    counts = token_counts(tokenizer, texts)
    norms = before.embed_tokens.weight.detach().norm(dim=1)[:len(tokenizer)].numpy()
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.special_ids)
    never, often = ordinary[counts[ordinary] == 0], ordinary[counts[ordinary] > 0]
    out["never"] = len(never)
    out["unreachable"] = len(set(unreachable_tokens(tokenizer)) & set(never.tolist()))
    out["auc_norm"] = float((norms[never][:, None] < norms[often][None]).mean())
    centred = before.embed_tokens.weight.detach()[:size]
    pad = F.normalize(centred[len(tokenizer):].mean(0), dim=0)
    near = (F.normalize(centred, dim=1) @ pad).numpy()[:len(tokenizer)]
    out["auc_padding"] = float((near[never][:, None] > near[often][None]).mean())
    return out


if __name__ == "__main__":
    args = arguments(__doc__, seeds=3, steps=300, sft_steps=100)
    torch.set_num_threads(1)
    figures = {"seeds": [one_seed(s, args.steps, args.sft_steps) for s in range(args.seeds)], "new_rows": len(SPECIAL_TOKENS) - 1}
    for seed in figures["seeds"]:
        print(seed)
    if args.save:
        save("special_tokens", "Special tokens before or after pretraining, padded and untrained rows, in a model of 64 channels and 2 layers", figures, ("tokenizers",))
