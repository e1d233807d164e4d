// The queue of psyche review. What is shown is text, never markup; a decision is shown as made once it is stored.
"use strict";

const token = location.hash.slice(1);
const element = (id) => document.getElementById(id);
const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
let items = [];
let at = 0;
let busy = false;

async function ask(path, body) {
  const options = { headers: { Authorization: `Bearer ${token}` } };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  const value = await response.json();
  if (!response.ok) {
    const detail = typeof value.detail === "string" ? value.detail : JSON.stringify(value.detail);
    throw Object.assign(new Error(detail), { status: response.status });
  }
  return value;
}

function say(text) {
  element("message").textContent = text;
  element("message").hidden = !text;
}

// A draft outlives a reload, until it is saved or cancelled.
const draftName = (item) => `draft ${item.question.id}`;

function shownQuestion(item) {
  return (item.decision && item.decision.edited) || item.question;
}

function show() {
  const decided = items.filter((item) => item.decision).length;
  element("count").textContent = `${decided} of ${items.length} decided`;
  element("progress").max = Math.max(items.length, 1);
  element("progress").value = decided;
  element("empty").hidden = items.length > 0;
  element("item").hidden = items.length === 0;
  if (items.length === 0) return;
  sessionStorage.setItem("at", items[at].question.id);
  const item = items[at];
  const question = shownQuestion(item);
  element("place").textContent = `Item ${at + 1} of ${items.length}`;
  const words = { accept: "accepted", edit: "edited", reject: "rejected" };
  element("verdict").textContent = item.decision
    ? `· ${words[item.decision.verdict]} by ${item.decision.who}, ${new Date(item.decision.time * 1000).toLocaleString()}`
    : "· not decided";
  element("flags").replaceChildren(...((item.question.meta.flags || []).map((flag) => listItem(flag))));
  element("stem").textContent = question.stem;
  element("options").replaceChildren(
    ...Object.entries(question.options).map(([letter, text]) =>
      listItem(`${letter}. ${text}`, question.answer.includes(letter) ? "right" : "")),
  );
  element("answer").textContent = question.answer;
  element("kind").textContent = question.kind === "single" ? "one right answer" : "several right answers";
  element("rationale").hidden = !question.rationale;
  element("thought").textContent = question.rationale || "";
  element("undo").disabled = !item.decision;
  const draft = sessionStorage.getItem(draftName(item));
  if (draft) openForm(JSON.parse(draft));
  else closeForm();
}

function listItem(text, name) {
  const line = document.createElement("li");
  line.textContent = text;
  if (name) line.className = name;
  return line;
}

function openForm(values) {
  element("edit-stem").value = values.stem;
  element("edit-options").value = values.options;
  element("edit-answer").value = values.answer;
  element("form").hidden = false;
  element("shown").hidden = true;
  element("buttons").hidden = true;
}

function closeForm() {
  element("form").hidden = true;
  element("shown").hidden = false;
  element("buttons").hidden = false;
}

function startEdit() {
  const question = shownQuestion(items[at]);
  openForm({ stem: question.stem, options: Object.values(question.options).join("\n"), answer: question.answer });
  keepDraft();
  element("edit-stem").focus();
}

function keepDraft() {
  const values = {};
  for (const name of ["stem", "options", "answer"]) values[name] = element(`edit-${name}`).value;
  sessionStorage.setItem(draftName(items[at]), JSON.stringify(values));
}

function cancelEdit() {
  sessionStorage.removeItem(draftName(items[at]));
  closeForm();
  element("edit").focus();
}

async function saveEdit() {
  const lines = element("edit-options").value.split("\n").map((line) => line.trim()).filter(Boolean);
  const options = Object.fromEntries(lines.map((line, index) => [letters[index], line]));
  const answer = [...new Set(element("edit-answer").value.toUpperCase().replace(/[^A-Z]/g, ""))].sort().join("");
  const edited = { stem: element("edit-stem").value.trim(), options, answer, rationale: shownQuestion(items[at]).rationale };
  await decide("edit", edited);
}

async function decide(verdict, edited) {
  if (busy) return;
  const item = items[at];
  if (verdict === "undo" && !item.decision) return;
  busy = true;
  try {
    const decision = await ask("api/decisions", { item: item.question.id, verdict, edited: edited || null, after: item.after });
    item.after = decision.number;
    item.decision = verdict === "undo" ? null : decision;
    sessionStorage.removeItem(draftName(item));
    say("");
    if (verdict !== "undo") nextUndecided();
    show();
  } catch (error) {
    if (error.status === 409) await load();
    say(`Not stored: ${error.message}`);
  } finally {
    busy = false;
  }
}

function move(step) {
  at = Math.min(Math.max(at + step, 0), items.length - 1);
  say("");
  show();
}

function nextUndecided() {
  for (let step = 1; step <= items.length; step += 1) {
    const place = (at + step) % items.length;
    if (!items[place].decision) {
      at = place;
      return;
    }
  }
}

async function load() {
  const answer = await ask("api/items");
  items = answer.items;
  const last = items.findIndex((item) => item.question.id === sessionStorage.getItem("at"));
  at = last >= 0 ? last : Math.max(items.findIndex((item) => !item.decision), 0);
  show();
}

const actions = {
  accept: () => decide("accept"),
  edit: startEdit,
  reject: () => decide("reject"),
  undo: () => decide("undo"),
  previous: () => move(-1),
  next: () => move(1),
};
const keys = { a: "accept", e: "edit", r: "reject", u: "undo", k: "previous", j: "next" };
for (const [name, action] of Object.entries(actions)) element(name).addEventListener("click", action);
element("cancel").addEventListener("click", cancelEdit);
element("form").addEventListener("input", keepDraft);
element("form").addEventListener("submit", (event) => { event.preventDefault(); saveEdit(); });
document.addEventListener("keydown", (event) => {
  if (items.length === 0) return;
  if (!element("form").hidden) {
    if (event.key === "Escape") cancelEdit();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) saveEdit();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "n") { nextUndecided(); show(); return; }
  if (keys[event.key]) { event.preventDefault(); actions[keys[event.key]](); }
});
load().catch((error) => say(error.status === 401 ? "The token in the address is missing or wrong: open the address that psyche review printed." : error.message));
