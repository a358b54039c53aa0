// A sampler.onnx that runs in this browser. ../ONNX.md explains inputs and metadata.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { PbfReader } from "./node_modules/pbf/index.js";
import { Model, counted, duration } from "./model.js";
import { normal } from "./noise.js";

// ONNX Runtime starts its own worker, which keeps the page responsive.
ort.env.wasm.proxy = true;

const VERSION = "2"; // version of the metadata keys
const MAX_FREE_STEPS = 50; // default for files without ddpm.max_free_steps
const FEW_STEPS = 4; // of models that are fast enough to follow the form

export class Sampler extends Model {
  #session;
  #last = Promise.resolve();

  // bytes: the file as a Uint8Array. Throws an Error whose message says in one line what is wrong.
  static async open(bytes) {
    const facts = metadata(bytes);
    if (!("ddpm.version" in facts)) throw new Error("not written by ddpm export: it has no ddpm metadata");
    if (facts["ddpm.version"] !== VERSION) throw new Error(`metadata version ${facts["ddpm.version"]}, but this page supports ${VERSION}; export it again`);
    if (!("ddpm.sampler" in facts)) throw new Error("this is the denoiser; choose sampler.onnx, which generates images");
    try {
      return new Sampler(facts, await ort.InferenceSession.create(bytes));
    } catch (error) {
      throw new Error(`cannot be loaded: ${error.message}`);
    }
  }

  constructor(given, session) {
    const facts = Object.fromEntries(Object.entries(given).map(([key, value]) => [key.replace("ddpm.", ""), value]));
    const number = (key) => Number(facts[key]);
    super({
      channels: number("channels"),
      height: number("height"),
      width: number("width"),
      classes: JSON.parse(facts.classes),
      guided: session.inputNames.includes("guidance"),
      stochastic: facts.stochastic === "true",
      steps: number("steps"),
      guidance: number("guidance"),
      maxFreeSteps: Math.min(Number(facts.max_free_steps ?? MAX_FREE_STEPS), number("num_timesteps")),
    });
    this.#session = session;
    this.facts = facts;
    this.size = this.channels * this.height * this.width;
    this.live = this.steps <= FEW_STEPS;
  }

  details() {
    const { facts, steps } = this;
    const heldout = JSON.parse(facts.heldout);
    const score = (key, text) => (typeof heldout[key] === "number" ? `${heldout[key].toPrecision(3)} ${text}` : "");
    return [
      `${facts.sampler}, ${counted(steps, "step", "steps")}`,
      score("mse", "noise MSE on test pairs"),
      score("bits_per_dim", "bits/dim"),
      `weights ${facts.weights_sha256.slice(0, 12)}`,
    ];
  }

  // The initial noise.
  preview(seed, number) {
    const noise = normal(seed, number, 0, this.size);
    return this.#pixels((pixel, channel) => (noise[(channel * this.size) / this.channels + pixel] + 1) * 127.5);
  }

  // The same noise with other numbers of steps; only of deterministic samplers.
  otherSteps(steps) {
    if (this.stochastic) return [];
    const few = Array.from({ length: FEW_STEPS }, (_, place) => place + 1);
    const fewer = [1, 2, 3, 5, 10, 20, 50].filter((count) => count < steps);
    const others = (this.live ? few : fewer).filter((count) => count !== steps && count <= this.maxFreeSteps);
    return [...others, steps].sort((a, b) => a - b);
  }

  async *generate({ seed, count, steps, choice, guidance }, signal) {
    const start = performance.now();
    for (let number = 0; number < count; number++) {
      await this.#last; // of the tasks that wait here, only the last goes on
      if (signal.aborted) return;
      const image = await this.image(seed, number, { steps, y: this.y(choice, number), guidance });
      const [made, each] = [number + 1, (performance.now() - start) / (number + 1)];
      const line = `${made} of ${count}, ${duration(each)} per image`;
      yield { images: [[number, image]], made: true, progress: [made, count], line };
    }
  }

  // Image `number` of a seed, as ImageData. y: class index, or -1 for none.
  async image(seed, number, { steps, y, guidance }) {
    const shape = [1, this.channels, this.height, this.width];
    const inputs = { noise: new ort.Tensor("float32", normal(seed, number, 0, this.size), shape) };
    if (this.stochastic) {
      const values = new Float32Array(steps * this.size);
      for (let step = 0; step < steps; step++) values.set(normal(seed, number, step + 1, this.size), step * this.size);
      inputs.steps_noise = new ort.Tensor("float32", values, [steps, ...shape]);
    } else {
      inputs.steps = new ort.Tensor("int64", [BigInt(steps)], [1]);
    }
    if (this.classes.length) inputs.y = new ort.Tensor("int64", [BigInt(y)], [1]);
    if (this.guided) inputs.guidance = new ort.Tensor("float32", [guidance], [1]);
    try {
      const { images } = await this.#enqueue(() => this.#session.run(inputs, ["images"]));
      return this.#pixels((pixel, channel) => images.data[pixel * this.channels + channel]);
    } catch (error) {
      throw new Error(`the model failed: ${error.message.split("\n")[0]}`);
    }
  }

  close() {
    return this.#enqueue(() => this.#session.release());
  }

  // A session supports only one run at a time.
  #enqueue(work) {
    const done = this.#last.then(work);
    this.#last = done.catch(() => {});
    return done;
  }

  // value(pixel, channel): channel is 0, 1 or 2 for R, G, B.
  // Of one or two channels, the first is shown as grey; of five or more, the first three as RGB.
  #pixels(value) {
    const image = new ImageData(this.width, this.height);
    const shown = (channel) => (this.channels < 3 ? 0 : channel);
    image.data.forEach((_, place, rgba) => {
      const channel = place % 4;
      rgba[place] = channel === 3 && this.channels !== 4 ? 255 : value(place >> 2, shown(channel));
    });
    return image;
  }
}

// metadata_props of an ONNX file, which onnxruntime-web does not expose; field numbers from onnx.proto.
function metadata(bytes) {
  const [GRAPH, METADATA_PROPS, KEY, VALUE] = [7, 14, 1, 2];
  const facts = {};
  let graph = false;
  const reader = new PbfReader(bytes);
  const text = (field, entry) => {
    if (field === KEY || field === VALUE) entry[field] = reader.readString();
  };
  try {
    reader.readFields((field) => {
      if (field === GRAPH) graph = true;
      if (field !== METADATA_PROPS) return;
      const entry = reader.readMessage(text, {});
      facts[entry[KEY]] = entry[VALUE] ?? "";
    });
  } catch {
    graph = false;
  }
  if (!graph || reader.pos !== bytes.length) throw new Error("not an ONNX file, or incomplete");
  return facts;
}
