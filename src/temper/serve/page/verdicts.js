// Two answers, A and B, whose models are not told, and the verdict on them: what Blind and Judge share.

import { el, kbd, say } from "./dom.js";

const SIDES = { left: "A", right: "B" };
const VERDICTS = [["1", "left", "A is better"], ["2", "right", "B is better"], ["3", "tie", "Tie"], ["4", "both_bad", "Both bad"]];

/** A place for two answers, and buttons. `judged(verdict)` is called once both are complete and somebody decided. */
export function duel(messages, judged) {
  const places = {};
  const cards = Object.entries(SIDES).map(([side, letter]) => {
    const text = new Text();
    const notes = el("p", { className: "figures" }, "waiting …");
    const title = el("h2", {}, letter);
    const node = el("article", { className: "answer", ariaLabel: `Answer ${letter}`, ariaBusy: "true" }, title, el("div", { className: "text" }, text), notes);
    places[side] = { text, notes, title, node, done: false, failed: false };
    return node;
  });
  const buttons = VERDICTS.map(([key, verdict, words]) =>
    el("button", { type: "button", disabled: true, onclick: () => decide(verdict), ariaKeyShortcuts: key }, kbd(key), ` ${words}`),
  );
  const bar = el("div", { className: "bar verdicts", role: "group", ariaLabel: "Which answer is better?" }, ...buttons);
  const node = el("div", {}, conversation(messages), el("div", { className: "answers" }, ...cards), bar);
  let open = true;

  const ready = () => open && Object.values(places).every((one) => one.done && !one.failed);
  function decide(verdict) {
    if (!ready()) return;
    close();
    judged(verdict);
  }
  function close() {
    open = false;
    for (const button of buttons) button.disabled = true;
  }
  return {
    node,
    bar,
    close,
    more(side, text) {
      places[side].text.appendData(text);
      places[side].notes.textContent = "writing …";
    },
    /** `ended`: by itself; false: cut at the limit. */
    done(side, ended, failed = "") {
      const one = places[side];
      Object.assign(one, { done: true, failed: Boolean(failed) });
      one.node.ariaBusy = "false";
      one.notes.replaceChildren();
      if (failed) one.notes.append(el("span", { className: "error", role: "alert" }, failed));
      else if (!ended) one.notes.append(el("span", { className: "tag" }, "cut at the limit"));
      else if (!one.text.data) one.notes.append(el("span", { className: "tag" }, "an empty answer"));
      say(`Answer ${SIDES[side]}: ${failed || one.text.data}`);
      for (const button of buttons) button.disabled = !ready();
    },
    /** No further piece comes of what is not complete. */
    broken(message) {
      for (const one of Object.values(places).filter((p) => !p.done)) {
        one.node.ariaBusy = "false";
        one.failed = true;
        one.notes.replaceChildren(el("span", { className: "tag" }, message));
      }
      close();
    },
    reopen() {
      open = true;
      for (const button of buttons) button.disabled = !ready();
    },
    reveal(names, verdict) {
      for (const [side, one] of Object.entries(places)) {
        one.title.append(" · ", el("span", { className: "name" }, names[side]));
        one.node.ariaLabel = `Answer ${SIDES[side]}, ${names[side]}`;
        one.node.classList.toggle("better", side === verdict);
      }
    },
    key(name) {
      const found = VERDICTS.find(([key]) => key === name);
      if (found) decide(found[1]);
      return Boolean(found);
    },
  };
}

/** What was asked; roles are told where there is more than one message. */
function conversation(messages) {
  if (messages.length === 1) return el("p", { className: "prompt text" }, messages[0].content);
  return el(
    "div", { className: "prompt" },
    ...messages.map((m) => el("div", {}, el("b", { className: "role" }, m.role), el("p", { className: "text" }, m.content))),
  );
}

/** Put the eyes and the keys on a new thing. */
export function enter(place) {
  place.focus({ preventScroll: true });
  const { top, bottom } = place.getBoundingClientRect();
  if (top < 0 || bottom > window.innerHeight) place.scrollIntoView({ block: "start" });
}
