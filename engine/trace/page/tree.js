// The prefix tree: sequences run from left to right, and where they part, they lie one below the other.
class TreeView {
  constructor(canvas) { this.canvas = canvas; this.nodes = []; this.nodeOf = new Map(); }
  // Runs of pages of the first group that follow one another in every sequence.
  build(pages) {
    const children = new Map();
    let total = 0;
    for (let page = 1; page <= pages.about.pages; page++) {
      const code = pages.code[page], state = stateOf(code);
      if ((state !== LOCKED && state !== CACHED) || groupOf(code) !== 0) continue;
      total++;
      const before = pages.before[page], isCached = before && stateOf(pages.code[before]) >= LOCKED;
      const parent = isCached ? before : 0;
      if (!children.has(parent)) children.set(parent, []);
      children.get(parent).push(page);
    }
    this.children = children; this.total = total; this.nodes = []; this.nodeOf = new Map(); this.depth = 1; this.leaves = 0;
    const begin = (page, start, parent) => {
      const node = { pages: [page], start, parent, children: [] };
      for (let next; (next = children.get(page)) && next.length === 1; page = next[0]) node.pages.push(next[0]);
      for (const each of node.pages) this.nodeOf.set(each, node);
      this.depth = Math.max(this.depth, start + node.pages.length);
      this.nodes.push(node);
      return node;
    };
    const roots = (children.get(0) || []).map((page) => begin(page, 0, null)), pending = [...roots];
    while (pending.length) {
      const node = pending.pop();
      for (const page of children.get(node.pages[node.pages.length - 1]) || []) {
        const child = begin(page, node.start + node.pages.length, node);
        node.children.push(child); pending.push(child);
      }
    }
    for (const node of [...this.nodes].reverse()) {
      node.leaves = node.children.reduce((sum, child) => sum + child.leaves, 0) || 1;
      node.size = node.children.reduce((sum, child) => sum + child.size, node.pages.length);
      node.children.sort((a, b) => b.size - a.size);
    }
    this.roots = roots.sort((a, b) => b.size - a.size);
    const place = (nodes, top) => { for (const node of nodes) { node.top = top; place2.push([node.children, top]); top += node.leaves; } return top; };
    const place2 = [];
    this.leaves = place(this.roots, 0);
    while (place2.length) place(...place2.pop());
  }
  draw(pages, looks, isFaded, chosen) {
    this.build(pages);
    const width = Math.max(200, this.canvas.parentElement.clientWidth);
    this.row = Math.max(240 / Math.max(this.leaves, 1), Math.min(24, 420 / Math.max(this.leaves, 1)));
    this.row = Math.min(this.row, 30);
    const height = Math.max(40, Math.ceil(this.leaves * this.row));
    const context = sized(this.canvas, width, height);
    this.scale = Math.min(width / this.depth, 46);
    for (const node of this.nodes) this.drawNode(context, node, looks, isFaded);
    const gap = this.row >= 5 ? 1 : 0;
    const box = (page) => { const [x, y, h] = this.place(page); return [x, y, Math.max(2, this.scale), Math.max(2, h - gap)]; };
    context.strokeStyle = theme.text; context.lineWidth = 1.5;
    for (let node = this.nodeOf.get(chosen); node; node = node.parent) {  // the way to the page that is chosen
      const end = this.nodeOf.get(chosen) === node ? node.pages.indexOf(chosen) + 1 : node.pages.length;
      context.strokeRect(node.start * this.scale + .75, node.top * this.row + .75, Math.max(2, end * this.scale - 1.5), Math.max(1, node.leaves * this.row - gap - 1.5));
    }
    if (chosen && this.nodeOf.has(chosen)) { context.strokeStyle = theme.mark; context.lineWidth = 3; context.strokeRect(...box(chosen)); }
  }
  drawNode(context, node, looks, isFaded) {
    const gap = this.row >= 5 ? 1 : 0, y = node.top * this.row, h = Math.max(.6, node.leaves * this.row - gap);
    for (let i = 0; i < node.pages.length;) {  // runs that look alike
      const look = looks(node.pages[i]), faded = isFaded(node.pages[i]);
      let end = i + 1;
      for (; end < node.pages.length; end++) {
        const other = looks(node.pages[end]);
        if (other[0] !== look[0] || other[1] !== look[1] || isFaded(node.pages[end]) !== faded) break;
      }
      const x = (node.start + i) * this.scale, w = Math.max(1, (end - i) * this.scale - (end === node.pages.length ? gap : 0));
      context.globalAlpha = faded ? FADED : 1;
      context.fillStyle = look[0]; context.fillRect(x, y, w, h);
      if (h >= 9 && w >= 9) this.drawRun(context, look[1], x, y, w, h);
      i = end;
    }
    context.globalAlpha = 1;
    if (h >= 14 && node.pages.length * this.scale >= 26) {
      const colour = looks(node.pages[0])[0];
      context.font = "11px system-ui, sans-serif"; context.textBaseline = "middle";
      const words = String(node.pages.length), x = node.start * this.scale + 3;
      context.fillStyle = colour; context.fillRect(x - 1, y + h / 2 - 7, context.measureText(words).width + 4, 14);
      context.fillStyle = isPale(colour) ? "#10141b" : "#ffffff";
      context.fillText(words, x + 1, y + h / 2 + .5);
    }
  }
  drawRun(context, pattern, x, y, w, h) {
    context.save(); context.beginPath(); context.rect(x, y, w, h); context.clip();
    const size = 20;
    for (let i = x - (x % size); i < x + w; i += size) for (let j = y - (y % size); j < y + h; j += size) drawPattern(context, pattern, i, j, size);
    context.restore();
  }
  place(page) {
    const node = this.nodeOf.get(page);
    return [(node.start + node.pages.indexOf(page)) * this.scale, node.top * this.row, node.leaves * this.row];
  }
  pageAt(x, y) {
    const depth = x / this.scale, leaf = y / this.row;
    for (const node of this.nodes) {
      if (leaf >= node.top && leaf < node.top + node.leaves && depth >= node.start && depth < node.start + node.pages.length) {
        return node.pages[Math.floor(depth - node.start)];
      }
    }
    return 0;
  }
  // The page beside one: along its sequence, or at the same place of a neighbour.
  beside(page, key) {
    const node = this.nodeOf.get(page);
    if (!node) return this.roots.length ? this.roots[0].pages[0] : 0;
    const at = node.pages.indexOf(page);
    if (key === "ArrowLeft") return at ? node.pages[at - 1] : node.parent ? node.parent.pages[node.parent.pages.length - 1] : page;
    if (key === "ArrowRight") return at < node.pages.length - 1 ? node.pages[at + 1] : node.children.length ? node.children[0].pages[0] : page;
    const siblings = node.parent ? node.parent.children : this.roots, index = siblings.indexOf(node) + (key === "ArrowDown" ? 1 : -1);
    const other = siblings[index];
    return other ? other.pages[Math.min(at, other.pages.length - 1)] : page;
  }
}
