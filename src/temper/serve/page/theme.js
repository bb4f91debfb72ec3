// Before anything is drawn: the theme that was chosen, else the system's.
try {
  const chosen = localStorage.getItem("temper.theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch {
  // storage is switched off: the system's theme
}
