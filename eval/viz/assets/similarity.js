// Below the pictures of an image: the photograph, whose patches take the colour of the cosine of
// their features with those of the patch that is clicked. Features come when the panel is opened.
"use strict";
(() => {
  const waiting = [];

  // each file of features calls this once it is loaded; scripts run in the order they are added
  window.comparePatches = (content) => waiting.shift()(content);

  function load(file) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.async = false;
      script.onerror = () => { waiting.splice(waiting.indexOf(resolve), 1); reject(new Error(file)); };
      script.src = file;
      waiting.push(resolve);
      document.head.append(script);
    });
  }

  class Panel {
    constructor(figure) {
      this.file = figure.dataset.features;
      this.image = document.createElement("img");
      this.image.dataset.src = figure.querySelector("a").getAttribute("href");
      this.image.alt = "";
      this.canvas = document.createElement("canvas");
      this.canvas.tabIndex = 0;
      this.canvas.setAttribute("role", "img");
      this.canvas.setAttribute("aria-label", "similarity of patches; arrow keys choose another one");
      this.frame = document.createElement("i");
      const view = document.createElement("div");
      view.className = "similar";
      view.append(this.image, this.canvas, this.frame);
      this.words = document.createElement("p");
      this.words.textContent = "Click a patch, or move over the photograph with the button down.";
      this.element = document.createElement("details");
      const summary = document.createElement("summary");
      summary.textContent = "similarity to a patch that you click";
      this.element.append(summary, this.words, view);
      this.element.panel = this;
      this.element.addEventListener("toggle", () => this.open(), { once: true });
      figure.parentElement.after(this.element);
    }

    async open() {
      this.image.src = this.image.dataset.src;
      try {
        const { sides, rows } = await load(this.file);
        [this.height, this.width, this.axes] = sides;
        this.rows = new Int8Array(Uint8Array.from(atob(rows), (c) => c.charCodeAt(0)).buffer);
      } catch {
        this.words.textContent = `${this.file} is not there: it lies beside this page`;
        return;
      }
      this.canvas.width = this.width;
      this.canvas.height = this.height;
      this.canvas.style.opacity = SIMILAR.strength;
      const follow = (event) => {
        if (event.type === "pointermove" && !event.buttons) return;
        const box = this.canvas.getBoundingClientRect();
        this.choose(
          Math.floor(((event.clientY - box.top) / box.height) * this.height),
          Math.floor(((event.clientX - box.left) / box.width) * this.width),
        );
      };
      this.canvas.addEventListener("pointerdown", follow);
      this.canvas.addEventListener("pointermove", follow);
      this.canvas.addEventListener("keydown", (event) => {
        const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
        if (!(event.key in step)) return;
        event.preventDefault();
        this.choose(this.row + step[event.key][0], this.column + step[event.key][1]);
      });
      this.choose(this.height >> 1, this.width >> 1);
    }

    // cosines with the patch at a row and a column
    similarity(row, column) {
      const { rows, axes } = this, count = this.height * this.width;
      const found = new Float32Array(count), start = (row * this.width + column) * axes;
      for (let i = 0; i < count; i++) {
        let sum = 0;
        for (let k = 0; k < axes; k++) sum += rows[i * axes + k] * rows[start + k];
        found[i] = sum / 16129;
      }
      return found;
    }

    choose(row, column) {
      this.row = Math.min(Math.max(row, 0), this.height - 1);
      this.column = Math.min(Math.max(column, 0), this.width - 1);
      const values = this.similarity(this.row, this.column), sorted = values.slice().sort();
      const low = sorted[0], last = sorted.length - 1;
      const high = sorted[Math.round(last * SIMILAR.brightest)], range = Math.max(high - low, 1e-6);
      const context = this.canvas.getContext("2d");
      const picture = context.createImageData(this.width, this.height);
      values.forEach((value, i) => {
        const place = 3 * Math.round(255 * Math.min(1, Math.max(0, (value - low) / range)));
        for (let k = 0; k < 3; k++) picture.data[4 * i + k] = SIMILAR.colours[place + k];
        picture.data[4 * i + 3] = 255;
      });
      context.putImageData(picture, 0, 0);
      Object.assign(this.frame.style, {
        top: `${(100 * this.row) / this.height}%`, left: `${(100 * this.column) / this.width}%`,
        height: `${100 / this.height}%`, width: `${100 / this.width}%`,
      });
      this.words.textContent =
        `Patch in row ${this.row + 1} of ${this.height}, column ${this.column + 1} of ` +
        `${this.width}; the others have a cosine from ${low.toFixed(2)} on.`;
    }
  }

  document.querySelectorAll("figure[data-features]").forEach((figure) => new Panel(figure));
})();
