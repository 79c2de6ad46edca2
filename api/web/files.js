// The files of a job: each with what was measured on it, those that were refused, and a form to make more.

import { bar, bytes, fileLink, h, json, key, milliseconds, percent, pill, points, post, TERMINAL } from "./common.js";

/** Formats of POST /v1/jobs/{id}/exports, with their names for people. */
const FORMATS = [
  ["safetensors", "safetensors"], ["onnx", "ONNX"], ["onnx_int8", "ONNX, int8"], ["torch_export", "torch.export"], ["openvino", "OpenVINO"],
];
const NAMES = Object.fromEntries(FORMATS);
const QUANTIZATIONS = { after_training: "int8 after the training", aware: "int8, trained for it" };
const DOCUMENTS = {
  "report.json": "all figures", "report.html": "the report as one page", "student.py": "the network's source, for PyTorch alone",
  "model_card.zip": "a folder for the Hugging Face Hub", "tensorboard.zip": "the curves for TensorBoard",
};

/** The box of files of a job. `update(job)` draws it; it fetches what may have changed. */
export function filesBox(place, at, signal) {
  let artifacts = null;
  let exports = null;
  let job = null;
  let form = null;

  async function update(next) {
    job = next;
    if (artifacts === null && job.status === "succeeded") artifacts = (await json(`${at}/artifacts`, { signal })).data;
    if (job.status !== "succeeded") artifacts = null;
    const active = exports === null || exports.some(({ status }) => !TERMINAL.includes(status));
    if (active && hasStudent()) await fetchExports();
    draw();
  }

  /** True if there are weights to export: of the finished job, or of its newest checkpoint. */
  const hasStudent = () => job.kind === "distillation" && (job.status === "succeeded" || job.checkpoint_step != null);

  async function fetchExports() {
    // 404: an older service, or a job that was deleted meanwhile, which its own poll says.
    const none = (error) => { if (error.status === 404) return { data: [] }; throw error; };
    exports = (await json(`${at}/exports?limit=100`, { signal }).catch(none)).data;
  }

  function draw() {
    const measured = rows();
    const named = new Set(measured.map(({ name }) => name));
    const others = (artifacts || []).filter(({ name }) => !named.has(name));
    const pending = (exports || []).filter(({ status }) => status !== "succeeded");
    const makes = hasStudent();
    place.hidden = !measured.length && !others.length && !pending.length && !makes;
    if (place.hidden) return;
    const state = JSON.stringify([measured, others, pending.map((one) => [one.id, one.status, one.progress]), makes]);
    if (place.dataset.state === state) return;
    place.dataset.state = state;
    form ??= exportForm();
    place.replaceChildren(...[
      h("h2", null, "Files"), reportLinks(others), measured.length > 0 && table(measured), others.length > 0 && documents(others),
      pending.map(exportLine), makes && form,
    ].flat().filter(Boolean));
  }

  /** What was measured: the files of the job, then those of its exports, each with where it is. */
  function rows() {
    const own = new Map((artifacts || []).map((file) => [file.name, file]));
    const ended = (exports || []).filter(({ status }) => status === "succeeded");
    return [
      ...(job.result?.files || []).map((file) => ({ ...file, href: own.get(file.name)?.href })),
      ...ended.flatMap((one) => (one.result?.files || []).map((file) => ({
        ...file, made: one.id, checkpoint: one.resolved_spec.checkpoint,
        href: file.refused ? null : `/v1/jobs/${encodeURIComponent(one.id)}/artifacts/${encodeURIComponent(file.name)}`,
      }))),
    ];
  }

  function exportForm() {
    const boxes = FORMATS.map(([value, text]) => h("label", null, h("input", { type: "checkbox", name: "format", value, checked: value.startsWith("onnx") }), ` ${text}`));
    const checkpoint = h("select", { name: "checkpoint" }, h("option", { value: "best" }, "best epoch"), h("option", { value: "last" }, "last epoch"));
    const inside = h("input", { type: "checkbox", name: "inside" });
    const notice = h("p", { class: "notice", role: "alert" });
    const button = h("button", { type: "submit" }, "Make files");
    return h("details", { class: "make" }, h("summary", null, "Make files of the student"), h("form", { onsubmit: make },
      h("fieldset", null, h("legend", null, "Formats"), boxes),
      h("fieldset", null, h("label", null, "From the ", checkpoint), h("label", null, inside, " with the normalisation inside")),
      button, notice));

    async function make(event) {
      event.preventDefault();
      const formats = boxes.map((label) => label.firstChild).filter((box) => box.checked).map((box) => box.value);
      notice.textContent = formats.length ? "" : "Choose a format.";
      if (!formats.length) return;
      button.disabled = true;
      try {
        await post(`${at}/exports`, {
          export: formats, checkpoint: checkpoint.value, ...(inside.checked && { export_options: { normalization: "inside" } }),
        }, { signal });
        await fetchExports();
        draw();
      } catch (error) {
        if (!signal.aborted) notice.textContent = error.message;
      } finally {
        button.disabled = false;
      }
    }
  }

  return { update };
}

/** The report comes first: to read, and as figures. */
function reportLinks(files) {
  const report = files.find(({ name }) => name === "report.html");
  if (!report) return null;
  // A link cannot send a key, so with one the report is downloaded.
  return h("p", { class: "reports" }, key.get()
    ? fileLink(report.href, report.name, "Download the report")
    : [h("a", { class: "button", href: report.href, target: "_blank", rel: "noopener" }, "Open the report"), " ", fileLink(report.href, report.name, "Download it")]);
}

/** The files with their figures, which were measured on the files after they were written. */
function table(files) {
  const batches = [...new Set(files.flatMap(({ latency }) => (latency || []).map(({ batch }) => batch)))].sort((one, other) => one - other).slice(0, 3);
  const float = files.find((file) => file.accuracy != null && !file.quantization)?.accuracy;
  const head = [
    ["File", ""], ["Accuracy", "number"], ["Agrees", "number", "Share of the test images on which the file and the student predict the same class"],
    ["Size", "number"], ...batches.map((batch) => [batch === 1 ? "1 image" : `${batch} images`, "number", "Latency: the median, and the time that 95 % do not exceed"]),
    ["Memory", "number wide", "The most memory of a process that runs the file"], ["", "number"],
  ];
  return [
    h("div", { class: "scrolled" }, h("table", { class: "measured" },
      h("thead", null, h("tr", null, head.map(([name, css, title]) => h("th", { scope: "col", class: css, title }, name)))),
      h("tbody", null, files.map((file) => fileRow(file, batches, float, head.length))))),
    machines(files),
  ];
}

function fileRow(file, batches, float, width) {
  const about = [NAMES[file.format] || file.format, file.runtime, QUANTIZATIONS[file.quantization], file.checkpoint && `${file.checkpoint} epoch`].filter(Boolean).join(", ");
  const name = h("td", null, h("b", null, file.name), h("span", { class: "models" }, about,
    file.made && [", ", h("a", { href: `#/jobs/${file.made}` }, "made later")]));
  if (file.refused) return h("tr", { class: "refused" }, name, h("td", { colspan: width - 1 },
    h("span", { class: "pill failed" }, "refused"), ` ${file.refused.message}`));
  const latency = (batch) => (file.latency || []).find((one) => one.batch === batch);
  const loss = file.quantization && float != null && file.accuracy != null && file.accuracy - float;
  return h("tr", null, name,
    h("td", { class: "number" }, percent(file.accuracy), loss !== false && loss != null && h("span", { class: "interval", title: "Points of accuracy beside the float file" }, points(loss))),
    h("td", { class: "number" }, percent(file.agreement)),
    h("td", { class: "number" }, bytes(file.bytes)),
    batches.map((batch) => h("td", { class: "number" }, milliseconds(latency(batch)?.p50_ms),
      latency(batch) && h("span", { class: "interval" }, `95 %: ${milliseconds(latency(batch).p95_ms)}`))),
    h("td", { class: "number wide" }, bytes(file.peak_memory_bytes)),
    h("td", { class: "number" }, file.href && fileLink(file.href, file.name, "Download", { title: file.sha256 && `SHA-256 ${file.sha256}` })));
}

/** Where the latencies were measured, in a line. */
function machines(files) {
  const each = [...new Set(files.filter(({ latency }) => latency?.length).map(({ cpu, threads }) =>
    [cpu, threads && `${threads} thread${threads === 1 ? "" : "s"}`].filter(Boolean).join(", ")))].filter(Boolean);
  return each.length > 0 && h("p", { class: "quiet" }, `Latency and memory were measured on ${each.join("; ")}.`);
}

const documents = (files) => h("table", { class: "documents" },
  h("thead", null, h("tr", null, h("th", { scope: "col" }, "Other files"), h("th", { scope: "col", class: "number" }, "Size"),
    h("th", { scope: "col", class: "wide" }, "SHA-256"), h("th", null, ""))),
  h("tbody", null, files.map((file) => h("tr", null,
    h("td", null, file.name, DOCUMENTS[file.name] && h("span", { class: "models" }, DOCUMENTS[file.name])), h("td", { class: "number" }, bytes(file.bytes)),
    h("td", { class: "sum mono wide", title: file.sha256 }, file.sha256),
    h("td", { class: "number" }, fileLink(file.href, file.name, "Download"))))));

/** An export that has not made its files: its state and how far it is. */
const exportLine = (one) => h("div", { class: "export-line" }, pill(one),
  h("a", { href: `#/jobs/${one.id}` }, `export of ${formatsOf(one)}`),
  one.error ? h("span", { class: "notice" }, one.error.message) : h("span", { class: "quiet" }, one.waiting?.message || one.phase || ""),
  !TERMINAL.includes(one.status) && bar(one));

const formatsOf = (one) => one.resolved_spec.export.map((name) => NAMES[name] || name).join(", ");
