// Maps of images (eval/viz/atlas.py): plotly draws the points, and a canvas above them thumbnails of
// those that have room. A point's number in plotly is its place in `order`.
(() => {
  const SVG = 2000; // images up to which plotly draws SVG, since a page may have few WebGL contexts
  const NEAR = 8; // pixels between neighbours from which thumbnails are shown
  const LISTED = 200; // files shown in the panel
  const KEYS = { // arguments of zoom()
    ArrowLeft: [1, 0.5, 0.5, -0.15, 0], ArrowRight: [1, 0.5, 0.5, 0.15, 0], ArrowUp: [1, 0.5, 0.5, 0, 0.15],
    ArrowDown: [1, 0.5, 0.5, 0, -0.15], "+": [1.5], "=": [1.5], "-": [1 / 1.5],
  };
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const counted = (count) => count.toLocaleString("en");
  const made = (tag, more) => Object.assign(document.createElement(tag), more);

  class Atlas {
    constructor(box) {
      Object.assign(this, JSON.parse(box.querySelector("script").textContent), { box, levels: [], bitmaps: [] });
      // classes; images; images, while something is searched for
      Object.assign(this, { hidden: new Set(), selected: new Set(), found: null });
      for (const name of ["map", "plot", "thumbs", "card", "panel", "shown", "found", "list", "copy"])
        this[`${name}Box`] = box.querySelector(`.atlas-${name}`);
      this.legend = [...box.querySelectorAll(".atlas-legend li button")];
      this.count = this.names.length;
      this.shownNames = this.names.map((name, i) => this.odd[i] ?? name);
      this.kinds = this.names.map((_, i) => this.classNames[this.classes?.[i]] ?? "");
      this.texts = this.names.map((name, i) => `${name}\n${this.kinds[i]}`.toLowerCase());
      const share = (i) => (i * 0.6180339887) % 1; // spread over the list: no class covers the others
      this.order = this.names.map((_, i) => i).sort((a, b) => share(a) - share(b));
      this.start();
      this.listen();
      this.sheets.forEach((uri, number) => this.load(uri, number));
    }

    start() {
      const { width, height } = this.mapBox.getBoundingClientRect(), many = this.count > SVG;
      const size = clamp(0.26 * Math.sqrt((width * height) / (this.count || 1)), 4, 10);
      const canvas = many && made("canvas").getContext("webgl");
      this.note = many && !canvas ? "This browser has no WebGL, so the map moves slowly. " : "";
      const trace = {
        type: canvas ? "scattergl" : "scatter", mode: "markers", hoverinfo: "none",
        marker: { size, opacity: 1, symbol: this.order.map((i) => this.symbols[this.classes?.[i] ?? 0]) },
        unselected: { marker: { opacity: 0.12 } },
      };
      Plotly.newPlot(this.plotBox, [trace], structuredClone(this.layout), {
        scrollZoom: true, displaylogo: false, displayModeBar: true, doubleClick: "reset",
        modeBarButtons: [["pan2d", "select2d", "lasso2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]],
      });
      this.draw();
    }

    /** Images that stand out from the others; null: all. */
    marked() {
      return this.found ?? (this.selected.size ? this.selected : null);
    }

    /** Whether its class is not hidden. */
    shown(i) {
      return !this.hidden.has(this.classes?.[i]);
    }

    colour(i) {
      return this.colours[(this.classes?.[i] ?? 0) % this.colours.length];
    }

    /** Hand the state to plotly, in the colours of the time. */
    draw() {
      const style = getComputedStyle(this.box), of = (name) => style.getPropertyValue(`--atlas-${name}`).trim();
      this.colours = Array.from({ length: 20 }, (_, n) => of(n));
      const marked = this.marked(), shown = this.order.filter((i) => this.shown(i)).length;
      const at = (values) => this.order.map((i) => (this.shown(i) ? values[i] : null));
      Plotly.update(this.plotBox, {
        x: [at(this.x)], y: [at(this.y)], "marker.color": [this.order.map((i) => this.colour(i))],
        "marker.line": { width: 0.5, color: of("paper") },
        selectedpoints: [marked && [...this.order.keys()].filter((n) => marked.has(this.order[n]))],
      }, { selections: [] });
      this.shownBox.textContent = this.note + (shown < this.count ? `${counted(shown)} of ` : "");
    }

    /** The upper left corner in units, the size in pixels, and pixels a unit. */
    view() {
      const { width, height } = this.mapBox.getBoundingClientRect(), { xaxis, yaxis } = this.plotBox._fullLayout;
      const [left, right] = xaxis.range;
      return { left, top: yaxis.range[1], width, height, scale: width / (right - left) };
    }

    /** Where an image is, in pixels of the map. */
    where(i, { left, top, scale } = this.view()) {
      return [(this.x[i] - left) * scale, (top - this.y[i]) * scale];
    }

    /** Images at least 2^(-level / 2) apart, those of the level before among them: thumbnails come
        but never go as one zooms in, and moving changes nothing. */
    level(level) {
      if (this.levels[level]) return this.levels[level];
      const chosen = level ? [...this.level(level - 1)] : [], apart = 2 ** (-level / 2), grid = new Map();
      const cell = (i) => [Math.floor(this.x[i] / apart), Math.floor(this.y[i] / apart)];
      const away = (i, j) => Math.max(Math.abs(this.x[i] - this.x[j]), Math.abs(this.y[i] - this.y[j]));
      const far = (i, j) => j === undefined || away(i, j) >= apart;
      for (const i of chosen) grid.set(String(cell(i)), i);
      for (const i of this.order) {
        const [u, v] = cell(i), near = [-1, 0, 1];
        if (!near.every((du) => near.every((dv) => far(i, grid.get(`${u + du},${v + dv}`))))) continue;
        grid.set(`${u},${v}`, i);
        chosen.push(i);
      }
      return (this.levels[level] = chosen);
    }

    drawThumbs() {
      const view = this.view(), { width, height, scale } = view, room = this.spacing * scale;
      const canvas = this.thumbsBox, context = canvas.getContext("2d"), ratio = self.devicePixelRatio || 1;
      Object.assign(canvas, { width: width * ratio, height: height * ratio }); // this clears it
      context.scale(ratio, ratio);
      context.imageSmoothingQuality = "high";
      this.pictured = [];
      if (room < NEAR) return;
      const size = clamp(room * 1.3, 28, Math.max(this.side * 1.5, 48)), half = size / 2, marked = this.marked();
      context.lineWidth = clamp(size / 18, 1.5, 3.5);
      const level = clamp(Math.floor(2 * Math.log2(scale / (size * 0.85))), 0, 40);
      for (const i of this.level(level)) {
        const [x, y] = this.where(i, view);
        if (x < -half || y < -half || x > width + half || y > height + half) continue;
        if (!this.shown(i) || (marked && !marked.has(i)) || !this.paint(context, i, x - half, y - half, size)) continue;
        context.strokeStyle = this.colour(i);
        if (this.classes) context.strokeRect(x - half, y - half, size, size);
        this.pictured.push(i);
      }
    }

    /** Kept as bitmaps: elements are decoded again now and then. */
    async load(uri, number) {
      const image = made("img", { src: uri });
      await image.decode();
      this.bitmaps[number] = await createImageBitmap(image);
      this.drawThumbs();
      this.fillPanel();
    }

    /** Draw a thumbnail into a square; false while it is not loaded. */
    paint(context, i, left, top, size) {
      const sheet = this.bitmaps[Math.floor(i / this.perSheet)], { side } = this, place = i % this.perSheet;
      const columns = sheet?.width / side, from = [(place % columns) * side, Math.floor(place / columns) * side];
      if (sheet) context.drawImage(sheet, ...from, side, side, left, top, size, size);
      return Boolean(sheet);
    }

    /** A canvas with the thumbnail of an image. */
    picture(canvas, i, size) {
      canvas.width = canvas.height = size;
      canvas.hidden = !this.paint(canvas.getContext("2d"), i, 0, 0, size);
      return canvas;
    }

    /** Show the card of an image; -1: none. */
    point(i) {
      const card = this.cardBox, [canvas, name, kind] = card.children;
      card.hidden = i < 0;
      if (i < 0) return;
      this.picture(canvas, i, 2 * this.side);
      name.textContent = this.shownNames[i];
      kind.textContent = this.kinds[i];
      const { width, height } = this.view(), [x, y] = this.where(i);
      card.style.left = `${clamp(x + 14, 0, width - card.offsetWidth)}px`;
      card.style.top = `${clamp(y + 14, 0, height - card.offsetHeight)}px`;
    }

    listen() {
      const on = (name, kind, act) => this.box.querySelector(name)?.addEventListener(kind, act);
      on("input", "input", ({ target }) => this.find(target.value));
      on(".atlas-list", "click", () => this.select(this.found));
      on(".atlas-copy", "click", () => this.copy());
      on(".atlas-save", "click", () => this.save());
      on(".atlas-clear", "click", () => this.select([]));
      on(".atlas-every", "click", () => this.hide([]));
      const ids = this.legend.map((_, id) => id);
      this.legend.forEach((row, id) => {
        row.addEventListener("click", () => this.hide(ids.filter((each) => this.hidden.has(each) !== (each === id))));
        row.addEventListener("dblclick", () => this.hide(ids.filter((each) => each !== id)));
      });
      const { mapBox, plotBox } = this, touch = { capture: true, passive: false };
      const pointed = ({ points }) => this.point(this.order[points[0].pointNumber]);
      for (const kind of ["plotly_hover", "plotly_click"]) plotBox.on(kind, pointed);
      for (const kind of ["plotly_relayouting", "plotly_afterplot"]) plotBox.on(kind, () => this.drawThumbs());
      plotBox.on("plotly_unhover", () => this.point(-1));
      plotBox.on("plotly_deselect", () => this.select([]));
      plotBox.on("plotly_selected", (event) => {
        if (event?.selections?.length) this.select(event.points.map((p) => this.order[p.pointNumber]), this.adding);
      });
      mapBox.addEventListener("mousedown", (event) => (this.adding = event.shiftKey), true);
      mapBox.addEventListener("keydown", (event) => this.key(event));
      for (const kind of ["touchstart", "touchmove"]) mapBox.addEventListener(kind, (event) => this.pinch(event), touch);
      let scrolled = -Infinity; // a wheel that scrolls the page goes on doing so over the map
      addEventListener("scroll", () => (scrolled = performance.now()), { passive: true });
      mapBox.addEventListener("wheel", (event) => performance.now() - scrolled < 250 && event.stopPropagation(), true);
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
      new ResizeObserver(() => Plotly.Plots.resize(plotBox)).observe(mapBox);
    }

    /** Zoom by a factor around (x, y) in shares of the map, and move by shares of it. */
    zoom(factor, x = 0.5, y = 0.5, right = 0, up = 0) {
      const view = this.view(), [wide, high] = [view.width, view.height].map((v) => v / view.scale / factor);
      const left = view.left + wide * (x * (factor - 1) + right);
      const top = view.top - high * (y * (factor - 1) - up);
      return this.look([left, left + wide], [top - high, top]);
    }

    look(x, y) {
      return Plotly.relayout(this.plotBox, { "xaxis.range": [...x], "yaxis.range": [...y] });
    }

    key(event) {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (KEYS[event.key]) this.zoom(...KEYS[event.key]);
      else if (event.key === "0") this.look(this.layout.xaxis.range, this.layout.yaxis.range);
      else if (event.key === "Escape") this.select([]);
      else return;
      event.preventDefault();
    }

    /** Two fingers, which mean nothing to plotly. */
    pinch(event) {
      const [a, b] = event.touches, before = this.fingers;
      this.fingers = null;
      if (!b) return;
      event.stopPropagation();
      event.preventDefault();
      const { left, top, width, height } = this.mapBox.getBoundingClientRect();
      const [x, y] = [((a.clientX + b.clientX) / 2 - left) / width, ((a.clientY + b.clientY) / 2 - top) / height];
      const apart = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) || 1;
      if (before) this.zoom(apart / before.apart, before.x, before.y, before.x - x, y - before.y);
      this.fingers = { x, y, apart };
    }

    hide(ids) {
      this.hidden = new Set(ids);
      this.legend.forEach((row, id) => row.setAttribute("aria-pressed", !this.hidden.has(id)));
      this.box.querySelector(".atlas-every").hidden = !ids.length;
      this.draw();
    }

    find(words) {
      const low = words.trim().toLowerCase();
      this.found = low ? new Set(this.order.filter((i) => this.texts[i].includes(low))) : null;
      this.foundBox.textContent = this.found ? `${counted(this.found.size)} found` : "";
      this.listBox.hidden = !this.found?.size;
      this.draw();
    }

    /** Select images besides those that are selected, or in their place. */
    select(images, adding = false) {
      const all = [...(adding ? this.selected : []), ...images];
      this.selected = new Set(all.filter((i) => this.shown(i)).sort((a, b) => a - b));
      this.fillPanel();
      this.draw();
    }

    fillPanel() {
      const chosen = [...this.selected], list = this.panelBox.querySelector("ul"), rest = chosen.length - LISTED;
      this.panelBox.hidden = !chosen.length;
      this.panelBox.querySelector("b").textContent = `${counted(chosen.length)} selected`;
      list.replaceChildren(...chosen.slice(0, LISTED).map((i) => {
        const name = this.shownNames[i], item = made("li");
        const row = made("button", { type: "button", title: name, onclick: () => this.goTo(i) });
        row.append(this.picture(made("canvas"), i, 56), made("span", { textContent: name }));
        item.append(row);
        return item;
      }));
      if (rest > 0) list.append(made("li", { textContent: `and ${counted(rest)} more in the copy and the file` }));
    }

    /** Look at an image from near. */
    async goTo(i) {
      const { width, height, scale } = this.view(), [x, y] = this.where(i);
      const nearer = Math.max(1, 40 / this.spacing / scale);
      await this.zoom(nearer, x / width, y / height, x / width - 0.5, 0.5 - y / height);
      this.point(i);
    }

    /** Whole names of the selected files, a line each. */
    files() {
      return [...this.selected].map((i) => `${this.folder}${this.names[i]}\n`).join("");
    }

    async copy() {
      const writing = async () => navigator.clipboard.writeText(this.files());
      this.copyBox.textContent = await writing().then(() => "Copied", () => "Not allowed: use Save");
      setTimeout(() => (this.copyBox.textContent = "Copy"), 1600);
    }

    save() {
      // as the bytes that the disk has: what was no text came as lone surrogates
      const parts = this.files().split(/([\udc80-\udcff])/u);
      const bytes = parts.map((part, n) => (n % 2 ? Uint8Array.of(part.charCodeAt(0) & 0xff) : part));
      const href = URL.createObjectURL(new Blob(bytes, { type: "text/plain" }));
      made("a", { href, download: "selection.txt" }).click();
    }
  }

  for (const box of document.querySelectorAll(".atlas")) box.atlas = new Atlas(box);
})();
