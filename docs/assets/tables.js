/* Tables inside .sortable sort by the column whose head is clicked. Tables inside .filtered stand below a box that hides
   rows without its words, and below a list of the values of every column that data-choose-N="column=value" names, which
   opens at that value. */
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
  }

  function list(tables, wanted) {
    const [name, value] = wanted.split("=");
    const heads = (table) => Array.from(table.tHead.rows[0].cells, (head) => head.textContent.trim());
    const number = (table) => heads(table).indexOf(name);
    const text = (row) => row.cells[number(row.closest("table"))].textContent.trim();
    const values = new Set(tables.flatMap((table) => Array.from(table.tBodies[0].rows).map(text)));
    const select = document.createElement("select");
    const numbers = new Intl.Collator(undefined, { numeric: true });
    select.setAttribute("aria-label", name);
    select.append(new Option("every " + name, ""));
    Array.from(values).sort(numbers.compare).forEach((each) => select.append(new Option(each, each)));
    select.value = values.has(value) ? value : "";
    return { select, keeps: (row) => !select.value || text(row) === select.value };
  }

  /* The heading and the words in front of a table go with its rows. */
  function above(part, frame) {
    const found = [];
    let each = part;
    while (each.parentElement !== frame) each = each.parentElement;
    while ((each = each.previousElementSibling) && !each.querySelector("table, input")) {
      found.push(each);
      if (/^H\d$/.test(each.tagName)) return found;
    }
    return [];
  }

  function overlook(frame) {
    if (frame.dataset.ready) return;
    frame.dataset.ready = "yes";
    const tables = Array.from(frame.querySelectorAll("table"));
    const chosen = Object.keys(frame.dataset).filter((key) => key.startsWith("choose")).sort();
    const lists = chosen.map((key) => list(tables, frame.dataset[key]));
    const line = document.createElement("p");
    const box = document.createElement("input");
    const count = document.createElement("span");
    const heads = new Map(tables.map((table) => [table, above(table, frame)]));

    function look() {
      const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      tables.forEach((table) => {
        let here = 0;
        Array.from(table.tBodies[0].rows).forEach((row) => {
          const text = row.textContent.toLowerCase();
          row.hidden = !(words.every((word) => text.includes(word)) && lists.every((each) => each.keeps(row)));
          here += row.hidden ? 0 : 1;
        });
        [table, ...heads.get(table)].forEach((part) => { part.hidden = tables.length > 1 && !here; });
        shown += here;
      });
      count.textContent = shown + " rows";
    }

    box.type = "search";
    box.placeholder = "words to look for, such as: duet";
    box.setAttribute("aria-label", "Filter the table");
    box.addEventListener("input", look);
    lists.forEach((each) => each.select.addEventListener("change", look));
    line.className = "table-filter";
    line.append(...lists.map((each) => each.select), box, count);
    frame.prepend(line);
    look();
  }

  function all() {
    document.querySelectorAll(".sortable").forEach(prepare);
    document.querySelectorAll(".filtered").forEach(overlook);
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", all);
  else all();
})();
