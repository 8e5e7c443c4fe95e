"""TODO"""

import dataclasses
import json
import math

import run
from benchmarks import judgments


@dataclasses.dataclass
class MTBenchSettings:
    """Flags of `python eval.py mtbench`."""
    judgments: str = run.flag("", "the benchmark's model_judgment .jsonl by one judge; several as A B C after one "
                                  "--judgments (needed)")
    json: bool = run.flag(False, "print one JSON object a line, each what a line of text stands for")


CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


def mtbench_scores(judgments):
    """Mean scores of (question_id, turn, score) judgments: {name: mean}, None where there is none. `average` is over
    all of them, both turns together, as FastChat has it; a category's too."""
    def mean(keep):
        scores = [score for question, turn, score in judgments if keep(question, turn)]
        return sum(scores) / len(scores) if scores else None

    return {"first_turn": mean(lambda q, turn: turn == 1), "second_turn": mean(lambda q, turn: turn == 2),
            "average": mean(lambda q, turn: True),
            "categories": {name: mean(lambda q, turn: (q - 81) // 10 == i) for i, name in enumerate(CATEGORIES)}}


def mtbench(argv):
    """The sub-command `mtbench`: mean scores of each model in FastChat's single-answer judgments, the best first."""
    fields = {"model": str, "judge": (str, list), "question_id": int, "turn": int, "score": (int, float, type(None))}
    s, groups = read_judgments(MTBenchSettings, argv, "MT-Bench: mean score of each turn and category", fields,
                               ("model",), ("question_id", "turn"))
    results = []
    for (name,), rows in groups.items():
        judgments = []
        for where, row in rows:
            question, turn, score = row["question_id"], row["turn"], row["score"]
            if not 81 <= question <= 160 or turn not in (1, 2):
                raise run.UserError(f"--judgments {where}: question {question}, turn {turn} is not MT-Bench's; "
                                    "give judgments of its questions 81 to 160, turns 1 and 2")
            if score is None or math.isnan(score) or score == -1:       # -1: no [[score]] was found in the verdict
                continue
            if not 0 <= score <= 10:
                raise run.UserError(f"--judgments {where}: score {score} is not in 0..10, nor -1 for a failed one; "
                                    "mend or remove the line")
            judgments.append((question, turn, score))
        if not judgments:
            raise run.UserError(f"--judgments: no judgment of {name} has a score; judge it again")
        results.append({"model": name, **mtbench_scores(judgments), "n_judgments": len(judgments),
                        "n_dropped": len(rows) - len(judgments)})
    for r in sorted(results, key=lambda r: -r["average"]):
        means = [f"{k.replace('_', ' ')} {v:.2f}" for k, v in {**r, **r["categories"]}.items() if isinstance(v, float)]
        print(json.dumps(r) if s.json else f"{r['model']}: {', '.join(means)}; {r['n_judgments']} judgments, "
                                           f"{r['n_dropped']} without a score dropped")
