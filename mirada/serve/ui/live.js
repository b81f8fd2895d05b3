// Live video: frames of the camera or the screen go to the server over a WebSocket, questions are answered on the last
// seconds while frames keep coming. Frame = 8 bytes (milliseconds, big endian), then a JPEG.

import { ApiError, apiKey } from "./api.js";
import { announce, el } from "./dom.js";
import { closeStream, draw, openStream } from "./media.js";

const FRAMES_PER_SECOND = 2;
const LONGEST_SIDE = 640;
const MOST_TURNS = 64;
const HELD_BACK = 1_000_000; // bytes that may wait in the socket: beyond that a frame is skipped, not queued

/** A browser cannot send headers with a WebSocket: the key travels as a subprotocol, which the server never names back. */
function protocols() {
  const key = btoa(apiKey()).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return ["mirada.live", ...(key ? [`mirada.key.${key}`] : [])];
}

/** Questions that were answered, and their answers, as text. */
function conversation(turns) {
  const said = [];
  turns.forEach((turn, index) => {
    const answer = turns[index + 1];
    if (turn.role !== "user" || answer?.role !== "assistant" || !turn.text || !answer.text) return;
    said.push({ role: "user", content: turn.text }, { role: "assistant", content: answer.text });
  });
  return said.slice(-2 * MOST_TURNS);
}

export class Live {
  /** `panel` is filled with the controls; `model()` names the model; `changed()` is told of start and end. */
  constructor(panel, model, changed) {
    this.panel = panel;
    this.model = model;
    this.changed = changed;
    this.asked = new Map();
    this.nextId = 1;
  }

  get active() {
    return Boolean(this.socket);
  }

  get shown() {
    return !this.panel.hidden;
  }

  /** Shows the choice between camera and screen. */
  open() {
    const start = (what) => () => this.start(what);
    this.problem = el("p", { class: "problem", role: "alert" });
    this.state = el("p", { class: "state", text: "Talk about what a camera or a screen shows, while it happens." });
    this.video = el("video", { muted: true, playsinline: true, hidden: true, "aria-label": "What is being sent" });
    this.video.muted = true;
    this.seconds = el("input", { type: "number", id: "live-seconds", min: "1", max: "60", value: "10", inputmode: "numeric" });
    this.choices = el("div", { class: "choices" },
      el("button", { type: "button", class: "primary", onclick: start("camera"), text: "Camera" }),
      el("button", { type: "button", class: "primary", onclick: start("screen"), text: "Screen" }));
    const window = el("label", { for: "live-seconds" }, "Looks back ", this.seconds, " s");
    this.end = el("button", { type: "button", class: "quiet", onclick: () => this.close(), text: "Close" });
    this.panel.replaceChildren(this.video, el("div", { class: "live-side" }, this.state, this.problem, this.choices, el("div", { class: "live-row" }, window, this.end)));
    this.panel.hidden = false;
    this.choices.firstChild.focus();
    this.changed();
  }

  async start(what) {
    this.problem.textContent = "";
    try {
      this.stream = await openStream(what);
    } catch (error) {
      this.problem.textContent = error.message;
      return;
    }
    this.stream.getVideoTracks()[0].addEventListener("ended", () => this.close());
    this.video.srcObject = this.stream;
    this.video.hidden = false;
    this.choices.hidden = true;
    this.end.textContent = "End live";
    this.state.textContent = "Connecting…";
    await this.video.play();
    this.connect();
  }

  connect() {
    const address = new URL("v1/live", location.href);
    address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
    this.socket = new WebSocket(address, protocols());
    this.socket.binaryType = "arraybuffer";
    this.unsent = [];
    this.socket.onopen = () => {
      if (!this.unsent.length) this.say({ type: "start", model: this.model() });
      for (const message of this.unsent.splice(0)) this.say(message);
    };
    this.socket.onmessage = (event) => this.hear(JSON.parse(event.data));
    this.socket.onclose = (event) => this.lost(event.reason || "The live connection ended.");
    this.changed();
  }

  /** Sends a message; while the socket still connects, it waits for that. */
  say(message) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
    else if (this.socket?.readyState === WebSocket.CONNECTING) this.unsent.push(message);
  }

  hear(message) {
    if (message.type === "state") {
      if (!this.timer) {
        this.timer = setInterval(() => this.sendFrame(), 1000 / FRAMES_PER_SECOND);
        announce("Live is on");
      }
      this.state.classList.add("live-on");
      this.state.textContent = message.frames ? `Live · ${message.frames} ${message.frames === 1 ? "frame" : "frames"} of ${message.seconds.toFixed(0)} s held` : "Live";
      return;
    }
    const wanted = this.asked.get(message.id);
    if (wanted) wanted(message);
    else if (message.type === "error") this.problem.textContent = message.error.message;
  }

  async sendFrame() {
    const { videoWidth: width, videoHeight: height } = this.video;
    if (this.encoding || !width || this.socket?.readyState !== WebSocket.OPEN || this.socket.bufferedAmount > HELD_BACK) return;
    this.encoding = true;
    const now = Date.now();
    const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
    try {
      const jpeg = await draw(this.video, Math.round(width * scale), Math.round(height * scale), "image/jpeg", 0.8);
      const time = new DataView(new ArrayBuffer(8));
      time.setBigUint64(0, BigInt(now));
      if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(new Blob([time.buffer, jpeg]));
    } finally {
      this.encoding = false;
    }
  }

  /**
   * Asks about the last seconds; yields the same events as a streamed chat. `turns` are those before: the server is told
   * model, system message and conversation with every question, so that it answers to what the page shows.
   */
  async *ask(text, turns, settings, signal) {
    const id = String(this.nextId++);
    const queue = [];
    let wake = () => {};
    this.asked.set(id, (message) => { queue.push(message); wake(); });
    const stop = () => { this.say({ type: "stop", id }); queue.push({ type: "stopped" }); wake(); };
    signal.addEventListener("abort", stop);
    const { system, fps, nframes, ...sampling } = settings;
    this.say({ type: "start", model: this.model(), ...(system ? { system } : {}), messages: conversation(turns) });
    this.say({ type: "question", id, text, seconds: Number(this.seconds.value) || 10, ...sampling });
    try {
      for (;;) {
        while (!queue.length) await new Promise((resolve) => { wake = resolve; });
        const message = queue.shift();
        if (message.type === "stopped") throw new DOMException("stopped", "AbortError");
        if (message.type === "error") throw new ApiError(message.error.message, message.error);
        yield message;
        if (message.type === "done") return;
      }
    } finally {
      this.asked.delete(id);
      signal.removeEventListener("abort", stop);
    }
  }

  lost(reason) {
    for (const wanted of this.asked.values()) wanted({ type: "error", error: { message: reason } });
    if (!this.socket) return;
    this.halt();
    this.problem.textContent = reason;
    this.state.textContent = "";
    this.state.classList.remove("live-on");
    this.choices.hidden = false;
    this.end.textContent = "Close";
    this.changed();
  }

  halt() {
    clearInterval(this.timer);
    this.timer = null;
    const socket = this.socket;
    this.socket = null;
    socket?.close();
    closeStream(this.stream);
    this.stream = null;
    this.video.srcObject = null;
    this.video.hidden = true;
  }

  close() {
    this.halt();
    this.lost("Live was ended.");
    this.panel.replaceChildren();
    this.panel.hidden = true;
    this.changed();
  }
}
