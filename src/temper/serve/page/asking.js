// What Compare and Blind share: which models, how they decode, and the box for the prompt.

import { $, el, keep, kept, tell } from "./dom.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
let models = [];
let view = null; // the one on show, if it asks: { asks, busy, label, send(prompt), stop(), changed() }

/** Take in what the server serves. */
export function begin(served) {
  models = served;
  const before = JSON.parse(kept("localStorage", "models", "null")) ?? [];
  const known = before.filter((name) => models.some((m) => m.name === name));
  const chosen = known.length ? known : models.slice(0, 2).map((m) => m.name);
  $("models").replaceChildren(
    ...models.map((m) =>
      el(
        "label", { className: "chip", title: m.parent ? `an adapter of ${m.parent}` : "" },
        el("input", { type: "checkbox", value: m.name, checked: chosen.includes(m.name), onchange: changed }),
        el("span", {}, m.name),
        m.parent ? el("small", {}, `on ${m.parent}`) : null,
      ),
    ),
  );
  const settings = JSON.parse(kept("localStorage", "settings", "{}"));
  for (const [name, value] of Object.entries(settings)) if ($(name)) $(name).value = value;
  for (const name of [...NUMBERS, "system"]) $(name).oninput = remember;
  refresh();
}

export const chosen = () => [...$("models").querySelectorAll(":checked")].map((box) => box.value);
export const templated = () => models.filter((m) => chosen().includes(m.name)).every((m) => m.templated);

/** The fields of a request; empty ones are left to the server. Throws Error where one is no number that fits. */
export function settings() {
  const found = {};
  for (const name of NUMBERS) {
    const field = $(name);
    if (field.closest("label").hidden) continue;
    if (!field.checkValidity()) {
      $("settings").open = true;
      field.focus();
      throw new Error(`${field.closest("label").firstChild.data.trim()}: ${field.validationMessage}`);
    }
    if (field.value !== "") found[name] = Number(field.value);
  }
  return found;
}

/** The system message, where all chosen models know one. */
export const system = () => (templated() && $("system").value.trim() ? [{ role: "system", content: $("system").value.trim() }] : []);

function changed() {
  keep("localStorage", "models", JSON.stringify(chosen()));
  view?.changed?.();
  refresh();
}

function remember() {
  keep("localStorage", "settings", JSON.stringify(Object.fromEntries([...NUMBERS, "system"].map((name) => [name, $(name).value]))));
  refresh();
}

/** Show the box for `next`; null: none asks. */
export function serve(next) {
  view = next;
  tell($("composer-error"), "");
  refresh();
}

/** Bring what is on show up to date. */
export function refresh() {
  $("asking").hidden = !view || !view.asks;
  $("composer").hidden = !view || !view.asks;
  if (!view) return;
  $("send").hidden = view.busy;
  $("stop").hidden = !view.busy;
  $("fresh").hidden = view.busy || !view.fresh;
  $("prompt-label").textContent = view.label;
  $("seed-label").hidden = view.blind;
  $("who-label").hidden = !view.blind;
  const plain = models.filter((m) => chosen().includes(m.name) && !m.templated).map((m) => `«${m.name}»`);
  const who = plain.length === 1 ? `${plain[0]} has no chat template: it takes` : `${plain.join(", ")} have no chat template: they take`;
  tell($("models-note"), plain.length ? `${who} single prompts, without follow-ups or a system message.` : "");
  $("system").disabled = plain.length > 0;
  const said = [`temperature ${$("temperature").value || 1}`];
  if (Number($("top_p").value || 1) !== 1) said.push(`top p ${$("top_p").value}`);
  if ($("max_tokens").value) said.push(`at most ${$("max_tokens").value} tokens`);
  if ($("seed").value && !view.blind) said.push(`seed ${$("seed").value}`);
  if (system().length) said.push("a system message");
  $("settings-short").textContent = said.join(" · ");
}

async function send() {
  const prompt = $("prompt").value;
  tell($("composer-error"), "");
  if (view.busy || !view.asks) return;
  if (!prompt.trim()) return void $("prompt").focus();
  const asked = view;
  try {
    await asked.send(prompt);
  } catch (failed) {
    if (view === asked) tell($("composer-error"), failed.message);
  }
  refresh();
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  send();
};
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
    event.preventDefault();
    send();
  }
};
$("stop").onclick = () => view.stop();
$("fresh").onclick = () => view.begin();
if (/Mac|iPhone|iPad/.test(navigator.platform)) $("send").querySelector("kbd").textContent = "⌘ Enter";
