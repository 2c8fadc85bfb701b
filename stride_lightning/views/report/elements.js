// The page's data, and the elements made of it. Texts from the data become nothing but text nodes.

const data = JSON.parse(document.getElementById("data").textContent);
const { queries, examples, pictures, sides } = data;
const find = (id) => document.getElementById(id);
const state = { query: null, pinned: null, search: "", sort: "score", down: true };

// ---- places and words ----------------------------------------------------------------------------------------

const place = new Map(queries.map((query, i) => [query.name, i]));
const column = new Map(examples.map((example, i) => [example.name, i]));
const appearances = examples.map(() => []); // by example: [query, text of the score]
queries.forEach((query, i) => {
  const all = query.ranked.flat();
  const [strongest] = [...all].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  query.strongest = strongest ? Math.abs(strongest[1]) : 0;
  query.strongestText = strongest ? strongest[3].split(" ±")[0] : "0";
  all.forEach(([example, , , text]) => appearances[example].push([i, text]));
});
const nameOf = (query) => (query.disagrees ? `Query ${query.name} ${data.mark}` : `Query ${query.name}`);
const words = (item, title) =>
  [
    title,
    item.target === null ? "" : `target ${item.target}`,
    ...item.facts.map((fact) => fact.join(" ")),
    ...item.texts.map(([name, text]) => `${name}\n${text}`),
  ]
    .join("\n")
    .toLowerCase();
queries.forEach((query) => (query.words = words(query, `query ${query.name}`)));
examples.forEach((example) => (example.words = words(example, `#${example.name}`)));

// ---- making elements --------------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "click") element.addEventListener("click", value);
    else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Text with the searched words marked. */
function marked(text) {
  const lower = text.toLowerCase();
  const parts = document.createDocumentFragment();
  let from = 0;
  if (state.search && lower.length === text.length) {
    for (let at = lower.indexOf(state.search); at >= 0; at = lower.indexOf(state.search, from)) {
      parts.append(text.slice(from, at), make("mark", {}, text.slice(at, at + state.search.length)));
      from = at + state.search.length;
    }
  }
  parts.append(text.slice(from));
  return parts;
}

function picture(item, title) {
  if (item.picture === null) return null;
  const image = make("img", { alt: title, decoding: "async" });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 100));
  image.src = pictures[item.picture];
  return image;
}

function factsOf(item) {
  const all = item.target === null ? item.facts : [["target", item.target], ...item.facts];
  return all.length
    ? make(
        "p",
        { class: "facts" },
        ...all.map(([name, value]) => make("span", {}, make("i", {}, marked(name)), marked(value))),
      )
    : null;
}

function textOf([name, text, length]) {
  const open = state.search !== "" && text.toLowerCase().includes(state.search);
  const body = make("div", { class: open ? "body" : "body clamped", dir: "auto" }, marked(text));
  const [shown, all] = [[...text].length, length].map((count) => count.toLocaleString("en"));
  if (shown !== all) body.append(make("small", {}, ` … cut: the first ${shown} of ${all} characters`));
  const more = make("button", { class: "more", type: "button", hidden: true, "aria-expanded": "false" }, "more");
  more.addEventListener("click", () => {
    const clamped = body.classList.toggle("clamped");
    more.textContent = clamped ? "more" : "less";
    more.setAttribute("aria-expanded", String(!clamped));
  });
  return make("div", { class: "text" }, name && name !== "text" ? make("small", {}, marked(name)) : null, body, more);
}

/** Texts that do not fit get a button. */
function measure() {
  for (const body of document.querySelectorAll(".body.clamped")) {
    body.nextElementSibling.hidden = body.scrollHeight <= body.clientHeight + 1;
  }
}
