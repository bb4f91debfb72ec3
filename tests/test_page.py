"""The playground's page in a real browser: answers side by side, votes by keyboard, ranking, file of votes, key, themes, widths."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import serving
from temper.serve.votes import Votes

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
sync = pytest.importorskip("playwright.sync_api", reason="needs playwright")

KEY = "sesame"
BEARER = {"Authorization": f"Bearer {KEY}"}
NAMES = ("base", "gpt2", "witty")
PROMPTS = ["Що нового?", "w5 w6 w7"]
SEED = 3
SEND, VOTE = "#send:visible", "#battle .verdicts button[aria-keyshortcuts]:enabled"
# The contrast of everything that is written, WCAG's: colours of the text and of the first ground below it that is not clear.
CONTRAST = """() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)).reduce((s, v, k) => s + v * [0.2126, 0.7152, 0.0722][k], 0);
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim());
    if (!own || !node.checkVisibility() || node.matches(":disabled, :disabled *")) continue;
    let ground = node;
    while (ground && (parse(getComputedStyle(ground).backgroundColor)[3] ?? 1) === 0) ground = ground.parentElement;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(parse(getComputedStyle(ground ?? document.body).backgroundColor))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.textContent.slice(0, 40)]);
  }
  return found;
}"""
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def served(served_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Server]:
    """Three models, one without a template, items, and votes of before on two sets of models that never met."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "items.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS), encoding="utf-8")
    votes = Votes(folder / "votes.sqlite")
    for k in range(26):
        old = k >= 24
        id, models = f"before-{k}", ({"left": "old-a", "right": "old-b"} if old else {"left": "base", "right": "witty"})
        votes.begin(id, "ann", [{"role": "user", "content": f"Question {k}"}], models, {})  # type: ignore[arg-type]
        for side in ("left", "right"):
            votes.write(id, side, f"{side} {k}", True)
        votes.judge(id, "left" if k % 6 else "tie", "ann")
    votes.close()
    given = (
        str(served_models / "base"), str(served_models / "gpt2"), "--adapter", f"witty={served_models / 'adapters' / 'witty'}",
        "--items", str(folder / "items.jsonl"), "--votes", str(folder / "votes.sqlite"),
    )  # fmt: skip
    with serving.server(*given, TEMPER_API_KEY=KEY) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM)
        yield made
        made.close()


@pytest.fixture
def opened(served: serving.Server, browser: Any) -> Iterator[Open]:
    """`opened(path, key=…, **context)`: a page of its own that has the key. Nothing may be asked of another origin, and nothing may be
    complained of in the console but refusals."""
    contexts, complaints, asked = [], [], []

    def made(path: str = "/", *, key: str | None = KEY, **how: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **how})
        contexts.append(context)
        if key is not None:
            context.add_init_script(f"sessionStorage.setItem('temper.key', '{key}')")
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("request", lambda r: asked.append(r.url))
        page.goto(served.address + path)
        return page

    yield made
    for context in contexts:
        context.close()
    assert not [text for text in complaints if "Failed to load resource" not in text], complaints
    assert asked and all(url.startswith((served.address, "data:", f"blob:{served.address}")) for url in asked), asked


def choose(page: Any, *names: str) -> None:
    page.wait_for_selector(".chip")
    for name in NAMES:
        page.locator(f".chip input[value={name}]").set_checked(name in names)


def setting(page: Any, **values: Any) -> None:
    if not page.locator("#settings").get_attribute("open") and not page.locator("#temperature").is_visible():
        page.click("#settings summary")
    for name, value in values.items():
        page.fill(f"#{name}", str(value))


def send(page: Any, prompt: str, *, wait: bool = True) -> None:
    page.fill("#prompt", prompt)
    page.press("#prompt", "Control+Enter")
    if wait:
        page.wait_for_selector(SEND)


def tab_to(page: Any, selector: str) -> None:
    """By the tabulator alone."""
    for _ in range(40):
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{selector} is not reached")


def overheard(page: Any, urls: Any) -> list[str]:
    """What the server answers at these addresses, from now on."""
    bodies: list[str] = []

    def hear(route: Any) -> None:
        response = route.fetch()
        bodies.append(response.text())
        route.fulfill(response=response)

    page.route(urls, hear)
    return bodies


def answers(page: Any, turn: int) -> list[tuple[str, str, str]]:
    """(model, text, figures) of a turn."""
    cards = page.locator(".turn").nth(turn).locator(".answer").all()
    return [tuple(card.locator(s).text_content() for s in ("h2", ".text", ".figures")) for card in cards]


def test_answers_come_side_by_side_and_are_followed_up(served: serving.Server, opened: Open) -> None:
    """They are what the server gives to the same request in one piece; each model is told its own answers of before."""
    page = opened()
    choose(page, "base", "witty")
    setting(page, temperature=1, top_p=0.9, seed=SEED, max_tokens=9, system="Be brief.")
    talks = {name: [{"role": "system", "content": "Be brief."}] for name in ("base", "witty")}
    for turn, prompt in enumerate(("Що нового?", "А <b>далі</b>?")):
        send(page, prompt)
        shown = answers(page, turn)
        assert [name for name, _, _ in shown] == ["base", "witty"]
        for name, text, figures in shown:
            talks[name].append({"role": "user", "content": prompt})
            asked = {"model": name, "messages": talks[name], "temperature": 1, "top_p": 0.9, "seed": SEED, "max_tokens": 9}
            whole = served.post("/v1/chat/completions", asked, headers=BEARER).json()
            said = whole["choices"][0]["message"]["content"]
            assert text == said != ""
            assert f"{whole['usage']['completion_tokens']} tokens" in figures and re.search(r"first after \d+\.\d\d s[\d.]+ tokens/s", figures)
            assert ("cut at the limit" in figures) == (whole["choices"][0]["finish_reason"] == "length")
            talks[name].append({"role": "assistant", "content": said})
    assert page.locator(".turn .prompt").all_text_contents() == ["Що нового?", "А <b>далі</b>?"]
    assert "Answer of witty" in page.locator("#said").text_content()
    assert page.locator("#prompt-label").text_content() == "Follow up"
    page.click("text=New conversation")
    assert page.locator(".turn").count() == 0 and page.locator("#prompt-label").text_content() == "Your prompt"

    choose(page, "base", "gpt2")
    assert "«gpt2» has no chat template" in page.locator("#models-note").text_content() and page.locator("#system").is_disabled()
    for prompt in ("w5 w6", "w8"):
        send(page, prompt)
        assert page.locator(".turn").count() == 1, "each prompt stands alone"
        assert page.locator("#prompt-label").text_content() == "Your prompt"
    page.reload()
    page.wait_for_selector(".chip")
    assert page.locator(".chip :checked").evaluate_all("all => all.map(c => c.value)") == ["base", "gpt2"]
    assert page.locator("#max_tokens").input_value() == "9"


def test_what_a_model_writes_is_text(opened: Open) -> None:
    page = opened()
    choose(page, "base")
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>\n**bold**"
    event = {"choices": [{"index": 0, "delta": {"content": hostile}, "finish_reason": "stop"}]}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n", content_type="text/event-stream"))
    send(page, "hello")
    assert answers(page, 0)[0][1] == hostile and page.locator(".answer .text *").count() == 0


def test_answers_are_stopped_and_given_up(served: serving.Server, opened: Open) -> None:
    page = opened()
    choose(page, "base", "witty")

    def longer(route: Any) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "min_tokens": 370}))

    page.route("**/v1/chat/completions", longer)
    send(page, "hello", wait=False)
    page.locator(".answer .text", has_text=re.compile(r"\S")).first.wait_for()
    served.process.send_signal(signal.SIGSTOP)  # however fast it writes
    page.keyboard.press("Escape")
    page.wait_for_selector(SEND)
    served.process.send_signal(signal.SIGCONT)
    shown = answers(page, 0)
    assert all("stopped" in figures for _, _, figures in shown) and any(text for _, text, _ in shown)
    until = time.monotonic() + 10
    while served.metrics(headers=BEARER)[("temper_answers_under_way",)]:
        assert time.monotonic() < until, "the server goes on writing"
        time.sleep(0.05)


def test_errors_are_told_where_they_happen_in_the_servers_words(opened: Open) -> None:
    page = opened("/#blind")
    choose(page, "base")
    send(page, "hello")
    assert "two models or more" in page.locator("#composer-error").text_content()
    choose(page, "base", "gpt2")
    send(page, "a " * 140)
    assert "takes 128 together with the answer" in page.locator("#composer-error").text_content()
    assert "gpt2" not in page.locator("#composer-error").text_content(), "which of them is not told"
    page.click("nav >> text=Compare")
    setting(page, max_tokens=200)
    send(page, "hello")
    (_, text, first), (_, _, second) = answers(page, 0)
    assert text and "tokens" in first and "is more than there is room for" in second
    setting(page, temperature=-1)
    send(page, "hello")
    assert page.locator("#composer-error").text_content().startswith("Temperature: ")
    setting(page, temperature=1)
    page.route("**/v1/**", lambda route: route.abort())
    send(page, "hello")
    assert all("cannot be reached" in figures for _, _, figures in answers(page, 0))
    assert page.locator("#composer").is_visible()


def test_a_blind_vote_by_keyboard_alone(served: serving.Server, opened: Open, tmp_path: Path) -> None:
    page = opened()
    page.wait_for_selector(".chip")
    bodies = overheard(page, "**/playground/battles/**")
    tab_to(page, "nav a[href='#blind']")
    page.keyboard.press("Enter")
    page.wait_for_selector("#view-blind:visible")
    tab_to(page, ".chip input[value=base]")
    for name, wanted in zip(NAMES, (True, False, True), strict=True):  # in the order of /playground/state: base, gpt2, witty
        tab_to(page, f".chip input[value={name}]")
        if page.locator(f".chip input[value={name}]").is_checked() != wanted:
            page.keyboard.press("Space")
    tab_to(page, "#prompt")
    page.keyboard.type("2 + 2? 1, 3 or 4?")  # figures in the prompt are no votes
    tab_to(page, "#who-label input")
    page.keyboard.type("eve")
    tab_to(page, "#send")
    page.keyboard.press("Enter")
    page.wait_for_selector(VOTE)
    before = page.locator("#battle").inner_text()
    assert not re.search("base|witty|gpt2", before + "".join(bodies)) and "2 + 2? 1, 3 or 4?" in before
    page.screenshot(path=tmp_path / "battle.png")
    page.keyboard.press("2")
    page.wait_for_selector("text=Your vote")
    page.screenshot(path=tmp_path / "revealed.png")
    titles = page.locator("#battle h2").all_text_contents()
    assert sorted(title[4:] for title in titles) == ["base", "witty"] and [t[:4] for t in titles] == ["A · ", "B · "]
    assert page.locator("#battle .answer").nth(1).evaluate("n => n.classList.contains('better')")
    winner = titles[1][4:]
    assert f"Your vote: {winner} was better" in page.locator("#battle").inner_text()
    rows = [json.loads(line) for line in served.get("/playground/votes.jsonl", headers=BEARER).text.splitlines()]
    assert rows[-1]["chosen_model"] == winner and rows[-1]["who"] == "eve" and rows[-1]["prompt"] == "2 + 2? 1, 3 or 4?"
    assert rows[-1]["chosen"] == page.locator("#battle .answer .text").nth(1).text_content()
    page.keyboard.press("1")  # once is enough
    page.keyboard.press("n")
    assert page.evaluate("document.activeElement.id") == "prompt" and page.locator("#prompt").input_value() == ""
    page.keyboard.press("Escape")
    tab_to(page, "#help-open")
    page.keyboard.press("?")
    assert "both are bad" in page.locator("dialog[open]").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0


def test_items_are_judged_blind_to_the_end(served: serving.Server, opened: Open) -> None:
    """By two people who always agree: the second by the protocol, saying of each couple what the first said."""
    page = opened("/#judge")
    page.wait_for_selector("#judge-name:visible")
    page.press("#judge-name input", "Enter")
    assert page.locator("#judge-progress").is_hidden(), "a name is needed"
    bodies = overheard(page, re.compile("/playground/(items|battles)"))
    page.keyboard.type("flo")
    page.keyboard.press("Enter")
    said: dict[tuple[str, frozenset[str]], Any] = {}
    for k in range(6):
        page.wait_for_selector("#item .verdicts button:enabled")
        page.locator("#judge-done", has_text=f"flo: {k} of 6").wait_for()
        texts = page.locator("#item .answer .text").all_text_contents()
        prompt, key = page.locator("#item .prompt").text_content(), str(k % 4 + 1)
        said[prompt, frozenset(texts)] = texts[int(key) - 1] if key in "12" else {"3": "tie", "4": "both_bad"}[key]
        assert page.locator("#judge-progress progress").evaluate("p => p.value / p.max") == pytest.approx(k / 6)
        if k == 2:  # who comes back finds the same comparison
            page.reload()
            page.wait_for_selector("#item .verdicts button:enabled")
            assert page.locator("#item .answer .text").all_text_contents() == texts
        page.keyboard.press(key)
    page.wait_for_selector("text=All done")
    assert not re.search("base|witty|gpt2", "".join(bodies)), "no name is sent, not even afterwards"
    assert len(bodies) > 12 and {prompt for prompt, _ in said} == set(PROMPTS) and len(said) == 6
    for _ in range(6):
        battle = served.get("/playground/items/next?who=gus", headers=BEARER).json()["battle"]
        texts = {side: battle[side]["text"] for side in ("left", "right")}
        meant = said[battle["messages"][0]["content"], frozenset(texts.values())]
        verdict = next((side for side, text in texts.items() if text == meant), meant)
        assert served.post(f"/playground/battles/{battle['id']}/vote", {"verdict": verdict}, headers=BEARER).json() == {"verdict": verdict}
    found = served.get("/playground/ranking", headers=BEARER).json()["agreement"]
    assert found["alpha"] == 1 and found["people"] == 2 and found["shared"] == 6
    page.click("text=See the ranking")
    page.wait_for_selector("text=People agree well")
    assert "alpha is 1.00" in page.locator("#ranking").inner_text()


def test_the_ranking_and_the_file_of_votes(served: serving.Server, opened: Open, tmp_path: Path) -> None:
    page = opened("/#ranking")
    page.wait_for_selector("table.scores")
    found = served.get("/playground/ranking", headers=BEARER).json()
    rows = [row.locator("td").all_inner_texts() for row in page.locator("table.scores tbody tr").all()]
    assert [row[0] for row in rows] == [m["model"] for m in found["models"]]
    for row, m in zip(rows, found["models"], strict=True):
        assert row[1].split("\n") == [str(round(m["score"])), f"{round(m['low'])} to {round(m['high'])}"]
        assert row[3:] == [str(m[name]) for name in ("votes", "won", "tied", "lost", "both_bad")]
    assert page.locator("h3").all_inner_texts() == ["Group 1", "Group 2"]
    text = page.locator("#ranking").inner_text()
    assert "scores of two groups cannot be compared" in text and "resample prompts" in text
    old = page.locator("table.couples tr", has_text="old-a").inner_text()
    assert "old-a over old-b" in old and "too few prompts to say" in old and "2 prompts, 2 votes" in old
    couple = next(c for c in found["couples"] if (c["a"], c["b"]) == ("base", "witty"))
    assert couple["more"] == 0 and "separated" in page.locator("table.couples tr", has_text="base over witty").inner_text()
    dot, line = (page.locator("table.couples tr", has_text="base over witty").locator(s).bounding_box() for s in ("circle", ".range"))
    whole = page.locator("table.couples tr", has_text="base over witty").locator("svg").bounding_box()
    assert (dot["x"] + dot["width"] / 2 - whole["x"]) / whole["width"] == pytest.approx(couple["rate"], abs=0.01)
    assert (line["x"] - whole["x"]) / whole["width"] == pytest.approx(couple["low"], abs=0.02)
    with page.expect_download() as coming:
        page.click("#download")
    coming.value.save_as(tmp_path / "votes.jsonl")
    response = served.get("/playground/votes.jsonl", headers=BEARER)
    assert (tmp_path / "votes.jsonl").read_text(encoding="utf-8") == response.text
    left = json.loads(response.headers["X-Left-Out"])
    said = page.locator("#download-said").inner_text()
    assert said.startswith(f"{len(response.text.splitlines())} votes became rows; {sum(left.values())} left out: {left['tie']} tied")


def test_a_key_is_asked_for_and_kept_for_the_tab(opened: Open) -> None:
    page = opened("/#ranking", key=None)
    page.wait_for_selector("#key[open]")
    assert "asks for a key" in page.locator("#key-why").text_content()
    page.keyboard.press("Escape")
    page.reload()
    for given, told in (("open", "asks for a key"), (KEY, "the key is wrong")):
        page.locator("#key[open] #key-why", has_text=told).wait_for()
        page.keyboard.type(given)
        page.keyboard.press("Enter")
    page.wait_for_selector("table.scores")
    assert page.evaluate("sessionStorage.getItem('temper.key')") == KEY and page.evaluate("localStorage.length") == 0
    page.reload()
    page.wait_for_selector("table.scores")
    assert page.locator("#key[open]").count() == 0
    with page.expect_download():
        page.click("#download")


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_can_be_read(scheme: str, width: int, opened: Open, tmp_path: Path) -> None:
    """Nothing is wider than the window, and all text is of WCAG's contrast AA."""
    page = opened(color_scheme=scheme, viewport={"width": width, "height": 800}, reduced_motion="reduce")
    choose(page, "base", "gpt2")

    def looked(name: str) -> None:
        page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        found = page.evaluate(CONTRAST)
        assert len(found) > 8 and min(found)[0] >= 4.5, (name, min(found))

    setting(page, max_tokens=30)
    send(page, "w5 " * 30 + "x" * 200)
    looked("compare")
    page.click("nav >> text=Blind")
    send(page, "w5 w6", wait=False)
    page.wait_for_selector(VOTE)
    looked("blind")
    page.click("nav >> text=Judge items")
    page.fill("#judge-name input", f"{scheme} {width}")
    page.press("#judge-name input", "Enter")
    page.wait_for_selector("#item .verdicts button:enabled")
    looked("judge")
    page.click("nav >> text=Ranking")
    page.wait_for_selector("table.scores")
    looked("ranking")
    page.keyboard.press("?")
    looked("help")
    page.keyboard.press("Escape")
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    assert before == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    page.click("#theme")
    after = page.evaluate(ground)
    page.reload()
    page.wait_for_selector("table.scores")
    assert page.evaluate(ground) == after != before
    looked("other")
