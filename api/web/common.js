// Common to all pages: requests to the service, building elements, and formatting numbers.

const KEY = "distillery-key";
/** The answer to a key that the service does not accept. Nothing more is sent until the form has set another key. */
let refused = null;
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set(value) {
    refused = null;
    sessionStorage.setItem(KEY, value);
  },
};

export class Problem extends Error {
  constructor(status, body) {
    super(body.detail || body.title || `the service answered ${status}`);
    this.status = status;
    this.body = body;
  }
}

/** fetch with the API key. An answer that is not successful is thrown as a Problem. */
export async function request(path, options = {}) {
  if (refused) throw refused;
  const headers = { ...options.headers };
  const sent = key.get();
  // fetch takes no header with other letters, and no key has any.
  if (/[^\x21-\x7e]/.test(sent ?? "")) throw refusal({ detail: "a key has letters, digits and signs of ASCII only" }, sent);
  if (sent) headers.Authorization = `Bearer ${sent}`;
  const answer = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Problem(0, { detail: "no answer from the service" });
  });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  throw answer.status === 401 ? refusal(body, sent) : new Problem(answer.status, body);
}

function refusal(body, sent) {
  const problem = new Problem(401, sent ? body : { detail: "a key is needed" });
  // A request may still be on its way when the form has set another key.
  if (sent === key.get()) {
    refused = problem;
    document.dispatchEvent(new CustomEvent("key-needed"));
  }
  return problem;
}

export const json = async (path, options) => (await request(path, options)).json();

/** POST a value as JSON, or a text that is JSON, and return the answer's value. */
export const post = async (path, value, { headers, ...options } = {}) => json(path, {
  method: "POST", body: typeof value === "string" ? value : JSON.stringify(value), headers: { "Content-Type": "application/json", ...headers }, ...options,
});

/** A link to a file. With an API key the bytes are fetched by script, because a link cannot send the key. */
export function fileLink(href, name, text, properties) {
  const download = async (event) => {
    if (!key.get()) return;
    event.preventDefault();
    const link = event.currentTarget;
    try {
      const url = URL.createObjectURL(await (await request(href)).blob());
      h("a", { href: url, download: name }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
    } catch (error) {
      link.textContent = error.message;
    }
  };
  return h("a", { class: "button", href, download: name, onclick: download, ...properties }, text);
}

/** Make an element: h("p", {class: "quiet"}, "text", element, …). Properties that start with "on" are listeners. */
export const h = (tag, properties, ...children) => filled(document.createElement(tag), properties, children);
/** The same for an element of a drawing: svg("line", {x1: 0, …}). */
export const svg = (tag, properties, ...children) =>
  filled(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);

function filled(element, properties, children) {
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Replace an element's children only when their state has changed, so that focus and selection are kept. */
export function show(element, state, draw) {
  const text = JSON.stringify(state);
  if (element.dataset.state === text) return;
  element.replaceChildren(...[draw(state)].flat(Infinity).filter(Boolean));
  element.dataset.state = text;
}

const DASH = "–";
const grouped = new Intl.NumberFormat("en");
export const percent = (fraction, digits = 1) => (fraction == null ? DASH : `${(100 * fraction).toFixed(digits)} %`);
export const count = (number) => (number == null ? DASH : grouped.format(number));
export function short(number) {
  if (number == null) return DASH;
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (number >= size) return `${(number / size).toPrecision(3)} ${unit}`;
  return String(number);
}
export function bytes(number) {
  if (number == null) return DASH;
  for (const [size, unit] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]])
    if (number >= size) return `${(number / size).toPrecision(3)} ${unit}`;
  return `${number} B`;
}
export function points(gain) {
  if (gain == null) return DASH;
  const sign = gain > 0 ? "+" : gain < 0 ? "−" : "±";
  return `${sign}${Math.abs(100 * gain).toFixed(1)}`;
}
export function duration(seconds) {
  if (seconds == null) return DASH;
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60 ? `${s % 60} s` : ""}`.trim();
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}
export function milliseconds(value) {
  if (value == null) return DASH;
  const [number, unit] = value < 0.1 ? [1000 * value, "µs"] : [value, "ms"];
  return `${number >= 100 ? Math.round(number) : number.toPrecision(3)} ${unit}`;
}
/** The ends of an interval of fractions: "88.0 % to 93.6 %". */
export const range = ([low, high]) => `${percent(low)} to ${percent(high)}`;
export const age = (iso) => (iso ? `${duration((Date.now() - Date.parse(iso)) / 1000).split(" ").slice(0, 2).join(" ")} ago` : DASH);
export const clock = (iso) => new Date(iso).toLocaleTimeString("en-GB");

export const TERMINAL = ["succeeded", "failed", "cancelled"];

export function pill(job) {
  const requested = job.requested && job.status === "running" ? { cancel: "cancelling", pause: "pausing" }[job.requested] : null;
  return h("span", { class: `pill ${job.status}` }, requested || job.status);
}

/** The reason why a queued job has not started: "no worker", "position 3"; "" for a job that is starting. */
export function waitingText({ waiting, queue_position: position }) {
  if (!waiting || waiting.reason === "starting") return "";
  if (waiting.reason === "teacher") return "waits for its teacher";
  return waiting.reason === "behind_others" ? `position ${position}` : waiting.reason.replaceAll("_", " ");
}

export function bar(job) {
  const done = job.status === "succeeded" ? 100 : (job.progress?.percent ?? 0);
  const fill = h("i");
  fill.style.width = `${done}%`;
  return h("div", {
    class: `bar ${job.status}`, role: "progressbar", "aria-label": "Progress",
    "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(done),
  }, fill);
}

/** Teacher, assistants and student: "resnet56 → resnet20"; of a job about one network this one, by the name that was sent. */
export function models(job) {
  const named = job.spec.model || job.spec.architecture;
  if (named) return joined(named);
  const spec = job.resolved_spec?.distillation || job.resolved_spec || job.spec;
  return [spec.teacher, ...(spec.assistants || []), spec.student].map(joined).filter(Boolean).join(" → ");
}

/** The same of a job in a list. */
export function listedModels(job) {
  if (job.model) return job.model;
  return [job.teachers, job.assistants, job.students].map(joined).filter(Boolean).join(" → ");
}

/** The name of a job; without one what it is of, which is nothing new of a distillation. */
export const title = ({ name, kind, id }, network) => name || (kind !== "distillation" && network ? `${kind} of ${network}` : id);

/** The job whose student an export or a benchmark takes. */
export const parent = (job) => (typeof job.spec.job === "string" ? job.spec.job : null);

/** The data set as the client named it. */
export function dataset(job) {
  const given = (job.spec || {}).dataset;
  return shownDataset(typeof given === "string" ? given : given?.source);
}

/** The name of a data set; bytes without a name by the start of their digest. */
export const shownDataset = (name) => (name?.startsWith("blob:sha256:") ? `${name.slice(0, 24)}…` : name || "");

/** "70.2 % on 1,000 of 10,000 test images": the teacher before anything was trained. */
export function teacherCheck({ accuracy, images, test_samples: all, dropped }) {
  return `${percent(accuracy)} on ${images < all ? `${count(images)} of ${count(all)}` : `all ${count(images)}`} test images`
    + (dropped ? `, ${percent(dropped)} of its probability left out` : "");
}

/** One network or several: "resnet56 + wrn_40_2", "2 × convnet4". */
function joined(networks) {
  const name = (model) => (typeof model === "string" ? model : model?.architecture || model?.checkpoint || (model?.program && "program") || (model?.logits && "logits"));
  const names = [networks].flat().map(name).filter(Boolean);
  const times = (one) => names.filter((other) => other === one).length;
  return [...new Set(names)].map((one) => (times(one) > 1 ? `${times(one)} × ${one}` : one)).join(" + ");
}

/** "kd + attention" */
export const method = (job) => job.method.replaceAll("+", " + ");

/** The name of a model or trial for people: "student alone", "assistant 1", "student, seed 2", "student, fsp stage". */
export function displayName(name) {
  const [whole, stage] = name.split("/");
  const [trial, seed] = whole.split("-seed-");
  const text = ({ alone: "student alone", last: "last generation" }[trial] || trial.replaceAll("-", " ")) + (seed ? `, seed ${seed}` : "");
  return stage ? `${text}, ${stage.replaceAll("_", " ")} stage` : text;
}

export function warningTexts(warnings) {
  return [
    h("h2", null, warnings.length === 1 ? "1 warning" : `${warnings.length} warnings`),
    h("ul", null, warnings.map(({ code, pointer, message, hint }) => h("li", null,
      h("p", null, message),
      hint && h("p", { class: "hint" }, hint),
      h("p", { class: "mono quiet" }, [code, pointer].filter(Boolean).join(" "))))),
  ];
}

/** Call `work` at once, then every `pause()` ms until the signal aborts; not while the page is hidden. */
export async function repeatedly(signal, pause, work) {
  while (!signal.aborted) {
    if (!document.hidden) await work();
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, pause());
      signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
    });
  }
}
