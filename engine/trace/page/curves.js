// Pages by state and requests over time, with a line where the slider stands.
class CurvesView {
  constructor(canvas) { this.canvas = canvas; }
  draw(film, pages, at) {
    const width = Math.max(200, this.canvas.parentElement.clientWidth - 2 * parseFloat(getComputedStyle(this.canvas.parentElement).paddingLeft));
    const height = window.innerWidth <= 820 ? 84 : 112, context = sized(this.canvas, width, height), lower = Math.round(height * .3);
    const upper = height - lower - 6, count = film.length, span = Math.max(1, count - 1), left = 0;
    this.width = width;
    const moments = Array.from({ length: Math.ceil(width) + 1 }, (_, x) => Math.min(count - 1, Math.round(x / width * span)));
    const total = pages.about.all;
    context.fillStyle = theme.free; context.fillRect(left, 0, width, upper);
    const stack = [[HELD, 1], [LOCKED, 2], [CACHED, 3]];
    const base = moments.map(() => 0);
    for (const [state, column] of stack) {
      const [colour, pattern] = lookOfState(state);
      context.beginPath(); context.moveTo(0, upper * (1 - base[0] / total));
      moments.forEach((moment, x) => context.lineTo(x, upper * (1 - base[x] / total)));
      for (let x = moments.length - 1; x >= 0; x--) { base[x] += pages.counts[moments[x]][column]; context.lineTo(x, upper * (1 - base[x] / total)); }
      context.closePath(); context.fillStyle = colour; context.fill();
      context.save(); context.clip(); context.globalAlpha = .55;
      for (let x = 0; x < width; x += 24) for (let y = 0; y < upper; y += 24) drawPattern(context, pattern, x, y, 24);
      context.restore();
    }
    const running = moments.map((moment) => film.running[moment]), waiting = moments.map((moment) => film.waiting[moment]);
    let most = 1;
    for (let i = 0; i < running.length; i++) most = Math.max(most, running[i], waiting[i]);
    const y = (value) => height - 2 - (lower - 4) * value / most;
    context.fillStyle = theme.ground; context.fillRect(0, height - lower, width, lower);
    this.line(context, running, y, theme.text, []);
    this.line(context, waiting, y, theme.mark, [4, 3]);
    this.words(context, `of ${total.toLocaleString("en")} pages, from below: held, locked, cached`, 6, 4);
    this.words(context, `running —   waiting - -   up to ${most}`, 6, height - lower + 2);
    const x = Math.round(at / span * width);
    context.fillStyle = theme.focus; context.fillRect(Math.min(width - 2, Math.max(0, x - 1)), 0, 2, height);
  }
  line(context, values, y, colour, dash) {
    context.beginPath(); context.setLineDash(dash); context.strokeStyle = colour; context.lineWidth = 1.5;
    values.forEach((value, x) => (x ? context.lineTo(x, y(value)) : context.moveTo(x, y(value))));
    context.stroke(); context.setLineDash([]);
  }
  words(context, text, x, y) {
    context.font = "11px system-ui, sans-serif"; context.textBaseline = "top";
    context.fillStyle = theme.panel; context.globalAlpha = .85;
    context.fillRect(x - 3, y - 1, context.measureText(text).width + 6, 14);
    context.globalAlpha = 1; context.fillStyle = theme.text; context.fillText(text, x, y);
  }
  momentAt(x, count) { return Math.round(Math.max(0, Math.min(1, x / this.width)) * Math.max(0, count - 1)); }
}
