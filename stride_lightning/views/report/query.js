// One query and its ranked examples with bars.

/** All bars of a query share one scale; whiskers may reach below zero. */
function scaleOf(query) {
  const all = query.ranked.flat();
  const most = Math.max(...all.map(([, score, std]) => Math.abs(score) + (std ?? 0)), 0) || 1;
  const below = Math.max(...all.map(([, score, std]) => (std ?? 0) - Math.abs(score)), 0);
  return { zero: below / (most + below), unit: 1 / (most + below) };
}

function barOf([, score, std, text], { zero, unit }) {
  const percent = (share) => `${100 * share}%`;
  const fill = make("span", { class: "fill" });
  fill.style.left = percent(zero);
  fill.style.width = percent(Math.abs(score) * unit);
  const bar = make("div", { class: "bar", role: "img", "aria-label": `score ${text}` }, fill);
  if (zero > 0) {
    const line = make("span", { class: "zero" });
    line.style.left = percent(zero);
    bar.append(line);
  }
  if (std !== null) {
    const whisker = make("span", { class: "whisker" });
    whisker.style.left = percent(zero + (Math.abs(score) - std) * unit);
    whisker.style.width = percent(2 * std * unit);
    bar.append(whisker);
  }
  return bar;
}

function elsewhere(index) {
  const others = appearances[index].filter(([query]) => query !== state.query);
  if (!others.length) return make("p", { class: "elsewhere" }, "Shown for this query only.");
  const links = others.map(([query, text]) =>
    make("a", { href: hashOf(query, index) }, `query ${queries[query].name} `, make("i", {}, text)),
  );
  return make("p", { class: "elsewhere" }, "Also for", ...links);
}

function cardOf(entry, scale) {
  const [index] = entry;
  const example = examples[index];
  const pinned = state.pinned === index;
  const count = appearances[index].length;
  const pin = make(
    "button",
    { class: "pin", type: "button", "aria-expanded": String(pinned) },
    marked(`#${example.name}`),
    count > 1 ? " " : null,
    count > 1 ? make("small", {}, `in ${count} queries`) : null,
  );
  const card = make(
    "li",
    { class: pinned ? "card pinned" : "card", "data-example": example.name },
    picture(example, `training example ${example.name}`),
    make(
      "div",
      {},
      make("div", { class: "line" }, pin, make("span", { class: "score" }, entry[3])),
      barOf(entry, scale),
      factsOf(example),
      ...example.texts.map(textOf),
      pinned ? elsewhere(index) : null,
    ),
  );
  card.addEventListener("click", (event) => {
    if (event.target.closest("a, .more, .text, .elsewhere") || String(getSelection())) return;
    go(state.query, pinned ? null : index);
    document.querySelector(`.card[data-example="${example.name}"] .pin`)?.focus({ preventScroll: true });
  });
  return card;
}

const keys = {
  score: ([, score]) => Math.abs(score),
  position: ([index]) => Number(examples[index].name),
  std: ([, , std]) => std,
};

function sorted(entries) {
  const key = keys[state.sort];
  return [...entries].sort((a, b) => (state.down ? key(b) - key(a) : key(a) - key(b)));
}

function sortButtons() {
  const names = data.std === null ? ["score", "position"] : ["score", "position", "std"];
  const buttons = names.map((name) => {
    const chosen = state.sort === name;
    return make(
      "button",
      {
        type: "button",
        "data-sort": name,
        "aria-pressed": String(chosen),
        click: () => {
          state.down = chosen ? !state.down : name !== "position";
          state.sort = name;
          showQuery();
          document.querySelector(`[data-sort="${name}"]`).focus({ preventScroll: true });
        },
      },
      name === "std" ? data.std : name,
      chosen ? (state.down ? " ↓" : " ↑") : "",
    );
  });
  return make("div", { class: "sort", role: "group", "aria-label": "Order of examples" }, "Examples by", ...buttons);
}

function showQuery() {
  const main = find("query");
  if (state.query === null) {
    const clear = make("button", { type: "button", click: () => search("") }, "Clear search");
    main.replaceChildren(make("p", { class: "empty" }, `Nothing matches “${state.search}”.`, clear));
    return;
  }
  const query = queries[state.query];
  const scale = scaleOf(query);
  // A query that matches the search shows all its examples. Another query shows only the examples that match.
  const whole = query.words.includes(state.search);
  const columns = sides.map((side, number) => {
    const all = query.ranked[number];
    const shown = whole ? all : all.filter(([index]) => examples[index].words.includes(state.search));
    const count = shown.length < all.length ? `${shown.length} of ${all.length} match` : String(all.length);
    return make(
      "section",
      { class: "side" },
      make("h3", {}, side.name, make("small", {}, count)),
      make("p", { class: "meaning" }, side.meaning),
      shown.length
        ? make("ol", {}, ...sorted(shown).map((entry) => cardOf(entry, scale)))
        : make("p", { class: "empty" }, all.length ? "None of them matches the search." : side.none),
    );
  });
  const title = nameOf(query);
  main.replaceChildren(
    make(
      "section",
      { class: "shown" },
      picture(query, title),
      make("div", {}, make("h2", {}, marked(title)), factsOf(query), ...query.texts.map(textOf)),
    ),
    sortButtons(),
    make("div", { class: sides.length > 1 ? "sides two" : "sides" }, ...columns),
  );
  measure();
}
