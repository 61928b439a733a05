"""Tasks of the LM Evaluation Harness, on a tiny model and a task made here; no network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from squeezellm_hf.cli import main
from squeezellm_hf.evaluation.harness import evaluate_tasks
from squeezellm_hf.nn import SqueezeLLMLinear
from tests.tiny_checkpoint import byte_level

QUESTIONS = [
    {"question": f"{a} and {b} make", "choices": [str(a + b), str(a * b + 7), "none"], "answer": 0}
    for a in range(3)
    for b in range(4)
]
TASK = """
task: tiny_sums
dataset_path: json
dataset_kwargs:
  data_files: {data}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
# What a user of the harness runs, who has squeezellm_hf installed and imports none of it.
HARNESS = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
folder, tasks = sys.argv[1:]
found = simple_evaluate(
    model="hf", model_args=f"pretrained={folder}", tasks=["tiny_sums"], device="cpu",
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
)
print("RESULT", json.dumps(found["results"]["tiny_sums"]["acc,none"]))
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "tiny_sums.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "original"
    tokenizer = byte_level()
    FastTokenizer(tokenizer_object=tokenizer, eos_token="!").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    out = folder.with_name("quantized")
    assert main(["quantize", str(folder), str(out), "--dataset", "none", "--bits", "3"]) == 0
    return out


@pytest.fixture(scope="module")
def accuracy(quantized: Path) -> float:
    """The share of questions whose first choice is the likeliest, counted here."""
    pytest.importorskip("lm_eval")
    model = AutoModelForCausalLM.from_pretrained(quantized)
    assert any(isinstance(module, SqueezeLLMLinear) for module in model.modules())
    tokenizer = FastTokenizer.from_pretrained(quantized)
    right = 0
    for question in QUESTIONS:
        scores = []
        for choice in question["choices"]:  # type: ignore[attr-defined]
            context = tokenizer(question["question"]).input_ids
            ids = context + tokenizer(f" {choice}").input_ids
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logs[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
        right += scores.index(max(scores)) == question["answer"]
    return right / len(QUESTIONS)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_command_line_runs_tasks(
    quantized: Path, task_folder: Path, accuracy: float, tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    arguments = ["--tasks", "tiny_sums", "--task-folder", str(task_folder), "--json", str(file)]
    original = quantized.with_name("original")
    status = main(["eval", str(quantized), "--reference", str(original), *arguments])
    assert status == 0
    rows = json.loads(file.read_text())["rows"]
    assert [Path(row["model"]).name for row in rows] == ["original", "quantized"]
    assert [row["metric"] for row in rows] == ["acc", "acc"]
    assert 0 < accuracy < 1
    assert rows[1]["value"] == pytest.approx(accuracy)
    assert rows[1]["n_samples"] == len(QUESTIONS)
    assert 0 < rows[1]["stderr"] < 0.5


def test_a_quantized_folder_works_in_the_harness_itself(
    quantized: Path, task_folder: Path, accuracy: float
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, str(quantized), str(task_folder)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert float(lines[0].split()[1]) == pytest.approx(accuracy)


def test_limit_batches_and_wrong_arguments(
    quantized: Path, task_folder: Path, accuracy: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized).eval()
    tokenizer = FastTokenizer.from_pretrained(quantized)
    (row,) = evaluate_tasks(
        model, tokenizer, ["tiny_*"], task_folder=task_folder, limit=5, batch_size=4, n_fewshot=1
    )
    assert (row["n_samples"], row["n_fewshot"]) == (5, 1)
    with pytest.raises(ValueError, match="task 'no_such_task' is not one of"):
        evaluate_tasks(model, tokenizer, ["no_such_task"], task_folder=task_folder)
    with pytest.raises(ValueError, match="limit=0"):
        evaluate_tasks(model, tokenizer, ["tiny_sums"], limit=0)


def test_without_the_package(
    quantized: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(quantized), "--tasks", "hellaswag"]) == 1
    assert "pip install 'squeezellm-hf[eval]'" in capsys.readouterr().err
    assert main(["eval", str(quantized), "--tasks", " ,"]) == 1
    assert "names no task" in capsys.readouterr().err
