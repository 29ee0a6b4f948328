// The self-check's button in the panel: its inputs, how it is stopped, and its table as text.
"use strict";

const loratorioCheck = {
    /** The button was pressed: the check's inputs from the page, as the argument of the button's function. */
    begin(tab) {
        const value = selector => gradioApp().querySelector(selector)?.value;
        const number = name => Number(value(`#${tab}_${name} input[type=number]`)) || undefined;
        this.show(tab, true);
        return [JSON.stringify({
            prompt: value(`#${tab}_prompt textarea`),
            negative_prompt: value(`#${tab}_neg_prompt textarea`),
            width: number("width"),
            height: number("height"),
            cfg_scale: number("cfg_scale"),
        })];
    },

    /** The table, or an error, has arrived. */
    end(tab) {
        this.show(tab, false);
        return [];
    },

    show(tab, isRunning) {
        const says = gradioApp().querySelector(`.loratorio-checking[data-tab=${tab}]`);
        if (says) {
            says.hidden = !isRunning;
        }
    },

    /** Without https, a page can use only the old clipboard interface. */
    async copy(text) {
        try {
            await navigator.clipboard.writeText(text);
        } catch {
            const box = document.createElement("textarea");
            box.value = text;
            document.body.append(box);
            box.select();
            document.execCommand("copy");
            box.remove();
        }
    },
};

document.addEventListener("click", async event => {
    const stop = event.target.closest?.(".loratorio-checking button");
    if (stop) {
        // The WebUI's own Interrupt, which the page hides while nothing of its own is drawn.
        gradioApp().querySelector(`#${stop.parentElement.dataset.tab}_interrupt`)?.click();
    }
    const button = event.target.closest?.(".loratorio-copy");
    if (button) {
        await loratorioCheck.copy(button.dataset.text);
        button.textContent = "Copied";
    }
});
