// Markdown to DOM nodes. Text of a model is not trusted: it only ever becomes text nodes, links go to http, https or
// mailto alone, and pictures in it are shown as links (loading one would tell a third party who reads).

import { copyButton, el } from "./dom.js";

/** Splits a text into blocks at blank lines; fenced code stays whole. A block that is complete never changes any more. */
export function splitBlocks(text) {
  const blocks = [];
  let lines = [];
  let fence = null;
  const flush = () => {
    if (lines.length) blocks.push(lines.join("\n"));
    lines = [];
  };
  for (const line of text.replace(/\r\n?/g, "\n").split("\n")) {
    const mark = /^ {0,3}(`{3,}|~{3,})(.*)$/.exec(line);
    if (fence) {
      lines.push(line);
      if (mark && mark[1][0] === fence[0] && mark[1].length >= fence.length && !mark[2].trim()) {
        fence = null;
        flush();
      }
    } else if (mark) {
      flush();
      fence = mark[1];
      lines.push(line);
    } else if (!line.trim()) flush();
    else lines.push(line);
  }
  flush();
  return blocks;
}

/** Shows `text` in `root`; blocks that are unchanged since the last call stay as they are (selections live on). */
export function showMarkdown(root, text) {
  const blocks = splitBlocks(text);
  const shown = root.blocks || [];
  let same = 0;
  while (same < blocks.length && same < shown.length && blocks[same] === shown[same].source) same += 1;
  for (const { nodes } of shown.splice(same)) for (const node of nodes) node.remove();
  for (const source of blocks.slice(same)) {
    const nodes = renderBlock(source);
    root.append(...nodes);
    shown.push({ source, nodes });
  }
  root.blocks = shown;
}

function renderBlock(source) {
  const lines = source.split("\n");
  if (/^ {0,3}(`{3,}|~{3,})/.test(lines[0])) return [codeBlock(lines)];
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    const [node, next] = renderLines(lines, at);
    nodes.push(node);
    at = next;
  }
  return nodes;
}

const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

function renderLines(lines, at) {
  const heading = HEADING.exec(lines[at]);
  if (heading) return [el(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(heading[2])), at + 1];
  if (RULE.test(lines[at])) return [el("hr"), at + 1];
  if (QUOTE.test(lines[at])) return quote(lines, at);
  if (ITEM.test(lines[at])) return list(lines, at);
  if (isTable(lines, at)) return table(lines, at);
  return paragraph(lines, at);
}

const isTable = (lines, at) => at + 1 < lines.length && lines[at].includes("|") && TABLE_RULE.test(lines[at + 1]);

function paragraph(lines, at) {
  const node = el("p");
  let end = at;
  while (end < lines.length && (end === at || !(HEADING.test(lines[end]) || RULE.test(lines[end]) || QUOTE.test(lines[end]) || ITEM.test(lines[end]) || isTable(lines, end)))) {
    if (end > at) node.append(el("br"));
    node.append(...inline(lines[end].trim()));
    end += 1;
  }
  return [node, end];
}

function quote(lines, at) {
  const inner = [];
  let end = at;
  for (let found; end < lines.length && (found = QUOTE.exec(lines[end])); end += 1) inner.push(found[1]);
  // Marks of quotes inside are shown as they are: nesting by recursion would let a text choose the depth of the stack.
  const [node] = paragraph(inner.map((line) => line.replace(/^(?=[#>\-*+\d|])/, "\u200b")), 0);
  return [el("blockquote", {}, node), end];
}

/** Lists, nested by indentation up to six deep. */
function list(lines, at) {
  const make = (mark) => (/\d/.test(mark) ? el("ol", { start: Number.parseInt(mark, 10) }) : el("ul"));
  const first = ITEM.exec(lines[at]);
  const stack = [{ indent: first[1].length, node: make(first[2]) }];
  const root = stack[0].node;
  let end = at;
  for (; end < lines.length; end += 1) {
    const found = ITEM.exec(lines[end]);
    const top = stack[stack.length - 1];
    if (!found) {
      if (!/^\s/.test(lines[end]) && (HEADING.test(lines[end]) || QUOTE.test(lines[end]))) break;
      top.node.lastChild.append(" ", ...inline(lines[end].trim()));
      continue;
    }
    const indent = found[1].length;
    while (stack.length > 1 && indent < stack[stack.length - 1].indent) stack.pop();
    if (indent >= stack[stack.length - 1].indent + 2 && stack.length < 6) {
      const node = make(found[2]);
      stack[stack.length - 1].node.lastChild.append(node);
      stack.push({ indent, node });
    }
    stack[stack.length - 1].node.append(el("li", {}, ...inline(found[3])));
  }
  return [root, end];
}

function table(lines, at) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const head = el("tr", {}, ...cells(lines[at]).map((cell) => el("th", { scope: "col" }, ...inline(cell))));
  const body = el("tbody");
  let end = at + 2;
  for (; end < lines.length && lines[end].includes("|"); end += 1) {
    body.append(el("tr", {}, ...cells(lines[end]).map((cell) => el("td", {}, ...inline(cell)))));
  }
  const node = el("table", {}, el("thead", {}, head), body);
  return [el("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Table" }, node), end];
}

function codeBlock(lines) {
  const language = /^ {0,3}(?:`{3,}|~{3,})\s*([\w+#.-]{0,30})/.exec(lines[0])[1];
  const closed = lines.length > 1 && /^ {0,3}(`{3,}|~{3,})\s*$/.test(lines[lines.length - 1]);
  return codeFigure(lines.slice(1, closed ? -1 : undefined).join("\n"), language);
}

/** Code with its language and a button that copies it. */
export function codeFigure(code, language) {
  const head = el("div", { class: "code-head" }, el("span", { text: language || "text" }), copyButton("Copy", () => code));
  const body = el("pre", { tabindex: "0", role: "region", "aria-label": language ? `Code, ${language}` : "Code" }, el("code", { text: code }));
  return el("div", { class: "code" }, head, body);
}

// One alternative per form; each is linear: no quantifier inside another over the same characters.
const INLINE = /(`{1,8})([^`]+)\1(?!`)|!?\[([^[\]\n]{1,500})\]\(([^()\s]{1,2000})\)|(\*\*|__)(?=\S)([^*_\n]{1,2000}?)\5|(?<![\w*])\*(?=[^\s*])([^*\n]{1,2000})\*|(?<![\w_])_(?=[^\s_])([^_\n]{1,2000})_(?!\w)|~~([^~\n]{1,2000})~~|\bhttps?:\/\/[^\s<>()"'`\]]{1,2000}/g;

/** Nodes of one line: code, links, bold, italic, struck out. */
export function inline(text, depth = 0) {
  const nodes = [];
  let from = 0;
  for (const found of text.matchAll(INLINE)) {
    if (found.index > from) nodes.push(text.slice(from, found.index));
    nodes.push(inlineNode(found, depth));
    from = found.index + found[0].length;
  }
  if (from < text.length) nodes.push(text.slice(from));
  return nodes;
}

function inlineNode(found, depth) {
  const [whole, , code, label, target, , bold, star, under, struck] = found;
  const inside = (text) => (depth < 4 ? inline(text, depth + 1) : [text]);
  if (code !== undefined) return el("code", { text: code.trim() });
  if (label !== undefined) return link(target, label, whole);
  if (bold !== undefined) return el("strong", {}, ...inside(bold));
  if (star !== undefined || under !== undefined) return el("em", {}, ...inside(star ?? under));
  if (struck !== undefined) return el("s", {}, ...inside(struck));
  const tail = /[.,;:!?]*$/.exec(whole)[0];
  const address = whole.slice(0, whole.length - tail.length);
  return el("span", {}, link(address, address, address), tail);
}

function link(target, label, otherwise) {
  let address = null;
  try {
    address = new URL(target);
  } catch { /* not an address: stays text */ }
  if (!address || !["http:", "https:", "mailto:"].includes(address.protocol)) return otherwise;
  return el("a", { href: address.href, target: "_blank", rel: "noopener noreferrer nofollow", text: label });
}
