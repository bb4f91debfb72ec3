// Two of the chosen models answer without names; names come with the verdict.

import { chosen, refresh, settings, system } from "./asking.js";
import { $, el, error, kbd, keep, kept, say } from "./dom.js";
import { events, json } from "./server.js";
import { duel, enter } from "./verdicts.js";

let stopping = null;
let current = null; // the comparison on show
let over = false; // it has its verdict, or will get none

export const who = () => kept("localStorage", "who").trim();

export const view = {
  blind: true,
  label: "Your prompt",
  get asks() {
    return current === null;
  },
  get busy() {
    return stopping !== null;
  },
  stop: () => stopping?.abort(),
  send,
  show(on) {
    $("battle").hidden = !on || current === null;
  },
  key(name) {
    if (name.toLowerCase() === "n" && over) return next(), true;
    return current?.key(name) ?? false;
  },
};

async function send(prompt) {
  const names = chosen();
  if (names.length < 2) throw new Error("Choose two models or more above: two of them are drawn.");
  const messages = [...system(), { role: "user", content: prompt }];
  const controller = (stopping = new AbortController());
  refresh();
  try {
    const body = { messages, models: names, ...(who() && { who: who() }), ...settings() };
    const { id } = await json("/playground/battles", { body, signal: controller.signal });
    current = duel(messages, (verdict) => vote(id, verdict));
    over = false;
    $("battle").replaceChildren(current.node);
    current.bar.append(el("button", { type: "button", className: "stop", onclick: view.stop }, "Stop ", kbd("Esc")));
    $("battle").hidden = false;
    refresh();
    enter($("battle"));
    await listen(id, controller.signal);
  } catch (failed) {
    if (!current && failed.name !== "AbortError") throw failed;
    if (current) giveUp(failed);
  } finally {
    stopping = null;
    $("battle").querySelector(".stop")?.remove();
    refresh();
  }
}

async function listen(id, signal) {
  let failed = false;
  for await (const event of events(`/playground/battles/${id}/stream`, { signal })) {
    if (event.text) current.more(event.side, event.text);
    if (event.done) current.done(event.side, event.ended, event.error);
    failed ||= Boolean(event.error);
  }
  if (failed) giveUp(null);
  else say("Both answers are complete. Vote with 1, 2, 3 or 4.");
}

/** There will be no verdict. */
function giveUp(failed) {
  current.broken(failed?.name === "AbortError" || !failed ? "stopped" : "broken off");
  if (failed && failed.name !== "AbortError") current.bar.before(error(failed.message));
  offerNext("No vote this time.");
}

async function vote(id, verdict) {
  try {
    const names = await json(`/playground/battles/${id}/vote`, { body: { verdict, ...(who() && { who: who() }) } });
    current.reveal(names, verdict);
    const words = { left: `${names.left} was better`, right: `${names.right} was better`, tie: "a tie", both_bad: "both bad" }[verdict];
    $("prompt").value = "";
    say(`A was ${names.left}, B was ${names.right}.`);
    offerNext(`Your vote: ${words}.`);
  } catch (failed) {
    current.bar.before(error(failed.message));
    current.reopen();
  }
}

function offerNext(words) {
  over = true;
  current.bar.replaceChildren(
    el("span", { className: "grow" }, words),
    el("button", { type: "button", className: "main", onclick: next, ariaKeyShortcuts: "n" }, "Next prompt ", kbd("N")),
  );
}

function next() {
  current = null;
  over = false;
  $("battle").hidden = true;
  $("battle").replaceChildren();
  refresh();
  $("prompt").focus();
}

for (const field of document.querySelectorAll("input.who")) {
  field.value = who();
  field.oninput = () => {
    keep("localStorage", "who", field.value.trim());
    for (const other of document.querySelectorAll("input.who")) if (other !== field) other.value = field.value;
  };
}
