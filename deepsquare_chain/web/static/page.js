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
let clockSkew = 0;
function syncClock() {
  clockSkew = Number(document.body.dataset.now) - Date.now() / 1000;
}

const UNITS = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
function ageText(elapsed) {
  const seconds = Math.abs(elapsed);
  if (seconds < 2) return "now";
  const [unit, size] = UNITS.find(([, unitSeconds]) => seconds >= unitSeconds);
  const text = `${Math.trunc(seconds / size).toLocaleString("en").replaceAll(",", "\u2009")}\u00a0${unit}`;
  return elapsed > 0 ? `${text} ago` : `in ${text}`;
}

function updateAges() {
  const now = Date.now() / 1000 + clockSkew;
  for (const time of document.querySelectorAll("time[datetime]:not([data-keep])")) {
    const text = ageText(now - Date.parse(time.dateTime) / 1000);
    if (time.textContent !== text) time.textContent = text;
  }
}

async function copyText(button) {
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
let refreshing = false;
let refreshNeeded = false;

async function refresh() {
  if (busy() || document.hidden) {
    refreshNeeded = true;
    return;
  }
  if (refreshing) {
    refreshNeeded = true;
    return;
  }
  refreshing = true;
  refreshNeeded = false;
  try {
    const response = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store" });
    if (response.ok || response.status === 404) replaceContent(new DOMParser().parseFromString(await response.text(), "text/html"));
  } catch {
    refreshNeeded = true; // The server is away; the next event or attempt reloads the page.
  } finally {
    refreshing = false;
  }
}

function replaceContent(fresh) {
  const before = document.querySelector("main");
  const after = fresh.querySelector("main");
  if (!after || busy()) {
    refreshNeeded = true;
    return;
  }
  const keyOf = (details) => details.closest("section")?.getAttribute("aria-labelledby") + (details.id || details.querySelector("summary")?.textContent.replace(/\d+/g, ""));
  const open = new Set([...before.querySelectorAll("details[open]")].map(keyOf));
  const oldRows = new Set([...before.querySelectorAll("tr[data-row]")].map((row) => row.dataset.row));
  const scrolled = [...before.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
  const focus = document.activeElement;
  const focusIndex = focus && before.contains(focus) ? [...before.querySelectorAll("a, button, summary, .scroll")].indexOf(focus) : -1;
  for (const kept of before.querySelectorAll("[data-stays]")) {
    const replacement = after.querySelector(`#${kept.id}`);
    if (!replacement) continue;
    Object.assign(kept.dataset, replacement.dataset);
    replacement.replaceWith(kept);
  }
  before.replaceChildren(...after.childNodes);
  for (const details of before.querySelectorAll("details")) details.open ||= open.has(keyOf(details));
  before.querySelectorAll(".scroll").forEach((box, index) => (box.scrollLeft = scrolled[index] ?? 0));
  for (const row of before.querySelectorAll("tr[data-row]")) {
    if (oldRows.size && !oldRows.has(row.dataset.row)) row.classList.add("fresh");
  }
  if (focusIndex >= 0) before.querySelectorAll("a, button, summary, .scroll")[focusIndex]?.focus({ preventScroll: true });
  const foot = fresh.getElementById("foot");
  if (foot) document.getElementById("foot")?.replaceWith(foot);
  Object.assign(document.body.dataset, fresh.body.dataset);
  showLive(true);
  syncClock();
  updateAges();
}

function showLive(on) {
  document.getElementById("live")?.classList.toggle("on", on);
}

function isRelevant(change) {
  const reload = document.body.dataset.reload;
  if (reload === "all" || change.everything) return true;
  if (change.kind === "finality") return true;
  return reload === "job" && change.jobs.includes(Number(document.body.dataset.job));
}

// A page in the browser's back-forward cache must not keep a stream open.
let stream = null;
function openStream() {
  stream = new EventSource(`/live?since=${encodeURIComponent(document.body.dataset.change)}`);
  let timer = 0;
  stream.addEventListener("open", () => showLive(true));
  stream.addEventListener("error", () => showLive(false));
  stream.addEventListener("change", (event) => {
    if (!isRelevant(JSON.parse(event.data))) return;
    clearTimeout(timer);
    timer = setTimeout(refresh, 250);
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
  if (button?.dataset.copy) copyText(button);
});
syncClock();
updateAges();
setInterval(updateAges, 5000);
if (document.body.dataset.reload && "EventSource" in window) {
  openStream();
  setInterval(() => refreshNeeded && refresh(), 2000);
  addEventListener("pagehide", () => stream.close());
  addEventListener("pageshow", (event) => event.persisted && openStream());
}
document.querySelector("nav.main [aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
connectWallet();
