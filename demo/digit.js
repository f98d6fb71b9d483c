// A picture of one digit, made like the images of MNIST. These are the steps and constants of
// `prepare_digit` in tritoncaps/data/handwriting.py, and a test compares the results.

const SIDE = 28;
const BOX = 20;
const MIDDLE = 14;
// The least difference between ink and paper, of 255.
const CONTRAST = 16;

/**
 * Turn grey pixels in 0 .. 255 into 28×28 values in [0, 1].
 *
 * Returns the values as `image`, and where they come from: the `box` around the ink, the `size` that
 * it was scaled to, and the `place` of its corner in the image, all as {x, y} or {x, y, width,
 * height}. Returns null for a blank picture.
 */
export function prepareDigit(pixels, width, height) {
  const ink = inkOf(pixels, width, height);
  if (!ink) return null;
  const box = boxOf(ink, width, height);
  const scale = BOX / Math.max(box.width, box.height);
  const size = {
    x: Math.max(1, roundHalfEven(box.width * scale)),
    y: Math.max(1, roundHalfEven(box.height * scale)),
  };
  const small = resize(crop(ink, width, box), box, size);

  // A thin stroke of a large picture has faded.
  const white = quantile(small.filter((value) => value > 0), 0.9);
  for (let k = 0; k < small.length; k++) small[k] = Math.min(small[k] / white, 1);

  const centre = centreOfMass(small, size.x);
  const corner = (middle, side) =>
    Math.min(Math.max(roundHalfEven(MIDDLE - middle), 0), SIDE - side);
  const place = { x: corner(centre.x, size.x), y: corner(centre.y, size.y) };
  const image = new Float32Array(SIDE * SIDE);
  for (let y = 0; y < size.y; y++) {
    const row = small.subarray(y * size.x, (y + 1) * size.x);
    image.set(row, (place.y + y) * SIDE + place.x);
  }
  return { image, box, size, place };
}

/** How far each pixel differs from the background, which is the median of the edge. */
function inkOf(pixels, width, height) {
  const border = Math.max(1, Math.floor(Math.min(width, height) / 20));
  const edge = [];
  let least = Infinity;
  let greatest = -Infinity;
  for (let y = 0; y < height; y++) {
    const isRowInside = y >= border && y < height - border;
    for (let x = 0; x < width; x++) {
      const value = pixels[y * width + x];
      if (value < least) least = value;
      if (value > greatest) greatest = value;
      if (!(isRowInside && x >= border && x < width - border)) edge.push(value);
    }
  }
  const sortedEdge = Float32Array.from(edge).sort();
  const background = sortedEdge[(edge.length - 1) >> 1];
  const sign = background - least > greatest - background ? 1 : -1;
  const inkAt = (value) => Math.max(sign * (background - value), 0);
  const most = sign > 0 ? background - least : greatest - background;
  if (most < CONTRAST) return null;

  // 98 of 100, because a stroke may touch the edge.
  const edgeInk = Float32Array.from(edge, inkAt).sort();
  const noise = edgeInk[Math.max(1, roundHalfEven(0.98 * edge.length)) - 1];
  const floor = noise > 0 ? Math.min(Math.max(1.5 * noise, most / 3), most / 2) : 0;
  const ink = new Float32Array(pixels.length);
  for (let k = 0; k < ink.length; k++) {
    const value = inkAt(pixels[k]);
    if (value > floor) ink[k] = value;
  }
  return ink;
}

function boxOf(ink, width, height) {
  let [left, top, right, bottom] = [width, height, -1, -1];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (ink[y * width + x] > 0) {
        if (x < left) left = x;
        if (x > right) right = x;
        if (y < top) top = y;
        bottom = y;
      }
    }
  }
  return { x: left, y: top, width: right - left + 1, height: bottom - top + 1 };
}

function crop(values, width, box) {
  const part = new Float32Array(box.width * box.height);
  for (let y = 0; y < box.height; y++) {
    const start = (box.y + y) * width + box.x;
    part.set(values.subarray(start, start + box.width), y * box.width);
  }
  return part;
}

/** Scale with a triangle as wide as an output pixel, first the rows and then the columns. */
function resize(values, { width, height }, size) {
  const across = triangles(width, size.x);
  const rows = new Float32Array(height * size.x);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < size.x; x++) {
      const { first, weights } = across[x];
      const start = y * width + first;
      let sum = 0;
      for (let k = 0; k < weights.length; k++) sum += weights[k] * values[start + k];
      rows[y * size.x + x] = sum;
    }
  }
  const result = new Float32Array(size.y * size.x);
  triangles(height, size.y).forEach(({ first, weights }, y) => {
    for (let x = 0; x < size.x; x++) {
      let sum = 0;
      weights.forEach((weight, k) => (sum += weight * rows[(first + k) * size.x + x]));
      result[y * size.x + x] = sum;
    }
  });
  return result;
}

/** The input pixels of each output pixel, and their weights, which add up to 1. */
function triangles(inputs, outputs) {
  const scale = inputs / outputs;
  const reach = Math.max(scale, 1);
  return Array.from({ length: outputs }, (_, k) => {
    const centre = scale * (k + 0.5);
    const first = Math.max(Math.floor(centre - reach + 0.5), 0);
    const end = Math.min(Math.floor(centre + reach + 0.5), inputs);
    const weights = Array.from({ length: end - first }, (_, offset) =>
      Math.max(0, 1 - Math.abs(first + offset + 0.5 - centre) / reach),
    );
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
}

function quantile(values, share) {
  const sorted = Float32Array.from(values).sort();
  const position = share * (sorted.length - 1);
  const below = Math.floor(position);
  const above = Math.min(below + 1, sorted.length - 1);
  return sorted[below] + (position - below) * (sorted[above] - sorted[below]);
}

function centreOfMass(values, width) {
  let [mass, x, y] = [0, 0, 0];
  values.forEach((value, k) => {
    mass += value;
    x += value * (k % width);
    y += value * Math.floor(k / width);
  });
  return { x: x / mass, y: y / mass };
}

/** Round as Python does: a half goes to the even neighbour. */
function roundHalfEven(value) {
  const below = Math.floor(value);
  const rest = value - below;
  if (rest !== 0.5) return Math.round(value);
  return below % 2 === 0 ? below : below + 1;
}
