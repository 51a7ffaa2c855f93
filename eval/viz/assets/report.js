// The report's figures, and what answers to a hand: zoom, filter, copy, pictures over time.
"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // figures; the page's style has their colours
  const axis = { automargin: true, fixedrange: true, zeroline: false, exponentformat: "e", ticks: "outside", tickcolor: "rgba(0,0,0,0)" };
  const template = { layout: {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", size: 12 },
    margin: { l: 8, r: 10, t: 8, b: 8 }, hovermode: "x unified", hoverdistance: -1, hoverlabel: { namelength: -1 },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", showlegend: false,
    legend: { orientation: "h", x: 0, y: -0.16, yanchor: "top", font: { size: 11 } }, xaxis: axis, yaxis: axis,
  } };
  const config = { displayModeBar: false, responsive: true, doubleClick: "reset", showTips: false };
  const curves = []; // a stretch enlarged in one of them is enlarged in all

  async function enlarge({ target, change }) {
    const range = [0, 1].map((end) => change[`xaxis.range[${end}]`] ?? change["xaxis.range"]?.[end]);
    if (range.includes(undefined)) return;
    const differ = (plot) => plot !== target && String(plot.layout.xaxis.range) !== String(range);
    for (const plot of curves.filter(differ)) await Plotly.relayout(plot, { "xaxis.range": [...range] });
  }

  async function drawAll() {
    for (const box of all("[data-figure]")) {
      const { data, layout } = JSON.parse(box.firstChild.textContent);
      await Plotly.newPlot(box, data, { ...layout, template }, config);
      if (box.dataset.figure === "curves") {
        curves.push(box);
        box.on("plotly_relayout", (change) => enlarge({ target: box, change }));
      }
      await new Promise((done) => { setTimeout(done); }); // the page answers meanwhile
    }
  }
  drawAll();

  // contents: which part is read
  const links = new Map(all("nav a").map((a) => [a.hash.slice(1), a]));
  const reading = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) links.get(target.id)?.classList.toggle("here", isIntersecting);
  }, { rootMargin: "-25% 0px -70% 0px" });
  all("main > section").forEach((part) => reading.observe(part));

  // settings: rows whose key or value holds the words
  all("[data-filter]").forEach((input) => input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of all("tbody tr", input.closest("details"))) {
      row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    }
  }));

  all(".copy").forEach((button) => button.addEventListener("click", async () => {
    const code = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(code); // where a page may not: a key does it
      button.textContent = "selected";
    }
    setTimeout(() => { button.textContent = "copy"; }, 1600);
  }));

  // pictures over time: of a row and a column of their table, in a dialog
  const dialog = document.querySelector("dialog"), slider = dialog.querySelector("input");
  let rows = [], row = 0;

  function show(newRow, column) {
    row = (newRow + rows.length) % rows.length;
    const times = all("thead th", rows[row].closest("table")).slice(1);
    slider.max = times.length - 1;
    slider.value = column; // within its ends
    slider.parentElement.hidden = times.length < 2;
    dialog.querySelector("output").textContent = times[slider.value].textContent;
    dialog.querySelector("b").textContent = rows[row].querySelector("th span").textContent;
    for (const image of all("img", dialog)) {
      const cell = rows[row].children[image.className === "image" ? 0 : 1 + Number(slider.value)];
      const found = cell.querySelector(`img.${image.className}`);
      image.parentElement.hidden = !found;
      if (found) Object.assign(image, { src: found.src, alt: found.alt });
    }
  }
  slider.addEventListener("input", () => show(row, slider.value));
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    show(row + step[0], Number(slider.value) + step[1]);
  });
  all(".strip img").forEach((image) => {
    const open = () => {
      rows = all("tbody tr", image.closest("table"));
      const column = image.closest("td") ? image.closest("td").cellIndex - 1 : 1e6; // the last
      show(rows.indexOf(image.closest("tr")), column);
      dialog.showModal();
    };
    image.addEventListener("click", open);
    image.addEventListener("keydown", (event) => { if (event.key === "Enter") open(); });
  });
})();
