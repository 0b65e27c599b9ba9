"""Bits per byte of a run's base model on its validation texts, read with contexts and strides of different length.

Needs a finished run, for instance `llm_course run --size laptop`."""
from pathlib import Path

from llm_course.hub import load_model
from llm_course.lm import ModelLM, text_bits
from llm_course.reading import read_rows
from llm_course.tokenizer import Tokenizer
from record import arguments, command_of, rounded, save


def main():
    options = arguments(__doc__, run="runs/laptop", texts=20)
    run = Path(options.run)
    model, tokenizer = load_model(run / "base"), Tokenizer.load(run / "base")
    texts: dict[str, list[str]] = {}
    for _, row in read_rows(run / "corpus" / "val.jsonl"):
        texts.setdefault(row["source"], []).append(row["text"])
    texts, rows = {s: t[:options.texts] for s, t in texts.items()}, []
    for source, some in texts.items():
        for context in (32, model.config.max_seq_len):
            for stride in (context, 3 * context // 4, context // 2, context // 4, context // 8):
                rows.append({"source": source, "context": context, "stride": stride, "bits": text_bits(ModelLM(model, tokenizer, context=context, stride=stride).loglikelihood_rolling(some), some)})
                print(rows[-1])
    if options.save:
        save("windows", "bits per byte of a laptop run's base model by context and stride", rounded({"run": command_of(run), "bytes": {s: sum(len(t.encode()) for t in x) for s, x in texts.items()}, "rows": rows}))


if __name__ == "__main__":
    main()
