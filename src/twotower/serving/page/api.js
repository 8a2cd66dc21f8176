// Questions to the service. A later question on the same channel makes an earlier one obsolete.

const running = new Map();
let asking = null;

export class Failure extends Error {
  constructor(status, detail, errors = []) {
    super(detail);
    this.status = status;
    this.errors = errors; // which part of the question each is about
  }
}

export const obsolete = (error) => error.name === "AbortError";

// What is still awaited on a channel is no longer wanted.
export function abandon(channel) {
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
    abandon(channel);
    const control = new AbortController();
    running.set(channel, control);
    signal = control.signal;
  }
  const token = sessionStorage.getItem("twotower-token");
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const answer = await fetch(path, { ...options, headers, signal }).catch((error) => {
    throw obsolete(error) ? error : new Failure(0, "The service does not answer. Is it still running?");
  });
  if (answer.ok) return answer.json();
  if (answer.status === 401) {
    // Several questions may have gone out with an older token: only the present one was refused.
    if (token === sessionStorage.getItem("twotower-token")) await tokenFromReader(Boolean(token));
    return send(path, options, channel);
  }
  const problem = await answer.json().catch(() => ({}));
  if (answer.status === 503) throw new Failure(503, "The service is busy. Try again in a moment.");
  throw new Failure(answer.status, problem.detail ?? answer.statusText, problem.errors);
}

function tokenFromReader(refused) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("ask-token");
    document.getElementById("token-refused").hidden = !refused;
    dialog.addEventListener(
      "close",
      () => {
        const field = document.getElementById("token");
        sessionStorage.setItem("twotower-token", field.value.trim());
        field.value = "";
        asking = null;
        resolve();
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}
