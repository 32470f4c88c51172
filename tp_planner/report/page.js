"use strict";

// The page is complete without this: here it is folded, filtered, sorted, and explanations are kept inside the window.

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);
document.documentElement.classList.add("scripted");

// Folding

const blocks = all("details");
const setOpen = (open) => blocks.forEach((block) => (block.open = open));
byId("unfold").addEventListener("click", () => setOpen(true));
byId("fold").addEventListener("click", () => setOpen(false));

let openBeforePrint = [];
addEventListener("beforeprint", () => {
  openBeforePrint = blocks.map((block) => block.open);
  setOpen(true);
});
addEventListener("afterprint", () => blocks.forEach((block, n) => (block.open = openBeforePrint[n])));

// Filtering: "block_3/up" is found in "block_[0-31]/up"

const within = (ranges, number) =>
  ranges.slice(1, -1).split(",").some((range) => {
    const [first, last = first] = range.split("-").map(Number);
    return first <= number && number <= last;
  });

function found(text, wanted) {
  const numbers = wanted.match(/\d+/g);
  if (!numbers || text.includes(wanted)) return text.includes(wanted);
  const literal = wanted.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const pattern = new RegExp(literal.replace(/\d+/g, (number) => `(?:${number}|(\\[[\\d,-]+\\]))`), "g");
  return [...text.matchAll(pattern)].some(([, ...ranges]) =>
    ranges.every((range, n) => !range || within(range, Number(numbers[n]))),
  );
}

const searched = all("[data-search]");
let openBeforeFilter = null;

function filter(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length && !openBeforeFilter) openBeforeFilter = blocks.map((block) => block.open);
  for (const item of searched) item.hidden = !words.every((word) => found(item.dataset.search, word));
  for (const block of blocks) block.hidden = !block.querySelector(".layer:not([hidden])");
  if (words.length) setOpen(true);
  else if (openBeforeFilter) {
    blocks.forEach((block, n) => (block.open = openBeforeFilter[n]));
    openBeforeFilter = null;
  }
  const layers = all(".layer");
  byId("found").textContent = words.length ? `${layers.filter((layer) => !layer.hidden).length} of ${layers.length}` : "";
}

byId("filter").addEventListener("input", (event) => filter(event.target.value));
byId("filter").addEventListener("keydown", (event) => {
  if (event.key === "Escape") filter((event.target.value = ""));
});

// Sorting

const valueOf = (row, column) => {
  const cell = row.cells[column];
  const exact = cell.querySelector("data");
  return exact ? Number(exact.value) : cell.textContent.toLowerCase();
};
const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));

function sort(table, column) {
  const heads = all("thead th", table);
  const rising = heads[column].getAttribute("aria-sort") !== "ascending";
  const rows = all("tbody tr", table).map((row) => [valueOf(row, column), row]);
  rows.sort(([a], [b]) => (rising ? compare(a, b) : compare(b, a)));
  table.tBodies[0].append(...rows.map(([, row]) => row));
  heads.forEach((head, n) => head.setAttribute("aria-sort", n !== column ? "none" : rising ? "ascending" : "descending"));
}

for (const table of all("table.sortable"))
  all("thead button", table).forEach((button, column) => button.addEventListener("click", () => sort(table, column)));

// Explanations

function place(tip) {
  const shown = tip.querySelector(":scope > [role=tooltip]");
  tip.classList.remove("dismissed");
  const at = tip.getBoundingClientRect();
  const size = shown.getBoundingClientRect();
  const below = at.bottom + size.height + 8 < innerHeight;
  shown.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
  shown.style.top = `${Math.max(8, below ? at.bottom + 2 : at.top - size.height - 2)}px`;
}

for (const event of ["pointerover", "focusin"])
  document.addEventListener(event, ({ target }) => {
    const tip = target.closest?.(".tip");
    if (tip && !target.closest("[role=tooltip]")) place(tip);
  });
document.addEventListener("keydown", ({ key }) => {
  if (key === "Escape") all(".tip:hover, .tip:focus").forEach((tip) => tip.classList.add("dismissed"));
});
