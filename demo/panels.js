// The parts of the page with one element for each number: bars, sliders, primary capsules.

const REACH = 0.7; // of a slider: the answers to MNIST's test images stay within 0.65

/** A bar for each digit, as long as its capsule. */
export class Bars {
  constructor(list, count) {
    this.rows = Array.from({ length: count }, (_, digit) => {
      const row = element("li", { className: "bar" });
      const value = element("span", { className: "value" });
      row.append(element("span", { className: "digit", textContent: digit }), track(), value);
      list.append(row);
      return { row, value };
    });
  }

  show(activations, digit) {
    this.rows.forEach(({ row, value }, k) => {
      const activation = activations?.[k] ?? 0;
      row.style.setProperty("--part", activation);
      row.classList.toggle("is-answer", k === digit);
      value.textContent = activations ? activation.toFixed(2) : "–";
    });
  }
}

/** A slider for each number of a capsule. Calls `onMove` when one is moved. */
export class Sliders {
  constructor(list, count, onMove) {
    this.inputs = Array.from({ length: count }, (_, k) => {
      const input = element("input", { type: "range", min: -REACH, max: REACH, step: 0.01 });
      const value = element("span", { className: "value" });
      value.setAttribute("aria-hidden", "true"); // a slider says its value itself
      input.id = `dimension-${k + 1}`;
      const label = element("label", { htmlFor: input.id, textContent: k + 1 });
      label.prepend(element("span", { className: "unseen", textContent: "Dimension " }));
      const row = element("li", { className: "slider" });
      row.append(label, input, value);
      list.append(row);
      input.addEventListener("input", () => {
        this.describe();
        onMove();
      });
      return input;
    });
  }

  get pose() {
    return Float32Array.from(this.inputs, (input) => Number(input.value));
  }

  show(pose) {
    this.inputs.forEach((input, k) => {
      const number = pose?.[k] ?? 0;
      input.disabled = !pose;
      input.value = number;
      // A mark keeps the place of the number that was read.
      input.parentElement.style.setProperty("--read", (number + REACH) / (2 * REACH));
    });
    this.describe();
  }

  describe() {
    for (const input of this.inputs) {
      const value = input.disabled ? "–" : Number(input.value).toFixed(2);
      input.nextElementSibling.textContent = value;
    }
  }
}

/** A button for each primary capsule, with its share. One or none is chosen. */
export class PrimaryCapsules {
  constructor(list, count, onChoose) {
    this.chosen = null;
    this.onChoose = onChoose;
    this.buttons = Array.from({ length: count }, (_, k) => {
      const button = element("button", { type: "button", className: "capsule" });
      button.append(track(), element("span", { textContent: k + 1 }));
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => this.choose(this.chosen === k ? null : k));
      const item = element("li");
      item.append(button);
      list.append(item);
      return button;
    });
  }

  choose(k) {
    this.chosen = k;
    this.buttons.forEach((button, other) => button.setAttribute("aria-pressed", other === k));
    this.onChoose();
  }

  show(totals) {
    const most = totals ? Math.max(...totals.map(Math.abs)) : 1;
    const sum = totals ? totals.reduce((a, b) => a + b, 0) : 1;
    this.buttons.forEach((button, k) => {
      const total = totals?.[k] ?? 0;
      button.disabled = !totals;
      button.style.setProperty("--part", Math.abs(total) / most);
      button.classList.toggle("takes", total < 0);
      const share = `${Math.round((100 * total) / sum)} %`;
      button.title = totals ? `${share} of the answer` : "";
      button.setAttribute("aria-label", `Primary capsule ${k + 1}${totals ? `, ${share}` : ""}`);
    });
  }
}

function track() {
  const rail = element("span", { className: "track" });
  rail.setAttribute("aria-hidden", "true");
  rail.append(element("span", { className: "fill" }));
  return rail;
}

function element(name, properties = {}) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) made[key] = value;
  return made;
}
