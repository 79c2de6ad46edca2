// The form for a new job: its spec as JSON, from an earlier job or from an example, checked before it is sent.

import { bytes, count, dataset, duration, h, post, request, show, short, warningTexts } from "./common.js";

const EXAMPLE = { name: "first job", dataset: "digits", student: "convnet16", method: "supervised", training: { epochs: 20 } };
const MOST_CHANGES = 20;

export async function submitPage(main, from, signal, showError) {
  const text = h("textarea", { id: "spec-text", name: "spec", spellcheck: "false", autocapitalize: "off", rows: 24, "aria-describedby": "spec-help", oninput: changed });
  const notice = h("p", { class: "notice", role: "alert" });
  const changes = h("div", { class: "changes" });
  const findings = h("div", { class: "job", role: "status" });
  const buttons = ["Check", "Submit"].map((name) => h("button", { type: name === "Submit" ? "submit" : "button", onclick: name === "Check" ? () => check({ probe: true }) : null }, name));
  const heading = h("h1", null, from ? "Again with changes" : "New job");
  const source = h("p", { class: "quiet" });
  let original = from ? null : EXAMPLE;
  let sendKey = newKey();
  document.title = `${from ? "Again with changes" : "New job"} · Distillery`;
  main.append(h("div", { class: "heading" }, heading), h("div", { class: "two submit" },
    h("form", { class: "card", onsubmit: submit },
      h("label", { for: "spec-text" }, "Spec"), text,
      h("p", { id: "spec-help", class: "quiet" }, "JSON, as POST /v1/jobs takes it. The fields are in the ", h("a", { href: "/docs#JobSpec" }, "reference"), "."),
      source, h("div", { class: "row" }, buttons), notice),
    h("div", { class: "job" }, changes, findings)));
  try {
    if (from) {
      const job = parsed(await (await request(`/v1/jobs/${encodeURIComponent(from)}`, { signal })).text());
      if (job.kind !== "distillation") throw new Error(`A job of the kind ${job.kind} is not sent with this form.`);
      original = job.spec;
      source.replaceChildren("As it was sent for ", h("a", { href: `#/jobs/${job.id}` }, job.name || job.id), dataset(job) ? `, data ${dataset(job)}.` : ".");
    }
    showError(null);
  } catch (error) {
    if (signal.aborted) return;
    if (error.status) showError(error);
    notice.textContent = error.message;
    return;
  }
  text.value = JSON.stringify(original, null, 2);
  text.focus();
  text.setSelectionRange(0, 0);
  if (from) check({ probe: false }); // A probe trains some steps, which is asked for by the button.

  /** True if the text is a JSON object; else what is wrong with it is said. */
  function isSpec() {
    try {
      if (!isObject(JSON.parse(text.value))) throw new Error("a spec is an object: { … }");
      return true;
    } catch (error) {
      notice.textContent = `This is no JSON that a job can be made from: ${error.message}`;
      return false;
    }
  }

  function changed() {
    notice.textContent = "";
    sendKey = newKey(); // Another spec is another job.
    let value;
    try { value = parsed(text.value); } catch { return; }
    if (!from) return;
    const found = differences(original, value);
    show(changes, found, () => found.length > 0 && h("section", { class: "card" }, h("h2", null, found.length === 1 ? "1 change" : `${found.length} changes`),
      h("ul", { class: "plain" }, found.slice(0, MOST_CHANGES).map(([place, before, after]) => h("li", null,
        h("span", { class: "mono" }, place || "/"), " ", h("span", { class: "quiet" }, before), " → ", h("span", { class: "changed" }, after)))),
      found.length > MOST_CHANGES && h("p", { class: "quiet" }, `and ${found.length - MOST_CHANGES} more`)));
  }

  async function busy(work) {
    notice.textContent = "";
    buttons.forEach((button) => { button.disabled = true; });
    try {
      await work();
    } catch (error) {
      if (signal.aborted) return;
      if (error.body?.errors?.length) show(findings, [Math.random()], () => faults(error.body.errors));
      notice.textContent = error.message;
    } finally {
      buttons.forEach((button) => { button.disabled = false; });
    }
  }

  function check({ probe }) {
    if (isSpec()) busy(async () => {
      const found = await post(`/v1/jobs/validate?probe=${probe}`, text.value, { signal });
      show(findings, [Math.random()], () => [
        found.errors.length > 0 && faults(found.errors),
        found.warnings.length > 0 && h("section", { class: "card warnings" }, warningTexts(found.warnings)),
        found.valid && estimate(found.estimate),
      ].filter(Boolean));
    });
  }

  function submit(event) {
    event.preventDefault();
    if (isSpec()) busy(async () => {
      const job = await post("/v1/jobs", text.value, { signal, headers: { "Idempotency-Key": sendKey } });
      location.hash = `#/jobs/${job.id}`;
    });
  }
}

/** A key under which a repeated request makes no second job, as after a lost answer. */
const newKey = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

const faults = (errors) => h("section", { class: "card failure" }, h("h2", null, errors.length === 1 ? "1 fault" : `${errors.length} faults`),
  h("ul", { class: "plain" }, errors.map((fault) => h("li", null, fault.pointer && h("span", { class: "mono" }, `${fault.pointer} `), fault.message,
    Array.isArray(fault.allowed) && h("p", { class: "hint quiet" }, `allowed: ${fault.allowed.join(", ")}`)))));

/** What is known before the job runs. */
function estimate(found) {
  const facts = [
    ["Time", found.seconds != null && `about ${duration(found.seconds)}`], ["Steps", found.steps != null && count(found.steps)],
    ["Memory", found.memory_bytes != null && bytes(found.memory_bytes)], ["Measured on", found.device],
    ["Parameters of the teacher", found.parameters.teacher != null && short(found.parameters.teacher)],
    ["Parameters of the student", found.parameters.student != null && short(found.parameters.student)],
    ["Compression", found.compression != null && `${found.compression.toPrecision(3)} times`],
  ].filter(([, value]) => value);
  return h("section", { class: "card found" }, h("h2", null, "The spec is valid"),
    h("table", null, h("tbody", null, facts.map(([name, value]) => h("tr", null, h("th", { scope: "row" }, name), h("td", { class: "number" }, value))))));
}

/** JSON whose numbers stay as they are written, where the browser can: a seed may have more digits than a number here. */
const parsed = (text) => JSON.parse(text, (name, value, context) =>
  (typeof value === "number" && context?.source !== undefined && JSON.rawJSON ? JSON.rawJSON(context.source) : value));

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value) && !JSON.isRawJSON?.(value);

/** Where two values differ: [pointer, before, after] for each place, objects compared by field. */
function differences(before, after, place = "") {
  if (isObject(before) && isObject(after))
    return [...new Set([...Object.keys(before), ...Object.keys(after)])].flatMap((name) => differences(before[name], after[name], `${place}/${name}`));
  const text = (value) => (value === undefined ? "not given" : JSON.stringify(value));
  return text(before) === text(after) ? [] : [[place, text(before), text(after)]];
}
