// One prompt to all chosen models, and answers side by side as they come; follow-ups where every model has a template.

import { chosen, refresh, settings, system, templated } from "./asking.js";
import { $, count, el, say } from "./dom.js";
import { events } from "./server.js";

const MOST = 6; // a browser opens no more connections to one server, and a seventh would wait for them unseen
let talk = null; // { names, said: name → messages }; null: the next prompt begins one
let stopping = null;
let turns = 0;

export const view = {
  blind: false,
  asks: true,
  get busy() {
    return stopping !== null;
  },
  get fresh() {
    return turns > 0;
  },
  get label() {
    return talk && templated() ? "Follow up" : "Your prompt";
  },
  stop: () => stopping?.abort(),
  changed: () => (talk = null), // other models: another conversation
  begin() {
    talk = null;
    turns = 0;
    $("turns").replaceChildren();
    refresh();
    $("prompt").focus();
  },
  send,
  show(on) {
    $("turns").hidden = !on;
  },
};

async function send(prompt) {
  const names = chosen();
  if (!names.length) throw new Error("Choose a model or more above.");
  if (names.length > MOST) throw new Error(`Choose ${MOST} models at most: a browser streams no more at once.`);
  const how = settings();
  if (!talk || !templated()) {
    $("turns").replaceChildren();
    turns = 0;
    talk = { names, said: Object.fromEntries(names.map((name) => [name, []])), before: system() };
  }
  const current = talk;
  $("prompt").value = "";
  stopping = new AbortController();
  turns += 1;
  const cards = names.map(card);
  const turn = el(
    "section", { className: "turn", ariaLabel: `Prompt ${turns}` },
    el("p", { className: "prompt text" }, prompt),
    el("div", { className: "answers" }, ...cards.map((one) => one.node)),
  );
  $("turns").append(turn);
  refresh();
  if (turns > 1) turn.scrollIntoView({ block: "start" });
  try {
    await Promise.all(cards.map((one) => answer(one, current, prompt, how, stopping.signal)));
  } finally {
    stopping = null;
    refresh();
  }
}

/** A place for an answer. */
function card(name) {
  const text = new Text();
  const notes = el("p", { className: "figures" }, "waiting …");
  const body = el("div", { className: "text" }, text);
  const node = el("article", { className: "answer", ariaLabel: name, ariaBusy: "true" }, el("h2", {}, name), body, notes);
  return { name, text, notes, node };
}

async function answer(one, current, prompt, how, signal) {
  const said = current.said[one.name];
  const messages = [...current.before, ...said, { role: "user", content: prompt }];
  const body = { model: one.name, messages, stream: true, stream_options: { include_usage: true }, ...how };
  const begun = performance.now();
  const seen = { first: null, last: null, tokens: null, reason: null };
  let failed = null;
  try {
    for await (const event of events("/v1/chat/completions", { body, signal })) {
      seen.tokens = event.usage?.completion_tokens ?? seen.tokens;
      const [choice] = event.choices;
      if (!choice) continue;
      seen.reason = choice.finish_reason ?? seen.reason;
      if (!choice.delta.content) continue;
      seen.last = performance.now();
      seen.first ??= seen.last;
      if (seen.first === seen.last) one.notes.textContent = "writing …";
      one.text.appendData(choice.delta.content);
    }
  } catch (error) {
    failed = error;
  }
  one.node.ariaBusy = "false";
  one.notes.replaceChildren(...figures(seen, begun, failed, one.text.data));
  if (one.text.data.trim()) said.push({ role: "user", content: prompt }, { role: "assistant", content: one.text.data });
  say(failed && failed.name !== "AbortError" ? `${one.name}: ${failed.message}` : `Answer of ${one.name}: ${one.text.data}`);
}

/** What is told below an answer. */
function figures(seen, begun, failed, text) {
  const found = [];
  if (seen.tokens !== null) found.push(el("span", {}, count(seen.tokens, "token")));
  if (seen.first !== null) found.push(el("span", {}, `first after ${((seen.first - begun) / 1000).toFixed(2)} s`));
  if (seen.tokens && seen.first !== null) {
    const wrote = seen.last - seen.first; // of an answer that comes all at once this says nothing: then all that passed counts
    const rate = wrote > 200 ? (1000 * (seen.tokens - 1)) / wrote : (1000 * seen.tokens) / (seen.last - begun);
    found.push(el("span", {}, `${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`));
  }
  if (seen.reason === "length") found.push(el("span", { className: "tag" }, "cut at the limit"));
  if (failed?.name === "AbortError") found.push(el("span", { className: "tag" }, "stopped"));
  else if (failed) found.push(el("span", { className: "error", role: "alert" }, failed.message));
  else if (!text) found.push(el("span", { className: "tag" }, "an empty answer"));
  return found;
}
