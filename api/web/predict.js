// Try it: an image that is dropped on the box is answered by teacher and student side by side.

import { h, json, percent, request } from "./common.js";

const PAUSE_MS = 500;
const MODELS = [["teacher", "Teacher"], ["student", "Student"], ["alone", "Student alone"]];

/** A box that sends an image to POST /v1/jobs/{id}/predict and shows the answer. */
export function predictBox(at, signal) {
  const input = h("input", { type: "file", id: "image", accept: "image/png,image/jpeg,image/webp", onchange: () => send(input.files[0]) });
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
  let latest = 0;

  async function send(file) {
    if (!file) return;
    const number = ++latest;
    const say = (text) => { if (number === latest) status.textContent = text; };
    answer.replaceChildren();
    say("Waiting for the answer of a worker …");
    preview(file, () => number === latest);
    try {
      const found = await predicted(file);
      if (number !== latest) return;
      say([file.name, found.image && `shown to the networks: ${found.image.shown}`].filter(Boolean).join("; "));
      answer.replaceChildren(...answers(found));
    } catch (error) {
      if (!signal.aborted) say(error instanceof TypeError ? "no answer from the service" : error.message);
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

  async function predicted(file) {
    const headers = { "Content-Type": "application/octet-stream" };
    const first = await request(`${at}/predict`, { method: "POST", body: file, headers, signal });
    let job = await first.json();
    // 202: no worker was free in time. The job of the prediction is polled until it has ended.
    while (first.status === 202 && !job.result) {
      if (["failed", "cancelled"].includes(job.status)) throw new Error(job.error?.message || `the prediction was ${job.status}`);
      status.textContent = job.waiting?.message ? `Waiting: ${job.waiting.message}` : "Waiting for the answer of a worker …";
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
      job = await json(first.headers.get("Location") || job.links.self, { signal });
    }
    return job.result || job;
  }

  return [h("h2", null, "Try it"), h("div", { class: "try" }, zone, answer)];
}

/** The top classes of each model with their probabilities, whether teacher and student agree, and what is to be known. */
export function answers(found) {
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
