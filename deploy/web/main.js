// The page: a form built from the model's metadata, and a tile per image that starts as noise.
import { FEW_STEPS, Sampler } from "./sampler.js";

const byId = (id) => document.getElementById(id);
const [form, gallery, stepsDialog] = ["form", "gallery", "steps-dialog"].map(byId);
const fields = form.elements;
const query = new URLSearchParams(location.search);

let sampler = null;
let currentTask = 0; // work that belongs to an earlier task stops
let remembering = 0; // timer

// Model

async function open(name, read) {
  const task = stop();
  clearTimeout(remembering);
  sampler?.close();
  sampler = null;
  form.hidden = byId("hint").hidden = true;
  gallery.replaceChildren();
  byId("facts").textContent = "";
  say(`Loading ${name} ...`);
  try {
    const opened = await Sampler.open(await read());
    if (task !== currentTask) return opened.close();
    sampler = opened;
  } catch (error) {
    if (task === currentTask) say(`${name}: ${error.message}`);
    return;
  }
  describe();
  fill();
  form.requestSubmit();
}

async function download(url) {
  const response = await fetch(url, { cache: "no-cache" }).catch(() => null); // no-cache: revalidate with the server
  if (!response) throw new Error("cannot be downloaded; check the connection and the address");
  if (!response.ok) throw new Error(`not found (${response.status}); copy it next to this page, or choose a file`);
  return new Uint8Array(await response.arrayBuffer());
}

function counted(count, singular, plural) {
  return `${count} ${Number(count) === 1 ? singular : plural}`;
}

function describe() {
  const { channels, height, width, classes, facts } = sampler;
  const heldout = JSON.parse(facts.heldout);
  const score = (key, text) => (typeof heldout[key] === "number" ? `${heldout[key].toPrecision(3)} ${text}` : "");
  byId("facts").textContent = [
    `${height} × ${width}, ${{ 1: "grey", 3: "RGB", 4: "RGBA" }[channels] ?? `${channels} channels`}`,
    classes.length ? counted(classes.length, "class", "classes") : "",
    `${facts.sampler}, ${counted(facts.steps, "step", "steps")}`,
    score("mse", "noise MSE on test pairs"),
    score("bits_per_dim", "bits/dim"),
    `weights ${facts.weights_sha256.slice(0, 12)}`,
  ]
    .filter(Boolean)
    .join(" · ");
}

// Form

function fill() {
  const { steps, guidance, classes, guided, live, stochastic } = sampler;
  fields.steps.value = steps;
  fields.guidance.value = guidance;
  const names = classes.map((name, number) => new Option(name, number));
  fields.class.replaceChildren(new Option("all in turn", "turn"), new Option("none (unconditional)", -1), ...names);
  fields.class.disabled = fields.class.parentElement.hidden = !classes.length;
  fields.guidance.disabled = fields.guidance.parentElement.hidden = !guided;
  for (const field of fields) if (query.has(field.name)) field.value = query.get(field.name);
  checkSteps();
  form.hidden = false;
  byId("hint").hidden = stochastic;
  byId("hint").textContent = `Click an image to see it with ${live ? `1 to ${FEW_STEPS}` : "fewer"} steps.`;
}

function checkSteps() {
  const { steps, maxFreeSteps } = sampler;
  const asked = Number(fields.steps.value);
  fields.steps.setCustomValidity(asked <= maxFreeSteps || asked === steps ? "" : `Must be 1 to ${maxFreeSteps}, or ${steps}`);
}

// Stores the form in the page's address, so that a link shows the same images.
function remember() {
  for (const [name, value] of new FormData(form)) query.set(name, value);
  history.replaceState(null, "", `?${query}`);
}

function chosen() {
  return {
    seed: Number(fields.seed.value),
    count: Number(fields.count.value),
    steps: Number(fields.steps.value),
    y: (number) => (fields.class.value === "turn" ? number % sampler.classes.length : Number(fields.class.value)),
    guidance: Number(fields.guidance.value),
  };
}

// Images

// Makes the images of the form. With `update`, those shown stay until their successors are ready.
async function make(update = false) {
  const task = stop();
  const { seed, count, steps, y, guidance } = chosen();
  const { classes } = sampler;
  const tiles = Array.from({ length: count }, (_, number) => {
    const options = { steps, y: y(number), guidance };
    const name = `Image ${number + 1}${classes[options.y] ? `, ${classes[options.y]}` : ""}`;
    const tile = document.createElement(sampler.stochastic ? "div" : "button");
    if (!sampler.stochastic) tile.onclick = () => showOtherSteps(seed, number, options);
    return { tile, options, canvas: noisy(tile, name, seed, number) };
  });
  const kept = update ? [...gallery.children].slice(0, count) : [];
  gallery.replaceChildren(...kept, ...tiles.slice(kept.length).map(({ tile }) => tile));
  byId("stop").disabled = false;
  if (!update) say(`0 of ${count}`);
  const start = performance.now();
  for (const [number, { tile, canvas, options }] of tiles.entries()) {
    await sampler.idle(); // of the tasks that wait here, only the last goes on
    if (task !== currentTask) return;
    const image = await attempt(sampler.generate(seed, number, options));
    if (task !== currentTask || !image) return;
    show(canvas, image);
    kept[number]?.replaceWith(tile);
    const each = (performance.now() - start) / (number + 1);
    const time = each < 1000 ? `${Number(each.toPrecision(2))} ms` : `${Number((each / 1000).toPrecision(2))} s`;
    if (!update || number + 1 === count) say(`${number + 1} of ${count}, ${time} per image`);
  }
  stop();
}

function stop() {
  byId("stop").disabled = true;
  return ++currentTask;
}

// Shows the same noise with other numbers of steps; only for deterministic samplers.
async function showOtherSteps(seed, number, options) {
  const few = Array.from({ length: FEW_STEPS }, (_, place) => place + 1);
  const fewer = [1, 2, 3, 5, 10, 20, 50].filter((steps) => steps < options.steps);
  const counts = (sampler.live ? few : fewer).filter((steps) => steps !== options.steps && steps <= sampler.maxFreeSteps);
  const figures = [...counts, options.steps].sort((a, b) => a - b).map((steps) => {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = counted(steps, "step", "steps");
    const canvas = noisy(figure, caption.textContent, seed, number);
    figure.append(caption);
    return { figure, canvas, steps };
  });
  stepsDialog.querySelector(".tiles").replaceChildren(...figures.map(({ figure }) => figure));
  stepsDialog.showModal();
  for (const { canvas, steps } of figures) {
    const image = await attempt(sampler.generate(seed, number, { ...options, steps }));
    if (!stepsDialog.open || !canvas.isConnected || !image) return;
    show(canvas, image);
  }
}

// Adds a canvas to `parent` that shows the noise of an image.
function noisy(parent, name, seed, number) {
  const { height, width, size, channels } = sampler;
  const canvas = Object.assign(document.createElement("canvas"), { height, width, role: "img", title: name });
  const noise = sampler.noise(seed, number);
  draw(canvas, channels, (pixel, channel) => (noise[(channel * size) / channels + pixel] + 1) * 127.5);
  canvas.style.width = `${width * Math.max(1, Math.round(80 / width))}px`; // an integer scale keeps pixels square
  canvas.dataset.made = false;
  parent.append(canvas);
  return canvas;
}

function show(canvas, image) {
  draw(canvas, sampler.channels, (pixel, channel) => image[pixel * sampler.channels + channel]);
  canvas.dataset.made = true;
}

// value(pixel, channel): channel is 0, 1 or 2 for R, G, B.
// Of one or two channels, the first is shown as grey; of five or more, the first three as RGB.
function draw(canvas, channels, value) {
  const image = new ImageData(canvas.width, canvas.height);
  const shown = (channel) => (channels < 3 ? 0 : channel);
  image.data.forEach((_, place, rgba) => {
    const channel = place % 4;
    rgba[place] = channel === 3 && channels !== 4 ? 255 : value(place >> 2, shown(channel));
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// The result of `work`; on failure nothing, with the error shown in the status line.
async function attempt(work) {
  try {
    return await work;
  } catch (error) {
    stop();
    return say(`The model failed: ${error.message.split("\n")[0]}`);
  }
}

function say(line) {
  byId("status").textContent = line;
}

fields.steps.oninput = checkSteps;
form.onsubmit = (event) => {
  event.preventDefault();
  remember();
  make();
};
form.oninput = () => {
  if (!sampler.live || !form.checkValidity()) return;
  make(true);
  clearTimeout(remembering); // browsers limit how often the address may change
  remembering = setTimeout(remember, 300);
};
byId("stop").onclick = () => {
  stop();
  say(`${byId("status").textContent} (stopped)`);
  byId("make").focus();
};
byId("file").onchange = ({ target }) => {
  const [file] = target.files;
  if (!file) return;
  for (const name of ["model", "steps", "class", "guidance"]) query.delete(name); // they belong to the previous model
  open(file.name, async () => new Uint8Array(await file.arrayBuffer()));
};
const url = query.get("model") ?? "sampler.onnx";
open(url, () => download(url));
