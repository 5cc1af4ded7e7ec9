/* Tables inside .sortable sort by the column whose head is clicked; inside .filtered a box above hides rows that lack its words. */
(function () {
  "use strict";

  function value(row, column) {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text.replace(/,/g, ""));
    return { text: text, number: /^[-+]?[\d.]/.test(text) && !Number.isNaN(number) ? number : null };
  }

  function compare(a, b) {
    if (a.number !== null && b.number !== null) return a.number - b.number;
    if (a.number !== null || b.number !== null) return a.number !== null ? -1 : 1;
    return a.text.localeCompare(b.text);
  }

  function sort(table, column, head) {
    const body = table.tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    const rows = Array.from(body.rows).map((row) => ({ row: row, value: value(row, column) }));
    rows.sort((a, b) => (down ? -1 : 1) * compare(a.value, b.value));
    rows.forEach((each) => body.appendChild(each.row));
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  }

  function filter(table, words, count) {
    let shown = 0;
    Array.from(table.tBodies[0].rows).forEach((row) => {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    });
    count.textContent = shown + " rows";
  }

  function prepare(frame) {
    const table = frame.querySelector("table");
    if (!table || table.dataset.ready) return;
    table.dataset.ready = "yes";
    Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
      head.tabIndex = 0;
      head.addEventListener("click", () => sort(table, column, head));
      head.addEventListener("keydown", (event) => {
        if (event.key === "Enter") sort(table, column, head);
      });
    });
    if (!frame.classList.contains("filtered")) return;
    const line = document.createElement("p");
    const box = document.createElement("input");
    const count = document.createElement("span");
    box.type = "search";
    box.placeholder = "words to look for, such as: tiny-chain 11% duet";
    box.setAttribute("aria-label", "Filter the table");
    box.addEventListener("input", () => filter(table, box.value.toLowerCase().split(/\s+/).filter(Boolean), count));
    line.className = "table-filter";
    line.append(box, count);
    frame.prepend(line);
    filter(table, [], count);
  }

  const all = () => document.querySelectorAll(".sortable").forEach(prepare);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", all);
  else all();
})();
