// A fixed list of items, judged one after another; names of models are never shown here.

import { who } from "./blind.js";
import { $, count, el, error } from "./dom.js";
import { json } from "./server.js";
import { duel, enter } from "./verdicts.js";

let current = null;
let person = ""; // who judges now
let list = null; // what is to be judged

export const view = {
  show(on) {
    if (on && !list) return;
    if (on && !person && who()) begin();
  },
  key: (name) => current?.key(name) ?? false,
};

/** Take in what the server has to judge. */
export function open(items) {
  list = items;
  $("to-judge").hidden = items === null;
  if (!items) return;
  $("judge-lead").textContent =
    `${count(items.items, "prompt")} from ${items.name.split("/").slice(-2).join("/")}, ${count(items.total, "comparison")} in all, ` +
    "in an order of your own. You can stop at any time and come back under the same name.";
}

$("judge-name").onsubmit = (event) => {
  event.preventDefault();
  begin();
};
$("judge-other").onclick = () => {
  person = "";
  current = null;
  $("item").replaceChildren();
  $("judge-progress").hidden = true;
  $("judge-name").hidden = false;
  $("judge-name").querySelector("input").select();
};

function begin() {
  if (!who()) return void $("judge-name").querySelector("input").focus();
  person = who();
  $("judge-name").hidden = true;
  next();
}

async function next() {
  const asked = person;
  current = null;
  const waiting = el("p", { className: "waiting", role: "status" }, "The models are answering …");
  $("item").replaceChildren(waiting);
  let found;
  try {
    found = await json(`/playground/items/next?${new URLSearchParams({ who: asked })}`);
  } catch (failed) {
    if (asked !== person) return;
    $("item").replaceChildren(error(failed.message), el("button", { type: "button", onclick: next }, "Try again"));
    if (!$("judge-progress").hidden) return;
    $("judge-name").hidden = false;
    person = "";
    return;
  }
  if (asked !== person) return;
  progress(found.progress);
  if (!found.battle) {
    const done = el("div", { className: "finished" }, el("h2", {}, "All done. Thank you!"), el("p", {}, "You have judged every comparison. ", el("a", { href: "#ranking" }, "See the ranking"), "."));
    $("item").replaceChildren(done);
    return;
  }
  const battle = found.battle;
  const shown = duel(battle.messages, (verdict) => vote(shown, battle.id, verdict));
  for (const side of ["left", "right"]) {
    shown.more(side, battle[side].text);
    shown.done(side, battle[side].ended);
  }
  current = shown;
  $("item").replaceChildren(shown.node);
  if (!$("view-judge").hidden && !document.querySelector("dialog[open]")) enter($("item"));
}

async function vote(shown, id, verdict) {
  try {
    await json(`/playground/battles/${id}/vote`, { body: { verdict } });
    await next();
  } catch (failed) {
    shown.bar.before(error(failed.message));
    shown.reopen();
  }
}

function progress({ done, total }) {
  $("judge-progress").hidden = false;
  const bar = $("judge-progress").querySelector("progress");
  bar.max = total;
  bar.value = done;
  $("judge-done").textContent = `${person}: ${done.toLocaleString("en")} of ${total.toLocaleString("en")} judged`;
}
