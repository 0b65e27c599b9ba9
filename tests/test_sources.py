"""Data of the user's own: files of many kinds with weights, data sets with the schemas of the hub, real files."""
import gzip
import json
from collections import Counter

import pytest
from commands import llm_course
from llm_course.reading import DataError, read_rows
from llm_course.corpus import dataset_rows, list_inputs, sort_rows, sorted_rows, split, used_inputs, write_plan
from llm_course.pipeline import SIZES, merged

SMALL = ["--size", "smoke", "--set", "data.village_bytes=60000", "data.docs_bytes=30000", "data.code_bytes=30000", "data.budget_bytes=100000", "data.near_duplicate=0.9"]


def story(i: int) -> str:
    names = ["Anna", "Bela", "Cora", "Dario", "Enzo", "Fay", "Gil", "Hana"]
    return (f"Number {i}: {names[i % 8]} walked along the shore with {names[(i * 5 + 3) % 8]}. They found {i * 7 % 93 + 2} shells, and they counted them twice. "
            f"Then the wind came from the {['north', 'south', 'east', 'west'][i % 4]}, and it took {i % 17} of the shells away again.")


def test_files_of_many_kinds_with_weights(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": story(i)}) + "\n" for i in range(100)))
    with gzip.open(tmp_path / "packed.json.gz", "wt") as f:
        json.dump([{"text": story(i)} for i in range(100, 200)], f)
    pq.write_table(pa.table({"text": [story(i) for i in range(200, 300)]}), tmp_path / "table.parquet")
    (tmp_path / "folder").mkdir()
    for i in range(300, 330):
        (tmp_path / "folder" / f"{i}.txt").write_text(story(i))
    sources = [f"{tmp_path}/lines.jsonl=0.4", f"{tmp_path}/packed.json.gz=0.2", f"{tmp_path}/table.parquet=0.2", f"{tmp_path}/folder=0.1"]
    done = llm_course("prepare", *SMALL, "data.weights.village=0.1", "data.weights.docs=0", "data.weights.code=0", "--data", *sources, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    mixture = json.loads((tmp_path / "run" / "corpus" / "metrics.json").read_text())["data"]["mixture"]
    assert set(mixture) == {"village", "lines", "packed", "table", "folder"}
    assert abs(mixture["lines"]["share"] - 0.4) < 0.1
    rows = [r for _, r in read_rows(tmp_path / "run" / "corpus" / "train.jsonl")]
    assert {r["source"] for r in rows} == {"village", "lines", "packed", "table", "folder"}


def test_replace_leaves_only_the_users_documents(tmp_path):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": story(i)}) + "\n" for i in range(60)))
    done = llm_course("prepare", *SMALL, "--data", tmp_path / "mine.jsonl", "--replace", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert {r["source"] for _, r in read_rows(tmp_path / "run" / "corpus" / "train.jsonl")} == {"mine"}
    assert (tmp_path / "run" / "corpus" / "conversations.jsonl").stat().st_size       # no conversations were given: the course's own stay


def hub_copies(folder):
    "Local copies with the schemas of the sets that the larger sizes name."
    datasets = pytest.importorskip("datasets")
    user, assistant = (lambda t: {"role": "user", "content": t}), (lambda t: {"role": "assistant", "content": t})
    rows = {"roneneldan/TinyStories": [{"text": story(i)} for i in range(50)],
            "HuggingFaceFW/fineweb-edu": [{"text": story(i), "id": f"<urn:{i}>", "dump": "CC", "url": "u", "file_path": "p", "language": "en", "language_score": 0.9, "token_count": 50, "score": 3.1, "int_score": 3} for i in range(50)],
            "HuggingFaceTB/smol-smoltalk": [{"messages": [user(f"Count to {i}."), assistant(f"{i}.")], "source": "x"} for i in range(20)],
            "HuggingFaceTB/smoltalk": [{"messages": [user(f"Count to {i}."), assistant(f"{i}.")], "source": "x"} for i in range(20)],
            "HuggingFaceH4/ultrafeedback_binarized": [{"prompt": f"Say {i}", "prompt_id": str(i), "chosen": [user(f"Say {i}"), assistant(f"{i}")], "rejected": [user(f"Say {i}"), assistant("no")],
                                                       "messages": [user(f"Say {i}"), assistant(f"{i}")], "score_chosen": 8.0, "score_rejected": 2.0} for i in range(20)]}
    for name, r in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        split = "train_prefs" if "ultrafeedback" in name else "train"
        datasets.DatasetDict({split: datasets.Dataset.from_list(r)}).save_to_disk(str(folder / name))


@pytest.mark.parametrize("size", ["gpu", "cluster"])
def test_sets_of_the_larger_sizes(size, tmp_path):
    hub_copies(tmp_path)
    settings = merged(SIZES[size], {"data": {"local_dir": str(tmp_path)}})
    work, d = tmp_path / "work", settings["data"]
    write_plan(work, list_inputs(tmp_path / "raw", d["files"], d["datasets"]), d, [])
    split(work)
    assert [len(list(sorted_rows(work, kind))) for kind in ("conversations", "pairs", "dropped")] == [20, 20, 0]
    infos = [json.loads((f / "info.json").read_text()) for f in used_inputs(work, "documents")]
    assert sum(i["counts"]["documents"] for i in infos) == 50 and {i["source"] for i in infos} < set(d["weights"])
    pair = next(sorted_rows(work, "pairs"))
    assert pair["prompt"] == [{"role": "user", "content": "Say 0"}] and pair["chosen"] == [{"role": "assistant", "content": "0"}]


def test_a_dataset_is_cut_at_its_budget(tmp_path):
    hub_copies(tmp_path)
    rows = list(dataset_rows({"name": "roneneldan/TinyStories"}, 2000, str(tmp_path)))
    assert 5 < len(rows) < 12


def test_dataset_from_the_command_line(tmp_path):
    hub_copies(tmp_path)
    done = llm_course("prepare", *SMALL, f"data.local_dir={tmp_path}", "--dataset", "roneneldan/TinyStories=0.3", "HuggingFaceTB/smol-smoltalk", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    sources = {r["source"] for _, r in read_rows(tmp_path / "run" / "corpus" / "train.jsonl")}
    assert "roneneldan/TinyStories" in sources


def test_real_files_go_through(testdata):
    "Instruction and preference files of many origins are recognised, and nearly all of their rows used."
    used = 0
    for folder, kind in (("instruct", "conversations"), ("pref", "pairs")):
        for path in sorted((testdata / folder).rglob("*")):
            if path.is_file() and path.suffix in (".json", ".jsonl", ".gz", ".parquet"):
                try:
                    kinds = Counter(kind for kind, _ in sort_rows(read_rows(path), path.stem))
                except DataError:
                    continue
                n = kinds.total() - kinds["dropped"]
                assert kinds.total() and n >= 0.5 * kinds.total(), (path.name, kinds)
                used += 1
    assert used >= 5
