// Small helpers to build the page. Text always enters as text nodes: nothing here, or anywhere else, parses HTML.

export const byId = (id) => document.getElementById(id);

/** An element with properties (`class`, `text`, `on…`, or attributes) and children; null children are left out. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  node.append(...children);
  return node;
}

export const icon = (name) => svg("svg", { "aria-hidden": "true" }, svg("use", { href: `#i-${name}` }));

/** A button that shows an icon and is named for those who do not see it. */
export function iconButton(name, label, act) {
  return el("button", { type: "button", class: "icon small", "aria-label": label, title: label, onclick: act }, icon(name));
}

/** Says something to a screen reader without showing it. */
export function announce(text) {
  byId("status").textContent = text;
}

/** A button that copies what `text()` gives, and says that it did. */
export function copyButton(label, text) {
  const button = el("button", { type: "button", class: "quiet" }, icon("copy"), label);
  button.addEventListener("click", async () => {
    const done = await copy(text());
    button.lastChild.textContent = done ? "Copied" : "Could not copy";
    announce(button.lastChild.textContent);
    setTimeout(() => { button.lastChild.textContent = label; }, 1600);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text); // without https there is no clipboard interface
  }
}

function copyBySelection(text) {
  const area = el("textarea", { class: "sr", "aria-hidden": "true" });
  area.value = text;
  (document.querySelector("dialog[open]") || document.body).append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}
