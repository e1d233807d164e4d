// The queue of psyche review. What is shown is text, never markup; a decision is shown as made once it is stored.
"use strict";

const token = location.hash.slice(1);
const element = (id) => document.getElementById(id);
const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
let items = [];
let passages = {};
let pairs = [];
let blind = false;
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

const WORDS = {
  zh: {
    title: "题目审核", blind: "（独立复审：看不到别人的结论）", decided: "已审", filter: "筛选", search: "查找题干、选项或理由", why: "需要审核的原因",
    key: "答案", rationale: "解析", passage: "出题所依据的材料", votes: "模型的评判", stem: "题干", options: "选项，一行一个",
    save: "保存", cancel: "取消", accept: "通过", edit: "修改", reject: "不通过", undo: "撤销", previous: "上一题", next: "下一题",
    help: "按键：a 通过，e 修改，r 不通过，u 撤销，j 下一题，k 上一题，n 下一道未审的题。结论立即保存。",
    reason: "不通过的理由（可不填）", reasons: ["答案有误", "题意不清", "选项不当", "没有考查价值", "与材料不符", "不宜使用"],
    count: "{1} 题中已审 {0} 题", place: "第 {0} 题，共 {1} 题", undecided: "未审", single: "单选", multi: "多选",
    accepted: "{0}：通过", edited: "{0}：修改", rejected: "{0}：不通过", llm: "模型", answers: "作答", mean: "平均", why_vote: "理由",
    score_correct: "正确", score_clear: "清楚", score_options: "选项", score_worth: "价值",
    filter_all: "全部", filter_open: "未审", filter_accept: "通过的", filter_edit: "修改的", filter_reject: "不通过的", filter_differ: "意见不一致的",
    agree: "{0} 都审了 {1} 题，{2} 题一致（κ {3}）。", empty: "没有要审的题。", none: "没有符合条件的题。", notStored: "保存失败：{0}",
    token: "网址里的令牌缺失或有误：请打开 psyche review 显示的完整网址。",
  },
  en: {
    title: "Review", blind: "(a second review: others' decisions are hidden)", decided: "Decided", filter: "Filter",
    search: "Search stems, options, reasons", why: "Why it needs review", key: "Key", rationale: "Rationale",
    passage: "Source passage", votes: "What the LLMs said", stem: "Stem", options: "Options, one per line",
    save: "Save", cancel: "Cancel", accept: "Accept", edit: "Edit", reject: "Reject", undo: "Undo", previous: "Previous", next: "Next",
    help: "Keys: a accept, e edit, r reject, u undo, j next, k previous, n next undecided. Decisions are stored at once.",
    reason: "Reason (optional)", reasons: ["The key is wrong", "Unclear", "Poor options", "Not worth asking", "Contradicts the passage", "Not usable"],
    count: "{0} of {1} decided", place: "Item {0} of {1}", undecided: "not decided", single: "one right answer", multi: "several right answers",
    accepted: "accepted by {0}", edited: "edited by {0}", rejected: "rejected by {0}", llm: "LLM", answers: "Answers", mean: "mean",
    why_vote: "Reason", score_correct: "Correct", score_clear: "Clear", score_options: "Options", score_worth: "Worth",
    filter_all: "All", filter_open: "Not decided", filter_accept: "Accepted", filter_edit: "Edited", filter_reject: "Rejected",
    filter_differ: "Reviewers differ", agree: "{0} both decided {1} items, {2} the same way (κ {3}).", empty: "The queue is empty.",
    none: "No item matches.", notStored: "Not stored: {0}",
    token: "The token in the address is missing or wrong: open the address that psyche review printed.",
  },
};
let language = localStorage.getItem("language") || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");

function words(name, ...values) {
  return WORDS[language][name].replace(/\{(\d)\}/g, (_, index) => values[index]);
}

// A draft outlives a reload, until it is saved or cancelled.
const draftName = (item) => `draft ${item.question.id}`;

function shownQuestion(item) {
  return (item.decision && item.decision.edited) || item.question;
}

// Which items are looked through: those of a filter that hold the words that are searched for.
const filters = {
  all: () => true,
  open: (item) => !item.decision,
  accept: (item) => item.decision?.verdict === "accept",
  edit: (item) => item.decision?.verdict === "edit",
  reject: (item) => item.decision?.verdict === "reject",
  differ: (item) => new Set(item.by.map((one) => one.verdict)).size > 1,
};

function matches(item) {
  const sought = element("search").value.trim().toLowerCase();
  const { stem, options, meta } = item.question;
  const text = [stem, ...Object.values(options), ...(meta.flags || []), ...item.by.map((one) => one.note)].join("\n");
  return filters[element("filter").value || "all"](item) && text.toLowerCase().includes(sought);
}

// Flags are written in English; their forms are few.
function flagText(flag) {
  if (language === "en") return flag;
  return flag
    .replace(/^(\d+) of (\d+) votes for it; /, "$2 票中 $1 票赞成；")
    .replace(/^all LLMs answer ([A-Z]+), the key is ([A-Z]+)$/, "各模型都答 $1，而答案是 $2")
    .replace(/^another key than (\S+), which reads the same$/, "与 $1 题面相同，答案却不同");
}

function verdictText(decision) {
  const note = decision.note ? (language === "zh" ? `（${decision.note}）` : `: ${decision.note}`) : "";
  return `${words(decision.verdict + "ed", decision.who)}${language === "zh" ? "，" : ", "}${new Date(decision.time * 1000).toLocaleString(language)}${note}`;
}

function cells(tag, values) {
  const row = document.createElement("tr");
  for (const value of values) {
    const cell = document.createElement(tag);
    cell.textContent = value;
    if (tag === "td" && typeof value === "number" && value <= 2) cell.className = "low";
    row.append(cell);
  }
  return row;
}

// What judged the question: votes of the filter, or what each LLM answered in selection.
function judged(meta) {
  const names = ["correct", "clear", "options", "worth"];
  if (meta.selection) {
    const rows = Object.entries(meta.selection.answers).map(([llm, given]) => cells("td", [llm, given.map((one) => one || "–").join(" ")]));
    return [cells("th", [words("llm"), words("answers")]), ...rows];
  }
  const head = cells("th", [words("llm"), ...names.map((name) => words(`score_${name}`)), words("why_vote")]);
  if (meta.votes?.length) return [head, ...meta.votes.map((vote) => cells("td", [vote.llm, ...names.map((name) => vote[name]), vote.reason]))];
  return meta.scores ? [head, cells("td", [words("mean"), ...names.map((name) => meta.scores[name]), ""])] : [];
}

function showWords() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const one of document.querySelectorAll("[data-text]")) one.textContent = words(one.dataset.text);
  for (const one of document.querySelectorAll("[data-label]")) one.setAttribute("aria-label", words(one.dataset.label));
  for (const one of document.querySelectorAll("[data-placeholder]")) one.placeholder = words(one.dataset.placeholder);
  element("language").textContent = language === "zh" ? "English" : "中文";
  const chosen = element("filter").value || "all";
  element("filter").replaceChildren(...Object.keys(filters).map((name) => new Option(words(`filter_${name}`), name, false, name === chosen)));
  element("reason-buttons").replaceChildren(...WORDS[language].reasons.map((reason, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = `${index + 1} ${reason}`;
    button.addEventListener("click", () => decide("reject", null, reason));
    return button;
  }));
}

function show() {
  const decided = items.filter((item) => item.decision).length;
  const found = items.filter(matches);
  element("count").textContent = words("count", decided, items.length);
  element("progress").max = Math.max(items.length, 1);
  element("progress").value = decided;
  element("agreement").textContent = pairs
    .map((pair) => words("agree", pair.who.join(language === "zh" ? "、" : " and "), pair.both, pair.same, pair.kappa ?? "–")).join(" ");
  element("empty").hidden = found.length > 0;
  element("empty").textContent = words(items.length ? "none" : "empty");
  element("item").hidden = found.length === 0;
  if (found.length === 0) return;
  const item = items[at];
  sessionStorage.setItem("at", item.question.id);
  const question = shownQuestion(item);
  element("place").textContent = words("place", found.indexOf(item) + 1, found.length);
  element("verdict").textContent = `· ${item.decision ? verdictText(item.decision) : words("undecided")}`;
  element("by").replaceChildren(...(item.by.length > 1 ? item.by.map((one) => listItem(verdictText(one))) : []));
  element("flags").replaceChildren(...((item.question.meta.flags || []).map((flag) => listItem(flagText(flag)))));
  element("stem").textContent = question.stem;
  element("options").replaceChildren(
    ...Object.entries(question.options).map(([letter, text]) =>
      listItem(`${letter}. ${text}`, question.answer.includes(letter) ? "right" : "")),
  );
  element("answer").textContent = question.answer;
  element("kind").textContent = words(question.kind);
  element("rationale").hidden = !question.rationale;
  element("thought").textContent = question.rationale || "";
  const passage = passages[item.question.meta.passage];
  element("passage").hidden = !passage;
  element("text").textContent = passage || "";
  element("source").textContent = [item.question.meta.title, item.question.source].filter(Boolean).join(" · ");
  element("scores").replaceChildren(...judged(item.question.meta));
  element("votes").hidden = !element("scores").hasChildNodes();
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
  element("reasons").hidden = true;
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

function startReject() {
  element("reason").value = items[at].decision?.note || "";
  element("reasons").hidden = false;
  element("buttons").hidden = true;
  element("reason").focus();
}

async function decide(verdict, edited, note) {
  if (busy) return;
  const item = items[at];
  if (verdict === "undo" && !item.decision) return;
  busy = true;
  try {
    const decision = await ask("api/decisions", { item: item.question.id, verdict, edited: edited || null, note: note || "", after: item.after });
    sessionStorage.removeItem(draftName(item));
    say("");
    item.after = decision.number;
    item.decision = decision;
    if (!blind) item.by = [...item.by.filter((one) => one.who !== decision.who), decision];
    if (verdict === "undo") await load(); // which may bring back the decision before
    else nextUndecided();
    narrow();
  } catch (error) {
    if (error.status === 409) {
      await load();
      show();
    }
    say(words("notStored", error.message));
  } finally {
    busy = false;
  }
}

function move(step) {
  for (let place = at + step; place >= 0 && place < items.length; place += step) {
    if (matches(items[place])) {
      at = place;
      break;
    }
  }
  say("");
  show();
}

function nextUndecided() {
  for (let step = 1; step <= items.length; step += 1) {
    const place = (at + step) % items.length;
    if (!items[place].decision && matches(items[place])) {
      at = place;
      return;
    }
  }
  if (items.length && !matches(items[at])) at = Math.max(items.findIndex(matches), 0);
}

function narrow() {
  if (items.length && !matches(items[at])) at = Math.max(items.findIndex(matches), 0);
  show();
}

async function load() {
  const answer = await ask("api/items");
  ({ items, passages, blind } = answer);
  pairs = answer.agreement;
  element("blind").hidden = !blind;
  const last = items.findIndex((item) => item.question.id === sessionStorage.getItem("at"));
  at = last >= 0 ? last : Math.max(items.findIndex((item) => !item.decision), 0);
}

const actions = {
  accept: () => decide("accept"),
  edit: startEdit,
  reject: startReject,
  undo: () => decide("undo"),
  previous: () => move(-1),
  next: () => move(1),
};
const keys = { a: "accept", e: "edit", r: "reject", u: "undo", k: "previous", j: "next" };
for (const [name, action] of Object.entries(actions)) element(name).addEventListener("click", action);
element("cancel").addEventListener("click", cancelEdit);
element("keep").addEventListener("click", closeForm);
element("form").addEventListener("input", keepDraft);
element("form").addEventListener("submit", (event) => { event.preventDefault(); saveEdit(); });
element("reasons").addEventListener("submit", (event) => { event.preventDefault(); decide("reject", null, element("reason").value.trim()); });
element("reason").addEventListener("keydown", (event) => {
  const reason = WORDS[language].reasons[event.key - 1];
  if (reason && !element("reason").value) {
    event.preventDefault();
    decide("reject", null, reason);
  }
});
element("filter").addEventListener("change", narrow);
element("search").addEventListener("input", narrow);
element("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("language", language);
  showWords();
  show();
});
document.addEventListener("keydown", (event) => {
  if (!element("reasons").hidden) {
    if (event.key === "Escape") { closeForm(); element("reject").focus(); }
    return;
  }
  if (!element("form").hidden) {
    if (event.key === "Escape") cancelEdit();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) saveEdit();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || ["search", "filter"].includes(event.target.id)) return;
  if (!items.some(matches)) return;
  if (event.key === "n") { nextUndecided(); show(); return; }
  if (keys[event.key]) { event.preventDefault(); actions[keys[event.key]](); }
});
showWords();
load().then(show).catch((error) => say(error.status === 401 ? words("token") : error.message));
