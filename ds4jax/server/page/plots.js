// The state of the server: numbers, and plots of the last minutes, which the server has sampled.

import {$, count, element} from "./dom.js";
import {call} from "./stream.js";

const COLOURS = ["var(--plot-1)", "var(--plot-2)", "var(--plot-3)"];
const MIB = 2 ** 20,
  GIB = 2 ** 30;
// Title, unit, and name → the server's series.
const PLOTS = [
  ["Requests", "", {answering: "decoding", reading: "prefilling", waiting: "waiting"}],
  ["Tokens per second", "/s", {answers: "answer_tokens", prompts: "prompt_tokens"}],
  ["Time to the first token", " s", {p50: "first_p50", p95: "first_p95"}],
  ["Time from token to token", " ms", {p50: "gap_p50", p95: "gap_p95"}],
  ["Prompt tokens reused", " %", {"of the last minute": "reused"}],
  ["Drafts accepted", " %", {"of the last minute": "accepted"}],
  ["Memory of prefixes", " MiB", {memory: "prefix_bytes", disk: "disk_bytes"}],
  ["Cache in use", " %", {"of all slots": "cache_use_percent"}],
];
const SCALE = {gap_p50: 1e3, gap_p95: 1e3, prefix_bytes: 1 / MIB, disk_bytes: 1 / MIB};
const LEAST = 120; // seconds that are shown at least
const WIDTH = 360,
  HEIGHT = 150,
  LEFT = 44,
  RIGHT = 8,
  TOP = 8,
  BOTTOM = 22;

let samples = [],
  timer = 0,
  cursor = null,
  figures = [];

/** Show the state, and again every two seconds until it is hidden. */
export async function show() {
  clearTimeout(timer);
  if ($("status").hidden) return;
  try {
    const since = samples.at(-1)?.time ?? 0;
    const found = await (await call(`history?since=${since}`)).json();
    samples = [...samples, ...found.samples].filter(one => one.time > found.now - found.seconds);
    draw(found);
  } catch (error) {
    figures = [];
    $("status").replaceChildren(
      element("div", {className: "error", role: "alert"}, `the state of the server: ${error.message}`),
    );
  }
  timer = setTimeout(show, 2000);
}

function draw({now, seconds}) {
  if (!figures.length) {
    $("status").replaceChildren(
      element("h2", {className: "author"}, "State of the server"),
      element("dl", {id: "facts"}),
      element("div", {id: "plots"}),
    );
    figures = PLOTS.map(plot => new Plot(...plot));
    $("plots").append(...figures.map(plot => plot.node));
  }
  const latest = samples.at(-1) ?? {};
  const fact = (name, value) => element("div", {}, element("dt", {}, name), element("dd", {}, value));
  const size = bytes =>
    bytes === undefined ? "–" : bytes >= GIB ? `${(bytes / GIB).toFixed(2)} GiB` : `${(bytes / MIB).toFixed(1)} MiB`;
  $("facts").replaceChildren(
    fact("Weights", size(latest.weights_bytes)),
    fact("Cache", size(latest.cache_bytes)),
    fact("Process", size(latest.process_bytes)),
    fact("Prefixes", `${count(latest.prefixes ?? 0)} · ${size(latest.prefix_bytes)}`),
    fact("On disk", `${count(latest.disk_prefixes ?? 0)} · ${size(latest.disk_bytes)}`),
    fact("Slots", `${latest.running ?? 0} of ${latest.slots ?? 0}`),
    fact("Waiting", count(latest.waiting ?? 0)),
    fact("Requests so far", count(latest.requests ?? 0)),
  );
  const past = Math.max(LEAST, now - (samples[0]?.time ?? now)); // of a server that was just started there is less
  for (const plot of figures) plot.draw(now, Math.min(seconds, past));
}

class Plot {
  constructor(title, unit, series) {
    Object.assign(this, {title, unit, series});
    this.caption = element("figcaption", {}, element("b", {}, title));
    this.labels = Object.keys(series).map((name, n) => {
      const label = element("span", {});
      label.style.setProperty("--series", COLOURS[n]);
      this.caption.append(label);
      return label;
    });
    this.time = element("span", {className: "time"});
    this.caption.append(this.time);
    this.svg = svg("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: 0});
    this.svg.addEventListener("pointermove", event => {
      const box = this.svg.getBoundingClientRect();
      this.point(this.timeAt(((event.clientX - box.left) / box.width) * WIDTH));
    });
    this.svg.addEventListener("pointerleave", () => this.point(null));
    this.svg.addEventListener("blur", () => this.point(null));
    this.svg.addEventListener("keydown", event => {
      const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (!step || !samples.length) return;
      event.preventDefault();
      const at = cursor === null ? samples.length - 1 : nearest(cursor) + step;
      this.point(samples[Math.max(0, Math.min(samples.length - 1, at))].time);
    });
    this.node = element("figure", {}, this.caption);
    this.node.append(this.svg);
  }

  value(sample, name) {
    const found = sample?.[this.series[name]];
    return typeof found === "number" ? found * (SCALE[this.series[name]] ?? 1) : NaN;
  }

  timeAt(x) {
    return this.now - this.seconds * (1 - (x - LEFT) / (WIDTH - LEFT - RIGHT));
  }

  point(time) {
    cursor = time;
    for (const plot of figures) plot.draw(plot.now, plot.seconds);
  }

  draw(now, seconds) {
    Object.assign(this, {now, seconds});
    const names = Object.keys(this.series),
      at = cursor === null ? samples.length - 1 : nearest(cursor),
      shown = samples[at];
    const curves = names.map(name => samples.map(sample => [sample.time, this.value(sample, name)]));
    const top =
      this.unit === " %"
        ? 100
        : nice(
            Math.max(
              ...curves
                .flat()
                .map(([, y]) => y)
                .filter(y => y > 0),
              0,
            ) || 1,
          );
    const x = time => LEFT + (WIDTH - LEFT - RIGHT) * (1 - (now - time) / seconds);
    const y = value => HEIGHT - BOTTOM - ((HEIGHT - BOTTOM - TOP) * value) / top;
    const parts = [];
    for (const value of [0, top / 2, top])
      parts.push(
        svg("line", {class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value)}),
        svg("text", {x: LEFT - 6, y: y(value) + 4, "text-anchor": "end"}, short(value)),
      );
    for (let part = 0; part <= 3; part++) {
      const ago = seconds * (1 - part / 3);
      parts.push(
        svg(
          "text",
          {x: x(now - ago), y: HEIGHT - 5, "text-anchor": ["start", "middle", "middle", "end"][part]},
          !ago ? "now" : seconds < 240 ? `−${Math.round(ago)} s` : `−${(ago / 60).toFixed(seconds < 720 ? 1 : 0)} min`,
        ),
      );
    }
    curves.forEach((points, n) => {
      for (const run of runs(points))
        parts.push(
          svg("polyline", {
            points: run.map(([t, v]) => `${x(t).toFixed(1)},${y(v).toFixed(1)}`).join(" "),
            style: COLOURS[n],
          }),
        );
    });
    if (cursor !== null && shown)
      parts.push(svg("line", {class: "cursor", x1: x(shown.time), x2: x(shown.time), y1: TOP, y2: HEIGHT - BOTTOM}));
    this.svg.replaceChildren(...parts);
    const says = names.map((name, n) => {
      const value = this.value(shown, name);
      const text = `${name} ${Number.isFinite(value) ? short(value) + this.unit : "–"}`;
      this.labels[n].textContent = text;
      return text;
    });
    this.time.textContent = cursor !== null && shown ? new Date(shown.time * 1000).toLocaleTimeString() : "";
    this.svg.setAttribute(
      "aria-label",
      `${this.title}: ${says.join(", ")}; the last ${Math.round(seconds / 60)} minutes`,
    );
  }
}

/** The stretches of a curve between values that are missing. */
function* runs(points) {
  let run = [];
  for (const point of [...points, [0, NaN]]) {
    if (Number.isFinite(point[1])) run.push(point);
    else {
      if (run.length === 1) run.push([run[0][0] + 1, run[0][1]]);
      if (run.length) yield run;
      run = [];
    }
  }
}

const nearest = time =>
  samples.reduce((best, one, i) => (Math.abs(one.time - time) < Math.abs(samples[best].time - time) ? i : best), 0);

function svg(tag, {style, ...attributes}, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (style) node.style.stroke = style;
  if (text !== undefined) node.textContent = text;
  return node;
}

/** The next round number: 1, 2 or 5 times a power of ten. */
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find(step => step * power >= value * 0.999);
}

const short = value => (value >= 1000 ? count(Math.round(value)) : String(+value.toPrecision(3)));
