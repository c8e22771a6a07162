"use strict";

// Sorting: a button in each header of a sortable table; rows without a value stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.querySelectorAll("thead th")];
  for (const header of headers) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const opposite = { ascending: "descending", descending: "ascending" };
      const direction = opposite[header.ariaSort] ?? header.dataset.first;
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1;
      const value = (row) => {
        const cell = row.cells[header.cellIndex];
        const text = cell?.dataset.value ?? cell?.textContent.replaceAll(",", "") ?? "";
        return text === "–" ? "" : text;
      };
      const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        return x === "" || y === "" ? (x === "") - (y === "") : sign * compare(x, y);
      });
      table.tBodies[0].append(...rows);
    });
  }
}

// Copying.
for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(source);
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
}

// The cell under the pointer of a large confusion matrix, in words.
const readout = document.getElementById("readout");
if (readout) {
  const { labels, cells } = JSON.parse(document.getElementById("matrices").textContent);
  const counts = cells.map((list) => new Map(list.map(([i, j, n]) => [i * labels.length + j, n])));
  const totals = cells.map((list) => list.reduce((sums, [i, , n]) => ((sums[i] = (sums[i] ?? 0) + n), sums), {}));
  const svg = document.querySelector("svg.grid");
  readout.hidden = false;
  const read = (event) => {
    const box = svg.getBoundingClientRect();
    const [i, j] = [event.clientY - box.top, event.clientX - box.left].map((at) =>
      Math.floor((at - svg.dataset.margin) / svg.dataset.side),
    );
    if (!(i in labels && j in labels)) return;
    const chosen = document.querySelector("input[name=classes]:checked").id.split("-")[1];
    const count = counts[chosen].get(i * labels.length + j) ?? 0;
    const words = i === j ? `recognized as ${labels[i]}` : `of ${labels[i]} taken for ${labels[j]}`;
    readout.textContent = `${count} of ${totals[chosen][i] ?? 0} rows ${words}`;
  };
  svg.addEventListener("pointermove", read);
  svg.addEventListener("pointerdown", read);
}
