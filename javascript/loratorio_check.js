// The self-check's button in the panel: what it runs with, how it is stopped, and its table as text.
"use strict";

/** What the check runs with, off the page: the argument of the button's function. */
function loratorioCheck(tab) {
    const value = selector => gradioApp().querySelector(selector)?.value;
    const number = name => Number(value(`#${tab}_${name} input[type=number]`)) || undefined;
    const table = gradioApp().querySelector(`#loratorio_${tab}_check_table`);
    if (table) {
        const stop = document.createElement("button");
        stop.type = "button";
        stop.textContent = "Stop";
        // The WebUI's own Interrupt, which the page hides while nothing of its own is drawn.
        stop.addEventListener("click", () => gradioApp().getElementById(`${tab}_interrupt`)?.click());
        const says = document.createElement("p");
        says.className = "loratorio-checking";
        says.append("Checking: about a dozen pictures of four steps, none of which is kept. ", stop);
        table.querySelector(".loratorio-checking")?.remove();
        table.prepend(says);
    }
    return [JSON.stringify({
        prompt: value(`#${tab}_prompt textarea`),
        negative_prompt: value(`#${tab}_neg_prompt textarea`),
        width: number("width"),
        height: number("height"),
        cfg_scale: number("cfg_scale"),
    })];
}

document.addEventListener("click", async event => {
    const button = event.target.closest?.(".loratorio-copy");
    if (!button) {
        return;
    }
    const text = button.dataset.text;
    try {
        await navigator.clipboard.writeText(text);
    } catch {
        // Without https a page has no clipboard but the old one.
        const box = document.createElement("textarea");
        box.value = text;
        document.body.append(box);
        box.select();
        document.execCommand("copy");
        box.remove();
    }
    button.textContent = "Copied";
});
