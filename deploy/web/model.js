// What the page needs of a model, wherever it runs: in this browser (sampler.js) or in a service (service.js).

export class Model {
  maxCount = 64; // images at once
  live = false; // fast enough to follow the form

  // channels, height, width: of an image. classes: names. guided: has the input guidance.
  // steps, guidance: the defaults. maxFreeSteps: 1 to this many steps are allowed, and `steps`.
  constructor({ channels, height, width, classes, guided, stochastic, steps, guidance, maxFreeSteps }) {
    Object.assign(this, { channels, height, width, classes, guided, stochastic, steps, guidance, maxFreeSteps });
  }

  // Whether a number of steps is allowed.
  allows(steps) {
    return (steps >= 1 && steps <= this.maxFreeSteps) || steps === this.steps;
  }

  // One line about the model.
  get summary() {
    const { channels, height, width, classes } = this;
    const kind = { 1: "grey", 3: "RGB", 4: "RGBA" }[channels] ?? `${channels} channels`;
    const facts = [`${height} × ${width}, ${kind}`, classes.length && counted(classes.length, "class", "classes")];
    return [...facts, ...this.details()].filter(Boolean).join(" · ");
  }

  // Further facts for the summary.
  details() {
    return [];
  }

  // The class of image `number` for a choice of the form: "turn", or an index as text, "-1" for none.
  y(choice, number) {
    return choice === "turn" ? number % this.classes.length : Number(choice);
  }

  // What is shown of an image before it is made: an ImageData, or null.
  preview(seed, number) {
    return null;
  }

  // The numbers of steps in which a click on an image shows it; none if it shows nothing.
  otherSteps(steps) {
    return [];
  }

  // Makes images 0 to count - 1 of a seed. Yields { images: [[number, ImageData], ...], made, progress: [k, n], line };
  // `made` is false for estimates. Throws an Error whose message is one line, also after `signal` has been aborted.
  async *generate({ seed, count, steps, choice, guidance }, signal) {}

  close() {}
}

export function counted(count, singular, plural) {
  return `${count} ${Number(count) === 1 ? singular : plural}`;
}

// A duration in ms as text, with two figures.
export function duration(ms) {
  return ms < 1000 ? `${Number(ms.toPrecision(2))} ms` : `${Number((ms / 1000).toPrecision(2))} s`;
}
