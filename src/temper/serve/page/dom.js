// Elements and small helpers. Whatever a model or a person wrote is put in as text nodes, never as HTML.

export const $ = (id) => document.getElementById(id);

/** An element; names that are properties of it are set as such, all others as attributes. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** An SVG element. */
export function svg(tag, props = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const kbd = (key) => el("kbd", { ariaHidden: "true" }, key);
export const error = (message) => el("p", { className: "error", role: "alert" }, message);

/** Tell those who hear the page. */
export function say(text) {
  $("said").append(el("span", {}, text));
  while ($("said").childNodes.length > 4) $("said").firstChild.remove();
}

/** Show a message where it belongs; an empty one hides the place. */
export function tell(place, message) {
  place.textContent = message;
  place.hidden = !message;
}

/** Storage that may be switched off. */
export function kept(storage, name, fallback = "") {
  try {
    return window[storage].getItem(`temper.${name}`) ?? fallback;
  } catch {
    return fallback;
  }
}

export function keep(storage, name, value) {
  try {
    window[storage].setItem(`temper.${name}`, value);
  } catch {
    // it is for this page alone, then
  }
}

export const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
export const percent = (share) => `${Math.round(100 * share)}\u00a0%`;
