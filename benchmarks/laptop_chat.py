"""What the models of a laptop run answer: the first held-out question of each kind, not chosen, asked of each stage.

Needs a finished run, for instance `llm_course run --size laptop`."""
import random
from pathlib import Path

from llm_course.evaluate import ask
from llm_course.hub import load_model
from llm_course.reading import read_rows
from llm_course.tokenizer import Tokenizer
from llm_course.world import answer as say
from llm_course.world import grade
from record import arguments, command_of, save


def main():
    options = arguments(__doc__, run="runs/laptop")
    run, first = Path(options.run), {}
    for _, task in read_rows(run / "corpus" / "tasks.jsonl"):
        if task.get("split", "test") == "test":
            first.setdefault(task["kind"], task)
    rows = [{"kind": k, "prompt": t["prompt"], "wanted": say(t, random.Random(0))} for k, t in first.items()]
    for stage in ("sft", "ppo", "dpo"):
        model, tokenizer = load_model(run / stage), Tokenizer.load(run / stage)
        for row, task, answer in zip(rows, first.values(), ask(model, tokenizer, [[{"role": "user", "content": t["prompt"]}] for t in first.values()])):
            row[stage] = {"answer": answer, "right": bool(grade(task, answer)["right"])}
    for row in rows:
        print(row)
    if options.save:
        save("laptop_chat", "the first held-out question of each kind, answered greedily by the stages of a laptop run", {"run": command_of(run), "rows": rows})


if __name__ == "__main__":
    main()
