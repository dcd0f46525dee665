// The page's viewers: gallery, sweep, trajectory; sortable tables; cards of runs. Pictures are sprites, depth is numbers (see page_pictures.py).
"use strict";

const study = JSON.parse(document.getElementById("study").textContent);
const COLUMNS = 16; // tiles in a row of a sprite
const $ = (id) => document.getElementById(id);

// ---- Pictures: decoded once, when first asked for.

const sheets = new Map();

function sheet(uri) {
  if (!sheets.has(uri)) {
    const image = new Image();
    image.src = uri;
    sheets.set(uri, image.decode().then(() => image));
  }
  return sheets.get(uri);
}

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const colours = bytes(study.colours);
const coded = new Map();

/** Depth in metres (size * size) of one tile of base64 uint16 on a logarithmic scale between the two limits. */
function metres(text, tile, size, [low, high]) {
  if (!coded.has(text)) coded.set(text, new Uint16Array(bytes(text).buffer));
  const ratio = Math.log(high / low) / 65535;
  return Float64Array.from(coded.get(text).subarray(tile * size * size, (tile + 1) * size * size), (code) => low * Math.exp(code * ratio));
}

/** Draw values (red, green, blue 0..255) of every pixel on a canvas of size x size. */
function paint(canvas, size, rgb) {
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const picture = context.createImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    rgb(i, picture.data, 4 * i);
    picture.data[4 * i + 3] = 255;
  }
  context.putImageData(picture, 0, 0);
}

function paintDepth(canvas, depth, size, [near, far] = study.limits) {
  paint(canvas, size, (i, out, at) => {
    const colour = 3 * Math.round(255 * Math.min(1, Math.max(0, (depth[i] - near) / (far - near))));
    out.set(colours.subarray(colour, colour + 3), at);
  });
}

async function paintTile(canvas, uri, tile, size) {
  const image = await sheet(uri);
  canvas.width = canvas.height = size;
  canvas.getContext("2d").drawImage(image, (tile % COLUMNS) * size, Math.floor(tile / COLUMNS) * size, size, size, 0, 0, size, size);
}

/** Pinhole camera of the field of view that the study assumes: focal length and centre in pixels. */
function camera(size) {
  return { focal: size / 2 / Math.tan((study.fov * Math.PI) / 360), centre: size / 2 };
}

/** Unit normals (3 * size * size; right, up, towards the viewer): inverse depth is linear on a plane (dag/data/geometry.py). */
function normals(depth, size) {
  const { focal, centre } = camera(size);
  const found = new Float64Array(3 * size * size);
  const slope = (v, u, dv, du) => {
    const [v0, u0] = [Math.max(0, v - dv), Math.max(0, u - du)];
    const [v1, u1] = [Math.min(size - 1, v + dv), Math.min(size - 1, u + du)];
    return (1 / depth[v1 * size + u1] - 1 / depth[v0 * size + u0]) / (v1 - v0 + u1 - u0);
  };
  for (let v = 0; v < size; v++) {
    for (let u = 0; u < size; u++) {
      const x = (u + 0.5 - centre) / focal, y = -(v + 0.5 - centre) / focal;
      const right = slope(v, u, 0, 1) * focal, up = -slope(v, u, 1, 0) * focal;
      const normal = [-right, -up, 1 / depth[v * size + u] - x * right - y * up];
      const length = Math.hypot(...normal);
      found.set(normal.map((part) => part / length), 3 * (v * size + u));
    }
  }
  return found;
}

function paintNormals(canvas, depth, size) {
  const found = normals(depth, size);
  paint(canvas, size, (i, out, at) => {
    for (let part = 0; part < 3; part++) out[at + part] = Math.round((255 * (found[3 * i + part] + 1)) / 2);
  });
}

// ---- Gallery.

const gallery = study.gallery;
const state = { run: 0, seed: 0 };
const listeners = []; // called with the tile that is shown: the point cloud is one
let shown = null;

function nameOf(run) {
  return run.weights ? `${run.label} (${run.weights})` : run.label;
}

async function showTile() {
  const run = gallery.runs[state.run], size = gallery.size, seed = gallery.seeds[state.seed];
  const depth = metres(run.depth, state.seed, size, gallery.range);
  paintDepth($("depth"), depth, size);
  paintNormals($("normals"), depth, size);
  await paintTile($("image"), run.images, state.seed, size);
  if (run !== gallery.runs[state.run] || seed !== gallery.seeds[state.seed]) return; // a later key press was faster
  shown = { depth, size, run, seed };
  for (const kind of ["image", "depth", "normals"]) $(kind).setAttribute("aria-label", `${kind} of seed ${seed}, ${nameOf(run)}`);
  $("run-name").textContent = nameOf(run);
  $("run").value = state.run;
  $("run").setAttribute("aria-valuetext", nameOf(run));
  $("readout").textContent = `Seed ${seed}, ${nameOf(run)}: judged depth ${Math.min(...depth).toFixed(2)} to ${Math.max(...depth).toFixed(2)} m`;
  $("strip").style.setProperty("--sheet", `url("${run.images}")`);
  [...$("run-stops").children].forEach((button, at) => button.setAttribute("aria-pressed", at === state.run));
  [...$("strip").children].forEach((button, at) => {
    button.setAttribute("aria-checked", at === state.seed);
    button.tabIndex = at === state.seed ? 0 : -1;
  });
  document.body.dataset.shown = `${run.run}/${seed}`;
  listeners.forEach((listener) => listener(shown));
}

const clamp = (value, count) => Math.min(count - 1, Math.max(0, value));
const flip = (by) => { state.run = clamp(state.run + by, gallery.runs.length); return showTile(); };

function chooseSeed(at, focus = false) {
  state.seed = clamp(at, gallery.seeds.length);
  const button = $("strip").children[state.seed];
  const box = $("strip");
  if (button.offsetTop < box.scrollTop || button.offsetTop + button.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = button.offsetTop - box.clientHeight / 2;
  if (focus) button.focus({ preventScroll: true });
  return showTile();
}

function setUpGallery() {
  $("run").max = gallery.runs.length - 1;
  $("stage").style.setProperty("--stops", gallery.runs.length);
  $("run").addEventListener("input", (event) => { state.run = Number(event.target.value); showTile(); });
  gallery.runs.forEach((run, at) => {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: run.label, title: `run ${run.run}${run.weights ? ", " + run.weights : ""}` });
    button.addEventListener("click", () => { state.run = at; showTile(); });
    $("run-stops").append(button);
  });
  const rows = Math.ceil(gallery.seeds.length / COLUMNS);
  gallery.seeds.forEach((seed, at) => {
    const button = document.createElement("button");
    Object.assign(button, { type: "button" });
    button.setAttribute("role", "radio");
    button.setAttribute("aria-label", `seed ${seed}`);
    const across = (100 * (at % COLUMNS)) / (COLUMNS - 1), down = rows > 1 ? (100 * Math.floor(at / COLUMNS)) / (rows - 1) : 0;
    button.style.background = `var(--sheet) ${across}% ${down}% / ${100 * COLUMNS}% ${100 * rows}%`;
    button.addEventListener("click", () => chooseSeed(at));
    $("strip").append(button);
  });
  $("strip").addEventListener("keydown", (event) => {
    const perRow = getComputedStyle($("strip")).gridTemplateColumns.split(" ").length;
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -perRow, ArrowDown: perRow, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    chooseSeed(state.seed + by, true);
  });
  const visible = () => { const box = $("stage").getBoundingClientRect(); return box.bottom > 0 && box.top < window.innerHeight; };
  document.addEventListener("keydown", (event) => {
    const here = document.activeElement;
    const free = here === $("stage") || $("run-stops").contains(here) || (here === document.body && visible());
    if (!free || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") flip(event.key === "ArrowRight" ? 1 : -1);
    // Up and down scroll the page unless the pictures have been chosen.
    else if (here !== document.body && (event.key === "ArrowUp" || event.key === "ArrowDown")) chooseSeed(state.seed + (event.key === "ArrowDown" ? 1 : -1));
    else return;
    event.preventDefault();
  });
  for (const kind of ["image", "depth", "normals"]) {
    $(kind).addEventListener("pointermove", (event) => {
      if (!shown) return;
      const box = event.target.getBoundingClientRect();
      const [u, v] = [event.clientX - box.left, event.clientY - box.top].map((at) => clamp(Math.floor((at / box.width) * shown.size), shown.size));
      $("readout").textContent = `Seed ${shown.seed}, ${nameOf(shown.run)}: column ${u}, row ${v}, judged depth ${shown.depth[v * shown.size + u].toFixed(2)} m`;
    });
  }
  const ramp = Array.from({ length: 9 }, (_, at) => `rgb(${colours.subarray(3 * Math.round((255 * at) / 8), 3 * Math.round((255 * at) / 8) + 3).join(",")})`);
  const [near, far] = study.limits;
  const bar = document.createElement("i");
  bar.style.background = `linear-gradient(90deg, ${ramp.join(",")})`;
  $("depth-scale").append(`${near.toFixed(1)} `, bar, ` ${far.toFixed(1)} m`);
}

// ---- Sweep.

function setUpSweep() {
  const sweep = study.sweep;
  if (!sweep) return;
  const limits = sweep.range, pictured = sweep.seeds.map(() => [document.createElement("canvas"), document.createElement("canvas")]);
  pictured.flat().forEach((canvas) => { canvas.className = "pixels"; });
  for (let first = 0; first < pictured.length; first += 4) for (const kind of [0, 1]) $("sweep-tiles").append(...pictured.slice(first, first + 4).map((pair) => pair[kind]));
  const chosen = { way: sweep.ways[0], at: 0 };
  const every = Object.values(sweep.stops);
  const top = 1.04 * Math.max(...every.map((stop) => stop.dfid_high));
  const said = (stop) => {
    const words = ["w_dc", "w_dp"].filter((key) => stop[key]).map((key) => stop[key].toString());
    return words.length ? words.join(" + ") : "none";
  };
  const verdict = (stop) => (stop.dfid_diff === null || stop.dfid_diff_low * stop.dfid_diff_high <= 0 ? "noise" : stop.dfid_diff < 0 ? "better" : "worse");
  const full = (stop) => ["w_dc", "w_dp"].filter((key) => stop[key]).map((key) => `${key} = ${stop[key]}`).join(", ") || "unguided";
  const number = (value, metric = "dfid") => value.toFixed(sweep.digits[metric]);

  async function show() {
    const stop = sweep.stops[chosen.way.runs[chosen.at]];
    $("weight").value = chosen.at;
    $("weight").setAttribute("aria-valuetext", full(stop));
    $("weight-name").textContent = full(stop);
    $("sweep-tiles").setAttribute("aria-label", `Images and depth of ${sweep.seeds.length} seeds, ${full(stop)}`);
    [...$("levels").children].forEach((row, at) => row.firstChild.setAttribute("aria-pressed", at === chosen.at));
    const change = stop.dfid_diff === null ? "the baseline" : `Δ ${signed(stop.dfid_diff)} [${signed(stop.dfid_diff_low)}, ${signed(stop.dfid_diff_high)}]`;
    $("weight-readout").textContent = `dFID ${number(stop.dfid)} [${number(stop.dfid_low)}, ${number(stop.dfid_high)}], ${change}; FID ${number(stop.fid, "fid")} [${number(stop.fid_low, "fid")}, ${number(stop.fid_high, "fid")}]`;
    document.body.dataset.weight = stop.run;
    await Promise.all(pictured.map(async ([image, depth], tile) => {
      await paintTile(image, stop.images, tile, sweep.size);
      paintDepth(depth, metres(stop.depth, tile, sweep.size, limits), sweep.size);
    }));
  }

  function signed(value) { return (value < 0 ? "−" : "+") + number(Math.abs(value)); }

  function takeWay(way) {
    chosen.way = way;
    chosen.at = Math.min(chosen.at, way.runs.length - 1);
    $("weight").max = way.runs.length - 1;
    $("levels").replaceChildren(...way.runs.map((name, at) => {
      const stop = sweep.stops[name], row = document.createElement("li"), button = document.createElement("button");
      button.type = "button";
      button.className = verdict(stop);
      const part = (text) => Object.assign(document.createElement("span"), { textContent: text });
      const track = document.createElement("span"), bar = document.createElement("i"), dot = document.createElement("i");
      track.className = "track";
      bar.className = "bar";
      dot.className = "dot";
      bar.style.cssText = `left:${(100 * stop.dfid_low) / top}%;width:${(100 * (stop.dfid_high - stop.dfid_low)) / top}%`;
      dot.style.left = `${(100 * stop.dfid) / top}%`;
      track.append(bar, dot);
      button.append(part(said(stop) + (stop.best ? " (best)" : "")), track, part(number(stop.dfid)));
      button.addEventListener("click", () => { chosen.at = at; show(); });
      row.append(button);
      return row;
    }));
    return show();
  }

  sweep.ways.forEach((way, at) => {
    const label = document.createElement("label"), radio = document.createElement("input");
    Object.assign(radio, { type: "radio", name: "way", checked: at === 0 });
    radio.addEventListener("change", () => takeWay(way));
    label.append(radio, Object.assign(document.createElement("span"), { textContent: way.name }));
    $("ways").append(label);
  });
  $("weight").addEventListener("input", (event) => { chosen.at = Number(event.target.value); show(); });
  takeWay(sweep.ways[0]);
}

// ---- Trajectory.

function setUpTrajectory() {
  const path = study.trajectory, last = path.t.length - 1, size = path.size, box = $("trajectory-tiles");
  const rows = [["x_t", "noisy image x_t"], ["pred_xstart", "expected image"], ["strong", "depth, strong head"], ["weak", "depth, weak head"]];
  box.style.setProperty("--seeds", path.seeds.length);
  const caption = (text, name = "") => Object.assign(document.createElement("span"), { textContent: text, className: name });
  box.append(caption(""), ...path.seeds.map((seed) => caption(`seed ${seed}`, "name")));
  const canvases = rows.map(([, words]) => {
    const line = path.seeds.map((seed) => Object.assign(document.createElement("canvas"), { className: "pixels" }));
    line.forEach((canvas, at) => { canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", `${words}, seed ${path.seeds[at]}`); });
    box.append(caption(words), ...line);
    return line;
  });

  async function show(at) {
    $("step").value = at;
    $("step-name").textContent = `t = ${path.t[at]} (${at + 1} of ${path.t.length})`;
    $("step").setAttribute("aria-valuetext", `t = ${path.t[at]}`);
    document.body.dataset.step = path.t[at];
    await Promise.all(rows.flatMap(([kind], row) => path.seeds.map((_, seed) => {
      if (kind === "strong" || kind === "weak") return paintDepth(canvases[row][seed], metres(path[kind][at], seed, size, path.range), size, path.range);
      return paintTile(canvases[row][seed], path[kind][at], seed, size);
    })));
  }

  let timer = null;
  function stop() {
    clearInterval(timer);
    timer = null;
    $("play").setAttribute("aria-pressed", "false");
    $("play").textContent = "Play";
  }
  $("play").addEventListener("click", () => {
    if (timer) return stop();
    let at = Number($("step").value) === last ? 0 : Number($("step").value);
    $("play").setAttribute("aria-pressed", "true");
    $("play").textContent = "Pause";
    show(at);
    timer = setInterval(() => { show(++at); if (at === last) stop(); }, 700);
  });
  $("step").max = last;
  $("step").addEventListener("input", (event) => { stop(); show(Number(event.target.value)); });
  show(last);
}

// ---- Tables.

function sortTable(button) {
  const head = button.closest("th"), table = button.closest("table"), column = Number(button.dataset.column);
  const down = head.getAttribute("aria-sort") === "ascending";
  table.querySelectorAll("[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const numeric = head.classList.contains("number");
  const key = (row) => { const raw = row.cells[column].dataset.raw.split("|")[0]; return raw === "" ? null : numeric ? Number(raw) : raw; };
  const body = table.tBodies[0];
  const order = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return (x === null) - (y === null); // what is missing stays at the end
    return (down ? -1 : 1) * (numeric ? x - y : x.localeCompare(y, "en", { numeric: true }));
  };
  body.append(...[...body.rows].sort(order));
}

function list(pairs) {
  const box = document.createElement("dl");
  for (const [term, text] of pairs) {
    const row = document.createElement("div");
    row.append(Object.assign(document.createElement("dt"), { textContent: term }), Object.assign(document.createElement("dd"), { textContent: text }));
    box.append(row);
  }
  return box;
}

/** The card of a row: its numbers as the csv has them, the run's settings, and what made it. */
function openCard(button) {
  const row = button.closest("tr"), table = button.closest("table"), record = study.records[button.dataset.run];
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  const exact = [...row.cells].map((cell, at) => {
    const [value, low, high] = cell.dataset.raw.split("|");
    return [heads[at], low ? `${value} [${low}, ${high}]` : value || "–"];
  });
  const title = (text) => Object.assign(document.createElement("h3"), { textContent: text });
  const body = [title("Numbers, as in the csv"), list(exact)];
  if (record) {
    body.push(title("Settings of the run"), list(Object.entries(record.settings)));
    const flat = Object.entries(record.made).map(([key, value]) => [key.replaceAll("_", " "), typeof value === "object" ? Object.entries(value).map((pair) => pair.join(" ")).join(", ") : value]);
    if (flat.length) body.push(title("Made by"), list(flat));
  }
  const note = table.closest("article")?.querySelector(".note");
  if (note) body.push(title("How it was measured"), Object.assign(document.createElement("p"), { textContent: note.firstChild.textContent.trim() }));
  $("card-title").textContent = button.textContent;
  $("card-body").replaceChildren(...body);
  $("card").showModal();
}

document.addEventListener("click", (event) => {
  if (event.target.matches("button.sort")) sortTable(event.target);
  if (event.target.matches("button.card")) openCard(event.target);
  if (event.target === $("card")) $("card").close();
});

// ---- Colours of the page: as the system, light, dark. Kept nowhere: a page on disk has no place of its own.

const themes = { Auto: ["system", ""], Light: ["light", "light"], Dark: ["dark", "dark"] };
$("theme").addEventListener("click", (event) => {
  const names = Object.keys(themes), next = names[(names.indexOf(event.target.textContent) + 1) % names.length];
  const [word, theme] = themes[next];
  event.target.textContent = next;
  event.target.setAttribute("aria-label", `Colours: ${next === "Auto" ? "as the " : ""}${word}`);
  document.documentElement.dataset.theme = theme;
});

setUpGallery();
// The viewers further down come after the first picture has been painted.
showTile().then(() => performance.mark("first-figure")).finally(() => requestAnimationFrame(() => setTimeout(() => {
  performance.mark("viewers");
  setUpSweep();
  setUpTrajectory();
  document.body.dataset.ready = "yes";
})));
