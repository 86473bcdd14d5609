// What a page can do beyond HTML: keys, copying, nothing else. Every page works without it.
"use strict";

document.documentElement.classList.add("js");

const typing = (element) => element.closest("input, textarea, select, [contenteditable]") !== null;

const follow = (selector) => {
  const link = document.querySelector(selector);
  if (link) link.click();
  return link !== null;
};

// On a list j and k walk the rows, on a page they lead to the next and the one before.
const rows = () => [...document.querySelectorAll("#result_list tbody tr, [data-rows] > *")];

const step = (by) => {
  const isList = document.querySelector("#result_list, .hits") !== null;
  if (!isList && follow(by > 0 ? 'a[rel~="next"]' : 'a[rel~="prev"]')) return;
  const all = rows();
  if (!all.length) return;
  const at = all.findIndex((row) => row.classList.contains("here"));
  const next = all[Math.min(all.length - 1, Math.max(0, at < 0 ? (by > 0 ? 0 : all.length - 1) : at + by))];
  all.forEach((row) => row.classList.toggle("here", row === next));
  const link = next.querySelector("th a, td a, a");
  (link || next).focus({ preventScroll: true });
  next.scrollIntoView({ block: "nearest" });
};

const help = () => {
  const dialog = document.getElementById("keys");
  if (!dialog) return;
  if (dialog.open) dialog.close();
  else dialog.showModal();
};

const search = () => {
  const box = document.querySelector("#searchbar") || document.querySelector("#site-search");
  if (!box) return;
  box.focus();
  box.select();
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || typing(event.target)) return;
  const act = { "/": search, j: () => step(1), k: () => step(-1), "?": help }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) {
    const opens = event.target.closest("button[data-opens]");
    if (opens) document.getElementById(opens.dataset.opens)?.showModal();
    return;
  }
  event.preventDefault();
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.classList.add("done");
  } catch {
    // Without HTTPS there is no clipboard: the whole text is selected in its place.
    const text = document.createTextNode(button.dataset.copy);
    button.previousElementSibling?.replaceChildren(text);
    getSelection()?.selectAllChildren(button.previousElementSibling || button);
  }
  setTimeout(() => button.classList.remove("done"), 1500);
});
