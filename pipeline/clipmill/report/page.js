// A click on a column's head sorts by it, a second one the other way round; what has no value stays last.
document.querySelectorAll("table.sortable").forEach((table) => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => head.addEventListener("click", () => {
    const up = head.ariaSort === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up > 0 ? "ascending" : "descending");
    const value = (row) => row.cells[place].dataset.v ?? null;
    const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
    const rows = [...table.tBodies[0].rows].sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      return a === null || b === null ? (a === null) - (b === null) : up * compare(a, b);
    });
    table.tBodies[0].append(...rows);
  }));
});
