// Colours and patterns: a kind is told by both, so that neither colour vision nor a grey print loses it.
const HUES = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#8c7ae6"];  // Okabe and Ito, and one
const PATTERNS = ["plain", "rising", "dots", "falling", "bars", "cross"];
let theme = {};

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["ground", "panel", "line", "text", "quiet", "focus", "free", "free-edge", "held", "locked", "cached", "nobody", "ink", "mark"]) {
    theme[name] = style.getPropertyValue(`--${name}`).trim();
  }
}

// How a kind looks: [colour, pattern].
function lookOfState(state) {
  return [["free", "plain"], ["held", "plain"], ["locked", "rising"], ["cached", "dots"]].map(([name, pattern]) => [theme[name], pattern])[state];
}
function lookOfNumber(number) {
  if (number < 0) return [theme.nobody, "plain"];
  return [HUES[number % HUES.length], PATTERNS[Math.floor(number / HUES.length) % PATTERNS.length]];
}

function drawPattern(context, pattern, x, y, size) {
  if (pattern === "plain") return;
  context.save();
  context.beginPath(); context.rect(x, y, size, size); context.clip();
  context.strokeStyle = context.fillStyle = theme.ink;
  context.globalAlpha = .5;
  context.lineWidth = Math.max(1, size / 14);
  const gap = Math.max(4, size / 4);
  context.beginPath();
  if (pattern === "dots") {
    for (let i = gap / 2; i < size; i += gap) for (let j = gap / 2; j < size; j += gap) {
      context.moveTo(x + i, y + j); context.arc(x + i, y + j, Math.max(.8, size / 22), 0, 7);
    }
    context.fill();
  } else {
    for (let i = -size; i < 2 * size; i += gap) {
      if (pattern === "rising" || pattern === "cross") { context.moveTo(x + i, y + size); context.lineTo(x + i + size, y); }
      if (pattern === "falling" || pattern === "cross") { context.moveTo(x + i, y); context.lineTo(x + i + size, y + size); }
      if (pattern === "bars") { context.moveTo(x, y + i); context.lineTo(x + size, y + i); }
    }
    context.stroke();
  }
  context.restore();
}

// A canvas as large as it is shown, in the device's own pixels.
function sized(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

function rgbOf(colour) {
  const value = parseInt(colour.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}
function isPale(colour) {
  const [r, g, b] = rgbOf(colour);
  return .299 * r + .587 * g + .114 * b > 140;
}
const FADED = .16;
