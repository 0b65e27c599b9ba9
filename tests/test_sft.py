"""Fine-tuning on real files of many formats, its loss in the trainer, and other libraries' conventions."""
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.formats import Report, as_text, convert
from llm_course.model import ModelConfig, Transformer
from llm_course.packing import pack_examples, packed_loss, stack_rows
from llm_course.reading import DataError, UserError, read_rows
from llm_course.sft import example_weights, sft, sft_examples, sft_loss, show_chat, wake_special_tokens
from llm_course.step import TrainConfig
from llm_course.tasks import IGNORE
from llm_course.tokenizer import train_tokenizer
from llm_course.trainer import seed_all

TOK = train_tokenizer(["where does ada live? by the mill. who bakes the bread? ben does, of course."] * 3, 300)
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])


# ---- the mask

@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(ROLES, st.text(max_size=12)), min_size=1, max_size=7), st.integers(2, 80))
def test_any_order_of_roles(turns, room):
    "Whoever speaks when: the labels are what the assistant says in the part that was kept; nothing is lost without being counted."
    messages = [{"role": r, "content": c} for r, c in turns]
    made, report = sft_examples([{"messages": messages}], TOK, 100_000)
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    for e in made:
        assert TOK.decode([l for l in e["labels"] if l != IGNORE], skip_special=False) == "".join(f" {c}<|end|>" for c in said)
    assert len(made) == bool(said) and report["dropped"] == (not said) and report["labels_lost"] == report["shortened"] == report["cut"] == 0
    short, counts = sft_examples([{"messages": messages}], TOK, room)
    assert counts["labels"] + counts["labels_lost"] == report["labels"] and counts["examples"] + counts["dropped"] == 1
    assert counts["labels"] == sum(l != IGNORE for e in short for l in e["labels"]) and counts["tokens"] == sum(len(e["input_ids"]) for e in short)
    for e in short:
        assert len(e["input_ids"]) == len(e["labels"]) <= room and e["labels"][0] == IGNORE and any(l != IGNORE for l in e["labels"])
        assert all(l in (IGNORE, i) for i, l in zip(e["input_ids"], e["labels"]))
    if counts["labels_lost"]:
        assert counts["shortened"] or counts["cut"] or counts["dropped"]


def test_the_view_is_escaped_and_whole():
    messages = [{"role": "user", "content": '<img src=x onerror="alert(1)">\n&amp;'}, {"role": "assistant", "content": "</span><script>"}]
    view = show_chat(messages, TOK)
    page = view._repr_html_()
    assert "<img" not in page and "<script" not in page and "</span><script" not in page and page.count("<div") == page.count("</div>") == 3
    assert "".join(t for t, _, _ in view.tokens) == TOK.decode(TOK.chat(messages)[0], skip_special=False)
    assert [m for _, m, _ in view.tokens] == [bool(m) for m in TOK.chat(messages)[1]]
    assert "color:" not in page.replace("background-color:", "")      # the page's own colour of text, in the light and in the dark


# ---- the loss

def model(seed: int = 0, **kw) -> Transformer:
    seed_all(seed)
    return Transformer(ModelConfig(**{"vocab_size": len(TOK), "dim": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 48} | kw))


CHATS = [{"messages": [{"role": "user", "content": "who bakes?"}, {"role": "assistant", "content": " ".join(["ben"] * n)}]} for n in (1, 2, 3, 5, 8, 1, 2, 3)]


def test_the_default_loss_is_that_of_pretraining():
    examples, _ = sft_examples(CHATS, TOK, 48)
    m, batch = model(), stack_rows(pack_examples(examples, 48, TOK.pad_id))
    (a, n, _), (b, k, metrics) = packed_loss(m, batch), sft_loss(m, batch)
    assert n == k and torch.allclose(a, b, rtol=1e-6) and 0 <= metrics["mean_token_accuracy"] <= n


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.tuples(st.integers(-1, 3), st.booleans()), min_size=5, max_size=5), min_size=1, max_size=4))
def test_weights_of_examples(rows):
    "Each document with labels weighs 1 in all, whatever row it stands in."
    docs, keep = (torch.tensor([[t[k] for t in row] for row in rows]) for k in (0, 1))
    keep = keep.bool() & (docs >= 0)
    weights, n = example_weights(docs, keep, torch.float64)
    groups = {}
    for (b, t), w in zip(keep.nonzero().tolist(), weights.tolist()):
        groups.setdefault((b, docs[b, t].item()), []).append(w)
    assert n == len(groups) and all(len(set(w)) == 1 and abs(sum(w) - 1) < 1e-12 for w in groups.values())


@pytest.mark.parametrize("options", [{}, {"by": "example"}, {"kind": "dft"}, {"by": "example", "kind": "dft"}], ids=str)
def test_micro_batches_do_not_change_a_run(options):
    examples, _ = sft_examples(CHATS * 4, TOK, 48)
    found = []
    for micro in (0, 1, 3):
        t = sft(model(), examples, TrainConfig(steps=3, batch_size=4, micro_batch=micro, lr=1e-2, log_every=1), TOK, val_examples=examples[:5], **options)
        found.append([r.get("loss", r.get("val_loss")) for r in t.history] + [r["mean_token_accuracy"] for r in t.history if "loss" in r])
    assert max(abs(a - b) for other in found[1:] for a, b in zip(found[0], other, strict=True)) < 1e-5


def test_what_is_refused():
    with pytest.raises(UserError, match="no instruction examples"):
        sft(model(), [], TrainConfig(steps=1), TOK)
    with pytest.raises(UserError, match="by='batch'"):
        sft(model(), sft_examples(CHATS, TOK, 48)[0], TrainConfig(steps=1), TOK, by="batch")
    with pytest.raises(DataError, match="role"):
        sft_examples([{"messages": [{"role": "gpt", "content": "x"}, {"role": "assistant", "content": "x"}]}], TOK, 48)


def test_noise_is_that_of_transformers():
    "The formula of the chapter's exercise, typed again, against transformers' hook, from the same random numbers."
    neftune = pytest.importorskip("transformers.integrations.neftune")
    module = SimpleNamespace(training=True, neftune_noise_alpha=5.0)
    x = torch.randn(2, 7, 16)
    torch.manual_seed(0)
    theirs = neftune.neftune_post_forward_hook(module, None, x.clone())
    torch.manual_seed(0)
    ours = x + torch.empty_like(x).uniform_(-1, 1) * 5 / (7 * 16) ** 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


# ---- real files

FILES = {"alpaca_en_demo.json": 999, "alpaca_zh_demo.json": 1000, "identity.json": 91, "rasbt_instruction-data.json": 1100, "vicuna_dummy_conversation.json": 500,
         "glaive_toolcall_en_demo.json": 300, "alpaca_eval.jsonl": 805, "dolly_hhrlhf_small.jsonl": None, "seed_tasks.jsonl": None}


def conversations(path, most: int = 300) -> tuple[list[dict], int, int]:
    "The first rows of a file as conversations of text; how many rows were read, and how many conversations were refused."
    rows = [pair for pair, _ in zip(read_rows(path), range(most))]
    report, found, refused = Report(), [], 0
    for c in convert(rows, to="messages", lossy=True, report=report):
        try:
            found.append({"messages": as_text(c["messages"])})
        except DataError:
            refused += 1
    return found, len(rows), refused


@pytest.mark.parametrize("name", FILES)
def test_a_real_file_trains(testdata, name):
    "Detected, converted, shortened and counted, and a few steps of learning; each answer is what its row says."
    chats, rows, refused = conversations(testdata / "instruct" / name)
    assert chats and len(chats) + refused >= 0.95 * rows
    for room in (64, 256):
        examples, report = sft_examples(chats, TOK, room)
        assert report["examples"] + report["dropped"] == len(chats) and report["labels"] == sum(l != IGNORE for e in examples for l in e["labels"])
        assert all(len(e["input_ids"]) <= room and any(l != IGNORE for l in e["labels"]) for e in examples)
    whole, report = sft_examples(chats, TOK, 1_000_000)
    answers = ["".join(f" {m['content']}<|end|>" for m in c["messages"] if m["role"] == "assistant") for c in chats]
    assert report["shortened"] == report["cut"] == report["labels_lost"] == 0
    kept = [a for a in answers if a]
    assert len(kept) == len(whole) and all(TOK.decode([l for l in e["labels"] if l != IGNORE], skip_special=False) == a for e, a in zip(whole, kept))
    m = model(max_seq_len=256)
    wake_special_tokens(m, TOK)
    trainer = sft(m, examples, TrainConfig(steps=6, batch_size=4, lr=5e-3, log_every=1), TOK)
    losses = [r["loss"] for r in trainer.history if "loss" in r]
    assert losses[0] > 4.5 and losses[-1] < losses[0] - 0.2


def test_tools_of_a_real_file(testdata):
    "Calls are learned, results are not."
    chats, *_ = conversations(testdata / "instruct" / "glaive_toolcall_en_demo.json", 60)
    with_tools = [c for c in chats if any(m["role"] == "tool" for m in c["messages"])]
    assert with_tools
    for c in with_tools:
        (e,), _ = sft_examples([c], TOK, 1_000_000)
        learned = TOK.decode([l for l in e["labels"] if l != IGNORE], skip_special=False)
        assert learned.count("<|end|>") == sum(m["role"] == "assistant" for m in c["messages"])
        assert learned == "".join(f" {m['content']}<|end|>" for m in c["messages"] if m["role"] == "assistant")
