// Boxes and points of an answer, drawn over the picture they speak of, with a list that says the same in words.

import { el, svg } from "./dom.js";

const SMALL = 336;
const COLOURS = 6; // that the style sheet has

/** Annotations that can be drawn, in pixels of the picture: a box [x1, y1, x2, y2], a point [x, y], or a polygon's points [[x, y], ...]. */
export function usable(annotations) {
  const numbers = (list, count) => Array.isArray(list) && list.length === count && list.every(Number.isFinite);
  return (Array.isArray(annotations) ? annotations : []).filter(
    (one) => one?.video === undefined // what a video shows at some second is not drawn
      && ((one?.type === "box" && numbers(one.box, 4))
      || (one?.type === "point" && numbers(one.point, 2))
      || (one?.type === "polygon" && Array.isArray(one.points) && one.points.length > 2 && one.points.every((point) => numbers(point, 2)))),
  );
}

/** An answer as a reader wants it: marks that are drawn are left out, and of labels only the words stay. */
export const unmarked = (text) =>
  text
    .replace(/<\|(box|quad|point)_start\|>[^<]*(<\|\1_end\|>|$)/g, "")
    .replace(/<\|(?:object_ref|ocr_text)_(?:start|end)\|>/g, "");

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
    const [width, height] = marks[0].size || [picture.width || image.naturalWidth, picture.height || image.naturalHeight];
    if (!width || !height) return;
    if (width < SMALL) image.style.width = `${SMALL}px`; // marks need room
    layer.replaceChildren();
    list.replaceChildren();
    marks.forEach((mark, index) => place(mark, index, layer, list, width, height));
    requestAnimationFrame(() => keepApart(layer)); // once it is laid out
  };
  if (image.complete) lay();
  image.addEventListener("load", lay);
  return el("figure", { class: "boxes" }, stage, el("figcaption", {}, toggle, list));
}

function place(mark, index, layer, list, width, height) {
  const percent = (value, whole) => `${(100 * Math.min(Math.max(value, 0), whole)) / whole}%`;
  const name = String(mark.label || `${mark.type} ${index + 1}`);
  const points = mark.type === "box" ? [mark.box.slice(0, 2), mark.box.slice(2)] : mark.type === "point" ? [mark.point] : mark.points;
  const [xs, ys] = [0, 1].map((axis) => points.map((point) => point[axis]));
  const [left, top, right, bottom] = [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
  const shape = el("div", { class: `${mark.type} c${index % COLOURS}` }, el("span", { text: name }));
  shape.style.left = percent(left, width);
  shape.style.top = percent(top, height);
  if (mark.type !== "point") {
    shape.style.right = percent(width - right, width);
    shape.style.bottom = percent(height - bottom, height);
    if (top < 0.08 * height) shape.classList.add("below");
  }
  if (mark.type === "polygon") shape.append(outline(points, left, top, right, bottom));
  layer.append(shape);
  const item = el("li", { class: `c${index % COLOURS}` }, el("strong", { text: name }), ` ${points.flat().map(Math.round).join(", ")}`);
  item.addEventListener("pointerenter", () => shape.classList.add("lit"));
  item.addEventListener("pointerleave", () => shape.classList.remove("lit"));
  list.append(item);
}

/** Names that would leave the picture begin further left; one that would lie on another goes under its mark, or into it. */
function keepApart(layer) {
  const { right: edge, bottom } = layer.getBoundingClientRect();
  const placed = [];
  const covers = (one, other) => one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom;
  for (const shape of layer.children) {
    const name = shape.querySelector("span");
    if (name.getBoundingClientRect().right > edge) shape.classList.add("leftward");
    const fits = () => {
      const own = name.getBoundingClientRect();
      return own.bottom <= bottom && !placed.some((other) => covers(own, other));
    };
    for (const where of ["under", "below"]) {
      if (fits()) break;
      shape.classList.remove("under");
      shape.classList.add(where);
    }
    placed.push(name.getBoundingClientRect());
  }
}

/** The sides of a polygon, stretched over the box around it. */
function outline(points, left, top, right, bottom) {
  const around = `${left} ${top} ${Math.max(right - left, 1)} ${Math.max(bottom - top, 1)}`;
  const corners = points.map((point) => point.join(",")).join(" ");
  return svg("svg", { viewBox: around, preserveAspectRatio: "none" }, svg("polygon", { points: corners }));
}
