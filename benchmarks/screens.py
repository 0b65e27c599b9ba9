"""What the screens for conversations and preference pairs find in public sets: counts of rows by finding, no rows."""
from collections.abc import Callable, Sequence

from llm_course.filtering import screen_conversations, screen_pairs
from llm_course.formats import to_messages, to_pair
from llm_course.reading import DataError, UserError, read_rows
from record import arguments, save, testdata

CONVERSATIONS = ("alpaca_en_demo.json", "alpaca_zh_demo.json", "identity.json", "glaive_toolcall_en_demo.json", "rasbt_instruction-data.json",
                 "vicuna_dummy_conversation.json", "dolly_hhrlhf_small.jsonl")
PAIRS = ("dpo_en_demo.json", "dpo_zh_demo.json", "hh_harmless-base_test.jsonl.gz", "rasbt_instruction-data-with-preference.json")


def read(path, convert: Callable[[dict], object]) -> tuple[list, int]:
    "Converted rows, and how many could not be."
    rows, bad = [], 0
    for _, row in read_rows(path):
        try:
            rows.append(convert(row))
        except (DataError, UserError):
            bad += 1
    return rows, bad


def findings(path, convert: Callable[[dict], object], screen: Callable[[Sequence], tuple[list, dict]]) -> dict:
    rows, bad = read(path, convert)
    _, report = screen(rows)
    print(path.name, {k: v for k, v in report.items() if not k.endswith("_rows")}, f"{bad} not converted", flush=True)
    return {"rows": report["rows_in"], "not_converted": bad, "removed": report["rows_in"] - report["rows_out"], "found": report["found"]}


def main() -> None:
    args, folder = arguments(__doc__), testdata()
    stem = lambda name: name.split(".")[0]
    chats = {stem(n): findings(folder / "instruct" / n, lambda r: {"messages": to_messages(r)}, screen_conversations) for n in CONVERSATIONS}
    pairs = {stem(n): findings(folder / "pref" / n, to_pair, screen_pairs) for n in PAIRS}
    if args.save:
        save("screens", __doc__, {"conversations": chats, "pairs": pairs})


if __name__ == "__main__":
    main()
