"use strict";
// The charts and the completions of a report. All texts of runs enter the page as text nodes, never as HTML.

const COLOURS = ["#3b7dd8", "#e07b28", "#2f9e63", "#c2405a", "#8a63d2", "#9a7b4f", "#d262b0", "#6b7885", "#a3a822", "#20a4b5",
  "#1f4e8c", "#f2b36b", "#7fc99f", "#7a1f33", "#c4aef0", "#5c452a", "#f0a8da", "#b9c2ca", "#5d6113", "#8fdce6"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const SVG_CHARTS = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
const MOST_NAMES = 10; // in the legend of a chart
const $ = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick" || name === "onchange") made[name] = value;
    else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

async function inflate(name) {
  const bytes = Uint8Array.from(atob($(`chunk-${name}`).textContent), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

const chunks = new Map();
function chunk(name) {
  if (!chunks.has(name)) chunks.set(name, inflate(name).then(JSON.parse));
  return chunks.get(name);
}

function remembered(name, fallback) {
  try { return sessionStorage.getItem(`rlora-${name}`) ?? fallback; } catch { return fallback; }
}
function remember(name, value) {
  try { sessionStorage.setItem(`rlora-${name}`, value); } catch { /* a page without storage */ }
}

// --- charts ---

let data;
const drawn = new Map(); // function that draws a plot, by its element

function css(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

function layout(extra) {
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
  return {
    margin: { l: 45, r: 10, t: 8, b: 35 }, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    font: { color: css("--ink"), size: 12 }, showlegend: true, hovermode: "closest",
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } }, ...extra,
    xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis },
  };
}

function mean(values) { return values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length); }

function smooth(values, width) {
  return values.map((value, end) => {
    if (value === null) return null;
    return mean(values.slice(Math.max(0, end - width + 1), end + 1).filter((item) => item !== null));
  });
}

function positions(run) {
  if ($("axis").value === "step") return run.columns.step;
  let hours = 0;
  return (run.columns["time/step"] || []).map((seconds) => (hours += (seconds || 0) / 3600));
}

function traces(chart) {
  const runs = data.runs.filter((run) => chart.metrics.some((metric) => run.columns[metric]));
  const width = Number($("smooth").value), alone = data.runs.length === 1;
  if (chart.kind === "bars" && !alone) return meanBars(chart, runs);
  const made = [];
  for (const run of runs) {
    const colour = COLOURS[data.runs.indexOf(run) % COLOURS.length], x = positions(run);
    const metrics = chart.metrics.filter((metric) => run.columns[metric]);
    if (alone && (chart.band || chart.spread)) {
      const [low, high] = chart.band ? chart.band.map((name) => run.columns[name]) : spread(run.columns[metrics[0]], run.columns[chart.spread]);
      const edge = { x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, connectgaps: true };
      made.push({ ...edge, y: low }, { ...edge, y: high, fill: "tonexty", fillcolor: `${colour}26` });
    }
    for (const metric of metrics) {
      if (/^(kl|ratio|status|phase)\//.test(metric) && metrics.length > 1 && run.columns[metric].every((value) => !value)) continue; // nothing to see
      const index = chart.metrics.indexOf(metric), raw = run.columns[metric];
      const label = short(metric, chart.metrics);
      const name = alone ? label : chart.metrics.length > 1 ? `${run.name}: ${label}` : run.name;
      const shade = alone ? COLOURS[index % COLOURS.length] : colour;
      if (chart.kind === "bars") {
        made.push({ type: "bar", x, y: raw, name, marker: { color: shade } });
        continue;
      }
      const line = { color: shade, width: 1.8, dash: alone ? "solid" : DASHES[index % DASHES.length] };
      if (chart.kind === "stacked" && alone) {
        made.push({ x, y: raw, name, mode: "lines", stackgroup: "one", line: { ...line, width: 0.5 } });
        continue;
      }
      const sparse = 2 * raw.filter((value) => value === null).length > raw.length;
      const y = width > 1 && !sparse ? smooth(raw, width) : raw;
      if (y !== raw) made.push({ x, y: raw, mode: "lines", line: { ...line, width: 0.6 }, opacity: 0.5, hoverinfo: "skip", showlegend: false });
      made.push({ x, y, name, mode: sparse || x.length < 3 ? "lines+markers" : "lines", line, connectgaps: true, marker: { size: 5 } });
    }
  }
  return made;
}

function spread(means, deviations) {
  const at = (sign) => means.map((mean, index) => (mean === null ? null : mean + sign * (deviations[index] || 0)));
  return [at(-1), at(1)];
}

function short(metric, metrics) {
  const prefix = metric.slice(0, metric.indexOf("/") + 1);
  return metrics.every((name) => name.startsWith(prefix)) ? metric.slice(prefix.length) : metric;
}

function meanBars(chart, runs) {
  return chart.metrics.map((metric, index) => ({
    type: "bar", name: short(metric, chart.metrics), x: runs.map((run) => run.name), marker: { color: COLOURS[index % COLOURS.length] },
    y: runs.map((run) => mean((run.columns[metric] || []).filter((value) => value !== null))),
  }));
}

function drawChart(chart, plot) {
  const many = data.runs.length > 1, bars = chart.kind === "bars";
  const made = traces(chart), named = made.filter((trace) => trace.name).length;
  Plotly.react(plot, made, layout({
    barmode: "stack", showlegend: named > 1 && named <= MOST_NAMES, // the table of runs has their colours
    xaxis: { title: { text: bars && many ? "" : $("axis").value }, type: bars && many ? "category" : "linear" },
    yaxis: { title: { text: chart.unit || "" }, type: chart.logarithmic ? "log" : "linear", ...(chart.range ? { range: chart.range } : {}), exponentformat: chart.unit === "bytes" ? "SI" : "power" },
  }), SVG_CHARTS);
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting || entry.target.dataset.drawn) continue;
    entry.target.dataset.drawn = "yes";
    drawn.get(entry.target)();
  }
}, { rootMargin: "300px" });

function redraw() {
  for (const [plot, draw] of drawn) if (plot.dataset.drawn) draw();
}

function failed(error, text = "A part of the page could not be drawn") { // the other plots are still drawn
  $("error").hidden = false;
  $("error").textContent = `${text}: ${error.message}`;
  console.error(error);
}

function addPlot(figure, label, draw) {
  const plot = element("div", { class: "plot", role: "img", "aria-label": label });
  figure.append(plot);
  const guarded = () => { try { draw(plot); } catch (error) { failed(error); } };
  drawn.set(plot, guarded);
  seen.observe(plot);
  return guarded;
}

function addCharts() {
  for (const section of new Set(data.charts.map((chart) => chart.section))) {
    const id = section.toLowerCase();
    $("chart-links").append(element("a", { href: `#${id}` }, section));
    const grid = element("div", { class: "grid" });
    for (const chart of data.charts.filter((item) => item.section === section)) {
      const figure = element("figure", {}, element("figcaption", {}, element("b", {}, chart.title), chart.text));
      grid.append(figure);
      addPlot(figure, `${chart.title}. ${chart.text}`, (plot) => drawChart(chart, plot));
    }
    if (section === "Weights") {
      addPath(grid);
      addHeatMap(grid);
    }
    $("charts").append(element("section", { id }, element("h2", {}, section), grid));
  }
}

// --- path of the policy, and heat map of the update ---

function addPath(grid) {
  const runs = data.runs.filter((run) => run.path);
  if (!runs.length) return;
  const percent = (share) => `${Math.round(100 * share)}%`;
  const of = (run) => {
    const { explained, straightness } = run.path;
    const name = data.runs.length > 1 ? `${run.name}: ` : "";
    if (straightness === null) return `${name}The policy did not move.`;
    const directions = explained.slice(0, 3).map(percent).join(", ");
    return `${name}The first directions have ${directions} of the changes; the path is ${(1 / straightness).toFixed(1)} times as long as the distance.`;
  };
  const figure = element("figure", {}, element("figcaption", {}, element("b", {}, "Path of the policy"),
    "Kept versions along the two main directions of the changes. ", ...runs.map((run) => element("span", {}, of(run), " "))));
  grid.append(figure);
  addPlot(figure, "Path of the policy along the two main directions of its changes", (plot) => {
    const made = runs.map((run) => ({
      name: run.name, x: run.path.points.map((point) => point[0]), y: run.path.points.map((point) => point[1]), mode: "lines+markers",
      text: run.path.versions.map((version, index) => `version ${version}${index ? `, its change has a cosine of ${run.path.cosines[index - 1] ?? 0} with the first direction` : ""}`), hoverinfo: "text", line: { color: COLOURS[data.runs.indexOf(run) % COLOURS.length] }, marker: { size: 4 },
    }));
    Plotly.react(plot, made, layout({ showlegend: runs.length > 1, xaxis: { title: { text: "first direction" } }, yaxis: { title: { text: "second direction" }, scaleanchor: "x" } }), SVG_CHARTS);
  });
}

function options(select, pairs, chosen) {
  select.replaceChildren(...pairs.map(([value, text]) => element("option", { value, selected: String(value) === String(chosen) }, text)));
}

function addHeatMap(grid) {
  const runs = data.runs.map((run, index) => [index, run]).filter(([, run]) => run.weights);
  if (!runs.length) return;
  const run = element("select"), figure = element("select"), view = element("select"), text = element("span");
  const keep = () => [["run", run], ["figure", figure], ["view", view]].forEach(([name, select]) => remember(`map-${name}`, select.value));
  options(run, runs.map(([index, item]) => [index, item.name]), remembered("map-run", ""));
  options(view, [["steps", "matrices by steps"], ["layers", "layers by matrices, last step"]], remembered("map-view", ""));
  const fill = () => options(figure, Object.keys(data.runs[run.value].weights.figures).map((name) => [name, data.figures[name][0]]), figure.value || remembered("map-figure", ""));
  fill();
  const box = element("figure", { class: "wide" }, element("figcaption", {}, element("b", {}, "Update by matrix"), text),
    element("div", { class: "bar" }, element("label", {}, "Figure ", figure), element("label", {}, "View ", view), element("label", { hidden: runs.length < 2 }, "Run ", run)));
  const draw = (plot) => {
    const weights = data.runs[run.value].weights, values = weights.figures[figure.value];
    const skipped = weights.of > weights.steps.length ? ` ${weights.steps.length} of ${weights.of} steps are drawn.` : "";
    text.textContent = `${data.figures[figure.value][1]}.${skipped}`;
    const signed = figure.value.startsWith("cosine");
    const scale = signed ? { colorscale: "RdBu", zmid: 0, reversescale: true } : { colorscale: "Viridis" };
    const map = view.value === "steps" ? bySteps(weights, values) : byLayers(weights, values);
    Plotly.react(plot, [{ type: "heatmap", hoverongaps: false, colorbar: { thickness: 12 }, ...scale, ...map.trace }],
      layout({ showlegend: false, xaxis: { title: { text: map.x }, side: "bottom" }, yaxis: { autorange: "reversed", tickfont: { size: 10 } } }), SVG_CHARTS);
  };
  grid.append(box);
  const update = addPlot(box, "Heat map of the update by matrix", draw);
  run.onchange = () => { fill(); keep(); update(); };
  figure.onchange = view.onchange = () => { keep(); update(); };
}

function bySteps(weights, values) {
  return { x: "step", trace: { x: weights.steps, y: weights.matrices, z: values } };
}

function byLayers(weights, values) {
  const places = weights.matrices.map((name) => name.match(/^(?:.*?\.)?layers?\.(\d+)\.(.+)$/) || name.match(/^(?:.*?\.)?(\d+)\.(.+)$/) || [name, "", name]);
  const layers = [...new Set(places.map((place) => place[1]))], kinds = [...new Set(places.map((place) => place[2]))];
  const z = layers.map((layer) => kinds.map((kind) => {
    const index = places.findIndex((place) => place[1] === layer && place[2] === kind);
    return index < 0 ? null : values[index].at(-1);
  }));
  return { x: "matrix", trace: { x: kinds, y: layers.map((layer) => `layer ${layer}`), z } };
}

// --- completions ---

const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

function visible(text, query = "") {
  const parts = [];
  const add = (piece) => {
    let start = 0;
    for (const match of piece.matchAll(UNSEEN)) {
      parts.push(piece.slice(start, match.index));
      parts.push(element("span", { class: "control" }, `[U+${match[0].charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}]`));
      start = match.index + 1;
    }
    parts.push(piece.slice(start));
  };
  const found = query ? text.toLowerCase().indexOf(query.toLowerCase()) : -1;
  if (found < 0) add(text);
  else {
    add(text.slice(0, found));
    parts.push(element("mark", {}, text.slice(found, found + query.length)));
    add(text.slice(found + query.length));
  }
  return parts;
}

function pieces(episode, texts) { return episode.ids ? episode.ids.map((id) => texts[id]) : [episode.text]; }

function percent(values, index) { return values && values[index] !== null && values[index] !== undefined ? values[index] / 100 : null; }

function shade(value, low, middle, high) {
  if (value === null || value === undefined) return "";
  const part = value < middle ? (value - middle) / (middle - low || 1) : (value - middle) / (high - middle || 1);
  const strength = Math.round(Math.min(1, Math.abs(part)) * 75);
  return strength ? `background: color-mix(in srgb, ${part < 0 ? "#d6604d" : "#4393c3"} ${strength}%, transparent)` : "";
}

const COLOURINGS = {
  none: { text: "no colour" },
  prob: { text: "probability", of: (episode, index) => percent(episode.prob, index), range: [0, 1, 1] },
  ratio: { text: "importance ratio", of: (episode, index) => percent(episode.ratio, index), range: [0.8, 1, 1.2] },
  adv: { text: "advantage", of: (episode, index) => Array.isArray(episode.adv) ? episode.adv[index] : episode.adv, range: [-1, 0, 1] },
};

function textOf(episode, texts, colouring, query) {
  const box = element("pre", { class: "text", dir: "auto", tabindex: 0 });
  if (!episode.ids || (query && !colouring.of)) {
    box.append(...visible(pieces(episode, texts).join(""), query));
  } else {
    let sampled = 0;
    episode.ids.forEach((id, index) => {
      const own = !episode.mask || episode.mask[index];
      const value = own && colouring.of ? colouring.of(episode, sampled) : null;
      const title = own ? describe(episode, sampled) : "from the env";
      box.append(element("span", { class: own ? false : "env", style: shade(value, ...(colouring.range || [])), title }, ...visible(texts[id])));
      sampled += own ? 1 : 0;
    });
  }
  if (episode.cut) box.append(element("span", { class: "control" }, ` [${episode.cut} more tokens]`));
  return box;
}

function describe(episode, index) {
  const figures = [["probability", percent(episode.prob, index)], ["ratio", percent(episode.ratio, index)], ["advantage", COLOURINGS.adv.of(episode, index)]];
  return figures.filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => `${name} ${name === "advantage" ? value : value.toFixed(2)}`).join(", ");
}

function difference(before, after) {
  const most = 1500, a = before.slice(0, most), b = after.slice(0, most), width = b.length + 1;
  const lengths = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      lengths[i * width + j] = a[i] === b[j] ? lengths[(i + 1) * width + j + 1] + 1 : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    }
  }
  const made = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { made.push(...visible(a[i])); i++; j++; }
    else if (j < b.length && (i === a.length || lengths[i * width + j + 1] >= lengths[(i + 1) * width + j])) made.push(element("ins", {}, ...visible(b[j++])));
    else made.push(element("del", {}, ...visible(a[i++])));
  }
  if (before.length > most || after.length > most) made.push(element("span", { class: "control" }, ` [only the first ${most} tokens are compared]`));
  return made;
}

class Browser {
  constructor(box) {
    const select = (change) => element("select", { onchange: change });
    this.run = select(() => this.openRun());
    this.step = select(() => this.show());
    this.prompt = select(() => this.show());
    this.colour = select(() => this.show());
    this.other = select(() => this.show());
    this.query = element("input", { type: "search", placeholder: "text of a completion" });
    this.view = element("div");
    this.results = element("div", { "aria-live": "polite" });
    const named = data.runs.map((run, index) => [index, run.name]);
    options(this.run, named, remembered("run", 0));
    if (!this.run.value) this.run.value = "0";
    const turn = (selected, by) => { selected.selectedIndex = Math.max(0, Math.min(selected.length - 1, selected.selectedIndex + by)); this.show(); };
    const arrow = (selected, by, text) => element("button", { type: "button", "aria-label": text, onclick: () => turn(selected, by) }, by < 0 ? "‹" : "›");
    const search = element("form", { class: "bar", role: "search" }, element("label", {}, "Search ", this.query), element("button", {}, "Search in all steps"));
    search.onsubmit = (event) => { event.preventDefault(); this.search(); };
    this.hint = element("span", { class: "scale" });
    this.bars = [element("div", { class: "bar" }, element("label", { hidden: named.length < 2 }, "Run ", this.run),
      element("label", {}, "Step ", this.step), arrow(this.step, -1, "previous step"), arrow(this.step, 1, "next step"),
      element("label", {}, "Prompt ", this.prompt), arrow(this.prompt, -1, "previous prompt"), arrow(this.prompt, 1, "next prompt")),
    element("div", { class: "bar" }, element("label", {}, "Colour of tokens ", this.colour), this.hint,
      element("label", {}, "Compare with step ", this.other)), search];
    box.append(...this.bars, this.results, this.view);
  }

  async openRun() {
    const token = (this.token = {});
    this.results.replaceChildren();
    const index = await chunk(`completions-${this.run.value}`);
    if (token !== this.token) return;
    this.index = index;
    this.steps = Object.keys(index.prompts).map(Number).sort((a, b) => a - b);
    const empty = this.steps.length === 0;
    for (const bar of this.bars.slice(empty && data.runs.length > 1 ? 1 : 0)) bar.hidden = empty;
    if (empty) {
      this.view.replaceChildren(element("p", {}, "This run has no stored completions."));
      return;
    }
    options(this.step, this.steps.map((step) => [step, step]), remembered("step", this.steps.at(-1)));
    this.prompt.replaceChildren();
    await this.show();
  }

  load(step) { return chunk(`completions-${this.run.value}-${step}`); }

  async show() {
    const token = (this.token = {}), step = Number(this.step.value), groups = await this.load(step);
    if (token !== this.token) return;
    remember("run", this.run.value);
    remember("step", this.step.value);
    const chosen = Math.min(groups.length - 1, Math.max(0, this.prompt.selectedIndex < 0 ? Number(remembered("prompt", 0)) : this.prompt.selectedIndex));
    options(this.prompt, groups.map((group, index) => [index, label(group, index)]), chosen);
    remember("prompt", chosen);
    const key = this.index.prompts[step][chosen];
    const shared = this.steps.filter((other) => other !== step && this.index.prompts[other].includes(key));
    options(this.other, [["", shared.length ? "none" : "no other step has this prompt"], ...shared.map((other) => [other, other])], this.other.value || remembered("other", ""));
    remember("other", this.other.value);
    const group = groups[chosen];
    this.colours(group);
    const other = this.other.value === "" ? null : (await this.load(this.other.value))[this.index.prompts[this.other.value].indexOf(key)];
    if (token !== this.token) return;
    this.view.replaceChildren(this.promptBox(group), ...(other ? this.compared(other, group) : group.episodes.map((episode, index) => this.episodeBox(episode, index))));
  }

  colours(group) {
    const has = (name) => group.episodes.some((episode) => episode.ids && episode[name] !== undefined);
    options(this.colour, Object.entries(COLOURINGS).filter(([name]) => name === "none" || has(name)).map(([name, colouring]) => [name, colouring.text]), this.colour.value || remembered("colour", "none"));
    remember("colour", this.colour.value);
    const range = COLOURINGS[this.colour.value || "none"].range;
    if (!range) return this.hint.replaceChildren();
    const [low, , high] = range;
    const ramp = Array.from({ length: 9 }, (_, at) => shade(low + (at / 8) * (high - low), ...range).replace("background: ", "") || "transparent");
    this.hint.replaceChildren(String(low), element("i", { style: `background: linear-gradient(90deg, ${ramp.join(",")})` }), String(high));
  }

  promptBox(group) {
    const answer = group.answer === null ? [] : [element("p", {}, "Answer: ", element("bdi", {}, ...visible(group.answer)))];
    return element("div", { class: "prompt" }, ...group.prompt.flatMap(([role, text]) => [element("p", {}, role), element("pre", { class: "text", dir: "auto", tabindex: 0 }, ...visible(text, this.query.value))]), ...answer);
  }

  episodeBox(episode, index) {
    const colouring = COLOURINGS[this.colour.value || "none"];
    return element("article", { class: "episode", "aria-label": `completion ${index + 1}` }, summary(episode, index), textOf(episode, this.index.texts, colouring, this.query.value));
  }

  compared(before, after) {
    const pairs = after.episodes.map((episode, index) => [before.episodes[index % before.episodes.length], episode, index]);
    return pairs.map(([old, episode, index]) => element("article", { class: "episode" }, summary(episode, index),
      element("p", {}, `compared with completion ${(index % before.episodes.length) + 1} of step ${this.other.value}, reward ${old.reward ?? "none"}: `, element("del", {}, "only there"), " ", element("ins", {}, "only here")),
      element("pre", { class: "text", dir: "auto", tabindex: 0 }, ...difference(pieces(old, this.index.texts), pieces(episode, this.index.texts)))));
  }

  async search() {
    const token = (this.searching = {}), query = this.query.value.toLowerCase(), most = 100, hits = [];
    this.results.replaceChildren();
    await this.show();
    if (!query) return;
    const run = this.run.value;
    search: for (const step of this.steps) {
      const groups = await this.load(step);
      if (token !== this.searching || run !== this.run.value) return;
      for (const [number, group] of groups.entries()) {
        const texts = [group.prompt.map(([, text]) => text).join("\n"), ...group.episodes.map((episode) => pieces(episode, this.index.texts).join(""))];
        const text = texts.find((item) => item.toLowerCase().includes(query));
        if (text === undefined) continue;
        const start = Math.max(0, text.toLowerCase().indexOf(query) - 40);
        hits.push(element("li", {}, element("button", { type: "button", onclick: () => this.open(step, number) }, `step ${step}, prompt ${number + 1}: `, element("bdi", {}, ...visible(text.slice(start, start + 120), query)))));
        if (hits.length === most) break search;
      }
    }
    const count = hits.length === most ? `the first ${most} groups with the text` : `${hits.length} ${hits.length === 1 ? "group" : "groups"} with the text`;
    this.results.replaceChildren(element("p", {}, count), element("ul", { class: "hits" }, ...hits));
  }

  open(step, number) {
    this.step.value = step;
    this.prompt.replaceChildren();
    remember("prompt", number);
    return this.show();
  }
}

function label(group, index) {
  const rewards = group.episodes.map((episode) => episode.reward).filter((reward) => reward !== null);
  const result = rewards.length ? `, mean reward ${mean(rewards).toFixed(2)}` : "";
  const last = group.prompt.length ? group.prompt.at(-1)[1].replace(/\s+/g, " ") : "";
  return `${index + 1}: ${last.slice(0, 50).replace(UNSEEN, "�")}${result}`;
}

function summary(episode, index) {
  const figures = [episode.version === null ? "given" : `version ${episode.version}`, `${episode.length} tokens`, episode.finish === "stop" ? "" : `ended by ${episode.finish}`];
  figures.push(typeof episode.adv === "number" ? `advantage ${episode.adv}` : "");
  figures.push(...Object.entries(episode.parts).map(([name, value]) => `${name} ${value}`));
  return element("p", {}, `${index + 1}: reward ${episode.reward ?? "none"} `, element("b", { class: episode.status }, episode.status), ` · ${figures.filter(Boolean).join(" · ")}`);
}

// --- start ---

async function start() {
  const theme = $("theme");
  theme.value = remembered("theme", "");
  const apply = () => {
    document.documentElement.dataset.theme = theme.value;
    remember("theme", theme.value);
    redraw();
  };
  const [page, plotly] = await Promise.all([chunk("data"), inflate("plotly")]);
  data = page;
  document.head.append(element("script", {}, plotly));
  addCharts();
  document.querySelectorAll("#runs-table tbody th").forEach((cell, index) => {
    if (data.runs.length > 1) cell.prepend(element("i", { class: "colour", style: `background: ${COLOURS[index % COLOURS.length]}` }));
  });
  for (const name of ["axis", "smooth"]) {
    $(name).value = remembered(name, $(name).value);
    $(name).onchange = () => { remember(name, $(name).value); redraw(); };
  }
  theme.onchange = apply;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  apply();
  await new Browser($("browser")).openRun();
  if (data.refresh) {
    scrollTo(0, Number(remembered("scroll", 0)));
    setInterval(() => { // not while a control is in use
      if (document.activeElement.matches("input, select")) return;
      remember("scroll", scrollY);
      location.reload();
    }, data.refresh * 1000);
  }
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => failed(error, "The page, which needs a browser of 2023 or later, could not be drawn"));
