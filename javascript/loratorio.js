// The panel's line about the LoRAs in the prompt, kept true while the prompt is edited, pasted or filled by the page.
// One file for Gradio 3 (A1111, reForge) and Gradio 4 (Forge, Forge Neo). Uses the WebUI's onUiLoaded, onAfterUiUpdate and opts.
// LoRA names come from anywhere: they enter the page as text nodes only.
"use strict";

(function() {
    // The same sentence stands in loratorio/webui/panel.py, for the moment before this file has run.
    const NONE_YET = "No LoRA in the prompt yet. Add one, as in <lora:name:0.8>, or the pictures stay the WebUI's own.";
    const ONE_ONLY = "With a single LoRA, only re-centring changes the picture.";
    const NONE_FOLDED = "no LoRA yet";
    const STYLES_TOO = "LoRAs of the chosen styles come on top.";

    /** The prompt as the WebUI reads it: without what stands behind a # where its option for comments is on. */
    function withoutComments(prompt) {
        const on = typeof opts !== "undefined" && opts.enable_prompt_comments;
        return on ? prompt.replace(/(^|\n)#[^\n]*(\n|$)/g, "\n").replace(/#[^\n]*(\n|$)/g, "\n") : prompt;
    }

    /** The LoRAs of a prompt, in its order: name, strength in the UNet and, where it differs, in the text encoder, as text. */
    function lorasIn(prompt) {
        const found = [];
        for (const match of withoutComments(prompt).matchAll(/<(?:lora|lyco):([^>]+)>/g)) {
            const positional = [];
            const named = Object.create(null);
            for (const part of match[1].split(":")) {
                // The WebUI's own rule: exactly one = makes an argument with a name.
                const [key, value, ...more] = part.split("=");
                if (value !== undefined && !more.length) {
                    named[key] = value;
                } else {
                    positional.push(part);
                }
            }
            const text = named.te ?? positional[1] ?? "1";
            const unet = named.unet ?? positional[2] ?? text;
            found.push({name: positional[0] ?? "", unet: plain(unet), text: plain(text)});
        }
        return found;
    }

    /** "0.80" as "0.8"; what is no number stays as it is. */
    function plain(number) {
        const value = Number(number);
        return number.trim() !== "" && Number.isFinite(value) ? String(value) : number;
    }

    function element(tag, className, text) {
        const made = document.createElement(tag);
        made.className = className;
        made.textContent = text;
        return made;
    }

    function chip(lora) {
        const made = element("span", "loratorio-lora", lora.name + " ");
        made.append(element("b", "", lora.unet));
        if (lora.text !== lora.unet) {
            made.append(element("span", "loratorio-text-strength", " text " + lora.text));
        }
        return made;
    }

    /** A list of LoRAs under its heading. */
    function listed(heading, loras) {
        return [element("span", "loratorio-heading", heading), ...loras.map(chip)];
    }

    function textareaOf(id) {
        return gradioApp().querySelector(`#${id} textarea`);
    }

    /** What the hires pass composes, if it is on and has a prompt of its own. */
    function hiresPrompt(tab) {
        const on = tab === "txt2img" && gradioApp().querySelector("#txt2img_hr-checkbox input")?.checked;
        return on ? textareaOf("hires_prompt")?.value ?? "" : "";
    }

    const shown = {};

    /** Bring the line of a tab up to date; touches the page only where something changed. */
    function refresh(tab) {
        const line = gradioApp().querySelector(`#loratorio_${tab}_loras`);
        const prompt = textareaOf(`${tab}_prompt`);
        if (!line || !prompt) {
            return;
        }
        const loras = lorasIn(prompt.value);
        const hires = lorasIn(hiresPrompt(tab));
        const styles = gradioApp().querySelector(`#${tab}_styles .token`) !== null;
        const state = JSON.stringify([loras, hires, styles]);
        if (shown[tab]?.line === line && shown[tab].state === state) {
            return;
        }
        shown[tab] = {line, state};

        const parts = loras.length ? listed(loras.length > 1 ? "Will compose" : "One LoRA", loras) : [];
        if (hires.length) {
            parts.push(...listed("Hires pass", hires));
        }
        const remark = !parts.length ? NONE_YET : loras.length === 1 && !hires.length ? ONE_ONLY : "";
        for (const text of [remark, styles ? STYLES_TOO : ""]) {
            if (text) {
                parts.push(element("span", "loratorio-remark", text));
            }
        }
        line.replaceChildren(...parts);
        const all = loras.map(lora => `${lora.name} ${lora.unet}`);
        folded(tab).textContent = all.length ? all.join(" · ") : NONE_FOLDED;
    }

    /** The place for the same in few words in the panel's title, where it is seen while the panel is folded. */
    function folded(tab) {
        const title = gradioApp().querySelector(`#loratorio_${tab} .label-wrap`);
        let place = title?.querySelector(".loratorio-folded");
        if (!place) {
            place = element("span", "loratorio-folded", "");
            title?.insertBefore(place, title.lastElementChild);
        }
        return place;
    }

    /** Have `changed` called for what is typed into a textarea and for what the page writes into it (paste, send to, styles). */
    function follow(textarea, changed) {
        if (!textarea || textarea.loratorioFollowed) {
            return;
        }
        textarea.loratorioFollowed = true;
        textarea.addEventListener("input", changed);
        // Gradio sets .value and tells nobody.
        const value = Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "value");
        Object.defineProperty(textarea, "value", {
            configurable: true,
            enumerable: value.enumerable,
            get() {
                return value.get.call(this);
            },
            set(text) {
                value.set.call(this, text);
                changed();
            },
        });
    }

    function update() {
        for (const tab of ["txt2img", "img2img"]) {
            follow(textareaOf(`${tab}_prompt`), () => refresh(tab));
            refresh(tab);
        }
        follow(textareaOf("hires_prompt"), () => refresh("txt2img"));
    }

    onUiLoaded(update);
    onAfterUiUpdate(update);
})();
