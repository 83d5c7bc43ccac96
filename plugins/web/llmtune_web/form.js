// The recipe's form: tells what was changed, and keeps focus, open parts and the search when it is drawn anew.
const open = new Set(), typing = {key: null, value: null};
let sought = "";
const form = () => element.querySelector(".lt-form");

element.addEventListener("change", (event) => {
  const key = event.target.dataset.key;
  if (!key) return;
  trigger("input", {key, value: event.target.value});
});
element.addEventListener("click", (event) => {
  const key = event.target.dataset.unset;
  if (!key) return;
  typing.value = null;
  trigger("input", {key, value: ""});
});
element.addEventListener("toggle", (event) => {
  const name = event.target.dataset.open;
  if (name && !sought) event.target.open ? open.add(name) : open.delete(name);
}, true);
element.addEventListener("focusin", (event) => { typing.key = event.target.dataset.key || null; typing.value = null; });
element.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !event.target.dataset.key) return;
  event.target.blur();
  typing.value = null;  // not on change, which also comes when a field that is typed into is drawn anew
});
element.addEventListener("input", (event) => {
  if (event.target.dataset.key) typing.value = event.target.value;
  if (event.target.classList.contains("lt-search")) { sought = event.target.value.trim().toLowerCase(); seek(); }
});

function seek() {
  if (!form()) return;
  let any = false;
  for (const field of form().querySelectorAll(".lt-field")) {
    const hit = !sought || field.dataset.name.includes(sought) || field.dataset.about.includes(sought);
    const inner = [...field.querySelectorAll(".lt-field")].some(
      (each) => each.dataset.name.includes(sought) || each.dataset.about.includes(sought));
    field.hidden = !(hit || inner);
    any ||= !field.hidden;
  }
  for (const part of form().querySelectorAll("details[data-open]"))
    part.open = sought ? true : open.has(part.dataset.open);
  for (const section of form().querySelectorAll("section"))
    section.hidden = ![...section.querySelectorAll(".lt-field")].some((field) => !field.hidden);
  form().querySelector(".lt-none").hidden = any;
}

watch("value", () => {
  if (!form()) return;
  form().querySelector(".lt-search").value = sought;
  seek();
  const again = typing.key && element.querySelector(`[data-key="${typing.key}"]`);
  if (again && document.activeElement === document.body) {
    const value = typing.value;
    again.focus({preventScroll: true});
    if (value !== null) { again.value = value; typing.value = value; }
  }
});
