// Draws the fenced diagrams of a page with the copy of mermaid that the site brings along; without one they stay text.
document.addEventListener("DOMContentLoaded", () => {
  if (!window.mermaid) return;
  const dark = document.body.getAttribute("data-md-color-scheme") === "slate";
  window.mermaid.initialize({ startOnLoad: false, theme: dark ? "dark" : "neutral" });
  for (const fence of document.querySelectorAll("pre.diagram")) {
    const drawing = document.createElement("div");
    drawing.className = "mermaid";
    drawing.textContent = fence.textContent;
    fence.replaceWith(drawing);
  }
  window.mermaid.run({ querySelector: "div.mermaid" });
});
