"""Models written for other programs: opened again by transformers, PEFT and a GGUF reader they answer as they did; the card
says what is known; a repository is filled over real HTTP."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import temper
from hubbed import Hub, hub_served, pushed
from temper import export as exports
from temper import hub
from temper.errors import ModelError, RunError
from temper.export import card as carding
from temper.export import folder as writing
from temper.export import gguf as packing
from temper.models import adapters
from temper.models.adapters import Adapter
from test_chat import CHATML, real, small
from tiny_models import build

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="session")
def jokes(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A finished run folder of dialogue-style's smoke profile."""
    return once(
        "smoke-jokes",
        lambda out: temper.run("dialogue-style", {"threads": 1}, profile="smoke", out=out, quiet=True) and None,
    )


def log_probabilities(hf: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return hf(input_ids=torch.tensor([ids])).logits.log_softmax(-1)


def told(text: str) -> float:
    """The difference that an export states."""
    found = re.search(r"at most ([\d.e+-]+) nats", text)
    assert found, text
    return float(found[1])


def test_a_whole_model_a_folded_adapter_and_one_apart(jokes: Path, tmp_path: Path) -> None:
    """What transformers and PEFT open gives what Temper's own adapter on its rounded base gives."""
    source = hub.locate(str(jokes / "qlora"), Path())
    ids = AutoTokenizer.from_pretrained(jokes / "qlora/adapter")("Почему в супе муха?")["input_ids"]
    packed, _ = adapters.open_model(source, packed=True)  # as it trained: in 4 bits
    wanted = log_probabilities(packed, ids)
    done = exports.export(str(jokes / "qlora"), tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(done.path)
    assert (log_probabilities(whole, ids) - wanted).abs().max() < 2e-2
    assert "on 8 real prompts" in done.compared and "8 greedy answers are the same" in done.compared and told(done.compared) < 1e-4  # fmt: skip
    assert "quantization_config" not in json.loads((done.path / "config.json").read_text())

    apart = exports.export(str(jokes / "qlora"), tmp_path / "apart", apart=True)
    on_rounded, _ = adapters.open_base(source, packed=True)
    theirs = PeftModel.from_pretrained(on_rounded, str(apart.path))
    assert (log_probabilities(theirs, ids) - wanted).abs().max() < 1e-4 and told(apart.compared) < 1e-4

    full = exports.export(str(jokes / "full"), tmp_path / "full")
    a, b = (AutoModelForCausalLM.from_pretrained(p) for p in (jokes / "full/model", full.path))
    assert torch.equal(log_probabilities(a, ids), log_probabilities(b, ids)) and told(full.compared) == 0
    half = exports.export(str(jokes / "full"), tmp_path / "half", precision="bf16")
    assert AutoModelForCausalLM.from_pretrained(half.path).dtype == torch.bfloat16 and 0 < told(half.compared) < 0.5


def test_the_card_says_what_is_known(jokes: Path, tmp_path: Path) -> None:
    done = exports.export(str(jokes / "qlora"), tmp_path / "out", licence="apache-2.0")
    text = (done.path / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert 'license: "apache-2.0"' in head and 'tags: ["temper", "sft"]' in head and 'library_name: "transformers"' in head  # fmt: skip
    results = json.loads((jokes / "report/results.json").read_text())["evaluations"]["compare"]
    assert "# dialogue-style: qlora" in body and done.compared in body
    assert "| qlora |" in body and "token_f1" in body and "8 rows; 95 % intervals" in body
    assert "What each way gives and costs" in body and "base held in" in body and "nf4" in body
    assert set(results["models"]) == {"large", "qlora", "small", "full"}
    assert "## Data: jokes" in body and "mini:ru-jokes" in body and "not among the best 50" in body
    assert (
        "```yaml\nname: dialogue-style" in body
        and "from `large`" in body
        and "quantize: nf4" in body
        and "lora, rank 16, alpha 16" in body
    )
    assert str(tmp_path) not in text and "/tmp" not in text, "paths of a machine mean nothing elsewhere"
    unknown = (exports.export(str(jokes / "full"), tmp_path / "other").path / "README.md").read_text()
    assert "Not known here" in unknown and 'license: "other"' in unknown


def test_a_card_of_an_adapter_says_what_it_goes_on(jokes: Path, tmp_path: Path) -> None:
    done = exports.export(str(jokes / "qlora"), tmp_path / "out", apart=True)
    text = (done.path / "README.md").read_text()
    assert 'library_name: "peft"' in text and "the stage `large`" in text and "held in nf4" in text
    code = text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"BASE": str(jokes / "large/model"), "FOLDER": str(done.path)}
    exec(compile(code, "card", "exec"), names)  # as a reader would
    ids = AutoTokenizer.from_pretrained(done.path)("Почему?")["input_ids"]
    source = hub.locate(str(jokes / "qlora"), Path())
    wanted = log_probabilities(adapters.open_model(source, packed=True)[0], ids)
    assert (log_probabilities(names["model"], ids) - wanted).abs().max() < 0.05
    with pytest.raises(ModelError, match="written in the precision that it has"):
        exports.export(str(jokes / "qlora"), tmp_path / "other", apart=True, precision="bf16")
    with pytest.raises(ModelError, match="no adapter to keep apart"):
        exports.export(str(jokes / "full"), tmp_path / "other", apart=True)


def test_paths_of_this_machine_are_not_published(tmp_path: Path) -> None:
    text = "source: /work/data/jokes.jsonl\nmodel: ../base/model\nother: org/name\nurl: http://127.0.0.1:8000/v1#x\nlist: [~/a/b.csv, 'c/d']"
    out = carding.PATH.sub(lambda m: Path(m[0]).name, text)
    assert (
        out
        == "source: jokes.jsonl\nmodel: model\nother: org/name\nurl: http://127.0.0.1:8000/v1#x\nlist: [b.csv, 'c/d']"
    )


def test_a_classifier_is_no_language_model(jokes: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a classifier or a reward model"):
        exports.export(str(jokes / "style"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_exported_can_be_exported(jokes: Path, tmp_path: Path) -> None:
    """A model with a chat template and of no run: plain texts stand in for rows."""
    first = exports.export(str(jokes / "full"), tmp_path / "first")
    again = exports.export(str(first.path), tmp_path / "again", kind="gguf")
    assert "on 3 plain texts" in again.compared
    assert {oct(f.stat().st_mode & 0o777) for f in again.path.iterdir()} == {"0o644"}
    assert 'library_name: "gguf"' in (again.path / "README.md").read_text()


def test_a_model_of_no_run_and_the_licence_of_its_own_card(tmp_path: Path) -> None:
    base = tmp_path / "base"
    hf = type(build("llama"))(type(build("llama").config)(**{**build("llama").config.to_dict(), "vocab_size": len(small()), "max_position_embeddings": 64}))  # fmt: skip
    hf.save_pretrained(base)
    small().save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
    done = exports.export(str(base), tmp_path / "out")
    assert "on 3 plain texts" in done.compared
    assert 'license: "mit"' in (done.path / "README.md").read_text()


def test_what_is_there_is_not_written_over(jokes: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert exports.export(str(jokes / "full"), tmp_path / "out").path.is_dir(), "an empty folder is none"
    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(RunError, match="is there already"):
        exports.export(str(jokes / "full"), tmp_path / "out")
    assert sorted((tmp_path / "out").iterdir()) == before


def test_what_answers_otherwise_is_not_written(jokes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = writing.load.save

    def damaged(hf: Any, *rest: Any, **more: Any) -> None:
        with torch.no_grad():
            hf.get_input_embeddings().weight.mul_(1.5)
        save(hf, *rest, **more)

    monkeypatch.setattr(writing.load, "save", damaged)
    with pytest.raises(ModelError, match="differs from the one that was trained"):
        exports.export(str(jokes / "full"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [], "nothing half-done is left"


def made(family: str, folder: Path, tokenizer: Any, **more: Any) -> Path:
    """A sharp little model with a tokenizer of byte-level pieces."""
    from transformers import AutoConfig

    sizes = {"vocab_size": len(tokenizer) + 5, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": tokenizer.eos_token_id, "rms_norm_eps": 1e-5}  # fmt: skip
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | more))
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize(
    ("family", "more"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("qwen3", {"head_dim": 128}), ("mistral", {"sliding_window": None})],
    ids=["llama", "llama tied", "qwen2", "qwen3", "mistral"],
)  # fmt: skip
def test_gguf_is_read_as_the_same_model(family: str, more: dict[str, Any], kind: str, tmp_path: Path) -> None:
    """By the package's own reader (shapes, settings, tokens) and by transformers' (what it computes)."""
    tokenizer = small(CHATML)
    base = made(family, tmp_path / "base", tokenizer, **more)
    done = exports.export(str(base), tmp_path / "out", kind="gguf", packing=kind)  # type: ignore[arg-type]
    assert sorted(p.name for p in done.path.iterdir()) == ["Modelfile", "README.md", "model.gguf"]
    found = gguf.GGUFReader(done.path / "model.gguf")
    field = {name: f.contents() for name, f in found.fields.items()}
    assert field["general.architecture"] == ("llama" if family == "mistral" else family)
    tokens = field["tokenizer.ggml.tokens"]
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer))) and len(tokens) == len(tokenizer) + 5  # fmt: skip
    assert field["tokenizer.chat_template"] == CHATML and field["tokenizer.ggml.pre"] == "gpt-2"
    assert field["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert {t.tensor_type.name for t in found.tensors} <= {"F32", kind.upper()}
    limit = {"f32": 1e-4, "f16": 0.05, "q8_0": 0.5}[kind]
    assert told(done.compared.rpartition(";")[2]) < limit
    a = AutoModelForCausalLM.from_pretrained(base)
    b = AutoModelForCausalLM.from_pretrained(done.path, gguf_file="model.gguf", dtype=torch.float32)
    ids = tokenizer("Стисло: abc 12")["input_ids"]
    assert (log_probabilities(a, ids) - log_probabilities(b, ids)).abs().max() < limit


def test_the_tokenizer_of_qwen_has_a_name(tmp_path: Path) -> None:
    assert packing._cut(real("qwen2")) == "qwen2" and packing._cut(real("gpt2")) == "gpt-2"


def test_what_ollama_is_told(jokes: Path, tmp_path: Path) -> None:
    done = exports.export(str(jokes / "full"), tmp_path / "out", kind="gguf")
    text = (done.path / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\n") and 'PARAMETER stop "<eos>"' in text
    assert "{{ if .System }}<system>{{ .System }}{{ end }}<user>{{ .Prompt }}<assistant>{{ .Response }}" in text


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("gpt2", {"n_embd": 64}, "a gpt2 is not written as GGUF here"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "positions of the kind linear"),
        ("mistral", {"sliding_window": 16}, "sliding window"),
        ("qwen3", {"head_dim": 32}, "cannot be read back"),
    ],
)  # fmt: skip
def test_what_gguf_cannot_hold_is_refused(family: str, more: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = made(family, tmp_path / "base", small(), **more)
    with pytest.raises(ModelError, match=said):
        exports.export(str(base), tmp_path / "out", kind="gguf")
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_readers_do_not_know(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="byte-level BPE"):
        packing._words(real("llama2"), 32000)
    odd = small()
    odd.backend_tokenizer.pre_tokenizer = __import__("tokenizers").pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="do not know by name"):
        packing._cut(odd)


def test_virtual_tokens_stay_apart(tmp_path: Path) -> None:
    base = made("llama", tmp_path / "base", small())
    source = hub.Source(str(base))
    hf = adapters.attach(AutoModelForCausalLM.from_pretrained(base), Adapter(method="prompt", tokens=4), seed=0)
    adapters.save(hf, tmp_path / "soft", source, stage=None, identity=hub.identity(source))
    small().save_pretrained(tmp_path / "soft")
    done = exports.export(str(tmp_path / "soft"), tmp_path / "out")
    assert (done.path / "adapter_config.json").is_file() and told(done.compared) < 1e-5
    assert 'library_name: "peft"' in (done.path / "README.md").read_text()
    with pytest.raises(ModelError, match="GGUF holds whole models"):
        exports.export(str(tmp_path / "soft"), tmp_path / "gguf", kind="gguf")


# The hub


@pytest.fixture
def served() -> Iterator[str]:
    with hub_served() as address:
        yield address


def test_what_is_pushed_is_what_was_written(jokes: Path, tmp_path: Path, served: str) -> None:
    done = exports.export(str(jokes / "full"), tmp_path / "out")
    shown = pushed(served, str(done.path), "me/jokes")
    assert shown.returncode == 0, shown.stderr
    assert Hub.got["repo"]["name"] == "jokes" and (
        Hub.got["repo"].get("private") or Hub.got["repo"].get("visibility") == "private"
    )
    assert Hub.got["files"] == {p.name: p.read_bytes() for p in done.path.iterdir()}
    assert "me/jokes" in shown.stdout
    Hub.refuse = True
    shown = pushed(served, str(done.path), "me/jokes")
    assert shown.returncode == 1 and "HF_TOKEN" in shown.stderr and "Traceback" not in shown.stderr


def test_what_cannot_be_pushed(tmp_path: Path, jokes: Path) -> None:
    with pytest.raises(ModelError, match="no model card"):
        exports.push(jokes / "full" / "model", "me/jokes")
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(ModelError, match="is no repository"):
        exports.push(tmp_path, "jokes")
    shown = pushed("http://127.0.0.1:9", str(tmp_path), "me/jokes")
    assert shown.returncode == 1 and "could not be written to the hub" in shown.stderr


def test_the_command(jokes: Path, tmp_path: Path) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        code = "from temper.cli import main; raise SystemExit(main())"
        return subprocess.run([sys.executable, "-c", code, "export", *words], capture_output=True, text=True)

    done = command(str(jokes / "full"), str(tmp_path / "out"), "--format", "gguf", "--precision", "q8_0")
    assert done.returncode == 0 and "compared with what was trained:" in done.stdout and "8 real prompts" in done.stdout, done.stderr  # fmt: skip
    for words, said in (
        (("--format", "ggml"), "no format «ggml»"),
        (("--precision", "f16"), "safetensors has no precision «f16»"),
    ):
        failed = command(str(jokes / "full"), str(tmp_path / "other"), *words)
        assert failed.returncode == 1 and said in failed.stderr
