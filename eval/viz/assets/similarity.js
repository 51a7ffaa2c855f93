// The photograph below its pictures: its patches take the colour of the cosine of their features
// with those of the patch that is clicked. Features come when the panel is opened.
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

  async function open(panel) {
    const [words, canvas, frame] = ["p", "canvas", "i"].map((name) => panel.querySelector(name));
    const file = panel.dataset.features;
    const content = await load(file).catch(() => null);
    if (!content) {
      words.textContent = `${file} is not there: it lies beside this page`;
      return;
    }
    const [height, width, axes] = content.sides;
    const rows = new Int8Array(Uint8Array.from(atob(content.rows), (c) => c.charCodeAt(0)).buffer);
    let row = height >> 1, column = width >> 1;
    Object.assign(canvas, { width, height }).style.opacity = SIMILAR.strength;

    // cosines with the patch at a row and a column
    panel.similarity = (row, column) => Float32Array.from({ length: height * width }, (_, i) => {
      const start = (row * width + column) * axes;
      let sum = 0;
      for (let k = 0; k < axes; k++) sum += rows[i * axes + k] * rows[start + k];
      return sum / 16129;
    });

    function choose(newRow, newColumn) {
      row = Math.min(Math.max(newRow, 0), height - 1);
      column = Math.min(Math.max(newColumn, 0), width - 1);
      const values = panel.similarity(row, column), sorted = values.slice().sort();
      const low = sorted[0], high = sorted[Math.round((sorted.length - 1) * SIMILAR.brightest)];
      const context = canvas.getContext("2d"), picture = context.createImageData(width, height);
      values.forEach((value, i) => {
        const share = Math.min(1, Math.max(0, (value - low) / Math.max(high - low, 1e-6)));
        const at = 3 * Math.round(255 * share);
        picture.data.set([...SIMILAR.colours.slice(at, at + 3), 255], 4 * i);
      });
      context.putImageData(picture, 0, 0);
      Object.assign(frame.style, {
        top: `${(100 * row) / height}%`, left: `${(100 * column) / width}%`,
        height: `${100 / height}%`, width: `${100 / width}%`,
      });
      words.textContent =
        `Patch in row ${row + 1} of ${height}, column ${column + 1} of ${width}; the others have a ` +
        `cosine from ${low.toFixed(2)} on.`;
    }

    const follow = (event) => {
      if (event.type === "pointermove" && !event.buttons) return;
      const box = canvas.getBoundingClientRect();
      choose(Math.floor(((event.clientY - box.top) / box.height) * height),
             Math.floor(((event.clientX - box.left) / box.width) * width));
    };
    canvas.addEventListener("pointerdown", follow);
    canvas.addEventListener("pointermove", follow);
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      choose(row + step[0], column + step[1]);
    });
    choose(row, column);
  }

  document.querySelectorAll(".compare").forEach((panel) =>
    panel.addEventListener("toggle", () => open(panel), { once: true }));
})();
