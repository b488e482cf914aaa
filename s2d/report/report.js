"use strict";
// One page, no network: every picture is an <img class="source"> of a view's row, and the rest of the page refers to those.

const COLUMN_TITLES = JSON.parse(document.getElementById("column-titles").textContent);
const views = [...document.querySelectorAll(".view")];
const store = (() => { try { return window.localStorage; } catch { return null; } })();

// Light and dark ------------------------------------------------------------------------------------------------------
const root = document.documentElement;
root.dataset.theme = store?.getItem("s2d-theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  try { store?.setItem("s2d-theme", root.dataset.theme); } catch { /* private window: the choice is not kept */ }
});

// Error maps ----------------------------------------------------------------------------------------------------------
// Mean absolute difference over the channels, black → red → yellow → white at 0.3; pixels that show nothing stay grey.
const FULL_SCALE = 0.3;
const ready = (image) => (image.complete ? undefined : image.decode());
const hasError = (image) => !["truth", "support"].includes(image.dataset.column);
const imageOf = (view, column) => view.querySelector(`img.source[data-column="${column}"]`);

function pixelsOf(image, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

function errorMap(image, truth) {
  const width = truth.naturalWidth, height = truth.naturalHeight;
  const a = pixelsOf(image, width, height).data, b = pixelsOf(truth, width, height).data;
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const out = context.createImageData(width, height);
  for (let i = 0; i < a.length; i += 4) {
    out.data[i + 3] = 255;
    if (a[i + 3] < 128) { out.data[i] = out.data[i + 1] = out.data[i + 2] = 70; continue; }
    const error = (Math.abs(a[i] - b[i]) + Math.abs(a[i + 1] - b[i + 1]) + Math.abs(a[i + 2] - b[i + 2])) / (3 * 255);
    const level = Math.min(1, error / FULL_SCALE) * 3;
    out.data[i] = 255 * Math.min(1, level);
    out.data[i + 1] = 255 * Math.min(1, Math.max(0, level - 1));
    out.data[i + 2] = 255 * Math.min(1, Math.max(0, level - 2));
  }
  context.putImageData(out, 0, 0);
  return canvas;
}

let showErrors = false;
async function paintErrors(view) {
  view.querySelectorAll(".shot canvas").forEach((canvas) => canvas.remove());
  const truth = imageOf(view, "truth");
  if (!showErrors || !truth) return;
  await ready(truth);
  for (const image of view.querySelectorAll("img.source")) {
    if (!hasError(image)) continue;
    await ready(image);
    if (showErrors && !image.parentElement.querySelector("canvas")) image.parentElement.append(errorMap(image, truth));
  }
}
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting && showErrors && !entry.target.querySelector(".shot canvas")) paintErrors(entry.target);
}, { rootMargin: "400px" });
views.forEach((view) => seen.observe(view));
document.getElementById("errors")?.addEventListener("click", (event) => {
  showErrors = !showErrors;
  event.currentTarget.setAttribute("aria-pressed", showErrors);
  for (const view of views) {
    if (!showErrors) { paintErrors(view); continue; }
    const box = view.getBoundingClientRect();
    if (box.bottom > -400 && box.top < innerHeight + 400) paintErrors(view);
  }
});

// The slider ----------------------------------------------------------------------------------------------------------
class Compare {
  constructor(element) {
    this.stage = element.querySelector(".stage");
    this.caption = element.querySelector(".caption");
    this.choose = { left: element.querySelector(".choose-left"), right: element.querySelector(".choose-right") };
    this.error = element.querySelector(".compare-error");
    for (const side of ["left", "right"]) this.choose[side].addEventListener("change", () => this.draw());
    this.error.addEventListener("click", () => {
      this.error.setAttribute("aria-pressed", this.error.getAttribute("aria-pressed") !== "true");
      this.draw();
    });
    const move = (event) => {
      const box = this.stage.getBoundingClientRect();
      this.split(((event.clientX - box.left) / box.width) * 100);
    };
    this.stage.addEventListener("pointerdown", (event) => { this.stage.setPointerCapture(event.pointerId); move(event); });
    this.stage.addEventListener("pointermove", (event) => { if (event.buttons) move(event); });
    this.stage.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -2, ArrowRight: 2 }[event.key];
      if (step) { this.split(this.position + step); event.preventDefault(); }
    });
    this.split(50);
  }

  split(percent) {
    this.position = Math.max(0, Math.min(100, percent));
    this.stage.style.setProperty("--split", `${this.position}%`);
    this.stage.setAttribute("aria-valuenow", Math.round(this.position));
  }

  show(view, left, right) {
    this.view = view;
    const columns = [...view.querySelectorAll("img.source")].map((image) => image.dataset.column);
    const wanted = { left: left || this.choose.left.value, right: right || this.choose.right.value };
    for (const side of ["left", "right"]) {
      this.choose[side].replaceChildren(...columns.map((column) => new Option(COLUMN_TITLES[column], column)));
      const fallback = side === "left" ? columns[0] : columns[columns.length - 1];
      this.choose[side].value = columns.includes(wanted[side]) ? wanted[side] : fallback;
    }
    this.draw();
  }

  async draw() {
    const view = this.view, truth = imageOf(view, "truth");
    const errors = this.error.getAttribute("aria-pressed") === "true" && truth;
    const captions = [];
    for (const side of ["left", "right"]) {
      const column = this.choose[side].value, image = imageOf(view, column);
      const pane = this.stage.querySelector(`.pane.${side}`);
      await ready(image);
      if (errors && hasError(image)) {
        await ready(truth);
        pane.replaceChildren(errorMap(image, truth));
      } else {
        const copy = new Image();
        copy.src = image.src;
        copy.alt = COLUMN_TITLES[column];
        copy.draggable = false;
        pane.replaceChildren(copy);
      }
      this.stage.style.aspectRatio = `${image.naturalWidth} / ${image.naturalHeight}`;
      // A tall picture is kept inside the window by limiting its width.
      this.stage.style.maxWidth = `calc(72vh * ${image.naturalWidth / image.naturalHeight})`;
      this.stage.querySelector(`.tag.${side}`).textContent = COLUMN_TITLES[column];
      const numbers = image.closest("figure").querySelector(".numbers")?.textContent.trim();
      if (numbers) captions.push(`${COLUMN_TITLES[column]}: ${numbers}`);
    }
    this.caption.textContent = [view.dataset.name, ...captions].join("  ·  ");
  }
}

if (views.length) {
  const hero = new Compare(document.getElementById("hero"));
  const heroView = document.getElementById("hero-view");
  const first = views.find((view) => view.dataset.hero === "1") || views[0];
  heroView.append(...views.map((view, index) => new Option(view.dataset.name, index)));
  heroView.value = views.indexOf(first);
  hero.show(first, "stage1", imageOf(first, "stage3") ? "stage3" : "truth");
  heroView.addEventListener("change", () => hero.show(views[heroView.value]));

  const dialog = document.getElementById("dialog");
  const inDialog = new Compare(dialog);
  const open = (view, left, right) => { dialog.showModal(); inDialog.show(view, left, right); };
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  const visible = () => [...document.querySelectorAll(".view:not([hidden])")];
  const neighbour = (offset) => {
    const list = visible(), index = list.indexOf(inDialog.view);
    inDialog.show(list[(index + offset + list.length) % list.length]);
  };
  dialog.querySelector(".previous").addEventListener("click", () => neighbour(-1));
  dialog.querySelector(".next").addEventListener("click", () => neighbour(1));

  let picked = null;
  for (const view of views) {
    view.querySelector("h3 button").addEventListener("click", () => open(view, "stage1", imageOf(view, "stage3") ? "stage3" : "truth"));
    for (const shot of view.querySelectorAll(".shot")) {
      shot.addEventListener("click", () => {
        const column = shot.querySelector("img").dataset.column;
        if (picked && picked.view === view && picked.shot !== shot) {
          picked.shot.classList.remove("picked");
          const first = picked.shot.querySelector("img").dataset.column;
          picked = null;
          open(view, first, column);
          return;
        }
        picked?.shot.classList.remove("picked");
        picked = picked?.shot === shot ? null : { view, shot };
        if (picked) shot.classList.add("picked");
      });
    }
  }

  // Order and selection ---------------------------------------------------------------------------------------------
  const list = document.getElementById("views");
  const order = document.getElementById("order");
  const by = (key, sign) => (a, b) => {  // views without the number come last either way
    const missing = (a.dataset[key] === "") - (b.dataset[key] === "");
    return missing || sign * (Number(a.dataset[key]) - Number(b.dataset[key]));
  };
  const orders = {
    worst: by("final", 1),
    best: by("final", -1),
    gain: by("gain", -1),
    loss: by("gain", 1),
    name: (a, b) => a.dataset.name.localeCompare(b.dataset.name, undefined, { numeric: true }),
  };
  order.addEventListener("change", () => list.append(...[...views].sort(orders[order.value])));
  for (const button of document.querySelectorAll("[data-role-filter]")) {
    button.addEventListener("click", () => {
      for (const other of document.querySelectorAll("[data-role-filter]")) other.setAttribute("aria-pressed", other === button);
      for (const view of views) view.hidden = button.dataset.roleFilter !== "all" && !view.dataset.role.includes(button.dataset.roleFilter);
    });
  }
}
