"""Every training stage on a tiny model, for one process or several: python stages_program.py FOLDER (see test_stages_two.py)."""
import copy
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from llm_course.model import ModelConfig, Transformer
from llm_course.packing import stack_rows
from llm_course.ppo import PPOConfig, train_ppo
from llm_course.preference import train_preference
from llm_course.pretrain import pretrain
from llm_course.reward import RewardModel, pair_examples, train_reward
from llm_course.sft import sft, sft_examples
from llm_course.step import TrainConfig
from llm_course.tokenizer import Tokenizer, train_tokenizer
from llm_course.trainer import seed_all
from llm_course.world import instruction_rows, make_village, preference_rows, village_documents

T = 96


def material(folder: Path) -> tuple[Tokenizer, list, list, list]:
    "Tokenizer, rows of text, conversations and pairs: the same in every process."
    village = make_village(n_people=20)
    texts = [d["text"] for d in village_documents(village, 60_000)]
    if not (folder / "tokenizer").exists():
        train_tokenizer(texts, 400).save(folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    ids = torch.tensor([i for t in tokenizer.encode_batch(texts) for i in [tokenizer.bos_id, *t]])
    rows = [{"input_ids": r, "labels": r, "doc_ids": (r == tokenizer.bos_id).cumsum(0)} for r in ids[:len(ids) // T * T].view(-1, T)]
    chats = [{"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]} for r in instruction_rows(village, 60)[0]]
    return tokenizer, rows, sft_examples(chats, tokenizer, T)[0], preference_rows(village, 40)


def config(**kw) -> TrainConfig:
    return TrainConfig(**({"steps": 3, "batch_size": 6, "micro_batch": 2, "lr": 1e-3, "log_every": 1, "eps": 1e-6} | kw))


def all_stages(folder: Path) -> dict[str, torch.nn.Module]:
    "Train every stage; returns the models, and writes the main process's curves and weights below `folder`."
    torch.set_num_threads(1)
    tokenizer, rows, chats, pairs = material(folder)
    seed_all(0)
    base = Transformer(ModelConfig(len(tokenizer), dim=32, n_layers=2, n_heads=2, max_seq_len=T, tie_embeddings=False))
    curves, models = {}, {}

    def keep(stage, model, trainer, stats=()):
        curves[stage] = [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in trainer.history]
        models[stage] = copy.deepcopy(model)

    keep("pretrain", base, pretrain(base, rows[:-4], config(), val_rows=rows[-4:]))
    keep("sft", base, sft(base, chats[:-5], config(batch_size=5), tokenizer, val_examples=chats[-5:]))      # five rows: one process has one more than the other
    examples, _ = pair_examples(pairs, tokenizer, T)
    seed_all(1)
    judge = RewardModel(copy.deepcopy(base))
    keep("reward", judge, train_reward(judge, examples, config(), tokenizer))
    policy = copy.deepcopy(base)
    keep("dpo", policy, train_preference(policy, examples, config(), tokenizer, reference=base))
    prompts = [p for p in (tokenizer.chat(pair["prompt"], add_generation_prompt=True)[0] for pair in pairs) if len(p) < T - 12]
    for name, divide in (("ppo", False), ("ppo divided", True)):
        actor = copy.deepcopy(base)
        c = PPOConfig(rollouts=9, epochs=2, max_new_tokens=12, divide=divide)
        keep(name, actor, train_ppo(actor, copy.deepcopy(judge), prompts, tokenizer, config(steps=6, batch_size=6), c)[0])
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "curves.json").write_text(json.dumps(curves))
        for stage, model in models.items():
            save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / f"{stage}.safetensors")
    return models


if __name__ == "__main__":
    all_stages(Path(sys.argv[1]))
