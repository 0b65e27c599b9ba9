"""Detect, validate and convert every instruction and preference file of the test data."""
from collections import Counter

from record import arguments, save, testdata

from llm_course.formats import TARGETS, Report, convert, detect_row, validate
from llm_course.reading import DataError, read_rows

TARGET = {"preference": "preference", "ranked": "preference", "kto": "kto", "document": "document"}


def same(row: dict) -> dict:
    "The row with its keys as we write them: an absent or empty `input` is an empty text, a response is a completion."
    row = {"completion" if k == "response" else k: v for k, v in row.items()}
    return row | {"input": ""} if "instruction" in row and "output" in row and not row.get("input") else row


def measure(path) -> dict:
    "Figures of one file: rows, formats found, good, bad by reason, rows after conversion to what the course trains on."
    rows = list(read_rows(path))
    found = Counter(d.name if (d := detect_row(row)) else None for _, row in rows)
    name = found.most_common(1)[0][0] if len(found) == 1 else None
    checked, report = validate(rows), Report()
    made = sum(1 for _ in convert(rows, to=TARGET.get(name, "messages"), lossy=True, report=report)) if name else 0
    plain, own = Report(), {"preference": "transcript" if rows and isinstance(rows[0][1].get("chosen"), str) else "preference"}.get(name, name)
    back = 0
    for _, row in rows if own in TARGETS and own not in ("kto", "preference") else []:
        try:
            there = row if own in ("preference", "transcript") else next(convert([row]))
            back += next(convert([there], to=own)) == same(row)
        except DataError:
            pass
    if name and name not in TARGET:
        sum(1 for _ in convert(rows, to="prompt_completion", lossy=True, report=plain))
    return {"format": name, "rows": len(rows), "good": checked.good, "bad": dict(Counter(reason for _, reason in checked.bad).most_common()),
            "converted": made, "unconverted": dict(Counter(reason for _, reason in report.bad)), "unchanged_back": back, "with_input": sum(bool(row.get("input")) for _, row in rows), "lost": dict(report.lost), "lost_as_prompt_completion": dict(plain.lost)}


if __name__ == "__main__":
    args = arguments(__doc__)
    data = testdata()
    files = sorted(p for part in ("instruct", "pref") for p in (data / part).rglob("*.json*"))
    figures = {str(p.relative_to(data)): measure(p) for p in files}
    for name, figure in figures.items():
        print(name, figure)
    if args.save:
        save("formats", "each file of instruction and preference data: format, rows, good, bad by reason, rows after conversion", figures)
