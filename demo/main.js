// Connects the drawing, the networks and the panels.

import { prepareDigit } from "./digit.js";
import { Drawing } from "./drawing.js";
import { EXAMPLES, thumbnail } from "./examples.js";
import { loadNetwork } from "./network.js";
import { Bars, PrimaryCapsules, Sliders } from "./panels.js";
import { addMaps, showImage, showShares } from "./pictures.js";

const CLASSES = 10;
const DIMENSIONS = 16;
const PRIMARY = 16;
// A shorter capsule is shown as a guess.
const SURE = 0.5;

const $ = (id) => document.getElementById(id);
const drawing = new Drawing($("drawing"));
const bars = new Bars($("bars"), CLASSES);
const sliders = new Sliders($("sliders"), DIMENSIONS, () => redraw.request());
const primary = new PrimaryCapsules($("primary"), PRIMARY, showWhere);

let network = null;
let digit = null; // the drawing as the network sees it
let result = null; // what the network read

/** Runs a task again and again while it is requested, one at a time, at most once a frame. */
class Repeated {
  constructor(task) {
    this.task = task;
    this.isRequested = false;
    this.isRunning = false;
  }

  async request() {
    this.isRequested = true;
    if (this.isRunning || !network) return;
    this.isRunning = true;
    try {
      while (this.isRequested) {
        this.isRequested = false;
        await this.task();
        await new Promise(requestAnimationFrame);
      }
    } catch (error) {
      fail(error);
    } finally {
      this.isRunning = false;
    }
  }
}

const read = new Repeated(async () => {
  const { values, side } = drawing.pixels();
  const prepared = drawing.isEmpty ? null : prepareDigit(values, side, side);
  const answer = prepared && (await network.read(prepared.image));
  digit = prepared;
  result = answer;
  showResult();
  await redraw.task();
});

const redraw = new Repeated(async () => {
  const image = result && (await network.draw(sliders.pose, result.digit));
  showImage($("redrawn"), image);
});

function showResult() {
  bars.show(result?.activations, result?.digit);
  sliders.show(result?.pose);
  showImage($("seen"), digit?.image);
  primary.show(result?.shares.map((map) => map.reduce((a, b) => a + b, 0)));
  const isSure = result && result.activations[result.digit] >= SURE;
  $("answer").textContent = result ? result.digit : "";
  $("answer").classList.toggle("is-guess", Boolean(result) && !isSure);
  $("capsule-name").textContent = result ? ` of ${result.digit}` : "";
  $("reset").disabled = !result;
  showWhere();
}

/** Colour what the answer rests on, over the drawing. */
function showWhere() {
  const isShown = result && $("where").checked;
  const total = result && addMaps(result.shares);
  const map = isShown && (primary.chosen === null ? total : result.shares[primary.chosen]);
  const most = total && Math.max(...total.map(Math.abs));
  showShares($("shares"), map, most, digit, $("drawing").width);
}

function showTools() {
  $("undo").disabled = $("clear").disabled = drawing.isEmpty;
  $("hint").hidden = !drawing.isEmpty;
}

/** Say the answer, also to those who do not see it. Not while a stroke is drawn. */
async function say() {
  while (read.isRunning) await new Promise(requestAnimationFrame);
  if (!network || drawing.isOpen) return;
  if (drawing.isEmpty) $("status").textContent = "The drawing is empty.";
  else if (!result) $("status").textContent = "There is too much ink to see a digit. Clear the drawing.";
  else {
    const { activations, digit: answer } = result;
    const isSure = activations[answer] >= SURE;
    const length = activations[answer].toFixed(2);
    $("status").textContent = isSure
      ? `It reads ${answer}. The capsule's length is ${length}.`
      : `It is not sure, and guesses ${answer}. The capsule's length is ${length}.`;
  }
}

function showPen({ detail: pen }) {
  $("pen").hidden = !pen;
  if (!pen) return;
  $("pen").style.left = `${100 * pen.x}%`;
  $("pen").style.top = `${100 * pen.y}%`;
  $("pen").classList.toggle("is-down", pen.isDown);
}

function fail(error) {
  network = null;
  console.error(error);
  $("status").textContent =
    "The networks do not run. Reload the page. If that does not help, build it again with demo/build.py.";
  document.body.dataset.state = "failed";
}

drawing.addEventListener("change", () => {
  showTools();
  if (network && drawing.isOpen) $("status").textContent = "";
  read.request();
});
drawing.addEventListener("rest", say);
drawing.addEventListener("pen", showPen);
$("undo").addEventListener("click", () => drawing.undo());
$("clear").addEventListener("click", () => drawing.clear());
$("where").addEventListener("change", showWhere);
$("reset").addEventListener("click", () => {
  sliders.show(result.pose);
  redraw.request();
});
EXAMPLES.forEach((strokes, number) => {
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("aria-label", `Example: ${number}`);
  button.append(thumbnail(strokes));
  button.addEventListener("click", () => drawing.replace(strokes));
  const item = document.createElement("li");
  item.append(button);
  $("examples").append(item);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    drawing.undo();
  }
});

showTools();
showResult();
document.body.dataset.state = "loading";
$("status").textContent = "Loading the network, 16 MB …";
try {
  network = await loadNetwork();
  document.body.dataset.state = "ready";
  $("status").textContent = "Ready.";
  if (!drawing.isEmpty) {
    await read.request();
    say();
  }
} catch (error) {
  fail(error);
}
