// Which view is on show, keys that work everywhere, light and dark, and the beginning.

import * as asking from "./asking.js";
import * as blind from "./blind.js";
import * as compare from "./compare.js";
import { $, keep, tell } from "./dom.js";
import * as judge from "./judge.js";
import * as ranking from "./ranking.js";
import { json } from "./server.js";

const VIEWS = { compare, blind, judge, ranking };
let name = "";

function route() {
  const asked = location.hash.slice(1);
  const next = asked in VIEWS && !(asked === "judge" && $("to-judge").hidden) ? asked : "compare";
  if (next === name) return;
  name = next;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const other of Object.keys(VIEWS)) {
    $(`view-${other}`).hidden = other !== name;
    if (other !== name) VIEWS[other].view.show(false);
  }
  document.title = `${$(`h-${name}`).textContent} · Temper`;
  const { view } = VIEWS[name];
  asking.serve("send" in view ? view : null);
  view.show(true);
  window.scrollTo(0, 0);
}

const writing = (node) => node.matches("textarea, select, input:not([type=checkbox])");

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.repeat || document.querySelector("dialog[open]")) return;
  const { view } = VIEWS[name] ?? compare;
  if (event.key === "Escape") return void view.stop?.();
  if (writing(event.target)) return;
  if (event.key === "?") $("help").showModal();
  else if (event.key === "/" && !$("composer").hidden) $("prompt").focus();
  else if (!view.key?.(event.key)) return;
  event.preventDefault();
});

$("help-open").onclick = () => $("help").showModal();
$("help-close").onclick = () => $("help").close();

const dark = matchMedia("(prefers-color-scheme: dark)");
const root = document.documentElement;
function named() {
  const now = root.dataset.theme ?? (dark.matches ? "dark" : "light");
  $("theme").textContent = now === "dark" ? "Light" : "Dark";
  $("theme").ariaLabel = `Switch to ${now === "dark" ? "light" : "dark"}`;
  return now;
}
$("theme").onclick = () => {
  root.dataset.theme = named() === "dark" ? "light" : "dark";
  keep("localStorage", "theme", root.dataset.theme);
  named();
};
dark.addEventListener("change", named);
named();

try {
  const state = await json("/playground/state");
  asking.begin(state.models);
  judge.open(state.items);
} catch (failed) {
  tell($("trouble"), failed.message);
}
addEventListener("hashchange", route);
route();
