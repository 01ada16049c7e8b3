"use strict";
// Everything a user wrote reaches the page through textContent or setAttribute, never as markup.

const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function remembered(store, key, value) {
  try {
    if (value === undefined) return store.getItem(key);
    store.setItem(key, value);
  } catch { /* a browser may refuse storage to files */ }
  return null;
}

function startTheme() {
  const button = byId("theme"), root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const chosen = remembered(localStorage, "dbtrain-theme");
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  const isDark = () => (root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`); };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remembered(localStorage, "dbtrain-theme", root.dataset.theme);
    label();
  });
  dark.addEventListener("change", label);
  button.hidden = false;
  label();
}

function startAge() {
  const built = Date.parse(document.body.dataset.built);
  const tell = () => {
    const minutes = Math.floor((Date.now() - built) / 60000);
    const age = minutes < 1 ? "just now" : minutes < 120 ? `${minutes} min ago` : minutes < 2880 ? `${Math.floor(minutes / 60)} h ago` : `${Math.floor(minutes / 1440)} days ago`;
    byId("age").textContent = ` (${age})`;
  };
  tell();
  setInterval(tell, 30000);
}

// Links within a page go there without touching the address, which keeps what the table was asked for.
function startJumps() {
  for (const link of document.querySelectorAll('a[href^="#"]')) {
    link.addEventListener("click", (event) => {
      if (event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
      const goal = document.querySelector(link.hash);
      event.preventDefault();
      goal.tabIndex = -1;
      goal.focus({ preventScroll: true });
      goal.scrollIntoView();
    });
  }
}

// A selector that finds the focused element again on the same page loaded anew; none for an element without a name.
function focusedPlace() {
  const at = document.activeElement, href = at?.getAttribute("href"), column = at?.closest("th[data-name]")?.dataset.name;
  if (at?.id) return `#${CSS.escape(at.id)}`;
  if (column) return `th[data-name="${CSS.escape(column)}"] button`;
  return href ? `a[href="${CSS.escape(href)}"]` : "";
}

// A page of an ongoing run loads itself again, unless the reader stops it; where one was reading is kept.
function startLive() {
  const seconds = Number(document.body.dataset.refresh), button = byId("live");
  if (!seconds || !button) return;
  const key = `dbtrain-scroll ${location.pathname}`, at = remembered(sessionStorage, key);
  if (at) {
    const [top, table, place] = JSON.parse(at);
    scrollTo({ top, behavior: "instant" });
    if (byId("scroll")) { byId("scroll").scrollTop = table; byId("scroll").dispatchEvent(new Event("scroll")); }
    if (place) document.querySelector(place)?.focus({ preventScroll: true });
    remembered(sessionStorage, key, "");
  }
  const set = (on) => { button.setAttribute("aria-pressed", on); button.textContent = on ? "Live" : "Paused"; remembered(sessionStorage, "dbtrain-paused", on ? "" : "1"); };
  set(remembered(sessionStorage, "dbtrain-paused") !== "1");
  button.addEventListener("click", () => set(button.getAttribute("aria-pressed") !== "true"));
  setInterval(() => {
    if (button.getAttribute("aria-pressed") !== "true" || document.hidden || document.activeElement?.matches("input, select")) return;
    remembered(sessionStorage, key, JSON.stringify([scrollY, byId("scroll")?.scrollTop ?? 0, focusedPlace()]));
    location.reload();
  }, seconds * 1000);
}

function startCopying() {
  for (const button of document.querySelectorAll(".copy")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const code = button.closest(".snippet").querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }
}

const LABELS = {
  id: "Subject", class: "Class", state: "State", attempts: "Attempts", seconds: "Seconds", device_s: "Device s", rate: "Steps/s", loss: "Loss",
  warnings: "Warnings", finished: "Finished",
};
const DIGITS = { attempts: 0, seconds: 1, device_s: 1, rate: 2, loss: 4 };
const KEPT_ON_PHONES = new Set(["id", "state", "dino", "seconds"]);
const ROW = 40, SPARE = 12, CARDS = 60;

function startTable() {
  const source = byId("data");
  if (!source) return;
  const { columns, shown, states, scores, rows } = JSON.parse(source.textContent);
  const labels = { ...LABELS, ...scores };
  const at = Object.fromEntries(columns.map((name, i) => [name, i]));
  const textual = new Set(["id", "class", "state", "warnings", "finished"]);
  const haystack = rows.map((row) => ["id", "class", "state", "warnings", "reason"].map((name) => row[at[name]]).join("\n").toLowerCase());
  const collator = new Intl.Collator(undefined, { numeric: true });
  const want = { q: "", state: "", class: "", warned: "", sort: "id", view: "table" };
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) if (key in want) want[key] = value;
  let found = [], first = -1, last = -1, printing = false;

  const page = (row) => `subjects/${encodeURIComponent(row[at.id])}/index.html`;
  const written = (row, name) => {
    const value = row[at[name]];
    if (value === null || value === "") return "";
    if (name === "finished") return value.replace("T", " ").replace(/:\d\dZ$/, "");
    return textual.has(name) ? value : value.toFixed(DIGITS[name] ?? 3);
  };
  const stated = (name) => {
    const span = element("span", { class: "state" }, name);
    span.classList.add(states.includes(name) ? `state-${name}` : "state-other");
    return span;
  };

  function matcher() {
    const tests = [];
    for (const word of want.q.toLowerCase().split(/\s+/).filter(Boolean)) {
      const compared = /^([a-z_-]+)(<=|>=|<|>|=)([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)$/.exec(word), name = compared?.[1].replace("-", "_");
      if (compared && name in at && !textual.has(name)) {
        const limit = Number(compared[3]), i = at[name];
        const holds = { "<": (v) => v < limit, ">": (v) => v > limit, "<=": (v) => v <= limit, ">=": (v) => v >= limit, "=": (v) => v === limit }[compared[2]];
        tests.push((row) => row[i] !== null && holds(row[i]));
      } else tests.push((row, i) => haystack[i].includes(word));
    }
    if (want.state) tests.push((row) => row[at.state] === want.state);
    if (want.class) tests.push((row) => row[at.class] === want.class);
    if (want.warned) tests.push((row) => row[at.warnings] !== "");
    return (row, i) => tests.every((test) => test(row, i));
  }

  // Rows without a value stand last in either direction; equal ones keep the order of their names.
  function sorted(chosen) {
    const down = want.sort.startsWith("-"), name = want.sort.replace("-", ""), i = at[name] ?? 0, sign = down ? -1 : 1;
    const empty = (value) => value === null || value === "";
    const compare = textual.has(columns[i]) ? collator.compare : (a, b) => a - b;
    return chosen.sort((a, b) => {
      const x = rows[a][i], y = rows[b][i];
      if (empty(x) || empty(y)) return empty(x) - empty(y) || a - b;
      return sign * compare(x, y) || a - b;
    });
  }

  function update() {
    const matches = matcher();
    found = sorted(rows.reduce((chosen, row, i) => { if (matches(row, i)) chosen.push(i); return chosen; }, []));
    const down = want.sort.startsWith("-"), name = want.sort.replace("-", "");
    for (const cell of byId("head").children) {
      if (cell.dataset.name === name) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    }
    byId("status").textContent = `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} subjects, by ${labels[name] ?? "Subject"}, ${down ? "descending" : "ascending"}`;
    byId("table").setAttribute("aria-rowcount", found.length + 1);
    const table = want.view !== "gallery";
    byId("as-table").setAttribute("aria-pressed", table);
    byId("as-gallery").setAttribute("aria-pressed", !table);
    byId("scroll").hidden = !table;
    byId("gallery").hidden = table;
    if (table) { byId("scroll").scrollTop = 0; first = -1; draw(); byId("more").hidden = true; }
    else { byId("gallery").replaceChildren(); addCards(); }
    const kept = new URLSearchParams(Object.entries(want).filter(([key, value]) => value && !(key === "sort" && value === "id") && !(key === "view" && value === "table")));
    try { history.replaceState(null, "", `#${kept}`); } catch { /* no history for this page */ }
  }

  function line(position) {
    const row = rows[found[position]], tr = element("tr", { "aria-rowindex": position + 2 });
    for (const name of shown) {
      const cell = element(name === "id" ? "th" : "td", name === "id" ? { scope: "row" } : {});
      if (name === "id") cell.append(element("a", { href: page(row), "data-position": position }, row[at.id]));
      else if (name === "state") cell.append(stated(row[at.state]));
      else cell.textContent = written(row, name);
      if (name === "warnings" || name === "class") cell.title = row[at[name]];
      if (name === "state" && row[at.reason]) cell.title = row[at.reason];
      if (!textual.has(name)) cell.classList.add("n");
      if (!KEPT_ON_PHONES.has(name)) cell.classList.add("less");
      tr.append(cell);
    }
    return tr;
  }

  function pad(count) {
    const cell = element("td", { colspan: shown.length });
    cell.style.height = `${count * ROW}px`;
    return element("tr", { class: "pad", "aria-hidden": "true" }, cell);
  }

  // Only the rows in sight are in the document, and a few around them; two empty rows stand for the others.
  function draw() {
    const box = byId("scroll");
    const from = printing ? 0 : Math.max(0, Math.floor(box.scrollTop / ROW) - SPARE);
    const to = printing ? found.length : Math.min(found.length, Math.ceil((box.scrollTop + innerHeight) / ROW) + SPARE);
    if (from === first && to === last) return;
    const focused = document.activeElement?.dataset?.position;
    [first, last] = [from, to];
    const lines = [];
    for (let position = from; position < to; position++) lines.push(line(position));
    byId("body").replaceChildren(...(from ? [pad(from)] : []), ...lines, ...(to < found.length ? [pad(found.length - to)] : []));
    if (focused !== undefined) byId("body").querySelector(`a[data-position="${focused}"]`)?.focus({ preventScroll: true });
  }

  function walk(event) {
    const position = Number(document.activeElement?.dataset?.position ?? -1);
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 15, PageUp: -15, Home: -Infinity, End: Infinity }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey || event.target.closest("thead")) return;
    event.preventDefault();
    const goal = Math.min(Math.max(position < 0 && step > 0 ? 0 : position + step, 0), found.length - 1), box = byId("scroll");
    const top = goal * ROW, room = box.clientHeight - 2 * ROW;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top > box.scrollTop + room) box.scrollTop = top - room;
    draw();
    byId("body").querySelector(`a[data-position="${goal}"]`)?.focus({ preventScroll: true });
  }

  function addCards() {
    const gallery = byId("gallery"), begin = gallery.childElementCount;
    const score = shown.includes("dino") ? "dino" : shown.includes("clip_i") ? "clip_i" : "loss";
    gallery.append(...found.slice(begin, begin + CARDS).map((i) => {
      const row = rows[i], pair = element("span", { class: "pair" });
      for (const [name, word] of [["photo", "photo"], ["sample", "sample"]]) {
        const file = row[at[name]];
        pair.append(file ? element("img", { src: `subjects/${encodeURIComponent(row[at.id])}/${encodeURIComponent(file)}`, alt: `${word} of ${row[at.id]}`, loading: "lazy", decoding: "async", width: 96, height: 96 }) : element("span", { class: "blank" }));
      }
      const value = written(row, score);
      return element("div", { class: "card" }, element("a", { href: page(row) }, pair, element("span", { class: "name" }, row[at.id])),
        element("span", { class: "sub" }, row[at.state] === "finished" ? row[at.class] : stated(row[at.state]), element("b", {}, value && `${labels[score]} ${value}`)));
    }));
    byId("more").hidden = gallery.childElementCount >= found.length;
  }

  const options = (select, name) => {
    for (const value of [...new Set(rows.map((row) => row[at[name]]))].filter(Boolean).sort(collator.compare)) select.append(element("option", { value }, value));
    select.value = want[name];
    select.addEventListener("change", () => { want[name] = select.value; update(); });
  };
  for (const name of shown) {
    const cell = element("th", { scope: "col", "data-name": name }, element("button", { type: "button" }, labels[name] ?? name));
    if (!textual.has(name)) cell.classList.add("n");
    if (!KEPT_ON_PHONES.has(name)) cell.classList.add("less");
    cell.firstChild.addEventListener("click", () => { want.sort = want.sort === name ? `-${name}` : name; update(); });
    byId("head").append(cell);
  }
  options(byId("state"), "state");
  options(byId("class"), "class");
  byId("find").value = want.q;
  byId("warned").checked = Boolean(want.warned);
  byId("warned").parentElement.hidden = !shown.includes("warnings");
  let timer = 0;
  byId("find").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => { want.q = byId("find").value; update(); }, 60); });
  byId("warned").addEventListener("change", () => { want.warned = byId("warned").checked ? "1" : ""; update(); });
  byId("as-table").addEventListener("click", () => { want.view = "table"; update(); });
  byId("as-gallery").addEventListener("click", () => { want.view = "gallery"; update(); });
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  byId("scroll").addEventListener("scroll", draw, { passive: true });
  byId("scroll").addEventListener("keydown", walk);
  byId("more").addEventListener("click", addCards);
  new IntersectionObserver((seen) => { if (seen.some((each) => each.isIntersecting) && !byId("more").hidden) addCards(); }, { rootMargin: "400px" }).observe(byId("more"));
  addEventListener("beforeprint", () => {
    printing = true;
    first = -1;
    if (want.view !== "gallery") { draw(); return; }
    while (!byId("more").hidden) addCards();
    for (const image of byId("gallery").querySelectorAll("img")) image.loading = "eager";
  });
  addEventListener("afterprint", () => { printing = false; first = -1; draw(); });
  addEventListener("resize", draw);
  byId("tools").hidden = false;
  update();
}

startTheme();
startAge();
startJumps();
startTable();
startLive();
startCopying();
