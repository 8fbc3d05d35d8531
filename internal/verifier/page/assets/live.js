// Follows what comes in: when the server says that something changed, the page is
// fetched anew, and the parts marked data-live that differ are taken over. All of
// it also works without: then one loads the page anew by hand.
'use strict';
(() => {
  const search = () => document.querySelector('input[type="search"]');

  document.addEventListener('keydown', (e) => {
    if (e.key !== '/' || e.ctrlKey || e.metaKey || e.altKey) return;
    if (e.target.closest('input, textarea, select, [contenteditable]')) return;
    const s = search();
    if (s) { e.preventDefault(); s.focus(); s.select(); }
  });

  for (const box of document.querySelectorAll('input[data-all]')) {
    box.closest('label').hidden = false;
    box.addEventListener('change', () => {
      for (const b of box.form.querySelectorAll('input[type="checkbox"][name]:not(:disabled)')) b.checked = box.checked;
    });
  }

  const sign = document.getElementById('live');
  if (!sign || !document.querySelector('[data-live]') || !window.EventSource) return;
  const words = document.getElementById('live-words');
  const say = document.getElementById('live-say');
  sign.hidden = false;

  const show = (on, text) => {
    sign.toggleAttribute('data-on', on);
    words.textContent = text;
  };

  // A part in which someone writes or has ticked something is left alone.
  const busy = (part) => {
    const a = document.activeElement;
    if (a && part.contains(a) && a.matches('input, textarea, select')) return true;
    return [...part.querySelectorAll('input[type="checkbox"], textarea')].some((f) => f.type === 'checkbox' ? f.checked !== f.defaultChecked : f.value !== f.defaultValue);
  };

  // What was open stays open, and the focus where it was: by place in the part.
  const take = (old, fresh) => {
    const open = [...old.querySelectorAll('details')].map((d) => d.open);
    const can = 'a[href], button, summary, input, select, textarea, [tabindex]';
    const at = [...old.querySelectorAll(can)].indexOf(document.activeElement);
    const scroll = [...old.querySelectorAll('.scroll')].map((s) => s.scrollLeft);
    fresh = document.adoptNode(fresh);
    old.replaceWith(fresh);
    fresh.querySelectorAll('details').forEach((d, i) => { if (open[i]) d.open = true; });
    fresh.querySelectorAll('.scroll').forEach((s, i) => { s.scrollLeft = scroll[i] || 0; });
    if (at >= 0) fresh.querySelectorAll(can)[at]?.focus({ preventScroll: true });
    return fresh;
  };

  // XMLHttpRequest reads a document that runs no scripts, without a string ever
  // becoming markup here: Trusted Types allow nothing else.
  const get = () => new Promise((done, fail) => {
    const r = new XMLHttpRequest();
    r.open('GET', location.pathname + location.search);
    r.responseType = 'document';
    r.timeout = 15000;
    r.onload = () => r.status === 200 && r.response ? done(r) : fail(new Error(String(r.status)));
    r.onerror = r.ontimeout = () => fail(new Error('unreachable'));
    r.send();
  });

  let running = false, again = false, last = 0, timer = 0;
  const update = async () => {
    if (running) { again = true; return; }
    running = true; again = false; last = Date.now();
    try {
      const r = await get();
      if (new URL(r.responseURL).pathname !== location.pathname) { location.reload(); return; }
      let changed = false;
      for (const part of document.querySelectorAll('[data-live]')) {
        const fresh = r.response.getElementById(part.id);
        if (!fresh || fresh.outerHTML === part.outerHTML.replace(/ fresh"/, '"')) continue;
        if (busy(part)) continue;
        const loud = fresh.textContent.replace(/\d+ (s|min|h|days) ago/g, '') !== part.textContent.replace(/\d+ (s|min|h|days) ago/g, '');
        const put = take(part, fresh);
        if (loud) { put.classList.add('fresh'); changed = true; }
      }
      show(true, 'Live, as of ' + new Date().toLocaleTimeString());
      if (changed) {
        const s = document.getElementById('summary');
        say.textContent = 'Updated. ' + (s ? s.textContent.trim().replace(/\s+/g, ' ') : '');
      }
    } catch {
      show(false, 'Not live: the Verifier does not answer');
    } finally {
      running = false;
      if (again) plan();
    }
  };
  // At most once in two seconds, whatever comes.
  const plan = () => {
    clearTimeout(timer);
    timer = setTimeout(update, Math.max(100, 2000 - (Date.now() - last)));
  };

  let source = null, mark = sign.dataset.mark || '';
  const start = () => {
    if (source) return;
    source = new EventSource('/live');
    source.addEventListener('state', (e) => {
      show(true, 'Live');
      if (e.data !== mark) { mark = e.data; plan(); }
    });
    source.onerror = () => {
      show(false, 'Not live: connecting again');
      if (source.readyState === EventSource.CLOSED) { source = null; setTimeout(start, 15000); }
    };
  };
  const end = () => { source?.close(); source = null; };
  // Hidden pages follow nothing, and pages that leave free their connection.
  document.addEventListener('visibilitychange', () => { if (document.hidden) end(); else { start(); plan(); } });
  window.addEventListener('pagehide', end);
  window.addEventListener('pageshow', (e) => { if (e.persisted) { start(); plan(); } });
  setInterval(() => { if (!document.hidden && Date.now() - last > 30000) update(); }, 5000);
  last = Date.now();
  start();
})();
