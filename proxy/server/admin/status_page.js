// How does the status page stay up to date? It asks for itself anew, and takes over what has changed.
"use strict";
(() => {
  const MOST = 60; // seconds between two looks where the proxy does not answer
  const lost = document.getElementById("lost");
  let failures = 0;

  // What somebody opened stays open, and what was scrolled stays where it was.
  const keep = (before, after) => {
    for (const one of before.querySelectorAll("details[open][id]")) {
      after.querySelector(`#${one.id}`)?.setAttribute("open", "");
    }
    return [...before.querySelectorAll(".wide[id]")].map((one) => [one.id, one.scrollTop, one.scrollLeft]);
  };

  // What somebody copies, or a link they are about to follow by keyboard, is left alone until they are done.
  const isInUse = (section) => {
    const selection = document.getSelection();
    const selects = selection && !selection.isCollapsed && section.contains(selection.anchorNode);
    return selects || (section.contains(document.activeElement) && document.activeElement.tagName === "A");
  };

  // Where the keyboard is: a table that scrolls, or what opens and closes details.
  const focused = (section) => {
    const one = document.activeElement;
    if (!section.contains(one)) return null;
    return one.tagName === "SUMMARY" ? `#${one.parentElement.id} > summary` : one.id && `#${one.id}`;
  };

  const take = (fresh) => {
    for (const section of fresh.querySelectorAll("main > section")) {
      const before = document.getElementById(section.id);
      if (!before || isInUse(before)) continue;
      const scrolled = keep(before, section), focus = focused(before);
      if (before.outerHTML === section.outerHTML) continue;
      before.replaceWith(document.adoptNode(section));
      for (const [id, top, left] of scrolled) document.getElementById(id)?.scrollTo(left, top);
      if (focus) document.querySelector(focus)?.focus({ preventScroll: true });
    }
    document.querySelector("header").replaceWith(document.adoptNode(fresh.querySelector("header")));
    document.querySelector("main").dataset.every = fresh.querySelector("main").dataset.every;
    document.title = fresh.title;
  };

  const look = async () => {
    if (!document.hidden) {
      try {
        const answer = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(10_000) });
        if (!answer.ok) throw new Error(answer.status);
        take(new DOMParser().parseFromString(await answer.text(), "text/html"));
        failures = 0;
      } catch {
        failures += 1;
      }
      lost.hidden = failures === 0;
    }
    const every = Number(document.querySelector("main").dataset.every) || 2;
    setTimeout(look, 1000 * Math.min(MOST, every * 2 ** Math.min(failures, 5)));
  };

  setTimeout(look, 1000 * (Number(document.querySelector("main").dataset.every) || 2));
})();
