// The page of `psyche serve`: streams answers, folds reasoning, keeps the conversation in this browser only.
// What people and models say is only ever set as text, never as markup.

const WORDS = {
  zh: {
    skip: "跳到输入框", fresh: "新对话", empty: "写下你想说的话。", token: "访问令牌", settings: "设置",
    system: "系统提示（留空则使用模型自带的）", message: "消息", placeholder: "输入消息，回车发送，Shift+回车换行",
    send: "发送", stop: "停止", kept: "对话只保存在这个浏览器里；点“新对话”会把它删除。", log: "对话",
    user: "你", assistant: "模型", care: "安全提示（固定文字，非模型生成）", thinking: "正在思考…", thought: "思考过程",
    waiting: "正在回答…", done: "回答完毕", stopped: "已停止", length: "到达长度上限", filtered: "部分内容已被安全规则拦下",
    failed: "出错了：", lost: "连接中断，请重试", sure: "要删除这段对话吗？",
  },
  en: {
    skip: "Skip to the message field", fresh: "New chat", empty: "Write what is on your mind.", token: "Access token",
    settings: "Settings", system: "System prompt (empty: the model's own)", message: "Message",
    placeholder: "Type a message; Enter sends, Shift+Enter breaks the line", send: "Send", stop: "Stop",
    kept: "The conversation is kept in this browser only; “New chat” deletes it.", log: "Conversation",
    user: "You", assistant: "Model", care: "Safety message (a fixed text, not the model's)", thinking: "Thinking…",
    thought: "Reasoning", waiting: "Answering…", done: "Answer complete", stopped: "Stopped",
    length: "Length limit reached", filtered: "Part of it was withheld by the safety rules", failed: "Something went wrong: ",
    lost: "The connection was lost; try again", sure: "Delete this conversation?",
  },
};
const STORE = "psyche.conversation";
const find = id => document.getElementById(id);
const state = { turns: [], system: "", language: "zh", about: { model: "", notice: null, token_required: false }, running: null };

function words() { return WORDS[state.language]; }

function save() {
  try {
    localStorage.setItem(STORE, JSON.stringify({ turns: state.turns, system: state.system, language: state.language }));
  } catch { /* full or forbidden: the conversation lives on in this tab */ }
}

function load() {
  state.language = (navigator.language || "zh").toLowerCase().startsWith("zh") ? "zh" : "en";
  try {
    const kept = JSON.parse(localStorage.getItem(STORE)) || {};
    if (kept.language in WORDS) state.language = kept.language;
    if (typeof kept.system === "string") state.system = kept.system;
    if (Array.isArray(kept.turns)) {
      state.turns = kept.turns.filter(turn => turn && ["user", "assistant"].includes(turn.role) && typeof turn.content === "string");
    }
  } catch { /* not ours: begin anew */ }
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

function build(turn) {
  const made = element("article", `turn ${turn.role}${turn.care ? " care" : ""}`);
  made.append(element("p", "who", turn.care ? words().care : words()[turn.role]));
  fill(made, turn);
  return made;
}

// Brings what is shown of a turn up to date, without closing what the reader has opened.
function fill(made, turn) {
  const { thought, answer, open } = turn.role === "assistant" ? parts(turn.content) : { thought: null, answer: turn.content };
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
  if (!text) made.append((text = element("p", "text")));
  text.textContent = answer;
  made.querySelector(".why")?.remove();
  if (["length", "filtered", "stopped"].includes(turn.end)) made.append(element("p", "why", words()[turn.end]));
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
  find("notice").textContent = state.about.notice?.[state.language] ?? "";
  find("token-row").hidden = !state.about.token_required;
  find("system").value = state.system;
  find("turns").replaceChildren(...state.turns.map(build));
  busy();
}

function busy() {
  find("send").hidden = state.running !== null;
  find("stop").hidden = state.running === null;
  find("fresh").disabled = state.running !== null;
}

function atEnd() {
  const main = document.querySelector("main");
  return main.scrollHeight - main.scrollTop - main.clientHeight < 80;
}

function toEnd() {
  const main = document.querySelector("main");
  main.scrollTop = main.scrollHeight;
}

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

// The events of a response, one parsed object after the other.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
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

async function send(text) {
  state.turns.push({ role: "user", content: text });
  const turn = { role: "assistant", content: "" };
  state.turns.push(turn);
  state.running = { turn, abort: new AbortController() };
  draw();
  toEnd();
  save();
  say(words().waiting);
  const shown = find("turns").lastElementChild;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify({ model: state.about.model, messages: messages(), stream: true }),
      signal: state.running.abort.signal,
    });
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
    say(words().done);
  } catch (error) {
    if (error.name === "AbortError") {
      turn.end = "stopped";
      say(words().stopped);
    } else {
      say(words().failed + error.message, true);
    }
  }
  state.running = null;
  if (turn.content) {
    fill(shown, turn);
  } else {
    state.turns.pop();
    shown.remove();
    if (turn.end !== "stopped" && state.turns.at(-1)?.content === text) {
      state.turns.pop();
      find("turns").lastElementChild.remove();
      find("message").value ||= text;
    }
  }
  busy();
  save();
  find("message").focus();
}

find("composer").addEventListener("submit", event => {
  event.preventDefault();
  const text = find("message").value.trim();
  if (!text || state.running) return;
  find("message").value = "";
  send(text);
});
find("message").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("composer").requestSubmit();
  }
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && state.running) state.running.abort.abort();
});
find("stop").addEventListener("click", () => state.running?.abort.abort());
find("fresh").addEventListener("click", () => {
  if (!state.turns.length || confirm(words().sure)) {
    state.turns = [];
    save();
    draw();
    say("");
    find("message").focus();
  }
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
