// Models of an HTTP service (../service/README.md), whose images are shown as they form.
import { Model, counted, duration } from "./model.js";

const MAX_LINE = 300; // characters of an error that a service, or a proxy before it, sends

// An error that the service answered.
export class Refused extends Error {
  constructor(line, status) {
    super(line);
    this.status = status;
  }
}

export class Service {
  #address;

  // address: a URL object that ends in a slash.
  constructor(address) {
    this.#address = address;
  }

  get address() {
    return this.#address.href.replace(/\/$/, "");
  }

  // The key that requests carry; kept until the tab is closed, and only for this service.
  set key(key) {
    sessionStorage.setItem(`key of ${this.address}`, key);
  }

  // The models that it has: { name, version, alias, label }, the default one first. `label` tells them apart, and is
  // what requests call them; a single one needs no name.
  async models(signal) {
    const models = await this.#read("v2/models", signal);
    return models.map((model) => {
      const single = models.filter(({ name }) => name === model.name).length === 1;
      const label = model.name + (single ? "" : model.alias ? `@${model.alias}` : `/${model.version}`);
      return { ...model, label, named: models.length > 1 };
    });
  }

  // One of these.
  async open(model, signal) {
    const version = model.label === model.name ? "" : `/versions/${encodeURIComponent(model.alias ?? model.version)}`;
    return new Served(this, model, await this.#read(`v2/models/${encodeURIComponent(model.name)}${version}`, signal));
  }

  async #read(path, signal) {
    const response = await this.ask(path, {}, signal);
    return response.json().catch(() => {
      throw new Error(`${path} is not JSON; is this the address of the service?`);
    });
  }

  // The response to GET `path`; throws Refused, or an Error if there is none.
  async ask(path, parameters, signal) {
    const url = new URL(path, this.#address);
    url.search = new URLSearchParams(parameters);
    const key = sessionStorage.getItem(`key of ${this.address}`);
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const response = await fetch(url, { headers, signal, credentials: "omit" }).catch(() => null);
    if (!response) throw new Error("the service does not answer; check that it runs, and allows this page by --cors");
    if (response.ok) return response;
    const { error } = await response.json().catch(() => ({}));
    let line = typeof error === "string" ? error.slice(0, MAX_LINE) : `${response.status} ${response.statusText}`;
    const seconds = response.headers.get("Retry-After");
    if (/^\d+$/.test(seconds) && !line.includes(`${seconds} s`)) line += `; try again in ${seconds} s`;
    throw new Refused(line, response.status);
  }
}

class Served extends Model {
  #service;
  #asked;

  // model: one of Service.models. metadata: of the Open Inference Protocol, with `parameters`.
  constructor(service, { label, named, version }, { inputs, outputs, parameters }) {
    if (!parameters?.classes) throw new Error(`the metadata of ${label} lacks \`parameters\`; update the service`);
    const [, height, width, channels] = outputs.find(({ name }) => name === "images").shape;
    const has = (input) => inputs.some(({ name }) => name === input);
    const { classes, steps, guidance, max_steps: maxFreeSteps, max_images: maxCount } = parameters;
    const [guided, stochastic] = ["guidance", "steps_noise"].map(has);
    super({ channels, height, width, classes, guided, stochastic, steps, guidance, maxFreeSteps });
    this.#service = service;
    this.#asked = named ? { model: label } : {};
    this.maxCount = Math.min(this.maxCount, maxCount);
    this.name = `${label}, version ${version}`;
  }

  details() {
    return [counted(this.steps, "step", "steps"), this.name];
  }

  async *generate({ seed, count, steps, choice, guidance }, signal) {
    const asked = { ...this.#asked, n: count, seed, steps, scale: 1 };
    if (this.classes.length && choice !== "-1") asked.class = this.classes[choice] ?? choice; // a name, or "turn"
    if (this.guided) asked.guidance = guidance;
    const start = performance.now();
    const response = await this.#service.ask("images/stream", asked, signal);
    let step = 0;
    try {
      for await (const { event, data } of events(response)) {
        if (event === "error") throw new Refused(data.error.slice(0, MAX_LINE), 200);
        const made = event === "done";
        step = data.step;
        let line = `Step ${step} of ${data.steps}`;
        if (made) line += `, ${counted(count, "image", "images")} in ${duration(performance.now() - start)}`;
        const images = await cells(data.image, count, this.width, this.height);
        yield { images, made, progress: [step, data.steps], line };
        if (made) return;
      }
    } catch (error) {
      if (error instanceof Refused || signal.aborted) throw error;
    }
    throw new Error(`the service went away after step ${step} of ${steps}; generate again`);
  }
}

// The server-sent events { event, data } of a response, with JSON as data.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
    const blocks = (text + value).split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      const pairs = block.split(/\r?\n/).map((line) => line.split(/: ?(.*)/s));
      const { event, data } = Object.fromEntries(pairs);
      if (data) yield { event, data: JSON.parse(data) }; // else a comment, which keeps the connection open
    }
  }
}

// The images of a grid, cells separated by lines of one pixel: [[number, ImageData], ...].
async function cells(png, count, width, height) {
  const blob = new Blob([Uint8Array.from(atob(png), (character) => character.charCodeAt(0))]);
  const grid = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const context = new OffscreenCanvas(grid.width, grid.height).getContext("2d", { willReadFrequently: true });
  context.drawImage(grid, 0, 0);
  const columns = Math.ceil(Math.sqrt(count));
  return Array.from({ length: count }, (_, number) => {
    const [left, top] = [(number % columns) * (width + 1) + 1, Math.floor(number / columns) * (height + 1) + 1];
    return [number, context.getImageData(left, top, width, height)];
  });
}
