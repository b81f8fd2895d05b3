// The request on the page as a curl command and as Python. Pictures and videos are read from files of their names; keys
// never appear: both read MIRADA_API_KEY.

/** The body of a request, and where in it each attachment stands. */
export function requestBody(turns, model, settings) {
  const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const turn of turns) messages.push({ role: turn.role, content: turn.attachments?.length ? parts(turn) : turn.text });
  const { system, ...rest } = settings;
  return { model, messages, ...rest };
}

function parts(turn) {
  const media = turn.attachments.map(({ kind, url }) => ({ type: `${kind}_url`, [`${kind}_url`]: { url } }));
  return turn.text ? [...media, { type: "text", text: turn.text }] : media;
}

/** The body with every data URI replaced by what `stand` gives for (index, head of the URI, attachment). */
function standIns(turns, model, settings, stand) {
  const files = [];
  const shown = turns.map((turn) => ({
    ...turn,
    attachments: (turn.attachments || []).map((one) => {
      files.push(one);
      return { ...one, url: stand(files.length, one.url.slice(0, one.url.indexOf(",") + 1), one) };
    }),
  }));
  return { body: requestBody(shown, model, settings), files };
}

const shellQuote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A file's name as it may stand in a command: no path, no control characters, never an option. */
export const plainName = (name) => name.replace(/[\u0000-\u001f\u007f\\/]/g, "_").replace(/^-/, "_");

export function curl(turns, model, settings, address) {
  const { body, files } = standIns(turns, model, settings, (index, head) => `\u0001${head}\u0002${index}\u0003`);
  // In a here-document $, ` and \ are the shell's; the marks become references to variables after they are escaped.
  const json = JSON.stringify(body, null, 2).replace(/[\\$`]/g, "\\$&").replace(/\\\\u0001(.*?)\\\\u0002(\d+)\\\\u0003/g, "$1$${MEDIA_$2}");
  const reads = files.map((file, index) => `MEDIA_${index + 1}=$(base64 < ${shellQuote(plainName(file.name))} | tr -d '\\n')`);
  return [
    ...reads,
    `curl ${shellQuote(address + "v1/chat/completions")} \\`,
    `  -H 'Content-Type: application/json' \\`,
    `  -H "Authorization: Bearer $MIRADA_API_KEY" \\`,
    `  --data-binary @- <<END_OF_REQUEST`,
    json,
    "END_OF_REQUEST",
  ].join("\n");
}

const OPENAI = new Set(["model", "messages", "temperature", "top_p", "max_tokens", "seed", "stop"]);

export function python(turns, model, settings, address) {
  const { body, files } = standIns(turns, model, settings, (index, head) => `\u0001${head}\u0002${index}\u0003`);
  const known = Object.entries(body).filter(([name]) => OPENAI.has(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !OPENAI.has(name)));
  const media = (text) =>
    text.replace(/"\\u0001data:(.*?);base64,\\u0002(\d+)\\u0003"/g, (_, type, index) => `data_uri(${literal(plainName(files[index - 1].name))}, "${type}")`);
  const lines = ["import os", "", "from openai import OpenAI", ""];
  if (files.length) lines.unshift("import base64");
  if (files.length) {
    lines.push("", "def data_uri(path, kind):", '    with open(path, "rb") as file:', '        return f"data:{kind};base64,{base64.b64encode(file.read()).decode()}"', "", "");
  }
  lines.push(`client = OpenAI(base_url=${literal(address + "v1")}, api_key=os.environ.get("MIRADA_API_KEY", "none"))`, "reply = client.chat.completions.create(");
  for (const [name, value] of known) lines.push(`    ${name}=${media(literal(value, 1))},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${literal(extra, 1)},`);
  lines.push(")", "print(reply.choices[0].message.content)");
  return lines.join("\n");
}

/** A JSON value as a Python literal. */
function literal(value, depth = 0) {
  const pad = "    ".repeat(depth);
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const items = Array.isArray(value)
    ? value.map((one) => literal(one, depth + 1))
    : Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one, depth + 1)}`);
  return items.length ? `${open}\n${items.map((item) => `${pad}    ${item},\n`).join("")}${pad}${close}` : open + close;
}
