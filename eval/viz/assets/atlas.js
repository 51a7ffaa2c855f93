// Maps of images (eval/views/atlas.py): dots by class, thumbnails from near, search, selection.
//
// Dots are written pixel by pixel into one canvas; thumbnails, rings and outlines are drawn on
// another above it, so that pointing at things does not draw 20,000 dots anew. Places are kept in
// units: the longer side of all places is 1, (0, 0) is in its middle, y is downwards.
"use strict";
(() => {
  // Of classes 0 to 9 (discs) and 10 to 19 (squares); later ones repeat in other shapes. The first
  // ten are Petroff's (arXiv:2107.02270), made for colour-blind readers, a few of them shifted for
  // contrast with the paper.
  const LIGHT = [
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70",
    "#717581", "#5fc5ca", "#1b4f9c", "#ff6f91", "#0b6b4f", "#5c2d0c", "#c86be8", "#7d9a00",
    "#a3195b", "#2bb07f", "#d6b400", "#4b3f72",
  ];
  const DARK = [
    "#4a9de8", "#ffb52e", "#e0412a", "#a7b8b6", "#a65bdd", "#b97b68", "#f57a1c", "#cfc28a",
    "#7f8492", "#9be8eb", "#4f7fe0", "#ff8fab", "#1f9470", "#b5713a", "#dc9bff", "#a3c22e",
    "#d6498f", "#52d6a5", "#f2dc4a", "#8d7fc4",
  ];
  const SHAPES = ["disc", "square", "diamond", "triangle"];
  const PHASES = 4; // places of a dot within a pixel, on each axis
  const EDGE = 28; // device pixels around the canvas that dots may be written to
  const MARGIN = 34; // pixels around all places when all are shown
  const NEAR = 8; // pixels between neighbours from which thumbnails are shown
  const LEAST = 28; // pixels of a thumbnail, the least and the most
  const MOST = 100;
  const LEVELS = 27; // of thumbnails, see levels()
  const LISTED = 400; // files shown in the panel
  const PICTURED = 120; // with their thumbnails
  const HIDDEN = 1, FOUND = 2, SELECTED = 4;
  const PLAIN = 0, DIM = 1, MARKED = 2; // ways a dot is drawn

  const ICONS = {
    move: '<path d="M10 2v16M2 10h16M10 2 7.5 4.5M10 2l2.5 2.5M10 18l-2.5-2.5M10 18l2.5-2.5M2 10l2.5-2.5M2 10l2.5 2.5M18 10l-2.5-2.5M18 10l-2.5 2.5"/>',
    box: '<rect x="3" y="4" width="14" height="12" rx="1" stroke-dasharray="3 2.2"/>',
    lasso: '<path d="M6.2 14.2C3.9 13.2 2.5 11.4 2.5 9.300c0-3.3 3.4-5.8 7.5-5.800s7.5 2.5 7.5 5.8-3.4 5.7-7.5 5.700c-.9 0-1.7-.1-2.5-.3M7.5 14.700c.9 1 .7 2.7-1.5 3.3"/><circle cx="6.6" cy="14" r="1.5"/>',
    more: '<path d="M10 4v12M4 10h12"/>',
    less: '<path d="M4 10h12"/>',
    all: '<path d="M3 7.500V3h4.500M12.5 3H17v4.500M17 12.500V17h-4.500M7.5 17H3v-4.5"/>',
  };
  const icon = (name) =>
    `<svg viewBox="0 0 20 20" aria-hidden="true" fill="none" stroke="currentColor" ` +
    `stroke-width="1.6" stroke-linecap="round" stroke-linejoin="round">${ICONS[name]}</svg>`;

  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const counted = (count) => count.toLocaleString("en");
  const images = (count) => `${counted(count)} image${count === 1 ? "" : "s"}`;

  /** Numbers from base64; the machine is little-endian, as all that run browsers are. */
  function unpacked(text, Kind) {
    const binary = atob(text);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return new Kind(bytes.buffer);
  }

  /** A file's name as the bytes that the disk has: what was no text came as lone surrogates. */
  function bytesOf(text) {
    const parts = [], encoder = new TextEncoder();
    let plain = "";
    for (const character of text) {
      const code = character.codePointAt(0);
      if (code >= 0xdc80 && code <= 0xdcff) {
        parts.push(encoder.encode(plain), Uint8Array.of(code & 0xff));
        plain = "";
      } else plain += character;
    }
    parts.push(encoder.encode(plain));
    return parts;
  }

  /** An element with attributes, text and children. */
  function made(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (name === "html") element.innerHTML = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null && value !== false) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  /** A name as it is shown: what is not seen, or turns the reading around, as an escape. */
  const printable = (name) => name.replace(/[\p{C}\p{Z}]/gu, (character) => {
    if (character === " ") return character;
    const code = character.codePointAt(0).toString(16);
    const known = { "\n": "\\n", "\r": "\\r", "\t": "\\t" }[character];
    return known ?? (code.length < 3 ? `\\x${code.padStart(2, 0)}` : code.length < 5 ? `\\u${code.padStart(4, 0)}` : `\\U${code.padStart(8, 0)}`);
  });

  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const mixed = (a, b, share) => a.map((value, i) => value + (b[i] - value) * share);

  /** Share of each pixel that a shape of radius r around (x, y) covers: [dx, dy, share]. */
  function coverage(shape, r, x, y) {
    const inside = {
      disc: (u, v) => u * u + v * v <= r * r,
      square: (u, v) => Math.max(Math.abs(u), Math.abs(v)) <= r * 0.88,
      diamond: (u, v) => Math.abs(u) + Math.abs(v) <= r * 1.25,
      triangle: (u, v) => v <= r * 0.75 && Math.abs(u) <= (v + r * 1.2) * 0.6,
    }[shape];
    const reach = Math.ceil(r * 1.3) + 1, found = new Map();
    for (let dy = -reach; dy <= reach; dy++) {
      for (let dx = -reach; dx <= reach; dx++) {
        let hits = 0;
        for (let sy = 0.5; sy < 4; sy++)
          for (let sx = 0.5; sx < 4; sx++) hits += inside(dx + sx / 4 - x, dy + sy / 4 - y);
        if (hits) found.set(dy * 4096 + dx, [dx, dy, hits / 16]);
      }
    }
    return found;
  }

  class Atlas {
    constructor(box) {
      this.box = box;
      const data = JSON.parse(box.querySelector('script[type="application/json"]').textContent);
      this.count = data.count;
      this.places = unpacked(data.places, Float32Array);
      this.classes = data.classes === null ? null : unpacked(data.classes, Int32Array);
      this.classNames = data.classNames;
      this.folder = data.folder;
      this.names = data.names;
      this.side = data.side;
      this.perSheet = data.perSheet;
      this.flags = new Uint8Array(this.count);
      this.hiddenClasses = new Set();
      this.query = "";
      this.mode = "move";
      this.pointers = new Map();
      this.pointed = -1; // the point under the pointer, and one that a click has kept
      this.pinned = -1;
      this.drag = null;
      this.stamps = []; // by class and way, of one radius
      this.outlines = new Map();
      this.stats = {
        points: this.count, shown: this.count, found: 0, selected: 0, thumbs: 0, dots: 0,
        zoom: 1, scale: 1, size: 0, frame: 0,
      };
      this.normalise();
      this.index();
      this.build();
      this.listen();
      this.recolour();
      this.resize();
      this.reset();
      this.loadSheets(data.sheets);
      this.tell();
    }

    // ------------------------------------------------------------------ places

    normalise() {
      const { places, count } = this;
      let [left, right, low, high] = [Infinity, -Infinity, Infinity, -Infinity];
      for (let i = 0; i < count; i++) {
        left = Math.min(left, places[2 * i]);
        right = Math.max(right, places[2 * i]);
        low = Math.min(low, places[2 * i + 1]);
        high = Math.max(high, places[2 * i + 1]);
      }
      if (!count) [left, right, low, high] = [0, 0, 0, 0];
      this.unit = Math.max(right - left, high - low) || 1;
      this.middle = [(left + right) / 2, (low + high) / 2];
      this.extent = [(right - left) / this.unit, (high - low) / this.unit];
      this.x = new Float32Array(count);
      this.y = new Float32Array(count);
      for (let i = 0; i < count; i++) {
        this.x[i] = (places[2 * i] - this.middle[0]) / this.unit;
        this.y[i] = (this.middle[1] - places[2 * i + 1]) / this.unit;
      }
    }

    /** A grid of about two points a cell, and an order of drawing that favours no class. */
    index() {
      const { count, x, y } = this;
      this.cells = clamp(Math.ceil(Math.sqrt(count / 2)), 1, 512);
      const cellOf = (value) => clamp(Math.floor((value + 0.5) * this.cells), 0, this.cells - 1);
      this.cellOf = cellOf;
      const starts = new Int32Array(this.cells ** 2 + 1);
      for (let i = 0; i < count; i++) starts[cellOf(y[i]) * this.cells + cellOf(x[i]) + 1]++;
      for (let c = 0; c < this.cells ** 2; c++) starts[c + 1] += starts[c];
      this.starts = starts;
      this.members = new Int32Array(count);
      const next = starts.slice();
      for (let i = 0; i < count; i++)
        this.members[next[cellOf(y[i]) * this.cells + cellOf(x[i])]++] = i;
      this.order = Int32Array.from({ length: count }, (_, i) => i);
      let state = 12345;
      for (let i = count - 1; i > 0; i--) {
        state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
        const j = Math.floor((state / 2 ** 32) * (i + 1));
        [this.order[i], this.order[j]] = [this.order[j], this.order[i]];
      }
      this.rank = new Int32Array(count);
      this.order.forEach((point, place) => (this.rank[point] = place));
      this.spacing = this.typicalSpacing();
    }

    /** About the distance of neighbours in units, were those that lie anywhere spread evenly there. */
    typicalSpacing() {
      let taken = 0;
      for (let c = 0; c < this.cells ** 2; c++) taken += this.starts[c + 1] > this.starts[c];
      return Math.sqrt(taken / this.cells ** 2 / (this.count || 1)) || 1;
    }

    /** Calls `work` with every point of the cells that a rectangle in units touches. */
    within(left, top, right, bottom, work) {
      const { cells, starts, members, cellOf } = this;
      const first = cellOf(left), last = cellOf(right), end = cellOf(bottom);
      for (let row = cellOf(top); row <= end; row++) {
        const stop = starts[row * cells + last + 1];
        for (let m = starts[row * cells + first]; m < stop; m++) work(members[m]);
      }
    }

    /**
     * For each point the level from which its thumbnail is shown. At level n those shown are at
     * least 0.5 / 2^(n/2) units apart on one axis, and all of level n - 1 are among them, so
     * thumbnails come but never go as one zooms in, and moving changes nothing.
     */
    levels() {
      if (this.level) return this.level;
      this.level = new Uint8Array(this.count).fill(LEVELS);
      let rest = this.order, accepted = [];
      for (let level = 0; level < LEVELS && rest.length; level++) {
        const apart = 0.5 / 2 ** (level / 2), grid = new Map(), later = [];
        const key = (u, v) => u * 131072 + v;
        const cell = (value) => Math.floor((value + 0.5) / apart) + 1;
        for (const i of accepted) grid.set(key(cell(this.x[i]), cell(this.y[i])), i);
        for (const i of rest) {
          const u = cell(this.x[i]), v = cell(this.y[i]);
          let free = !grid.has(key(u, v));
          for (let n = 0; free && n < 9; n++) {
            const j = grid.get(key(u + (n % 3) - 1, v + Math.floor(n / 3) - 1));
            free = j === undefined || Math.max(
              Math.abs(this.x[i] - this.x[j]), Math.abs(this.y[i] - this.y[j])) >= apart;
          }
          if (free) {
            grid.set(key(u, v), i);
            accepted.push(i);
            this.level[i] = level;
          } else later.push(i);
        }
        rest = later;
      }
      return this.level;
    }

    // ------------------------------------------------------------------ the page

    build() {
      const { box } = this;
      const button = (name, title, act, text = icon(name), more = {}) =>
        made("button", { type: "button", title, "aria-label": title, html: text, onclick: act, ...more });
      this.search = made("input", {
        type: "search", placeholder: this.classes ? "Find a file or class" : "Find a file",
        "aria-label": "find images by file name" + (this.classes ? " or class" : ""),
        autocomplete: "off", spellcheck: "false", oninput: () => this.find(this.search.value),
      });
      this.foundLine = made("span", { class: "atlas-found", role: "status" });
      this.listFound = button("list", "list the files found", () => this.selectFound(), "list them", {
        class: "atlas-text", hidden: "",
      });
      this.modes = {};
      const modes = made("div", { class: "atlas-group", role: "group", "aria-label": "what dragging does" });
      for (const [name, title] of [
        ["move", "drag to move"], ["box", "drag a box to select (also shift and drag)"],
        ["lasso", "draw around images to select"],
      ]) {
        this.modes[name] = button(name, title, () => this.setMode(name));
        modes.append(this.modes[name]);
      }
      const zooms = made("div", { class: "atlas-group", role: "group", "aria-label": "zoom" },
        button("more", "closer", () => this.glide(1.8)),
        button("less", "further away", () => this.glide(1 / 1.8)),
        button("all", "show all", () => this.glide(0)));
      const bar = made("div", { class: "atlas-bar" },
        made("div", { class: "atlas-search" }, this.search, this.foundLine, this.listFound),
        made("div", { class: "atlas-tools" }, modes, zooms));
      this.dots = made("canvas", { "aria-hidden": "true" });
      this.top = made("canvas", {
        tabindex: "0", role: "application", class: "atlas-top",
        "aria-label": `Map of ${images(this.count)}, similar ones close together. Arrow keys move, ` +
          "plus and minus zoom, 0 shows all, Escape clears the selection.",
      });
      this.cardPicture = made("canvas");
      this.cardName = made("div", { class: "atlas-name" });
      this.cardClass = made("div", { class: "atlas-class" });
      this.card = made("div", { class: "atlas-card", hidden: "" }, this.cardPicture,
        made("div", {}, this.cardName, this.cardClass));
      this.statusLine = made("div", { class: "atlas-status", role: "status" });
      this.map = made("div", { class: "atlas-map" }, this.dots, this.top, this.statusLine, this.card);
      this.aside = made("div", { class: "atlas-aside" });
      this.buildPanel(button);
      this.buildLegend(button);
      box.append(bar, made("div", { class: "atlas-body" }, this.map, this.aside));
      this.setMode("move");
    }

    buildPanel(button) {
      this.panelTitle = made("span", { class: "atlas-title", role: "heading", "aria-level": "3" });
      this.copied = button("copy", "copy the list", () => this.copy(), "Copy", { class: "atlas-text" });
      this.list = made("ul", { tabindex: "0", "aria-label": "selected files" });
      this.panel = made("div", { class: "atlas-panel", hidden: "", role: "region", "aria-label": "selection" },
        made("div", { class: "atlas-head" }, this.panelTitle,
          this.copied,
          button("save", "download the list as a text file", () => this.download(), "Save .txt", {
            class: "atlas-text",
          }),
          button("clear", "clear the selection", () => this.select([]), "Clear", { class: "atlas-text" })),
        this.list);
      this.aside.append(this.panel);
    }

    buildLegend(button) {
      this.legend = [];
      if (!this.classes) {
        this.aside.classList.add("atlas-bare");
        return;
      }
      const counts = new Int32Array(this.classNames.length);
      for (const id of this.classes) counts[id]++;
      const list = made("ul");
      this.classNames.map(printable).forEach((name, id) => {
        const row = made("button", {
          type: "button", "aria-pressed": "true", title: `${name}: click to hide or show, double click for it alone`,
          onclick: () => this.toggle(id), ondblclick: () => this.only(id),
          onpointerenter: () => this.lookAt(id), onpointerleave: () => this.lookAt(-1),
        }, made("span", { class: "atlas-swatch", html: swatch(id) }),
        made("span", { class: "atlas-label" }, name),
        made("span", { class: "atlas-count" }, counted(counts[id])));
        this.legend.push(row);
        list.append(made("li", {}, row));
      });
      this.everything = button("every", "show all classes", () => this.only(-1), "Show all", {
        class: "atlas-text", hidden: "",
      });
      this.aside.append(made("div", { class: "atlas-legend", role: "region", "aria-label": "classes" },
        made("div", { class: "atlas-head" }, made("span", { class: "atlas-title" }, `${counted(counts.length)} class${counts.length === 1 ? "" : "es"}`),
          this.everything), list));
    }

    loadSheets(sheets) {
      this.sheets = new Array(sheets.length).fill(null);
      sheets.forEach((uri, number) => {
        const picture = new Image();
        picture.onload = async () => {
          // kept decoded: drawing from an element decodes it again now and then
          const bitmap = self.createImageBitmap ? await createImageBitmap(picture).catch(() => picture) : picture;
          this.sheets[number] = {
            bitmap, columns: Math.max(1, Math.round(picture.naturalWidth / this.side)),
          };
          this.draw_();
          if (this.selection().length) this.fillList();
        };
        picture.src = uri;
      });
    }

    /** Where the thumbnail of a point is: [bitmap, left, top], or null while it is not loaded. */
    thumb(i) {
      const sheet = this.sheets?.[Math.floor(i / this.perSheet)];
      if (!sheet) return null;
      const place = i % this.perSheet, { bitmap, columns } = sheet;
      return [bitmap, (place % columns) * this.side, Math.floor(place / columns) * this.side];
    }

    // ------------------------------------------------------------------ colours

    recolour() {
      const dark = matchMedia("(prefers-color-scheme: dark)").matches;
      const style = getComputedStyle(this.box), of = (name) => style.getPropertyValue(name).trim();
      this.colours = dark ? DARK : LIGHT;
      this.paper = of("--atlas-paper");
      this.ink = of("--atlas-ink");
      this.accent = of("--atlas-accent");
      this.colours.forEach((colour, n) => this.box.style.setProperty(`--atlas-c${n}`, colour));
      this.stamps = [];
      this.draw_();
    }

    tone(i) {
      return this.colours[(this.classes ? this.classes[i] : 0) % this.colours.length];
    }

    /**
     * Pixels of a shape and of the rim around it, for each phase: [places, shares, shares of the
     * rim]. A place is an offset in the buffer.
     */
    outline(shape, radius, rim) {
      const key = `${shape} ${radius} ${rim}`, known = this.outlines.get(key);
      if (known) return known;
      const stride = this.width + 2 * EDGE, phases = [];
      for (let phase = 0; phase < PHASES ** 2; phase++) {
        const x = ((phase % PHASES) + 0.5) / PHASES, y = (Math.floor(phase / PHASES) + 0.5) / PHASES;
        const inner = coverage(shape, radius, x, y), outer = rim ? coverage(shape, radius + rim, x, y) : inner;
        const places = [], inside = [], around = [];
        for (const [place, [dx, dy, share]] of outer) {
          places.push(dy * stride + dx);
          inside.push(inner.get(place)?.[2] ?? 0);
          around.push(share - inside.at(-1));
        }
        phases.push([Int32Array.from(places), inside, around]);
      }
      this.outlines.set(key, phases);
      return phases;
    }

    /** A dot of one class in one way, for each phase: places, colours times share, what is left of the ground. */
    stamp(id, way, radius) {
      const look = id % 40, key = look * 4 + way; // as many colours with shapes are there
      const known = this.stamps[key];
      if (known?.radius === radius) return known.phases;
      const paper = channels(this.paper), plain = channels(this.colours[look % this.colours.length]);
      const core = way === DIM ? mixed(plain, paper, 0.8) : plain;
      const edge = way === MARKED ? channels(this.ink) : paper;
      const strength = [0.75, 0, 1][way];
      const rim = way === DIM ? 0 : Math.min(1.25, 0.35 + radius / 5) * (way === MARKED ? 1.5 : 1);
      const phases = this.outline(SHAPES[Math.floor(look / 10)], radius, rim).map(([places, inside, around]) => {
        const colours = new Int32Array(places.length), left = new Int32Array(places.length);
        for (let n = 0; n < places.length; n++) {
          const share = inside[n], more = around[n] * strength;
          const [r, g, b] = core.map((value, c) => value * share + edge[c] * more);
          colours[n] = (b << 16) | (g << 8) | r;
          left[n] = 256 - Math.round(256 * (share + more));
        }
        return [places, colours, left];
      });
      this.stamps[key] = { radius, phases };
      return phases;
    }

    // ------------------------------------------------------------------ the view

    resize() {
      const { width, height } = this.map.getBoundingClientRect();
      const ratio = Math.min(self.devicePixelRatio || 1, 3);
      const size = [Math.max(1, Math.round(width * ratio)), Math.max(1, Math.round(height * ratio))];
      if (size[0] === this.width && size[1] === this.height && ratio === this.ratio) return;
      const before = this.view && this.view.k / this.fitted();
      [this.width, this.height] = size;
      [this.wide, this.high] = [width || 1, height || 1];
      this.ratio = ratio;
      for (const canvas of [this.dots, this.top]) [canvas.width, canvas.height] = size;
      this.ground = this.dots.getContext("2d", { alpha: false, willReadFrequently: true });
      this.over = this.top.getContext("2d");
      this.buffer = new ImageData(this.width + 2 * EDGE, this.height + 2 * EDGE);
      this.pixels = new Int32Array(this.buffer.data.buffer);
      this.stamps = [];
      this.outlines.clear();
      if (before) this.look(this.view.x, this.view.y, before * this.fitted());
      this.draw();
    }

    /** Pixels a unit at which all is seen. */
    fitted() {
      const margin = Math.min(MARGIN, this.wide / 8, this.high / 8), least = 1e-6;
      return Math.min(
        (this.wide - 2 * margin) / Math.max(this.extent[0], least),
        (this.high - 2 * margin) / Math.max(this.extent[1], least), 4 * Math.max(this.wide, this.high));
    }

    /** Look at a place in units, k pixels a unit. */
    look(x, y, k) {
      const fit = this.fitted();
      k = clamp(k, fit * 0.6, Math.max(fit * 4, 2.2 * this.side / this.spacing, fit * Math.sqrt(this.count) * 4));
      this.view = {
        k, x: clamp(x, -this.extent[0] / 2 - 0.01, this.extent[0] / 2 + 0.01),
        y: clamp(y, -this.extent[1] / 2 - 0.01, this.extent[1] / 2 + 0.01),
      };
      Object.assign(this.stats, { zoom: k / fit, scale: k / this.unit });
      this.draw_();
    }

    reset() {
      this.look(0, 0, this.fitted());
    }

    /** Closer by a factor, the place at (x, y) in pixels staying where it is. */
    zoom(factor, x = this.wide / 2, y = this.high / 2) {
      const { view } = this, before = view.k;
      const u = view.x + (x - this.wide / 2) / before, v = view.y + (y - this.high / 2) / before;
      this.look(view.x, view.y, before * factor);
      const { k } = this.view;
      this.look(u - (x - this.wide / 2) / k, v - (y - this.high / 2) / k, k);
    }

    /** The same in steps; factor 0 shows all. */
    glide(factor, x = this.wide / 2, y = this.high / 2) {
      cancelAnimationFrame(this.gliding);
      const from = { ...this.view }, started = performance.now();
      if (factor) this.zoom(factor, x, y);
      else this.reset();
      const to = { ...this.view };
      if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
      const step = (now) => {
        const t = clamp((now - started) / 180, 0, 1), eased = 1 - (1 - t) ** 3;
        const k = from.k * (to.k / from.k) ** eased;
        // along a straight line on the screen, not in the plane
        const share = to.k === from.k ? eased : (1 / k - 1 / from.k) / (1 / to.k - 1 / from.k);
        if (t === 1) return this.look(to.x, to.y, to.k);
        this.look(from.x + (to.x - from.x) * share, from.y + (to.y - from.y) * share, k);
        this.gliding = requestAnimationFrame(step);
      };
      this.look(from.x, from.y, from.k);
      this.gliding = requestAnimationFrame(step);
    }

    /** Where a point is, in pixels of the map. */
    where(i) {
      const { view } = this;
      return [
        (this.x[i] - view.x) * view.k + this.wide / 2, (this.y[i] - view.y) * view.k + this.high / 2,
      ];
    }

    /** What place, as it was given, lies at pixels of the map. */
    at(x, y) {
      const { view } = this;
      const u = (x - this.wide / 2) / view.k + view.x, v = (y - this.high / 2) / view.k + view.y;
      return [u * this.unit + this.middle[0], this.middle[1] - v * this.unit];
    }

    // ------------------------------------------------------------------ drawing

    draw_() {
      if (this.drawing) return;
      this.drawing = requestAnimationFrame(() => this.draw());
    }

    radius() {
      const { wide, high, count } = this;
      const start = clamp(0.13 * Math.sqrt((wide * high) / (count || 1)), 1.7, 5);
      return clamp(start * this.stats.zoom ** 0.35, 1.7, 5.5);
    }

    draw() {
      cancelAnimationFrame(this.drawing);
      this.drawing = 0;
      if (!this.view) return;
      const started = performance.now();
      this.thumbs = this.chooseThumbs();
      this.drawDots();
      this.drawOver();
      this.stats.frame = performance.now() - started;
    }

    dimmed(i) {
      if (this.looking >= 0) return this.classes[i] !== this.looking;
      if (this.query) return !(this.flags[i] & FOUND);
      return this.stats.selected > 0 && !(this.flags[i] & SELECTED);
    }

    /** Points in view that have a thumbnail now, in the order of drawing. */
    chooseThumbs() {
      const { view, wide, high } = this, room = this.spacing * view.k;
      this.isThumb ??= new Uint8Array(this.count);
      this.isThumb.fill(0);
      this.stats.size = 0;
      if (room < NEAR || !this.sheets?.some((sheet) => sheet)) return [];
      const size = clamp(room * 1.3, LEAST, Math.min(MOST, Math.max(this.side * 1.5, 48)));
      const most = Math.floor(2 * Math.log2(0.5 / ((size * 0.85) / view.k)));
      const level = this.levels(), found = [], half = size / view.k;
      const right = wide / 2 / view.k + half, bottom = high / 2 / view.k + half;
      this.within(view.x - right, view.y - bottom, view.x + right, view.y + bottom, (i) => {
        if (this.flags[i] & HIDDEN || level[i] > most || this.dimmed(i) || !this.thumb(i)) return;
        found.push(i);
        this.isThumb[i] = 1;
      });
      this.stats.size = size;
      return found.sort((a, b) => this.rank[a] - this.rank[b]);
    }

    drawDots() {
      const { pixels, width, height, ratio, flags, order, view, isThumb } = this;
      const [r, g, b] = channels(this.paper);
      pixels.fill((255 << 24) | (b << 16) | (g << 8) | r);
      const stride = width + 2 * EDGE, k = view.k * ratio, radius = this.radius() * ratio;
      const left = width / 2 - view.x * k + EDGE, top = height / 2 - view.y * k + EDGE;
      const low = EDGE / 2, right = stride - EDGE / 2, bottom = height + 1.5 * EDGE;
      const passes = this.query || this.stats.selected || this.looking >= 0 ? [DIM, PLAIN] : [PLAIN];
      const sizes = [1, 0.8, 1.15].map((share) => Math.round(4 * share * radius) / 4);
      let drawn = 0;
      for (const pass of passes) {
        for (let n = 0; n < order.length; n++) {
          const i = order[n];
          if (flags[i] & HIDDEN || isThumb[i]) continue;
          const x = this.x[i] * k + left, y = this.y[i] * k + top;
          if (!(x >= low && y >= low && x < right && y < bottom)) continue;
          let way = PLAIN;
          if (passes.length > 1) {
            way = this.dimmed(i) ? DIM : PLAIN;
            if (way !== pass) continue;
          }
          if (flags[i] & SELECTED && way === PLAIN) way = MARKED;
          const column = Math.floor(x), row = Math.floor(y);
          const phase = Math.floor((y - row) * PHASES) * PHASES + Math.floor((x - column) * PHASES);
          const [offsets, colours, rest] = this.stamp(this.classes ? this.classes[i] : 0, way, sizes[way])[phase];
          const base = row * stride + column;
          for (let p = 0; p < offsets.length; p++) {
            const place = base + offsets[p], share = rest[p];
            if (!share) pixels[place] = colours[p] | -16777216;
            else {
              const under = pixels[place];
              pixels[place] = (colours[p] + ((Math.imul(under & 0xff00ff, share) >>> 8) & 0xff00ff) +
                ((Math.imul(under & 0xff00, share) >>> 8) & 0xff00)) | -16777216;
            }
          }
          drawn++;
        }
      }
      this.stats.dots = drawn;
      this.ground.putImageData(this.buffer, -EDGE, -EDGE);
    }

    drawOver() {
      const { over, ratio, thumbs } = this, { size } = this.stats;
      over.setTransform(ratio, 0, 0, ratio, 0, 0);
      over.clearRect(0, 0, this.wide, this.high);
      over.imageSmoothingQuality = "high";
      for (const i of thumbs) this.drawThumb(i, size);
      this.stats.thumbs = thumbs.length;
      const shown = this.pointed >= 0 ? this.pointed : this.pinned;
      if (shown >= 0 && !(this.flags[shown] & HIDDEN)) this.drawRing(shown, size);
      if (this.drag?.path) this.drawPath();
    }

    drawThumb(i, size) {
      const found = this.thumb(i);
      if (!found) return;
      const { over, side } = this, [x, y] = this.where(i), [bitmap, left, top] = found;
      const frame = this.classes ? clamp(size / 18, 1.5, 3.5) : 0, half = size / 2;
      const marked = this.flags[i] & SELECTED;
      if (marked) {
        over.fillStyle = this.ink;
        over.fillRect(x - half - 3, y - half - 3, size + 6, size + 6);
      }
      if (frame || marked) {
        over.fillStyle = this.tone(i);
        over.fillRect(x - half, y - half, size, size);
      }
      over.drawImage(bitmap, left, top, side, side, x - half + frame, y - half + frame, size - 2 * frame, size - 2 * frame);
    }

    drawRing(i, size) {
      const { over } = this, [x, y] = this.where(i);
      if (this.isThumb[i]) {
        this.drawThumb(i, size * 1.12);
        over.strokeStyle = this.ink;
        over.lineWidth = 2;
        over.strokeRect(x - size * 0.56 - 1, y - size * 0.56 - 1, size * 1.12 + 2, size * 1.12 + 2);
        return;
      }
      over.beginPath();
      over.arc(x, y, this.radius() + 1.5, 0, 7);
      over.fillStyle = this.tone(i);
      over.fill();
      over.lineWidth = 2;
      over.strokeStyle = this.ink;
      over.stroke();
    }

    drawPath() {
      const { over, drag } = this;
      over.beginPath();
      drag.path.forEach(([x, y], n) => (n ? over.lineTo(x, y) : over.moveTo(x, y)));
      over.closePath();
      over.globalAlpha = 0.12;
      over.fillStyle = this.accent;
      over.fill();
      over.globalAlpha = 1;
      over.setLineDash([5, 4]);
      over.lineWidth = 1.5;
      over.strokeStyle = this.accent;
      over.stroke();
      over.setLineDash([]);
    }

    // ------------------------------------------------------------------ pointing

    listen() {
      const { top } = this, options = { passive: false };
      top.addEventListener("pointerdown", (event) => this.down(event));
      top.addEventListener("pointermove", (event) => this.move(event));
      for (const name of ["pointerup", "pointercancel"])
        top.addEventListener(name, (event) => this.up(event));
      top.addEventListener("pointerleave", () => this.point(-1));
      top.addEventListener("wheel", (event) => this.wheel(event), options);
      top.addEventListener("dblclick", (event) => {
        if (this.mode === "move") this.glide(event.shiftKey ? 0.5 : 2, ...this.spot(event));
      });
      top.addEventListener("keydown", (event) => this.key(event));
      this.box.addEventListener("keydown", (event) => {
        if (event.key === "Escape") this.escape();
      });
      this.scrolled = -Infinity;
      addEventListener("scroll", () => (this.scrolled = performance.now()), { capture: true, passive: true });
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.recolour());
      new ResizeObserver(() => this.resize()).observe(this.map);
      const watchRatio = () => {
        this.resize();
        matchMedia(`(resolution: ${devicePixelRatio}dppx)`).addEventListener("change", watchRatio, { once: true });
      };
      watchRatio();
    }

    spot(event) {
      const corner = this.top.getBoundingClientRect();
      return [event.clientX - corner.left, event.clientY - corner.top];
    }

    wheel(event) {
      // a page that is being scrolled goes on scrolling when the map comes under the pointer
      if (!event.ctrlKey && performance.now() - this.scrolled < 300) return;
      const pixels = event.deltaY * [1, 16, 400][event.deltaMode];
      const factor = Math.exp(-clamp(pixels, -240, 240) * (event.ctrlKey ? 0.01 : 0.0022));
      if (factor < 1 && this.stats.zoom <= 0.61) return; // it cannot go further away: the page scrolls
      event.preventDefault();
      cancelAnimationFrame(this.gliding);
      this.zoom(factor, ...this.spot(event));
    }

    down(event) {
      if (event.button > 0) return;
      cancelAnimationFrame(this.gliding);
      try {
        this.top.setPointerCapture(event.pointerId);
      } catch {
        // a pointer that a script has made up cannot be captured
      }
      this.pointers.set(event.pointerId, this.spot(event));
      const selecting = this.pointers.size === 1 && (this.mode !== "move" || event.shiftKey);
      const start = this.spot(event);
      this.drag = {
        start, last: start, moved: false, adding: event.ctrlKey || event.metaKey,
        kind: selecting ? (this.mode === "lasso" ? "lasso" : "box") : "move", path: null,
      };
      if (this.pointers.size === 2) this.pinch = this.pinched();
    }

    pinched() {
      const [[ax, ay], [bx, by]] = [...this.pointers.values()];
      return { x: (ax + bx) / 2, y: (ay + by) / 2, apart: Math.hypot(ax - bx, ay - by) || 1 };
    }

    move(event) {
      const spot = this.spot(event), { drag } = this;
      if (!this.pointers.has(event.pointerId)) {
        if (event.pointerType !== "touch") this.point(this.nearest(...spot), spot);
        return;
      }
      this.pointers.set(event.pointerId, spot);
      if (this.pointers.size === 2) {
        const now = this.pinched(), { view, pinch } = this;
        this.look(view.x - (now.x - pinch.x) / view.k, view.y - (now.y - pinch.y) / view.k, view.k);
        this.zoom(now.apart / pinch.apart, now.x, now.y);
        this.pinch = now;
        drag.moved = true;
        drag.path = null;
        return;
      }
      if (!drag) return;
      if (!drag.moved && Math.hypot(spot[0] - drag.start[0], spot[1] - drag.start[1]) < 4) return;
      drag.moved = true;
      this.point(-1);
      if (drag.kind === "move") {
        this.top.classList.add("atlas-grabbing");
        const { view } = this;
        this.look(view.x - (spot[0] - drag.last[0]) / view.k, view.y - (spot[1] - drag.last[1]) / view.k, view.k);
      } else if (drag.kind === "box") {
        const [x, y] = drag.start;
        drag.path = [[x, y], [spot[0], y], spot, [x, spot[1]]];
      } else (drag.path ??= [drag.start]).push(spot);
      drag.last = spot;
      if (drag.path) this.drawOver();
    }

    up(event) {
      const { drag } = this;
      if (!this.pointers.delete(event.pointerId) || !drag) return;
      this.top.classList.remove("atlas-grabbing");
      if (this.pointers.size) {
        // of two fingers one goes on moving the map
        this.drag = { ...drag, kind: "move", last: [...this.pointers.values()][0], path: null, moved: true };
        return;
      }
      this.drag = null;
      if (event.type === "pointercancel") return this.draw_();
      if (drag.path) this.select(this.inside(drag.path), drag.adding);
      else if (!drag.moved) this.tap(this.spot(event), event.pointerType === "touch");
      else if (drag.kind === "move" && event.pointerType !== "touch") this.point(this.nearest(...this.spot(event)), this.spot(event));
    }

    tap(spot, touch) {
      const i = this.nearest(...spot, touch ? 22 : 10);
      this.pinned = i === this.pinned ? -1 : i;
      this.point(touch ? -1 : i, spot);
    }

    /** The point seen at pixels of the map: a thumbnail there, or the nearest dot; -1: none. */
    nearest(x, y, reach = 10) {
      const { view } = this, { size } = this.stats, half = size / 2;
      const most = Math.max(reach, this.radius() + 3, half) / view.k;
      const u = view.x + (x - this.wide / 2) / view.k, v = view.y + (y - this.high / 2) / view.k;
      let best = -1, least = Math.max(reach, this.radius() + 3) / view.k, over = -1;
      this.within(u - most, v - most, u + most, v + most, (i) => {
        if (this.flags[i] & HIDDEN) return;
        const dx = Math.abs(this.x[i] - u), dy = Math.abs(this.y[i] - v), away = Math.hypot(dx, dy);
        if (this.isThumb?.[i]) {
          if (Math.max(dx, dy) * view.k <= half && (over < 0 || this.rank[i] > this.rank[over])) over = i;
        } else if (away < least) [best, least] = [i, away];
      });
      return over >= 0 ? over : best;
    }

    /** Show the card of a point at a spot; -1: of the one that is pinned, or none. */
    point(i, spot) {
      if (i === this.pointed && i < 0 && this.cardOf === this.pinned) return;
      this.pointed = i;
      const shown = i >= 0 ? i : this.pinned;
      this.top.classList.toggle("atlas-pointing", i >= 0);
      if (shown !== this.cardOf) {
        this.cardOf = shown;
        this.fillCard(shown);
      }
      if (shown >= 0) this.placeCard(...(i >= 0 && spot ? spot : this.where(shown)));
      this.drawOver();
    }

    fillCard(i) {
      this.card.hidden = i < 0;
      if (i < 0) return;
      const found = this.thumb(i), shown = clamp(this.side * 3, 112, 176), picture = this.cardPicture;
      picture.hidden = !found;
      if (found) {
        picture.width = picture.height = Math.round(shown * this.ratio);
        picture.style.width = picture.style.height = `${shown}px`;
        this.card.style.width = `${shown + 12}px`;
        const brush = picture.getContext("2d");
        brush.imageSmoothingQuality = "high";
        brush.drawImage(found[0], found[1], found[2], this.side, this.side, 0, 0, picture.width, picture.height);
      }
      this.cardName.textContent = printable(this.names[i]);
      const id = this.classes?.[i];
      this.cardClass.hidden = id === undefined;
      if (id !== undefined)
        this.cardClass.replaceChildren(made("span", { class: "atlas-swatch", html: swatch(id) }), printable(this.classNames[id]));
    }

    placeCard(x, y) {
      const { offsetWidth: wide, offsetHeight: high } = this.card, gap = Math.max(16, this.stats.size * 0.6 + 6);
      const left = x + gap + wide <= this.wide ? x + gap : x - gap - wide;
      this.card.style.left = `${clamp(left, 4, Math.max(4, this.wide - wide - 4))}px`;
      this.card.style.top = `${clamp(y - high / 2, 4, Math.max(4, this.high - high - 4))}px`;
    }

    key(event) {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const step = 60 / this.view.k, { x, y, k } = this.view;
      const acts = {
        "+": () => this.glide(1.5), "=": () => this.glide(1.5), "-": () => this.glide(1 / 1.5),
        0: () => this.glide(0), ArrowLeft: () => this.look(x - step, y, k), ArrowRight: () => this.look(x + step, y, k),
        ArrowUp: () => this.look(x, y - step, k), ArrowDown: () => this.look(x, y + step, k),
      };
      const act = acts[event.key];
      if (!act) return;
      event.preventDefault();
      cancelAnimationFrame(this.gliding);
      act();
    }

    escape() {
      this.drag = null;
      this.pinned = -1;
      this.point(-1);
      this.select([]);
    }

    setMode(name) {
      this.mode = name;
      for (const [each, button] of Object.entries(this.modes))
        button.setAttribute("aria-pressed", String(each === name));
      this.top.classList.toggle("atlas-selecting", name !== "move");
    }

    // ------------------------------------------------------------------ search, classes, selection

    /** Mark what has the words in its file's name, below the common folder, or its class. */
    find(words) {
      this.query = words.trim().toLowerCase();
      this.search.value = words;
      this.lower ??= this.names.map((name) => name.toLowerCase());
      const inClass = this.classNames.map((name) => name.toLowerCase().includes(this.query));
      for (let i = 0; i < this.count; i++) {
        const hit = this.query && (this.lower[i].includes(this.query) || (this.classes && inClass[this.classes[i]]));
        this.flags[i] = hit ? this.flags[i] | FOUND : this.flags[i] & ~FOUND;
      }
      this.tell();
    }

    selectFound() {
      this.select(this.having(FOUND));
    }

    /** Visible points with a flag, in order. */
    having(flag) {
      const found = [];
      for (let i = 0; i < this.count; i++)
        if (this.flags[i] & flag && !(this.flags[i] & HIDDEN)) found.push(i);
      return found;
    }

    toggle(id) {
      if (!this.hiddenClasses.delete(id)) this.hiddenClasses.add(id);
      this.applyHidden();
    }

    /** One class alone; when it is alone already, or -1, all. */
    only(id) {
      const alone = this.hiddenClasses.size === this.classNames.length - 1 && !this.hiddenClasses.has(id);
      this.hiddenClasses = new Set(id < 0 || alone ? [] : this.classNames.keys());
      this.hiddenClasses.delete(id);
      this.applyHidden();
    }

    applyHidden() {
      for (let i = 0; i < this.count; i++) {
        const hide = this.hiddenClasses.has(this.classes[i]);
        this.flags[i] = hide ? (this.flags[i] | HIDDEN) & ~SELECTED : this.flags[i] & ~HIDDEN;
      }
      this.legend.forEach((row, id) => row.setAttribute("aria-pressed", String(!this.hiddenClasses.has(id))));
      this.everything.hidden = !this.hiddenClasses.size;
      this.looking = -1;
      if (this.pinned >= 0 && this.flags[this.pinned] & HIDDEN) this.pinned = -1;
      this.point(-1);
      this.fillPanel();
    }

    /** Let one class stand out while the pointer is on its row. */
    lookAt(id) {
      this.looking = id >= 0 && !this.hiddenClasses.has(id) ? id : -1;
      this.draw_();
    }

    /** Points inside a closed path of pixels, by the even-odd rule; of hidden classes none. */
    inside(path) {
      const { view } = this;
      const corners = path.map(([x, y]) => [(x - this.wide / 2) / view.k + view.x, (y - this.high / 2) / view.k + view.y]);
      const us = corners.map((c) => c[0]), vs = corners.map((c) => c[1]);
      const found = [], low = [1, -1];
      for (const values of [us, vs]) low.push(values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b)));
      this.within(low[2], low[4], low[3], low[5], (i) => {
        if (this.flags[i] & HIDDEN) return;
        const u = this.x[i], v = this.y[i];
        let odd = false;
        for (let n = 0, m = corners.length - 1; n < corners.length; m = n++) {
          const [au, av] = corners[n], [bu, bv] = corners[m];
          if (av > v !== bv > v && u < ((bu - au) * (v - av)) / (bv - av) + au) odd = !odd;
        }
        if (odd) found.push(i);
      });
      return found.sort((a, b) => a - b);
    }

    /** Select points by their numbers, besides those that are selected or in their place. */
    select(points, adding = false) {
      if (!adding) for (let i = 0; i < this.count; i++) this.flags[i] &= ~SELECTED;
      for (const i of points) if (!(this.flags[i] & HIDDEN)) this.flags[i] |= SELECTED;
      this.fillPanel();
    }

    selection() {
      return this.having(SELECTED);
    }

    /** Whole names of the selected files. */
    files() {
      return this.selection().map((i) => this.folder + this.names[i]);
    }

    fillPanel() {
      const count = this.selection().length;
      this.panel.hidden = !count;
      this.panelTitle.textContent = `${counted(count)} selected`;
      this.fillList();
      this.tell();
      this.resize();
    }

    fillList() {
      const chosen = this.selection(), rows = [];
      chosen.slice(0, LISTED).forEach((i, n) => {
        const found = n < PICTURED && this.thumb(i), row = made("button", {
          type: "button", title: printable(this.folder + this.names[i]), onclick: () => this.goTo(i),
        });
        if (found) {
          const picture = made("canvas", { width: 56, height: 56 });
          picture.getContext("2d").drawImage(found[0], found[1], found[2], this.side, this.side, 0, 0, 56, 56);
          row.append(picture);
        }
        row.append(made("span", {}, printable(this.names[i])));
        rows.push(made("li", {}, row));
      });
      if (chosen.length > LISTED)
        rows.push(made("li", { class: "atlas-rest" }, `and ${counted(chosen.length - LISTED)} more in the copy and the download`));
      this.list.replaceChildren(...rows);
    }

    goTo(i) {
      this.pinned = i;
      this.look(this.x[i], this.y[i], Math.max(this.view.k, 40 / this.spacing));
      this.draw();
      this.point(-1);
    }

    async copy() {
      const text = this.files().join("\n") + "\n";
      try {
        await navigator.clipboard.writeText(text);
      } catch {
        // without permission, or where pages from a disk have no clipboard
        const area = made("textarea", { class: "atlas-away" });
        area.value = text;
        this.box.append(area);
        area.select();
        document.execCommand("copy");
        area.remove();
      }
      this.copied.textContent = "Copied";
      setTimeout(() => (this.copied.textContent = "Copy"), 1500);
    }

    download() {
      const parts = this.files().flatMap((name) => bytesOf(`${name}\n`));
      const link = made("a", {
        href: URL.createObjectURL(new Blob(parts, { type: "text/plain" })), download: "selection.txt",
      });
      this.box.append(link);
      link.click();
      link.remove();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    }

    /** What is found and selected, in words. */
    tell() {
      const { stats } = this;
      let shown = 0;
      for (let i = 0; i < this.count; i++) shown += !(this.flags[i] & HIDDEN);
      Object.assign(stats, { shown, found: this.having(FOUND).length, selected: this.selection().length });
      this.foundLine.textContent = this.query ? `${counted(stats.found)} found` : "";
      this.listFound.hidden = !stats.found;
      this.statusLine.textContent = shown < this.count
        ? `${counted(shown)} of ${images(this.count)}` : images(this.count);
      this.draw_();
    }
  }

  /** The mark of a class, in the colours of the time. */
  function swatch(id) {
    const shapes = {
      disc: '<circle cx="8" cy="8" r="5.5"/>', square: '<rect x="3" y="3" width="10" height="10"/>',
      diamond: '<path d="M8 1.5 14.5 8 8 14.5 1.5 8z"/>', triangle: '<path d="M8 2.5 14 13H2z"/>',
    };
    const shape = shapes[SHAPES[Math.floor((id % 40) / 10)]];
    return `<svg viewBox="0 0 16 16" aria-hidden="true" style="fill:var(--atlas-c${id % 20})">${shape}</svg>`;
  }

  const start = () => {
    for (const box of document.querySelectorAll(".atlas")) box.atlas ??= new Atlas(box);
  };
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", start);
  else start();
})();
