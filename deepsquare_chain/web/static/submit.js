// The submit page: the server validates and prices the job during editing, without a wallet. The
// editor of job files offers completions from the schema.
import { attachEditor } from "./editor.js";
import { api, element, submitJob } from "./wallet.js";

const form = document.getElementById("job-form");
const file = form?.elements.namedItem("file");
let editor = null;
let asked = 0;
let latest = null;

const values = () => Object.fromEntries(new FormData(form));
const mode = () => form.elements.namedItem("mode").value;

async function check() {
  const turn = (asked += 1);
  let answer = null;
  try {
    answer = await api("/wallet/quote", values());
  } catch (error) {
    answer = { problems: [], verdict: `The price is not known now. ${error.message}`, offers: [], failed: true };
  }
  if (turn !== asked) return latest;
  latest = answer;
  show(answer);
  return answer;
}

function show(answer) {
  const place = document.querySelector("#quote [data-answer]");
  const wrong = answer.problems.length > 0;
  if (mode() === "file") editor?.mark(answer.problems.map((each) => each.line).filter(Boolean));
  const parts = wrong ? mistakes(answer) : [
    element("p", answer.summary ?? ""),
    element("p", answer.verdict, { class: answer.failed ? "bad" : "strong" }),
    ...(answer.offers.length ? [offers(answer.offers)] : []),
    ...(answer.warnings ?? []).map((each) => element("p", each, { class: "dim" })),
  ];
  place.replaceChildren(...parts.filter((each) => each.textContent));
}

function mistakes({ problems, hint }) {
  const list = element("ul", "", { class: "problems" });
  for (const { line, text } of problems) {
    const item = element("li");
    if (line && mode() === "file") {
      const place = element("button", `line ${line}`, { type: "button" });
      place.addEventListener("click", () => editor.go(line));
      item.append(place, " ");
    }
    item.append(text);
    list.append(item);
  }
  const title = problems.length === 1 ? "One thing has to be corrected" : `${problems.length} things have to be corrected`;
  return [element("p", title, { class: "strong bad" }), list, element("p", hint, { class: "dim" })];
}

function offers(rows) {
  const table = element("table");
  const head = element("tr");
  for (const [text, css] of [["Provider", ""], ["Time limit costs", "num"], ["Start", ""]]) head.append(element("th", text, { class: css }));
  table.append(element("thead"), element("tbody"));
  table.tHead.append(head);
  for (const row of rows) {
    const line = element("tr", "", row.refusal ? { class: "out" } : {});
    const name = element("td");
    name.append(element("a", row.provider || row.account.slice(0, 10), { href: `/providers/${row.account}` }));
    if (row.refusal) name.append(element("small", row.refusal));
    line.append(name, element("td", row.cost || "–", { class: "num" }), element("td", row.start === "-" ? "–" : row.start));
    table.tBodies[0].append(line);
  }
  return table;
}

async function turn() {
  const chosen = mode();
  for (const part of form.querySelectorAll("[data-mode]")) part.hidden = part.dataset.mode !== chosen;
  if (chosen === "file") await openEditor().catch((error) => report(error.message, true));
  check();
}

async function openEditor() {
  editor ??= attachEditor(file, await api("/submit/schema.json"));
  if (!file.value.trim()) {
    // The current form, converted to a job file by the server.
    const { file: text } = await api("/wallet/quote", { ...values(), mode: "form" });
    file.value ||= text;
    editor.draw();
  }
  file.focus();
}

function report(text, bad = false) {
  const output = form.querySelector("[data-report]");
  output.textContent = text;
  output.classList.toggle("bad", bad);
}

let soon = 0;
function later() {
  clearTimeout(soon);
  soon = setTimeout(check, 600);
}

async function onSubmit(event) {
  event.preventDefault();
  const button = form.querySelector("button[type=submit]");
  clearTimeout(soon);
  button.disabled = true;
  report("");
  try {
    const answer = await check();
    if (answer.problems.length) {
      report(answer.problems.map((each) => (each.line ? `Line ${each.line}: ${each.text}` : each.text)).join(" "), true);
    } else {
      await submitJob(values(), report);
    }
  } finally {
    button.disabled = false;
  }
}

if (form) {
  form.addEventListener("input", later);
  form.addEventListener("change", (event) => (event.target.name === "mode" ? turn() : later()));
  form.addEventListener("submit", onSubmit);
  // Browsers restore the form's values when they return to the page.
  turn();
}
