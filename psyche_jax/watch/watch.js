// The page of psyche watch: asks every few seconds for what has changed, and puts it in place.
"use strict";

const token = location.hash.slice(1);
const wanted = new URLSearchParams({ by: "step" });
const message = document.getElementById("message");
const shown = {};
let version = "";
let timer = 0;
let asked = 0;

function warn(text) {
  message.textContent = text;
  message.hidden = !text;
}

// What a reader has opened stays open, and the focus stays where it is.
function put(id, html) {
  if (shown[id] === html) return;
  const place = document.getElementById(id);
  const open = [...place.querySelectorAll("details")].map((one) => one.open);
  const focus = document.activeElement.id;
  place.innerHTML = html;
  const details = place.querySelectorAll("details");
  if (details.length === open.length) details.forEach((one, index) => { one.open = open[index]; });
  if (focus && document.activeElement.id !== focus) document.getElementById(focus)?.focus();
  shown[id] = html;
}

async function look() {
  clearTimeout(timer);
  const number = (asked += 1);
  try {
    const response = await fetch(`view?${wanted}&since=${version}`, { headers: { Authorization: `Bearer ${token}` } });
    if (number !== asked) return; // something else was asked for in the meantime
    if (response.status === 401) return warn(message.dataset.token);
    if (response.status === 200) {
      const found = await response.json();
      if (number !== asked) return;
      version = found.version;
      for (const [id, html] of Object.entries(found.fragments)) put(id, html);
    }
    warn("");
  } catch {
    warn(message.dataset.ended);
  }
  if (number === asked) timer = setTimeout(look, document.hidden ? 30000 : 3000);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-key]");
  if (!button) return;
  wanted.set(button.dataset.key, button.dataset.value);
  look();
});
document.addEventListener("change", (event) => {
  if (event.target.name !== "by") return;
  wanted.set("by", event.target.value);
  look();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
look();
