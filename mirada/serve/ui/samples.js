// Example pictures, drawn here so that anyone can try the page with one click and nothing is fetched.

const FONT = '"Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif';

const fill = (c, colour, path) => {
  c.fillStyle = colour;
  c.beginPath();
  path();
  c.fill();
};

function sign(c) {
  fill(c, "#145a3c", () => c.rect(0, 0, 112, 28));
  c.fillStyle = "#ffffff";
  c.font = `19px ${FONT}`;
  c.textAlign = "center";
  c.textBaseline = "middle";
  c.fillText("Station 42", 56, 15, 102);
}

function paper(c) {
  fill(c, "#ffffff", () => c.rect(0, 0, 168, 112));
}

function shapes(c) {
  paper(c);
  fill(c, "#dc2828", () => c.arc(30, 56, 20, 0, 7));
  fill(c, "#2850dc", () => c.rect(66, 38, 37, 37));
  fill(c, "#28a03c", () => { c.moveTo(138, 34); c.lineTo(118, 76); c.lineTo(158, 76); });
}

function scene(c) {
  paper(c);
  fill(c, "#e6b41e", () => c.arc(44, 34, 19, 0, 7));
  fill(c, "#2850dc", () => c.arc(124, 34, 19, 0, 7));
  fill(c, "#dc2828", () => c.rect(106, 70, 36, 36));
  fill(c, "#28a03c", () => { c.moveTo(44, 66); c.lineTo(24, 106); c.lineTo(64, 106); });
}

/** Small, for the model inside the package reads small pictures best; `paint` draws in these pixels at any scale. */
export const SAMPLES = [
  { name: "sign.png", size: [112, 28], title: "Read a sign", question: "What does the sign say?", paint: sign },
  { name: "shapes.png", size: [168, 112], title: "Find a shape", question: "Is there a green triangle?", paint: shapes },
  { name: "scene.png", size: [168, 112], title: "Count shapes", question: "How many circles are there?", paint: scene },
];

/** A canvas with the example, `scale` times its own size. */
export function sampleCanvas(sample, scale = 1) {
  const node = document.createElement("canvas");
  [node.width, node.height] = sample.size.map((side) => side * scale);
  const context = node.getContext("2d");
  context.scale(scale, scale);
  sample.paint(context);
  return node;
}

/** The picture of an example as a file. */
export async function sampleFile(sample) {
  const blob = await new Promise((resolve) => sampleCanvas(sample).toBlob(resolve, "image/png"));
  return new File([blob], sample.name, { type: "image/png" });
}
