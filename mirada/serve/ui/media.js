// Pictures and videos on their way into a message.

/** Above either limit a picture is made smaller before it is sent; the models look at far fewer pixels in any case. */
export const MAX_SIDE = 4096;
export const MAX_PIXELS = 12_000_000;

export const isMedia = (file) => /^(image|video)\//.test(file.type);

/**
 * Makes an attachment of a file: {kind, name, url (data URI), preview (object URL), width, height, note, saved}.
 * Throws an Error with a sentence for the reader when the file is neither a picture nor a video.
 */
export async function attach(file, saved = true) {
  if (!isMedia(file)) throw new Error(`${file.name || "The file"} is neither a picture nor a video.`);
  if (file.size === 0) throw new Error(`${file.name || "The file"} is empty.`);
  const kind = file.type.startsWith("video/") ? "video" : "image";
  const made = kind === "image" ? await fit(file) : { blob: file };
  const blob = made.blob;
  return {
    kind,
    name: file.name || `${kind}.${extension(blob.type)}`,
    url: await dataUrl(blob),
    preview: URL.createObjectURL(blob),
    width: made.width,
    height: made.height,
    note: made.note || "",
    saved: saved && blob === file && Boolean(file.name),
  };
}

/** A picture no larger than the limits, turned upright as its EXIF says when it is drawn anew. */
async function fit(file) {
  if (file.type === "image/gif") return { blob: file };
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    return { blob: file }; // a form that this browser cannot read; the server may, or says why not
  }
  const { width, height } = bitmap;
  const scale = Math.min(1, MAX_SIDE / Math.max(width, height), Math.sqrt(MAX_PIXELS / (width * height)));
  if (scale === 1) {
    bitmap.close();
    return { blob: file, width, height };
  }
  const size = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
  const blob = await draw(bitmap, ...size, file.type === "image/png" ? "image/png" : "image/jpeg");
  bitmap.close();
  return { blob, width: size[0], height: size[1], note: `made smaller, ${width} × ${height} to ${size[0]} × ${size[1]}` };
}

/** Draws a bitmap, video or canvas at a size and encodes it. */
export async function draw(source, width, height, type = "image/jpeg", quality = 0.92) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, width, height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, type, quality));
  if (!blob) throw new Error("The browser could not encode the picture.");
  return blob;
}

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file could not be read."));
    reader.readAsDataURL(blob);
  });
}

const extension = (type) => (type.split("/")[1] || "bin").replace(/[^\w]/g, "").replace("jpeg", "jpg");

/** Releases what the browser holds for it. */
export const release = (attachment) => URL.revokeObjectURL(attachment.preview);

/** The camera's or screen's stream, or an Error whose sentence says why not. */
export async function openStream(what) {
  const devices = navigator.mediaDevices;
  if (!devices) throw new Error("The browser gives pages the camera only over https or on localhost.");
  try {
    return what === "screen"
      ? await devices.getDisplayMedia({ video: true, audio: false })
      : await devices.getUserMedia({ video: { width: { ideal: 1280 }, height: { ideal: 720 } }, audio: false });
  } catch (error) {
    const reasons = { NotAllowedError: "The browser did not allow it.", NotFoundError: "No camera was found.", NotReadableError: "Another program holds the camera." };
    throw new Error(reasons[error.name] || `It could not be opened: ${error.message}`);
  }
}

export const closeStream = (stream) => stream?.getTracks().forEach((track) => track.stop());
