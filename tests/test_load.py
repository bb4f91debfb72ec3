"""Models that cannot be loaded, or should not be: a message that says what and what to do, and never random weights."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from preferred import words
from temper import hub
from temper.errors import ModelError
from temper.hub import Source
from temper.models import load
from tiny_models import VOCABULARY, build

IDS = torch.arange(3, 15)[None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def opened(folder: Path, **how: Any) -> Any:
    return load.model(hub.locate(str(folder), folder.parent), **how)


def test_a_whole_folder_gives_its_weights_and_no_notice(folder: Path) -> None:
    model, notices = opened(folder)
    assert notices == [] and not model.training
    assert torch.equal(model(IDS).logits, build("llama")(IDS).logits)
    assert next(model.parameters()).dtype == torch.float32
    assert next(opened(folder, dtype=torch.bfloat16)[0].parameters()).dtype == torch.bfloat16
    assert opened(folder, attention="eager")[0].config._attn_implementation == "eager"


def test_a_checkpoint_in_shards(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    model, notices = opened(tmp_path / "model")
    assert notices == [] and torch.equal(model(IDS).logits, build("llama")(IDS).logits)


def test_a_missing_shard(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    sorted((tmp_path / "model").glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        opened(tmp_path / "model")
    assert "complete" in error.value.do


def test_no_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        opened(folder)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="so it is no model") as error:
        opened(folder)
    assert "model.safetensors" in error.value.do


def test_no_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder") as error:
        hub.locate("./modle", folder.parent)
    assert "model" in error.value.do
    with pytest.raises(ModelError, match="is a file"):
        hub.locate(str(folder / "config.json"), folder.parent)


def test_a_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')
    with pytest.raises(ModelError):
        opened(folder)


def test_a_kind_of_model_that_nobody_knows(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "lamma"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        opened(folder)


@pytest.mark.parametrize("kept", [0, 5, 1000])
def test_a_download_that_broke_off(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        opened(folder)
    assert "complete" in error.value.do


def test_a_pointer_of_git_lfs(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ModelError, match="cannot be loaded"):
        opened(folder)


def test_missing_weights_would_be_random(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != gone}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 of the model's weights") as error:
        opened(folder)
    assert gone in str(error.value)


def test_weights_of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(VOCABULARY + 4, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError):
        opened(folder)


def test_weights_of_no_part_are_told(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "score.weight": torch.ones(1, 32)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert "belong to no part" in opened(folder)[1][0]


def pickled(folder: Path, content: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def test_pickled_weights_are_read_with_a_notice(folder: Path) -> None:
    pickled(folder, load_file(folder / "model.safetensors"))
    model, notices = opened(folder)
    assert "weights_only=True" in notices[0]
    assert torch.equal(model(IDS).logits, build("llama")(IDS).logits)


class Harm:
    """Unpickled by plain pickle, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


def test_a_pickle_that_would_run_code_does_not(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    pickle.loads(pickle.dumps(Harm(proof)))
    assert proof.is_dir(), "the trap works"
    proof.rmdir()
    pickled(folder, {**load_file(folder / "model.safetensors"), "lm_head.weight": Harm(proof)})
    with pytest.raises(ModelError, match="could run code") as error:
        opened(folder)
    assert not proof.exists() and "weights_only" not in str(error.value)


def test_code_that_comes_with_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": own}))
    (folder / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    with pytest.raises(ModelError, match="does not run by default") as error:
        opened(folder)
    assert "trust_remote_code" in error.value.do and not (tmp_path / "ran").exists()


def test_an_encoder_decoder_is_opened_as_one(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    model, _ = opened(tmp_path / "t5")
    assert isinstance(model, T5ForConditionalGeneration)
    assert load.context(model) is None and load.has_room(model, 10**6, 10**6)


def test_no_tokenizer(folder: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer") as error:
        load.tokenizer(Source(str(folder)))
    assert "tokenizer.json" in error.value.do


# The hub

UNREACHABLE = """
import sys, time
from pathlib import Path
from temper import hub
from temper.errors import ModelError
began = time.perf_counter()
try:
    hub.locate(sys.argv[1], Path("."))
except ModelError as error:
    print(f"{time.perf_counter() - began:.1f}", str(error).replace(chr(10), " | "))
"""


def test_a_tokenizer_of_its_own_stays_what_it_is(tmp_path: Path) -> None:
    """transformers reads the tokenizer of a Qwen2 by the rules of Qwen's own, whatever tokenizer.json says."""
    made = words()
    build("qwen2").save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    text = "w5 w6 w61 w7"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] != made(text)["input_ids"], "why this is needed"
    found = load.tokenizer(Source(str(tmp_path)))
    assert found(text)["input_ids"] == made(text)["input_ids"] == [1, 5, 6, 61, 7]


def test_a_hub_that_cannot_be_reached_is_told_at_once(tmp_path: Path) -> None:
    """A closed port of this machine stands for it. No torch, no retries that last minutes."""
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    environment = {**{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}, **closed}
    command = [sys.executable, "-W", "ignore", "-c", UNREACHABLE, "some-org/some-model"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seconds, _, message = done.stdout.strip().partition(" ")
    assert float(seconds) < 15
    assert "the hub cannot be reached" in message and "some-org/some-model" in message and "folder" in message


class Answers:
    """A hub of this machine that gives every request the same answer."""

    def __init__(self, status: int, code: str) -> None:
        import http.server
        import threading

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_HEAD

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "GatedRepo", "accept it on the model's page"),
        (404, "RepoNotFound", "the hub has no model"),
        (404, "RevisionNotFound", "has no revision «old»"),
    ],
)
def test_what_the_hub_refuses_is_explained(tmp_path: Path, status: int, code: str, said: str) -> None:
    answers = Answers(status, code)
    environment = {**{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}}
    environment |= {"HF_ENDPOINT": answers.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-W", "ignore", "-c", UNREACHABLE, "some-org/some-model@old"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    answers.server.shutdown()
    answers.server.server_close()
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and "some-org/some-model" in done.stdout


# What identifies content


def test_identity_follows_the_content(folder: Path, tmp_path: Path) -> None:
    source = Source(str(folder))
    before = hub.identity(source)
    shutil.copytree(folder, tmp_path / "copy")
    assert hub.identity(Source(str(tmp_path / "copy"))) == before, "where it lies does not matter"
    (folder / "README.md").write_text("a card")
    assert hub.identity(source) == before
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1e-3
    time.sleep(0.01)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    changed = hub.identity(source)
    assert changed != before
    (folder / "tokenizer.json").write_text("{}")
    assert hub.identity(source) not in {before, changed}
    assert hub.identity(Source("org/name", "a" * 40)) != hub.identity(Source("org/name", "b" * 40))


def test_saving_keeps_the_end_tokens_that_were_trained(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from temper.stages.pretrain import Shape, train_tokenizer

    tokenizer = train_tokenizer(["a b c"], Shape(vocabulary=300))
    model, _ = opened(folder)
    load.save(model, tokenizer, tmp_path / "saved", ends={7, 2})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert load.end_ids(again) == [2, 7] and load.context(again) == 128
    assert load.tokenizer(Source(str(tmp_path / "saved")))("a b c")["input_ids"] == tokenizer("a b c")["input_ids"]
