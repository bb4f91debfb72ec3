"""Recipes: merging, lines in errors, what --set takes, and that everything shipped loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import temper.stages  # noqa: F401  fills the registry
from temper import fields, recipe
from temper.errors import RecipeError

HERE = Path(__file__).parents[1]
SHIPPED = sorted((HERE / "src").rglob("recipes/*.yaml"))
PROFILES = [(path, profile) for path in SHIPPED for profile in [None, *recipe.read(path).get("profiles", {})]]

SMALL = """\
name: small
model: org/model
stages:
  rows:
    stage: data
    source: mini:uk-news
    prompt: "{text}"
    completion: "{summary}"
    drop: {contains: [a, b], longer_than: 100}
  tuned:
    stage: sft
    data: rows
    lr: 1e-4
    adapter: {r: 8, alpha: 16}
profiles:
  other:
    model: first
    stages:
      rows: {drop: {contains: [c], longer_than: null}}
      tuned: {adapter: {r: 4}, epochs: 2}
      zeroth: {stage: data, source: "mini:uk-corpus", text: "{text}"}
      first: {stage: pretrain, data: zeroth}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def error_of(path: Path, **how: object) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        recipe.load(path, **how)  # type: ignore[arg-type]
    return caught.value


def changed(path: Path, old: str, new: str) -> Path:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


@pytest.mark.parametrize(("path", "profile"), PROFILES, ids=lambda p: getattr(p, "stem", p))
def test_every_shipped_recipe_loads_with_every_profile(path: Path, profile: str | None) -> None:
    loaded = recipe.load(path, profile=profile)
    assert loaded.name == path.stem
    assert recipe.order(loaded)
    assert recipe.load(path, profile=profile).dump() == loaded.dump()


def test_there_is_a_recipe_and_each_is_found_by_its_name() -> None:
    assert SHIPPED
    assert {path.stem: path for path in SHIPPED} == recipe.shipped()


def test_a_profile_replaces_lists_deletes_by_null_and_adds_stages_in_its_order(small: Path) -> None:
    loaded = recipe.load(small, profile="other")
    rows, tuned = loaded.raw["stages"]["rows"], loaded.raw["stages"]["tuned"]
    assert rows["drop"] == {"contains": ["c"]}
    assert tuned["adapter"] == {"r": 4, "alpha": 16}  # deep: what the profile leaves out stays
    assert (tuned["lr"], tuned["epochs"]) == (1e-4, 2)
    assert list(loaded.stages) == ["rows", "tuned", "zeroth", "first"]
    assert recipe.order(loaded).index("first") < recipe.order(loaded).index("tuned")  # it stands for base now
    plain = recipe.load(small)
    assert list(plain.stages) == ["rows", "tuned"] and plain.raw["stages"]["rows"]["drop"]["longer_than"] == 100


def test_overlays_come_after_the_profile_and_sets_after_overlays(small: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("stages: {tuned: {epochs: 3, batch_size: 5}}\n", encoding="utf-8")
    loaded = recipe.load(small, profile="other", overlays=[overlay], sets=["tuned.batch_size=7"])
    tuned = loaded.raw["stages"]["tuned"]
    assert (tuned["epochs"], tuned["batch_size"]) == (3, 7)


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("2.5e3", 2500.0), ("4", 4), ("0.5", 0.5), (".5", 0.5), ("1e5", 1e5)],
)
def test_numbers_are_those_of_yaml_1_2(small: Path, written: str, value: float) -> None:
    loaded = recipe.load(changed(small, "lr: 1e-4", f"lr: {written}"))
    assert loaded.stages["tuned"].lr == value  # type: ignore[attr-defined]
    assert not isinstance(loaded.raw["stages"]["tuned"]["lr"], str)


def test_yes_and_no_are_text_as_in_yaml_1_2(small: Path) -> None:
    wrong = error_of(changed(small, "lr: 1e-4", "epochs: no"))
    assert "tuned.epochs" in wrong.what and "'no'" in wrong.what


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("tuned.lr=3e-5", 3e-5),
        ("stages.tuned.lr=3e-5", 3e-5),
        ("tuned.merge=true", True),
        ("tuned.adapter={r: 2}", {"r": 2, "alpha": 16}),  # merged like everything else
        ("tuned.adapter.targets=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("tuned.max_steps=12", 12),
        ("rows.prompt=a=b", "a=b"),
    ],
)
def test_set_takes_typed_values(small: Path, text: str, value: object) -> None:
    raw = recipe.load(small, sets=[text]).raw["stages"]
    for key in text.partition("=")[0].removeprefix("stages.").split("."):
        raw = raw[key]
    assert raw == value and type(raw) is type(value)


def test_set_of_null_deletes_a_key(small: Path) -> None:
    assert recipe.load(small, sets=["tuned.adapter=null"]).stages["tuned"].adapter is None  # type: ignore[attr-defined]


def test_set_reaches_the_top_level(small: Path) -> None:
    assert recipe.load(small, sets=["seed=3", "model=a/b"]).seed == 3


@pytest.mark.parametrize(
    ("old", "new", "line", "what", "do"),
    [
        ("lr: 1e-4", "leraning: 1", 13, "«tuned.leraning»", ""),
        ("lr: 1e-4", "batch_sise: 1", 13, "«tuned.batch_sise»", "batch_size"),
        ("adapter: {r: 8, alpha: 16}", "adapter: {r: 8, alfa: 16}", 14, "«tuned.adapter.alfa»", "alpha"),
        ("    drop: {", "    dorp: {", 9, "«rows.dorp»", "drop"),
        ("contains: [a, b], longer_than", "contains: [a, b], longer_then", 9, "longer_then", "longer_than"),
        ("model: org/model", "modle: org/model", 2, "«modle»", "model"),
        ("stage: sft", "stage: stf", 11, "«stf»", "sft"),
        (
            "    drop: {",
            "    too_long: cut\n    drop: {",
            9,
            "«rows.too_long»",
            "is a key of stages of kind preference, sft",
        ),
        ("lr: 1e-4", "models: [base]", 13, "«tuned.models»", "of kind evaluate, merge; here did you mean «model»?"),
        ("    data: rows\n", "    data: row\n", 12, "«row»", "rows"),
        ("lr: 1e-4", "lr: quick", 13, "tuned.lr = 'quick' does not fit", "it takes: number, > 0;"),
        ("lr: 1e-4", "lr: -1", 13, "tuned.lr = -1 does not fit", "it takes: number, > 0; see `temper explain lr`"),
        ("adapter: {r: 8, alpha: 16}", "adapter: lora", 14, "tuned.adapter = 'lora'", "or null of method, r, alpha"),
        ("adapter: {r: 8, alpha: 16}", "adapter: {r: x}", 14, "tuned.adapter.r = 'x'", "explain adapter.r`"),
        ("contains: [a, b]", "contains: [a, 3]", 9, "['a', 3] does not fit (its entry 2)", "list of text"),
        ("contains: [a, b]", "matches: ['(']", 9, "is not a regular expression", "explain drop.matches"),
        ("    data: rows\n", "    data: rows.trian\n", 12, "no split «trian»", "did you mean «rows.train»?"),
        ("lr: 1e-4", "model: rows", 13, "stage «rows» gives no model", "it is of kind data; stages that do: tuned"),
    ],
)
def test_what_is_wrong_is_told_with_its_line_and_the_nearest_name(
    small: Path, old: str, new: str, line: int, what: str, do: str
) -> None:
    error = error_of(changed(small, old, new))
    assert what in error.what
    assert error.where == f"{small}:{line}"
    assert do in error.do


def test_a_wrong_key_in_a_profile_an_overlay_and_a_set_is_placed(small: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("stages:\n  tuned:\n    warmpu: 1\n", encoding="utf-8")
    error = error_of(small, overlays=[overlay])
    assert error.where == f"{overlay}:3" and "warmup" in error.do
    error = error_of(small, sets=["tuned.warmpu=1"])
    assert error.where == "--set tuned.warmpu=1" and "warmup" in error.do
    assert "tuned" in error_of(small, sets=["tunde.lr=1"]).do
    assert "a.b=c" in error_of(small, sets=["tuned.lr"]).what
    wrong = changed(small, "tuned: {adapter: {r: 4}, epochs: 2}", "tuned: {epoch: 2}")
    error = error_of(wrong, profile="other")
    assert error.where == f"{small}:20" and "epochs" in error.do
    assert "other" in error_of(small, profile="othre").do


def test_merge_keys(small: Path) -> None:
    """YAML's «<<: *name»; an error in what it brings is told at the mapping that takes it."""
    changed(
        small,
        "  tuned:\n",
        "  first_go: &same\n    stage: sft\n    data: rows\n    epochs: 2\n  tuned:\n    <<: *same\n",
    )
    again: Any = recipe.load(small).stages["tuned"]
    assert (again.epochs, again.lr, again.data) == (2, 1e-4, "rows")
    error = error_of(changed(small, "epochs: 2\n  tuned", "epoch: 2\n  tuned"))
    assert "epochs" in error.do and error.where == f"{small}:13"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("name: x\nstages: [\n", "YAML"),
        ("name: x\nname: y\nstages: {}\n", "YAML"),  # a key twice
        ("- a\n- b\n", "mapping"),
        ("name: x\n", "«stages» is missing"),
        ("name: x\nstages: {a: {source: b}}\n", "no «stage:» key"),
        ("name: x\nstages: {base: {stage: data, source: b}}\n", "cannot be the name"),
        ("name: x\nstages: {a: {stage: data, source: 2026-01-01}}\n", "date"),
        ("name: x\nstages: {a: 3}\n", "stages.a = 3 does not fit"),
        ("name: x\nstages: {a: {stage: data, source: b}}\nprofiles: 3\n", "profiles are mappings"),
        ("name: x\nstages: {a: {stage: data, source: b}}\nprofiles: {mini: 3}\n", "profiles are mappings"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    error = error_of(path)
    assert what in str(error) and "wrong.yaml" in error.where


def test_a_recipe_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: é\n".encode("latin-1"))
    assert "UTF-8" in error_of(path).what


def test_stages_that_read_one_another_in_a_circle(tmp_path: Path) -> None:
    path = tmp_path / "circle.yaml"
    path.write_text(
        "name: x\nstages:\n  rows: {stage: data, source: mini:uk-news, tokenizer: one}\n"
        "  one: {stage: sft, model: two, data: rows}\n  two: {stage: merge, model: one}\n",
        encoding="utf-8",
    )
    error = error_of(path)
    assert "circle" in error.what
    names = error.what.rsplit(": ", 1)[1].split(" → ")
    assert names[0] == names[-1] and set(names) <= {"rows", "one", "two"}


def test_base_needs_a_model(small: Path) -> None:
    error = error_of(changed(small, "model: org/model\n", ""))
    assert "no «model»" in error.what and "--set model=" in error.do
    own = "profiles:\n  other:"
    assert own in small.read_text(encoding="utf-8")
    assert error_of(small, profile="othre").where == str(small)


def test_a_misspelt_folder_is_no_hub_id(small: Path) -> None:
    (small.parent / "my-model").mkdir()
    error = error_of(small, sets=["model=my-modle"])
    assert error.what == "there is no model «my-modle»" and "the folder my-model?" in error.do
    assert recipe.load(small, sets=["model=gpt2"]).model == "gpt2"  # like nothing here


def test_the_options_of_a_metric_are_placed_too(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    for metric, what, do in (
        ("{rouge: {variant: [rouge9]}}", "variant = ['rouge9'] does not fit", "it takes: rouge1 | rouge2"),
        ("{rouge: {varaint: rouge1}}", "no option «varaint»", "did you mean «variant»?"),
    ):
        file.write_text(EVALUATED.replace("SIZE", "0.1").replace("NAME", "sft").replace("[loss]", f"[loss, {metric}]"))
        error = error_of(file)
        assert what in error.what and do in error.do and error.where == f"{file}:6"


@pytest.mark.parametrize(
    ("assigned", "what", "do"),
    [
        ("grpo.epsilon=0.1", "«epsilon» is an option of the algorithm «grpo»", "algorithm: {grpo: {epsilon: …}}"),
        ("grpo.scale=none", "«scale» is an option of the advantage «group»", "advantage: {group: {scale: …}}"),
        ("grpo.reward=[{rouge: {}, wieght: 0.7}]", "unknown key «wieght»", "did you mean «weight»?"),
        ("grpo.reward=[{rouge: {}, wight: 1, weight: 1}]", "unknown key «wight»", "did you mean «weight»?"),
        ("grpo.reward=[{rouge: {}, stem: true}]", "unknown key «stem»", "within the reward: {rouge: {stem: …}"),
    ],
)
def test_what_belongs_elsewhere_is_sent_there(assigned: str, what: str, do: str) -> None:
    with pytest.raises(RecipeError) as told:
        recipe.load("detox-summarization", profile="smoke", sets=[assigned])
    assert what in told.value.what and do in told.value.do and told.value.where == f"--set {assigned}"


@pytest.mark.parametrize(
    ("assigned", "what"),
    [
        ("toxic_news.classifier=null", "toxic_news: classifier and reject.toxicity_below need each other"),
        (
            "toxic_news.reject.against=null",
            "toxic_news.reject: length_ratio and too_similar and lost compare with a text: give `against` a template",
        ),
    ],
)
def test_a_check_of_several_keys_says_its_message_alone(assigned: str, what: str) -> None:
    with pytest.raises(RecipeError) as told:
        recipe.load("detox-summarization", sets=[assigned])
    assert told.value.what == what


def test_a_recipe_by_a_wrong_name_or_path() -> None:
    with pytest.raises(RecipeError, match=r"did you mean «detox-summarization»"):
        recipe.find("detox-sumarization")
    with pytest.raises(RecipeError, match="no recipe file"):
        recipe.find("missing.yaml")


def test_the_schema_accepts_what_is_shipped_and_nothing_misspelt() -> None:
    schema = json.loads(json.dumps(fields.schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    for path in SHIPPED:
        assert not list(check.iter_errors(recipe.read(path))), path
    raw = recipe.read(SHIPPED[0])
    stage = next(s for s in raw["stages"].values() if s["stage"] == "sft")
    for wrong in (
        {**raw, "modle": "x"},
        {**raw, "stages": {"a": {**stage, "leraning": 1}}},
        {**raw, "stages": {"a": {**stage, "stage": "nothing"}}},
        {**raw, "stages": {"a": {k: v for k, v in stage.items() if k != "data"}}},
        {**raw, "stages": {"a": {**stage, "adapter": {"rank": 8}}}},
        {**raw, "stages": {"a": {**stage, "lr": -1}}},
        {**raw, "profiles": {"p": {"stages": {"a": {"leraning": 1}}}}},
        {**raw, "profiles": {"p": {"stages": {"a": {"stage": "sft", "adapter": {"rank": 8}}}}}},
    ):
        assert list(check.iter_errors(wrong)), wrong


def test_the_schema_describes_every_field() -> None:
    missing = [".".join(e.path) for e in fields.entries() if not e.info.description]
    assert not missing
    assert "affects_result" not in json.dumps(fields.schema())


def test_explain_finds_fields_by_any_part_of_their_path() -> None:
    assert "default 0.0001" in fields.explain("sft.lr") and "pretrain" not in fields.explain("sft.lr")
    assert {"in pretrain: default 0.002", "in reward, sft: default 0.0001"} <= {
        s.strip() for s in fields.explain("lr").split("\n")
    }
    assert "vocabulary" not in fields.explain("shape.hidden") and "≥ 16" in fields.explain("shape.hidden")
    assert "longer than" in fields.explain("data.drop.longer_than")
    assert "top of a recipe; default 20" in fields.explain("seed")
    assert "drop | cut | error" in fields.explain("too_long")
    assert fields.explain("sft").startswith("sft: ") and "max_length" in fields.explain("sft")
    with pytest.raises(RecipeError, match="did you mean «longer_than»"):
        fields.explain("longer_then")
    with pytest.raises(RecipeError, match="lists a stage's fields"):
        fields.explain("qqqqqq")


TRAINING = {
    "sft": "sft", "rl": "rl, reward: [{length: {target: 5}}]", "warp": "warp, reward: [{length: {target: 5}}]", "reward": "reward", "classifier": "classifier",
    "pretrain": "pretrain",
}  # fmt: skip


@pytest.mark.parametrize("kind", TRAINING)
def test_nothing_trains_on_the_test_split(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "r.yaml"

    def reading(split: str) -> Path:
        file.write_text(
            f"name: r\nmodel: ./m\nstages:\n  qa: {{stage: data, source: qa.jsonl}}\n  one: {{stage: {TRAINING[kind]}, data: {split}}}\n"
        )
        return file

    told = error_of(reading("qa.test"))
    assert told.what == "stage «one» trains, and «qa.test» is the test split" and "evaluate it instead" in told.do
    assert told.where == f"{file}:5"
    assert "one" in recipe.load(reading("qa.train")).stages
    if kind in ("reward", "classifier"):  # they read all splits, whichever is named
        assert "holds «qa.validation» out" in error_of(reading("qa.validation")).what
    else:
        assert "one" in recipe.load(reading("qa.validation")).stages


def test_every_field_can_be_explained() -> None:
    for e in fields.entries():
        assert e.info.description in fields.explain(".".join(e.path))


EVALUATED = """\
name: r
model: ./somewhere
stages:
  qa: {stage: data, source: qa.jsonl, test: SIZE}
  sft: {stage: sft, data: qa}
  compare: {stage: evaluate, models: [base, NAME], data: qa, metrics: [loss]}
"""


@pytest.mark.parametrize(
    ("size", "name", "said"),
    [("0", "sft", "«qa» has test: 0"), ("0.1", "stf", "did you mean «sft»"), ("0.1", "bse", "did you mean «base»")],
)
def test_what_an_evaluation_could_not_read_is_told_before_anything_runs(
    tmp_path: Path, size: str, name: str, said: str
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(EVALUATED.replace("SIZE", size).replace("NAME", name))
    with pytest.raises(RecipeError, match=said) as told:
        recipe.load(file)
    assert "r.yaml:6" in told.value.where
    file.write_text(EVALUATED.replace("SIZE", "0.1").replace("NAME", "gpt2"))
    assert "compare" in recipe.load(file).stages  # a hub id that is near to no stage
