// Every page at every moment: the changes between moments, applied forwards and back.
const FREE = 0, HELD = 1, LOCKED = 2, CACHED = 3;
const STATES = ["free", "held", "cached, locked", "cached, evictable"];
const stateOf = (code) => code & 3, isShared = (code) => (code >> 2) & 1;
const groupOf = (code) => (code >> 3) & 255, tenantOf = (code) => (code >>> 11) - 1;
const MOST_LIVE_MOMENTS = 3600, MOST_LIVE_CHANGES = 2e6;

class Pages {
  constructor(about) {
    this.about = about;
    this.code = new Int32Array(about.pages + 1);
    this.owner = new Int32Array(about.pages + 1);
    this.before = new Int32Array(about.pages + 1);
    this.moments = [];
    this.counts = [];
  }
  // Adds a moment that differs in some pages, and goes there; the last moment must be the present one.
  add(page, code, owner, before, counts) {
    const old = [code, owner, before].map((values) => new Int32Array(values.length));
    for (let i = 0; i < page.length; i++) {
      const at = page[i];
      old[0][i] = this.code[at]; old[1][i] = this.owner[at]; old[2][i] = this.before[at];
      this.code[at] = code[i]; this.owner[at] = owner[i]; this.before[at] = before[i];
    }
    this.moments.push({ page, fresh: [code, owner, before], old });
    this.counts.push(counts);
  }
  step(index, side) {
    const { page, [side]: [code, owner, before] } = this.moments[index];
    for (let i = 0; i < page.length; i++) {
      const at = page[i];
      this.code[at] = code[i]; this.owner[at] = owner[i]; this.before[at] = before[i];
    }
  }
}

class Film {
  constructor(abouts) {
    this.replicas = abouts.map((about) => new Pages(about));
    this.requests = [];
    this.steps = []; this.micros = []; this.waiting = []; this.running = []; this.texts = [];
    this.at = -1;
    this.changes = 0;
    this.byId = new Map();
  }
  get length() { return this.steps.length; }
  seek(moment) {
    const to = Math.min(Math.max(0, moment), this.length - 1);
    for (; this.at < to; this.at++) for (const pages of this.replicas) pages.step(this.at + 1, "fresh");
    for (; this.at > to; this.at--) for (const pages of this.replicas) pages.step(this.at, "old");
  }
  note(step, micros, waiting, running, texts) {
    this.steps.push(step); this.micros.push(micros); this.waiting.push(waiting); this.running.push(running);
    this.texts.push(texts);
    this.at = this.length - 1;
  }
  // Of a live engine: the whole state, of which the difference is kept. The oldest moments give way.
  addLive(state) {
    const here = this.at, isLast = here === this.length - 1;
    this.seek(this.length - 1);
    const owners = [0, ...state.requests.map((request) => this.numberOf(request))];
    state.replicas.forEach((replica, index) => {
      const pages = this.replicas[index], count = pages.code.length;
      const words = new Int32Array(bytesOf(replica.pages).buffer);
      const code = words.subarray(0, count), before = words.subarray(2 * count);
      const owner = words.subarray(count, 2 * count).map((number) => owners[number]);
      const changed = [];
      for (let at = 0; at < count; at++) {
        if (code[at] !== pages.code[at] || owner[at] !== pages.owner[at] || before[at] !== pages.before[at]) changed.push(at);
      }
      const page = Int32Array.from(changed);
      pages.add(page, page.map((at) => code[at]), page.map((at) => owner[at]), page.map((at) => before[at]), replica.counts);
      this.changes += page.length;
    });
    this.note(state.step, state.micros, state.waiting, state.running, state.texts);
    const dropped = this.trim();
    if (!isLast) this.seek(Math.max(0, here - dropped));
    return dropped;
  }
  numberOf(request) {
    if (!this.byId.has(request.id)) { this.requests.push(request); this.byId.set(request.id, this.requests.length); }
    return this.byId.get(request.id);
  }
  trim() {
    let dropped = 0;
    while (this.length > 2 && (this.length > MOST_LIVE_MOMENTS || this.changes > MOST_LIVE_CHANGES)) {
      for (const pages of this.replicas) {  // the second moment becomes the whole state that the first was
        const [first, second] = pages.moments, merged = new Map();
        for (const each of [first, second]) each.page.forEach((page, i) => merged.set(page, each.fresh.map((values) => values[i])));
        const page = Int32Array.from(merged.keys()), fresh = [0, 1, 2].map((k) => Int32Array.from(merged.values(), (v) => v[k]));
        this.changes += page.length - first.page.length - second.page.length;
        pages.moments.splice(0, 2, { page, fresh, old: fresh.map((values) => new Int32Array(values.length)) });
        pages.counts.shift();
      }
      for (const column of [this.steps, this.micros, this.waiting, this.running, this.texts]) column.shift();
      this.at--; dropped++;
    }
    return dropped;
  }
}

function bytesOf(text) { return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)); }

async function unpacked(text) {
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

// Data of a trace: the length of the JSON (uint32), the JSON, padding to a multiple of 4, then all integers.
async function filmOf(text) {
  const buffer = await unpacked(text), size = new DataView(buffer).getUint32(0, true);
  const facts = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  const words = new Int32Array(buffer, 4 + Math.ceil(size / 4) * 4), film = new Film(facts.replicas.map((each) => each.about));
  film.requests = facts.requests;
  film.failure = facts.failure;
  film.started = facts.started;
  let start = 0;
  const columns = facts.replicas.map(({ sizes }) => {
    const count = sizes.reduce((sum, size) => sum + size, 0), from = start;
    start += 4 * count;
    return [0, 1, 2, 3].map((k) => words.subarray(from + k * count, from + (k + 1) * count));
  });
  const at = facts.replicas.map(() => 0);
  for (let moment = 0; moment < facts.steps.length; moment++) {
    film.replicas.forEach((pages, index) => {
      const from = at[index], to = (at[index] += facts.replicas[index].sizes[moment]);
      const [page, code, owner, before] = columns[index].map((column) => column.subarray(from, to));
      pages.add(page, code, owner, before, facts.replicas[index].counts[moment]);
    });
    film.note(facts.steps[moment], facts.micros[moment], facts.waiting[moment], facts.running[moment], facts.texts[moment]);
  }
  return film;
}
