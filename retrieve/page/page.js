"use strict";
// Names and captions come from strangers' files: the page shows everything as text, never as markup.
const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];
const embedded = JSON.parse($("#embedded").textContent); // null behind a server; {answers, pictures, files} in a report
const form = $("#form");

// The fields of a question: name in `SearchRequest`, name in the address, option of the command line, kind.
const FIELDS = [
  ["text", "q", "", "text"], ["like", "like", "--like", "text"],
  ["plus", "plus", "--plus", "list"], ["without", "not", "--not", "list"],
  ["search_in", "in", "--in", "text"], ["language", "language", "--language", "text"],
  ["k", "k", "-k", "number"], ["by", "by", "--by", "text"],
  ["folders", "folder", "--folder", "list"],
  ["min_duration_seconds", "min", "--min-duration", "number"], ["max_duration_seconds", "max", "--max-duration", "number"],
  ["after", "after", "--after", "text"], ["before", "before", "--before", "text"],
  ["where", "where", "--where", "list"], ["min_confidence", "confidence", "--min-confidence", "text"],
  ["fold", "fold", "--no-fold", "yes"],
  ["exact", "exact", "--exact", "no"],
];
const LISTS = FIELDS.filter(field => field[3] === "list").map(field => field[0]);
const SAID = {plus: "and", without: "not", folders: "in", where: ""};
const DEFAULTS = {k: 10};

let lists = {};        // the form's fields that are shown as chips
let subject = null;    // searched with in place of a text: {like} or {id, file, kind, span}
let question = null;   // the question of `answer`: {fields, subject}
let answer = null;
let asking = null;     // the AbortController of the request under way
let info = {};         // from /api/index
let opened = null;     // {card, result, video}
const files = new Map(); // files searched with, by the number that the history keeps

// Small things

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const icon = name => draw("svg", {class: "icon", "aria-hidden": "true"}, draw("use", {href: "#i-" + name}));

function button(name, label, act) {
  const element = make("button", {type: "button", class: "round", "aria-label": label, title: label}, icon(name));
  element.onclick = act;
  return element;
}

function clock(seconds, tenths = false) {
  const whole = tenths ? Math.round(seconds * 10) / 10 : Math.floor(seconds + 1e-6);
  const rest = (whole % 60).toFixed(tenths ? 1 : 0).padStart(tenths ? 4 : 2, "0");
  const minutes = Math.floor(whole / 60);
  return minutes < 60 ? `${minutes}:${rest}` : `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}:${rest}`;
}

function unclock(text) {
  const parts = text.trim().split(":").map(Number);
  return text.trim() === "" || !parts.every(Number.isFinite) ? null : parts.reduce((sum, part) => 60 * sum + part, 0);
}

const number = value => value.toLocaleString("en");
const count = (n, one) => `${number(n)} ${one}${n === 1 ? "" : "s"}`;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const quote = text => /^[\w@+:,./-]+$/.test(text) && !text.startsWith("-") ? text : `'${text.replaceAll("'", `'\\''`)}'`;

let toasted = 0;
function toast(...children) {
  clearTimeout(toasted);
  $("#toast").replaceChildren(...children);
  toasted = setTimeout(hush, 6000);
}

function hush() {
  clearTimeout(toasted);
  $("#toast").replaceChildren();
}

async function copy(text) {
  // Without https a browser may refuse: then the user copies it by hand.
  const done = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  if (done) return toast("Copied", make("code", {}, text));
  toast("Copy this:", button("close", "Close", hush), make("code", {}, text));
  clearTimeout(toasted);
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer - check that svb serve is still running.");
  }
  const held = await response.json().catch(() => ({}));
  if (response.status === 401) location.reload(); // the session has ended: the server asks for its token
  if (!response.ok) throw new Error(held.error ?? `The server answered ${response.status} ${response.statusText}`);
  return held;
}

// Pictures and files: from the server, or from the report itself

const source = embedded ? {
  poster: (result, seconds) => embedded.pictures[result.key].posters.find(([at]) => at === seconds)?.[1],
  strip: result => embedded.pictures[result.key].strip,
  frames: result => embedded.pictures[result.key].frames,
  details: async result => embedded.files[result.key],
  media: details => details.uri,
} : {
  poster: (result, seconds) => `poster/${result.key}?t=${seconds.toFixed(2)}&h=360`,
  strip: (result, frames) => result.duration_seconds && `strip/${result.key}?n=${frames}&h=90`,
  frames: (result, width) => clamp(Math.round(width / 84), 4, 12),
  details: result => ask(`api/videos/${result.key}`),
  media: (details, preview) => `media/${details.key}${preview ? "/preview" : ""}`,
};

// The question: in the form, in the address, on the command line

function readForm() {
  const fields = {};
  for (const [name, , , kind] of FIELDS) {
    const input = form.elements[name];
    if (kind === "list") { if (lists[name]?.length) fields[name] = [...lists[name]]; continue; }
    if (!input) continue;
    if (input.type === "checkbox") { if (input.checked !== (kind === "yes")) fields[name] = input.checked; continue; }
    const value = kind === "number" ? unclock(input.value) : input.value.trim();
    if (value !== null && value !== "" && value !== DEFAULTS[name]) fields[name] = value;
  }
  if (subject) delete fields.text;
  if (subject?.like) fields.like = subject.like;
  return fields;
}

function fillForm(fields) {
  for (const [name, , , kind] of FIELDS) {
    const input = form.elements[name];
    if (kind === "list") lists[name] = [...fields[name] ?? []];
    else if (input?.type === "checkbox") input.checked = fields[name] ?? kind === "yes";
    else if (input) input.value = fields[name] ?? (input.tagName === "SELECT" ? DEFAULTS[name] ?? "" : "");
  }
  drawChips();
}

function toAddress(fields) {
  const parameters = new URLSearchParams();
  for (const [name, parameter, , kind] of FIELDS) {
    if (fields[name] === undefined) continue;
    if (kind === "list") fields[name].forEach(value => parameters.append(parameter, value));
    else parameters.set(parameter, kind === "yes" || kind === "no" ? Number(fields[name]) : fields[name]);
  }
  const text = parameters.toString();
  return text ? "?" + text : "";
}

function fromAddress(search) {
  const parameters = new URLSearchParams(search), fields = {};
  for (const [name, parameter, , kind] of FIELDS) {
    const values = parameters.getAll(parameter).filter(value => value !== "");
    if (!values.length) continue;
    const value = values[0];
    fields[name] = kind === "list" ? values : kind === "text" ? value : kind === "number" ? Number(value) : value === "1";
    if (Number.isNaN(fields[name])) delete fields[name];
  }
  if (fields.like) delete fields.text;
  return fields;
}

function toCommand({fields, subject}) {
  const options = [];
  if (subject?.file) {
    const span = subject.span ? `@${subject.span[0]}-${subject.span[1]}` : "";
    options.push("--" + subject.kind, quote(subject.file.name + span));
  }
  for (const [name, , flag, kind] of FIELDS) {
    if (fields[name] === undefined || name === "text") continue;
    if (kind === "list") fields[name].forEach(value => options.push(flag, quote(value)));
    else if (kind === "yes" || kind === "no") options.push(flag);
    else options.push(flag, quote(String(fields[name])));
  }
  const {text} = fields, index = embedded ? embedded.index_path : info.index;
  if (index !== undefined) options.push("--index", quote(index));
  if (text === undefined) return ["svb search", ...options].join(" ");
  // A text that looks like an option must come after `--`.
  return ["svb search", ...text.startsWith("-") ? [...options, "--", quote(text)] : [quote(text), ...options]].join(" ");
}

// Chips: the filters in use, each with a button that removes it

function drawChips() {
  const chips = [];
  if (subject?.like) chips.push(chip("like", subject.like, dropSubject));
  if (subject?.file) chips.push(fileChip());
  for (const name of LISTS) {
    lists[name]?.forEach((value, place) => chips.push(chip(SAID[name], value, () => {
      lists[name].splice(place, 1);
      submit();
      ($("#chips button") ?? $("#filters-button")).focus();
    }, name === "without" ? "not" : "")));
  }
  $("#chips").replaceChildren(...chips);
  $("#chips").hidden = !chips.length;
  const inPanel = Object.keys(readForm()).filter(name => !["text", "like", ...LISTS].includes(name)).length;
  $("#filters-count").textContent = inPanel ? `Filters (${inPanel})` : "Filters";
  form.elements.text.placeholder = subject ? "or describe what happens in the video" : "What happens in the video?";
}

function chip(word, value, remove, kind = "") {
  return make("span", {class: `pill chip ${kind}`}, make("span", {}, word ? make("b", {}, word + " ") : "", value),
    remove ? button("close", `Remove ${value}`, remove) : make("span"));
}

function fileChip() {
  const element = chip(subject.kind === "image" ? "image" : "clip", subject.file.name, dropSubject);
  if (subject.kind === "image") {
    // The content security policy allows a canvas; a blob's address would need an exception.
    createImageBitmap(subject.file).then(bitmap => {
      const canvas = make("canvas", {width: Math.round(52 * bitmap.width / bitmap.height), height: 52, "aria-hidden": "true"});
      canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
      element.prepend(canvas);
    }, () => {});
    return element;
  }
  const inputs = ["from", "to"].map((word, place) => {
    const input = make("input", {class: "clock", placeholder: word, "aria-label": `Use the clip ${word} (seconds or m:ss)`});
    input.value = subject.typed?.[place] ?? (subject.span ? clock(subject.span[place], true) : "");
    return input;
  });
  inputs.forEach(input => input.onchange = () => {
    if (saysNoTime(input)) return;
    const typed = inputs.map(each => each.value), [begin, end] = typed.map(unclock);
    subject = {...subject, typed, span: end === null ? null : [begin ?? 0, end]};
    if (end !== null || begin === null) submit(); // otherwise only half of a span is known
  });
  element.lastChild.before(...inputs);
  return element;
}

function saysNoTime(input) {
  const isNone = input.value.trim() !== "" && unclock(input.value) === null;
  if (isNone) toast(`${input.value} is not a time - expected seconds or m:ss`);
  return isNone;
}

function dropSubject() {
  subject = null;
  drawChips();
  if (form.elements.text.value.trim()) submit();
  else form.elements.text.focus();
}

function addTo(name) {
  const input = $(`[data-list=${name}]`), value = input.value.trim();
  if (!value) return false;
  const added = name === "where" ? $("#where-column").value + $("#where-op").value + value : value;
  input.value = "";
  if (!lists[name].includes(added)) lists[name].push(added);
  drawChips();
  return true;
}

// Browsers know no type for many video files.
const hasVideoSuffix = name => $("#file").accept.split(",").some(each => each.startsWith(".") && name.toLowerCase().endsWith(each));

function takeFile(file) {
  const kind = file.type.split("/")[0] === "image" ? "image" : /^video\//.test(file.type) || hasVideoSuffix(file.name) ? "video" : null;
  if (!kind) return toast(`${file.name} is neither an image nor a video that this page knows - choose another file`);
  const id = Date.now();
  files.set(id, file);
  subject = {id, file, kind, span: null};
  form.elements.text.value = "";
  submit();
}

// Asking

function submit() {
  for (const name of LISTS) addTo(name);
  drawChips();
  const fields = readForm();
  if (!fields.text && !subject) {
    // Filters alone do not start a search.
    form.elements.text.focus();
    return;
  }
  scrollTo(0, 0);
  search({fields, subject}, true);
}

const MOST = 1000; // the most videos that a server answers with
const SHOWN = {with_curves: true, num_moments: 5};

// Returns whether the page shows what this search found: a newer question may have overtaken it.
async function search(asked, push) {
  asking?.abort();
  const mine = asking = new AbortController();
  close();
  if (push) {
    const again = isAt(asked);
    history[again ? "replaceState" : "pushState"](
      {...again ? history.state : null, file: keptOf(asked.subject)}, "", location.pathname + toAddress(asked.fields));
  }
  document.body.classList.add("busy");
  $("#hero").hidden = true;
  $("#summary").textContent = asked.subject?.file ? `Reading ${asked.subject.file.name}…` : "Searching…";
  try {
    let found = await post(asked, mine.signal, SHOWN);
    if (!found.results?.length && found.num_videos && asked.fields.min_confidence) {
      const nearest = await post(asked, mine.signal, {...SHOWN, k: 1, min_confidence: undefined});
      found = {...nearest, isUnsure: true};
    }
    if (!found.results) throw new Error("The answer arrived incomplete - search again.");
    if (mine !== asking) return false;
    show(found, asked);
  } catch (error) {
    if (mine !== asking) return false;
    showError(error);
  }
  asking = null;
  document.body.classList.remove("busy");
  return true;
}

// Tells whether a question was asked, with or without an answer.
const isAsked = () => $("#hero").hidden;

// Returns what the history keeps of a subject: a file does not fit into an address.
const keptOf = asked => asked?.file ? {id: asked.id, kind: asked.kind, span: asked.span} : null;

// Tells whether the address and the history belong to a question.
function isAt({fields, subject}) {
  return location.search === toAddress(fields) && JSON.stringify(history.state?.file ?? null) === JSON.stringify(keptOf(subject));
}

function stopAsking() {
  asking?.abort();
  asking = null;
  document.body.classList.remove("busy");
}

function post({fields, subject}, signal, more) {
  const request = {...fields, ...more};
  if (!subject?.file) {
    return ask("api/search", {method: "POST", signal, headers: {"Content-Type": "application/json"}, body: JSON.stringify(request)});
  }
  if (subject.span) request.span_seconds = subject.span;
  const body = new FormData();
  body.append("kind", subject.kind);
  body.append("request", JSON.stringify(request));
  body.append("file", subject.file, subject.file.name);
  return ask("api/search/file", {method: "POST", signal, body});
}

async function loadIndex() {
  info = await ask("api/index");
  $("#holdings").textContent = `${count(info.num_videos, "video")}, ${count(info.num_moments, "moment")}`;
  $("#folders").replaceChildren(...(info.folders ?? []).map(folder => make("option", {value: folder})));
  const columns = Array.isArray(info.columns) ? info.columns : Object.keys(info.columns ?? {});
  const chosen = $("#where-column").value;
  $("#where-column").replaceChildren(...columns.map(column => make("option", {}, column)));
  if (columns.includes(chosen)) $("#where-column").value = chosen;
  $("#where").hidden = !columns.length;
  $$(".speech").forEach(each => { each.hidden = !info.has_speech; });
  $("#languages").replaceChildren(...(info.languages ?? []).map(language => make("option", {value: language})));
}

// The answer

function show(found, asked) {
  if (opened) leave(); // a moment of the previous answer, opened while this one was loading
  answer = found;
  question = asked;
  document.title = `${asked.fields.text ?? asked.fields.like ?? asked.subject?.file?.name ?? "svb"} - svb`;
  $("#hero").hidden = true;
  $("#summary").replaceChildren(...summarise(found).map(part => make("span", {}, part)));
  $("#notices").replaceChildren(...noticesOf(found));
  const scale = scaleOf(found.results);
  seen.disconnect();
  $("#more").hidden = embedded || found.isUnsure || found.results.length < (asked.fields.k ?? DEFAULTS.k) || found.results.length >= Math.min(found.num_videos, MOST);
  $("#results").replaceChildren(...found.results.map(result => cardOf(result, scale)));
  $("#timelines").hidden = Boolean(embedded) || !found.results.length;
  if (!embedded && found.generation !== info.generation) loadIndex().catch(() => {});
}

function summarise(found) {
  const rows = found.exact ? "exact" : `approximate${found.recall === null ? "" : `, recall@10 ${found.recall.toFixed(3)}`}`;
  const took = found.elapsed_seconds.total;
  return [
    found.results.length && !found.isUnsure ? `${number(found.results.length)} of ${count(found.num_videos, "video")}` : `${count(found.num_videos, "video")} compared`,
    count(found.num_windows, "window"), rows,
    ...took === undefined ? [] : [`${(took * 1000).toFixed(took < 0.01 ? 1 : 0)} ms`], `generation ${found.generation}`, ...embedded ? [`index ${embedded.index}`] : [],
  ];
}

function noticesOf(found) {
  const notices = [];
  if (!found.results.length && found.num_videos && found.request.min_confidence) {
    notices.push(notice("No confident match", [`No video reaches the confidence ${found.request.min_confidence} - remove that filter to see the nearest videos.`, ...found.notes]));
  } else if (!found.results.length) notices.push(notice("Nothing found", found.notes.length ? found.notes : ["The filters exclude every video - remove one."]));
  else if (found.isUnsure || found.confidence === "weak") notices.push(notice("No confident match; nearest:", found.notes));
  else if (found.notes.length) notices.push(notice(null, found.notes));
  if (found.captions.length) notices.push(make("section", {class: "notice"}, make("h4", {}, "Best matching captions"), captionsOf(found.captions)));
  return notices;
}

function notice(title, lines, kind = "") {
  return make("section", {class: `notice ${kind}`}, ...title ? [make("h2", {}, title)] : [], ...lines.map(line => make("p", {}, line)));
}

function showError(error) {
  stopAsking();
  if (opened) leave();
  answer = null;
  document.title = "svb";
  $("#hero").hidden = true;
  $("#summary").textContent = "";
  $("#results").replaceChildren();
  $("#more").hidden = $("#timelines").hidden = true;
  const panel = notice("Search failed", [error.message], "bad");
  panel.setAttribute("role", "alert");
  $("#notices").replaceChildren(panel);
}

function captionsOf(captions) {
  return make("ul", {class: "captions"}, ...captions.map(caption => {
    const says = make(embedded ? "span" : "button", {class: "says"}, caption.caption);
    if (!embedded) {
      says.title = "Search with this caption";
      says.onclick = () => { subject = null; fillForm({text: caption.caption}); submit(); };
    }
    const at = caption.begin_seconds === null ? "" : ` ${clock(caption.begin_seconds)}`;
    return make("li", {}, make("span", {class: "score"}, caption.score.toFixed(3)), says,
      make("span", {class: "quiet", title: caption.video_id}, caption.pool + at));
  }));
}

function scaleOf(results) {
  // All results share one scale: a curve that looks flat is flat.
  const scores = results.flatMap(result => [...result.curve?.scores ?? [], ...seenOf(result).map(moment => moment.score)]);
  const [low, high] = scores.reduce(([least, most], score) => [Math.min(least, score), Math.max(most, score)], [Infinity, -Infinity]);
  const span = Math.max(high - low, 0.02);
  return score => 94 - 84 * (score - low) / span;
}

// Only what is seen has a place on the scale of the curve; a spoken line has a score of its own.
const seenOf = result => result.moments.filter(moment => moment.kind !== "said");

// Moments are on the file's own clock. A video may begin late on it; its duration counts from there.
function durationOf(result, begin = 0) {
  const last = Math.max(...result.moments.map(moment => moment.end_seconds), result.curve?.times_seconds.at(-1) ?? 0);
  return result.duration_seconds ?? last - begin;
}

// A timeline for an editor, of all moments shown

const HANDLES_SECONDS = 1;

async function saveTimeline(format) {
  const {fields, subject} = question;
  const body = JSON.stringify({
    query: fields.text ?? fields.like ?? subject?.file?.name ?? "", format, handles_seconds: HANDLES_SECONDS,
    videos: answer.results.map(({key, rank, score, confidence, moments}) => ({
      key, rank, score, confidence,
      moments: moments.map(({begin_seconds, end_seconds, best_seconds, score}) => ({begin_seconds, end_seconds, best_seconds, score})),
    })),
  });
  toast("Making the timeline…");
  try {
    const made = await ask("api/timeline", {method: "POST", headers: {"Content-Type": "application/json"}, body});
    const url = URL.createObjectURL(new Blob([made.content]));
    make("a", {href: url, download: made.name}).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
    toast([`Saved ${made.name}`, ...made.notes].join("; "));
  } catch (error) {
    toast(error.message);
  }
}

for (const each of $$("#timelines button")) each.onclick = () => saveTimeline(each.textContent.slice(1));

// A card: the poster, the curve over the strip, the moments

function cardOf(result, scale) {
  const card = $("#card").content.cloneNode(true).firstElementChild;
  const [best] = result.moments, tenths = durationOf(result) < 60 && result.moments.some(moment => moment.begin_seconds % 1 || moment.end_seconds % 1);
  card.result = result;
  card.begin = embedded?.files[result.key]?.begin_seconds ?? 0;
  const slash = result.video_id.lastIndexOf("/") + 1, name = result.video_id.slice(slash);
  $("h3", card).append(make("span", {class: "quiet"}, result.video_id.slice(0, slash)), name);
  $("h3", card).title = result.source_path;
  $(".rank", card).textContent = result.rank;
  $(".badge", card).textContent = result.confidence;
  $(".badge", card).classList.add(result.confidence);
  const isMeasured = answer.request.text !== undefined && answer.request.by !== "video" && (result.why ?? "seen") === "seen";
  $(".badge", card).title = `${result.confidence}: ${isMeasured && info.confidence?.[result.confidence] || "how sure this result is"}`;
  $(".score", card).textContent = result.score.toFixed(3);
  if (searchesSpeech()) {
    $(".why", card).textContent = result.why;
    $(".score", card).title = "Score of picture and speech together; a score below 1 may be chance";
  }
  const image = $(".poster img", card);
  image.onload = () => image.classList.toggle("tall", image.naturalHeight > image.naturalWidth);
  image.onerror = () => image.removeAttribute("src");
  if (result.rank > 3) image.loading = "lazy";
  image.src = source.poster(result, best.best_seconds) ?? "";
  $(".poster", card).setAttribute("aria-label", `Play ${name} from ${clock(best.best_seconds)}`);
  $(".poster", card).onclick = () => play(card, best.best_seconds);
  $(".stamp", card).textContent = `${clock(best.best_seconds, tenths)}${result.duration_seconds === null ? "" : ` / ${clock(result.duration_seconds, tenths)}`}`;
  $(".moments", card).append(...(result.lines ?? []).map(line => lineOf(card, line)), ...seenOf(result).map(moment => {
    const span = `${clock(moment.begin_seconds, tenths)}–${clock(moment.end_seconds, tenths)}`;
    const chosen = make("button", {type: "button", "aria-label": `Play ${span}, score ${moment.score.toFixed(3)}`}, icon("play"), span, make("span", {class: "quiet"}, moment.score.toFixed(3)));
    chosen.onclick = () => play(card, moment.best_seconds);
    return make("li", {}, chosen);
  }));
  card.scale = scale;
  drawTimeline(card);
  wireActions(card);
  seen.observe(card);
  return card;
}

function searchesSpeech() {
  const {request, results} = answer;
  return request.text !== undefined && request.search_in !== "picture" && (info.has_speech || results.some(result => result.lines?.length));
}

// Draws a spoken line and marks the words that were asked for; its marks count letters, not UTF-16's halves.
function lineOf(card, line) {
  const letters = [...line.text], part = (begin, end) => letters.slice(begin, end).join(""), shown = [];
  let end = 0;
  for (const [begin, stop] of line.marks) {
    shown.push(part(end, begin), make("mark", {}, part(begin, stop)));
    end = stop;
  }
  const isTimed = line.begin_seconds !== null, at = isTimed ? line.begin_seconds : card.result.moments[0].begin_seconds;
  const says = make("button", {type: "button", lang: line.language, "aria-label": `Play ${clock(at)}: ${line.text}`},
    icon("play"), make("span", {class: "quiet"}, isTimed ? clock(at) : "note"), make("q", {}, ...shown, part(end)),
    make("span", {class: "quiet"}, line.language));
  says.onclick = () => play(card, at);
  return make("li", {class: "line"}, says);
}

// A card loads its strip and the state of its file when it comes into view.
const seen = new IntersectionObserver(entries => {
  for (const {target: card} of entries.filter(entry => entry.isIntersecting)) {
    seen.unobserve(card);
    const frames = source.frames(card.result, $(".strip", card).clientWidth);
    drawStrip($(".strip", card), source.strip(card.result, frames), frames);
    detailsOf(card).then(details => {
      beginAt(card, details.begin_seconds ?? 0);
      card.classList.toggle("gone", !details.available);
      $(".problem", card).textContent = details.available ? "" : details.problem ?? "The file is no longer there.";
    }, () => {});
  }
}, {rootMargin: "400px"});

function detailsOf(card) {
  card.details ??= source.details(card.result);
  card.details.catch(() => { card.details = null; }); // try again the next time
  return card.details;
}

function drawStrip(strip, url, frames) {
  if (!url) return;
  const sprite = new Image();
  sprite.onload = () => {
    const width = sprite.naturalWidth / frames, height = sprite.naturalHeight;
    // Each frame fills its part of the time and is cropped to it; an SVG does both, at any width.
    strip.replaceChildren(...Array.from({length: frames}, (_, frame) => draw(
      "svg", {viewBox: `${frame * width} 0 ${width} ${height}`, preserveAspectRatio: "xMidYMid slice", "aria-hidden": "true"},
      draw("image", {href: url, width: sprite.naturalWidth, height}))));
  };
  sprite.src = url;
}

function beginAt(card, begin) {
  if (Math.abs(begin - card.begin) < 0.01) return;
  card.begin = begin;
  $$(".veil, .stretch, .needle:not(.play)", card).forEach(each => each.remove());
  $(".curve", card).replaceChildren();
  $(".peaks", card).replaceChildren();
  drawTimeline(card);
}

function drawTimeline(card) {
  const {result, scale, begin: start} = card, time = $(".time", card), duration = durationOf(result, start), last = start + duration;
  const percent = seconds => clamp(100 * (seconds - start) / duration, 0, 100);
  const place = (element, begin, end) => {
    element.style.left = percent(begin) + "%";
    element.style.width = percent(end) - percent(begin) + "%";
    return element;
  };
  if (result.curve?.scores.length) $(".curve", card).append(drawCurve(result.curve, start, duration, scale));
  const stretches = [...result.moments].sort((a, b) => a.begin_seconds - b.begin_seconds);
  let covered = start;
  for (const {begin_seconds: begin, end_seconds: end} of [...stretches, {begin_seconds: last, end_seconds: last}]) {
    if (begin > covered) $(".strip", card).after(place(make("i", {class: "veil"}), covered, begin));
    if (end > begin) $(".strip", card).after(place(make("i", {class: "stretch"}), begin, end));
    covered = Math.max(covered, end);
  }
  result.moments.forEach((moment, rank) => {
    const isSaid = moment.kind === "said";
    const peak = make("button", {type: "button", class: `peak${rank ? "" : " best"}${isSaid ? " said" : ""}`, tabindex: -1, "aria-label": `Play from ${clock(moment.best_seconds)}`});
    peak.style.left = percent(moment.best_seconds) + "%";
    peak.style.top = (result.curve?.scores.length ? scale(isSaid ? scoreAt(result.curve, moment.best_seconds) : moment.score) : 60) + "%";
    peak.onclick = event => { event.stopPropagation(); play(card, moment.best_seconds); };
    $(".peaks", card).append(peak);
  });
  wireTimeline(card, time, duration);
}

function drawCurve({times_seconds: times, scores}, begin, duration, scale) {
  // The middles of moments do not reach the ends of the video, so the first and last score are drawn out to them.
  const points = [[begin, scores[0]], ...times.map((seconds, i) => [seconds, scores[i]]), [begin + duration, scores.at(-1)]];
  const line = points.map(([seconds, score]) => `${(1000 * (seconds - begin) / duration).toFixed(1)} ${scale(score).toFixed(1)}`).join("L");
  return draw("svg", {viewBox: "0 0 1000 100", preserveAspectRatio: "none", "aria-hidden": "true"},
    draw("path", {class: "area", d: `M0 100L${line}L1000 100Z`}), draw("path", {class: "line", d: `M${line}`}));
}

function scoreAt(curve, seconds) {
  if (!curve?.scores.length) return null;
  const after = curve.times_seconds.findIndex(time => time >= seconds);
  if (after <= 0) return after < 0 ? curve.scores.at(-1) : curve.scores[0];
  const [t0, t1] = curve.times_seconds.slice(after - 1, after + 1), [s0, s1] = curve.scores.slice(after - 1, after + 1);
  return s0 + (s1 - s0) * (seconds - t0) / (t1 - t0);
}

function wireTimeline(card, time, duration) {
  const needle = make("i", {class: "needle", hidden: ""}, make("span")), track = $(".track", card), {begin} = card;
  let cursor = card.result.moments[0].best_seconds;
  time.append(needle);
  const label = seconds => {
    const score = scoreAt(card.result.curve, seconds);
    return clock(seconds, duration < 60) + (score === null ? "" : `  ${score.toFixed(3)}`);
  };
  const point = seconds => {
    cursor = clamp(seconds, begin, begin + duration);
    needle.hidden = false;
    needle.style.left = 100 * (cursor - begin) / duration + "%";
    needle.classList.toggle("left", cursor - begin > duration / 2);
    needle.firstChild.textContent = label(cursor);
    describe();
  };
  const describe = () => {
    track.setAttribute("aria-valuenow", cursor.toFixed(1));
    track.setAttribute("aria-valuetext", `${clock(cursor)}, score ${scoreAt(card.result.curve, cursor)?.toFixed(3) ?? "unknown"}`);
  };
  const under = event => {
    const box = time.getBoundingClientRect();
    return begin + duration * (event.clientX - box.left) / box.width;
  };
  track.setAttribute("aria-label", `Score over the time of ${card.result.video_id}`);
  track.setAttribute("aria-valuemin", begin.toFixed(1));
  track.setAttribute("aria-valuemax", (begin + duration).toFixed(1));
  describe();
  time.onpointermove = event => event.pointerType === "mouse" && point(under(event));
  time.onpointerleave = track.onblur = () => { needle.hidden = true; };
  time.onclick = event => play(card, clamp(under(event), begin, begin + duration));
  track.onkeydown = event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (step) point(cursor + step * Math.max(duration / 40, 0.5));
    else if (event.key === "Enter") play(card, cursor);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
}

// What a card can do

function wireActions(card) {
  const {result} = card, acts = {
    similar: () => { subject = {like: result.video_id}; form.elements.text.value = ""; submit(); },
    captions: pressed => toggleMore(card, pressed, () => captionPanel(result)),
    command: () => copy(toCommand(question)),
    link: () => copy(new URL(location.pathname + toAddress(question.fields) + momentHash(result, secondsAt(card)), location).href),
    details: pressed => toggleMore(card, pressed, () => detailsPanel(card)),
    duplicates: pressed => toggleMore(card, pressed, () => make("section", {}, make("h4", {}, "Near-duplicates, folded into this result"),
      make("ul", {class: "duplicates"}, ...result.duplicates.map(duplicate => make("li", {}, duplicate))))),
  };
  const hidden = {
    similar: embedded, captions: embedded || info.has_captions === false, link: embedded || question.subject?.file,
    duplicates: !result.duplicates.length,
  };
  for (const each of $$("[data-do]", card)) {
    each.hidden = Boolean(hidden[each.dataset.do]);
    each.onclick = () => acts[each.dataset.do](each);
  }
  $("[data-do=duplicates]", card).textContent = `+${count(result.duplicates.length, "near-duplicate")}`;
}

// Returns the time at which a card's player is, or would begin.
function secondsAt(card) {
  if (opened?.card !== card) return card.result.moments[0].best_seconds;
  return opened.video.readyState > 0 ? opened.video.currentTime + opened.offset : opened.seconds;
}

async function toggleMore(card, pressed, build) {
  const open = pressed.getAttribute("aria-expanded") !== "true";
  $$("[aria-expanded]", card).forEach(each => each.setAttribute("aria-expanded", String(open && each === pressed)));
  $(".more", card).replaceChildren();
  if (!open) return;
  let panel;
  try { panel = await build(); } catch (error) { panel = make("p", {class: "quiet"}, error.message); }
  if (pressed.getAttribute("aria-expanded") === "true") $(".more", card).replaceChildren(panel);
}

async function captionPanel(result) {
  const {captions} = await post({fields: {like: result.video_id}}, undefined, {k: 1, num_captions: 10});
  if (!captions.length) return make("p", {class: "quiet"}, "The index has no captions.");
  return make("section", {}, make("h4", {}, "Best matching captions"), captionsOf(captions));
}

async function detailsPanel(card) {
  const {result} = card, details = await detailsOf(card).catch(() => ({}));
  const rows = [
    ["video_id", result.video_id], ["file", result.source_path],
    ["duration", result.duration_seconds === null ? "unknown" : `${clock(result.duration_seconds, true)} (${result.duration_seconds.toFixed(2)} s)`],
    ...Object.entries({...result.metadata, ...details.metadata}),
  ];
  return make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value ?? ""))]));
}

// Playing

// In a report the hash also has the number of the answer.
const answerHash = () => embedded?.answers.length > 1 ? `#a=${embedded.answers.indexOf(answer)}` : "";
const momentHash = (result, seconds) => `${answerHash() || "#"}${answerHash() && "&"}v=${result.key}&t=${seconds.toFixed(2)}`;

// The open moment has one entry in the history, whichever moment it is: going back closes the player.
async function play(card, seconds, push = true) {
  if (push) {
    const {state} = history, hash = momentHash(card.result, seconds);
    if (opened || state?.opened) history.replaceState(state, "", hash);
    else history.pushState({...state, opened: true}, "", hash);
  }
  if (opened?.card !== card) {
    close();
    openPlayer(card);
  }
  const {video} = opened;
  opened.seconds = seconds;
  if (opened.failed) load(opened);
  if (video.readyState > 0) seek();
  if (video.src) video.play().catch(() => {}); // a browser does not start to play without a click
}

// A preview begins at 0; a file plays on its own clock. Chromium first takes the length of a file that begins late for
// its end and seeks no further; after it has read some of the file it knows the end.
function seek() {
  const {card, video, seconds, offset, isPreview} = opened;
  const at = clamp(seconds - offset, 0, (isPreview ? 0 : card.begin) + video.duration - 0.05);
  opened.isShort = at > video.duration;
  video.currentTime = at;
}

function openPlayer(card) {
  const {result} = card, name = result.video_id;
  const video = make("video", {controls: "", playsinline: "", preload: "metadata", "aria-label": name});
  const says = make("p", {hidden: ""});
  const player = make("div", {class: "player"}, video, button("close", "Close the player", leave), says);
  const needle = make("i", {class: "needle play"});
  const say = text => { says.textContent = text; says.hidden = !text; };
  const mine = opened = {card, result, video, needle, player, say, seconds: 0, offset: 0, isPreview: false, isShort: false, failed: false};
  video.poster = source.poster(result, result.moments[0].best_seconds) ?? "";
  video.onloadedmetadata = () => { say(""); if (mine === opened) seek(); };
  video.ondurationchange = () => { if (mine === opened && mine.isShort) seek(); };
  video.ontimeupdate = () => {
    const seconds = video.currentTime + mine.offset - card.begin;
    needle.style.left = clamp(100 * seconds / (durationOf(result, card.begin) || video.duration), 0, 100) + "%";
  };
  if (document.activeElement === $(".poster", card)) card.focus({preventScroll: true});
  $(".poster", card).hidden = true;
  card.prepend(player);
  card.classList.add("open");
  $(".time", card).append(needle);
  load(mine);
  card.scrollIntoView({block: "nearest"});
}

async function load(mine) {
  mine.failed = false;
  mine.say("");
  try {
    const details = await detailsOf(mine.card);
    if (mine !== opened) return;
    beginAt(mine.card, details.begin_seconds ?? 0);
    if (!details.available) {
      mine.card.details = null; // the file may be back the next time
      throw new Error(details.problem ?? `${mine.result.source_path} is no longer there.`);
    }
    start(mine, details, !details.playable && !embedded);
  } catch (error) {
    mine.failed = true;
    mine.say(error.message);
  }
}

function start(mine, details, preview) {
  if (preview) mine.say("Making a preview that browsers can play…");
  Object.assign(mine, {isPreview: preview, offset: preview ? details.preview_begin_seconds ?? 0 : 0});
  mine.video.onerror = () => fail(mine, details);
  mine.video.src = source.media(details, preview);
  mine.video.play().catch(() => {});
}

async function fail(mine, details) {
  const {video, isPreview} = mine;
  if (embedded) return mine.say(`This browser cannot play ${mine.result.source_path}.`);
  // The video element does not tell why the server refused.
  const refusal = await ask(source.media(details, isPreview), {headers: {Range: "bytes=0-0"}}).then(() => null, error => error.message);
  if (mine !== opened) return;
  const isBroken = video.error?.code === MediaError.MEDIA_ERR_NETWORK;
  if (refusal === null && !isBroken && !isPreview) return start(mine, details, true);
  mine.failed = true;
  mine.say(refusal ?? (isBroken ? "The connection was lost - play it again." : "This browser cannot play the video."));
}

function close() {
  if (!opened) return;
  const {card, video, needle, player} = opened;
  opened = null;
  video.onerror = null;
  video.pause();
  video.removeAttribute("src");
  video.load(); // lets go of the connection
  player.remove();
  needle.remove();
  card.classList.remove("open");
  $(".poster", card).hidden = false;
}

function leave() {
  const {card} = opened;
  close();
  history.replaceState(history.state, "", location.pathname + location.search + answerHash());
  card.focus({preventScroll: true});
}

// The address: the question, and in the hash the open moment

async function restore() {
  if (embedded) return showReport();
  if (answer && isAt(question)) {
    if (asking) {
      // The user went back to this answer before the next one came.
      stopAsking();
      subject = question.subject;
      fillForm(question.fields);
      close();
      show(answer, question);
    }
    return openFromHash();
  }
  const fields = fromAddress(location.search), {state} = history;
  const file = state?.file ? files.get(state.file.id) : null;
  subject = file ? {...state.file, file} : fields.like ? {like: fields.like} : null;
  fillForm(fields);
  // Parameters that are not part of the question are removed from the address.
  history.replaceState(state, "", location.pathname + toAddress(readForm()) + location.hash);
  if (state?.file && !file) return showError(new Error("The page was reloaded and no longer has the file - drop it here again."));
  if (!fields.text && !subject) return showStart();
  if (await search({fields: readForm(), subject}, false)) openFromHash();
}

function openFromHash() {
  const moment = new URLSearchParams(location.hash.slice(1)), key = moment.get("v"), seconds = Number(moment.get("t"));
  const card = key && $$(".card").find(each => each.result.key === key);
  if (card && Number.isFinite(seconds)) play(card, seconds, false);
  else if (opened) close();
}

function showStart() {
  stopAsking();
  answer = question = null;
  close();
  document.title = "svb";
  $("#summary").textContent = "";
  $("#notices").replaceChildren();
  $("#results").replaceChildren();
  $("#more").hidden = $("#timelines").hidden = true;
  $("#hero").hidden = false;
  if (matchMedia("(pointer: fine)").matches) form.elements.text.focus();
}

function showReport() {
  const chosen = Number(new URLSearchParams(location.hash.slice(1)).get("a") ?? 0);
  const found = embedded.answers[chosen] ?? embedded.answers[0];
  if (found !== answer) showAnswer(found);
  openFromHash();
}

function showAnswer(found) {
  const {image, video, span_seconds: span, num_moments, num_captions, with_curves, ...fields} = found.request;
  const file = image ?? video;
  form.hidden = true;
  document.body.classList.add("report");
  $("#report-head").hidden = false;
  $("#asked").textContent = titleOf(found.request);
  $("#narrowed").replaceChildren(...narrowed(fields));
  const several = embedded.answers.length > 1 ? embedded.answers : [], hadFocus = $("#queries").contains(document.activeElement);
  $("#queries").replaceChildren(...several.map((each, place) => {
    const pill = make("button", {type: "button", class: "pill", "aria-pressed": String(each === found)}, titleOf(each.request), make("span", {class: `badge ${each.confidence}`}, each.confidence));
    pill.onclick = () => { location.hash = `a=${place}`; };
    return make("li", {}, pill);
  }));
  if (hadFocus) $("#queries [aria-pressed=true]").focus();
  close();
  show(found, {fields, subject: file ? {file: {name: file}, kind: image ? "image" : "video", span} : null});
}

function titleOf({text, like, image, video, span_seconds: span}) {
  if (text) return text;
  return like ? `like ${like}` : image ? `image ${image}` : `clip ${video}${span ? ` ${span[0]} to ${span[1]} s` : ""}`;
}

function narrowed(fields) {
  return FIELDS.filter(([name]) => !["text", "like", "k"].includes(name) && fields[name] !== undefined).flatMap(([name, , flag, kind]) => {
    if (kind === "list") return fields[name].map(value => chip(SAID[name], value, null, name === "without" ? "not" : ""));
    return [chip("", kind === "yes" || kind === "no" ? flag : `${flag} ${fields[name]}`, null)];
  });
}

// Keys, files dropped, and the start

function step(by) {
  const cards = $$(".card"), now = cards.indexOf(document.activeElement.closest(".card") ?? opened?.card);
  const next = cards[clamp(now + by, 0, cards.length - 1)];
  next?.focus({preventScroll: true});
  next?.scrollIntoView({block: "nearest", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth"});
}

function playNext(card) {
  const {moments} = card.result, from = opened?.card === card ? opened.seconds : null;
  const now = moments.findIndex(moment => from !== null && Math.abs(moment.best_seconds - from) < 0.01);
  play(card, moments[(now + 1) % moments.length].best_seconds);
}

function playOrPause(card) {
  if (opened?.card !== card) play(card, card.result.moments[0].best_seconds);
  else if (opened.video.paused) opened.video.play().catch(() => {});
  else opened.video.pause();
}

function press(card, name) {
  const pressed = $(`[data-do=${name}]`, card);
  if (!pressed.hidden) pressed.click();
}

const KEYS = {
  "/": () => { form.elements.text.focus(); form.elements.text.select(); },
  "?": () => $("#help").showModal(),
  f: () => $("#filters-button").click(),
  j: () => step(1), ArrowDown: () => step(1), k: () => step(-1), ArrowUp: () => step(-1),
};
const CARD_KEYS = {
  Enter: playOrPause, " ": playOrPause, n: playNext,
  s: card => press(card, "similar"), c: card => press(card, "captions"), d: card => press(card, "details"),
};

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || $("#help").open) return;
  const {target, key} = event, empty = target === form.elements.text && !target.value;
  // The empty box has the focus at first: these two keys work in it too.
  const types = target.matches("input, select, textarea") && !(empty && (key === "/" || key === "?"));
  if (key === "Escape") {
    event.preventDefault(); // it would empty the box
    if (opened) leave();
    else if (!$("#filters").hidden) KEYS.f();
    else if (types) target.blur();
    return;
  }
  if (types || (embedded && (key === "/" || key === "f"))) return;
  const card = target.closest(".card") ?? (target === document.body ? opened?.card : null);
  // A button or a video with the focus takes Enter and Space.
  const act = card && CARD_KEYS[key] && (key.length > 1 || key === " " ? target === card || target === document.body : true)
    ? () => CARD_KEYS[key](card) : key.startsWith("Arrow") && target.matches("video") ? null : KEYS[key];
  if (!act || (key.startsWith("Arrow") && !answer)) return;
  event.preventDefault();
  act();
});

form.onsubmit = event => {
  event.preventDefault();
  if (form.elements.text.value.trim()) subject = null;
  submit();
};
form.addEventListener("change", event => {
  if (!event.target.closest("#filters") || event.target.dataset.list || !event.target.name) return;
  if (event.target.type === "date" && !event.target.validity.valid) return; // a year that is being typed
  if (event.target.inputMode === "numeric" && saysNoTime(event.target)) return;
  drawChips();
  if (isAsked()) submit();
});
$$("[data-add]").forEach(each => each.onclick = () => { if (addTo(each.dataset.add) && isAsked()) submit(); });
$("#filters-button").onclick = () => {
  const filters = $("#filters"), pressed = $("#filters-button");
  filters.hidden = !filters.hidden;
  pressed.setAttribute("aria-expanded", String(!filters.hidden));
  (filters.hidden ? pressed : $("select", filters)).focus();
};
$("#help-button").onclick = KEYS["?"];
$("#choose").onclick = () => $("#file").click();
$("#file").onchange = event => {
  if (event.target.files.length) takeFile(event.target.files[0]);
  event.target.value = "";
};
$("#more").onclick = () => {
  // The question that was answered, even if the form has changed since.
  subject = question.subject;
  fillForm({...question.fields, k: Math.min(answer.results.length + 20, MOST)});
  search({fields: readForm(), subject}, true);
};
$("#home").onclick = event => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  if (embedded) return;
  history.pushState(null, "", location.pathname);
  restore();
};

const carriesFile = event => !embedded && event.dataTransfer?.types.includes("Files");
addEventListener("dragover", event => { if (carriesFile(event)) { event.preventDefault(); $("#drop").hidden = false; } });
addEventListener("dragleave", event => { if (!event.relatedTarget) $("#drop").hidden = true; });
addEventListener("drop", event => {
  $("#drop").hidden = true;
  if (!carriesFile(event)) return;
  event.preventDefault();
  if (event.dataTransfer.files.length) takeFile(event.dataTransfer.files[0]);
});
addEventListener("paste", event => {
  const {files: pasted, types} = event.clipboardData;
  // A spreadsheet pastes a cell as text and as a picture.
  const isText = event.target.matches?.("input") && types.includes("text/plain");
  if (!embedded && !$("#help").open && pasted.length && !isText) takeFile(pasted[0]);
});
addEventListener("popstate", restore);
new ResizeObserver(([{target}]) => {
  const isSticky = getComputedStyle(target).position === "sticky";
  document.documentElement.style.setProperty("--header", `${isSticky ? target.offsetHeight : 0}px`);
}).observe($("header"));

if (!embedded) loadIndex().catch(() => {}); // when the server is gone, a search explains it better
restore();
