// The API reference, made from /openapi.json: each route with its parameters, answers and errors.

import { h, json } from "./common.js";

const main = document.getElementById("main");
const VERBS = ["get", "post", "patch", "delete"];

const api = await json("/openapi.json");
const named = (reference) => reference.split("/").at(-1);
const schemas = api.components.schemas;

main.append(
  h("div", { class: "heading" }, h("h1", null, "API"), h("span", { class: "quiet" }, `${api.info.title} ${api.info.version}`)),
  h("div", { class: "reference" },
    ...[...groups()].map(([tag, routes]) => h("section", { class: "card" }, h("h2", null, tag), routes.map(route))),
    h("section", { class: "card" }, h("h2", null, "Schemas"), Object.entries(schemas).sort(bySubject).map(schema))));
if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();

/** The schemas that a client needs most come first, then the others by name. */
function bySubject([one], [other]) {
  const rank = (name) => ["Problem", "JobSpec"].indexOf(name);
  return rank(other) - rank(one) || one.localeCompare(other);
}

/** Text with the words between backticks as code elements. */
function marked(text) {
  return (text || "").split("`").map((part, index) => (index % 2 ? h("code", null, part) : part));
}

function groups() {
  const routes = new Map();
  for (const [path, verbs] of Object.entries(api.paths))
    for (const verb of VERBS.filter((name) => verbs[name])) {
      const operation = verbs[verb];
      const tag = operation.tags?.[0] || "other";
      if (!routes.has(tag)) routes.set(tag, []);
      routes.get(tag).push({ path, verb, operation });
    }
  return routes;
}

function route({ path, verb, operation }) {
  const text = operation.description || operation.summary || "";
  const body = Object.values(operation.requestBody?.content || {})[0]?.schema;
  return h("details", { class: "route" },
    h("summary", null, h("span", { class: "verb" }, verb.toUpperCase()), h("code", null, path), h("span", { class: "quiet wide" }, marked(text.split(/\n\n|(?<=\.)\s/)[0]))),
    h("div", { class: "body" },
      h("p", null, marked(text.replace(/([^\n])\n(?!\n)/g, "$1 "))),
      body && h("p", null, h("b", null, "Body: "), kind(body)),
      operation.parameters?.length && fields(operation.parameters.map((p) => [p.name, `${p.in}, ${textOf(p.schema)}`, p.description || p.schema.description, p.required])),
      h("table", { class: "fields" }, h("tbody", null, Object.entries(operation.responses).map(([status, answer]) =>
        h("tr", null, h("td", null, status), h("td", null, ...Object.values(answer.content || {}).slice(0, 1).map((content) => kind(content.schema || {}))),
          h("td", { class: "quiet" }, marked(answer.description))))))));
}

function schema([name, model]) {
  const required = new Set(model.required || []);
  return h("details", { class: "route", id: name },
    h("summary", null, h("code", null, name), h("span", { class: "quiet wide" }, (model.description || "").split(/\n\n|(?<=\.)\s/)[0])),
    h("div", { class: "body" },
      model.description && h("p", null, model.description),
      fields(Object.entries(model.properties || {}).map(([field, what]) => [field, kind(what), what.description, required.has(field)]))));
}

function fields(rows) {
  return h("table", { class: "fields" }, h("tbody", null, rows.map(([name, type, text, required]) => h("tr", null,
    h("td", null, h("code", null, name), required ? " *" : ""), h("td", null, type), h("td", { class: "quiet" }, marked(text))))));
}

/** A schema in a few words, with links to the named schemas. */
function kind(what) {
  const parts = words(what);
  return h("span", null, parts.map((part, index) => [index ? " or " : "", part.link
    ? h("a", { href: `#${part.link}`, onclick: () => { document.getElementById(part.link).open = true; } }, part.text)
    : part.text]));
}

function textOf(what) {
  return words(what).map((part) => part.text).join(" or ");
}

function words(what) {
  if (!what) return [{ text: "anything" }];
  if (what.$ref) return [{ text: named(what.$ref), link: named(what.$ref) }];
  const choices = what.anyOf || what.oneOf || what.allOf;
  if (choices) return choices.flatMap(words);
  if (what.const !== undefined) return [{ text: JSON.stringify(what.const) }];
  if (what.enum) return what.enum.map((value) => ({ text: JSON.stringify(value) }));
  if (what.type === "array" && what.items) return words(what.items).map((part) => ({ ...part, text: `[${part.text}]` }));
  const bounds = [["exclusiveMinimum", "> "], ["minimum", "≥ "], ["exclusiveMaximum", "< "], ["maximum", "≤ "]]
    .filter(([name]) => what[name] !== undefined).map(([name, sign]) => sign + what[name]);
  const initial = what.default !== undefined && what.default !== null ? [`default ${JSON.stringify(what.default)}`] : [];
  return [{ text: [what.type || "anything", ...bounds, ...initial].join(", ") }];
}
