// Before the first paint: scripts are on, and the theme that was chosen on this device.
(() => {
  const root = document.documentElement;
  root.classList.add("scripted");
  // What needs a wallet is shown once there is one (EIP-6963, or one that only sets window.ethereum).
  const here = () => root.classList.add("wallet-open");
  addEventListener("eip6963:announceProvider", here);
  addEventListener("DOMContentLoaded", () => {
    if (window.ethereum) here();
    dispatchEvent(new Event("eip6963:requestProvider"));
  });
  try {
    const theme = localStorage.getItem("theme");
    if (theme === "dark" || theme === "light") root.dataset.theme = theme;
  } catch {
    // No storage: the system's choice holds.
  }
})();
