"use strict";

const STATES = ["settled", "active", "worthless", "given"];
const MEANING = ["finished", "in the window", "noise, not begun", "there from the start"];
const UNKNOWN = 101; // a confidence in percent that is not known
const MASK_SIGN = "\u00b7";
const EVENTS_SHOWN = 10;
const byId = (id) => document.getElementById(id);

/* The page's data: a length, a JSON header and byte planes, deflated and in base64. */
async function unpack(base64) {
  const packed = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = new DataView(bytes.buffer).getUint32(0, true);
  const run = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size)));
  let at = 4 + size;
  for (const [name, planes] of run.arrays) {
    const end = at + planes * run.steps.length * run.length;
    run[name] = undiffered(bytes.subarray(at, end), planes, run.length);
    at = end;
  }
  return run;
}

/* [frames * length] values from their differences between frames, whose bytes lie in planes, lowest first. */
function undiffered(bytes, planes, length) {
  const cells = bytes.length / planes;
  const values = new Int32Array(cells);
  for (let k = 0; k < cells; k++) {
    let value = k < length ? 0 : values[k - length];
    for (let p = 0; p < planes; p++) value += bytes[p * cells + k] << (8 * p);
    values[k] = value & (2 ** (8 * planes) - 1);
  }
  return values;
}

/* What happened to each position: [{frame, from, to, confidence, correction}], in order. */
function histories(run) {
  const { length, tokens, confidence, mask } = run;
  const events = Array.from({ length }, () => []);
  for (let k = length; k < tokens.length; k++) {
    const [from, to] = [tokens[k - length], tokens[k]];
    if (from !== to) {
      const frame = Math.floor(k / length);
      events[k % length].push({ frame, from, to, confidence: confidence[k], correction: from !== mask });
    }
  }
  return events;
}

/* A colour of the scale from 0 (settled) to 1 (worthless), as [red, green, blue]. */
function color(scale, share) {
  const place = share * (scale.length - 1);
  const low = Math.min(Math.floor(place), scale.length - 2);
  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const [a, b] = [channels(scale[low]), channels(scale[low + 1])];
  return a.map((x, i) => x + (b[i] - x) * (place - low));
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function show(run) {
  const { length, steps, tau_max: top } = run;
  const frames = steps.length;
  const events = histories(run);
  const firstCorrection = events.map((list) => list.find((event) => event.correction)?.frame ?? frames);
  const correctedBy = new Array(frames).fill(0);
  events.flat().forEach((event) => (correctedBy[event.frame] += event.correction));
  for (let f = 1; f < frames; f++) correctedBy[f] += correctedBy[f - 1];
  const isNew = (i) => events[i].some((event) => event.correction && event.frame === frame);
  let frame = 0;
  let timer = null;
  let pointed = null; // the token that the tip is about

  // ---- tokens

  const spans = Array.from({ length }, (_, i) => {
    const span = element("span", "token");
    span.dataset.position = i;
    return span;
  });
  byId("text").replaceChildren(...spans);
  byId("text").style.setProperty("--mask", `${run.mask_width}ch`);

  function draw(i) {
    const k = frame * length + i;
    const [token, state] = [run.tokens[k], run.states[k]];
    const masked = token === run.mask;
    const isCorrected = firstCorrection[i] <= frame;
    const marks = [masked && "mask", isCorrected && "corrected", isCorrected && isNew(i) && "fresh"];
    const names = ["token", STATES[state], ...marks.filter(Boolean)];
    if (spans[i] === pointed) names.push("pointed");
    spans[i].className = names.join(" ");
    const text = masked ? MASK_SIGN : run.texts[token];
    spans[i].textContent = STATES[state] === "worthless" ? text.replaceAll("\n", "") : text;
    if (isCorrected) spans[i].tabIndex = 0;
    else spans[i].removeAttribute("tabindex");
  }

  // ---- legend and counts

  const counted = new Map();
  function entry(name, sample, meaning) {
    const item = element("li");
    const count = element("b", "", "0");
    count.id = `count-${name.replaceAll(" ", "-")}`;
    item.append(sample, count, element("span", "", name));
    item.title = meaning;
    byId("legend").append(item);
    counted.set(name, count);
  }
  const occurs = (state) => run.states.includes(state);
  if (occurs(3)) entry("given", element("span", "token given", "ab"), MEANING[3]);
  [0, 1, 2].forEach((s) => entry(STATES[s], element("span", `token ${STATES[s]}`, "ab"), MEANING[s]));
  if (run.mask >= 0) entry("masked", element("span", "token", MASK_SIGN), "no token yet");
  entry("corrections so far", element("span", "token corrected", "ab"), "tokens replaced after they were drawn");

  function count() {
    const row = frame * length;
    const states = [0, 0, 0, 0];
    let masked = 0;
    for (let k = row; k < row + length; k++) {
      states[run.states[k]] += 1;
      masked += run.tokens[k] === run.mask;
    }
    const counts = { masked, "corrections so far": correctedBy[frame] };
    STATES.forEach((name, s) => (counts[name] = states[s]));
    for (const [name, place] of counted) place.textContent = counts[name];
  }

  // ---- levels

  const palette = Array.from({ length: top + 1 }, (_, level) => color(run.scale, level / top));
  byId("scale").querySelector("i").style.background = `linear-gradient(90deg, ${run.scale.join(", ")})`;
  byId("noisiest").textContent = `${top}, worthless`;
  byId("last").textContent = length - 1;

  /* Rows `first` .. `end` of the levels as pixels, stretched over a canvas. */
  function paint(canvas, first, end) {
    const pixels = new ImageData(length, end - first);
    for (let k = 0; k < pixels.data.length / 4; k++) {
      pixels.data.set([...palette[run.levels[first * length + k]], 255], 4 * k);
    }
    const source = element("canvas");
    [source.width, source.height] = [length, end - first];
    source.getContext("2d").putImageData(pixels, 0, 0);
    const box = canvas.getBoundingClientRect();
    canvas.width = Math.max(1, Math.round(box.width * devicePixelRatio));
    canvas.height = Math.max(1, Math.round(box.height * devicePixelRatio));
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(source, 0, 0, canvas.width, canvas.height);
    return context;
  }

  function paintMap() {
    const canvas = byId("map").querySelector("canvas");
    const context = paint(canvas, 0, frames);
    context.fillStyle = "#111";
    context.strokeStyle = "#fffb";
    const radius = Math.min(3, Math.max(1.4, canvas.width / length / 4)) * devicePixelRatio;
    events.forEach((list, i) => list.filter((event) => event.correction).forEach((event) => {
      context.beginPath();
      context.arc(((i + 0.5) / length) * canvas.width, ((event.frame + 0.5) / frames) * canvas.height, radius, 0, 7);
      context.stroke();
      context.fill();
    }));
  }

  function paintRow() {
    paint(byId("strip").querySelector("canvas"), frame, frame + 1);
    byId("map").querySelector(".row").style.top = `${((frame + 0.5) / frames) * 100}%`;
    const [start, stop] = run.windows[frame];
    const box = byId("strip").querySelector(".window");
    box.style.display = stop > start ? "block" : "none";
    box.style.left = `${(start / length) * 100}%`;
    box.style.width = `${((stop - start) / length) * 100}%`;
    byId("window").textContent = stop > start ? `next window: ${start} \u2013 ${stop - 1}` : "finished";
  }

  // ---- the tip

  const quoted = (token) => {
    if (token === run.mask) return element("span", "", "mask");
    const text = run.texts[token].replaceAll("\n", "");
    return element("code", "", /^ | $/.test(text) ? text.replaceAll(" ", "\u2423") : text);
  };
  const percent = (confidence) => (confidence < UNKNOWN ? `${confidence} %` : "");
  const stepsOf = (f) => (steps[f] - steps[f - 1] > 1 ? `steps ${steps[f - 1] + 1}\u2013${steps[f]}` : `step ${steps[f]}`);

  function happened(event) {
    const row = element("tr", event.correction ? "correction" : "");
    const change = element("td");
    change.append(quoted(event.from), " \u2192 ", quoted(event.to));
    row.append(element("td", "", stepsOf(event.frame)), change, element("td", "", percent(event.confidence)));
    return row;
  }

  function describe() {
    const i = Number(pointed.dataset.position);
    const k = frame * length + i;
    const head = element("p");
    const words = [`position ${i}`, STATES[run.states[k]], `level ${run.levels[k]} of ${top}`];
    if (run.confidence[k] < UNKNOWN) words.push(`confidence ${percent(run.confidence[k])}`);
    head.append(quoted(run.tokens[k]), ` \u2014 ${words.join(", ")}`);
    const past = events[i].filter((event) => event.frame <= frame);
    const table = element("table");
    if (past.length > EVENTS_SHOWN) {
      table.append(element("tr"));
      table.firstChild.append(element("td", "", `${past.length - EVENTS_SHOWN} earlier`));
    }
    table.append(...past.slice(-EVENTS_SHOWN).map(happened));
    byId("tip").replaceChildren(head, ...(past.length ? [table] : []));
    for (const column of document.querySelectorAll(".column")) {
      column.style.display = "block";
      column.style.left = `${((i + 0.5) / length) * 100}%`;
    }
  }

  function place() {
    const tip = byId("tip");
    tip.hidden = false;
    const [box, size] = [pointed.getClientRects()[0], tip.getBoundingClientRect()];
    const below = box.bottom + 8 + size.height < innerHeight || box.top < size.height + 8;
    tip.style.top = `${below ? box.bottom + 8 : box.top - size.height - 8}px`;
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - size.width - 8))}px`;
  }

  function point(span) {
    pointed?.classList.remove("pointed");
    pointed?.removeAttribute("aria-describedby");
    pointed = span;
    if (!span) {
      byId("tip").hidden = true;
      document.querySelectorAll(".column").forEach((column) => (column.style.display = "none"));
      return;
    }
    span.classList.add("pointed");
    span.setAttribute("aria-describedby", "tip");
    describe();
    place();
  }

  const text = byId("text");
  for (const name of ["pointerover", "focusin"]) {
    text.addEventListener(name, (event) => point(event.target.closest(".token")));
  }
  text.addEventListener("pointerleave", () => point(null));
  text.addEventListener("focusout", () => point(null));
  addEventListener("scroll", () => pointed && place(), { passive: true });

  // ---- time

  function go(to) {
    frame = Math.min(Math.max(to, 0), frames - 1);
    byId("step").value = frame;
    byId("now").textContent = `step ${steps[frame]} of ${steps[frames - 1]}`;
    byId("step").setAttribute("aria-valuetext", byId("now").textContent);
    spans.forEach((_, i) => draw(i));
    count();
    paintRow();
    if (pointed) {
      describe();
      place();
    }
  }

  function play(on) {
    clearInterval(timer);
    timer = null;
    byId("play").textContent = on ? "\u275a\u275a" : "\u25b6";
    byId("play").setAttribute("aria-label", on ? "Pause" : "Play");
    if (!on) return;
    if (frame === frames - 1) go(0);
    timer = setInterval(() => (frame < frames - 1 ? go(frame + 1) : play(false)), Math.min(400, Math.max(50, 12000 / frames)));
  }
  const by = (change) => () => (play(false), go(frame + change));
  byId("step").max = frames - 1;
  byId("step").addEventListener("input", (event) => (play(false), go(Number(event.target.value))));
  byId("play").addEventListener("click", () => play(timer === null));
  byId("back").addEventListener("click", by(-1));
  byId("on").addEventListener("click", by(1));
  const keys = { ArrowLeft: by(-1), ArrowRight: by(1), Home: by(-frames), End: by(frames), " ": () => play(timer === null) };
  keys.Escape = () => point(null);
  addEventListener("keydown", (event) => {
    const own = event.target.matches("input") || (event.key === " " && event.target.matches("button"));
    if (own || event.ctrlKey || event.altKey || event.metaKey || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });
  const scrub = (event) => {
    const box = byId("map").getBoundingClientRect();
    if (event.buttons) by(Math.floor(((event.clientY - box.top) / box.height) * frames) - frame)();
  };
  byId("map").addEventListener("pointerdown", scrub);
  byId("map").addEventListener("pointermove", scrub);
  addEventListener("resize", () => (paintMap(), paintRow()));

  paintMap();
  go(frames - 1);
}

unpack(byId("data").textContent)
  .then(show)
  .catch((error) => {
    byId("text").textContent = `This browser cannot show the page (${error}); any browser since 2023 can.`;
    throw error;
  });
