// The page of `psyche serve`: streams answers, folds reasoning, keeps conversations in this browser only.
// What people and models say is only ever set as text, never as markup; a little markdown becomes elements of ours.

const WORDS = {
  zh: {
    skip: "跳到输入框", fresh: "新对话", empty: "写下你想说的话。", token: "访问令牌", settings: "设置",
    system: "系统提示词（留空则使用模型自带的）", message: "消息", placeholder: "输入消息，回车发送，Shift+回车换行",
    send: "发送", stop: "停止", kept: "对话只保存在这个浏览器里，点“删除”就会清除。", log: "对话",
    conversations: "历史对话", delete: "删除", cancel: "取消", copy: "复制", copied: "已复制", edit: "修改", again: "重新回答",
    editing: "正在修改这条消息；发送后，它后面的内容会被替换。", seconds: "秒", untitled: "（新）",
    slow: "服务器还在准备；第一次遇到这么长的对话要先编译，可能需要一两分钟。",
    user: "你", assistant: "模型", care: "安全提示（固定文字，非模型生成）", thinking: "正在思考……", thought: "思考过程",
    waiting: "正在回答……", done: "回答完毕", stopped: "已停止", length: "已达到长度上限", filtered: "部分内容已被安全规则拦下",
    failed: "出错了：", lost: "连接中断，请重试", sure: "要删除这段对话吗？",
  },
  en: {
    skip: "Skip to the message field", fresh: "New chat", empty: "Write what is on your mind.", token: "Access token",
    settings: "Settings", system: "System prompt (empty: the model's own)", message: "Message",
    placeholder: "Type a message; Enter sends, Shift+Enter starts a new line", send: "Send", stop: "Stop",
    kept: "Conversations are kept in this browser only; “Delete” erases one.", log: "Conversation",
    conversations: "Conversations", delete: "Delete", cancel: "Cancel", copy: "Copy", copied: "Copied", edit: "Edit",
    again: "Answer again", editing: "Editing; what follows will be replaced when you send.", seconds: "s", untitled: "(new)",
    slow: "Still preparing: the first conversation of this length has to be compiled, which may take a minute or two.",
    user: "You", assistant: "Model", care: "Safety message (a fixed text, not the model's)", thinking: "Thinking…",
    thought: "Reasoning", waiting: "Answering…", done: "Answer complete", stopped: "Stopped",
    length: "Length limit reached", filtered: "The safety rules withheld part of this answer", failed: "Something went wrong: ",
    lost: "The connection was lost; try again", sure: "Delete this conversation?",
  },
};
const STORE = "psyche.conversation";
const SLOW = 4; // seconds without a word, after which the page says why
const find = id => document.getElementById(id);
const main = document.querySelector("main");
const state = {
  id: newId(), turns: [], system: "", language: "zh", running: null, editing: null,
  about: { model: "", notice: null, numbers: [], token_required: false },
};

function words() { return WORDS[state.language]; }

function newId() { return `${Date.now()}-${Math.random()}`; }

function isTurn(turn) {
  return turn && ["user", "assistant"].includes(turn.role) && typeof turn.content === "string";
}

// What is in the store: settings, and all conversations, the latest first.
function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE)) ?? { conversations: [] };
    const whole = one => Array.isArray(one?.turns) && one.turns.length && one.turns.every(isTurn);
    return { ...found, conversations: found.conversations.filter(whole) };
  } catch {
    return { conversations: [] }; // not ours: begin anew
  }
}

// Puts this conversation into the store, or out of it; those of other tabs stay as they are.
function save() {
  const others = kept().conversations.filter(one => one.id !== state.id);
  const conversations = state.turns.length ? [{ id: state.id, turns: state.turns }, ...others] : others;
  try {
    localStorage.setItem(STORE, JSON.stringify({ conversations, system: state.system, language: state.language }));
  } catch { /* full or forbidden: the conversation lives on in this tab */ }
}

function open(conversation) {
  state.id = conversation?.id ?? newId();
  state.turns = (conversation?.turns ?? []).filter(turn => turn.content);
  if (state.editing) find("message").value = ""; // it is of another conversation
  state.editing = null;
  sessionStorage.setItem(STORE, state.id);
}

function load() {
  const found = kept();
  state.language = (navigator.language || "zh").toLowerCase().startsWith("zh") ? "zh" : "en";
  if (found.language in WORDS) state.language = found.language;
  if (typeof found.system === "string") state.system = found.system;
  const here = sessionStorage.getItem(STORE);
  open(here === null ? found.conversations[0] : found.conversations.find(one => one.id === here));
}

// Reasoning and answer of what a model said so far; `open` while the reasoning has not ended.
function parts(content) {
  const begin = content.match(/^\s*<think>/);
  if (!begin) return { thought: null, answer: content, open: false };
  const rest = content.slice(begin[0].length);
  const end = rest.indexOf("</think>");
  return end < 0
    ? { thought: rest, answer: "", open: true }
    : { thought: rest.slice(0, end), answer: rest.slice(end + 8).replace(/^\s+/, ""), open: false };
}

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Text with the hotlines in it as links that call them, where `call` says that it is a text of ours.
function plain(text, call) {
  const numbers = call ? state.about.numbers : [];
  if (!numbers.length) return [text];
  return text.split(new RegExp(`(?<!\\d)(${numbers.join("|")})(?!\\d)`)).map((part, index) => {
    if (index % 2 === 0) return part;
    const link = element("a", "", part);
    link.href = `tel:${part.replace(/\D/g, "")}`;
    return link;
  });
}

// Bold, italics and code within a line.
function inline(text, call) {
  const made = [];
  let from = 0;
  for (const found of text.matchAll(/`([^`]+)`|\*\*(?=\S)(.+?)(?<=\S)\*\*|\*(?=[^\s*])([^*]+?)(?<=\S)\*/g)) {
    made.push(...plain(text.slice(from, found.index), call));
    const [whole, code, strong, em] = found;
    const piece = element(code ? "code" : strong ? "strong" : "em", "", code);
    if (!code) piece.append(...inline(strong ?? em, call));
    made.push(piece);
    from = found.index + whole.length;
  }
  return [...made, ...plain(text.slice(from), call)];
}

// The markdown that models write: paragraphs, headings, lists of one level, code.
function markdown(text, call) {
  const made = [];
  let open = null; // the block that a next line may go on
  for (const line of text.split("\n")) {
    if (/^\s*```/.test(line)) {
      if (open?.tagName === "PRE") open = null;
      else made.push((open = element("pre", "", "")));
      continue;
    }
    if (open?.tagName === "PRE") {
      open.append(`${line}\n`);
      continue;
    }
    const heading = line.match(/^#{1,6}\s+(.+)/);
    const item = line.match(/^\s*(?:[-*+]|(\d{1,6})[.)])\s+(.+)/);
    if (heading) {
      made.push(element("h3"));
      made.at(-1).append(...inline(heading[1], call));
      open = null;
    } else if (item) {
      const tag = item[1] ? "OL" : "UL";
      if (open?.tagName !== tag) made.push((open = element(tag)));
      const entry = element("li");
      if (item[1]) entry.value = item[1];
      entry.append(...inline(item[2], call));
      open.append(entry);
    } else if (!line.trim()) {
      open = null;
    } else {
      if (open?.tagName !== "P") made.push((open = element("p")));
      else open.append("\n");
      open.append(...inline(line, call));
    }
  }
  return made;
}

function button(name, act) {
  const made = element("button", "", words()[name]);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

function build(turn) {
  const made = element("article", `turn ${turn.role}${turn.care ? " care" : ""}`);
  made.append(element("p", "who", turn.care ? words().care : words()[turn.role]));
  fill(made, turn);
  return made;
}

// What can be done with a turn, once nothing is being said.
function actions(turn) {
  const made = element("div", "actions");
  if (navigator.clipboard) {
    const text = turn.role === "assistant" ? parts(turn.content).answer : turn.content;
    made.append(button("copy", () => navigator.clipboard.writeText(text).then(() => say(words().copied), () => say("×", true))));
  }
  const user = turn.role === "user";
  if (user) made.append(button("edit", () => edit(turn)));
  if (turn === state.turns.at(-1) && !turn.care) { // of a user: its answer was lost
    made.append(button("again", () => answer(user ? state.turns : state.turns.slice(0, -1))));
  }
  return made;
}

// Brings what is shown of a turn up to date, without closing what the reader has opened.
function fill(made, turn) {
  const spoken = turn.role === "assistant";
  const { thought, answer, open } = spoken ? parts(turn.content) : { thought: null, answer: turn.content };
  let details = made.querySelector(".thought");
  if (thought !== null && thought.trim()) {
    if (!details) {
      details = element("details", "thought");
      details.append(element("summary"), element("p", "text"));
      made.querySelector(".who").after(details);
    }
    details.querySelector("summary").textContent = open && turn === state.running?.turn ? words().thinking : words().thought;
    details.querySelector(".text").textContent = thought.trim();
  }
  let text = made.querySelector(":scope > .text");
  if (!text) made.append((text = element("div", "text")));
  text.replaceChildren(...(spoken ? markdown(answer, turn.care || turn.end === "filtered") : [answer]));
  for (const old of made.querySelectorAll(".why, .waiting, .actions")) old.remove();
  if (turn === state.running?.turn) {
    if (!turn.content) made.append(element("p", "waiting", "…"));
    return;
  }
  if (["length", "filtered", "stopped"].includes(turn.end)) made.append(element("p", "why", words()[turn.end]));
  made.append(actions(turn));
}

function say(text, wrong = false) {
  find("status").textContent = text;
  find("status").classList.toggle("wrong", wrong);
}

function draw() {
  document.documentElement.lang = state.language === "zh" ? "zh-CN" : "en";
  for (const one of document.querySelectorAll("[data-text]")) one.textContent = words()[one.dataset.text];
  for (const one of document.querySelectorAll("[data-placeholder]")) one.placeholder = words()[one.dataset.placeholder];
  for (const one of document.querySelectorAll("[data-label]")) one.setAttribute("aria-label", words()[one.dataset.label]);
  find("language").textContent = state.language === "zh" ? "English" : "中文";
  find("language").lang = state.language === "zh" ? "en" : "zh-CN";
  find("model").textContent = state.about.model;
  find("notice").replaceChildren(...plain(state.about.notice?.[state.language] ?? "", true));
  find("token-row").hidden = !state.about.token_required;
  find("system").value = state.system;
  find("turns").replaceChildren(...state.turns.map(build));
  const all = kept().conversations;
  const listed = all.some(one => one.id === state.id) ? all : [{ id: state.id, turns: [] }, ...all];
  find("conversations").replaceChildren(...listed.map(one => new Option(
    one.turns[0]?.content.slice(0, 40) ?? words().untitled, one.id, false, one.id === state.id)));
  find("conversations").hidden = all.length === 0 || (all.length === 1 && all[0].id === state.id);
  find("delete").hidden = state.turns.length === 0;
  find("cancel").hidden = state.editing === null;
  busy();
}

function busy() {
  find("send").hidden = state.running !== null;
  find("stop").hidden = state.running === null;
  for (const name of ["fresh", "delete", "conversations"]) find(name).disabled = state.running !== null;
}

function atEnd() { return main.scrollHeight - main.scrollTop - main.clientHeight < 80; }

function toEnd() { main.scrollTop = main.scrollHeight; }

function headers() {
  const token = find("token").value.trim();
  return { "content-type": "application/json", ...(token ? { authorization: `Bearer ${token}` } : {}) };
}

// The conversation as the model is to see it: without its earlier reasoning and without turns that came to nothing.
function messages() {
  const said = state.turns
    .filter(turn => turn !== state.running?.turn)
    .map(turn => ({ role: turn.role, content: turn.role === "assistant" ? parts(turn.content).answer : turn.content }))
    .filter(message => message.content.trim());
  return state.system.trim() ? [{ role: "system", content: state.system.trim() }, ...said] : said;
}

// In the page's words, not the browser's.
function lost(error) {
  throw error.name === "AbortError" ? error : new Error(words().lost);
}

// The events of a response, one parsed object after the other.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read().catch(lost);
    if (done) throw new Error(words().lost);
    waiting += value;
    const lines = waiting.split("\n");
    waiting = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}

// Answers `turns`, which take the place of the conversation; where nothing comes, that is as it was before.
async function answer(turns, typed = "") {
  if (state.running) return;
  const before = state.turns;
  const turn = { role: "assistant", content: "" };
  state.turns = [...turns, turn];
  state.running = { turn, abort: new AbortController() };
  state.editing = null;
  save();
  draw();
  toEnd();
  say(words().waiting);
  const shown = find("turns").lastElementChild;
  const began = Date.now();
  let told = false;
  const clock = setInterval(() => {
    const waiting = shown.querySelector(".waiting");
    const seconds = Math.round((Date.now() - began) / 1000);
    if (waiting) waiting.textContent = `… ${seconds} ${words().seconds}`;
    if (waiting && seconds >= SLOW && !told) {
      told = true; // once: a screen reader reads it out
      say(words().slow);
    }
  }, 1000);
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify({ model: state.about.model, messages: messages(), stream: true }),
      signal: state.running.abort.signal,
    }).catch(lost);
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (event.crisis && !turn.care) {
        turn.care = true;
        shown.classList.add("care");
        shown.querySelector(".who").textContent = words().care;
      }
      turn.content += choice?.delta?.content ?? "";
      if (choice?.finish_reason === "length") turn.end = "length";
      if (choice?.finish_reason === "content_filter") turn.end = "filtered";
      const follow = atEnd();
      fill(shown, turn);
      if (follow) toEnd();
    }
    say(turn.end === "length" ? words().length : words().done);
  } catch (error) {
    if (error.name === "AbortError") {
      turn.end = "stopped";
      say(words().stopped);
    } else {
      say(words().failed + error.message, true);
    }
  }
  clearInterval(clock);
  state.running = null;
  if (!turn.content) {
    state.turns = before;
    find("message").value ||= typed;
  }
  save();
  const follow = atEnd();
  draw();
  if (follow) toEnd();
  find("message").focus();
}

function edit(turn) {
  if (state.running) return;
  state.editing = turn;
  find("message").value = turn.content;
  find("cancel").hidden = false;
  say(words().editing);
  find("message").focus();
}

find("composer").addEventListener("submit", event => {
  event.preventDefault();
  const text = find("message").value.trim();
  if (!text || state.running) return;
  find("message").value = "";
  const until = state.editing ? state.turns.indexOf(state.editing) : state.turns.length;
  answer([...state.turns.slice(0, until), { role: "user", content: text }], text);
});
find("cancel").addEventListener("click", () => {
  state.editing = null;
  find("message").value = "";
  find("cancel").hidden = true;
  say("");
  find("message").focus();
});
find("message").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("composer").requestSubmit();
  }
});
const stop = () => state.running?.abort.abort();
document.addEventListener("keydown", event => { if (event.key === "Escape") stop(); });
find("stop").addEventListener("click", stop);

function turnTo(conversation) {
  open(conversation);
  draw();
  toEnd();
  say("");
  find("message").focus();
}

find("fresh").addEventListener("click", () => turnTo());
find("conversations").addEventListener("change", event => {
  turnTo(kept().conversations.find(one => one.id === event.target.value));
});
find("delete").addEventListener("click", () => {
  if (!confirm(words().sure)) return;
  state.turns = [];
  save();
  turnTo(kept().conversations[0]);
});
find("language").addEventListener("click", () => {
  if (state.running) return;
  state.language = state.language === "zh" ? "en" : "zh";
  save();
  draw();
  say("");
});
find("system").addEventListener("input", () => {
  state.system = find("system").value;
  save();
});
find("token").addEventListener("input", () => sessionStorage.setItem("psyche.token", find("token").value));

load();
find("token").value = sessionStorage.getItem("psyche.token") ?? "";
draw();
toEnd();
try {
  state.about = await (await fetch("about")).json();
} catch {
  say(words().lost, true);
}
draw();
toEnd();
