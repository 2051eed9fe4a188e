// Progressive enhancement of all pages; they are readable without it.
import { connectWallet } from "./wallet.js";

const root = document.documentElement;

function switchTheme() {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try {
    localStorage.setItem("theme", root.dataset.theme);
  } catch {
    // No storage: the theme applies to this page only.
  }
}

// Ages are updated by the server's clock: the local one may be wrong, and a test chain's is ahead.
let skew = 0;
function noteClock() {
  skew = Number(document.body.dataset.now) - Date.now() / 1000;
}

const UNITS = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
function age(passed) {
  const seconds = Math.abs(passed);
  if (seconds < 2) return "now";
  const [unit, size] = UNITS.find(([, each]) => seconds >= each);
  const text = `${Math.trunc(seconds / size).toLocaleString("en").replaceAll(",", "\u2009")}\u00a0${unit}`;
  return passed > 0 ? `${text} ago` : `in ${text}`;
}

function tellAges() {
  const now = Date.now() / 1000 + skew;
  for (const time of document.querySelectorAll("time[datetime]:not([data-keep])")) {
    const text = age(now - Date.parse(time.dateTime) / 1000);
    if (time.textContent !== text) time.textContent = text;
  }
}

async function copy(button) {
  let kind = "good";
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
  } catch {
    kind = "bad";
  }
  button.classList.add(kind);
  setTimeout(() => button.classList.remove(kind), 1500);
}

// Reloads the content of the page, but not while a dialog, a selection or an input field is active.
const busy = () =>
  document.querySelector("dialog[open]") !== null ||
  String(getSelection() ?? "") !== "" ||
  document.activeElement?.closest("main input, main textarea, main select") != null;
let reading = false;
let again = false;

async function refresh() {
  if (busy() || document.hidden) {
    again = true;
    return;
  }
  if (reading) {
    again = true;
    return;
  }
  reading = true;
  again = false;
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store" });
    if (answer.ok || answer.status === 404) exchange(new DOMParser().parseFromString(await answer.text(), "text/html"));
  } catch {
    again = true; // The server is away; the next event, or the next look, tries again.
  } finally {
    reading = false;
  }
}

function exchange(fresh) {
  const before = document.querySelector("main");
  const after = fresh.querySelector("main");
  if (!after || busy()) {
    again = true;
    return;
  }
  const keyOf = (each) => each.closest("section")?.getAttribute("aria-labelledby") + (each.id || each.querySelector("summary")?.textContent.replace(/\d+/g, ""));
  const open = new Set([...before.querySelectorAll("details[open]")].map(keyOf));
  const known = new Set([...before.querySelectorAll("tr[data-row]")].map((row) => row.dataset.row));
  const scrolled = [...before.querySelectorAll(".scroll")].map((each) => each.scrollLeft);
  const focus = document.activeElement;
  const place = focus && before.contains(focus) ? [...before.querySelectorAll("a, button, summary, .scroll")].indexOf(focus) : -1;
  for (const kept of before.querySelectorAll("[data-stays]")) {
    const made = after.querySelector(`#${kept.id}`);
    if (!made) continue;
    Object.assign(kept.dataset, made.dataset);
    made.replaceWith(kept);
  }
  before.replaceChildren(...after.childNodes);
  for (const each of before.querySelectorAll("details")) each.open ||= open.has(keyOf(each));
  before.querySelectorAll(".scroll").forEach((each, at) => (each.scrollLeft = scrolled[at] ?? 0));
  for (const row of before.querySelectorAll("tr[data-row]")) {
    if (known.size && !known.has(row.dataset.row)) row.classList.add("fresh");
  }
  if (place >= 0) before.querySelectorAll("a, button, summary, .scroll")[place]?.focus({ preventScroll: true });
  const foot = fresh.getElementById("foot");
  if (foot) document.getElementById("foot")?.replaceWith(foot);
  Object.assign(document.body.dataset, fresh.body.dataset);
  mark(true);
  noteClock();
  tellAges();
}

function mark(on) {
  document.getElementById("live")?.classList.toggle("on", on);
}

function concerns(change) {
  const wanted = document.body.dataset.reload;
  if (wanted === "all" || change.everything) return true;
  if (change.kind === "finality") return true;
  return wanted === "job" && change.jobs.includes(Number(document.body.dataset.job));
}

// A page in the browser's back-forward cache must not keep a stream open.
let stream = null;
function follow() {
  stream = new EventSource(`/live?since=${encodeURIComponent(document.body.dataset.change)}`);
  let soon = 0;
  stream.addEventListener("open", () => mark(true));
  stream.addEventListener("error", () => mark(false));
  stream.addEventListener("change", (event) => {
    if (!concerns(JSON.parse(event.data))) return;
    clearTimeout(soon);
    soon = setTimeout(refresh, 250);
  });
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, textarea, select, dialog, [contenteditable]");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    document.getElementById("q")?.select();
  }
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.hasAttribute("data-theme-switch")) switchTheme();
  if (button?.dataset.copy) copy(button);
});
noteClock();
tellAges();
setInterval(tellAges, 5000);
if (document.body.dataset.reload && "EventSource" in window) {
  follow();
  setInterval(() => again && refresh(), 2000);
  addEventListener("pagehide", () => stream.close());
  addEventListener("pageshow", (event) => event.persisted && follow());
}
document.querySelector("nav.main [aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
connectWallet();
