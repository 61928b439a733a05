"""Pushing to the Hub, with a folder in the place of the Hub."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from squeezellm_hf import SqueezeLLMConfig, quantize_model
from squeezellm_hf.cli import main
from squeezellm_hf.integration import push
from tests.conftest import tiny_llama
from tests.tiny_checkpoint import write


@pytest.fixture(scope="module")
def quantized(token_ids: Tensor) -> LlamaForCausalLM:
    settings = SqueezeLLMConfig(bits=3, dataset=token_ids, n_samples=4, sequence_length=32)
    model = tiny_llama()
    model.config.name_or_path = "someone/tiny"
    return quantize_model(model, None, settings, progress=False)


class Hub:
    """What a push leaves behind: files by branch, and what it was called with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: dict[str, dict] = {}
        self.branches: list[str] = []

    def branch(self, revision: str | None) -> Path:
        folder = self.root / (revision or "main")
        folder.mkdir(exist_ok=True)
        return folder

    def api(self, token: str | None = None) -> "Hub":
        self.token = token
        return self

    def create_repo(self, repo_id: str, **options: object) -> SimpleNamespace:
        self.calls["create_repo"] = options
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        self.branches.append(branch)

    def file_exists(self, repo_id: str, name: str, *, revision: str | None) -> bool:
        return (self.branch(revision) / name).exists()

    def hf_hub_download(self, repo_id: str, name: str, *, revision: str | None) -> str:
        return str(self.branch(revision) / name)

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, revision: str | None, **options: object
    ) -> str:
        self.calls["upload"] = {"repo_id": repo_id, **options}
        target = self.branch(revision)
        sent = {path.name for path in Path(folder_path).iterdir()}
        for pattern in options["delete_patterns"]:  # as the Hub does: never what is being sent
            for path in target.glob(pattern):
                if path.name not in sent:
                    path.unlink()
        shutil.copytree(folder_path, target, dirs_exist_ok=True)
        return "commit"

    def card(self, revision: str | None = None) -> huggingface_hub.ModelCard:
        return huggingface_hub.ModelCard.load(self.branch(revision) / "README.md")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (tmp_path / "hub").mkdir()
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(push, "HfApi", hub.api)
    return hub


def test_model_and_card_go_in_one_commit(quantized: LlamaForCausalLM, hub: Hub) -> None:
    assert quantized.push_to_hub("me/tiny-3bit", token="secret", private=True) == "commit"
    assert hub.token == "secret"
    assert hub.calls["create_repo"] == {"private": True, "exist_ok": True}
    assert hub.calls["upload"]["repo_id"] == "me/tiny-3bit"
    assert hub.calls["upload"]["commit_message"] == "Upload LlamaForCausalLM"
    card = hub.card()
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "someone/tiny"
    assert card.data.base_model_relation == "quantized"
    assert card.data.quantized_by == "me"
    assert {"squeezellm", "3-bit"} <= set(card.data.tags)
    assert 'model="me/tiny-3bit"' in card.text
    again = AutoModelForCausalLM.from_pretrained(hub.branch(None))
    assert all(t.equal(again.state_dict()[name]) for name, t in quantized.state_dict().items())


def test_the_base_model_outlives_a_save(
    quantized: LlamaForCausalLM, hub: Hub, tmp_path: Path
) -> None:
    quantized.save_pretrained(tmp_path / "tiny")
    record = json.loads((tmp_path / "tiny" / "config.json").read_text())["quantization_config"]
    assert record["base_model"] == "someone/tiny"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    model.push_to_hub("me/tiny")
    assert hub.card().data.base_model == "someone/tiny"


def test_save_and_push(quantized: LlamaForCausalLM, hub: Hub, tmp_path: Path) -> None:
    quantized.save_pretrained(
        tmp_path / "tiny", push_to_hub=True, token="secret", revision="v2", tags=["mine"],
        commit_message="Mine", max_shard_size="40KB",
    )  # fmt: skip
    assert hub.token == "secret"
    assert hub.branches == ["v2"]
    assert hub.calls["upload"]["repo_id"] == "me/tiny"
    assert hub.calls["upload"]["commit_message"] == "Mine"
    assert "mine" in hub.card("v2").data.tags
    assert (hub.branch("v2") / "model.safetensors.index.json").exists()
    assert (tmp_path / "tiny" / "config.json").exists()


def test_no_stale_weights_stay(quantized: LlamaForCausalLM, hub: Hub) -> None:
    quantized.push_to_hub("me/tiny")
    (hub.branch(None) / "tokenizer.json").write_text("{}")
    quantized.push_to_hub("me/tiny", max_shard_size="40KB")
    names = {path.name for path in hub.branch(None).iterdir()}
    assert "model.safetensors" not in names
    assert {"model.safetensors.index.json", "tokenizer.json"} <= names


@pytest.mark.parametrize("create_pr", [True, False])
def test_a_pull_request_is_left_to_the_hub(
    quantized: LlamaForCausalLM, hub: Hub, create_pr: bool
) -> None:
    quantized.push_to_hub("me/tiny", create_pr=create_pr, commit_description="Why")
    assert hub.calls["upload"]["create_pr"] is create_pr
    assert hub.calls["upload"]["commit_description"] == "Why"


def test_whose_card_is_kept(quantized: LlamaForCausalLM, hub: Hub) -> None:
    quantized.push_to_hub("me/tiny")
    ours = hub.card().content
    path = hub.branch(None) / "README.md"
    # A stale one of ours, and the one that transformers pushes with a tokenizer.
    generated = "This model card has been automatically generated."
    for text in (ours.replace("| Bits per quantized weight |", "| Old |"), generated):
        path.write_text(text)
        quantized.push_to_hub("me/tiny")
        assert hub.card().content == ours
    path.write_text("---\ntags:\n- own\n---\n# Mine\n")
    quantized.push_to_hub("me/tiny", tags="new")
    assert hub.card().text.strip() == "# Mine"
    assert hub.card().data.tags == ["own", "new"]


def test_a_models_own_tags(quantized: LlamaForCausalLM, hub: Hub) -> None:
    quantized.add_model_tags(["trained"])
    quantized.push_to_hub("me/tiny")
    assert "trained" in hub.card().data.tags


def test_results_reach_the_card(tmp_path: Path, hub: Hub) -> None:
    original, out = write(tmp_path / "original"), tmp_path / "tiny"
    text = tmp_path / "text.txt"
    text.write_text("A line of text to predict. " * 40)
    assert main(["quantize", str(original), str(out), "--bits", "3", "--dataset", "none"]) == 0
    command = ["eval", str(out), "--dataset", str(text), "--sequence-length", "32"]
    results = tmp_path / "results.json"
    command += ["--max-tokens", "160", "--card", "--json", str(results)]
    for arguments in (command, [*command, "--reference", str(original)]):  # the second replaces
        assert main(arguments) == 0
        rows = json.loads(results.read_text())["rows"]
        card = huggingface_hub.ModelCard.load(out / "README.md")
        assert card.text.count("## Results") == 1
        assert f"| {rows[-1]['perplexity']:.3f} |" in card.text
    assert f"{rows[-1]['kl_mean']:.4f}" in card.text
    assert f"| original |  | {rows[0]['perplexity']:.3f} |" in card.text
    model = AutoModelForCausalLM.from_pretrained(out)
    model.push_to_hub("me/tiny")
    pushed = hub.card()
    assert pushed.text.count("## Results") == 1
    assert 'model="me/tiny"' in pushed.text
    found = {result.metric_type: result.metric_value for result in pushed.data.eval_results}
    assert found == pytest.approx({k: rows[-1][k] for k in ("perplexity", "kl_mean")})
    assert "text.txt sha256:" in pushed.text
    model.save_pretrained(tmp_path / "copy")
    assert "## Results" in (tmp_path / "copy" / "README.md").read_text()


def test_results_need_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = write(tmp_path / "original")
    assert main(["eval", str(original), "--sequence-length", "32", "--card"]) == 1
    assert "is no local folder with a model card" in capsys.readouterr().err
