// Light or dark: what was chosen in the admin, else what the system prefers. Not a module, so that
// it runs before anything is painted.

(() => {
    const system = matchMedia("(prefers-color-scheme: dark)");

    function chosen() {
        try {
            return JSON.parse(localStorage.getItem("adminTheme"));
        } catch {
            return null;
        }
    }

    function apply() {
        const theme = chosen();
        const isDark = theme === "dark" || (theme !== "light" && system.matches);
        document.documentElement.classList.toggle("dark", isDark);
    }

    system.addEventListener("change", apply);
    window.addEventListener("storage", apply);
    apply();
})();
