// The submit page: the server validates and prices the job during editing, without a wallet. The
// editor of job files offers completions from the schema.
import { attachEditor } from "./editor.js";
import { api, element, submitJob } from "./wallet.js";

const form = document.getElementById("job-form");
const file = form?.elements.namedItem("file");
let editor = null;
let requests = 0;

const values = () => Object.fromEntries(new FormData(form));
const mode = () => form.elements.namedItem("mode").value;

async function requestQuote() {
  const number = (requests += 1);
  let quote = null;
  try {
    quote = await api("/wallet/quote", values());
  } catch (error) {
    quote = { problems: [], verdict: `The price is not known now. ${error.message}`, offers: [], failed: true };
  }
  // A later request shows its own answer; the caller still needs the answer for its values.
  if (number === requests) showQuote(quote);
  return quote;
}

function showQuote(quote) {
  const output = document.querySelector("#quote [data-answer]");
  const invalid = quote.problems.length > 0;
  if (mode() === "file") editor?.mark(quote.problems.map((problem) => problem.line).filter(Boolean));
  const parts = invalid ? problemList(quote) : [
    element("p", quote.summary ?? ""),
    element("p", quote.verdict, { class: quote.failed ? "bad" : "strong" }),
    ...(quote.offers.length ? [offerTable(quote.offers)] : []),
    ...(quote.warnings ?? []).map((warning) => element("p", warning, { class: "dim" })),
  ];
  output.replaceChildren(...parts.filter((part) => part.textContent));
}

function problemList({ problems, hint }) {
  const list = element("ul", "", { class: "problems" });
  for (const { line, text } of problems) {
    const item = element("li");
    if (line && mode() === "file") {
      const button = element("button", `line ${line}`, { type: "button" });
      button.addEventListener("click", () => editor.go(line));
      item.append(button, " ");
    }
    item.append(text);
    list.append(item);
  }
  const title = problems.length === 1 ? "One thing has to be corrected" : `${problems.length} things have to be corrected`;
  return [element("p", title, { class: "strong bad" }), list, element("p", hint, { class: "dim" })];
}

function offerTable(rows) {
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

async function switchMode() {
  const chosen = mode();
  for (const part of form.querySelectorAll("[data-mode]")) part.hidden = part.dataset.mode !== chosen;
  if (chosen === "file") await openEditor().catch((error) => report(error.message, true));
  requestQuote();
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

let timer = 0;
function scheduleCheck() {
  clearTimeout(timer);
  timer = setTimeout(requestQuote, 600);
}

async function onSubmit(event) {
  event.preventDefault();
  const button = form.querySelector("button[type=submit]");
  clearTimeout(timer);
  button.disabled = true;
  report("");
  try {
    const quote = await requestQuote();
    if (quote.problems.length) {
      report(quote.problems.map(({ line, text }) => (line ? `Line ${line}: ${text}` : text)).join(" "), true);
    } else {
      await submitJob(values(), report);
    }
  } finally {
    button.disabled = false;
  }
}

if (form) {
  form.addEventListener("input", scheduleCheck);
  form.addEventListener("change", (event) => (event.target.name === "mode" ? switchMode() : scheduleCheck()));
  form.addEventListener("submit", onSubmit);
  // Browsers restore the form's values when they return to the page.
  switchMode();
}
