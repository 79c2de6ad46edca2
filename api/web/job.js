// The page of one job: its state, its result, its curves, files, attempts, events and log.

import {
  age, bar, bytes, clock, count, dataset, displayName, duration, h, json, method, models, parent, percent, pill, repeatedly, request, show,
  teacherCheck, TERMINAL, title, warningTexts,
} from "./common.js";
import { chart } from "./chart.js";
import { filesBox } from "./files.js";
import { predictBox } from "./predict.js";
import { result } from "./result.js";

const numbered = (name, first, last) => Array.from({ length: last - first + 1 }, (_, at) => `${name}-${first + at}`);
/** Other models that a trial may measure: ensemble, peers, exits. */
const MEASURED = ["ensemble", ...numbered("student", 2, 8), ...numbered("exit", 1, 16)];
const CURVES = [
  "validation/accuracy", ...MEASURED.map((name) => `validation/${name}/accuracy`),
  "train/loss", "train/label_loss", "train/distillation_loss",
];
/** Colours of the other curves. More than five cannot be told apart. */
const OTHERS = ["--other-1", "--other-2", "--other-3", "--other-4", "--other-5"];
const byNumber = new Intl.Collator("en", { numeric: true }).compare;
const HIDDEN = ["code", "retryable", "sha256", "path"];
/** The buttons: action, label, body, and a condition beyond `allowed_actions`. */
const ACTIONS = [
  { verb: "pause", name: "Pause" },
  { verb: "resume", name: "Resume" },
  { verb: "retry", name: "Retry" },
  { verb: "retry", name: "Retry from scratch", body: { from: "scratch" }, when: (job) => job.checkpoint_step != null },
  { verb: "cancel", name: "Cancel" },
];

/** Columns of the table of attempts: heading, class, cell. */
const ATTEMPT_COLUMNS = [
  ["Attempt", "", (one) => String(one.attempt)],
  ["Outcome", "", (one) => one.how || "running"],
  ["From step", "number", (one) => count(one.first_step ?? 0)],
  ["Saved step", "number", (one) => count(one.last_step)],
  ["Duration", "number", (one) => duration(one.ended_at && (Date.parse(one.ended_at) - Date.parse(one.started_at)) / 1000)],
  ["Device", "wide", (one) => one.device || ""],
  ["Worker", "wide", (one) => one.worker],
];

export function jobPage(main, id, signal, showError) {
  const at = `/v1/jobs/${encodeURIComponent(id)}`;
  const part = (tag, name) => h(tag, { class: name });
  const head = part("section", "card job-head");
  const failure = part("section", "card failure");
  const warnings = part("section", "card warnings");
  const found = part("section", "card result");
  const alerts = part("section", "card alerts");
  const trial = part("section", "card trial");
  const accuracyPlace = part("section", "card chart");
  const lossPlace = part("section", "card chart");
  const files = part("section", "card files");
  const attempts = part("section", "card attempts");
  const spec = part("section", "card spec");
  const feed = h("ol", { class: "feed", role: "log", "aria-label": "Events", tabindex: 0 });
  const log = h("pre", { class: "log", tabindex: 0, "aria-label": "Log" });
  const follow = h("input", { type: "checkbox", checked: true });
  const notice = h("p", { class: "notice", role: "alert" });
  const charts = h("div", { class: "two" }, accuracyPlace, lossPlace);
  failure.hidden = warnings.hidden = alerts.hidden = trial.hidden = charts.hidden = files.hidden = attempts.hidden = true;
  main.append(h("div", { class: "job" }, head, failure, alerts, found, warnings,
    charts,
    files,
    trial,
    attempts,
    h("div", { class: "two" },
      h("section", { class: "card" }, h("h2", null, "Events"), feed),
      h("section", { class: "card" }, h("div", { class: "row" }, h("h2", null, "Log"), h("label", null, follow, " follow")), log)),
    spec));

  const accuracyChart = chart(accuracyPlace, "Accuracy on held-out images, by step", (value) => percent(value), signal);
  const lossChart = chart(lossPlace, "Training loss, by step", (value) => (value == null ? "" : value.toPrecision(3)), signal);

  const box = filesBox(files, at, signal);
  let job = null;
  let data = null;
  let metricsState = null;
  let attemptsState = null;
  let logOffset = null;
  let logAttempt = null;

  const done = () => job !== null && TERMINAL.includes(job.status);

  async function refresh() {
    try {
      job = await json(at, { signal });
      draw();
      await Promise.all([drawMetrics(), drawLog(), drawAttempts(), drawData(), box.update(job)]);
      showError(null);
    } catch (error) {
      if (signal.aborted) return;
      showError(error);
      if (error.status === 404) show(head, id, () => [h("h1", null, "No such job"), h("p", { class: "quiet" }, error.message)]);
    }
  }

  function draw() {
    document.title = `${named()} · ${job.status} · Distillery`;
    show(head, [job.status, job.phase, job.requested, job.progress, job.waiting, job.name, job.teacher_check, job.warnings.length, age(job.created_at)], header);
    failure.hidden = !job.error;
    if (job.error) show(failure, job.error, failureText);
    warnings.hidden = !job.warnings.length;
    show(warnings, job.warnings, warningTexts);
    drawResult();
    if (trial.hidden && job.status === "succeeded" && job.kind === "distillation" && job.allowed_actions.length) {
      trial.hidden = false;
      trial.replaceChildren(...predictBox(at, signal));
    }
    show(spec, [job.spec, job.resolved_spec], specs);
  }

  function drawResult() {
    show(found, [job.result, job.resolved_spec?.baseline, TERMINAL.includes(job.status), job.teacher_check, data], () => result(job, data));
  }

  /** The facts of the data, before a report has them. They are asked for once: what has no name here has none. */
  async function drawData() {
    if (data !== null || job.result?.dataset || job.kind !== "distillation") return;
    const name = dataset(job);
    data = {};
    if (!name || name.endsWith("…")) return;
    try {
      data = (await json(`/v1/datasets/${encodeURIComponent(name)}`, { signal })).facts || {};
    } catch (error) {
      if (error.status !== 404) { data = null; throw error; }
    }
    drawResult();
  }

  const named = () => title(job, models(job).split(" → ").at(-1));

  function header() {
    const p = job.progress || {};
    const facts = [
      job.waiting && job.waiting.message + (job.waiting.until ? `, until ${clock(job.waiting.until)}` : ""),
      job.status === "running" && (job.phase || "starting").replaceAll("_", " "),
      !TERMINAL.includes(job.status) && p.epochs && `epoch ${p.epoch} of ${p.epochs}${p.trial && p.trial !== "student" ? `, ${displayName(p.trial)}` : ""}`,
      p.percent != null && !["succeeded", "cancelled"].includes(job.status) && `${Math.round(p.percent)} %`,
      job.status === "running" && p.seconds_remaining != null && `about ${duration(p.seconds_remaining)} left`,
      job.started_at && job.finished_at && `took ${duration((Date.parse(job.finished_at) - Date.parse(job.started_at)) / 1000)}`,
      job.attempts_without_progress > 1 && `${job.attempts_without_progress} attempts without progress`,
      job.priority !== 0 && `priority ${job.priority}`,
      job.deadline_at && !TERMINAL.includes(job.status) && `deadline ${new Date(job.deadline_at).toLocaleString("en-GB")}`,
      `submitted ${age(job.created_at)}`,
    ];
    return [
      h("div", { class: "line" }, h("h1", null, named()), pill(job),
        h("div", { class: "verbs" },
          ACTIONS.filter(({ verb, when }) => job.allowed_actions.includes(verb) && (!when || when(job))).map(button),
          job.kind === "distillation" && h("a", { class: "button", href: `#/submit?from=${encodeURIComponent(job.id)}` }, "Again with changes"))),
      h("div", { class: "facts" },
        models(job) && h("span", null, models(job)), h("span", null, method(job)),
        parent(job) && h("span", null, "of the job ", h("a", { href: `#/jobs/${parent(job)}` }, parent(job))),
        dataset(job) && h("span", null, `data ${dataset(job)}`),
        job.teacher_check && !job.result && h("span", null, `teacher ${teacherCheck(job.teacher_check)}`),
        job.warnings.length > 0 && h("button", { class: "plain warned", type: "button", onclick: () => warnings.scrollIntoView() },
          job.warnings.length === 1 ? "1 warning" : `${job.warnings.length} warnings`),
        h("span", { class: "mono" }, job.id, " ", h("button", { class: "plain", type: "button", onclick: copy }, "copy")),
        facts.filter(Boolean).map((fact) => h("span", null, fact))),
      bar(job),
      notice,
    ];
  }

  const copy = (event) => navigator.clipboard?.writeText(job.id).then(() => { event.target.textContent = "copied"; });

  function button({ verb, name, body }) {
    let confirmed = verb !== "cancel";
    const options = { method: "POST", signal, ...(body && { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } }) };
    return h("button", { type: "button", onclick: async (event) => {
      if (!confirmed) {
        confirmed = true;
        event.target.textContent = "Really cancel?";
        event.target.classList.add("sure");
        return;
      }
      event.target.disabled = true;
      notice.textContent = "";
      try {
        await request(`${at}/${verb}`, options);
        delete head.dataset.state;
        await refresh();
        listen();
      } catch (error) {
        notice.textContent = error.message;
        event.target.disabled = false;
      }
    } }, name);
  }

  /** The alerts that the spec has asked for, as far as they were raised, newest first. */
  function addAlert(when, raised) {
    if (alerts.hidden) alerts.replaceChildren(h("h2", null, "Alerts"), h("ul", { class: "plain" }));
    alerts.hidden = false;
    alerts.lastChild.prepend(h("li", null, h("time", { datetime: when, title: when }, clock(when)), " ", alertText(raised)));
  }

  async function drawMetrics() {
    const state = JSON.stringify([job.status, job.attempts_without_progress, job.progress?.trial, job.progress?.step, job.teacher_check]);
    if (state === metricsState) return;
    const { series } = await json(`${at}/metrics?max_points=300&keys=${CURVES}`, { signal });
    metricsState = state;
    // Nothing will be measured any more in a job that has ended without a measurement, and only a distillation trains.
    const ended = done() || job.kind !== "distillation";
    const accuracy = accuracies(series, job.result?.teacher?.accuracy ?? job.teacher_check?.accuracy);
    const loss = losses(series);
    accuracyPlace.hidden = ended && !hasCurve(accuracy);
    lossPlace.hidden = ended && !hasCurve(loss);
    charts.hidden = accuracyPlace.hidden && lossPlace.hidden;
    accuracyChart.update(...accuracy);
    lossChart.update(...loss);
  }

  /** The attempts are fetched only when the job has changed in a way that may change them. */
  async function drawAttempts() {
    const state = JSON.stringify([job.status, job.started_at, job.attempts_without_progress, job.checkpoint_step]);
    if (state === attemptsState) return;
    const { data } = await json(`${at}/attempts`, { signal });
    attemptsState = state;
    attempts.hidden = !data.length;
    show(attempts, data, () => [h("h2", null, "Attempts"), h("table", null,
      h("thead", null, h("tr", null, ATTEMPT_COLUMNS.map(([name, css]) => h("th", { scope: "col", class: css }, name)))),
      h("tbody", null, data.map((one) => h("tr", null, ATTEMPT_COLUMNS.map(([, css, cell]) => h("td", { class: css }, cell(one)))))))]);
  }

  async function drawLog() {
    const where = logOffset == null ? "tail=400" : `offset=${logOffset}&attempt=${logAttempt}`;
    const answer = await request(`${at}/logs?${where}`, { signal });
    const text = await answer.text();
    const attempt = answer.headers.get("X-Log-Attempt");
    if (attempt !== logAttempt) log.replaceChildren();
    logAttempt = attempt;
    logOffset = Number(answer.headers.get("X-Log-Next-Offset"));
    if (logAttempt !== answer.headers.get("X-Log-Newest-Attempt")) logOffset = null;
    if (text) log.append(text);
    if (text && follow.checked) log.scrollTop = log.scrollHeight;
  }

  let listening = false;
  let lastSeq = 0;
  /** Read the event stream with fetch, because EventSource cannot send a key. It reconnects from the last event. */
  async function listen() {
    if (listening) return;
    listening = true;
    while (!signal.aborted) {
      try {
        const answer = await request(`${at}/events/stream`, { signal, headers: lastSeq ? { "Last-Event-ID": lastSeq } : {} });
        if (answer.status === 204) break;
        await readEvents(answer.body, addEvent);
        if (done()) break;
      } catch (error) {
        if (signal.aborted || error.status === 404 || error.status === 401) break;
      }
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
    listening = false;
  }

  function addEvent({ id: seq, data: text }) {
    lastSeq = Number(seq);
    const { type, at: when, data } = JSON.parse(text);
    if (type === "alert") addAlert(when, data);
    const scrolledUp = feed.scrollHeight - feed.scrollTop - feed.clientHeight > 40;
    feed.append(h("li", null, h("time", { datetime: when, title: when }, clock(when)), h("span", null, type.replaceAll("_", " ")), h("span", { class: "data" }, eventText(type, data))));
    if (!scrolledUp) feed.scrollTop = feed.scrollHeight;
  }

  listen();
  repeatedly(signal, () => (done() ? 10_000 : job?.status === "running" ? 1200 : 2500), refresh);
}

/** True if a chart has more than the teacher's level. */
const hasCurve = ([lines]) => lines.some(({ points: curve }) => curve.some(([step]) => step !== null));

/** Curves by trial. Those of an earlier stage have another scale: they are shown only until the trial itself begins. */
const current = (series) => Object.entries(series)
  .filter(([trial]) => !trial.includes("/") || !(trial.split("/")[0] in series));

/** The accuracy curves of all measured models, and the number of curves that are left out. */
function accuracies(series, teacher) {
  const others = [];
  for (const [trial, curves] of current(series))
    for (const [key, curve] of Object.entries(curves)) {
      const match = key.match(/^validation\/(?:(.+)\/)?accuracy$/);
      const name = match && (match[1] || trial);
      if (name && name !== "student" && name !== "alone") others.push({ name, points: curve });
    }
  return [[
    { label: "student", colour: "--accent", points: series.student?.["validation/accuracy"] || [] },
    { label: displayName("alone"), colour: "--alone", points: series.alone?.["validation/accuracy"] || [] },
    { label: "teacher, on test", colour: "--teacher", dash: [6, 5], points: teacher == null ? [] : [[null, teacher]] },
    ...coloured(others),
  ], Math.max(0, others.length - OTHERS.length)];
}

/** The loss curves of all trials, the student's also in parts, and the number of curves that are left out. */
function losses(series) {
  const of = (trial, name) => series[trial]?.[`train/${name}`] || [];
  const others = current(series).filter(([trial]) => trial !== "student" && trial !== "alone")
    .map(([trial]) => ({ name: trial, points: of(trial, "loss") }));
  const distilled = of("student", "distillation_loss");
  return [[
    { label: "student", colour: "--accent", points: of("student", "loss") },
    { label: "loss on labels", colour: "--good", dash: [2, 3], points: distilled.length ? of("student", "label_loss") : [] },
    { label: "distillation loss", colour: "--bad", dash: [2, 3], points: distilled },
    { label: displayName("alone"), colour: "--alone", points: of("alone", "loss") },
    ...coloured(others),
  ], Math.max(0, others.length - OTHERS.length)];
}

const coloured = (others) => others.sort((one, other) => byNumber(one.name, other.name)).slice(0, OTHERS.length)
  .map(({ name, points: curve }, place) => ({ label: displayName(name), colour: OTHERS[place], points: curve }));

/** Parse server-sent events and call `each` with the fields of each. */
async function readEvents(stream, each) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
    const blocks = (rest + chunk.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]));
      if (fields.data) each(fields);
    }
  }
}

/** An event's data in a few words. The box of warnings has the rest of a warning. */
function eventText(type, data) {
  if (type === "warning") return data.message;
  if (type === "teacher_check") return teacherCheck(data);
  if (type === "alert") return alertText(data);
  return fieldsText(data);
}

const fieldsText = (data) => Object.entries(data?.error || data || {})
  .filter(([name, value]) => value !== null && value !== false && typeof value !== "object" && !HIDDEN.includes(name))
  .map(([name, value]) => {
    if (["phase", "reason", "message"].includes(name)) return String(value).replaceAll("_", " ");
    return name === "bytes" ? bytes(value) : `${name.replaceAll("_", " ")} ${value}`;
  })
  .join(", ");

/** "validation/accuracy is 0.31, below 0.5, in epoch 2" */
function alertText({ metric, below, above, value, epoch, step, no_progress_s: seconds }) {
  if (!metric) return `no progress for ${duration(seconds)}`;
  const bound = below != null ? `below ${below}` : `above ${above}`;
  const place = epoch != null ? `, in epoch ${Math.ceil(epoch)}` : step != null ? `, at step ${count(step)}` : "";
  return `${metric} is ${Number(value.toPrecision(4))}, ${bound}${place}`;
}

function failureText(error) {
  return [
    h("h2", null, error.code.replaceAll("_", " ")),
    h("p", null, error.message),
    error.hint && h("p", { class: "hint" }, error.hint),
    h("p", { class: "hint quiet" }, error.retryable ? "A retry may help." : "A retry alone does not help."),
  ];
}

function specs([submitted, resolved]) {
  const text = (value) => h("pre", { tabindex: 0 }, JSON.stringify(value, null, 2));
  return [
    h("h2", null, "Spec"),
    h("details", null, h("summary", null, "As submitted"), text(submitted)),
    h("details", null, h("summary", null, "As run, with all defaults"), text(resolved)),
  ];
}
