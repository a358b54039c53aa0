// The page: a form for a model, and a tile per image.
import { counted } from "./model.js";
import { Service } from "./service.js";

const byId = (id) => document.getElementById(id);
const [form, keyForm, gallery, notices, progress, stepsDialog] =
  ["form", "key-form", "gallery", "notices", "progress", "steps-dialog"].map(byId);
const fields = form.elements;
const query = new URLSearchParams(location.search);

let model = null;
let task = new AbortController(); // of what runs
let remembering = 0; // timer

// Model

// load(signal): a promise of the model.
async function open(name, load) {
  const signal = begin();
  clearTimeout(remembering);
  model?.close();
  model = null;
  form.hidden = keyForm.hidden = byId("hint").hidden = true;
  gallery.replaceChildren();
  byId("facts").textContent = "";
  say(`Loading ${name} ...`);
  try {
    const opened = await load(signal);
    if (signal.aborted) return opened.close();
    model = opened;
    byId("facts").textContent = model.summary;
  } catch (error) {
    if (!signal.aborted) fail(name, error);
    return;
  }
  fill();
  remember();
  make();
}

async function openFile(name, read) {
  await open(name, async () => {
    const { Sampler } = await import("./sampler.js").catch(() => {
      throw new Error("the page lacks its packages; run npm ci in its folder");
    });
    return Sampler.open(await read());
  });
}

async function download(url) {
  const response = await fetch(url, { cache: "no-cache" }).catch(() => null); // no-cache: revalidate with the server
  if (!response) throw new Error("cannot be downloaded; check the connection and the address");
  if (!response.ok) throw new Error(`not found (${response.status}); copy it next to this page, or choose a file`);
  return new Uint8Array(await response.arrayBuffer());
}

// Opens the model of the service that the address names, or its first.
async function openServed(service) {
  await open(service.address, async (signal) => {
    const models = await service.models(signal);
    const asked = query.get("model");
    const names = ({ name, version, alias, label }) => [label, name, `${name}@${alias}`, `${name}/${version}`];
    const found = models.find((each) => names(each).includes(asked));
    const used = found ?? models[0];
    if (asked !== null && !found) note("model", asked, `the service has no such model; using ${used.label}`);
    if (models.length > 1) query.set("model", used.label);
    else query.delete("model");
    const choice = byId("models");
    const options = models.map(({ label, version }) => new Option(`${label} (version ${version})`, label));
    choice.replaceChildren(...options);
    choice.value = used.label;
    choice.parentElement.hidden = models.length === 1;
    return service.open(used, signal);
  });
}

// Form

function fill() {
  const { steps, guidance, classes, guided, maxCount } = model;
  fields.count.max = maxCount;
  fields.count.value = Math.min(fields.count.value, maxCount);
  fields.steps.value = steps;
  fields.guidance.value = guidance;
  const names = classes.map((name, number) => new Option(name, number));
  fields.class.replaceChildren(new Option("all in turn", "turn"), new Option("none (unconditional)", -1), ...names);
  for (const [field, used] of [[fields.class, classes.length], [fields.guidance, guided]]) {
    field.disabled = field.parentElement.hidden = !used;
  }
  for (const field of fields) if (field.name && query.has(field.name)) take(field, query.get(field.name));
  form.hidden = false;
  const others = model.otherSteps(steps);
  const range = model.live ? `${others[0]} to ${others.at(-1)}` : "fewer";
  byId("hint").hidden = !others.length;
  byId("hint").textContent = `Click an image to see it with ${range} steps.`;
}

// Puts a value of the address into a field; says so if it is impossible, and keeps the usual one.
function take(field, given) {
  const usual = field.value;
  field.value = given;
  if (field.options && !field.value) field.value = [...field.options].find(({ text }) => text === given)?.value ?? "";
  checkSteps();
  if (!field.disabled && field.validity.valid) return;
  field.value = usual;
  checkSteps();
  const number = field.step === "any" ? "number" : "whole number";
  const range = `must be a ${number} from ${field.min} to ${field.max || model.maxFreeSteps}`;
  const problem = field.options ? "the model has no such class" : range;
  const shown = field.options ? field.selectedOptions[0].text : usual;
  note(field.name, given, field.disabled ? "the model has none; ignored" : `${problem}; using ${shown}`);
}

function checkSteps() {
  const allowed = model.allows(Number(fields.steps.value));
  fields.steps.setCustomValidity(allowed ? "" : `Must be 1 to ${model.maxFreeSteps}, or ${model.steps}`);
}

// Stores the form in the page's address, so that a link shows the same images.
function remember() {
  for (const { name, value, disabled } of fields) {
    if (disabled) query.delete(name);
    else if (name) query.set(name, value);
  }
  history.replaceState(null, "", `?${query}`);
}

function chosen() {
  const numbers = ["seed", "count", "steps", "guidance"].map((name) => Number(fields[name].value));
  const [seed, count, steps, guidance] = numbers;
  return { seed, count, steps, guidance, choice: fields.class.value };
}

// Images

// Makes the images of the form. With `update`, those shown stay until their successors are ready.
async function make(update = false) {
  const signal = begin();
  const options = chosen();
  const { seed, count, steps, choice, guidance } = options;
  const tiles = Array.from({ length: count }, (_, number) => {
    const y = model.y(choice, number);
    const name = `Image ${number + 1}${model.classes[y] ? `, ${model.classes[y]}` : ""}`;
    const compared = model.otherSteps(steps);
    const tile = document.createElement(compared.length ? "button" : "div");
    if (compared.length) tile.onclick = () => showOtherSteps(compared, seed, number, { y, guidance });
    return { tile, canvas: canvas(tile, name, model.preview(seed, number)) };
  });
  const kept = update ? [...gallery.children].slice(0, count) : [];
  gallery.replaceChildren(...kept, ...tiles.slice(kept.length).map(({ tile }) => tile));
  byId("stop").disabled = false;
  if (!update) say("Waiting for the first image ...");
  progress.hidden = false;
  progress.removeAttribute("value");
  try {
    for await (const { images, made, progress: [done, all], line } of model.generate(options, signal)) {
      if (signal.aborted) return;
      for (const [number, image] of images) {
        show(tiles[number].canvas, image, made);
        if (made) kept[number]?.replaceWith(tiles[number].tile);
      }
      Object.assign(progress, { value: done, max: all });
      if (!update || done === all) say(line);
    }
  } catch (error) {
    if (!signal.aborted) fail("", error);
  }
  if (!signal.aborted) begin();
}

// Ends what runs; returns the signal of what comes next.
function begin() {
  task.abort();
  byId("stop").disabled = progress.hidden = true;
  task = new AbortController();
  return task.signal;
}

// Shows the same noise with several numbers of steps.
async function showOtherSteps(counts, seed, number, options) {
  const figures = counts.map((steps) => {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = counted(steps, "step", "steps");
    const image = canvas(figure, caption.textContent, model.preview(seed, number));
    figure.append(caption);
    return { figure, image, steps };
  });
  stepsDialog.querySelector(".tiles").replaceChildren(...figures.map(({ figure }) => figure));
  stepsDialog.showModal();
  try {
    for (const { image, steps } of figures) {
      const made = await model.image(seed, number, { ...options, steps });
      if (!stepsDialog.open || !image.isConnected) return;
      show(image, made, true);
    }
  } catch (error) {
    fail("", error);
  }
}

// Adds a canvas to `parent`, with an image of the model if there is one yet.
function canvas(parent, name, image) {
  const { height, width } = model;
  const added = Object.assign(document.createElement("canvas"), { height, width, role: "img", title: name });
  added.style.width = `${width * Math.max(1, Math.round(80 / width))}px`; // an integer scale keeps pixels square
  added.dataset.made = false;
  if (image) show(added, image, false);
  parent.append(added);
  return added;
}

function show(canvas, image, made) {
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.dataset.made = made;
}

// Lines

function say(line) {
  byId("status").textContent = line;
}

// Shows why something failed.
function fail(name, error) {
  begin();
  say(name ? `${name}: ${error.message}` : error.message);
  keyForm.hidden = error.status !== 401;
  if (error.status === 401) keyForm.elements.key.focus();
}

// Says what is wrong with a parameter of the address, and what is done instead.
function note(name, given, line) {
  const item = document.createElement("li");
  item.textContent = `${name}=${given.slice(0, 40)}: ${line}`;
  notices.append(item);
}

// The service to use, or null if the model runs in this browser. A page of a service uses that one.
function service() {
  const own = document.querySelector("meta[name=service]").content;
  const given = query.get("service");
  if (own) {
    query.delete("service");
    if (given !== null) note("service", given, "this page shows the models of its own service; ignored");
    return new Service(new URL(own, location.href));
  }
  if (given === null) return null;
  if (URL.canParse(given)) {
    const { protocol, origin, pathname, username } = new URL(given);
    if (/^https?:$/.test(protocol) && !username) return new Service(new URL(origin + pathname.replace(/\/*$/, "/")));
  }
  query.delete("service");
  note("service", given, "must be http://HOST:PORT; running a model in this browser instead");
  return null;
}

fields.steps.oninput = checkSteps;
form.onsubmit = (event) => {
  event.preventDefault();
  notices.replaceChildren();
  remember();
  make();
};
form.oninput = () => {
  if (!model.live || !form.checkValidity()) return;
  make(true);
  clearTimeout(remembering); // browsers limit how often the address may change
  remembering = setTimeout(remember, 300);
};
byId("stop").onclick = () => {
  begin();
  say(`${byId("status").textContent} (stopped)`);
  byId("make").focus();
};

function forgetModel() {
  for (const name of ["model", "steps", "class", "guidance"]) query.delete(name); // they belong to the previous model
  notices.replaceChildren();
}

const served = service();
if (served) {
  byId("models").onchange = ({ target }) => {
    forgetModel();
    query.set("model", target.value);
    openServed(served);
  };
  keyForm.onsubmit = (event) => {
    event.preventDefault();
    served.key = keyForm.elements.key.value;
    keyForm.reset();
    openServed(served);
  };
  openServed(served);
} else {
  byId("file").parentElement.hidden = false;
  byId("file").onchange = ({ target }) => {
    const [file] = target.files;
    if (!file) return;
    forgetModel();
    openFile(file.name, async () => new Uint8Array(await file.arrayBuffer()));
  };
  const given = query.get("model");
  if (given === "") note("model", given, "must be the address of a sampler.onnx; using sampler.onnx");
  const url = given || "sampler.onnx";
  openFile(url, () => download(url));
}
