// The files of a job: each with what was measured on it, those that were refused, and a form to make more.

import { bar, bytes, fileLink, h, json, key, milliseconds, percent, pill, points, post, TERMINAL } from "./common.js";

/** Formats of POST /v1/jobs/{id}/exports, with their names for people. */
const FORMATS = [
  ["safetensors", "safetensors"], ["onnx", "ONNX"], ["onnx_int8", "ONNX, int8"], ["torch_export", "torch.export"], ["openvino", "OpenVINO"],
];
const NAMES = Object.fromEntries(FORMATS);
/** With less of the CPU than that, latencies are said to be too long. */
const BUSY = 0.8;
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
      h("h2", null, "Files"), reportLinks(others), measured.length > 0 && table(measured), int8(job.result?.quantization), others.length > 0 && documents(others),
      pending.map(exportLine), makes && form,
    ].flat().filter(Boolean));
  }

  /** What was measured: the files of the job, then those of its exports, each with where it is. */
  function rows() {
    const own = new Map((artifacts || []).map((file) => [file.name, file]));
    const ended = (exports || []).filter(({ status }) => status === "succeeded");
    return [
      ...(job.result?.files || []).map((file) => ({ ...file, float: (job.result.student || job.result.measured)?.accuracy, href: own.get(file.name)?.href })),
      ...ended.flatMap((one) => (one.result?.files || []).map((file) => ({
        ...file, float: one.result.measured.accuracy, made: one.id, checkpoint: one.resolved_spec.checkpoint,
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

/** The files with their figures, which were measured on the files after they were written. A benchmark's have no accuracy. */
function table(files) {
  const batches = [...new Set(files.flatMap(({ latency }) => (latency || []).map(({ batch }) => batch)))].sort((one, other) => one - other).slice(0, 3);
  const has = (name) => files.some((file) => file[name] != null);
  const columns = [
    has("accuracy") && ["Accuracy", "Of the file on the test images; of an int8 file also the points beside the float student", (file) => [percent(file.accuracy),
      file.quantization && file.accuracy != null && file.float != null && h("span", { class: "interval" }, points(file.accuracy - file.float)),
      file.accuracy_without_overflow != null && h("span", { class: "interval" }, `${percent(file.accuracy_without_overflow)} where int8 does not overflow`)]],
    has("agreement") && ["Agrees", "Share of the test images on which the file and the student predict the same class", (file) => percent(file.agreement)],
    ["Size", null, (file) => bytes(file.bytes)],
    ...batches.map((batch) => [images(batch), "Latency: the median, and the time that 95 % do not exceed", (file) => latency(file, batch)]),
    has("peak_memory_bytes") && ["Memory", "The most memory of a process that runs the file", (file) => bytes(file.peak_memory_bytes)],
    has("href") && ["", null, (file) => file.href && fileLink(file.href, file.name, "Download", { title: file.sha256 && `SHA-256 ${file.sha256}` })],
  ].filter(Boolean);
  return [
    h("div", { class: "scrolled" }, h("table", { class: "measured stacked" },
      h("thead", null, h("tr", null, h("th", { scope: "col" }, "File"), columns.map(([name, title]) => h("th", { scope: "col", class: "number", title }, name)))),
      h("tbody", null, files.map((file) => fileRow(file, columns))))),
    machines(files),
  ];
}

const images = (batch) => (batch === 1 ? "1 image" : `${batch} images`);

function latency(file, batch) {
  const found = (file.latency || []).find((one) => one.batch === batch);
  return found ? [milliseconds(found.p50_ms), h("span", { class: "interval" }, `95 %: ${milliseconds(found.p95_ms)}`)] : "–";
}

function fileRow(file, columns) {
  const about = [file.runtime, QUANTIZATIONS[file.quantization], file.checkpoint && `${file.checkpoint} epoch`].filter(Boolean).join(", ");
  const name = h("td", null, h("b", null, file.name || NAMES[file.format] || file.format), h("span", { class: "models" }, about,
    file.made && [", ", h("a", { href: `#/jobs/${file.made}` }, "made later")]));
  if (file.refused) return h("tr", { class: "refused" }, name, h("td", { colspan: columns.length },
    h("span", { class: "pill failed" }, "refused"), ` ${file.refused.message}`, file.refused.hint && h("p", { class: "quiet" }, file.refused.hint)));
  return h("tr", null, name, columns.map(([label, , value]) => h("td", { class: "number", "data-label": label || null }, value(file))));
}

/** The same student quantised after its float epochs, and trained for int8: each beside the float file of its weights. */
function int8(found) {
  if (!found?.rows.some((row) => row.student === "before")) return null;
  const epochs = `${found.aware_epochs} epoch${found.aware_epochs === 1 ? "" : "s"}`;
  const weights = { before: `before the last ${epochs}`, delivered: `after the last ${epochs}, for int8` };
  const columns = [
    ["Accuracy", (row) => percent(row.accuracy)], ["Beside float", (row) => points(row.lost == null ? null : -row.lost)],
    ["Agrees", (row) => percent(row.agreement)], ["Size", (row) => bytes(row.bytes)],
  ];
  return h("details", { class: "make" }, h("summary", null, "Float beside int8, before and after the training for it"),
    h("table", { class: "measured stacked" },
      h("thead", null, h("tr", null, h("th", { scope: "col" }, "Weights"), columns.map(([name]) => h("th", { scope: "col", class: "number" }, name)))),
      h("tbody", null, found.rows.map((row) => h("tr", null,
        h("td", null, h("b", null, row.quantization ? "int8" : "float"), h("span", { class: "models" }, weights[row.student])),
        row.refused ? h("td", { colspan: columns.length }, row.refused.message)
          : columns.map(([label, value]) => h("td", { class: "number", "data-label": label }, value(row))))))));
}

/** Where the latencies were measured, in a line. */
function machines(files) {
  const each = [...new Set(files.filter(({ latency }) => latency?.length).map(({ cpu, device, threads }) =>
    [cpu || device?.name, threads && `${threads} thread${threads === 1 ? "" : "s"}`].filter(Boolean).join(", ")))].filter(Boolean);
  const share = Math.min(1, ...files.flatMap(({ latency }) => (latency || []).map((one) => one.cpu_share ?? 1)));
  const busy = share < BUSY ? ` Other programs used the CPU meanwhile, and left ${percent(share, 0)} of the time to a file: such latencies are too long.` : "";
  return each.length > 0 && h("p", { class: "quiet" }, `Latency and memory were measured on ${each.join("; ")}.${busy}`);
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
