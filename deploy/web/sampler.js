// sampler.onnx: reads its metadata and generates images. ../ONNX.md explains inputs and metadata.
import * as ort from "onnxruntime-web";
import { PbfReader } from "pbf";
import { normal } from "./noise.js";

// ONNX Runtime starts its own worker, which keeps the page responsive.
ort.env.wasm.proxy = true;

const VERSION = "2"; // version of the metadata keys
const MAX_FREE_STEPS = 50; // default for files without ddpm.max_free_steps
export const FEW_STEPS = 4; // of models that are fast enough to follow the form

export class Sampler {
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

  constructor(facts, session) {
    this.#session = session;
    this.facts = Object.fromEntries(Object.entries(facts).map(([key, value]) => [key.replace("ddpm.", ""), value]));
    [this.channels, this.height, this.width] = ["channels", "height", "width"].map((side) => Number(this.facts[side]));
    this.size = this.channels * this.height * this.width;
    this.classes = JSON.parse(this.facts.classes);
    this.stochastic = this.facts.stochastic === "true";
    this.steps = Number(this.facts.steps);
    this.guidance = Number(this.facts.guidance);
    this.guided = session.inputNames.includes("guidance");
    this.live = this.steps <= FEW_STEPS;
    this.maxFreeSteps = Math.min(Number(this.facts.max_free_steps ?? MAX_FREE_STEPS), Number(this.facts.num_timesteps)); // this.steps is always allowed as well
  }

  // The initial noise of image `number` of a seed: float32 (C, H, W).
  noise(seed, number) {
    return normal(seed, number, 0, this.size);
  }

  // Image `number` of a seed: uint8 (H, W, C). y: class index, or -1 for none.
  async generate(seed, number, { steps, y, guidance }) {
    const shape = [1, this.channels, this.height, this.width];
    const inputs = { noise: new ort.Tensor("float32", this.noise(seed, number), shape) };
    if (this.stochastic) {
      const values = new Float32Array(steps * this.size);
      for (let step = 0; step < steps; step++) values.set(normal(seed, number, step + 1, this.size), step * this.size);
      inputs.steps_noise = new ort.Tensor("float32", values, [steps, ...shape]);
    } else {
      inputs.steps = new ort.Tensor("int64", [BigInt(steps)], [1]);
    }
    if (this.classes.length) inputs.y = new ort.Tensor("int64", [BigInt(y)], [1]);
    if (this.guided) inputs.guidance = new ort.Tensor("float32", [guidance], [1]);
    const { images } = await this.#enqueue(() => this.#session.run(inputs, ["images"]));
    return images.data;
  }

  // Resolves when nothing runs.
  idle() {
    return this.#last;
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
