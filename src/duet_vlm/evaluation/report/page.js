"use strict";
for (const section of document.querySelectorAll(".result")) {
  const table = section.querySelector("table");
  const bodies = [...table.tBodies];
  const heads = [...table.tHead.rows[0].cells];
  const form = section.querySelector(".filters");

  const valueOf = (body, index) => {
    const text = body.rows[0].cells[index].dataset.value;
    return text === undefined ? null : Number(text);
  };

  const sortBy = (index) => {
    const before = heads[index].getAttribute("aria-sort");
    // first the best of most columns: large numbers; the runs themselves in the order of the file
    const order = before === "none" ? (index ? "descending" : "ascending") : before === "ascending" ? "descending" : "ascending";
    heads.forEach((head, i) => head.setAttribute("aria-sort", i === index ? order : "none"));
    const sign = order === "ascending" ? 1 : -1;
    const sorted = bodies.map((body) => [valueOf(body, index), body]);
    sorted.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * (a - b)));
    table.append(...sorted.map(([, body]) => body));
  };

  const filter = () => {
    const { method, budget, status, kind } = form.elements;
    const words = method.value.trim().toLowerCase();
    const groups = new Set([...form.querySelectorAll("[name=group]:checked")].map((box) => box.value));
    let shown = 0;
    for (const body of bodies) {
      const { text, budget: own, status: state } = body.dataset;
      const wanted = text.includes(words) && (!budget.value || own === budget.value) && (!status.value || state === status.value);
      body.hidden = !wanted;
      shown += wanted;
    }
    for (const cell of table.querySelectorAll("[data-group]")) {
      const other = cell.dataset.kind !== undefined && kind.value && cell.dataset.kind !== kind.value;
      cell.hidden = other || !groups.has(cell.dataset.group);
    }
    form.querySelector(".shown").textContent = `${shown} of ${bodies.length} runs`;
  };

  heads.forEach((head, index) => head.firstElementChild.addEventListener("click", () => sortBy(index)));
  for (const body of bodies) {
    const button = body.querySelector("th.run button");
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") !== "true";
      button.setAttribute("aria-expanded", open);
      body.rows[1].hidden = !open;
    });
  }
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.querySelector("button").addEventListener("click", () => {
    form.reset();
    filter();
  });
  form.hidden = false;
  filter();
}
