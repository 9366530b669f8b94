"use strict";
// Tables are whole without this: it lets their readers sort and filter them.
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  [...table.tHead.rows[0].cells].forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const known = (row) => row.cells[place].dataset.value;
    const order = (a, b) =>
      known(a) !== undefined && known(b) !== undefined
        ? known(a) - known(b)
        : (known(a) === undefined) - (known(b) === undefined) ||
          a.cells[place].textContent.localeCompare(b.cells[place].textContent, "en", { numeric: true });
    button.addEventListener("click", () => {
      const down = head.ariaSort === "ascending";
      for (const other of head.parentElement.cells) other.ariaSort = null;
      head.ariaSort = down ? "descending" : "ascending";
      body.append(...rows.sort((a, b) => (down ? -order(a, b) : order(a, b))));
    });
  });
  if (rows.length < 8) continue;
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = `Filter ${rows.length} rows`;
  field.setAttribute("aria-label", field.placeholder);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
  table.parentElement.before(field);
}
