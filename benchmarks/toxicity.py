"""Toxicity detectors on labelled sets: word list, bundled baseline, our classifier trained on tweets (Davidson) and on comments (Surge).

Thresholds are chosen on a development part of the set a detector was made for (Davidson for the tweets' one, Surge for all others)
and HateCheck is used for testing only. Figures only: no text leaves this script."""
import csv
import time

import numpy as np
from record import arguments, save, testdata

from llm_course.classifier import QualityClassifier, auc, bootstrap_interval
from llm_course.intervals import rate
from llm_course.toxicity import WordList, best_threshold, f1, profanity_scores, rates_by_group


def table(path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def split(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Indices of a training, a development and a test part: 60, 20 and 20 %."
    order = np.random.default_rng(0).permutation(n)
    return np.split(order, [int(0.6 * n), int(0.8 * n)])


def sets(data) -> dict[str, tuple[list[str], np.ndarray]]:
    "Texts and labels, 1 for toxic: tweets are toxic when most coders called them hateful or offensive."
    tweets, comments = table(data / "toxicity/davidson_labeled_data.csv"), table(data / "toxicity/surge_toxicity_en.csv")
    return {"davidson": ([r["tweet"] for r in tweets], np.array([int(r["class"] != "2") for r in tweets])),
            "surge": ([r["text"] for r in comments], np.array([int(r["is_toxic"] == "Toxic") for r in comments]))}


def hatecheck(data, score, threshold: float) -> dict:
    "Accuracy by functionality, false alarms by target, and agreement of the annotators there."
    rows, votes = table(data / "toxicity/hatecheck_test_suite_cases.csv"), table(data / "toxicity/hatecheck_test_suite_annotations.csv")
    agreed = {v["case_id"]: max(int(v["count_label_h"]), int(v["count_label_nh"])) / 5 for v in votes}
    texts, labels = [r["test_case"] for r in rows], np.array([int(r["label_gold"] == "hateful") for r in rows])
    scores = score(texts)
    flagged = scores >= threshold
    right = lambda pick: rate(int((flagged[pick] == labels[pick].astype(bool)).sum()), int(pick.sum()))
    kinds = np.array([r["functionality"] for r in rows])
    targets = np.array([r["target_ident"] for r in rows])
    identity = np.isin(kinds, ["ident_neutral_nh", "ident_pos_nh"])  # plain and friendly statements with a group's name
    alarms = rates_by_group(targets[identity], labels[identity], flagged[identity])
    unanimous = np.array([agreed[r["case_id"]] == 1 for r in rows])
    return {"auc": bootstrap_interval(auc, labels, scores, resamples=300), "f1": bootstrap_interval(f1, labels, flagged, resamples=300),
            "recall": rate(int(flagged[labels == 1].sum()), int(labels.sum())), "false_alarms": rate(int(flagged[labels == 0].sum()), int((1 - labels).sum())),
            "right_by_functionality": {k: right(kinds == k) for k in sorted(set(kinds))},
            "false_alarms_by_target": {t: rate(r["false_alarms"], r["harmless"]) for t, r in sorted(alarms.items())},
            "right_where_annotators": {"all agree": right(unanimous), "disagree": right(~unanimous)}}


def rounded(value):
    "Figures to four decimals, thresholds excepted: the record stays small."
    if isinstance(value, dict):
        return {str(k): v if k == "threshold" else rounded(v) for k, v in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main():
    options = arguments(__doc__)
    data = testdata()
    labelled = sets(data)
    parts = {name: split(len(texts)) for name, (texts, _) in labelled.items()}
    of = lambda name, k: ([labelled[name][0][i] for i in parts[name][k]], labelled[name][1][parts[name][k]])
    detectors = {"word list": (WordList.bundled().score, "surge"), "alt-profanity-check": (profanity_scores, "surge"),
                 "trained on tweets (Davidson)": (QualityClassifier(analyzer="char").fit(*of("davidson", 0)).predict, "davidson"),
                 "trained on comments (Surge)": (QualityClassifier(analyzer="char").fit(*of("surge", 0)).predict, "surge")}
    out = {}
    for name, (score, home) in detectors.items():
        dev_texts, dev_labels = of(home, 1)
        threshold = best_threshold(dev_labels, score(dev_texts))
        if name == "word list":
            threshold = 1e-9  # any word of the list: nothing to choose
        out[name] = {"threshold": threshold, "chosen_on": None if name == "word list" else f"{home}, n = {len(dev_texts)}"}
        for test in labelled:
            texts, labels = of(test, 2)
            start = time.perf_counter()
            scores = score(texts)
            out[name][test] = {"auc": bootstrap_interval(auc, labels, scores, resamples=300), "f1": bootstrap_interval(f1, labels, scores >= threshold, resamples=300),
                               "recall": rate(int((scores[labels == 1] >= threshold).sum()), int(labels.sum())),
                               "false_alarms": rate(int((scores[labels == 0] >= threshold).sum()), int((1 - labels).sum())),
                               "texts_a_second": round(len(texts) / (time.perf_counter() - start), -2)}
        out[name]["hatecheck"] = hatecheck(data, score, threshold)
        h = out[name]["hatecheck"]
        print(f"{name:30} t={threshold:.3f}", *(f"{t}: AUC {out[name][t]['auc']['value']:.3f} F1 {out[name][t]['f1']['value']:.3f}" for t in (*labelled, "hatecheck")))
        print("    recall, alarms on hatecheck", round(h["recall"]["value"], 2), round(h["false_alarms"]["value"], 2))
        print("   ", {k: round(v["value"], 2) for k, v in h["right_by_functionality"].items()})
        print("   ", {k: round(v["value"], 2) for k, v in h["false_alarms_by_target"].items()}, {k: round(v["value"], 2) for k, v in h["right_where_annotators"].items()})
    toxic = {name: {"n": len(labels), "toxic": int(labels.sum())} for name, (_, labels) in labelled.items()}
    if options.save:
        save("toxicity", "toxicity detectors on test parts of Davidson and Surge and on HateCheck; thresholds from development parts; 95 % intervals",
             rounded({"sets": toxic, "detectors": out}), ("scikit-learn", "alt-profanity-check"))


if __name__ == "__main__":
    main()
