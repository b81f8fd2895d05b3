// Turns as they stand in the conversation: what was asked, and an answer that grows.

import { counts } from "./api.js";
import { figures, unmarked } from "./boxes.js";
import { announce, copyButton, el, icon } from "./dom.js";
import { showMarkdown } from "./markdown.js";

/** A question with its pictures and videos. */
export function questionCard(turn) {
  const media = turn.attachments.map((one) => el("li", {}, preview(one, true)));
  return el(
    "article", { class: "turn user", "aria-label": "You" },
    turn.tag ? el("p", { class: "tag", text: turn.tag }) : null,
    media.length ? el("ul", { class: "media" }, ...media) : null,
    turn.text ? el("p", { class: "said", text: turn.text }) : null,
  );
}

/** A picture or video as the page shows it; what the browser cannot read is shown by name. */
export function preview(attachment, large = false) {
  const fallback = () => el("span", { class: "unseen", text: attachment.name });
  if (attachment.kind === "video") {
    const video = el("video", { src: attachment.preview, preload: "metadata", playsinline: true, "aria-label": attachment.name, controls: large });
    video.muted = true;
    video.addEventListener("error", () => video.replaceWith(fallback()));
    return video;
  }
  const image = el("img", { src: attachment.preview, alt: attachment.name, width: attachment.width, height: attachment.height });
  image.addEventListener("error", () => image.replaceWith(fallback()));
  return image;
}

/** An answer under way. `text` and `reasoning` hold what has arrived. */
export class Reply {
  constructor(onGrow) {
    this.text = "";
    this.reasoning = "";
    this.annotations = [];
    this.usage = null;
    this.finish = null;
    this.onGrow = onGrow;
    this.began = performance.now();
    this.first = this.last = this.answered = 0;
    this.lagUntil = 0;
    this.body = el("div", { class: "text" });
    this.waiting = el("p", { class: "waiting", "aria-label": "Waiting for the answer" }, el("span"), el("span"), el("span"));
    this.extra = el("div", { class: "extra" });
    this.foot = el("footer");
    this.node = el("article", { class: "turn reply busy", "aria-label": "Answer", "aria-busy": "true" }, this.waiting, this.body, this.extra, this.foot);
  }

  /** Takes one event of the stream (a chat.completion.chunk). */
  take(event) {
    if (event.usage) this.usage = event.usage;
    const choice = event.choices?.[0];
    if (!choice) return;
    if (choice.finish_reason) this.finish = choice.finish_reason;
    const delta = choice.delta || choice.message || {};
    const thought = delta.reasoning_content || delta.reasoning || "";
    const said = (delta.content || "") + (delta.refusal || "");
    if (Array.isArray(choice.annotations)) this.annotations.push(...choice.annotations);
    if (!thought && !said) return;
    this.last = performance.now();
    this.first ||= this.last;
    this.reasoning += thought;
    if (said && !this.text) this.answered = this.last;
    this.text += said;
    this.plan();
  }

  /** Draws at most once a frame, and less often when drawing itself takes long. */
  plan() {
    if (this.planned) return;
    this.planned = true;
    const wait = Math.max(0, this.lagUntil - performance.now());
    setTimeout(() => requestAnimationFrame(() => this.draw()), wait);
  }

  draw() {
    this.planned = false;
    const from = performance.now();
    this.waiting.remove();
    if (this.reasoning) this.drawThoughts();
    showMarkdown(this.body, this.annotations.length ? unmarked(this.text) : this.text);
    this.onGrow();
    this.lagUntil = performance.now() + 4 * (performance.now() - from);
  }

  drawThoughts() {
    if (!this.think) {
      this.thoughts = el("div", { class: "thoughts" });
      this.thinkLabel = el("summary", { text: "Thinking…" });
      this.think = el("details", { class: "think", open: true }, this.thinkLabel, this.thoughts);
      this.thinkLabel.addEventListener("click", () => { this.folded = true; });
      this.body.before(this.think);
    }
    showMarkdown(this.thoughts, this.reasoning);
    if (!this.text && !this.ended) return;
    this.thinkLabel.textContent = `Thought for ${seconds((this.answered || this.last) - this.first)}`;
    if (this.text && !this.folded) {
      this.folded = true; // once: from here on it is the reader's
      this.think.open = false;
    }
  }

  /** The stream is over: by itself, stopped by the reader, or broken by an error. */
  end({ stopped = false, error = null, pictures = [], again }) {
    this.ended = true;
    this.draw();
    this.node.classList.remove("busy");
    this.node.removeAttribute("aria-busy");
    this.extra.append(...figures(this.annotations, pictures));
    if (error) this.extra.append(problem(error));
    else if (!this.text && !stopped) this.extra.append(el("p", { class: "empty", text: "The answer is empty." }));
    const actions = el("div", { class: "actions" });
    if (this.text) actions.append(copyButton("Copy", () => this.text));
    actions.append(el("button", { type: "button", class: "quiet again", onclick: again }, icon("retry"), "Try again"));
    this.foot.append(el("p", { class: "stats" }, ...this.stats(stopped)), actions);
    if (error) announce("");
    else announce(`${stopped ? "Stopped. " : ""}${this.text.slice(0, 2000) || "The answer is empty."}`);
    this.onGrow();
  }

  /** What was counted, each count in a piece that is not broken between lines. */
  stats(stopped) {
    const found = counts(this.usage);
    const number = (value) => value.toLocaleString("en");
    const parts = [];
    if (stopped) parts.push("stopped");
    if (this.finish === "length") parts.push("cut off at the most tokens");
    if (found.prompt_tokens) parts.push(`${number(found.prompt_tokens)} tokens in`);
    if (found.image_tokens) parts.push(`${number(found.image_tokens)} of pictures`);
    if (found.video_tokens) parts.push(`${number(found.video_tokens)} of video`);
    if (found.frames) parts.push(found.frames === 1 ? "1 frame" : `${number(found.frames)} frames`);
    if (found.completion_tokens) parts.push(`${number(found.completion_tokens)} out`);
    const rate = this.rate(found.completion_tokens);
    if (rate) parts.push(`${rate} tokens/s`);
    if (this.first) parts.push(`first after ${seconds(this.first - this.began)}`);
    return parts.flatMap((part, index) => [index ? " " : "", el("span", { text: index < parts.length - 1 ? `${part} ·` : part })]);
  }

  /** Tokens per second after the first, as text; empty when there is too little to tell. */
  rate(tokens) {
    const taken = (this.last - this.first) / 1000;
    if (tokens < 2 || taken < 0.02) return "";
    const rate = (tokens - 1) / taken;
    return rate < 10 ? rate.toFixed(1) : Math.round(rate).toLocaleString("en");
  }
}

const seconds = (milliseconds) => `${(Math.max(0, milliseconds) / 1000).toFixed(1)} s`;

/** An error where it happened, in the server's words. */
export function problem(error) {
  const about = error.param ? el("p", { class: "about" }, "About ", el("code", { text: String(error.param) })) : null;
  return el("div", { class: "problem", role: "alert" }, el("p", { text: error.message }), about);
}
