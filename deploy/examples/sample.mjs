// Generate 16 images with sampler.onnx and save them as one PNG: node sample.mjs sampler.onnx images.png
//
// Works with every sampler.onnx; ../ONNX.md describes the inputs. Of a model with classes, --class chooses one by its
// name or number, and --guidance how strongly. Needs only onnxruntime-node, pbf to read the metadata, and fast-png to
// write the PNG.
import { readFileSync, writeFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { encode } from "fast-png";
import * as ort from "onnxruntime-node";
import { PbfReader } from "pbf";

async function main() {
  const options = { class: { type: "string" }, guidance: { type: "string" } };
  const { positionals, values } = parseArgs({ options, allowPositionals: true });
  if (positionals.length !== 2) throw new Error("usage: node sample.mjs sampler.onnx images.png");
  const [path, png] = positionals;
  const bytes = readFileSync(path);
  const sampler = await ort.InferenceSession.create(bytes, { logSeverityLevel: 4 }); // errors are thrown
  const given = inputs(sampler, metadata(bytes), values.class, values.guidance);
  const { images } = await sampler.run(given, ["images"]);
  writeFileSync(png, encode(grid(images)));
}

// What the sampler needs for 16 images; which inputs there are depends on the model.
function inputs(sampler, facts, chosen, guidance) {
  const names = sampler.inputNames;
  const image = sampler.inputMetadata[0].shape.slice(1);
  const given = { noise: normal([16, ...image]) };
  if (names.includes("steps")) given.steps = new ort.Tensor("int64", [0n], [1]); // the exported number of steps
  if (names.includes("steps_noise")) given.steps_noise = normal([Number(facts["ddpm.steps"]), 16, ...image]); // stochastic
  if (names.includes("y")) {
    const y = chosen === undefined ? -1 : numberOf(chosen, JSON.parse(facts["ddpm.classes"]));
    given.y = new ort.Tensor("int64", Array(16).fill(BigInt(y)), [16]);
  } else if (chosen !== undefined) throw new Error("--class: the model has no classes");
  if (names.includes("guidance")) {
    given.guidance = new ort.Tensor("float32", [Number(guidance ?? facts["ddpm.guidance"])], [1]);
  } else if (guidance !== undefined) throw new Error("--guidance: the model does not take it");
  return given;
}

function normal(shape) {
  const draw = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
  return new ort.Tensor("float32", Float32Array.from({ length: shape.reduce((a, b) => a * b) }, draw), shape);
}

function numberOf(chosen, classes) {
  if (classes.includes(chosen)) return classes.indexOf(chosen);
  if (Object.keys(classes).includes(chosen)) return Number(chosen);
  throw new Error(`--class: must be one of ${classes.join(", ")}, or a number below ${classes.length} (got ${chosen})`);
}

// The file's metadata, which onnxruntime-node does not expose: entries of a key (1) and a value (2) in field 14.
function metadata(bytes) {
  const entry = (field, pair, pbf) => (pair[field] = pbf.readString());
  const read = (field, facts, pbf) => {
    if (field !== 14) return;
    const { 1: key, 2: value } = pbf.readMessage(entry, {});
    facts[key] = value;
  };
  return new PbfReader(bytes).readFields(read, {});
}

// uint8 (16, H, W, C) as a grid of 4 x 4, with small images enlarged. PNG has grey, RGB and RGBA.
function grid({ data, dims: [, height, width, channels] }) {
  const shown = [1, 3, 4].includes(channels) ? channels : channels > 3 ? 3 : 1;
  const scale = Math.max(1, Math.floor(128 / width));
  const png = { width: 4 * scale * width, height: 4 * scale * height, channels: shown };
  png.data = Uint8Array.from({ length: png.width * png.height * shown }, (_, i) => {
    const x = Math.floor(i / shown / scale) % (4 * width);
    const y = Math.floor(i / shown / png.width / scale);
    const image = 4 * Math.floor(y / height) + Math.floor(x / width);
    return data[((image * height + (y % height)) * width + (x % width)) * channels + (i % shown)];
  });
  return png;
}

await main().catch((error) => {
  console.error(error.message.replaceAll("\n", " "));
  process.exit(1);
});
