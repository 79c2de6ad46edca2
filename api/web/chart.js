// A line chart with a legend: uPlot in the page's colours.

import { h } from "./common.js";

const dark = matchMedia("(prefers-color-scheme: dark)");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/**
 * Add a chart to `place`. `update` takes lines, each {label, colour, points: [[x, y], …], dash?}, and the number of
 * lines that are left out. A line of a single point with x = null is drawn as a level across the whole chart.
 */
export function chart(place, title, format, signal) {
  const legend = h("div", { class: "legend" });
  const canvas = h("div", { role: "img", "aria-label": title });
  const none = h("div", { class: "none" }, "No measurement yet");
  place.append(h("h2", null, title), legend, canvas, none);
  let plot = null;
  let shown = "";
  let lines = [];
  let more = 0;

  function draw() {
    const drawn = lines.filter(({ points }) => points.length);
    none.hidden = drawn.length > 0;
    canvas.hidden = !drawn.length;
    legend.replaceChildren(...drawn.map(named), ...(more ? [h("span", null, `and ${more} more`)] : []));
    if (!drawn.length) return;
    const data = join(drawn.map(({ points }) => points));
    const names = drawn.map(({ label }) => label).join("\n");
    if (!plot || shown !== names) {
      plot?.destroy();
      plot = new uPlot(options(drawn), data, canvas);
      shown = names;
    } else plot.setData(data);
  }

  function named(line) {
    const mark = h("i");
    mark.style.borderColor = `var(${line.colour})`;
    if (line.dash) mark.style.borderTopStyle = "dashed";
    return h("span", null, mark, line.label, " ", h("b", null, format(line.points.at(-1)[1])));
  }

  const options = (drawn) => ({
    width: place.clientWidth - 46,
    height: 215,
    legend: { show: false },
    cursor: { y: false, points: { size: 6 } },
    scales: { x: { time: false } },
    axes: [
      { stroke: colour("--quiet"), grid: { show: false }, ticks: { stroke: colour("--line"), width: 1 }, font: "11px system-ui", size: 32 },
      {
        stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false },
        font: "11px system-ui", size: 52, values: (_, ticks) => ticks.map(format),
      },
    ],
    series: [{}, ...drawn.map((line) => ({
      label: line.label, stroke: colour(line.colour), width: 2, dash: line.dash, spanGaps: true, points: { show: false },
    }))],
  });

  const rebuild = () => { plot?.destroy(); plot = null; draw(); };
  dark.addEventListener("change", rebuild, { signal });
  const resized = new ResizeObserver(() => plot?.setSize({ width: place.clientWidth - 46, height: 215 }));
  resized.observe(place);
  signal.addEventListener("abort", () => { resized.disconnect(); plot?.destroy(); }, { once: true });
  return { update(next, omitted = 0) { lines = next; more = omitted; draw(); } };
}

/** uPlot's data: one list of x for all lines, null where a line has no point. A level becomes two points. */
function join(lines) {
  const ends = lines.filter((points) => points.length > 1).flatMap((points) => [points[0][0], points.at(-1)[0]]);
  const [first, last] = ends.length ? [Math.min(...ends), Math.max(...ends)] : [0, 1];
  const tables = lines.map((points) => {
    const level = points.length === 1 && points[0][0] === null;
    const whole = level ? [[first, points[0][1]], [last, points[0][1]]] : points;
    return [whole.map(([x]) => x), whole.map(([, y]) => y)];
  });
  return uPlot.join(tables);
}
