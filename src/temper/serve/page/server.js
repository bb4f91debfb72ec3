// What goes to the server and comes from it: errors in its own words, the key if it asks for one, streams of events.

import { $, keep, kept } from "./dom.js";

export class ServerError extends Error {}

let key = kept("sessionStorage", "key");
let asking = null; // one form for all requests that wait for a key

function askForKey(why) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = $("key");
    $("key-why").textContent = why;
    $("key-value").value = "";
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      key = $("key-value").value.trim();
      keep("sessionStorage", "key", key);
      resolve();
      dialog.close();
    };
    $("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => reject(new ServerError(why)); // does nothing after `resolve`
    dialog.showModal();
  }).finally(() => (asking = null));
  return asking;
}

/** A response that is no error.
 *  Throws ServerError with the server's own words; AbortError where `signal` stopped it. */
export async function request(path, { body, signal } = {}) {
  for (;;) {
    const sent = key;
    const headers = { ...(sent && { Authorization: `Bearer ${sent}` }), ...(body && { "Content-Type": "application/json" }) };
    let response;
    try {
      response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    } catch (failed) {
      if (failed.name === "AbortError") throw failed;
      throw new ServerError("The server cannot be reached. Is it still running?");
    }
    if (response.ok) return response;
    const message = await words(response);
    if (response.status !== 401) throw new ServerError(message);
    if (sent === key) await askForKey(message); // another request may have brought a new one meanwhile
    signal?.throwIfAborted();
  }
}

export const json = async (path, options) => (await request(path, options)).json();

async function words(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

/** Server-sent events up to [DONE]. */
export async function* events(path, options) {
  const response = await request(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ServerError("The connection broke off before the answer was complete.");
      const whole = (rest + value).split("\n\n");
      rest = whole.pop();
      for (const part of whole) {
        const data = part.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error?.message) throw new ServerError(event.error.message);
        yield event;
      }
    }
  } catch (failed) {
    if (failed.name === "AbortError" || failed instanceof ServerError) throw failed;
    throw new ServerError("The connection to the server broke off.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
