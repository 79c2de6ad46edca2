// What a job has found: the verdict with its intervals, the models side by side, evaluations, exports, benchmarks.

import {
  bytes, count, displayName, duration, h, percent, points, range, short, svg, TERMINAL,
} from "./common.js";

/** The part of a job's page with its result, by the kind of the job. */
export function result(job, data) {
  const shown = { distillation: report, evaluation, export: exported, benchmark }[job.kind];
  if (shown) return shown(job, data);
  return job.result ? h("pre", { tabindex: 0 }, JSON.stringify(job.result, null, 2)) : pending(job, "result");
}

const pending = ({ status }, what) => h("p", { class: "quiet" }, TERMINAL.includes(status)
  ? `This job ended without a ${what}.` : `The ${what} appears here when the job has succeeded.`);

/** The report: the verdict, then teacher, student and the same student alone on the same test images. */
function report(job, data) {
  const { teacher, student, alone, gain, verdict, proof, models: others, test_samples: images } = job.result || {};
  const { baseline, teacher: taught } = job.resolved_spec;
  const columns = [
    taught && ["Teacher", teacher, ""],
    ["Student", student, "of-student"],
    (alone || (baseline && baseline !== "none")) && ["Student alone", alone, ""],
  ].filter(Boolean);
  const row = (name, value, kind) => h("tr", { class: kind }, h("th", { scope: "row" }, name),
    columns.map(([, model, css]) => h("td", { class: `number ${css}` }, model ? value(model) : "–")));
  const check = !teacher && job.teacher_check;
  if (!student && !check && TERMINAL.includes(job.status)) return [h("p", null, noReport(job)), dataFacts(data, images)];
  const further = Object.fromEntries(Object.entries(others || {}).filter(([name]) => !(proof && /-seed-\d+$/.test(name))));
  return [
    student && figures(proof, gain),
    verdict && h("p", { class: "verdict" }, verdict),
    h("table", { class: "models-table" },
      h("thead", null, h("tr", null, h("td", null, ""), columns.map(([name, model]) =>
        h("th", { scope: "col" }, name, h("span", { class: "models" }, model?.architecture || architectures(job, name)))))),
      h("tbody", null,
        h("tr", { class: "first" }, h("th", { scope: "row" }, "Accuracy"), columns.map(([name, model, css]) =>
          h("td", { class: `number ${css}` }, percent(name === "Teacher" && check ? check.accuracy : model?.accuracy),
            name === "Teacher" && check?.interval && h("span", { class: "interval" }, range(check.interval))))),
        student && row("Parameters", (model) => count(model.parameters)),
        student && row("Size", (model) => bytes(model.bytes)),
        student && taught && row("Agrees with teacher", (model) => percent(model.agreement)),
        rowsOfMeasures(job.result, columns))),
    h("p", { class: "sentence" }, student ? sentence(job, teacher, student, alone, gain) : noReport(job)),
    dataFacts(job.result?.dataset || data, images),
    proof && seeds(proof),
    job.result?.classes && worstClasses(job.result.classes),
    Object.keys(further).length > 0 && otherModels(further),
    timings(job.result?.timings),
  ];
}

/** The network under a heading of the table while there is no report. */
function architectures({ resolved_spec: spec }, heading) {
  const one = [heading === "Teacher" ? spec.teacher : spec.student].flat();
  return one.map((model) => (typeof model === "string" ? model : model?.architecture)).filter(Boolean).join(" + ") || "\u00a0";
}

/** Gap closed and gain with their intervals. A report of an earlier version has the gain alone. */
function figures(proof, gain) {
  if (!proof) return gain != null && h("div", { class: "proof" }, gainFigure({ value: gain }));
  const ruling = rulingOf(proof);
  const whole = (value) => percent(value, 0);
  const why = proof.no_gap?.message || `its interval over ${proof.over_seeds?.seeds} seeds has no bounds: more seeds are needed`;
  return h("div", { class: "proof" },
    ruling.gap ? figure("Gap closed", "The part of the way from the student alone to its teacher: (student − alone) / (teacher − alone)",
      whole(ruling.gap.value), bounds(ruling.gap, whole) + ruling.scope, tone(ruling.gap), scale(ruling.gap, true))
      : (proof.no_gap || ruling.gain) && h("div", { class: "figure" }, h("span", { class: "label" }, "Gap closed"), h("b", null, "not stated"),
        h("span", { class: "interval" }, why)),
    ruling.gain && gainFigure(ruling.gain, ruling.scope));
}

/** The figures that the sentence of the verdict is about: of several seeds their means, unless the images leave it open. */
function rulingOf({ gap_closed: gap, gain, over_seeds: over }) {
  if (!over?.gain) return { gap, gain, scope: "" };
  if (over.gain_on_other_images) return { gap: over.gap_closed_on_other_images, gain: over.gain_on_other_images, scope: ", for other seeds and images" };
  if (gain.low <= 0 && gain.high >= 0) return { gap, gain, scope: ", for other images, with the delivered seed" };
  return { gap: over.gap_closed, gain: over.gain, scope: ", for other seeds" };
}

const gainFigure = (gain, scope = "") => figure("Gain over the student alone", "Points of accuracy above the same student trained without a teacher",
  `${points(gain.value)} points`, gain.low != null && bounds(gain, points) + scope, tone(gain), gain.low != null && scale(gain, false));

const figure = (label, title, value, interval, css, drawing) => h("div", { class: "figure", title },
  h("span", { class: "label" }, label), h("b", { class: css }, value), interval && h("span", { class: "interval" }, interval), drawing);

const bounds = ({ low, high }, text) => `95 % interval ${text(low)} to ${text(high)}`;
/** Good or bad only if the interval says so. Without an interval the sign decides. */
const tone = ({ value, low = value, high = value }) => (low > 0 ? "up" : high < 0 ? "down" : "");

/** An interval as a drawing: of a gap from alone (0) to teacher (1), of a gain on both sides of no gain. */
function scale({ value, low, high }, isGap) {
  const reach = 1.15 * Math.max(Math.abs(low), Math.abs(high), 1e-6);
  const [from, to] = isGap ? [Math.max(-1, Math.min(0, low)), Math.min(2, Math.max(1, high))] : [-reach, reach];
  const x = (at) => (4 + (192 * (Math.min(Math.max(at, from), to) - from)) / (to - from)).toFixed(1);
  const marks = isGap ? [[0, "alone"], [1, "teacher"]] : [[0, "no gain"]];
  return svg("svg", { class: "scale", viewBox: "0 0 200 34", "aria-hidden": true },
    svg("line", { class: "axis", x1: 4, x2: 196, y1: 10, y2: 10 }),
    marks.map(([at, name]) => [
      svg("line", { class: "mark", x1: x(at), x2: x(at), y1: 3, y2: 17 }),
      svg("text", { x: x(at), y: 30, "text-anchor": x(at) < 20 ? "start" : x(at) > 180 ? "end" : "middle" }, name)]),
    svg("line", { class: "band", x1: x(low), x2: x(high), y1: 10, y2: 10 }),
    svg("circle", { class: "at", cx: x(value), cy: 10, r: 4.5 }));
}

/** The data set in a line, known before anything is trained. */
function dataFacts(facts, images) {
  if (!facts) return null;
  const [height, width] = facts.image_size || [];
  const parts = [
    facts.labelled === false ? "no labels" : facts.num_classes != null && `${count(facts.num_classes)} classes`,
    height && `${width} × ${height} pixels${facts.channels === 1 || facts.grey ? ", grey" : ""}`,
    facts.train != null && `${count(facts.train)} training images`,
    facts.validation > 0 && `${count(facts.validation)} validation images`,
    (images ?? facts.test) != null && `${count(images ?? facts.test)} test images${facts.test_carved ? ", set aside from the training images" : ""}`,
  ].filter(Boolean);
  return parts.length > 0 && h("p", { class: "quiet" }, `Data: ${parts.join(", ")}.`);
}

/** Agreement where the teacher errs, and calibration: for each column that has the figure. */
function rowsOfMeasures(report, columns) {
  const key = { Teacher: "teacher", Student: "student", "Student alone": "alone" };
  const rows = [
    ["Agrees where the teacher errs", (name) => report?.fidelity?.[name]?.where_teacher_errs, "Share of the test images on which the teacher is wrong"],
    ["Calibration error", (name) => report?.calibration?.[name]?.ece, "Expected calibration error: how far the stated probability is from the share of right answers"],
  ];
  return rows.filter(([, value]) => columns.some(([name]) => value(key[name]) != null)).map(([name, value, title]) =>
    h("tr", null, h("th", { scope: "row", title }, name), columns.map(([column, , css]) =>
      h("td", { class: `number ${css}` }, percent(value(key[column]))))));
}

/** The figures of each seed, and their means. */
function seeds({ gap_closed: gap, gain, seeds: each, over_seeds: over }) {
  if (!each || each.length < 2) return null;
  const whole = (value) => percent(value, 0);
  const ends = ({ low, high }, text) => h("span", { class: "interval" }, `${text(low)} to ${text(high)}`);
  const cell = (name, one, text) => h("td", { class: "number", "data-label": name }, text(one?.value ?? one), one?.low != null && ends(one, text));
  const row = (name, student, alone, gained, closed) => h("tr", null, h("th", { scope: "row" }, name),
    cell("Student", student?.value ?? student, percent), cell("Student alone", alone?.value ?? alone, percent), cell("Gain", gained, points), cell("Gap closed", closed, whole));
  return h("table", { class: "further stacked" },
    h("thead", null, h("tr", null, ["", "Student", "Student alone", "Gain", "Gap closed"].map((name, at) => h("th", { scope: "col", class: at ? "number" : null }, name)))),
    h("tbody", null,
      each.map((one, at) => row(`Seed ${one.seed}${at ? "" : ", delivered"}`, one.student, one.alone,
        at ? (one.alone == null ? null : one.student - one.alone) : gain, at ? one.gap_closed : gap)),
      over && row("Mean, for other seeds", over.student, over.alone, over.gain, over.gap_closed),
      over?.gain_on_other_images && row("Mean, for other seeds and images", over.student, over.alone, over.gain_on_other_images, over.gap_closed_on_other_images)));
}

/** The classes on which the student is least accurate; the report has images of them. */
function worstClasses({ worst, teacher, alone }) {
  if (!worst?.length) return null;
  const columns = [["Teacher", teacher], ["Student alone", alone]].filter(([, figures]) => figures);
  return h("details", null, h("summary", null, "Classes on which the student is least accurate"),
    h("table", { class: "further" },
      h("thead", null, h("tr", null, ["Class", "Student", ...columns.map(([name]) => name)].map((name, at) =>
        h("th", { scope: "col", class: at ? "number" : null }, name)))),
      h("tbody", null, worst.map((one) => h("tr", null, h("th", { scope: "row" }, one.name),
        [one.accuracy, ...columns.map(([, figures]) => figures[one.number])].map((value) => h("td", { class: "number" }, percent(value))))))));
}

/** What took the time of a job, in a line; null for an earlier version. What took less than 0.05 s is left out. */
function timings(all) {
  const brief = (seconds) => (seconds < 10 ? `${seconds.toFixed(1)} s` : duration(seconds));
  const part = ([name, value]) => {
    const trials = typeof value === "object" ? Object.entries(value) : [];
    const seconds = trials.length ? trials.reduce((sum, [, one]) => sum + one, 0) : value;
    const each = trials.map(([trial, one]) => `${displayName(trial)} ${brief(one)}`).join(", ");
    return seconds >= 0.05 && `${name.replaceAll("_", " ")} ${brief(seconds)}${trials.length > 1 ? ` (${each})` : ""}`;
  };
  const parts = Object.entries(all || {}).map(part).filter(Boolean);
  return parts.length > 0 && h("p", { class: "quiet" }, `Time: ${parts.join(", ")}.`);
}

/** The result of an evaluation: one model on all test images, then each class. */
function evaluation({ result, status }) {
  if (!result) return h("p", { class: "quiet" }, TERMINAL.includes(status)
    ? "This job ended before the model was measured."
    : "The figures appear here when the model has been measured on the test images.");
  const fact = (name, text) => h("tr", null, h("th", { scope: "row" }, name), h("td", { class: "number" }, text));
  return [
    h("table", { class: "facts-table" }, h("tbody", null,
      h("tr", { class: "first" }, h("th", { scope: "row" }, "Accuracy"), h("td", { class: "number" }, percent(result.accuracy))),
      fact("95 % interval", range(result.interval)),
      fact("Top-5 accuracy", percent(result.accuracy_top5)),
      fact("Test images", count(result.test_samples)),
      fact("Parameters", count(result.parameters)))),
    h("details", null, h("summary", null, "Accuracy of each class"), h("table", null, h("tbody", null,
      result.per_class.map((one) => fact(one.name, percent(one.accuracy)))))),
    timings(result.timings),
  ];
}

/** All other measured models: each of several teachers, assistants, generations, peers, exits, ensembles. */
function otherModels(others) {
  const figures = ["Accuracy", "Parameters", "Size", "Agrees with teacher"];
  return h("table", { class: "further" },
    h("thead", null, h("tr", null, h("th", { scope: "col" }, "Other models"), h("th", { scope: "col" }, "Network"),
      figures.map((name, place) => h("th", { scope: "col", class: place ? "number wide" : "number" }, name)))),
    h("tbody", null, Object.entries(others).map(([name, model]) => h("tr", null,
      h("th", { scope: "row" }, displayName(name)), h("td", null, model.architecture),
      h("td", { class: "number" }, percent(model.accuracy)), h("td", { class: "number wide" }, count(model.parameters)),
      h("td", { class: "number wide" }, bytes(model.bytes)), h("td", { class: "number wide" }, percent(model.agreement))))));
}

const noReport = (job) => h("span", { class: "quiet" },
  TERMINAL.includes(job.status)
    ? "This job ended before its models were measured."
    : "The report appears here when the models have been measured on the test images.");

function sentence(job, teacher, student, alone, gain) {
  const parts = [];
  const supervised = job.resolved_spec?.beta == null; // A job without a distillation loss.
  const baseline = job.resolved_spec?.baseline;
  if (teacher) {
    const times = teacher.parameters / student.parameters;
    parts.push((teacher.accuracy == null ? `The student has ${percent(student.accuracy)} accuracy`
      : `The student has ${percent(student.accuracy / teacher.accuracy)} of the teacher's accuracy`)
      + (times >= 1.05 ? ` with ${times >= 10 ? Math.round(times) : times.toFixed(1)} times fewer parameters.` : "."));
  } else parts.push(`${supervised ? "Trained on labels alone" : "Distilled without a teacher"}: ${percent(student.accuracy)} accuracy on the test images.`);
  // A report of version 2 says it in its verdict, which knows the interval.
  if (job.result.proof) return parts.join("");
  if (gain != null && alone) {
    if (gain > 0) parts.push(` Distillation gained ${(100 * gain).toFixed(1)} points over the same student alone.`);
    else parts.push(` Distillation did not help: ${points(gain)} points against the same student alone.`);
  } else if (!supervised && (!baseline || baseline === "none"))
    parts.push(" No baseline was trained, so the gain of distillation is not known.");
  return parts.join("");
}

/** The student that an export has taken; its files are in the box of files. */
function exported(job) {
  if (!job.result) return pending(job, "table of files");
  const { measured, checkpoint, files } = job.result;
  const refused = files.filter((file) => file.refused).length;
  const made = files.length - refused;
  const fact = (name, text) => h("tr", null, h("th", { scope: "row" }, name), h("td", { class: "number" }, text));
  const from = checkpoint.step == null ? `${checkpoint.which} epoch, of the finished job`
    : `${checkpoint.which}${checkpoint.epoch == null ? "" : `, epoch ${checkpoint.epoch}`}, at step ${count(checkpoint.step)}`;
  return [
    h("p", { class: "verdict" }, `${made} file${made === 1 ? "" : "s"} made${refused ? `, ${refused} refused` : ""}.`),
    h("table", { class: "facts-table" }, h("tbody", null,
      fact("Student", measured.architecture), fact("Weights", from), fact("Accuracy", percent(measured.accuracy)),
      measured.interval && fact("95 % interval", range(measured.interval)), fact("Test images", count(measured.test_samples)),
      fact("Parameters", count(measured.parameters)))),
    timings(job.result.timings),
  ];
}

/** The size of a network; its latencies are in the box of files, a row for each format. */
function benchmark(job) {
  if (!job.result) return pending(job, "table of speeds");
  const found = job.result;
  const [height, width] = found.image_size;
  const fact = (name, text) => h("tr", null, h("th", { scope: "row" }, name), h("td", { class: "number" }, text));
  return [
    h("table", { class: "facts-table" }, h("tbody", null,
      fact("Network", found.architecture), fact("Parameters", count(found.parameters)), fact("Size", bytes(found.bytes)),
      fact("Multiplications of one image", found.macs == null ? "not known" : short(found.macs)),
      fact("Input", `${found.channels} × ${height} × ${width}`), fact("Classes", count(found.num_classes)),
      fact("Device", [found.device.name || found.device.kind, `${found.threads} thread${found.threads === 1 ? "" : "s"}`].join(", ")))),
    h("p", { class: "quiet" }, "On a machine that does other work meanwhile latencies are larger."),
  ];
}
