"""PPO (and, called from test_grpo.py, GRPO) as processes that are really killed, on real prompts, and on tensors that hypothesis makes up."""
import copy
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from commands import ENV
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_course.formats import to_pair
from llm_course.grpo import GRPOConfig, train_grpo
from llm_course.model import ModelConfig, Transformer
from llm_course.ppo import ActorCritic, PPOConfig, gae, gae_slowly, kl_estimate, make_rollouts, token_logps, token_rewards, train_ppo, whiten, with_next
from llm_course.reading import UserError, read_rows
from llm_course.reward import RewardModel
from llm_course.step import TrainConfig
from llm_course.tokenizer import train_tokenizer
from llm_course.trainer import Callback, seed_all

STEPS, KILLS = 40, 8


class Slow(Callback):
    "Gives a kill time to come; from step `hang` on waits for it."
    def __init__(self, hang):
        self.hang = hang

    def after_step(self, trainer, record):
        time.sleep(300 if record["step"] >= self.hang else 0.004)


def likes_threes(prompts, answers):
    return [float(sum(i % 3 == 0 for i in a)) for a in answers]


def material():
    tokenizer = train_tokenizer(["abcdefgh" * 9], 264)
    seed_all(0)
    policy = Transformer(ModelConfig(len(tokenizer), dim=32, n_layers=2, n_heads=2, max_seq_len=24))
    with torch.no_grad():
        policy.embed_tokens.weight.mul_(5)
    return tokenizer, policy, [tokenizer.chat([{"role": "user", "content": w}], add_generation_prompt=True)[0] for w in ("a", "be", "cab", "dad", "e", "fab")]


def train(kind, folder=None, callbacks=(), steps=STEPS, **options):
    "A run with all that has a state: four steps on each rollout, an adaptive coefficient, scaled scores."
    tokenizer, policy, prompts = material()
    config = TrainConfig(steps, batch_size=4, lr=1e-3, log_every=1, checkpoint_every=3, weight_decay=0.0)
    if kind == "grpo":
        return train_grpo(policy, prompts, tokenizer, config, GRPOConfig(**{"prompts": 2, "group": 4, "epochs": 2, "max_new_tokens": 6, "loss_type": "dapo"} | options), likes_threes, folder, callbacks)[0]
    c = PPOConfig(**{"rollouts": 8, "epochs": 2, "max_new_tokens": 6, "kl_target": 0.5, "kl_horizon": 100, "normalize_scores": True} | options)
    return train_ppo(policy, RewardModel(copy.deepcopy(policy)), prompts, tokenizer, config, c, folder, callbacks, likes_threes)[0]


def digest(trainer) -> str:
    state = trainer.optimizer.state_dict()["state"]
    tensors = [*trainer.model.state_dict().values(), *(torch.as_tensor(v) for i in sorted(state) for _, v in sorted(state[i].items()))]
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def told(history) -> list[dict]:
    "The records of a run without its times."
    return [kept for r in history if len(kept := {k: v for k, v in r.items() if not k.startswith("seconds")}) > 1]


# ---- a process that forks the lives of a run

def serve():
    "For each line `kind folder hang` of the standard input: fork a life of that run, say its number, wait for its end."
    with tempfile.TemporaryDirectory() as warm:      # what is loaded at first use is loaded once
        for kind in ("ppo", "grpo"):
            train(kind, warm + kind, steps=2)
    for line in sys.stdin:
        kind, folder, hang = json.loads(line)
        if not (pid := os.fork()):
            os._exit(life(kind, Path(folder), hang))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def life(kind, folder, hang) -> int:
    try:
        trainer = train(kind, folder, [Slow(hang)])
        (folder / "end").write_text(digest(trainer))
        return 0
    except BaseException as e:
        (folder / "error").write_text(repr(e))
        return 1


@pytest.fixture(scope="session")
def lives():
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    here = os.path.dirname(__file__)
    process = subprocess.Popen([sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r}); import test_ppo; test_ppo.serve()"], env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(kind, folder, hang=10**9) -> int:
        process.stdin.write(json.dumps([kind, str(folder), hang]) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield start, lambda: int(process.stdout.readline())
    process.stdin.close()
    process.wait(20)


def lines(folder) -> int:
    path = folder / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def newest(folder) -> int:
    return max((int(p.name.split("_")[1]) for p in folder.glob("checkpoints/step_*")), default=0)


def killed_often(kind, folder, lives) -> list[int]:
    "Kill a run with SIGKILL at random moments, KILLS times, then let it end; returns how far each life came."
    start, wait = lives
    rng, reached = random.Random(), []
    for n in range(KILLS):
        before = newest(folder)
        pid, begun, wanted = start(kind, folder, before + 6), time.monotonic(), lines(folder) + rng.randint(0, 8)
        while lines(folder) < wanted and newest(folder) < before + 3 and time.monotonic() - begun < 60:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert wait() == -signal.SIGKILL, (folder / "error").read_text() if (folder / "error").exists() else "it ended"
        reached.append(newest(folder))
    start(kind, folder)
    assert wait() == 0, (folder / "error").read_text()
    return reached


@pytest.mark.parametrize("kind", ["ppo"])
def test_killed_at_random_moments_it_ends_as_if_nothing_had_been(kind, lives, tmp_path):
    reached = killed_often(kind, tmp_path, lives)
    whole = train(kind)
    assert (tmp_path / "end").read_text() == digest(whole), reached
    log = told(map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()))
    assert log == told(whole.history), reached
    coefficients = [r["kl_coef"] for r in log if "kl_coef" in r]
    assert len(set(coefficients)) > 3, "the coefficient should move, or its state is not tested"


# ---- settings and states

def test_the_first_step_of_a_rollout_has_ratio_one_at_any_temperature():
    for temperature in (0.5, 1.0, 1.7):
        history = train("ppo", steps=1, temperature=temperature, normalize_scores=False, kl_target=0.0).history
        rollout, step = (next(r for r in history if key in r) for key in ("score", "val/ratio"))
        assert abs(rollout["kl"]) < 1e-5 and abs(step["val/ratio"] - 1) < 1e-5 and step["policy/clipfrac_avg"] == 0


def test_options_change_what_they_say():
    base = train("ppo", steps=8, kl_target=0.0, normalize_scores=False)
    others = {"score_at": "after", "whiten_rewards": True, "kl_estimator": "k3", "normalize_scores": True, "kl_target": 0.1}
    for key, value in others.items():
        other = train("ppo", steps=8, **{"kl_target": 0.0, "normalize_scores": False} | {key: value})
        assert digest(other) != digest(base), key
        assert all(abs(v) < 1e6 for r in other.history for v in r.values()), key
    mask, scores = torch.tensor([[1.0, 1, 0], [1, 1, 1]]), torch.tensor([3.0, 4.0])
    for where, places in (("last", [1, 2]), ("after", [2, 2])):
        assert token_rewards(torch.zeros(2, 3), torch.zeros(2, 3), scores, mask, 0.1, "k1", where).abs().argmax(1).tolist() == places


@pytest.mark.parametrize("change, word", [({"kl_estimator": "k4"}, "kl_estimator"), ({"score_at": "before"}, "score_at"), ({"temperature": 0.0}, "temperature"), ({"rollouts": 0}, "rollouts")])
def test_settings_that_make_no_sense_are_refused(change, word):
    with pytest.raises(UserError, match=word):
        PPOConfig(**change)
    with pytest.raises(UserError, match="prompts"):
        train_ppo(None, None, [], None, TrainConfig(1), PPOConfig())


def test_a_missing_end_is_penalised_once():
    tokenizer, policy, prompts = material()
    model, c = ActorCritic(policy, RewardModel(copy.deepcopy(policy))), PPOConfig(max_new_tokens=12, missing_end_penalty=5.0)
    score = lambda prompts, answers: [0.0] * len(answers)
    rows, stats = make_rollouts(model, policy, score, prompts * 20, tokenizer, c, seed=0)
    ended = [tokenizer.end_id in t[m > 0] for t, m in zip(rows["targets"], rows["mask"])]
    assert 0 < stats["ended"] < 1 and abs(stats["ended"] - sum(ended) / len(ended)) < 1e-6 and abs(stats["score"] + 5 * (1 - stats["ended"])) < 1e-6


# ---- tensors

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_gae_and_whitening_hold_for_any_mask(data):
    B, T = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    starts = [data.draw(st.integers(0, T - 1)) for _ in range(B)]
    ends = [data.draw(st.integers(s + 1, T)) for s in starts]
    mask = torch.tensor([[float(s <= t < e) for t in range(T)] for s, e in zip(starts, ends)])
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    values, scores, logps, ref = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((B, T), (B,), (B, T), (B, T)))
    gamma, lam = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))
    for where in ("last", "after"):
        space = with_next(mask) if where == "after" else mask
        rewards = token_rewards(logps, ref, scores, mask, 0.1, "k1", where)
        advantages = gae(rewards, values, space, gamma, lam)
        for i in range(B):
            inside = space[i] > 0
            slow = gae_slowly(rewards[i][inside].tolist(), values[i][inside].tolist(), gamma, lam)
            assert torch.allclose(advantages[i][inside], torch.tensor(slow, dtype=torch.float64), atol=1e-9)
        assert (advantages * (1 - space) == 0).all()
        assert torch.allclose(rewards.sum(1) - scores, -0.1 * (kl_estimate(logps, ref) * mask).sum(1), atol=1e-9)
    if mask.sum() > 1:
        white = whiten(values, mask)
        assert abs(white.sum()) < 1e-6 and (abs(white[mask > 0].var() - 1) < 1e-3 or values[mask > 0].var() < 1e-5)
        kept = whiten(values, mask, shift_mean=False)
        assert abs((kept.sum() - (values * mask).sum()) / mask.sum()) < 1e-9


def test_estimators_agree_with_the_divergence_in_the_mean():
    p, q = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    mean = {k: (p * kl_estimate(p.log(), q.log(), k)).sum() for k in ("k1", "k2", "k3")}
    assert abs(mean["k1"] - exact) < 1e-12 and abs(mean["k3"] - exact) < 1e-12 and abs(mean["k2"] - exact) > 1e-3
    assert (kl_estimate(p.log(), q.log(), "k3") >= 0).all() and (kl_estimate(p.log(), q.log(), "k2") >= 0).all()


def test_temperature_is_that_of_the_sampling():
    _, policy, prompts = material()
    ids = torch.tensor([prompts[0]])
    keep = torch.ones_like(ids, dtype=torch.bool)
    logps, entropy = token_logps(policy, ids, ids, keep, 0.5)
    expected = (policy(ids)[0] / 0.5).log_softmax(-1)
    assert torch.allclose(logps, expected[torch.arange(ids.shape[1]), ids[0]], atol=1e-6)
    assert torch.allclose(entropy, torch.distributions.Categorical(logits=expected).entropy(), atol=1e-5)


def test_rows_of_like_length_give_the_same_values_and_gradients():
    "By groups, cut to their longest row, or all at once: equal but for rounding."
    seed_all(0)
    policy = Transformer(ModelConfig(50, dim=32, n_layers=2, n_heads=2, max_seq_len=64))
    model = ActorCritic(policy, RewardModel(copy.deepcopy(policy)))
    ids = torch.randint(50, (40, 60), generator=torch.Generator().manual_seed(0))
    end = torch.randint(3, 61, (40,), generator=torch.Generator().manual_seed(1))
    keep = (torch.arange(60) < end[:, None]) & (torch.arange(60) >= end[:, None] - 3)
    assert ids.numel() >= 2 * 1024, "there must be groups"
    grouped = model(ids, ids.roll(-1, 1), keep)
    whole = *token_logps(policy, ids, ids.roll(-1, 1), keep), model.values(ids, keep)
    for a, b in zip(grouped, whole):
        assert torch.allclose(a, b, atol=1e-5)
    weights = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(logps.sum() + values.square().sum(), weights) for logps, _, values in (grouped, whole))):
        assert torch.allclose(a, b, atol=1e-3)


# ---- real prompts

FILES = ("dpo_en_demo.json", "dpo_zh_demo.json", "hh_harmless-base_test.jsonl.gz", "rasbt_instruction-data-with-preference.json")


@pytest.mark.parametrize("name", FILES)
def test_a_few_steps_on_the_prompts_of_real_preference_files(testdata, name):
    pairs = []
    for _, row in read_rows(testdata / "pref" / name):
        try:
            pairs.append(to_pair(row))
        except UserError:
            continue
        if len(pairs) == 60:
            break
    texts = [m["content"] for p in pairs for m in (*p["prompt"], *p["chosen"])]
    tokenizer, room = train_tokenizer(texts, 600), 512
    seed_all(0)
    policy = Transformer(ModelConfig(len(tokenizer), dim=32, n_layers=2, n_heads=2, max_seq_len=room))
    prompts = [p for p in (tokenizer.chat(pair["prompt"], add_generation_prompt=True)[0] for pair in pairs) if len(p) <= room - 12]
    assert len(prompts) >= 10
    before = copy.deepcopy(policy.state_dict())
    trainer, rollouts = train_ppo(policy, RewardModel(copy.deepcopy(policy)), prompts, tokenizer, TrainConfig(4, batch_size=8, lr=1e-3, log_every=1), PPOConfig(rollouts=8, epochs=2, max_new_tokens=12))
    assert len(rollouts.stats) == 2 and all(torch.isfinite(torch.tensor(list(r.values()))).all() for r in trainer.history)
    assert any(not torch.equal(v, before[k]) for k, v in policy.state_dict().items())
