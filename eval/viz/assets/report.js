// The report's figures and what answers to a hand: hover, zoom, pictures over time, filter, copy.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)");
  const LIGHT = ["#2c6bac", "#c2591b", "#2b8457", "#8a57b0", "#a97c0b", "#bf3d6b", "#1b9394", "#5b6470"];
  const DARK = ["#7fb0e2", "#f0965c", "#74c69b", "#c197e3", "#dcb54e", "#ee85aa", "#5fcccb", "#a9b2bc"];
  const CONFIG = { displayModeBar: false, responsive: true, doubleClick: "reset", showTips: false };
  const DASHES = ["solid", "dot", "dash", "dashdot", "longdash"];
  const drawn = new Set(); // figures that are there
  const steps = (data.curves || []).flatMap((group) => group.plots.flatMap((plot) => plot.lines.map((line) => line.x.at(-1))));
  const whole = [0, Math.max(1, ...steps) * 1.01]; // all figures have the same steps
  let range = whole; // or the stretch that somebody has enlarged
  let printing = false;

  const make = (tag, words = "", name = "") => {
    const found = document.createElement(tag);
    found.textContent = words;
    if (name) found.className = name;
    return found;
  };

  // plotly takes some HTML in its words, and these are names
  const literal = (words) => words.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function theme() {
    if (printing) return { ink: "#111", faint: "#555", grid: "#eee", paper: "#fff", bad: "#b3261e", colours: LIGHT };
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(`--${name}`).trim();
    return { ink: of("ink"), faint: of("faint"), grid: of("grid"), paper: of("panel"), bad: of("bad"),
             colours: dark.matches ? DARK : LIGHT };
  }

  function layout(look, more) {
    const axis = { gridcolor: look.grid, zeroline: false, linecolor: look.grid, tickcolor: look.grid, automargin: true };
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: look.faint },
      margin: { l: 8, r: 10, t: 8, b: 8 }, hovermode: "x unified", hoverdistance: -1, dragmode: touch.matches ? false : "zoom",
      hoverlabel: { namelength: -1, bgcolor: look.paper, bordercolor: look.grid, font: { color: look.ink, size: 12 } },
      legend: { orientation: "h", x: 0, y: -0.16, yanchor: "top", font: { size: 11 } },
      showlegend: false, height: 230,
    };
    const found = { ...base, ...more };
    found.xaxis = { ...axis, ...(more.xaxis || {}) };
    found.yaxis = { ...axis, ...(more.yaxis || {}) };
    return found;
  }

  const faded = (colour, share) => {
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
    return `rgba(${r},${g},${b},${share})`;
  };

  function means(values) { // over a fortieth of the curve on both sides
    const reach = Math.max(1, Math.round(values.length / 40));
    return values.map((_, at) => {
      const near = values.slice(Math.max(0, at - reach), at + reach + 1).filter((v) => v !== null);
      return near.length ? near.reduce((a, b) => a + b, 0) / near.length : null;
    });
  }

  function traces(plot, look) {
    const several = (data.runs || []).length > 1;
    const columns = [...new Set(plot.lines.map((line) => line.column))];
    const found = [];
    for (const line of plot.lines) {
      const column = columns.indexOf(line.column);
      const colour = look.colours[(several ? line.run : column) % look.colours.length];
      const name = literal(several ? data.runs[line.run] + (columns.length > 1 ? `, ${line.name}` : "") : line.name);
      const smooth = plot.smooth && line.y.length >= 20;
      const few = line.y.length <= 12;
      const trace = {
        x: line.x, y: line.y, name, type: "scatter", mode: few ? "lines+markers" : "lines", marker: { size: 5 },
        line: { color: smooth ? faded(colour, 0.4) : colour, width: smooth ? 1 : 1.8,
                dash: several ? DASHES[column % DASHES.length] : "solid" },
        legendgroup: name, showlegend: !smooth, hovertemplate: "%{y:.4~g}",
      };
      if (line.low) {
        trace.customdata = line.low.map((low, at) => [low, line.high[at]]);
        trace.hovertemplate = "%{y:.1f} (%{customdata[0]:.1f} to %{customdata[1]:.1f})";
        if (line.y.length < 3) { // no band between so few
          trace.error_y = { type: "data", symmetric: false, color: colour, thickness: 1.5, width: 4,
                            array: line.high.map((high, at) => high - line.y[at]),
                            arrayminus: line.low.map((low, at) => line.y[at] - low) };
        }
        const band = { x: line.x, type: "scatter", mode: "lines", line: { width: 0 }, hoverinfo: "skip",
                       showlegend: false, legendgroup: name };
        found.push({ ...band, y: line.low }, { ...band, y: line.high, fill: "tonexty", fillcolor: faded(colour, 0.16) });
      }
      found.push(trace);
      if (smooth) {
        found.push({ x: line.x, y: means(line.y), name, type: "scatter", mode: "lines", hoverinfo: "skip",
                     legendgroup: name, line: { color: colour, width: 2 } });
      }
    }
    return found;
  }

  function drawCurves(box, look) {
    const plot = data.curves[box.dataset.group].plots[box.dataset.plot];
    const shapes = plot.sick.map((s) => ({ type: "rect", xref: "x", yref: "paper", x0: s.from, x1: s.to, y0: 0, y1: 1,
                                           fillcolor: look.bad, opacity: 0.13, line: { width: 0 }, layer: "below" }));
    const annotations = [];
    for (const mark of plot.marks) {
      shapes.push({ type: "line", xref: "x", yref: "paper", x0: mark.step, x1: mark.step, y0: 0, y1: 1,
                    line: { color: look.faint, width: 1, dash: "dot" } });
      annotations.push({ x: mark.step, y: 1, xref: "x", yref: "paper", text: literal(mark.words), showarrow: false,
                         xanchor: "left", yanchor: "top", font: { size: 11, color: look.faint } });
    }
    const lines = new Set(plot.lines.map((line) => `${line.run} ${line.column}`)).size;
    const xaxis = { unifiedhovertitle: { text: "step %{x:,d}" }, tickformat: ",d", range: [...range] };
    const yaxis = { type: plot.log ? "log" : "linear", fixedrange: true, exponentformat: "e",
                    ...(plot.log ? { dtick: "D2", tickformat: "~g" } : {}) };
    return [traces(plot, look), layout(look, { xaxis, yaxis, shapes, annotations, showlegend: lines > 1,
                                              height: lines > 4 ? 270 : 230 })];
  }

  function drawNumbers(box, look) {
    const { rows } = data.numbers;
    const several = rows.length > 1 && rows.every((row) => row.main);
    const metrics = [...new Set(rows.flatMap((row) => row.metrics.map(literal)))];
    const found = rows.map((row, at) => {
      const plain = !several && !row.main;
      const colour = plain ? look.faint : look.colours[several ? row.run % look.colours.length : 0];
      const known = row.low.map((low, i) => low !== null && !plain);
      return {
        type: "scatter", mode: "markers", name: literal(row.name), y: row.metrics.map(literal), x: row.values,
        customdata: row.low.map((low, i) => (known[i] ? ` (${low.toFixed(1)} to ${row.high[i].toFixed(1)})` : "")),
        hovertemplate: "%{x:.1f}%{customdata}",
        marker: { color: colour, size: plain ? 8 : 10, symbol: plain ? ["circle-open", "diamond-open", "square-open"][at % 3] : "circle" },
        error_x: { type: "data", symmetric: false, visible: known.some(Boolean), color: colour, thickness: 1.6, width: 0,
                   array: row.high.map((high, i) => (known[i] ? high - row.values[i] : 0)),
                   arrayminus: row.low.map((low, i) => (known[i] ? row.values[i] - low : 0)) },
      };
    });
    return [found, layout(look, {
      height: 80 + 27 * metrics.length, hovermode: "y unified", showlegend: true, dragmode: false,
      legend: { orientation: "h", x: 0, y: 1.01, yanchor: "bottom", font: { size: 12 }, traceorder: several ? "normal" : "reversed" },
      xaxis: { fixedrange: true, ticksuffix: " %" },
      yaxis: { fixedrange: true, autorange: "reversed", categoryorder: "array", categoryarray: metrics, ticksuffix: "  " },
    })];
  }

  function shade(share, look) { // from the first block, pale, to the last, strong
    const ends = dark.matches && !printing ? [[104, 122, 146], [176, 218, 255]] : [[176, 204, 230], [20, 70, 130]];
    const mixed = ends[0].map((low, i) => Math.round(low + share * (ends[1][i] - low)));
    return `rgb(${mixed})`;
  }

  function drawEntropy(box, look) {
    const runs = data.entropy;
    const over = runs.length === 1 && runs[0].steps.length > 1;
    const blocks = Math.max(...runs.map((run) => run.values[0].length));
    const found = over
      ? [...Array(blocks).keys()].map((block) => ({
          type: "scatter", mode: runs[0].steps.length > 20 ? "lines" : "lines+markers", name: `block ${block + 1}`,
          x: runs[0].steps, y: runs[0].values.map((row) => row[block]), marker: { size: 5 },
          line: { color: shade(blocks > 1 ? block / (blocks - 1) : 1, look), width: 2 }, hovertemplate: "%{y:.4f}",
        }))
      : runs.map((run) => ({
          type: "scatter", mode: "lines+markers", name: literal(`${run.name}, step ${run.steps.at(-1)}`),
          x: run.values.at(-1).map((_, block) => block + 1), y: run.values.at(-1),
          line: { color: look.colours[run.run % look.colours.length], width: 2 }, hovertemplate: "%{y:.4f}",
        }));
    const title = over ? "step" : "block";
    return [found, layout(look, {
      height: 300, showlegend: found.length > 1, dragmode: false,
      xaxis: { title: { text: title, standoff: 6 }, fixedrange: true, tickformat: ",d", ...(over ? {} : { dtick: Math.ceil(blocks / 12) }) },
      yaxis: { fixedrange: true }, legend: { orientation: "h", x: 0, y: -0.24, yanchor: "top", font: { size: 11 } },
    })];
  }

  function drawParallel(box, look) { // of a sweep: a line a trial
    const { axes, colour } = data.parallel;
    const low = shade(0, look), high = shade(1, look);
    const trace = {
      type: "parcoords", line: { color: colour, colorscale: [[0, low], [1, high]] },
      dimensions: axes.map((axis) => ({ ...axis, label: literal(axis.label) })), labelfont: { color: look.ink, size: 12 }, tickfont: { color: look.ink, size: 11 },
      rangefont: { color: "rgba(0,0,0,0)", size: 1 }, unselected: { line: { opacity: 0.06 } },
    };
    return [[trace], layout(look, { height: 360, margin: { l: 60, r: 50, t: 46, b: 18 }, dragmode: false })];
  }

  function drawDecides(box, look) {
    const rows = data.decides;
    const trace = { type: "bar", orientation: "h", y: rows.map((row) => literal(row.key)), x: rows.map((row) => 100 * row.share),
                    marker: { color: look.colours[0] }, hovertemplate: "%{x:.0f} %<extra></extra>" };
    return [[trace], layout(look, { height: 60 + 30 * rows.length, hovermode: "closest", dragmode: false,
                                    xaxis: { fixedrange: true, ticksuffix: " %", rangemode: "tozero" },
                                    yaxis: { fixedrange: true, autorange: "reversed", ticksuffix: "  " } })];
  }

  function drawOver(box, look) { // the best in colour, the others pale
    const found = [...data.over].reverse().map((line) => ({
      type: "scatter", mode: line.x.length < 20 ? "lines+markers" : "lines", name: literal(line.name), x: line.x, y: line.y,
      line: { color: line.best ? look.colours[1] : faded(look.colours[0], 0.35), width: line.best ? 2.5 : 1.5 },
      marker: { size: 5 }, hovertemplate: "%{y:.4~g}, step %{x:,d}",
    }));
    return [found, layout(look, { height: 320, hovermode: "closest", xaxis: { tickformat: ",d" } })];
  }

  const KINDS = { curves: drawCurves, numbers: drawNumbers, entropy: drawEntropy, parallel: drawParallel,
                  decides: drawDecides, over: drawOver };

  function draw(box) {
    const kind = box.dataset.figure;
    let plot = box.querySelector(".plot");
    if (!plot) {
      if (kind === "curves") {
        const content = data.curves[box.dataset.group].plots[box.dataset.plot];
        const name = make("div", content.title, "name");
        const words = [content.unit, content.about].filter(Boolean).join(" · ");
        if (words) name.append(make("span", `  ${words}`));
        box.append(name);
      }
      plot = make("div", "", "plot");
      box.append(plot);
    }
    const [found, look] = KINDS[kind](box, theme());
    Plotly.react(plot, found, look, CONFIG);
    if (!drawn.has(box)) {
      drawn.add(box);
      if (kind === "curves") plot.on("plotly_relayout", (change) => together(plot, change));
    }
  }

  function together(from, change) { // a stretch enlarged in one figure is enlarged in all
    const low = change["xaxis.range[0]"] ?? change["xaxis.range"]?.[0];
    const high = change["xaxis.range[1]"] ?? change["xaxis.range"]?.[1];
    const reset = change["xaxis.autorange"] === true;
    const wanted = reset ? whole : [low, high];
    if (wanted[0] === undefined || String(wanted) === String(range)) return;
    range = wanted;
    for (const box of drawn) {
      const plot = box.querySelector(".plot");
      if (box.dataset.figure !== "curves" || (plot === from && !reset)) continue;
      Plotly.relayout(plot, { "xaxis.range": [...range] });
    }
  }

  const figures = [...document.querySelectorAll(".figure")];
  const drawAll = () => figures.forEach(draw);
  if (figures.length) {
    const near = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting && !drawn.has(entry.target)) draw(entry.target);
      }
    }, { rootMargin: "800px" });
    figures.forEach((box) => near.observe(box));
    const later = window.requestIdleCallback || ((work) => setTimeout(work, 50));
    const next = () => { // the others when there is time, so that the whole page is there
      const box = figures.find((each) => !drawn.has(each));
      if (box) { draw(box); later(next); }
    };
    later(next);
    dark.addEventListener("change", () => drawn.forEach(draw));
  }
  let opened = [];
  addEventListener("beforeprint", () => {
    printing = true;
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((each) => { each.open = true; });
    drawAll();
  });
  addEventListener("afterprint", () => {
    printing = false;
    opened.forEach((each) => { each.open = false; });
    drawAll();
  });

  // colours of runs beside their names
  document.querySelectorAll(".run[data-run]").forEach((name) => {
    const paint = () => name.style.setProperty("--of-run", theme().colours[name.dataset.run % LIGHT.length]);
    paint();
    dark.addEventListener("change", paint);
  });

  // contents: which part is read
  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
  const reading = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) links.get(target.id)?.classList.toggle("here", isIntersecting);
  }, { rootMargin: "-25% 0px -70% 0px" });
  document.querySelectorAll("main section").forEach((part) => reading.observe(part));

  // settings: rows whose key or value holds the words
  document.querySelectorAll("[data-filter]").forEach((input) => {
    const rows = [...input.closest("details").querySelectorAll(`table.${input.dataset.filter} tbody tr`)];
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      rows.forEach((row) => { row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word)); });
    });
  });

  // commands
  document.querySelectorAll(".copy").forEach((button) => {
    button.addEventListener("click", async () => {
      const code = button.previousElementSibling;
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(code); // where a page may not: a key does it
        button.textContent = "selected";
      }
      setTimeout(() => { button.textContent = "copy"; }, 1600);
    });
  });

  // pictures over time
  function viewer(strip) {
    const rows = [...strip.querySelectorAll("tbody tr")];
    const times = [...strip.querySelectorAll("thead th")].slice(1).map((each) => each.textContent);
    const dialog = make("dialog", "", "viewer");
    const what = make("b");
    const close = make("button", "close");
    const bar = make("div", "", "bar");
    bar.append(what, close);
    const shots = make("div", "", "shots");
    const images = [["image", "image"], ["attention", "class attention"], ["pca", "components"]].map(([kind, words]) => {
      const figure = make("figure");
      const image = make("img");
      figure.append(image, make("figcaption", words));
      shots.append(figure);
      return [kind, image, figure];
    });
    const back = make("button", "‹"), slider = make("input"), on = make("button", "›"), when = make("output");
    back.setAttribute("aria-label", "earlier");
    on.setAttribute("aria-label", "later");
    Object.assign(slider, { type: "range", min: 0, max: times.length - 1, step: 1 });
    slider.setAttribute("aria-label", "moment");
    const time = make("div", "", "time");
    time.append(back, slider, on, when);
    time.hidden = times.length < 2;
    dialog.append(bar, shots, time);
    document.body.append(dialog);
    let row = 0, column = 0;

    function show(newRow, newColumn) {
      row = (newRow + rows.length) % rows.length;
      column = Math.min(Math.max(newColumn, 0), times.length - 1);
      const cell = rows[row].querySelectorAll("td")[column];
      what.textContent = rows[row].querySelector("th span").textContent;
      for (const [kind, image, figure] of images) {
        const found = (kind === "image" ? rows[row] : cell).querySelector(`img.${kind}`);
        figure.hidden = !found;
        if (found) { image.src = found.src; image.alt = found.alt; }
      }
      slider.value = column;
      when.textContent = times[column];
    }
    back.addEventListener("click", () => show(row, column - 1));
    on.addEventListener("click", () => show(row, column + 1));
    slider.addEventListener("input", () => show(row, Number(slider.value)));
    close.addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    dialog.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      show(row + step[0], column + step[1]);
    });
    const openAt = (image) => {
      const cell = image.closest("td");
      const at = cell ? [...cell.parentElement.querySelectorAll("td")].indexOf(cell) : times.length - 1;
      show(rows.indexOf(image.closest("tr")), at);
      dialog.showModal();
    };
    show(0, times.length - 1);
    strip.querySelectorAll("img").forEach((image) => {
      image.addEventListener("click", () => openAt(image));
      image.addEventListener("keydown", (event) => { if (event.key === "Enter") openAt(image); });
    });
    strip.querySelectorAll("[data-kind]").forEach((button) => {
      button.addEventListener("click", () => {
        strip.dataset.shown = button.dataset.kind;
        strip.querySelectorAll("[data-kind]").forEach((each) => each.setAttribute("aria-pressed", each === button));
      });
    });
  }
  document.querySelectorAll(".strip").forEach(viewer);
})();
