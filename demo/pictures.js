// Pictures on a canvas: grey images, and what the answer rests on.

const SIDE = 28;
// A place of the 9×9 grid sees 11×11 pixels. Its middle is 5.5 pixels from the edge, and the next
// place is 2 pixels away.
const GRID = 9;
const FIRST = 4.5;
const STRIDE = 2;

/** Show 28×28 values in [0, 1], white on black, or nothing. */
export function showImage(canvas, values) {
  canvas.width = canvas.height = SIDE;
  if (!values) return;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(SIDE, SIDE);
  values.forEach((value, k) => {
    const grey = Math.round(255 * Math.min(Math.max(value, 0), 1));
    pixels.data.set([grey, grey, grey, 255], 4 * k);
  });
  context.putImageData(pixels, 0, 0);
}

/** The sum of 9×9 maps. */
export function addMaps(maps) {
  return maps[0].map((_, k) => maps.reduce((sum, map) => sum + map[k], 0));
}

/**
 * Colour the places that add to the answer, or take from it, over the drawing.
 *
 * `map` has 9×9 values, and `most` gets the full colour. `digit` is what `prepareDigit` returned: it
 * says where each pixel of the image is in the drawing, which has `side`×`side` pixels.
 */
export function showShares(canvas, map, most, digit, side) {
  canvas.width = canvas.height = side;
  if (!map) return;
  const style = getComputedStyle(canvas);
  const adds = channels(style.getPropertyValue("--adds"));
  const takes = channels(style.getPropertyValue("--takes"));

  const grid = new OffscreenCanvas(GRID + 2, GRID + 2); // its edge stays clear, so the colour fades
  const gridContext = grid.getContext("2d");
  const pixels = gridContext.createImageData(GRID, GRID);
  map.forEach((share, k) => {
    const alpha = Math.sqrt(Math.min(Math.abs(share) / most, 1));
    pixels.data.set([...(share > 0 ? adds : takes), Math.round(255 * alpha)], 4 * k);
  });
  gridContext.putImageData(pixels, 1, 1);

  const { box, size, place } = digit;
  const [scaleX, scaleY] = [box.width / size.x, box.height / size.y];
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(
    grid,
    box.x + (FIRST - STRIDE - place.x) * scaleX,
    box.y + (FIRST - STRIDE - place.y) * scaleY,
    STRIDE * (GRID + 2) * scaleX,
    STRIDE * (GRID + 2) * scaleY,
  );
}

function channels(colour) {
  return colour.trim().split(/\s+/).map(Number);
}
