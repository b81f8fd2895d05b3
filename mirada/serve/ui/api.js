// The public API, as any client would use it. Addresses are relative, so that the page also works below a prefix.

const KEY = "mirada-key";

export const apiKey = () => sessionStorage.getItem(KEY) || "";
export const setApiKey = (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY));

/** What the server said is wrong, in its own words. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, code = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
  }
}

function headers() {
  const key = apiKey();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function send(path, options) {
  let reply;
  try {
    reply = await fetch(path, { ...options, headers: headers(), credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!reply.ok) throw await refusal(reply);
  return reply;
}

async function refusal(reply) {
  let said = {};
  try {
    said = (await reply.json()).error || {};
  } catch { /* a proxy may answer with a page of its own */ }
  const message = typeof said === "string" ? said : said.message;
  const wait = reply.headers.get("Retry-After");
  const later = reply.status === 429 && wait ? ` Try again in ${wait} s.` : "";
  return new ApiError((message || `The server answered ${reply.status} ${reply.statusText}`.trim() + ".") + later, { status: reply.status, param: said.param, code: said.code });
}

/** What may be asked, models and adapters: [{id, parent}], where an adapter's parent is its model. */
export async function listModels() {
  const reply = await send("v1/models", {});
  return (await reply.json()).data.map(({ id, parent }) => ({ id, parent: parent || null }));
}

/** Events of a streamed reply, each parsed; ends at [DONE]. */
export async function* streamChat(body, signal) {
  const reply = await send("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  for await (const data of events(reply.body, signal)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message || "The server broke off.", event.error);
    yield event;
  }
  throw new ApiError("The connection broke off before the answer was complete.");
}

/** The data of server-sent events, whatever pieces the network cuts them into. */
async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const parts = held.split(/\r?\n\r?\n/);
      held = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } catch (error) {
    if (signal.aborted || error.name === "AbortError") throw new DOMException("stopped", "AbortError");
    throw new ApiError("The connection broke off before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {}); // the server sees that nobody listens any more
  }
}

const COUNTS = ["prompt_tokens", "completion_tokens", "image_tokens", "video_tokens", "reasoning_tokens", "frames"];

/** Counts of a reply's `usage`, wherever the server puts the details. */
export function counts(usage) {
  const all = { ...usage?.prompt_tokens_details, ...usage?.completion_tokens_details, ...usage };
  if (all.frames === undefined) all.frames = all.num_frames;
  if (Array.isArray(all.frames)) all.frames = all.frames.reduce((sum, frames) => sum + Number(frames), 0);
  return Object.fromEntries(COUNTS.map((name) => [name, Number(all[name]) || 0]));
}
