// Pictures from sampler.onnx with onnxruntime-node alone: node sample.mjs sampler.onnx pictures.bin
import { writeFileSync } from "node:fs";
import * as ort from "onnxruntime-node";

const sampler = await ort.InferenceSession.create(process.argv[2]);
const shape = [16, ...sampler.inputMetadata[0].shape.slice(1)]; // (16, C, H, W)
const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
const noise = Float32Array.from({ length: shape.reduce((a, b) => a * b) }, normal);
const steps = new ort.Tensor("int64", [0n], [1]); // 0: as many as were exported
const { images } = await sampler.run({ noise: new ort.Tensor("float32", noise, shape), steps }, ["images"]);
writeFileSync(process.argv[3], images.data); // uint8 (16, H, W, C)
console.log(images.dims);
