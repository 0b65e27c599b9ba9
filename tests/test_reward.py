"""The reward model's parts against known values, real preference formats through its stage, and best-of-n against brute force."""
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from llm_course.bestofn import answer_pool, best_of_n, best_of_n_kl, pool_logps, pool_rewards, subset_weights
from llm_course.formats import convert
from llm_course.model import ModelConfig, Transformer
from llm_course.reading import UserError, read_rows
from llm_course.reward import (RewardModel, bradley_terry_loss, calibration, pair_calibration_error, fit_choices, length_slope, likelihood_weight, pair_examples, pair_logps, pair_rewards, rewards_of,
                               train_reward)
from llm_course.tokenizer import train_tokenizer
from llm_course.trainer import TrainConfig, seed_all

HH = {"chosen": "\n\nHuman: How do plants eat?\n\nAssistant: They make sugar from light.", "rejected": "\n\nHuman: How do plants eat?\n\nAssistant: No idea."}
ULTRA = {"instruction": "Name a river.", "completions": [{"response": "The Rhine.", "overall_score": 8.0}, {"response": "A hill.", "overall_score": 2.0}]}
STRINGS = {"prompt": "What is two and two?", "chosen": "Four.", "rejected": "Five, I think, or so."}
MESSAGES = {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}], "chosen": [{"role": "assistant", "content": "Hello, what can I do?"}],
            "rejected": [{"role": "assistant", "content": "What."}]}
WHOLE = {"chosen": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello."}], "rejected": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Go away."}]}


@pytest.fixture(scope="module")
def tok():
    return train_tokenizer(["How do plants eat? They make sugar from light. Name a river. What is two and two? Hello, what can I do?"] * 20, 400)


def small(tok, **change) -> RewardModel:
    seed_all(0)
    return RewardModel(Transformer(ModelConfig(len(tok), **{"dim": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 128} | change)))


@pytest.mark.parametrize("row", [HH, ULTRA, STRINGS, MESSAGES, WHOLE], ids=["hh-rlhf", "ultrafeedback", "strings", "messages", "whole conversations"])
def test_real_formats_train(tok, row):
    pairs = list(convert([row] * 4, "preference"))
    examples, report = pair_examples(pairs, tok, 128)
    assert report == {"pairs": 4, "too_long": 0}
    said = tok.decode([i for i in examples[0]["chosen_labels"] if i != -100])
    assert said.strip() == pairs[0]["chosen"][-1]["content"]
    trainer = train_reward(small(tok), examples, TrainConfig(steps=8, batch_size=4, lr=1e-2, log_every=1), tok)
    assert trainer.history[-1]["loss"] < trainer.history[0]["loss"] and trainer.history[-1]["accuracy"] == 1.0


@pytest.mark.parametrize("name", ["hh_harmless-base_test.jsonl.gz", "rasbt_instruction-data-with-preference.json", "dpo_en_demo.json"])
def test_public_pairs_train(tok, testdata, name):
    pairs = list(itertools.islice(convert(read_rows(testdata / "pref" / name), "preference"), 40))
    examples, report = pair_examples(pairs, tok, 512)
    assert report["pairs"] + report["too_long"] == 40 and report["pairs"] > 0
    trainer = train_reward(small(tok, max_seq_len=512), examples[:8], TrainConfig(steps=2, batch_size=4, lr=1e-3, log_every=1), tok)
    assert all(math.isfinite(r["loss"]) for r in trainer.history)


def test_the_saved_model_gives_the_same_rewards_in_transformers(tok, tmp_path):
    model = small(tok).eval()
    model.save(tmp_path, tok)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    rows = [tok.chat([{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": text}])[0] for text in ("Yes.", "What can I do? They make sugar.")]
    T = max(map(len, rows))
    ids = torch.tensor([r + [tok.pad_id] * (T - len(r)) for r in rows])
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=(ids != tok.pad_id).long()).logits[:, 0]
    assert logits.tolist() == pytest.approx(rewards_of(model, rows, tok.pad_id), abs=1e-5)


def test_a_margin_asks_for_a_wider_gap(tok):
    gaps = []
    for margin in (0.0, 6.0):
        pairs = [p | {"margin": margin} for p in convert([STRINGS, HH] * 4, "preference")]
        model = small(tok)
        train_reward(model, pair_examples(pairs, tok, 128)[0], TrainConfig(steps=30, batch_size=8, lr=3e-3, log_every=30), tok)
        r = pair_rewards(model, pairs[:2], tok)
        gaps.append((r[:, 0] - r[:, 1]).mean().item())
    assert gaps[1] > gaps[0] + 1


def test_centring_draws_the_level_to_zero(tok):
    levels = []
    for centering in (0.0, 1.0):
        model = small(tok)
        with torch.no_grad():
            model.score.weight += 0.5
        pairs = list(convert([STRINGS, HH] * 4, "preference"))
        train_reward(model, pair_examples(pairs, tok, 128)[0], TrainConfig(steps=30, batch_size=8, lr=3e-3, log_every=30), tok, centering=centering)
        levels.append(pair_rewards(model, pairs[:2], tok).mean().abs().item())
    assert levels[1] < 0.2 and levels[1] <= levels[0]


def test_choices_are_fitted_as_scikit_learn_fits_them():
    from sklearn.linear_model import LogisticRegression
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=draw, dtype=torch.float64)
    won = torch.rand(400, generator=draw) < (x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)).sigmoid()
    differences = torch.where(won[:, None], x, -x)
    for ridge in (0.5, 20.0):
        known = LogisticRegression(C=1 / ridge, fit_intercept=False, tol=1e-10, max_iter=1000).fit(x.numpy(), won.numpy())
        assert fit_choices(differences, ridge).tolist() == pytest.approx(known.coef_[0].tolist(), abs=1e-5)
        assert fit_choices(0.001 * differences).tolist() == pytest.approx((1000 * fit_choices(differences)).tolist(), rel=1e-6)     # the scale of a feature is its weight's
    with pytest.raises(UserError, match="no finite weights"):
        fit_choices(x.abs())
    with pytest.raises(UserError, match="no finite weights"):
        fit_choices(torch.tensor([[0.01], [0.01]]))


def test_a_temperature_changes_certainty_and_no_order():
    draw = torch.Generator().manual_seed(1)
    sure = 3 * torch.randn(4000, generator=draw).abs()
    gaps = torch.where(torch.rand(4000, generator=draw) < (sure / 3).sigmoid(), sure, -sure)       # three times too sure
    temperature = 1 / fit_choices(gaps[:2000, None])[0].item()
    assert temperature == pytest.approx(3, rel=0.15)
    before, after = (calibration(g[2000:]) for g in (gaps, gaps / temperature))
    assert pair_calibration_error(after) < 0.04 < pair_calibration_error(before)
    assert sum(b["n"] * b["right"] for b in before) == pytest.approx(sum(b["n"] * b["right"] for b in after))


def test_length_slope_is_in_gold_points():
    draw = torch.Generator().manual_seed(0)
    gold, n = torch.randn(300, 2, generator=draw), torch.rand(300, 2, generator=draw) * 20
    assert length_slope(5 * gold + 0.5 * n, n, gold) == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_the_mean_over_all_subsets(ties):
    draw = torch.Generator().manual_seed(3)
    proxy = torch.randint(3, (7,), generator=draw).float() if ties else torch.randn(7, generator=draw)
    values = torch.randn(7, generator=draw, dtype=torch.float64)
    for n in range(1, 8):
        means = [values[[i for i in s if proxy[i] == proxy[list(s)].max()]].mean().item() for s in itertools.combinations(range(7), n)]
        assert best_of_n(proxy[None], values[None], n).item() == pytest.approx(sum(means) / len(means), abs=1e-9)
    assert float(subset_weights(1000, 700).sum()) == pytest.approx(1.0, abs=1e-6)


def test_the_kl_is_a_bound_and_its_estimate_is_close():
    p = torch.tensor([0.3, 0.05, 0.4, 0.15, 0.1], dtype=torch.float64)
    drawn = torch.multinomial(p, 400 * 64, replacement=True, generator=torch.Generator().manual_seed(0)).view(400, 64)
    for n in (2, 8, 32):
        above = p.cumsum(0)
        policy = above**n - (above - p)**n
        exact = (policy * (policy / p).log()).sum().item()
        assert exact <= best_of_n_kl(n)
        assert best_of_n(drawn, best_of_n_kl(n, p[drawn]), n).mean().item() == pytest.approx(exact, abs=0.12)


def test_a_pool_is_judged_as_each_answer_alone(tok):
    model, judge = small(tok).body.eval(), small(tok)
    prompts = [[{"role": "user", "content": text}] for text in ("Hello!", "Name a river.")]
    pool = answer_pool(model, tok, prompts, 3, 6, seed=1)
    rewards, logps = pool_rewards(judge, tok, prompts, pool, 6), pool_logps(model, tok, prompts, pool, 6)
    for i, j in itertools.product(range(2), range(3)):
        asked, answer = tok.chat(prompts[i], add_generation_prompt=True)[0], pool[i][j]
        alone = model(torch.tensor([asked + answer]))[0, len(asked) - 1:-1].log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum()
        assert logps[i, j].item() == pytest.approx(alone.item(), abs=1e-4)
        assert rewards[i, j].item() == pytest.approx(rewards_of(judge, [asked + answer], tok.pad_id)[0], abs=1e-5)


def test_the_weight_of_the_likelihood_is_that_of_its_choices(tok):
    model, body = small(tok), small(tok).body.eval()
    rows = [{"prompt": [{"role": "user", "content": f"Name river {i}."}], **{s: [{"role": "assistant", "content": f"{1000 + i * k}."}] for k, s in ((1, "chosen"), (7, "rejected"))}} for i in range(200)]
    r, l = pair_rewards(model, rows, tok), pair_logps(body, rows, tok)
    gaps = sum((x[:, 0] - x[:, 1]) / (x[:, 0] - x[:, 1]).std() for x in (r, l))
    swap = torch.rand(200, generator=torch.Generator().manual_seed(0)) > gaps.sigmoid()
    voted = [p | {"chosen": p["rejected"], "rejected": p["chosen"]} if s else p for p, s in zip(rows, swap)]
    ours, x = likelihood_weight(model, body, voted, tok), torch.stack([r[:, 0] - r[:, 1], l[:, 0] - l[:, 1]], 1)
    w = fit_choices(torch.where(swap[:, None], -x, x))
    assert ours == pytest.approx((w[1] / w[0]).item(), rel=1e-3)


def test_the_records_hold_figures_only():
    folder = Path(__file__).resolve().parent.parent / "data" / "runs"
    for name in ("reward", "best_of_n"):
        text = (folder / f"{name}.json").read_text(encoding="utf-8")
        assert "/tmp/" not in text and len(text) < 60_000
        assert json.loads(text)["figures"]["run"]["pretraining_tokens"] > 0


def test_equal_rewards_cost_ln_2_and_more_with_a_margin():
    r = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (bradley_terry_loss(r, r) == math.log(2)).all() and (bradley_terry_loss(r, r, margin=2.0) > math.log(2)).all()
