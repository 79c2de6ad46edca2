// Try it: an image that is dropped on the box is answered by teacher and student side by side.

import { h, json, percent } from "./common.js";

const PAUSE_MS = 1000;
const MODELS = [["teacher", "Teacher"], ["student", "Student"], ["alone", "Student alone"]];

/** A box that sends an image to POST /v1/jobs/{id}/predict and shows the answer. */
export function predictBox(at, signal) {
  const input = h("input", { type: "file", id: "image", accept: "image/*", onchange: () => send(input.files[0]) });
  const canvas = h("canvas", { width: 160, height: 160, hidden: true, role: "img", "aria-label": "The image that was sent" });
  const status = h("p", { class: "quiet", role: "status" });
  const answer = h("div", { class: "answers" });
  const zone = h("div", { class: "zone" },
    canvas, h("p", null, "Drop an image here, or ", h("label", { for: "image", class: "button" }, "choose a file"), input), status);
  const over = (is) => (event) => {
    event.preventDefault();
    zone.classList.toggle("over", is);
  };
  zone.addEventListener("dragover", over(true));
  zone.addEventListener("dragleave", over(false));
  zone.addEventListener("drop", (event) => {
    over(false)(event);
    send(event.dataTransfer.files[0]);
  });
  // A drop beside the box would open the image in the place of the page.
  for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault(), { signal });
  let latest = 0;

  async function send(file) {
    if (!file) return;
    const number = ++latest;
    const say = (text) => { if (number === latest) status.textContent = text; };
    answer.replaceChildren();
    say("Waiting for the answer of a worker …");
    preview(file, () => number === latest);
    try {
      const found = await predicted(file, say);
      if (number !== latest) return;
      say([file.name, found.image && `shown to the networks: ${found.image.shown}`].filter(Boolean).join("; "));
      answer.replaceChildren(...answers(found));
    } catch (error) {
      if (!signal.aborted) say([error.message, error.body?.hint].filter(Boolean).join(" "));
    } finally {
      input.value = ""; // So that the same file can be chosen again.
    }
  }

  /** The image in its own proportions. What the browser cannot show is sent all the same: the worker says what is wrong. */
  async function preview(file, isLatest) {
    const image = await createImageBitmap(file).catch(() => null);
    if (!isLatest()) return;
    canvas.hidden = !image;
    if (!image) return;
    const size = 160 / Math.max(image.width, image.height);
    canvas.width = Math.max(1, Math.round(image.width * size));
    canvas.height = Math.max(1, Math.round(image.height * size));
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = size < 1;
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
  }

  async function predicted(file, say) {
    const headers = { "Content-Type": "application/octet-stream" };
    let found = await json(`${at}/predict`, { method: "POST", body: file, headers, signal });
    // The request has waited as long as it may: the prediction is asked for until it has an answer.
    while (["waiting", "running"].includes(found.state)) {
      say(found.message ? `Waiting: ${found.message}` : "Waiting for the answer of a worker …");
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
      found = await json(`/v1/predictions/${encodeURIComponent(found.id)}`, { signal });
    }
    if (found.state === "failed") throw new Error([found.error.message, found.error.hint].filter(Boolean).join(" "));
    return found.answer;
  }

  return [h("h2", null, "Try it"), h("div", { class: "try" }, zone, answer)];
}

/** The top classes of each model with their probabilities, whether teacher and student agree, and what is to be known. */
function answers(found) {
  const models = MODELS.filter(([name]) => found[name]).map(([name, heading]) => h("section", { class: "answer" },
    h("h3", null, heading, found[name].architecture && h("span", { class: "models" }, found[name].architecture)),
    h("ol", null, found[name].top.map(bar))));
  const agree = { true: "Teacher and student agree.", false: "Teacher and student differ." }[found.agree];
  return [...models, h("p", { class: "quiet" }, [agree, ...(found.notes || []).map((note) => `Note: ${note}.`)].filter(Boolean).join(" "))];
}

function bar({ class: name, probability }) {
  const fill = h("i");
  fill.style.width = `${100 * probability}%`;
  return h("li", null, h("span", { class: "of" }, name), h("span", { class: "number" }, percent(probability)), h("div", { class: "chance" }, fill));
}
