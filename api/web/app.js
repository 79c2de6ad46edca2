// The page: which view the address names, the list of jobs, and the form for a key.

import { age, bar, h, json, key, listedModels, method, percent, pill, points, Problem, repeatedly, request, short, shownDataset, show, title, waitingText } from "./common.js";
import { jobPage } from "./job.js";
import { registeredOnePage, registeredPage } from "./registered.js";
import { submitPage } from "./submit.js";

/** The filters of GET /v1/jobs, which the address of the list may have. */
const FILTERS = [
  "status", "kind", "method", "name", "labels", "dataset", "teacher", "student", "model", "job", "sender", "created_after", "created_before", "sort",
];
/** Kinds of jobs, in the words of the list. */
const KINDS = [
  ["distillation", "distillations"], ["evaluation", "evaluations"], ["export", "exports"], ["benchmark", "benchmarks"],
];

const main = document.getElementById("main");
const service = document.getElementById("service");
const keyForm = document.getElementById("key-form");
let leave = new AbortController();

function route() {
  leave.abort();
  leave = new AbortController();
  main.replaceChildren();
  const [path, query] = location.hash.replace(/^#/, "").split("?");
  const [, noun, id] = path.split("/");
  document.title = "Distillery";
  for (const link of document.querySelectorAll(".top nav a")) {
    const [, to] = link.hash.split("/");
    const here = link.hash && (to === (noun ?? "") || (to === "" && noun === "jobs") || (to === "registered" && ["datasets", "models"].includes(noun)));
    link.toggleAttribute("aria-current", Boolean(here));
  }
  if (noun === "jobs" && id) jobPage(main, decodeURIComponent(id), leave.signal, showError);
  else if (["datasets", "models"].includes(noun) && id) registeredOnePage(main, noun, decodeURIComponent(id), leave.signal, showError);
  else if (noun === "registered" && !id) registeredPage(main, leave.signal, showError);
  else if (noun === "submit") submitPage(main, new URLSearchParams(query).get("from"), leave.signal, showError);
  else if (!noun) listPage(new URLSearchParams(query), leave.signal);
  else main.append(h("section", { class: "card empty" }, h("h1", null, "No such page"), h("p", { class: "quiet" }, `Nothing is at #${path}. `, h("a", { href: "#/" }, "All jobs"))));
}

/** Show a failed request in the corner of the page; `null` removes the message. */
function showError(error) {
  service.classList.toggle("away", Boolean(error));
  if (!error) service.textContent = "";
  else if (error instanceof Problem) service.textContent = error.status ? error.message : `${error.message}; trying again`;
  else service.textContent = `a fault of this page: ${error.message}`;
}

const STATED = ", as the job's sentence states it: of several seeds the mean, unless the images leave open whether distilling helped";

/** The filters in the address are those of GET /v1/jobs. What is none is named, so that no list looks filtered by it. */
function listPage(sent, signal) {
  const filters = new URLSearchParams([...sent].filter(([name]) => FILTERS.includes(name)));
  const unknown = [...new Set([...sent.keys()].filter((name) => !FILTERS.includes(name)))];
  const body = h("tbody");
  const more = h("div", { class: "more", hidden: true }, h("button", { type: "button", onclick: () => { limit += 50; refresh(); } }, "Show older jobs"));
  const summary = h("span", { class: "quiet" });
  const table = h("section", { class: "card jobs", hidden: true },
    h("table", null,
      h("thead", null, h("tr", null,
        ["Status", "Job"].map((name) => h("th", { scope: "col" }, name)),
        h("th", { scope: "col", class: "wide" }, "Method"),
        h("th", { scope: "col", class: "number" }, "Accuracy"),
        h("th", { scope: "col", class: "number wide", title: `The part of the way from the student alone to its teacher${STATED}` }, "Gap closed"),
        h("th", { scope: "col", class: "number", title: `Points of accuracy above the same student trained without a teacher${STATED}` }, "Gain"),
        h("th", { scope: "col", class: "number wide" }, "Parameters"),
        h("th", { scope: "col", class: "number wide" }, "Age"))),
      body),
    more);
  const empty = h("section", { class: "card empty", hidden: true });
  const chosen = [...filters].map(([name, value]) => h("span", { class: "pill" }, `${name} ${value}`));
  const all = chosen.length > 0 && h("a", { href: "#/" }, "all jobs");
  const heading = h("div", { class: "heading" }, h("h1", null, "Jobs"), chosen, all, summary);
  const leftOut = unknown.length > 0 && `No list has the filter ${unknown.join(", ")}, so it is left out. Filters are ${FILTERS.join(", ")}.`;
  const notice = h("p", { class: "notice", role: "alert" }, leftOut);
  const others = kinds(filters);
  main.append(heading, others, notice, table, empty);
  const rows = new Map();
  let limit = 50;
  let wrong = false;

  async function refresh() {
    if (wrong) return;
    try {
      const { data, next } = await json(`/v1/jobs?${new URLSearchParams([...filters, ["limit", Math.min(limit, 100)]])}`, { signal });
      showError(null);
      draw(data, next);
    } catch (error) {
      if (signal.aborted) return;
      // A value that no filter takes: the next poll would be refused, too.
      wrong = error.status === 422;
      showError(wrong ? null : error);
      if (wrong) {
        const faults = (error.body.errors || []).map(({ pointer, message }) => `${pointer.replace("?", "")}: ${message}.`).join(" ") || error.message;
        notice.replaceChildren([faults, leftOut].filter(Boolean).join(" "));
      }
    }
  }

  function draw(jobs, next) {
    table.hidden = !jobs.length;
    heading.hidden = others.hidden = !jobs.length && !chosen.length;
    empty.hidden = jobs.length > 0;
    more.hidden = !next || limit >= 100;
    if (!jobs.length) show(empty, location.origin, chosen.length ? () => h("p", { class: "quiet" }, "No job matches.") : emptyState);
    const active = jobs.filter((job) => job.status === "running").length;
    const waiting = jobs.filter((job) => job.status === "queued").length;
    summary.textContent = [active && `${active} running`, waiting && `${waiting} waiting`].filter(Boolean).join(", ");
    const listed = new Set(jobs.map((job) => job.id));
    for (const [id, row] of rows) if (!listed.has(id)) { row.remove(); rows.delete(id); }
    jobs.forEach((job, place) => {
      if (!rows.has(job.id)) rows.set(job.id, h("tr"));
      const row = rows.get(job.id);
      show(row, [job, age(job.created_at)], () => cells(job));
      if (body.children[place] !== row) body.insertBefore(row, body.children[place] || null);
    });
  }

  repeatedly(signal, () => 2500, refresh);
}

/** Links to the jobs of one kind, beside the other filters. */
function kinds(filters) {
  const to = (kind) => {
    const others = new URLSearchParams([...filters].filter(([name]) => name !== "kind"));
    if (kind) others.set("kind", kind);
    return `#/${String(others) && `?${others}`}`;
  };
  const chosen = filters.get("kind");
  return h("nav", { class: "kinds", "aria-label": "Kinds of jobs" }, [["", "all"], ...KINDS].map(([kind, name]) =>
    h("a", { href: to(kind), "aria-current": (chosen || "") === kind && "true" }, name)));
}

function cells(job) {
  const figures = job.figures || {};
  const gain = figures.gain;
  return [
    h("td", null, pill(job), h("span", { class: "waiting", title: job.waiting?.message }, waitingText(job)),
      job.warning_count > 0 && h("span", { class: "warned" }, warnedText(job.warning_count)), bar(job)),
    h("td", null,
      h("a", { class: "name", href: `#/jobs/${job.id}` }, title(job, job.model || job.students.join(" + "))),
      h("div", { class: "models" }, [listedModels(job), shownDataset(job.dataset), job.kind !== "distillation" && job.kind].filter(Boolean).join(", ")),
      labels(job)),
    h("td", { class: "wide" }, method(job)),
    h("td", { class: "number" }, percent(figures.accuracy)),
    h("td", { class: "number wide" }, percent(figures.gap_closed, 0)),
    h("td", { class: `number ${gain > 0 ? "up" : gain < 0 ? "down" : ""}` }, points(gain)),
    h("td", { class: "number wide" }, short(figures.parameters)),
    h("td", { class: "number wide quiet" }, age(job.created_at)),
  ];
}

const warnedText = (number) => `${number} warning${number === 1 ? "" : "s"}`;

/** Each label is a link to the jobs that have it. */
function labels(job) {
  const each = Object.entries(job.labels);
  if (!each.length) return null;
  return h("div", { class: "labels" }, each.map(([name, value]) =>
    h("a", { href: `#/?labels=${encodeURIComponent(`${name}:${value}`)}` }, value ? `${name}: ${value}` : name)));
}

function emptyState(origin) {
  const spec = JSON.stringify({
    name: "first job", dataset: "digits", student: "convnet16", method: "supervised", training: { epochs: 20 },
  });
  const header = key.get() ? " \\\n  -H 'Authorization: Bearer <key>'" : "";
  return [
    h("h1", null, "No jobs yet"),
    h("p", { class: "quiet" }, "Submit a first job: a small network learns the built-in digits in less than a minute."),
    h("pre", null, `curl ${origin}/v1/jobs \\\n  -H 'Content-Type: application/json'${header} \\\n  -d '${spec}'`),
    h("p", null, h("a", { class: "button", href: "#/submit" }, "Fill in the form")),
    h("p", { class: "quiet" }, "Or run ", h("code", null, "./run demo"), ": it trains a teacher and a student, and measures what distillation gained."),
  ];
}

document.addEventListener("key-needed", () => {
  // Later polls ask again; a reader who has scrolled away stays there.
  if (keyForm.hidden) { keyForm.hidden = false; keyForm.elements.key.focus(); }
});
keyForm.addEventListener("submit", async (event) => {
  event.preventDefault();
  key.set(keyForm.elements.key.value.trim());
  try {
    await request("/v1/jobs?limit=1");
    keyForm.hidden = true;
    keyForm.reset();
    route();
  } catch (error) {
    showError(error);
  }
});
window.addEventListener("hashchange", route);
route();
