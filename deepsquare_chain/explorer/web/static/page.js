// What makes pages handier; every page can be read without it.
import { connectWallet } from "./wallet.js";

const root = document.documentElement;

function switchTheme() {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try {
    localStorage.setItem("theme", root.dataset.theme);
  } catch {
    // It lasts until the next page.
  }
}

const ages = new Intl.RelativeTimeFormat("en", { numeric: "auto", style: "short" });

function age(seconds) {
  const units = [["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]];
  const [unit, size] = units.find(([, each]) => Math.abs(seconds) >= each) || units[3];
  return ages.format(-Math.trunc(seconds / size), unit);
}

// Times of this day are told as an age; the title keeps the exact one.
function tellAges(within = document) {
  for (const time of within.querySelectorAll("time[datetime]")) {
    const seconds = (Date.now() - Date.parse(time.dateTime)) / 1000;
    if (Math.abs(seconds) < 86400) time.textContent = age(seconds);
  }
}

async function copy(button) {
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "✓";
  } catch {
    button.textContent = "✕";
  }
  setTimeout(() => (button.textContent = "⧉"), 1500);
}

// Read the page anew and exchange its content, unless somebody is in the middle of something.
let reading = false;
let again = false;
async function refresh() {
  if (document.querySelector("dialog[open]") || getSelection()?.toString()) return;
  if (reading) {
    again = true;
    return;
  }
  reading = true;
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (!answer.ok) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    exchange(fresh);
  } catch {
    // The server is away; the stream says so.
  } finally {
    reading = false;
    if (again) {
      again = false;
      setTimeout(refresh, 1000);
    }
  }
}

function exchange(fresh) {
  const before = document.querySelector("main");
  const after = fresh.querySelector("main");
  const open = [...before.querySelectorAll("details")].map((each) => each.open);
  const known = new Set([...before.querySelectorAll("tr[data-job]")].map((row) => row.dataset.job + row.textContent));
  const focus = document.activeElement?.id;
  before.replaceChildren(...after.childNodes);
  before.querySelectorAll("details").forEach((each, i) => (each.open = open[i] ?? each.open));
  for (const row of before.querySelectorAll("tr[data-job]")) {
    if (known.size && !known.has(row.dataset.job + row.textContent)) row.classList.add("fresh");
  }
  if (focus) document.getElementById(focus)?.focus({ preventScroll: true });
  document.querySelector(".foot-in").replaceWith(fresh.querySelector(".foot-in"));
  document.querySelector("[data-live]")?.classList.add("on");
  document.body.dataset.change = fresh.body.dataset.change;
  tellAges();
}

function follow() {
  const wanted = document.body.dataset.reload;
  const stream = new EventSource(`/live?since=${encodeURIComponent(document.body.dataset.change)}`);
  const mark = (on) => document.querySelector("[data-live]")?.classList.toggle("on", on);
  let soon = 0;
  stream.addEventListener("open", () => mark(true));
  stream.addEventListener("error", () => mark(false));
  stream.addEventListener("change", (event) => {
    const change = JSON.parse(event.data);
    const ours = wanted === "all" || (wanted === "job" && (change.everything || change.jobs.includes(Number(document.body.dataset.job))));
    if (!ours) return;
    clearTimeout(soon);
    soon = setTimeout(refresh, 150);
  });
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select, [contenteditable]");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    document.getElementById("q").focus();
  }
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.hasAttribute("data-theme-switch")) switchTheme();
  if (button?.dataset.copy) copy(button);
});
tellAges();
setInterval(tellAges, 15000);
if (document.body.dataset.reload && "EventSource" in window) follow();
connectWallet();
