// The form of a mapping says, while one types, what it would do: the server's words, in a box.

const WAIT_MILLISECONDS = 300;

const result = document.getElementById("check-result");
const form = result.closest("form");
let timer;
let running = new AbortController();

async function check() {
    running.abort();
    const mine = (running = new AbortController());
    const values = new FormData(form);
    values.delete("signing_secret");
    try {
        const response = await fetch(result.dataset.address, {
            method: "POST",
            body: values,
            signal: mine.signal,
        });
        if (!response.ok || response.redirected) throw new Error(response.statusText);
        const words = await response.text();
        // What is said again is not announced again.
        if (!mine.signal.aborted && words !== result.dataset.words) {
            result.dataset.words = words;
            result.innerHTML = words;
        }
    } catch {
        if (mine.signal.aborted) return;
        delete result.dataset.words;
        result.textContent = "This could not be checked now.";
    }
}

function checkSoon() {
    clearTimeout(timer);
    timer = setTimeout(check, WAIT_MILLISECONDS);
}

form.addEventListener("input", checkSoon);
form.addEventListener("change", checkSoon);
check();

// A second click would make a second secret, and end the one that senders use.
for (const buttons of document.querySelectorAll("form.wake-buttons")) {
    let isSent = false;
    buttons.addEventListener("submit", (event) => {
        if (isSent) event.preventDefault();
        isSent = true;
    });
    window.addEventListener("pageshow", () => (isSent = false));
}
