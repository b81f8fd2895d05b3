// The playground: wires the page to the public API. State is the list of turns; nothing is kept when the page is closed.

import { ApiError, apiKey, listModels, setApiKey, streamChat } from "./api.js";
import { announce, byId, el, icon, iconButton } from "./dom.js";
import { Live } from "./live.js";
import { attach, closeStream, draw, MAX_PIXELS, MAX_SIDE, openStream, release } from "./media.js";
import { codeFigure } from "./markdown.js";
import { preview, problem, questionCard, Reply } from "./reply.js";
import { SAMPLES, sampleCanvas, sampleFile } from "./samples.js";
import { curl, plainName, python, requestBody } from "./snippets.js";

const turns = []; // {role, text, attachments?, tag?, node}
let pending = []; // attachments of the question that is being written
let underWay = null; // AbortController of the answer that is being streamed

const question = byId("question");
const scroller = byId("scroll");
const live = new Live(byId("live"), () => byId("model").value, () => {
  if (!live.shown) question.focus();
  byId("go-live").classList.toggle("on", live.shown);
  byId("go-live").setAttribute("aria-expanded", String(live.shown));
  question.placeholder = live.active ? "Ask about what is shown" : "Ask about a picture or a video";
});

// ---- attachments

async function addFiles(files, saved = true) {
  notice("");
  for (const file of files) {
    try {
      pending.push(await attach(file, saved));
    } catch (error) {
      notice(error.message);
    }
  }
  showPending();
  question.focus();
}

function showPending() {
  const list = byId("thumbs");
  list.hidden = !pending.length;
  list.replaceChildren(...pending.map((one) => {
    const remove = iconButton("close", `Remove ${one.name}`, () => {
      pending = pending.filter((other) => other !== one);
      release(one);
      showPending();
      question.focus();
    });
    return el("li", { title: one.note ? `${one.name}: ${one.note}` : one.name }, preview(one), one.note ? el("span", { class: "shrunk", text: one.note }) : null, remove);
  }));
  if (pending.length) announce(`${pending.length} attached`);
}

function watchFiles() {
  const input = byId("files");
  byId("pick").addEventListener("click", () => input.click());
  input.addEventListener("change", async () => {
    await addFiles([...input.files]);
    input.value = "";
  });
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files || [])];
    if (!files.length) return;
    event.preventDefault();
    addFiles(files, false);
  });
  const holdsFiles = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
  let depth = 0;
  const shade = (by) => {
    depth = Math.max(0, depth + by);
    byId("drop").hidden = depth === 0;
  };
  document.addEventListener("dragenter", (event) => holdsFiles(event) && shade(1));
  document.addEventListener("dragleave", (event) => holdsFiles(event) && shade(-1));
  document.addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    shade(-depth);
    addFiles([...event.dataTransfer.files]);
  });
}

// ---- camera

function watchCamera() {
  const dialog = byId("shot");
  const finder = byId("viewfinder");
  let stream = null;
  byId("webcam").addEventListener("click", async () => {
    byId("shot-problem").textContent = "";
    byId("snap").disabled = true;
    dialog.showModal();
    try {
      const opened = await openStream("camera");
      if (!dialog.open) return closeStream(opened); // closed while the browser asked for leave
      stream = finder.srcObject = opened;
    } catch (error) {
      byId("shot-problem").textContent = error.message;
    }
  });
  finder.addEventListener("loadeddata", () => { byId("snap").disabled = !stream; }); // before, there is nothing to take
  byId("snap").addEventListener("click", async () => {
    const blob = await draw(finder, finder.videoWidth, finder.videoHeight);
    dialog.close();
    addFiles([new File([blob], `camera-${turns.length + pending.length + 1}.jpg`, { type: blob.type })], false);
  });
  dialog.addEventListener("close", () => {
    closeStream(stream);
    stream = finder.srcObject = null;
  });
}

// ---- asking

function settings() {
  const chosen = {};
  for (const field of document.querySelectorAll("[data-setting]")) {
    const value = field.dataset.list ? field.value : field.value.trim();
    if (!value) continue;
    if (field.dataset.list) chosen[field.dataset.setting] = value.split("\n").filter((line) => line !== "").map(unescaped);
    else chosen[field.dataset.setting] = field.type === "number" ? Number(value) : value;
  }
  return chosen;
}

/** A line as it was typed, where \\n and \\t stand for what they stand for everywhere. */
const unescaped = (line) => line.replace(/\\([nt\\])/g, (_, one) => ({ n: "\n", t: "\t", "\\": "\\" })[one]);

/** Says on the button how many settings are not the server's. */
function countSettings() {
  const number = Object.keys(settings()).length;
  const button = byId("show-settings");
  button.classList.toggle("changed", number > 0);
  button.setAttribute("aria-label", number ? `Settings, ${number} changed` : "Settings");
  button.title = button.getAttribute("aria-label");
  byId("clear-settings").disabled = !number;
}

/** Asks what is written, with what is attached. */
async function ask() {
  if (underWay) return;
  const text = question.value.trim();
  if (!text && !pending.length) return question.focus();
  if (live.active && pending.length) return notice("While live is on, questions are about what it shows: remove what is attached, or end live.");
  if (live.active && !text) return question.focus();
  notice("");
  const turn = { role: "user", text, attachments: pending, tag: live.active ? `Live, the last ${live.seconds.value} s` : "" };
  pending = [];
  question.value = "";
  grow();
  showPending();
  turn.node = questionCard(turn);
  turns.push(turn);
  byId("welcome").hidden = true;
  byId("log").append(turn.node);
  await answer();
}

const isAtEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 120;

/** What is at the end of the conversation stays in sight when the composer below it grows. */
function watchEnd() {
  let atEnd = true;
  scroller.addEventListener("scroll", () => { atEnd = isAtEnd(); }, { passive: true });
  new ResizeObserver(() => { if (atEnd && turns.length) scroller.scrollTop = scroller.scrollHeight; }).observe(scroller);
}

async function answer() {
  let follow = true;
  const reply = new Reply(() => { if (follow) scroller.scrollTop = scroller.scrollHeight; });
  const watch = () => { follow = isAtEnd(); };
  scroller.addEventListener("wheel", watch, { passive: true });
  scroller.addEventListener("touchmove", watch, { passive: true });
  byId("log").append(reply.node);
  scroller.scrollTop = scroller.scrollHeight;
  setUnderWay(new AbortController());
  const outcome = await receive(reply, underWay.signal);
  setUnderWay(null);
  scroller.removeEventListener("wheel", watch);
  scroller.removeEventListener("touchmove", watch);
  const turn = { role: "assistant", text: reply.text, node: reply.node };
  if (!outcome.error || reply.text) turns.push(turn);
  reply.end({ ...outcome, pictures: pictures(), again: () => retry(reply.node) });
  if (outcome.error?.status === 401) askForKey();
}

/** Feeds a reply from the stream; says how it ended. */
async function receive(reply, signal) {
  const asked = turns[turns.length - 1];
  const body = { ...requestBody(turns, byId("model").value, settings()), stream: true, stream_options: { include_usage: true } };
  try {
    if (asked.tag && !live.active) throw new ApiError("Live has ended, and its frames are gone: start it again to ask this.");
    const events = asked.tag ? live.ask(asked.text, turns.slice(0, -1), settings(), signal) : streamChat(body, signal);
    for await (const event of events) reply.take(event);
    return {};
  } catch (error) {
    if (error.name === "AbortError") return { stopped: true };
    return { error: error instanceof ApiError ? error : new ApiError(`The page failed: ${error.message}`) };
  }
}

const pictures = () => turns.flatMap((turn) => turn.attachments || []).filter((one) => one.kind === "image");

/** Drops the answer (and all that came after it) and asks the same again. */
function retry(node) {
  if (underWay) return;
  const at = turns.findIndex((turn) => turn.node === node);
  const gone = at >= 0 ? turns.splice(at) : [];
  while (turns.length && turns[turns.length - 1].role !== "user") gone.push(turns.pop());
  for (let next = node; next;) {
    const following = next.nextElementSibling;
    next.remove();
    next = following;
  }
  for (const turn of gone) turn.attachments?.forEach(release);
  question.focus();
  answer();
}

function setUnderWay(controller) {
  underWay = controller;
  const button = byId("send");
  button.replaceChildren(icon(controller ? "stop" : "up"));
  button.title = controller ? "Stop" : "Send";
  button.setAttribute("aria-label", button.title);
  button.classList.toggle("stop", Boolean(controller));
  if (controller) announce("The answer is under way");
}

function reset() {
  underWay?.abort();
  for (const turn of turns) turn.attachments?.forEach(release);
  pending.forEach(release);
  turns.length = 0;
  pending = [];
  byId("log").replaceChildren();
  byId("welcome").hidden = false;
  showPending();
  notice("");
  announce("New conversation");
  question.focus();
}

function grow() {
  question.style.height = "auto";
  question.style.height = `${Math.min(question.scrollHeight, 0.4 * innerHeight)}px`;
}

function watchComposer() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (underWay) underWay.abort();
    else ask();
  });
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
  question.addEventListener("input", grow);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && underWay && !document.querySelector("dialog[open]")) underWay.abort();
  });
  byId("new").addEventListener("click", reset);
  byId("go-live").addEventListener("click", () => (live.shown ? live.close() : live.open()));
}

// ---- around it: models, settings, theme, code, examples

function notice(said) {
  byId("notice").replaceChildren(...(said ? [said instanceof Error ? problem(said) : el("p", { text: said })] : []));
}

async function loadModels() {
  const picker = byId("model");
  try {
    const models = await listModels();
    const before = picker.value;
    picker.replaceChildren(...choices(models));
    if (models.some((model) => model.id === before)) picker.value = before;
    picker.disabled = models.length === 0;
    notice("");
  } catch (error) {
    picker.replaceChildren(el("option", { value: "", text: "No model" }));
    picker.disabled = true;
    notice(error);
    if (error.status === 401) askForKey();
  }
}

/** Models, and below them each model's adapters as a group. */
function choices(models) {
  const option = ({ id }) => el("option", { value: id, text: id });
  const parents = new Set(models.map((model) => model.parent).filter(Boolean));
  const groups = [...parents].map((parent) => el("optgroup", { label: `Adapters of ${parent}` }, ...models.filter((model) => model.parent === parent).map(option)));
  return [...models.filter((model) => !model.parent).map(option), ...groups];
}

function askForKey() {
  byId("settings").showModal();
  byId("s-key").focus();
}

function watchSettings() {
  const key = byId("s-key");
  key.value = apiKey();
  key.addEventListener("change", () => {
    setApiKey(key.value.trim());
    loadModels();
  });
  byId("show-settings").addEventListener("click", () => byId("settings").showModal());
  byId("settings").addEventListener("input", countSettings);
  byId("clear-settings").addEventListener("click", () => {
    for (const field of document.querySelectorAll("[data-setting]")) field.value = "";
    countSettings();
    announce("All settings are the server’s again");
    byId("s-system").focus();
  });
  countSettings(); // a browser may have kept what was written before
  byId("limit-note").textContent = `Pictures of more than ${MAX_SIDE.toLocaleString("en")} pixels a side, or ${MAX_PIXELS / 1e6} million in all, are made smaller before they are sent.`;
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }
}

function watchTheme() {
  const button = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const show = () => button.setAttribute("aria-pressed", String(isDark()));
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("mirada-theme", document.documentElement.dataset.theme);
    } catch { /* storage may be forbidden: the choice lasts as long as the page */ }
    show();
  });
  system.addEventListener("change", show);
  show();
}

function watchCode() {
  const tabs = { curl: byId("tab-curl"), python: byId("tab-python") };
  const show = (name) => {
    for (const [other, tab] of Object.entries(tabs)) {
      tab.setAttribute("aria-selected", String(other === name));
      tab.tabIndex = other === name ? 0 : -1;
    }
    const asked = [...turns];
    while (asked.length && asked[asked.length - 1].role !== "user") asked.pop();
    const draft = question.value.trim() || pending.length ? [...turns, { role: "user", text: question.value.trim(), attachments: pending }] : asked;
    const address = new URL(".", location.href).href;
    const made = (name === "curl" ? curl : python)(draft, byId("model").value, settings(), address);
    byId("snippet").setAttribute("aria-labelledby", tabs[name].id);
    byId("snippet").replaceChildren(codeFigure(made, name === "curl" ? "shell" : "python"));
    const unsaved = draft.flatMap((turn) => turn.attachments || []).filter((one) => !one.saved);
    const frames = draft.some((turn) => turn.tag) ? ["Questions asked live are shown without the frames they were about. "] : [];
    byId("snippet-files").replaceChildren(...frames, ...(unsaved.length ? ["It reads these from the current folder: "] : []), ...unsaved.map((one) => el("a", { href: one.preview, download: plainName(one.name), text: `save ${one.name}` })));
  };
  for (const [name, tab] of Object.entries(tabs)) {
    tab.addEventListener("click", () => show(name));
    tab.addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
      const other = name === "curl" ? "python" : "curl";
      show(other);
      tabs[other].focus();
    });
  }
  byId("show-code").addEventListener("click", () => {
    show("curl");
    byId("code").showModal();
  });
}

function showSamples() {
  byId("samples").append(...SAMPLES.map((sample) => {
    const picture = sampleCanvas(sample, 4);
    picture.setAttribute("aria-hidden", "true");
    const card = el("button", { type: "button", class: "sample" }, picture, el("strong", { text: sample.title }), el("span", { text: sample.question }));
    card.addEventListener("click", async () => {
      if (underWay) return;
      await addFiles([await sampleFile(sample)], false);
      question.value = sample.question;
      ask();
    });
    return card;
  }));
}

watchFiles();
watchCamera();
watchComposer();
watchEnd();
watchSettings();
watchTheme();
watchCode();
showSamples();
loadModels();
question.focus();
