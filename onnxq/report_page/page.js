"use strict";
// Draws the charts, and links them to the table: one layer is chosen at a time, everywhere.

const byId = (id) => document.getElementById(id);
const state = { data: null, plots: new Map(), sources: new Map(), chosen: -1 };
// Charts of a layer share a scale unless their ranges differ by more: a flat line says nothing.
const COMMON = 4;

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

// ---------------------------------------------------------------- colours

function paint() {
  const style = getComputedStyle(document.documentElement);
  const colour = (role) => style.getPropertyValue(`--${role}`).trim();
  const text = colour("text"), dim = colour("dim"), line = colour("line");
  for (const plot of state.plots.values()) {
    for (const axis of [...plot.below, ...plot.left]) {
      axis.setv({ axis_label_text_color: dim, major_label_text_color: text,
        axis_line_color: line, major_tick_line_color: line });
    }
    for (const part of plot.center) {
      if ("grid_line_color" in part.properties) part.grid_line_color = line;
      else if (part.name === "chosen") part.line_color = text;
      else if (part.name === "zero" || part.name === "spared") part.line_color = colour("zero");
      else if (part.name?.startsWith("clip")) part.line_color = colour("series-4");
    }
    for (const mark of plot.renderers) {
      if (!mark.tags.length) continue;
      const value = { value: colour(mark.tags[0]) };
      const glyph = mark.glyph;
      if ("fill_color" in glyph.properties) glyph.fill_color = value;
      if ("line_color" in glyph.properties) glyph.line_color = value;
    }
  }
}

// ---------------------------------------------------------------- the chosen layer

function element(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function code(text) {
  const box = element("div", undefined, "code");
  const pre = element("pre", text);
  pre.tabIndex = 0;
  const button = element("button", "Copy", "copy");
  button.type = "button";
  box.append(pre, button);
  return box;
}

function fill(name, columns) {
  state.sources.get(name).data = columns;
}

function span(key, name) {
  return state.plots.get(key).center.find((part) => part.name === name);
}

const draw = {
  before: (chart) => ranges("before", chart),
  after: (chart) => ranges("after", chart),
  ranges: (chart) => ranges("ranges", chart),
  channels: (chart) => ranges("channels", chart),
  values: (chart) => histogram("values", chart),
  "values-before": (chart) => histogram("values-before", chart),
  "values-after": (chart) => histogram("values-after", chart),
  activation(chart) {
    histogram("activation", chart);
    ["low", "high"].forEach((end, i) => {
      const line = span("detail-activation", `clip-${end}`);
      line.visible = Boolean(chart.clip);
      if (chart.clip) line.location = chart.clip[i];
    });
  },
  formats(chart) {
    const none = (values) => values.map((v) => v ?? NaN);
    fill("detail-formats", { names: chart.names, expected: none(chart.expected),
      measured: none(chart.measured) });
    const known = [...chart.expected, ...chart.measured].filter((v) => v !== null);
    extent("formats", "x", Math.min(0, ...known) * 1.05, Math.max(1, ...known) * 1.05);
  },
  curves(chart) {
    const methods = Object.entries(chart.methods);
    const found = methods.flatMap(([, points]) => points.map((p) => p[1]));
    extent("curves", "x", 0, 102);
    extent("curves", "y", Math.min(0, ...found) - 1, Math.max(25, ...found) + 2);
    const says = byId("detail-curves").querySelector(".says");
    const keys = methods.flatMap(([method, points], i) => {
      if (!points.length) return [];
      const key = element("span", undefined, "key");
      key.append(element("span", undefined, `swatch series-${i}`), `${method} `);
      return [key];
    });
    says.append(element("br"), ...keys);
    for (let i = 0; state.sources.has(`detail-curve${i}`); i++) {
      const [method, points] = methods[i] ?? ["", []];
      fill(`detail-curve${i}`, { kept: points.map((p) => p[0]), sqnr: points.map((p) => p[1]),
        method: points.map(() => method) });
    }
  },
};

function ranges(key, chart) {
  const left = chart.edges.slice(0, -1), right = chart.edges.slice(1);
  const words = left.map((l, i) => (right[i] - l > 1 ? `${l} to ${right[i] - 1}` : `${l}`));
  fill(`detail-${key}`, { left, right, low: chart.low, high: chart.high, words });
  extent(key, "x", 0, chart.edges.at(-1));
}

function histogram(key, chart) {
  const width = (chart.high - chart.low) / chart.share.length;
  const left = chart.share.map((_, i) => chart.low + i * width);
  const held = chart.share.filter((v) => v > 0), logarithmic = key === "activation";
  const least = logarithmic ? Math.min(...held, 1) / 2 : 0;
  fill(`detail-${key}`, { left, right: left.map((l) => l + width), share: chart.share,
    height: chart.share.map((v) => Math.max(v, 1e-9)) });
  const room = (chart.high - chart.low || 1) * 0.02;
  extent(key, "x", chart.low - room, chart.high + room);
  extent(key, "y", least, Math.max(...held, least) * (logarithmic ? 2 : 1.05) || 1);
}

function ends(chart) {
  return [Math.min(0, ...chart.low), Math.max(0, ...chart.high)];
}

// The scales of charts of ranges; true where before and after have one of their own.
function scales(charts) {
  const pair = ["before", "after"].filter((k) => charts[k]?.edges);
  const found = pair.map((k) => ends(charts[k]));
  const sizes = found.map(([low, high]) => high - low);
  const own = pair.length === 2 && Math.max(...sizes) > COMMON * Math.min(...sizes);
  const both = [Math.min(...found.map((e) => e[0])), Math.max(...found.map((e) => e[1]))];
  pair.forEach((k, i) => scale(k, own ? found[i] : both));
  for (const key of ["ranges", "channels"]) if (charts[key]?.edges) scale(key, ends(charts[key]));
  return own && Math.min(...sizes) > 0;
}

function scale(key, [low, high]) {
  const room = (high - low || 2) * 0.05;
  extent(key, "y", low - room, high + room);
}

// What a chart shows, and returns to.
function extent(key, axis, start, end) {
  state.plots.get(`detail-${key}`)[`${axis}_range`].setv({ start, end });
}

function detail(index) {
  const layer = state.data.layers[index];
  const row = document.querySelector(`#layers tr[data-layer="${index}"]`);
  byId("layer-name").textContent = row.querySelector("th").textContent;
  byId("layer-reason").textContent = layer.reason;
  byId("layer-facts").replaceChildren(...layer.facts.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", value));
    return pair;
  }));
  byId("layer-remedies").replaceChildren(...layer.remedies.flatMap((remedy) => {
    const said = element("p", `${remedy.text} `);
    if (remedy.gain) said.append(element("b", remedy.gain));
    return remedy.command ? [said, code(remedy.command)] : [said];
  }));
  const own = scales(layer.charts);
  for (const figure of document.querySelectorAll("#layer figure")) {
    const key = figure.id.replace("detail-", "");
    const chart = layer.charts[key];
    const drawn = Boolean(chart) && Object.keys(chart).some((k) => Array.isArray(chart[k]) ||
      k === "methods");
    figure.hidden = !chart?.text && !drawn;
    figure.querySelector(".plot").hidden = !drawn;
    const apart = own && (key === "before" || key === "after") ? ", scale of its own" : "";
    const said = (chart?.text ?? "") + apart;
    figure.querySelector(".says").textContent = said;
    figure.querySelector(".plot").setAttribute("aria-label",
      `${figure.querySelector("h4").textContent}: ${said}`);
    if (drawn) draw[key](chart);
  }
}

function choose(index) {
  if (index < 0 || index >= state.data.layers.length) return;
  state.chosen = index;
  for (const row of document.querySelectorAll("#layers tbody tr")) {
    const chosen = Number(row.dataset.layer) === index;
    row.setAttribute("aria-selected", String(chosen));
    row.querySelector("button").tabIndex = chosen ? 0 : -1;
    if (chosen) {
      const box = row.closest(".box"), top = row.offsetTop, head = 40;
      if (top < box.scrollTop + head) box.scrollTop = top - head;
      else if (top + row.offsetHeight > box.scrollTop + box.clientHeight) {
        box.scrollTop = top + row.offsetHeight - box.clientHeight;
      }
    }
  }
  const places = state.data.places;
  for (const [key, plot] of state.plots) {
    const line = span(key, "chosen");
    if (!line) continue;
    const place = places[key] ? places[key].indexOf(index) : index;
    line.visible = place >= 0;
    line.location = place + 1;
    if (places[key]) state.sources.get(key).selected.indices = place < 0 ? [] : [place];
  }
  state.sources.get("layers").selected.indices = [index];
  detail(index);
}

// A place that belongs to no layer belongs to the one before it.
function layerAt(key, x) {
  const places = state.data.places[key];
  const place = Math.max(Math.round(x) - 1, 0); // places count from 1
  if (!places) return Math.min(place, state.data.layers.length - 1);
  for (let i = Math.min(place, places.length - 1); i >= 0; i--) if (places[i] >= 0) return places[i];
  return -1;
}

// ---------------------------------------------------------------- the table

function sort(head) {
  const heads = [...head.parentElement.children], column = heads.indexOf(head);
  const number = head.classList.contains("number");
  // what is large comes first at first, words in their order
  const first = number && column > 0 ? "descending" : "ascending";
  const other = { ascending: "descending", descending: "ascending" };
  const order = head.ariaSort ? other[head.ariaSort] : first;
  heads.forEach((h) => h.removeAttribute("aria-sort"));
  head.ariaSort = order;
  const sign = order === "ascending" ? 1 : -1;
  const body = byId("layers").tBodies[0];
  const keyed = [...body.rows].map((row) => {
    const text = row.cells[column].textContent;
    return [number ? parseFloat(row.cells[column].dataset.key ?? text.replaceAll(",", "")) : text, row];
  });
  keyed.sort(([a, r], [b, s]) => {
    const place = r.dataset.layer - s.dataset.layer;
    if (!number) return sign * a.localeCompare(b) || place;
    if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b) || place; // unknown ones last
    return sign * (a - b) || place;
  });
  body.append(...keyed.map(([, row]) => row));
}

function filter() {
  const wanted = byId("filter").value.toLowerCase();
  for (const row of byId("layers").tBodies[0].rows) {
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
  }
}

function walk(event) {
  const rows = [...byId("layers").tBodies[0].rows].filter((row) => !row.hidden);
  const at = rows.indexOf(event.target.closest("tr"));
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
  if (at < 0 || to === undefined || !rows[to]) return;
  event.preventDefault();
  choose(Number(rows[to].dataset.layer));
  rows[to].querySelector("button").focus({ preventScroll: true });
}

async function copy(button) {
  const pre = button.parentElement.querySelector("pre");
  getSelection().selectAllChildren(pre); // what a browser refuses to copy is at least selected
  const written = navigator.clipboard?.writeText(pre.textContent) ?? Promise.reject();
  const said = await written.then(() => "Copied", () => "Selected");
  for (const other of document.querySelectorAll(".copy")) other.textContent = "Copy";
  button.textContent = said;
}

// ---------------------------------------------------------------- start

function listen() {
  document.addEventListener("click", (event) => {
    const target = event.target;
    if (target.closest(".copy")) copy(target.closest(".copy"));
    else if (target.closest("#layers thead th")) sort(target.closest("th"));
    else if (target.closest("#layers tbody tr")) {
      choose(Number(target.closest("tr").dataset.layer));
    } else if (target.closest("[data-layer]")) {
      choose(Number(target.closest("[data-layer]").dataset.layer));
      byId("layer").scrollIntoView();
    }
  });
  document.addEventListener("change", (event) => {
    const { chart, series } = event.target.dataset;
    if (chart === undefined) return;
    for (const mark of state.plots.get(chart).renderers) {
      if (mark.name === `${chart}-${series}`) mark.visible = event.target.checked;
    }
  });
  byId("filter")?.addEventListener("input", filter);
  byId("layers")?.tBodies[0].addEventListener("keydown", walk);
  for (const [key, plot] of state.plots) {
    if (span(key, "chosen")) plot.on_event("tap", (e) => choose(layerAt(key, e.x)));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
}

// What each row would have to say of itself, said here for small pages.
function label() {
  [...byId("layers")?.tBodies[0].rows ?? []].forEach((row, i) => {
    row.dataset.layer = i;
    row.querySelector("button").tabIndex = -1;
  });
}

async function start() {
  state.data = await unpack(byId("data").textContent);
  const { document: written, roots } = state.data;
  const shown = await Bokeh.embed.embed_items({ page: written },
    [{ docid: "page", roots, root_ids: Object.keys(roots) }]);
  const model = shown.length ? Bokeh.documents.at(-1) : null;
  for (const root of model?.roots() ?? []) {
    state.plots.set(root.name, root);
    for (const mark of root.renderers) {
      const source = mark.data_source;
      if (source.name) state.sources.set(source.name, source);
    }
  }
  paint();
  label();
  listen();
  if (state.data.layers.length) choose(state.data.chosen);
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  byId("problem").textContent = `The charts could not be drawn: ${error.message}. They need a`
    + " browser of 2023 or later.";
  byId("problem").hidden = false;
  console.error(error);
});
