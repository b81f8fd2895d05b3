// Example pictures, drawn here so that anyone can try the page with one click and nothing is fetched.

const FONT = '"Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif';

function canvas(width, height, colour) {
  const node = document.createElement("canvas");
  node.width = width;
  node.height = height;
  const context = node.getContext("2d");
  context.fillStyle = colour;
  context.fillRect(0, 0, width, height);
  return [node, context];
}

function sign() {
  const [node, c] = canvas(480, 320, "#dfe9ec");
  c.fillStyle = "#c9d8cf";
  c.fillRect(0, 236, 480, 84);
  c.fillStyle = "#7b8487";
  c.fillRect(150, 170, 14, 150);
  c.fillRect(316, 170, 14, 150);
  c.fillStyle = "#14584f";
  c.beginPath();
  c.roundRect(54, 66, 372, 128, 14);
  c.fill();
  c.strokeStyle = "#ffffff";
  c.lineWidth = 5;
  c.beginPath();
  c.roundRect(64, 76, 352, 108, 9);
  c.stroke();
  c.fillStyle = "#ffffff";
  c.font = `bold 50px ${FONT}`;
  c.textAlign = "center";
  c.textBaseline = "middle";
  c.fillText("OPEN TODAY", 240, 132, 330);
  return node;
}

function shapes() {
  const [node, c] = canvas(480, 320, "#ffffff");
  const fill = (colour, path) => {
    c.fillStyle = colour;
    c.beginPath();
    path();
    c.fill();
  };
  fill("#d62828", () => c.arc(122, 112, 62, 0, 7));
  fill("#1d5fd1", () => c.rect(262, 54, 132, 116));
  fill("#208b3a", () => { c.moveTo(116, 286); c.lineTo(216, 286); c.lineTo(166, 200); });
  fill("#e8a90c", () => c.arc(336, 244, 42, 0, 7));
  return node;
}

function chart() {
  const [node, c] = canvas(480, 320, "#ffffff");
  const bars = [["Mon", 42], ["Tue", 68], ["Wed", 55], ["Thu", 91], ["Fri", 74]];
  c.strokeStyle = "#333333";
  c.lineWidth = 2;
  c.beginPath();
  c.moveTo(46, 40);
  c.lineTo(46, 270);
  c.lineTo(450, 270);
  c.stroke();
  c.textAlign = "center";
  bars.forEach(([day, value], index) => {
    const x = 66 + index * 77;
    const height = value * 2.2;
    c.fillStyle = "#2a7f9e";
    c.fillRect(x, 270 - height, 52, height);
    c.fillStyle = "#222222";
    c.font = `18px ${FONT}`;
    c.fillText(day, x + 26, 294);
    c.fillText(String(value), x + 26, 262 - height);
  });
  return node;
}

export const SAMPLES = [
  { name: "sign.png", title: "Read a sign", question: "What does the sign say?", paint: sign },
  { name: "shapes.png", title: "Find a shape", question: "Where is the red circle?", paint: shapes },
  { name: "chart.png", title: "Read a chart", question: "Which bar is the highest?", paint: chart },
];

/** The picture of an example as a file. */
export async function sampleFile(sample) {
  const blob = await new Promise((resolve) => sample.paint().toBlob(resolve, "image/png"));
  return new File([blob], sample.name, { type: "image/png" });
}
