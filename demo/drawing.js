// The drawing: strokes by mouse, finger, pen or keyboard, on a square canvas.

const SIDE = 560; // pixels of the canvas, whatever its size on the screen
const LINE = 44;
const STEP = 14; // of an arrow key

/** Sends "change" when the ink changes, and "rest" when a stroke has ended. */
export class Drawing extends EventTarget {
  constructor(canvas) {
    super();
    this.canvas = canvas;
    canvas.width = canvas.height = SIDE;
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.strokes = []; // lists of points [x, y] in pixels of the canvas
    this.pointer = null; // the one that draws
    this.pen = null; // the pen of the keyboard: {x, y, isDown}
    this.listen();
    this.render();
  }

  get isEmpty() {
    return this.strokes.length === 0;
  }

  /** Whether the last stroke has not ended. */
  get isOpen() {
    return this.pointer !== null || Boolean(this.pen?.isDown);
  }

  undo() {
    this.endStroke();
    this.strokes.pop();
    this.finish();
  }

  clear() {
    this.replace([]);
  }

  /** Show other strokes, with points in [0, 1]. */
  replace(strokes) {
    this.endStroke();
    this.strokes = strokes.map((points) => points.map(([x, y]) => [x * SIDE, y * SIDE]));
    this.finish();
  }

  /** The picture as dark ink on white paper: its side, and SIDE×SIDE values in 0 .. 255. */
  pixels() {
    const { data } = this.context.getImageData(0, 0, SIDE, SIDE);
    const values = new Uint8Array(SIDE * SIDE);
    for (let k = 0; k < values.length; k++) values[k] = 255 - data[4 * k + 3];
    return { values, side: SIDE };
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      if (this.pointer !== null || event.button !== 0) return;
      this.pointer = event.pointerId;
      canvas.setPointerCapture(event.pointerId);
      this.pen = null;
      this.strokes.push([this.pointOf(event)]);
      this.change();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerId !== this.pointer) return;
      // A browser joins the moves of one frame, and a curve needs them all.
      const moves = event.getCoalescedEvents?.() ?? [];
      const points = (moves.length ? moves : [event]).map((move) => this.pointOf(move));
      this.strokes.at(-1).push(...points);
      this.change();
    });
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, (event) => {
        if (event.pointerId !== this.pointer) return;
        this.endStroke();
        this.finish();
      });
    }
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    canvas.addEventListener("blur", () => {
      const wasDown = this.pen?.isDown;
      this.pen = null;
      if (wasDown) this.finish();
      else this.render();
    });
    // Ink has the colour of text, which changes with the theme.
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.render());
  }

  onKey(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    if (!move && event.key !== " ") return;
    event.preventDefault();
    if (this.pointer !== null) return;
    this.pen ??= { x: SIDE / 2, y: SIDE / 4, isDown: false };
    const { pen } = this;
    if (move) {
      pen.x = Math.min(Math.max(pen.x + STEP * move[0], 0), SIDE);
      pen.y = Math.min(Math.max(pen.y + STEP * move[1], 0), SIDE);
      if (pen.isDown) this.strokes.at(-1).push([pen.x, pen.y]);
    } else {
      pen.isDown = !pen.isDown;
      if (pen.isDown) this.strokes.push([[pen.x, pen.y]]);
    }
    if (pen.isDown) this.change();
    else if (move) this.render();
    else this.finish();
  }

  endStroke() {
    this.pointer = null;
    if (this.pen) this.pen.isDown = false;
  }

  pointOf(event) {
    const { left, top, width, height } = this.canvas.getBoundingClientRect();
    return [((event.clientX - left) / width) * SIDE, ((event.clientY - top) / height) * SIDE];
  }

  change() {
    this.render();
    this.dispatchEvent(new Event("change"));
  }

  finish() {
    this.change();
    this.dispatchEvent(new Event("rest"));
  }

  render() {
    const { context, canvas } = this;
    context.clearRect(0, 0, SIDE, SIDE);
    context.strokeStyle = getComputedStyle(canvas).color;
    context.lineWidth = LINE;
    context.lineCap = context.lineJoin = "round";
    for (const points of this.strokes) {
      context.beginPath();
      trace(context, points);
      context.stroke();
    }
    // The keyboard's pen is no ink, so it is not on this canvas.
    const pen = this.pen && { x: this.pen.x / SIDE, y: this.pen.y / SIDE, isDown: this.pen.isDown };
    this.dispatchEvent(new CustomEvent("pen", { detail: pen }));
  }
}

/** A smooth curve: each point bends the line between the middles of its neighbours. */
function trace(context, points) {
  const [lastX, lastY] = points.at(-1);
  context.moveTo(...points[0]);
  for (let k = 1; k < points.length - 1; k++) {
    const [[x, y], [nextX, nextY]] = [points[k], points[k + 1]];
    context.quadraticCurveTo(x, y, (x + nextX) / 2, (y + nextY) / 2);
  }
  context.lineTo(lastX + 0.01, lastY); // a dot, too, because a line without a length has no ink
}
