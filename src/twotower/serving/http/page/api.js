// Requests to the service. A new request on a channel aborts the one in flight on that channel.

const running = new Map();
let prompt = null; // the open token dialog, as a promise

export class Failure extends Error {
  constructor(status, detail, errors = []) {
    super(detail);
    this.status = status;
    this.errors = errors; // [{pointer, detail}]: the parts of the request that were refused
  }
}

export const aborted = (error) => error.name === "AbortError";

export function abort(channel) {
  running.get(channel)?.abort();
}

export async function get(path, params = {}, channel = null) {
  const given = Object.entries(params).filter(([, value]) => value !== null && value !== undefined);
  const query = new URLSearchParams(given).toString();
  return send(query ? `${path}?${query}` : path, {}, channel);
}

export async function post(path, body, channel = null) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  return send(path, options, channel);
}

async function send(path, options, channel) {
  let signal;
  if (channel) {
    abort(channel);
    const control = new AbortController();
    running.set(channel, control);
    signal = control.signal;
  }
  const token = sessionStorage.getItem("twotower-token");
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const response = await fetch(path, { ...options, headers, signal }).catch((error) => {
    throw aborted(error) ? error : new Failure(0, "The service does not respond. Is it still running?");
  });
  if (response.ok) return JSON.parse(await response.text(), withExactIds);
  if (response.status === 401) {
    // Several requests may have been sent with an older token; only a refusal of the current one is reported.
    if (token === sessionStorage.getItem("twotower-token")) await requestToken(Boolean(token));
    return send(path, options, channel);
  }
  const problem = await response.json().catch(() => ({}));
  if (response.status === 503) throw new Failure(503, "The service is busy. Try again in a moment.");
  throw new Failure(response.status, problem.detail ?? response.statusText, problem.errors);
}

// Ids are text on this page. An integer above 2^53 also stays text: as a number it would be rounded.
function withExactIds(key, value, context) {
  if (typeof value !== "number") return value;
  const id = key === "item" || (Number.isInteger(value) && !Number.isSafeInteger(value));
  return id ? (context?.source ?? String(value)) : value;
}

function requestToken(refused) {
  prompt ??= new Promise((resolve) => {
    const dialog = document.getElementById("token-dialog");
    document.getElementById("token-refused").hidden = !refused;
    dialog.addEventListener(
      "close",
      () => {
        const field = document.getElementById("token");
        sessionStorage.setItem("twotower-token", field.value.trim());
        field.value = "";
        prompt = null;
        resolve();
      },
      { once: true },
    );
    dialog.showModal();
  });
  return prompt;
}
