// Runs before the first paint: marks that scripts are on, and applies the theme of this device.
(() => {
  const root = document.documentElement;
  root.classList.add("scripted");
  // Shows the elements that need a wallet if there is one (EIP-6963, or window.ethereum).
  const showWalletElements = () => root.classList.add("wallet-open");
  addEventListener("eip6963:announceProvider", showWalletElements);
  addEventListener("DOMContentLoaded", () => {
    if (window.ethereum) showWalletElements();
    dispatchEvent(new Event("eip6963:requestProvider"));
  });
  try {
    const theme = localStorage.getItem("theme");
    if (theme === "dark" || theme === "light") root.dataset.theme = theme;
  } catch {
    // No storage: the system's theme applies.
  }
})();
