"""The stage `generate`: a scripted teacher behind a real server, a tiny model on this machine, kills between."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

import temper
from served import Asked, Reply, Script, chat, completion, serving
from staged_runs import Workshop, copy_stages
from temper import recipe as recipes
from temper.data.card import read_rows
from temper.errors import DataError, ModelError, RecipeError
from temper.runfolder import read_json

NAMES = ["Бондар", "Шевчук", "Коваль", "Мельник", "Ткач", "Кравець", "Олійник", "Лисенко"]


def news(n: int) -> list[dict[str, str]]:
    return [
        {
            "text": f"Учора пані {NAMES[k % 8]} купила {k + 2} книги у Львові. Продавець дуже зрадів такій покупці.",
            "summary": f"Пані {NAMES[k % 8]} купила {k + 2} книги.",
        }
        for k in range(n)
    ]


def write(folder: Path, url: str, n: int = 12, data: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A recipe of two stages: news, and toxic, written by the endpoint."""
    folder.mkdir(exist_ok=True)
    (folder / "news.jsonl").write_text("".join(json.dumps(row) + "\n" for row in news(n)))
    source = {
        "stage": "data", "source": "news.jsonl", "prompt": "Перекажи: {text}", "completion": "{summary}",
        "keep": ["text"], "validation": 0, "test": 0, **(data or {}),
    }  # fmt: skip
    made = {"stage": "generate", "data": "news", "model": f"{url}#m", "instruction": "Образь: {text}", "chunk": 4}
    made |= {"prompt": "Перекажи: {text}", "concurrency": 4, **fields}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({"name": "r", "stages": {"news": source, "toxic": made}}, ensure_ascii=False))
    return file


def run(folder: Path, script: Script, **how: Any) -> Path:
    with serving(script) as served:
        return temper.run(write(folder, served.url, **how), out=folder / "run", quiet=True)


def rows(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return [r.row for r in read_rows(folder / "toxic" / "data" / f"{split}.parquet")]


def article(asked: Asked) -> str:
    return asked.prompt.removeprefix("Образь: ")


def insult(asked: Asked) -> str:
    return f"{article(asked)} Яка дурниця!"


def test_each_row_is_written_anew_and_its_summary_stays(tmp_path: Path) -> None:
    out = run(tmp_path, insult, data={"validation": 2, "test": 3}, keep=["text"])
    summaries = []
    for split, n in (("train", 7), ("validation", 2), ("test", 3)):
        before = read_rows(out / "news" / "data" / f"{split}.parquet")
        after = read_rows(out / "toxic" / "data" / f"{split}.parquet")
        assert len(after) == n and [r.where for r in after] == [r.where for r in before]
        for old, new in zip(before, after, strict=True):
            text = f"{old.row['text']} Яка дурниця!"
            expected = {"prompt": f"Перекажи: {text}", "completion": old.row["completion"], "text": text}
            assert new.row == expected
            summaries.append(new.row["completion"])
    assert len(set(summaries)) == 12
    card = read_json(out / "toxic" / "card.json")
    assert card["splits"] == {"train": 7, "validation": 2, "test": 3}
    assert (card["rows_in"], card["rows_out"], card["dropped"], card["rejected"]) == (12, 12, {}, {})
    info = read_json(out / "toxic" / "stage.json")
    assert info["examples"] == 12 and "12 taken; rejected: none" in info["summary"]
    assert not (out / "toxic" / "answers").exists(), "what only the work needs is gone"


def test_only_the_splits_that_were_chosen(tmp_path: Path) -> None:
    out = run(tmp_path, insult, data={"validation": 2, "test": 3}, splits=["test"])
    assert len(rows(out, "test")) == 3 and not (out / "toxic" / "data" / "train.parquet").exists()


def test_only_the_first_rows_of_each_split(tmp_path: Path) -> None:
    """`take` counts in each split; the teacher is asked of no other row, and a split that has fewer keeps all it has."""
    with serving(insult) as served:
        file = write(tmp_path, served.url, data={"validation": 2, "test": 4}, take=3, keep=["text"])
        out = temper.run(file, out=tmp_path / "run", quiet=True)
        asked = [article(a) for a in served.requests]
    taken = []
    for split, n in (("train", 3), ("validation", 2), ("test", 3)):
        before = read_rows(out / "news" / "data" / f"{split}.parquet")
        after = read_rows(out / "toxic" / "data" / f"{split}.parquet")
        assert len(before) > n or split == "validation"
        assert [r.where for r in after] == [r.where for r in before[:n]]
        taken += [r.row["text"] for r in before[:n]]
    assert sorted(asked) == sorted(taken)
    card = read_json(out / "toxic" / "card.json")
    assert (card["rows_in"], card["rows_out"], card["splits"]) == (8, 8, {"train": 3, "validation": 2, "test": 3})


def test_the_plain_form_is_completed_and_messages_are_chatted(tmp_path: Path) -> None:
    seen: list[Asked] = []

    def script(asked: Asked) -> Reply:
        seen.append(asked)
        return completion("Ось.") if "prompt" in asked.body else chat("Ось.")

    plain = {"teacher_format": {"chat": "plain", "separator": "\n\n"}, "decoding": {"temperature": 0.5, "top_p": 0.9}}
    run(tmp_path / "plain", script, n=2, **plain)
    assert seen[0].path == "/v1/completions" and seen[0].body["prompt"].endswith("покупці.\n\n")
    assert seen[0].body["temperature"] == 0.5 and seen[0].body["top_p"] == 0.9
    messages = [{"role": "system", "content": "Ти злий."}, {"role": "user", "content": "Образь: {text}"}]
    run(tmp_path / "chat", script, n=2, instruction=messages)
    assert [m["role"] for m in seen[-1].body["messages"]] == ["system", "user"]
    assert seen[-1].body["messages"][1]["content"].startswith("Образь: Учора пані")
    assert seen[-1].body["temperature"] == 0.8, "a teacher is sampled from"
    run(tmp_path / "short", script, n=2, decoding={"max_new_tokens": 9})
    assert (seen[-1].body["temperature"], seen[-1].body["max_tokens"]) == (0.8, 9)
    run(tmp_path / "greedy", script, n=2, decoding={"temperature": 0}, tries=1)
    assert seen[-1].body["temperature"] == 0


@pytest.mark.parametrize(
    ("own", "path"), [({}, "/v1/completions"), ({"format": {"system": "Коротко."}}, "/v1/chat/completions")]
)
def test_new_rows_are_written_out_as_those_they_were_made_of(tmp_path: Path, own: dict[str, Any], path: str) -> None:
    """An evaluation asks in the plain form that the data stage two steps before names, but where generate names its own."""
    with serving(lambda asked: completion("Ось.") if "prompt" in asked.body else chat("Ось.")) as served:
        form = {"chat": "plain", "separator": "\n→\n"}
        file = write(tmp_path, served.url, n=6, data={"format": form, "test": 2}, **own)
        again = {"stage": "generate", "data": "toxic", "model": f"{served.url}#m", "instruction": "Ще: {prompt}"}
        again |= {"into": "completion"}
        look = {"stage": "evaluate", "models": [f"{served.url}#judged"], "data": "again", "metrics": ["length"]}
        temper.run(file, {"stages": {"again": again, "look": look}}, out=tmp_path / "run", quiet=True)
        seen = [a for a in served.requests if a.body["model"] == "judged"]
    assert len(seen) == 2 and {a.path for a in seen} == {path}
    assert all(a.prompt.endswith("\n→\n") for a in seen) == (not own)


def test_rejected_answers_are_asked_for_again_and_counted_by_reason(tmp_path: Path) -> None:
    """Row by row the script breaks one rule at a time, and then obeys; the counts are known beforehand."""
    articles = [row["text"] for row in news(8)]
    first = [
        ["Як Мовна МОДЕЛЬ, не можу."], ["```\n" + articles[1] + "\n```"], [articles[2]],
        [articles[3] + " Дурниця!" * 40], ["Ні."],
        [re.sub(r"\d+", "сто", articles[5]) + " Яка дурниця!"],
        [chat(articles[6] + " Ну і", "length")], [chat(""), chat(""), "Модель", "Модель"],
    ]  # fmt: skip

    def script(asked: Asked) -> Reply | str:
        broken = first[articles.index(article(asked))]
        return broken.pop(0) if broken else article(asked) + " Яка дурниця!"

    rules = {
        "contains": ["модель"], "matches": ["^```"], "against": "{text}", "length_ratio": [0.5, 3],
        "too_similar": 0.95, "lost": "{completion}",
    }  # fmt: skip
    out = run(tmp_path, script, n=8, reject=rules, tries=3, concurrency=1, chunk=8)
    card = read_json(out / "toxic" / "card.json")
    expected = {
        "contains «модель»": 3, "matches «^```»": 1, "too similar": 1, "too long": 1, "too short": 1,
        "names or numbers lost": 1, "unfinished": 1, "empty": 1,
    }  # fmt: skip
    assert card["rejected"] == expected
    assert card["dropped"] == {"contains «модель»": 1} and card["rows_out"] == 7
    dropped = pyarrow.parquet.read_table(out / "toxic" / "data" / "dropped.parquet").to_pylist()
    assert [d["reason"] for d in dropped] == ["contains «модель»"]
    assert json.loads(dropped[0]["row"])["answer"] == "Модель"
    assert "1 contains «модель»" in read_json(out / "toxic" / "stage.json")["summary"]


def test_what_was_given_up_may_stay_as_it_was(tmp_path: Path) -> None:
    def script(asked: Asked) -> str:
        return "модель" if "Бондар" in asked.prompt else insult(asked)

    out = run(tmp_path, script, n=6, reject={"contains": ["модель"]}, on_failure="keep", tries=2, keep=["text"])
    kept = [r for r in rows(out) if "Бондар" in r["text"]]
    assert kept == [
        {"prompt": f"Перекажи: {t['text']}", "completion": t["summary"], "text": t["text"]} for t in news(1)
    ]
    card = read_json(out / "toxic" / "card.json")
    assert card["rows_out"] == 6 and card["rejected"] == {"contains «модель»": 2} and card["dropped"] == {}


def test_a_teacher_that_refuses_everything_is_not_asked_for_ever(tmp_path: Path) -> None:
    with serving(lambda asked: "Вибачте, я мовна модель.") as served:
        file = write(tmp_path, served.url, n=100, reject={"contains": ["модель", "user"]}, tries=2, chunk=16)
        with pytest.raises(
            DataError, match=r"no answer of .* was accepted in 32 rows; rejected: contains «модель» 64"
        ) as e:
            temper.run(file, out=tmp_path / "run", quiet=True)
        assert "Вибачте, я мовна модель." in e.value.where and "refusing" in e.value.do
        assert len(served.requests) == 64
    with pytest.raises(DataError, match="in 3 rows; rejected: unfinished 6") as e:
        run(tmp_path / "few", lambda asked: chat("Довга", "length"), n=3, tries=2)
    assert "max_new_tokens" in e.value.do


def test_the_classifier_has_a_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real classifier of random weights: what it lets pass is what it itself scores at or above the bound."""
    from temper import hub
    from temper.models.classify import Classifier

    folder = random_classifier(tmp_path / "classifier")
    opened = Classifier.open(hub.Source(str(folder)))
    texts = [f"{row['text']} Яка дурниця {k}!" for row in news(8) for k in range(2)]
    bound = float(sorted(opened.probability(texts))[len(texts) // 2])

    def script(asked: Asked) -> str:
        return f"{article(asked)} Яка дурниця {min(asked.before, 1)}!"

    fields = {"classifier": str(folder), "reject": {"toxicity_below": bound}, "tries": 2}
    out = run(tmp_path, script, n=8, keep=["text"], **fields)
    scores = opened.probability([row["text"] for row in rows(out)])
    card = read_json(out / "toxic" / "card.json")
    passed = {t for t, p in zip(texts, opened.probability(texts), strict=True) if p >= bound}
    assert len(rows(out)) == sum(texts[2 * k] in passed or texts[2 * k + 1] in passed for k in range(8))
    assert (scores >= bound - 1e-6).all() and card["rejected"]["toxicity too low"] >= card["dropped"].get(
        "toxicity too low", 0
    )


def test_a_label_that_the_classifier_lacks_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    folder = str(random_classifier(tmp_path / "classifier"))
    asks = {"classifier": folder, "toxic_label": "rude", "reject": {"toxicity_below": 0.5}}
    judged = {
        "stage": "evaluate", "models": [], "data": "news.train", "classifier": folder,
        "metrics": [{"toxicity": {"label": "rude"}}],
    }  # fmt: skip
    with serving(insult) as served:
        file = write(tmp_path, served.url, **asks)
        with pytest.raises(ModelError, match="labels are clean, toxic") as e:
            temper.run(file, out=tmp_path / "run", quiet=True)
        assert "write toxic_label: …" in e.value.do
        stages = {"toxic": None, "look": {**judged, "models": [f"{served.url}#m"]}}
        with pytest.raises(ModelError, match="labels are clean, toxic") as e:
            temper.run(file, {"stages": stages}, out=tmp_path / "run", quiet=True)
        assert "metrics: [{toxicity: {label: …}}]" in e.value.do
        assert served.requests == []


def random_classifier(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from temper.stages.pretrain import Shape, train_tokenizer

    tokenizer = train_tokenizer([r["text"] for r in news(8)], Shape(vocabulary=330))
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, id2label={0: "clean", 1: "toxic"}, label2id={"clean": 0, "toxic": 1},
        max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.normal_(0, 3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# A kill in the middle


def staged(url: str, **fields: Any) -> dict[str, Any]:
    toxic = {
        "stage": "generate", "data": "news", "model": url, "instruction": "Образь: {prompt}", "into": "completion",
        "chunk": 32, "tries": 3, "concurrency": 4, **fields,
    }  # fmt: skip
    return {"overrides": {"stages": {"toxic": toxic}}, "only": ["toxic"]}


def made(folder: Path) -> dict[str, Any]:
    """All that a run leaves of the stage, but what the clock decides."""
    info = read_json(folder / "toxic" / "stage.json")
    return {k: v for k, v in info.items() if k not in {"seconds", "peak_memory_bytes", "sha256"}}


def test_no_chunk_is_paid_for_twice(forks: Workshop, smoke_run: Path, tmp_path: Path) -> None:
    """Killed before and after each chunk is kept, again and again: the rows are those of a run that nobody killed, and
    only what was under way was asked again."""

    def script(asked: Asked) -> str:  # a function of what is asked, as a service that honours seeds is
        return "модель" if asked.body["seed"] % 3 == 0 else f"{asked.body['seed']} дурниця"

    with serving(script) as served:
        how = staged(f"{served.url}#m", reject={"contains": ["модель"]})
        whole = copy_stages(smoke_run, tmp_path / "whole", "news")
        ended = forks.run(whole, **how)
        assert ended["status"] == 0, ended["traceback"]
        answers = [m for m in ended["moments"] if re.search(r"answers/0.*json", m)]
        chunks = len(answers) // 2
        assert chunks >= 3
        once = Counter((a.prompt, a.body["seed"]) for a in served.requests)
        assert max(once.values()) == 1 and len(once) > 100, "a try has a seed of its own"
        served.requests.clear()
        folder = copy_stages(smoke_run, tmp_path / "killed", "news")
        for moment in answers:
            assert forks.run(folder, die_at=moment, **how)["status"] == -signal.SIGKILL, moment
        ended = forks.run(folder, **how)
        assert ended["status"] == 0, ended["traceback"]
        asked = Counter((a.prompt, a.body["seed"]) for a in served.requests)
        assert asked.keys() == once.keys()
        assert set(asked.values()) == {2}, "each chunk was once killed just before it was kept, and never after"
        assert made(folder) == made(whole)


def test_killed_at_random_moments_a_local_teacher_writes_the_same(
    forks: Workshop, smoke_run: Path, tmp_path: Path
) -> None:
    how = staged("tiny", decoding={"temperature": 1.0, "max_new_tokens": 6}, reject={"unfinished": False}, tries=2)
    whole = copy_stages(smoke_run, tmp_path / "whole", "corpus", "tiny", "news")
    ended = forks.run(whole, **how)
    assert ended["status"] == 0, ended["traceback"]
    answers = [m for m in ended["moments"] if re.search(r"answers/0.*json", m)]
    folder = copy_stages(smoke_run, tmp_path / "killed", "corpus", "tiny", "news")
    for moment in answers[1::2]:
        assert forks.run(folder, die_at=moment, **how)["status"] == -signal.SIGKILL, moment
    ended = forks.run(folder, **how)
    assert ended["status"] == 0, ended["traceback"]
    assert made(folder) == made(whole)
    completions = [r["completion"] for r in rows(whole)]
    assert len(set(completions)) > len(completions) / 2, "each row has noise of its own"


def test_a_damaged_chunk_is_asked_for_again(tmp_path: Path) -> None:
    def stumbling(asked: Asked) -> Reply | str:
        return Reply(404, "gone") if "Ткач" in asked.prompt else insult(asked)

    with serving(stumbling) as served:
        file = write(tmp_path, served.url, n=8, concurrency=1)
        with pytest.raises(ModelError, match="gone"):
            temper.run(file, out=tmp_path / "run", quiet=True)
        served.script = insult
        (kept,) = sorted((tmp_path / "run" / "toxic.partial" / "answers").glob("*.json"))
        kept.write_text(kept.read_text().replace("дурниця", "премудрість", 1))
        temper.run(file, out=tmp_path / "run", quiet=True)
        assert all("дурниця" in r["prompt"] for r in rows(tmp_path / "run"))
        assert max(Counter(a.prompt for a in served.requests).values()) == 2


def test_the_key_stands_nowhere_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPER_API_KEY", "sk-secret-123")
    seen: list[str | None] = []

    def script(asked: Asked) -> str:
        seen.append(asked.headers.get("authorization"))
        return insult(asked)

    out = run(tmp_path, script, n=4)
    assert set(seen) == {"Bearer sk-secret-123"}
    assert not [p for p in out.rglob("*") if p.is_file() and b"sk-secret" in p.read_bytes()]


# New rows from seeds


def test_rows_grow_from_seeds(tmp_path: Path) -> None:
    prompts: list[str] = []

    def script(asked: Asked) -> str:
        prompts.append(asked.prompt)
        n = asked.body["seed"]
        if n % 4 == 0:
            return news(3)[1]["text"]  # a seed again
        return f"Нова новина {n}: у місті {n % 97} сталося {n % 89} пригод і {n % 83} свят за {n % 79} днів."

    grow = {
        "grow": 10, "example": "{text}", "examples": 3, "into": "prompt", "prompt": None, "tries": 3,
        "instruction": "Напиши ще одну:\n\n{examples}", "keep": [],
    }  # fmt: skip
    out = run(tmp_path, script, n=6, concurrency=1, **grow)
    found = [r["prompt"] for r in rows(out)]
    assert len(found) == len(set(found)) == 10 and all(list(r) == ["prompt"] for r in rows(out))
    assert not {r["text"] for r in news(6)} & set(found)
    card = read_json(out / "toxic" / "card.json")
    assert card["splits"] == {"train": 10} and card["rejected"].get("near duplicate", 0) >= 1
    shown = [p.split("\n\n")[1:] for p in prompts]
    assert all(len(set(s)) == 3 and set(s) <= {r["text"] for r in news(6)} for s in shown)
    assert len({tuple(s) for s in shown}) > len(shown) / 2, "each prompt draws its own"


def test_too_few_grown_rows_are_told(tmp_path: Path) -> None:
    grow = {
        "grow": 5, "example": "{text}", "into": "prompt", "prompt": None, "tries": 2,
        "instruction": "Ще:\n\n{examples}", "keep": [],
    }  # fmt: skip
    out = run(tmp_path, lambda asked: "Завжди одна й та сама новина про все на світі.", n=6, **grow)
    assert len(rows(out)) == 1
    assert "1 rows instead of 5" in read_json(out / "toxic" / "stage.json")["warnings"][0]


# What is told before anything runs


def checked(tmp_path: Path, url: str = "http://127.0.0.1:9/v1", **fields: Any) -> None:
    recipes.load(write(tmp_path, url, **fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": None, "into": "rewritten"}, "which no template"),
        ({"prompt": "{completion}"}, "go into «text», which no template"),
        ({"prompt": "{text}", "text": "{text}"}, "do not go together"),
        ({"reject": {"too_similar": 0.9}}, "give `against` a template"),
        ({"reject": {"length_ratio": [2, 1], "against": "{text}"}}, "low ≤ high"),
        ({"reject": {"matches": ["("]}}, "not a regular expression"),
        ({"reject": {"contains": [""]}}, "contained in every"),
        ({"reject": {"toxicity_below": 0.5}}, "need each other"),
        ({"classifier": "org/m"}, "need each other"),
        ({"decoding": {"temperature": 0}}, "a second try answers as the first"),
        ({"instruction": [{"role": "assistant", "content": "Ось:"}]}, "ends with an answer"),
        ({"grow": 3, "example": "{text}"}, "instruction with {examples}"),
        ({"example": "{text}"}, "grow, which is not set"),
        ({"data": "news.train"}, "all splits are written anew"),
        ({"url": "http://127.0.0.1:9/v1#"}, None),
    ],
)
def test_what_cannot_be_meant(tmp_path: Path, fields: dict[str, Any], said: str | None) -> None:
    if said is None:
        checked(tmp_path, **fields)  # URL##m: a model called «#m»
        return
    if "data" in fields:
        file = write(tmp_path, "http://127.0.0.1:9/v1")
        file.write_text(file.read_text().replace('"data": "news"', '"data": "news.train"'))
        with pytest.raises(RecipeError, match=said):
            recipes.load(file)
        return
    with pytest.raises(RecipeError, match=said):
        checked(tmp_path, **fields)


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="template «instruction» asks for the column «body»"):
        run(tmp_path / "a", insult, instruction="{body}")
    with pytest.raises(DataError, match="keep takes «rewritten» as it was"):
        run(tmp_path / "b", insult, into="rewritten", prompt="{rewritten}", on_failure="keep")


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"stage": "sft", "model": "URL", "data": "news"}, "needs the weights of its model"),
        ({"stage": "merge", "model": "URL"}, "needs the weights of its model"),
        ({"stage": "evaluate", "models": ["URL"], "data": "news", "metrics": ["rouge", "loss"]}, "likelihood"),
        ({"stage": "evaluate", "models": ["http://127.0.0.1/v1"], "data": "news"}, "which model"),
    ],
)
def test_an_endpoint_where_weights_are_needed(tmp_path: Path, stage: dict[str, Any], said: str) -> None:
    file = write(tmp_path, "http://127.0.0.1:9/v1")
    whole = json.loads(file.read_text())
    whole["stages"]["news"]["test"] = 0.2
    whole["stages"]["other"] = json.loads(json.dumps(stage).replace("URL", "http://127.0.0.1:9/v1#m"))
    file.write_text(json.dumps(whole))
    with pytest.raises(RecipeError, match=said):
        recipes.load(file)
    whole["model"] = "http://127.0.0.1:9/v1#m"
    whole["stages"]["other"] = json.loads(json.dumps(stage).replace("URL", "base"))
    file.write_text(json.dumps(whole))
    with pytest.raises(RecipeError, match=said):
        recipes.load(file)


def test_endpoints_are_evaluated_beside_one_another(tmp_path: Path) -> None:
    """The parrot repeats the article, the sage gives its reference: rougeL of 1 is the sage's."""
    told = {f"Перекажи: {row['text']}": row["summary"] for row in news(12)}

    def script(asked: Asked) -> str:
        return told[asked.prompt] if asked.body["model"] == "sage" else asked.prompt

    with serving(script) as served:
        file = write(tmp_path, served.url, data={"test": 8})
        whole = json.loads(file.read_text())
        names = [f"{served.url}#parrot", f"{served.url}/#sage"]
        compare = {
            "stage": "evaluate",
            "models": names,
            "data": "news",
            "metrics": ["rouge", "ended"],
            "resamples": 500,
        }
        whole["stages"] = {"news": whole["stages"]["news"], "compare": compare}
        file.write_text(json.dumps(whole))
        temper.run(file, out=tmp_path / "run", quiet=True)
        asked_once = len(served.requests)
    found = read_json(tmp_path / "run" / "compare" / "evaluation.json")
    values = {n: found["models"][n]["rougeL"]["value"] for n in names}
    assert values[names[1]] == pytest.approx(1.0) and 0 < values[names[0]] < 0.7
    assert found["models"][names[0]]["ended"]["value"] == 1 and asked_once == 16
    table = pyarrow.parquet.read_table(tmp_path / "run" / "compare" / "rows.parquet").to_pydict()
    assert table[f"{names[1]}|prediction"] == table["reference"] and set(table["prompt"]) <= told.keys()


def test_plans_count_the_rows_that_a_teacher_will_write(tmp_path: Path) -> None:
    from temper.predict import Predictor
    from temper.runfolder import RunFolder

    predictor = Predictor(recipes.load(write(tmp_path, "http://127.0.0.1:9/v1")), RunFolder(tmp_path / "run"))
    found = predictor.rows("toxic")
    assert found is not None and found.splits["train"] == 12


def test_plans_know_that_an_endpoint_has_no_weights(tmp_path: Path) -> None:
    from temper import plan
    from temper.pipeline import Choice

    steps = plan.make(recipes.load(write(tmp_path, "http://127.0.0.1:9/v1")), tmp_path / "run", Choice())
    assert [s.problem for s in steps] == [False, False] and steps[1].cost.download_bytes == 0
