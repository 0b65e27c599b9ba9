"""SmolLM2-135M-Instruct (GGUF, Q4_1) in the course's Transformer, in transformers and, where xllamacpp is installed, in llama.cpp.

Needs the file (see llm_course.gguf_io.find_smollm2), WikiText-2's test text from the test data, `gguf` and `transformers`.
llama.cpp comes with `pip install --no-deps xllamacpp`; without it that part is left out of the record."""
import importlib.util
import json
import math
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from llm_course.gguf_io import find_smollm2, from_gguf, to_gguf
from llm_course.hub import to_hf
from llm_course.model import ModelConfig, Transformer
from llm_course.tokenizer import train_tokenizer
from llm_course.world import make_village, village_documents
from record import arguments, save, testdata

PROMPT, TOKENS = "The capital of France is", 1024


@torch.no_grad()
def logits_of(model, ids: list[int]) -> torch.Tensor:
    out = model(torch.tensor([ids]))
    return (out.logits if hasattr(out, "logits") else out)[0].float()


def figures_of(model, prompt: list[int], paris: int, ids: list[int], reference: list[torch.Tensor] | None = None) -> tuple[dict, list[torch.Tensor]]:
    "Probability of ` Paris`, perplexity, and the largest difference to other logits on both texts."
    logits = [logits_of(model, x) for x in (prompt, ids)]
    out = {"p_paris": logits[0][-1].softmax(-1)[paris].item(),
           "perplexity": math.exp(F.cross_entropy(logits[1][:-1], torch.tensor(ids[1:])).item())}
    if reference:
        out["max_logit_difference"] = max((a - b).abs().max().item() for a, b in zip(logits, reference))
    return out, logits


def probes(folder: Path) -> dict[str, list[str]]:
    "Real texts to compare ids on: English prose, and sentences in several languages."
    wiki = [line for line in (folder / "pretrain" / "wikitext-2" / "test.txt").read_text(encoding="utf-8").split("\n") if line.strip()][:1000]
    pud = [line for file in sorted((folder / "multilingual" / "pud").glob("*.txt")) for line in file.read_text(encoding="utf-8").split("\n")[:200] if line]
    made = ["", " ", "\n\n\n", "a\tb  c\r\nd", "1969 and 12,345.67", "it's Ada'll I'D", "x = {'a': [1, 2]}\n    return x\n", "né à Zürich", "日本語のテキスト", "🙂👩‍👩‍👧", "<|im_end|> as text"]
    return {"WikiText-2 lines": wiki, "sentences of PUD in seven languages": pud, "made by hand": made}


class Llama:
    "llama.cpp's own server, in this process."

    def __init__(self, path: str | Path):
        import xllamacpp
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.verbosity = str(path), 2048, -1
        self.server = xllamacpp.Server(params)

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.loads(urllib.request.urlopen(request, timeout=120).read())

    def ids(self, text: str, special: bool = False) -> list[int]:
        return self.post("/tokenize", {"content": text, "add_special": False, "parse_special": special})["tokens"]

    def next(self, ids: list[int]) -> tuple[int, float]:
        "The most probable next token and its log-probability."
        out = self.post("/completion", {"prompt": ids, "n_predict": 1, "n_probs": 1, "temperature": 0, "cache_prompt": False})
        first = out["completion_probabilities"][0]["top_logprobs"][0]
        return first["id"], first["logprob"]


def against_llama(path, model, tokenizer, texts: dict[str, list[str]], prefixes: list[list[int]]) -> dict:
    "Ids of texts, next tokens after prefixes and the chat template, as llama.cpp reads the same file."
    llama = Llama(path)
    out = {"ids_differ": {name: {"texts": len(rows), "differ": sum(llama.ids(t) != tokenizer.encode(t) for t in rows)} for name, rows in texts.items()}}
    gaps, same = [], 0
    for ids in prefixes:
        logp = logits_of(model, ids)[-1].log_softmax(-1)
        token, value = llama.next(ids)
        gaps.append(abs(value - logp[token].item()))
        same += token == logp.argmax().item()
    out |= {"prefixes": len(prefixes), "same_next_token": same, "max_log_probability_difference": max(gaps), "mean_log_probability_difference": sum(gaps) / len(gaps)}
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who baked the bread in 1969?"}]
    prompt = llama.post("/apply-template", {"messages": talk})["prompt"]
    return out | {"chat_ids_equal": llama.ids(prompt, special=True) == tokenizer.chat(talk, add_generation_prompt=True)[0]}


def small_model(steps: int = 200):
    "A model of the course, trained for seconds, and its tokenizer."
    torch.manual_seed(0)
    text = "\n".join(d["text"] for d in village_documents(make_village(0, 40), 60_000))
    tokenizer = train_tokenizer([text], 500)
    stream, model = torch.tensor(tokenizer.encode(text)), Transformer(ModelConfig(512, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        rows = torch.stack([stream[i:i + 65] for i in torch.randint(len(stream) - 65, (16,)).tolist()])
        optimizer.zero_grad()
        F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
    return model.eval(), tokenizer, stream.tolist()


def llama_figures(path, model, tokenizer, ids, prompt, paris, texts) -> dict:
    "llama.cpp on the published file, and on files that the course wrote."
    out = {"published": against_llama(path, model, tokenizer, texts, [ids[:n] for n in range(20, 420, 20)])}
    llama = Llama(path)
    token, logp = llama.next(prompt)
    out |= {"p_paris": math.exp(logp), "paris_first": token == paris}
    small, words, stream = small_model()
    with tempfile.TemporaryDirectory() as tmp:
        for kind in ("F32", "F16", "Q8_0"):
            to_gguf(small, words, f"{tmp}/{kind}.gguf", kind)
            read = from_gguf(f"{tmp}/{kind}.gguf")[0]
            out[f"course_{kind}"] = against_llama(f"{tmp}/{kind}.gguf", read, words, texts, [stream[n:n + 50] for n in range(0, 2000, 100)])
    return out


def main() -> None:
    args = arguments(__doc__)
    transformers.utils.logging.set_verbosity_error()
    folder, path = testdata(), find_smollm2()
    start = time.perf_counter()
    model, tokenizer = from_gguf(path)
    load = time.perf_counter() - start
    prompt, (paris,) = tokenizer.encode(PROMPT), tokenizer.encode(" Paris")
    text = (folder / "pretrain" / "wikitext-2" / "test.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text[:40_000])[:TOKENS]
    figures = {"file": path.name, "parameters": sum(p.numel() for p in model.parameters()), "tokens": len(ids), "predicted": len(ids) - 1,
               "text": "the beginning of wikitext-2/test.txt as it stands, no start token", "load_seconds": round(load, 1)}
    figures["ours"], reference = figures_of(model, prompt, paris, ids)
    figures["perplexity_with_start_token"] = figures_of(model, prompt, paris, [tokenizer.bos_id, *ids[:-1]])[0]["perplexity"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, attn_implementation="sdpa", dtype=torch.float32)
    figures["transformers_gguf"], _ = figures_of(theirs, prompt, paris, ids, reference)
    texts = probes(folder)
    words = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    figures["transformers_ids_differ"] = {name: {"texts": len(rows), "differ": sum(
        words(t, add_special_tokens=False)["input_ids"] != tokenizer.encode(t, allow_special=True) for t in rows)} for name, rows in texts.items()}
    with tempfile.TemporaryDirectory() as tmp:
        to_hf(model, tmp, tokenizer)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp, attn_implementation="sdpa")
        figures["transformers_to_hf"], _ = figures_of(theirs, prompt, paris, ids, reference)
    packages = ("gguf", "transformers", "tokenizers")
    if importlib.util.find_spec("xllamacpp"):
        figures["llama_cpp"], packages = llama_figures(path, model, tokenizer, ids, prompt, paris, texts), (*packages, "xllamacpp")
    print(json.dumps(figures, indent=1))
    if args.save:
        save("smollm", "SmolLM2-135M-Instruct from GGUF in the course's Transformer, transformers and llama.cpp", figures, packages)


if __name__ == "__main__":
    main()
