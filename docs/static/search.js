// What Sphinx's search lacks here. It drops numbers from a query, but readers search for 403 and 429: HTTP statuses are in
// the index (docs/conf.py), so they stay. And it ranks a page by single words: one whose title, or the title of a section,
// holds all that was typed comes first.
"use strict";

if (typeof Search !== "undefined") {
  const parse = Search._parseQuery;
  let asked = "";

  Search._parseQuery = (query) => {
    asked = query.toLowerCase().trim();
    const parsed = parse(query);
    const [, searchTerms, , highlightTerms] = parsed;
    for (const status of splitQuery(query).filter((word) => /^[1-5]\d\d$/.test(word))) {
      searchTerms.add(status);
      highlightTerms.add(status);
    }
    return parsed;
  };

  Scorer.score = ([page, title, , , score]) => {
    if (title.toLowerCase().includes(asked)) return score + 30;
    const { alltitles, docnames } = Search._index;
    const sections = Object.entries(alltitles).filter(([section]) => section.toLowerCase().includes(asked));
    return sections.some(([, places]) => places.some(([file]) => docnames[file] === page)) ? score + 15 : score;
  };
}
