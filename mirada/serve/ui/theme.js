// Runs before the first paint, so that a chosen theme never flashes in the other.
try {
  const chosen = localStorage.getItem("mirada-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch { /* storage may be forbidden: the system's theme holds */ }
