// The page map: a cell for each page, in the order of their ids.
class PageMapView {
  constructor(canvas, frame) {
    this.canvas = canvas; this.frame = frame;
    this.zoom = 0;  // steps of size away from what fits
    this.small = document.createElement("canvas");
    this.tiles = new Map();
  }
  // Cells so large that the map fits, or is a little taller; columns in fours, or eights where there are many.
  layout(count) {
    const width = Math.max(200, this.frame.clientWidth - 8), height = Math.max(280, window.innerHeight * .54);
    const columnsOf = (cell) => { const all = Math.max(1, Math.floor(width / cell)); return all - all % (all > 32 ? 8 : all > 4 ? 4 : 1); };
    const tall = (cell) => Math.ceil(count / columnsOf(cell)) * cell;
    let cell = 72;
    while (cell > 2 && tall(cell) > (cell < 6 ? 1.35 : 1) * height) cell--;
    if (this.zoom) cell = Math.max(2, Math.min(96, Math.round(cell * 1.35 ** this.zoom) + Math.sign(this.zoom)));
    const columns = columnsOf(cell);
    this.cell = cell; this.columns = Math.min(columns, count); this.count = count;
    this.rows = Math.ceil(count / this.columns);
  }
  place(page) { return [((page - 1) % this.columns) * this.cell, Math.floor((page - 1) / this.columns) * this.cell]; }
  pageAt(x, y) {
    const column = Math.floor(x / this.cell), page = Math.floor(y / this.cell) * this.columns + column + 1;
    return column >= 0 && column < this.columns && page >= 1 && page <= this.count ? page : 0;
  }
  draw(pages, looks, isFaded, chosen, chain) {
    this.layout(pages.about.pages);
    const { cell, columns, rows, count } = this;
    this.canvas.style.width = `${columns * cell}px`;
    const context = sized(this.canvas, columns * cell, rows * cell);
    if (cell < 9) this.drawSmall(context, looks, isFaded); else this.drawLarge(context, pages, looks, isFaded);
    for (const page of chain) this.outline(context, page, theme.text, Math.min(2.5, Math.max(1, cell / 16)));
    if (chosen) this.outline(context, chosen, theme.mark, Math.min(4, Math.max(2, cell / 9)), cell < 9 ? 4 : 0);
  }
  outline(context, page, colour, width, around = 0) {
    const [x, y] = this.place(page);
    context.strokeStyle = colour; context.lineWidth = width;
    const inset = width / 2 - around;
    context.strokeRect(x + inset, y + inset, this.cell - 2 * inset, this.cell - 2 * inset);
  }
  // A pixel for each page, made larger: as fast for 64,000 pages as for one.
  drawSmall(context, looks, isFaded) {
    const { cell, columns, rows, count, small } = this;
    small.width = columns; small.height = rows;
    const inner = small.getContext("2d"), image = inner.createImageData(columns, rows), bytes = image.data;
    const cache = new Map(), ground = rgbOf(theme.ground);
    for (let page = 1; page <= count; page++) {
      const [colour] = looks(page), faded = isFaded(page), key = colour + faded;
      let rgb = cache.get(key);
      if (!rgb) {
        rgb = rgbOf(colour);
        if (faded) rgb = rgb.map((value, i) => value * FADED * 1.6 + ground[i] * (1 - FADED * 1.6));
        cache.set(key, rgb);
      }
      const at = 4 * (page - 1);
      bytes[at] = rgb[0]; bytes[at + 1] = rgb[1]; bytes[at + 2] = rgb[2]; bytes[at + 3] = 255;
    }
    inner.putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, columns * cell, rows * cell);
    if (cell < 4) return;
    context.fillStyle = theme.ground;
    for (let column = 1; column < columns; column++) context.fillRect(column * cell - 1, 0, 1, rows * cell);
    for (let row = 1; row < rows; row++) context.fillRect(0, row * cell - 1, columns * cell, 1);
  }
  drawLarge(context, pages, looks, isFaded) {
    const { cell, count } = this, gap = cell > 20 ? 3 : 1, size = cell - gap;
    for (let page = 1; page <= count; page++) {
      const [x, y] = this.place(page), look = looks(page);
      context.globalAlpha = isFaded(page) ? FADED : 1;
      context.drawImage(this.tile(look, size, stateOf(pages.code[page]) === FREE), x, y, size, size);
      if (cell >= 30) this.label(context, pages, page, x, y, size, look[0]);
    }
    context.globalAlpha = 1;
  }
  tile(look, size, isFree) {
    const ratio = window.devicePixelRatio || 1, key = [...look, size, isFree, ratio, theme.ground].join();
    if (!this.tiles.has(key)) {
      const tile = document.createElement("canvas"), context = sized(tile, size, size);
      context.beginPath(); context.roundRect(0, 0, size, size, size > 16 ? 4 : size > 10 ? 2 : 0); context.clip();
      context.fillStyle = look[0]; context.fillRect(0, 0, size, size);
      if (isFree) { context.strokeStyle = theme["free-edge"]; context.lineWidth = 1; context.strokeRect(.5, .5, size - 1, size - 1); }
      drawPattern(context, look[1], 0, 0, size);
      if (this.tiles.size > 2000) this.tiles.clear();
      this.tiles.set(key, tile);
    }
    return this.tiles.get(key);
  }
  label(context, pages, page, x, y, size, colour) {
    const owner = pages.owner[page], text = owner ? shortName(owner) : "";
    const pale = stateOf(pages.code[page]) === FREE ? isPale(theme.ground) : isPale(colour);
    const draw = (words, font, at, baseline) => {
      context.font = font; context.textBaseline = baseline;
      const width = context.measureText(words).width + 5, tall = Number(/(\d+)px/.exec(font)[1]) + 1;
      if (stateOf(pages.code[page]) !== FREE) {
        context.fillStyle = colour; context.beginPath();
        context.roundRect(x + 4, at - (baseline === "top" ? 1 : tall), width, tall + 1, 3); context.fill();
      }
      context.fillStyle = pale ? "#10141b" : "#ffffff";
      context.fillText(words, x + 6, at);
    };
    const alpha = context.globalAlpha;
    if (stateOf(pages.code[page]) === FREE) context.globalAlpha = alpha * .5;
    draw(String(page), "10px system-ui, sans-serif", y + 5, "top");
    context.globalAlpha = alpha;
    if (text) draw(text, "600 12px system-ui, sans-serif", y + size - 5, "bottom");
  }
}
