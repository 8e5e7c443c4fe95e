"""A checkpoint written here, read by lm-evaluation-harness: a local multiple-choice task, nothing from the network."""

import json

import pytest
import torch

import model
import world
from chat import load_checkpoint

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'lm_eval[hf]')")
pytest.importorskip("accelerate", reason="lm_eval's Hugging Face models need accelerate (pip install 'lm_eval[hf]')")

TASK = """\
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
"""


def test_a_local_task_on_a_saved_checkpoint(base, tmp_path, monkeypatch):
    """Its accuracy and its log-likelihoods are the ones that our own network gives for the same tokens."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    net, chat = load_checkpoint(base, "cpu", torch.float32)
    net.save_pretrained(str(tmp_path / "saved"), chat.tokenizer)
    docs = []
    for i, query in enumerate(world.OPERATIONS.queries("test", 40)):
        right = world.OPERATIONS.solve(query)
        choices = [right, right[::-1], right[1:] + "h"]
        docs.append({"question": f"<user>{query}<assistant>", "label": i % 3,
                     "choices": choices[-(i % 3):] + choices[:-(i % 3)] if i % 3 else choices})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    (tmp_path / "letters.yaml").write_text(TASK.format(file=tmp_path / "test.jsonl"))

    harness = HFLM(pretrained=str(tmp_path / "saved"), device="cpu", dtype="float32", batch_size=8)
    found = lm_eval.simple_evaluate(model=harness, tasks=["letters"], bootstrap_iters=0, log_samples=True,
                                    task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
    ours, right = [], 0
    for doc in docs:
        prompt = chat.tokenizer.encode(doc["question"], add_special_tokens=False)
        choices = [chat.tokenizer.encode(c, add_special_tokens=False) for c in doc["choices"]]
        logprob, row, rows = model.response_logprobs(net, [prompt], [choices])
        scores = torch.zeros(rows).index_add(0, row.cpu(), logprob.detach().cpu()).tolist()
        ours.append(scores)
        right += max(range(3), key=scores.__getitem__) == doc["label"]
    theirs = {s["doc_id"]: [r[0][0] if isinstance(r[0], (list, tuple)) else r[0] for r in s["resps"]]
              for s in found["samples"]["letters"]}
    torch.testing.assert_close(torch.tensor([theirs[i] for i in range(40)]).double(), torch.tensor(ours).double(),
                               atol=1e-3, rtol=1e-4)
    assert found["results"]["letters"]["acc,none"] == pytest.approx(right / 40) and 0 < right < 40
