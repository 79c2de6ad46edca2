// Registered data sets and models: the lists with their states, and the page of one of them.

import { age, bytes, count, h, json, percent, repeatedly, request, short, show, warningTexts } from "./common.js";

/** For each kind: the address of the API, the address of the page, and the words for one of it. */
const KINDS = {
  datasets: { path: "/v1/datasets", title: "Data sets", one: "data set", details: datasetDetails },
  models: { path: "/v1/models", title: "Models", one: "model", details: modelDetails },
};
const SPLITS = { train: "Training", val: "Validation", test: "Test" };
const MOST_CLASSES = 200;
const STATE_CLASS = { inspecting: "running", ready: "succeeded", refused: "failed" };

export function registeredPage(main, signal, showError) {
  const parts = Object.entries(KINDS).map(([noun, kind]) => {
    const place = h("section", { class: "card jobs" });
    main.append(h("div", { class: "heading" }, h("h1", null, kind.title)), place);
    return { noun, kind, place };
  });
  async function refresh() {
    try {
      for (const { noun, kind, place } of parts) {
        const entries = await all(kind.path, signal);
        show(place, [entries, entries.map((one) => age(one.created_at))], () => table(noun, entries));
      }
      showError(null);
    } catch (error) {
      if (!signal.aborted) showError(error);
    }
  }
  repeatedly(signal, () => 2500, refresh);
}

async function all(path, signal) {
  const found = [];
  let after = "";
  do {
    const { data, next } = await json(`${path}?limit=100${after && `&after=${encodeURIComponent(after)}`}`, { signal });
    found.push(...data);
    after = next;
  } while (after && found.length < 1000);
  return found;
}

function table(noun, entries) {
  if (!entries.length) return h("p", { class: "none-yet quiet" }, "None yet: upload a file, then register it.");
  const head = noun === "datasets" ? ["State", "Data set", "Classes", "Training images", "Test images", "Age"] : ["State", "Model", "Classes", "Parameters", "Format", "Age"];
  return h("table", null,
    h("thead", null, h("tr", null, head.map((name, at) => h("th", { scope: "col", class: at > 1 ? `number${at > 2 ? " wide" : ""}` : null }, name)))),
    h("tbody", null, entries.map((one) => {
      const facts = one.facts || {};
      const figures = noun === "datasets"
        ? [facts.labelled === false ? "no labels" : count(facts.num_classes), count(facts.train), count(facts.test)]
        : [count(facts.num_classes), short(facts.parameters), facts.format || "–"];
      return h("tr", null,
        h("td", null, state(one), one.warnings.length > 0 && h("span", { class: "warned" }, warningsOf(one)), progress(one)),
        h("td", null, h("a", { class: "name", href: `#/${noun}/${encodeURIComponent(one.id || one.name)}` }, one.name),
          h("div", { class: "models" }, one.error ? one.error.message : facts.architecture || facts.layout || (one.id ? "" : "built in"))),
        figures.map((text, at) => h("td", { class: `number${at ? " wide" : ""}` }, text)),
        h("td", { class: "number wide quiet" }, one.created_at ? age(one.created_at) : ""));
    })));
}

const warningsOf = ({ warnings: { length } }) => `${length} warning${length === 1 ? "" : "s"}`;
const state = (one) => h("span", { class: `pill ${STATE_CLASS[one.state]}` }, one.state);

/** The bar of an inspection, with the number of images that were read; nothing after it. */
function progress(one) {
  if (one.state !== "inspecting") return null;
  const { done, total } = one.progress || {};
  const share = total ? done / total : 0;
  const fill = h("i");
  fill.style.width = `${100 * share}%`;
  return [
    h("span", { class: "waiting" }, total ? `${count(done)} of ${count(total)} images` : "no progress known yet"),
    h("div", {
      class: "bar running", role: "progressbar", "aria-label": "Progress of the inspection",
      "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * share),
    }, fill),
  ];
}

export function registeredOnePage(main, noun, id, signal, showError) {
  const kind = KINDS[noun];
  const at = `${kind.path}/${encodeURIComponent(id)}`;
  const head = h("section", { class: "card job-head" });
  const failure = h("section", { class: "card failure", hidden: true });
  const warnings = h("section", { class: "card warnings", hidden: true });
  const details = h("div", { class: "job" });
  const notice = h("p", { class: "notice", role: "alert" });
  main.append(h("div", { class: "job" }, head, failure, warnings, details));
  let entry = null;

  async function refresh() {
    try {
      if (entry === null || entry.state === "inspecting") entry = await json(at, { signal });
      draw();
      showError(null);
    } catch (error) {
      if (signal.aborted) return;
      showError(error);
      if (error.status === 404) show(head, id, () => [h("h1", null, `No such ${kind.one}`), h("p", { class: "quiet" }, error.message)]);
    }
  }

  function draw() {
    document.title = `${entry.name} · ${entry.state} · Distillery`;
    show(head, [entry.state, entry.progress, age(entry.created_at)], header);
    failure.hidden = !entry.error;
    if (entry.error) show(failure, entry.error, refusal);
    warnings.hidden = !entry.warnings.length;
    show(warnings, entry.warnings, warningTexts);
    if (entry.facts) show(details, entry.facts, () => kind.details(entry, signal));
  }

  function header() {
    const button = h("button", { type: "button", onclick: cancel }, "Cancel the inspection");
    return [
      h("div", { class: "line" }, h("h1", null, entry.name), state(entry), entry.state === "inspecting" && h("div", { class: "verbs" }, button)),
      h("div", { class: "facts" },
        entry.id && h("span", { class: "mono" }, entry.id),
        h("span", null, entry.created_at ? `registered ${age(entry.created_at)}` : "built in")),
      progress(entry), notice,
    ];
  }

  async function cancel() {
    try {
      await request(at, { method: "DELETE" });
      location.hash = "#/registered";
    } catch (error) {
      notice.textContent = error.message;
    }
  }

  repeatedly(signal, () => 1500, refresh);
}

function refusal({ code, message, hint, errors }) {
  const more = errors.length > 1 || (errors[0] && errors[0].message !== message) ? errors : [];
  return [
    h("h2", null, code.replaceAll("_", " ")), h("p", null, message), hint && h("p", { class: "hint" }, hint),
    more.length > 0 && h("ul", null, more.map((one) => h("li", null, `${one.pointer}: ${one.message}`))),
  ];
}

function datasetDetails(entry, signal) {
  const facts = entry.facts;
  const [height, width] = facts.image_size;
  const splits = Object.entries(facts.splits || {}).map(([name, images]) => `${name} ${count(images)}`).join(", ");
  const pictures = Object.entries(facts.pictures || {}).map(([kind, images]) => `${kind.replaceAll("_", " ")} ${count(images)}`).join(", ");
  return [
    entry.thumbnails && sheet(entry, signal),
    section("What was found", rows([
      ["Layout", facts.layout || facts.kind],
      ["Splits", splits || "those of the published data set"],
      ["Training images", count(facts.train)],
      facts.validation > 0 && ["Validation images", count(facts.validation)],
      ["Test images", count(facts.test) + (facts.test_carved ? ", set aside from the training images" : "")],
      ["Classes", facts.labelled === false ? "no labels" : count(facts.num_classes)],
      ["Image size", `${width} × ${height} pixels, ${facts.channels === 1 ? "grey" : `${facts.channels} channels${facts.grey ? ", all grey" : ""}`}`],
      ["Mean", numbers(facts.mean)],
      ["Standard deviation", numbers(facts.std)],
      pictures && ["Picture files", pictures],
      facts.pixels_cut > 0 && ["Cut off by the crop", `${percent(facts.pixels_cut)} of all pixels`],
      facts.skipped > 0 && ["Unreadable, left out", `${count(facts.skipped)}: ${facts.skipped_names.join(", ")}`],
      facts.merged?.length > 0 && ["Read as one", facts.merged.join(", ")],
      facts.respelled > 0 && ["Named otherwise in a table", `${count(facts.respelled)}: ${Object.entries(facts.respelled_names).map(([name, file]) => `${name} is ${file}`).join(", ")}`],
      facts.repeated?.length > 0 && ["Inside of each class", facts.repeated.join(", ")],
    ])),
    facts.left_out?.length > 0 && section("Left out", rows(facts.left_out.map(({ what, count: number, why }) => [what, number ? `${count(number)}: ${why}` : why]))),
    classes(facts),
    section("Options", Object.keys(facts.options || {}).length
      ? rows(Object.entries(facts.options).map(([name, value]) => [name, JSON.stringify(value)]))
      : h("p", { class: "quiet" }, "None was given.")),
  ];
}

function classes(facts) {
  const names = facts.class_names || [];
  if (!names.length) return null;
  const splits = Object.keys(SPLITS).filter((split) => facts.class_counts?.[split]);
  return section(`${count(names.length)} classes`, h("table", null,
    h("thead", null, h("tr", null, h("th", { scope: "col" }, "Class"), splits.map((split) => h("th", { scope: "col", class: "number" }, SPLITS[split])))),
    h("tbody", null, names.slice(0, MOST_CLASSES).map((name, at) => h("tr", null,
      h("td", null, name), splits.map((split) => h("td", { class: "number" }, count(facts.class_counts[split][at])))))),
  ), names.length > MOST_CLASSES && h("p", { class: "quiet" }, `and ${count(names.length - MOST_CLASSES)} more`));
}

/** The thumbnails, each with the name of its class. They are drawn on canvases: an <img> would send no API key. */
function sheet(entry, signal) {
  const { href, side, columns, classes: labels } = entry.thumbnails;
  const names = entry.facts.class_names || [];
  const canvases = labels.map(() => h("canvas", { width: side, height: side }));
  (async () => {
    const image = await createImageBitmap(await (await request(href, { signal })).blob());
    canvases.forEach((canvas, at) => canvas.getContext("2d").drawImage(
      image, (at % columns) * side, Math.floor(at / columns) * side, side, side, 0, 0, side, side));
  })().catch((error) => { if (!signal.aborted) canvases[0]?.parentElement.parentElement.replaceChildren(error.message); });
  return section("Some training images", h("div", { class: "thumbnails" }, labels.map((label, at) => h("figure", null,
    canvases[at], label !== null && h("figcaption", null, names[label] ?? `class ${label}`)))));
}

/** Facts of a model that have a row of their own; all others that say something follow with their names. */
const OF_MODEL = ["architecture", "format", "parameters", "bytes", "num_classes", "channels", "image_size", "mean", "std", "class_names", "digest", "loading"];

function modelDetails({ facts, measured }) {
  const others = Object.entries(facts).filter(([name]) => !OF_MODEL.includes(name));
  const [height, width] = facts.image_size || [];
  return [
    section("What was found", rows([
      ["Architecture", facts.architecture],
      ["Parameters", count(facts.parameters)],
      ["File", `${bytes(facts.bytes)}, ${facts.format}`],
      ["Classes", count(facts.num_classes)],
      ["Channels", count(facts.channels)],
      height && ["Learned from images of", `${width} × ${height} pixels`],
      ["Mean", facts.mean ? numbers(facts.mean) : "not known"],
      ["Standard deviation", facts.std ? numbers(facts.std) : "not known"],
      ...named(others),
    ])),
    section("Measured accuracy", measured.length
      ? h("table", null,
        h("thead", null, h("tr", null, ["Data set", "Accuracy", "95 % interval", "Test images", "Age"].map((name, at) => h("th", { scope: "col", class: at ? "number" : null }, name)))),
        h("tbody", null, measured.map((one) => h("tr", null,
          h("td", null, h("a", { href: `#/jobs/${one.job}` }, one.dataset)),
          [percent(one.accuracy), one.interval.map((end) => percent(end)).join(" to "), count(one.test_samples), age(one.finished_at)]
            .map((text) => h("td", { class: "number" }, text))))))
      : h("p", { class: "quiet" }, "Not measured yet: distillery models evaluate NAME --dataset DATASET.")),
    facts.loading && section("How the weights were read", rows(named(Object.entries(facts.loading)))),
    facts.class_names && section("Class names", h("p", null, facts.class_names.slice(0, MOST_CLASSES).join(", ") + (facts.class_names.length > MOST_CLASSES ? ", …" : ""))),
  ];
}

/** Facts that say something, by their names. */
const named = (entries) => entries
  .filter(([, value]) => value && (typeof value !== "object" || Object.keys(value).length))
  .map(([name, value]) => [name.replaceAll("_", " "), typeof value === "object" ? JSON.stringify(value) : String(value)]);
const numbers = (values) => values.map((value) => String(Number(value.toPrecision(4)))).join(", ");
const section = (title, ...content) => h("section", { class: "card found" }, h("h2", null, title), content);
const rows = (pairs) => h("table", null, h("tbody", null, pairs.filter(Boolean).map(([name, value]) => h("tr", null, h("th", { scope: "row" }, name), h("td", null, value)))));
