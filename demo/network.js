// The two networks, run by ONNX Runtime in this page. `demo/build.py` makes their files.

const CLASSES = 10;
const RUNTIME = new URL("runtime/", import.meta.url);
const MODELS = new URL("models/", import.meta.url);

/** Load the runtime and both networks. */
export async function loadNetwork() {
  const ort = await import(new URL("ort.wasm.bundle.min.mjs", RUNTIME));
  // More threads need headers that a plain file server does not send.
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = { wasm: new URL("ort-wasm-simd-threaded.wasm", RUNTIME).href };
  const open = (name) => ort.InferenceSession.create(new URL(name, MODELS).href);
  // One after the other, because the first one starts the runtime.
  const encoder = await open("encoder.onnx");
  const decoder = await open("decoder.onnx");
  return new Network(ort, encoder, decoder);
}

class Network {
  constructor(ort, encoder, decoder) {
    this.ort = ort;
    this.encoder = encoder;
    this.decoder = decoder;
  }

  /**
   * Read 28×28 values.
   *
   * Returns the ten `activations`, the `digit` with the greatest one, its `pose` of 16 numbers, and
   * `shares`: for each of the 16 primary capsules, what 9×9 places add to the answer.
   */
  async read(image) {
    const images = new this.ort.Tensor("float32", image, [1, 1, 28, 28]);
    const result = await this.encoder.run({ images });
    const activations = result.activations.data;
    const digit = activations.indexOf(Math.max(...activations));
    return {
      activations,
      digit,
      pose: row(result.poses, digit),
      shares: Array.from({ length: result.shares.dims[1] }, (_, k) => row(result.shares, k)),
    };
  }

  /** Draw a capsule of a digit: 28×28 values. */
  async draw(pose, digit) {
    const present = new Float32Array(CLASSES);
    present[digit] = 1;
    const result = await this.decoder.run({
      pose: new this.ort.Tensor("float32", pose, [1, pose.length]),
      digit: new this.ort.Tensor("float32", present, [1, CLASSES]),
    });
    return result.image.data;
  }
}

/** Part `k` along the axis after the batch. */
function row({ data, dims }, k) {
  const length = data.length / dims[1];
  return data.slice(k * length, (k + 1) * length);
}
