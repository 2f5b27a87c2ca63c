// Keeps the status page up to date: fetches it again and replaces the sections that changed.
"use strict";
(() => {
  const MAX_INTERVAL = 60; // seconds between two attempts while the proxy does not respond
  const unreachable = document.getElementById("unreachable");
  let failures = 0;

  // A replaced section would lose what the reader opened and scrolled: copy the first, return the second.
  const copyState = (before, after) => {
    for (const details of before.querySelectorAll("details[open][id]")) {
      after.querySelector(`#${details.id}`)?.setAttribute("open", "");
    }
    return [...before.querySelectorAll(".wide[id]")].map((table) => [table.id, table.scrollTop, table.scrollLeft]);
  };

  // A section is left alone while text in it is selected or a link in it has the keyboard focus.
  const isInUse = (section) => {
    const selection = document.getSelection();
    const selects = selection && !selection.isCollapsed && section.contains(selection.anchorNode);
    return selects || (section.contains(document.activeElement) && document.activeElement.tagName === "A");
  };

  // Returns a selector of the focused element, which is a scrollable table or the summary of details.
  const focused = (section) => {
    const element = document.activeElement;
    if (!section.contains(element)) return null;
    return element.tagName === "SUMMARY" ? `#${element.parentElement.id} > summary` : element.id && `#${element.id}`;
  };

  const update = (fresh) => {
    for (const section of fresh.querySelectorAll("main > section")) {
      const before = document.getElementById(section.id);
      if (!before || isInUse(before)) continue;
      const scrolled = copyState(before, section), focus = focused(before);
      // Screen readers would announce an unchanged status again if it were replaced.
      if (before.outerHTML === section.outerHTML) continue;
      before.replaceWith(document.adoptNode(section));
      for (const [id, top, left] of scrolled) document.getElementById(id)?.scrollTo(left, top);
      if (focus) document.querySelector(focus)?.focus({ preventScroll: true });
    }
    document.querySelector("header").replaceWith(document.adoptNode(fresh.querySelector("header")));
    document.querySelector("main").dataset.refreshInterval = fresh.querySelector("main").dataset.refreshInterval;
    document.title = fresh.title;
  };

  const interval = () => Number(document.querySelector("main").dataset.refreshInterval) || 2; // seconds

  const refresh = async () => {
    if (!document.hidden) {
      try {
        const response = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(10_000) });
        if (!response.ok) throw new Error(response.status);
        update(new DOMParser().parseFromString(await response.text(), "text/html"));
        failures = 0;
      } catch {
        failures += 1;
      }
      unreachable.hidden = failures === 0;
    }
    setTimeout(refresh, 1000 * Math.min(MAX_INTERVAL, interval() * 2 ** Math.min(failures, 5)));
  };

  setTimeout(refresh, 1000 * interval());
})();
