// Before the first paint: scripts are on, and the theme that was chosen on this device.
(() => {
  const root = document.documentElement;
  root.classList.add("scripted");
  try {
    const theme = localStorage.getItem("theme");
    if (theme === "dark" || theme === "light") root.dataset.theme = theme;
  } catch {
    // No storage: the system's choice holds.
  }
})();
