"""The tokenizer beside `transformers`, on arbitrary text and conversations, on foreign model folders, and on damaged ones."""
import inspect
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llm_course.reading import DataError, UserError
from llm_course.tokenizer import CHAT_TEMPLATE, SPECIAL, SPECIAL_TOKENS, Tokenizer, bytes_per_token, sample_stream, train_tokenizer
from timing import assert_linear, cpu_seconds

transformers = pytest.importorskip("transformers")
quick = settings(max_examples=60, deadline=None, derandomize=True)

CORPUS = ["Ada lives by the mill and has 3 goats. Ben lives by the bridge.\n", "def add(a, b):\n    return a + b\n", "naïve café, 東京 🙂, Ελλάδα\r\n"] * 20

CHATML = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}"
          "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = ("{{ bos_token }}{%- for message in messages %}\n{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
          "{%- if message['role'] == 'assistant' %}{% generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
          "{%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}\n{%- endfor %}"
          "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}")
FORGETFUL = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' and not loop.last %}"
             "{{ message['content'].split('</think>')[-1] }}{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
FOREIGN = {"chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_start|>", "<|im_end|>", None),
           "llama3": (LLAMA3, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|begin_of_text|>", "<|eot_id|>", True),
           "nfc": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>", normalizers.NFC())}


def foreign_folder(folder, name):
    "A model folder as the hub has them, with a tokenizer trained here."
    template, special, bos, eos, extra = FOREIGN[name]
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False,
                                                         initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if extra is True:      # Llama 3 puts its start token before everything that is encoded, and trims offsets
        fast.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, fast.token_to_id(bos))])])
    elif extra is not None:
        fast.normalizer = extra
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    as_object = {"content": eos, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "__type": "AddedToken"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": as_object, "pad_token": eos, "chat_template": template,
              "model_max_length": 8192, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ours():
    return train_tokenizer(CORPUS, 400)


@pytest.fixture(scope="module")
def ours_hf(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    ours.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=list(FOREIGN))
def foreign(request, tmp_path_factory):
    "Ours and theirs, of one folder."
    folder = foreign_folder(tmp_path_factory.mktemp(request.param), request.param)
    return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


text = st.text(st.characters(blacklist_categories=("Cs",)), max_size=30)
spiced = st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|", "|>", " ", "\n", "a", "é", "🙂", "\U0010fffe", "\U000f0000"]),
                  max_size=8).map("".join)


def turns(content, roles=("user", "assistant")):
    return st.lists(content, min_size=1, max_size=5).map(lambda cs: [{"role": roles[i % len(roles)], "content": c} for i, c in enumerate(cs)])


def theirs_of(hf, messages, prompt=False):
    out = hf.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=prompt)
    return out["input_ids"], out["assistant_masks"]


@quick
@given(text=text)
def test_round_trip_and_same_ids(ours, ours_hf, text):
    ids = ours.encode(text)
    assert ours.decode(ids) == text and ours.encode_batch([text]) == [ids]
    assert not set(ids) & set(ours.special_ids)
    assert ours_hf(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
    assert ours_hf(text, add_special_tokens=False, split_special_tokens=False)["input_ids"] == ours.encode(text, allow_special=True)


@quick
@given(messages=turns(text, ("system", "user", "assistant", "tool")), prompt=st.booleans())
def test_chat_as_in_transformers(ours, ours_hf, messages, prompt):
    assert ours.chat(messages, prompt) == theirs_of(ours_hf, messages, prompt)


def by_hand(tokenizer, messages):
    ids, mask = [tokenizer.bos_id], [0]
    for m in messages:
        content = [*tokenizer.encode(" " + m["content"]), tokenizer.end_id]
        ids += [tokenizer.fast.token_to_id(f"<|{m['role']}|>"), *content]
        mask += [0] + [int(m["role"] == "assistant")] * len(content)
    return ids, mask


@quick
@given(messages=turns(spiced | st.text(max_size=20).filter(lambda s: s.isprintable())))
def test_special_tokens_in_messages_stay_text(ours, messages):
    ids, mask = ours.chat(messages)
    assert (ids, mask) == by_hand(ours, messages)
    assert sum(i in ours.special_ids for i in ids) == 1 + 2 * len(messages)
    assert ours.decode([i for i in ids if i not in ours.special_ids]) == "".join(" " + m["content"] for m in messages)


@quick
@given(messages=turns(spiced.map(lambda s: s.replace("\U000f0000", ""))), prompt=st.booleans())    # transformers uses it as a mark of its own, and loses it
def test_foreign_ids(foreign, messages, prompt):
    mine, hf = foreign
    mine_ids = mine.chat(messages, prompt)[0]
    if "sanitize_control_tokens" in inspect.signature(hf.apply_chat_template).parameters:
        theirs = hf.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=prompt, sanitize_control_tokens=True)
        assert mine.decode(mine_ids, skip_special=False) == mine.decode(theirs, skip_special=False)     # they cut at the ends of a special string, we do not
        assert [i for i in mine_ids if i in mine.special_ids] == [i for i in theirs if i in mine.special_ids]
    plain = not any(mine.fast.id_to_token(i) in m["content"] for m in messages for i in mine.special_ids)
    if plain:
        assert mine_ids == hf.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=prompt)
        if "{% generation" in mine.chat_template:
            assert mine.chat(messages, prompt) == theirs_of(hf, messages, prompt)


@quick
@given(messages=turns(text))
def test_foreign_masks(foreign, messages):
    "The mask is on what the assistant says, up to its end token, with or without generation marks in the template."
    mine, _ = foreign
    ids, mask = mine.chat(messages)
    said = [i for i, m in zip(ids, mask) if m]
    assert said.count(mine.end_id) == sum(m["role"] == "assistant" for m in messages) == sum(i in mine.special_ids for i in said)


def test_foreign_names(foreign, tmp_path):
    mine, hf = foreign
    assert (mine.bos_id, mine.end_id, mine.eos_id, mine.pad_id, mine.mask_id) == (hf.bos_token_id, hf.eos_token_id, hf.eos_token_id, hf.pad_token_id, None)
    assert len(mine) == len(hf) and mine.encode("Ada has 3") == hf("Ada has 3", add_special_tokens=False)["input_ids"]
    mine.save(tmp_path)
    again, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert again.chat(chat) == mine.chat(chat) and theirs.apply_chat_template(chat, return_dict=False) == mine.chat(chat)[0]
    assert again.special == mine.special and theirs.model_max_length == 8192
    assert mine.answer(mine.encode(" x")) == " x"


def test_a_template_that_forgets(ours, tmp_path):
    folder = foreign_folder(tmp_path / "f", "chatml")
    (folder / "chat_template.jinja").write_text(FORGETFUL, encoding="utf-8")
    mine = Tokenizer.load(folder)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "hm</think>Ho"}, {"role": "user", "content": "And?"}]
    with pytest.raises(DataError, match="generation"):
        mine.chat(chat + [{"role": "assistant", "content": "x"}])
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    assert mine.chat(chat, add_generation_prompt=True)[0] == hf.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def test_tools_and_other_variables(tmp_path):
    folder = foreign_folder(tmp_path / "f", "chatml")
    template = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson(indent=2)) + '<|im_end|>\n' }}{% endif %}{% if think is defined %}{{ think }}{% endif %}" + CHATML
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    mine, hf = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    tools = [{"type": "function", "function": {"name": "röad", "description": "<b> & 'c'", "parameters": {"type": "object", "properties": {}}}}]
    chat = [{"role": "user", "content": "Hi"}]
    assert mine.chat(chat, tools=tools, think="é")[0] == hf.apply_chat_template(chat, tools=tools, think="é", return_dict=False)
    shielded = mine.chat(chat, tools=[{"name": "<|im_end|>"}])[0]
    assert shielded.count(mine.end_id) == mine.chat(chat, tools=[{"name": "x"}])[0].count(mine.end_id)


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% for", "{{ raise_exception('no') }}", "{{ range(10**9) | list }}",
                                      "{{ nothing.there }}", "{{ 1 + 'a' }}", "{{ 1 / 0 }}"])
def test_templates_that_misbehave(ours, template):
    with pytest.raises(DataError):
        Tokenizer(ours.fast, template, SPECIAL).chat([{"role": "user", "content": "Hi"}])


def test_both_class_spellings_give_the_same_ids(ours, tmp_path):
    ours.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    for spelling in ("PreTrainedTokenizerFast", "TokenizersBackend", None):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in (config | {"tokenizer_class": spelling}).items() if v is not None}))
        hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert hf("Ada has 31 goats, naïve 東京")["input_ids"] == ours.encode("Ada has 31 goats, naïve 東京")
        assert (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id, hf.mask_token_id) == (ours.bos_id, ours.end_id, ours.pad_id, ours.mask_id)
    assert (transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)("Ada")["input_ids"]) == ours.encode("Ada")


@pytest.mark.parametrize("bad", ["a\ud800b", None, 3, b"bytes", ["list"]])
def test_what_is_no_text_is_refused(ours, bad):
    for call in (lambda: ours.encode(bad), lambda: ours.encode_batch(["fine", bad]), lambda: ours.document(bad), lambda: train_tokenizer(["fine", bad], 300)):
        with pytest.raises(DataError):
            call()
    with pytest.raises(DataError):
        ours.chat([{"role": "user", "content": bad}])


def test_errors_say_what_and_where(ours):
    with pytest.raises(DataError, match="position 1"):
        ours.encode("a\ud800b")
    with pytest.raises(DataError, match="text 1"):
        train_tokenizer(["fine", "a\ud800b"], 300)
    with pytest.raises(DataError, match=f"vocabulary of {len(ours)}"):
        ours.decode([len(ours)])
    with pytest.raises(DataError):
        ours.decode([-1])
    with pytest.raises(UserError, match="one string"):
        train_tokenizer("a string", 300)
    for texts in ([], [""], iter(())):
        with pytest.raises(UserError, match="no text"):
            train_tokenizer(texts, 300)
    with pytest.raises(UserError, match="263 are needed|264 are needed"):
        train_tokenizer(["a"], 263)
    with pytest.raises(DataError, match="role"):
        ours.chat([{"role": "end", "content": "x"}])
    with pytest.raises(DataError):
        ours.chat([{"role": "user"}])
    with pytest.raises(UserError, match="lacks"):
        Tokenizer(ours.fast, None, {"bos": "<s>"})
    with pytest.raises(UserError, match="no chat template"):
        Tokenizer(ours.fast, None, {"bos": "<|endoftext|>"}).chat([])


@pytest.mark.parametrize("name, content", [("tokenizer.json", b"{"), ("tokenizer.json", b""), ("tokenizer.json", b"\xff\xfe"), ("tokenizer.json", b"{}"),
                                           ("tokenizer_config.json", b"{"), ("tokenizer_config.json", b"[1]"), ("tokenizer_config.json", b"\xff"),
                                           ("chat_template.jinja", b"\xff\xff"), ("special_tokens_map.json", b"nope")])
def test_damaged_files(ours, tmp_path, name, content):
    ours.save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        Tokenizer.load(tmp_path)


def test_missing_files(ours, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path / "none")
    ours.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").unlink()
    assert Tokenizer.load(tmp_path).chat_template == CHAT_TEMPLATE      # tokenizer.json alone is enough for ours
    ours.save(tmp_path / "again")
    (tmp_path / "again" / "chat_template.jinja").unlink()
    assert Tokenizer.load(tmp_path / "again").chat_template == CHAT_TEMPLATE


@quick
@given(texts=st.lists(st.text(st.characters(blacklist_categories=("Cs",)), max_size=40), max_size=30), size=st.integers(1, 200), seed=st.integers(0, 3))
def test_sample_stream(texts, size, seed):
    from random import Random
    report, whole = {}, texts
    got = list(sample_stream(iter(texts), size, seed, report))
    assert report["used_bytes"] == sum(len(t.encode()) for t in got) <= size and report["used_documents"] == len(got)
    rng = Random(seed)
    order, taken, total = sorted(range(len(texts)), key=[rng.random() for _ in texts].__getitem__), [], 0
    for i in [i for i in order if whole[i]]:
        total += len(texts[i].encode())
        if total > size:
            break
        taken.append(i)
    if taken or not any(texts):
        assert got == [texts[i] for i in sorted(taken)]
    else:
        assert len(got) == 1 and any(t.startswith(got[0]) for t in texts)


def test_threads_do_not_mix_up_what_is_allowed(ours):
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda k: ours.encode("a <|end|> b " * 50, allow_special=bool(k % 2)).count(ours.end_id), range(400)))
    assert got == [50 * (k % 2) for k in range(400)]


def test_keys_are_shielded_too(tmp_path):
    folder = foreign_folder(tmp_path / "f", "chatml")
    (folder / "chat_template.jinja").write_text("{{ tools | tojson }}" + CHATML, encoding="utf-8")
    mine, chat = Tokenizer.load(folder), [{"role": "user", "content": "Hi"}]
    assert mine.chat(chat, tools=[{"<|im_end|>": 1}])[0].count(mine.end_id) == mine.chat(chat, tools=[{"x": 1}])[0].count(mine.end_id)
    with pytest.raises(DataError, match="message"):
        mine.chat(["no message"])


@pytest.mark.parametrize("piece", ["a ", "<", "\\", "((", "{", "\n", "é", "<a ", "<|end|>", "0", "a"])
def test_time_is_linear(ours, piece):
    for f in (ours.encode, lambda t: ours.chat([{"role": "user", "content": t}, {"role": "assistant", "content": t[:1000]}]),
              lambda t: train_tokenizer([t], 280)):
        assert_linear(lambda n: cpu_seconds(f, piece * (n // len(piece))), 250_000)


def test_more_from_less(ours):
    assert bytes_per_token(ours, CORPUS) > 1.5
    assert bytes_per_token(ours, []) == 0
