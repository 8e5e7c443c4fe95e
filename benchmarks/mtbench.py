"""`python eval.py mtbench`: MT-Bench's mean scores out of FastChat's single-answer judgments.

80 questions of two turns each, in eight categories; a judge gives each turn a score from 1 to 10. The benchmark's
figure is the mean over all judgments; a judgment whose score could not be read (-1) is counted and left out.
"""

import dataclasses
import json
import math

import run
from benchmarks.judgments import JudgmentSettings, group, parse_with_files, read_judgments, table


@dataclasses.dataclass
class MtbenchSettings(JudgmentSettings):
    """Flags of `python eval.py mtbench`."""
    COMMAND = "eval.py mtbench"


FIELDS = {"model": str, "judge": (str, list), "question_id": int, "turn": int, "score": (int, float, type(None))}
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


def category_of(question):
    """The category of a question, which follows from its id: ten each, from 81 on.

    >>> category_of(81), category_of(160)
    ('writing', 'humanities')
    """
    return CATEGORIES[(question - 81) // 10]


def mtbench_scores(judgments):
    """Mean scores of (question_id, turn, score) judgments: {first_turn, second_turn, average, categories}, None where
    there is none. `average` is over all of them, both turns together, as FastChat has it; a category's too.

    >>> scores = mtbench_scores([(81, 1, 8), (81, 2, 5), (91, 1, 8)])
    >>> scores["first_turn"], scores["second_turn"], scores["average"], scores["categories"]["writing"]
    (8.0, 5.0, 7.0, 6.5)
    """
    def mean(scores):
        return sum(scores) / len(scores) if scores else None

    return {"first_turn": mean([score for _, turn, score in judgments if turn == 1]),
            "second_turn": mean([score for _, turn, score in judgments if turn == 2]),
            "average": mean([score for _, _, score in judgments]),
            "categories": {name: mean([score for question, _, score in judgments if category_of(question) == name])
                           for name in CATEGORIES}}


def main(argv):
    """Print the mean scores of each model in the judgments, the best first."""
    args, paths = parse_with_files(MtbenchSettings, argv, "MT-Bench: mean scores, from 1 to 10, by turn and category")
    models = group(read_judgments(paths, FIELDS), by=["model"], key=["question_id", "turn"])
    results = [_result(name, rows) for (name,), rows in models.items()]
    results.sort(key=lambda r: -r["average"])
    print("\n".join(map(json.dumps, results)) if args.json else _as_text(results))


def _result(name, rows):
    """The figures of one model. Raises UserError for a row that is not MT-Bench's, and where no row has a score."""
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
    return {"model": name, **mtbench_scores(judgments), "n_judgments": len(judgments),
            "n_dropped": len(rows) - len(judgments)}


def _as_text(results):
    """A row for each model and each part of the benchmark that has judgments, all of it first."""
    rows = []
    for result in results:
        parts = {"all": result["average"], "first turn": result["first_turn"], "second turn": result["second_turn"],
                 **result["categories"]}
        rows += [[result["model"], part, f"{mean:.2f}"] for part, mean in parts.items() if mean is not None]
    counts = [f"{r['model']}: {r['n_judgments']} judgments, {r['n_dropped']} without a score left out" for r in results]
    return "\n".join([table(["model", "part", "score"], rows), "", *counts])
