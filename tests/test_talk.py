"""Conversations: answers are the sampler's own, come piece by piece, and adapters come and go between them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from temper import chat, hub
from temper.cli import main
from temper.data.chat import Encoder
from temper.data.forms import Format
from temper.errors import DataError, ModelError, RecipeError
from temper.models import adapters, load
from temper.models.adapters import Adapter
from temper.rollouts.decoding import Decoding
from temper.rollouts.sampler import Sampler
from temper.types import Record
from test_chat import CHATML, small

DRAWN = Decoding(max_new_tokens=24, temperature=1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, with a chat template."""
    folder, tokenizer = tmp_path_factory.mktemp("talk") / "model", small(CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=400, eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    hf = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in hf.parameters():
            p.mul_(6)  # sharp: an adapter shows
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    """A stirred LoRA adapter of that model, as a stage leaves it."""
    source = hub.Source(str(model))
    hf = adapters.attach(load.model(source)[0], Adapter(r=4), seed=0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (p for p in hf.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=draw))
    adapters.save(hf, model.parent / "witty" / "adapter", source, stage=None, identity=hub.identity(source))
    return model.parent / "witty"


def sampled(model: Path, said: list[dict[str, str]], seed: int, step: int, folders: tuple[str, ...] = ()) -> str:
    source = hub.Source(str(model), None, folders)
    hf, tokenizer = adapters.open_model(source)[0], load.tokenizer(source)
    encoder = Encoder(tokenizer, Format(), end_ids=load.end_ids(adapters.adapted.inner(hf)))
    ids = encoder.prompts([Record({"messages": said}, "here")])
    ((done,),) = Sampler(hf, tokenizer, end_ids=encoder.end_ids).sample(ids, DRAWN, seed=seed, step=step)
    return str(tokenizer.decode(done.ids, skip_special_tokens=True))


def test_an_answer_is_the_samplers_and_comes_piece_by_piece(model: Path) -> None:
    talk = chat.Talk(hub.Source(str(model)), decoding=DRAWN, seed=5)
    said: list[dict[str, str]] = []
    for turn, text in enumerate(("Hello", "And then?")):
        pieces: list[str] = []
        answer = talk.answer(text, pieces.append)
        said.append({"role": "user", "content": text})
        assert answer == "".join(pieces) == sampled(model, said, 5, turn) and len(pieces) > 3
        said.append({"role": "assistant", "content": answer})
    assert talk.said == said
    first = talk.command("/reset") and talk.answer("Hello")
    assert first == said[1]["content"]


def test_adapters_come_and_go(model: Path, adapter: Path) -> None:
    talk = chat.opened(str(model), [adapter], decoding=DRAWN, seed=2)
    asked = [{"role": "user", "content": "Hello"}]
    plain, styled = sampled(model, asked, 2, 0), sampled(model, asked, 2, 0, (str(adapter / "adapter"),))
    assert plain != styled
    found = []
    for line in ("/adapter", "/adapter witty", "/adapter none"):
        told = talk.command(line)
        assert "there are: witty" in told
        talk.command("/reset")
        found.append(talk.answer("Hello"))
    assert found == [plain, styled, plain]
    with pytest.raises(ModelError, match="no adapter «wity»") as error:
        talk.command("/adapter wity")
    assert "witty" in error.value.do and talk.answer("Still there?")
    own = chat.opened(str(adapter), [], decoding=DRAWN, seed=2)  # an adapter's folder brings its base
    assert own.adapter == "witty" and own.answer("Hello") == styled


@pytest.fixture(scope="module")
def dry(model: Path) -> Path:
    """A second adapter of the same base, of another rank."""
    source = hub.Source(str(model))
    hf = adapters.attach(load.model(source)[0], Adapter(r=2, alpha=6), seed=0)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in (p for p in hf.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=draw) / 2)
    adapters.save(hf, model.parent / "dry" / "adapter", source, stage=None, identity=hub.identity(source))
    return model.parent / "dry"


def test_adapters_are_stacked(model: Path, adapter: Path, dry: Path) -> None:
    """Two LoRAs at once are the base with both updates added to its weights, one merged after the other by PEFT."""
    source = hub.Source(str(model))
    both = load.model(source)[0]
    for folder in (adapter, dry):
        both = PeftModel.from_pretrained(both, str(folder / "adapter")).merge_and_unload()
    talk = chat.opened(str(model), [adapter, dry], decoding=DRAWN, seed=2)
    told = talk.command("/adapter witty+dry")
    assert "adapter: witty+dry" in told
    ids = torch.tensor([talk.encoder.prompts([Record({"prompt": "Hello"}, "x")])[0]])
    with torch.no_grad():
        assert (talk.hf(ids).logits - both(ids).logits).abs().max() < 1e-3
    stacked = talk.answer("Hello")
    tokenizer = load.tokenizer(source)
    ((done,),) = Sampler(both, tokenizer, end_ids=load.end_ids(both)).sample([ids[0].tolist()], DRAWN, seed=2)
    assert stacked == tokenizer.decode(done.ids, skip_special_tokens=True)
    asked = [{"role": "user", "content": "Hello"}]
    for line, folders in (("/adapter dry", (str(dry / "adapter"),)), ("/adapter none", ())):
        talk.command(line)
        talk.command("/reset")
        assert talk.answer("Hello") == sampled(model, asked, 2, 0, folders), "the others are gone without a trace"
    with pytest.raises(ModelError, match="no adapter «wet»") as caught:
        talk.command("/adapter witty+wet")
    assert "there are: witty, dry" in caught.value.where
    with pytest.raises(ModelError, match="named twice"):
        talk.command("/adapter dry + dry")
    assert "adapter: witty+dry" in talk.command("/adapter witty + dry")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--temperature", "-1"), "--temperature"),
        (("--max-new-tokens", "0"), "--max-new-tokens"),
        (("--top-p", "2"), "--top-p"),
    ],
)
def test_settings_that_are_none(
    words: tuple[str, str], said: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(model), *words]) == 1
    shown = capsys.readouterr().err
    assert said in shown and "defect" not in shown


def test_what_is_no_adapter_is_told_at_once(model: Path) -> None:
    with pytest.raises(ModelError, match="holds no adapter"):
        chat.opened(str(model), [model])


def test_an_answer_that_is_cut_is_told(model: Path) -> None:
    talk = chat.opened(str(model), [], decoding=Decoding(max_new_tokens=3), seed=2)
    lines = iter(["Hello"])
    shown: list[str] = []

    def read() -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    chat.converse(talk, read, shown.append, lambda error: pytest.fail(str(error)))
    assert not talk.ended and "".join(shown).endswith("(cut: that is all that it may write)\n")


def test_the_base_is_read_once(
    model: Path, adapter: Path, dry: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    talk = chat.opened(str(model), [adapter, dry], decoding=DRAWN, seed=2)
    reads: list[str] = []
    open_base = adapters.open_base
    monkeypatch.setattr(adapters, "open_base", lambda source, **how: reads.append("read") or open_base(source, **how))
    for line in ("/adapter witty", "/adapter dry", "/adapter none", "/adapter witty+dry", "/adapter none"):
        talk.command(line)
    assert reads == []
    note = json.loads((adapter / "adapter/temper.json").read_text()) | {"quantize": "nf4"}
    rounded = tmp_path / "rounded"
    shutil.copytree(adapter / "adapter", rounded)
    (rounded / "temper.json").write_text(json.dumps(note))
    talk.adapters["rounded"] = (str(rounded),)
    talk.command("/adapter rounded")
    assert reads == ["read"], "of a base that was rounded otherwise the weights are others"
    with pytest.raises(ModelError, match="rounded in different ways"):
        talk.command("/adapter rounded+dry")
    assert talk.adapter == "rounded" and talk.answer("Still there?")


def test_control_c_ends_an_answer_and_not_the_talk(model: Path) -> None:
    """A real signal to the real command, in the middle of an answer."""
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", "from temper.cli import main; raise SystemExit(main())", "chat", str(model), "--temperature", "1", "--max-new-tokens", "300"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdin and child.stdout
    child.stdin.write(b"Hello\n")
    child.stdin.flush()
    assert child.stdout.read(12)  # it has begun to answer
    child.send_signal(signal.SIGINT)
    child.stdin.write(b"/temperature 0.5\n/quit\n")
    child.stdin.flush()
    out, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    text = out.decode(errors="replace")
    assert "temperature: 0.5" in text and "Traceback" not in errors.decode()


def test_an_adapter_of_another_base_is_refused_and_the_talk_goes_on(model: Path, adapter: Path, tmp_path: Path) -> None:
    other = LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        other.lm_head.weight.add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    load.tokenizer(hub.Source(str(model))).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="trained on another base"):  # before anybody has said a word
        chat.opened(str(tmp_path / "other"), [adapter], decoding=DRAWN)
    talk = chat.opened(str(tmp_path / "other"), [], decoding=DRAWN)
    talk.adapters["witty"] = (str(adapter / "adapter"),)
    before = talk.answer("Hello")
    with pytest.raises(ModelError, match="trained on another base"):
        talk.command("/adapter witty")
    talk.command("/reset")
    assert talk.adapter is None and talk.answer("Hello") == before


def test_system_and_temperature(model: Path) -> None:
    talk = chat.Talk(hub.Source(str(model)), decoding=DRAWN, seed=5)
    plain = talk.answer("Hello")
    talk.command("/reset")
    assert "Be brief." in talk.command("/system Be brief.")
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert talk.answer("Hello") == sampled(model, told, 5, 0) != plain
    assert talk.command("/temperature 0") == "temperature: 0"
    greedy = []
    for seed in (1, 2):
        talk.command("/reset")
        talk.seed = seed
        greedy.append(talk.answer("Hello"))
    assert greedy[0] == greedy[1]
    for line, said in (("/temperature warm", "is no temperature"), ("/temperature -1", "is no temperature"), ("/adaptor x", "no command /adaptor")):  # fmt: skip
        with pytest.raises(RecipeError, match=said):
            talk.command(line)


def test_a_conversation_that_does_not_fit_is_told(model: Path) -> None:
    talk = chat.Talk(hub.Source(str(model)), decoding=DRAWN)
    with pytest.raises(DataError, match="the model takes 400 with its answer") as error:
        talk.answer("word " * 500)
    assert "/reset" in error.value.do and talk.said == []


def test_an_answer_has_the_room_that_is_left(model: Path) -> None:
    """The usual 512 tokens are more than this model's context has: the answer is shorter, and comes."""
    talk = chat.Talk(hub.Source(str(model)), seed=5)
    (asked,) = talk.encoder.prompts([Record({"messages": [{"role": "user", "content": "Hello"}]}, "here")])
    assert talk._fitting(len(asked)).max_new_tokens == 400 - len(asked)
    assert talk.answer("Hello")


def test_the_command_reads_lines_and_goes_on_after_an_error(model: Path, adapter: Path) -> None:
    lines = "Hello\n/nonsense\n/adapter witty\n/reset\nHello\n/quit\nnever read\n"
    words = [
        "chat",
        str(model),
        "--adapter",
        str(adapter),
        "--seed",
        "2",
        "--temperature",
        "1",
        "--max-new-tokens",
        "24",
    ]
    ended = subprocess.run(
        [sys.executable, "-c", "from temper.cli import main; raise SystemExit(main())", *words],
        input=lines, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    asked = [{"role": "user", "content": "Hello"}]
    plain, styled = sampled(model, asked, 2, 0), sampled(model, asked, 2, 0, (str(adapter / "adapter"),))
    assert ended.returncode == 0, ended.stderr
    told = ended.stdout.replace("\n(cut: that is all that it may write)", "")
    assert told != ended.stdout and (
        told.startswith(plain + "\n")
        and "there is no command /nonsense" in ended.stderr
        and told.endswith(styled + "\n")
    )


def test_the_form_is_that_of_the_rows_it_was_trained_on(smoke_run: Path, model: Path, tmp_path: Path) -> None:
    assert chat.form_of(str(model)) == Format()
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "stage.json").write_text("{}")
    rows = {"stage": "data", "format": {"chat": "plain", "separator": " → "}}
    stages = {
        "rows": rows,
        "more": {"stage": "generate", "data": "rows"},
        "sft": {"stage": "sft", "data": "more.train"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps({"stages": stages}))
    for name in ("sft", "sft/model"):
        assert chat.form_of(str(tmp_path / name)) == Format(chat="plain", separator=" → ")
    talk = chat.opened(str(smoke_run / "sft"), [], form=chat.form_of(str(smoke_run / "sft")), decoding=DRAWN)
    assert talk.answer("Новина дня.") is not None


def test_bad_input(tmp_path: Path, model: Path, adapter: Path) -> None:
    with pytest.raises(ModelError, match="there is no adapter"):
        chat.opened(str(model), [tmp_path / "nowhere"])
    with pytest.raises(ModelError, match="two adapters are called «witty»"):
        chat.opened(str(model), [adapter, adapter / "adapter"])
