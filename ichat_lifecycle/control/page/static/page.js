// Keeps the page up to date, says when it cannot, and sends commands. No library but idiomorph.
"use strict";

(() => {
  const EVERY_MS = 1000; // lengths of time count on though nothing happens
  const APART_MS = 250; // however much happens
  const PATIENCE_MS = 4000; // a worker that takes longer to answer is out of contact

  const byId = (id) => document.getElementById(id);
  const view = () => byId("view");
  const clock = (ms) => new Date(ms).toISOString().slice(11, 19);

  // --- keeping up to date

  let heardAt = Date.now();
  let lost = false;
  let asking = false;
  let again = false;
  let askedAt = 0;
  let timer = 0;
  let shown = "";

  // What people have opened stays open: the worker does not know of it.
  const keepOpen = (name, element) => !(name === "open" && element.localName === "details");

  function show(html) {
    Idiomorph.morph(view(), html, {
      morphStyle: "outerHTML",
      callbacks: { beforeAttributeUpdated: keepOpen },
    });
    const { build, title, state } = view().dataset;
    // Another version of the worker, or one that takes commands where the last did not.
    if (build !== document.body.dataset.build) location.reload();
    document.title = title;
    if (state !== shown) point(state);
    enable();
  }

  // On a phone the diagram is wider than the screen.
  function point(state) {
    shown = state;
    const [map, box] = [document.querySelector(".scroll"), document.querySelector(".current")];
    if (!map || !box) return;
    const [outer, inner] = [map.getBoundingClientRect(), box.getBoundingClientRect()];
    map.scrollLeft += inner.left + inner.width / 2 - outer.left - outer.width / 2;
  }

  async function refresh() {
    if (asking) {
      again = true;
      return;
    }
    asking = true;
    again = false;
    askedAt = Date.now();
    const search = location.search;
    try {
      const options = { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) };
      const response = await fetch("/page/view" + search, options);
      if (!response.ok) throw new Error(`HTTP ${response.status}`);
      const html = await response.text();
      if (search === location.search) show(html);
      heardAt = Date.now();
      contact(true);
    } catch (error) {
      console.info("no contact:", String(error));
      contact(false);
    } finally {
      asking = false;
    }
    if (again) soon();
  }

  // Whatever happens within APART_MS is shown together.
  function soon() {
    if (timer) return;
    const wait = Math.max(0, askedAt + APART_MS - Date.now());
    timer = setTimeout(() => {
      timer = 0;
      refresh();
    }, wait);
  }

  function contact(there) {
    const banner = byId("contact");
    lost = !there;
    document.body.classList.toggle("lost", lost);
    banner.hidden = there;
    if (there) {
      banner.textContent = "";
      return;
    }
    document.title = `no contact · ${view().dataset.title}`;
    // Set once: an alert that counts would be read out every second.
    if (!banner.textContent) {
      banner.textContent = `No contact with the worker since ${clock(heardAt)} UTC. ` +
        "What is shown is of then. Trying again every second.";
    }
    enable();
  }

  // --- events

  let stream = null;

  function listen() {
    const after = encodeURIComponent(view().dataset.lastEvent);
    stream = new EventSource(`/lifecycle/events?after=${after}`);
    for (const kind of document.body.dataset.kinds.split(" ")) stream.addEventListener(kind, soon);
  }

  function tick() {
    // It comes again by itself after a broken connection, but not after an answer other than 200.
    if (stream.readyState === EventSource.CLOSED && !lost) listen();
    refresh();
  }

  // --- the time line's zoom, without loading the page again

  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-window]");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    history.replaceState(null, "", link.getAttribute("href"));
    soon();
  });

  // --- commands

  const token = byId("token");
  const buttons = [...document.querySelectorAll("[data-command]")];
  const dialog = byId("confirm");
  let chosen = null;
  let sending = false;

  function enable() {
    const can = view().dataset.can.split(" ");
    for (const button of buttons) {
      const useful = can.includes(button.dataset.command);
      button.disabled = lost || sending || !token.value || !useful;
    }
  }

  function ask(button) {
    chosen = button;
    byId("question").textContent = button.dataset.question;
    byId("yes").textContent = button.textContent;
    dialog.showModal();
    byId("no").focus();
  }

  async function send(button) {
    const name = button.textContent;
    sending = true;
    enable();
    say(`${name}: asked, waiting for the answer.`, "");
    try {
      const response = await fetch(button.dataset.path, {
        method: "POST",
        headers: { Authorization: `Bearer ${token.value}` },
        body: button.dataset.body || null,
        cache: "no-store",
      });
      const answer = await response.json();
      if (response.ok) say(`${name}: ${response.status}, the worker is ${answer.state}.`, "well");
      else say(`${name}: ${response.status} ${told(answer.error)}`, "bad");
    } catch (error) {
      say(`${name}: no answer (${error.message}).`, "bad");
    }
    sending = false;
    enable();
    if (document.activeElement === document.body) button.focus(); // it was lost with `disabled`
    soon();
  }

  function told({ code, message, hint }) {
    return `${code}: ${message}${hint ? ` (${hint})` : ""}`;
  }

  function say(text, kind) {
    byId("answer").textContent = text;
    byId("answer").className = kind;
  }

  if (token) {
    token.addEventListener("input", enable);
    for (const button of buttons) button.addEventListener("click", () => ask(button));
    byId("no").addEventListener("click", () => dialog.close());
    byId("yes").addEventListener("click", () => {
      dialog.close();
      send(chosen);
    });
  }

  enable();
  point(view().dataset.state);
  listen();
  setInterval(tick, EVERY_MS);
})();
