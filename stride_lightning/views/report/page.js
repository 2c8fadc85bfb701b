// The list of queries, the search, and moving from query to query.

// ---- the list of queries ----------------------------------------------------------------------------------

const items = queries.map((query, i) => {
  const texts = query.texts.map(([, text]) => text.slice(0, 80));
  const about = [
    query.target === null ? "" : `target ${query.target}`,
    ...query.facts.filter(([name]) => !data.readout.includes(name)).map(([, value]) => value),
    ...texts,
  ].filter(Boolean);
  return make(
    "li",
    {},
    make(
      "a",
      { href: hashOf(i), "data-query": query.name },
      picture(query, ""),
      make(
        "span",
        { class: "named" },
        make("b", {}, nameOf(query)),
        make("span", { class: "about" }, about.join(" · ")),
      ),
      make("span", { class: "strongest", title: "strongest score" }, query.strongestText),
    ),
  );
});

const compare = new Intl.Collator("en", { numeric: true }).compare;
const orders = { position: () => 0, "strongest score": (a, b) => queries[b].strongest - queries[a].strongest };
if (queries.some((query) => query.target !== null))
  orders.target = (a, b) => compare(queries[a].target ?? "", queries[b].target ?? "");
let order = queries.map((_, i) => i);
let visible = order;

function showList() {
  const compared = orders[find("order").value];
  order = queries.map((_, i) => i).sort((a, b) => compared(a, b) || Number(queries[a].name) - Number(queries[b].name));
  find("queries").replaceChildren(...order.map((i) => items[i]));
  filter();
}

function filter() {
  const matches = new Set(examples.keys());
  if (state.search) examples.forEach((example, i) => example.words.includes(state.search) || matches.delete(i));
  const numQueries = queries.filter((query) => query.words.includes(state.search)).length;
  visible = order.filter(
    (i) => queries[i].words.includes(state.search) || queries[i].ranked.flat().some(([index]) => matches.has(index)),
  );
  const shown = new Set(visible);
  items.forEach((item, i) => (item.hidden = !shown.has(i)));
  const counted = (count, one, many) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
  find("status").textContent = state.search
    ? `${counted(numQueries, "query", "queries")} and ${counted(matches.size, "example", "examples")}`
    : counted(queries.length, "query", "queries");
}

function search(text) {
  state.search = text.trim().toLowerCase();
  if (find("search").value.trim().toLowerCase() !== state.search) find("search").value = text;
  filter();
  const here = [state.query, named().query, visible[0]].find((query) => visible.includes(query)) ?? null;
  if (here === null || here === state.query) {
    state.query = here;
    showQuery();
  } else go(here, state.pinned);
}

// ---- going from query to query ----------------------------------------------------------------------------

function hashOf(query, example = null) {
  return `#query-${queries[query].name}` + (example === null ? "" : `/example-${examples[example].name}`);
}

/** Show a query and name it in the address. */
function go(query, example = null) {
  history.replaceState(null, "", hashOf(query, example));
  follow();
}

/** The query and the example that the address names. */
function named() {
  const [, query, example] = /^#query-(\d+)(?:\/example-(\d+))?$/.exec(location.hash) ?? [];
  return { query: place.get(query), example: column.get(example) };
}

function follow() {
  const before = state.query;
  const address = named();
  state.query = address.query ?? visible[0] ?? 0;
  state.pinned = address.example ?? null;
  const linked = new Set(state.pinned === null ? [] : appearances[state.pinned].map(([i]) => i));
  items.forEach((item, i) => {
    if (i === state.query) item.firstChild.setAttribute("aria-current", "true");
    else item.firstChild.removeAttribute("aria-current");
    item.firstChild.classList.toggle("linked", linked.has(i));
  });
  showQuery();
  if (before === state.query) return;
  reveal(items[state.query].firstChild);
  const top = find("layout").offsetTop - find("tools").offsetHeight - 8;
  if (before !== null && scrollY > top) scrollTo({ top });
}

/** Scroll the list of queries, and nothing else, to one of them. */
function reveal(link) {
  const list = document.querySelector("nav");
  const [box, frame] = [link.getBoundingClientRect(), list.getBoundingClientRect()];
  const bottom = Math.min(frame.bottom, innerHeight);
  list.scrollTop += Math.min(0, box.top - frame.top - 4) + Math.max(0, box.bottom - bottom + 4);
  list.scrollLeft += Math.min(0, box.left - frame.left - 40) + Math.max(0, box.right - frame.right + 40);
}

function step(by) {
  const next = visible[visible.indexOf(state.query) + by];
  if (next !== undefined) go(next, state.pinned);
  return next;
}

document.addEventListener("keydown", (event) => {
  const field = event.target.closest("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inList = event.target.closest("nav");
  const ahead = ["j", "ArrowRight"].includes(event.key) && !field;
  const back = ["k", "ArrowLeft"].includes(event.key) && !field;
  const along = inList || event.target === find("search");
  const by = ahead || (along && event.key === "ArrowDown") ? 1 : back || (along && event.key === "ArrowUp") ? -1 : 0;
  if (by) {
    event.preventDefault();
    if (step(by) !== undefined && inList) items[state.query].firstChild.focus();
  } else if (event.key === "/" && !field) {
    event.preventDefault();
    find("search").focus();
  } else if (event.key === "Escape" && (state.search || state.pinned !== null)) {
    if (state.search) search("");
    else go(state.query);
  }
});

find("order").append(...Object.keys(orders).map((name) => make("option", {}, name)));
find("order").addEventListener("change", showList);
find("search").addEventListener("input", (event) => search(event.target.value));
addEventListener("hashchange", follow);
addEventListener("resize", measure);
for (const part of [find("tools"), find("layout"), document.querySelector("footer")]) part.hidden = false;
showList();
follow();
