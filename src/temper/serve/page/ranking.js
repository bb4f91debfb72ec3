// What the votes say so far: scores, couples, agreement, people; and the votes as a file.

import { $, count, el, error, percent, svg } from "./dom.js";
import { json, request } from "./server.js";

export const view = { show: (on) => on && load() };

async function load() {
  try {
    draw(await json("/playground/ranking"));
  } catch (failed) {
    $("ranking").replaceChildren(error(failed.message));
  }
}

function draw(found) {
  $("download").disabled = !found.votes;
  $("ranking-lead").textContent = found.votes
    ? `${count(found.votes, "vote")} from ${found.people.length === 1 ? "one person" : `${found.people.length} people`}.`
    : "There are no votes yet. Vote in Blind, and this page fills.";
  if (!found.votes) return $("ranking").replaceChildren();
  $("ranking").replaceChildren(
    ...scores(found.models),
    el("h2", {}, "Couples"),
    couples(found.couples),
    el("h2", {}, "Do people agree?"),
    agreement(found.agreement),
    people(found.people),
  );
}

function table(headings, rows) {
  const cells = (row) => row.map((cell, k) => el("td", { "data-of": headings[k], className: k ? "" : "first" }, cell));
  return el(
    "table", {}, el("thead", {}, el("tr", {}, ...headings.map((h) => el("th", { scope: "col" }, h)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...cells(row)))),
  );
}

/** An interval as a bar with a dot in it, on a scale that all rows share; `middle`: where nothing is better. */
function interval(value, low, high, [from, to], middle, label) {
  const at = (x) => `${(100 * (x - from)) / (to - from)}%`;
  const parts = [svg("line", { class: "middle", x1: at(middle), x2: at(middle), y1: 0, y2: 20 })];
  if (low !== null) parts.push(svg("line", { class: "range", x1: at(low), x2: at(high), y1: 10, y2: 10 }));
  parts.push(svg("circle", { cx: at(value), cy: 10, r: 5 }));
  return svg("svg", { class: "interval", role: "img", "aria-label": label, height: 20 }, ...parts);
}

function scores(models) {
  const ends = models.flatMap((m) => [m.score, m.low ?? m.score, m.high ?? m.score, 1000]);
  const room = 0.06 * (Math.max(...ends) - Math.min(...ends)) + 10;
  const scale = [Math.min(...ends) - room, Math.max(...ends) + room];
  const groups = [...new Set(models.map((m) => m.group))];
  const out = [el("h2", {}, "Scores")];
  for (const group of groups) {
    const mine = models.filter((m) => m.group === group);
    if (groups.length > 1) out.push(el("h3", {}, `Group ${group + 1}`));
    const rows = mine.map((m) => {
      const range = m.low === null ? "" : `${Math.round(m.low)} to ${Math.round(m.high)}`;
      const figures = el("span", { className: "score" }, el("b", {}, `${Math.round(m.score)}`), el("small", {}, range || "no interval yet"));
      const chart = interval(m.score, m.low, m.high, scale, 1000, `${Math.round(m.score)}${range && `, ${range}`}`);
      return [m.model, figures, chart, ...[m.votes, m.won, m.tied, m.lost, m.both_bad].map(String)];
    });
    const made = table(["Model", "Score", "Interval", "Votes", "Won", "Tied", "Lost", "Both bad"], rows);
    made.className = "scores";
    out.push(made);
  }
  if (groups.length > 1)
    out.push(el("p", { className: "note" }, "No chain of votes connects the models of one group with those of another, so scores of two groups cannot be compared. Votes on a couple across them would join them."));
  out.push(
    el("p", { className: "soft" }, "Bradley–Terry scores on Elo's scale: 400 points are odds of 10 to 1, and the mean is 1000. Intervals (95\u00a0%) resample prompts, not single votes: what several people say of one prompt is not independent."),
  );
  return out;
}

function couples(found) {
  const rows = found.map((c) => {
    const turned = c.rate < 0.5;
    const [first, second] = turned ? [c.b, c.a] : [c.a, c.b];
    const [rate, low, high] = turned ? [1 - c.rate, c.high && 1 - c.high, c.low === null ? null : 1 - c.low] : [c.rate, c.low, c.high];
    const range = low === null ? "" : `${percent(low)} to ${percent(high)}`;
    const figures = el("span", { className: "score" }, el("b", {}, percent(rate)), el("small", {}, range || "no interval yet"));
    const p = c.p_adjusted === null ? "–" : c.p_adjusted < 0.001 ? "< 0.001" : c.p_adjusted.toFixed(3);
    return [
      el("span", {}, el("b", {}, first), c.rate === 0.5 ? " and " : " over ", el("b", {}, second), el("small", {}, `${count(c.prompts, "prompt")}, ${count(c.votes, "vote")}`)),
      figures, interval(rate, low, high, [0, 1], 0.5, `${percent(rate)}${range && `, ${range}`}`), p, further(c),
    ];
  });
  const made = table(["Couple", "Better", "Interval", "p, adjusted", "What it takes"], rows);
  made.className = "couples";
  return el("div", {}, made, el("p", { className: "soft" }, "A tie, or both bad, is half for either. p is corrected for the number of couples (Holm). The number of further prompts is what it would take in four of five cases, if the two differ by as much as it looks now."));
}

function further(c) {
  if (c.more === 0) return el("span", { className: "tag good" }, "separated");
  if (c.more !== null) return `about ${count(c.more, "more prompt")} would separate them`;
  return c.rate === 0.5 && c.prompts >= 5 ? "even so far" : "too few prompts to say";
}

function agreement(found) {
  if (!found) return el("p", {}, "Nobody has judged what another did: agreement shows once two people judge the same items.");
  const on = `on ${count(found.shared, "comparison")} that ${found.people} people share`;
  if (found.alpha === null) return el("p", {}, `All said one and the same ${on}, so there is nothing to measure.`);
  const a = found.alpha;
  const words = a >= 0.8 ? "People agree well" : a >= 0.667 ? "People agree fairly" : a > 0.2 ? "People agree a little" : a > -0.2 ? "People hardly agree, or no more than by chance" : "People tend to disagree";
  const range = found.low === null ? "" : `, interval ${found.low.toFixed(2)} to ${found.high.toFixed(2)}`;
  return el("p", {}, el("b", {}, `${words}.`), ` Krippendorff's alpha is ${a.toFixed(2)}${range}, ${on}: 1 would be always, 0 as by chance.`);
}

function people(found) {
  return el("div", {}, el("h2", {}, "People"), el("ul", { className: "people" }, ...found.map((p) => el("li", {}, el("b", {}, p.who), ` ${count(p.votes, "vote")}`))));
}

const REASONS = { tie: "tied", both_bad: "both bad", "equal answers": "with equal answers", "an empty answer": "with an empty answer" };

$("download").onclick = async () => {
  const said = $("download-said");
  said.className = "";
  try {
    const response = await request("/playground/votes.jsonl");
    const left = Object.entries(JSON.parse(response.headers.get("X-Left-Out")));
    const url = URL.createObjectURL(await response.blob());
    el("a", { href: url, download: "votes.jsonl" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
    const all = left.reduce((sum, [, n]) => sum + n, 0);
    const why = left.map(([reason, n]) => `${n} ${REASONS[reason] ?? reason}`).join(", ");
    const rows = Number(response.headers.get("X-Rows"));
    said.textContent = `${count(rows, "vote")} became ${rows === 1 ? "a row" : "rows"}; ${all ? `${all} left out: ${why}` : "none left out"}.`;
  } catch (failed) {
    said.className = "error";
    said.textContent = failed.message;
  }
};
