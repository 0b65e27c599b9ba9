"""The corpus in shards is the corpus in memory, for any documents, any size of a shard and any number of workers."""
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.corpus import CORPUS_STAGES, KINDS, DocumentFiles, hold_out, list_inputs, read_documents, refine, sort_rows, write_documents, write_plan
from llm_course.reading import DataError, write_jsonl
from llm_course.mixing import mix

WORDS = "the river runs past an old mill and every child in town knows where its owner keeps bread for those who come late at night".split()
PLAN = {"weights": {"a": 2.0, "b": 1.0}, "budget_bytes": 4000, "max_epochs": 2.0, "near_duplicate": 0.8, "keep_fraction": {"b": 0.8}, "held_out": 3, "replace": False, "dataset_bytes": 10**6, "local_dir": ""}


@st.composite
def corpora(draw):
    "Documents of two sources, many of them copies or nearly so."
    texts = draw(st.lists(st.lists(st.sampled_from(WORDS), min_size=12, max_size=60).map(" ".join), min_size=3, max_size=12))
    docs = []
    for i in range(draw(st.integers(5, 40))):
        words = draw(st.sampled_from(texts)).split()
        if draw(st.booleans()):
            words[draw(st.integers(0, len(words) - 1))] = draw(st.sampled_from(["moon", "42", "Ça"]))
        docs.append({"text": " ".join(words), "source": draw(st.sampled_from("ab")), "id": f"d{i}", "where": "topics/x" if draw(st.integers(0, 4)) == 0 else "page"})
    return sorted(docs, key=lambda d: d["source"])


@settings(max_examples=25, deadline=None)
@given(corpora(), st.integers(1, 9), st.integers(1, 4))
def test_shards_and_workers_change_nothing(docs, shard_size, world):
    with tempfile.TemporaryDirectory() as folder:
        work, n = Path(folder) / "work", {}
        for s in "ab":
            if mine := [d for d in docs if d["source"] == s]:
                write_jsonl(Path(folder) / "raw" / f"{s}.jsonl", [{k: d[k] for k in ("text", "where")} for d in mine])
        named = []      # the ids that the stages give
        for d in docs:
            named.append(d | {"id": f"{d['source']}-0-{n.setdefault(d['source'], 0)}"})
            n[d["source"]] += 1
        write_plan(work, list_inputs(Path(folder) / "raw", [], []), PLAN, ["one test question of a few words that nobody asked before in this town"], shard_size=shard_size)
        plain = refine(named, keep_fraction=PLAN["keep_fraction"])
        if not plain["kept"]:
            return
        for stage, divided in CORPUS_STAGES.values():
            for rank in range(world if divided else 1):
                stage(work, rank, world)
        train, val = hold_out(plain["kept"], 3)
        by_source = {s: [d for d in train if d["source"] == s] for s in "ab" if any(d["source"] == s for d in train)}
        mixed, _ = mix(by_source, {s: PLAN["weights"][s] for s in by_source}, 4000, max_epochs=2.0)
        assert [d["id"] for d in read_documents(work / "result" / "train.jsonl")] == [d["id"] for d in mixed]
        assert [d["text"] for d in read_documents(work / "result" / "val.jsonl")] == [d["text"] for d in val]


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3), max_leaves=8)
KEYS = st.sampled_from(["text", "messages", "conversations", "instruction", "output", "prompt", "chosen", "rejected", "completion", "label", "role", "content", "from", "value"])


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, JSON | st.lists(st.dictionaries(KEYS, JSON, max_size=3), max_size=3), min_size=1, max_size=4))
def test_any_row_is_used_dropped_or_refused(row):
    try:
        (kind, out), = sort_rows([("f:1", row)], "s")
    except DataError as e:
        assert "f:1" in str(e)
    else:
        assert kind in KINDS and (kind != "dropped" or (out["where"] == "f:1" and out["reason"]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.text(max_size=20), max_size=4), min_size=1, max_size=4))
def test_documents_come_back_from_their_files(parts):
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{k}.jsonl" for k in range(len(parts))]
        for path, texts in zip(paths, parts):
            write_documents(path, [{"text": t} for t in texts])
        files = DocumentFiles(paths)
        assert [files[i]["text"] for i in range(len(files))] == [t for texts in parts for t in texts]


def test_a_full_shard_folder_is_left_alone(tmp_path):
    write_jsonl(tmp_path / "raw" / "a.jsonl", [{"text": "One good sentence about the mill by the river, and another one about bread."}])
    write_plan(tmp_path / "work", list_inputs(tmp_path / "raw", [], []), PLAN | {"weights": {"a": 1.0}}, [])
    for stage, _ in CORPUS_STAGES.values():
        stage(tmp_path / "work")
    funnel = json.loads((tmp_path / "work" / "result" / "funnel.json").read_text())
    before = (tmp_path / "work" / "result" / "train.jsonl").stat().st_mtime_ns
    (tmp_path / "raw" / "a.jsonl").unlink()          # finished stages do not even look
    for stage, _ in CORPUS_STAGES.values():
        stage(tmp_path / "work")
    assert (tmp_path / "work" / "result" / "train.jsonl").stat().st_mtime_ns == before and funnel["steps"][0]["documents_in"] == 1


def test_the_plan_must_be_there(tmp_path):
    with pytest.raises(DataError, match="no plan of a corpus"):
        CORPUS_STAGES["clean"][0](tmp_path)
