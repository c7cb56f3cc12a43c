// The page at `/`: a client of the endpoint like any other. Everything that is shown goes in as text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
let schema = null;
let photos = [];
let key = "";

function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

async function call(path, options = {}) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("The endpoint cannot be reached.");
  }
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  const wait = response.headers.get("retry-after");
  const error = new Error((body.detail || `The endpoint answered ${response.status}.`)
    + (wait ? ` Try again in ${wait} s.` : ""));
  error.status = response.status;
  error.request = body.request_id;
  throw error;
}

// ------------------------------------------------------------------------------------------------ the form

async function begin() {
  try {
    schema = await call("v1/schema");
  } catch (error) {
    $("model").textContent = error.status === 401 ? "An API key is needed." : error.message;
    $("access").hidden = error.status !== 401;
    return;
  }
  const model = schema["x-model"];
  $("model").textContent = `${schema.title}: model ${model.name}, version ${model.version}`
    + (model.unvetted ? ", trained with literature that nobody has vetted" : "");
  $("most").textContent = schema["x-max-images"];
  $("fields").replaceChildren(...fieldsInOrder().map(field));
  $("attributes").hidden = !Object.keys(schema.properties).length;
}

function fieldsInOrder() {
  // What the model reads comes first; within that, the order of the data set.
  const all = Object.entries(schema.properties);
  return [...all.filter(([, about]) => about["x-read"]), ...all.filter(([, about]) => !about["x-read"])];
}

function field([name, about]) {
  const id = `attribute-${name}`;
  // "Months (months)" says it twice.
  const unit = about["x-unit"] === about.title.toLowerCase() ? "" : about["x-unit"];
  const hint = [unit, about["x-read"] ? "" : "not read by this model"].filter(Boolean).join(", ");
  const label = make("label", { htmlFor: id }, about.title + (hint ? ` (${hint})` : ""));
  return make("div", {}, label, input(id, name, about));
}

function input(id, name, about) {
  const options = about.type.includes("boolean")
    ? [["true", "yes"], ["false", "no"]]
    : about.enum && about.enum.filter((value) => value !== null).map((value) => [value, about["x-words"]?.[value] || value]);
  if (options) {
    const rows = [["", "not known"], ...options].map(([value, text]) => make("option", { value }, text));
    return make("select", { id, name }, ...rows);
  }
  if (about.type.includes("number")) {
    const found = make("input", { id, name, type: "number", step: "any", inputMode: "decimal" });
    if ("minimum" in about) found.min = about.minimum;
    if ("maximum" in about) found.max = about.maximum;
    return found;
  }
  return make("input", { id, name, type: "text", maxLength: about.maxLength || 500 });
}

function attributes() {
  const found = {};
  for (const [name, about] of Object.entries(schema.properties)) {
    const value = $(`attribute-${name}`).value.trim();
    if (value === "") continue;
    if (about.type.includes("boolean")) found[name] = value === "true";
    else found[name] = about.type.includes("number") ? Number(value) : value;
  }
  return found;
}

function choose(files) {
  photos.push(...files);
  $("photos").value = "";
  showChosen();
}

function showChosen() {
  const rows = photos.map((file, at) => {
    const source = URL.createObjectURL(file);
    const picture = make("img", { src: source, alt: `Photo ${at + 1}` });
    picture.addEventListener("load", () => URL.revokeObjectURL(source));
    picture.addEventListener("error", () => picture.replaceWith(make("span", {}, `Photo ${at + 1} cannot be shown`)));
    const remove = make("button", { type: "button" }, "×");
    remove.setAttribute("aria-label", `Remove photo ${at + 1}`);
    remove.addEventListener("click", () => {
      photos.splice(at, 1);
      showChosen();
      $("photos").focus();
    });
    return make("li", {}, picture, remove);
  });
  $("chosen").replaceChildren(...rows);
}

// ---------------------------------------------------------------------------------------------- the answer

async function ask(event) {
  event.preventDefault();
  const button = $("ask");
  if (button.disabled) return;
  if (!schema) return show(make("p", { className: "error", role: "alert" }, $("model").textContent));
  const form = new FormData();
  photos.forEach((file, at) => form.append("images", file, `photo-${at + 1}`));
  form.append("attributes", JSON.stringify(attributes()));
  form.append("explain", String($("explain").checked));
  button.disabled = true;
  button.textContent = "Asking …";
  try {
    if (!photos.length) throw new Error("Choose at least one photo.");
    show(...answer(await call("v1/diagnoses", { method: "POST", body: form })));
  } catch (error) {
    const request = error.request ? [make("p", { className: "quiet" }, `Request ${error.request}`)] : [];
    show(make("h2", {}, "No answer"), make("p", { className: "error", role: "alert" }, error.message), ...request);
    $("access").hidden = $("access").hidden && error.status !== 401;
  } finally {
    button.disabled = false;
    button.textContent = "Diagnose";
  }
}

function show(...nodes) {
  $("result").replaceChildren(...nodes);
  $("result").hidden = false;
  $("result").focus();
  $("result").scrollIntoView({ block: "nearest" });
}

const percent = (value) => `${(100 * value).toFixed(1)} %`;
const words = (name) => schema["x-classes"][name] || name;
const title = (name) => schema.properties[name]?.title || name;

function answer(found) {
  const abstained = found.abstained
    ? [make("div", { className: "abstain", role: "alert" }, make("strong", {}, "The model abstains."),
      ...found.reasons.map((reason) => make("p", {}, reason.text)))]
    : [];
  const heading = found.abstained ? "No diagnosis to rely on" : `${found.prediction}: ${words(found.prediction)}`;
  return [
    make("h2", {}, heading),
    ...abstained,
    ...found.warnings.map((text) => make("p", { className: "note" }, text)),
    make("h3", {}, "Probabilities"), bars(found),
    make("p", { className: "quiet" }, `● Prediction set: holds the right diagnosis for about ${percent(found.coverage)} `
      + `of exams like those of the validation fold: ${found.prediction_set.join(", ")}.`),
    ...explanation(found.explanation),
    make("h3", {}, "What was read"), readings(found),
    make("p", { className: "quiet" }, `Request ${found.request_id}, model ${found.model.name} ${found.model.version}`),
  ];
}

function bars(found) {
  const rows = Object.entries(found.probabilities).sort((one, two) => two[1] - one[1]);
  const cells = rows.flatMap(([name, value], at) => {
    const first = at === 0 && !found.abstained ? " first" : "";
    const held = found.prediction_set.includes(name);
    const label = make("span", { className: `name${first}${held ? " in-set" : ""}` }, `${name}, ${words(name)}`);
    const meter = make("meter", { min: 0, max: 1, value });
    meter.setAttribute("aria-label", `${words(name)}: ${percent(value)}${held ? ", in the prediction set" : ""}`);
    return [label, meter, make("span", { className: first.trim() }, percent(value))];
  });
  return make("div", { className: "bars" }, ...cells);
}

function inWords(name, value) {
  const about = schema.properties[name] || {};
  if (about["x-kind"] === "boolean") return value === "true" ? "yes" : "no";
  return `${about["x-words"]?.[value] || value} ${about["x-unit"] || ""}`.trim();
}

function readings(found) {
  const rows = Object.entries(found.attributes_used).map(([name, value]) => [title(name), inWords(name, value)]);
  if (found.attributes_missing.length) rows.push(["Not given", found.attributes_missing.map(title).join(", ")]);
  if (found.attributes_ignored.length) rows.push(["Not read", found.attributes_ignored.map(title).join(", ")]);
  if (!rows.length) rows.push(["Attributes", "none"]);
  return make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));
}

function explanation(found) {
  if (!found) return [];
  const nodes = (found.notes || []).map((text) => make("p", { className: "note" }, text));
  const overlays = found.attention.filter((map) => map.png && map.attribute === null);
  if (overlays.length) {
    nodes.push(make("h3", {}, "Where the attributes look"), make("div", { className: "overlays" }, ...overlays.map((map) =>
      make("img", { src: `data:image/png;base64,${map.png}`, className: "overlay",
        alt: `Photo ${map.photo} with the regions marked that the given attributes attend to` }))));
  }
  const moves = found.contributions?.attributes || [];
  if (moves.length) {
    nodes.push(make("h3", {}, "What each attribute moved"),
      make("p", { className: "quiet" }, "Change of the prediction's log odds, against the attribute left out."),
      make("dl", {}, ...moves.flatMap((item) => [
        make("dt", {}, `${title(item.attribute)}: ${inWords(item.attribute, item.value)}`),
        make("dd", {}, `${item.log_odds > 0 ? "+" : ""}${item.log_odds.toFixed(2)}`)])));
  }
  if (found.evidence?.length) nodes.push(make("h3", {}, "What the literature says"), ...found.evidence.map(evidence));
  return nodes;
}

function evidence(item) {
  const status = item.vetted ? "vetted" : "not vetted";
  const quotes = (item.sources || []).map((source) => {
    const where = safeLink(source.url, source.title || source.source);
    return make("blockquote", {}, source.quote, make("p", { className: "quiet" }, where));
  });
  const direction = { raises: "raises", lowers: "lowers", none: "does not change" }[item.direction] || item.direction;
  return make("details", {}, make("summary", {}, `${item.factor || title(item.attribute)} ${direction} the risk of `
    + `${words(item.diagnosis)} (${status})`), make("p", {}, item.summary), ...quotes);
}

function safeLink(url, text) {
  // Addresses come from a corpus, which comes from files: nothing but the web is linked.
  const shown = text || url || "";
  return /^https?:\/\//i.test(url || "")
    ? make("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, shown) : shown;
}

// -------------------------------------------------------------------------------------------------- events

$("photos").addEventListener("change", (event) => choose([...event.target.files]));
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") choose([...event.dataTransfer.files]);
  });
}
// A photo that is dropped beside the field must not replace the page, and what was typed.
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
$("form").addEventListener("submit", ask);
$("clear").addEventListener("click", () => {
  photos = [];
  $("form").reset();
  showChosen();
  $("result").hidden = true;
});
$("unlock").addEventListener("click", () => {
  key = $("key").value.trim();
  begin();
});
begin();
