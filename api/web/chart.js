// Two lines and a legend: uPlot, in the page's colours, redrawn at most once a frame.

import { h } from "./common.js";

const dark = matchMedia("(prefers-color-scheme: dark)");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/**
 * lines: [{label, css, colour, dash?}]; `update` takes one [[x, y], …] per line.
 * A line of a single point is drawn as a level across the whole chart.
 */
export function chart(place, title, lines, format, signal) {
  const legend = h("div", { class: "legend" });
  const canvas = h("div", { role: "img", "aria-label": title });
  const none = h("div", { class: "none" }, "No measurement yet");
  place.append(h("h2", null, title), legend, canvas, none);
  let plot = null;
  let shown = [];
  let series = [];
  let asked = 0;

  function draw() {
    asked = 0;
    const drawn = lines.map((line, index) => ({ line, points: series[index] || [] })).filter(({ points }) => points.length);
    none.hidden = drawn.length > 0;
    canvas.hidden = !drawn.length;
    legend.replaceChildren(...drawn.map(({ line, points }) =>
      h("span", null, h("i", { class: line.css }), line.label, " ", h("b", null, format(points.at(-1)[1])))));
    if (!drawn.length) return;
    const data = join(drawn.map(({ points }) => points));
    const names = drawn.map(({ line }) => line.label).join();
    if (!plot || shown !== names) {
      plot?.destroy();
      plot = new uPlot(options(drawn.map(({ line }) => line)), data, canvas);
      shown = names;
    } else plot.setData(data);
  }

  const options = (wanted) => ({
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
    series: [{}, ...wanted.map((line) => ({
      label: line.label, stroke: colour(line.colour), width: 2, dash: line.dash, spanGaps: true, points: { show: false },
    }))],
  });

  const later = () => { asked ||= requestAnimationFrame(draw); };
  const rebuild = () => { plot?.destroy(); plot = null; later(); };
  dark.addEventListener("change", rebuild, { signal });
  const resized = new ResizeObserver(() => plot?.setSize({ width: place.clientWidth - 46, height: 215 }));
  resized.observe(place);
  signal.addEventListener("abort", () => { resized.disconnect(); plot?.destroy(); }, { once: true });
  return { update(next) { series = next; later(); } };
}

/** All lines on the same x, nulls where a line has no point; a level becomes two points. */
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
