// Generate 16 images with sampler.onnx and save them as one PNG: node sample.mjs sampler.onnx images.png
//
// Needs only onnxruntime-node, and fast-png to write the PNG. For deterministic samplers of models without classes, as
// exported by default; ../ONNX.md describes the inputs of the others.
import { writeFileSync } from "node:fs";
import { encode } from "fast-png";
import * as ort from "onnxruntime-node";

const [model, out] = process.argv.slice(2);
if (!out) {
  console.error("usage: node sample.mjs sampler.onnx images.png");
  process.exit(1);
}
const sampler = await ort.InferenceSession.create(model);
const [channels, height, width] = sampler.inputMetadata[0].shape.slice(1);
const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
const noise = Float32Array.from({ length: 16 * channels * height * width }, normal);
const inputs = {
  noise: new ort.Tensor("float32", noise, [16, channels, height, width]),
  steps: new ort.Tensor("int64", [0n], [1]), // 0: the exported number of steps
};
const { images } = await sampler.run(inputs, ["images"]);

// uint8 (16, H, W, C) to a grid of 4 x 4, with small images enlarged.
const scale = Math.max(1, Math.floor(128 / width));
const grid = { width: 4 * scale * width, height: 4 * scale * height, channels };
grid.data = Uint8Array.from({ length: grid.width * grid.height * channels }, (_, i) => {
  const x = Math.floor(i / channels / scale) % (4 * width);
  const y = Math.floor(i / channels / grid.width / scale);
  const image = 4 * Math.floor(y / height) + Math.floor(x / width);
  return images.data[((image * height + (y % height)) * width + (x % width)) * channels + (i % channels)];
});
writeFileSync(out, encode(grid));
