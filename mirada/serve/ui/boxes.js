// Boxes and points of an answer, drawn over the picture they speak of, with a list that says the same in words.

import { el } from "./dom.js";

const SMALL = 336;

/** Annotations that can be drawn: {type: "box", box: [x1, y1, x2, y2]} or {type: "point", point: [x, y]}, pixels of the picture. */
export function usable(annotations) {
  const numbers = (list, count) => Array.isArray(list) && list.length === count && list.every(Number.isFinite);
  return (Array.isArray(annotations) ? annotations : []).filter(
    (one) => (one?.type === "box" && numbers(one.box, 4)) || (one?.type === "point" && numbers(one.point, 2)),
  );
}

/** One figure per picture that is spoken of; `pictures` are the conversation's, in order. */
export function figures(annotations, pictures) {
  const groups = new Map();
  for (const one of usable(annotations)) {
    const picture = pictures[one.image ?? 0];
    if (!picture) continue;
    if (!groups.has(picture)) groups.set(picture, []);
    groups.get(picture).push(one);
  }
  return [...groups].map(([picture, marks]) => figure(picture, marks));
}

function figure(picture, marks) {
  const image = el("img", { src: picture.preview, alt: `${picture.name}, with ${marks.length === 1 ? "one mark" : `${marks.length} marks`}` });
  const layer = el("div", { class: "marks", "aria-hidden": "true" });
  const stage = el("div", { class: "stage" }, image, layer);
  const list = el("ol", { class: "legend" });
  const toggle = el("button", { type: "button", class: "quiet", "aria-pressed": "true", text: "Marks" });
  toggle.addEventListener("click", () => {
    layer.hidden = !layer.hidden;
    toggle.setAttribute("aria-pressed", String(!layer.hidden));
  });
  const lay = () => {
    const width = picture.width || image.naturalWidth;
    const height = picture.height || image.naturalHeight;
    if (!width || !height) return;
    if (width < SMALL) image.style.width = `${SMALL}px`; // marks need room
    layer.replaceChildren();
    list.replaceChildren();
    marks.forEach((mark, index) => place(mark, index, layer, list, width, height));
  };
  if (image.complete) lay();
  image.addEventListener("load", lay);
  return el("figure", { class: "boxes" }, stage, el("figcaption", {}, toggle, list));
}

function place(mark, index, layer, list, width, height) {
  const percent = (value, whole) => `${(100 * Math.min(Math.max(value, 0), whole)) / whole}%`;
  const name = String(mark.label || `${mark.type} ${index + 1}`);
  const [x1, y1, x2, y2] = mark.type === "box" ? mark.box : [...mark.point, ...mark.point];
  const shape = el("div", { class: mark.type }, el("span", { text: name }));
  shape.style.left = percent(Math.min(x1, x2), width);
  shape.style.top = percent(Math.min(y1, y2), height);
  if (mark.type === "box") {
    shape.style.right = percent(width - Math.max(x1, x2), width);
    shape.style.bottom = percent(height - Math.max(y1, y2), height);
    if (Math.min(y1, y2) < 0.08 * height) shape.classList.add("below");
  }
  if (Math.min(x1, x2) > 0.5 * width) shape.classList.add("leftward");
  layer.append(shape);
  const item = el("li", {}, el("strong", { text: name }), ` ${(mark.box || mark.point).map(Math.round).join(", ")}`);
  item.addEventListener("pointerenter", () => shape.classList.add("lit"));
  item.addEventListener("pointerleave", () => shape.classList.remove("lit"));
  list.append(item);
}
