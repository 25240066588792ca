// The page: what is chosen, and what follows from it.
const byId = (id) => document.getElementById(id);
const how = JSON.parse(byId("how").textContent);
const view = { film: null, replica: 0, mode: "state", page: 0, only: null, timer: null, drawing: false };
const map = new PageMapView(byId("map"), byId("map-frame")), tree = new TreeView(byId("tree")), curves = new CurvesView(byId("curves"));
const MODES = ["state", "group", "request", "tenant"], LEGEND = 14;

const pagesNow = () => view.film.replicas[view.replica];
const nameOfRequest = (owner) => { const request = view.film.requests[owner - 1]; return request.id === null ? `the request in row ${request.row}` : `request ${request.id}`; };
const shortName = (owner) => { const request = view.film.requests[owner - 1]; return request.id === null ? `row ${request.row}` : `#${request.id}`; };
function tenantAt(pages, page) {
  const tenant = tenantOf(pages.code[page]), owner = pages.owner[page];
  if (tenant >= 0) return tenant;
  if (!owner) return -1;
  const own = view.film.requests[owner - 1].tenant;
  return own === null ? -1 : own;
}
const nameOfTenant = (tenant) => `tenant ${view.film.live ? tenant.toString(16) : tenant}`;
const nameOfGroup = (about, group) => about.windows[group] ? `group ${group}, window of ${about.windows[group]}` : `group ${group}, full attention`;

// What a page counts as by the mode: a number, or -1 where it is free or has none.
function kindOf(pages, page) {
  const state = stateOf(pages.code[page]);
  if (view.mode === "state") return state;
  if (state === FREE) return -2;
  if (view.mode === "group") return groupOf(pages.code[page]);
  return view.mode === "request" ? pages.owner[page] - 1 : tenantAt(pages, page);
}
function lookOf(kind) {
  if (view.mode === "state") return lookOfState(kind);
  return kind === -2 ? lookOfState(FREE) : lookOfNumber(kind);
}
function nameOf(kind) {
  if (view.mode === "state") return STATES[kind];
  if (kind === -2) return "free";
  if (kind === -1) return view.mode === "request" ? "cached, held by none" : "no tenant";
  if (view.mode === "group") return nameOfGroup(pagesNow().about, kind);
  return view.mode === "request" ? nameOfRequest(kind + 1) : nameOfTenant(kind);
}

function draw() {
  if (view.drawing || !view.film || !view.film.length) return;
  view.drawing = true;
  requestAnimationFrame(() => { view.drawing = false; drawNow(); });
}
function drawNow() {
  const pages = pagesNow(), film = view.film;
  const kinds = new Int32Array(pages.about.pages + 1), counts = new Map();
  for (let page = 1; page < kinds.length; page++) {
    const kind = (kinds[page] = kindOf(pages, page));
    counts.set(kind, (counts.get(kind) || 0) + 1);
  }
  const cache = new Map();
  const looks = (page) => { const kind = kinds[page]; let look = cache.get(kind); if (!look) cache.set(kind, (look = lookOf(kind))); return look; };
  const isFaded = (page) => view.only !== null && kinds[page] !== view.only;
  const chain = chainOf(pages, view.page);
  map.draw(pages, looks, isFaded, view.page, chain);
  tree.draw(pages, looks, isFaded, view.page);
  curves.draw(film, pages, film.at);
  showLegend(counts);
  showDetail(pages);
  showMoment(film);
}
// The pages before one in its cached sequence.
function chainOf(pages, page) {
  const chain = [];
  for (let at = page; at && stateOf(pages.code[at]) >= LOCKED && chain.length < 4096; at = pages.before[at]) chain.push(at);
  return chain;
}

function showLegend(counts) {
  const list = byId("legend"), had = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.kind : null;
  let kinds = [...counts.keys()];
  if (view.mode === "state") kinds = [FREE, HELD, LOCKED, CACHED];
  else kinds.sort((a, b) => (a < 0 || b < 0 ? b - a : counts.get(b) - counts.get(a)));
  const shown = kinds.slice(0, LEGEND);
  if (view.only !== null && kinds.includes(view.only) && !shown.includes(view.only)) shown.push(view.only);
  list.replaceChildren(...shown.map((kind) => {
    const item = document.createElement("li"), button = document.createElement("button"), swatch = document.createElement("canvas");
    swatch.style.width = "16px";
    const context = sized(swatch, 16, 16), look = lookOf(kind);
    context.fillStyle = look[0]; context.fillRect(0, 0, 16, 16); drawPattern(context, look[1], 0, 0, 16);
    if (kind === -2 || (view.mode === "state" && kind === FREE)) { context.strokeStyle = theme["free-edge"]; context.strokeRect(.5, .5, 15, 15); }
    const count = document.createElement("b");
    count.textContent = (counts.get(kind) || 0).toLocaleString("en");
    button.type = "button"; button.dataset.kind = kind;
    button.setAttribute("aria-pressed", String(view.only === kind));
    button.title = "Show these alone";
    button.append(swatch, nameOf(kind), " ", count);
    button.onclick = () => { view.only = view.only === kind ? null : kind; draw(); };
    item.append(button);
    return item;
  }));
  if (kinds.length > shown.length) {
    const more = document.createElement("li");
    more.className = "more"; more.textContent = `and ${kinds.length - shown.length} more`;
    list.append(more);
  }
  if (had !== undefined && had !== null) { const again = list.querySelector(`[data-kind="${had}"]`); if (again) again.focus(); }
}

function showDetail(pages) {
  const page = view.page, detail = byId("detail");
  if (!page) { detail.textContent = "Choose a page in the map or in the tree."; return; }
  const code = pages.code[page], state = stateOf(code), facts = [STATES[state]];
  if (state !== FREE) facts.push(nameOfGroup(pages.about, groupOf(code)));
  if (pages.owner[page]) facts.push(`held by ${nameOfRequest(pages.owner[page])}${isShared(code) ? " and others" : ""}`);
  if (tenantAt(pages, page) >= 0) facts.push(nameOfTenant(tenantAt(pages, page)));
  if (state >= LOCKED) {
    const chain = chainOf(pages, page).reverse(), size = pages.about.page_size, last = chain.slice(-6).join(" → ");
    facts.push(`tokens ${((chain.length - 1) * size).toLocaleString("en")} to ${(chain.length * size - 1).toLocaleString("en")} of its sequence: ${chain.length > 6 ? "… → " : ""}${last}`);
  }
  const words = `Page ${page}: ${facts.join("; ")}.`;
  if (detail.textContent !== words) detail.textContent = words;
}

function showMoment(film) {
  const at = film.at, texts = film.texts[at], slider = byId("slider"), list = byId("events");
  slider.max = film.length - 1; slider.value = at;
  const seconds = film.live ? new Date(film.micros[at] / 1000).toLocaleTimeString() : `${(film.micros[at] / 1e6).toFixed(3)} s`;
  const words = `step ${film.steps[at].toLocaleString("en")} of ${film.steps[film.length - 1].toLocaleString("en")}, ${seconds}`;
  byId("when").textContent = words;
  slider.setAttribute("aria-valuetext", `${words}, ${film.running[at]} running, ${film.waiting[at]} waiting`);
  list.className = texts.length ? "" : "none";
  list.replaceChildren(...(texts.length ? texts : [film.live ? "a live view has states, not events: record a trace for those" : "nothing"]).map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  const { leaves, total } = tree;
  byId("tree-note").textContent = total ? `${total.toLocaleString("en")} pages in ${leaves.toLocaleString("en")} sequences; the longest has ${tree.depth.toLocaleString("en")}${pagesNow().about.windows.length > 1 ? ", of group 0" : ""}` : "Nothing is cached.";
}

// What people do.

function go(moment) {
  if (!view.film) return;
  view.film.seek(moment);
  if (view.film.live) byId("follow").checked = view.film.at === view.film.length - 1;
  draw();
}
const by = (steps) => go(view.film.at + steps);
const jump = () => Math.max(1, Math.round(view.film.length / 20));
function setMode(mode) {
  view.mode = mode; view.only = null;
  document.querySelector(`input[name=mode][value=${mode}]`).checked = true;
  draw();
}
function setZoom(zoom) { map.zoom = Math.max(-6, Math.min(8, zoom)); draw(); }
function choose(page) { view.page = page; draw(); if (page) requestAnimationFrame(() => reveal(page)); }
function reveal(page) {
  const [x, y] = map.place(page), frame = byId("map-frame"), cell = map.cell;
  if (y < frame.scrollTop) frame.scrollTop = y; else if (y + cell > frame.scrollTop + frame.clientHeight) frame.scrollTop = y + cell - frame.clientHeight + 8;
  if (x < frame.scrollLeft) frame.scrollLeft = x; else if (x + cell > frame.scrollLeft + frame.clientWidth) frame.scrollLeft = x + cell - frame.clientWidth + 8;
}
function play(on) {
  clearInterval(view.timer);
  view.timer = on ? setInterval(() => { if (view.film.at >= view.film.length - 1) play(false); else by(Math.max(1, Math.round(view.film.length / 600))); }, 60) : null;
  const button = byId("play");
  button.setAttribute("aria-pressed", String(on)); button.textContent = on ? "stop" : "play";
}
function togglePlay() {
  if (!view.timer && view.film.at >= view.film.length - 1) view.film.seek(0);
  play(!view.timer);
}

const at = (event) => { const box = event.currentTarget.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
function listen() {
  for (const radio of document.querySelectorAll("input[name=mode]")) radio.onchange = () => setMode(radio.value);
  byId("smaller").onclick = () => setZoom(map.zoom - 1);
  byId("larger").onclick = () => setZoom(map.zoom + 1);
  byId("fit").onclick = () => setZoom(0);
  byId("replica").onchange = (event) => { view.replica = Number(event.target.value); view.page = 0; draw(); };
  byId("first").onclick = () => go(0);
  byId("last").onclick = () => go(view.film.length - 1);
  byId("back").onclick = () => by(-1);
  byId("next").onclick = () => by(1);
  byId("play").onclick = togglePlay;
  byId("slider").oninput = (event) => go(Number(event.target.value));
  byId("follow").onchange = (event) => { if (event.target.checked) go(view.film.length - 1); };
  byId("map").onclick = (event) => choose(map.pageAt(...at(event)));
  byId("tree").onclick = (event) => choose(tree.pageAt(...at(event)) || view.page);
  for (const [canvas, find] of [["map", (x, y) => map.pageAt(x, y)], ["tree", (x, y) => tree.pageAt(x, y)]]) {
    byId(canvas).onmousemove = (event) => { const page = find(...at(event)); event.currentTarget.title = page ? `page ${page}: ${nameOf(kindOf(pagesNow(), page))}` : ""; };
  }
  const seek = (event) => { if (event.buttons & 1) go(curves.momentAt(at(event)[0], view.film.length)); };
  byId("curves").onpointerdown = (event) => { event.currentTarget.setPointerCapture(event.pointerId); seek(event); };
  byId("curves").onpointermove = seek;
  document.addEventListener("keydown", onKey);
  window.addEventListener("resize", draw);
  new ResizeObserver(draw).observe(byId("map-frame"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readTheme(); draw(); });
}
function onKey(event) {
  if (!view.film || event.ctrlKey || event.metaKey || event.altKey) return;
  const { key, target } = event, arrows = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"];
  if (key === "Escape") { view.page = 0; view.only = null; draw(); return; }
  if (target.id === "map" && [...arrows, "Home", "End", "PageUp", "PageDown"].includes(key)) {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -map.columns, ArrowDown: map.columns, PageUp: -8 * map.columns, PageDown: 8 * map.columns }[key];
    const last = pagesNow().about.pages;
    choose(key === "Home" ? 1 : key === "End" ? last : view.page ? Math.max(1, Math.min(last, view.page + step)) : 1);
  } else if (target.id === "tree" && arrows.includes(key)) {
    choose(tree.beside(view.page, key));
  } else if (target.matches("input[type=radio], select") && (arrows.includes(key) || key === " ")) {
    return;
  } else if (target.matches("button, summary, input") && key === " ") {
    return;
  } else if (MODES[Number(key) - 1]) {
    setMode(MODES[Number(key) - 1]);
  } else {
    const does = { ArrowLeft: () => by(-1), ArrowRight: () => by(1), PageUp: () => by(-jump()), PageDown: () => by(jump()), Home: () => go(0), End: () => go(view.film.length - 1), " ": togglePlay, "+": () => setZoom(map.zoom + 1), "-": () => setZoom(map.zoom - 1), 0: () => setZoom(0) }[key];
    if (!does) return;
    does();
  }
  event.preventDefault();
}

// Where it comes from.

function tell(text, isWrong = false) { byId("status").textContent = text; byId("status").classList.toggle("wrong", isWrong); }
function show(film) {
  view.film = film;
  const abouts = film.replicas.map((pages) => pages.about), [first] = abouts;
  const shown = first.pages < first.all ? `, of which the first ${first.pages.toLocaleString("en")} are shown` : "";
  const replicas = abouts.length > 1 ? `${abouts.length} replicas of ` : "";
  byId("about").textContent = `${replicas}${first.all.toLocaleString("en")} pages of ${first.page_size} tokens${shown}${first.windows.length > 1 ? `, ${first.windows.length} groups of layers` : ""}`;
  byId("replica-choice").hidden = abouts.length < 2;
  byId("replica").replaceChildren(...abouts.map((_, index) => Object.assign(document.createElement("option"), { value: index, textContent: index })));
}
async function showTrace() {
  const film = await filmOf(byId("data").textContent.trim());
  show(film);
  if (!film.length) { tell("this trace has no step", true); return; }
  tell(film.failure ? film.failure : `recorded ${film.started.replace("T", " ").replace("Z", " UTC")}`, Boolean(film.failure));
  const asked = new URLSearchParams(location.hash.slice(1));  // for pictures: #step=12&mode=request&page=7
  const wanted = asked.has("step") ? film.steps.findIndex((step) => step >= Number(asked.get("step"))) : film.length - 1;
  film.seek(wanted < 0 ? film.length - 1 : wanted);
  view.page = Number(asked.get("page")) || 0;
  if (MODES.includes(asked.get("mode"))) setMode(asked.get("mode")); else draw();
}
async function poll() {
  try {
    const headers = window.pagesKey ? { authorization: `Bearer ${window.pagesKey}` } : {};
    const answer = await fetch(how.live, { headers, cache: "no-store" });
    if (!answer.ok) throw new Error(`the server says ${answer.status}`);
    const state = await answer.json();
    if (!view.film) { show(Object.assign(new Film(state.replicas.map((each) => each.about)), { live: true })); }
    view.film.addLive(state);
    if (byId("follow").checked) view.film.seek(view.film.length - 1);
    tell(`live, ${new Date().toLocaleTimeString()}`);
    draw();
  } catch (error) {
    tell(`no answer: ${error.message}`, true);
  }
  setTimeout(poll, document.hidden ? 5000 : how.seconds * 1000);
}

readTheme();
listen();
if (how.live) { byId("follow-choice").hidden = false; poll(); } else showTrace().catch((error) => tell(`this page cannot be shown: ${error.message}`, true));
